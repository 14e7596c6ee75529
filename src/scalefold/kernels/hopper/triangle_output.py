"""Output of triangle multiplication and the gates of its gradient for Hopper in Gluon; twin: ``ops.triangle``.

Weights and the vectors of norms and linears stay in shared memory, and so do dropout's scales if all i share them.
There is room for the scales of ROWS values of j: a program stays with these, and its tiles lie ``period`` apart;
without such scales the period is 1. The first tiles come before all this, so that their norms are taken meanwhile.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false
# The type checker takes Gluon's programs for Python.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma_wait

from scalefold.kernels.hopper.pieces import CONSUMERS, group_barrier, publish, tiles_for
from scalefold.kernels.hopper.row_pieces import (
    COLUMNS,
    ROWS,
    fetch,
    fetch_weights,
    leave,
    new_ring,
    one_arrival,
    operand_layout,
    product_layout,
    receive,
    row_offsets,
    send,
    sigmoid,
    standardised,
    start_product,
    to_fp32,
    wait_until_sent,
)
from scalefold.kernels.instructions import program, wait_for_predecessors

Z_STAGES = gl.constexpr(2)  # tiles of z per consumer, at least 2: one is held until the next tile is there
WEIGHTS, SCALES, VECTORS = gl.constexpr(0), gl.constexpr(1), gl.constexpr(2)  # barriers of what comes once
NORMS = gl.constexpr(4)  # vectors of both norms
EVERY_VECTOR = gl.constexpr(6)  # with the biases of gate and value


@gluon.jit
def walk(program, programs, side, tiles, period):
    """A consumer's first tile, how far apart its tiles are and how many it has.

    The numbers of programs and tiles are multiples of ``period``, and the first consumer of a program has a tile.
    """
    first = (program // period * CONSUMERS + side) * period + program % period
    step = programs * CONSUMERS
    return first, step, (tiles - first + step - 1) // step


@gluon.jit
def _fetch_tiles(loaded, rings, held, there, tiles, period):
    """The loader."""
    descriptors, weight_descriptors, scale_descriptor, sources = loaded
    weights, scales, vectors = held
    z, x, d_out = descriptors
    z_ring, x_ring, d_ring = rings
    first, step, count = walk(gl.program_id(0), gl.num_programs(0), 0, tiles, period)
    for n in range(count):
        for side in gl.static_range(CONSUMERS):
            own = first + n * step + side * period
            if own < tiles:
                fetch(z_ring, z, own * ROWS, 0, side, n)
                fetch(x_ring, x, 0, own * ROWS, side, n)
        if n == 0:
            fetch_weights(weight_descriptors, weights, there.index(WEIGHTS))
            if scale_descriptor is not None:
                mbarrier.expect(there.index(SCALES), scale_descriptor.block_type.nbytes)
                at = [gl.program_id(0) % period * ROWS, 0]
                tma.async_copy_global_to_shared(scale_descriptor, at, there.index(SCALES), scales)
        if d_out is not None:
            for side in gl.static_range(CONSUMERS):
                own = first + n * step + side * period
                if own < tiles:
                    fetch(d_ring, d_out, own * ROWS, 0, side, n)
        if n == 0:
            _fill(vectors, sources, there.index(VECTORS))


@gluon.jit
def _fill(vectors, sources, there):
    """Vectors in fp32, converted once instead of with every tile."""
    COUNT: gl.constexpr = vectors.shape[0]
    columns = gl.arange(0, vectors.shape[1], layout=gl.BlockedLayout([1], [32], [4], [0]))
    for i in gl.static_range(COUNT):
        vectors.index(i).store(gl.load(sources[i] + columns).to(gl.float32))
    group_barrier()
    mbarrier.arrive(there, count=1)


@gluon.jit
def _read(tile):
    """``row_pieces.read`` in one instruction per value."""
    return to_fp32(tile.load(product_layout(tile.shape[1])))


@gluon.jit
def _spread(vector):
    """A vector in shared memory, one value per column of a product."""
    return vector.load(gl.SliceLayout(0, product_layout(vector.shape[0])))[None, :]


@gluon.jit
def _normed(x, vectors, which: gl.constexpr):
    """``row_pieces.normed`` by vectors in shared memory."""
    hat, _ = standardised(x)
    result = hat * _spread(vectors.index(2 * which)) + _spread(vectors.index(2 * which + 1))
    return gl.convert_layout(result.to(gl.bfloat16), operand_layout(COLUMNS))


@gluon.jit
def _bias(vectors, biases, which: gl.constexpr, first: gl.constexpr):
    """Of COLUMNS channels from ``first`` on."""
    if vectors.shape[0] == EVERY_VECTOR:
        return _spread(vectors.index(NORMS + which).slice(first, COLUMNS, 0))
    else:  # noqa: RET505  (the compiler looks at what follows an untaken return)
        columns = first + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, product_layout(COLUMNS)))
        return to_fp32(gl.load(biases[which] + columns))[None, :]


@gluon.jit
def _load_dropout(dropout, tile, first, dims):
    """The scales of a tile from column ``first`` on: [ROWS, COLUMNS]."""
    LAYOUT: gl.constexpr = product_layout(COLUMNS)
    columns = first + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, LAYOUT))
    return gl.load(dropout.pointer + row_offsets(dropout, tile, dims, LAYOUT)[:, None] + columns[None, :])


@gluon.jit
def _update(shared, SIDE: gl.constexpr, BACKWARD: gl.constexpr):
    """A consumer. z is written over with z + dropout * sigmoid(gate) * value; BACKWARD: z and d_out with the gradients
    of value and gate. Their slots go back to the loader when these have been sent, during the next tile.

    The products of the gates run while x is read and its norm taken.
    """
    biases, dropout, dims, out, rings, held, there, tiles, period = shared
    weights, scales, vectors = held
    z_ring, x_ring, d_ring = rings
    C: gl.constexpr = weights.shape[1]
    gl.static_assert(C == 2 * COLUMNS, "gates are products of two blocks")
    mbarrier.wait(there.index(VECTORS), 0)
    begin, step, count = walk(gl.program_id(0), gl.num_programs(0), SIDE, tiles, period)
    for n in range(count):
        tile = begin + n * step
        z_tile = receive(z_ring, SIDE, n)
        left_z = _normed(_read(z_tile), vectors, 0)
        if n == 0:
            mbarrier.wait(there.index(WEIGHTS), 0)
        logits = start_product(left_z, weights.index(1), 0)
        next_logits = start_product(left_z, weights.index(1), COLUMNS)
        if n > 0:
            wait_until_sent(0)
            leave(z_ring, SIDE, n - 1)
            if BACKWARD:
                leave(d_ring, SIDE, n - 1)
        x = _read(receive(x_ring, SIDE, n).permute((1, 0)))
        leave(x_ring, SIDE, n)
        left_x = _normed(x, vectors, 1)
        if scales is not None and n == 0:
            mbarrier.wait(there.index(SCALES), 0)
        if BACKWARD:
            d_tile = receive(d_ring, SIDE, n)
        else:
            d_tile = z_tile
        for first in gl.static_range(0, C, COLUMNS):
            scale = 1.0
            if scales is not None:
                scale = scales.slice(first, COLUMNS, 1).load(product_layout(COLUMNS))
            elif dropout is not None:
                scale = _load_dropout(dropout, tile, first, dims)
            values = start_product(left_x, weights.index(0), first)
            if first == 0:
                logits, next_logits, values = warpgroup_mma_wait(0, deps=(logits, next_logits, values))
            else:
                logits = next_logits
                values = warpgroup_mma_wait(0, deps=(values,))
            gate = sigmoid(logits + _bias(vectors, biases, 0, first))
            value = values + _bias(vectors, biases, 1, first)
            z_part, d_part = z_tile.slice(first, COLUMNS, 1), d_tile.slice(first, COLUMNS, 1)
            before = _read(d_part)
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
    tma.store_wait(0)


@program
@gluon.jit(do_not_specialize=["tiles", "period"])
def hopper_output(
    z, x, d_out, weight_value, weight_gate, scales, out, norms, biases, dropout, dims, tiles, period
):  # fmt: skip
    """Descriptors of z [64 tiles, C], x [C, 64 tiles], weights [C, C] and out [64 tiles, C]; with d_out [64 tiles, C]
    instead of None, out is the gradients of value and gate logits [64 tiles, 2 C].

    norms: of z and x; biases: of gate and value. Dropout's scales in fp32: scales, a descriptor of [64 period, C] that
    all i share, or dropout, a view [64 tiles, C], or both None. Every program has a tile: none may end while the copy
    engine still brings it something.
    """
    wait_for_predecessors()
    BACKWARD: gl.constexpr = d_out is not None
    SHARED: gl.constexpr = scales is not None
    SLOTS: gl.constexpr = 1 if SHARED else 2  # for x, BACKWARD for d_out, per consumer: scales take the others' room
    VECTORS_HELD: gl.constexpr = NORMS if BACKWARD else EVERY_VECTOR
    C: gl.constexpr = weight_value.block_type.shape[0]
    z_ring = new_ring(z, Z_STAGES)
    if BACKWARD:  # no room for a second tile of x, nor for the biases
        x_ring, d_ring = new_ring(x, 1), new_ring(d_out, SLOTS)
    else:
        x_ring, d_ring = new_ring(x, SLOTS), z_ring
    weights = tiles_for(weight_value, 2)
    vectors = gl.allocate_shared_memory(gl.float32, [VECTORS_HELD, C], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    there = one_arrival(3)
    publish()
    rings = (z_ring, x_ring, d_ring)
    held = (weights, tiles_for(scales, 1).index(0) if SHARED else None, vectors)
    sources = (norms[0].weight, norms[0].bias, norms[1].weight, norms[1].bias, biases[0], biases[1])
    shared = (biases if BACKWARD else None, dropout, dims, out, rings, held, there, tiles, period)
    loaded = ((z, x, d_out), (weight_value, weight_gate), scales, sources)
    gl.warp_specialize(
        [
            (_update, (shared, 0, BACKWARD)),
            (_update, (shared, 1, BACKWARD)),
            (_fetch_tiles, (loaded, rings, held, there, tiles, period)),
        ],
        [4, 4],
        [240, 24],
    )
