"""Bands of down's columns: level 8's layer with bands of several widths, and with the sum after down.

    python labs/kernels/band_widths.py           measure, print, and write plots/bands/<gpu>_bands.json
    python labs/kernels/band_widths.py --show    print what is recorded there

Each band but the last is summed beside the next ones' multiply (down_combine.py). Which widths are fastest depends on
how fast the chip multiplies, and so on how hot it is: every call is timed twice, after some time of bare GEMMs, and
after rest. What edges_for chooses is timed a second time: its gain over itself is noise.

Timed is what a layer does after its router: the plan of tiles, up, down with the sum beside it, the last band's sum.
All in CUDA graphs, with a cold L2. Each is held to the sum after down before it is timed: the sums may differ by what
one rounding to bf16 does.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

from common.config import MoEConfig, Workload, preset
from common.model import Weights, make_inputs, make_weights
from common.peers import Captured
from common.references import BOUND, build_bmm
from common.show import number
from labs import level8_tma_overlap as level8
from labs.kernels import ops
from labs.kernels.choice import Choice, Chooser
from labs.kernels.down_combine import BLOCK_N, down_combine, edges_for, split
from labs.kernels.launch import sm_count
from labs.kernels.routing import Routing, new_arrivals
from labs.studies import study

# T tokens, D model width, F expert width, E experts, K top-k, R = T*K routed rows.

CASES = (("qwen3-30b-a3b", 8192), ("qwen3-30b-a3b", 16384), ("olmoe-1b-7b", 16384), ("sonic-30b", 32768),
         ("deepseek-v3", 16384), ("mixtral-8x7b", 8192))
RATIOS = (1.0, 1.5, 2.0, 3.0, 5.0)  # of a band's width to the next one's
AFTER, CHOSEN, AGAIN = "the sum after", "chosen", "chosen again"
ROUNDS = 30
LOAD_SECONDS, REST_SECONDS = 0.008, 0.008  # before a call on a hot chip, and on a cool one
MOST_ERROR = 4e-3  # relative: one rounding to bf16 is 1.7e-3


def widths(edges: tuple[int, int], tiles: int) -> tuple[int, ...]:
    """The column tiles of each band: of `split`'s edges, among `tiles`."""
    return tuple(end - start for start, end in itertools.pairwise((0, *edges, tiles)) if end > start)


def candidates(cfg: MoEConfig, T: int) -> dict[str, tuple[int, int] | None]:
    """Name -> edges, None for the sum after down. What edges_for chooses comes under names of its own."""
    tiles = -(-cfg.D // BLOCK_N)
    chosen = edges_for(cfg.D, cfg.F, cfg.K, T * cfg.K / cfg.E)
    tried = {split(tiles, ratio, bands) for bands in (2, 3) for ratio in RATIOS} - {chosen}
    named = {", ".join(map(str, widths(edges, tiles))): edges for edges in sorted(tried, reverse=True)}
    return {AFTER: None, CHOSEN: chosen, **named, AGAIN: chosen}


def experts_combined(
    x: Tensor, routed: Routing, packed: Weights, choice: Choice, edges: tuple[int, int] | None,
) -> Tensor:
    """level8.experts_combined with these bands: (T, D)."""
    if edges is None:
        return ops.combining.combine(level8.experts(x, routed.token_of_row_R, routed.offsets_E1, routed.work_W4, packed,
                                                    choice), routed.row_of_slot_TK, routed.scores_TK)
    (_, D, F), R = packed.down_EDF.shape, routed.token_of_row_R.numel()
    hidden_RF, y_RD = x.new_empty(R, F), x.new_empty(R, D)
    plan = ops.up_in_tiles(x, routed.token_of_row_R, routed.offsets_E1, packed.gate_up_E2FD, hidden_RF, choice.kernels,
                           choice.group)
    return down_combine(hidden_RF, packed.down_EDF, plan, routed.row_of_slot_TK, routed.scores_TK, y_RD,
                        x.new_empty(routed.row_of_slot_TK.shape[0], D), sm_count(x.device),
                        early=choice.kernels == "gather", edges=edges)


def load(call: Callable[[], object], seconds: float) -> None:
    """Call, over and over, for so long, with nothing left to do on the GPU afterwards."""
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        call()
        torch.cuda.synchronize()


def measure_case(cfg: MoEConfig, T: int, weights: Weights, clock: study.GpuClock) -> dict:
    """One layer: all widths held to the sum after down, then their milliseconds on a hot and on a cool chip, beside the
    two bare bmm. Raises RuntimeError for answers that differ by more than a rounding."""
    workload = Workload(cfg, T, weights.dtype, "natural")
    x_TD, packed = make_inputs(workload, weights), level8.repack(cfg, weights)
    choice = Chooser(cfg.D, cfg.F, cfg.E, weights.dtype, x_TD.device, "off")(T * cfg.K)
    routed = level8.route(x_TD, weights.router_ED, new_arrivals(x_TD.device), cfg, choice)
    bound = partial(Captured(build_bmm(workload, weights)), x_TD)
    expected = experts_combined(x_TD, routed, packed, choice, None).float()
    calls, tried, ms = {BOUND: bound}, candidates(cfg, T), {}
    for name, edges in tried.items():
        run = Captured(partial(experts_combined, routed=routed, packed=packed, choice=choice, edges=edges))
        error = ((run(x_TD).float() - expected).norm() / expected.norm()).item()
        if not error < MOST_ERROR:
            raise RuntimeError(f"{cfg.name}, T={T}: bands {name} differ from {AFTER} by {error:.1e}")
        calls[name] = partial(run, x_TD)
    for mode, before in (("hot", partial(load, bound, LOAD_SECONDS)), ("cool", partial(time.sleep, REST_SECONDS))):
        ms[mode] = study.time_together(calls, lambda call, before=before: (before(), clock(call))[1], ROUNDS)
    chosen = widths(tried[CHOSEN], -(-cfg.D // BLOCK_N))
    return {"preset": cfg.name, "T": T, "chosen": ", ".join(map(str, chosen)), "ms": ms}


def measure(options: study.Options) -> dict:
    """All cases."""
    clock, cases = study.GpuClock(options.device), []
    for name, T in CASES:
        options.say(f"{name}, T={T}")
        cases.append(measure_case(preset(name), T, make_weights(preset(name), torch.bfloat16, options.device), clock))
    return {"rounds": ROUNDS, "cases": cases}


def gain(times: dict, name: str) -> float:
    """The chosen widths' median over another's, less 1."""
    return times[CHOSEN]["p50"] / times[name]["p50"] - 1


def table(figures: dict) -> list[study.PlainTable | str]:
    """A row a width of a case, and one of the bound: milliseconds and what it gains on what is chosen, hot and cool."""
    rows = []
    for case in figures["cases"]:
        for name in case["ms"]["hot"]:
            cells = [f"{number(times[name]['p50'])} {gain(times, name):+.1%}" for times in case["ms"].values()]
            said = case["chosen"] + ", chosen" + name.removeprefix(CHOSEN) if name.startswith(CHOSEN) else name
            rows.append([f"{case['preset']} {case['T']}", said, *cells])
    return [study.PlainTable("Bands of down's columns", ["layer, T", "column tiles", "hot ms", "cool ms"], rows),
            "Medians, and what they gain on the widths that are chosen; hot: after bare GEMMs, cool: after rest"]


def conclude(figures: dict) -> str:
    """What the fastest other widths of each case gain on the chosen ones, beside how far those are from themselves."""
    said = []
    for mode in ("hot", "cool"):
        timed = [case["ms"][mode] for case in figures["cases"]]
        best = [max((gain(times, name), name) for name in times.keys() - {BOUND, CHOSEN, AGAIN}) for times in timed]
        (most, name), noise = max(best), max(abs(gain(times, AGAIN)) for times in timed)
        case = figures["cases"][best.index((most, name))]
        said.append(f"on a {mode} chip the fastest other widths gain {min(best)[0]:+.1%} to {most:+.1%} on those "
                    f"chosen ({name} on {case['preset']} at {case['T']} tokens), and those on themselves up to "
                    f"{noise:.1%}")
    return f"Over {len(figures['cases'])} layers, {'; '.join(said)}."


STUDY = study.Study("bands", "How wide should the bands be whose sum hides behind down?", measure, table,
                    lambda *_: {}, conclude, folder="bands")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, save and print, or print what is recorded; returns the exit status: 2 where that is not possible."""
    return study.main_on_hopper(STUDY, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
