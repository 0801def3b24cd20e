"""What a learner, or a machine, should be able to show: each line passes, fails, or says what it needs.

    python -m labs.checklist                 # all; exits with 1 if a line fails
    python -m labs.checklist rounding        # the lines with this word in their name

Every line measures what it claims, here and now, at a size that takes seconds.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass

import torch

from common.config import MoEConfig, Workload, preset
from common.level import Unsupported, discover  # first: it picks Triton's interpreter where there is no GPU
from common.measure import Spread, WallClock, gate, interleave
from common.model import make_inputs, make_weights, oracle
from common.show import number
from labs.full_moe import OptimizedMoELayer
from labs.kernels.rounding import plan_rounding
from labs.moe_layer.admission import round_choice
from labs.studies.byte_lm import SMALL, moe_factory, train
from labs.studies.study import GpuClock

from rich.console import Console


@dataclass(frozen=True)
class Outcome:
    """Whether a line holds, and what was measured."""

    ok: bool
    found: str


def ratio_of_medians(slow: Callable[[], object], fast: Callable[[], object],
                     clock: WallClock | GpuClock) -> float:
    """How many times faster, from interleaved rounds after a warm-up."""
    calls = (slow, fast)
    for call in calls * 2:
        clock(call)
    *_, samples = interleave(calls, 7, clock, 2.0)
    first, second = (Spread.of(taken).p50 for taken in samples)
    return first / second


def needs_gpu(device: torch.device) -> None:
    """Raise Unsupported without one."""
    if device.type != "cuda":
        raise Unsupported("needs CUDA")


def basic_forward(device: torch.device) -> Outcome:
    """The layer's output is the float64 oracle's, within rounding."""
    cfg = preset("tiny")
    workload = Workload(cfg, 64, torch.float32)
    weights = make_weights(cfg, torch.float32, device)
    x_TD = make_inputs(workload, weights)
    level0 = next(loaded for loaded in discover() if loaded.level.number == 0)
    found = gate(level0.build(cfg, weights)(x_TD), oracle(cfg, weights, x_TD), workload)
    return Outcome(found.ok, f"relative error {found.rel_err:.1e}, bound {found.bound:.1e}")


def grouped_faster(device: torch.device) -> Outcome:
    """Level 4 against level 0 on qwen3-30b-a3b's layer, 512 tokens."""
    needs_gpu(device)
    workload = Workload(preset("qwen3-30b-a3b"), 512)
    weights = make_weights(workload.config, workload.dtype, device)
    x_TD = make_inputs(workload, weights)
    forwards = {loaded.level.number: loaded.build(workload.config, weights) for loaded in discover()
                if loaded.level.number in (0, 4)}
    gain = ratio_of_medians(lambda: forwards[0](x_TD), lambda: forwards[4](x_TD), WallClock(device))
    return Outcome(gain > 1, f"{number(gain)} times as fast, wanted above 1")


def utilisation_with_rounding(device: torch.device) -> Outcome:
    """Rows over the rows of their tiles, before and after rounding to the nearest tile."""
    cfg, tile, T = MoEConfig("checklist", D=64, F=8, E=16, K=2), 64, 2048
    weights = make_weights(cfg, torch.float32, device)
    x_TD = make_inputs(Workload(cfg, T, torch.float32), weights)
    probs_TE = (x_TD @ weights.router_ED.T).softmax(dim=1)
    ids_TK = probs_TE.topk(cfg.K, dim=1).indices
    rounded = round_choice(probs_TE, ids_TK, plan_rounding(cfg, T, tile, "nearest"))

    def full(rows_E: torch.Tensor) -> float:
        return (rows_E.sum() / ((rows_E + tile - 1) // tile * tile).sum()).item()

    before, after = full(rounded.counts_E), full(rounded.offsets_E1.diff())
    return Outcome(after > 0.95, f"{after:.1%} of the tiles' rows in use, {before:.1%} without rounding")


def overlap_reduces_latency(device: torch.device) -> Outcome:
    """A grouped GEMM with four pipeline stages against the same with one."""
    needs_gpu(device)
    from labs.studies.io_overlap import FULL, Problem

    problem = Problem(FULL, device)
    one, four = (problem.one_role(FULL.block_N, depth, False, 0) for depth in (1, 4))
    for call in (one, four):
        problem.out_RN.fill_(float("nan"))
        call()
        problem.check("pipelined kernel")
    gain = ratio_of_medians(one, four, GpuClock(device))
    return Outcome(gain > 1, f"{number(gain)} times as fast with 4 stages as with 1, wanted above 1")


def load_within_2x(device: torch.device) -> Outcome:
    """The busiest expert over the mean, after a short training with a moving bias."""
    run = train(moe_factory(SMALL, capacity_factor=None, load_balance_weight=0.01, bias_update_rate=0.01), steps=120,
                device=device, progress="checklist: training for a balanced load")
    last = [max(layers) for layers in run.balance["max_over_mean"][-10:]]
    peak = sum(last) / len(last)
    first = max(run.balance["max_over_mean"][0])
    return Outcome(peak < 2, f"the busiest expert has {peak:.2f} times the mean after {run.steps} steps "
                             f"({first:.2f} at the first), wanted below 2")


def end_to_end(device: torch.device) -> Outcome:
    """The layer to take away against a loop over experts, forward and backward."""
    needs_gpu(device)
    cfg = preset("olmoe-1b-7b")
    made = dict(capacity_factor=None, device=device, dtype=torch.bfloat16)
    layers = [OptimizedMoELayer(cfg.D, cfg.F, cfg.E, cfg.K, backend=backend, **made) for backend in ("loop", "auto")]
    x_TD = torch.randn(4096, cfg.D, device=device).to(torch.bfloat16)
    grad_TD = torch.randn(x_TD.shape, device=device).to(torch.bfloat16)

    def step(layer: OptimizedMoELayer) -> None:
        layer.zero_grad(set_to_none=True)
        layer(x_TD).backward(grad_TD)

    gain = ratio_of_medians(lambda: step(layers[0]), lambda: step(layers[1]), WallClock(device))
    return Outcome(gain > 1.5, f"{number(gain)} times as fast ({layers[1].backend.name}), wanted above 1.5")


ITEMS: dict[str, Callable[[torch.device], Outcome]] = {
    "basic MoE forward works": basic_forward,
    "grouped faster than sequential": grouped_faster,
    "utilisation above 95% with rounding": utilisation_with_rounding,
    "overlap reduces latency": overlap_reduces_latency,
    "load within 2x": load_within_2x,
    "end-to-end above 1.5x": end_to_end,
}


def main(argv: list[str] | None = None) -> int:
    """Run the lines asked for. Returns 0 if none fails, 1 if one does, 2 if a word fits no line."""
    parser = argparse.ArgumentParser(description="Lines that pass, fail, or say what they need.")
    parser.add_argument("words", nargs="*", help="only lines with one of these words in their name")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    unknown = [word for word in args.words if not any(word in name for name in ITEMS)]
    if unknown:
        print(f"error: {unknown[0]!r} is in no line's name. The lines: {'; '.join(ITEMS)}", file=sys.stderr)
        return 2
    console = Console(highlight=False, soft_wrap=True)
    failed = False
    for name, item in ITEMS.items():
        if args.words and not any(word in name for word in args.words):
            continue
        print(f"checklist: {name} ...", file=sys.stderr, flush=True)
        try:
            outcome = item(torch.device(args.device))
        except Unsupported as lack:
            console.print(f"[yellow]n/a[/]   {name}: n/a ({lack})")
            continue
        except Exception as error:  # a line that raises has failed, its traceback shown; the others still run
            traceback.print_exc()
            outcome = Outcome(False, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        failed |= not outcome.ok
        console.print(f"{'[green]pass[/]' if outcome.ok else '[red]FAIL[/]'}  {name}: {outcome.found}")
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
