"""Orders of the experts for their row tiles: level 8's up and down GEMMs, timed in each.

    python labs/kernels/tile_orders.py           measure, print, and write plots/orders/<gpu>_orders.json
    python labs/kernels/tile_orders.py --show    print what is recorded there

An order is only another table of row tiles (tiles.py): no row moves, no kernel changes, so every order must give plain
order's bits, which is checked before anything is timed. Plain order is timed twice: its gain over itself is noise.

    plain           by the experts' numbers, as plan_tiles has them
    largest first   by falling rows; smallest first: by rising rows
    small last      plain, but experts that do not fill one tile together at the end
    evened          largest and smallest in turn, so that tiles keep pace with experts: an expert's weights come from
                    memory once, however few its tiles, so memory is asked for as much at one time as at another

up_gather and down are timed, each by itself with a cold L2, with the fill that sets its counter back. Level 8 sums
tokens beside down where there are many, and walks through the same table.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

from common.config import MoEConfig, Workload, preset
from common.model import Weights, make_inputs, make_weights
from common.show import number
from labs.kernels.grouped_gemm import down, up_gather
from labs.kernels.launch import sm_count
from labs.kernels.tiles import GROUP, TilePlan, plan_tiles
from labs.studies import study

# T tokens, D model width, F expert width, E experts, K top-k, R = T*K routed rows, X row tiles.

TILE_ROWS = 128
PLAIN, AGAIN = "plain", "plain again"
CASES = (("qwen3-30b-a3b", 16384), ("qwen3-30b-a3b", 4096), ("olmoe-1b-7b", 16384))
HALF, LOWERED = "half", 2.0  # half of the experts get next to no rows: their logits are so many deviations lower
ROUTINGS, ROUNDS = ("natural", "skewed", HALF), 20


def plan_in_order(offsets_E1: Tensor, R: int, order_E: Tensor, tile_rows: int = 128, group: int = GROUP) -> TilePlan:
    """plan_tiles' table with the experts in another order: an expert's entries move together, its groups with them.

    offsets_E1 (E + 1,) int32, order_E (E,) int64, on one device, which it waits for. Raises ValueError unless order_E
    names every expert once, and as plan_tiles does.
    """
    plan = plan_tiles(offsets_E1, R, tile_rows, group)
    tiles_E = (offsets_E1.diff() + tile_rows - 1) // tile_rows
    if not torch.equal(order_E.sort().values, torch.arange(len(tiles_E), device=order_E.device)):
        raise ValueError(f"order_E must name each of {len(tiles_E)} experts once, but is {order_E.tolist()}")
    first_E, ordered_E = tiles_E.cumsum(0) - tiles_E, tiles_E[order_E]
    moved_X = (ordered_E.cumsum(0) - ordered_E - first_E[order_E]).repeat_interleave(ordered_E)
    entries = plan.tiles_X5[torch.arange(len(moved_X), device=moved_X.device) - moved_X]
    entries[:, 3] += moved_X  # the first tile of its group
    return plan._replace(tiles_X5=torch.cat([entries, plan.tiles_X5[len(moved_X):]]))


def evened(tiles_E: Sequence[int]) -> list[int]:
    """The largest expert left while there are few tiles for the experts begun, else the smallest; empty ones last."""
    falling = sorted(range(len(tiles_E)), key=lambda expert: -tiles_E[expert])
    left, order, tiles = deque(expert for expert in falling if tiles_E[expert]), [], 0
    empty, mean = falling[len(left):], sum(tiles_E) / max(len(left), 1)
    while left:
        order.append(left.popleft() if tiles <= mean * len(order) else left.pop())
        tiles += tiles_E[order[-1]]
    return order + empty


def orders(rows_E: Tensor) -> dict[str, Tensor]:
    """Name -> (E,) int64, the experts in that order. rows_E (E,) int32: the rows of each."""
    plain_E = torch.arange(len(rows_E), device=rows_E.device)
    evened_E = torch.tensor(evened(rows_E.add(TILE_ROWS - 1).floor_divide(TILE_ROWS).tolist()), device=rows_E.device)
    return {PLAIN: plain_E, "largest first": rows_E.argsort(descending=True, stable=True),
            "smallest first": rows_E.argsort(stable=True),
            "small last": (rows_E < TILE_ROWS).int().argsort(stable=True), "evened": evened_E, AGAIN: plain_E}


def route(cfg: MoEConfig, T: int, routing: str, weights: Weights) -> tuple[Tensor, Tensor, Tensor]:
    """x_TD (T, D), token_of_row_R (R,) int32 and offsets_E1 (E + 1,) int32, of HALF or a mode of common/model.py."""
    x_TD = make_inputs(Workload(cfg, T, weights.dtype, "natural" if routing == HALF else routing), weights)
    logits_TE = x_TD.float() @ weights.router_ED.float().T
    if routing == HALF:
        logits_TE[:, torch.randperm(cfg.E, generator=torch.Generator().manual_seed(0))[: cfg.E // 2]] -= LOWERED
    ids_R = logits_TE.topk(cfg.K).indices.flatten()
    rows_E = ids_R.bincount(minlength=cfg.E)
    token_of_row_R = (ids_R.argsort(stable=True) // cfg.K).int()
    return x_TD, token_of_row_R, torch.cat([rows_E.new_zeros(1), rows_E.cumsum(0)]).int()


def again(run: Callable, gemm: str, plan: TilePlan, out: Tensor, programs: int) -> None:
    """Another call of a projection on a plan that has served one: its counter goes back to zero."""
    {"up": plan.claimed_up, "down": plan.claimed_down}[gemm].zero_()
    plan.counted.clear()
    run(plan, out, programs)


def measure_case(cfg: MoEConfig, T: int, routing: str, weights: Weights, clock: study.GpuClock) -> dict:
    """One routing: each order's bits held to plain order's, then both GEMMs' milliseconds in each. Weights, bf16, are
    taken as they come for interleaved ones (tiles.py): they are random. Raises RuntimeError for bits that differ."""
    x_TD, token_of_row_R, offsets_E1 = route(cfg, T, routing, weights)
    R, programs, rows_E = token_of_row_R.numel(), sm_count(x_TD.device), offsets_E1.diff()
    plans = {name: plan_in_order(offsets_E1, R, order_E) for name, order_E in orders(rows_E).items()}
    hidden_RF, y_RD, times = x_TD.new_empty(R, cfg.F), x_TD.new_empty(R, cfg.D), {}
    for gemm, run, expected in (("up", partial(up_gather, x_TD, token_of_row_R, weights.gate_up_E2FD), hidden_RF),
                                ("down", partial(down, hidden_RF, weights.down_EDF), y_RD)):
        again(run, gemm, plans[PLAIN], expected, programs)
        out = torch.empty_like(expected)
        for name, plan in plans.items():
            again(run, gemm, plan, out.fill_(float("nan")), programs)
            if not torch.equal(out.view(torch.int16), expected.view(torch.int16)):
                raise RuntimeError(f"{cfg.name}, T={T}, {routing}: {gemm} gives other bits {name} than in plain order")
        calls = {name: partial(again, run, gemm, plan, out, programs) for name, plan in plans.items()}
        times[gemm] = study.time_together(calls, clock, ROUNDS)
    return {"preset": cfg.name, "T": T, "routing": routing, "largest": int(rows_E.max()),
            "small": int(((rows_E > 0) & (rows_E < TILE_ROWS)).sum()), "empty": int((rows_E == 0).sum()),
            "row_tiles": int(plans[PLAIN].tile_count), "ms": times}


def measure(options: study.Options) -> dict:
    """All cases."""
    clock, cases = study.GpuClock(options.device), []
    for name, T in CASES:
        weights = make_weights(preset(name), torch.bfloat16, options.device)
        for routing in ROUTINGS:
            options.say(f"{name}, T={T}, {routing}")
            cases.append(measure_case(preset(name), T, routing, weights, clock))
    return {"rounds": ROUNDS, "cases": cases}


def gain(times: dict, name: str) -> float:
    """Plain order's median over another's, less 1."""
    return times[PLAIN]["p50"] / times[name]["p50"] - 1


def cell(plain: dict, other: dict, gained: float) -> str:
    """Milliseconds in an order and its gain, with a * where its spread and plain order's do not overlap."""
    overlap = plain["p20"] <= other["p80"] and other["p20"] <= plain["p80"]
    return f"{number(other['p50'])} {gained:+.1%}{'' if overlap else '*'}"


def table(figures: dict) -> list[study.PlainTable | str]:
    """A row a GEMM of a case: plain order's milliseconds, then each order's with its gain."""
    rows = [[f"{case['preset']} {case['T']} {case['routing']}", f"{case['small']}, {case['empty']}", gemm,
             "{} ({} to {})".format(*(number(times[PLAIN][key]) for key in ("p50", "p20", "p80"))),
             *(cell(times[PLAIN], times[name], gain(times, name)) for name in times if name != PLAIN)]
            for case in figures["cases"] for gemm, times in case["ms"].items()]
    names = [name for name in figures["cases"][0]["ms"]["up"] if name != PLAIN]
    return [study.PlainTable("Orders of the experts", ["T, routing", "small, empty", "", "plain ms", *names], rows),
            "small, empty: experts under a tile of rows, without any. Medians, gain; *: p20 to p80 is clear of plain's"]


def conclude(figures: dict) -> str:
    """What each order brought, beside what plain order differs by from itself."""
    timed = [times for case in figures["cases"] for times in case["ms"].values()]
    found = {name: [gain(times, name) for times in timed] for name in timed[0] if name != PLAIN}
    noise = max(map(abs, found.pop(AGAIN)))
    gained, best = max((median(each), name) for name, each in found.items())
    told = [f"{name} {median(each):+.1%} ({min(each):+.1%} to {max(each):+.1%})" for name, each in found.items()]
    return (f"Over {len(timed)} GEMMs the median gains on plain order are {', '.join(told)}; plain order differs from "
            f"itself by up to {noise:.1%}, and {best if gained > noise else 'no order'} gains more by the median.")


STUDY = study.Study("orders", "Which order of the experts is fastest?", measure, table, lambda *_: {}, conclude,
                    folder="orders")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, save and print, or print what is recorded; returns the exit status: 2 where that is not possible."""
    return study.main_on_hopper(STUDY, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
