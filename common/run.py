"""One workload from start to rows: build, gate, warm, time in interleaved rounds, profile, time each alone."""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from common.config import Workload, flops, least_bytes
from common.level import Loaded, Unsupported
from common.measure import (
    TIE_MARGIN,
    Ceilings, Forward, Gate, PeakMemory, Spread, WallClock, check_finite, count_host_syncs, environment, error_bound,
    gate, interleave, profile_together, sustain, warm_up,
)
from common.model import Oracle, Weights, is_out_of_memory, make_inputs, make_weights, must_fit, oracle
from common.peers import NotInstalled, Peer
from common.references import BOUND, Reference
from common.results import Row, Run, new_run
from common.rounded import broken_rule, rounded_oracle

# No level is timed for longer than this in one run, unless three calls take longer.
SECONDS_EACH = 3.0
PROFILED_CALLS = 9
# A call that takes longer is profiled once, and not sustained: a turn would hold too few.
SLOW_MS = 100
OFF = "rounding is off: under two tiles of rows an expert"
INTERPRETED_FLOPS = 1e9  # of a forward: about a minute of Triton's interpreter


class Reporter(Protocol):
    """Who is told how a run goes: the stage it is in, `long` if it may take seconds, and the run whenever a row of it
    changed."""

    def stage(self, text: str, long: bool = False) -> None: ...

    def update(self, run: Run) -> None: ...


class Interrupted(Exception):
    """Ctrl-C during a run; `run` holds what was measured until then, marked partial."""

    def __init__(self, run: Run):
        super().__init__("interrupted")
        self.run = run


@dataclass
class _Subject:
    """A row being measured, with its forward once that is built and has passed its gate."""

    row: Row
    build: Callable[[], Forward]
    is_layer: bool
    weights: Weights
    forward: Forward | None = None
    interpreted: bool = False
    tie_margin: float = TIE_MARGIN
    alone: bool = True
    rounding_kernels: tuple[str, ...] = ()


def run_workload(workload: Workload, levels: Sequence[Loaded], references: Sequence[Reference | Peer],
                 device: torch.device, rounds: int, reporter: Reporter) -> Run:
    """Measure `levels` and `references` on `workload`, all with the same weights and inputs.

    Raises Interrupted on Ctrl-C, with what was measured; ValueError if an input is not finite, or if weights,
    inputs and oracle do not fit the GPU.
    """
    cfg = workload.config
    with must_fit(cfg.name, cfg, workload.T, workload.dtype):
        reporter.stage("drawing weights and inputs")
        weights = make_weights(cfg, workload.dtype, device, workload.seed)
        batches = [make_inputs(replace(workload, seed=seed), weights)
                   for seed in (workload.seed, workload.seed + 1000)]
        for x_TD in batches:
            check_finite(x_TD, weights)
        reporter.stage("computing the float64 oracle")
        expected = [oracle(cfg, weights, x_TD) for x_TD in batches]
    active_experts = int((expected[0].rows_E > 0).sum())
    run = new_run(workload, rounds, environment(device), active_experts,
                  flops(workload), least_bytes(workload, active_experts))
    x_TD = batches[0].clone()
    subjects = [_level_subject(loaded, variant, workload, weights, device)
                for loaded in levels for variant in loaded.level.variants]
    subjects += [_reference_subject(reference, workload, weights) for reference in references]
    run.rows = [subject.row for subject in subjects]
    try:
        for subject in subjects:
            note = interpreter_note(workload) if subject.interpreted else ""
            reporter.stage(f"{subject.row.name}: building, checking against the oracle{note}", long=bool(note))
            _build_and_gate(subject, workload, x_TD, batches, expected, device)
            reporter.update(run)
        ready = [subject for subject in subjects if subject.forward is not None]
        _time(run, ready, x_TD, device, rounds, reporter)
    except KeyboardInterrupt:
        run.partial = True
        raise Interrupted(run) from None
    return run


def interpreter_note(workload: Workload) -> str:
    """What to say before a level runs in Triton's interpreter: nothing where it is quick."""
    if flops(workload) < INTERPRETED_FLOPS:
        return ""
    return ", in Triton's interpreter, which may take hours at this size: --preset tiny --tokens 64 takes seconds"


def _level_subject(loaded: Loaded, variant: str, workload: Workload, weights: Weights,
                   device: torch.device) -> _Subject:
    level, alone = loaded.level, len(loaded.level.variants) == 1
    name = level.name if alone or variant == "exact" else f"{level.name} {variant}"
    row = Row("level", level.number, name, level.adds, "unsupported", variant)

    def build() -> Forward:
        level.check_supported(device, workload.dtype)
        return loaded.build_variant(workload.config, weights, variant)

    return _Subject(row, build, True, weights, interpreted=level.interpreted(device), alone=alone)


def _reference_subject(reference: Reference | Peer, workload: Workload, weights: Weights) -> _Subject:
    row = Row(reference.kind, None, reference.name, reference.adds, "unsupported",
              version=reference.version if isinstance(reference, Peer) else "")
    return _Subject(row, lambda: reference.build(workload, weights), reference.is_layer, weights,
                    tie_margin=reference.tie_margin)


def _build_and_gate(subject: _Subject, workload: Workload, x_TD: torch.Tensor, batches: list[torch.Tensor],
                    expected: list[Oracle], device: torch.device) -> None:
    """Fill in the row's status, errors, build time and memory; keep the forward if it passed.

    Two batches with different routing, one after the other in x_TD, where the first is left to be timed: a forward that
    froze the first one's cannot pass. On a GPU the second comes after a second call with the first: a graph that is
    captured there is the one that will be timed.
    """
    row = subject.row
    x_TD.copy_(batches[0])
    try:
        with PeakMemory(device) as memory:
            start = time.perf_counter()
            forward = subject.build()
            memory.result = forward(x_TD)
            if device.type == "cuda":
                torch.cuda.synchronize()
            row.build_s = time.perf_counter() - start
        if hasattr(forward, "kernels"):  # a level that chooses by GPU and size says what it chose
            row.reason = f"its kernels: {forward.kernels(workload.T)}"
        row.peak_mib = None if memory.bytes is None else memory.bytes / 2**20
        if subject.is_layer:
            found = _judge(subject, forward, memory.result, batches[0], expected[0], workload)
            if found.ok:
                if device.type == "cuda":
                    forward(x_TD)
                x_TD.copy_(batches[1])
                found = _judge(subject, forward, forward(x_TD), batches[1], expected[1], workload)
            _record_gate(row, found)
        else:
            row.status = "ok"
        memory.result = None
        if row.status == "ok":
            subject.forward = forward
            if subject.interpreted:
                row.status, row.reason = "interpreted", "Triton's interpreter: right, but its time means nothing"
    except NotInstalled as lack:
        row.status, row.reason = "not installed", str(lack)
    except Unsupported as lack:
        row.status, row.reason = "unsupported", str(lack)
    except Exception as error:  # a level that raises is red, its traceback shown; the others still run
        if is_out_of_memory(error):
            _record_oom(row, error)
        else:
            traceback.print_exc()
            row.status, row.reason = "failed", f"{type(error).__name__}: {error}"
    row.error_bound = error_bound(workload) if subject.is_layer else None
    x_TD.copy_(batches[0])
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _judge(subject: _Subject, forward: Forward, out_TD: torch.Tensor, x_TD: torch.Tensor, expected: Oracle,
           workload: Workload) -> Gate:
    """Gate the output; a rounded one by the oracle of its own routing, which itself must follow the rule.

    Where a forward's rounding was off, its row is exact. Raises Unsupported if the level has such a row already, or if
    `gate` cannot judge.
    """
    row, cfg = subject.row, workload.config
    rounding = forward.rounding(workload.T) if row.variant == "rounded" else None
    if rounding is None:
        if row.variant == "rounded":
            if not subject.alone:
                raise Unsupported(OFF)
            row.variant, row.reason = "exact", OFF
        return gate(out_TD, expected, workload, subject.tie_margin)
    subject.rounding_kernels = rounding.kernels
    row.rounding = row.rounding or {"tile": rounding.tile, "mode": rounding.mode, **rounding.report}
    fault = broken_rule(cfg, subject.weights, x_TD, rounding)
    if fault:
        return Gate(float("nan"), float("nan"), error_bound(workload), fault)
    return gate(out_TD, rounded_oracle(cfg, subject.weights, x_TD, rounding), workload)


def _record_oom(row: Row, error: RuntimeError) -> None:
    row.status, row.reason = "oom", str(error).split(". GPU")[0].split("DefaultCPUAllocator: ")[-1].splitlines()[0]


def _record_gate(row: Row, found: Gate) -> None:
    row.rel_err, row.worst_row_err = found.rel_err, found.worst_row_err
    row.status, row.reason = ("ok", row.reason) if found.ok else ("failed", found.reason)


def _time(run: Run, ready: list[_Subject], x_TD: torch.Tensor, device: torch.device, rounds: int,
          reporter: Reporter) -> None:
    """Time and profile every ready subject; rows are filled in as rounds go by."""
    clock = WallClock(device)
    for subject in list(ready):
        reporter.stage(f"{subject.row.name}: warming")
        try:
            _warm(subject, clock, x_TD)
        except RuntimeError as error:  # it fitted alone, but not beside the buffers of the others
            if not is_out_of_memory(error):
                raise
            _record_oom(subject.row, error)
            ready.remove(subject)
        reporter.update(run)
    calls = [lambda forward=subject.forward: forward(x_TD) for subject in ready]
    ceilings = Ceilings(x_TD.dtype, device) if device.type == "cuda" else None
    if ceilings:
        reporter.stage("warming the ceilings")
        for call in ceilings.calls:
            clock(call)
        calls += ceilings.calls
        reporter.stage("warming the chip", long=True)
        warm_up(calls, clock)
    for i, samples in enumerate(interleave(calls, rounds, clock, SECONDS_EACH)):
        for subject, taken in zip(ready, samples, strict=False):
            subject.row.wall_ms, subject.row.samples = Spread.of(taken), len(taken)
            subject.row.rounds_ms = [round(milliseconds, 4) for milliseconds in taken]
        if ceilings:
            run.ceilings = ceilings.rates(samples[len(ready):])
        _derive(run)
        reporter.stage(f"round {i + 1} of {rounds}")
        reporter.update(run)
    if clock.on_gpu:
        reporter.stage("profiling", long=True)
        try:
            _profile(ready, calls[:len(ready)], clock)
        except RuntimeError:  # what was timed stands, without launches and GPU-busy times
            traceback.print_exc()
        reporter.update(run)
    if run.is_arithmetic_bound:
        reporter.stage("each under its own load alone", long=True)
        try:
            _sustain(ready, calls[:len(ready)], clock)
        except RuntimeError:  # out of memory, say: what was timed stands
            traceback.print_exc()
        reporter.update(run)


def _sustain(ready: Sequence[_Subject], calls: Sequence[Callable[[], object]], clock: WallClock) -> None:
    """Fill in sustained_ms, on a chip that rounds have warmed again: the profiler's reading was a pause."""
    fast = [place for place, subject in enumerate(ready) if subject.row.wall_ms.p50 < SLOW_MS]
    rows, calls = [ready[place].row for place in fast], [calls[place] for place in fast]
    warm_up(calls, clock, seconds=1.0)
    found: list[list[float]] = [[] for _ in rows]
    for place, samples in sustain(calls, clock):
        row = rows[place]
        found[place].extend(samples)
        row.sustained_ms = Spread.of(found[place])
        row.sustained_turns_ms.append(round(Spread.of(samples).p50, 4))


def _warm(subject: _Subject, clock: WallClock, x_TD: torch.Tensor) -> None:
    def call() -> torch.Tensor:
        return subject.forward(x_TD)

    clock(call)
    if clock.on_gpu:
        subject.row.host_syncs = count_host_syncs(call)


def _profile(ready: list[_Subject], calls: Sequence[Callable[[], object]], clock: WallClock) -> None:
    counts = [PROFILED_CALLS if subject.row.wall_ms.p50 < SLOW_MS else 1 for subject in ready]
    for subject, profiles in zip(ready, profile_together(calls, counts, clock), strict=True):
        row = subject.row
        row.launches = profiles[-1].launches
        row.gpu_ms = Spread.of([profile.gpu_ms for profile in profiles])
        if row.rounding is not None:
            row.rounding["gpu_us"] = Spread.of([
                sum(ms for name, (_, ms) in profile.kernels.items() if name.startswith(subject.rounding_kernels)) * 1e3
                for profile in profiles]).p50


def _derive(run: Run) -> None:
    """Fill in what follows from the median times: TFLOP/s, share of the roofline, share of the bound."""
    if run.ceilings:
        arithmetic = run.flops / run.ceilings["matmul_tflops"]
        run.roofline_ms = max(arithmetic, run.least_bytes / run.ceilings["copy_tbps"]) / 1e9
    bound = run.row(BOUND)
    routed = run.shape["T"] * run.shape["K"]
    for row in run.rows:
        if not row.timed:
            continue
        changed = row.rounding["rows_added"] - row.rounding["rows_dropped"] if row.rounding else 0
        ms = row.wall_ms.p50 / (1 + changed / routed)  # for T*K rows, whether it computes more or fewer
        row.tflops = run.flops / ms / 1e9
        row.roofline_share = run.roofline_ms / ms if run.roofline_ms else None
        row.bound_share = bound.wall_ms.p50 / ms if bound and bound.timed else None
