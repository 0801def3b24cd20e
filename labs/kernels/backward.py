"""Experts that train: a SwiGLU mixture's forward and backward as one differentiable function.

    moe_experts          the router's choice: scores_TK, expert_ids_TK
    moe_experts_sorted   the same with the rows sorted before, by routing.py's route
    moe_experts_rounded  a rounded routing: the experts' rows, and each token's entries, of rounding.py

Kept for the backward: x, the pre-activations H (R, 2F), scores, and two int32 index arrays. Not the gathered x, not the
activation, not the experts' output (SonicMoE, arXiv 2512.14080). Bytes, beside the weights: activation_bytes().

    train_up    up -> H, A                           backward: rows_kernel: dX~ = dH gate_up, combine -> dX; dW1
    train_down  rows_kernel: y = A down.T, combine   backward: hidden_grad -> dH, A', dS; dW2

On one Hopper GPU, from as many rows on as in level 8, train_down's combine runs beside its GEMM (down_combine.py). Both
are PyTorch operators with fake implementations where something traces (operators.py), so torch.compile takes them as
they are; they make no host sync and can be captured, and torch.utils.checkpoint recomputes them. Under autocast, x and
the weights are cast to its dtype. Two runs agree bit for bit.

    index array        shape     from -> to
    offsets_E1         (E + 1,)  expert -> its first row; the last entry: rows in use, <= R
    token_of_row_R     (R,)      row -> token; any token past the rows in use
    row_of_slot_TK     (T, K)    token, choice -> row
    first_of_token_T1  (T + 1,)  token -> its first entry: in a rounded routing, whose tokens differ in their entries
    row_of_entry_C     (C,)      entry -> row; undefined past the rows in use
"""

from __future__ import annotations

import torch

from labs.kernels import down_combine
from labs.kernels.backward_gemm import has_warp_roles, hidden_grad, multiply_rows, up
from labs.kernels.backward_loop import PlainTile, tile_for
from labs.kernels.backward_sort import sort_rows
from labs.kernels.backward_weights import spread_scores, sum_score_grads, weight_grad
from labs.kernels.combine import combine
from labs.kernels.launch import require_dtype, require_width, sm_count
from labs.kernels.operators import differentiable, operator
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
           first_of_token_T1: torch.Tensor | None, main_grads: MainGrads | None) -> None:
    """Raise ValueError, naming the argument, where shapes, dtypes or devices do not fit. Strides are the kernels' to
    check: a tensor that the compiler traces need not have those that it will run with."""
    (T, D), device, dtype = x_TD.shape, x_TD.device, x_TD.dtype
    E, F = down_EDF.shape[0], down_EDF.shape[-1]
    if device.type != "cuda" or dtype != torch.float32:  # float32 runs on a GPU too, in small tiles and slowly
        require_dtype("x_TD", x_TD)
    require_width("D", D)
    require_width("F", F)
    R = token_of_row_R.numel()
    if row_of_entry.numel() != R or R >= 2**30:
        raise ValueError(f"row_of_entry has {row_of_entry.numel()} entries, token_of_row_R {R}: need as many, "
                         f"fewer than 2**30")
    expected = {"gate_up_E2FD": (gate_up_E2FD, (E, 2 * F, D), dtype), "down_EDF": (down_EDF, (E, D, F), dtype),
                "scores": (scores, tuple(row_of_entry.shape), torch.float32),
                "row_of_entry": (row_of_entry, tuple(row_of_entry.shape), torch.int32),
                "token_of_row_R": (token_of_row_R, (R,), torch.int32),
                "offsets_E1": (offsets_E1, (E + 1,), torch.int32)}
    if first_of_token_T1 is None and (row_of_entry.dim() != 2 or row_of_entry.shape[0] != T):
        raise ValueError(f"row_of_slot_TK has shape {tuple(row_of_entry.shape)}, but needs (T, K) of T={T}")
    if first_of_token_T1 is not None:
        expected["first_of_token_T1"] = first_of_token_T1, (T + 1,), torch.int32
    if main_grads is not None:
        expected["main_grads[0]"] = main_grads[0], (E, 2 * F, D), torch.float32
        expected["main_grads[1]"] = main_grads[1], (E, D, F), torch.float32
    for name, (tensor, shape, wanted) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, but needs {shape}")
        if tensor.dtype != wanted or tensor.device != device:
            raise ValueError(f"{name} is {tensor.dtype} on {tensor.device}, but needs {wanted} on {device}")


def _plan(like: torch.Tensor, offsets_E1: torch.Tensor, R: int) -> tuple[PlainTile, TilePlan]:
    """The tile of this device and dtype, and the row tiles of this routing."""
    tile = tile_for(like.device, like.dtype)
    return tile, plan_tiles(offsets_E1, R, tile.block_M)


def _shaped(like: torch.Tensor, needed: bool) -> torch.Tensor:
    """A fake gradient."""
    return like.new_empty(like.shape if needed else 0)


@operator("moe_lab::train_up_backward", mutates_args=("main_grad",))
def train_up_backward(
    dh_R2F: torch.Tensor, x_TD: torch.Tensor, gate_up_E2FD: torch.Tensor, offsets_E1: torch.Tensor,
    token_of_row_R: torch.Tensor, row_of_entry: torch.Tensor, first_of_token_T1: torch.Tensor | None,
    main_grad: torch.Tensor | None, need_x: bool, need_weights: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of x_TD and gate_up_E2FD; empty where not needed, or added to the main grad."""
    tile, plan = _plan(x_TD, offsets_E1, token_of_row_R.numel())
    d_x, d_weights = x_TD.new_empty(0), x_TD.new_empty(0)
    if need_x:
        d_rows_RD = multiply_rows(dh_R2F, offsets_E1, gate_up_E2FD, plan, tile, transposed=False)
        ones = torch.ones(row_of_entry.shape, dtype=torch.float32, device=x_TD.device)  # dH has the scores in it
        d_x = _sum_rows(d_rows_RD, ones, offsets_E1, row_of_entry, first_of_token_T1)
        del d_rows_RD  # its memory serves the weights' gradient
    if need_weights:
        out = torch.empty_like(gate_up_E2FD) if main_grad is None else main_grad
        weight_grad(x_TD, token_of_row_R, dh_R2F, offsets_E1, out, tile, transposed=True,
                    accumulate=main_grad is not None, spare_rows=first_of_token_T1 is not None)
        d_weights = out if main_grad is None else d_weights
    return d_x, d_weights


@train_up_backward.operator.register_fake
def _(dh_R2F, x_TD, gate_up_E2FD, offsets_E1, token_of_row_R, row_of_entry, first_of_token_T1, main_grad, need_x,
      need_weights):
    return (_shaped(x_TD, need_x), _shaped(gate_up_E2FD, need_weights and main_grad is None))


@operator("moe_lab::train_down_backward", mutates_args=("main_grad",))
def train_down_backward(
    grad_out_TD: torch.Tensor, h_R2F: torch.Tensor, down_EDF: torch.Tensor, scores: torch.Tensor,
    offsets_E1: torch.Tensor, token_of_row_R: torch.Tensor, row_of_entry: torch.Tensor,
    first_of_token_T1: torch.Tensor | None, main_grad: torch.Tensor | None, need_weights: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of h_R2F, down_EDF (empty where not needed, or added to the main grad) and scores."""
    tile, plan = _plan(h_R2F, offsets_E1, token_of_row_R.numel())
    score_of_row_R = spread_scores(scores, row_of_entry, offsets_E1)
    dh_R2F, scaled_RF, d_scores_XR = hidden_grad(grad_out_TD, token_of_row_R, score_of_row_R, offsets_E1, down_EDF,
                                                 h_R2F, plan, tile)
    d_scores, d_weights = sum_score_grads(d_scores_XR, row_of_entry, offsets_E1), h_R2F.new_empty(0)
    if need_weights:
        out = torch.empty_like(down_EDF) if main_grad is None else main_grad
        weight_grad(grad_out_TD, token_of_row_R, scaled_RF, offsets_E1, out, tile, transposed=False,
                    accumulate=main_grad is not None, spare_rows=first_of_token_T1 is not None)
        d_weights = out if main_grad is None else d_weights
    return dh_R2F, d_weights, d_scores


@train_down_backward.operator.register_fake
def _(grad_out_TD, h_R2F, down_EDF, scores, offsets_E1, token_of_row_R, row_of_entry, first_of_token_T1, main_grad,
      need_weights):
    return (_shaped(h_R2F, True), _shaped(down_EDF, need_weights and main_grad is None), _shaped(scores, True))


# Two operators with gradients, so that autograd drops H as soon as dH is there, before dW1 needs memory. Main grads are
# not saved: another layer or micro-batch may add to them before this backward runs.
def _setup_up(ctx, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.main_grad = inputs
    ctx.save_for_backward(*tensors)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward_up(ctx, dh_R2F: torch.Tensor | None, _: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    if dh_R2F is None:
        return (None,) * 7
    need_x, need_weights = ctx.needs_input_grad[:2]
    d_x, d_weights = train_up_backward(dh_R2F.contiguous(), *ctx.saved_tensors, ctx.main_grad, need_x, need_weights)
    return (d_x if need_x else None, d_weights if need_weights and ctx.main_grad is None else None, *(None,) * 5)


@differentiable("moe_lab::train_up", _setup_up, _backward_up)
def train_up(
    x_TD: torch.Tensor, gate_up_E2FD: torch.Tensor, offsets_E1: torch.Tensor, token_of_row_R: torch.Tensor,
    row_of_entry: torch.Tensor, first_of_token_T1: torch.Tensor | None, main_grad: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The pre-activations h_R2F, and hidden_RF, which has no gradient of its own: train_down makes h's of both."""
    tile, plan = _plan(x_TD, offsets_E1, token_of_row_R.numel())
    return up(x_TD, token_of_row_R, offsets_E1, gate_up_E2FD, plan, tile)


@train_up.operator.register_fake
def _(x_TD, gate_up_E2FD, offsets_E1, token_of_row_R, row_of_entry, first_of_token_T1, main_grad):
    R, two_F = token_of_row_R.shape[0], gate_up_E2FD.shape[1]
    return x_TD.new_empty(R, two_F), x_TD.new_empty(R, two_F // 2)


def _setup_down(ctx, inputs: tuple, output: torch.Tensor) -> None:
    h_R2F, _, *tensors, ctx.main_grad = inputs
    ctx.save_for_backward(h_R2F, *tensors)


def _backward_down(ctx, grad_out_TD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    need_h, _, need_weights, need_scores = ctx.needs_input_grad[:4]
    dh_R2F, d_weights, d_scores = train_down_backward(grad_out_TD.contiguous(), *ctx.saved_tensors, ctx.main_grad,
                                                      need_weights)
    return (dh_R2F if need_h else None, None, d_weights if need_weights and ctx.main_grad is None else None,
            d_scores if need_scores else None, *(None,) * 5)


@differentiable("moe_lab::train_down", _setup_down, _backward_down)
def train_down(
    h_R2F: torch.Tensor, hidden_RF: torch.Tensor, down_EDF: torch.Tensor, scores: torch.Tensor,
    offsets_E1: torch.Tensor, token_of_row_R: torch.Tensor, row_of_entry: torch.Tensor,
    first_of_token_T1: torch.Tensor | None, main_grad: torch.Tensor | None,
) -> torch.Tensor:
    """out_TD, the tokens' weighted sums of hidden_RF through down_EDF. h_R2F is for the backward, which needs no
    hidden_RF."""
    R, (E, D, _) = token_of_row_R.numel(), down_EDF.shape
    tile, plan = _plan(hidden_RF, offsets_E1, R)
    if (first_of_token_T1 is None and has_warp_roles(tile, down_EDF, R)
            and down_combine.pays(R, D, E, row_of_entry.shape[1])):
        y_RD, out_TD = hidden_RF.new_empty(R, D), hidden_RF.new_empty(row_of_entry.shape[0], D)
        return down_combine.down_combine(hidden_RF, down_EDF, plan, row_of_entry, scores, y_RD, out_TD,
                                         sm_count(hidden_RF.device))
    y_RD = multiply_rows(hidden_RF, offsets_E1, down_EDF, plan, tile, transposed=True)
    return _sum_rows(y_RD, scores, offsets_E1, row_of_entry, first_of_token_T1)


@train_down.operator.register_fake
def _(h_R2F, hidden_RF, down_EDF, scores, offsets_E1, token_of_row_R, row_of_entry, first_of_token_T1, main_grad):
    T = row_of_entry.shape[0] if first_of_token_T1 is None else first_of_token_T1.shape[0] - 1
    return hidden_RF.new_empty(T, down_EDF.shape[1])


# ---- what a layer calls -------------------------------------------------------------------------------------------
def _call(x_TD: torch.Tensor, gate_up_E2FD: torch.Tensor, down_EDF: torch.Tensor, scores: torch.Tensor,
          offsets_E1: torch.Tensor, token_of_row_R: torch.Tensor, row_of_entry: torch.Tensor,
          first_of_token_T1: torch.Tensor | None, main_grads: MainGrads | None) -> torch.Tensor:
    """Both operators, with autocast applied and the arguments checked."""
    device = x_TD.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x_TD, gate_up_E2FD, down_EDF = (one.to(dtype) for one in (x_TD, gate_up_E2FD, down_EDF))
    _check(x_TD, gate_up_E2FD, down_EDF, scores, offsets_E1, token_of_row_R, row_of_entry, first_of_token_T1,
           main_grads)
    index = offsets_E1, token_of_row_R, row_of_entry, first_of_token_T1
    gate_up_main_grad, down_main_grad = main_grads or (None, None)
    h_R2F, hidden_RF = train_up(x_TD.contiguous(), gate_up_E2FD, *index, gate_up_main_grad)
    return train_down(h_R2F, hidden_RF, down_EDF, scores.contiguous(), *index, down_main_grad)


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
