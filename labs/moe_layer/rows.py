"""Rows sorted by expert, and the two operations on them that autograd must follow: gather, and weigh and add up.

index array        shape      from -> to
expert_ids_TK      (T, K)     token, slot -> expert, E where the slot is dropped
offsets_E1         (E + 1,)   expert -> its first row; the last entry is the rows in use
token_of_row_R     (R,)       row -> token; rows of dropped slots last
row_of_slot_TK     (T, K)     token, slot -> row
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from labs.kernels.backward import sort_rows
from labs.kernels.rounding import Plan, Rounded, combine_rounded

# T tokens, D model width, E experts, K top-k, R = T*K rows, C rows after rounding at most.


def sort_rows_plainly(expert_ids_TK: torch.Tensor, E: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What sort_rows gives of (T, K) integers, by PyTorch operations: offsets (E + 1,), token of row (R,), row of slot
    (T, K), int32. For tensors on a CPU, where its kernels could only be interpreted, and beside a GPU not even that."""
    ids_R, slot_of_row_R = expert_ids_TK.flatten().sort(stable=True)
    offsets_E1 = torch.searchsorted(ids_R, torch.arange(E + 1, device=ids_R.device, dtype=ids_R.dtype), out_int32=True)
    row_of_slot_R = torch.empty_like(slot_of_row_R, dtype=torch.int32)
    row_of_slot_R[slot_of_row_R] = torch.arange(ids_R.numel(), device=ids_R.device, dtype=torch.int32)
    token_of_row_R = torch.div(slot_of_row_R, expert_ids_TK.shape[1], rounding_mode="floor").int()
    return offsets_E1, token_of_row_R, row_of_slot_R.view_as(expert_ids_TK)


class SlotRows(NamedTuple):
    """Rows sorted by expert, ties in token order, from K slots a token. All int32."""

    offsets_E1: torch.Tensor
    token_of_row_R: torch.Tensor
    row_of_slot_TK: torch.Tensor
    unused_R1: torch.Tensor | None  # rows of dropped slots: grouped_mm leaves them unwritten, so they are put to zero

    @classmethod
    def of(cls, expert_ids_TK: torch.Tensor, E: int, may_drop: bool) -> SlotRows:
        """Sort the slots; an id of E is a dropped one. No host sync."""
        sort = sort_rows if expert_ids_TK.is_cuda else sort_rows_plainly
        offsets_E1, token_of_row_R, row_of_slot_TK = sort(expert_ids_TK, E)
        rows_R = torch.arange(token_of_row_R.numel(), device=token_of_row_R.device) if may_drop else None
        unused_R1 = (rows_R >= offsets_E1[-1])[:, None] if may_drop else None
        return cls(offsets_E1, token_of_row_R, row_of_slot_TK, unused_R1)

    @property
    def ends_E(self) -> torch.Tensor:
        return self.offsets_E1[1:]

    def scores_of_rows(self, scores_TK: torch.Tensor) -> torch.Tensor:
        """(T, K) -> (R,)."""
        scores_R = torch.empty_like(scores_TK).flatten()
        scores_R[self.row_of_slot_TK.flatten()] = scores_TK.flatten()
        return scores_R

    def scores_from_rows(self, scores_R: torch.Tensor) -> torch.Tensor:
        """(R,) -> (T, K)."""
        return scores_R[self.row_of_slot_TK]

    def take(self, values_TD: torch.Tensor) -> torch.Tensor:
        """Each row's token: (T, D) -> (R, D), zeros in unused rows."""
        values_RD = values_TD[self.token_of_row_R]
        return values_RD if self.unused_R1 is None else values_RD.masked_fill_(self.unused_R1, 0)

    def add_up(self, values_RD: torch.Tensor, scores_TK: torch.Tensor | None = None) -> torch.Tensor:
        """Each token's rows, weighted and summed in float32: (R, D) -> (T, D) in values' dtype. No atomics."""
        if self.unused_R1 is not None:
            values_RD = values_RD.masked_fill(self.unused_R1, 0)
        values_TKD = values_RD[self.row_of_slot_TK]
        if scores_TK is not None:
            values_TKD = values_TKD * scores_TK[:, :, None]
        return values_TKD.sum(dim=1).to(values_RD.dtype)


class RoundedRows(NamedTuple):
    """Rows sorted by expert as token rounding leaves them: any number a token. The same two operations as SlotRows;
    the arrays are those of labs/kernels/rounding.py. Its scores are by row."""

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

    def scores_of_rows(self, score_of_row_C: torch.Tensor) -> torch.Tensor:
        """(C,) -> (C,)."""
        return score_of_row_C

    def scores_from_rows(self, score_of_row_C: torch.Tensor) -> torch.Tensor:
        """(C,) -> (C,)."""
        return score_of_row_C

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
    """Each token's rows, weighted by score and summed; keeps y and the scores, no product of the two. The scores come
    as the rows' kind has them: by slot, or by row."""

    @staticmethod
    def forward(ctx, y_RD: torch.Tensor, scores: torch.Tensor, rows: Rows) -> torch.Tensor:
        ctx.kind = type(rows)
        ctx.save_for_backward(y_RD, scores, *rows)
        return rows.add_up(y_RD, scores)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        y_RD, scores, *arrays = ctx.saved_tensors
        rows = ctx.kind(*arrays)
        grad_RD = rows.take(grad_TD)
        grad_score_R = (grad_RD * y_RD).sum(dim=1, dtype=scores.dtype)
        if rows.unused_R1 is not None:
            grad_score_R = grad_score_R.masked_fill_(rows.unused_R1[:, 0], 0)  # 0 * NaN of an unwritten row
        score_R1 = rows.scores_of_rows(scores)[:, None]
        return torch.mul(grad_RD, score_R1, out=grad_RD), rows.scores_from_rows(grad_score_R), None
