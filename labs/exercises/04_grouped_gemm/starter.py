"""Exercise 04: a grouped GEMM in Triton. Read problem.md, then write the kernel and its launcher.

Check your work with: python labs/exercises/04_grouped_gemm/test_exercise.py
"""

from __future__ import annotations

import torch

import common.level  # noqa: F401  (before triton: picks Triton's interpreter where there is no GPU)

import triton
import triton.language as tl

# R rows sorted by expert, E experts. Inside a GEMM, M, N and K are its axes: out (M, N) = a (M, K) @ w (N, K)^T.
# A tensor's suffix is its shape: w_ENK is (E, N, K), offsets_E1 is (E + 1,).


@triton.jit
def grouped_gemm_kernel(
    a_ptr,  # (R, K) contiguous, rows sorted by expert
    w_ptr,  # (E, N, K) contiguous
    out_ptr,  # (R, N) contiguous
    offsets_ptr,  # (E + 1,) int32
    E,
    N,
    K,
    E_POW2: tl.constexpr,  # a power of two, at least E: the length of a tl.arange over experts
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[rows of e] = a[rows of e] @ w[e]^T for every expert e. Float32 accumulator, rounded when stored.

    Grid (most row tiles, cdiv(N, BLOCK_N)): a program owns BLOCK_M rows of one expert by BLOCK_N columns,
    or nothing, where there are fewer tiles than programs.
    """
    # Your kernel: which expert's tile is this, which rows and columns, loop over K, store.


def grouped_gemm(
    a_RK: torch.Tensor, w_ENK: torch.Tensor, offsets_E1: torch.Tensor, out_RN: torch.Tensor
) -> None:
    """Write a[rows of e] @ w[e].T into out[rows of e] for every expert e, in one launch.

    a_RK (R, K), w_ENK (E, N, K) and out_RN (R, N), contiguous, all float16 or all float32, any sizes, R may be
    0. offsets_E1 (E + 1,) int32, on the device and never read by the host: the rows of expert e are
    offsets_E1[e] to offsets_E1[e + 1] - 1, possibly none. Rows before offsets_E1[0] and from offsets_E1[E] on
    belong to nobody and stay as they are.
    """
    raise NotImplementedError("grouped_gemm: write grouped_gemm_kernel, then launch it here with enough programs")
