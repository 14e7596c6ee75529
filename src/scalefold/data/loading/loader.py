"""Batches delivered by worker processes: training in draw order or in order of readiness, evaluation from memory.

A worker writes a batch once, into shared memory; the trainer maps it, pins it and copies it to the device in one piece.
No process opens the data set before ``start``, which belongs after ``run_start`` of the MLPerf clock; worker processes
may be running before that.

Longer than 400 lines, because both loaders rest on the same workers, whose end is told apart in one place.
"""

import heapq
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from scalefold.data.features.features import BatchShape, FeatureSettings, buffer_bytes, feature_views, fill_sample
from scalefold.data.loading.sampler import Delivered, Task, TrainingSampler, seed_from_string
from scalefold.data.loading.waiting import LOOK_S, NoBatch, NotWanted, always
from scalefold.data.loading.workers import SampleFailure, Workers
from scalefold.data.store.store import Store
from scalefold.errors import DataError, ScaleFoldError

log = logging.getLogger(__name__)

_NUM_SLOWEST = 20


@dataclass(frozen=True)
class Batch:
    """The samples of one data-parallel replica and iteration.

    ``buffer`` is the flat uint8 memory, ``features`` its views. ``iteration`` is the draw the samples belong to, which
    differs from the training iteration when batches are delivered in order of readiness. ``build_s`` is what each
    sample took in its worker, ``wait_ms`` how long the trainer waited.
    """

    buffer: Tensor
    shape: BatchShape
    iteration: int
    chain_ids: tuple[str, ...]
    indices: tuple[int, ...]
    seeds: tuple[int, ...]
    build_s: tuple[float, ...]
    wait_ms: float = 0.0

    @cached_property
    def features(self) -> dict[str, Tensor]:
        """Feature tensors [B, ...], those of ``PER_SLICE_KEYS`` [B, ..., passes]."""
        return feature_views(self.buffer, self.shape)

    @property
    def passes(self) -> int:
        """Recycling slices in this batch: passes through the model, the last one with gradient."""
        return self.shape.num_slices

    def first_slices(self, count: int) -> "Batch":
        """The same samples with their first ``count`` recycling slices, in the same memory."""
        if count > self.passes:
            raise ValueError(f"batch of draw {self.iteration} has {self.passes} slices, {count} were asked for")
        shape = replace(self.shape, num_slices=count)
        return replace(self, buffer=self.buffer[: buffer_bytes(shape)], shape=shape)

    def empty_like(self, batch_size: int) -> "Batch":
        """A batch of other size and the same slices, in zeroed memory of the same device, of no chain."""
        shape = replace(self.shape, batch_size=batch_size)
        return Batch(self.buffer.new_zeros(buffer_bytes(shape)), shape, self.iteration, (), (), (), ())

    def pin_memory(self) -> "Batch":
        """A copy in page-locked memory, from which copies to the device can overlap with computation."""
        return replace(self, buffer=self.buffer.pin_memory())


def to_device(batch: Batch, device: torch.device | str, stream: "torch.cuda.Stream | None" = None) -> Batch:
    """The batch on ``device``, copied in one piece.

    With ``stream`` (CUDA) the copy runs there and the current stream waits for it on the device, not on the host; keep
    ``batch`` alive until the copy is done (the next call is late enough).
    """
    if stream is None:
        return replace(batch, buffer=batch.buffer.to(device, non_blocking=True))
    with torch.cuda.stream(stream):
        buffer = batch.buffer.to(device, non_blocking=True)
    current = torch.cuda.current_stream(buffer.device)
    current.wait_stream(stream)
    buffer.record_stream(current)
    return replace(batch, buffer=buffer)


class ChainDataset(Dataset):
    """Task -> Batch. The store is opened by the process that builds, at its first task."""

    def __init__(self, store_path: Path | str, settings: FeatureSettings, *, training: bool) -> None:
        self._store_path, self._settings, self._training = Path(store_path), settings, training
        self._store: Store | None = None
        self._process = -1

    def store(self) -> Store:
        """The store, opened once per process."""
        if self._store is None or self._process != os.getpid():
            self._store, self._process = Store(self._store_path), os.getpid()
        return self._store

    def __getitem__(self, task: Task) -> Batch | SampleFailure:
        current = 0
        try:
            store = self.store()
            longest = max(int(store.table.length[i]) for i in task.indices)
            num_res = None if self._training else self._settings.padded_length(longest)
            shape = BatchShape.of(
                self._settings, len(task.indices), task.num_slices, training=self._training, num_res=num_res
            )
            buffer, build_s = _zeroed(buffer_bytes(shape)), []
            for current, (index, seed) in enumerate(zip(task.indices, task.seeds, strict=True)):
                start = time.perf_counter()
                fill_sample(buffer, shape, current, store.read(index), self._settings, seed)
                build_s.append(time.perf_counter() - start)
            names = tuple(store.name(index) for index in task.indices)
            return Batch(buffer, shape, task.iteration, names, task.indices, task.seeds, tuple(build_s))
        except Exception as error:
            return SampleFailure(self._describe(task, current, error))

    def _describe(self, task: Task, position: int, error: Exception) -> str:
        index, seed = task.indices[position], task.seeds[position]
        known = self._store is not None and 0 <= index < len(self._store)
        name = self._store.name(index) if known and self._store is not None else "unknown"
        reason = str(error) if isinstance(error, ScaleFoldError) else f"{type(error).__name__}: {error}"
        return (
            f"{self._store_path}: sample of iteration {task.iteration} cannot be built: chain {name} "
            f"(row {index}, seed {seed}): {reason}"
        )


def _zeroed(num_bytes: int) -> Tensor:
    """Zeroed memory, shared with the trainer if this is a worker process (new shared memory is zero)."""
    if get_worker_info() is None:
        return torch.zeros(num_bytes, dtype=torch.uint8)
    return torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(num_bytes, device="cpu"))


class _ReadyFirst:
    """A thread that collects finished batches; of those that are ready the earliest draw is handed out."""

    def __init__(self, workers: Workers, capacity: int) -> None:
        self._workers, self._capacity = workers, capacity
        self._ready: list[tuple[int, Batch]] = []
        self._changed = threading.Condition()
        self._end: BaseException | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._collect, name="ready-first", daemon=True)
        self._thread.start()

    def _collect(self) -> None:
        try:
            while not self._closed:
                batch = self._workers.next(lambda: not self._closed)
                with self._changed:
                    self._changed.wait_for(lambda: self._closed or len(self._ready) < self._capacity)
                    heapq.heappush(self._ready, (batch.iteration, batch))
                    self._changed.notify_all()
        except BaseException as error:  # delivered by next(), in the training thread
            with self._changed:
                self._end = error
                self._changed.notify_all()

    def next(self, wanted: Callable[[], bool] = always) -> Batch:
        """The earliest ready draw; waits only if nothing is ready."""
        with self._changed:
            while not self._changed.wait_for(lambda: self._ready or self._end is not None, LOOK_S):
                if not wanted():
                    raise NotWanted
            if not self._ready:
                assert self._end is not None
                raise self._end
            _, batch = heapq.heappop(self._ready)
            self._changed.notify_all()
        return batch

    def close(self) -> None:
        """End the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()


@dataclass
class SlowSamples:
    """The samples that took longest to build: (seconds, chain id), slowest first."""

    count: int = _NUM_SLOWEST
    _heap: list[tuple[float, str]] = field(default_factory=list)

    def add(self, batch: Batch) -> None:
        """Take note of a batch's samples."""
        for seconds, name in zip(batch.build_s, batch.chain_ids, strict=True):
            push = heapq.heappush if len(self._heap) < self.count else heapq.heappushpop
            push(self._heap, (seconds, name))

    def slowest(self) -> list[tuple[float, str]]:
        """Slowest first."""
        return sorted(self._heap, reverse=True)


class TrainLoader:
    """One batch per iteration for one data-parallel replica.

    ``in_order=True`` ("PT") delivers draw after draw: the samples of an iteration do not depend on the number of
    workers or on timing, and only the recycling slices of that iteration are built. ``in_order=False`` ("PQ") delivers
    the earliest draw that is ready, so one slow sample never holds up a step; nothing is dropped: ``delivered`` says
    which draws were passed over, and the next start may begin with them. As the number of
    passes belongs to the iteration, not to the draw, all slices are built there and the first ones delivered.

    Args:
        store_path: the prepared data set; opened by ``start`` and by the workers afterwards.
        settings: sizes of the features.
        num_workers: processes; 0 builds in the training process.
        prefetch_factor: batches in flight per worker. One batch of a benchmark sample takes 16 to 54 MB of /dev/shm.
        in_order: see above.
        pin_memory: page-locked batches (when a GPU is there).
        limits_s: how long the first batch after ``start`` may take, and every other.
    """

    def __init__(
        self,
        store_path: Path | str,
        settings: FeatureSettings,
        *,
        num_workers: int,
        prefetch_factor: int = 4,
        in_order: bool = True,
        pin_memory: bool = False,
        limits_s: tuple[float, float] = (1800.0, 600.0),
    ) -> None:
        self._settings, self._in_order = settings, in_order
        self._first_limit_s, self._limit_s = limits_s
        self._capacity = max(1, num_workers * prefetch_factor)
        self._workers = Workers(
            ChainDataset(store_path, settings, training=True),
            num_workers=num_workers,
            prefetch_factor=prefetch_factor,
            in_order=in_order,
            pin_memory=pin_memory,
            limit_s=limits_s[0],
        )
        self._ready: _ReadyFirst | None = None
        self._sampler: TrainingSampler | None = None
        self._num_workers = num_workers
        self._newest, self._passed_over = 0, set[int]()
        self.slow_samples = SlowSamples()

    def spawn(self) -> None:
        """Start the worker processes without touching data; allowed before ``run_start``."""
        self._workers.spawn()

    def start(self, sampler: TrainingSampler, first_iteration: int, last_iteration: int) -> None:
        """Begin to build the batches of ``first_iteration`` to ``last_iteration``; only after ``run_start``."""
        self._sampler, self._workers.limit_s = sampler, self._first_limit_s
        self._newest, self._passed_over = first_iteration - 1, set()
        tasks = sampler.tasks(first_iteration, last_iteration)
        if not self._in_order:
            tasks = (replace(task, num_slices=self._settings.num_slices) for task in tasks)
        self._workers.start(tasks)
        if not self._in_order and self._num_workers:
            self._ready = _ReadyFirst(self._workers, self._capacity)

    def next(self, iteration: int, wanted: Callable[[], bool] = always) -> Batch:
        """The batch to train on at ``iteration``, with as many slices as this iteration uses.

        Raises:
            DataError: a sample cannot be built (naming chain, row, seed and reason), no worker delivers, or the
                iterations have run out.
            NotWanted: ``wanted`` says, while nothing comes, that nobody needs the batch any more.
        """
        if self._sampler is None:
            raise RuntimeError("the loader has not been started")
        start = time.perf_counter()
        try:
            batch = (self._ready or self._workers).next(wanted)
        except StopIteration:
            raise DataError(f"iteration {iteration}: the loader was started for fewer iterations") from None
        except NoBatch as error:
            raise DataError(f"iteration {iteration}: {error}") from None
        self._workers.limit_s = self._limit_s
        wait_ms = 1e3 * (time.perf_counter() - start)
        if self._in_order and batch.iteration != iteration:
            raise DataError(
                f"iteration {iteration}: the loader delivers iteration {batch.iteration}; resume from there"
            )
        self.slow_samples.add(batch)
        self._count(batch.iteration)
        return replace(batch.first_slices(self._sampler.recycling(iteration) + 1), wait_ms=wait_ms)

    def _count(self, draw: int) -> None:
        self._passed_over.update(range(self._newest + 1, draw))
        self._passed_over.discard(draw)
        self._newest = max(self._newest, draw)

    def delivered(self) -> Delivered:
        """Which draws have been delivered since ``start``; all others would be lost if it ended now."""
        return Delivered(self._newest, tuple(sorted(self._passed_over)))

    def processes(self) -> list[Any]:
        """The worker processes."""
        return self._workers.processes()

    def slowest(self) -> list[tuple[float, str]]:
        """Seconds and chain of the samples delivered so far that took longest to build, slowest first."""
        return self.slow_samples.slowest()

    def release_memory(self) -> None:
        """Nothing is registered with the device here."""

    def close(self) -> None:
        """End thread and worker processes; the loader may be started again."""
        if self._ready is not None:
            self._ready.close()
            self._ready = None
        self._workers.close()
        self._sampler = None


class EvalSet:
    """Evaluation features of some chains: uncropped, all slices, seeded by the chain id, built once, kept in memory.

    Iterate as often as needed, in the order given to ``start``. With worker processes, building begins at ``start`` and
    goes on while training runs; without, each chain is built when it is first asked for.

    Args:
        pin_memory: keep the features in page-locked memory; about 54 MB * length / 256 per chain at benchmark sizes.
        limit_s: how long one chain may take.
    """

    def __init__(
        self,
        store_path: Path | str,
        settings: FeatureSettings,
        *,
        num_workers: int = 0,
        prefetch_factor: int = 2,
        pin_memory: bool = False,
        limit_s: float = 1800.0,
    ) -> None:
        self.chain_ids: tuple[str, ...] = ()
        self._settings = settings
        self._dataset = ChainDataset(store_path, settings, training=False)
        self._workers = Workers(
            self._dataset,
            num_workers=num_workers,
            prefetch_factor=prefetch_factor,
            in_order=True,
            pin_memory=False,
            limit_s=limit_s,
        )
        self._pin_memory = pin_memory and torch.cuda.is_available()
        self._background = num_workers > 0
        self._built: list[Batch] = []
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._closed = False
        self._thread: threading.Thread | None = None

    def spawn(self) -> None:
        """Start the worker processes without touching data; allowed before ``run_start``."""
        self._workers.spawn()

    def start(self, chain_ids: Sequence[str]) -> None:
        """Open the data set and, with workers, begin to build these chains; only after ``run_start``."""
        self.chain_ids = tuple(chain_ids)
        store = self._dataset.store()
        rows = [store.index_of(chain_id) for chain_id in self.chain_ids]
        self._workers.start(
            Task(number, (row,), (seed_from_string(chain_id),), self._settings.num_slices)
            for number, (row, chain_id) in enumerate(zip(rows, self.chain_ids, strict=True))
        )
        if self._background:
            self._thread = threading.Thread(target=self._collect, name="evaluation-features", daemon=True)
            self._thread.start()

    def _collect(self) -> None:
        try:
            while not self._closed and len(self._built) < len(self.chain_ids):
                self._keep(self._workers.next(lambda: not self._closed))
        except BaseException as error:  # delivered by __iter__, in the evaluating thread
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _keep(self, batch: Batch) -> None:
        buffer = batch.buffer.pin_memory() if self._pin_memory else batch.buffer.clone()  # out of /dev/shm
        with self._changed:
            self._built.append(replace(batch, buffer=buffer))
            self._changed.notify_all()

    def __len__(self) -> int:
        return len(self.chain_ids)

    def __iter__(self) -> Iterator[Batch]:
        for number in range(len(self.chain_ids)):
            start = time.perf_counter()
            if number >= len(self._built):
                self._wait_for(number)
            yield replace(self._built[number], wait_ms=1e3 * (time.perf_counter() - start))

    def _wait_for(self, number: int) -> None:
        if not self._background:
            self._keep(self._workers.next())
            return
        with self._changed:
            self._changed.wait_for(lambda: len(self._built) > number or self._error is not None)
            if len(self._built) <= number and self._error is not None:
                raise self._error

    def close(self) -> None:
        """End thread and worker processes; what was built stays."""
        self._closed = True
        if self._thread is not None:
            self._thread.join()
        self._workers.close()
