"""A group of P ranks of which only one is there: what it launches, allocates and moves without P GPUs.

Every peer is taken to hold what this rank holds, and nobody is waited for. So shapes, bytes and launches are those of a
rank of a real group, and values are not. Exchanges over mapped memory are the package's own, with this rank's memory in
the place of every peer's; at the barrier it finds them there. What goes through the library (sums of gradients)
is one kernel of the same bytes on a stream of its own, as NCCL's would be.
"""

# pyright: reportAssignmentType=false, reportCallIssue=false

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from scalefold.config import RankLayout
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
from scalefold.parallel.dap.peer_memory import LANE, copy_parts, meeting, sum_parts
from scalefold.parallel.ranks import Ranks

RANK = 0  # the one that is there


class Arrived(dist.Work):
    """The end of an exchange: a CUDA ``event`` on the stream that it ran on, None where it ran on the caller's."""

    def __init__(self, event: Any) -> None:
        super().__init__()
        self.event = event

    def wait(self, timeout: Any = None) -> bool:
        """What follows on the caller's stream comes after the exchange."""
        if self.event is not None:
            torch.cuda.current_stream().wait_event(self.event)
        return True


class AbsentPeers(dist.ProcessGroup):
    """The library's exchanges among ``size`` ranks that all hold what this one holds."""

    def __init__(self, size: int) -> None:
        super().__init__(RANK, size)
        self._stream: torch.cuda.Stream | None = None

    def getBackendName(self) -> str:
        """Its name among the library's backends."""
        return "absent"

    def alltoall_base(self, out: Tensor, x: Tensor, out_splits: Any, splits: Any, options: Any) -> Arrived:
        """Part ``RANK`` of every peer's [P, ...]."""
        return self._run(options, out, lambda: _copy(x, out, self.size(), parts=True))

    def _allgather_base(self, out: Tensor, x: Tensor, options: Any) -> Arrived:
        """All of every peer's."""
        return self._run(options, out, lambda: _copy(x, out, self.size(), parts=False))

    def _reduce_scatter_base(self, out: Tensor, x: Tensor, options: Any) -> Arrived:
        """Sum of part ``RANK`` of every peer's [P, ...]."""
        return self._run(options, out, lambda: _sum(x, out, self.size()))

    def allreduce(self, xs: list[Tensor], options: Any) -> Arrived:
        """Sum of every peer's, in place."""
        return self._run(options, xs[0], lambda: _sum(xs[0], xs[0], self.size()))

    all_to_all_single, all_gather_single = alltoall_base, _allgather_base  # their names in newer versions of PyTorch
    reduce_scatter_single, all_reduce = _reduce_scatter_base, allreduce

    def _run(self, options: Any, out: Tensor, launch: Any) -> Arrived:
        """On the caller's stream, or beside it if the caller goes on meanwhile."""
        if not (out.is_cuda and options.asyncOp):
            launch()
            return Arrived(None)
        self._stream = self._stream or torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            launch()
        return Arrived(self._stream.record_event())


def by_kernel(out: Tensor, count: int) -> bool:
    """Whether one kernel of the package moves parts of ``count`` elements to out; else one of PyTorch's does."""
    return out.is_cuda and count % LANE == 0 and out.dtype in DTYPES


def _copy(x: Tensor, out: Tensor, size: int, parts: bool) -> None:
    """Part ``RANK`` of ``size`` peers' x (not ``parts``: all of it), behind each other, to out."""
    count = x.numel() // size if parts else x.numel()
    if by_kernel(out, count):
        copy_parts([x] * size, out, RANK if parts else None, count, count)
    else:
        out.view(size, count).copy_(x.view(-1)[:count].expand(size, count))


def _sum(x: Tensor, out: Tensor, size: int) -> None:
    """Sum over ``size`` peers of the part of their x that is as long as out, the one of ``RANK``."""
    if by_kernel(out, out.numel()):
        sum_parts([x] * size, out, RANK, out.numel())
    else:
        torch.mul(x.view(-1)[: out.numel()].view_as(out), size, out=out)


class DirectAlone(DirectExchanges):
    """What this rank would write to its peers, part by part, goes to where theirs would arrive here."""

    def _targets(self, arrivals: Arrivals, place: int, dtype: torch.dtype, concat_block: int) -> list[Tensor]:
        """Its own results, so shifted that part p of this rank's tensor lands in the place of peer p."""
        arrived = arrivals.own[place:].view(dtype)
        return [arrived[peer * concat_block :] for peer in range(self.size)]

    def _own_parts(self, results: Sequence[Tensor], dim: int, count: int) -> list[Tensor]:
        """Likewise: those of all peers in its own result."""
        return [result.narrow(dim, peer * count, count) for peer, result in enumerate(results)]


def direct_alone(size: int, device: torch.device) -> DirectExchanges:
    """The package's exchanges over mapped memory, this rank's memory being every peer's."""
    stages = [torch.zeros(STAGE_BYTES, dtype=torch.uint8, device=device) for _ in range(STAGES)]
    views = {dtype: [[stage.view(dtype)] * size for stage in stages] for dtype in DTYPES}
    numbers = torch.zeros(size, dtype=torch.int32, device=device)
    barrier = meeting(numbers, [number.data_ptr() for number in numbers])
    kept, passing = KEPT_BYTES // size, PASSING_BYTES // size
    memory = torch.empty(kept + passing, dtype=torch.uint8, device=device)
    return DirectAlone(RANK, size, stages, views, barrier, Arrivals(memory, [memory] * size, kept, barrier))


@contextmanager
def ranks_alone(size: int, device: torch.device) -> Iterator[Ranks]:
    """This process as rank ``RANK`` of ``size`` that train one sample together; sums of gradients among them too."""
    if "absent" not in dist.Backend.backend_list:
        dist.Backend.register_backend(
            "absent", lambda store, rank, size, timeout: AbsentPeers(size), devices=["cpu", "cuda"]
        )
    dist.init_process_group("absent", rank=RANK, world_size=size, store=dist.HashStore())
    try:
        peers = dist.group.WORLD
        yield Ranks(RankLayout(size, size), RANK, 0, device, train_group=peers, dap_group=peers)
    finally:
        dist.destroy_process_group()


def group_alone(ranks: Ranks) -> Group:
    """The DAP group of ``ranks_alone``, as ``connect_replica`` would give it: direct exchanges on a GPU."""
    assert ranks.dap_group is not None
    group = Group(ranks.dap_group)
    if ranks.device.type == "cuda":
        group.direct = direct_alone(group.size, ranks.device)
    return group
