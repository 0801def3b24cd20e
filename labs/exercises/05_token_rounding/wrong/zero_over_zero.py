"""A token that no expert took divides by a sum of 0."""

import torch

SAYS = "0 / 0 for a token that no expert took"


def rounded_scores(probs_TE: torch.Tensor, chosen_TE: torch.Tensor) -> torch.Tensor:
    kept_TE = probs_TE * chosen_TE
    return kept_TE / kept_TE.sum(dim=1, keepdim=True)
