"""Layer norm, four projections and an attention bias, forward, for Hopper in Gluon; twin: ``ops.linear``'s program."""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false
# The type checker takes Gluon's programs for Python.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma

from scalefold.kernels.hopper.pieces import CONSUMERS, publish, tiles_for
from scalefold.kernels.hopper.row_pieces import (
    COLUMNS,
    ROWS,
    fetch_rows,
    leave,
    new_ring,
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
