"""Gradients of keys, values and scores of attention with a bias, for Hopper in Gluon.

A program owns 128 keys of a head and walks over rows; its bias, [keys, queries], stays in shared memory. Scores are
[keys, queries] as well, so that weights and their gradients are left operands of products where they are, in registers.
The producer, which would idle, sums o * do of every query (delta) on its way. Gradients of scores leave by the copy
engine, and in the tiles that they leave from those of keys and values follow.
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
    Place,
    flat,
    group_barrier,
    load_keep,
    new_barriers,
    row_of,
    tiles_for,
)
from scalefold.kernels.instructions import program, wait_for_predecessors

LINE = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))  # of one value per query or key, in registers


@gluon.jit
def place_among(rows, groups):
    """What a program does; ``first``: the first of rows ``groups`` apart, so that all programs are at neighbours."""
    first = gl.program_id(2) % groups
    count = (rows - first + groups - 1) // groups
    return Place(gl.program_id(2) // groups, gl.program_id(1), first, count, gl.program_id(0) * CONSUMERS * PART)


@gluon.jit
def fetch_row(given, SCALE: gl.constexpr, STAGES: gl.constexpr, STEPS: gl.constexpr):
    """The producer: all queries, outputs and their gradients of a row, the consumers' keys and values, their mask, and
    two statistics of queries.

    ``full`` of a stage is completed by the last byte that consumers read and by the arrival of this group, after it has
    stored mask and statistics; ``brought`` by the last byte of outputs and their gradients, which delta needs. What
    mask and statistics come from is on its way while the group waits for the slot: latency is no part of a row's time.
    """
    descriptors, tiles, barriers, place, groups, mask, statistics = given
    q_desc, do_desc, o_desc, k_desc, v_desc = descriptors
    q_s, do_s, o_s, k_s, v_s, exponent_s, delta_s, shift_s, factor_s = tiles
    full, empty, brought = barriers
    BLOCK_Q: gl.constexpr = q_desc.block_type.shape[2]
    FACTOR: gl.constexpr = SCALE * LOG2_E
    exponents = exponent_s._reinterpret(gl.float32, [STAGES, STEPS * BLOCK_Q], exponent_s.layout)
    shifts = shift_s._reinterpret(gl.float32, [STAGES, CONSUMERS * PART], shift_s.layout)
    for i in range(place.count):
        stage = i % STAGES
        s = place.first + i * groups
        exponent = _exponents(statistics, place, s, mask.inf, STEPS * BLOCK_Q)
        keep = load_keep(mask, place.b, s, place.line + gl.arange(0, CONSUMERS * PART, layout=LINE))
        is_empty = gl.load(statistics.lse + row_of(statistics, place, s) * statistics.n) < -0.5 * mask.inf
        mbarrier.wait(empty.index(stage), ((i // STAGES) & 1) ^ 1)
        mbarrier.expect(brought.index(stage), STEPS * (o_desc.block_type.nbytes + do_desc.block_type.nbytes))
        mbarrier.expect(full.index(stage), STEPS * q_desc.block_type.nbytes + 2 * CONSUMERS * k_desc.block_type.nbytes)
        for step in gl.static_range(STEPS):
            at = [place.b, s, step * BLOCK_Q, place.h, 0]
            slot = stage * STEPS + step
            tma.async_copy_global_to_shared(do_desc, at, brought.index(stage), do_s.index(slot))
            tma.async_copy_global_to_shared(o_desc, at, brought.index(stage), o_s.index(step))
            tma.async_copy_global_to_shared(q_desc, at, full.index(stage), q_s.index(slot))
        for part in gl.static_range(CONSUMERS):
            at = [place.b, s, place.line + part * PART, place.h, 0]
            slot = stage * CONSUMERS + part
            tma.async_copy_global_to_shared(k_desc, at, full.index(stage), k_s.index(slot))
            tma.async_copy_global_to_shared(v_desc, at, full.index(stage), v_s.index(slot))
        exponents.index(stage).store(exponent)
        shifts.index(stage).store(keep * mask.inf - mask.inf)
        factor_s.index(stage).store(gl.full([1], gl.where(is_empty, 0.0, FACTOR), gl.float32, LINE))
        mbarrier.wait(brought.index(stage), (i // STAGES) & 1)
        for step in gl.static_range(STEPS):
            slot = stage * STEPS + step
            delta_s.index(slot).store(_delta(flat(o_s.index(step)), flat(do_s.index(slot))))
        fence_async_shared()
        group_barrier()
        mbarrier.arrive(full.index(stage), count=1)


@gluon.jit
def _exponents(statistics, place, s, inf, COUNT: gl.constexpr):
    """What is added to scores in base 2 to make them exponents of the weights: -lse, and minus infinity beyond n.

    In a row without any key left all weights of a query are equal: rest, whose logarithm stands here.
    """
    queries = gl.arange(0, COUNT, layout=LINE)
    offsets = row_of(statistics, place, s) * statistics.n + queries
    lse = gl.load(statistics.lse + offsets, mask=queries < statistics.n, other=float("inf"))
    rest = gl.load(statistics.rest + offsets, mask=queries < statistics.n, other=1.0)
    return gl.where(lse < -0.5 * inf, gl.log2(rest), -lse)


@gluon.jit
def _delta(o, do):
    """Minus the sum of o * do over the channels of each query, both in shared memory."""
    WIDTH: gl.constexpr = o.shape[1] // 8  # lanes of a query
    READ: gl.constexpr = gl.BlockedLayout([1, 8], [32 // WIDTH, WIDTH], [4, 1], [1, 0])
    return -gl.sum(o.load(READ).to(gl.float32) * do.load(READ).to(gl.float32), 1)


@gluon.jit
def _keep_bias(bias, strides, tiles, place, n, line, FIRST: gl.constexpr, STEPS: gl.constexpr):
    """Bias of this consumer's keys and all queries, transposed on its way into shared memory.

    A lane reads 8 keys of one query; the 32 queries of a warp then lie side by side.
    """
    BLOCK_Q: gl.constexpr = tiles.shape[2]
    READ: gl.constexpr = gl.BlockedLayout([8, 1], [1, 32], [4, 1], [0, 1])
    keys = line + gl.arange(0, PART, layout=gl.SliceLayout(1, READ))
    base = bias + place.b.to(gl.int64) * strides[0] + place.h * strides[1]
    found = ()  # all on their way before the first is waited for
    for step in gl.static_range(STEPS):
        queries = step * BLOCK_Q + gl.arange(0, BLOCK_Q, layout=gl.SliceLayout(0, READ))
        inside = (keys < n)[:, None] & (queries < n)[None, :]
        found += (gl.load(base + queries[None, :] * strides[2] + keys[:, None], mask=inside, other=0.0),)
    for step in gl.static_range(STEPS):
        tiles.index(FIRST + step).store(found[step])
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
    descriptors, tiles, bias_s, ds_s, barriers, place, groups, bias, bias_strides, statistics = shared
    dk_desc, dv_desc, ds_desc = descriptors
    q_s, do_s, _o_s, k_s, v_s, exponent_s, delta_s, shift_s, factor_s = tiles
    full, empty, brought = barriers
    BLOCK_Q: gl.constexpr = q_s.shape[3]
    D: gl.constexpr = q_s.shape[5]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_Q, 16])
    RESULT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=RESULT, k_width=2)
    line = place.line + GROUP * PART
    _keep_bias(bias, bias_strides, bias_s, place, statistics.n, line, GROUP * STEPS, STEPS)
    for i in range(place.count):
        stage = i % STAGES
        s = place.first + i * groups
        mbarrier.wait(brought.index(stage), (i // STAGES) & 1)
        mbarrier.wait(full.index(stage), (i // STAGES) & 1)
        shift = shift_s.index(stage * CONSUMERS + GROUP).load(gl.SliceLayout(1, SCORES))
        factor = gl.max(factor_s.index(stage).load(LINE), 0)
        key = flat(k_s.index(stage * CONSUMERS + GROUP))
        value = flat(v_s.index(stage * CONSUMERS + GROUP))
        first = stage * STEPS
        turn = i * (STEPS + 1)  # of the tiles that leave
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
            out = ds_s.index(2 * GROUP + (turn + step) % 2)
            tma.store_wait(2 if step == 0 else 1)  # the store before the last one, which may be of dk and dv, has read
            group_barrier()
            out.reshape([PART, BLOCK_Q]).store(d_scores)
            fence_async_shared()
            group_barrier()
            head = (place.b * statistics.rows + s) * statistics.heads + place.h
            tma.async_copy_shared_to_global(ds_desc, [head, line, step * BLOCK_Q], out)
        dv, dk = warpgroup_mma_wait(0, deps=[dv, dk])
        group_barrier()  # all four warps have read the slot
        mbarrier.arrive(empty.index(stage), count=1)
        tma.store_wait(1)
        group_barrier()
        out = ds_s.index(2 * GROUP + (turn + STEPS) % 2)._reinterpret(
            dk_desc.dtype, [2] + dk_desc.block_type.shape, dk_desc.layout
        )
        flat(out.index(0)).store((dk * SCALE).to(dk_desc.dtype))
        flat(out.index(1)).store(dv.to(dv_desc.dtype))
        fence_async_shared()
        group_barrier()
        at = [place.b, s, line, place.h, 0]
        tma.async_copy_shared_to_global(dk_desc, at, out.index(0))
        tma.async_copy_shared_to_global(dv_desc, at, out.index(1))
    tma.store_wait(0)


@program
@gluon.jit(do_not_specialize=["rows", "groups"])
def hopper_keys(
    q_desc, do_desc, o_desc, k_desc, v_desc, dk_desc, dv_desc, ds_desc,
    bias, bias_strides, mask, statistics, rows, groups,
    SCALE: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """Descriptors of [B, S, N, H, D] and, ds, of [B * S * H, N keys, N queries]; bias: [B, H, N, N] with strides
    (B, H, N).
    """
    wait_for_predecessors()
    place = place_among(rows, groups)
    BLOCK_Q: gl.constexpr = q_desc.block_type.shape[2]
    STEPS: gl.constexpr = KEYS // BLOCK_Q
    DENSE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    SQUARE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([PART, BLOCK_Q], gl.bfloat16)
    q_s, do_s, o_s = tiles_for(q_desc, STAGES * STEPS), tiles_for(do_desc, STAGES * STEPS), tiles_for(o_desc, STEPS)
    k_s, v_s = tiles_for(k_desc, STAGES * CONSUMERS), tiles_for(v_desc, STAGES * CONSUMERS)
    exponent_s = gl.allocate_shared_memory(gl.float32, [STAGES * STEPS, BLOCK_Q], DENSE)
    delta_s = gl.allocate_shared_memory(gl.float32, [STAGES * STEPS, BLOCK_Q], DENSE)
    shift_s = gl.allocate_shared_memory(gl.float32, [STAGES * CONSUMERS, PART], DENSE)
    factor_s = gl.allocate_shared_memory(gl.float32, [STAGES, 1], DENSE)
    bias_s = gl.allocate_shared_memory(bias.dtype.element_ty, [CONSUMERS * STEPS, PART, BLOCK_Q], SQUARE)
    ds_s = tiles_for(ds_desc, 2 * CONSUMERS)
    tiles = (q_s, do_s, o_s, k_s, v_s, exponent_s, delta_s, shift_s, factor_s)
    barriers = (new_barriers(STAGES, 2), new_barriers(STAGES, CONSUMERS), new_barriers(STAGES, 1))
    given = ((q_desc, do_desc, o_desc, k_desc, v_desc), tiles, barriers, place, groups, mask, statistics)
    outs = (dk_desc, dv_desc, ds_desc)
    shared = (outs, tiles, bias_s, ds_s, barriers, place, groups, bias, bias_strides, statistics)
    gl.warp_specialize(
        [
            (_differentiate, (shared, 0, SCALE, STAGES, STEPS)),
            (_differentiate, (shared, 1, SCALE, STAGES, STEPS)),
            (fetch_row, (given, SCALE, STAGES, STEPS)),
        ],
        [4, 4],
        [REGISTERS, 504 - 2 * REGISTERS],
    )
