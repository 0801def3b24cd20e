"""Charts and README tables show what their JSON holds, nothing else: python -m pytest tests/test_charts.py"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from matplotlib import pyplot as plt
from rich.console import Console

from common import charts
from common.config import DEFAULT_TOKENS
from common.measure import Spread
from common.readme import LEADS, TABLE, TRAINING, leads_markdown, markdown, render, training_markdown
from common.references import BOUND
from common.results import Row, Run, load, save, speedups
from common.show import LOG_WIDTH, RunTable, status_text

ROOT = Path(__file__).resolve().parents[1]
RECORDED = sorted((ROOT / "plots").glob("*.json"))
BESIDE_PEERS = [path for folder in ("peers", "triton_kernels")
                for path in sorted((ROOT / "plots" / folder).glob("*.json"))]
ENVIRONMENT = {"gpu": "NVIDIA Test", "sm": "sm_90", "torch": "2", "triton": "3", "cuda": "13", "driver": "1",
               "python": "3", "commit": "abc", "dirty": False, "date": "2026-01-01"}


def row(number: int, ms: float | None, **fields) -> Row:
    spread = None if ms is None else Spread(ms * 0.9, ms, ms * 1.1)
    known = {"samples": 5, "peak_mib": 10.0 * (number + 1), "status": "ok",
             "roofline_share": None if ms is None else 1 / ms}
    return Row("level", number, fields.pop("name", f"name{number}"), "adds", wall_ms=spread, gpu_ms=spread,
               **{**known, **fields})


def made_up(T: int, *rows: Row) -> Run:
    bound = Row("reference", None, "cuBLAS bmm", "bound", "ok", wall_ms=Spread(1, 1, 1), roofline_share=0.8)
    return Run("qwen3-30b-a3b", {"T": T, "D": 2, "F": 2, "E": 2, "K": 1}, "natural", "bfloat16", 0, 5, ENVIRONMENT,
               {"matmul_tflops": 700.0, "copy_tbps": 4.0}, 2, 10**12, 10**9, 1.5, rows=[*rows, bound])


RUNS = [
    made_up(64, row(0, 100.0), row(1, 2.0), row(2, 4.0), row(3, None, status="oom", peak_mib=None)),
    made_up(512, row(0, 200.0), row(1, None, status="oom", peak_mib=None), row(2, 20.0), row(3, 1.0)),
]
PEER = Row("peer", None, "their layer", "theirs", "ok", wall_ms=Spread(1.5, 2, 2.5), gpu_ms=Spread(1, 1, 1))
WITH_PEERS = [replace(run, rows=[*run.rows, PEER, replace(PEER, name="absent", status="not installed", wall_ms=None)])
              for run in RUNS]


def bars(ax) -> dict[str, float]:
    return {patch.get_gid(): patch.get_width() for patch in ax.patches if patch.get_gid()}


def lines(ax) -> dict[str, list[tuple[float, float]]]:
    return {line.get_gid(): list(zip(line.get_xdata(), line.get_ydata(), strict=True)) for line in ax.lines}


@pytest.fixture(params=["made up", *RECORDED], ids=lambda value: value if isinstance(value, str) else value.stem)
def runs(request) -> list[Run]:
    if request.param == "made up":
        return RUNS
    return [run for run in load(request.param) if (run.routing, run.dtype) == ("natural", "bfloat16")]


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def test_ladder_bars_are_the_recorded_ratios(runs):
    fig = charts.ladder(runs)
    for ax, run in zip(fig.axes, charts.panels(runs), strict=True):
        timed = [one for one in run.levels if one.timed]
        first = timed[0].wall_ms.p50
        assert bars(ax) == {one.name: pytest.approx(first / one.wall_ms.p50) for one in timed}


def test_panels_that_share_an_axis_agree_on_its_levels():
    """A run of some levels beside one of all: each bar stands beside its own name."""
    few, all_levels = made_up(64, row(2, 10.0), row(3, 5.0)), made_up(128, row(0, 9.0), row(2, 6.0), row(3, 3.0))
    for chart in (charts.ladder, charts.memory, charts.roofline):
        axes = chart([few, all_levels]).axes
        names = [label.get_text().split(" ", 1)[1] for label in axes[0].get_yticklabels()]
        assert names == ["name0", "name2", "name3"]
        for ax in axes:
            assert all(names[round(bar.get_y() + bar.get_height() / 2)] == bar.get_gid()
                       for bar in ax.patches if bar.get_gid())
        assert axes[0].texts[0].get_text() == "not run"
    legend = charts.scale([few, all_levels]).axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()][:3] == ["0 name0", "2 name2", "3 name3"]


def test_a_losing_step_has_its_own_colour():
    ax = charts.ladder(RUNS).axes[0]
    colors = {patch.get_gid(): patch.get_facecolor() for patch in ax.patches if patch.get_gid()}
    assert colors["name2"] != colors["name1"]
    noise = charts.ladder([made_up(64, row(0, 10.0), row(1, 10.5))]).axes[0]
    assert {patch.get_facecolor() for patch in noise.patches if patch.get_gid() == "name1"} != {colors["name2"]}
    assert any("out of memory" in text.get_text() for text in ax.texts)


def test_scale_lines_are_the_recorded_times(runs):
    if len(runs) < 2:
        pytest.skip("one token count has no scale")
    drawn = lines(charts.scale(runs).axes[0])
    for name in {one.name for run in runs for one in run.levels}:
        rows = [(run.shape["T"], one) for run in runs for one in run.levels if one.name == name]
        assert drawn[name] == [(T, pytest.approx(one.wall_ms.p50)) for T, one in rows if one.timed]
        assert [T for T, _ in drawn[f"{name}-oom"]] == [T for T, one in rows if one.status == "oom"]
    assert drawn["bound"] == [(run.shape["T"], run.row("cuBLAS bmm").wall_ms.p50) for run in runs]


def test_memory_bars_are_the_recorded_peaks(runs):
    for ax, run in zip(charts.memory(runs).axes, charts.panels(runs), strict=True):
        assert bars(ax) == {one.name: one.peak_mib for one in run.levels if one.status == "ok"}


def test_roofline_bars_are_the_recorded_shares(runs):
    for ax, run in zip(charts.roofline(runs).axes, charts.panels(runs), strict=True):
        assert bars(ax) == {one.name: pytest.approx(100 * one.roofline_share)
                            for one in run.levels if one.timed}
        assert lines(ax)["bound"][0][0] == pytest.approx(100 * run.row("cuBLAS bmm").roofline_share)


@pytest.mark.parametrize("path", [None, *BESIDE_PEERS], ids=str)
def test_peer_bars_are_the_recorded_times(path):
    runs = [run for run in (load(path) if path else WITH_PEERS) if charts.has_peers(run)]
    shown = runs[:charts.MOST_PEER_PANELS]
    for ax, run in zip(charts.peers(runs).axes, shown, strict=False):
        assert bars(ax) == {one.name: pytest.approx(one.wall_ms.p50)
                            for one in run.rows if one.timed and one.name != "cuBLAS bmm"}
        bound, end = run.row(BOUND), ax.get_xlim()[1]
        lines = [line.get_xdata()[0] for line in ax.lines if line.get_color() == charts.BOUND_COLOR]
        assert lines == [one.p50 for one in (bound.wall_ms, bound.sustained_ms) if one]
        alone = {line.get_gid(): line.get_xdata()[0] for line in ax.lines if line.get_marker() == "D"}
        assert alone == {f"{one.name} sustained": one.sustained_ms.p50 for one in run.rows
                         if one.timed and one is not bound and one.sustained_ms and one.sustained_ms.p50 < end}
        said = [label.get_text() for label in ax.texts if label.get_text().startswith("n/a")]
        assert said == [status_text(one) for one in run.rows if one.kind == "peer" and one.status == "unsupported"]
    assert not charts.has_peers(RUNS[0])


def test_every_chart_says_what_it_was_measured_on():
    for chart in charts.CHARTS.values():
        words = " ".join(text.get_text() for text in chart(WITH_PEERS).findobj(plt.Text))
        assert "NVIDIA Test" in words
        assert "commit abc" in words
        assert "natural routing" in words


def test_draw_all_writes_png_and_svg(tmp_path):
    written = charts.draw_all(RUNS, tmp_path, "made-up") + charts.draw_all(WITH_PEERS, tmp_path, "made-up")
    assert {path.name for path in written} == {f"made-up_{name}.{ending}" for name in charts.CHARTS
                                               for ending in ("png", "svg")}
    assert len(written) == 2 * len(charts.CHARTS)
    assert all(path.stat().st_size > 10_000 for path in written)


def test_panels_prefer_the_presets_token_counts():
    sweep = [made_up(T, row(0, 1.0)) for T in (64, 128, 256, 512, 16384, 32768)]
    assert [run.shape["T"] for run in charts.panels(sweep)] == list(DEFAULT_TOKENS["qwen3-30b-a3b"])
    assert charts.panels(sweep[:3]) == sweep[:3], "few enough for a panel each"


def test_speedups_skip_what_has_no_time():
    gains = speedups(RUNS[1])
    assert set(gains) == {"name0", "name2", "name3"}
    assert gains["name2"].step == pytest.approx(10)
    assert gains["name3"].step == pytest.approx(20)
    assert gains["name3"].total == pytest.approx(200)


# ---- a level with rounded routing: another function, and marked as such ------------------------------

ROUNDING = {"tile": 128, "mode": "nearest", "rows_dropped": 1000, "rows_added": 1200, "share_changed": 0.05,
            "utilisation_before": 0.9, "utilisation_after": 1.0, "tokens_without_expert": 3, "gpu_us": 33.0}
ROUNDED = [
    made_up(64, row(0, 100.0), row(1, 10.0), row(2, 10.0, reason="rounding is off: too few rows")),
    made_up(512, row(0, 200.0), row(1, 20.0), row(2, 16.0, variant="rounded", rounding=ROUNDING),
            row(3, 10.0), row(3, 8.0, variant="rounded", name="name3 rounded", rounding=ROUNDING)),
]


def test_a_step_compares_like_with_like():
    gains = speedups(ROUNDED[1])
    assert gains["name2"].step == pytest.approx(20 / 16), "the first rounded level is read against the last exact one"
    assert gains["name3"].step == pytest.approx(20 / 10), "an exact level against the exact level below"
    assert gains["name3 rounded"].step == pytest.approx(16 / 8)
    assert gains["name3 rounded"].total == pytest.approx(200 / 8)


def test_a_rounded_bar_is_hatched_and_named():
    exact, rounded = charts.ladder(ROUNDED).axes
    hatched = [{patch.get_gid() for patch in ax.patches if patch.get_hatch()} for ax in (exact, rounded)]
    assert hatched == [set(), {"name2", "name3 rounded"}]
    words = [text.get_text() for text in rounded.texts]
    assert sum(word.endswith(" rounded") for word in words) == 2
    assert any("another function" in text.get_text() for text in rounded.figure.legends[0].get_texts())
    assert not any("another function" in text.get_text() for text in charts.ladder(RUNS).findobj(plt.Text))


def test_a_level_that_does_more_has_its_own_colour():
    run = made_up(64, row(0, 10.0), row(8, 1.0), row(9, 2.0))
    for chart in (charts.ladder, charts.memory, charts.roofline):
        fig = chart([run])
        colors = {patch.get_gid(): patch.get_facecolor() for patch in fig.axes[0].patches if patch.get_gid()}
        assert colors["name9"] not in (colors["name8"], colors["name0"]), "its time is no step of the ladder's"
        assert any("level 9: does more" in text.get_text() for text in fig.legends[0].get_texts())
    scale = charts.scale([run, made_up(128, row(9, 3.0))]).axes[0]
    assert {line.get_gid() for line in scale.lines if line.get_linestyle() == ":"} == {"name9"}


def test_a_rounded_point_has_its_own_mark():
    ax = charts.scale(ROUNDED).axes[0]
    assert lines(ax)["name2"] == [(64, 10.0), (512, 16.0)]
    assert lines(ax)["name2-rounded"] == [(512, 16.0)]
    assert lines(ax)["name1-rounded"] == []
    assert "rounded routing" in ax.get_legend().get_title().get_text()


def test_tables_say_what_rounding_changed(tmp_path):
    off, on = (markdown(run) for run in ROUNDED)
    assert "| 2 | name2 (rounded) | 16.0" in on
    assert "| 3 | name3 rounded | 8.00" in on
    assert ("name2 (rounded): tile 128, nearest: 1,000 rows dropped, 1,200 added (5.0% of routes), tile utilisation "
            "90.0% before, 100.0% after, 3 tokens without expert, 33.0 us for rounding itself.") in on
    assert "not causal; evaluation is exact top-k." in on
    assert "rounded" not in off
    assert "- name2: rounding is off: too few rows." in off
    console = Console(width=200, record=True, file=StringIO())
    console.print(RunTable(ROUNDED[1]))
    assert "not causal" in console.export_text()
    assert load(save(tmp_path, ROUNDED[1])) == [ROUNDED[1]]


@pytest.mark.parametrize(("width", "seen", "unseen"), [(200, ("TFLOP/s", "sustained"), "no room"),
                                                       (80, ("p20-p80", "no room for TFLOP/s"), "peak MiB │"),
                                                       (40, ("wall ms",), "total ┃")])
def test_a_narrow_terminal_keeps_names_and_times(width, seen, unseen):
    console = Console(width=width, record=True, file=StringIO())
    console.print(RunTable(WITH_PEERS[0]))
    text = console.export_text()
    assert all(word in text for word in (*seen, "name0", "100", "out of memory"))
    assert unseen not in text


def test_a_narrow_terminal_drops_empty_columns_first_and_without_a_gpu_the_errors_last():
    rows = [replace(row, gpu_ms=None, sustained_ms=None, rel_err=1e-7) for row in WITH_PEERS[0].rows]
    text = {}
    for sm in ("sm_90", None):
        console = Console(width=62, record=True, file=StringIO())
        console.print(RunTable(replace(WITH_PEERS[0], rows=rows, environment={**WITH_PEERS[0].environment, "sm": sm})))
        text[sm] = " ".join(console.export_text().split())
    for dropped in text.values():
        reasons = dropped[dropped.index("no room for"):]
        assert reasons.index("GPU ms") < reasons.index("roofline") > reasons.index("sustained")
    assert "1.0e-07" not in text["sm_90"]
    assert "1.0e-07" in text[None]


def test_a_log_has_room_for_all_columns():
    for path in (*RECORDED, *BESIDE_PEERS):
        for run in load(path):
            console = Console(width=LOG_WIDTH, record=True, file=StringIO())
            console.print(RunTable(run))
            assert "no room for" not in console.export_text(), run.preset


def test_results_from_before_there_were_variants_still_load(tmp_path):
    path = save(tmp_path, RUNS[0])
    data = json.loads(path.read_text())
    for one in data["runs"][0]["rows"]:
        del one["rounding"]
    path.write_text(json.dumps(data))
    assert load(path) == [RUNS[0]]


# ---- results files and README --------------------------------------------------------------------

def test_a_run_survives_the_file(tmp_path):
    path = save(tmp_path, RUNS[0])
    assert path.name == "test_qwen3-30b-a3b.json"
    assert load(path) == [RUNS[0]]


def test_a_file_that_is_no_results_file_is_named(tmp_path):
    path = tmp_path / "broken.json"
    path.write_text("{")
    with pytest.raises(ValueError, match=r"broken\.json is not JSON"):
        load(path)
    path.write_text(json.dumps([1]))
    with pytest.raises(ValueError, match="has results schema None"):
        load(path)
    for empty in ({"schema": 1}, {"schema": 1, "runs": [{}]}, {"schema": 1, "runs": [3]}):
        path.write_text(json.dumps(empty))
        with pytest.raises(ValueError, match=r"broken\.json says schema 1 but lacks"):
            load(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"broken\.json is not JSON"):
        load(path)
    with pytest.raises(ValueError, match="is a folder"):
        load(tmp_path)


def test_a_markdown_table_holds_the_medians():
    table = markdown(RUNS[0])
    assert "| 0 | name0 | 100 (90.0 to 110) |" in table
    assert "**0.500x, slower**" in table
    assert "n=3" in markdown(made_up(64, row(0, 100.0, samples=3)))
    assert "1.05x, within the spread" in markdown(made_up(64, row(0, 10.5), row(1, 10.0)))
    assert "| 3 | name3 | out of memory |" in table


def test_render_replaces_only_what_stands_between_markers(tmp_path):
    save(tmp_path, RUNS[0])
    text = "before\n<!-- table test_qwen3-30b-a3b 64 -->\nstale\n<!-- end -->\nafter\n"
    fresh = render(text, tmp_path)
    assert fresh.startswith("before\n")
    assert fresh.endswith("<!-- end -->\nafter\n")
    assert "stale" not in fresh
    assert render(fresh, tmp_path) == fresh
    with pytest.raises(ValueError, match=r"README.md wants tokens \[128\]"):
        render(text.replace(" 64 ", " 128 "), tmp_path)


def test_the_table_of_leads_has_our_highest_exact_level_and_the_fastest_other(tmp_path):
    slow = replace(PEER, name="slow layer", wall_ms=Spread(3.5, 4, 4.5))
    rounded = row(3, 0.5, name="name3 rounded", variant="rounded")
    run = made_up(64, row(0, 100.0), row(2, 1.0, bound_share=1.0), rounded, slow, PEER, replace(PEER, status="failed"))
    found = leads_markdown([run])
    assert ("| qwen3-30b-a3b | 64 | 2 name2 | 1.00 (0.900 to 1.10) | 100% | - | their layer | 2.00 (1.50 to 2.50) | "
            "100.0% | - | 0.0%, within the spread | - | - | - | - | 5 |") in found
    timed = [replace(one, gpu_ms=Spread(ms, ms, ms), sustained_ms=Spread(2 * ms, 2 * ms, 2 * ms))
             for one, ms in ((run.rows[1], 0.8), (PEER, 1.0), (replace(PEER, name=BOUND), 0.72))]
    timed[-1].sustained_ms = Spread(1.28, 1.28, 1.28)
    assert "| 100.0% | 90% | 25.0% | 1.60 | 80% | 2.00 | 25.0% |" in leads_markdown([replace(run, rows=timed)])
    bytes_only = replace(run, flops=1, least_bytes=2 * 10**9)
    assert "| 2.00 (50%, -) |" in leads_markdown([bytes_only])
    bytes_only.ceilings["read_tbps"] = 5.0
    assert "| 2.00 (50%, 40%) |" in leads_markdown([bytes_only])
    assert "natural routing, commit abc, 2026-01-01." in found
    close = leads_markdown([replace(run, rows=[row(2, 1.9), PEER])])
    assert "| 5.3%, within the spread |" in close
    assert leads_markdown([replace(run, rows=[row(2, 1.0), replace(PEER, version="4.5")])]).endswith(
        "Beside their layer 4.5.")
    behind = leads_markdown([replace(run, rows=[row(2, 4.0), PEER])])
    assert "| -50.0% |" in behind
    save(tmp_path, run)
    text = "<!-- leads . -->\nstale\n<!-- end -->\n"
    assert "name2" in render(text, tmp_path)
    assert "stale" not in render(text, tmp_path)


def test_the_training_table_holds_medians_and_memory():
    record = {"environment": ENVIRONMENT, "figures": {"shapes": [
        {"config": "small", "shape": {"T": 1024}, "dtype": "bfloat16", "rows": [
            {"name": name, "step_ms": {"p20": ms * 0.9, "p50": ms, "p80": ms * 1.1}, "kept_mib": kept, "peak_mib": peak}
            for name, ms, kept, peak in (("our kernels", 10.0, 100.0, 400.0), ("checkpointed", 14.0, 20.0, 300.0),
                                         ("grouped_mm, float32 sum", 30.0, 500.0, 900.0),
                                         ("grouped_mm, bmm sum", 20.0, 600.0, 800.0))]}]}}
    found = training_markdown(record)
    assert ("| small | 1,024 | 10.0 (9.00 to 11.0) | 20.0 (18.0 to 22.0) | 2.00x | 14.0 (12.6 to 15.4) | "
            "100 | 600 | 83% | 20.0 | 400 | 800 | 300 |") in found
    assert "NVIDIA Test, driver 1, torch 2, Triton 3, bfloat16, commit abc, 2026-01-01." in found
    record["figures"]["shapes"][0]["rows"][0]["step_ms"]["p80"] = 19.0
    assert "2.00x, within the spread" in training_markdown(record)


def test_the_readme_equals_the_recorded_json():
    text = (ROOT / "README.md").read_text()
    assert TABLE.search(text), "the README shows no recorded table"
    assert TRAINING.search(text), "the README shows no training figures"
    assert LEADS.search(text), "the README does not say who is ahead"
    assert render(text, ROOT / "plots") == text, "run: python level_runner.py --readme"


def test_the_readmes_pictures_exist():
    for picture in re.findall(r"\]\((plots/[^)]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / picture).exists(), picture


def test_there_are_recorded_runs():
    assert RECORDED


def test_a_caption_of_many_commits_stays_inside_the_chart():
    runs = [replace(run, environment={**ENVIRONMENT, "commit": 12 * digit, "date": f"2026-01-0{digit}"})
            for run, digit in zip(2 * RUNS, "1234", strict=True)]
    with plt.rc_context(charts.STYLE):
        fig = charts.scale(runs)
        fig.canvas.draw()
        box = next(text for text in fig.texts if "commit" in text.get_text()).get_window_extent()
        width = fig.bbox.width
        plt.close(fig)
    assert 0 <= box.x0 < box.x1 <= width
