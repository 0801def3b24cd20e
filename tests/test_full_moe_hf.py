"""OptimizedMoELayer and transformers: python -m pytest tests/test_full_moe_hf.py"""

from __future__ import annotations

import copy

import pytest
import torch

from common.measure import relative_error
from labs.full_moe import OptimizedMoELayer

pytest.importorskip("transformers", minversion="5", reason="needs transformers 5: pip install -r requirements-hf.txt")

from transformers import DeepseekV3Config, MixtralConfig, OlmoeConfig, Qwen3MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.mixtral.modeling_mixtral import MixtralForCausalLM, MixtralSparseMoeBlock
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeForCausalLM, Qwen3MoeSparseMoeBlock,
)

from labs.moe_layer import huggingface
from labs.moe_layer.huggingface import BACKEND_NAME, register_experts_backend

D, F, E, K = 288, 200, 8, 2  # both more than a GEMM tile and none of them whole; multiples of 8, for the kernels
# Where bfloat16 is tested, and the backend that runs there: the same test goes through on a CPU.
PLACES = [pytest.param("cpu", "grouped", id="cpu"), pytest.param("cuda", "kernels", id="cuda", marks=pytest.mark.gpu)]
BLOCKS = {
    "mixtral": (MixtralSparseMoeBlock, lambda: MixtralConfig(
        hidden_size=D, intermediate_size=F, num_local_experts=E, num_experts_per_tok=K)),
    "qwen3_moe": (Qwen3MoeSparseMoeBlock, lambda: Qwen3MoeConfig(
        hidden_size=D, moe_intermediate_size=F, num_experts=E, num_experts_per_tok=K, norm_topk_prob=True)),
    "qwen3_moe, not renormalised": (Qwen3MoeSparseMoeBlock, lambda: Qwen3MoeConfig(
        hidden_size=D, moe_intermediate_size=F, num_experts=E, num_experts_per_tok=K, norm_topk_prob=False)),
    "olmoe": (OlmoeSparseMoeBlock, lambda: OlmoeConfig(
        hidden_size=D, intermediate_size=F, num_experts=E, num_experts_per_tok=K)),
    "deepseek_v3": (DeepseekV3MoE, lambda: DeepseekV3Config(
        hidden_size=D, moe_intermediate_size=F, n_routed_experts=E, num_experts_per_tok=K, n_group=4, topk_group=2,
        n_shared_experts=2, routed_scaling_factor=2.5)),
}


def make_block(name: str, device: torch.device) -> torch.nn.Module:
    """A block with random weights at unit scale, and a bias that changes DeepSeek-V3's choice."""
    kind, config = BLOCKS[name]
    config = config()
    config._experts_implementation = "eager"
    generator = torch.Generator().manual_seed(0)
    block = kind(config)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
        for buffer in block.buffers():
            buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.1)
    return block.to(device)


def gradients(module: torch.nn.Module, x_BSD: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The output, and the gradient of x and of each parameter for a random gradient of the output, one that bfloat16
    holds."""
    module.zero_grad()
    x_BSD = x_BSD.clone().requires_grad_()
    out_BSD = module(x_BSD)
    generator = torch.Generator(x_BSD.device).manual_seed(1)
    grad_BSD = torch.randn(out_BSD.shape, generator=generator, device=x_BSD.device)
    out_BSD.backward(grad_BSD.bfloat16().to(out_BSD.dtype))
    return out_BSD.detach(), {"x": x_BSD.grad, **{name: p.grad.clone() for name, p in module.named_parameters()}}


def assert_same(found: tuple, expected: tuple, bound: float = 1e-5) -> None:
    assert relative_error(found[0], expected[0].double()) < bound
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert gradient.norm() > 0, f"{name}: nothing to compare"
        assert relative_error(found[1][name], gradient.double()) < bound, name


@pytest.mark.parametrize("name", BLOCKS)
def test_from_hf_equals_the_block(name, device):
    block = make_block(name, device)
    layer = OptimizedMoELayer.from_hf(block)
    x_BSD = torch.randn(3, 11, D, device=device)
    assert_same(gradients(layer, x_BSD), gradients(block, x_BSD))


@pytest.mark.parametrize(("place", "backend"), PLACES)
@pytest.mark.parametrize("name", BLOCKS)
def test_from_hf_in_bfloat16(name, place, backend):
    """Against the block in float32 with the same weights: our logits are float32 too, so both choose the same experts.
    A tensor is rounded about ten times on its way, 0.2 to 0.3 eps each, under 1 eps together: twice that is allowed."""
    block = make_block(name, torch.device(place)).bfloat16()
    layer = OptimizedMoELayer.from_hf(block)
    assert layer.backend.name == backend
    x_BSD = torch.randn(3, 171, D, generator=torch.Generator().manual_seed(2)).bfloat16().to(place)
    expected = gradients(copy.deepcopy(block).float(), x_BSD.float())
    assert_same(gradients(layer, x_BSD), expected, bound=2 * torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("name", BLOCKS)
def test_from_hf_and_back_is_the_same_block(name, device):
    block = make_block(name, device)
    again = OptimizedMoELayer.from_hf(block).to_hf()
    assert type(again) is type(block)
    x_BSD = torch.randn(3, 11, D, device=device)
    assert_same(gradients(again, x_BSD), gradients(block, x_BSD), bound=1e-7)
    assert again.experts.gate_up_proj is block.experts.gate_up_proj, "parameters are shared"


@pytest.mark.parametrize("name", BLOCKS)
def test_state_dicts_go_both_ways(name, device):
    block = make_block(name, device)
    made = OptimizedMoELayer.from_hf(make_block(name, device))
    assert made.state_dict().keys() == block.state_dict().keys()
    made.load_state_dict(block.state_dict())
    block.load_state_dict(made.state_dict())


def test_an_adaptive_capacity_starts_here_and_is_left_behind(device):
    block = make_block("mixtral", device)
    layer = OptimizedMoELayer.from_hf(block, capacity_factor=8.0, adaptive_capacity=True)
    assert layer.adapted_capacity_factor == 8.0
    x_BSD = torch.randn(3, 11, D, device=device)
    assert_same(gradients(layer, x_BSD), gradients(block, x_BSD))
    layer.update_balance()
    assert layer.adapted_capacity_factor != 8.0
    assert layer.to_hf().state_dict().keys() == block.state_dict().keys()


def test_a_wrong_score_is_noticed(device):
    """The comparison above can fail: renormalising where the block does not is an error of order one."""
    block = make_block("olmoe", device)
    layer = OptimizedMoELayer.from_hf(block, renormalize=True)
    x_BSD = torch.randn(3, 11, D, device=device)
    with pytest.raises(AssertionError):
        assert_same(gradients(layer, x_BSD), gradients(block, x_BSD))


def test_other_blocks_are_refused(device):
    with pytest.raises(TypeError, match="block is a Linear"):
        OptimizedMoELayer.from_hf(torch.nn.Linear(2, 2))
    block = make_block("mixtral", device)
    block.experts.act_fn = torch.nn.GELU()
    with pytest.raises(ValueError, match="activation is GELU"):
        OptimizedMoELayer.from_hf(block)
    block = make_block("mixtral", device)
    block.jitter_noise = 0.1
    with pytest.raises(ValueError, match="router_jitter_noise"):
        OptimizedMoELayer.from_hf(block)


@pytest.mark.parametrize(("options", "kind", "named"), [
    ({"temperature": 2.0}, "mixtral", "temperature=2.0"),
    ({"scoring": "sigmoid"}, "qwen3_moe", "scoring='sigmoid'"),
    ({"shared_ffn_dim": F}, "olmoe", "shared_ffn_dim"),
    ({"renormalize": False}, "mixtral", "renormalize=False"),
    ({}, "deepseek_v3", "scoring"),
    ({}, "llama", "kind='llama'"),
    ({}, None, "kind=None"),
])
def test_what_a_block_cannot_express_is_refused(options, kind, named):
    with pytest.raises(ValueError, match=named):
        OptimizedMoELayer(D, F, E, K, **options).to_hf(kind)


# ---- the experts interface -----------------------------------------------------------------------

COMMON = {"vocab_size": 97, "hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 4,
          "num_key_value_heads": 2, "num_experts_per_tok": K, "max_position_embeddings": 64, "use_cache": False}
MODELS = {
    "qwen3_moe": (Qwen3MoeForCausalLM, lambda: Qwen3MoeConfig(
        **COMMON, intermediate_size=64, moe_intermediate_size=F, num_experts=E, head_dim=8, norm_topk_prob=True,
        output_router_logits=True)),
    "mixtral": (MixtralForCausalLM, lambda: MixtralConfig(
        **COMMON, intermediate_size=F, num_local_experts=E, output_router_logits=True)),
}


@pytest.fixture
def taken(monkeypatch) -> list[str]:
    """The backend of each call that transformers makes of our experts."""
    names, original = [], huggingface.compute_experts
    monkeypatch.setattr(huggingface, "compute_experts", lambda *args: names.append(args[4]) or original(*args))
    return names


def one_step(name: str, implementation: str, device: torch.device | str, dtype: torch.dtype = torch.float32
             ) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss, and by name the logits and what an optimizer would get: the gradient of each parameter. Weights are
    such as bfloat16 holds, so that a model has the same in every dtype."""
    kind, config = MODELS[name]
    model = kind._from_config(config(), attn_implementation="eager", experts_implementation=implementation, dtype=dtype)
    model = model.to(device).train()
    assert model.config._experts_implementation == implementation
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                values = torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5
                parameter.copy_(values.bfloat16())
    tokens = torch.randint(97, (2, 48), generator=generator).to(device)
    out = model(input_ids=tokens, labels=tokens)
    out.loss.backward()
    return out.loss.item(), {"logits": out.logits.detach(), **{name: p.grad for name, p in model.named_parameters()}}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_on_our_experts_equals_eager(name, device, taken):
    expected_loss, expected = one_step(name, "eager", device)
    assert not taken
    loss, found = one_step(name, register_experts_backend(), device)
    assert taken == ["grouped"] * 2, "once a layer"
    assert abs(loss - expected_loss) < 1e-5 * abs(expected_loss)
    for tensor, value in expected.items():
        assert relative_error(found[tensor], value.double()) < 1e-5, tensor


@pytest.mark.parametrize(("place", "backend"), PLACES)
@pytest.mark.parametrize("name", MODELS)
def test_a_model_in_bfloat16(name, place, backend, taken, monkeypatch):
    """Against eager in float32. What bfloat16 costs a whole model, most of it outside the experts, eager in bfloat16
    tells: ours may be off by twice as much. All three take the experts that the first chose: its router's logits are
    bfloat16, and on near ties others would choose others, an error of order one that is nobody's fault."""
    chosen, topk = [], torch.topk  # by each router, then by the balance loss

    def record(*args, **options):
        found = topk(*args, **options)
        chosen.append(found.indices)
        return found

    def repeat(probs, *args, **options):
        ids = next(again)
        return probs.gather(1, ids), ids

    monkeypatch.setattr(torch, "topk", record)
    loss, found = one_step(name, register_experts_backend(), place, torch.bfloat16)
    assert taken == [backend] * 2, "once a layer"
    monkeypatch.setattr(torch, "topk", repeat)
    steps = {}
    for dtype in (torch.float32, torch.bfloat16):
        again = iter(chosen)
        steps[dtype] = one_step(name, "eager", place, dtype)
        assert next(again, None) is None, "as many choices as were recorded"
    (expected_loss, expected), (_, rounded) = steps[torch.float32], steps[torch.bfloat16]
    assert abs(loss - expected_loss) < torch.finfo(torch.bfloat16).eps * abs(expected_loss)
    for tensor, value in expected.items():
        allowed = 2 * relative_error(rounded[tensor], value.double())
        assert relative_error(found[tensor], value.double()) < allowed, tensor


def test_experts_with_other_parts_are_refused(device):
    block = make_block("mixtral", device)
    register_experts_backend()
    block.experts.config._experts_implementation = BACKEND_NAME
    block.experts.has_bias = True
    with pytest.raises(ValueError, match="no bias"):
        block(torch.randn(1, 4, D, device=device))
