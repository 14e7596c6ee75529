"""Gradients of a triangle's projections for Hopper in Gluon; twins: the programs of ``ops.triangle`` and
``weight_gradient``.

That of z. All weights stay in shared memory, where each serves twice: for values and gates once more, and for the
gradient of the norm. A consumer has three tiles besides. The norm is written over that of z, which comes again for the
norm's backward and is written over with its gradient. That of the first operand's gradient takes what came through the
residual connection after it; that of the second one's the values whose columns are summed.

Those of the weights. A program has one operand, a consumer half of its channels. Values and gates come once more, as
[channels, rows], so that their gradients are left operands of the products with the norm.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false
# The type checker takes Gluon's programs for Python.

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from scalefold.kernels.hopper.gradients.norm import norm_gradient
from scalefold.kernels.hopper.pieces import CONSUMERS, group_barrier, initialised, publish, tiles_for
from scalefold.kernels.hopper.row_pieces import (
    COLUMNS,
    ROWS,
    fetch,
    leave,
    new_ring,
    normalised,
    one_arrival,
    operand_layout,
    product_layout,
    read,
    receive,
    row_offsets,
    send,
    sigmoid,
    view_offsets,
    wait_until_sent,
)
from scalefold.kernels.hopper.triangle import fetch_weights, gate_and_value

# ---- z --------------------------------------------------------------------------------------------------------------


@gluon.jit
def by_rows(tile, descriptor):
    """The memory of a tile [C, ROWS] as one that a descriptor of rows fills: [ROWS, C]."""
    return tile._reinterpret(gl.bfloat16, descriptor.block_type.shape, descriptor.layout)


@gluon.jit
def _fetch_operands(descriptors, rings, tile, side, n, USES: gl.constexpr):
    z, d_a, d_b, _ = descriptors
    fetch(rings[0], z, tile * ROWS, 0, side, n)
    fetch(rings[1], d_a, 0, tile * ROWS, side, n * USES)
    fetch(rings[2], d_b, 0, tile * ROWS, side, n)


@gluon.jit
def _fetch_through(through, ring, tile, side, n):
    """The loader: what came through, in the second use of its slot by a tile."""
    full = ring.full.index(side)
    mbarrier.wait(ring.empty.index(side), 0)
    mbarrier.expect(full, through.block_type.nbytes)
    tma.async_copy_global_to_shared(through, [tile * ROWS, 0], full, by_rows(ring.slots.index(side), through))


@gluon.jit
def _fetch(descriptors, weight_descriptors, rings, weights, there, tiles):
    """The loader: the weights, then for both consumers in turn all tiles of one of theirs."""
    USES: gl.constexpr = 1 if descriptors[3] is None else 2
    fetch_weights(weight_descriptors, weights, there)
    n = 0
    for tile in range(gl.program_id(0) * CONSUMERS, tiles, gl.num_programs(0) * CONSUMERS):
        _fetch_operands(descriptors, rings, tile, 0, n, USES)
        if tile + 1 < tiles:
            _fetch_operands(descriptors, rings, tile + 1, 1, n, USES)
        if descriptors[3] is not None:
            _fetch_through(descriptors[3], rings[1], tile, 0, n)
            if tile + 1 < tiles:
                _fetch_through(descriptors[3], rings[1], tile + 1, 1, n)
        n += 1  # noqa: SIM113


@gluon.jit
def _add_operand(acc, left, d_tile, keep, weights, biases, SIDE_OF: gl.constexpr):
    """acc + gradients of value and gate of one operand times their weights: [ROWS, C]."""
    C: gl.constexpr = weights.shape[1]
    value_weight, gate_weight = weights.index(2 * SIDE_OF), weights.index(2 * SIDE_OF + 1)
    own_biases = (biases[2 * SIDE_OF + 1], biases[2 * SIDE_OF])
    for first in gl.static_range(0, C, COLUMNS):
        gate, value = gate_and_value(left, left, gate_weight, value_weight, own_biases, first)
        d = read(d_tile.slice(first, COLUMNS, 0).permute((1, 0))) * keep[:, None] * gate
        d_gate = gl.convert_layout((d * value * (1.0 - gate)).to(gl.bfloat16), operand_layout(C))
        d_value = gl.convert_layout(d.to(gl.bfloat16), operand_layout(C))
        acc = warpgroup_mma(d_value, value_weight.slice(first, COLUMNS, 0), acc, is_async=True)
        acc = warpgroup_mma(d_gate, gate_weight.slice(first, COLUMNS, 0), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(acc,))
    return acc


@gluon.jit
def _differentiate(shared, SIDE: gl.constexpr):
    """A consumer."""
    mask, dims, norm, biases, descriptors, outs, partials, rings, weights, there, again, tiles = shared
    z, _, _, through = descriptors
    dz, normed_out = outs
    C: gl.constexpr = weights.shape[1]
    USES: gl.constexpr = 1 if through is None else 2
    mbarrier.wait(there, 0)
    n = 0
    for tile in range(gl.program_id(0) * CONSUMERS + SIDE, tiles, gl.num_programs(0) * CONSUMERS):
        keep = gl.load(mask.pointer + row_offsets(mask, tile, dims, product_layout(COLUMNS))).to(gl.float32)
        if n > 0:
            wait_until_sent(0)
            leave(rings[0], SIDE, n - 1)
        own = receive(rings[0], SIDE, n)
        value = normalised(read(own), norm)
        left = gl.convert_layout(value, operand_layout(COLUMNS))
        group_barrier()
        own.store(value)
        send(normed_out, tile * ROWS, 0, own)
        acc = gl.zeros([ROWS, C], gl.float32, product_layout(C))
        acc = _add_operand(acc, left, receive(rings[1], SIDE, n * USES), keep, weights, biases, 0)
        leave(rings[1], SIDE, n * USES)
        wait_until_sent(0)
        mbarrier.expect(again.index(SIDE), z.block_type.nbytes)
        tma.async_copy_global_to_shared(z, [tile * ROWS, 0], again.index(SIDE), own)
        spare = receive(rings[2], SIDE, n)
        acc = _add_operand(acc, left, spare, keep, weights, biases, 1)
        mbarrier.wait(again.index(SIDE), n & 1)
        gradient = norm_gradient(acc, read(own), norm, by_rows(spare, z), partials + tile.to(gl.int64) * (2 * C))
        leave(rings[2], SIDE, n)
        if through is not None:
            gradient += read(by_rows(receive(rings[1], SIDE, n * USES + 1), z))
            leave(rings[1], SIDE, n * USES + 1)
        group_barrier()
        own.store(gradient.to(gl.bfloat16))
        send(dz, tile * ROWS, 0, own)
        n += 1  # noqa: SIM113
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["tiles"])
def hopper_project_gradient(
    z, d_a, d_b, through, weight_a, weight_a_gate, weight_b, weight_b_gate, dz, normed, norm, biases, mask, dims,
    partials, tiles,
):  # fmt: skip
    """Descriptors of z, through (or None), dz and normed [64 tiles, C], d_a and d_b [C, 64 tiles], weights [C, C].

    biases in the weights' order; partials: [tiles, 2 C] fp32, sums for the norm's weight and bias.
    """
    rings = (new_ring(z, 1), new_ring(d_a, 1), new_ring(d_b, 1))
    weights = tiles_for(weight_a, 4)
    there = one_arrival(1).index(0)
    again = one_arrival(CONSUMERS)
    publish()
    weight_descriptors = (weight_a, weight_a_gate, weight_b, weight_b_gate)  # a launch takes no tuple of these
    descriptors = (z, d_a, d_b, through)
    shared = (mask, dims, norm, biases, descriptors, (dz, normed), partials, rings, weights, there, again, tiles)
    gl.warp_specialize(
        [
            (_differentiate, (shared, 0)),
            (_differentiate, (shared, 1)),
            (_fetch, (descriptors, weight_descriptors, rings, weights, there, tiles)),
        ],
        [4, 4],
        [240, 24],
    )


# ---- weights --------------------------------------------------------------------------------------------------------

STAGES = gl.constexpr(4)  # tiles of rows on their way


class Slots(NamedTuple):
    """Slots for tiles of the norm [ROWS, C] and of a gradient, of an operand [C, ROWS], which all consumers read."""

    normed: Any
    d: Any
    full: Any
    empty: Any


@gluon.jit
def new_slots(normed, d):
    """For tiles that these descriptors fetch; ``publish`` follows."""
    return Slots(tiles_for(normed, STAGES), tiles_for(d, STAGES), one_arrival(STAGES), initialised(STAGES, CONSUMERS))


@gluon.jit
def _fetch_weighted(normed, d, value_weight, gate_weight, slots, weights, there, place):
    """The loader: an operand's two weights, then the norm and the operand's gradient along the rows."""
    mbarrier.expect(there, 2 * value_weight.block_type.nbytes)
    tma.async_copy_global_to_shared(value_weight, [0, 0], there, weights.index(0))
    tma.async_copy_global_to_shared(gate_weight, [0, 0], there, weights.index(1))
    fetch_slots(normed, d, slots, place, True)


@gluon.jit
def fetch_slots(normed, d, slots, place, CHANNELS_FIRST: gl.constexpr):
    """The loader: tiles of the norm and of d for a range of tiles."""
    first, last = place
    for tile in range(first, last):
        step = tile - first
        slot = step % STAGES
        full = slots.full.index(slot)
        mbarrier.wait(slots.empty.index(slot), ((step // STAGES) & 1) ^ 1)
        mbarrier.expect(full, normed.block_type.nbytes + d.block_type.nbytes)
        tma.async_copy_global_to_shared(normed, [tile * ROWS, 0], full, slots.normed.index(slot))
        if CHANNELS_FIRST:
            tma.async_copy_global_to_shared(d, [0, tile * ROWS], full, slots.d.index(slot))
        else:
            tma.async_copy_global_to_shared(d, [tile * ROWS, 0], full, slots.d.index(slot))


@gluon.jit
def _fetch_operand(normed, ds, weight_descriptors, slots, weights, there, place):
    if gl.program_id(0) == 0:
        _fetch_weighted(normed, ds[0], weight_descriptors[0], weight_descriptors[1], slots, weights, there, place)
    else:
        _fetch_weighted(normed, ds[1], weight_descriptors[2], weight_descriptors[3], slots, weights, there, place)


@gluon.jit
def _value_and_gate(x, weights, biases, SIDE: gl.constexpr):
    """Values and sigmoid(gate) of a consumer's channels for a tile of the norm: [ROWS channels, ROWS] each."""
    LAYOUT: gl.constexpr = product_layout(ROWS)
    values = gl.zeros([ROWS, ROWS], gl.float32, LAYOUT)
    logits = gl.zeros([ROWS, ROWS], gl.float32, LAYOUT)
    value_block = weights.index(0).slice(SIDE * ROWS, ROWS, 0)
    gate_block = weights.index(1).slice(SIDE * ROWS, ROWS, 0)
    logits = warpgroup_mma(gate_block, x.permute((1, 0)), logits, use_acc=False, is_async=True)
    values = warpgroup_mma(value_block, x.permute((1, 0)), values, use_acc=False, is_async=True)
    logits, values = warpgroup_mma_wait(0, deps=(logits, values))
    return values + biases[0][:, None], sigmoid(logits + biases[1][:, None])


@gluon.jit
def _bias(biases, line):
    """Biases of values and gates of the program's operand for some channels."""
    if gl.program_id(0) == 0:
        value, gate = gl.load(biases[0] + line), gl.load(biases[1] + line)
    else:
        value, gate = gl.load(biases[2] + line), gl.load(biases[3] + line)
    return value.to(gl.float32), gate.to(gl.float32)


@gluon.jit
def _sum_weights(shared, SIDE: gl.constexpr):
    """A consumer: gradients of the weights of ROWS channels, [ROWS, C] for value and gate, and of their biases."""
    mask, dims, biases, partials, slots, weights, there, place = shared
    first, last = place
    C: gl.constexpr = weights.shape[2]
    LAYOUT: gl.constexpr = product_layout(ROWS)
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(0, LAYOUT))
    own_biases = _bias(biases, SIDE * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT)))
    acc_value = gl.zeros([ROWS, C], gl.float32, product_layout(C))
    acc_gate = gl.zeros([ROWS, C], gl.float32, product_layout(C))
    sum_value = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, LAYOUT))
    sum_gate = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, LAYOUT))
    mbarrier.wait(there, 0)
    for step in range(last - first):
        slot = step % STAGES
        keep = gl.load(mask.pointer + view_offsets(mask, (first + step) * ROWS + rows, dims)).to(gl.float32)
        mbarrier.wait(slots.full.index(slot), (step // STAGES) & 1)
        x = slots.normed.index(slot)
        value, gate = _value_and_gate(x, weights, own_biases, SIDE)
        d = read(slots.d.index(slot).slice(SIDE * ROWS, ROWS, 0)) * keep[None, :] * gate
        d_gate = d * value * (1.0 - gate)
        sum_value += gl.sum(d, 1)
        sum_gate += gl.sum(d_gate, 1)
        left_value = gl.convert_layout(d.to(gl.bfloat16), operand_layout(C))
        left_gate = gl.convert_layout(d_gate.to(gl.bfloat16), operand_layout(C))
        acc_value = warpgroup_mma(left_value, x, acc_value, is_async=True)
        acc_gate = warpgroup_mma(left_gate, x, acc_gate, is_async=True)
        acc_value, acc_gate = warpgroup_mma_wait(0, deps=(acc_value, acc_gate))
        group_barrier()
        mbarrier.arrive(slots.empty.index(slot), count=1)
    partials += gl.program_id(1).to(gl.int64) * (4 * C * (C + 1))
    operand = gl.program_id(0) * 2 * C  # first line of it
    line = SIDE * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, product_layout(C)))[:, None]
    column = gl.arange(0, C, layout=gl.SliceLayout(0, product_layout(C)))[None, :]
    gl.store(partials + (operand + line) * C + column, acc_value)
    gl.store(partials + (operand + C + line) * C + column, acc_gate)
    sums = partials + 4 * C * C + operand + SIDE * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    gl.store(sums, sum_value)
    gl.store(sums + C, sum_gate)


@gluon.jit(do_not_specialize=["tiles", "per_range"])
def hopper_project_weights(
    normed, d_a, d_b, weight_a, weight_a_gate, weight_b, weight_b_gate, biases, mask, dims, partials, tiles, per_range
):  # fmt: skip
    """Program (operand, range of tiles of rows) -> partials[range]: gradients of the four weights [4 C, C] and biases
    [4 C] fp32. Descriptors of the norm [64 tiles, C], d_a and d_b [C, 64 tiles], weights [C, C].
    """
    slots = new_slots(normed, d_a)
    weights = tiles_for(weight_a, 2)
    there = one_arrival(1).index(0)
    publish()
    first = gl.program_id(1) * per_range
    place = (first, gl.minimum(first + per_range, tiles))
    weight_descriptors = (weight_a, weight_a_gate, weight_b, weight_b_gate)  # a launch takes no tuple of these
    shared = (mask, dims, biases, partials, slots, weights, there, place)
    gl.warp_specialize(
        [
            (_sum_weights, (shared, 0)),
            (_sum_weights, (shared, 1)),
            (_fetch_operand, (normed, (d_a, d_b), weight_descriptors, slots, weights, there, place)),
        ],
        [4, 4],
        [240, 24],
    )
