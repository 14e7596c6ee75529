"""One optimizer step as a callable: eager, or captured in CUDA graphs, one per number of recycling passes.

The model, the loss and the optimizer are given from outside; nothing here knows what they compute. A captured step
does no Python work and no synchronisation: the batch is copied into fixed buffers, a few numbers (learning rate, bias
corrections) are sent ahead, and the graph is launched. Dropout draws from the default generator, whose seed and offset
every replay reads anew, so seeding before a step has the same effect with and without graphs.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from scalefold.optim import Optimizer
from scalefold.parallel.ddp import GradientReducer

Batch = Mapping[str, Tensor]
Objective = Callable[[Batch, int], tuple[Tensor, dict[str, Tensor]]]


class TrainStep:
    """Forward with R passes, loss, backward, gradient sum, clip, Adam, average.

    Args:
        objective: (batch, passes) -> (scalar loss with graph, named scalar terms without).
        optimizer: applies the flat gradient.
        reducer: sums gradients over ranks.
        accumulation: micro-steps per optimizer step; the loss is divided by it.
        train_group: ranks over which logged values are averaged, or None.
    """

    def __init__(
        self,
        objective: Objective,
        optimizer: Optimizer,
        reducer: GradientReducer,
        accumulation: int = 1,
        train_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.objective, self.optimizer, self.reducer = objective, optimizer, reducer
        self.accumulation, self.train_group = accumulation, train_group
        self.names: tuple[str, ...] = ()

    def __call__(self, batch: Batch, passes: int, step: int) -> Tensor:
        """Run iteration ``step`` (from 1).

        Returns the logged values as one fp32 device vector, ``names`` says what they are: loss, terms, gradient norm
        (the norm is that of the last applied update).
        """
        micro = (step - 1) % self.accumulation
        last = micro == self.accumulation - 1
        if last:
            self.optimizer.prepare(step)
        values = self._run(batch, passes, micro, last)
        if last:
            self.optimizer.count()
        return values

    def warm_up(self, batch: Batch, passes: int, progress: Callable[[str], None]) -> None:
        """Run whole steps on a synthetic batch, for every number of passes up to ``passes``; state is put back."""
        with preserved(self.optimizer):
            for r in range(1, passes + 1):
                progress(f"warming up {r}/{passes}: a step with {r} passes")
                for step in range(1, self.accumulation + 1):
                    self(batch, r, step)

    def _run(self, batch: Batch, passes: int, micro: int, last: bool) -> Tensor:
        values = self._forward_backward(batch, passes, accumulate=micro > 0, communicate=last)
        if last:
            self.optimizer.apply()
        return self._with_norm(values)

    def _forward_backward(self, batch: Batch, passes: int, accumulate: bool, communicate: bool) -> Tensor:
        self.reducer.begin(accumulate, communicate)
        loss, terms = self.objective(batch, passes)
        (loss / self.accumulation).backward()
        self.reducer.finish()
        self.names = ("loss", *terms, "grad_norm")
        values = torch.stack([loss.detach().float(), *(term.detach().float() for term in terms.values())])
        if self.train_group is not None:
            dist.all_reduce(values, group=self.train_group)
            values /= dist.get_world_size(self.train_group)
        return values

    def _with_norm(self, values: Tensor) -> Tensor:
        return torch.cat([values, self.optimizer.grad_norm[None]])


class GraphedTrainStep(TrainStep):
    """The same step replayed from CUDA graphs that share one memory pool."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._apply_graph: torch.cuda.CUDAGraph | None = None
        self._inputs: dict[str, Tensor] = {}
        self._values: dict[int, Tensor] = {}
        self._pool = None

    def warm_up(self, batch: Batch, passes: int, progress: Callable[[str], None]) -> None:
        """Compile, warm up and capture the graph of every number of passes; state is put back."""
        self._inputs = {key: value.clone() for key, value in batch.items()}
        self._pool = torch.cuda.graph_pool_handle()
        with preserved(self.optimizer):
            for r in range(passes, 0, -1):
                progress(f"compiling {passes - r + 1}/{passes}: a step with {r} passes")
                self._capture(r)

    def load(self, batch: Batch) -> None:
        """Copy a batch into the graphs' input buffers (asynchronous where it is pinned or on the device)."""
        for key, buffer in self._inputs.items():
            source = batch[key]
            if source.shape == buffer.shape:
                buffer.copy_(source, non_blocking=True)
            else:
                buffer[..., : source.shape[-1]].copy_(source, non_blocking=True)

    def _run(self, batch: Batch, passes: int, micro: int, last: bool) -> Tensor:
        self.load(batch)
        if self.accumulation > 1 and micro == 0:
            for flat in self.optimizer.flat.gradients.values():
                flat.zero_()
        self._graphs[passes].replay()
        if self._apply_graph is not None and last:
            self._apply_graph.replay()
        return self._with_norm(self._values[passes])

    def _capture(self, passes: int) -> None:
        """Graph of one (micro-)step. With accumulation, the update is a graph of its own."""
        split = self.accumulation > 1
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._forward_backward(self._inputs, passes, accumulate=split, communicate=not split)
                self.optimizer.apply()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
            self._values[passes] = self._forward_backward(self._inputs, passes, accumulate=split, communicate=not split)
            if not split:
                self.optimizer.apply()
        self._graphs[passes] = graph
        if split and self._apply_graph is None:
            self._apply_graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._apply_graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                self._reduce()
                self.optimizer.apply()

    def _reduce(self) -> None:
        for segment, gradient in self.optimizer.flat.gradients.items():
            if self.train_group is not None:
                dist.all_reduce(gradient, group=self.train_group)
                gradient.mul_(segment.gradient_scale)


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
