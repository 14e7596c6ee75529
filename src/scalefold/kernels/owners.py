"""Tiles stored in the memory of several ranks: each row or column in that of its owner, or all of them in everybody's.

Views of one tensor in the memory of each rank, in rank order, have equal strides; see ``destination``.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from scalefold.kernels.rows import View, store_tile


@triton.jit
def _pointers(views, owner):
    """Where the view of each owner begins."""
    found = views[0].pointer + 0 * owner
    for rank in tl.static_range(1, len(views)):
        found = tl.where(owner == rank, views[rank].pointer + 0 * owner, found)
    return found


@triton.jit
def store_tile_by_rows(views, value, rows, columns, extent):
    """``rows.store_tile`` where level 1 of the rows says who owns one."""
    owner = rows // extent.dims[1] % extent.dims[0]
    store_tile(View(_pointers(views, owner)[:, None], views[0].strides), value, rows, columns, extent)


@triton.jit
def store_tile_by_columns(views, value, rows, columns, extent, OWNED: tl.constexpr):
    """``rows.store_tile`` where every rank owns so many columns."""
    pointers = _pointers(views, columns // OWNED)[None, :]
    store_tile(View(pointers, views[0].strides), value, rows, columns % OWNED, extent)


@triton.jit
def store_tile_everywhere(views, value, rows, columns, extent):
    """``rows.store_tile`` to all views."""
    for place in tl.static_range(len(views)):
        store_tile(views[place], value, rows, columns, extent)


def by_columns_of(x: Tensor, parts: Sequence[Tensor]) -> bool:
    """Whether ``parts`` are those of a tensor like x: [1, I, J, c], dense, each with as many of its J.

    With J split in two, they and x have rows of three levels: I, owner, the owner's J.
    """
    if x.dim() != 4 or len(x) != 1 or not x.is_contiguous() or x.shape[2] % len(parts):
        return False
    own = (*x.shape[:2], x.shape[2] // len(parts), x.shape[3])
    return own[2] > 1 and all(p.shape == own and p.stride(3) == 1 and p.stride() == parts[0].stride() for p in parts)


def owned_columns(x: Tensor, count: int) -> Tensor:
    """x: [1, I, J, c] as [1, I, owner, J of an owner, c]."""
    return x.unflatten(2, (count, -1))


def owned_part(part: Tensor, count: int) -> Tensor:
    """An owner's part [1, I, J of an owner, c] in the same form, as if it were every owner's."""
    return part.unsqueeze(2).expand(-1, -1, count, -1, -1)
