"""Which rows the experts compute, once the router has chosen: a capacity cuts, token rounding evens out to tiles."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from labs.kernels.rounding import Plan, Rounded, round_tokens
from labs.moe_layer.rows import SlotRows

# T tokens, E experts, K top-k, R = T*K rows, C rows after rounding at most.


class Admitted(NamedTuple):
    """The rows to compute. By slot: scores_TK float32 and expert_ids_TK int64, where an id of E is a dropped slot, and
    `slots`, the same sorted by expert. Rounded, then without slots: `rounded` and its plan say which rows, and a row's
    score follows from the router's probs_TE, times score_scale."""

    scores_TK: torch.Tensor
    expert_ids_TK: torch.Tensor
    slots: SlotRows | None = None
    rounded: Rounded | None = None
    plan: Plan | None = None
    probs_TE: torch.Tensor | None = None
    score_scale: float = 1.0


def drop_over_capacity(
    scores_TK: torch.Tensor, expert_ids_TK: torch.Tensor, E: int, factor: float | torch.Tensor
) -> torch.Tensor:
    """expert_ids_TK with an id of E in the slots that are dropped: those past the ceil(factor * T*K/E) best of their
    expert, by score, ties to the lower token. No host sync. factor: a float, or a 0-d tensor on the device.

    The capacity is GShard's (arXiv 2006.16668); it drops by position, which makes what becomes of a token depend on
    where in the batch it stands.
    """
    ids_R, device = expert_ids_TK.flatten(), expert_ids_TK.device
    by_score_R = scores_TK.detach().flatten().argsort(descending=True, stable=True)
    sorted_ids_R, order_R = ids_R[by_score_R].sort(stable=True)
    first_E = torch.searchsorted(sorted_ids_R, torch.arange(E, device=device))
    rank_R = torch.arange(ids_R.numel(), device=device) - first_E[sorted_ids_R]
    share = ids_R.numel() / E
    # Less a hair: 1.1 * 10 is a little more than 11 in floating point.
    limit = factor * share - 1e-6
    limit = limit.ceil() if isinstance(limit, torch.Tensor) else math.ceil(limit)
    kept_R = torch.empty_like(ids_R, dtype=torch.bool)
    kept_R[by_score_R[order_R]] = rank_R < limit
    return expert_ids_TK.masked_fill(~kept_R.view_as(expert_ids_TK), E)


@torch.no_grad()
def move_factor(factor: torch.Tensor, rows_E: torch.Tensor, first: float, momentum: float = 0.9) -> None:
    """factor, a 0-d float32, in place: a running mean of the largest load over the mean load, between 1 and twice
    `first`. rows_E (E,): rows an expert was chosen for; where there are none the factor stays. No host sync."""
    load_E = rows_E.to(factor.dtype)
    followed = momentum * factor + (1 - momentum) * load_E.max() / load_E.mean()
    factor.copy_(torch.where(load_E.any(), followed.clamp(1.0, 2.0 * first), factor))


@torch.compiler.disable
def round_choice(probs_TE: torch.Tensor, expert_ids_TK: torch.Tensor, plan: Plan) -> Rounded:
    """Token rounding of the choice (see labs/kernels/rounding.py), by its kernels on a GPU and by PyTorch operations
    on a CPU, where the kernels could only be interpreted. An id of E stands for no choice."""
    probs_TE = probs_TE.detach().float().contiguous()
    if probs_TE.is_cuda:
        return round_tokens(probs_TE, expert_ids_TK.contiguous(), plan)
    return round_on_cpu(probs_TE, expert_ids_TK, plan)


def round_on_cpu(probs_TE: torch.Tensor, expert_ids_TK: torch.Tensor, plan: Plan) -> Rounded:
    """What round_tokens gives, by sorting: the definition, in PyTorch. Entries past those in use are zero here."""
    T, E, unit = plan.T, plan.E, plan.unit
    chosen_TE = torch.zeros(T, E + 1, dtype=torch.bool).scatter_(1, expert_ids_TK.long(), True)[:, :E]
    counts_E = chosen_TE.sum(dim=0)
    floors_E = counts_E // unit * unit
    remainders_E = counts_E - floors_E
    can_rise_E = (remainders_E > 0) & (floors_E + unit <= T)
    if plan.mode == "balance":
        rises = min((int(remainders_E.sum()) + unit // 2) // unit, int(can_rise_E.sum()))
        urgency_E = torch.where(can_rise_E, remainders_E, -1)
        rise_E = torch.zeros(E, dtype=torch.bool)
        rise_E[urgency_E.argsort(descending=True, stable=True)[:rises]] = True
    else:
        rise_E = can_rise_E & (remainders_E >= {"up": 1, "nearest": (unit + 1) // 2}.get(plan.mode, unit))
    targets_E = floors_E + unit * rise_E
    keys_ET = (probs_TE.double() + 2.0 * chosen_TE).T  # a float in [0, 2), so that the chosen come first
    order_ET = keys_ET.argsort(dim=1, descending=True, stable=True)
    kept_ET = torch.zeros(E, T, dtype=torch.bool)
    kept_ET.scatter_(1, order_ET, torch.arange(T).expand(E, T) < targets_E[:, None])

    rows_ET = torch.full((E, T), -1)
    rows_ET[kept_ET] = torch.arange(int(targets_E.sum()))
    token_of_row_C, row_of_entry_C, score_of_entry_C = (torch.zeros(plan.capacity, dtype=dtype) for dtype in
                                                        (torch.int32, torch.int32, torch.float32))
    used = int(targets_E.sum())
    token_of_row_C[:used] = kept_ET.nonzero()[:, 1].int()
    row_of_entry_C[:used] = rows_ET.T[kept_ET.T].int()
    scores_TE = probs_TE * kept_ET.T
    if plan.renormalize:
        scores_TE = scores_TE / scores_TE.sum(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    score_of_entry_C[:used] = scores_TE[kept_ET.T]
    ends_E, ends_T = targets_E.cumsum(0), kept_ET.sum(dim=0).cumsum(0)
    zero = torch.zeros(1, dtype=torch.int64)
    return Rounded(counts_E.int(), torch.cat((zero, ends_E)).int(), token_of_row_C,
                   torch.cat((zero, ends_T)).int(), row_of_entry_C, score_of_entry_C)
