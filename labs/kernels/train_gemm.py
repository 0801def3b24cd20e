"""The two GEMMs of training that do more than multiply, for Hopper, in Triton's Gluon, with the warp roles of roles.py.

    up           x --gather--> [gate and up rows of an expert: SwiGLU] --> H (R, 2F), A (R, F)
    hidden_grad  dO --gather--> [down, straight] --> dA'; with H and scores in the epilogue: dH (R, 2F), A' (R, F), dS

What   backward_gemm.py's up and hidden_grad in bf16: same operands, same results within rounding. It has the formulas.
Why    There the same warps load, multiply and finish a tile, and hidden_grad's epilogue, which loads 2 and stores 3
       times R * F values, is time in which no tile is loaded.
How    Here a producer loads the next tile meanwhile. Weights stay as they are, gate rows then up rows: a box of three
       dimensions brings 128 of each, and a thread's accumulator has gate and up of the same columns. H is loaded by 16
       bytes a thread, an eighth of the columns ahead, and turned into the accumulator's layout as stores turn it back.

    index array     shape   from -> to
    token_of_row_R  (R,)    row -> token
    tiles_X5        (X, 5)  row tile -> expert, first row, rows in use, first tile and size of its group (tiles.py)
    claimed         (1,)    output tiles that programs have taken; zero at the start (tiles.py)

Determinism: an output element is one accumulator's sum in one order. A row's dS is summed over a tile's columns here,
and over the column tiles, in their order, by backward_weights.py.
"""

from __future__ import annotations

import torch

from labs.kernels.grouped_gemm import _SILU_MUL
from labs.kernels.roles import (
    _ACC_HALF,
    _ACC_EIGHTH,
    _BLOCK_N,
    _ROWS,
    _SWAPPED_32,
    _SWIZZLED_3D,
    _WIDE_32,
    BLOCK_K,
    BLOCK_N,
    LAUNCH,
    consume,
    describe,
    halves,
    open_ring,
    produce_gathered,
    produce_rows,
    store_rows,
    walk_tiles,
)
from labs.kernels.tiles import ROWS, TilePlan, check

from triton.experimental import gluon  # after common.level, which the above import
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# T tokens, D model width, F expert width, E experts, R routed rows. In kernels M, N and K are the GEMM tile's axes.

_SIGMOID = gl.constexpr("""{
    .reg .f32 a;
    mul.f32 a, $1, 0fBFB8AA3B;
    ex2.approx.ftz.f32 a, a;
    add.f32 a, a, 0f3F800000;
    rcp.approx.ftz.f32 $0, a;
}""")


@gluon.jit
def specialize(rows, token_of_row_ptr, D8, weights_desc, walk, claimed_ptr, weight_rows, out, F8, finish: gl.constexpr,
               GATHERED: gl.constexpr, STRAIGHT: gl.constexpr):
    """Two consumers, and the producer that gathers, or the one that reads rows in their order."""
    if GATHERED:
        ring = open_ring(128 + 1, STRAIGHT)
        gl.warp_specialize([
            (consume, (out, F8, walk[3], ring, finish, 0, True)),
            (consume, (out, F8, walk[3], ring, finish, 1, True)),
            (produce_gathered, (rows, token_of_row_ptr, D8, weights_desc, walk, claimed_ptr, weight_rows, ring)),
        ], [4, 4], [216, 72])
    else:
        ring = open_ring(1, STRAIGHT)
        gl.warp_specialize([
            (consume, (out, F8, walk[3], ring, finish, 0, False)),
            (consume, (out, F8, walk[3], ring, finish, 1, False)),
            (produce_rows, (rows, weights_desc, walk, walk[2], claimed_ptr, weight_rows, ring)),
        ], [4, 1], [232, 24])


# ----------------------------------------------------------------------------------------------------------- up
@gluon.jit
def store_up(out, F, acc, row, column_tile, end):
    """Epilogue of up: 64 rows of 128 gate and 128 up columns, stored as H, and hidden, of what is not rounded yet."""
    h_ptr, hidden_ptr = out
    column = column_tile * (_BLOCK_N // 2)
    gate, up = halves(acc)
    gate = gl.convert_layout(gate, _ACC_HALF)
    up = gl.convert_layout(up, _ACC_HALF)
    store_rows(h_ptr, gate.to(gl.bfloat16), row, column, F, 2 * F, end)
    store_rows(h_ptr + F, up.to(gl.bfloat16), row, column, F, 2 * F, end)
    hidden = gl.inline_asm_elementwise(_SILU_MUL, "=f,=f,f,f,f,f", [gate, up], dtype=gl.float32, is_pure=True, pack=2)
    store_rows(hidden_ptr, hidden.to(gl.bfloat16), row, column, F, F, end)


@gluon.jit(do_not_specialize=["D8", "F8"])
def train_up_kernel(
    rows,  # GATHERED: (T, D) bf16; else a descriptor of (R, D)
    token_of_row_ptr,  # (R,) int32
    claimed_ptr,  # (1,) int32, zero
    gate_up_desc,  # (2E, F, D) bf16: gate rows and up rows of an expert in turn
    h_ptr,  # (R, 2F) bf16
    hidden_ptr,  # (R, F) bf16
    tiles_ptr,  # (X, 5) int32
    tile_count_ptr,  # (1,) int32
    D8,
    F8,
    GATHERED: gl.constexpr,
):
    """H = rows @ [gate, up].T, kept, and hidden = silu(gate) * up. D8 and F8 are D / 8 and F / 8.

    Grid (SMs,): a program owns the tiles that it claims, of 128 rows by 128 gate and as many up columns. Float32
    accumulators.
    """
    finish: gl.constexpr = store_up
    out = h_ptr, hidden_ptr
    walk = walk_tiles(tiles_ptr, tile_count_ptr, F8 * 16, D8 * 8)
    specialize(rows, token_of_row_ptr, D8, gate_up_desc, walk, claimed_ptr, F8 * 16, out, F8, finish, GATHERED, False)


# -------------------------------------------------------------------------------------------------- hidden_grad
@gluon.jit
def load_part(ptr, row, column, width, stride, end):
    """64 rows of 32 columns of bf16 by 16 bytes a thread, as store_rows stores them; zeros where there are none."""
    r = row + gl.arange(0, _ROWS, layout=gl.SliceLayout(1, _WIDE_32))
    c = column + gl.arange(0, _BLOCK_N // 8, layout=gl.SliceLayout(0, _WIDE_32))
    pointers = ptr + (r.to(gl.int64) * stride)[:, None] + c[None, :]
    return gl.load(pointers, mask=(r < end)[:, None] & (c < width)[None, :], other=0.0)


@gluon.jit
def as_accumulator(values):
    """What load_part loaded, in float32, in the accumulator's layout: store_rows' swaps, backwards."""
    values = gl.convert_layout(values, _SWAPPED_32)
    values = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [values], dtype=gl.bfloat16, is_pure=True, pack=2)
    return gl.convert_layout(values, _ACC_EIGHTH).to(gl.float32)


@gluon.jit
def store_hidden_grad(out, F, acc, row, column_tile, end):
    """Epilogue of hidden_grad, an eighth of the columns after the other: more would not fit into registers.

    H of the next part is on its way before a part is stored: the compiler would not move a load over a store.
    """
    score_of_row_ptr, h_ptr, dh_ptr, scaled_ptr, d_scores_ptr, R = out
    column = column_tile * _BLOCK_N
    left, right = halves(acc)
    left = halves(left)
    right = halves(right)
    parts = halves(left[0]) + halves(left[1]) + halves(right[0]) + halves(right[1])
    r = row + gl.arange(0, _ROWS, layout=gl.SliceLayout(1, _ACC_EIGHTH))
    score = gl.load(score_of_row_ptr + r, mask=r < end, other=0.0)
    d_score = gl.zeros([_ROWS], gl.float32, gl.SliceLayout(1, _ACC_EIGHTH))
    gate_ahead = load_part(h_ptr, row, column, F, 2 * F, end)
    up_ahead = load_part(h_ptr + F, row, column, F, 2 * F, end)
    for part in gl.static_range(8):
        here = column + part * (_BLOCK_N // 8)
        gate = as_accumulator(gate_ahead)
        up = as_accumulator(up_ahead)
        if part < 7:
            gate_ahead = load_part(h_ptr, row, here + _BLOCK_N // 8, F, 2 * F, end)
            up_ahead = load_part(h_ptr + F, row, here + _BLOCK_N // 8, F, 2 * F, end)
        d_hidden = gl.convert_layout(parts[part], _ACC_EIGHTH)
        sigmoid = gl.inline_asm_elementwise(_SIGMOID, "=f,f", [gate], dtype=gl.float32, is_pure=True, pack=1)
        silu = gate * sigmoid
        hidden = silu * up
        d_score += gl.sum(d_hidden * hidden, axis=1)
        store_rows(scaled_ptr, (hidden * score[:, None]).to(gl.bfloat16), row, here, F, F, end)
        d_hidden = d_hidden * score[:, None]
        d_gate = d_hidden * up * (sigmoid + silu - silu * sigmoid)
        store_rows(dh_ptr, d_gate.to(gl.bfloat16), row, here, F, 2 * F, end)
        store_rows(dh_ptr + F, (d_hidden * silu).to(gl.bfloat16), row, here, F, 2 * F, end)
    gl.store(d_scores_ptr + column_tile.to(gl.int64) * R + r, d_score, mask=r < end)


@gluon.jit(do_not_specialize=["R", "D8", "F8"])
def hidden_grad_kernel(
    rows,  # GATHERED: dO (T, D) bf16; else a descriptor of (R, D)
    token_of_row_ptr,  # (R,) int32
    claimed_ptr,  # (1,) int32, zero
    down_desc,  # (E, D, F) bf16
    score_of_row_ptr,  # (R,) float32
    h_ptr,  # (R, 2F) bf16
    dh_ptr,  # (R, 2F) bf16
    scaled_ptr,  # (R, F) bf16: A' = score * A
    d_scores_ptr,  # (column tiles, R) float32
    tiles_ptr,  # (X, 5) int32
    tile_count_ptr,  # (1,) int32
    R,
    D8,
    F8,
    GATHERED: gl.constexpr,
):
    """dA' = dO[token] @ down, and in its epilogue all that follows from it and H. D8 and F8 are D / 8 and F / 8.

    Grid (SMs,): a program owns the tiles that it claims, of 128 rows by 256 columns of F. Float32 accumulators.
    """
    finish: gl.constexpr = store_hidden_grad
    out = score_of_row_ptr, h_ptr, dh_ptr, scaled_ptr, d_scores_ptr, R
    walk = walk_tiles(tiles_ptr, tile_count_ptr, F8 * 8, D8 * 8)
    specialize(rows, token_of_row_ptr, D8, down_desc, walk, claimed_ptr, D8 * 8, out, F8, finish, GATHERED, True)


# ----------------------------------------------------------------------------------------------------- launchers
def readable(rows: torch.Tensor, gathered: bool) -> torch.Tensor | TensorDescriptor:
    """Rows as the kernels take them. A gradient may be a view of something flat; cp.async takes 16 bytes."""
    if not gathered:
        return describe(rows, ROWS)
    return rows.clone() if rows.data_ptr() % 16 else rows


def up(
    rows: torch.Tensor, gathered: bool, token_of_row_R: torch.Tensor, gate_up_E2FD: torch.Tensor, plan: TilePlan,
    h_R2F: torch.Tensor, hidden_RF: torch.Tensor, programs: int,
) -> None:
    """Fill h_R2F and hidden_RF. rows: x_TD if `gathered`, else (R, D) in the rows' order. backward_gemm.up has checked
    the rest. A plan that no other up projection has used."""
    E, two_F, D = gate_up_E2FD.shape
    F = two_F // 2
    plan.count_once("up")
    box = [2, BLOCK_N // 2, BLOCK_K]
    gate_up = TensorDescriptor.from_tensor(gate_up_E2FD.view(2 * E, F, D), box, _SWIZZLED_3D.value)
    train_up_kernel[(programs,)](
        readable(rows, gathered), token_of_row_R, plan.claimed_up, gate_up, h_R2F, hidden_RF,
        plan.tiles_X5, plan.tile_count, D // 8, F // 8, GATHERED=gathered, **LAUNCH)


def hidden_grad(
    rows: torch.Tensor, gathered: bool, token_of_row_R: torch.Tensor, score_of_row_R: torch.Tensor,
    down_EDF: torch.Tensor, h_R2F: torch.Tensor, plan: TilePlan, dh_R2F: torch.Tensor, scaled_RF: torch.Tensor,
    d_scores_XR: torch.Tensor, programs: int,
) -> None:
    """Fill dh_R2F, scaled_RF and d_scores_XR. rows: grad_out_TD if `gathered`, else (R, D) in the rows' order.
    backward_gemm.hidden_grad has checked the rest. A plan that no other up projection has used."""
    (_, D, F), R = down_EDF.shape, h_R2F.shape[0]
    check("d_scores_XR", d_scores_XR, (-(-F // BLOCK_N), R), torch.float32)
    plan.count_once("up")
    down = TensorDescriptor.from_tensor(down_EDF, [1, BLOCK_K, BLOCK_N], _SWIZZLED_3D.value)
    hidden_grad_kernel[(programs,)](
        readable(rows, gathered), token_of_row_R, plan.claimed_up, down, score_of_row_R, h_R2F,
        dh_R2F, scaled_RF, d_scores_XR, plan.tiles_X5, plan.tile_count, R, D // 8, F // 8, GATHERED=gathered, **LAUNCH)
