"""What a run looks like in a terminal: the live table, the stage line, the error line."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.table import Table
from rich.text import Text

from common.config import Workload, dtype_name
from common.results import Row, Run, Speedup, speedups


def error_exit(error: Exception) -> int:
    """Print `error: ...` to standard error; the exit status for bad input, 2."""
    print(f"error: {error}", file=sys.stderr)
    return 2


def shown(path: Path) -> str:
    """A path as it is best said from here: relative below the current folder, else whole."""
    path = Path(path).absolute()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def number(value: float | None, digits: int = 3) -> str:
    """Three significant digits without an exponent: 0.0123, 1.23, 123, 12300; `-` for None."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    rounded = float(f"{value:.{digits}g}")
    return f"{rounded:,.0f}" if abs(rounded) >= 100 else f"{rounded:#.{digits}g}".rstrip(".")


def percent(share: float | None) -> str:
    """0.931 -> `93%`; `-` for None."""
    return "-" if share is None else f"{share:.0%}" if share >= 0.1 else f"{share:.1%}"


def ratio(value: float | None) -> str:
    """1.534 -> `1.53x`, `-` for None."""
    return "-" if value is None else f"{number(value)}x"


def status_text(row: Row) -> str:
    """What stands where a time would: `out of memory`, `n/a (needs CUDA)`, `not installed`, `FAILED`."""
    if row.status == "unsupported":
        return f"n/a ({row.reason.partition(':')[0]})" if row.reason else "n/a"
    return {"oom": "out of memory", "failed": "FAILED"}.get(row.status, row.status)


def name_text(row: Row) -> str:
    """The row's name, marked if it computes another function than exact top-k."""
    return f"{row.name} (rounded)" if row.variant == "rounded" and "rounded" not in row.name else row.name


def rounding_text(row: Row) -> str:
    """One sentence on what rounding changed in a rounded row, and what it cost."""
    found = row.rounding
    cost = f", {number(found['gpu_us'])} us for rounding itself" if found.get("gpu_us") is not None else ""
    return (f"{name_text(row)}: tile {found['tile']}, {found['mode']}: {found['rows_dropped']:,} rows dropped, "
            f"{found['rows_added']:,} added ({found['share_changed']:.1%} of routes), tile utilisation "
            f"{found['utilisation_before']:.1%} before, {found['utilisation_after']:.1%} after, "
            f"{found['tokens_without_expert']:,} tokens without expert{cost}")


ROUNDED = ("rounded rows compute another function than the others: for training and offline use, since rounding looks "
           "at the whole batch and is not causal; evaluation is exact top-k")


def rounding_notes(run: Run) -> list[str]:
    """What a reader of the run's table must know about rounded rows; nothing if there are none."""
    rounded = [row for row in run.rows if row.rounding]
    return [*map(rounding_text, rounded), ROUNDED] if rounded else []


def against_lines(run: Run) -> list[str]:
    """One line for each level that was also timed as it stood at another revision (revisions.py)."""
    lines = []
    for other in run.levels:
        name, at, _ = other.name.partition(" @")
        row = run.row(name)
        if at and row and row.timed and other.timed:
            gains = [f"{other_ms.p50 / ms.p50 - 1:+.1%} {how}" for how, ms, other_ms in (
                ("in rounds", row.wall_ms, other.wall_ms), ("busy", row.gpu_ms, other.gpu_ms),
                ("sustained", row.sustained_ms, other.sustained_ms)) if ms and other_ms]
            lines.append(f"speed of {name} over {other.name}: {', '.join(gains)}")
    return lines


def gate_line(row: Row) -> str:
    """One line on what the gate said of a level."""
    name = f"gate of {row.name}"
    if row.rel_err is None:
        return f"{name}: not reached, {status_text(row)}"
    verdict = "FAILED" if row.status == "failed" else "passed"
    return (f"{name}: {verdict}, relative error {row.rel_err:.1e} (bound {row.error_bound:.1e}), "
            f"worst token {row.worst_row_err:.1e}")


def title(run: Run) -> str:
    """One line that says what was run."""
    shape = " ".join(f"{letter}={size}" for letter, size in run.shape.items())
    return f"{run.preset}  {shape}  {run.dtype}  {run.routing} routing"


LOG_WIDTH = 200  # where there is no terminal: room for all columns
# Columns that go, the empty ones and then the first ones first, where a terminal is too narrow for all. Of a run
# without a GPU the errors go last: its times mean little.
DISPENSABLE = ("TFLOP/s", "build s", "syncs", "rel. error", "roofline", "peak MiB", "sustained", "launches", "bound",
               "GPU ms", "p20-p80", "step", "total")


def _cells(row: Row, gain: Speedup | None) -> dict[str, str | Text]:
    """A row of the run's table: heading -> what stands there."""
    wall, spread = status_text(row), ""
    if row.wall_ms is not None and row.status in ("ok", "interpreted"):
        wall = number(row.wall_ms.p50) if row.timed else f"({number(row.wall_ms.p50)})"
        spread = f"{number(row.wall_ms.p20)}-{number(row.wall_ms.p80)}"
    slower = gain is not None and gain.step is not None and gain.step < 1
    return {
        "": "" if row.number is None else str(row.number),
        "level": name_text(row),
        "rel. error": "-" if row.rel_err is None else f"{row.rel_err:.1e}",
        "wall ms": Text(wall, style="red" if row.status == "failed" else "bold" if row.timed else "yellow"),
        "p20-p80": spread,
        "GPU ms": number(row.gpu_ms.p50 if row.gpu_ms else None),
        "sustained": number(row.sustained_ms.p50 if row.sustained_ms else None),
        "launches": "-" if row.launches is None else str(row.launches),
        "syncs": "-" if row.host_syncs is None else str(row.host_syncs),
        "step": Text(ratio(gain.step if gain else None), style="red" if slower else ""),
        "total": ratio(gain.total if gain else None),
        "TFLOP/s": number(row.tflops),
        "roofline": percent(row.roofline_share),
        "bound": percent(row.bound_share),
        "peak MiB": number(row.peak_mib),
        "build s": number(row.build_s),
    }


@dataclass(frozen=True)
class RunTable:
    """The table of one run, levels first, references below a rule, in as many columns as the terminal has room for."""

    run: Run

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        run, gains = self.run, speedups(self.run)
        rows = [_cells(row, gains.get(row.name) if row.kind == "level" else None) for row in run.rows]
        widths = {heading: max(len(heading), *(len(row[heading]) for row in rows)) for heading in rows[0]}
        hidden: list[str] = []
        empty = [heading for heading in DISPENSABLE if all(str(row[heading]) in {"", "-"} for row in rows)]
        last = () if run.environment["sm"] else ("rel. error",)
        goes = [*empty, *(heading for heading in DISPENSABLE if heading not in (*empty, *last)), *last]
        while sum(widths.values()) + 3 * len(widths) + 1 > options.max_width and len(hidden) < len(goes):
            hidden.append(goes[len(hidden)])
            del widths[hidden[-1]]
        table = Table(title=title(run) + ("  (partial)" if run.partial else ""), title_justify="left")
        for heading in widths:
            table.add_column(heading, justify="left" if heading == "level" else "right", no_wrap=True)
        kind = "level"
        for row, cells in zip(run.rows, rows, strict=True):
            if row.kind != kind:
                table.add_section()
                kind = row.kind
            table.add_row(*(cells[heading] for heading in widths))
        why = [f"{row.name}: {row.reason}" for row in run.rows
               if row.status in ("failed", "not installed", "oom") or ":" in row.reason]
        why += rounding_notes(run)
        if hidden:
            why.append(f"no room for {', '.join(hidden)}: {options.max_width} columns")
        table.caption, table.caption_justify = "\n".join(why) or None, "left"
        yield table


class Screen:
    """A console whose last lines live: the running table and the stage it is in. Without a terminal it
    prints a line at each new stage, at most one every two seconds, so a log shows progress too."""

    def __init__(self) -> None:
        self.console = Console(width=None if sys.stdout.isatty() else LOG_WIDTH, highlight=False)
        self.live = Live(console=self.console, refresh_per_second=4, transient=True)
        self._said = 0.0

    def __enter__(self) -> Screen:
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    def print(self, *what: object) -> None:
        """Print above the live lines."""
        self.console.print(*what)

    def reporter(self, workload: Workload) -> _Reporter:
        """A common.run.Reporter that shows this workload."""
        return _Reporter(self, f"{workload.config.name} T={workload.T} {dtype_name(workload.dtype)}")

    def show(self, text: str, run: Run | None, long: bool = False) -> None:
        """Refresh the live lines, or say the stage where there is no terminal, at most every two seconds but for `long`
        ones."""
        if self.console.is_terminal:
            self.live.update(Group(RunTable(run), Text(text)) if run else Text(text))
        elif long or time.monotonic() - self._said > 2:
            self._said = time.monotonic()
            self.console.print(text)


class _Reporter:
    def __init__(self, screen: Screen, prefix: str):
        self.screen, self.prefix = screen, prefix
        self.text, self.run = "", None

    def stage(self, text: str, long: bool = False) -> None:
        self.text = f"{self.prefix}: {text} ..."
        self.screen.show(self.text, self.run, long)

    def update(self, run: Run) -> None:
        self.run = run
        self.screen.show(self.text, run)
