"""Gradients of parameters beside the backward's chain: on a second stream, where only the update waits for them.

A backward is one chain of kernels through activations. Products over all rows and sums of partial results, which only
the update reads, need not hold it up: a ``Side`` puts them on a stream of its own, in a captured step a branch of its
graph. They fill multiprocessors that beginnings and ends of the chain's kernels leave idle. Kernels and bits are the
same.

Nothing on the chain may touch such a gradient before ``join``. Autograd does not as long as it is the only one of its
parameter: it becomes ``.grad`` as it is. So of a parameter with several gradients in a backward the first one takes in
the others, aside, and autograd never sees them. Where there is a ``.grad`` to add to, gradients are computed on the
chain, after all work aside.

What operations of a ``Side`` with a ``Group`` leave to that is computed together, once it is enough.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

MOST_HELD = 2**30  # bytes of activations kept for unfinished work

Gradients = Iterable[Tensor | None]  # None: a parameter that is not there, or whose gradient is in an earlier one
_sides: list["Side"] = []


class Group(Protocol):
    """Gradients of several operations that are computed together: ``gradients.grouped``."""

    @property
    def is_full(self) -> bool: ...

    def add(self, partials: Sequence[Tensor], products: Sequence[Any], dtype: torch.dtype) -> list[Tensor]: ...

    def run(self) -> None: ...

    def clear(self) -> None: ...


class Side:
    """A stream for gradients of parameters, and the tensors of the chain that its unfinished work reads.

    Those are kept until the chain has waited for the work: the allocator knows of one stream only and would give their
    memory away. ``group``: computes what operations leave to it, unless None. Device "meta" has no stream.
    """

    def __init__(self, device: torch.device, group: Group | None = None) -> None:
        self._stream = None if device.type == "meta" else torch.cuda.Stream(device)
        self._group = group
        self._waiting: list[Tensor] | None = None  # what is read by work since the last event, some of it to come
        self._taking = False  # whether operations may leave something to the group
        self._held: deque[tuple[Any, list[Tensor], int]] = deque()  # event after the work, what it reads, bytes
        self._first: dict[int, tuple[Tensor, Tensor]] = {}  # by address: parameter, gradient of this backward

    @contextmanager
    def used(self) -> Iterator[None]:
        """Take the work of ``gradients`` from one backward, which is finished on the current stream afterwards.

        Raises RuntimeError if autograd made another gradient of one that was computed aside, of values not yet there.
        """
        _sides.append(self)
        try:
            yield
            self._flush()
            self._check()
        finally:
            _sides.remove(self)
            self._forget()
            self.join()
            self._first.clear()

    def run(
        self, parameters: Sequence[Tensor | None], read: Sequence[Tensor | None], compute: Callable[[], Gradients]
    ) -> Gradients:
        """``compute()``, on the side if these parameters allow it; see ``gradients``."""
        if any(p is not None and (not p.is_leaf or p.grad is not None) for p in parameters):
            self.join()
            return compute()
        with self._branch():
            self._taking = self._group is not None
            try:
                results = list(compute())
            finally:
                self._taking = False
            if self._group is not None and any(p is not None and p.data_ptr() in self._first for p in parameters):
                self._group.run()  # it may have both gradients of a parameter
            found = [self._taken_in(p, gradient) for p, gradient in zip(parameters, results, strict=True)]
        self._waiting = [*(self._waiting or ()), *(tensor for tensor in read if tensor is not None)]
        if self._group is None or self._group.is_full:
            self._flush()
        return found

    def follow(self, read: Sequence[Tensor], compute: Callable[[], None]) -> None:
        """``compute()`` on the side, behind all that has been launched there and on the chain; see ``follow``."""
        with self._branch():
            if self._group is not None:
                self._group.run()
            compute()
        self._waiting = [*(self._waiting or ()), *read]
        self._flush()

    @property
    def group(self) -> Group | None:
        """What may be left to be computed later, now."""
        return self._group if self._taking else None

    def _flush(self) -> None:
        """Compute what is waiting, and keep what all work since the last event reads."""
        if self._waiting is None:
            return
        read, self._waiting = self._waiting, None
        if self._group is not None:
            with self._branch():
                self._group.run()
        self._hold(read)

    def _forget(self) -> None:
        """What has not been computed, of a backward that failed."""
        if self._group is not None:
            self._group.clear()

    def _taken_in(self, parameter: Tensor | None, gradient: Tensor | None) -> Tensor | None:
        """The gradient if it is its parameter's first one; None if it has been added to that."""
        if parameter is None or gradient is None or parameter.is_meta:  # that has no address
            return gradient
        if parameter.data_ptr() in self._first:
            self._first[parameter.data_ptr()][1].add_(gradient)
            return None
        self._first[parameter.data_ptr()] = parameter, gradient.detach()  # autograd would copy what is held twice
        return gradient

    def _check(self) -> None:
        for parameter, gradient in self._first.values():
            if parameter.grad is not None and parameter.grad.data_ptr() != gradient.data_ptr():
                raise RuntimeError(f"a gradient {tuple(gradient.shape)} was read before it was computed")

    def join(self) -> None:
        """The current stream waits for everything aside."""
        self._flush()
        if self._held:
            self._wait(len(self._held))

    def _branch(self) -> AbstractContextManager[Any]:
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(self._stream)

    def _hold(self, read: list[Tensor]) -> None:
        """Keep what unfinished work reads; wait for the older half of it where that is too much."""
        size = sum(tensor.numel() * tensor.element_size() for tensor in read)
        self._held.append((None if self._stream is None else self._stream.record_event(), read, size))
        if sum(size for *_, size in self._held) > MOST_HELD:
            self._wait(len(self._held) // 2)

    def _wait(self, count: int) -> None:
        """For the oldest ``count``, whose tensors may go then."""
        done = [self._held.popleft() for _ in range(count)]
        if done and self._stream is not None:
            torch.cuda.current_stream().wait_event(done[-1][0])


def gradients(
    parameters: Sequence[Tensor | None], read: Sequence[Tensor | None], compute: Callable[[], Gradients]
) -> Gradients:
    """``compute()``, gradients of ``parameters`` in that order, aside if a ``Side`` is in use.

    parameters: all that it computes gradients of; read: tensors of the chain that it reads and that nothing else keeps
    until the end of the backward.
    """
    return _sides[-1].run(parameters, read, compute) if _sides else compute()


def group() -> Group | None:
    """What takes gradients to compute them later, if they are computed aside and together now."""
    return _sides[-1].group if _sides else None


def follow(read: Sequence[Tensor], compute: Callable[[], None]) -> None:
    """``compute()``, which does something with gradients of this backward, aside behind them if a ``Side`` is in use.

    read: gradients that it reads.
    """
    if _sides:
        _sides[-1].follow(read, compute)
    else:
        compute()


def join() -> None:
    """Before gradients are read within a backward: the current stream waits for those aside."""
    for side in _sides:
        side.join()
