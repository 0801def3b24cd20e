"""What every study shares: its command line, the JSON it leaves, its charts drawn from that JSON alone.

A study is a file with `STUDY = Study(...)`: a question, `measure` (options -> figures that JSON can hold), and three
functions of these figures: `table`, `draw`, and `conclude`, whose sentence is computed and so cannot outlive them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from common.charts import STYLE, put_under
from common.level import Unsupported  # first: it picks Triton's interpreter where there is no GPU
from common.measure import Spread, WallClock, environment, interleave
from common.results import gpu_slug, prepare_folder
from common.show import error_exit, shown

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

SCHEMA = 1
ROOT = Path(__file__).resolve().parents[2]
COLORS = ("#2a6fbb", "#d1495b", "#2e933c", "#e9a03b", "#7b5ea7", "#4fb3bf", "#7a7f87", "#a0522d")


@dataclass(frozen=True)
class Options:
    """What a study is asked for. `full`: the sizes of a GPU, else sizes that take seconds on a CPU. `say`: prints a
    line of progress. `args`: the study's own arguments."""

    device: torch.device
    full: bool
    say: Callable[[str], None]
    args: argparse.Namespace


@dataclass(frozen=True)
class Study:
    """One question. measure(options) -> figures; table(figures) -> what to print; draw(figures, caption) -> file name
    suffix -> chart; conclude(figures) -> the sentence that they support; label(figures) -> what tells apart two
    recordings on one machine; arguments(parser) adds the study's own. timed: its figures are times. folder: of plots or
    out, for its files."""

    name: str
    question: str
    measure: Callable[[Options], dict]
    table: Callable[[dict], list[PlainTable | str]]
    draw: Callable[[dict, str], dict[str, Figure]]
    conclude: Callable[[dict], str]
    label: Callable[[dict], str] = lambda figures: ""
    arguments: Callable[[argparse.ArgumentParser], None] = lambda parser: None
    timed: bool = True
    folder: str = "studies"


# ---- running -------------------------------------------------------------------------------------

def main(study: Study, argv: list[str] | None = None) -> int:
    """Measure, print, save and draw; or `--plot FILE`: draw again. Returns the exit status: 2 for bad input, 1 where
    the study cannot run or refuses."""
    args = parse_arguments(study, argv)
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    try:
        if args.plot:
            record, out = load(args.plot, study), args.out or args.plot.parent
            prepare_folder(out)
            record = renew(record, study, args.plot)
        else:
            device = torch.device(args.device)
            out = args.out or default_folder(device, study)
            prepare_folder(out)
            options = Options(device, device.type == "cuda" and not args.quick, Progress(study.name), args)
            console.print(f"[bold]{study.name}[/]: {study.question}")
            stamp = environment(device)
            record = make_record(study, study.measure(options), stamp, options.full)
            path = save(record, study, out)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (Unsupported, Refused) as refusal:
        for part in getattr(refusal, "parts", ()):
            console.print(part)
        print(f"{study.name}: {refusal}", file=sys.stderr)
        return 1
    figures = record["figures"]
    for part in study.table(figures):
        console.print(part)
    if not args.plot:
        console.print(f"written: {shown(path)}")
    for path in draw(record, study, out):
        console.print(f"written: {shown(path)}")
    console.print(f"\n{record['conclusion']}")
    return 0


class Refused(RuntimeError):
    """A study's inputs lead to a result that cannot be; the message says by how much. parts: what to print first."""

    def __init__(self, message: str, parts: Iterable[PlainTable | str] = ()):
        super().__init__(message)
        self.parts = tuple(parts)


class Progress:
    """`say(text)`: a line of progress on standard error, so that it mixes with no table."""

    def __init__(self, name: str):
        self.name = name

    def __call__(self, text: str) -> None:
        print(f"{self.name}: {text} ...", file=sys.stderr, flush=True)


def main_on_hopper(study: Study, description: str, argv: Sequence[str] | None) -> int:
    """main of a study without charts whose kernels are Hopper's, and which so runs at one size or not at all: measure,
    save and print, or print what is recorded. Returns the exit status: 2 where that is not possible."""
    parser = argparse.ArgumentParser(description=description.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "plots" / study.folder,
                        help=f"default: plots/{study.folder}")
    parser.add_argument("--show", action="store_true", help="only print what is recorded there")
    args = parser.parse_args(argv)
    try:
        if not args.show:
            if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
                raise Unsupported("needs CUDA sm_90; what was measured: --show")
            prepare_folder(args.out)
            options = Options(torch.device("cuda"), True, Progress(study.name), args)
            stamp = environment(options.device)
            paths = [save(make_record(study, study.measure(options), stamp, True), study, args.out)]
        elif not (paths := sorted(args.out.glob("*.json"))):
            raise ValueError(f"--out {args.out} holds no results")
        records = [load(path, study) for path in paths]
    except (Unsupported, ValueError) as error:
        return error_exit(error)
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    for path, record in zip(paths, records, strict=True):
        console.print(*study.table(record["figures"]), f"{shown(path)}: {caption(record['environment'])}",
                      study.conclude(record["figures"]), sep="\n")
    return 0


def parse_arguments(study: Study, argv: list[str] | None) -> argparse.Namespace:
    """The arguments that all studies share, and this study's own."""
    parser = argparse.ArgumentParser(description=study.question)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu",
                        help="default: the GPU if there is one")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, as on a CPU")
    parser.add_argument("--out", type=Path, help=f"folder for JSON and charts (default: plots/{study.folder} with a "
                                                 f"GPU, out/{study.folder} without)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="measure nothing: draw this JSON's "
                        "charts again, and renew its sentence")
    study.arguments(parser)
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available() and not args.plot:
        parser.error("--device cuda: PyTorch sees no GPU here, use --device cpu")
    if args.device == "cpu" and torch.cuda.is_available():
        parser.error("--device cpu: Triton chose the GPU when it was imported; hide it with CUDA_VISIBLE_DEVICES=")
    return args


def positive(text: str) -> int:
    """An argument that is a whole number of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number of at least 1")
    return int(text)


def default_folder(device: torch.device, study: Study) -> Path:
    """In plots for recorded GPU figures; a CPU's go to out, which git ignores."""
    return ROOT / ("plots" if device.type == "cuda" else "out") / study.folder


# ---- the JSON ------------------------------------------------------------------------------------

def make_record(study: Study, figures: dict, stamp: dict, full: bool) -> dict:
    """What the JSON holds. A study that measured nothing itself brings the stamp of what it read."""
    stamp = figures.pop("environment", stamp)
    record = {"schema": SCHEMA, "study": study.name, "question": study.question, "full": full, "environment": stamp,
              "figures": json.loads(json.dumps(figures))}  # what is drawn and said first is what can be read back
    return record | {"conclusion": sentence(study, record)}


def sentence(study: Study, record: dict) -> str:
    """What the study concludes from the record's figures."""
    small = "" if record["full"] or not study.timed else "At this tiny size, whose times say nothing of a GPU: "
    return small + study.conclude(record["figures"])


def renew(record: dict, study: Study, path: Path) -> dict:
    """The record with the sentence that today's code computes; written back if it was another."""
    said = sentence(study, record)
    if said != record["conclusion"]:
        record = record | {"conclusion": said}
        write(record, path)
    return record


def save(record: dict, study: Study, folder: Path) -> Path:
    """Write a record as <gpu>_<study>[_<label>].json."""
    folder.mkdir(parents=True, exist_ok=True)
    label = study.label(record["figures"])
    slug = gpu_slug(record["environment"])
    path = folder / f"{slug}_{study.name}{'_' + label if label else ''}.json"
    write(record, path)
    return path


def write(record: dict, path: Path) -> None:
    """The file is replaced whole or not at all."""
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(scratch, path)


def read(path: Path) -> dict:
    """What a record's file holds. Raises ValueError, naming the file, if it is not JSON of an object."""
    try:
        record = json.loads(Path(path).read_text())
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"--plot {path}: cannot be read as JSON ({error})") from error
    return record if isinstance(record, dict) else {}


def name_of(path: Path) -> str | None:
    """The name of the study whose record this is; None if it is no record. Raises ValueError as `read` does."""
    return read(path).get("study")


def load(path: Path, study: Study) -> dict:
    """A record of this study. Raises ValueError, naming the file, if it is another's or no record at all."""
    record = read(path)
    found = record.get("study")
    if found != study.name or record.get("schema") != SCHEMA:
        raise ValueError(f"--plot {path}: holds study {found!r}, this draws {study.name!r} of schema {SCHEMA}")
    return record


# ---- charts --------------------------------------------------------------------------------------

def draw(record: dict, study: Study, folder: Path) -> list[Path]:
    """All of the study's charts, PNG and SVG, from the record alone. Returns the files written."""
    written = []
    folder.mkdir(parents=True, exist_ok=True)
    label = study.label(record["figures"])
    stem = f"{gpu_slug(record['environment'])}_{study.name}{'_' + label if label else ''}"
    with plt.rc_context(STYLE):
        for suffix, fig in study.draw(record["figures"], caption(record["environment"])).items():
            for ending in ("png", "svg"):
                path = folder / f"{stem}{'_' + suffix if suffix else ''}.{ending}"
                fig.savefig(path, metadata={"Date": None} if ending == "svg" else None)
                written.append(path)
            plt.close(fig)
    return written


def caption(stamp: dict) -> str:
    """GPU, versions, commit, date."""
    return (f"{stamp['gpu']}, torch {stamp['torch']}, Triton {stamp['triton']}  |  commit {stamp['commit']}, "
            f"{stamp['date']}")


def figure(title: str, under: str, columns: int = 1, widths: list[float] | None = None,
           rows: int = 1) -> tuple[Figure, list[Axes]]:
    """A 16:9 figure with a title above, a caption under it, and its axes row by row."""
    fig, axes = plt.subplots(rows, columns, squeeze=False, layout="constrained",
                             gridspec_kw={"width_ratios": widths or [1] * columns})
    fig.suptitle(title, fontsize=26, fontweight="bold")
    put_under(fig, under)
    return fig, list(axes.flat)


def legend_above(fig: Figure, handles: list, columns: int | None = None) -> None:
    """One legend for all axes, under the title, where it can cover nothing."""
    columns = columns or len(handles)
    fig.suptitle(fig.get_suptitle() + "\n" * -(-len(handles) // columns), fontsize=26, fontweight="bold")
    fig.legend(handles=handles, fontsize=15, loc="upper center", bbox_to_anchor=(0.5, 0.955), ncols=columns,
               frameon=False)


def spread_line(ax: Axes, xs: list, spreads: list[dict | None], label: str, color: str, **style: object) -> None:
    """A line through medians with its p20 to p80 shaded; points without a figure are left out."""
    known = [(x, spread) for x, spread in zip(xs, spreads, strict=True) if spread is not None]
    if not known:
        return
    places = [x for x, _ in known]
    ax.plot(places, [spread["p50"] for _, spread in known], "o-", color=color, label=label, gid=label, lw=3, ms=9,
            **style)
    ax.fill_between(places, [s["p20"] for _, s in known], [s["p80"] for _, s in known], color=color, alpha=0.2, lw=0)


@dataclass(frozen=True)
class PlainTable:
    """A table whose first column is text and whose others are figures. Where there is no room for all columns, it is
    shown as several, each with the first column. So figures are whole, and words of up to LONGEST characters."""

    title: str
    headings: list[str]
    rows: list[list[str]]

    FIGURE: ClassVar = 16  # characters of a cell up to which it is one figure, as "1.00 to 1.05" is
    LONGEST: ClassVar = 30

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        columns = list(zip(self.headings, *self.rows, strict=True))
        most = [max(map(cell_len, column)) for column in columns]
        least = [min(self.LONGEST, most[place] if place == 0 else max(map(self._least, column)))
                 for place, column in enumerate(columns)]
        parts: list[list[int]] = [[0]]
        for place in range(1, len(columns)):
            if len(parts[-1]) > 1 and self._width(least, [*parts[-1], place]) > options.max_width:
                parts.append([0])
            parts[-1].append(place)
        for number, places in enumerate(parts):
            table = Table(title=None if number else self.title, title_justify="left")
            spare = max(0, options.max_width - self._width(least, places))
            for place in places:
                more = min(spare, most[place] - least[place])
                spare -= more
                table.add_column(self.headings[place], justify="right" if place else "left", overflow="fold",
                                 width=least[place] + more)
            for row in self.rows:
                table.add_row(*(row[place] for place in places))
            yield table

    def _least(self, cell: str) -> int:
        """How narrow a cell can be."""
        return cell_len(cell) if cell_len(cell) <= self.FIGURE else max(map(cell_len, cell.split()), default=0)

    @staticmethod
    def _width(widths: list[int], places: list[int]) -> int:
        """Of a table of these columns, with a space to each side of a cell and lines between."""
        return sum(widths[place] + 3 for place in places) + 1


# ---- time ----------------------------------------------------------------------------------------

class GpuClock:
    """Milliseconds between two events on the GPU around one call, with a cold L2: what kernels take, without the
    host's part. L2 is overwritten for about half a millisecond, so that the host is that far ahead; a call that waits
    for the GPU loses this lead. On a CPU: wall time."""

    OVERWRITES = 20

    def __init__(self, device: torch.device):
        self.wall = WallClock(device)

    def __call__(self, call: Callable[[], object]) -> float:
        if not self.wall.on_gpu:
            return self.wall(call)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(self.OVERWRITES):
            self.wall.flush.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def time_together(calls: dict[str, Callable[[], object]], clock: WallClock | GpuClock, rounds: int,
                  seconds_each: float = 1.0,
                  say: Callable[[str], None] = lambda text: None) -> dict[str, dict[str, float]]:
    """Warm every call, then time all in interleaved rounds: name -> {p20, p50, p80} milliseconds. A call that would
    take over `seconds_each` is timed in fewer rounds, at least three. `say` hears of each round."""
    for call in calls.values():
        clock(call)
    for i, taken in enumerate(interleave(list(calls.values()), rounds, clock, seconds_each), start=1):
        say(f"round {i} of {rounds}")
        samples = taken
    return {name: vars(Spread.of(taken)) for name, taken in zip(calls, samples, strict=True)}


def rate(amount: float, milliseconds: dict[str, float] | None) -> dict[str, float] | None:
    """amount / 1e9 a millisecond, so TFLOP/s from FLOPs and TB/s from bytes; the fastest round gives p80."""
    if milliseconds is None:
        return None
    return {"p20": amount / milliseconds["p80"] / 1e9, "p50": amount / milliseconds["p50"] / 1e9,
            "p80": amount / milliseconds["p20"] / 1e9}


# ---- words ---------------------------------------------------------------------------------------

def changes(found: Iterable[float], more: str, less: str) -> str:
    """The smallest and the largest of some relative changes in words, one where both read alike: `31% to 83% longer`,
    `14% more`, `5% less to 20% more`."""
    found = sorted(found, key=abs)
    ends = [f"{end:z.0%}" for end in (found[0], found[-1])]
    (first, word), (last, last_word) = ((end.lstrip("-"), less if end.startswith("-") else more) for end in ends)
    if ends[0] == ends[1]:
        return f"{last} {last_word}"
    return f"{first} to {last} {last_word}" if word == last_word else f"{first} {word} to {last} {last_word}"
