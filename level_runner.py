#!/usr/bin/env python3
"""Run the ladder: find the levels, gate each against the oracle, time them together, chart the result.

    python level_runner.py --all                          every level, this machine's default workload
    python level_runner.py --levels 4-6 --tokens 64,512   some levels at your own token counts
    python level_runner.py --plot plots/h200_*.json       draw the charts again from recorded runs
    python level_runner.py --profile 4                    where level 4's time goes
    python level_runner.py --levels 8 --against HEAD~3    whether a change pays: both in the same rounds
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from common.cli import add_workload_arguments, parse_workloads
from common.level import Loaded, discover
from common.measure import environment
from common.peers import PEERS, Peer
from common.references import REFERENCES
from common.results import load, prepare_folder, results_path, save
from common.revisions import levels_at
from common.run import Interrupted, run_workload
from common.show import RunTable, Screen, against_lines, error_exit, shown

ROOT = Path(__file__).resolve().parent
RECORDED = ROOT / "plots"
BESIDE_PEERS = RECORDED / "peers"  # runs of their own: a chip that waits for the slow levels is a cooler one
NO_GPU_OUT = ROOT / "out"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], epilog=__doc__.split("\n\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what to run")
    which = what.add_mutually_exclusive_group()
    which.add_argument("--all", action="store_true", help="every level (the default)")
    which.add_argument("--levels", metavar="0-4,6", help="only these levels")
    what.add_argument("--list", action="store_true", help="list the levels and stop")
    what.add_argument("--quick", action="store_true", help="3 rounds, no reference rows, the smallest token count")
    what.add_argument("--peers", metavar="NAMES", nargs="?", const="all",
                      help="also other libraries' layers, in the same run, where they are installed; all of them, or "
                           "those named: triton_kernels,SonicMoE")
    what.add_argument("--against", metavar="REVISIONS",
                      help="also these levels as they stood at other git revisions, or in other folders, in the same "
                           "run: HEAD~3,../other. For whoever changes one: results go to out, no chart is drawn")
    what.add_argument("--profile", type=int, metavar="N",
                      help="profile level N: trace file and heaviest kernels, no timing")
    add_workload_arguments(parser)
    output = parser.add_argument_group("what to leave behind")
    output.add_argument("--out", type=Path, metavar="DIR",
                        help="folder for results and charts (default: plots, with --peers plots/peers; without a GPU: "
                             "out; with --plot: each file's own)")
    output.add_argument("--plot", type=Path, nargs="+", metavar="FILE", help="only draw charts from these results")
    output.add_argument("--readme", action="store_true", help="only rewrite README.md's tables from plots/")
    return parser


def choose_peers(text: str | None) -> list[Peer]:
    """`all`, or the peers that `triton_kernels,SonicMoE` names; none for None. Raises ValueError for others."""
    known = {peer.name: peer for peer in PEERS}
    names = list(known) if text == "all" else text.split(",") if text else []
    for name in names:
        if name not in known:
            meant = next((one for one in known if one.lower() == name.strip().lower()), None)
            raise ValueError(f"--peers {text}: {name!r} is none of {', '.join(known)}"
                             + (f"; did you mean {meant}?" if meant else ""))
    return [known[name] for name in names]


def choose_levels(text: str | None, levels: Sequence[Loaded], argument: str = "--levels") -> list[Loaded]:
    """`0-4,6` -> those levels. Raises ValueError naming a level that does not exist or a part that does not parse."""
    if text is None:
        return list(levels)
    known = {loaded.level.number: loaded for loaded in levels}
    chosen: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise ValueError(f"{argument} {text}: {part!r} is neither a number nor a range such as 0-4")
        if dash and int(last) < int(first):
            raise ValueError(f"{argument} {text}: {part!r} runs backwards, did you mean {last}-{first}?")
        chosen.update(range(int(first), int(last if dash else first) + 1))
    unknown = sorted(chosen - set(known))
    if unknown:
        raise ValueError(f"{argument} {text}: no level {', '.join(map(str, unknown))}; there are "
                         f"{', '.join(map(str, known))}")
    return [known[number] for number in sorted(chosen)]


def draw(paths: Sequence[Path], folder: Path, screen: Screen) -> None:
    """Draw every chart of every results file into `folder`. Raises ValueError for a file it cannot read."""
    from common.charts import draw_all

    for path in paths:
        if not path.exists():
            raise ValueError(f"--plot {path}: no such file")
        screen.print(f"drawing {path.name} ...")
        charts = draw_all(load(path), folder, path.stem)
        names = dict.fromkeys(chart.stem.removeprefix(path.stem + "_") for chart in charts)
        screen.print(f"  {shown(folder / path.stem)}_* (png, svg): {', '.join(names)}")


def main(argv: Sequence[str] | None = None, levels: Sequence[Loaded] | None = None) -> int:
    """Run the command line; returns the exit status: 0 all green, 1 a red level, 2 bad input, 130 interrupted.

    `levels` replaces the discovered ones, for tests.
    """
    args = parser().parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        with Screen() as screen:
            return run_command(args, device, screen, levels)
    except (ValueError, FileNotFoundError) as error:
        return error_exit(error)


def run_command(args: argparse.Namespace, device: torch.device, screen: Screen,
                levels: Sequence[Loaded] | None) -> int:
    """Do what `args` ask for; returns the exit status. Raises ValueError for bad input."""
    if args.readme:
        from common.readme import rewrite

        return 0 if rewrite(ROOT / "README.md", RECORDED, screen.print) else 1
    recorded = BESIDE_PEERS if args.peers else RECORDED
    out = args.out or (recorded if device.type == "cuda" and not args.against else NO_GPU_OUT)
    if args.plot:
        for path in args.plot:
            folder = args.out or path.parent
            prepare_folder(folder)
            draw([path], folder, screen)
        return 0
    levels = discover() if levels is None else levels
    if args.list:
        for loaded in levels:
            needs = f"  (needs {', '.join(loaded.level.requires)})" if loaded.level.requires else ""
            screen.print(f"{loaded.level.number}  {loaded.level.name:<14} {loaded.level.adds}{needs}")
        return 0
    if args.profile is not None:
        from common.profile import profile_level

        (loaded,) = choose_levels(str(args.profile), levels, "--profile")
        (workload, *more), _ = parse_workloads(args, device)
        if more and args.tokens:
            raise ValueError(f"--profile takes one token count, --tokens {args.tokens} are {1 + len(more)}")
        prepare_folder(out)
        return profile_level(loaded, workload, device, out, screen)
    chosen = choose_levels(args.levels, levels)
    workloads, rounds = parse_workloads(args, device)
    numbers = [loaded.level.number for loaded in chosen]
    others = [loaded for revision in (args.against.split(",") if args.against else [])
              for loaded in levels_at(revision, numbers)]
    chosen = sorted([*others, *chosen], key=lambda loaded: loaded.level.number)
    peers = choose_peers(args.peers)
    references = [*REFERENCES, *peers]
    if args.quick:
        workloads, references, rounds = [min(workloads, key=lambda one: one.T)], peers, min(rounds, 3)
    prepare_folder(out)
    earlier = results_path(out, environment(device), workloads[0].config.name)
    if earlier.exists():
        load(earlier)  # a file that cannot take new runs is an error now, not after the measuring
    runs, interrupted = [], False
    for workload in workloads:
        try:
            run = run_workload(workload, chosen, references, device, rounds, screen.reporter(workload))
        except Interrupted as stop:
            run, interrupted = stop.run, True
        screen.print(RunTable(run))
        for line in against_lines(run):
            screen.print(line)
        runs.append(run)
        path = save(out, run)
        if interrupted:
            screen.print(f"interrupted: what was measured is in {shown(path)}, marked partial")
            return 130
    screen.print(f"results: {shown(path)}")
    if args.against:
        screen.print("no charts: another revision's rows are no rungs")
    elif device.type == "cuda":
        draw([path], out, screen)
    elif args.levels or args.quick:  # a quick look: half a minute of charts would be in its way
        screen.print(f"\nNo GPU here, so no times to chart. Those of the recorded GPU runs are in {shown(RECORDED)}.")
    else:
        screen.print("\nNo GPU here, so no times to chart. The charts of the recorded GPU runs:")
        draw(sorted(RECORDED.glob("*.json")), out, screen)
    return 1 if any(row.status == "failed" for run in runs for row in run.rows) else 0


if __name__ == "__main__":
    sys.exit(main())
