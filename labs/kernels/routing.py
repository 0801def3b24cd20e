"""Routing in one launch (decode), two (many tokens) or three: logits, top-k, counting sort, work list.

What   From x (T, D) and the router's weights (E, D) everything the GEMMs and the combine need to know:

       index array     shape     from -> to
       expert_ids_TK   (T, K)    token, choice -> expert, best first, ties to the lower expert
       offsets_E1      (E + 1,)  expert -> its first sorted row; the last entry is R
       token_of_row_R  (R,)      sorted row -> token; sorted by expert, then by token
       row_of_slot_TK  (T, K)    token, choice -> sorted row
       work_W4         (W, 4)    row tile -> its expert, that expert's first row, end row and first row tile;
                                 the last of the W entries holds how many of the others are valid

       and scores_TK, float32. All indices are int32. Logits are float32, never rounded to x's dtype.
Why    PyTorch needs a dozen kernels for this, each longer to launch than to run at decode sizes.
How    No sort: labs/kernels/routing_kernels.py counts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from common.config import MoEConfig

from labs.kernels.launch import (
    early_launch, launch, launch_options, pipeline_bytes, require, require_dtype, require_width, sm_count,
)
from labs.kernels.routing_kernels import (
    choose_kernel,
    logits_and_choose_kernel,
    logits_kernel,
    place_kernel,
    route_and_place_kernel,
    work_kernel,
)

import triton
from triton.tools.tensor_descriptor import TensorDescriptor

# T tokens, D model width, E experts, K top-k, R = T*K routed rows, W entries of the work list.

ONE_LAUNCH_TOKENS = 256
GROUP_TOKENS = 128  # of a program of place_kernel, twice as many where that is more programs than SMs
# Each such group adds up what all blocks chose, so that part of the work grows as T squared: reckoned, not timed, it
# takes as long as all the rest from half a million tokens on.
MOST_TOKENS = 1 << 22
MOST_EXPERTS = 512  # a program holds the logits of 16 tokens for all experts: of more, the registers spill


class Routing(NamedTuple):
    """What route returns; the table at the top of the file says what each index array maps."""

    expert_ids_TK: torch.Tensor
    scores_TK: torch.Tensor
    offsets_E1: torch.Tensor
    token_of_row_R: torch.Tensor
    row_of_slot_TK: torch.Tensor
    work_W4: torch.Tensor


class RouteTiling(NamedTuple):
    """How route is spread over the chip."""

    launches: int  # 1, 2 or 3: see routing_kernels.py
    block_T: int  # tokens a program picks experts for
    warps: int
    splits: int = 1  # parts of D
    logits_T: int = 0  # tokens a program of logits_kernel


def route_tiling_for(T: int, E: int, sms: int) -> RouteTiling:
    """Enough programs to fill the chip, few enough partial sums. Measured on an H200."""
    block_E = expert_block(E)
    if T <= ONE_LAUNCH_TOKENS:
        splits = min(16 if E <= 32 else 8, sms // triton.cdiv(T, 16))
        return RouteTiling(1, 16, 8 if T <= 64 or E > 256 else 4, max(1, splits))
    if block_E <= 128 and triton.cdiv(T, 64) > 0.75 * sms:
        return RouteTiling(2, 64, 4)  # two programs an SM: one loads while the other chooses
    logits_T = 128 if T >= 8192 else 64
    splits = max(1, min(8, sms // triton.cdiv(T, logits_T) // triton.cdiv(block_E, 256)))
    block_T, warps = (16, 4) if block_E <= 128 else (32, 8) if block_E == 256 else (16, 8)
    return RouteTiling(3, block_T, warps, splits, logits_T)


def expert_block(E: int) -> int:
    """Experts rounded up to what tl.dot and tl.arange take."""
    return max(16, triton.next_power_of_2(E))


def work_entries(R: int, E: int, row_tile: int) -> int:
    """W: the most row tiles that R rows can need, however they fall on E experts, and one entry for their number; 0
    where row_tile is 0, for no list."""
    if row_tile == 0:
        return 0
    busy = min(E, R)
    return busy + (R - busy) // row_tile + 1


def list_work(offsets_E1: torch.Tensor, R: int, row_tile: int) -> torch.Tensor:
    """work_W4 of R rows that were sorted elsewhere, as by backward_sort.py. offsets_E1 (E + 1,) int32, the last one R.
    No host sync. Raises ValueError where arguments do not fit."""
    E, device = offsets_E1.numel() - 1, offsets_E1.device
    require("offsets_E1", offsets_E1, (max(E, 1) + 1,), torch.int32, device)
    W = work_entries(R, E, row_tile)
    work_W4 = torch.empty(W, 4, dtype=torch.int32, device=device)
    launch(work_kernel, (min(8, W),), offsets_E1, work_W4, E, W, ROW_TILE=row_tile, BLOCK_E=expert_block(E),
           PDL=early_launch(device), num_warps=4, **launch_options(device))
    return work_W4


def new_arrivals(device: torch.device | str) -> torch.Tensor:
    """Counters that every call of route leaves at zero. Calls that share them must not overlap."""
    return torch.zeros(ONE_LAUNCH_TOKENS // 16 + 1, dtype=torch.int32, device=device)


def scores_sum_to_one(cfg: MoEConfig) -> bool:
    """`renormalize` for route: a softmax over the chosen logits is the renormalized softmax over all."""
    return cfg.renormalize or cfg.scoring == "topk_softmax"


def route(
    x_TD: torch.Tensor,
    router_ED: torch.Tensor,
    K: int,
    arrivals_A: torch.Tensor,
    row_tile: int,
    renormalize: bool = True,
    tiling: RouteTiling | None = None,
) -> Routing:
    """Each token's K experts and scores, and the index arrays that sort the R = T*K rows by expert.

    x_TD (T, D), T >= 0, and router_ED (E, D): contiguous, one dtype of DTYPES, D a multiple of 8. arrivals_A from
    new_arrivals. row_tile is what the reader of work_W4 calls a row tile, 0 for no list. Scores are the softmax over
    all E experts, divided by the sum of the chosen ones if `renormalize`. Raises ValueError where arguments do not fit.
    """
    (T, D), (E, _), device = x_TD.shape, router_ED.shape, x_TD.device
    R = T * K
    require_dtype("x_TD", x_TD)
    require("x_TD", x_TD, (T, D), x_TD.dtype, device)
    require("router_ED", router_ED, (E, D), x_TD.dtype, device)
    require_width("D", D)
    if not 1 <= K <= E <= MOST_EXPERTS:
        raise ValueError(f"K={K} and E={E}, but route needs 1 <= K <= E <= {MOST_EXPERTS}")
    if R >= 2**31 or T > MOST_TOKENS:
        raise ValueError(f"T={T} and K={K}, but route takes at most {MOST_TOKENS} tokens and 2**31 rows a call: "
                         f"split the batch")

    def int32(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    W = work_entries(R, E, row_tile)
    out = Routing(int32(T, K), torch.empty(T, K, dtype=torch.float32, device=device), int32(E + 1), int32(R),
                  int32(T, K), int32(W, 4))
    if T == 0:
        out.offsets_E1.zero_()
        out.work_W4.zero_()
        return out

    tiling = tiling or route_tiling_for(T, E, sm_count(device))
    block_T, block_E = tiling.block_T, expert_block(E)
    if block_T > 128 or (tiling.launches == 2 and block_E > 256):
        raise ValueError(f"tiling: {tiling}, but blocks have at most 128 tokens, and two launches at most 256 experts")
    shared_bytes, itemsize = pipeline_bytes(device), x_TD.element_size()
    block_D = 64
    if tiling.launches == 1:  # three stages of tokens and experts in shared memory
        block_D = 1 << min(7, (shared_bytes // (3 * (16 + block_E) * itemsize)).bit_length() - 1)
    num_blocks = triton.cdiv(T, block_T)
    split_D = triton.cdiv(triton.cdiv(D, tiling.splits), block_D) * block_D
    splits = triton.cdiv(D, split_D)
    counts_BE = torch.empty(num_blocks, block_E, dtype=torch.float16, device=device)
    choice = (out.expert_ids_TK, out.scores_TK, out.row_of_slot_TK)
    common = dict(TOP_K=K, TOP_K_POW2=triton.next_power_of_2(K), BLOCK_T=block_T, BLOCK_E=block_E,
                  PDL=early_launch(device))

    if tiling.launches == 1:
        if num_blocks >= arrivals_A.numel():
            raise ValueError(f"tiling: one launch takes at most {arrivals_A.numel() - 1} blocks of tokens, T={T} in "
                             f"blocks of {block_T} are {num_blocks}: use two or three launches")
        partials_SBE = torch.empty(splits, num_blocks * block_T, block_E, dtype=torch.float32, device=device)
        launch(route_and_place_kernel, (num_blocks, splits),
            x_TD, router_ED, partials_SBE, arrivals_A, counts_BE, *choice, out.token_of_row_R, out.offsets_E1,
            out.work_W4, T, D, E, W, split_D, RENORMALIZE=renormalize, ROW_TILE=row_tile, NUM_BLOCKS=num_blocks,
            NUM_BLOCKS_POW2=triton.next_power_of_2(num_blocks), SPLITS=splits, BLOCK_D=block_D,
            num_warps=tiling.warps, **common)
        return out

    # Blocks whose counts place_kernel adds up at a time, at most 32 KB of them; it is compiled for each.
    chunk = max(16, min(triton.next_power_of_2(num_blocks), 16384 // block_E, 256))
    group = GROUP_TOKENS * (2 if triton.cdiv(T, GROUP_TOKENS) > sm_count(device) else 1) // block_T
    groups = triton.cdiv(num_blocks, group)
    scoring = dict(RENORMALIZE=renormalize, EVEN_E=block_E == E)
    logits_T, logits_E = tiling.logits_T or block_T, min(256, block_E)
    # As many stages as fit: of one program an SM, or of two where each also chooses.
    shared_bytes = shared_bytes if tiling.launches == 3 else shared_bytes // 2
    stages = max(1, min(8, shared_bytes // ((logits_T + logits_E) * block_D * itemsize)))
    x_desc = TensorDescriptor.from_tensor(x_TD, [logits_T, block_D])
    router_desc = TensorDescriptor.from_tensor(router_ED, [logits_E, block_D])
    if tiling.launches == 2:
        launch(logits_and_choose_kernel, (num_blocks,),
            x_desc, router_desc, counts_BE, *choice, T, D, E, **scoring, BLOCK_D=block_D,
            STAGES=stages, num_warps=tiling.warps, **common)
    else:
        partials_STE = torch.empty(splits, T, block_E, dtype=torch.float32, device=device)
        launch(logits_kernel, (triton.cdiv(T, logits_T), block_E // logits_E, splits),
            x_desc, router_desc, partials_STE, T, D, split_D, E_PAD=block_E, BLOCK_T=logits_T, BLOCK_E=logits_E,
            BLOCK_D=block_D, STAGES=stages, PDL=common["PDL"], num_warps=8 if logits_T * logits_E >= 16384 else 4)
        launch(choose_kernel, (num_blocks,),
            partials_STE, counts_BE, *choice, T, E, **scoring, SPLITS=splits,
            num_warps=tiling.warps, **common, **launch_options(device))
    launch(place_kernel, (groups,),
        counts_BE, out.expert_ids_TK, out.row_of_slot_TK, out.token_of_row_R, out.offsets_E1,
        out.work_W4, T, E, W, num_blocks, ROW_TILE=row_tile, GROUP=group, CHUNK=chunk, num_warps=8,
        **common, **launch_options(device))
    return out
