"""Which tempting ideas do not help, why, and at what size would they?

    python labs/studies/what_does_not_help.py

Five ideas, each against the plain way in the same rounds, over the sizes along which it might turn to a gain:

    FP8 on the fly          rows of the expert: the weights are converted once a call, however many rows they serve
    a stream per expert     rows per expert: kernels must outlast the launches that the streams cost
    torch.compile, a loop   rows per expert: against the eager loop, and against grouped_mm, which has no loop
    atomics                 top-k: the more rows a token sums, the less there is to zero and to cast
                            tokens: where they are few, reading the weights takes the time
                            expert width: of a deeper product the epilogue is a smaller part
    a padded bmm            the fullest expert's rows over the mean: padding is multiplied too
                            rows per expert, routed at random: where they are few, reading the weights takes the time;
                            where they are many, the load evens out

Below 1 the idea loses. The reason is read from a profile of both at the middle size; where the idea is no slower is
read from the measured points, and where it is so nowhere, a fit of the nearest points says what lies beyond.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Sequence
from itertools import cycle, groupby, pairwise
from pathlib import Path
from statistics import linear_regression
from textwrap import fill, wrap

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from matplotlib.figure import Figure
from torch.nn.functional import grouped_mm, silu

from common.level import Unsupported  # first: it picks Triton's interpreter where there is no GPU
from common.measure import WallClock, count_host_syncs, profile_call, relative_error
from common.show import number, percent
from labs.kernels.combine import combine
from labs.kernels.routing import sm_count
from labs.kernels.tiles import spread_rows
from labs.moe_layer.rows import sort_rows_plainly
from labs.studies.grouped_gemm import apportion
from labs.studies.study import COLORS, GpuClock, Options, PlainTable, Study, figure, main, time_together

import triton
import triton.language as tl

# T tokens, D model width, F expert width, E experts, K top-k, R = T*K routed rows.

SLACK = 0.03  # differences below this are called even
MOST_IN_A_ROW = 5  # panels
NEAREST = 3  # points that a fit of what lies beyond the measured sizes rests on


# ---- FP8 on the fly ------------------------------------------------------------------------------

def to_fp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x as float8_e4m3fn and the float32 scale that undoes it, one for the whole tensor."""
    scale = x.abs().amax().float().clamp_min(1e-12) / torch.finfo(torch.float8_e4m3fn).max
    return (x / scale.to(x.dtype)).to(torch.float8_e4m3fn), scale


def fp8_on_the_fly(options: Options) -> list[dict]:
    """One large expert's gate and up: a bf16 matmul, against converting both sides and a scaled FP8 one. By rows."""
    if options.device.type != "cuda" or torch.cuda.get_device_capability() < (8, 9):
        raise Unsupported("needs CUDA with FP8, sm_89 on")
    D, N = (4096, 28672) if options.full else (256, 256)  # mixtral-8x7b's gate and up
    sizes = (64, 256, 1024, 4096, 8192, 16384) if options.full else (64, 256)
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
    return [compare(options, "FP8 on the fly", "rows of the expert", "bf16 matmul", cases)]


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


def stream_per_expert(options: Options) -> list[dict]:
    """A loop over experts on one stream, against the same loop with every expert on its own. By rows an expert."""
    if options.device.type != "cuda":
        raise Unsupported("needs CUDA")
    E, D, F = (16, 2048, 1024) if options.full else (4, 128, 64)
    streams = [torch.cuda.Stream() for _ in range(E)]
    cases = []
    for rows in (16, 64, 256, 1024, 2048, 4096) if options.full else (16, 32):
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
    return [compare(options, "a stream per expert", "rows per expert", "one stream", cases)]


# ---- torch.compile over a loop -------------------------------------------------------------------

def compiled_loop(options: Options) -> list[dict]:
    """A Python loop over experts whose row counts change every call: compiled against eager, and compiled against
    grouped_mm without a loop. By rows an expert.

    On a CPU the compiler's back end is left out (`eager`): what is counted there is breaks and recompilations.
    """
    E, D, F = (8, 2048, 1024) if options.full else (4, 32, 16)

    def loop(x_RD: torch.Tensor, counts_E: torch.Tensor, w: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out, row = [], 0
        for e, count in enumerate(counts_E.tolist()):
            out.append(ffn(x_RD[row:row + count], w[e], v[e]))
            row += count
        return torch.cat(out)

    def grouped(x_RD: torch.Tensor, counts_E: torch.Tensor, w: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        ends_E = counts_E.cumsum(0).int()
        gate, up = grouped_mm(x_RD, w.transpose(1, 2), offs=ends_E).chunk(2, dim=1)
        return grouped_mm(silu(gate) * up, v.transpose(1, 2), offs=ends_E)

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    spent_s = 0.0
    compiled = torch.compile(loop, backend="inductor" if options.device.type == "cuda" else "eager")
    plain_ways: dict[str, Callable] = {"eager loop": loop, "grouped_mm": grouped}
    cases: dict[str, list[Case]] = {name: [] for name in plain_ways}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own, about breaks and its limit of recompilations
        for rows in (64, 512, 4096, 16384) if options.full else (8, 16):
            x_END, w, v = expert_inputs(options, E, D, F, rows)
            x_RD = x_END.flatten(0, 1)
            generator = torch.Generator().manual_seed(rows)
            routings = [torch.bincount(torch.randint(E, (rows * E,), generator=generator), minlength=E)
                        .to(options.device) for _ in range(8)]
            start = time.perf_counter()
            for counts_E in routings[:3]:  # meets the sizes it will meet
                compiled(x_RD, counts_E, w, v)
            spent_s += time.perf_counter() - start

            def in_turn(function: Callable, routings=routings, x=x_RD, w=w, v=v) -> Callable[[], torch.Tensor]:
                """`function` with the next routing at every call, from the first on."""
                counts = cycle(routings)
                return lambda: function(x, next(counts), w, v)

            bounds = torch.cat([routings[0].new_zeros(1), routings[0].cumsum(0)]).tolist()
            ref = torch.cat([ffn(x_RD[bounds[e]:bounds[e + 1]].double(), w[e].double(), v[e].double())
                             for e in range(E)])
            for name, plain in plain_ways.items():
                cases[name].append(Case(rows, {"plain": in_turn(plain), "idea": in_turn(compiled)},
                                        {"plain": 1e-2, "idea": 1e-2}, ref))
        found = [compare(options, "a loop of experts under torch.compile", "rows per expert", name, its_cases)
                 for name, its_cases in cases.items()]
    counters = torch._dynamo.utils.counters
    breaks = sum(counters["graph_break"].values())
    found[0]["reason"] += (f"; {breaks} graph breaks and {counters['stats']['unique_graphs']} graphs, "
                           f"{number(spent_s)} s of compiling and first calls, for {E} experts and "
                           f"{len(cases['eager loop'])} sizes")
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


def scatter_case(options: Options, size: float, T: int, K: int, F: int) -> tuple[Case, float]:
    """T tokens' T*K rows, routed at random, through down: then gather-and-sum, against adding into the output with
    float atomics. And the share of the output's values in which two runs of the latter differ before rounding."""
    on_gpu, device = options.device.type == "cuda", options.device
    E, D = (64, 2048) if options.full else (4, 16)
    block = dict(BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, num_warps=8, num_stages=3) if options.full else dict(
        BLOCK_M=16, BLOCK_N=16, BLOCK_K=16, num_warps=4, num_stages=1)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    programs = sm_count(device) if on_gpu else 4
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    hidden_RF, down_EDF = draw(T * K, F).to(dtype), (draw(E, D, F) * F ** -0.5).to(dtype)
    scores_TK, ids_TK = draw(T, E).softmax(dim=1).topk(K)
    offsets_E1, token_of_row_R, row_of_slot_TK = sort_rows_plainly(ids_TK, E)
    score_R = torch.empty_like(scores_TK).flatten()
    score_R[row_of_slot_TK.flatten()] = scores_TK.flatten()
    y_RD = torch.empty(T * K, D, dtype=dtype, device=device)

    def launch(out: torch.Tensor, atomic: bool) -> None:
        scatter_down_kernel[(programs,)](hidden_RF, down_EDF, out, token_of_row_R, score_R, offsets_E1, E, D, F,
                                         E_POW2=triton.next_power_of_2(E), ATOMIC=atomic, **block)

    def plain() -> torch.Tensor:
        launch(y_RD, False)
        return combine(y_RD, row_of_slot_TK, scores_TK)

    def atomic_sum() -> torch.Tensor:
        out = torch.zeros(T, D, dtype=torch.float32, device=device)
        launch(out, True)
        return out

    def atomic() -> torch.Tensor:
        return atomic_sum().to(dtype)

    ref = torch.zeros(T, D, dtype=torch.float64, device=device)
    for e, (start, end) in enumerate(pairwise(offsets_E1.tolist())):
        y = hidden_RF[start:end].double() @ down_EDF[e].double().T
        ref.index_add_(0, token_of_row_R[start:end], y * score_R[start:end, None])
    case = Case(size, {"plain": plain, "idea": atomic}, {"plain": 1e-2, "idea": 1e-2}, ref)
    return case, (atomic_sum() != atomic_sum()).double().mean().item()


def atomics_in_the_epilogue(options: Options) -> list[dict]:
    """down, then gather-and-sum, against down that adds into the output with float atomics: by top-k to all experts,
    by tokens, by the experts' width."""
    if options.full:
        R, K, F, most_K = 65536, 8, 1024, 64
        top_k, tokens, widths = (1, 2, 4, 8, 16, 32, 64), (1, 4, 16, 64, 256, 1024, 4096), (256, 1024, 4096, 16384)
    else:
        R, K, F, most_K = 8, 2, 16, 4
        top_k, tokens, widths = (1, 2), (1, 2), (16, 32)
    sweeps = (
        ("top-k, rows fixed", most_K, [(k, R // k, k, F) for k in top_k]),
        (f"tokens, top-{K}", None, [(T, T, K, F) for T in tokens]),
        ("expert width, rows fixed", None, [(width, R // K, K, width) for width in widths]),
    )
    found = []
    for axis, most, sizes in sweeps:
        cases, differing = zip(*(scatter_case(options, *one) for one in sizes), strict=True)
        one = compare(options, "atomics in the epilogue", axis, "gather-and-sum", cases, GpuClock, most)
        one["reason"] += f"; before rounding, two runs of it differ in up to {percent(max(differing))} of the values"
        found.append(one)
    return found


# ---- capacity-padded bmm -------------------------------------------------------------------------

def padded_case(options: Options, size: float, ids_TK: torch.Tensor, w_END: torch.Tensor) -> Case:
    """Tokens' rows copied to where their experts (T, K) find them, and multiplied: sorted rows and grouped_mm, against
    every expert padded to the fullest one's rows and bmm. A combine reads as many rows of either, so it is left out."""
    (T, K), (E, N, D) = ids_TK.shape, w_END.shape
    x_TD = torch.randn(T, D, device=options.device).to(w_END.dtype)
    offsets_E1, token_of_row_R, row_of_slot_TK = sort_rows_plainly(ids_TK, E)
    rows_E = offsets_E1.diff()
    most = int(rows_E.max())  # known for free here; a real layer waits for it, or fixes it and drops rows
    place_TK = (row_of_slot_TK + ids_TK * most - offsets_E1[ids_TK]).int()
    place_R = torch.empty_like(token_of_row_R)
    place_R[row_of_slot_TK.flatten()] = place_TK.flatten()
    rows_RD, padded_ECD = x_TD.new_empty(T * K, D), x_TD.new_zeros(E, most, D)

    def plain() -> torch.Tensor:
        spread_rows(x_TD, row_of_slot_TK, rows_RD)
        return grouped_mm(rows_RD, w_END.transpose(1, 2), offs=offsets_E1[1:])

    def padded() -> torch.Tensor:
        spread_rows(x_TD, place_TK, padded_ECD.view(E * most, D))
        return torch.bmm(padded_ECD, w_END.transpose(1, 2))

    ref = torch.cat([rows.double() @ w.double().T for rows, w in
                     zip(x_TD[token_of_row_R].split(rows_E.tolist()), w_END, strict=True)])
    return Case(size, {"plain": plain, "idea": padded}, {"plain": 1e-2, "idea": 1e-2}, ref,
                {"idea": lambda y_ECN: y_ECN.view(E * most, N)[place_R]})


def padded_bmm(options: Options) -> list[dict]:
    """grouped_mm on sorted rows, against bmm on padded ones: by how full the fullest expert is, and by rows an expert
    where tokens choose at random."""
    E, K, D, N = (64, 8, 2048, 1536) if options.full else (4, 2, 32, 16)
    R, factors, means = (65536, (1, 1.125, 1.25, 1.5, 2, 4), (1, 4, 16, 64, 256, 1024, 4096)) if options.full else (
        16, (1, 2), (2, 8))
    w_END = expert_inputs(options, E, D, N // 2, 1)[1]
    generator = torch.Generator().manual_seed(0)

    def one_fuller(factor: float) -> torch.Tensor:
        """(T, K): one expert has `factor` times the mean of rows, the others share what is left."""
        shares_E = torch.tensor([factor] + [(E - factor) / (E - 1)] * (E - 1))
        ids_R = torch.arange(E).repeat_interleave(apportion(R, shares_E))
        return ids_R[torch.randperm(R, generator=generator)].view(R // K, K).to(options.device)

    def at_random(mean: int) -> torch.Tensor:
        """(T, K): every token's K different experts, `mean` rows an expert."""
        return torch.rand(mean * E // K, E, generator=generator).topk(K).indices.to(options.device)

    return [compare(options, "a capacity-padded bmm", axis, "grouped_mm",
                    [padded_case(options, size, choose(size), w_END) for size in sizes], GpuClock)
            for axis, choose, sizes in (("fullest expert's rows over mean", one_fuller, factors),
                                        ("rows per expert, random routing", at_random, means))]


# ---- the comparison ------------------------------------------------------------------------------

class Case:
    """One size: calls by name (`plain`, `idea`, and what else is shown), the error each may have, the answer, and what
    brings an output that lies otherwise into the answer's order, for the check alone."""

    def __init__(self, size: float, calls: dict[str, Callable[[], torch.Tensor]], bounds: dict[str, float],
                 ref: torch.Tensor, in_order: dict[str, Callable[[torch.Tensor], torch.Tensor]] | None = None):
        self.size, self.calls, self.errors = size, calls, {}
        for name, call in calls.items():
            out = (in_order or {}).get(name, lambda out: out)(call())
            self.errors[name] = error = relative_error(out, ref)
            if not error <= bounds[name]:
                raise RuntimeError(f"{name} at size {size}: relative error {error:.2e} is over {bounds[name]:.0e}, "
                                   f"so it is not timed")


def compare(options: Options, idea: str, axis: str, plain: str, cases: Sequence[Case],
            clock: type[WallClock | GpuClock] = WallClock, most: float | None = None) -> dict:
    """One sweep: times of every case in its own rounds, and the reason from a profile of the middle one.

    clock: wall time where the host's part is at issue; GPU time where only kernels differ, as in a graph. most: the
    largest size that the axis has, if there is one; the least is 1.
    """
    on_gpu, points = options.device.type == "cuda", []
    for case in cases:
        options.say(f"{idea} against {plain}: {axis} {case.size:g}")
        times = time_together(case.calls, clock(options.device), 15 if options.full else 2, 0.5)
        points.append({"size": case.size, "ms": times, "rel_err": case.errors,
                       "gain": times["plain"]["p50"] / times["idea"]["p50"]})
    reason = "no profile without CUDA"
    if on_gpu:
        middle = len(cases) // 2
        ms = points[middle]["ms"] if clock is WallClock else time_together(
            {name: cases[middle].calls[name] for name in ("plain", "idea")}, WallClock(options.device), 5, 0.5)
        reason = profile_words(cases[middle], axis, ms)
    return {"idea": idea, "axis": axis, "most": most, "plain": plain, "status": "ok",
            "clock": "GPU time" if on_gpu and clock is GpuClock else "wall time", "points": points, "reason": reason}


# What a kernel does, by parts of its name; the first that fits.
KINDS = (
    ("matrix products", ("nvjet", "gemm", "cutlass", "sm90_", "down_kernel")),
    ("gather-and-sum", ("combine",)),
    ("reductions", ("reduce",)),
    ("gathers and scatters", ("index", "gather", "scatter", "spread")),
)


def kind_of(kernel: str) -> str:
    """The kind of work that a kernel's name tells of."""
    return next((kind for kind, marks in KINDS if any(mark in kernel.lower() for mark in marks)),
                "elementwise, casts and copies")


def profile_words(middle: Case, axis: str, wall_ms: dict[str, dict[str, float]]) -> str:
    """What the profiler saw of the idea and of the plain way at the middle size, beside the wall time without it."""
    words = []
    for name in ("plain", "idea"):
        profile, kinds = profile_call(middle.calls[name]), {}
        for kernel, (_, ms) in profile.kernels.items():
            kinds[kind_of(kernel)] = kinds.get(kind_of(kernel), 0.0) + ms
        shares = ", ".join(f"{kind} {number(ms)}" for kind, ms in sorted(kinds.items(), key=lambda item: -item[1]))
        words.append(f"{name}: wall {number(wall_ms[name]['p50'])} ms, GPU busy {number(profile.gpu_ms)} ms "
                     f"({shares}), {profile.launches} launches, {count_host_syncs(middle.calls[name])} host syncs, "
                     f"relative error {middle.errors[name]:.1e}")
    return f"at {axis} {middle.size:g}, " + "; ".join(words)


def no_slower(point: dict) -> bool:
    """Whether the idea is even with the plain way at this size, or ahead."""
    return point["gain"] >= 1 - SLACK


def where(points: list[dict]) -> str:
    """At which of the measured sizes the idea is no slower."""
    first, last = points[0], points[-1]
    spans = [list(span) for fits, span in groupby(points, no_slower) if fits]
    if not spans:
        return f"slower from {first['size']:g} to {last['size']:g}"
    if spans == [points]:
        return f"no slower from {first['size']:g} to {last['size']:g}"
    return "no slower " + ", ".join(
        f"from {span[0]['size']:g} on" if span[-1] is last else f"up to {span[-1]['size']:g}" if span[0] is first else
        f"from {span[0]['size']:g} to {span[-1]['size']:g}" for span in spans)


def gains_there(points: list[dict]) -> str:
    """The gains on both sides of every turn; without a turn, at the ends and at the best size."""
    told = [point for pair in pairwise(points) if no_slower(pair[0]) != no_slower(pair[1]) for point in pair]
    told = told or [points[0], max(points, key=lambda point: point["gain"]), points[-1]]
    return ", ".join(f"{number(point['gain'])}x at {point['size']:g}" for point in points if point in told)


def beyond(points: list[dict], most: float | None) -> str:
    """What a fit says of sizes beyond the measured ones, if none of these turns and the best of them is at an end.

    A line through the time ratio of the points nearest to that end: over 1/size upwards, as of a fixed cost that is
    spread ever thinner, as far as `most` if there is a largest size; over size downwards, as far as 1.
    """
    best = max(points, key=lambda point: point["gain"])
    upwards = best is points[-1]
    if any(map(no_slower, points)) or not (upwards or best is points[0]):
        return ""
    if best["size"] == most or (best["size"] <= 1 and not upwards):
        return ", where sizes end"
    near = points[-NEAREST:] if upwards else points[:NEAREST]
    if len(near) < NEAREST:
        return ""  # any two points lie on a line

    def place(size: float) -> float:
        """Where a size lies on the line, and back."""
        return 1 / size if upwards else size

    slope, start = linear_regression([place(point["size"]) for point in near], [1 / point["gain"] for point in near])
    end = 1.0 if not upwards else 1 / most if most else 0.0
    at_end, even = start + slope * end, 1 / (1 - SLACK)
    if at_end > even:
        return f"; a line through the nearest {len(near)} ends at {number(1 / at_end)}x, so nowhere beyond"
    size = f"from about {number(place((even - start) / slope))} on" if upwards else (
        f"up to about {number((even - start) / slope)}")
    return f"; extrapolated from the nearest {len(near)}, not measured: no slower {size}"


def turn(one: dict) -> str:
    """Where one sweep turns, with its gains and what else was faster; where it does not, what lies beyond."""
    points = one["points"]
    return f"{where(points)} ({gains_there(points)}{beyond(points, one.get('most'))}{rivals(points)})"


def rivals(points: list[dict]) -> str:
    """What else was timed and beat the idea at every size."""
    names = [name for name in points[0]["ms"] if name not in ("plain", "idea")]
    ahead = [name for name in names if all(point["ms"][name]["p50"] < point["ms"]["idea"]["p50"] for point in points)]
    return f"; {' and '.join(ahead)} faster still at every size" if ahead else ""


IDEAS = (fp8_on_the_fly, stream_per_expert, compiled_loop, atomics_in_the_epilogue, padded_bmm)


def measure(options: Options) -> dict:
    """Every idea's sweeps in turn; one that does not run here says what it needs."""
    found: list[dict] = []
    for idea in IDEAS:
        try:
            found += idea(options)
        except Unsupported as lack:
            found.append({"idea": idea.__name__.replace("_", " ").replace("fp8", "FP8"), "status": f"n/a ({lack})"})
        if options.device.type == "cuda":
            torch.cuda.empty_cache()
    return {"ideas": found}


# ---- showing -------------------------------------------------------------------------------------

def sweeps(figures: dict) -> list[dict]:
    """The sweeps that ran."""
    return [one for one in figures["ideas"] if one["status"] == "ok"]


def clock_of(one: dict) -> str:
    """What a sweep's times are."""
    return one.get("clock", "wall time")


def table(figures: dict) -> list[PlainTable | str]:
    """A row a size of every sweep; under it where it turns, and the reason."""
    parts: list[PlainTable | str] = []
    for one in figures["ideas"]:
        if one["status"] != "ok":
            parts.append(f"\n[bold]{one['idea']}[/]: {one['status']}")
            continue
        names = list(one["points"][0]["ms"])
        parts.append(PlainTable(
            f"{one['idea']} against {one['plain']}, {clock_of(one)}",
            [one["axis"], *(f"{name}, ms" for name in names), "idea's gain"],
            [[f"{point['size']:g}", *(number(point["ms"][name]["p50"]) for name in names),
              f"{number(point['gain'])}x"] for point in one["points"]]))
        parts.append(f"turns: {turn(one)}\nreason: {one['reason']}")
    return parts


def draw(figures: dict, under: str) -> dict[str, Figure]:
    """A panel a sweep: the idea's gain over sizes, one being even."""
    ready = sweeps(figures)
    rows = 1 if len(ready) <= MOST_IN_A_ROW else 2
    fig, axes = figure("What does not help: each idea's speed over the plain way's (below 1 it loses)",
                       f"medians; grey: within {SLACK:.0%} of even  |  {under}", -(-len(ready) // rows), rows=rows)
    for ax in axes[len(ready):]:
        ax.remove()
    for ax, one in zip(axes, ready, strict=False):
        gains = [point["gain"] for point in one["points"]]
        colors = [COLORS[0] if gain > 1 + SLACK else COLORS[1] if gain < 1 - SLACK else COLORS[6] for gain in gains]
        ax.bar(range(len(gains)), gains, color=colors, gid=f"{one['idea']} {one['axis']}")
        for place, gain in enumerate(gains):
            ax.annotate(f"{gain:.2f}", (place, gain), (0, 4), textcoords="offset points", ha="center", va="bottom",
                        fontsize=14, rotation=90, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0})
        ax.axhline(1, color="black", lw=2)
        ax.set_xticks(range(len(gains)), [f"{point['size']:g}" for point in one["points"]], rotation=45, fontsize=14)
        ax.tick_params(axis="y", labelsize=14)
        ax.set_xlabel(f"{fill(one['axis'], 26)}\n{fill(where(one['points']), 26)}", fontsize=14)
        title = [*wrap(one["idea"], 24), f"over {one['plain']}", clock_of(one)]
        ax.set_title("\n".join([""] * (4 - len(title)) + title), fontsize=14)
        ax.set_ylim(0, 1.35 * max(1, *gains))  # room for the figures
    fig.supylabel("times the plain way's speed", fontsize=16)
    return {"": fig}


def conclude(figures: dict) -> str:
    """For every idea: where it is no slower than the plain way. The gains, and what is faster still, are in the table;
    of an idea that turns somewhere, the sweeps in which it does not are left to the table too."""
    some, never = [], []
    for (idea, plain), group in groupby(sweeps(figures), lambda one: (one["idea"], one["plain"])):
        turns = [f"{where(one['points']).removeprefix('no slower ')} ({one['axis']})" for one in group
                 if any(map(no_slower, one["points"]))]
        if turns:
            some.append(f"{idea} against {plain} {' and '.join(turns)}")
        else:
            never.append(f"{idea} against {plain}")
    return (f"As fast as the plain way, within {SLACK:.0%}, or faster: {'; '.join(some) or 'none'}; at no measured "
            f"size: {'; '.join(never) or 'none'}.")


STUDY = Study("what_does_not_help", "Which tempting ideas do not help, why, and at what size would they?", measure,
              table, draw, conclude)

if __name__ == "__main__":
    raise SystemExit(main(STUDY))
