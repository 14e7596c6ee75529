"""End of a gated attention in Gluon for compute capability 9.0; twin: ``ops.gated_output._forward_kernel``.

A consumer uses its slots per tile of rows in this order: o, gate, x. The slot of x is written in place with the result
and goes back to the loader when the copy engine has read that, during the next tile.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma

from scalefold.kernels.hopper.parts import (
    ROWS,
    SIDES,
    load_dropout,
    make_barrier,
    make_ring,
    operand_layout,
    per_column,
    product_layout,
    publish_barriers,
    read_tile,
    sigmoid,
    store_staged,
    stores_left,
    tile_layout,
)


@gluon.jit
def _load_tile(x, o, gate, ring, tile, side, n):
    ring.load(o, tile * ROWS, 0, side, n)
    ring.load(gate, tile * ROWS, 0, side, n + 1)
    ring.load(x, tile * ROWS, 0, side, n + 2)


@gluon.jit
def _load(x, o, gate, weight, ring, weights, there, tiles, C: gl.constexpr):
    mbarrier.expect(there, C * C * 2)
    tma.async_copy_global_to_shared(weight, [0, 0], there, weights)
    n = 0
    for tile in range(gl.program_id(0) * SIDES, tiles, gl.num_programs(0) * SIDES):
        _load_tile(x, o, gate, ring, tile, 0, n)
        if tile + 1 < tiles:
            _load_tile(x, o, gate, ring, tile + 1, 1, n)
        n += 3


@gluon.jit
def _output(
    bias, dropout, dropout_strides, dims, out, ring, weights, there, tiles,
    SIDE: gl.constexpr, C: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    mbarrier.wait(there, 0)
    n = 0
    for tile in range(gl.program_id(0) * SIDES + SIDE, tiles, gl.num_programs(0) * SIDES):
        o = read_tile(ring.wait(SIDE, n), C, False)
        opening = sigmoid(read_tile(ring.wait(SIDE, n + 1), C, False))
        left = gl.convert_layout((o * opening).to(gl.bfloat16), operand_layout(BLOCK_N))
        ring.release(SIDE, n)
        mbarrier.arrive(ring.empty.index(ring.place(SIDE, n + 1)), count=1)
        stores_left(0)
        if n > 0:
            mbarrier.arrive(ring.empty.index(ring.place(SIDE, n - 1)), count=1)
        slot = ring.wait(SIDE, n + 2)
        for first in gl.static_range(0, C, BLOCK_N):
            if dropout is not None:
                scale = load_dropout(dropout, tile, first, dims, dropout_strides, BLOCK_N)
            acc = gl.zeros([ROWS, BLOCK_N], gl.float32, product_layout(BLOCK_N))
            acc = warpgroup_mma(left, weights.slice(first, BLOCK_N, 0).permute((1, 0)), acc, use_acc=False)
            acc += per_column(bias, first, BLOCK_N)
            if dropout is not None:
                acc *= scale
            own = slot.slice(first, BLOCK_N, 1)
            acc += own.load(product_layout(BLOCK_N)).to(gl.float32)
            gl.thread_barrier()
            own.store(acc.to(gl.bfloat16))
        store_staged(out, tile * ROWS, 0, slot)
        n += 3
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["tiles"])
def gated_program(
    x, o, gate, weight, bias, dropout, dropout_strides, dims, out, tiles,
    C: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """x, o, gate: [64 tiles, C], weight: [C, C] -> out = x + dropout * (W (sigmoid(gate) * o) + b): [64 tiles, C]."""
    ring = make_ring(STAGES, C)
    weights = gl.allocate_shared_memory(gl.bfloat16, [C, C], tile_layout(C, C))
    there = make_barrier()
    publish_barriers()
    gl.warp_specialize(
        [
            (_output, (bias, dropout, dropout_strides, dims, out, ring, weights, there, tiles, 0, C, BLOCK_N)),
            (_output, (bias, dropout, dropout_strides, dims, out, ring, weights, there, tiles, 1, C, BLOCK_N)),
            (_load, (x, o, gate, weight, ring, weights, there, tiles, C)),
        ],
        [4, 4],
        [REGISTERS, 24],
    )
