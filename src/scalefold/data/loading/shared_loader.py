"""One sample for all ranks of a DAP group: built once, written to memory once, copied by each to its own device.

The first rank of the group owns the workers. It writes each batch into one of a few slots of host memory that all ranks
of the group map, and announces it with a small header of fixed size; nothing is pickled. A slot is used again
``NUM_SLOTS`` batches later, once every rank has said that nothing reads what it held before. Of whoever takes a batch
only this is asked: that its copy is in the device's current stream before the next batch is asked for.
"""

import logging
import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from scalefold.data.features.features import BatchShape, FeatureSettings, buffer_bytes
from scalefold.data.loading.loader import Batch, TrainLoader
from scalefold.data.loading.sampler import Delivered, TrainingSampler
from scalefold.data.loading.waiting import always
from scalefold.errors import ConfigError

log = logging.getLogger(__name__)

NUM_SLOTS = 3
SHARED_MEMORY = Path("/dev/shm")
_NAME_BYTES = 64  # of a chain id, which only messages use: a longer one is cut
_PATH_BYTES = 256


class Replica(Protocol):
    """What the loader needs of a DAP group."""

    def broadcast_in_replica(self, values: Tensor) -> None:
        """Overwrite a CPU tensor with the first rank's, on every rank of the group."""

    def barrier_in_replica(self) -> None:
        """Wait for all ranks of the group."""


class SharedLoader:
    """A ``TrainLoader`` for all ranks of a DAP group; same use, same batches.

    Args:
        own: the loader, on the first rank of the group; None on the others.
        replica: communication inside the group.
        settings: sizes of the features.
        batch_size: samples per replica and iteration.
        page_locked: register the memory with the GPU driver, so that copies from it are asynchronous.

    Raises:
        ConfigError: the shared memory of the node is too small, or the group does not lie on one node.
    """

    def __init__(
        self, own: TrainLoader | None, replica: Replica, settings: FeatureSettings, batch_size: int, page_locked: bool
    ) -> None:
        self._own, self._replica = own, replica
        self._shapes = [
            BatchShape.of(settings, batch_size, slices, training=True) for slices in range(1, settings.num_slices + 1)
        ]
        self._slots = self._map(NUM_SLOTS, buffer_bytes(self._shapes[-1]))
        self._next_slot = 0
        self._taken: deque[Any] = deque()  # events after the copy of each batch whose slot was not used again
        self._registered = page_locked and _register(self._slots)

    def spawn(self) -> None:
        """``TrainLoader.spawn``."""
        if self._own is not None:
            self._own.spawn()

    def start(self, sampler: TrainingSampler, first_iteration: int, last_iteration: int) -> None:
        """``TrainLoader.start``."""
        if self._own is not None:
            self._own.start(sampler, first_iteration, last_iteration)

    def next(self, iteration: int, wanted: Callable[[], bool] = always) -> Batch:
        """``TrainLoader.next``, the same batch on all ranks of the group."""
        start = time.perf_counter()
        self._release()
        slot = self._slots[self._next_slot]
        self._next_slot = (self._next_slot + 1) % NUM_SLOTS
        if self._own is None:
            return self._receive(slot, start)
        batch = self._own.next(iteration, wanted)
        slot[: batch.buffer.numel()].copy_(batch.buffer)
        self._replica.broadcast_in_replica(_header(batch))
        return replace(batch, buffer=slot[: batch.buffer.numel()])

    def _release(self) -> None:
        """Wait until no rank of the group reads the slot that comes next; it is ``NUM_SLOTS`` batches old."""
        if self._registered:  # other copies to a device are over when their call returns
            self._taken.append(torch.cuda.current_stream().record_event())
            if len(self._taken) == NUM_SLOTS:
                self._taken.popleft().synchronize()
        self._replica.barrier_in_replica()

    def delivered(self) -> Delivered | None:
        """``TrainLoader.delivered``; None on ranks that do not build."""
        return None if self._own is None else self._own.delivered()

    def processes(self) -> list[Any]:
        """``TrainLoader.processes``; none on ranks that do not build."""
        return [] if self._own is None else self._own.processes()

    def slowest(self) -> list[tuple[float, str]]:
        """``TrainLoader.slowest``; nothing on ranks that do not build."""
        return [] if self._own is None else self._own.slowest()

    def close(self) -> None:
        """``TrainLoader.close``, for good."""
        if self._own is not None:
            self._own.close()

    def release_memory(self) -> None:
        """Take the slots back from the device, once it is done with all work so far."""
        if self._registered:
            torch.cuda.synchronize()  # no copy from the memory may be under way
            _driver().cudaHostUnregister(self._slots.data_ptr())
            self._registered = False

    def _receive(self, slot: Tensor, start: float) -> Batch:
        header = _empty_header(self._shapes[0].batch_size)
        self._replica.broadcast_in_replica(_as_bytes(header))
        samples, shape = header["samples"][0], self._shapes[int(header["num_slices"][0]) - 1]
        return Batch(
            buffer=slot[: buffer_bytes(shape)],
            shape=shape,
            iteration=int(header["iteration"][0]),
            chain_ids=tuple(name.decode() for name in samples["name"]),
            indices=tuple(map(int, samples["index"])),
            seeds=tuple(map(int, samples["seed"])),
            build_s=tuple(map(float, samples["build_s"])),
            wait_ms=1e3 * (time.perf_counter() - start),
        )

    def _map(self, num_slots: int, num_bytes: int) -> Tensor:
        """Slots [num_slots, num_bytes] of shared memory, of which no name is left once all ranks have it."""
        name = np.zeros(1, f"S{_PATH_BYTES}")
        if self._own is not None:
            name[0] = str(_create(num_slots * num_bytes)).encode()
        self._replica.broadcast_in_replica(_as_bytes(name))
        path = Path(name[0].decode())
        try:
            if not path.exists():
                raise ConfigError(f"parallel.dap_size: {path} of the group's first rank is not on this rank's node")
            memory = torch.from_file(str(path), shared=True, size=num_slots * num_bytes, dtype=torch.uint8)
            self._replica.barrier_in_replica()
        finally:
            if self._own is not None:
                path.unlink(missing_ok=True)
        return memory.view(num_slots, num_bytes)


def _create(num_bytes: int) -> Path:
    """A new file in shared memory whose pages are reserved: a full one is an error here, not a crash later."""
    path = SHARED_MEMORY / f"scalefold_{os.getpid()}_{time.monotonic_ns()}"
    try:
        with path.open("xb") as file:
            os.posix_fallocate(file.fileno(), 0, num_bytes)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise ConfigError(
            f"{SHARED_MEMORY}: {num_bytes / 2**20:.0f} MiB for the batches of a DAP group: {error.strerror}; enlarge "
            "it (containers: --shm-size) or lower data.num_workers or data.prefetch_factor"
        ) from error
    return path


def _register(memory: Tensor) -> bool:
    error = int(_driver().cudaHostRegister(memory.data_ptr(), memory.numel(), 0))
    if error:
        log.warning("batches of the DAP group could not be page-locked (CUDA error %d): copies will wait", error)
    return error == 0


def _driver() -> Any:
    return torch.cuda.cudart()


def _empty_header(batch_size: int) -> np.ndarray:
    sample = [("index", "i8"), ("seed", "i8"), ("build_s", "f8"), ("name", f"S{_NAME_BYTES}")]
    return np.zeros(1, [("iteration", "i8"), ("num_slices", "i8"), ("samples", sample, (batch_size,))])


def _header(batch: Batch) -> Tensor:
    header = _empty_header(batch.shape.batch_size)
    header["iteration"], header["num_slices"] = batch.iteration, batch.passes
    samples = header["samples"][0]
    samples["index"], samples["seed"], samples["build_s"] = batch.indices, batch.seeds, batch.build_s
    samples["name"] = [name.encode() for name in batch.chain_ids]
    return _as_bytes(header)


def _as_bytes(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.view(np.uint8))
