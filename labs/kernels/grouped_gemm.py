"""Grouped GEMMs of a SwiGLU MoE layer for Hopper, in Triton's Gluon, with the warp roles of roles.py.

    x (T, D) --gather--> [up, SwiGLU] --> hidden (R, F) --> [down] --> y (R, D)

The R = T*K routed rows lie sorted by expert, without padding: a tile that reaches past its expert's end multiplies
zeros there (gathered rows) or the next expert's rows (rows by TMA), and stores neither. Tiles have 128 rows, or 64
where no more are left, and 256 columns: of up, 128 of hidden, as gate and up rows are interleaved (tiles.py).

Weight rows come from TMA in the order in which accumulators can be stored as they lie (roles.py, describe_weights);
where a width does not divide into it, the epilogue swaps values between threads instead. Tiles of down, and the right
halves of up's, are finished late, beside the next one's multiply (late_store.py), unless the inner dimension is short.
down may begin `early`: while the last tiles of up are multiplied, it works on rows that are whole.

roles.py has who does what in a program, and the index arrays; waiting.py who waits for whom.
"""

from __future__ import annotations

import torch

from labs.kernels.gathering import produce_gathered
from labs.kernels.late_store import (
    HIDDEN_PARTS,
    ROUNDED_PARTS,
    _HIDDEN_PARTS,
    _ROUNDED_PARTS,
    consume_late,
    finishes_late,
    no_parts,
    round_parts,
    store_pairs,
    store_pairs_dealt,
    store_part,
)
from labs.kernels.launch import launch
from labs.kernels.roles import (
    BLOCK_K,
    BLOCK_N,
    FOLLOW,
    _ACC_EIGHTH,
    _ACC_HALF,
    _ACC_QUARTER,
    _BLOCK_N,
    _ROWS,
    _SWIZZLED_3D,
    _WARPGROUPS,
    consume,
    describe,
    describe_weights,
    one_band,
    open_barriers,
    open_ring,
    produce_rows,
    walk_tiles,
)
from labs.kernels.stores import _WIDE_128, _WIDE_256, _WIDE_32, _WIDE_64, halves, store_rows, store_wide
from labs.kernels.tiles import ROWS, TilePlan, check, check_gemm, check_out
from labs.kernels.waiting import begin, fence_async_global, first_part, follow, wait_for, wait_for_up

from triton.experimental import gluon  # after common.level, which tiles imports
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_wait

# T tokens, D model width, F expert width, E experts, K top-k, R = T*K routed rows.
# A tensor's suffix is its shape: x_TD is (T, D). In kernels M, N and K are the GEMM tile's axes.

# ----------------------------------------------------------------------------------------------------- epilogues
# silu(gate) * up of two elements in float32. One reciprocal serves both: the special functions bound the epilogue.
# exp2 is clamped at 2**60 so that the product of two denominators stays finite.
_SILU_MUL = gl.constexpr("""{
    .reg .f32 a, b, r;
    mul.f32 a, $2, 0fBFB8AA3B;  mul.f32 b, $3, 0fBFB8AA3B;
    min.f32 a, a, 0f42700000;   min.f32 b, b, 0f42700000;
    ex2.approx.ftz.f32 a, a;    ex2.approx.ftz.f32 b, b;
    add.f32 a, a, 0f3F800000;   add.f32 b, b, 0f3F800000;
    mul.f32 r, a, b;            rcp.approx.ftz.f32 r, r;
    mul.f32 b, b, r;            mul.f32 a, a, r;
    mul.f32 b, b, $2;           mul.f32 a, a, $3;
    mul.f32 $0, b, $4;          mul.f32 $1, a, $5;
}""")


@gluon.jit
def swiglu(pairs, columns: gl.constexpr, layout: gl.constexpr):
    """Pairs of gate and up, which sit in one thread's registers -> hidden (64, columns)."""
    gate, up = pairs.split()
    hidden = gl.inline_asm_elementwise(_SILU_MUL, "=f,=f,f,f,f,f", [gate, up], dtype=gl.float32, is_pure=True, pack=2)
    return gl.convert_layout(hidden.reshape([_ROWS, columns]), layout).to(gl.bfloat16)


@gluon.jit
def store_hidden_columns(hidden_ptr, F, acc, row, column, end):
    """64, 128 or 256 of gate and up columns, in alternating blocks of 8, -> half as many of hidden."""
    N: gl.constexpr = acc.shape[1]
    layout: gl.constexpr = _ACC_HALF if N == 256 else _ACC_QUARTER if N == 128 else _ACC_EIGHTH
    pairs = acc.reshape([_ROWS, N // 16, 2, 8]).permute((0, 1, 3, 2))
    store_rows(hidden_ptr, swiglu(pairs, N // 2, layout), row, column, F, F, end)


@gluon.jit
def store_hidden_columns_dealt(hidden_ptr, F, acc, row, column, end):
    """store_hidden_columns of weights that TMA has dealt out: (b, gate or up, j, q, p) of a column is
    32 b + 8 q + 2 j + p of hidden."""
    N: gl.constexpr = acc.shape[1]
    layout: gl.constexpr = _WIDE_128 if N == 256 else _WIDE_64 if N == 128 else _WIDE_32
    pairs = acc.reshape([_ROWS, N // 64, 2, 4, 4, 2]).permute((0, 1, 4, 3, 5, 2))
    store_wide(hidden_ptr, swiglu(pairs, N // 2, layout), row, column, F, F, end)


@gluon.jit
def store_hidden(hidden_ptr, F, acc, row, column_tile, end):
    """Epilogue of up: 64x256 of gate and up columns, in alternating blocks of 8, -> 64x128 of hidden."""
    store_hidden_columns(hidden_ptr, F, acc, row, column_tile * (_BLOCK_N // 2), end)


@gluon.jit
def store_hidden_dealt(hidden_ptr, F, acc, row, column_tile, end):
    """store_hidden of weights that TMA has dealt out."""
    store_hidden_columns_dealt(hidden_ptr, F, acc, row, column_tile * (_BLOCK_N // 2), end)


@gluon.jit
def store_y(y_ptr, D, acc, row, column_tile, end):
    """Epilogue of down: 64x256 of y."""
    store_rows(y_ptr, acc.to(gl.bfloat16), row, column_tile * _BLOCK_N, D, D, end)


@gluon.jit
def store_y_dealt(y_ptr, D, acc, row, column_tile, end):
    """store_y of weights that TMA has dealt out: (b, j, q, p) of a column -> 32 b + 8 q + 2 j + p."""
    y = acc.reshape([_ROWS, _BLOCK_N // 32, 4, 4, 2]).permute((0, 1, 3, 2, 4)).reshape([_ROWS, _BLOCK_N])
    store_wide(y_ptr, gl.convert_layout(y, _WIDE_256).to(gl.bfloat16), row, column_tile * _BLOCK_N, D, D, end)


# ---------------------------------------------------------------------------------- epilogues, late (late_store.py)
@gluon.jit
def no_hidden():
    """Parts of no tile."""
    part = gl.zeros([_ROWS, _BLOCK_N // 4], gl.float32, _ACC_QUARTER)
    return part, part


@gluon.jit
def keep_hidden(hidden_ptr, F8, acc, row, column_tile, end, store: gl.constexpr):
    """Finish the left half of up's tile; of the right, two parts of 32 columns of hidden wait as gate and up."""
    left, right = halves(acc)
    store(hidden_ptr, F8 * 8, left, row, column_tile * (_BLOCK_N // 2), end)
    part0, part1 = halves(right)
    return gl.convert_layout(part0, _ACC_QUARTER), gl.convert_layout(part1, _ACC_QUARTER)


@gluon.jit
def store_hidden_part(given, i: gl.constexpr, store: gl.constexpr):
    """Finish part i of what waits."""
    hidden_ptr, F8, waiting = given
    parts, row, column_tile, end = waiting
    column = column_tile * (_BLOCK_N // 2) + _BLOCK_N // 4 + i * (_BLOCK_N // 8)
    store(hidden_ptr, F8 * 8, parts[i], row, column, end)


@gluon.jit
def keep_y(y_ptr, D8, acc, row, column_tile, end, store: gl.constexpr):
    """A tile of down waits as a whole."""
    return round_parts(acc)


@gluon.jit
def consume_hidden(hidden_ptr, F8, k_steps, ring, DEALT: gl.constexpr, LATE: gl.constexpr, WG: gl.constexpr,
                   GATHERED: gl.constexpr, stored=None):
    """A consumer of up. DEALT: weights are dealt out; LATE: a tile's right half is finished late. stored: consume's."""
    if LATE:
        store: gl.constexpr = store_hidden_columns_dealt if DEALT else store_hidden_columns
        consume_late(hidden_ptr, F8, k_steps, ring, no_hidden, keep_hidden, _HIDDEN_PARTS, store_hidden_part, store, WG,
                     GATHERED, stored)
    else:
        finish: gl.constexpr = store_hidden_dealt if DEALT else store_hidden
        consume(hidden_ptr, F8, k_steps, ring, finish, WG, GATHERED, 0, stored)


@gluon.jit
def consume_y(y_ptr, D8, k_steps, ring, DEALT: gl.constexpr, LATE: gl.constexpr, WG: gl.constexpr,
              stored=None):
    """A consumer of down. DEALT: weights are dealt out; LATE: tiles are stored late. stored: consume's."""
    if LATE:
        store: gl.constexpr = store_pairs_dealt if DEALT else store_pairs
        consume_late(y_ptr, D8, k_steps, ring, no_parts, keep_y, _ROUNDED_PARTS, store_part, store, WG, False,
                     stored)
    else:
        finish: gl.constexpr = store_y_dealt if DEALT else store_y
        consume(y_ptr, D8, k_steps, ring, finish, WG, False, 0, stored)


# -------------------------------------------------------------------------------- down begins before up has ended
@gluon.jit
def produce_hidden(hidden_desc, down_desc, walk, edges, claimed_ptr, D, ring, done_up_ptr, F8, EARLY: gl.constexpr,
                   done_ptr=None, stored=None):
    """produce_rows of hidden. EARLY: up_gather_kernel is the kernel before, and may still be at its last part. The rows
    of groups that lie in its first part are whole once that is stored; before others, up has to have ended."""
    if EARLY:
        _tiles_ptr, total, column_tiles, _k_steps = walk
        up_columns = gl.cdiv(F8 * 16, _BLOCK_N)
        part = first_part(total // column_tiles * up_columns)
        wait_for(done_up_ptr, part)
        fence_async_global(1)
        produce_rows(hidden_desc, down_desc, walk, edges, claimed_ptr, D, ring, begin_tile=wait_for_up,
                     counters=part // up_columns, done_ptr=done_ptr, stored=stored)
        gdc_wait()  # so that down has not ended before up has, whoever had which tiles
    else:
        produce_rows(hidden_desc, down_desc, walk, edges, claimed_ptr, D, ring, done_ptr=done_ptr, stored=stored)


# ------------------------------------------------------------------------------------------------------- kernels
# D8 and F8 are not specialised: known to divide by 16 they buy nothing, and cost a spill in tall_gemm.py.
@gluon.jit(do_not_specialize=["D8", "F8"])
def up_gather_kernel(
    x_ptr,  # (T, D) bf16
    token_of_row_ptr,  # (R,) int32
    claimed_ptr,  # (1,) int32, zero
    gate_up_desc,  # (E, 2F, D) bf16, gate and up rows interleaved, as describe_weights has it
    hidden_ptr,  # (R, F) bf16
    tiles_ptr,  # (X, 5) int32
    tile_count_ptr,  # (1,) int32
    D8,
    F8,
    done_ptr,  # (2,) int32, zeros
    LATE: gl.constexpr,
    EVEN_K: gl.constexpr,
):
    """hidden = silu(x[token] @ gate.T) * (x[token] @ up.T), gather and SwiGLU fused. D8 and F8 are D / 8 and F / 8.
    done: output tiles of its first part that are stored, and of the rest (first_part in waiting.py). EVEN_K: D is a
    multiple of 64.

    Grid (SMs,): a program owns the tiles that it claims, of 128 rows by 128 hidden columns. Float32 accumulators.
    """
    dealt: gl.constexpr = len(gate_up_desc.block_type.shape) == 5
    ring = open_ring(128 + 1)
    stored = open_barriers(1, _WARPGROUPS)
    follow()
    walk = walk_tiles(tiles_ptr, tile_count_ptr, F8 * 16, D8 * 8)
    gl.warp_specialize([
        (consume_hidden, (hidden_ptr, F8, walk[3], ring, dealt, LATE, 0, True, stored)),
        (consume_hidden, (hidden_ptr, F8, walk[3], ring, dealt, LATE, 1, True, stored)),
        (produce_gathered, (x_ptr, token_of_row_ptr, D8, gate_up_desc, walk, claimed_ptr, F8 * 16, ring, EVEN_K,
                            None, None, done_ptr, stored)),
    ], [4, 4], [216, 72])


@gluon.jit(do_not_specialize=["D8", "F8"])
def up_rows_kernel(
    rows_desc,  # (R, D) bf16
    claimed_ptr,  # (1,) int32, zero
    gate_up_desc,  # (E, 2F, D) bf16, gate and up rows interleaved, as describe_weights has it
    hidden_ptr,  # (R, F) bf16
    tiles_ptr,  # (X, 5) int32
    tile_count_ptr,  # (1,) int32
    D8,
    F8,
    LATE: gl.constexpr,
):
    """hidden = silu(rows @ gate.T) * (rows @ up.T), rows gathered before. D8 and F8 are D / 8 and F / 8.

    Grid (SMs,): a program owns the tiles that it claims, of 128 rows by 128 hidden columns. Float32 accumulators.
    """
    dealt: gl.constexpr = len(gate_up_desc.block_type.shape) == 5
    ring = open_ring(1)
    follow()
    walk = walk_tiles(tiles_ptr, tile_count_ptr, F8 * 16, D8 * 8)
    gl.warp_specialize([
        (consume_hidden, (hidden_ptr, F8, walk[3], ring, dealt, LATE, 0, False)),
        (consume_hidden, (hidden_ptr, F8, walk[3], ring, dealt, LATE, 1, False)),
        (produce_rows, (rows_desc, gate_up_desc, walk, one_band(walk), claimed_ptr, F8 * 16, ring)),
    ], [4, 1], [232, 32])


@gluon.jit(do_not_specialize=["D8", "F8"])
def down_kernel(
    claimed_ptr,  # (1,) int32, zero
    hidden_desc,  # (R, F) bf16
    down_desc,  # (E, D, F) bf16, as describe_weights has it
    y_ptr,  # (R, D) bf16
    tiles_ptr,  # (X, 5) int32
    tile_count_ptr,  # (1,) int32
    D8,
    F8,
    done_up_ptr,  # (2,) int32, up_gather_kernel's
    LATE: gl.constexpr,
    EARLY: gl.constexpr,
):
    """y = hidden @ down.T. D8 and F8 are D / 8 and F / 8. EARLY: produce_hidden's.

    Grid (SMs,): a program owns the tiles that it claims, of 128 rows by 256 columns. Float32 accumulators.
    """
    dealt: gl.constexpr = len(down_desc.block_type.shape) == 5
    ring = open_ring(1)
    begin(EARLY)
    walk = walk_tiles(tiles_ptr, tile_count_ptr, D8 * 8, F8 * 8)
    gl.warp_specialize([
        (consume_y, (y_ptr, D8, walk[3], ring, dealt, LATE, 0)),
        (consume_y, (y_ptr, D8, walk[3], ring, dealt, LATE, 1)),
        (produce_hidden, (hidden_desc, down_desc, walk, one_band(walk), claimed_ptr, D8 * 8, ring, done_up_ptr, F8,
                          EARLY)),
    ], [4, 1], [232, 32])


@gluon.jit(do_not_specialize=["N8", "K8"])
def straight_kernel(
    claimed_ptr,  # (1,) int32, zero
    rows_desc,  # (R, K) bf16
    weights_desc,  # (E, K, N) bf16
    out_ptr,  # (R, N) bf16
    tiles_ptr,  # (X, 5) int32
    tile_count_ptr,  # (1,) int32
    N8,
    K8,
    LATE: gl.constexpr,
):
    """out = rows @ weights. Here N and K are the output's width and the inner one, N8 and K8 an eighth of them.

    Grid (SMs,): a program owns the tiles that it claims, of 128 rows by 256 columns. Float32 accumulators.
    """
    ring = open_ring(1, True)
    follow()
    walk = walk_tiles(tiles_ptr, tile_count_ptr, N8 * 8, K8 * 8)
    gl.warp_specialize([
        (consume_y, (out_ptr, N8, walk[3], ring, False, LATE, 0)),
        (consume_y, (out_ptr, N8, walk[3], ring, False, LATE, 1)),
        (produce_rows, (rows_desc, weights_desc, walk, one_band(walk), claimed_ptr, K8 * 8, ring)),
    ], [4, 1], [232, 32])


# ----------------------------------------------------------------------------------------------------- launchers
def up_operands(
    rows: torch.Tensor, R: int, gate_up_E2FD: torch.Tensor, plan: TilePlan, hidden_RF: torch.Tensor, tile_rows: int
) -> tuple:
    """Check what all up kernels take; (gate_up_desc, hidden, tiles, tile_count, D8, F8) as they take it."""
    E, two_F, D = gate_up_E2FD.shape
    F = two_F // 2
    check_gemm(E, D, F, plan, tile_rows)
    check("x_TD or rows_RD", rows, (rows.shape[0], D))
    check("gate_up_E2FD", gate_up_E2FD, (E, 2 * F, D))
    check_out("hidden_RF", hidden_RF, (R, F))
    return describe_weights(gate_up_E2FD, True), hidden_RF, plan.tiles_X5, plan.tile_count, D // 8, F // 8


def down_operands(
    hidden_RF: torch.Tensor, down_EDF: torch.Tensor, plan: TilePlan, y_RD: torch.Tensor, tile_rows: int
) -> tuple:
    """Check what all down kernels take; (hidden_desc, down_desc, y, tiles, tile_count, D8, F8) as they take it."""
    (E, D, F), R = down_EDF.shape, hidden_RF.shape[0]
    check_gemm(E, D, F, plan, tile_rows)
    check("hidden_RF", hidden_RF, (R, F))
    check("down_EDF", down_EDF, (E, D, F))
    check_out("y_RD", y_RD, (R, D))
    descriptors = describe(hidden_RF, ROWS), describe_weights(down_EDF)
    return *descriptors, y_RD, plan.tiles_X5, plan.tile_count, D // 8, F // 8


def up_gather(
    x_TD: torch.Tensor,
    token_of_row_R: torch.Tensor,
    gate_up_E2FD: torch.Tensor,
    plan: TilePlan,
    hidden_RF: torch.Tensor,
    programs: int,
) -> None:
    """hidden_RF = SwiGLU of the rows' tokens through their experts' interleaved gate_up_E2FD.

    All bf16 and contiguous but token_of_row_R (R,) int32; a plan in tiles of 128 rows that no other up projection has
    used; programs: the GPU's SMs.
    Raises ValueError for other shapes, dtypes or plans, and unless D and F are multiples of 8.
    """
    R = token_of_row_R.numel()
    check("token_of_row_R", token_of_row_R, (R,), torch.int32)
    operands = up_operands(x_TD, R, gate_up_E2FD, plan, hidden_RF, 128)
    if R > 0:
        plan.count_once("up")
        plan.count_parts(programs)
        launch(up_gather_kernel, (programs,), x_TD, token_of_row_R, plan.claimed_up, *operands, plan.done_up,
               LATE=finishes_late(x_TD.shape[1], HIDDEN_PARTS), EVEN_K=x_TD.shape[1] % BLOCK_K == 0, **FOLLOW)


def up_rows(
    rows_RD: torch.Tensor, gate_up_E2FD: torch.Tensor, plan: TilePlan, hidden_RF: torch.Tensor, programs: int
) -> None:
    """hidden_RF = SwiGLU of rows_RD, gathered before, through their experts' interleaved gate_up_E2FD.

    All bf16 and contiguous; a plan in tiles of 128 rows that no other up projection has used; programs: the GPU's SMs.
    Raises ValueError for other shapes, dtypes or plans, and unless D and F are multiples of 8.
    """
    R = rows_RD.shape[0]
    operands = up_operands(rows_RD, R, gate_up_E2FD, plan, hidden_RF, 128)
    if R > 0:
        plan.count_once("up")
        launch(up_rows_kernel, (programs,), describe(rows_RD, ROWS), plan.claimed_up, *operands,
               LATE=finishes_late(rows_RD.shape[1], HIDDEN_PARTS), **FOLLOW)


def down(
    hidden_RF: torch.Tensor, down_EDF: torch.Tensor, plan: TilePlan, y_RD: torch.Tensor, programs: int,
    early: bool = False,
) -> None:
    """y_RD = hidden_RF through their experts' down_EDF.

    early: begin while up_gather, launched just before on the same stream with the same plan and programs, is at its
    last tiles; y_RD then must be older than up_gather's launch, so that nothing before reads or writes there.

    All bf16 and contiguous; a plan in tiles of 128 rows that no other down projection has used; programs: the GPU's
    SMs. Raises ValueError for other shapes, dtypes or plans, and unless D and F are multiples of 8.
    """
    if hidden_RF.shape[0] > 0:  # TMA describes no empty matrix
        operands = down_operands(hidden_RF, down_EDF, plan, y_RD, 128)
        if early:
            plan.require_parts(programs)
        plan.count_once("down")
        launch(down_kernel, (programs,), plan.claimed_down, *operands, plan.done_up, EARLY=early,
               LATE=finishes_late(hidden_RF.shape[1], ROUNDED_PARTS), **FOLLOW)


def straight(
    rows_RK: torch.Tensor, weights_EKN: torch.Tensor, plan: TilePlan, out_RN: torch.Tensor, programs: int
) -> None:
    """out_RN = rows_RK @ weights_EKN[e], the rows' experts' weights as they lie: what `down` is transposed.

    All bf16 and contiguous; a plan in tiles of 128 rows that no other down projection has used; programs: the GPU's
    SMs. Raises ValueError for other shapes, dtypes or plans, and unless N and K are multiples of 8.
    """
    (E, K, N), R = weights_EKN.shape, rows_RK.shape[0]
    check_gemm(E, N, K, plan, 128)
    check("rows_RK", rows_RK, (R, K))
    check("weights_EKN", weights_EKN, (E, K, N))
    check_out("out_RN", out_RN, (R, N))
    if R > 0:
        plan.count_once("down")
        weights = TensorDescriptor.from_tensor(weights_EKN, [1, BLOCK_K, BLOCK_N], _SWIZZLED_3D.value)
        launch(straight_kernel, (programs,), plan.claimed_down, describe(rows_RK, ROWS), weights, out_RN, plan.tiles_X5,
               plan.tile_count, N // 8, K // 8, LATE=finishes_late(K, ROUNDED_PARTS), **FOLLOW)
