"""Differentiable exchanges inside an axial-parallel group of P ranks.

Every exchange states what its backward must be, because that follows from how the result is used: a tensor that all
ranks use for different work needs its gradients summed (reduce-scatter), one that all ranks use for the same work has
the same gradient everywhere (slice).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from scalefold.kernels.destination import Destination
from scalefold.parallel.dap import collectives
from scalefold.parallel.dap.collectives import Flight, Group, Lasts, local_part

Flights = dict[str, Flight]  # what is under way, by direction


class _Scatter(torch.autograd.Function):
    """Slice forward, all-gather backward: the input is the same on every rank and feeds different work."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: Group) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return local_part(x, dim, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return collectives.all_gather(grads[0], ctx.dim, ctx.group).contiguous(), None, None


class _GatherSame(torch.autograd.Function):
    """All-gather forward, slice backward: every rank does the same work with the result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: Group) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return collectives.all_gather(x, dim, group).contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return local_part(grads[0], ctx.dim, ctx.group), None, None


class _GatherShared(torch.autograd.Function):
    """All-gather forward, reduce-scatter backward: every rank does different work with the result, in its block."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: Group, destination: Destination | None) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return collectives.all_gather(x, dim, group, Lasts.by(ctx), destination)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return collectives.reduce_scatter(grads[0], ctx.dim, ctx.group), None, None, None


class _Exchange(torch.autograd.Function):
    """All-to-all forward, the inverse all-to-all backward, of one or several tensors that a block uses up."""

    @staticmethod
    def forward(
        ctx: Any, split_dim: int, concat_dim: int, group: Group, destinations: Sequence[Destination], *xs: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.dims, ctx.group = (split_dim, concat_dim), group
        return tuple(collectives.all_to_all(xs, split_dim, concat_dim, group, Lasts.by(ctx), destinations))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        split_dim, concat_dim = ctx.dims
        return None, None, None, None, *collectives.all_to_all(grads, concat_dim, split_dim, ctx.group, Lasts.SHORT)


class _Overlapped(torch.autograd.Function):
    """One end of an exchange that goes on beside other work: begins it, or ends it.

    The other end's backward undoes this one's: where the forward ends, the backward begins. ``flights`` holds what is
    under way, forward and backward apart. Each begin replaces what was left there: a checkpoint that runs a block again
    stops once it has what it needs, perhaps before the end of an exchange.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, begins: bool, dims: tuple[int, int], group: Group, flights: Flights) -> Tensor:
        ctx.begins, ctx.dims, ctx.group, ctx.flights, ctx.shape = begins, dims, group, flights, x.shape
        if begins:
            flights["forward"] = collectives.begin_all_to_all(x, *dims, group, Lasts.by(ctx))
            return flights["forward"].received
        out = collectives.end_all_to_all(flights.pop("forward"), dims[1])
        return out.view_as(out)  # what arrived by itself is x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        split_dim, concat_dim = ctx.dims
        if ctx.begins:
            return collectives.end_all_to_all(ctx.flights.pop("backward"), split_dim), None, None, None, None
        flight = collectives.begin_all_to_all(grads[0], concat_dim, split_dim, ctx.group, Lasts.SHORT)
        ctx.flights["backward"] = flight
        return flight.received.view(ctx.shape), None, None, None, None


class _OverlappedGather(torch.autograd.Function):
    """``_GatherShared`` that goes on beside other work, forward and backward: begins it, or ends it.

    As in ``_Overlapped``, the other end's backward undoes this one's.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, begins: bool, dim: int, group: Group, flights: Flights, destination: Destination | None
    ) -> Tensor:
        ctx.begins, ctx.dim, ctx.group, ctx.flights = begins, dim, group, flights
        if begins:
            flights["forward"] = collectives.begin_all_gather(x, dim, group, Lasts.by(ctx), destination)
            return flights["forward"].received
        flights.pop("forward").wait()
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        if ctx.begins:
            flight = ctx.flights.pop("backward")
            flight.wait()
            return flight.received, None, None, None, None, None
        ctx.flights["backward"] = collectives.begin_reduce_scatter(grads[0], ctx.dim, ctx.group)
        return grads[0], None, None, None, None, None  # shaped as what was gathered; the other end looks at the flight


def scatter(x: Tensor, dim: int, group: Group) -> Tensor:
    """Full -> this rank's slice; gradients are gathered."""
    return _Scatter.apply(x, dim, group)


def gather_same(x: Tensor, dim: int, group: Group) -> Tensor:
    """Slices -> full, for work that all ranks repeat; the gradient is sliced."""
    return _GatherSame.apply(x, dim, group)


def gather_shared(x: Tensor, dim: int, group: Group, destination: Destination | None = None) -> Tensor:
    """Slices -> full, for work that the ranks share; gradients are summed and sliced.

    destination: that of ``gather_destination``.
    """
    return _GatherShared.apply(x, dim, group, destination)


def begin_gather(x: Tensor, dim: int, group: Group, flights: Flights, destination: Destination | None = None) -> Tensor:
    """First half of ``gather_shared``: a tensor that only ``end_gather`` may read.

    In between no exchange comes but such as go on beside other work too.
    """
    return _OverlappedGather.apply(x, True, dim, group, flights, destination)


def end_gather(x: Tensor, dim: int, group: Group, flights: Flights) -> Tensor:
    """Second half of ``gather_shared``."""
    return _OverlappedGather.apply(x, False, dim, group, flights, None)


def exchange(
    x: Tensor, split_dim: int, concat_dim: int, group: Group, destinations: Sequence[Destination] = ()
) -> Tensor:
    """Move the shards from ``concat_dim`` to ``split_dim``; ``destinations``: that of ``exchange_destinations``."""
    return exchange_all((x,), split_dim, concat_dim, group, destinations)[0]


def exchange_all(
    xs: tuple[Tensor, ...], split_dim: int, concat_dim: int, group: Group, destinations: Sequence[Destination] = ()
) -> tuple[Tensor, ...]:
    """``exchange`` of equally shaped tensors in one go."""
    return _Exchange.apply(split_dim, concat_dim, group, destinations, *xs)


def begin_exchange(x: Tensor, split_dim: int, concat_dim: int, group: Group, flights: Flights) -> Tensor:
    """First half of ``exchange``: a tensor that only ``end_exchange`` may read, after whatever else can be done.

    split_dim, concat_dim >= 0.
    """
    return _Overlapped.apply(x, True, (split_dim, concat_dim), group, flights)


def end_exchange(x: Tensor, split_dim: int, concat_dim: int, group: Group, flights: Flights) -> Tensor:
    """Second half of ``exchange``."""
    return _Overlapped.apply(x, False, (split_dim, concat_dim), group, flights)
