"""Does OptimizedMoELayer learn as the eager loop does, and what evens out its experts' loads?

    python labs/train_byte_lm.py [--steps 500] [--seed 0]

The small byte-level language model of labs/studies/byte_lm.py, trained from the same initial weights on the same
batches: on the fastest backend that this machine has, on the eager loop, and with other means of balance. The first
two differ only in how the experts are computed, so their curves must lie on each other up to rounding.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from matplotlib.figure import Figure

import common.level  # isort: skip  # noqa: F401  (picks Triton's interpreter where there is no GPU)
from labs.studies.byte_lm import LARGE, SMALL, TrainingRun, moe_factory, train
from labs.studies.study import COLORS, Options, PlainTable, Study, figure, main, positive

OPTIMIZED, LOOP = "optimized", "eager loop"
# Nothing is dropped, so that backends compute the same function; what differs is named.
RUNS = {
    OPTIMIZED: {},
    LOOP: {"backend": "loop"},
    "no balance loss": {"load_balance_weight": 0.0},
    "bias in place of the loss": {"load_balance_weight": 0.0, "bias_update_rate": 1e-3},
}
LAST = 20  # steps that the figures at the end are means of


def measure(options: Options) -> dict:
    """Train each of RUNS."""
    args, size = options.args, LARGE if options.full else SMALL
    steps = args.steps or (500 if options.full else 20)
    runs = {}
    for name, chosen in RUNS.items():
        factory = moe_factory(size, capacity_factor=None, **chosen)
        if options.full:  # kernels compile before the clock starts
            train(factory, size, steps=2, seed=args.seed, device=options.device, progress=None)
        run = train(factory, size, steps=steps, seed=args.seed, device=options.device,
                    evaluate_every=max(1, steps // 5), progress=f"train_byte_lm: {name}")
        runs[name] = summary(run)
    return {"size": runs[OPTIMIZED].pop("size"), "text": run.text, "steps": steps, "seed": args.seed,
            "dtype": run.dtype, "runs": runs}


def summary(run: TrainingRun) -> dict:
    """What of a run the figures, charts and words need; measures of balance are means over the layers."""
    def mean_over_layers(name: str) -> list[float]:
        return [round(statistics.fmean(layers), 4) for layers in run.balance[name]]

    return {"size": run.size, "backend": run.backend, "losses": [round(loss, 5) for loss in run.losses],
            "evaluations": run.evaluations, "gini": mean_over_layers("gini"),
            "max_over_mean": mean_over_layers("max_over_mean"), "rows_first": run.rows[0], "rows_last": run.rows[-1],
            "seconds": run.seconds, "tokens_per_second": run.tokens_per_second}


def at_end(values: list[float]) -> float:
    """The mean of the last steps."""
    return statistics.fmean(values[-LAST:])


def table(figures: dict) -> list[PlainTable | str]:
    """A row a run."""
    rows = [[name, run.get("backend") or "-", f"{at_end(run['losses']):.3f}", f"{run['evaluations'][-1][1]:.3f}",
             f"{run['gini'][0]:.2f}", f"{at_end(run['gini']):.2f}", f"{at_end(run['max_over_mean']):.2f}",
             f"{run['tokens_per_second']:,.0f}"] for name, run in figures["runs"].items()]
    headings = ["", "backend", "loss", "held-out loss", "Gini, first", "Gini, last", "max/mean, last", "tokens/s"]
    words = f"{figures['steps']} steps, {figures['dtype']}, seed {figures['seed']}; {figures['text']}"
    return [words, PlainTable("byte-level MoE language model, nats a byte", headings, rows)]


def widest_gap(one: list[float], other: list[float], window: int = LAST) -> float:
    """The largest difference of two curves, each a running mean over `window` steps."""
    def smooth(values: list[float]) -> list[float]:
        return [statistics.fmean(values[max(0, i - window + 1): i + 1]) for i in range(len(values))]

    return max(abs(a - b) for a, b in zip(smooth(one), smooth(other), strict=True))


def conclude(figures: dict) -> str:
    """Whether the two backends learn alike, and what balance did."""
    runs = figures["runs"]
    optimized, loop, without = runs[OPTIMIZED], runs[LOOP], runs["no balance loss"]
    where = f" on {optimized['backend']}" if optimized.get("backend") else ""
    return (f"The layer{where} learns as the eager loop: held-out loss "
            f"{optimized['evaluations'][-1][1]:.3f} and {loop['evaluations'][-1][1]:.3f} nats a byte after "
            f"{figures['steps']} steps (from {optimized['losses'][0]:.2f}), smoothed curves at most "
            f"{widest_gap(optimized['losses'], loop['losses']):.3f} apart, at "
            f"{optimized['tokens_per_second'] / loop['tokens_per_second']:.1f} times the tokens a second. Gini of the "
            f"loads: {optimized['gini'][0]:.2f} at the first step; at the end {at_end(optimized['gini']):.2f} with the "
            f"balance loss, {at_end(without['gini']):.2f} without, "
            f"{at_end(runs['bias in place of the loss']['gini']):.2f} with a bias in its place.")


def draw(figures: dict, under: str) -> dict[str, Figure]:
    """Loss curves of the two backends; Gini over the steps of all runs."""
    size = " ".join(f"{letter}={value}" for letter, value in figures["size"].items())
    fig, (losses, balance) = figure("A byte-level MoE language model: two backends; with and without balancing",
                                    f"{size}, {figures['dtype']}, seed {figures['seed']}  |  {under}", columns=2)
    steps = range(1, figures["steps"] + 1)
    for name, style, color in ((LOOP, "-", COLORS[1]), (OPTIMIZED, "--", COLORS[0])):
        run = figures["runs"][name]
        where = f" ({run['backend']})" if run.get("backend") and name == OPTIMIZED else ""
        losses.plot(steps, run["losses"], style, color=color, lw=1, label=f"{name}{where}, training",
                    gid=f"{name}: loss")
        losses.plot(*zip(*run["evaluations"], strict=True), "o" if name == LOOP else "x", color=color, ms=10, mew=2,
                    label=f"{name}, held out", gid=f"{name}: held out", zorder=3)  # over the curves
    losses.set(xlabel="step", ylabel="nats a byte", title="loss")
    for (name, run), color in zip(figures["runs"].items(), COLORS, strict=False):
        if name != LOOP:
            label = "balance loss" if name == OPTIMIZED else name
            balance.plot(steps, run["gini"], color=color, lw=2, label=label, gid=f"{name}: gini")
    balance.set(xlabel="step", ylabel="Gini, mean over layers", title="imbalance of the experts' loads (0: even)")
    balance.set_ylim(bottom=0)
    for ax in (losses, balance):
        ax.legend(fontsize=14, frameon=False)
        ax.grid(alpha=0.3)
    return {"": fig}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=positive, help="default: 500, 20 without a GPU")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default: 0)")


STUDY = Study("byte_lm", "Does OptimizedMoELayer learn as the eager loop does, and what evens out its loads?", measure,
              table, draw, conclude, arguments=arguments, folder="training")


if __name__ == "__main__":
    raise SystemExit(main(STUDY))
