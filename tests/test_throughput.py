"""Tokens a day from a layer's time: every assumption shown and settable, and nothing that no GPU can do."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import common.level  # isort: skip  # noqa: F401  (picks Triton's interpreter before anything imports triton)

import pytest

from labs.studies import study, throughput


def throughput_of(tmp_path: Path, *words: str) -> int:
    return study.main(throughput.STUDY, ["--out", str(tmp_path), *words])


def factor(text: str) -> float:
    return float(re.search(r"([\d.,]+) times the", text)[1].replace(",", ""))


def test_throughput_refuses_the_seeds_claim(tmp_path, capsys):
    """186 billion tokens a day of DeepSeek-V3 on 8 H100s."""
    assert throughput_of(tmp_path, "--config", "deepseek-v3", "--hardware", "h100", "--num-gpus", "8", "--layer-ms",
                         "12", "--layer-tokens", "4096", "--sequence", "1", "--claim", "186e9") == 1
    assert factor(capsys.readouterr().err) == pytest.approx(60, rel=0.02)
    assert not list(tmp_path.iterdir()), "a refused result is not written"


def test_a_refusal_shows_what_it_rests_on(tmp_path, capsys):
    words = ["--config", "qwen3-30b-a3b", "--layer-tokens", "16384", "--layer-ms"]
    assert throughput_of(tmp_path, *words, "0.1") == 1
    shown = capsys.readouterr().out
    assert "--other-efficiency" in shown
    assert "tokens/day" not in shown, "no table of what cannot be"
    assert throughput_of(tmp_path, *words, "4", "--claim", "1e15") == 1
    shown = capsys.readouterr().out
    assert "--other-efficiency" in shown
    assert "tokens/day" in shown, "the claim is refused, the estimate is not"


def test_throughput_refuses_a_layer_above_the_peak(tmp_path, capsys):
    flops = 6 * 16384 * 8 * 2048 * 768
    at_peak_ms = flops / throughput.HARDWARE["h200"].tflops / 1e9
    words = ["--config", "qwen3-30b-a3b", "--layer-tokens", "16384", "--layer-ms"]
    assert throughput_of(tmp_path, *words, str(at_peak_ms / 2)) == 1
    assert factor(capsys.readouterr().err) == pytest.approx(2, rel=0.01)
    assert throughput_of(tmp_path, *words, str(at_peak_ms * 1.01)) == 0


def test_throughput_follows_from_its_assumptions(tmp_path, capsys):
    words = ["--config", "mixtral-8x7b", "--hardware", "a100", "--layer-ms", "100", "--layer-tokens", "8192", "--price",
             "2", "--num-gpus", "4", "--doubling-efficiency", "1", "--mode", "inference"]
    assert throughput_of(tmp_path, *words) == 0
    figures = json.loads(next(tmp_path.glob("*.json")).read_text())["figures"]
    model, flops = throughput.MODELS["mixtral-8x7b"], throughput.flops_a_token(
        throughput.MODELS["mixtral-8x7b"], throughput.preset("mixtral-8x7b"), 4096)
    seconds = model.moe_layers * 0.1 / 8192 + flops["other"] / (312e12 * 0.5)
    case = figures["case"]
    assert case["tokens_per_s"] == pytest.approx(4 / seconds)
    assert case["dollars_per_trillion"] == pytest.approx(1e12 / case["tokens_per_s"] / 3600 * 4 * 2)
    assert case["tokens_per_day"] == pytest.approx(case["ideal_per_day"])
    assert case["share_of_peak"] < 1
    names = " ".join(name for name, _ in figures["assumptions"])
    for option in ("--times", "--hardware", "--backward", "--other-efficiency", "--doubling-efficiency", "--price"):
        assert option in names


def test_layers_scale_the_model(tmp_path):
    def model(*words: str) -> throughput.Model:
        parser = argparse.ArgumentParser()
        throughput.arguments(parser)
        return throughput.model_of(parser.parse_args(["--config", "mixtral-8x7b", *words]))

    whole, half = model(), model("--layers", "16")
    assert (half.layers, half.moe_layers) == (16, 16)
    assert half.total_billions == pytest.approx(whole.total_billions / 2)
    assert half.active_billions == pytest.approx(whole.active_billions / 2)
    dense = model("--layers", "33")
    assert dense.total_billions == pytest.approx(whole.total_billions * 33 / 32)


def test_a_backward_goes_with_a_forward_of_as_many_tokens(tmp_path):
    assert throughput_of(tmp_path, "--config", "qwen3-30b-a3b") == 0
    figures = json.loads(next(tmp_path.glob("*.json")).read_text())["figures"]
    steps = json.loads(throughput.BACKWARD_TIMES.read_text())["figures"]["shapes"]
    (shape,) = (one for one in steps if one["config"] == "qwen3-30b-a3b")
    assert figures["measured"]["tokens"] == shape["shape"]["T"]
    assert figures["measured"]["level"] == "backward"
    ours = next(row for row in shape["rows"] if row["name"] == "our kernels")
    assert 1 + figures["backward"]["times"] == pytest.approx(ours["step_ms"]["p50"] / ours["forward_ms"]["p50"])


def rows_of(figures: dict) -> tuple[list[list[str]], list[str]]:
    """The rows of the table of GPUs, and what is said below it."""
    _, table, *notes = throughput.table(figures)
    return table.rows, notes


def test_a_row_says_whether_its_memory_holds_the_parameters_and_which_was_asked_for(tmp_path):
    words = ["--config", "qwen3-30b-a3b", "--hardware", "h200", "--claim", "1e9"]
    assert throughput_of(tmp_path, *words) == 0
    figures = json.loads(next(tmp_path.glob("*.json")).read_text())["figures"]
    rows, (note,) = rows_of(figures)
    assert {row[0]: row[-1] for row in rows if row[-1] != "fit"} == {"1": "do not fit", "2": "do not fit"}
    assert [row[0] for row in rows if "asked" in row[0]] == ["8 (asked for)"]
    assert len(rows) == 11
    assert "488 GB, activations not counted, and one h200 holds 141 GB" in note
    assert rows_of(figures | {"parameters_gb": 141.0})[1] == [], "each row holds them"
    rows, _ = rows_of(figures | {"case": figures["case"] | {"gpus": 3}, "num_gpus": 3, "memory_gb": 3 * 141})
    assert [row[-1] for row in rows[:5]] == ["do not fit", "do not fit", "do not fit", "fit", "fit"]
    assert rows[0][0] == "3 (asked for)"


def test_the_chart_has_hollow_points_where_the_parameters_do_not_fit(tmp_path):
    assert throughput_of(tmp_path, "--config", "qwen3-30b-a3b", "--hardware", "h200") == 0
    figures = json.loads(next(tmp_path.glob("*.json")).read_text())["figures"]

    def hollow(figures: dict) -> list[int]:
        (ax,) = throughput.draw(figures, "")[""].axes
        return [count for line in ax.lines if line.get_gid() == "crowded" for count in line.get_xdata()]

    assert hollow(figures) == [1, 2]
    assert hollow(figures | {"parameters_gb": 1.0}) == []


def test_the_table_tells_the_commits_of_forward_and_backward(tmp_path):
    assert throughput_of(tmp_path, "--config", "qwen3-30b-a3b") == 0
    record = json.loads(next(tmp_path.glob("*.json")).read_text())
    printed, of_steps = dict(record["figures"]["assumptions"]), json.loads(throughput.BACKWARD_TIMES.read_text())
    assert printed["--times, --level"].endswith(f", commit {record['environment']['commit']}")
    assert f"commit {of_steps['environment']['commit']}" in printed["--backward"]
    again = tmp_path / "given"
    assert throughput_of(again, "--layer-ms", "5", "--layer-tokens", "16384") == 0
    given = json.loads(next(again.glob("*.json")).read_text())["figures"]["assumptions"]
    assert "commit" not in dict(given)["--times, --level"]


@pytest.mark.parametrize(("hardware", "gpu", "given", "scale"), [
    ("h100", "NVIDIA H200", None, 4.8 / 3.35),
    ("b200", "NVIDIA H200", None, 4.8 / 8.0),
    ("h100", "NVIDIA H200", 1.1, 1.1),
    ("h100", "a GPU that is not known", None, 1.0),
])
def test_other_hardware_takes_the_worse_of_its_two_limits(hardware, gpu, given, scale):
    args = argparse.Namespace(hardware=hardware, layer_scale=given)
    assert throughput.layer_scale(args, {"environment": {"gpu": gpu}})[0] == pytest.approx(scale)


def test_every_assumption_of_throughput_is_printed_and_can_be_set(tmp_path):
    words = {"--other-backward": "3", "--layer-scale": "1.25", "--bytes-a-parameter": "12",
             "--other-efficiency": "0.25", "--price": "7"}
    assert throughput_of(tmp_path, *(word for pair in words.items() for word in pair)) == 0
    figures = json.loads(next(tmp_path.glob("*.json")).read_text())["figures"]
    printed = dict(figures["assumptions"])
    for name, said in {"--other-backward": "3.00 times", "--layer-scale": "1.25 (--layer-scale)",
                       "--bytes-a-parameter": "12,", "--other-efficiency": "25%", "--price": "$7.00"}.items():
        assert printed[name].startswith(said)
    assert figures["parameters_gb"] == pytest.approx(12 * throughput.MODELS[figures["config"]].total_billions)
    assert figures["layer_ms"] == pytest.approx(1.25 * figures["measured"]["ms"])


@pytest.mark.parametrize(("words", "said"), [
    (["--num-gpus", "0"], "--num-gpus 0"),
    (["--other-efficiency", "1.5"], "--other-efficiency 1.5"),
    (["--other-backward", "-1"], "--other-backward -1"),
    (["--layer-scale", "0"], "--layer-scale 0"),
    (["--layer-ms", "5"], "--layer-tokens"),
    (["--times", "no/such/file.json"], "no/such/file.json"),
    (["--level", "no such level"], "no such level"),
])
def test_throughput_names_the_argument_that_cannot_be(tmp_path, capsys, words, said):
    assert throughput_of(tmp_path, *words) == 2
    assert said in capsys.readouterr().err


def test_recorded_throughputs_are_below_the_peak():
    """Of the files in plots/: nothing on record that no GPU can do."""
    for path in (study.ROOT / "plots" / "studies").glob("*_throughput_*.json"):
        figures = json.loads(path.read_text())["figures"]
        assert all(one["share_of_peak"] < 1 for one in [figures["case"], *figures["curve"]])
