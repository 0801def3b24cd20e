"""Exercise 05: round every expert's rows to whole tiles. Read problem.md, then fill in each function.

Check your work with: python labs/exercises/05_token_rounding/test_exercise.py
"""

from __future__ import annotations

import torch

# T tokens, E experts, K top-k. probs_TE is the softmax over experts, chosen_TE a mask of who goes where.

MODES = ("down", "up", "nearest")


def rounded_counts(rows_E: torch.Tensor, tile: int, mode: str, T: int) -> torch.Tensor:
    """How many rows each expert shall have.

    rows_E (E,) int64, the rows that top-k gave it, at most T. Returns (E,) int64, multiples of `tile`, each less
    than one tile away from rows_E: the next below for mode "down", the next above for "up", the nearer one for
    "nearest" (half a tile goes up). An exact multiple stays. Where the next above is more than T, there are not
    enough tokens: the next below.
    """
    raise NotImplementedError("rounded_counts: the multiple of the tile below, above, or nearest")


def round_routing(probs_TE: torch.Tensor, expert_ids_TK: torch.Tensor, tile: int, mode: str) -> torch.Tensor:
    """Which tokens each expert takes, so that it takes rounded_counts of them.

    probs_TE (T, E) float, expert_ids_TK (T, K) int64, the top-k choice. Returns chosen_TE (T, E) bool. An expert
    prefers all tokens that chose it over all others, and among both the higher probability, then the lower
    token: rounding down drops its weakest, rounding up adds the best of those that had not chosen it.
    """
    raise NotImplementedError("round_routing: per expert, the first rounded_counts tokens in order of preference")


def rounded_scores(probs_TE: torch.Tensor, chosen_TE: torch.Tensor) -> torch.Tensor:
    """The weights of the rounded routing.

    probs_TE (T, E) float, part of the graph; chosen_TE (T, E) bool. Returns scores_TE (T, E): the chosen
    probabilities divided by their sum, so that they sum to 1 for each token, 0 where not chosen. A token that
    no expert took has zeros only, and a gradient of zero.
    """
    raise NotImplementedError("rounded_scores: renormalise over the experts that took the token")
