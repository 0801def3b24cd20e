"""The down projection with the combine beside it, for Hopper: two warps sum tokens while two warpgroups multiply.

    hidden (R, F) --> [down] --> y (R, D) --gather-and-sum--> out (T, D)

What   grouped_gemm.py's down kernel, walked through in two or three bands of columns (edges_for), all experts of a band
       before the next one, and combine.py's sum of a band's columns while the next band is multiplied. The last band's
       sum is left to combine.py.
Why    The combine waits for memory, the GEMM for the tensor cores: one after the other, each leaves the other's idle.
How    Each of two spare warps copies a token's K rows, 256 columns of each, into a ring of its own, three turns ahead
       or more (cp.async, no registers), and before that the rows' numbers, and adds them up in float32. Two roles of
       one warp, as a role of two would have barriers in each turn (LOG.md, row 42).

    producer    1 warp          TMA: rows and weights of a stage, as in roles.py
    consumers   2 warpgroups    multiply a tile, store the one before beside it (late_store.py); at a program's first
                                tile of a later band, store what waits and say so to the producer, which counts
                                the program's tiles of the band in done[band]
    combiners   2 of 1 warp     each: wait until done[band] is all of it; then sum every (2 * grid)-th token

Costs  hidden is read once a band. The combiners of one program wait for the tiles of others, but only for such as a
       running program has claimed or will: they need no program that has not begun. y still takes R * D values.

    index array     shape     from -> to
    row_of_slot_TK  (T, K)    token, choice -> sorted row
    tiles_X5        (X, 5)    row tile -> expert, first row, rows in use, first tile and size of its group (tiles.py)
    claimed         (1,)      output tiles that programs have taken; zero at the start (tiles.py)
    done_B          (4,)      band -> output tiles of it that are stored; zeros at the start (tiles.py)

Determinism: each sum runs over the choices in their order, though the compiler may fuse other products than in
combine.py: equal run for run, not bit for bit combine.py's. The counters order work.
"""

from __future__ import annotations

import torch

from labs.kernels.combine import combine
from labs.kernels.grouped_gemm import consume_y, down_operands, produce_hidden
from labs.kernels.roles import (
    BLOCK_N,
    FOLLOW,
    _BLOCK_N,
    _WARPGROUPS,
    band_of,
    edge_of,
    open_barriers,
    open_ring,
    walk_tiles,
)
from labs.kernels.late_store import ROUNDED_PARTS, finishes_late
from labs.kernels.launch import launch, require
from labs.kernels.tiles import TilePlan
from labs.kernels.waiting import begin, wait_for

import triton  # after common.level, which the above import
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

# T tokens, D model width, F expert width, E experts, K top-k, R = T*K routed rows.
# In kernels M, N and K are the GEMM tile's axes; top-k is TOP_K.

COMBINERS = 2  # of one warp each, as the kernel lists them
COLUMNS = 256  # of a token that a combiner sums in a turn: 16 bytes a thread and row
SLOTS = 32  # rows of a combiner's ring, 512 bytes each: half of what the GEMM's ring leaves of shared memory
MOST_CHOICES = SLOTS // 4  # of a token, for four of them in the ring; and more would not fit into registers
LEAST_TILES = 2  # column tiles of a band: a last one of one was slower (LOG.md, rows 41, 43 and 54)

# Rows, and rows an expert, from which the sum beside the GEMM was no slower than one after it (LOG.md). With fewer, the
# GEMM waits for memory itself, and reading hidden once a band costs more than the sum.
LEAST_ROWS, LEAST_MEAN_ROWS = 16384, 512
# Bands, as measured (LOG.md, row 54): K * F up to which they are of one width, and values of y an expert from which on
# they are three, not two. Whether that holds: band_widths.py.
EVEN_BANDS = 5500
THREE_BANDS = 2**21

_COMBINERS = gl.constexpr(COMBINERS)
_SLOTS = gl.constexpr(SLOTS)
_COLUMNS = gl.constexpr(COLUMNS)
_FLAT = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
_NUMBERS = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))


# ------------------------------------------------------------------------------------------------------ combiner
@gluon.jit
def open_combiner(CHOICES: gl.constexpr):
    """A combiner's buffers: rows of y in as many stages as SLOTS holds, and places for twice as many turns' row numbers
    and scores."""
    slots = gl.allocate_shared_memory(gl.bfloat16, [_SLOTS // CHOICES, CHOICES, _COLUMNS], _FLAT)
    rows_of = gl.allocate_shared_memory(gl.int32, [2 * _SLOTS // CHOICES, CHOICES], _NUMBERS)
    scores_of = gl.allocate_shared_memory(gl.float32, [2 * _SLOTS // CHOICES, CHOICES], _NUMBERS)
    return slots, rows_of, scores_of


@gluon.jit
def next_item(token, block, blocks, step):
    """The next block of columns of a token, or the first of this combiner's next token."""
    last = block == blocks - 1
    return gl.where(last, token + step, token), gl.where(last, 0, block + 1)


@gluon.jit
def ask(row_of_slot_ptr, scores_ptr, token, T, rows_of, scores_of, item, TOP_K: gl.constexpr):
    """Copy the numbers of a token's rows and its scores to where `item` finds them; past the last token, the last
    one's, which serve nothing.

    Not into registers: a loop that passes on what it has loaded waits for it in the same turn.
    """
    PLACES: gl.constexpr = rows_of.shape[0]
    k = gl.arange(0, rows_of.shape[1], layout=gl.BlockedLayout([1], [32], [1], [0]))
    first = gl.minimum(token, T - 1) * TOP_K
    async_copy.async_copy_global_to_shared(rows_of.index(item & PLACES - 1), row_of_slot_ptr + first + k, k < TOP_K)
    async_copy.async_copy_global_to_shared(scores_of.index(item & PLACES - 1), scores_ptr + first + k, k < TOP_K)


@gluon.jit
def combine_bands(y_ptr, row_of_slot_ptr, scores_ptr, out_ptr, done_ptr, T, D8, walk, edges, buffers,
                  TOP_K: gl.constexpr, WARP: gl.constexpr):
    """out[t] = sum of scores[t, k] * y[row_of_slot[t, k]] over k in float32, rounded once, for the tokens of combiner
    WARP of this program and all bands but the last, which are whole blocks.

    A turn copies the y of a block of a token's columns, asks for the row numbers of another, as many turns ahead as the
    ring has stages, and sums a third, copied one turn fewer ago. It sums last, so that a copy has all these turns to
    land.
    """
    slots, rows_of, scores_of = buffers
    STAGES: gl.constexpr = slots.shape[0]
    CHOICES: gl.constexpr = slots.shape[1]
    PLACES: gl.constexpr = rows_of.shape[0]
    AHEAD: gl.constexpr = STAGES - 1
    PAIRS: gl.constexpr = _COLUMNS // 2
    layout: gl.constexpr = gl.BlockedLayout([CHOICES, 8], [1, 32], [1, 1], [1, 0])
    pair_layout: gl.constexpr = gl.BlockedLayout([CHOICES, 4], [1, 32], [1, 1], [1, 0])
    pairs = slots._reinterpret(gl.int32, [STAGES, CHOICES, PAIRS], _FLAT)
    out_pairs_ptr = out_ptr.to(gl.pointer_type(gl.int32), bitcast=True)
    k = gl.arange(0, CHOICES, layout=gl.SliceLayout(1, layout))
    c = gl.arange(0, _COLUMNS, layout=gl.SliceLayout(0, layout))
    pair = gl.arange(0, PAIRS, layout=gl.SliceLayout(0, pair_layout))
    first_token = gl.program_id(0) * _COMBINERS + WARP
    step = gl.num_programs(0) * _COMBINERS
    _tiles_ptr, total, column_tiles, _k_steps = walk
    for band in range(0, band_of(edges, column_tiles - 1)):
        left = edge_of(edges, band) * _BLOCK_N
        right = edge_of(edges, band + 1) * _BLOCK_N
        blocks = (right - left) // _COLUMNS
        items = gl.cdiv(gl.maximum(T - first_token, 0), step) * blocks
        asked_token = first_token
        asked_block = 0
        for turn in range(STAGES):  # before the band is there, as these do not depend on it
            ask(row_of_slot_ptr, scores_ptr, asked_token, T, rows_of, scores_of, turn, TOP_K)
            asked_token, asked_block = next_item(asked_token, asked_block, blocks, step)
        async_copy.commit_group()
        wait_for(done_ptr + band, total // column_tiles * (edge_of(edges, band + 1) - edge_of(edges, band)))
        async_copy.wait_group(0)
        copied_block = 0
        summed_token = first_token
        summed_block = 0
        for turn in range(0, items + AHEAD):  # item turn is copied, turn + STAGES asked for, turn - AHEAD summed
            rows = rows_of.index(turn & PLACES - 1).load(gl.SliceLayout(1, layout))
            column = left + copied_block * _COLUMNS + c
            # R * D passes 2**31 at real sizes; in one instruction, where 64 by 64 bits would take four.
            start = gl.inline_asm_elementwise("mul.wide.u32 $0, $1, $2;", "=l,r,r", [rows, gl.full_like(rows, 1) * D8],
                                              dtype=gl.int64, is_pure=True, pack=1) * 8
            async_copy.async_copy_global_to_shared(
                slots.index(turn & STAGES - 1), (y_ptr + column)[None, :] + start[:, None],
                ((k < TOP_K) & (turn < items))[:, None])
            ask(row_of_slot_ptr, scores_ptr, asked_token, T, rows_of, scores_of, turn + STAGES, TOP_K)
            async_copy.commit_group()
            asked_token, asked_block = next_item(asked_token, asked_block, blocks, step)
            copied_block = gl.where(copied_block == blocks - 1, 0, copied_block + 1)
            async_copy.wait_group(AHEAD)
            if turn >= AHEAD:
                item = turn - AHEAD
                scores = scores_of.index(item & PLACES - 1).load(gl.SliceLayout(1, pair_layout))
                y = pairs.index(item & STAGES - 1).load(pair_layout)
                even = gl.sum((y << 16).to(gl.float32, bitcast=True) * scores[:, None], axis=0)
                odd = gl.sum((y & -65536).to(gl.float32, bitcast=True) * scores[:, None], axis=0)
                rounded = gl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,f,f", [odd, even],
                                                    dtype=gl.int32, is_pure=True, pack=1)
                at = left // 2 + summed_block * PAIRS + pair
                gl.store(out_pairs_ptr + summed_token.to(gl.int64) * (D8 * 4) + at, rounded)
                summed_token, summed_block = next_item(summed_token, summed_block, blocks, step)
        async_copy.wait_group(0)


# -------------------------------------------------------------------------------------------------------- kernel
@gluon.jit(do_not_specialize=["T", "D8", "F8", "second", "third"])
def down_combine_kernel(
    claimed_ptr,  # (1,) int32, zero
    hidden_desc,  # (R, F) bf16
    down_desc,  # (E, D, F) bf16, as describe_weights has it
    y_ptr,  # (R, D) bf16
    tiles_ptr,  # (X, 5) int32
    tile_count_ptr,  # (1,) int32
    D8,
    F8,
    row_of_slot_ptr,  # (T, K) int32
    scores_ptr,  # (T, K) float32
    out_ptr,  # (T, D) bf16
    done_ptr,  # (BANDS,) int32, zeros
    T,
    second,
    third,
    done_up_ptr,  # (2,) int32, up_gather_kernel's
    TOP_K: gl.constexpr,
    CHOICES: gl.constexpr,
    LATE: gl.constexpr,
    EARLY: gl.constexpr,
):
    """y = hidden @ down.T, and out's columns of all bands but the last. D8 and F8 are D / 8 and F / 8; second and
    third the first column tiles of these bands (edge_of in roles.py); CHOICES the power of 2 from TOP_K on.

    Grid (SMs,): a program owns the tiles that it claims, of 128 rows by 256 columns, and two tokens of every grid * 2.
    """
    dealt: gl.constexpr = len(down_desc.block_type.shape) == 5
    ring = open_ring(1)
    stored = open_barriers(1, _WARPGROUPS)
    combiner0 = open_combiner(CHOICES)
    combiner1 = open_combiner(CHOICES)
    D = D8 * 8  # so the compiler knows that no 16-byte copy straddles a row's end
    begin(EARLY)
    walk = walk_tiles(tiles_ptr, tile_count_ptr, D, F8 * 8)
    edges = second, third, walk[2]
    gl.warp_specialize([
        (consume_y, (y_ptr, D8, walk[3], ring, dealt, LATE, 0, stored)),
        (consume_y, (y_ptr, D8, walk[3], ring, dealt, LATE, 1, stored)),
        (combine_bands, (y_ptr, row_of_slot_ptr, scores_ptr, out_ptr, done_ptr, T, D8, walk, edges, combiner0,
                         TOP_K, 0)),
        (combine_bands, (y_ptr, row_of_slot_ptr, scores_ptr, out_ptr, done_ptr, T, D8, walk, edges, combiner1,
                         TOP_K, 1)),
        (produce_hidden, (hidden_desc, down_desc, walk, edges, claimed_ptr, D, ring, done_up_ptr, F8, EARLY,
                          done_ptr, stored)),
    ], [4, 1, 1, 1], [224, 56, 56, 56])


# ------------------------------------------------------------------------------------------------------ launcher
def pays(R: int, D: int, E: int, K: int) -> bool:
    """Whether R rows of E experts are better summed beside the GEMM than after it. Measured on an H200 (LOG.md). Up to
    LEAST_TILES column tiles are one band, whose sum has nothing to run beside."""
    return K <= MOST_CHOICES and D > LEAST_TILES * BLOCK_N and max(LEAST_ROWS, LEAST_MEAN_ROWS * E) <= R


def split(tiles: int, wider: float, bands: int) -> tuple[int, int]:
    """Column tiles in two or three bands, each as many times `wider` than the next as can be in whole tiles and with
    LEAST_TILES: the first tiles of bands 2 and 3; where there is none, the end of the last."""
    third = tiles / (1 + wider + wider**2)
    middle, last = (max(LEAST_TILES, round(width)) for width in (third * wider, third))
    if bands == 3 and tiles >= LEAST_TILES + middle + last:
        return tiles - last - middle, tiles - last
    last = max(LEAST_TILES, round(tiles / (1 + wider)))
    return min(tiles, max(LEAST_TILES, tiles - last)), tiles


def edges_for(D: int, F: int, K: int, mean_rows: float) -> tuple[int, int]:
    """`split` for mean_rows rows an expert.

    Each band is as many times wider than the next as K * F is of EVEN_BANDS, and no narrower: a band's sum takes time
    by its width alone, the multiply that hides it by F too. Fewer bands read hidden less often, more leave less to sum
    with nothing beside it.
    """
    return split(triton.cdiv(D, BLOCK_N), max(1.0, K * F / EVEN_BANDS), 3 if mean_rows * D >= THREE_BANDS else 2)


def down_combine(
    hidden_RF: torch.Tensor, down_EDF: torch.Tensor, plan: TilePlan, row_of_slot_TK: torch.Tensor,
    scores_TK: torch.Tensor, y_RD: torch.Tensor, out_TD: torch.Tensor, programs: int, early: bool = False,
    edges: tuple[int, int] | None = None,
) -> torch.Tensor:
    """y_RD = hidden_RF through their experts' down_EDF; returns out_TD, each token's K rows of it, summed with their
    scores.

    bf16 and contiguous, row_of_slot_TK int32 and scores_TK float32 (T, K), K at most MOST_CHOICES; a plan in tiles of
    128 rows that no other down projection has used; programs: the GPU's SMs; early: as of `down`, out_TD being as old
    as y_RD; edges: as of `split`, by default edges_for's. Raises ValueError for other shapes, dtypes or plans, and
    unless D and F are multiples of 8.
    """
    (T, K), D, device = row_of_slot_TK.shape, down_EDF.shape[1], hidden_RF.device
    if not 1 <= K <= MOST_CHOICES:
        raise ValueError(f"row_of_slot_TK has K={K}, but this kernel takes 1 to {MOST_CHOICES} choices")
    require("hidden_RF", hidden_RF, (T * K, down_EDF.shape[2]), torch.bfloat16, device)
    require("row_of_slot_TK", row_of_slot_TK, (T, K), torch.int32, device)
    require("scores_TK", scores_TK, (T, K), torch.float32, device)
    require("out_TD", out_TD, (T, D), torch.bfloat16, device)
    edges = edges or edges_for(D, hidden_RF.shape[1], K, T * K / down_EDF.shape[0])
    if not 0 < edges[0] <= edges[1] <= triton.cdiv(D, BLOCK_N):
        raise ValueError(f"edges={edges}: need two rising column tiles of 1 to {triton.cdiv(D, BLOCK_N)}")
    if T == 0:
        return out_TD
    operands = down_operands(hidden_RF, down_EDF, plan, y_RD, 128)
    if early:
        plan.require_parts(programs)
    plan.count_once("down")
    launch(down_combine_kernel, (programs,),
        plan.claimed_down, *operands, row_of_slot_TK, scores_TK, out_TD, plan.done_B, T, *edges, plan.done_up, TOP_K=K,
        CHOICES=triton.next_power_of_2(K), LATE=finishes_late(hidden_RF.shape[1], ROUNDED_PARTS),
        EARLY=early, **FOLLOW)
    last = max((edge for edge in edges if edge * BLOCK_N < D), default=0)
    return combine(y_RD, row_of_slot_TK, scores_TK, out_TD, last * BLOCK_N)
