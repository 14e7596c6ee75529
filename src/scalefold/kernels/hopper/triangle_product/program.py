"""Batched products of triangle multiplication for Hopper in Gluon; twin: the library's.

out[m, n] = sum over k of x[m, k] y[n, k], for each channel; matrices are squares of LENGTH. A program has one channel
or, where channels are too few for all multiprocessors, a part of its m. It keeps y, all of k at once, and lets x come
by blocks [ROWS, CHUNK] of (m, k), for each consumer its own; so what is read comes to a multiprocessor once. A
``second`` product has another x and an out of its own, and of the same y the other axis for k: both gradients share the
gradient of the product.

Either axis of x or y may be the dense one: ``ACROSS`` it is m or n, else k. TURNED: out is stored as [n, m].

A consumer's tiles are ROWS values of m. Results leave by blocks [ROWS, ROWS], from buffers of their own until the last
tile, which finds the slots of x empty.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false
# The type checker takes Gluon's programs for Python.

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from scalefold.kernels.hopper.pieces import CONSUMERS, group_barrier, publish, tiles_for
from scalefold.kernels.hopper.row_pieces import (
    ROWS,
    fetch_at,
    new_ring,
    one_arrival,
    product_layout,
    receive,
    release,
    send_at,
    wait_until_sent,
)
from scalefold.kernels.instructions import program, wait_for_predecessors

LENGTH = gl.constexpr(256)  # of a side of all matrices
CHUNK = gl.constexpr(64)  # values of k of a block
CHUNKS = gl.constexpr(4)
STAGES = gl.constexpr(4)  # slots of x of a consumer
BUFFERS = gl.constexpr(2)  # for results of a consumer
CONSUMER_REGISTERS = gl.constexpr(240)
LOADER_REGISTERS = gl.constexpr(24)


class Kept(NamedTuple):
    """Blocks of y, [n, CHUNK] or ACROSS [CHUNK, n], and a barrier for each."""

    blocks: Any
    there: Any


class Place(NamedTuple):
    """What a program does: the first row of its channel in all matrices and its first m."""

    row: Any
    m: Any


class Output(NamedTuple):
    """Descriptors of both products' results, the second None if there is none, and buffers of both consumers."""

    first: Any
    second: Any
    buffers: Any


@gluon.jit
def _fetch_operands(
    descriptors, kept, ring, place,
    TILES: gl.constexpr, COUNT: gl.constexpr, ACROSS: gl.constexpr, KEPT_ACROSS: gl.constexpr,
):  # fmt: skip
    """The loader: blocks of y, each with the first ones of x that meet it, then the rest of x."""
    y, x, second = descriptors
    for n in gl.static_range(COUNT):
        for chunk in gl.static_range(CHUNKS):
            k = chunk * CHUNK
            if n == 0:
                full = kept.there.index(chunk)
                mbarrier.expect(full, y.block_type.nbytes)
                at = (place.row + k, 0) if KEPT_ACROSS else (place.row, k)
                tma.async_copy_global_to_shared(y, at, full, kept.blocks.index(chunk))
            for side in gl.static_range(CONSUMERS):
                m = place.m + (n * CONSUMERS + side) % TILES * ROWS
                at = (place.row + k, m) if ACROSS else (place.row + m, k)
                if n * CONSUMERS + side < TILES:
                    fetch_at(ring, x, at, side, n * CHUNKS + chunk)
                else:
                    fetch_at(ring, second, at, side, n * CHUNKS + chunk)


@gluon.jit
def _block_of(kept, chunk: gl.constexpr, SECOND: gl.constexpr, KEPT_ACROSS: gl.constexpr):
    """The right operand [CHUNK, n] for values of k from chunk * CHUNK on."""
    if SECOND:  # one after another, blocks [n, CHUNK] are how the copy engine lays out a square
        LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([LENGTH, LENGTH], gl.bfloat16)
        square = kept.blocks._reinterpret(gl.bfloat16, [LENGTH, LENGTH], LAYOUT)
        return square.slice(chunk * CHUNK, CHUNK, 0)
    elif KEPT_ACROSS:  # noqa: RET505  (the compiler looks at what follows an untaken return)
        return kept.blocks.index(chunk)
    else:
        return kept.blocks.index(chunk).permute((1, 0))


@gluon.jit
def _free(ring, side, n):
    """A consumer: its products with the n-th block of x are complete."""
    group_barrier()
    release(ring, side, n)


@gluon.jit
def _halves(x):
    """Left and right half of the columns of a product, in registers."""
    HALF: gl.constexpr = x.shape[1] // 2
    left, right = gl.split(gl.permute(gl.reshape(x, [x.shape[0], 2, HALF]), (0, 2, 1)))
    return gl.convert_layout(left, product_layout(HALF)), gl.convert_layout(right, product_layout(HALF))


@gluon.jit
def _parts(x):
    """Blocks [ROWS, ROWS] of a product."""
    left, right = _halves(x)
    return _halves(left) + _halves(right)


@gluon.jit
def _tile(
    kept, ring, SIDE: gl.constexpr, n: gl.constexpr, SECOND: gl.constexpr, LAST: gl.constexpr, ACROSS: gl.constexpr,
    KEPT_ACROSS: gl.constexpr,
):  # fmt: skip
    """A consumer's n-th tile, [ROWS, LENGTH] in bf16. The loader gets slots back, unless it is the LAST one."""
    if SECOND and n == 0:  # each block has values for every k
        for chunk in gl.static_range(CHUNKS):
            mbarrier.wait(kept.there.index(chunk), 0)
    acc = gl.zeros([ROWS, LENGTH], gl.float32, product_layout(LENGTH))
    for chunk in gl.static_range(CHUNKS):
        if n == 0 and not SECOND:
            mbarrier.wait(kept.there.index(chunk), 0)
        x = receive(ring, SIDE, n * CHUNKS + chunk)
        left = x.permute((1, 0)) if ACROSS else x
        right = _block_of(kept, chunk, SECOND, KEPT_ACROSS)
        acc = warpgroup_mma(left, right, acc, use_acc=chunk > 0, is_async=True)
        if chunk > 0 and (not LAST or chunk - 1 < CHUNKS - STAGES):
            acc = warpgroup_mma_wait(1, deps=(acc,))
            _free(ring, SIDE, n * CHUNKS + chunk - 1)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    if not LAST:
        _free(ring, SIDE, n * CHUNKS + CHUNKS - 1)
    return acc.to(gl.bfloat16)


@gluon.jit
def _buffer(output, ring, SIDE: gl.constexpr, sent: gl.constexpr, part: gl.constexpr, LAST: gl.constexpr):
    """Where a consumer's next block of results goes, its last tile's ``part`` or, of the others', that after ``sent``.

    It is free in all warps.
    """
    if LAST:
        if part == 0:
            group_barrier()
        return ring.slots.index(SIDE * STAGES + part)
    else:  # noqa: RET505  (the compiler looks at what follows an untaken return)
        if sent >= BUFFERS:
            wait_until_sent(BUFFERS - 1)
        return output.buffers.index(SIDE * BUFFERS + sent % BUFFERS)


@gluon.jit
def _send_part(descriptor, buffer, part, at, m, TURNED: gl.constexpr):
    """A block of results, whose first row and n are ``at`` there and m."""
    row, n = at
    if TURNED:
        buffer.permute((1, 0)).store(part)
        send_at(descriptor, (row + n, m), buffer)
    else:
        buffer.store(part)
        send_at(descriptor, (row + m, n), buffer)


@gluon.jit
def _multiply(
    shared, SIDE: gl.constexpr, TILES: gl.constexpr, COUNT: gl.constexpr, ACROSS: gl.constexpr,
    KEPT_ACROSS: gl.constexpr, TURNED: gl.constexpr,
):  # fmt: skip
    """A consumer: tiles SIDE, SIDE + CONSUMERS, ... of the first product and then of the second one."""
    output, kept, ring, place = shared
    PARTS: gl.constexpr = LENGTH // ROWS
    for n in gl.static_range(COUNT):
        tile = _tile(kept, ring, SIDE, n, n * CONSUMERS + SIDE >= TILES, n == COUNT - 1, ACROSS, KEPT_ACROSS)
        parts = _parts(tile)
        m = place.m + (n * CONSUMERS + SIDE) % TILES * ROWS
        for part in gl.static_range(PARTS):
            buffer = _buffer(output, ring, SIDE, n * PARTS + part, part, n == COUNT - 1)
            descriptor = output.first if n * CONSUMERS + SIDE < TILES else output.second
            _send_part(descriptor, buffer, parts[part], (place.row, part * ROWS), m, TURNED)
    tma.store_wait(0)


@program
@gluon.jit
def hopper_product(
    y, x, second, out, second_out,
    TILES: gl.constexpr, ACROSS: gl.constexpr, KEPT_ACROSS: gl.constexpr, TURNED: gl.constexpr,
):  # fmt: skip
    """Descriptors of matrices [channels * LENGTH, LENGTH], all in blocks [ROWS, ROWS] but those of y.

    Program (part of a channel, channel): parts are TILES tiles of m. The second product, if there is one, reads y as if
    KEPT_ACROSS, which it then is not.
    """
    wait_for_predecessors()
    PAIRED: gl.constexpr = second is not None
    COUNT: gl.constexpr = (2 if PAIRED else 1) * TILES // CONSUMERS
    gl.static_assert(not PAIRED or not KEPT_ACROSS, "a second product reads y the other way around")
    gl.static_assert(TILES % CONSUMERS == 0, "consumers have the same number of tiles")
    kept = Kept(tiles_for(y, CHUNKS), one_arrival(CHUNKS))
    ring = new_ring(x, STAGES)
    output = Output(out, second_out, tiles_for(out, CONSUMERS * BUFFERS))
    publish()
    place = Place(gl.program_id(1) * LENGTH, gl.program_id(0) * (TILES * ROWS))
    shared = (output, kept, ring, place)
    gl.warp_specialize(
        [
            (_multiply, (shared, 0, TILES, COUNT, ACROSS, KEPT_ACROSS, TURNED)),
            (_multiply, (shared, 1, TILES, COUNT, ACROSS, KEPT_ACROSS, TURNED)),
            (_fetch_operands, ((y, x, second), kept, ring, place, TILES, COUNT, ACROSS, KEPT_ACROSS)),
        ],
        [4, 4],
        [CONSUMER_REGISTERS, LOADER_REGISTERS],
    )
