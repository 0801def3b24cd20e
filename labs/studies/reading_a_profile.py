"""Where does level 4's time go, and what does that ask of level 8?

    python labs/studies/reading_a_profile.py [--preset qwen3-30b-a3b] [--tokens 512,16384]

One call of each level under the profiler, its kernels sorted by what they do, beside the wall time of calls without
it. Three things are read off: how much of the wall time the GPU works at all, how much of that the matrix products
take, and what the rest is made of. On a CPU the operations of level 1 stand in for level 4's kernels.

The profiled call comes after those that are timed, with the same x: by then level 8's graph reads x where it lies, and
the call is one launch. In a record from before it did so, a copy of x into the graph's input is a second one, and the
chart says that.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from matplotlib.figure import Figure

from common.config import PRESETS, Workload, dtype_name, preset
from common.level import discover  # first of those that import Triton: it picks its interpreter without a GPU
from common.measure import WallClock, gate, profile_call
from common.model import make_inputs, make_weights, oracle
from common.show import number, percent
from labs.studies.study import COLORS, Options, PlainTable, Study, figure, legend_above, main, time_together

# T tokens.

# What a kernel does, by parts of its name: the first that fits.
KINDS = {
    "expert GEMMs": ("grouped_gemm", "up_kernel", "up_swiglu", "up_gather", "up_rows", "up_ahead", "down_kernel",
                     "down_combine", "bmm"),
    "router GEMM": ("nvjet", "gemm", "cutlass", "logits", "mm"),
    "activation": ("silu",),
    "sort, top-k, offsets": ("sort", "topk", "searchsorted", "arange", "place", "choose", "route", "softmax", "plan",
                             "rank_keys", "round_counts", "select_rows", "list_entries", "work_kernel"),
    "gather, combine": ("gather", "index", "combine", "scatter", "spread", "reduce", "sum"),
}
REST = "casts, products, copies"


def kind_of(kernel: str) -> str:
    """The kind of work that a kernel's name tells of."""
    return next((kind for kind, marks in KINDS.items() if any(mark in kernel.lower() for mark in marks)), REST)


def arguments(parser: argparse.ArgumentParser) -> None:
    """The workloads."""
    parser.add_argument("--preset", choices=PRESETS, help="default: qwen3-30b-a3b on a GPU, tiny without")
    parser.add_argument("--tokens", help="token counts (default: 512,16384 on a GPU, 64 without)")


def profile(call: Callable[[], object], on_gpu: bool) -> tuple[float, int, list[dict]]:
    """Busy milliseconds, launches (on a CPU: 0), and kernels (on a CPU: operations) by falling time."""
    if on_gpu:
        found = profile_call(call)
        kernels = [{"name": name, "count": count, "ms": ms} for name, (count, ms) in found.kernels.items()]
        busy, launches = found.gpu_ms, found.launches
    else:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            call()
        kernels = [{"name": event.key, "count": event.count, "ms": event.self_cpu_time_total / 1e3}
                   for event in profiler.key_averages()]
        busy, launches = sum(kernel["ms"] for kernel in kernels), 0
    for kernel in kernels:
        kernel["kind"] = kind_of(kernel["name"])
    return busy, launches, sorted(kernels, key=lambda kernel: -kernel["ms"])


def measure(options: Options) -> dict:
    """Levels 4 and 8, on a CPU level 1, at each token count, after the gate."""
    full, device, args = options.full, options.device, options.args
    on_gpu = device.type == "cuda"
    cfg = preset(args.preset or ("qwen3-30b-a3b" if full else "tiny"))
    parts = (args.tokens or ("512,16384" if full else "64")).split(",")
    if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"--tokens {args.tokens}: give whole numbers of at least 1, separated by commas")
    dtype = torch.bfloat16 if on_gpu else torch.float32
    weights = make_weights(cfg, dtype, device)
    levels = [one for one in discover() if one.level.number in ((4, 8) if on_gpu else (1,))]
    clock, runs = WallClock(device), []
    for T in map(int, parts):
        workload = Workload(cfg, T, dtype)
        x_TD = make_inputs(workload, weights)
        expected = oracle(cfg, weights, x_TD)
        calls = {}
        for loaded in levels:
            options.say(f"level {loaded.level.number}, {T} tokens: building, checking")
            loaded.level.check_supported(device, dtype)
            forward = loaded.build(cfg, weights)
            found = gate(forward(x_TD), expected, workload)
            if not found.ok:
                raise RuntimeError(f"level {loaded.level.number}: {found.reason}, so it is not profiled")
            calls[f"level {loaded.level.number} {loaded.level.name}"] = lambda forward=forward, x=x_TD: forward(x)
        walls = time_together(calls, clock, 12 if full else 2)
        for name, call in calls.items():
            clock(lambda: None)  # a cold L2, after calls with the same x: a graph of level 8 reads it in place by now
            busy, launches, kernels = profile(call, on_gpu)
            runs.append({"level": name, "T": T, "wall_ms": walls[name], "busy_ms": busy, "launches": launches,
                         "kernels": kernels})
    return {"preset": cfg.name, "shape": {"D": cfg.D, "F": cfg.F, "E": cfg.E, "K": cfg.K}, "dtype": dtype_name(dtype),
            "runs": runs}


def by_kind(run: dict) -> dict[str, float]:
    """Milliseconds of each kind of work."""
    found = dict.fromkeys((*KINDS, REST), 0.0)
    for kernel in run["kernels"]:
        found[kernel["kind"]] += kernel["ms"]
    return found


def launch_words(run: dict) -> str:
    """How many launches a run's call made, and what they were where all but one, a graph's replay, are copies."""
    launches, kernels = run["launches"], run["kernels"]
    copies = sum(kernel["count"] for kernel in kernels if kernel["name"].startswith("Memcpy DtoD"))
    replayed = 1 + copies == launches < sum(kernel["count"] for kernel in kernels)
    words = f"{launches} launch{'' if launches == 1 else 'es'}"
    return words + (": a copy of x, then the graph's replay" if replayed and copies else "")


def table(figures: dict) -> list[PlainTable | str]:
    """Kinds of work by run, then each run's heaviest kernels."""
    runs = figures["runs"]
    heads = [f"{run['level']}, T={run['T']:,}" for run in runs]
    kinds = [by_kind(run) for run in runs]
    rows = [["wall ms", *(number(run["wall_ms"]["p50"]) for run in runs)],
            ["GPU-busy ms" if runs[0]["launches"] else "busy ms", *(number(run["busy_ms"]) for run in runs)],
            ["launches", *(str(run["launches"] or "-") for run in runs)],
            *([kind, *(number(one[kind]) for one in kinds)] for kind in (*KINDS, REST))]
    parts: list[PlainTable | str] = [PlainTable(f"{figures['preset']}, {figures['dtype']}", ["ms", *heads], rows)]
    for head, run in zip(heads, runs, strict=True):
        parts.append(PlainTable(head, ["kernel", "kind", "calls", "ms", "share"], [
            [kernel["name"][:70], kernel["kind"], str(kernel["count"]), number(kernel["ms"]),
             percent(kernel["ms"] / run["busy_ms"])] for kernel in run["kernels"][:8]]))
    return parts


def draw(figures: dict, under: str) -> dict[str, Figure]:
    """A panel a token count: for each level its kinds of work end to end, and its wall time as a mark."""
    counts = sorted({run["T"] for run in figures["runs"]})
    words = " ".join(f"{letter}={size}" for letter, size in figures["shape"].items())
    fig, axes = figure("Reading a profile: what the GPU does, and when it does nothing",
                       f"{figures['preset']}: {words}, {figures['dtype']}  |  {under}", rows=len(counts))
    for ax, T in zip(axes, counts, strict=True):
        runs = [run for run in figures["runs"] if run["T"] == T]
        for place, run in enumerate(runs):
            left = 0.0
            for (kind, ms), color in zip(by_kind(run).items(), COLORS, strict=False):
                ax.barh(place, ms, 0.6, left=left, color=color, gid=f"{run['level']} {T} {kind}",
                        label=kind if place == 0 else None)
                left += ms
            wall = run["wall_ms"]["p50"]
            ax.plot([wall, wall], [place - 0.4, place + 0.4], color="black", lw=4,
                    label="wall time of a call" if place == 0 else None)
            launches = f", {launch_words(run)}" if run["launches"] else ""
            ax.text(max(wall, left), place, f"  {number(wall)} ms{launches}", va="center")
        ax.set_yticks(range(len(runs)), [run["level"] for run in runs])
        ax.invert_yaxis()
        ax.set_xlim(0, 1.4 * max(max(run["wall_ms"]["p50"], run["busy_ms"]) for run in runs))
        ax.set_title(f"{T:,} tokens")
    axes[-1].set_xlabel("milliseconds")
    legend_above(fig, axes[0].get_legend_handles_labels()[0], columns=4)
    return {"": fig}


def conclude(figures: dict) -> str:
    """Of the first level at the most tokens and at the fewest; and which kinds of kernels another level has no more."""
    runs = figures["runs"]
    name = runs[0]["level"]
    mine = sorted((run for run in runs if run["level"] == name), key=lambda run: run["T"])
    few, many = mine[0], mine[-1]
    share = by_kind(many)["expert GEMMs"] / many["busy_ms"]
    at_work = few["busy_ms"] / few["wall_ms"]["p50"]
    busy = "all" if at_work > 1 else percent(at_work)  # the profiled call may be slower than those that are timed
    if few["launches"]:
        said = f"At {few['T']:,} tokens kernels are at work for {busy} of {name}'s wall time; "
    else:
        said = (f"On a CPU operations of {name} stand in for level 4's kernels: at {few['T']:,} tokens they are at "
                f"work for {busy} of its wall time; ")
    said += f"at {many['T']:,} " if many is not few else ""
    said += (f"the expert GEMMs take {percent(share)} of the busy time and the work around them "
             f"{number(many['busy_ms'] * (1 - share))} ms")
    other = next((run for run in runs if run["level"] != name and run["T"] == many["T"]), None)
    if other is None:
        return said + "."
    theirs = by_kind(other)
    gone = [kind for kind, ms in by_kind(many).items() if ms and not theirs[kind]]
    words = f"has no kernel left for {'; '.join(gone)}, " if gone else ""
    return (f"{said}; {other['level']} {words}spends {number(other['busy_ms'] - theirs['expert GEMMs'])} ms around its "
            f"expert GEMMs and {number(theirs['expert GEMMs'])} in them, against {number(many['busy_ms'] * share)}.")


STUDY = Study("reading_a_profile", "Where does level 4's time go, and what does that ask of level 8?", measure, table,
              draw, conclude, arguments=arguments)

if __name__ == "__main__":
    raise SystemExit(main(STUDY))
