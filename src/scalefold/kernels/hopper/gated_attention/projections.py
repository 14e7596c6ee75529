"""Beginning of a gated attention, forward, for Hopper in Gluon; twin: ``ops.linear``.

Layer norm, four projections and an attention bias of pairs: these weights stay in shared memory. Layer norm and wide
projections, of the MSA: their weights stream by in blocks of COLUMNS outputs for all consumers at once.
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
    begin,
    by_row,
    corner,
    fetch,
    fetch_at,
    leave,
    new_ring,
    new_walk,
    normed,
    offsets_of,
    one_arrival,
    operand_layout,
    pace,
    per_column,
    product_layout,
    read,
    receive,
    row_numbers,
    send,
    send_at,
    standardised,
    wait_until_sent,
)
from scalefold.kernels.instructions import program, wait_for_predecessors

DEPTH = gl.constexpr(64)  # channels of a left operand
STAGED = gl.constexpr(2)  # results per consumer on their way to memory


@gluon.jit
def _fetch(inputs, ring, weights, narrow_weight, there, walk, ACROSS: gl.constexpr):
    """The loader: the consumers' first tiles, the weights, further tiles."""
    x, weight, narrow = inputs
    COUNT: gl.constexpr = weights.shape[0]
    _fetch_turn(ring, x, walk, walk.first, 0, ACROSS)
    for i in gl.static_range(COUNT):
        mbarrier.expect(there.index(i), weight.block_type.nbytes)
        tma.async_copy_global_to_shared(weight, [i * weights.shape[1], 0], there.index(i), weights.index(i))
    mbarrier.expect(there.index(COUNT), narrow.block_type.nbytes)
    tma.async_copy_global_to_shared(narrow, [0, 0], there.index(COUNT), narrow_weight)
    n = 1
    for first in range(walk.first + pace(walk), walk.tiles, pace(walk)):
        _fetch_turn(ring, x, walk, first, n, ACROSS)
        n += 1


@gluon.jit
def _fetch_turn(ring, x, walk, first, n, ACROSS: gl.constexpr):
    """A tile for each consumer, from ``first`` on."""
    for side in gl.static_range(CONSUMERS):
        tile = first + side * walk.step
        if tile < walk.tiles:
            fetch_at(ring, x, corner(walk, tile, 0, 0, ACROSS), side, n)


@gluon.jit
def _project(shared, SIDE: gl.constexpr, NARROW: gl.constexpr, ACROSS: gl.constexpr):
    """A consumer: the norm of a tile once, as left operands in registers, then one projection after the other.

    The loop over these is not unrolled: the places of all weights would be kept, and spilled. The weights are waited
    for in the first tile alone: a wait costs a barrier of the group.
    """
    norm, bias, out, narrow_outs, ring, weights, narrow_weight, staged, there, walk = shared
    COUNT: gl.constexpr = weights.shape[0]
    C: gl.constexpr = weights.shape[1]
    gl.static_assert(COUNT % STAGED == 0, "the first result of a tile would meet the last one's buffer")
    n = 0
    for tile in range(begin(walk, SIDE), walk.tiles, pace(walk)):
        left = _normed(by_row(receive(ring, SIDE, n)), norm)
        leave(ring, SIDE, n)
        for i in range(COUNT):
            if n == 0:
                mbarrier.wait(there.index(i), 0)
            acc = _multiplied(left, weights.index(i))
            if i == COUNT - 1:
                acc += per_column(bias, 0, C)
            own = staged.index(SIDE * STAGED + i % STAGED)
            wait_until_sent(STAGED - 1)
            by_row(own).store(acc.to(gl.bfloat16))
            send_at(out, corner(walk, tile, i, 0, ACROSS), own)
        if n == 0:
            mbarrier.wait(there.index(COUNT), 0)
        _project_narrow(narrow_outs, left, narrow_weight, walk, tile, NARROW, ACROSS)
        n += 1  # noqa: SIM113
    tma.store_wait(0)


@gluon.jit
def _normed(slot, norm):
    """Layer norm of a tile in shared memory, [ROWS, C], as left operands of DEPTH channels each.

    They are read again once the statistics are known, which takes fewer registers than to keep them.
    """
    C: gl.constexpr = slot.shape[1]
    PART: gl.constexpr = product_layout(DEPTH)
    x = read(slot)
    _, rstd = standardised(x)
    mean = gl.convert_layout(gl.sum(x, 1) * (1.0 / C), gl.SliceLayout(1, PART))
    rstd = gl.convert_layout(rstd, gl.SliceLayout(1, PART))
    parts = ()
    for first in gl.static_range(0, C, DEPTH):
        hat = (read(slot.slice(first, DEPTH, 1)) - mean[:, None]) * rstd[:, None]
        value = hat * per_column(norm.weight, first, DEPTH) + per_column(norm.bias, first, DEPTH)
        parts += (gl.convert_layout(value.to(gl.bfloat16), operand_layout(C)),)
    return parts


@gluon.jit
def _multiplied(left, weight):
    """Left operands times a weight [N, C] in shared memory: [ROWS, N]."""
    N: gl.constexpr = weight.shape[0]
    acc = gl.zeros([ROWS, N], gl.float32, product_layout(N))
    for i in gl.static_range(weight.shape[1] // DEPTH):
        part = gl.convert_layout(left[i], operand_layout(N))
        right = weight.slice(i * DEPTH, DEPTH, 1).permute((1, 0))
        acc = warpgroup_mma(part, right, acc, use_acc=i > 0, is_async=True)
    return warpgroup_mma_wait(0, deps=(acc,))


@gluon.jit
def _project_narrow(outs, left, weight, walk, tile, NARROW: gl.constexpr, ACROSS: gl.constexpr):
    """The attention bias of a tile, [ROWS, NARROW], by ordinary stores to all outs: its channels lie anywhere."""
    WIDTH: gl.constexpr = weight.shape[0]
    LAYOUT: gl.constexpr = product_layout(WIDTH)
    acc = _multiplied(left, weight)
    n = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, LAYOUT))
    rows = row_numbers(walk, tile, gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT)), ACROSS)
    for place in gl.static_range(len(outs)):
        offsets = offsets_of(outs[place], rows, walk.dims)[:, None] + n[None, :] * outs[place].strides[3]
        gl.store(outs[place].pointer + offsets, acc.to(gl.bfloat16), mask=(n < NARROW)[None, :])


@program
@gluon.jit(do_not_specialize=["tiles"])
def hopper_projections(
    x, weight, narrow_weight, out, norm, bias, narrow_outs, dims, tiles,
    COUNT: gl.constexpr, NARROW: gl.constexpr, ACROSS: gl.constexpr,
):  # fmt: skip
    """Descriptors of x [64 tiles, C], weight [COUNT * C, C], narrow weight [NARROW, C] and out [COUNT * 64 tiles, C].

    bias: [C], of the last projection. narrow_outs: views [64 tiles, NARROW]. ACROSS: tiles of x and out lie so.
    """
    wait_for_predecessors()
    walk = new_walk(dims, tiles)
    ring = new_ring(x, 1)
    weights = tiles_for(weight, COUNT)
    narrow = tiles_for(narrow_weight, 1).index(0)
    staged = tiles_for(out, CONSUMERS * STAGED)
    there = one_arrival(COUNT + 1)
    publish()
    shared = (norm, bias, out, narrow_outs, ring, weights, narrow, staged, there, walk)
    gl.warp_specialize(
        [
            (_project, (shared, 0, NARROW, ACROSS)),
            (_project, (shared, 1, NARROW, ACROSS)),
            (_fetch, ((x, weight, narrow_weight), ring, weights, narrow, there, walk, ACROSS)),
        ],
        [4, 4],
        [232, 40],
    )


# ---- wide projections -----------------------------------------------------------------------------------------------

BLOCKS = gl.constexpr(4)  # of a weight on their way


class Blocks(NamedTuple):
    """Slots for blocks [COLUMNS, C] of a weight that all consumers read."""

    slots: Any
    full: Any
    empty: Any


@gluon.jit
def _fetch_wide(x, weight, ring, weights, blocks, tiles):
    """The loader: x of a pair of tiles, then all blocks of the weight."""
    n = 0
    step = 0
    for tile in range(gl.program_id(0) * CONSUMERS, tiles, gl.num_programs(0) * CONSUMERS):
        fetch(ring, x, tile * ROWS, 0, 0, n)
        if tile + 1 < tiles:
            fetch(ring, x, (tile + 1) * ROWS, 0, 1, n)
        for block in range(blocks):
            slot = step % BLOCKS
            mbarrier.wait(weights.empty.index(slot), ((step // BLOCKS) & 1) ^ 1)
            mbarrier.expect(weights.full.index(slot), weight.block_type.nbytes)
            at = [block * COLUMNS, 0]
            tma.async_copy_global_to_shared(weight, at, weights.full.index(slot), weights.slots.index(slot))
            step += 1
        n += 1  # noqa: SIM113


@gluon.jit
def _product(left, weights, step):
    """The unfinished product of a tile with the block of a step, once it is there: [ROWS, COLUMNS]."""
    slot = step % BLOCKS
    mbarrier.wait(weights.full.index(slot), (step // BLOCKS) & 1)
    acc = gl.zeros([ROWS, COLUMNS], gl.float32, product_layout(COLUMNS))
    return warpgroup_mma(left, weights.slots.index(slot).permute((1, 0)), acc, use_acc=False, is_async=True)


@gluon.jit
def _store_product(acc, shared, SIDE: gl.constexpr, tile, block, step):
    """A finished product to memory. Its block of the weight goes back to the loader, past the barrier in the wait."""
    _norm, bias, biased, out, _ring, weights, staged, _blocks, tiles = shared
    PER_WEIGHT: gl.constexpr = weights.slots.shape[2] // COLUMNS
    if block >= biased:
        acc += per_column(bias, (block - biased) * COLUMNS, COLUMNS)
    own = staged.index(SIDE * STAGED + step % STAGED)
    wait_until_sent(STAGED - 1)
    mbarrier.arrive(weights.empty.index(step % BLOCKS), count=1)
    own.store(acc.to(gl.bfloat16))
    send(out, (block // PER_WEIGHT * tiles + tile) * ROWS, block % PER_WEIGHT * COLUMNS, own)


@gluon.jit
def _project_wide(shared, SIDE: gl.constexpr):
    """A consumer: one product runs while the one before is stored. The last pair of tiles may be one: then the second
    consumer only lets blocks pass.
    """
    norm, _bias, _biased, _out, ring, weights, _staged, blocks, tiles = shared
    n = 0
    step = 0
    for pair in range(gl.program_id(0) * CONSUMERS, tiles, gl.num_programs(0) * CONSUMERS):
        tile = pair + SIDE
        if tile < tiles:
            x = read(receive(ring, SIDE, n))
            leave(ring, SIDE, n)
            left = normed(x, norm)
            for block in range(0, blocks, 2):
                first = _product(left, weights, step)
                second = _product(left, weights, step + 1)
                first = warpgroup_mma_wait(1, deps=(first,))
                _store_product(first, shared, SIDE, tile, block, step)
                second = warpgroup_mma_wait(0, deps=(second,))
                _store_product(second, shared, SIDE, tile, block + 1, step + 1)
                step += 2
        else:
            for _ in range(blocks):
                slot = step % BLOCKS
                mbarrier.wait(weights.full.index(slot), (step // BLOCKS) & 1)
                group_barrier()
                mbarrier.arrive(weights.empty.index(slot), count=1)
                step += 1
        n += 1  # noqa: SIM113
    tma.store_wait(0)


@program
@gluon.jit(do_not_specialize=["biased", "blocks", "tiles"])
def hopper_wide_projections(x, weight, out, norm, bias, biased, blocks, tiles):
    """Descriptors of x [64 tiles, C], weight [COLUMNS * blocks, C] and out [COLUMNS * blocks / C * 64 tiles, C].

    bias: of the blocks from ``biased`` on; ``blocks``: even.
    """
    wait_for_predecessors()
    ring = new_ring(x, 1)
    weights = Blocks(tiles_for(weight, BLOCKS), one_arrival(BLOCKS), initialised(BLOCKS, CONSUMERS))
    staged = tiles_for(out, CONSUMERS * STAGED)
    publish()
    shared = (norm, bias, biased, out, ring, weights, staged, blocks, tiles)
    gl.warp_specialize(
        [
            (_project_wide, (shared, 0)),
            (_project_wide, (shared, 1)),
            (_fetch_wide, (x, weight, ring, weights, blocks, tiles)),
        ],
        [4, 4],
        [240, 24],
    )
