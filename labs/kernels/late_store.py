"""Tiles that are finished late: a finished tile waits in registers, and is stored beside the next one's multiply.

    down        step 0   1            2            3            4            5 ...   last   keep
    tile n      wgmma    wgmma        wgmma        wgmma        wgmma        wgmma   wgmma  round into 64 registers
    tile n - 1           store part   store part   store part   store part

What   A variant of roles.py's consume, for kernels whose epilogue needs nothing but the accumulator.
Why    A consumer that stores a whole tile at once waits until its stores are taken, and no wgmma runs meanwhile: both
       warpgroups end a tile at nearly the same time (LOG.md, rows 29 to 31).
How    64x256 in float32 are 128 registers a thread, and 64 more is what there is room for.
       down: the tile is rounded into 64, nothing is stored yet; four parts are, beside steps 1 to 4.
       up: half of the accumulator waits as it is, in 64, and gets its SwiGLU and its stores in two parts, beside steps
       1 and 2; the other half is finished at once.
       A part comes after its step's wgmma has started, as before it its stores would hold the wgmma back. Step 0 has
       none: the registers of the tile before are being moved there.
       The last tile, and the last of a band or of up's first part, are stored with nothing beside them.
Costs  64 registers a consumer's thread, and a longer kernel to compile. Inner dimensions of a few K steps only have no
       room for it (`finishes_late`).

Determinism: the arithmetic of grouped_gemm.py's epilogues, in the same order: the same bits.
"""

from __future__ import annotations

from labs.kernels.roles import BLOCK_K, _BLOCK_N, _ROWS, listen, multiply, pass_on
from labs.kernels.stores import halves, store_wide
from labs.kernels.waiting import leave

from triton.experimental import gluon  # after common.level, which roles imports
from triton.experimental.gluon import language as gl

# In kernels M, N and K are the GEMM tile's axes.

ROUNDED_PARTS = 4  # of a tile that waits rounded, 64 columns each
HIDDEN_PARTS = 2  # of the half of up's tile that waits, 32 columns of hidden each

_ROUNDED_PARTS = gl.constexpr(ROUNDED_PARTS)
_HIDDEN_PARTS = gl.constexpr(HIDDEN_PARTS)
_PAIRS = gl.constexpr(_BLOCK_N.value // ROUNDED_PARTS // 2)  # of neighbouring columns in such a part


def _pair_layout(registers: list[list[int]], lanes: list[list[int]]) -> gl.constexpr:
    """A layout of (64, 32) pairs of columns, the rows among threads as in wgmma's accumulator."""
    lanes = [*lanes, [1, 0], [2, 0], [4, 0]]
    return gl.constexpr(gl.DistributedLinearLayout(registers, lanes, [[16, 0], [32, 0]], [], [64, _PAIRS.value]))


# The accumulator's; after one and after two swaps between the four threads of a row; stores.py has why.
_ACC_PAIRS = _pair_layout([[8, 0], [0, 4], [0, 8], [0, 16]], [[0, 1], [0, 2]])
_SWAPPED_PAIRS = _pair_layout([[0, 1], [8, 0], [0, 8], [0, 16]], [[0, 4], [0, 2]])
_WIDE_PAIRS = _pair_layout([[0, 1], [0, 2], [8, 0], [0, 16]], [[0, 4], [0, 8]])


def finishes_late(K: int, parts: int) -> bool:
    """Whether an inner dimension of K has a step for each of the parts that wait, after its first."""
    return BLOCK_K * parts < K


# ------------------------------------------------------------------------------------------------------ consumer
@gluon.jit
def finish_parts(PARTS: gl.constexpr, finish_part: gl.constexpr, store: gl.constexpr, given):
    """Finish what waits, with no multiply beside it."""
    for i in gl.static_range(PARTS):
        finish_part(given, i, store)


@gluon.jit
def consume_late(out_ptr, width8, k_steps, ring, nothing: gl.constexpr, keep: gl.constexpr, PARTS: gl.constexpr,
                 finish_part: gl.constexpr, store: gl.constexpr, WG: gl.constexpr, GATHERED: gl.constexpr,
                 stored=None):
    """roles.py's consume, a tile or half of it late; k_steps more than PARTS.

    nothing(): the parts that wait before the first tile. keep(out_ptr, width8, acc, row, column, end, store): finish
    what need not wait of the tile at (row, column), return the parts that wait. finish_part((out_ptr, width8, waiting),
    i, store): finish part i of what waits, which is parts, and row, column and end of their tile. `store` is for these
    two to store with.
    """
    stage = 0
    phase = 0
    waiting = nothing(), 0, 0, 0  # parts; row, column and end of their tile
    row, used, column, left = listen(ring, stage, phase)
    while used > 0:
        if stored is not None and left > 0:
            finish_parts(PARTS, finish_part, store, (out_ptr, width8, waiting))
            waiting = waiting[0], waiting[1], waiting[2], 0
            leave(stored)
        whole = used > _ROWS
        if whole | (column % 2 == WG):
            acc, stage, phase = multiply(ring, stage, phase, k_steps, WG, GATHERED, PARTS, finish_part, store,
                                         (out_ptr, width8, waiting))
            first = row + gl.where(whole, WG * _ROWS, 0)
            end = row + used
            waiting = keep(out_ptr, width8, acc, first, column, end, store), first, column, end
        else:
            stage, phase = pass_on(ring, stage, phase, k_steps)
        row, used, column, left = listen(ring, stage, phase)
    finish_parts(PARTS, finish_part, store, (out_ptr, width8, waiting))
    if stored is not None:
        leave(stored)


# ------------------------------------------------------------------------------------------- tiles that wait rounded
@gluon.jit
def no_parts():
    """Parts of no tile."""
    part = gl.zeros([_ROWS, _PAIRS], gl.int32, _ACC_PAIRS)
    return part, part, part, part


@gluon.jit
def round_parts(acc):
    """A tile, rounded: four parts of 64 columns, pairs of neighbours in an int32.

    Rounded by an instruction that the compiler cannot see through: it would carry the accumulator to where it is stored
    and round it there, in twice the registers, and ptxas would then run the wgmmas one after the other.
    """
    even, odd = acc.reshape([_ROWS, _BLOCK_N // 2, 2]).split()
    pairs = gl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [even, odd], dtype=gl.int32,
                                      is_pure=True, pack=1)
    left, right = halves(pairs)
    part0, part1 = halves(left)
    part2, part3 = halves(right)
    return (gl.convert_layout(part0, _ACC_PAIRS), gl.convert_layout(part1, _ACC_PAIRS),
            gl.convert_layout(part2, _ACC_PAIRS), gl.convert_layout(part3, _ACC_PAIRS))


@gluon.jit
def store_wide_pairs(out_ptr, pairs, row, column, width8, end):
    """Store those of 64 rows of pairs before `end`, and of their columns before the width, 16 bytes a thread."""
    pairs_ptr = out_ptr.to(gl.pointer_type(gl.int32), bitcast=True)
    store_wide(pairs_ptr, pairs, row, column // 2, width8 * 4, width8 * 4, end)


@gluon.jit
def store_pairs(out_ptr, pairs, row, column, width8, end):
    """64 rows of 32 pairs as they lie in the accumulator."""
    pairs = gl.convert_layout(pairs, _SWAPPED_PAIRS)
    # A no-op that keeps the two swaps apart, as in stores.py.
    pairs = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [pairs], dtype=gl.int32, is_pure=True, pack=1)
    store_wide_pairs(out_ptr, gl.convert_layout(pairs, _WIDE_PAIRS), row, column, width8, end)


@gluon.jit
def store_pairs_dealt(out_ptr, pairs, row, column, width8, end):
    """store_pairs of weights that TMA has dealt out: (b, j, q) of a pair -> 16 b + 4 q + j."""
    pairs = pairs.reshape([_ROWS, _PAIRS // 16, 4, 4]).permute((0, 1, 3, 2)).reshape([_ROWS, _PAIRS])
    store_wide_pairs(out_ptr, gl.convert_layout(pairs, _WIDE_PAIRS), row, column, width8, end)


@gluon.jit
def store_part(given, i: gl.constexpr, store: gl.constexpr):
    """Store part i of a tile that waits rounded."""
    out_ptr, width8, waiting = given
    parts, row, column_tile, end = waiting
    store(out_ptr, parts[i], row, column_tile * _BLOCK_N + i * (2 * _PAIRS), width8, end)
