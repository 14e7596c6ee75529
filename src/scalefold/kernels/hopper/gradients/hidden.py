"""Gradient of a transition of the MSA for Hopper in Gluon, hidden layer and its gradient stored; twin: that of
``hopper.transition``, whose weights have fewer slots in wider blocks.

Blocks of NARROW hidden channels stream by, that of weight 2 before that of weight 1, which is needed longer: the slots
of a step are free again in the order in which the next ones are wanted.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false
# The type checker takes Gluon's programs for Python.

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from scalefold.kernels import hopper
from scalefold.kernels.hopper.gradients.norm import sum_tile
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
from scalefold.kernels.hopper.transition import store_sums
from scalefold.kernels.instructions import program, wait_for_predecessors

NARROW = gl.constexpr(hopper.HIDDEN_BLOCK // 2)
SLOTS = gl.constexpr(5)  # for blocks of the weights


class Blocks(NamedTuple):
    """Slots for blocks [NARROW, C] of weight 1 and, written otherwise, [C, NARROW] of weight 2, in turns."""

    slots: Any
    full: Any
    empty: Any


@gluon.jit
def _as_second(tile, descriptor):
    """A slot as a block of weight 2."""
    return tile._reinterpret(gl.bfloat16, descriptor.block_type.shape, descriptor.layout)


@gluon.jit
def _open(blocks, use, BYTES: gl.constexpr):
    """The loader: the slot of a use, once it is free, and its barrier, which awaits its bytes."""
    slot = use % SLOTS
    mbarrier.wait(blocks.empty.index(slot), ((use // SLOTS) & 1) ^ 1)
    mbarrier.expect(blocks.full.index(slot), BYTES)
    return blocks.slots.index(slot), blocks.full.index(slot)


@gluon.jit
def _fetch(descriptors, rings, blocks, count, tiles):
    """The loader: for each pair of tiles all blocks of the weights; x and d_out with the last that need no leave."""
    x, d_out, weight_1, weight_2 = descriptors
    n = 0
    use = 0
    for tile in range(gl.program_id(0) * CONSUMERS, tiles, gl.num_programs(0) * CONSUMERS):
        for block in range(count):
            slot, full = _open(blocks, use, weight_2.block_type.nbytes)
            tma.async_copy_global_to_shared(weight_2, [0, block * NARROW], full, _as_second(slot, weight_2))
            slot, full = _open(blocks, use + 1, weight_1.block_type.nbytes)
            tma.async_copy_global_to_shared(weight_1, [block * NARROW, 0], full, slot)
            use += 2
            if block == SLOTS // 2 - 1:
                for side in gl.static_range(CONSUMERS):
                    if tile + side < tiles:
                        fetch(rings[0], x, (tile + side) * ROWS, 0, side, n)
                        fetch(rings[1], d_out, (tile + side) * ROWS, 0, side, n)
        n += 1  # noqa: SIM113


@gluon.jit
def _there(blocks, use):
    """A consumer: the slot of a use, once its block is there."""
    mbarrier.wait(blocks.full.index(use % SLOTS), (use // SLOTS) & 1)
    return blocks.slots.index(use % SLOTS)


@gluon.jit
def _hidden_sums(tile):
    """Sums over the rows of a tile [ROWS, NARROW], in all rows; unfinished."""
    ones = gl.full([ROWS, ROWS], 1.0, gl.bfloat16, operand_layout(NARROW))
    acc = gl.zeros([ROWS, NARROW], gl.float32, product_layout(NARROW))
    return warpgroup_mma(ones, tile, acc, use_acc=False, is_async=True)


@gluon.jit
def _hidden_and_gradient(x, d_out, blocks, use, second, bias, block):
    """A block of the hidden layer and its gradient, in bf16: [ROWS, NARROW] each."""
    shift = per_column(bias, block * NARROW, NARROW)
    d = gl.zeros([ROWS, NARROW], gl.float32, product_layout(NARROW))
    hidden = gl.zeros([ROWS, NARROW], gl.float32, product_layout(NARROW))
    d = warpgroup_mma(d_out, _as_second(_there(blocks, use), second), d, use_acc=False, is_async=True)
    hidden = warpgroup_mma(x, _there(blocks, use + 1).permute((1, 0)), hidden, use_acc=False, is_async=True)
    d, hidden = warpgroup_mma_wait(0, deps=(d, hidden))
    hidden = gl.maximum(hidden + shift, 0.0).to(gl.bfloat16)
    return hidden, gl.where(hidden > 0.0, d, 0.0).to(gl.bfloat16)


@gluon.jit
def _differentiate(shared, SIDE: gl.constexpr):
    """A consumer. The last pair of tiles may be one: then the second consumer only lets blocks pass."""
    outs, norm, bias, partials, rings, blocks, second, staged, count, tiles = shared
    hidden_out, d_hidden_out, normed_out, d_normed_out = outs
    C: gl.constexpr = blocks.slots.shape[2]
    own_hidden, own_d = staged.index(2 * SIDE), staged.index(2 * SIDE + 1)
    n = 0
    use = 0
    for pair in range(gl.program_id(0) * CONSUMERS, tiles, gl.num_programs(0) * CONSUMERS):
        tile = pair + SIDE
        if tile < tiles:
            sums = partials + tile.to(gl.int64) * (C + count * NARROW)
            x = receive(rings[0], SIDE, n)
            value = normalised(read(x), norm)
            group_barrier()
            x.store(value)
            send(normed_out, tile * ROWS, 0, x)
            d_out = receive(rings[1], SIDE, n)
            sum_tile(d_out, sums)
            acc = gl.zeros([ROWS, C], gl.float32, product_layout(C))
            for block in range(count):
                hidden, d = _hidden_and_gradient(x, d_out, blocks, use, second, bias, block)
                wait_until_sent(0)
                mbarrier.arrive(blocks.empty.index(use % SLOTS), count=1)
                own_hidden.store(hidden)
                own_d.store(d)
                send(hidden_out, tile * ROWS, block * NARROW, own_hidden)
                tma.async_copy_shared_to_global(d_hidden_out, [tile * ROWS, block * NARROW], own_d)
                slot = (use + 1) % SLOTS
                acc = warpgroup_mma(
                    gl.convert_layout(d, operand_layout(C)), blocks.slots.index(slot), acc, is_async=True
                )
                total = _hidden_sums(own_d)
                acc, total = warpgroup_mma_wait(0, deps=(acc, total))
                group_barrier()
                mbarrier.arrive(blocks.empty.index(slot), count=1)
                store_sums(sums + C + block * NARROW, total)
                use += 2
            wait_until_sent(0)
            leave(rings[1], SIDE, n)
            x.store(acc.to(gl.bfloat16))
            send(d_normed_out, tile * ROWS, 0, x)
            wait_until_sent(0)
            leave(rings[0], SIDE, n)
        else:
            for _ in range(2 * count):
                _there(blocks, use)
                group_barrier()
                mbarrier.arrive(blocks.empty.index(use % SLOTS), count=1)
                use += 1
        n += 1  # noqa: SIM113
    tma.store_wait(0)


@program
@gluon.jit(do_not_specialize=["count", "tiles"])
def hopper_transition_hidden(
    x, d_out, weight_1, weight_2, hidden, d_hidden, normed, d_normed, norm, bias, partials, count, tiles
):  # fmt: skip
    """``hopper_transition_gradient`` with ``count`` blocks of NARROW hidden channels, at least SLOTS // 2."""
    wait_for_predecessors()
    rings = (new_ring(x, 1), new_ring(d_out, 1))
    blocks = Blocks(tiles_for(weight_1, SLOTS), one_arrival(SLOTS), initialised(SLOTS, CONSUMERS))
    staged = tiles_for(hidden, 2 * CONSUMERS)
    publish()
    outs = (hidden, d_hidden, normed, d_normed)
    shared = (outs, norm, bias, partials, rings, blocks, weight_2, staged, count, tiles)
    gl.warp_specialize(
        [
            (_differentiate, (shared, 0)),
            (_differentiate, (shared, 1)),
            (_fetch, ((x, d_out, weight_1, weight_2), rings, blocks, count, tiles)),
        ],
        [4, 4],
        [240, 24],
    )
