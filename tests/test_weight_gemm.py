"""Weight gradients on Hopper: machine code anywhere, answers on a GPU."""

from __future__ import annotations

import common.level  # isort: skip  # noqa: F401  (picks Triton's interpreter before anything imports triton)

import pytest
import torch

from labs.kernels import late_store, weight_gemm
from labs.kernels.backward_loop import tile_for
from labs.kernels.backward_sort import sort_rows
from labs.kernels.backward_weights import weight_grad
from labs.kernels.roles import _SWIZZLED, LAUNCH
from tests.machine_code import Request, compile_all

# T tokens, E experts, K top-k, R = T*K rows; G gathered columns, S sorted columns.


# ---- machine code ------------------------------------------------------------------------------------------------

VARIANTS = [(wide, accumulate) for wide in (False, True) for accumulate in (False, True)]


def request(wide: bool, accumulate: bool) -> Request:
    """The kernel as the launcher asks for it: pointers aligned, G8, S8 and length not specialised."""
    box = 64 if wide else 256
    signature = {"gathered_ptr": "*bf16", "token_of_row_ptr": "*i32",
                 "sorted_desc": f"tensordesc<bf16[64, {box}],{_SWIZZLED.value!r}>",
                 "out_ptr": "*fp32" if accumulate else "*bf16", "offsets_ptr": "*i32", "E": "i32", "G8": "i32",
                 "S8": "i32", "length": "i32"}
    aligned = tuple(name for name, kind in signature.items() if kind.startswith("*"))
    return Request(f"{wide} {accumulate}", "labs.kernels.weight_gemm", "weight_gemm_kernel", signature,
                   {"WIDE": wide, "ACCUMULATE": accumulate}, aligned, 4, 3, options=LAUNCH)


@pytest.mark.parametrize(("wide", "accumulate"), VARIANTS)
def test_machine_code_is_as_planned(wide, accumulate):
    asked = request(wide, accumulate)
    found = compile_all([asked])[asked.name]
    # A tile's first step and its loop; where tiles are stored late, once more with a step for each part between them.
    steps = 2 if accumulate else 2 + 2 + late_store.ROUNDED_PARTS
    assert found.count("HGMMA") == 2 * steps * 4, "4 wgmma of depth 16 a step"
    assert found.count("WARPGROUP") == 2 * (2 * steps + 1), "more waits would mean wgmmas one after the other"
    assert found.count("UTMALDG") > 0, "sorted rows by TMA"
    assert found.count("LDGSTS") == found.count(r"LDGSTS.*128") == 4 * (4 if wide else 2), "a step's gathered rows"
    assert found.count("ARRIVES") == 1 + wide, "all the producer's threads arrive, also where TMA fills the narrow ring"
    # Of a thread: 64 of 8 bytes; or 16 of 16, beside the steps, before a tile of few, and behind the last tile.
    stores = found.count(r"STG\.E\.64" if accumulate else r"STG\.E\.128")
    assert found.count("STG") == stores == 2 * (64 if accumulate else 3 * 16), "no narrower stores"
    assert found.count(r"LDL|STL") == found.stack_bytes == 0, "no spills"
    assert found.count(r"REDG?\.|ATOMG?\.") == 0, "no atomics: bitwise repeatable"
    assert found.registers == 168, "65536 registers over 12 warps, before they are dealt out anew"
    rings = weight_gemm.ROWS * (weight_gemm.NARROW_STAGES * 128 + weight_gemm.WIDE_STAGES * 256) * 2
    assert rings < found.shared_bytes <= rings + 1024 <= 227 * 1024


def test_runs_are_for_few_rows():
    assert weight_gemm.run_length(R=4096 * 8, E=256) == 4, "deepseek-v3: 128 rows an expert, two steps"
    assert weight_gemm.run_length(R=16384 * 8, E=128) == 1, "qwen3-30b-a3b: 1024"


# ---- answers -----------------------------------------------------------------------------------------------------

BOUND = 4e-3  # one rounding to bf16 is 1.7e-3 in the relative norm
HARD = {  # T, E, K, G, S, spread of the experts' popularity
    "one token": (1, 9, 2, 128, 256, 1.0),
    "odd sizes": (77, 7, 3, 264, 200, 0.3),
    "empty experts, few rows": (300, 40, 1, 264, 200, 5.0),
    "several tiles a program, ragged": (900, 60, 2, 520, 392, 1.0),
    "long and short experts": (3000, 6, 2, 2056, 1032, 2.0),
    "narrower than a tile": (1031, 6, 2, 520, 8, 2.0),
    "more experts than rows": (40, 512, 2, 128, 136, 0.0),
    "one expert": (200, 1, 1, 264, 200, 0.0),
    "many steps, then few, several tiles a program": (6000, 24, 4, 1032, 1544, 1.5),
}


def problem(T: int, E: int, K: int, G: int, S: int, spread: float) -> tuple[torch.Tensor, ...]:
    """offsets_E1, token_of_row_R, gathered_TG, sorted_RS, at unit scale."""
    generator = torch.Generator("cuda").manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda", generator=generator)

    ids_TK = (randn(T, E) + spread * randn(E)).topk(K).indices.int().contiguous()
    offsets_E1, token_of_row_R, _ = sort_rows(ids_TK, E)
    return offsets_E1, token_of_row_R, randn(T, G).bfloat16(), randn(T * K, S).bfloat16()


def worst_error(out: torch.Tensor, problem: tuple[torch.Tensor, ...], transposed: bool, before: float = 0.0) -> float:
    """The worst expert's relative error against float64; of an expert without rows its largest entry."""
    offsets_E1, token_of_row_R, gathered_TG, sorted_RS = problem
    errors = []
    for expert, (first, end) in enumerate(zip(offsets_E1[:-1].tolist(), offsets_E1[1:].tolist(), strict=True)):
        expected = gathered_TG[token_of_row_R[first:end].long()].double().T @ sorted_RS[first:end].double()
        wrong = (out[expert].double() - before - (expected.T if transposed else expected)).norm()
        errors.append((wrong / expected.norm() if end > first else wrong).item())
    return max(errors)


def gradient(problem: tuple[torch.Tensor, ...], transposed: bool, accumulate: bool = False,
             before: float = float("nan")) -> torch.Tensor:
    """weight_grad into a tensor that held `before`."""
    offsets_E1, token_of_row_R, gathered_TG, sorted_RS = problem
    E, G, S = offsets_E1.numel() - 1, gathered_TG.shape[1], sorted_RS.shape[1]
    out = torch.full((E, S, G) if transposed else (E, G, S), before, device="cuda",
                     dtype=torch.float32 if accumulate else torch.bfloat16)
    weight_grad(gathered_TG, token_of_row_R, sorted_RS, offsets_E1, out, tile_for(out.device, torch.bfloat16),
                transposed, accumulate, spare_rows=False)
    return out


@pytest.mark.gpu
@pytest.mark.parametrize("length", [1, 4, 5])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("case", HARD)
def test_every_experts_gradient_is_the_float64_one(case, transposed, length, monkeypatch):
    monkeypatch.setattr(weight_gemm, "run_length", lambda R, E: length)
    given = problem(*HARD[case])
    out = gradient(given, transposed)
    assert worst_error(out, given, transposed) < BOUND
    assert torch.equal(out, gradient(given, transposed)), "bit for bit"
    total = gradient(given, transposed, accumulate=True, before=0.5)
    assert worst_error(total, given, transposed, before=0.5) < 1e-4
    assert torch.equal(total, gradient(given, transposed, accumulate=True, before=0.5))


@pytest.mark.gpu
@pytest.mark.parametrize("transposed", [False, True])
def test_a_view_of_something_flat_is_taken(transposed):
    offsets_E1, token_of_row_R, gathered_TG, sorted_RS = problem(*HARD["odd sizes"])
    flat = torch.cat([gathered_TG.new_zeros(3), gathered_TG.flatten()])
    given = offsets_E1, token_of_row_R, flat[3:].view_as(gathered_TG), sorted_RS
    assert given[2].data_ptr() % 16
    assert worst_error(gradient(given, transposed), given, transposed) < BOUND


@pytest.mark.gpu
@pytest.mark.parametrize("transposed", [False, True])
def test_a_wrong_row_shows(transposed):
    offsets_E1, token_of_row_R, gathered_TG, sorted_RS = given = problem(*HARD["long and short experts"])
    token_of_row_R = token_of_row_R.clone()
    token_of_row_R[70] = (token_of_row_R[70] + 1) % len(gathered_TG)
    out = gradient((offsets_E1, token_of_row_R, gathered_TG, sorted_RS), transposed)
    assert worst_error(out, given, transposed) > BOUND

