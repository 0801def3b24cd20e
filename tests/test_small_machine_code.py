"""What routing, the decode GEMMs and combine of labs/kernels compile to, in every tiling that they are launched with:
python -m pytest tests/test_small_machine_code.py"""

from __future__ import annotations

import dataclasses
import inspect

import pytest
import torch

from common.config import MoEConfig, preset
from labs.kernels import combine, decode, launch, routing
from tests.machine_code import Compiled, Request, compile_all

import triton  # isort: skip  (after common.level, which picks Triton's interpreter where there is no GPU)

HOPPER_SHARED = 227 * 1024
TYPES = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32", torch.float16: "fp16"}
OTHER_SHARED = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 120: 99 * 1024}  # that a program may use, in bytes
ALIGNED = ("D", "F", "split_D", "first_column")  # the numbers that Triton specializes; of others it is told not to
SEED, MIXTRAL, QWEN = preset("seed"), preset("mixtral-8x7b"), preset("qwen3-30b-a3b")
# A shape for every tiling that tiles_for can give.
DECODE_SHAPES = (
    *((SEED, T) for T in (8, 64, 128)), *((MIXTRAL, T) for T in (1, 8, 64, 128, 256, 512)),
    *((QWEN, T) for T in (1, 64, 256)),
)
ROUTE_SHAPES = {
    "one launch": ((MIXTRAL, 1), (MIXTRAL, 256), (QWEN, 64), (preset("deepseek-v3"), 64)),
    "one launch, 512 experts": ((MoEConfig("many", 4096, 8, 512, 10), 256),),
    "two launches": ((QWEN, 16384), (QWEN, 20000), (preset("olmoe-1b-7b"), 16384)),
    "three launches": ((MIXTRAL, 512), (QWEN, 1024), (preset("deepseek-v3"), 4096)),
}


class Launches:
    """Stands in for kernels of labs/kernels: notes what their launchers pass instead of launching."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.requests: dict[str, Request] = {}
        monkeypatch.setitem(launch.DTYPES, "meta", (torch.bfloat16,))  # real shapes without their memory
        for module in (routing, decode, combine):
            monkeypatch.setattr(module, "early_launch", lambda device: True)
            for name, kernel in vars(module).copy().items():
                if name.endswith("_kernel"):
                    monkeypatch.setattr(module, name, self.recorder(module.__name__, name, kernel))

    def recorder(self, module: str, name: str, kernel) -> object:
        parameters = list(inspect.signature(kernel.fn).parameters)

        class Recorder:
            def __getitem__(_, grid):  # noqa: N805
                def launch(*args, **kwargs):
                    self.note(module, name, dict(zip(parameters, args, strict=False)), kwargs)

                return launch

        return Recorder()

    def note(self, module: str, name: str, args: dict, kwargs: dict) -> None:
        warps = kwargs.pop("num_warps")
        kwargs.pop("launch_pdl", None)
        signature = {}
        for argument, value in args.items():
            if isinstance(value, torch.Tensor):
                signature[argument] = f"*{TYPES[value.dtype]}"
            elif isinstance(value, int):
                signature[argument] = "i32"
            else:
                box = ",".join(map(str, value.block_shape))
                signature[argument] = f"tensordesc<{TYPES[value.base.dtype]}[{box}]>"
        aligned = tuple(argument for argument, kind in signature.items()
                        if kind.startswith("*") or (argument in ALIGNED and args[argument] % 16 == 0))
        key = f"{name} {signature} {kwargs}"
        self.requests[key] = Request(key, module, name, signature, kwargs, aligned, warps, stages=3)

    def compile(self) -> dict[str, Compiled]:
        return compile_all(list(self.requests.values()))


@pytest.fixture
def launches(monkeypatch) -> Launches:
    return Launches(monkeypatch)


def check_code(name: str, code: Compiled, tma: bool) -> None:
    assert code.count("LDL|STL") == code.stack_bytes == 0, name
    assert code.shared_bytes <= HOPPER_SHARED, name
    assert code.count(r"(ATOM[GS]?|REDG?)\..*F(16|32|64)") == 0, f"{name}: float atomics"
    assert code.count("PREEXIT") > 0, f"{name} does not let the next kernel start early"
    if tma:
        assert code.count("UTMALDG") > 0, name
        assert code.count("HGMMA") > 0, name


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def check_occupancy(name: str, code: Compiled, tiles: decode.Tiles, kind: str) -> None:
    """Shared memory for the stages and little else; programs an SM as tiles_for means them: one if they are persistent
    or are to have an SM each, else several, so that one loads while another stores."""
    tiling = tiles.up if kind == "up" else tiles.down
    tall = (2 if kind == "up" else 1) * tiling.strip
    stages = tiling.stages * (tall + tiles.row_tile) * tiling.depth * 2
    assert code.shared_bytes <= stages + 1024, name
    threads = 32 * tiling.warps
    by_registers = 65536 // (threads * triton.cdiv(code.registers, 8) * 8)
    by_memory = 228 * 1024 // (code.shared_bytes + 1024)  # of an SM's 228 KB the driver takes one for each program
    alone = tiling.persistent or tiling.stages > 4
    assert min(by_registers, by_memory) >= (1 if alone else 2), name
    assert not alone or by_memory == 1, name


@pytest.mark.parametrize("kind", ["up", "down"])
def test_machine_code_of_every_decode_tiling(kind, launches):
    tilings = {}
    for cfg, T in DECODE_SHAPES:
        R = T * cfg.K
        known = set(launches.requests)
        tiles = decode.tiles_for(R, cfg.D, cfg.F, cfg.E, 132)
        work_W4 = meta(routing.work_entries(R, cfg.E, tiles.row_tile), 4, dtype=torch.int32)
        if kind == "up":
            decode.up_swiglu(meta(T, cfg.D), meta(cfg.E, 2 * cfg.F, cfg.D), meta(R, dtype=torch.int32), work_W4, tiles)
        else:
            decode.down(meta(R, cfg.F), meta(cfg.E, cfg.D, cfg.F), work_W4, tiles)
        tilings |= {name: tiles for name in launches.requests if name not in known}
    assert len(launches.requests) >= 8, "as many tilings as the table has"
    for name, code in launches.compile().items():
        check_code(name, code, tma=True)
        check_occupancy(name, code, tilings[name], kind)
        if kind == "up":
            assert code.count(r"LDGSTS.*128") > 0, f"{name}: rows of x travel in 16-byte copies"


@pytest.mark.parametrize("path", ROUTE_SHAPES)
def test_machine_code_of_routing(path, launches):
    for cfg, T in ROUTE_SHAPES[path]:
        assert routing.route_tiling_for(T, cfg.E, 132).launches == ["one", "two", "three"].index(path.split()[0]) + 1
        routing.route(meta(T, cfg.D), meta(cfg.E, cfg.D), cfg.K, routing.new_arrivals("meta"), 16 if T <= 256 else 0,
                      routing.scores_sum_to_one(cfg))
    for name, code in launches.compile().items():
        check_code(name, code, tma=name.startswith("logits"))


def test_machine_code_of_the_work_list(launches):
    for E in (8, 128, 512):
        routing.list_work(meta(E + 1, dtype=torch.int32), 64 * E, 80)
    for name, code in launches.compile().items():
        check_code(name, code, tma=False)


@pytest.mark.parametrize("sm", [80, 86, 89, 120])
def test_machine_code_of_routing_and_combine_elsewhere(sm, launches, monkeypatch):
    """GPUs without TMA: the same kernels, their descriptors made pointers, in the shared memory that there is."""
    for module in (routing, combine):
        monkeypatch.setattr(module, "early_launch", lambda device: False)
    monkeypatch.setattr(routing, "pipeline_bytes", lambda device: OTHER_SHARED[sm] - launch.RESERVED_BYTES)
    for cfg, T in [shapes[0] for shapes in ROUTE_SHAPES.values()]:
        routing.route(meta(T, cfg.D), meta(cfg.E, cfg.D), cfg.K, routing.new_arrivals("meta"), 128)
    combine.combine(meta(512, 2048), meta(64, 8, dtype=torch.int32), meta(64, 8, dtype=torch.float32))
    launches.requests = {name: dataclasses.replace(one, sm=sm) for name, one in launches.requests.items()}
    for name, code in launches.compile().items():
        assert code.shared_bytes <= OTHER_SHARED[sm], name
        if name.startswith(("logits", "route_and")):
            assert code.count("HMMA") > 0, name


def test_machine_code_of_combine(launches):
    for T, D, K in ((64, 2048, 8), (256, 4096, 2), (16384, 2048, 8)):
        combine.combine(meta(T * K, D), meta(T, K, dtype=torch.int32), meta(T, K, dtype=torch.float32))
    for name, code in launches.compile().items():
        check_code(name, code, tma=False)
        wide = r"LDG\.E.*\.128" if "'BLOCK_D': 512" not in name else r"LDG\.E.*\.64"
        assert code.count(wide) >= 2, f"{name}: a load of each choice's row, as wide as the threads allow"
