"""Levels as they stood at another revision, for the same run: whether a change pays is a ratio within one run.

Of another revision only `labs` is taken. `common`, which makes the comparison fair, is this tree's for all.
"""

from __future__ import annotations

import importlib
import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from common.level import LABS, Loaded

OPERATORS = '"moe_lab::'  # PyTorch knows an operator's name once a process: another tree's get names of their own

_folders: list[tempfile.TemporaryDirectory] = []  # as long as the process: Triton reads its kernels' source there


def levels_at(revision: str, numbers: Sequence[int], repository: Path = LABS.parent) -> list[Loaded]:
    """The levels of these numbers, exact top-k alone, named `name @revision`: of a git revision of `repository`, or of
    a folder that holds `labs`.

    Raises ValueError for what is neither, and for a level that it lacks or that does not load beside this `common`.
    """
    _folders.append(tempfile.TemporaryDirectory(prefix="labs_at_"))
    root = Path(_folders[-1].name)
    if (Path(revision) / "labs").is_dir():
        shutil.copytree(Path(revision) / "labs", root / "labs", ignore=shutil.ignore_patterns("__pycache__"))
    else:
        _unpack(revision, root, repository)
    if not (root / "labs" / "__init__.py").exists():  # Python would take ours instead
        raise ValueError(f"--against {revision}: its labs is no package, it lacks __init__.py")
    for path in root.rglob("*.py"):
        if OPERATORS in (text := path.read_text()):
            path.write_text(text.replace(OPERATORS, f"{OPERATORS[:-2]}_{len(_folders)}::"))
    found = []
    with _labs_of(root):
        for number in numbers:
            files = sorted(root.glob(f"labs/level{number}_*.py"))
            if not files:
                raise ValueError(f"--against {revision}: it has no level {number}")
            try:
                module = importlib.import_module(f"labs.{files[0].stem}")
            except (ImportError, AttributeError) as error:
                raise ValueError(f"--against {revision}: level {number} does not load with this tree's common: "
                                 f"{type(error).__name__}: {error}") from error
            level = replace(module.LEVEL, name=f"{module.LEVEL.name} @{revision}", variants=module.LEVEL.variants[:1])
            found.append(Loaded(level, module))
    return found


def _unpack(revision: str, root: Path, repository: Path) -> None:
    """`labs` of a git revision, into `root`. Raises ValueError if git has none."""
    try:
        archive = subprocess.run(["git", "-C", str(repository), "archive", revision, "labs"], capture_output=True,
                                 check=True).stdout
    except FileNotFoundError:
        raise ValueError(f"--against {revision}: no folder with labs in it, and git is not installed") from None
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip()
        raise ValueError(f"--against {revision}: no folder with labs in it, and git says: {said}") from error
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(root, filter="data")


@contextmanager
def _labs_of(root: Path) -> Iterator[None]:
    """Inside, `labs` is the package in `root`; afterwards it is ours again, and theirs lives in what was imported."""
    ours = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "labs"}
    for name in ours:
        del sys.modules[name]
    path = list(sys.path)
    sys.path.insert(0, str(root))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "labs"]:
            del sys.modules[name]
        sys.modules.update(ours)
        sys.path[:] = path
