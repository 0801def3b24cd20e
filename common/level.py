"""What a level is: its description, what it needs, what it claims; finding all levels; running one."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import torch

from common.config import MoEConfig
from common.model import Weights

# Read when CUDA starts. Without it, one small tensor that lives inside a freed block of 100 GB keeps the
# whole block, and a level that fits runs out of memory because of those before it.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
if not torch.cuda.is_available():
    # Triton reads this when it is first imported, so level files import this module before triton.
    os.environ.setdefault("TRITON_INTERPRET", "1")

LABS = Path(__file__).resolve().parents[1] / "labs"


class Unsupported(RuntimeError):
    """A level cannot run here. The message says what it needs: `needs CUDA`, `needs sm_90`."""


@dataclass(frozen=True)
class Claims:
    """What a level promises beyond the right answer, each checked by a test that can fail.

    host_syncs: times one call makes the host wait. max_launches: host calls that put work on the
    GPU, at any E, and any T whose tensors hold under 2**31 values: PyTorch splits larger ones.
    repeatable: two runs agree bit for bit. None claims nothing.
    """

    host_syncs: int | None = None
    max_launches: int | None = None
    repeatable: bool = True


@dataclass(frozen=True)
class Level:
    """One rung. `changes` names every function, class and constant of the file that differs from the
    level below; all others are its copies, letter for letter. `requires` holds `triton` (a GPU,
    or a CPU with Triton's interpreter), `cuda`, an architecture such as `sm_90`, or `16-bit` (no float32).

    `variants`: a row each. `exact` is top-k as it is. `rounded` is token rounding: such a forward has
    `rounding(T)`, a common.rounded.Rounding of the last call with T tokens, or None where it was exact.
    `build` gives the first variant, `build(..., variant=...)` any other."""

    number: int
    name: str
    adds: str
    changes: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()
    variants: tuple[str, ...] = ("exact",)
    claims: Claims = field(default_factory=Claims)

    def check_supported(self, device: torch.device, dtype: torch.dtype) -> None:
        """Raise Unsupported, saying what is needed, unless the level runs on `device` in `dtype`."""
        if device.type == "cuda":
            capability = torch.cuda.get_device_capability(device)
            for need in self.requires:
                if need.startswith("sm_") and capability != divmod(int(need[3:]), 10):
                    raise Unsupported(f"needs {need}")
        elif set(self.requires) - {"triton", "16-bit"}:
            raise Unsupported("needs CUDA")
        if "16-bit" in self.requires and dtype == torch.float32:
            raise Unsupported("needs bfloat16 or float16")
        if device.type != "cuda" and "triton" in self.requires and dtype == torch.bfloat16:
            raise Unsupported("needs CUDA for bfloat16: Triton's interpreter multiplies it wrongly")

    def interpreted(self, device: torch.device) -> bool:
        """Whether the level's kernels run in Triton's interpreter: right answers, meaningless times."""
        return device.type != "cuda" and "triton" in self.requires


def check_device_dtype(device: torch.device, dtype: torch.dtype) -> None:
    """Raise ValueError if the device has no arithmetic in `dtype`."""
    if device.type == "cuda" and dtype == torch.bfloat16 and torch.cuda.get_device_capability(device)[0] < 8:
        raise ValueError(f"dtype='bfloat16': {torch.cuda.get_device_name(device)} has none, use float16")


@dataclass(frozen=True)
class Loaded:
    """A level with its file: `build(cfg, weights) -> forward`."""

    level: Level
    module: ModuleType

    @property
    def build(self) -> Callable:
        return self.module.build

    @property
    def path(self) -> Path:
        return Path(self.module.__file__)

    def build_variant(self, cfg: MoEConfig, weights: Weights, variant: str) -> Callable:
        """The forward of one of LEVEL.variants."""
        if variant == self.level.variants[0]:
            return self.build(cfg, weights)
        return self.build(cfg, weights, variant=variant)


def discover() -> list[Loaded]:
    """All levels, `labs/level*_*.py`, in order of their numbers. The folder is the list.

    Raises ValueError if a file's number is not its LEVEL's, or two files share one.
    """
    found: dict[int, Loaded] = {}
    for path in LABS.glob("level*_*.py"):
        module = importlib.import_module(f"labs.{path.stem}")
        level = module.LEVEL
        if not path.stem.startswith(f"level{level.number}_"):
            raise ValueError(f"{path.name} says LEVEL.number={level.number}: name and number must agree")
        if level.number in found:
            raise ValueError(f"{path.name} and {found[level.number].path.name} are both level {level.number}")
        found[level.number] = Loaded(level, module)
    return [found[number] for number in sorted(found)]


def main(level: Level) -> None:
    """The main guard of a level file: verify, time, print one row. Exits 1 if the gate is red."""
    from common.cli import run_alone  # imports the timing, which a level being imported does not need

    raise SystemExit(run_alone(level))
