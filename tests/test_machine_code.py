"""The machine code of every Triton kernel, compiled for NVIDIA GPUs on any machine: what the compiler made of it.

python -m pytest tests/test_machine_code.py
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests import machine_code
from tests.cases import LEVELS
from tests.machine_code import Compiled, Request, compile_all

LEVEL4 = LEVELS[4].module
GEMM_SIGNATURE = {"a_ptr": "*bf16", "w_ptr": "*bf16", "out_ptr": "*bf16", "offsets_ptr": "*i32",
                  "E": "i32", "N": "i32", "K": "i32"}
GEMM_ALIGNED = ("a_ptr", "w_ptr", "out_ptr", "offsets_ptr", "N", "K")
SHARED_MEMORY = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 120: 99 * 1024}
LOADS = {"few": 4, "some": 32, "many": 1024}  # mean rows an expert


def gemm_request(load: str, sm: int) -> Request:
    tile = LEVEL4.choose_tile(LOADS[load], 2, SHARED_MEMORY[sm])
    constants = {"E_POW2": 128, "BLOCK_M": tile.block_M, "BLOCK_N": tile.block_N, "BLOCK_K": tile.block_K}
    return Request(f"gemm {load} sm_{sm}", "labs.level4_grouped", "grouped_gemm_kernel", GEMM_SIGNATURE, constants,
                   GEMM_ALIGNED, tile.warps, tile.stages, sm)


SILU = Request("silu_mul", "labs.level2_fused", "silu_mul_kernel",
               {"gate_up_ptr": "*bf16", "hidden_ptr": "*bf16", "F": "i32"}, {"BLOCK_F": 1024},
               ("gate_up_ptr", "hidden_ptr", "F"), warps=4, stages=3)


@pytest.fixture(scope="module")
def code() -> dict[str, Compiled]:
    return compile_all([SILU] + [gemm_request(load, sm) for load in LOADS for sm in SHARED_MEMORY])


def test_silu_mul_loads_and_stores_16_bytes(code):
    silu = code["silu_mul"]
    assert silu.count(r"LDG\.E\.128") == 2
    assert silu.count(r"STG\.E\.128") == 1
    assert silu.count(r"LDL|STL") == 0


@pytest.mark.parametrize("sm", SHARED_MEMORY)
@pytest.mark.parametrize("load", LOADS)
def test_grouped_gemm_fits_and_does_not_spill(code, load, sm):
    gemm = code[f"gemm {load} sm_{sm}"]
    assert gemm.count(r"LDL|STL") == 0
    assert gemm.stack_bytes == 0
    assert gemm.shared_bytes <= SHARED_MEMORY[sm]
    assert gemm.count(r"LDGSTS.*128") > 0, "rows and weights travel in pipelined 16-byte copies"
    assert gemm.count(r"REDG?\.|ATOM") == 0, "no atomics"


@pytest.mark.parametrize("load", LOADS)
def test_grouped_gemm_multiplies_on_the_tensor_cores(code, load):
    for sm in SHARED_MEMORY:
        warpgroup_wide = sm == 90 and load != "few"  # wgmma needs 64 rows, a tile of few has 16
        assert code[f"gemm {load} sm_{sm}"].count("HGMMA" if warpgroup_wide else "HMMA") > 0


BAD = Request("bad", "tests.bad_kernel", "bad_kernel", {"x_ptr": "*fp32"}, {"N": 128}, ("x_ptr",), warps=1, stages=1)


def test_the_reader_sees_a_spill_and_an_atomic():
    """A kernel that must spill and add atomically, to show that the checks above can fail."""
    compiled = compile_all([BAD])["bad"]
    assert compiled.count(r"LDL|STL") > 0
    assert compiled.count(r"REDG?\.|ATOM") > 0


def test_a_kernel_is_compiled_once_a_run(monkeypatch):
    compiled = compile_all([BAD])["bad"]
    monkeypatch.setattr(machine_code, "_compiler", lambda: pytest.fail("compiled again"))
    assert compile_all([replace(BAD, name="of another name")]) == {"of another name": compiled}
    with pytest.raises(pytest.fail.Exception):
        compile_all([replace(BAD, warps=2)])


def test_a_kernel_that_does_not_compile_is_an_error_each_time():
    for _ in range(2):
        with pytest.raises(RuntimeError, match="power of 2"):
            compile_all([replace(BAD, constants={"N": 3})])


def test_a_compiler_that_crashes_is_an_error_and_is_replaced():
    compiled = compile_all([BAD])["bad"]
    machine_code._compiler().kill()
    with pytest.raises(RuntimeError, match="crashed, exit status -9"):
        compile_all([replace(BAD, constants={"N": 64})])
    assert compile_all([replace(BAD, constants={"N": 64})])["bad"] != compiled
