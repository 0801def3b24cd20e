"""Rows sorted by expert from expert ids that are given: a counting sort in two launches, where PyTorch takes a dozen.

    rank   a group of tokens:  slot -> how many earlier slots of the group chose its expert;  rows of each expert
    place  a group of tokens:  + the expert's first row + its rows in earlier groups = the slot's row

The rank inside a block of tokens is a triangle of ones times the 0/1 matrix of choices, one exact tl.dot. No atomics:
every program of `place` adds up the groups' counts itself. A token that names an expert twice gets two rows.

    index array     shape     from -> to
    expert_ids_TK   (T, K)    token, choice -> expert
    offsets_E1      (E + 1,)  expert -> its first row; the last entry is R
    token_of_row_R  (R,)      row -> token; by expert, then by token
    row_of_slot_TK  (T, K)    token, choice -> row
"""

from __future__ import annotations

import torch

import common.level  # isort: skip  # noqa: F401  (picks Triton's interpreter where there is no GPU)
import triton
import triton.language as tl

from labs.kernels.operators import operator

# T tokens, E experts, K top-k, R = T*K routed rows, G groups of tokens.

LONGEST_GROUP = 128  # tokens: of shorter ones, `place` has too many to add up


def group_for(T: int, E: int) -> tuple[int, int, int]:
    """Tokens of a group and of a block, and warps of `rank`: measured on an H200 up to 256 experts (LOG.md). Beyond, a
    block of more tokens would not fit into registers."""
    block_E = max(16, triton.next_power_of_2(E))
    group = max(32, min(LONGEST_GROUP, triton.next_power_of_2(triton.cdiv(T, LONGEST_GROUP))))
    block_T = max(16, min(group, 32 if E > 64 else 64, 8192 // block_E))
    return group, block_T, 4 if group == 32 and block_E <= 256 else 8


@triton.jit
def rank_kernel(
    ids_ptr,  # (T, K) int32 or int64
    ranks_ptr,  # (T, K) int32
    counts_ptr,  # (G, BLOCK_E) int32
    T,
    TOP_K: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Each slot's rank among its expert's slots of this group, and their number. Grid (G,): a program a group."""
    e = tl.arange(0, BLOCK_E)
    i = tl.arange(0, BLOCK_T)
    earlier = (i[None, :] < i[:, None]).to(tl.float16)
    counts = tl.zeros((BLOCK_E,), tl.int32)
    for start in range(0, GROUP, BLOCK_T):
        token = tl.program_id(0) * GROUP + start + i
        inside = token < T
        slots = token.to(tl.int64) * TOP_K
        chosen = tl.zeros((BLOCK_T, BLOCK_E), tl.int32)
        for k in range(TOP_K):
            ids = tl.load(ids_ptr + slots + k, mask=inside, other=-1).to(tl.int32)
            chosen += (ids[:, None] == e[None, :]).to(tl.int32)
        before = tl.dot(earlier, chosen.to(tl.float16)).to(tl.int32) + counts[None, :]  # exact: below 2**11
        for k in range(TOP_K):
            ids = tl.load(ids_ptr + slots + k, mask=inside, other=-1).to(tl.int32)
            mine = ids[:, None] == e[None, :]
            tl.store(ranks_ptr + slots + k, tl.sum(tl.where(mine, before, 0), 1), mask=inside)
            before += mine.to(tl.int32)
        counts += tl.sum(chosen, 0)
    tl.store(counts_ptr + tl.program_id(0) * BLOCK_E + e, counts)


@triton.jit
def place_kernel(
    ids_ptr,  # (T, K) int32 or int64
    rows_ptr,  # (T, K) int32: ranks on entry, rows on exit
    counts_ptr,  # (G, BLOCK_E) int32
    token_of_row_ptr,  # (R,) int32
    offsets_ptr,  # (E + 1,) int32
    R, E, G,
    TOP_K: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows of a group's slots, and their tokens. Grid (G,): a program owns a group; program 0 writes the offsets."""
    group = tl.program_id(0)
    e = tl.arange(0, BLOCK_E)
    total = tl.zeros((BLOCK_E,), tl.int32)
    first = tl.zeros((BLOCK_E,), tl.int32)
    for start in range(0, G, BLOCK_G):
        g = start + tl.arange(0, BLOCK_G)
        counts = tl.load(counts_ptr + g[:, None] * BLOCK_E + e[None, :], mask=(g < G)[:, None], other=0)
        total += tl.sum(counts, 0)
        first += tl.sum(tl.where((g < group)[:, None], counts, 0), 0)
    ends = tl.cumsum(total, 0)
    first += ends - total
    if group == 0:
        tl.store(offsets_ptr + 1 + e, ends, mask=e < E)
        tl.store(offsets_ptr, 0)
    for start in range(0, GROUP * TOP_K, BLOCK):
        local = start + tl.arange(0, BLOCK)
        slot = group * (GROUP * TOP_K) + local
        inside = (local < GROUP * TOP_K) & (slot < R)
        expert = tl.load(ids_ptr + slot, mask=inside, other=0).to(tl.int32)
        row = tl.gather(first, expert, 0) + tl.load(rows_ptr + slot, mask=inside, other=0)
        tl.store(rows_ptr + slot, row, mask=inside)
        tl.store(token_of_row_ptr + row, slot // TOP_K, mask=inside)


@operator("moe_lab::sort_rows")
def sort_rows(expert_ids_TK: torch.Tensor, E: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sort the slots by expert, ties in token order: offsets_E1, token_of_row_R, row_of_slot_TK, all int32. No sync.

    expert_ids_TK (T, K) int32 or int64, contiguous, entries in 0..E-1 (not checked: that would sync); T may be 0.
    Raises ValueError for other dtypes, shapes or strides.
    """
    if expert_ids_TK.dim() != 2 or expert_ids_TK.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"expert_ids_TK is {expert_ids_TK.dtype} {tuple(expert_ids_TK.shape)}: "
                         f"need int32 or int64 (T, K)")
    (T, K), device = expert_ids_TK.shape, expert_ids_TK.device
    if not expert_ids_TK.is_contiguous() or T * K >= 2**30:
        raise ValueError(f"expert_ids_TK (T={T}, K={K}) has strides {expert_ids_TK.stride()}: it must be contiguous, "
                         f"with fewer than 2**30 entries")

    def integers(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    offsets_E1, token_of_row_R, row_of_slot_TK = integers(E + 1), integers(T * K), integers(T, K)
    if T * K == 0:
        return offsets_E1.zero_(), token_of_row_R, row_of_slot_TK
    group, block_T, warps = group_for(T, E)
    G, block_E = triton.cdiv(T, group), max(16, triton.next_power_of_2(E))
    counts_GE = integers(G, block_E)
    rank_kernel[(G,)](expert_ids_TK, row_of_slot_TK, counts_GE, T, TOP_K=K, GROUP=group, BLOCK_T=block_T,
                      BLOCK_E=block_E, num_warps=warps)
    place_kernel[(G,)](expert_ids_TK, row_of_slot_TK, counts_GE, token_of_row_R, offsets_E1, T * K, E, G, TOP_K=K,
                       GROUP=group, BLOCK_E=block_E, BLOCK_G=max(4, 8192 // block_E), BLOCK=1024, num_warps=8)
    return offsets_E1, token_of_row_R, row_of_slot_TK


@sort_rows.operator.register_fake
def _(expert_ids_TK, E):
    T, K = expert_ids_TK.shape

    def integers(*shape):
        return expert_ids_TK.new_empty(shape, dtype=torch.int32)

    return integers(E + 1), integers(T * K), integers(T, K)
