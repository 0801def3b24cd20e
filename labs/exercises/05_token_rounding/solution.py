"""Exercise 05: round every expert's rows to whole tiles. The model solution."""

from __future__ import annotations

import torch

# T tokens, E experts, K top-k. probs_TE is the softmax over experts, chosen_TE a mask of who goes where.

MODES = ("down", "up", "nearest")


def rounded_counts(rows_E: torch.Tensor, tile: int, mode: str, T: int) -> torch.Tensor:
    """(E,) int64: multiples of tile, less than one tile from rows_E, at most T."""
    below_E, rest_E = rows_E // tile * tile, rows_E % tile
    least_rest_to_go_up = {"down": tile, "up": 1, "nearest": (tile + 1) // 2}[mode]
    goes_up_E = (rest_E >= least_rest_to_go_up) & (below_E + tile <= T)
    return below_E + tile * goes_up_E


def round_routing(probs_TE: torch.Tensor, expert_ids_TK: torch.Tensor, tile: int, mode: str) -> torch.Tensor:
    """chosen_TE bool: each expert's first rounded_counts tokens, those that chose it first, then by probability."""
    T = probs_TE.shape[0]
    topk_TE = torch.zeros_like(probs_TE, dtype=torch.bool).scatter(1, expert_ids_TK, True)
    counts_E = rounded_counts(topk_TE.sum(dim=0), tile, mode, T)
    # Two stable sorts, the stronger key last. One key, 1 + p for the chosen, would round small p away.
    by_prob_TE = probs_TE.sort(dim=0, descending=True, stable=True).indices
    by_choice_TE = topk_TE.int().gather(0, by_prob_TE).sort(dim=0, descending=True, stable=True).indices
    place_TE = by_prob_TE.gather(0, by_choice_TE).argsort(dim=0)
    return place_TE < counts_E


def rounded_scores(probs_TE: torch.Tensor, chosen_TE: torch.Tensor) -> torch.Tensor:
    """(T, E): chosen probabilities over their sum; zeros for a token without an expert."""
    kept_TE = probs_TE * chosen_TE
    sum_T1 = kept_TE.sum(dim=1, keepdim=True)
    # The 1 goes in before the division: 0 / 0 selected away afterwards still has a NaN gradient.
    return kept_TE / sum_T1.where(chosen_TE.any(dim=1, keepdim=True), 1.0)
