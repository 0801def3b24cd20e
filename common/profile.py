"""`level_runner.py --profile N`: where one level's time goes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from rich.table import Table

from common.config import Workload
from common.level import Loaded, Unsupported
from common.measure import profile_call
from common.model import make_inputs, make_weights
from common.run import interpreter_note
from common.show import Screen, number, shown

SEAMS = ("route", "dispatch", "experts", "combine", "experts_combined")
CALLS = 3


@contextmanager
def named_ranges(loaded: Loaded) -> Iterator[None]:
    """While open, each seam of the level runs inside an NVTX and a profiler range `level4.experts`.

    nsys and ncu show the first, torch.profiler the second. Levels that replay a graph have no seams
    at run time: theirs show while the graph is captured, and not at all inside a compiled one.
    """
    module, before = loaded.module, {}

    def wrap(seam: str):
        inner, label = before[seam], f"level{loaded.level.number}.{seam}"

        def ranged(*args, **kwargs):
            if torch.compiler.is_compiling():  # a range is not part of the graph
                return inner(*args, **kwargs)
            with torch.profiler.record_function(label), nvtx(label):
                return inner(*args, **kwargs)

        return ranged

    with ExitStack() as stack:
        for seam in SEAMS:
            if hasattr(module, seam):
                before[seam] = getattr(module, seam)
                stack.callback(setattr, module, seam, before[seam])
                setattr(module, seam, wrap(seam))
        yield


@contextmanager
def nvtx(label: str) -> Iterator[None]:
    """An NVTX range where there is a GPU, nothing elsewhere."""
    if not torch.cuda.is_available():
        yield
        return
    torch.cuda.nvtx.range_push(label)
    try:
        yield
    finally:
        torch.cuda.nvtx.range_pop()


def profile_level(loaded: Loaded, workload: Workload, device: torch.device, out: Path, screen: Screen) -> int:
    """Write a trace of a few calls (open it in Perfetto or chrome://tracing) and print the heaviest kernels.

    Returns the exit status: 1 if the level does not run here, 0 otherwise.
    """
    level = loaded.level
    try:
        level.check_supported(device, workload.dtype)
    except Unsupported as lack:
        screen.print(f"level {level.number} {level.name}: n/a ({lack})")
        return 1
    note = interpreter_note(workload) if level.interpreted(device) else ""
    screen.print(f"profiling level {level.number} {level.name} on {workload.config.name} T={workload.T}{note} ...")
    weights = make_weights(workload.config, workload.dtype, device, workload.seed)
    x_TD = make_inputs(workload, weights)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with named_ranges(loaded):
        forward = loaded.build(workload.config, weights)
        for _ in range(2):  # levels 5 to 8 capture a graph at either
            forward(x_TD)
        with torch.profiler.profile(activities=activities) as profiler:
            for _ in range(CALLS):
                with torch.profiler.record_function(f"level{level.number}"), nvtx(f"level{level.number}"):
                    forward(x_TD)
            if device.type == "cuda":
                torch.cuda.synchronize()
    trace = out / f"trace_level{level.number}_{workload.config.name}_T{workload.T}.json"
    profiler.export_chrome_trace(str(trace))
    if device.type == "cuda":
        profile = profile_call(lambda: forward(x_TD))
        table = Table(title=f"GPU-busy {number(profile.gpu_ms)} ms, {profile.launches} launches", title_justify="left")
        for heading in ("kernel", "calls", "ms", "share"):
            table.add_column(heading, justify="left" if heading == "kernel" else "right", no_wrap=True,
                             overflow="ellipsis", max_width=100)
        heaviest = sorted(profile.kernels.items(), key=lambda item: -item[1][1])[:15]
        for name, (count, ms) in heaviest:
            table.add_row(name, str(count), number(ms), f"{ms / profile.gpu_ms:.0%}")
        screen.print(table)
    else:
        screen.print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=15))
    screen.print(f"trace: {shown(trace)} (open in https://ui.perfetto.dev)")
    return 0
