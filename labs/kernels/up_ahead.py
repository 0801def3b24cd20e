"""The up projection with the gather beside it, for Hopper: two warps bring rows together, ahead of the multiply.

    x (T, D) --gather--> window (some row tiles, D) --> [up, SwiGLU] --> hidden (R, F)

What   grouped_gemm.py's up_rows kernel, and the copy of x to sorted rows that it needs, in one launch.
Why    Rows gathered as they load come by cp.async, which the multiply pays for (LOG.md); rows gathered before cost a
       pass over memory, in which no tensor core works.
How    64 spare threads of each program copy units of 8 rows, in the order in which the tiles want them: cp.async into
       a ring of their own, 16-byte stores to the window. A row tile's producer waits until its units are counted, then
       reads it by TMA. The window holds the row tiles under work and those that come next, each where the one of
       `window` tiles before lay: overwritten while still in L2, most of it never goes to memory.

    producer    1 warp          wait until ready[row tile] is full; TMA: rows and weights of a stage
    consumers   2 warpgroups    roles.py's; the first counts read[row tile] += 1 when all stages of a tile are in
    gatherer    2 warps         every grid-th unit: wait until all output tiles of the row tile that lies there have
                                read it, copy 8 rows, ready[row tile] += 1

Costs  A program waits for the gatherers and consumers of all others: every program must be on the GPU at once, so the
       launch is cooperative.

    index array     shape   from -> to
    token_of_row_R  (R,)    sorted row -> token
    tiles_X5        (X, 5)  row tile -> expert, first row, rows in use, first tile and size of its group (tiles.py)
    ready_X         (X,)    row tile -> units of it that lie in the window; zeros at the start (tiles.py)
    read_X          (X,)    row tile -> output tiles that need it no more; zeros at the start (tiles.py)
    claimed         (1,)    output tiles that programs have taken; zero at the start (tiles.py)

Determinism: an output element is one accumulator's sum in one order. The counters order work.
"""

from __future__ import annotations

import torch

from labs.kernels.grouped_gemm import store_hidden, store_hidden_dealt, up_operands
from labs.kernels.roles import (
    BLOCK_N,
    LAUNCH,
    _FIELDS,
    _LEAD,
    _TILE_ROWS,
    claim,
    describe,
    find_tile_ahead,
    listen,
    load_steps,
    multiply_share,
    open_ring,
    sync_threads,
    tell,
    tell_end,
    walk_tiles,
)
from labs.kernels.tiles import ROWS, TilePlan, check

import triton  # after common.level, which the above import
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

# T tokens, D model width, F expert width, E experts, K top-k, R = T*K routed rows.
# In kernels M, N and K are the GEMM tile's axes.

_UNIT = gl.constexpr(8)  # rows that are gathered together
_UNITS = gl.constexpr(2 * ROWS // 8)  # of a row tile
_COLUMNS = gl.constexpr(512)  # of them at a time: 16 bytes a thread and row
_COPIES = gl.constexpr(4)  # stages of the gatherer's ring, 8 KB each
_UNIT_LAYOUT = gl.constexpr(gl.BlockedLayout([8, 8], [1, 32], [1, 2], [1, 0]))
_FLAT = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))


@gluon.jit
def fence_async_global(WARPS: gl.constexpr):
    """Between stores of this thread, or of those it has waited for, and reads of the same memory by TMA, which is
    another proxy: PTX's fence.proxy.async, once a thread. The reader needs it, after it has waited; the writer's is
    for safety."""
    threads = gl.arange(0, 32 * WARPS, layout=gl.BlockedLayout([1], [32], [WARPS], [0]))
    gl.inline_asm_elementwise("fence.proxy.async.global; mov.b32 $0, $1;", "=r,r", [threads], dtype=gl.int32,
                              is_pure=False, pack=1)


@gluon.jit
def find_unit(unit, walk, token_of_row_ptr, r):
    """Unit -> (row tile, rows of the tile before it, rows of the tile from there on, tokens)."""
    tiles_ptr, total, column_tiles, _ = walk
    tile = gl.maximum(gl.minimum(unit // _UNITS, total // column_tiles - 1), 0)
    entry = tiles_ptr + tile * _FIELDS
    skipped = unit % _UNITS * _UNIT
    left = gl.load(entry + 2) - skipped
    token = gl.load(token_of_row_ptr + gl.load(entry + 1) + skipped + r, mask=r < left, other=0)
    return tile, skipped, left, token


@gluon.jit
def gather(x_ptr, token_of_row_ptr, window_ptr, D, walk, ready_ptr, read_ptr, window_tiles, copies):
    """Every grid-th unit of 8 sorted rows, tile by tile: x's rows to the unit's place in the window, then say so.

    This cannot stop for good. A unit waits for the output tiles of a row tile at least a group before its own, which
    come before all of its own. So what the first unfinished output tile waits for, and what is copied before that,
    waits for finished ones only.
    """
    grid = gl.num_programs(0)
    r = gl.arange(0, _UNIT, layout=gl.SliceLayout(1, _UNIT_LAYOUT))
    c = gl.arange(0, _COLUMNS, layout=gl.SliceLayout(0, _UNIT_LAYOUT))
    blocks = gl.cdiv(D, _COLUMNS)
    _, total, column_tiles, _ = walk
    tile, skipped, left, token = find_unit(gl.program_id(0), walk, token_of_row_ptr, r)
    for unit in range(gl.program_id(0), total // column_tiles * _UNITS, grid):
        after = find_unit(unit + grid, walk, token_of_row_ptr, r)
        if left > 0:
            if tile >= window_tiles:
                while gl.atomic_add(read_ptr + tile - window_tiles, 0, sem="acquire", scope="gpu") < column_tiles:
                    pass
            inside = r < left
            source = x_ptr + (token.to(gl.int64) * D)[:, None]  # T * D passes 2**31 at real sizes
            target = window_ptr + ((tile % window_tiles * _TILE_ROWS + skipped + r).to(gl.int64) * D)[:, None]
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
            fence_async_global(2)
            sync_threads()
            gl.atomic_add(ready_ptr + tile, 1, sem="release", scope="gpu")
        tile, skipped, left, token = after


@gluon.jit
def produce(window_desc, gate_up_desc, ready_ptr, window_tiles, walk, claimed_ptr, weight_rows, ring):
    """roles.py's produce_rows, which waits for a tile's rows first."""
    tiles_ptr, total, column_tiles, k_steps = walk
    early = gl.maximum(k_steps - _LEAD, 0)
    stage = 0
    phase = 0
    expert, row, used, column, row_tile = find_tile_ahead(tiles_ptr, claim(claimed_ptr, 1), total, column_tiles)
    while used > 0:
        while gl.atomic_add(ready_ptr + row_tile, 0, sem="acquire", scope="gpu") < gl.cdiv(used, _UNIT):
            pass
        fence_async_global(1)
        tell(ring, stage, phase, row, used, column, row_tile, 1)
        place = row_tile % window_tiles * _TILE_ROWS
        stage, phase = load_steps(window_desc, gate_up_desc, place, used, expert, column, weight_rows, 0, early, stage,
                                  phase, ring)
        after = find_tile_ahead(tiles_ptr, claim(claimed_ptr, 1), total, column_tiles)
        stage, phase = load_steps(window_desc, gate_up_desc, place, used, expert, column, weight_rows, early, k_steps,
                                  stage, phase, ring)
        expert, row, used, column, row_tile = after
    tell_end(ring, stage, phase, 1)


@gluon.jit
def count_read(read_ptr):
    """One more output tile whose rows are all in shared memory, or multiplied: a warpgroup has waited for them."""
    gl.atomic_add(read_ptr, 1, sem="release", scope="gpu")


@gluon.jit
def consume(hidden_ptr, F8, k_steps, ring, read_ptr, finish: gl.constexpr, WG: gl.constexpr):
    """roles.py's consume, of which the first warpgroup counts the tiles that are read."""
    after_stages: gl.constexpr = count_read if WG == 0 else None
    stage = 0
    phase = 0
    row, used, column, row_tile = listen(ring, stage, phase)
    while used > 0:
        stage, phase = multiply_share(hidden_ptr, F8 * 8, row, used, column, k_steps, stage, phase, ring, finish, WG,
                                      False, 0, after_stages, read_ptr + row_tile)
        row, used, column, row_tile = listen(ring, stage, phase)


@gluon.jit(do_not_specialize=["window_tiles", "D8", "F8"])
def up_ahead_kernel(
    x_ptr,  # (T, D) bf16
    token_of_row_ptr,  # (R,) int32
    window_desc,  # (window_tiles * 128, D) bf16
    window_ptr,  # (window_tiles * 128, D) bf16
    window_tiles,
    ready_ptr,  # (X,) int32, zeros
    read_ptr,  # (X,) int32, zeros
    claimed_ptr,  # (1,) int32, zero
    gate_up_desc,  # (E, 2F, D) bf16, gate and up rows interleaved, as describe_weights has it
    hidden_ptr,  # (R, F) bf16
    tiles_ptr,  # (X, 5) int32
    tile_count_ptr,  # (1,) int32
    D8,
    F8,
):
    """hidden = silu(x[token] @ gate.T) * (x[token] @ up.T). D8 and F8 are D / 8 and F / 8; window_tiles at least the
    largest group's.

    Grid (SMs,), all at once: a program owns the tiles that it claims, of 128 rows by 128 hidden columns, and every
    grid-th unit of rows.
    """
    finish: gl.constexpr = store_hidden_dealt if len(gate_up_desc.block_type.shape) == 5 else store_hidden
    ring = open_ring(1)
    copies = gl.allocate_shared_memory(gl.bfloat16, [_COPIES, _UNIT, _COLUMNS], _FLAT)
    D = D8 * 8  # so the compiler knows that no 16-byte copy straddles a row's end
    walk = walk_tiles(tiles_ptr, tile_count_ptr, F8 * 16, D)
    gl.warp_specialize([
        (consume, (hidden_ptr, F8, walk[3], ring, read_ptr, finish, 0)),
        (consume, (hidden_ptr, F8, walk[3], ring, read_ptr, finish, 1)),
        (gather, (x_ptr, token_of_row_ptr, window_ptr, D, walk, ready_ptr, read_ptr, window_tiles, copies)),
        (produce, (window_desc, gate_up_desc, ready_ptr, window_tiles, walk, claimed_ptr, F8 * 16, ring)),
    ], [4, 2, 1], [224, 56, 56])


def window_tiles_for(plan: TilePlan, F: int, E: int, programs: int) -> int:
    """Row tiles of the window: those that a wave of output tiles reads and those of the next wave, both in whole
    groups. At least the largest group, or rows would wait for output tiles that wait for them."""
    column_tiles, most_tiles = triton.cdiv(2 * F, BLOCK_N), plan.tiles_X5.shape[0]
    group = min(plan.group, triton.cdiv(most_tiles, E))  # of an expert that gets its share
    return min(max(plan.group, triton.cdiv(2 * programs, column_tiles) + 2 * group), most_tiles)


def up_ahead(
    x_TD: torch.Tensor, token_of_row_R: torch.Tensor, gate_up_E2FD: torch.Tensor, plan: TilePlan,
    hidden_RF: torch.Tensor, programs: int,
) -> None:
    """hidden_RF = SwiGLU of the rows' tokens through their experts' interleaved gate_up_E2FD.

    All bf16 and contiguous but token_of_row_R (R,) int32; a plan in tiles of 128 rows that no other up projection has
    used; programs: the GPU's SMs. Takes window_tiles_for(...) * 128 * D values of memory while it runs. Raises
    ValueError for other shapes, dtypes or plans, and unless D and F are multiples of 8.
    """
    R = token_of_row_R.numel()
    check("token_of_row_R", token_of_row_R, (R,), torch.int32)
    operands = up_operands(x_TD, R, gate_up_E2FD, plan, hidden_RF, 128)
    if R > 0:
        plan.count_once("up")
        E, two_F, D = gate_up_E2FD.shape
        window_tiles = window_tiles_for(plan, two_F // 2, E, programs)
        window = x_TD.new_empty(window_tiles * 2 * ROWS, D)
        up_ahead_kernel[(programs,)](
            x_TD, token_of_row_R, describe(window, ROWS), window, window_tiles, plan.ready_X, plan.read_X,
            plan.claimed_up, *operands, launch_cooperative_grid=True, **LAUNCH)
