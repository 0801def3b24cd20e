"""Weight gradients of a SwiGLU mixture: grouped GEMMs whose reduction runs over an expert's rows. Plain Triton.

    dW2 (E, D, F)  = dO gathered.T @ A'       dW1 (E, 2F, D) = dH.T @ x gathered

For every GPU and dtype but bf16 on Hopper, where weight_gemm.py is faster. One kernel makes both: one operand is
gathered by token as it is loaded, the other sorted. The gathered one is always the narrow side of the tile, M, because
its rows come by cp.async; dW1's tile is transposed as it is stored.

    gathered   pointers, 16-byte cp.async; the rows' tokens are loaded a step before their rows
    sorted     TMA where the tile says so, else pointers
    results    from registers, masked; added to a float32 buffer where asked (main_grad)

An expert without rows gets zeros. Rows past an expert's end are multiplied by zeros: a NaN or an infinity in one
expert's gradient may therefore reach the weight gradients of the experts whose last block of rows goes on into it,
those without rows included. No atomics.

    index array     shape     from -> to
    offsets_E1      (E + 1,)  expert -> its first row; the last entry: rows in use, <= R
    token_of_row_R  (R,)      row -> token
    row_of_entry_R  (R,)      a token's k-th choice -> row; undefined past the rows in use
"""

from __future__ import annotations

import torch

from labs.kernels.backward_loop import blocks, describe, halves, programs
from labs.kernels.plain_gemm import PlainTile
from labs.kernels.tiles import check
from labs.kernels.weight_gemm import ROWS, weight_gemm

import triton  # after common.level, which launch imports: it picks Triton's interpreter where there is no GPU
import triton.language as tl

# T tokens, D model width, F expert width, E experts, R rows. In kernels M, N and K are the GEMM tile's axes.


@triton.jit
def store_weights(matrix_ptr, values, row, column, rows, columns, ACCUMULATE: tl.constexpr):
    """Store a tile of a (rows, columns) matrix, or add it to what is there."""
    pointers = matrix_ptr + row[:, None] * columns + column[None, :]
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    if ACCUMULATE:
        values += tl.load(pointers, mask=inside, other=0.0)
    tl.store(pointers, values.to(matrix_ptr.dtype.element_ty), mask=inside)


@triton.jit
def weight_grad_kernel(
    gathered_ptr,  # (T, 8 * G8) x or dO
    token_of_row_ptr,  # (R,) int32
    sorted_rows,  # (R, 8 * S8) dH or A': a descriptor or a pointer
    out_ptr,  # (E, G, S), or (E, S, G) if TRANSPOSED; float32 if ACCUMULATE
    offsets_ptr,  # (E + 1,) int32
    E,
    G8,
    S8,
    TMA: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    E_POW2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[e] = gathered[tokens of e].T @ sorted_rows[rows of e]; added to what it holds if ACCUMULATE.

    Grid (programs,): a program owns every grid-th tile of BLOCK_M gathered columns by BLOCK_N sorted columns of an
    expert; the reduction runs over the expert's rows, BLOCK_K at a time, or once over nothing. Float32 accumulator.
    One loop over the steps of all its tiles, so that loads run ahead over a tile's end; tokens one step further.
    """
    G = G8 * 8  # so the compiler knows that no 16-byte copy straddles a row's end
    S = S8 * 8
    g_tiles = tl.cdiv(G, BLOCK_M)
    tiles = g_tiles * tl.cdiv(S, BLOCK_N)
    tile = tl.program_id(0)
    grid = tl.num_programs(0)
    e = tl.arange(0, E_POW2)
    rows = tl.load(offsets_ptr + e + 1, mask=e < E, other=0) - tl.load(offsets_ptr + e, mask=e < E, other=0)
    own_tiles = ((e + 1) * tiles + (grid - 1 - tile)) // grid - (e * tiles + (grid - 1 - tile)) // grid
    steps = tl.sum(tl.where(e < E, own_tiles * tl.maximum(tl.cdiv(rows, BLOCK_K), 1), 0))

    i = tl.arange(0, BLOCK_K)
    expert = tl.minimum(tile // tiles, E - 1)
    first_row = tl.load(offsets_ptr + expert)
    row_end = tl.load(offsets_ptr + expert + 1)
    g_first = tile % tiles % g_tiles * BLOCK_M
    s_first = tile % tiles // g_tiles * BLOCK_N
    token = tl.load(token_of_row_ptr + first_row + i, mask=first_row + i < row_end, other=0)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for _ in range(steps):
        last = first_row + BLOCK_K >= row_end
        next_tile, next_expert, next_row, next_end, next_g, next_s = (
            tile, expert, first_row + BLOCK_K, row_end, g_first, s_first)
        if last:
            next_tile = tile + grid
            next_expert = tl.minimum(next_tile // tiles, E - 1)
            next_row = tl.load(offsets_ptr + next_expert)
            next_end = tl.load(offsets_ptr + next_expert + 1)
            next_g = next_tile % tiles % g_tiles * BLOCK_M
            next_s = next_tile % tiles // g_tiles * BLOCK_N
        next_token = tl.load(token_of_row_ptr + next_row + i, mask=next_row + i < next_end, other=0)

        g = g_first + tl.arange(0, BLOCK_M)
        exists = (first_row + i < row_end)[:, None]
        a = tl.load(gathered_ptr + (token.to(tl.int64) * G)[:, None] + g[None, :], mask=exists & (g < G)[None, :],
                    other=0.0)
        if TMA:
            b = sorted_rows.load([first_row, s_first])
        else:
            s = s_first + tl.arange(0, BLOCK_N)
            b = tl.load(sorted_rows + ((first_row + i).to(tl.int64) * S)[:, None] + s[None, :],
                        mask=exists & (s < S)[None, :], other=0.0)
        acc = tl.dot(a.T, b, acc, input_precision="ieee")
        if last:
            matrix = out_ptr + expert.to(tl.int64) * G * S  # E * G * S passes 2**31 at real sizes
            for part in tl.static_range(2):  # a half of the columns after the other, to spare registers
                column = s_first + part * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
                if TRANSPOSED:
                    store_weights(matrix, halves(acc)[part].T, column, g, S, G, ACCUMULATE)
                else:
                    store_weights(matrix, halves(acc)[part], g, column, G, S, ACCUMULATE)
            acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        tile, expert, first_row, row_end, g_first, s_first = (
            next_tile, next_expert, next_row, next_end, next_g, next_s)
        token = next_token


@triton.jit
def zero_tail_kernel(
    rows_ptr,  # (R, width)
    offsets_ptr,  # (E + 1,) int32
    E, R, width,
    BLOCK: tl.constexpr,
):
    """Zeros in the first rows that no expert uses. Grid (rows, cdiv(width, BLOCK))."""
    row = tl.load(offsets_ptr + E) + tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    zeros = tl.zeros((BLOCK,), rows_ptr.dtype.element_ty)
    tl.store(rows_ptr + row.to(tl.int64) * width + column, zeros, mask=(row < R) & (column < width))


def weight_grad(
    gathered_TG: torch.Tensor, token_of_row_R: torch.Tensor, sorted_RS: torch.Tensor, offsets_E1: torch.Tensor,
    out: torch.Tensor, tile: PlainTile, transposed: bool, accumulate: bool, spare_rows: bool,
) -> None:
    """out[e] = gathered_TG[tokens of e].T @ sorted_RS[rows of e], (G, S), or its transpose (S, G) if `transposed`.

    gathered_TG and sorted_RS of one dtype, index arrays int32, all contiguous; out (E, G, S) or (E, S, G), added to
    and float32 if `accumulate`. spare_rows: offsets_E1 may end before R; then a block of rows of sorted_RS past its end
    is set to zero. Raises ValueError for what does not fit.
    """
    (R, S), G, E = sorted_RS.shape, gathered_TG.shape[1], offsets_E1.numel() - 1
    check("gathered_TG", gathered_TG, (gathered_TG.shape[0], G), sorted_RS.dtype)
    check("sorted_RS", sorted_RS, (R, S), gathered_TG.dtype)
    check("token_of_row_R", token_of_row_R, (R,), torch.int32)
    check("offsets_E1", offsets_E1, (E + 1,), torch.int32)
    check("out", out, (E, S, G) if transposed else (E, G, S), torch.float32 if accumulate else sorted_RS.dtype)
    if R == 0:
        if not accumulate:
            out.zero_()
        return
    if spare_rows and tile.tma:
        zero_tail_kernel[(max(tile.block_K, ROWS), triton.cdiv(S, 1024))](
            sorted_RS, offsets_E1, E, R, S, BLOCK=1024, num_warps=4)
    if tile.tma and sorted_RS.dtype == torch.bfloat16:
        weight_gemm(gathered_TG, token_of_row_R, sorted_RS, offsets_E1, out, transposed, accumulate)
        return
    grid = programs(E * triton.cdiv(G, tile.block_M) * triton.cdiv(S, tile.block_N), sorted_RS.device)
    weight_grad_kernel[(grid,)](
        gathered_TG, token_of_row_R, describe(sorted_RS, [tile.block_K, tile.block_N], tile), out, offsets_E1, E,
        G // 8, S // 8, TMA=tile.tma, TRANSPOSED=transposed, ACCUMULATE=accumulate,
        E_POW2=triton.next_power_of_2(E), **blocks(tile))


# ---- scores: entries to rows, and their gradients back ------------------------------------------------------------
@triton.jit
def spread_scores_kernel(
    scores_ptr,  # (R,) float32, by entry
    row_of_entry_ptr,  # (R,) int32
    offsets_ptr,  # (E + 1,) int32
    score_of_row_ptr,  # (R,) float32
    E,
    BLOCK: tl.constexpr,
):
    """score_of_row[row_of_entry[i]] = scores[i]. Grid (cdiv(R, BLOCK),): a program owns BLOCK entries."""
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    used = entry < tl.load(offsets_ptr + E)
    row = tl.load(row_of_entry_ptr + entry, mask=used, other=0)
    tl.store(score_of_row_ptr + row, tl.load(scores_ptr + entry, mask=used, other=0.0), mask=used)


@triton.jit
def sum_score_grads_kernel(
    d_scores_ptr,  # (X, R) float32, by row
    row_of_entry_ptr,  # (R,) int32
    offsets_ptr,  # (E + 1,) int32
    out_ptr,  # (R,) float32, by entry
    E, X, R,
    BLOCK: tl.constexpr,
):
    """out[i] = sum over x, in order, of d_scores[x, row_of_entry[i]]; 0 past the rows in use.

    Grid (cdiv(R, BLOCK),): a program owns BLOCK entries.
    """
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    used = entry < tl.load(offsets_ptr + E)
    row = tl.load(row_of_entry_ptr + entry, mask=used, other=0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(X):
        total += tl.load(d_scores_ptr + row, mask=used, other=0.0)
        row += R
    tl.store(out_ptr + entry, total, mask=entry < R)


def spread_scores(scores: torch.Tensor, row_of_entry: torch.Tensor, offsets_E1: torch.Tensor) -> torch.Tensor:
    """score_of_row_R float32 from scores by entry; R = scores.numel(). Rows of no expert stay undefined."""
    R = scores.numel()
    score_of_row_R = torch.empty(R, dtype=torch.float32, device=scores.device)
    if R > 0:
        spread_scores_kernel[(triton.cdiv(R, 1024),)](
            scores, row_of_entry, offsets_E1, score_of_row_R, offsets_E1.numel() - 1, BLOCK=1024, num_warps=4)
    return score_of_row_R


def sum_score_grads(d_scores_XR: torch.Tensor, row_of_entry: torch.Tensor, offsets_E1: torch.Tensor) -> torch.Tensor:
    """The scores' gradients by entry, float32 in row_of_entry's shape; zeros past the rows in use."""
    X, R = d_scores_XR.shape
    out = torch.empty(row_of_entry.shape, dtype=torch.float32, device=d_scores_XR.device)
    if R > 0:
        sum_score_grads_kernel[(triton.cdiv(R, 1024),)](
            d_scores_XR, row_of_entry, offsets_E1, out, offsets_E1.numel() - 1, X, R, BLOCK=1024, num_warps=4)
    return out
