"""How a tile of 64 rows leaves the registers of a warpgroup for Hopper's GEMMs: 16 bytes a thread, no shared memory.

    wgmma's accumulator, four threads of a row     2 columns each, every 8: 4 bytes that lie together
    swap a register with the neighbour's, twice    8 columns each: 16 bytes

Weights that TMA deals out (roles.py, describe_weights) come with 8 neighbouring columns a thread: nothing to swap.
"""

from __future__ import annotations

from labs.kernels.tiles import ROWS

from triton.experimental import gluon  # after common.level, which tiles imports
from triton.experimental.gluon import language as gl

_ROWS = gl.constexpr(ROWS)


def _store_layouts(columns: int) -> tuple[gl.constexpr, gl.constexpr]:
    """Layouts of (64, columns) after one and after two swaps between the four threads of an accumulator row.

    A thread of wgmma's accumulator holds pairs of columns 8 apart. Swapping register bit 8 with lane bit 2, and
    then 16 with 4, leaves it 8 neighbouring columns: one 16-byte store.
    """
    high = [[0, 1 << bit] for bit in range(5, columns.bit_length() - 1)]

    def layout(registers: list[list[int]], lanes: list[list[int]]) -> gl.constexpr:
        registers = [[0, 1], *registers, [8, 0], *high]
        lanes = [*lanes, [1, 0], [2, 0], [4, 0]]
        return gl.constexpr(gl.DistributedLinearLayout(registers, lanes, [[16, 0], [32, 0]], [], [64, columns]))

    return layout([[0, 2], [0, 16]], [[0, 8], [0, 4]]), layout([[0, 2], [0, 4]], [[0, 8], [0, 16]])


_SWAPPED_32, _WIDE_32 = _store_layouts(32)
_SWAPPED_64, _WIDE_64 = _store_layouts(64)
_SWAPPED_128, _WIDE_128 = _store_layouts(128)
_SWAPPED_256, _WIDE_256 = _store_layouts(256)


@gluon.jit
def halves(tile):
    """The left and the right half of a tile's columns: they lie in the same threads."""
    M: gl.constexpr = tile.shape[0]
    N: gl.constexpr = tile.shape[1]
    return tile.reshape([M, 2, N // 2]).permute((0, 2, 1)).split()


@gluon.jit
def widen(values):
    """A bf16 tile of 64 rows, in the accumulator's layout, with 8 neighbouring columns in a thread."""
    N: gl.constexpr = values.shape[1]
    swapped: gl.constexpr = (_SWAPPED_256 if N == 256 else _SWAPPED_128 if N == 128 else
                             _SWAPPED_64 if N == 64 else _SWAPPED_32)
    wide: gl.constexpr = _WIDE_256 if N == 256 else _WIDE_128 if N == 128 else _WIDE_64 if N == 64 else _WIDE_32
    values = gl.convert_layout(values, swapped)
    # A no-op that keeps the two swaps apart: one is done by shuffles, two at once would go through shared memory.
    values = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [values], dtype=gl.bfloat16, is_pure=True, pack=2)
    return gl.convert_layout(values, wide)


@gluon.jit
def store_rows(out_ptr, values, row, column, width, stride, end):
    """Store those of 64 rows of bf16 before `end`, and of their columns before `width`, 16 bytes a thread: no shared
    memory, no wait, no fence."""
    store_wide(out_ptr, widen(values), row, column, width, stride, end)


@gluon.jit
def store_wide(out_ptr, values, row, column, width, stride, end):
    """store_rows of a tile whose threads hold 8 neighbouring columns each."""
    r = row + gl.arange(0, _ROWS, layout=gl.SliceLayout(1, values.type.layout))
    c = column + gl.arange(0, values.shape[1], layout=gl.SliceLayout(0, values.type.layout))
    pointers = out_ptr + (r.to(gl.int64) * stride)[:, None] + c[None, :]  # R * stride passes 2**31 at real sizes
    gl.store(pointers, values, mask=(r < end)[:, None] & (c < width)[None, :])
