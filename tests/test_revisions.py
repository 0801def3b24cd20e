"""Levels of another revision in the same run: python -m pytest tests/test_revisions.py"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import level_runner
from common.config import preset
from common.level import LABS, discover
from common.model import make_weights
from common.results import load
from common.revisions import levels_at
from labs.kernels import ops

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def other(tmp_path) -> Path:
    """A folder whose level 0 gives twice the right answer."""
    folder = tmp_path / "other"
    shutil.copytree(LABS, folder / "labs", ignore=shutil.ignore_patterns("__pycache__", "*.md"))
    path = folder / "labs" / "level0_naive.py"
    text = path.read_text()
    path.write_text(text.replace("    return forward", "    return lambda x_TD: 2 * forward(x_TD)"))
    assert path.read_text() != text
    return folder


def git(folder: Path, *words: str) -> None:
    who = ("-c", "user.name=test", "-c", "user.email=test@example.org")
    subprocess.run(["git", *who, "-C", str(folder), *words], check=True, capture_output=True)


def test_its_rows_are_its_own(other, tmp_path, capsys):
    """The other tree's level is red, ours beside it is not: neither runs the other's code."""
    status = level_runner.main(["--levels", "0-1", "--against", str(other), "--preset", "tiny", "--tokens", "8",
                                "--rounds", "1", "--out", str(tmp_path / "out")])
    assert status == 1
    (run,) = load(next((tmp_path / "out").glob("*.json")))
    found = {row.name: row.status for row in run.levels}
    assert list(found) == [f"naive @{other}", "naive", f"batched @{other}", "batched"]
    assert list(found.values()) == ["failed", "ok", "ok", "ok"]
    assert f"speed of batched over batched @{other}: " in " ".join(capsys.readouterr().out.split())


def test_a_git_revision_is_taken_as_it_was_committed(other):
    git(other, "init", "-q")
    git(other, "add", "labs")
    git(other, "commit", "-qm", "wrong")
    (other / "labs" / "level0_naive.py").write_text("raise RuntimeError('not committed')")
    (loaded,) = levels_at("HEAD", [0], other)
    cfg = preset("tiny")
    weights = make_weights(cfg, torch.float32, DEVICE)
    x_TD = torch.randn(4, cfg.D, device=DEVICE)
    assert torch.equal(loaded.build(cfg, weights)(x_TD), 2 * discover()[0].build(cfg, weights)(x_TD))


def test_ours_stay_ours(other):
    """Modules, the import path, and the operators that torch.compile sees."""
    before = {name: module for name, module in sys.modules.items() if name.startswith("labs")}, list(sys.path)
    operator = torch.ops.moe_lab.experts
    (theirs,) = levels_at(str(other), [8])
    assert (theirs.level.name, theirs.level.variants) == (f"tma_overlap @{other}", ("exact",))
    assert theirs.module.ops is not ops
    assert theirs.module.ops.experts.operator._qualname != ops.experts.operator._qualname == "moe_lab::experts"
    assert torch.ops.moe_lab.experts is operator
    assert ({name: module for name, module in sys.modules.items() if name.startswith("labs")}, list(sys.path)) == before


@pytest.mark.parametrize(("revision", "message"), [
    ("no-such-revision", "no folder with labs in it, and git says"), ("EMPTY", "it has no level 3"),
    ("FOREIGN", "its labs is no package"),
    ("BROKEN", "level 3 does not load with this tree's common: ImportError"),
])
def test_what_is_no_revision_is_named(revision, message, tmp_path, capsys):
    for name in ("FOREIGN", "EMPTY", "BROKEN"):
        (tmp_path / name / "labs").mkdir(parents=True)
        if name != "FOREIGN":
            (tmp_path / name / "labs" / "__init__.py").touch()
    (tmp_path / "BROKEN" / "labs" / "level3_memefficient.py").write_text("from common.level import NothingOfTheKind")
    given = str(tmp_path / revision) if (tmp_path / revision).exists() else revision
    assert level_runner.main(["--levels", "3", "--against", given, "--out", str(tmp_path / "out")]) == 2
    assert f"error: --against {given}: {message}" in capsys.readouterr().err
