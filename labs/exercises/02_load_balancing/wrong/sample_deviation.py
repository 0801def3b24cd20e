"""torch.std as it comes, which divides by E - 1."""

import torch

SAYS = "divided by E - 1"


def coefficient_of_variation(rows_E: torch.Tensor) -> float:
    return (rows_E.double().std() / rows_E.double().mean().clamp_min(1e-9)).item()
