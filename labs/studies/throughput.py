"""How many tokens a day does a cluster make of a model, at what cost, given measured layer times?

    python labs/studies/throughput.py --config deepseek-v3 --hardware h100 --num-gpus 8
    python labs/studies/throughput.py --config deepseek-v3 --hardware h100 --num-gpus 8 --claim 186e9

A MoE layer's time is read from a results file of the ladder (plots/<gpu>_<config>.json, or --times FILE); in training
it is the row of the forward that trains, and its backward is as much longer as labs/backward_benchmark.py found the
experts' to be. Datasheets and model cards say what hardware and model are. Everything else is an assumption with a
name, a value that is printed and an option that sets it. No result may need more FLOP/s than the GPUs have: such a one
is refused, with the factor by which it is above, and --claim holds a claim of tokens a day to the same. Needs no GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from matplotlib.figure import Figure

from common.config import MoEConfig, preset
from common.results import Run, load
from common.show import number, percent
from labs.studies.study import COLORS, ROOT, Options, PlainTable, Refused, Study, figure, main, shown

# D model width, F expert width, E experts, K top-k.

SECONDS_A_DAY = 86_400
TRAINS = "backward"  # level 9: its row is the forward that trains
BACKWARD_TIMES = ROOT / "plots" / "training" / "h200_backward.json"


@dataclass(frozen=True)
class Model:
    """What a whole model has besides its routed experts. Parameters in billions, shared experts counted as active."""

    layers: int
    moe_layers: int
    total_billions: float
    active_billions: float
    attention_width: int  # heads * head size: a token and one before it cost 4 * this many FLOPs a layer
    source: str


MODELS = {
    "mixtral-8x7b": Model(32, 32, 46.7, 12.9, 32 * 128, "arXiv 2401.04088 and config.json"),
    "qwen3-30b-a3b": Model(48, 48, 30.5, 3.3, 32 * 128, "arXiv 2505.09388 and config.json"),
    "deepseek-v3": Model(61, 58, 671.0, 37.0, 128 * 160, "arXiv 2412.19437 and config.json; width: mean of "
                                                         "192 for scores and 128 for values"),
}


@dataclass(frozen=True)
class Hardware:
    """A GPU's dense bf16 peak and memory, by its maker's datasheet; a price an hour, which is this study's guess."""

    tflops: float
    tbps: float
    gigabytes: int
    dollars_an_hour: float


HARDWARE = {
    "a100": Hardware(312, 2.04, 80, 1.5),
    "h100": Hardware(989, 3.35, 80, 2.5),
    "h200": Hardware(989, 4.8, 141, 3.0),
    "b200": Hardware(2250, 8.0, 180, 5.0),
}


def arguments(parser: argparse.ArgumentParser) -> None:
    """The case, and every assumption."""
    parser.add_argument("--config", choices=MODELS, default="qwen3-30b-a3b", help="default: qwen3-30b-a3b")
    parser.add_argument("--hardware", choices=HARDWARE, default="h200", help="default: h200")
    parser.add_argument("--num-gpus", type=int, default=8, help="default: 8")
    parser.add_argument("--mode", choices=("training", "inference"), default="training",
                        help="inference is prefill: many tokens at once (default: training)")
    parser.add_argument("--times", type=Path, help="results file with the layer's times "
                                                   "(default: plots/h200_<config>.json)")
    parser.add_argument("--level", help="row of that file to build on (default: level 9's, backward, in training if it "
                                        "is there, else the fastest level)")
    parser.add_argument("--layer-ms", type=float, help="a MoE layer's forward, instead of the measured one")
    parser.add_argument("--layer-tokens", type=int, help="tokens of that forward (with --layer-ms)")
    parser.add_argument("--backward", type=float,
                        help="a MoE layer's backward over its forward (default: as measured for level 9, else 2, as in "
                             "FLOPs)")
    parser.add_argument("--other-backward", type=float, default=2.0,
                        help="backward over forward of attention and other work (default: 2, as in FLOPs)")
    parser.add_argument("--layer-scale", type=float,
                        help="the layer's time on this hardware over the measured one (default: the worse of the two "
                             "GPUs' peaks and bandwidths)")
    parser.add_argument("--bytes-a-parameter", type=float,
                        help="held on a GPU (default: 16 in training, for bf16 weights and gradients and Adam's state "
                             "in float32, else 2)")
    parser.add_argument("--other-efficiency", type=float, default=0.5,
                        help="share of the peak that attention and other work reach (default: 0.5)")
    parser.add_argument("--layers", type=int, help="layers with experts (default: the model's); those without stay")
    parser.add_argument("--sequence", type=int, default=4096, help="tokens that attend to each other (default: 4096)")
    parser.add_argument("--doubling-efficiency", type=float, default=0.95,
                        help="speed kept a GPU when their number doubles (default: 0.95)")
    parser.add_argument("--price", type=float, help="dollars a GPU hour (default: a guess for the hardware)")
    parser.add_argument("--claim", type=float, help="tokens a day that someone claims for this case: held to the peak")


def check_arguments(args: argparse.Namespace) -> None:
    """Raise ValueError, naming the argument, for what cannot be."""
    for name in ("num_gpus", "sequence", "layers"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: at least 1")
    for name in ("other_efficiency", "doubling_efficiency"):
        if not 0 < getattr(args, name) <= 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: above 0 and at most 1")
    for name in ("backward", "other_backward", "price"):
        if (getattr(args, name) or 0) < 0:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: at least 0")
    for name in ("layer_scale", "bytes_a_parameter"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: above 0")
    if (args.layer_ms is None) != (args.layer_tokens is None):
        raise ValueError("--layer-ms and --layer-tokens: give both or neither")
    if args.layer_ms is not None and (args.layer_ms <= 0 or args.layer_tokens < 1):
        raise ValueError(f"--layer-ms {args.layer_ms} --layer-tokens {args.layer_tokens}: above 0")


# ---- what is read --------------------------------------------------------------------------------

def layer_time(args: argparse.Namespace) -> dict:
    """Milliseconds and tokens of one MoE layer's forward, and where they come from. Raises ValueError, saying which
    file or row is missing, and how to make it."""
    if args.layer_ms is not None:
        return {"ms": args.layer_ms, "tokens": args.layer_tokens, "source": "--layer-ms", "level": "given",
                "environment": None, "ceilings": {}}
    path = args.times or ROOT / "plots" / f"h200_{args.config}.json"
    if not path.exists():
        raise ValueError(f"--times {shown(path)}: there is no such file. On a GPU, level_runner.py --preset "
                         f"{args.config} makes it; or give --layer-ms and --layer-tokens")
    runs = [run for run in load(path) if run.routing == "natural" and not run.partial]
    trained_at = trained_tokens(args)
    run = max(runs, key=lambda one: (one.shape["T"] == trained_at, one.shape["T"]))
    if run.preset != args.config:
        raise ValueError(f"--times {path}: holds {run.preset}, --config is {args.config}")
    row = pick_row(run, args.level, TRAINS if args.mode == "training" else None, path)
    source = path.resolve().relative_to(ROOT) if path.resolve().is_relative_to(ROOT) else Path(path.name)
    return {"ms": row.wall_ms.p50, "tokens": run.shape["T"], "source": str(source), "level": row.name,
            "environment": run.environment, "ceilings": run.ceilings}


def pick_row(run: Run, name: str | None, preferred: str | None, path: Path):
    """The row called `name`; without one the level called `preferred` if it was timed, else the fastest."""
    timed = [row for row in run.rows if row.timed and (row.kind == "level" if name is None else row.name == name)]
    timed = [row for row in timed if row.name == preferred] or timed
    if not timed:
        known = ", ".join(row.name for row in run.rows if row.timed)
        raise ValueError(f"--level {name}: {path.name} has no time for it at {run.shape['T']} tokens, only for {known}")
    return min(timed, key=lambda row: row.wall_ms.p50)


def measured_steps(args: argparse.Namespace) -> dict | None:
    """The recorded training step of this case's experts, unless an option stands in its place."""
    if args.mode != "training" or args.backward is not None or args.times or not BACKWARD_TIMES.exists():
        return None
    shapes = json.loads(BACKWARD_TIMES.read_text())["figures"]["shapes"]
    return next((one for one in shapes if one["config"] == args.config), None)


def trained_tokens(args: argparse.Namespace) -> int | None:
    """The tokens of that step: its forward and the layer's are to be of the same number, if there is such a run."""
    found = measured_steps(args)
    return found and found["shape"]["T"]


def backward_time(args: argparse.Namespace, measured: dict) -> dict:
    """A MoE layer's backward over its forward in time, and where that comes from."""
    found = measured_steps(args)
    if found is None or measured["level"] != TRAINS:
        source = "assumed: its FLOPs" if args.backward is None else "--backward"
        return {"times": 2.0 if args.backward is None else args.backward, "source": source, "measured": False}
    ours = next(row for row in found["rows"] if row["name"] == "our kernels")
    forward, step = (ours[key]["p50"] for key in ("forward_ms", "step_ms"))
    commit = json.loads(BACKWARD_TIMES.read_text())["environment"]["commit"]
    return {"times": (step - forward) / forward, "measured": True, "commit": commit,
            "source": f"{BACKWARD_TIMES.relative_to(ROOT)}, the experts at {found['shape']['T']:,} tokens, commit "
                      f"{commit}"}


def model_of(args: argparse.Namespace) -> Model:
    """The model, with as many layers with experts as were asked for. Its parameters outside the routed experts are
    taken to lie evenly over all layers."""
    model, cfg = MODELS[args.config], preset(args.config)
    if args.layers is None:
        return model
    layers = model.layers - model.moe_layers + args.layers
    expert = 3e-9 * cfg.D * cfg.F

    def billions(whole: float, experts: int) -> float:
        routed = experts * expert
        return (whole - routed * model.moe_layers) * layers / model.layers + routed * args.layers

    return replace(model, layers=layers, moe_layers=args.layers, source=f"{model.source}; layers by --layers",
                   total_billions=billions(model.total_billions, cfg.E),
                   active_billions=billions(model.active_billions, cfg.K))


# ---- what follows --------------------------------------------------------------------------------

def flops_a_token(model: Model, cfg: MoEConfig, sequence: int) -> dict[str, float]:
    """Forward FLOPs a token: the routed experts, and all else (2 an active parameter, and causal attention)."""
    experts = 6.0 * cfg.K * cfg.D * cfg.F * model.moe_layers
    attention = 4.0 * model.attention_width * sequence / 2 * model.layers
    other = 2e9 * model.active_billions - experts + attention
    return {"experts": experts, "other": other}


def layer_scale(args: argparse.Namespace, measured: dict) -> tuple[float, str]:
    """The layer's time on this hardware over the measured one, and why: the worse of peak and bandwidth, as if both
    were its limit."""
    if args.layer_scale is not None:
        return args.layer_scale, "--layer-scale"
    gpu = str((measured["environment"] or {}).get("gpu", "")).lower()
    measured_on = next((name for name in HARDWARE if name in gpu), None)
    if measured_on is None:
        return 1.0, "as given"
    ours, theirs = HARDWARE[args.hardware], HARDWARE[measured_on]
    return (max(theirs.tflops / ours.tflops, theirs.tbps / ours.tbps),
            f"from {measured_on} to {args.hardware}, the worse of peak and bandwidth")


def estimate(args: argparse.Namespace, measured: dict, backward: float) -> dict:
    """Tokens a second, a day, days and dollars for a trillion tokens, for 1 to 1024 GPUs and for those asked."""
    model, cfg, hardware = model_of(args), preset(args.config), HARDWARE[args.hardware]
    scale, scaled_by = layer_scale(args, measured)
    layer_ms = measured["ms"] * scale
    training = args.mode == "training"
    flops_passes = 3 if training else 1
    passes = 1 + backward if training else 1
    other_passes = 1 + args.other_backward if training else 1
    flops = flops_a_token(model, cfg, args.sequence)
    moe_s = passes * model.moe_layers * layer_ms / 1e3 / measured["tokens"]
    other_s = other_passes * flops["other"] / (hardware.tflops * 1e12 * args.other_efficiency)
    one_gpu = 1 / (moe_s + other_s)
    needed = flops_passes * (flops["experts"] + flops["other"])
    price = args.price if args.price is not None else hardware.dollars_an_hour

    def at(gpus: int) -> dict[str, float]:
        rate = one_gpu * gpus * args.doubling_efficiency ** math.log2(gpus)
        days = 1e12 / rate / SECONDS_A_DAY
        return {"gpus": gpus, "tokens_per_s": rate, "tokens_per_day": rate * SECONDS_A_DAY,
                "days_per_trillion": days, "dollars_per_trillion": days * 24 * gpus * price,
                "share_of_peak": rate * needed / (gpus * hardware.tflops * 1e12),
                "ideal_per_day": one_gpu * gpus * SECONDS_A_DAY,
                "peak_per_day": gpus * hardware.tflops * 1e12 / needed * SECONDS_A_DAY}

    bytes_a_parameter = args.bytes_a_parameter or (16 if training else 2)
    return {"case": at(args.num_gpus), "curve": [at(2**i) for i in range(11)], "layer_ms": layer_ms,
            "layer_scale": scale, "scaled_by": scaled_by, "bytes_a_parameter": bytes_a_parameter,
            "moe_share": moe_s / (moe_s + other_s), "flops_a_token": needed, "price": price,
            "layer_share_of_peak": flops_passes / passes * 6 * measured["tokens"] * cfg.K * cfg.D * cfg.F
            / (layer_ms / 1e3) / (hardware.tflops * 1e12),
            "parameters_gb": bytes_a_parameter * model.total_billions, "memory_gb": hardware.gigabytes * args.num_gpus}


def refuse_above_peak(share: float, what: str, gpus: int, hardware: str, parts: list[PlainTable | str]) -> None:
    """Raise Refused, saying by how much, if `what` needs more than the GPUs' peak; `parts` are printed before."""
    if share > 1:
        peak = HARDWARE[hardware].tflops * gpus
        raise Refused(f"refused: {what} needs {share * peak / 1e3:,.1f} PFLOP/s, {number(share)} times the "
                      f"{peak / 1e3:,.1f} PFLOP/s that {gpus} {hardware} have at their peak", parts)


def measure(options: Options) -> dict:
    """The estimate, or a refusal."""
    args = options.args
    check_arguments(args)
    measured = layer_time(args)
    backward = backward_time(args, measured)
    found = estimate(args, measured, backward["times"])
    hardware, model = HARDWARE[args.hardware], model_of(args)
    stamp = measured["environment"]
    assumptions = [
        ["--times, --level", f"{measured['source']}, level {measured['level']}: {number(measured['ms'])} ms for "
                             f"{measured['tokens']:,} tokens" + (f", commit {stamp['commit']}" if stamp else "")],
        ["--hardware", f"{args.hardware}: {hardware.tflops:g} TFLOP/s dense bf16, {hardware.tbps:g} TB/s, "
                       f"{hardware.gigabytes} GB (datasheet)"],
        ["--layer-scale", f"{number(found['layer_scale'])} ({found['scaled_by']}): {number(found['layer_ms'])} ms"],
        ["--config, --layers", f"{args.config}: {model.layers} layers, {model.moe_layers} with experts, "
                               f"{number(model.active_billions)}B of {number(model.total_billions)}B parameters active "
                               f"({model.source})"],
        ["--mode", args.mode],
        ["--backward", f"{number(backward['times'])} times the forward ({backward['source']})"
                       if args.mode == "training" else "not run"],
        ["--other-backward", f"{number(args.other_backward)} times the forward, of attention and all else"
                             if args.mode == "training" else "not run"],
        ["--other-efficiency", f"{percent(args.other_efficiency)} of the peak for attention and all else"],
        ["--sequence", f"{args.sequence:,} tokens attend to each other"],
        ["--doubling-efficiency", f"{percent(args.doubling_efficiency)} of a GPU's speed kept at each doubling"],
        ["--price", f"${found['price']:.2f} a GPU hour"],
        ["--bytes-a-parameter", f"{found['bytes_a_parameter']:g}, {found['parameters_gb']:,.0f} GB in all"],
    ]
    figures = {"config": args.config, "hardware": args.hardware, "num_gpus": args.num_gpus, "mode": args.mode,
               "measured": {key: measured[key] for key in ("ms", "tokens", "source", "level")},
               "backward": backward, "assumptions": assumptions, **found} | ({"environment": stamp} if stamp else {})
    layer = f"a MoE layer of {args.config} in {number(found['layer_ms'])} ms for {measured['tokens']:,} tokens"
    layer += f" and a backward of {number(backward['times'])} times that" if args.mode == "training" else ""
    rests, *_ = parts = table(figures)
    refuse_above_peak(found["layer_share_of_peak"], layer, 1, args.hardware, [rests])
    refuse_above_peak(found["case"]["share_of_peak"], f"{found['case']['tokens_per_day']:.3g} tokens a day",
                      args.num_gpus, args.hardware, [rests])
    if args.claim is not None:
        share = args.claim / found["case"]["peak_per_day"]
        refuse_above_peak(share, f"the claim of {args.claim:.3g} tokens a day ({args.mode}, {args.config})",
                          args.num_gpus, args.hardware, parts)
        figures["claim"] = {"tokens_per_day": args.claim, "share_of_peak": share}
    return figures


# ---- showing -------------------------------------------------------------------------------------

def label(figures: dict) -> str:
    """Tells one case from another."""
    return f"{figures['config']}_{figures['num_gpus']}x{figures['hardware']}_{figures['mode']}"


def table(figures: dict) -> list[PlainTable | str]:
    """Every assumption, then what follows for the case and the curve, and which of them memory is too small for."""
    case = figures["case"]
    parts: list[PlainTable | str] = [PlainTable("Assumptions", ["set by", "value"], figures["assumptions"])]
    points = [case, *(one for one in figures["curve"] if one["gpus"] != case["gpus"])]
    parts.append(PlainTable(
        f"{figures['config']}, {figures['mode']}", ["GPUs", "tokens/s", "tokens/day", "days per trillion",
                                                     "cost per trillion", "of peak", "parameters"],
        [[f"{one['gpus']:,}{' (asked for)' if one is case else ''}", f"{one['tokens_per_s']:,.0f}",
          f"{one['tokens_per_day'] / 1e9:,.2f} B", f"{one['days_per_trillion']:,.1f}",
          f"${one['dollars_per_trillion']:,.0f}", percent(one["share_of_peak"]),
          "fit" if fits(figures, one["gpus"]) else "do not fit"] for one in points]))
    if not all(fits(figures, one["gpus"]) for one in points):
        parts.append(f"do not fit: at {figures['bytes_a_parameter']:g} bytes the parameters take "
                     f"{figures['parameters_gb']:,.0f} GB, activations not counted, and one {figures['hardware']} "
                     f"holds {figures['memory_gb'] // figures['num_gpus']:,} GB. Such a row is the rate of so many "
                     f"GPUs of a larger job.")
    return parts


def fits(figures: dict, gpus: int) -> bool:
    """Whether so many GPUs hold the parameters, each at its bytes_a_parameter; activations are not counted."""
    return figures["parameters_gb"] * figures["num_gpus"] <= figures["memory_gb"] * gpus


def draw(figures: dict, under: str) -> dict[str, Figure]:
    """Tokens a day against GPUs: with the losses of scaling, without, and at the peak; hollow where memory is short."""
    backward = figures["backward"]
    pair = f", and a backward measured at commit {backward['commit']}" if backward["measured"] else ""
    fig, (ax,) = figure(f"{figures['config']}, {figures['mode']} on {figures['hardware']}: tokens a day against GPUs",
                        f"layer time from {figures['measured']['source']} (level {figures['measured']['level']}"
                        f"{pair}), all else assumed  |  {under}")
    gpus = [one["gpus"] for one in figures["curve"]]
    for key, color, style, name in (("tokens_per_day", COLORS[0], "o-", "estimate"),
                                    ("ideal_per_day", COLORS[2], "--", "without losses of scaling"),
                                    ("peak_per_day", COLORS[1], ":", "refused above: the GPUs' peak")):
        ax.plot(gpus, [one[key] / 1e9 for one in figures["curve"]], style, color=color, lw=4, ms=10, label=name,
                gid=key)
    if crowded := [one for one in figures["curve"] if not fits(figures, one["gpus"])]:
        ax.plot([one["gpus"] for one in crowded], [one["tokens_per_day"] / 1e9 for one in crowded], "o", color="white",
                mec=COLORS[0], mew=3, ms=12, label="the parameters do not fit: a share of a larger job", gid="crowded")
    case = figures["case"]
    ax.annotate(f"{case['gpus']} GPUs: {number(case['tokens_per_day'] / 1e9)} B tokens a day\n"
                f"{number(case['days_per_trillion'])} days and ${case['dollars_per_trillion']:,.0f} a trillion tokens",
                (case["gpus"], case["tokens_per_day"] / 1e9), xytext=(40, -90), textcoords="offset points",
                arrowprops={"arrowstyle": "->", "lw": 2})
    ax.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="billion tokens a day")
    ax.set_xscale("log", base=2)
    ax.set_xticks(gpus, [f"{count:,}" for count in gpus])
    ax.yaxis.set_major_formatter("{x:,.10g}")
    ax.grid(alpha=0.3)
    ax.legend()
    return {"": fig}


def conclude(figures: dict) -> str:
    """The case in one sentence, with what it rests on."""
    case = figures["case"]
    claim = figures.get("claim")
    words = (f" The claim of {claim['tokens_per_day']:.3g} a day would need {percent(claim['share_of_peak'])} of the "
             f"peak, which is not impossible." if claim else "")
    rests = f"whose forward{' and backward were' if figures['backward']['measured'] else ' was'} measured"
    if figures["layer_scale"] != 1:
        rests += f", and scaled by {number(figures['layer_scale'])} ({figures['scaled_by']})"
    rests += "; all else is assumed"
    return (f"{case['gpus']} {figures['hardware']} make {case['tokens_per_day'] / 1e9:,.2f} billion tokens a day of "
            f"{figures['config']} ({figures['mode']}), {number(case['days_per_trillion'])} days and "
            f"${case['dollars_per_trillion']:,.0f} a trillion, at {percent(case['share_of_peak'])} of their peak; "
            f"{percent(figures['moe_share'])} of the time is the MoE layers', {rests}.{words}")


STUDY = Study("throughput", "How many tokens a day does a cluster make of a model, at what cost?", measure, table, draw,
              conclude, label=label, arguments=arguments, timed=False)

if __name__ == "__main__":
    raise SystemExit(main(STUDY))
