"""The runner end to end, with good levels, bad levels and bad input: python -m pytest tests/test_runner.py"""

from __future__ import annotations

import json
import os
import shutil
import types
from pathlib import Path

import pytest
import torch

import common.run
import level_runner
from common.cli import run_alone
from common.config import MoEConfig, Workload, preset
from common.level import Level, Loaded, discover
from common import run as common_run
from common.measure import Spread, WallClock, environment
from common.model import make_inputs, make_weights
from common.peers import Peer
from common.profile import named_ranges
from common.results import Run, load
from common.run import Interrupted, run_workload
from common.show import Screen
from labs.studies import routing, study

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def fake(number: int, name: str, change) -> Loaded:
    """A level that is level 1 with its output passed through `change`."""
    right = discover()[1]

    def build(cfg, weights):
        forward = right.build(cfg, weights)
        return lambda x_TD: change(forward(x_TD))

    module = types.SimpleNamespace(build=build, LEVEL=Level(number, name, f"a level that is {name}"))
    return Loaded(module.LEVEL, module)


def boom(_):
    raise RuntimeError("boom")


def out_of_memory(_):
    raise torch.OutOfMemoryError("tried to allocate 1.00 TiB. GPU 0 has less")


def out_of_memory_on_a_cpu(_):
    raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you "
                       "tried to allocate 1.00 TiB. Error code 12 (Cannot allocate memory)")


GOOD = fake(0, "right", lambda out: out)
BAD = {
    "wrong": (fake(1, "wrong", lambda out: out * 1.1), "relative error"),
    "nan": (fake(1, "nan", lambda out: out.clone().index_fill_(0, torch.zeros(1, dtype=torch.long, device=DEVICE),
                                                              float("nan"))), "NaN or infinite"),
    "misshapen": (fake(1, "misshapen", lambda out: out[:-1]), "output shape"),
    "other dtype": (fake(1, "other dtype", lambda out: out.double()), "output dtype"),
    "raises": (fake(1, "raises", boom), "RuntimeError: boom"),
    "one token off": (fake(1, "one token off", lambda out: torch.cat([out[:-1], out[-1:] * (1 + 3e-5)])), "token"),
}


def run(tmp_path: Path, *arguments: str, levels=None) -> tuple[int, list]:
    status = level_runner.main(["--preset", "tiny", "--dtype", "float32", "--rounds", "2", "--out", str(tmp_path),
                                *arguments], levels=levels)
    files = list(tmp_path.glob("*_tiny.json"))
    return status, load(files[0]) if files else []


@pytest.fixture(autouse=True)
def draw_nothing(request, monkeypatch):
    """Charts have tests of their own; drawing all recorded ones after each run here would take minutes."""
    if "draws" not in request.keywords:
        monkeypatch.setattr(level_runner, "draw", lambda *_: None)


@pytest.mark.draws
def test_without_a_gpu_the_recorded_charts_are_drawn(tmp_path, monkeypatch, capsys):
    if DEVICE.type == "cuda":
        pytest.skip("with a GPU its own charts are drawn")
    name = "h200_qwen3-30b-a3b"  # one stands for all: test_charts.py makes the charts of each
    recorded, out = tmp_path / "recorded", tmp_path / "out"
    recorded.mkdir()
    shutil.copy(level_runner.RECORDED / f"{name}.json", recorded)
    monkeypatch.setattr(level_runner, "RECORDED", recorded)
    run(out, "--quick", levels=[GOOD])
    assert not list(out.glob("*.png")), "a quick look is not kept waiting"
    assert "Those of the recorded GPU runs are in" in capsys.readouterr().out
    run(out, levels=[GOOD])
    assert [path.stem for path in out.glob("*_ladder.png")] == [f"{name}_ladder"]
    assert "The charts of the recorded GPU runs" in capsys.readouterr().out


@pytest.mark.parametrize("fault", BAD)
def test_a_red_level_gets_no_time_and_a_red_exit(fault, tmp_path):
    level, reason = BAD[fault]
    status, (recorded,) = run(tmp_path, "--tokens", "2000" if fault == "one token off" else "32", levels=[GOOD, level])
    right, red = recorded.levels
    assert status == 1
    assert right.status == "ok"
    assert right.wall_ms.p50 == pytest.approx(sum(right.rounds_ms) / 2, rel=1e-3), "the median of two rounds"
    assert red.status == "failed"
    assert red.wall_ms is None
    assert red.rounds_ms == []
    assert reason in red.reason


@pytest.mark.parametrize("fail", [out_of_memory, out_of_memory_on_a_cpu])
def test_out_of_memory_is_a_row_and_not_a_failure(fail, tmp_path):
    status, (recorded,) = run(tmp_path, levels=[GOOD, fake(1, "huge", fail)])
    assert status == 0
    assert recorded.levels[1].status == "oom"
    assert "1.00 TiB" in recorded.levels[1].reason
    assert recorded.levels[1].wall_ms is None


def test_a_level_that_froze_its_first_batch_is_red(tmp_path):
    first: list[torch.Tensor] = []

    def freeze(out):
        first.append(out)
        return first[0]

    status, (recorded,) = run(tmp_path, levels=[GOOD, fake(1, "frozen", freeze)])
    assert status == 1
    assert recorded.levels[1].status == "failed"


def test_a_level_that_froze_what_it_read_at_an_address_is_red(tmp_path):
    """As a graph would that was captured at x's address: both batches come to the address that is timed."""
    right, seen = discover()[1], {}

    def build(cfg, weights):
        forward = right.build(cfg, weights)
        return lambda x_TD: seen.setdefault(x_TD.data_ptr(), forward(x_TD))

    frozen = Level(1, "frozen", "a level that freezes routing by address")
    status, (recorded,) = run(tmp_path, levels=[GOOD, Loaded(frozen, types.SimpleNamespace(build=build, LEVEL=frozen))])
    assert status == 1
    assert recorded.levels[1].status == "failed"
    assert len(seen) == 1


def test_what_was_timed_stands_when_the_profiler_fails(tmp_path, monkeypatch, capsys):
    class Clock(WallClock):
        def __init__(self, device):
            self.on_gpu = True

        def __call__(self, call):
            call()
            return 1.0

    def fail(*_):
        raise RuntimeError("one of the calls waits")

    for name, stand_in in {"WallClock": Clock, "warm_up": lambda *_: None, "count_host_syncs": lambda _: 0,
                           "profile_together": fail}.items():
        monkeypatch.setattr(common_run, name, stand_in)
    status, (recorded,) = run(tmp_path, levels=[GOOD])
    assert status == 0
    assert recorded.levels[0].wall_ms.p50 == 1.0
    assert recorded.levels[0].gpu_ms is None
    assert "one of the calls waits" in capsys.readouterr().err


def test_where_arithmetic_sets_the_pace_each_is_timed_under_its_own_load_too(tmp_path, monkeypatch):
    ran, called = [], []

    def turns(calls, clock):
        for place, call in enumerate(calls):
            call()
            called.append((place, ran[-1]))
            yield place, [1.0, 2.0, 9.0]
        if calls:
            yield 0, [4.0]

    levels = [fake(number, name, lambda out, name=name: ran.append(name) or out)
              for number, name in enumerate(("one", "two"))]
    monkeypatch.setattr(common_run, "sustain", turns)
    monkeypatch.setattr(common_run, "SLOW_MS", float("inf"))  # however busy the machine is
    monkeypatch.setattr(Run, "is_arithmetic_bound", False)
    _, (recorded,) = run(tmp_path, levels=levels)
    assert recorded.levels[0].sustained_ms is None
    monkeypatch.setattr(Run, "is_arithmetic_bound", True)
    _, (recorded,) = run(tmp_path, levels=levels)
    assert called[:2] == [(0, "one"), (1, "two")]
    assert recorded.levels[0].sustained_ms.p50 == 3.0
    assert recorded.levels[0].sustained_turns_ms == [2.0, 4.0]
    assert recorded.levels[1].sustained_turns_ms == [2.0]
    monkeypatch.setattr(common_run, "SLOW_MS", 0.0)
    _, (recorded,) = run(tmp_path, levels=[GOOD])
    assert recorded.levels[0].sustained_ms is None, "a turn would hold too few"


def test_arithmetic_sets_the_pace_where_it_takes_longer_than_the_bytes(tmp_path):
    _, (recorded,) = run(tmp_path, levels=[GOOD])
    recorded.flops, recorded.least_bytes = 8 * 10**12, 10**12
    for ceilings, bound in (({"matmul_tflops": 7.0, "copy_tbps": 1.0}, True),
                            ({"matmul_tflops": 9.0, "copy_tbps": 1.0}, False), ({}, False)):
        recorded.ceilings = ceilings
        assert recorded.is_arithmetic_bound == bound


def test_what_was_timed_stands_when_a_call_fails_under_its_own_load(tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(common_run, "sustain", fail)
    monkeypatch.setattr(Run, "is_arithmetic_bound", True)
    status, (recorded,) = run(tmp_path, levels=[GOOD])
    assert status == 0
    assert recorded.levels[0].timed
    assert "no room" in capsys.readouterr().err


def test_a_peer_says_which_version_it_is(tmp_path, monkeypatch):
    def peer(module):
        return Peer("library", module, "pip install it", lambda *_: None)

    release = torch.__version__.partition("+")[0]  # some wheels' metadata have what comes after it, some do not
    assert peer("torch.nn").version.partition("+")[0] == release
    assert peer("no_such_library").version == ""
    (tmp_path / "loose").mkdir()
    (tmp_path / "loose" / "__init__.py").write_text("one = 1")
    monkeypatch.syspath_prepend(tmp_path)
    first = peer("loose.part").version
    (tmp_path / "loose" / "__init__.py").write_text("one = 2")
    assert first.startswith("files ")
    assert peer("loose").version not in ("", first)


def test_runs_of_other_workloads_stay_in_the_file(tmp_path):
    run(tmp_path, "--tokens", "32", levels=[GOOD])
    run(tmp_path, "--tokens", "8", levels=[GOOD])
    _, recorded = run(tmp_path, "--tokens", "8", "--routing", "sparse", levels=[GOOD])
    assert [(one.shape["T"], one.routing) for one in recorded] == [(8, "natural"), (8, "sparse"), (32, "natural")]


def test_ctrl_c_keeps_what_was_measured(tmp_path, monkeypatch):
    whole_status, _ = run(tmp_path, levels=[GOOD])
    clock_calls = []

    def interrupted_clock(self, call):
        clock_calls.append(call)
        if len(clock_calls) == 3:  # after the warm-up and the first round
            raise KeyboardInterrupt
        call()
        return 1.0

    monkeypatch.setattr(common.run.WallClock, "__call__", interrupted_clock)
    status = level_runner.main(["--preset", "tiny", "--dtype", "float32", "--quick", "--out", str(tmp_path)],
                               levels=[GOOD])
    if DEVICE.type == "cpu":
        (partial,) = load(tmp_path / "cpu_tiny_partial.json")
        assert partial.partial
        assert partial.levels[0].wall_ms == Spread(1.0, 1.0, 1.0)
        assert not load(tmp_path / "cpu_tiny.json")[0].partial, "a partial run must not replace a whole one"
    assert (whole_status, status) == (0, 130)


def test_ctrl_c_while_building(monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    workload = Workload(preset("tiny"), 8, torch.float32)
    with Screen() as screen, pytest.raises(Interrupted) as stop:
        run_workload(workload, [GOOD, fake(1, "slow", interrupt)], (), DEVICE, 2, screen.reporter(workload))
    assert stop.value.run.partial
    assert [row.status for row in stop.value.run.rows] == ["ok", "unsupported"]


BAD_INPUT = [
    (["--preset", "nope"], "preset='nope' is unknown: choose one of tiny"),
    (["--levels", "99"], "no level 99"),
    (["--levels", "a-b"], "'a-b' is neither a number nor a range"),
    (["--levels", "3-1"], "'3-1' runs backwards, did you mean 1-3?"),
    (["--levels", "2-"], "'2-' is neither a number nor a range"),
    (["--profile", "4", "--tokens", "8,16"], "--profile takes one token count"),
    (["--tokens", ""], "--tokens : give whole numbers"),
    (["--tokens", "-5"], "--tokens -5: give whole numbers of at least 1"),
    (["--profile", "42"], "--profile 42: no level 42"),
    (["--peers", "sonicmoe"], "did you mean SonicMoE?"),
    (["--routing", "random"], "routing='random' is unknown: choose one of natural"),
    (["--shape", "8,16,16,2,4"], "K=4 is more than E=2"),
    (["--shape", "8,16,0,2,1"], "F=0: sizes are whole numbers of at least 1"),
    (["--shape", "8,16,16"], "give five whole numbers T,D,F,E,K"),
    (["--shape", "0,16,16,4,2"], "T=0"),
    (["--shape", "8,4,16,8,2", "--routing", "one_hot"], "needs E <= D"),
    (["--tokens", "0"], "tokens=0"),
    (["--tokens", "many"], "--tokens many"),
    (["--dtype", "int8"], "dtype='int8' is unknown"),
    (["--rounds", "0"], "--rounds 0"),
    (["--preset", "tiny", "--shape", "8,16,16,4,2"], "give one of them"),
    (["--out", "/proc/nowhere"], "--out /proc/nowhere cannot be written"),
    (["--out", __file__], "is a file, give a folder"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_INPUT, ids=lambda value: "_".join(value)[:40])
def test_bad_input_is_named_before_any_work(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(level_runner, "run_workload", lambda *_: pytest.fail("work started"))
    assert level_runner.main(arguments) == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.skipif(DEVICE.type == "cuda", reason="Triton is interpreted only where there is no GPU")
@pytest.mark.parametrize(("flops", "said"), [(0, True), (1e9, False)])
def test_a_size_that_takes_the_interpreter_long_is_announced(flops, said, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(common_run, "INTERPRETED_FLOPS", flops)
    size = ["--preset", "tiny", "--tokens", "4", "--out", str(tmp_path)]
    assert level_runner.main(["--levels", "2", "--rounds", "1", *size]) == 0
    assert ("in Triton's interpreter, which may take hours" in capsys.readouterr().out) == said
    assert level_runner.main(["--profile", "2", *size]) == 0
    assert ("in Triton's interpreter, which may take hours" in capsys.readouterr().out) == said


@pytest.mark.parametrize("words", [(), ("--plot", str(level_runner.RECORDED / "studies" / "h200_routing.json"))],
                         ids=["measure", "plot"])
def test_a_study_names_a_folder_that_it_cannot_write_before_it_measures(words, monkeypatch, capsys):
    monkeypatch.setattr(study, "make_record", lambda *_: pytest.fail("measured"))
    monkeypatch.setattr(study, "renew", lambda *_: pytest.fail("renewed"))
    for out, message in (("/proc/nowhere", "cannot be written"), (__file__, "is a file, give a folder")):
        assert study.main(routing.STUDY, ["--out", out, *words]) == 2
        assert f"error: --out {out} {message}" in capsys.readouterr().err


@pytest.mark.draws
def test_a_missing_results_file_is_named(capsys):
    assert level_runner.main(["--plot", "missing.json"]) == 2
    assert "--plot missing.json: no such file" in capsys.readouterr().err


def test_a_dtype_that_the_gpu_lacks(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Tesla T4")
    assert level_runner.main(["--dtype", "bfloat16"]) == 2
    assert "dtype='bfloat16': Tesla T4 has none, use float16" in capsys.readouterr().err


def test_nan_in_the_input_is_found_and_named(tmp_path, monkeypatch, capsys):
    def poisoned(workload, weights):
        x_TD = make_inputs(workload, weights)
        x_TD[3, 5] = float("nan")
        return x_TD

    monkeypatch.setattr(common.run, "make_inputs", poisoned)
    status, _ = run(tmp_path, levels=[GOOD])
    assert status == 2
    assert "x_TD holds 1 NaN or infinite values" in capsys.readouterr().err


def test_a_preset_too_large_for_the_gpu_is_an_error_in_words(tmp_path, monkeypatch, capsys):
    def too_large(*_):
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(common.run, "make_weights", too_large)
    status, _ = run(tmp_path, levels=[GOOD])
    assert status == 2
    said = capsys.readouterr().err
    assert "tiny at 64 tokens does not fit this machine: its weights are 0.0 GiB and its tokens 0.0" in said


def test_nan_in_a_weight_is_found_and_named(tmp_path, monkeypatch, capsys):
    def poisoned(*arguments):
        weights = make_weights(*arguments)
        weights.down_EDF[2, 1, 0] = float("inf")
        return weights

    monkeypatch.setattr(common.run, "make_weights", poisoned)
    status, _ = run(tmp_path, levels=[GOOD])
    assert status == 2
    assert "down_EDF holds 1 NaN or infinite values" in capsys.readouterr().err


@pytest.mark.draws
def test_results_of_another_schema_are_refused_before_any_work(tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as quiet:
        quiet.setattr(level_runner, "draw", lambda *_: None)
        run(tmp_path, levels=[GOOD])
    (path,) = tmp_path.glob("*_tiny.json")
    old = json.dumps({**json.loads(path.read_text()), "schema": 0})
    path.write_text(old)
    assert level_runner.main(["--plot", str(path), "--out", str(tmp_path)]) == 2
    assert "has results schema 0, this version reads 1" in capsys.readouterr().err
    monkeypatch.setattr(level_runner, "run_workload", lambda *_: pytest.fail("work started"))
    assert run_status(tmp_path) == 2
    assert path.read_text() == old


def run_status(tmp_path: Path) -> int:
    return level_runner.main(["--preset", "tiny", "--dtype", "float32", "--rounds", "1", "--out", str(tmp_path)],
                             levels=[GOOD])


def test_list_names_every_level(capsys):
    assert level_runner.main(["--list"]) == 0
    shown = capsys.readouterr().out
    assert all(loaded.level.adds in shown for loaded in discover())


def test_profile_writes_a_trace_with_the_seams(tmp_path, capsys):
    status = level_runner.main(["--profile", "4", "--preset", "tiny", "--dtype", "float32", "--tokens", "8",
                                "--out", str(tmp_path)])
    (trace,) = tmp_path.glob("trace_level4_tiny_T8.json")
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert status == 0
    assert {"level4", "level4.route", "level4.dispatch", "level4.experts", "level4.combine"} <= names


def test_profiling_ranges_do_not_break_a_compiled_level():
    cfg = preset("tiny")
    weights = make_weights(cfg, torch.float32, DEVICE)
    batched = discover()[1]
    x_TD = make_inputs(Workload(cfg, 4, torch.float32), weights)
    with named_ranges(batched):
        compiled = torch.compile(batched.build(cfg, weights), fullgraph=True, backend="eager")
        assert compiled(x_TD).shape == x_TD.shape
    assert batched.module.route.__name__ == "route", "the ranges must be taken off again"


def test_a_commit_that_is_none_is_named(monkeypatch):
    for none in ("06ab1e0", ""):  # an empty one would be the commit of whatever history lies there
        monkeypatch.setenv("LAB_COMMIT", none)
        with pytest.raises(ValueError, match=f"LAB_COMMIT='{none}'"):
            environment(DEVICE)
    monkeypatch.setenv("LAB_COMMIT", "0123456789abcdef")
    assert environment(DEVICE)["commit"] == "0123456789ab"


def test_quick_is_one_small_run_without_references(tmp_path):
    _, (recorded,) = run(tmp_path, "--quick", "--tokens", "16,8", levels=[GOOD])
    assert recorded.shape["T"] == 8
    assert [row.kind for row in recorded.rows] == ["level"]


def test_a_peer_that_is_not_installed_says_how_to_get_it(tmp_path, monkeypatch):
    peer = Peer("ghost", "no_such_library", "pip install ghost", lambda *_: pytest.fail("built without its library"))
    monkeypatch.setattr(level_runner, "PEERS", (peer,))
    status, (recorded,) = run(tmp_path, "--quick", "--peers", levels=[GOOD])
    row = recorded.row("ghost")
    assert status == 0
    assert (row.kind, row.status) == ("peer", "not installed")
    assert row.reason.startswith("pip install ghost (ModuleNotFoundError")


def test_peers_are_chosen_by_name(tmp_path, monkeypatch):
    ghosts = tuple(Peer(name, "no_such_library", f"pip install {name}", lambda *_: None) for name in ("one", "two"))
    monkeypatch.setattr(level_runner, "PEERS", ghosts)
    _, (recorded,) = run(tmp_path, "--quick", "--peers", "two", levels=[GOOD])
    assert [row.name for row in recorded.rows if row.kind == "peer"] == ["two"]
    with pytest.raises(ValueError, match="'three' is none of one, two"):
        level_runner.choose_peers("two,three")


def test_a_peer_that_no_token_can_judge_is_no_failure(tmp_path, monkeypatch):
    """Every choice is close, and its router rounds: neither right nor wrong."""
    unsure = Peer("unsure", "torch", "pip install torch", lambda *_: lambda x_TD: 2 * x_TD, tie_margin=1e9)
    monkeypatch.setattr(level_runner, "PEERS", (unsure,))
    monkeypatch.setattr(Peer, "build", lambda self, workload, weights: self.connect(workload, weights))
    status, (recorded,) = run(tmp_path, "--quick", "--peers", levels=[GOOD])
    row = recorded.row("unsure")
    assert (status, row.status, row.wall_ms) == (0, "unsupported", None)
    assert row.reason.startswith("cannot be judged: no token's choice of experts is clearer")


def test_a_peer_is_gated_like_a_level(tmp_path, monkeypatch):
    def connect(workload, weights):
        forward = discover()[1].build(workload.config, weights)
        return lambda x_TD: forward(x_TD) * 1.1

    monkeypatch.setattr(level_runner, "PEERS", (Peer("wrong", "torch", "pip install torch", connect),))
    monkeypatch.setattr(Peer, "build", lambda self, workload, weights: self.connect(workload, weights))
    status, (recorded,) = run(tmp_path, "--quick", "--peers", levels=[GOOD])
    assert status == 1
    assert recorded.row("wrong").status == "failed"
    assert recorded.row("wrong").wall_ms is None


@pytest.mark.skipif(DEVICE.type == "cuda", reason="of a machine that a level cannot run on")
def test_a_level_that_cannot_run_alone_draws_no_weights(monkeypatch, capsys):
    (level,) = [loaded.level for loaded in discover() if "cuda" in loaded.level.requires][:1]
    monkeypatch.setattr("common.cli.run_workload", boom)
    monkeypatch.setattr("sys.argv", ["level", "--preset", "deepseek-v3", "--tokens", "64"])
    assert run_alone(level) == 0
    assert f"{level.name}: n/a (needs CUDA)" in capsys.readouterr().out


@pytest.mark.gpu
def test_memory_and_syncs_are_measured(tmp_path):
    _, (recorded,) = run(tmp_path, "--levels", "0-4")
    naive, batched, _, memefficient, grouped = recorded.levels
    assert naive.host_syncs >= 16
    assert grouped.host_syncs == 0
    cfg: MoEConfig = preset("tiny")
    gathered = recorded.shape["T"] * cfg.K * 2 * cfg.F * cfg.D * 4 / 2**20  # gate_up; down comes after it
    assert batched.peak_mib >= gathered
    assert memefficient.peak_mib <= 2048


@pytest.mark.parametrize(("flags", "told"), [([], None), (["--autotune"], "search"), (["--no-autotune"], "off")])
def test_whether_to_search_reaches_the_kernels(flags, told, monkeypatch):
    monkeypatch.delenv("MOE_AUTOTUNE", raising=False)
    monkeypatch.setattr(os, "environ", dict(os.environ))  # so that nothing outlives the test
    args = level_runner.parser().parse_args(["--preset", "tiny", *flags])
    level_runner.parse_workloads(args, torch.device("cpu"))
    assert os.environ.get("MOE_AUTOTUNE") == told
