"""Rounding up asks for more rows than there are tokens."""

import torch

SAYS = "more rows than tokens"


def rounded_counts(rows_E: torch.Tensor, tile: int, mode: str, T: int) -> torch.Tensor:
    return (rows_E + {"down": 0, "up": tile - 1, "nearest": tile // 2}[mode]) // tile * tile
