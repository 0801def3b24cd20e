"""The kernels of level 8 and of training on small shapes, for compute-sanitizer: it finds reads and writes outside what
was allocated.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 3 python tests/sanitize.py

Without the caching allocator every tensor is an allocation of its own: past its end is past the allocation's.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from common.config import Workload
from common.measure import gate
from common.model import make_inputs, make_weights, oracle
from labs import level8_tma_overlap as level8
from labs.kernels import backward_gemm, down_combine
from labs.kernels.choice import Choice
from labs.kernels.plain_gemm import TILES
from labs.kernels.rounding import plan_rounding
from labs.kernels.routing import new_arrivals
from tests.cases import Case
from tests.test_backward import Problem, bound

CHOICES = (Choice("few_rows"), Choice("gather"), Choice("ahead"), Choice("spread"), Choice("tall", 16),
           Choice("pipelined", 8, TILES[90]))
CASES = (Case("odd", T=77, D=264, F=200, E=7, K=3), Case("one token", T=1, D=264, F=200, E=7, K=3),
         Case("one expert has all", T=300, D=264, F=200, E=5, K=1, routing="one_hot"),
         Case("three bands", T=600, D=1800, F=392, E=8, K=6), Case("many tokens", T=1031, D=264, F=328, E=6, K=2))


def forward() -> None:
    """Level 8: every choice on every case, gated; exits 1 if one is wrong."""
    down_combine.LEAST_ROWS = down_combine.LEAST_MEAN_ROWS = down_combine.THREE_BANDS = 0  # few rows reach it so
    for case in CASES:
        cfg, workload = case.config, Workload(case.config, case.T, torch.bfloat16, case.routing)
        weights = make_weights(cfg, torch.bfloat16, "cuda")
        x_TD = make_inputs(workload, weights)
        packed, arrivals_A = level8.repack(cfg, weights), new_arrivals("cuda")
        expected = oracle(cfg, weights, x_TD)
        for choice in CHOICES:
            found = gate(level8.layer(x_TD, packed, cfg, arrivals_A, choice), expected, workload)
            print(f"{case}: {choice}: {'ok' if found.ok else found.reason}", flush=True)
            if not found.ok:
                raise SystemExit(1)
    plan = plan_rounding(cfg, case.T, 64)
    for choice in (Choice("gather"), Choice("ahead")):
        level8.layer_rounded(x_TD, packed, cfg, plan, choice)
    torch.cuda.synchronize()
    print("rounded: ran")


def training() -> None:
    """Forward and backward on every case, rows gathered by the loads and copied before; exits 1 if one is wrong."""
    backward_gemm.LEAST_OPERATIONS = 0  # or no case had enough to do for warp roles
    for case in CASES:
        problem = Problem(case, torch.bfloat16, torch.device("cuda"))
        for backward_gemm.COPY_FROM in (0, 2**30):
            errors = problem.errors(problem.run())
            ok = max(errors.values()) <= bound(torch.bfloat16)
            print(f"{case}: training, copied from F = {backward_gemm.COPY_FROM}: {'ok' if ok else errors}", flush=True)
            if not ok:
                raise SystemExit(1)


if __name__ == "__main__":
    forward()
    training()
