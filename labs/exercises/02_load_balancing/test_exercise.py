"""Checks of exercise 02. Run: python labs/exercises/02_load_balancing/test_exercise.py [file | --solution]"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from labs.exercises.harness import Exercise, Submission, Wrong, bound, compare, compare_exact, main

import torch

EXERCISE = Exercise(Path(__file__).resolve().parent)

T, E, K = 24, 6, 2
ALLOWED = bound(torch.float32, T)


def routed() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Skewed routing: probs_TE float64, scores_TK (not renormalised) and expert_ids_TK. Expert 0 is popular."""
    generator = torch.Generator().manual_seed(1)
    logits_TE = torch.randn(T, E, dtype=torch.float64, generator=generator)
    logits_TE[:, 0] += 2
    logits_TE[:, 1] += 1
    probs_TE = logits_TE.softmax(dim=1)
    return probs_TE, *probs_TE.topk(K, dim=1)


def reference_loss(probs_TE: torch.Tensor, expert_ids_TK: torch.Tensor) -> torch.Tensor:
    """The loss by its definition: E * sum_e f_e P_e."""
    tokens, experts = probs_TE.shape
    loss = probs_TE.new_zeros(())
    for expert in range(experts):
        loss = loss + (expert_ids_TK == expert).sum() / expert_ids_TK.numel() * probs_TE[:, expert].sum() / tokens
    return experts * loss


MISSING_TOP_K = ("the factor 1/top_k is missing: K rows a token make T*K rows, so a share of rows is "
                 "rows_E / (T*K). With rows_E / T, perfect balance gives K.")


def check_loss(sub: Submission, probs_TE: torch.Tensor, expert_ids_TK: torch.Tensor) -> None:
    top_k, experts = expert_ids_TK.shape[1], probs_TE.shape[1]
    right = reference_loss(probs_TE, expert_ids_TK)
    share_E = expert_ids_TK.flatten().bincount(minlength=experts) / expert_ids_TK.numel()
    compare("the loss", sub.balance_loss(probs_TE.float(), expert_ids_TK.clone()), right, ALLOWED, [
        (MISSING_TOP_K, right * top_k),
        ("divided by top_k twice: shares of the T*K rows sum to 1 already.", right / top_k),
        ("the factor E is missing: without it balance gives 1/E, a target that moves with E.", right / experts),
        ("mean instead of sum over the experts.", right / experts**2),
        ("shares squared: the second factor is the mean probability, which has a gradient.",
         experts * share_E.double().square().sum()),
        ("0.01 is the loss's weight: the caller applies it.", right * 0.01),
    ], "E * sum over experts of f_e * P_e")


@EXERCISE.check("balance_loss: exactly 1 at perfect balance, at K = 1, 2, 3")
def _(sub: Submission) -> None:
    probs_TE, *_ = routed()
    for top_k in (1, 2, 3):
        ids_TK = torch.arange(T * top_k).view(T, top_k) % E
        check_loss(sub, probs_TE, ids_TK)


@EXERCISE.check("balance_loss: on skewed routing")
def _(sub: Submission) -> None:
    probs_TE, _, expert_ids_TK = routed()
    check_loss(sub, probs_TE, expert_ids_TK)


@EXERCISE.check("balance_loss: its gradient")
def _(sub: Submission) -> None:
    probs_TE, _, expert_ids_TK = routed()
    right_TE, found_TE = probs_TE.clone().requires_grad_(), probs_TE.float().requires_grad_()
    reference_loss(right_TE, expert_ids_TK).backward()
    loss = sub.balance_loss(found_TE, expert_ids_TK.clone())
    not_differentiable = ("non-differentiable loss: counts have no gradient. Only the mean probability P_e carries "
                          "one, so it must come from probs_TE, without detach, argmax or one_hot.")
    if not isinstance(loss, torch.Tensor) or not loss.requires_grad:
        raise Wrong("a loss that requires a gradient", f"{loss!r}", not_differentiable)
    loss.backward()
    if found_TE.grad is None:
        raise Wrong("a gradient in probs_TE", "none", not_differentiable)
    compare("the gradient of probs_TE", found_TE.grad, right_TE.grad, ALLOWED, [
        (MISSING_TOP_K, right_TE.grad * K),
    ], not_differentiable)


@EXERCISE.check("expert_capacity: factor * T * K / E, rounded up")
def _(sub: Submission) -> None:
    for tokens, top_k, experts, factor, why in (
        (64, 2, 8, 1.0, "divides evenly"), (64, 2, 8, 1.25, "divides evenly"), (10, 2, 8, 1.0, "rounds up"),
        (10, 2, 8, 1.25, "rounds up"), (3, 1, 8, 1.0, "less than one row"), (7, 3, 4, 1.5, "rounds up"),
    ):
        exact = factor * tokens * top_k / experts
        right, found = math.ceil(exact), sub.expert_capacity(tokens, top_k, experts, factor)
        likely = {
            math.ceil(factor * tokens / experts): "top_k is missing: T tokens make T*K rows.",
            math.ceil(factor * -(-tokens * top_k // experts)): "rounded up twice: apply the factor first.",
            math.floor(exact): "capacity rounded down: with floor, E experts cannot hold all T*K rows even when "
                               "balanced. Use ceil.",
        }.get(found, "")
        if found != right or not isinstance(found, int):
            raise Wrong(f"capacity {right} (int) for T={tokens} K={top_k} E={experts} factor={factor}, which is "
                        f"{exact:g} and {why}", repr(found), likely or "math.ceil gives an int")


def keep(rank: Callable[[int, int], float], expert_ids_TK: torch.Tensor, capacity: int) -> torch.Tensor:
    """Each expert's `capacity` rows of highest rank(token, slot), ties to the lower token."""
    keep_TK = torch.zeros_like(expert_ids_TK, dtype=torch.bool)
    for expert in range(E):
        rows = [(token, slot) for token, slot in (expert_ids_TK == expert).nonzero().tolist()]
        for token, slot in sorted(rows, key=lambda row: -rank(*row))[:capacity]:
            keep_TK[token, slot] = True
    return keep_TK


def check_drop(sub: Submission, scores_TK: torch.Tensor, expert_ids_TK: torch.Tensor, capacity: int) -> None:
    right_TK = keep(lambda t, k: scores_TK[t, k].item(), expert_ids_TK, capacity)
    found_TK = sub.drop(scores_TK.clone(), expert_ids_TK.clone(), E, capacity)
    compare_exact("keep_TK", found_TK, right_TK, [
        ("dropping by position: this keeps the first tokens of the batch, so that what a token gets depends on where "
         "it stands. Keep the highest scores.", keep(lambda t, k: -t, expert_ids_TK, capacity)),
        ("this keeps the lowest scores.", keep(lambda t, k: -scores_TK[t, k].item(), expert_ids_TK, capacity)),
        ("slot by slot: all first choices before any second choice (GShard's order). Here only the score counts.",
         keep(lambda t, k: -k * T - t, expert_ids_TK, capacity)),
        ("slot by slot: all first choices before any second choice. Here only the score counts.",
         keep(lambda t, k: -k + scores_TK[t, k].item(), expert_ids_TK, capacity)),
        ("equal scores: the lower token goes first. Sort with stable=True.",
         keep(lambda t, k: scores_TK[t, k].item() + t * 1e-9, expert_ids_TK, capacity)),
        ("this is the mask of dropped rows: True means kept.", ~right_TK),
    ], f"each expert keeps its {capacity} rows of the highest scores, fewer if it has fewer")


@EXERCISE.check("drop: by score, not by position")
def _(sub: Submission) -> None:
    _, scores_TK, expert_ids_TK = routed()
    for capacity in (8, 3, T, 0):
        check_drop(sub, scores_TK.float(), expert_ids_TK, capacity)


@EXERCISE.check("drop: equal scores go to the lower token")
def _(sub: Submission) -> None:
    _, _, expert_ids_TK = routed()
    check_drop(sub, torch.full((T, K), 0.5), expert_ids_TK, 5)


def serve(
    probs_TE: torch.Tensor, expert_ids_TK: torch.Tensor, keep_TK: torch.Tensor, capacity: int,
    *, by_score: bool = True, check_room: bool = True, check_own: bool = True, best_room_only: bool = False,
) -> torch.Tensor:
    """Reallocation by its definition; the options are the usual mistakes."""
    held = [[expert for expert, kept in zip(*row, strict=True) if kept]
            for row in zip(expert_ids_TK.tolist(), keep_TK.tolist(), strict=True)]
    load = [sum(expert in experts for experts in held) for expert in range(E)]
    new_ids_TK = expert_ids_TK.where(keep_TK, torch.tensor(-1))
    dropped = [tuple(row) for row in (~keep_TK).nonzero().tolist()]
    if by_score:
        dropped.sort(key=lambda row: -probs_TE[row[0], expert_ids_TK[row]].item())
    for token, slot in dropped:
        free = [expert for expert in range(E)
                if (not check_room or load[expert] < capacity) and (not check_own or expert not in held[token])
                and (check_room or expert != expert_ids_TK[token, slot])]
        free.sort(key=lambda expert: load[expert] if best_room_only else -probs_TE[token, expert].item())
        if free:
            new_ids_TK[token, slot] = free[0]
            held[token].append(free[0])
            load[free[0]] += 1
    return new_ids_TK


def check_reallocate(sub: Submission, capacity: int) -> None:
    probs_TE, scores_TK, expert_ids_TK = routed()
    probs_TE = probs_TE.float()
    keep_TK = keep(lambda t, k: scores_TK[t, k].item(), expert_ids_TK, capacity)
    case = (probs_TE, expert_ids_TK, keep_TK, capacity)
    right_TK = serve(*case)
    found_TK = sub.reallocate(probs_TE.clone(), expert_ids_TK.clone(), keep_TK.clone(), capacity)
    compare_exact("the new expert ids", found_TK, right_TK, [
        ("dropped rows stay dropped: give them to the next best expert.", expert_ids_TK.where(keep_TK, -1)),
        ("served by position: the highest score is served first, wherever its token stands.",
         serve(*case, by_score=False)),
        ("an expert is filled past its capacity: count its rows, kept and newly given.",
         serve(*case, check_room=False)),
        ("a token is given to an expert that it has already: its K experts must differ.",
         serve(*case, check_own=False)),
        ("this picks the emptiest expert: the token's next best with room is meant.",
         serve(*case, best_room_only=True)),
    ], "-1 only where every expert with room holds a row of this token already")


@EXERCISE.check("reallocate: to the next best expert with room")
def _(sub: Submission) -> None:
    check_reallocate(sub, math.ceil(1.25 * T * K / E))


@EXERCISE.check("reallocate: tight capacity, some rows find no room")
def _(sub: Submission) -> None:
    check_reallocate(sub, T * K // E)
    check_reallocate(sub, 4)


@EXERCISE.check("reallocate: ties go to the lower token, then to the lower expert")
def _(sub: Submission) -> None:
    probs_TE = torch.full((5, E), 1 / E)
    expert_ids_TK = torch.tensor([[0, 1]] * 5)
    keep_TK = keep(lambda t, k: 0.0, expert_ids_TK, 2)
    compare_exact("the new expert ids", sub.reallocate(probs_TE.clone(), expert_ids_TK.clone(), keep_TK.clone(), 2),
                  serve(probs_TE, expert_ids_TK, keep_TK, 2), [],
                  "equal probabilities: lower token, then lower slot, then lower expert. Sort with stable=True.")


LOADS = {
    "equal loads": torch.tensor([8, 8, 8, 8]),
    "all on one": torch.tensor([0, 0, 32, 0]),
    "mixed loads": torch.tensor([3, 17, 0, 9, 4, 1]),
    "no rows at all": torch.tensor([0, 0, 0, 0]),
}


def check_metric(
    name: str, metric: Callable[[torch.Tensor], float], right: Callable[[list[int]], float], empty: float,
    mistakes: tuple[tuple[str, Callable[[list[int]], float]], ...],
) -> None:
    for case, rows_E in LOADS.items():
        rows = rows_E.tolist()
        found = metric(rows_E.clone())
        expected = right(rows) if any(rows) else empty
        if abs(found - expected) <= 1e-6:
            continue
        likely = "0 / 0: a batch without rows needs its own answer." if not any(rows) else next(
            (text for text, wrong in mistakes if abs(found - wrong(rows)) <= 1e-6), "")
        raise Wrong(f"{name} {expected:.6g} for {case}, {rows}", f"{float(found):.6g}", likely)


def gini_by_rank(rows: list[int], first: int) -> float:
    return sum((2 * i - len(rows) - 1) * x for i, x in enumerate(sorted(rows), first)) / (len(rows) * sum(rows))


@EXERCISE.check("gini: 0 if equal, 1 - 1/E if all on one")
def _(sub: Submission) -> None:
    check_metric("gini", sub.gini, lambda rows: sum(abs(a - b) for a in rows for b in rows) / 2 / len(rows) / sum(rows),
                 0.0, (
        ("Gini of a one-hot load is 1 - 1/E: in the formula by rank, ranks count from 1, not from 0.",
         lambda rows: gini_by_rank(rows, 0)),
        ("Gini of a one-hot load is 1 - 1/E: here divided by 1 - 1/E, a correction that we do not use.",
         lambda rows: gini_by_rank(rows, 1) * len(rows) / (len(rows) - 1)),
        ("not sorted: the formula by rank needs the loads in increasing order.",
         lambda rows: sum((2 * i - len(rows) - 1) * x for i, x in enumerate(rows, 1)) / len(rows) / sum(rows)),
        ("sorted the wrong way: increasing order.", lambda rows: -gini_by_rank(rows, 1)),
        ("the factor 2 is missing: mean difference over TWICE the mean.", lambda rows: 2 * gini_by_rank(rows, 1)),
    ))


def spread(rows: list[int], less: int) -> float:
    mean = sum(rows) / len(rows)
    return math.sqrt(sum((x - mean) ** 2 for x in rows) / (len(rows) - less)) / mean


@EXERCISE.check("coefficient_of_variation")
def _(sub: Submission) -> None:
    check_metric("coefficient of variation", sub.coefficient_of_variation, lambda rows: spread(rows, 0), 0.0, (
        ("divided by E - 1: these are all experts, not a sample of them. torch.std needs correction=0.",
         lambda rows: spread(rows, 1)),
        ("variance: take the square root.", lambda rows: spread(rows, 0) ** 2 * sum(rows) / len(rows)),
        ("not divided by the mean.", lambda rows: spread(rows, 0) * sum(rows) / len(rows)),
    ))


@EXERCISE.check("min_max_ratio")
def _(sub: Submission) -> None:
    check_metric("min/max ratio", sub.min_max_ratio, lambda rows: min(rows) / max(rows), 1.0, (
        ("an idle expert counts: do not leave zeros out.", lambda rows: min(x for x in rows if x) / max(rows)),
        ("this is max/min.", lambda rows: max(rows) / min(rows) if min(rows) else math.inf),
    ))


if __name__ == "__main__":
    main(EXERCISE)
