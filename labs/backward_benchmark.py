"""Experts forward and backward, measured: our kernels against torch.nn.functional.grouped_mm with eager PyTorch around.

    python labs/backward_benchmark.py                         every preset but tiny, at the recorded table's tokens
    python labs/backward_benchmark.py --configs qwen3-30b-a3b --tokens 16384
    python labs/backward_benchmark.py --plot plots/training/h200_backward.json

All get the same tokens, weights, scores and expert ids, and give the gradients of all but the ids. They are checked
against the float64 definition, then timed in interleaved rounds with a cold L2. grouped_mm comes with two ways to sum a
token's rows; speedups and shares are against the faster at each shape. `checkpointed`: our kernels under
torch.utils.checkpoint, which keeps x, scores and ids, and runs the forward twice.

Memory kept is what a forward leaves for its backward, x and scores included, weights not. Peak is that of forward +
backward above the start, gradients included.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from matplotlib.figure import Figure
from torch.nn.functional import grouped_mm, silu
from torch.utils.checkpoint import checkpoint

import common.level  # isort: skip  # noqa: F401  (picks Triton's interpreter where there is no GPU)
from common.config import PRESETS, MoEConfig, preset
from common.measure import PeakMemory, WallClock, warm_up
from common.show import number
from labs.kernels.backward import activation_bytes, moe_experts
from labs.moe_layer.definition import Errors
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
    time_together,
)

# T tokens, D model width, F expert width, E experts, K top-k, R = T*K routed rows.

SHAPES = {"mixtral-8x7b": 8192, "qwen3-30b-a3b": 16384, "olmoe-1b-7b": 16384, "deepseek-v3": 4096, "sonic-30b": 32768,
          "sonic-7b": 24576, "seed": 8192}
OURS, CHECKPOINTED = "our kernels", "checkpointed"
BASELINES = ("grouped_mm, float32 sum", "grouped_mm, bmm sum")
PAPER_SAVED = 0.45  # SonicMoE (arXiv 2512.14080), abstract: activation memory saved on its fine-grained 7B MoE
MIB = 2**20
SECONDS_EACH = 1.0


def grouped_mm_rows(x_TD: torch.Tensor, gate_up_E2FD: torch.Tensor, down_EDF: torch.Tensor,
                    expert_ids_TK: torch.Tensor) -> torch.Tensor:
    """The experts as model code writes them today: sort, gather, two grouped_mm with SwiGLU between; y_TKD."""
    ids_R = expert_ids_TK.flatten()
    order_R = ids_R.argsort(stable=True)
    experts_E = torch.arange(gate_up_E2FD.shape[0], device=x_TD.device)
    ends_E = torch.searchsorted(ids_R[order_R], experts_E, right=True, out_int32=True)
    x_RD = x_TD[order_R // expert_ids_TK.shape[1]]
    gate_RF, up_RF = grouped_mm(x_RD, gate_up_E2FD.transpose(1, 2), offs=ends_E).chunk(2, dim=1)
    y_RD = grouped_mm(silu(gate_RF) * up_RF, down_EDF.transpose(1, 2), offs=ends_E)
    return y_RD[order_R.argsort()].unflatten(0, expert_ids_TK.shape)


def sum_in_float32(x_TD: torch.Tensor, gate_up_E2FD: torch.Tensor, down_EDF: torch.Tensor, scores_TK: torch.Tensor,
                   expert_ids_TK: torch.Tensor) -> torch.Tensor:
    """A product with float32 scores, then a sum: the usual way, and exact."""
    y_TKD = grouped_mm_rows(x_TD, gate_up_E2FD, down_EDF, expert_ids_TK)
    return (y_TKD * scores_TK[:, :, None]).sum(dim=1).to(x_TD.dtype)


def sum_by_bmm(x_TD: torch.Tensor, gate_up_E2FD: torch.Tensor, down_EDF: torch.Tensor, scores_TK: torch.Tensor,
               expert_ids_TK: torch.Tensor) -> torch.Tensor:
    """One bmm of scores, rounded to x's dtype, and rows: the least that eager PyTorch can move here."""
    y_TKD = grouped_mm_rows(x_TD, gate_up_E2FD, down_EDF, expert_ids_TK)
    return torch.bmm(scores_TK.to(x_TD.dtype)[:, None], y_TKD)[:, 0]


def checkpointed(*inputs: torch.Tensor) -> torch.Tensor:
    """Our kernels, their forward run again in the backward."""
    return checkpoint(moe_experts, *inputs, use_reentrant=False)


IMPLEMENTATIONS: dict[str, Callable[..., torch.Tensor]] = {
    OURS: moe_experts, CHECKPOINTED: checkpointed, BASELINES[0]: sum_in_float32, BASELINES[1]: sum_by_bmm,
}


# ---- one shape -----------------------------------------------------------------------------------
class Problem:
    """Inputs of one shape: `leaves` x_TD, gate_up_E2FD, down_EDF, scores_TK; expert_ids_TK of random logits."""

    def __init__(self, cfg: MoEConfig, T: int, dtype: torch.dtype, device: torch.device, seed: int = 0):
        self.cfg, self.T, self.generator = cfg, T, torch.Generator(device).manual_seed(seed)
        self.device, self.dtype = device, dtype
        weights = self.draw(cfg.E, 2 * cfg.F, cfg.D), self.draw(cfg.E, cfg.D, cfg.F)
        logits_TE = torch.randn(T, cfg.E, generator=self.generator, device=device)
        scores_TK, self.expert_ids_TK = logits_TE.softmax(dim=1).topk(cfg.K, dim=1)
        scores_TK = scores_TK / scores_TK.sum(dim=1, keepdim=True)
        x_TD = torch.randn(T, cfg.D, generator=self.generator, device=device).to(dtype)
        self.grad_TD = torch.randn(T, cfg.D, generator=self.generator, device=device).to(dtype)
        self.leaves = tuple(leaf.requires_grad_() for leaf in (x_TD, *weights, scores_TK))

    def draw(self, E: int, rows: int, columns: int) -> torch.Tensor:
        """Weights that keep the scale of what they multiply; an expert at a time, to spare memory."""
        out = torch.empty(E, rows, columns, dtype=self.dtype, device=self.device)
        for part in out:
            part.copy_(torch.randn(rows, columns, generator=self.generator, device=self.device) * columns**-0.5)
        return out

    def forward(self, name: str) -> torch.Tensor:
        return IMPLEMENTATIONS[name](*self.leaves, self.expert_ids_TK)

    def step(self, name: str) -> tuple[torch.Tensor, ...]:
        """Forward and backward; the gradients of the leaves."""
        return torch.autograd.grad(self.forward(name), self.leaves, self.grad_TD)

    def errors(self, out_TD: torch.Tensor, grads: tuple[torch.Tensor, ...]) -> dict[str, float]:
        """Relative errors against the float64 definition, an expert at a time."""
        errors = Errors()
        x_TD, gate_up_E2FD, down_EDF, scores_TK = (leaf.detach() for leaf in self.leaves)
        ref_TD, grad_x_TD = (torch.zeros_like(x_TD, dtype=torch.float64) for _ in range(2))
        grad_scores_TK = torch.zeros_like(scores_TK, dtype=torch.float64)
        for e in range(self.cfg.E):
            token, slot = (self.expert_ids_TK == e).nonzero(as_tuple=True)
            leaves = [one.double().requires_grad_() for one in
                      (x_TD[token], gate_up_E2FD[e], down_EDF[e], scores_TK[token, slot])]
            gate, up = (leaves[0] @ leaves[1].T).chunk(2, dim=1)
            y = ((silu(gate) * up) @ leaves[2].T) * leaves[3][:, None]
            found = torch.autograd.grad(y, leaves, self.grad_TD[token].double())
            ref_TD.index_add_(0, token, y.detach())
            grad_x_TD.index_add_(0, token, found[0])
            grad_scores_TK[token, slot] = found[3]
            errors.add("gate_up", grads[1][e], found[1])
            errors.add("down", grads[2][e], found[2])
        errors.add("out", out_TD, ref_TD)
        errors.add("x", grads[0], grad_x_TD)
        errors.add("scores", grads[3], grad_scores_TK)
        return errors.read()


def measure_shape(cfg: MoEConfig, T: int, dtype: torch.dtype, rounds: int, options: Options) -> dict:
    """Check, weigh and time all implementations at one shape. Raises Refused where one is wrong."""
    options.say(f"{cfg.name}, T={T}: weights")
    problem = Problem(cfg, T, dtype, options.device)
    x_TD, weights = problem.leaves[0], list(problem.leaves[1:3])
    limit, rows, calls = 2 * torch.finfo(dtype).eps + 1e-5, [], {}
    for name in IMPLEMENTATIONS:
        options.say(f"{cfg.name}, T={T}: checking and weighing {name}")
        errors = problem.errors(problem.forward(name).detach(), problem.step(name))
        if not all(error <= limit for error in errors.values()):
            raise Refused(f"{cfg.name}, T={T}: {name} is off by {errors}, more than {limit:.1e}: not timed")
        kept = measure_kept_bytes(lambda name=name: problem.forward(name), x_TD, weights)
        kept += problem.leaves[3].nbytes if x_TD.is_cuda else 0
        collect(options.device)
        with PeakMemory(options.device) as peak:
            problem.step(name)
        rows.append({"name": name, "errors": errors, "kept_mib": kept / MIB,
                     "peak_mib": None if peak.bytes is None else peak.bytes / MIB})
        calls |= {f"{name}: forward": lambda name=name: problem.forward(name),
                  f"{name}: step": lambda name=name: problem.step(name)}
        collect(options.device)
    options.say(f"{cfg.name}, T={T}: warming")
    clock = WallClock(options.device)
    warm_up(list(calls.values()), clock)
    times = time_together(calls, clock, rounds, SECONDS_EACH,
                          lambda text: options.say(f"{cfg.name}, T={T}: {text}"))
    for row in rows:
        row |= {"forward_ms": times[f"{row['name']}: forward"], "step_ms": times[f"{row['name']}: step"]}
    predicted = activation_bytes(T, cfg.D, cfg.F, cfg.E, cfg.K, dtype.itemsize) / MIB
    return {"config": cfg.name, "shape": {"T": T, "D": cfg.D, "F": cfg.F, "E": cfg.E, "K": cfg.K},
            "dtype": str(dtype).removeprefix("torch."), "flops": 18 * T * cfg.K * cfg.D * cfg.F, "rounds": rounds,
            "predicted_kept_mib": predicted, "rows": rows}


def collect(device: torch.device) -> None:
    """Give cached memory back."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def measure(options: Options) -> dict:
    """All shapes, one after the other."""
    args = options.args
    names = args.configs.split(",") if args.configs else list(SHAPES) if options.full else ["tiny"]
    rounds = args.rounds or (12 if options.full else 2)
    dtype = torch.bfloat16 if options.device.type == "cuda" else torch.float32
    shapes = [(preset(name), args.tokens or SHAPES.get(name, 64)) for name in names]
    return {"paper_saved": PAPER_SAVED,
            "shapes": [measure_shape(cfg, T, dtype, rounds, options) for cfg, T in shapes]}


# ---- telling -------------------------------------------------------------------------------------
def row_of(shape: dict, name: str) -> dict:
    """The row of one implementation."""
    return next(row for row in shape["rows"] if row["name"] == name)


def baseline(shape: dict) -> dict:
    """grouped_mm's row with the faster median forward + backward."""
    return min((row_of(shape, name) for name in BASELINES), key=lambda row: row["step_ms"]["p50"])


def speedup(shape: dict) -> float:
    """Median forward + backward of the baseline over ours."""
    return baseline(shape)["step_ms"]["p50"] / row_of(shape, OURS)["step_ms"]["p50"]


def saved(shape: dict) -> float:
    """Share of the baseline's kept memory that ours does not keep."""
    return 1 - row_of(shape, OURS)["kept_mib"] / baseline(shape)["kept_mib"]


def title(shape: dict) -> str:
    """`qwen3-30b-a3b, T=16384`."""
    return f"{shape['config']}, T={shape['shape']['T']}"


def table(figures: dict) -> list[PlainTable | str]:
    """A row an implementation of each shape."""
    headings = ["", "forward ms", "fwd + bwd ms", "p20 to p80", "TFLOP/s", "speedup", "kept MiB", "saved", "peak MiB",
                "worst error"]
    rows = []
    for shape in figures["shapes"]:
        base = baseline(shape)
        for row in shape["rows"]:
            step = row["step_ms"]
            rows.append([f"{title(shape)}\n{row['name']}", number(row["forward_ms"]["p50"]), number(step["p50"]),
                         f"{number(step['p20'])} to {number(step['p80'])}", number(shape["flops"] / step["p50"] / 1e9),
                         f"{number(base['step_ms']['p50'] / step['p50'])}x", number(row["kept_mib"]),
                         f"{1 - row['kept_mib'] / base['kept_mib']:.0%}", number(row["peak_mib"]),
                         f"{max(row['errors'].values()):.1e}"])
    return [PlainTable("Experts, forward and backward", headings, rows)]


def conclude(figures: dict) -> str:
    """Speedup and memory of all shapes, and what checkpointing costs."""
    shapes = figures["shapes"]
    gains = ", ".join(f"{title(shape)} {number(speedup(shape))}x" for shape in shapes)
    kept = changes([-saved(shape) for shape in shapes], "more", "less")
    paper = f"{figures['paper_saved']:.0%}" + ("" if kept.endswith("less") else " less")
    longer = [row_of(shape, CHECKPOINTED)["step_ms"]["p50"] / row_of(shape, OURS)["step_ms"]["p50"] - 1
              for shape in shapes]
    peaks = [(row_of(shape, OURS)["peak_mib"], baseline(shape)["peak_mib"]) for shape in shapes]
    text = (f"Forward and backward against grouped_mm: {gains}. Kept for backward: {kept} (SonicMoE's paper, on its "
            f"7B model: {paper}).")
    if all(ours is not None for ours, _ in peaks):
        lower = sum(ours <= base for ours, base in peaks)
        text += f" Peak no higher on {lower} of {len(peaks)} shapes."
    return text + f" Checkpointing takes {changes(longer, 'longer', 'less')}."


def draw(figures: dict, under: str) -> dict[str, Figure]:
    """Time of a step and memory kept, a group of bars a shape."""
    shapes = figures["shapes"]
    dtypes = ", ".join(sorted({shape["dtype"] for shape in shapes}))
    fig, axes = figure("Training the experts: forward + backward, and memory kept",
                       f"presets' D, F, E, K, {dtypes}  |  {under}", columns=2, widths=[3, 2])
    names = list(IMPLEMENTATIONS)
    height = 0.8 / len(names)
    for place, shape in enumerate(shapes):
        base = baseline(shape)
        for i, name in enumerate(names):
            row, y = row_of(shape, name), place + (i - (len(names) - 1) / 2) * height
            ms, base_ms = row["step_ms"], base["step_ms"]["p50"]
            share = ms["p50"] / base_ms
            label = name if place == 0 else None
            axes[0].barh(y, share, height, color=COLORS[i], label=label, gid=f"{title(shape)}: {name}",
                         xerr=[[share - ms["p20"] / base_ms], [ms["p80"] / base_ms - share]])
            text = f" {number(ms['p50'])} ms" + ("" if name == base["name"] else f", {number(1 / share)}x")
            axes[0].text(max(share, ms["p80"] / base_ms), y, text, va="center", fontsize=13)
            kept = row["kept_mib"] / base["kept_mib"]
            axes[1].barh(y, kept, height, color=COLORS[i])
            axes[1].text(kept, y, f" {number(row['kept_mib'])} MiB", va="center", fontsize=13,
                         bbox={"facecolor": "white", "edgecolor": "none", "pad": 0})
    axes[0].set_xlabel("time over the faster grouped_mm's (median; p20 to p80)")
    axes[1].set_xlabel("bytes kept for backward, over grouped_mm's")
    paper = axes[1].axvline(1 - figures["paper_saved"], color="#555", ls="--", lw=2, zorder=0,
                            label=f"SonicMoE's paper: {figures['paper_saved']:.0%} less")
    legend_above(fig, [*axes[0].get_legend_handles_labels()[0], paper])
    axes[0].set_yticks(range(len(shapes)), [title(shape).replace(", ", "\n") for shape in shapes])
    axes[1].set_yticks([])
    for ax in axes:
        ax.set_ylim(len(shapes) - 0.5, -0.5)
        ax.set_xlim(0, 1.45 * max(1.0, *(row["step_ms"]["p50"] / baseline(shape)["step_ms"]["p50"]
                                         for shape in shapes for row in shape["rows"])) if ax is axes[0] else 1.45)
    return {"": fig}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--configs", help=f"of {', '.join(PRESETS)}, with commas (default: {', '.join(SHAPES)})")
    parser.add_argument("--tokens", type=positive, metavar="T", help="default: the recorded table's")
    parser.add_argument("--rounds", type=positive, help="timed rounds (default: 12, 2 without a GPU)")


STUDY = Study("backward", "What do the training kernels bring, in time and memory?", measure, table, draw, conclude,
              label=lambda figures: "" if len(figures["shapes"]) > 1 else figures["shapes"][0]["config"],
              arguments=arguments, folder="training")


if __name__ == "__main__":
    raise SystemExit(main(STUDY))
