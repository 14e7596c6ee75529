"""Who may exchange directly, and over which memory."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
from torch import Tensor

from scalefold.parallel.dap.arrivals import Arrivals
from scalefold.parallel.dap.collectives import Group
from scalefold.parallel.dap.direct import (
    DTYPES,
    KEPT_BYTES,
    PASSING_BYTES,
    STAGE_BYTES,
    STAGES,
    DirectExchanges,
)
from scalefold.parallel.dap.peer_memory import meeting

log = logging.getLogger(__name__)


def connect(group: Group, control: dist.ProcessGroup, device: torch.device) -> bool:
    """Let the GPUs of ``group``, all of one host, exchange directly from now on, if all of them can.

    Every rank of ``control`` (the same ranks or more, on the CPU) takes part; they go one way together. Where a rank
    cannot map its peers' memory, the library goes on exchanging, and the first rank logs the driver's reason.
    """
    exchanges, reason = None, ""
    try:
        exchanges = mapped(group.processes, device)
    except Exception as error:  # whatever driver, container or another version of PyTorch says: the library goes on
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
    reasons = [""] * dist.get_world_size(control)
    dist.all_gather_object(reasons, reason, group=control)
    failed = next((f"rank {rank} of the group: {text}" for rank, text in enumerate(reasons) if text), None)
    if failed is not None:
        exchanges = None
        if group.rank == 0:
            log.warning("exchanges by NCCL, because GPUs cannot read each other's memory: %s", failed)
    group.direct = exchanges
    return exchanges is not None


def mapped(group: dist.ProcessGroup, device: torch.device) -> DirectExchanges:
    """Exchanges over new memory that all ranks of ``group`` map, taking part; RuntimeError where one cannot."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    mapping: list[Any] = []

    def shared(count: int) -> tuple[Tensor, list[Tensor]]:
        """This rank's memory and every rank's as this rank sees it, all zeros before any rank goes on."""
        memory = symmetric_memory.empty(count, dtype=torch.uint8, device=device).zero_()
        torch.cuda.synchronize(device)
        mapping.append(symmetric_memory.rendezvous(memory, group))
        return memory, [mapping[-1].get_buffer(peer, (count,), torch.uint8) for peer in range(size)]

    return _over(shared, rank, size, mapping)


def unconnected(rank: int, size: int, device: torch.device) -> DirectExchanges:
    """Exchanges that launch what those of a group launch, and reach nobody: to compile it ahead, on "meta"."""

    def shared(count: int) -> tuple[Tensor, list[Tensor]]:
        own = torch.empty(count, dtype=torch.uint8, device=device)
        return own, [own] * size

    return _over(shared, rank, size)


def _over(
    shared: Callable[[int], tuple[Tensor, list[Tensor]]], rank: int, size: int, mapping: Sequence[object] = ()
) -> DirectExchanges:
    """Exchanges over what ``shared`` gives for so many bytes: this rank's memory, and every rank's."""
    stages, staged = zip(*(shared(STAGE_BYTES) for _ in range(STAGES)), strict=True)
    views = {dtype: [[peer.view(dtype) for peer in peers] for peers in staged] for dtype in DTYPES}
    kept, passing = KEPT_BYTES // size, PASSING_BYTES // size
    memory, peers = shared(kept + passing)
    numbers, at_peers = shared(size * torch.int32.itemsize)
    addresses = [peer.view(torch.int32)[rank:].data_ptr() for peer in at_peers]
    barrier = meeting(numbers.view(torch.int32), addresses)
    return DirectExchanges(rank, size, stages, views, barrier, Arrivals(memory, peers, kept, barrier), mapping)
