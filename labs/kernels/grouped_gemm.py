"""Grouped GEMMs of a SwiGLU MoE layer for Hopper, in Triton's Gluon: tiles of 128x256, warp-specialised.

    x (T, D) --gather--> [up, SwiGLU] --> hidden (P, F) --> [down] --> y (P, D)

P rows hold the R = T*K routed rows sorted by expert. Every expert starts at a multiple of 64, the rows of one
warpgroup, so 64 output rows never belong to two experts and a store needs no row mask. Rows between an expert's
last and the next expert's first are padding: computed with its tile, stored, and read by nobody.

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
    offsets_E1      (E + 1,)  expert -> its first row of P, a multiple of 64; the last entry: rows in use, <= P
    token_of_row_P  (P,)      row -> token, -1 for padding
    row_of_slot_TK  (T, K)    token, slot -> row
    tiles_X5        (X, 5)    row tile -> expert, first row, 64-row blocks in use, first tile and size of its group

Determinism: an output element is one accumulator's sum in one order, whatever the schedule.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
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

# T tokens, D model width, F expert width, E experts, K top-k, R = T*K routed rows, P rows with padding.
# A tensor's suffix is its shape: x_TD is (T, D). In kernels M, N and K are the GEMM tile's axes.
# Gluon's API as used here and in tall_gemm.py is the same in Triton 3.6 and 3.7.1 but for one thing: 3.6 passes a
# function through warp_specialize only as a constexpr. So a kernel says `finish: gl.constexpr = store_hidden` first.

ROWS = 64  # of one warpgroup; every expert's first row is a multiple of it
BLOCK_N = 256  # weight rows of a tile: the widest wgmma, so the fewest reads of shared memory
BLOCK_K = 64  # 128 bytes, one swizzle row
INTERLEAVE = 8  # gate and up rows alternate in blocks of 8: one core matrix of the accumulator
GROUP = 32  # row tiles that walk through their expert's weights together
FIELDS = 5  # of a row tile's entry in the table

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
@triton.jit
def plan_tiles_kernel(
    offsets_ptr,  # (E + 1,) int32
    tiles_ptr,  # (X, 5) int32
    tile_count_ptr,  # (1,) int32
    E,
    BLOCKS: tl.constexpr,
    GROUP: tl.constexpr,
    E_POW2: tl.constexpr,
):
    """Write the table of row tiles, BLOCKS * 64 rows each, and how many there are.

    Grid (E,): program e owns the entries of expert e. A group is as many of an expert's row tiles as share weights
    in L2: its tiles in equal parts of at most GROUP.
    """
    expert = tl.program_id(0)
    e = tl.arange(0, E_POW2)
    row_start = tl.load(offsets_ptr + e, mask=e < E, other=0)
    row_end = tl.load(offsets_ptr + e + 1, mask=e < E, other=0)
    tiles = tl.cdiv(row_end - row_start, 64 * BLOCKS)
    first = tl.sum(tl.where(e < expert, tiles, 0))
    count = tl.sum(tl.where(e == expert, tiles, 0))
    if expert == E - 1:
        tl.store(tile_count_ptr, first + count)
        if first + count == 0:  # the GEMMs look at the first entry even when there is nothing to do
            field = tl.arange(0, 8)
            tl.store(tiles_ptr + field, (field == 4).to(tl.int32), mask=field < 5)
    start = tl.load(offsets_ptr + expert)
    end = tl.load(offsets_ptr + expert + 1)
    groups = tl.maximum(tl.cdiv(count, GROUP), 1)
    size = tl.maximum(tl.cdiv(count, groups), 1)
    for chunk in range(0, count, 128):
        i = chunk + tl.arange(0, 128)
        mask = i < count
        row = start + i * (64 * BLOCKS)
        group_first = i // size * size
        entry = tiles_ptr + (first + i) * 5
        tl.store(entry + 0, tl.zeros_like(i) + expert, mask)
        tl.store(entry + 1, row, mask)
        tl.store(entry + 2, tl.minimum(tl.cdiv(end - row, 64), BLOCKS), mask)
        tl.store(entry + 3, first + group_first, mask)
        tl.store(entry + 4, tl.minimum(size, count - group_first), mask)


@gluon.jit
def find_tile(tiles_ptr, tile, column_tiles):
    """Output tile -> (expert, first row, 64-row blocks in use, column tile). Row tiles run fastest within a group."""
    entry = tiles_ptr + tile // column_tiles * _FIELDS
    group_first = gl.load(entry + 3)
    group_size = gl.load(entry + 4)
    local = tile - group_first * column_tiles
    entry = tiles_ptr + (group_first + local % group_size) * _FIELDS
    return gl.load(entry), gl.load(entry + 1), gl.load(entry + 2), local // group_size


@gluon.jit
def find_tile_ahead(tiles_ptr, tile, total, column_tiles):
    """find_tile, with 0 blocks past the last tile: its loads then run a whole tile ahead of their use."""
    inside = gl.maximum(gl.minimum(tile, total - 1), 0)
    expert, row, blocks, column = find_tile(tiles_ptr, inside, column_tiles)
    return expert, row, gl.where(tile < total, blocks, 0), column


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
def produce_rows(rows_desc, weights_desc, walk, weight_rows, ring):
    """One warp fills the ring by TMA: 128 contiguous rows and 256 weight rows a stage."""
    tiles_ptr, total, column_tiles, k_steps = walk
    rows, weights, full, empty = ring
    stage = 0
    phase = 0
    grid = gl.num_programs(0)
    expert, row, _, column = find_tile_ahead(tiles_ptr, gl.program_id(0), total, column_tiles)
    for tile in range(gl.program_id(0), total, grid):
        after = find_tile_ahead(tiles_ptr, tile + grid, total, column_tiles)
        weight_row = expert * weight_rows + column * _BLOCK_N
        for k in range(k_steps):
            bar = full.index(stage)
            mbarrier.wait(empty.index(stage), phase ^ 1)
            mbarrier.expect(bar, _WEIGHT_BYTES + _WARPGROUPS * _ROW_BYTES)
            tma.async_copy_global_to_shared(weights_desc, [weight_row, k * _BLOCK_K], bar, weights.index(stage))
            for wg in gl.static_range(_WARPGROUPS):
                tma.async_copy_global_to_shared(rows_desc, [row + wg * _ROWS, k * _BLOCK_K], bar,
                                                rows.index(stage * _WARPGROUPS + wg))
            stage, phase = next_stage(stage, phase, _STAGES)
        expert, row, _, column = after


@gluon.jit
def produce_gathered(x_ptr, token_of_row_ptr, D8, weights_desc, walk, weight_rows, ring):
    """Four warps fill the ring: 128 rows of x by cp.async through token_of_row, zeros for padding; weights by TMA."""
    tiles_ptr, total, column_tiles, k_steps = walk
    rows, weights, full, empty = ring
    D = D8 * 8  # so the compiler knows that no 16-byte copy straddles a row's end
    r = gl.arange(0, _ROWS, layout=gl.SliceLayout(1, _GATHER))
    c = gl.arange(0, _BLOCK_K, layout=gl.SliceLayout(0, _GATHER))
    stage = 0
    phase = 0
    grid = gl.num_programs(0)
    expert, row, blocks, column = find_tile_ahead(tiles_ptr, gl.program_id(0), total, column_tiles)
    for tile in range(gl.program_id(0), total, grid):
        after = find_tile_ahead(tiles_ptr, tile + grid, total, column_tiles)
        weight_row = expert * weight_rows + column * _BLOCK_N
        token0 = gl.load(token_of_row_ptr + row + r)
        token1 = gl.load(token_of_row_ptr + row + _ROWS + r, mask=(r >= 0) & (blocks > 1), other=-1)
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
        expert, row, blocks, column = after


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
    _, row, blocks, column = find_tile_ahead(tiles_ptr, gl.program_id(0), total, column_tiles)
    for tile in range(gl.program_id(0), total, grid):
        after = find_tile_ahead(tiles_ptr, tile + grid, total, column_tiles)
        acc, stage, phase = multiply(ring, stage, phase, k_steps, WG, GATHERED)
        if blocks > WG:
            finish(out_ptr, width8 * 8, acc, row + WG * _ROWS, column)
        _, row, blocks, column = after


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
def store_rows(out_ptr, values, row, column, width):
    """Store 64 rows of bf16, 16 bytes a thread: no shared memory, no wait, no fence."""
    N: gl.constexpr = values.shape[1]
    swapped: gl.constexpr = _SWAPPED_256 if N == 256 else _SWAPPED_128
    wide: gl.constexpr = _WIDE_256 if N == 256 else _WIDE_128
    values = gl.convert_layout(values, swapped)
    # A no-op that keeps the two swaps apart: one is done by shuffles, two at once would go through shared memory.
    values = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [values], dtype=gl.bfloat16, is_pure=True, pack=2)
    values = gl.convert_layout(values, wide)
    r = row + gl.arange(0, _ROWS, layout=gl.SliceLayout(1, wide))
    c = column + gl.arange(0, N, layout=gl.SliceLayout(0, wide))
    gl.store(out_ptr + (r.to(gl.int64) * width)[:, None] + c[None, :], values, mask=(c < width)[None, :])


@gluon.jit
def store_hidden(hidden_ptr, F, acc, row, column_tile):
    """Epilogue of up: 64x256 of gate and up -> 64x128 of hidden."""
    store_rows(hidden_ptr, swiglu(acc).to(gl.bfloat16), row, column_tile * (_BLOCK_N // 2), F)


@gluon.jit
def store_y(y_ptr, D, acc, row, column_tile):
    """Epilogue of down: 64x256 of y."""
    store_rows(y_ptr, acc.to(gl.bfloat16), row, column_tile * _BLOCK_N, D)


# ------------------------------------------------------------------------------------------------------- kernels
@gluon.jit
def up_gather_kernel(
    x_ptr,  # (T, D) bf16
    token_of_row_ptr,  # (P,) int32
    gate_up_desc,  # (E * 2F, D) bf16, gate and up rows interleaved
    hidden_ptr,  # (P, F) bf16
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


@gluon.jit
def up_rows_kernel(
    rows_desc,  # (P, D) bf16
    gate_up_desc,  # (E * 2F, D) bf16, gate and up rows interleaved
    hidden_ptr,  # (P, F) bf16
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


@gluon.jit
def down_kernel(
    hidden_desc,  # (P, F) bf16
    down_desc,  # (E * D, F) bf16
    y_ptr,  # (P, D) bf16
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


@triton.jit
def spread_rows_kernel(
    x_ptr,  # (T, D) bf16
    row_of_slot_ptr,  # (T, K) int32
    rows_ptr,  # (P, D) bf16
    D,
    TOP_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """rows[row_of_slot[t, k]] = x[t]: a token is read once and written TOP_K times.

    Grid (T, cdiv(D, BLOCK_D)): a program owns BLOCK_D columns of one token.
    """
    token = tl.program_id(0).to(tl.int64)  # P * D passes 2**31 at real sizes
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < D
    values = tl.load(x_ptr + token * D + column, mask=inside)
    for k in tl.static_range(TOP_K):
        row = tl.load(row_of_slot_ptr + token * TOP_K + k).to(tl.int64)
        tl.store(rows_ptr + row * D + column, values, mask=inside)


# ----------------------------------------------------------------------------------------------------- launchers
LAUNCH = {"num_warps": 4, "maxnreg": 168}  # 12 warps in all: 65536 registers / 384 threads, in steps of 8


class TilePlan(NamedTuple):
    """The row tiles of one routing: tiles_X5 int32, tile_count int32 (1,), and the rows of a tile."""

    tiles_X5: torch.Tensor
    tile_count: torch.Tensor
    tile_rows: int


def check(name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> None:
    """Raise ValueError, saying what is needed, unless the tensor is contiguous and has this shape and dtype."""
    if tuple(tensor.shape) != shape or tensor.dtype != dtype or not tensor.is_contiguous():
        raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()}, "
                         f"but must be contiguous {dtype} {shape}")


def check_gemm(E: int, D: int, F: int, plan: TilePlan, tile_rows: int) -> None:
    """Raise ValueError for sizes that TMA cannot address, and for a plan made for other tiles."""
    if E < 1 or D < 8 or F < 8 or D % 8 or F % 8:
        raise ValueError(f"E={E} D={D} F={F}: E must be at least 1, D and F positive multiples of 8")
    if plan.tile_rows != tile_rows:
        raise ValueError(f"the plan has tiles of {plan.tile_rows} rows, this kernel has {tile_rows}")


def describe(matrix: torch.Tensor, block_rows: int) -> TensorDescriptor:
    """A TMA descriptor of a (rows, columns) bf16 matrix in boxes of block_rows x 64."""
    return TensorDescriptor.from_tensor(matrix, [block_rows, BLOCK_K], _SWIZZLED.value)


def interleave_gate_up(gate_up_E2FD: torch.Tensor) -> torch.Tensor:
    """Gate rows then up rows -> blocks of 8 gate rows and 8 up rows in turn, a copy (E, 2F, D). Once, at build.

    Raises ValueError unless F is a multiple of 8.
    """
    E, two_F, D = gate_up_E2FD.shape
    if two_F % (2 * INTERLEAVE):
        raise ValueError(f"2F={two_F}: F must be a multiple of {INTERLEAVE}")
    blocks = gate_up_E2FD.reshape(E, 2, two_F // 2 // INTERLEAVE, INTERLEAVE, D)
    return blocks.transpose(1, 2).reshape(E, two_F, D)


def padded_rows(R: int, E: int) -> int:
    """P: the most rows that R routed rows can need when each of E experts starts at a multiple of 64."""
    return (R + (ROWS - 1) * min(E, R)) // ROWS * ROWS


def plan_tiles(offsets_E1: torch.Tensor, P: int, tile_rows: int = 128, group: int = GROUP) -> TilePlan:
    """Cut each expert's rows into tiles of tile_rows, a multiple of 64; no host sync.

    offsets_E1 (E + 1,) int32, the last at most P, all multiples of 64 (for plain_gemm.py they may be any). Raises
    ValueError for other shapes or dtypes.
    """
    E = offsets_E1.numel() - 1
    check("offsets_E1", offsets_E1, (max(E, 1) + 1,), torch.int32)
    if tile_rows < ROWS or tile_rows % ROWS or group < 1:
        raise ValueError(f"tile_rows={tile_rows} group={group}: need a positive multiple of {ROWS}, and at least 1")
    tiles_X5 = offsets_E1.new_empty(triton.cdiv(P, tile_rows) + E, FIELDS)
    tile_count = offsets_E1.new_empty(1)
    plan_tiles_kernel[(E,)](
        offsets_E1, tiles_X5, tile_count, E,
        BLOCKS=tile_rows // ROWS, GROUP=group, E_POW2=triton.next_power_of_2(E), num_warps=4,
    )
    return TilePlan(tiles_X5, tile_count, tile_rows)


def spread_rows(x_TD: torch.Tensor, row_of_slot_TK: torch.Tensor, rows_PD: torch.Tensor) -> None:
    """rows_PD[row_of_slot_TK[t, k]] = x_TD[t]; padding rows are left as they are.

    x_TD (T, D) and rows_PD (P, D) of one dtype, row_of_slot_TK (T, K) int32, every entry in 0..P-1. Raises ValueError.
    """
    (T, D), K = x_TD.shape, row_of_slot_TK.shape[1]
    check("x_TD", x_TD, (T, D), rows_PD.dtype)
    check("row_of_slot_TK", row_of_slot_TK, (T, K), torch.int32)
    check("rows_PD", rows_PD, (rows_PD.shape[0], D), x_TD.dtype)
    if T > 0:
        block_D = min(1024, triton.next_power_of_2(D))
        grid = (T, triton.cdiv(D, block_D))
        spread_rows_kernel[grid](x_TD, row_of_slot_TK, rows_PD, D, TOP_K=K, BLOCK_D=block_D, num_warps=4)


def up_operands(
    rows: torch.Tensor, P: int, gate_up_E2FD: torch.Tensor, plan: TilePlan, hidden_PF: torch.Tensor, tile_rows: int
) -> tuple:
    """Check what all up kernels take; (gate_up_desc, hidden, tiles, tile_count, D8, F8) as they take it."""
    E, two_F, D = gate_up_E2FD.shape
    F = two_F // 2
    check_gemm(E, D, F, plan, tile_rows)
    check("x_TD or rows_PD", rows, (rows.shape[0], D))
    check("gate_up_E2FD", gate_up_E2FD, (E, 2 * F, D))
    check("hidden_PF", hidden_PF, (P, F))
    return describe(gate_up_E2FD.flatten(0, 1), BLOCK_N), hidden_PF, plan.tiles_X5, plan.tile_count, D // 8, F // 8


def down_operands(
    hidden_PF: torch.Tensor, down_EDF: torch.Tensor, plan: TilePlan, y_PD: torch.Tensor, tile_rows: int
) -> tuple:
    """Check what all down kernels take; (hidden_desc, down_desc, y, tiles, tile_count, D8, F8) as they take it."""
    (E, D, F), P = down_EDF.shape, hidden_PF.shape[0]
    check_gemm(E, D, F, plan, tile_rows)
    check("hidden_PF", hidden_PF, (P, F))
    check("down_EDF", down_EDF, (E, D, F))
    check("y_PD", y_PD, (P, D))
    descriptors = describe(hidden_PF, ROWS), describe(down_EDF.flatten(0, 1), BLOCK_N)
    return *descriptors, y_PD, plan.tiles_X5, plan.tile_count, D // 8, F // 8


def up_gather(
    x_TD: torch.Tensor,
    token_of_row_P: torch.Tensor,
    gate_up_E2FD: torch.Tensor,
    plan: TilePlan,
    hidden_PF: torch.Tensor,
    programs: int,
) -> None:
    """hidden_PF = SwiGLU of the rows' tokens through their experts' interleaved gate_up_E2FD; padding rows get zeros.

    All bf16 and contiguous but token_of_row_P (P,) int32; plan in tiles of 128 rows; programs: the GPU's SMs.
    Raises ValueError for other shapes, dtypes or plans, and unless D and F are multiples of 8.
    """
    P = token_of_row_P.numel()
    check("token_of_row_P", token_of_row_P, (P,), torch.int32)
    operands = up_operands(x_TD, P, gate_up_E2FD, plan, hidden_PF, 128)
    if P > 0:
        up_gather_kernel[(programs,)](x_TD, token_of_row_P, *operands, **LAUNCH)


def up_rows(
    rows_PD: torch.Tensor, gate_up_E2FD: torch.Tensor, plan: TilePlan, hidden_PF: torch.Tensor, programs: int
) -> None:
    """hidden_PF = SwiGLU of rows_PD, gathered before, through their experts' interleaved gate_up_E2FD.

    All bf16 and contiguous; plan in tiles of 128 rows; programs: the GPU's SMs. Padding rows give what they hold.
    Raises ValueError for other shapes, dtypes or plans, and unless D and F are multiples of 8.
    """
    P = rows_PD.shape[0]
    operands = up_operands(rows_PD, P, gate_up_E2FD, plan, hidden_PF, 128)
    if P > 0:
        up_rows_kernel[(programs,)](describe(rows_PD, ROWS), *operands, **LAUNCH)


def down(
    hidden_PF: torch.Tensor, down_EDF: torch.Tensor, plan: TilePlan, y_PD: torch.Tensor, programs: int
) -> None:
    """y_PD = hidden_PF through their experts' down_EDF.

    All bf16 and contiguous; plan in tiles of 128 rows; programs: the GPU's SMs. Padding rows give what they hold.
    Raises ValueError for other shapes, dtypes or plans, and unless D and F are multiples of 8.
    """
    if hidden_PF.shape[0] > 0:
        down_kernel[(programs,)](*down_operands(hidden_PF, down_EDF, plan, y_PD, 128), **LAUNCH)
