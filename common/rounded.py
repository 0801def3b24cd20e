"""What a forward with rounded routing is held to: the rule of rounding, and the oracle of what it kept.

A rounded layer computes another function than exact top-k, so it tells which experts each token kept. That is
believed only as far as it is checked here, in float64, from the definition: slow and obvious.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from common.config import MoEConfig
from common.measure import TIE_MARGIN
from common.model import Oracle, Weights, route_float64


@dataclass(frozen=True)
class Rounding:
    """What a forward tells of the routing that it used.

    scores_TE (T, E) float32: an expert's weight in a token's sum, 0 where it does not get the token. mode: nearest,
    up, down or balance. report: what changed, by name. kernels: how the names of rounding's own kernels begin.
    """

    scores_TE: torch.Tensor
    tile: int
    mode: str
    report: dict[str, float]
    kernels: tuple[str, ...]


def rounded_oracle(cfg: MoEConfig, weights: Weights, x_TD: torch.Tensor, rounding: Rounding) -> Oracle:
    """The layer in float64 where each token goes to the experts that it kept. Scores are the router's own, divided by
    their sum over the kept where the router's definition says so; a token that kept none is zeros."""
    kept_TE = rounding.scores_TE != 0
    scores_TE = (x_TD.double() @ weights.router_ED.double().T).softmax(dim=1) * kept_TE
    if cfg.renormalize or cfg.scoring == "topk_softmax":
        scores_TE = scores_TE / scores_TE.sum(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    out_TD = torch.zeros(x_TD.shape, dtype=torch.float64, device=x_TD.device)
    for e in range(cfg.E):
        token = kept_TE[:, e].nonzero()[:, 0]
        gate, up = (x_TD[token].double() @ weights.gate_up_E2FD[e].double().T).chunk(2, dim=1)
        y = (torch.nn.functional.silu(gate) * up) @ weights.down_EDF[e].double().T
        out_TD.index_add_(0, token, y * scores_TE[token, e, None])
    no_ties_T = torch.full((x_TD.shape[0],), torch.inf, dtype=torch.float64, device=x_TD.device)
    return Oracle(out_TD, kept_TE.sum(dim=0), no_ties_T)


def broken_rule(cfg: MoEConfig, weights: Weights, x_TD: torch.Tensor, rounding: Rounding) -> str:
    """What of the rule does not hold, in words; empty if all does.

    Every expert's rows are whole tiles, as many as the mode gives for the rows it was chosen for; it keeps its best
    tokens, chosen before not chosen, then by score. Where float64 sees a tie within TIE_MARGIN, either side may stand.
    """
    tile, mode, T = rounding.tile, rounding.mode, x_TD.shape[0]
    _, expert_ids_TK, margin_T = route_float64(cfg, weights.router_ED, x_TD)
    logits_TE = x_TD.double() @ weights.router_ED.double().T
    chosen_TE = torch.zeros_like(logits_TE, dtype=torch.bool).scatter_(1, expert_ids_TK, True)
    kept_TE = rounding.scores_TE != 0

    # Whether token t is one of e's rows is open where its last chosen and first not chosen expert tie, for those two.
    last_T1 = torch.where(chosen_TE, logits_TE, torch.inf).amin(dim=1, keepdim=True)
    open_TE = (margin_T <= TIE_MARGIN)[:, None] & ((logits_TE - last_T1).abs() <= 2 * TIE_MARGIN)
    slack_E, before_E, rows_E = open_TE.sum(dim=0), chosen_TE.sum(dim=0), kept_TE.sum(dim=0)

    for e, (rows, before, slack) in enumerate(zip(rows_E.tolist(), before_E.tolist(), slack_E.tolist(), strict=True)):
        if rows % tile:
            return f"expert {e} has {rows} rows, no multiple of {tile}"
        allowed = {target for count in range(before - slack, before + slack + 1)
                   for target in _targets(count, T, tile, mode)}
        if rows not in allowed:
            return f"expert {e} has {rows} rows: {mode} gives it {sorted(allowed)} for the {before} it was chosen for"
    if mode == "balance":
        fault = _unbalanced(rows_E, before_E, T, tile, int(slack_E.max()))
        if fault:
            return fault

    sure_TE = ~open_TE
    scores_TE = logits_TE.log_softmax(dim=1)  # logarithms, so that the margin is relative
    dropped_TE, added_TE = sure_TE & chosen_TE & ~kept_TE, sure_TE & kept_TE & ~chosen_TE
    spared_TE, left_TE = sure_TE & chosen_TE & kept_TE, sure_TE & ~chosen_TE & ~kept_TE

    def best(mask_TE: torch.Tensor) -> torch.Tensor:
        return torch.where(mask_TE, scores_TE, -torch.inf).amax(dim=0)

    def worst(mask_TE: torch.Tensor) -> torch.Tensor:
        return torch.where(mask_TE, scores_TE, torch.inf).amin(dim=0)

    for what, wrong_E in (("drops chosen tokens and adds others", dropped_TE.any(dim=0) & added_TE.any(dim=0)),
                          ("drops a token and keeps a weaker one", best(dropped_TE) > worst(spared_TE) + TIE_MARGIN),
                          ("adds a token and leaves a better one", best(left_TE) > worst(added_TE) + TIE_MARGIN)):
        if wrong_E.any():
            return f"expert {int(wrong_E.nonzero()[0])} {what}"
    return ""


def _targets(count: int, T: int, tile: int, mode: str) -> set[int]:
    """What rows the mode may give an expert chosen for `count`; balance decides between two for all together."""
    low = max(count, 0) // tile * tile
    high = low + tile if count > low and low + tile <= T else low
    nearest = high if high - count <= count - low else low
    return {"down": {low}, "up": {high}, "nearest": {nearest}, "balance": {low, high}}[mode]


def _unbalanced(rows_E: torch.Tensor, before_E: torch.Tensor, T: int, tile: int, slack: int) -> str:
    """What of `balance` does not hold for all experts together: the total as near as tiles allow, by the largest
    remainders first."""
    floors_E = before_E // tile * tile
    rose_E = rows_E > before_E
    can_rise_E = (before_E > floors_E) & (floors_E + tile <= T)
    excess = int(rows_E.sum() - before_E.sum())
    if 2 * abs(excess) > tile and (excess > 0 or (can_rise_E & ~rose_E).any()):
        return f"balance gives {int(rows_E.sum())} rows for {int(before_E.sum())}, over half a tile of {tile} away"
    stayed_E = can_rise_E & ~rose_E
    remainders_E = before_E - floors_E
    if rose_E.any() and stayed_E.any() and remainders_E[stayed_E].max() > remainders_E[rose_E].min() + 2 * slack:
        return "balance rounds an expert up before another with a larger remainder"
    return ""
