"""Gradients of the outer product mean for Hopper in Gluon; twins: products and programs of ``ops.outer_product``.

Neither the outer product nor its gradient is ever in memory: both exist one value of j at a time, in registers, as the
left operand of the product that sums over it. Both programs have one tile of ROWS values of i each, walk along j, and
leave partial sums. With i and j, a and b exchanged the first one gives the gradient of b as it gives that of a.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false
# The type checker takes Gluon's programs for Python.

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from scalefold.kernels.hopper.pieces import CONSUMERS, group_barrier, initialised, publish, tiles_for
from scalefold.kernels.hopper.row_pieces import ROWS, one_arrival, operand_layout, product_layout
from scalefold.kernels.hopper.triangle import PAIRED, by_pair
from scalefold.kernels.instructions import program, wait_for_predecessors

STAGES = gl.constexpr(6)  # values of j on their way to the gradient of a
PAIR_STAGES = gl.constexpr(4)  # pairs of them on their way to that of the weight


class Slots(NamedTuple):
    """Slots for tiles of scaled gradients [ROWS, channels of z] and of b, which all consumers read."""

    scaled: Any
    b: Any
    full: Any
    empty: Any


@gluon.jit
def _new_slots(scaled, b, COUNT: gl.constexpr, EACH: gl.constexpr):
    """COUNT slots with EACH tiles of scaled gradients and one of b."""
    return Slots(
        tiles_for(scaled, COUNT * EACH), tiles_for(b, COUNT), initialised(COUNT, 1), initialised(COUNT, CONSUMERS)
    )


@gluon.jit
def _open(slots, step):
    """The loader: the slot of a step, once it is free, with its barrier, which awaits all of its bytes."""
    COUNT: gl.constexpr = slots.b.shape[0]
    EACH: gl.constexpr = slots.scaled.shape[0] // COUNT
    SCALED_BYTES: gl.constexpr = EACH * slots.scaled.shape[1] * slots.scaled.shape[2] * 2
    B_BYTES: gl.constexpr = slots.b.shape[1] * slots.b.shape[2] * 2
    slot = step % COUNT
    mbarrier.wait(slots.empty.index(slot), ((step // COUNT) & 1) ^ 1)
    mbarrier.expect(slots.full.index(slot), SCALED_BYTES + B_BYTES)
    return slot, slots.full.index(slot)


@gluon.jit
def _close(slots, step):
    """A consumer: its products with the tiles of a step are complete."""
    group_barrier()
    mbarrier.arrive(slots.empty.index(step % slots.b.shape[0]), count=1)


# ---- operands -------------------------------------------------------------------------------------------------------


@gluon.jit
def _fetch_operand(descriptors, slots, weights, there, place, steps):
    """The loader: the weights of both consumers' channels, then scaled gradients and b along j."""
    scaled, b, weight = descriptors
    tile, group, first, last = place
    row_step, column_step = steps
    CO: gl.constexpr = b.block_type.shape[1]
    mbarrier.expect(there, CONSUMERS * weight.block_type.nbytes)
    for side in gl.static_range(CONSUMERS):
        column = (group * CONSUMERS + side) * PAIRED * CO
        tma.async_copy_global_to_shared(weight, [0, column], there, weights.index(side))
    for j in range(first, last):
        slot, full = _open(slots, j - first)
        at = [j * row_step + tile * ROWS, j * column_step]
        tma.async_copy_global_to_shared(scaled, at, full, slots.scaled.index(slot))
        tma.async_copy_global_to_shared(b, [0, j * CO], full, slots.b.index(slot))


@gluon.jit
def _sum_operand(shared, SIDE: gl.constexpr):
    """A consumer: gradients of PAIRED channels of a, [ROWS, sequences] each."""
    partials, slots, weights, there, place, rows = shared
    tile, group, first, last = place
    CO: gl.constexpr = slots.b.shape[2]
    SEQUENCES: gl.constexpr = slots.b.shape[1]
    LAYOUT: gl.constexpr = product_layout(SEQUENCES)
    acc_0 = gl.zeros([ROWS, SEQUENCES], gl.float32, LAYOUT)
    acc_1 = gl.zeros([ROWS, SEQUENCES], gl.float32, LAYOUT)
    mbarrier.wait(there, 0)
    weight = weights.index(SIDE)
    for step in range(last - first):
        slot = step % STAGES
        mbarrier.wait(slots.full.index(slot), (step // STAGES) & 1)
        outer = gl.zeros([ROWS, PAIRED * CO], gl.float32, product_layout(PAIRED * CO))
        outer = warpgroup_mma(slots.scaled.index(slot), weight, outer, use_acc=False)
        left_0, left_1 = by_pair(outer, SEQUENCES)
        right = slots.b.index(slot).permute((1, 0))
        acc_0 = warpgroup_mma(left_0, right, acc_0, is_async=True)
        acc_1 = warpgroup_mma(left_1, right, acc_1, is_async=True)
        acc_0, acc_1 = warpgroup_mma_wait(0, deps=(acc_0, acc_1))
        _close(slots, step)
    line = gl.program_id(1).to(gl.int64) * (gl.num_programs(0) // (rows // ROWS)) * (CONSUMERS * PAIRED)
    line = (line + (group * CONSUMERS + SIDE) * PAIRED) * rows + tile * ROWS
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))[:, None]
    column = gl.arange(0, SEQUENCES, layout=gl.SliceLayout(0, LAYOUT))[None, :]
    gl.store(partials + (line + row) * SEQUENCES + column, acc_0)
    gl.store(partials + (line + rows + row) * SEQUENCES + column, acc_1)


@program
@gluon.jit(do_not_specialize=["row_step", "column_step", "count", "per_range"])
def hopper_outer_operand(scaled, b, weight, partials, rows, row_step, column_step, count, per_range):
    """Gradient of a [sequences, rows, CO] -> partials [ranges, CO, rows, sequences] fp32; CO is that of b.

    Program (tile of rows, group of channels; range of j). Descriptors of scaled gradients, whose tile for value j of
    ``count`` begins at [j * row_step + row, j * column_step]; of b [sequences, count * CO], in blocks of one j; and of
    the weight [channels of z, CO * CO], in blocks of PAIRED channels of a.
    """
    wait_for_predecessors()
    slots = _new_slots(scaled, b, STAGES, 1)
    weights = tiles_for(weight, CONSUMERS)
    there = one_arrival(1).index(0)
    publish()
    tiles = rows // ROWS
    first = gl.program_id(1) * per_range
    place = (gl.program_id(0) % tiles, gl.program_id(0) // tiles, first, gl.minimum(first + per_range, count))
    shared = (partials, slots, weights, there, place, rows)
    steps = (row_step, column_step)
    gl.warp_specialize(
        [
            (_sum_operand, (shared, 0)),
            (_sum_operand, (shared, 1)),
            (_fetch_operand, ((scaled, b, weight), slots, weights, there, place, steps)),
        ],
        [4, 4],
        [240, 24],
    )


# ---- weight ---------------------------------------------------------------------------------------------------------


@gluon.jit
def _fetch_weight(descriptors, slots, channels, there, place, sequences):
    """The loader: both consumers' channels of a, then scaled gradients and b by pairs of j."""
    scaled, a, b = descriptors
    tile, group, first, last = place
    C: gl.constexpr = scaled.block_type.shape[1]
    PAIR: gl.constexpr = b.block_type.shape[1]
    mbarrier.expect(there, CONSUMERS * a.block_type.nbytes)
    for side in gl.static_range(CONSUMERS):
        at = [(group * CONSUMERS + side) * sequences, tile * ROWS]
        tma.async_copy_global_to_shared(a, at, there, channels.index(side))
    for pair in range(first, last):
        slot, full = _open(slots, pair - first)
        tma.async_copy_global_to_shared(b, [0, pair * PAIR], full, slots.b.index(slot))
        for part in gl.static_range(PAIRED):
            at = [tile * ROWS, (pair * PAIRED + part) * C]
            tma.async_copy_global_to_shared(scaled, at, full, slots.scaled.index(slot * PAIRED + part))


@gluon.jit
def _sum_weight(shared, SIDE: gl.constexpr):
    """A consumer: gradient of one channel's part of the weight. Of the products [(j, d), channels of z] with the
    scaled gradients of one j only the lines of that j are wanted.
    """
    partials, slots, channels, there, place = shared
    _, group, first, last = place
    C: gl.constexpr = slots.scaled.shape[2]
    CO: gl.constexpr = slots.b.shape[2] // PAIRED
    LAYOUT: gl.constexpr = product_layout(C)
    acc_0 = gl.zeros([ROWS, C], gl.float32, LAYOUT)
    acc_1 = gl.zeros([ROWS, C], gl.float32, LAYOUT)
    mbarrier.wait(there, 0)
    a = channels.index(SIDE)
    for step in range(last - first):
        slot = step % PAIR_STAGES
        mbarrier.wait(slots.full.index(slot), (step // PAIR_STAGES) & 1)
        outer = gl.zeros([ROWS, ROWS], gl.float32, product_layout(ROWS))
        outer = warpgroup_mma(slots.b.index(slot).permute((1, 0)), a, outer, use_acc=False)
        left = gl.convert_layout(outer.to(gl.bfloat16), operand_layout(C))
        acc_0 = warpgroup_mma(left, slots.scaled.index(slot * PAIRED), acc_0, is_async=True)
        acc_1 = warpgroup_mma(left, slots.scaled.index(slot * PAIRED + 1), acc_1, is_async=True)
        acc_0, acc_1 = warpgroup_mma_wait(0, deps=(acc_0, acc_1))
        _close(slots, step)
    line = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))[:, None]
    z = gl.arange(0, C, layout=gl.SliceLayout(0, LAYOUT))[None, :]
    partials += PAIRED * (gl.program_id(1).to(gl.int64) * gl.num_programs(2) + gl.program_id(2)) * (C * CO * CO)
    offsets = z * (CO * CO) + (group * CONSUMERS + SIDE) * CO + line
    gl.store(partials + offsets, acc_0, mask=(line < CO) & (z < C))
    gl.store(partials + C * CO * CO + offsets - CO, acc_1, mask=(line >= CO) & (z < C))


@program
@gluon.jit(do_not_specialize=["sequences", "pairs", "per_range"])
def hopper_outer_weight(scaled, a, b, partials, sequences, pairs, per_range):
    """Gradient of the weight -> partials [PAIRED * tiles of i * ranges, channels of z, CO * CO] fp32.

    Program (group of channels of a, tile of i, range of pairs of j). Descriptors of scaled gradients [I, J * C], in
    blocks of one j; a [CO * sequences, I]; b [sequences, J * CO], in blocks of PAIRED values of j.
    """
    wait_for_predecessors()
    slots = _new_slots(scaled, b, PAIR_STAGES, PAIRED)
    channels = tiles_for(a, CONSUMERS)
    there = one_arrival(1).index(0)
    publish()
    first = gl.program_id(2) * per_range
    place = (gl.program_id(1), gl.program_id(0), first, gl.minimum(first + per_range, pairs))
    shared = (partials, slots, channels, there, place)
    gl.warp_specialize(
        [
            (_sum_weight, (shared, 0)),
            (_sum_weight, (shared, 1)),
            (_fetch_weight, ((scaled, a, b), slots, channels, there, place, sequences)),
        ],
        [4, 4],
        [240, 24],
    )
