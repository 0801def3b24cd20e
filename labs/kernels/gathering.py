"""The producer that gathers: roles.py's ring filled with rows of x that lie wherever their tokens do.

    step of a tile     four warps: wait empty[s], cp.async 128 rows by 64 columns, TMA the weights
    while they copy    claim the next tile -> its group -> what tile it is -> its rows' tokens

Each arrow is a load that needs the one before, and takes as long as a K step or two. So the look-up is spread over a
tile's last eight steps (look_up_at in roles.py), and each load is waited for two steps after it is asked for.
"""

from __future__ import annotations

from labs.kernels.roles import (
    _BLOCK_K,
    _ROWS,
    _STAGES,
    _SWIZZLED,
    _TILE_ROWS,
    _WEIGHT_BYTES,
    ask_claim,
    ask_entry,
    claim,
    claimed_tile,
    field,
    find_tile_ahead,
    load_weights,
    look_up_at,
    next_stage,
    tell,
    tell_end,
)
from labs.kernels.waiting import announce, count_tile, first_part, leaving

from triton.experimental import gluon  # after common.level, which roles imports
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

# T tokens, D model width, R = T*K routed rows.

# 16 bytes a thread, 4 threads a row: with 8, a thread has twice as many rows, and an address and a predicate for each.
_LAYOUT = gl.constexpr(gl.BlockedLayout([1, 8], [8, 4], [4, 1], [1, 0]))


@gluon.jit
def rows_in_use(used, column):
    """Where in an expert's tile each of the ring's 128 rows lies, and whether one is there: a half tile lies with the
    warpgroup that works."""
    r = gl.arange(0, _TILE_ROWS, layout=gl.SliceLayout(1, _LAYOUT))
    place = r - gl.where(used > _ROWS, 0, column % 2 * _ROWS)
    return place, (place >= 0) & (place < used)


@gluon.jit
def load_tokens(token_of_row_ptr, row, used, column):
    """The tokens of a tile's rows, 0 where there is none."""
    place, inside = rows_in_use(used, column)
    return gl.load(token_of_row_ptr + row + place, mask=inside, other=0)


@gluon.jit
def gather_steps(source, inside, D, weights_desc, expert, column, weight_rows, first_k, end_k, stage, phase, ring,
                 EVEN_K: gl.constexpr):
    """K steps of an output tile: its rows by cp.async, zeros past the expert's end, and the weights by TMA. Returns the
    next stage and its phase.

    source (128, 64): pointers to the rows' first 64 columns; inside (128,): whether there is such a row.
    EVEN_K: D is a multiple of 64. No mask of columns then, which cost up to 1.2% of the kernel (LOG.md, row 44).
    """
    rows, weights, _told, full, empty = ring
    rows = rows._reinterpret(gl.bfloat16, [_STAGES, _TILE_ROWS, _BLOCK_K], _SWIZZLED)  # one copy a stage, not two
    c = gl.arange(0, _BLOCK_K, layout=gl.SliceLayout(0, _LAYOUT))
    for k in range(first_k, end_k):
        bar = full.index(stage)
        mbarrier.wait(empty.index(stage), phase ^ 1)
        mbarrier.expect(bar, _WEIGHT_BYTES)
        load_weights(weights_desc, expert, column, k, weight_rows, bar, weights, stage)
        mask = inside[:, None]
        if not EVEN_K:
            mask = mask & (k * _BLOCK_K + c < D)[None, :]
        async_copy.async_copy_global_to_shared(rows.index(stage), source + k * _BLOCK_K, mask)
        async_copy.mbarrier_arrive(bar, increment_count=False)  # each thread's, once its own copies have landed
        stage, phase = next_stage(stage, phase, _STAGES)
    return stage, phase


@gluon.jit
def produce_gathered(x_ptr, token_of_row_ptr, D8, weights_desc, walk, claimed_ptr, weight_rows, ring,
                     EVEN_K: gl.constexpr, load_more: gl.constexpr = None, more=None, done_ptr=None, stored=None):
    """Four warps fill the ring: rows of x (T, D) through token_of_row (R,), and weights. weight_rows: of an expert.

    load_more(more, row, used, column, stage, phase, ring, True), if given, fills further stages after a tile's last.
    done_ptr, if given: output tiles of the first part that are stored, and of the rest (first_part, announce).
    """
    tiles_ptr, total, column_tiles, k_steps = walk
    _rows, _weights, _told, full, _empty = ring
    D = D8 * 8  # so the compiler knows that no 16-byte copy straddles a row's end
    c = gl.arange(0, _BLOCK_K, layout=gl.SliceLayout(0, _LAYOUT))
    claim_at, group_at, tile_at, tokens_at = look_up_at(k_steps)
    stage = 0
    phase = 0
    claimed = claim(claimed_ptr, 4)
    band = (claimed >= first_part(total)).to(gl.int32)
    left = 0
    stored_phase = 0
    tiles = 0
    expert, row, used, column, _ = find_tile_ahead(tiles_ptr, claimed, total, column_tiles)
    token = load_tokens(token_of_row_ptr, row, used, column)
    while used > 0:
        tell(ring, stage, phase, row, used, column, left, 4)
        inside = rows_in_use(used, column)[1]
        source = x_ptr + (token.to(gl.int64) * D)[:, None] + c[None, :]  # T * D passes 2**31 at real sizes
        stage, phase = gather_steps(source, inside, D, weights_desc, expert, column, weight_rows, 0, claim_at, stage,
                                    phase, ring, EVEN_K)
        asked = ask_claim(claimed_ptr, 4)
        stage, phase = gather_steps(source, inside, D, weights_desc, expert, column, weight_rows, claim_at, group_at,
                                    stage, phase, ring, EVEN_K)
        claimed = claimed_tile(asked)
        tile = gl.maximum(gl.minimum(claimed, total - 1), 0)
        group = ask_entry(tiles_ptr, tile // column_tiles, 4)
        stage, phase = gather_steps(source, inside, D, weights_desc, expert, column, weight_rows, group_at, tile_at,
                                    stage, phase, ring, EVEN_K)
        first_row_tile = field(group, 3)
        size = field(group, 4)
        local = tile - first_row_tile * column_tiles
        entry = ask_entry(tiles_ptr, first_row_tile + local % size, 4)
        stage, phase = gather_steps(source, inside, D, weights_desc, expert, column, weight_rows, tile_at, tokens_at,
                                    stage, phase, ring, EVEN_K)
        next_row = field(entry, 1)
        next_used = gl.where(claimed < total, field(entry, 2), 0)
        next_column = local // size
        token = load_tokens(token_of_row_ptr, next_row, next_used, next_column)
        stage, phase = gather_steps(source, inside, D, weights_desc, expert, column, weight_rows, tokens_at, k_steps,
                                    stage, phase, ring, EVEN_K)
        if load_more is not None:
            stage, phase = load_more(more, row, used, column, stage, phase, ring, True)
        expert = field(entry, 0)
        row = next_row
        used = next_used
        column = next_column
        if done_ptr is not None:
            before = band + 0  # not `= band`: Triton drops a loop-carried name that starts as another's alias
            band = (claimed >= first_part(total)).to(gl.int32)
            left, stored_phase, tiles = count_tile(done_ptr, stored, left, stored_phase, tiles, before, band)
    tell_end(ring, stage, phase, 4)
    async_copy.mbarrier_arrive(full.index(stage), increment_count=False)
    if done_ptr is not None:
        announce(done_ptr, gl.where(left == 0, leaving(band, tiles), left), stored, stored_phase)
