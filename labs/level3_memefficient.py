"""Level 3: memory-efficient. The same gathers, a fixed workspace at a time.

Adds   a byte budget: tokens in chunks, one buffer for gathered weights used again and again.
Why    levels 1 and 2 hold 3*R*D*F gathered weights at once: 309 GB at 4096 tokens of
       qwen3-30b-a3b, whatever the GPU.
How    build: as many tokens a chunk as fit the budget; buffers for their rows, allocated once
       for each chunk: gather gate_up into the buffer -> multiply -> activate
                       gather down into the same buffer -> multiply -> combine into the output
Costs  a Python loop again, over chunks, and no byte less through memory: it runs at any T, slowly.
       The whole budget is allocated at once, even for a few tokens.
Needs  Triton: a GPU, or a CPU with its interpreter (float32, float16).
Run    python labs/level3_memefficient.py --preset qwen3-30b-a3b --tokens 32768
Diff   make diff N=3
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
    number=3,
    name="memefficient",
    adds="a fixed workspace: tokens in chunks, buffers reused",
    changes=("DEFAULT_BUDGET_BYTES", "Workspace", "silu_mul", "gather_into", "experts", "build"),
    requires=("triton",),
    claims=Claims(host_syncs=0),
)

# All that a forward allocates besides its output stays under this, at any number of tokens.
DEFAULT_BUDGET_BYTES = 2 * 2**30


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


def silu_mul(gate_up_R2F: torch.Tensor, hidden_RF: torch.Tensor) -> torch.Tensor:
    """(R, 2F) gate and up -> silu(gate) * up into hidden_RF (R, F), same dtype; returns hidden_RF."""
    R, F = hidden_RF.shape
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


class Workspace:
    """Buffers for the rows of one chunk, allocated once.

    The gathered gate_up and down weights take turns in one buffer, 2*F*D values a row. Raises
    ValueError if the budget does not hold even one token's rows.
    """

    def __init__(self, cfg: MoEConfig, weights: Weights, budget_bytes: int):
        values_per_row = 2 * cfg.F * cfg.D + 3 * cfg.F + 2 * cfg.D  # weights, gate_up, hidden, x, y
        float32_per_token = 4 * (cfg.E + cfg.D + cfg.K * (cfg.D + 4))  # routing, and what combine sums
        bytes_per_token = cfg.K * values_per_row * weights.dtype.itemsize + float32_per_token
        slack_bytes = 32 * 2**20  # the allocator rounds each of a dozen small tensors up to 2 MiB
        self.tokens = (budget_bytes - slack_bytes) // bytes_per_token
        if self.tokens < 1:
            raise ValueError(f"budget_bytes={budget_bytes}: one token of this layer needs at least "
                             f"{bytes_per_token + slack_bytes} bytes")
        R = self.tokens * cfg.K
        self.weights_R2FD = weights.gate_up_E2FD.new_empty(R, 2 * cfg.F, cfg.D)
        self.weights_RDF = self.weights_R2FD.view(-1)[: R * cfg.D * cfg.F].view(R, cfg.D, cfg.F)
        self.gate_up_R2F1 = self.weights_R2FD.new_empty(R, 2 * cfg.F, 1)
        self.hidden_RF = self.weights_R2FD.new_empty(R, cfg.F)
        self.y_RD1 = self.weights_R2FD.new_empty(R, cfg.D, 1)


def gather_into(out: torch.Tensor, source: torch.Tensor, index_R: torch.Tensor) -> None:
    """out = source[index_R] in place. Not index_select, which has a slow path for up to 16 indices."""
    torch.ops.aten.index.Tensor_out(source, [index_R], out=out)


def experts(
    x_RD: torch.Tensor, expert_of_row_R: torch.Tensor, weights: Weights, workspace: Workspace
) -> torch.Tensor:
    """Every row through its own expert: (R, D) -> (R, D), a view of the workspace."""
    R = x_RD.shape[0]
    gate_up_weights_R2FD, gate_up_R2F1 = workspace.weights_R2FD[:R], workspace.gate_up_R2F1[:R]
    gather_into(gate_up_weights_R2FD, weights.gate_up_E2FD, expert_of_row_R)
    torch.bmm(gate_up_weights_R2FD, x_RD[:, :, None], out=gate_up_R2F1)
    hidden_RF = silu_mul(gate_up_R2F1[:, :, 0], workspace.hidden_RF[:R])
    down_weights_RDF, y_RD1 = workspace.weights_RDF[:R], workspace.y_RD1[:R]
    gather_into(down_weights_RDF, weights.down_EDF, expert_of_row_R)
    torch.bmm(down_weights_RDF, hidden_RF[:, :, None], out=y_RD1)
    return y_RD1[:, :, 0]


def combine(y_RD: torch.Tensor, scores_TK: torch.Tensor) -> torch.Tensor:
    """Sum each token's K rows, weighted by score in float32: (R, D) -> (T, D)."""
    y_TKD = y_RD.unflatten(0, scores_TK.shape)
    return (y_TKD * scores_TK[:, :, None]).sum(dim=1).to(y_RD.dtype)


def build(
    cfg: MoEConfig, weights: Weights, budget_bytes: int = DEFAULT_BUDGET_BYTES
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A forward x_TD -> out_TD, (T, D) in the weights' dtype, T >= 0. Raises ValueError on misfit weights
    or a budget under one token's need."""
    weights.check(cfg)
    workspace = Workspace(cfg, weights, budget_bytes)

    def forward(x_TD: torch.Tensor) -> torch.Tensor:
        out_TD = torch.empty_like(x_TD)
        for x_chunk_TD, out_chunk_TD in zip(
            x_TD.split(workspace.tokens), out_TD.split(workspace.tokens), strict=True
        ):
            scores_TK, expert_ids_TK = route(x_chunk_TD, weights.router_ED, cfg)
            x_RD, expert_of_row_R = dispatch(x_chunk_TD, expert_ids_TK)
            y_RD = experts(x_RD, expert_of_row_R, weights, workspace)
            out_chunk_TD.copy_(combine(y_RD, scores_TK))
        return out_TD

    return forward


if __name__ == "__main__":
    main(LEVEL)
