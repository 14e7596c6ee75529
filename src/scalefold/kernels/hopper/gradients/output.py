"""Gradient of a triangle's output for Hopper in Gluon; twins: that of ``ops.triangle`` and two input gradients.

Both weights stay in shared memory, where each serves twice. A consumer has five tiles besides. The norms of z and x
are written over theirs, from where products read them; z and x come again for the norms' backward and are written over
with their gradients. The gradients of value and gate, which those of the weights want, have the last two.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false
# The type checker takes Gluon's programs for Python.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
)

from scalefold.kernels.hopper.gradients.norm import norm_gradient, sum_tile
from scalefold.kernels.hopper.gradients.triangle import by_rows
from scalefold.kernels.hopper.pieces import CONSUMERS, group_barrier, publish, tiles_for
from scalefold.kernels.hopper.row_pieces import (
    COLUMNS,
    ROWS,
    fetch,
    leave,
    new_ring,
    normalised,
    one_arrival,
    product_layout,
    read,
    receive,
    send,
    wait_until_sent,
)
from scalefold.kernels.hopper.triangle import fetch_weights, gate_and_value, load_dropout


@gluon.jit
def _fetch_tiles(descriptors, rings, tile, side, n):
    fetch(rings[0], descriptors[0], tile * ROWS, 0, side, n)
    fetch(rings[1], descriptors[1], 0, tile * ROWS, side, n)
    fetch(rings[2], descriptors[2], tile * ROWS, 0, side, n)


@gluon.jit
def _fetch(descriptors, weight_descriptors, rings, weights, there, tiles):
    """The loader: the weights, then z, x and the gradient of the output for both consumers in turn."""
    fetch_weights(weight_descriptors, weights, there)
    n = 0
    for tile in range(gl.program_id(0) * CONSUMERS, tiles, gl.num_programs(0) * CONSUMERS):
        _fetch_tiles(descriptors, rings, tile, 0, n)
        if tile + 1 < tiles:
            _fetch_tiles(descriptors, rings, tile + 1, 1, n)
        n += 1  # noqa: SIM113


@gluon.jit
def _write_norms(z_tile, x_tile, norms, z, normed_z, normed_x, tile):
    """The norms of z and x over their tiles, and to memory; that of x as rows, whose tile is returned."""
    value = normalised(read(z_tile), norms[0])
    group_barrier()
    z_tile.store(value)
    value = normalised(read(x_tile.permute((1, 0))), norms[1])
    rows = by_rows(x_tile, z)
    group_barrier()
    rows.store(value)
    send(normed_z, tile * ROWS, 0, z_tile)
    tma.async_copy_shared_to_global(normed_x, [tile * ROWS, 0], rows)
    return rows


@gluon.jit
def _write_gates(normed_z, normed_x, d_tile, weights, biases, dropout, dims, tile, outs):
    """Gradients of value and gate to the tiles ``outs``."""
    C: gl.constexpr = weights.shape[1]
    for first in gl.static_range(0, C, COLUMNS):
        gate, value = gate_and_value(normed_z, normed_x, weights.index(1), weights.index(0), biases, first)
        d = read(d_tile.slice(first, COLUMNS, 1)) * gate
        if dropout is not None:
            d *= load_dropout(dropout, tile, first, dims)
        outs[0].slice(first, COLUMNS, 1).store(d.to(gl.bfloat16))
        outs[1].slice(first, COLUMNS, 1).store((d * value * (1.0 - gate)).to(gl.bfloat16))


@gluon.jit
def _norm_gradient(d_projected, weight, x, norm, spare, sums):
    """Gradient of a tile x for that of its projection by ``weight``; see ``norm_gradient``."""
    C: gl.constexpr = weight.shape[1]
    acc = gl.zeros([ROWS, C], gl.float32, product_layout(C))
    acc = warpgroup_mma(d_projected, weight, acc, use_acc=False)
    return norm_gradient(acc, x, norm, spare, sums)


@gluon.jit
def _differentiate(shared, SIDE: gl.constexpr):
    """A consumer."""
    norms, biases, dropout, dims, descriptors, outs, sums, rings, weights, staged, there, again, tiles = shared
    z, x, _ = descriptors
    projected, dz, dx, normed_z, normed_x = outs
    C: gl.constexpr = weights.shape[1]
    d_projected = (staged.index(2 * SIDE), staged.index(2 * SIDE + 1))
    mbarrier.wait(there, 0)
    n = 0
    for tile in range(gl.program_id(0) * CONSUMERS + SIDE, tiles, gl.num_programs(0) * CONSUMERS):
        if n > 0:
            wait_until_sent(0)
            leave(rings[0], SIDE, n - 1)
            leave(rings[1], SIDE, n - 1)
        z_tile, x_tile = receive(rings[0], SIDE, n), receive(rings[1], SIDE, n)
        rows = _write_norms(z_tile, x_tile, norms, z, normed_z, normed_x, tile)
        d_tile = receive(rings[2], SIDE, n)
        _write_gates(z_tile, rows, d_tile, weights, biases, dropout, dims, tile, d_projected)
        send(projected, tile * ROWS, 0, d_projected[0])
        tma.async_copy_shared_to_global(projected, [tile * ROWS, C], d_projected[1])
        own = tile.to(gl.int64) * (3 * C)
        sum_tile(d_projected[1], sums[0] + own + 2 * C)
        sum_tile(d_projected[0], sums[1] + own + 2 * C)
        wait_until_sent(0)
        mbarrier.expect(again.index(SIDE), z.block_type.nbytes + x.block_type.nbytes)
        tma.async_copy_global_to_shared(z, [tile * ROWS, 0], again.index(SIDE), z_tile)
        tma.async_copy_global_to_shared(x, [0, tile * ROWS], again.index(SIDE), x_tile)
        mbarrier.wait(again.index(SIDE), n & 1)
        before = read(z_tile)
        gradient = _norm_gradient(d_projected[1], weights.index(1), before, norms[0], z_tile, sums[0] + own)
        gradient += read(d_tile)
        leave(rings[2], SIDE, n)
        group_barrier()
        z_tile.store(gradient.to(gl.bfloat16))
        send(dz, tile * ROWS, 0, z_tile)
        before = read(x_tile.permute((1, 0)))
        gradient = _norm_gradient(d_projected[0], weights.index(0), before, norms[1], rows, sums[1] + own)
        group_barrier()
        x_tile.permute((1, 0)).store(gradient.to(gl.bfloat16))
        send(dx, 0, tile * ROWS, x_tile)
        n += 1  # noqa: SIM113
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["tiles"])
def hopper_output_gradient(
    z, x, d_out, weight_value, weight_gate, projected, dz, dx, normed_z, normed_x, norms, biases, dropout, dims, sums,
    tiles,
):  # fmt: skip
    """Descriptors of z, d_out, dz and both norms [64 tiles, C], x and dx [C, 64 tiles], weights [C, C], and projected,
    the gradients of value and gate [64 tiles, 2 C].

    norms: of z and x; biases: of gate and value; dropout: a view [64 tiles, C] of fp32 scales, or None; sums: for z and
    for x, [tiles, 3 C] fp32 each, for the norm's weight and bias and the bias of the gate or value.
    """
    rings = (new_ring(z, 1), new_ring(x, 1), new_ring(d_out, 1))
    weights = tiles_for(weight_value, 2)
    staged = tiles_for(projected, 2 * CONSUMERS)
    there = one_arrival(1).index(0)
    again = one_arrival(CONSUMERS)
    publish()
    descriptors = (z, x, d_out)
    outs = (projected, dz, dx, normed_z, normed_x)
    shared = (norms, biases, dropout, dims, descriptors, outs, sums, rings, weights, staged, there, again, tiles)
    gl.warp_specialize(
        [
            (_differentiate, (shared, 0)),
            (_differentiate, (shared, 1)),
            (_fetch, (descriptors, (weight_value, weight_gate), rings, weights, there, tiles)),
        ],
        [4, 4],
        [240, 24],
    )
