"""The fewest rows of the experts that have any."""

import torch

SAYS = "an idle expert counts"


def min_max_ratio(rows_E: torch.Tensor) -> float:
    busy = rows_E[rows_E > 0]
    return (busy.min() / busy.max()).item() if len(busy) else 1.0
