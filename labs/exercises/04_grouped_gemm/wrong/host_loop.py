"""One launch for each expert."""

from __future__ import annotations

import torch

import common.level  # noqa: F401  (before triton: picks Triton's interpreter where there is no GPU)

import triton
import triton.language as tl

SAYS = "a loop over experts on the host"

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
    tile, column_tile = tl.program_id(0), tl.program_id(1)
    experts = tl.arange(0, E_POW2)
    row_starts = tl.load(offsets_ptr + experts, mask=experts < E, other=0)
    row_ends = tl.load(offsets_ptr + experts + 1, mask=experts < E, other=0)
    tiles = tl.cdiv(row_ends - row_starts, BLOCK_M)
    tile_ends = tl.cumsum(tiles, 0)
    if tile >= tl.sum(tiles, 0):
        return
    expert = tl.sum((tile_ends <= tile).to(tl.int32), 0)  # the experts whose tiles all come before this one
    first_tile = tl.sum(tl.where(experts < expert, tiles, 0), 0)
    row_end = tl.load(offsets_ptr + expert + 1)
    row = tl.load(offsets_ptr + expert) + (tile - first_tile) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    row_inside, column_inside = row < row_end, column < N

    depth = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + row.to(tl.int64)[:, None] * K + depth[None, :]  # R * K passes 2**31 at real sizes
    w_ptrs = w_ptr + (expert.to(tl.int64) * N + column)[None, :] * K + depth[:, None]
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        depth_inside = depth < K - k
        a = tl.load(a_ptrs + k, mask=row_inside[:, None] & depth_inside[None, :], other=0.0)
        w = tl.load(w_ptrs + k, mask=depth_inside[:, None] & column_inside[None, :], other=0.0)
        accumulator = tl.dot(a, w, accumulator, input_precision="ieee")
    out_ptrs = out_ptr + row.to(tl.int64)[:, None] * N + column[None, :]
    tl.store(out_ptrs, accumulator, mask=row_inside[:, None] & column_inside[None, :])


def grouped_gemm(
    a_RK: torch.Tensor, w_ENK: torch.Tensor, offsets_E1: torch.Tensor, out_RN: torch.Tensor
) -> None:
    """Write a[rows of e] @ w[e].T into out[rows of e] for every expert e, in one launch."""
    (R, K), (E, N, _) = a_RK.shape, w_ENK.shape
    block_M = block_N = block_K = 32
    if R == 0:
        return
    # E groups that share R rows have at most cdiv(R, block_M) + E tiles: each may end in one that is part empty.
    grid = (triton.cdiv(R, block_M) + E, triton.cdiv(N, block_N))
    for expert in range(E):
        grouped_gemm_kernel[grid](
            a_RK, w_ENK[expert], out_RN, offsets_E1[expert:], 1, N, K,
            E_POW2=1, BLOCK_M=block_M, BLOCK_N=block_N, BLOCK_K=block_K,
        )
