"""The grouped GEMMs of labs/kernels: tile plan and layouts anywhere, machine code without a GPU, answers on one.

python -m pytest tests/test_kernels_gemm.py
"""

from __future__ import annotations

import common.level  # isort: skip  # noqa: F401  (picks Triton's interpreter before anything imports triton)

import os
import random
import subprocess
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
    plain_gemm,
    roles,
    tall_gemm,
    tiles,
    train_gemm,
    up_ahead,
)
from tests.cases import Case
from tests.machine_code import ROOT, Compiled, Request, compile_all

ROWS = tiles.ROWS
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def child(*arguments: str, timeout: int = 240) -> None:
    """This file's main in a process of its own, without the interpreter. A deadlocked kernel ends with it."""
    env = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", "tests.test_kernels_gemm", *arguments], cwd=ROOT, env=env, text=True,
                          capture_output=True, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr


# ---- the tile plan, in the interpreter


def offsets(counts: list[int]) -> torch.Tensor:
    """(E + 1,) int32: each expert's first row."""
    return torch.tensor([0, *counts], device=DEVICE).cumsum(0).int()


def slow_plan(
    offsets_E1: list[int], tile_rows: int, group: int, order_E: list[int] | None = None
) -> list[list[int]]:
    """The table of row tiles by its definition, one tile at a time; experts in `order_E` or by their numbers."""
    table: list[list[int]] = []
    for expert in range(len(offsets_E1) - 1) if order_E is None else order_E:
        start, end = offsets_E1[expert : expert + 2]
        rows = range(start, end, tile_rows)
        groups = -(-len(rows) // group)
        for i in range(groups):
            size = -(-len(rows) // groups)
            part, first = rows[i * size : (i + 1) * size], len(table)
            table += [[expert, row, min(tile_rows, end - row), first, len(part)] for row in part]
    return table


RANDOM = random.Random(0)
COUNTS = {
    "one expert": [200],
    "below a tile": [1, 63, 64, 65, 127],
    "empty experts": [0, 130, 0, 0, 700, 0],
    "one has all": [0, 0, 40000, 0],
    "no rows at all": [0, 0, 0],
    "one group too many": [128 * 33],
    "random": [RANDOM.randrange(3000) for _ in range(37)],
}


@pytest.mark.parametrize(("tile_rows", "group"), [(128, 32), (192, 16), (64, 1), (128, 3)])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=[why.replace(" ", "_") for why in COUNTS])
def test_plan_is_what_the_definition_says(counts, tile_rows, group):
    offsets_E1 = offsets(counts)
    plan = tiles.plan_tiles(offsets_E1, sum(counts), tile_rows, group)
    used = int(plan.tile_count)
    assert used <= len(plan.tiles_X5)
    assert plan.tiles_X5[:used].tolist() == slow_plan(offsets_E1.tolist(), tile_rows, group)


def test_plan_without_rows_has_an_entry_that_is_safe_to_look_at():
    plan = tiles.plan_tiles(offsets([0, 0]), 0)
    assert plan.tiles_X5[0].tolist() == [0, 0, 0, 0, 1], "a group's size divides"


@pytest.mark.parametrize("column_tiles", [1, 3])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=[why.replace(" ", "_") for why in COUNTS])
def test_every_output_tile_is_found_once(counts, column_tiles):
    """What find_tile does, in Python: Gluon has no interpreter."""
    plan = tiles.plan_tiles(offsets(counts), sum(counts), 128, 4)
    table = plan.tiles_X5[: int(plan.tile_count)].tolist()
    found = []
    for tile in range(len(table) * column_tiles):
        first, size = table[tile // column_tiles][3:]
        local = tile - first * column_tiles
        found.append((first + local % size, local // size))
    assert sorted(found) == [(row, column) for row in range(len(table)) for column in range(column_tiles)]


@pytest.mark.parametrize(("row_tiles", "D"), [(5, 2048), (1, 7168), (40, 1288), (3, 8192), (0, 2048), (17, 8)])
def test_bands_cover_every_output_tile_in_turn(row_tiles, D):
    """What find_band_tile does, in Python."""
    column_tiles, band_tiles = -(-D // 256), down_combine.band_tiles_for(D)
    assert -(-column_tiles // band_tiles) <= tiles.BANDS
    found, bands = [], []
    for tile in range(row_tiles * column_tiles):
        band = tile // (row_tiles * band_tiles)
        width = min(column_tiles - band * band_tiles, band_tiles)
        column, row = divmod(tile - band * band_tiles * row_tiles, row_tiles)  # as one group of all row tiles
        assert column < width
        found.append((row, band * band_tiles + column))
        bands.append(band)
    assert sorted(found) == [(row, column) for row in range(row_tiles) for column in range(column_tiles)]
    assert bands == sorted(bands), "a program that claims tiles in their order leaves a band for good"


def test_plan_starts_its_counters_at_zero():
    plan = tiles.plan_tiles(offsets([3, 0, 200]), 203)
    assert plan.ready_X[: int(plan.tile_count)].tolist() == [0] * 3
    assert plan.claimed_up.tolist() == plan.claimed_down.tolist() == plan.begun.tolist() == [0]
    assert plan.done_B.tolist() == [0] * tiles.BANDS


@pytest.mark.parametrize("column_tiles", [1, 3, 16])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=[why.replace(" ", "_") for why in COUNTS])
def test_rows_are_gathered_in_the_order_in_which_they_are_wanted(counts, column_tiles):
    """What find_unit reckons, in Python: the first output tile that wants a row tile, and that none wants an earlier
    one for the first time. So who gathers in turn, up to what is wanted soon, never holds back what is wanted first."""
    plan = tiles.plan_tiles(offsets(counts), sum(counts), 128, 4)
    table = plan.tiles_X5[: int(plan.tile_count)].tolist()
    first_use: dict[int, int] = {}
    for tile in range(len(table) * column_tiles):
        first, size = table[tile // column_tiles][3:]
        first_use.setdefault(first + (tile - first * column_tiles) % size, tile)
    assert list(first_use) == list(range(len(table)))
    assert all(first_use[i] == entry[3] * (column_tiles - 1) + i for i, entry in enumerate(table))


def test_spread_rows_writes_every_slot_and_nothing_else():
    T, K, D, P = 5, 3, 1032, 40
    x_TD = torch.randn(T, D, device=DEVICE)
    row_of_slot_TK = torch.randperm(P, device=DEVICE)[: T * K].view(T, K).int()
    rows_RD = torch.full((P, D), torch.nan, device=DEVICE)
    tiles.spread_rows(x_TD, row_of_slot_TK, rows_RD)
    expected_RD = torch.full_like(rows_RD, torch.nan)
    expected_RD[row_of_slot_TK.long()] = x_TD[:, None]
    torch.testing.assert_close(rows_RD, expected_RD, rtol=0, atol=0, equal_nan=True)
    tiles.spread_rows(x_TD[:0], row_of_slot_TK[:0], rows_RD)


def test_gate_and_up_alternate_in_blocks_of_8():
    gate, up = torch.randn(2, 24, 4), torch.randn(2, 24, 4)
    mixed = tiles.interleave_gate_up(torch.cat([gate, up], 1))
    for block in range(3):
        rows = slice(8 * block, 8 * block + 8)
        assert torch.equal(mixed[:, 16 * block : 16 * block + 8], gate[:, rows])
        assert torch.equal(mixed[:, 16 * block + 8 : 16 * block + 16], up[:, rows])


# ---- what the launchers refuse


def operands(D: int = 256, F: int = 256, dtype: torch.dtype = torch.bfloat16, tile_rows: int = 128) -> dict:
    plan = tiles.TilePlan(torch.empty(3, 5, dtype=torch.int32), torch.empty(1, dtype=torch.int32), tile_rows,
                          *(torch.empty(n, dtype=torch.int32) for n in (1, 1, 3, 1, tiles.BANDS)), [])
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
        return down_combine.down_combine(hidden[: T * K], down, plan, torch.zeros(T, K, dtype=dtype),
                                         torch.zeros(T, K, dtype=scores), 1)

    for message, arguments in {"K=9": (2, 9), "row_of_slot_TK is int64": (2, 2, torch.int64),
                               "scores_TK is float16": (2, 2, torch.int32, torch.float16)}.items():
        with pytest.raises(ValueError, match=message):
            call(*arguments)
    with pytest.raises(ValueError, match="hidden_RF"):
        down_combine.down_combine(hidden, down, plan, torch.zeros(3, 2).int(), torch.zeros(3, 2), 1)
    assert call(0, 2).shape == (0, 256)


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
    out = down_combine.down_combine(hidden, tensors["down"], plan, slots, scores, 1)
    assert given["hidden_desc"].base is hidden
    for name, tensor in {"tiles_ptr": plan.tiles_X5, "tile_count_ptr": plan.tile_count, "done_ptr": plan.done_B,
                         "claimed_ptr": plan.claimed_down, "row_of_slot_ptr": slots, "scores_ptr": scores,
                         "out_ptr": out}.items():
        assert given[name] is tensor, name
    assert (given["D8"], given["F8"], given["T"], given["band_tiles"]) == (161, 32, 16, 2)
    assert (given["TOP_K"], given["CHOICES"], given["launch_cooperative_grid"]) == (8, 8, True)
    assert all(one is other for one, other in zip(combined, (given["y_ptr"], slots, scores, out), strict=False))
    assert combined[4] == 1024, "the last band is combine's"


def test_up_ahead_hands_its_arguments_on_in_their_order(monkeypatch):
    given, names = {}, up_ahead.up_ahead_kernel.arg_names

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
    assert (given["D8"], given["F8"], given["launch_cooperative_grid"]) == (40, 32, True)
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
            self.names = names

        def __getitem__(self, grid):
            return lambda *arguments, **options: given.update(zip(self.names, arguments, strict=True))

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
        plan.counted.clear()
    getattr(module, f"{prefix}up_rows")(rows, gate_up, plan, hidden, 1)
    assert given["gate_up_desc"].base.data_ptr() == gate_up.data_ptr()
    assert (*given["gate_up_desc"].shape, *given["gate_up_desc"].block_shape) == (2 * 512, 320, 256, 64)
    assert given["hidden_ptr"] is hidden
    assert given["tiles_ptr"] is plan.tiles_X5
    assert given["tile_count_ptr"] is plan.tile_count
    assert (given["D8"], given["F8"]) == (40, 32)
    assert prefix or given["claimed_ptr"] is plan.claimed_up
    assert given["rows_desc"].base is rows
    assert given["rows_desc"].block_shape == [64, 64]
    if "straight_kernel" in kernels:
        grouped_gemm.straight(rows, down, plan, hidden, 1)
        assert given["rows_desc"].base is rows
        assert (*given["weights_desc"].shape, *given["weights_desc"].block_shape) == (2, 320, 256, 1, 64, 256)
        assert given["out_ptr"] is hidden
        assert given["claimed_ptr"] is plan.claimed_down
        assert (given["N8"], given["K8"]) == (32, 40)
        plan.counted.clear()
    getattr(module, f"{prefix}down")(hidden, down, plan, y, 1)
    assert given["hidden_desc"].base is hidden
    assert (*given["down_desc"].shape, *given["down_desc"].block_shape) == (2 * 320, 256, 256, 64)
    assert given["y_ptr"] is y
    assert prefix or given["claimed_ptr"] is plan.claimed_down
    assert (given["D8"], given["F8"]) == (40, 32)


# ---- machine code


def describe(rows: int) -> str:
    return f"tensordesc<bf16[{rows}, 64],{roles._SWIZZLED.value!r}>"


def box(*sizes: int) -> str:
    """A descriptor's type of three dimensions."""
    return f"tensordesc<bf16[{', '.join(map(str, sizes))}],{roles._SWIZZLED_3D.value!r}>"


TABLE = {"tiles_ptr": "*i32", "tile_count_ptr": "*i32", "D8": "i32", "F8": "i32"}
CLAIMED = {"claimed_ptr": "*i32"}
GATHER = {"x_ptr": "*bf16", "token_of_row_ptr": "*i32", **CLAIMED, "gate_up_desc": describe(256),
          "hidden_ptr": "*bf16", **TABLE}
UP = {"rows_desc": describe(64), "gate_up_desc": describe(256), "hidden_ptr": "*bf16", **TABLE}
DOWN = {"hidden_desc": describe(64), "down_desc": describe(256), "y_ptr": "*bf16", **TABLE}
STRAIGHT = {**CLAIMED, "rows_desc": describe(64), "weights_desc": box(1, 64, 256),
            "out_ptr": "*bf16", "tiles_ptr": "*i32", "tile_count_ptr": "*i32", "N8": "i32", "K8": "i32"}
KERNELS = {
    "up_gather_kernel": ("grouped_gemm", GATHER), "up_rows_kernel": ("grouped_gemm", {**CLAIMED, **UP}),
    "down_kernel": ("grouped_gemm", {**CLAIMED, **DOWN}), "tall_up_rows_kernel": ("tall_gemm", UP),
    "tall_down_kernel": ("tall_gemm", DOWN), "straight_kernel": ("grouped_gemm", STRAIGHT),
}


AHEAD = {"x_ptr": "*bf16", "token_of_row_ptr": "*i32", "rows_desc": describe(64), "rows_ptr": "*bf16",
         "ready_ptr": "*i32", "begun_ptr": "*i32", **CLAIMED, "gate_up_desc": describe(256), "hidden_ptr": "*bf16",
         **TABLE}
COMBINE = {**CLAIMED, **DOWN, "row_of_slot_ptr": "*i32", "scores_ptr": "*fp32", "out_ptr": "*bf16", "done_ptr": "*i32",
           "T": "i32", "band_tiles": "i32"}
CHOICES = {1: 1, 2: 2, 3: 4, 6: 8, 8: 8}  # top-k, and the power of 2 from it on


def request(kernel: str, constants: dict | None = None) -> Request:
    """A Gluon kernel with its pointers aligned; its integers are not specialised."""
    file, signature = {"down_combine_kernel": ("down_combine", COMBINE), "up_ahead_kernel": ("up_ahead", AHEAD),
                       **KERNELS}[kernel]
    aligned = tuple(name for name, kind in signature.items() if kind.startswith("*"))
    return Request(f"{kernel} {constants or ''}", f"labs.kernels.{file}", kernel, signature, constants or {}, aligned,
                   4, 3, options=roles.LAUNCH)


@pytest.fixture(scope="module")
def code() -> dict[str, Compiled]:
    return compile_all([request(kernel) for kernel in KERNELS])


@pytest.mark.parametrize("kernel", KERNELS)
def test_machine_code_is_as_planned(code, kernel):
    found = code[f"{kernel} "]
    warpgroups = 3 if kernel.startswith("tall") else 2
    assert found.count("HGMMA") == warpgroups * 2 * 4, "a warpgroup's first step and its loop, 4 wgmma of depth 16 each"
    assert found.count("WARPGROUP") == warpgroups * 5, "more waits would mean wgmmas one after the other"
    assert found.count("UTMALDG") > 0, "weights by TMA"
    copies = found.count(r"LDGSTS.*128")
    assert copies > 0 if "gather" in kernel else copies == 0, "gathered rows by 16-byte cp.async, others by TMA"
    assert found.count(r"STG\.E\.128") > 0, "16-byte stores"
    assert found.count(r"STG") == found.count(r"STG\.E\.128")
    assert found.stack_bytes == 0
    assert found.count(r"LDL|STL") == 0, "no spills"
    atomics = found.count(r"REDG?\.|ATOMG?\.")
    claims = 0 if kernel.startswith("tall") else 4
    assert atomics == found.count(r"ATOMG\.E\.ADD\.STRONG\.GPU") == claims, "two claims, each with a way for all lanes"
    assert found.registers == 168, "65536 registers over 12 warps, before they are dealt out anew"
    stage = (warpgroups * 64 + 256) * 64 * 2
    assert 4 * stage < found.shared_bytes <= min(4 * stage + 1024, 227 * 1024)


SPARE_WARPS = {"up_ahead_kernel": (8, 2), **{f"down_combine_kernel, top {K}": (CHOICES[K], 1) for K in CHOICES}}


@pytest.mark.parametrize("name", SPARE_WARPS)
def test_machine_code_with_spare_warps_is_as_planned(name):
    copies, counters = SPARE_WARPS[name]
    kernel, _, K = name.partition(", top ")
    asked = request(kernel, {"TOP_K": int(K), "CHOICES": CHOICES[int(K)]} if K else None)
    found = compile_all([asked])[asked.name]
    assert found.count("HGMMA") == 2 * 2 * 4
    assert found.count("WARPGROUP") == 2 * 5, "more waits would mean wgmmas one after the other"
    assert found.count("UTMALDG") > 0
    assert found.count("LDGSTS") == found.count(r"LDGSTS.*128") == copies, "the spare warps' rows by 16-byte cp.async"
    assert found.count(r"STG") == found.count(r"STG\.E\.128") > 0
    assert found.count(r"LDL|STL") == found.stack_bytes == 0, "no spills"
    atomics, claims = found.count(r"REDG?\.|ATOMG?\."), found.count(r"ATOMG\.E\.ADD\.STRONG\.GPU")
    assert claims == 4, "two claims, each with a way for all lanes"
    assert atomics - claims == found.count(r"REDG\.E\.ADD\.STRONG\.GPU") == counters, "counters, no sums"
    assert (found.count(r"FENCE\.VIEW\.ASYNC\.G") == 2) == (kernel == "up_ahead_kernel"), "stores that TMA reads"
    assert found.count(r"MEMBAR\.ALL\.GPU") == 1, "released"
    assert found.count(r"CCTL\.IVALL") == 1, "acquired"
    assert found.registers == 168
    assert found.shared_bytes <= 227 * 1024


H_PART = f"tensordesc<bf16[64, 32],{train_gemm._SWIZZLED_PART.value!r}>"
TRAINING = {
    "train_up_kernel": {"gate_up_desc": box(2, 128, 64), "h_ptr": "*bf16", "hidden_ptr": "*bf16", **TABLE},
    "hidden_grad_kernel": {"down_desc": box(1, 64, 256), "score_of_row_ptr": "*fp32", "h_desc": H_PART,
                           "dh_ptr": "*bf16", "scaled_ptr": "*bf16", "d_scores_ptr": "*fp32", "R": "i32", **TABLE},
}


@pytest.mark.parametrize("gathered", [True, False])
@pytest.mark.parametrize("kernel", TRAINING)
def test_machine_code_of_training_is_as_planned(kernel, gathered):
    signature = {"rows": "*bf16" if gathered else describe(64), "token_of_row_ptr": "*i32", **CLAIMED,
                 **TRAINING[kernel]}
    aligned = tuple(name for name, kind in signature.items() if kind.startswith("*"))
    asked = Request(f"{kernel} {gathered}", "labs.kernels.train_gemm", kernel, signature, {"GATHERED": gathered},
                    aligned, 4, 3, options=roles.LAUNCH)
    found = compile_all([asked])[asked.name]
    assert found.count("HGMMA") == 2 * 2 * 4
    assert found.count("WARPGROUP") == 2 * 5, "more waits would mean wgmmas one after the other"
    assert found.count("UTMALDG") > 0
    assert found.count("LDGSTS") == found.count(r"LDGSTS.*128") == (8 if gathered else 0)
    # dS is stored by 4 bytes, a row's by one thread in four.
    assert found.count(r"STG") - found.count(r"STG\.E\.128") == (4 if kernel == "hidden_grad_kernel" else 0)
    if kernel == "hidden_grad_kernel":
        assert found.count(r"LDSM") == 2 * 4, "H from shared memory, by each warpgroup"
        assert found.count(r"STG\.E\.128") == 2 * 6, "one part's: the epilogue is a loop"
    assert found.stack_bytes <= 40, "a few values spilled, in the epilogue and at a tile's beginning"
    assert found.count(r"REDG?\.|ATOMG?\.") == found.count(r"ATOMG\.E\.ADD\.STRONG\.GPU") == 4, "claims, no sums"
    assert found.registers == 168


# ---- the plain kernels: machine code, and answers in the interpreter


def plain_request(kernel: str, sm: int) -> Request:
    """A plain kernel for a target."""
    tile = plain_gemm.tile_for(sm)
    weights = f"tensordesc<bf16[{tile.block_N}, {tile.block_K}]>" if tile.tma else "*bf16"
    first = {"x_ptr": "*bf16", "token_of_row_ptr": "*i32"} if "up" in kernel else {"hidden_ptr": "*bf16"}
    last = {"hidden_ptr": "*bf16"} if "up" in kernel else {"y_ptr": "*bf16"}
    tables = {"offsets_ptr": "*i32", "tiles_ptr": "*i32", "tile_count_ptr": "*i32"}
    signature = {**first, "weights": weights, **last, **tables, "E": "i32", "D8": "i32", "F8": "i32"}
    constants = {"load_weights": f"{plain_gemm.__name__}.{'tma' if tile.tma else 'pointer'}_weights",
                 "BLOCK_M": tile.block_M, "BLOCK_N": tile.block_N, "BLOCK_K": tile.block_K}
    aligned = tuple(name for name, kind in signature.items() if kind.startswith("*"))
    return Request(f"{kernel} sm_{sm}", "labs.kernels.plain_gemm", kernel, signature, constants, aligned,
                   tile.warps, tile.stages, sm)


SHARED_MEMORY = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 120: 99 * 1024}


@pytest.fixture(scope="module")
def plain_code() -> dict[str, Compiled]:
    return compile_all([plain_request(f"plain_{which}_kernel", sm) for which in ("up", "down") for sm in SHARED_MEMORY])


@pytest.mark.parametrize("sm", SHARED_MEMORY)
@pytest.mark.parametrize("kernel", ["plain_up_kernel", "plain_down_kernel"])
def test_plain_machine_code_is_as_planned(plain_code, kernel, sm):
    found = plain_code[f"{kernel} sm_{sm}"]
    assert found.count("HGMMA" if sm == 90 else "HMMA") > 0, "tensor cores"
    assert (found.count("UTMALDG") > 0) == (sm == 90), "weights by TMA on Hopper alone"
    assert found.count(r"LDGSTS.*128") > 0, "16-byte cp.async"
    assert found.count(r"LDGSTS") == found.count(r"LDGSTS.*128")
    assert found.count(r"STG") == found.count(r"STG\.E\.128") > 0, "16-byte stores"
    assert found.count(r"LDL|STL") == 0
    assert found.stack_bytes == 0
    assert found.count(r"REDG?\.|ATOMG?\.") == 0, "no atomics: bitwise repeatable"
    assert found.shared_bytes <= SHARED_MEMORY[sm]


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


# ---- answers, on a GPU

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
    Case("three choices, several bands", T=300, D=1288, F=72, E=6, K=3),
    Case("two blocks a band", T=200, D=4104, F=64, E=4, K=2),
    Case("one token, several bands", T=1, D=4104, F=64, E=4, K=2),
    Case("more than 2 to the 31 elements", T=40000, D=8192, F=256, E=8, K=8),
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
    """down_combine against the oracle, five times with other data in its way, all equal."""
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
    outs = []
    for _ in range(5):
        plan = tiles.plan_tiles(offsets_E1, token_of_row_R.numel())
        hidden_RF = torch.full((token_of_row_R.numel(), cfg.F), torch.nan, dtype=torch.bfloat16, device="cuda")
        grouped_gemm.up_gather(x_TD, token_of_row_R, gate_up, plan, hidden_RF, programs)
        # What the next allocations find is NaN, not the answers of the run before.
        torch.full((token_of_row_R.numel() + case.T, cfg.D), torch.nan, dtype=torch.bfloat16, device="cuda")
        outs.append(down_combine.down_combine(hidden_RF, weights.down_EDF, plan, row_of_slot_TK, scores_TK, programs))
    result = gate(outs[0], expected, workload)
    assert result.ok, result.reason
    assert all(torch.equal(outs[0], out) for out in outs), "two runs differ"


def check_no_rows() -> None:
    """All experts empty although the buffers have room, as rounding down can leave them: nothing is written."""
    programs = torch.cuda.get_device_properties(0).multi_processor_count
    weights = make_weights(MoEConfig("case", 256, 256, 4, 2), torch.bfloat16, "cuda")
    offsets_E1 = torch.zeros(5, dtype=torch.int32, device="cuda")
    token_of_row_R = torch.full((128,), -1, dtype=torch.int32, device="cuda")
    buffers = Buffers((128, 256), (128, 256))
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
@pytest.mark.parametrize("case", CASES, ids=str)
def test_answers_on_hard_cases(case):
    needs_sm_90()
    child("answers", str(case))


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_combined_answers_on_hard_cases(case):
    needs_sm_90()
    child("combined", str(case))


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES[:-1], ids=str)
def test_plain_answers_on_hard_cases(case):
    sm = 10 * torch.cuda.get_device_capability()[0] + torch.cuda.get_device_capability()[1]
    if sm not in plain_gemm.TILES:
        pytest.skip(f"no tile for sm_{sm}")
    child("plain", str(case), str(sm))


@pytest.mark.gpu
def test_no_rows_at_all():
    needs_sm_90()
    child("no_rows")


if __name__ == "__main__":
    if sys.argv[1] == "no_rows":
        check_no_rows()
    else:
        chosen = next(case for case in CASES if str(case) == sys.argv[2])
        if sys.argv[1] == "answers":
            check_answers(chosen)
        elif sys.argv[1] == "combined":
            check_combined(chosen)
        else:
            for tile in {plain_gemm.tile_for(int(sys.argv[3])), plain_gemm.CONSUMER}:
                check_plain(chosen, torch.bfloat16, tile)
