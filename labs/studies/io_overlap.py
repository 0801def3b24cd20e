"""What do pipelining, TMA and warp roles buy in a grouped GEMM, and what does it wait for?

    python labs/studies/io_overlap.py

One projection over experts with equal rows, so that nothing but the way of loading differs:

    depth     stages of the pipeline, 1 to 5: how many loads are on their way while a tile is multiplied
    loads     by pointers (cp.async, an address a thread) or by TMA (one thread asks for a box)
    roles     every warp loads and multiplies (Triton's pipeliner), or one warp only loads and two warpgroups only
              multiply (level 8's kernel, in Gluon; Triton's own `warp_specialize` is for Blackwell)

What a kernel waits for is told by leaving out a part: `loads only` does not multiply, `multiply only` loads once. If
all overlapped, the whole would take the longer of the two; if nothing did, their sum. The timeline is the specialised
kernel's own: each party writes its SM's cycle counter when it begins to wait and when it goes on.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from common.level import Unsupported  # first: it picks Triton's interpreter where there is no GPU
from common.measure import relative_error
from common.show import number, percent
from labs.kernels.grouped_gemm import store_y
from labs.kernels.roles import (
    BLOCK_N,
    claim,
    consume,
    describe,
    find_tile_ahead,
    listen,
    next_stage,
    one_band,
    open_ring,
    pass_on,
    produce_rows,
    tell,
    tell_end,
    walk_tiles,
)
from labs.kernels.tiles import ROWS, plan_tiles
from labs.kernels.routing import sm_count
from labs.studies.study import COLORS, GpuClock, Options, PlainTable, Study, figure, main, rate, time_together

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.runtime.errors import OutOfResources
from triton.tools.tensor_descriptor import TensorDescriptor

# R rows, E experts of R / E rows each. In this file N and K are the projection's output and inner width.

PARTS = ("whole", "loads only", "multiply only")
DEPTHS = (1, 2, 3, 4, 5)
LOGGED_STEPS = 80  # of the timeline: two and a half tiles at K = 2048

_ROWS = gl.constexpr(ROWS)
_BLOCK_N = gl.constexpr(BLOCK_N)
_BLOCK_K = gl.constexpr(64)
_STAGES = gl.constexpr(4)  # of level 8's ring
_ROW_BYTES = gl.constexpr(ROWS * 64 * 2)
_WEIGHT_BYTES = gl.constexpr(BLOCK_N * 64 * 2)
_ACC = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16]))
_LOGGED = gl.constexpr(LOGGED_STEPS)


# ---- one role: Triton's pipeliner ----------------------------------------------------------------

@triton.jit
def load_by_pointers(matrix, row, k, K, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    """(BLOCK, BLOCK_K) of a row-major matrix from a pointer; rows exist, K is a multiple of BLOCK_K."""
    rows = (row + tl.arange(0, BLOCK)).to(tl.int64)
    return tl.load(matrix + (rows * K)[:, None] + (k + tl.arange(0, BLOCK_K))[None, :])


@triton.jit
def load_by_tma(matrix, row, k, K, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    """The same from a tensor descriptor."""
    return matrix.load([row, k])


@triton.jit
def one_role_kernel(
    a,  # (R, K), a pointer or a descriptor
    w,  # (E * N, K), a pointer or a descriptor
    out_ptr,  # (R, N)
    row_tiles, rows_per_expert, N, K,
    load: tl.constexpr,
    PART: tl.constexpr,  # 0 whole, 1 loads only, 2 multiply only
    STAGES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """out[rows of e] = a[rows of e] @ w[e].T. Grid (SMs,): a program owns every grid-th tile; float32 accumulator.

    rows_per_expert is a multiple of BLOCK_M, N of BLOCK_N, K of 4 * BLOCK_K. Row tiles run fastest within an expert.
    """
    column_tiles = N // BLOCK_N
    tiles_per_expert = rows_per_expert // BLOCK_M
    if PART == 2:  # four steps' worth, once: without loads between them, Triton waits for every dot
        first_a = load(a, 0, 0, K, BLOCK_M, 4 * BLOCK_K)
        first_w = load(w, 0, 0, K, BLOCK_N, 4 * BLOCK_K)
    for tile in range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0)):
        expert = tile // (tiles_per_expert * column_tiles)
        local = tile % (tiles_per_expert * column_tiles)
        row = (expert * tiles_per_expert + local % tiles_per_expert) * BLOCK_M
        column = local // tiles_per_expert * BLOCK_N
        rows = (row + tl.arange(0, BLOCK_M)).to(tl.int64)
        weight_row = expert * N + column
        if PART == 1:
            seen_a = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
            seen_w = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
            for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
                seen_a += load(a, row, k, K, BLOCK_M, BLOCK_K)
                seen_w += load(w, weight_row, k, K, BLOCK_N, BLOCK_K)
            seen = tl.sum(seen_a, 1) + tl.sum(tl.sum(seen_w, 1), 0)
            tl.store(out_ptr + rows * N + column, seen.to(out_ptr.dtype.element_ty))
        else:
            accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            if PART == 2:
                for _ in range(0, K, 4 * BLOCK_K):
                    accumulator = tl.dot(first_a, first_w.T, accumulator, input_precision="ieee")
            else:
                for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
                    accumulator = tl.dot(load(a, row, k, K, BLOCK_M, BLOCK_K),
                                         load(w, weight_row, k, K, BLOCK_N, BLOCK_K).T, accumulator,
                                         input_precision="ieee")
            columns = column + tl.arange(0, BLOCK_N)
            tl.store(out_ptr + (rows * N)[:, None] + columns[None, :], accumulator.to(out_ptr.dtype.element_ty))


# ---- warp roles: level 8's kernel, whole, without a part, and with a log --------------------------

@gluon.jit
def cycles():
    """The SM's cycle counter."""
    return gl.inline_asm_elementwise("mov.u64 $0, %clock64;", "=l", [], dtype=gl.int64, is_pure=False, pack=1)


@gluon.jit
def announce(walk, claimed_ptr, ring):
    """A producer that loads nothing: it says of every free stage that it is full."""
    _tiles_ptr, total, column_tiles, k_steps = walk
    _rows, _weights, _told, full, empty = ring
    stage = 0
    phase = 0
    _expert, row, used, column, _ = find_tile_ahead(walk[0], claim(claimed_ptr, 1), total, column_tiles)
    while used > 0:
        after = find_tile_ahead(walk[0], claim(claimed_ptr, 1), total, column_tiles)
        tell(ring, stage, phase, row, used, column, 0, 1)
        for _ in range(k_steps):
            mbarrier.wait(empty.index(stage), phase ^ 1)
            mbarrier.arrive(full.index(stage))
            stage, phase = next_stage(stage, phase, _STAGES)
        _expert, row, used, column, _ = after
    tell_end(ring, stage, phase, 1)


@gluon.jit
def drain(k_steps, ring):
    """A consumer that multiplies nothing: it frees every stage that is full."""
    stage = 0
    phase = 0
    _row, used, _column, _ = listen(ring, stage, phase)
    while used > 0:
        stage, phase = pass_on(ring, stage, phase, k_steps)
        _row, used, _column, _ = listen(ring, stage, phase)


@gluon.jit
def roles_kernel(
    claimed_ptr,  # (1,) int32, zero
    rows_desc,  # (R, K) bf16
    weights_desc,  # (E * N, K) bf16
    out_ptr,  # (R, N) bf16
    tiles_ptr,  # (X, 5) int32
    tile_count_ptr,  # (1,) int32
    N8, K8,  # N / 8 and K / 8
    PART: gl.constexpr,  # 0 whole, 1 loads only, 2 multiply only
):
    """Level 8's down projection as it is where F is short, each tile stored at once, or a part of it.

    Grid (SMs,): a program owns the 128 x 256 tiles that it claims."""
    finish: gl.constexpr = store_y
    ring = open_ring(1)
    walk = walk_tiles(tiles_ptr, tile_count_ptr, N8 * 8, K8 * 8)
    if PART == 0:
        gl.warp_specialize([
            (consume, (out_ptr, N8, walk[3], ring, finish, 0, False)),
            (consume, (out_ptr, N8, walk[3], ring, finish, 1, False)),
            (produce_rows, (rows_desc, weights_desc, walk, one_band(walk), claimed_ptr, N8 * 8, ring)),
        ], [4, 1], [232, 32])
    elif PART == 1:
        gl.warp_specialize([
            (drain, (walk[3], ring)),
            (drain, (walk[3], ring)),
            (produce_rows, (rows_desc, weights_desc, walk, one_band(walk), claimed_ptr, N8 * 8, ring)),
        ], [4, 1], [232, 32])
    else:
        gl.warp_specialize([
            (consume, (out_ptr, N8, walk[3], ring, finish, 0, False)),
            (consume, (out_ptr, N8, walk[3], ring, finish, 1, False)),
            (announce, (walk, claimed_ptr, ring)),
        ], [4, 1], [232, 32])


@gluon.jit
def note(log_ptr, party: gl.constexpr, step, field: gl.constexpr):
    """Program 0 writes the cycle counter as `field` of one of a party's first steps."""
    now = cycles()
    if (gl.program_id(0) == 0) & (step < _LOGGED):
        gl.store(log_ptr + (party * _LOGGED + step) * 2 + field, now)


@gluon.jit
def produce_noting(rows_desc, weights_desc, walk, weight_rows, ring, log_ptr):
    """Level 8's producer, with a note before and after each wait for a free stage. Here tiles are dealt out in turn."""
    tiles_ptr, total, column_tiles, k_steps = walk
    rows, weights, _told, full, empty = ring
    stage = 0
    phase = 0
    step = 0
    for tile in range(gl.program_id(0), total, gl.num_programs(0)):
        expert, row, _, column, _ = find_tile_ahead(tiles_ptr, tile, total, column_tiles)
        weight_row = expert * weight_rows + column * _BLOCK_N
        for k in range(k_steps):
            bar = full.index(stage)
            note(log_ptr, 0, step, 0)
            mbarrier.wait(empty.index(stage), phase ^ 1)
            note(log_ptr, 0, step, 1)
            mbarrier.expect(bar, _WEIGHT_BYTES + 2 * _ROW_BYTES)
            tma.async_copy_global_to_shared(weights_desc, [weight_row, k * _BLOCK_K], bar, weights.index(stage))
            for wg in gl.static_range(2):
                tma.async_copy_global_to_shared(rows_desc, [row + wg * _ROWS, k * _BLOCK_K], bar,
                                                rows.index(stage * 2 + wg))
            stage, phase = next_stage(stage, phase, _STAGES)
            step += 1


@gluon.jit
def consume_noting(out_ptr, width8, walk, ring, finish: gl.constexpr, WG: gl.constexpr, log_ptr):
    """consume, with a note before and after each wait for a full stage. A stage is multiplied to its end before the
    next is waited for, which the real one does not do: so that a note means what it says."""
    tiles_ptr, total, column_tiles, k_steps = walk
    rows, weights, _told, full, empty = ring
    stage = 0
    phase = 0
    step = 0
    for tile in range(gl.program_id(0), total, gl.num_programs(0)):
        _, row, used, column, _ = find_tile_ahead(tiles_ptr, tile, total, column_tiles)
        acc = gl.zeros([_ROWS, _BLOCK_N], gl.float32, _ACC)
        for _ in range(k_steps):
            note(log_ptr, 1 + WG, step, 0)
            mbarrier.wait(full.index(stage), phase)
            note(log_ptr, 1 + WG, step, 1)
            acc = warpgroup_mma(rows.index(stage * 2 + WG), weights.index(stage).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            mbarrier.arrive(empty.index(stage))
            stage, phase = next_stage(stage, phase, _STAGES)
            step += 1
        if used > WG * _ROWS:
            finish(out_ptr, width8 * 8, acc, row + WG * _ROWS, column, row + used)


@gluon.jit
def noting_kernel(rows_desc, weights_desc, out_ptr, tiles_ptr, tile_count_ptr, N8, K8, log_ptr):
    """roles_kernel, whole, with a log (3, LOGGED_STEPS, 2) int64: producer and two consumers; waits from, goes on."""
    finish: gl.constexpr = store_y
    ring = open_ring(1)
    walk = walk_tiles(tiles_ptr, tile_count_ptr, N8 * 8, K8 * 8)
    gl.warp_specialize([
        (consume_noting, (out_ptr, N8, walk, ring, finish, 0, log_ptr)),
        (consume_noting, (out_ptr, N8, walk, ring, finish, 1, log_ptr)),
        (produce_noting, (rows_desc, weights_desc, walk, N8 * 8, ring, log_ptr)),
    ], [4, 1], [232, 40])


# ---- measuring -----------------------------------------------------------------------------------

@dataclass(frozen=True)
class Size:
    """What is multiplied; blocks and depths of the sweep, and the wider block at which roles are compared."""

    E: int
    R: int
    N: int
    K: int
    block_M: int
    block_N: int
    wide_N: int
    block_K: int
    warps: int


FULL = Size(E=64, R=65536, N=1536, K=2048, block_M=128, block_N=128, wide_N=256, block_K=64, warps=8)
QUICK = Size(E=2, R=64, N=32, K=64, block_M=32, block_N=16, wide_N=32, block_K=16, warps=4)


class Problem:
    """Rows, weights and output on the device, and calls of the kernels on them."""

    def __init__(self, size: Size, device: torch.device):
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        generator = torch.Generator(device).manual_seed(0)
        self.size, self.device = size, device
        self.a_RK = torch.randn(size.R, size.K, generator=generator, device=device).to(dtype)
        self.w_ENK = torch.randn(size.E, size.N, size.K, generator=generator, device=device).mul_(
            size.K ** -0.5).to(dtype)
        self.out_RN = torch.empty(size.R, size.N, dtype=dtype, device=device)
        self.programs = sm_count(device) if device.type == "cuda" else 2

    def one_role(self, block_N: int, depth: int, by_tma: bool, part: int) -> Callable[[], None]:
        """A call of one_role_kernel."""
        size = self.size
        a, w, load = self.a_RK, self.w_ENK.flatten(0, 1), load_by_pointers
        if by_tma:
            a = TensorDescriptor.from_tensor(a, [size.block_M, size.block_K])
            w = TensorDescriptor.from_tensor(w, [block_N, size.block_K])
            load = load_by_tma
        return lambda: one_role_kernel[(self.programs,)](
            a, w, self.out_RN, size.R // size.block_M, size.R // size.E, size.N, size.K, load=load, PART=part,
            STAGES=depth, BLOCK_M=size.block_M, BLOCK_N=block_N, BLOCK_K=size.block_K, num_warps=size.warps)

    def roles_arguments(self) -> tuple:
        """What roles_kernel and noting_kernel take, but for the counter. Raises Unsupported off sm_90."""
        if self.device.type != "cuda" or torch.cuda.get_device_capability() != (9, 0):
            raise Unsupported("needs sm_90")
        size = self.size
        offsets_E1 = torch.arange(size.E + 1, dtype=torch.int32, device=self.device) * (size.R // size.E)
        plan = plan_tiles(offsets_E1, size.R)
        return (describe(self.a_RK, ROWS), describe(self.w_ENK.flatten(0, 1), BLOCK_N), self.out_RN, plan.tiles_X5,
                plan.tile_count, size.N // 8, size.K // 8)

    def roles(self, part: int) -> Callable[[], None]:
        """A call of roles_kernel, and of the fill that sets its counter back."""
        arguments = self.roles_arguments()
        claimed = torch.zeros(1, dtype=torch.int32, device=self.device)

        def call() -> None:
            claimed.zero_()
            roles_kernel[(self.programs,)](claimed, *arguments, PART=part, num_warps=4, maxnreg=168)

        return call

    def timeline(self) -> list:
        """The log of noting_kernel: [party][step][begins to wait, goes on], cycles since the first note."""
        log = torch.zeros(3, LOGGED_STEPS, 2, dtype=torch.int64, device=self.device)
        for _ in range(2):  # the first call compiles, and finds a cold cache
            noting_kernel[(self.programs,)](*self.roles_arguments(), log, num_warps=4, maxnreg=168)
        self.check("kernel with a log")
        return (log - log[log > 0].min()).cpu().tolist()

    def check(self, name: str) -> None:
        """Raise RuntimeError unless out_RN holds the product."""
        ref_RN = torch.bmm(self.a_RK.view(self.size.E, -1, self.size.K).double(), self.w_ENK.double().transpose(1, 2))
        error = relative_error(self.out_RN, ref_RN.flatten(0, 1))
        bound = 2 * torch.finfo(self.out_RN.dtype).eps + 1e-6
        if not error <= bound:
            raise RuntimeError(f"{name}: relative error {error:.2e} is over {bound:.2e}, so it is not timed")


def variants(problem: Problem, full: bool) -> list[dict]:
    """What is compared: block width, roles, loads, depth, and a call for each part."""
    size, found = problem.size, []
    depths = DEPTHS if full else (1, 2)
    wanted = [(size.block_N, depth, by_tma) for by_tma in (False, True) for depth in depths]
    wanted += [(size.wide_N, depth, by_tma) for by_tma in (False, True) for depth in ((3, 4) if full else (2,))]
    for block_N, depth, by_tma in wanted:
        found.append({"roles": "one", "loads": "TMA" if by_tma else "pointers", "block_N": block_N, "depth": depth,
                      "build": lambda part, n=block_N, d=depth, t=by_tma: problem.one_role(n, d, t and part < 2, part)})
    found.append({"roles": "specialised", "loads": "TMA", "block_N": BLOCK_N, "depth": _STAGES.value,
                  "build": problem.roles})
    return found


def measure(options: Options) -> dict:
    """Check every whole kernel, then time all parts of all variants in the same rounds."""
    size = FULL if options.full else QUICK
    problem = Problem(size, options.device)
    found, calls = variants(problem, options.full), {}
    for place, variant in enumerate(found):
        name = f"{variant['roles']} role, {variant['loads']}, 128 x {variant['block_N']}, depth {variant['depth']}"
        options.say(f"{name}: compiling, checking")
        build = variant.pop("build")
        variant |= {"status": "ok", "ms": {}}
        try:
            problem.out_RN.fill_(float("nan"))
            build(0)()
            problem.check(name)
            for part, label in enumerate(PARTS):
                key = (place, label) if label != "multiply only" else (variant["roles"], variant["block_N"])
                if key not in calls:  # multiplying does not depend on how loads are made, nor how deep
                    calls[key] = build(part)
                    calls[key]()
                variant["ms"][label] = key
        except Unsupported as lack:
            variant["status"] = f"n/a ({lack})"
        except OutOfResources as error:
            variant["status"] = f"n/a (shared memory: needs {error.required:,} bytes, has {error.limit:,})"
    options.say(f"timing {len(calls)} kernels in rounds")
    times = time_together(calls, GpuClock(options.device), 12 if options.full else 3)
    for variant in found:
        variant["ms"] = {label: times[key] for label, key in variant["ms"].items()}
        variant["tflops"] = rate(2 * size.R * size.N * size.K, variant["ms"].get("whole"))
    timeline = []
    if options.device.type == "cuda":
        options.say("timeline")
        timeline = problem.timeline()
    return {"E": size.E, "R": size.R, "N": size.N, "K": size.K, "block_M": size.block_M, "block_K": size.block_K,
            "sweep_N": size.block_N, "interpreted": options.device.type != "cuda", "variants": found,
            "timeline_cycles": timeline}


# ---- showing -------------------------------------------------------------------------------------

def overlap(variant: dict) -> float | None:
    """How much of what could overlap does: 1 if the whole takes as long as the longer part, 0 if as both in turn."""
    ms = {part: variant["ms"][part]["p50"] for part in variant["ms"]}
    if len(ms) < len(PARTS):
        return None
    shorter = min(ms["loads only"], ms["multiply only"])
    return (ms["loads only"] + ms["multiply only"] - ms["whole"]) / shorter


def name_of(variant: dict) -> str:
    """A variant in a few words."""
    return f"{variant['roles']}, {variant['loads']}, width {variant['block_N']}, depth {variant['depth']}"


def table(figures: dict) -> list[PlainTable | str]:
    """A row a variant: times of its parts, what of them overlaps."""
    rows = []
    for variant in figures["variants"]:
        if variant["status"] != "ok":
            rows.append([name_of(variant), variant["status"], "-", "-", "-", "-"])
            continue
        ms = variant["ms"]
        rows.append([name_of(variant), *(number(ms[part]["p50"]) for part in PARTS),
                     number(variant["tflops"]["p50"]), percent(overlap(variant))])
    words = " (Triton's interpreter: times mean nothing)" if figures["interpreted"] else ""
    parts: list[PlainTable | str] = [PlainTable(
        f"{figures['E']} experts, R={figures['R']:,} N={figures['N']:,} K={figures['K']:,}, row tiles of "
        f"{figures['block_M']}{words}", ["roles, loads, width, depth", *(f"{part}, ms" for part in PARTS), "TFLOP/s",
                                         "overlapped"], rows)]
    if not figures["timeline_cycles"]:
        parts.append("timeline: n/a (needs sm_90)")
    return parts


def draw(figures: dict, under: str) -> dict[str, Figure]:
    """Left: time against depth, by pointers and by TMA. Right: the best of each kind with its parts. And a timeline."""
    shape = f"{figures['E']} experts, R={figures['R']:,}, N={figures['N']:,}, K={figures['K']:,}  |  {under}"
    fig, (left, right) = figure("Overlap: what depth, TMA and warp roles buy", shape, columns=2, widths=[1, 1.25])
    sweep = [v for v in figures["variants"] if v["roles"] == "one" and v["block_N"] == figures["sweep_N"]]
    for loads, color in (("pointers", COLORS[3]), ("TMA", COLORS[0])):
        points = [(v["depth"], v["ms"]["whole"]["p50"]) for v in sweep if v["loads"] == loads and v["status"] == "ok"]
        left.plot(*zip(*points, strict=True), "o-", lw=3, ms=10, color=color, label=f"loads by {loads}", gid=loads)
    left.set(xlabel="pipeline depth (stages)", ylabel="milliseconds on the GPU",
             title=f"One role, tile {figures['block_M']} x {figures['sweep_N']}")
    left.set_xticks(sorted({v["depth"] for v in sweep}))
    left.set_ylim(bottom=0)
    left.grid(alpha=0.3)
    left.legend()
    best = best_of_kinds(figures)
    for place, variant in enumerate(best):
        for offset, part, color in zip((-0.27, 0, 0.27), PARTS, COLORS, strict=False):
            ms = variant["ms"][part]["p50"]
            right.barh(place + offset, ms, 0.25, color=color, gid=f"{place} {part}",
                       label=part if place == 0 else None)
            right.text(ms, place + offset, f" {number(ms)}", va="center", fontsize=14)
    right.set_yticks(range(len(best)), [f"{v['roles']} role{'s' if v['roles'] != 'one' else ''}\n{v['loads']}\n"
                                        f"{figures['block_M']} x {v['block_N']}, depth {v['depth']}" for v in best])
    right.invert_yaxis()
    right.set_xlim(0, 1.55 * max(v["ms"]["whole"]["p50"] for v in best))
    right.set(xlabel="milliseconds on the GPU", title="The fastest of each kind, and its parts alone")
    right.legend(fontsize=14, loc="lower right")
    figs = {"": fig}
    if figures["timeline_cycles"]:
        figs["timeline"] = draw_timeline(figures, shape)
    return figs


def best_of_kinds(figures: dict) -> list[dict]:
    """The fastest variant for each kind of roles and loads."""
    kinds: dict[tuple, dict] = {}
    for variant in figures["variants"]:
        kind = (variant["roles"], variant["loads"])
        if variant["status"] == "ok" and (kind not in kinds or
                                          variant["ms"]["whole"]["p50"] < kinds[kind]["ms"]["whole"]["p50"]):
            kinds[kind] = variant
    return list(kinds.values())


def waiting_share(steps: list[list[int]]) -> float:
    """Share of its time that a party of the timeline waits: between the first note and the last."""
    return sum(on - begin for begin, on in steps) / (steps[-1][1] - steps[0][0])


def draw_timeline(figures: dict, under: str) -> Figure:
    """Producer and consumers of one SM over cycles: waiting, or at work."""
    fig, (ax,) = figure("One SM, three parties: who waits for whom", under)
    names = ("producer\n(one warp)", "consumer 0\n(rows 0-63)", "consumer 1\n(rows 64-127)")
    for place, (name, steps) in enumerate(zip(names, figures["timeline_cycles"], strict=True)):
        waits = [(begin, on - begin) for begin, on in steps]
        works = [(on, after[0] - on) for (_, on), after in pairwise(steps)]
        ax.broken_barh(works, (place - 0.4, 0.8), color=COLORS[0] if place else COLORS[2], gid=f"{name} works")
        ax.broken_barh(waits, (place - 0.4, 0.8), color="#d9dce1", gid=f"{name} waits")
        ax.plot([on for _, on in steps], [place] * len(steps), "|", ms=24, color="black", alpha=0.6)
        ax.text(1.005, place, f"waits\n{percent(waiting_share(steps))}", transform=ax.get_yaxis_transform(),
                va="center")
    ax.set_yticks(range(3), names)
    ax.invert_yaxis()
    ax.xaxis.set_major_formatter("{x:,.0f}")
    ax.set(xlabel="SM cycles since the kernel's first wait (its own notes; writing them slows it a little)")
    ax.legend(handles=[Patch(color=COLORS[2], label="asks for a stage's loads"),
                       Patch(color=COLORS[0], label="multiplies, or stores a finished tile (long bars)"),
                       Patch(color="#d9dce1", label="waits"),
                       Line2D([], [], ls="", marker="|", ms=24, color="black", label="goes on: next stage")],
              loc="upper center", bbox_to_anchor=(0.5, 1.09), ncols=4, frameon=False)
    return fig


def conclude(figures: dict) -> str:
    """What depth brings, what TMA brings at the best depth, what roles bring, and what is left to wait for."""
    ok = [v for v in figures["variants"] if v["status"] == "ok"]
    sweep = {(v["loads"], v["depth"]): v["ms"]["whole"]["p50"] for v in ok
             if v["roles"] == "one" and v["block_N"] == figures["sweep_N"]}
    parts = []
    for loads in ("pointers", "TMA"):
        of_kind = {depth: ms for (kind, depth), ms in sweep.items() if kind == loads}
        first, best = min(of_kind), min(of_kind, key=of_kind.get)
        if best != first:
            told = f"depth {best} takes {number(of_kind[best] / of_kind[first])} of depth {first}'s time"
        else:
            told = f"no depth is faster than depth {first}" if len(of_kind) > 1 else f"only depth {first} ran"
        parts.append(f"with {loads}, {told}")
    fastest = {(v["roles"], v["loads"]): v["ms"]["whole"]["p50"] for v in best_of_kinds(figures)}
    one, tma_ms = fastest[("one", "pointers")], fastest[("one", "TMA")]
    parts.append(f"TMA takes {number(tma_ms / one)} of the time of pointers")
    roles = next((v for v in ok if v["roles"] == "specialised"), None)
    if roles:
        parts.append(f"specialised warps {number(roles['ms']['whole']['p50'] / min(one, tma_ms))} of the best without "
                     f"roles, overlapping {percent(overlap(roles))} of their loads")
    return "; ".join(parts)[0].upper() + "; ".join(parts)[1:] + "."


STUDY = Study("io_overlap", "What do pipelining, TMA and warp roles buy in a grouped GEMM, and what does it wait for?",
              measure, table, draw, conclude)

if __name__ == "__main__":
    raise SystemExit(main(STUDY))
