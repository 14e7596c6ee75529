"""Gradients of a transition of pairs for Hopper in Gluon; twins: those of ``ops.transition`` that store nothing of the
hidden layer.

That of x. Blocks of the hidden layer stream by as in the forward, their weights for all consumers at once; each weight
of the first linear serves twice. The norm is written over the tile of x, which comes again for the norm's backward and
is written over with its gradient.

Those of the weights. A program has 2 ROWS hidden channels, a consumer half of them. Hidden layer and gradient come once
more, as [channels, rows], the left operands of the products with the gradient of the output and the norm.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false
# The type checker takes Gluon's programs for Python.

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from scalefold.kernels.hopper.gradients.norm import norm_gradient, sum_tile
from scalefold.kernels.hopper.pieces import CONSUMERS, group_barrier, initialised, publish, tiles_for
from scalefold.kernels.hopper.row_pieces import (
    ROWS,
    fetch,
    leave,
    new_ring,
    normalised,
    one_arrival,
    operand_layout,
    per_column,
    product_layout,
    read,
    receive,
    send,
    wait_until_sent,
)
from scalefold.kernels.hopper.transition import HIDDEN, Weights, leave_block
from scalefold.kernels.instructions import program, wait_for_predecessors

STAGES = gl.constexpr(4)  # blocks of weights, or tiles of rows, on their way

# ---- x --------------------------------------------------------------------------------------------------------------


@gluon.jit
def _fetch_tile(x, d_out, rings, tile, side, n):
    fetch(rings[0], x, tile * ROWS, 0, side, n)
    fetch(rings[1], d_out, tile * ROWS, 0, side, n)


@gluon.jit
def _fetch_blocks(descriptors, rings, weights, blocks, tiles):
    """The loader: for each pair of tiles all blocks of the weights; x and d_out with the last that need no leave."""
    x, d_out, weight_1, weight_2 = descriptors
    n = 0
    step = 0
    for tile in range(gl.program_id(0) * CONSUMERS, tiles, gl.num_programs(0) * CONSUMERS):
        for block in range(blocks):
            slot = step % STAGES
            full = weights.full.index(slot)
            mbarrier.wait(weights.empty.index(slot), ((step // STAGES) & 1) ^ 1)
            mbarrier.expect(full, weight_1.block_type.nbytes + weight_2.block_type.nbytes)
            tma.async_copy_global_to_shared(weight_1, [block * HIDDEN, 0], full, weights.first.index(slot))
            tma.async_copy_global_to_shared(weight_2, [0, block * HIDDEN], full, weights.second.index(slot))
            step += 1
            if block == STAGES - 1:
                _fetch_tile(x, d_out, rings, tile, 0, n)
                if tile + 1 < tiles:
                    _fetch_tile(x, d_out, rings, tile + 1, 1, n)
        n += 1  # noqa: SIM113


@gluon.jit
def _add_block(acc, left, d_out, first, second, shift):
    """acc + gradient of a block of the hidden layer times its weight: [ROWS, C]."""
    hidden = gl.zeros([ROWS, HIDDEN], gl.float32, product_layout(HIDDEN))
    d = gl.zeros([ROWS, HIDDEN], gl.float32, product_layout(HIDDEN))
    hidden = warpgroup_mma(left, first.permute((1, 0)), hidden, use_acc=False, is_async=True)
    d = warpgroup_mma(d_out, second, d, use_acc=False, is_async=True)
    hidden, d = warpgroup_mma_wait(0, deps=(hidden, d))
    d = gl.where(hidden + shift > 0.0, d, 0.0).to(gl.bfloat16)
    return warpgroup_mma(gl.convert_layout(d, operand_layout(acc.shape[1])), first, acc)


@gluon.jit
def _differentiate(shared, SIDE: gl.constexpr):
    """A consumer. The last pair of tiles may be one: then the second consumer only lets blocks pass."""
    x, outs, norm, bias, partials, rings, weights, again, spare, blocks, tiles = shared
    dx, normed_out = outs
    C: gl.constexpr = weights.first.shape[2]
    n = 0
    step = 0
    for pair in range(gl.program_id(0) * CONSUMERS, tiles, gl.num_programs(0) * CONSUMERS):
        tile = pair + SIDE
        if tile < tiles:
            if n > 0:
                wait_until_sent(0)
                leave(rings[0], SIDE, n - 1)
            own = receive(rings[0], SIDE, n)
            value = normalised(read(own), norm)
            left = gl.convert_layout(value, operand_layout(HIDDEN))
            group_barrier()
            own.store(value)
            send(normed_out, tile * ROWS, 0, own)
            sums = partials + tile.to(gl.int64) * (3 * C)
            d_out = receive(rings[1], SIDE, n)
            sum_tile(d_out, sums + 2 * C)
            wait_until_sent(0)
            mbarrier.expect(again.index(SIDE), x.block_type.nbytes)
            tma.async_copy_global_to_shared(x, [tile * ROWS, 0], again.index(SIDE), own)
            acc = gl.zeros([ROWS, C], gl.float32, product_layout(C))
            for block in range(blocks):
                slot = step % STAGES
                shift = per_column(bias, block * HIDDEN, HIDDEN)
                mbarrier.wait(weights.full.index(slot), (step // STAGES) & 1)
                acc = _add_block(acc, left, d_out, weights.first.index(slot), weights.second.index(slot), shift)
                leave_block(weights, slot)
                step += 1
            mbarrier.wait(again.index(SIDE), n & 1)
            gradient = norm_gradient(acc, read(own), norm, spare.index(SIDE), sums) + read(d_out)
            leave(rings[1], SIDE, n)
            group_barrier()
            own.store(gradient.to(gl.bfloat16))
            send(dx, tile * ROWS, 0, own)
        else:
            for _ in range(blocks):
                slot = step % STAGES
                mbarrier.wait(weights.full.index(slot), (step // STAGES) & 1)
                leave_block(weights, slot)
                step += 1
        n += 1  # noqa: SIM113
    tma.store_wait(0)


@program
@gluon.jit(do_not_specialize=["blocks", "tiles"])
def hopper_transition_input(x, d_out, weight_1, weight_2, dx, normed, norm, bias, partials, blocks, tiles):
    """Descriptors of x, d_out, dx and normed [64 tiles, C] and weights [hidden, C] and [C, hidden] in ``blocks``.

    bias: of the hidden layer; partials: [tiles, 3 C] fp32, sums for the norm's weight and bias and the last bias. At
    least STAGES blocks.
    """
    wait_for_predecessors()
    rings = (new_ring(x, 1), new_ring(d_out, 1))
    weights = Weights(
        tiles_for(weight_1, STAGES), tiles_for(weight_2, STAGES), one_arrival(STAGES), initialised(STAGES, CONSUMERS)
    )
    again = one_arrival(CONSUMERS)
    spare = tiles_for(x, CONSUMERS)
    publish()
    shared = (x, (dx, normed), norm, bias, partials, rings, weights, again, spare, blocks, tiles)
    gl.warp_specialize(
        [
            (_differentiate, (shared, 0)),
            (_differentiate, (shared, 1)),
            (_fetch_blocks, ((x, d_out, weight_1, weight_2), rings, weights, blocks, tiles)),
        ],
        [4, 4],
        [240, 24],
    )


# ---- weights --------------------------------------------------------------------------------------------------------


class Slots(NamedTuple):
    """Slots for tiles [ROWS, C] of the norm and of the gradient of the output, which all consumers read."""

    normed: Any
    d: Any
    full: Any
    empty: Any


@gluon.jit
def _fetch_weights(normed, d_out, weight_1, weight_2, slots, weights, there, place):
    """The loader: the program's part of both weights, then the norm and the gradient of the output along the rows."""
    own, first, last = place
    mbarrier.expect(there, weight_1.block_type.nbytes + weight_2.block_type.nbytes)
    tma.async_copy_global_to_shared(weight_1, [own, 0], there, weights.index(0))
    tma.async_copy_global_to_shared(weight_2, [0, own], there, weights.index(1))
    for tile in range(first, last):
        step = tile - first
        slot = step % STAGES
        full = slots.full.index(slot)
        mbarrier.wait(slots.empty.index(slot), ((step // STAGES) & 1) ^ 1)
        mbarrier.expect(full, normed.block_type.nbytes + d_out.block_type.nbytes)
        tma.async_copy_global_to_shared(normed, [tile * ROWS, 0], full, slots.normed.index(slot))
        tma.async_copy_global_to_shared(d_out, [tile * ROWS, 0], full, slots.d.index(slot))


@gluon.jit
def _sum_weights(shared, SIDE: gl.constexpr):
    """A consumer: gradients of ROWS channels' parts of both weights, [ROWS, C] each, and of their biases."""
    bias, partials, slots, weights, there, place, width = shared
    first_channel, first, last = place
    C: gl.constexpr = weights.shape[2]
    LAYOUT: gl.constexpr = product_layout(ROWS)
    channel = first_channel + SIDE * ROWS
    own = channel + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    shift = gl.load(bias + own).to(gl.float32)
    acc_1 = gl.zeros([ROWS, C], gl.float32, product_layout(C))
    acc_2 = gl.zeros([ROWS, C], gl.float32, product_layout(C))
    total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, LAYOUT))
    mbarrier.wait(there, 0)
    block_1 = weights.index(0).slice(SIDE * ROWS, ROWS, 0)
    block_2 = weights.index(1).slice(SIDE * ROWS, ROWS, 1).permute((1, 0))
    for step in range(last - first):
        slot = step % STAGES
        mbarrier.wait(slots.full.index(slot), (step // STAGES) & 1)
        x, d_out = slots.normed.index(slot), slots.d.index(slot)
        hidden = gl.zeros([ROWS, ROWS], gl.float32, LAYOUT)
        d = gl.zeros([ROWS, ROWS], gl.float32, LAYOUT)
        hidden = warpgroup_mma(block_1, x.permute((1, 0)), hidden, use_acc=False, is_async=True)
        d = warpgroup_mma(block_2, d_out.permute((1, 0)), d, use_acc=False, is_async=True)
        hidden, d = warpgroup_mma_wait(0, deps=(hidden, d))
        hidden = gl.maximum(hidden + shift[:, None], 0.0)
        d = gl.where(hidden > 0.0, d, 0.0)
        total += gl.sum(d, 1)
        left_1 = gl.convert_layout(d.to(gl.bfloat16), operand_layout(C))
        left_2 = gl.convert_layout(hidden.to(gl.bfloat16), operand_layout(C))
        acc_1 = warpgroup_mma(left_1, x, acc_1, is_async=True)
        acc_2 = warpgroup_mma(left_2, d_out, acc_2, is_async=True)
        acc_1, acc_2 = warpgroup_mma_wait(0, deps=(acc_1, acc_2))
        group_barrier()
        mbarrier.arrive(slots.empty.index(slot), count=1)
    partials += gl.program_id(1).to(gl.int64) * (width * (2 * C + 1))
    line = channel + gl.arange(0, ROWS, layout=gl.SliceLayout(1, product_layout(C)))[:, None]
    column = gl.arange(0, C, layout=gl.SliceLayout(0, product_layout(C)))[None, :]
    gl.store(partials + line * C + column, acc_1)
    gl.store(partials + width * C + line + column * width, acc_2)
    gl.store(partials + 2 * width * C + own, total)


@program
@gluon.jit(do_not_specialize=["tiles", "per_range"])
def hopper_transition_weights(normed, d_out, weight_1, weight_2, bias, partials, width, tiles, per_range):
    """Program (2 ROWS hidden channels, range of tiles of rows) -> partials[range]: gradients of weight 1, weight 2 and
    bias 1. Descriptors of the norm and d_out [64 tiles, C], weights [width, C] and [C, width] in blocks [C, C], C being
    2 ROWS.
    """
    wait_for_predecessors()
    slots = Slots(
        tiles_for(normed, STAGES), tiles_for(d_out, STAGES), one_arrival(STAGES), initialised(STAGES, CONSUMERS)
    )
    weights = tiles_for(weight_1, 2)
    there = one_arrival(1).index(0)
    publish()
    first = gl.program_id(1) * per_range
    place = (gl.program_id(0) * 2 * ROWS, first, gl.minimum(first + per_range, tiles))
    shared = (bias, partials, slots, weights, there, place, width)
    gl.warp_specialize(
        [
            (_sum_weights, (shared, 0)),
            (_sum_weights, (shared, 1)),
            (_fetch_weights, (normed, d_out, weight_1, weight_2, slots, weights, there, place)),
        ],
        [4, 4],
        [240, 24],
    )
