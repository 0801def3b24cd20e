"""Checks of exercise 01. Run: python labs/exercises/01_simple_moe/test_exercise.py [file | --solution]"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from labs.exercises.harness import Exercise, Submission, Wrong, bound, compare, compare_exact, main

import torch
from torch.nn.functional import silu

EXERCISE = Exercise(Path(__file__).resolve().parent)

T, D, F, E, K = 13, 32, 24, 6, 3
ALLOWED = bound(torch.float32, D + F)
ALLOWED_GRADIENT = 4 * ALLOWED


def inputs(dtype: torch.dtype = torch.float32, empty: bool = False) -> tuple[torch.Tensor, ...]:
    """x_TD, router_ED, gate_up_E2FD, down_EDF of unit scale. With `empty`, no token chooses the experts
    1, 3 and 5."""
    draw = torch.Generator().manual_seed(1)
    x_TD = torch.randn(T, D, generator=draw)
    router_ED = torch.randn(E, D, generator=draw) * D**-0.5
    gate_up_E2FD = torch.randn(E, 2 * F, D, generator=draw) * D**-0.5
    down_EDF = torch.randn(E, D, F, generator=draw) * F**-0.5
    if empty:
        x_TD = x_TD.abs()
        router_ED[1::2] = -router_ED[1::2].abs()
        router_ED[::2] = router_ED[::2].abs()
    return tuple(tensor.to(dtype) for tensor in (x_TD, router_ED, gate_up_E2FD, down_EDF))


def probabilities(x_TD: torch.Tensor, router_ED: torch.Tensor, dim: int = 1) -> torch.Tensor:
    """The router's float64 probabilities (T, E)."""
    return (x_TD.double() @ router_ED.double().T).softmax(dim=dim)


def reference(
    x_TD: torch.Tensor, router_ED: torch.Tensor, gate_up_E2FD: torch.Tensor, down_EDF: torch.Tensor, K: int
) -> torch.Tensor:
    """The layer without sparsity, in its inputs' dtype: every expert on every token, unchosen ones times 0."""
    probs_TE = (x_TD @ router_ED.T).softmax(dim=1)
    chosen_TE = torch.zeros_like(probs_TE).scatter(1, probs_TE.topk(K, dim=1).indices, 1.0)
    scores_TE = probs_TE * chosen_TE / (probs_TE * chosen_TE).sum(dim=1, keepdim=True)
    gate_ETF, up_ETF = torch.einsum("td,efd->etf", x_TD, gate_up_E2FD).chunk(2, dim=2)
    return torch.einsum("etf,edf,te->td", silu(gate_ETF) * up_ETF, down_EDF, scores_TE)


def rows_of(expert_ids_TK: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What `assign` must return."""
    return [(expert_ids_TK == expert).nonzero(as_tuple=True) for expert in range(E)]


@EXERCISE.check("route: the K best experts, best first")
def _(sub: Submission) -> None:
    x_TD, router_ED, *_ = inputs()
    _, expert_ids_TK = sub.route(x_TD.clone(), router_ED.clone(), K)
    right_TK = probabilities(x_TD, router_ED).topk(K, dim=1).indices
    compare_exact("expert_ids_TK", expert_ids_TK, right_TK, [
        ("softmax over the wrong axis: dim=0 makes the tokens compete, not the experts. Use dim=1.",
         probabilities(x_TD, router_ED, dim=0).topk(K, dim=1).indices),
        ("best first: topk sorts them so.", right_TK.sort(dim=1).values),
    ], "the K largest of each token's E probabilities")


@EXERCISE.check("route: scores are the chosen probabilities, renormalised")
def _(sub: Submission) -> None:
    x_TD, router_ED, *_ = inputs()
    scores_TK, _ = sub.route(x_TD.clone(), router_ED.clone(), K)
    top_TK = probabilities(x_TD, router_ED).topk(K, dim=1).values
    other_TK = probabilities(x_TD, router_ED, dim=0).topk(K, dim=1).values
    compare("scores_TK", scores_TK, top_TK / top_TK.sum(dim=1, keepdim=True), ALLOWED, [
        ("scores are not renormalised: divide each token's K scores by their sum, so that they sum to 1.", top_TK),
        ("renormalised over the tokens: the sum goes over dim=1, with keepdim=True.", top_TK / top_TK.sum(dim=0)),
        ("softmax over the wrong axis: dim=0 makes the tokens compete, not the experts.", other_TK),
        ("softmax over the wrong axis: dim=0 makes the tokens compete, not the experts.",
         other_TK / other_TK.sum(dim=1, keepdim=True)),
        ("a second softmax over the chosen probabilities: divide by their sum instead.", top_TK.softmax(dim=1)),
    ], "each row of scores_TK must sum to 1")


NO_TOKENS = ("an expert without tokens: it still has an entry, of length 0. torch.bincount needs minlength=E, "
             "torch.unique leaves empty experts out.")


def check_rows(sub: Submission, expert_ids_TK: torch.Tensor) -> None:
    rows_E = sub.assign(expert_ids_TK.clone(), E)
    if rows_E is None or len(rows_E) != E:
        raise Wrong(f"{E} pairs (token_N, slot_N), one an expert", "None: is there a `return`?" if rows_E is None
                    else f"{len(rows_E)} pairs for {E} experts", NO_TOKENS)
    for expert, (found, right) in enumerate(zip(rows_E, rows_of(expert_ids_TK), strict=True)):
        for name, found_N, right_N, other_N in zip(("token_N", "slot_N"), found, right, right[::-1], strict=True):
            compare_exact(f"{name} of expert {expert}", found_N, right_N, [
                ("token and slot are swapped: expert_ids_TK is indexed [token, slot].", other_N),
                ("these are indices into the flattened (T*K): divide by K for the token, the rest is the slot.",
                 right[0] * expert_ids_TK.shape[1] + right[1]),
            ], "every row (token, slot) with this expert, in token order")


@EXERCISE.check("assign: each expert's tokens and slots")
def _(sub: Submission) -> None:
    generator = torch.Generator().manual_seed(2)
    check_rows(sub, torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(T)]))


@EXERCISE.check("assign: experts without tokens", crash=NO_TOKENS)
def _(sub: Submission) -> None:
    check_rows(sub, torch.tensor([[4, 0], [0, 2], [2, 4]]))


@EXERCISE.check("expert_ffn: down(silu(gate(x)) * up(x))")
def _(sub: Submission) -> None:
    x_TD, _, gate_up_E2FD, down_EDF = inputs()
    gate_TF, up_TF = (x_TD.double() @ gate_up_E2FD[0].double().T).chunk(2, dim=1)
    down_FD = down_EDF[0].double().T
    both_T2F = x_TD.double() @ gate_up_E2FD[0].double().T
    compare("y_ND", sub.expert_ffn(x_TD.clone(), gate_up_E2FD[0].clone(), down_EDF[0].clone()),
            (silu(gate_TF) * up_TF) @ down_FD, ALLOWED, [
        ("gate and up are swapped: the first F rows of gate_up are the gate, and only the gate goes through SiLU.",
         (silu(up_TF) * gate_TF) @ down_FD),
        ("gate and up rows are not interleaved: gate is the first half, up the second (chunk).",
         (silu(both_T2F[:, ::2]) * both_T2F[:, 1::2]) @ down_FD),
        ("sigmoid is not SiLU: silu(g) = g * sigmoid(g).", (gate_TF.sigmoid() * up_TF) @ down_FD),
        ("up is missing: SwiGLU multiplies silu(gate) by up.", silu(gate_TF) @ down_FD),
    ])


@EXERCISE.check("expert_ffn: no tokens", crash="an expert without tokens: (0, D) in must give (0, D) out.")
def _(sub: Submission) -> None:
    x_TD, _, gate_up_E2FD, down_EDF = inputs()
    compare("y_ND", sub.expert_ffn(x_TD[:0], gate_up_E2FD[0], down_EDF[0]), torch.zeros(0, D).double(), ALLOWED)


def check_aggregate(sub: Submission, expert_ids_TK: torch.Tensor) -> None:
    draw = torch.Generator().manual_seed(3)
    tokens, slots = expert_ids_TK.shape
    rows_E = rows_of(expert_ids_TK)
    y_END = [torch.randn(len(token_N), D, generator=draw) for token_N, _ in rows_E]
    scores_TK = torch.rand(tokens, slots, generator=draw).softmax(dim=1)

    def add_up(score: torch.Tensor, overwrite: bool = False) -> torch.Tensor:
        out_TD = torch.zeros(tokens, D, dtype=torch.float64)
        for y_ND, (token_N, slot_N) in zip(y_END, rows_E, strict=True):
            weighted_ND = y_ND.double() * score.double()[token_N, slot_N, None]
            out_TD[token_N] = weighted_ND if overwrite else out_TD[token_N] + weighted_ND
        return out_TD

    in_sorted_order_TKD = torch.cat(y_END).double().unflatten(0, (tokens, slots))
    by_rank_TK = scores_TK.gather(1, expert_ids_TK.argsort(dim=1).argsort(dim=1))
    wrong_slot = "scores applied to the wrong slot: a row's score is scores_TK[token_N, slot_N]. "
    found_TD = sub.aggregate([y_ND.clone() for y_ND in y_END], rows_E, scores_TK.clone())
    compare("out_TD", found_TD, add_up(scores_TK), ALLOWED, [
        ("overwriting instead of adding: a token is a row of K experts. Use index_add, or `out[token_N] +=`.",
         add_up(scores_TK, overwrite=True)),
        ("token order lost: rows come sorted by expert, so row r is not token r // K. Send each to its token_N.",
         (in_sorted_order_TKD * scores_TK[:, :, None]).sum(dim=1)),
        ("the scores are not applied: this is the plain sum.", add_up(torch.ones_like(scores_TK))),
        ("the scores are not applied: this is the mean.", add_up(torch.full_like(scores_TK, 1 / slots))),
        (wrong_slot + "This takes slot 0 for every row.", add_up(scores_TK[:, :1].expand(-1, slots))),
        (wrong_slot + "This is the reverse order.", add_up(scores_TK.flip(1))),
        (wrong_slot + "This takes them in the order of the experts' numbers.", add_up(by_rank_TK)),
    ], "out[t] = sum over t's K rows of score * y")


@EXERCISE.check("aggregate: weighted sum, back in token order")
def _(sub: Submission) -> None:
    generator = torch.Generator().manual_seed(4)
    check_aggregate(sub, torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(T)]))


@EXERCISE.check("aggregate: experts without tokens", crash=NO_TOKENS)
def _(sub: Submission) -> None:
    check_aggregate(sub, torch.tensor([[4, 0], [0, 2], [2, 4]]))


def check_layer(sub: Submission, tensors: tuple[torch.Tensor, ...], top_k: int) -> None:
    expected_TD = reference(*(tensor.double() for tensor in tensors), top_k)
    compare("out_TD", sub.moe_layer(*(tensor.clone() for tensor in tensors), top_k), expected_TD, 2 * ALLOWED,
            hint="if the four parts passed, look at what goes from one to the next")


@EXERCISE.check("moe_layer: the whole, at K = 1, 3 and E")
def _(sub: Submission) -> None:
    for top_k in (1, K, E):
        check_layer(sub, inputs(), top_k)


@EXERCISE.check("moe_layer: half of the experts get no token", crash=NO_TOKENS)
def _(sub: Submission) -> None:
    check_layer(sub, inputs(empty=True), K)


@EXERCISE.check("moe_layer: gradients reach x, router and experts")
def _(sub: Submission) -> None:
    names = ("x_TD", "router_ED", "gate_up_E2FD", "down_EDF")
    outward_TD = torch.randn(T, D, generator=torch.Generator().manual_seed(5))
    right = [tensor.requires_grad_() for tensor in inputs(torch.float64)]
    (reference(*right, K) * outward_TD).sum().backward()
    found = [tensor.requires_grad_() for tensor in inputs()]
    out_TD = sub.moe_layer(*found, K)
    if not out_TD.requires_grad:
        raise Wrong("an output that autograd can follow", "one that requires no gradient",
                    "the graph was cut: no torch.no_grad, .detach, .data, .item or torch.tensor(...)")
    (out_TD * outward_TD).sum().backward()
    cut = ("the graph was cut on the way to the {}: no torch.no_grad, .detach, .data, .item or torch.tensor(...) "
           "between input and output")
    for name, mine in zip(names, found, strict=True):
        if mine.grad is None:
            raise Wrong(f"a gradient in {name}", "none", cut.format("router" if name == "router_ED" else name))
    for name, mine, theirs in zip(names, found, right, strict=True):
        compare(f"the gradient of {name}", mine.grad, theirs.grad, ALLOWED_GRADIENT,
                hint="one of several paths was cut, or a tensor was changed in place after use: x reaches the "
                     "output through the experts and through the scores")


if __name__ == "__main__":
    main(EXERCISE)
