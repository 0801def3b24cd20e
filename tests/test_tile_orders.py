"""Orders of the experts (labs/kernels/tile_orders.py): their tables by the definition, and what the script says.

python -m pytest tests/test_tile_orders.py
"""

from __future__ import annotations

import common.level  # isort: skip  # noqa: F401  (picks Triton's interpreter before anything imports triton)

import itertools
import random
from types import SimpleNamespace

import pytest
import torch

from common.config import MoEConfig, preset
from common.model import make_weights
from labs.kernels import tile_orders
from labs.kernels.tiles import plan_tiles
from labs.studies import study
from tests.test_tile_plan import slow_plan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RANDOM = random.Random(0)
COUNTS = {
    "one expert": [200],
    "below a tile": [1, 63, 64, 65, 127],
    "empty experts": [0, 130, 0, 0, 700, 0],
    "two groups": [5, 0, 128 * 33, 128],
    "no rows at all": [0, 0, 0],
    "random": [RANDOM.choice([0, RANDOM.randrange(128), RANDOM.randrange(3000)]) for _ in range(29)],
}
every_counts = pytest.mark.parametrize("counts", COUNTS.values(), ids=[why.replace(" ", "_") for why in COUNTS])


def offsets(counts: list[int]) -> torch.Tensor:
    """(E + 1,) int32: each expert's first row."""
    return torch.tensor([0, *counts], device=DEVICE).cumsum(0).int()


# ---- tables
@pytest.mark.parametrize(("tile_rows", "group"), [(128, 32), (192, 3)])
@every_counts
def test_every_order_has_the_table_of_its_definition(counts, tile_rows, group):
    offsets_E1 = offsets(counts)
    plain = plan_tiles(offsets_E1, sum(counts), tile_rows, group)
    used = int(plain.tile_count)
    for name, order_E in tile_orders.orders(offsets_E1.diff()).items():
        plan = tile_orders.plan_in_order(offsets_E1, sum(counts), order_E, tile_rows, group)
        table = plan.tiles_X5[:used].tolist()
        assert (plan.tiles_X5.shape, plan.tiles_X5.dtype, int(plan.tile_count), plan.tile_rows) == (
            plain.tiles_X5.shape, torch.int32, used, tile_rows)
        assert plan.tiles_X5.is_contiguous()
        assert table == slow_plan(offsets_E1.tolist(), tile_rows, group, order_E.tolist())
        if name in (tile_orders.PLAIN, tile_orders.AGAIN):
            assert table == plain.tiles_X5[:used].tolist()
        covered = sorted((row, expert) for expert, first, rows, *_ in table for row in range(first, first + rows))
        assert covered == list(enumerate(expert for expert, count in enumerate(counts) for _ in range(count))), name


def test_without_rows_the_first_entry_is_safe_to_look_at():
    plan = tile_orders.plan_in_order(offsets([0, 0]), 0, torch.tensor([1, 0], device=DEVICE))
    assert plan.tiles_X5[0].tolist() == [0, 0, 0, 0, 1], "a group's size divides"


@pytest.mark.parametrize("order_E", [[0, 0], [0], [1, 2], [0, 1, 2]])
def test_an_order_names_every_expert_once(order_E):
    with pytest.raises(ValueError, match="must name each of 2 experts once"):
        tile_orders.plan_in_order(offsets([3, 4]), 7, torch.tensor(order_E, device=DEVICE))


def test_orders_are_what_their_names_say():
    rows_E = torch.tensor([128, 900, 0, 127, 3, 900, 256], dtype=torch.int32, device=DEVICE)
    assert {name: order_E.tolist() for name, order_E in tile_orders.orders(rows_E).items()} == {
        "plain": [0, 1, 2, 3, 4, 5, 6], "plain again": [0, 1, 2, 3, 4, 5, 6], "largest first": [1, 5, 6, 0, 3, 4, 2],
        "smallest first": [2, 4, 3, 0, 6, 1, 5], "small last": [0, 1, 5, 6, 2, 3, 4], "evened": [1, 4, 3, 5, 0, 6, 2]}


def test_evened_keeps_tiles_in_pace_with_experts():
    """Tiles never stray from their mean an expert by more than one expert has; sorted, they do."""
    tiles_E = [max(1, round(100 / rank)) for rank in range(1, 129)]
    mean = sum(tiles_E) / len(tiles_E)

    def farthest(order: list[int]) -> float:
        return max(abs(tiles - mean * begun) for begun, tiles in
                   enumerate(itertools.accumulate(tiles_E[expert] for expert in order), 1))

    order = tile_orders.evened(tiles_E)
    assert sorted(order) == list(range(128))
    assert farthest(order) <= max(tiles_E) < farthest(list(range(128)))


# ---- measuring, with GEMMs of torch that walk through the table
def by_table(rows: torch.Tensor, weights: torch.Tensor, plan, out: torch.Tensor) -> None:
    """out[row] = rows[row] @ the expert's weights.T, a table entry at a time."""
    for expert, first, count, *_ in plan.tiles_X5[: int(plan.tile_count)].tolist():
        out[first : first + count] = rows[first : first + count] @ weights[expert, : out.shape[1]].T


@pytest.fixture
def torch_gemms(monkeypatch):
    monkeypatch.setattr(tile_orders, "up_gather", lambda x_TD, token_of_row_R, weights, plan, out, programs:
                        by_table(x_TD[token_of_row_R.long()], weights, plan, out))
    monkeypatch.setattr(tile_orders, "down", lambda rows, weights, plan, out, programs:
                        by_table(rows, weights, plan, out))


@pytest.mark.parametrize("routing", tile_orders.ROUTINGS)
def test_a_case_is_checked_and_timed(torch_gemms, device, routing):
    cfg = preset("tiny")
    case = tile_orders.measure_case(cfg, 600, routing, make_weights(cfg, torch.bfloat16, device),
                                    study.GpuClock(device))
    assert set(case["ms"]) == {"up", "down"}
    names = list(tile_orders.orders(torch.ones(2, dtype=torch.int32)))
    assert all(list(times) == names and all(spread["p50"] > 0 for spread in times.values())
               for times in case["ms"].values())
    assert case["largest"] >= 600 * cfg.K / cfg.E
    assert case["small"] + case["empty"] >= (4 if routing == tile_orders.HALF else 0)


def test_an_order_that_loses_a_tile_is_not_timed(torch_gemms, device, monkeypatch):
    def lose(offsets_E1, R, order_E):
        plan = plan_tiles(offsets_E1, R)
        ordered = bool((order_E.diff() == 1).all())
        return plan if ordered else plan._replace(tile_count=plan.tile_count - 1)

    monkeypatch.setattr(tile_orders, "plan_in_order", lose)
    cfg = preset("tiny")
    with pytest.raises(RuntimeError, match="up gives other bits largest first than in plain order"):
        tile_orders.measure_case(cfg, 64, "natural", make_weights(cfg, torch.bfloat16, device), study.GpuClock(device))


@pytest.mark.gpu
def test_level_8s_gemms_give_the_same_bits_in_every_order(device):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs sm_90")
    cfg = MoEConfig("orders", D=256, F=192, E=16, K=4)
    weights = make_weights(cfg, torch.bfloat16, device)
    for routing in (*tile_orders.ROUTINGS, "sparse"):
        tile_orders.measure_case(cfg, 1024, routing, weights, study.GpuClock(device))


# ---- telling
STAMP = {"gpu": "NVIDIA Test", "sm": "sm_90", "torch": "2", "triton": "3", "commit": "0" * 12, "date": "2026-01-01"}


def made_figures(evened: float) -> dict:
    """Two GEMMs whose orders take as long as plain but for `plain again`, 0.4% slower, and `evened`, as given."""
    def spread(ms: float) -> dict:
        return {"p20": ms * 0.999, "p50": ms, "p80": ms * 1.001}

    names = tile_orders.orders(torch.ones(2, dtype=torch.int32))
    times = {name: spread({"evened": evened, "plain again": 1.004}.get(name, 1.0)) for name in names}
    return {"rounds": 1, "cases": [{"preset": "tiny", "T": 64, "routing": "skewed", "largest": 9, "small": 3,
                                    "empty": 1, "row_tiles": 8, "ms": {"up": times, "down": times}}]}


@pytest.mark.parametrize(("ms", "said"), [(0.95, "evened"), (0.999, "no order")])
def test_the_sentence_follows_from_the_figures(ms, said, tmp_path, capsys):
    record = study.make_record(tile_orders.STUDY, made_figures(ms), dict(STAMP), True)
    assert study.save(record, tile_orders.STUDY, tmp_path).name == "test_orders.json"
    assert tile_orders.main(["--show", "--out", str(tmp_path)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert record["conclusion"].endswith(f"from itself by up to 0.4%, and {said} gains more by the median.")
    assert record["conclusion"] in shown
    assert f"{ms:#.3g} {1 / ms - 1:+.1%}{'*' if ms == 0.95 else ''}" in shown


def test_without_the_gpu_it_says_what_it_needs(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tile_orders.main(["--out", str(tmp_path)]) == 2
    assert "needs CUDA sm_90" in capsys.readouterr().err
    assert tile_orders.main(["--show", "--out", str(tmp_path)]) == 2
    assert "holds no results" in capsys.readouterr().err


def test_all_cases_go_through(torch_gemms, monkeypatch, device):
    """The whole script's host side, at sizes for a CPU."""
    monkeypatch.setattr(tile_orders, "CASES", (("tiny", 130), ("tiny", 7)))
    said: list[str] = []
    options = study.Options(device, False, said.append, SimpleNamespace())
    record = study.make_record(tile_orders.STUDY, tile_orders.measure(options), dict(STAMP), True)
    assert len(said) == len(record["figures"]["cases"]) == 6
    assert record["conclusion"].startswith("Over 12 GEMMs")
    table, _ = tile_orders.table(record["figures"])
    assert len(table.rows) == 12


def test_recorded_sentences_are_those_of_todays_code():
    for path in (study.ROOT / "plots" / "orders").glob("*.json"):
        record = study.load(path, tile_orders.STUDY)
        assert record["conclusion"] == study.sentence(tile_orders.STUDY, record)
