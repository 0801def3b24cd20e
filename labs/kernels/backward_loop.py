"""One loop for the grouped GEMMs of a mixture that trains: rows times their experts' weights, whatever comes after.

    rows       gathered by token through pointers (16-byte cp.async), or sorted already: by pointers or TMA
    weights    (E, N, K), (E, K, N) or gate and up together; TMA in boxes that end with the expert, or pointers
    results    from registers, masked: a tile that reaches past its expert's rows stores only its expert's

One program an SM; it owns every grid-th output tile. The loop over tiles and the one over K are made one (flatten), so
that the pipeliner issues the loads of a tile while the one before it is multiplied and stored. Experts may start at any
row.

    index array     shape     from -> to
    offsets_E1      (E + 1,)  expert -> its first row; the last entry: rows in use, <= R
    token_of_row_R  (R,)      row -> token
    tiles_X5        (X, 5)    row tile -> expert, first row, rows in use, first tile and size of its group
"""

from __future__ import annotations

import torch

from labs.kernels.choice import capability
from labs.kernels.launch import sm_count
from labs.kernels.plain_gemm import TILES, PlainTile, find_tile

import triton  # after common.level, which launch imports: it picks Triton's interpreter where there is no GPU
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

# T tokens, D model width, F expert width, E experts, R rows: T*K routed ones, or the most that rounding may give.
# In kernels M, N and K are the GEMM tile's axes.


# ---- operands: (BLOCK_M, BLOCK_K) of rows, (BLOCK_K, BLOCK_N) of weights ------------------------------------------
@triton.jit
def tma_gate_up(weights, expert, column, k, N, K, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Gate rows then up rows of (2E, F, D), half a tile each, transposed: boxes 2 x BLOCK_N / 2 x BLOCK_K."""
    return weights.load([2 * expert, column, k]).reshape(BLOCK_N, BLOCK_K).T


@triton.jit
def pointer_gate_up(weights, expert, column, k, N, K, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """As tma_gate_up; past F the last row again, never stored."""
    i = tl.arange(0, BLOCK_N)
    half: tl.constexpr = BLOCK_N // 2
    row = expert * 2 * N + i // half * N + tl.minimum(column + i % half, N - 1)
    depth = k + tl.arange(0, BLOCK_K)
    pointers = weights + (row.to(tl.int64) * K)[None, :] + depth[:, None]
    return tl.load(pointers, mask=(depth < K)[:, None], other=0.0)


@triton.jit
def tma_transposed(weights, expert, column, k, N, K, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Of weights (E, N, K): boxes 1 x BLOCK_N x BLOCK_K."""
    return weights.load([expert, column, k]).reshape(BLOCK_N, BLOCK_K).T


@triton.jit
def pointer_transposed(weights, expert, column, k, N, K, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Of weights (E, N, K); past N the last row again, never stored."""
    row = expert * N + tl.minimum(column + tl.arange(0, BLOCK_N), N - 1)
    depth = k + tl.arange(0, BLOCK_K)
    pointers = weights + (row.to(tl.int64) * K)[None, :] + depth[:, None]
    return tl.load(pointers, mask=(depth < K)[:, None], other=0.0)


@triton.jit
def tma_straight(weights, expert, column, k, N, K, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Of weights (E, K, N): boxes 1 x BLOCK_K x BLOCK_N."""
    return weights.load([expert, k, column]).reshape(BLOCK_K, BLOCK_N)


@triton.jit
def pointer_straight(weights, expert, column, k, N, K, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Of weights (E, K, N); zeros past the edges."""
    columns = column + tl.arange(0, BLOCK_N)
    depth = k + tl.arange(0, BLOCK_K)
    row = expert.to(tl.int64) * K + depth
    return tl.load(weights + row[:, None] * N + columns[None, :], mask=(depth < K)[:, None] & (columns < N)[None, :],
                   other=0.0)


@triton.jit
def multiply_tiles(rows, index_ptr, weights, N, K, offsets_ptr, tiles_ptr, tile_count_ptr, out,
                   read: tl.constexpr, load_weights: tl.constexpr, finish: tl.constexpr, COLUMNS: tl.constexpr,
                   BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """rows times their experts' weights, every grid-th tile; `finish` gets each tile's float32 accumulator.

    COLUMNS: the columns of N that a tile covers. read: how rows come. "gathered": by pointers through index_ptr,
    token_of_row. "pointers" or "tma": rows that are sorted already; index_ptr is not read.
    """
    column_tiles = tl.cdiv(N, COLUMNS)
    depth = tl.arange(0, BLOCK_K)
    for tile in tl.range(tl.program_id(0), tl.load(tile_count_ptr) * column_tiles, tl.num_programs(0), flatten=True):
        expert, first_row, row_end, column_tile = find_tile(offsets_ptr, tiles_ptr, tile, column_tiles)
        row = first_row + tl.arange(0, BLOCK_M)
        # Past the expert's end, load its last row again: cheaper than a mask, and never stored.
        source = tl.minimum(row, row_end - 1)
        if read == "gathered":
            source = tl.load(index_ptr + source)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in range(0, K, BLOCK_K):
            if read == "tma":
                a = rows.load([first_row, k])
            else:
                pointers = rows + (source.to(tl.int64) * K)[:, None] + depth[None, :]  # passes 2**31 at real sizes
                a = tl.load(pointers + k, mask=(depth < K - k)[None, :], other=0.0)
            w = load_weights(weights, expert, column_tile * COLUMNS, k, N, K, BLOCK_N, BLOCK_K)
            acc = tl.dot(a, w, acc, input_precision="ieee")
        finish(out, acc, row, row_end, column_tile, N)


@triton.jit
def halves(tile):
    """The left and the right half of a tile's columns: they lie in the same threads."""
    M: tl.constexpr = tile.shape[0]
    N: tl.constexpr = tile.shape[1]
    return tile.reshape(M, 2, N // 2).permute(0, 2, 1).split()


@triton.jit
def eighths(tile):
    """A tile's columns in eight parts, in order."""
    left, right = halves(tile)
    quarters = halves(left) + halves(right)
    return halves(quarters[0]) + halves(quarters[1]) + halves(quarters[2]) + halves(quarters[3])


@triton.jit
def store_tile(out_ptr, values, row, row_end, column, end, width):
    """Store those of the tile's rows that are its expert's, and its columns before `end`, of rows `width` long."""
    columns = column + tl.arange(0, values.shape[1])
    pointers = out_ptr + (row.to(tl.int64) * width)[:, None] + columns[None, :]
    tl.store(pointers, values.to(out_ptr.dtype.element_ty), mask=(row < row_end)[:, None] & (columns < end)[None, :])


# ---- tiles --------------------------------------------------------------------------------------------------------
SMALL = PlainTile(64, 64, 32, warps=4, stages=2, tma=False)  # float32 anywhere, and all in the interpreter


def tile_for(device: torch.device, dtype: torch.dtype) -> PlainTile:
    """The tile of the kernels here and in backward_weights.py. Raises Unsupported for a GPU that has none."""
    if device.type != "cuda" or dtype.itemsize != 2:
        return SMALL
    return TILES[capability(device)]


def programs(tiles: int, device: torch.device) -> int:
    """Persistent programs for so many output tiles at most: one an SM, none without a tile."""
    return min(sm_count(device), tiles)


def describe(matrix: torch.Tensor, box: list[int], tile: PlainTile) -> TensorDescriptor | torch.Tensor:
    """What the kernel gets for a contiguous operand: a TMA descriptor in boxes of this shape, or the tensor."""
    return TensorDescriptor.from_tensor(matrix, box) if tile.tma else matrix


def blocks(tile: PlainTile) -> dict[str, int]:
    """The tile as a launch takes it."""
    return dict(BLOCK_M=tile.block_M, BLOCK_N=tile.block_N, BLOCK_K=tile.block_K, num_warps=tile.warps,
                num_stages=tile.stages)
