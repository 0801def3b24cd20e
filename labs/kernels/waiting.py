"""Who waits for whom among the Hopper GEMMs' programs, and from one kernel to the next.

    kernel to kernel    programs of the next kernel begin on SMs that are free, set up their ring, and wait until the
                        one before has ended: `follow` (programmatic dependent launch)
    down after up       where rows are gathered as they load, down's programs wait only until up's first part is
                        stored, all of its output tiles but the last three a program, and work on rows that are
                        whole then; for others, they wait until up has ended
    program to program  bands of down's columns: who sums a band waits until all of its output tiles are stored

A part or a band is counted by the output tiles of it that are stored:

    producer    tells the consumers with a tile that it is the program's first of another band (`leaving`), or the end
    consumers   store what they still have of the band before, arrive at `stored` (`leave`)
    producer    waits for both, adds the tiles that the program had to the band's count (`count_tile`, `announce`)
    others      wait for the count (`wait_for`): only for tiles that some running program has claimed or will

Costs  One more barrier, and what waits between the tiles of two bands is stored with nothing beside it.
"""

from __future__ import annotations

from labs.kernels.tiles import BANDS

from triton.experimental import gluon  # after common.level, which tiles imports
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_BANDS = gl.constexpr(BANDS)
_LAST_TILES = gl.constexpr(3)  # a program, of the last part of up

sync_threads = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


@gluon.jit
def follow():
    """Wait until the kernel before has ended and all may see what it wrote; then let programs of the one after begin
    on SMs that are free, up to where they wait in turn."""
    gdc_wait()
    gdc_launch_dependents()


@gluon.jit
def begin(EARLY: gl.constexpr):
    """`follow`, or where down begins EARLY leave the waiting to produce_hidden. What else it reads is older than up,
    which had waited for that before it let down begin."""
    if EARLY:
        gdc_launch_dependents()
    else:
        follow()


@gluon.jit
def wait_for_up(whole, _row_tile, _used, group_end):
    """Before a tile: wait for up's end, unless the tile's group of row tiles, which ends at group_end, lies wholly in
    up's first part, as the row tiles before `whole` do."""
    if group_end > whole:
        gdc_wait()


@gluon.jit
def first_part(total):
    """How many output tiles are the first part: all but the last three a program. They are all stored a tile or so
    before the first program has nothing left to do."""
    return gl.maximum(total - _LAST_TILES * gl.num_programs(0), 0)


@gluon.jit
def leaving(band, tiles):
    """A band and how many output tiles of it a program had, in one number: 0 only for no tile of the first."""
    return tiles * _BANDS + band


@gluon.jit
def leave(stored):
    """A consumer has stored its share of the band that the program leaves."""
    sync_threads()  # one thread arrives, for all that have stored
    mbarrier.arrive(stored.index(0))


@gluon.jit
def announce(done_ptr, left, stored, phase):
    """The producer, once it has told the consumers that the program leaves a band, or has no more tiles: when they have
    stored what they had of it, tell all programs."""
    mbarrier.wait(stored.index(0), phase)
    gl.atomic_add(done_ptr + left % _BANDS, left // _BANDS, sem="release", scope="gpu")


@gluon.jit
def count_tile(done_ptr, stored, left, stored_phase, tiles, before, band):
    """The producer, after a tile of band `before`: announce what the program had left with it, and count it. Returns
    what the next tile, of `band`, leaves; the phase of `stored`; and the program's tiles of `before`."""
    if left > 0:
        announce(done_ptr, left, stored, stored_phase)
        stored_phase ^= 1
        tiles = 0
    tiles += 1
    return gl.where(band == before, 0, leaving(before, tiles)), stored_phase, tiles


@gluon.jit
def wait_for(done_ptr, tiles):
    """Return once so many output tiles are stored; what was stored is to be seen then. The programs that run claim them
    all, so this waits for none that has not begun."""
    while gl.atomic_add(done_ptr, 0, sem="acquire", scope="gpu") < tiles:
        gl.inline_asm_elementwise("nanosleep.u32 200; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def fence_async_global(WARPS: gl.constexpr):
    """Between stores of this thread, or of those it has waited for, and reads of the same memory by TMA, which is
    another proxy: PTX's fence.proxy.async, once a thread. The reader needs it, after it has waited; the writer's is
    for safety."""
    threads = gl.arange(0, 32 * WARPS, layout=gl.BlockedLayout([1], [32], [WARPS], [0]))
    gl.inline_asm_elementwise("fence.proxy.async.global; mov.b32 $0, $1;", "=r,r", [threads], dtype=gl.int32,
                              is_pure=False, pack=1)
