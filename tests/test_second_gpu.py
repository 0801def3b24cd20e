"""One process, two GPUs, the first of them current: what lies on the second is computed there, as layers spread over
GPUs need it: python -m pytest tests/test_second_gpu.py"""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from common.config import Workload
from common.level import discover
from common.measure import relative_error
from common.model import Weights, make_inputs, make_weights
from labs.full_moe import OptimizedMoELayer
from labs.kernels.operators import differentiable, operator
from tests.cases import Case

WORKLOAD = Workload(Case("second GPU", T=4096, D=512, F=256, E=8, K=2).config, 4096, torch.bfloat16)
LEVELS = {loaded.level.number: loaded for loaded in discover() if loaded.level.number >= 5}

COMPILED = (6, 7)  # PyTorch's compiler times its kernels on each GPU for itself, and may sum in another order there
ROUNDING = 5e-3  # of bfloat16 outputs, 2**-9 each

two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.fixture(scope="module")
def drawn() -> tuple[Weights, torch.Tensor]:
    """Weights and input on the first GPU."""
    weights = make_weights(WORKLOAD.config, WORKLOAD.dtype, torch.device("cuda:0"))
    return weights, make_inputs(WORKLOAD, weights)


def forward_on(number: int, variant: str, index: int, drawn: tuple[Weights, torch.Tensor]) -> list[torch.Tensor]:
    """Outputs of a few calls of a level that was built on a GPU, on the CPU."""
    weights, x_TD = drawn
    moved = Weights(*(getattr(weights, field.name).to(f"cuda:{index}") for field in fields(Weights)))
    x_TD = x_TD.to(f"cuda:{index}")
    forward = LEVELS[number].build_variant(WORKLOAD.config, moved, variant)
    inputs = x_TD, x_TD, x_TD, x_TD.flip(0)  # a graph that copies x, one that does not, and the first again
    return [forward(given).cpu() for given in inputs]


@two_gpus
@pytest.mark.gpu
@pytest.mark.parametrize(("number", "variant"), [
    (number, variant) for number, loaded in LEVELS.items() for variant in loaded.level.variants])
def test_levels(number, variant, drawn):
    wanted = forward_on(number, variant, 0, drawn)
    assert torch.cuda.current_device() == 0
    found = forward_on(number, variant, 1, drawn)
    assert torch.cuda.current_device() == 0
    assert torch.equal(found[0], found[1])
    for one, expected in zip(found, wanted, strict=True):
        if number in COMPILED:
            assert relative_error(one, expected) < ROUNDING
        else:
            assert torch.equal(one, expected)


def trained_on(index: int) -> list[torch.Tensor]:
    """An output for inference, one for training, and the gradients, of a layer on a GPU, on the CPU."""
    torch.manual_seed(0)
    layer = OptimizedMoELayer(512, 256, 8, 2, capacity_factor=None, backend="kernels", dtype=torch.bfloat16)
    x_TD = torch.randn(4096, 512, dtype=torch.bfloat16).to(f"cuda:{index}").requires_grad_()
    layer = layer.to(f"cuda:{index}")
    out_TD, aux_loss = layer(x_TD, return_aux_loss=True)
    (out_TD.square().mean() + aux_loss).backward()
    layer.eval()
    with torch.inference_mode():
        inferred = [layer(x_TD).cpu() for _ in range(3)]
    return [*inferred, out_TD.cpu(), x_TD.grad.cpu(), *(parameter.grad.cpu() for parameter in layer.parameters())]


@two_gpus
@pytest.mark.gpu
def test_the_layer():
    for found, expected in zip(trained_on(1), trained_on(0), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("traced", [False, True])
def test_operators_look_where_their_tensors_are(traced, monkeypatch):
    """Without a second GPU: each asks for the device of its first tensor, forward and backward."""
    met = []

    class Recorded(torch.cuda.device_of):
        def __init__(self, tensor):
            met.append(tensor)
            super().__init__(tensor)

    monkeypatch.setattr(torch.cuda, "device_of", Recorded)
    name = f"moe_lab_test::on_its_gpu_{traced}"

    @operator(f"{name}_plain")
    def plain(times: int, x: torch.Tensor) -> torch.Tensor:
        return times * x

    def keep(ctx, inputs, output):
        ctx.times = inputs[0]

    @differentiable(f"{name}_differentiable", keep, lambda ctx, grad: (None, plain(ctx.times, grad)))
    def with_gradient(times: int, x: torch.Tensor) -> torch.Tensor:
        return times * x

    x = torch.ones(3, requires_grad=True)
    call = with_gradient.operator if traced else with_gradient
    call(3, x).sum().backward()
    assert x.grad.tolist() == [3, 3, 3]
    assert [tensor.shape for tensor in met] == [(3,), (3,)]
