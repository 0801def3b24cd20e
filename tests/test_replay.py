"""Levels 5 to 8 and the layer behind CUDA graphs: which graph answers, with graphs that record and replay on a CPU.

The real ones run in tests/test_claims.py, on a GPU.
"""

from __future__ import annotations

import contextlib
import random
from types import SimpleNamespace

import pytest
import torch

from common.model import Weights
from labs.moe_layer.inference import MAX_COUNTS, GraphedForward
from tests.cases import LEVELS

D = 16


class Graph:
    """Records what `forward` does while it is captured, and does it again to the same memory."""

    capturing: Graph | None = None

    def __init__(self):
        self.steps: list = []

    def replay(self) -> None:
        for step in self.steps:
            step()


class Forward:
    """x -> 2 * x + 1, counting its runs, in and out of captures."""

    def __init__(self):
        self.run, self.captured = 0, 0

    def __call__(self, x_TD: torch.Tensor) -> torch.Tensor:
        out_TD = 2 * x_TD + 1
        if Graph.capturing is None:
            self.run += 1
            return out_TD
        self.captured += 1
        out_TD.fill_(torch.nan)  # a capture computes nothing
        Graph.capturing.steps.append(lambda: out_TD.copy_(2 * x_TD + 1))
        return out_TD


@pytest.fixture
def stand_ins(monkeypatch):
    @contextlib.contextmanager
    def capture(graph, pool, stream):
        Graph.capturing = graph
        yield
        Graph.capturing = None

    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, stand_in in {"CUDAGraph": Graph, "graph": capture, "graph_pool_handle": lambda: None,
                           "Stream": lambda device: stream, "current_stream": lambda device: stream,
                           "stream": lambda stream: contextlib.nullcontext()}.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)


@pytest.fixture(params=[5, 6, 7, 8], ids=lambda number: f"level{number}")
def module(request, stand_ins):
    return LEVELS[request.param].module


@pytest.fixture
def forward() -> Forward:
    return Forward()


@pytest.fixture
def replay(module, forward):
    return module.Replay(forward, Weights(torch.empty(4, D), torch.empty(4, 8, D), torch.empty(4, D, 4)))


def fresh(T: int = 6) -> torch.Tensor:
    return torch.randn(T, D)


def check(replay, x_TD: torch.Tensor) -> None:
    kept_TD = x_TD.clone()
    assert torch.equal(replay(x_TD), 2 * kept_TD + 1)
    assert torch.equal(x_TD, kept_TD), "nobody writes to a caller's x"


def test_the_second_call_in_a_row_reads_x_where_it_lies(replay, forward):
    x_TD = fresh()
    for _ in range(4):
        check(replay, x_TD)
        x_TD.normal_()
    assert replay.in_place[6][2] == x_TD.data_ptr()
    assert (forward.run, forward.captured) == (1, 2)
    check(replay, fresh())
    check(replay, x_TD)
    assert forward.captured == 2


def test_what_kernels_cannot_read_is_copied(replay):
    wide_TD = torch.randn(6, 2 * D)
    odd_TD = torch.randn(6 * D + 1)[1:].view(6, D)
    whole_TD = wide_TD.view(-1)[:6 * D].view(6, D)
    for x_TD in (wide_TD[:, :D], odd_TD, whole_TD, wide_TD[:, :D], wide_TD[:, :D], odd_TD):
        for _ in range(3):
            check(replay, x_TD)
    assert replay.in_place[6][2] == whole_TD.data_ptr() == wide_TD.data_ptr()


@pytest.mark.parametrize(("counts", "addresses"), [(1, 17), (4, 6), (8, 3), (16, 2)])
def test_changing_addresses_bring_no_storm_of_captures(replay, forward, module, counts, addresses):
    rng = random.Random(0)
    inputs = [[fresh(T) for _ in range(addresses)] for T in range(1, counts + 1)]
    for _ in range(2000):
        check(replay, rng.choice(rng.choice(inputs)))
    assert forward.captured <= 2 * counts
    assert forward.run == counts
    assert len(replay.graphs) == counts >= len(replay.in_place)


def test_an_address_that_stays_takes_over(replay, forward, module):
    first_TD, second_TD = fresh(), fresh()
    for x_TD, calls, captured in ((first_TD, 3, 2), (second_TD, module.PATIENCE - 1, 2), (second_TD, 2, 3),
                                  (first_TD, 3, 3), (second_TD, 3, 3)):
        for _ in range(calls):
            check(replay, x_TD)
        assert forward.captured == captured
    assert replay.in_place[6][2] == second_TD.data_ptr()


def test_graphs_of_old_token_counts_go(replay, module):
    for T in range(1, module.MAX_GRAPHS + 4):
        x_TD = fresh(T)
        for _ in range(3):
            check(replay, x_TD)
    assert list(replay.graphs) == list(replay.in_place) == list(range(4, module.MAX_GRAPHS + 4))
    check(replay, fresh(1))


def test_a_tensor_of_inference_mode_may_compile_before_it_is_captured(replay, forward):
    check(replay, fresh())
    with torch.inference_mode():
        x_TD = fresh()
        for _ in range(3):
            check(replay, x_TD)
    assert (forward.run, forward.captured) == (2, 2)


def test_inference_mode_is_left_and_entered(replay):
    x_TD = fresh().requires_grad_()
    for inference in (True, False, True, False):
        with torch.inference_mode(inference):
            out_TD = replay(fresh() if inference else x_TD)
            assert not out_TD.requires_grad
    assert replay(fresh(0)).shape == (0, D)


def test_rounding_tells_of_the_last_call(monkeypatch, stand_ins, forward):
    """Whichever graph answered; level 7's and 8's graphs return their routing too."""
    for number in (7, 8):
        module = LEVELS[number].module
        monkeypatch.setattr(module.Replay, "__call__", lambda self, x_TD: (x_TD, x_TD.sum().item()))
        monkeypatch.setattr(module, "describe", lambda rounded, plan: (rounded, plan))
        weights = Weights(torch.empty(4, D), torch.empty(4, 8, D), torch.empty(4, D, 4))
        replay = module.RoundedReplay(forward, weights, lambda T: T)
        for x_TD in (fresh(), fresh(3), fresh()):
            replay(x_TD)
            assert replay.rounding(len(x_TD)) == (x_TD.sum().item(), len(x_TD))
        assert replay.rounding(5) is None


def test_the_layer_has_graphs_of_its_own_for_each_count_and_state_of_the_weights(stand_ins, forward):
    weight, made = torch.ones(1), []
    graphed = GraphedForward(lambda: made.append(weight.item()) or forward, lambda: [weight])
    inputs = {T: fresh(T) for T in range(1, MAX_COUNTS + 1)}
    for x_TD in inputs.values():
        for _ in range(3):
            check(graphed, x_TD)
    assert (made, forward.run, forward.captured) == ([1.0], MAX_COUNTS, 2 * MAX_COUNTS)
    assert [list(replay.in_place) for replay in graphed.replays.values()] == [[T] for T in inputs]
    check(graphed, fresh(MAX_COUNTS + 1))
    assert list(graphed.replays) == list(range(2, MAX_COUNTS + 2))
    weight.add_(1)
    check(graphed, inputs[3])
    assert made == [1.0, 2.0]
    assert list(graphed.replays) == [3]


def test_a_forward_that_could_not_be_made_is_made_at_the_next_call(stand_ins, forward):
    """Also if the weights are then those of the calls before."""
    weights, fail = [torch.ones(1)], []

    def make():
        if fail:
            raise torch.OutOfMemoryError(fail.pop())
        return forward

    graphed, old = GraphedForward(make, lambda: weights), weights[0]
    check(graphed, fresh())
    weights[0] = torch.zeros(1)
    fail.append("no room")
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        graphed(fresh())
    weights[0] = old
    check(graphed, fresh())


def test_layers_that_go_do_not_end_a_capture(stand_ins, forward, monkeypatch):
    """A graph that only a cycle keeps is collected before, not during: CUDA forbids to destroy one then."""
    at = []
    monkeypatch.setattr("gc.collect", lambda: at.append((Graph.capturing, forward.captured)))
    graphed = GraphedForward(lambda: forward, lambda: [])
    x_TD = fresh()
    for _ in range(2):
        graphed(x_TD)
    assert at == [(None, 0), (None, 1)]
