"""Which row tiles a grouped GEMM works on: a table made on the device, shared by the kernels for many rows.

    index array     shape     from -> to
    offsets_E1      (E + 1,)  expert -> its first row; the last entry: rows in use, <= R
    row_of_slot_TK  (T, K)    token, slot -> row
    tiles_X5        (X, 5)    row tile -> expert, first row, rows in use, first tile and size of its group
    claimed_up      (1,)      output tiles of the up projection that programs have taken; zero
    claimed_down    (1,)      the same of the down projection; zero
    ready_X         (X,)      row tile -> its units that up_ahead.py has gathered; zeros up to the count
    begun           (1,)      output tiles that up_ahead.py has begun; zero
    done_B          (4,)      band of columns -> output tiles of down that are stored; zeros
    done_up         (2,)      output tiles of up's first part that are stored, and of the rest (waiting.py); zeros

A group is as many of an expert's row tiles as walk through its weights together, so that they share them in L2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

import common.level  # isort: skip  # noqa: F401  (picks Triton's interpreter where there is no GPU)
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from labs.kernels.launch import early_launch, launch, launch_options

# T tokens, D model width, F expert width, E experts, K top-k, R = T*K routed rows.
# A tensor's suffix is its shape: x_TD is (T, D).

ROWS = 64  # of one warpgroup; a row tile is a multiple of it
INTERLEAVE = 8  # gate and up rows alternate in blocks of 8: one core matrix of wgmma's accumulator
GROUP = 32  # row tiles that walk through their expert's weights together, at most
FIELDS = 5  # of a row tile's entry in the table
BANDS = 4  # counts of bands of columns: a power of 2, though bands are three at most


@triton.jit
def plan_tiles_kernel(
    offsets_ptr,  # (E + 1,) int32
    tiles_ptr,  # (X, 5) int32
    tile_count_ptr,  # (1,) int32
    claimed_up_ptr,  # (1,) int32
    claimed_down_ptr,  # (1,) int32
    ready_ptr,  # (X,) int32
    begun_ptr,  # (1,) int32
    done_ptr,  # (BANDS,) int32
    done_up_ptr,  # (2,) int32
    E,
    BLOCKS: tl.constexpr,
    GROUP: tl.constexpr,
    BANDS: tl.constexpr,
    E_POW2: tl.constexpr,
    PDL: tl.constexpr,
):
    """Write the table of row tiles, BLOCKS * 64 rows each, how many there are, and zeros to all counters.

    Grid (E,): program e owns the entries of expert e. A group is as many of an expert's row tiles as share weights
    in L2: its tiles in equal parts of at most GROUP.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    expert = tl.program_id(0)
    e = tl.arange(0, E_POW2)
    row_start = tl.load(offsets_ptr + e, mask=e < E, other=0)
    row_end = tl.load(offsets_ptr + e + 1, mask=e < E, other=0)
    tiles = tl.cdiv(row_end - row_start, 64 * BLOCKS)
    first = tl.sum(tl.where(e < expert, tiles, 0))
    count = tl.sum(tl.where(e == expert, tiles, 0))
    if expert == E - 1:
        tl.store(tile_count_ptr, first + count)
        tl.store(claimed_up_ptr, 0)
        tl.store(claimed_down_ptr, 0)
        tl.store(begun_ptr, 0)
        tl.store(done_ptr + tl.arange(0, BANDS), tl.zeros([BANDS], tl.int32))
        tl.store(done_up_ptr + tl.arange(0, 2), tl.zeros([2], tl.int32))
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
        tl.store(entry + 2, tl.minimum(end - row, BLOCKS * 64), mask)
        tl.store(entry + 3, first + group_first, mask)
        tl.store(entry + 4, tl.minimum(size, count - group_first), mask)
        tl.store(ready_ptr + first + i, tl.zeros_like(i), mask)


@triton.jit
def spread_rows_kernel(
    x_ptr,  # (T, D) bf16
    row_of_slot_ptr,  # (T, K) int32
    rows_ptr,  # (R, D) bf16
    D,
    TOP_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """rows[row_of_slot[t, k]] = x[t]: a token is read once and written TOP_K times.

    Grid (T, cdiv(D, BLOCK_D)): a program owns BLOCK_D columns of one token.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)  # R * D passes 2**31 at real sizes
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < D
    values = tl.load(x_ptr + token * D + column, mask=inside)
    for k in tl.static_range(TOP_K):
        row = tl.load(row_of_slot_ptr + token * TOP_K + k).to(tl.int64)
        tl.store(rows_ptr + row * D + column, values, mask=inside)


class TilePlan(NamedTuple):
    """The row tiles of one routing: tiles_X5 int32, tile_count int32 (1,), the rows of a tile, and counters, int32, for
    one call of an up kernel in tiles of 128 rows and one of a down kernel; `counted` names those that have been.

    A graph that captures such a call captures plan_tiles too: a replay would find the counters full, and do nothing.
    """

    tiles_X5: torch.Tensor
    tile_count: torch.Tensor
    tile_rows: int
    claimed_up: torch.Tensor
    claimed_down: torch.Tensor
    ready_X: torch.Tensor
    begun: torch.Tensor
    done_B: torch.Tensor
    done_up: torch.Tensor
    counted: list[str]

    def count_once(self, projection: str) -> None:
        """Raise ValueError at a projection's second call: its counters are full, and it would find nothing to do."""
        if projection in self.counted:
            raise ValueError(f"the plan served one {projection} projection already: make a plan for each call")
        self.counted.append(projection)

    def count_parts(self, programs: int) -> None:
        """Note that an up projection by so many programs counts the output tiles of its parts."""
        self.counted.append(f"parts by {programs} programs")

    def require_parts(self, programs: int) -> None:
        """Raise ValueError unless it does: down would wait for good for what nobody counts."""
        if f"parts by {programs} programs" not in self.counted:
            raise ValueError(f"early=True, but this plan served no up_gather by {programs} programs: {self.counted}")


def check(name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> None:
    """Raise ValueError, saying what is needed, unless the tensor is contiguous and has this shape and dtype."""
    if tuple(tensor.shape) != shape or tensor.dtype != dtype or not tensor.is_contiguous():
        raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()}, "
                         f"but must be contiguous {dtype} {shape}")


def check_out(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    """`check` of a bf16 output, which is stored 16 bytes a thread: raises ValueError at an address that 16 does not
    divide, too."""
    check(name, tensor, shape)
    if tensor.data_ptr() % 16:
        raise ValueError(f"{name} lies at an address that 16 does not divide, a view of something else: give a tensor "
                         "of its own")


def check_gemm(E: int, D: int, F: int, plan: TilePlan, tile_rows: int) -> None:
    """Raise ValueError for sizes that TMA cannot address, and for a plan made for other tiles."""
    if E < 1 or D < 8 or F < 8 or D % 8 or F % 8:
        raise ValueError(f"E={E} D={D} F={F}: E must be at least 1, D and F positive multiples of 8")
    if plan.tile_rows != tile_rows:
        raise ValueError(f"the plan has tiles of {plan.tile_rows} rows, this kernel has {tile_rows}")


def interleave_gate_up(gate_up_E2FD: torch.Tensor) -> torch.Tensor:
    """Gate rows then up rows -> blocks of 8 gate rows and 8 up rows in turn, a copy (E, 2F, D). Once, at build.

    Raises ValueError unless F is a multiple of 8.
    """
    E, two_F, D = gate_up_E2FD.shape
    if two_F % (2 * INTERLEAVE):
        raise ValueError(f"2F={two_F}: F must be a multiple of {INTERLEAVE}")
    blocks = gate_up_E2FD.reshape(E, 2, two_F // 2 // INTERLEAVE, INTERLEAVE, D)
    return blocks.transpose(1, 2).reshape(E, two_F, D)


def plan_tiles(offsets_E1: torch.Tensor, R: int, tile_rows: int = 128, group: int = GROUP) -> TilePlan:
    """Cut each expert's rows into tiles of tile_rows, a multiple of 64; no host sync.

    offsets_E1 (E + 1,) int32, the last at most R. Raises ValueError for other shapes, dtypes or sizes.
    """
    E = offsets_E1.numel() - 1
    check("offsets_E1", offsets_E1, (max(E, 1) + 1,), torch.int32)
    if tile_rows < ROWS or tile_rows % ROWS or group < 1:
        raise ValueError(f"tile_rows={tile_rows} group={group}: need a positive multiple of {ROWS}, and at least 1")
    tiles_X5 = offsets_E1.new_empty(triton.cdiv(R, tile_rows) + E, FIELDS)
    tile_count, *counters = (offsets_E1.new_empty(n) for n in (1, 1, 1, tiles_X5.shape[0], 1, BANDS, 2))
    launch(plan_tiles_kernel, (E,),
        offsets_E1, tiles_X5, tile_count, *counters, E,
        BLOCKS=tile_rows // ROWS, GROUP=group, BANDS=BANDS, E_POW2=triton.next_power_of_2(E),
        PDL=early_launch(offsets_E1.device), num_warps=4, **launch_options(offsets_E1.device),
    )
    return TilePlan(tiles_X5, tile_count, tile_rows, *counters, counted=[])


def spread_rows(x_TD: torch.Tensor, row_of_slot_TK: torch.Tensor, rows_RD: torch.Tensor) -> None:
    """rows_RD[row_of_slot_TK[t, k]] = x_TD[t]; other rows are left as they are.

    x_TD (T, D) and rows_RD (R, D) of one dtype, row_of_slot_TK (T, K) int32, every entry in 0..R-1. Raises ValueError.
    """
    (T, D), K = x_TD.shape, row_of_slot_TK.shape[1]
    check("x_TD", x_TD, (T, D), rows_RD.dtype)
    check("row_of_slot_TK", row_of_slot_TK, (T, K), torch.int32)
    check("rows_RD", rows_RD, (rows_RD.shape[0], D), x_TD.dtype)
    if T > 0:
        block_D = min(1024, triton.next_power_of_2(D))
        grid = (T, triton.cdiv(D, block_D))
        launch(spread_rows_kernel, grid, x_TD, row_of_slot_TK, rows_RD, D, TOP_K=K, BLOCK_D=block_D,
               PDL=early_launch(x_TD.device), num_warps=4, **launch_options(x_TD.device))
