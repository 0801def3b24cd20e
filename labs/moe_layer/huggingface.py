"""To and from Hugging Face transformers 5: its MoE blocks, and its interface for experts.

    layer = OptimizedMoELayer.from_hf(model.model.layers[0].mlp)       # and layer.to_hf()
    register_experts_backend()                                          # once, then for any MoE model:
    model = AutoModelForCausalLM.from_config(config, experts_implementation="optimized_moe")

Needs transformers (requirements-hf.txt), which the rest of the project does without.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from labs.moe_layer.admission import Admitted
from labs.moe_layer.experts import autocast_dtype, choose_backend, compute_experts
from labs.moe_layer.rows import SlotRows

if TYPE_CHECKING:
    from labs.full_moe import OptimizedMoELayer

BACKEND_NAME = "optimized_moe"


class Kind(NamedTuple):
    """Where transformers keeps a block: the modules' common name, and its classes."""

    module: str
    block: str
    config: str


KINDS = {
    "mixtral": Kind("mixtral", "MixtralSparseMoeBlock", "MixtralConfig"),
    "qwen3_moe": Kind("qwen3_moe", "Qwen3MoeSparseMoeBlock", "Qwen3MoeConfig"),
    "olmoe": Kind("olmoe", "OlmoeSparseMoeBlock", "OlmoeConfig"),
    "deepseek_v3": Kind("deepseek_v3", "DeepseekV3MoE", "DeepseekV3Config"),
}


def kind_of(block: nn.Module) -> str:
    """`mixtral` for a MixtralSparseMoeBlock, and so on. Raises TypeError, naming the known blocks, for another."""
    for kind, place in KINDS.items():
        if type(block).__name__ == place.block:
            return kind
    raise TypeError(f"block is a {type(block).__name__}: give a {', '.join(place.block for place in KINDS.values())}")


def check_silu(experts: nn.Module) -> None:
    """Raise ValueError unless the experts' activation is SiLU."""
    name = type(experts.act_fn).__name__
    if name not in ("SiLUActivation", "SiLU"):
        raise ValueError(f"the experts' activation is {name}: only SiLU (hidden_act='silu') is computed here")


def layer_from_block(cls: type[OptimizedMoELayer], block: nn.Module, options: dict) -> OptimizedMoELayer:
    """See OptimizedMoELayer.from_hf."""
    kind = kind_of(block)
    experts, gate = block.experts, block.gate
    check_silu(experts)
    if getattr(block, "jitter_noise", 0):
        raise ValueError(f"router_jitter_noise={block.jitter_noise} multiplies the block's input in training, which "
                         "this layer does not do: set it to 0")
    settings = {"capacity_factor": None, "load_balance_weight": 0.0,
                "renormalize": getattr(gate, "norm_topk_prob", True)}
    if kind == "deepseek_v3":
        settings |= {"scoring": "sigmoid", "num_groups": gate.num_group, "top_groups": gate.topk_group,
                     "score_scale": gate.routed_scaling_factor, "router_bias": True,
                     "shared_ffn_dim": block.shared_experts.gate_proj.out_features}
    layer = cls(experts.hidden_dim, experts.intermediate_dim, experts.num_experts, gate.top_k,
                **{**settings, **options, "device": "meta"})
    share_parameters(block, layer)
    if layer.adaptive_capacity:  # no block has it: it starts here
        layer.adapted_capacity_factor = torch.full((), layer.capacity_factor, device=gate.weight.device)
    layer.hf_kind = kind
    return layer.train(block.training)


def block_from_layer(layer: OptimizedMoELayer, kind: str | None, config: object | None) -> nn.Module:
    """See OptimizedMoELayer.to_hf."""
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: choose one of {', '.join(KINDS)}")
    check_expressible(layer, kind)
    import importlib

    place, gate = KINDS[kind], layer.gate
    folder = f"transformers.models.{place.module}"
    if config is None:
        sizes = {"hidden_size": layer.hidden_dim, "num_experts_per_tok": layer.top_k}
        if kind == "mixtral":
            sizes |= {"intermediate_size": layer.ffn_dim, "num_local_experts": layer.num_experts}
        elif kind == "deepseek_v3":
            shared_ffn_dim = layer.shared_experts.gate_proj.out_features
            sizes |= {"moe_intermediate_size": layer.ffn_dim, "n_routed_experts": layer.num_experts,
                      "n_shared_experts": shared_ffn_dim // layer.ffn_dim, "n_group": gate.num_groups,
                      "topk_group": gate.top_groups, "routed_scaling_factor": gate.score_scale,
                      "norm_topk_prob": gate.renormalize}
        else:
            width = "moe_intermediate_size" if kind == "qwen3_moe" else "intermediate_size"
            sizes |= {width: layer.ffn_dim, "num_experts": layer.num_experts,
                      "norm_topk_prob": gate.renormalize or gate.scoring == "topk_softmax"}
        config = getattr(importlib.import_module(f"{folder}.configuration_{place.module}"), place.config)(**sizes)
        config._experts_implementation = "eager"
    with torch.device("meta"):
        block = getattr(importlib.import_module(f"{folder}.modeling_{place.module}"), place.block)(config)
    share_parameters(layer, block)
    return block.train(layer.training)


def check_expressible(layer: OptimizedMoELayer, kind: str) -> None:
    """Raise ValueError, naming the setting, if a block of this kind cannot compute what the layer does."""
    gate = layer.gate
    deepseek, sigmoid = kind == "deepseek_v3", gate.scoring == "sigmoid"
    shared_ffn_dim = layer.shared_experts.gate_proj.out_features if layer.shared_experts else 0
    problems = {
        f"temperature={gate.temperature}": gate.temperature != 1.0,
        f"scoring={gate.scoring!r}": sigmoid != deepseek,
        "a router bias": gate.e_score_correction_bias is not None and not deepseek,
        "no router bias (router_bias=True gives one)": gate.e_score_correction_bias is None and deepseek,
        f"score_scale={gate.score_scale}": gate.score_scale != 1.0 and not deepseek,
        f"top_groups={gate.top_groups} of {gate.num_groups}": gate.top_groups < gate.num_groups and not deepseek,
        f"shared_ffn_dim={shared_ffn_dim}": bool(shared_ffn_dim) != deepseek or shared_ffn_dim % layer.ffn_dim != 0,
        "renormalize=False": kind == "mixtral" and not gate.renormalize and gate.scoring != "topk_softmax",
    }
    wrong = [name for name, is_wrong in problems.items() if is_wrong]
    if wrong:
        raise ValueError(f"kind={kind!r} cannot express {', '.join(wrong)}")


def share_parameters(source: nn.Module, target: nn.Module) -> None:
    """Put the source's parameters and buffers into the target under the same names, but what training alone has.
    Raises ValueError, naming the tensor, where a name is missing on either side or shapes differ."""
    tensors, wanted = ({name: tensor for name, tensor in (*module.named_parameters(), *module.named_buffers())
                        if name != "adapted_capacity_factor"} for module in (source, target))
    if tensors.keys() != wanted.keys():
        raise ValueError(f"tensors differ: {', '.join(sorted(tensors.keys() ^ wanted.keys()))}")
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)}, but {tuple(wanted[name].shape)} is needed")
        owner = target.get_submodule(name.rpartition(".")[0])
        setattr(owner, name.rpartition(".")[2], tensor)


def experts_forward(self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor,
                    top_k_weights: torch.Tensor) -> torch.Tensor:
    """An experts module of transformers, computed here: hidden_states (T, D), top_k_index and top_k_weights (T, K) ->
    (T, D). Raises ValueError for experts with a bias, another layout or another activation."""
    plain = self.has_gate and self.is_concatenated and not self.is_transposed and not self.has_bias
    if not plain or getattr(self, "has_post_expert_norm", False):
        raise ValueError(f"experts_implementation={BACKEND_NAME!r} needs experts with gate_up_proj (E, 2F, D), "
                         f"gate rows first, and no bias or norm; {type(self).__name__} is not so")
    check_silu(self)
    E, D, F = self.down_proj.shape
    device = hidden_states.device
    dtype = autocast_dtype(device) or hidden_states.dtype
    backend = choose_backend("auto", True, device, dtype, D, F, E)
    scores_TK = top_k_weights.to(torch.promote_types(top_k_weights.dtype, torch.float32))
    # Under expert parallelism ids of E and more stand for experts of other ranks. A release of transformers 5 that does
    # not say whether it is on may drop slots at any time.
    expert_ids_TK, may_drop = top_k_index.clamp(max=E), getattr(self, "_is_expert_parallel", True)
    admitted = Admitted(scores_TK, expert_ids_TK, SlotRows.of(expert_ids_TK, E, may_drop))
    return compute_experts(hidden_states, self.gate_up_proj, self.down_proj, admitted, backend.name)


def register_experts_backend(name: str = BACKEND_NAME) -> str:
    """Make `experts_implementation=name` known to transformers; returns the name. Raises ImportError without
    transformers 5."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(name, experts_forward)
    return name
