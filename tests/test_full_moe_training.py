"""OptimizedMoELayer in a training's own machinery: checkpointing, resuming: python -m pytest
tests/test_full_moe_training.py"""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from common.measure import relative_error
from labs.full_moe import OptimizedMoELayer
from labs.moe_layer.experts import compute_experts
from tests.layers import small

# ---- torch.utils.checkpoint around the whole layer ------------------------------------------------

CHECKPOINTED = [
    {"capacity_factor": 1.25, "adaptive_capacity": True}, {"capacity_factor": 0.75},
    {"token_rounding": "nearest", "tile_size": 4}, {"bias_update_rate": 0.05, "scoring": "sigmoid"},
    {"shared_ffn_dim": 16}, {"gradient_checkpointing": True}, {"noise_std": 1.0},
    {"capacity_factor": 1.0, "adaptive_capacity": True, "bias_update_rate": 0.05, "token_rounding": "up",
     "tile_size": 4, "shared_ffn_dim": 16, "gradient_checkpointing": True},
]


def three_steps(options: dict, device: torch.device, reentrant: bool | None) -> tuple[list, OptimizedMoELayer]:
    """Gradients of three steps of two micro-batches each, and the layer; `reentrant` None is without checkpointing."""
    layer, _ = small(device, **options)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    generator, gradients = torch.Generator().manual_seed(3), []
    for _ in range(3):
        for _ in range(2):
            x_TD = torch.randn(64, 32, generator=generator).to(device).requires_grad_()
            x_TD.data[:, 0] += 2  # so that loads are uneven, and factor and bias move
            if reentrant is None:
                out_TD, aux_loss = layer(x_TD, True)
            else:
                out_TD, aux_loss = checkpoint(layer, x_TD, True, use_reentrant=reentrant)
            (out_TD.square().mean() + aux_loss).backward()
            gradients.append(x_TD.grad)
        gradients += [parameter.grad.clone() for parameter in layer.parameters()]
        optimizer.step()
        optimizer.zero_grad()
        layer.update_balance()
    return gradients, layer


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("options", CHECKPOINTED, ids=str)
def test_checkpointing_changes_no_gradient_and_counts_nothing_twice(options, reentrant, device):
    wanted, plain = three_steps(options, device, None)
    found, layer = three_steps(options, device, reentrant)
    assert len(found) == len(wanted)
    for got, ref in zip(found, wanted, strict=True):
        assert got.isfinite().all()
        assert torch.equal(got, ref)
    assert layer.stats(running=True) == plain.stats(running=True)
    assert layer.stats(running=True).forwards == 6
    buffers = dict(layer.named_buffers())
    for name, buffer in plain.named_buffers():
        assert torch.equal(buffers[name], buffer), name
    if layer.adaptive_capacity:
        assert layer.adapted_capacity_factor != layer.capacity_factor, "nothing to test"


# ---- main grads ----------------------------------------------------------------------------------

def give_main_grads(layer: OptimizedMoELayer) -> list[torch.Tensor]:
    """Buffers that hold something already."""
    for weight in layer.experts.parameters():
        weight.main_grad = torch.ones(weight.shape, device=weight.device)
    return [weight.main_grad for weight in layer.experts.parameters()]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"backend": "loop"},
                                     {"capacity_factor": 0.75}, {"token_rounding": "nearest", "tile_size": 4}], ids=str)
def test_main_grads_take_the_experts_gradients(options, autocast, device):
    layer, x_TD = small(device, T=96, **options)

    def backward_twice():
        for part_TD in x_TD.chunk(2):
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                out_TD = layer(part_TD)
            out_TD.square().sum().backward()

    backward_twice()
    wanted = {name: parameter.grad for name, parameter in layer.named_parameters()}
    layer.zero_grad()
    main_grads = give_main_grads(layer)
    backward_twice()
    for main_grad, weight, name in zip(main_grads, layer.experts.parameters(),
                                       ("experts.gate_up_proj", "experts.down_proj"), strict=True):
        assert weight.grad is None
        # Under autocast on a GPU the kernels round nothing on the way into a main grad, and gradients to bfloat16.
        assert relative_error(main_grad - 1, wanted[name].double()) < (5e-3 if autocast else 1e-5)
    assert torch.equal(layer.gate.weight.grad, wanted["gate.weight"])


@pytest.mark.parametrize("options", [{}, {"capacity_factor": 0.75}], ids=str)
def test_the_kernels_add_to_main_grads(options, device):
    """In the interpreter where there is no GPU."""
    layer, x_TD = small(device, **options)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    with torch.no_grad():
        admitted, _, _ = layer.admit(layer.gate(x_TD))
    layer.experts.to(dtype)
    weights = list(layer.experts.parameters())

    def backward() -> None:
        compute_experts(x_TD.to(dtype), *weights, admitted, "kernels").float().square().sum().backward()

    backward()
    wanted = [weight.grad for weight in weights]
    layer.zero_grad()
    main_grads = give_main_grads(layer)
    backward()
    for main_grad, weight, gradient in zip(main_grads, weights, wanted, strict=True):
        assert weight.grad is None
        assert relative_error(main_grad - 1, gradient.double()) < 4e-3 + 1e-3


def test_main_grads_that_do_not_fit_are_named(device):
    layer, x_TD = small(device)
    give_main_grads(layer)
    layer.experts.down_proj.main_grad = None
    with pytest.raises(ValueError, match=r"down_proj\.main_grad is missing"):
        layer(x_TD)
    layer.experts.down_proj.main_grad = torch.zeros_like(layer.experts.down_proj, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"down_proj.main_grad is bfloat16 \(8, 32, 24\)"):
        layer(x_TD)
    layer.experts.down_proj.main_grad = torch.zeros(8, 32, 23, device=device)
    with pytest.raises(ValueError, match=r"needs float32 \(8, 32, 24\)"):
        layer(x_TD)


# ---- resuming ------------------------------------------------------------------------------------

def test_an_adapted_capacity_survives_a_resume(device):
    options = {"capacity_factor": 1.25, "adaptive_capacity": True}
    _, layer = three_steps(options, device, None)
    resumed, x_TD = small(device, **options)
    resumed.load_state_dict(layer.state_dict())
    assert resumed.adapted_capacity_factor == layer.adapted_capacity_factor != 1.25
    assert torch.equal(resumed(x_TD), layer(x_TD))
    layer.to(torch.bfloat16)
    assert layer.adapted_capacity_factor.dtype == torch.float32, "small moves are lost in bfloat16"
    plain, _ = small(device)
    assert "adapted_capacity_factor" not in plain.state_dict()
