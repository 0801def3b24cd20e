"""How a level is gated and timed (common/measure.py): python -m pytest tests/test_measure.py"""

from __future__ import annotations

import itertools
import time
import types
from collections import Counter

import pytest
import torch

from common import measure
from common.config import Workload, preset
from common.measure import (
    Ceilings,
    Spread,
    WallClock,
    balanced_orders,
    gate,
    interleave,
    profile_call,
    profile_together,
    sustain,
    warm_up,
)
from common.model import make_inputs, make_weights, oracle
from common.reader import BLOCK, PROGRAMS_EACH, read_all

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def test_a_wider_tie_margin_forgives_only_ties():
    cfg = preset("tiny")
    weights = make_weights(cfg, torch.float32, DEVICE)
    workload = Workload(cfg, 400, torch.float32)
    x_TD = make_inputs(workload, weights)
    expected = oracle(cfg, weights, x_TD)
    out_TD = expected.out_TD.float()
    close = int(expected.margin_T.argmin())
    clear = int(expected.margin_T.argmax())
    out_TD[close] *= 2
    assert expected.margin_T[close] < 0.05
    assert not gate(out_TD, expected, workload).ok
    assert gate(out_TD, expected, workload, tie_margin=0.05).ok
    out_TD[clear] *= 2
    assert not gate(out_TD, expected, workload, tie_margin=0.05).ok


def test_spread_is_the_percentiles():
    assert Spread.of([5.0]) == Spread(5.0, 5.0, 5.0)
    assert Spread.of([float(i) for i in range(101)]) == Spread(20.0, 50.0, 80.0)


def test_rounds_interleave_and_slow_calls_skip_evenly():
    order: list[str] = []

    def clock(call):
        order.append(call)
        return 1000.0 if call == "slow" else 1.0

    *_, samples = interleave(["fast", "slow"], rounds=9, clock=clock, seconds_each=2.0)
    assert [len(taken) for taken in samples] == [9, 3]
    assert order.count("slow") == 3
    fast_until = [order[:i].count("fast") for i, name in enumerate(order) if name == "slow"]
    assert [(fast + 1) // 3 for fast in fast_until] == [0, 1, 2], "in the first round, the fourth, the seventh"


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 7, 8, 9, 14])
def test_each_call_comes_after_each_other_one_equally_often(count):
    """It would run on a chip that is warmer, or cooler, than its rivals do."""
    turns = max(1, count if count % 2 == 0 else 2 * count)
    for cycle in range(2):
        orders = list(itertools.islice(balanced_orders(count), cycle * turns, (cycle + 1) * turns))
        assert all(sorted(order) == list(range(count)) for order in orders)
        pairs = Counter(pair for order in orders for pair in itertools.pairwise(order))
        assert len(pairs) == count * (count - 1)
        assert set(pairs.values()) <= {1 + count % 2}
    once, again = (list(itertools.islice(balanced_orders(count), 3 * turns)) for _ in range(2))
    assert once == again, "the same orders at every run"


def test_rounds_follow_the_balanced_orders():
    ran: list[str] = []
    *_, samples = interleave("abcd", rounds=20, clock=lambda call: ran.append(call) or 1.0, seconds_each=1.0)
    assert [len(taken) for taken in samples] == [20] * 4
    expected = itertools.islice(balanced_orders(4), 20)
    assert ran == ["abcd"[place] for order in expected for place in order]


def test_the_chip_is_warmed_by_rounds_of_all_calls():
    ran: list[str] = []

    class Clock:
        on_gpu = True

        def __call__(self, call):
            ran.append(call)
            return 1e4 if call == "slow" else 0.0

    warm_up(["slow"], Clock(), 0.05)
    assert ran == ["slow"]
    ran.clear()
    warm_up("abc", Clock(), 0.05)
    assert len(ran) > 30
    assert all(sorted(ran[i:i + 3]) == list("abc") for i in range(0, len(ran) // 3 * 3, 3))
    ran.clear()
    Clock.on_gpu = False
    warm_up("abc", Clock(), 5.0)
    assert ran == []


def test_what_is_sustained_follows_its_like_and_does_not_count_at_first(monkeypatch):
    now, ran = [0.0], []

    def clock(call):
        ran.append(call)
        now[0] += 0.25 if call == "fast" else 2.0
        return len(ran)

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    turns = list(sustain(["fast", "slow"], clock, seconds=1.0))
    assert ran == ["fast"] * 4 + ["slow"] * 2 + ["slow"] * 2 + ["fast"] * 4
    assert turns == [(0, [3, 4]), (1, [6]), (1, [8]), (0, [11, 12])], (
        "of a second, what began in its second half; of one that takes longer, what came after its first")
    assert measure.SUSTAINED_SECONDS / 2 >= 0.2, "half of it is for the times to settle"


def test_reading_reads_all_of_it():
    units = torch.cuda.get_device_properties(DEVICE).multi_processor_count if DEVICE.type == "cuda" else 1
    x = torch.arange(units * PROGRAMS_EACH * BLOCK * 2 + 17, device=DEVICE).remainder(7).float()
    assert read_all(x).double().sum().item() == x.double().sum().item()


@pytest.mark.parametrize("own_wait", [False, True])
def test_what_each_of_several_profiled_calls_did(own_wait, monkeypatch):
    """On events as the profiler gives them: each call of two kernels of its own length, L2 overwritten before it."""
    events, now = [], 0.0

    def event(name: str, length: float, on_gpu: bool = False) -> None:
        nonlocal now
        kind = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
        events.append(types.SimpleNamespace(name=name, device_type=kind,
                                            time_range=types.SimpleNamespace(start=now, end=now + length)))
        now += length

    class Clock:
        on_gpu = False

        def __call__(self, call):
            event("overwrite", 30.0, on_gpu=True)
            event("cudaDeviceSynchronize", 1.0)
            for _ in range(2):
                event("cudaLaunchKernel", 2.0)
                event(call, float(len(call)), on_gpu=True)
                if own_wait:
                    event("cudaDeviceSynchronize", 1.0)
            event("cudaDeviceSynchronize", 1.0)

    def seen(run):
        event("cudaDeviceSynchronize", 1.0)  # the profiler's own
        run()
        event("cudaDeviceSynchronize", 1.0)
        return events

    monkeypatch.setattr(measure, "_events", seen)
    calls = ["a", "bb" * 50, "c" * 1000]
    if own_wait:
        with pytest.raises(RuntimeError, match="one of the calls waits for the whole device"):
            profile_together(calls, [3, 3, 1], Clock())
        return
    found = profile_together(calls, [3, 3, 1], Clock())
    assert [len(profiles) for profiles in found] == [3, 3, 1]
    for call, profiles in zip(calls, found, strict=True):
        for profile in profiles:
            assert profile.launches == 2
            assert profile.kernels == {call: (2, pytest.approx(2 * len(call) / 1e3))}
            assert profile.gpu_ms == pytest.approx(2 * len(call) / 1e3)


@pytest.mark.gpu
@pytest.mark.alone
def test_calls_profiled_together_are_told_apart():
    x = torch.randn(4096, 4096, device=DEVICE)

    def call():
        for _ in range(7):
            torch.mm(x, x)

    def other():
        torch.add(x, x)

    alone, ((once,), (first, second)) = profile_call(call), profile_together([other, call], [1, 2], WallClock(DEVICE))
    assert once.launches == sum(count for count, _ in once.kernels.values()) == 1
    for found in (alone, first, second):
        assert found.launches == sum(count for count, _ in found.kernels.values()) == 7
        assert 0.5 < found.gpu_ms / alone.gpu_ms < 2


@pytest.mark.gpu
@pytest.mark.alone
def test_ceilings_are_below_the_datasheet():
    """An H200 lists 989 TFLOP/s and 4.8 TB/s; no card may measure more than its own list."""
    ceilings, clock = Ceilings(torch.bfloat16, DEVICE), WallClock(DEVICE)
    rates = ceilings.rates([[clock(call) for _ in range(5)] for call in ceilings.calls])
    assert 10 < rates["matmul_tflops"] < 2500
    assert 0.1 < rates["copy_tbps"] < 8
    assert 0.8 < rates["read_tbps"] / rates["copy_tbps"] < 1.3, "who only reads never turns the bus around"
    if "H200" in torch.cuda.get_device_name():
        assert rates["matmul_tflops"] < 989
        assert max(rates["copy_tbps"], rates["read_tbps"]) < 4.8
