"""Checks of exercise 04. Run: python labs/exercises/04_grouped_gemm/test_exercise.py [file | --solution]"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from labs.exercises.harness import (
    Exercise, GuardedOutput, Mistake, Submission, Wrong, bound, compare, counted_launches, device, guarded_input, main,
)

import torch

EXERCISE = Exercise(Path(__file__).resolve().parent)

CROSSING = ("tiles that cross groups: a tile's last rows belong to the next expert, or to nobody. Mask the store with "
            "row < the group's own end, not with row < R.")
MOVED_BACK = ("an output row written twice: a group's last tile was moved back to be full, onto rows that an earlier "
              "tile has, and in a short group onto another expert's. Start tiles at the group's first row and mask.")
OFF_BY_ONE = ("off by one at a group's end: its rows are offsets[e] to offsets[e + 1] - 1, so the mask is "
              "row < offsets[e + 1].")
TOO_FEW = ("too few tiles launched: cdiv(R, BLOCK_M) is enough only if every group fills its tiles. Each of the E "
           "groups may need one more: cdiv(R, BLOCK_M) + E.")
EMPTY = ("an empty group got a tile: it has no row, not even the one before it. Give it cdiv(0, BLOCK_M) = 0 tiles, "
         "and mask the store instead of repeating the last row.")
K_TAIL = ("the K tail is not masked: with a K that BLOCK_K does not divide, the last step multiplies what lies past "
          "column K: the next row's values, or NaN past the end. Load a and w with mask=depth < K - k, other=0.0.")


class Problem:
    """Groups of the given sizes, `skip` unowned rows before and after them, and their float64 answer."""

    def __init__(self, sizes: Sequence[int], N: int, K: int, dtype: torch.dtype = torch.float32, skip: int = 0):
        draw = torch.Generator().manual_seed(1)
        self.sizes, self.skip, self.R = list(sizes), skip, sum(sizes) + 2 * skip
        self.offsets = [skip]
        for size in sizes:
            self.offsets.append(self.offsets[-1] + size)
        self.a_RK = torch.randn(self.R, K, generator=draw).to(dtype)
        self.w_ENK = (torch.randn(len(sizes), N, K, generator=draw) * K**-0.5).to(dtype)
        self.owner_R = torch.full((self.R,), -1)
        for expert, (start, end) in enumerate(zip(self.offsets[:-1], self.offsets[1:], strict=True)):
            self.owner_R[start:end] = expert
        self.allowed = bound(torch.float32, K)
        if dtype != torch.float32:
            self.allowed += torch.finfo(dtype).eps / 2  # one rounding, no more

    def answer(self, owner_R: torch.Tensor | None = None, K: int | None = None) -> torch.Tensor:
        """(R, N) float64, rows of nobody 0; with another owner of each row, or only the first K of the depth."""
        owner_R = self.owner_R if owner_R is None else owner_R
        out_RN = torch.zeros(self.R, self.w_ENK.shape[1], dtype=torch.float64)
        for expert, w_NK in enumerate(self.w_ENK.double()):
            out_RN[owner_R == expert] = self.a_RK.double()[owner_R == expert, :K] @ w_NK[:, :K].T
        return out_RN

    def last_rows(self) -> list[int]:
        """Each group's last row."""
        return [end - 1 for start, end in zip(self.offsets[:-1], self.offsets[1:], strict=True) if end > start]

    def __str__(self) -> str:
        (R, K), (E, N, _) = self.a_RK.shape, self.w_ENK.shape
        return f"R={R} N={N} K={K}, {E} groups of {self.sizes} rows" if E > 1 else f"R={R} N={N} K={K}"


def run(sub: Submission, problem: Problem) -> torch.Tensor:
    """The learner's (R, N), rows of nobody 0, on the CPU. Raises Wrong for what was written and should not be, or
    was not and should."""
    output = GuardedOutput((problem.R, problem.w_ENK.shape[1]), problem.a_RK.dtype)
    offsets_E1 = torch.tensor(problem.offsets, dtype=torch.int32, device=device())
    sub.grouped_gemm(guarded_input(problem.a_RK), guarded_input(problem.w_ENK), offsets_E1, output.tensor)
    unwritten_RN = output.unwritten()
    owned_R = problem.owner_R >= 0
    missing_R = unwritten_RN.any(dim=1) & owned_R
    if owned_R.any() and unwritten_RN[owned_R].all():
        raise Wrong(f"out_RN written ({problem})", "nothing was written to it",
                    "the launcher writes into out_RN; is the kernel launched, and does it end in tl.store?")
    if missing_R.any():
        rows = missing_R.nonzero()[:, 0].tolist()
        if unwritten_RN[owned_R].any(dim=0).logical_not().any():
            likely = "whole columns are missing: the grid's column axis is cdiv(N, BLOCK_N)."
        elif rows == problem.last_rows():
            likely = OFF_BY_ONE
        elif rows == list(range(rows[0], problem.last_rows()[-1] + 1)):
            likely = TOO_FEW
        else:
            likely = "a group's rows come in cdiv(rows, BLOCK_M) tiles, counted from the group's own first row."
        raise Wrong(f"every row of every group written ({problem})",
                    f"{len(rows)} rows not written, {rows[0]} to {rows[-1]}", likely)
    before, after = output.outside()
    if before or after:
        if before:
            likely = EMPTY if problem.sizes[0] == 0 else MOVED_BACK
        elif after == output.tensor.shape[1]:
            likely = OFF_BY_ONE  # one row
        else:
            likely = "the store is not masked: it takes row < the group's end and column < N, both."
        raise Wrong(f"nothing written outside out_RN ({problem})",
                    f"{before} values before it and {after} after it", likely)
    stray = (~unwritten_RN).any(dim=1) & ~owned_R
    if stray.any():
        rows = stray.nonzero()[:, 0].tolist()
        past = [row - problem.offsets[-1] + 1 for row in rows if row >= problem.offsets[-1]]
        raise Wrong(f"no row written but those of the groups, {problem.offsets[0]} to {problem.offsets[-1] - 1}",
                    f"rows {rows[0]} to {rows[-1]} written too",
                    MOVED_BACK if len(past) < len(rows) else OFF_BY_ONE if past == [1] else CROSSING)
    return output.tensor.cpu().where(owned_R[:, None], 0.0)


def check(sub: Submission, problem: Problem, mistakes: Sequence[Mistake] = (), hint: str = "") -> None:
    compare(f"out_RN ({problem})", run(sub, problem), problem.answer(), problem.allowed, mistakes, hint)


@EXERCISE.check("one group, sizes that all tiles divide")
def _(sub: Submission) -> None:
    problem = Problem([128], N=128, K=128)
    half_RN = (problem.a_RK.half().double() @ problem.w_ENK[0].half().double().T)
    check(sub, problem, [("float16 inputs of tl.dot: keep the tensors' dtype.", half_RN)],
          "an error near 1e-4 is TF32: give tl.dot input_precision=\"ieee\". A large one: is w[e] transposed, "
          "(N, K) read as (K, N)?")


@EXERCISE.check("K tail: no tile divides K")
def _(sub: Submission) -> None:
    for K in (40, 7):
        problem = Problem([16], N=16, K=K)
        dropped = [("the K tail is dropped: range(0, K, BLOCK_K) takes cdiv(K, BLOCK_K) steps, the last one masked.",
                    problem.answer(K=depth)) for depth in {K // block * block for block in (8, 16, 32, 64)} - {K}]
        check(sub, problem, dropped, K_TAIL)


@EXERCISE.check("N tail: no tile divides N")
def _(sub: Submission) -> None:
    check(sub, Problem([32], N=40, K=32), hint="mask the loads of w and the store with column < N")


@EXERCISE.check("a group writes its own rows and no others")
def _(sub: Submission) -> None:
    for rows in (37, 5, 64):
        check(sub, Problem([rows], N=32, K=32, skip=70))


@EXERCISE.check("groups of different sizes")
def _(sub: Submission) -> None:
    check(sub, Problem([37, 70, 21], N=32, K=32), hint="a tile's expert decides both its rows and its weights")


@EXERCISE.check("empty groups: first, in the middle, several, last")
def _(sub: Submission) -> None:
    # First the one that fails on a GPU every time: there, who writes a row last is chance.
    for sizes in ([0, 40, 0, 3], [20, 0, 37, 0, 0, 5, 0]):
        problem = Problem(sizes, N=32, K=32)
        taken_R = problem.owner_R.clone()
        for expert, size in enumerate(sizes):
            if size == 0 and problem.offsets[expert] > 0:
                taken_R[problem.offsets[expert] - 1] = expert
        check(sub, problem, [(EMPTY, problem.answer(taken_R))],
              "empty groups are the only news here: an expert's tiles begin after those of all experts before it")


@EXERCISE.check("many groups of few rows")
def _(sub: Submission) -> None:
    check(sub, Problem([3, 1, 2, 1, 4, 1, 1, 2, 3, 1, 1, 2], N=16, K=16))


@EXERCISE.check("float16: accumulated in float32, K = 1024")
def _(sub: Submission) -> None:
    check(sub, Problem([16], N=16, K=1024, dtype=torch.float16),
          hint="one rounding to float16 is at most 4.9e-04. The accumulator is float32 through the whole loop; only "
               "the store rounds.")


READS = ("item", "tolist", "numpy", "cpu", "__int__", "__index__", "__bool__", "__iter__", "__float__")


@contextmanager
def host_reads(path: Path) -> Iterator[list[str]]:
    """A list that gets, as `line: what`, each time code of the file `path` brings a tensor's values to the host."""
    found = []

    def watched(name: str):
        original = getattr(torch.Tensor, name)

        def read(tensor: torch.Tensor, *args, **kwargs):
            caller = sys._getframe(1)
            if caller.f_code.co_filename == str(path):
                found.append(f"{name.strip('_')} at line {caller.f_lineno} of {path.name}")
            return original(tensor, *args, **kwargs)

        return read

    with ExitStack() as stack:
        for name in READS:
            stack.enter_context(mock.patch.object(torch.Tensor, name, watched(name)))
        yield found


@EXERCISE.check("one launch, and the host never reads the offsets")
def _(sub: Submission) -> None:
    for sizes in ([4, 3, 2], [1, 2] * 8):
        with counted_launches() as grids, host_reads(sub.path) as reads:
            run(sub, Problem(sizes, N=16, K=16))
        if reads:
            raise Wrong("offsets that stay on the device", reads[0],
                        "the host reads the offsets: on a GPU it waits for all work before them. Launch the most tiles "
                        "that R rows in E groups can need, and let each program find its own.")
        if len(grids) != 1:
            raise Wrong(f"one launch of a Triton kernel for {len(sizes)} experts", f"{len(grids)} launches",
                        "a loop over experts on the host: one grid covers all of them."
                        if grids else "this exercise is done in a kernel, not in PyTorch operations.")


@EXERCISE.check("no rows: R = 0")
def _(sub: Submission) -> None:
    run(sub, Problem([0, 0, 0], N=16, K=16))


if __name__ == "__main__":
    main(EXERCISE)
