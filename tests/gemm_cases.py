"""The cases of the grouped GEMMs, rows sorted for them the slow way, and compiled kernels in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys

import torch

from tests.cases import Case
from tests.machine_code import ROOT

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

CASES = (
    Case("plain", T=256, D=256, F=256, E=8, K=2),
    Case("odd sizes", T=257, D=264, F=136, E=7, K=3),
    Case("one K step", T=100, D=64, F=64, E=4, K=2),
    Case("less than a K step", T=70, D=8, F=8, E=4, K=2),
    Case("one token", T=1, D=256, F=256, E=8, K=2),
    Case("one expert takes all rows", T=3000, D=512, F=512, E=8, K=1, routing="one_hot"),
    Case("empty experts", T=512, D=512, F=256, E=16, K=4, routing="sparse"),
    Case("fewer rows than a tile", T=64, D=320, F=384, E=64, K=4, routing="skewed"),
    Case("many tiles a program", T=2048, D=1024, F=768, E=32, K=8),
    Case("several bands, the last one narrow", T=1000, D=1288, F=136, E=8, K=8),
    Case("fewer tokens than programs", T=70, D=2048, F=64, E=16, K=5),
    Case("one choice", T=3001, D=1536, F=128, E=4, K=1),
    Case("three choices, several bands, the ring more than once", T=1500, D=2056, F=72, E=6, K=3),
    Case("several blocks a band", T=200, D=4104, F=64, E=4, K=2),
    Case("one token, several bands", T=1, D=4104, F=64, E=4, K=2),
    Case("stored late, several bands, odd sizes", T=1000, D=1288, F=392, E=8, K=8),
    Case("stored late, fewer tokens than programs", T=70, D=2048, F=320, E=16, K=5),
    Case("stored late, a step for each part", T=1501, D=136, F=264, E=5, K=3),
    Case("stored late, one expert takes all rows", T=1400, D=4104, F=520, E=8, K=1, routing="one_hot"),
    Case("stored late, empty experts", T=512, D=2056, F=328, E=16, K=4, routing="sparse"),
    Case("more than 2 to the 31 elements", T=40000, D=8192, F=264, E=8, K=8),
)

SPARE_ROWS = 70  # beyond the routed rows, as a routing that rounds down leaves them


def dispatch(expert_ids_TK: torch.Tensor, E: int) -> tuple[torch.Tensor, ...]:
    """offsets_E1, token_of_row and row_of_slot_TK by sorting: slow, obvious, with a host sync."""
    (T, K), device = expert_ids_TK.shape, expert_ids_TK.device
    ids_R, slot_of_row_R = expert_ids_TK.flatten().sort(stable=True)
    offsets_E1 = offsets(torch.bincount(ids_R, minlength=E).tolist())
    tokens = torch.full((T * K + SPARE_ROWS,), 2**31 - 1, dtype=torch.int32, device=device)  # past x's end
    tokens[: T * K] = slot_of_row_R // K
    row_of_slot_TK = torch.empty(T * K, dtype=torch.int32, device=device)
    row_of_slot_TK[slot_of_row_R] = torch.arange(T * K, dtype=torch.int32, device=device)
    return offsets_E1, tokens, row_of_slot_TK.view(T, K)


def combine(y_RD: torch.Tensor, row_of_slot_TK: torch.Tensor, scores_TK: torch.Tensor) -> torch.Tensor:
    """(P, D) -> (T, D): each token's rows times their scores, summed in float32, one slot at a time."""
    T, K = row_of_slot_TK.shape
    out_TD = torch.zeros(T, y_RD.shape[1], device=y_RD.device)
    for k in range(K):
        out_TD += scores_TK[:, k, None].float() * y_RD[row_of_slot_TK[:, k]]
    return out_TD.to(y_RD.dtype)


def case_of(name: str) -> Case:
    """The case of this name."""
    return next(case for case in CASES if str(case) == name)


def offsets(counts: list[int]) -> torch.Tensor:
    """(E + 1,) int32: each expert's first row."""
    return torch.tensor([0, *counts], device=DEVICE).cumsum(0).int()


def child(module: str, *arguments: str, timeout: int = 240) -> None:
    """A test file's main in a process of its own, without the interpreter. A deadlocked kernel ends with it."""
    env = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT, env=env, text=True,
                          capture_output=True, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
