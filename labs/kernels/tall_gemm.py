"""The grouped GEMMs of grouped_gemm.py with tiles of 192x256: three warpgroups that are their own producers.

For loads of up to 192 rows an expert: one row tile an expert, so each weight is read from memory once. Rows were
gathered before and come by TMA. A separate
producer does not fit: a fourth warpgroup leaves 128 registers a thread, what a 64x256 accumulator alone takes. So every
warpgroup loads its own 64 rows and warpgroup 0 loads the weights too:

    warpgroup 0                warpgroup 1                warpgroup 2
    wait own rows[k], weights[k]: wgmma k in flight, wgmma k-1 done: its stage is ours to refill for step k+3
    own rows[k+3]              own rows[k+3]              own rows[k+3]
    arrive free                arrive free                arrive free
    wait free, weights[k+3]

    barrier            count  a phase ends with
    rows_full[s, wg]   4 x 3  one arrival and the bytes of warpgroup wg's rows in stage s
    weights_full[s]    4      one arrival and the weights' bytes
    free[s]            4      an arrival of each warpgroup: it reads stage s's weights no more

Steps k+3 beyond the tile's last belong to the next tile: its first four stages fill under this one's last wgmmas and
epilogue, hence at least four K steps (D and F over 192). A warpgroup whose 64 rows lie past the expert's end issues no
wgmma; it only passes stages on. Index arrays as in grouped_gemm.py.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from labs.kernels.grouped_gemm import (
    down_operands,
    store_hidden,
    store_hidden_dealt,
    store_y,
    store_y_dealt,
    up_operands,
)
from labs.kernels.launch import launch
from labs.kernels.roles import (
    _ACC,
    _BLOCK_K,
    _BLOCK_N,
    _ROW_BYTES,
    _ROWS,
    _STAGES,
    _WEIGHT_BYTES,
    FOLLOW,
    describe,
    find_tile,
    find_tile_ahead,
    load_weight_rows,
    next_stage,
    open_barriers,
    open_stages,
    walk_tiles,
)
from labs.kernels.tiles import ROWS, TilePlan
from labs.kernels.waiting import follow

TILE_ROWS = 192
GROUP = 16  # row tiles that walk through their expert's weights together
PREFETCHED = 192  # D and F must be over this: the ring holds four K steps

_WARPGROUPS = gl.constexpr(TILE_ROWS // ROWS)


@gluon.jit
def open_ring():
    """Buffers and barriers of the ring."""
    rows, weights = open_stages(_STAGES, _WARPGROUPS)
    rows_full = open_barriers(_STAGES * _WARPGROUPS, 1)
    weights_full = open_barriers(_STAGES, 1)
    free = open_barriers(_STAGES, _WARPGROUPS)
    fence_async_shared()  # TMA, another proxy than the one that wrote them, is to see the barriers set up
    return rows, weights, rows_full, weights_full, free


@gluon.jit
def load_weights(weights_desc, weight_row, k, stage, ring, wanted):
    """256 weight rows of step k by TMA, or nothing at all where there is no next tile."""
    _, weights, _, weights_full, _ = ring
    bar = weights_full.index(stage)
    mbarrier.expect(bar, _WEIGHT_BYTES, pred=wanted)
    load_weight_rows(weights_desc, weight_row, k, bar, weights.index(stage), wanted)


@gluon.jit
def load_rows(rows_desc, row, k, stage, ring, WG: gl.constexpr, wanted):
    """This warpgroup's 64 rows by TMA; where none are wanted the phase completes at once."""
    rows, _, rows_full, _, _ = ring
    slot = stage * _WARPGROUPS + WG
    bar = rows_full.index(slot)
    wanted = wanted > 0
    mbarrier.expect(bar, _ROW_BYTES, pred=wanted)
    mbarrier.arrive(bar, pred=wanted == 0)
    tma.async_copy_global_to_shared(rows_desc, [row + WG * _ROWS, k * _BLOCK_K], bar, rows.index(slot), pred=wanted)


@gluon.jit
def refill(rows_desc, weights_desc, weight_rows, here, after, k_next, k_steps, stage, phase, ring, WG: gl.constexpr):
    """Release `stage` and load step k_next into it; steps past k_steps are the next tile's first, if there is one."""
    _, _, _, _, free = ring
    expert, row, used, column, _ = here
    expert1, row1, used1, column1, _ = after
    beyond = k_next >= k_steps
    k = gl.where(beyond, k_next - k_steps, k_next)
    used = gl.where(beyond, used1, used)  # 0 where there is no next tile
    load_rows(rows_desc, gl.where(beyond, row1, row), k, stage, ring, WG, used - WG * _ROWS)
    mbarrier.arrive(free.index(stage))
    if WG == 0:
        mbarrier.wait(free.index(stage), phase)
        expert = gl.where(beyond, expert1, expert)
        weight_row = expert * weight_rows + gl.where(beyond, column1, column) * _BLOCK_N
        load_weights(weights_desc, weight_row, k, stage, ring, used > 0)


@gluon.jit
def wait_full(ring, stage, phase, WG: gl.constexpr):
    """Wait for this warpgroup's rows and for the weights."""
    _, _, rows_full, weights_full, _ = ring
    mbarrier.wait(rows_full.index(stage * _WARPGROUPS + WG), phase)
    mbarrier.wait(weights_full.index(stage), phase)


@gluon.jit
def warpgroup(rows_desc, weights_desc, out_ptr, width8, walk, weight_rows, ring, finish: gl.constexpr,
              WG: gl.constexpr):
    """Warpgroup WG: its 64 rows of every tile of this program, loaded, multiplied and stored."""
    tiles_ptr, total, column_tiles, k_steps = walk
    rows, weights, _, _, _ = ring
    grid = gl.num_programs(0)
    first = gl.program_id(0)
    if first < total:
        here = find_tile(tiles_ptr, first, column_tiles)
        expert, row, used, column, _row_tile = here
        for s in gl.static_range(_STAGES):
            load_rows(rows_desc, row, s, s, ring, WG, used - WG * _ROWS)
            if WG == 0:
                load_weights(weights_desc, expert * weight_rows + column * _BLOCK_N, s, s, ring, used > 0)
        stage = 0
        phase = 0
        for tile in range(first, total, grid):
            after = find_tile_ahead(tiles_ptr, tile + grid, total, column_tiles)
            expert, row, used, column, _row_tile = here
            if used > WG * _ROWS:
                acc = gl.zeros([_ROWS, _BLOCK_N], gl.float32, _ACC)
                wait_full(ring, stage, phase, WG)
                acc = warpgroup_mma(rows.index(stage * _WARPGROUPS + WG), weights.index(stage).permute((1, 0)), acc,
                                    use_acc=False, is_async=True)
                acc = warpgroup_mma_wait(1, deps=(acc,))
                old_stage = 0 + stage  # not `= stage`: Triton drops a loop-carried name that starts as another's alias
                old_phase = 0 + phase
                stage, phase = next_stage(stage, phase, _STAGES)
                for k in range(1, k_steps):  # the first step stands outside: inside, ptxas serialises the wgmmas
                    wait_full(ring, stage, phase, WG)
                    acc = warpgroup_mma(rows.index(stage * _WARPGROUPS + WG), weights.index(stage).permute((1, 0)), acc,
                                        is_async=True)
                    acc = warpgroup_mma_wait(1, deps=(acc,))
                    refill(rows_desc, weights_desc, weight_rows, here, after, k - 1 + _STAGES, k_steps,
                           old_stage, old_phase, ring, WG)
                    old_stage = stage
                    old_phase = phase
                    stage, phase = next_stage(stage, phase, _STAGES)
                acc = warpgroup_mma_wait(0, deps=(acc,))
                refill(rows_desc, weights_desc, weight_rows, here, after, k_steps - 1 + _STAGES, k_steps,
                       old_stage, old_phase, ring, WG)
                finish(out_ptr, width8 * 8, acc, row + WG * _ROWS, column, row + used)
            else:
                for k in range(k_steps):
                    wait_full(ring, stage, phase, WG)
                    refill(rows_desc, weights_desc, weight_rows, here, after, k + _STAGES, k_steps,
                           stage, phase, ring, WG)
                    stage, phase = next_stage(stage, phase, _STAGES)
            here = after


@gluon.jit
def specialize(rows_desc, weights_desc, out_ptr, width8, walk, weight_rows, ring, finish: gl.constexpr):
    """Three warpgroups, 168 registers a thread each."""
    gl.warp_specialize([
        (warpgroup, (rows_desc, weights_desc, out_ptr, width8, walk, weight_rows, ring, finish, 0)),
        (warpgroup, (rows_desc, weights_desc, out_ptr, width8, walk, weight_rows, ring, finish, 1)),
        (warpgroup, (rows_desc, weights_desc, out_ptr, width8, walk, weight_rows, ring, finish, 2)),
    ], [4, 4], [168, 168])


@gluon.jit(do_not_specialize=["D8", "F8"])
def tall_up_rows_kernel(
    rows_desc,  # (R, D) bf16
    gate_up_desc,  # (E, 2F, D) bf16, gate and up rows interleaved, as describe_weights has it
    hidden_ptr,  # (R, F) bf16
    tiles_ptr,  # (X, 5) int32
    tile_count_ptr,  # (1,) int32
    D8,
    F8,
):
    """hidden = silu(rows @ gate.T) * (rows @ up.T), rows gathered before. D8 and F8 are D / 8 and F / 8.

    Grid (SMs,): a program owns every grid-th tile of 192 rows by 128 hidden columns. Float32 accumulators.
    """
    finish: gl.constexpr = store_hidden_dealt if len(gate_up_desc.block_type.shape) == 5 else store_hidden
    ring = open_ring()
    follow()
    walk = walk_tiles(tiles_ptr, tile_count_ptr, F8 * 16, D8 * 8)
    specialize(rows_desc, gate_up_desc, hidden_ptr, F8, walk, F8 * 16, ring, finish)


@gluon.jit(do_not_specialize=["D8", "F8"])
def tall_down_kernel(
    hidden_desc,  # (R, F) bf16
    down_desc,  # (E, D, F) bf16, as describe_weights has it
    y_ptr,  # (R, D) bf16
    tiles_ptr,  # (X, 5) int32
    tile_count_ptr,  # (1,) int32
    D8,
    F8,
):
    """y = hidden @ down.T. D8 and F8 are D / 8 and F / 8.

    Grid (SMs,): a program owns every grid-th tile of 192 rows by 256 columns. Float32 accumulators.
    """
    finish: gl.constexpr = store_y_dealt if len(down_desc.block_type.shape) == 5 else store_y
    ring = open_ring()
    follow()
    walk = walk_tiles(tiles_ptr, tile_count_ptr, D8 * 8, F8 * 8)
    specialize(hidden_desc, down_desc, y_ptr, D8, walk, D8 * 8, ring, finish)


def check_depth(name: str, size: int) -> None:
    """Raise ValueError unless the inner dimension fills the ring."""
    if size <= PREFETCHED:
        raise ValueError(f"{name}={size}: the 192-row kernels need more than {PREFETCHED}, use grouped_gemm")


def tall_up_rows(
    rows_RD: torch.Tensor, gate_up_E2FD: torch.Tensor, plan: TilePlan, hidden_RF: torch.Tensor, programs: int
) -> None:
    """grouped_gemm.up_rows in tiles of 192 rows. Raises ValueError as it does, and unless D > 192."""
    operands = up_operands(rows_RD, rows_RD.shape[0], gate_up_E2FD, plan, hidden_RF, TILE_ROWS)
    check_depth("D", gate_up_E2FD.shape[2])
    if rows_RD.shape[0] > 0:
        launch(tall_up_rows_kernel, (programs,), describe(rows_RD, ROWS), *operands, **FOLLOW)


def tall_down(
    hidden_RF: torch.Tensor, down_EDF: torch.Tensor, plan: TilePlan, y_RD: torch.Tensor, programs: int
) -> None:
    """grouped_gemm.down in tiles of 192 rows. Raises ValueError as it does, and unless F > 192."""
    operands = down_operands(hidden_RF, down_EDF, plan, y_RD, TILE_ROWS)
    check_depth("F", down_EDF.shape[2])
    if hidden_RF.shape[0] > 0:
        launch(tall_down_kernel, (programs,), *operands, **FOLLOW)
