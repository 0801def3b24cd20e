"""What each idea brings to OptimizedMoELayer, measured: the experts one by one, + grouped GEMM, + tile-aware token
rounding, + IO overlap.

    python labs/full_moe_benchmark.py --config deepseek-v3 --mode train      forward, and forward + backward
    python labs/full_moe_benchmark.py --config deepseek-v3 --mode infer      forward, by the layer for inference

All rows have the same weights and tokens and run in one process, in interleaved rounds with a cold L2. A row is timed
only if its output, and in training its gradients, equal the float64 definition of what it routed. Beside the steps:
the last one with exact top-k in place of rounding, and with gradient checkpointing. In inference there is no rounding:
it is not causal.

Memory kept is what a forward leaves for its backward, x included. Peak is that of forward + backward above the start,
weights' gradients included.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch

import common.level  # isort: skip  # noqa: F401  (picks Triton's interpreter where there is no GPU)
from common.config import DEFAULT_TOKENS, PRESETS, MoEConfig, Workload, dtype_name, preset
from common.level import Unsupported
from common.measure import PeakMemory, Spread, WallClock, error_bound, gate, interleave, warm_up
from common.model import Oracle, make_inputs, make_weights, must_fit, oracle
from common.show import number
from labs.full_moe import OptimizedMoELayer
from labs.moe_layer.definition import errors_against_definition, kept_experts
from labs.moe_layer.huggingface import share_parameters
from labs.moe_layer.memory import measure_kept_bytes
from labs.studies.study import (
    COLORS,
    Options,
    PlainTable,
    Refused,
    Study,
    changes,
    figure,
    legend_above,
    main,
    positive,
)

# T tokens, D model width, F expert width, E experts, K top-k.

LEAST_TILES = 4  # mean rows an expert, in tiles, that the default token count gives: rounding wants at least two
SECONDS_EACH = 3.0
MIB = 2**20


@dataclass(frozen=True)
class Step:
    """A row: the layer's options, and whether it is one of the cumulative steps or stands beside them."""

    name: str
    options: dict
    cumulative: bool = True


def steps_of(mode: str, tile: int) -> list[Step]:
    """The rows of a mode, in order."""
    grouped, kernels = {"backend": "grouped"}, {"backend": "kernels"}
    if mode == "infer":
        return [Step("baseline, eager loop", {"backend": "loop", "cuda_graph": False}),
                Step("+ grouped GEMM", {**grouped, "cuda_graph": False}),
                Step("+ IO overlap, CUDA graph", kernels)]
    rounded = {"token_rounding": "nearest", "tile_size": tile}
    return [Step("baseline, eager loop", {"backend": "loop"}),
            Step("+ grouped GEMM", grouped),
            Step("+ tile-aware rounding", {**grouped, **rounded}),
            Step("+ IO overlap", {**kernels, **rounded}),
            Step("with exact top-k", kernels, cumulative=False),
            Step("with checkpointing", {**kernels, **rounded, "gradient_checkpointing": True},
                 cumulative=False)]


def default_tokens(cfg: MoEConfig, tile: int) -> int:
    """The largest of the preset's token counts, or more, so that an expert has LEAST_TILES tiles on average."""
    T = max(DEFAULT_TOKENS[cfg.name])
    least = -(-LEAST_TILES * tile * cfg.E // cfg.K)
    return max(T, 2 ** (least - 1).bit_length())


class Subject:
    """One row's layer, on the weights that all rows share."""

    def __init__(self, step: Step, base: OptimizedMoELayer, cfg: MoEConfig, mode: str):
        self.step, self.mode = step, mode
        make = OptimizedMoELayer.for_inference if mode == "infer" else OptimizedMoELayer
        options = {"capacity_factor": None, "scoring": cfg.scoring, "renormalize": cfg.renormalize, **step.options}
        self.layer = make(cfg.D, cfg.F, cfg.E, cfg.K, **options, device="meta")
        share_parameters(base, self.layer)
        self.backend = self.layer.backend

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        """As a user of the mode runs it."""
        if self.mode == "infer":
            with torch.no_grad():
                return self.layer(x_TD)
        return self.layer(x_TD)

    def forward_backward(self, x_TD: torch.Tensor, grad_TD: torch.Tensor) -> torch.Tensor:
        """Forward, then gradients of x and all weights."""
        x_TD.grad = None
        self.layer.zero_grad()
        out_TD = self.layer(x_TD)
        out_TD.backward(grad_TD)
        return out_TD.detach()


def check_training(subject: Subject, x_TD: torch.Tensor, grad_TD: torch.Tensor, bound: float) -> dict[str, float]:
    """Relative errors of output and gradients. Raises Refused if one is over its bound, or NaN: a gradient is rounded
    on the way there and on the way back, so its bound is twice the output's."""
    layer = subject.layer
    out_TD = subject.forward_backward(x_TD, grad_TD)
    admitted, _, _ = layer.admit(layer.gate(x_TD))
    errors = errors_against_definition(layer, x_TD, kept_experts(admitted, layer.num_experts), out_TD, grad_TD,
                                       x_TD.grad)
    for name, error in errors.items():
        limit = bound if name == "output" else 2 * bound
        if not error <= limit:
            raise Refused(f"{subject.step.name}: {name} has a relative error of {error:.1e}, over {limit:.1e}; a wrong "
                          "row gets no time")
    return errors


def check_inference(subject: Subject, batches: list[tuple[torch.Tensor, Oracle]], workload: Workload) -> dict:
    """The gate of the ladder, on two batches: a graph must answer routing that it was not captured with. And the first
    call's peak in MiB above weights, input and result, a graph's capture included."""
    with PeakMemory(batches[0][0].device) as peak:
        peak.result = subject.forward(batches[0][0])
    for x_TD, expected in batches:
        found = gate(subject.forward(x_TD), expected, workload)
        if not found.ok:
            raise Refused(f"{subject.step.name}: {found.reason}; a wrong row gets no time")
    return {"errors": {"output": found.rel_err}, "peak_mib": None if peak.bytes is None else peak.bytes / MIB}


def measure(options: Options) -> dict:
    """Gate, weigh, then time all rows together."""
    args, device = options.args, options.device
    cfg = preset(args.config or ("qwen3-30b-a3b" if options.full else "tiny"))
    tile = args.tile or (128 if options.full else 16)
    T = args.tokens or (default_tokens(cfg, tile) if options.full else 256)
    rounds = args.rounds or (10 if options.full else 3)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    workload = Workload(cfg, T, dtype)
    options.say("drawing weights and tokens")
    with must_fit(f"--config {cfg.name}", cfg, T, dtype):
        weights = make_weights(cfg, dtype, device)
        x_TD = make_inputs(workload, weights)
    base = OptimizedMoELayer(cfg.D, cfg.F, cfg.E, cfg.K, device="meta")
    base.gate.weight, base.experts.gate_up_proj, base.experts.down_proj = (
        torch.nn.Parameter(tensor) for tensor in (weights.router_ED, weights.gate_up_E2FD, weights.down_EDF))
    if args.mode == "infer":
        base.requires_grad_(False)
        other_TD = make_inputs(Workload(cfg, T, dtype, seed=1000), weights)
        batches = [(one_TD, oracle(cfg, weights, one_TD)) for one_TD in (x_TD, other_TD)]
    grad_TD = torch.randn(x_TD.shape, generator=torch.Generator(device).manual_seed(9), device=device).to(dtype)
    training = args.mode == "train"
    x_TD.requires_grad_(training)
    rows, calls = [], []
    for step in steps_of(args.mode, tile):
        row = {"name": step.name, "cumulative": step.cumulative, "status": "ok", "reason": ""}
        rows.append(row)
        options.say(f"checking: {step.name}")
        try:
            subject = Subject(step, base, cfg, args.mode)
            row["backend"] = list(subject.backend)
            if training:
                row["errors"] = check_training(subject, x_TD, grad_TD, error_bound(workload))
                row |= weigh(subject, x_TD, grad_TD, T)
            else:
                row |= check_inference(subject, batches, workload)
        except Unsupported as missing:
            row |= {"status": "unsupported", "reason": str(missing).partition(": ")[2].partition(";")[0]}
            continue
        except torch.OutOfMemoryError:
            row |= {"status": "out of memory", "reason": "out of memory"}
            free(base, x_TD)
            continue
        calls.append((row, "forward_ms", lambda subject=subject: subject.forward(x_TD)))
        if training:
            calls.append((row, "step_ms", lambda subject=subject: subject.forward_backward(x_TD, grad_TD)))
    free(base, x_TD)
    time_rows(calls, rounds, WallClock(device), options.say)
    first = main_ms(rows[0], args.mode)
    for row in rows:
        ms = main_ms(row, args.mode)
        if ms:
            row |= {"tokens_per_s": 1e3 * T / ms, "speedup": first / ms if first else None}
    return {"config": cfg.name, "mode": args.mode, "shape": {"T": T, "D": cfg.D, "F": cfg.F, "E": cfg.E, "K": cfg.K},
            "tile": tile, "dtype": dtype_name(dtype), "rounds": rounds, "rows": rows}


def weigh(subject: Subject, x_TD: torch.Tensor, grad_TD: torch.Tensor, T: int) -> dict:
    """Memory and loads of one training step, in MiB and rows."""
    layer = subject.layer
    kept = measure_kept_bytes(lambda: layer(x_TD), x_TD, list(layer.parameters()))
    free(layer, x_TD)
    with PeakMemory(x_TD.device) as peak:
        peak.result = subject.forward_backward(x_TD, grad_TD)
    stats = layer.stats()
    return {"kept_mib": kept / MIB, "predicted_kept_mib": layer.activation_bytes(T) / MIB,
            "peak_mib": None if peak.bytes is None else peak.bytes / MIB,
            "dropped": stats.dropped, "added": stats.added, "padded": stats.padded}


def free(layer: torch.nn.Module, x_TD: torch.Tensor) -> None:
    """Drop gradients, and give cached memory back."""
    layer.zero_grad()
    x_TD.grad = None
    gc.collect()
    if x_TD.is_cuda:
        torch.cuda.empty_cache()


def time_rows(calls: list[tuple[dict, str, Callable[[], object]]], rounds: int, clock: WallClock,
              say: Callable[[str], None]) -> None:
    """Write a Spread of milliseconds into each row."""
    say("warming")
    for _, _, call in calls:
        clock(call)
    warm_up([call for *_, call in calls], clock)
    for done, samples in enumerate(interleave([call for *_, call in calls], rounds, clock, SECONDS_EACH), start=1):
        if done == 1 or done % 5 == 0 or done == rounds:
            say(f"timing: round {done} of {rounds}")
        if done == rounds:
            for (row, name, _), taken in zip(calls, samples, strict=True):
                row[name] = vars(Spread.of(taken))


# ---- telling -------------------------------------------------------------------------------------

def main_ms(row: dict, mode: str) -> float | None:
    """The median that speedups and tokens per second go by: forward + backward in training, else forward."""
    spread = row.get("step_ms" if mode == "train" else "forward_ms")
    return spread["p50"] if spread else None


def table(figures: dict) -> list[PlainTable | str]:
    """One row a step."""
    mode, shape = figures["mode"], figures["shape"]
    training = mode == "train"
    headings = ["", "forward ms", *(["fwd + bwd ms"] if training else []), "tokens/s", "speedup", "worst error",
                *(["kept MiB", "predicted", "peak MiB", "dropped", "added"] if training else ["peak MiB"]), "backend"]
    first, rows = main_ms(figures["rows"][0], mode), []
    for row in figures["rows"]:
        ms = main_ms(row, mode)
        if ms is None:
            rows.append([row["name"], f"n/a: {row['reason']}", *[""] * (len(headings) - 2)])
            continue
        cells = [row["name"] if row["cumulative"] else f"({row['name']})", number(row["forward_ms"]["p50"])]
        cells += [number(row["step_ms"]["p50"])] if training else []
        cells += [f"{shape['T'] / ms * 1e3:,.0f}", f"{number(first / ms)}x" if first else "-",
                  f"{max(row['errors'].values()):.1e}"]
        if training:
            cells += [number(row["kept_mib"]), number(row["predicted_kept_mib"]), number(row["peak_mib"]),
                      str(row["dropped"]), str(row["added"])]
        else:
            cells += [number(row.get("peak_mib"))]
        rows.append([*cells, row["backend"][0]])
    words = " ".join(f"{letter}={size}" for letter, size in shape.items())
    return [PlainTable(f"{figures['config']}, {mode}: {words}, {figures['dtype']}", headings, rows)]


def conclude(figures: dict) -> str:
    """From the baseline to the last step, and what exact top-k and checkpointing cost."""
    mode, rows = figures["mode"], {row["name"]: row for row in figures["rows"]}
    steps = [row for row in figures["rows"] if row["cumulative"] and main_ms(row, mode)]
    if len(steps) < 2:
        return "Nothing to compare: fewer than two steps ran."
    first, last = steps[0], steps[-1]
    text = (f"{first['name']} to {last['name']}: {number(main_ms(first, mode) / main_ms(last, mode))}x "
            f"({number(main_ms(first, mode))} to {number(main_ms(last, mode))} ms)")
    if mode == "train" and "+ grouped GEMM" in rows and main_ms(rows["+ grouped GEMM"], mode):
        grouped = rows["+ grouped GEMM"]
        kept = changes([last["kept_mib"] / grouped["kept_mib"] - 1], "more", "less")
        text += (f"; against grouped GEMMs alone {number(main_ms(grouped, mode) / main_ms(last, mode))}x, with {kept} "
                 "kept for backward")
    exact = rows.get("with exact top-k")
    if exact and main_ms(exact, mode):
        taken = changes([main_ms(exact, mode) / main_ms(last, mode) - 1], "longer", "less")
        text += f". Exact top-k in place of rounding takes {taken}"
    saved = rows.get("with checkpointing")
    if saved and main_ms(saved, mode):
        taken = changes([main_ms(saved, mode) / main_ms(last, mode) - 1], "longer", "less")
        text += (f". Gradient checkpointing keeps {number(saved['kept_mib'])} MiB in place of "
                 f"{number(last['kept_mib'])} and takes {taken}")
    return text + "."


def draw(figures: dict, under: str) -> dict[str, Figure]:
    """Time a step, and in training memory kept."""
    training = figures["mode"] == "train"
    shape = " ".join(f"{letter}={size}" for letter, size in figures["shape"].items())
    fig, axes = figure(f"OptimizedMoELayer, {figures['config']}, {figures['mode']}: what each step brings",
                       f"{shape}, {figures['dtype']}  |  {under}", columns=2 if training else 1)
    rows = figures["rows"]
    first = main_ms(rows[0], figures["mode"])
    times = [("forward_ms", "forward", COLORS[0])]
    if training:
        times.append(("step_ms", "forward + backward", COLORS[1]))
    height = 0.8 / len(times)
    for place, row in enumerate(rows):
        for offset, (key, label, color) in enumerate(times):
            y = place + (offset - (len(times) - 1) / 2) * height
            if key not in row:
                axes[0].text(0, y, f" n/a: {row['reason']}", va="center", fontsize=13)
                continue
            spread = row[key]
            axes[0].barh(y, spread["p50"], height, color=color, alpha=1.0 if row["cumulative"] else 0.5,
                         label=label if place == 0 else None, gid=f"{row['name']}: {label}")
            text = f" {number(spread['p50'])} ms"
            if key == times[-1][0]:
                text += f", {number(first / spread['p50'])}x" if first else ""
                text += f", {figures['shape']['T'] / spread['p50'] / 1e3:.2f} M tokens/s"
                if not training and row.get("peak_mib") is not None:
                    text += f", peak {number(row['peak_mib'])} MiB"
            axes[0].text(spread["p50"], y, text, va="center", fontsize=15)
    axes[0].set_xlabel("milliseconds (median)" if training else "milliseconds a forward (median)")
    handles = [Patch(color=color, label=label) for _, label, color in times] if training else []
    if not all(row["cumulative"] for row in rows):
        handles.append(Patch(color="#555", alpha=0.5, label="pale: the last step in another form"))
    if handles:
        legend_above(fig, handles)
    longest = max(row[key]["p50"] for row in rows for key, *_ in times if key in row)
    axes[0].set_xlim(0, (2.1 if training else 1.65) * longest)
    if training:
        for place, row in enumerate(rows):
            if "kept_mib" in row:
                axes[1].barh(place, row["kept_mib"], 0.7, color=COLORS[2], alpha=1.0 if row["cumulative"] else 0.5,
                             gid=f"{row['name']}: kept")
                text = f" {number(row['kept_mib'])} MiB"
                if row.get("peak_mib") is not None:
                    text += f", peak {number(row['peak_mib'])}"
                axes[1].text(row["kept_mib"], place, text, va="center", fontsize=15)
        axes[1].set_xlabel("MiB kept for backward; peak of forward + backward")
        axes[1].xaxis.set_major_formatter("{x:,.0f}")
        axes[1].set_xlim(0, 1.7 * max((row["kept_mib"] for row in rows if "kept_mib" in row), default=1))
        axes[1].set_yticks([])
    axes[0].set_yticks(range(len(rows)), [row["name"] for row in rows])
    for ax in axes:
        ax.set_ylim(len(rows) - 0.4, -0.6)
    return {"": fig}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", help=f"one of {', '.join(PRESETS)} (default: qwen3-30b-a3b on a GPU, tiny without)")
    parser.add_argument("--mode", choices=("train", "infer"), default="train")
    parser.add_argument("--tokens", type=positive, metavar="T", help="default: such that rounding applies")
    parser.add_argument("--tile", type=positive, help="rows that rounding rounds to (default: 128, 16 without a GPU)")
    parser.add_argument("--rounds", type=positive, help="timed rounds (default: 10, 3 without a GPU)")


STUDY = Study("full_moe", "What does each idea bring to OptimizedMoELayer?", measure, table, draw, conclude,
              label=lambda figures: f"{figures['config']}_{figures['mode']}", arguments=arguments, folder="training")


if __name__ == "__main__":
    raise SystemExit(main(STUDY))
