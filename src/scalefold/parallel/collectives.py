"""Differentiable exchanges inside an axial-parallel group of P ranks.

Every exchange states what its backward must be, because that follows from how the result is used: a tensor that all
ranks use for different work needs its gradients summed (reduce-scatter), one that all ranks use for the same work has
the same gradient everywhere (slice).
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup


def local_part(x: Tensor, dim: int, group: Group) -> Tensor:
    """This rank's slice of a tensor that every rank holds."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    width = _share(x.shape[dim], size)
    return x.narrow(dim, rank * width, width).contiguous()


def all_gather(x: Tensor, dim: int, group: Group) -> Tensor:
    """Concatenate the ranks' slices along ``dim``."""
    size = dist.get_world_size(group)
    front = x.movedim(dim, 0).contiguous()
    out = front.new_empty((size * front.shape[0], *front.shape[1:]))
    dist.all_gather_into_tensor(out, front, group=group)
    return out.movedim(0, dim)


def reduce_scatter(x: Tensor, dim: int, group: Group) -> Tensor:
    """Sum over ranks; each keeps its slice along ``dim``. Gloo has no such exchange: there it sums, then slices."""
    size = dist.get_world_size(group)
    front = x.movedim(dim, 0).contiguous()
    if x.is_cuda:
        out = front.new_empty((_share(front.shape[0], size), *front.shape[1:]))
        dist.reduce_scatter_tensor(out, front, group=group)
        return out.movedim(0, dim)
    front = front.clone()
    dist.all_reduce(front, group=group)
    return local_part(front, 0, group).movedim(0, dim)


def all_to_all(x: Tensor, split_dim: int, concat_dim: int, group: Group) -> Tensor:
    """Split along one dimension, concatenate along another: the slices change axis.

    x: [.., n P at split_dim, .., k at concat_dim, ..] -> [.., n, .., k P, ..].
    """
    size, split_dim, concat_dim = dist.get_world_size(group), split_dim % x.dim(), concat_dim % x.dim()
    width = _share(x.shape[split_dim], size)
    parts = x.unflatten(split_dim, (size, width)).movedim(split_dim, 0).contiguous()
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=group)
    return received.movedim(0, concat_dim).flatten(concat_dim, concat_dim + 1)


def _share(length: int, size: int) -> int:
    if length % size:
        raise ValueError(f"a dimension of {length} cannot be shared by {size} ranks; stack entries must pad it")
    return length // size


class _Scatter(torch.autograd.Function):
    """Slice forward, all-gather backward: the input is the same on every rank and feeds different work."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: Group) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return local_part(x, dim, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return all_gather(grads[0], ctx.dim, ctx.group), None, None


class _GatherSame(torch.autograd.Function):
    """All-gather forward, slice backward: every rank does the same work with the result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: Group) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return all_gather(x, dim, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return local_part(grads[0], ctx.dim, ctx.group), None, None


class _GatherShared(_GatherSame):
    """All-gather forward, reduce-scatter backward: every rank does different work with the result."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return reduce_scatter(grads[0], ctx.dim, ctx.group), None, None


class _Exchange(torch.autograd.Function):
    """All-to-all forward, the inverse all-to-all backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, split_dim: int, concat_dim: int, group: Group) -> Tensor:
        ctx.dims, ctx.group = (split_dim, concat_dim), group
        return all_to_all(x, split_dim, concat_dim, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        split_dim, concat_dim = ctx.dims
        return all_to_all(grads[0], concat_dim, split_dim, ctx.group), None, None, None


def scatter(x: Tensor, dim: int, group: Group) -> Tensor:
    """Full -> this rank's slice; gradients are gathered."""
    return _Scatter.apply(x, dim, group)


def gather_same(x: Tensor, dim: int, group: Group) -> Tensor:
    """Slices -> full, for work that all ranks repeat; the gradient is sliced."""
    return _GatherSame.apply(x, dim, group)


def gather_shared(x: Tensor, dim: int, group: Group) -> Tensor:
    """Slices -> full, for work that the ranks share; gradients are summed and sliced."""
    return _GatherShared.apply(x, dim, group)


def exchange(x: Tensor, split_dim: int, concat_dim: int, group: Group) -> Tensor:
    """Move the shards from ``concat_dim`` to ``split_dim``."""
    return _Exchange.apply(x, split_dim, concat_dim, group)
