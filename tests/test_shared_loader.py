"""A DAP group builds each sample once: the first rank's batches arrive on all ranks bit for bit."""

import hashlib
import itertools
import multiprocessing as mp
import os
import queue
import threading
import time
from functools import partial
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from processes import free_port
from runs import tiny_config
from scalefold.config import Config
from scalefold.data.features.features import BatchShape, FeatureSettings, buffer_bytes
from scalefold.data.loading import shared_loader
from scalefold.data.loading.loader import Batch, TrainLoader
from scalefold.data.loading.shared_loader import NUM_SLOTS, SharedLoader
from scalefold.errors import ConfigError
from scalefold.run.batches import Batches
from scalefold.run.begin import RunOptions
from scalefold.run.loop import run_rank

SETTINGS = FeatureSettings(
    train_sequence_crop_size=8, max_msa_clusters=2, max_extra_msa=2, max_templates=1, num_recycling_iters=1
)
NUM_RANKS = 3


class Threads:
    """A DAP group whose ranks are threads."""

    def __init__(self, is_first: bool, boxes: list[queue.Queue], own: queue.Queue, barrier: threading.Barrier) -> None:
        self._is_first, self._boxes, self._own, self._barrier = is_first, boxes, own, barrier

    def broadcast_in_replica(self, values: Tensor) -> None:
        if self._is_first:
            for box in self._boxes:
                box.put(values.clone())
        else:
            values.copy_(self._own.get(timeout=300))

    def barrier_in_replica(self) -> None:
        self._barrier.wait(timeout=300)


class Numbered:
    """Stands for a ``TrainLoader``: batches that say which iteration they are for, with one or two slices."""

    def next(self, iteration: int, wanted: object = None) -> Batch:
        shape = BatchShape.of(SETTINGS, 2, 1 + iteration % 2, training=True)
        buffer = torch.full((buffer_bytes(shape),), iteration, dtype=torch.uint8)
        return Batch(buffer, shape, iteration + 10, ("1abc_A", "2xyz_B"), (3, iteration), (2**40, 5), (0.5, 0.25), 7.0)

    def close(self) -> None: ...


def run_group(function) -> dict[int, list]:
    """Call ``function(rank, loader)`` on every rank of a group."""
    boxes, barrier, results = [queue.Queue() for _ in range(NUM_RANKS - 1)], threading.Barrier(NUM_RANKS), {}

    def run(rank: int) -> None:
        replica = Threads(rank == 0, boxes, boxes[rank - 1], barrier)
        own = Numbered() if rank == 0 else None
        loader = SharedLoader(own, replica, SETTINGS, 2, page_locked=False)  # type: ignore[arg-type]
        results[rank] = function(rank, loader)
        loader.close()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(NUM_RANKS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=300)
    return results


def test_all_ranks_get_the_first_ranks_batches() -> None:
    def take(rank: int, loader: SharedLoader) -> list[Batch]:
        batches = []
        for iteration in range(1, 2 * NUM_SLOTS + 1):
            batch = loader.next(iteration)
            batches.append(Batch(**{**vars(batch), "buffer": batch.buffer.clone()}))
            loader._replica.barrier_in_replica()  # a step in which all take part
        return batches

    results = run_group(take)
    assert sorted(results) == list(range(NUM_RANKS))
    for iteration in range(1, 2 * NUM_SLOTS + 1):
        expected = Numbered().next(iteration)
        for batches in results.values():
            batch = batches[iteration - 1]
            assert torch.equal(batch.buffer, expected.buffer)
            for key in ("shape", "iteration", "chain_ids", "indices", "seeds", "build_s"):
                assert getattr(batch, key) == getattr(expected, key), key


def test_a_slot_is_not_written_again_while_the_step_before_may_still_read_it() -> None:
    def take(rank: int, loader: SharedLoader) -> bool:
        kept = loader.next(1)
        for iteration in range(2, NUM_SLOTS + 1):
            loader.next(iteration)
        loader._replica.barrier_in_replica()
        return bool((kept.buffer == 1).all())

    assert run_group(take) == dict.fromkeys(range(NUM_RANKS), True)


def test_a_batch_stays_while_the_next_two_arrive() -> None:
    """The step reads one, the copy to the device another, the workers' next one is being written."""

    def take(rank: int, loader: SharedLoader) -> list[bool]:
        batches = [loader.next(iteration) for iteration in (1, 2, 3)]
        loader._replica.barrier_in_replica()
        return [bool((batch.buffer == number).all()) for number, batch in enumerate(batches, 1)]

    assert run_group(take) == dict.fromkeys(range(NUM_RANKS), [True] * 3)


def test_a_slot_is_not_written_again_before_the_slowest_rank_has_read_it() -> None:
    """Nothing but the loader holds the ranks together: no step, no barrier, no order of calls around it."""

    def take(rank: int, loader: SharedLoader) -> list[bool]:
        right = []
        for iteration in range(1, 3 * NUM_SLOTS + 1):
            batch = loader.next(iteration)
            if rank == 1:
                time.sleep(0.02)
            right.append(bool((batch.buffer == iteration).all()))
        return right

    assert run_group(take) == dict.fromkeys(range(NUM_RANKS), [True] * 3 * NUM_SLOTS)


def test_a_slot_is_not_written_again_before_the_device_has_copied_it(monkeypatch: pytest.MonkeyPatch) -> None:
    over: list[int] = []  # numbers of the batches whose copy the host knows to be done
    numbers = itertools.count()
    stream = SimpleNamespace(record_event=lambda: SimpleNamespace(synchronize=partial(over.append, next(numbers))))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    own, known = Numbered(), {}
    original = own.next

    def fetch(iteration: int, wanted: object) -> Batch:
        known[iteration] = over[-1:]
        return original(iteration)

    own.next = fetch  # type: ignore[method-assign]
    loader = SharedLoader(own, Threads(True, [], queue.Queue(), threading.Barrier(1)), SETTINGS, 2, False)  # type: ignore[arg-type]
    loader._registered = True
    for iteration in range(1, 3 * NUM_SLOTS + 1):
        loader.next(iteration)
    for iteration in range(NUM_SLOTS + 1, 3 * NUM_SLOTS + 1):
        assert known[iteration] == [iteration - NUM_SLOTS]


def test_no_name_is_left_in_shared_memory() -> None:
    before = set(shared_loader.SHARED_MEMORY.glob(f"scalefold_{os.getpid()}_*"))
    run_group(lambda rank, loader: None)
    assert set(shared_loader.SHARED_MEMORY.glob(f"scalefold_{os.getpid()}_*")) == before == set()


def test_shared_memory_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shared_loader, "SHARED_MEMORY", tmp_path / "none")
    with pytest.raises(ConfigError, match=r"none: 0 MiB for the batches of a DAP group: No such file.*--shm-size"):
        SharedLoader(Numbered(), Threads(True, [], queue.Queue(), threading.Barrier(1)), SETTINGS, 2, False)  # type: ignore[arg-type]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("order", "name"), [("pt", "InitialTrainingDataloaderPT"), ("pq", "InitialTrainingDataloaderPQ")]
)
def test_only_the_first_rank_of_a_group_builds_samples(tiny_store: Path, tmp_path: Path, order: str, name: str) -> None:
    group = ("parallel.ranks_per_node=2", "parallel.dap_size=2", f"data.dataloader={order}")
    config = tiny_config(tiny_store, tmp_path, *group)
    context, port = mp.get_context("fork"), free_port()
    found = context.SimpleQueue()
    processes = [context.Process(target=_train_and_tell, args=(config, rank, port, found)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=300)
    assert [process.exitcode for process in processes] == [0, 0]
    seen = dict(found.get() for _ in range(2))
    assert seen[0] == (True, seen[1][1])
    assert seen[1][0] is False
    assert len(seen[1][1]) == 4
    assert f'"{name}"' in (tmp_path / "result_0.txt").read_text()


def _train_and_tell(config: Config, rank: int, port: int, found: "SimpleQueue") -> None:
    """Tell whether this rank builds samples, and which chains it trained on, with a digest of their features."""
    os.environ.update(
        RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    chains, builds, original = [], set(), Batches.to_device

    def watched(self: Batches, batch: Batch) -> dict[str, Tensor]:
        builds.add(isinstance(self.loader, SharedLoader) and isinstance(self.loader._own, TrainLoader))
        chains.append((batch.iteration, batch.chain_ids, hashlib.sha256(batch.buffer.numpy().tobytes()).hexdigest()))
        return original(self, batch)

    Batches.to_device = watched  # type: ignore[method-assign]
    run_rank(config, RunOptions())
    found.put((rank, (builds == {True}, chains)))
