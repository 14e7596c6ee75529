"""Beginning and end of a gated attention, forward, for Hopper in Gluon; twins: ``ops.linear``, ``ops.gated_output``.

Layer norm, four projections and an attention bias of pairs; the gated output of the MSA: these weights stay in shared
memory. Layer norm and wide projections, of the MSA: their weights stream by in blocks of COLUMNS outputs for all
consumers at once.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false
# The type checker takes Gluon's programs for Python.

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from scalefold.kernels import hopper
from scalefold.kernels.hopper.pieces import CONSUMERS, group_barrier, initialised, publish, tiles_for
from scalefold.kernels.hopper.row_pieces import (
    COLUMNS,
    ROWS,
    fetch,
    fetch_rows,
    leave,
    new_ring,
    normed,
    one_arrival,
    operand_layout,
    per_column,
    product_layout,
    read,
    receive,
    row_offsets,
    send,
    sigmoid,
    wait_until_sent,
)

STAGES = gl.constexpr(2)  # tiles of x per consumer
STAGED = gl.constexpr(2)  # results per consumer on their way to memory


@gluon.jit
def _fetch(inputs, ring, weights, narrow_weight, weights_there, tiles):
    """The loader: the weights, then tiles of x for both consumers in turn."""
    x, weight, narrow = inputs
    COUNT: gl.constexpr = weights.shape[0]
    C: gl.constexpr = weights.shape[1]
    mbarrier.expect(weights_there, COUNT * weight.block_type.nbytes + narrow.block_type.nbytes)
    for i in gl.static_range(COUNT):
        tma.async_copy_global_to_shared(weight, [i * C, 0], weights_there, weights.index(i))
    tma.async_copy_global_to_shared(narrow, [0, 0], weights_there, narrow_weight)
    fetch_rows(ring, x, tiles)


@gluon.jit
def _project(shared, SIDE: gl.constexpr, NARROW: gl.constexpr):
    """A consumer: the norm of a tile once, as the left operand in registers, then all columns."""
    norm, bias, out, narrow_out, dims, ring, weights, narrow_weight, staged, weights_there, tiles = shared
    COUNT: gl.constexpr = weights.shape[0]
    C: gl.constexpr = weights.shape[1]
    gl.static_assert(COUNT * C // COLUMNS % STAGED == 0, "the first block of a tile would meet the last one's buffer")
    mbarrier.wait(weights_there, 0)
    n = 0
    for tile in range(gl.program_id(0) * CONSUMERS + SIDE, tiles, gl.num_programs(0) * CONSUMERS):
        x = read(receive(ring, SIDE, n))
        leave(ring, SIDE, n)
        left = normed(x, norm)
        for i in gl.static_range(COUNT):
            for first in gl.static_range(0, C, COLUMNS):
                acc = gl.zeros([ROWS, COLUMNS], gl.float32, product_layout(COLUMNS))
                block = weights.index(i).slice(first, COLUMNS, 0)
                acc = warpgroup_mma(left, block.permute((1, 0)), acc, use_acc=False)
                if i == COUNT - 1:
                    acc += per_column(bias, first, COLUMNS)
                own = staged.index(SIDE * STAGED + (i * C + first) // COLUMNS % STAGED)
                wait_until_sent(STAGED - 1)
                own.store(acc.to(gl.bfloat16))
                send(out, (i * tiles + tile) * ROWS, first, own)
        _project_narrow(narrow_out, left, narrow_weight, tile, dims, NARROW)
        n += 1  # noqa: SIM113
    tma.store_wait(0)


@gluon.jit
def _project_narrow(out, left, weight, tile, dims, NARROW: gl.constexpr):
    """The attention bias of a tile, [ROWS, NARROW], by ordinary stores: its channels lie anywhere."""
    WIDTH: gl.constexpr = weight.shape[0]
    LAYOUT: gl.constexpr = product_layout(WIDTH)
    acc = gl.zeros([ROWS, WIDTH], gl.float32, LAYOUT)
    left = gl.convert_layout(left, operand_layout(WIDTH))
    acc = warpgroup_mma(left, weight.permute((1, 0)), acc, use_acc=False)
    n = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, LAYOUT))
    offsets = row_offsets(out, tile, dims, LAYOUT)[:, None] + n[None, :] * out.strides[3]
    gl.store(out.pointer + offsets, acc.to(gl.bfloat16), mask=(n < NARROW)[None, :])


@gluon.jit(do_not_specialize=["tiles"])
def hopper_projections(
    x, weight, narrow_weight, out, norm, bias, narrow_out, dims, tiles,
    COUNT: gl.constexpr, NARROW: gl.constexpr,
):  # fmt: skip
    """Descriptors of x [64 tiles, C], weight [COUNT * C, C], narrow weight [NARROW, C] and out [COUNT * 64 tiles, C].

    bias: [C], of the last projection. narrow_out: a view [64 tiles, NARROW].
    """
    ring = new_ring(x, STAGES)
    weights = tiles_for(weight, COUNT)
    narrow = tiles_for(narrow_weight, 1).index(0)
    staged = tiles_for(out, CONSUMERS * STAGED)
    there = one_arrival(1).index(0)
    publish()
    shared = (norm, bias, out, narrow_out, dims, ring, weights, narrow, staged, there, tiles)
    gl.warp_specialize(
        [
            (_project, (shared, 0, NARROW)),
            (_project, (shared, 1, NARROW)),
            (_fetch, ((x, weight, narrow_weight), ring, weights, narrow, there, tiles)),
        ],
        [4, 4],
        [240, 24],
    )


# ---- gated output ---------------------------------------------------------------------------------------------------

HALF = gl.constexpr(2 * hopper.PART)  # channels of a slot: half of the MSA's
SLOTS = gl.constexpr(3)  # per consumer; a tile takes six: o and gate by halves, then x


@gluon.jit
def _fetch_gated(inputs, ring, weights, there, tiles):
    """The loader: the weight, then for both consumers in turn o and gate of a tile, half by half, and x."""
    x, o, gate, weight = inputs
    BLOCKS: gl.constexpr = weights.shape[0]
    mbarrier.expect(there, BLOCKS * weight.block_type.nbytes)
    for block in gl.static_range(BLOCKS):
        tma.async_copy_global_to_shared(weight, [0, block * COLUMNS], there, weights.index(block))
    n = 0
    for pair in range(gl.program_id(0) * CONSUMERS, tiles, gl.num_programs(0) * CONSUMERS):
        for use in gl.static_range(2 * SLOTS):
            for side in gl.static_range(CONSUMERS):
                if pair + side < tiles:
                    row = (pair + side) * ROWS
                    if use >= 4:
                        fetch(ring, x, row, (use - 4) * HALF, side, n + use)
                    elif use % 2 == 1:
                        fetch(ring, gate, row, use // 2 * HALF, side, n + use)
                    else:
                        fetch(ring, o, row, use // 2 * HALF, side, n + use)
        n += 2 * SLOTS


@gluon.jit
def _gated(o, gate, first: gl.constexpr):
    """sigmoid(gate) * o for COLUMNS channels from ``first`` on, as the left operand of products with HALF columns."""
    value = read(o.slice(first, COLUMNS, 1)) * sigmoid(read(gate.slice(first, COLUMNS, 1)))
    return gl.convert_layout(value.to(gl.bfloat16), operand_layout(HALF))


@gluon.jit
def _finish_half(acc, x, bias, dropout, dims, tile, first: gl.constexpr):
    """x + dropout * (acc + bias) for HALF channels from ``first`` on, written over x."""
    parts = gl.permute(gl.reshape(acc, [ROWS, 2, COLUMNS]), (0, 2, 1))
    left, right = gl.split(parts)
    _finish(left, x.slice(0, COLUMNS, 1), bias, dropout, dims, tile, first)
    _finish(right, x.slice(COLUMNS, COLUMNS, 1), bias, dropout, dims, tile, first + COLUMNS)


@gluon.jit
def _finish(acc, x, bias, dropout, dims, tile, first: gl.constexpr):
    LAYOUT: gl.constexpr = product_layout(COLUMNS)
    value = gl.convert_layout(acc, LAYOUT) + per_column(bias, first, COLUMNS)
    if dropout is not None:
        columns = first + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, LAYOUT))
        value *= gl.load(dropout.pointer + row_offsets(dropout, tile, dims, LAYOUT)[:, None] + columns[None, :])
    before = read(x)
    group_barrier()
    x.store((before + value).to(gl.bfloat16))


@gluon.jit
def _close(shared, SIDE: gl.constexpr):
    """A consumer. The slots of x go back to the loader when the results in them have been sent, in the next tile."""
    bias, dropout, dims, out, ring, weights, there, tiles = shared
    mbarrier.wait(there, 0)
    n = 0
    for tile in range(gl.program_id(0) * CONSUMERS + SIDE, tiles, gl.num_programs(0) * CONSUMERS):
        if n > 0:
            wait_until_sent(0)
            leave(ring, SIDE, n - 2)
            leave(ring, SIDE, n - 1)
        first = gl.zeros([ROWS, HALF], gl.float32, product_layout(HALF))
        second = gl.zeros([ROWS, HALF], gl.float32, product_layout(HALF))
        for half in gl.static_range(2):
            o = receive(ring, SIDE, n + 2 * half)
            gate = receive(ring, SIDE, n + 2 * half + 1)
            for part in gl.static_range(0, HALF, COLUMNS):
                left = _gated(o, gate, part)
                block = weights.index((half * HALF + part) // COLUMNS)
                if part + COLUMNS == HALF:
                    leave(ring, SIDE, n + 2 * half)
                    leave(ring, SIDE, n + 2 * half + 1)
                first = warpgroup_mma(left, block.slice(0, HALF, 0).permute((1, 0)), first, is_async=True)
                second = warpgroup_mma(left, block.slice(HALF, HALF, 0).permute((1, 0)), second, is_async=True)
                first, second = warpgroup_mma_wait(0, deps=(first, second))
        x = receive(ring, SIDE, n + 4)
        _finish_half(first, x, bias, dropout, dims, tile, 0)
        send(out, tile * ROWS, 0, x)
        x = receive(ring, SIDE, n + 5)
        _finish_half(second, x, bias, dropout, dims, tile, HALF)
        send(out, tile * ROWS, HALF, x)
        n += 2 * SLOTS
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["tiles"])
def hopper_gated_output(x, o, gate, weight, out, bias, dropout, dims, tiles):
    """Descriptors of x, o, gate and out [64 tiles, 2 HALF], in blocks of HALF, and weight [2 HALF, 2 HALF] in blocks of
    COLUMNS; bias: [2 HALF]; dropout: a view [64 tiles, 2 HALF] of fp32 scales, or None.
    """
    ring = new_ring(x, SLOTS)
    weights = tiles_for(weight, 2 * HALF // COLUMNS)
    there = one_arrival(1).index(0)
    publish()
    shared = (bias, dropout, dims, out, ring, weights, there, tiles)
    gl.warp_specialize(
        [
            (_close, (shared, 0)),
            (_close, (shared, 1)),
            (_fetch_gated, ((x, o, gate, weight), ring, weights, there, tiles)),
        ],
        [4, 4],
        [240, 24],
    )


# ---- wide projections -----------------------------------------------------------------------------------------------

BLOCKS = gl.constexpr(4)  # of a weight on their way


class Blocks(NamedTuple):
    """Slots for blocks [COLUMNS, C] of a weight that all consumers read."""

    slots: Any
    full: Any
    empty: Any


@gluon.jit
def _fetch_wide(x, weight, ring, weights, blocks, tiles):
    """The loader: x of a pair of tiles, then all blocks of the weight."""
    n = 0
    step = 0
    for tile in range(gl.program_id(0) * CONSUMERS, tiles, gl.num_programs(0) * CONSUMERS):
        fetch(ring, x, tile * ROWS, 0, 0, n)
        if tile + 1 < tiles:
            fetch(ring, x, (tile + 1) * ROWS, 0, 1, n)
        for block in range(blocks):
            slot = step % BLOCKS
            mbarrier.wait(weights.empty.index(slot), ((step // BLOCKS) & 1) ^ 1)
            mbarrier.expect(weights.full.index(slot), weight.block_type.nbytes)
            at = [block * COLUMNS, 0]
            tma.async_copy_global_to_shared(weight, at, weights.full.index(slot), weights.slots.index(slot))
            step += 1
        n += 1  # noqa: SIM113


@gluon.jit
def _product(left, weights, step):
    """The unfinished product of a tile with the block of a step, once it is there: [ROWS, COLUMNS]."""
    slot = step % BLOCKS
    mbarrier.wait(weights.full.index(slot), (step // BLOCKS) & 1)
    acc = gl.zeros([ROWS, COLUMNS], gl.float32, product_layout(COLUMNS))
    return warpgroup_mma(left, weights.slots.index(slot).permute((1, 0)), acc, use_acc=False, is_async=True)


@gluon.jit
def _store_product(acc, shared, SIDE: gl.constexpr, tile, block, step):
    """A finished product to memory. Its block of the weight goes back to the loader, past the barrier in the wait."""
    _norm, bias, biased, out, _ring, weights, staged, _blocks, tiles = shared
    PER_WEIGHT: gl.constexpr = weights.slots.shape[2] // COLUMNS
    if block >= biased:
        acc += per_column(bias, (block - biased) * COLUMNS, COLUMNS)
    own = staged.index(SIDE * STAGED + step % STAGED)
    wait_until_sent(STAGED - 1)
    mbarrier.arrive(weights.empty.index(step % BLOCKS), count=1)
    own.store(acc.to(gl.bfloat16))
    send(out, (block // PER_WEIGHT * tiles + tile) * ROWS, block % PER_WEIGHT * COLUMNS, own)


@gluon.jit
def _project_wide(shared, SIDE: gl.constexpr):
    """A consumer: one product runs while the one before is stored. The last pair of tiles may be one: then the second
    consumer only lets blocks pass.
    """
    norm, _bias, _biased, _out, ring, weights, _staged, blocks, tiles = shared
    n = 0
    step = 0
    for pair in range(gl.program_id(0) * CONSUMERS, tiles, gl.num_programs(0) * CONSUMERS):
        tile = pair + SIDE
        if tile < tiles:
            x = read(receive(ring, SIDE, n))
            leave(ring, SIDE, n)
            left = normed(x, norm)
            for block in range(0, blocks, 2):
                first = _product(left, weights, step)
                second = _product(left, weights, step + 1)
                first = warpgroup_mma_wait(1, deps=(first,))
                _store_product(first, shared, SIDE, tile, block, step)
                second = warpgroup_mma_wait(0, deps=(second,))
                _store_product(second, shared, SIDE, tile, block + 1, step + 1)
                step += 2
        else:
            for _ in range(blocks):
                slot = step % BLOCKS
                mbarrier.wait(weights.full.index(slot), (step // BLOCKS) & 1)
                group_barrier()
                mbarrier.arrive(weights.empty.index(slot), count=1)
                step += 1
        n += 1  # noqa: SIM113
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["biased", "blocks", "tiles"])
def hopper_wide_projections(x, weight, out, norm, bias, biased, blocks, tiles):
    """Descriptors of x [64 tiles, C], weight [COLUMNS * blocks, C] and out [COLUMNS * blocks / C * 64 tiles, C].

    bias: of the blocks from ``biased`` on; ``blocks``: even.
    """
    ring = new_ring(x, 1)
    weights = Blocks(tiles_for(weight, BLOCKS), one_arrival(BLOCKS), initialised(BLOCKS, CONSUMERS))
    staged = tiles_for(out, CONSUMERS * STAGED)
    publish()
    shared = (norm, bias, biased, out, ring, weights, staged, blocks, tiles)
    gl.warp_specialize(
        [
            (_project_wide, (shared, 0)),
            (_project_wide, (shared, 1)),
            (_fetch_wide, (x, weight, ring, weights, blocks, tiles)),
        ],
        [4, 4],
        [240, 24],
    )
