"""Exchanges inside an axial-parallel group over memory that the GPUs of a host map from each other.

Two ways, both without multicast and without the host in between, so that a CUDA graph can hold them:

* **Arrivals.** Every rank writes its parts straight to where they belong in its peers' results, and all ranks meet at a
  barrier on the device: one kernel and one barrier. Results lie in memory that all ranks of the group map, at the same
  place on each: either until the next step begins (what the backward pass needs), or until some exchanges later.
  Whoever makes an operand may write it there itself (``destination``): then the barrier is all that is left.
  Where other work comes before the result is read, the exchange goes on beside it, on a stream of its own, and of an
  all-to-all any barrier in between serves (``begin_all_to_all``).
* **Stages.** Every rank stages what it sends, meets the others at the barrier, and reads its parts of each peer's
  stage: for sums, for results that somebody holds longer, and where there is no room for a result any more.

Why nobody writes what a peer still reads: every exchange is a barrier (but for those that another one's barrier
serves), and a rank reaches one only after all that stands before it in its stream and after the exchange beside that
(but for one that ``arrived`` lets go on; the next barrier comes after it).
Two stages take turns: who writes to a stage again has passed the barrier of the other one, which its peers reach only
after reading the first. The place of a passing result is given away again after at least ``PASSING_TURNS`` exchanges;
kept results are given away when a step begins, with a barrier of its own.
Turns of the stages go on from one captured graph to the next, and graphs are replayed in any order, so one may begin
with the stage that the one before ended with: the barrier of the step's beginning lies between.
Measured beside NCCL by ``benchmarks/measure/symmetric_exchange.py``.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scalefold.kernels.destination import Destination
from scalefold.parallel.dap.arrivals import Arrivals
from scalefold.parallel.dap.collectives import Lasts
from scalefold.parallel.dap.peer_memory import LANE, copy_parts, send_parts, sum_parts

STAGE_BYTES = 32 * 2**20  # the largest exchange of the benchmark's shapes has 16 MiB per rank
STAGES = 2
KEPT_BYTES = 12 * 2**30  # of all ranks together: what the benchmark's model exchanges with gradients, and some room
PASSING_BYTES = 2 * 2**30
DTYPES = (torch.bfloat16, torch.float32)


class _Beside(NamedTuple):
    """An exchange beside other work: the event at its end, what it still reads, whether it has a barrier."""

    end: Any
    reads: Sequence[Tensor]
    meets: bool


class DirectExchanges:
    """All-to-all, all-gather and reduce-scatter of one group.

    Args:
        rank, size: place in the group and its size.
        stages: this rank's stages, uint8 of equal length.
        views: per dtype and stage, every rank's stage as this rank sees it, rank order.
        barrier: as that of ``arrivals``.
        arrivals: where results arrive that need not last; None: everything goes by stages.
        mapping: what keeps the peers' memory mapped.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        stages: Sequence[Tensor],
        views: dict[torch.dtype, list[list[Tensor]]],
        barrier: Callable[[], None],
        arrivals: Arrivals | None = None,
        mapping: Sequence[object] = (),
    ) -> None:
        self.rank, self.size, self.stages, self.views, self.barrier = rank, size, stages, views, barrier
        self.arrivals, self.mapping = arrivals, mapping
        self._stream: torch.cuda.Stream | None = None  # of what goes on beside other work
        self._beside: list[_Beside] = []
        self._turn = 0
        self._met = 0  # barriers of exchanges so far

    def begin(self) -> None:
        """A step begins on all ranks of the group."""
        self._join()
        if self.arrivals is not None:
            self.arrivals.begin()

    def takes(self, xs: Sequence[Tensor], dim: int, other: int | None = None) -> bool:
        """Whether equal shapes fit together, and parts along ``dim`` (and ``other``) are long and even enough."""
        shape, dtype = xs[0].shape, xs[0].dtype
        inner = math.prod(shape[max(dim, dim if other is None else other) + 1 :])
        fit = len(xs) * shape.numel() * dtype.itemsize <= self.stages[0].numel()
        return dtype in self.views and fit and inner % LANE == 0

    def destinations(
        self, x: Tensor, shape: Sequence[int], dim: int, lasts: Lasts, number: int = 1
    ) -> list[Destination]:
        """Where so many results of this shape, each with all ranks' parts behind each other along ``dim``, will arrive
        in one exchange; none without room. x: an operand, as whose the results' type is, and their order in memory.
        """
        place, order, found = self._place([x] * number, shape, lasts), _order(x, dim), []
        if place is None:
            return found
        assert self.arrivals is not None
        inner, dim = [shape[n] for n in order], order.index(dim)
        for received in self.arrivals.at(place, inner, x.dtype, number):
            results = [peer[place:].view(x.dtype)[: received.numel()].view(*inner) for peer in self.arrivals.peers]
            parts = self._own_parts(results, dim, inner[dim] // self.size)
            parts = [_in_place(part, order) for part in parts]
            found.append(Destination(place, _in_place(received, order), parts))
            place += received.numel() * received.element_size()
        return found

    def arrived(self, destination: Destination, alone: bool = False) -> Tensor:
        """The result whose operands all ranks have written to their destinations.

        alone: what goes on beside other work, and has no barrier of its own, need not end before; nor does this barrier
        serve it.
        """
        assert self.arrivals is not None
        if alone and self._beside and not any(entry.meets for entry in self._beside):
            self.arrivals.barrier()
        else:
            self._join()
            self._meet()
        return destination.received

    def begin_arrived(self, destination: Destination) -> tuple[Tensor, Callable[[], None]]:
        """The same, all ranks meeting beside other work, and what to call before anybody reads it."""
        with self._aside([destination.received]):
            self._meet()
        return destination.received, self._waiting()

    def all_to_all(
        self, xs: Sequence[Tensor], split_dim: int, concat_dim: int, lasts: Lasts, place: int | None = None
    ) -> list[Tensor]:
        """[.., n P at split_dim, .., k at concat_dim, ..] -> [.., n, .., k P, ..] each, dense.

        place: of the results, where ``destinations`` have set one aside.
        """
        outs, wait = self._all_to_all(xs, split_dim, concat_dim, lasts, self._in_line(), place)
        wait()
        return outs

    def begin_all_to_all(
        self, xs: Sequence[Tensor], split_dim: int, concat_dim: int, lasts: Lasts
    ) -> tuple[list[Tensor], Callable[[], None]]:
        """The same beside other work, and what to call before anybody reads it: it meets a barrier, unless another
        exchange has met one since.
        """
        return self._all_to_all(xs, split_dim, concat_dim, lasts, self._aside(xs, meets=False))

    def _all_to_all(
        self,
        xs: Sequence[Tensor],
        split_dim: int,
        concat_dim: int,
        lasts: Lasts,
        launching: AbstractContextManager[bool],
        place: int | None = None,
    ) -> tuple[list[Tensor], Callable[[], None]]:
        shape = list(xs[0].shape)
        shape[split_dim] //= self.size
        part = shape.copy()
        shape[concat_dim] *= self.size
        split_block, concat_block = math.prod(part[split_dim:]), math.prod(part[concat_dim:])
        place = self._place(xs, shape, lasts) if place is None else place
        if place is not None:
            with launching as beside:
                arrived = self._sent(xs, shape, place, False, split_block, concat_block, beside)
            met = self._met

            def wait() -> None:
                self._join()
                if self._met == met:
                    self._meet()

            return arrived, wait
        outs = [x.new_empty(shape) for x in xs]
        with self._in_line():
            for staged, out in zip(self._staged(xs), outs, strict=True):
                copy_parts(staged, out, self.rank, split_block, concat_block)
        return outs, lambda: None

    def all_gather(self, x: Tensor, dim: int, lasts: Lasts, place: int | None = None) -> Tensor:
        """The ranks' tensors behind each other along ``dim``; dense, where it can be in the memory order of x.

        place: as for ``all_to_all``.
        """
        return self._all_gather(x, dim, lasts, self._in_line(), place)

    def begin_all_gather(
        self, x: Tensor, dim: int, lasts: Lasts, place: int | None = None
    ) -> tuple[Tensor, Callable[[], None]]:
        """The same beside other work, and what to call before anybody reads it; place: as for ``all_to_all``."""
        return self._all_gather(x, dim, lasts, self._aside([x]), place), self._waiting()

    def _all_gather(
        self, x: Tensor, dim: int, lasts: Lasts, launching: AbstractContextManager[bool], place: int | None = None
    ) -> Tensor:
        order = _order(x, dim)
        x, dim = x.permute(order), order.index(dim)
        shape = list(x.shape)
        shape[dim] *= self.size
        block = math.prod(x.shape[dim:])
        place = self._place([x], shape, lasts) if place is None else place
        if place is None:
            out = x.new_empty(shape)
            with launching:
                copy_parts(self._staged([x])[0], out, None, x.numel(), block)
        else:
            with launching as beside:
                (out,) = self._sent([x], shape, place, True, x.numel(), block, beside)
                self._meet()
        return _in_place(out, order)

    def reduce_scatter(self, x: Tensor, dim: int) -> Tensor:
        """This rank's slice along ``dim`` of the sum over ranks; summed in fp32 and in rank order.

        Dense, where it can be in the memory order of x.
        """
        return self._reduce_scatter(x, dim, self._in_line())

    def begin_reduce_scatter(self, x: Tensor, dim: int) -> tuple[Tensor, Callable[[], None]]:
        """The same beside other work, and what to call before anybody reads it."""
        return self._reduce_scatter(x, dim, self._aside([x])), self._waiting()

    def _reduce_scatter(self, x: Tensor, dim: int, launching: AbstractContextManager[bool]) -> Tensor:
        order = _order(x, dim, self.size)
        shape = [x.shape[n] // (self.size if n == dim else 1) for n in order]
        out = x.new_empty(shape)
        with launching:
            parts = self._staged([x.permute(order)])[0]
            sum_parts(parts, out, self.rank, math.prod(shape[order.index(dim) :]))
        return _in_place(out, order)

    @contextmanager
    def _in_line(self) -> Iterator[bool]:
        """Launch an exchange on the current stream, after those beside it: all ranks meet in one order, and what was
        sent before a barrier has arrived behind it.
        """
        self._join()
        yield False

    @contextmanager
    def _aside(self, xs: Sequence[Tensor], meets: bool = True) -> Iterator[bool]:
        """Launch an exchange of xs on a stream beside the current one, where they follow each other."""
        if not xs[0].is_cuda:
            yield True
            return
        self._stream = self._stream or torch.cuda.Stream(xs[0].device)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield True
        self._beside.append(_Beside(self._stream.record_event(), xs, meets))

    def _join(self) -> None:
        """The current stream waits for the exchanges beside it."""
        if self._beside:
            torch.cuda.current_stream().wait_event(self._beside[-1].end)
            self._beside.clear()

    def _waiting(self) -> Callable[[], None]:
        """What waits for the exchange that was just launched, not for those that follow it beside other work."""
        if not self._beside:
            return lambda: None
        end = self._beside[-1].end
        return lambda: torch.cuda.current_stream().wait_event(end)

    def _place(self, xs: Sequence[Tensor], shape: Sequence[int], lasts: Lasts) -> int | None:
        """Where results of ``shape`` arrive; None where they last longer or there is no room for them."""
        if self.arrivals is None or lasts is Lasts.LONG:
            return None
        count = len(xs) * math.prod(shape) * xs[0].dtype.itemsize
        return self.arrivals.place(count, keep=lasts is Lasts.STEP)

    def _sent(
        self,
        xs: Sequence[Tensor],
        shape: list[int],
        place: int,
        whole: bool,
        split_block: int,
        concat_block: int,
        beside: bool,
    ) -> list[Tensor]:
        """Results of ``shape`` at ``place``, there once all ranks meet."""
        assert self.arrivals is not None
        dtype = xs[0].dtype
        targets = self._targets(self.arrivals, place, dtype, concat_block)
        send_parts([x.contiguous() for x in xs], targets, self.rank, whole, split_block, concat_block, beside)
        return self.arrivals.at(place, shape, dtype, len(xs))

    def _meet(self) -> None:
        """The barrier behind which all that was sent so far has arrived."""
        assert self.arrivals is not None
        self._met += 1
        self.arrivals.barrier()

    def _targets(self, arrivals: Arrivals, place: int, dtype: torch.dtype, concat_block: int) -> list[Tensor]:
        """Of each peer the results at ``place``, in which this rank's parts are runs of ``concat_block`` elements."""
        return [peer[place:].view(dtype) for peer in arrivals.peers]

    def _own_parts(self, results: Sequence[Tensor], dim: int, count: int) -> list[Tensor]:
        """Of each peer's result this rank's part."""
        return [result.narrow(dim, self.rank * count, count) for result in results]

    def _staged(self, xs: Sequence[Tensor]) -> list[list[Tensor]]:
        """Of each of the tensors every rank's one of this exchange, flat and readable from here."""
        turn, self._turn = self._turn, (self._turn + 1) % len(self.stages)
        dtype, count = xs[0].dtype, xs[0].numel()
        places = [slice(n * count, (n + 1) * count) for n in range(len(xs))]
        for x, place in zip(xs, places, strict=True):
            self.stages[turn].view(dtype)[place].view(x.shape).copy_(x)
        self._met += 1
        self.barrier()
        return [[peer[place] for peer in self.views[dtype][turn]] for place in places]


def _order(x: Tensor, dim: int, parts: int = 1) -> list[int]:
    """Dimensions of x as they lie in memory, where x is dense and runs of its ``parts`` along ``dim`` are even; else as
    they come.

    An exchange in that order needs no copy before it, and leaves none to whoever wants the result lie as x does.
    """
    order = sorted(range(x.dim()), key=lambda n: -x.stride(n))
    even = math.prod(x.shape[n] for n in order[order.index(dim) :]) % (parts * LANE) == 0
    return order if even and x.permute(order).is_contiguous() else list(range(x.dim()))


def _in_place(out: Tensor, order: list[int]) -> Tensor:
    """View of a tensor whose dimensions come in ``order`` with each of them in its own place."""
    return out.permute([order.index(n) for n in range(out.dim())])
