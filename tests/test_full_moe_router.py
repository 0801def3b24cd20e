"""OptimizedMoELayer's router and what balances it: python -m pytest tests/test_full_moe_router.py"""

from __future__ import annotations

import math

import pytest
import torch

from common.measure import relative_error
from labs.moe_layer.losses import balance_loss, count_rows, move_bias, z_loss
from labs.moe_layer.router import Router
from tests.layers import small


# ---- router --------------------------------------------------------------------------------------

def test_grouped_top_k_stays_in_the_best_groups():
    router = Router(16, 12, 3, "sigmoid", num_groups=4, top_groups=2)
    choice = router(torch.randn(50, 16))
    for probs_E, ids_K in zip(choice.probs_TE, choice.expert_ids_TK, strict=True):
        merit_G = [sum(sorted(probs_E[3 * g: 3 * g + 3].tolist())[-2:]) for g in range(4)]
        best = sorted(range(4), key=lambda g: -merit_G[g])[:2]
        allowed = sorted((3 * g + i for g in best for i in range(3)), key=lambda e: -probs_E[e])
        assert set(ids_K.tolist()) == set(allowed[:3])


def test_the_bias_moves_the_choice_and_not_the_scores():
    router = Router(16, 8, 2, renormalize=False, with_bias=True)
    x_TD = torch.randn(20, 16)
    router.e_score_correction_bias[5] = 10.0
    choice = router(x_TD)
    assert (choice.expert_ids_TK[:, 0] == 5).all()
    assert torch.equal(choice.scores_TK, choice.probs_TE.gather(1, choice.expert_ids_TK))


def test_noise_is_for_training_only():
    router, x_TD = Router(16, 8, 2, noise_std=5.0), torch.randn(40, 16)
    plain = Router(16, 8, 2)
    plain.load_state_dict(router.state_dict())
    assert not torch.equal(router(x_TD).probs_TE, plain(x_TD).probs_TE)
    assert torch.equal(router.eval()(x_TD).probs_TE, plain(x_TD).probs_TE)


def test_logits_of_low_precision_tokens_are_float32(device):
    router = Router(64, 8, 2, device=device, dtype=torch.bfloat16)
    x_TD = torch.randn(40, 64, device=device).bfloat16()
    logits_TE = router(x_TD).logits_TE
    assert relative_error(logits_TE, x_TD.double() @ router.weight.double().T) < 1e-5


def test_the_router_learns_from_the_whole_gradient(device):
    """In bfloat16 the router's gradients err by their own rounding alone: products of bfloat16 parts lose nothing."""
    router = Router(64, 8, 2, device=device, dtype=torch.bfloat16)
    x_TD = torch.randn(300, 64, device=device).bfloat16().requires_grad_()
    grad_TE = torch.randn(300, 8, device=device)
    router(x_TD).logits_TE.backward(grad_TE)
    assert relative_error(x_TD.grad, grad_TE.double() @ router.weight.double()) < 2.5e-3
    assert relative_error(router.weight.grad, grad_TE.double().T @ x_TD.double()) < 2.5e-3


# ---- losses --------------------------------------------------------------------------------------

@pytest.mark.parametrize(("E", "K"), [(4, 1), (8, 2), (6, 6)])
def test_the_balance_loss_is_one_at_balance_and_e_at_collapse(E, K):
    T = 4 * E
    ids_TK = (torch.arange(T)[:, None] + torch.arange(K)) % E
    assert balance_loss(torch.full((T, E), 1 / E), count_rows(ids_TK, E)) == pytest.approx(1.0)
    sigmoids_TE = torch.full((T, E), 0.7)  # each token's are divided by their sum
    assert balance_loss(sigmoids_TE, count_rows(ids_TK, E)) == pytest.approx(1.0)
    if K == 1:
        collapsed_TE = torch.zeros(T, E)
        collapsed_TE[:, 0] = 1
        assert balance_loss(collapsed_TE, count_rows(torch.zeros(T, 1, dtype=torch.long), E)) == pytest.approx(E)


def test_the_balance_loss_turns_the_router_to_idle_experts():
    logits_TE = torch.randn(64, 4)
    logits_TE[:, 0] += 2
    logits_TE.requires_grad_()
    probs_TE = logits_TE.softmax(dim=1)
    balance_loss(probs_TE, count_rows(probs_TE.topk(1).indices, 4)).backward()
    assert logits_TE.grad.sum(dim=0)[0] > 0
    assert (logits_TE.grad.sum(dim=0)[1:] < 0).all()


def test_the_z_loss_is_the_mean_squared_logsumexp():
    logits_TE = torch.randn(10, 6, dtype=torch.float64)
    wanted = sum(math.log(sum(math.exp(v) for v in row)) ** 2 for row in logits_TE.tolist()) / 10
    assert z_loss(logits_TE).item() == pytest.approx(wanted)


def test_aux_loss_is_the_weighted_sum(device):
    layer, x_TD = small(device, load_balance_weight=0.5, z_loss_weight=0.25)
    choice = layer.gate(x_TD)
    wanted = 0.5 * balance_loss(choice.probs_TE, count_rows(choice.expert_ids_TK, 8)) + 0.25 * z_loss(choice.logits_TE)
    assert layer(x_TD, return_aux_loss=True)[1].item() == pytest.approx(wanted.item())
    without, _ = small(device, load_balance_weight=0.0)
    assert without(x_TD, return_aux_loss=True)[1] == 0


def test_moving_the_bias_evens_out_the_load(device):
    layer, x_TD = small(device, T=512, bias_update_rate=0.01, scoring="sigmoid")
    with torch.no_grad():
        x_TD += 0.4 * layer.gate.weight[0] / layer.gate.weight[0].norm() * 32**0.5  # expert 0 is everybody's
    layer(x_TD)
    before = layer.stats()
    for _ in range(100):
        layer(x_TD)
        layer.update_balance()
    layer(x_TD)
    after = layer.stats()
    assert before.gini > 0.2
    assert after.gini < before.gini / 3
    layer.to(torch.bfloat16)
    assert layer.gate.e_score_correction_bias.dtype == torch.float32, "steps of 0.001 are lost in bfloat16"
    bias_E = torch.zeros(3)
    move_bias(bias_E, torch.tensor([9, 3, 0]), 0.5)
    assert bias_E.tolist() == [-0.5, 0.5, 0.5]
