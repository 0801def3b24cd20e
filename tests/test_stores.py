"""The layouts in which tiles leave the registers (stores.py, late_store.py), read without a GPU: who holds what."""

from __future__ import annotations

import common.level  # isort: skip  # noqa: F401  (picks Triton's interpreter before anything imports triton)

import pytest
import torch

from labs.kernels import late_store, stores


def held(layout) -> torch.Tensor:
    """(threads, registers, 2): the (row, column) of each register of each thread of a warpgroup."""
    bits = [*layout.reg_bases, *layout.lane_bases, *layout.warp_bases]
    places = torch.arange(1 << len(bits))
    at = torch.zeros(len(places), 2, dtype=torch.long)
    for bit, basis in enumerate(bits):
        at ^= (places >> bit & 1)[:, None] * torch.tensor(basis)
    return at.view(128, -1, 2)


def accumulator(columns: int, pairs: bool) -> torch.Tensor:
    """(threads, registers, 2) of wgmma's accumulator, 64 rows: PTX's figure of its D fragment. As pairs of columns or
    columns."""
    thread, register = torch.arange(128)[:, None], torch.arange(64 * columns // 128)[None]
    row = thread // 32 * 16 + thread % 32 // 4 + register // 2 % 2 * 8
    column = thread % 4 * 2 + register // 4 * 8 + register % 2
    at = torch.stack([row.expand_as(column), column], dim=2)
    return torch.stack([at[:, ::2, 0], at[:, ::2, 1] // 2], dim=2) if pairs else at


def sets(at: torch.Tensor) -> list[set[tuple[int, int]]]:
    return [set(map(tuple, thread)) for thread in at.tolist()]


WIDE = {columns: (getattr(stores, f"_SWAPPED_{columns}").value, getattr(stores, f"_WIDE_{columns}").value)
        for columns in (32, 64, 128, 256)}
PAIRS = late_store._SWAPPED_PAIRS.value, late_store._WIDE_PAIRS.value


@pytest.mark.parametrize(("layout", "run"), [*((wide, 8) for _, wide in WIDE.values()), (PAIRS[1], 4)])
def test_a_thread_stores_16_bytes_that_lie_together(layout, run):
    runs = held(layout).view(128, -1, run, 2)
    assert (runs[..., 0] == runs[..., :1, 0]).all()
    assert (runs[..., 1] == runs[..., :1, 1] + torch.arange(run)).all()
    assert (runs[..., 0, 1] % run == 0).all()


@pytest.mark.parametrize(("start", "swapped", "wide"), [
    *((accumulator(columns, False), *layouts) for columns, layouts in WIDE.items()), (accumulator(64, True), *PAIRS)])
def test_each_swap_exchanges_half_of_a_threads_values_with_one_neighbour(start, swapped, wide):
    """Anything else would go through shared memory."""
    for before, after in ((start, held(swapped)), (held(swapped), held(wide))):
        owner = {at: thread for thread, found in enumerate(sets(before)) for at in found}
        for thread, found in enumerate(sets(after)):
            of = [owner[at] for at in found]
            others = set(of) - {thread}
            assert len(others) == 1
            assert thread // 4 == others.pop() // 4, "within the four threads of a row"
            assert of.count(thread) * 2 == len(of)


def test_parts_wait_where_the_accumulator_has_them():
    assert (held(late_store._ACC_PAIRS.value) == accumulator(64, True)).all()


def test_dealt_parts_are_stored_by_the_threads_that_hold_them():
    """store_pairs_dealt's order of pairs changes nothing of who holds what."""
    place = torch.arange(32).view(2, 4, 4).permute(0, 2, 1).reshape(32)  # new column -> the accumulator's
    moved = torch.empty_like(place)
    moved[place] = torch.arange(32)
    at = accumulator(64, True)
    assert sets(torch.stack([at[..., 0], moved[at[..., 1]]], dim=2)) == sets(held(PAIRS[1]))
