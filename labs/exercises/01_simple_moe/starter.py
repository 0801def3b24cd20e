"""Exercise 01: a Mixture-of-Experts layer, step by step. Read problem.md, then fill in each function.

Check your work with: python labs/exercises/01_simple_moe/test_exercise.py
"""

from __future__ import annotations

import torch

# T tokens, D model width, F expert width, E experts, K top-k, N the tokens of one expert.
# A tensor's suffix is its shape: x_TD is (T, D), gate_up_2FD is (2F, D).


def route(x_TD: torch.Tensor, router_ED: torch.Tensor, K: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose each token's K experts.

    x_TD (T, D) float, router_ED (E, D) same dtype, 1 <= K <= E.
    Returns scores_TK (T, K), the chosen probabilities divided by their sum, and expert_ids_TK (T, K) int64,
    best first.
    """
    raise NotImplementedError("route: logits, softmax over the experts, the K largest, divide by their sum")


def assign(expert_ids_TK: torch.Tensor, E: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Find the rows of every expert.

    expert_ids_TK (T, K) int64. Returns E pairs, one for each expert in order: token_N and slot_N, (N,) int64
    each, in increasing order of tokens, such that expert_ids_TK[token_N, slot_N] is that expert. N differs
    from expert to expert and may be 0.
    """
    raise NotImplementedError("assign: for each of the E experts, the tokens and slots that chose it")


def expert_ffn(x_ND: torch.Tensor, gate_up_2FD: torch.Tensor, down_DF: torch.Tensor) -> torch.Tensor:
    """One expert on its N tokens, N >= 0.

    x_ND (N, D), gate_up_2FD (2F, D) with F gate rows and then F up rows, down_DF (D, F), one dtype.
    Returns (N, D).
    """
    raise NotImplementedError("expert_ffn: down(silu(gate(x)) * up(x))")


def aggregate(
    y_END: list[torch.Tensor], rows_E: list[tuple[torch.Tensor, torch.Tensor]], scores_TK: torch.Tensor
) -> torch.Tensor:
    """Add up each token's K results, weighted by its scores.

    y_END is a list of E tensors (N, D), an expert's outputs in the order of its rows; rows_E is what
    `assign` returned; scores_TK (T, K). Returns (T, D).
    """
    raise NotImplementedError("aggregate: add score * result to each row's own token")


def moe_layer(
    x_TD: torch.Tensor, router_ED: torch.Tensor, gate_up_E2FD: torch.Tensor, down_EDF: torch.Tensor, K: int
) -> torch.Tensor:
    """The layer: x_TD (T, D) to (T, D). gate_up_E2FD (E, 2F, D), down_EDF (E, D, F).

    Differentiable in x, the router and the experts' weights.
    """
    raise NotImplementedError("moe_layer: put the four functions above together")
