"""How a callable is checked, timed and weighed. No level and no reference has a ruler of its own.

Order is part of the method: gate first (a wrong result gets no time), then warm, then time in
interleaved rounds with a cold L2, so that a chip that slows as it heats slows everybody alike, then
profile, on the chip that the rounds have warmed, and last time each under its own load alone.
"""

from __future__ import annotations

import bisect
import datetime
import gc
import os
import platform
import random
import re
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import triton

from common.config import Workload
from common.level import Unsupported
from common.model import Oracle, Weights
from common.reader import read_all

Forward = Callable[[torch.Tensor], torch.Tensor]

# A row of the output may err by more than the whole does, because rows differ in how much cancels.
WORST_ROW_FACTOR = 8
# Below this gap between the last chosen logit and the first not chosen, float32 may choose either.
TIE_MARGIN = 1e-4
# A GPU under load slows for some seconds, by a tenth and more, as it heats and reaches its power limit (labs/LOG.md).
WARM_SECONDS = 3.0
# Of a call under its own load alone: its times settle within some 0.2 seconds (labs/LOG.md).
SUSTAINED_SECONDS = 0.6
# Host calls that put work on the GPU; a graph replay is one, however many kernels it holds.
LAUNCH_CALLS = ("cudaLaunch", "cuLaunch", "cudaMemcpy", "cudaMemset", "cudaGraphLaunch")


# ---- correctness ---------------------------------------------------------------------------------

def relative_error(out: torch.Tensor, ref: torch.Tensor) -> float:
    """||out - ref|| / ||ref|| over all elements, in float64. 0 for two empty tensors."""
    if ref.numel() == 0:
        return 0.0
    return ((out.double() - ref).norm() / ref.norm()).item()


def error_bound(workload: Workload) -> float:
    """Largest relative error that rounding alone may cause, for `gate`.

    A level rounds to its dtype about ten times on the way (gate, up, activation, product, each
    expert's output, the sums): independent errors of 0.2 to 0.3 eps each, together under 1 eps.
    Twice that, plus the float32 accumulation of D + F terms, which is all there is in float32.
    A swapped gate and up or a skipped score is an error of order 1.
    """
    cfg = workload.config
    float32_eps = torch.finfo(torch.float32).eps
    return 2 * torch.finfo(workload.dtype).eps + float32_eps * (cfg.D + cfg.F) ** 0.5


@dataclass(frozen=True)
class Gate:
    """What the gate found. `reason` is empty if the result passed."""

    rel_err: float
    worst_row_err: float
    bound: float
    reason: str = ""

    @property
    def ok(self) -> bool:
        return not self.reason


def gate(out_TD: torch.Tensor, expected: Oracle, workload: Workload, tie_margin: float = TIE_MARGIN) -> Gate:
    """Compare a level's output (T, D) with the oracle.

    Two errors must hold: the relative error of the whole against `error_bound`, and of each token's
    row against WORST_ROW_FACTOR times that, since one lost tile among thousands hides in the whole.
    A token whose choice of experts is a tie within `tie_margin` is left out of both: float32 logits may
    choose either expert. (A library that rounds its logits to bfloat16 needs a wider margin.)
    Raises Unsupported if that leaves no token: the output is neither right nor wrong.
    """
    bound, nan = error_bound(workload), float("nan")
    ref_TD = expected.out_TD
    if out_TD.shape != ref_TD.shape:
        return Gate(nan, nan, bound, f"output shape {tuple(out_TD.shape)} is not {tuple(ref_TD.shape)}")
    if out_TD.dtype != workload.dtype:
        return Gate(nan, nan, bound, f"output dtype {out_TD.dtype} is not {workload.dtype}")
    bad = int((~out_TD.isfinite()).sum())
    if bad:
        return Gate(nan, nan, bound, f"{bad} of {out_TD.numel()} output values are NaN or infinite")
    clear_T = expected.margin_T > tie_margin
    if ref_TD.shape[0] and not clear_T.any():
        raise Unsupported(f"cannot be judged: no token's choice of experts is clearer than {tie_margin}")
    rel_err = relative_error(out_TD[clear_T], ref_TD[clear_T])
    error_T = (out_TD.double() - ref_TD).norm(dim=1)
    scale_T = ref_TD.norm(dim=1).clamp_min(ref_TD.norm().item() / max(1, ref_TD.shape[0]) ** 0.5)
    row_error_T = torch.where(clear_T, error_T / scale_T, 0.0)
    worst = row_error_T.max().item()
    if rel_err > bound:
        return Gate(rel_err, worst, bound, f"relative error {rel_err:.2e} is over the bound {bound:.2e}")
    if worst > WORST_ROW_FACTOR * bound:
        token = int(row_error_T.argmax())
        return Gate(rel_err, worst, bound, f"token {token} is off by {worst:.2e}, "
                                           f"over the row bound {WORST_ROW_FACTOR * bound:.2e}")
    return Gate(rel_err, worst, bound)


def check_finite(x_TD: torch.Tensor, weights: Weights) -> None:
    """Raise ValueError naming the first of x and the weights that holds a NaN or an infinity."""
    tensors = {"x_TD": x_TD, "router_ED": weights.router_ED,
               "gate_up_E2FD": weights.gate_up_E2FD, "down_EDF": weights.down_EDF}
    for name, tensor in tensors.items():
        parts = tensor if tensor.dim() == 3 else [tensor]
        bad = sum(int((~part.isfinite()).sum()) for part in parts)
        if bad:
            raise ValueError(f"{name} holds {bad} NaN or infinite values: no level can be checked on it")


# ---- time ----------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Spread:
    """Milliseconds: 20th percentile, median, 80th percentile."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        """The spread of one or more samples."""
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0])
        quintiles = statistics.quantiles(samples, n=5, method="inclusive")
        return cls(quintiles[0], statistics.median(samples), quintiles[3])


class WallClock:
    """Milliseconds of one call as its caller sees them: host work, launches, and the wait for the
    result. On a GPU the L2 cache is cold: a buffer of twice its size is overwritten before."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        if self.on_gpu:
            l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
            self.flush = torch.empty(2 * l2_bytes, dtype=torch.int8, device=device)

    def __call__(self, call: Callable[[], object]) -> float:
        if self.on_gpu:
            self.flush.zero_()
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if self.on_gpu:
            torch.cuda.synchronize()
        return (time.perf_counter() - start) * 1e3


def warm_up(calls: Sequence[Callable[[], object]], clock: WallClock, seconds: float = WARM_SECONDS) -> None:
    """Run rounds of the calls that do not count, for as many seconds: on a chip that is still cool, each would be
    timed at a clock that the load of the others does not let it keep. A call that takes over a 30th of that, for the
    host's or memory's sake, runs once, and does not count for the seconds. On a CPU nothing happens."""
    end, order, shuffle = time.perf_counter() + seconds, list(calls), random.Random(1).shuffle
    while clock.on_gpu and order:
        shuffle(order)
        for call in list(order):
            if time.perf_counter() > end:
                return
            taken = clock(call) / 1e3
            if taken > seconds / 30:
                order.remove(call)
                end += taken


def balanced_orders(count: int) -> Iterator[list[int]]:
    """Orders of `count` calls, without end and the same at every run, in which each call comes right after each other
    one equally often: once in `count` orders if that is even, twice in twice as many if it is odd. A call finds the
    chip as the one before left it, and after a light one it runs at a higher clock (labs/LOG.md).

    Williams' squares, in shuffled turns: E. J. Williams, "Experimental designs balanced for the estimation of residual
    effects of treatments", Australian Journal of Scientific Research A 2 (1949).
    """
    zigzag = [((i + 1) // 2 if i % 2 else count - i // 2) % count for i in range(count)]
    square = [[(place + shift) % count for place in zigzag] for shift in range(count)]
    if count % 2:
        square += [order[::-1] for order in square]
    shuffle = random.Random(0).shuffle
    while True:
        shuffle(square)
        yield from square or [[]]


def interleave(calls: Sequence[Callable[[], object]], rounds: int, clock: WallClock,
               seconds_each: float) -> Iterator[list[list[float]]]:
    """Time every call once a round, in balanced_orders; after each round yield the milliseconds per call so far.

    The yielded list is the same one each time, so whoever interrupts keeps what was sampled. A call
    whose rounds would take over `seconds_each` skips rounds at an even stride, but is timed in at
    least three (in all, if there are fewer).
    """
    samples: list[list[float]] = [[] for _ in calls]
    strides = [1] * len(calls)
    for i, order in zip(range(rounds), balanced_orders(len(calls)), strict=False):
        for place in order:
            if i % strides[place] == 0:
                samples[place].append(clock(calls[place]))
        if i == 0:
            affordable = [max(3, int(seconds_each * 1e3 / max(first, 1e-3))) for (first,) in samples]
            strides = [max(1, rounds // count) for count in affordable]
        yield samples


def sustain(calls: Sequence[Callable[[], object]], clock: WallClock,
            seconds: float = SUSTAINED_SECONDS) -> Iterator[tuple[int, list[float]]]:
    """Time every call under its own load alone: over and over for `seconds`, of which the first half does not count.
    In order, then in reverse; after each turn yield the call's place and the turn's milliseconds, one at the least.

    In rounds all calls share what power the chip has, and who draws less pays for the others. Here none does.
    """
    for place in [*range(len(calls)), *reversed(range(len(calls)))]:
        start, samples = time.perf_counter(), []
        while (begun := time.perf_counter() - start) < seconds or not samples:
            taken = clock(calls[place])
            if begun >= seconds / 2:
                samples.append(taken)
        yield place, samples


@dataclass(frozen=True)
class Profile:
    """What one call put on the GPU: busy milliseconds (the union of its kernels' and copies' times),
    launches (host calls, see LAUNCH_CALLS), and kernels (name -> (count, milliseconds))."""

    gpu_ms: float
    launches: int
    kernels: dict[str, tuple[int, float]]


def _events(run: Callable[[], object]) -> list:
    """What torch.profiler saw of one run, on the GPU and of the host's calls to it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the profiler's own, about its warm-up
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            run()
            torch.cuda.synchronize()
    return list(profiler.events())


def profile_call(call: Callable[[], object]) -> Profile:
    """Run `call` once under torch.profiler. Needs CUDA."""
    return _profile_of(_events(call))


def profile_together(calls: Sequence[Callable[[], object]], counts: Sequence[int],
                     clock: WallClock) -> list[list[Profile]]:
    """Profile each call as often as `counts` says, in rounds as they are timed, under one profiler: with one for each,
    the chip would cool in the pauses, and whoever comes first would find it hottest. Needs CUDA.

    Raises RuntimeError if a call waits for the whole device: such waits, which `clock` makes before and after each
    call, are how calls are told apart.
    """
    orders = zip(range(max(counts, default=0)), balanced_orders(len(calls)), strict=False)
    turns = [place for done, order in orders for place in order if done < counts[place]]

    def run() -> None:
        for turn in turns:
            clock(calls[turn])

    events = _events(run)
    waits = sorted(event.time_range.end for event in events if event.name == "cudaDeviceSynchronize")
    parts: list[list] = [[] for _ in range(len(waits) + 1)]
    for event in events:
        parts[bisect.bisect(waits, event.time_range.start)].append(event)
    busy = [part for part in parts if any(_is_on_gpu(event) for event in part)]
    if len(busy) != 2 * len(turns):
        raise RuntimeError(f"{len(turns)} calls, each after the L2 cache was overwritten, should be {2 * len(turns)} "
                           f"stretches of work between waits for the GPU, but the profiler saw {len(busy)}: one of the "
                           "calls waits for the whole device, or puts nothing on it")
    found: list[list[Profile]] = [[] for _ in calls]
    for turn, part in zip(turns, busy[1::2], strict=True):
        found[turn].append(_profile_of(part))
    return found


def _is_on_gpu(event: torch.autograd.profiler_util.FunctionEvent) -> bool:
    return event.device_type == torch.autograd.DeviceType.CUDA


def _profile_of(events: list) -> Profile:
    intervals, launches, kernels = [], 0, {}
    for event in events:
        start, end = event.time_range.start, event.time_range.end
        if _is_on_gpu(event):
            intervals.append((start, end))
            count, total = kernels.get(event.name, (0, 0.0))
            kernels[event.name] = (count + 1, total + (end - start) / 1e3)
        elif event.name.startswith(LAUNCH_CALLS):
            launches += 1
    busy, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return Profile(busy / 1e3, launches, kernels)


# ---- counts --------------------------------------------------------------------------------------

def count_host_syncs(call: Callable[[], object]) -> int:
    """How often one call makes the host wait for the GPU. Needs CUDA."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return sum("called a synchronizing" in str(warning.message) for warning in caught)


class PeakMemory:
    """Context manager: `.bytes` is how far allocated GPU memory rose inside it above its start, less
    what `.result` holds (a forward's output is the caller's, not the level's). None on a CPU."""

    def __init__(self, device: torch.device):
        self.device = device
        self.bytes: int | None = None
        self.result: torch.Tensor | None = None

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            gc.collect()  # a graph that a cycle keeps, let go inside, would hide as much of the peak
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self._start = torch.cuda.memory_allocated()
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            output = self.result.nbytes if self.result is not None else 0
            self.bytes = max(0, torch.cuda.max_memory_allocated() - self._start - output)


# ---- the machine ---------------------------------------------------------------------------------

class Ceilings:
    """What the GPU can do at most, for timing in the same rounds as the levels: a chip that is warm for
    them is as warm for its ceilings. `calls` are an 8192^3 matmul in cuBLAS on random data, a copy of 512 MiB, and a
    sum of 1 GiB, which only reads (reader.py: PyTorch's is slower), each repeated so that the launch does not count."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        n, self.repeats = 8192, 4
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        out = torch.empty(n, n, dtype=dtype, device=device)
        memory = torch.rand(2**28, device=device)
        source, target = memory.chunk(2)
        self.flops, self.bytes = 2 * n**3, memory.nbytes
        self.calls = (lambda: self._repeat(lambda: torch.mm(a, b, out=out)),
                      lambda: self._repeat(lambda: target.copy_(source)),
                      lambda: self._repeat(lambda: read_all(memory)))

    def _repeat(self, call: Callable[[], object]) -> None:
        for _ in range(self.repeats):
            call()

    def rates(self, samples: Sequence[Sequence[float]]) -> dict[str, float]:
        """matmul_tflops, copy_tbps (reads and writes counted) and read_tbps from the calls' milliseconds. Of the
        fastest round: a ceiling is the best that the chip did, and a median of it can be beaten."""
        matmul_ms, copy_ms, read_ms = (min(taken) / self.repeats for taken in samples)
        return {"matmul_tflops": self.flops / matmul_ms / 1e9, "copy_tbps": self.bytes / copy_ms / 1e9,
                "read_tbps": self.bytes / read_ms / 1e9}


def environment(device: torch.device) -> dict[str, object]:
    """What the figures were measured on: GPU, versions, commit, date.

    The commit is asked of git. A copy without its history can be told by LAB_COMMIT=<hash>; raises ValueError if
    that is none.
    """
    on_gpu = device.type == "cuda"
    properties = torch.cuda.get_device_properties(device) if on_gpu else None
    commit, dirty = _commit()
    return {
        "gpu": properties.name if on_gpu else f"none ({platform.processor() or platform.machine()} CPU)",
        "sm": f"sm_{properties.major}{properties.minor}" if on_gpu else None,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "driver": _driver() if on_gpu else None,
        "python": platform.python_version(),
        "commit": commit,
        "dirty": dirty,
        "date": datetime.date.today().isoformat(),
    }


def _commit() -> tuple[str, bool | None]:
    given = os.environ.get("LAB_COMMIT")
    if given is not None:
        if not re.fullmatch(r"[0-9a-f]{12,40}", given):
            raise ValueError(f"LAB_COMMIT={given!r}: need 12 or more digits of a commit, as `git rev-parse HEAD` says")
        return given[:12], None
    root = Path(__file__).resolve().parents[1]

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True).stdout

    try:
        return git("rev-parse", "HEAD").strip()[:12], bool(git("status", "--porcelain").strip())
    except (FileNotFoundError, subprocess.CalledProcessError):
        return "unknown", None


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except FileNotFoundError:
        return "unknown"
