"""What every level is given and held to: weights, inputs, and the float64 oracle."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from common.config import MoEConfig, Workload, dtype_name


@dataclass(frozen=True)
class Weights:
    """One layer's weights in the layout of Hugging Face transformers v5 experts.

    router_ED (E, D); gate_up_E2FD (E, 2F, D), an expert's F gate rows and then its F up rows;
    down_EDF (E, D, F). One dtype and one device, which `check` holds them to.
    """

    router_ED: torch.Tensor
    gate_up_E2FD: torch.Tensor
    down_EDF: torch.Tensor

    def check(self, cfg: MoEConfig) -> None:
        """Raise ValueError, naming the tensor and both shapes, unless the weights fit `cfg`."""
        expected = {
            "router_ED": (cfg.E, cfg.D),
            "gate_up_E2FD": (cfg.E, 2 * cfg.F, cfg.D),
            "down_EDF": (cfg.E, cfg.D, cfg.F),
        }
        for name, shape in expected.items():
            tensor = getattr(self, name)
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, but the config "
                                 f"D={cfg.D} F={cfg.F} E={cfg.E} needs {shape}")
            if tensor.dtype != self.router_ED.dtype or tensor.device != self.router_ED.device:
                raise ValueError(f"{name} is {dtype_name(tensor.dtype)} on {tensor.device}, but router_ED is "
                                 f"{dtype_name(self.router_ED.dtype)} on {self.router_ED.device}")

    @property
    def dtype(self) -> torch.dtype:
        return self.router_ED.dtype

    @property
    def device(self) -> torch.device:
        return self.router_ED.device


def make_weights(cfg: MoEConfig, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> Weights:
    """Random weights, scaled so that for unit-scale x every intermediate is of unit scale too.

    A matrix that sums over n inputs is drawn with standard deviation n**-0.5. At any other scale
    an error bound tests little: activations of 1e-5 hide a broken tile behind any tolerance.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        out = torch.empty(shape, dtype=dtype, device=device)
        # One leading slice at a time: a float32 copy of all experts would not fit beside them.
        for part in out if out.dim() == 3 else [out]:
            part.copy_(torch.randn(part.shape, generator=generator, device=device) * shape[-1] ** -0.5)
        return out

    return Weights(draw(cfg.E, cfg.D), draw(cfg.E, 2 * cfg.F, cfg.D), draw(cfg.E, cfg.D, cfg.F))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was no room: a GPU raises torch.OutOfMemoryError, a CPU a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


@contextmanager
def must_fit(what: str, cfg: MoEConfig, T: int, dtype: torch.dtype) -> Iterator[None]:
    """Where memory runs out inside, raise ValueError that `what` at T tokens does not fit, and how large its weights
    and tokens are."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        weights_gib = 3 * cfg.E * cfg.F * cfg.D * dtype.itemsize / 2**30
        tokens_gib = T * cfg.D * dtype.itemsize / 2**30
        raise ValueError(f"{what} at {T} tokens does not fit this machine: its weights are {weights_gib:.1f} GiB and "
                         f"its tokens {tokens_gib:.1f}, and the float64 oracle needs several times as much beside "
                         "them") from error


def make_inputs(workload: Workload, weights: Weights) -> torch.Tensor:
    """Unit-scale tokens x_TD (T, D) whose routing by `weights.router_ED` follows the workload's mode.

    natural  what random tokens give: nearly balanced.
    uniform  every expert gets T*K/E rows, give or take one.
    skewed   expert popularity falls as 1/rank (Zipf), ranks dealt out at random.
    one_hot  every token picks the same K experts; at K=1, one expert has all rows.
    sparse   a quarter of the experts (at least K) share all rows, the others get none.

    A forced mode writes the wanted logits into x: with router rows W, adding
    (logits - x W^T) (W W^T)^-1 W to x makes its logits exactly those. The chosen experts' logits
    are some units above all others, so rounding x to its dtype does not change the choice.
    """
    cfg, T, device = workload.config, workload.T, weights.device
    generator = torch.Generator(device).manual_seed(workload.seed + 1)
    x_TD = torch.randn(T, cfg.D, generator=generator, device=device)
    if workload.routing == "natural":
        return x_TD.to(workload.dtype)

    chosen_TE = torch.zeros(T, cfg.E, device=device)
    chosen_TE.scatter_(1, _choose_experts(workload, generator, device), 4.0)
    noise_TE = torch.randn(T, cfg.E, generator=generator, device=device).clamp(-1.5, 1.5) * 0.5
    logits_TE = chosen_TE + noise_TE
    router_ED = weights.router_ED.float()
    correction_TE = torch.linalg.solve(router_ED @ router_ED.T, (logits_TE - x_TD @ router_ED.T).T).T
    return (x_TD + correction_TE @ router_ED).to(workload.dtype)


def _choose_experts(workload: Workload, generator: torch.Generator, device: torch.device) -> torch.Tensor:
    """(T, K) int64: K different experts a token, drawn as the routing mode says."""
    cfg, T = workload.config, workload.T
    order_E = torch.randperm(cfg.E, generator=generator, device=device)
    if workload.routing == "uniform":
        slots_TK = torch.arange(T * cfg.K, device=device).view(T, cfg.K) % cfg.E
        return order_E[slots_TK]
    if workload.routing == "one_hot":
        return order_E[: cfg.K].expand(T, cfg.K)
    popularity_E = torch.ones(cfg.E, device=device)
    if workload.routing == "skewed":
        popularity_E /= torch.arange(1, cfg.E + 1, device=device)
    else:
        popularity_E[max(cfg.K, cfg.E // 4):] = 0
    # Gumbel noise on log-popularity, then top-k: K draws without replacement.
    uniform_TE = torch.rand(T, cfg.E, generator=generator, device=device).clamp_min(1e-20)
    keys_TE = popularity_E.log() - (-uniform_TE.log()).log()
    return order_E[keys_TE.topk(cfg.K, dim=1).indices]


@dataclass(frozen=True)
class Oracle:
    """The float64 answer. out_TD (T, D) float64; rows_E (E,) int64 rows an expert got; margin_T
    (T,) float64, how far the last chosen logit is above the first not chosen (inf at K = E)."""

    out_TD: torch.Tensor
    rows_E: torch.Tensor
    margin_T: torch.Tensor


def route_float64(cfg: MoEConfig, router_ED: torch.Tensor, x_TD: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The router's definition, in float64: scores_TK, expert_ids_TK (best first), margin_T."""
    logits_TE = x_TD.double() @ router_ED.double().T
    top_logits_TK, expert_ids_TK = logits_TE.topk(cfg.K, dim=1)
    if cfg.scoring == "softmax_topk":
        scores_TK = logits_TE.softmax(dim=1).gather(1, expert_ids_TK)
    else:
        scores_TK = top_logits_TK.softmax(dim=1)
    if cfg.renormalize:
        scores_TK = scores_TK / scores_TK.sum(dim=1, keepdim=True)
    rest_TE = logits_TE.scatter(1, expert_ids_TK, -torch.inf)
    margin_T = top_logits_TK[:, -1] - rest_TE.amax(dim=1)
    return scores_TK, expert_ids_TK, margin_T


def oracle(cfg: MoEConfig, weights: Weights, x_TD: torch.Tensor) -> Oracle:
    """The layer in float64, one expert at a time, from the same rounded weights and inputs.

        out[t] = sum over chosen e of score[t, e] * down_e (silu(gate_e x_t) * up_e x_t)

    x_TD (T, D), any dtype. This is the definition that all levels are compared with; nothing here
    is meant to be fast.
    """
    scores_TK, expert_ids_TK, margin_T = route_float64(cfg, weights.router_ED, x_TD)
    out_TD = torch.zeros(x_TD.shape, dtype=torch.float64, device=x_TD.device)
    for e in range(cfg.E):
        token, slot = (expert_ids_TK == e).nonzero(as_tuple=True)
        if token.numel() == 0:
            continue
        gate, up = (x_TD[token].double() @ weights.gate_up_E2FD[e].double().T).chunk(2, dim=1)
        y = (torch.nn.functional.silu(gate) * up) @ weights.down_EDF[e].double().T
        out_TD.index_add_(0, token, y * scores_TK[token, slot, None])
    rows_E = torch.bincount(expert_ids_TK.flatten(), minlength=cfg.E)
    return Oracle(out_TD, rows_E, margin_T)
