"""Attention forward for Hopper in Gluon: tiles by the copy engine, products by warpgroups, one pass over all keys.

A program owns 128 queries of a head and walks over rows, whose N keys it takes at once: 128 or 256 of them, whole tiles
without an edge. The bias of its queries, the same for all rows, stays in shared memory: in fp32 and divided by SCALE
(one rounding of 2^-24) it starts the accumulators of the scores.

While a consumer finishes a row, the scores of its next row are computed. Exponentials are the narrowest part of the
machine: the consumers take them in turn, and one computes its products while the other has them.
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
from scalefold.kernels.instructions import program, wait_for_predecessors

REGISTERS = gl.constexpr(240)  # per thread of a consumer: with less, products of 256 keys wait for one another


class Tiles(NamedTuple):
    """Shared memory: slots of rows (q, k, v, additive mask in base 2, its least factor), then a tile per consumer."""

    q: Any
    k: Any
    v: Any
    shift: Any
    least: Any
    o: Any
    bias: Any


class Barriers(NamedTuple):
    """``full`` and ``empty`` of each slot; ``turn`` of each consumer, completed when the exponentials are its own."""

    full: Any
    empty: Any
    turn: Any


@gluon.jit
def _fetch(descriptors, tiles, barriers, place, mask, STAGES: gl.constexpr):
    """The producer: for each row the queries of all consumers, keys, values and mask, up to STAGES rows ahead."""
    q_desc, k_desc, v_desc = descriptors
    BYTES: gl.constexpr = (CONSUMERS * PART + 2 * k_desc.block_type.shape[2]) * k_desc.block_type.shape[4] * 2
    for i in range(place.count):
        stage = i % STAGES
        s = place.first + i
        mbarrier.wait(barriers.empty.index(stage), ((i // STAGES) & 1) ^ 1)
        arrived = barriers.full.index(stage)
        mbarrier.expect(arrived, BYTES)
        tma.async_copy_global_to_shared(k_desc, [place.b, s, 0, place.h, 0], arrived, tiles.k.index(stage))
        for part in gl.static_range(CONSUMERS):
            at = [place.b, s, place.line + part * PART, place.h, 0]
            tma.async_copy_global_to_shared(q_desc, at, arrived, tiles.q.index(stage * CONSUMERS + part))
        tma.async_copy_global_to_shared(v_desc, [place.b, s, 0, place.h, 0], arrived, tiles.v.index(stage))
        _store_mask(tiles.shift.index(stage), tiles.least.index(stage), mask, place.b, s)
        group_barrier()
        mbarrier.arrive(arrived, count=1)


@gluon.jit
def _store_mask(shift, least, mask, b, s):
    """Additive mask of all keys in base 2, 0 or -inf, and the least of the mask: 1 if it masks nothing."""
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    keep = load_keep(mask, b, s, gl.arange(0, shift.shape[0], layout=LINE))
    shift.store(keep * mask.inf - mask.inf)
    least.store(gl.full([1], gl.min(keep, 0), gl.float32, LINE))


@gluon.jit
def _keep_bias(bias, strides, tile, place, line, SCALE: gl.constexpr):
    """Bias of this consumer's queries and all keys into its tile, in units of products."""
    KEYS: gl.constexpr = tile.shape[1]
    READ: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (KEYS // 8), KEYS // 8], [4, 1], [1, 0])
    queries = line + gl.arange(0, PART, layout=gl.SliceLayout(1, READ))
    keys = gl.arange(0, KEYS, layout=gl.SliceLayout(0, READ))
    base = bias + place.b.to(gl.int64) * strides[0] + place.h * strides[1]
    values = gl.load(base + queries[:, None] * strides[2] + keys[None, :])
    tile.store(values.to(gl.float32) * (1.0 / SCALE))
    group_barrier()


@gluon.jit
def _products(tiles, barriers, bias, i, GROUP: gl.constexpr, STAGES: gl.constexpr):
    """Scores of row i in units of products, on their way."""
    KEYS: gl.constexpr = tiles.k.shape[3]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    stage = i % STAGES
    if bias is None:
        start = gl.zeros([PART, KEYS], gl.float32, SCORES)
    else:
        start = tiles.bias.index(GROUP).load(SCORES)
    mbarrier.wait(barriers.full.index(stage), (i // STAGES) & 1)
    query = flat(tiles.q.index(stage * CONSUMERS + GROUP))
    key = flat(tiles.k.index(stage)).permute((1, 0))
    return warpgroup_mma(query, key, start, use_acc=bias is not None, is_async=True)


@gluon.jit
def _is_masked(tiles, stage):
    """Whether a key of the row is masked."""
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    return gl.max(tiles.least.index(stage).load(ONE), 0) < 1.0


@gluon.jit
def _weights(scores, masked, tiles, turn, i, GROUP: gl.constexpr, SCALE: gl.constexpr, STAGES: gl.constexpr):
    """Weights before their division by their sum, the largest score in base 2 and the sum.

    The first consumer needs nobody's leave for its first turn.
    """
    factor = SCALE * LOG2_E
    if masked:  # in base 2 before the mask is added: it swallows scores as it does elsewhere
        shift = tiles.shift.index(i % STAGES).load(gl.SliceLayout(0, scores.type.layout))
        scores = scores * factor + shift[None, :]
        factor = 1.0
    top = gl.max(scores, 1) * factor
    mbarrier.wait(turn.index(GROUP), (i & 1) ^ (GROUP == 0))
    weights = gl.exp2(scores * factor - top[:, None])
    return weights, top, gl.sum(weights, 1)


@gluon.jit
def _result(weights, tiles, turn, stage, DTYPE: gl.constexpr, GROUP: gl.constexpr):
    """Weighted values, on their way; then it is the next consumer's turn.

    The product cannot begin before the last exponential, and the turn is not passed on before the product.
    """
    D: gl.constexpr = tiles.v.shape[5]
    RESULT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=RESULT, k_width=2)
    weights = gl.convert_layout(weights.to(DTYPE), WEIGHTS)
    zeros = gl.zeros([PART, D], gl.float32, RESULT)
    result = warpgroup_mma(weights, flat(tiles.v.index(stage)), zeros, use_acc=False, is_async=True)
    mbarrier.arrive(turn.index((GROUP + 1) % CONSUMERS), count=1)
    return result


@gluon.jit
def _finish(
    result, top, total, o_desc, own, empty, statistics, place, i, line, SAVE: gl.constexpr
):  # fmt: skip
    """Give the slot of row i back, bring its result and its statistics to memory."""
    tma.store_wait(0)  # the copy engine has read the last row's result
    group_barrier()  # every warp knows, and all have read the slot
    mbarrier.arrive(empty, count=1)
    s = place.first + i
    inverse = gl.convert_layout(1.0 / total, gl.SliceLayout(1, result.type.layout))
    flat(own).store((result * inverse[:, None]).to(o_desc.dtype))
    fence_async_shared()
    group_barrier()
    tma.async_copy_shared_to_global(o_desc, [place.b, s, line, place.h, 0], own)
    if SAVE:
        _store_statistics(statistics, place, s, line, top, total)


@gluon.jit
def _store_statistics(statistics, place, s, line, top, total):
    """lse and rest, as ``ops.attention`` defines them."""
    queries = line + gl.arange(0, PART, layout=top.type.layout)
    offsets = row_of(statistics, place, s) * statistics.n + queries
    log_total = gl.log2(total)
    lse = top + log_total
    gl.store(statistics.lse + offsets, lse)
    gl.store(statistics.rest + offsets, gl.exp2((lse - top) - log_total))


@gluon.jit
def _attend(shared, GROUP: gl.constexpr, SCALE: gl.constexpr, SAVE: gl.constexpr, STAGES: gl.constexpr):
    """A consumer: softmax over all keys of its PART queries, row by row."""
    o_desc, tiles, barriers, place, bias, bias_strides, statistics = shared
    turn = barriers.turn
    line = place.line + GROUP * PART
    own = tiles.o.index(GROUP)
    if bias is not None:
        _keep_bias(bias, bias_strides, tiles.bias.index(GROUP), place, line, SCALE)
    products = _products(tiles, barriers, bias, 0, GROUP, STAGES)
    masked = _is_masked(tiles, 0)
    scores = warpgroup_mma_wait(0, deps=[products])
    for i in range(place.count - 1):
        empty = barriers.empty.index(i % STAGES)
        weights, top, total = _weights(scores, masked, tiles, turn, i, GROUP, SCALE, STAGES)
        result = _result(weights, tiles, turn, i % STAGES, o_desc.dtype, GROUP)
        products = _products(tiles, barriers, bias, i + 1, GROUP, STAGES)
        masked = _is_masked(tiles, (i + 1) % STAGES)
        result = warpgroup_mma_wait(1, deps=[result])
        _finish(result, top, total, o_desc, own, empty, statistics, place, i, line, SAVE)
        scores = warpgroup_mma_wait(0, deps=[products])
    i = place.count - 1
    weights, top, total = _weights(scores, masked, tiles, turn, i, GROUP, SCALE, STAGES)
    result = _result(weights, tiles, turn, i % STAGES, o_desc.dtype, GROUP)
    result = warpgroup_mma_wait(0, deps=[result])
    _finish(result, top, total, o_desc, own, barriers.empty.index(i % STAGES), statistics, place, i, line, SAVE)
    tma.store_wait(0)


@program
@gluon.jit(do_not_specialize=["rows", "per_program", "groups"])
def hopper_forward(
    q_desc, k_desc, v_desc, o_desc, bias, bias_strides, mask, statistics, rows, per_program, groups,
    SCALE: gl.constexpr, SAVE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """q, k, v, o: descriptors of [B, S, N, H, D], k and v of all keys; bias: [B, H, N, N] with strides (B, H, N) or
    None.
    """
    wait_for_predecessors()
    place = place_of(rows, groups, per_program, CONSUMERS * PART)
    KEYS: gl.constexpr = k_desc.block_type.shape[2]
    LINE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_s = tiles_for(q_desc, STAGES * CONSUMERS)
    k_s = tiles_for(k_desc, STAGES)
    v_s = tiles_for(v_desc, STAGES)
    o_s = tiles_for(o_desc, CONSUMERS)
    shift_s = gl.allocate_shared_memory(gl.float32, [STAGES, KEYS], LINE)
    least_s = gl.allocate_shared_memory(gl.float32, [STAGES, 1], LINE)
    bias_s = k_s  # without a bias it is not read
    if bias is not None:  # 4 lanes read 32 bytes of a line: the next line has its 32 bytes in the next banks
        SWAPPED: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 4, [1, 0])
        bias_s = gl.allocate_shared_memory(gl.float32, [CONSUMERS, PART, KEYS], SWAPPED)
    tiles = Tiles(q_s, k_s, v_s, shift_s, least_s, o_s, bias_s)
    barriers = Barriers(new_barriers(STAGES, 2), new_barriers(STAGES, CONSUMERS), new_barriers(CONSUMERS, 1))
    shared = (o_desc, tiles, barriers, place, bias, bias_strides, statistics)
    gl.warp_specialize(
        [
            (_attend, (shared, 0, SCALE, SAVE, STAGES)),
            (_attend, (shared, 1, SCALE, SAVE, STAGES)),
            (_fetch, ((q_desc, k_desc, v_desc), tiles, barriers, place, mask, STAGES)),
        ],
        [4, 4],
        [REGISTERS, 504 - 2 * REGISTERS],
    )
