"""Rank 0's decision to stop, the same on all training ranks at the same step."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

TARGET_REACHED, STOP_REQUESTED, PHASE_REACHED = 1, 2, 3


class StopSignal:
    """Rank 0's decision to stop, known to all training ranks one step later and at the same step.

    Every step starts a tiny asynchronous broadcast on a CPU group and reads the previous one, so nobody waits.
    """

    def __init__(self, group: dist.ProcessGroup | None, decide: Callable[[], int]) -> None:
        self.group, self.decide = group, decide
        self._flight: tuple[dist.Work, Tensor] | None = None

    def poll(self) -> int:
        """0, or the code that rank 0's ``decide`` returned at the previous step (at this one in a single process)."""
        if self.group is None:
            return self.decide()
        code = 0
        if self._flight is not None:
            self._flight[0].wait()
            code = int(self._flight[1])
        flag = torch.tensor([self.decide() if dist.get_rank() == 0 else 0])
        work = dist.broadcast(flag, src=0, group=self.group, async_op=True)
        assert work is not None
        self._flight = (work, flag)
        return code

    def wait(self) -> None:
        """For the broadcast under way, which all ranks have begun at this step; ``poll`` reads it."""
        if self._flight is not None:
            self._flight[0].wait()

    def close(self) -> None:
        """Wait for the broadcast still under way."""
        self.wait()
        self._flight = None
