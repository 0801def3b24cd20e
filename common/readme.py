"""README.md's tables, generated from plots/*.json between pairs of markers.

A marker names the file and the token counts: `<!-- table h200_qwen3-30b-a3b 64,512,16384 -->` up to
`<!-- end -->`; that of labs/backward_benchmark.py's figures the file alone: `<!-- training training/h200_backward -->`;
that of how far ahead of other libraries we are the folder of runs beside them: `<!-- leads peers -->`.
What stands between is replaced; everything else is prose and left alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from common.measure import Spread
from common.references import BOUND
from common.results import Row, Run, load, speedups
from common.show import name_text, number, percent, ratio, rounding_notes, status_text

TABLE = re.compile(r"(?P<open><!-- table (?P<stem>\S+) (?P<tokens>[\d,]+) -->\n).*?(?P<end><!-- end -->)", re.DOTALL)
LEADS = re.compile(r"(?P<open><!-- leads (?P<folder>\S+) -->\n).*?(?P<end><!-- end -->)", re.DOTALL)
TRAINING = re.compile(r"(?P<open><!-- training (?P<stem>\S+) -->\n).*?(?P<end><!-- end -->)", re.DOTALL)


def markdown(run: Run) -> str:
    """One run as a markdown table: what each level took, its step and total speedup, why, and its distance
    from the roofline."""
    env, shape = run.environment, run.shape
    gains = speedups(run)
    lines = [
        f"**{shape['T']:,} tokens**: the roofline is {number(run.roofline_ms)} ms "
        f"({number(run.flops / 1e12)} TFLOP at the measured {number(run.ceilings['matmul_tflops'])} TFLOP/s, "
        f"{number(run.least_bytes / 1e9)} GB at the measured copy rate of {number(run.ceilings['copy_tbps'])} TB/s, "
        f"whichever is longer).",
        "",
        "| | level | wall ms (p20 to p80) | step | total | GPU-busy ms | launches | host syncs | of roofline | "
        "of bmm | peak MiB | build s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in run.rows:
        gain = gains.get(row.name) if row.kind == "level" else None
        time = status_text(row)
        if row.timed:
            few = f", n={row.samples}" if row.samples < run.rounds else ""
            time = f"{number(row.wall_ms.p50)} ({number(row.wall_ms.p20)} to {number(row.wall_ms.p80)}{few})"
        name = name_text(row) if row.kind == "level" else f"*{row.name}: {row.adds}*"
        step = ratio(gain.step if gain else None)
        if gain and gain.step:
            step = f"{step}, within the spread" if not gain.clear else f"**{step}, slower**" if gain.step < 1 else step
        cells = [
            "" if row.number is None else row.number, name, time, step, ratio(gain.total if gain else None),
            number(row.gpu_ms.p50 if row.gpu_ms else None), "-" if row.launches is None else row.launches,
            "-" if row.host_syncs is None else row.host_syncs, percent(row.roofline_share), percent(row.bound_share),
            number(row.peak_mib), number(row.build_s),
        ]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    notes = [f"{row.name}: {row.reason}" for row in run.levels if row.status == "ok" and row.reason]
    notes = [f"- {note}." for note in notes + rounding_notes(run)]
    lines += [*([""] if notes else []), *notes]
    lines += ["", f"{env['gpu']}, driver {env['driver']}, torch {env['torch']}, Triton {env['triton']}, "
                  f"{run.dtype}, {run.routing} routing, {run.rounds} rounds, commit {env['commit']}, {env['date']}."]
    return "\n".join(lines)


def bandwidth(run: Run, row: Row) -> str:
    """TB/s of the run's least bytes in the row's GPU-busy time, and their share of the copy and of the read rate; `-`
    where arithmetic takes longer than bytes, or nothing was profiled."""
    copy, read = run.ceilings["copy_tbps"], run.ceilings.get("read_tbps")  # runs before there was a read lack it
    if run.is_arithmetic_bound or not row.gpu_ms:
        return "-"
    rate = run.least_bytes / row.gpu_ms.p50 / 1e9
    return f"{number(rate)} ({percent(rate / copy)}, {percent(rate / read if read else None)})"


def ahead(ours: Spread | None, other: Spread | None) -> str:
    """How much longer the other's median is, `5.4%`, and whether the spreads overlap; `-` if one was not measured."""
    if ours is None or other is None:
        return "-"
    apart = ours.p80 < other.p20 or other.p80 < ours.p20
    return f"{other.p50 / ours.p50 - 1:.1%}" + ("" if apart else ", within the spread")


def median(spread: Spread | None) -> str:
    """`2.01`; `-` if it was not measured."""
    return number(spread.p50 if spread else None)


def share(ours: Spread | None, bound: Spread | None) -> str:
    """The bound's median over ours, `97%`; `-` if one was not measured."""
    return percent(bound.p50 / ours.p50 if ours and bound else None)


def leads_markdown(runs: list[Run]) -> str:
    """A row a run: our highest level with exact top-k beside the other library that was fastest in rounds. Its share of
    the bound and its lead there, by wall and by GPU-busy time, and the same with each under its own load alone. Where
    memory sets the roofline, also the rate at which the least bytes went by while the GPU was busy, and its share of
    the measured rates."""
    lines = [
        "| layer | tokens | level | in rounds: wall ms (p20 to p80) | of bmm | TB/s while busy (of a copy, of a read) "
        "| fastest other | its wall ms | ahead by | GPU-busy: of bmm | ahead by | sustained: ms | of bmm | other's ms "
        "| ahead by | rounds | commit |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        ours = max((row for row in run.levels if row.timed and row.variant == "exact"), key=lambda row: row.number)
        other = min((row for row in run.rows if row.kind != "level" and row.timed and row.name != BOUND),
                    key=lambda row: row.wall_ms.p50)
        bound = run.row(BOUND)
        spread = [f"{number(row.wall_ms.p50)} ({number(row.wall_ms.p20)} to {number(row.wall_ms.p80)})"
                  for row in (ours, other)]
        cells = [run.preset, f"{run.shape['T']:,}", f"{ours.number} {ours.name}", spread[0], percent(ours.bound_share),
                 bandwidth(run, ours), other.name, spread[1], ahead(ours.wall_ms, other.wall_ms),
                 share(ours.gpu_ms, bound and bound.gpu_ms), ahead(ours.gpu_ms, other.gpu_ms),
                 median(ours.sustained_ms), share(ours.sustained_ms, bound and bound.sustained_ms),
                 median(other.sustained_ms), ahead(ours.sustained_ms, other.sustained_ms),
                 run.rounds, run.environment["commit"][:7]]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    stamps = {f"{run.environment['gpu']}, driver {run.environment['driver']}, torch {run.environment['torch']}, Triton "
              f"{run.environment['triton']}, {run.dtype}, {run.routing} routing, commit {run.environment['commit']}, "
              f"{run.environment['date']}." for run in runs}
    versions = {f"{row.name} {row.version}" for run in runs for row in run.rows if row.timed and row.version}
    beside = [f"Beside {', '.join(sorted(versions))}."] if versions else []
    return "\n".join([*lines, "", *sorted(stamps), *beside])


def training_markdown(record: dict) -> str:
    """labs/backward_benchmark.py's figures as a markdown table: a row a shape, our kernels against the faster of
    grouped_mm's two ways to sum."""
    env = record["environment"]
    lines = [
        "| layer | tokens | forward + backward, ms (p20 to p80) | grouped_mm | speedup | checkpointed | kept MiB | "
        "grouped_mm | saved | checkpointed | peak MiB | grouped_mm | checkpointed |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for shape in record["figures"]["shapes"]:
        rows = {row["name"]: row for row in shape["rows"]}
        ours, saving = rows["our kernels"], rows["checkpointed"]
        base = min((row for name, row in rows.items() if name.startswith("grouped_mm")),
                   key=lambda row: row["step_ms"]["p50"])
        times = [row["step_ms"] for row in (ours, base, saving)]
        spread = [f"{number(one['p50'])} ({number(one['p20'])} to {number(one['p80'])})" for one in times]
        gain = ratio(times[1]["p50"] / times[0]["p50"])
        if times[0]["p80"] >= times[1]["p20"] and times[1]["p80"] >= times[0]["p20"]:
            gain += ", within the spread"
        memory = [number(row[key]) for key in ("kept_mib", "peak_mib") for row in (ours, base, saving)]
        memory.insert(2, f"{1 - ours['kept_mib'] / base['kept_mib']:.0%}")
        cells = [shape["config"], f"{shape['shape']['T']:,}", *spread[:2], gain, spread[2], *memory]
        lines.append("| " + " | ".join(cells) + " |")
    dtypes = ", ".join(sorted({shape["dtype"] for shape in record["figures"]["shapes"]}))
    lines += ["", f"{env['gpu']}, driver {env['driver']}, torch {env['torch']}, Triton {env['triton']}, {dtypes}, "
                  f"commit {env['commit']}, {env['date']}."]
    return "\n".join(lines)


def render(text: str, recorded: Path) -> str:
    """`text` with every marked table generated anew from `recorded`/<stem>.json or `recorded`/<folder>. Raises
    ValueError if a marker names tokens that the file does not have."""

    def usual(path: Path) -> list[Run]:
        return [run for run in load(path) if (run.routing, run.dtype) == ("natural", "bfloat16")]

    def table(match: re.Match) -> str:
        path = recorded / f"{match['stem']}.json"
        runs = {run.shape["T"]: run for run in usual(path)}
        wanted = [int(part) for part in match["tokens"].split(",")]
        missing = [T for T in wanted if T not in runs]
        if missing:
            raise ValueError(f"README.md wants tokens {missing} of {path.name}, which has {sorted(runs)}")
        body = "\n\n".join(markdown(runs[T]) for T in wanted)
        return f"{match['open']}\n{body}\n\n{match['end']}"

    def leads(match: re.Match) -> str:
        runs = [run for path in sorted((recorded / match["folder"]).glob("*.json")) for run in usual(path)]
        return f"{match['open']}\n{leads_markdown(runs)}\n\n{match['end']}"

    def training(match: re.Match) -> str:
        record = json.loads((recorded / f"{match['stem']}.json").read_text())
        return f"{match['open']}\n{training_markdown(record)}\n\n{match['end']}"

    return TRAINING.sub(training, LEADS.sub(leads, TABLE.sub(table, text)))


def rewrite(readme: Path, recorded: Path, say: Callable[[str], object]) -> bool:
    """Rewrite the tables of `readme` in place; says and returns whether that was possible."""
    text = readme.read_text()
    if not TABLE.search(text):
        say(f"{readme.name} has no table markers")
        return False
    fresh = render(text, recorded)
    readme.write_text(fresh)
    say(f"{readme.name}: {'tables rewritten' if fresh != text else 'tables were up to date'}")
    return True
