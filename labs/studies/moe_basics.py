"""What does a MoE layer do with a batch: shapes, time and rows per expert, step by step?

    python labs/studies/moe_basics.py [--preset mixtral-8x7b] [--tokens 16384] [--routing natural]

The steps are level 0's own functions, so what is timed here is what the ladder starts from.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from matplotlib.figure import Figure

from common.config import PRESETS, ROUTING_MODES, MoEConfig, Workload, dtype_name, preset
from common.measure import WallClock, gate
from common.model import Weights, make_inputs, make_weights, oracle
from common.show import number, percent
from labs import level0_naive as level0
from labs.studies.study import COLORS, Options, PlainTable, Study, figure, main, time_together

# T tokens, D model width, F expert width, E experts, K top-k. A tensor's suffix is its shape.

STEPS = ("router", "assignment", "experts", "weighted sum")
BOOK = MoEConfig("small enough to read", D=3, F=2, E=3, K=2)


def arguments(parser: argparse.ArgumentParser) -> None:
    """The workload to look at."""
    parser.add_argument("--preset", choices=PRESETS, help="default: mixtral-8x7b on a GPU, tiny without")
    parser.add_argument("--tokens", type=int, help="default: 16384 on a GPU, 512 without")
    parser.add_argument("--routing", choices=ROUTING_MODES, default="natural")


def balance_loss(probs_TE: torch.Tensor, expert_ids_TK: torch.Tensor) -> float:
    """E * sum over e of (share of routed rows) * (mean router probability): 1 where balanced, E at worst.

    Source: Switch Transformer, arXiv 2101.03961, equation 4, with shares of all T * K routed rows.
    """
    E = probs_TE.shape[1]
    share_E = torch.bincount(expert_ids_TK.flatten(), minlength=E).double() / expert_ids_TK.numel()
    return (E * share_E * probs_TE.double().mean(dim=0)).sum().item()


def walk(cfg: MoEConfig, weights: Weights, x_TD: torch.Tensor) -> dict[str, object]:
    """The layer's four steps as separate calls on what the steps before left: {step: call}, and the shapes."""
    scores_TK, expert_ids_TK = level0.route(x_TD, weights.router_ED, cfg)

    def assignment() -> list:
        return [level0.dispatch(expert_ids_TK, e, k) for e in range(cfg.E) for k in range(cfg.K)]

    token_of = assignment()

    def experts() -> list:
        return [level0.experts(x_TD[token_of[e * cfg.K + k]], weights.gate_up_E2FD[e], weights.down_EDF[e])
                for e in range(cfg.E) for k in range(cfg.K)]

    y_of = experts()

    def weighted_sum() -> torch.Tensor:
        out_TD = torch.zeros_like(x_TD)
        for place, (token_N, y_ND) in enumerate(zip(token_of, y_of, strict=True)):
            level0.combine(out_TD, token_N, y_ND, scores_TK[:, place % cfg.K])
        return out_TD

    calls = {"router": lambda: level0.route(x_TD, weights.router_ED, cfg), "assignment": assignment,
             "experts": experts, "weighted sum": weighted_sum}
    most = max(range(len(token_of)), key=lambda place: token_of[place].numel())
    shapes = [("input", "x_TD", list(x_TD.shape)), ("router", "logits_TE", [x_TD.shape[0], cfg.E]),
              ("router", "scores_TK", list(scores_TK.shape)), ("router", "expert_ids_TK", list(expert_ids_TK.shape)),
              ("assignment", "token_N of the fullest expert's slot", list(token_of[most].shape)),
              ("experts", "gate and up of it", [token_of[most].numel(), 2 * cfg.F]),
              ("experts", "y_ND of it", list(y_of[most].shape)), ("weighted sum", "out_TD", list(x_TD.shape))]
    return {"calls": calls, "shapes": shapes, "expert_ids_TK": expert_ids_TK, "out_TD": weighted_sum()}


def book_example() -> dict[str, list]:
    """The four steps on 3 tokens and 3 experts, every number of it: rounded to what a reader can follow."""
    weights = make_weights(BOOK, torch.float32, "cpu", seed=1)
    x_TD = make_inputs(Workload(BOOK, 3, torch.float32, seed=1), weights)
    logits_TE = level0.router_logits(x_TD, weights.router_ED)
    scores_TK, expert_ids_TK = level0.route(x_TD, weights.router_ED, BOOK)
    lines = []
    for t in range(3):
        for k in range(BOOK.K):
            e = int(expert_ids_TK[t, k])
            y_D = level0.experts(x_TD[t:t + 1], weights.gate_up_E2FD[e], weights.down_EDF[e])[0]
            lines.append({"token": t, "expert": e, "score": scores_TK[t, k].item(), "y": y_D.tolist()})
    return {"x": x_TD.tolist(), "logits": logits_TE.tolist(), "probabilities": logits_TE.softmax(1).tolist(),
            "chosen": lines, "out": level0.build(BOOK, weights)(x_TD).tolist()}


def measure(options: Options) -> dict:
    """Shapes, milliseconds a step, rows an expert, balance loss; after the whole passed the oracle's gate."""
    args, full = options.args, options.full
    cfg = preset(args.preset or ("mixtral-8x7b" if full else "tiny"))
    dtype = torch.bfloat16 if options.device.type == "cuda" else torch.float32
    T = args.tokens if args.tokens is not None else (16384 if full else 512)
    workload = Workload(cfg, T, dtype, args.routing)
    options.say(f"{cfg.name}, {T} tokens: weights, float64 oracle")
    weights = make_weights(cfg, dtype, options.device)
    x_TD = make_inputs(workload, weights)
    steps = walk(cfg, weights, x_TD)
    found = gate(steps["out_TD"], oracle(cfg, weights, x_TD), workload)
    if not found.ok:
        raise RuntimeError(f"the steps do not give the layer's output: {found.reason}")
    options.say("timing the steps")
    times = time_together(steps["calls"], WallClock(options.device), 20 if full else 5)
    ids_TK = steps["expert_ids_TK"]
    probs_TE = level0.router_logits(x_TD, weights.router_ED).softmax(dim=1)
    return {"preset": cfg.name, "shape": {"T": T, "D": cfg.D, "F": cfg.F, "E": cfg.E, "K": cfg.K},
            "routing": args.routing, "dtype": dtype_name(dtype), "rel_err": found.rel_err, "error_bound": found.bound,
            "shapes": steps["shapes"], "ms": times,
            "rows_per_expert": torch.bincount(ids_TK.flatten(), minlength=cfg.E).tolist(),
            "balance_loss": balance_loss(probs_TE, ids_TK), "book": book_example()}


def vector(values: list[float]) -> str:
    """[0.51, -1.2] as a reader takes it in."""
    return "(" + ", ".join(f"{value:+.2f}" for value in values) + ")"


def table(figures: dict) -> list[PlainTable | str]:
    """The small batch line by line, then shapes, times and loads of the large one."""
    book, shape = figures["book"], figures["shape"]
    parts: list[PlainTable | str] = [
        "\n[bold]Three tokens, three experts, top 2[/]: out = sum over chosen e of score * y_e"]
    for t, x_D in enumerate(book["x"]):
        parts.append(f"token {t}: x = {vector(x_D)}   1. router: logits {vector(book['logits'][t])}, softmax "
                     f"{vector(book['probabilities'][t])}")
        chosen = [line for line in book["chosen"] if line["token"] == t]
        parts.append("         2. assignment: " + ", ".join(
            f"expert {line['expert']} with score {line['score']:.2f}" for line in chosen))
        parts.append("         3. experts: " + ", ".join(
            f"y_{line['expert']} = {vector(line['y'])}" for line in chosen))
        parts.append(f"         4. weighted sum: out = {vector(book['out'][t])}")
    title = (f"{figures['preset']}, {shape['T']:,} tokens, {figures['dtype']}, relative error "
             f"{figures['rel_err']:.1e} (bound {figures['error_bound']:.1e})")
    parts.append(PlainTable(title, ["step", "tensor", "shape"], [
        [step, name, " x ".join(f"{size:,}" for size in sizes)] for step, name, sizes in figures["shapes"]]))
    total = sum(spread["p50"] for spread in figures["ms"].values())
    parts.append(PlainTable("Time", ["step", "ms", "p20 to p80", "share"], [
        [step, number(spread["p50"]), f"{number(spread['p20'])} to {number(spread['p80'])}",
         percent(spread["p50"] / total)] for step, spread in figures["ms"].items()]))
    rows = figures["rows_per_expert"]
    cut = f", first 16 of {shape['E']} experts" if shape["E"] > 16 else ""
    parts.append(PlainTable(
        f"Balance loss {figures['balance_loss']:.4f} (even: 1){cut}",
        ["expert", "rows", f"share (even {1 / shape['E']:.1%})"],
        [[str(e), f"{count:,}", f"{count / sum(rows):.1%}"] for e, count in enumerate(rows[:16])]))
    return parts


def draw(figures: dict, under: str) -> dict[str, Figure]:
    """Left: rows an expert against the even share. Right: milliseconds a step."""
    shape, rows = figures["shape"], figures["rows_per_expert"]
    words = " ".join(f"{letter}={size}" for letter, size in shape.items())
    fig, (left, right) = figure("A MoE layer, step by step: who works, and where the time goes",
                                f"{figures['preset']}: {words}, {figures['dtype']}, {figures['routing']} routing  |  "
                                f"{under}", columns=2)
    left.bar(range(shape["E"]), rows, color=COLORS[0], gid="rows")
    left.axhline(sum(rows) / shape["E"], color=COLORS[1], ls="--", lw=3, label="even share")
    left.set(xlabel="expert", ylabel="rows", title=f"Rows per expert (balance loss {figures['balance_loss']:.3f})")
    left.set_ylim(0, 1.15 * max(rows))  # room for the legend
    left.legend(loc="upper right")
    right.barh(list(figures["ms"]), [spread["p50"] for spread in figures["ms"].values()], color=COLORS[0], gid="ms")
    for place, spread in enumerate(figures["ms"].values()):
        right.text(spread["p50"], place, f" {number(spread['p50'])} ms", va="center")
    right.invert_yaxis()
    right.margins(x=0.2)
    right.set(xlabel="milliseconds (wall, median)", title="Time per step, level 0's own functions")
    return {"": fig}


def conclude(figures: dict) -> str:
    """The busiest expert, the balance loss, and where the time goes."""
    rows, ms = figures["rows_per_expert"], figures["ms"]
    total = sum(spread["p50"] for spread in ms.values())
    slowest = max(ms, key=lambda step: ms[step]["p50"])
    return (f"The busiest of {len(rows)} experts got {max(rows) / sum(rows):.1%} of the rows where an even share is "
            f"{1 / len(rows):.1%} (balance loss {figures['balance_loss']:.3f}, balanced is 1), and the step called "
            f"{slowest!r} took {percent(ms[slowest]['p50'] / total)} of the {number(total)} ms of all four.")


STUDY = Study("moe_basics", "What does a MoE layer do with a batch: shapes, time and rows per expert, step by step?",
              measure, table, draw, conclude, arguments=arguments)

if __name__ == "__main__":
    raise SystemExit(main(STUDY))
