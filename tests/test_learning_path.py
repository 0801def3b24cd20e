"""labs/README.md's path and its checklist: what they name is there, and lines pass, fail or say what they need."""

from __future__ import annotations

import re

import common.level  # isort: skip  # noqa: F401  (picks Triton's interpreter before anything imports triton)

import pytest
import torch

from labs import checklist
from labs.studies import study
from tests.test_studies import TINY

def test_checklist_says_pass_or_what_it_needs(monkeypatch, capsys):
    monkeypatch.setattr(checklist, "load_within_2x", lambda device: checklist.Outcome(True, "not trained here"))
    monkeypatch.setitem(checklist.ITEMS, "load within 2x", checklist.load_within_2x)
    assert checklist.main(["--device", "cpu"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert len(out) == len(checklist.ITEMS)
    for line in out:
        assert line.startswith(("pass  ", "n/a   ")), line
        assert ("n/a (needs CUDA)" in line) == line.startswith("n/a")


def test_checklist_fails_with_a_failing_line(monkeypatch, capsys):
    monkeypatch.setitem(checklist.ITEMS, "grouped faster than sequential",
                        lambda device: checklist.Outcome(False, "0.9 times as fast, wanted above 1"))
    assert checklist.main(["--device", "cpu", "grouped", "forward"]) == 1
    out = capsys.readouterr().out
    assert "FAIL  grouped faster than sequential: 0.9 times" in out
    assert "pass  basic MoE forward works" in out


def test_checklist_goes_on_after_a_line_that_raises(monkeypatch, capsys):
    def broken(device: torch.device) -> checklist.Outcome:
        raise ValueError("no such kernel")

    monkeypatch.setitem(checklist.ITEMS, "basic MoE forward works", broken)
    assert checklist.main(["--device", "cpu", "forward", "rounding"]) == 1
    out = capsys.readouterr().out
    assert "FAIL  basic MoE forward works: ValueError: no such kernel" in out
    assert "pass  utilisation above 95% with rounding" in out


def test_checklist_knows_its_lines(capsys):
    assert checklist.main(["no such line"]) == 2
    assert "grouped faster than sequential" in capsys.readouterr().err


@pytest.mark.gpu
def test_checklist_is_green_on_a_gpu(capsys):
    assert checklist.main([]) == 0
    assert "n/a" not in capsys.readouterr().out


LEARNING_PATH = study.ROOT / "labs" / "README.md"


def test_the_learning_paths_links_and_commands_exist():
    text = LEARNING_PATH.read_text()
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (LEARNING_PATH.parent / target).exists(), target
    commands = re.findall(r"python (labs/[\w/]+\.py|level_runner\.py)", text)
    assert len(commands) > 10
    for path in commands:
        assert (study.ROOT / path).exists(), path
    for name in TINY:
        assert f"{name}.py" in text, f"{name} is nowhere on the path"


def test_the_learning_path_lists_the_checklists_lines():
    for name in checklist.ITEMS:
        assert f"| {name} |" in LEARNING_PATH.read_text()
