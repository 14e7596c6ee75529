"""Gradients of queries, keys and values of attention without a bias, for Hopper in Gluon; twin:
``ops.attention_programs.backward_rows``.

A program has a head and walks over rows of up to 128 keys; a consumer has half of a row's keys, scores being [keys,
queries] as in ``attention_keys``, whose producer it shares. Gradients of scores stay in shared memory, where each
consumer meets those of the other for the gradients of its half of the queries.
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

from scalefold.kernels.hopper.gradients.attention_keys import LINE, fetch_row, place_among
from scalefold.kernels.hopper.pieces import CONSUMERS, PART, flat, group_barrier, new_barriers, tiles_for
from scalefold.kernels.instructions import program, wait_for_predecessors

RESULTS = gl.constexpr(3)  # gradients of queries, keys and values


@gluon.jit
def _start(key, value, query, do, shift, delta, SCORES: gl.constexpr):
    """Scores in units of products, masked, and gradients of weights less delta, on their way."""
    scores, gradients = gl.broadcast(shift[:, None], delta.load(gl.SliceLayout(0, SCORES))[None, :])
    scores = warpgroup_mma(key, query.permute((1, 0)), scores, is_async=True)
    gradients = warpgroup_mma(value, do.permute((1, 0)), gradients, is_async=True)
    return scores, gradients


@gluon.jit
def _differentiate(shared, GROUP: gl.constexpr, SCALE: gl.constexpr, STAGES: gl.constexpr):
    """A consumer: gradients of its PART keys and values, then of its PART queries, row by row.

    ``met`` is completed when both have stored their gradients of scores; those of the next row go elsewhere, so the
    other consumer may still read these.
    """
    descriptors, tiles, ds_s, out_s, barriers, met, place, groups = shared
    dq_desc, dk_desc, dv_desc = descriptors
    q_s, do_s, _o_s, k_s, v_s, exponent_s, delta_s, shift_s, factor_s = tiles
    full, empty, brought = barriers
    D: gl.constexpr = q_s.shape[5]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PART, 16])
    RESULT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=RESULT, k_width=2)
    line = place.line + GROUP * PART
    for i in range(place.count):
        stage = i % STAGES
        first = stage * CONSUMERS
        mbarrier.wait(brought.index(stage), (i // STAGES) & 1)
        mbarrier.wait(full.index(stage), (i // STAGES) & 1)
        shift = shift_s.index(first + GROUP).load(gl.SliceLayout(1, SCORES))
        factor = gl.max(factor_s.index(stage).load(LINE), 0)
        key, value = flat(k_s.index(first + GROUP)), flat(v_s.index(first + GROUP))
        dk = gl.zeros([PART, D], gl.float32, RESULT)
        dv = gl.zeros([PART, D], gl.float32, RESULT)
        query, do = flat(q_s.index(first)), flat(do_s.index(first))
        scores, gradients = _start(key, value, query, do, shift, delta_s.index(first), SCORES)
        for part in gl.static_range(CONSUMERS):
            query, do = flat(q_s.index(first + part)), flat(do_s.index(first + part))
            exponents = exponent_s.index(first + part).load(gl.SliceLayout(0, SCORES))
            if part + 1 < CONSUMERS:
                after = first + part + 1
                next_scores, next_gradients = _start(
                    key, value, flat(q_s.index(after)), flat(do_s.index(after)), shift, delta_s.index(after), SCORES
                )
                score, gradient = warpgroup_mma_wait(2, deps=[scores, gradients])
                scores = next_scores
                gradients = next_gradients
            else:
                score, gradient = warpgroup_mma_wait(0, deps=[scores, gradients])
            weights = gl.exp2(score * factor + exponents[None, :])
            dv = warpgroup_mma(gl.convert_layout(weights.to(gl.bfloat16), WEIGHTS), do, dv, is_async=True)
            d_scores = (weights * gradient).to(gl.bfloat16)
            dk = warpgroup_mma(gl.convert_layout(d_scores, WEIGHTS), query, dk, is_async=True)
            ds_s.index((i % 2 * CONSUMERS + GROUP) * CONSUMERS + part).store(d_scores)
        fence_async_shared()
        group_barrier()
        mbarrier.arrive(met, count=1)
        dv, dk = warpgroup_mma_wait(0, deps=[dv, dk])
        tma.store_wait(0)  # the copy engine has read the last row's results
        group_barrier()
        own = out_s.index(RESULTS * GROUP)
        flat(out_s.index(RESULTS * GROUP + 1)).store((dk * SCALE).to(gl.bfloat16))
        flat(out_s.index(RESULTS * GROUP + 2)).store(dv.to(gl.bfloat16))
        mbarrier.wait(met, i & 1)
        dq = gl.zeros([PART, D], gl.float32, RESULT)
        for part in gl.static_range(CONSUMERS):
            left = ds_s.index((i % 2 * CONSUMERS + part) * CONSUMERS + GROUP).permute((1, 0))
            dq = warpgroup_mma(left, flat(k_s.index(first + part)), dq, is_async=True)
        dq = warpgroup_mma_wait(0, deps=[dq])
        flat(own).store((dq * SCALE).to(gl.bfloat16))
        fence_async_shared()
        group_barrier()  # all four warps have read the slot, and their results are there
        mbarrier.arrive(empty.index(stage), count=1)
        at = [place.b, place.first + i * groups, line, place.h, 0]
        tma.async_copy_shared_to_global(dq_desc, at, own)
        tma.async_copy_shared_to_global(dk_desc, at, out_s.index(RESULTS * GROUP + 1))
        tma.async_copy_shared_to_global(dv_desc, at, out_s.index(RESULTS * GROUP + 2))
    tma.store_wait(0)


@program
@gluon.jit(do_not_specialize=["rows", "groups"])
def hopper_rows(
    q_desc, do_desc, o_desc, k_desc, v_desc, dq_desc, dk_desc, dv_desc, mask, statistics, rows, groups,
    SCALE: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """Descriptors of [B, S, N, H, D] in tiles of PART lines; N at most CONSUMERS * PART."""
    wait_for_predecessors()
    place = place_among(rows, groups)
    DENSE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    SQUARE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([PART, PART], gl.bfloat16)
    COUNT: gl.constexpr = STAGES * CONSUMERS
    q_s, do_s, o_s = tiles_for(q_desc, COUNT), tiles_for(do_desc, COUNT), tiles_for(o_desc, CONSUMERS)
    k_s, v_s = tiles_for(k_desc, COUNT), tiles_for(v_desc, COUNT)
    exponent_s = gl.allocate_shared_memory(gl.float32, [COUNT, PART], DENSE)
    delta_s = gl.allocate_shared_memory(gl.float32, [COUNT, PART], DENSE)
    shift_s = gl.allocate_shared_memory(gl.float32, [COUNT, PART], DENSE)
    factor_s = gl.allocate_shared_memory(gl.float32, [STAGES, 1], DENSE)
    ds_s = gl.allocate_shared_memory(gl.bfloat16, [2 * CONSUMERS * CONSUMERS, PART, PART], SQUARE)
    out_s = tiles_for(dq_desc, RESULTS * CONSUMERS)
    tiles = (q_s, do_s, o_s, k_s, v_s, exponent_s, delta_s, shift_s, factor_s)
    barriers = (new_barriers(STAGES, 2), new_barriers(STAGES, CONSUMERS), new_barriers(STAGES, 1))
    met = new_barriers(1, CONSUMERS).index(0)
    given = ((q_desc, do_desc, o_desc, k_desc, v_desc), tiles, barriers, place, groups, mask, statistics)
    shared = ((dq_desc, dk_desc, dv_desc), tiles, ds_s, out_s, barriers, met, place, groups)
    gl.warp_specialize(
        [
            (_differentiate, (shared, 0, SCALE, STAGES)),
            (_differentiate, (shared, 1, SCALE, STAGES)),
            (fetch_row, (given, SCALE, STAGES, CONSUMERS)),
        ],
        [4, 4],
        [REGISTERS, 504 - 2 * REGISTERS],
    )
