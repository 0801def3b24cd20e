"""Other libraries' MoE layers, built as their own users would build them: `level_runner.py --peers`.

Every peer gets the run's weights and inputs, does its own routing, and passes the same gate before it
is timed. A library that cannot be imported is a row that says how to get it.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from common.config import Workload
from common.level import Unsupported
from common.measure import TIE_MARGIN, Forward
from common.model import Weights


# Libraries that round their logits to bfloat16 are off by up to 2**-8 of logits up to about 4, twice.
ROUNDED_LOGITS = 0.05


class NotInstalled(RuntimeError):
    """A peer's library cannot be imported; the message says how to get it."""


@dataclass(frozen=True)
class Peer:
    """A library: the module that must import, where it comes from, and its layer as a forward. Tokens whose
    last chosen and first unchosen logit are closer than `tie_margin` are not held to the oracle's choice.
    `graph`: its calls can be captured, and are, as the upper levels' are: else its host work would be timed."""

    name: str
    module: str
    how_to_get_it: str
    connect: Callable[[Workload, Weights], Forward]
    tie_margin: float = TIE_MARGIN
    graph: bool = False

    kind = "peer"
    is_layer = True

    @property
    def adds(self) -> str:
        return f"{self.module}, in a CUDA graph" if self.graph else self.module

    @property
    def version(self) -> str:
        """What is installed: its distribution's version, or, where it came without, the first digits of its Python
        files' SHA-256. Empty if it cannot be imported."""
        package = self.module.partition(".")[0]
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            return ""
        names = importlib.metadata.packages_distributions().get(package)
        if names:
            return importlib.metadata.version(names[0])
        digest, folder = hashlib.sha256(), Path(spec.origin).parent
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
        return f"files {digest.hexdigest()[:12]}"

    def build(self, workload: Workload, weights: Weights) -> Forward:
        """The layer. Raises NotInstalled, or Unsupported where the library lacks something."""
        try:
            importlib.import_module(self.module)
        except ImportError as error:
            raise NotInstalled(f"{self.how_to_get_it} ({type(error).__name__}: {error})") from error
        if weights.device.type != "cuda":
            raise Unsupported("needs CUDA")
        forward = self.connect(workload, weights)
        return Captured(forward) if self.graph else forward


class Captured:
    """A forward behind CUDA graphs, one for each x that it is called with, read where it lies: for a run's few inputs,
    which are kept alive. The output is valid until the next call, as the graphs share their memory."""

    def __init__(self, forward: Forward):
        self.forward = forward
        self.graphs: dict[tuple, tuple[torch.cuda.CUDAGraph, torch.Tensor, torch.Tensor]] = {}
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, x_TD: torch.Tensor) -> torch.Tensor:
        place = x_TD.data_ptr(), x_TD.shape, x_TD.stride()
        if place not in self.graphs:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self.forward(x_TD)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                out_TD = self.forward(x_TD)
            self.graphs[place] = graph, x_TD, out_TD
        graph, _, out_TD = self.graphs[place]
        graph.replay()
        return out_TD


def eager_router(x_TD: torch.Tensor, weights: Weights, workload: Workload) -> tuple[torch.Tensor, torch.Tensor]:
    """scores_TK float32 and expert_ids_TK for libraries that leave the router to their caller."""
    cfg = workload.config
    logits_TE = torch.mm(x_TD, weights.router_ED.T, out_dtype=torch.float32)
    scores_TK, expert_ids_TK = logits_TE.softmax(dim=1).topk(cfg.K, dim=1)
    if cfg.renormalize or cfg.scoring == "topk_softmax":
        scores_TK = scores_TK / scores_TK.sum(dim=1, keepdim=True)
    return scores_TK, expert_ids_TK


def interleaved(weights: Weights) -> torch.Tensor:
    """gate_up (E, 2F, D) with gate and up rows in turn, as some libraries want them."""
    return weights.gate_up_E2FD.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)


# ---- triton_kernels (OpenAI) ---------------------------------------------------------------------

def connect_triton_kernels(workload: Workload, weights: Weights) -> Forward:
    """routing() on its own logits, two matmul_ogs: gather and SwiGLU fused into the first, scores into the
    second. Its activation takes gate and up in alternating rows, so gate_up is repacked once."""
    from triton_kernels.matmul_ogs import FnSpecs, FusedActivation, matmul_ogs
    from triton_kernels.routing import routing

    from common.peers_triton import silu_mul

    cfg = workload.config
    gate_up_ED2F, down_EFD = interleaved(weights).transpose(1, 2), weights.down_EDF.transpose(1, 2)
    activation = FusedActivation(FnSpecs("silu_mul", silu_mul, ()), (), 2)

    def forward(x_TD: torch.Tensor) -> torch.Tensor:
        logits_TE = torch.mm(x_TD, weights.router_ED.T, out_dtype=torch.float32)
        # Its softmax is over the chosen, or over all without renormalising: sm_first.
        routed, gather, scatter = routing(logits_TE, cfg.K, sm_first=not cfg.renormalize)
        hidden_RF = matmul_ogs(x_TD, gate_up_ED2F, None, routed, gather_indx=gather, fused_activation=activation)
        return matmul_ogs(hidden_RF, down_EFD, None, routed, scatter_indx=scatter, gammas=routed.gate_scal)

    return forward


# ---- transformers experts backends ---------------------------------------------------------------

def connect_transformers(workload: Workload, weights: Weights, implementation: str) -> Forward:
    """The sparse block of Qwen3-MoE with this run's weights, under one of its experts backends."""
    from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    cfg = workload.config
    config = Qwen3MoeConfig(hidden_size=cfg.D, moe_intermediate_size=cfg.F, num_experts=cfg.E,
                            num_experts_per_tok=cfg.K, norm_topk_prob=cfg.renormalize)
    config._experts_implementation = implementation
    with torch.device("meta"):
        block = Qwen3MoeSparseMoeBlock(config)
    state = {"gate.weight": weights.router_ED, "experts.gate_up_proj": weights.gate_up_E2FD,
             "experts.down_proj": weights.down_EDF}
    block.load_state_dict(state, assign=True, strict=True)
    block.eval()

    def forward(x_TD: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            out = block(x_TD[None])
        return (out[0] if isinstance(out, tuple) else out).view(x_TD.shape)

    return forward


def _transformers(implementation: str) -> Peer:
    return Peer(f"transformers {implementation}", "transformers.models.qwen3_moe.modeling_qwen3_moe",
                "pip install 'transformers>=5'",
                lambda workload, weights: connect_transformers(workload, weights, implementation),
                tie_margin=ROUNDED_LOGITS)


# ---- vLLM, ScatterMoE, SonicMoE, DeepGEMM -------------------------------------------------------

def connect_vllm(workload: Workload, weights: Weights) -> Forward:
    """fused_topk and fused_experts, the Triton path of vLLM's FusedMoE, with its tuned configurations."""
    from vllm.model_executor.layers.fused_moe import fused_experts
    from vllm.model_executor.layers.fused_moe.router.fused_topk_router import fused_topk

    cfg = workload.config

    def forward(x_TD: torch.Tensor) -> torch.Tensor:
        logits_TE = torch.mm(x_TD, weights.router_ED.T, out_dtype=torch.float32)
        scores_TK, ids_TK, *_ = fused_topk(x_TD, logits_TE, cfg.K, renormalize=cfg.renormalize)
        return fused_experts(x_TD, weights.gate_up_E2FD, weights.down_EDF, scores_TK, ids_TK)

    return forward


def connect_scattermoe(workload: Workload, weights: Weights) -> Forward:
    """flatten_sort_count and two scattered-to-scattered GEMMs with eager activation, as its GLU MLP does."""
    from scattermoe.parallel_experts import flatten_sort_count, parallel_linear

    cfg = workload.config
    gate_up_ED2F, down_EFD = weights.gate_up_E2FD.transpose(1, 2), weights.down_EDF.transpose(1, 2)

    def forward(x_TD: torch.Tensor) -> torch.Tensor:
        scores_TK, ids_TK = eager_router(x_TD, weights, workload)
        scores_TK = scores_TK.to(x_TD.dtype)
        sorted_R, order_R, ends_E = flatten_sort_count(ids_TK, num_experts=cfg.E)
        both = parallel_linear(x_TD, gate_up_ED2F, cfg.K, sorted_R, order_R, ends_E, grouped_out=True)
        gate, up = both.chunk(2, dim=1)
        hidden = torch.nn.functional.silu(gate) * up
        return parallel_linear(hidden, down_EFD, 1, sorted_R, order_R, ends_E, grouped_in=True, gates=scores_TK)

    return forward


def connect_sonicmoe(workload: Workload, weights: Weights) -> Forward:
    """The function under its MoE module, router included, without the auxiliary loss that the module adds.

    It takes gate and up in alternating rows, and softmax over the chosen experts.
    """
    from sonicmoe import moe_TC_softmax_topk_layer
    from sonicmoe.enums import ActivationType

    cfg = workload.config
    if not cfg.renormalize:
        raise Unsupported("its router always renormalises")
    if cfg.D % 64 or cfg.F % 64 or cfg.D < 512:
        raise Unsupported("needs D and F in multiples of 64 and D of at least 512")
    gate_up_2FDE = interleaved(weights).permute(1, 2, 0)
    down_DFE = weights.down_EDF.permute(1, 2, 0)

    def forward(x_TD: torch.Tensor) -> torch.Tensor:
        stream = torch.cuda.current_stream().cuda_stream
        out_TD, *_ = moe_TC_softmax_topk_layer(x_TD, weights.router_ED, gate_up_2FDE, None, down_DFE, None, cfg.K,
                                               stream, ActivationType.SWIGLU, True)
        return out_TD

    return forward


def connect_deepgemm(workload: Workload, weights: Weights) -> Forward:
    """Its contiguous grouped bf16 GEMM on rows padded to 128 an expert, eager PyTorch around it."""
    from deep_gemm import get_mk_alignment_for_contiguous_layout, m_grouped_bf16_gemm_nt_contiguous

    cfg = workload.config
    align = get_mk_alignment_for_contiguous_layout()

    def forward(x_TD: torch.Tensor) -> torch.Tensor:
        scores_TK, ids_TK = eager_router(x_TD, weights, workload)
        sorted_R, order_R = ids_TK.flatten().sort(stable=True)
        counts_E = torch.searchsorted(sorted_R, torch.arange(cfg.E + 1, device=x_TD.device)).diff()
        padded_E = (counts_E + align - 1) // align * align
        shift_E = (padded_E.cumsum(0) - padded_E) - (counts_E.cumsum(0) - counts_E)
        row_R = torch.arange(sorted_R.numel(), device=x_TD.device) + shift_E[sorted_R]
        most = (sorted_R.numel() + cfg.E * (align - 1) + align - 1) // align * align
        expert_P = torch.full((most,), -1, dtype=torch.int32, device=x_TD.device)
        expert_P[row_R] = sorted_R.int()
        token_P = order_R.new_zeros(most)  # rows that pad are token 0's, and nobody reads what comes of them
        token_P[row_R] = order_R // cfg.K
        x_PD = x_TD[token_P]
        both = x_TD.new_empty(most, 2 * cfg.F)
        m_grouped_bf16_gemm_nt_contiguous(x_PD, weights.gate_up_E2FD, both, expert_P)
        gate, up = both.chunk(2, dim=1)
        y_PD = x_TD.new_empty(most, cfg.D)
        hidden = torch.nn.functional.silu(gate) * up
        m_grouped_bf16_gemm_nt_contiguous(hidden, weights.down_EDF, y_PD, expert_P)
        row_of_slot_R = torch.empty_like(row_R).scatter_(0, order_R, row_R)
        y_TKD = y_PD[row_of_slot_R].unflatten(0, (x_TD.shape[0], cfg.K))
        return (y_TKD * scores_TK[:, :, None]).sum(dim=1).to(x_TD.dtype)

    return forward


PEERS = (
    Peer("triton_kernels", "triton_kernels.matmul_ogs",
         "put vllm/third_party of a vllm 0.33 wheel on PYTHONPATH, or install it from triton's repository",
         connect_triton_kernels, graph=True),
    _transformers("grouped_mm"),
    _transformers("batched_mm"),
    _transformers("eager"),
    Peer("vLLM fused_moe", "vllm.model_executor.layers.fused_moe", "pip install vllm", connect_vllm, graph=True),
    Peer("ScatterMoE", "scattermoe", "pip install git+https://github.com/shawntan/scattermoe", connect_scattermoe),
    Peer("SonicMoE", "sonicmoe", "pip install sonic-moe (CUDA 12.9 on, Python 3.12, Hopper on)",
         connect_sonicmoe, tie_margin=ROUNDED_LOGITS),
    Peer("DeepGEMM", "deep_gemm", "put vllm/third_party of a vllm 0.33 wheel on PYTHONPATH (it needs nvcc 12.9 on), or "
         "git clone --recursive github.com/deepseek-ai/DeepGEMM, then its install.sh", connect_deepgemm),
)
