"""Layer norm and its projections, forward, in Gluon for compute capability 9.0; twin: ``ops.linear._forward_kernel``.

Programs take the projections in groups, as many weights at a time as shared memory holds.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma

from scalefold.kernels.hopper.parts import (
    NARROW_ROWS,
    ROWS,
    SIDES,
    make_barrier,
    make_ring,
    normed_tile,
    operand_layout,
    per_column,
    product_layout,
    publish_barriers,
    row_offsets,
    store_staged,
    stores_left,
    tile_layout,
)


@gluon.jit
def _load(
    x, weight, narrow_weight, ring, weights, narrow_weights, weights_there, group, first, step, tiles,
    CHUNKS: gl.constexpr, NARROW: gl.constexpr, C: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """The loader: this group's weights, then tiles of x for both consumers in turn."""
    mbarrier.expect(weights_there, CHUNKS * BLOCK_N * C * 2 + (NARROW_ROWS * C * 2 if NARROW > 0 else 0))
    for chunk in gl.static_range(CHUNKS):
        tma.async_copy_global_to_shared(
            weight, [(group * CHUNKS + chunk) * BLOCK_N, 0], weights_there, weights.index(chunk)
        )
    if NARROW > 0:
        tma.async_copy_global_to_shared(narrow_weight, [0, 0], weights_there, narrow_weights)
    n = 0
    for tile in range(first, tiles, step):
        ring.load(x, tile * ROWS, 0, 0, n)
        if tile + 1 < tiles:
            ring.load(x, (tile + 1) * ROWS, 0, 1, n)
        n += 1  # noqa: SIM113


@gluon.jit
def _project(
    norm_weight, norm_bias, bias, out, narrow_out, narrow_strides, dims, ring, weights, narrow_weights, staged,
    weights_there, group, first, step, tiles, bias_start,
    SIDE: gl.constexpr, WIDTH: gl.constexpr, CHUNKS: gl.constexpr, NARROW: gl.constexpr, C: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGED: gl.constexpr,
):  # fmt: skip
    """A consumer: the norm of a tile once, as the left operand in registers, then this group's columns."""
    mbarrier.wait(weights_there, 0)
    n = 0
    for tile in range(first + SIDE, tiles, step):
        x = ring.wait(SIDE, n).load(product_layout(C)).to(gl.float32)
        ring.release(SIDE, n)
        normed = normed_tile(x, norm_weight, norm_bias, C)
        left = gl.convert_layout(normed, operand_layout(BLOCK_N))
        for chunk in gl.static_range(CHUNKS):
            acc = gl.zeros([ROWS, BLOCK_N], gl.float32, product_layout(BLOCK_N))
            acc = warpgroup_mma(left, weights.index(chunk).permute((1, 0)), acc, use_acc=False)
            column = (group * CHUNKS + chunk) * BLOCK_N
            if bias is not None:  # noqa: SIM102  (this condition is the compiler's)
                if column >= bias_start:
                    acc += per_column(bias, column - bias_start, BLOCK_N)
            own = staged.index(SIDE * STAGED + chunk % STAGED)
            stores_left(STAGED - 1)
            own.store(acc.to(gl.bfloat16))
            segment = column // WIDTH
            store_staged(out, (segment * tiles + tile) * ROWS, column - segment * WIDTH, own)
        if NARROW > 0:  # noqa: SIM102
            if group == 0:
                narrow = gl.zeros([ROWS, NARROW_ROWS], gl.float32, product_layout(NARROW_ROWS))
                operand = gl.convert_layout(normed, operand_layout(NARROW_ROWS))
                narrow = warpgroup_mma(operand, narrow_weights.permute((1, 0)), narrow, use_acc=False)
                _store_narrow(narrow_out, narrow, tile, dims, narrow_strides, NARROW)
        n += 1  # noqa: SIM113
    tma.store_wait(0)


@gluon.jit
def _store_narrow(out, value, tile, dims, strides, NARROW: gl.constexpr):
    """A narrow tile [64, NARROW] by ordinary stores: its channels lie anywhere."""
    rows = tile * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, product_layout(NARROW_ROWS)))
    n = gl.arange(0, NARROW_ROWS, layout=gl.SliceLayout(0, product_layout(NARROW_ROWS)))
    offsets = row_offsets(rows, dims, strides)[:, None] + n[None, :] * strides[3]
    gl.store(out + offsets, value.to(gl.bfloat16), mask=(n < NARROW)[None, :])


@gluon.jit(do_not_specialize=["tiles"])
def project_program(
    x, norm_weight, norm_bias, weight, bias, out, narrow_weight, narrow_out, narrow_strides, dims, tiles, bias_start,
    WIDTH: gl.constexpr, CHUNKS: gl.constexpr, GROUPS: gl.constexpr, NARROW: gl.constexpr, C: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, STAGED: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """x: [64 tiles, C] -> out: [GROUPS CHUNKS BLOCK_N / WIDTH][64 tiles, WIDTH], and the narrow projection.

    Program p takes group p % GROUPS of the columns for every (programs / GROUPS)-th pair of tiles.
    """
    ring = make_ring(STAGES, C)
    weights = gl.allocate_shared_memory(gl.bfloat16, [CHUNKS, BLOCK_N, C], tile_layout(BLOCK_N, C))
    narrow_weights = weights
    if NARROW > 0:
        narrow_weights = gl.allocate_shared_memory(gl.bfloat16, [NARROW_ROWS, C], tile_layout(NARROW_ROWS, C))
    staged = gl.allocate_shared_memory(gl.bfloat16, [SIDES * STAGED, ROWS, BLOCK_N], tile_layout(ROWS, BLOCK_N))
    weights_there = make_barrier()
    publish_barriers()
    group = gl.program_id(0) % GROUPS
    first = gl.program_id(0) // GROUPS * SIDES
    step = gl.num_programs(0) // GROUPS * SIDES
    gl.warp_specialize(
        [
            (
                _project,
                (
                    norm_weight, norm_bias, bias, out, narrow_out, narrow_strides, dims, ring, weights, narrow_weights,
                    staged, weights_there, group, first, step, tiles, bias_start, 0, WIDTH, CHUNKS, NARROW, C, BLOCK_N,
                    STAGED,
                ),
            ),
            (
                _project,
                (
                    norm_weight, norm_bias, bias, out, narrow_out, narrow_strides, dims, ring, weights, narrow_weights,
                    staged, weights_there, group, first, step, tiles, bias_start, 1, WIDTH, CHUNKS, NARROW, C, BLOCK_N,
                    STAGED,
                ),
            ),
            (
                _load,
                (
                    x, weight, narrow_weight, ring, weights, narrow_weights, weights_there, group, first, step, tiles,
                    CHUNKS, NARROW, C, BLOCK_N,
                ),
            ),
        ],
        [4, 4],
        [REGISTERS, 24],
    )  # fmt: skip
