"""The formula by rank, with ranks that count from 0."""

import torch

SAYS = "Gini of a one-hot load is 1 - 1/E"


def gini(rows_E: torch.Tensor) -> float:
    E = len(rows_E)
    rank_E = torch.arange(E)
    return ((2 * rank_E - E - 1) * rows_E.sort().values).sum().item() / max(1, E * rows_E.sum().item())
