"""How does a router spread its tokens, what does a capacity drop, and what evens the load out?

    python labs/studies/routing.py [--steps 200]

Temperature, load statistics and capacity are read off one batch; the three remedies, balance loss, z-loss and a moving
bias, off real trainings of the small byte-level MoE language model, three seeds each.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from matplotlib.figure import Figure

from common.config import ROUTING_MODES, MoEConfig, Workload
from common.model import make_inputs, make_weights
from common.show import percent
from labs.moe_layer.admission import drop_over_capacity
from labs.moe_layer.losses import count_rows
from labs.moe_layer.router import Router
from labs.moe_layer.statistics import evenness
from labs.studies.byte_lm import SMALL, Size, moe_factory, train
from labs.studies.study import COLORS, Options, PlainTable, Study, figure, main

# T tokens, E experts, K top-k.

TEMPERATURES = (0.5, 1.0, 2.0, 4.0)
FACTORS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0)
MEDIUM = Size(L=2, D=256, H=4, F=256, E=32, K=2, batch=32, sequence=256)
REMEDIES = {
    "none": {"load_balance_weight": 0.0},
    "balance loss 0.01": {"load_balance_weight": 0.01},
    "z-loss 0.001": {"load_balance_weight": 0.0, "z_loss_weight": 1e-3},
    "bias 0.001 a step": {"load_balance_weight": 0.0, "bias_update_rate": 1e-3},
}
HEAT_TOKENS = 48


def arguments(parser: argparse.ArgumentParser) -> None:
    """The training's length."""
    parser.add_argument("--steps", type=int, help="of each training (default: 200 on a GPU, 12 without)")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each remedy (default: 3)")


def load(rows_E: torch.Tensor) -> dict[str, float]:
    """Entropy (1 is even), Gini, coefficient of variation, and the extremes over the mean."""
    entropy, gini, variation, peak = evenness(rows_E).tolist()
    log_E = torch.tensor(float(rows_E.numel())).log().item()
    return {"entropy": entropy / log_E if log_E else 1.0, "gini": gini, "cv": variation, "max_over_mean": peak,
            "min_over_mean": (rows_E.min() / rows_E.double().mean()).item()}


def temperatures(x_TD: torch.Tensor, weight_ED: torch.Tensor, K: int) -> list[dict]:
    """What a temperature changes: weights, not the choice."""
    found, plain = [], None
    for temperature in TEMPERATURES:
        router = Router(x_TD.shape[1], weight_ED.shape[0], K, temperature=temperature, device=x_TD.device)
        router.weight.data.copy_(weight_ED)
        with torch.no_grad():
            choice = router(x_TD)
        ids_TK = choice.expert_ids_TK
        plain = ids_TK if temperature == 1.0 else plain
        probs_TE = choice.probs_TE
        found.append({"temperature": temperature, "ids_TK": ids_TK,
                      "top_score": choice.scores_TK[:, 0].mean().item(),
                      "router_entropy": -(probs_TE * probs_TE.clamp_min(1e-30).log()).sum(1).mean().item()})
    for one in found:
        same_T = (one.pop("ids_TK").sort(dim=1).values == plain.sort(dim=1).values).all(dim=1)
        one["same_choice"] = same_T.double().mean().item()
    return found


def capacities(scores_TK: torch.Tensor, ids_TK: torch.Tensor, E: int) -> list[dict]:
    """Share of rows, and of their scores, that each capacity factor drops: the weakest scores first, and by position
    in the batch (GShard) for comparison."""
    order_TK = -torch.arange(ids_TK.numel(), dtype=torch.float64, device=ids_TK.device).view_as(ids_TK)
    found = []
    for factor in FACTORS:
        row = {"factor": factor}
        for name, merit_TK in (("by_score", scores_TK), ("by_position", order_TK)):
            dropped_TK = drop_over_capacity(merit_TK, ids_TK, E, factor) == E
            row[name] = {"rows": dropped_TK.double().mean().item(),
                         "score": (scores_TK.double() * dropped_TK).sum().item() / scores_TK.double().sum().item()}
        found.append(row)
    return found


def trainings(options: Options, size: Size, steps: int, seeds: int) -> dict[str, dict]:
    """Gini at each step (mean over layers) and the last held-out loss, for every remedy and seed."""
    found = {}
    for name, remedy in REMEDIES.items():
        runs = []
        for seed in range(seeds):
            run = train(moe_factory(size, capacity_factor=None, **remedy), size, steps=steps, seed=seed,
                        device=options.device, progress=f"routing: {name}, seed {seed}")
            runs.append(run)
        found[name] = {"gini": [[statistics.fmean(step) for step in run.balance["gini"]] for run in runs],
                       "held_out_loss": [run.evaluation_loss for run in runs], "text": runs[0].text}
    return found


def measure(options: Options) -> dict:
    """One batch's temperature, loads and capacity; then the trainings."""
    full, device = options.full, options.device
    cfg = MoEConfig("routing", D=256, F=8, E=64 if full else 16, K=8 if full else 2)
    T = 16384 if full else 1024
    steps = options.args.steps if options.args.steps is not None else (200 if full else 12)
    seeds = options.args.seeds if full else min(options.args.seeds, 2)
    if steps < 1 or seeds < 1:
        raise ValueError(f"--steps {steps} --seeds {seeds}: at least 1 of each")
    options.say("temperature, loads, capacity of one batch")
    weights = make_weights(cfg, torch.float32, device)
    loads, batches = {}, {}
    router = Router(cfg.D, cfg.E, cfg.K, device=device)
    router.weight.data.copy_(weights.router_ED)
    for mode in ROUTING_MODES:
        x_TD = make_inputs(Workload(cfg, T, torch.float32, mode), weights)
        with torch.no_grad():
            batches[mode] = x_TD, router(x_TD)
        loads[mode] = load(count_rows(batches[mode][1].expert_ids_TK, cfg.E))
    natural, skewed = batches["natural"][1], batches["skewed"][1]
    heat_TE = torch.zeros(HEAT_TOKENS, cfg.E, device=device).scatter_(
        1, skewed.expert_ids_TK[:HEAT_TOKENS], skewed.scores_TK[:HEAT_TOKENS])
    size = MEDIUM if full else SMALL
    return {"T": T, "E": cfg.E, "K": cfg.K, "loads": loads,
            "temperatures": temperatures(batches["natural"][0], weights.router_ED, cfg.K),
            "capacity": {"natural": capacities(natural.scores_TK, natural.expert_ids_TK, cfg.E),
                         "skewed": capacities(skewed.scores_TK, skewed.expert_ids_TK, cfg.E)},
            "rows_per_expert": {mode: count_rows(batches[mode][1].expert_ids_TK, cfg.E).tolist()
                                for mode in ("natural", "skewed")},
            "heat_map": heat_TE.tolist(),
            "training": {"size": vars(size), "steps": steps, "seeds": seeds,
                         "remedies": trainings(options, size, steps, seeds)}}


def final_gini(remedy: dict) -> list[float]:
    """Each seed's mean Gini over the last tenth of the steps."""
    return [statistics.fmean(run[-max(1, len(run) // 10):]) for run in remedy["gini"]]


def table(figures: dict) -> list[PlainTable | str]:
    """Temperatures, loads, capacity, remedies."""
    shape = f"T={figures['T']:,} E={figures['E']} K={figures['K']}"
    remedies = figures["training"]["remedies"]
    return [
        PlainTable(f"Temperature, {shape}", ["temperature", "tokens with the same choice as at 1", "best score",
                                             "router entropy, nats"],
                   [[f"{one['temperature']:g}", percent(one["same_choice"]), f"{one['top_score']:.3f}",
                     f"{one['router_entropy']:.3f}"] for one in figures["temperatures"]]),
        PlainTable(f"Load, {shape}", ["routing", "entropy / log E", "Gini", "CV", "max / mean", "min / mean"],
                   [[mode, *(f"{one[key]:.3f}" for key in ("entropy", "gini", "cv", "max_over_mean",
                                                           "min_over_mean"))]
                    for mode, one in figures["loads"].items()]),
        PlainTable("Dropped by a capacity (rows; share of all scores): weakest scores first, or last in the batch",
                   ["capacity factor", *(f"{mode}, {how.replace('_', ' ')}" for mode in figures["capacity"]
                                         for how in ("by_score", "by_position"))],
                   [[f"{factor:g}", *(f"{one[place][how]['rows']:.1%}; {one[place][how]['score']:.1%}"
                                      for one in figures["capacity"].values() for how in ("by_score", "by_position"))]
                    for place, factor in enumerate(FACTORS)]),
        PlainTable(f"Trainings, {figures['training']['steps']} steps, {figures['training']['seeds']} seeds",
                   ["remedy", "Gini, first step", "Gini, last tenth (each seed)", "held-out nats a byte (each seed)"],
                   [[name, f"{statistics.fmean(run[0] for run in one['gini']):.3f}",
                     ", ".join(f"{value:.3f}" for value in final_gini(one)),
                     ", ".join(f"{value:.3f}" for value in one["held_out_loss"])]
                    for name, one in remedies.items()]),
    ]


def draw(figures: dict, under: str) -> dict[str, Figure]:
    """One chart of the batch: heat map, loads, drops. One of the trainings: Gini over steps."""
    shape = f"T={figures['T']:,}, E={figures['E']}, K={figures['K']}  |  {under}"
    fig, (left, middle, right) = figure("Routing: who goes where, and what a capacity drops", shape, columns=3)
    image = left.imshow(figures["heat_map"], aspect="auto", cmap="Blues", vmin=0, gid="heat")
    fig.colorbar(image, ax=left, label="score")
    left.set(xlabel="expert", ylabel="token", title="Skewed routing, first tokens")
    for (mode, rows), color in zip(figures["rows_per_expert"].items(), COLORS, strict=False):
        ranked = sorted(rows, reverse=True)
        middle.plot(range(1, len(ranked) + 1), ranked, lw=4, color=color, gid=mode,
                    label=f"{mode}: Gini {figures['loads'][mode]['gini']:.2f}")
    middle.axhline(figures["T"] * figures["K"] / figures["E"], color="black", ls="--", label="even")
    middle.set(xlabel="experts, busiest first", ylabel="rows", title="Rows per expert")
    middle.set_ylim(bottom=0)
    middle.legend(fontsize=14)
    for mode, color in zip(figures["capacity"], COLORS, strict=False):
        for what, style, label in (("rows", "-", "rows"), ("score", "--", "scores")):
            points = [100 * one["by_score"][what] for one in figures["capacity"][mode]]
            right.plot(FACTORS, points, style, lw=3, color=color, marker="o", gid=f"{mode} {what}",
                       label=f"{mode}, {label}")
    right.set(xlabel="capacity factor", ylabel="% dropped, of all rows or all scores", title="Dropped, weakest first")
    right.grid(alpha=0.3)
    right.legend(fontsize=14, handlelength=4)
    return {"": fig, "training": draw_trainings(figures["training"], under)}


def draw_trainings(training: dict, under: str) -> Figure:
    """Gini over the steps: the mean of the seeds, and their range."""
    words = " ".join(f"{letter}={value}" for letter, value in training["size"].items())
    fig, (ax,) = figure("What evens the load out: Gini over a real training",
                        f"byte-level MoE language model, {words}, {training['seeds']} seeds (mean, range)  |  {under}")
    steps = range(1, training["steps"] + 1)
    for (name, one), color in zip(training["remedies"].items(), COLORS, strict=False):
        by_step = list(zip(*one["gini"], strict=True))
        loss = statistics.fmean(one["held_out_loss"])
        ax.plot(steps, [statistics.fmean(values) for values in by_step], lw=3, color=color, gid=name,
                label=f"{name} (held-out {loss:.3f} nats a byte)")
        ax.fill_between(steps, [min(values) for values in by_step], [max(values) for values in by_step], color=color,
                        alpha=0.2, lw=0)
    ax.set(xlabel="step", ylabel="Gini coefficient of the load (0: even), mean of layers", ylim=(0, None))
    ax.grid(alpha=0.3)
    ax.legend()
    return fig


def conclude(figures: dict) -> str:
    """What each remedy does to Gini, at what loss; and what temperature and capacity do."""
    remedies = figures["training"]["remedies"]
    ends = {name: statistics.fmean(final_gini(one)) for name, one in remedies.items()}
    losses = {name: one["held_out_loss"] for name, one in remedies.items()}
    others = {name: value for name, value in ends.items() if name != "none"}
    best = min(others, key=others.get)
    gaps = [with_it - without for with_it, without in zip(losses[best], losses["none"], strict=True)]
    same = min(one["same_choice"] for one in figures["temperatures"])
    listed = ", ".join(f"{name} {value:.2f}" for name, value in others.items())
    return (f"After {figures['training']['steps']} steps the Gini coefficient is {ends['none']:.2f} with no remedy "
            f"({listed}); {best} moves the held-out loss by {statistics.fmean(gaps):+.3f} nats a byte "
            f"({min(gaps):+.3f} to {max(gaps):+.3f} over {len(gaps)} seeds); a temperature leaves {percent(same)} of "
            "the choices as they were and changes weights only.")


STUDY = Study("routing", "How does a router spread its tokens, what does a capacity drop, and what evens the load out?",
              measure, table, draw, conclude, arguments=arguments, timed=False)

if __name__ == "__main__":
    raise SystemExit(main(STUDY))
