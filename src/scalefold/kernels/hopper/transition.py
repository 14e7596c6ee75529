"""Transition for Hopper in Gluon; twins: the programs of ``ops.transition``.

Forward: norm, both linears and residual in one program. Blocks of HIDDEN channels of the hidden layer stream by,
their weights for all consumers at once. The norm of a tile is the left operand of the first product: in registers
where they suffice (KEPT), else it is written over its x, which is fetched once more for the residual connection while
the last product runs.

Backward: the hidden layer again, its gradient and that of the norm, all stored, with sums for both biases. A weight's
two blocks of a step share two slots: the block of weight 1 is needed longer, so the next one takes the other's slot.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false
# The type checker takes Gluon's programs for Python.

from typing import Any, NamedTuple

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
from scalefold.kernels.hopper.pieces import CONSUMERS, group_barrier, initialised, publish, tiles_for
from scalefold.kernels.hopper.row_pieces import (
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
    send,
    wait_until_sent,
)
from scalefold.kernels.instructions import program, wait_for_predecessors

HIDDEN = gl.constexpr(hopper.HIDDEN_BLOCK)

# ---- forward --------------------------------------------------------------------------------------------------------


class Weights(NamedTuple):
    """Slots for blocks of both weights, [HIDDEN, C] and [C, HIDDEN], that all consumers read."""

    first: Any
    second: Any
    full: Any
    empty: Any


@gluon.jit
def _fetch_blocks(descriptors, ring, weights, blocks, tiles):
    """The loader: for each pair of tiles all blocks of the weights, and x with the first of them.

    Where x has one slot, which the tile before leaves late, it comes with the last block that needs no leave before.
    """
    x, weight_1, weight_2 = descriptors
    STAGES: gl.constexpr = weights.first.shape[0]
    WITH_X: gl.constexpr = 0 if ring.slots.shape[0] > CONSUMERS else STAGES - 1
    n = 0
    step = 0
    for tile in range(gl.program_id(0) * CONSUMERS, tiles, gl.num_programs(0) * CONSUMERS):
        for block in range(blocks):
            slot = step % STAGES
            full = weights.full.index(slot)
            mbarrier.wait(weights.empty.index(slot), ((step // STAGES) & 1) ^ 1)
            mbarrier.expect(full, weight_1.block_type.nbytes + weight_2.block_type.nbytes)
            tma.async_copy_global_to_shared(weight_1, [block * HIDDEN, 0], full, weights.first.index(slot))
            tma.async_copy_global_to_shared(weight_2, [0, block * HIDDEN], full, weights.second.index(slot))
            step += 1
            if block == WITH_X:
                fetch(ring, x, tile * ROWS, 0, 0, n)
                if tile + 1 < tiles:
                    fetch(ring, x, (tile + 1) * ROWS, 0, 1, n)
        n += 1  # noqa: SIM113


@gluon.jit
def _hidden(left, weight, bias, C: gl.constexpr):
    """relu(left W^T + bias) of a block as the left operand of the second product."""
    acc = gl.zeros([ROWS, HIDDEN], gl.float32, product_layout(HIDDEN))
    acc = warpgroup_mma(left, weight.permute((1, 0)), acc, use_acc=False)
    return gl.convert_layout(gl.maximum(acc + bias, 0.0).to(gl.bfloat16), operand_layout(C))


@gluon.jit
def leave_block(weights, slot):
    """All warps of a consumer are done with a block: its products are complete."""
    group_barrier()
    mbarrier.arrive(weights.empty.index(slot), count=1)


@gluon.jit
def _transform(shared, SIDE: gl.constexpr, KEPT: gl.constexpr):
    """A consumer. The last pair of tiles may be one: then the second consumer only lets blocks pass."""
    x, out, norm, biases, ring, weights, again, blocks, tiles = shared
    C: gl.constexpr = weights.first.shape[2]
    STAGES: gl.constexpr = weights.first.shape[0]
    n = 0
    step = 0
    for pair in range(gl.program_id(0) * CONSUMERS, tiles, gl.num_programs(0) * CONSUMERS):
        tile = pair + SIDE
        if tile < tiles:
            if not KEPT:  # noqa: SIM102  (known when it is compiled, unlike n)
                if n > 0:
                    wait_until_sent(0)
                    leave(ring, SIDE, n - 1)
            slot_x = receive(ring, SIDE, n)
            value = normalised(read(slot_x), norm)
            if KEPT:
                left = gl.convert_layout(value, operand_layout(HIDDEN))
                if n > 0:
                    wait_until_sent(0)
                    leave(ring, SIDE, n - 1)
            else:
                group_barrier()
                slot_x.store(value)
                fence_async_shared()
                group_barrier()
                left = slot_x
            acc = gl.zeros([ROWS, C], gl.float32, product_layout(C))
            for block in range(blocks):
                slot = step % STAGES
                bias = per_column(biases[0], block * HIDDEN, HIDDEN)
                mbarrier.wait(weights.full.index(slot), (step // STAGES) & 1)
                hidden = _hidden(left, weights.first.index(slot), bias, C)
                if not KEPT:  # noqa: SIM102
                    if block == blocks - 1:
                        group_barrier()
                        mbarrier.expect(again.index(SIDE), x.block_type.nbytes)
                        tma.async_copy_global_to_shared(x, [tile * ROWS, 0], again.index(SIDE), slot_x)
                acc = warpgroup_mma(hidden, weights.second.index(slot).permute((1, 0)), acc)
                leave_block(weights, slot)
                step += 1
            if not KEPT:
                mbarrier.wait(again.index(SIDE), n & 1)
            before = read(slot_x)
            group_barrier()
            slot_x.store((before + acc + per_column(biases[1], 0, C)).to(gl.bfloat16))
            send(out, tile * ROWS, 0, slot_x)
        else:
            for _ in range(blocks):
                slot = step % STAGES
                mbarrier.wait(weights.full.index(slot), (step // STAGES) & 1)
                leave_block(weights, slot)
                step += 1
        n += 1  # noqa: SIM113
    tma.store_wait(0)


@program
@gluon.jit(do_not_specialize=["blocks", "tiles"])
def hopper_transition(
    x, weight_1, weight_2, out, norm, biases, blocks, tiles,
    KEPT: gl.constexpr, X_STAGES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Descriptors of x and out [64 tiles, C] and weights [hidden, C] and [C, hidden] in ``blocks``.

    biases: of both linears. At least STAGES blocks.
    """
    wait_for_predecessors()
    ring = new_ring(x, X_STAGES)
    weights = Weights(
        tiles_for(weight_1, STAGES), tiles_for(weight_2, STAGES), initialised(STAGES, 1), initialised(STAGES, CONSUMERS)
    )
    again = one_arrival(CONSUMERS)
    publish()
    shared = (x, out, norm, biases, ring, weights, again, blocks, tiles)
    gl.warp_specialize(
        [
            (_transform, (shared, 0, KEPT)),
            (_transform, (shared, 1, KEPT)),
            (_fetch_blocks, ((x, weight_1, weight_2), ring, weights, blocks, tiles)),
        ],
        [4, 4],
        [240, 24],
    )


# ---- backward -------------------------------------------------------------------------------------------------------


class Pairs(NamedTuple):
    """Slots for blocks of the weights, two for each of PAIRS blocks of the hidden layer."""

    slots: Any
    full: Any
    empty: Any


@gluon.jit
def _slot(step, PAIRS: gl.constexpr, SECOND: gl.constexpr):
    """Where the block of weight 1, or SECOND: of weight 2, of a step lies, and the parity of its use."""
    use = step // PAIRS
    return step % PAIRS * 2 + ((use & 1) ^ SECOND), use & 1


@gluon.jit
def _fetch_block(descriptor, row, column, pairs, step, SECOND: gl.constexpr):
    """The loader: a block of a weight, once its slot is free."""
    PAIRS: gl.constexpr = pairs.slots.shape[0] // 2
    slot, parity = _slot(step, PAIRS, SECOND)
    tile = pairs.slots.index(slot)
    if SECOND:
        tile = tile._reinterpret(gl.bfloat16, descriptor.block_type.shape, descriptor.layout)
    mbarrier.wait(pairs.empty.index(slot), parity ^ 1)
    mbarrier.expect(pairs.full.index(slot), descriptor.block_type.nbytes)
    tma.async_copy_global_to_shared(descriptor, [row, column], pairs.full.index(slot), tile)


@gluon.jit
def _fetch_pairs(descriptors, rings, pairs, blocks, tiles):
    """The loader: for each pair of tiles all blocks of the weights; x and d_out with the last that need no leave."""
    x, d_out, weight_1, weight_2 = descriptors
    x_ring, d_ring = rings
    PAIRS: gl.constexpr = pairs.slots.shape[0] // 2
    n = 0
    step = 0
    for tile in range(gl.program_id(0) * CONSUMERS, tiles, gl.num_programs(0) * CONSUMERS):
        for block in range(blocks):
            _fetch_block(weight_1, block * HIDDEN, 0, pairs, step, 0)
            _fetch_block(weight_2, 0, block * HIDDEN, pairs, step, 1)
            step += 1
            if block == PAIRS - 1:
                fetch(x_ring, x, tile * ROWS, 0, 0, n)
                fetch(d_ring, d_out, tile * ROWS, 0, 0, n)
                if tile + 1 < tiles:
                    fetch(x_ring, x, (tile + 1) * ROWS, 0, 1, n)
                    fetch(d_ring, d_out, (tile + 1) * ROWS, 0, 1, n)
        n += 1  # noqa: SIM113


@gluon.jit
def store_sums(pointer, sums):
    """COUNT sums, which all rows of a product with ones hold."""
    LAYOUT: gl.constexpr = sums.type.layout
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    columns = gl.arange(0, sums.shape[1], layout=gl.SliceLayout(0, LAYOUT))
    gl.store(pointer + columns[None, :] + 0 * rows[:, None], sums, mask=(rows == 0)[:, None])


@gluon.jit
def column_sums(tile, first):
    """Sums over the rows of columns from ``first`` on of a tile in shared memory, in all rows: [ROWS, HIDDEN]."""
    ones = gl.full([ROWS, ROWS], 1.0, gl.bfloat16, operand_layout(HIDDEN))
    acc = gl.zeros([ROWS, HIDDEN], gl.float32, product_layout(HIDDEN))
    return warpgroup_mma(ones, tile.slice(first, HIDDEN, 1), acc, use_acc=False, is_async=True)


@gluon.jit
def _differentiate(shared, SIDE: gl.constexpr):
    """A consumer; like ``_transform``."""
    outs, norm, bias, partials, rings, pairs, second, staged, blocks, tiles = shared
    hidden_out, d_hidden_out, normed_out, d_normed_out = outs
    x_ring, d_ring = rings
    C: gl.constexpr = pairs.slots.shape[2]
    PAIRS: gl.constexpr = pairs.slots.shape[0] // 2
    own_hidden, own_d = staged.index(2 * SIDE), staged.index(2 * SIDE + 1)
    n = 0
    step = 0
    for pair in range(gl.program_id(0) * CONSUMERS, tiles, gl.num_programs(0) * CONSUMERS):
        tile = pair + SIDE
        if tile < tiles:
            sums = partials + tile.to(gl.int64) * (C + blocks * HIDDEN)
            x = receive(x_ring, SIDE, n)
            value = normalised(read(x), norm)
            group_barrier()
            x.store(value)
            send(normed_out, tile * ROWS, 0, x)
            d_out = receive(d_ring, SIDE, n)
            for first in gl.static_range(0, C, HIDDEN):
                total = column_sums(d_out, first)
                total = warpgroup_mma_wait(0, deps=(total,))
                store_sums(sums + first, total)
            acc = gl.zeros([ROWS, C], gl.float32, product_layout(C))
            for block in range(blocks):
                slot, parity = _slot(step, PAIRS, 0)
                slot_2, _ = _slot(step, PAIRS, 1)
                shift = per_column(bias, block * HIDDEN, HIDDEN)
                mbarrier.wait(pairs.full.index(slot), parity)
                weight = pairs.slots.index(slot)
                hidden = gl.zeros([ROWS, HIDDEN], gl.float32, product_layout(HIDDEN))
                hidden = warpgroup_mma(x, weight.permute((1, 0)), hidden, use_acc=False)
                hidden = gl.maximum(hidden + shift, 0.0).to(gl.bfloat16)
                wait_until_sent(0)
                own_hidden.store(hidden)
                mbarrier.wait(pairs.full.index(slot_2), parity)
                weight_2 = pairs.slots.index(slot_2)._reinterpret(gl.bfloat16, second.block_type.shape, second.layout)
                d = gl.zeros([ROWS, HIDDEN], gl.float32, product_layout(HIDDEN))
                d = warpgroup_mma(d_out, weight_2, d, use_acc=False)
                d = gl.where(hidden > 0.0, d, 0.0).to(gl.bfloat16)
                own_d.store(d)
                send(hidden_out, tile * ROWS, block * HIDDEN, own_hidden)
                mbarrier.arrive(pairs.empty.index(slot_2), count=1)
                tma.async_copy_shared_to_global(d_hidden_out, [tile * ROWS, block * HIDDEN], own_d)
                left = gl.convert_layout(d, operand_layout(C))
                acc = warpgroup_mma(left, weight, acc, is_async=True)
                total = column_sums(own_d, 0)
                acc, total = warpgroup_mma_wait(0, deps=(acc, total))
                group_barrier()
                mbarrier.arrive(pairs.empty.index(slot), count=1)
                store_sums(sums + C + block * HIDDEN, total)
                step += 1
            wait_until_sent(0)
            leave(d_ring, SIDE, n)
            x.store(acc.to(gl.bfloat16))
            send(d_normed_out, tile * ROWS, 0, x)
            wait_until_sent(0)
            leave(x_ring, SIDE, n)
        else:
            for _ in range(blocks):
                slot, parity = _slot(step, PAIRS, 0)
                slot_2, _ = _slot(step, PAIRS, 1)
                mbarrier.wait(pairs.full.index(slot), parity)
                mbarrier.wait(pairs.full.index(slot_2), parity)
                group_barrier()
                mbarrier.arrive(pairs.empty.index(slot), count=1)
                mbarrier.arrive(pairs.empty.index(slot_2), count=1)
                step += 1
        n += 1  # noqa: SIM113
    tma.store_wait(0)


@program
@gluon.jit(do_not_specialize=["blocks", "tiles"])
def hopper_transition_gradient(
    x, d_out, weight_1, weight_2, hidden, d_hidden, normed, d_normed, norm, bias, partials, blocks, tiles,
    PAIRS: gl.constexpr,
):  # fmt: skip
    """Descriptors of x, d_out, normed and d_normed [64 tiles, C], hidden and d_hidden [64 tiles, HIDDEN * blocks], and
    weights [HIDDEN * blocks, C] and [C, HIDDEN * blocks]. At least PAIRS blocks.

    bias: of the hidden layer. partials: [tiles, C + HIDDEN * blocks] fp32, sums of d_out and d_hidden.
    """
    wait_for_predecessors()
    rings = (new_ring(x, 1), new_ring(d_out, 1))
    COUNT: gl.constexpr = 2 * PAIRS
    pairs = Pairs(tiles_for(weight_1, COUNT), one_arrival(COUNT), initialised(COUNT, CONSUMERS))
    staged = tiles_for(hidden, 2 * CONSUMERS)
    publish()
    outs = (hidden, d_hidden, normed, d_normed)
    shared = (outs, norm, bias, partials, rings, pairs, weight_2, staged, blocks, tiles)
    gl.warp_specialize(
        [
            (_differentiate, (shared, 0)),
            (_differentiate, (shared, 1)),
            (_fetch_pairs, ((x, d_out, weight_1, weight_2), rings, pairs, blocks, tiles)),
        ],
        [4, 4],
        [240, 24],
    )
