"""Gradient of a triangle's projections for Hopper in Gluon; twin: ``ops.triangle._project_backward_kernel``.

All weights stay in shared memory, where each serves twice: for values and gates once more, and for the gradient of the
norm. A consumer has three tiles besides. The norm is written over that of z, which comes again for the norm's backward
and is written over with its gradient. That of the first operand's gradient takes what came through the residual
connection after it; that of the second one's the values whose columns are summed.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false
# The type checker takes Gluon's programs for Python.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from scalefold.kernels.hopper.pieces import CONSUMERS, group_barrier, publish, tiles_for
from scalefold.kernels.hopper.row_pieces import (
    COLUMNS,
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
    row_offsets,
    send,
    standardised,
    wait_until_sent,
)
from scalefold.kernels.hopper.transition import column_sums, store_sums
from scalefold.kernels.hopper.triangle import fetch_weights, gate_and_value


@gluon.jit
def _by_rows(tile, descriptor):
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
    tma.async_copy_global_to_shared(through, [tile * ROWS, 0], full, _by_rows(ring.slots.index(side), through))


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
def _sum_columns(value, tile, pointer):
    """Sums over the rows of value: [ROWS, C], in bf16 by way of a tile that nobody reads, to pointer[0:C]."""
    C: gl.constexpr = value.shape[1]
    group_barrier()
    tile.store(value.to(gl.bfloat16))
    fence_async_shared()
    group_barrier()
    for first in gl.static_range(0, C, COLUMNS):
        total = column_sums(tile, first)
        store_sums(pointer + first, warpgroup_mma_wait(0, deps=(total,)))


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
        hat, rstd = standardised(read(own))
        sums = partials + tile.to(gl.int64) * (2 * C)
        _sum_columns(acc * hat, _by_rows(spare, z), sums)
        _sum_columns(acc, _by_rows(spare, z), sums + C)
        leave(rings[2], SIDE, n)
        acc *= per_column(norm.weight, 0, C)
        along = (gl.sum(acc * hat, 1) * (1.0 / C))[:, None]
        gradient = (acc - (gl.sum(acc, 1) * (1.0 / C))[:, None] - hat * along) * rstd[:, None]
        if through is not None:
            gradient += read(_by_rows(receive(rings[1], SIDE, n * USES + 1), z))
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
