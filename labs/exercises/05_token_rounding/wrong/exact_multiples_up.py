"""Rounding up takes the tile after, also where the count fills its tiles already."""

import torch

SAYS = "exact multiples are rounded up a tile"


def rounded_counts(rows_E: torch.Tensor, tile: int, mode: str, T: int) -> torch.Tensor:
    below_E, rest_E = rows_E // tile * tile, rows_E % tile
    if mode == "down":
        return below_E
    above_E = (rows_E // tile + 1) * tile
    goes_up_E = above_E <= T
    if mode == "nearest":
        goes_up_E &= 2 * rest_E >= tile
    return above_E.where(goes_up_E, below_E)
