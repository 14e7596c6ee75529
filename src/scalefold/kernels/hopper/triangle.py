"""Triangle multiplication in Gluon for compute capability 9.0: operands, output, gates of the output's gradient; twins
in ``ops.triangle``.

All weights stay in shared memory. Where a slot is written in place with an output, it goes back to the loader when the
copy engine has read that, during the next tile.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from scalefold.kernels.hopper.parts import (
    ROWS,
    SIDES,
    load_dropout,
    make_barrier,
    make_ring,
    normed_tile,
    operand_layout,
    per_column,
    product_layout,
    publish_barriers,
    read_tile,
    row_offsets,
    sigmoid,
    store_staged,
    stores_left,
    tile_layout,
)


@gluon.jit
def _load_weights(descs, weights, there, COUNT: gl.constexpr, C: gl.constexpr):
    """Loader: COUNT weights [C, C], once."""
    mbarrier.expect(there, COUNT * C * C * 2)
    for i in gl.static_range(COUNT):
        tma.async_copy_global_to_shared(descs[i], [0, 0], there, weights.index(i))


@gluon.jit
def _gate_and_value(
    left_gate, left_value, gate_weight, value_weight, gate_bias, value_bias, first: gl.constexpr, N: gl.constexpr
):  # fmt: skip
    """Both products for output channels first .. first + N, with their biases: [64, N] each."""
    gate = gl.zeros([ROWS, N], gl.float32, product_layout(N))
    value = gl.zeros([ROWS, N], gl.float32, product_layout(N))
    gate = warpgroup_mma(left_gate, gate_weight.slice(first, N, 0).permute((1, 0)), gate, use_acc=False, is_async=True)
    value = warpgroup_mma(
        left_value, value_weight.slice(first, N, 0).permute((1, 0)), value, use_acc=False, is_async=True
    )
    gate, value = warpgroup_mma_wait(0, deps=(gate, value))
    return gate + per_column(gate_bias, first, N), value + per_column(value_bias, first, N)


# ---- operands -------------------------------------------------------------------------------------------------------


@gluon.jit
def _load_pairs(z, weight_descs, ring, weights, there, tiles, C: gl.constexpr):
    _load_weights(weight_descs, weights, there, 4, C)
    n = 0
    for tile in range(gl.program_id(0) * SIDES, tiles, gl.num_programs(0) * SIDES):
        ring.load(z, tile * ROWS, 0, 0, n)
        if tile + 1 < tiles:
            ring.load(z, (tile + 1) * ROWS, 0, 1, n)
        n += 1  # noqa: SIM113


@gluon.jit
def _project(
    mask, mask_strides, dims, norm_weight, norm_bias, biases, outs, ring, weights, staged, there, tiles,
    SIDE: gl.constexpr, C: gl.constexpr, BLOCK_N: gl.constexpr, STAGED: gl.constexpr,
):  # fmt: skip
    """A consumer: sigmoid(gate) * value * mask of both operands, turned on their way through shared memory."""
    mbarrier.wait(there, 0)
    n = 0
    for tile in range(gl.program_id(0) * SIDES + SIDE, tiles, gl.num_programs(0) * SIDES):
        rows = tile * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, product_layout(BLOCK_N)))
        keep = gl.load(mask + row_offsets(rows, dims, mask_strides)).to(gl.float32)
        z = read_tile(ring.wait(SIDE, n), C, False)
        ring.release(SIDE, n)
        left = gl.convert_layout(normed_tile(z, norm_weight, norm_bias, C), operand_layout(BLOCK_N))
        for operand in gl.static_range(2):
            for first in gl.static_range(0, C, BLOCK_N):
                gate, value = _gate_and_value(
                    left, left, weights.index(2 * operand + 1), weights.index(2 * operand), biases[2 * operand + 1],
                    biases[2 * operand], first, BLOCK_N,
                )  # fmt: skip
                own = staged.index(SIDE * STAGED + (operand * C + first) // BLOCK_N % STAGED)
                stores_left(STAGED - 1)
                own.permute((1, 0)).store((sigmoid(gate) * value * keep[:, None]).to(gl.bfloat16))
                store_staged(outs[operand], first, tile * ROWS, own)
        n += 1  # noqa: SIM113
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["tiles"])
def operands_program(
    z, mask, mask_strides, dims, norm_weight, norm_bias, weight_a, weight_a_gate, weight_b, weight_b_gate, biases,
    out_a, out_b, tiles,
    C: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, STAGED: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """z: [64 tiles, C], weights [C, C] -> operands a and b [C, 64 tiles]. biases: of the weights in their order."""
    ring = make_ring(STAGES, C)
    weights = gl.allocate_shared_memory(gl.bfloat16, [4, C, C], tile_layout(C, C))
    staged = gl.allocate_shared_memory(gl.bfloat16, [SIDES * STAGED, BLOCK_N, ROWS], tile_layout(BLOCK_N, ROWS))
    there = make_barrier()
    publish_barriers()
    weight_descs = (weight_a, weight_a_gate, weight_b, weight_b_gate)  # a launch takes no tuple of these
    outs = (out_a, out_b)
    gl.warp_specialize(
        [
            (
                _project,
                (
                    mask, mask_strides, dims, norm_weight, norm_bias, biases, outs, ring, weights, staged, there, tiles,
                    0, C, BLOCK_N, STAGED,
                ),
            ),
            (
                _project,
                (
                    mask, mask_strides, dims, norm_weight, norm_bias, biases, outs, ring, weights, staged, there, tiles,
                    1, C, BLOCK_N, STAGED,
                ),
            ),
            (_load_pairs, (z, weight_descs, ring, weights, there, tiles, C)),
        ],
        [4, 4],
        [REGISTERS, 24],
    )  # fmt: skip


# ---- output and the gates of its gradient ---------------------------------------------------------------------------


@gluon.jit
def _load_output_tile(z, x, d_out, ring, tile, side, n, C: gl.constexpr):
    ring.load(z, tile * ROWS, 0, side, n)
    ring.load_columns(x, tile * ROWS, 0, side, n + 1, C)
    if d_out is not None:
        ring.load(d_out, tile * ROWS, 0, side, n + 2)


@gluon.jit
def _load_outputs(z, x, d_out, weight_descs, ring, weights, there, tiles, C: gl.constexpr):
    _load_weights(weight_descs, weights, there, 2, C)
    n = 0
    for tile in range(gl.program_id(0) * SIDES, tiles, gl.num_programs(0) * SIDES):
        _load_output_tile(z, x, d_out, ring, tile, 0, n, C)
        if tile + 1 < tiles:
            _load_output_tile(z, x, d_out, ring, tile + 1, 1, n, C)
        n += 2 if d_out is None else 3


@gluon.jit
def _output(
    norms, biases, dropout, dropout_strides, dims, d_out, out, ring, weights, there, tiles,
    SIDE: gl.constexpr, C: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """A consumer. Forward (d_out None): z is written over with z + dropout * sigmoid(gate) * value. Backward: z and
    d_out are written over with the gradients of value and gate."""
    mbarrier.wait(there, 0)
    n = 0
    for tile in range(gl.program_id(0) * SIDES + SIDE, tiles, gl.num_programs(0) * SIDES):
        z_slot = ring.wait(SIDE, n)
        left_z = normed_tile(read_tile(z_slot, C, False), norms[0], norms[1], C)
        left_z = gl.convert_layout(left_z, operand_layout(BLOCK_N))
        if n > 0:  # the copy engine has long read the outputs of the last tile
            stores_left(0)
            if d_out is None:
                mbarrier.arrive(ring.empty.index(ring.place(SIDE, n - 2)), count=1)
            else:
                mbarrier.arrive(ring.empty.index(ring.place(SIDE, n - 3)), count=1)
                mbarrier.arrive(ring.empty.index(ring.place(SIDE, n - 1)), count=1)
        left_x = normed_tile(read_tile(ring.wait(SIDE, n + 1), C, True), norms[2], norms[3], C)
        left_x = gl.convert_layout(left_x, operand_layout(BLOCK_N))
        ring.release(SIDE, n + 1)
        d_slot = z_slot
        if d_out is not None:
            d_slot = ring.wait(SIDE, n + 2)
        for first in gl.static_range(0, C, BLOCK_N):
            if dropout is not None:
                scale = load_dropout(dropout, tile, first, dims, dropout_strides, BLOCK_N)
            gate, value = _gate_and_value(
                left_z, left_x, weights.index(1), weights.index(0), biases[1], biases[0], first, BLOCK_N
            )
            gate = sigmoid(gate)
            own = z_slot.slice(first, BLOCK_N, 1)
            if d_out is None:
                update = gate * value
                if dropout is not None:
                    update *= scale
                update += own.load(product_layout(BLOCK_N)).to(gl.float32)
                gl.thread_barrier()
                own.store(update.to(gl.bfloat16))
            else:
                d_own = d_slot.slice(first, BLOCK_N, 1)
                d = d_own.load(product_layout(BLOCK_N)).to(gl.float32) * gate
                if dropout is not None:
                    d *= scale
                gl.thread_barrier()
                own.store(d.to(gl.bfloat16))
                d_own.store((d * value * (1.0 - gate)).to(gl.bfloat16))
        store_staged(out, tile * ROWS, 0, z_slot)
        if d_out is not None:
            tma.async_copy_shared_to_global(out, [tile * ROWS, C], d_slot)
        n += 2 if d_out is None else 3
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["tiles"])
def output_program(
    z, x, norms, weight_value, weight_gate, biases, dropout, dropout_strides, dims, d_out, out, tiles,
    C: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """z: [64 tiles, C], x: [C, 64 tiles], weights of value and gate -> out: [64 tiles, C], or with d_out: [64 tiles, C]
    the gradients of value and gate logits [64 tiles, 2 C].

    norms: weight and bias of the norm of z, then of x. dropout: fp32 scales by rows and columns, or None.
    """
    ring = make_ring(STAGES, C)
    weights = gl.allocate_shared_memory(gl.bfloat16, [2, C, C], tile_layout(C, C))
    there = make_barrier()
    publish_barriers()
    weight_descs = (weight_value, weight_gate)
    gl.warp_specialize(
        [
            (
                _output,
                (
                    norms, biases, dropout, dropout_strides, dims, d_out, out, ring, weights, there, tiles, 0, C,
                    BLOCK_N,
                ),
            ),
            (
                _output,
                (
                    norms, biases, dropout, dropout_strides, dims, d_out, out, ring, weights, there, tiles, 1, C,
                    BLOCK_N,
                ),
            ),
            (_load_outputs, (z, x, d_out, weight_descs, ring, weights, there, tiles, C)),
        ],
        [4, 4],
        [REGISTERS, 24],
    )  # fmt: skip
