"""Dropped rows are served in token order, so that early tokens take the room."""

import torch

SAYS = "served by position"


def reallocate(
    probs_TE: torch.Tensor, expert_ids_TK: torch.Tensor, keep_TK: torch.Tensor, capacity: int
) -> torch.Tensor:
    new_ids_TK = expert_ids_TK.where(keep_TK, -1)
    room_E = capacity - expert_ids_TK[keep_TK].bincount(minlength=probs_TE.shape[1])
    for token, slot in (~keep_TK).nonzero().tolist():
        for expert in probs_TE[token].sort(descending=True, stable=True).indices.tolist():
            if room_E[expert] > 0 and expert not in new_ids_TK[token]:
                new_ids_TK[token, slot] = expert
                room_E[expert] -= 1
                break
    return new_ids_TK
