"""torch.round takes 0.5 to 0 and 1.5 to 2."""

import torch

SAYS = "half a tile goes up"


def rounded_counts(rows_E: torch.Tensor, tile: int, mode: str, T: int) -> torch.Tensor:
    tiles_E = {"down": torch.floor, "up": torch.ceil, "nearest": torch.round}[mode](rows_E / tile).long()
    return (tiles_E - (tiles_E * tile > T).long()) * tile
