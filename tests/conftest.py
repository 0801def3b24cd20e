"""Shared fixtures. Tests marked `gpu` are skipped, with a count, where there is no GPU."""

from __future__ import annotations

import common.level  # isort: skip  # noqa: F401  (picks Triton's interpreter before anything imports triton)

import os
import tempfile

import pytest
import torch
from torch._dynamo.trace_rules import get_torch_obj_rule_map

from tests import interpreter, machine_code

import triton  # isort: skip  (after common.level, which picks Triton's interpreter where there is no GPU)

if triton.knobs.runtime.interpret:
    interpreter.spare()
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # a worker a core: more threads would wait for each other


def pytest_configure(config: pytest.Config) -> None:
    """One folder for what a run compiles; its workers inherit the name. Each stops its own compiler."""
    config.add_cleanup(machine_code.stop)
    if machine_code.FOLDER not in os.environ:
        folder = tempfile.TemporaryDirectory(prefix="machine_code_")
        os.environ[machine_code.FOLDER] = folder.name
        config.add_cleanup(folder.cleanup)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture
def device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def poison(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what torch.empty and its kin return with NaN, so that a value nobody wrote shows.

    Where a graph or the compiler takes the place of those functions, memory is dirtied instead: NaN is
    written to a large block that is then freed for them to allocate from.
    """
    loaded = request.node.callspec.params.get("loaded")
    if loaded is not None and "cuda" in loaded.level.requires:
        if torch.cuda.is_available():
            torch.full((2**28,), float("nan"), device="cuda")
        return

    def poisoned(make):
        def call(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return call

    # torch.compile looks these functions up by name once a process: it must meet them as they are, not the ones below.
    get_torch_obj_rule_map()
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
