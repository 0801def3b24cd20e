"""Every level against the float64 oracle: python -m pytest tests/test_levels.py"""

from __future__ import annotations

import pytest
import torch

from common.config import MoEConfig, Workload
from common.level import Unsupported
from common.measure import gate
from common.model import make_inputs, make_weights, oracle
from tests.cases import CASES, IDS, LEVELS, SMALL_BUDGET, Case, build, check, precise_dtype

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def supported(loaded, device, dtype):
    try:
        loaded.level.check_supported(device, dtype)
    except Unsupported as lack:
        pytest.skip(str(lack))


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("loaded", LEVELS, ids=IDS)
def test_equals_the_oracle(loaded, dtype, case, device):
    supported(loaded, device, dtype)
    found = check(loaded, case, dtype, device)
    assert found.ok, found.reason


@pytest.mark.parametrize("loaded", LEVELS, ids=IDS)
def test_no_tokens_give_an_empty_result(loaded, device):
    dtype = precise_dtype(loaded)
    supported(loaded, device, dtype)
    cfg = CASES[0].config
    forward = build(loaded, cfg, make_weights(cfg, dtype, device))
    assert forward(torch.empty(0, cfg.D, dtype=dtype, device=device)).shape == (0, cfg.D)


@pytest.mark.parametrize("loaded", LEVELS, ids=IDS)
def test_two_runs_agree_bit_for_bit(loaded, device):
    dtype = precise_dtype(loaded)
    supported(loaded, device, dtype)
    assert loaded.level.claims.repeatable
    cfg = CASES[0].config
    weights = make_weights(cfg, dtype, device)
    x_TD = make_inputs(Workload(cfg, 64, dtype), weights)
    forward = build(loaded, cfg, weights)
    first = forward(x_TD).clone()
    assert torch.equal(first, forward(x_TD))


@pytest.mark.parametrize("loaded", LEVELS, ids=IDS)
def test_a_second_batch_routes_anew(loaded, device):
    """The same callable, another batch with other routing and another T: nothing is frozen at first sight."""
    dtype = precise_dtype(loaded)
    supported(loaded, device, dtype)
    cfg = MoEConfig("case", D=32, F=16, E=8, K=2)
    weights = make_weights(cfg, dtype, device)
    forward = build(loaded, cfg, weights)
    for T, routing in ((48, "one_hot"), (48, "skewed"), (17, "natural"), (48, "sparse"), (1, "natural")):
        workload = Workload(cfg, T, dtype, routing, seed=T)
        x_TD = make_inputs(workload, weights)
        found = gate(forward(x_TD), oracle(cfg, weights, x_TD), workload)
        assert found.ok, f"T={T} {routing}: {found.reason}"


@pytest.mark.parametrize("loaded", LEVELS, ids=IDS)
def test_misfit_weights_are_named(loaded, device):
    cfg = CASES[0].config
    weights = make_weights(MoEConfig("other", cfg.D, cfg.F + 1, cfg.E, cfg.K), torch.float32, device)
    with pytest.raises(ValueError, match=r"gate_up_E2FD has shape .* needs \(8, 192, 64\)"):
        loaded.build(cfg, weights)


@pytest.mark.gpu
@pytest.mark.parametrize("loaded", LEVELS, ids=IDS)
@pytest.mark.parametrize("routing", ["natural", "uniform", "skewed", "one_hot", "sparse"])
def test_real_tiles(loaded, routing, device):
    """Sizes that need several tiles of every kind, in the dtype of real use."""
    case = Case("real tiles", T=777, D=512, F=384, E=16, K=4, routing=routing)
    found = check(loaded, case, torch.bfloat16, device)
    assert found.ok, found.reason


def test_level3_budget_below_one_token_is_refused(device):
    cfg = CASES[0].config
    weights = make_weights(cfg, torch.float32, device)
    with pytest.raises(ValueError, match="budget_bytes=1000: one token of this layer needs at least"):
        LEVELS[3].build(cfg, weights, budget_bytes=1000)


def test_level3_really_works_in_chunks(device):
    cfg = MoEConfig("case", D=64, F=96, E=8, K=2)
    weights = make_weights(cfg, torch.float32, device)
    workspace = LEVELS[3].module.Workspace(cfg, weights, SMALL_BUDGET)
    assert 1 <= workspace.tokens < 64, "the cases above must need more than one chunk"
