"""Data-parallel gradients: flat buckets summed over all training ranks while backward still runs."""

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from scalefold.kernels.around import aside
from scalefold.step.optimizer import Optimizer
from scalefold.step.parameters import FlatParameters, Segment


class Bucket:
    """A contiguous piece of one segment's flat gradient, reduced by one collective."""

    def __init__(self, segment: Segment, flat: Tensor, start: int, stop: int, num_parameters: int) -> None:
        self.segment, self.flat = segment, flat
        self.start, self.stop = start, stop
        self.num_parameters = num_parameters
        self.missing = num_parameters

    @property
    def values(self) -> Tensor:
        """This bucket's part of the flat gradient."""
        return self.flat[self.start - self.segment.start : self.stop - self.segment.start]


class GradientReducer:
    """Sums the flat gradient over ``group``; to make a mean of the sum is left to the optimizer, in fp32.

    Buckets are filled and launched by autograd hooks, always in the same order on every rank (the last parameters
    first, as backward produces them), so that communication overlaps the rest of backward. With one rank it only
    collects. With ``accumulate`` steps in between, only the last one communicates. ``own`` is the plain sum of this
    rank's gradient before it meets the others': after a NaN it tells whose it was.

    Args:
        flat: parameters and flat gradients.
        group: all training ranks, or None for a single one.
        bucket_mib: size of a bucket in MiB: large enough for the links' full bandwidth, small enough to overlap.
    """

    def __init__(self, flat: FlatParameters, group: dist.ProcessGroup | None, bucket_mib: float = 25.0) -> None:
        self.flat, self.group = flat, group
        self.buckets = self._make_buckets(int(bucket_mib * 2**20)) if group is not None else []
        self.own = torch.zeros((), device=flat.master.device)
        self._next = 0
        self._works: list[dist.Work] = []
        self._accumulate = False
        self._communicate = True
        for index, (slot, parameter) in enumerate(zip(flat.slots, flat.parameters, strict=True)):
            for bucket in self.buckets:
                if bucket.start <= slot.start < bucket.stop and bucket.segment == flat.segment_of(slot):
                    parameter.register_post_accumulate_grad_hook(self._hook(bucket))
                    break
            else:
                if group is not None:
                    raise AssertionError(f"parameter {index} ({slot.name}) lies in no bucket")

    def begin(self, accumulate: bool = False, communicate: bool = True) -> None:
        """Before backward. ``accumulate`` adds to the flat gradient; ``communicate`` is false but for the last part."""
        self._accumulate, self._communicate = accumulate, communicate
        self._next, self._works = 0, []
        self.own.zero_()
        for bucket in self.buckets:
            bucket.missing = bucket.num_parameters

    def finish(self) -> None:
        """After backward: launch what no hook launched (parameters without gradient), wait."""
        if not self.buckets or not self._communicate:
            self.flat.collect_gradients(self._accumulate)
            return
        while self._next < len(self.buckets):
            self._launch()
        for work in self._works:
            work.wait()

    def reduce_now(self) -> None:
        """Sum the flat gradient as it stands, without overlap: after gradients were accumulated in parts."""
        if self.buckets:
            for gradient in self.flat.gradients.values():
                self.own.add_(gradient.sum(dtype=torch.float32))
                dist.all_reduce(gradient, group=self.group)

    def _hook(self, bucket: Bucket):
        def ready(_: Tensor) -> None:
            bucket.missing -= 1
            while self._communicate and self._next < len(self.buckets) and self.buckets[self._next].missing == 0:
                self._launch()

        return ready

    def _launch(self) -> None:
        bucket = self.buckets[self._next]
        self._next += 1
        aside.follow(self.flat.gradients_from(bucket.start, bucket.stop), partial(self._reduce, bucket))

    def _reduce(self, bucket: Bucket) -> None:
        self.flat.collect_range(bucket.segment, bucket.flat, bucket.start, bucket.stop, self._accumulate)
        self.own.add_(bucket.values.sum(dtype=torch.float32))
        work = dist.all_reduce(bucket.values, group=self.group, async_op=True)
        if work is not None:
            self._works.append(work)

    def _make_buckets(self, bucket_bytes: int) -> list[Bucket]:
        buckets: list[Bucket] = []
        for segment in self.flat.segments:
            flat = self.flat.gradients[segment]
            starts = [slot.start for slot in self.flat.slots if segment.start <= slot.start < segment.stop]
            begin, count = segment.start, 0
            for this, following in zip(starts, [*starts[1:], segment.stop], strict=True):
                count += 1
                full = (following - begin) * flat.element_size() >= bucket_bytes
                if full or this == starts[-1]:
                    buckets.append(Bucket(segment, flat, begin, following, count))
                    begin, count = following, 0
        return buckets[::-1]


def broadcast_optimizer(optimizer: Optimizer, group: dist.ProcessGroup | None, source: int = 0) -> None:
    """Give every rank of ``group`` the weights, moments, averages and counters of ``source``."""
    if group is None:
        return
    flat = optimizer.flat
    counters = torch.tensor([optimizer.adam_step, optimizer.num_averaged], device=flat.master.device)
    for values in (flat.master, optimizer.exp_avg, optimizer.exp_avg_sq, optimizer.averaged, counters):
        dist.broadcast(values, src=source, group=group)
    optimizer.adam_step, optimizer.num_averaged = map(int, counters.tolist())
    flat.refresh()
