"""Differentiable exchanges inside an axial-parallel group of P ranks.

Every exchange states what its backward must be, because that follows from how the result is used: a tensor that all
ranks use for different work needs its gradients summed (reduce-scatter), one that all ranks use for the same work has
the same gradient everywhere (slice). A group whose GPUs map each other's memory exchanges by ``direct``; all others,
and shapes that are too odd for it, by the process group's library.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Lasts(Enum):
    """How long the result of an exchange is needed: what may take its place in memory, and when."""

    LONG = "as long as somebody holds it"
    STEP = "by the backward pass of this step"
    SHORT = "until a few exchanges later"

    @staticmethod
    def by(ctx: Any) -> "Lasts":
        """What the function ``ctx`` returns lasts until its backward, if it has one."""
        return Lasts.STEP if any(ctx.needs_input_grad) else Lasts.SHORT


class Direct(Protocol):
    """Exchanges by way of peers' memory, of what ``takes`` accepts; dimensions count from the front."""

    def begin(self) -> None: ...

    def takes(self, xs: Sequence[Tensor], dim: int, other: int | None = None) -> bool: ...

    def all_to_all(self, xs: Sequence[Tensor], split_dim: int, concat_dim: int, lasts: Lasts) -> list[Tensor]: ...

    def begin_all_to_all(
        self, xs: Sequence[Tensor], split_dim: int, concat_dim: int, lasts: Lasts
    ) -> tuple[list[Tensor], Callable[[], None]]: ...

    def all_gather(self, x: Tensor, dim: int, lasts: Lasts) -> Tensor: ...

    def begin_all_gather(self, x: Tensor, dim: int, lasts: Lasts) -> tuple[Tensor, Callable[[], None]]: ...

    def reduce_scatter(self, x: Tensor, dim: int) -> Tensor: ...

    def begin_reduce_scatter(self, x: Tensor, dim: int) -> tuple[Tensor, Callable[[], None]]: ...


@dataclass(eq=False)
class Group:
    """The P ranks that share a sample, and how they exchange: directly where ``direct`` is there and takes it."""

    processes: dist.ProcessGroup
    direct: Direct | None = None

    @property
    def size(self) -> int:
        """P."""
        return dist.get_world_size(self.processes)

    @property
    def rank(self) -> int:
        """This process's place among the P."""
        return dist.get_rank(self.processes)

    def begin(self) -> None:
        """A step begins: nothing that was exchanged before is needed any more."""
        if self.direct is not None:
            self.direct.begin()

    def disconnect(self) -> None:
        """Let go of memory that GPUs share; the library exchanges from now on."""
        self.direct = None


def local_part(x: Tensor, dim: int, group: Group) -> Tensor:
    """This rank's slice of a tensor that every rank holds."""
    width = _share(x.shape[dim], group.size)
    return x.narrow(dim, group.rank * width, width).contiguous()


def all_gather(x: Tensor, dim: int, group: Group, lasts: Lasts = Lasts.LONG) -> Tensor:
    """Concatenate the ranks' slices along ``dim``."""
    dim, mapped = dim % x.dim(), group.direct
    if mapped is not None and mapped.takes([x], dim):
        return mapped.all_gather(x, dim, lasts)
    size = group.size
    front = x.movedim(dim, 0).contiguous()
    out = front.new_empty((size * front.shape[0], *front.shape[1:]))
    dist.all_gather_into_tensor(out, front, group=group.processes)
    return out.movedim(0, dim)


def reduce_scatter(x: Tensor, dim: int, group: Group) -> Tensor:
    """Sum over ranks; each keeps its slice along ``dim``. Gloo has no such exchange: there it sums, then slices."""
    dim, mapped = dim % x.dim(), group.direct
    size = group.size
    share = _share(x.shape[dim], size)
    if mapped is not None and mapped.takes([x], dim):
        return mapped.reduce_scatter(x, dim)
    front = x.movedim(dim, 0).contiguous()
    if x.is_cuda:
        out = front.new_empty((share, *front.shape[1:]))
        dist.reduce_scatter_tensor(out, front, group=group.processes)
        return out.movedim(0, dim)
    front = front.clone()
    dist.all_reduce(front, group=group.processes)
    return local_part(front, 0, group).movedim(0, dim)


def all_to_all(
    xs: Sequence[Tensor], split_dim: int, concat_dim: int, group: Group, lasts: Lasts = Lasts.LONG
) -> list[Tensor]:
    """Split along one dimension, concatenate along another: the slices change axis. One exchange for all of ``xs``.

    xs: equally shaped, [.., n P at split_dim, .., k at concat_dim, ..] -> [.., n, .., k P, ..] each.
    """
    dims, shape = xs[0].dim(), xs[0].shape
    split_dim, concat_dim, mapped = split_dim % dims, concat_dim % dims, group.direct
    size = group.size
    _share(shape[split_dim], size)
    if mapped is not None and mapped.takes(xs, split_dim, concat_dim):
        return mapped.all_to_all(xs, split_dim, concat_dim, lasts)
    if len(xs) == 1:
        parts = _parts(xs[0], split_dim, size).contiguous()[:, None]
    else:
        parts = torch.stack([_parts(x, split_dim, size) for x in xs], 1)
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=group.processes)
    return [_joined(own, concat_dim) for own in received.unbind(1)]


@dataclass
class Flight:
    """An all-to-all under way: ``received`` must not be touched before its end.

    sent: what the library still reads, so ``received`` [P, ...] is to be joined; None where ``received`` is the result.
    wait: returns once it is there (on a GPU: what follows on the device waits).
    """

    received: Tensor
    sent: Tensor | None = None
    wait: Callable[[], object] = lambda: None


def begin_all_to_all(x: Tensor, split_dim: int, concat_dim: int, group: Group, lasts: Lasts = Lasts.LONG) -> Flight:
    """``all_to_all`` of x, dimensions >= 0; other work goes on until ``end_all_to_all``."""
    mapped = group.direct
    if mapped is not None and mapped.takes([x], split_dim, concat_dim):
        (received,), wait = mapped.begin_all_to_all([x], split_dim, concat_dim, lasts)
        return Flight(received, wait=wait)
    parts = _parts(x, split_dim, group.size).contiguous()
    received = torch.empty_like(parts)
    work = dist.all_to_all_single(received, parts, group=group.processes, async_op=True)
    return Flight(received, parts, work.wait if work is not None else lambda: None)


def begin_all_gather(x: Tensor, dim: int, group: Group, lasts: Lasts = Lasts.LONG) -> Flight:
    """``all_gather`` of x; where it is direct, other work goes on until the flight's end."""
    dim, mapped = dim % x.dim(), group.direct
    if mapped is not None and mapped.takes([x], dim):
        out, wait = mapped.begin_all_gather(x, dim, lasts)
        return Flight(out, wait=wait)
    return Flight(all_gather(x, dim, group, lasts))


def begin_reduce_scatter(x: Tensor, dim: int, group: Group) -> Flight:
    """``reduce_scatter`` of x, likewise."""
    dim, mapped = dim % x.dim(), group.direct
    if mapped is not None and mapped.takes([x], dim):
        out, wait = mapped.begin_reduce_scatter(x, dim)
        return Flight(out, wait=wait)
    return Flight(reduce_scatter(x, dim, group))


def end_all_to_all(flight: Flight, concat_dim: int) -> Tensor:
    """Wait (on a GPU: the device does); what came, concatenated along ``concat_dim``."""
    flight.wait()
    return flight.received if flight.sent is None else _joined(flight.received, concat_dim)


def _parts(x: Tensor, split_dim: int, size: int) -> Tensor:
    """[.., n P at split_dim >= 0, ..] -> [P, .., n, ..], a view."""
    return x.unflatten(split_dim, (size, _share(x.shape[split_dim], size))).movedim(split_dim, 0)


def _joined(received: Tensor, concat_dim: int) -> Tensor:
    """[P, .., k at concat_dim + 1, ..] -> [.., P k at concat_dim, ..]."""
    return received.movedim(0, concat_dim).flatten(concat_dim, concat_dim + 1)


def _share(length: int, size: int) -> int:
    if length % size:
        raise ValueError(f"a dimension of {length} cannot be shared by {size} ranks; stack entries must pad it")
    return length // size


Flights = dict[str, Flight]  # what is under way, by direction


class _Scatter(torch.autograd.Function):
    """Slice forward, all-gather backward: the input is the same on every rank and feeds different work."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: Group) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return local_part(x, dim, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return all_gather(grads[0], ctx.dim, ctx.group).contiguous(), None, None


class _GatherSame(torch.autograd.Function):
    """All-gather forward, slice backward: every rank does the same work with the result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: Group) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return all_gather(x, dim, group).contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return local_part(grads[0], ctx.dim, ctx.group), None, None


class _GatherShared(_GatherSame):
    """All-gather forward, reduce-scatter backward: every rank does different work with the result, in its block."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: Group) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return all_gather(x, dim, group, Lasts.by(ctx))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return reduce_scatter(grads[0], ctx.dim, ctx.group), None, None


class _Exchange(torch.autograd.Function):
    """All-to-all forward, the inverse all-to-all backward, of one or several tensors that a block uses up."""

    @staticmethod
    def forward(ctx: Any, split_dim: int, concat_dim: int, group: Group, *xs: Tensor) -> tuple[Tensor, ...]:
        ctx.dims, ctx.group = (split_dim, concat_dim), group
        return tuple(all_to_all(xs, split_dim, concat_dim, group, Lasts.by(ctx)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        split_dim, concat_dim = ctx.dims
        return None, None, None, *all_to_all(grads, concat_dim, split_dim, ctx.group, Lasts.SHORT)


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
            flights["forward"] = begin_all_to_all(x, *dims, group, Lasts.by(ctx))
            return flights["forward"].received
        out = end_all_to_all(flights.pop("forward"), dims[1])
        return out.view_as(out)  # what arrived by itself is x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        split_dim, concat_dim = ctx.dims
        if ctx.begins:
            return end_all_to_all(ctx.flights.pop("backward"), split_dim), None, None, None, None
        flight = begin_all_to_all(grads[0], concat_dim, split_dim, ctx.group, Lasts.SHORT)
        ctx.flights["backward"] = flight
        return flight.received.view(ctx.shape), None, None, None, None


class _OverlappedGather(torch.autograd.Function):
    """``_GatherShared`` that goes on beside other work, forward and backward: begins it, or ends it.

    As in ``_Overlapped``, the other end's backward undoes this one's.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, begins: bool, dim: int, group: Group, flights: Flights) -> Tensor:
        ctx.begins, ctx.dim, ctx.group, ctx.flights = begins, dim, group, flights
        if begins:
            flights["forward"] = begin_all_gather(x, dim, group, Lasts.by(ctx))
            return flights["forward"].received
        flights.pop("forward").wait()
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        if ctx.begins:
            flight = ctx.flights.pop("backward")
            flight.wait()
            return flight.received, None, None, None, None
        ctx.flights["backward"] = begin_reduce_scatter(grads[0], ctx.dim, ctx.group)
        return grads[0], None, None, None, None  # shaped as what was gathered; the other end looks at the flight


def scatter(x: Tensor, dim: int, group: Group) -> Tensor:
    """Full -> this rank's slice; gradients are gathered."""
    return _Scatter.apply(x, dim, group)


def gather_same(x: Tensor, dim: int, group: Group) -> Tensor:
    """Slices -> full, for work that all ranks repeat; the gradient is sliced."""
    return _GatherSame.apply(x, dim, group)


def gather_shared(x: Tensor, dim: int, group: Group) -> Tensor:
    """Slices -> full, for work that the ranks share; gradients are summed and sliced."""
    return _GatherShared.apply(x, dim, group)


def begin_gather(x: Tensor, dim: int, group: Group, flights: Flights) -> Tensor:
    """First half of ``gather_shared``: a tensor that only ``end_gather`` may read.

    In between no exchange comes but such as go on beside other work too.
    """
    return _OverlappedGather.apply(x, True, dim, group, flights)


def end_gather(x: Tensor, dim: int, group: Group, flights: Flights) -> Tensor:
    """Second half of ``gather_shared``."""
    return _OverlappedGather.apply(x, False, dim, group, flights)


def exchange(x: Tensor, split_dim: int, concat_dim: int, group: Group) -> Tensor:
    """Move the shards from ``concat_dim`` to ``split_dim``."""
    return exchange_all((x,), split_dim, concat_dim, group)[0]


def exchange_all(xs: tuple[Tensor, ...], split_dim: int, concat_dim: int, group: Group) -> tuple[Tensor, ...]:
    """``exchange`` of equally shaped tensors in one go."""
    return _Exchange.apply(split_dim, concat_dim, group, *xs)


def begin_exchange(x: Tensor, split_dim: int, concat_dim: int, group: Group, flights: Flights) -> Tensor:
    """First half of ``exchange``: a tensor that only ``end_exchange`` may read, after whatever else can be done.

    split_dim, concat_dim >= 0.
    """
    return _Overlapped.apply(x, True, (split_dim, concat_dim), group, flights)


def end_exchange(x: Tensor, split_dim: int, concat_dim: int, group: Group, flights: Flights) -> Tensor:
    """Second half of ``exchange``."""
    return _Overlapped.apply(x, False, (split_dim, concat_dim), group, flights)
