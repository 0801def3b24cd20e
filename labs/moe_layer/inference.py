"""Inference on a GPU: the layer's forward recorded once for a token count, replayed into the same buffers.

First call at a T: run it on the side, so that kernels compile, then capture. Each call: copy x into the captured input,
one replay, the captured output. The output is the graph's own buffer: the next call at that T overwrites it.

What is recorded is level 8, unless experts have a capacity: its experts behind the layer's own router, or, where that
is the plain one (softmax and top-k) and no statistics are asked for, the whole of it, whose router is a kernel too.
Level 8 keeps gate_up a second time, in its own order; level 9's forward would write what only a backward needs.
"""

from __future__ import annotations

import gc
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import torch

from common.config import MoEConfig
from common.model import Weights
from labs import level8_tma_overlap
from labs.kernels import decode
from labs.kernels.backward_sort import sort_rows
from labs.kernels.choice import Choice, Chooser
from labs.kernels.launch import sm_count
from labs.kernels.routing import Routing, list_work
from labs.kernels.tiles import interleave_gate_up
from labs.moe_layer.statistics import Loads

# T tokens, D model width, F expert width, E experts, K top-k, R = T*K rows.

MAX_GRAPHS = 16  # one a token count; the least recently used goes first

Forward = Callable[[torch.Tensor], tuple[torch.Tensor, Loads | None]]  # x_TD -> out_TD, and what stats() is to tell
RoutedForward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def build_ladder_layer(cfg: MoEConfig, weights: Weights) -> Callable[[torch.Tensor], torch.Tensor]:
    """Level 8's layer, router included, without its own graphs: x_TD -> out_TD."""
    built = level8_tma_overlap.build(cfg, weights)
    return lambda x_TD: built.forward(x_TD)[0]


def build_ladder_experts(gate_up_E2FD: torch.Tensor, down_EDF: torch.Tensor) -> RoutedForward:
    """Level 8's experts behind any router: (x_TD, scores_TK, expert_ids_TK) -> out_TD, without gradients.

    The weights, as Experts has them, and x in bfloat16 or float16; scores float32; ids int32 or int64 in 0..E-1, no
    expert twice in a row of them. D and F are multiples of 8, E at most 512.
    """
    E, D, F = down_EDF.shape
    packed = Weights(down_EDF.new_empty(0), interleave_gate_up(gate_up_E2FD), down_EDF)  # the router stays outside
    choose = Chooser(D, F, E, down_EDF.dtype, down_EDF.device)

    def run(x_TD: torch.Tensor, scores_TK: torch.Tensor, expert_ids_TK: torch.Tensor, choice: Choice) -> torch.Tensor:
        offsets_E1, token_of_row_R, row_of_slot_TK = sort_rows(expert_ids_TK, E)
        R, work_W4 = expert_ids_TK.numel(), offsets_E1.new_empty(0, 4)
        if choice.kernels == "few_rows":
            work_W4 = list_work(offsets_E1, R, decode.tiles_for(R, D, F, E, sm_count(x_TD.device)).row_tile)
        routed = Routing(expert_ids_TK, scores_TK, offsets_E1, token_of_row_R, row_of_slot_TK, work_W4)
        rows = level8_tma_overlap.dispatch(x_TD, row_of_slot_TK, choice)
        return level8_tma_overlap.experts_combined(rows, routed, packed, choice)

    def forward(x_TD: torch.Tensor, scores_TK: torch.Tensor, expert_ids_TK: torch.Tensor) -> torch.Tensor:
        routed = x_TD, scores_TK, expert_ids_TK
        return run(*routed, choose(expert_ids_TK.numel(), lambda tried: run(*routed, tried)))

    return forward


def version(tensor: torch.Tensor) -> int:
    """How often a tensor was written to; 0 for one made in inference mode, which does not count."""
    return 0 if tensor.is_inference() else tensor._version


class Replay(NamedTuple):
    """A captured forward, its input and what it returned."""

    graph: torch.cuda.CUDAGraph
    x_TD: torch.Tensor
    found: tuple[torch.Tensor, Loads | None]


class GraphedForward:
    """`forward(x_TD)` under CUDA graphs, for weights that stand still: if one is written to or replaced, everything
    recorded is thrown away and made again.

    make_forward() gives the forward to record for the weights as they are.
    """

    def __init__(self, make_forward: Callable[[], Forward], weights: Callable[[], list[torch.Tensor]]):
        self.make_forward, self.weights = make_forward, weights
        self._forget()

    def _forget(self) -> None:
        self.state: tuple | None = None
        self.forward: Forward | None = None
        self.replays: OrderedDict[int, Replay] = OrderedDict()

    def __deepcopy__(self, memo: dict) -> None:
        return None  # a graph cannot be copied; the copied layer makes its own

    @torch.inference_mode(False)  # buffers made in inference mode could not be written to outside of it
    @torch.no_grad()
    def __call__(self, x_TD: torch.Tensor) -> tuple[torch.Tensor, Loads | None]:
        """x_TD (T, D), T >= 1, on the weights' GPU -> what the forward returns, in the graph's own buffers."""
        T = x_TD.shape[0]
        state = tuple((tensor.data_ptr(), version(tensor)) for tensor in self.weights())
        if state != self.state:
            self._forget()
            self.state, self.forward = state, self.make_forward()
        if T not in self.replays:
            self.replays[T] = self._capture(x_TD)
            if len(self.replays) > MAX_GRAPHS:
                self.replays.popitem(last=False)
        self.replays.move_to_end(T)
        replay = self.replays[T]
        replay.x_TD.copy_(x_TD)
        replay.graph.replay()
        return replay.found

    def _capture(self, x_TD: torch.Tensor) -> Replay:
        own_x_TD = x_TD.detach().clone(memory_format=torch.contiguous_format)
        side = torch.cuda.Stream(x_TD.device)
        side.wait_stream(torch.cuda.current_stream(x_TD.device))
        with torch.cuda.stream(side):
            for _ in range(2):
                self.forward(own_x_TD)
        torch.cuda.current_stream(x_TD.device).wait_stream(side)
        gc.collect()  # a graph of another layer that a cycle keeps, let go in between, would end the capture
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = self.forward(own_x_TD)
        return Replay(graph, own_x_TD, found)
