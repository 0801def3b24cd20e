"""The layer that these kernels make, in plain Triton from end to end: exact top-k, or rounded to whole tiles.

What   build_exact     route -> up + SwiGLU -> down -> combine, four to six launches and no host sync
       build_rounded   softmax, top-k -> round_tokens -> up + SwiGLU -> down -> combine_rounded
Why    few rows an expert and many want other kernels: with few, the weights' bytes count and the weights are the tall
       side of the product (decode.py); with many, the arithmetic counts and the rows are (plain_gemm.py).
How    the host knows T, so it knows the mean rows an expert, T*K/E, and chooses by that alone: never by the counts,
       which stay on the device.
Costs  plain_gemm.py wants gate and up rows interleaved, decode.py as they are: a layer that meets both kinds of batch
       holds gate_up twice, the second copy made when the first large batch comes.

The warp-specialised kernels of grouped_gemm.py and tall_gemm.py are not used here: they want experts padded to 64 rows,
which route does not give.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from common.config import MoEConfig
from common.model import Weights
from labs.kernels import decode
from labs.kernels.combine import combine
from labs.kernels.grouped_gemm import interleave_gate_up, plan_tiles
from labs.kernels.plain_gemm import PlainTile, plain_down, plain_up, tile_for
from labs.kernels.rounding import combine_rounded, plan_rounding, round_tokens
from labs.kernels.routing import new_arrivals, route, scores_sum_to_one, sm_count

# T tokens, D model width, F expert width, E experts, K top-k, R = T*K routed rows, C rows after rounding at most.

MOST_ROWS_DECODE = 128  # mean rows an expert up to which the weights' bytes take longer than the arithmetic
INTERPRETED = PlainTile(64, 64, 32, warps=4, stages=2, tma=False)


def plain_tile(device: torch.device) -> PlainTile:
    """The grouped GEMM's tile on this device. Raises ValueError for a GPU that has none."""
    if device.type != "cuda":
        return INTERPRETED
    major, minor = torch.cuda.get_device_capability(device)
    return tile_for(10 * major + minor)


class ManyRows:
    """The experts for many rows each: sorted rows in, sorted rows out, through plain_gemm.py."""

    def __init__(self, cfg: MoEConfig, weights: Weights):
        self.cfg, self.weights = cfg, weights
        self.tile = plain_tile(weights.device)
        self.interleaved: torch.Tensor | None = None

    def __call__(self, x_TD: torch.Tensor, token_of_row_R: torch.Tensor, offsets_E1: torch.Tensor) -> torch.Tensor:
        """x_TD (T, D), gathered by token_of_row_R (R,) int32 and grouped by offsets_E1 (E + 1,) -> y_RD (R, D).
        Rows past the last offset are left as they are."""
        if self.interleaved is None:
            self.interleaved = interleave_gate_up(self.weights.gate_up_E2FD)
        R, programs = token_of_row_R.numel(), sm_count(x_TD.device)
        plan = plan_tiles(offsets_E1, R, self.tile.block_M)
        hidden_RF, y_RD = x_TD.new_empty(R, self.cfg.F), x_TD.new_empty(R, self.cfg.D)
        plain_up(x_TD, token_of_row_R, offsets_E1, self.interleaved, plan, hidden_RF, programs, self.tile)
        plain_down(hidden_RF, offsets_E1, self.weights.down_EDF, plan, y_RD, programs, self.tile)
        return y_RD


def build_exact(cfg: MoEConfig, weights: Weights) -> Callable[[torch.Tensor], torch.Tensor]:
    """A forward x_TD -> out_TD, (T, D) in the weights' dtype, T >= 0, with the router's exact top-k.

    D and F are multiples of 8, E is at most 512. Calls of one forward must not overlap: they share the router's
    arrival counters. Raises ValueError on misfit weights.
    """
    weights.check(cfg)
    arrivals_A = new_arrivals(weights.device)
    many_rows = ManyRows(cfg, weights)

    def forward(x_TD: torch.Tensor) -> torch.Tensor:
        R = x_TD.shape[0] * cfg.K
        few = R <= MOST_ROWS_DECODE * cfg.E
        tiles = decode.tiles_for(R, cfg.D, cfg.F, cfg.E, sm_count(x_TD.device)) if few else None
        row_tile = tiles.row_tile if few else many_rows.tile.block_M
        routed = route(x_TD, weights.router_ED, cfg.K, arrivals_A, row_tile, scores_sum_to_one(cfg))
        if few:
            hidden_RF = decode.up_swiglu(x_TD, weights.gate_up_E2FD, routed.token_of_row_R, routed.work_W4, tiles)
            y_RD = decode.down(hidden_RF, weights.down_EDF, routed.work_W4, tiles)
        else:
            y_RD = many_rows(x_TD, routed.token_of_row_R, routed.offsets_E1)
        return combine(y_RD, routed.row_of_slot_TK, routed.scores_TK)

    return forward


def build_rounded(
    cfg: MoEConfig, weights: Weights, tile: int = 128, mode: str = "nearest"
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A forward x_TD -> out_TD whose experts get whole tiles of rows: for training and offline use, since a token's
    experts then depend on the whole batch. See rounding.py for modes, and for the batches at which rounding is off
    (with a warning). Raises ValueError on misfit weights and unknown modes."""
    weights.check(cfg)
    many_rows = ManyRows(cfg, weights)

    def forward(x_TD: torch.Tensor) -> torch.Tensor:
        if x_TD.shape[0] == 0:
            return torch.empty_like(x_TD)
        plan = plan_rounding(cfg, x_TD.shape[0], tile, mode)
        probs_TE = (x_TD.float() @ weights.router_ED.float().T).softmax(dim=1)
        rounded = round_tokens(probs_TE, probs_TE.topk(cfg.K, dim=1).indices, plan)
        y_CD = many_rows(x_TD, rounded.token_of_row_C, rounded.offsets_E1)
        return combine_rounded(y_CD, rounded, plan)

    return forward
