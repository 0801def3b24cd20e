"""The rows are looped over on the host, a launch each."""

from __future__ import annotations

import torch

import common.level  # noqa: F401  (before triton: picks Triton's interpreter where there is no GPU)

import triton
import triton.language as tl

SAYS = "one launch"

# R rows, F expert width. A tensor's suffix is its shape: gate_up_R2F is (R, 2F).


@triton.jit
def silu_mul_kernel(
    gate_up_ptr,  # (R, 2F) contiguous: F gate columns, then F up columns
    hidden_ptr,  # (R, F) contiguous, same dtype
    F,
    BLOCK_F: tl.constexpr,
):
    """hidden = silu(gate) * up, computed in float32 and rounded once, when it is stored.

    Grid (R, cdiv(F, BLOCK_F)): a program owns BLOCK_F columns of one row.
    """
    row = tl.program_id(0).to(tl.int64)  # row * 2F passes 2**31 at real sizes
    column = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = column < F
    gate_ptrs = gate_up_ptr + row * 2 * F + column
    gate = tl.load(gate_ptrs, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_ptrs + F, mask=inside, other=0.0).to(tl.float32)
    tl.store(hidden_ptr + row * F + column, gate * tl.sigmoid(gate) * up, mask=inside)


def silu_mul(gate_up_R2F: torch.Tensor, hidden_RF: torch.Tensor) -> None:
    """Write silu(gate) * up of (R, 2F) into hidden_RF (R, F), in one launch."""
    R, F = hidden_RF.shape
    if R == 0:
        return  # a grid of 0 programs is an error on a GPU
    block_F = min(1024, triton.next_power_of_2(F))
    for row in range(R):
        silu_mul_kernel[(1, triton.cdiv(F, block_F))](gate_up_R2F[row], hidden_RF[row], F, BLOCK_F=block_F)
