"""Experts that train: forward and backward of a SwiGLU mixture, as one differentiable function.

    moe_experts(x_TD, gate_up_E2FD, down_EDF, scores_TK, expert_ids_TK) -> out_TD
    moe_experts_rounded(x_TD, gate_up_E2FD, down_EDF, score_of_entry_C, rounded, plan) -> out_TD

First version: PyTorch operations, to fix the interface; the kernels take their place.
"""

from __future__ import annotations

import itertools

import torch

from labs.kernels.rounding import Plan, Rounded

# T tokens, D model width, F expert width, E experts, K top-k, R = T*K routed rows, C rows after rounding at most.


def sort_rows(expert_ids_TK: torch.Tensor, E: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sort the slots by expert, ties in token order: offsets_E1, token_of_row_R, row_of_slot_TK, all int32. No sync.

    expert_ids_TK (T, K), any integer dtype, entries in 0..E-1 (not checked: that would sync).
    """
    (T, K), device = expert_ids_TK.shape, expert_ids_TK.device
    # The radix sort passes over its keys once a byte: 16-bit keys take a quarter of int64's passes.
    key = torch.int16 if E < 2**15 else torch.int32
    sorted_ids_R, slot_of_row_R = expert_ids_TK.flatten().to(key).sort(stable=True)
    bounds_E1 = torch.arange(E + 1, dtype=key, device=device)
    offsets_E1 = torch.searchsorted(sorted_ids_R, bounds_E1, out_int32=True)
    row_of_slot_R = torch.empty(T * K, dtype=torch.int32, device=device)
    row_of_slot_R.scatter_(0, slot_of_row_R, torch.arange(T * K, dtype=torch.int32, device=device))
    return offsets_E1, (slot_of_row_R // K).int(), row_of_slot_R.view(T, K)


def _experts_loop(x_RD, gate_up_E2FD, down_EDF, offsets_E1):
    bounds = offsets_E1.tolist()
    outs = []
    for e, (start, end) in enumerate(itertools.pairwise(bounds)):
        gate, up = (x_RD[start:end] @ gate_up_E2FD[e].T).chunk(2, dim=1)
        outs.append((torch.nn.functional.silu(gate) * up) @ down_EDF[e].T)
    return torch.cat(outs)


def moe_experts(x_TD: torch.Tensor, gate_up_E2FD: torch.Tensor, down_EDF: torch.Tensor, scores_TK: torch.Tensor,
                expert_ids_TK: torch.Tensor, main_grads: tuple[torch.Tensor, torch.Tensor] | None = None
                ) -> torch.Tensor:
    """out[t] = sum over k of scores[t, k] * expert_(ids[t, k])(x[t]): (T, D) -> (T, D); differentiable.

    Gradients reach x_TD, gate_up_E2FD (E, 2F, D), down_EDF (E, D, F) and scores_TK (T, K) float32. expert_ids_TK
    (T, K) int32 or int64, no expert twice in a row.
    main_grads: float32 buffers shaped as the two weights; the backward adds the weights' gradients to them and gives
    autograd none for the weights.
    """
    if main_grads is not None:
        raise NotImplementedError("main_grads arrive with the kernels")
    offsets_E1, token_of_row_R, row_of_slot_TK = sort_rows(expert_ids_TK, gate_up_E2FD.shape[0])
    y_RD = _experts_loop(x_TD[token_of_row_R], gate_up_E2FD, down_EDF, offsets_E1)
    return (y_RD[row_of_slot_TK].float() * scores_TK[:, :, None]).sum(1).to(x_TD.dtype)


def rounded_scores(probs_TE: torch.Tensor, rounded: Rounded, plan: Plan) -> torch.Tensor:
    """rounded.score_of_entry_C as a differentiable function of probs_TE (T, E); zeros past the rows in use.

    Sums are over (T, E) matrices, not segments: no atomics that add to a place twice, and no host sync.
    """
    entries_C = torch.arange(plan.capacity, device=probs_TE.device)
    used_C = entries_C < rounded.offsets_E1[-1]
    row_C = torch.where(used_C, rounded.row_of_entry_C, entries_C.int()).long()
    expert_C = torch.searchsorted(rounded.offsets_E1[1:], row_C.int(), right=True).clamp_max(plan.E - 1)
    place_C = rounded.token_of_row_C[row_C].long() * plan.E + expert_C
    # Unused entries write into one place more, past the end.
    place_C = torch.where(used_C, place_C, plan.T * plan.E)
    kept = torch.zeros(plan.T * plan.E + 1, dtype=probs_TE.dtype, device=probs_TE.device).scatter(0, place_C, 1.0)
    scores_TE = probs_TE * kept[:-1].view(plan.T, plan.E)
    if plan.renormalize:
        scores_TE = scores_TE / scores_TE.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return torch.nn.functional.pad(scores_TE.flatten(), (0, 1)).gather(0, place_C)


def moe_experts_rounded(x_TD: torch.Tensor, gate_up_E2FD: torch.Tensor, down_EDF: torch.Tensor,
                        score_of_entry_C: torch.Tensor, rounded: Rounded, plan: Plan,
                        main_grads: tuple[torch.Tensor, torch.Tensor] | None = None) -> torch.Tensor:
    """moe_experts over a rounded routing: token t's sum runs over its entries of `rounded`. Differentiable in x_TD,
    both weights and score_of_entry_C (C,) float32: rounded_scores(probs_TE, rounded, plan), or
    rounded.score_of_entry_C where the router does not learn."""
    if main_grads is not None:
        raise NotImplementedError("main_grads arrive with the kernels")
    used = int(rounded.offsets_E1[-1])
    token_of_row = rounded.token_of_row_C[:used]
    y_RD = _experts_loop(x_TD[token_of_row], gate_up_E2FD, down_EDF, rounded.offsets_E1)
    row_of_entry = rounded.row_of_entry_C[:used].long()
    score_of_row = torch.zeros(used, device=x_TD.device).scatter(0, row_of_entry, score_of_entry_C[:used])
    out_TD = torch.zeros(x_TD.shape, device=x_TD.device)
    return out_TD.index_add(0, token_of_row, y_RD.float() * score_of_row[:, None]).to(x_TD.dtype)
