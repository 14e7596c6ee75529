"""Exchanges inside an axial-parallel group over memory that the GPUs of a host map from each other.

Every rank stages what it sends in memory that all ranks of its group can read, meets them at a barrier on the device,
and reads its parts of each peer's stage straight to where they belong: one copy, one barrier and one kernel, where a
library's exchange needs its own rearranging copies before and after. No multicast, no host in between, so a CUDA graph
can hold it.

Two stages take turns. Whoever writes to a stage again has passed the barrier of the other stage, which its peers reach
only after reading the first one. Turns go on from one captured graph to the next, and graphs are replayed in any order,
so one may begin with the stage that the one before ended with: between them the sum of gradients and logged values
over all training ranks, with which every captured part of a step ends, is the barrier.
Measured beside NCCL by ``benchmarks/measure/symmetric_exchange.py``.
"""

import logging
import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
from torch import Tensor

from scalefold.parallel.dap.collectives import Group
from scalefold.parallel.dap.peer_memory import LANE, copy_parts, sum_parts

log = logging.getLogger(__name__)

STAGE_BYTES = 32 * 2**20  # the largest exchange of the benchmark's shapes has 16 MiB per rank
STAGES = 2
DTYPES = (torch.bfloat16, torch.float32)


class DirectExchanges:
    """All-to-all, all-gather and reduce-scatter of one group.

    Args:
        rank, size: place in the group and its size.
        stages: this rank's stages, uint8 of equal length.
        views: per dtype and stage, every rank's stage as this rank sees it, rank order.
        barrier: returns once all ranks of the group are there (on the device: what follows in the stream waits).
    """

    def __init__(
        self,
        rank: int,
        size: int,
        stages: Sequence[Tensor],
        views: dict[torch.dtype, list[list[Tensor]]],
        barrier: Callable[[int], None],
    ) -> None:
        self.rank, self.size, self.stages, self.views, self.barrier = rank, size, stages, views, barrier
        self._turn = 0

    def takes(self, xs: Sequence[Tensor], dim: int, other: int | None = None) -> bool:
        """Whether equal shapes fit together, and parts along ``dim`` (and ``other``) are long and even enough."""
        shape, dtype = xs[0].shape, xs[0].dtype
        inner = math.prod(shape[max(dim, dim if other is None else other) + 1 :])
        fit = len(xs) * shape.numel() * dtype.itemsize <= self.stages[0].numel()
        return dtype in self.views and fit and inner % LANE == 0

    def all_to_all(self, xs: Sequence[Tensor], split_dim: int, concat_dim: int) -> list[Tensor]:
        """[.., n P at split_dim, .., k at concat_dim, ..] -> [.., n, .., k P, ..] each, dense."""
        shape = list(xs[0].shape)
        shape[split_dim] //= self.size
        part = shape.copy()
        shape[concat_dim] *= self.size
        outs = [x.new_empty(shape) for x in xs]
        split_block, concat_block = math.prod(part[split_dim:]), math.prod(part[concat_dim:])
        for staged, out in zip(self._staged(xs), outs, strict=True):
            copy_parts(staged, out, self.rank, split_block, concat_block)
        return outs

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        """The ranks' tensors behind each other along ``dim``, dense."""
        shape = list(x.shape)
        shape[dim] *= self.size
        out = x.new_empty(shape)
        copy_parts(self._staged([x])[0], out, None, x.numel(), math.prod(x.shape[dim:]))
        return out

    def reduce_scatter(self, x: Tensor, dim: int) -> Tensor:
        """This rank's slice along ``dim`` of the sum over ranks, dense; summed in fp32 and in rank order."""
        shape = list(x.shape)
        shape[dim] //= self.size
        out = x.new_empty(shape)
        sum_parts(self._staged([x])[0], out, self.rank, math.prod(shape[dim:]))
        return out

    def _staged(self, xs: Sequence[Tensor]) -> list[list[Tensor]]:
        """Of each of the tensors every rank's one of this exchange, flat and readable from here."""
        turn, self._turn = self._turn, (self._turn + 1) % len(self.stages)
        dtype, count = xs[0].dtype, xs[0].numel()
        places = [slice(n * count, (n + 1) * count) for n in range(len(xs))]
        for x, place in zip(xs, places, strict=True):
            self.stages[turn].view(dtype)[place].view(x.shape).copy_(x)
        self.barrier(turn)
        return [[peer[place] for peer in self.views[dtype][turn]] for place in places]


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
    """Exchanges over new stages that all ranks of ``group`` map, taking part; RuntimeError where one cannot."""
    stages = [symmetric_memory.empty(STAGE_BYTES, dtype=torch.uint8, device=device) for _ in range(STAGES)]
    handles = [symmetric_memory.rendezvous(stage, group) for stage in stages]
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    views = {
        dtype: [
            [handle.get_buffer(peer, (STAGE_BYTES // dtype.itemsize,), dtype) for peer in range(size)]
            for handle in handles
        ]
        for dtype in DTYPES
    }
    return DirectExchanges(rank, size, stages, views, lambda turn: handles[turn].barrier(channel=0))
