"""Configs, weights, inputs and the oracle itself: python -m pytest tests/test_model.py"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.config import PRESETS, ROUTING_MODES, MoEConfig, Workload, flops, least_bytes, preset
from common.measure import check_finite, error_bound, gate, relative_error
from common.model import Oracle, Weights, make_inputs, make_weights, oracle, route_float64

SMALL = MoEConfig("small", D=48, F=20, E=12, K=3)


def setup(routing: str, T: int = 240, cfg: MoEConfig = SMALL, dtype=torch.float32):
    weights = make_weights(cfg, dtype, "cpu")
    workload = Workload(cfg, T, dtype, routing)
    return workload, weights, make_inputs(workload, weights)


def rows_per_expert(routing: str, cfg: MoEConfig = SMALL, dtype=torch.float32) -> torch.Tensor:
    _, weights, x_TD = setup(routing, cfg=cfg, dtype=dtype)
    return oracle(cfg, weights, x_TD).rows_E


@pytest.mark.parametrize("routing", ROUTING_MODES)
def test_every_row_is_routed_and_x_is_of_unit_scale(routing):
    workload, weights, x_TD = setup(routing)
    assert oracle(SMALL, weights, x_TD).rows_E.sum() == workload.R
    assert 0.8 < x_TD.std() < 2


def test_uniform_is_balanced():
    assert rows_per_expert("uniform").unique().tolist() == [60]


def test_one_hot_gives_the_same_experts_all_tokens():
    assert sorted(rows_per_expert("one_hot").tolist()) == [0] * 9 + [240] * 3
    one = MoEConfig("one", D=48, F=20, E=12, K=1)
    assert sorted(rows_per_expert("one_hot", one).tolist()) == [0] * 11 + [240]


def test_sparse_leaves_experts_empty():
    assert (rows_per_expert("sparse") == 0).sum() == 9


def test_skewed_is_between_uniform_and_one_hot():
    rows = rows_per_expert("skewed").sort(descending=True).values
    assert rows[0] > 2.2 * rows.float().mean()
    assert rows[-1] < 0.6 * rows.float().mean()


def test_forced_routing_survives_the_rounding_of_x():
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        _, weights, x_TD = setup("uniform", dtype=dtype)
        assert oracle(SMALL, weights, x_TD).margin_T.min() > 0.5


def test_the_oracle_is_the_formula_token_by_token():
    """Written out again from the definition, one token and one expert at a time."""
    workload, weights, x_TD = setup("natural", T=7)
    expected = torch.zeros(7, SMALL.D, dtype=torch.float64)
    for t in range(7):
        x = x_TD[t].double()
        probabilities = (weights.router_ED.double() @ x).softmax(0)
        chosen = probabilities.topk(SMALL.K).indices.tolist()
        for e in chosen:
            gate_part, up_part = weights.gate_up_E2FD[e].double().split(SMALL.F)
            hidden = torch.nn.functional.silu(gate_part @ x) * (up_part @ x)
            expected[t] += probabilities[e] / probabilities[chosen].sum() * (weights.down_EDF[e].double() @ hidden)
    assert relative_error(oracle(SMALL, weights, x_TD).out_TD, expected) < 1e-14
    assert workload.R == 21


def test_both_scorings_agree_when_renormalised():
    _, weights, x_TD = setup("natural")
    chosen = MoEConfig("other", D=48, F=20, E=12, K=3, scoring="topk_softmax")
    first, second = (route_float64(cfg, weights.router_ED, x_TD)[0] for cfg in (SMALL, chosen))
    assert relative_error(first, second) < 1e-14
    raw = MoEConfig("raw", D=48, F=20, E=12, K=3, renormalize=False)
    assert (route_float64(raw, weights.router_ED, x_TD)[0].sum(1) < 0.99).all()


def test_intermediates_are_of_unit_scale():
    _, weights, x_TD = setup("natural")
    assert 0.9 < (x_TD @ weights.gate_up_E2FD[0].T).std() < 1.1
    assert 0.1 < oracle(SMALL, weights, x_TD).out_TD.std() < 2


def test_presets_name_their_source_and_fit_their_names():
    for name, cfg in PRESETS.items():
        assert cfg.name == name
        assert cfg.source
    assert (preset("mixtral-8x7b").D, preset("deepseek-v3").E) == (4096, 256)


def test_work_counts_match_a_count_by_hand():
    workload = Workload(MoEConfig("hand", D=3, F=5, E=7, K=2), T=11)
    assert flops(workload) == 22 * (2 * 10 * 3 + 2 * 3 * 5) + 2 * 11 * 3 * 7
    assert least_bytes(workload, active_experts=4) == 2 * (4 * 3 * 3 * 5 + 7 * 3 + 2 * 11 * 3)


def test_qwen3_weights_are_1_2_gigabytes():
    assert 1.2e9 < least_bytes(Workload(preset("qwen3-30b-a3b"), 512), 128) < 1.22e9


def test_misfit_weights_name_the_tensor():
    good = make_weights(SMALL, torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"down_EDF has shape \(12, 20, 48\).* needs \(12, 48, 20\)"):
        Weights(good.router_ED, good.gate_up_E2FD, good.down_EDF.transpose(1, 2)).check(SMALL)
    with pytest.raises(ValueError, match="gate_up_E2FD is float16 on cpu, but router_ED is float32"):
        Weights(good.router_ED, good.gate_up_E2FD.half(), good.down_EDF).check(SMALL)


def test_check_finite_passes_what_is_finite():
    _, weights, x_TD = setup("natural")
    check_finite(x_TD, weights)


# ---- the gate ------------------------------------------------------------------------------------

def test_a_tie_may_go_either_way_but_only_a_tie():
    workload, weights, x_TD = setup("natural", T=400)
    expected = oracle(SMALL, weights, x_TD)
    out_TD = expected.out_TD.float()
    out_TD[9] += 0.002 * out_TD[9].norm() / SMALL.D**0.5
    assert not gate(out_TD, expected, workload).ok
    tied = Oracle(expected.out_TD, expected.rows_E, expected.margin_T.index_fill(0, torch.tensor([9]), 1e-6))
    rest = out_TD.clone()
    rest[9] = expected.out_TD[9].float() * (1 + 1e-6)
    assert gate(rest, tied, workload).ok


@given(st.floats(1e-3, 0.5), st.integers(0, 2**16))
@settings(max_examples=25, deadline=None)
def test_noise_over_the_bound_is_caught(size, seed):
    workload, weights, x_TD = setup("natural", T=16)
    expected = oracle(SMALL, weights, x_TD)
    noise = torch.randn(expected.out_TD.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    noise *= size * expected.out_TD.norm() / noise.norm()
    assert not gate((expected.out_TD + noise).float(), expected, workload).ok


def test_bounds_follow_the_dtype():
    bounds = [error_bound(Workload(SMALL, 1, dtype)) for dtype in (torch.bfloat16, torch.float16, torch.float32)]
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[0] < 0.017
    assert bounds[2] < 2e-6
