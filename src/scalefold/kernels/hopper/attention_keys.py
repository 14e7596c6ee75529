"""Gradients of keys, values and scores of attention with a bias, for Hopper in Gluon.

A program owns 128 keys of a head and walks over rows; its bias, [keys, queries], stays in shared memory. Scores are
[keys, queries] as well, so that weights and their gradients are left operands of products where they are, in registers.
The producer, which would idle, sums o * do of every query (delta) on its way. Gradients of scores leave by the copy
engine.
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

from scalefold.kernels.hopper.pieces import (
    CONSUMERS,
    LOG2_E,
    PART,
    flat,
    group_barrier,
    load_keep,
    new_barriers,
    place_of,
    row_of,
    tiles_for,
)
from scalefold.kernels.instructions import wait_for_predecessors


@gluon.jit
def _fetch(
    descriptors, tiles, full, empty, place, outputs, statistics, inf,
    D: gl.constexpr, STAGES: gl.constexpr, STEPS: gl.constexpr,
):  # fmt: skip
    """The producer: all queries and output gradients of a row, the consumers' keys and values, and two statistics.

    ``full`` of a stage is completed by the last byte that the copy engine brings and by the arrival of this group,
    after it has stored the statistics of all queries.
    """
    q_desc, do_desc, k_desc, v_desc = descriptors
    q_s, do_s, k_s, v_s, exponent_s, delta_s = tiles
    BLOCK_Q: gl.constexpr = q_desc.block_type.shape[2]
    BYTES: gl.constexpr = 2 * (CONSUMERS * PART + STEPS * BLOCK_Q) * k_desc.block_type.shape[4] * 2
    for i in range(place.count):
        stage = i % STAGES
        s = place.first + i
        mbarrier.wait(empty.index(stage), ((i // STAGES) & 1) ^ 1)
        arrived = full.index(stage)
        mbarrier.expect(arrived, BYTES)
        for part in gl.static_range(CONSUMERS):
            at = [place.b, s, place.line + part * PART, place.h, 0]
            tma.async_copy_global_to_shared(k_desc, at, arrived, k_s.index(stage * CONSUMERS + part))
            tma.async_copy_global_to_shared(v_desc, at, arrived, v_s.index(stage * CONSUMERS + part))
        for step in gl.static_range(STEPS):
            at = [place.b, s, step * BLOCK_Q, place.h, 0]
            tma.async_copy_global_to_shared(q_desc, at, arrived, q_s.index(stage * STEPS + step))
            tma.async_copy_global_to_shared(do_desc, at, arrived, do_s.index(stage * STEPS + step))
        for step in range(STEPS):  # not unrolled: this group has few registers
            slot = stage * STEPS + step
            _store_exponents(exponent_s.index(slot), statistics, place, s, step * BLOCK_Q, inf, BLOCK_Q)
            _store_deltas(delta_s.index(slot), outputs, statistics.n, place, s, step * BLOCK_Q, D, BLOCK_Q)
        group_barrier()
        mbarrier.arrive(arrived, count=1)


@gluon.jit
def _store_exponents(target, statistics, place, s, start, inf, BLOCK_Q: gl.constexpr):
    """What is added to scores in base 2 to make them exponents of the weights: -lse, and minus infinity beyond n.

    In a row without any key left all weights of a query are equal: rest, whose logarithm stands here.
    """
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    queries = start + gl.arange(0, BLOCK_Q, layout=LINE)
    offsets = row_of(statistics, place, s) * statistics.n + queries
    lse = gl.load(statistics.lse + offsets, mask=queries < statistics.n, other=float("inf"))
    rest = gl.load(statistics.rest + offsets, mask=queries < statistics.n, other=1.0)
    target.store(gl.where(lse < -0.5 * inf, gl.log2(rest), -lse))


@gluon.jit
def _store_deltas(target, outputs, n, place, s, start, D: gl.constexpr, BLOCK_Q: gl.constexpr):
    """Minus the sum of o * do over the channels of each query."""
    o, o_strides, do, do_strides = outputs
    WIDTH: gl.constexpr = D // 8  # lanes of a query
    READ: gl.constexpr = gl.BlockedLayout([1, 8], [32 // WIDTH, WIDTH], [4, 1], [1, 0])
    queries = start + gl.arange(0, BLOCK_Q, layout=gl.SliceLayout(1, READ))
    value = _load_rows(o, o_strides, place, s, queries, n, D, READ)
    gradient = _load_rows(do, do_strides, place, s, queries, n, D, READ)
    target.store(-gl.sum(value * gradient, 1))


@gluon.jit
def _load_rows(pointer, strides, place, s, queries, n, D: gl.constexpr, READ: gl.constexpr):
    """fp32 [queries, D] of one head, zeros beyond n."""
    channels = gl.arange(0, D, layout=gl.SliceLayout(0, READ))
    base = pointer + place.b.to(gl.int64) * strides[0] + s.to(gl.int64) * strides[1] + place.h * strides[3]
    offsets = queries[:, None] * strides[2] + channels[None, :]
    return gl.load(base + offsets, mask=(queries < n)[:, None], other=0.0).to(gl.float32)


@gluon.jit
def _keep_bias(bias, strides, tiles, place, n, line, FIRST: gl.constexpr, STEPS: gl.constexpr):
    """Bias of this consumer's keys and all queries, transposed on its way into shared memory.

    A lane reads 8 keys of one query; the 32 queries of a warp then lie side by side.
    """
    BLOCK_Q: gl.constexpr = tiles.shape[2]
    READ: gl.constexpr = gl.BlockedLayout([8, 1], [1, 32], [4, 1], [0, 1])
    keys = line + gl.arange(0, PART, layout=gl.SliceLayout(1, READ))
    base = bias + place.b.to(gl.int64) * strides[0] + place.h * strides[1]
    for step in gl.static_range(STEPS):
        queries = step * BLOCK_Q + gl.arange(0, BLOCK_Q, layout=gl.SliceLayout(0, READ))
        inside = (keys < n)[:, None] & (queries < n)[None, :]
        tiles.index(FIRST + step).store(
            gl.load(base + queries[None, :] * strides[2] + keys[:, None], mask=inside, other=0.0)
        )
    group_barrier()


@gluon.jit
def _start(bias, shift, delta, SCALE: gl.constexpr, SCORES: gl.constexpr):
    """What the accumulators of scores / SCALE and of the weights' gradients begin with."""
    scores = bias.load(SCORES).to(gl.float32) * (1.0 / SCALE) + shift[:, None]
    gradients, _ = gl.broadcast(delta.load(gl.SliceLayout(0, SCORES))[None, :], scores)
    return scores, gradients


@gluon.jit
def _differentiate(
    shared, GROUP: gl.constexpr, SCALE: gl.constexpr, STAGES: gl.constexpr, STEPS: gl.constexpr
):  # fmt: skip
    """A consumer: gradients of its PART keys and values, and of their scores, row by row.

    Products of the next tile of queries run while the weights of this one are computed.
    """
    descriptors, tiles, full, empty, place, bias, bias_strides, mask, statistics = shared
    dk_desc, dv_desc, ds_desc = descriptors
    q_s, do_s, k_s, v_s, exponent_s, delta_s, bias_s, ds_s, out_s = tiles
    BLOCK_Q: gl.constexpr = q_s.shape[3]
    D: gl.constexpr = q_s.shape[5]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_Q, 16])
    RESULT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=RESULT, k_width=2)
    line = place.line + GROUP * PART
    keys = line + gl.arange(0, PART, layout=gl.SliceLayout(1, SCORES))
    _keep_bias(bias, bias_strides, bias_s, place, mask.n, line, GROUP * STEPS, STEPS)
    for i in range(place.count):
        stage = i % STAGES
        s = place.first + i
        row = row_of(statistics, place, s)
        shift = load_keep(mask, place.b, s, keys) * mask.inf - mask.inf
        empty_row = gl.load(statistics.lse + row * statistics.n) < -0.5 * mask.inf
        factor = gl.where(empty_row, 0.0, SCALE * LOG2_E)
        mbarrier.wait(full.index(stage), (i // STAGES) & 1)
        key = flat(k_s.index(stage * CONSUMERS + GROUP))
        value = flat(v_s.index(stage * CONSUMERS + GROUP))
        first = stage * STEPS
        dk = gl.zeros([PART, D], gl.float32, RESULT)
        dv = gl.zeros([PART, D], gl.float32, RESULT)
        scores, gradients = _start(bias_s.index(GROUP * STEPS), shift, delta_s.index(first), SCALE, SCORES)
        scores = warpgroup_mma(key, flat(q_s.index(first)).permute((1, 0)), scores, is_async=True)
        gradients = warpgroup_mma(value, flat(do_s.index(first)).permute((1, 0)), gradients, is_async=True)
        for step in gl.static_range(STEPS):
            query = flat(q_s.index(first + step))
            do = flat(do_s.index(first + step))
            exponents = exponent_s.index(first + step).load(gl.SliceLayout(0, SCORES))
            if step + 1 < STEPS:
                after = first + step + 1
                next_scores, next_gradients = _start(
                    bias_s.index(GROUP * STEPS + step + 1), shift, delta_s.index(after), SCALE, SCORES
                )
                next_scores = warpgroup_mma(key, flat(q_s.index(after)).permute((1, 0)), next_scores, is_async=True)
                next_gradients = warpgroup_mma(
                    value, flat(do_s.index(after)).permute((1, 0)), next_gradients, is_async=True
                )
                score, gradient = warpgroup_mma_wait(2, deps=[scores, gradients])
                scores = next_scores
                gradients = next_gradients
            else:
                score, gradient = warpgroup_mma_wait(0, deps=[scores, gradients])
            weights = gl.exp2(score * factor + exponents[None, :])
            dv = warpgroup_mma(gl.convert_layout(weights.to(ds_desc.dtype), WEIGHTS), do, dv, is_async=True)
            d_scores = (weights * gradient).to(ds_desc.dtype)
            dk = warpgroup_mma(gl.convert_layout(d_scores, WEIGHTS), query, dk, is_async=True)
            out = ds_s.index(2 * GROUP + step % 2)
            tma.store_wait(1)  # the store before the last one has read this tile
            group_barrier()
            out.reshape([PART, BLOCK_Q]).store(d_scores)
            fence_async_shared()
            group_barrier()
            head = (place.b * statistics.rows + s) * statistics.heads + place.h
            tma.async_copy_shared_to_global(ds_desc, [head, line, step * BLOCK_Q], out)
        dv, dk = warpgroup_mma_wait(0, deps=[dv, dk])
        group_barrier()  # all four warps have read the slot
        mbarrier.arrive(empty.index(stage), count=1)
        tma.store_wait(2)  # only the last two tiles of scores may be on their way: results of the last row have left
        group_barrier()
        flat(out_s.index(2 * GROUP)).store((dk * SCALE).to(dk_desc.dtype))
        flat(out_s.index(2 * GROUP + 1)).store(dv.to(dv_desc.dtype))
        fence_async_shared()
        group_barrier()
        at = [place.b, s, line, place.h, 0]
        tma.async_copy_shared_to_global(dk_desc, at, out_s.index(2 * GROUP))
        tma.async_copy_shared_to_global(dv_desc, at, out_s.index(2 * GROUP + 1))
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["rows", "per_program", "groups"])
def hopper_keys(
    q_desc, do_desc, k_desc, v_desc, dk_desc, dv_desc, ds_desc,
    bias, bias_strides, mask, statistics, outputs, rows, per_program, groups,
    SCALE: gl.constexpr, D: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """Descriptors of [B, S, N, H, D] and, ds, of [B * S * H, N keys, N queries]; bias: [B, H, N, N] with strides
    (B, H, N); outputs: pointers and strides (B, S, N, H) of o and do.
    """
    wait_for_predecessors()
    place = place_of(rows, groups, per_program, CONSUMERS * PART)
    BLOCK_Q: gl.constexpr = q_desc.block_type.shape[2]
    STEPS: gl.constexpr = KEYS // BLOCK_Q
    LINE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    SQUARE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([PART, BLOCK_Q], gl.bfloat16)
    q_s = tiles_for(q_desc, STAGES * STEPS)
    do_s = tiles_for(do_desc, STAGES * STEPS)
    k_s = tiles_for(k_desc, STAGES * CONSUMERS)
    v_s = tiles_for(v_desc, STAGES * CONSUMERS)
    exponent_s = gl.allocate_shared_memory(gl.float32, [STAGES * STEPS, BLOCK_Q], LINE)
    delta_s = gl.allocate_shared_memory(gl.float32, [STAGES * STEPS, BLOCK_Q], LINE)
    bias_s = gl.allocate_shared_memory(bias.dtype.element_ty, [CONSUMERS * STEPS, PART, BLOCK_Q], SQUARE)
    ds_s = tiles_for(ds_desc, 2 * CONSUMERS)
    out_s = tiles_for(dk_desc, 2 * CONSUMERS)
    full, empty = new_barriers(STAGES, 2), new_barriers(STAGES, CONSUMERS)
    own = (q_s, do_s, k_s, v_s, exponent_s, delta_s, bias_s, ds_s, out_s)
    shared = ((dk_desc, dv_desc, ds_desc), own, full, empty, place, bias, bias_strides, mask, statistics)
    inputs = (q_desc, do_desc, k_desc, v_desc)
    fetched = (q_s, do_s, k_s, v_s, exponent_s, delta_s)
    gl.warp_specialize(
        [
            (_differentiate, (shared, 0, SCALE, STAGES, STEPS)),
            (_differentiate, (shared, 1, SCALE, STAGES, STEPS)),
            (_fetch, (inputs, fetched, full, empty, place, outputs, statistics, mask.inf, D, STAGES, STEPS)),
        ],
        [4, 4],
        [REGISTERS, 504 - 2 * REGISTERS],
    )
