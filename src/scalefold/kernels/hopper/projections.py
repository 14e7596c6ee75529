"""Layer norm and what follows it, forward, for Hopper in Gluon; twins: programs of ``ops.linear``, ``ops.transition``.

Projections: four and an attention bias, whose weights stay in shared memory. Transition: both linears and the residual
connection; blocks of HIDDEN channels of the hidden layer stream by, their weights for all consumers at once. The norm
of a tile is the left operand of the first product: in registers where they suffice (KEPT), else it is written over its
x, which is fetched once more for the residual connection while the last product runs.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false
# The type checker takes Gluon's programs for Python.

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma

from scalefold.kernels.hopper.pieces import CONSUMERS, group_barrier, initialised, publish, tiles_for
from scalefold.kernels.hopper.row_pieces import (
    COLUMNS,
    ROWS,
    fetch,
    fetch_rows,
    leave,
    new_ring,
    normalised,
    normed,
    one_arrival,
    operand_layout,
    per_column,
    product_layout,
    read,
    receive,
    row_offsets,
    send,
    wait_until_sent,
)

STAGES = gl.constexpr(2)  # tiles of x per consumer
STAGED = gl.constexpr(2)  # results per consumer on their way to memory
HIDDEN = gl.constexpr(64)  # channels of the hidden layer at a time

# ---- projections ----------------------------------------------------------------------------------------------------


@gluon.jit
def _fetch(inputs, ring, weights, narrow_weight, weights_there, tiles):
    """The loader: the weights, then tiles of x for both consumers in turn."""
    x, weight, narrow = inputs
    COUNT: gl.constexpr = weights.shape[0]
    C: gl.constexpr = weights.shape[1]
    mbarrier.expect(weights_there, COUNT * weight.block_type.nbytes + narrow.block_type.nbytes)
    for i in gl.static_range(COUNT):
        tma.async_copy_global_to_shared(weight, [i * C, 0], weights_there, weights.index(i))
    tma.async_copy_global_to_shared(narrow, [0, 0], weights_there, narrow_weight)
    fetch_rows(ring, x, tiles)


@gluon.jit
def _project(shared, SIDE: gl.constexpr, NARROW: gl.constexpr):
    """A consumer: the norm of a tile once, as the left operand in registers, then all columns."""
    norm, bias, out, narrow_out, dims, ring, weights, narrow_weight, staged, weights_there, tiles = shared
    COUNT: gl.constexpr = weights.shape[0]
    C: gl.constexpr = weights.shape[1]
    gl.static_assert(COUNT * C // COLUMNS % STAGED == 0, "the first block of a tile would meet the last one's buffer")
    mbarrier.wait(weights_there, 0)
    n = 0
    for tile in range(gl.program_id(0) * CONSUMERS + SIDE, tiles, gl.num_programs(0) * CONSUMERS):
        x = read(receive(ring, SIDE, n))
        leave(ring, SIDE, n)
        left = normed(x, norm)
        for i in gl.static_range(COUNT):
            for first in gl.static_range(0, C, COLUMNS):
                acc = gl.zeros([ROWS, COLUMNS], gl.float32, product_layout(COLUMNS))
                block = weights.index(i).slice(first, COLUMNS, 0)
                acc = warpgroup_mma(left, block.permute((1, 0)), acc, use_acc=False)
                if i == COUNT - 1:
                    acc += per_column(bias, first, COLUMNS)
                own = staged.index(SIDE * STAGED + (i * C + first) // COLUMNS % STAGED)
                wait_until_sent(STAGED - 1)
                own.store(acc.to(gl.bfloat16))
                send(out, (i * tiles + tile) * ROWS, first, own)
        _project_narrow(narrow_out, left, narrow_weight, tile, dims, NARROW)
        n += 1  # noqa: SIM113
    tma.store_wait(0)


@gluon.jit
def _project_narrow(out, left, weight, tile, dims, NARROW: gl.constexpr):
    """The attention bias of a tile, [ROWS, NARROW], by ordinary stores: its channels lie anywhere."""
    WIDTH: gl.constexpr = weight.shape[0]
    LAYOUT: gl.constexpr = product_layout(WIDTH)
    acc = gl.zeros([ROWS, WIDTH], gl.float32, LAYOUT)
    left = gl.convert_layout(left, operand_layout(WIDTH))
    acc = warpgroup_mma(left, weight.permute((1, 0)), acc, use_acc=False)
    n = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, LAYOUT))
    offsets = row_offsets(out, tile, dims, LAYOUT)[:, None] + n[None, :] * out.strides[3]
    gl.store(out.pointer + offsets, acc.to(gl.bfloat16), mask=(n < NARROW)[None, :])


@gluon.jit(do_not_specialize=["tiles"])
def hopper_projections(
    x, weight, narrow_weight, out, norm, bias, narrow_out, dims, tiles,
    COUNT: gl.constexpr, NARROW: gl.constexpr,
):  # fmt: skip
    """Descriptors of x [64 tiles, C], weight [COUNT * C, C], narrow weight [NARROW, C] and out [COUNT * 64 tiles, C].

    bias: [C], of the last projection. narrow_out: a view [64 tiles, NARROW].
    """
    ring = new_ring(x, STAGES)
    weights = tiles_for(weight, COUNT)
    narrow = tiles_for(narrow_weight, 1).index(0)
    staged = tiles_for(out, CONSUMERS * STAGED)
    there = one_arrival(1).index(0)
    publish()
    shared = (norm, bias, out, narrow_out, dims, ring, weights, narrow, staged, there, tiles)
    gl.warp_specialize(
        [
            (_project, (shared, 0, NARROW)),
            (_project, (shared, 1, NARROW)),
            (_fetch, ((x, weight, narrow_weight), ring, weights, narrow, there, tiles)),
        ],
        [4, 4],
        [240, 24],
    )


# ---- transition -----------------------------------------------------------------------------------------------------


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
def _leave_block(weights, slot):
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
                _leave_block(weights, slot)
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
                _leave_block(weights, slot)
                step += 1
        n += 1  # noqa: SIM113
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["blocks", "tiles"])
def hopper_transition(
    x, weight_1, weight_2, out, norm, biases, blocks, tiles,
    KEPT: gl.constexpr, X_STAGES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Descriptors of x and out [64 tiles, C] and weights [HIDDEN * blocks, C] and [C, HIDDEN * blocks].

    biases: of both linears. At least STAGES blocks.
    """
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
