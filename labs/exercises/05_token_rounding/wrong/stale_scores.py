"""The scores are those of top-k, with the dropped ones set to zero."""

import torch

SAYS = "stale scores"


def rounded_scores(probs_TE: torch.Tensor, chosen_TE: torch.Tensor) -> torch.Tensor:
    top = probs_TE.topk(2, dim=1)
    scores_TK = top.values / top.values.sum(dim=1, keepdim=True)
    return torch.zeros_like(probs_TE).scatter(1, top.indices, scores_TK) * chosen_TE
