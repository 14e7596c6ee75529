"""End of a gated attention, forward, for Hopper in Gluon; twin: ``ops.gated_output``.

The weight stays in shared memory; the result of a tile is written over its x and sent from there. Where dropout scales
are the same along level 1 of the rows, tiles lie across and a warp's rows share theirs; where they are the same along
level 2, a tile in order has one row of them.
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

from scalefold.kernels import hopper
from scalefold.kernels.hopper.pieces import CONSUMERS, group_barrier, publish, tiles_for
from scalefold.kernels.hopper.row_pieces import (
    COLUMNS,
    LINES,
    ROWS,
    begin,
    by_row,
    corner,
    fetch_at,
    free_slot,
    leave,
    new_ring,
    new_walk,
    offsets_of,
    one_arrival,
    operand_layout,
    pace,
    per_column,
    product_layout,
    read,
    receive,
    release,
    row_numbers,
    send_at,
    sigmoid,
    slot_of,
    wait_until_sent,
)
from scalefold.kernels.instructions import program, wait_for_predecessors
from scalefold.kernels.rows import SECTOR

STAGES = gl.constexpr(2)  # tiles of pairs per consumer


@gluon.jit
def dropped(value, dropout, walk, tile, first, ACROSS: gl.constexpr, BY_ROW: gl.constexpr = False):
    """dropout * value: [ROWS, N], channels from ``first`` on. BY_ROW: not all rows of a tile in order share scales."""
    N: gl.constexpr = value.shape[1]
    LAYOUT: gl.constexpr = product_layout(N)
    if dropout is None:
        return value
    elif ACROSS:  # noqa: RET505
        lines = gl.reshape(value, [LINES, SECTOR, N])
        SCALES: gl.constexpr = gl.SliceLayout(1, lines.type.layout)
        n = gl.arange(0, LINES, layout=gl.SliceLayout(1, SCALES))
        columns = first + gl.arange(0, N, layout=gl.SliceLayout(0, SCALES))
        rows = row_numbers(walk, tile, n * SECTOR, ACROSS)
        scales = gl.load(dropout.pointer + offsets_of(dropout, rows, walk.dims)[:, None] + columns[None, :])
        return gl.convert_layout(gl.reshape(lines * gl.expand_dims(scales, 1), [ROWS, N]), LAYOUT)
    elif BY_ROW:
        rows = tile * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
        columns = first + gl.arange(0, N, layout=gl.SliceLayout(0, LAYOUT))
        return value * gl.load(dropout.pointer + offsets_of(dropout, rows, walk.dims)[:, None] + columns[None, :])
    else:
        columns = first + gl.arange(0, N, layout=gl.SliceLayout(0, LAYOUT))
        return value * gl.load(dropout.pointer + offsets_of(dropout, tile * ROWS, walk.dims) + columns)[None, :]


@gluon.jit
def _send(outs, walk, half, tile, column, slot, ACROSS: gl.constexpr):
    """Store a tile that all threads have just written; of two outs in that which has its lines along level 2.

    half: of them the first that the second one has.
    """
    at = corner(walk, tile, 0, column, ACROSS)
    if outs[1] is None:
        send_at(outs[0], at, slot)
    else:
        fence_async_shared()
        group_barrier()
        if ACROSS:
            if at[0] < half:
                tma.async_copy_shared_to_global(outs[0], at, slot)
            else:
                tma.async_copy_shared_to_global(outs[1], (at[0] - half, at[1], column), slot)
        else:
            middle, inner = at[0] // (2 * half), at[0] % (2 * half)
            if inner < half:
                tma.async_copy_shared_to_global(outs[0], (middle * half + inner, column), slot)
            else:
                tma.async_copy_shared_to_global(outs[1], (middle * half + inner - half, column), slot)


@gluon.jit
def _fetch(inputs, rings, weight_slot, there, walk, ACROSS: gl.constexpr):
    """The loader: the weight, then for both consumers in turn o and gate of a tile, and its x."""
    x, o, gate, weight = inputs
    x_ring, o_ring, gates = rings
    mbarrier.expect(there, weight.block_type.nbytes)
    tma.async_copy_global_to_shared(weight, [0, 0], there, weight_slot)
    n = 0
    for first in range(walk.first, walk.tiles, pace(walk)):
        for side in gl.static_range(CONSUMERS):
            tile = first + side * walk.step
            if tile < walk.tiles:
                at = corner(walk, tile, 0, 0, ACROSS)
                slot = free_slot(o_ring, 2 * o.block_type.nbytes, side, n)
                tma.async_copy_global_to_shared(o, at, o_ring.full.index(slot), o_ring.slots.index(slot))
                tma.async_copy_global_to_shared(gate, at, o_ring.full.index(slot), gates.index(slot))
        for side in gl.static_range(CONSUMERS):
            tile = first + side * walk.step
            if tile < walk.tiles:
                fetch_at(x_ring, x, corner(walk, tile, 0, 0, ACROSS), side, n)
        n += 1  # noqa: SIM113


@gluon.jit
def _close(shared, SIDE: gl.constexpr, ACROSS: gl.constexpr):
    """A consumer. A slot of x goes back to the loader when the result in it has been sent, in the next tile."""
    bias, dropout, outs, half, rings, weight, there, walk = shared
    x_ring, o_ring, gates = rings
    C: gl.constexpr = weight.shape[0]
    mbarrier.wait(there, 0)
    n = 0
    for tile in range(begin(walk, SIDE), walk.tiles, pace(walk)):
        slot = slot_of(x_ring, SIDE, n)
        gated = read(by_row(receive(o_ring, SIDE, n))) * sigmoid(read(by_row(gates.index(slot))))
        left = gl.convert_layout(gated.to(gl.bfloat16), operand_layout(C))
        leave(o_ring, SIDE, n)
        if n > 0:
            wait_until_sent(0)
            release(x_ring, SIDE, n - 1)
        x = by_row(receive(x_ring, SIDE, n))
        acc = gl.zeros([ROWS, C], gl.float32, product_layout(C))
        acc = warpgroup_mma(left, weight.permute((1, 0)), acc, use_acc=False, is_async=True)
        before = x.load(product_layout(C))
        acc = warpgroup_mma_wait(0, deps=(acc,))
        value = dropped(acc + per_column(bias, 0, C), dropout, walk, tile, 0, ACROSS)
        group_barrier()
        x.store((before.to(gl.float32) + value).to(gl.bfloat16))
        _send(outs, walk, half, tile, 0, x_ring.slots.index(slot), ACROSS)
        n += 1  # noqa: SIM113
    tma.store_wait(0)


@program
@gluon.jit(do_not_specialize=["tiles", "half"])
def hopper_gated_output(x, o, gate, weight, out, second, bias, dropout, dims, tiles, half, ACROSS: gl.constexpr):
    """Descriptors of x, o, gate and out [64 tiles, C] and weight [C, C]; bias: [C].

    ``second`` None: out has all rows. Else rows are [1, I, J], and out has those whose j is less than ``half``, J / 2,
    [1, I, half], second the others.
    dropout: a view [64 tiles, C] of fp32 scales, the same along level 1 if tiles lie ACROSS, else along level 2, or
    None.
    """
    wait_for_predecessors()
    walk = new_walk(dims, tiles)
    x_ring, o_ring = new_ring(x, STAGES), new_ring(o, STAGES)
    gates = tiles_for(gate, CONSUMERS * STAGES)
    weight_slot = tiles_for(weight, 1).index(0)
    there = one_arrival(1).index(0)
    publish()
    rings = (x_ring, o_ring, gates)
    shared = (bias, dropout, (out, second), half, rings, weight_slot, there, walk)
    gl.warp_specialize(
        [
            (_close, (shared, 0, ACROSS)),
            (_close, (shared, 1, ACROSS)),
            (_fetch, ((x, o, gate, weight), rings, weight_slot, there, walk, ACROSS)),
        ],
        [4, 4],
        [232, 40],
    )


# ---- of the MSA -----------------------------------------------------------------------------------------------------

HALF = gl.constexpr(2 * hopper.PART)  # channels of a slot: half of the MSA's
SLOTS = gl.constexpr(3)  # per consumer; a tile takes six: o and gate by halves, then x


@gluon.jit
def _fetch_wide(inputs, ring, weights, there, walk, ACROSS: gl.constexpr):
    """The loader: the weight, then for both consumers in turn o and gate of a tile, half by half, and x."""
    x, o, gate, weight = inputs
    BLOCKS: gl.constexpr = weights.shape[0]
    for block in gl.static_range(BLOCKS):
        mbarrier.expect(there.index(block), weight.block_type.nbytes)
        tma.async_copy_global_to_shared(weight, [0, block * COLUMNS], there.index(block), weights.index(block))
    n = 0
    for first in range(walk.first, walk.tiles, pace(walk)):
        for use in gl.static_range(2 * SLOTS):
            for side in gl.static_range(CONSUMERS):
                tile = first + side * walk.step
                if tile < walk.tiles:
                    if use >= 4:
                        fetch_at(ring, x, corner(walk, tile, 0, (use - 4) * HALF, ACROSS), side, n + use)
                    elif use % 2 == 1:
                        fetch_at(ring, gate, corner(walk, tile, 0, use // 2 * HALF, ACROSS), side, n + use)
                    else:
                        fetch_at(ring, o, corner(walk, tile, 0, use // 2 * HALF, ACROSS), side, n + use)
        n += 2 * SLOTS


@gluon.jit
def _gated(o, gate, first: gl.constexpr):
    """sigmoid(gate) * o for COLUMNS channels from ``first`` on, as the left operand of products with HALF columns."""
    value = read(o.slice(first, COLUMNS, 1)) * sigmoid(read(gate.slice(first, COLUMNS, 1)))
    return gl.convert_layout(value.to(gl.bfloat16), operand_layout(HALF))


@gluon.jit
def _finish_half(acc, slot, shared, tile, first: gl.constexpr, ACROSS: gl.constexpr):
    """x + dropout * (acc + bias) for HALF channels from ``first`` on, written over x and sent."""
    bias, dropout, outs, half, _ring, _weights, _there, walk = shared
    x = by_row(slot)
    value = dropped(acc + per_column(bias, first, HALF), dropout, walk, tile, first, ACROSS)
    before = read(x)
    group_barrier()
    x.store((before + value).to(gl.bfloat16))
    _send(outs, walk, half, tile, first, slot, ACROSS)


@gluon.jit
def _close_wide(shared, SIDE: gl.constexpr, ACROSS: gl.constexpr):
    """A consumer. The slots of x go back to the loader when the results in them have been sent, in the next tile.

    The loop over halves is not unrolled: the places of all blocks of the weight would be kept, and spilled. These are
    waited for in the first tile alone.
    """
    _bias, _dropout, _outs, _half, ring, weights, there, walk = shared
    n = 0
    for tile in range(begin(walk, SIDE), walk.tiles, pace(walk)):
        if n > 0:
            wait_until_sent(0)
            leave(ring, SIDE, n - 2)
            leave(ring, SIDE, n - 1)
        first = gl.zeros([ROWS, HALF], gl.float32, product_layout(HALF))
        second = gl.zeros([ROWS, HALF], gl.float32, product_layout(HALF))
        for half in range(2):
            o = by_row(receive(ring, SIDE, n + 2 * half))
            gate = by_row(receive(ring, SIDE, n + 2 * half + 1))
            for part in gl.static_range(0, HALF, COLUMNS):
                left = _gated(o, gate, part)
                number = (half * HALF + part) // COLUMNS
                if part + COLUMNS == HALF:
                    leave(ring, SIDE, n + 2 * half)
                    leave(ring, SIDE, n + 2 * half + 1)
                if n == 0:
                    mbarrier.wait(there.index(number), 0)
                block = weights.index(number)
                first = warpgroup_mma(left, block.slice(0, HALF, 0).permute((1, 0)), first, is_async=True)
                second = warpgroup_mma(left, block.slice(HALF, HALF, 0).permute((1, 0)), second, is_async=True)
                first, second = warpgroup_mma_wait(0, deps=(first, second))
        _finish_half(first, receive(ring, SIDE, n + 4), shared, tile, 0, ACROSS)
        _finish_half(second, receive(ring, SIDE, n + 5), shared, tile, HALF, ACROSS)
        n += 2 * SLOTS
    tma.store_wait(0)


@program
@gluon.jit(do_not_specialize=["tiles", "half"])
def hopper_wide_gated_output(x, o, gate, weight, out, second, bias, dropout, dims, tiles, half, ACROSS: gl.constexpr):
    """The same for C = 2 HALF: x, o, gate and outs in blocks of HALF channels, weight in blocks of COLUMNS."""
    wait_for_predecessors()
    walk = new_walk(dims, tiles)
    ring = new_ring(x, SLOTS)
    weights = tiles_for(weight, 2 * HALF // COLUMNS)
    there = one_arrival(2 * HALF // COLUMNS)
    publish()
    shared = (bias, dropout, (out, second), half, ring, weights, there, walk)
    gl.warp_specialize(
        [
            (_close_wide, (shared, 0, ACROSS)),
            (_close_wide, (shared, 1, ACROSS)),
            (_fetch_wide, ((x, o, gate, weight), ring, weights, there, walk, ACROSS)),
        ],
        [4, 4],
        [232, 40],
    )
