"""The layer in float64, forward and backward, by its definition: what a measurement at real sizes is gated by.

An expert at a time, so that the float64 weights of one fit beside the layer; slow and obvious.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import silu

if TYPE_CHECKING:
    from labs.full_moe import OptimizedMoELayer
    from labs.moe_layer.admission import Admitted
    from labs.moe_layer.router import Router

# T tokens, D model width, F expert width, E experts, K top-k.


def score_every_expert(gate: Router, x_TD: torch.Tensor, router_ED: torch.Tensor, kept_TE: torch.Tensor
                       ) -> torch.Tensor:
    """(T, E): the weight of every expert for every token, zero where kept_TE is False; differentiable."""
    logits_TE = x_TD @ router_ED.T / gate.temperature
    if gate.scoring == "topk_softmax":
        scores_TE = logits_TE.masked_fill(~kept_TE, -torch.inf).softmax(dim=1).nan_to_num(0.0)
    else:
        scores_TE = (logits_TE.sigmoid() if gate.scoring == "sigmoid" else logits_TE.softmax(dim=1)) * kept_TE
    if gate.renormalize:
        scores_TE = scores_TE / scores_TE.sum(dim=1, keepdim=True).clamp_min(1e-300)
    return scores_TE * gate.score_scale


def kept_experts(admitted: Admitted, E: int) -> torch.Tensor:
    """(T, E) bool: the experts that compute each token."""
    if admitted.rounded is None:
        T, device = admitted.expert_ids_TK.shape[0], admitted.expert_ids_TK.device
        return torch.zeros(T, E + 1, dtype=torch.bool, device=device).scatter_(1, admitted.expert_ids_TK, True)[:, :E]
    from labs.kernels.rounding import dense_scores

    return dense_scores(admitted.rounded, admitted.plan) > 0


class Errors:
    """Relative errors ||got - ref|| / ||ref|| by name, of tensors that come in parts."""

    def __init__(self) -> None:
        self.squares: dict[str, list[float]] = {}

    def add(self, name: str, got: torch.Tensor, ref: torch.Tensor) -> None:
        """A part of the tensor `name`."""
        sums = self.squares.setdefault(name, [0.0, 0.0])
        sums[0] += (got.double() - ref).square().sum().item()
        sums[1] += ref.square().sum().item()

    def read(self) -> dict[str, float]:
        """Name -> relative error; NaN where the tensor holds one."""
        return {name: (wrong / max(right, 1e-300)) ** 0.5 for name, (wrong, right) in self.squares.items()}


def errors_against_definition(layer: OptimizedMoELayer, x_TD: torch.Tensor, kept_TE: torch.Tensor,
                              out_TD: torch.Tensor, grad_TD: torch.Tensor | None = None,
                              grad_x_TD: torch.Tensor | None = None) -> dict[str, float]:
    """Relative errors of an output, and, if grad_TD is given, of the gradients that a backward of it left in x and in
    the layer's weights: by the names `output`, `x`, `router`, `gate_up`, `down`. No shared expert, no dropped slots.
    """
    errors, backward = Errors(), grad_TD is not None
    x = x_TD.detach().double().requires_grad_(backward)
    router = layer.gate.weight.detach().double().requires_grad_(backward)
    scores_TE = score_every_expert(layer.gate, x, router, kept_TE)
    ref_TD, grad_x_ref_TD = torch.zeros_like(x, requires_grad=False), torch.zeros_like(x, requires_grad=False)
    grad_scores_TE = torch.zeros_like(scores_TE, requires_grad=False)
    for e in range(layer.num_experts):
        token = kept_TE[:, e].nonzero()[:, 0]
        leaves = [tensor.detach().double().requires_grad_(backward) for tensor in
                  (x_TD[token], scores_TE[token, e], layer.experts.gate_up_proj[e], layer.experts.down_proj[e])]
        rows, score, gate_up_2FD, down_DF = leaves
        gate, up = (rows @ gate_up_2FD.T).chunk(2, dim=1)
        y = ((silu(gate) * up) @ down_DF.T) * score[:, None]
        ref_TD.index_add_(0, token, y.detach())
        if backward:
            grads = torch.autograd.grad(y, leaves, grad_TD[token].double())
            grad_x_ref_TD.index_add_(0, token, grads[0])
            grad_scores_TE[token, e] = grads[1]
            errors.add("gate_up", layer.experts.gate_up_proj.grad[e], grads[2])
            errors.add("down", layer.experts.down_proj.grad[e], grads[3])
    errors.add("output", out_TD, ref_TD)
    if backward:
        scores_TE.backward(grad_scores_TE)
        errors.add("x", grad_x_TD, grad_x_ref_TD + x.grad)
        errors.add("router", layer.gate.weight.grad, router.grad)
    return errors.read()
