"""Tiles stored in the memory of several ranks: each row or column in that of its owner, or all of them in everybody's.

Views of one tensor in the memory of each rank, in rank order, have equal strides; see ``destination``.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from scalefold.kernels.rows import row_offsets, store_tile


@triton.jit
def _pointers(views, owner):
    """Where the view of each owner begins."""
    found = views[0].pointer + 0 * owner
    for rank in tl.static_range(1, len(views)):
        found = tl.where(owner == rank, views[rank].pointer + 0 * owner, found)
    return found


@triton.jit
def _store(view, pointers, value, rows, extent):
    value = value.to(view.pointer.dtype.element_ty)
    if extent.limit is None:
        tl.store(pointers, value)
    else:
        tl.store(pointers, value, mask=(rows < extent.limit)[:, None])


@triton.jit
def store_tile_by_rows(views, value, rows, columns, extent, LEVEL: tl.constexpr):
    """``rows.store_tile`` where LEVEL of the rows, 0 or 1, says who owns one."""
    owner = rows // extent.dims[1] // extent.dims[0]
    if LEVEL == 1:
        owner = rows // extent.dims[1] % extent.dims[0]
    pointers = (_pointers(views, owner) + row_offsets(views[0], rows, extent))[:, None]
    _store(views[0], pointers + columns[None, :] * views[0].strides[3], value, rows, extent)


@triton.jit
def store_tile_by_columns(views, value, rows, columns, extent, OWNED: tl.constexpr):
    """``rows.store_tile`` where every rank owns so many columns."""
    pointers = (_pointers(views, columns // OWNED) + columns % OWNED * views[0].strides[3])[None, :]
    _store(views[0], pointers + row_offsets(views[0], rows, extent)[:, None], value, rows, extent)


@triton.jit
def store_tile_everywhere(views, value, rows, columns, extent):
    """``rows.store_tile`` to all views."""
    for place in tl.static_range(len(views)):
        store_tile(views[place], value, rows, columns, extent)


def are_parts(x: Tensor, parts: Sequence[Tensor], dim: int) -> bool:
    """Whether ``parts`` are those of a tensor like x: [1, I, J, c], dense, each with as many of its I or, dim 2, J.

    With that dimension split in owner and what is the owner's, they and x have rows of three levels.
    """
    if x.dim() != 4 or len(x) != 1 or not x.is_contiguous() or x.shape[dim] % len(parts):
        return False
    own = [n // len(parts) if d == dim else n for d, n in enumerate(x.shape)]
    alike = all(list(p.shape) == own and p.stride(3) == 1 and p.stride() == parts[0].stride() for p in parts)
    return alike and min(own[1:3]) > 1


def by_owner(x: Tensor, count: int, dim: int) -> Tensor:
    """x: [1, I, J, c] with I or, dim 2, J as [owner, of an owner]."""
    return x.unflatten(dim, (count, -1))


def owned_part(part: Tensor, count: int, dim: int) -> Tensor:
    """An owner's part in the same form, as if it were every owner's."""
    return part.unsqueeze(dim).expand(*part.shape[:dim], count, *part.shape[dim:])
