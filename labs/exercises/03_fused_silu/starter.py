"""Exercise 03: a Triton kernel for SiLU(gate) * up. Read problem.md, then write the kernel and its launcher.

Check your work with: python labs/exercises/03_fused_silu/test_exercise.py
"""

from __future__ import annotations

import torch

import common.level  # noqa: F401  (before triton: picks Triton's interpreter where there is no GPU)

import triton
import triton.language as tl

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
    # Your kernel: which row and columns, which of them exist, load, compute, store.


def silu_mul(gate_up_R2F: torch.Tensor, hidden_RF: torch.Tensor) -> None:
    """Write silu(gate) * up into hidden_RF, in one launch.

    gate_up_R2F (R, 2F) and hidden_RF (R, F), contiguous, both float16 or both float32; R may be 0, F is any
    size of at least 1.
    """
    raise NotImplementedError("silu_mul: write silu_mul_kernel, then launch it here on a grid of (R, cdiv(F, BLOCK_F))")
