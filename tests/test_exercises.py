"""The exercises hold what they promise: the starter asks for work, the solution passes, and every usual mistake
is met with the message meant for it.

python -m pytest tests/test_exercises.py
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from labs.exercises.harness import load, main
from tests import machine_code

EXERCISES = sorted(path.parent for path in (Path(__file__).parents[1] / "labs/exercises").glob("*/test_exercise.py"))
WRONG = [path for folder in EXERCISES for path in sorted((folder / "wrong").glob("*.py"))]


def command(folder: Path, *arguments: str, cwd: Path) -> tuple[int, str]:
    """The learner's one command: exit status, and all that it printed with its line breaks undone."""
    done = subprocess.run([sys.executable, folder / "test_exercise.py", *arguments],
                          cwd=cwd, capture_output=True, text=True, timeout=300)
    return done.returncode, " ".join((done.stdout + done.stderr).split())


def test_there_are_five_exercises_and_each_is_whole():
    assert [folder.name[:2] for folder in EXERCISES] == ["01", "02", "03", "04", "05"]
    for folder in EXERCISES:
        assert {"problem.md", "starter.py", "solution.py", "wrong"} <= {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("folder", EXERCISES, ids=lambda folder: folder.name)
def test_the_starter_fails_and_says_what_to_write(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["test_exercise.py"])
    with pytest.raises(SystemExit) as stop:
        main(load(folder / "test_exercise.py").EXERCISE)
    output = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 1
    assert "Traceback" not in output
    assert "FAIL" not in output, "nothing is wrong in a starter, only unwritten"
    starter = (folder / "starter.py").read_text()
    asked = [line.split('NotImplementedError("')[1].split('"')[0]
             for line in starter.splitlines() if 'NotImplementedError("' in line]
    assert asked
    for sentence in asked:
        assert sentence in output


@pytest.mark.parametrize("folder", EXERCISES, ids=lambda folder: folder.name)
def test_the_solution_passes(folder, tmp_path):
    status, output = command(folder, "--solution", cwd=tmp_path)
    assert status == 0, output
    assert "FAIL" not in output


@pytest.mark.parametrize("path", WRONG, ids=lambda path: f"{path.parents[1].name}_{path.stem}")
def test_a_usual_mistake_is_named(path):
    exercise = load(path.parents[1] / "test_exercise.py").EXERCISE
    failed = [result for result in exercise.run(path) if result.mark != "pass"]
    assert failed, "the mistake passed every check"
    assert load(path).SAYS in failed[0].message, failed[0]


def test_the_kernels_that_solve_03_and_04_compile_for_a_gpu():
    def request(folder: str, kernel: str, pointers: str, sizes: str, **constants: int) -> machine_code.Request:
        signature = {name: "*fp16" for name in pointers.split()} | {name: "i32" for name in sizes.split()}
        if "offsets_ptr" in signature:
            signature["offsets_ptr"] = "*i32"
        return machine_code.Request(folder, f"labs.exercises.{folder}.solution", kernel, signature, constants,
                                    aligned=tuple(pointers.split()), warps=4, stages=3)

    compiled = machine_code.compile_all([
        request("03_fused_silu", "silu_mul_kernel", "gate_up_ptr hidden_ptr", "F", BLOCK_F=1024),
        request("04_grouped_gemm", "grouped_gemm_kernel", "a_ptr w_ptr out_ptr offsets_ptr", "E N K",
                E_POW2=8, BLOCK_M=32, BLOCK_N=32, BLOCK_K=32),
    ])
    assert all(found.count("STG") and found.stack_bytes == 0 for found in compiled.values())
    assert compiled["04_grouped_gemm"].count("HMMA"), "the multiplication runs on tensor cores"


def test_a_file_of_ones_own_is_checked_by_path(tmp_path):
    folder = EXERCISES[0]
    own = tmp_path / "mine.py"
    own.write_text((folder / "solution.py").read_text())
    assert command(folder, "mine.py", cwd=tmp_path)[0] == 0


@pytest.mark.parametrize(("source", "said"), [
    ("def route(:", "SyntaxError"),
    ("x = 1", "a function `route`"),
    ("def route(x_TD, router_ED, K):\n    return None, None", "is there a `return`?"),
    ("def route(x_TD, router_ED, K):\n    return x_TD[T]", "line 2 of mine.py"),
])
def test_a_broken_file_gets_a_message_and_no_traceback(source, said, tmp_path):
    (tmp_path / "mine.py").write_text(source)
    exercise = load(EXERCISES[0] / "test_exercise.py").EXERCISE
    assert said in exercise.run(tmp_path / "mine.py")[0].message


def test_a_file_that_is_not_there_is_an_error(tmp_path):
    status, output = command(EXERCISES[0], "nothing.py", cwd=tmp_path)
    assert status == 2
    assert "no file" in output
