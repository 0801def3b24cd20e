"""Checks of exercise 03. Run: python labs/exercises/03_fused_silu/test_exercise.py [file | --solution]"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from labs.exercises.harness import (
    Exercise, GuardedOutput, Submission, Wrong, bound, compare, counted_launches, guarded_input, main,
)

import torch
from torch.nn.functional import silu

EXERCISE = Exercise(Path(__file__).resolve().parent)


def inputs(R: int, F: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(R * 10007 + F)
    return (torch.randn(R, 2 * F, generator=draw) * scale).to(dtype)


def reference(gate_up_R2F: torch.Tensor) -> torch.Tensor:
    gate_RF, up_RF = gate_up_R2F.double().chunk(2, dim=1)
    return silu(gate_RF) * up_RF


def run(sub: Submission, gate_up_R2F: torch.Tensor) -> torch.Tensor:
    """The learner's (R, F) result, on the CPU. Raises Wrong for what was written outside, or not at all."""
    R, F = gate_up_R2F.shape[0], gate_up_R2F.shape[1] // 2
    output = GuardedOutput((R, F), gate_up_R2F.dtype)
    sub.silu_mul(guarded_input(gate_up_R2F), output.tensor)
    before, after = output.outside()
    unwritten_RF = output.unwritten()
    case = f"hidden_RF ({R}, {F})"
    if R * F and unwritten_RF.all():
        raise Wrong(f"{case} written", "nothing was written to it", "the launcher writes into hidden_RF; is the kernel "
                    "launched, and does it end in tl.store?")
    if unwritten_RF.any():
        columns = unwritten_RF.any(dim=0).nonzero()[:, 0]
        if unwritten_RF[:, columns].all():
            likely = "only the first block of each row is written: the grid's second axis is cdiv(F, BLOCK_F)."
        else:
            likely = "rows of hidden are F apart: the store goes to hidden_ptr + row * F + column."
        raise Wrong(f"{case} written everywhere", f"{int(unwritten_RF.sum())} values not written, columns "
                    f"{columns[0].item()} to {columns[-1].item()}", likely)
    if before or after:
        raise Wrong(f"nothing written outside {case}", f"{before} values before it and {after} after it",
                    "no mask on the tail: the last block reaches past column F, into the next row and, in the last "
                    "row, out of the tensor. Load and store with mask=column < F.")
    return output.tensor.cpu()


def check(sub: Submission, gate_up_R2F: torch.Tensor, hint: str = "") -> None:
    R, F = gate_up_R2F.shape[0], gate_up_R2F.shape[1] // 2
    gate_RF, up_RF = gate_up_R2F.double().chunk(2, dim=1)
    flat = torch.nn.functional.pad(gate_up_R2F.double().flatten(), (0, F))
    narrow_RF = flat[:R * F].view(R, F), flat[F:R * F + F].view(R, F)
    compare("hidden_RF", run(sub, gate_up_R2F), reference(gate_up_R2F), bound(gate_up_R2F.dtype), [
        ("gate and up are swapped: the first F columns are the gate, and only the gate goes through SiLU.",
         silu(up_RF) * gate_RF),
        ("rows of gate_up are 2F apart: row r begins at r * 2 * F, its up columns F later.",
         silu(narrow_RF[0]) * narrow_RF[1]),
        ("sigmoid is not SiLU: silu(g) = g * sigmoid(g).", gate_RF.sigmoid() * up_RF),
        ("up is missing.", silu(gate_RF)),
        ("gate and up columns are not interleaved: gate is the first half of a row, up the second.",
         silu(gate_up_R2F.double()[:, ::2]) * gate_up_R2F.double()[:, 1::2]),
    ], hint)


@EXERCISE.check("one row of 64 columns")
def _(sub: Submission) -> None:
    check(sub, inputs(1, 64))


@EXERCISE.check("several rows")
def _(sub: Submission) -> None:
    check(sub, inputs(5, 64), "one row is right and several are not: look at the row offsets, 2F in and F out.")


@EXERCISE.check("widths that no block divides: F = 100, 37, 1")
def _(sub: Submission) -> None:
    for F in (100, 37, 1):
        check(sub, inputs(3, F), "only the tail is new here: no mask on the tail, or a wrong one?")


@EXERCISE.check("rows longer than a block: F = 2500")
def _(sub: Submission) -> None:
    check(sub, inputs(2, 2500))


@EXERCISE.check("large gates, up to 1e4")
def _(sub: Submission) -> None:
    check(sub, inputs(3, 64, scale=3000.0),
          "exp overflows: e^g is infinite above 88, and inf / inf is NaN. Use tl.sigmoid, or 1 / (1 + e^-g).")


@EXERCISE.check("float16: rounded once")
def _(sub: Submission) -> None:
    gate_up_R2F = inputs(4, 300, torch.float16)
    check(sub, gate_up_R2F, "compute in float32: .to(tl.float32) right after each load.")
    right_RF = reference(gate_up_R2F).to(torch.float16)
    share = (run(sub, gate_up_R2F) != right_RF).double().mean().item()
    if share > 0.01:
        raise Wrong("the float16 nearest to the float64 result, in at least 99% of the values",
                    f"{share:.0%} of them are a neighbour",
                    "rounded before the multiply: silu(gate) went through float16, or the arithmetic did. Convert both "
                    "loads to float32, multiply there, and let the store round once.")


@EXERCISE.check("one launch, whatever R")
def _(sub: Submission) -> None:
    for R in (1, 7):
        with counted_launches() as grids:
            run(sub, inputs(R, 40))
        if len(grids) != 1:
            raise Wrong(f"one launch of a Triton kernel for R={R}", f"{len(grids)} launches",
                        "one launch does all rows: the grid's first axis is R, and no row loop runs on the host."
                        if grids else "this exercise is done in a kernel, not in PyTorch operations.")


@EXERCISE.check("no rows: R = 0")
def _(sub: Submission) -> None:
    with counted_launches() as grids:
        run(sub, inputs(0, 40))
    if grids:
        raise Wrong("no launch for R=0", f"a launch with grid {grids[0]}", "a GPU refuses a grid of 0 programs: return "
                    "first")


if __name__ == "__main__":
    main(EXERCISE)
