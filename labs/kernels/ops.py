"""The layer's steps as registered PyTorch operators: torch.compile(fullgraph=True) takes them as they are.

    moe_lab::route    (T, D) -> scores and the index arrays that sort the rows      routing.py
    moe_lab::spread   (T, D) -> (R, D), rows gathered before the experts            tiles.py
    moe_lab::experts  (T, D) or (R, D) -> (R, D)                                    the kernels that `choice` names
    moe_lab::experts_combined  the same and combine.py, -> (T, D)                   down_combine.py where it can

Operators take no tuples: a Choice travels as its fields, `kernels`, `group` and `tile` ([] for none).

Where nothing traces, each is the function itself (operators.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from labs.kernels import combine as combining
from labs.kernels import decode, down_combine, grouped_gemm, plain_gemm, routing, tall_gemm, tiles, up_ahead
from labs.kernels.choice import Choice
from labs.kernels.launch import sm_count
from labs.kernels.operators import operator
from labs.kernels.plain_gemm import PlainTile

IN_TILES = ("ahead", "gather", "spread")  # of 128 rows and 256 columns

# T tokens, D model width, F expert width, E experts, K top-k, R = T*K routed rows.


def fields(choice: Choice) -> tuple[str, int, list[int]]:
    """A choice as the operators take it."""
    return choice.kernels, choice.group, [int(field) for field in choice.tile] if choice.tile else []


def row_tile(x_TD: Tensor, router_ED: Tensor, K: int, F: int, kernels: str) -> int:
    """Rows a tile of the work list that route writes, 0 for none: only decode.py reads it."""
    if kernels != "few_rows":
        return 0
    (T, D), E = x_TD.shape, router_ED.shape[0]
    return decode.tiles_for(T * K, D, F, E, sm_count(x_TD.device)).row_tile


@operator("moe_lab::route", mutates_args={"arrivals_A"})
def route(
    x_TD: Tensor, router_ED: Tensor, arrivals_A: Tensor, K: int, F: int, renormalize: bool, kernels: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """routing.route for experts of width F: expert_ids_TK, scores_TK, offsets_E1, token_of_row_R, row_of_slot_TK,
    work_W4."""
    return tuple(routing.route(x_TD, router_ED, K, arrivals_A, row_tile(x_TD, router_ED, K, F, kernels), renormalize))


@route.operator.register_fake
def _(x_TD, router_ED, arrivals_A, K, F, renormalize, kernels):
    T, E = x_TD.shape[0], router_ED.shape[0]

    def int32(*shape: int) -> Tensor:
        return x_TD.new_empty(shape, dtype=torch.int32)

    return (int32(T, K), x_TD.new_empty(T, K, dtype=torch.float32), int32(E + 1), int32(T * K), int32(T, K),
            int32(routing.work_entries(T * K, E, row_tile(x_TD, router_ED, K, F, kernels)), 4))


@operator("moe_lab::spread")
def spread(x_TD: Tensor, row_of_slot_TK: Tensor) -> Tensor:
    """rows_RD: each token's row at each of its slots' rows."""
    rows_RD = x_TD.new_empty(row_of_slot_TK.numel(), x_TD.shape[1])
    tiles.spread_rows(x_TD, row_of_slot_TK, rows_RD)
    return rows_RD


@spread.operator.register_fake
def _(x_TD, row_of_slot_TK):
    return x_TD.new_empty(row_of_slot_TK.numel(), x_TD.shape[1])


def up_in_tiles(
    x: Tensor, token_of_row_R: Tensor, offsets_E1: Tensor, gate_up_E2FD: Tensor, hidden_RF: Tensor, kernels: str,
    group: int,
) -> tiles.TilePlan:
    """Fill hidden_RF by one of the up kernels in tiles of 128 rows; the tiles that down is to take too."""
    plan, programs = tiles.plan_tiles(offsets_E1, hidden_RF.shape[0], 128, group), sm_count(x.device)
    if kernels == "gather":
        grouped_gemm.up_gather(x, token_of_row_R, gate_up_E2FD, plan, hidden_RF, programs)
    elif kernels == "ahead":
        up_ahead.up_ahead(x, token_of_row_R, gate_up_E2FD, plan, hidden_RF, programs)
    else:
        grouped_gemm.up_rows(x, gate_up_E2FD, plan, hidden_RF, programs)
    return plan


@operator("moe_lab::experts")
def experts(
    x: Tensor, token_of_row_R: Tensor, offsets_E1: Tensor, work_W4: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor,
    kernels: str, group: int, tile: list[int],
) -> Tensor:
    """Sorted rows through their experts: y_RD (R, D).

    x: (T, D), or (R, D) sorted rows for the kernels `spread` and `tall`. gate_up_E2FD interleaved (tiles.py). Only
    `few_rows` reads work_W4. Rows past the last offset keep what the buffer held.
    """
    (E, D, F), R, programs = down_EDF.shape, token_of_row_R.numel(), sm_count(x.device)
    if kernels == "few_rows":
        chosen = decode.tiles_for(R, D, F, E, programs)
        hidden_RF = decode.up_swiglu(x, gate_up_E2FD, token_of_row_R, work_W4, chosen)
        return decode.down(hidden_RF, down_EDF, work_W4, chosen)
    hidden_RF, y_RD = x.new_empty(R, F), x.new_empty(R, D)
    if kernels == "pipelined":
        made = PlainTile(*tile[:5], tma=bool(tile[5]))
        plan = tiles.plan_tiles(offsets_E1, R, made.block_M, group)
        plain_gemm.plain_up(x, token_of_row_R, offsets_E1, gate_up_E2FD, plan, hidden_RF, programs, made)
        plain_gemm.plain_down(hidden_RF, offsets_E1, down_EDF, plan, y_RD, programs, made)
    elif kernels == "tall":
        plan = tiles.plan_tiles(offsets_E1, R, tall_gemm.TILE_ROWS, group)
        tall_gemm.tall_up_rows(x, gate_up_E2FD, plan, hidden_RF, programs)
        tall_gemm.tall_down(hidden_RF, down_EDF, plan, y_RD, programs)
    elif kernels in IN_TILES:
        plan = up_in_tiles(x, token_of_row_R, offsets_E1, gate_up_E2FD, hidden_RF, kernels, group)
        grouped_gemm.down(hidden_RF, down_EDF, plan, y_RD, programs, early=kernels == "gather")
    else:
        raise ValueError(f"kernels={kernels!r}: choose few_rows, gather, ahead, spread, tall or pipelined")
    return y_RD


@experts.operator.register_fake
def _(x, token_of_row_R, offsets_E1, work_W4, gate_up_E2FD, down_EDF, kernels, group, tile):
    return x.new_empty(token_of_row_R.shape[0], down_EDF.shape[1])


@operator("moe_lab::experts_combined")
def experts_combined(
    x: Tensor, token_of_row_R: Tensor, offsets_E1: Tensor, work_W4: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor,
    row_of_slot_TK: Tensor, scores_TK: Tensor, kernels: str, group: int, tile: list[int],
) -> Tensor:
    """combine(experts(...), ...): out_TD. With the kernels IN_TILES and many rows most of the sum runs beside the down
    projection."""
    E, D, _ = down_EDF.shape
    if kernels not in IN_TILES or not down_combine.pays(token_of_row_R.numel(), D, E, row_of_slot_TK.shape[1]):
        y_RD = experts(x, token_of_row_R, offsets_E1, work_W4, gate_up_E2FD, down_EDF, kernels, group, tile)
        return combining.combine(y_RD, row_of_slot_TK, scores_TK)
    (T, _), R = row_of_slot_TK.shape, token_of_row_R.numel()
    hidden_RF, y_RD, out_TD = x.new_empty(R, down_EDF.shape[2]), x.new_empty(R, D), x.new_empty(T, D)
    plan = up_in_tiles(x, token_of_row_R, offsets_E1, gate_up_E2FD, hidden_RF, kernels, group)
    return down_combine.down_combine(hidden_RF, down_EDF, plan, row_of_slot_TK, scores_TK, y_RD, out_TD,
                                     sm_count(x.device), early=kernels == "gather")


@experts_combined.operator.register_fake
def _(x, token_of_row_R, offsets_E1, work_W4, gate_up_E2FD, down_EDF, row_of_slot_TK, scores_TK, kernels, group, tile):
    return x.new_empty(row_of_slot_TK.shape[0], down_EDF.shape[1])
