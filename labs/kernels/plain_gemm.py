"""Grouped GEMMs of a SwiGLU MoE layer in plain Triton: for GPUs without wgmma, and to run in the interpreter.

    x (T, D) --gather--> [up, SwiGLU] --> hidden (R, F) --> [down] --> y (R, D)

One program an SM; it walks through the output tiles with its number, its number + grid, ... Triton's pipeliner plays
the producer: it issues the loads of the K steps ahead, over the end of a tile into the next (the loop is flattened).

    rows      pointers, 16-byte cp.async: gathered through token_of_row in up, contiguous in down
    weights   sm_90: TMA. sm_80, 86, 89, 120: pointers too
    results   from registers, masked: a tile that reaches past its expert's rows stores only its expert's

    index array     shape     from -> to
    offsets_E1      (E + 1,)  expert -> its first row; the last entry: rows in use, <= R
    token_of_row_R  (R,)      row -> token
    tiles_X5        (X, 5)    row tile -> expert, first row, rows in use, first tile and size of its group (tiles.py)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from labs.kernels.launch import launch
from labs.kernels.tiles import TilePlan, check, check_gemm

# T tokens, D model width, F expert width, E experts, K top-k, R routed rows. A tensor's suffix is its shape: x_TD is
# (T, D). In kernels M, N and K are the GEMM tile's axes.


@triton.jit
def tma_weights(weights_desc, row, k, last_row, K, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """(BLOCK_K, BLOCK_N) weights from a tensor descriptor of boxes BLOCK_N x BLOCK_K; zeros past the edges."""
    return weights_desc.load([row, k]).T


@triton.jit
def pointer_weights(weights_ptr, row, k, last_row, K, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """(BLOCK_K, BLOCK_N) weights by pointers; past the edge the last row again, never stored, and zeros along K."""
    rows = tl.minimum(row + tl.arange(0, BLOCK_N), last_row).to(tl.int64)  # E * 2F * D passes 2**31 at real sizes
    depth = k + tl.arange(0, BLOCK_K)
    return tl.load(weights_ptr + (rows * K)[None, :] + depth[:, None], mask=(depth < K)[:, None], other=0.0)


@triton.jit
def find_tile(offsets_ptr, tiles_ptr, tile, column_tiles):
    """Output tile -> (expert, first row, the expert's end, column tile). Row tiles run fastest within a group."""
    entry = tiles_ptr + tile // column_tiles * 5
    group_first = tl.load(entry + 3)
    group_size = tl.load(entry + 4)
    local = tile - group_first * column_tiles
    entry = tiles_ptr + (group_first + local % group_size) * 5
    expert = tl.load(entry)
    return expert, tl.load(entry + 1), tl.load(offsets_ptr + expert + 1), local // group_size


@triton.jit
def multiply(a_ptr, a_rows, weights, weight_row, last_weight_row, K, load_weights: tl.constexpr,
             BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """a[a_rows] @ weights[weight_row...].T, a float32 (BLOCK_M, BLOCK_N) accumulator over all of K."""
    depth = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + (a_rows.to(tl.int64) * K)[:, None] + depth[None, :]  # rows * K passes 2**31 at real sizes
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        a = tl.load(a_ptrs + k, mask=(depth < K - k)[None, :], other=0.0)
        w = load_weights(weights, weight_row, k, last_weight_row, K, BLOCK_N, BLOCK_K)
        accumulator = tl.dot(a, w, accumulator, input_precision="ieee")
    return accumulator


@triton.jit
def store_tile(out_ptr, values, row, row_end, column, width):
    """Store those of the tile's rows that are its expert's, and those of its columns that exist."""
    columns = column + tl.arange(0, values.shape[1])
    pointers = out_ptr + (row.to(tl.int64) * width)[:, None] + columns[None, :]
    tl.store(pointers, values.to(out_ptr.dtype.element_ty), mask=(row < row_end)[:, None] & (columns < width)[None, :])


@triton.jit
def plain_up_kernel(
    x_ptr,  # (T, D)
    token_of_row_ptr,  # (R,) int32
    weights,  # (E * 2F, D) same dtype, gate and up rows interleaved by 8: a descriptor or a pointer
    hidden_ptr,  # (R, F) same dtype
    offsets_ptr,  # (E + 1,) int32
    tiles_ptr,  # (X, 5) int32
    tile_count_ptr,  # (1,) int32
    E,
    D8,
    F8,
    load_weights: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """hidden = silu(x[token] @ gate.T) * (x[token] @ up.T), gather and SwiGLU fused. D8 and F8 are D / 8 and F / 8.

    Grid (SMs,): a program owns every grid-th tile of BLOCK_M rows by BLOCK_N / 2 hidden columns. Float32 accumulator.
    """
    D = D8 * 8  # so the compiler knows that no 16-byte copy straddles a row's end
    F = F8 * 8
    column_tiles = tl.cdiv(2 * F, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tl.load(tile_count_ptr) * column_tiles, tl.num_programs(0), flatten=True):
        expert, first_row, row_end, column = find_tile(offsets_ptr, tiles_ptr, tile, column_tiles)
        row = first_row + tl.arange(0, BLOCK_M)
        # Past the expert's end, load its last row again: cheaper than a mask, and never stored.
        token = tl.load(token_of_row_ptr + tl.minimum(row, row_end - 1))
        acc = multiply(x_ptr, token, weights, expert * 2 * F + column * BLOCK_N, E * 2 * F - 1, D, load_weights,
                       BLOCK_M, BLOCK_N, BLOCK_K)
        gate, up = acc.reshape(BLOCK_M, BLOCK_N // 16, 2, 8).permute(0, 1, 3, 2).split()
        hidden = (gate * tl.sigmoid(gate) * up).reshape(BLOCK_M, BLOCK_N // 2)
        store_tile(hidden_ptr, hidden, row, row_end, column * (BLOCK_N // 2), F)


@triton.jit
def plain_down_kernel(
    hidden_ptr,  # (R, F)
    weights,  # (E * D, F) same dtype: a descriptor or a pointer
    y_ptr,  # (R, D) same dtype
    offsets_ptr,  # (E + 1,) int32
    tiles_ptr,  # (X, 5) int32
    tile_count_ptr,  # (1,) int32
    E,
    D8,
    F8,
    load_weights: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y = hidden @ down.T. D8 and F8 are D / 8 and F / 8.

    Grid (SMs,): a program owns every grid-th tile of BLOCK_M rows by BLOCK_N columns. Float32 accumulator.
    """
    D = D8 * 8
    F = F8 * 8  # so the compiler knows that no 16-byte copy straddles a row's end
    column_tiles = tl.cdiv(D, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tl.load(tile_count_ptr) * column_tiles, tl.num_programs(0), flatten=True):
        expert, first_row, row_end, column = find_tile(offsets_ptr, tiles_ptr, tile, column_tiles)
        row = first_row + tl.arange(0, BLOCK_M)
        acc = multiply(hidden_ptr, tl.minimum(row, row_end - 1), weights, expert * D + column * BLOCK_N, E * D - 1, F,
                       load_weights, BLOCK_M, BLOCK_N, BLOCK_K)
        store_tile(y_ptr, acc, row, row_end, column * BLOCK_N, D)


class PlainTile(NamedTuple):
    """What a program computes at a time, and with what. `tma`: weights by TMA, else by pointers."""

    block_M: int
    block_N: int
    block_K: int
    warps: int
    stages: int
    tma: bool


HOPPER = PlainTile(128, 256, 64, warps=8, stages=3, tma=True)
AMPERE = PlainTile(128, 128, 64, warps=8, stages=4, tma=False)  # 128 of 163 KB of shared memory
CONSUMER = PlainTile(128, 128, 32, warps=8, stages=4, tma=False)  # 80 of 99 KB
TILES = {80: AMPERE, 86: CONSUMER, 89: CONSUMER, 90: HOPPER, 120: CONSUMER}


def tile_for(sm: int) -> PlainTile:
    """The tile for a compute capability, 90 for 9.0. Raises ValueError where none has been compiled and read."""
    if sm not in TILES:
        raise ValueError(f"sm_{sm}: no tile for it, only for sm_{', sm_'.join(map(str, TILES))}")
    return TILES[sm]


def weights_and_loader(weights: torch.Tensor, tile: PlainTile) -> tuple:
    """(E, N, K) weights as the kernel takes them, and the function in it that loads them."""
    if not tile.tma:
        return weights, pointer_weights
    return TensorDescriptor.from_tensor(weights.flatten(0, 1), [tile.block_N, tile.block_K]), tma_weights


def plain_up(
    x_TD: torch.Tensor,
    token_of_row_R: torch.Tensor,
    offsets_E1: torch.Tensor,
    gate_up_E2FD: torch.Tensor,
    plan: TilePlan,
    hidden_RF: torch.Tensor,
    programs: int,
    tile: PlainTile,
) -> None:
    """hidden_RF = SwiGLU of the rows' tokens through their experts' interleaved gate_up_E2FD; other rows keep theirs.

    x_TD, gate_up_E2FD and hidden_RF of one dtype, index arrays int32, all contiguous; plan in tiles of tile.block_M
    rows; programs: the GPU's SMs. Raises ValueError for other shapes, dtypes or plans, and unless D and F are
    multiples of 8.
    """
    (E, two_F, D), R = gate_up_E2FD.shape, token_of_row_R.numel()
    F = two_F // 2
    check_gemm(E, D, F, plan, tile.block_M)
    check("x_TD", x_TD, (x_TD.shape[0], D), gate_up_E2FD.dtype)
    check("token_of_row_R", token_of_row_R, (R,), torch.int32)
    check("offsets_E1", offsets_E1, (E + 1,), torch.int32)
    check("gate_up_E2FD", gate_up_E2FD, (E, 2 * F, D), x_TD.dtype)
    check("hidden_RF", hidden_RF, (R, F), x_TD.dtype)
    if R > 0:
        weights, load_weights = weights_and_loader(gate_up_E2FD, tile)
        launch(plain_up_kernel, (programs,),
            x_TD, token_of_row_R, weights, hidden_RF, offsets_E1, plan.tiles_X5, plan.tile_count,
            E, D // 8, F // 8, load_weights=load_weights,
            BLOCK_M=tile.block_M, BLOCK_N=tile.block_N, BLOCK_K=tile.block_K,
            num_warps=tile.warps, num_stages=tile.stages,
        )


def plain_down(
    hidden_RF: torch.Tensor,
    offsets_E1: torch.Tensor,
    down_EDF: torch.Tensor,
    plan: TilePlan,
    y_RD: torch.Tensor,
    programs: int,
    tile: PlainTile,
) -> None:
    """y_RD = hidden_RF through their experts' down_EDF; rows of no expert keep what they hold.

    hidden_RF, down_EDF and y_RD of one dtype, offsets_E1 int32, all contiguous; plan and programs as for plain_up.
    Raises ValueError for other shapes, dtypes or plans, and unless D and F are multiples of 8.
    """
    (E, D, F), R = down_EDF.shape, hidden_RF.shape[0]
    check_gemm(E, D, F, plan, tile.block_M)
    check("hidden_RF", hidden_RF, (R, F), down_EDF.dtype)
    check("offsets_E1", offsets_E1, (E + 1,), torch.int32)
    check("down_EDF", down_EDF, (E, D, F), hidden_RF.dtype)
    check("y_RD", y_RD, (R, D), hidden_RF.dtype)
    if R > 0:
        weights, load_weights = weights_and_loader(down_EDF, tile)
        launch(plain_down_kernel, (programs,),
            hidden_RF, weights, y_RD, offsets_E1, plan.tiles_X5, plan.tile_count, E, D // 8, F // 8,
            load_weights=load_weights, BLOCK_M=tile.block_M, BLOCK_N=tile.block_N, BLOCK_K=tile.block_K,
            num_warps=tile.warps, num_stages=tile.stages,
        )
