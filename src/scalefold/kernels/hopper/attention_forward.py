"""Attention forward for Hopper in Gluon: tiles by the copy engine, products by warpgroups, one pass over all keys.

A program owns 128 queries of a head and walks over rows; the bias of its queries, the same for all rows, stays in
shared memory. In fp32 and divided by SCALE (one rounding of 2^-24) it starts the accumulators of the scores.
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
    any_masked,
    flat,
    group_barrier,
    mask_shift,
    new_barriers,
    place_of,
    row_of,
    tiles_for,
)


@gluon.jit
def _fetch(descriptors, tiles, full, empty, place, STAGES: gl.constexpr, STEPS: gl.constexpr):
    """The producer: for each row the queries of all consumers and all keys and values, up to STAGES rows ahead."""
    q_desc, k_desc, v_desc = descriptors
    q_s, k_s, v_s = tiles
    BLOCK_K: gl.constexpr = k_desc.block_type.shape[2]
    BYTES: gl.constexpr = (CONSUMERS * PART + 2 * STEPS * BLOCK_K) * k_desc.block_type.shape[4] * 2
    for i in range(place.count):
        stage = i % STAGES
        s = place.first + i
        mbarrier.wait(empty.index(stage), ((i // STAGES) & 1) ^ 1)
        arrived = full.index(stage)
        mbarrier.expect(arrived, BYTES)
        for step in gl.static_range(STEPS):
            at = [place.b, s, step * BLOCK_K, place.h, 0]
            tma.async_copy_global_to_shared(k_desc, at, arrived, k_s.index(stage * STEPS + step))
        for part in gl.static_range(CONSUMERS):
            at = [place.b, s, place.line + part * PART, place.h, 0]
            tma.async_copy_global_to_shared(q_desc, at, arrived, q_s.index(stage * CONSUMERS + part))
        for step in gl.static_range(STEPS):
            at = [place.b, s, step * BLOCK_K, place.h, 0]
            tma.async_copy_global_to_shared(v_desc, at, arrived, v_s.index(stage * STEPS + step))


@gluon.jit
def _bias_tiles(bias, BLOCK_K: gl.constexpr, COUNT: gl.constexpr, WIDE: gl.constexpr):
    if WIDE:  # 4 lanes read 32 bytes of a line: the next line has its 32 bytes in the next banks
        SWAPPED: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 4, [1, 0])
        return gl.allocate_shared_memory(gl.float32, [COUNT, PART, BLOCK_K], SWAPPED)
    else:  # noqa: RET505  (the compiler looks at what follows an untaken return)
        SQUARE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([PART, BLOCK_K], gl.bfloat16)
        return gl.allocate_shared_memory(bias.dtype.element_ty, [COUNT, PART, BLOCK_K], SQUARE)


@gluon.jit
def _keep_bias(bias, strides, tiles, place, n, line, SCALE: gl.constexpr, FIRST: gl.constexpr, STEPS: gl.constexpr):
    """Bias of this consumer's queries and all keys into its tiles: in fp32 ready for use, in 16 bits as it is."""
    BLOCK_K: gl.constexpr = tiles.shape[2]
    READ: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (BLOCK_K // 8), BLOCK_K // 8], [4, 1], [1, 0])
    queries = line + gl.arange(0, PART, layout=gl.SliceLayout(1, READ))
    base = bias + place.b.to(gl.int64) * strides[0] + place.h * strides[1]
    for step in gl.static_range(STEPS):
        keys = step * BLOCK_K + gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, READ))
        inside = (queries < n)[:, None] & (keys < n)[None, :]
        values = gl.load(base + queries[:, None] * strides[2] + keys[None, :], mask=inside, other=0.0)
        if tiles.dtype == gl.float32:
            values = values.to(gl.float32) * (1.0 / SCALE)
        tiles.index(FIRST + step).store(values)
    group_barrier()


@gluon.jit
def _start(tile, SCALE: gl.constexpr, SCORES: gl.constexpr):
    """A tile of the bias in units of products."""
    values = tile.load(SCORES)
    if tile.dtype != gl.float32:
        values = values.to(gl.float32) * (1.0 / SCALE)
    return values


@gluon.jit
def _attend(
    shared, GROUP: gl.constexpr, SCALE: gl.constexpr, SAVE: gl.constexpr, STAGES: gl.constexpr, STEPS: gl.constexpr
):  # fmt: skip
    """A consumer: softmax over all keys of its PART queries, row by row."""
    o_desc, tiles, full, empty, place, bias, bias_strides, mask, statistics = shared
    q_s, k_s, v_s, o_s, bias_s = tiles
    BLOCK_K: gl.constexpr = k_s.shape[3]
    D: gl.constexpr = k_s.shape[5]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_K, 16])
    RESULT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=RESULT, k_width=2)
    line = place.line + GROUP * PART
    queries = line + gl.arange(0, PART, layout=gl.SliceLayout(1, SCORES))
    if bias is not None:
        _keep_bias(bias, bias_strides, bias_s, place, mask.n, line, SCALE, GROUP * STEPS, STEPS)
    for i in range(place.count):
        stage = i % STAGES
        s = place.first + i
        masked = any_masked(mask, place.b, s, STEPS * BLOCK_K)
        mbarrier.wait(full.index(stage), (i // STAGES) & 1)
        query = flat(q_s.index(stage * CONSUMERS + GROUP))
        products = ()
        for step in gl.static_range(STEPS):
            start = gl.zeros([PART, BLOCK_K], gl.float32, SCORES)
            if bias is not None:
                start = _start(bias_s.index(GROUP * STEPS + step), SCALE, SCORES)
            key = flat(k_s.index(stage * STEPS + step)).permute((1, 0))
            products += (warpgroup_mma(query, key, start, use_acc=bias is not None, is_async=True),)
        scores = ()
        factor = SCALE * LOG2_E
        for step in gl.static_range(STEPS):
            tile = warpgroup_mma_wait(STEPS - 1 - step, deps=[products[step]])
            scores += (tile,)
        if masked:  # in base 2 before the mask is added: it swallows scores as it does elsewhere
            shifted = ()
            for step in gl.static_range(STEPS):
                keys = step * BLOCK_K + gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, SCORES))
                shifted += (scores[step] * factor + mask_shift(mask, place.b, s, keys)[None, :],)
            scores = shifted
            factor = 1.0
        top = gl.max(scores[0], 1)
        for step in gl.static_range(1, STEPS):
            top = gl.maximum(top, gl.max(scores[step], 1))
        top = top * factor
        total = gl.zeros([PART], gl.float32, gl.SliceLayout(1, SCORES))
        result = gl.zeros([PART, D], gl.float32, RESULT)
        for step in gl.static_range(STEPS):
            weights = gl.exp2(scores[step] * factor - top[:, None])
            total += gl.sum(weights, 1)
            weights = gl.convert_layout(weights.to(o_desc.dtype), WEIGHTS)
            value = flat(v_s.index(stage * STEPS + step))
            result = warpgroup_mma(weights, value, result, use_acc=step > 0, is_async=True)
        result = warpgroup_mma_wait(0, deps=[result])
        group_barrier()  # all four warps have read the slot
        mbarrier.arrive(empty.index(stage), count=1)
        result = result * gl.convert_layout(1.0 / total, gl.SliceLayout(1, RESULT))[:, None]
        tma.store_wait(0)  # the copy engine has read the last row's result ...
        group_barrier()  # ... and every warp knows
        own = o_s.index(GROUP)
        flat(own).store(result.to(o_desc.dtype))
        fence_async_shared()
        group_barrier()
        tma.async_copy_shared_to_global(o_desc, [place.b, s, line, place.h, 0], own)
        if SAVE:
            _store_statistics(statistics, place, s, queries, top, total)
    tma.store_wait(0)


@gluon.jit
def _store_statistics(statistics, place, s, queries, top, total):
    """lse and rest, as ``ops.attention`` defines them."""
    offsets = row_of(statistics, place, s) * statistics.n + queries
    log_total = gl.log2(total)
    lse = top + log_total
    gl.store(statistics.lse + offsets, lse, mask=queries < statistics.n)
    gl.store(statistics.rest + offsets, gl.exp2((lse - top) - log_total), mask=queries < statistics.n)


@gluon.jit(do_not_specialize=["rows", "per_program", "groups"])
def hopper_forward(
    q_desc, k_desc, v_desc, o_desc, bias, bias_strides, mask, statistics, rows, per_program, groups,
    SCALE: gl.constexpr, KEYS: gl.constexpr, SAVE: gl.constexpr, WIDE_BIAS: gl.constexpr,
    STAGES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """q, k, v, o: descriptors of [B, S, N, H, D]; bias: [B, H, N, N] with strides (B, H, N) or None, kept in fp32 if
    WIDE_BIAS: fewer instructions per score for twice the shared memory.
    """
    place = place_of(rows, groups, per_program, CONSUMERS * PART)
    STEPS: gl.constexpr = KEYS // k_desc.block_type.shape[2]
    BLOCK_K: gl.constexpr = k_desc.block_type.shape[2]
    q_s = tiles_for(q_desc, STAGES * CONSUMERS)
    k_s = tiles_for(k_desc, STAGES * STEPS)
    v_s = tiles_for(v_desc, STAGES * STEPS)
    o_s = tiles_for(o_desc, CONSUMERS)
    bias_s = k_s  # without a bias it is not read
    if bias is not None:
        bias_s = _bias_tiles(bias, BLOCK_K, CONSUMERS * STEPS, WIDE_BIAS)
    full, empty = new_barriers(STAGES, 1)
    tiles = (q_s, k_s, v_s, o_s, bias_s)
    shared = (o_desc, tiles, full, empty, place, bias, bias_strides, mask, statistics)
    gl.warp_specialize(
        [
            (_attend, (shared, 0, SCALE, SAVE, STAGES, STEPS)),
            (_attend, (shared, 1, SCALE, SAVE, STAGES, STEPS)),
            (_fetch, ((q_desc, k_desc, v_desc), (q_s, k_s, v_s), full, empty, place, STAGES, STEPS)),
        ],
        [4, 4],
        [REGISTERS, 24],
    )
