"""What do other libraries' MoE layers do at the same layer, and what can each do that the others cannot?

    python labs/studies/peers.py [--preset qwen3-30b-a3b] [--tokens 16384]

Each library is used through its own API (common/peers.py), with this run's weights and inputs, held to the float64
oracle, and timed beside the ladder in the same rounds where it is installed. Where it is not, its row says how to get
it. What each can do is read from its documentation and source; the table names them.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from common.charts import ROUNDED
from common.config import PRESETS, Workload, dtype_name, preset
from common.level import discover  # first of those that import Triton: it picks its interpreter without a GPU
from common.peers import PEERS
from common.references import BOUND, REFERENCES
from common.run import run_workload
from common.show import number, percent, status_text
from labs.studies.study import COLORS, Options, PlainTable, Study, figure, legend_above, main

FEATURES = ("forward", "backward", "routes itself", "gather in the GEMM", "SwiGLU in the GEMM", "token rounding",
            "FP8 or FP4", "several GPUs", "runs below sm_90")


@dataclass(frozen=True)
class Library:
    """How to get a library and what it does. `has`: y yes, p in part, n no, in the order of FEATURES. `only`: what none
    of the others here has. source: where that can be read."""

    name: str
    install: str
    has: str
    only: str
    source: str


LIBRARIES = (
    Library("this project", "pip install -e . in the repository; or run labs/full_moe.py as it is", "yyyyyynpy",
            "a ladder whose every level passes one oracle; token rounding in four modes; runs on a CPU too",
            "labs/full_moe.py, labs/kernels"),
    Library("triton_kernels", "pip install vllm, then put vllm/third_party on PYTHONPATH; or Triton's repository",
            "ynyyynypy", "MXFP4 weights in plain Triton",
            "github.com/triton-lang/triton, python/triton_kernels"),
    Library("transformers", "pip install 'transformers>=5'", "yyynnnppy",
            "any of its MoE models, with a choice of experts backends a line away",
            "huggingface.co/docs/transformers, experts interface"),
    Library("vLLM fused_moe", "pip install vllm", "ynyynnyyy",
            "tuned tile tables for hundreds of shapes and GPUs; serving",
            "docs.vllm.ai, fused MoE kernel features"),
    Library("ScatterMoE", "pip install git+https://github.com/shawntan/scattermoe", "yynynnnny",
            "scattered to scattered GEMMs, an API of one function to build layers from (arXiv 2403.08245)",
            "github.com/shawntan/scattermoe"),
    Library("SonicMoE", "pip install sonic-moe (CUDA 12.9 on, Python 3.12, Hopper on)",
            "yyyyyyppn", "the smallest set of tensors kept for backward (arXiv 2512.14080)",
            "github.com/Dao-AILab/sonic-moe"),
    Library("DeepGEMM", "git clone --recursive github.com/deepseek-ai/DeepGEMM, then its install.sh (Hopper on)",
            "ynnnnnypn", "FP8 grouped GEMMs with fine-grained scales, compiled at run time",
            "github.com/deepseek-ai/DeepGEMM"),
)
WORDS = {"y": "yes", "p": "in part", "n": "-"}


def arguments(parser: argparse.ArgumentParser) -> None:
    """The layer to compare on."""
    parser.add_argument("--preset", choices=PRESETS, help="default: qwen3-30b-a3b on a GPU, tiny without")
    parser.add_argument("--tokens", type=int, help="default: 16384 on a GPU, 64 without")


class Say:
    """A common.run.Reporter that says a stage when it changes."""

    def __init__(self, options: Options):
        self.options, self.said = options, ""

    def stage(self, text: str, long: bool = False) -> None:
        """Rounds follow each other too fast to be said one by one."""
        if not text.startswith("round ") and text != self.said:
            self.said = text
            self.options.say(text)

    def update(self, run: object) -> None:
        """Rows are shown at the end."""


def measure(options: Options) -> dict:
    """The ladder's fastest levels, the references and every peer in one run."""
    args, full, device = options.args, options.full, options.device
    cfg = preset(args.preset or ("qwen3-30b-a3b" if full else "tiny"))
    T = args.tokens if args.tokens is not None else (16384 if full else 64)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    wanted = (4, 6, 8) if device.type == "cuda" else (0, 1)
    levels = [loaded for loaded in discover() if loaded.level.number in wanted]
    run = run_workload(Workload(cfg, T, dtype), levels, REFERENCES + PEERS, device, 12 if full else 2, Say(options))
    rows = [{"kind": row.kind, "name": f"level {row.number} {row.name}" if row.kind == "level" else row.name,
             "variant": row.variant, "status": row.status, "reason": row.reason, "shown": status_text(row),
             "rel_err": row.rel_err, "ms": vars(row.wall_ms) if row.timed else None,
             "gpu_ms": row.gpu_ms.p50 if row.gpu_ms else None, "peak_mib": row.peak_mib,
             "bound_share": row.bound_share} for row in run.rows]
    return {"preset": cfg.name, "shape": run.shape, "dtype": dtype_name(dtype), "rows": rows,
            "roofline_ms": run.roofline_ms}


def table(figures: dict) -> list[PlainTable | str]:
    """Times; how to get each; what each can do, and with what source."""
    words = " ".join(f"{letter}={value}" for letter, value in figures["shape"].items())
    timed = PlainTable(f"{figures['preset']}, {words}, {figures['dtype']}", ["", "rel. error", "wall ms", "p20 to p80",
                                                                            "GPU ms", "peak MiB", "of two bare bmm"],
                       [[row["name"], "-" if row["rel_err"] is None else f"{row['rel_err']:.1e}",
                         number(row["ms"]["p50"]) if row["ms"] else row["shown"],
                         f"{number(row['ms']['p20'])} to {number(row['ms']['p80'])}" if row["ms"] else "",
                         number(row["gpu_ms"]), number(row["peak_mib"]), percent(row["bound_share"])]
                        for row in figures["rows"]])
    parts: list[PlainTable | str] = [timed]
    parts += [f"{row['name']}: {row['reason']}" for row in figures["rows"] if row["status"] == "not installed"]
    parts.append(PlainTable("How to get it, and what only it has", ["library", "install", "only here", "source"],
                            [[one.name, one.install, one.only, one.source] for one in LIBRARIES]))
    parts.append(PlainTable("What each can do (read, not run: see its source)", ["", *(one.name for one in LIBRARIES)],
                            [[feature, *(WORDS[one.has[place]] for one in LIBRARIES)]
                             for place, feature in enumerate(FEATURES)]))
    return parts


def draw(figures: dict, under: str) -> dict[str, Figure]:
    """A bar a timed row; rows without a time say why."""
    words = " ".join(f"{letter}={value}" for letter, value in figures["shape"].items())
    fig, (ax,) = figure("The same layer in each library's own API", f"{figures['preset']}: {words}, {figures['dtype']}"
                                                                    f"  |  {under}")
    colors = {"level": COLORS[0], "reference": COLORS[2], "peer": COLORS[3]}
    rows = sorted(figures["rows"], key=lambda row: row["ms"]["p50"] if row["ms"] else float("inf"))
    for place, row in enumerate(rows):
        if row["ms"]:
            ax.barh(place, row["ms"]["p50"], color=colors[row["kind"]], gid=row["name"],
                    **(ROUNDED if row["variant"] == "rounded" else {}))
            ax.text(row["ms"]["p50"], place, f" {number(row['ms']['p50'])} ms", va="center")
        else:
            ax.text(0.01, place, row["shown"], va="center", color="#555", transform=ax.get_yaxis_transform())
    ax.set_yticks(range(len(rows)), [row["name"] for row in rows])
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.set(xscale="log", xlabel="milliseconds a forward, wall (log)")
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_formatter("{x:g}")
    ax.margins(x=0.12)
    names = {"level": "this project", "reference": "references", "peer": "other libraries"}
    handles = [Patch(color=color, label=names[kind]) for kind, color in colors.items()]
    if any(row["variant"] == "rounded" for row in rows):
        handles.append(Patch(facecolor=COLORS[0], label="rounded: another function than top-k", **ROUNDED))
    legend_above(fig, handles)
    return {"": fig}


def conclude(figures: dict) -> str:
    """The fastest of ours that computes the same function against the fastest of the others that were there."""
    ready = [row for row in figures["rows"] if row["ms"] and row["name"] != BOUND]
    absent = sum(row["status"] == "not installed" for row in figures["rows"])
    ours = [row for row in ready if row["kind"] == "level" and row["variant"] == "exact"]
    others = [row for row in ready if row["kind"] != "level"]
    words = f"{absent} libraries were not installed and are not in this" if absent else "all libraries were there"
    if not ours or not others:
        return f"There is nothing to compare here: {words}."
    mine, other = (min(rows, key=lambda row: row["ms"]["p50"]) for rows in (ours, others))
    gain = other["ms"]["p50"] / mine["ms"]["p50"]
    return (f"{mine['name']} takes {number(mine['ms']['p50'])} ms and {other['name']}, the fastest of the others that "
            f"ran, {number(other['ms']['p50'])}: {number(gain)} times ours; {words}.")


STUDY = Study("peers", "What do other libraries' layers do at the same layer, and what can only one of them do?",
              measure, table, draw, conclude, arguments=arguments)

if __name__ == "__main__":
    raise SystemExit(main(STUDY))
