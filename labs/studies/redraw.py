"""Draw the recorded studies' and trainings' charts again, each from its JSON, and renew its sentence.

    python -m labs.studies.redraw [--out DIR] [FILE ...]      default: plots/studies/*.json plots/training/*.json
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import common.level  # isort: skip  # noqa: F401  (picks Triton's interpreter where there is no GPU)
from labs import backward_benchmark, full_moe_benchmark, train_byte_lm
from labs.studies import (
    grouped_gemm,
    io_overlap,
    moe_basics,
    peers,
    reading_a_profile,
    routing,
    throughput,
    token_rounding,
    variants,
    what_does_not_help,
)
from labs.studies.study import ROOT, Study, draw, load, name_of, renew, shown

STUDIES: dict[str, Study] = {module.STUDY.name: module.STUDY for module in (
    backward_benchmark, full_moe_benchmark, train_byte_lm, grouped_gemm, io_overlap, moe_basics, peers,
    reading_a_profile, routing, throughput, token_rounding, variants, what_does_not_help)}


def recorded() -> list[Path]:
    """The records in the repository."""
    return sorted([*(ROOT / "plots" / "studies").glob("*.json"), *(ROOT / "plots" / "training").glob("*.json")])


def redraw(path: Path, out: Path | None = None) -> list[Path]:
    """Draw one record's charts into `out`, or beside it. Returns the files written; raises ValueError, naming the
    file, if it is no record of a study that is known here."""
    name = name_of(path)
    if name not in STUDIES:
        raise ValueError(f"{path}: holds study {name!r}, known are {', '.join(STUDIES)}")
    return draw(renew(load(path, STUDIES[name]), STUDIES[name], path), STUDIES[name], out or path.parent)


def main() -> int:
    """The command. Returns the exit status: 2 for a file that is no record."""
    parser = argparse.ArgumentParser(description="Draw recorded studies' charts again.")
    parser.add_argument("files", type=Path, nargs="*", metavar="FILE")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: beside each file")
    args = parser.parse_args()
    try:
        for path in args.files or recorded():
            print(f"drawing {shown(path)} ...", flush=True)
            redraw(path, args.out)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
