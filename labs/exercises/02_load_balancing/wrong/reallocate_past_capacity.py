"""The next best expert is taken without asking whether it has room."""

import torch

SAYS = "an expert is filled past its capacity"


def reallocate(
    probs_TE: torch.Tensor, expert_ids_TK: torch.Tensor, keep_TK: torch.Tensor, capacity: int
) -> torch.Tensor:
    new_ids_TK = expert_ids_TK.where(keep_TK, -1)
    token_N, slot_N = (~keep_TK).nonzero(as_tuple=True)
    order_N = probs_TE[token_N, expert_ids_TK[token_N, slot_N]].sort(descending=True, stable=True).indices
    for token, slot in zip(token_N[order_N].tolist(), slot_N[order_N].tolist(), strict=True):
        for expert in probs_TE[token].sort(descending=True, stable=True).indices.tolist():
            if expert != expert_ids_TK[token, slot] and expert not in new_ids_TK[token]:
                new_ids_TK[token, slot] = expert
                break
    return new_ids_TK
