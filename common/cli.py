"""The command line that a level file and the runner share."""

from __future__ import annotations

import argparse
import os

import torch

from common.config import DEFAULT_TOKENS, DTYPES, PRESETS, ROUTING_MODES, Workload, parse_dtype, parse_shape, preset
from common.level import Level, Unsupported, check_device_dtype, discover
from common.run import Interrupted, run_workload
from common.show import RunTable, Screen, error_exit, gate_line


def add_workload_arguments(parser: argparse.ArgumentParser) -> None:
    """--preset, --shape, --tokens, --routing, --dtype, --rounds, --seed, --autotune."""
    parser.add_argument("--preset", help=f"one of {', '.join(PRESETS)} (default: qwen3-30b-a3b on a GPU, tiny without)")
    parser.add_argument("--shape", metavar="T,D,F,E,K", help="a shape of your own instead of a preset")
    parser.add_argument("--tokens", metavar="T[,T...]", help="token counts (default: the preset's)")
    parser.add_argument("--routing", default="natural", help=f"one of {', '.join(ROUTING_MODES)} (default: natural)")
    parser.add_argument("--dtype", help=f"one of {', '.join(DTYPES)} (default: bfloat16 on a GPU, float32 without)")
    parser.add_argument("--rounds", type=int, help="timed rounds (default: 60, 3 without a GPU)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and inputs (default: 0)")
    parser.add_argument("--autotune", action=argparse.BooleanOptionalAction,
                        help="levels that choose kernels: search where nothing is cached, or take the built-in table "
                             "alone (default: what a search has cached, else the table)")


def parse_workloads(args: argparse.Namespace, device: torch.device) -> tuple[list[Workload], int]:
    """The workloads that the arguments ask for, and the rounds. Raises ValueError, naming the argument and
    what would be right."""
    on_gpu = device.type == "cuda"
    if args.autotune is not None:
        os.environ["MOE_AUTOTUNE"] = "search" if args.autotune else "off"  # read in labs/kernels/choice.py
    if args.preset and args.shape:
        raise ValueError(f"--preset {args.preset} and --shape {args.shape}: give one of them")
    dtype = parse_dtype(args.dtype or ("bfloat16" if on_gpu else "float32"))
    check_device_dtype(device, dtype)
    if args.shape:
        T, cfg = parse_shape(args.shape)
        default_tokens = (T,)
    else:
        cfg = preset(args.preset or ("qwen3-30b-a3b" if on_gpu else "tiny"))
        default_tokens = DEFAULT_TOKENS[cfg.name]
    tokens = default_tokens
    if args.tokens is not None:
        parts = args.tokens.split(",")
        if not all(part.strip().isdigit() for part in parts):
            raise ValueError(f"--tokens {args.tokens}: give whole numbers of at least 1 separated by commas, for "
                             "example 64,512")
        tokens = tuple(int(part) for part in parts)
    rounds = args.rounds if args.rounds is not None else (60 if on_gpu else 3)
    if rounds < 1:
        raise ValueError(f"--rounds {rounds}: at least 1")
    return [Workload(cfg, T, dtype, args.routing, args.seed) for T in tokens], rounds


def run_alone(level: Level) -> int:
    """`python labs/levelN_name.py`: verify, time and print one level. Returns the exit status.

    --below runs the level below in the same run, to show the step between them.
    """
    parser = argparse.ArgumentParser(description=f"Level {level.number}, {level.name}: {level.adds}.")
    add_workload_arguments(parser)
    parser.add_argument("--below", action="store_true", help="also run the level below, to show the step")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        workloads, rounds = parse_workloads(args, device)
    except ValueError as error:
        return error_exit(error)
    numbers = (level.number - 1, level.number) if args.below else (level.number,)
    levels = [loaded for loaded in discover() if loaded.level.number in numbers]
    failed = False
    with Screen() as screen:
        screen.print(f"[bold]Level {level.number}, {level.name}[/]: {level.adds}")
        for workload in workloads:
            try:
                if not args.below:
                    level.check_supported(device, workload.dtype)  # before weights are drawn for nothing
                run = run_workload(workload, levels, (), device, rounds, screen.reporter(workload))
            except Unsupported as lack:
                screen.print(f"{level.name}: n/a ({lack})")
                continue
            except ValueError as error:
                return error_exit(error)
            except Interrupted as stop:
                screen.print(RunTable(stop.run))
                return 130
            screen.print(RunTable(run))
            for row in run.rows:
                if row.number == level.number:
                    screen.print(gate_line(row))
            failed |= any(row.status == "failed" for row in run.rows)
    return 1 if failed else 0
