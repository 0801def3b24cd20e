"""Grouped GEMMs of a SwiGLU MoE layer for Hopper, in Triton's Gluon: tiles of 128x256, warp-specialised.

    x (T, D) --gather--> [up, SwiGLU] --> hidden (R, F) --> [down] --> y (R, D)

The R = T*K routed rows lie sorted by expert, without padding: a tile that reaches past its expert's end multiplies
zeros there (gathered rows) or the next expert's rows (rows by TMA), and stores neither.

One program an SM; it walks through the output tiles with its number, its number + grid, ... Three parties share
a ring of 4 stages, each 128 rows and 256 weight rows by 64 of the inner dimension, 48 KB:

    producer                                      consumers: warpgroups 0 and 1, 64 rows each
    gather: 4 warps, cp.async the rows, TMA the   wait full[s]
            weights; 128 + 1 arrivals on full[s]  wgmma 64x256x64 from stage s, one left in flight
    rows:   1 warp, TMA both; 1 arrival           arrive empty[s - 1]: 2 arrivals
    wait empty[s] before either                   after the last step: SwiGLU, 16-byte stores from registers

Every tile costs the same: a warpgroup whose 64 rows lie past the expert's end multiplies all the same and only
does not store. So programs stay in step, and the row tiles of a group meet in L2 over the weights they share.

    index array     shape     from -> to
    token_of_row_R  (R,)    row -> token
    tiles_X5        (X, 5)  row tile -> expert, first row, rows in use, first tile and size of its group (tiles.py)

Determinism: an output element is one accumulator's sum in one order, whatever the schedule.
"""

from __future__ import annotations

import torch

from labs.kernels.tiles import FIELDS, ROWS, TilePlan, check, check_gemm

from triton.experimental import gluon  # after common.level, which tiles imports
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# T tokens, D model width, F expert width, E experts, K top-k, R = T*K routed rows.
# A tensor's suffix is its shape: x_TD is (T, D). In kernels M, N and K are the GEMM tile's axes.
# Gluon's API as used here and in its neighbours is the same in Triton 3.6 and 3.7.1 but for two things: 3.6 passes a
# function through warp_specialize only as a constexpr, so a kernel says `finish: gl.constexpr = store_hidden` first;
# and what waits for a role's other threads has another name.

BLOCK_N = 256  # weight rows of a tile: the widest wgmma, so the fewest reads of shared memory
BLOCK_K = 64  # 128 bytes, one swizzle row

sync_threads = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier

_ROWS = gl.constexpr(ROWS)
_BLOCK_N = gl.constexpr(BLOCK_N)
_BLOCK_K = gl.constexpr(BLOCK_K)
_FIELDS = gl.constexpr(FIELDS)
_STAGES = gl.constexpr(4)
_WARPGROUPS = gl.constexpr(2)
_ROW_BYTES = gl.constexpr(ROWS * BLOCK_K * 2)
_WEIGHT_BYTES = gl.constexpr(BLOCK_N * BLOCK_K * 2)
_SWIZZLED = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
_ACC = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16]))
_ACC_HALF = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N // 2, 16]))
_GATHER = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))  # 16 bytes a thread, 8 threads a row


def _store_layouts(columns: int) -> tuple[gl.constexpr, gl.constexpr]:
    """Layouts of (64, columns) after one and after two swaps between the four threads of an accumulator row.

    A thread of wgmma's accumulator holds pairs of columns 8 apart. Swapping register bit 8 with lane bit 2, and
    then 16 with 4, leaves it 8 neighbouring columns: one 16-byte store.
    """
    high = [[0, 1 << bit] for bit in range(5, columns.bit_length() - 1)]

    def layout(registers: list[list[int]], lanes: list[list[int]]) -> gl.constexpr:
        registers = [[0, 1], *registers, [8, 0], *high]
        lanes = [*lanes, [1, 0], [2, 0], [4, 0]]
        return gl.constexpr(gl.DistributedLinearLayout(registers, lanes, [[16, 0], [32, 0]], [], [64, columns]))

    return layout([[0, 2], [0, 16]], [[0, 8], [0, 4]]), layout([[0, 2], [0, 4]], [[0, 8], [0, 16]])


_SWAPPED_128, _WIDE_128 = _store_layouts(128)
_SWAPPED_256, _WIDE_256 = _store_layouts(256)


# ------------------------------------------------------------------------------------------- which tile is next
@gluon.jit
def find_tile(tiles_ptr, tile, column_tiles):
    """Output tile -> (expert, first row, rows in use, column tile, row tile). Row tiles run fastest within a group."""
    entry = tiles_ptr + tile // column_tiles * _FIELDS
    group_first = gl.load(entry + 3)
    group_size = gl.load(entry + 4)
    local = tile - group_first * column_tiles
    row_tile = group_first + local % group_size
    entry = tiles_ptr + row_tile * _FIELDS
    return gl.load(entry), gl.load(entry + 1), gl.load(entry + 2), local // group_size, row_tile


@gluon.jit
def find_tile_ahead(tiles_ptr, tile, total, column_tiles):
    """find_tile, with no rows past the last tile: its loads then run a whole tile ahead of their use."""
    inside = gl.maximum(gl.minimum(tile, total - 1), 0)
    expert, row, used, column, row_tile = find_tile(tiles_ptr, inside, column_tiles)
    return expert, row, gl.where(tile < total, used, 0), column, row_tile


@gluon.jit
def walk_tiles(tiles_ptr, tile_count_ptr, N, K):
    """What a walk through all output tiles needs: the table, how many tiles there are, column tiles, K steps."""
    column_tiles = gl.cdiv(N, _BLOCK_N)
    return tiles_ptr, gl.load(tile_count_ptr) * column_tiles, column_tiles, gl.cdiv(K, _BLOCK_K)


@gluon.jit
def next_stage(stage, phase, STAGES: gl.constexpr):
    """The ring's next stage; the phase turns over with each round."""
    last = stage == STAGES - 1
    return gl.where(last, 0, stage + 1), gl.where(last, phase ^ 1, phase)


# ------------------------------------------------------------------------------------------------- shared memory
@gluon.jit
def open_stages(STAGES: gl.constexpr, WARPGROUPS: gl.constexpr):
    """The ring's buffers: rows (STAGES * WARPGROUPS, 64, 64) and weights (STAGES, 256, 64), bf16."""
    rows = gl.allocate_shared_memory(gl.bfloat16, [STAGES * WARPGROUPS, _ROWS, _BLOCK_K], _SWIZZLED)
    weights = gl.allocate_shared_memory(gl.bfloat16, [STAGES, _BLOCK_N, _BLOCK_K], _SWIZZLED)
    return rows, weights


@gluon.jit
def open_barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """COUNT barriers whose phase ends with ARRIVALS arrivals and the bytes that these announced."""
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(barriers.index(i), count=ARRIVALS)
    return barriers


@gluon.jit
def open_ring(FULL_ARRIVALS: gl.constexpr):
    """Buffers and barriers of the ring that producer and consumers share."""
    rows, weights = open_stages(_STAGES, _WARPGROUPS)
    full = open_barriers(_STAGES, FULL_ARRIVALS)
    empty = open_barriers(_STAGES, _WARPGROUPS)
    fence_async_shared()  # TMA, another proxy than the one that wrote them, is to see the barriers set up
    return rows, weights, full, empty


# ----------------------------------------------------------------------------------------------------- producers
@gluon.jit
def load_tile(rows_desc, weights_desc, row, weight_row, k_steps, stage, phase, ring):
    """All K steps of an output tile by TMA: 128 contiguous rows and 256 weight rows a stage."""
    rows, weights, full, empty = ring
    for k in range(k_steps):
        bar = full.index(stage)
        mbarrier.wait(empty.index(stage), phase ^ 1)
        mbarrier.expect(bar, _WEIGHT_BYTES + _WARPGROUPS * _ROW_BYTES)
        tma.async_copy_global_to_shared(weights_desc, [weight_row, k * _BLOCK_K], bar, weights.index(stage))
        for wg in gl.static_range(_WARPGROUPS):
            tma.async_copy_global_to_shared(rows_desc, [row + wg * _ROWS, k * _BLOCK_K], bar,
                                            rows.index(stage * _WARPGROUPS + wg))
        stage, phase = next_stage(stage, phase, _STAGES)
    return stage, phase


@gluon.jit
def produce_rows(rows_desc, weights_desc, walk, weight_rows, ring):
    """One warp fills the ring by TMA."""
    tiles_ptr, total, column_tiles, k_steps = walk
    stage = 0
    phase = 0
    grid = gl.num_programs(0)
    expert, row, _, column, _ = find_tile_ahead(tiles_ptr, gl.program_id(0), total, column_tiles)
    for tile in range(gl.program_id(0), total, grid):
        after = find_tile_ahead(tiles_ptr, tile + grid, total, column_tiles)
        weight_row = expert * weight_rows + column * _BLOCK_N
        stage, phase = load_tile(rows_desc, weights_desc, row, weight_row, k_steps, stage, phase, ring)
        expert, row, _, column, _ = after


@gluon.jit
def produce_gathered(x_ptr, token_of_row_ptr, D8, weights_desc, walk, weight_rows, ring):
    """Four warps fill the ring: 128 rows of x by cp.async through token_of_row, zeros past the expert's end, and
    weights by TMA."""
    tiles_ptr, total, column_tiles, k_steps = walk
    rows, weights, full, empty = ring
    D = D8 * 8  # so the compiler knows that no 16-byte copy straddles a row's end
    r = gl.arange(0, _ROWS, layout=gl.SliceLayout(1, _GATHER))
    c = gl.arange(0, _BLOCK_K, layout=gl.SliceLayout(0, _GATHER))
    stage = 0
    phase = 0
    grid = gl.num_programs(0)
    expert, row, used, column, _ = find_tile_ahead(tiles_ptr, gl.program_id(0), total, column_tiles)
    for tile in range(gl.program_id(0), total, grid):
        after = find_tile_ahead(tiles_ptr, tile + grid, total, column_tiles)
        weight_row = expert * weight_rows + column * _BLOCK_N
        token0 = gl.load(token_of_row_ptr + row + r, mask=r < used, other=-1)
        token1 = gl.load(token_of_row_ptr + row + _ROWS + r, mask=r + _ROWS < used, other=-1)
        rows0 = x_ptr + (token0.to(gl.int64) * D)[:, None] + c[None, :]  # T * D passes 2**31 at real sizes
        rows1 = x_ptr + (token1.to(gl.int64) * D)[:, None] + c[None, :]
        for k in range(k_steps):
            bar = full.index(stage)
            mbarrier.wait(empty.index(stage), phase ^ 1)
            mbarrier.expect(bar, _WEIGHT_BYTES)
            tma.async_copy_global_to_shared(weights_desc, [weight_row, k * _BLOCK_K], bar, weights.index(stage))
            inside = (k * _BLOCK_K + c < D)[None, :]
            async_copy.async_copy_global_to_shared(rows.index(stage * 2), rows0, (token0 >= 0)[:, None] & inside)
            async_copy.async_copy_global_to_shared(rows.index(stage * 2 + 1), rows1, (token1 >= 0)[:, None] & inside)
            async_copy.mbarrier_arrive(bar, increment_count=False)  # each thread's, once its own copies have landed
            rows0 += _BLOCK_K
            rows1 += _BLOCK_K
            stage, phase = next_stage(stage, phase, _STAGES)
        expert, row, used, column, _ = after


# ----------------------------------------------------------------------------------------------------- consumers
@gluon.jit
def multiply(ring, stage, phase, k_steps, WG: gl.constexpr, GATHERED: gl.constexpr):
    """Warpgroup WG's 64x256 float32 accumulator over all K steps, with one wgmma left in flight between steps."""
    rows, weights, full, empty = ring
    acc = gl.zeros([_ROWS, _BLOCK_N], gl.float32, _ACC)
    previous = 0  # not `= stage`: Triton drops a loop-carried name that starts as another's alias
    mbarrier.wait(full.index(stage), phase)
    if GATHERED:
        fence_async_shared()  # cp.async wrote the rows through the generic proxy, wgmma reads through the other
    acc = warpgroup_mma(rows.index(stage * _WARPGROUPS + WG), weights.index(stage).permute((1, 0)), acc,
                        use_acc=False, is_async=True)
    acc = warpgroup_mma_wait(1, deps=(acc,))
    previous += stage
    stage, phase = next_stage(stage, phase, _STAGES)
    for _ in range(1, k_steps):  # the first step stands outside: with it inside, ptxas serialises the wgmmas
        mbarrier.wait(full.index(stage), phase)
        if GATHERED:
            fence_async_shared()
        acc = warpgroup_mma(rows.index(stage * _WARPGROUPS + WG), weights.index(stage).permute((1, 0)), acc,
                            is_async=True)
        acc = warpgroup_mma_wait(1, deps=(acc,))
        mbarrier.arrive(empty.index(previous))
        previous = stage
        stage, phase = next_stage(stage, phase, _STAGES)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(empty.index(previous))
    return acc, stage, phase


@gluon.jit
def consume(out_ptr, width8, walk, ring, finish: gl.constexpr, WG: gl.constexpr, GATHERED: gl.constexpr):
    """Warpgroup WG of every tile of this program: multiply, then `finish` where its 64 rows are in use."""
    tiles_ptr, total, column_tiles, k_steps = walk
    stage = 0
    phase = 0
    grid = gl.num_programs(0)
    _, row, used, column, _ = find_tile_ahead(tiles_ptr, gl.program_id(0), total, column_tiles)
    for tile in range(gl.program_id(0), total, grid):
        after = find_tile_ahead(tiles_ptr, tile + grid, total, column_tiles)
        acc, stage, phase = multiply(ring, stage, phase, k_steps, WG, GATHERED)
        if used > WG * _ROWS:
            finish(out_ptr, width8 * 8, acc, row + WG * _ROWS, column, row + used)
        _, row, used, column, _ = after


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
def swiglu(acc):
    """(64, 256) gate and up columns in alternating blocks of 8 -> (64, 128); a pair sits in one thread's registers."""
    pairs = acc.reshape([_ROWS, _BLOCK_N // 16, 2, 8]).permute((0, 1, 3, 2))
    gate, up = pairs.split()
    hidden = gl.inline_asm_elementwise(_SILU_MUL, "=f,=f,f,f,f,f", [gate, up], dtype=gl.float32, is_pure=True, pack=2)
    return gl.convert_layout(hidden.reshape([_ROWS, _BLOCK_N // 2]), _ACC_HALF)


@gluon.jit
def store_rows(out_ptr, values, row, column, width, end):
    """Store those of 64 rows of bf16 before `end`, 16 bytes a thread: no shared memory, no wait, no fence."""
    N: gl.constexpr = values.shape[1]
    swapped: gl.constexpr = _SWAPPED_256 if N == 256 else _SWAPPED_128
    wide: gl.constexpr = _WIDE_256 if N == 256 else _WIDE_128
    values = gl.convert_layout(values, swapped)
    # A no-op that keeps the two swaps apart: one is done by shuffles, two at once would go through shared memory.
    values = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [values], dtype=gl.bfloat16, is_pure=True, pack=2)
    values = gl.convert_layout(values, wide)
    r = row + gl.arange(0, _ROWS, layout=gl.SliceLayout(1, wide))
    c = column + gl.arange(0, N, layout=gl.SliceLayout(0, wide))
    pointers = out_ptr + (r.to(gl.int64) * width)[:, None] + c[None, :]  # R * width passes 2**31 at real sizes
    gl.store(pointers, values, mask=(r < end)[:, None] & (c < width)[None, :])


@gluon.jit
def store_hidden(hidden_ptr, F, acc, row, column_tile, end):
    """Epilogue of up: 64x256 of gate and up -> 64x128 of hidden."""
    store_rows(hidden_ptr, swiglu(acc).to(gl.bfloat16), row, column_tile * (_BLOCK_N // 2), F, end)


@gluon.jit
def store_y(y_ptr, D, acc, row, column_tile, end):
    """Epilogue of down: 64x256 of y."""
    store_rows(y_ptr, acc.to(gl.bfloat16), row, column_tile * _BLOCK_N, D, end)


# ------------------------------------------------------------------------------------------------------- kernels
# D8 and F8 are not specialised: known to divide by 16 they buy nothing, and cost a spill in tall_gemm.py.
@gluon.jit(do_not_specialize=["D8", "F8"])
def up_gather_kernel(
    x_ptr,  # (T, D) bf16
    token_of_row_ptr,  # (R,) int32
    gate_up_desc,  # (E * 2F, D) bf16, gate and up rows interleaved
    hidden_ptr,  # (R, F) bf16
    tiles_ptr,  # (X, 5) int32
    tile_count_ptr,  # (1,) int32
    D8,
    F8,
):
    """hidden = silu(x[token] @ gate.T) * (x[token] @ up.T), gather and SwiGLU fused. D8 and F8 are D / 8 and F / 8.

    Grid (SMs,): a program owns every grid-th tile of 128 rows by 128 hidden columns. Float32 accumulators.
    """
    finish: gl.constexpr = store_hidden
    ring = open_ring(128 + 1)
    walk = walk_tiles(tiles_ptr, tile_count_ptr, F8 * 16, D8 * 8)
    gl.warp_specialize([
        (consume, (hidden_ptr, F8, walk, ring, finish, 0, True)),
        (consume, (hidden_ptr, F8, walk, ring, finish, 1, True)),
        (produce_gathered, (x_ptr, token_of_row_ptr, D8, gate_up_desc, walk, F8 * 16, ring)),
    ], [4, 4], [224, 56])


@gluon.jit(do_not_specialize=["D8", "F8"])
def up_rows_kernel(
    rows_desc,  # (R, D) bf16
    gate_up_desc,  # (E * 2F, D) bf16, gate and up rows interleaved
    hidden_ptr,  # (R, F) bf16
    tiles_ptr,  # (X, 5) int32
    tile_count_ptr,  # (1,) int32
    D8,
    F8,
):
    """hidden = silu(rows @ gate.T) * (rows @ up.T), rows gathered before. D8 and F8 are D / 8 and F / 8.

    Grid (SMs,): a program owns every grid-th tile of 128 rows by 128 hidden columns. Float32 accumulators.
    """
    finish: gl.constexpr = store_hidden
    ring = open_ring(1)
    walk = walk_tiles(tiles_ptr, tile_count_ptr, F8 * 16, D8 * 8)
    gl.warp_specialize([
        (consume, (hidden_ptr, F8, walk, ring, finish, 0, False)),
        (consume, (hidden_ptr, F8, walk, ring, finish, 1, False)),
        (produce_rows, (rows_desc, gate_up_desc, walk, F8 * 16, ring)),
    ], [4, 1], [240, 24])


@gluon.jit(do_not_specialize=["D8", "F8"])
def down_kernel(
    hidden_desc,  # (R, F) bf16
    down_desc,  # (E * D, F) bf16
    y_ptr,  # (R, D) bf16
    tiles_ptr,  # (X, 5) int32
    tile_count_ptr,  # (1,) int32
    D8,
    F8,
):
    """y = hidden @ down.T. D8 and F8 are D / 8 and F / 8.

    Grid (SMs,): a program owns every grid-th tile of 128 rows by 256 columns. Float32 accumulators.
    """
    finish: gl.constexpr = store_y
    ring = open_ring(1)
    walk = walk_tiles(tiles_ptr, tile_count_ptr, D8 * 8, F8 * 8)
    gl.warp_specialize([
        (consume, (y_ptr, D8, walk, ring, finish, 0, False)),
        (consume, (y_ptr, D8, walk, ring, finish, 1, False)),
        (produce_rows, (hidden_desc, down_desc, walk, D8 * 8, ring)),
    ], [4, 1], [240, 24])


# ----------------------------------------------------------------------------------------------------- launchers
LAUNCH = {"num_warps": 4, "maxnreg": 168}  # 12 warps in all: 65536 registers / 384 threads, in steps of 8


def describe(matrix: torch.Tensor, block_rows: int) -> TensorDescriptor:
    """A TMA descriptor of a (rows, columns) bf16 matrix in boxes of block_rows x 64."""
    return TensorDescriptor.from_tensor(matrix, [block_rows, BLOCK_K], _SWIZZLED.value)


def up_operands(
    rows: torch.Tensor, R: int, gate_up_E2FD: torch.Tensor, plan: TilePlan, hidden_RF: torch.Tensor, tile_rows: int
) -> tuple:
    """Check what all up kernels take; (gate_up_desc, hidden, tiles, tile_count, D8, F8) as they take it."""
    E, two_F, D = gate_up_E2FD.shape
    F = two_F // 2
    check_gemm(E, D, F, plan, tile_rows)
    check("x_TD or rows_RD", rows, (rows.shape[0], D))
    check("gate_up_E2FD", gate_up_E2FD, (E, 2 * F, D))
    check("hidden_RF", hidden_RF, (R, F))
    return describe(gate_up_E2FD.flatten(0, 1), BLOCK_N), hidden_RF, plan.tiles_X5, plan.tile_count, D // 8, F // 8


def down_operands(
    hidden_RF: torch.Tensor, down_EDF: torch.Tensor, plan: TilePlan, y_RD: torch.Tensor, tile_rows: int
) -> tuple:
    """Check what all down kernels take; (hidden_desc, down_desc, y, tiles, tile_count, D8, F8) as they take it."""
    (E, D, F), R = down_EDF.shape, hidden_RF.shape[0]
    check_gemm(E, D, F, plan, tile_rows)
    check("hidden_RF", hidden_RF, (R, F))
    check("down_EDF", down_EDF, (E, D, F))
    check("y_RD", y_RD, (R, D))
    descriptors = describe(hidden_RF, ROWS), describe(down_EDF.flatten(0, 1), BLOCK_N)
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

    All bf16 and contiguous but token_of_row_R (R,) int32; plan in tiles of 128 rows; programs: the GPU's SMs.
    Raises ValueError for other shapes, dtypes or plans, and unless D and F are multiples of 8.
    """
    R = token_of_row_R.numel()
    check("token_of_row_R", token_of_row_R, (R,), torch.int32)
    operands = up_operands(x_TD, R, gate_up_E2FD, plan, hidden_RF, 128)
    if R > 0:
        up_gather_kernel[(programs,)](x_TD, token_of_row_R, *operands, **LAUNCH)


def up_rows(
    rows_RD: torch.Tensor, gate_up_E2FD: torch.Tensor, plan: TilePlan, hidden_RF: torch.Tensor, programs: int
) -> None:
    """hidden_RF = SwiGLU of rows_RD, gathered before, through their experts' interleaved gate_up_E2FD.

    All bf16 and contiguous; plan in tiles of 128 rows; programs: the GPU's SMs.
    Raises ValueError for other shapes, dtypes or plans, and unless D and F are multiples of 8.
    """
    R = rows_RD.shape[0]
    operands = up_operands(rows_RD, R, gate_up_E2FD, plan, hidden_RF, 128)
    if R > 0:
        up_rows_kernel[(programs,)](describe(rows_RD, ROWS), *operands, **LAUNCH)


def down(
    hidden_RF: torch.Tensor, down_EDF: torch.Tensor, plan: TilePlan, y_RD: torch.Tensor, programs: int
) -> None:
    """y_RD = hidden_RF through their experts' down_EDF.

    All bf16 and contiguous; plan in tiles of 128 rows; programs: the GPU's SMs.
    Raises ValueError for other shapes, dtypes or plans, and unless D and F are multiples of 8.
    """
    if hidden_RF.shape[0] > 0:
        down_kernel[(programs,)](*down_operands(hidden_RF, down_EDF, plan, y_RD, 128), **LAUNCH)
