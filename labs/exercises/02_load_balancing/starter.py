"""Exercise 02: keep the experts' loads even. Read problem.md, then fill in each function.

Check your work with: python labs/exercises/02_load_balancing/test_exercise.py
"""

from __future__ import annotations

import torch

# T tokens, E experts, K top-k. rows_E (E,) counts the rows an expert was chosen for; they sum to T*K.


def balance_loss(probs_TE: torch.Tensor, expert_ids_TK: torch.Tensor) -> torch.Tensor:
    """The balance loss of Switch Transformer for top-k routing, before its weight.

    probs_TE (T, E) float, the softmax over experts, part of the graph; expert_ids_TK (T, K) int64, the chosen
    experts. Returns a scalar tensor, differentiable in probs_TE, exactly 1 where every expert has T*K/E rows.
    """
    raise NotImplementedError("balance_loss: E times the sum over experts of share of rows * mean probability")


def expert_capacity(T: int, K: int, E: int, factor: float) -> int:
    """The most rows that an expert may keep: factor times its fair share, T*K/E, rounded up."""
    raise NotImplementedError("expert_capacity: the ceiling of factor * T * K / E")


def drop(scores_TK: torch.Tensor, expert_ids_TK: torch.Tensor, E: int, capacity: int) -> torch.Tensor:
    """Choose the rows that fit.

    scores_TK (T, K) float and expert_ids_TK (T, K) int64; a token's K experts differ. Returns keep_TK (T, K)
    bool: of the rows of each expert, the `capacity` with the highest scores, the lower token first where scores
    are equal.
    """
    raise NotImplementedError("drop: per expert, keep the rows with the highest scores")


def reallocate(
    probs_TE: torch.Tensor, expert_ids_TK: torch.Tensor, keep_TK: torch.Tensor, capacity: int
) -> torch.Tensor:
    """Give each dropped row to its token's next best expert with room.

    probs_TE (T, E), expert_ids_TK (T, K) int64, keep_TK (T, K) bool as `drop` returned it. Dropped rows are
    served in order of their own score, probs_TE[t, expert_ids_TK[t, k]], highest first; equal scores in order of
    token, then slot. A row goes to the expert with the highest probability for its token (the lower number
    where equal) among those that have fewer than `capacity` rows and do not hold a row of this token.
    Returns (T, K) int64: kept rows unchanged, dropped rows with their new expert, or -1 where there is none.
    """
    raise NotImplementedError("reallocate: serve the dropped rows, best first, one at a time")


def gini(rows_E: torch.Tensor) -> float:
    """The Gini coefficient of rows_E (E,) int64: 0 for equal loads, 1 - 1/E with all on one, 0 with no rows."""
    raise NotImplementedError("gini: mean difference of all pairs over twice the mean")


def coefficient_of_variation(rows_E: torch.Tensor) -> float:
    """Standard deviation of rows_E (E,) over all E experts, divided by their mean; 0 with no rows."""
    raise NotImplementedError("coefficient_of_variation: standard deviation over mean")


def min_max_ratio(rows_E: torch.Tensor) -> float:
    """Fewest rows over most rows of rows_E (E,): 1 is even, 0 means an idle expert; 1 with no rows."""
    raise NotImplementedError("min_max_ratio: fewest over most rows")
