"""Weight gradients of row-wise linears for Hopper in Gluon; twins: products of the library and ``_copied_kernel`` of
``kernels.gradients.weight_gradient``.

dW[n, c] = sum over rows of d[row, n] * a[row, c]. A program has one tile of one gradient and a range of rows; its
consumers have half of the tile's lines each. Both operands come as they lie, rows first: the tensor cores read either
of them from shared memory along its other axis. Every program writes its tile of its range's partial gradient, and no
other writes there: sums over ranges follow in fixed order.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false
# The type checker takes Gluon's programs for Python.

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from scalefold.kernels.hopper.pieces import CONSUMERS, group_barrier, initialised, publish, tiles_for
from scalefold.kernels.hopper.row_pieces import one_arrival, product_layout
from scalefold.kernels.instructions import program, wait_for_predecessors

BEHIND = gl.constexpr(1)  # products that a consumer leaves unfinished when the next ones begin


class Slots(NamedTuple):
    """Slots for rows of d [rows, lines of a tile] and of a [rows, its columns], which all consumers read."""

    d: Any
    a: Any
    full: Any
    empty: Any


class Place(NamedTuple):
    """Tile of a program: of the gradient ``product``, from ``line`` and ``column`` on; its rows first..last."""

    product: Any
    line: Any
    column: Any
    first: Any
    last: Any


@gluon.jit
def _fetch_rows(d, a, slots, place):
    """The loader for one product: d and a along the rows; past the last row of all they come as zeros."""
    STAGES: gl.constexpr = slots.d.shape[0]
    ROWS: gl.constexpr = slots.d.shape[1]
    step = 0
    for row in range(place.first, place.last, ROWS):
        slot = step % STAGES
        full = slots.full.index(slot)
        mbarrier.wait(slots.empty.index(slot), ((step // STAGES) & 1) ^ 1)
        mbarrier.expect(full, d.block_type.nbytes + a.block_type.nbytes)
        tma.async_copy_global_to_shared(a, [row, place.column], full, slots.a.index(slot))
        tma.async_copy_global_to_shared(d, [row, place.line], full, slots.d.index(slot))
        step += 1  # noqa: SIM113


@gluon.jit
def _fetch(ds, operands, slots, place, COUNT: gl.constexpr):
    """The loader."""
    for i in gl.static_range(COUNT):
        if place.product == i:
            _fetch_rows(ds[i], operands[i], slots, place)


@gluon.jit
def _sum_rows(shared, SIDE: gl.constexpr, COUNT: gl.constexpr, TRANSPOSED: gl.constexpr):
    """A consumer: its lines of the tile."""
    partials, slots, place, width, c = shared
    STAGES: gl.constexpr = slots.d.shape[0]
    ROWS: gl.constexpr = slots.d.shape[1]
    LINES: gl.constexpr = slots.d.shape[2] // CONSUMERS
    COLUMNS: gl.constexpr = slots.a.shape[2]
    LAYOUT: gl.constexpr = product_layout(COLUMNS)
    acc = gl.zeros([LINES, COLUMNS], gl.float32, LAYOUT)
    step = 0
    for _ in range(place.first, place.last, ROWS):
        slot = step % STAGES
        mbarrier.wait(slots.full.index(slot), (step // STAGES) & 1)
        left = slots.d.index(slot).slice(SIDE * LINES, LINES, 1).permute((1, 0))
        acc = warpgroup_mma(left, slots.a.index(slot), acc, is_async=True)
        acc = warpgroup_mma_wait(BEHIND, deps=(acc,))
        group_barrier()
        mbarrier.arrive(slots.empty.index((step + STAGES - BEHIND) % STAGES), count=1, pred=step >= BEHIND)
        step += 1  # noqa: SIM113
    acc = warpgroup_mma_wait(0, deps=(acc,))
    line = place.line + SIDE * LINES + gl.arange(0, LINES, layout=gl.SliceLayout(1, LAYOUT))[:, None]
    column = place.column + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, LAYOUT))[None, :]
    partials += (gl.program_id(1).to(gl.int64) * COUNT + place.product) * (width * c)
    for i in gl.static_range(COUNT):
        if place.product == i:
            if (TRANSPOSED >> i) & 1:
                gl.store(partials + line + column * width, acc)
            else:
                gl.store(partials + line * c + column, acc)


@program
@gluon.jit(do_not_specialize=["num_rows", "per_range"])
def hopper_weight_gradients(
    d0, d1, d2, d3, a0, a1, a2, a3, partials, width, c, num_rows, per_range,
    COUNT: gl.constexpr, TRANSPOSED: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Program (tile of one of COUNT gradients, range of rows) -> partials[range]: fp32 [COUNT, width * c].

    Descriptors of d [num_rows, width] in blocks [rows of a slot, lines of a tile], and of a [num_rows, c] in blocks
    [rows of a slot, columns of a tile]; per_range: rows of a range, in whole slots. Bits of TRANSPOSED: gradients
    that are stored as [c, width].
    """
    wait_for_predecessors()
    slots = Slots(tiles_for(d0, STAGES), tiles_for(a0, STAGES), one_arrival(STAGES), initialised(STAGES, CONSUMERS))
    publish()
    LINES: gl.constexpr = d0.block_type.shape[1]
    COLUMNS: gl.constexpr = a0.block_type.shape[1]
    lines, columns = width // LINES, c // COLUMNS
    tile = gl.program_id(0)
    within = tile % (lines * columns)
    first = gl.program_id(1) * per_range
    place = Place(
        tile // (lines * columns), within // columns * LINES, within % columns * COLUMNS, first,
        gl.minimum(first + per_range, num_rows),
    )  # fmt: skip
    shared = (partials, slots, place, width, c)
    gl.warp_specialize(
        [
            (_sum_rows, (shared, 0, COUNT, TRANSPOSED)),
            (_sum_rows, (shared, 1, COUNT, TRANSPOSED)),
            (_fetch, ((d0, d1, d2, d3), (a0, a1, a2, a3), slots, place, COUNT)),
        ],
        [4, 4],
        [240, 24],
    )
