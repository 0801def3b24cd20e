"""The up projection with the gather beside it, for Hopper: two warps bring rows together, ahead of the multiply.

    x (T, D) --gather--> rows (R, D) --> [up, SwiGLU] --> hidden (R, F)

What   grouped_gemm.py's up_rows kernel, and the copy of x to sorted rows that it needs, in one launch.
Why    Rows gathered as they load come by cp.async, which the multiply pays for (LOG.md); rows gathered before cost a
       pass over memory, in which no tensor core works.
How    Two spare warps of each program copy units of 8 rows, in the order in which the tiles want them: cp.async into a
       ring of their own, 16-byte stores to rows. A row tile's producer waits until its units are counted, then reads it
       by TMA, mostly from L2. Two roles of one warp: a role of two would have barriers in each step (LOG.md, row 46).

    producer    1 warp          wait until ready[row tile] is full, begun += 1; TMA: rows and weights of a stage
    consumers   2 warpgroups    grouped_gemm.py's consume_hidden
    gatherers   2 of 1 warp     every (2 * grid)-th unit: wait until it is wanted soon, copy its 8 rows,
                                ready[row tile] += 1

Costs  rows (R, D) is written and read once. A program waits for the gatherers of all others: every program must be on
       the GPU at once, so the launch is cooperative.

    index array     shape   from -> to
    token_of_row_R  (R,)    sorted row -> token
    tiles_X5        (X, 5)  row tile -> expert, first row, rows in use, first tile and size of its group (tiles.py)
    ready_X         (X,)    row tile -> units of it that lie in rows; zeros at the start (tiles.py)
    claimed         (1,)    output tiles that programs have taken; zero at the start (tiles.py)
    begun           (1,)    output tiles whose rows were ready; zero at the start (tiles.py)

Determinism: an output element is one accumulator's sum in one order. The counters order work.
"""

from __future__ import annotations

import torch

from labs.kernels.grouped_gemm import consume_hidden, up_operands
from labs.kernels.late_store import HIDDEN_PARTS, finishes_late
from labs.kernels.launch import launch
from labs.kernels.roles import (
    FOLLOW,
    _FIELDS,
    describe,
    one_band,
    open_ring,
    produce_rows,
    walk_tiles,
)
from labs.kernels.tiles import ROWS, TilePlan, check
from labs.kernels.waiting import fence_async_global, follow, sync_threads

from triton.experimental import gluon  # after common.level, which the above import
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

# T tokens, D model width, F expert width, E experts, K top-k, R = T*K routed rows.
# In kernels M, N and K are the GEMM tile's axes.

_UNIT = gl.constexpr(8)  # rows that are gathered together
_UNITS = gl.constexpr(2 * ROWS // 8)  # of a row tile
_COLUMNS = gl.constexpr(256)  # of them at a time: 16 bytes a thread and row
_COPIES = gl.constexpr(4)  # stages of a gatherer's ring, 4 KB each
_GATHERERS = gl.constexpr(2)
_UNIT_LAYOUT = gl.constexpr(gl.BlockedLayout([8, 8], [1, 32], [1, 1], [1, 0]))
_FLAT = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))


@gluon.jit
def find_unit(unit, walk, token_of_row_ptr, r):
    """Unit -> (row tile, first output tile that wants it, first row, rows left of the tile from there on, tokens)."""
    tiles_ptr, total, column_tiles, _ = walk
    tile = gl.maximum(gl.minimum(unit // _UNITS, total // column_tiles - 1), 0)
    entry = tiles_ptr + tile * _FIELDS
    skipped = unit % _UNITS * _UNIT
    row = gl.load(entry + 1) + skipped
    left = gl.load(entry + 2) - skipped
    group_first = gl.load(entry + 3)
    token = gl.load(token_of_row_ptr + row + r, mask=r < left, other=0)
    return tile, group_first * (column_tiles - 1) + tile, row, left, token


@gluon.jit
def gather(x_ptr, token_of_row_ptr, rows_ptr, D, walk, ready_ptr, begun_ptr, copies, WARP: gl.constexpr):
    """rows[r] = x[token_of_row[r]] for every (2 * grid)-th unit of 8 rows from gatherer WARP's of this program on, tile
    by tile, then say so.

    Never more than a wave of output tiles ahead of as many as are begun, so that rows are in L2 when they are wanted,
    and weights with them. This cannot stop for good: the first tile that is not begun has only begun ones before it, so
    its rows may be gathered, and a unit is whole before the next one is waited for.
    """
    grid = gl.num_programs(0)
    first = gl.program_id(0) * _GATHERERS + WARP
    step = grid * _GATHERERS
    r = gl.arange(0, _UNIT, layout=gl.SliceLayout(1, _UNIT_LAYOUT))
    c = gl.arange(0, _COLUMNS, layout=gl.SliceLayout(0, _UNIT_LAYOUT))
    blocks = gl.cdiv(D, _COLUMNS)
    _, total, column_tiles, _ = walk
    seen = 0  # begun, when last looked at
    tile, wanted, row, left, token = find_unit(first, walk, token_of_row_ptr, r)
    for unit in range(first, total // column_tiles * _UNITS, step):
        after = find_unit(unit + step, walk, token_of_row_ptr, r)
        if left > 0:
            while seen + grid < wanted:
                seen = gl.atomic_add(begun_ptr, 0, sem="relaxed", scope="gpu")
            inside = r < left
            source = x_ptr + (token.to(gl.int64) * D)[:, None]  # T * D and R * D pass 2**31 at real sizes
            target = rows_ptr + ((row + r).to(gl.int64) * D)[:, None]
            stored = 0
            for copied in range(0, blocks + _COPIES - 1):
                column = copied * _COLUMNS + c
                async_copy.async_copy_global_to_shared(copies.index(copied % _COPIES), source + column[None, :],
                                                       inside[:, None] & (column < D)[None, :])
                async_copy.commit_group()
                if copied >= _COPIES - 1:
                    async_copy.wait_group(_COPIES - 1)
                    column = stored * _COLUMNS + c
                    gl.store(target + column[None, :], copies.index(stored % _COPIES).load(_UNIT_LAYOUT),
                             mask=inside[:, None] & (column < D)[None, :])
                    stored += 1
            async_copy.wait_group(0)
            fence_async_global(1)
            sync_threads()
            gl.atomic_add(ready_ptr + tile, 1, sem="release", scope="gpu")
        tile, wanted, row, left, token = after


@gluon.jit
def wait_for_rows(counters, row_tile, used, _group_end):
    """Before a tile's first step: return when its rows are gathered, and say that it is begun."""
    ready_ptr, begun_ptr = counters
    while gl.atomic_add(ready_ptr + row_tile, 0, sem="acquire", scope="gpu") < gl.cdiv(used, _UNIT):
        pass
    fence_async_global(1)
    gl.atomic_add(begun_ptr, 1, sem="relaxed", scope="gpu")


@gluon.jit(do_not_specialize=["D8", "F8"])
def up_ahead_kernel(
    x_ptr,  # (T, D) bf16
    token_of_row_ptr,  # (R,) int32
    rows_desc,  # (R, D) bf16
    rows_ptr,  # (R, D) bf16
    ready_ptr,  # (X,) int32, zeros
    begun_ptr,  # (1,) int32, zero
    claimed_ptr,  # (1,) int32, zero
    gate_up_desc,  # (E, 2F, D) bf16, gate and up rows interleaved, as describe_weights has it
    hidden_ptr,  # (R, F) bf16
    tiles_ptr,  # (X, 5) int32
    tile_count_ptr,  # (1,) int32
    D8,
    F8,
    LATE: gl.constexpr,
):
    """rows = x[token], hidden = silu(rows @ gate.T) * (rows @ up.T). D8 and F8 are D / 8 and F / 8.

    Grid (SMs,), all at once: a program owns the tiles that it claims, of 128 rows by 128 hidden columns, and every
    grid-th pair of units of rows, one a gatherer.
    """
    dealt: gl.constexpr = len(gate_up_desc.block_type.shape) == 5
    begin_tile: gl.constexpr = wait_for_rows
    ring = open_ring(1)
    copies0 = gl.allocate_shared_memory(gl.bfloat16, [_COPIES, _UNIT, _COLUMNS], _FLAT)
    copies1 = gl.allocate_shared_memory(gl.bfloat16, [_COPIES, _UNIT, _COLUMNS], _FLAT)
    D = D8 * 8  # so the compiler knows that no 16-byte copy straddles a row's end
    follow()
    walk = walk_tiles(tiles_ptr, tile_count_ptr, F8 * 16, D)
    gl.warp_specialize([
        (consume_hidden, (hidden_ptr, F8, walk[3], ring, dealt, LATE, 0, False)),
        (consume_hidden, (hidden_ptr, F8, walk[3], ring, dealt, LATE, 1, False)),
        (gather, (x_ptr, token_of_row_ptr, rows_ptr, D, walk, ready_ptr, begun_ptr, copies0, 0)),
        (gather, (x_ptr, token_of_row_ptr, rows_ptr, D, walk, ready_ptr, begun_ptr, copies1, 1)),
        (produce_rows, (rows_desc, gate_up_desc, walk, one_band(walk), claimed_ptr, F8 * 16, ring, None, None,
                        begin_tile, (ready_ptr, begun_ptr))),
    ], [4, 1, 1, 1], [224, 56, 56, 56])


def up_ahead(
    x_TD: torch.Tensor, token_of_row_R: torch.Tensor, gate_up_E2FD: torch.Tensor, plan: TilePlan,
    hidden_RF: torch.Tensor, programs: int,
) -> None:
    """hidden_RF = SwiGLU of the rows' tokens through their experts' interleaved gate_up_E2FD.

    All bf16 and contiguous but token_of_row_R (R,) int32; a plan in tiles of 128 rows that no other up projection has
    used; programs: the GPU's SMs. Takes R * D values of memory while it runs. Raises ValueError for other shapes,
    dtypes or plans, and unless D and F are multiples of 8.
    """
    R = token_of_row_R.numel()
    check("token_of_row_R", token_of_row_R, (R,), torch.int32)
    operands = up_operands(x_TD, R, gate_up_E2FD, plan, hidden_RF, 128)
    if R > 0:
        plan.count_once("up")
        rows_RD = x_TD.new_empty(R, x_TD.shape[1])
        launch(up_ahead_kernel, (programs,), x_TD, token_of_row_R, describe(rows_RD, ROWS), rows_RD, plan.ready_X,
               plan.begun, plan.claimed_up, *operands, LATE=finishes_late(x_TD.shape[1], HIDDEN_PARTS),
               launch_cooperative_grid=True, **FOLLOW)
