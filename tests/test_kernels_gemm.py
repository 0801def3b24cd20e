"""The grouped GEMMs of labs/kernels for Hopper: what they refuse, machine code without a GPU, answers on one.

python -m pytest tests/test_kernels_gemm.py
"""

from __future__ import annotations

import common.level  # isort: skip  # noqa: F401  (picks Triton's interpreter before anything imports triton)

import sys

import pytest
import torch

from common.config import MoEConfig, Workload
from common.measure import gate
from common.model import make_inputs, make_weights, oracle, route_float64
from labs.kernels import (
    backward_gemm,
    down_combine,
    grouped_gemm,
    late_store,
    plain_gemm,
    roles,
    tall_gemm,
    tiles,
    train_gemm,
    up_ahead,
)
from tests.cases import Case
from tests.gemm_cases import CASES, case_of, child, combine, dispatch, offsets
from tests.machine_code import Compiled, Request, compile_all


# ---- what the launchers refuse


def operands(D: int = 256, F: int = 256, dtype: torch.dtype = torch.bfloat16, tile_rows: int = 128) -> dict:
    plan = tiles.TilePlan(torch.empty(3, 5, dtype=torch.int32), torch.empty(1, dtype=torch.int32), tile_rows,
                          *(torch.empty(n, dtype=torch.int32) for n in (1, 1, 3, 1, tiles.BANDS, 2)), [])
    return {"rows": torch.empty(128, D, dtype=dtype), "gate_up": torch.empty(2, 2 * F, D, dtype=dtype),
            "down": torch.empty(2, D, F, dtype=dtype), "hidden": torch.empty(128, F, dtype=dtype), "plan": plan}


@pytest.mark.parametrize(("change", "message"), [
    ({"D": 260}, "multiples of 8"), ({"F": 250}, "multiples of 8"), ({"dtype": torch.float16}, "bfloat16"),
    ({"tile_rows": 192}, "tiles of 192 rows"),
])
def test_wrong_sizes_dtypes_and_plans_are_refused(change, message):
    given = operands(**change)
    rows, plan, hidden = given["rows"], given["plan"], given["hidden"]
    with pytest.raises(ValueError, match=message):
        grouped_gemm.up_rows(rows, given["gate_up"], plan, hidden, 1)
    with pytest.raises(ValueError, match=message):
        grouped_gemm.down(hidden, given["down"], plan, torch.empty_like(rows), 1)


def test_wrong_shapes_are_refused():
    given = operands()
    tokens = torch.empty(128, dtype=torch.int64)
    with pytest.raises(ValueError, match="gate_up_E2FD"):
        grouped_gemm.up_rows(given["rows"], torch.empty(2, 513, 256).bfloat16(), given["plan"], given["hidden"], 1)
    with pytest.raises(ValueError, match="token_of_row_R"):
        grouped_gemm.up_gather(given["rows"], tokens, given["gate_up"], given["plan"], given["hidden"], 1)
    with pytest.raises(ValueError, match="hidden_RF"):
        grouped_gemm.up_rows(given["rows"], given["gate_up"], given["plan"], given["hidden"][:64], 1)
    for launch, arguments, shape in ((grouped_gemm.up_rows, ("rows", "gate_up"), (128, 256)),
                                     (grouped_gemm.down, ("hidden", "down"), (128, 256))):
        view = torch.empty(1 + shape[0] * shape[1]).bfloat16()[1:].view(shape)
        with pytest.raises(ValueError, match="16 does not divide"):
            launch(*(given[name] for name in arguments), given["plan"], view, 1)
    with pytest.raises(ValueError, match="contiguous"):
        grouped_gemm.up_rows(given["rows"][:, ::2], given["gate_up"][..., ::2], given["plan"], given["hidden"], 1)
    with pytest.raises(ValueError, match="multiple of 8"):
        tiles.interleave_gate_up(torch.empty(1, 24, 8))
    with pytest.raises(ValueError, match="tile_rows"):
        tiles.plan_tiles(offsets([64]), 64, 100)
    with pytest.raises(ValueError, match="offsets_E1"):
        tiles.plan_tiles(offsets([64]).long(), 64)


def test_down_combine_refuses_what_does_not_fit():
    given = operands()
    hidden, down, plan = given["hidden"], given["down"], given["plan"]

    def call(T: int, K: int, dtype: torch.dtype = torch.int32, scores: torch.dtype = torch.float32) -> torch.Tensor:
        out = torch.empty(T, 256, dtype=torch.bfloat16)
        return down_combine.down_combine(hidden[: T * K], down, plan, torch.zeros(T, K, dtype=dtype),
                                         torch.zeros(T, K, dtype=scores), given["rows"][: T * K], out, 1)

    for message, arguments in {"K=9": (2, 9), "row_of_slot_TK is int64": (2, 2, torch.int64),
                               "scores_TK is float16": (2, 2, torch.int32, torch.float16)}.items():
        with pytest.raises(ValueError, match=message):
            call(*arguments)
    with pytest.raises(ValueError, match="hidden_RF"):
        down_combine.down_combine(hidden, down, plan, torch.zeros(3, 2).int(), torch.zeros(3, 2), given["rows"],
                                  given["rows"][:3], 1)
    for edges in ((0, 1), (1, 2), (2, 1)):
        with pytest.raises(ValueError, match=rf"edges=\({edges[0]}, {edges[1]}\): need two rising"):
            down_combine.down_combine(hidden, down, plan, torch.zeros(64, 2).int(), torch.zeros(64, 2), given["rows"],
                                      given["rows"][:64], 1, edges=edges)
    assert call(0, 2).shape == (0, 256)


def test_down_begins_early_only_after_an_up_that_counts():
    """It would wait for good."""
    given = operands()
    hidden, down, plan, rows = given["hidden"], given["down"], given["plan"], given["rows"]
    plan.count_once("up")
    for programs in (1, 132):
        with pytest.raises(ValueError, match="early=True, but this plan"):
            grouped_gemm.down(hidden, down, plan, rows, programs, early=True)
        with pytest.raises(ValueError, match="early=True, but this plan"):
            down_combine.down_combine(hidden, down, plan, torch.zeros(64, 2).int(), torch.zeros(64, 2), rows,
                                      rows[:64], programs, early=True)
    plan.count_parts(132)
    plan.require_parts(132)


def test_a_plan_counts_once():
    plan = tiles.plan_tiles(offsets([3]), 3)
    plan.count_once("up")
    plan.count_once("down")
    with pytest.raises(ValueError, match="one up projection already"):
        plan.count_once("up")


def test_down_combine_hands_its_arguments_on_in_their_order(monkeypatch):
    given, combined, names = {}, [], down_combine.down_combine_kernel.arg_names

    class Recorder:
        def __getitem__(self, grid):
            return lambda *values, **constants: given.update(zip(names, values, strict=False), **constants)

    monkeypatch.setattr(down_combine, "down_combine_kernel", Recorder())
    monkeypatch.setattr(down_combine, "combine", lambda *values: combined.extend(values) or values[3])
    tensors = operands(D=1288, F=256)
    hidden, plan = tensors["hidden"], tensors["plan"]
    slots, scores = torch.zeros(16, 8, dtype=torch.int32), torch.zeros(16, 8)
    out, y = torch.empty(16, 1288, dtype=torch.bfloat16), torch.empty(128, 1288, dtype=torch.bfloat16)
    assert down_combine.down_combine(hidden, tensors["down"], plan, slots, scores, y, out, 1) is out
    assert given["hidden_desc"].base is hidden
    for name, tensor in {"tiles_ptr": plan.tiles_X5, "tile_count_ptr": plan.tile_count, "done_ptr": plan.done_B,
                         "claimed_ptr": plan.claimed_down, "row_of_slot_ptr": slots, "scores_ptr": scores,
                         "out_ptr": out, "y_ptr": y, "done_up_ptr": plan.done_up}.items():
        assert given[name] is tensor, name
    assert (given["D8"], given["F8"], given["T"]) == (161, 32, 16)
    edges = down_combine.edges_for(1288, 256, 8, 16 * 8 / tensors["down"].shape[0])
    assert (given["second"], given["third"]) == edges == (3, 6)
    assert (given["TOP_K"], given["CHOICES"], given["LATE"], given["EARLY"]) == (8, 8, False, False)
    assert all(one is other for one, other in zip(combined, (given["y_ptr"], slots, scores, out), strict=False))
    assert combined[4] == 768, "the last band is combine's"


def test_up_ahead_hands_its_arguments_on_in_their_order(monkeypatch):
    given, names = {}, [name for name in up_ahead.up_ahead_kernel.arg_names if name != "LATE"]

    class Recorder:
        def __getitem__(self, grid):
            return lambda *values, **options: given.update(zip(names, values, strict=True), **options)

    monkeypatch.setattr(up_ahead, "up_ahead_kernel", Recorder())
    tensors = operands(D=320, F=256)
    x, gate_up, hidden, plan = (tensors[name] for name in ("rows", "gate_up", "hidden", "plan"))
    tokens = torch.zeros(128, dtype=torch.int32)
    up_ahead.up_ahead(x, tokens, gate_up, plan, hidden, 1)
    for name, tensor in {"x_ptr": x, "token_of_row_ptr": tokens, "ready_ptr": plan.ready_X, "begun_ptr": plan.begun,
                         "hidden_ptr": hidden, "tiles_ptr": plan.tiles_X5, "tile_count_ptr": plan.tile_count,
                         "claimed_ptr": plan.claimed_up}.items():
        assert given[name] is tensor, name
    assert given["rows_desc"].base is given["rows_ptr"]
    assert given["rows_ptr"].shape == (128, 320)
    assert given["gate_up_desc"].base.data_ptr() == gate_up.data_ptr()
    assert (given["D8"], given["F8"], given["LATE"], given["launch_cooperative_grid"]) == (40, 32, True, True)
    with pytest.raises(ValueError, match="token_of_row_R"):
        up_ahead.up_ahead(x, tokens.long(), gate_up, plan, hidden, 1)
    with pytest.raises(ValueError, match="one up projection already"):
        grouped_gemm.up_rows(x, gate_up, plan, hidden, 1)


def test_no_rows_launch_nothing(monkeypatch):
    """No kernel runs on a CPU, and TMA describes no empty matrix: the launchers return before both."""
    monkeypatch.setattr(backward_gemm, "LEAST_OPERATIONS", 0)
    given, tokens = operands(D=320, F=256), torch.empty(0, dtype=torch.int32)
    rows, hidden, plan = given["rows"][:0], given["hidden"][:0], given["plan"]
    grouped_gemm.up_gather(given["rows"], tokens, given["gate_up"], plan, hidden, 1)
    grouped_gemm.up_rows(rows, given["gate_up"], plan, hidden, 1)
    up_ahead.up_ahead(given["rows"], tokens, given["gate_up"], plan, hidden, 1)
    grouped_gemm.down(hidden, given["down"], plan, rows, 1)
    grouped_gemm.straight(hidden, given["gate_up"].view(4, 256, 320), plan, rows, 1)
    hopper = plain_gemm.TILES[90]
    assert backward_gemm.has_warp_roles(hopper, given["down"], 0)
    offsets_E1 = torch.zeros(3, dtype=torch.int32)
    for part in backward_gemm.up(given["rows"], tokens, offsets_E1, given["gate_up"], plan, hopper):
        assert part.shape[0] == 0
    h = hidden.new_empty(0, 512)
    for transposed, weights, values in ((True, given["down"], hidden), (False, given["gate_up"], h)):
        assert backward_gemm.multiply_rows(values, offsets_E1, weights, plan, hopper, transposed).shape == (0, 320)
    scores = torch.empty(0)
    for part in backward_gemm.hidden_grad(given["rows"], tokens, scores, offsets_E1, given["down"], h, plan, hopper):
        assert part.numel() == 0
    assert plan.counted == []


def test_small_gemms_of_training_have_no_warp_roles():
    """Nor has another dtype, or a GPU without TMA."""
    hopper, weights = plain_gemm.TILES[90], torch.empty(8, 512, 1024, dtype=torch.bfloat16, device="meta")
    assert not backward_gemm.has_warp_roles(hopper, weights, 16384)
    assert backward_gemm.has_warp_roles(hopper, weights, 1 << 20)
    assert not backward_gemm.has_warp_roles(hopper, weights.half(), 1 << 20)
    assert not backward_gemm.has_warp_roles(plain_gemm.TILES[80], weights, 1 << 20)


def test_tall_kernels_refuse_a_short_inner_dimension():
    given = operands(D=192, F=192, tile_rows=192)
    with pytest.raises(ValueError, match="D=192"):
        tall_gemm.tall_up_rows(given["rows"], given["gate_up"], given["plan"], given["hidden"], 1)
    with pytest.raises(ValueError, match="F=192"):
        tall_gemm.tall_down(given["hidden"], given["down"], given["plan"], given["rows"], 1)


@pytest.mark.parametrize(("module", "prefix", "tile_rows"), [(grouped_gemm, "", 128), (tall_gemm, "tall_", 192)],
                         ids=["grouped", "tall"])
def test_arguments_reach_the_kernels_in_their_order(module, prefix, tile_rows, monkeypatch):
    """The kernels run on a GPU only; that each parameter gets its own tensor shows anywhere."""
    given: dict = {}

    class Recorder:
        def __init__(self, names: list[str]):
            self.names = [name for name in names if name not in ("LATE", "EARLY", "EVEN_K")]

        def __getitem__(self, grid):
            return lambda *arguments, **options: given.update(zip(self.names, arguments, strict=True), **options)

    kernels = [name for name in KERNELS if name.startswith("tall") == (prefix == "tall_")]
    for kernel in kernels:
        monkeypatch.setattr(module, kernel, Recorder(getattr(module, kernel).arg_names))
    tensors = operands(D=320, F=256, tile_rows=tile_rows)
    rows, gate_up, down, hidden, plan = (tensors[name] for name in ("rows", "gate_up", "down", "hidden", "plan"))
    tokens, y = torch.zeros(128, dtype=torch.int32), torch.empty_like(rows)

    if "up_gather_kernel" in kernels:
        grouped_gemm.up_gather(rows, tokens, gate_up, plan, hidden, 1)
        assert given["x_ptr"] is rows
        assert given["token_of_row_ptr"] is tokens
        assert given["claimed_ptr"] is plan.claimed_up
        assert given["EVEN_K"]
        plan.counted.clear()
        grouped_gemm.up_gather(rows[:, :312].contiguous(), tokens, gate_up[..., :312].contiguous(), plan, hidden, 1)
        assert not given["EVEN_K"]
        plan.counted.clear()
    getattr(module, f"{prefix}up_rows")(rows, gate_up, plan, hidden, 1)
    assert given["gate_up_desc"].base.data_ptr() == gate_up.data_ptr()
    assert (*given["gate_up_desc"].shape, *given["gate_up_desc"].block_shape) == (16, 8, 4, 2, 320, 4, 8, 4, 2, 64)
    assert given["hidden_ptr"] is hidden
    assert given["tiles_ptr"] is plan.tiles_X5
    assert given["tile_count_ptr"] is plan.tile_count
    assert (given["D8"], given["F8"]) == (40, 32)
    assert prefix or (given["claimed_ptr"] is plan.claimed_up and given["LATE"] is True)
    assert given["rows_desc"].base is rows
    assert given["rows_desc"].block_shape == [64, 64]
    if "straight_kernel" in kernels:
        grouped_gemm.straight(rows, down, plan, hidden, 1)
        assert given["rows_desc"].base is rows
        assert (*given["weights_desc"].shape, *given["weights_desc"].block_shape) == (2, 320, 256, 1, 64, 256)
        assert given["out_ptr"] is hidden
        assert given["claimed_ptr"] is plan.claimed_down
        assert (given["N8"], given["K8"], given["LATE"]) == (32, 40, True)
        plan.counted.clear()
    getattr(module, f"{prefix}down")(hidden, down, plan, y, 1)
    assert given["hidden_desc"].base is hidden
    assert (*given["down_desc"].shape, *given["down_desc"].block_shape) == (20, 4, 4, 2, 256, 8, 4, 4, 2, 64)
    assert given["y_ptr"] is y
    assert prefix or (given["claimed_ptr"] is plan.claimed_down and given["LATE"] is False)
    assert (given["D8"], given["F8"]) == (40, 32)


def test_tiles_are_finished_late_where_each_part_has_a_step():
    """A tile's first step has nothing beside it."""
    assert not late_store.finishes_late(256, late_store.ROUNDED_PARTS)
    assert late_store.finishes_late(264, late_store.ROUNDED_PARTS)
    assert not late_store.finishes_late(128, late_store.HIDDEN_PARTS)
    assert late_store.finishes_late(136, late_store.HIDDEN_PARTS)


@pytest.mark.parametrize(("interleaved", "N"), [(False, 320), (True, 320), (False, 328), (True, 352)])
def test_weight_rows_are_dealt_to_the_threads_that_store_them(interleaved, N):
    """Read as TMA would read it: a thread's columns of wgmma's accumulator are neighbours, gate's beside up's."""
    E, K, column = 2, 64, torch.arange(256)
    weights = (torch.arange(E * N).view(E, N, 1) % 256 + torch.zeros(K)).to(torch.bfloat16)  # exact up to 256
    descriptor = roles.describe_weights(weights, interleaved)
    view = descriptor.base.as_strided(descriptor.shape, descriptor.strides)
    if N % (64 if interleaved else 32):
        assert (*descriptor.shape, *descriptor.block_shape) == (E * N, K, 256, 64)
        return
    blocks, block = descriptor.block_shape[0], descriptor.shape[0] // E  # the second expert's first column tile
    found = view[block:block + blocks].reshape(-1, K)[:, 0].long()
    quad = column % 8 // 2  # of four threads that share an accumulator's row, the one that holds the column
    for q in range(4):
        held = (found[quad == q] - N) % 256
        if interleaved:
            gate, up = held.view(4, 2, 8).unbind(1)
            assert torch.equal(up, gate + 8)  # blocks of 8 gate and 8 up rows in turn
            held = gate // 16 * 8 + gate % 8  # hidden columns
        runs = held.view(-1, 8)
        assert torch.equal(runs, runs[:, :1] + torch.arange(8))
        assert torch.equal(runs[:, 0], torch.arange(len(runs)) * 32 + 8 * q)


# ---- machine code


def describe(rows: int) -> str:
    return f"tensordesc<bf16[{rows}, 64],{roles._SWIZZLED.value!r}>"


def box(*sizes: int) -> str:
    """A descriptor's type of three or five dimensions."""
    layout = {3: roles._SWIZZLED_3D, 5: roles._SWIZZLED_5D}[len(sizes)]
    return f"tensordesc<bf16[{', '.join(map(str, sizes))}],{layout.value!r}>"


DEALT = {"gate_up_desc": box(4, 8, 4, 2, 64), "down_desc": box(8, 4, 4, 2, 64)}


TABLE = {"tiles_ptr": "*i32", "tile_count_ptr": "*i32", "D8": "i32", "F8": "i32"}
CLAIMED = {"claimed_ptr": "*i32"}
GATHER = {"x_ptr": "*bf16", "token_of_row_ptr": "*i32", **CLAIMED, "gate_up_desc": DEALT["gate_up_desc"],
          "hidden_ptr": "*bf16", **TABLE, "done_ptr": "*i32"}
UP = {"rows_desc": describe(64), "gate_up_desc": DEALT["gate_up_desc"], "hidden_ptr": "*bf16", **TABLE}
DOWN = {"hidden_desc": describe(64), "down_desc": DEALT["down_desc"], "y_ptr": "*bf16", **TABLE}
AFTER_UP = {"done_up_ptr": "*i32"}
STRAIGHT = {**CLAIMED, "rows_desc": describe(64), "weights_desc": box(1, 64, 256),
            "out_ptr": "*bf16", "tiles_ptr": "*i32", "tile_count_ptr": "*i32", "N8": "i32", "K8": "i32"}
KERNELS = {
    "up_gather_kernel": ("grouped_gemm", GATHER), "up_rows_kernel": ("grouped_gemm", {**CLAIMED, **UP}),
    "down_kernel": ("grouped_gemm", {**CLAIMED, **DOWN, **AFTER_UP}), "tall_up_rows_kernel": ("tall_gemm", UP),
    "tall_down_kernel": ("tall_gemm", DOWN), "straight_kernel": ("grouped_gemm", STRAIGHT),
}


AHEAD = {"x_ptr": "*bf16", "token_of_row_ptr": "*i32", "rows_desc": describe(64), "rows_ptr": "*bf16",
         "ready_ptr": "*i32", "begun_ptr": "*i32", **CLAIMED, "gate_up_desc": DEALT["gate_up_desc"],
         "hidden_ptr": "*bf16", **TABLE}
COMBINE = {**CLAIMED, **DOWN, "row_of_slot_ptr": "*i32", "scores_ptr": "*fp32", "out_ptr": "*bf16", "done_ptr": "*i32",
           "T": "i32", "second": "i32", "third": "i32", **AFTER_UP}
CHOICES = {1: 1, 2: 2, 3: 4, 6: 8, 8: 8}  # top-k, and the power of 2 from it on


def request(kernel: str, constants: dict | None = None, dealt: bool = True, late: bool | None = None,
            early: bool = False, even: bool = True) -> Request:
    """A Gluon kernel with its pointers aligned; its integers are not specialised. `dealt`: weight rows are; `late`:
    tiles are finished late, None where a kernel knows no such thing; `early`: down begins before up has ended; `even`:
    up gathers rows of whole steps of 64 columns."""
    file, signature = {"down_combine_kernel": ("down_combine", COMBINE), "up_ahead_kernel": ("up_ahead", AHEAD),
                       **KERNELS}[kernel]
    if not dealt:
        signature = {name: describe(256) if name in DEALT else kind for name, kind in signature.items()}
    aligned = tuple(name for name, kind in signature.items() if kind.startswith("*"))
    constants = (constants or {}) | ({} if late is None else {"LATE": late})
    if "done_up_ptr" in signature:
        constants["EARLY"] = early
    if kernel == "up_gather_kernel":
        constants["EVEN_K"] = even
    name = " ".join([kernel, *(["late"] if late else []), *([] if dealt else ["in order"]), *["early"] * early,
                     *["with a column mask"] * (constants.get("EVEN_K") is False)])
    return Request(name, f"labs.kernels.{file}", kernel, signature, constants, aligned, 4, 3, options=roles.LAUNCH)


def variants(kernel: str) -> list[tuple[bool | None, bool, bool]]:
    """(late, dealt, even) of a kernel. The tall ones finish at once; straight weights lie in their order; others than
    the one that gathers know no column mask."""
    lates = (None,) if kernel.startswith("tall") else (False, True)
    deals = (True,) if kernel == "straight_kernel" else (True, False)
    evens = (True, False) if kernel == "up_gather_kernel" else (True,)
    return [(late, dealt, even) for late in lates for dealt in deals for even in evens]


def steps_of(kernel: str, late: bool | None) -> int:
    """K steps that stand in a consumer's code: a tile's first, the loop's, and those with a part beside them."""
    return 2 + (0 if not late else late_store.HIDDEN_PARTS if "up" in kernel else late_store.ROUNDED_PARTS)


def stores_of(kernel: str, late: bool | None) -> int:
    """16-byte stores of a thread in a consumer's code. Late: the half of up that does not wait, then each part beside a
    step and once more behind the last tile, and with bands or parts before the first tile of one."""
    whole = 8 if "up" in kernel else 16
    if not late:
        return whole
    waiting = whole // 2 if "up" in kernel else whole
    return whole - waiting + (3 if kernel in ("down_combine_kernel", "up_gather_kernel") else 2) * waiting


@pytest.fixture(scope="module")
def code() -> dict[str, Compiled]:
    return compile_all([request(kernel, None, dealt, late, even=even)
                        for kernel in KERNELS for late, dealt, even in variants(kernel)])


@pytest.mark.parametrize(("kernel", "late", "dealt", "even"), [(kernel, *each) for kernel in KERNELS
                                                               for each in variants(kernel)])
def test_machine_code_is_as_planned(code, kernel, late, dealt, even):
    found = code[request(kernel, None, dealt, late, even=even).name]
    warpgroups = 3 if kernel.startswith("tall") else 2
    steps = steps_of(kernel, late)
    assert found.count("HGMMA") == warpgroups * steps * 4, "4 wgmma of depth 16 a step"
    assert found.count("WARPGROUP") == warpgroups * (2 * steps + 1), "more waits would mean wgmmas one after the other"
    assert found.count("UTMALDG") > 0, "weights by TMA"
    copies = found.count(r"LDGSTS.*128")
    assert copies > 0 if "gather" in kernel else copies == 0, "gathered rows by 16-byte cp.async, others by TMA"
    assert found.count(r"STG") == found.count(r"STG\.E\.128") == warpgroups * stores_of(kernel, late)
    assert found.stack_bytes == 0
    assert found.count(r"LDL|STL") == 0, "no spills"
    claims = 0 if kernel.startswith("tall") else 2
    looked_up = 0 if claims == 0 else 2 + 5  # claims and fields of the next tile, taken out of lanes
    assert found.count(r"ATOMG") == found.count(r"ATOMG\.E\.ADD\.STRONG\.GPU") == claims, "the first and the next ones"
    counters = 2 if kernel == "up_gather_kernel" else 0
    assert found.count(r"RED") - looked_up == found.count(r"REDG\.E\.ADD\.STRONG\.GPU") == counters, "parts stored"
    assert found.count("REDUX") == looked_up, "as scalars they would be waited for where they are asked for"
    assert found.registers == 168, "65536 registers over 12 warps, before they are dealt out anew"
    stage = (warpgroups * 64 + 256) * 64 * 2
    assert 4 * stage < found.shared_bytes <= min(4 * stage + 1024, 227 * 1024)
    if not dealt:  # the epilogue swaps half the registers of what it stores with the neighbours, twice
        as_dealt = code[request(kernel, None, True, late, even=even).name]
        swaps = warpgroups * 4 * stores_of(kernel, late)
        assert found.count("SHFL") - as_dealt.count("SHFL") == swaps
        assert found.count("SEL") - as_dealt.count("SEL") >= 2.5 * swaps


SPARE_WARPS = {"up_ahead_kernel": (8, 2, 3), **{f"down_combine_kernel, top {K}": (CHOICES[K], 2, 2) for K in CHOICES}}
IN_ORDER = ("up_ahead_kernel", "down_combine_kernel, top 8")


@pytest.mark.parametrize(("name", "dealt", "late"), [*((name, True, True) for name in SPARE_WARPS),
                                                     *((name, dealt, late) for name in IN_ORDER
                                                       for dealt, late in ((False, True), (True, False)))])
def test_machine_code_with_spare_warps_is_as_planned(name, dealt, late):
    copies, roles, counters = SPARE_WARPS[name]
    kernel, _, K = name.partition(", top ")
    asked = request(kernel, {"TOP_K": int(K), "CHOICES": CHOICES[int(K)]} if K else None, dealt, late)
    found = compile_all([asked])[asked.name]
    steps = steps_of(kernel, late)
    assert found.count("HGMMA") == 2 * steps * 4
    assert found.count("WARPGROUP") == 2 * (2 * steps + 1), "more waits would mean wgmmas one after the other"
    assert found.count("UTMALDG") > 0
    assert found.count(r"LDGSTS.*128") == roles * copies, "the spare warps' rows by 16-byte cp.async"
    assert (found.count("LDGSTS") > roles * copies) == (kernel == "down_combine_kernel"), "rows' numbers by 4 bytes"
    spare = roles * (1 if K else 8)  # stores of the spare warps: of a sum each, of a unit of rows each
    assert found.count(r"STG") == found.count(r"STG\.E\.128") == 2 * stores_of(kernel, late) + spare
    assert found.count(r"LDL|STL") == found.stack_bytes == 0, "no spills"
    atomics, claims = found.count(r"REDG?\.|ATOMG?\."), found.count(r"ATOMG\.E\.ADD\.STRONG\.GPU")
    assert claims == 2, "the first claim and the next ones"
    assert found.count("REDUX") == 2 + 5, "claims and fields of the next tile, taken out of lanes"
    if kernel == "down_combine_kernel":
        (alone,) = compile_all([request("down_kernel", None, dealt, late)]).values()
        assert found.count(r"LDG\.") == alone.count(r"LDG\.") + roles, "which acquire; what combiners load are copies"
    assert atomics - claims == found.count(r"REDG\.E\.ADD\.STRONG\.GPU") == counters, "counters, no sums"
    fences = found.count(r"FENCE\.VIEW\.ASYNC\.G")
    assert fences == (0 if K else roles + 1), "stores that TMA reads"
    assert found.count(r"MEMBAR\.ALL\.GPU") == (counters if K else roles), "released"
    assert found.count(r"CCTL\.IVALL") == (roles if K else 1), "acquired"
    assert found.registers == 168
    assert found.shared_bytes <= 227 * 1024


@pytest.mark.parametrize("dealt", [True, False])
@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize("kernel", ["down_kernel", "down_combine_kernel"])
def test_machine_code_of_down_that_begins_early_is_as_planned(kernel, late, dealt):
    """down's own, but for what waits: for up's first part, and for up's end before other rows and its own end."""
    combined = {"TOP_K": 8, "CHOICES": 8} if "combine" in kernel else None
    early, asked = request(kernel, combined, dealt, late, True), request(kernel, combined, dealt, late)
    found, usual = (compile_all([early, asked])[one.name] for one in (early, asked))
    for opcode in ("HGMMA", "WARPGROUP", "UTMALDG", "STG", "LDGSTS", "REDUX", "REDG", "ATOMG"):
        assert found.count(opcode) == usual.count(opcode)
    assert found.count("NANOSLEEP") == usual.count("NANOSLEEP") + 1
    assert found.count("ACQBULK") == 2
    assert found.count(r"FENCE\.VIEW\.ASYNC\.G") == 1, "rows stored one by one, read by TMA"
    assert found.count(r"LDL|STL") == found.stack_bytes == 0, "no spills"
    assert found.registers == usual.registers == 168


H_PART = f"tensordesc<bf16[64, 32],{train_gemm._SWIZZLED_PART.value!r}>"
TRAINING = {
    "train_up_kernel": {"gate_up_desc": box(2, 128, 64), "h_ptr": "*bf16", "hidden_ptr": "*bf16", **TABLE},
    "hidden_grad_kernel": {"down_desc": box(1, 64, 256), "score_of_row_ptr": "*fp32", "h_desc": H_PART,
                           "dh_ptr": "*bf16", "scaled_ptr": "*bf16", "d_scores_ptr": "*fp32", "R": "i32", **TABLE},
}


def training_request(kernel: str, gathered: bool, even: bool = True) -> Request:
    """A kernel of training, whose rows the loads gather, of whole steps of 64 columns or not, or TMA reads in their
    order."""
    signature = {"rows": "*bf16" if gathered else describe(64), "token_of_row_ptr": "*i32", **CLAIMED,
                 **TRAINING[kernel]}
    aligned = tuple(name for name, kind in signature.items() if kind.startswith("*"))
    return Request(f"{kernel} {gathered} {even}", "labs.kernels.train_gemm", kernel, signature,
                   {"GATHERED": gathered, "EVEN_K": even}, aligned, 4, 3, options=roles.LAUNCH)


@pytest.mark.parametrize(("gathered", "even"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("kernel", TRAINING)
def test_machine_code_of_training_is_as_planned(kernel, gathered, even):
    asked = training_request(kernel, gathered, even)
    found = compile_all([asked])[asked.name]
    assert found.count("HGMMA") == 2 * 2 * 4
    assert found.count("WARPGROUP") == 2 * 5, "more waits would mean wgmmas one after the other"
    assert found.count("UTMALDG") > 0
    stretches = 5  # of K steps, between which parts of the next tile's look-up stand
    assert found.count("LDGSTS") == found.count(r"LDGSTS.*128") == (8 * stretches if gathered else 0)
    # dS is stored by 4 bytes, a row's by one thread in four.
    assert found.count(r"STG") - found.count(r"STG\.E\.128") == (4 if kernel == "hidden_grad_kernel" else 0)
    if kernel == "hidden_grad_kernel":
        assert found.count(r"LDSM") == 2 * 4, "H from shared memory, by each warpgroup"
        assert found.count(r"STG\.E\.128") == 2 * 6, "one part's: the epilogue is a loop"
    assert found.stack_bytes <= 40, "a few values spilled, in the epilogue and at a tile's beginning"
    assert found.count(r"REDG?\.|ATOMG?\.") == found.count(r"ATOMG\.E\.ADD\.STRONG\.GPU") == 2, "claims, no sums"
    assert found.registers == 168


# ---- answers, on a GPU

class Buffers:
    """Output buffers full of NaN, with rows beyond their end that nobody may write."""

    def __init__(self, *shapes: tuple[int, int]):
        self.whole = [torch.full((P + 192, width), torch.nan, dtype=torch.bfloat16, device="cuda")
                      for P, width in shapes]
        self.parts = [whole[:-192] for whole in self.whole]

    def check_tails(self) -> None:
        assert all(whole[-192:].isnan().all() for whole in self.whole), "stored past the end"


def check_answers(case: Case) -> None:
    """Every pair of up and down kernels that this case allows, against the oracle, twice."""
    cfg, programs = case.config, torch.cuda.get_device_properties(0).multi_processor_count
    workload = Workload(cfg, case.T, torch.bfloat16, case.routing)
    weights = make_weights(cfg, torch.bfloat16, "cuda")
    x_TD = make_inputs(workload, weights)
    expected = oracle(cfg, weights, x_TD)
    scores_TK, expert_ids_TK, _ = route_float64(cfg, weights.router_ED, x_TD)
    offsets_E1, token_of_row_R, row_of_slot_TK = dispatch(expert_ids_TK, cfg.E)
    R = token_of_row_R.numel()
    gate_up = tiles.interleave_gate_up(weights.gate_up_E2FD)

    def plan() -> tiles.TilePlan:
        return tiles.plan_tiles(offsets_E1, R)

    tall_plan = tiles.plan_tiles(offsets_E1, R, tall_gemm.TILE_ROWS, tall_gemm.GROUP)

    def with_rows(up, plan, rows_RD, hidden_RF):
        tiles.spread_rows(x_TD, row_of_slot_TK, rows_RD)
        up(rows_RD, gate_up, plan, hidden_RF, programs)

    ups = {
        "up_gather": lambda _, h: grouped_gemm.up_gather(x_TD, token_of_row_R, gate_up, plan(), h, programs),
        "up_rows": lambda rows, h: with_rows(grouped_gemm.up_rows, plan(), rows, h),
        "up_ahead": lambda _, h: up_ahead.up_ahead(x_TD, token_of_row_R, gate_up, plan(), h, programs),
    }
    downs = {"down": lambda h, y: grouped_gemm.down(h, weights.down_EDF, plan(), y, programs)}
    if cfg.D > tall_gemm.PREFETCHED:
        ups["tall_up_rows"] = lambda rows, h: with_rows(tall_gemm.tall_up_rows, tall_plan, rows, h)
    if cfg.F > tall_gemm.PREFETCHED:
        downs["tall_down"] = lambda h, y: tall_gemm.tall_down(h, weights.down_EDF, tall_plan, y, programs)

    for up_name, up in ups.items():
        for down_name, down in downs.items():
            outs = []
            for _ in range(2):
                buffers = Buffers((R, cfg.D), (R, cfg.F), (R, cfg.D))
                rows_RD, hidden_RF, y_RD = buffers.parts
                up(rows_RD, hidden_RF)
                down(hidden_RF, y_RD)
                outs.append(combine(y_RD, row_of_slot_TK, scores_TK))
                buffers.check_tails()
            result = gate(outs[0], expected, workload)
            assert result.ok, f"{up_name}, {down_name}: {result.reason}"
            assert torch.equal(*outs), f"{up_name}, {down_name}: two runs differ"


def check_combined(case: Case) -> None:
    """down_combine in two and in three bands against the oracle, five times with NaN where it writes, begun early or
    not, all equal."""
    cfg, programs = case.config, torch.cuda.get_device_properties(0).multi_processor_count
    workload = Workload(cfg, case.T, torch.bfloat16, case.routing)
    weights = make_weights(cfg, torch.bfloat16, "cuda")
    x_TD = make_inputs(workload, weights)
    expected = oracle(cfg, weights, x_TD)
    scores_TK, expert_ids_TK, _ = route_float64(cfg, weights.router_ED, x_TD)
    scores_TK = scores_TK.float()
    offsets_E1, token_of_row_R, row_of_slot_TK = dispatch(expert_ids_TK, cfg.E)
    token_of_row_R = token_of_row_R[: case.T * cfg.K].contiguous()
    gate_up = tiles.interleave_gate_up(weights.gate_up_E2FD)
    for least in (down_combine.THREE_BANDS, 0):  # these few rows are worth two bands
        down_combine.THREE_BANDS, outs = least, []
        for early in (False, True, True, True, False):
            plan = tiles.plan_tiles(offsets_E1, token_of_row_R.numel())
            y_RD = torch.full((token_of_row_R.numel(), cfg.D), torch.nan, dtype=torch.bfloat16, device="cuda")
            hidden_RF = torch.full((token_of_row_R.numel(), cfg.F), torch.nan, dtype=torch.bfloat16, device="cuda")
            out_TD = torch.full((case.T, cfg.D), torch.nan, dtype=torch.bfloat16, device="cuda")
            grouped_gemm.up_gather(x_TD, token_of_row_R, gate_up, plan, hidden_RF, programs)
            outs.append(down_combine.down_combine(hidden_RF, weights.down_EDF, plan, row_of_slot_TK, scores_TK, y_RD,
                                                  out_TD, programs, early))
            for claimed, columns in ((plan.claimed_up, 2 * cfg.F), (plan.claimed_down, cfg.D)):
                tiles_of_all = int(plan.tile_count) * -(-columns // roles.BLOCK_N)
                assert int(claimed) == tiles_of_all + programs, "each tile claimed once, and a program one past them"
        result = gate(outs[0], expected, workload)
        assert result.ok, result.reason
        assert all(torch.equal(outs[0], out) for out in outs), "two runs differ"


def check_no_rows() -> None:
    """All experts empty although the buffers have room, as rounding down can leave them: nothing is written."""
    programs = torch.cuda.get_device_properties(0).multi_processor_count
    weights = make_weights(MoEConfig("case", 264, 264, 4, 2), torch.bfloat16, "cuda")
    offsets_E1 = torch.zeros(5, dtype=torch.int32, device="cuda")
    token_of_row_R = torch.full((128,), -1, dtype=torch.int32, device="cuda")
    buffers = Buffers((128, 264), (128, 264))
    rows, out = buffers.parts
    for module, prefix, tile_rows in ((grouped_gemm, "", 128), (tall_gemm, "tall_", 192)):
        if prefix == "":
            for up in (grouped_gemm.up_gather, up_ahead.up_ahead):
                up(rows, token_of_row_R, weights.gate_up_E2FD, tiles.plan_tiles(offsets_E1, 128), out, programs)
        plan = tiles.plan_tiles(offsets_E1, 128, tile_rows)
        getattr(module, f"{prefix}up_rows")(rows, weights.gate_up_E2FD, plan, out, programs)
        getattr(module, f"{prefix}down")(rows, weights.down_EDF, plan, out, programs)
    torch.cuda.synchronize()
    assert out.isnan().all()


def needs_sm_90() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs sm_90")


@pytest.mark.gpu
@pytest.mark.parametrize("held", [False, True], ids=["alone", "beside another stream"])
@pytest.mark.parametrize("T", [40, 900, 4000])
def test_down_that_begins_early_gives_the_same_bits(T, held):
    """Replay after replay, hidden NaN before up; also where another stream's kernels hold SMs that programs want."""
    needs_sm_90()
    cfg, programs = MoEConfig("case", 1536, 768, 16, 4), torch.cuda.get_device_properties(0).multi_processor_count
    weights = make_weights(cfg, torch.bfloat16, "cuda")
    x_TD = make_inputs(Workload(cfg, T, torch.bfloat16, "skewed"), weights)
    offsets_E1, token_of_row_R, row_of_slot_TK = dispatch(route_float64(cfg, weights.router_ED, x_TD)[1], cfg.E)
    token_of_row_R, scores_TK = token_of_row_R[: T * cfg.K].contiguous(), torch.rand(T, cfg.K, device="cuda")
    shapes = (T * 4, cfg.F), (T * 4, cfg.D), (T * 4, cfg.D), (T, cfg.D)
    hidden_RF, y_RD, summed_RD, out_TD = (torch.empty(shape, dtype=torch.bfloat16, device="cuda") for shape in shapes)

    def run(early: bool) -> None:
        for projection in ("down", "down and sum"):
            hidden_RF.fill_(torch.nan)
            plan = tiles.plan_tiles(offsets_E1, T * cfg.K)
            grouped_gemm.up_gather(x_TD, token_of_row_R, weights.gate_up_E2FD, plan, hidden_RF, programs)
            if projection == "down":
                grouped_gemm.down(hidden_RF, weights.down_EDF, plan, y_RD, programs, early)
            else:
                down_combine.down_combine(hidden_RF, weights.down_EDF, plan, row_of_slot_TK, scores_TK, summed_RD,
                                          out_TD, programs, early)

    run(False)
    expected = [each.clone() for each in (y_RD, summed_RD, out_TD)]
    assert not any(each.isnan().any() for each in expected)
    run(True)  # compiles
    graph, other = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
        run(True)
        run(True)
    square = torch.ones(2048, 2048, dtype=torch.bfloat16, device="cuda")
    for _ in range(30):
        with torch.cuda.stream(other):
            for _ in range(4 * held):
                square @ square
        for each in (y_RD, summed_RD, out_TD):
            each.fill_(torch.nan)
        graph.replay()
        for each, wanted in zip((y_RD, summed_RD, out_TD), expected, strict=True):
            assert torch.equal(each, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_answers_on_hard_cases(case):
    needs_sm_90()
    child("tests.test_kernels_gemm", "answers", str(case))


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_combined_answers_on_hard_cases(case):
    needs_sm_90()
    child("tests.test_kernels_gemm", "combined", str(case))


@pytest.mark.gpu
def test_no_rows_at_all():
    needs_sm_90()
    child("tests.test_kernels_gemm", "no_rows")


if __name__ == "__main__":
    if sys.argv[1] == "no_rows":
        check_no_rows()
    else:
        {"answers": check_answers, "combined": check_combined}[sys.argv[1]](case_of(sys.argv[2]))
