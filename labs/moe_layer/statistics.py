"""How evenly the experts are used, and what capacity and rounding cost: of one forward, and over a training."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# E experts.

Loads = tuple[torch.Tensor, torch.Tensor]  # rows chosen and rows computed an expert, (E,) int64 each


def recomputing() -> bool:
    """Whether this runs inside a backward: torch.utils.checkpoint computes a forward again there, of either kind, and
    what a forward counts has been counted then."""
    return torch._C._current_graph_task_id() != -1


def gini(rows_E: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of all E*E pairs over twice the mean, as a 0-d tensor: 0 if all loads are equal,
    (E-1)/E if one expert has all rows, 0 if there are none. Also of (..., E), over its last dimension."""
    sorted_E = rows_E.to(torch.float64).sort(dim=-1).values
    E = sorted_E.shape[-1]
    ranks_E = 2 * torch.arange(1, E + 1, device=rows_E.device, dtype=torch.float64) - E - 1
    total = sorted_E.sum(dim=-1)
    return torch.where(total > 0, (ranks_E * sorted_E).sum(dim=-1) / (E * total.clamp_min(1e-30)), 0.0)


def evenness(rows_E: torch.Tensor) -> torch.Tensor:
    """(..., E) -> (..., 4) float64: entropy of the loads in nats (log E if equal), Gini, coefficient of variation,
    largest load over the mean. Zeros where there are no rows."""
    load_E = rows_E.to(torch.float64)
    mean = load_E.mean(dim=-1)
    share_E = load_E / load_E.sum(dim=-1, keepdim=True).clamp_min(1e-30)
    entropy = -(share_E * share_E.clamp_min(1e-30).log()).sum(dim=-1)
    spread = load_E.std(dim=-1, correction=0) / mean.clamp_min(1e-30)
    peak = load_E.amax(dim=-1) / mean.clamp_min(1e-30)
    return torch.stack((entropy, gini(rows_E), spread, peak), dim=-1)


@dataclass(frozen=True)
class LoadStats:
    """Loads of one forward, or of `forwards` of them: then rows are totals, and the four measures of evenness are
    means over the forwards.

    rows_per_expert: rows the router chose each expert for. entropy in nats. dropped and added: chosen rows that were
    not computed, and computed rows that were not chosen (capacity, token rounding). padded: rows of row tiles of
    `tile` that hold nothing.
    """

    forwards: int
    rows_per_expert: tuple[int, ...]
    entropy: float
    gini: float
    coefficient_of_variation: float
    max_over_mean: float
    dropped: int
    added: int
    padded: int


class LoadRecorder:
    """Keeps counts on the device and reduces them many forwards at a time, so that recording costs no launches and
    makes nobody wait; reading does.

    Plain tensors and no buffers: DDP would overwrite buffers with rank 0's, and state dicts would carry them.
    """

    BATCH = 64  # forwards

    def __init__(self, tile: int):
        self.tile = tile
        self.reset()

    def reset(self) -> None:
        """Forget all forwards."""
        self.last: Loads | None = None
        self.pending: list[Loads] = []
        self.sums: tuple[torch.Tensor, ...] | None = None
        self.forwards = 0

    def record(self, chosen_E: torch.Tensor, computed_E: torch.Tensor, running: bool) -> None:
        """chosen_E and computed_E (E,) int64: rows before and after capacity and rounding. `running` adds them to
        the totals."""
        self.last = (chosen_E, computed_E)
        if running:
            self.pending.append(self.last)
            if len(self.pending) == self.BATCH:
                self._reduce()

    @torch.no_grad()
    def _reduce(self) -> None:
        if self.pending:
            new = self._measure(self.pending)
            self.sums = new if self.sums is None else tuple(a + b for a, b in zip(self.sums, new, strict=True))
            self.forwards += len(self.pending)
            self.pending = []

    def _measure(self, forwards: list[Loads]) -> tuple[torch.Tensor, ...]:
        """Summed over forwards: loads (E,), the four of `evenness`, and dropped, added, padded rows."""
        chosen_NE, computed_NE = (torch.stack(rows) for rows in zip(*forwards, strict=True))
        change_NE = computed_NE - chosen_NE
        padded_NE = (self.tile - computed_NE % self.tile) % self.tile
        counts = torch.stack((-change_NE.clamp_max(0).sum(), change_NE.clamp_min(0).sum(), padded_NE.sum()))
        return chosen_NE.sum(dim=0), evenness(chosen_NE).sum(dim=0), counts

    def read(self, running: bool) -> LoadStats:
        """The last forward's, or the running totals. Raises RuntimeError if there is none yet."""
        if running:
            self._reduce()
            parts, forwards = self.sums, self.forwards
        else:
            parts, forwards = self.last and self._measure([self.last]), 1
        if parts is None:
            raise RuntimeError("stats() has nothing to tell: run a forward first, with collect_stats on"
                               + (" and in training mode" if running else ""))
        rows_E, measures, counts = parts
        return LoadStats(forwards, tuple(rows_E.tolist()), *(measures / forwards).tolist(), *counts.tolist())
