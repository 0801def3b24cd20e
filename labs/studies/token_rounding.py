"""What does rounding every expert's rows to whole tiles bring, and what does it cost in quality?

    python labs/studies/token_rounding.py [--steps 300] [--seeds 3]

Speed: the two grouped GEMMs of labs/kernels/plain_gemm.py in row tiles of 64, 128 and 256, on the rows that exact top-k
gives and on those after each rounding mode, from half a tile of mean rows an expert to 16. The routes are those of
held-out text through a router trained in the byte-level MoE language model, with as many experts; the GEMMs' values are
random. Ideal is what the number of tiles allows; measured is measured, once for the GEMMs alone and once with the
rounding itself.

Quality: the same kind of model, trained with exact top-k and with three modes from the same initial
weights on the same batches, three seeds, and evaluated with exact top-k throughout.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from matplotlib.figure import Figure

import common.level  # isort: skip  # noqa: F401  (picks Triton's interpreter where there is no GPU)
from common.config import MoEConfig, preset
from common.measure import Spread, relative_error
from common.show import number, percent
from labs.kernels.plain_gemm import HOPPER, PlainTile, plain_down, plain_up, tile_for
from labs.kernels.rounding import LEAST_TILES, Rounded, plan_rounding, report_rounding, round_tokens
from labs.kernels.routing import sm_count
from labs.kernels.tiles import interleave_gate_up, plan_tiles
from labs.moe_layer.losses import count_rows
from labs.moe_layer.statistics import evenness
from labs.studies.byte_lm import SMALL, ByteLM, Size, expert_inputs, moe_factory, train
from labs.studies.study import (
    COLORS,
    GpuClock,
    Options,
    PlainTable,
    Study,
    figure,
    main,
    spread_line,
    time_together,
)

# T tokens, D model width, F expert width, E experts, K top-k, R = T*K routed rows, C rows after rounding at most.

MODES = ("exact", "nearest", "up", "down", "balance")
TRAINED = ("exact", "nearest", "up", "down")
COLOR_OF = dict(zip(MODES, COLORS, strict=False))
FILLS = (0.5, 1, 2, 4, 8, 16)  # mean rows an expert, in tiles
TILES = {64: PlainTile(64, 256, 64, warps=4, stages=4, tma=True), 128: HOPPER,
         256: PlainTile(256, 128, 64, warps=8, stages=3, tma=True)}
QUICK_TILES = {64: PlainTile(64, 16, 16, warps=4, stages=1, tma=False)}  # the kernels' smallest row tile
QUICK_CONFIG = MoEConfig("quick", D=16, F=16, E=4, K=2)
ROUTER_STEPS, QUICK_ROUTER_STEPS = 300, 4  # until the router's choice is learned
# 512 rows an expert: 4 tiles of 128, twice the least that SonicMoE calls safe.
MEDIUM = Size(L=2, D=256, H=4, F=256, E=32, K=2, batch=32, sequence=256)
TRAINED_TILE = 128
MOST_SHOWN = 2.1  # in the chart: without rows to work on, a speed has no bound
SMALL_TILE = 16


def arguments(parser: argparse.ArgumentParser) -> None:
    """The trainings' length."""
    parser.add_argument("--steps", type=int, help="of each training (default: 300 on a GPU, 8 without); 0 leaves "
                                                  "quality out")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each mode (default: 3)")


# ---- speed ---------------------------------------------------------------------------------------

class Experts:
    """The two GEMMs of an expert layer, with rows and offsets from a rounding."""

    def __init__(self, cfg: MoEConfig, device: torch.device):
        self.cfg, self.device = cfg, device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        generator = torch.Generator(device).manual_seed(0)

        def draw(*shape: int) -> torch.Tensor:
            return torch.stack([torch.randn(shape[1:], generator=generator, device=device).mul_(
                shape[-1] ** -0.5).to(self.dtype) for _ in range(shape[0])])

        self.gate_up_E2FD, self.down_EDF = draw(cfg.E, 2 * cfg.F, cfg.D), draw(cfg.E, cfg.D, cfg.F)
        self.interleaved = interleave_gate_up(self.gate_up_E2FD)

    def call(self, x_TD: torch.Tensor, rounded: Rounded, tile: PlainTile) -> Callable[[], torch.Tensor]:
        """Rows in, rows out, (C, D); the plan of the tiles is made outside, as it is 6 us whatever the rounding."""
        cfg, C = self.cfg, rounded.token_of_row_C.numel()
        plan = plan_tiles(rounded.offsets_E1, C, tile.block_M)
        hidden_CF, y_CD = x_TD.new_empty(C, cfg.F), x_TD.new_empty(C, cfg.D)
        programs = sm_count(self.device) if self.device.type == "cuda" else 2

        def forward() -> torch.Tensor:
            plain_up(x_TD, rounded.token_of_row_C, rounded.offsets_E1, self.interleaved, plan, hidden_CF, programs,
                     tile)
            plain_down(hidden_CF, rounded.offsets_E1, self.down_EDF, plan, y_CD, programs, tile)
            return y_CD

        return forward

    def check(self, y_CD: torch.Tensor, x_TD: torch.Tensor, rounded: Rounded) -> None:
        """Raise RuntimeError unless the rows of the busiest and the last expert are right (float64)."""
        bounds = rounded.offsets_E1.tolist()
        rows = [after - before for before, after in pairwise(bounds)]
        for e in {rows.index(max(rows)), len(rows) - 1}:
            span = slice(bounds[e], bounds[e + 1])
            both = x_TD[rounded.token_of_row_C[span].long()].double() @ self.gate_up_E2FD[e].double().T
            gate, up = both.chunk(2, dim=1)
            ref = (torch.nn.functional.silu(gate) * up) @ self.down_EDF[e].double().T
            error = relative_error(y_CD[span], ref)
            bound = 2 * torch.finfo(self.dtype).eps + 1e-5
            if not error <= bound:
                raise RuntimeError(f"expert {e}: relative error {error:.2e} is over {bound:.2e}, so it is not timed")


def tokens_for(cfg: MoEConfig, tile: int, fill: float) -> int:
    """T that gives an expert `fill` tiles of rows on average."""
    return max(1, round(fill * tile * cfg.E / cfg.K))


def trained_routes(cfg: MoEConfig, T: int, options: Options) -> tuple[torch.Tensor, dict]:
    """(T, E) probabilities that a trained router gives tokens of held-out text, and how it was trained."""
    E, K, device = cfg.E, cfg.K, options.device
    size = Size(L=2, D=256, H=4, F=64, E=E, K=K, batch=32, sequence=256) if options.full else Size(
        L=1, D=16, H=1, F=16, E=E, K=K, batch=4, sequence=32)
    steps = ROUTER_STEPS if options.full else QUICK_ROUTER_STEPS
    trained: list[ByteLM] = []
    run = train(moe_factory(size, capacity_factor=None), size, steps=steps, device=device,
                progress="token_rounding: a router to route by",
                after_step=lambda step, model: trained.append(model) if step == steps else None)
    (model,) = trained
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.no_grad():
        choice = model.blocks[-1].mlp.gate(expert_inputs(model, size, T, device, dtype))
    _, gini, _, peak = evenness(count_rows(choice.expert_ids_TK, E)).tolist()
    return choice.probs_TE, {"size": vars(size), "steps": steps, "text": run.text, "gini": gini, "max_over_mean": peak}


def speed_point(experts: Experts, tile: PlainTile, fill: float, probs_TE: torch.Tensor, options: Options) -> dict:
    """One tile and one fill: what each mode changes, and the times."""
    cfg, device = experts.cfg, experts.device
    T = tokens_for(cfg, tile.block_M, fill)
    probs_TE = probs_TE[:T]
    generator = torch.Generator(device).manual_seed(1)
    x_TD = torch.randn(T, cfg.D, generator=generator, device=device).to(experts.dtype)
    ids_TK = probs_TE.topk(cfg.K, dim=1).indices
    found, calls = {}, {}
    for mode in MODES if options.full else MODES[:3]:
        plan = plan_rounding(cfg, T, tile.block_M, mode, least_tiles=0)
        rounded = round_tokens(probs_TE, ids_TK, plan)
        report = report_rounding(rounded, plan)
        rows_E = rounded.offsets_E1.diff()
        found[mode] = {"rows": int(rows_E.sum()), "tiles": int(((rows_E + tile.block_M - 1) // tile.block_M).sum()),
                       "dropped": int(report.rows_dropped), "added": int(report.rows_added),
                       "share_changed": report.share_changed.item(),
                       "utilisation": report.utilisation_after.item(),
                       "tokens_without_expert": int(report.tokens_without_expert)}
        forward = experts.call(x_TD, rounded, tile)
        if found[mode]["rows"]:
            experts.check(forward(), x_TD, rounded)
        calls[mode] = forward
        if mode != "exact":
            calls[f"{mode}, rounding"] = lambda plan=plan: round_tokens(probs_TE, ids_TK, plan)
    times = time_together(calls, GpuClock(device), 12 if options.full else 2)
    for mode, one in found.items():
        one["gemm_ms"] = times[mode]
        one["round_ms"] = times.get(f"{mode}, rounding")
        one["ideal_speedup"] = found["exact"]["tiles"] / max(1, one["tiles"])
        one["speedup"] = times["exact"]["p50"] / times[mode]["p50"]
        whole = times[mode]["p50"] + (one["round_ms"]["p50"] if one["round_ms"] else 0)
        one["net_speedup"] = times["exact"]["p50"] / whole
    return {"tile": tile.block_M, "fill": fill, "T": T, "modes": found}


# ---- quality -------------------------------------------------------------------------------------

def quality(options: Options, steps: int, seeds: int) -> dict:
    """The trainings: loss curves and last held-out losses of each mode and seed."""
    size, tile = (MEDIUM, TRAINED_TILE) if options.full else (SMALL, SMALL_TILE)
    modes = {}
    for mode in TRAINED:
        rounding = None if mode == "exact" else mode
        runs, changed = [], []
        for seed in range(seeds):
            options.say(f"training, {mode}, seed {seed}")
            share: list[float] = []

            def watch(step: int, model: torch.nn.Module, share: list[float] = share) -> None:
                if step % 20 == 0 or step == 1:
                    stats = [block.mlp.recorder.read(running=False) for block in model.blocks]
                    share.append(sum(one.dropped + one.added for one in stats) / (size.L * size.T * size.K))

            factory = moe_factory(size, capacity_factor=None, token_rounding=rounding, tile_size=tile)
            runs.append(train(factory, size, steps=steps, seed=seed, device=options.device,
                              evaluate_every=max(1, steps // 8), progress=f"token_rounding: {mode}, seed {seed}",
                              after_step=watch))
            changed.append(statistics.fmean(share))
        modes[mode] = {"losses": [run.losses for run in runs], "evaluations": [run.evaluations for run in runs],
                       "share_changed": changed, "text": runs[0].text}
    return {"size": vars(size), "tile": tile, "steps": steps, "seeds": seeds,
            "rows_per_expert_in_tiles": size.T * size.K / size.E / tile, "modes": modes}


def measure(options: Options) -> dict:
    """Speed at every tile and fill, then quality."""
    full, device = options.full, options.device
    steps = options.args.steps if options.args.steps is not None else (300 if full else 8)
    seeds = options.args.seeds
    if steps < 0 or seeds < 1:
        raise ValueError(f"--steps {steps} --seeds {seeds}: steps at least 0, seeds at least 1")
    if device.type == "cuda":
        tile_for(10 * torch.cuda.get_device_capability()[0] + torch.cuda.get_device_capability()[1])
        if torch.cuda.get_device_capability()[0] < 9:
            raise ValueError("--device cuda: this study's tiles load weights by TMA, which needs sm_90")
    cfg = preset("qwen3-30b-a3b") if full else QUICK_CONFIG
    experts = Experts(cfg, device)
    points, tiles, fills = [], TILES if full else QUICK_TILES, FILLS if full else FILLS[:2]
    probs_TE, routes = trained_routes(cfg, tokens_for(cfg, max(tiles), max(fills)), options)
    for rows, tile in tiles.items():
        for fill in fills:
            options.say(f"tile {rows}, {fill:g} tiles of mean rows an expert")
            points.append(speed_point(experts, tile, fill, probs_TE, options))
    trained = quality(options, steps, seeds if full else min(seeds, 2)) if steps else None
    return {"shape": {"D": cfg.D, "F": cfg.F, "E": cfg.E, "K": cfg.K}, "interpreted": device.type != "cuda",
            "routes": routes, "speed": points, "quality": trained}


# ---- showing -------------------------------------------------------------------------------------

def last_losses(mode: dict) -> list[float]:
    """Held-out loss of each seed after the last step."""
    return [evaluations[-1][1] for evaluations in mode["evaluations"]]


def told_routes(routes: dict) -> str:
    """Where the routes come from, in a line."""
    return (f"routes: held-out text, router trained for {routes['steps']} steps, Gini {routes['gini']:.2f}, busiest "
            f"expert {routes['max_over_mean']:.1f} times the mean")


def table(figures: dict) -> list[PlainTable | str]:
    """A row a point and mode, and a row a trained mode."""
    rows = []
    for point in figures["speed"]:
        for mode, one in point["modes"].items():
            rows.append([f"{point['tile']}, {point['fill']:g}, {mode}", f"{point['T']:,}", percent(one["utilisation"]),
                         f"{one['dropped']:,}", f"{one['added']:,}", f"{one['share_changed']:.1%}",
                         f"{one['tokens_without_expert']:,}", number(one["gemm_ms"]["p50"]),
                         f"{one['ideal_speedup']:.2f}x", f"{one['speedup']:.2f}x", f"{one['net_speedup']:.2f}x"])
    words = " (Triton's interpreter: times mean nothing)" if figures["interpreted"] else ""
    parts: list[PlainTable | str] = [PlainTable(
        f"Speed{words}; {told_routes(figures['routes'])}",
        ["tile, mean rows in tiles, mode", "tokens", "tiles full", "dropped", "added", "changed", "tokens left out",
         "GEMMs, ms", "ideal", "measured", "with rounding"], rows)]
    trained = figures["quality"]
    if trained is None:
        return [*parts, "quality: left out by --steps 0"]
    parts.append(PlainTable(
        f"Quality: {trained['steps']} steps, tile {trained['tile']}, {trained['rows_per_expert_in_tiles']:g} tiles of "
        f"mean rows an expert, evaluated with exact top-k",
        ["trained with", "routes changed", "held-out nats a byte, each seed", "mean"],
        [[mode, f"{statistics.fmean(one['share_changed']):.1%}",
          ", ".join(f"{loss:.4f}" for loss in last_losses(one)), f"{statistics.fmean(last_losses(one)):.4f}"]
         for mode, one in trained["modes"].items()]))
    return parts


def draw(figures: dict, under: str) -> dict[str, Figure]:
    """Ideal and measured speedup of each mode against the fill, a panel a tile; and the loss curves."""
    words = " ".join(f"{letter}={size}" for letter, size in figures["shape"].items())
    tiles = sorted({point["tile"] for point in figures["speed"]})
    fig, axes = figure("Token rounding: what the tiles allow, and what is measured",
                       f"{words}  |  {told_routes(figures['routes'])}  |  {under}", columns=len(tiles))
    for ax, tile in zip(axes, tiles, strict=True):
        points = [point for point in figures["speed"] if point["tile"] == tile]
        fills = [point["fill"] for point in points]
        for mode in MODES[1:]:
            if mode not in points[0]["modes"]:
                continue
            color = COLOR_OF[mode]
            ax.plot(fills, [point["modes"][mode]["ideal_speedup"] for point in points], "--", lw=2, color=color,
                    gid=f"{mode} ideal")
            exact = [point["modes"]["exact"]["gemm_ms"]["p50"] for point in points]
            measured = [{key: base / point["modes"][mode]["gemm_ms"][{"p20": "p80", "p80": "p20"}.get(key, key)]
                         for key in ("p20", "p50", "p80")} for base, point in zip(exact, points, strict=True)]
            spread_line(ax, fills, measured, mode, color)
        ax.axhline(1, color="black", lw=1)
        ax.set_xscale("log", base=2)
        ax.set_xticks(fills, [f"{fill:g}" for fill in fills])
        ax.set_ylim(0.9, MOST_SHOWN)
        ax.set(xlabel="mean rows per expert, in tiles", title=f"tile of {tile} rows")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("GEMMs' time, exact top-k over rounded\n(solid: measured, dashed: ideal; above 1 is faster;"
                       f" cut at {MOST_SHOWN:g})")
    axes[-1].legend()
    figs = {"": fig}
    if figures["quality"] is not None:
        figs["quality"] = draw_quality(figures["quality"], under)
    return figs


def draw_quality(trained: dict, under: str) -> Figure:
    """Held-out loss over the steps; what each mode adds to exact top-k's, seed by seed; the last value of each seed."""
    words = " ".join(f"{letter}={value}" for letter, value in trained["size"].items())
    fig, (left, middle, right) = figure(
        "Token rounding: quality, evaluated with exact top-k",
        f"byte-level MoE language model, {words}, tile {trained['tile']} (an expert has "
        f"{trained['rows_per_expert_in_tiles']:g} on average), {trained['seeds']} seeds  |  {under}", columns=3)
    exact = trained["modes"]["exact"]["evaluations"]
    for place, (mode, one) in enumerate(trained["modes"].items()):
        color = COLOR_OF[mode]
        steps = [step for step, _ in one["evaluations"][0]]
        at = [[run[i][1] for run in one["evaluations"]] for i in range(len(steps))]
        spread_line(left, steps, [vars(Spread.of(values)) for values in at], mode, color)
        gaps = [[value - run[i][1] for value, run in zip(values, exact, strict=True)] for i, values in enumerate(at)]
        if mode != "exact":
            spread_line(middle, steps, [vars(Spread.of(values)) for values in gaps], f"{mode} gap", color)
        right.plot([place] * len(at[-1]), at[-1], "o", ms=14, color=color, alpha=0.7, gid=f"{mode} seeds")
        right.plot([place - 0.25, place + 0.25], [statistics.fmean(at[-1])] * 2, lw=4, color=color)
    middle.axhline(0, color="black", lw=2)
    left.set(xlabel="step", ylabel="held-out loss, nats a byte", title="Loss (median of seeds)")
    middle.set(xlabel="step", ylabel="nats a byte", title="Loss less exact top-k's, same seed")
    right.set_xticks(range(len(trained["modes"])), list(trained["modes"]), fontsize=14)
    right.set(ylabel="held-out loss, nats a byte", title="At the end: seeds, mean")
    left.legend()
    for ax in (left, middle, right):
        ax.grid(alpha=0.3)
    return fig


def conclude(figures: dict) -> str:
    """What `nearest` brings where it begins to be safe, and changes there; then what training says, and cannot say."""
    fills = {point["fill"] for point in figures["speed"]}
    fill = LEAST_TILES if LEAST_TILES in fills else max(fills)
    parts = []
    for point in figures["speed"]:
        if point["fill"] == fill:
            exact, one, up = (point["modes"][mode] for mode in ("exact", "nearest", "up"))
            least = exact["gemm_ms"]["p20"] / one["gemm_ms"]["p80"]
            more = (f", more than fewer tiles explain: as many but full ones, by rounding up, give {up['speedup']:.2f}"
                    if least > one["ideal_speedup"] else "")
            parts.append(f"tile {point['tile']}: {one['speedup']:.2f} times the speed in the GEMMs (ideal "
                         f"{one['ideal_speedup']:.2f}{more}), {one['net_speedup']:.2f} with the rounding itself, "
                         f"{one['share_changed']:.1%} of the routes changed")
    sentence = f"Rounding to the nearest tile at {fill:g} tiles of mean rows an expert: {'; '.join(parts)}"
    trained = figures["quality"]
    if trained is None:
        return sentence + "."
    ends = {mode: last_losses(one) for mode, one in trained["modes"].items()}
    spread = max(ends["exact"]) - min(ends["exact"])
    gaps = {mode: [rounded - exact for rounded, exact in zip(values, ends["exact"], strict=True)]
            for mode, values in ends.items() if mode != "exact"}
    listed = ", ".join(f"{mode} {statistics.fmean(values):+.4f} ({min(values):+.4f} to {max(values):+.4f})"
                       for mode, values in gaps.items())
    return (f"{sentence}; trained at {trained['rows_per_expert_in_tiles']:g} tiles for {trained['steps']} steps, "
            f"held-out loss moves by {listed} nats a byte against exact top-k over {trained['seeds']} seeds, where "
            f"seeds alone differ by {spread:.4f}, and a model and a run this small say nothing of a long one.")


STUDY = Study("token_rounding",
              "What does rounding every expert's rows to whole tiles bring, and what does it cost in quality?",
              measure, table, draw, conclude, arguments=arguments)

if __name__ == "__main__":
    raise SystemExit(main(STUDY))
