"""The JSON that a run leaves: its fields, and the only code that reads or writes it.

A file holds the runs of one GPU and one preset. A run is one workload, timed together: rows of one
run may be compared, rows of two may not, so each run carries its own environment and ceilings.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from common.config import Workload, dtype_name
from common.measure import Spread

SCHEMA = 1
STATUSES = ("ok", "failed", "oom", "unsupported", "interpreted", "not installed")


@dataclass
class Row:
    """One level, reference or peer in one run. Times are milliseconds; None was not measured.

    kind: level, reference or peer. variant: exact or rounded routing. status: one of STATUSES, with
    `reason` where it is not ok. build_s: building, compiling and the first call. samples: timed
    calls; rounds_ms: each of them, in the order of the rounds, for drifts and outliers to show in.
    sustained_ms: of calls that followed their like for a while (measure.sustain), where arithmetic sets the
    pace; sustained_turns_ms: the median of each turn of them.
    peak_mib: memory above weights, input and output. roofline_share and bound_share: the roofline's
    and the cuBLAS bound's time over this one's. rounding: of a rounded row, tile, mode, what changed
    (see labs/kernels/rounding.py) and gpu_us, the microseconds of rounding's own kernels; its tflops
    and shares count the rows that it computes, not T*K. version: of another library.
    """

    kind: str
    number: int | None
    name: str
    adds: str
    status: str
    variant: str = "exact"
    reason: str = ""
    rel_err: float | None = None
    worst_row_err: float | None = None
    error_bound: float | None = None
    wall_ms: Spread | None = None
    gpu_ms: Spread | None = None
    sustained_ms: Spread | None = None
    sustained_turns_ms: list[float] = field(default_factory=list)
    samples: int = 0
    rounds_ms: list[float] = field(default_factory=list)
    launches: int | None = None
    host_syncs: int | None = None
    build_s: float | None = None
    peak_mib: float | None = None
    tflops: float | None = None
    roofline_share: float | None = None
    bound_share: float | None = None
    rounding: dict[str, object] | None = None
    version: str = ""

    @property
    def timed(self) -> bool:
        """Whether the row has a time that may be compared: not red, not interpreted."""
        return self.status == "ok" and self.wall_ms is not None


@dataclass
class Run:
    """One workload on one machine. `shape` has T, D, F, E, K; `partial` means it was interrupted.
    roofline_ms: the larger of FLOPs over the measured matmul rate and least bytes over the measured
    copy rate; None without measured ceilings."""

    preset: str
    shape: dict[str, int]
    routing: str
    dtype: str
    seed: int
    rounds: int
    environment: dict[str, object]
    ceilings: dict[str, float]
    active_experts: int
    flops: int
    least_bytes: int
    roofline_ms: float | None
    partial: bool = False
    rows: list[Row] = field(default_factory=list)

    @property
    def key(self) -> tuple:
        """What tells two runs of a file apart."""
        return (tuple(sorted(self.shape.items())), self.routing, self.dtype)

    @property
    def levels(self) -> list[Row]:
        """The ladder's rows, in order."""
        return [row for row in self.rows if row.kind == "level"]

    @property
    def is_arithmetic_bound(self) -> bool:
        """Whether by the measured ceilings its FLOPs take longer than its least bytes. False without ceilings."""
        return bool(self.ceilings) and (self.flops / self.ceilings["matmul_tflops"]
                                        > self.least_bytes / self.ceilings["copy_tbps"])

    def row(self, name: str) -> Row | None:
        """The row called `name`, or None."""
        return next((row for row in self.rows if row.name == name), None)


def new_run(workload: Workload, rounds: int, environment: dict, active_experts: int, flops: int,
            least_bytes: int) -> Run:
    """A run of `workload` with nothing measured yet."""
    cfg = workload.config
    shape = {"T": workload.T, "D": cfg.D, "F": cfg.F, "E": cfg.E, "K": cfg.K}
    return Run(cfg.name, shape, workload.routing, dtype_name(workload.dtype), workload.seed, rounds,
               environment, {}, active_experts, flops, least_bytes, None)


@dataclass(frozen=True)
class Speedup:
    """How a timed level compares: `step` with the timed level before it (None for the first), `total`
    with the first, whose number is `base`. Ratios of median wall times within one run. The step is
    `clear` if the two spreads, 20th to 80th percentile, do not overlap. An exact level's step is from the
    exact level before it, a rounded one's from the rounded one before it, or the exact if there is none."""

    step: float | None
    total: float
    base: int
    clear: bool = True


def speedups(run: Run) -> dict[str, Speedup]:
    """Level's name -> Speedup, for the run's timed levels."""
    found: dict[str, Speedup] = {}
    timed = [row for row in run.levels if row.timed]
    for row in timed:
        below = [other for other in timed if other.number < row.number]
        before = next((other for variant in (row.variant, "exact") for other in reversed(below)
                       if other.variant == variant), None)
        step = before.wall_ms.p50 / row.wall_ms.p50 if before else None
        clear = before is None or row.wall_ms.p80 < before.wall_ms.p20 or before.wall_ms.p80 < row.wall_ms.p20
        found[row.name] = Speedup(step, timed[0].wall_ms.p50 / row.wall_ms.p50, timed[0].number, clear)
    return found


def gpu_slug(environment: dict[str, object]) -> str:
    """`NVIDIA H200` -> `h200`, no GPU -> `cpu`: the first part of a results file's name."""
    if environment["sm"] is None:
        return "cpu"
    name = re.sub(r"nvidia|geforce|tesla", "", str(environment["gpu"]).lower())
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def results_path(folder: Path, environment: dict[str, object], preset: str, partial: bool = False) -> Path:
    """Where a run belongs in `folder`. A partial run has a file of its own: it must not replace a whole one."""
    return folder / f"{gpu_slug(environment)}_{preset}{'_partial' if partial else ''}.json"


def prepare_folder(folder: Path) -> None:
    """Make `folder` and prove that it can be written. Raises ValueError naming it, before anything is measured."""
    try:
        if folder.is_file():
            raise ValueError(f"--out {folder} is a file, give a folder")
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".probe"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise ValueError(f"--out {folder} cannot be written: {error}") from error


def save(folder: Path, run: Run) -> Path:
    """Write `run` into its file in `folder`, in place of an earlier run of the same workload; other runs
    stay. The file is replaced whole or not at all. Raises ValueError if the file there has another schema."""
    path = results_path(folder, run.environment, run.preset, run.partial)
    runs = load(path) if path.exists() else []
    runs = sorted([old for old in runs if old.key != run.key] + [run], key=lambda one: one.shape["T"])
    text = json.dumps({"schema": SCHEMA, "runs": [dataclasses.asdict(one) for one in runs]}, indent=1)
    scratch = path.with_suffix(".tmp")
    scratch.write_text(text + "\n")
    os.replace(scratch, path)
    return path


def load(path: Path) -> list[Run]:
    """The runs of a results file, by rising T. Raises ValueError, naming the file, if it is not a results file
    or has another schema; FileNotFoundError if there is none."""
    try:
        data = json.loads(Path(path).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    except IsADirectoryError as error:
        raise ValueError(f"{path} is a folder: name a results file in it") from error
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        found = data.get("schema") if isinstance(data, dict) else None
        raise ValueError(f"{path} has results schema {found!r}, this version reads {SCHEMA}: run it again")
    try:
        return [_run(run) for run in data["runs"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} says schema {SCHEMA} but lacks what that has: {error!r}") from error


def _run(data: dict) -> Run:
    rows = [
        Row(**{key: Spread(**value) if key in ("wall_ms", "gpu_ms", "sustained_ms") and value else value
               for key, value in row.items()})
        for row in data["rows"]
    ]
    return Run(**{**data, "rows": rows})
