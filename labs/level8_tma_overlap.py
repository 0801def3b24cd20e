"""Level 8: TMA overlap. Kernels at the limit of the chip.

Adds   persistent, warp-specialised grouped GEMMs fed by TMA, with gather, SwiGLU and combine fused in; router, top-k
       and sort in one to three launches.
Why    level 7 still writes and reads 3*R*F values between its GEMMs, sorts in eight launches, and its GEMMs wait for
       their own loads: one set of warps issues a load, waits, multiplies, and stops to store.
How    kernels in labs/kernels, one job a file, chosen by mean rows an expert and widths (labs/kernels/choice.py):
           producer, 1 or 4   | claim a tile; TMA weights, TMA or cp.async rows -> ring of 4 stages of 48 KB
           consumer warps 0-3 | wait full[s] -> wgmma 64x256x64 -> arrive empty[s]; beside: finish the tile before
           consumer warps 4-7 | the same for the tile's other 64 rows
           spare warps, 2     | down: sum the columns done before; up of wide experts: copy the next tiles' rows
       Stores go straight from registers: by TMA they need a buffer, whose memory a fourth stage uses better.
       Few rows an expert: weights take wgmma's tall side, each read once. Row tiles of an expert are neighbours in
       time, so its weights are read from memory once and shared in L2. down may begin beside up's last tiles.
Costs  gate and up rows interleaved, repacked once in build: hold that copy instead of the canonical one.
       D and F are multiples of 8, E at most 512, bfloat16 or float16.
Needs  CUDA. sm_90 for TMA and warp roles; sm_80, 86, 89 and 120 run pipelined kernels with cp.async, and say so.
Run    python labs/level8_tma_overlap.py --preset qwen3-30b-a3b --tokens 16384
Diff   make diff N=8
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from common.config import MoEConfig
from common.level import Claims, Level, Unsupported, main
from common.model import Weights
from common.rounded import Rounding
from labs.kernels import ops
from labs.kernels.choice import Choice, Chooser
from labs.kernels.launch import compile_together
from labs.kernels.rounding import Plan, Rounded, combine_rounded, describe, plan_rounding, round_tokens
from labs.kernels.routing import MOST_EXPERTS, Routing, new_arrivals, scores_sum_to_one
from labs.kernels.tiles import interleave_gate_up

# T tokens, D model width, F expert width, E experts, K top-k, R = T*K routed rows.
# A tensor's suffix is its shape: x_TD is (T, D), gate_up_E2FD is (E, 2F, D).

LEVEL = Level(
    number=8,
    name="tma_overlap",
    adds="persistent, warp-specialised kernels fed by TMA; routing in one to three launches",
    changes=(
        "silu_mul_kernel", "silu_mul", "grouped_gemm_kernel", "Tile", "choose_tile", "grouped_gemm",
        "shared_memory_bytes", "compile_whole", "GATHERED_BEFORE", "route", "dispatch", "experts",
        "combine", "experts_combined", "layer", "layer_rounded", "ChosenReplay", "repack", "build",
    ),
    requires=("cuda", "16-bit"),
    variants=("exact", "rounded"),
    claims=Claims(host_syncs=0, max_launches=2),
)

TILES = (64, 128, 256)  # row tiles to round to: a warpgroup's share of the GEMM's tile, a whole one, or two

# Kernels that want their rows gathered before.
GATHERED_BEFORE = ("spread", "tall")

MAX_GRAPHS = 16  # token counts whose graphs are kept; the least recently used goes first
PATIENCE = 100  # calls in a row from another address after which x is read there: captures shall cost little


def router_logits(x_TD: torch.Tensor, router_ED: torch.Tensor) -> torch.Tensor:
    """(T, E) float32 logits. Logits rounded to bfloat16 would pick other experts on near ties."""
    if x_TD.is_cuda and x_TD.dtype != torch.float32:
        return torch.mm(x_TD, router_ED.T, out_dtype=torch.float32)
    return x_TD.float() @ router_ED.T.float()


# index array       shape     from -> to
# expert_ids_TK     (T, K)    token, slot -> expert
# token_of_row_R    (R,)      sorted row -> token
# offsets_E1        (E + 1,)  expert -> its first sorted row; the last entry is R
# row_of_slot_TK    (T, K)    token, slot -> sorted row
# work_W4           (W, 4)    row tile -> its expert, first row, end row, first row tile; for few rows an expert


def route(
    x_TD: torch.Tensor, router_ED: torch.Tensor, arrivals_A: torch.Tensor, cfg: MoEConfig, choice: Choice
) -> Routing:
    """Each token's K experts and scores, and all index arrays, in one to three launches. No sort: a slot's rank
    among its expert's rows is counted."""
    return Routing(*ops.route(x_TD, router_ED, arrivals_A, cfg.K, cfg.F, scores_sum_to_one(cfg), choice.kernels))


def dispatch(x_TD: torch.Tensor, row_of_slot_TK: torch.Tensor, choice: Choice) -> torch.Tensor:
    """Rows for the experts: x itself where their loads gather, else (R, D) sorted, each token read once."""
    return ops.spread(x_TD, row_of_slot_TK) if choice.kernels in GATHERED_BEFORE else x_TD


def experts(
    rows: torch.Tensor,
    token_of_row_R: torch.Tensor,
    offsets_E1: torch.Tensor,
    work_W4: torch.Tensor,
    weights: Weights,
    choice: Choice,
) -> torch.Tensor:
    """Sorted rows through their experts: (R, D). `weights` are those of `repack`."""
    return ops.experts(rows, token_of_row_R, offsets_E1, work_W4, weights.gate_up_E2FD, weights.down_EDF,
                       *ops.fields(choice))


def experts_combined(rows: torch.Tensor, routed: Routing, weights: Weights, choice: Choice) -> torch.Tensor:
    """`experts`, and each token's K rows summed, weighted by score in float32: (T, D). At many rows an expert most of
    the sum runs beside the down projection, a band of columns behind."""
    return ops.experts_combined(rows, routed.token_of_row_R, routed.offsets_E1, routed.work_W4, weights.gate_up_E2FD,
                                weights.down_EDF, routed.row_of_slot_TK, routed.scores_TK, *ops.fields(choice))


def layer(
    x_TD: torch.Tensor, weights: Weights, cfg: MoEConfig, arrivals_A: torch.Tensor, choice: Choice
) -> torch.Tensor:
    """The layer with exact top-k, (T, D) -> (T, D). `weights` are those of `repack`.

    Calls that share arrivals_A (of labs/kernels/routing.py) must not overlap.
    """
    routed = route(x_TD, weights.router_ED, arrivals_A, cfg, choice)
    rows = dispatch(x_TD, routed.row_of_slot_TK, choice)
    return experts_combined(rows, routed, weights, choice)


def route_rounded(x_TD: torch.Tensor, router_ED: torch.Tensor, cfg: MoEConfig, plan: Plan) -> Rounded:
    """Each expert's tokens in whole tiles, with their scores, in place of each token's K experts. Its index arrays
    are in labs/kernels/rounding.py; C rows is the most that the plan can give."""
    probs_TE = router_logits(x_TD, router_ED).softmax(dim=1)
    expert_ids_TK = probs_TE.topk(cfg.K, dim=1).indices
    return round_tokens(probs_TE, expert_ids_TK, plan)


def layer_rounded(
    x_TD: torch.Tensor, weights: Weights, cfg: MoEConfig, plan: Plan, choice: Choice
) -> tuple[torch.Tensor, Rounded]:
    """The layer with rounded routing, (T, D) -> (T, D), and that routing. A token without expert is zeros."""
    rounded = route_rounded(x_TD, weights.router_ED, cfg, plan)
    token_of_row_C, offsets_E1 = rounded.token_of_row_C, rounded.offsets_E1
    rows = x_TD[token_of_row_C] if choice.kernels in GATHERED_BEFORE else x_TD
    no_work = offsets_E1.new_empty(0, 4)
    y_CD = experts(rows, token_of_row_C, offsets_E1, no_work, weights, choice)
    return combine_rounded(y_CD, rounded, plan), rounded


class Replay:
    """`forward` behind CUDA graphs, which share their memory: its result is valid until the next call at any T.

    A graph reads x at one address: a T's first graph in a buffer of our own, to which x is copied. Two calls
    in a row from one address bring a second graph, which reads x where it lies; another address takes its
    place after PATIENCE calls in a row. Raises ValueError if x is not (T, D) in the dtype and on the device
    of the weights: a copy into the captured input would convert it without a word.
    """

    def __init__(self, forward: Callable[[torch.Tensor], torch.Tensor], weights: Weights):
        self.forward, self.like = forward, weights.router_ED
        self.graphs: OrderedDict[int, tuple] = OrderedDict()  # T -> graph, its output, its own input
        self.in_place: dict[int, tuple] = {}  # T -> graph, its output, the address where it reads
        self.met: dict[int, tuple[int, int]] = {}  # T -> the last address, how often it came in a row
        self.pool = torch.cuda.graph_pool_handle()  # graphs never run at once, so they share memory
        self.stream = torch.cuda.Stream(self.like.device)  # to capture on; the current GPU may be another

    def __call__(self, x_TD: torch.Tensor) -> torch.Tensor:
        D, dtype, device = self.like.shape[1], self.like.dtype, self.like.device
        if x_TD.dim() != 2 or x_TD.shape[1] != D or x_TD.dtype != dtype or x_TD.device != device:
            raise ValueError(f"x is {tuple(x_TD.shape)} {x_TD.dtype} on {x_TD.device}: "
                             f"this forward was built for (T, {D}) {dtype} on {device}")
        T = x_TD.shape[0]
        if T == 0:
            return torch.empty_like(x_TD)
        if T not in self.graphs:
            self.graphs[T] = self.capture(x_TD, copied=True)
            if len(self.graphs) > MAX_GRAPHS:
                self.in_place.pop(self.graphs.popitem(last=False)[0], None)
        self.graphs.move_to_end(T)
        address = x_TD.data_ptr() if x_TD.is_contiguous() and x_TD.data_ptr() % 16 == 0 else 0  # 0: unreadable
        last, times = self.met.get(T, (0, 0))
        self.met[T] = address, times + 1 if address == last else 1
        graph, out_TD, place = self.in_place.get(T, (None, None, -1))
        if address not in (0, place) and self.met[T][1] >= (2 if place < 0 else PATIENCE):
            graph, out_TD, place = self.in_place[T] = *self.capture(x_TD, copied=False)[:2], address
        if address != place:
            graph, out_TD, own_x_TD = self.graphs[T]
            own_x_TD.copy_(x_TD.detach())
        graph.replay()
        return out_TD

    @torch.inference_mode(False)  # buffers made in inference mode could not be written to outside of it
    @torch.no_grad()
    def capture(self, x_TD: torch.Tensor, copied: bool) -> tuple[torch.cuda.CUDAGraph, torch.Tensor, torch.Tensor]:
        """Record `forward`, reading x there or, if `copied`, in a buffer of our own: graph, output, input. `forward` is
        run before where it may compile: for a T's first graph, and for a tensor of inference mode."""
        x_TD = x_TD.clone(memory_format=torch.contiguous_format) if copied else x_TD.detach()
        if copied or x_TD.is_inference():
            self.stream.wait_stream(torch.cuda.current_stream(x_TD.device))
            with torch.cuda.stream(self.stream):
                self.forward(x_TD)
            torch.cuda.current_stream(x_TD.device).wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            out_TD = self.forward(x_TD)
        return graph, out_TD, x_TD


class RoundedReplay(Replay):
    """A Replay of a forward that also returns its rounded routing, or None where top-k is exact: that stays where the
    graph has written it, for `rounding` to tell."""

    def __init__(self, forward: Callable, weights: Weights, plan: Callable[[int], Plan]):
        super().__init__(forward, weights)
        self.plan = plan
        self.rounded: dict[int, Rounded | None] = {}

    def __call__(self, x_TD: torch.Tensor) -> torch.Tensor:
        """As Replay's, with the routing put aside."""
        found, T = super().__call__(x_TD), x_TD.shape[0]
        out_TD, rounded = found if T else (found, None)
        if T not in self.rounded:
            self.rounded = {kept: self.rounded[kept] for kept in self.graphs if kept in self.rounded}
        self.rounded[T] = rounded
        return out_TD

    def rounding(self, T: int) -> Rounding | None:
        """How the last call with T tokens was rounded; None if it was exact. Waits for the GPU."""
        rounded = self.rounded.get(T)
        return None if rounded is None else describe(rounded, self.plan(T))


class ChosenReplay(RoundedReplay):
    """A RoundedReplay that also tells which kernels run the experts."""

    def __init__(self, forward: Callable, weights: Weights, plan: Callable[[int], Plan], kernels: Callable[[int], str]):
        super().__init__(forward, weights, plan)
        self.kernels = kernels


def repack(cfg: MoEConfig, weights: Weights) -> Weights:
    """The weights with gate and up rows interleaved, a copy of gate_up. Raises Unsupported for what the kernels
    cannot take, ValueError on misfit weights."""
    weights.check(cfg)
    if cfg.D % 8 or cfg.F % 8:
        raise Unsupported(f"needs D and F in multiples of 8, these are {cfg.D} and {cfg.F}")
    if cfg.E > MOST_EXPERTS:
        raise Unsupported(f"needs E of at most {MOST_EXPERTS}, this is {cfg.E}")
    if weights.router_ED.dtype not in (torch.bfloat16, torch.float16):
        raise Unsupported("needs bfloat16 or float16")
    return Weights(weights.router_ED, interleave_gate_up(weights.gate_up_E2FD), weights.down_EDF)


def build(
    cfg: MoEConfig, weights: Weights, variant: str = "exact", tile: int = 128, mode: str = "nearest"
) -> ChosenReplay:
    """A forward x_TD -> out_TD, (T, D) in the weights' dtype, T >= 0: with exact top-k, or rounded to `tile` rows by
    `mode` (nearest, up, down, balance).

    Raises ValueError on misfit weights or another variant, tile or mode, Unsupported for sizes, dtypes or GPUs that
    the kernels do not take.
    """
    if variant not in LEVEL.variants:
        raise ValueError(f"variant={variant!r}: choose one of {', '.join(LEVEL.variants)}")
    if tile not in TILES:
        raise ValueError(f"tile={tile}: choose one of {', '.join(map(str, TILES))}, whole shares of the GEMM's tiles")
    plan_rounding(cfg, 0, tile, mode, least_tiles=0)  # so that an unknown mode is named now
    choose = Chooser(cfg.D, cfg.F, cfg.E, weights.router_ED.dtype, weights.device)
    packed, arrivals_A = repack(cfg, weights), new_arrivals(weights.device)

    def plan(T: int) -> Plan:
        return plan_rounding(cfg, T, tile, mode if variant == "rounded" else "exact")

    def forward(x_TD: torch.Tensor) -> tuple[torch.Tensor, Rounded | None]:
        planned = plan(x_TD.shape[0])  # warns where rounding would change too much, and is then exact
        choice = choose(planned.capacity, lambda tried: layer(x_TD, packed, cfg, arrivals_A, tried))
        if planned.mode == "exact":
            run = partial(layer, x_TD, packed, cfg, arrivals_A, choice)
            if x_TD.is_cuda and not torch.cuda.is_current_stream_capturing():
                compile_together(run)
            return run(), None
        return layer_rounded(x_TD, packed, cfg, planned, choice)

    return ChosenReplay(forward, weights, plan, lambda T: str(choose(plan(T).capacity)))


if __name__ == "__main__":
    main(LEVEL)
