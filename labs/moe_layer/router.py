"""The router: logits to scores and a choice of experts, with what the published MoE models vary.

    logits (T, E) float32  ->  probs over all experts  ->  the K chosen  ->  their scores

scoring        probs                 scores of the chosen            who
softmax_topk   softmax over all      their probs                     Mixtral, Qwen3-MoE, OLMoE
topk_softmax   softmax over all      softmax over their logits       gpt-oss, Mixtral's first release
sigmoid        sigmoid of each       their probs                     DeepSeek-V3 (arXiv 2412.19437)

`renormalize` divides the chosen scores by their sum. Grouped top-k (DeepSeek-V3) first keeps the `top_groups` groups
whose two best experts are best together. A bias, where there is one, takes part in the choice and not in the scores
(loss-free balancing, arXiv 2408.15664).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from labs.moe_layer.arguments import check_flag, check_number, check_whole

# T tokens, D model width, E experts, K top-k, G groups of experts.

SCORINGS = ("softmax_topk", "topk_softmax", "sigmoid")


class Choice(NamedTuple):
    """What the router says of T tokens; all float32 (float64 for float64 tokens) but the int64 ids.

    logits_TE are before temperature and noise; probs_TE score every expert; scores_TK weigh the chosen ones.
    """

    logits_TE: torch.Tensor
    probs_TE: torch.Tensor
    scores_TK: torch.Tensor
    expert_ids_TK: torch.Tensor


class RouterLogits(torch.autograd.Function):
    """x_TD @ weight_ED.T with a float32 result, keeping x as it came: a float32 copy of x kept for backward would
    cost more than the rest of the router together. Logits rounded to bfloat16 would pick other experts on near ties."""

    @staticmethod
    def forward(ctx, x_TD: torch.Tensor, weight_ED: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x_TD, weight_ED)
        if x_TD.is_cuda and x_TD.dtype == weight_ED.dtype and x_TD.dtype in (torch.bfloat16, torch.float16):
            return torch.mm(x_TD, weight_ED.T, out_dtype=torch.float32)
        exact = torch.promote_types(torch.promote_types(x_TD.dtype, weight_ED.dtype), torch.float32)
        return x_TD.to(exact) @ weight_ED.T.to(exact)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_TE: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        x_TD, weight_ED = ctx.saved_tensors
        need_x, need_weight = ctx.needs_input_grad
        grad_x = grad_weight = None
        if x_TD.is_cuda and x_TD.dtype == weight_ED.dtype == torch.bfloat16:
            # The gradient as a sum of two bfloat16 parts, 16 of its 24 bits, on tensor cores: float32
            # products take many times as long, and a float32 copy of x.
            high_TE = grad_TE.bfloat16()
            parts_T2E = torch.cat((high_TE, (grad_TE - high_TE).bfloat16()), dim=1)
            grad_x = parts_T2E @ torch.cat((weight_ED, weight_ED)) if need_x else None
            if need_weight:
                grad_parts_2ED = torch.mm(parts_T2E.T, x_TD, out_dtype=torch.float32).unflatten(0, (2, -1))
                grad_weight = grad_parts_2ED.sum(dim=0).bfloat16()
            return grad_x, grad_weight
        if need_x:
            grad_x = (grad_TE @ weight_ED.to(grad_TE.dtype)).to(x_TD.dtype)
        if need_weight:
            grad_weight = (grad_TE.T @ x_TD.to(grad_TE.dtype)).to(weight_ED.dtype)
        return grad_x, grad_weight


class Router(nn.Module):
    """Scores and chooses experts. Parameter `weight` (E, D); buffer `e_score_correction_bias` (E,) float32 if
    `with_bias`, both under the names that Hugging Face transformers gives them.

    temperature divides the logits; noise_std is the standard deviation of normal noise on the logits, in training
    only; score_scale multiplies the scores (DeepSeek-V3's routed_scaling_factor). Raises ValueError, naming the
    argument, for what cannot be.
    """

    def __init__(self, hidden_dim: int, num_experts: int, top_k: int, scoring: str = "softmax_topk",
                 renormalize: bool = True, temperature: float = 1.0, noise_std: float = 0.0, num_groups: int = 1,
                 top_groups: int | None = None, score_scale: float = 1.0, with_bias: bool = False,
                 device: torch.device | str | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        top_groups = num_groups if top_groups is None else top_groups
        if scoring not in SCORINGS:
            raise ValueError(f"scoring={scoring!r} is unknown: choose one of {', '.join(SCORINGS)}")
        check_number(above_zero=True, temperature=temperature, score_scale=score_scale)
        check_number(noise_std=noise_std)
        check_flag(renormalize=renormalize)
        check_whole(num_groups=num_groups, top_groups=top_groups)
        if num_experts % num_groups:
            raise ValueError(f"num_groups={num_groups} must divide num_experts={num_experts}")
        if top_groups > num_groups:
            raise ValueError(f"top_groups={top_groups}: between 1 and num_groups={num_groups}")
        if top_k > top_groups * (num_experts // num_groups):
            raise ValueError(f"top_k={top_k} is more than the {top_groups * (num_experts // num_groups)} experts of "
                             f"top_groups={top_groups} groups")
        if num_groups > top_groups and num_experts // num_groups < 2:
            raise ValueError(f"num_groups={num_groups}: a group is judged by its two best experts, so it needs two")
        self.top_k, self.num_experts, self.scoring, self.renormalize = top_k, num_experts, scoring, renormalize
        self.temperature, self.noise_std, self.score_scale = temperature, noise_std, score_scale
        self.num_groups, self.top_groups = num_groups, top_groups
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_dim, device=device, dtype=dtype))
        bias_E = torch.zeros(num_experts, device=device, dtype=torch.float32) if with_bias else None
        self.register_buffer("e_score_correction_bias", bias_E)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight anew, and set the bias to zero."""
        nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)
        if self.e_score_correction_bias is not None:
            nn.init.zeros_(self.e_score_correction_bias)

    def _apply(self, fn: Callable, recurse: bool = True) -> Router:
        """As of every module (`.to`, `.bfloat16`), but the bias stays float32: its steps are lost in less."""
        super()._apply(fn, recurse)
        if self.e_score_correction_bias is not None:
            self.e_score_correction_bias = self.e_score_correction_bias.float()
        return self

    def forward(self, x_TD: torch.Tensor) -> Choice:
        """x_TD (T, D), T >= 0 -> Choice, best expert first."""
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = RouterLogits.apply(x_TD, self.weight)
            used_TE = logits_TE if self.temperature == 1.0 else logits_TE / self.temperature
            if self.training and self.noise_std > 0:
                used_TE = used_TE + self.noise_std * torch.randn_like(used_TE)
            probs_TE = used_TE.sigmoid() if self.scoring == "sigmoid" else used_TE.softmax(dim=1)
            expert_ids_TK = self._choose(probs_TE.detach())
            if self.scoring == "topk_softmax":
                scores_TK = used_TE.gather(1, expert_ids_TK).softmax(dim=1)
            else:
                scores_TK = probs_TE.gather(1, expert_ids_TK)
            if self.renormalize:
                # Sigmoids may all underflow; 1e-20 is DeepSeek-V3's guard and changes nothing else.
                scores_TK = scores_TK / (scores_TK.sum(dim=1, keepdim=True) + 1e-20)
            if self.score_scale != 1.0:
                scores_TK = scores_TK * self.score_scale
        return Choice(logits_TE, probs_TE, scores_TK, expert_ids_TK)

    @property
    def is_plain(self) -> bool:
        """Whether evaluation is softmax and top-k and nothing else."""
        return (self.scoring != "sigmoid" and self.temperature == 1.0 and self.score_scale == 1.0
                and self.top_groups == self.num_groups and self.e_score_correction_bias is None)

    def _choose(self, probs_TE: torch.Tensor) -> torch.Tensor:
        """(T, K) int64: the K best by prob plus bias, from the best groups."""
        merit_TE = probs_TE
        if self.e_score_correction_bias is not None:
            merit_TE = merit_TE + self.e_score_correction_bias
        if self.top_groups < self.num_groups:
            merit_TGe = merit_TE.unflatten(1, (self.num_groups, -1))
            group_merit_TG = merit_TGe.topk(2, dim=2).values.sum(dim=2)
            best_Tg = group_merit_TG.topk(self.top_groups, dim=1).indices
            out_TG = torch.ones_like(group_merit_TG, dtype=torch.bool).scatter(1, best_Tg, False)
            merit_TE = merit_TGe.masked_fill(out_TG[:, :, None], -torch.inf).flatten(1)
        return merit_TE.topk(self.top_k, dim=1).indices

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, top_k={self.top_k}, scoring={self.scoring}"
