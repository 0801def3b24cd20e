"""Bands of down's columns (labs/kernels/band_widths.py): what is tried, checked and said.

python -m pytest tests/test_band_widths.py
"""

from __future__ import annotations

import common.level  # isort: skip  # noqa: F401  (picks Triton's interpreter before anything imports triton)

from types import SimpleNamespace

import pytest
import torch

from common.config import MoEConfig, preset
from common.model import make_weights
from labs.kernels import band_widths, down_combine
from labs.studies import study

STAMP = {"gpu": "NVIDIA Test", "sm": "sm_90", "torch": "2", "triton": "3", "commit": "0" * 12, "date": "2026-01-01"}


@pytest.mark.parametrize(("name", "T"), band_widths.CASES)
def test_each_width_is_tried_once_and_the_chosen_one_twice(name, T):
    cfg = preset(name)
    tried = band_widths.candidates(cfg, T)
    chosen = down_combine.edges_for(cfg.D, cfg.F, cfg.K, T * cfg.K / cfg.E)
    assert tried[band_widths.CHOSEN] == tried[band_widths.AGAIN] == chosen
    assert tried[band_widths.AFTER] is None
    others = [edges for edges in tried.values() if edges not in (None, chosen)]
    assert len(set(others)) == len(others) == len(tried) - 3 >= 4
    for said, edges in tried.items():
        if edges in others:
            widths = [int(width) for width in said.split(", ")]
            assert sum(widths) == -(-cfg.D // 256)
            assert min(widths) >= down_combine.LEAST_TILES
            assert widths == sorted(widths, reverse=True) or max(widths) - min(widths) == 1, "but for what is left over"


@pytest.fixture
def torch_layer(monkeypatch):
    """The layer's parts by stand-ins; returns what bands were asked for, and how far one's answer is to be off."""
    asked, off = [], {}

    def experts_combined(x, routed, packed, choice, edges):
        asked.append(edges)
        return x * (1 + off.get(edges, 0.0))

    monkeypatch.setattr(band_widths, "experts_combined", experts_combined)
    monkeypatch.setattr(band_widths, "build_bmm", lambda workload, weights: lambda x_TD: x_TD)
    monkeypatch.setattr(band_widths, "Captured", lambda forward: forward)
    monkeypatch.setattr(band_widths, "LOAD_SECONDS", 0.0)
    monkeypatch.setattr(band_widths, "REST_SECONDS", 0.0)
    monkeypatch.setattr(band_widths, "ROUNDS", 3)
    monkeypatch.setattr(band_widths.level8, "route", lambda *_: SimpleNamespace())
    return asked, off


WIDE = MoEConfig("wide", D=2048, F=64, E=4, K=2)


def test_a_case_is_checked_and_timed_hot_and_cool(torch_layer):
    case = band_widths.measure_case(WIDE, 8, make_weights(WIDE, torch.float16, "cpu"),
                                    study.GpuClock(torch.device("cpu")))
    tried = band_widths.candidates(WIDE, 8)
    assert set(torch_layer[0]) == set(tried.values())
    assert list(case["ms"]) == ["hot", "cool"]
    assert all(list(times) == [band_widths.BOUND, *tried] for times in case["ms"].values())
    assert all(spread["p50"] > 0 for times in case["ms"].values() for spread in times.values())
    assert case["chosen"] == "4, 4"


@pytest.mark.parametrize("far", [0.01, float("nan")])
def test_other_answers_are_not_timed(torch_layer, far):
    torch_layer[1][(6, 8)] = far
    with pytest.raises(RuntimeError, match=r"wide, T=8: bands 6, 2 differ from the sum after by"):
        band_widths.measure_case(WIDE, 8, make_weights(WIDE, torch.float16, "cpu"),
                                 study.GpuClock(torch.device("cpu")))


@pytest.mark.gpu
def test_all_widths_give_the_layers_answer(device, monkeypatch):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs sm_90")
    monkeypatch.setattr(band_widths, "ROUNDS", 3)
    cfg = MoEConfig("bands", D=2048, F=256, E=8, K=4)
    case = band_widths.measure_case(cfg, 4096, make_weights(cfg, torch.bfloat16, device), study.GpuClock(device))
    assert len(case["ms"]["hot"]) >= 7


def made_figures(four: float) -> dict:
    """Two layers whose widths all take as long as the chosen ones, but for `4, 4` of the second, as given, and the
    chosen ones again, 0.4% longer."""
    def times(four: float) -> dict:
        ms = {band_widths.BOUND: 0.9, "chosen": 1.0, "the sum after": 1.1, "4, 4": four, "chosen again": 1.004}
        return {name: {"p20": each, "p50": each, "p80": each} for name, each in ms.items()}

    cases = [{"preset": name, "T": 64, "chosen": "3, 3, 2", "ms": {"hot": times(1.0), "cool": times(each)}}
             for name, each in (("tiny", 1.0), ("seed", four))]
    return {"rounds": 1, "cases": cases}


def test_the_sentence_follows_from_the_figures(tmp_path, capsys):
    record = study.make_record(band_widths.STUDY, made_figures(0.8), dict(STAMP), True)
    assert study.save(record, band_widths.STUDY, tmp_path).name == "test_bands.json"
    assert band_widths.main(["--show", "--out", str(tmp_path)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert record["conclusion"] == (
        "Over 2 layers, on a hot chip the fastest other widths gain +0.0% to +0.0% on those chosen (4, 4 on tiny at 64 "
        "tokens), and those on themselves up to 0.4%; on a cool chip the fastest other widths gain +0.0% to +25.0% on "
        "those chosen (4, 4 on seed at 64 tokens), and those on themselves up to 0.4%.")
    assert record["conclusion"] in shown
    assert "3, 3, 2, chosen" in shown
    assert "0.800 +25.0%" in shown
    assert "cuBLAS bmm │ 0.900 +11.1%" in shown


def test_without_the_gpu_it_says_what_it_needs(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert band_widths.main(["--out", str(tmp_path)]) == 2
    assert "needs CUDA sm_90" in capsys.readouterr().err
    assert band_widths.main(["--show", "--out", str(tmp_path)]) == 2
    assert "holds no results" in capsys.readouterr().err


def test_recorded_sentences_are_those_of_todays_code():
    for path in (study.ROOT / "plots" / "bands").glob("*.json"):
        record = study.load(path, band_widths.STUDY)
        assert record["conclusion"] == study.sentence(band_widths.STUDY, record)
