"""The two GEMMs of training that do more than multiply, for Hopper, in Triton's Gluon, with the warp roles of roles.py.

    up           x --gather--> [gate and up rows of an expert: SwiGLU] --> H (R, 2F), A (R, F)
    hidden_grad  dO --gather--> [down, straight] --> dA'; with H and scores in the epilogue: dH (R, 2F), A' (R, F), dS

What   backward_gemm.py's up and hidden_grad in bf16: same operands, same results within rounding. It has the formulas.
Why    There the same warps load, multiply and finish a tile, and hidden_grad's epilogue, which loads 2 and stores 3
       times R * F values, waits for H with idle tensor cores.
How    Here a producer loads the next tile meanwhile. Weights stay as they are, gate rows then up rows: a box of three
       dimensions brings 128 of each, and a thread's accumulator has gate and up of the same columns. A tile's H comes
       through the ring, in four stages after the last K step, so that it is there when the epilogue begins.

    index array     shape   from -> to
    token_of_row_R  (R,)    row -> token
    tiles_X5        (X, 5)  row tile -> expert, first row, rows in use, first tile and size of its group (tiles.py)
    claimed         (1,)    output tiles that programs have taken; zero at the start (tiles.py)

Determinism: an output element is one accumulator's sum in one order. A row's dS is summed over a tile's columns here,
and over the column tiles, in their order, by backward_weights.py.
"""

from __future__ import annotations

import torch

from labs.kernels.gathering import produce_gathered
from labs.kernels.grouped_gemm import _SILU_MUL
from labs.kernels.roles import (
    _ACC_EIGHTH,
    _ACC_HALF,
    _BLOCK_N,
    _ROWS,
    _STAGES,
    _SWIZZLED_3D,
    _WARPGROUPS,
    BLOCK_K,
    BLOCK_N,
    LAUNCH,
    consume,
    describe,
    next_stage,
    one_band,
    open_ring,
    produce_rows,
    walk_tiles,
)
from labs.kernels.stores import halves, store_rows, widen
from labs.kernels.tiles import ROWS, TilePlan, check
from labs.kernels.waiting import sync_threads

from triton.experimental import gluon  # after common.level, which the above import
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# T tokens, D model width, F expert width, E experts, R routed rows. In kernels M, N and K are the GEMM tile's axes.

PART = BLOCK_N // 8  # columns of a tile that hidden_grad's epilogue finishes at a time
PARTS_A_STAGE = 2  # whose H, of both warpgroups, fills a stage's memory for weights

_PART = gl.constexpr(PART)
_PARTS = gl.constexpr(BLOCK_N // PART)
_H_STAGES = gl.constexpr(BLOCK_N // PART // PARTS_A_STAGE)
_PARTS_A_STAGE = gl.constexpr(PARTS_A_STAGE)
_H_BYTES = gl.constexpr(ROWS * PART * PARTS_A_STAGE * 2)  # of one warpgroup's gate, or up, in a stage
_SWIZZLED_PART = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=2 * PART, element_bitwidth=16, rank=2))
_SIGMOID = gl.constexpr("""{
    .reg .f32 a;
    mul.f32 a, $1, 0fBFB8AA3B;
    ex2.approx.ftz.f32 a, a;
    add.f32 a, a, 0f3F800000;
    rcp.approx.ftz.f32 $0, a;
}""")


@gluon.jit
def specialize(rows, token_of_row_ptr, D8, weights_desc, walk, claimed_ptr, weight_rows, out, F8,
               finish: gl.constexpr, load_more: gl.constexpr, more, MORE_STAGES: gl.constexpr, GATHERED: gl.constexpr,
               EVEN_K: gl.constexpr, STRAIGHT: gl.constexpr):
    """Two consumers, and the producer that gathers, or the one that reads rows in their order. EVEN_K: gather_steps's.

    load_more(more, ...) fills MORE_STAGES further stages after a tile's last, which `finish` reads; or None and 0.
    """
    if GATHERED:
        ring = open_ring(128 + 1, STRAIGHT)
        gl.warp_specialize([
            (consume, (out, F8, walk[3], ring, finish, 0, True, MORE_STAGES)),
            (consume, (out, F8, walk[3], ring, finish, 1, True, MORE_STAGES)),
            (produce_gathered, (rows, token_of_row_ptr, D8, weights_desc, walk, claimed_ptr, weight_rows, ring,
                                EVEN_K, load_more, more)),
        ], [4, 4], [216, 72])
    else:
        ring = open_ring(1, STRAIGHT)
        gl.warp_specialize([
            (consume, (out, F8, walk[3], ring, finish, 0, False, MORE_STAGES)),
            (consume, (out, F8, walk[3], ring, finish, 1, False, MORE_STAGES)),
            (produce_rows, (rows, weights_desc, walk, one_band(walk), claimed_ptr, weight_rows, ring, load_more, more)),
        ], [4, 1], [232, 32])


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
    EVEN_K: gl.constexpr,
):
    """H = rows @ [gate, up].T, kept, and hidden = silu(gate) * up. D8 and F8 are D / 8 and F / 8.

    Grid (SMs,): a program owns the tiles that it claims, of 128 rows by 128 gate and as many up columns. Float32
    accumulators.
    """
    finish: gl.constexpr = store_up
    walk = walk_tiles(tiles_ptr, tile_count_ptr, F8 * 16, D8 * 8)
    specialize(rows, token_of_row_ptr, D8, gate_up_desc, walk, claimed_ptr, F8 * 16, (h_ptr, hidden_ptr), F8, finish,
               None, None, 0, GATHERED, EVEN_K, False)


# -------------------------------------------------------------------------------------------------- hidden_grad
@gluon.jit
def parts_of_h(ring, stage):
    """A stage's memory for weights as parts of H, 64 rows by 32 columns each: of the first 32 columns gate of
    warpgroups 0 and 1, up of both, then the same of the next 32."""
    _rows, weights, _told, _full, _empty = ring
    return weights.index(stage)._reinterpret(gl.bfloat16, [_PARTS_A_STAGE * 2 * _WARPGROUPS, _ROWS, _PART],
                                             _SWIZZLED_PART)


@gluon.jit
def load_h(h, row, used, column_tile, stage, phase, ring, GATHERED: gl.constexpr):
    """The tile's H by TMA, in stages after its last K step: it is on its way while the tile is multiplied."""
    h_desc, F = h
    _rows, _weights, _told, full, empty = ring
    whole = used > _ROWS
    first = gl.where(whole, 0, column_tile % 2)  # the warpgroup that has the first 64 rows
    for h_stage in range(_H_STAGES):
        bar = full.index(stage)
        mbarrier.wait(empty.index(stage), phase ^ 1)
        mbarrier.expect(bar, 2 * _WARPGROUPS * _H_BYTES, pred=whole)
        mbarrier.expect(bar, 2 * _H_BYTES, pred=used <= _ROWS)
        parts = parts_of_h(ring, stage)
        for part in gl.static_range(_PARTS_A_STAGE):
            column = column_tile * _BLOCK_N + (h_stage * _PARTS_A_STAGE + part) * _PART
            gate = part * 2 * _WARPGROUPS
            up = gate + _WARPGROUPS
            tma.async_copy_global_to_shared(h_desc, [row, column], bar, parts.index(gate + first))
            tma.async_copy_global_to_shared(h_desc, [row, F + column], bar, parts.index(up + first))
            tma.async_copy_global_to_shared(h_desc, [row + _ROWS, column], bar, parts.index(gate + 1), pred=whole)
            tma.async_copy_global_to_shared(h_desc, [row + _ROWS, F + column], bar, parts.index(up + 1), pred=whole)
        if GATHERED:
            async_copy.mbarrier_arrive(bar, increment_count=False)  # the producer's other arrivals
        stage, phase = next_stage(stage, phase, _STAGES)
    return stage, phase


@gluon.jit
def store_part(out_ptr, values, width, stride, rows):
    """store_rows from where out_ptr points, with 32-bit offsets: the registers of longer ones are wanted elsewhere."""
    values = widen(values)
    r = gl.arange(0, _ROWS, layout=gl.SliceLayout(1, values.type.layout))
    c = gl.arange(0, values.shape[1], layout=gl.SliceLayout(0, values.type.layout))
    gl.store(out_ptr + ((r * stride)[:, None] + c[None, :]), values, mask=(r < rows)[:, None] & (c < width)[None, :])


@gluon.jit
def finish_part(dh_ptr, scaled_ptr, F, d_hidden, gate, up, score, width, rows):
    """64 rows of 32 columns, of which `rows` and `width` are in use: store A' and dH, from dA' (float32) and H; return
    <dA', A> over them. dh_ptr and scaled_ptr: to the first row and column."""
    gate = gate.to(gl.float32)
    up = up.to(gl.float32)
    sigmoid = gl.inline_asm_elementwise(_SIGMOID, "=f,f", [gate], dtype=gl.float32, is_pure=True, pack=1)
    silu = gate * sigmoid
    hidden = silu * up
    d_score = gl.sum(d_hidden * hidden, axis=1)
    store_part(scaled_ptr, (hidden * score[:, None]).to(gl.bfloat16), width, F, rows)
    d_hidden = d_hidden * score[:, None]
    d_gate = d_hidden * up * (sigmoid + silu - silu * sigmoid)
    store_part(dh_ptr, d_gate.to(gl.bfloat16), width, 2 * F, rows)
    store_part(dh_ptr + F, (d_hidden * silu).to(gl.bfloat16), width, 2 * F, rows)
    return d_score


@gluon.jit
def finish_hidden_grad(out, F, acc, row, column_tile, end, stage, phase, ring, WG: gl.constexpr):
    """Epilogue of hidden_grad, an eighth of the columns after the other: more would not fit into registers.

    A loop that passes the eighths on from register to register: written out, its instructions would come from further
    away than the warps can wait for (LOG.md). Columns past F lie in H's up half, or past it, and are zeros there; their
    dA' is zero.
    """
    score_of_row_ptr, dh_ptr, scaled_ptr, d_scores_ptr, R = out
    _rows, _weights, _told, full, empty = ring
    left, right = halves(acc)
    left, inner_left = halves(left)
    inner_right, right = halves(right)
    part0, part1 = halves(left)
    part2, part3 = halves(inner_left)
    part4, part5 = halves(inner_right)
    part6, part7 = halves(right)
    r = row + gl.arange(0, _ROWS, layout=gl.SliceLayout(1, _ACC_EIGHTH))
    score = gl.load(score_of_row_ptr + r, mask=r < end, other=0.0)
    d_score = gl.zeros([_ROWS], gl.float32, gl.SliceLayout(1, _ACC_EIGHTH))
    dh_ptr += row.to(gl.int64) * 2 * F
    scaled_ptr += row.to(gl.int64) * F
    for part in range(_PARTS):
        of_stage = part % _PARTS_A_STAGE
        last = of_stage == _PARTS_A_STAGE - 1
        mbarrier.wait(full.index(stage), phase)
        first = of_stage * 2 * _WARPGROUPS + WG
        gate = parts_of_h(ring, stage).index(first).load(_ACC_EIGHTH)
        up = parts_of_h(ring, stage).index(first + _WARPGROUPS).load(_ACC_EIGHTH)
        fence_async_shared()  # TMA, another proxy than the one that has read, writes here next
        sync_threads()  # one thread arrives, for all that have read
        mbarrier.arrive(empty.index(stage), pred=last)
        column = column_tile * _BLOCK_N + part * _PART
        d_score += finish_part(dh_ptr + column, scaled_ptr + column, F, gl.convert_layout(part0, _ACC_EIGHTH), gate, up,
                               score, F - column, end - row)
        part0 = part1
        part1 = part2
        part2 = part3
        part3 = part4
        part4 = part5
        part5 = part6
        part6 = part7
        after_stage, after_phase = next_stage(stage, phase, _STAGES)
        stage = gl.where(last, after_stage, stage)
        phase = gl.where(last, after_phase, phase)
    gl.store(d_scores_ptr + column_tile.to(gl.int64) * R + r, d_score, mask=r < end)
    return stage, phase


@gluon.jit(do_not_specialize=["R", "D8", "F8"])
def hidden_grad_kernel(
    rows,  # GATHERED: dO (T, D) bf16; else a descriptor of (R, D)
    token_of_row_ptr,  # (R,) int32
    claimed_ptr,  # (1,) int32, zero
    down_desc,  # (E, D, F) bf16
    score_of_row_ptr,  # (R,) float32
    h_desc,  # (R, 2F) bf16
    dh_ptr,  # (R, 2F) bf16
    scaled_ptr,  # (R, F) bf16: A' = score * A
    d_scores_ptr,  # (column tiles, R) float32
    tiles_ptr,  # (X, 5) int32
    tile_count_ptr,  # (1,) int32
    R,
    D8,
    F8,
    GATHERED: gl.constexpr,
    EVEN_K: gl.constexpr,
):
    """dA' = dO[token] @ down, and in its epilogue all that follows from it and H. D8 and F8 are D / 8 and F / 8.

    Grid (SMs,): a program owns the tiles that it claims, of 128 rows by 256 columns of F. Float32 accumulators.
    """
    finish: gl.constexpr = finish_hidden_grad
    load_more: gl.constexpr = load_h
    out = score_of_row_ptr, dh_ptr, scaled_ptr, d_scores_ptr, R
    walk = walk_tiles(tiles_ptr, tile_count_ptr, F8 * 8, D8 * 8)
    specialize(rows, token_of_row_ptr, D8, down_desc, walk, claimed_ptr, D8 * 8, out, F8, finish, load_more,
               (h_desc, F8 * 8), _H_STAGES, GATHERED, EVEN_K, True)


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
        plan.tiles_X5, plan.tile_count, D // 8, F // 8, GATHERED=gathered, EVEN_K=D % BLOCK_K == 0, **LAUNCH)


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
    h_desc = TensorDescriptor.from_tensor(h_R2F, [ROWS, PART], _SWIZZLED_PART.value)
    hidden_grad_kernel[(programs,)](
        readable(rows, gathered), token_of_row_R, plan.claimed_up, down, score_of_row_R, h_desc,
        dh_R2F, scaled_RF, d_scores_XR, plan.tiles_X5, plan.tile_count, R, D // 8, F // 8, GATHERED=gathered,
        EVEN_K=D % BLOCK_K == 0, **LAUNCH)
