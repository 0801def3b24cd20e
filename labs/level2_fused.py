"""Level 2: fused. One Triton kernel for SiLU(gate) * up.

Adds   a kernel that reads gate and up once and writes their activation once.
Why    eager PyTorch runs it as two kernels, SiLU and multiply: 5*R*F values through memory where
       3*R*F are enough, and a rounding to bfloat16 in between.
How    program (row, block of columns): load gate, load up -> float32 -> silu(gate) * up
       -> round once -> store
Costs  a kernel to own. It touches R*F values where level 1's gathers touch R*D*F, so the layer
       gains little: the point is the tool, which the levels above live on.
Needs  Triton: a GPU, or a CPU with its interpreter (float32, float16).
Run    python labs/level2_fused.py --preset qwen3-30b-a3b --tokens 64
Diff   make diff N=2
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from common.config import MoEConfig
from common.level import Claims, Level, main
from common.model import Weights

import triton  # after common.level, which picks Triton's interpreter where there is no GPU
import triton.language as tl

# T tokens, D model width, F expert width, E experts, K top-k, R = T*K routed rows.
# A tensor's suffix is its shape: x_TD is (T, D), gate_up_E2FD is (E, 2F, D).

LEVEL = Level(
    number=2,
    name="fused",
    adds="one Triton kernel for SiLU(gate) * up",
    changes=("silu_mul_kernel", "silu_mul", "experts"),
    requires=("triton",),
    claims=Claims(host_syncs=0),
)


@triton.jit
def silu_mul_kernel(
    gate_up_ptr,  # (R, 2F) gate columns, then up columns
    hidden_ptr,  # (R, F) same dtype
    F,
    BLOCK_F: tl.constexpr,
):
    """hidden = silu(gate) * up in float32, rounded once.

    Grid (R, cdiv(F, BLOCK_F)): a program owns BLOCK_F columns of one row.
    """
    row = tl.program_id(0).to(tl.int64)  # R * 2F passes 2**31 at real sizes
    column = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = column < F
    gate = tl.load(gate_up_ptr + row * 2 * F + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * 2 * F + F + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(hidden_ptr + row * F + column, gate * tl.sigmoid(gate) * up, mask=inside)


def silu_mul(gate_up_R2F: torch.Tensor) -> torch.Tensor:
    """(R, 2F) gate and up -> (R, F) silu(gate) * up, same dtype."""
    R, two_F = gate_up_R2F.shape
    F = two_F // 2
    hidden_RF = gate_up_R2F.new_empty(R, F)
    if R > 0:
        block_F = min(1024, triton.next_power_of_2(F))
        silu_mul_kernel[(R, triton.cdiv(F, block_F))](gate_up_R2F, hidden_RF, F, BLOCK_F=block_F)
    return hidden_RF


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
    return torch.einsum("rf,rdf->rd", silu_mul(gate_up_R2F), weights.down_EDF[expert_of_row_R])


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
