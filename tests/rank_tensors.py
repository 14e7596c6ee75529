"""Random tensors, one per rank, and ranks in one process that exchange them."""

from collections.abc import Callable

import torch
from torch import Tensor

from kernel_accuracy import DEVICE
from scalefold.parallel.dap.arrivals import Arrivals
from scalefold.parallel.dap.direct import DirectExchanges
from scalefold.parallel.dap.peer_memory import meeting

KEPT, PASSING = 1 << 18, 1 << 21


def tensors(size: int, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """``size`` tensors of a shape and type, the same in every call."""
    generator = torch.Generator().manual_seed(sum(shape))
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype) for _ in range(size)]


def memory(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.uint8, device=DEVICE)


def group_of(size: int) -> list[DirectExchanges]:
    """All ranks in one process; their results may be read once all of them have written."""
    arrived = [memory(KEPT + PASSING) for _ in range(size)]
    return [
        DirectExchanges(rank, size, [], {torch.float32: [], torch.bfloat16: []}, lambda: None, arrivals)
        for rank, arrivals in enumerate(Arrivals(own, arrived, KEPT, lambda: None) for own in arrived)
    ]


def barrier_of(rank: int, numbers: Tensor) -> Callable[[], None]:
    """That of ranks whose processes share numbers: [P, P] int32, a row of each rank's memory."""
    return meeting(numbers[rank], [own[rank:].data_ptr() for own in numbers])
