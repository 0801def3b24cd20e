"""Why does irregular work hurt, and which grouped GEMM bears it?

    python labs/studies/grouped_gemm.py

One projection, rows (R, K) sorted by expert times (E, N, K), six ways, while the load goes from even to one expert
with all rows, and while the experts go from 4 to 256:

    loop of cuBLAS   the host reads the row counts, then one torch.mm an expert
    padded bmm       every expert padded to the fullest one's rows, one torch.bmm
    grouped_mm       torch.nn.functional.grouped_mm
    Triton loop      this file's tile, a launch an expert
    persistent       the same tile, one launch: a program an SM walks through all experts' tiles
    level 8's        labs/kernels/grouped_gemm.py: TMA, a warp role for loading, others for multiplying

Speed is from the first kernel's start to the last one's end, so a loop's gaps count and one launch's own cost does not;
the wall time of a call stands beside it. Which SM ran which expert's tile when is read from timestamps that the two
Triton kernels write.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.pyplot import get_cmap
from torch.nn.functional import grouped_mm

from common.level import Unsupported  # first: it picks Triton's interpreter where there is no GPU
from common.measure import WallClock, profile_call, relative_error
from common.show import number, percent
from labs.kernels.grouped_gemm import down
from labs.kernels.routing import sm_count
from labs.kernels.tiles import plan_tiles
from labs.studies.study import (
    COLORS,
    GpuClock,
    Options,
    PlainTable,
    Study,
    figure,
    main,
    rate,
    spread_line,
    time_together,
)

import triton
import triton.language as tl

# R routed rows, E experts. In this file N and K are the projection's output and inner width.

METHODS = ("loop of cuBLAS", "padded bmm", "grouped_mm", "Triton loop", "persistent", "level 8's")
INTERPRETED = ("Triton loop", "persistent")  # where there is no GPU
LOG_FIELDS = 4  # SM, expert, start and end in nanoseconds


# ---- kernels -------------------------------------------------------------------------------------

@triton.jit
def nanoseconds():
    """The GPU's own clock, the same for all SMs."""
    return tl.inline_asm_elementwise("mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1)


@triton.jit
def this_sm():
    """The number of the SM that runs this program."""
    return tl.inline_asm_elementwise("mov.u32 $0, %smid;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def multiply_tile(a_ptr, w_ptr, out_ptr, log_ptr, tile, expert, row_start, row_end, tile_in_expert, N, K,
                  BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, LOG: tl.constexpr):
    """out[rows] = a[rows] @ w[expert].T for one tile, rows first along an expert. Float32 accumulator.

    With LOG, writes where and when it ran: (SM, expert, start, end) of `tile`.
    """
    if LOG:
        tl.debug_barrier()
        start = nanoseconds()
    row_tiles = tl.cdiv(row_end - row_start, BLOCK_M)
    row = row_start + tile_in_expert % row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_in_expert // row_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    # Past the edge, load the last row or column again: cheaper than a mask, and never stored.
    a_ptrs = a_ptr + (tl.minimum(row, row_end - 1).to(tl.int64) * K)[:, None] + depth[None, :]
    w_ptrs = w_ptr + (expert.to(tl.int64) * N * K + tl.minimum(column, N - 1) * K)[None, :] + depth[:, None]
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        a = tl.load(a_ptrs + k, mask=depth[None, :] < K - k, other=0.0)
        w = tl.load(w_ptrs + k, mask=depth[:, None] < K - k, other=0.0)
        accumulator = tl.dot(a, w, accumulator, input_precision="ieee")
    out_ptrs = out_ptr + row.to(tl.int64)[:, None] * N + column[None, :]
    tl.store(out_ptrs, accumulator, mask=(row < row_end)[:, None] & (column < N)[None, :])
    if LOG:
        tl.debug_barrier()
        tl.store(log_ptr + tile * 4 + 0, this_sm().to(tl.int64))
        tl.store(log_ptr + tile * 4 + 1, expert.to(tl.int64))
        tl.store(log_ptr + tile * 4 + 2, start)
        tl.store(log_ptr + tile * 4 + 3, nanoseconds())


@triton.jit(do_not_specialize=["row_start", "row_end", "expert", "first_tile"])
def one_expert_kernel(
    a_ptr,  # (R, K)
    w_ptr,  # (E, N, K)
    out_ptr,  # (R, N)
    log_ptr,  # (tiles, 4) int64
    expert, row_start, row_end, first_tile, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, LOG: tl.constexpr,
):
    """One expert. Grid (its tiles,): a program owns one tile. Float32 accumulator."""
    tile = tl.program_id(0)
    multiply_tile(a_ptr, w_ptr, out_ptr, log_ptr, first_tile + tile, expert, row_start, row_end, tile, N, K,
                  BLOCK_M, BLOCK_N, BLOCK_K, LOG)


@triton.jit
def persistent_kernel(
    a_ptr,  # (R, K)
    w_ptr,  # (E, N, K)
    out_ptr,  # (R, N)
    log_ptr,  # (tiles, 4) int64
    offsets_ptr,  # (E + 1,) int32
    E, N, K,
    E_POW2: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, LOG: tl.constexpr,
):
    """All experts. Grid (SMs,): a program owns every grid-th tile. Float32 accumulator. No count leaves the device."""
    experts = tl.arange(0, E_POW2)
    starts = tl.load(offsets_ptr + experts, mask=experts < E, other=0)
    ends = tl.load(offsets_ptr + experts + 1, mask=experts < E, other=0)
    tiles = tl.cdiv(ends - starts, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    tile_ends = tl.cumsum(tiles, 0)
    for tile in range(tl.program_id(0), tl.sum(tiles, 0), tl.num_programs(0)):
        expert = tl.sum((tile_ends <= tile).to(tl.int32), 0)
        tile_in_expert = tile - tl.sum(tl.where(experts < expert, tiles, 0), 0)
        multiply_tile(a_ptr, w_ptr, out_ptr, log_ptr, tile, expert, tl.load(offsets_ptr + expert),
                      tl.load(offsets_ptr + expert + 1), tile_in_expert, N, K, BLOCK_M, BLOCK_N, BLOCK_K, LOG)


# ---- a case and the six ways through it ----------------------------------------------------------

@dataclass(frozen=True)
class Size:
    """What is multiplied, and in tiles of what size. 128 x 256 x 64 with 8 warps is level 4's largest tile."""

    R: int
    N: int
    K: int
    block_M: int = 128
    block_N: int = 256
    block_K: int = 64
    warps: int = 8
    stages: int = 3


FULL = Size(R=65536, N=1536, K=2048)  # qwen3-30b-a3b's gate and up at 8192 tokens
QUICK = Size(R=80, N=16, K=32, block_M=16, block_N=16, block_K=16, warps=4)


@dataclass
class Case:
    """Sorted rows, weights and row counts on the device; `out` takes a method's result."""

    size: Size
    a_RK: torch.Tensor
    w_ENK: torch.Tensor
    counts_E: torch.Tensor
    offsets_E1: torch.Tensor
    out_RN: torch.Tensor

    @property
    def E(self) -> int:
        """Experts."""
        return self.w_ENK.shape[0]


def apportion(R: int, shares_E: torch.Tensor) -> torch.Tensor:
    """R rows in the given shares, whole rows, largest remainders first: (E,) int64 that sum to R."""
    exact_E = shares_E.double() / shares_E.double().sum() * R
    counts_E = exact_E.floor().long()
    order_E = (exact_E - counts_E).argsort(descending=True, stable=True)
    counts_E[order_E[:R - int(counts_E.sum())]] += 1
    return counts_E


def zipf_counts(R: int, E: int, exponent: float) -> torch.Tensor:
    """Rows an expert when popularity falls as 1 / rank ** exponent (infinite: all rows to one), ranks dealt out."""
    shares_E = torch.arange(1, E + 1, dtype=torch.float64) ** -exponent
    return apportion(R, shares_E[torch.randperm(E, generator=torch.Generator().manual_seed(0))])


def make_case(size: Size, counts_E: torch.Tensor, device: torch.device, dtype: torch.dtype) -> Case:
    """Unit-scale random rows and weights for these counts."""
    generator = torch.Generator(device).manual_seed(0)
    E = counts_E.numel()

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

    offsets_E1 = torch.cat([torch.zeros(1, dtype=torch.int64), counts_E.cumsum(0)]).to(torch.int32).to(device)
    w_ENK = torch.stack([draw(size.N, size.K) * size.K ** -0.5 for _ in range(E)])
    return Case(size, draw(size.R, size.K), w_ENK, counts_E.to(device), offsets_E1,
                torch.empty(size.R, size.N, dtype=dtype, device=device))


def loop_of_cublas(case: Case) -> None:
    """One torch.mm an expert; the counts come to the host first."""
    row = 0
    for e, count in enumerate(case.counts_E.tolist()):
        if count:
            torch.mm(case.a_RK[row:row + count], case.w_ENK[e].T, out=case.out_RN[row:row + count])
        row += count


def padded_bmm(case: Case) -> None:
    """Rows copied to (E, fullest, K), one bmm, rows copied back. How many to pad to, the host has to wait for."""
    size, E = case.size, case.E
    most = int(case.counts_E.max())
    expert_R = torch.repeat_interleave(torch.arange(E, device=case.a_RK.device), case.counts_E, output_size=size.R)
    row_R = torch.arange(size.R, device=case.a_RK.device)
    place_R = expert_R * most + row_R - case.offsets_E1[expert_R]
    padded = case.a_RK.new_zeros(E * most, size.K)
    padded[place_R] = case.a_RK
    y = torch.bmm(padded.view(E, most, size.K), case.w_ENK.transpose(1, 2))
    torch.index_select(y.view(E * most, size.N), 0, place_R, out=case.out_RN)


def torch_grouped_mm(case: Case) -> None:
    """PyTorch's own."""
    case.out_RN = grouped_mm(case.a_RK, case.w_ENK.transpose(1, 2), offs=case.offsets_E1[1:])


def tile_options(size: Size) -> dict[str, int]:
    """Block sizes, warps and stages as a launch takes them."""
    return {"BLOCK_M": size.block_M, "BLOCK_N": size.block_N, "BLOCK_K": size.block_K, "num_warps": size.warps,
            "num_stages": size.stages}


def triton_loop(case: Case, log: torch.Tensor | None = None) -> None:
    """A launch an expert; the counts come to the host first."""
    size, row, tile = case.size, 0, 0
    for e, count in enumerate(case.counts_E.tolist()):
        if count:
            tiles = triton.cdiv(count, size.block_M) * triton.cdiv(size.N, size.block_N)
            one_expert_kernel[(tiles,)](case.a_RK, case.w_ENK, case.out_RN, log if log is not None else case.out_RN,
                                        e, row, row + count, tile, size.N, size.K, LOG=log is not None,
                                        **tile_options(size))
            tile += tiles
        row += count


def persistent(case: Case, log: torch.Tensor | None = None) -> None:
    """One launch of a program an SM."""
    size = case.size
    programs = sm_count(case.a_RK.device) if case.a_RK.is_cuda else 4
    persistent_kernel[(programs,)](case.a_RK, case.w_ENK, case.out_RN, log if log is not None else case.out_RN,
                                   case.offsets_E1, case.E, size.N, size.K, E_POW2=triton.next_power_of_2(case.E),
                                   LOG=log is not None, **tile_options(size))


def level_8(case: Case) -> None:
    """The warp-specialised kernel, its tile table included. Raises Unsupported off sm_90."""
    if not case.a_RK.is_cuda or torch.cuda.get_device_capability() != (9, 0):
        raise Unsupported("needs sm_90")
    plan = plan_tiles(case.offsets_E1, case.size.R)
    down(case.a_RK, case.w_ENK, plan, case.out_RN, sm_count(case.a_RK.device))


CALLS: dict[str, Callable[[Case], None]] = dict(zip(
    METHODS, (loop_of_cublas, padded_bmm, torch_grouped_mm, triton_loop, persistent, level_8), strict=True))


def utilisation(method: str, counts_E: torch.Tensor, block_M: int) -> float | None:
    """Rows over the rows of the tiles that hold them; None where the tile is a library's own affair."""
    R = int(counts_E.sum())
    if method == "padded bmm":
        return R / (counts_E.numel() * int(counts_E.max()))
    if method in ("Triton loop", "persistent", "level 8's"):
        rows = block_M // 2 if method == "level 8's" else block_M  # whose last tiles may be half ones
        return R / int(((counts_E + rows - 1) // rows * rows).sum())
    return None


# ---- measuring -----------------------------------------------------------------------------------

def measure_case(case: Case, options: Options) -> dict:
    """Check every method against float64, then time those that run here together."""
    on_gpu = options.device.type == "cuda"
    ref_RN = torch.cat([rows.double() @ w.double().T for rows, w in
                        zip(case.a_RK.split(case.counts_E.tolist()), case.w_ENK, strict=True)])
    bound = 2 * torch.finfo(case.a_RK.dtype).eps + 1e-6
    found: dict[str, dict] = {}
    ready: dict[str, Callable[[], None]] = {}
    for name, call in CALLS.items():
        case.out_RN = torch.full_like(case.out_RN, float("nan"))
        try:
            call(case)
        except Unsupported as lack:
            found[name] = {"status": f"n/a ({lack})"}
            continue
        except torch.OutOfMemoryError:
            found[name] = {"status": "out of memory"}
            continue
        error = relative_error(case.out_RN, ref_RN)
        if not error <= bound:
            raise RuntimeError(f"{name}: relative error {error:.2e} is over {bound:.2e}, so it is not timed")
        launches = profile_call(lambda call=call: call(case)).launches if on_gpu else None
        status = "interpreted" if not on_gpu and name in INTERPRETED else "ok"
        found[name] = {"status": status, "rel_err": error, "launches": launches,
                       "utilisation": utilisation(name, case.counts_E.cpu(), case.size.block_M)}
        ready[name] = lambda call=call: call(case)
    del ref_RN
    rounds = 12 if options.full else 2
    wall = time_together(ready, WallClock(options.device), rounds, 0.5)
    times = time_together(ready, GpuClock(options.device), rounds, 0.5) if on_gpu else wall
    flops = 2 * case.size.R * case.size.N * case.size.K
    for name, spread in times.items():
        found[name] |= {"ms": spread, "wall_ms": wall[name], "tflops": rate(flops, spread)}
    return found


def schedule(call: Callable[[Case, torch.Tensor], None], case: Case) -> dict:
    """Where and when each tile ran: the log that the kernel wrote, from its first start on, in microseconds."""
    size = case.size
    row_tiles = (case.counts_E.cpu() + size.block_M - 1) // size.block_M
    tiles = int(row_tiles.sum()) * triton.cdiv(size.N, size.block_N)
    call(case, torch.zeros(tiles, LOG_FIELDS, dtype=torch.int64, device=case.a_RK.device))  # compile
    log = torch.zeros(tiles, LOG_FIELDS, dtype=torch.int64, device=case.a_RK.device)
    call(case, log)
    sm, expert, start, end = log.cpu().T
    first = int(start.min())
    busy, span = (end - start).double().sum().item(), int(end.max()) - first
    sms = sm_count(case.a_RK.device)
    return {"sms": sms, "sm": sm.tolist(), "expert": expert.tolist(),
            "start_us": ((start - first) / 1e3).tolist(), "end_us": ((end - first) / 1e3).tolist(),
            "span_us": span / 1e3, "idle_share": 1 - busy / (sms * span)}


def measure(options: Options) -> dict:
    """The sweep over skew, the sweep over experts, and two schedules."""
    size = FULL if options.full else QUICK
    device = options.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    skews = [("uniform", 0.0), ("0.5", 0.5), ("1", 1.0), ("1.5", 1.5), ("one-hot", float("inf"))]
    if not options.full:
        skews = [skews[0], skews[4]]
    fixed_E = 64 if options.full else 4
    by_skew, by_experts = [], []
    for label, exponent in skews:
        options.say(f"load skew {label}, {fixed_E} experts")
        counts_E = zipf_counts(size.R, fixed_E, exponent)
        case = make_case(size, counts_E, device, dtype)
        by_skew.append({"label": label, "E": fixed_E, "fullest_over_mean": counts_E.max().item() * fixed_E / size.R,
                        "methods": measure_case(case, options)})
        del case
    for E in (4, 16, 64, 128, 256) if options.full else (4, 6):
        options.say(f"{E} experts, rows as a random router deals them")
        picks = torch.randint(E, (size.R,), generator=torch.Generator().manual_seed(1))
        counts_E = torch.bincount(picks, minlength=E)
        case = make_case(size, counts_E, device, dtype)
        by_experts.append({"E": E, "fullest_over_mean": counts_E.max().item() * E / size.R,
                           "methods": measure_case(case, options)})
        del case
    schedules = {}
    if device.type == "cuda":
        options.say("two schedules")
        case = make_case(size, zipf_counts(size.R, fixed_E, 1.0), device, dtype)
        schedules = {"Triton loop": schedule(triton_loop, case), "persistent": schedule(persistent, case)}
    return {"R": size.R, "N": size.N, "K": size.K, "tile": [size.block_M, size.block_N, size.block_K],
            "by_skew": by_skew, "by_experts": by_experts, "schedules": schedules}


# ---- showing -------------------------------------------------------------------------------------

def cell(method: dict) -> str:
    """TFLOP/s, launches and utilisation of one method; an interpreted time in brackets."""
    if "tflops" not in method:
        return method["status"]
    if method["status"] == "interpreted":
        return f"({number(method['ms']['p50'])} ms)"
    parts = [f"{number(method['tflops']['p50'])} TFLOP/s ({number(method['wall_ms']['p50'])} ms wall)"]
    if method["launches"] is not None:
        parts.append(f"{method['launches']} launches")
    if method["utilisation"] is not None:
        parts.append(f"{percent(method['utilisation'])} full")
    return ", ".join(parts)


def table(figures: dict) -> list[PlainTable | str]:
    """One table a sweep, a row a method."""
    parts: list[PlainTable | str] = []
    for key, head in (("by_skew", "load"), ("by_experts", "experts")):
        columns = [f"{head} {point.get('label', point['E'])}" for point in figures[key]]
        rows = [[name, *(cell(point["methods"][name]) for point in figures[key])] for name in METHODS]
        parts.append(PlainTable(f"R={figures['R']:,} N={figures['N']:,} K={figures['K']:,}; full: rows over rows of "
                                f"their tiles", ["", *columns], rows))
    for name, one in figures["schedules"].items():
        parts.append(f"{name}: {len(one['sm']):,} tiles in {number(one['span_us'])} us, SMs idle "
                     f"{percent(one['idle_share'])} of it")
    if not figures["schedules"]:
        parts.append("schedule: n/a (needs CUDA)")
    return parts


def draw(figures: dict, under: str) -> dict[str, Figure]:
    """TFLOP/s against skew and against experts; and the two schedules, where they were recorded."""
    shape = f"R={figures['R']:,} rows, N={figures['N']:,}, K={figures['K']:,}  |  {under}"
    fig, (left, right) = figure("Irregular work: who bears it", shape, columns=2)
    for name, color in zip(METHODS, COLORS, strict=False):
        for ax, key, places in ((left, "by_skew", range(len(figures["by_skew"]))),
                                (right, "by_experts", [point["E"] for point in figures["by_experts"]])):
            methods = [point["methods"][name] for point in figures[key]]
            spread_line(ax, list(places), [m.get("tflops") if m["status"] == "ok" else None for m in methods], name,
                        color)
    labels = [f"{point['label']}\n({number(point['fullest_over_mean'], 2)}x)" for point in figures["by_skew"]]
    left.set_xticks(range(len(labels)), labels)
    left.set(xlabel="Zipf exponent of the load (fullest expert over mean)",
             ylabel="TFLOP/s, from the first kernel's start to the last one's end",
             title=f"Load skew, {figures['by_skew'][0]['E']} experts")
    right.set_xscale("log", base=2)
    right.set_xticks([point["E"] for point in figures["by_experts"]], [point["E"] for point in figures["by_experts"]])
    right.set(xlabel="experts", title="Number of experts, near-even load")
    for ax in (left, right):
        ax.set_ylim(bottom=0)
        ax.grid(alpha=0.3)
    right.legend(fontsize=14, loc="lower left")
    figs = {"": fig}
    if figures["schedules"]:
        figs["schedule"] = draw_schedules(figures["schedules"], shape)
    return figs


def draw_schedules(schedules: dict, under: str) -> Figure:
    """A row an SM, a bar a tile, a colour an expert: above with a launch an expert, below with one for all."""
    fig, axes = figure("Which SM ran which expert's tile, when (colours repeat)", under, rows=2)
    colors = get_cmap("tab20")
    end = max(one["span_us"] for one in schedules.values())
    for ax, (name, one) in zip(axes, schedules.items(), strict=True):
        boxes = [[(start, sm), (stop, sm), (stop, sm + 1), (start, sm + 1)]
                 for sm, start, stop in zip(one["sm"], one["start_us"], one["end_us"], strict=True)]
        ax.add_collection(PolyCollection(boxes, facecolors=[colors(e % 20) for e in one["expert"]], gid=name,
                                         edgecolors="none", antialiased=False))
        ax.set(xlim=(0, end), ylim=(0, one["sms"]), ylabel="SM",
               title=f"{name}: {number(one['span_us'])} us, SMs idle {percent(one['idle_share'])}")
    axes[-1].set_xlabel("microseconds since the first tile began (the kernels' own timestamps)")
    return fig


def conclude(figures: dict) -> str:
    """How much of its even-load speed each way keeps at its worst skew, or how much faster it is there; who wins at
    most experts, on which clock."""
    def speeds(point: dict) -> dict[str, float]:
        return {name: m["tflops"]["p50"] for name, m in point["methods"].items() if m["status"] == "ok"}

    even, *others = [speeds(point) for point in figures["by_skew"]]
    kept = sorted(((name, min(other.get(name, 0.0) for other in others) / even[name]) for name in even),
                  key=lambda item: -item[1])
    slower = ", ".join(f"{name} {percent(share)}" for name, share in kept if round(share, 2) <= 1)
    faster = ", ".join(f"{name} {number(share)} times as fast" for name, share in kept if round(share, 2) > 1)
    who = "these keep this share of their" if faster else "each keeps this share of its"
    skewed = [f"{who} speed at an even load: {slower}"] if slower else []
    skewed += [f"these are faster than at an even load: {faster}"] if faster else []
    last = figures["by_experts"][-1]
    many = speeds(last)
    winner = max(many, key=many.get)
    launches = last["methods"]["loop of cuBLAS"]["launches"]
    words, clock, wall = "", "by wall time", ""
    if launches:
        walls = {name: last["methods"][name]["wall_ms"]["p50"] for name in many}
        soonest = min(walls, key=walls.get)
        words, clock = f" in {launches} launches", "on the GPU's clock"
        wall = f", and by wall time {soonest} with {number(walls[soonest])} ms"
        wall += "" if soonest == winner else f" against its {number(walls[winner])}"
    gain = number(many[winner] / many["loop of cuBLAS"])
    return (f"At its worst load skew {'; '.join(skewed)}; at {last['E']} experts {winner} is fastest {clock} with "
            f"{number(many[winner])} TFLOP/s, {gain} times a loop of cuBLAS calls{words}{wall}.")


STUDY = Study("grouped_gemm", "Why does irregular work hurt, and which grouped GEMM bears it?", measure, table, draw,
              conclude)

if __name__ == "__main__":
    raise SystemExit(main(STUDY))
