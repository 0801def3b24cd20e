"""Both factors are shares of rows: the value falls with imbalance, but nothing can be learnt from it."""

import torch

SAYS = "shares squared"


def balance_loss(probs_TE: torch.Tensor, expert_ids_TK: torch.Tensor) -> torch.Tensor:
    E = probs_TE.shape[1]
    share_E = expert_ids_TK.flatten().bincount(minlength=E) / expert_ids_TK.numel()
    return E * share_E.square().sum()
