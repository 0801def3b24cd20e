"""Checks of exercise 05. Run: python labs/exercises/05_token_rounding/test_exercise.py [file | --solution]"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from labs.exercises.harness import Exercise, Submission, Wrong, bound, compare, compare_exact, main

import torch

EXERCISE = Exercise(Path(__file__).resolve().parent)

T, E, K, TILE = 60, 6, 2, 8
ALLOWED = bound(torch.float32, E)


def counts_of(rows: list[int], tile: int, mode: str, tokens: int) -> list[int]:
    """The rounded counts by their definition."""
    out = []
    for count in rows:
        below = count - count % tile
        up = {"down": False, "up": count % tile > 0, "nearest": 2 * (count % tile) >= tile}[mode]
        out.append(below + tile if up and count % tile and below + tile <= tokens else below)
    return out


def check_counts(sub: Submission, rows: list[int], tile: int, mode: str, tokens: int) -> None:
    found_E = sub.rounded_counts(torch.tensor(rows), tile, mode, tokens)
    floor = [count // tile * tile for count in rows]
    other = {
        f"this is mode \"{name}\".": counts_of(rows, tile, name, tokens) for name in ("down", "up", "nearest")
    }
    compare_exact(f"for rows {rows}, tile {tile}, mode {mode!r}, T={tokens}: counts", found_E,
                  torch.tensor(counts_of(rows, tile, mode, tokens)), [
        ("more rows than tokens: an expert can take each of the T tokens once. Where the next multiple is more "
         "than T, take the one below.", torch.tensor(counts_of(rows, tile, mode, 10**9))),
        ("more rows than tokens, and T itself is no multiple of the tile: take the multiple below.",
         torch.tensor([min(count, tokens) for count in counts_of(rows, tile, mode, 10**9)])),
        ("exact multiples are rounded up a tile: (count // tile + 1) * tile moves 16 to 24. Only a rest goes up.",
         torch.tensor([below + tile if below + tile <= tokens else below for below in floor])),
        ("exact multiples are rounded up a tile: only a rest goes up.", torch.tensor([b + tile for b in floor])),
        ("half a tile goes up: round() in Python and torch takes halves to the even neighbour.",
         (torch.tensor(rows) / tile).round().long() * tile),
        ("half a tile goes up: rest >= tile / 2.",
         torch.tensor([b + tile * (2 * (count % tile) > tile) for b, count in zip(floor, rows, strict=True)])),
        *((text, torch.tensor(values)) for text, values in other.items()),
    ], "multiples of the tile, less than one tile away")


@EXERCISE.check("rounded_counts: down, up, nearest")
def _(sub: Submission) -> None:
    for mode in ("down", "up", "nearest"):
        check_counts(sub, [3, 9, 15, 21, 1, 31], TILE, mode, 1000)


@EXERCISE.check("rounded_counts: exact multiples and empty experts stay")
def _(sub: Submission) -> None:
    for mode in ("down", "up", "nearest"):
        check_counts(sub, [0, 8, 16, 23, 17, 64], TILE, mode, 1000)


@EXERCISE.check("rounded_counts: nearest, half a tile goes up")
def _(sub: Submission) -> None:
    check_counts(sub, [4, 12, 20, 28, 11, 13], TILE, "nearest", 1000)
    check_counts(sub, [3, 4, 7, 8, 1, 2], 5, "nearest", 1000)


@EXERCISE.check("rounded_counts: never more than T")
def _(sub: Submission) -> None:
    check_counts(sub, [59, 60, 50, 3, 57, 55], TILE, "up", T)
    check_counts(sub, [59, 60, 50, 3, 52, 55], TILE, "nearest", T)


def routed() -> tuple[torch.Tensor, torch.Tensor]:
    """probs_TE float32 and expert_ids_TK: rows 35, 22, 16 (exact), 27, 20 (half a tile over) and 0."""
    generator = torch.Generator().manual_seed(43)
    logits_TE = 1.5 * torch.randn(T, E, dtype=torch.float64, generator=generator)
    logits_TE += torch.tensor([0.8, 0.6, 0.3, 0.0, 0.0, -9.0])
    probs_TE = logits_TE.softmax(dim=1).float()
    return probs_TE, probs_TE.topk(K, dim=1).indices


def mask(picked_E: list[list[int]]) -> torch.Tensor:
    chosen_TE = torch.zeros(T, E, dtype=torch.bool)
    for expert, tokens in enumerate(picked_E):
        chosen_TE[tokens, expert] = True
    return chosen_TE


def pick(
    probs_TE: torch.Tensor, expert_ids_TK: torch.Tensor, mode: str, rank: str = "score"
) -> list[list[int]]:
    """For each expert the tokens it takes, by the definition; `rank` other than score is a usual mistake."""
    chose_E = [[t for t in range(T) if expert in expert_ids_TK[t]] for expert in range(E)]
    targets = counts_of([len(tokens) for tokens in chose_E], TILE, mode, T)
    picked_E = []
    for expert, (chose, target) in enumerate(zip(chose_E, targets, strict=True)):
        prob = {t: probs_TE[t, expert].item() for t in range(T)}
        rest = [t for t in range(T) if t not in chose]
        best, best_rest = sorted(chose, key=lambda t: -prob[t]), sorted(rest, key=lambda t: -prob[t])
        lacks = max(0, target - len(chose))
        picked_E.append({
            "score": best[:target] + best_rest[:lacks],
            "position": chose[:target] + rest[:lacks],
            "drop by position": chose[:target] + best_rest[:lacks],
            "add by position": best[:target] + rest[:lacks],
            "already chosen": best[:target] + sorted(range(T), key=lambda t: -prob[t])[:lacks],
            "no preference": sorted(range(T), key=lambda t: -prob[t])[:target],
            "weakest kept": best[::-1][:target] + best_rest[:lacks],
        }[rank])
    return picked_E


def check_routing(sub: Submission, mode: str) -> None:
    probs_TE, expert_ids_TK = routed()
    right_TE = mask(pick(probs_TE, expert_ids_TK, mode))
    found_TE = sub.round_routing(probs_TE.clone(), expert_ids_TK.clone(), TILE, mode)

    def wrong(rank: str) -> torch.Tensor:
        return mask(pick(probs_TE, expert_ids_TK, mode, rank))

    position = "dropping by position: this keeps the first tokens of the batch. Drop those with the lowest probability."
    compare_exact(f"chosen_TE for mode {mode!r}", found_TE, right_TE, [
        (position, wrong("position")),
        (position, wrong("drop by position")),
        ("added by position: of the tokens that had not chosen the expert, add those with the highest probability.",
         wrong("add by position")),
        ("adding already chosen tokens: they are in the tile already, so the count stays short of a multiple. Add from "
         "those that had not chosen the expert.", wrong("already chosen")),
        ("this drops the strongest.", wrong("weakest kept")),
        ("those that chose the expert come first, whatever their probability: a token may prefer others and still give "
         "this expert more than one that chose it.", wrong("no preference")),
        ("nothing is rounded: this is top-k.",
         torch.zeros(T, E, dtype=torch.bool).scatter(1, expert_ids_TK, True)),
    ], "each expert takes rounded_counts tokens")


@EXERCISE.check("round_routing: down drops the weakest")
def _(sub: Submission) -> None:
    check_routing(sub, "down")


@EXERCISE.check("round_routing: up adds the best not chosen")
def _(sub: Submission) -> None:
    check_routing(sub, "up")


@EXERCISE.check("round_routing: nearest")
def _(sub: Submission) -> None:
    check_routing(sub, "nearest")


@EXERCISE.check("round_routing: equal probabilities go to the lower token")
def _(sub: Submission) -> None:
    probs_TE = torch.full((T, E), 1 / E)
    expert_ids_TK = torch.arange(T * K).view(T, K) % (E - 2)  # 30 rows each
    for mode in ("down", "up"):
        compare_exact(f"chosen_TE for mode {mode!r}",
                      sub.round_routing(probs_TE.clone(), expert_ids_TK.clone(), TILE, mode),
                      mask(pick(probs_TE, expert_ids_TK, mode)), [], "sort with stable=True")


@EXERCISE.check("round_routing: tiny probabilities keep their order")
def _(sub: Submission) -> None:
    probs_TE = torch.rand(T, E, generator=torch.Generator().manual_seed(5))
    probs_TE[:, 1] *= 1e-9
    expert_ids_TK = torch.tensor([0, 1]).expand(T, K)
    right_TE = mask(pick(probs_TE, expert_ids_TK, "down"))
    compare_exact("chosen_TE for probabilities near 1e-9",
                  sub.round_routing(probs_TE.clone(), expert_ids_TK.clone(), TILE, "down"), right_TE, [],
                  "1 + p as the sort key: in float32 it rounds small p away. Sort by p, then by chosen, both stable.")


def renormalised(probs_TE: torch.Tensor, chosen_TE: torch.Tensor) -> torch.Tensor:
    """The definition, a token at a time."""
    rows = []
    for probs_E, chosen_E in zip(probs_TE, chosen_TE, strict=True):
        kept_E = probs_E * chosen_E
        rows.append(kept_E / kept_E.sum() if chosen_E.any() else kept_E * 0)
    return torch.stack(rows)


def score_case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """probs_TE float64, the top-k mask, and the mask rounded down: some tokens lost one expert, some all."""
    probs_TE, expert_ids_TK = routed()
    chosen_TE = mask(pick(probs_TE, expert_ids_TK, "down"))
    chosen_TE[:3] = False
    return probs_TE.double(), torch.zeros(T, E, dtype=torch.bool).scatter(1, expert_ids_TK, True), chosen_TE


@EXERCISE.check("rounded_scores: sum to 1 over the experts that took the token")
def _(sub: Submission) -> None:
    probs_TE, topk_TE, chosen_TE = score_case()
    some_T = chosen_TE.any(dim=1)
    probs_TE, topk_TE, chosen_TE = probs_TE[some_T], topk_TE[some_T], chosen_TE[some_T]
    compare("scores_TE", sub.rounded_scores(probs_TE.float(), chosen_TE.clone()), renormalised(probs_TE, chosen_TE),
            ALLOWED, [
        ("stale scores: these were renormalised over the token's top-k, from before the rounding. A token that lost an "
         "expert must give its weight to the others.", renormalised(probs_TE, topk_TE) * chosen_TE),
        ("stale scores: not renormalised at all. Divide by the sum over the experts that took the token.",
         probs_TE * chosen_TE),
        ("renormalised over the tokens: the sum goes over dim=1.",
         probs_TE * chosen_TE / (probs_TE * chosen_TE).sum(dim=0).clamp_min(1e-30)),
    ], "each token's scores must sum to 1")


NO_EXPERT = ("0 / 0 for a token that no expert took: its scores are zeros, so that the layer adds nothing to it.")


@EXERCISE.check("rounded_scores: zeros for a token that no expert took")
def _(sub: Submission) -> None:
    probs_TE, _, chosen_TE = score_case()
    compare("scores_TE", sub.rounded_scores(probs_TE.float(), chosen_TE.clone()), renormalised(probs_TE, chosen_TE),
            ALLOWED, [
        ("a token that no expert took gets a uniform score: it must get zeros.",
         renormalised(probs_TE, chosen_TE) + (~chosen_TE.any(dim=1))[:, None] / E),
    ], NO_EXPERT)


@EXERCISE.check("rounded_scores: gradient, finite where a token has no expert")
def _(sub: Submission) -> None:
    probs_TE, _, chosen_TE = score_case()
    weight_TE = torch.randn(T, E, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    right_TE, found_TE = probs_TE.clone().requires_grad_(), probs_TE.float().requires_grad_()
    (renormalised(right_TE, chosen_TE) * weight_TE).sum().backward()
    scores_TE = sub.rounded_scores(found_TE, chosen_TE.clone())
    if not isinstance(scores_TE, torch.Tensor) or not scores_TE.requires_grad:
        raise Wrong("scores that require a gradient", "none", "the scores train the router: no detach on the way")
    (scores_TE * weight_TE.float()).sum().backward()
    compare("the gradient of probs_TE", found_TE.grad, right_TE.grad, 8 * ALLOWED,
            hint="the sum in the denominator has a gradient too: no detach there." if found_TE.grad.isfinite().all()
            else "a NaN gradient: torch.where(ok, a / b, 0) still differentiates a / b where b is 0, and 0 times "
                 "infinity is NaN. Make b safe before you divide.")


if __name__ == "__main__":
    main(EXERCISE)
