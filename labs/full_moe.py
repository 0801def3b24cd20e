"""OptimizedMoELayer: what the ladder found, as an nn.Module to take away.

    moe = OptimizedMoELayer(hidden_dim=2048, ffn_dim=768, num_experts=128, top_k=8)
    output, aux_loss = moe(x, return_aux_loss=True)      # training: add aux_loss to the task's loss
    output = moe(x)                                       # x (batch, sequence, hidden) or (tokens, hidden)

    router -> capacity, token rounding -> experts (one of three backends) -> + shared expert

The parts stand in labs/moe_layer, one idea a file: router, losses, admission (capacity and rounding), experts (the
backends), statistics, inference, huggingface. Parameters are named and shaped as in Hugging Face transformers 5.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path

if not __package__:  # run as a file, from anywhere; imported, it leaves the importer's path alone
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn
from torch.nn.functional import silu

import common.level  # noqa: F401  (picks Triton's interpreter where there is no GPU)
from common.config import MoEConfig
from common.model import Weights
from labs.kernels.rounding import LEAST_TILES, MODES, Plan, plan_rounding
from labs.moe_layer.admission import Admitted, drop_over_capacity, move_factor, round_choice
from labs.moe_layer.arguments import check_flag, check_number, check_whole
from labs.moe_layer.experts import BACKENDS, Backend, Experts, Sealed
from labs.moe_layer.inference import Forward, GraphedForward, build_ladder_experts, build_ladder_layer
from labs.moe_layer.losses import balance_loss, count_rows, move_bias, z_loss
from labs.moe_layer.memory import predict_kept_bytes
from labs.moe_layer.router import Choice, Router
from labs.moe_layer.rows import SlotRows
from labs.moe_layer.statistics import LoadRecorder, Loads, LoadStats, recomputing

# T tokens, D model width, F expert width, E experts, K top-k, R = T*K routed rows.

ROUNDINGS = tuple(mode for mode in MODES if mode != "exact")


class SharedExpert(nn.Module):
    """A SwiGLU expert that every token goes through (DeepSeek-V3, arXiv 2412.19437)."""

    def __init__(self, hidden_dim: int, ffn_dim: int, **made):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_dim, ffn_dim, bias=False, **made)
        self.up_proj = nn.Linear(hidden_dim, ffn_dim, bias=False, **made)
        self.down_proj = nn.Linear(ffn_dim, hidden_dim, bias=False, **made)

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        """(T, D) -> (T, D), x's dtype."""
        return self.down_proj(silu(self.gate_proj(x_TD)) * self.up_proj(x_TD))


class OptimizedMoELayer(nn.Module):
    """A SwiGLU mixture of experts.

    tile_size, token_rounding: with one of `nearest`, `up`, `down`, `balance`, training rounds every expert's rows to
        whole GEMM tiles (level 7); off by default, and off by itself, with a warning, where a batch is too small.
        Evaluation is always exact: rounding looks at the whole batch, so it is not causal.
    capacity_factor: in training an expert keeps the ceil(factor * T*K/E) rows with the best scores; what is dropped
        passes as zero. None drops nothing. eval_capacity_factor is the same for evaluation.
    adaptive_capacity: capacity_factor is where training starts; the factor then follows, at each update_balance(),
        the running mean of the largest load over the mean, between 1 and twice capacity_factor. The state dict has it
        as adapted_capacity_factor, a 0-d float32.
    use_io_overlap: level 8's and 9's kernels where they run; off is level 4's scheme on PyTorch's grouped_mm.
    load_balance_weight, z_loss_weight: weights of the two terms of aux_loss.
    bias_update_rate: above 0, a bias moves with the load at each update_balance() (loss-free balancing). router_bias
        gives the router such a bias also where nothing moves it.
    gradient_checkpointing: keep x, scores and ids for backward, and compute the experts' forward again.
    shared_ffn_dim: width of a shared expert, 0 for none.
    backend: `auto`, or one of `kernels`, `grouped`, `loop` by name.
    cuda_graph: evaluation without gradients runs under a CUDA graph, into buffers allocated once a token count, or
        twice where x comes from one address again and is read there; the output is such a buffer, which the next call
        of as many tokens overwrites. Nothing changes on a CPU, nor where a backend makes the host wait: the loop, and
        grouped_mm in other dtypes than bfloat16.
    collect_stats: keep what stats() tells. Without, evaluation may take the ladder's own router kernel.
    rounding_least_tiles: mean rows an expert, in tiles, below which token rounding turns itself off.
    balance_group: process group over which loads are summed for the balance loss and update_balance(). With a group
        the loss is the whole batch's, as one process would have it; None counts this process's loads in the loss, and
        those of all processes (torch.distributed's default group) in update_balance(), where replicas would drift
        apart otherwise. Name the group where only some processes hold this layer, as under pipeline parallelism.
    The router's options are those of labs/moe_layer/router.py.

    Where both experts' weights have a `main_grad`, float32 in the weight's shape, a backward adds their gradients to
    it, without rounding, and leaves their `grad` as it is.

    Raises ValueError, naming the argument, for what cannot be; common.level.Unsupported for a backend that does not
    run here.
    """

    def __init__(self, hidden_dim: int, ffn_dim: int, num_experts: int, top_k: int, tile_size: int = 128,
                 capacity_factor: float | None = 1.25, use_io_overlap: bool = True, load_balance_weight: float = 0.01,
                 gradient_checkpointing: bool = False, *, token_rounding: str | None = None,
                 eval_capacity_factor: float | None = None, adaptive_capacity: bool = False,
                 z_loss_weight: float = 0.0, bias_update_rate: float = 0.0, scoring: str = "softmax_topk",
                 renormalize: bool = True, temperature: float = 1.0, noise_std: float = 0.0, num_groups: int = 1,
                 top_groups: int | None = None, score_scale: float = 1.0, shared_ffn_dim: int = 0,
                 router_bias: bool = False, backend: str = "auto", balance_group: object | None = None,
                 cuda_graph: bool = False, collect_stats: bool = True, rounding_least_tiles: float = LEAST_TILES,
                 device: torch.device | str | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        check_whole(hidden_dim=hidden_dim, ffn_dim=ffn_dim, num_experts=num_experts, top_k=top_k, tile_size=tile_size)
        check_whole(least=0, shared_ffn_dim=shared_ffn_dim)
        check_flag(use_io_overlap=use_io_overlap, gradient_checkpointing=gradient_checkpointing,
                   adaptive_capacity=adaptive_capacity, router_bias=router_bias, cuda_graph=cuda_graph,
                   collect_stats=collect_stats)
        check_number(load_balance_weight=load_balance_weight, z_loss_weight=z_loss_weight,
                     bias_update_rate=bias_update_rate, rounding_least_tiles=rounding_least_tiles)
        for name, factor in (("capacity_factor", capacity_factor), ("eval_capacity_factor", eval_capacity_factor)):
            if factor is not None:
                check_number(above_zero=True, note=", or None to drop nothing", **{name: factor})
        if top_k > num_experts:
            raise ValueError(f"top_k={top_k} is more than num_experts={num_experts}: a token cannot choose one twice")
        if token_rounding is not None and token_rounding not in ROUNDINGS:
            raise ValueError(f"token_rounding={token_rounding!r} is unknown: None, or one of {', '.join(ROUNDINGS)}")
        if adaptive_capacity and capacity_factor is None:
            raise ValueError("adaptive_capacity=True needs a capacity_factor to start from, not None")
        if backend != "auto" and backend not in BACKENDS:
            raise ValueError(f"backend={backend!r} is unknown: auto, or one of {', '.join(BACKENDS)}")
        if backend == "loop" and token_rounding is not None:
            raise ValueError("backend='loop' goes by top-k slots: token_rounding needs 'grouped' or 'kernels'")
        self.hidden_dim, self.ffn_dim, self.num_experts, self.top_k = hidden_dim, ffn_dim, num_experts, top_k
        self.tile_size, self.token_rounding = tile_size, token_rounding
        self.capacity_factor, self.eval_capacity_factor = capacity_factor, eval_capacity_factor
        self.adaptive_capacity = adaptive_capacity
        self.use_io_overlap, self.wanted_backend = use_io_overlap, backend
        self.load_balance_weight, self.z_loss_weight = load_balance_weight, z_loss_weight
        self.bias_update_rate, self.balance_group = bias_update_rate, balance_group
        self.gradient_checkpointing = gradient_checkpointing
        self.cuda_graph, self.collect_stats, self.rounding_least_tiles = cuda_graph, collect_stats, rounding_least_tiles
        made = {"device": device, "dtype": dtype}
        self.gate = Router(hidden_dim, num_experts, top_k, scoring, renormalize, temperature, noise_std, num_groups,
                           top_groups, score_scale, router_bias or bias_update_rate > 0, **made)
        self.experts = Experts(hidden_dim, ffn_dim, num_experts, **made)
        self.shared_experts = SharedExpert(hidden_dim, shared_ffn_dim, **made) if shared_ffn_dim else None
        # What token rounding must know of the layer.
        self._config = MoEConfig("layer", hidden_dim, ffn_dim, num_experts, top_k,
                                 "topk_softmax" if scoring == "topk_softmax" else "softmax_topk", renormalize)
        self.recorder = LoadRecorder(tile_size)
        if adaptive_capacity:
            factor = torch.full((), capacity_factor, device=device, dtype=torch.float32)
            self.register_buffer("adapted_capacity_factor", factor)
        self.hf_kind: str | None = None  # the kind of transformers block it was made from
        self._graphs: GraphedForward | None = None
        self._since_update_E: torch.Tensor | None = None
        if backend == "kernels" and not torch.cuda.is_available():
            self.backend  # noqa: B018  (raises, saying what is missing)

    def reset_parameters(self) -> None:
        """Draw all weights anew; bias and capacity factor start again. A layer made on `meta` needs it after
        to_empty()."""
        self.gate.reset_parameters()
        self.experts.reset_parameters()
        if self.shared_experts is not None:
            for linear in self.shared_experts.children():
                linear.reset_parameters()
        if self.adaptive_capacity:
            nn.init.constant_(self.adapted_capacity_factor, self.capacity_factor)
        self._since_update_E = None

    @classmethod
    def for_training(cls, hidden_dim: int, ffn_dim: int, num_experts: int, top_k: int, **options) -> OptimizedMoELayer:
        """A layer with what suits training: exact top-k with no row dropped, a balance loss and a z-loss. `options`
        override; token_rounding, which changes the function that is computed, is one to choose."""
        chosen = {"capacity_factor": None, "load_balance_weight": 0.01, "z_loss_weight": 1e-3}
        return cls(hidden_dim, ffn_dim, num_experts, top_k, **{**chosen, **options})

    @classmethod
    def for_inference(cls, hidden_dim: int, ffn_dim: int, num_experts: int, top_k: int, **options) -> OptimizedMoELayer:
        """A layer with what suits inference: in eval mode, without gradients, losses, capacity or statistics, under a
        CUDA graph where there is a GPU. `options` override."""
        chosen = {"capacity_factor": None, "load_balance_weight": 0.0, "cuda_graph": True, "collect_stats": False}
        return cls(hidden_dim, ffn_dim, num_experts, top_k, **{**chosen, **options}).eval().requires_grad_(False)

    @classmethod
    def from_hf(cls, block: nn.Module, **options) -> OptimizedMoELayer:
        """A layer that computes what a Mixtral, Qwen3-MoE, OLMoE or DeepSeek-V3 block of transformers 5 computes, with
        the block's own parameters (shared, not copied). No capacity, no rounding, no losses unless `options` say so.
        Raises TypeError for another block, ValueError for one with parts that this layer lacks."""
        from labs.moe_layer.huggingface import layer_from_block  # transformers is an optional dependency

        return layer_from_block(cls, block, options)

    def to_hf(self, kind: str | None = None, config: object | None = None) -> nn.Module:
        """A transformers block with this layer's parameters (shared, not copied): `mixtral`, `qwen3_moe`, `olmoe` or
        `deepseek_v3`; the kind it came from if None. `config`: the model's; made of the layer's sizes if None. Raises
        ValueError for a kind that cannot express this layer. What happens in training only is left behind."""
        from labs.moe_layer.huggingface import block_from_layer

        return block_from_layer(self, kind or self.hf_kind, config)

    def _apply(self, fn: Callable, recurse: bool = True) -> OptimizedMoELayer:
        """As of every module (`.to`, `.bfloat16`), but the capacity factor stays float32: its moves are lost in
        less."""
        super()._apply(fn, recurse)
        if self.adaptive_capacity:
            self.adapted_capacity_factor = self.adapted_capacity_factor.float()
        return self

    # ---- what runs -------------------------------------------------------------------------------

    @property
    def backend(self) -> Backend:
        """(name, reason): the path that a forward takes on the device and in the dtype that the weights have now;
        within FSDP2 a forward asks again, once they have the policy's dtype.
        Raises Unsupported if a backend was asked for by name that does not run here."""
        return self.experts.backend(self.wanted_backend, self.use_io_overlap)

    def forward(self, x: torch.Tensor, return_aux_loss: bool = False) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """x (B, S, D) or (T, D), T >= 0, in the weights' dtype (any, under autocast) -> output of x's shape; with
        return_aux_loss also the 0-d float32 load_balance_weight * balance + z_loss_weight * z."""
        self._check(x)
        x_TD = x.reshape(-1, self.hidden_dim)
        if self._graph_applies(x_TD) and not return_aux_loss:
            return self._graphed(x_TD).view(x.shape)
        out_TD, choice, loads = self._forward(x_TD)
        self._count(loads)
        output = out_TD.view(x.shape)
        return (output, self._aux_loss(choice, loads[0])) if return_aux_loss else output

    def _forward(self, x_TD: torch.Tensor) -> tuple[torch.Tensor, Choice, Loads]:
        """out_TD, what the router said, and the loads."""
        choice = self.gate(x_TD)
        admitted, chosen_E, computed_E = self.admit(choice)
        out_TD = self.experts(x_TD, Sealed(admitted), self.wanted_backend, self.use_io_overlap,
                              self.gradient_checkpointing)
        if self.shared_experts is not None:
            out_TD = out_TD + self.shared_experts(x_TD)
        return out_TD, choice, (chosen_E, computed_E)

    @property
    def _balances(self) -> bool:
        """Whether update_balance() has anything to move."""
        return self.bias_update_rate > 0 or self.adaptive_capacity

    def _count(self, loads: Loads) -> None:
        """Keep a forward's loads for stats() and update_balance(): once, though checkpointing runs it twice."""
        if self.collect_stats or self._balances:
            self._keep(*loads)

    @torch.compiler.disable  # what it keeps grows, which compiled code would be compiled again for
    def _keep(self, chosen_E: torch.Tensor, computed_E: torch.Tensor) -> None:
        if recomputing():
            return
        if self.collect_stats:
            self.recorder.record(chosen_E, computed_E, running=self.training)
        if self.training and self._balances:
            self._since_update_E = chosen_E if self._since_update_E is None else self._since_update_E + chosen_E

    def _graph_applies(self, x_TD: torch.Tensor) -> bool:
        if not self.cuda_graph or self.training or not x_TD.is_cuda or torch.compiler.is_compiling():
            return False
        if x_TD.shape[0] == 0 or x_TD.dtype != self.experts.down_proj.dtype:  # nothing to do, or to be refused
            return False
        backend = self.backend.name
        capturable = backend == "kernels" or (backend == "grouped" and x_TD.dtype == torch.bfloat16)  # others sync
        needs_grad = x_TD.requires_grad or any(parameter.requires_grad for parameter in self.parameters())
        return capturable and not ((torch.is_grad_enabled() and needs_grad) or torch.is_autocast_enabled("cuda")
                                   or torch.cuda.is_current_stream_capturing())

    def _graphed(self, x_TD: torch.Tensor) -> torch.Tensor:
        if self._graphs is None:
            self._graphs = GraphedForward(self._make_inference_forward,
                                          lambda: [*self.parameters(), *self.buffers()])
        out_TD, loads = self._graphs(x_TD)
        if loads is not None:
            self._count(loads)
        return out_TD

    def _make_inference_forward(self) -> Forward:
        """The forward that inference records for the weights as they are."""
        if self.eval_capacity_factor is not None or self.backend.name != "kernels":
            return lambda x_TD: self._forward(x_TD)[::2]
        weights = Weights(self.gate.weight, self.experts.gate_up_proj, self.experts.down_proj)
        if self.gate.is_plain and not self.collect_stats and self.gate.weight.dtype == self.experts.down_proj.dtype:
            layer = build_ladder_layer(self._config, weights)

            def routed(x_TD: torch.Tensor) -> tuple[torch.Tensor, None]:
                return layer(x_TD), None
        else:
            experts = build_ladder_experts(weights.gate_up_E2FD, weights.down_EDF)

            def routed(x_TD: torch.Tensor) -> tuple[torch.Tensor, Loads | None]:
                choice = self.gate(x_TD)
                rows_E = count_rows(choice.expert_ids_TK, self.num_experts) if self.collect_stats else None
                out_TD = experts(x_TD, choice.scores_TK, choice.expert_ids_TK)
                return out_TD, None if rows_E is None else (rows_E, rows_E)

        def forward(x_TD: torch.Tensor) -> tuple[torch.Tensor, Loads | None]:
            out_TD, loads = routed(x_TD)
            return out_TD if self.shared_experts is None else out_TD + self.shared_experts(x_TD), loads

        return forward

    def _check(self, x: torch.Tensor) -> None:
        if x.dim() not in (2, 3) or x.shape[-1] != self.hidden_dim:
            raise ValueError(f"x has shape {tuple(x.shape)}: give (tokens, {self.hidden_dim}) or "
                             f"(batch, sequence, {self.hidden_dim})")
        if x.device != self.gate.weight.device:
            raise ValueError(f"x is on {x.device}, the layer on {self.gate.weight.device}")

    def admit(self, choice: Choice) -> tuple[Admitted, torch.Tensor, torch.Tensor]:
        """The rows to compute, and how many each expert was chosen for and gets, (E,) int64."""
        (T, _), E = choice.expert_ids_TK.shape, self.num_experts
        factor = self.capacity_factor if self.training else self.eval_capacity_factor
        plan = self._plan(T) if self.training and self.token_rounding is not None and T else None
        rounds = plan is not None and plan.mode != "exact"
        ids_TK, chosen_E = choice.expert_ids_TK, None
        if factor is not None and T:
            chosen_E = count_rows(ids_TK, E)
            if self.training and self.adaptive_capacity:
                factor = self.adapted_capacity_factor  # read only: a recomputed forward must drop the same rows
            ids_TK = drop_over_capacity(choice.scores_TK, ids_TK, E, factor)
        if rounds:
            rounded = round_choice(choice.probs_TE, ids_TK, plan)
            computed_E, chosen_E = rounded.offsets_E1.diff(), rounded.counts_E if chosen_E is None else chosen_E
            admitted = Admitted(choice.scores_TK, ids_TK, None, rounded, plan, choice.probs_TE, self.gate.score_scale)
        else:
            slots = SlotRows.of(ids_TK, E, may_drop=factor is not None)
            computed_E = slots.offsets_E1.diff()
            chosen_E = computed_E if chosen_E is None else chosen_E
            admitted = Admitted(choice.scores_TK, ids_TK, slots)
        return admitted, chosen_E.long(), computed_E.long()

    def _plan(self, T: int) -> Plan:
        return plan_rounding(self._config, T, self.tile_size, self.token_rounding, self.rounding_least_tiles)

    # ---- balance ---------------------------------------------------------------------------------

    def _aux_loss(self, choice: Choice, chosen_E: torch.Tensor) -> torch.Tensor:
        loss = choice.logits_TE.new_zeros(())
        if self.load_balance_weight:
            rows_E = chosen_E if self.balance_group is None else self._sum_over_group(chosen_E)
            loss = loss + self.load_balance_weight * balance_loss(choice.probs_TE, rows_E)
        if self.z_loss_weight:
            loss = loss + self.z_loss_weight * z_loss(choice.logits_TE)
        return loss

    def _sum_over_group(self, rows_E: torch.Tensor) -> torch.Tensor:
        rows_E = rows_E.clone()
        torch.distributed.all_reduce(rows_E, group=self.balance_group)
        return rows_E

    def update_balance(self) -> None:
        """Move the router's bias (losses.move_bias) and the adaptive capacity factor (admission.move_factor) by the
        loads of the training forwards since the last call: call it after each optimizer step. Does nothing if neither
        is on or there was no training forward. Where processes train together each of balance_group calls it, also one
        that had no forward."""
        rows_E, self._since_update_E = self._since_update_E, None
        if self._balances and torch.distributed.is_available() and torch.distributed.is_initialized():
            none_E = torch.zeros(self.num_experts, dtype=torch.int64, device=self.gate.weight.device)
            rows_E = self._sum_over_group(none_E if rows_E is None else rows_E)
        if rows_E is None:
            return
        if self.bias_update_rate:
            move_bias(self.gate.e_score_correction_bias, rows_E, self.bias_update_rate)
        if self.adaptive_capacity:
            move_factor(self.adapted_capacity_factor, rows_E, self.capacity_factor)

    def update_bias(self) -> None:
        """update_balance() by its old name."""
        self.update_balance()

    # ---- statistics ------------------------------------------------------------------------------

    @property
    def rows_E(self) -> torch.Tensor:
        """(E,) int64 on the device: rows the router chose each expert for in the last forward, before any were
        dropped or added. Reading it makes nobody wait. Raises RuntimeError before the first forward."""
        if self.recorder.last is None:
            raise RuntimeError("rows_E has nothing to tell: run a forward first, with collect_stats on")
        return self.recorder.last[0]

    def stats(self, running: bool = False) -> LoadStats:
        """Loads of the last forward, or, `running`, of all training forwards since the last reset_stats()."""
        return self.recorder.read(running)

    def activation_bytes(self, T: int) -> int:
        """Bytes that a training forward of T tokens keeps for its backward, x among them, predicted from the sizes
        for the backend that runs; without autocast, which keeps its copies of the weights too."""
        if not isinstance(T, int) or T < 0:
            raise ValueError(f"T={T!r}: a whole number of tokens")
        shared_ffn_dim = self.shared_experts.gate_proj.out_features if self.shared_experts else 0
        rows, name = T * self.top_k, self.backend.name
        factor = self.capacity_factor if self.training else self.eval_capacity_factor
        by_entries = name == "kernels" and factor is not None
        if self.training and self.token_rounding is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that rounding is off at this T is said by the forward
                plan = self._plan(T)
            if plan.mode != "exact":
                rows, by_entries = plan.capacity, True
        return predict_kept_bytes(T, rows, self.hidden_dim, self.ffn_dim, self.num_experts, self.top_k,
                                  self.experts.down_proj.itemsize, name, self.gradient_checkpointing, shared_ffn_dim,
                                  by_entries)

    def reset_stats(self) -> None:
        """Forget the running statistics."""
        self.recorder.reset()


def demonstrate() -> None:
    """One training step and one evaluation of a small layer, and what it tells about itself."""
    on_gpu = torch.cuda.is_available()
    made = {"device": "cuda" if on_gpu else "cpu", "dtype": torch.bfloat16 if on_gpu else torch.float32}
    moe = OptimizedMoELayer.for_training(hidden_dim=256, ffn_dim=128, num_experts=16, top_k=4, **made)
    x = torch.randn(4, 256, 256, **made)
    output, aux_loss = moe(x, return_aux_loss=True)
    (output.float().square().mean() + aux_loss).backward()
    print(f"backend    {moe.backend.name}: {moe.backend.reason}")
    print(f"training   {tuple(x.shape)} -> {tuple(output.shape)}, aux_loss {aux_loss.item():.4f}, gradients in "
          f"{sum(p.grad is not None for p in moe.parameters())} of {len(list(moe.parameters()))} parameters")
    print(f"           {moe.stats()}")
    print(f"kept       {moe.activation_bytes(1024) / 2**20:.2f} MiB for backward of 1024 tokens")
    with torch.no_grad():
        print(f"evaluation {tuple(moe.eval()(x).shape)}, exact top-k, dropped {moe.stats().dropped}")


if __name__ == "__main__":
    demonstrate()
