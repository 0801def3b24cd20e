"""The layer of labs/kernels against the float64 oracle: python -m pytest tests/test_kernels_layer.py"""

from __future__ import annotations

import warnings

import pytest
import torch

from common.config import MoEConfig, Workload
from common.measure import gate
from common.model import Oracle, make_inputs, make_weights, oracle
from labs.kernels import layer
from labs.kernels.rounding import dense_scores, plan_rounding, round_tokens
from tests.cases import CASES

DTYPES = [torch.bfloat16, torch.float16] if torch.cuda.is_available() else [torch.float32, torch.float16]
FITTING = [case for case in CASES if case.D % 8 == 0 and case.F % 8 == 0]


def exact_gate(case, dtype, device, most_rows_decode, monkeypatch):
    monkeypatch.setattr(layer, "MOST_ROWS_DECODE", most_rows_decode)
    workload = Workload(case.config, case.T, dtype, case.routing)
    weights = make_weights(case.config, dtype, device)
    x_TD = make_inputs(workload, weights)
    return gate(layer.build_exact(case.config, weights)(x_TD), oracle(case.config, weights, x_TD), workload)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", FITTING, ids=str)
@pytest.mark.parametrize("most_rows_decode", [10**6, 0], ids=["few_rows", "many_rows"])
def test_exact_equals_the_oracle(case, dtype, device, most_rows_decode, monkeypatch):
    found = exact_gate(case, dtype, device, most_rows_decode, monkeypatch)
    assert found.ok, found.reason


def test_the_kernels_are_chosen_by_the_mean_rows_an_expert(device, monkeypatch):
    cfg = MoEConfig("case", D=32, F=16, E=4, K=2)
    weights = make_weights(cfg, DTYPES[0], device)
    forward = layer.build_exact(cfg, weights)
    taken = []
    monkeypatch.setattr(layer.ManyRows, "__call__", lambda *_: taken.append("many") or pytest.fail("unreached"))
    monkeypatch.setattr(layer, "MOST_ROWS_DECODE", 16)
    forward(make_inputs(Workload(cfg, 32, DTYPES[0]), weights))  # 16 rows an expert
    assert not taken
    with pytest.raises(pytest.fail.Exception):
        forward(make_inputs(Workload(cfg, 33, DTYPES[0]), weights))


@pytest.mark.parametrize("build", [layer.build_exact, layer.build_rounded])
def test_no_tokens(build, device):
    cfg = MoEConfig("case", D=32, F=16, E=4, K=2)
    forward = build(cfg, make_weights(cfg, DTYPES[0], device))
    assert forward(torch.empty(0, 32, dtype=DTYPES[0], device=device)).shape == (0, 32)


@pytest.mark.parametrize("mode", ["nearest", "up", "down", "balance"])
@pytest.mark.parametrize("routing", ["natural", "skewed", "sparse"])
def test_rounded_equals_the_oracle_of_its_own_routing(mode, routing, device):
    cfg, T, tile, dtype = MoEConfig("case", D=32, F=16, E=8, K=2), 150, 16, DTYPES[0]
    weights = make_weights(cfg, dtype, device)
    workload = Workload(cfg, T, dtype, routing)
    x_TD = make_inputs(workload, weights)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # 37 rows an expert are over two tiles of 16: rounding must be on
        out_TD = layer.build_rounded(cfg, weights, tile, mode)(x_TD)
        plan = plan_rounding(cfg, T, tile, mode)
    probs_TE = (x_TD.float() @ weights.router_ED.float().T).softmax(dim=1)
    rounded = round_tokens(probs_TE, probs_TE.topk(cfg.K, dim=1).indices, plan)
    assert not (rounded.offsets_E1 % tile).any()
    scores_TE = dense_scores(rounded, plan).double()
    expected_TD = torch.zeros(T, cfg.D, dtype=torch.float64, device=x_TD.device)
    for e in range(cfg.E):
        gate_part, up_part = (x_TD.double() @ weights.gate_up_E2FD[e].double().T).chunk(2, dim=1)
        hidden = torch.nn.functional.silu(gate_part) * up_part
        expected_TD += scores_TE[:, e, None] * (hidden @ weights.down_EDF[e].double().T)
    clear_T = torch.ones(T, device=x_TD.device)
    found = gate(out_TD, Oracle(expected_TD, rounded.counts_E, clear_T), workload)
    assert found.ok, found.reason
    exact = oracle(cfg, weights, x_TD)
    assert not gate(out_TD, exact, workload).ok, "rounding must have changed some routes"


@pytest.mark.gpu
@pytest.mark.parametrize("T", [64, 4096])
def test_a_graph_of_it_answers_other_routing(T, device):
    cfg = MoEConfig("real", D=512, F=256, E=16, K=4)
    weights = make_weights(cfg, torch.bfloat16, device)
    forward = layer.build_exact(cfg, weights)
    captured_x_TD = make_inputs(Workload(cfg, T), weights)
    forward(captured_x_TD)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured_out_TD = forward(captured_x_TD)
    for routing in ("one_hot", "sparse", "natural"):
        workload = Workload(cfg, T, routing=routing, seed=5)
        x_TD = make_inputs(workload, weights)
        captured_x_TD.copy_(x_TD)
        graph.replay()
        found = gate(captured_out_TD, oracle(cfg, weights, x_TD), workload)
        assert found.ok, f"{routing}: {found.reason}"
