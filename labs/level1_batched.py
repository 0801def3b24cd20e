"""Level 1: batched. No Python loop: every routed row brings its own copy of its expert's weights.

Adds   gather each routed row's weights, then one einsum a projection over all rows.
Why    level 0 launches about 15 * E * K small kernels and waits for the GPU E * K times.
How    expert_of_row_R -> gate_up_E2FD[expert_of_row_R], one (2F, D) matrix a row
       -> batched matrix-vector product -> SiLU, multiply -> the same with down_EDF
Costs  3*R*D*F gathered weights, written and read again: bytes that grow with tokens, not with
       experts. It wins while R is small, loses to the loop when R is large, then runs out of memory.
Needs  PyTorch.
Run    python labs/level1_batched.py --preset qwen3-30b-a3b --tokens 64
Diff   make diff N=1
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.nn.functional import silu

from common.config import MoEConfig
from common.level import Claims, Level, main
from common.model import Weights

# T tokens, D model width, F expert width, E experts, K top-k, R = T*K routed rows.
# A tensor's suffix is its shape: x_TD is (T, D), gate_up_E2FD is (E, 2F, D).

LEVEL = Level(
    number=1,
    name="batched",
    adds="gather each row's weights, einsum over all rows",
    changes=("dispatch", "experts", "combine", "build"),
    claims=Claims(host_syncs=0),
)


def router_logits(x_TD: torch.Tensor, router_ED: torch.Tensor) -> torch.Tensor:
    """(T, E) float32 logits. Logits rounded to bfloat16 would pick other experts on near ties."""
    if x_TD.is_cuda and x_TD.dtype != torch.float32:
        return torch.mm(x_TD, router_ED.T, out_dtype=torch.float32)
    return x_TD.float() @ router_ED.T.float()


def route(x_TD: torch.Tensor, router_ED: torch.Tensor, cfg: MoEConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Each token's K experts: scores_TK float32 and expert_ids_TK int64, best first."""
    logits_TE = router_logits(x_TD, router_ED)
    if cfg.scoring == "softmax_topk":
        scores_TK, expert_ids_TK = logits_TE.softmax(dim=1).topk(cfg.K, dim=1)
    else:
        top_logits_TK, expert_ids_TK = logits_TE.topk(cfg.K, dim=1)
        scores_TK = top_logits_TK.softmax(dim=1)
    if cfg.renormalize:
        scores_TK = scores_TK / scores_TK.sum(dim=1, keepdim=True)
    return scores_TK, expert_ids_TK


def dispatch(x_TD: torch.Tensor, expert_ids_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The routed rows, a token's K rows side by side: x_RD (R, D) and expert_of_row_R (R,) int64."""
    return x_TD.repeat_interleave(expert_ids_TK.shape[1], dim=0), expert_ids_TK.flatten()


def experts(x_RD: torch.Tensor, expert_of_row_R: torch.Tensor, weights: Weights) -> torch.Tensor:
    """Every row through its own expert: (R, D) -> (R, D)."""
    gate_up_R2F = torch.einsum("rd,rfd->rf", x_RD, weights.gate_up_E2FD[expert_of_row_R])
    gate_RF, up_RF = gate_up_R2F.chunk(2, dim=1)
    hidden_RF = silu(gate_RF) * up_RF
    return torch.einsum("rf,rdf->rd", hidden_RF, weights.down_EDF[expert_of_row_R])


def combine(y_RD: torch.Tensor, scores_TK: torch.Tensor) -> torch.Tensor:
    """Sum each token's K rows, weighted by score in float32: (R, D) -> (T, D)."""
    y_TKD = y_RD.unflatten(0, scores_TK.shape)
    return (y_TKD * scores_TK[:, :, None]).sum(dim=1).to(y_RD.dtype)


def build(cfg: MoEConfig, weights: Weights) -> Callable[[torch.Tensor], torch.Tensor]:
    """A forward x_TD -> out_TD, (T, D) in the weights' dtype, T >= 0. Raises ValueError on misfit weights."""
    weights.check(cfg)

    def forward(x_TD: torch.Tensor) -> torch.Tensor:
        scores_TK, expert_ids_TK = route(x_TD, weights.router_ED, cfg)
        x_RD, expert_of_row_R = dispatch(x_TD, expert_ids_TK)
        y_RD = experts(x_RD, expert_of_row_R, weights)
        return combine(y_RD, scores_TK)

    return forward


if __name__ == "__main__":
    main(LEVEL)
