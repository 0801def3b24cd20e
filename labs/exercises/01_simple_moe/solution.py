"""Exercise 01: a Mixture-of-Experts layer, step by step. The model solution."""

from __future__ import annotations

import torch
from torch.nn.functional import linear, silu

# T tokens, D model width, F expert width, E experts, K top-k, N the tokens of one expert.
# A tensor's suffix is its shape: x_TD is (T, D), gate_up_2FD is (2F, D).


def route(x_TD: torch.Tensor, router_ED: torch.Tensor, K: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Each token's K experts: scores_TK, which sum to 1, and expert_ids_TK int64, best first."""
    scores_TK, expert_ids_TK = linear(x_TD, router_ED).softmax(dim=1).topk(K, dim=1)
    return scores_TK / scores_TK.sum(dim=1, keepdim=True), expert_ids_TK


def assign(expert_ids_TK: torch.Tensor, E: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For each of E experts its rows: token_N and slot_N, (N,) int64 each, N >= 0."""
    return [torch.nonzero(expert_ids_TK == expert, as_tuple=True) for expert in range(E)]


def expert_ffn(x_ND: torch.Tensor, gate_up_2FD: torch.Tensor, down_DF: torch.Tensor) -> torch.Tensor:
    """One expert on its N tokens: (N, D) -> (N, D)."""
    gate_NF, up_NF = linear(x_ND, gate_up_2FD).chunk(2, dim=1)
    return linear(silu(gate_NF) * up_NF, down_DF)


def aggregate(
    y_END: list[torch.Tensor], rows_E: list[tuple[torch.Tensor, torch.Tensor]], scores_TK: torch.Tensor
) -> torch.Tensor:
    """Add score * y to each row's own token: (T, D)."""
    out_TD = y_END[0].new_zeros(scores_TK.shape[0], y_END[0].shape[1])
    for y_ND, (token_N, slot_N) in zip(y_END, rows_E, strict=True):
        out_TD = out_TD.index_add(0, token_N, y_ND * scores_TK[token_N, slot_N, None])
    return out_TD


def moe_layer(
    x_TD: torch.Tensor, router_ED: torch.Tensor, gate_up_E2FD: torch.Tensor, down_EDF: torch.Tensor, K: int
) -> torch.Tensor:
    """x_TD (T, D) through the layer: (T, D)."""
    scores_TK, expert_ids_TK = route(x_TD, router_ED, K)
    rows_E = assign(expert_ids_TK, router_ED.shape[0])
    y_END = [expert_ffn(x_TD[token_N], *weights)
             for (token_N, _), *weights in zip(rows_E, gate_up_E2FD, down_EDF, strict=True)]
    return aggregate(y_END, rows_E, scores_TK)
