"""What does each variant of the layer cost, in inference and in training, at 8, 64 and 256 experts?

    python labs/studies/variants.py [--sizes small,medium,large]

Four variants, all of them labs/full_moe.py's OptimizedMoELayer with the same weights:

    vanilla      one expert after another, as eager model code does it
    grouped      rows sorted by expert, one grouped GEMM a projection
    tile-aware   grouped, and in training every expert's rows rounded to whole tiles
    full         the ladder's kernels: in inference under a CUDA graph, in training with rounding

Inference is exact for all: rounding looks at the whole batch, so it is for training alone. Before any is timed, outputs
are held to the float64 oracle, and gradients to those of the simplest variant with the same routing.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from common.config import MoEConfig, Workload, flops, preset
from common.level import Unsupported  # first: it picks Triton's interpreter where there is no GPU
from common.measure import PeakMemory, WallClock, gate, relative_error
from common.model import Weights, make_inputs, make_weights, oracle
from common.show import number
from labs.full_moe import OptimizedMoELayer
from labs.studies.study import COLORS, Options, PlainTable, Study, figure, legend_above, main, time_together

# T tokens, D model width, F expert width, E experts, K top-k.

VARIANTS = {
    "vanilla": {"backend": "loop"},
    "grouped": {"backend": "grouped"},
    "tile-aware": {"backend": "grouped", "token_rounding": "nearest"},
    "full": {"backend": "auto", "token_rounding": "nearest"},
}
SIZES = {"small": ("seed", 8192), "medium": ("olmoe-1b-7b", 16384), "large": ("deepseek-v3", 16384)}
QUICK_SIZES = {"small": (MoEConfig("quick-8", D=32, F=32, E=8, K=2), 256),
               "medium": (MoEConfig("quick-16", D=32, F=32, E=16, K=2), 256)}
SAME_ROUTING = {"grouped": "vanilla", "full": "tile-aware"}  # whose gradients must agree
TOO_SLOW = 1500.0  # milliseconds a call, from which on one call more is enough


def arguments(parser: argparse.ArgumentParser) -> None:
    """Which sizes to run."""
    parser.add_argument("--sizes", help=f"some of {','.join(SIZES)} (default: all)")


def layer_of(cfg: MoEConfig, weights: Weights, tile: int, **options: object) -> OptimizedMoELayer:
    """The layer with these very weights: parameters are shared between variants, not copied."""
    layer = OptimizedMoELayer(cfg.D, cfg.F, cfg.E, cfg.K, tile_size=tile, capacity_factor=None, scoring=cfg.scoring,
                              renormalize=cfg.renormalize, device="meta", dtype=weights.dtype, **options)
    state = {"gate.weight": weights.router_ED, "experts.gate_up_proj": weights.gate_up_E2FD,
             "experts.down_proj": weights.down_EDF}
    layer.load_state_dict(state, assign=True)
    return layer


def training_step(layer: OptimizedMoELayer, x_TD: torch.Tensor, grad_TD: torch.Tensor) -> Callable[[], torch.Tensor]:
    """A call: forward and backward for x, router and experts. The weights' gradients are dropped at its end, since
    every variant would keep its own. Returns x's."""
    def step() -> torch.Tensor:
        x = x_TD.detach().requires_grad_()
        layer(x).backward(grad_TD)
        layer.zero_grad(set_to_none=True)
        return x.grad

    return step


def inference_call(layer: OptimizedMoELayer, x_TD: torch.Tensor) -> Callable[[], torch.Tensor]:
    """A call: the forward without autograd."""
    def forward() -> torch.Tensor:
        with torch.no_grad():
            return layer(x_TD)

    return forward


def timed(calls: dict[str, Callable], options: Options) -> dict[str, dict]:
    """time_together, but a call too slow for rounds is timed once."""
    clock, slow, quick = WallClock(options.device), {}, {}
    for name, call in calls.items():
        milliseconds = clock(call)
        if milliseconds > TOO_SLOW:
            slow[name] = {"p20": milliseconds, "p50": milliseconds, "p80": milliseconds}
        else:
            quick[name] = call
    return slow | (time_together(quick, clock, 12 if options.full else 2) if quick else {})


def peak_mib(call: Callable[[], torch.Tensor], layer: OptimizedMoELayer, device: torch.device) -> float | None:
    """Memory above weights, input and result; of training, above the weights' gradients too."""
    with PeakMemory(device) as memory:
        memory.result = call()
    gradients = sum(p.nbytes for p in layer.parameters()) if layer.training else 0
    return None if memory.bytes is None else max(0, memory.bytes - gradients) / 2**20


def measure_mode(mode: str, cfg: MoEConfig, T: int, weights: Weights, options: Options, tile: int) -> dict:
    """All variants in one mode, inference or training."""
    device = options.device
    workload = Workload(cfg, T, weights.dtype)
    x_TD = make_inputs(workload, weights)
    grad_TD = torch.randn(x_TD.shape, device=device, generator=torch.Generator(device).manual_seed(2)).to(x_TD.dtype)
    expected = oracle(cfg, weights, x_TD) if mode == "inference" else None
    rows, calls, gradients = {}, {}, {}
    for name, variant in VARIANTS.items():
        options.say(f"{cfg.name}, {mode}, {name}: building, checking")
        if mode == "inference" and name == "tile-aware":
            rows[name] = {"status": "n/a (rounding is for training)"}
            continue
        try:
            graph = name == "full" and mode == "inference"
            layer = layer_of(cfg, weights, tile, **variant, collect_stats=False, cuda_graph=graph)
            layer.train(mode == "training")
            rows[name] = {"status": "ok", "path": layer.backend.name}
            call = inference_call(layer, x_TD) if mode == "inference" else training_step(layer, x_TD, grad_TD)
            start = time.perf_counter()
            with PeakMemory(device) as memory:  # a graph's memory is taken here, when it is captured
                memory.result = result = call()
            rows[name]["build_s"] = time.perf_counter() - start
            if mode == "inference":
                found = gate(result, expected, workload)
                if not found.ok:
                    raise RuntimeError(f"{cfg.name}, {name}: {found.reason}, so it is not timed")
                rows[name]["rel_err"] = found.rel_err
            else:
                gradients[name] = result
                twin = SAME_ROUTING.get(name)
                if twin in gradients:
                    error = relative_error(result, gradients.pop(twin).double())
                    rows[name]["gradient_against_twin"] = error
                    if not error <= 8 * torch.finfo(weights.dtype).eps + 1e-5:
                        raise RuntimeError(f"{cfg.name}, {name}: x's gradient is {error:.1e} away from {twin}'s")
            built_mib = None if memory.bytes is None else memory.bytes / 2**20
            rows[name]["peak_mib"] = built_mib if graph else peak_mib(call, layer, device)
            calls[name] = call
        except Unsupported as lack:
            rows[name] = {"status": f"n/a ({lack})"}
        except torch.OutOfMemoryError:
            rows[name] = {"status": "out of memory"}
        except Exception as error:  # a variant that raises has no time, its traceback shown; the others still run
            traceback.print_exc()
            rows[name] = {"status": f"FAILED ({type(error).__name__})"}
    gradients.clear()
    options.say(f"{cfg.name}, {mode}: timing")
    for name, spread in timed(calls, options).items():
        rows[name]["ms"] = spread
        rows[name]["tflops"] = flops(workload) * (3 if mode == "training" else 1) / spread["p50"] / 1e9
    for row in rows.values():
        if "ms" in row and "ms" in rows["vanilla"]:
            row["speedup"] = rows["vanilla"]["ms"]["p50"] / row["ms"]["p50"]
    return rows


def measure(options: Options) -> dict:
    """Every size, in inference and in training."""
    sizes = SIZES if options.full else QUICK_SIZES
    wanted = options.args.sizes.split(",") if options.args.sizes else list(sizes)
    unknown = [name for name in wanted if name not in SIZES]
    if unknown:
        raise ValueError(f"--sizes {options.args.sizes}: {unknown[0]!r} is none of {', '.join(SIZES)}")
    dtype = torch.bfloat16 if options.device.type == "cuda" else torch.float32
    found = {}
    for name in wanted:
        if name not in sizes:
            continue
        shape, T = sizes[name]
        cfg = preset(shape) if isinstance(shape, str) else shape
        weights = make_weights(cfg, dtype, options.device)
        tile = 128 if options.full else 16
        found[name] = {"preset": cfg.name, "shape": {"T": T, "D": cfg.D, "F": cfg.F, "E": cfg.E, "K": cfg.K}}
        with warnings.catch_warnings():
            # A rounding that turned itself off is no tile-aware variant.
            warnings.filterwarnings("error", message="tile rounding is off")
            for mode in ("inference", "training"):
                found[name][mode] = measure_mode(mode, cfg, T, weights, options, tile)
        del weights
        if options.device.type == "cuda":
            torch.cuda.empty_cache()
    return {"sizes": found}


# ---- showing -------------------------------------------------------------------------------------

def table(figures: dict) -> list[PlainTable | str]:
    """A table a size: latency, speedup, memory, of both modes."""
    parts: list[PlainTable | str] = []
    for name, size in figures["sizes"].items():
        words = " ".join(f"{letter}={value}" for letter, value in size["shape"].items())
        rows = []
        for mode in ("inference", "training"):
            for variant, row in size[mode].items():
                if "ms" not in row:
                    rows.append([f"{mode}: {variant}", row["status"], *["-"] * 4])
                    continue
                rows.append([f"{mode}: {variant} ({row['path']})", number(row["ms"]["p50"]),
                             f"{number(row['ms']['p20'])} to {number(row['ms']['p80'])}",
                             f"{number(row.get('speedup'))}x", number(row["tflops"]), number(row["peak_mib"])])
        parts.append(PlainTable(f"{name}: {size['preset']}, {words}",
                                ["variant (path)", "ms", "p20 to p80", "speedup", "TFLOP/s", "peak MiB"], rows))
    return parts


def draw(figures: dict, under: str) -> dict[str, Figure]:
    """Speedup over vanilla, and peak memory, for each size and mode."""
    figs = {}
    for suffix, key, title, unit in (
            ("", "speedup", "Variants of the layer: speedup over the vanilla loop", "times vanilla's speed"),
            ("memory", "peak_mib", "Variants of the layer: memory above weights and their gradients", "MiB (log)")):
        sizes = figures["sizes"]
        if not any(size[mode][v].get(key) for size in sizes.values() for mode in ("inference", "training")
                   for v in VARIANTS):
            continue  # no memory is counted on a CPU
        shapes = "; ".join(f"{name}: {size['preset']} T={size['shape']['T']}" for name, size in sizes.items())
        fig, axes = figure(title, f"{shapes}  |  {under}", columns=2)
        for ax, mode in zip(axes, ("inference", "training"), strict=True):
            for offset, (variant, color) in enumerate(zip(VARIANTS, COLORS, strict=False)):
                for place, size in enumerate(sizes.values()):
                    row, at = size[mode][variant], place + (offset - 1.5) * 0.2
                    if row.get(key):
                        ax.bar(at, row[key], 0.19, color=color, gid=f"{mode} {variant} {size['preset']}")
                        ax.text(at, row[key], f" {number(row[key])}", ha="center", va="bottom", fontsize=14,
                                rotation=90)
                    elif row.get(key) == 0 or row["status"] != "ok":
                        words = "0" if row.get(key) == 0 else row["status"].partition(" (")[0]
                        ax.text(at, 0.01, words, ha="center", va="bottom", fontsize=14, rotation=90,
                                transform=ax.get_xaxis_transform())
            ax.set_xticks(range(len(sizes)), [f"{name}\n{size['shape']['E']} experts" for name, size in sizes.items()])
            ax.set(title=mode, ylabel=unit, xlim=(-0.5, len(sizes) - 0.5))
            if key == "peak_mib":
                ax.set_yscale("log")
                ax.yaxis.set_major_formatter("{x:,.10g}")
            ax.margins(y=0.15)
        legend_above(fig, [Patch(color=color, label=name) for name, color in zip(VARIANTS, COLORS, strict=False)])
        figs[suffix] = fig
    return figs


def conclude(figures: dict) -> str:
    """The full layer's gain at every size, inference and training, and which variant beats it."""
    parts = []
    for name, size in figures["sizes"].items():
        gains = [f"{number(size[mode]['full']['speedup'])} times in {mode}" for mode in ("inference", "training")
                 if "speedup" in size[mode]["full"]]
        saved = size["training"]
        words = ""
        if saved["full"].get("peak_mib") and saved["grouped"].get("peak_mib"):
            words = (f", this with {number(saved['full']['peak_mib'] / saved['grouped']['peak_mib'])} of grouped's "
                     "memory")
        better = [f"in {mode} {best} is faster, {number(ran[best]['speedup'])} times" for mode, ran, best in
                  ((mode, size[mode], faster_than_full(size[mode])) for mode in ("inference", "training")) if best]
        slower = f" ({', '.join(better)})" if better else ""
        parts.append(f"at {name} ({size['shape']['E']} experts) {' and '.join(gains)}{words}{slower}")
    return f"The full layer over the vanilla loop gains {'; '.join(parts)}."


def faster_than_full(rows: dict[str, dict]) -> str | None:
    """The fastest variant whose spread lies below the full layer's; None if none does."""
    timed = {name: row["ms"] for name, row in rows.items() if "speedup" in row}
    ahead = [name for name in timed if "full" in timed and timed[name]["p80"] < timed["full"]["p20"]]
    return min(ahead, key=lambda name: timed[name]["p50"], default=None)


STUDY = Study("variants", "What does each variant of the layer cost, in inference and in training?", measure, table,
              draw, conclude, arguments=arguments)

if __name__ == "__main__":
    raise SystemExit(main(STUDY))
