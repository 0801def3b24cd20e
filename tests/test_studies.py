"""The studies at a tiny size: each runs, leaves JSON that draws the same chart again, and shows what the JSON says.

Their kernels are compiled for sm_90 here too, and held to the marks of what they are said to do.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import time
from io import StringIO
from pathlib import Path

import common.level  # isort: skip  # noqa: F401  (picks Triton's interpreter before anything imports triton)

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest
import torch
from rich.console import Console

from labs.kernels import roles
from labs.studies import (
    byte_lm,
    grouped_gemm,
    io_overlap,
    moe_basics,
    peers,
    reading_a_profile,
    redraw,
    routing,
    study,
    throughput,
    token_rounding,
    variants,
    what_does_not_help,
)

TINY = {
    "moe_basics": ["--tokens", "64"],
    "routing": ["--steps", "2", "--seeds", "1"],
    "grouped_gemm": [],
    "io_overlap": [],
    "token_rounding": ["--steps", "2", "--seeds", "1"],
    "throughput": [],
    "variants": ["--sizes", "small"],
    "peers": ["--tokens", "16"],
    "what_does_not_help": [],
    "reading_a_profile": [],
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # Triton's interpreter is for machines without a GPU
SHARED = ("__init__", "study", "redraw", "byte_lm")


def study_of(name: str) -> study.Study:
    return importlib.import_module(f"labs.studies.{name}").STUDY


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Two threads a test on two cores wait for each other more than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """name -> (record, folder), each study run once, when first asked for: by one of the test workers for all."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent

    def run(name: str) -> tuple[dict, Path]:
        folder, over = shared / f"study_{name}", shared / f"study_{name}_is_over"
        try:
            folder.mkdir()
        except FileExistsError:
            patience = time.monotonic() + 300
            while not over.exists():
                assert time.monotonic() < patience, f"the worker that runs {name} has not ended"
                time.sleep(0.1)
        else:
            try:
                words = ["--device", DEVICE, "--quick", "--out", str(folder), *TINY[name]]
                assert study.main(study_of(name), words) == 0
            finally:
                over.touch()
        (path,) = folder.glob("*.json")
        return json.loads(path.read_text()), folder

    return run


def test_every_study_is_tested():
    files = {path.stem for path in Path(study.__file__).parent.glob("*.py")} - set(SHARED)
    assert files == set(TINY)


@pytest.mark.parametrize("name", TINY)
def test_a_study_leaves_figures_a_chart_and_a_sentence(ran, name, capsys):
    record, folder = ran(name)
    one = study_of(name)
    assert record["question"] == one.question
    assert record["question"].endswith("?")
    assert record["environment"]["commit"]
    assert record["conclusion"].endswith(one.conclude(record["figures"])), "the sentence is computed from the figures"
    assert len(list(folder.glob("*.png"))) == len(list(folder.glob("*.svg"))) >= 1
    assert "NaN" not in json.dumps(record)


@pytest.mark.parametrize("name", ["grouped_gemm", "routing"])
def test_plot_draws_the_same_again(ran, name, tmp_path, capsys):
    _, folder = ran(name)
    (path,) = folder.glob("*.json")
    assert study.main(study_of(name), ["--plot", str(path), "--out", str(tmp_path)]) == 0
    for drawn in folder.glob("*.svg"):
        assert (tmp_path / drawn.name).read_bytes() == drawn.read_bytes()
    assert not list(tmp_path.glob("*.json")), "drawing measures nothing"


def test_plot_refuses_another_studys_file(ran, tmp_path, capsys):
    _, folder = ran("moe_basics")
    (path,) = folder.glob("*.json")
    assert study.main(study_of("routing"), ["--plot", str(path)]) == 2
    assert "'moe_basics'" in capsys.readouterr().err
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    assert study.main(study_of("routing"), ["--plot", str(broken)]) == 2


def lines(fig: plt.Figure) -> dict[str, list[float]]:
    """Label -> y values of every line with a label."""
    return {line.get_gid(): list(line.get_ydata()) for ax in fig.axes for line in ax.lines if line.get_gid()}


def bars(fig: plt.Figure) -> list[float]:
    """Heights of all bars."""
    return [bar.get_height() for ax in fig.axes for bar in ax.patches]


def test_charts_show_the_jsons_figures(ran):
    figures = ran("grouped_gemm")[0]["figures"]
    drawn = lines(grouped_gemm.draw(figures, "")[""])
    for name in ("loop of cuBLAS", "grouped_mm"):
        values = [point["methods"][name]["tflops"]["p50"] for point in figures["by_experts"]]
        assert drawn[name] == values, f"{name}: the right panel, drawn last"

    figures = ran("moe_basics")[0]["figures"]
    heights = [bar.get_height() for bar in moe_basics.draw(figures, "")[""].axes[0].patches]
    assert heights == figures["rows_per_expert"]

    figures = ran("routing")[0]["figures"]
    charts = routing.draw(figures, "")
    heat = charts[""].axes[0].images[0].get_array()
    assert torch.equal(torch.tensor(heat), torch.tensor(figures["heat_map"], dtype=torch.float64))
    for mode, drops in figures["capacity"].items():
        for what in ("rows", "score"):
            assert lines(charts[""])[f"{mode} {what}"] == pytest.approx([100 * one["by_score"][what] for one in drops])
    for name, one in figures["training"]["remedies"].items():
        assert lines(charts["training"])[name] == pytest.approx([sum(step) / len(step)
                                                                 for step in zip(*one["gini"], strict=True)])

    figures = ran("what_does_not_help")[0]["figures"]
    gains = [point["gain"] for one in figures["ideas"] if one["status"] == "ok" for point in one["points"]]
    assert bars(what_does_not_help.draw(figures, "")[""]) == pytest.approx(gains)

    figures = ran("throughput")[0]["figures"]
    drawn = lines(throughput.draw(figures, "")[""])
    assert drawn["tokens_per_day"] == pytest.approx([one["tokens_per_day"] / 1e9 for one in figures["curve"]])

    figures = ran("token_rounding")[0]["figures"]
    drawn = lines(token_rounding.draw(figures, "")["quality"])
    for mode, one in figures["quality"]["modes"].items():
        assert drawn[f"{mode} seeds"] == [run[-1][1] for run in one["evaluations"]]
    plt.close("all")


@pytest.mark.skipif(f"matplotlib=={mpl.__version__}\n" not in (study.ROOT / "requirements.txt").read_text(),
                    reason="another matplotlib draws otherwise")
def test_recorded_throughputs_are_of_todays_times():
    """The ladder's file and the backward's: where either was measured again, the record is to be made again."""
    parser = argparse.ArgumentParser()
    throughput.arguments(parser)
    paths = list((study.ROOT / "plots" / "studies").glob("*throughput*.json"))
    assert paths
    for path in paths:
        record = json.loads(path.read_text())
        figures = record["figures"]
        args = parser.parse_args(["--config", figures["config"], "--mode", figures["mode"]])
        measured = throughput.layer_time(args)
        assert {key: measured[key] for key in figures["measured"]} == figures["measured"], path.name
        assert throughput.backward_time(args, measured) == figures["backward"], path.name
        assert measured["environment"] == record["environment"], path.name


def lines_and_numbers(chart: Path) -> tuple[str, list[float]]:
    """An SVG's text with identifiers by order of appearance and numbers cut out, and the numbers: another machine's
    arithmetic may round a coordinate, and so what it names by a hash of coordinates, differently."""
    text = chart.read_text()
    for place, name in enumerate(dict.fromkeys(re.findall(r'id="(\w*[0-9a-f]{10})"', text))):
        text = text.replace(name, f"name {place}")
    number = r"-?\d+\.\d+"
    return re.sub(number, "", text), [float(found) for found in re.findall(number, text)]


def test_a_moved_bar_is_seen_and_rounding_is_not(tmp_path):
    chart = tmp_path / "chart.svg"
    written = ['<path id="m0123456789" d="M 1.000000 2.5"/><use href="#m0123456789"/>',
               '<path id="mabcdef0123" d="M 1.000001 2.5"/><use href="#mabcdef0123"/>',
               '<path id="mabcdef0123" d="M 1.100000 2.5"/><use href="#mabcdef0123"/>',
               '<path id="mabcdef0123" d="M 1.000000 2.5"/><use href="#m0123456789"/>']
    read = [lines_and_numbers(chart) for text in written if chart.write_text(text)]
    assert read[0][0] == read[1][0] == read[2][0] != read[3][0]
    assert read[0][1] == pytest.approx(read[1][1], abs=1e-4)
    assert read[0][1] != pytest.approx(read[2][1], abs=1e-4)


@pytest.mark.parametrize("path", redraw.recorded(), ids=lambda path: path.stem)
def test_the_recorded_charts_are_what_their_json_draws(path, tmp_path):
    known = redraw.STUDIES[study.name_of(path)]
    charts = [drawn for drawn in study.draw(study.load(path, known), known, tmp_path) if drawn.suffix == ".svg"]
    assert charts
    for chart in charts:
        (text, numbers), (kept, kept_numbers) = map(lines_and_numbers, (chart, path.parent / chart.name))
        assert text == kept, "run make plots"
        assert numbers == pytest.approx(kept_numbers, abs=1e-4), "run make plots"


@pytest.mark.parametrize("path", redraw.recorded(), ids=lambda path: path.stem)
def test_a_recorded_sentence_is_what_its_figures_say(path):
    known = redraw.STUDIES[study.name_of(path)]
    record = study.load(path, known)
    assert record["conclusion"] == study.sentence(known, record), "run make plots"


def test_redrawing_names_a_file_that_is_no_record(tmp_path):
    path = tmp_path / "no.json"
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"no.json: holds study None"):
        redraw.redraw(path)


@pytest.mark.parametrize(("width", "tables"), [(200, 1), (80, 2), (48, 4), (36, 4)])
def test_a_narrow_terminal_gets_several_tables_of_whole_figures(width, tables):
    headings = ["routing, tokens", "milliseconds", "p20 to p80", "with rounding", "share", "why"]
    rows = [["skewed, 16384", "12.5", "12.25 to 12.75", "1.05x", "45%", "its tiles are full and those of no other are"],
            ["natural, 512", "0.318", "0.31 to 0.33", "0.99x", "100%", "-"]]
    console = Console(width=width, record=True, file=StringIO())
    console.print(study.PlainTable("What was found", headings, rows))
    text = console.export_text()
    assert text.count("What was found") == 1
    assert text.count("┏") == tables
    assert all(len(line) <= width for line in text.splitlines())
    assert all(text.count(row[0]) == tables for row in rows)
    assert all(cell in text for row in rows for cell in row[1:-1])
    assert all(word in text for word in rows[0][-1].split())


# ---- what single studies must not get wrong --------------------------------------------------------

def test_moe_basics_shows_the_steps_in_numbers(ran):
    book = ran("moe_basics")[0]["figures"]["book"]
    for t, out in enumerate(book["out"]):
        chosen = [line for line in book["chosen"] if line["token"] == t]
        total = [sum(line["score"] * line["y"][d] for line in chosen) for d in range(3)]
        assert total == pytest.approx(out, abs=1e-6)


def test_balance_loss_is_one_when_even_and_E_at_worst():
    even_TE = torch.full((8, 4), 0.25)
    assert moe_basics.balance_loss(even_TE, torch.arange(8)[:, None] % 4) == pytest.approx(1)
    one_TE = torch.zeros(8, 4).index_fill_(1, torch.tensor([2]), 1.0)
    assert moe_basics.balance_loss(one_TE, torch.full((8, 1), 2)) == pytest.approx(4)


@pytest.mark.parametrize("exponent", [0.0, 1.0, float("inf")])
def test_zipf_counts_are_whole_rows_that_sum_up(exponent):
    counts_E = grouped_gemm.zipf_counts(1000, 7, exponent)
    assert int(counts_E.sum()) == 1000
    assert int(counts_E.min()) >= 0
    if exponent == 0:
        assert int(counts_E.max() - counts_E.min()) <= 1
    if exponent == float("inf"):
        assert int(counts_E.max()) == 1000


def test_a_wrong_grouped_gemm_is_not_timed(monkeypatch, tmp_path):
    """Planted fault: one expert's product is left out."""
    def faulty(case: grouped_gemm.Case) -> None:
        grouped_gemm.loop_of_cublas(case)
        case.out_RN[:int(case.counts_E[0])] = 0

    monkeypatch.setitem(grouped_gemm.CALLS, "grouped_mm", faulty)
    with pytest.raises(RuntimeError, match=r"grouped_mm: relative error .* is over"):
        study.main(grouped_gemm.STUDY, ["--device", DEVICE, "--quick", "--out", str(tmp_path)])


def test_the_fastest_grouped_gemm_is_named_by_clock():
    def method(tflops: float, wall: float) -> dict:
        return {"status": "ok", "launches": 1, "tflops": {"p50": tflops}, "wall_ms": {"p50": wall}}

    def point(**methods: dict) -> dict:
        return {"E": 8, "methods": {"loop of cuBLAS": method(1.0, 9.0)} | methods}

    def said(**methods: dict) -> str:
        return grouped_gemm.conclude({"by_skew": [point(**methods)] * 2, "by_experts": [point(**methods)]})

    assert "ours is fastest on the GPU's clock" in said(ours=method(3.0, 2.0), theirs=method(2.0, 1.0))
    assert said(ours=method(3.0, 2.0), theirs=method(2.0, 1.0)).endswith("theirs with 1.00 ms against its 2.00.")
    assert said(ours=method(3.0, 0.5)).endswith("and by wall time ours with 0.500 ms.")


def test_what_is_faster_under_skew_is_not_told_as_a_share_kept():
    def point(**tflops: float) -> dict:
        return {"E": 8, "methods": {name.replace("_", " "): {"status": "ok", "launches": None, "tflops": {"p50": speed}}
                                    for name, speed in tflops.items()}}

    def said(loop: float, ours: float) -> str:
        even = point(loop_of_cuBLAS=1.0, ours=2.0)
        return grouped_gemm.conclude({"by_skew": [even, point(loop_of_cuBLAS=loop, ours=ours)], "by_experts": [even]})

    assert said(0.5, 2.0).startswith("At its worst load skew each keeps this share of its speed at an even load: "
                                     "ours 100%, loop of cuBLAS 50%; at 8 experts")
    assert said(13.25, 1.0).startswith("At its worst load skew these keep this share of their speed at an even load: "
                                       "ours 50%; these are faster than at an even load: loop of cuBLAS 13.2 times as ")
    assert said(2.0, 6.0).startswith("At its worst load skew these are faster than at an even load: ours 3.00 times as "
                                     "fast, loop of cuBLAS 2.00 times as fast; at 8")


def test_a_depth_is_compared_with_another_only():
    def variant(loads: str, depth: int, ms: float) -> dict:
        return {"roles": "one", "loads": loads, "block_N": 16, "depth": depth, "status": "ok",
                "ms": {"whole": {"p50": ms}}}

    def said(*pointers: float) -> str:
        found = [variant("pointers", depth, ms) for depth, ms in enumerate(pointers, start=1)]
        return io_overlap.conclude({"sweep_N": 16, "variants": [*found, variant("TMA", 1, 1.0)]})

    assert said(4.0, 2.0).startswith("With pointers, depth 2 takes 0.500 of depth 1's time; with TMA, only depth 1 ran")
    assert said(2.0, 4.0).startswith("With pointers, no depth is faster than depth 1; with TMA, only depth 1 ran")


def test_a_rounding_faster_than_its_tiles_allow_is_remarked():
    def mode(speedup: float, ideal: float) -> dict:
        return {"gemm_ms": dict.fromkeys(("p20", "p50", "p80"), 1 / speedup), "speedup": speedup, "net_speedup": 1.0,
                "ideal_speedup": ideal, "share_changed": 0.1}

    def said(nearest: dict) -> str:
        modes = {"exact": mode(1.0, 1.0), "nearest": nearest, "up": mode(1.3, 1.0)}
        return token_rounding.conclude({"speed": [{"fill": 2, "tile": 256, "modes": modes}], "quality": None})

    assert "more than fewer tiles explain: as many but full ones, by rounding up, give 1.30" in said(mode(1.5, 1.2))
    assert "explain" not in said(mode(1.1, 1.2))


def test_rounding_down_drops_half_a_tile_an_expert():
    """The learning path's 1/(2n), of the recorded run at n tiles of mean rows; about that at one: loads are uneven."""
    record = json.loads((study.ROOT / "plots" / "studies" / "h200_token_rounding.json").read_text())
    for point in record["figures"]["speed"]:
        if point["fill"] >= 1:
            down = point["modes"]["down"]
            near = pytest.approx(0.5 / point["fill"], rel=0.1 if point["fill"] > 1 else 0.15)
            assert down["dropped"] / point["modes"]["exact"]["rows"] == near


def test_no_memory_above_the_weights_is_shown_as_0(ran):
    figures = json.loads(json.dumps(ran("variants")[0]["figures"]))
    for size in figures["sizes"].values():
        for rows in (size["inference"], size["training"]):
            for place, row in enumerate(rows.values()):
                row |= {"status": "ok", "peak_mib": float(place)}
    fig = variants.draw(figures, "")["memory"]
    try:
        assert all("0" in [text.get_text() for text in ax.texts] for ax in fig.axes)
    finally:
        plt.close(fig)


def test_capacity_drops_the_weakest_scores_first(ran):
    for rows in ran("routing")[0]["figures"]["capacity"].values():
        for row in rows:
            assert row["by_score"]["rows"] == row["by_position"]["rows"]
            assert row["by_score"]["score"] <= row["by_position"]["score"] + 1e-12
    temperatures = ran("routing")[0]["figures"]["temperatures"]
    assert all(one["same_choice"] == 1 for one in temperatures)


def test_rounding_fills_every_tile(ran):
    for point in ran("token_rounding")[0]["figures"]["speed"]:
        assert all(one["utilisation"] == 1 for mode, one in point["modes"].items() if mode != "exact")
        assert point["modes"]["up"]["dropped"] == point["modes"]["exact"]["dropped"] == 0


def test_rounding_meets_the_routes_that_the_trained_layer_took():
    """What is handed to its router is what the layer's own forward gave it: the same rows an expert."""
    trained = []
    byte_lm.train(byte_lm.moe_factory(byte_lm.SMALL, capacity_factor=None), steps=2, device="cpu", progress=None,
                  after_step=lambda step, model: trained.append(model))
    (layer, model), T = (trained[-1].blocks[-1].mlp, trained[-1]), byte_lm.SMALL.T
    x_TD = byte_lm.expert_inputs(model, byte_lm.SMALL, T, torch.device("cpu"), torch.float32)
    rows_E = layer.gate(x_TD).expert_ids_TK.flatten().bincount(minlength=byte_lm.SMALL.E)
    assert torch.equal(rows_E, layer.rows_E)
    longer_TD = byte_lm.expert_inputs(model, byte_lm.SMALL, T + 5, torch.device("cpu"), torch.float32)
    assert longer_TD.shape == (T + 5, byte_lm.SMALL.D)
    assert torch.equal(longer_TD[:T], x_TD), "the same text at every call"


def points(*gains: float) -> list[dict]:
    """At the sizes 1, 10, 100 and so on, and nothing else than two ways timed."""
    return [{"size": 10**i, "gain": gain, "ms": {"plain": {}, "idea": {}}} for i, gain in enumerate(gains)]


def test_where_an_idea_is_no_slower():
    where = what_does_not_help.where
    assert where(points(0.5, 0.8, 1.2)) == "no slower from 100 on"
    assert where(points(1.5, 0.8)) == "no slower up to 1"
    assert where(points(0.5, 0.98, 1.1, 0.7)) == "no slower from 10 to 100"
    assert where(points(1.5, 0.7, 1.1)) == "no slower up to 1, from 100 on"
    assert where(points(1.5, 0.99)) == "no slower from 1 to 10"
    assert where(points(0.5, 0.9, 0.7)) == "slower from 1 to 100"


def test_a_turn_is_told_with_the_gains_around_it():
    told = what_does_not_help.gains_there
    assert told(points(0.4, 0.5, 1.2, 1.3)) == "0.500x at 10, 1.20x at 100"
    assert told(points(0.5, 0.9, 0.7)) == "0.500x at 1, 0.900x at 10, 0.700x at 100"
    assert told(points(1.2, 1.1)) == "1.20x at 1, 1.10x at 10"


def test_what_was_not_measured_is_called_extrapolated():
    """Time ratios on a line, so that the fit is exact: the size where it crosses is known."""
    beyond, even = what_does_not_help.beyond, 1 / (1 - what_does_not_help.SLACK)
    upwards = points(*(1 / (even + 5 * (1 / size - 1 / 1000)) for size in (1, 10, 100)))
    assert beyond(upwards, None) == "; extrapolated from the nearest 3, not measured: no slower from about 1,000 on"
    assert beyond(upwards, 500).endswith("so nowhere beyond"), "1000 is no size where 500 is the largest"
    assert beyond(upwards, 100) == ", where sizes end"
    assert beyond(points(*(1 / (1.25 + 5 / size) for size in (1, 10, 100))), None) == (
        "; a line through the nearest 3 ends at 0.800x, so nowhere beyond")

    downwards = [point | {"size": 10 * point["size"]} for point in
                 points(*(1 / (even + 0.1 * (size - 4)) for size in (10, 100, 1000)))]
    assert beyond(downwards, None) == "; extrapolated from the nearest 3, not measured: no slower up to about 4.00"
    assert beyond(points(0.9, 0.5), None) == ", where sizes end", "no size is below 1"
    assert beyond(points(0.5, 0.9), None) == "", "any two points lie on a line"
    assert beyond(points(0.5, 0.9, 0.7), None) == "", "the best is inside"
    assert beyond(points(0.5, 0.9, 1.1), None) == "", "it turns where it was measured"


def test_a_wrong_padding_is_not_timed(monkeypatch):
    """Planted fault: where there is padding, rows go to each other's places."""
    def faulty(x_TD: torch.Tensor, place_TK: torch.Tensor, rows: torch.Tensor) -> None:
        spread(x_TD, place_TK.flip(0).contiguous() if rows.shape[0] > place_TK.numel() else place_TK, rows)

    spread = what_does_not_help.spread_rows
    monkeypatch.setattr(what_does_not_help, "spread_rows", faulty)
    with pytest.raises(RuntimeError, match=r"idea at size 2: relative error .* is over"):
        what_does_not_help.padded_bmm(study.Options(torch.device(DEVICE), False, lambda text: None,
                                                    argparse.Namespace()))


def test_a_gain_is_told_with_what_gains_more():
    def point(idea: float, other: float) -> dict:
        return {"ms": {name: {"p50": ms} for name, ms in (("plain", 2.0), ("idea", idea), ("grouped_mm", other))}}

    assert what_does_not_help.rivals([point(1.5, 1.0), point(1.5, 1.2)]) == "; grouped_mm faster still at every size"
    assert what_does_not_help.rivals([point(1.5, 1.0), point(1.5, 1.6)]) == ""


def test_all_ideas_are_told_in_one_sentence(ran):
    said = what_does_not_help.conclude(ran("what_does_not_help")[0]["figures"])
    assert said.startswith("As fast as the plain way, within 3%, or faster: ")
    assert not re.search(r"\. [A-Z]", said)

    def sweep(idea: str, axis: str, *gains: float) -> dict:
        return {"idea": idea, "plain": "plain", "axis": axis, "status": "ok", "points": points(*gains)}

    told = what_does_not_help.conclude({"ideas": [
        sweep("late", "rows", 0.5, 1.2), sweep("late", "width", 0.5, 0.6), sweep("lost", "rows", 0.5, 0.6),
        {"idea": "absent", "status": "n/a (needs CUDA)"}]})
    assert told == ("As fast as the plain way, within 3%, or faster: late against plain from 10 on (rows); at no "
                    "measured size: lost against plain.")


def test_a_reason_has_the_wall_time_of_both(monkeypatch):
    case = argparse.Namespace(size=4, calls={"plain": None, "idea": None}, errors={"plain": 0.1, "idea": 0.1})
    profile = argparse.Namespace(kernels={"gemm": (1, 0.5)}, gpu_ms=0.5, launches=1)
    monkeypatch.setattr(what_does_not_help, "profile_call", lambda call: profile)
    monkeypatch.setattr(what_does_not_help, "count_host_syncs", lambda call: 0)
    said = what_does_not_help.profile_words(case, "rows", {"plain": {"p50": 1.0}, "idea": {"p50": 2.0}})
    assert "plain: wall 1.00 ms, GPU busy 0.500 ms" in said
    assert "idea: wall 2.00 ms, GPU busy 0.500 ms" in said


def test_the_full_layer_is_told_where_it_loses():
    def spread(ms: float) -> dict:
        return {"ms": {"p20": ms * 0.9, "p50": ms, "p80": ms * 1.1}, "speedup": 10 / ms}

    rows = {"vanilla": spread(10.0), "grouped": spread(3.0), "tile-aware": {"status": "n/a"}, "full": spread(4.0)}
    assert variants.faster_than_full(rows) == "grouped"
    assert variants.faster_than_full(rows | {"full": spread(3.2)}) is None, "within the spread"
    size = {"shape": {"E": 8}, "inference": rows, "training": rows | {"full": spread(2.0)}}
    said = variants.conclude({"sizes": {"small": size}})
    assert "in inference grouped is faster, 3.33 times" in said
    assert said.count("is faster") == 1


@pytest.mark.parametrize(("found", "said"), [
    ([0.14], "14% more"), ([-0.14], "14% less"), ([-0.0], "0% more"), ([0.2, 0.3, 0.1], "10% to 30% more"),
    ([-0.83, -0.55], "55% to 83% less"), ([-0.05, 0.2], "5% less to 20% more"), ([0.05, -0.2], "5% more to 20% less"),
    ([0.561, 0.559], "56% more"), ([-0.001, 0.002], "0% more"),
])
def test_changes_are_told_with_their_sign_and_once(found, said):
    assert study.changes(found, "more", "less") == said


def test_a_layer_that_keeps_more_and_a_faster_checkpoint_are_told_as_such():
    def row(name: str, ms: float, kept: float) -> dict:
        return {"name": name, "cumulative": not name.startswith("with "), "step_ms": {"p50": ms}, "kept_mib": kept}

    said = redraw.STUDIES["full_moe"].conclude({"mode": "train", "rows": [
        row("baseline", 4.0, 3.0), row("+ grouped GEMM", 3.0, 1.0), row("+ IO overlap", 2.0, 1.14),
        row("with checkpointing", 1.8, 0.5)]})
    assert "with 14% more kept for backward" in said
    assert said.endswith("and takes 10% less.")


def test_one_shape_of_training_is_told_with_one_figure():
    def shape(kept: float) -> dict:
        rows = {"our kernels": (2.0, kept), "checkpointed": (2.42, 1.0), "grouped_mm, float32 sum": (3.0, 10.0),
                "grouped_mm, bmm sum": (3.1, 10.0)}
        return {"config": "small", "shape": {"T": 64}, "rows": [
            {"name": name, "step_ms": {"p50": ms}, "kept_mib": kept, "peak_mib": None}
            for name, (ms, kept) in rows.items()]}

    def said(*kept: float) -> str:
        return redraw.STUDIES["backward"].conclude({"paper_saved": 0.45, "shapes": [shape(one) for one in kept]})

    assert "Kept for backward: 56% less (SonicMoE's paper, on its 7B model: 45%)" in said(4.4)
    assert "Kept for backward: 14% more (SonicMoE's paper, on its 7B model: 45% less)" in said(11.4)
    assert "Kept for backward: 14% more to 56% less (" in said(11.4, 4.4)
    assert said(4.4, 4.4).endswith("Checkpointing takes 21% longer.")


def test_a_rounded_row_is_not_the_fastest_of_ours():
    def row(kind: str, name: str, ms: float, variant: str = "exact") -> dict:
        return {"kind": kind, "name": name, "variant": variant, "status": "ok", "ms": {"p50": ms}}

    ours = [row("level", "exact", 2.0), row("level", "rounded", 1.0, "rounded")]
    assert peers.conclude({"rows": [*ours, row("peer", "theirs", 3.0)]}).startswith("exact takes 2.00 ms and theirs")


# ---- reading a profile -----------------------------------------------------------------------------

@pytest.mark.parametrize(("kind", "names"), [
    ("expert GEMMs", "grouped_gemm_kernel up_gather_kernel up_rows_kernel up_ahead_kernel tall_up_rows_kernel "
                     "up_swiglu_kernel plain_up_kernel down_kernel down_combine_kernel tall_down_kernel "
                     "plain_down_kernel"),
    ("router GEMM", "nvjet_sm90_tss_64x24_64x16_2x4_h_bz_TNT logits_kernel logits_and_choose_kernel"),
    ("activation", "silu_mul_kernel"),
    ("sort, top-k, offsets", "choose_kernel place_kernel route_and_place_kernel work_kernel plan_tiles_kernel "
                             "radixSortKVInPlace searchsorted_cuda_kernel"),
    ("gather, combine", "combine_kernel spread_rows_kernel vectorized_gather_kernel reduce_kernel"),
])
def test_kernels_of_levels_4_and_8_are_of_their_kind(kind, names):
    assert {name: reading_a_profile.kind_of(name) for name in names.split()} == dict.fromkeys(names.split(), kind)


def profiled(level: str, *kernels: str, launches: int | None = None) -> dict:
    """A run of one token: a millisecond a kernel, of nine; a launch a kernel, unless told otherwise."""
    found = [{"name": name, "kind": reading_a_profile.kind_of(name), "count": 1, "ms": 1.0} for name in kernels]
    return {"level": level, "T": 1, "wall_ms": {"p50": 9.0}, "busy_ms": len(found), "kernels": found,
            "launches": len(found) if launches is None else launches}


def test_a_profile_tells_which_kernels_are_gone():
    old = profiled("level 4", "grouped_gemm_kernel", "silu_mul_kernel", "gather", "copy")
    new = profiled("level 8", "up_ahead_kernel", "down_combine_kernel", "copy")
    said = reading_a_profile.conclude({"runs": [old, new]})
    assert "level 8 has no kernel left for activation; gather, combine, spends 1.00 ms around" in said
    kept = profiled("level 8", "up_kernel", "silu_mul_kernel", "combine_kernel", "copy")
    assert "level 8 spends 3.00 ms around" in reading_a_profile.conclude({"runs": [old, kept]})


def test_a_profile_of_one_token_count_says_it_once_and_names_its_level(ran):
    alone = profiled("level 4", "grouped_gemm_kernel", "copy")
    assert reading_a_profile.conclude({"runs": [alone]}) == (
        "At 1 tokens kernels are at work for 22% of level 4's wall time; the expert GEMMs take 50% of the busy time "
        "and the work around them 1.00 ms.")
    more = alone | {"T": 512}
    assert "wall time; at 512 the expert" in reading_a_profile.conclude({"runs": [alone, more]})
    said = reading_a_profile.conclude({"runs": [profiled("level 1", "aten::bmm", launches=0)]})
    assert said.startswith("On a CPU operations of level 1 stand in for level 4's kernels: at 1 tokens they are at ")
    slow = alone | {"busy_ms": 18.0}
    assert reading_a_profile.conclude({"runs": [slow]}).startswith("At 1 tokens kernels are at work for all of level ")
    if DEVICE == "cpu":
        record, _ = ran("reading_a_profile")
        level = record["figures"]["runs"][0]["level"]
        assert f"On a CPU operations of {level} stand in for level 4's kernels: at 64 tokens" in record["conclusion"]
        assert record["conclusion"].count("at 64") == 1


def test_a_copy_before_a_graphs_replay_is_told():
    words = reading_a_profile.launch_words
    kernels = ("Memcpy DtoD (Device -> Device)", "up_kernel", "down_kernel")
    assert words(profiled("level 8", *kernels, launches=2)) == "2 launches: a copy of x, then the graph's replay"
    assert words(profiled("level 8", *kernels, launches=1)) == "1 launch", "the copy is in the graph"
    assert words(profiled("level 8", *kernels[1:], launches=1)) == "1 launch"
    assert words(profiled("level 4", *kernels)) == "3 launches"


def test_a_profile_is_of_a_call_after_others_with_the_same_x(monkeypatch):
    """From the second such call on, level 8's graph reads x in place."""
    def build(*args):
        forward = one.build(*args)
        return lambda x_TD: addresses.append(x_TD.data_ptr()) or forward(x_TD)

    def profile(call, on_gpu):
        before = len(addresses)
        found = plain(call, on_gpu)
        assert before >= 2
        assert len(set(addresses[before - 2:])) == 1
        return found

    addresses, plain = [], reading_a_profile.profile
    (one,) = (one for one in reading_a_profile.discover() if one.level.number == 1)
    loaded = argparse.Namespace(level=one.level, build=build)
    monkeypatch.setattr(reading_a_profile, "discover", lambda: [loaded])
    monkeypatch.setattr(reading_a_profile, "profile", profile)
    args = argparse.Namespace(preset=None, tokens="16")
    reading_a_profile.measure(study.Options(torch.device("cpu"), False, lambda text: None, args))
    assert len(addresses) == 5, "gate, warm, two rounds, profile"


# ---- machine code ----------------------------------------------------------------------------------

def test_kernels_compile_for_hopper():
    from tests.machine_code import Request, compile_all

    grouped = {"a_ptr": "*bf16", "w_ptr": "*bf16", "out_ptr": "*bf16", "log_ptr": "*i64", "offsets_ptr": "*i32",
               "E": "i32", "N": "i32", "K": "i32"}
    scatter = {"hidden_ptr": "*bf16", "down_ptr": "*bf16", "out_ptr": "*fp32", "token_of_row_ptr": "*i32",
               "score_of_row_ptr": "*fp32", "offsets_ptr": "*i32", "E": "i32", "D": "i32", "F": "i32"}
    blocks = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "E_POW2": 64}
    box = {rows: f"tensordesc<bf16[{rows}, 64],{roles._SWIZZLED.value!r}>" for rows in (64, 256)}
    parts = {"claimed_ptr": "*i32", "rows_desc": box[64], "weights_desc": box[256], "out_ptr": "*bf16",
             "tiles_ptr": "*i32", "tile_count_ptr": "*i32", "N8": "i32", "K8": "i32"}
    pointers = tuple(name for name, kind in parts.items() if kind.startswith("*"))
    found = compile_all([
        *(Request(f"part {part}", "labs.studies.io_overlap", "roles_kernel", parts, {"PART": part}, pointers, 4, 3,
                  options=roles.LAUNCH) for part in range(3)),
        Request("persistent", "labs.studies.grouped_gemm", "persistent_kernel", grouped, {**blocks, "LOG": 1},
                ("a_ptr", "w_ptr", "out_ptr", "log_ptr", "N", "K"), 8, 3),
        Request("atomic", "labs.studies.what_does_not_help", "scatter_down_kernel", scatter, {**blocks, "ATOMIC": 1},
                ("hidden_ptr", "down_ptr", "out_ptr", "D", "F"), 8, 3),
    ])
    for name, code in found.items():
        assert (code.count("HGMMA") > 0) == (name != "part 1"), f"{name}: loads only multiplies nothing"
        assert code.count(r"LDL|STL") == 0, f"{name} spills"
    assert found["persistent"].count(r"S2U?R|CS2R") > 0
    assert found["atomic"].count(r"RED|ATOM") > 0
