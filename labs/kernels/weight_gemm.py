"""Weight gradients for Hopper, in Triton's Gluon: grouped GEMMs whose reduction runs over an expert's rows.

    dW2 (E, D, F)  = dO gathered.T @ A'       tiles of 128 columns of dO, gathered, by 256 of A'
    dW1 (E, 2F, D) = dH.T @ x gathered        tiles of 128 columns of dH by 256 of x, gathered: no transposing

An expert has as many steps as its rows fill blocks of 64. Where these are few, a tile costs what surrounds them: being
looked up, its first loads, its store; and it reads more bytes than it writes. So one program an SM walks through runs
of tiles that share their 256 columns, and three parties share two rings, 5 stages of 64 rows by 128 columns and 4 of 64
by 256, 208 KB. The 256 columns stay for the whole run if 4 stages hold all their rows.

    producer, 4 warps                             consumers: warpgroups 0 and 1, 64 of the 128 columns each
    look up the run and the rows' tokens          wait full[s] of both rings
    wait empty[s] before either ring              wgmma 64x256x64, one left in flight
    sorted operand by TMA, 1 arrival on full[s];  arrive empty[s - 1]: 2 arrivals; of the 256 columns only where the
    gathered by cp.async, 128 arrivals            run ends, if they stay
                                                  stores, 16 bytes a thread: beside the next tile's steps
                                                  (late_store.py), or before them where these are few; into a
                                                  float32 buffer at once, 8 bytes, read before

Rows past an expert's end are zeros in the gathered operand, the next experts' in the sorted one. An expert without
rows has one step of these, and gets zeros.

All 128 threads arrive on the narrow ring's full[s] in every step, also where TMA fills it (128 + 1 arrivals): so none
falls a round behind, where it would take a phase of empty[s] for the one after the next. The wide ring needs no such
arrivals, as its stages are multiplied with the same step's narrow one.

    index array     shape     from -> to
    offsets_E1      (E + 1,)  expert -> its first row; the last entry: rows in use, <= R
    token_of_row_R  (R,)      row -> token

Determinism: an output element is one accumulator's sum in one order, whatever the schedule.
"""

from __future__ import annotations

import torch

from labs.kernels.launch import sm_count
from labs.kernels.late_store import _ROUNDED_PARTS, finish_parts, no_parts, round_parts, store_pairs, store_part
from labs.kernels.roles import (
    _ACC,
    _ACC_QUARTER,
    _BLOCK_N,
    _ROW_BYTES,
    _SWIZZLED,
    _WARPGROUPS,
    _WEIGHT_BYTES,
    BLOCK_N,
    LAUNCH,
    next_stage,
    open_barriers,
)
from labs.kernels.stores import halves
from labs.kernels.tiles import check_out

import triton  # after common.level, which launch imports
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

# T tokens, D model width, F expert width, E experts, R rows; G gathered and S sorted columns: D and F, or D and 2F.
# In kernels M, N and K are the GEMM tile's axes: 128 and 256 columns, and rows. The operand with 128 is the narrow one.

BLOCK_M = 128
ROWS = 64  # of a step
NARROW_STAGES = 5
WIDE_STAGES = 4

_M_HALF = gl.constexpr(BLOCK_M // 2)
_ROWS = gl.constexpr(ROWS)
# 8 threads a row: gathering.py's 4 have not been tried here.
_GATHER = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
_NARROW_STAGES = gl.constexpr(NARROW_STAGES)
_WIDE_STAGES = gl.constexpr(WIDE_STAGES)


@gluon.jit
def find_run(offsets_ptr, run, walk, WIDE: gl.constexpr):
    """Run -> (expert, its first row, its end, first narrow tile, one past the last, wide tile). Past the last run, the
    last. Runs go along the gathered axis first: D has fewer tiles than a large expert's F, so they meet in L2."""
    total, runs, narrow_tiles, wide_tiles, length = walk
    run = gl.minimum(run, total - 1)
    expert = run // runs
    local = run - expert * runs
    first = gl.load(offsets_ptr + expert)
    end = gl.load(offsets_ptr + expert + 1)
    if WIDE:
        block = local // wide_tiles
        wide = local - block * wide_tiles
    else:
        blocks = gl.cdiv(narrow_tiles, length)
        wide = local // blocks
        block = local - wide * blocks
    return expert, first, end, block * length, gl.minimum(block * length + length, narrow_tiles), wide


@gluon.jit
def steps_of(first, end):
    """K steps over an expert's rows; one, over zeros, where it has none."""
    return gl.maximum(gl.cdiv(end - first, _ROWS), 1)


@gluon.jit
def produce(gathered_ptr, token_of_row_ptr, G8, sorted_desc, offsets_ptr, walk, rings, WIDE: gl.constexpr):
    """Four warps fill both rings. WIDE: the gathered operand is the wide one."""
    narrow, narrow_full, narrow_empty, wide, wide_full, wide_empty = rings
    G = G8 * 8  # so the compiler knows that no 16-byte copy straddles a row's end
    r = gl.arange(0, _ROWS, layout=gl.SliceLayout(1, _GATHER))
    c = gl.arange(0, 64, layout=gl.SliceLayout(0, _GATHER))
    narrow_stage = 0
    narrow_phase = 0
    wide_stage = 0
    wide_phase = 0
    grid = gl.num_programs(0)
    _, first, end, m_first, m_end, n = find_run(offsets_ptr, gl.program_id(0), walk, WIDE)
    token = gl.load(token_of_row_ptr + first + r, mask=first + r < end, other=-1)
    for run in range(gl.program_id(0), walk[0], grid):
        _, first_after, end_after, m_first_after, m_end_after, n_after = find_run(offsets_ptr, run + grid, walk, WIDE)
        steps = steps_of(first, end)
        for m in range(m_first, m_end):
            last_tile = m == m_end - 1
            load_wide = (m == m_first) | (steps > _WIDE_STAGES)
            for k in range(steps):
                row = first + k * _ROWS
                # Tokens a step ahead: the next rows', or the first ones' of this run or the next.
                last = k == steps - 1
                next_row = gl.where(last, gl.where(last_tile, first_after, first), row + _ROWS)
                next_end = gl.where(last & last_tile, end_after, end)
                next_token = gl.load(token_of_row_ptr + next_row + r, mask=next_row + r < next_end, other=-1)
                source = gathered_ptr + (token.to(gl.int64) * G)[:, None]  # T * G passes 2**31 at real sizes
                if load_wide:
                    bar = wide_full.index(wide_stage)
                    mbarrier.wait(wide_empty.index(wide_stage), wide_phase ^ 1)
                    if WIDE:
                        for part in gl.static_range(4):
                            column = n * _BLOCK_N + part * 64 + c
                            async_copy.async_copy_global_to_shared(
                                wide.index(wide_stage).slice(part * 64, 64, dim=1), source + column[None, :],
                                (token >= 0)[:, None] & (column < G)[None, :])
                        async_copy.mbarrier_arrive(bar, increment_count=False)  # once the thread's copies have landed
                    else:
                        mbarrier.expect(bar, _WEIGHT_BYTES)
                        tma.async_copy_global_to_shared(sorted_desc, [row, n * _BLOCK_N], bar, wide.index(wide_stage))
                    wide_stage, wide_phase = next_stage(wide_stage, wide_phase, _WIDE_STAGES)
                bar = narrow_full.index(narrow_stage)
                mbarrier.wait(narrow_empty.index(narrow_stage), narrow_phase ^ 1)
                if WIDE:
                    mbarrier.expect(bar, _WARPGROUPS * _ROW_BYTES)
                    for wg in gl.static_range(_WARPGROUPS):
                        tma.async_copy_global_to_shared(sorted_desc, [row, m * (2 * _M_HALF) + wg * _M_HALF], bar,
                                                        narrow.index(narrow_stage * _WARPGROUPS + wg))
                else:
                    for wg in gl.static_range(_WARPGROUPS):
                        column = m * (2 * _M_HALF) + wg * _M_HALF + c
                        async_copy.async_copy_global_to_shared(
                            narrow.index(narrow_stage * _WARPGROUPS + wg), source + column[None, :],
                            (token >= 0)[:, None] & (column < G)[None, :])
                async_copy.mbarrier_arrive(bar, increment_count=False)  # if WIDE too: no thread a round behind
                narrow_stage, narrow_phase = next_stage(narrow_stage, narrow_phase, _NARROW_STAGES)
                token = next_token
        first, end, m_first, m_end, n = first_after, end_after, m_first_after, m_end_after, n_after


@gluon.jit
def multiply_step(rings, narrow_stage, narrow_phase, wide_stage, wide_phase, acc, WG: gl.constexpr,
                  USE_ACC: gl.constexpr):
    """Wait for a stage of each ring, and multiply them; one wgmma stays in flight."""
    narrow, narrow_full, _, wide, wide_full, _ = rings
    mbarrier.wait(wide_full.index(wide_stage), wide_phase)
    mbarrier.wait(narrow_full.index(narrow_stage), narrow_phase)
    fence_async_shared()  # cp.async wrote through the generic proxy, wgmma reads through the other
    acc = warpgroup_mma(narrow.index(narrow_stage * _WARPGROUPS + WG).permute((1, 0)), wide.index(wide_stage), acc,
                        use_acc=USE_ACC, is_async=True)
    return warpgroup_mma_wait(1, deps=(acc,))


@gluon.jit
def multiply(rings, narrow_stage, narrow_phase, wide_stage, wide_phase, steps, release, WG: gl.constexpr,
             STEPS_BESIDE: gl.constexpr = 0, given=None):
    """Warpgroup WG's 64x256 float32 accumulator over all steps. release: whether the wide stages are done with.

    Part i of `given`, a tile that waits, is stored beside step i + 1 (late_store.py), for each i below STEPS_BESIDE;
    `steps` is more than these.
    """
    _, _, narrow_empty, _, _, wide_empty = rings
    acc = gl.zeros([_M_HALF, _BLOCK_N], gl.float32, _ACC)
    acc = multiply_step(rings, narrow_stage, narrow_phase, wide_stage, wide_phase, acc, WG, False)
    narrow_before = narrow_stage
    wide_before = wide_stage
    narrow_stage, narrow_phase = next_stage(narrow_stage, narrow_phase, _NARROW_STAGES)
    wide_stage, wide_phase = next_stage(wide_stage, wide_phase, _WIDE_STAGES)
    for i in gl.static_range(STEPS_BESIDE):
        acc = multiply_step(rings, narrow_stage, narrow_phase, wide_stage, wide_phase, acc, WG, True)
        mbarrier.arrive(narrow_empty.index(narrow_before))
        mbarrier.arrive(wide_empty.index(wide_before), pred=release)
        store_part(given, i, store_pairs)
        narrow_before = narrow_stage
        wide_before = wide_stage
        narrow_stage, narrow_phase = next_stage(narrow_stage, narrow_phase, _NARROW_STAGES)
        wide_stage, wide_phase = next_stage(wide_stage, wide_phase, _WIDE_STAGES)
    # The first step stands outside: with it inside, ptxas serialises the wgmmas. And not `for _ in range(1, steps)`:
    # what a loop carries and uses for nothing but the bounds of an inner one, Triton 3.6 and 3.7.1 take to be unused,
    # and its first value stands for all.
    step = 1 + STEPS_BESIDE
    while step < steps:
        acc = multiply_step(rings, narrow_stage, narrow_phase, wide_stage, wide_phase, acc, WG, True)
        mbarrier.arrive(narrow_empty.index(narrow_before))
        mbarrier.arrive(wide_empty.index(wide_before), pred=release)
        narrow_before = narrow_stage
        wide_before = wide_stage
        narrow_stage, narrow_phase = next_stage(narrow_stage, narrow_phase, _NARROW_STAGES)
        wide_stage, wide_phase = next_stage(wide_stage, wide_phase, _WIDE_STAGES)
        step += 1
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(narrow_empty.index(narrow_before))
    mbarrier.arrive(wide_empty.index(wide_before), pred=release)
    return acc, narrow_stage, narrow_phase, wide_stage, wide_phase


@gluon.jit
def add_rows(out_ptr, values, row, column, width, end):
    """Add those of 64 rows of float32 before `end` to what is there, a quarter of the columns after the other: more
    would not fit into registers. Four threads share 32 bytes, a whole sector."""
    left, right = halves(values)
    quarters = halves(left) + halves(right)
    for part in gl.static_range(4):
        quarter = gl.convert_layout(quarters[part], _ACC_QUARTER)
        r = row + gl.arange(0, _M_HALF, layout=gl.SliceLayout(1, _ACC_QUARTER))
        c = column + part * (_BLOCK_N // 4) + gl.arange(0, _BLOCK_N // 4, layout=gl.SliceLayout(0, _ACC_QUARTER))
        pointers = out_ptr + (r.to(gl.int64) * width)[:, None] + c[None, :]
        inside = (r < end)[:, None] & (c < width)[None, :]
        gl.store(pointers, gl.load(pointers, mask=inside, other=0.0) + quarter, mask=inside)


@gluon.jit
def consume(out_ptr, G8, S8, offsets_ptr, walk, rings, WG: gl.constexpr, WIDE: gl.constexpr, ACCUMULATE: gl.constexpr):
    """Warpgroup WG of every tile of this program: multiply, and add its 64 rows of the expert's matrix, or keep them:
    to be stored beside the next tile's steps (late_store.py), or before these where they are too few."""
    rows = S8 * 8 if WIDE else G8 * 8
    width8 = G8 if WIDE else S8
    width = width8 * 8
    narrow_stage = 0
    narrow_phase = 0
    wide_stage = 0
    wide_phase = 0
    waiting = no_parts(), 0, 0, 0
    matrix_waiting = out_ptr
    grid = gl.num_programs(0)
    expert, first, end, m_first, m_end, n = find_run(offsets_ptr, gl.program_id(0), walk, WIDE)
    for run in range(gl.program_id(0), walk[0], grid):
        after = find_run(offsets_ptr, run + grid, walk, WIDE)
        steps = steps_of(first, end)
        matrix = out_ptr + expert.to(gl.int64) * rows * width  # E * G * S passes 2**31 at real sizes
        m = m_first
        while m < m_end:
            release = (m == m_end - 1) | (steps > _WIDE_STAGES)
            row = m * (2 * _M_HALF) + WG * _M_HALF
            if ACCUMULATE:
                acc, narrow_stage, narrow_phase, stage_after, phase_after = multiply(
                    rings, narrow_stage, narrow_phase, wide_stage, wide_phase, steps, release, WG)
                add_rows(matrix, acc, row, n * _BLOCK_N, width, rows)
            else:
                given = matrix_waiting, width8, waiting
                if steps > _ROUNDED_PARTS:
                    acc, narrow_stage, narrow_phase, stage_after, phase_after = multiply(
                        rings, narrow_stage, narrow_phase, wide_stage, wide_phase, steps, release, WG, _ROUNDED_PARTS,
                        given)
                else:
                    finish_parts(_ROUNDED_PARTS, store_part, store_pairs, given)
                    acc, narrow_stage, narrow_phase, stage_after, phase_after = multiply(
                        rings, narrow_stage, narrow_phase, wide_stage, wide_phase, steps, release, WG)
                waiting = round_parts(acc), row, n, rows
                matrix_waiting = matrix
            wide_stage = gl.where(release, stage_after, wide_stage)
            wide_phase = gl.where(release, phase_after, wide_phase)
            m += 1
        expert, first, end, m_first, m_end, n = after
    if not ACCUMULATE:
        finish_parts(_ROUNDED_PARTS, store_part, store_pairs, (matrix_waiting, width8, waiting))


@gluon.jit(do_not_specialize=["G8", "S8", "length"])
def weight_gemm_kernel(
    gathered_ptr,  # (T, 8 * G8) bf16: x or dO
    token_of_row_ptr,  # (R,) int32
    sorted_desc,  # (R, 8 * S8) bf16: dH or A'
    out_ptr,  # (E, G, S), or (E, S, G) if WIDE: bf16, or float32 if ACCUMULATE
    offsets_ptr,  # (E + 1,) int32
    E,
    G8,
    S8,
    length,
    WIDE: gl.constexpr,
    ACCUMULATE: gl.constexpr,
):
    """out[e] = gathered[tokens of e].T @ sorted[rows of e], or if WIDE its transpose; added to out if ACCUMULATE.

    Grid (SMs,): a program owns every grid-th run of `length` tiles of 128 by 256. Float32 accumulators.
    """
    narrow_tiles = gl.cdiv((S8 if WIDE else G8) * 8, 2 * _M_HALF)
    wide_tiles = gl.cdiv((G8 if WIDE else S8) * 8, _BLOCK_N)
    runs = gl.cdiv(narrow_tiles, length) * wide_tiles
    walk = E * runs, runs, narrow_tiles, wide_tiles, length
    narrow = gl.allocate_shared_memory(gl.bfloat16, [_NARROW_STAGES * _WARPGROUPS, _ROWS, _M_HALF], _SWIZZLED)
    wide = gl.allocate_shared_memory(gl.bfloat16, [_WIDE_STAGES, _ROWS, _BLOCK_N], _SWIZZLED)
    narrow_full = open_barriers(_NARROW_STAGES, 128 + 1 if WIDE else 128)
    narrow_empty = open_barriers(_NARROW_STAGES, _WARPGROUPS)
    wide_full = open_barriers(_WIDE_STAGES, 128 if WIDE else 1)
    wide_empty = open_barriers(_WIDE_STAGES, _WARPGROUPS)
    fence_async_shared()  # TMA, another proxy than the one that wrote them, is to see the barriers set up
    rings = narrow, narrow_full, narrow_empty, wide, wide_full, wide_empty
    gl.warp_specialize([
        (consume, (out_ptr, G8, S8, offsets_ptr, walk, rings, 0, WIDE, ACCUMULATE)),
        (consume, (out_ptr, G8, S8, offsets_ptr, walk, rings, 1, WIDE, ACCUMULATE)),
        (produce, (gathered_ptr, token_of_row_ptr, G8, sorted_desc, offsets_ptr, walk, rings, WIDE)),
    ], [4, 4], [216, 72])


def run_length(R: int, E: int) -> int:
    """Tiles that share their 256 columns. Where most experts' rows fit the wide ring, four are best (H200, see
    labs/LOG.md); where they do not, nothing stays, and single tiles spread the work best."""
    return 4 if R <= (WIDE_STAGES - 1) * ROWS * E else 1


def weight_gemm(gathered_TG: torch.Tensor, token_of_row_R: torch.Tensor, sorted_RS: torch.Tensor,
                offsets_E1: torch.Tensor, out: torch.Tensor, transposed: bool, accumulate: bool) -> None:
    """weight_grad of backward_weights.py, which has checked the arguments, on sm_90 and in bf16. Raises ValueError for
    an `out` that is not added to, at an address that 16 does not divide."""
    (R, S), G, E = sorted_RS.shape, gathered_TG.shape[1], offsets_E1.numel() - 1
    if not accumulate:
        check_out("out", out, tuple(out.shape))
    if gathered_TG.data_ptr() % 16:  # a gradient may be a view of something flat; cp.async takes 16 bytes
        gathered_TG = gathered_TG.clone()
    length = run_length(R, E)
    narrow, wide = (S, G) if transposed else (G, S)
    runs = E * triton.cdiv(triton.cdiv(narrow, BLOCK_M), length) * triton.cdiv(wide, BLOCK_N)
    box = [ROWS, BLOCK_M // 2 if transposed else BLOCK_N]
    sorted_desc = TensorDescriptor.from_tensor(sorted_RS, box, _SWIZZLED.value)
    weight_gemm_kernel[(min(sm_count(out.device), runs),)](
        gathered_TG, token_of_row_R, sorted_desc, out, offsets_E1, E, G // 8, S // 8, length, WIDE=transposed,
        ACCUMULATE=accumulate, **LAUNCH)
