"""Gradients of parameters beside the backward's chain: on a second stream, where only the update waits for them.

A backward is one chain of kernels through activations. Products over all rows and sums of partial results, which only
the update reads, need not hold it up: a ``Side`` puts them on a stream of its own, in a captured step a branch of its
graph. They fill multiprocessors that beginnings and ends of the chain's kernels leave idle. Kernels and bits are the
same.

Nothing on the chain may touch such a gradient before ``join``. Autograd does not as long as it is the only one of its
parameter: it becomes ``.grad`` as it is. So a parameter's second gradient in a backward, or one that is added to a
``.grad``, is computed on the chain, after all work aside.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

MOST_HELD = 2**30  # bytes of activations kept for unfinished work

Result = TypeVar("Result")
_sides: list["Side"] = []


class Side:
    """A stream for gradients of parameters, and the tensors of the chain that its unfinished work reads.

    Those are kept until the chain has waited for the work: the allocator knows of one stream only and would give their
    memory away.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._held: deque[tuple[Any, list[Tensor], int]] = deque()  # event after the work, what it reads, bytes
        self._begun: set[int] = set()

    @contextmanager
    def used(self) -> Iterator[None]:
        """Take the work of ``gradients`` from one backward, which is finished on the current stream afterwards."""
        self._begun.clear()
        _sides.append(self)
        try:
            yield
        finally:
            _sides.remove(self)
            self.join()

    def run(self, parameters: list[Tensor], read: list[Tensor], compute: Callable[[], Result]) -> Result:
        """``compute()``, on the side if these parameters allow it; see ``gradients``."""
        if any(not p.is_leaf or p.grad is not None or p.data_ptr() in self._begun for p in parameters):
            self.join()
            return compute()
        self._begun.update(p.data_ptr() for p in parameters)
        with self._branch():
            found = compute()
        self._hold(read)
        return found

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
    parameters: Sequence[Tensor | None], read: Sequence[Tensor | None], compute: Callable[[], Result]
) -> Result:
    """``compute()``, gradients of ``parameters`` alone, aside if a ``Side`` is in use.

    read: tensors of the chain that it reads and that nothing else keeps until the end of the backward.
    """
    if not _sides:
        return compute()
    given = [parameter for parameter in parameters if parameter is not None]
    return _sides[-1].run(given, [tensor for tensor in read if tensor is not None], compute)


def join() -> None:
    """Before gradients are read within a backward: the current stream waits for those aside."""
    for side in _sides:
        side.join()
