"""Which kernels run the experts: a table for the GPUs that were measured, a bounded search for the others.

    kernels     what they are                                              where
    few_rows    decode.py: weights on wgmma's tall side, read once         sm_90, few rows an expert
    gather      grouped_gemm.py: 128-row tiles, rows gathered as they load sm_90, bfloat16
    ahead       up_ahead.py: rows gathered by spare warps, all by TMA      sm_90, bfloat16
    spread      grouped_gemm.py: rows gathered before, then all by TMA     sm_90, bfloat16, by a search only
    tall        tall_gemm.py: the same in tiles of 192 rows                sm_90, bfloat16, D over 192, wide F
    pipelined   plain_gemm.py: cp.async ahead of the multiply, no roles    sm_80, 86, 89, 120; float16 on sm_90; CPU

How the table for sm_90 was found: the kernels timed beside each other on six presets, on an H200 (labs/LOG.md).
Gathering ahead moves some 2 * R * D values and the up projection takes 4 * R * D * F operations, so it pays from some F
on, where rows are many. A tall tile pays where wide experts have about 128 rows each: half of them more than a tile of
128 holds, and next to none more than 192, so that each weight is read once. Weights on wgmma's tall side pay for fewer
rows yet, and for layers too small to give all SMs a tile of 128 by 256.

Whether to search is MOE_AUTOTUNE: `off` takes the table; `cached`, the default, takes what a search found on this kind
of GPU before, else the table; `search` searches what is not cached. At most one search a shape class, a minute each.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from common.config import dtype_name
from common.level import Unsupported
from labs.kernels.launch import compile_together
from labs.kernels.plain_gemm import TILES, PlainTile
from labs.kernels.tall_gemm import PREFETCHED

# D model width, F expert width, E experts, R = T*K routed rows.

FEW_ROWS = 24  # mean rows an expert up to which few_rows is no slower than gather
FEW_ROWS_ALONE = 66  # the same where there is no gather, or not enough of its tiles
LEAST_WIDTH = 2**15  # E * D from which down has a column tile for about each SM
MOST_FEW_ROWS = 128  # beyond which a search does not try few_rows; rounding starts here, and has no work list
TALL_ROWS, TALL_WIDTH = range(112, 160), 4096  # mean rows an expert, and F from which a tile of 192 rows pays
AHEAD_ROWS, AHEAD_WIDTH = 256, 2048  # mean rows an expert and F from which gathering ahead pays
GROUPS = (8, 32)  # row tiles that walk through their expert's weights together
INTERPRETED = PlainTile(64, 64, 32, warps=4, stages=2, tma=False)
SMALL_PIPELINED = PlainTile(64, 128, 64, warps=4, stages=3, tma=False)  # 72 of 99 KB: fits every GPU of the table
MODES = ("off", "cached", "search")
SEARCH_SECONDS = 60.0
TIMED_CALLS = 7


class Choice(NamedTuple):
    """Kernels by the name in the module's table, their group of row tiles, and the tile where it is not fixed."""

    kernels: str
    group: int = 32
    tile: PlainTile | None = None

    def __str__(self) -> str:
        rows = {"ahead": "128x256", "gather": "128x256", "spread": "128x256", "tall": "192x256"}
        size = f"{self.tile.block_M}x{self.tile.block_N}" if self.tile else rows.get(self.kernels, "")
        return f"{self.kernels} {size}".rstrip()

    @property
    def detail(self) -> str:
        """All that tells it from other choices."""
        tile = f", {self.tile.block_K} deep, {self.tile.warps} warps, {self.tile.stages} stages" if self.tile else ""
        return f"{self}{tile}, group {self.group}"


def capability(device: torch.device) -> int:
    """90 for 9.0; 0 for a CPU, where Triton's interpreter runs. Raises Unsupported for a GPU without kernels here."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    sm = 10 * major + minor
    if sm not in TILES:
        note = " (Blackwell's tensor cores are not Hopper's: nothing here was compiled for them)" if major == 10 else ""
        raise Unsupported(f"needs one of sm_{', sm_'.join(map(str, TILES))}, this is sm_{sm}{note}")
    return sm


def from_table(R: int, D: int, F: int, E: int, dtype: torch.dtype, sm: int) -> Choice:
    """The kernels for R rows, by their mean an expert: never by the counts, which stay on the device."""
    mean = R / E
    if sm == 0:
        return Choice("few_rows") if mean <= FEW_ROWS_ALONE else Choice("pipelined", tile=INTERPRETED)
    if sm != 90:
        return Choice("pipelined", tile=TILES[sm] if mean > SMALL_PIPELINED.block_M else SMALL_PIPELINED)
    if mean <= (FEW_ROWS if dtype == torch.bfloat16 and E * D >= LEAST_WIDTH else FEW_ROWS_ALONE):
        return Choice("few_rows")
    if dtype != torch.bfloat16:
        return Choice("pipelined", tile=TILES[90])
    if int(mean) in TALL_ROWS and F >= TALL_WIDTH and D > PREFETCHED:
        return Choice("tall", group=16)
    return Choice("ahead" if F >= AHEAD_WIDTH and mean >= AHEAD_ROWS else "gather")


def candidates(R: int, D: int, F: int, E: int, dtype: torch.dtype, sm: int, shared_bytes: int) -> list[Choice]:
    """What a search tries, the table's choice first. shared_bytes: shared memory that one program may use."""
    mean = R / E
    found = [from_table(R, D, F, E, dtype, sm)]
    if sm == 90:
        if mean < MOST_FEW_ROWS:
            found.append(Choice("few_rows"))
        if dtype == torch.bfloat16:
            found += [Choice(kernels, group) for kernels in ("gather", "ahead", "spread") for group in GROUPS]
            if min(D, F) > PREFETCHED:
                found.append(Choice("tall", group=16))
    tiles = [TILES[sm], SMALL_PIPELINED] + [
        PlainTile(rows, columns, depth, warps, stages, tma=False)
        for rows, columns, depth, warps in ((64, 64, 64, 4), (64, 256, 32, 4), (128, 128, 64, 8), (128, 64, 64, 4))
        for stages in (3, 4)]
    fitting = [tile for tile in tiles if tile.stages * (tile.block_M + tile.block_N) * tile.block_K * 2 <= shared_bytes]
    found += [Choice("pipelined", group, tile) for tile in fitting for group in (GROUPS if sm != 90 else GROUPS[:1])]
    return list(dict.fromkeys(found))


def cache_path() -> Path:
    """Where searches leave what they found."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moe-journey" / "choices.json"


def read_cache(path: Path) -> dict[str, dict]:
    """Key -> {"choice", "ms", "tried": {name: ms}}; empty if there is no file. Raises ValueError, naming it, if it
    cannot be read."""
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no cache of choices ({error}): delete it, or set MOE_AUTOTUNE=off") from error


def parse(fields: list) -> Choice:
    """A Choice from what JSON makes of one."""
    kernels, group, tile = fields
    return Choice(kernels, group, PlainTile(*tile) if tile else None)


def median_ms(call: Callable[[], object]) -> float:
    """Milliseconds on the GPU, the median of a few replays of one captured call: launched one by one, its kernels would
    wait for the host."""
    compile_together(call)
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream()):  # by default it is on the GPU that captured first
        call()
    graph.replay()
    taken = []
    for _ in range(TIMED_CALLS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end))
    return statistics.median(taken)


class Chooser:
    """Choices for one layer, remembered by R. `mode` is one of MODES, by default MOE_AUTOTUNE or `cached`.

    Raises ValueError for an unknown mode or an unreadable cache, Unsupported for a GPU without kernels here.
    """

    def __init__(self, D: int, F: int, E: int, dtype: torch.dtype, device: torch.device, mode: str | None = None):
        self.mode = mode or os.environ.get("MOE_AUTOTUNE", "cached")
        if self.mode not in MODES:
            raise ValueError(f"MOE_AUTOTUNE={self.mode}: choose one of {', '.join(MODES)}")
        self.sizes, self.dtype, self.device, self.sm = (D, F, E), dtype, device, capability(device)
        self.known: dict[int, Choice] = {}
        searchable = self.mode != "off" and device.type == "cuda"
        self.cached = read_cache(cache_path()) if searchable else {}

    def key(self, R: int) -> str:
        """The shape class of R rows: the mean rows an expert count in powers of two."""
        D, F, E = self.sizes
        gpu = torch.cuda.get_device_name(self.device)
        rows = f"rows 2^{max(R // E, 1).bit_length() - 1}"
        return f"{gpu} torch {torch.__version__} {dtype_name(self.dtype)} D{D} F{F} E{E} {rows}"

    def __call__(self, R: int, run: Callable[[Choice], object] | None = None) -> Choice:
        """The choice for R rows. Searches, timing run(choice) on the current stream, where the mode says so and `run`
        is given; not while a graph is captured, so call once before."""
        if R not in self.known:
            cached = self.cached.get(self.key(R)) if self.cached else None
            if cached:
                self.known[R] = parse(cached["choice"])
            elif self.mode == "search" and run and self.sm:
                self.known[R] = self.search(R, run)
            else:
                self.known[R] = from_table(R, *self.sizes, self.dtype, self.sm)
        return self.known[R]

    def search(self, R: int, run: Callable[[Choice], object]) -> Choice:
        """The fastest candidate, told to the cache. Says what it tries; starts no new one after a minute."""
        shared_bytes = torch.cuda.get_device_properties(self.device).shared_memory_per_block_optin
        found: dict[Choice, float] = {}
        start = time.perf_counter()
        tried = candidates(R, *self.sizes, self.dtype, self.sm, shared_bytes)
        for i, choice in enumerate(tried):
            if found and time.perf_counter() - start > SEARCH_SECONDS:
                print(f"autotune: a minute is over, {len(tried) - i} of {len(tried)} not tried", file=sys.stderr)
                break
            found[choice] = median_ms(lambda choice=choice: run(choice))
            print(f"autotune {i + 1} of {len(tried)}: {choice.detail}: {found[choice]:.3f} ms", file=sys.stderr)
        best = min(found, key=found.__getitem__)
        entry = {"choice": best, "ms": found[best], "tried": {choice.detail: ms for choice, ms in found.items()}}
        path = cache_path()
        path.parent.mkdir(parents=True, exist_ok=True)
        self.cached = read_cache(path) | {self.key(R): entry}
        fresh = path.with_suffix(f".{os.getpid()}")  # another process may read: it sees the old file or the new one
        fresh.write_text(json.dumps(self.cached, indent=1))
        fresh.replace(path)
        return best
