"""Inference on a GPU: the layer's forward recorded once for a token count, replayed into the same buffers.

A token count's graphs are those of level 8's Replay: the first call runs the forward on the side, so that kernels
compile, then captures it. Each call copies x into the captured input, unless it comes from where the last one came, for
which there is a graph that reads it there; then one replay. The output is a graph's own buffer: the next call at that T
overwrites it.

What is recorded is level 8, unless experts have a capacity: its experts behind the layer's own router, or, where that
is the plain one (softmax and top-k) and no statistics are asked for, the whole of it, whose router is a kernel too.
Level 8 keeps gate_up a second time, in its own order; level 9's forward would write what only a backward needs.
"""

from __future__ import annotations

import gc
from collections import OrderedDict
from collections.abc import Callable

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

MAX_COUNTS = 16  # token counts that have graphs; the least recently used goes first

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


class OneCount(level8_tma_overlap.Replay):
    """Level 8's graphs for one token count, in memory that no other count's graphs write to."""

    def __init__(self, forward: Forward, x_TD: torch.Tensor):
        like_0D = x_TD.new_empty(0, x_TD.shape[1])
        super().__init__(forward, Weights(like_0D, like_0D, like_0D))

    def capture(self, x_TD: torch.Tensor, copied: bool) -> tuple[torch.cuda.CUDAGraph, tuple, torch.Tensor]:
        """As level 8's. A model has many layers, whose graphs may be kept by cycles."""
        gc.collect()  # another layer's graph, let go in between, would end the capture
        return super().capture(x_TD, copied)


class GraphedForward:
    """`forward(x_TD)` under CUDA graphs, for weights that stand still: if one is written to or replaced, everything
    recorded is thrown away and made again.

    make_forward() gives the forward to record for the weights as they are.
    """

    def __init__(self, make_forward: Callable[[], Forward], weights: Callable[[], list[torch.Tensor]]):
        self.make_forward, self.weights = make_forward, weights
        self.state: tuple | None = None
        self.forward: Forward | None = None
        self.replays: OrderedDict[int, OneCount] = OrderedDict()

    def __deepcopy__(self, memo: dict) -> None:
        return None  # a graph cannot be copied; the copied layer makes its own

    def __call__(self, x_TD: torch.Tensor) -> tuple[torch.Tensor, Loads | None]:
        """x_TD (T, D), T >= 1, on the weights' GPU -> what the forward returns, in a graph's own buffers."""
        T = x_TD.shape[0]
        state = tuple((tensor.data_ptr(), version(tensor)) for tensor in self.weights())
        if state != self.state:
            self._begin(state)
        if T not in self.replays:
            self.replays[T] = OneCount(self.forward, x_TD)
            if len(self.replays) > MAX_COUNTS:
                self.replays.popitem(last=False)
        self.replays.move_to_end(T)
        return self.replays[T](x_TD)

    @torch.inference_mode(False)  # what a forward keeps, made in inference mode, could not be written to outside of it
    @torch.no_grad()
    def _begin(self, state: tuple) -> None:
        self.state = self.forward = None  # so that a forward that could not be made is tried again
        self.replays.clear()  # the memory that the old ones hold goes first
        self.forward = self.make_forward()
        self.state = state
