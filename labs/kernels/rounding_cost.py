"""What token rounding costs and what it brings: level 6, exact top-k with level 7's kernels, then level 7 at each tile.

Level 7 also takes the sort out and sums a token's rows in another kernel. The second row has all that with exact
top-k, so what rounding itself brings is read against it, in the same interleaved rounds.

    python labs/kernels/rounding_cost.py                               every preset that is large enough to round
    python labs/kernels/rounding_cost.py --presets qwen3-30b-a3b --tokens 16384 --modes nearest,balance

Each rounded row is gated like any level (common/rounded.py). Results go to plots/rounding/, one file a preset, in the
runner's own format; `--show` prints the table of what is recorded there.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from rich.markup import escape
from rich.table import Table

from common.config import DEFAULT_TOKENS, PRESETS, MoEConfig, Workload, preset
from common.level import Loaded, discover
from common.measure import Forward
from common.model import Weights
from common.results import Run, load, save
from common.run import run_workload
from common.show import RunTable, Screen, error_exit, number
from labs.kernels.rounding import plan_rounding

FOLDER = Path(__file__).resolve().parents[2] / "plots" / "rounding"
TILES = (64, 128, 256)
EXACT = "exact, level 7's kernels"


def build_exact(module: ModuleType, cfg: MoEConfig, weights: Weights) -> Forward:
    """Exact top-k through the rounding kernels, which then round to single rows, and all else of level 7."""
    shared_memory = module.shared_memory_bytes(weights.device)

    def forward(x_TD: torch.Tensor) -> torch.Tensor:
        plan = plan_rounding(cfg, x_TD.shape[0], max(TILES), "exact")
        return module.layer_rounded(x_TD, weights, cfg, plan, shared_memory)[0]

    return module.Replay(module.compile_whole(forward), weights)


def variants(tiles: Sequence[int], modes: Sequence[str]) -> list[Loaded]:
    """Level 6, exact top-k with level 7's kernels, and level 7 once for each tile and mode, named for them."""
    levels = {loaded.level.number: loaded for loaded in discover()}
    exact = Loaded(replace(levels[6].level, name=EXACT, adds="exact top-k with level 7's kernels"),
                   SimpleNamespace(build=partial(build_exact, levels[7].module)))
    rounded = [
        Loaded(replace(levels[7].level, name=f"{mode} {tile}", adds=f"rounded to {tile}, {mode}"),
               SimpleNamespace(build=partial(levels[7].build, tile=tile, mode=mode)))
        for mode in modes for tile in tiles
    ]
    return [levels[6], exact, *rounded]


def cost_table(runs: Sequence[Run]) -> Table:
    """A line for each rounded row: its own microseconds, their share of the exact layer, and the layer's gain. One
    that was not timed, or was not rounded, has a mark in their place; what it stands for is said below the table."""
    table = Table(title="Cost and gain of rounding", title_justify="left", caption_justify="left")
    marks: dict[str, str] = {}
    for name in ("preset", "T", "rounding", "us", "of level 6", "level 6 ms", "exact ms", "rounded ms", "gain",
                 "ideal", "over 6", "tiles full", "changed"):
        table.add_column(name, justify="left" if name in ("preset", "rounding") else "right", no_wrap=True)
    for run in runs:
        level6, exact = run.levels[0], run.row(EXACT)
        for row in run.levels[2:]:
            if row.rounding is None or not row.timed:
                mark = marks.setdefault(row.reason or row.status, f"({len(marks) + 1})")
                table.add_row(run.preset, str(run.shape["T"]), row.name, mark)
                continue
            found = row.rounding
            table.add_row(
                run.preset, str(run.shape["T"]), row.name, number(found["gpu_us"]),
                f"{found['gpu_us'] / 1e3 / level6.wall_ms.p50:.1%}", number(level6.wall_ms.p50),
                number(exact.wall_ms.p50), number(row.wall_ms.p50), f"{exact.wall_ms.p50 / row.wall_ms.p50 - 1:+.1%}",
                f"{1 / found['utilisation_before'] - 1:+.1%}", f"{level6.wall_ms.p50 / row.wall_ms.p50 - 1:+.1%}",
                f"{found['utilisation_before']:.1%}", f"{found['share_changed']:.1%}")
    table.caption = ("us: GPU time of rounding's own kernels. exact: top-k with level 7's kernels. gain: exact over "
                     "rounded wall time, less 1. ideal: the same if the layer were row tiles of that size and nothing "
                     "else. over 6: level 6 over rounded. changed: rows dropped and added, of T*K.")
    table.caption += "".join(f"\n{mark} {escape(reason)}" for reason, mark in marks.items())
    return table


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    large = [name for name in PRESETS if name not in ("tiny", "seed")]
    parser.add_argument("--presets", default=",".join(large), help="default: %(default)s")
    parser.add_argument("--tokens", type=int, help="default: the largest that the preset is timed at")
    parser.add_argument("--tiles", default="64,128,256", help="default: %(default)s")
    parser.add_argument("--modes", default="nearest", help="of nearest, up, down, balance (default: nearest)")
    parser.add_argument("--rounds", type=int, default=12, help="timed rounds (default: 12)")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder for results (default: plots/rounding)")
    parser.add_argument("--show", action="store_true", help="only print what is recorded there")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, save, print; returns the exit status: 1 if a gate was red, 2 for bad input."""
    args = parser().parse_args(argv)
    try:
        with Screen() as screen:
            return run_command(args, screen)
    except ValueError as error:
        return error_exit(error)


def run_command(args: argparse.Namespace, screen: Screen) -> int:
    """Do what `args` ask for. Raises ValueError for bad input."""
    if args.show:
        files = sorted(args.out.glob("*.json"))
        if not files:
            raise ValueError(f"--out {args.out} holds no results")
        screen.print(cost_table([run for path in files for run in load(path)]))
        return 0
    if not torch.cuda.is_available():
        raise ValueError("level 7 needs CUDA; what was measured: --show")
    tiles = [int(tile) for tile in args.tiles.split(",")]
    if set(tiles) - set(TILES):
        raise ValueError(f"--tiles {args.tiles}: of {', '.join(map(str, TILES))}")
    configs = [preset(name) for name in args.presets.split(",")]
    levels = variants(tiles, args.modes.split(","))
    args.out.mkdir(parents=True, exist_ok=True)
    runs = []
    for cfg in configs:
        workload = Workload(cfg, args.tokens or max(DEFAULT_TOKENS[cfg.name]))
        run = run_workload(workload, levels, (), torch.device("cuda"), args.rounds, screen.reporter(workload))
        screen.print(RunTable(run))
        save(args.out, run)
        runs.append(run)
        gc.collect()
        torch.cuda.empty_cache()
    screen.print(cost_table(runs))
    return 1 if any(row.status == "failed" for run in runs for row in run.rows) else 0


if __name__ == "__main__":
    sys.exit(main())
