"""What the five exercises share: load a learner's file, run the checks on it, say what is wrong and why.

A check compares with a float64 reference. Where it differs, the found values are also compared with what
the usual mistakes would give, so that a message can name the mistake instead of guessing.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import common.level  # isort: skip  # noqa: F401  (picks Triton's interpreter before anything imports triton)

import torch
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from common.measure import relative_error

MARKS = {"pass": "green", "FAIL": "bold red", "todo": "yellow"}


class Wrong(Exception):
    """A check failed: what was expected, what was found, the mistake that looks exactly like it, or else a
    hint where to look."""

    def __init__(self, expected: str, found: str, mistake: str = "", hint: str = ""):
        lines = {"expected": expected, "found": found, "mistake": mistake, "hint": "" if mistake else hint}
        super().__init__("\n".join(f"{label:<10}{text}" for label, text in lines.items() if text))


@dataclass(frozen=True)
class Result:
    """One check: `mark` is pass, FAIL or todo (not written yet)."""

    title: str
    mark: str
    message: str = ""


class Submission:
    """A learner's file. Names it lacks are an error that says so; a file in a `wrong` folder plants one
    mistake, and takes what it does not define from the solution."""

    def __init__(self, path: Path):
        self.path = path
        self._module = load(path)
        solution = path.parents[1] / "solution.py"
        self._rest = load(solution) if path.parent.name == "wrong" and solution.is_file() else None

    def __getattr__(self, name: str) -> Any:
        for module in (self._module, self._rest):
            if hasattr(module, name):
                return getattr(module, name)
        raise Wrong(f"a function `{name}` in {self.path.name}", "none", hint="keep the names that starter.py has")


def load(path: Path) -> ModuleType:
    """The module in the file `path`, whatever the folders above it are called."""
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


@dataclass
class Exercise:
    """The checks of one exercise, in the order in which a learner should meet them."""

    folder: Path
    checks: list[tuple[str, str, Callable[[Submission], None]]] = field(default_factory=list)

    def check(self, title: str, crash: str = "") -> Callable:
        """Decorator: a function that raises Wrong if the submission fails. `crash` is the hint to
        give where the learner's code raises an exception of its own."""

        def add(function: Callable[[Submission], None]) -> Callable[[Submission], None]:
            self.checks.append((title, crash, function))
            return function

        return add

    def run(self, path: Path) -> list[Result]:
        """All checks on the file `path`; a file that cannot be imported gives one failed result."""
        try:
            submission = Submission(path)
        except Exception as error:
            return [Result("the file can be imported", "FAIL", _crashed(error, path, ""))]
        return [Result(title, *_attempt(check, submission, crash)) for title, crash, check in self.checks]


def _attempt(check: Callable[[Submission], None], submission: Submission, crash: str) -> tuple[str, str]:
    torch.manual_seed(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's, from inside Triton's interpreter
            check(submission)
    except Wrong as wrong:
        return "FAIL", str(wrong)
    except Exception as error:
        lines = [frame.line for frame in _frames(error, submission.path)]
        if isinstance(error, NotImplementedError) and lines and lines[-1].startswith("raise"):
            return "todo", str(error)  # the starter's own; PyTorch raises this class too
        return "FAIL", _crashed(error, submission.path, crash)
    return "pass", ""


def _frames(error: BaseException, path: Path) -> list[traceback.FrameSummary]:
    """Where the error came through `path`; Triton's interpreter wraps what a kernel raised as a cause."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == path]
    return frames + (_frames(error.__cause__, path) if error.__cause__ else [])


def _crashed(error: Exception, path: Path, hint: str) -> str:
    frames, cause = _frames(error, path), error.__cause__ or error
    where = f" at line {frames[-1].lineno} of {path.name}: {frames[-1].line}" if frames else ""
    said = next(iter(str(cause).splitlines()), "")
    return str(Wrong("a result", f"{type(cause).__name__}: {said}{where}", hint=hint))


# ---- comparing -----------------------------------------------------------------------------------

Mistake = tuple[str, torch.Tensor]


def bound(dtype: torch.dtype, terms: int = 1) -> float:
    """Largest relative error that rounding alone may cause: a few roundings to `dtype`, and the float32
    accumulation of `terms` values. A mistake is an error of order 1."""
    return 4 * torch.finfo(dtype).eps + torch.finfo(torch.float32).eps * terms**0.5


def compare(
    what: str,
    found: Any,
    expected: torch.Tensor,
    allowed: float,
    mistakes: Sequence[Mistake] = (),
    hint: str = "",
) -> None:
    """Raise Wrong unless `found` is `expected` (float64) within the relative error `allowed`.

    `mistakes` are texts with the values that these mistakes give: the one that matches is named.
    `hint` is said where none matches. An expected zero must be zero.
    """
    if not isinstance(found, torch.Tensor):
        raise Wrong(f"{what}, a tensor of shape {tuple(expected.shape)}", repr(found), hint="is there a `return`?")
    found = found.detach().cpu()
    if found.shape != expected.shape:
        raise Wrong(f"{what} of shape {tuple(expected.shape)}", f"shape {tuple(found.shape)}", hint=hint)
    mistake = next((text for text, values in mistakes if _same(found, values, allowed)), "")
    bad = int((~found.double().isfinite()).sum())
    if bad:
        raise Wrong(f"{what}, all finite", f"{bad} of {found.numel()} values are NaN or infinite", mistake, hint)
    if _same(found, expected, allowed):
        return
    error = relative_error(found, expected) if expected.any() else float("inf")
    if found.numel() == 1:
        raise Wrong(f"{what} = {expected.item():.6g}", f"{found.item():.6g}", mistake, hint)
    worst = tuple(int(i) for i in torch.unravel_index((found.double() - expected).abs().argmax(), found.shape))
    raise Wrong(f"{what} within a relative error of {allowed:.1e} of the float64 reference",
                f"relative error {error:.1e}; at {list(worst)} it is {found[worst].item():.4g} "
                f"and should be {expected[worst].item():.4g}", mistake, hint)


def _same(found: torch.Tensor, values: torch.Tensor, allowed: float) -> bool:
    """Whether the two agree as a whole and, where there are rows, in every row: one wrong row in a
    thousand would hide in the whole. A NaN agrees with a NaN."""
    values = values.double().cpu()
    if found.shape != values.shape or not torch.equal(found.isnan(), values.isnan()):
        return False
    found, values = found.double().nan_to_num(), values.nan_to_num()
    if not values.any():
        return not found.any()
    if not relative_error(found, values) <= allowed:
        return False
    if found.dim() < 2:
        return True
    rows, error = values.flatten(1).norm(dim=1), (found - values).flatten(1).norm(dim=1)
    typical = values.norm() / max(1, len(values)) ** 0.5
    return bool((error <= 8 * allowed * torch.maximum(rows, typical)).all())


def compare_exact(
    what: str, found: Any, expected: torch.Tensor, mistakes: Sequence[Mistake] = (), hint: str = ""
) -> None:
    """Raise Wrong unless whole numbers or booleans are equal."""
    if not isinstance(found, torch.Tensor):
        raise Wrong(f"{what}, a tensor of shape {tuple(expected.shape)}", repr(found), hint="is there a `return`?")
    found, expected = found.detach().cpu(), expected.cpu()
    if found.shape != expected.shape:
        raise Wrong(f"{what} of shape {tuple(expected.shape)}", f"shape {tuple(found.shape)}", hint=hint)
    if torch.equal(found.double(), expected.double()):
        return
    mistake = next((text for text, values in mistakes if torch.equal(found.double(), values.double())), "")
    differ = found.double() != expected.double()
    if found.numel() <= 16:
        raise Wrong(f"{what} {expected.tolist()}", f"{found.tolist()}", mistake, hint)
    first = tuple(differ.nonzero()[0].tolist())
    raise Wrong(f"{what}, {expected[first].item()} at {list(first)}",
                f"{found[first].item()} there; {int(differ.sum())} of {found.numel()} values differ", mistake, hint)


# ---- kernels -------------------------------------------------------------------------------------

SENTINEL = 12288.0  # exact in float16, and no result of the exercises
MARGIN = 1 << 16


def device() -> torch.device:
    """The GPU if there is one; else the CPU, where Triton's interpreter runs the kernels."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def guarded_input(values: torch.Tensor) -> torch.Tensor:
    """A copy of `values` with NaN before and after it in memory, so that what is read outside shows."""
    margin = values.new_full((MARGIN,), float("nan"))
    memory = torch.cat([margin, values.flatten(), margin]).to(device())
    return memory[MARGIN:MARGIN + values.numel()].view(values.shape)


class GuardedOutput:
    """A tensor to write into, filled with SENTINEL and with SENTINEL around it in memory, so that what was
    not written, and what was written outside, shows."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype):
        size = torch.Size(shape).numel()
        self._memory = torch.full((2 * MARGIN + size,), SENTINEL, dtype=dtype, device=device())
        self.tensor = self._memory[MARGIN:MARGIN + size].view(shape)

    def outside(self) -> tuple[int, int]:
        """How many values were written before the tensor's first and after its last."""
        changed = self._memory != SENTINEL
        return int(changed[:MARGIN].sum()), int(changed[MARGIN + self.tensor.numel():].sum())

    def unwritten(self) -> torch.Tensor:
        """Where the tensor still holds what it was filled with, a bool mask on the CPU."""
        return (self.tensor == SENTINEL).cpu()


@contextmanager
def counted_launches() -> Iterator[list[object]]:
    """A list that gets the grid of every Triton kernel launched inside."""
    from triton.runtime.jit import KernelInterface

    grids, launch = [], KernelInterface.__getitem__

    def counting(kernel: Any, grid: Any) -> Any:
        grids.append(grid)
        return launch(kernel, grid)

    with mock.patch.object(KernelInterface, "__getitem__", counting):
        yield grids


# ---- the one command -----------------------------------------------------------------------------

def main(exercise: Exercise) -> None:
    """Check starter.py, `--solution` or a given file; print the list; exit 0 if all passed, 1 if not."""
    parser = argparse.ArgumentParser(description=f"Check your work on exercise {exercise.folder.name}.")
    parser.add_argument("file", nargs="?", type=Path, help="the file to check (default: starter.py beside this one)")
    parser.add_argument("--solution", action="store_true", help="check solution.py instead")
    arguments = parser.parse_args()
    path = (arguments.file or exercise.folder / ("solution.py" if arguments.solution else "starter.py")).resolve()
    if not path.is_file():
        print(f"error: no file {path}", file=sys.stderr)
        raise SystemExit(2)

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    console.print(Text(f"{exercise.folder.name}  {path.name}", style="bold"))
    results = exercise.run(path)
    said = set()
    for result in results:
        console.print(Text.assemble((result.mark, MARKS[result.mark]), "  ", result.title))
        if result.message and result.message not in said:
            said.add(result.message)
            console.print(Padding(Text(result.message), (0, 0, 0, 6)))
        elif result.mark == "FAIL":
            console.print(Padding(Text("as above"), (0, 0, 0, 6)))
    passed = sum(result.mark == "pass" for result in results)
    console.print(Text(f"{passed} of {len(results)} passed"))
    if passed < len(results):
        print("Begin with the first that did not pass: later ones often follow from it.")
    raise SystemExit(0 if passed == len(results) else 1)
