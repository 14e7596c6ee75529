"""Triangle multiplication for Hopper in Gluon: operands, output, gates of its gradient; twins: ``ops.triangle``.

All weights stay in shared memory.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false
# The type checker takes Gluon's programs for Python.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from scalefold.kernels.hopper.pieces import CONSUMERS, group_barrier, publish, tiles_for
from scalefold.kernels.hopper.row_pieces import (
    COLUMNS,
    ROWS,
    fetch,
    fetch_rows,
    leave,
    new_ring,
    normed,
    one_arrival,
    per_column,
    product_layout,
    read,
    receive,
    row_offsets,
    send,
    sigmoid,
    wait_until_sent,
)

OPERAND_STAGES = gl.constexpr(1)  # tiles of z per consumer
STAGED = gl.constexpr(2)  # blocks of operands per consumer on their way to memory
OUTPUT_STAGES = gl.constexpr(2)  # tiles of z per consumer, at least 2: one is held until the next tile is there


@gluon.jit
def _fetch_weights(descriptors, weights, there):
    """Loader: the whole weights, once."""
    COUNT: gl.constexpr = weights.shape[0]
    mbarrier.expect(there, COUNT * descriptors[0].block_type.nbytes)
    for i in gl.static_range(COUNT):
        tma.async_copy_global_to_shared(descriptors[i], [0, 0], there, weights.index(i))


@gluon.jit
def _gate_and_value(left_gate, left_value, gate, value, biases, first: gl.constexpr):
    """sigmoid(gate) and value for output channels from ``first`` on, by weights gate and value: [ROWS, COLUMNS] each.

    biases: of gate and value.
    """
    logits = gl.zeros([ROWS, COLUMNS], gl.float32, product_layout(COLUMNS))
    values = gl.zeros([ROWS, COLUMNS], gl.float32, product_layout(COLUMNS))
    gate_block = gate.slice(first, COLUMNS, 0).permute((1, 0))
    value_block = value.slice(first, COLUMNS, 0).permute((1, 0))
    logits = warpgroup_mma(left_gate, gate_block, logits, use_acc=False, is_async=True)
    values = warpgroup_mma(left_value, value_block, values, use_acc=False, is_async=True)
    logits, values = warpgroup_mma_wait(0, deps=(logits, values))
    return sigmoid(logits + per_column(biases[0], first, COLUMNS)), values + per_column(biases[1], first, COLUMNS)


# ---- operands -------------------------------------------------------------------------------------------------------


@gluon.jit
def _fetch_pairs(z, weight_descriptors, ring, weights, there, tiles):
    _fetch_weights(weight_descriptors, weights, there)
    fetch_rows(ring, z, tiles)


@gluon.jit
def _project(shared, SIDE: gl.constexpr):
    """A consumer: sigmoid(gate) * value * mask of both operands, turned on their way through shared memory."""
    mask, dims, norm, biases, outs, ring, weights, staged, there, tiles = shared
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
                gate, value = _gate_and_value(left, left, gate_weight, value_weight, own_biases, first)
                own = staged.index(SIDE * STAGED + (operand * C + first) // COLUMNS % STAGED)
                wait_until_sent(STAGED - 1)
                own.permute((1, 0)).store((gate * value * keep[:, None]).to(gl.bfloat16))
                send(outs[operand], first, tile * ROWS, own)
        n += 1  # noqa: SIM113
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["tiles"])
def hopper_operands(
    z, weight_a, weight_a_gate, weight_b, weight_b_gate, out_a, out_b, norm, biases, mask, dims, tiles
):  # fmt: skip
    """Descriptors of z [64 tiles, C], weights [C, C] and operands a, b [C, 64 tiles]; biases in the weights' order."""
    ring = new_ring(z, OPERAND_STAGES)
    weights = tiles_for(weight_a, 4)
    staged = tiles_for(out_a, CONSUMERS * STAGED)
    there = one_arrival(1).index(0)
    publish()
    weight_descriptors = (weight_a, weight_a_gate, weight_b, weight_b_gate)  # a launch takes no tuple of these
    shared = (mask, dims, norm, biases, (out_a, out_b), ring, weights, staged, there, tiles)
    gl.warp_specialize(
        [
            (_project, (shared, 0)),
            (_project, (shared, 1)),
            (_fetch_pairs, (z, weight_descriptors, ring, weights, there, tiles)),
        ],
        [4, 4],
        [240, 24],
    )


# ---- output and the gates of its gradient ---------------------------------------------------------------------------


@gluon.jit
def _fetch_tiles(descriptors, rings, tile, side, n):
    z, x, d_out = descriptors
    z_ring, x_ring, d_ring = rings
    fetch(z_ring, z, tile * ROWS, 0, side, n)
    fetch(x_ring, x, 0, tile * ROWS, side, n)
    if d_out is not None:
        fetch(d_ring, d_out, tile * ROWS, 0, side, n)


@gluon.jit
def _fetch_outputs(descriptors, weight_descriptors, rings, weights, there, tiles):
    _fetch_weights(weight_descriptors, weights, there)
    n = 0
    for tile in range(gl.program_id(0) * CONSUMERS, tiles, gl.num_programs(0) * CONSUMERS):
        _fetch_tiles(descriptors, rings, tile, 0, n)
        if tile + 1 < tiles:
            _fetch_tiles(descriptors, rings, tile + 1, 1, n)
        n += 1  # noqa: SIM113


@gluon.jit
def _output(shared, SIDE: gl.constexpr, BACKWARD: gl.constexpr):
    """A consumer. z is written over with z + dropout * sigmoid(gate) * value; BACKWARD: z and d_out with the gradients
    of value and gate. Their slots go back to the loader when these have been sent, during the next tile.
    """
    norms, biases, dropout, dims, out, rings, weights, there, tiles = shared
    z_ring, x_ring, d_ring = rings
    C: gl.constexpr = weights.shape[1]
    mbarrier.wait(there, 0)
    n = 0
    for tile in range(gl.program_id(0) * CONSUMERS + SIDE, tiles, gl.num_programs(0) * CONSUMERS):
        z_tile = receive(z_ring, SIDE, n)
        left_z = normed(read(z_tile), norms[0])
        if n > 0:
            wait_until_sent(0)
            leave(z_ring, SIDE, n - 1)
            if BACKWARD:
                leave(d_ring, SIDE, n - 1)
        x = read(receive(x_ring, SIDE, n).permute((1, 0)))
        leave(x_ring, SIDE, n)
        left_x = normed(x, norms[1])
        if BACKWARD:
            d_tile = receive(d_ring, SIDE, n)
        else:
            d_tile = z_tile
        for first in gl.static_range(0, C, COLUMNS):
            scale = 1.0
            if dropout is not None:
                scale = _load_dropout(dropout, tile, first, dims)
            gate, value = _gate_and_value(left_z, left_x, weights.index(1), weights.index(0), biases, first)
            z_part, d_part = z_tile.slice(first, COLUMNS, 1), d_tile.slice(first, COLUMNS, 1)
            before = read(d_part)
            group_barrier()
            if BACKWARD:
                d = before * gate * scale
                z_part.store(d.to(gl.bfloat16))
                d_part.store((d * value * (1.0 - gate)).to(gl.bfloat16))
            else:
                z_part.store((before + gate * value * scale).to(gl.bfloat16))
        send(out, tile * ROWS, 0, z_tile)
        if BACKWARD:
            tma.async_copy_shared_to_global(out, [tile * ROWS, C], d_tile)
        n += 1  # noqa: SIM113
    tma.store_wait(0)


@gluon.jit
def _load_dropout(dropout, tile, first, dims):
    """The scales of a tile from column ``first`` on: [ROWS, COLUMNS]."""
    LAYOUT: gl.constexpr = product_layout(COLUMNS)
    columns = first + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, LAYOUT))
    return gl.load(dropout.pointer + row_offsets(dropout, tile, dims, LAYOUT)[:, None] + columns[None, :])


@gluon.jit(do_not_specialize=["tiles"])
def hopper_output(z, x, d_out, weight_value, weight_gate, out, norms, biases, dropout, dims, tiles):
    """Descriptors of z [64 tiles, C], x [C, 64 tiles], weights [C, C] and out [64 tiles, C]; with d_out [64 tiles, C]
    instead of None, out is the gradients of value and gate logits [64 tiles, 2 C].

    norms: of z and x; biases: of gate and value; dropout: a view [64 tiles, C] of fp32 scales, or None.
    """
    BACKWARD: gl.constexpr = d_out is not None
    z_ring = new_ring(z, OUTPUT_STAGES)
    if BACKWARD:  # no room for a second tile of x
        x_ring, d_ring = new_ring(x, 1), new_ring(d_out, OUTPUT_STAGES)
    else:
        x_ring, d_ring = new_ring(x, OUTPUT_STAGES), z_ring
    weights = tiles_for(weight_value, 2)
    there = one_arrival(1).index(0)
    publish()
    rings = (z_ring, x_ring, d_ring)
    shared = (norms, biases, dropout, dims, out, rings, weights, there, tiles)
    gl.warp_specialize(
        [
            (_output, (shared, 0, BACKWARD)),
            (_output, (shared, 1, BACKWARD)),
            (_fetch_outputs, ((z, x, d_out), (weight_value, weight_gate), rings, weights, there, tiles)),
        ],
        [4, 4],
        [240, 24],
    )
