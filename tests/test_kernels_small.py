"""Routing, decode GEMMs and combine of labs/kernels: python -m pytest tests/test_kernels_small.py"""

from __future__ import annotations

import importlib.util
import inspect
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import pytest
import torch

from common.config import MoEConfig, Workload
from common.measure import Gate, gate
from common.model import make_inputs, make_weights, oracle, route_float64
from labs.kernels import combine, decode, launch, routing, routing_kernels
from labs.kernels.decode import Tiles, Tiling
from labs.kernels.routing import RouteTiling
from labs.kernels.tiles import interleave_gate_up
from tests.cases import CASES, Case


KERNELS = SimpleNamespace(routing=routing, routing_kernels=routing_kernels, decode=decode, combine=combine)
ROW_TILE = 16
ONE, TWO, THREE = RouteTiling(1, 16, 4, splits=2), RouteTiling(2, 64, 4), RouteTiling(3, 16, 4, splits=2, logits_T=64)
PATHS = {"one launch": ONE, "two launches": TWO, "three launches": THREE}
# Several tiles a program, several steps a tile, and a tail, at sizes that the interpreter can stand.
PERSISTENT = Tiles(16, 0, Tiling(32, 32, 3, 4, True), Tiling(32, 32, 3, 4, True))
TAILED = Tiles(32, 16, Tiling(16, 64, 3, 4, False), Tiling(64, 16, 3, 4, False))


# ---- routing ------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class RouteCase:
    """A routing problem and why it is here."""

    why: str
    T: int
    D: int
    E: int
    K: int
    scoring: str = "softmax_topk"
    renormalize: bool = True
    paths: tuple[str, ...] = tuple(PATHS)

    @property
    def config(self) -> MoEConfig:
        return MoEConfig("case", self.D, 8, self.E, self.K, self.scoring, self.renormalize)

    def __str__(self) -> str:
        return self.why.replace(" ", "_")


ROUTE_CASES = (
    RouteCase("one token", T=1, D=64, E=8, K=2),
    RouteCase("prime experts, odd tokens", T=37, D=136, E=13, K=3),
    RouteCase("K is 1", T=33, D=40, E=5, K=1),
    RouteCase("K is E", T=21, D=72, E=7, K=7),
    RouteCase("one expert", T=20, D=32, E=1, K=1),
    RouteCase("blocks exactly full", T=64, D=256, E=16, K=2),
    RouteCase("scores not renormalized", T=50, D=64, E=12, K=5, renormalize=False),
    RouteCase("softmax over the chosen", T=50, D=64, E=12, K=5, scoring="topk_softmax", renormalize=False),
    RouteCase("softmax over the chosen, renormalized", T=18, D=64, E=12, K=5, scoring="topk_softmax"),
    RouteCase("ragged groups of blocks", T=301, D=40, E=24, K=4, paths=("two launches", "three launches")),
    RouteCase("experts in two boxes", T=20, D=32, E=300, K=4, paths=("three launches",)),
    RouteCase("more blocks than a chunk", T=600, D=32, E=300, K=2, paths=("three launches",)),
    RouteCase("as many tokens as one launch takes", T=256, D=32, E=8, K=2, paths=("one launch",)),
)
ROUTES = [(case, path) for case in ROUTE_CASES for path in case.paths]
# Enough of them to catch any fault below.
FAULT_ROUTES = [(case, path) for case, path in ROUTES if path in {
    "prime experts, odd tokens": ("one launch", "three launches"), "K is E": ("one launch",),
    "softmax over the chosen": ("one launch",), "scores not renormalized": ("one launch",),
    "ragged groups of blocks": ("two launches",), "more blocks than a chunk": ("three launches",),
    "as many tokens as one launch takes": ("one launch",),
}.get(case.why, ())]


def slow_routing(expert_ids_TK: torch.Tensor, E: int, row_tile: int) -> dict[str, torch.Tensor]:
    """The index arrays by Python's own sort and loops."""
    T, K = expert_ids_TK.shape
    ids = expert_ids_TK.tolist()
    slots = sorted((ids[t][k], t, k) for t in range(T) for k in range(K))
    counts = [sum(expert == e for expert, _, _ in slots) for e in range(E)]
    offsets = [sum(counts[:e]) for e in range(E + 1)]
    row_of_slot_TK = torch.empty(T, K, dtype=torch.int32)
    for row, (_, t, k) in enumerate(slots):
        row_of_slot_TK[t, k] = row
    work = []
    for e in range(E):
        tiles = -(-counts[e] // row_tile)
        work += [[e, offsets[e], offsets[e + 1], len(work)]] * tiles
    return {
        "offsets_E1": torch.tensor(offsets, dtype=torch.int32),
        "token_of_row_R": torch.tensor([t for _, t, _ in slots], dtype=torch.int32),
        "row_of_slot_TK": row_of_slot_TK,
        "work_W4": torch.tensor(work, dtype=torch.int32).view(-1, 4),
    }


def index_fault(found: routing.Routing, E: int, row_tile: int) -> str:
    """The name of the first index array that does not follow from the chosen experts, or nothing."""
    expected = slow_routing(found.expert_ids_TK.cpu(), E, row_tile)
    work_W4 = found.work_W4.cpu()
    tiles = len(expected["work_W4"])
    if tiles >= len(work_W4) or work_W4[-1, 0] != tiles or not torch.equal(work_W4[:tiles], expected.pop("work_W4")):
        return "work_W4"
    wrong = [name for name, want in expected.items() if not torch.equal(getattr(found, name).cpu(), want)]
    return ", ".join(wrong)


def routing_fault(module: ModuleType, case: RouteCase, tiling: RouteTiling | None, dtype: torch.dtype,
                  device: torch.device) -> str:
    """What is wrong with two calls of the module's route on one set of counters, or nothing."""
    cfg = case.config
    router_ED = make_weights(cfg, dtype, device).router_ED
    arrivals_A = module.new_arrivals(device)
    for seed in range(2):
        x_TD = torch.randn(case.T, case.D, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
        scores_TK, expert_ids_TK, _ = route_float64(cfg, router_ED, x_TD)
        found = module.route(x_TD, router_ED, case.K, arrivals_A, ROW_TILE, module.scores_sum_to_one(cfg), tiling)
        if not torch.equal(found.expert_ids_TK.long(), expert_ids_TK):
            return "expert_ids_TK"
        if not torch.allclose(found.scores_TK.double(), scores_TK, rtol=1e-5, atol=1e-7):
            return "scores_TK"
        if arrivals_A.any():
            return "arrivals_A"
        fault = index_fault(found, case.E, ROW_TILE)
        if fault:
            return fault
    return ""


@pytest.mark.parametrize(("case", "path"), ROUTES, ids=str)
def test_routing_is_the_slow_reference(case, path, device):
    assert not routing_fault(routing, case, PATHS[path], torch.float16, device)


@pytest.mark.parametrize("case", ROUTE_CASES[1:3], ids=str)
def test_routing_as_tiled_by_default(case, device):
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    assert not routing_fault(routing, case, None, dtype, device)


def test_each_path_is_some_shapes_default():
    assert routing.route_tiling_for(1, 128, 132).launches == 1
    assert routing.route_tiling_for(256, 8, 132).launches == 1
    assert routing.route_tiling_for(512, 128, 132).launches == 3
    assert routing.route_tiling_for(16384, 256, 132).launches == 3
    assert routing.route_tiling_for(16384, 128, 132).launches == 2


def tied(T: int, D: int, E: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x_TD, router_ED and logits_TE of small whole numbers: ties everywhere, and float32 sums are exact."""
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randint(-1, 2, (T, D), generator=generator)
    router_ED = torch.randint(-1, 2, (E, D), generator=generator)
    router_ED[E // 2:] = router_ED[: E - E // 2].clone()
    return x_TD.to(device).half(), router_ED.to(device).half(), x_TD @ router_ED.T


def tie_fault(module: ModuleType, tiling: RouteTiling, device: torch.device) -> bool:
    T, D, E, K = 40, 24, 13, 4
    x_TD, router_ED, logits_TE = tied(T, D, E, device)
    found = module.route(x_TD, router_ED, K, module.new_arrivals(device), ROW_TILE, tiling=tiling)
    expected = [sorted(range(E), key=lambda e, logits=logits: (-logits[e], e))[:K] for logits in logits_TE.tolist()]
    return found.expert_ids_TK.tolist() != expected or index_fault(found, E, ROW_TILE) != ""


@pytest.mark.parametrize("path", PATHS)
def test_ties_go_to_the_lower_expert(path, device):
    assert not tie_fault(routing, PATHS[path], device)


def far_apart_fault(module: ModuleType, tiling: RouteTiling, sum_to_one: bool, device: torch.device) -> bool:
    """Of logits up to 750 apart, where most exponentials are 0, and of a token of zeros, whose logits are all alike."""
    x_TD, router_ED, logits_TE = tied(40, 24, 13, device)
    x_TD[3], logits_TE[3] = 0, 0
    found = module.route(x_TD, 50 * router_ED, 4, module.new_arrivals(device), ROW_TILE, sum_to_one, tiling)
    scores_TK = (50 * logits_TE).double().softmax(dim=1).to(device).gather(1, found.expert_ids_TK.long())
    if sum_to_one:
        scores_TK /= scores_TK.sum(dim=1, keepdim=True)
    return (not torch.allclose(found.scores_TK.double(), scores_TK, rtol=1e-5, atol=1e-7)
            or found.expert_ids_TK[3].tolist() != [0, 1, 2, 3])


@pytest.mark.parametrize("sum_to_one", [True, False])
@pytest.mark.parametrize("path", PATHS)
def test_scores_of_logits_that_lie_far_apart(path, sum_to_one, device):
    assert not far_apart_fault(routing, PATHS[path], sum_to_one, device)


@pytest.mark.parametrize("path", PATHS)
def test_a_nan_token_corrupts_no_index(path, device):
    router_ED = make_weights(MoEConfig("case", 32, 8, 6, 3), torch.float16, device).router_ED
    x_TD = torch.randn(30, 32, device=device).half()
    clean, dirty = (routing.route(x, router_ED, 3, routing.new_arrivals(device), ROW_TILE, tiling=PATHS[path])
                    for x in (x_TD, x_TD.index_fill(0, torch.tensor([7], device=device), float("nan"))))
    assert not index_fault(dirty, 6, ROW_TILE)
    assert sorted(set(dirty.expert_ids_TK[7].tolist())) == sorted(dirty.expert_ids_TK[7].tolist())
    others = torch.arange(30, device=device) != 7
    assert torch.equal(clean.scores_TK[others], dirty.scores_TK[others])


@pytest.mark.parametrize("path", ["two launches", "three launches"])
def test_groups_of_twice_as_many_tokens_where_there_are_more_than_sms(path, device, monkeypatch):
    monkeypatch.setattr(routing, "sm_count", lambda device: 2)
    case = RouteCase("", T=301, D=40, E=24, K=4)
    assert not routing_fault(routing, case, PATHS[path], torch.float16, device)


@pytest.mark.parametrize("path", PATHS)
def test_no_work_list_where_nobody_reads_it(path, device):
    assert routing.work_entries(80, 6, 0) == 0
    router_ED = make_weights(MoEConfig("case", 32, 8, 6, 3), torch.float16, device).router_ED
    x_TD = torch.randn(140, 32, device=device).half()
    found, listed = (routing.route(x_TD, router_ED, 3, routing.new_arrivals(device), row_tile, tiling=PATHS[path])
                     for row_tile in (0, ROW_TILE))
    assert found.work_W4.shape == (0, 4)
    assert all(torch.equal(*both) for both in zip(found[:-1], listed[:-1], strict=True))


def test_no_tokens(device):
    router_ED = make_weights(MoEConfig("case", 32, 8, 6, 3), torch.float16, device).router_ED
    found = routing.route(router_ED[:0], router_ED, 3, routing.new_arrivals(device), ROW_TILE)
    assert not index_fault(found, 6, ROW_TILE)
    assert found.expert_ids_TK.shape == found.scores_TK.shape == (0, 3)


@pytest.mark.parametrize("counts", [(0, 0, 0), (1,), (16, 0, 17, 200, 0), (0, 3, 32)], ids=str)
def test_the_work_list_of_rows_sorted_elsewhere(counts, device):
    E, ids = len(counts), [e for e, count in enumerate(counts) for _ in range(count)]
    expert_ids_TK = torch.tensor(ids, dtype=torch.int64).view(-1, 1)
    expected = slow_routing(expert_ids_TK, E, ROW_TILE)
    work_W4 = routing.list_work(expected["offsets_E1"].to(device), len(ids), ROW_TILE).cpu()
    tiles = len(expected["work_W4"])
    assert work_W4.shape == (routing.work_entries(len(ids), E, ROW_TILE), 4)
    assert work_W4[-1, 0] == tiles
    assert torch.equal(work_W4[:tiles], expected["work_W4"])


def test_the_work_list_is_as_long_as_the_worst_case_needs():
    for R, E, row_tile in ((1, 8, 16), (7, 8, 16), (64, 8, 16), (65, 3, 16), (100, 1, 32), (33, 4, 1)):
        busy = min(R, E)
        worst = [R - busy + 1] + [1] * (busy - 1)  # one row each, and all the rest on one
        assert routing.work_entries(R, E, row_tile) == sum(-(-rows // row_tile) for rows in worst) + 1


# ---- the layer ----------------------------------------------------------------------------------------

def layer(kernels: SimpleNamespace, cfg: MoEConfig, weights, tiles: Tiles | None = None):
    """A forward made of the four calls."""
    arrivals_A = kernels.routing.new_arrivals(weights.device)
    gate_up_E2FD = interleave_gate_up(weights.gate_up_E2FD)

    def forward(x_TD: torch.Tensor) -> torch.Tensor:
        sms = kernels.routing.sm_count(weights.device)
        chosen = tiles or kernels.decode.tiles_for(x_TD.shape[0] * cfg.K, cfg.D, cfg.F, cfg.E, sms)
        routed = kernels.routing.route(x_TD, weights.router_ED, cfg.K, arrivals_A, chosen.row_tile,
                                       kernels.routing.scores_sum_to_one(cfg))
        hidden_RF = kernels.decode.up_swiglu(x_TD, gate_up_E2FD, routed.token_of_row_R, routed.work_W4, chosen)
        y_RD = kernels.decode.down(hidden_RF, weights.down_EDF, routed.work_W4, chosen)
        return kernels.combine.combine(y_RD, routed.row_of_slot_TK, routed.scores_TK)

    return forward


def check_layer(kernels: SimpleNamespace, case: Case, dtype: torch.dtype, device: torch.device,
                tiles: Tiles | None = None) -> Gate:
    workload = Workload(case.config, case.T, dtype, case.routing)
    weights = make_weights(case.config, dtype, device)
    x_TD = make_inputs(workload, weights)
    return gate(layer(kernels, case.config, weights, tiles)(x_TD), oracle(case.config, weights, x_TD), workload)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_layer_equals_the_oracle(case, device):
    found = check_layer(KERNELS, case, torch.float32 if device.type == "cpu" else torch.bfloat16, device)
    assert found.ok, found.reason


SKEWED = Case("skewed", T=60, D=72, F=104, E=5, K=2, routing="skewed")
ONE_HOT = Case("one expert takes all rows", T=50, D=72, F=40, E=8, K=1, routing="one_hot")
SPARSE = Case("empty experts", T=40, D=40, F=72, E=16, K=2, routing="sparse")


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("case", [SKEWED, ONE_HOT, SPARSE], ids=str)
@pytest.mark.parametrize("tiles", [PERSISTENT, TAILED], ids=["persistent", "tailed"])
def test_other_tilings_equal_the_oracle(tiles, case, device, monkeypatch):
    monkeypatch.setattr(decode, "sm_count", lambda device: 3)
    found = check_layer(KERNELS, case, torch.float16, device, tiles)
    assert found.ok, found.reason


def test_two_calls_agree_bit_for_bit(device):
    cfg = SKEWED.config
    weights = make_weights(cfg, torch.float16, device)
    forward = layer(KERNELS, cfg, weights)
    x_TD = make_inputs(Workload(cfg, 60, torch.float16), weights)
    assert torch.equal(forward(x_TD), forward(x_TD))


def test_no_tokens_through_the_layer(device):
    cfg = SKEWED.config
    weights = make_weights(cfg, torch.float16, device)
    assert layer(KERNELS, cfg, weights)(torch.empty(0, cfg.D, dtype=torch.float16, device=device)).shape == (0, cfg.D)


@pytest.mark.parametrize("rows_per_expert", [1, 8, 9, 20, 21, 36, 37, 66, 67, 128])
@pytest.mark.parametrize(("D", "F", "E"), [(512, 1024, 1), (512, 1024, 8), (4096, 14336, 8), (2048, 768, 128)])
def test_every_tiling_fits_in_shared_memory(D, F, E, rows_per_expert):
    tiles = decode.tiles_for(rows_per_expert * E, D, F, E, 132)
    assert tiles.row_tile <= 128
    down = tiles.down
    assert (down.strip + tiles.row_tile) * down.depth * 2 * down.stages <= launch.SHARED_BYTES


# ---- refusals -----------------------------------------------------------------------------------------

def test_misfits_are_named(device):
    cfg = MoEConfig("case", D=32, F=24, E=6, K=2)
    weights = make_weights(cfg, torch.float16, device)
    x_TD = torch.randn(10, 32, device=device).half()
    arrivals_A = routing.new_arrivals(device)
    tiles = decode.tiles_for(20, 32, 24, 6, 132)

    def route(x=x_TD, router=weights.router_ED, K=2, tiling=None):
        return routing.route(x, router, K, arrivals_A, tiles.row_tile, tiling=tiling)

    routed = route()
    indices = routed.token_of_row_R, routed.work_W4
    hidden_RF = decode.up_swiglu(x_TD, weights.gate_up_E2FD, *indices, tiles)
    y_RD = decode.down(hidden_RF, weights.down_EDF, routed.work_W4, tiles)
    wrong_dtype = torch.bfloat16 if device.type == "cpu" else torch.float32
    for match, call in {
        r"router_ED has shape \(6, 16\), but needs \(6, 32\)": lambda: route(router=weights.router_ED[:, :16]),
        "router_ED is float64 on": lambda: route(router=weights.router_ED.double()),
        "x_TD is b?float": lambda: route(x=x_TD.to(wrong_dtype)),
        "x_TD has strides": lambda: route(x=x_TD.T.contiguous().T),
        "K=7 and E=6": lambda: route(K=7),
        "K=0 and E=6": lambda: route(K=0),
        "takes at most 4194304 tokens": lambda: route(x_TD.new_empty(2**22 + 1, 8), weights.router_ED[:, :8].clone()),
        "at most 128 tokens": lambda: route(tiling=RouteTiling(3, 256, 8)),
        "one launch takes at most 16 blocks": lambda: route(tiling=RouteTiling(1, 16, 4), x=x_TD.repeat(26, 1)),
        "D=28, but the kernels need a multiple of 8":
            lambda: route(x_TD[:, :28].clone(), weights.router_ED[:, :28].clone()),
        r"gate_up_E2FD has shape \(6, 48, 24\), but needs \(6, 48, 32\)":
            lambda: decode.up_swiglu(x_TD, weights.gate_up_E2FD[:, :, :24], *indices, tiles),
        "token_of_row_R is int64":
            lambda: decode.up_swiglu(x_TD, weights.gate_up_E2FD, indices[0].long(), indices[1], tiles),
        "F=20, but": lambda: decode.up_swiglu(x_TD, weights.gate_up_E2FD[:, :40].clone(), *indices, tiles),
        r"work_W4 has shape \(\d+, 3\)": lambda: decode.down(hidden_RF, weights.down_EDF, indices[1][:, :3], tiles),
        r"work_W4 has shape \(8, 4\), but needs \(7, 4\)":  # made for another row tile
            lambda: decode.down(hidden_RF, weights.down_EDF, routing.route(
                x_TD, weights.router_ED, 2, arrivals_A, row_tile=8).work_W4, tiles),
        "down_EDF is float64": lambda: decode.down(hidden_RF, weights.down_EDF.double(), indices[1], tiles),
        r"y_RD has shape \(19, 32\), but needs \(20, 32\)":
            lambda: combine.combine(y_RD[1:], routed.row_of_slot_TK, routed.scores_TK),
        "scores_TK is float16": lambda: combine.combine(y_RD, routed.row_of_slot_TK, routed.scores_TK.half()),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()


# ---- planted faults -----------------------------------------------------------------------------------

@dataclass(frozen=True)
class Fault:
    """In `file`, `right` becomes `wrong`; `why` is the mistake."""

    why: str
    file: str
    right: str
    wrong: str

    def __str__(self) -> str:
        return f"{self.file} {self.why}".replace(" ", "_")


FAULTS = (
    Fault("ties to the higher expert", "routing_kernels",
          "tl.min(tl.where(high == best[:, None], high_e, keys.shape[1]), 1)",
          "tl.max(tl.where(high == best[:, None], high_e, -1), 1)"),
    Fault("of neighbours that tie the higher", "routing_kernels", "odd > even", "odd >= even"),
    Fault("a neighbour forgotten", "routing_kernels", "high = tl.maximum(left, low)", "high = left"),
    Fault("a neighbour chosen twice", "routing_kernels", "low = tl.minimum(left, low)", "low = low"),
    Fault("those that tie with the last one ranked", "routing_kernels", "& (e[None, :] <= last_expert[:, None])", ""),
    Fault("a slot counts itself", "routing_kernels", ".to(tl.int32) - 1", ".to(tl.int32)"),
    Fault("the last token not counted", "routing_kernels", "== BLOCK_T - 1)", "== BLOCK_T - 2)"),
    Fault("the last token not counted, in one launch", "routing_kernels", "(BLOCK_T - 1) * BLOCK_E + e",
          "(BLOCK_T - 2) * BLOCK_E + e"),
    Fault("unstable order", "routing_kernels", "places, 0), [BLOCK_T, TOP_K_POW2]).to(tl.int32) - 1",
          "places, 0), [BLOCK_T, TOP_K_POW2]).to(tl.int32) * 0 + tl.reshape(tl.gather(flat, places % BLOCK_E + "
          "(BLOCK_T - 1) * BLOCK_E, 0) - tl.gather(flat, places, 0), [BLOCK_T, TOP_K_POW2]).to(tl.int32)"),
    Fault("blocks before forgotten", "routing_kernels", "first_row[:, None] + rows_before",
          "first_row[:, None] + 0 * rows_before"),
    Fault("counts of the first blocks only", "routing_kernels", "tl.range(0, num_blocks, CHUNK, num_stages=2)",
          "tl.range(0, CHUNK, CHUNK)"),
    Fault("blocks of later chunks before all", "routing_kernels", "tl.where(b[:, None] < end[None, :]",
          "tl.where(b[:, None] - start < end[None, :]"),
    Fault("a block counts itself", "routing_kernels", "first_block + j)", "first_block + j + 1)"),
    Fault("a counter too few", "routing", "ONE_LAUNCH_TOKENS // 16 + 1", "ONE_LAUNCH_TOKENS // 16"),
    Fault("groups before forgotten", "routing_kernels", "num_blocks, group * GROUP, counts",
          "num_blocks, 0, counts"),
    Fault("last part of D forgotten", "routing_kernels", "tl.static_range(SPLITS)", "tl.static_range(SPLITS - 1)"),
    Fault("an expert that is padding", "routing_kernels",
          "keys = tl.where((e < E)[None, :], keys, TAKEN)", "keys = keys"),
    Fault("exponentials of logits as they are", "routing_kernels", "tl.where(k == 0, chosen_logits,",
          "tl.where(k == 0, 0 * chosen_logits,"),
    Fault("padding in the softmax", "routing_kernels",
          'logits = tl.where((e < E)[None, :], logits, float("-inf"))', "logits = logits"),
    Fault("tokens that are padding counted", "routing_kernels",
          "chosen = chosen & (t < T)[:, None]", "chosen = chosen"),
    Fault("counter left standing", "routing_kernels", "tl.store(counter_ptr, 0)", "tl.store(counter_ptr, 1)"),
    Fault("ragged row tile dropped", "routing_kernels", "(counts + (ROW_TILE - 1)) // ROW_TILE", "counts // ROW_TILE"),
    Fault("last offset is not R", "routing_kernels", "mask=e == E - 1", "mask=e == E"),
    Fault("always renormalized", "routing", "return cfg.renormalize or", "return True or"),
    Fault("softmax over all for the chosen", "routing", 'or cfg.scoring == "topk_softmax"', ""),
    Fault("swapped gate and up", "decode", "gate, up = acc", "up, gate = acc"),
    Fault("every strip is the first", "decode", "strip * BLOCK_F) // 4", "0) // 4"),
    Fault("every row tile is the first", "decode", "within % row_tiles * ROW_TILE", "0"),
    Fault("rows of another token", "decode", "x_ptr + token.to(tl.int64)", "x_ptr + (token * 0).to(tl.int64)"),
    Fault("last row not stored", "decode", "acc, rows, rows < end_row,", "acc, rows, rows < end_row - 1,"),
    Fault("last depth step dropped", "decode", "tl.range(0, F, BLOCK_F,", "tl.range(0, F - BLOCK_F + 1, BLOCK_F,"),
    Fault("tail reads the first rows", "decode", "tail_desc.load([first_row + ROWS, f])",
          "tail_desc.load([first_row, f])"),
    Fault("tail reads another token", "decode", "x_ptr + tail_token", "x_ptr + (tail_token * 0)"),
    Fault("score skipped", "combine", "tl.load(scores_ptr + t * TOP_K + k) * y", "y"),
    Fault("score of the first choice", "combine", "scores_ptr + t * TOP_K + k", "scores_ptr + t * TOP_K"),
    Fault("last choice dropped", "combine", "tl.static_range(TOP_K)", "tl.static_range(TOP_K - 1)"),
    Fault("last column dropped", "combine", "inside = d < D", "inside = d < D - 1"),
)


def planted(fault: Fault, folder) -> SimpleNamespace:
    """The modules, one of them an edited copy. Kernels of routing are launched by a copy of routing.py."""
    edited = copied(fault.file, folder, fault.right, fault.wrong)
    if fault.file != "routing_kernels":
        return SimpleNamespace(**{**vars(KERNELS), fault.file: edited})
    launchers = copied("routing", folder)
    for name in vars(launchers):
        if name.endswith("_kernel"):
            setattr(launchers, name, getattr(edited, name))
    return SimpleNamespace(**{**vars(KERNELS), "routing": launchers, "routing_kernels": edited})


def copied(file: str, folder, right: str = "", wrong: str = "") -> ModuleType:
    """A module of KERNELS, read from a copy in which `right` is `wrong`."""
    source = inspect.getsource(getattr(KERNELS, file))
    assert right in source, "the fault's line is gone from the file: plant it anew"
    path = folder / f"{file}_copy.py"
    path.write_text(source.replace(right, wrong) if right else source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def caught(kernels: SimpleNamespace, fault: Fault, device: torch.device) -> bool:
    try:
        if fault.file.startswith("routing"):
            module = kernels.routing
            return (tie_fault(module, ONE, device) or far_apart_fault(module, ONE, True, device)
                    or any(routing_fault(module, case, PATHS[path], torch.float16, device)
                           for case, path in FAULT_ROUTES))
        return any(not check_layer(kernels, SKEWED, torch.float16, device, tiles).ok for tiles in (PERSISTENT, TAILED))
    except (IndexError, RuntimeError, ValueError, TypeError):
        return True


@pytest.fixture
def room(monkeypatch):
    """Room behind all that torch.empty returns, so that a fault that writes past an end harms nothing else."""
    empty = torch.empty

    def roomy(*shape, **kwargs):
        size = torch.Size(shape if isinstance(shape[0], int) else shape[0])
        return empty(size.numel() + 2**14, **kwargs)[: size.numel()].view(size)

    monkeypatch.setattr(torch, "empty", roomy)


@pytest.mark.parametrize("file", vars(KERNELS))
def test_an_unedited_copy_is_not_caught(file, tmp_path, device, room):
    fault = Fault("nothing", file, "import triton", "import triton")
    assert not caught(planted(fault, tmp_path), fault, device)


@pytest.mark.usefixtures("poison", "room")
@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_planted_fault_is_caught(fault, tmp_path, device):
    assert caught(planted(fault, tmp_path), fault, device)


# ---- on the GPU ---------------------------------------------------------------------------------------

@pytest.mark.gpu
@pytest.mark.parametrize("routing_mode", ["natural", "uniform", "skewed", "one_hot", "sparse"])
@pytest.mark.parametrize("T", [1, 8, 33, 64, 130, 256, 300, 500])
def test_real_tiles(T, routing_mode, device):
    found = check_layer(KERNELS, Case("real tiles", T=T, D=1032, F=776, E=16, K=4, routing=routing_mode),
                        torch.bfloat16, device)
    assert found.ok, found.reason


@pytest.mark.gpu
@pytest.mark.parametrize(("T", "D", "E", "K"), [
    (512, 4096, 8, 2), (700, 72, 13, 13), (4096, 7168, 256, 8), (5001, 2048, 128, 8), (16384, 2048, 64, 8),
    (20000, 2048, 128, 8), (200, 512, 512, 10), (60, 7168, 256, 8),
])
def test_real_routing(T, D, E, K, device):
    """The index arrays must follow from the chosen experts, and those must be best but for ties."""
    router_ED = make_weights(MoEConfig("case", D, 8, E, K), torch.bfloat16, device).router_ED
    x_TD = torch.randn(T, D, device=device).bfloat16()
    arrivals_A = routing.new_arrivals(device)
    found, again = (routing.route(x_TD, router_ED, K, arrivals_A, 128) for _ in range(2))
    tiles = found.work_W4[-1, 0]
    assert all(torch.equal(*both) for both in zip(found[:-1], again[:-1], strict=True))
    assert torch.equal(found.work_W4[:tiles], again.work_W4[:tiles])
    logits_TE = x_TD.double() @ router_ED.double().T
    chosen_TK = logits_TE.gather(1, found.expert_ids_TK.long())
    assert (chosen_TK - logits_TE.topk(K, dim=1).values).abs().max() < 1e-4
    slot_of_row_R = found.expert_ids_TK.flatten().sort(stable=True).indices
    assert torch.equal(found.token_of_row_R, (slot_of_row_R // K).int())
    assert torch.equal(found.row_of_slot_TK.flatten()[slot_of_row_R], torch.arange(T * K, device=device).int())
    rows_E = torch.bincount(found.expert_ids_TK.flatten(), minlength=E)
    assert torch.equal(found.offsets_E1[1:], rows_E.cumsum(0).int())
    assert tiles == (-(-rows_E // 128)).sum()


@pytest.mark.gpu
@pytest.mark.parametrize("T", [1, 64, 300])
def test_a_graph_replays_changed_routing(T, device):
    cfg = MoEConfig("case", D=512, F=384, E=32, K=4)
    weights = make_weights(cfg, torch.bfloat16, device)
    forward = layer(KERNELS, cfg, weights)
    x_TD = make_inputs(Workload(cfg, T), weights)
    forward(x_TD)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out_TD = forward(x_TD)
    for seed, mode in enumerate(("one_hot", "sparse", "skewed", "natural")):
        workload = Workload(cfg, T, routing=mode, seed=seed)
        x_TD.copy_(make_inputs(workload, weights))
        graph.replay()
        found = gate(out_TD, oracle(cfg, weights, x_TD), workload)
        assert found.ok, f"{mode}: {found.reason}"


@pytest.mark.gpu
def test_bitwise_repeatable_in_a_burst(device):
    """Many layers with nothing between them: kernels that start early must not read what is not there yet."""
    cfg = MoEConfig("case", D=512, F=384, E=32, K=4)
    weights = make_weights(cfg, torch.bfloat16, device)
    forward = layer(KERNELS, cfg, weights)
    batches = [make_inputs(Workload(cfg, 64, routing=mode), weights) for mode in ("natural", "one_hot", "sparse")]
    first = [forward(x_TD).clone() for x_TD in batches]
    burst = [(i, forward(batches[i])) for _ in range(30) for i in range(3)]
    assert all(torch.equal(first[i], out_TD) for i, out_TD in burst)
