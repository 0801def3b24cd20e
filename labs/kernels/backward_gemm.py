"""Grouped GEMMs over the rows of a SwiGLU mixture that trains: forward, and the backward down to dX. Plain Triton, for
all but bf16 on Hopper: there, unless a GEMM is small, train_gemm.py does what [up] and [hidden_grad] are below, and
grouped_gemm.py what [rows] is.

    forward    x --gather--> [up: SwiGLU] --> H, A          A (R, F) --> [rows] --> y (R, D)
    backward   dO --gather--> [hidden_grad] --> dH, A', dS  dH (R, 2F) --> [rows] --> dX~ (R, D)

    with dA' = dO down, A = silu(gate) up, s the row's score:   dS = <dA', A>   dA = s dA'   A' = s A
    dup = dA silu(gate)    dgate = dA up sigmoid(gate) (1 + gate (1 - sigmoid(gate)))

A is made again from H where it is needed, and dS needs no output of the forward (SonicMoE, arXiv 2512.14080). Weights
stay as they are, gate rows then up rows: an optimizer changes them at every step, and a repacked copy would be made
again each time.

backward_loop.py holds the loop that the three kernels share.

    index array     shape     from -> to
    offsets_E1      (E + 1,)  expert -> its first row; the last entry: rows in use, <= R
    token_of_row_R  (R,)      row -> token
"""

from __future__ import annotations

import torch

from labs.kernels import grouped_gemm, train_gemm
from labs.kernels.backward_loop import (
    blocks,
    describe,
    eighths,
    halves,
    multiply_tiles,
    pointer_gate_up,
    pointer_straight,
    pointer_transposed,
    programs,
    store_tile,
    tma_gate_up,
    tma_straight,
    tma_transposed,
)
from labs.kernels.launch import sm_count
from labs.kernels.plain_gemm import PlainTile
from labs.kernels.tiles import TilePlan, check, check_gemm

import triton  # after common.level, which launch imports: it picks Triton's interpreter where there is no GPU
import triton.language as tl

# T tokens, D model width, F expert width, E experts, R rows: T*K routed ones, or the most that rounding may give.
# In kernels M, N and K are the GEMM tile's axes.


# ---- forward ------------------------------------------------------------------------------------------------------
@triton.jit
def finish_up(out, acc, row, row_end, column_tile, F):
    """Epilogue of up_kernel: hidden comes from the accumulator, not from the rounded H."""
    h_ptr, hidden_ptr = out
    PART: tl.constexpr = acc.shape[1] // 4
    gates, ups = halves(acc)
    for part in tl.static_range(2):  # all at once would not fit into registers
        gate = halves(gates)[part]
        up = halves(ups)[part]
        column = column_tile * (2 * PART) + part * PART
        store_tile(h_ptr, gate, row, row_end, column, F, 2 * F)
        store_tile(h_ptr + F, up, row, row_end, column, F, 2 * F)
        store_tile(hidden_ptr, gate * tl.sigmoid(gate) * up, row, row_end, column, F, F)


@triton.jit
def up_kernel(
    x,  # (T, D), a pointer; or, SORTED, a descriptor of (R, D)
    token_of_row_ptr,  # (R,) int32
    weights,  # (E, 2F, D), an expert's gate rows and then its up rows: a descriptor or a pointer
    h_ptr,  # (R, 2F) the same: gate columns, then up columns
    hidden_ptr,  # (R, F)
    offsets_ptr,  # (E + 1,) int32
    tiles_ptr,  # (X, 5) int32
    tile_count_ptr,  # (1,) int32
    D8,
    F8,
    load_weights: tl.constexpr,
    SORTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """H = x[token] @ [gate, up].T, kept, and hidden = silu(gate) * up. D8 and F8 are D / 8 and F / 8.

    Grid (SMs,): a program owns every grid-th tile of BLOCK_M rows by BLOCK_N / 2 gate and as many up columns. Float32
    accumulator.
    """
    # Times 8, so the compiler knows that no 16-byte copy straddles a row's end.
    read: tl.constexpr = "tma" if SORTED else "gathered"
    multiply_tiles(x, token_of_row_ptr, weights, F8 * 8, D8 * 8, offsets_ptr, tiles_ptr, tile_count_ptr,
                   (h_ptr, hidden_ptr), read, load_weights, finish_up, BLOCK_N // 2, BLOCK_M, BLOCK_N, BLOCK_K)


@triton.jit
def finish_rows(out, acc, row, row_end, column_tile, N):
    """Epilogue of rows_kernel."""
    store_tile(out[0], acc, row, row_end, column_tile * acc.shape[1], N, N)


@triton.jit
def rows_kernel(
    rows,  # (R, 8 * K8), sorted by expert: a descriptor or a pointer
    weights,  # (E, ...): a descriptor or a pointer, in the layout that load_weights takes
    out_ptr,  # (R, 8 * N8)
    offsets_ptr,  # (E + 1,) int32
    tiles_ptr,  # (X, 5) int32
    tile_count_ptr,  # (1,) int32
    N8,
    K8,
    load_weights: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out = rows times their experts' weights: y from hidden, and dX~ from dH.

    Grid (SMs,): a program owns every grid-th tile of BLOCK_M rows by BLOCK_N columns. Float32 accumulator.
    """
    read: tl.constexpr = "tma" if TMA else "pointers"
    multiply_tiles(rows, None, weights, N8 * 8, K8 * 8, offsets_ptr, tiles_ptr, tile_count_ptr, (out_ptr,),
                   read, load_weights, finish_rows, BLOCK_N, BLOCK_M, BLOCK_N, BLOCK_K)


# ---- backward -----------------------------------------------------------------------------------------------------
@triton.jit
def load_h(h_ptr, row, row_end, column, F, BLOCK: tl.constexpr):
    """Gate and up of BLOCK columns of the rows; zeros where there are none."""
    columns = column + tl.arange(0, BLOCK)
    inside = (row < row_end)[:, None] & (columns < F)[None, :]
    pointers = h_ptr + (row.to(tl.int64) * 2 * F)[:, None] + columns[None, :]
    return tl.load(pointers, mask=inside, other=0.0), tl.load(pointers + F, mask=inside, other=0.0)


@triton.jit
def swiglu_grad(d_hidden, score, gate, up, dh_ptr, scaled_ptr, row, row_end, column, F):
    """dH and A' of some columns, stored, from dA' (float32) and H; returns <dA', A> over them, a row each."""
    gate = gate.to(tl.float32)
    up = up.to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    hidden = silu * up
    store_tile(scaled_ptr, hidden * score[:, None], row, row_end, column, F, F)
    d_score = tl.sum(d_hidden * hidden, 1)
    d_hidden = d_hidden * score[:, None]
    store_tile(dh_ptr, d_hidden * up * (sigmoid + silu * (1 - sigmoid)), row, row_end, column, F, 2 * F)
    store_tile(dh_ptr + F, d_hidden * silu, row, row_end, column, F, 2 * F)
    return d_score


@triton.jit
def finish_hidden_grad(out, acc, row, row_end, column_tile, F):
    """Epilogue of hidden_grad_kernel, PARTS of the columns one after the other: more would not fit into registers.

    H of the next part is on its way before a part is stored: the compiler would not move a load over a store.
    """
    score_of_row_ptr, h_ptr, dh_ptr, scaled_ptr, d_scores_ptr, R = out
    PARTS: tl.constexpr = 8
    COLUMNS: tl.constexpr = acc.shape[1] // PARTS
    column = column_tile * acc.shape[1]
    gate, up = load_h(h_ptr, row, row_end, column, F, COLUMNS)
    score = tl.load(score_of_row_ptr + row, mask=row < row_end, other=0.0)
    d_score = tl.zeros((acc.shape[0],), tl.float32)
    for part in tl.static_range(PARTS):
        next_gate, next_up = gate, up
        if part + 1 < PARTS:
            next_gate, next_up = load_h(h_ptr, row, row_end, column + (part + 1) * COLUMNS, F, COLUMNS)
        d_score += swiglu_grad(eighths(acc)[part], score, gate, up, dh_ptr, scaled_ptr, row, row_end,
                               column + part * COLUMNS, F)
        gate, up = next_gate, next_up
    tl.store(d_scores_ptr + column_tile.to(tl.int64) * R + row, d_score, mask=row < row_end)


@triton.jit
def hidden_grad_kernel(
    grad_out,  # (T, D), a pointer; or, SORTED, a descriptor of (R, D)
    token_of_row_ptr,  # (R,) int32
    score_of_row_ptr,  # (R,) float32
    weights,  # (E, D, F): a descriptor or a pointer
    h_ptr,  # (R, 2F)
    dh_ptr,  # (R, 2F)
    scaled_ptr,  # (R, F) A' = score * A
    d_scores_ptr,  # (column tiles, R) float32
    offsets_ptr,  # (E + 1,) int32
    tiles_ptr,  # (X, 5) int32
    tile_count_ptr,  # (1,) int32
    R,
    D8,
    F8,
    load_weights: tl.constexpr,
    SORTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dA' = dO[token] @ down, and in its epilogue all that follows from it and H. D8 and F8 are D / 8 and F / 8.

    Grid (SMs,): a program owns every grid-th tile of BLOCK_M rows by BLOCK_N columns of F. Float32 accumulator.
    """
    read: tl.constexpr = "tma" if SORTED else "gathered"
    multiply_tiles(grad_out, token_of_row_ptr, weights, F8 * 8, D8 * 8, offsets_ptr, tiles_ptr, tile_count_ptr,
                   (score_of_row_ptr, h_ptr, dh_ptr, scaled_ptr, d_scores_ptr, R), read, load_weights,
                   finish_hidden_grad, BLOCK_N, BLOCK_M, BLOCK_N, BLOCK_K)


# ---- launchers ----------------------------------------------------------------------------------------------------
COPY_FROM = 4096  # F from which rows are copied before: between the presets with 2048 and 14336


def rows_of_tokens(x_TD: torch.Tensor, token_of_row_R: torch.Tensor, F: int, tile: PlainTile) -> torch.Tensor:
    """What a GEMM of the rows with F columns reads: x_TD itself, to gather from, or a sorted copy (R, D).

    A copy moves some 2 * R * D values whatever F is; gathering while loading slows the R * D * F of arithmetic.
    """
    return x_TD.index_select(0, token_of_row_R) if tile.tma and F >= COPY_FROM else x_TD


LEAST_OPERATIONS = 5e10  # of a GEMM, some 80 us, from which its kernel with warp roles saves more than its launch costs


def has_warp_roles(tile: PlainTile, weights: torch.Tensor, R: int) -> bool:
    """Whether R rows through (E, N, K) weights have a kernel with warp roles, and enough to do for it."""
    _, N, K = weights.shape
    return tile.tma and weights.dtype == torch.bfloat16 and 2 * R * N * K >= LEAST_OPERATIONS


def up(
    x_TD: torch.Tensor, token_of_row_R: torch.Tensor, offsets_E1: torch.Tensor, gate_up_E2FD: torch.Tensor,
    plan: TilePlan, tile: PlainTile,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows' pre-activations h_R2F, gate then up columns, and hidden_RF = silu(gate) * up, in x's dtype.

    x_TD and gate_up_E2FD of one dtype, token_of_row_R (R,) and offsets_E1 (E + 1,) int32, all contiguous; plan in
    tiles of tile.block_M rows. Rows of no expert stay undefined. Raises ValueError for what does not fit.
    """
    (E, two_F, D), R = gate_up_E2FD.shape, token_of_row_R.numel()
    F = two_F // 2
    check_gemm(E, D, F, plan, tile.block_M)
    check("x_TD", x_TD, (x_TD.shape[0], D), gate_up_E2FD.dtype)
    check("gate_up_E2FD", gate_up_E2FD, (E, 2 * F, D), x_TD.dtype)
    check("token_of_row_R", token_of_row_R, (R,), torch.int32)
    check("offsets_E1", offsets_E1, (E + 1,), torch.int32)
    h_R2F, hidden_RF = x_TD.new_empty(R, 2 * F), x_TD.new_empty(R, F)
    rows = rows_of_tokens(x_TD, token_of_row_R, F, tile)
    if R > 0 and has_warp_roles(tile, gate_up_E2FD, R):
        train_gemm.up(rows, rows is x_TD, token_of_row_R, gate_up_E2FD, plan, h_R2F, hidden_RF, sm_count(x_TD.device))
    elif R > 0:
        weights = describe(gate_up_E2FD.view(2 * E, F, D), [2, tile.block_N // 2, tile.block_K], tile)
        grid = programs(len(plan.tiles_X5) * triton.cdiv(2 * F, tile.block_N), x_TD.device)
        up_kernel[(grid,)](
            rows if rows is x_TD else describe(rows, [tile.block_M, tile.block_K], tile), token_of_row_R, weights,
            h_R2F, hidden_RF, offsets_E1, plan.tiles_X5, plan.tile_count, D // 8, F // 8, SORTED=rows is not x_TD,
            load_weights=tma_gate_up if tile.tma else pointer_gate_up, **blocks(tile))
    return h_R2F, hidden_RF


def multiply_rows(
    rows_RK: torch.Tensor, offsets_E1: torch.Tensor, weights: torch.Tensor, plan: TilePlan, tile: PlainTile,
    transposed: bool,
) -> torch.Tensor:
    """Sorted rows times their experts' weights: rows_RK @ weights_EKN[e], or @ weights_ENK[e].T if `transposed`.

    rows_RK (R, K) and weights of one dtype, offsets_E1 int32, all contiguous; plan as for `up`, which no other call of
    this has used. Gives (R, N); rows of no expert stay undefined. Raises ValueError for what does not fit.
    """
    R, (E, K, N) = rows_RK.shape[0], weights.shape
    if transposed:
        K, N = N, K
    check_gemm(E, N, K, plan, tile.block_M)
    check("rows_RK", rows_RK, (R, K), weights.dtype)
    check("weights", weights, tuple(weights.shape), rows_RK.dtype)
    check("offsets_E1", offsets_E1, (E + 1,), torch.int32)
    out_RN = rows_RK.new_empty(R, N)
    if has_warp_roles(tile, weights, R):
        multiply = grouped_gemm.down if transposed else grouped_gemm.straight
        multiply(rows_RK, weights, plan, out_RN, sm_count(rows_RK.device))
    elif R > 0:
        if transposed:
            box, load_weights = [1, tile.block_N, tile.block_K], tma_transposed if tile.tma else pointer_transposed
        else:
            box, load_weights = [1, tile.block_K, tile.block_N], tma_straight if tile.tma else pointer_straight
        grid = programs(len(plan.tiles_X5) * triton.cdiv(N, tile.block_N), rows_RK.device)
        rows_kernel[(grid,)](
            describe(rows_RK, [tile.block_M, tile.block_K], tile), describe(weights, box, tile), out_RN, offsets_E1,
            plan.tiles_X5, plan.tile_count, N // 8, K // 8, load_weights=load_weights, TMA=tile.tma, **blocks(tile))
    return out_RN


def hidden_grad(
    grad_out_TD: torch.Tensor, token_of_row_R: torch.Tensor, score_of_row_R: torch.Tensor, offsets_E1: torch.Tensor,
    down_EDF: torch.Tensor, h_R2F: torch.Tensor, plan: TilePlan, tile: PlainTile,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dh_R2F, scaled_RF = score * silu(gate) * up, and d_scores_XR float32, whose sum over X column tiles is dS.

    grad_out_TD, down_EDF and h_R2F of one dtype, score_of_row_R (R,) float32, index arrays int32, all contiguous; plan
    as for `up`. Rows of no expert stay undefined. Raises ValueError for what does not fit.
    """
    (E, D, F), R = down_EDF.shape, token_of_row_R.numel()
    check_gemm(E, D, F, plan, tile.block_M)
    check("grad_out_TD", grad_out_TD, (grad_out_TD.shape[0], D), down_EDF.dtype)
    check("down_EDF", down_EDF, (E, D, F), grad_out_TD.dtype)
    check("h_R2F", h_R2F, (R, 2 * F), grad_out_TD.dtype)
    check("token_of_row_R", token_of_row_R, (R,), torch.int32)
    check("score_of_row_R", score_of_row_R, (R,), torch.float32)
    check("offsets_E1", offsets_E1, (E + 1,), torch.int32)
    dh_R2F, scaled_RF = torch.empty_like(h_R2F), h_R2F.new_empty(R, F)
    d_scores_XR = torch.empty(triton.cdiv(F, tile.block_N), R, dtype=torch.float32, device=h_R2F.device)
    rows = rows_of_tokens(grad_out_TD, token_of_row_R, F, tile)
    if R > 0 and has_warp_roles(tile, down_EDF, R):
        train_gemm.hidden_grad(rows, rows is grad_out_TD, token_of_row_R, score_of_row_R, down_EDF, h_R2F, plan, dh_R2F,
                               scaled_RF, d_scores_XR, sm_count(h_R2F.device))
    elif R > 0:
        weights = describe(down_EDF, [1, tile.block_K, tile.block_N], tile)
        grid = programs(len(plan.tiles_X5) * len(d_scores_XR), h_R2F.device)
        hidden_grad_kernel[(grid,)](
            rows if rows is grad_out_TD else describe(rows, [tile.block_M, tile.block_K], tile), token_of_row_R,
            score_of_row_R, weights, h_R2F, dh_R2F, scaled_RF, d_scores_XR, offsets_E1, plan.tiles_X5, plan.tile_count,
            R, D // 8, F // 8, SORTED=rows is not grad_out_TD,
            load_weights=tma_straight if tile.tma else pointer_straight, **blocks(tile))
    return dh_R2F, scaled_RF, d_scores_XR
