"""Level 0: naive. The MoE layer as its formula reads, in Python loops.

Adds   the layer itself: route, then for every expert and every top-k slot a masked feed-forward.
Why    this is what one writes first, and what the other levels must equal.
How    for each of E experts, for each of K slots:
           find the tokens whose slot holds the expert -> gather them -> gate, up, SiLU, down
           -> add score * result to their rows
Costs  E * K * about 15 launches, each of few rows, and a wait of the host at every search, because
       how many tokens were found must be known before the next launch.
Needs  PyTorch.
Run    python labs/level0_naive.py --preset qwen3-30b-a3b --tokens 512
Diff   this is the bottom.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.nn.functional import linear, silu

from common.config import MoEConfig
from common.level import Level, main
from common.model import Weights

# T tokens, D model width, F expert width, E experts, K top-k, R = T*K routed rows.
# A tensor's suffix is its shape: x_TD is (T, D), gate_up_E2FD is (E, 2F, D).

LEVEL = Level(
    number=0,
    name="naive",
    adds="Python loops over experts and top-k slots",
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


def dispatch(expert_ids_TK: torch.Tensor, expert: int, slot: int) -> torch.Tensor:
    """(N,) int64: the tokens whose `slot` holds `expert`."""
    return (expert_ids_TK[:, slot] == expert).nonzero()[:, 0]


def experts(x_ND: torch.Tensor, gate_up_2FD: torch.Tensor, down_DF: torch.Tensor) -> torch.Tensor:
    """One expert on its N tokens: (N, D) -> (N, D)."""
    gate_NF, up_NF = linear(x_ND, gate_up_2FD).chunk(2, dim=1)
    return linear(silu(gate_NF) * up_NF, down_DF)


def combine(out_TD: torch.Tensor, token_N: torch.Tensor, y_ND: torch.Tensor, scores_T: torch.Tensor) -> None:
    """Add score * y to the tokens' rows of out_TD, in place."""
    out_TD[token_N] += (y_ND * scores_T[token_N, None]).to(y_ND.dtype)


def build(cfg: MoEConfig, weights: Weights) -> Callable[[torch.Tensor], torch.Tensor]:
    """A forward x_TD -> out_TD, (T, D) in the weights' dtype, T >= 0. Raises ValueError on misfit weights."""
    weights.check(cfg)

    def forward(x_TD: torch.Tensor) -> torch.Tensor:
        scores_TK, expert_ids_TK = route(x_TD, weights.router_ED, cfg)
        out_TD = torch.zeros_like(x_TD)
        for expert in range(cfg.E):
            for slot in range(cfg.K):
                token_N = dispatch(expert_ids_TK, expert, slot)
                y_ND = experts(x_TD[token_N], weights.gate_up_E2FD[expert], weights.down_EDF[expert])
                combine(out_TD, token_N, y_ND, scores_TK[:, slot])
        return out_TD

    return forward


if __name__ == "__main__":
    main(LEVEL)
