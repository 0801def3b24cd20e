"""The experts: tokens, scores and expert ids in, each token's weighted sum out. Three ways to compute it.

loop      one expert after another, as eager model code does it: a nonzero, a gather, two products, an index_add
grouped   level 4 in a form that autograd follows: sort rows by expert, one grouped GEMM a projection, gather and sum
kernels   levels 8 and 9: gather, SwiGLU and scores inside the GEMM kernels, x and the pre-activations kept for backward

All three give the same sum, out[t] = sum over chosen e of score[t, e] * down_e (silu(gate_e x_t) * up_e x_t), and take
an id of E to mean a slot that was dropped: no row, no output, no gradient.

index array       shape     from -> to
expert_ids_TK     (T, K)    token, slot -> expert, E where the slot is dropped
slot_of_row_R     (R,)      sorted row -> t * K + k, the slot it came from; dropped slots last
row_of_slot_TK    (T, K)    token, slot -> sorted row, the inverse of slot_of_row_R
ends_E            (E,)      expert -> the end of its sorted rows
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import grouped_mm, linear, silu
from torch.utils.checkpoint import checkpoint

from common.level import Unsupported
from labs.kernels.backward import moe_experts, moe_experts_rounded, rounded_scores
from labs.kernels.choice import capability
from labs.kernels.rounding import Plan, Rounded, combine_rounded
from labs.moe_layer.admission import Admitted, round_choice

# T tokens, D model width, F expert width, E experts, K top-k, R = T*K rows.


class SlotRows(NamedTuple):
    """Rows sorted by expert, ties in token order, from K slots a token."""

    slot_of_row_R: torch.Tensor
    row_of_slot_TK: torch.Tensor
    ends_E: torch.Tensor
    unused_R1: torch.Tensor | None  # rows of dropped slots: grouped_mm leaves them unwritten, so they are put to zero

    @classmethod
    def of(cls, expert_ids_TK: torch.Tensor, E: int, may_drop: bool) -> SlotRows:
        """Sort the slots; an id of E is a dropped one. No host sync."""
        key = torch.int16 if E < 2**15 else torch.int32  # the radix sort passes over its keys once a byte
        sorted_ids_R, slot_of_row_R = expert_ids_TK.flatten().to(key).sort(stable=True)
        bounds_E = torch.arange(E, dtype=key, device=expert_ids_TK.device)
        ends_E = torch.searchsorted(sorted_ids_R, bounds_E, right=True, out_int32=True)
        rows_R = torch.arange(expert_ids_TK.numel(), device=expert_ids_TK.device)
        row_of_slot_TK = torch.empty_like(expert_ids_TK)
        row_of_slot_TK.view(-1).scatter_(0, slot_of_row_R, rows_R)
        return cls(slot_of_row_R, row_of_slot_TK, ends_E, (sorted_ids_R == E)[:, None] if may_drop else None)

    def take(self, values_TD: torch.Tensor) -> torch.Tensor:
        """Each row's token: (T, D) -> (R, D), zeros in unused rows."""
        values_RD = values_TD[self.slot_of_row_R // self.row_of_slot_TK.shape[1]]
        return values_RD if self.unused_R1 is None else values_RD.masked_fill_(self.unused_R1, 0)

    def add_up(self, values_RD: torch.Tensor, weight_R: torch.Tensor | None = None) -> torch.Tensor:
        """Each token's rows, weighted and summed in float32: (R, D) -> (T, D) in values' dtype. No atomics."""
        if self.unused_R1 is not None:
            values_RD = values_RD.masked_fill(self.unused_R1, 0)
        values_TKD = values_RD[self.row_of_slot_TK]
        if weight_R is not None:
            values_TKD = values_TKD * weight_R[self.row_of_slot_TK][:, :, None]
        return values_TKD.sum(dim=1).to(values_RD.dtype)


class RoundedRows(NamedTuple):
    """Rows sorted by expert as token rounding leaves them: any number a token. The same two operations as SlotRows;
    the arrays are those of labs/kernels/rounding.py."""

    offsets_E1: torch.Tensor
    token_of_row_C: torch.Tensor
    first_of_token_T1: torch.Tensor
    row_of_entry_C: torch.Tensor

    @classmethod
    def of(cls, rounded: Rounded) -> RoundedRows:
        """The index arrays of a rounded routing."""
        return cls(rounded.offsets_E1, rounded.token_of_row_C, rounded.first_of_token_T1, rounded.row_of_entry_C)

    @property
    def ends_E(self) -> torch.Tensor:
        return self.offsets_E1[1:]

    @property
    def unused_R1(self) -> torch.Tensor:
        return (torch.arange(len(self.token_of_row_C), device=self.offsets_E1.device) >= self.offsets_E1[-1])[:, None]

    def take(self, values_TD: torch.Tensor) -> torch.Tensor:
        """Each row's token: (T, D) -> (C, D), zeros in unused rows."""
        return values_TD[self.token_of_row_C].masked_fill_(self.unused_R1, 0)

    def add_up(self, values_CD: torch.Tensor, weight_C: torch.Tensor | None = None) -> torch.Tensor:
        """Each token's rows, weighted and summed in float32: (C, D) -> (T, D) in values' dtype. No atomics on a GPU;
        on a CPU index_add, which adds in order."""
        T, C = len(self.first_of_token_T1) - 1, len(self.token_of_row_C)
        if values_CD.is_cuda:
            if weight_C is None:
                weight_C = torch.ones(C, device=values_CD.device)
            score_of_entry_C = weight_C[self.row_of_entry_C.clamp(0, C - 1)]  # past the rows in use it is undefined
            rounded = Rounded(self.offsets_E1, *self, score_of_entry_C)  # its counts before rounding are not read
            plan = Plan(T, max(1, C // T), len(self.offsets_E1) - 1, "exact", 1, 1, C, False)
            return combine_rounded(values_CD.contiguous(), rounded, plan)
        terms_CD = values_CD.to(torch.promote_types(values_CD.dtype, torch.float32)).masked_fill(self.unused_R1, 0)
        if weight_C is not None:
            terms_CD = terms_CD * weight_C[:, None]
        out_TD = terms_CD.new_zeros(T, terms_CD.shape[1])
        return out_TD.index_add_(0, self.token_of_row_C, terms_CD).to(values_CD.dtype)


Rows = SlotRows | RoundedRows


class Gather(torch.autograd.Function):
    """x of each row. Its backward adds a token's rows up in a fixed order, where indexing's would scatter."""

    @staticmethod
    def forward(ctx, x_TD: torch.Tensor, rows: Rows) -> torch.Tensor:
        ctx.kind = type(rows)
        ctx.save_for_backward(*rows)
        return rows.take(x_TD)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_RD: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.kind(*ctx.saved_tensors).add_up(grad_RD), None


class Combine(torch.autograd.Function):
    """Each token's rows, weighted by score and summed; keeps y and the scores, no product of the two."""

    @staticmethod
    def forward(ctx, y_RD: torch.Tensor, score_R: torch.Tensor, rows: Rows) -> torch.Tensor:
        ctx.kind = type(rows)
        ctx.save_for_backward(y_RD, score_R, *rows)
        return rows.add_up(y_RD, score_R)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        y_RD, score_R, *arrays = ctx.saved_tensors
        rows = ctx.kind(*arrays)
        grad_RD = rows.take(grad_TD)
        grad_score_R = torch.linalg.vecdot(grad_RD.to(score_R.dtype), y_RD.to(score_R.dtype))
        if rows.unused_R1 is not None:
            grad_score_R = grad_score_R.masked_fill_(rows.unused_R1[:, 0], 0)  # 0 * NaN of an unwritten row
        return (grad_RD * score_R[:, None]).to(y_RD.dtype), grad_score_R, None


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


def grouped(x_TD: torch.Tensor, gate_up_E2FD: torch.Tensor, down_EDF: torch.Tensor, scores_R: torch.Tensor,
            rows: Rows) -> torch.Tensor:
    """The experts by grouped GEMMs: (T, D) -> (T, D). scores_R (R,) float32 weighs each row."""
    if x_TD.shape[0] == 0:  # still a function of all weights, for whoever waits for their gradients
        return x_TD + 0.0 * (gate_up_E2FD.sum() + down_EDF.sum() + scores_R.sum()).to(x_TD.dtype)
    x_RD = Gather.apply(x_TD, rows)
    gate_RF, up_RF = grouped_linear(x_RD, gate_up_E2FD, rows.ends_E).chunk(2, dim=1)
    y_RD = grouped_linear(silu(gate_RF) * up_RF, down_EDF, rows.ends_E)
    return Combine.apply(y_RD, scores_R, rows)


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


def run_grouped(x_TD: torch.Tensor, gate_up_E2FD: torch.Tensor, down_EDF: torch.Tensor, rows_in: Admitted
                ) -> torch.Tensor:
    """The admitted rows by grouped GEMMs: (T, D) -> (T, D)."""
    if rows_in.rounded is None:
        rows = SlotRows.of(rows_in.expert_ids_TK, gate_up_E2FD.shape[0], rows_in.may_drop)
        scores_R = rows_in.scores_TK.flatten()[rows.slot_of_row_R]
    else:
        rows = RoundedRows.of(rows_in.rounded)
        by_row = rows_in.rounded._replace(row_of_entry_C=torch.arange(rows_in.plan.capacity, device=x_TD.device))
        scores_R = rounded_scores(rows_in.probs_TE, by_row, rows_in.plan) * rows_in.score_scale
    return grouped(x_TD, gate_up_E2FD, down_EDF, scores_R, rows)


def run_kernels(x_TD: torch.Tensor, gate_up_E2FD: torch.Tensor, down_EDF: torch.Tensor, rows_in: Admitted
                ) -> torch.Tensor:
    """The admitted rows by the kernels of level 9: (T, D) -> (T, D)."""
    rounded, plan, probs_TE = rows_in.rounded, rows_in.plan, rows_in.probs_TE
    if rounded is None and not rows_in.may_drop:
        return moe_experts(x_TD, gate_up_E2FD, down_EDF, rows_in.scores_TK, rows_in.expert_ids_TK)
    if rounded is None:  # as a routing rounded to tiles of one row, whose entries know no dropped slot
        (T, K), E = rows_in.expert_ids_TK.shape, gate_up_E2FD.shape[0]
        plan = Plan(T, K, E, "exact", tile=1, unit=1, capacity=T * K, renormalize=False)
        probs_TE = rows_in.scores_TK.new_zeros(T, E + 1).scatter(1, rows_in.expert_ids_TK, rows_in.scores_TK)[:, :E]
        rounded = round_choice(probs_TE, rows_in.expert_ids_TK, plan)
    score_of_entry_C = rounded_scores(probs_TE, rounded, plan) * rows_in.score_scale
    return moe_experts_rounded(x_TD, gate_up_E2FD, down_EDF, score_of_entry_C, rounded, plan)


def run_loop(x_TD: torch.Tensor, gate_up_E2FD: torch.Tensor, down_EDF: torch.Tensor, rows_in: Admitted
             ) -> torch.Tensor:
    """The admitted rows, one expert after another. Raises ValueError for a rounded routing: it goes by slots."""
    if rows_in.rounded is not None:
        raise ValueError("token_rounding is for backend='grouped' or 'kernels': the loop goes by top-k slots")
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
        return Backend("kernels", "asked for by name" if wanted == "kernels" else "use_io_overlap, and they run here")
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
    again. Under autocast x and weights are cast to its dtype."""
    dtype = autocast_dtype(x_TD.device)

    def run(x_TD, gate_up_E2FD, down_EDF, admitted):
        if dtype is not None:
            x_TD, gate_up_E2FD, down_EDF = (tensor.to(dtype) for tensor in (x_TD, gate_up_E2FD, down_EDF))
        with torch.autocast(x_TD.device.type, enabled=False):
            return BACKENDS[backend](x_TD, gate_up_E2FD, down_EDF, admitted)

    if recompute and torch.is_grad_enabled():
        return checkpoint(run, x_TD, gate_up_E2FD, down_EDF, admitted, use_reentrant=False)
    return run(x_TD, gate_up_E2FD, down_EDF, admitted)


class Experts(nn.Module):
    """The experts' weights, named and shaped as Hugging Face transformers v5 has them: gate_up_proj (E, 2F, D), gate
    rows and then up rows; down_proj (E, D, F)."""

    def __init__(self, hidden_dim: int, ffn_dim: int, num_experts: int, device: torch.device | str | None = None,
                 dtype: torch.dtype | None = None):
        super().__init__()
        made = {"device": device, "dtype": dtype}
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * ffn_dim, hidden_dim, **made))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_dim, ffn_dim, **made))
        nn.init.normal_(self.gate_up_proj, std=hidden_dim**-0.5)
        nn.init.normal_(self.down_proj, std=ffn_dim**-0.5)

    def forward(self, x_TD: torch.Tensor, admitted: Admitted, backend: str, recompute: bool = False) -> torch.Tensor:
        """(T, D) -> (T, D), as compute_experts has it."""
        return compute_experts(x_TD, self.gate_up_proj, self.down_proj, admitted, backend, recompute)
