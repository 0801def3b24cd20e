"""Which tempting ideas do not help, why, and at what size would they?

    python labs/studies/what_does_not_help.py

Five ideas, each against the plain way in the same rounds, over a range of sizes: FP8 conversion on the fly, a stream
per expert, torch.compile over a Python loop of experts, atomics in the epilogue, a capacity-padded bmm. Below 1 the
idea loses. The reason is read from a profile of both at the middle size, and the size where the idea turns to a gain
from the measured points around it.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from textwrap import wrap

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from matplotlib.figure import Figure
from rich.table import Table
from torch.nn.functional import grouped_mm, silu

from common.config import dtype_name
from common.level import Unsupported  # first: it picks Triton's interpreter where there is no GPU
from common.measure import WallClock, count_host_syncs, profile_call, relative_error
from common.show import number, percent
from labs.kernels.combine import combine
from labs.kernels.routing import new_arrivals, route, sm_count
from labs.studies.study import COLORS, Options, Study, figure, main, plain_table, time_together

import triton
import triton.language as tl

# T tokens, D model width, F expert width, E experts, K top-k, R = T*K routed rows.

SLACK = 0.03  # differences below this are called even


# ---- FP8 on the fly ------------------------------------------------------------------------------

def to_fp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x as float8_e4m3fn and the float32 scale that undoes it, one for the whole tensor."""
    scale = x.abs().amax().float().clamp_min(1e-12) / torch.finfo(torch.float8_e4m3fn).max
    return (x / scale.to(x.dtype)).to(torch.float8_e4m3fn), scale


def fp8_on_the_fly(options: Options) -> dict:
    """One large expert's gate and up: a bf16 matmul, against converting both sides and a scaled FP8 one. By rows."""
    if options.device.type != "cuda" or torch.cuda.get_device_capability() < (8, 9):
        raise Unsupported("needs CUDA with FP8, sm_89 on")
    D, N = (4096, 28672) if options.full else (256, 256)  # mixtral-8x7b's gate and up
    sizes = (64, 256, 1024, 4096, 16384) if options.full else (64, 256)
    w_ND = torch.randn(N, D, device=options.device).mul_(D ** -0.5).to(torch.bfloat16)
    kept, kept_scale = to_fp8(w_ND)
    cases = []
    for rows in sizes:
        x_MD = torch.randn(rows, D, device=options.device).to(torch.bfloat16)

        def on_the_fly(x=x_MD) -> torch.Tensor:
            (x8, x_scale), (w8, w_scale) = to_fp8(x), to_fp8(w_ND)
            return torch._scaled_mm(x8, w8.T, scale_a=x_scale, scale_b=w_scale, out_dtype=torch.bfloat16)

        def prepared(x=x_MD, w8=kept, w_scale=kept_scale) -> torch.Tensor:
            x8, x_scale = to_fp8(x)
            return torch._scaled_mm(x8, w8.T, scale_a=x_scale, scale_b=w_scale, out_dtype=torch.bfloat16)

        ref = x_MD.double() @ w_ND.double().T
        cases.append(Case(rows, {"plain": lambda x=x_MD: x @ w_ND.T, "idea": on_the_fly, "weights in FP8": prepared},
                          {"plain": 1e-2, "idea": 6e-2, "weights in FP8": 6e-2}, ref))
    return compare(options, "FP8 on the fly", "rows of the expert", "bf16 matmul", cases)


# ---- a stream per expert -------------------------------------------------------------------------

def expert_inputs(options: Options, E: int, D: int, F: int, rows: int) -> tuple[torch.Tensor, ...]:
    """x (E, rows, D), gate_up (E, 2F, D), down (E, D, F) of unit scale."""
    generator = torch.Generator(options.device).manual_seed(0)
    dtype = torch.bfloat16 if options.device.type == "cuda" else torch.float32

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=options.device).to(dtype)

    return draw(E, rows, D), draw(E, 2 * F, D) * D ** -0.5, draw(E, D, F) * F ** -0.5


def ffn(x_ND: torch.Tensor, gate_up_2FD: torch.Tensor, down_DF: torch.Tensor) -> torch.Tensor:
    """One SwiGLU expert."""
    gate, up = (x_ND @ gate_up_2FD.T).chunk(2, dim=1)
    return (silu(gate) * up) @ down_DF.T


def reference(x_END: torch.Tensor, gate_up_E2FD: torch.Tensor, down_EDF: torch.Tensor) -> torch.Tensor:
    """All experts in float64."""
    return torch.stack([ffn(x.double(), w.double(), v.double())
                        for x, w, v in zip(x_END, gate_up_E2FD, down_EDF, strict=True)])


def stream_per_expert(options: Options) -> dict:
    """A loop over experts on one stream, against the same loop with every expert on its own. By rows an expert."""
    if options.device.type != "cuda":
        raise Unsupported("needs CUDA")
    E, D, F = (16, 2048, 1024) if options.full else (4, 128, 64)
    streams = [torch.cuda.Stream() for _ in range(E)]
    cases = []
    for rows in (16, 64, 256, 1024, 4096) if options.full else (16, 32):
        x_END, gate_up, down = expert_inputs(options, E, D, F, rows)

        def loop(x=x_END, w=gate_up, v=down) -> torch.Tensor:
            return torch.stack([ffn(x[e], w[e], v[e]) for e in range(E)])

        def streamed(x=x_END, w=gate_up, v=down) -> torch.Tensor:
            out, current = [None] * E, torch.cuda.current_stream()
            for e, stream in enumerate(streams):
                stream.wait_stream(current)
                with torch.cuda.stream(stream):
                    out[e] = ffn(x[e], w[e], v[e])
            for stream in streams:
                current.wait_stream(stream)
            return torch.stack(out)

        cases.append(Case(rows, {"plain": loop, "idea": streamed}, {"plain": 1e-2, "idea": 1e-2},
                          reference(x_END, gate_up, down)))
    return compare(options, "a stream per expert", "rows per expert", "one stream", cases)


# ---- torch.compile over a loop -------------------------------------------------------------------

def compiled_loop(options: Options) -> dict:
    """A Python loop over experts whose row counts change every call, eager against compiled. By rows an expert.

    On a CPU the compiler's back end is left out (`eager`): what is counted there is breaks and recompilations.
    """
    E, D, F = (8, 2048, 1024) if options.full else (4, 32, 16)

    def loop(x_RD: torch.Tensor, counts_E: torch.Tensor, w: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out, row = [], 0
        for e, count in enumerate(counts_E.tolist()):
            out.append(ffn(x_RD[row:row + count], w[e], v[e]))
            row += count
        return torch.cat(out)

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    spent_s = 0.0
    compiled = torch.compile(loop, backend="inductor" if options.device.type == "cuda" else "eager")
    cases = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own, about breaks and its limit of recompilations
        for rows in (64, 512, 4096) if options.full else (8, 16):
            x_END, w, v = expert_inputs(options, E, D, F, rows)
            x_RD = x_END.flatten(0, 1)
            generator = torch.Generator().manual_seed(rows)
            routings = [torch.bincount(torch.randint(E, (rows * E,), generator=generator), minlength=E)
                        .to(options.device) for _ in range(8)]
            start = time.perf_counter()
            for counts_E in routings[:3]:  # meets the sizes it will meet
                compiled(x_RD, counts_E, w, v)
            spent_s += time.perf_counter() - start
            turns = {"plain": 0, "idea": 0, "grouped_mm": 0}

            def call(name: str, function: Callable, routings=routings, turns=turns, x=x_RD, w=w, v=v) -> torch.Tensor:
                turns[name] += 1
                return function(x, routings[turns[name] % len(routings)], w, v)

            def grouped(x_RD: torch.Tensor, counts_E: torch.Tensor, w: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
                ends_E = counts_E.cumsum(0).int()
                gate, up = grouped_mm(x_RD, w.transpose(1, 2), offs=ends_E).chunk(2, dim=1)
                return grouped_mm(silu(gate) * up, v.transpose(1, 2), offs=ends_E)

            bounds = torch.cat([routings[1].new_zeros(1), routings[1].cumsum(0)]).tolist()
            ref = torch.cat([ffn(x_RD[bounds[e]:bounds[e + 1]].double(), w[e].double(), v[e].double())
                             for e in range(E)])
            cases.append(Case(rows, {"plain": lambda call=call: call("plain", loop),
                                     "idea": lambda call=call: call("idea", compiled),
                                     "grouped_mm": lambda call=call, grouped=grouped: call("grouped_mm", grouped)},
                              {"plain": 1e-2, "idea": 1e-2, "grouped_mm": 1e-2}, ref))
        found = compare(options, "torch.compile over a loop of experts", "rows per expert", "eager loop", cases)
    counters = torch._dynamo.utils.counters
    breaks = sum(counters["graph_break"].values())
    best = max(point["ms"]["idea"]["p50"] / point["ms"]["grouped_mm"]["p50"] for point in found["points"])
    found["reason"] += (f"; {breaks} graph breaks and {counters['stats']['unique_graphs']} graphs, {number(spent_s)} s "
                        f"of compiling and first calls, for {E} experts and {len(cases)} sizes; grouped_mm without a "
                        f"loop is up to {number(best)} times as fast as the compiled loop")
    return found


# ---- atomics in the epilogue ---------------------------------------------------------------------

@triton.jit
def scatter_down_kernel(
    hidden_ptr,  # (R, F) rows sorted by expert
    down_ptr,  # (E, D, F)
    out_ptr,  # (T, D) float32 if ATOMIC, else (R, D) in hidden's dtype
    token_of_row_ptr,  # (R,) int32
    score_of_row_ptr,  # (R,) float32
    offsets_ptr,  # (E + 1,) int32
    E, D, F,
    E_POW2: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ATOMIC: tl.constexpr,
):
    """down's grouped GEMM; its epilogue stores y, or adds score * y into the token's row of out.

    Grid (SMs,): a program owns every grid-th tile. Float32 accumulator.
    """
    experts = tl.arange(0, E_POW2)
    starts = tl.load(offsets_ptr + experts, mask=experts < E, other=0)
    ends = tl.load(offsets_ptr + experts + 1, mask=experts < E, other=0)
    tiles = tl.cdiv(ends - starts, BLOCK_M) * tl.cdiv(D, BLOCK_N)
    tile_ends = tl.cumsum(tiles, 0)
    depth = tl.arange(0, BLOCK_K)
    for tile in range(tl.program_id(0), tl.sum(tiles, 0), tl.num_programs(0)):
        expert = tl.sum((tile_ends <= tile).to(tl.int32), 0)
        local = tile - tl.sum(tl.where(experts < expert, tiles, 0), 0)
        row_start = tl.load(offsets_ptr + expert)
        row_end = tl.load(offsets_ptr + expert + 1)
        row_tiles = tl.cdiv(row_end - row_start, BLOCK_M)
        row = row_start + local % row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
        column = local // row_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
        a_ptrs = hidden_ptr + (tl.minimum(row, row_end - 1).to(tl.int64) * F)[:, None] + depth[None, :]
        w_ptrs = down_ptr + (expert.to(tl.int64) * D * F + tl.minimum(column, D - 1) * F)[None, :] + depth[:, None]
        accumulator = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in range(0, F, BLOCK_K):
            a = tl.load(a_ptrs + k, mask=depth[None, :] < F - k, other=0.0)
            w = tl.load(w_ptrs + k, mask=depth[:, None] < F - k, other=0.0)
            accumulator = tl.dot(a, w, accumulator, input_precision="ieee")
        inside = (row < row_end)[:, None] & (column < D)[None, :]
        if ATOMIC:
            token = tl.load(token_of_row_ptr + row, mask=row < row_end, other=0).to(tl.int64)
            score = tl.load(score_of_row_ptr + row, mask=row < row_end, other=0.0)
            tl.atomic_add(out_ptr + (token * D)[:, None] + column[None, :], accumulator * score[:, None], mask=inside,
                          sem="relaxed")
        else:
            tl.store(out_ptr + (row.to(tl.int64) * D)[:, None] + column[None, :],
                     accumulator.to(out_ptr.dtype.element_ty), mask=inside)


def atomics_in_the_epilogue(options: Options) -> dict:
    """down, then gather-and-sum, against down that adds into the output with float atomics. By top-k, rows fixed."""
    on_gpu, device = options.device.type == "cuda", options.device
    E, D, F, R = (64, 2048, 1024, 65536) if options.full else (4, 32, 16, 32)
    block = dict(BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, num_warps=8, num_stages=3) if options.full else dict(
        BLOCK_M=16, BLOCK_N=16, BLOCK_K=16, num_warps=4, num_stages=1)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    programs = sm_count(device) if on_gpu else 4
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    hidden_RF, down_EDF, router_ED = draw(R, F), draw(E, D, F) * F ** -0.5, draw(E, D) * D ** -0.5
    cases, differing = [], []
    for K in (1, 2, 4, 8) if options.full else (1, 2):
        T = R // K
        routed = route(draw(T, D), router_ED, K, new_arrivals(device), 16)
        score_R = torch.empty(R, device=device).scatter_(0, routed.row_of_slot_TK.flatten().long(),
                                                         routed.scores_TK.flatten())
        common = (routed.token_of_row_R, score_R, routed.offsets_E1, E, D, F)
        y_RD = torch.empty(R, D, dtype=dtype, device=device)

        def launch(out: torch.Tensor, atomic: bool, common=common) -> None:
            scatter_down_kernel[(programs,)](hidden_RF, down_EDF, out, *common, E_POW2=triton.next_power_of_2(E),
                                             ATOMIC=atomic, **block)

        def plain(launch=launch, y=y_RD, routed=routed) -> torch.Tensor:
            launch(y, False)
            return combine(y, routed.row_of_slot_TK, routed.scores_TK)

        def atomic_sum(launch=launch, T=T) -> torch.Tensor:
            out = torch.zeros(T, D, dtype=torch.float32, device=device)
            launch(out, True)
            return out

        def atomic(atomic_sum=atomic_sum) -> torch.Tensor:
            return atomic_sum().to(dtype)

        ref = torch.zeros(T, D, dtype=torch.float64, device=device)
        bounds = routed.offsets_E1.tolist()
        for e in range(E):
            span = slice(bounds[e], bounds[e + 1])
            y = hidden_RF[span].double() @ down_EDF[e].double().T
            ref.index_add_(0, routed.token_of_row_R[span].long(), y * score_R[span, None])
        differing.append((atomic_sum() != atomic_sum()).double().mean().item())
        cases.append(Case(K, {"plain": plain, "idea": atomic}, {"plain": 1e-2, "idea": 1e-2}, ref))
    found = compare(options, "atomics in the epilogue", "top-k (rows fixed)", "gather-and-sum", cases)
    found["reason"] += (f"; before rounding to {dtype_name(dtype)}, two runs of it differ in up to "
                        f"{percent(max(differing))} of the values")
    return found


# ---- capacity-padded bmm -------------------------------------------------------------------------

def padded_bmm(options: Options) -> dict:
    """grouped_mm on sorted rows, against bmm on experts padded to the fullest one. By Zipf exponent of the load."""
    from labs.studies.grouped_gemm import zipf_counts

    E, D, N, R = (64, 2048, 1536, 65536) if options.full else (4, 32, 16, 64)
    w_END = expert_inputs(options, E, D, N // 2, 1)[1]
    cases = []
    for exponent in (0.0, 0.25, 0.5, 1.0) if options.full else (0.0, 1.0):
        counts_E = zipf_counts(R, E, exponent)
        x_RD = torch.randn(R, D, device=options.device).to(w_END.dtype)
        ends_E = counts_E.cumsum(0).int().to(options.device)
        most = int(counts_E.max())  # known for free here; a real layer waits for it, or fixes it and drops rows
        expert_R = torch.repeat_interleave(torch.arange(E), counts_E)
        place_R = (expert_R * most + torch.arange(R) - (counts_E.cumsum(0) - counts_E)[expert_R]).to(options.device)

        def plain(x=x_RD, ends=ends_E) -> torch.Tensor:
            return grouped_mm(x, w_END.transpose(1, 2), offs=ends)

        def padded(x=x_RD, place=place_R, most=most) -> torch.Tensor:
            buffer = x.new_zeros(E * most, D)
            buffer[place] = x
            return torch.bmm(buffer.view(E, most, D), w_END.transpose(1, 2)).view(E * most, N)[place]

        ref = torch.cat([rows.double() @ w.double().T for rows, w in
                         zip(x_RD.split(counts_E.tolist()), w_END, strict=True)])
        cases.append(Case(exponent, {"plain": plain, "idea": padded}, {"plain": 1e-2, "idea": 1e-2}, ref))
    return compare(options, "a capacity-padded bmm", "Zipf exponent of the load", "grouped_mm", cases)


# ---- the comparison ------------------------------------------------------------------------------

class Case:
    """One size: calls by name (`plain`, `idea`, and what else is shown), the error each may have, the answer."""

    def __init__(self, size: float, calls: dict[str, Callable[[], torch.Tensor]], bounds: dict[str, float],
                 ref: torch.Tensor):
        self.size, self.calls, self.errors = size, calls, {}
        for name, call in calls.items():
            self.errors[name] = error = relative_error(call(), ref)
            if not error <= bounds[name]:
                raise RuntimeError(f"{name} at size {size}: relative error {error:.2e} is over {bounds[name]:.0e}, "
                                   f"so it is not timed")


def compare(options: Options, idea: str, axis: str, plain: str, cases: list[Case]) -> dict:
    """Times of every case in its own rounds, the reason from a profile of the middle one, and where it turns."""
    points = []
    for case in cases:
        options.say(f"{idea}: {axis} {case.size:g}")
        times = time_together(case.calls, WallClock(options.device), 15 if options.full else 2, 0.5)
        points.append({"size": case.size, "ms": times, "rel_err": case.errors,
                       "gain": times["plain"]["p50"] / times["idea"]["p50"]})
    middle = cases[len(cases) // 2]
    reason = "no profile without CUDA"
    if options.device.type == "cuda":
        reason = profile_words(middle, axis)
    return {"idea": idea, "axis": axis, "plain": plain, "status": "ok", "points": points, "reason": reason}


# What a kernel does, by parts of its name; the first that fits.
KINDS = (
    ("matrix products", ("nvjet", "gemm", "cutlass", "sm90_", "down_kernel")),
    ("gather-and-sum", ("combine",)),
    ("reductions", ("reduce",)),
    ("gathers and scatters", ("index", "gather", "scatter")),
)


def kind_of(kernel: str) -> str:
    """The kind of work that a kernel's name tells of."""
    return next((kind for kind, marks in KINDS if any(mark in kernel.lower() for mark in marks)),
                "elementwise, casts and copies")


def profile_words(middle: Case, axis: str) -> str:
    """What the profiler saw of the idea and of the plain way at the middle size."""
    words = []
    for name in ("plain", "idea"):
        profile, kinds = profile_call(middle.calls[name]), {}
        for kernel, (_, ms) in profile.kernels.items():
            kinds[kind_of(kernel)] = kinds.get(kind_of(kernel), 0.0) + ms
        shares = ", ".join(f"{kind} {number(ms)}" for kind, ms in sorted(kinds.items(), key=lambda item: -item[1]))
        words.append(f"{name}: GPU busy {number(profile.gpu_ms)} ms ({shares}), {profile.launches} launches, "
                     f"{count_host_syncs(middle.calls[name])} host syncs, relative error {middle.errors[name]:.1e}")
    return f"at {axis} {middle.size:g}, " + "; ".join(words)


def turning_size(points: list[dict]) -> str:
    """Between which measured sizes the idea goes from loss to gain, or that it does not."""
    for before, after in pairwise(points):
        if (before["gain"] - 1) * (after["gain"] - 1) < 0:
            way = "gains above" if after["gain"] > 1 else "gains below"
            return f"{way} a size between {before['size']:g} and {after['size']:g}"
    best = max(points, key=lambda point: point["gain"])
    if best["gain"] <= 1:
        return f"nowhere measured; nearest at {best['size']:g}, {number(best['gain'])} times the plain way's speed"
    worst = min(points, key=lambda point: point["gain"])
    how = "gains everywhere measured, least" if worst["gain"] > 1 + SLACK else "gains, but is even"
    return f"{how} at {worst['size']:g}"


def rivals(points: list[dict]) -> str:
    """What else was timed and beat the idea at every size."""
    names = [name for name in points[0]["ms"] if name not in ("plain", "idea")]
    ahead = [name for name in names if all(point["ms"][name]["p50"] < point["ms"]["idea"]["p50"] for point in points)]
    return f"; {' and '.join(ahead)} faster still at every size" if ahead else ""


IDEAS = (fp8_on_the_fly, stream_per_expert, compiled_loop, atomics_in_the_epilogue, padded_bmm)


def measure(options: Options) -> dict:
    """Every idea in turn; one that does not run here says what it needs."""
    found = []
    for idea in IDEAS:
        try:
            found.append(idea(options))
        except Unsupported as lack:
            found.append({"idea": idea.__name__.replace("_", " ").replace("fp8", "FP8"), "status": f"n/a ({lack})"})
        if options.device.type == "cuda":
            torch.cuda.empty_cache()
    return {"ideas": found}


# ---- showing -------------------------------------------------------------------------------------

def table(figures: dict) -> list[Table | str]:
    """A row an idea and size; under it the reason."""
    parts: list[Table | str] = []
    for one in figures["ideas"]:
        if one["status"] != "ok":
            parts.append(f"\n[bold]{one['idea']}[/]: {one['status']}")
            continue
        names = list(one["points"][0]["ms"])
        parts.append(plain_table(
            f"{one['idea']} against {one['plain']}",
            [one["axis"], *(f"{name}, ms" for name in names), "idea's gain"],
            [[f"{point['size']:g}", *(number(point["ms"][name]["p50"]) for name in names),
              f"{number(point['gain'])}x"] for point in one["points"]]))
        parts.append(f"turns: {turning_size(one['points'])}\nreason: {one['reason']}")
    return parts


def draw(figures: dict, under: str) -> dict[str, Figure]:
    """A panel an idea: its gain over sizes, one being even."""
    ready = [one for one in figures["ideas"] if one["status"] == "ok"]
    fig, axes = figure("What does not help: each idea's speed over the plain way's (below 1 it loses)",
                       f"wall time, medians  |  {under}", columns=len(ready))
    for ax, one in zip(axes, ready, strict=True):
        gains = [point["gain"] for point in one["points"]]
        colors = [COLORS[0] if gain > 1 + SLACK else COLORS[1] if gain < 1 - SLACK else COLORS[6] for gain in gains]
        ax.bar(range(len(gains)), gains, color=colors, gid=one["idea"])
        for place, gain in enumerate(gains):
            ax.text(place, gain, f"{gain:.2f}", ha="center", va="bottom", fontsize=14)
        ax.axhline(1, color="black", lw=2)
        ax.set_xticks(range(len(gains)), [f"{point['size']:g}" for point in one["points"]], rotation=45)
        ax.set_xlabel(one["axis"], fontsize=14)
        title = wrap(one["idea"], 20) + [f"over {one['plain']}"]
        ax.set_title("\n".join([""] * (3 - len(title)) + title), fontsize=15)
        ax.set_ylim(0, max(1.1, 1.1 * max(gains)))
    axes[0].set_ylabel("times the plain way's speed")
    return {"": fig}


def conclude(figures: dict) -> str:
    """Which lose everywhere, where the others turn, and what is faster than those."""
    ready = [one for one in figures["ideas"] if one["status"] == "ok"]
    never = [one["idea"] for one in ready if max(point["gain"] for point in one["points"]) <= 1 + SLACK]
    others = [f"{one['idea']} ({turning_size(one['points'])} {one['axis']}{rivals(one['points'])})" for one in ready
              if one["idea"] not in never]
    parts = []
    if never:
        parts.append(f"never a gain at the sizes measured: {', '.join(never)}")
    if others:
        parts.append(f"a matter of size: {'; '.join(others)}")
    sentence = ". ".join(part[0].upper() + part[1:] for part in parts)
    return sentence + "."


STUDY = Study("what_does_not_help", "Which tempting ideas do not help, why, and at what size would they?", measure,
              table, draw, conclude)

if __name__ == "__main__":
    raise SystemExit(main(STUDY))
