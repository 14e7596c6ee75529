"""Whether all training ranks hold the same weights: compared bit for bit beside training, at start and checkpoints.

Every rank applies the same update to the same numbers, so any difference is a fault: of memory, of an exchange, or of a
resume. Nothing else would show it, because each rank's loss looks healthy.
"""

import socket
from collections import Counter
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from scalefold.errors import TrainingError
from scalefold.step.optimizer import Optimizer


def checksums(optimizer: Optimizer) -> Tensor:
    """[6] int64 on the device: sums of the bits of weights, moments and averages, and both counters.

    A sum of integers is exact in any order, and no single changed bit leaves it as it was.
    """
    buffers = (optimizer.flat.master, optimizer.exp_avg, optimizer.exp_avg_sq, optimizer.averaged)
    sums = [buffer.view(torch.int32).sum(dtype=torch.int64) for buffer in buffers]
    counters = [torch.tensor(n, device=sums[0].device) for n in (optimizer.adam_step, optimizer.num_averaged)]
    return torch.stack([*sums, *counters])


@dataclass
class _Flight:
    """A comparison under way: first the sums travel to the host, then their extremes over the ranks."""

    step: int
    sums: Tensor
    arrival: "torch.cuda.Event | None"
    extremes: Tensor | None = None
    work: dist.Work | None = None


class Agreement:
    """Compares the training ranks' state; no call but ``settle`` waits for more than has long been done.

    Args:
        optimizer: the state.
        group: a CPU group of all training ranks, or None for a single one.
    """

    def __init__(self, optimizer: Optimizer, group: dist.ProcessGroup | None) -> None:
        self.optimizer, self.group = optimizer, group
        self.last_step = 0
        self._flight: _Flight | None = None

    @torch.no_grad()
    def begin(self, step: int) -> None:
        """Compare the state as of now, after ``step`` iterations; the same call on all ranks."""
        if self.group is None:
            return
        self.settle()
        sums = checksums(self.optimizer)
        host = torch.empty(sums.shape, dtype=sums.dtype, pin_memory=sums.is_cuda)
        host.copy_(sums, non_blocking=True)
        arrival = torch.cuda.Event() if sums.is_cuda else None
        if arrival is not None:
            arrival.record()
        self._flight = _Flight(step, host, arrival)

    def advance(self) -> None:
        """Go on with the comparison under way, if there is one; once a step on all ranks.

        Raises:
            TrainingError: the ranks differ; names those that do.
        """
        flight = self._flight
        if flight is None:
            return
        if flight.work is None:
            if flight.arrival is not None:
                flight.arrival.synchronize()
            flight.extremes = torch.cat([flight.sums, -flight.sums])
            flight.work = dist.all_reduce(flight.extremes, dist.ReduceOp.MAX, group=self.group, async_op=True)
            return
        flight.work.wait()
        self._flight = None
        assert flight.extremes is not None
        highest, lowest = flight.extremes[:6], -flight.extremes[6:]
        if not torch.equal(highest, lowest):
            raise TrainingError(self._who_differs(flight))
        self.last_step = flight.step

    def wait(self) -> None:
        """For the exchange under way, if all ranks have begun one; ``advance`` judges it."""
        if self._flight is not None and self._flight.work is not None:
            self._flight.work.wait()

    def settle(self) -> None:
        """Wait for the comparison under way.

        Raises:
            TrainingError: the ranks differ.
        """
        while self._flight is not None:
            self.advance()

    def _who_differs(self, flight: _Flight) -> str:
        mine = (dist.get_rank(), socket.gethostname(), tuple(flight.sums.tolist()))
        found: list[tuple[int, str, tuple[int, ...]]] = [mine] * dist.get_world_size(self.group)
        dist.all_gather_object(found, mine, group=self.group)
        (usual, count) = Counter(sums for _, _, sums in found).most_common(1)[0]
        odd = [f"rank {rank} on {host}" for rank, host, sums in found if sums != usual]
        others = f"the other {count}" if count > 1 else f"rank {found[0][0]}"
        return (
            f"step {flight.step}: {', '.join(odd[:8])}{', ...' if len(odd) > 8 else ''} holds other weights, "
            f"moments or averages than {others}; all were equal after step {self.last_step}. Suspect "
            "memory and links of these nodes; continue with --resume"
        )
