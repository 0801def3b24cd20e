"""The ladder's rules: neighbours differ in what they say, nothing else. python -m pytest tests/test_ladder.py"""

from __future__ import annotations

import ast
import itertools
import re
import subprocess
import sys

import pytest
import torch

from common.level import LABS, discover
from tests.cases import IDS, LEVELS

# From level 9 on a level adds a capability and imports the one it stands on.
COPYING = [loaded for loaded in LEVELS if loaded.level.number <= 8]
HEADINGS = ("Adds", "Why", "How", "Costs", "Needs", "Run", "Diff")


def definitions(path) -> dict[str, str]:
    """Name -> AST of each top-level function, class and constant, LEVEL apart."""
    found = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = ast.dump(node)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = ast.dump(node.value)
    found.pop("LEVEL")
    return found


@pytest.mark.parametrize(("below", "above"), list(itertools.pairwise(COPYING)), ids=IDS[1:len(COPYING)])
def test_a_level_differs_from_the_one_below_in_what_it_names(below, above):
    before, after = definitions(below.path), definitions(above.path)
    differing = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert differing == set(above.level.changes), "LEVEL.changes must name exactly what changed"


@pytest.mark.parametrize("loaded", LEVELS, ids=IDS)
def test_the_docstring_has_its_headings_and_no_figures(loaded):
    doc = loaded.module.__doc__
    assert len(doc.splitlines()) <= 30
    positions = [doc.find(f"\n{heading} ") for heading in HEADINGS]
    assert -1 not in positions, f"missing {[h for h, p in zip(HEADINGS, positions, strict=True) if p < 0]}"
    assert positions == sorted(positions)
    assert not re.search(r"\d\s?(ms\b|TFLOP|x faster|% faster)", doc), "speed figures rot in source"


@pytest.mark.parametrize("loaded", LEVELS, ids=IDS)
def test_a_level_stands_alone(loaded):
    source = loaded.path.read_text()
    if loaded.level.number <= 8:
        siblings = re.findall(r"^\s*(?:from|import) labs[. ]level.*", source, re.MULTILINE)
        assert not siblings, "levels 0 to 8 import no sibling"
    assert len(source.splitlines()) <= 400, "a level is read in one sitting"


def test_numbers_have_no_gap():
    assert [loaded.level.number for loaded in LEVELS] == list(range(len(LEVELS)))


def test_a_file_whose_number_disagrees_is_refused(monkeypatch, tmp_path):
    source = (LABS / "level0_naive.py").read_text()
    (tmp_path / "level7_wrong.py").write_text(source)
    monkeypatch.setattr("common.level.LABS", tmp_path)
    monkeypatch.setattr("labs.__path__", [str(tmp_path)])
    with pytest.raises(ValueError, match=r"level7_wrong.py says LEVEL.number=0"):
        discover()


@pytest.mark.parametrize("loaded", LEVELS, ids=IDS)
def test_a_level_runs_alone_from_any_folder(loaded, tmp_path):
    command = [sys.executable, str(loaded.path), "--preset", "tiny", "--tokens", "16", "--rounds", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert loaded.level.adds in " ".join(done.stdout.split())
    if "cuda" in loaded.level.requires and not torch.cuda.is_available():
        assert f"{loaded.level.name}: n/a (needs CUDA)" in done.stdout
        return
    assert f"│ {loaded.level.number} │" in done.stdout
    assert re.search(r"gate of \w+: passed, relative error", done.stdout)
