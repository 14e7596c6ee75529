"""Updates of pairs for Hopper in Gluon; twins: ``ops.triangle``, ``ops.outer_product``.

Triangle multiplication, operands: all weights stay in shared memory. Its output: ``triangle_output``.

Outer product mean, forward; the outer product stays on chip. A program walks over tiles of ROWS values of i and
PAIRED * CONSUMERS of j; a consumer has PAIRED of these j. Channels c of a are taken one by one: the products of one
with all channels d of b, [i, (j, d)], lie in registers as the left operand of the next product takes them, that with
the output weight of channel c, [d, channels of z], one per j.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false
# The type checker takes Gluon's programs for Python.

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from scalefold.kernels.hopper.pieces import CONSUMERS, group_barrier, initialised, publish, tiles_for
from scalefold.kernels.hopper.row_pieces import (
    COLUMNS,
    ROWS,
    fetch,
    fetch_rows,
    fetch_weights,
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
    start_product,
    wait_until_sent,
)
from scalefold.kernels.instructions import program, wait_for_predecessors

OPERAND_STAGES = gl.constexpr(1)  # tiles of z per consumer
STAGED = gl.constexpr(2)  # blocks of operands per consumer on their way to memory
PAIRED = gl.constexpr(2)  # values of j per consumer: what accumulators have registers for
STAGES = gl.constexpr(4)  # channels of a on their way
B_STAGES = gl.constexpr(1)


# ---- operands -------------------------------------------------------------------------------------------------------


@gluon.jit
def _fetch_pairs(z, weight_descriptors, ring, weights, there, tiles):
    fetch_weights(weight_descriptors, weights, there)
    fetch_rows(ring, z, tiles)


@gluon.jit
def _gate_and_value(left, gate, value, biases, first: gl.constexpr):
    """sigmoid(gate) and value for output channels from ``first`` on, by weights gate and value: [ROWS, COLUMNS] each.

    biases: of gate and value.
    """
    logits, values = start_product(left, gate, first), start_product(left, value, first)
    logits, values = warpgroup_mma_wait(0, deps=(logits, values))
    return sigmoid(logits + per_column(biases[0], first, COLUMNS)), values + per_column(biases[1], first, COLUMNS)


@gluon.jit
def _project(shared, SIDE: gl.constexpr):
    """A consumer: sigmoid(gate) * value * mask of both operands, turned on their way through shared memory.

    A block that goes to two places has two copies on their way.
    """
    mask, dims, norm, biases, outs, ring, weights, staged, there, tiles = shared
    TWICE: gl.constexpr = outs[2] is not None
    C: gl.constexpr = weights.shape[1]
    LAYOUT: gl.constexpr = product_layout(COLUMNS)
    gl.static_assert(2 * C // COLUMNS % STAGED == 0, "the first block of a tile would meet the last one's buffer")
    mbarrier.wait(there, 0)
    n = 0
    for tile in range(gl.program_id(0) * CONSUMERS + SIDE, tiles, gl.num_programs(0) * CONSUMERS):
        keep = gl.load(mask.pointer + row_offsets(mask, tile, dims, LAYOUT)).to(gl.float32)
        z = read(receive(ring, SIDE, n))
        leave(ring, SIDE, n)
        left = normed(z, norm)
        for operand in gl.static_range(2):
            value_weight, gate_weight = weights.index(2 * operand), weights.index(2 * operand + 1)
            own_biases = (biases[2 * operand + 1], biases[2 * operand])
            for first in gl.static_range(0, C, COLUMNS):
                gate, value = _gate_and_value(left, gate_weight, value_weight, own_biases, first)
                own = staged.index(SIDE * STAGED + (operand * C + first) // COLUMNS % STAGED)
                wait_until_sent(STAGED if TWICE and (operand == 1) == (first > 0) else STAGED - 1)
                own.permute((1, 0)).store((gate * value * keep[:, None]).to(gl.bfloat16))
                send(outs[operand], first, tile * ROWS, own)
                if TWICE and operand == 1:
                    tma.async_copy_shared_to_global(outs[2], (first, tile * ROWS), own)
        n += 1  # noqa: SIM113
    tma.store_wait(0)


@program
@gluon.jit(do_not_specialize=["tiles"])
def hopper_operands(
    z, weight_a, weight_a_gate, weight_b, weight_b_gate, out_a, out_b, also_b, norm, biases, mask, dims, tiles
):  # fmt: skip
    """Descriptors of z [64 tiles, C], weights [C, C] and operands a, b [C, 64 tiles]; biases in the weights' order.

    also_b: where b goes too, or None.
    """
    wait_for_predecessors()
    ring = new_ring(z, OPERAND_STAGES)
    weights = tiles_for(weight_a, 4)
    staged = tiles_for(out_a, CONSUMERS * STAGED)
    there = one_arrival(1).index(0)
    publish()
    weight_descriptors = (weight_a, weight_a_gate, weight_b, weight_b_gate)  # a launch takes no tuple of these
    shared = (mask, dims, norm, biases, (out_a, out_b, also_b), ring, weights, staged, there, tiles)
    gl.warp_specialize(
        [
            (_project, (shared, 0)),
            (_project, (shared, 1)),
            (_fetch_pairs, (z, weight_descriptors, ring, weights, there, tiles)),
        ],
        [4, 4],
        [240, 24],
    )


# ---- outer product mean ---------------------------------------------------------------------------------------------


class Channels(NamedTuple):
    """Slots for channels of a, [sequences, ROWS], and their blocks of the weight, [channels of z, d].

    All consumers read them.
    """

    a: Any
    weight: Any
    full: Any
    empty: Any


@gluon.jit
def _place(tile, tiles_i):
    """First i and j of a tile; neighbours share j."""
    return (tile % tiles_i) * ROWS, (tile // tiles_i) * (PAIRED * CONSUMERS)


@gluon.jit
def _fetch(descriptors, channels, rings, sequences, tiles_i, tiles):
    """The loader: for each tile b of each consumer, all channels of a with their weights, and z at last."""
    z, a, b, weight = descriptors
    b_ring, z_ring = rings
    CO: gl.constexpr = weight.block_type.shape[1]
    C: gl.constexpr = z.block_type.shape[1]
    n = 0
    step = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        i, j = _place(tile, tiles_i)
        for side in gl.static_range(CONSUMERS):
            fetch(b_ring, b, 0, (j + side * PAIRED) * CO, side, n)
        for c in range(CO):
            slot = step % STAGES
            full = channels.full.index(slot)
            mbarrier.wait(channels.empty.index(slot), ((step // STAGES) & 1) ^ 1)
            mbarrier.expect(full, a.block_type.nbytes + weight.block_type.nbytes)
            tma.async_copy_global_to_shared(a, [c * sequences, i], full, channels.a.index(slot))
            tma.async_copy_global_to_shared(weight, [0, c * CO], full, channels.weight.index(slot))
            step += 1
        for part in gl.static_range(PAIRED):
            for side in gl.static_range(CONSUMERS):
                fetch(z_ring, z, i, (j + side * PAIRED + part) * C, side, n * PAIRED + part)
        n += 1  # noqa: SIM113


@gluon.jit
def by_pair(outer, C: gl.constexpr):
    """Products [i, (j, d)] as left operands [i, d], one per j."""
    ROWS_: gl.constexpr = outer.shape[0]
    CO: gl.constexpr = outer.shape[1] // PAIRED
    parts = gl.permute(gl.reshape(outer.to(gl.bfloat16), [ROWS_, PAIRED, CO]), (0, 2, 1))
    first, second = gl.split(parts)
    return gl.convert_layout(first, operand_layout(C)), gl.convert_layout(second, operand_layout(C))


@gluon.jit
def _update(shared, SIDE: gl.constexpr):
    """A consumer. z is written over with the result; its slots go back to the loader during the next tile."""
    out, norm, bias, num_j, channels, rings, tiles_i, tiles = shared
    b_ring, z_ring = rings
    CO: gl.constexpr = channels.weight.shape[2]
    C: gl.constexpr = channels.weight.shape[1]
    OUTER: gl.constexpr = product_layout(PAIRED * CO)
    n = 0
    step = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        i, j = _place(tile, tiles_i)
        b = receive(b_ring, SIDE, n)
        if n > 0:
            wait_until_sent(0)
            for part in gl.static_range(PAIRED):
                leave(z_ring, SIDE, (n - 1) * PAIRED + part)
        first = gl.zeros([ROWS, C], gl.float32, product_layout(C))
        second = gl.zeros([ROWS, C], gl.float32, product_layout(C))
        for _ in range(CO):
            slot = step % STAGES
            mbarrier.wait(channels.full.index(slot), (step // STAGES) & 1)
            outer = gl.zeros([ROWS, PAIRED * CO], gl.float32, OUTER)
            outer = warpgroup_mma(channels.a.index(slot).permute((1, 0)), b, outer, use_acc=False)
            left_0, left_1 = by_pair(outer, C)
            weight = channels.weight.index(slot).permute((1, 0))
            first = warpgroup_mma(left_0, weight, first, is_async=True)
            second = warpgroup_mma(left_1, weight, second, is_async=True)
            first, second = warpgroup_mma_wait(0, deps=(first, second))
            group_barrier()
            mbarrier.arrive(channels.empty.index(slot), count=1)
            step += 1
        leave(b_ring, SIDE, n)
        own = j + SIDE * PAIRED
        _finish(first, receive(z_ring, SIDE, n * PAIRED), out, norm, bias, i, own, num_j)
        _finish(second, receive(z_ring, SIDE, n * PAIRED + 1), out, norm, bias, i, own + 1, num_j)
        n += 1  # noqa: SIM113
    tma.store_wait(0)


@gluon.jit
def _finish(acc, tile, out, norm, bias, i, j, num_j):
    """z + (acc + bias) / norm over the tile of z, and to memory."""
    C: gl.constexpr = acc.shape[1]
    rows = i + gl.arange(0, ROWS, layout=gl.SliceLayout(1, product_layout(C)))
    count = gl.load(norm + rows.to(gl.int64) * num_j + j)
    value = (acc + per_column(bias, 0, C)) / count[:, None]
    before = read(tile)
    group_barrier()
    tile.store((before + value).to(gl.bfloat16))
    send(out, i, j * C, tile)


@program
@gluon.jit(do_not_specialize=["tiles_i", "tiles"])
def hopper_outer_product(z, a, b, weight, out, norm, bias, sequences, num_j, tiles_i, tiles):
    """Descriptors of z and out [I, J * C], a [CO * sequences, I], b [sequences, J * CO] and weight [C, CO * CO].

    norm: [I, J] fp32, dense; bias: [C].
    """
    wait_for_predecessors()
    channels = Channels(
        tiles_for(a, STAGES), tiles_for(weight, STAGES), initialised(STAGES, 1), initialised(STAGES, CONSUMERS)
    )
    rings = (new_ring(b, B_STAGES), new_ring(z, PAIRED))
    publish()
    shared = (out, norm, bias, num_j, channels, rings, tiles_i, tiles)
    gl.warp_specialize(
        [
            (_update, (shared, 0)),
            (_update, (shared, 1)),
            (_fetch, ((z, a, b, weight), channels, rings, sequences, tiles_i, tiles)),
        ],
        [4, 4],
        [240, 24],
    )
