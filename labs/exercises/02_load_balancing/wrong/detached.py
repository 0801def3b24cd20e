"""The value is right, but the probabilities are cut from the graph."""

import torch

SAYS = "non-differentiable loss"


def balance_loss(probs_TE: torch.Tensor, expert_ids_TK: torch.Tensor) -> torch.Tensor:
    E = probs_TE.shape[1]
    share_E = expert_ids_TK.flatten().bincount(minlength=E) / expert_ids_TK.numel()
    return E * (share_E * probs_TE.detach().mean(dim=0)).sum()
