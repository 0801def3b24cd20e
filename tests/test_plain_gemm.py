"""The plain grouped GEMMs, for GPUs without Hopper's TMA too: machine code of every target, answers in the interpreter
and on a GPU: python -m pytest tests/test_plain_gemm.py"""

from __future__ import annotations

import common.level  # isort: skip  # noqa: F401  (picks Triton's interpreter before anything imports triton)

import sys

import pytest
import torch

from common.config import Workload
from common.measure import gate
from common.model import make_inputs, make_weights, oracle, route_float64
from labs.kernels import plain_gemm, tiles
from labs.kernels.choice import SMALL_PIPELINED
from tests.cases import Case
from tests.gemm_cases import CASES, DEVICE, case_of, child, combine, dispatch, offsets
from tests.machine_code import Request, compile_all


SHARED_MEMORY = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 120: 99 * 1024}
# What the table of labs/kernels/choice.py may pick: many rows and few on every target, both dtypes where they differ.
PLANNED = [(sm, tile, "bf16") for sm in SHARED_MEMORY for tile in (plain_gemm.tile_for(sm), SMALL_PIPELINED)]
PLANNED += [(sm, plain_gemm.tile_for(sm), "fp16") for sm in (80, 90)]


def plain_request(kernel: str, sm: int, tile: plain_gemm.PlainTile, dtype: str) -> Request:
    """A plain kernel for a target."""
    weights = f"tensordesc<{dtype}[{tile.block_N}, {tile.block_K}]>" if tile.tma else f"*{dtype}"
    first = {"x_ptr": f"*{dtype}", "token_of_row_ptr": "*i32"} if "up" in kernel else {"hidden_ptr": f"*{dtype}"}
    last = {"hidden_ptr": f"*{dtype}"} if "up" in kernel else {"y_ptr": f"*{dtype}"}
    tables = {"offsets_ptr": "*i32", "tiles_ptr": "*i32", "tile_count_ptr": "*i32"}
    signature = {**first, "weights": weights, **last, **tables, "E": "i32", "D8": "i32", "F8": "i32"}
    constants = {"load_weights": f"{plain_gemm.__name__}.{'tma' if tile.tma else 'pointer'}_weights",
                 "BLOCK_M": tile.block_M, "BLOCK_N": tile.block_N, "BLOCK_K": tile.block_K}
    return Request(f"{kernel} sm_{sm} {tile} {dtype}", "labs.kernels.plain_gemm", kernel, signature, constants,
                   pointers(signature), tile.warps, tile.stages, sm)


def pointers(signature: dict[str, str]) -> tuple[str, ...]:
    """The names of the arguments that are pointers."""
    return tuple(name for name, kind in signature.items() if kind.startswith("*"))


@pytest.mark.parametrize(("sm", "tile", "dtype"), PLANNED, ids=str)
@pytest.mark.parametrize("kernel", ["plain_up_kernel", "plain_down_kernel"])
def test_plain_machine_code_is_as_planned(kernel, sm, tile, dtype):
    (found,) = compile_all([plain_request(kernel, sm, tile, dtype)]).values()
    assert found.count("HGMMA" if sm == 90 else "HMMA") > 0, "tensor cores"
    assert (found.count("UTMALDG") > 0) == tile.tma, "weights by TMA on Hopper alone"
    assert found.count(r"LDGSTS.*128") > 0, "16-byte cp.async"
    assert found.count(r"LDGSTS") == found.count(r"LDGSTS.*128")
    assert found.count(r"STG") == found.count(r"STG\.E\.128") > 0, "16-byte stores"
    assert found.count(r"LDL|STL") == 0
    assert found.stack_bytes == 0
    assert found.count(r"REDG?\.|ATOMG?\.") == 0, "no atomics: bitwise repeatable"
    assert found.shared_bytes <= SHARED_MEMORY[sm]


@pytest.mark.parametrize("sm", SHARED_MEMORY)
def test_what_goes_before_the_gemms_compiles_for_every_target(sm):
    """The table of row tiles, and rows spread before."""
    table = dict.fromkeys(("offsets_ptr", "tiles_ptr", "tile_count_ptr", "claimed_up_ptr", "claimed_down_ptr",
                           "ready_ptr", "begun_ptr", "done_ptr", "done_up_ptr"), "*i32") | {"E": "i32"}
    constants = {"BLOCKS": 2, "GROUP": 32, "BANDS": tiles.BANDS, "E_POW2": 128, "PDL": sm >= 90}
    plan = Request(f"plan sm_{sm}", "labs.kernels.tiles", "plan_tiles_kernel", table, constants, pointers(table), 4, 3,
                   sm)
    rows = {"x_ptr": "*bf16", "row_of_slot_ptr": "*i32", "rows_ptr": "*bf16", "D": "i32"}
    spread = Request(f"spread sm_{sm}", "labs.kernels.tiles", "spread_rows_kernel", rows,
                     {"TOP_K": 8, "BLOCK_D": 1024, "PDL": sm >= 90}, (*pointers(rows), "D"), 4, 3, sm)
    found = compile_all([plan, spread])
    for code in found.values():
        assert code.count(r"LDL|STL") == code.stack_bytes == 0
        assert code.count(r"REDG?\.|ATOMG?\.") == 0
        assert code.count("ACQBULK") == (sm >= 90), "waits for the kernel before, where that may still run"
    assert found[spread.name].count(r"STG\.E\.128") == 8, "a token's columns, once a slot, 16 bytes a thread"


def check_plain(case: Case, dtype: torch.dtype, tile: plain_gemm.PlainTile) -> None:
    """plain_up and plain_down against the oracle; rows past the last expert's stay as they were."""
    cfg, workload = case.config, Workload(case.config, case.T, dtype, case.routing)
    weights = make_weights(cfg, dtype, DEVICE)
    x_TD = make_inputs(workload, weights)
    scores_TK, expert_ids_TK, _ = route_float64(cfg, weights.router_ED, x_TD)
    offsets_E1, token_of_row_R, row_of_slot_TK = dispatch(expert_ids_TK, cfg.E)
    plan = tiles.plan_tiles(offsets_E1, token_of_row_R.numel(), tile.block_M, group=2)
    hidden_RF = torch.full((token_of_row_R.numel(), cfg.F), torch.nan, dtype=dtype, device=DEVICE)
    y_RD = torch.full((token_of_row_R.numel(), cfg.D), torch.nan, dtype=dtype, device=DEVICE)
    gate_up = tiles.interleave_gate_up(weights.gate_up_E2FD)
    programs = torch.cuda.get_device_properties(0).multi_processor_count if DEVICE == "cuda" else 3
    plain_gemm.plain_up(x_TD, token_of_row_R, offsets_E1, gate_up, plan, hidden_RF, programs, tile)
    plain_gemm.plain_down(hidden_RF, offsets_E1, weights.down_EDF, plan, y_RD, programs, tile)
    assert y_RD[int(offsets_E1[-1]):].isnan().all()
    out_TD = combine(y_RD, row_of_slot_TK, scores_TK)
    result = gate(out_TD, oracle(cfg, weights, x_TD), workload)
    assert result.ok, result.reason


SMALL_CASES = (
    Case("plain", T=64, D=64, F=96, E=4, K=2),
    Case("odd sizes", T=37, D=40, F=24, E=6, K=3),
    Case("one token", T=1, D=32, F=16, E=4, K=2),
    Case("one expert takes all rows", T=200, D=32, F=72, E=8, K=1, routing="one_hot"),
    Case("empty experts", T=40, D=104, F=16, E=16, K=2, routing="sparse"),
    Case("skewed", T=90, D=32, F=136, E=8, K=2, routing="skewed"),
)
SMALL_TILE = plain_gemm.PlainTile(64, 64, 32, warps=4, stages=2, tma=False)


@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "tma"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_plain_answers(case, dtype, tma):
    if DEVICE == "cuda":
        pytest.skip("the interpreter's; the compiled kernels' answers are checked below")
    check_plain(case, dtype, SMALL_TILE._replace(tma=tma))


def test_plain_kernels_refuse_unknown_targets_and_empty_calls_return():
    with pytest.raises(ValueError, match="sm_100"):
        plain_gemm.tile_for(100)
    plan = tiles.plan_tiles(offsets([0, 0]), 0, 64)
    empty, weights = torch.empty(0, 16, device=DEVICE), torch.empty(2, 16, 16, device=DEVICE)
    plain_gemm.plain_down(empty, offsets([0, 0]), weights, plan, empty, 1, SMALL_TILE)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES[:-1], ids=str)
def test_plain_answers_on_hard_cases(case):
    sm = 10 * torch.cuda.get_device_capability()[0] + torch.cuda.get_device_capability()[1]
    if sm not in plain_gemm.TILES:
        pytest.skip(f"no tile for sm_{sm}")
    child("tests.test_plain_gemm", str(case), str(sm))


if __name__ == "__main__":
    for tile in {plain_gemm.tile_for(int(sys.argv[2])), plain_gemm.CONSUMER}:
        check_plain(case_of(sys.argv[1]), torch.bfloat16, tile)
