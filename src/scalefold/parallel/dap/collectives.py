"""Exchanges inside an axial-parallel group of P ranks.

A group whose GPUs map each other's memory exchanges by ``direct``; all others, and shapes that are too odd for it, by
the process group's library. With gradients: ``exchanges``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from scalefold.kernels.destination import Destination


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

    def destinations(
        self, x: Tensor, shape: Sequence[int], dim: int, lasts: Lasts, number: int = 1
    ) -> list[Destination]: ...

    def arrived(self, destination: Destination, alone: bool = False) -> Tensor: ...

    def begin_arrived(self, destination: Destination) -> tuple[Tensor, Callable[[], None]]: ...

    def all_to_all(
        self, xs: Sequence[Tensor], split_dim: int, concat_dim: int, lasts: Lasts, place: int | None = None
    ) -> list[Tensor]: ...

    def begin_all_to_all(
        self, xs: Sequence[Tensor], split_dim: int, concat_dim: int, lasts: Lasts
    ) -> tuple[list[Tensor], Callable[[], None]]: ...

    def all_gather(self, x: Tensor, dim: int, lasts: Lasts, place: int | None = None) -> Tensor: ...

    def begin_all_gather(
        self, x: Tensor, dim: int, lasts: Lasts, place: int | None = None
    ) -> tuple[Tensor, Callable[[], None]]: ...

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


def all_gather(
    x: Tensor, dim: int, group: Group, lasts: Lasts = Lasts.LONG, destination: Destination | None = None
) -> Tensor:
    """Concatenate the ranks' slices along ``dim``. destination: what ``gather_destination`` set aside."""
    dim, mapped = dim % x.dim(), group.direct
    if destination is not None and mapped is not None:
        return (
            mapped.arrived(destination) if destination.written else mapped.all_gather(x, dim, lasts, destination.place)
        )
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
    xs: Sequence[Tensor],
    split_dim: int,
    concat_dim: int,
    group: Group,
    lasts: Lasts = Lasts.LONG,
    destinations: Sequence[Destination] = (),
) -> list[Tensor]:
    """Split along one dimension, concatenate along another: the slices change axis. One exchange for all of ``xs``.

    xs: equally shaped, [.., n P at split_dim, .., k at concat_dim, ..] -> [.., n, .., k P, ..] each.
    destinations: what ``exchange_destinations`` set aside for them; all of them are written, or none.
    """
    if destinations and group.direct is not None:
        first, *others = destinations
        if first.written:
            return [group.direct.arrived(first), *(other.received for other in others)]
        return group.direct.all_to_all(xs, split_dim, concat_dim, lasts, first.place)
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


def begin_all_gather(
    x: Tensor, dim: int, group: Group, lasts: Lasts = Lasts.LONG, destination: Destination | None = None
) -> Flight:
    """``all_gather`` of x; where it is direct, other work goes on until the flight's end.

    destination: what ``gather_destination`` set aside.
    """
    dim, mapped = dim % x.dim(), group.direct
    if destination is not None and mapped is not None:
        if destination.written:
            out, wait = mapped.begin_arrived(destination)
        else:
            out, wait = mapped.begin_all_gather(x, dim, lasts, destination.place)
        return Flight(out, wait=wait)
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


def exchange_destinations(
    x: Tensor, split_dim: int, concat_dim: int, group: Group, number: int = 1
) -> list[Destination]:
    """Where ``all_to_all`` of so many tensors like x will have its results, dimensions >= 0; empty: nowhere yet.

    That exchange follows, whether its operands are written there or not.
    """
    mapped = group.direct
    if mapped is None or not mapped.takes([x] * number, split_dim, concat_dim):
        return []
    shape = list(x.shape)
    shape[split_dim], shape[concat_dim] = _share(shape[split_dim], group.size), shape[concat_dim] * group.size
    return mapped.destinations(x, shape, concat_dim, _by_mode(), number)


def gather_destination(x: Tensor, dim: int, group: Group) -> Destination | None:
    """The same for ``all_gather`` and ``begin_all_gather`` of one tensor."""
    mapped = group.direct
    if mapped is None or not mapped.takes([x], dim):
        return None
    shape = [n * group.size if d == dim else n for d, n in enumerate(x.shape)]
    return next(iter(mapped.destinations(x, shape, dim, _by_mode())), None)


def _by_mode() -> Lasts:
    """``Lasts.by`` for a function that is not called yet."""
    return Lasts.STEP if torch.is_grad_enabled() else Lasts.SHORT


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
