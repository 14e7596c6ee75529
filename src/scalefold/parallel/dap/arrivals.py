"""Memory in which results of exchanges arrive from peers, and who has which part of it when."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from scalefold.kernels.around import aside

PASSING_TURNS = 16
ALIGNMENT = 512


@dataclass
class Arrivals:
    """Memory in which results of exchanges arrive, cut alike on all ranks.

    own: this rank's memory; peers: every rank's one as this rank sees it, in rank order; all uint8 of equal length, the
    first ``kept_bytes`` for results that a backward pass needs. barrier: returns once all ranks are there (on the
    device: what follows in the stream waits).
    """

    own: Tensor
    peers: Sequence[Tensor]
    kept_bytes: int
    barrier: Callable[[], None]
    _kept: int = 0
    _passing: int = field(init=False)

    def __post_init__(self) -> None:
        self._passing = self.kept_bytes

    def begin(self) -> None:
        """Another step: no rank needs results of the one before."""
        self.barrier()
        self._kept, self._passing = 0, self.kept_bytes

    def place(self, count: int, keep: bool) -> int | None:
        """Where a result of ``count`` bytes goes; None where there is no room for it."""
        count += -count % ALIGNMENT
        if keep:
            place, self._kept = self._kept, self._kept + count
            if self._kept <= self.kept_bytes:
                return place
            self._kept = place
            return None
        end = self.own.numel()
        if count * PASSING_TURNS > end - self.kept_bytes:
            return None
        place = self._passing if self._passing + count <= end else self.kept_bytes
        middle = (self.kept_bytes + end) // 2
        if (place < middle) != (self._passing - 1 < middle):  # into the other half
            aside.join()  # what reads results on a second stream is not half a turn behind: peers write there again
        self._passing = place + count
        return place

    def at(self, place: int, shape: Sequence[int], dtype: torch.dtype, number: int) -> list[Tensor]:
        """``number`` tensors behind each other: of their own as autograd sees them, no views of each other."""
        numel, first = math.prod(shape), (int(self.own.storage_offset()) + place) // dtype.itemsize
        empty: Any = [self.own.new_empty(0, dtype=dtype) for _ in range(number)]
        storage = self.own.untyped_storage()
        return [out.set_(storage, first + n * numel, tuple(shape)) for n, out in enumerate(empty)]
