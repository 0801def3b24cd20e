"""Decode GEMMs: a few rows an expert, so the time is that of reading the needed experts' weights.

What   hidden_RF = silu(x[token_of_row] @ gate.T) * (x[token_of_row] @ up.T)     up_swiglu_kernel
       y_RD      = hidden @ down.T                                               down_kernel
Why    At T = 64 a tile of 128 rows would be nine tenths empty, and a grid over all experts would spend
       programs on those without rows. Each needed weight should cross the memory bus once, nothing else often.
How    The operands are swapped: weights are the tall side of tl.dot (wgmma's 64 rows), routed rows the narrow
       one (16 to 128). Weights come by TMA; rows come from L2, x gathered in the load:

       weights (2 * BLOCK_F, BLOCK_D)  -- TMA ------->  shared memory, STAGES deep  --+
                                                                                      +-->  wgmma --> SwiGLU --> hidden
       x rows  (ROWS, BLOCK_D)         -- cp.async -->  shared memory               --+

       A tile is one row tile of one expert by one strip of weight rows. Program p takes the tiles p,
       p + programs, ... Where tiles are small there is a program for each: the hardware balances the load
       better than a persistent grid. The row tiles of an expert are neighbours: only the first reads its weights
       from memory, the others find them in L2. A row tile may have a narrow tail (64 + 16 rows): an expert with
       a few rows more than 64 still reads each weight tile once, for the work of 80 rows instead of 128.
       A kernel starts while the one before it still runs, and waits only where it needs its results.

       index array     shape   from -> to
       token_of_row_R  (R,)    sorted row -> token
       work_W4         (W, 4)  row tile -> expert, its first row, end row, first row tile; the last: how many
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from labs.kernels.launch import (
    SHARED_BYTES, early_launch, launch, launch_options, require, require_dtype, require_width, sm_count,
)
from labs.kernels.routing import work_entries

import triton  # after common.level, which launch imports: it picks Triton's interpreter where there is no GPU
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

# T tokens, D model width, F expert width, E experts, R = T*K routed rows, W entries of the work list.


@triton.jit
def find_tile(
    work_ptr,  # (W, 4)
    tile, strips,
    ROW_TILE: tl.constexpr,
):
    """Tile number to expert, first row, end row, strip; an expert's row tiles are neighbours."""
    entry = work_ptr + tile // strips * 4
    expert = tl.load(entry)
    first_row = tl.load(entry + 1)
    end_row = tl.load(entry + 2)
    within = tile - tl.load(entry + 3) * strips
    row_tiles = (end_row - first_row + (ROW_TILE - 1)) // ROW_TILE
    return expert, first_row + within % row_tiles * ROW_TILE, end_row, within // row_tiles


@triton.jit
def store_columns(
    acc, rows, valid, strip,
    out_ptr,  # (R, N)
    N,
):
    """out[rows, columns of the strip] = acc.T, rounded once. The accumulator's first axis is the columns."""
    n = strip * acc.shape[0] + tl.arange(0, acc.shape[0])
    tl.store(out_ptr + rows.to(tl.int64)[:, None] * N + n[None, :], acc.T.to(out_ptr.dtype.element_ty),
             mask=valid[:, None] & (n < N)[None, :])


@triton.jit
def swiglu(acc):
    """silu(gate) * up of an accumulator (2 * BLOCK_F, rows), 8 gate rows and 8 up rows in turn: (BLOCK_F, rows)."""
    gate, up = acc.reshape(acc.shape[0] // 16, 2, 8, acc.shape[1]).permute(0, 2, 3, 1).split()
    return (gate * tl.sigmoid(gate) * up).reshape(acc.shape[0] // 2, acc.shape[1])


@triton.jit(do_not_specialize=["W"])
def up_swiglu_kernel(
    x_ptr,  # (T, D)
    gate_up_desc,  # (E * 2F / 8, 8, D), box (BLOCK_F / 4, 8, BLOCK_D): blocks of 8 gate and 8 up rows in turn
    token_of_row_ptr,  # (R,) int32
    work_ptr,  # (W, 4) int32
    hidden_ptr,  # (R, F)
    W, D, F,
    ROWS: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """hidden[rows of a tile, columns of a strip] = silu(gate) * up.

    Grid (programs,), any number: a program owns ROWS + TAIL rows of one expert by BLOCK_F columns, tile after tile.
    Float32 accumulators (2 * BLOCK_F, ROWS) and (2 * BLOCK_F, TAIL). A box may reach into the next expert's weights:
    what comes of those is not stored.
    """
    strips = tl.cdiv(F, BLOCK_F)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()  # in this order: down_kernel relies on it
    tiles = tl.load(work_ptr + (W - 1) * 4) * strips
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        expert, first_row, end_row, strip = find_tile(work_ptr, tile, strips, ROWS + TAIL)
        rows = first_row + tl.arange(0, ROWS)
        valid = rows < end_row
        token = tl.load(token_of_row_ptr + rows, mask=valid, other=0)
        x_ptrs = x_ptr + token.to(tl.int64)[:, None] * D
        acc = tl.zeros([2 * BLOCK_F, ROWS], tl.float32)
        if TAIL > 0:
            tail_rows = first_row + ROWS + tl.arange(0, TAIL)
            tail_valid = tail_rows < end_row
            tail_token = tl.load(token_of_row_ptr + tail_rows, mask=tail_valid, other=0)
            tail_ptrs = x_ptr + tail_token.to(tl.int64)[:, None] * D
            tail_acc = tl.zeros([2 * BLOCK_F, TAIL], tl.float32)
        for start in tl.range(0, D, BLOCK_D, num_stages=STAGES):
            d = start + tl.arange(0, BLOCK_D)
            inside = (d < D)[None, :]
            # In three dimensions, and reshaped: wgmma then takes the weights from registers, which frees their buffer
            # a step sooner than from shared memory, where it would need one more (labs/LOG.md, level 8).
            block = (expert * F + strip * BLOCK_F) // 4
            weights = gate_up_desc.load([block, 0, start]).reshape(2 * BLOCK_F, BLOCK_D)
            x = tl.load(x_ptrs + d[None, :], mask=valid[:, None] & inside, other=0.0)
            acc = tl.dot(weights, x.T, acc, input_precision="ieee")
            if TAIL > 0:
                x = tl.load(tail_ptrs + d[None, :], mask=tail_valid[:, None] & inside, other=0.0)
                tail_acc = tl.dot(weights, x.T, tail_acc, input_precision="ieee")
        store_columns(swiglu(acc), rows, valid, strip, hidden_ptr, F)
        if TAIL > 0:
            store_columns(swiglu(tail_acc), tail_rows, tail_valid, strip, hidden_ptr, F)


@triton.jit(do_not_specialize=["W"])
def down_kernel(
    hidden_desc,  # (R, F), box (ROWS, BLOCK_F)
    tail_desc,  # the same, box (TAIL, BLOCK_F)
    down_desc,  # (E * D, F), box (BLOCK_D, BLOCK_F)
    work_ptr,  # (W, 4) int32
    y_ptr,  # (R, D)
    W, D, F,
    ROWS: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_F: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """y[rows of a tile, columns of a strip] = hidden @ down.T.

    Grid (programs,), any number: a program owns ROWS + TAIL rows of one expert by BLOCK_D columns, tile after tile.
    Float32 accumulators (BLOCK_D, ROWS) and (BLOCK_D, TAIL). A box may reach into the next expert's rows or weights:
    what comes of those is not stored.
    """
    strips = tl.cdiv(D, BLOCK_D)
    # Before the wait: no program of this kernel starts before up_swiglu_kernel has waited for the work list.
    tiles = tl.load(work_ptr + (W - 1) * 4) * strips
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        expert, first_row, end_row, strip = find_tile(work_ptr, tile, strips, ROWS + TAIL)
        acc = tl.zeros([BLOCK_D, ROWS], tl.float32)
        if TAIL > 0:
            tail_acc = tl.zeros([BLOCK_D, TAIL], tl.float32)
        for f in tl.range(0, F, BLOCK_F, num_stages=STAGES):
            weights = down_desc.load([expert * D + strip * BLOCK_D, f])
            acc = tl.dot(weights, hidden_desc.load([first_row, f]).T, acc, input_precision="ieee")
            if TAIL > 0:
                tail = tail_desc.load([first_row + ROWS, f])
                tail_acc = tl.dot(weights, tail.T, tail_acc, input_precision="ieee")
        rows = first_row + tl.arange(0, ROWS)
        store_columns(acc, rows, rows < end_row, strip, y_ptr, D)
        if TAIL > 0:
            tail_rows = first_row + ROWS + tl.arange(0, TAIL)
            store_columns(tail_acc, tail_rows, tail_rows < end_row, strip, y_ptr, D)


class Tiling(NamedTuple):
    """How one GEMM walks its weights."""

    strip: int  # output columns a program owns at a time
    depth: int  # of a pipeline step
    stages: int
    warps: int
    persistent: bool  # a program an SM; else a program a tile


class Tiles(NamedTuple):
    """Tilings of both GEMMs, which share the row tile and with it the work list."""

    rows: int
    tail: int
    up: Tiling
    down: Tiling

    @property
    def row_tile(self) -> int:
        """What route must be told."""
        return self.rows + self.tail


def tiles_for(R: int, D: int, F: int, E: int, sms: int) -> Tiles:
    """The best tilings measured on an H200 for R rows, by their mean an expert. Beyond about 128 rows an expert the
    arithmetic counts, not the bytes, and these kernels are the wrong ones."""
    mean = R / E
    if mean > 36:
        rows, tail = (64, 16) if mean <= 66 else (128, 0)
        return Tiles(rows, tail, Tiling(128, 128, 3, 8, True), Tiling(128, 128, 3, 4 if tail else 8, True))
    rows, tail = (16, 0) if mean <= 8 else (32, 0) if mean <= 20 else (32, 16)
    experts = min(E, R)
    up = Tiling(64, 128, 3, 4, False)
    if experts * triton.cdiv(F, up.strip) < 2 * sms:  # few tiles: smaller ones
        up = Tiling(32, 128, 4, 4, False)
    down = Tiling(64, 128, 3 if F < 2048 else 4, 4, False)
    if experts * triton.cdiv(D, down.strip) <= sms:
        # At most a tile an SM: so many stages that two programs, let in early, cannot share one.
        down = down._replace(stages=SHARED_BYTES // ((down.strip + rows + tail) * down.depth * 2))
    return Tiles(rows, tail, up, down)


def programs(tiling: Tiling, most_row_tiles: int, columns: int, sms: int) -> int:
    """Programs to launch, without knowing how many row tiles there are."""
    tiles = most_row_tiles * triton.cdiv(columns, tiling.strip)
    return min(sms, tiles) if tiling.persistent else tiles


def up_swiglu(
    x_TD: torch.Tensor,
    gate_up_E2FD: torch.Tensor,
    token_of_row_R: torch.Tensor,
    work_W4: torch.Tensor,
    tiles: Tiles,
) -> torch.Tensor:
    """Gathered rows of x_TD through their experts' gate and up projections: (T, D) -> hidden_RF (R, F), same dtype.

    gate_up_E2FD (E, 2F, D), gate and up rows interleaved (tiles.py); token_of_row_R and work_W4 int32 from
    route(..., row_tile=tiles.row_tile). D and F are multiples of 8. Raises ValueError where arguments do not fit.
    """
    (T, D), (E, two_F, _), R, device = x_TD.shape, gate_up_E2FD.shape, token_of_row_R.numel(), x_TD.device
    F, W = two_F // 2, work_entries(R, E, tiles.row_tile)
    require_dtype("x_TD", x_TD)
    require("x_TD", x_TD, (T, D), x_TD.dtype, device)
    require("gate_up_E2FD", gate_up_E2FD, (E, 2 * F, D), x_TD.dtype, device)
    require("token_of_row_R", token_of_row_R, (R,), torch.int32, device)
    require("work_W4", work_W4, (W, 4), torch.int32, device)
    require_width("D", D)
    require_width("F", F)
    hidden_RF = torch.empty(R, F, dtype=x_TD.dtype, device=device)
    if R > 0:
        tiling = tiles.up
        box = [tiling.strip // 4, 8, tiling.depth]
        gate_up_desc = TensorDescriptor.from_tensor(gate_up_E2FD.view(E * F // 4, 8, D), box)
        launch(up_swiglu_kernel, (programs(tiling, W - 1, F, sm_count(device)),),
            x_TD, gate_up_desc, token_of_row_R, work_W4, hidden_RF, W, D, F, ROWS=tiles.rows, TAIL=tiles.tail,
            BLOCK_F=tiling.strip, BLOCK_D=tiling.depth, STAGES=tiling.stages, PDL=early_launch(device),
            num_warps=tiling.warps, **launch_options(device))
    return hidden_RF


def down(
    hidden_RF: torch.Tensor, down_EDF: torch.Tensor, work_W4: torch.Tensor, tiles: Tiles
) -> torch.Tensor:
    """Sorted rows through their experts' down projections: (R, F) -> y_RD (R, D), same dtype.

    Launch it right behind up_swiglu, on the same stream: it starts early and trusts that up_swiglu has waited for
    work_W4, int32 from route(..., row_tile=tiles.row_tile). down_EDF (E, D, F); D and F are multiples of 8.
    Raises ValueError where arguments do not fit.
    """
    (R, F), (E, D, _), device = hidden_RF.shape, down_EDF.shape, hidden_RF.device
    W = work_entries(R, E, tiles.row_tile)
    require_dtype("hidden_RF", hidden_RF)
    require("hidden_RF", hidden_RF, (R, F), hidden_RF.dtype, device)
    require("down_EDF", down_EDF, (E, D, F), hidden_RF.dtype, device)
    require("work_W4", work_W4, (W, 4), torch.int32, device)
    require_width("D", D)
    require_width("F", F)
    y_RD = torch.empty(R, D, dtype=hidden_RF.dtype, device=device)
    if R > 0:
        tiling = tiles.down
        launch(down_kernel, (programs(tiling, W - 1, D, sm_count(device)),),
            TensorDescriptor.from_tensor(hidden_RF, [tiles.rows, tiling.depth]),
            TensorDescriptor.from_tensor(hidden_RF, [tiles.tail or tiles.rows, tiling.depth]),
            TensorDescriptor.from_tensor(down_EDF.view(E * D, F), [tiling.strip, tiling.depth]),
            work_W4, y_RD, W, D, F, ROWS=tiles.rows, TAIL=tiles.tail, BLOCK_D=tiling.strip, BLOCK_F=tiling.depth,
            STAGES=tiling.stages, PDL=early_launch(device), num_warps=tiling.warps, **launch_options(device))
    return y_RD
