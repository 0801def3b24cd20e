"""README.md's tables, generated from plots/*.json between pairs of markers.

A marker names the file and the token counts: `<!-- table h200_qwen3-30b-a3b 64,512,16384 -->` up to
`<!-- end -->`. What stands between is replaced; everything else is prose and left alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from common.results import Run, load, speedups
from common.show import name_text, number, percent, ratio, rounding_notes, status_text

TABLE = re.compile(r"(?P<open><!-- table (?P<stem>\S+) (?P<tokens>[\d,]+) -->\n).*?(?P<end><!-- end -->)", re.DOTALL)


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


def render(text: str, recorded: Path) -> str:
    """`text` with every marked table generated anew from `recorded`/<stem>.json. Raises ValueError if a
    marker names tokens that the file does not have."""

    def table(match: re.Match) -> str:
        path = recorded / f"{match['stem']}.json"
        runs = {run.shape["T"]: run for run in load(path) if (run.routing, run.dtype) == ("natural", "bfloat16")}
        wanted = [int(part) for part in match["tokens"].split(",")]
        missing = [T for T in wanted if T not in runs]
        if missing:
            raise ValueError(f"README.md wants tokens {missing} of {path.name}, which has {sorted(runs)}")
        body = "\n\n".join(markdown(runs[T]) for T in wanted)
        return f"{match['open']}\n{body}\n\n{match['end']}"

    return TABLE.sub(table, text)


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
