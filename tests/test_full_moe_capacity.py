"""Capacity, token rounding, and what a layer tells of its loads: python -m pytest tests/test_full_moe_capacity.py"""

from __future__ import annotations

import math

import pytest
import torch

from common.config import MoEConfig
from common.measure import relative_error
from labs.kernels.rounding import dense_scores, plan_rounding, round_tokens
from labs.moe_layer.admission import drop_over_capacity, move_factor, round_on_cpu
from labs.moe_layer.statistics import evenness, gini
from tests.layers import assert_close, expected, measured, small


# ---- capacity ------------------------------------------------------------------------------------

def test_capacity_keeps_the_best_by_score():
    generator = torch.Generator().manual_seed(0)
    T, E, K, factor = 40, 6, 2, 0.8
    ids_TK = torch.rand(T, E, generator=generator).topk(K).indices
    scores_TK = torch.randint(0, 8, (T, K), generator=generator) / 8  # with ties, which go to the lower token
    kept_TK = drop_over_capacity(scores_TK, ids_TK, E, factor) != E
    capacity = math.ceil(factor * T * K / E)
    for e in range(E):
        slots = [(-scores_TK[t, k].item(), t, k) for t, k in (ids_TK == e).nonzero().tolist()]
        assert {(t, k) for _, t, k in sorted(slots)[:capacity]} == {
            (t, k) for _, t, k in slots if kept_TK[t, k]}


def test_a_whole_capacity_factor_is_a_factor(device):
    layer, x_TD = small(device, capacity_factor=1)
    other, _ = small(device, capacity_factor=1.0)
    assert torch.equal(layer(x_TD), other(x_TD))


def test_what_is_dropped_passes_as_zero_and_is_counted(device):
    layer, x_TD = small(device, capacity_factor=0.25)
    out_TD = layer(x_TD)
    kept_TK = drop_over_capacity(*layer.gate(x_TD)[2:], 8, 0.25) != 8
    lost_T = ~kept_TK.any(dim=1)
    assert lost_T.any()
    assert (out_TD[lost_T] == 0).all()
    assert (out_TD[~lost_T] != 0).any(dim=1).all()
    stats = layer.stats()
    assert stats.dropped == int((~kept_TK).sum())
    assert sum(stats.rows_per_expert) == 96


def test_capacity_does_not_depend_on_the_order_of_tokens(device):
    layer, x_TD = small(device, capacity_factor=0.5)
    order = torch.randperm(48, device=device)
    assert relative_error(layer(x_TD[order]), layer(x_TD)[order].double()) < 1e-6


def test_evaluation_drops_nothing_unless_asked(device):
    layer, x_TD = small(device, capacity_factor=0.25)
    layer.eval()(x_TD)
    assert layer.stats().dropped == 0
    layer.eval_capacity_factor = 0.25
    layer(x_TD)
    assert layer.stats().dropped > 0


def test_an_adaptive_capacity_follows_the_load(device):
    factor = torch.tensor(1.25, device=device)
    for _ in range(60):
        move_factor(factor, torch.full((8,), 64, device=device), first=1.25)
    assert factor.item() == pytest.approx(1.0, abs=0.01)
    move_factor(factor, torch.zeros(8, dtype=torch.int64, device=device), first=1.25)
    assert factor.item() == pytest.approx(1.0, abs=0.01), "no rows say nothing"
    for _ in range(60):
        move_factor(factor, torch.tensor([512] + [0] * 7, device=device), first=1.25)
    assert factor.item() == pytest.approx(2.5), "twice capacity_factor is the most"


def test_the_layer_drops_by_the_adapted_factor(device):
    layer, x_TD = small(device, T=256, capacity_factor=0.5, adaptive_capacity=True)
    layer(x_TD)
    dropped = layer.stats().dropped
    assert dropped > 0
    layer(x_TD)
    assert layer.stats().dropped == dropped, "a forward leaves the factor where it is"
    for _ in range(60):
        layer(x_TD)
        layer.update_balance()
    layer(x_TD)
    assert layer.adapted_capacity_factor.item() == pytest.approx(1.0)
    assert layer.stats().dropped < dropped
    layer.eval()(x_TD)
    assert layer.stats().dropped == 0


# ---- token rounding ------------------------------------------------------------------------------

@pytest.mark.parametrize("mode", ["nearest", "up", "down", "balance", "exact"])
@pytest.mark.parametrize(("T", "E", "K", "unit"), [(70, 8, 2, 8), (33, 5, 3, 4), (20, 4, 1, 3), (64, 8, 2, 16)])
def test_rounding_on_the_cpu_equals_the_kernels(mode, T, E, K, unit, device):
    generator = torch.Generator().manual_seed(T)
    probs_TE = (torch.randint(0, 40, (T, E), generator=generator) / 40).softmax(dim=1)  # with ties
    ids_TK = probs_TE.topk(K).indices
    ids_TK[0, 0] = E  # a slot that a capacity dropped
    plan = plan_rounding(MoEConfig("case", D=8, F=8, E=E, K=K), T, unit, mode, least_tiles=0.0)
    found = round_on_cpu(probs_TE, ids_TK, plan)
    wanted = round_tokens(probs_TE.to(device), ids_TK.to(device), plan)
    used = int(found.offsets_E1[-1])
    for name in found._fields:
        got, ref = getattr(found, name), getattr(wanted, name).cpu()
        if name.endswith("_C"):
            got, ref = got[:used], ref[:used]
        torch.testing.assert_close(got, ref, msg=name)


@pytest.mark.parametrize("mode", ["nearest", "up", "down", "balance"])
@pytest.mark.parametrize("options", [{}, {"scoring": "sigmoid", "score_scale": 2.0}, {"renormalize": False},
                                     {"gradient_checkpointing": True}, {"capacity_factor": 1.0}], ids=str)
def test_rounded_layers_equal_the_definition(mode, options, device):
    layer, x_TD = small(device, T=96, token_rounding=mode, tile_size=8, **options)
    grad_TD = torch.randn_like(x_TD)
    admitted, _, rows_E = layer.admit(layer.gate(x_TD))
    assert not (rows_E % 8).any()
    kept_TE = dense_scores(admitted.rounded, admitted.plan) > 0
    assert_close(measured(layer, x_TD, grad_TD), expected(layer, x_TD, grad_TD, kept_TE), 2e-5)


def test_rounding_is_for_training_only(device):
    layer, x_TD = small(device, T=96, token_rounding="nearest", tile_size=8)
    layer(x_TD)
    stats = layer.stats()
    assert stats.dropped + stats.added > 0
    assert stats.padded == 0
    exact, _ = small(device)
    assert torch.equal(layer.eval()(x_TD), exact(x_TD))
    assert layer.stats().padded > 0


def test_too_few_rows_turn_rounding_off_and_say_so(device):
    layer, x_TD = small(device, token_rounding="nearest")
    with pytest.warns(UserWarning, match="tile rounding is off"):
        layer(x_TD)


# ---- statistics ----------------------------------------------------------------------------------

def test_measures_of_evenness():
    rows_E = torch.tensor([6, 2, 0, 4])
    pairs = sum(abs(a - b) for a in rows_E.tolist() for b in rows_E.tolist())
    assert gini(rows_E).item() == pytest.approx(pairs / 16 / (2 * 3))
    entropy, _, spread, peak = evenness(rows_E).tolist()
    assert entropy == pytest.approx(-sum(n / 12 * math.log(n / 12) for n in (6, 2, 4)))
    assert spread == pytest.approx(math.sqrt(sum((n - 3) ** 2 for n in (6, 2, 0, 4)) / 4) / 3)
    assert peak == 2
    assert evenness(torch.full((4,), 3)).tolist() == pytest.approx([math.log(4), 0, 0, 1])
    assert evenness(torch.zeros(4)).tolist() == [0, 0, 0, 0]


def test_running_statistics_cover_training_forwards_only(device):
    layer, x_TD = small(device, capacity_factor=0.5)
    singles = []
    for i in range(70):  # more than one batch of the recorder's
        layer(x_TD[: 40 + i % 3])
        singles.append(layer.stats())
    layer.eval()(x_TD)
    running = layer.stats(running=True)
    assert running.forwards == 70
    assert running.rows_per_expert == tuple(map(sum, zip(*(one.rows_per_expert for one in singles), strict=True)))
    assert running.dropped == sum(one.dropped for one in singles)
    assert running.gini == pytest.approx(sum(one.gini for one in singles) / 70)
    layer.reset_stats()
    with pytest.raises(RuntimeError, match="nothing to tell"):
        layer.stats(running=True)
