"""What keeps the experts' loads even and the router's logits small: two losses and one rule for a bias."""

from __future__ import annotations

import torch

# T tokens, E experts, K top-k.


def count_rows(expert_ids_TK: torch.Tensor, E: int) -> torch.Tensor:
    """(E,) int64: how many times each expert was chosen; an id of E counts nowhere. No host sync (bincount has one)."""
    ids_R = expert_ids_TK.flatten()
    return ids_R.new_zeros(E + 1).scatter_add_(0, ids_R, torch.ones_like(ids_R))[:E]


def balance_loss(probs_TE: torch.Tensor, rows_E: torch.Tensor) -> torch.Tensor:
    """E * sum over e of f_e * P_e, as Switch Transformer has it (arXiv 2101.03961, eq. 4 to 6; GShard, arXiv
    2006.16668, is its forerunner), with f_e an expert's share of all chosen rows, whatever K.

    probs_TE (T, E): the router's score of every expert; a token's are divided by their sum, which leaves a softmax as
    it is and turns sigmoids into DeepSeek-V3's normalised affinities. rows_E (E,): rows an expert was chosen for, a
    constant. Returns a 0-d tensor: 1 if the loads are equal, up to E if one expert has all. 0 if there are no tokens.
    """
    if probs_TE.shape[0] == 0:
        return probs_TE.sum()
    share_E = rows_E.to(probs_TE.dtype) / rows_E.sum().clamp_min(1)
    mean_prob_E = (probs_TE / probs_TE.sum(dim=1, keepdim=True).clamp_min(1e-20)).mean(dim=0)
    return rows_E.numel() * (share_E * mean_prob_E).sum()


def z_loss(logits_TE: torch.Tensor) -> torch.Tensor:
    """The mean over tokens of logsumexp(logits) squared: large logits round badly (ST-MoE, arXiv 2202.08906, eq. 5).
    Returns a 0-d tensor, 0 if there are no tokens."""
    if logits_TE.shape[0] == 0:
        return logits_TE.sum()
    return logits_TE.logsumexp(dim=1).square().mean()


@torch.no_grad()
def move_bias(bias_E: torch.Tensor, rows_E: torch.Tensor, rate: float) -> None:
    """bias += rate * sign(mean load - load), in place: an expert with too many rows becomes less attractive
    (loss-free balancing, arXiv 2408.15664; DeepSeek-V3, arXiv 2412.19437, section 2.1.2)."""
    load_E = rows_E.to(bias_E.dtype)
    bias_E.add_((load_E.mean() - load_E).sign(), alpha=rate)
