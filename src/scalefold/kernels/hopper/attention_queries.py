"""Gradients of queries and of the bias from the gradients of scores, for Hopper in Gluon.

A program owns 64 queries of a head and walks over a group of rows. The copy engine brings the gradients of scores of a
row, [keys, queries], and its keys, several rows ahead. Each of two consumers adds one half of the keys to its part of
the bias gradient, in fp32 registers; they take turns with the product that gives the gradients of queries.
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
    PART,
    flat,
    group_barrier,
    new_barriers,
    place_of,
    tiles_for,
)


@gluon.jit
def _fetch(descriptors, tiles, full, empty, place, rows, heads, STAGES: gl.constexpr):
    """The producer: gradients of scores and keys of a row, each in two halves of the keys, up to STAGES rows ahead."""
    k_desc, ds_desc = descriptors
    k_s, ds_s = tiles
    HALF: gl.constexpr = ds_desc.block_type.shape[1]
    BYTES: gl.constexpr = 2 * HALF * (PART + k_desc.block_type.shape[4]) * 2
    for i in range(place.count):
        stage = i % STAGES
        s = place.first + i
        head = (place.b * rows + s) * heads + place.h
        mbarrier.wait(empty.index(stage), ((i // STAGES) & 1) ^ 1)
        arrived = full.index(stage)
        mbarrier.expect(arrived, BYTES)
        for half in gl.static_range(2):
            slot = stage * 2 + half
            tma.async_copy_global_to_shared(ds_desc, [head, half * HALF, place.line], arrived, ds_s.index(slot))
            tma.async_copy_global_to_shared(k_desc, [place.b, s, half * HALF, place.h, 0], arrived, k_s.index(slot))


@gluon.jit
def _gather(shared, GROUP: gl.constexpr, SCALE: gl.constexpr, STAGES: gl.constexpr):
    """A consumer: the bias gradient of its half of the keys, and every second row's gradients of queries."""
    dq_desc, tiles, full, empty, place, partial, strides, n = shared
    k_s, ds_s, dq_s = tiles
    HALF: gl.constexpr = ds_s.shape[2]
    D: gl.constexpr = k_s.shape[5]
    RESULT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    SUM: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    total = gl.zeros([HALF, PART], gl.float32, SUM)
    for i in range(place.count):
        stage = i % STAGES
        mbarrier.wait(full.index(stage), (i // STAGES) & 1)
        total += ds_s.index(stage * 2 + GROUP).reshape([HALF, PART]).load(SUM).to(gl.float32)
        if i % CONSUMERS == GROUP:
            dq = gl.zeros([PART, D], gl.float32, RESULT)
            for half in gl.static_range(2):
                d_scores = ds_s.index(stage * 2 + half).reshape([HALF, PART]).permute((1, 0))
                dq = warpgroup_mma(d_scores, flat(k_s.index(stage * 2 + half)), dq, use_acc=half > 0, is_async=True)
            dq = warpgroup_mma_wait(0, deps=[dq])
            tma.store_wait(0)  # the copy engine has read the last result ...
            group_barrier()  # ... and every warp knows
            own = dq_s.index(GROUP)
            flat(own).store((dq * SCALE).to(dq_desc.dtype))
            fence_async_shared()
            group_barrier()
            tma.async_copy_shared_to_global(dq_desc, [place.b, place.first + i, place.line, place.h, 0], own)
        group_barrier()  # all four warps have read the slot
        mbarrier.arrive(empty.index(stage), count=1)
    keys = GROUP * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(1, SUM))
    queries = place.line + gl.arange(0, PART, layout=gl.SliceLayout(0, SUM))
    base = partial + place.b.to(gl.int64) * strides[0] + place.h * strides[1]
    inside = (keys < n)[:, None] & (queries < n)[None, :]
    gl.store(base + keys[:, None] * strides[2] + queries[None, :], total, mask=inside)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["rows", "per_program", "groups"])
def hopper_queries(
    k_desc, ds_desc, dq_desc, partial, strides, rows, n, heads, per_program, groups,
    SCALE: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """Descriptors of k, dq [B, S, N, H, D] and ds [B * S * H, N keys, N queries]; partial: fp32 [groups, B, H, N keys,
    N queries], its strides (groups, B, H, keys) being those of one group and the rest.
    """
    place = place_of(rows, groups, per_program, PART)
    group_stride, b_stride, h_stride, k_stride = strides
    k_s = tiles_for(k_desc, STAGES * 2)
    ds_s = tiles_for(ds_desc, STAGES * 2)
    dq_s = tiles_for(dq_desc, CONSUMERS)
    full, empty = new_barriers(STAGES, 1)
    partial += (gl.program_id(2) % groups).to(gl.int64) * group_stride
    shared = (dq_desc, (k_s, ds_s, dq_s), full, empty, place, partial, (b_stride, h_stride, k_stride), n)
    gl.warp_specialize(
        [
            (_gather, (shared, 0, SCALE, STAGES)),
            (_gather, (shared, 1, SCALE, STAGES)),
            (_fetch, ((k_desc, ds_desc), (k_s, ds_s), full, empty, place, rows, heads, STAGES)),
        ],
        [4, 4],
        [REGISTERS, 504 - 2 * REGISTERS],
    )
