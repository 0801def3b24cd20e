"""The experts: tokens, scores and expert ids in, each token's weighted sum out. Three ways to compute it.

loop      one expert after another, as eager model code does it: a nonzero, a gather, two products, an index_add
grouped   level 4 in a form that autograd follows: sort rows by expert, one grouped GEMM a projection, gather and sum
kernels   levels 8 and 9: gather, SwiGLU and scores inside the GEMM kernels, x and the pre-activations kept for backward

All three give the same sum, out[t] = sum over chosen e of score[t, e] * down_e (silu(gate_e x_t) * up_e x_t), and take
an id of E to mean a slot that was dropped: no row, no output, no gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import grouped_mm, linear, silu
from torch.utils.checkpoint import checkpoint

from common.config import dtype_name
from common.level import Unsupported
from labs.kernels.backward import MainGrads, moe_experts_rounded, moe_experts_sorted, rounded_scores
from labs.kernels.choice import capability
from labs.kernels.rounding import Plan
from labs.moe_layer.admission import Admitted, round_choice
from labs.moe_layer.rows import Combine, Gather, RoundedRows, Rows

# T tokens, D model width, F expert width, E experts, K top-k, R = T*K rows.


def why_not_grouped_mm(dtype: torch.dtype, device: torch.device, D: int, F: int) -> str:
    """What keeps torch.nn.functional.grouped_mm from these tensors; empty if nothing does."""
    taken = (torch.bfloat16, torch.float32) if device.type == "cuda" else (torch.bfloat16, torch.float32, torch.float16)
    if dtype not in taken:
        return f"grouped_mm takes no {dtype} on {device.type}"
    if D * dtype.itemsize % 16 or F * dtype.itemsize % 16:
        return f"grouped_mm wants rows in multiples of 16 bytes, D={D} and F={F} are not"
    return ""


def grouped_linear(x_RD: torch.Tensor, weight_END: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """Rows sorted by expert times their expert's weight: (R, D), (E, N, D) -> (R, N). Rows past the last end are
    not written. Where grouped_mm does not apply, one product an expert, after one host sync for the ends."""
    _, N, D = weight_END.shape
    if not why_not_grouped_mm(x_RD.dtype, x_RD.device, D, N):
        return grouped_mm(x_RD, weight_END.transpose(1, 2), offs=ends_E)
    ends = ends_E.tolist()
    sizes = [end - start for start, end in zip([0, *ends], ends)]  # noqa: B905 (the last end starts nothing)
    parts = x_RD.split([*sizes, x_RD.shape[0] - ends[-1]])
    products = [part @ weight_ND.T for part, weight_ND in zip(parts[:-1], weight_END.unbind(0), strict=True)]
    return torch.cat([*products, x_RD.new_zeros(parts[-1].shape[0], N)])


def grouped(x_TD: torch.Tensor, gate_up_E2FD: torch.Tensor, down_EDF: torch.Tensor, scores: torch.Tensor,
            rows: Rows) -> torch.Tensor:
    """The experts by grouped GEMMs: (T, D) -> (T, D). scores float32, by slot or by row, as the rows have them."""
    if x_TD.shape[0] == 0:  # still a function of all weights, for whoever waits for their gradients
        return x_TD + 0.0 * (gate_up_E2FD.sum() + down_EDF.sum() + scores.sum()).to(x_TD.dtype)
    x_RD = Gather.apply(x_TD, rows)
    gate_RF, up_RF = grouped_linear(x_RD, gate_up_E2FD, rows.ends_E).chunk(2, dim=1)
    y_RD = grouped_linear(silu(gate_RF) * up_RF, down_EDF, rows.ends_E)
    return Combine.apply(y_RD, scores, rows)


def loop(x_TD: torch.Tensor, gate_up_E2FD: torch.Tensor, down_EDF: torch.Tensor, scores_TK: torch.Tensor,
         expert_ids_TK: torch.Tensor) -> torch.Tensor:
    """The experts one after another, as eager model code computes them: (T, D) -> (T, D). A host sync an expert,
    and float atomics on a GPU: the baseline."""
    out_TD = torch.zeros_like(x_TD)
    for e, (gate_up_2FD, down_DF) in enumerate(zip(gate_up_E2FD.unbind(0), down_EDF.unbind(0), strict=True)):
        token, slot = (expert_ids_TK == e).nonzero(as_tuple=True)
        gate, up = linear(x_TD[token], gate_up_2FD).chunk(2, dim=1)
        y = linear(silu(gate) * up, down_DF) * scores_TK[token, slot, None]
        out_TD = out_TD.index_add(0, token, y.to(out_TD.dtype))
    return out_TD


def main_grads_of(gate_up_E2FD: torch.Tensor, down_EDF: torch.Tensor) -> MainGrads | None:
    """The weights' `main_grad`s, to which a backward then adds their gradients, leaving `grad` as it is; None where
    neither has one. Raises ValueError where one has and the other not, and unless they are float32 in the weights'
    shapes, on their device."""
    weights = {"gate_up_proj": gate_up_E2FD, "down_proj": down_EDF}
    found = {name: getattr(weight, "main_grad", None) for name, weight in weights.items()}
    if all(grad is None for grad in found.values()):
        return None
    for name, grad in found.items():
        weight = weights[name]
        if grad is None:
            raise ValueError(f"{name}.main_grad is missing, the other weight has one: give both or neither")
        if grad.dtype != torch.float32 or grad.shape != weight.shape or grad.device != weight.device:
            raise ValueError(f"{name}.main_grad is {dtype_name(grad.dtype)} {tuple(grad.shape)} on {grad.device}, but "
                             f"needs float32 {tuple(weight.shape)} on {weight.device}")
    return tuple(found.values())


class IntoMainGrad(torch.autograd.Function):
    """A weight as it is, whose gradient is added to its main grad and goes no further. Kernels add it themselves."""

    @staticmethod
    def forward(ctx, weight: torch.Tensor, main_grad: torch.Tensor) -> torch.Tensor:
        ctx.main_grad = main_grad  # not saved: another micro-batch may add to it before this backward runs
        return weight.view_as(weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple[None, None]:
        ctx.main_grad.add_(grad)
        return None, None


@torch.compiler.disable  # compiled, grouped_mm takes bfloat16 alone: a graph break instead
def run_grouped(x_TD: torch.Tensor, gate_up_E2FD: torch.Tensor, down_EDF: torch.Tensor, rows_in: Admitted,
                main_grads: MainGrads | None = None) -> torch.Tensor:
    """The admitted rows by grouped GEMMs: (T, D) -> (T, D)."""
    if main_grads is not None:
        gate_up_E2FD, down_EDF = map(IntoMainGrad.apply, (gate_up_E2FD, down_EDF), main_grads)
    if rows_in.rounded is None:
        rows, scores = rows_in.slots, rows_in.scores_TK
    else:
        rows = RoundedRows.of(rows_in.rounded)
        by_row = rows_in.rounded._replace(row_of_entry_C=torch.arange(rows_in.plan.capacity, device=x_TD.device))
        scores = rounded_scores(rows_in.probs_TE, by_row, rows_in.plan) * rows_in.score_scale
    return grouped(x_TD, gate_up_E2FD, down_EDF, scores, rows)


def run_kernels(x_TD: torch.Tensor, gate_up_E2FD: torch.Tensor, down_EDF: torch.Tensor, rows_in: Admitted,
                main_grads: MainGrads | None = None) -> torch.Tensor:
    """The admitted rows by the kernels of level 9: (T, D) -> (T, D)."""
    rounded, plan, probs_TE = rows_in.rounded, rows_in.plan, rows_in.probs_TE
    if rounded is None and rows_in.slots.unused_R1 is None:
        offsets_E1, token_of_row_R, row_of_slot_TK, _ = rows_in.slots
        return moe_experts_sorted(x_TD, gate_up_E2FD, down_EDF, rows_in.scores_TK, offsets_E1, token_of_row_R,
                                  row_of_slot_TK, main_grads)
    if rounded is None:  # as a routing rounded to tiles of one row, whose entries know no dropped slot
        (T, K), E = rows_in.expert_ids_TK.shape, gate_up_E2FD.shape[0]
        plan = Plan(T, K, E, "exact", tile=1, unit=1, capacity=T * K, renormalize=False)
        probs_TE = rows_in.scores_TK.new_zeros(T, E + 1).scatter(1, rows_in.expert_ids_TK, rows_in.scores_TK)[:, :E]
        rounded = round_choice(probs_TE, rows_in.expert_ids_TK, plan)
    score_of_entry_C = rounded_scores(probs_TE, rounded, plan) * rows_in.score_scale
    return moe_experts_rounded(x_TD, gate_up_E2FD, down_EDF, score_of_entry_C, rounded, plan, main_grads)


@torch.compiler.disable  # its row counts are known on the host only
def run_loop(x_TD: torch.Tensor, gate_up_E2FD: torch.Tensor, down_EDF: torch.Tensor, rows_in: Admitted,
             main_grads: MainGrads | None = None) -> torch.Tensor:
    """The admitted rows, one expert after another. Raises ValueError for a rounded routing: it goes by slots."""
    if rows_in.rounded is not None:
        raise ValueError("token_rounding is for backend='grouped' or 'kernels': the loop goes by top-k slots")
    if main_grads is not None:
        gate_up_E2FD, down_EDF = map(IntoMainGrad.apply, (gate_up_E2FD, down_EDF), main_grads)
    return loop(x_TD, gate_up_E2FD, down_EDF, rows_in.scores_TK, rows_in.expert_ids_TK)


BACKENDS = {"loop": run_loop, "grouped": run_grouped, "kernels": run_kernels}


def why_not_kernels(device: torch.device, dtype: torch.dtype, D: int, F: int, E: int) -> str:
    """What keeps the kernels from running here; empty if nothing does."""
    if device.type != "cuda":
        return "the kernels need a GPU"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"the kernels take bfloat16 and float16, not {dtype}"
    if D % 8 or F % 8 or E > 512:
        return f"the kernels need D and F in multiples of 8 and at most 512 experts, not D={D} F={F} E={E}"
    try:
        capability(device)
    except Unsupported as error:
        return str(error)
    return ""


class Backend(NamedTuple):
    """The path that runs, and why it."""

    name: str
    reason: str


def choose_backend(wanted: str, use_io_overlap: bool, device: torch.device, dtype: torch.dtype, D: int, F: int, E: int
                   ) -> Backend:
    """What `wanted` means on this device. 'auto' is the kernels where use_io_overlap asks for them and they run, else
    grouped. Raises Unsupported if a backend is asked for by name that does not run here."""
    missing = why_not_kernels(device, dtype, D, F, E)
    if wanted == "kernels" and missing:
        raise Unsupported(f"backend='kernels': {missing}; backend='auto' takes what there is")
    if wanted == "kernels" or (wanted == "auto" and use_io_overlap and not missing):
        why = "asked for by name" if wanted == "kernels" else "use_io_overlap, and they run here"
        return Backend("kernels", f"{why}: level 9's, or level 8's in a graph for inference")
    if wanted == "loop":
        return Backend("loop", "asked for by name: the baseline, slow on purpose")
    how = why_not_grouped_mm(dtype, device, D, F)
    how = f"one product an expert, since {how}" if how else "torch.nn.functional.grouped_mm"
    if wanted == "grouped":
        return Backend("grouped", f"asked for by name; {how}")
    return Backend("grouped", f"{missing if use_io_overlap else 'use_io_overlap is off'}; {how}")


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast wants on this device; None where it is off."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def compute_experts(x_TD: torch.Tensor, gate_up_E2FD: torch.Tensor, down_EDF: torch.Tensor, admitted: Admitted,
                    backend: str, recompute: bool = False) -> torch.Tensor:
    """(T, D) -> (T, D) by BACKENDS[backend]. `recompute` keeps x, scores and ids for backward and computes the rest
    again. Under autocast x and weights are cast to its dtype. Weights with a `main_grad` have their gradients there,
    see main_grads_of."""
    dtype, main_grads = autocast_dtype(x_TD.device), main_grads_of(gate_up_E2FD, down_EDF)

    def run(x_TD, gate_up_E2FD, down_EDF, admitted):
        if dtype is not None:
            x_TD, gate_up_E2FD, down_EDF = (tensor.to(dtype) for tensor in (x_TD, gate_up_E2FD, down_EDF))
        with torch.autocast(x_TD.device.type, enabled=False):
            return BACKENDS[backend](x_TD, gate_up_E2FD, down_EDF, admitted, main_grads)

    if recompute and torch.is_grad_enabled():
        return checkpoint(run, x_TD, gate_up_E2FD, down_EDF, admitted, use_reentrant=False)
    return run(x_TD, gate_up_E2FD, down_EDF, admitted)


class Sealed:
    """Admitted rows on their way into a module's forward. FSDP2's MixedPrecisionPolicy casts every float tensor that it
    finds in the arguments, in tuples and dataclasses too: here it does not find the scores, which stay float32."""

    def __init__(self, admitted: Admitted):
        self.admitted = admitted


class Experts(nn.Module):
    """The experts' weights, named and shaped as Hugging Face transformers v5 has them: gate_up_proj (E, 2F, D), gate
    rows and then up rows; down_proj (E, D, F)."""

    def __init__(self, hidden_dim: int, ffn_dim: int, num_experts: int, device: torch.device | str | None = None,
                 dtype: torch.dtype | None = None):
        super().__init__()
        made = {"device": device, "dtype": dtype}
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * ffn_dim, hidden_dim, **made))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_dim, ffn_dim, **made))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew, so that unit inputs give activations of unit scale."""
        for weight in (self.gate_up_proj, self.down_proj):
            nn.init.normal_(weight, std=weight.shape[2] ** -0.5)

    def backend(self, wanted: str, use_io_overlap: bool) -> Backend:
        """What choose_backend says of the device and the dtype that the weights have now."""
        (E, D, F), device = self.down_proj.shape, self.down_proj.device
        return choose_backend(wanted, use_io_overlap, device, autocast_dtype(device) or self.down_proj.dtype, D, F, E)

    def forward(self, x_TD: torch.Tensor, sealed: Sealed, wanted: str = "auto", use_io_overlap: bool = True,
                recompute: bool = False) -> torch.Tensor:
        """(T, D) -> (T, D), as compute_experts has it. Dtypes are looked at here and not by the caller: under FSDP2 the
        weights have theirs from here on. Raises ValueError for an x of another dtype outside of autocast."""
        dtype = self.down_proj.dtype
        if x_TD.dtype != dtype and autocast_dtype(x_TD.device) is None:
            raise ValueError(f"x is {dtype_name(x_TD.dtype)}, the layer {dtype_name(dtype)}: convert one, or use "
                             "torch.autocast")
        return compute_experts(x_TD, self.gate_up_proj, self.down_proj, sealed.admitted,
                               self.backend(wanted, use_io_overlap).name, recompute)
