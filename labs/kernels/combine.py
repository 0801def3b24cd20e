"""Combine: out[t] = sum over k of scores[t, k] * y[row_of_slot[t, k]], a gather and a sum.

What   The experts' rows (R, D), sorted by expert, to the layer's output (T, D).
Why    Adding each row into its token would need float atomics, whose order changes from run to run.
How    Each output value is summed by one thread in the order of k, in float32, and rounded once.
       It moves R*D + T*D values and nothing else: it runs at copy bandwidth.

       index array     shape   from -> to
       row_of_slot_TK  (T, K)  token, choice -> sorted row
"""

from __future__ import annotations

import torch

from labs.kernels.launch import early_launch, launch, launch_options, require, require_width

import triton  # after common.level, which launch imports: it picks Triton's interpreter where there is no GPU
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# T tokens, D model width, K top-k, R = T*K routed rows.


@triton.jit
def combine_kernel(
    y_ptr,  # (R, D)
    row_of_slot_ptr,  # (T, K) int32
    scores_ptr,  # (T, K) float32
    out_ptr,  # (T, D)
    D,
    first_column,
    TOP_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """out[t] = sum of scores[t, k] * y[row_of_slot[t, k]] in float32, rounded once, from first_column on.

    Grid (T, cdiv(D - first_column, BLOCK_D)): a program owns BLOCK_D columns of one token.
    """
    t = tl.program_id(0).to(tl.int64)
    d = first_column + tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = d < D
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    total = tl.zeros([BLOCK_D], tl.float32)
    for k in tl.static_range(TOP_K):
        row = tl.load(row_of_slot_ptr + t * TOP_K + k).to(tl.int64)  # R * D passes 2**31 at real sizes
        y = tl.load(y_ptr + row * D + d, mask=inside, other=0.0)
        total += tl.load(scores_ptr + t * TOP_K + k) * y.to(tl.float32)
    tl.store(out_ptr + t * D + d, total.to(out_ptr.dtype.element_ty), mask=inside)


def columns_for(T: int, D: int) -> int:
    """Columns a program owns: few for few tokens, so that all SMs have work. Measured on an H200."""
    most = 2048 if D % 2048 == 0 and T >= 512 else 1024 if T >= 128 else 512
    return min(most, triton.next_power_of_2(D))


def combine(
    y_RD: torch.Tensor, row_of_slot_TK: torch.Tensor, scores_TK: torch.Tensor, out_TD: torch.Tensor | None = None,
    first_column: int = 0,
) -> torch.Tensor:
    """Gather each token's K rows of y_RD and add them, weighted by score: (R, D) -> (T, D), same dtype.

    row_of_slot_TK int32 and scores_TK float32, (T, K), T >= 0; D a multiple of 8. With out_TD, whose columns before
    first_column are summed already, only the others are written, into it. Raises ValueError where shapes, dtypes or
    devices do not fit.
    """
    (T, K), D, device = row_of_slot_TK.shape, y_RD.shape[-1], y_RD.device
    require("y_RD", y_RD, (T * K, D), y_RD.dtype, device)
    require("row_of_slot_TK", row_of_slot_TK, (T, K), torch.int32, device)
    require("scores_TK", scores_TK, (T, K), torch.float32, device)
    require_width("D", D)
    if out_TD is None:
        out_TD = torch.empty(T, D, dtype=y_RD.dtype, device=device)
    require("out_TD", out_TD, (T, D), y_RD.dtype, device)
    if T > 0:
        block_D = columns_for(T, D - first_column)
        launch(combine_kernel, (T, triton.cdiv(D - first_column, block_D)),
            y_RD, row_of_slot_TK, scores_TK, out_TD, D, first_column, TOP_K=K, BLOCK_D=block_D,
            PDL=early_launch(device), num_warps=2 if block_D == 512 and T >= 512 else 4, **launch_options(device))
    return out_TD
