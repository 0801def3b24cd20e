"""Experts that train: a SwiGLU mixture's forward and backward as one differentiable function.

    moe_experts          the router's choice: scores_TK, expert_ids_TK
    moe_experts_sorted   the same with the rows sorted before, by routing.py's route
    moe_experts_rounded  a rounded routing: the experts' rows, and each token's entries, of rounding.py

Kept for the backward: x, the pre-activations H (R, 2F), scores, and two int32 index arrays. Not the gathered x, not the
activation, not the experts' output (SonicMoE, arXiv 2512.14080). Bytes, beside the weights: activation_bytes().

    forward    up -> H, A                 rows_kernel: y = A down.T       combine -> out
    backward   hidden_grad -> dH, A', dS  weight_grad: dW2   rows_kernel: dX~ = dH gate_up   combine -> dX
               weight_grad: dW1

Both are PyTorch operators with fake implementations, so torch.compile takes the whole as two nodes; they make no host
sync and can be captured, and torch.utils.checkpoint recomputes them. Under autocast, x and the weights are cast to its
dtype. Two runs agree bit for bit.

    index array        shape     from -> to
    offsets_E1         (E + 1,)  expert -> its first row; the last entry: rows in use, <= R
    token_of_row_R     (R,)      row -> token
    row_of_slot_TK     (T, K)    token, choice -> row
    first_of_token_T1  (T + 1,)  token -> its first entry: in a rounded routing, whose tokens differ in their entries
    row_of_entry_C     (C,)      entry -> row; undefined past the rows in use
"""

from __future__ import annotations

import torch

from labs.kernels.backward_gemm import hidden_grad, multiply_rows, up
from labs.kernels.backward_loop import PlainTile, tile_for
from labs.kernels.backward_sort import sort_rows
from labs.kernels.backward_weights import spread_scores, sum_score_grads, weight_grad
from labs.kernels.combine import combine
from labs.kernels.launch import require, require_dtype, require_width
from labs.kernels.rounding import Plan, Rounded, combine_rounded
from labs.kernels.tiles import TilePlan, plan_tiles

# T tokens, D model width, F expert width, E experts, K top-k, R = T*K routed rows, C rows after rounding at most.
# The operators call R what they get: R of an exact routing, C of a rounded one.

MainGrads = tuple[torch.Tensor, torch.Tensor]


def activation_bytes(T: int, D: int, F: int, E: int, K: int, itemsize: int = 2) -> int:
    """Bytes that moe_experts keeps for its backward, beside the weights: x, H, scores, and the index arrays."""
    R = T * K
    return itemsize * (T * D + 2 * R * F) + 4 * (3 * R + E + 1)


# ---- the operators ------------------------------------------------------------------------------------------------
def _sum_rows(y_RD: torch.Tensor, scores: torch.Tensor, offsets_E1: torch.Tensor, row_of_entry: torch.Tensor,
              first_of_token_T1: torch.Tensor | None) -> torch.Tensor:
    """Each token's rows, weighted and summed: (T, D). scores and row_of_entry by slot, or by entry of a token."""
    if first_of_token_T1 is None:
        return combine(y_RD, row_of_entry, scores)
    T, C, E = first_of_token_T1.numel() - 1, row_of_entry.numel(), offsets_E1.numel() - 1
    K = max(1, round(C / max(T, 1)))  # how many rows the kernel loads at once, nothing else
    plan = Plan(T, K, E, "exact", 1, 1, C, renormalize=False)
    return combine_rounded(y_RD, Rounded(offsets_E1, offsets_E1, row_of_entry, first_of_token_T1, row_of_entry, scores),
                           plan)


def _check(x_TD: torch.Tensor, gate_up_E2FD: torch.Tensor, down_EDF: torch.Tensor, scores: torch.Tensor,
           offsets_E1: torch.Tensor, token_of_row_R: torch.Tensor, row_of_entry: torch.Tensor,
           first_of_token_T1: torch.Tensor | None, gate_up_main_grad: torch.Tensor | None,
           down_main_grad: torch.Tensor | None) -> None:
    """Raise ValueError, naming the argument, where shapes, dtypes, devices or strides do not fit."""
    (T, D), device, dtype = x_TD.shape, x_TD.device, x_TD.dtype
    E, F = down_EDF.shape[0], down_EDF.shape[-1]
    if device.type != "cuda" or dtype != torch.float32:  # float32 runs on a GPU too, in small tiles and slowly
        require_dtype("x_TD", x_TD)
    require_width("D", D)
    require_width("F", F)
    require("x_TD", x_TD, (T, D), dtype, device)
    require("gate_up_E2FD", gate_up_E2FD, (E, 2 * F, D), dtype, device)
    require("down_EDF", down_EDF, (E, D, F), dtype, device)
    R = token_of_row_R.numel()
    if R >= 2**30 or row_of_entry.numel() != R:
        raise ValueError(f"row_of_entry has {row_of_entry.numel()} entries, token_of_row_R {R}: need as many, "
                         f"fewer than 2**30")
    require("scores", scores, tuple(row_of_entry.shape), torch.float32, device)
    require("row_of_entry", row_of_entry, tuple(row_of_entry.shape), torch.int32, device)
    require("token_of_row_R", token_of_row_R, (R,), torch.int32, device)
    require("offsets_E1", offsets_E1, (E + 1,), torch.int32, device)
    if first_of_token_T1 is not None:
        require("first_of_token_T1", first_of_token_T1, (T + 1,), torch.int32, device)
    for name, grad, like in (("gate_up_main_grad", gate_up_main_grad, gate_up_E2FD),
                             ("down_main_grad", down_main_grad, down_EDF)):
        if grad is not None:
            require(name, grad, tuple(like.shape), torch.float32, device)


def _plan(x_TD: torch.Tensor, offsets_E1: torch.Tensor, R: int) -> tuple[PlainTile, TilePlan]:
    tile = tile_for(x_TD.device, x_TD.dtype)
    return tile, plan_tiles(offsets_E1, R, tile.block_M)


@torch.library.custom_op("moe_lab::train_experts", mutates_args=())
def experts(
    x_TD: torch.Tensor, gate_up_E2FD: torch.Tensor, down_EDF: torch.Tensor, scores: torch.Tensor,
    offsets_E1: torch.Tensor, token_of_row_R: torch.Tensor, row_of_entry: torch.Tensor,
    first_of_token_T1: torch.Tensor | None, gate_up_main_grad: torch.Tensor | None,
    down_main_grad: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out_TD and the pre-activations h_R2F. The main grads are for the backward."""
    _check(x_TD, gate_up_E2FD, down_EDF, scores, offsets_E1, token_of_row_R, row_of_entry, first_of_token_T1,
           gate_up_main_grad, down_main_grad)
    tile, plan = _plan(x_TD, offsets_E1, token_of_row_R.numel())
    h_R2F, hidden_RF = up(x_TD, token_of_row_R, offsets_E1, gate_up_E2FD, plan, tile)
    y_RD = multiply_rows(hidden_RF, offsets_E1, down_EDF, plan, tile, transposed=True)
    return _sum_rows(y_RD, scores, offsets_E1, row_of_entry, first_of_token_T1), h_R2F


@experts.register_fake
def _(x_TD, gate_up_E2FD, down_EDF, scores, offsets_E1, token_of_row_R, row_of_entry, first_of_token_T1,
      gate_up_main_grad, down_main_grad):
    return x_TD.new_empty(x_TD.shape), x_TD.new_empty(token_of_row_R.shape[0], gate_up_E2FD.shape[1])


@torch.library.custom_op("moe_lab::train_experts_backward", mutates_args=("gate_up_main_grad", "down_main_grad"))
def experts_backward(
    grad_out_TD: torch.Tensor, x_TD: torch.Tensor, gate_up_E2FD: torch.Tensor, down_EDF: torch.Tensor,
    scores: torch.Tensor, offsets_E1: torch.Tensor, token_of_row_R: torch.Tensor, row_of_entry: torch.Tensor,
    first_of_token_T1: torch.Tensor | None, h_R2F: torch.Tensor, gate_up_main_grad: torch.Tensor | None,
    down_main_grad: torch.Tensor | None, need_x: bool, need_gate_up: bool, need_down: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x_TD, gate_up_E2FD, down_EDF and scores; empty where not needed, or added to a main grad."""
    tile, plan = _plan(x_TD, offsets_E1, token_of_row_R.numel())
    spare_rows = first_of_token_T1 is not None
    d_x, d_gate_up, d_down = (x_TD.new_empty(0) for _ in range(3))
    score_of_row_R = spread_scores(scores, row_of_entry, offsets_E1)
    dh_R2F, scaled_RF, d_scores_XR = hidden_grad(grad_out_TD, token_of_row_R, score_of_row_R, offsets_E1, down_EDF,
                                                 h_R2F, plan, tile)
    d_scores = sum_score_grads(d_scores_XR, row_of_entry, offsets_E1)
    if need_down:
        out = torch.empty_like(down_EDF) if down_main_grad is None else down_main_grad
        weight_grad(grad_out_TD, token_of_row_R, scaled_RF, offsets_E1, out, tile, transposed=False,
                    accumulate=down_main_grad is not None, spare_rows=spare_rows)
        d_down = out if down_main_grad is None else d_down
    del scaled_RF  # its memory serves dX~
    if need_x:
        d_rows_RD = multiply_rows(dh_R2F, offsets_E1, gate_up_E2FD, plan, tile, transposed=False)
        ones = torch.ones_like(scores)  # dH has the scores in it
        d_x = _sum_rows(d_rows_RD, ones, offsets_E1, row_of_entry, first_of_token_T1)
        del d_rows_RD
    if need_gate_up:
        out = torch.empty_like(gate_up_E2FD) if gate_up_main_grad is None else gate_up_main_grad
        weight_grad(x_TD, token_of_row_R, dh_R2F, offsets_E1, out, tile, transposed=True,
                    accumulate=gate_up_main_grad is not None, spare_rows=spare_rows)
        d_gate_up = out if gate_up_main_grad is None else d_gate_up
    return d_x, d_gate_up, d_down, d_scores


@experts_backward.register_fake
def _(grad_out_TD, x_TD, gate_up_E2FD, down_EDF, scores, offsets_E1, token_of_row_R, row_of_entry, first_of_token_T1,
      h_R2F, gate_up_main_grad, down_main_grad, need_x, need_gate_up, need_down):
    def shaped(like, needed):
        return like.new_empty(like.shape) if needed else x_TD.new_empty(0)

    return (shaped(x_TD, need_x), shaped(gate_up_E2FD, need_gate_up and gate_up_main_grad is None),
            shaped(down_EDF, need_down and down_main_grad is None), scores.new_empty(scores.shape))


def _setup_context(ctx, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.gate_up_main_grad, ctx.down_main_grad = inputs
    # Main grads are not saved: another layer or micro-batch may add to them before this backward runs.
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out_TD: torch.Tensor | None, _: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    if grad_out_TD is None:
        return (None,) * 10
    need_x, need_gate_up, need_down, need_scores = ctx.needs_input_grad[:4]
    has_main = ctx.gate_up_main_grad is not None
    d_x, d_gate_up, d_down, d_scores = experts_backward(
        grad_out_TD.contiguous(), *ctx.saved_tensors, ctx.gate_up_main_grad, ctx.down_main_grad, need_x, need_gate_up,
        need_down)
    return (d_x if need_x else None, d_gate_up if need_gate_up and not has_main else None,
            d_down if need_down and not has_main else None, d_scores if need_scores else None, *(None,) * 6)


experts.register_autograd(_backward, setup_context=_setup_context)


# ---- what a layer calls -------------------------------------------------------------------------------------------
def _call(x_TD: torch.Tensor, gate_up_E2FD: torch.Tensor, down_EDF: torch.Tensor, scores: torch.Tensor,
          offsets_E1: torch.Tensor, token_of_row_R: torch.Tensor, row_of_entry: torch.Tensor,
          first_of_token_T1: torch.Tensor | None, main_grads: MainGrads | None) -> torch.Tensor:
    """The operator, with autocast applied."""
    device = x_TD.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x_TD, gate_up_E2FD, down_EDF = (one.to(dtype) for one in (x_TD, gate_up_E2FD, down_EDF))
    gate_up_main_grad, down_main_grad = main_grads or (None, None)
    return experts(x_TD.contiguous(), gate_up_E2FD, down_EDF, scores.contiguous(), offsets_E1, token_of_row_R,
                   row_of_entry, first_of_token_T1, gate_up_main_grad, down_main_grad)[0]


def moe_experts(x_TD: torch.Tensor, gate_up_E2FD: torch.Tensor, down_EDF: torch.Tensor, scores_TK: torch.Tensor,
                expert_ids_TK: torch.Tensor, main_grads: MainGrads | None = None) -> torch.Tensor:
    """out[t] = sum over k of scores[t, k] * expert_(ids[t, k])(x[t]): (T, D) -> (T, D) in x's dtype; differentiable.

    Gradients reach x_TD, gate_up_E2FD (E, 2F, D: gate rows then up rows), down_EDF (E, D, F), all of one dtype, and
    scores_TK (T, K) float32. expert_ids_TK (T, K) int32 or int64 in 0..E-1, no expert twice in a row (not checked: that
    would sync). D and F are multiples of 8. T may be 0.

    main_grads: float32 buffers (gate_up, down) in the weights' shapes. The backward then adds the weights' gradients
    to them, without rounding, and gives autograd none: weight.grad stays as it is. Raises ValueError for arguments
    that do not fit.
    """
    offsets_E1, token_of_row_R, row_of_slot_TK = sort_rows(expert_ids_TK.contiguous(), gate_up_E2FD.shape[0])
    return moe_experts_sorted(x_TD, gate_up_E2FD, down_EDF, scores_TK, offsets_E1, token_of_row_R, row_of_slot_TK,
                              main_grads)


def moe_experts_sorted(x_TD: torch.Tensor, gate_up_E2FD: torch.Tensor, down_EDF: torch.Tensor, scores_TK: torch.Tensor,
                       offsets_E1: torch.Tensor, token_of_row_R: torch.Tensor, row_of_slot_TK: torch.Tensor,
                       main_grads: MainGrads | None = None) -> torch.Tensor:
    """moe_experts with the rows sorted already, as sort_rows and routing.py's route give them."""
    return _call(x_TD, gate_up_E2FD, down_EDF, scores_TK, offsets_E1, token_of_row_R, row_of_slot_TK, None, main_grads)


def moe_experts_rounded(x_TD: torch.Tensor, gate_up_E2FD: torch.Tensor, down_EDF: torch.Tensor,
                        score_of_entry_C: torch.Tensor, rounded: Rounded, plan: Plan,
                        main_grads: MainGrads | None = None) -> torch.Tensor:
    """moe_experts over a rounded routing: token t's sum runs over its entries of `rounded`. Differentiable in x_TD,
    both weights and score_of_entry_C (C,) float32: rounded_scores(probs_TE, rounded, plan), or
    rounded.score_of_entry_C where the router does not learn."""
    if x_TD.shape[0] != plan.T:
        raise ValueError(f"x_TD has {x_TD.shape[0]} tokens, the plan was made for {plan.T}")
    return _call(x_TD, gate_up_E2FD, down_EDF, score_of_entry_C, rounded.offsets_E1, rounded.token_of_row_C,
                 rounded.row_of_entry_C, rounded.first_of_token_T1, main_grads)


def rounded_scores(probs_TE: torch.Tensor, rounded: Rounded, plan: Plan) -> torch.Tensor:
    """rounded.score_of_entry_C as a differentiable function of probs_TE (T, E); zeros past the rows in use.

    Sums are over (T, E) matrices, not segments: no atomics that add to a place twice, and no host sync.
    """
    entries_C = torch.arange(plan.capacity, device=probs_TE.device)
    used_C = entries_C < rounded.offsets_E1[-1]
    row_C = torch.where(used_C, rounded.row_of_entry_C, entries_C.int()).long()
    expert_C = torch.searchsorted(rounded.offsets_E1[1:], row_C.int(), right=True).clamp_max(plan.E - 1)
    place_C = rounded.token_of_row_C[row_C].long() * plan.E + expert_C
    # Unused entries write into one place more, past the end.
    place_C = torch.where(used_C, place_C, plan.T * plan.E)
    kept = torch.zeros(plan.T * plan.E + 1, dtype=probs_TE.dtype, device=probs_TE.device).scatter(0, place_C, 1.0)
    scores_TE = probs_TE * kept[:-1].view(plan.T, plan.E)
    if plan.renormalize:
        scores_TE = scores_TE / scores_TE.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return torch.nn.functional.pad(scores_TE.flatten(), (0, 1)).gather(0, place_C)
