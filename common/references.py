"""Rows beside the ladder, timed in the same run: what a level is read against, never a rung."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import grouped_mm, silu

from common.config import MoEConfig, Workload
from common.level import Unsupported
from common.measure import TIE_MARGIN, Forward
from common.model import Weights

BOUND = "cuBLAS bmm"


@dataclass(frozen=True)
class Reference:
    """A named callable for comparison. `build(workload, weights)` gives a forward x_TD -> out_TD;
    `is_layer` False means its output is not the layer's and cannot be checked against the oracle."""

    name: str
    adds: str
    build: Callable[[Workload, Weights], Forward]
    is_layer: bool = True

    kind = "reference"
    tie_margin = TIE_MARGIN


def build_bmm(workload: Workload, weights: Weights) -> Forward:
    """The bound: the two projections as bare cuBLAS bmm on equal groups. No routing, gather, activation
    or sum; the same multiply-adds as R routed rows spread evenly over min(E, R) experts.

    Raises Unsupported on a CPU, where it bounds nothing.
    """
    if weights.device.type != "cuda":
        raise Unsupported("needs CUDA")
    cfg = workload.config
    groups = min(cfg.E, workload.R)
    rows = -(-workload.R // groups)
    generator = torch.Generator(weights.device).manual_seed(workload.seed)

    def draw(width: int) -> torch.Tensor:
        return torch.randn(groups, rows, width, device=weights.device, generator=generator).to(workload.dtype)

    x_GND, hidden_GNF = draw(cfg.D), draw(cfg.F)
    gate_up_GDN = weights.gate_up_E2FD[:groups].transpose(1, 2)
    down_GFD = weights.down_EDF[:groups].transpose(1, 2)

    def forward(_: torch.Tensor) -> torch.Tensor:
        torch.bmm(x_GND, gate_up_GDN)
        return torch.bmm(hidden_GNF, down_GFD)

    return forward


def build_grouped_mm(workload: Workload, weights: Weights) -> Forward:
    """torch.nn.functional.grouped_mm with eager PyTorch around it, as model code uses it today.

    Raises Unsupported in a dtype or for sizes that grouped_mm does not take.
    """
    if workload.dtype == torch.float16:
        raise Unsupported("needs bfloat16 or float32")
    cfg: MoEConfig = workload.config
    if cfg.D * workload.dtype.itemsize % 16 or cfg.F * workload.dtype.itemsize % 16:
        raise Unsupported("needs D and F in multiples of 16 bytes")

    def forward(x_TD: torch.Tensor) -> torch.Tensor:
        if x_TD.is_cuda and x_TD.dtype != torch.float32:
            logits_TE = torch.mm(x_TD, weights.router_ED.T, out_dtype=torch.float32)
        else:
            logits_TE = x_TD.float() @ weights.router_ED.T.float()
        if cfg.scoring == "softmax_topk":
            scores_TK, expert_ids_TK = logits_TE.softmax(dim=1).topk(cfg.K, dim=1)
        else:
            top_logits_TK, expert_ids_TK = logits_TE.topk(cfg.K, dim=1)
            scores_TK = top_logits_TK.softmax(dim=1)
        if cfg.renormalize:
            scores_TK = scores_TK / scores_TK.sum(dim=1, keepdim=True)
        ids_R = expert_ids_TK.flatten()
        order_R = ids_R.argsort(stable=True)
        ends_E = torch.searchsorted(ids_R[order_R], torch.arange(cfg.E, device=x_TD.device), right=True, out_int32=True)
        x_RD = x_TD[order_R // cfg.K]
        gate_RF, up_RF = grouped_mm(x_RD, weights.gate_up_E2FD.transpose(1, 2), offs=ends_E).chunk(2, dim=1)
        y_RD = grouped_mm(silu(gate_RF) * up_RF, weights.down_EDF.transpose(1, 2), offs=ends_E)
        y_TKD = y_RD[order_R.argsort()].unflatten(0, (x_TD.shape[0], cfg.K))
        return (y_TKD * scores_TK[:, :, None]).sum(dim=1).to(x_TD.dtype)

    return forward


REFERENCES = (
    Reference(BOUND, "two bare bmm on equal groups: the bound", build_bmm, is_layer=False),
    Reference("grouped_mm", "torch.nn.functional.grouped_mm, eager glue", build_grouped_mm),
)
