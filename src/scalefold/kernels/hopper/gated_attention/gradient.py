"""Gradient of a gated attention's end for Hopper in Gluon; twin: ``ops.gated_output``.

A program has HALF channels of o and gate and keeps their columns of the weight in shared memory; for rows of the MSA
two neighbours share a tile, and each stores half of what both need, the gradient of the update. All that comes and
goes passes through one ring per consumer, HALF channels at a time; results are written over what they come from, but
for the gradient of o, which has a slot of its own. Tiles lie as in the forward (``output``).
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

from scalefold.kernels.hopper.gated_attention.output import HALF, dropped
from scalefold.kernels.hopper.pieces import CONSUMERS, group_barrier, publish, tiles_for
from scalefold.kernels.hopper.row_pieces import (
    COLUMNS,
    LINES,
    ROWS,
    Walk,
    begin,
    by_row,
    corner,
    fetch_at,
    new_ring,
    one_arrival,
    pace,
    product_layout,
    read,
    receive,
    release,
    sigmoid,
    slot_of,
    wait_until_sent,
)
from scalefold.kernels.hopper.transition import column_sums, store_sums
from scalefold.kernels.instructions import program, wait_for_predecessors


@gluon.jit
def _fetch(inputs, ring, weight_slot, there, walk, part, ACROSS: gl.constexpr):
    """The loader: the weight, then for both consumers in turn d, gate and o of a tile."""
    d, o, gate, weight = inputs
    PARTS: gl.constexpr = weight.block_type.shape[0] // HALF
    mbarrier.expect(there, weight.block_type.nbytes)
    tma.async_copy_global_to_shared(weight, [0, part * HALF], there, weight_slot)
    n = 0
    for first in range(walk.first, walk.tiles, pace(walk)):
        for use in gl.static_range(PARTS + 2):
            for side in gl.static_range(CONSUMERS):
                tile = first + side * walk.step
                if tile < walk.tiles:
                    if use < PARTS:
                        fetch_at(ring, d, corner(walk, tile, 0, use * HALF, ACROSS), side, n + use)
                    elif use == PARTS:
                        fetch_at(ring, gate, corner(walk, tile, 0, part * HALF, ACROSS), side, n + use)
                    else:
                        fetch_at(ring, o, corner(walk, tile, 0, part * HALF, ACROSS), side, n + use)
        n += PARTS + 2


@gluon.jit
def _release_all(ring, SIDE: gl.constexpr, n, COUNT: gl.constexpr):
    """The loader may fill the slots of COUNT uses from the n-th on again; all warps have met since they read them."""
    for use in gl.static_range(COUNT):
        release(ring, SIDE, n + use)


@gluon.jit
def _start(slots, weight, first: gl.constexpr):
    """Product of the update's gradient with COLUMNS columns of the weight: [ROWS, COLUMNS], not waited for."""
    acc = gl.zeros([ROWS, COLUMNS], gl.float32, product_layout(COLUMNS))
    for i in gl.static_range(len(slots)):
        block = weight.slice(i * HALF, HALF, 0).slice(first, COLUMNS, 1)
        acc = warpgroup_mma(slots[i], block, acc, use_acc=i > 0, is_async=True)
    return acc


@gluon.jit
def _received(ring, SIDE: gl.constexpr, n, PARTS: gl.constexpr):
    """All slots of d."""
    if PARTS == 1:
        return (by_row(receive(ring, SIDE, n)),)
    else:  # noqa: RET505
        return by_row(receive(ring, SIDE, n)), by_row(receive(ring, SIDE, n + 1))


@gluon.jit
def _differentiate(shared, SIDE: gl.constexpr, ACROSS: gl.constexpr, BY_ROW: gl.constexpr):
    """A consumer."""
    dropout, outs, partials, ring, staged, weight, there, walk, part = shared
    update_out, gated_out, d_o, d_gate = outs
    C: gl.constexpr = weight.shape[0]
    PARTS: gl.constexpr = C // HALF
    mbarrier.wait(there, 0)
    own = staged.index(SIDE)
    own_rows = by_row(own)
    n = 0
    for tile in range(begin(walk, SIDE), walk.tiles, pace(walk)):
        if n > 0:
            wait_until_sent(0)
            _release_all(ring, SIDE, n - 2, 2)
        slots = _received(ring, SIDE, n, PARTS)
        at = corner(walk, tile, 0, part * HALF, ACROSS)
        if dropout is not None:
            for i in gl.static_range(PARTS):
                update = dropped(read(slots[i]), dropout, walk, tile, i * HALF, ACROSS, BY_ROW).to(gl.bfloat16)
                group_barrier()
                slots[i].store(update)
            fence_async_shared()
            group_barrier()
            tma.async_copy_shared_to_global(update_out, at, ring.slots.index(slot_of(ring, SIDE, n + part)))
        first = _start(slots, weight, 0)
        second = _start(slots, weight, COLUMNS)
        summed = by_row(ring.slots.index(slot_of(ring, SIDE, n + part)))
        sums = partials + tile.to(gl.int64) * C + part * HALF
        for column in gl.static_range(0, HALF, COLUMNS):
            total = column_sums(summed, column)
            first, second, total = warpgroup_mma_wait(0, deps=(first, second, total))
            store_sums(sums + column, total)
        wait_until_sent(0)
        _release_all(ring, SIDE, n, PARTS)
        gates = receive(ring, SIDE, n + PARTS)
        values = receive(ring, SIDE, n + PARTS + 1)
        for column in gl.static_range(0, HALF, COLUMNS):
            gate, value = by_row(gates).slice(column, COLUMNS, 1), by_row(values).slice(column, COLUMNS, 1)
            opening, o = sigmoid(read(gate)), read(value)
            d_gated = (first if column == 0 else second) * opening
            group_barrier()
            value.store((o * opening).to(gl.bfloat16))
            own_rows.slice(column, COLUMNS, 1).store(d_gated.to(gl.bfloat16))
            gate.store((d_gated * o * (1.0 - opening)).to(gl.bfloat16))
        fence_async_shared()
        group_barrier()
        tma.async_copy_shared_to_global(gated_out, at, values)
        tma.async_copy_shared_to_global(d_o, at, own)
        tma.async_copy_shared_to_global(d_gate, at, gates)
        n += PARTS + 2
    tma.store_wait(0)


@program
@gluon.jit(do_not_specialize=["tiles"])
def hopper_gated_gradient(
    d, o, gate, weight, update_out, gated_out, d_o, d_gate, dropout, partials, dims, tiles,
    SLOTS: gl.constexpr, ACROSS: gl.constexpr, BY_ROW: gl.constexpr,
):  # fmt: skip
    """Descriptors of d, o, gate, update_out, gated_out, d_o and d_gate [64 tiles, C] in blocks of HALF channels, and of
    weight [C, C] in blocks of as many columns; update_out: None without dropout.

    dropout: as in ``hopper_gated_output``, and BY_ROW scales that no whole tile shares. partials: [tiles, C] fp32, sums
    of the update's gradient. SLOTS: of the ring, per consumer, at least those of a tile; the number of programs is a
    multiple of C / HALF.
    """
    wait_for_predecessors()
    PARTS: gl.constexpr = weight.block_type.shape[0] // HALF
    part = gl.program_id(0) % PARTS
    walk = Walk(gl.program_id(0) // PARTS, gl.num_programs(0) // PARTS, tiles, dims[1] // LINES, dims)
    ring = new_ring(d, SLOTS)
    staged = tiles_for(d_o, CONSUMERS)
    weight_slot = tiles_for(weight, 1).index(0)
    there = one_arrival(1).index(0)
    publish()
    shared = (dropout, (update_out, gated_out, d_o, d_gate), partials, ring, staged, weight_slot, there, walk, part)
    gl.warp_specialize(
        [
            (_differentiate, (shared, 0, ACROSS, BY_ROW)),
            (_differentiate, (shared, 1, ACROSS, BY_ROW)),
            (_fetch, ((d, o, gate, weight), ring, weight_slot, there, walk, part, ACROSS)),
        ],
        [4, 4],
        [232, 40],
    )
