"""Level 9: backward. A layer that trains: gradients of x, router and experts, without keeping what can be made again.

Adds   the backward pass: grouped GEMMs for every gradient, on a forward that keeps x and the pre-activations H alone.
Why    level 8 has no gradient, and a forward that autograd may differentiate keeps R*(2*D + 4*F) values between
       passes: the gathered x, H, silu(gate), the product, the experts' output. R*2*F + T*D are enough.
How    forward    x --gather--> up: H and A = silu(gate) * up --> down --> sum over k        keeps x, H, scores, indices
       backward   dO --gather--> dA' = dO down, and in its epilogue A again from H, dS = <dA', A>, dH, A' = s * A
                  dH gate_up, summed over k: dX;  dW1, dW2: GEMMs whose reduction runs over an expert's rows
       The two halves are operators with gradients (labs/kernels/backward.py) on plain Triton kernels; on Hopper, in
       bfloat16 and unless a GEMM is small, on kernels with warp roles: grouped_gemm.py's for y and dX~, train_gemm.py's
       for up and hidden_grad, weight_gemm.py's for dW1 and dW2. No float atomics.
       This file's row in the ladder is the forward that trains: it writes H, which level 8 does not.
Costs  gate and up stay apart, as the optimizer holds them, and a copy repacked at every step would cost more than it
       saves: so level 8's up kernels, which want them interleaved, are not used. D and F are multiples of 8.
Needs  Triton: a GPU of sm_80, 86, 89, 90 or 120, or its interpreter.
Run    python labs/level9_backward.py --preset qwen3-30b-a3b --tokens 16384; training: labs/backward_benchmark.py
Diff   none: from level 9 on a level imports what it stands on
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from common.config import MoEConfig
from common.level import Claims, Level, Unsupported, main
from common.model import Weights
from labs.kernels.backward import moe_experts
from labs.moe_layer.router import RouterLogits

# T tokens, D model width, F expert width, E experts, K top-k, R = T*K routed rows.
# A tensor's suffix is its shape: x_TD is (T, D), gate_up_E2FD is (E, 2F, D).

LEVEL = Level(
    number=9,
    name="backward",
    adds="the backward pass; this row is the forward that trains, which keeps H",
    requires=("triton",),
    claims=Claims(host_syncs=0, max_launches=24),
)


def route(x_TD: torch.Tensor, router_ED: torch.Tensor, cfg: MoEConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Each token's K experts: scores_TK float32, differentiable, and expert_ids_TK int64, best first."""
    logits_TE = RouterLogits.apply(x_TD, router_ED)
    if cfg.scoring == "softmax_topk":
        scores_TK, expert_ids_TK = logits_TE.softmax(dim=1).topk(cfg.K, dim=1)
    else:
        top_logits_TK, expert_ids_TK = logits_TE.topk(cfg.K, dim=1)
        scores_TK = top_logits_TK.softmax(dim=1)
    if cfg.renormalize:
        scores_TK = scores_TK / scores_TK.sum(dim=1, keepdim=True)
    return scores_TK, expert_ids_TK


def build(cfg: MoEConfig, weights: Weights) -> Callable[[torch.Tensor], torch.Tensor]:
    """A forward x_TD -> out_TD, (T, D) in the weights' dtype, T >= 0, differentiable in x_TD and the weights.

    Raises ValueError on misfit weights, Unsupported for sizes that the kernels do not take.
    """
    weights.check(cfg)
    if cfg.D % 8 or cfg.F % 8:
        raise Unsupported(f"needs D and F in multiples of 8, these are {cfg.D} and {cfg.F}")

    def forward(x_TD: torch.Tensor) -> torch.Tensor:
        scores_TK, expert_ids_TK = route(x_TD, weights.router_ED, cfg)
        return moe_experts(x_TD, weights.gate_up_E2FD, weights.down_EDF, scores_TK, expert_ids_TK)

    return forward


if __name__ == "__main__":
    main(LEVEL)
