"""Run a Hopper kernel's PTX on a CPU, a program at a time: what the machine code's pieces do together, without a GPU.

    emulate(ptx, "down_kernel", [tensor, TensorMap(...), 7, ...])

Every warp is 32 lanes in lock step, an instruction of it one step of NumPy. Warps take turns, in a shuffled order,
each until it waits. Asynchronous copies are done when they are asked for or, if `slow`, later: so what is used before
it is there shows, what is overwritten before wgmma has read it, and an accumulator that is touched before its wgmma
is waited for. So does shared memory that wgmma reads, or a barrier that TMA uses, with no fence since other
instructions wrote there; what other fences are for does not. Masks, addresses, phases of barriers and who holds what
do, and accesses outside of the tensors raise.

Takes what the grouped GEMMs are made of, of PTX ISA 8.7 (https://docs.nvidia.com/cuda/parallel-thread-execution), and
raises NotImplementedError for all else.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

LANES = 32
SHARED_AT = 1024  # where global_smem lies
TURN = 1000  # instructions of a warp before the next one's
MOST = 5_000_000  # of all warps: more is taken for a wait without end
UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
COMPARE = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
           "ge": np.greater_equal}


class Wait:
    """What an instruction returns that could not go on: the warp stays there and another one runs."""


WAIT = Wait()


@dataclass(frozen=True)
class TensorMap:
    """What TMA reads through: a tensor, seen in boxes of this shape, stored with a swizzle of 128 or 64 bytes."""

    view: torch.Tensor
    box: tuple[int, ...]
    swizzle: int = 128


@dataclass
class Barrier:
    """An mbarrier: arrivals of a phase, arrivals and bytes that it still waits for, phases ended."""

    count: int
    pending: int
    bytes: int = 0
    phases: int = 0

    def settle(self, arrivals: int, announced: int = 0) -> None:
        """Take arrivals, and bytes announced (or, negative, come)."""
        self.pending -= arrivals
        self.bytes += announced
        assert self.pending >= 0, "more arrivals than the phase has"
        if self.pending == 0 and self.bytes == 0:
            self.pending, self.phases = self.count, self.phases + 1


@dataclass
class Work:
    """Asynchronous work: asked for, and done once."""

    do: Callable[[], None] | None

    def finish(self) -> None:
        if self.do:
            do, self.do = self.do, None
            do()


@dataclass
class Machine:
    """What the warps of a program share."""

    slow: bool = False
    chance: random.Random = field(default_factory=random.Random)
    asked: list[Work] = field(default_factory=list)  # if slow: what ends with a barrier, of this turn of all warps
    coming: list[Work] = field(default_factory=list)  # and of the one before

    buffers: list[np.ndarray] = field(default_factory=list)
    maps: list[TensorMap] = field(default_factory=list)
    shared: np.ndarray = field(default_factory=lambda: np.full(SHARED_AT + 232448, 255, np.uint8))  # NaN, until written
    barriers: dict[int, Barrier] = field(default_factory=dict)
    clock: int = 0  # instructions that all warps have executed
    # Byte of shared memory -> when it was last written, 0 if by TMA or before a fence of who wrote it; by which warp.
    written: np.ndarray = field(default_factory=lambda: np.zeros(SHARED_AT + 232448, np.int64))
    writer: np.ndarray = field(default_factory=lambda: np.zeros(SHARED_AT + 232448, np.int16))
    meetings: dict[int, list] = field(default_factory=dict)  # of bar.sync: warps that have come, meetings held
    threads: int = 0
    on_atomic: Callable[[bool], None] = lambda releases: None  # after each; whether it releases what was stored before

    def at(self, address: np.ndarray, count: int, shared: bool) -> tuple[np.ndarray, np.ndarray]:
        """The memory that all addresses lie in, and where in it each of `count` bytes does. Raises outside of it."""
        if shared:
            memory, start = self.shared, address.astype(np.int64)
        else:
            places = np.unique(address >> np.uint64(40))
            if len(places) != 1 or not 1 <= places[0] <= len(self.buffers):
                raise IndexError(f"addresses in no tensor: {[hex(int(one)) for one in address]}")
            memory = self.buffers[int(places[0]) - 1]
            start = (address & np.uint64((1 << 40) - 1)).astype(np.int64)
        if (start % count).any():
            raise IndexError(f"{count} bytes at an address that it does not divide")
        where = start[:, None] + np.arange(count)
        if where.min() < 0 or where.max() >= len(memory):
            raise IndexError(f"bytes {where.min()} to {where.max()} of {len(memory)}")
        return memory, where


@dataclass
class Warp:
    """32 lanes: where they are, and their registers."""

    number: int
    machine: Machine
    meeting: int | None = None
    registers: dict[str, np.ndarray] = field(default_factory=dict)
    done: bool = False
    copies: list[list[Work]] = field(default_factory=lambda: [[]])  # if slow: cp.async's groups, the last one open
    reads: list[list[Work]] = field(default_factory=lambda: [[]])  # wgmma's
    flying: dict[str, Work] = field(default_factory=dict)  # if slow: register -> the wgmma that it is an accumulator of
    fenced: int = 0  # when it last executed fence.proxy.async

    def ask(self, groups: list[list[Work]], do: Callable[[], None]) -> None:
        """Work for the open group; done at once unless work is slow."""
        if self.machine.slow:
            groups[-1].append(Work(do))
        else:
            do()

    def ask_with_barrier(self, do: Callable[[], None]) -> None:
        """Work that ends by a barrier: done at once or, if slow, by chance in half of the cases, when all warps have
        had a turn after this one."""
        if self.machine.slow and self.machine.chance.random() < 0.5:
            self.machine.asked.append(Work(do))
        else:
            do()

    def wrote(self, where: np.ndarray) -> None:
        """Bytes of shared memory were written by an instruction of this warp, cp.async's among them: not by TMA."""
        self.machine.written[where], self.machine.writer[where] = self.machine.clock, self.number

    def fence(self) -> None:
        """fence.proxy.async: what is written so far is to be seen by TMA and wgmma, as far as this warp has it, or asks
        for them."""
        self.fenced, own = self.machine.clock, self.machine.writer == self.number
        self.machine.written[own] = 0

    def sees(self, where: np.ndarray) -> None:
        """TMA or wgmma, asked for by this warp, use these bytes of shared memory."""
        assert self.machine.written[where].max() <= self.fenced, "no fence.proxy.async since shared memory was written"


# ---- text to instructions ------------------------------------------------------------------------

@dataclass(frozen=True)
class Instruction:
    """One line: `@!%p1 opcode.parts operands;`."""

    guard: str
    opcode: str
    operands: tuple[str, ...]


def parse(ptx: str, kernel: str) -> tuple[list[Instruction], dict[str, int], dict[str, list[str]], list[str]]:
    """Instructions, label -> place, branch table -> labels, and the kernel's parameters as `u64`, `u32` or `map`."""
    head, _, body = ptx[ptx.index(f".entry {kernel}("):].partition(")\n")
    parameters = ["map" if "[128]" in one else re.search(r"\.([us]\d+|[bf]\d+)", one)[1]
                  for one in head.splitlines() if ".param" in one]
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    tables: dict[str, list[str]] = {}
    scope = ""  # inline assembly's braces: names that it declares are its own
    local: set[str] = set()
    depth, scopes = 0, itertools.count()
    text = re.sub(r"//[^\n]*", "", body)
    text = re.sub(r"(\$\w+): \.branchtargets([^;]*);", lambda found: tables.update(
        {found[1]: re.findall(r"\$\w+", found[2])}) or "", text)
    for line in re.split(r"(?<=;)|(?<=:)(?=\s)|\n", text):
        line = line.strip()
        if line in ("{", "}"):
            depth += 1 if line == "{" else -1
            if line == "{" and depth > 1:
                scope, local = f".{next(scopes)}", set()
            elif depth == 1:
                scope, local = "", set()
            elif depth == 0:
                break
        elif line.startswith(".reg") and scope:
            local |= set(re.findall(r"[\w%]+", line.split(None, 2)[2]))
        elif line.endswith(":"):
            labels[line[:-1] + (scope if not line.startswith("$") else "")] = len(instructions)
        elif line and not line.startswith("."):
            found = re.match(r"(?:@(!?[%\w]+)\s+)?([\w.:]+)\s*(.*);$", line)
            if not found:
                raise NotImplementedError(line)
            guard, opcode, rest = found[1] or "", found[2], found[3]

            for name in local | {label.removesuffix(scope) for label in labels if scope and label.endswith(scope)}:
                guard, rest = (re.sub(rf"(?<![%\w$]){re.escape(name)}(?![%\w$])", name + scope, part)
                               for part in (guard, rest))
            instructions.append(Instruction(guard, opcode, tuple(split(rest))))
    return instructions, labels, tables, parameters


def split(operands: str) -> list[str]:
    """At commas outside of braces and brackets."""
    found, depth, last = [], 0, 0
    for place, letter in enumerate(operands):
        depth += (letter in "{[") - (letter in "}]")
        if letter == "," and depth == 0:
            found.append(operands[last:place].strip())
            last = place + 1
    return [*found, operands[last:].strip()] if operands.strip() else []


def members(operand: str) -> list[str]:
    """`{ %r1, %r2 }` -> its names; a name alone -> itself."""
    return [one.strip() for one in operand.strip("{} ").split(",")]


# ---- values --------------------------------------------------------------------------------------

def bits_of(kind: str) -> int:
    return int(re.sub(r"\D", "", kind.replace("bf16x2", "b32")))


def dtype_of(kind: str) -> type:
    """s32 -> np.int32, u64 and b64 -> np.uint64, f32 -> np.float32, pred -> bool."""
    if kind == "pred":
        return np.bool_
    if kind == "f32":
        return np.float32
    return (SIGNED if kind.startswith("s") else UNSIGNED)[bits_of(kind)]


def literal(text: str, kind: str) -> np.ndarray:
    """An immediate, to all lanes."""
    if kind == "pred":
        return np.full(LANES, int(text) != 0)
    if text.startswith("0f"):
        return np.full(LANES, int(text[2:], 16), np.uint32).view(np.float32)
    value = int(text, 0) if not text.startswith("global_smem") else SHARED_AT + int(text[len("global_smem"):] or 0)
    bits = bits_of(kind)
    return np.full(LANES, value & ((1 << bits) - 1), UNSIGNED[bits]).view(dtype_of(kind))


def is_register(text: str) -> bool:
    return not re.match(r"-?\d|0x|0f|global_smem", text)


def touch(warp: Warp, text: str) -> None:
    """Forget that a register is an accumulator of a wgmma; raises if that one has not been waited for."""
    if wgmma := warp.flying.pop(text, None):
        assert not wgmma.do, f"{text} is used before its wgmma is waited for"


def read(warp: Warp, text: str, kind: str) -> np.ndarray:
    """An operand's lanes as `kind`; zeros of a register that was never written."""
    if not is_register(text):
        return literal(text, kind)
    touch(warp, text)
    value = warp.registers.get(text)
    if value is None:
        value = np.zeros(LANES, np.bool_ if kind == "pred" else UNSIGNED[bits_of(kind)])
    if kind == "pred":
        return value
    return value.astype(UNSIGNED[bits_of(kind)], copy=False).view(dtype_of(kind))  # a wider register's low bits


def write(warp: Warp, text: str, value: np.ndarray, active: np.ndarray) -> None:
    """Into a register, as bits, of the active lanes."""
    if text == "_":
        return
    if value.dtype != np.bool_:
        value = np.ascontiguousarray(value).view(UNSIGNED[value.dtype.itemsize * 8])
    if not active.all():
        before = warp.registers.get(text)
        value = np.where(active, value, 0 if before is None else before).astype(value.dtype)
    touch(warp, text)
    warp.registers[text] = value


def address(warp: Warp, operand: str, kind: str) -> np.ndarray:
    """`[ %rd1 + 16 ]` -> the address of each lane."""
    inside = operand.strip("[] ")
    base, _, offset = (inside, "", "") if inside.startswith("global_smem") else inside.partition("+")
    found = read(warp, base.strip(), kind)
    return found + literal(offset.strip(), kind) if offset.strip() else found


def bf16(value: np.ndarray) -> np.ndarray:
    """float32 to bf16's bits, to the nearest, ties to even."""
    bits = value.view(np.uint32)
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


# ---- what instructions do ------------------------------------------------------------------------

def divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Towards zero, as integers do."""
    wide = np.abs(a.astype(np.int64)) // np.maximum(np.abs(b.astype(np.int64)), 1)
    return (np.sign(a.astype(np.int64)) * np.sign(b.astype(np.int64)) * wide).astype(a.dtype)


def shift(left: bool) -> Callable:
    def apply(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        bits = a.dtype.itemsize * 8
        amount = np.minimum(b, bits - 1).astype(a.dtype)
        moved = a << amount if left else a >> amount
        return moved if not left and a.dtype.kind == "i" else np.where(b >= bits, 0, moved).astype(a.dtype)
    return apply


BINARY = {"add": np.add, "sub": np.subtract, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
          "min": np.minimum, "max": np.maximum, "mul": np.multiply, "div": divide}
UNARY = {"mov": lambda a: a, "neg": np.negative, "not": np.bitwise_not, "ex2": np.exp2,
         "rcp": lambda a: (np.float32(1) / a).astype(np.float32)}
SPECIAL = {"%tid.x": lambda warp: warp * LANES + np.arange(LANES), "%ctaid.x": lambda _: np.zeros(LANES),
           "%nctaid.x": lambda _: np.ones(LANES)}
NOTHING = ("fence", "setmaxnreg", "wgmma.fence", "bar.warp.sync", "membar")


def swizzled(at: np.ndarray, swizzle: int = 128) -> np.ndarray:
    """An address of shared memory under a swizzle of 128 or 64 bytes."""
    return at ^ (at >> 7 & swizzle // 16 - 1) << 4


def multiply_accumulate(warp: Warp, one: Instruction) -> None:
    """wgmma of 64 rows by N by 16: this warp's 16 rows. An operand has 8 of its rows, or transposed 8 of the inner
    dimension, in 1024 bytes under 128-byte swizzle; transposed, its next 64 rows are as far off as the descriptor says.
    If work is slow, the operands are read again when it is waited for, and must not have changed; until then only the
    next wgmma may read the accumulators.
    """
    N = int(re.search(r"n(\d+)k16", one.opcode)[1])
    names, (a, b, scale, *signs) = members(one.operands[0]), one.operands[1:]
    if [int(sign) for sign in signs[:2]] != [1, 1]:
        raise NotImplementedError(f"wgmma with {signs}")
    use = read(warp, scale, "pred")[0]

    def places(name: str, first: int, rows: int, transposed: bool) -> np.ndarray:
        described = int(read(warp, name, "u64")[0])
        if described >> 62 != 1 or (described >> 32 & 0x3FFF) << 4 != 1024:
            raise NotImplementedError(f"wgmma descriptor {described:#x}")
        row, inner = first + np.arange(rows)[:, None], np.arange(16)
        if transposed:
            at = row // 64 * ((described >> 16 & 0x3FFF) << 4) + inner // 8 * 1024 + inner % 8 * 128 + row % 64 * 2
        else:
            at = row // 8 * 1024 + row % 8 * 128 + inner * 2
        return swizzled(((described & 0x3FFF) << 4) + at)

    def operand(at: np.ndarray) -> np.ndarray:
        shared = warp.machine.shared
        return from_bf16(shared[at].astype(np.uint32) | shared[at + 1].astype(np.uint32) << 8)

    at_rows, at_columns = places(a, warp.number % 4 * 16, 16, signs[2] == "1"), places(b, 0, N, signs[3] == "1")
    warp.sees(at_rows)
    warp.sees(at_columns)
    rows, columns = operand(at_rows), operand(at_columns)
    product, lane = rows @ columns.T, np.arange(LANES)
    for register, name in enumerate(names):
        row, column = lane // 4 + register // 2 % 2 * 8, lane % 4 * 2 + register // 4 * 8 + register % 2
        before = warp.registers[name].view(np.float32) if use else np.float32(0)
        warp.registers[name] = (before + product[row, column]).astype(np.float32).view(np.uint32)

    def look_again() -> None:
        for at, then in ((at_rows, rows), (at_columns, columns)):
            assert np.array_equal(operand(at), then, equal_nan=True), "shared memory changed while wgmma read it"

    if warp.machine.slow:
        warp.ask(warp.reads, look_again)
        warp.flying.update(dict.fromkeys(names, warp.reads[-1][-1]))


def copy_box(warp: Warp, one: Instruction, lane: int) -> None:
    """TMA: a box of a tensor, zeros outside of it, to shared memory, and its bytes to the barrier."""
    machine = warp.machine
    handle, places = re.match(r"\[\s*(\S+?),\s*\{(.*)\}\s*\]", one.operands[1]).groups()
    found = machine.maps[int(read(warp, handle, "u64")[lane]) - 1]
    corner = [int(read(warp, place, "s32")[lane]) for place in members(places)][::-1]
    source, target = [], []
    for start, size, whole in zip(corner, found.box, found.view.shape, strict=True):
        first, last = max(start, 0), min(start + size, whole)
        source.append(slice(first, max(first, last)))
        target.append(slice(first - start, max(first, last) - start))
    count = 2 * int(np.prod(found.box))
    at = swizzled(int(address(warp, one.operands[0], "u32")[lane]) + np.arange(count), found.swizzle)
    barrier_at = int(address(warp, one.operands[2], "u32")[lane])
    barrier = machine.barriers[barrier_at]
    warp.sees(np.arange(barrier_at, barrier_at + 8))

    def land() -> None:
        values = np.zeros(found.box, np.uint16)
        values[tuple(target)] = found.view[tuple(source)].contiguous().view(torch.int16).numpy().view(np.uint16)
        machine.shared[at], machine.written[at] = values.view(np.uint8).reshape(-1), 0
        barrier.settle(0, -count)

    warp.ask_with_barrier(land)


def copy_lanes(warp: Warp, one: Instruction, active: np.ndarray) -> None:
    """cp.async: each lane's bytes to shared memory, or zeros."""
    machine, ops = warp.machine, one.operands
    size = int(ops[2], 0)
    copied = read(warp, ops[3], "u32") if len(ops) > 3 else np.full(LANES, size)
    if not np.isin(copied[active], (0, size)).all():
        raise NotImplementedError("cp.async of a part, with zeros behind it")
    if not active.any():
        return
    shared, zeroed = machine.at(address(warp, ops[0], "u32")[active], size, True)
    from_global = active & (copied > 0)
    moved = []
    if from_global.any():
        moved = [(machine.at(address(warp, ops[0], "u32")[from_global], size, True)[1],
                  *machine.at(address(warp, ops[1], "u64")[from_global], size, False))]

    def land() -> None:
        shared[zeroed] = 0
        warp.wrote(zeroed)
        for to, source, at in moved:
            shared[to] = source[at]

    warp.ask(warp.copies, land)


def wait_for_groups(groups: list[list[Work]], pending: int) -> None:
    """Finish all committed groups but the last `pending`."""
    for _ in range(len(groups) - 1 - pending):
        for work in groups.pop(0):
            work.finish()


def meet(warp: Warp, one: Instruction) -> Wait | None:
    """bar.sync: go on once all warps that it is for have come."""
    number = int(one.operands[0])
    need = int(one.operands[1]) if len(one.operands) > 1 else warp.machine.threads
    state = warp.machine.meetings.setdefault(number, [set(), 0])
    if warp.meeting is None:
        state[0].add(warp.number)
        warp.meeting = state[1]
        if len(state[0]) * LANES == need:
            state[0], state[1] = set(), state[1] + 1
    if warp.meeting == state[1]:
        return WAIT
    warp.meeting = None
    return None


def memory(warp: Warp, one: Instruction, parts: list[str], active: np.ndarray) -> None:
    """ld and st, of one register or a vector of them."""
    shared = "shared" in one.opcode
    loads, kind = parts[0] == "ld", parts[-1]
    names = members(one.operands[0 if loads else 1])
    size = bits_of(kind) // 8
    if not active.any():
        return
    at = address(warp, one.operands[1 if loads else 0], "u32" if shared else "u64")[active]
    bytes_at, where = warp.machine.at(at, size * len(names), shared)
    if loads:
        found = bytes_at[where].view(UNSIGNED[size * 8])
        for place, name in enumerate(names):
            value = np.zeros(LANES, UNSIGNED[max(size, 4 if kind != "b16" else 2) * 8])
            value[active] = found[:, place]
            write(warp, name, value, active)
    else:
        values = np.stack([read(warp, name, kind)[active] for name in names], axis=1)
        bytes_at[where] = np.ascontiguousarray(values).view(np.uint8).reshape(where.shape)
        if shared:
            warp.wrote(where)


def load_matrices(warp: Warp, one: Instruction) -> None:
    """ldmatrix: four of 8 rows by 16 bytes, whose addresses 8 lanes each have; a row's bytes to four lanes."""
    rows, where = warp.machine.at(address(warp, one.operands[1], "u32"), 16, True)
    found = rows[where].view(np.uint32).reshape(4, LANES)
    for matrix, name in enumerate(members(one.operands[0])):
        write(warp, name, found[matrix].copy(), np.ones(LANES, np.bool_))


def arrivals(warp: Warp, one: Instruction, parts: list[str], active: np.ndarray) -> None:
    """mbarrier.init, mbarrier.arrive with or without bytes announced, and cp.async's arrival, after its copies."""
    barriers = warp.machine.barriers
    places = [operand for operand in one.operands if operand.startswith("[")]
    if one.opcode.startswith("cp.async"):
        if "noinc" not in parts:
            raise NotImplementedError(f"{one.opcode}: an arrival that its phase does not count with")
        copies = [work for group in warp.copies for work in group]
        reached = [barriers[int(at)] for at in address(warp, places[0], "u32")[active]]

        def arrive() -> None:
            for work in copies:
                work.finish()
            for barrier in reached:
                barrier.settle(1)

        warp.ask_with_barrier(arrive)
        warp.copies = [[work for work in group if work.do] for group in warp.copies]
        return
    for lane in np.flatnonzero(active):
        at = int(address(warp, places[0], "u32")[lane])
        if "init" in parts:
            count = int(read(warp, one.operands[1], "u32")[lane])
            barriers[at] = Barrier(count, count)
            warp.wrote(np.arange(at, at + 8))
        elif "arrive" not in parts:
            raise NotImplementedError(one.opcode)
        elif "expect_tx" in parts:
            barriers[at].settle(1, int(read(warp, one.operands[-1], "u32")[lane]))
        else:
            barriers[at].settle(1)


def execute(warp: Warp, one: Instruction, labels: dict[str, int], tables: dict[str, list[str]], given: dict) -> object:
    """An instruction of a warp; WAIT if it could not go on, a label's place if it branches, else None."""
    parts = one.opcode.split(".")
    name, kind = parts[0], parts[-1]
    machine = warp.machine
    active = np.ones(LANES, np.bool_)
    if one.guard:
        active = read(warp, one.guard.lstrip("!"), "pred") ^ one.guard.startswith("!")
    ops = one.operands
    if name in ("bra", "brx", "ret"):
        if active.any() != active.all():
            raise NotImplementedError("lanes of a warp go different ways")
        if not active.any():
            return None
        if name == "ret":
            warp.done = True
            return None
        return labels[ops[0] if name == "bra" else tables[ops[1]][int(read(warp, ops[0], "u32")[0])]]
    if one.opcode.startswith("wgmma.mma_async"):
        multiply_accumulate(warp, one)
    elif name in ("bar", "barrier") and parts[1] == "sync":
        return meet(warp, one)
    elif one.opcode.startswith("mbarrier.try_wait"):
        at, parity = int(address(warp, ops[1], "u32")[0]), int(read(warp, ops[2], "u32")[0])
        ended = machine.barriers[at].phases % 2 != parity
        write(warp, ops[0], np.full(LANES, ended), active)
        return None if ended else WAIT
    elif name == "mbarrier" or one.opcode.startswith("cp.async.mbarrier"):
        arrivals(warp, one, parts, active)
    elif one.opcode.startswith("cp.async.bulk.tensor"):
        for lane in np.flatnonzero(active):
            copy_box(warp, one, lane)
    elif one.opcode.startswith(("cp.async.cg", "cp.async.ca")):
        copy_lanes(warp, one, active)
    elif one.opcode.startswith(("cp.async.commit_group", "wgmma.commit_group")):
        (warp.copies if name == "cp" else warp.reads).append([])
    elif one.opcode.startswith(("cp.async.wait_group", "wgmma.wait_group")):
        wait_for_groups(warp.copies if name == "cp" else warp.reads, int(ops[0]))
    elif name in ("ld", "st") and parts[1] in ("global", "shared"):
        memory(warp, one, parts, active)
    elif one.opcode == "ldmatrix.sync.aligned.m8n8.x4.shared.b16":
        load_matrices(warp, one)
    elif name == "ld":
        write(warp, ops[0], literal(str(given[ops[1].strip("[]")]), kind), active)
    elif one.opcode == "cvta.param.u64":
        write(warp, ops[0], read(warp, ops[1], "u64"), active)
    elif name == "atom":
        for lane in np.flatnonzero(active):
            bytes_at, where = machine.at(address(warp, ops[1], "u64")[[lane]], 4, False)
            before = bytes_at[where[0]].view(np.uint32).copy()
            bytes_at[where[0]] = (before + read(warp, ops[2], "u32")[lane]).astype(np.uint32).view(np.uint8)
            write(warp, ops[0], np.full(LANES, before[0], np.uint32), np.arange(LANES) == lane)
            machine.on_atomic("release" in parts)
    elif one.opcode == "fence.proxy.async.shared::cta":
        warp.fence()
    elif name in ("griddepcontrol", "nanosleep"):  # nothing runs before or after, and time passes anyhow
        return None
    elif name == "elect":
        write(warp, ops[0].split("|")[1], np.arange(LANES) == 0, active)
    elif name == "redux":
        write(warp, ops[0], np.full(LANES, read(warp, ops[1], kind).sum(dtype=dtype_of(kind))), active)
    elif name == "shfl":
        lane, other = np.arange(LANES), read(warp, ops[2], "u32").astype(np.int64)
        source = lane ^ other if "bfly" in parts else np.broadcast_to(other, lane.shape)
        write(warp, ops[0].split("|")[0], read(warp, ops[1], "b32")[source], active)
    elif name == "setp":
        write(warp, ops[0], COMPARE[parts[1]](read(warp, ops[1], kind), read(warp, ops[2], kind)), active)
    elif name == "selp":
        write(warp, ops[0], np.where(read(warp, ops[3], "pred"), read(warp, ops[1], kind), read(warp, ops[2], kind)),
              active)
    elif name == "bfe":
        value, at, width = (read(warp, op, "u32") for op in ops[1:])
        left = value << (np.uint32(32) - at - width)
        write(warp, ops[0], left.view(dtype_of(kind)) >> (np.uint32(32) - width).view(dtype_of(kind)), active)
    elif name in ("mul", "mad") and "wide" in parts:
        wide = dtype_of(kind[0] + str(2 * bits_of(kind)))
        value = read(warp, ops[1], kind).astype(wide) * read(warp, ops[2], kind).astype(wide)
        write(warp, ops[0], value + read(warp, ops[3], kind[0] + "64") if name == "mad" else value, active)
    elif name in ("mad", "fma"):
        write(warp, ops[0], read(warp, ops[1], kind) * read(warp, ops[2], kind) + read(warp, ops[3], kind), active)
    elif name in ("shl", "shr"):
        write(warp, ops[0], shift(name == "shl")(read(warp, ops[1], kind), read(warp, ops[2], "u32")), active)
    elif one.opcode == "cvt.rn.bf16x2.f32":
        write(warp, ops[0], bf16(read(warp, ops[1], "f32")) << 16 | bf16(read(warp, ops[2], "f32")), active)
    elif one.opcode == "cvt.f32.bf16":
        write(warp, ops[0], from_bf16(read(warp, ops[1], "b16")), active)
    elif name == "cvt":
        write(warp, ops[0], read(warp, ops[1], parts[-1]).astype(dtype_of(parts[-2])), active)
    elif name == "mov" and ops[0].startswith("{"):
        whole = read(warp, ops[1], kind)
        for place, half in enumerate(members(ops[0])):
            size = bits_of(kind) // len(members(ops[0]))
            write(warp, half, (whole >> UNSIGNED[bits_of(kind)](size * place)).astype(UNSIGNED[size]), active)
    elif name == "mov" and ops[1].startswith("{"):
        size = bits_of(kind) // len(members(ops[1]))
        whole = UNSIGNED[bits_of(kind)]
        value = sum(read(warp, half, f"b{size}").astype(whole) << whole(size * place)
                    for place, half in enumerate(members(ops[1])))
        write(warp, ops[0], value, active)
    elif name == "mov" and ops[1] in warp.flying:  # another name of the register, to the compiler
        wgmma = warp.flying.pop(ops[1])
        write(warp, ops[0], read(warp, ops[1], kind), active)
        warp.flying.update({ops[0]: wgmma, ops[1]: wgmma})
    elif name == "mov" and ops[1] in given:
        write(warp, ops[0], literal(str(given[ops[1]]), kind), active)
    elif name == "mov" and ops[1] in SPECIAL:
        write(warp, ops[0], SPECIAL[ops[1]](warp.number).astype(np.uint32), active)
    elif name in BINARY and len(ops) == 3 and "hi" not in parts:
        value = BINARY[name](read(warp, ops[1], kind), read(warp, ops[2], kind))
        write(warp, ops[0], np.maximum(value, 0) if "relu" in parts else value, active)
    elif name in UNARY:
        write(warp, ops[0], UNARY[name](read(warp, ops[1], kind)), active)
    elif not one.opcode.startswith(NOTHING):
        raise NotImplementedError(f"{one.opcode} {', '.join(ops)}")
    return None


def emulate(
    ptx: str, kernel: str, arguments: list, seed: int = 0, on_atomic: Callable[[bool], None] = lambda releases: None,
    slow: bool = False,
) -> int:
    """Run a program of a grid of one, whose tensors are changed in place; how many instructions its warps executed.

    arguments: in the kernel's order: tensors, TensorMaps, integers. seed: of the order in which warps take turns.
    on_atomic: called after each atomic with whether it releases, to look at what is stored by then, or to do what other
    programs would. slow: copies of a group end when they are waited for, what ends with a barrier in half of the cases,
    by chance, when all warps have had a turn after the one that asked, and wgmma reads until it is waited for.
    Raises AssertionError if these change meanwhile, RuntimeError when all warps wait, or seem to, IndexError for an
    access outside of the tensors.
    """
    instructions, labels, tables, parameters = parse(ptx, kernel)
    warps = int(re.search(r"\.reqntid (\d+)", ptx)[1]) // LANES
    machine, values = Machine(slow, random.Random(seed), threads=warps * LANES, on_atomic=on_atomic), []
    for argument in arguments:
        if isinstance(argument, TensorMap):
            machine.maps.append(argument)
            values += [len(machine.maps), *argument.view.shape, *argument.view.stride()]
        elif isinstance(argument, torch.Tensor):
            machine.buffers.append(argument.view(-1).view(torch.uint8).numpy())
            values.append(len(machine.buffers) << 40)
        else:
            values.append(argument)
    values += [0, 0]  # Triton's own scratch memory
    if len(values) != len(parameters):
        raise ValueError(f"arguments for {len(values)} parameters, {kernel} has {len(parameters)}")
    given = {f"{kernel}_param_{place}": value for place, value in enumerate(values)}
    everyone, executed, turn = [Warp(number, machine) for number in range(warps)], 0, random.Random(seed)
    place = [0] * warps
    with np.errstate(over="ignore"):
        while not all(warp.done for warp in everyone):
            before = executed
            turn.shuffle(order := [warp for warp in everyone if not warp.done])
            for warp in order:
                for _ in range(TURN):  # no longer: it may be waiting for what another warp is to write
                    if warp.done:
                        break
                    one = instructions[place[warp.number]]
                    try:
                        found = execute(warp, one, labels, tables, given)
                    except Exception as error:
                        error.add_note(f"warp {warp.number}: {one.guard} {one.opcode} {', '.join(one.operands)[:200]}")
                        raise
                    if found is WAIT:
                        break
                    executed += 1
                    machine.clock = executed
                    place[warp.number] = place[warp.number] + 1 if found is None else found
            expected = bool(machine.coming or machine.asked)
            for work in machine.coming:
                work.finish()
            machine.coming, machine.asked = machine.asked, []
            if (executed == before and not expected) or executed > MOST:
                raise RuntimeError("nothing goes on: " + "; ".join(
                    f"{warp.number} at {instructions[place[warp.number]].opcode}" for warp in order))
    return executed
