"""One optimizer step as a callable: eager, or captured in CUDA graphs, one per number of recycling passes.

The model, the loss and the optimizer are given from outside; nothing here knows what they compute. A captured step
does no Python work and no synchronisation: the batch is copied into a fixed buffer in one piece, a few numbers
(learning rate, bias corrections) are sent ahead, and the graph is launched. Dropout draws from the default generator,
whose seed and offset every replay reads anew, so seeding before a step has the same effect with and without graphs.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from scalefold.data.features.features import copy_samples
from scalefold.data.loading.loader import Batch
from scalefold.kernels.around.aside import Side
from scalefold.step.optimizer import Optimizer
from scalefold.step.reducer import GradientReducer

Features = Mapping[str, Tensor]
Objective = Callable[[Features, int], tuple[Tensor, dict[str, Tensor]]]


class TrainStep:
    """Forward with R passes, loss, backward, gradient sum, clip, Adam, average.

    Args:
        objective: (features, passes) -> (scalar loss with graph, named scalar terms without).
        optimizer: applies the flat gradient.
        reducer: sums gradients over ranks.
        micro_batch_size: samples computed at once; a larger batch is worked off in parts whose gradients add up.
        accumulation: iterations per optimizer step, as the reference counts them.
        train_group: ranks over which logged values are averaged, or None.
        side: where gradients of parameters are computed beside the backward's chain; None: on it.
    """

    #: What a profile names: method and name.
    SPANS: ClassVar = {"_part": "forward and backward", "_update": "update"}

    def __init__(
        self,
        objective: Objective,
        optimizer: Optimizer,
        reducer: GradientReducer,
        micro_batch_size: int = 1,
        accumulation: int = 1,
        train_group: dist.ProcessGroup | None = None,
        side: Side | None = None,
    ) -> None:
        self.objective, self.optimizer, self.reducer = objective, optimizer, reducer
        self.micro_batch_size, self.accumulation = micro_batch_size, accumulation
        self.train_group, self.side = train_group, side
        self.names: tuple[str, ...] = ()
        self.own: Tensor | None = None
        self.warm = False

    def __call__(self, batch: Batch, passes: int, step: int) -> Tensor:
        """Run iteration ``step`` (from 1) on a batch on the device whose size is a multiple of the micro batch.

        passes: at most as many as the batch has slices. Returns the logged values as one fp32 device vector, ``names``
        says what they are: loss, terms, gradient norm (the norm is that of the last applied update). With several ranks
        ``own`` then holds this rank's loss and terms, and a number that is not finite if a gradient of its own is not.
        """
        parts = num_parts(batch, self.micro_batch_size)
        total = parts * self.accumulation
        done = (step - 1) % self.accumulation * parts
        updates = done + parts == total
        if updates:
            self.optimizer.prepare(step)
        values = torch.stack([self._part(batch, i, passes, done + i, total) for i in range(parts)]).mean(0)
        if updates:
            self._update(total)
            self.optimizer.count()
        self.own = torch.cat([values[1], self.reducer.own[None]]) if self.train_group is not None else None
        return torch.cat([values[0], self.optimizer.grad_norm[None]])

    def warm_up(self, batch: Batch, passes: int, progress: Callable[[str], None]) -> None:
        """Run whole steps on a synthetic batch, for every number of passes up to ``passes``; state is put back."""
        with preserved(self.optimizer):
            for r in range(1, passes + 1):
                progress(f"warming up {r}/{passes}: a step with {r} passes")
                for step in range(1, self.accumulation + 1):
                    self(batch, r, step)
        self.warm = True

    def close(self) -> None:
        """Let go of what the device holds for this step; it cannot be called again."""

    def _part(self, batch: Batch, number: int, passes: int, index: int, total: int) -> Tensor:
        """Micro batch ``number`` of the batch, which is number ``index`` of the ``total`` that make one update."""
        first = number * self.micro_batch_size
        part = {key: value[first : first + self.micro_batch_size] for key, value in batch.features.items()}
        return self._forward_backward(part, passes, total, accumulate=index > 0, communicate=index == total - 1)

    def _update(self, total: int) -> None:
        self.optimizer.apply()

    def _forward_backward(
        self, features: Features, passes: int, total: int, accumulate: bool, communicate: bool
    ) -> Tensor:
        self.reducer.begin(accumulate, communicate)
        loss, terms = self.objective(features, passes)
        with self.side.used() if self.side is not None else nullcontext():
            (loss / total).backward()
        self.reducer.finish()
        self.names = ("loss", *terms, "grad_norm")
        own = torch.stack([loss.detach().float(), *(term.detach().float() for term in terms.values())])
        if self.train_group is None:
            return own[None]
        values = own.clone()
        dist.all_reduce(values, group=self.train_group)
        return torch.stack([values / dist.get_world_size(self.train_group), own])


class GraphedTrainStep(TrainStep):
    """The same step replayed from CUDA graphs that share one memory pool.

    They are captured on one stream: the allocator gives a pool's free blocks only to the stream that freed them, so
    graphs captured on streams of their own would share nothing.

    Args:
        compiles_each: the objective compiles something of its own for each number of passes, not only for the largest.
        chain_first: where a kernel of the backward's chain and one aside could both begin, the chain's does.
    """

    SPANS: ClassVar = {"_part": "replay", "_update": "update"}

    def __init__(self, *args, compiles_each: bool = False, chain_first: bool = False, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.compiles_each, self.chain_first = compiles_each, chain_first
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._update_graph: torch.cuda.CUDAGraph | None = None
        self._input: Batch | None = None
        self._values: dict[int, Tensor] = {}
        self._pool = None

    @cached_property
    def _stream(self) -> torch.cuda.Stream:
        """One for all captures: libraries keep working memory for every stream that they have been called on."""
        return torch.cuda.Stream(priority=-1 if self.chain_first else 0)

    def warm_up(self, batch: Batch, passes: int, progress: Callable[[str], None]) -> None:
        """Compile, warm up and capture the graph of every number of passes; state is put back."""
        self._input = batch.empty_like(self.micro_batch_size)
        copy_samples(batch.buffer, batch.shape, 0, self._input.buffer, self._input.shape)
        self._pool = torch.cuda.graph_pool_handle()
        with preserved(self.optimizer):
            self.optimizer.prepare(1)  # steps outside a graph divide by the bias corrections
            total = num_parts(batch, self.micro_batch_size) * self.accumulation
            compiling = range(passes, 0, -1) if self.compiles_each else (passes,)
            for r in compiling:  # before the first capture, whose memory they could not use
                progress(f"compiling {passes - r + 1}/{passes}: a step with {r} passes")
                self._run_uncaptured(r, total)
            for r in range(passes, 0, -1):
                progress(f"capturing {passes - r + 1}/{passes}: a step with {r} passes")
                self._capture(r, total)
        self.warm = True

    def close(self) -> None:
        """Destroy the graphs: as long as one lives, so do the communicators that it uses.

        Their memory goes back to the device: the steps that the next capture runs first could not use it.
        """
        for graph in (*self._graphs.values(), *([self._update_graph] if self._update_graph is not None else [])):
            graph.reset()
        self._graphs, self._values, self._update_graph, self._input, self._pool = {}, {}, None, None, None
        self.warm = False
        torch.cuda.empty_cache()

    def _part(self, batch: Batch, number: int, passes: int, index: int, total: int) -> Tensor:
        assert self._input is not None, "warm_up comes first"
        first = number * self.micro_batch_size
        copy_samples(batch.buffer, batch.shape, first, self._input.buffer, self._input.shape)
        if total > 1 and index == 0:
            for flat in self.optimizer.flat.gradients.values():
                flat.zero_()
        self._graphs[passes].replay()
        return self._values[passes].clone() if total > 1 else self._values[passes]

    def _update(self, total: int) -> None:
        if self._update_graph is not None:
            self._update_graph.replay()

    def _run_uncaptured(self, passes: int, total: int) -> None:
        """Steps outside any graph: compile kernels, create library handles, fill caches."""
        assert self._input is not None
        whole, features = total == 1, self._input.features
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(2):
                self._forward_backward(features, passes, total, accumulate=not whole, communicate=whole)
                self._reduce_and_apply(whole)
        torch.cuda.current_stream().wait_stream(self._stream)
        torch.cuda.synchronize()

    def _capture(self, passes: int, total: int) -> None:
        """Graph of a whole step; where an update needs several parts, of one part, and one more for the update."""
        assert self._input is not None
        whole, features = total == 1, self._input.features
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            self._values[passes] = self._forward_backward(
                features, passes, total, accumulate=not whole, communicate=whole
            )
            if whole:
                self.optimizer.apply()
        self._graphs[passes] = graph
        if not whole and self._update_graph is None:
            self._update_graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(
                self._update_graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                self._reduce_and_apply(whole)

    def _reduce_and_apply(self, whole: bool) -> None:
        if not whole:
            self.reducer.reduce_now()
        self.optimizer.apply()


def num_parts(batch: Batch, size: int) -> int:
    """Micro batches of ``size`` samples in a batch."""
    count = batch.shape.batch_size
    if count % size:
        raise ValueError(f"a batch of {count} samples cannot be worked off in parts of {size}")
    return count // size


@contextmanager
def preserved(optimizer: Optimizer) -> Iterator[None]:
    """Put weights, moments, averages and counters back bit for bit, whatever happens inside."""
    flat = optimizer.flat
    buffers = (flat.master, optimizer.exp_avg, optimizer.exp_avg_sq, optimizer.averaged)
    saved = [buffer.to("cpu", copy=True) for buffer in buffers]
    counters = optimizer.adam_step, optimizer.num_averaged
    try:
        yield
    finally:
        for buffer, copy in zip(buffers, saved, strict=True):
            buffer.copy_(copy)
        flat.refresh()
        optimizer.adam_step, optimizer.num_averaged = counters
        optimizer.grad_norm.zero_()
        for gradient in flat.gradients.values():
            gradient.zero_()
