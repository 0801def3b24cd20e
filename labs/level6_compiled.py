"""Level 6: compiled. torch.compile fuses what is left between the kernels.

Adds   torch.compile over the whole forward, as one graph, inside the CUDA graph.
Why    around the two GEMMs level 5 still runs PyTorch's kernels one by one. The combine alone writes
       and reads a float32 (T, K, D) product that nobody needs: 14*R*D bytes where 2*R*D are enough.
How    the forward of level 4, unchanged, under fullgraph=True: the compiler writes one kernel for
       gather, scale and sum, and fewer for softmax, top-k and indices, around our Triton kernels
       first call at a T: compile -> capture;  each call: replay, as in level 5
Costs  seconds of compilation at each new T, shown apart. A break in the graph is an error here, not
       a slow path, and a replay has no compiler to call: other routing cannot recompile.
Needs  CUDA.
Run    python labs/level6_compiled.py --preset qwen3-30b-a3b --tokens 16384
Diff   make diff N=6
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from common.config import MoEConfig
from common.level import Claims, Level, main
from common.model import Weights

import triton  # after common.level, which picks Triton's interpreter where there is no GPU
import triton.language as tl

# T tokens, D model width, F expert width, E experts, K top-k, R = T*K routed rows.
# A tensor's suffix is its shape: x_TD is (T, D), gate_up_E2FD is (E, 2F, D).

LEVEL = Level(
    number=6,
    name="compiled",
    adds="torch.compile of the glue, one graph, under the replay",
    changes=("compile_whole", "build"),
    requires=("cuda",),
    claims=Claims(host_syncs=0, max_launches=2),
)

MAX_GRAPHS = 16  # token counts whose graphs are kept; the least recently used goes first
PATIENCE = 100  # calls in a row from another address after which x is read there: captures shall cost little


@triton.jit
def silu_mul_kernel(
    gate_up_ptr,  # (R, 2F) gate columns, then up columns
    hidden_ptr,  # (R, F) same dtype
    F,
    BLOCK_F: tl.constexpr,
):
    """hidden = silu(gate) * up in float32, rounded once.

    Grid (R, cdiv(F, BLOCK_F)): a program owns BLOCK_F columns of one row.
    """
    row = tl.program_id(0).to(tl.int64)  # R * 2F passes 2**31 at real sizes
    column = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = column < F
    gate = tl.load(gate_up_ptr + row * 2 * F + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * 2 * F + F + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(hidden_ptr + row * F + column, gate * tl.sigmoid(gate) * up, mask=inside)


def silu_mul(gate_up_R2F: torch.Tensor) -> torch.Tensor:
    """(R, 2F) gate and up -> (R, F) silu(gate) * up, same dtype."""
    R, two_F = gate_up_R2F.shape
    F = two_F // 2
    hidden_RF = gate_up_R2F.new_empty(R, F)
    if R > 0:
        block_F = min(1024, triton.next_power_of_2(F))
        silu_mul_kernel[(R, triton.cdiv(F, block_F))](gate_up_R2F, hidden_RF, F, BLOCK_F=block_F)
    return hidden_RF


@triton.jit
def grouped_gemm_kernel(
    a_ptr,  # (R, K) rows sorted by expert
    w_ptr,  # (E, N, K)
    out_ptr,  # (R, N)
    offsets_ptr,  # (E + 1,) int32
    E,
    N,
    K,
    E_POW2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[rows of e] = a[rows of e] @ w[e].T for all experts e. Float32 accumulator, one rounding.

    Grid (tiles,): a program owns BLOCK_M rows of one expert by BLOCK_N columns, or nothing. Tiles
    count up along an expert's rows first, so that neighbours read the same weights from L2.
    """
    tile = tl.program_id(0)
    experts = tl.arange(0, E_POW2)
    row_starts = tl.load(offsets_ptr + experts, mask=experts < E, other=0)
    row_ends = tl.load(offsets_ptr + experts + 1, mask=experts < E, other=0)
    tiles = tl.cdiv(row_ends - row_starts, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    tile_ends = tl.cumsum(tiles, 0)
    if tile >= tl.sum(tiles, 0):
        return
    expert = tl.sum((tile_ends <= tile).to(tl.int32), 0)
    tile_in_expert = tile - tl.sum(tl.where(experts < expert, tiles, 0), 0)
    row_start = tl.load(offsets_ptr + expert)
    row_end = tl.load(offsets_ptr + expert + 1)
    row_tiles = tl.cdiv(row_end - row_start, BLOCK_M)
    row = row_start + tile_in_expert % row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_in_expert // row_tiles * BLOCK_N + tl.arange(0, BLOCK_N)

    # Past the edge, load the last row or column again: cheaper than a mask, and never stored.
    row_offset = tl.minimum(row, row_end - 1).to(tl.int64) * K  # R * K passes 2**31 at real sizes
    column_offset = expert.to(tl.int64) * N * K + tl.minimum(column, N - 1) * K
    depth = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + row_offset[:, None] + depth[None, :]
    w_ptrs = w_ptr + column_offset[None, :] + depth[:, None]
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        a = tl.load(a_ptrs + k, mask=depth[None, :] < K - k, other=0.0)
        w = tl.load(w_ptrs + k, mask=depth[:, None] < K - k, other=0.0)
        accumulator = tl.dot(a, w, accumulator, input_precision="ieee")
    out_ptrs = out_ptr + row.to(tl.int64)[:, None] * N + column[None, :]
    tl.store(out_ptrs, accumulator, mask=(row < row_end)[:, None] & (column < N)[None, :])


class Tile(NamedTuple):
    """What one program of the grouped GEMM computes at a time, and with what."""

    block_M: int
    block_N: int
    block_K: int
    warps: int
    stages: int


def choose_tile(rows_per_expert: float, itemsize: int, shared_memory: int) -> Tile:
    """The tile for so many mean rows an expert: rows past an expert's end are work thrown away, but a
    tile of more rows reads fewer weights a row. The largest needs more shared memory, in bytes, than
    consumer GPUs have. Picked from seven or eight 16-bit tiles timed at each load on an H200, mostly on
    qwen3-30b-a3b: few large experts would want 32 rows. The float32 tiles and the last are not timed."""
    if itemsize == 4:
        return Tile(16 if rows_per_expert <= 16 else 64, 64, 32, warps=4, stages=2)
    if rows_per_expert <= 16:
        return Tile(16, 64, 128, warps=4, stages=4)
    if rows_per_expert <= 64:
        return Tile(64, 128, 64, warps=4, stages=4)
    if shared_memory >= 160 * 1024:
        return Tile(128, 256, 64, warps=8, stages=3)
    return Tile(128, 128, 32, warps=8, stages=3)


def grouped_gemm(
    a_RK: torch.Tensor, w_ENK: torch.Tensor, offsets_E1: torch.Tensor, shared_memory: int
) -> torch.Tensor:
    """(R, K) rows sorted by expert times each row's own expert of (E, N, K) -> (R, N), same dtype."""
    (R, K), (E, N, _) = a_RK.shape, w_ENK.shape
    out_RN = a_RK.new_empty(R, N)
    if R > 0:
        tile = choose_tile(R / E, a_RK.element_size(), shared_memory)
        most_row_tiles = triton.cdiv(R, tile.block_M) + min(E, R)
        grouped_gemm_kernel[(most_row_tiles * triton.cdiv(N, tile.block_N),)](
            a_RK, w_ENK, out_RN, offsets_E1, E, N, K,
            E_POW2=triton.next_power_of_2(E),
            BLOCK_M=tile.block_M, BLOCK_N=tile.block_N, BLOCK_K=tile.block_K,
            num_warps=tile.warps, num_stages=tile.stages,
        )
    return out_RN


def shared_memory_bytes(device: torch.device) -> int:
    """Shared memory that one program may use; 0 on a CPU, where the interpreter has none."""
    if device.type != "cuda":
        return 0
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def router_logits(x_TD: torch.Tensor, router_ED: torch.Tensor) -> torch.Tensor:
    """(T, E) float32 logits. Logits rounded to bfloat16 would pick other experts on near ties."""
    if x_TD.is_cuda and x_TD.dtype != torch.float32:
        return torch.mm(x_TD, router_ED.T, out_dtype=torch.float32)
    return x_TD.float() @ router_ED.T.float()


def route(x_TD: torch.Tensor, router_ED: torch.Tensor, cfg: MoEConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Each token's K experts: scores_TK float32 and expert_ids_TK int64, best first."""
    logits_TE = router_logits(x_TD, router_ED)
    if cfg.scoring == "softmax_topk":
        scores_TK, expert_ids_TK = logits_TE.softmax(dim=1).topk(cfg.K, dim=1)
    else:
        top_logits_TK, expert_ids_TK = logits_TE.topk(cfg.K, dim=1)
        scores_TK = top_logits_TK.softmax(dim=1)
    if cfg.renormalize:
        scores_TK = scores_TK / scores_TK.sum(dim=1, keepdim=True)
    return scores_TK, expert_ids_TK


# index array       shape     from -> to
# expert_ids_TK     (T, K)    token, slot -> expert
# slot_of_row_R     (R,)      sorted row -> t * K + k, the slot it came from
# offsets_E1        (E + 1,)  expert -> its first sorted row; the last entry is R
# row_of_slot_TK    (T, K)    token, slot -> sorted row, the inverse of slot_of_row_R


def dispatch(
    x_TD: torch.Tensor, expert_ids_TK: torch.Tensor, E: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sort the routed rows by expert, ties in token order: x_RD (R, D), offsets_E1 int32, row_of_slot_TK int64."""
    K = expert_ids_TK.shape[1]
    # The radix sort passes over its keys once a byte: 16-bit keys take a quarter of int64's passes.
    key = torch.int16 if E < 2**15 else torch.int32
    sorted_ids_R, slot_of_row_R = expert_ids_TK.flatten().to(key).sort(stable=True)
    x_RD = x_TD[slot_of_row_R // K]  # first, so that the GPU has work while the host launches the rest
    bounds_E1 = torch.arange(E + 1, dtype=key, device=x_TD.device)
    offsets_E1 = torch.searchsorted(sorted_ids_R, bounds_E1, out_int32=True)
    rows_R = torch.arange(slot_of_row_R.numel(), device=x_TD.device)
    row_of_slot_TK = torch.empty_like(expert_ids_TK)
    row_of_slot_TK.view(-1).scatter_(0, slot_of_row_R, rows_R)
    return x_RD, offsets_E1, row_of_slot_TK


def experts(
    x_RD: torch.Tensor, offsets_E1: torch.Tensor, weights: Weights, shared_memory: int
) -> torch.Tensor:
    """Sorted rows through their experts: (R, D) -> (R, D)."""
    gate_up_R2F = grouped_gemm(x_RD, weights.gate_up_E2FD, offsets_E1, shared_memory)
    return grouped_gemm(silu_mul(gate_up_R2F), weights.down_EDF, offsets_E1, shared_memory)


def combine(y_RD: torch.Tensor, row_of_slot_TK: torch.Tensor, scores_TK: torch.Tensor) -> torch.Tensor:
    """Gather each token's K rows and sum them, weighted by score in float32: (R, D) -> (T, D)."""
    return (y_RD[row_of_slot_TK] * scores_TK[:, :, None]).sum(dim=1).to(y_RD.dtype)


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


def compile_whole(forward: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """`forward` compiled without graph breaks, once for each T that it is called with.

    `Replay` bounds how many T are kept. PyTorch's own bound counts all compilations of a function,
    those of other layers and of T long dropped among them, so it is lifted here.
    """
    compiled = torch.compile(forward, fullgraph=True, dynamic=False)

    def call(x_TD: torch.Tensor) -> torch.Tensor:
        with torch._dynamo.config.patch(recompile_limit=2**16, accumulated_recompile_limit=2**16):
            return compiled(x_TD)

    return call


def build(cfg: MoEConfig, weights: Weights) -> Callable[[torch.Tensor], torch.Tensor]:
    """A forward x_TD -> out_TD, (T, D) in the weights' dtype, T >= 0. Raises ValueError on misfit weights."""
    weights.check(cfg)
    shared_memory = shared_memory_bytes(weights.device)

    def forward(x_TD: torch.Tensor) -> torch.Tensor:
        scores_TK, expert_ids_TK = route(x_TD, weights.router_ED, cfg)
        x_RD, offsets_E1, row_of_slot_TK = dispatch(x_TD, expert_ids_TK, cfg.E)
        y_RD = experts(x_RD, offsets_E1, weights, shared_memory)
        return combine(y_RD, row_of_slot_TK, scores_TK)

    return Replay(compile_whole(forward), weights)


if __name__ == "__main__":
    main(LEVEL)
