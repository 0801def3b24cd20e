"""Exercise 02: keep the experts' loads even. The model solution."""

from __future__ import annotations

import math

import torch

# T tokens, E experts, K top-k. rows_E (E,) counts the rows an expert was chosen for; they sum to T*K.


def balance_loss(probs_TE: torch.Tensor, expert_ids_TK: torch.Tensor) -> torch.Tensor:
    """E * sum_e f_e * P_e: f_e an expert's share of the T*K rows, a constant; P_e its mean probability."""
    E = probs_TE.shape[1]
    share_E = expert_ids_TK.flatten().bincount(minlength=E) / expert_ids_TK.numel()
    return E * (share_E * probs_TE.mean(dim=0)).sum()


def expert_capacity(T: int, K: int, E: int, factor: float) -> int:
    """The most rows that an expert may keep."""
    return math.ceil(factor * T * K / E)


def drop(scores_TK: torch.Tensor, expert_ids_TK: torch.Tensor, E: int, capacity: int) -> torch.Tensor:
    """keep_TK bool: each expert's `capacity` best rows by score, ties to the lower token."""
    scores_R, expert_of_row_R = scores_TK.flatten(), expert_ids_TK.flatten()
    keep_R = torch.zeros_like(expert_of_row_R, dtype=torch.bool)
    for expert in range(E):
        row_N = (expert_of_row_R == expert).nonzero()[:, 0]
        best_N = scores_R[row_N].sort(descending=True, stable=True).indices
        keep_R[row_N[best_N[:capacity]]] = True
    return keep_R.view_as(expert_ids_TK)


def reallocate(
    probs_TE: torch.Tensor, expert_ids_TK: torch.Tensor, keep_TK: torch.Tensor, capacity: int
) -> torch.Tensor:
    """Dropped rows, best first, to their token's best expert that has room and not this token; else -1."""
    E = probs_TE.shape[1]
    new_ids_TK = expert_ids_TK.where(keep_TK, -1)
    room_E = capacity - expert_ids_TK[keep_TK].bincount(minlength=E)
    token_N, slot_N = (~keep_TK).nonzero(as_tuple=True)
    order_N = probs_TE[token_N, expert_ids_TK[token_N, slot_N]].sort(descending=True, stable=True).indices
    for token, slot in zip(token_N[order_N].tolist(), slot_N[order_N].tolist(), strict=True):
        for expert in probs_TE[token].sort(descending=True, stable=True).indices.tolist():
            if room_E[expert] > 0 and expert not in new_ids_TK[token]:
                new_ids_TK[token, slot] = expert
                room_E[expert] -= 1
                break
    return new_ids_TK


def gini(rows_E: torch.Tensor) -> float:
    """Mean absolute difference of all E*E pairs, over twice the mean."""
    rows_E = rows_E.double()
    if rows_E.sum() == 0:
        return 0.0
    return ((rows_E[:, None] - rows_E).abs().mean() / (2 * rows_E.mean())).item()


def coefficient_of_variation(rows_E: torch.Tensor) -> float:
    """Standard deviation over all E experts, divided by the mean."""
    rows_E = rows_E.double()
    if rows_E.sum() == 0:
        return 0.0
    return (rows_E.std(correction=0) / rows_E.mean()).item()


def min_max_ratio(rows_E: torch.Tensor) -> float:
    """Fewest rows over most rows."""
    if rows_E.sum() == 0:
        return 1.0
    return (rows_E.min() / rows_E.max()).item()
