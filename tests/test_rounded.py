"""The judge of rounded routing: it passes what follows the rule and goes red for what does not.

python -m pytest tests/test_rounded.py
"""

from __future__ import annotations

import types
from dataclasses import replace
from io import StringIO

import pytest
import torch
from rich.console import Console

import level_runner
from common.config import MoEConfig, Workload
from common.level import Level, Loaded
from common.measure import count_host_syncs, gate, profile_call
from common.model import Weights, make_inputs, make_weights, oracle
from common.results import load
from common.rounded import Rounding, broken_rule, rounded_oracle
from labs.kernels import rounding_cost
from labs.kernels.rounding import describe, plan_rounding
from tests.cases import LEVELS
from tests.test_rounding import MODES, round_slowly

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
REPORT = {"rows_dropped": 1, "rows_added": 2, "share_changed": 0.01, "utilisation_before": 0.9,
          "utilisation_after": 1.0, "tokens_without_expert": 0}
CFG = MoEConfig("case", D=32, F=16, E=6, K=2)
TILE = 8


def round_to(kept_TE: torch.Tensor, mode: str, tile: int = TILE) -> Rounding:
    return Rounding(kept_TE.float(), tile, mode, dict(REPORT), ("no kernel",))


def case(mode: str, cfg: MoEConfig = CFG, T: int = 90, routing: str = "natural",
         seed: int = 0) -> tuple[Weights, torch.Tensor, torch.Tensor]:
    """Weights, x_TD, and the kept_TE that follows the rule."""
    weights = make_weights(cfg, torch.float32, DEVICE, seed)
    x_TD = make_inputs(Workload(cfg, T, torch.float32, routing, seed), weights)
    probs_TE = (x_TD @ weights.router_ED.T).softmax(dim=1).cpu()
    return weights, x_TD, round_slowly(probs_TE, probs_TE.topk(cfg.K, dim=1).indices, TILE, mode).to(DEVICE)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("routing", ["natural", "skewed", "one_hot", "sparse"])
@pytest.mark.parametrize("mode", MODES)
def test_the_rule_passes_what_follows_it(mode, routing, seed):
    weights, x_TD, kept_TE = case(mode, routing=routing, seed=seed)
    assert broken_rule(CFG, weights, x_TD, round_to(kept_TE, mode)) == ""


def swap(kept_TE: torch.Tensor, out: torch.Tensor, into: torch.Tensor) -> torch.Tensor:
    """In the first column that has both, a token of `out` leaves and one of `into` comes."""
    e = int((out.any(dim=0) & into.any(dim=0)).nonzero()[0])
    changed_TE = kept_TE.clone()
    changed_TE[out[:, e].nonzero()[0], e] = False
    changed_TE[into[:, e].nonzero()[0], e] = True
    return changed_TE


def planted(fault: str) -> tuple[str, torch.Tensor, Weights, torch.Tensor]:
    """mode, a kept_TE with one fault, weights and x_TD."""
    mode = {"keeps the weakest": "down", "adds the worst": "up", "too many rows": "down",
            "total off": "balance", "small remainder first": "balance"}.get(fault, "nearest")
    weights, x_TD, kept_TE = case(mode)
    scores_TE = (x_TD @ weights.router_ED.T).softmax(dim=1)
    chosen_TE = torch.zeros_like(kept_TE).scatter_(1, scores_TE.topk(CFG.K, dim=1).indices, True)
    if fault == "no multiple":
        kept_TE[int(kept_TE[:, 0].nonzero()[0]), 0] = False
    elif fault == "exact top-k":
        kept_TE = chosen_TE
    elif fault == "too many rows":
        kept_TE[(~kept_TE[:, 0]).nonzero()[:TILE, 0], 0] = True
    elif fault == "keeps the weakest":
        kept_TE = swap(kept_TE, kept_TE & chosen_TE & (scores_TE > 0.3), chosen_TE & ~kept_TE)
    elif fault == "adds the worst":
        kept_TE = swap(kept_TE, kept_TE & ~chosen_TE, ~kept_TE & ~chosen_TE & (scores_TE < 0.02))
    elif fault == "not chosen before chosen":
        kept_TE = swap(kept_TE, kept_TE & chosen_TE, ~kept_TE & ~chosen_TE)
    elif fault == "total off":
        kept_TE = round_slowly(scores_TE.cpu(), scores_TE.topk(CFG.K, dim=1).indices.cpu(), TILE, "down").to(DEVICE)
    elif fault == "small remainder first":
        remainders_E = chosen_TE.sum(dim=0) % TILE
        rose_E = kept_TE.sum(dim=0) > chosen_TE.sum(dim=0)
        largest = int(torch.where(rose_E, remainders_E, -1).argmax())
        smallest = int(torch.where(~rose_E & (remainders_E > 0), remainders_E, TILE).argmin())
        assert remainders_E[largest] > remainders_E[smallest]
        for e, rise in ((largest, 0), (smallest, TILE)):
            rows = int(chosen_TE[:, e].sum()) // TILE * TILE + rise
            order = (chosen_TE[:, e].float() + scores_TE[:, e]).argsort(descending=True)
            kept_TE[:, e] = False
            kept_TE[order[:rows], e] = True
    return mode, kept_TE, weights, x_TD


FAULTS = {
    "no multiple": "no multiple of 8",
    "exact top-k": "no multiple of 8",
    "too many rows": "down gives it",
    "keeps the weakest": "drops a token and keeps a weaker one",
    "adds the worst": "adds a token and leaves a better one",
    "not chosen before chosen": "drops",
    "total off": "balance gives",
    "small remainder first": "balance rounds an expert up before another",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_rule_catches(fault):
    mode, kept_TE, weights, x_TD = planted(fault)
    found = broken_rule(CFG, weights, x_TD, round_to(kept_TE, mode))
    assert FAULTS[fault] in found


def test_the_rule_knows_the_mode():
    for mode in MODES:
        weights, x_TD, kept_TE = case(mode)
        red = [other for other in MODES if broken_rule(CFG, weights, x_TD, round_to(kept_TE, other))]
        assert mode not in red
        assert len(red) >= 2


def test_a_tie_may_go_either_way():
    weights, x_TD, kept_TE = case("nearest")
    e = int((kept_TE.sum(dim=0) > 0).nonzero()[0])
    last = int(torch.where(kept_TE[:, e], (x_TD @ weights.router_ED.T).softmax(dim=1)[:, e], 9).argmin())
    x_TD = torch.cat([x_TD, x_TD[last:last + 1]])  # a twin: the higher token of two equals is left out ...
    probs_TE = (x_TD @ weights.router_ED.T).softmax(dim=1).cpu()
    kept_TE = round_slowly(probs_TE, probs_TE.topk(CFG.K, dim=1).indices, TILE, "nearest").to(DEVICE)
    assert broken_rule(CFG, weights, x_TD, round_to(kept_TE, "nearest")) == ""
    split = kept_TE[last] ^ kept_TE[-1]
    if split.any():  # ... and may as well be the one that stays
        kept_TE[last], kept_TE[-1] = kept_TE[-1].clone(), kept_TE[last].clone()
        assert broken_rule(CFG, weights, x_TD, round_to(kept_TE, "nearest")) == ""


# ---- the runner ----------------------------------------------------------------------------------

class Told:
    """A forward that tells its rounding."""

    def __init__(self, call, rounding):
        self.call, self.rounding = call, rounding

    def __call__(self, x_TD):
        return self.call(x_TD)


def rounded_level(number: int = 1, variants: tuple[str, ...] = ("rounded",), off: bool = False,
                  fault: str | None = None) -> Loaded:
    """A level that rounds in plain PyTorch, by the slow reference, with a fault if wanted."""
    def build(cfg, weights, variant="rounded" if variants == ("rounded",) else "exact"):
        if variant == "exact" or off:
            return Told(LEVELS[1].build(cfg, weights), lambda T: None)
        told = {}

        def rounded(x_TD):
            probs_TE = (x_TD @ weights.router_ED.T).softmax(dim=1).cpu()
            kept_TE = round_slowly(probs_TE, probs_TE.topk(cfg.K, dim=1).indices, TILE, "nearest").to(x_TD.device)
            told[x_TD.shape[0]] = kept_TE
            out_TD = rounded_oracle(cfg, weights, x_TD, round_to(kept_TE, "nearest")).out_TD.float()
            if fault == "another routing than it tells":
                told[x_TD.shape[0]] = kept_TE.roll(1, dims=1)
            elif fault == "one row of the output":
                out_TD[5] *= 1.01
            elif fault == "exact output":
                out_TD = LEVELS[1].build(cfg, weights)(x_TD)
            elif fault == "whole tiles, wrong tokens":
                told[x_TD.shape[0]] = kept_TE.roll(1, dims=0)
                out_TD = rounded_oracle(cfg, weights, x_TD, round_to(told[x_TD.shape[0]], "nearest")).out_TD.float()
            return out_TD

        return Told(rounded, lambda T: round_to(told[T], "nearest"))

    module = types.SimpleNamespace(build=build)
    return Loaded(Level(number, "rounds", "rounded routing", variants=variants), module)


def run(tmp_path, *levels: Loaded) -> tuple[int, list]:
    status = level_runner.main(["--preset", "tiny", "--dtype", "float32", "--rounds", "2", "--quick",
                                "--out", str(tmp_path)], levels=list(levels))
    (path,) = tmp_path.glob("*_tiny.json")
    return status, load(path)[0].levels


@pytest.fixture(autouse=True)
def draw_nothing(monkeypatch):
    monkeypatch.setattr(level_runner, "draw", lambda *_: None)


def test_a_rounded_row_is_gated_by_its_own_routing_and_reports_it(tmp_path):
    status, (row,) = run(tmp_path, rounded_level())
    assert (status, row.status, row.variant, row.name) == (0, "ok", "rounded", "rounds")
    assert row.rel_err < 1e-6
    assert row.rounding.items() >= {"tile": TILE, "mode": "nearest", **REPORT}.items()
    assert row.timed


def test_a_row_counts_the_rows_that_it_computes(tmp_path):
    """REPORT says one row more than T*K = 128: shares and rates are of 129 rows."""
    _, (row,) = run(tmp_path, rounded_level())
    cfg = level_runner.parse_workloads(level_runner.parser().parse_args(["--preset", "tiny"]), DEVICE)[0][0].config
    flops = 6 * 128 * cfg.D * cfg.F + 2 * 64 * cfg.D * cfg.E
    assert row.tflops == pytest.approx(flops * 129 / 128 / row.wall_ms.p50 / 1e9)


def test_two_variants_are_two_rows(tmp_path):
    status, (exact, rounded) = run(tmp_path, rounded_level(variants=("exact", "rounded")))
    assert status == 0
    assert [(row.name, row.variant, row.status) for row in (exact, rounded)] == [
        ("rounds", "exact", "ok"), ("rounds rounded", "rounded", "ok")]
    assert exact.rounding is None


def test_where_rounding_is_off_the_row_is_exact(tmp_path):
    status, (row,) = run(tmp_path, rounded_level(off=True))
    assert (status, row.status, row.variant, row.rounding) == (0, "ok", "exact", None)
    assert "rounding is off" in row.reason


def test_where_rounding_is_off_no_second_exact_row(tmp_path):
    status, (exact, rounded) = run(tmp_path, rounded_level(variants=("exact", "rounded"), off=True))
    assert (status, exact.status, rounded.status) == (0, "ok", "unsupported")
    assert "rounding is off" in rounded.reason


@pytest.mark.parametrize("fault", ["another routing than it tells", "one row of the output", "exact output",
                                   "whole tiles, wrong tokens"])
def test_a_faulty_rounded_level_is_red(fault, tmp_path):
    status, (row,) = run(tmp_path, rounded_level(fault=fault))
    assert (status, row.status) == (1, "failed")
    assert row.wall_ms is None
    assert row.reason


def test_a_level_that_says_exact_may_not_round(tmp_path):
    rounds = rounded_level()
    status, (row,) = run(tmp_path, Loaded(replace(rounds.level, variants=("exact",)), rounds.module))
    assert (status, row.status) == (1, "failed")


def test_the_oracle_of_exact_routing_is_the_oracle():
    for cfg in (CFG, replace(CFG, renormalize=False), replace(CFG, scoring="topk_softmax", renormalize=False)):
        weights, x_TD, _ = case("nearest", cfg)
        logits_TE = x_TD.double() @ weights.router_ED.double().T
        kept_TE = torch.zeros_like(logits_TE, dtype=torch.bool).scatter_(1, logits_TE.topk(cfg.K, dim=1).indices, True)
        ours, expected = rounded_oracle(cfg, weights, x_TD, round_to(kept_TE, "nearest")), oracle(cfg, weights, x_TD)
        assert gate(ours.out_TD.float(), expected, Workload(cfg, 90, torch.float32)).ok


# ---- level 7 -------------------------------------------------------------------------------------

LEVEL7 = LEVELS[7].module
REAL = MoEConfig("real", D=256, F=192, E=8, K=2)


def judge(cfg: MoEConfig, weights: Weights, x_TD: torch.Tensor, out_TD: torch.Tensor, rounding: Rounding) -> str:
    """What the runner's gate finds wrong, or nothing."""
    workload = Workload(cfg, x_TD.shape[0], x_TD.dtype)
    return (broken_rule(cfg, weights, x_TD, rounding)
            or gate(out_TD, rounded_oracle(cfg, weights, x_TD, rounding), workload).reason)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("routing", ["natural", "skewed", "one_hot", "sparse"])
def test_the_judge_passes_level_7s_layer(mode, routing, device):
    weights, x_TD, _ = case(mode, routing=routing)
    plan = plan_rounding(CFG, 90, 16, mode, least_tiles=0)
    out_TD, rounded = LEVEL7.layer_rounded(x_TD, weights, CFG, plan, LEVEL7.shared_memory_bytes(device))
    assert judge(CFG, weights, x_TD, out_TD, describe(rounded, plan)) == ""


def test_level_7_names_a_tile_or_mode_that_it_does_not_have():
    weights = make_weights(CFG, torch.float32, DEVICE)
    with pytest.raises(ValueError, match="tile=32: choose one of 64, 128, 256"):
        LEVEL7.build(CFG, weights, tile=32)
    with pytest.raises(ValueError, match="mode='sideways' is unknown"):
        LEVEL7.build(CFG, weights, mode="sideways")


@pytest.mark.parametrize("tile", LEVEL7.TILES)
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("shared_memory", [99 * 1024, 227 * 1024])
def test_the_gemms_tile_divides_what_is_rounded_to(tile, itemsize, shared_memory):
    """At every load where rounding is on: no GEMM tile has rows of two experts, none is part empty."""
    for mean in (*range(2 * tile, 6 * tile, 7), 10_000):
        assert tile % LEVEL7.choose_tile(min(mean, tile), itemsize, shared_memory).block_M == 0
        exact = LEVELS[6].module.choose_tile(mean, itemsize, shared_memory)
        assert LEVEL7.choose_tile(min(mean, max(LEVEL7.TILES)), itemsize, shared_memory) == exact


@pytest.fixture(scope="module")
def real() -> Weights:
    return make_weights(REAL, torch.bfloat16, DEVICE)


def tokens(weights: Weights, T: int, routing: str = "natural", seed: int = 0) -> torch.Tensor:
    return make_inputs(Workload(REAL, T, weights.dtype, routing, seed), weights)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tile", LEVEL7.TILES)
def test_level_7_is_right_for_its_own_routing(tile, mode, real):
    forward = LEVEL7.build(REAL, real, tile, mode)
    for T, routing in ((2051, "natural"), (2051, "skewed"), (2051, "one_hot"), (2300, "sparse"), (2051, "natural")):
        x_TD = tokens(real, T, routing, seed=T)
        out_TD, told = forward(x_TD), forward.rounding(T)
        assert (told.tile, told.mode) == (tile, mode)
        assert told.report["utilisation_after"] == 1
        assert judge(REAL, real, x_TD, out_TD, told) == "", f"T={T} {routing}"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_level_7_in_other_dtypes(dtype):
    weights = make_weights(REAL, dtype, DEVICE)
    forward, x_TD = LEVEL7.build(REAL, weights), tokens(weights, 2051)
    assert judge(REAL, weights, x_TD, forward(x_TD), forward.rounding(2051)) == ""


@pytest.mark.gpu
def test_level_7_waits_for_nothing_and_repeats_itself(real):
    forward, x_TD = LEVEL7.build(REAL, real), tokens(real, 2051)
    first = forward(x_TD).clone()
    assert forward.rounding(2051) is not None
    assert count_host_syncs(lambda: forward(x_TD)) == LEVEL7.LEVEL.claims.host_syncs
    assert 1 <= profile_call(lambda: forward(x_TD)).launches <= LEVEL7.LEVEL.claims.max_launches
    assert all(torch.equal(first, forward(x_TD)) for _ in range(5))


@pytest.mark.gpu
def test_level_7_compiles_once_a_token_count(real):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    forward = LEVEL7.build(REAL, real)
    for seed, routing in enumerate(("natural", "one_hot", "sparse", "natural")):
        forward(tokens(real, 2051, routing, seed))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.gpu
def test_level_7_off_is_level_6_bit_for_bit(real):
    exact, evaluation = LEVELS[6].build(REAL, real), LEVEL7.build(REAL, real, mode="exact")
    x_TD = tokens(real, 2051)
    assert torch.equal(exact(x_TD), evaluation(x_TD))
    assert evaluation.rounding(2051) is None
    forward, few_TD = LEVEL7.build(REAL, real), tokens(real, 900)
    with pytest.warns(UserWarning, match="tile rounding is off.*under 2 tiles of 128"):
        out_TD = forward(few_TD)
    assert torch.equal(exact(few_TD), out_TD)
    assert forward.rounding(900) is None


@pytest.mark.gpu
def test_level_7_tells_only_of_graphs_that_it_keeps(real, monkeypatch):
    monkeypatch.setattr(LEVEL7, "MAX_GRAPHS", 2)
    forward = LEVEL7.build(REAL, real)
    for T in range(1024, 1028):
        forward(tokens(real, T))
    assert list(forward.graphs) == [1026, 1027]
    assert forward.rounded.keys() >= {1026, 1027}
    assert len(forward.rounded) <= 3


@pytest.mark.gpu
def test_level_7_tells_of_the_last_call_whichever_graph_it_was(real):
    forward = LEVEL7.build(REAL, real)
    first_TD, second_TD = tokens(real, 2051), tokens(real, 2051, "skewed", 1)
    reports = []
    for x_TD in (first_TD, first_TD, second_TD, first_TD, second_TD):
        forward(x_TD)
        reports.append(forward.rounding(2051).report)
    assert reports[0] == reports[1] == reports[3] != reports[2] == reports[4]


RECORDED = sorted(rounding_cost.FOLDER.glob("*.json"))


def test_the_recorded_cost_is_within_its_limit():
    """At T=16384, E=128: at most 5% of the exact layer's time. And every recorded row is right."""
    runs = [run for path in RECORDED for run in load(path)]
    assert all(row.status == "ok" for run in runs for row in run.rows)
    (run,) = [run for run in runs if (run.shape["T"], run.shape["E"]) == (16384, 128)]
    rounded = [row for row in run.levels if row.variant == "rounded"]
    assert {row.rounding["tile"] for row in rounded} == {64, 128, 256}
    assert all(0 < row.rounding["gpu_us"] / 1e3 <= 0.05 * run.levels[0].wall_ms.p50 for row in rounded)
    console = Console(width=200, record=True, file=StringIO())
    console.print(rounding_cost.cost_table(runs))
    assert console.export_text().count("nearest 128") == len(runs)


def test_why_a_row_was_not_rounded_stands_below_the_table_of_cost():
    few = next(run for path in RECORDED for run in load(path) if any("is off" in row.reason for row in run.levels))
    (why,) = {row.reason for row in few.levels if "is off" in row.reason}
    other = replace(few, rows=[replace(row, reason=row.reason and "out of [memory]") for row in few.rows])
    console = Console(width=200, record=True, file=StringIO())
    console.print(rounding_cost.cost_table([few, other]))
    text = console.export_text()
    cells = [[cell.strip() for cell in line.split("│")[3:5]] for line in text.splitlines() if "│" in line]
    marked = [name for name, us in cells if us == "(1)"]
    assert marked == [row.name for row in few.levels if "is off" in row.reason]
    assert [name for name, us in cells if us == "(2)"] == marked
    below = text.rpartition("┘")[2]
    assert below.count(f"(1) {why}") == below.count("(2) out of [memory]") == 1
    assert max(len(line.rstrip()) for line in text.splitlines()) < 150


@pytest.mark.gpu
def test_the_runner_shows_what_rounding_costs(tmp_path):
    status = level_runner.main(["--shape", "2051,256,192,8,2", "--levels", "6,7", "--rounds", "2", "--out",
                                str(tmp_path)])
    (path,) = tmp_path.glob("*.json")
    exact, rounded = load(path)[0].levels
    assert (status, exact.variant, rounded.variant) == (0, "exact", "rounded")
    assert rounded.rounding["gpu_us"] > 0
    assert rounded.rounding["utilisation_before"] < rounded.rounding["utilisation_after"] == 1
