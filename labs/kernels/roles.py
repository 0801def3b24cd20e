"""The warp roles that the Hopper GEMMs share, in Triton's Gluon: tiles of 128x256, one program an SM.

Three parties share a ring of 4 stages, each 128 rows and 256 weight rows by 64 of the inner dimension, 48 KB:

    producer                                      consumers: warpgroups 0 and 1, 64 rows each
    claim a tile, look it up, tell in stage s     wait full[s], read what tile it is
    gather: 4 warps, cp.async the rows, TMA the   wait full[s]
            weights; 129 arrivals; gathering.py   wgmma 64x256x64 from stage s, one left in flight
    rows:   1 warp, TMA both; 1 arrival           arrive empty[s - 1]: 2 arrivals
    wait empty[s] before either                   after the last step: the kernel's own `finish`; or late, beside
                                                  the next tile's steps (late_store.py)

A program claims its next output tile from a counter that all share. So tiles are begun in their order whatever each
costs, the row tiles of a group meet in L2 over the weights they share, and no program is done long before the others.
So an expert's last tile may cost what it holds: of 64 rows or fewer only one warpgroup multiplies, which one the column
says, and the other passes the stages on.

    index array     shape   from -> to
    token_of_row_R  (R,)    row -> token
    tiles_X5        (X, 5)  row tile -> expert, first row, rows in use, first tile and size of its group (tiles.py)
    claimed         (1,)    output tiles that programs have taken; zero at the start (tiles.py)

Determinism: an output element is one accumulator's sum in one order, whatever the schedule.
"""

from __future__ import annotations

import torch

from labs.kernels.tiles import FIELDS, ROWS
from labs.kernels.waiting import announce, count_tile, leave, leaving

from triton.experimental import gluon  # after common.level, which tiles imports
from triton.experimental.gluon import language as gl
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
# function through warp_specialize only as a constexpr, so up_ahead.py says `begin_tile: gl.constexpr = ...` first;
# and what waits for a role's other threads has another name (waiting.py).

BLOCK_N = 256  # weight rows of a tile: the widest wgmma, so the fewest reads of shared memory
BLOCK_K = 64  # 128 bytes, one swizzle row

_ROWS = gl.constexpr(ROWS)
_BLOCK_N = gl.constexpr(BLOCK_N)
_BLOCK_K = gl.constexpr(BLOCK_K)
_FIELDS = gl.constexpr(FIELDS)
_STAGES = gl.constexpr(4)
_WARPGROUPS = gl.constexpr(2)
_TILE_ROWS = gl.constexpr(2 * ROWS)
_LEAD = gl.constexpr(8)  # K steps before a tile's end at which the next one is claimed: its look-up takes some of them
_ROW_BYTES = gl.constexpr(ROWS * BLOCK_K * 2)
_WEIGHT_BYTES = gl.constexpr(BLOCK_N * BLOCK_K * 2)
_SWIZZLED = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
_SWIZZLED_3D = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3))
_SWIZZLED_5D = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=5))
_ACC = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16]))
_ACC_HALF = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N // 2, 16]))
_ACC_QUARTER = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N // 4, 16]))
_ACC_EIGHTH = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N // 8, 16]))
_FLAT = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))


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
    """find_tile, with no rows past the last tile: its loads then can run ahead of their use."""
    inside = gl.maximum(gl.minimum(tile, total - 1), 0)
    expert, row, used, column, row_tile = find_tile(tiles_ptr, inside, column_tiles)
    return expert, row, gl.where(tile < total, used, 0), column, row_tile


@gluon.jit
def walk_tiles(tiles_ptr, tile_count_ptr, N, K):
    """What a walk through all output tiles needs: the table, how many tiles there are, column tiles, K steps."""
    column_tiles = gl.cdiv(N, _BLOCK_N)
    return tiles_ptr, gl.load(tile_count_ptr) * column_tiles, column_tiles, gl.cdiv(K, _BLOCK_K)


@gluon.jit
def edge_of(edges, band):
    """The first column tile of band 0, 1 or 2, or the end of the last. edges: of bands 1 and 2, the end of all where
    there is none, and that end."""
    second, third, end = edges
    return gl.where(band == 0, 0, gl.where(band == 1, second, gl.where(band == 2, third, end)))


@gluon.jit
def band_of(edges, column):
    """The band of a column tile."""
    second, third, _ = edges
    return (column >= second).to(gl.int32) + (column >= third).to(gl.int32)


@gluon.jit
def one_band(walk):
    """The edges of all columns as one band."""
    return walk[2], walk[2], walk[2]


@gluon.jit
def find_band(walk, edges, tile):
    """An output tile's band -> (its number in the band, the band's column tiles, the first of them, band)."""
    _tiles_ptr, total, column_tiles, _ = walk
    row_tiles = gl.maximum(total // column_tiles, 1)
    inside = gl.maximum(gl.minimum(tile, total - 1), 0)
    band = band_of(edges, inside // row_tiles)  # a band comes after all row tiles of the columns before it
    first_column = edge_of(edges, band)
    return inside - first_column * row_tiles, edge_of(edges, band + 1) - first_column, first_column, band


# A look-up in parts: what a part asks for stays in lanes until it is taken out. A scalar would go to a uniform register
# at once, and the role would wait for it there.
@gluon.jit
def ask_claim(claimed_ptr, WARPS: gl.constexpr):
    """Take the next output tile that no program has. Its number is in one lane of a role of WARPS warps."""
    thread = gl.arange(0, 32 * WARPS, layout=gl.BlockedLayout([1], [32], [WARPS], [0]))
    first = thread == 0
    return gl.atomic_add(claimed_ptr + thread, first.to(gl.int32), mask=first, sem="relaxed", scope="gpu")


@gluon.jit
def claimed_tile(asked):
    """The number that ask_claim took, to all threads: as a scalar of one lane it would go through shared memory, with
    no barrier in a role of one warp."""
    thread = gl.arange(0, asked.shape[0], layout=asked.type.layout)
    return gl.sum(gl.where(thread == 0, asked, 0), axis=0)


@gluon.jit
def ask_entry(tiles_ptr, row_tile, WARPS: gl.constexpr):
    """A row tile's entry in the table, a field a lane."""
    lane = gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [WARPS], [0]))
    return gl.load(tiles_ptr + row_tile * _FIELDS + lane, mask=lane < _FIELDS, other=0)


@gluon.jit
def field(entry, i: gl.constexpr):
    """Field i of what ask_entry asked for, to all threads."""
    lane = gl.arange(0, 32, layout=entry.type.layout)
    return gl.sum(gl.where(lane == i, entry, 0), axis=0)


@gluon.jit
def claim(claimed_ptr, WARPS: gl.constexpr):
    """The number of the next output tile that no program has; for all threads of a role of WARPS warps."""
    return claimed_tile(ask_claim(claimed_ptr, WARPS))


@gluon.jit
def look_up_at(k_steps):
    """K steps of a tile after which the next one is claimed, its group, its entry and its rows' tokens are asked for:
    each when the one before should be there. In a tile of fewer, those whose step has passed, before the first."""
    return (gl.maximum(k_steps - _LEAD, 0), gl.maximum(k_steps - _LEAD + 2, 0), gl.maximum(k_steps - _LEAD + 4, 0),
            gl.maximum(k_steps - _LEAD + 6, 0))


@gluon.jit
def next_stage(stage, phase, STAGES: gl.constexpr):
    """The ring's next stage; the phase turns over with each round."""
    last = stage == STAGES - 1
    return gl.where(last, 0, stage + 1), gl.where(last, phase ^ 1, phase)


# ------------------------------------------------------------------------------------------------- shared memory
@gluon.jit
def open_stages(STAGES: gl.constexpr, WARPGROUPS: gl.constexpr, STRAIGHT: gl.constexpr = False):
    """The ring's buffers, bf16: rows (STAGES * WARPGROUPS, 64, 64), and weights (STAGES, 256, 64), or (STAGES, 64, 256)
    where their rows are the inner dimension (STRAIGHT)."""
    rows = gl.allocate_shared_memory(gl.bfloat16, [STAGES * WARPGROUPS, _ROWS, _BLOCK_K], _SWIZZLED)
    height: gl.constexpr = _BLOCK_K if STRAIGHT else _BLOCK_N
    width: gl.constexpr = _BLOCK_N if STRAIGHT else _BLOCK_K
    weights = gl.allocate_shared_memory(gl.bfloat16, [STAGES, height, width], _SWIZZLED)
    return rows, weights


@gluon.jit
def open_barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """COUNT barriers whose phase ends with ARRIVALS arrivals and the bytes that these announced."""
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(barriers.index(i), count=ARRIVALS)
    return barriers


@gluon.jit
def open_ring(FULL_ARRIVALS: gl.constexpr, STRAIGHT: gl.constexpr = False):
    """Buffers and barriers of the ring that producer and consumers share, and what tile a stage is the first of."""
    rows, weights = open_stages(_STAGES, _WARPGROUPS, STRAIGHT)
    told = gl.allocate_shared_memory(gl.int32, [_STAGES, 4], _FLAT)
    full = open_barriers(_STAGES, FULL_ARRIVALS)
    empty = open_barriers(_STAGES, _WARPGROUPS)
    fence_async_shared()  # TMA, another proxy than the one that wrote them, is to see the barriers set up
    return rows, weights, told, full, empty


@gluon.jit
def tell(ring, stage, phase, row, used, column, left, WARPS: gl.constexpr):
    """Wait until the stage is free, then say what tile starts there: first row, rows in use, column tile; and, if it is
    the program's first of a band, what the program leaves (`leaving`), else 0."""
    _rows, _weights, told, _full, empty = ring
    mbarrier.wait(empty.index(stage), phase ^ 1)
    i = gl.arange(0, 4, layout=gl.BlockedLayout([4], [32], [WARPS], [0]))
    fields = gl.where(i == 0, row, gl.where(i == 1, used, gl.where(i == 2, column, left)))
    told.index(stage).store(fields)


@gluon.jit
def listen(ring, stage, phase):
    """Wait for the stage and return what `tell` said, to all threads of a warpgroup."""
    _rows, _weights, told, full, _empty = ring
    mbarrier.wait(full.index(stage), phase)
    layout: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
    i = gl.arange(0, 4, layout=layout)
    fields = told.index(stage).load(layout)
    return (gl.sum(gl.where(i == 0, fields, 0), axis=0), gl.sum(gl.where(i == 1, fields, 0), axis=0),
            gl.sum(gl.where(i == 2, fields, 0), axis=0), gl.sum(gl.where(i == 3, fields, 0), axis=0))


# ----------------------------------------------------------------------------------------------------- producers
@gluon.jit
def load_weight_rows(weights_desc, first_row, k, bar, memory, pred=True):
    """256 rows from first_row of all experts' weights on, their columns of step k, by TMA: dealt out or in their order,
    as `describe_weights` chose."""
    box: gl.constexpr = weights_desc.block_type.shape
    if len(box) == 5:
        period: gl.constexpr = _BLOCK_N // box[0]
        tma.async_copy_global_to_shared(weights_desc, [first_row // period, 0, 0, 0, k * _BLOCK_K], bar,
                                        memory._reinterpret(gl.bfloat16, box, _SWIZZLED_5D), pred=pred)
    else:
        tma.async_copy_global_to_shared(weights_desc, [first_row, k * _BLOCK_K], bar, memory, pred=pred)


@gluon.jit
def load_weights(weights_desc, expert, column, k, weight_rows, bar, weights, stage):
    """A stage's weights by TMA, as the descriptor's box says, zeros past their edges.

    [1, 64, 256]: of (experts, K, N), to be multiplied straight. [2, 128, 64]: of (2 * experts, F, K), 128 gate rows and
    the up rows of the same columns of F, transposed. Of two or five dimensions: `describe_weights`'s, transposed.
    """
    box: gl.constexpr = weights_desc.block_type.shape
    if len(box) != 3:
        load_weight_rows(weights_desc, expert * weight_rows + column * _BLOCK_N, k, bar, weights.index(stage))
    else:
        stage_of_box = weights.index(stage)._reinterpret(gl.bfloat16, box, _SWIZZLED_3D)
        if box[0] == 1:
            tma.async_copy_global_to_shared(weights_desc, [expert, k * _BLOCK_K, column * _BLOCK_N], bar, stage_of_box)
        else:
            tma.async_copy_global_to_shared(weights_desc, [2 * expert, column * (_BLOCK_N // 2), k * _BLOCK_K], bar,
                                            stage_of_box)


@gluon.jit
def load_steps(rows_desc, weights_desc, row, used, expert, column, weight_rows, first_k, end_k, stage, phase, ring):
    """K steps of an output tile by TMA: the weights, and 64 contiguous rows for each warpgroup that works."""
    rows, weights, _told, full, empty = ring
    whole = used > _ROWS
    first = gl.where(whole, 0, column % 2)  # the warpgroup that multiplies the first 64 rows
    for k in range(first_k, end_k):
        bar = full.index(stage)
        mbarrier.wait(empty.index(stage), phase ^ 1)
        mbarrier.expect(bar, _WEIGHT_BYTES + _WARPGROUPS * _ROW_BYTES, pred=whole)
        mbarrier.expect(bar, _WEIGHT_BYTES + _ROW_BYTES, pred=used <= _ROWS)
        load_weights(weights_desc, expert, column, k, weight_rows, bar, weights, stage)
        tma.async_copy_global_to_shared(rows_desc, [row, k * _BLOCK_K], bar, rows.index(stage * _WARPGROUPS + first))
        tma.async_copy_global_to_shared(rows_desc, [row + _ROWS, k * _BLOCK_K], bar,
                                        rows.index(stage * _WARPGROUPS + 1), pred=whole)
        stage, phase = next_stage(stage, phase, _STAGES)
    return stage, phase


@gluon.jit
def tell_end(ring, stage, phase, WARPS: gl.constexpr):
    """No more tiles."""
    _rows, _weights, _told, full, _empty = ring
    tell(ring, stage, phase, 0, 0, 0, 0, WARPS)
    mbarrier.arrive(full.index(stage))


@gluon.jit
def produce_rows(rows_desc, weights_desc, walk, edges, claimed_ptr, weight_rows, ring,
                 load_more: gl.constexpr = None, more=None, begin_tile: gl.constexpr = None, counters=None,
                 done_ptr=None, stored=None):
    """One warp fills the ring by TMA, band by band (edge_of). weight_rows: of an expert.

    load_more(more, row, used, column, stage, phase, ring, False), if given, fills further stages after a tile's last;
    begin_tile(counters, row_tile, used, end of its group), if given, comes before its first.
    done_ptr, if given: band -> output tiles of it that are stored (`announce`).
    """
    tiles_ptr, total, _, k_steps = walk
    claim_at, group_at, tile_at, _ = look_up_at(k_steps)
    stage = 0
    phase = 0
    claimed = claim(claimed_ptr, 1)
    tile, width, first_column, band = find_band(walk, edges, claimed)
    expert, row, used, column, row_tile = find_tile(tiles_ptr, tile, width)
    if begin_tile is not None:
        group_end = gl.load(tiles_ptr + row_tile * _FIELDS + 3) + gl.load(tiles_ptr + row_tile * _FIELDS + 4)
    used = gl.where(claimed < total, used, 0)
    column += first_column
    left = 0
    stored_phase = 0
    tiles = 0
    while used > 0:
        if begin_tile is not None:
            begin_tile(counters, row_tile, used, group_end)
        tell(ring, stage, phase, row, used, column, left, 1)
        stage, phase = load_steps(rows_desc, weights_desc, row, used, expert, column, weight_rows, 0, claim_at, stage,
                                  phase, ring)
        asked = ask_claim(claimed_ptr, 1)
        stage, phase = load_steps(rows_desc, weights_desc, row, used, expert, column, weight_rows, claim_at, group_at,
                                  stage, phase, ring)
        claimed = claimed_tile(asked)
        before = band + 0  # not `= band`: Triton drops a loop-carried name that starts as another's alias
        tile, width, first_column, band = find_band(walk, edges, claimed)
        group = ask_entry(tiles_ptr, tile // width, 1)
        stage, phase = load_steps(rows_desc, weights_desc, row, used, expert, column, weight_rows, group_at, tile_at,
                                  stage, phase, ring)
        first_row_tile = field(group, 3)
        size = field(group, 4)
        local = tile - first_row_tile * width
        row_tile = first_row_tile + local % size
        entry = ask_entry(tiles_ptr, row_tile, 1)
        stage, phase = load_steps(rows_desc, weights_desc, row, used, expert, column, weight_rows, tile_at, k_steps,
                                  stage, phase, ring)
        if load_more is not None:
            stage, phase = load_more(more, row, used, column, stage, phase, ring, False)
        if done_ptr is not None:
            left, stored_phase, tiles = count_tile(done_ptr, stored, left, stored_phase, tiles, before, band)
        expert = field(entry, 0)
        row = field(entry, 1)
        used = gl.where(claimed < total, field(entry, 2), 0)
        column = first_column + local // size
        if begin_tile is not None:
            group_end = first_row_tile + size
    tell_end(ring, stage, phase, 1)
    if done_ptr is not None:
        announce(done_ptr, gl.where(left == 0, leaving(band, tiles), left), stored, stored_phase)


# ----------------------------------------------------------------------------------------------------- consumers
@gluon.jit
def weights_of(weights, stage):
    """A stage's weights as wgmma wants them, (64, 256): inner dimension first."""
    tile = weights.index(stage)
    if weights.shape[1] != _BLOCK_K:
        tile = tile.permute((1, 0))
    return tile


@gluon.jit
def multiply_step(ring, stage, phase, acc, WG: gl.constexpr, GATHERED: gl.constexpr, USE_ACC: gl.constexpr = True):
    """Wait for a stage and multiply it; one wgmma stays in flight."""
    rows, weights, _told, full, _empty = ring
    mbarrier.wait(full.index(stage), phase)
    if GATHERED:
        fence_async_shared()  # cp.async wrote the rows through the generic proxy, wgmma reads through the other
    acc = warpgroup_mma(rows.index(stage * _WARPGROUPS + WG), weights_of(weights, stage), acc, use_acc=USE_ACC,
                        is_async=True)
    return warpgroup_mma_wait(1, deps=(acc,))


@gluon.jit
def multiply(ring, stage, phase, k_steps, WG: gl.constexpr, GATHERED: gl.constexpr, STEPS_BESIDE: gl.constexpr = 0,
             beside: gl.constexpr = None, store: gl.constexpr = None, given=None):
    """Warpgroup WG's 64x256 float32 accumulator over all K steps, with one wgmma left in flight between steps.

    beside(given, i, store), if given, comes beside step i + 1, for each i below STEPS_BESIDE; k_steps is more than
    these. It stands after the arrival, while that step's wgmma runs: among the instructions that start one, its stores
    would hold back the next.
    """
    _rows, _weights, _told, _full, empty = ring
    acc = gl.zeros([_ROWS, _BLOCK_N], gl.float32, _ACC)
    acc = multiply_step(ring, stage, phase, acc, WG, GATHERED, False)
    previous = stage
    stage, phase = next_stage(stage, phase, _STAGES)
    for i in gl.static_range(STEPS_BESIDE):
        acc = multiply_step(ring, stage, phase, acc, WG, GATHERED)
        mbarrier.arrive(empty.index(previous))
        beside(given, i, store)
        previous = stage
        stage, phase = next_stage(stage, phase, _STAGES)
    # The first step stands outside: with it inside, ptxas serialises the wgmmas.
    for _ in range(1 + STEPS_BESIDE, k_steps):
        acc = multiply_step(ring, stage, phase, acc, WG, GATHERED)
        mbarrier.arrive(empty.index(previous))
        previous = stage
        stage, phase = next_stage(stage, phase, _STAGES)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(empty.index(previous))
    return acc, stage, phase


@gluon.jit
def pass_on(ring, stage, phase, k_steps):
    """All K steps of a tile that is the other warpgroup's alone: take each stage for read as soon as it is full."""
    _rows, _weights, _told, full, empty = ring
    for _ in range(k_steps):
        mbarrier.wait(full.index(stage), phase)
        mbarrier.arrive(empty.index(stage))
        stage, phase = next_stage(stage, phase, _STAGES)
    return stage, phase


@gluon.jit
def multiply_share(out_ptr, width, row, used, column, k_steps, stage, phase, ring, finish: gl.constexpr,
                   WG: gl.constexpr, GATHERED: gl.constexpr, MORE_STAGES: gl.constexpr = 0):
    """Warpgroup WG's 64 rows of an output tile, multiplied and finished; of a tile of no more, all or nothing.

    MORE_STAGES: stages that the producer's load_more fills after a tile's last. `finish` then takes them from the ring.
    """
    whole = used > _ROWS
    if whole | (column % 2 == WG):
        acc, stage, phase = multiply(ring, stage, phase, k_steps, WG, GATHERED)
        first = row + gl.where(whole, WG * _ROWS, 0)
        if MORE_STAGES == 0:
            finish(out_ptr, width, acc, first, column, row + used)
        else:
            stage, phase = finish(out_ptr, width, acc, first, column, row + used, stage, phase, ring, WG)
    else:
        stage, phase = pass_on(ring, stage, phase, k_steps + MORE_STAGES)
    return stage, phase


@gluon.jit
def consume(out_ptr, width8, k_steps, ring, finish: gl.constexpr, WG: gl.constexpr, GATHERED: gl.constexpr,
            MORE_STAGES: gl.constexpr = 0, stored=None):
    """Warpgroup WG's share of every tile of this program. stored, if given: a barrier for `leave`."""
    stage = 0
    phase = 0
    row, used, column, left = listen(ring, stage, phase)
    while used > 0:
        if stored is not None and left > 0:
            leave(stored)
        stage, phase = multiply_share(out_ptr, width8 * 8, row, used, column, k_steps, stage, phase, ring, finish, WG,
                                      GATHERED, MORE_STAGES)
        row, used, column, left = listen(ring, stage, phase)
    if stored is not None:
        leave(stored)


# -------------------------------------------------------------------------------------------------------- launch
LAUNCH = {"num_warps": 4, "maxnreg": 168}  # 12 warps in all: 65536 registers / 384 threads, in steps of 8
FOLLOW = {**LAUNCH, "launch_pdl": True}  # of kernels that wait by themselves for the one before (`follow`)


def describe(matrix: torch.Tensor, block_rows: int) -> TensorDescriptor:
    """A TMA descriptor of a (rows, columns) bf16 matrix in boxes of block_rows x 64."""
    return TensorDescriptor.from_tensor(matrix, [block_rows, BLOCK_K], _SWIZZLED.value)


def describe_weights(weights_ENK: torch.Tensor, interleaved: bool = False) -> TensorDescriptor:
    """A TMA descriptor of all experts' bf16 weights, to be multiplied transposed, in boxes of 256 rows x 64.

    A thread of wgmma's accumulator holds columns 2q and 2q + 1 of every 8, q its place among four threads. So TMA deals
    the rows out: each of 32 goes to where its product comes to the thread that is to store it, which then holds
    8 neighbouring columns, and swaps none. The order is one of five dimensions, strided over the weights as they lie:
        weight row    32 b + 8 q + 2 j + p    ->    row of the box    32 b + 8 j + 2 q + p
    `interleaved`: gate and up rows in blocks of 8 (tiles.py), of 64 rows: 16 q + 2 j + p -> 8 j + 2 q + p, so that j
    from 4 on are up's. Where N is no multiple of 32, or 64 interleaved, rows stay as they are.
    (cuTensorMapEncodeTiled's documentation builds each stride from the one before. q's is four or eight times that of
    j, which is outside of it: the driver takes that, and tests of answers on a GPU would tell if one did not.)
    """
    E, N, K = weights_ENK.shape
    period = 64 if interleaved else 32
    if N % period:
        return describe(weights_ENK.flatten(0, 1), BLOCK_N)
    weights_B4J2K = weights_ENK.view(E * N // period, 4, period // 8, 2, K)
    return TensorDescriptor.from_tensor(weights_B4J2K.transpose(1, 2), [BLOCK_N // period, period // 8, 4, 2, BLOCK_K],
                                        _SWIZZLED_5D.value)
