"""Every picture, drawn from results files and nothing else.

A chart is a function from runs to a matplotlib Figure; `draw_all` writes each as PNG and SVG. They are
made to be read from the back of a room: 16:9, few words, large type, a caption that says what was
measured on which GPU at which commit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from textwrap import fill

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from common.config import DEFAULT_TOKENS
from common.references import BOUND
from common.results import Row, Run, speedups
from common.show import number, percent, status_text

GAIN, LOSS, FIRST, ABSENT, BOUND_COLOR = "#2a6fbb", "#d1495b", "#7a7f87", "#e3e5e8", "#2e933c"
MORE = "#7b5ea7"
SAME_JOB = 8  # levels above it add a capability (CONTRIBUTING.md), so their forward does more than the ladder's
LEVEL_COLORS = ("#111111", "#a0522d", "#e9a03b", "#7a7f87", "#d1495b", "#e377c2", "#4fb3bf", "#2a6fbb", "#2e933c",
                MORE)
ROUNDED = {"hatch": "//", "edgecolor": "white"}  # a bar of rounded routing: another function than the others
DIAMOND = {"marker": "D", "markersize": 9, "markerfacecolor": "#f2c14e", "markeredgecolor": "#333"}
STYLE = {
    "figure.figsize": (16, 9), "figure.dpi": 100, "font.size": 16, "axes.titlesize": 20,
    "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "charts", "svg.fonttype": "path",
}
MOST_PANELS = 3
MOST_LETTER = 0.0075  # a letter of a label, as a share of the figure's width
MOST_PEER_PANELS = 6
PEER_AXIS = 3.5


def caption(runs: Sequence[Run]) -> str:
    """What was measured, on what, when: one line a chart stands on."""
    run = runs[0]
    env, shape = run.environment, run.shape
    commits = sorted({str(one.environment["commit"]) for one in runs})
    dates = sorted({str(one.environment["date"]) for one in runs})
    return (f"{run.preset}: D={shape['D']} F={shape['F']} E={shape['E']} K={shape['K']}, {run.dtype}, {run.routing} "
            f"routing  |  {env['gpu']}, torch {env['torch']}, Triton {env['triton']}  |  commit {', '.join(commits)}, "
            f"{', '.join(dates)}")


def put_under(fig: Figure, words: str) -> None:
    """A caption under the figure, broken between the parts that "  |  " separates if it is too long for a line."""
    whole = "  |  ".join(part.replace(" ", "\xa0") for part in words.split("  |  "))
    fig.supxlabel(fill(whole, 170).replace("\xa0", " "), fontsize=12, color="#555")


def panels(runs: Sequence[Run]) -> list[Run]:
    """The runs that get a panel each: those of the preset's default token counts, else the first few."""
    wanted = DEFAULT_TOKENS.get(runs[0].preset, ())
    usual = [run for run in runs if run.shape["T"] in wanted][:MOST_PANELS]
    return usual if usual and len(runs) > MOST_PANELS else list(runs)[:MOST_PANELS]


def does_more(row: Row) -> bool:
    """Whether the level does more than the ladder's job, so that its time is no step of it."""
    return row.number is not None and row.number > SAME_JOB


def plain(value: float, _: object = None) -> str:
    """A tick's label without an exponent."""
    return f"{value:,.10g}"


def levels_of(runs: Sequence[Run]) -> list[tuple[int, str]]:
    """Number and name of the levels of all runs, level 0 first: not every run has every level."""
    return sorted({(row.number, row.name) for run in runs for row in run.levels})


def level_bars(ax: Axes, run: Run, chosen: Sequence[Run], value: Callable[[Row], float | None],
               label: Callable[[Row], str], color: Callable[[Row], str], log: bool) -> None:
    """One bar a level of `run`, level 0 on top; a level without a value says why where its bar would be. Panels share
    their axis, so levels that another one of `chosen` has stand there too."""
    rows = {row.name: row for row in run.levels}
    levels = levels_of(chosen)
    ax.set_yticks(range(len(levels)), [f"{number} {name}".replace(" rounded", "\nrounded") for number, name in levels])
    ax.set_ylim(len(levels) - 0.4, -0.6)
    known = [value(row) for row in run.levels if value(row)]  # a peak of 0 has no place on a log axis
    least, most = (min(known), max(known)) if known else (1.0, 1.0)
    words = {row.name: f" {label(row)}" + ("\n rounded" if row.variant == "rounded" else "")
             for row in run.levels if value(row) is not None}
    longest = max((len(line) for text in words.values() for line in text.split("\n")), default=0)
    free = min(0.7, longest * MOST_LETTER * len(ax.figure.axes))  # of the axis, for the label of the longest bar
    if log:
        ax.set_xscale("log")
        left = min(1.0, least) * 0.7 if least > 0.01 else least * 0.7
        ax.set_xlim(left, most * (most / left) ** (free / (1 - free)))
        ax.xaxis.set_major_locator(LogLocator(numticks=6))
        ax.xaxis.set_major_formatter(lambda at, _: plain(at) if at <= most else "")  # beyond it is only room
        ax.xaxis.set_minor_formatter(NullFormatter())
    else:
        ax.set_xlim(0, most / (1 - free))
        ax.xaxis.set_major_locator(MaxNLocator(5))
        ax.xaxis.set_major_formatter(plain)
    for position, (_, name) in enumerate(levels):
        row = rows.get(name)
        length = value(row) if row else None
        if length is None:
            ax.axhspan(position - 0.4, position + 0.4, color=ABSENT, zorder=0)
            ax.text(0.03, position, status_text(row) if row else "not run", va="center", color="#555", fontsize=14,
                    transform=ax.get_yaxis_transform())
        else:
            ax.barh(position, length, 0.8, color=color(row), gid=row.name,
                    **(ROUNDED if row.variant == "rounded" else {}))
            ax.text(length, position, words[row.name], va="center", fontsize=14, zorder=5, linespacing=0.9,
                    bbox={"facecolor": "white", "alpha": 0.9, "edgecolor": "none", "pad": 0})
    ax.grid(axis="x", alpha=0.3)


def differ_by_much(values: Iterable[float | None]) -> bool:
    """Whether only a log axis shows the smallest beside the largest."""
    known = [value for value in values if value]
    return bool(known) and max(known) > 10 * min(known)


def figure(runs: Sequence[Run], title: str, columns: int) -> tuple[Figure, list[Axes]]:
    """A captioned 16:9 figure with `columns` axes side by side."""
    fig, axes = plt.subplots(1, columns, squeeze=False, sharey=True, layout="constrained")
    fig.suptitle(title, fontsize=26, fontweight="bold")
    put_under(fig, caption(runs))
    return fig, list(axes[0])


def legend_above(fig: Figure, handles: list[Patch | Line2D]) -> None:
    """One legend for all panels, between the title and them, where no bar can be under it."""
    if handles:
        fig.suptitle(fig.get_suptitle() + "\n", fontsize=26, fontweight="bold")
        fig.legend(handles=handles, fontsize=13, loc="upper center", bbox_to_anchor=(0.5, 0.955), ncols=len(handles),
                   frameon=False, columnspacing=1.2, handlelength=1.6)


def marks(runs: Sequence[Run]) -> list[Patch]:
    """What a legend must say of rows that do not do the ladder's job."""
    rows = [row for run in runs for row in run.levels]
    handles = []
    more = sorted({row.number for row in rows if does_more(row)})
    if more:
        handles.append(Patch(color=MORE, label=f"level {', '.join(map(str, more))}: does more than this forward"))
    if any(row.variant == "rounded" for row in rows):
        # Of no colour, as bars have theirs.
        handles.append(Patch(facecolor="white", hatch=ROUNDED["hatch"], edgecolor="0.4",
                             label="rounded: another function than top-k"))
    return handles


def ladder(runs: Sequence[Run]) -> Figure:
    """Cumulative speedup a level: bar length is the total; the text also gives the step."""
    chosen = panels(runs)
    fig, axes = figure(chosen, "From Python loops towards the GPU's limit: cumulative speedup", len(chosen))
    log = differ_by_much(gain.total for run in chosen for gain in speedups(run).values())
    for ax, run in zip(axes, chosen, strict=True):
        gains = speedups(run)

        def total(row: Row, gains=gains) -> float | None:
            return gains[row.name].total if row.name in gains else None

        def text(row: Row, gains=gains) -> str:
            gain = gains[row.name]
            words = f"{number(gain.total)}x"
            return words if gain.step is None else f"{words}  (step {number(gain.step)}x)"

        def hue(row: Row, gains=gains) -> str:
            gain = gains[row.name]
            if does_more(row):
                return MORE
            return FIRST if gain.step is None or not gain.clear else GAIN if gain.step > 1 else LOSS

        level_bars(ax, run, chosen, total, text, hue, log)
        first = next((row for row in run.levels if row.timed), None)
        under = f"level {first.number} takes {number(first.wall_ms.p50)} ms" if first else "nothing timed"
        ax.set_title(f"{run.shape['T']:,} tokens\n{under}")
        ax.set_xlabel(f"times faster than level {first.number if first else 0}" + " (log)" * log)
    handles = [Patch(color=GAIN, label="faster than the level before"), Patch(color=LOSS, label="slower"),
               Patch(color=FIRST, label="start, or no clear difference")]
    legend_above(fig, [*handles, *marks(chosen)])
    return fig


def scale(runs: Sequence[Run]) -> Figure:
    """Time against tokens, a line a level, a cross at the top where a level is out of memory, a square
    where its routing is rounded."""
    fig, (ax,) = figure(runs, "Scale decides: time against tokens", 1)
    times = [row.wall_ms.p50 for run in runs for row in run.rows if row.timed]
    roof = max(times) * 3
    any_rounded = any(row.variant == "rounded" for run in runs for row in run.levels)
    levels = levels_of(runs)
    for index, (level, name) in enumerate(levels):
        color = LEVEL_COLORS[level % len(LEVEL_COLORS)]  # a level's variants share it
        points = [(run.shape["T"], row) for run in runs for row in run.levels if row.name == name]
        timed = [(T, row.wall_ms.p50) for T, row in points if row.timed]
        rounded = [(T, row.wall_ms.p50) for T, row in points if row.timed and row.variant == "rounded"]
        style = ":" if level > SAME_JOB else "--" if "rounded" in name else "-"
        ax.plot(*zip(*timed, strict=True) if timed else ([], []), "o", ls=style, color=color, lw=3, ms=8,
                label=f"{level} {name}", gid=name)
        ax.plot(*zip(*rounded, strict=True) if rounded else ([], []), "s", color="white", mec=color, ms=11, mew=3,
                gid=f"{name}-rounded")
        lost = [T for T, row in points if row.status == "oom"]
        ax.plot(lost, [roof * 1.3**-index for _ in lost], "x", color=color, ms=12, mew=3, gid=f"{name}-oom")
    bound = [(run.shape["T"], run.row(BOUND).wall_ms.p50) for run in runs if run.row(BOUND) and run.row(BOUND).timed]
    if bound:
        ax.plot(*zip(*bound, strict=True), "-.", color="black", lw=2, label="two bare cuBLAS bmm", gid="bound")
    ax.set(xscale="log", yscale="log", xlabel="tokens", ylabel="milliseconds a forward (log)")
    ax.set_xscale("log", base=2)
    ax.yaxis.set_major_formatter(plain)
    if max(times) < 100 * min(times):
        ax.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 4, 6, 8)))
        ax.yaxis.set_minor_formatter(plain)
    ticks = [run.shape["T"] for run in runs]
    ax.set_xticks(ticks, [f"{T:,}" for T in ticks])
    ax.grid(alpha=0.3)
    signs = ["x: out of memory"] + ["square: rounded routing"] * any_rounded
    signs += ["dotted: does more than a forward"] * any(level > SAME_JOB for level, _ in levels)
    ax.legend(fontsize=15, loc="center left", bbox_to_anchor=(1.0, 0.5), title="\n".join(["level", *signs]),
              title_fontsize=13, handlelength=3)
    return fig


def memory(runs: Sequence[Run]) -> Figure:
    """Peak memory a level, above weights, input and output."""
    chosen = panels(runs)
    fig, axes = figure(chosen, "Peak memory above weights, input and output", len(chosen))
    log = differ_by_much(row.peak_mib for run in chosen for row in run.levels if row.status == "ok")
    for ax, run in zip(axes, chosen, strict=True):
        level_bars(ax, run, chosen, lambda row: row.peak_mib if row.status == "ok" else None,
                   lambda row: number(row.peak_mib), lambda row: MORE if does_more(row) else GAIN, log)
        ax.set_title(f"{run.shape['T']:,} tokens")
        ax.set_xlabel("MiB" + " (log)" * log)
    legend_above(fig, marks(chosen))
    return fig


def roofline(runs: Sequence[Run]) -> Figure:
    """Share of the roofline a level reaches, and what two bare cuBLAS bmm reach."""
    chosen = panels(runs)
    fig, axes = figure(chosen, "Share of the roofline", len(chosen))
    for ax, run in zip(axes, chosen, strict=True):
        level_bars(ax, run, chosen, lambda row: 100 * row.roofline_share if row.roofline_share else None,
                   lambda row: percent(row.roofline_share),
                   lambda row: MORE if does_more(row) else GAIN, log=False)
        shares = [100 * row.roofline_share for row in run.rows if row.roofline_share]
        bound = run.row(BOUND)
        words = ""
        if bound and bound.roofline_share:
            ax.axvline(100 * bound.roofline_share, color=BOUND_COLOR, ls="--", lw=3, gid="bound", zorder=1)
            words = f"two bare bmm: {100 * bound.roofline_share:.0f}%"
        ax.set_xlim(0, 1.35 * max(shares, default=100))
        limit = "arithmetic" if run.is_arithmetic_bound else "memory"
        ax.set_title(f"{run.shape['T']:,} tokens, {words}\n100% is {number(run.roofline_ms)} ms ({limit})", fontsize=17)
        ax.set_xlabel("% of the roofline")
    bare = Line2D([], [], color=BOUND_COLOR, ls="--", lw=3, label="two bare cuBLAS bmm")
    legend_above(fig, [bare, *marks(chosen)])
    return fig


def has_peers(run: Run) -> bool:
    """Whether another library's layer was timed in this run."""
    return any(row.kind == "peer" and row.timed for row in run.rows)


def peers(runs: Sequence[Run]) -> Figure:
    """Our levels beside other libraries' layers, one panel a token count: median wall time, fastest on top, with the
    20th to 80th percentile; a layer without a time says why. The bound is a line. Bars over PEER_AXIS times the fastest
    are cut, and say so. Diamonds, and a broken line for the bound, are what each takes under its own load alone; off
    the axis they are left out."""
    chosen = [run for run in runs if has_peers(run)][:MOST_PEER_PANELS]
    across = 2 if len(chosen) == 4 else min(len(chosen), 3)
    fig, axes = plt.subplots(-(-len(chosen) // across), across, squeeze=False, layout="constrained")
    fig.suptitle("Beside other libraries: same weights, same rounds\n", fontsize=26, fontweight="bold")
    put_under(fig, caption(chosen))
    for ax in axes.flat[len(chosen):]:
        ax.set_visible(False)
    for ax, run in zip(axes.flat, chosen, strict=False):
        bound = run.row(BOUND)
        rows = sorted((row for row in run.rows if row.timed and row is not bound), key=lambda row: row.wall_ms.p50)
        absent = [row for row in run.rows if row.kind == "peer" and not row.timed and row.status != "not installed"]
        names = [f"{row.number} {row.name}" if row.kind == "level" else row.name for row in [*rows, *absent]]
        ax.set_yticks(range(len(names)), names)
        ax.invert_yaxis()
        for position, row in enumerate(absent, len(rows)):
            ax.axhspan(position - 0.35, position + 0.35, color=ABSENT, zorder=0)
            ax.text(0.03, position, status_text(row), va="center", color="#555", fontsize=13,
                    transform=ax.get_yaxis_transform())
        end = PEER_AXIS * rows[0].wall_ms.p50
        almost = [1.02 * row.wall_ms.p80 for row in rows if row.wall_ms.p50 <= 1.15 * end]  # so shown whole
        end = max(end, *almost)
        for position, row in enumerate(rows):
            time, color = row.wall_ms, GAIN if row.kind == "level" else FIRST
            ax.barh(position, time.p50, 0.7, color=color, gid=row.name,
                    xerr=[[time.p50 - time.p20], [time.p80 - time.p50]], error_kw={"ecolor": "#333", "capsize": 3},
                    **(ROUNDED if row.variant == "rounded" else {}))
            ax.text(0.02 * end, position, number(time.p50), va="center", fontsize=13, color="white", fontweight="bold",
                    bbox={"facecolor": color, "edgecolor": "none", "pad": 1})  # over a rounded bar's hatches
            if time.p50 > end:
                ax.text(0.98 * end, position, "\u2192", va="center", ha="right", fontsize=16, color="white")
            if row.sustained_ms and row.sustained_ms.p50 < end:
                ax.plot(row.sustained_ms.p50, position, **DIAMOND, gid=f"{row.name} sustained")
        if bound and bound.timed:
            ax.axvline(bound.wall_ms.p50, color=BOUND_COLOR, linewidth=2)
            if bound.sustained_ms:
                ax.axvline(bound.sustained_ms.p50, color=BOUND_COLOR, linewidth=2, linestyle="--")
        ax.set_xlim(0, end)
        ax.set_title(f"{run.shape['T']:,} token{'s' if run.shape['T'] > 1 else ''}")
        ax.set_xlabel("ms, as the caller sees it", fontsize=13)
        ax.tick_params(labelsize=13)
    words = f"bare {BOUND}: no routing, gather, activation or sum"
    handles = [Patch(color=GAIN, label="ours"), Patch(color=FIRST, label="others"),
               Line2D([], [], color=BOUND_COLOR, linewidth=2, label=words), *marks(chosen)]
    if any(row.sustained_ms for run in chosen for row in run.rows):
        handles.append(Line2D([], [], linestyle="none", **DIAMOND, label="sustained, each alone; bmm: broken line"))
    fig.legend(handles=handles, fontsize=12, loc="upper center", bbox_to_anchor=(0.5, 0.955), ncols=5, frameon=False,
               columnspacing=1.5)
    return fig


CHARTS: dict[str, Callable[[Sequence[Run]], Figure]] = {
    "ladder": ladder, "scale": scale, "memory": memory, "roofline": roofline, "peers": peers,
}


def draw_all(runs: Sequence[Run], folder: Path, stem: str) -> list[Path]:
    """Draw what these runs can show, one routing and dtype at a time, as `<stem>_<chart>.png` and `.svg`.

    Runs with other libraries' layers give the chart of those, and no other. The scale chart needs two token counts,
    the roofline measured ceilings, all a timed level.
    Returns the files written.
    """
    written: list[Path] = []
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        if any(row.timed for row in run.levels):
            groups.setdefault((run.routing, run.dtype), []).append(run)
    for (routing, dtype), group in groups.items():
        suffix = "".join(f"_{word}" for word, usual in ((routing, "natural"), (dtype, "bfloat16")) if word != usual)
        for name, chart in CHARTS.items():
            if name == "scale" and len(group) < 2:
                continue
            if name == "roofline" and not all(run.ceilings for run in group):
                continue
            if (name == "peers") != any(map(has_peers, group)):
                continue
            with plt.rc_context(STYLE):
                fig = chart(group)
                for ending in ("png", "svg"):
                    path = folder / f"{stem}{suffix}_{name}.{ending}"
                    fig.savefig(path, metadata={"Date": None} if ending == "svg" else None)
                    written.append(path)
                plt.close(fig)
    return written
