"""The backward of a layer norm, for the end of row-wise Gluon programs; twin: ``rows.norm_input_gradient``."""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false
# The type checker takes Gluon's programs for Python.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma_wait

from scalefold.kernels.hopper.pieces import group_barrier
from scalefold.kernels.hopper.row_pieces import COLUMNS, per_column, standardised
from scalefold.kernels.hopper.transition import column_sums, store_sums


@gluon.jit
def norm_gradient(d, x, norm, spare, sums):
    """Gradient of a tile x: [ROWS, C] for the gradient d of its layer norm; sums for the norm's weight and bias to
    sums[0:C] and sums[C:2C], by way of ``spare``, a tile in shared memory that the consumer is done with.
    """
    C: gl.constexpr = d.shape[1]
    hat, rstd = standardised(x)
    sum_columns(d * hat, spare, sums)
    sum_columns(d, spare, sums + C)
    d *= per_column(norm.weight, 0, C)
    along = (gl.sum(d * hat, 1) * (1.0 / C))[:, None]
    return (d - (gl.sum(d, 1) * (1.0 / C))[:, None] - hat * along) * rstd[:, None]


@gluon.jit
def sum_columns(value, tile, pointer):
    """Sums over the rows of value: [ROWS, C], in bf16 by way of a tile that nobody reads, to pointer[0:C]."""
    group_barrier()
    tile.store(value.to(gl.bfloat16))
    fence_async_shared()
    group_barrier()
    sum_tile(tile, pointer)


@gluon.jit
def sum_tile(tile, pointer):
    """The same for a tile that lies in shared memory."""
    C: gl.constexpr = tile.shape[1]
    for first in gl.static_range(0, C, COLUMNS):
        total = column_sums(tile, first)
        store_sums(pointer + first, warpgroup_mma_wait(0, deps=(total,)))
