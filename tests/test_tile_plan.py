"""The tile plan and the layouts that the grouped GEMMs share, in Triton's interpreter or on a GPU:
python -m pytest tests/test_tile_plan.py"""

from __future__ import annotations

import common.level  # isort: skip  # noqa: F401  (picks Triton's interpreter before anything imports triton)

import itertools
import random

import pytest
import torch

from labs.kernels import down_combine, tiles
from tests.gemm_cases import DEVICE, offsets


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


@pytest.mark.parametrize("mean_rows", [512, 4096])
@pytest.mark.parametrize("F", [8, 768, 14336])
@pytest.mark.parametrize(("row_tiles", "D"), [(5, 2048), (1, 7168), (40, 1288), (3, 8192), (0, 2048), (17, 8)])
def test_bands_cover_every_output_tile_in_turn(row_tiles, D, F, mean_rows):
    """What find_band does, in Python."""
    column_tiles, edges = -(-D // 256), (0, *down_combine.edges_for(D, F, 8, mean_rows))
    assert len(edges) == 3 <= tiles.BANDS, "as many as edge_of and find_band know"
    found, bands = [], []
    for tile in range(row_tiles * column_tiles):
        band = max(band for band in range(3) if edges[band] <= tile // row_tiles)
        width = (*edges, column_tiles)[band + 1] - edges[band]
        column, row = divmod(tile - edges[band] * row_tiles, row_tiles)  # as one group of all row tiles
        assert column < width
        found.append((row, edges[band] + column))
        bands.append(band)
    assert sorted(found) == [(row, column) for row in range(row_tiles) for column in range(column_tiles)]
    assert bands == sorted(bands), "a program that claims tiles in their order leaves a band for good"


@pytest.mark.parametrize(("D", "F", "K", "mean_rows", "widths"), [
    (8, 8, 1, 4096, [1]), (512, 768, 8, 4096, [2]), (768, 768, 8, 4096, [2, 1]), (1024, 768, 8, 4096, [2, 2]),
    (1536, 256, 8, 1024, [3, 3]), (1536, 256, 8, 4096, [2, 2, 2]), (2048, 64, 1, 2048, [2, 3, 3]),
    (2048, 768, 8, 512, [4, 4]), (2048, 768, 8, 1023, [4, 4]), (2048, 768, 8, 1024, [3, 3, 2]),
    (2048, 1024, 8, 512, [5, 3]), (2048, 1024, 8, 2048, [3, 3, 2]), (4096, 1024, 8, 256, [10, 6]),
    (4096, 1024, 8, 512, [8, 5, 3]), (4096, 14336, 2, 2048, [12, 2, 2]), (7168, 2048, 8, 256, [21, 7]),
    (7168, 2048, 8, 512, [20, 6, 2]),
])
def test_bands_are_as_wide_as_the_log_has_them(D, F, K, mean_rows, widths):
    edges = [0, *down_combine.edges_for(D, F, K, mean_rows), -(-D // 256)]
    assert [b - a for a, b in itertools.pairwise(edges) if b > a] == widths
    assert edges == sorted(edges)


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
