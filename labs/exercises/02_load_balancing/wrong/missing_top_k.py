"""Rows are divided by tokens: the shares sum to K."""

import torch

SAYS = "the factor 1/top_k is missing"


def balance_loss(probs_TE: torch.Tensor, expert_ids_TK: torch.Tensor) -> torch.Tensor:
    T, E = probs_TE.shape
    share_E = expert_ids_TK.flatten().bincount(minlength=E) / T
    return E * (share_E * probs_TE.mean(dim=0)).sum()
