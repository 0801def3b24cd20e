"""Small OptimizedMoELayers, and what they are to compute: the definition, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from common.config import Workload
from common.measure import relative_error
from common.model import make_inputs, make_weights
from labs.full_moe import OptimizedMoELayer

ON_GPU = torch.cuda.is_available()
# Relative error that rounding may cause: float64 sums differ in order only.
BOUNDS = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
NAMES = ("x", "gate.weight", "experts.gate_up_proj", "experts.down_proj")


def scores_by_definition(layer: OptimizedMoELayer, x_TD: torch.Tensor, router_ED: torch.Tensor,
                         chosen_TE: torch.Tensor) -> torch.Tensor:
    """(T, E) float64: the weight of every expert for every token, zero where chosen_TE is False."""
    gate = layer.gate
    logits_TE = x_TD @ router_ED.T / gate.temperature
    if gate.scoring == "topk_softmax":
        scores_TE = logits_TE.masked_fill(~chosen_TE, -torch.inf).softmax(dim=1).nan_to_num(0.0)
    else:
        scores_TE = (logits_TE.sigmoid() if gate.scoring == "sigmoid" else logits_TE.softmax(dim=1)) * chosen_TE
    if gate.renormalize:
        scores_TE = scores_TE / scores_TE.sum(dim=1, keepdim=True).clamp_min(1e-300)
    return scores_TE * gate.score_scale


def experts_by_definition(x_TD, scores_TE, gate_up_E2FD, down_EDF) -> torch.Tensor:
    """All experts on all tokens, weighted: nothing sorted, nothing grouped."""
    gate_ETF, up_ETF = torch.einsum("td,end->etn", x_TD, gate_up_E2FD).chunk(2, dim=2)
    y_ETD = torch.einsum("etf,edf->etd", torch.nn.functional.silu(gate_ETF) * up_ETF, down_EDF)
    return torch.einsum("te,etd->td", scores_TE, y_ETD)


@dataclass
class Result:
    """An output and the gradients of x and the weights, by the names in NAMES."""

    out_TD: torch.Tensor
    gradients: dict[str, torch.Tensor]


def expected(layer: OptimizedMoELayer, x_TD: torch.Tensor, grad_TD: torch.Tensor, chosen_TE: torch.Tensor,
             kept_TE: torch.Tensor | None = None) -> Result:
    """Float64, by autograd through the definition; kept_TE are the chosen that were not dropped afterwards."""
    leaves = [tensor.detach().double().requires_grad_() for tensor in
              (x_TD, layer.gate.weight, layer.experts.gate_up_proj, layer.experts.down_proj)]
    x, router, gate_up, down = leaves
    scores_TE = scores_by_definition(layer, x, router, chosen_TE)
    out_TD = experts_by_definition(x, scores_TE if kept_TE is None else scores_TE * kept_TE, gate_up, down)
    out_TD.backward(grad_TD.double())
    return Result(out_TD.detach(), dict(zip(NAMES, (leaf.grad for leaf in leaves), strict=True)))


def measured(layer: OptimizedMoELayer, x_TD: torch.Tensor, grad_TD: torch.Tensor) -> Result:
    """What the layer gives."""
    layer.zero_grad()
    x = x_TD.clone().requires_grad_()
    out_TD = layer(x)
    out_TD.backward(grad_TD)
    parameters = dict(layer.named_parameters())
    return Result(out_TD.detach(), {"x": x.grad, **{name: parameters[name].grad for name in NAMES[1:]}})


def assert_close(found: Result, wanted: Result, bound: float) -> None:
    pairs = {"out": (found.out_TD, wanted.out_TD), **{
        name: (found.gradients[name], wanted.gradients[name]) for name in NAMES}}
    # Where all weight is on one renormalised score, the router's gradient is zero in real arithmetic.
    for name, (got, ref) in pairs.items():
        assert got.isfinite().all(), name
        if ref.numel() and ref.norm() > 1e-9 * ref.numel() ** 0.5:
            error = relative_error(got, ref)
            assert error < bound, f"{name}: relative error {error:.1e} is over {bound:.0e}"
        else:
            assert got.double().norm() < 1e-3, name


def mask_of(expert_ids_TK: torch.Tensor, E: int) -> torch.Tensor:
    """(T, E) bool; an id of E marks nothing."""
    mask_TE = torch.zeros(expert_ids_TK.shape[0], E + 1, dtype=torch.bool, device=expert_ids_TK.device)
    return mask_TE.scatter_(1, expert_ids_TK, True)[:, :E]


def make_layer(case, dtype: torch.dtype, device: torch.device, **options) -> tuple[OptimizedMoELayer, torch.Tensor]:
    """A layer with a case's weights, and the case's tokens."""
    options = {"capacity_factor": None, "scoring": case.scoring, "renormalize": case.renormalize, **options}
    layer = OptimizedMoELayer(case.D, case.F, case.E, case.K, **options, device=device, dtype=dtype)
    weights = make_weights(case.config, torch.float32, device)
    x_TD = make_inputs(Workload(case.config, case.T, torch.float32, case.routing), weights)
    with torch.no_grad():
        for parameter, value in zip((layer.gate.weight, layer.experts.gate_up_proj, layer.experts.down_proj),
                                    (weights.router_ED, weights.gate_up_E2FD, weights.down_EDF), strict=True):
            parameter.copy_(value)
    return layer, x_TD.to(dtype)


def small(device: torch.device, T: int = 48, **options) -> tuple[OptimizedMoELayer, torch.Tensor]:
    """An eight-expert layer in float32 and T tokens."""
    torch.manual_seed(0)
    layer = OptimizedMoELayer(32, 24, 8, 2, **{"capacity_factor": None, **options}).to(device)
    return layer, torch.randn(T, 32, generator=torch.Generator().manual_seed(1)).to(device)
