"""What the Gluon programs of the attention share: places, barriers and the layouts of their tiles.

Roles. A program has CONSUMERS groups of four warps that compute, PART lines of scores each, and one group of four warps
that fetches (the producer; a group of one warp would ask for more registers than there are). Rows pass through STAGES
slots in shared memory. Each slot has two barriers:

* ``full``: completed when everything of a row has arrived. Its n-th use has parity n & 1, so a consumer that meets the
  slot for the n-th time waits for n & 1.
* ``empty``: completed when every consumer has left the slot. The producer waits for the use before its own, so for
  (n & 1) ^ 1; a barrier that nobody has completed counts as one whose odd phase is over, and the first uses pass.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false
# The type checker takes Gluon's programs for Python.

import math
from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from scalefold.kernels import hopper

LOG2_E = gl.constexpr(math.log2(math.e))
PART = gl.constexpr(hopper.PART)
CONSUMERS = gl.constexpr(hopper.CONSUMERS)
group_barrier = getattr(gl, "thread_barrier", None) or gl.barrier  # newer Tritons have renamed it


class Place(NamedTuple):
    """What a program does: ``count`` rows from ``first`` on, batch entry b, head h; scores from ``line`` on."""

    b: Any
    h: Any
    first: Any
    count: Any
    line: Any


class Mask(NamedTuple):
    """Mask over keys, 1 = keep: pointer and strides; n keys; what a masked key loses, in base 2."""

    pointer: Any
    stride_b: Any
    stride_s: Any
    stride_n: Any
    n: Any
    inf: Any


class Statistics(NamedTuple):
    """``lse`` and ``rest`` of each row of scores (see ``ops.attention``), fp32 [B, rows, heads, n]."""

    lse: Any
    rest: Any
    rows: Any
    heads: Any
    n: Any


@gluon.jit
def place_of(rows, groups, per_program, LINES: gl.constexpr):
    """Programs that share keys and values are neighbours: tiles of lines first, then heads, then groups of rows."""
    b = gl.program_id(2) // groups
    first = (gl.program_id(2) % groups) * per_program
    count = gl.minimum(per_program, rows - first)
    return Place(b, gl.program_id(1), first, count, gl.program_id(0) * LINES)


@gluon.jit
def new_barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """COUNT barriers, each completed by ARRIVALS arrivals, besides its bytes."""
    barriers = initialised(COUNT, ARRIVALS)
    publish()
    return barriers


@gluon.jit
def initialised(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """``new_barriers`` before ``publish``, which serves any number of them."""
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(barriers.index(i), count=ARRIVALS)
    return barriers


@gluon.jit
def publish():
    """Make initialised barriers visible to the copy engine and to all warps."""
    fence_async_shared()
    group_barrier()


@gluon.jit
def tiles_for(descriptor, COUNT: gl.constexpr):
    """COUNT tiles in shared memory, as a descriptor of the copy engine fills or reads them."""
    return gl.allocate_shared_memory(descriptor.dtype, [COUNT] + descriptor.block_type.shape, descriptor.layout)


@gluon.jit
def flat(tile):
    """A tile [1, 1, lines, 1, channels] of the copy engine as the matrix that products take."""
    return tile.reshape([tile.shape[2], tile.shape[4]])


@gluon.jit
def load_keep(mask, b, s, offsets):
    """Mask of keys in fp32, 0 beyond n."""
    base = mask.pointer + b.to(gl.int64) * mask.stride_b + s.to(gl.int64) * mask.stride_s
    return gl.load(base + offsets * mask.stride_n, mask=offsets < mask.n, other=0.0).to(gl.float32)


@gluon.jit
def row_of(statistics, place, s):
    """Number of a row of one head, in int64: [B, rows, heads] counted through."""
    return (place.b.to(gl.int64) * statistics.rows + s) * statistics.heads + place.h
