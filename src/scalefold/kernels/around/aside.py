"""Gradients of parameters beside the backward's chain: on a second stream, where only the update waits for them.

A backward is one chain of kernels through activations. Products over all rows and sums of partial results, which only
the update reads, need not hold it up: a ``Side`` puts them on a stream of its own, in a captured step a branch of its
graph. They fill multiprocessors that beginnings and ends of the chain's kernels leave idle. Kernels and bits are the
same.

Nothing on the chain may touch such a gradient before ``join``. Autograd does not as long as it is the only one of its
parameter: it becomes ``.grad`` as it is. So of a parameter with several gradients in a backward the first one takes in
the others, aside, and autograd never sees them. Where there is a ``.grad`` to add to, gradients are computed on the
chain, after all work aside.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

MOST_HELD = 2**30  # bytes of activations kept for unfinished work

Gradients = Iterable[Tensor | None]  # None: a parameter that is not there, or whose gradient is in an earlier one
_sides: list["Side"] = []


class Side:
    """A stream for gradients of parameters, and the tensors of the chain that its unfinished work reads.

    Those are kept until the chain has waited for the work: the allocator knows of one stream only and would give their
    memory away.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
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
            self._check()
        finally:
            _sides.remove(self)
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
            found = [self._taken_in(p, gradient) for p, gradient in zip(parameters, compute(), strict=True)]
        self._hold([tensor for tensor in read if tensor is not None])
        return found

    def follow(self, read: Sequence[Tensor], compute: Callable[[], None]) -> None:
        """``compute()`` on the side, behind all that has been launched there and on the chain; see ``follow``."""
        with self._branch():
            compute()
        self._hold(list(read))

    def _taken_in(self, parameter: Tensor | None, gradient: Tensor | None) -> Tensor | None:
        """The gradient if it is its parameter's first one; None if it has been added to that."""
        if parameter is None or gradient is None:
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
        if self._held:
            self._wait(len(self._held))

    def _branch(self) -> torch.cuda.StreamContext:
        self._stream.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(self._stream)

    def _hold(self, read: list[Tensor]) -> None:
        """Keep what unfinished work reads; wait for the older half of it where that is too much."""
        size = sum(tensor.numel() * tensor.element_size() for tensor in read)
        self._held.append((self._stream.record_event(), read, size))
        if sum(size for *_, size in self._held) > MOST_HELD:
            self._wait(len(self._held) // 2)

    def _wait(self, count: int) -> None:
        """For the oldest ``count``, whose tensors may go then."""
        done = [self._held.popleft() for _ in range(count)]
        if done:
            torch.cuda.current_stream().wait_event(done[-1][0])


def gradients(
    parameters: Sequence[Tensor | None], read: Sequence[Tensor | None], compute: Callable[[], Gradients]
) -> Gradients:
    """``compute()``, gradients of ``parameters`` in that order, aside if a ``Side`` is in use.

    parameters: all that it computes gradients of; read: tensors of the chain that it reads and that nothing else keeps
    until the end of the backward.
    """
    return _sides[-1].run(parameters, read, compute) if _sides else compute()


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
