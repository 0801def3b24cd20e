"""A dropped row goes to the best expert with room, even if the token has a row there already."""

import torch

SAYS = "to an expert that it has already"


def reallocate(
    probs_TE: torch.Tensor, expert_ids_TK: torch.Tensor, keep_TK: torch.Tensor, capacity: int
) -> torch.Tensor:
    new_ids_TK = expert_ids_TK.where(keep_TK, -1)
    room_E = capacity - expert_ids_TK[keep_TK].bincount(minlength=probs_TE.shape[1])
    token_N, slot_N = (~keep_TK).nonzero(as_tuple=True)
    order_N = probs_TE[token_N, expert_ids_TK[token_N, slot_N]].sort(descending=True, stable=True).indices
    for token, slot in zip(token_N[order_N].tolist(), slot_N[order_N].tolist(), strict=True):
        for expert in probs_TE[token].sort(descending=True, stable=True).indices.tolist():
            if room_E[expert] > 0:
                new_ids_TK[token, slot] = expert
                room_E[expert] -= 1
                break
    return new_ids_TK
