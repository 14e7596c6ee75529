"""Delivery of batches: order, determinism, slow samples, failures, evaluation cache."""

import atexit
import contextlib
import gc
import os
import signal
import threading
import time
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from chains import random_chain
from scalefold.data.batch_keys import PER_SLICE_KEYS
from scalefold.data.features.features import FeatureSettings, build_features
from scalefold.data.loading import loader as loading
from scalefold.data.loading.loader import ChainDataset, EvalSet, SlowSamples, TrainLoader, to_device
from scalefold.data.loading.sampler import TrainingSampler, seed_from_string
from scalefold.data.loading.waiting import NotWanted, ended_text, no_batch_text
from scalefold.errors import DataError

SMALL = FeatureSettings(
    train_sequence_crop_size=16, max_msa_clusters=4, max_extra_msa=8, max_templates=2, num_recycling_iters=3
)
NUM_CHAINS = 12
SLOW_SEED = 63  # draws row 3 once in 40 iterations, as the 11th


class FakeStore:
    """Chains made from their row number; row 7 cannot be read if the folder is called "broken".

    In "gated" row 3 is read once that folder holds a file "open"; in "dead" the process ends; "noted" keeps who opens.
    """

    def __init__(self, path):
        self.path = path
        if path.name == "noted":
            (path / f"{os.getpid()}").touch()
        self.table = SimpleNamespace(length=np.arange(10, 10 + NUM_CHAINS))

    def __len__(self):
        return NUM_CHAINS

    def name(self, row):
        return f"chain{row:02d}_A"

    def index_of(self, chain_id):
        return int(chain_id[5:7])

    def read(self, row):
        if self.path.name == "broken" and row == 7:
            raise DataError("record is cut")
        if self.path.name == "dead":
            os._exit(1)
        while self.path.name == "gated" and row == 3 and not (self.path / "open").exists():
            time.sleep(0.01)
        return random_chain(10 + row, 12, seed=row)


class FakeDataset(ChainDataset):
    """The real dataset over ``FakeStore``; module level, so that worker processes can import it."""

    def store(self):
        if self._store is None:
            self._store = FakeStore(self._store_path)
        return self._store


@pytest.fixture(autouse=True)
def fake_store(monkeypatch):
    """In place of the real one; and whether workers live is looked at more often than every 5 s."""
    monkeypatch.setattr(loading, "ChainDataset", FakeDataset)
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.1,))


@pytest.fixture
def gated(tmp_path):
    """A folder whose row 3 cannot be read yet."""
    (folder := tmp_path / "gated").mkdir()
    return folder


def sampler(local_batch_size=1, seed=5):
    return TrainingSampler(np.arange(NUM_CHAINS), np.ones(NUM_CHAINS), seed, local_batch_size=local_batch_size)


def deliver(path, iterations, num_workers=0, first=1, local_batch_size=1, **options):
    loader = TrainLoader(path, SMALL, num_workers=num_workers, **options)
    loader.spawn()
    loader.start(sampler(local_batch_size), first, first + iterations - 1)
    try:
        return [loader.next(i) for i in range(first, first + iterations)]
    finally:
        loader.close()


def assert_equal_batches(left, right):
    assert [b.chain_ids for b in left] == [b.chain_ids for b in right]
    for a, b in zip(left, right, strict=True):
        assert a.passes == b.passes
        for key, value in a.features.items():
            assert torch.equal(value, b.features[key]), key


def test_a_batch_holds_the_sampler_s_chains_with_the_iteration_s_slices(tmp_path):
    batches = deliver(tmp_path, 4, local_batch_size=2)
    reference = sampler(2)
    for iteration, batch in enumerate(batches, 1):
        task = reference.task(iteration)
        assert (batch.indices, batch.seeds, batch.passes) == (task.indices, task.seeds, task.num_slices)
        assert batch.chain_ids == tuple(f"chain{i:02d}_A" for i in task.indices)
        for row, (index, seed) in enumerate(zip(task.indices, task.seeds, strict=True)):
            alone = build_features(random_chain(10 + index, 12, seed=index), SMALL, seed, training=True)
            for key, value in batch.features.items():
                expected = alone[key][..., : task.num_slices] if key in PER_SLICE_KEYS else alone[key]
                assert torch.equal(value[row], expected[0]), key


@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_in_order_samples_are_the_same_for_any_number_of_workers(tmp_path, num_workers):
    expected = deliver(tmp_path, 2 * NUM_CHAINS)
    found = deliver(tmp_path, 2 * NUM_CHAINS, num_workers=num_workers, prefetch_factor=2)
    assert_equal_batches(found, expected)


def test_a_resumed_loader_continues_the_stream(tmp_path):
    whole = deliver(tmp_path, 9)
    rest = deliver(tmp_path, 4, first=6)
    assert_equal_batches(rest, whole[5:])


def test_workers_touch_no_data_before_start(tmp_path):
    (tmp_path / "noted").mkdir()
    loader, evaluation = (kind(tmp_path / "noted", SMALL, num_workers=1) for kind in (TrainLoader, EvalSet))
    with contextlib.closing(loader), contextlib.closing(evaluation):
        loader.spawn(), evaluation.spawn()
        begun = time.time_ns()
        loader.start(sampler(), 1, 2)
        loader.next(1)
        (opened,) = (tmp_path / "noted").iterdir()
    assert opened.stat().st_mtime_ns > begun - 10**7, "the clock of files is a coarse one"


def test_out_of_order_delivery_loses_and_repeats_nothing(tmp_path):
    batches = deliver(tmp_path, 2 * NUM_CHAINS, num_workers=2, in_order=False)
    assert sorted(b.iteration for b in batches) == list(range(1, 2 * NUM_CHAINS + 1))
    counts = sampler().recycling
    assert [b.passes for b in batches] == [counts(i) + 1 for i in range(1, 2 * NUM_CHAINS + 1)]
    expected = {b.iteration: b for b in deliver(tmp_path, 2 * NUM_CHAINS)}
    for batch in batches:
        reference = expected[batch.iteration]
        assert (batch.chain_ids, batch.seeds) == (reference.chain_ids, reference.seeds)
        shared = min(batch.passes, reference.passes)
        assert torch.equal(batch.features["msa_feat"][..., :shared], reference.features["msa_feat"][..., :shared])


def test_draws_passed_over_by_one_loader_are_the_first_of_the_next(gated):
    def run(first, last, samples, left_over):
        draws = TrainingSampler(
            np.arange(NUM_CHAINS), np.ones(NUM_CHAINS), SLOW_SEED, 0, 1, 1, 3, 1, first - 1, samples, left_over
        )
        loader = TrainLoader(gated, SMALL, num_workers=2, prefetch_factor=2, in_order=False)
        loader.start(draws, first, 40)
        try:
            batches = [loader.next(iteration) for iteration in range(first, last + 1)]
            return [batch.seeds[0] for batch in batches], draws.passed_over([loader.delivered()])
        finally:
            (gated / "open").touch()
            loader.close()

    before, left_over = run(1, 14, 0, [])
    assert 10 in left_over, "row 3 is the 11th draw"
    after, nothing = run(15, 40, 14, left_over)
    assert nothing == []
    whole = TrainingSampler(np.arange(NUM_CHAINS), np.ones(NUM_CHAINS), SLOW_SEED)
    assert sorted([*before, *after]) == sorted(whole.pairs(i)[0][1] for i in range(1, 41))


@pytest.fixture(params=[True, False], ids=["in order", "as ready"])
def waiting(request, gated):
    """A loader of 40 samples that has delivered the ten before the one that cannot be read yet."""
    loader = TrainLoader(gated, SMALL, num_workers=2, prefetch_factor=2, in_order=request.param)
    loader.start(sampler(seed=SLOW_SEED), 1, 40)
    before = [loader.next(iteration) for iteration in range(1, 11)]
    yield request.param, loader, before
    (gated / "open").touch()
    loader.close()


def test_a_slow_sample_stalls_the_ordered_loader_and_not_the_other(waiting, gated):
    in_order, loader, batches = waiting
    opener = threading.Timer(0.5, (gated / "open").touch)
    if in_order:
        opener.start()
        assert (late := loader.next(11)).indices == (3,)
        assert late.wait_ms > 400
        return
    batches += [loader.next(iteration) for iteration in range(11, 39)]  # one more draw may wait behind it
    assert (3,) not in [batch.indices for batch in batches]
    opener.start()
    assert (3,) in [loader.next(iteration).indices for iteration in (39, 40)]


def test_of_the_ready_batches_the_earliest_draw_comes_first():
    arrivals = iter([3, 1, 2])

    class Arrivals:
        def next(self, wanted):
            return SimpleNamespace(iteration=next(arrivals))

    ready = loading._ReadyFirst(Arrivals(), capacity=4)
    ready._thread.join()
    assert [ready.next().iteration for _ in range(3)] == [1, 2, 3]
    with pytest.raises(StopIteration):
        ready.next()


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("in_order", [True, False])
def test_a_failing_sample_stops_training_with_chain_row_seed_and_reason(tmp_path, num_workers, in_order):
    folder = tmp_path / "broken"
    folder.mkdir()
    with pytest.raises(DataError, match=r"chain chain07_A \(row 7, seed \d+\): record is cut"):
        deliver(folder, 60, num_workers=num_workers, in_order=in_order)


@pytest.mark.parametrize("in_order", [True, False])
def test_a_worker_that_dies_stops_training_with_a_reason(tmp_path, in_order):
    folder = tmp_path / "dead"
    folder.mkdir()
    with pytest.raises(DataError, match="worker ended unexpectedly"):
        deliver(folder, 5, num_workers=1, in_order=in_order)


def stop_workers(loader):
    for worker in loader._workers.processes():
        os.kill(worker.pid, signal.SIGSTOP)


@pytest.mark.parametrize("prefetch", [1, 4])  # with 4, finished batches lie in the worker's hands
@pytest.mark.parametrize("in_order", [True, False])
def test_a_worker_that_stands_still_is_named_and_does_not_outlive_the_loader(tmp_path, in_order, prefetch):
    loader = TrainLoader(tmp_path, SMALL, num_workers=1, prefetch_factor=prefetch, in_order=in_order, limits_s=(60, 2))
    loader.spawn()
    loader.start(sampler(), 1, 40)
    loader.next(1)
    workers = loader._workers.processes()
    stop_workers(loader)
    begin = time.monotonic()
    with pytest.raises(DataError, match=r"iteration \d+: no batch within 2 s: loader worker \d+ is stopped"):
        [loader.next(iteration) for iteration in range(2, 10)]
    loader.close()
    assert time.monotonic() - begin < 30
    assert not any(worker.is_alive() for worker in workers)


@pytest.mark.parametrize("in_order", [True, False])
def test_a_wait_that_nobody_needs_any_more_ends(tmp_path, in_order):
    loader = TrainLoader(tmp_path, SMALL, num_workers=1, prefetch_factor=1, in_order=in_order)
    loader.start(sampler(), 1, 40)
    loader.next(1)
    stop_workers(loader)
    with pytest.raises(NotWanted):
        [loader.next(iteration, wanted=lambda: False) for iteration in range(2, 10)]
    loader.close()


def test_a_worker_that_stands_still_at_the_start_is_named(tmp_path):
    loader = TrainLoader(tmp_path, SMALL, num_workers=1, limits_s=(2, 2))
    loader.spawn()
    stop_workers(loader)
    with pytest.raises(DataError, match="no batch within 2 s: loader worker"), contextlib.closing(loader):
        loader.start(sampler(), 1, 40)


def test_an_evaluation_worker_that_stands_still_is_named(gated):
    evaluation = EvalSet(gated, SMALL, num_workers=1, limit_s=2)
    evaluation.start(["chain03_A"])
    stop_workers(evaluation)
    with pytest.raises(DataError, match="no batch within 2 s: loader worker"), contextlib.closing(evaluation):
        list(evaluation)


def test_nothing_keeps_closed_workers_and_their_pipes_although_pytorch_notes_them_for_its_end(tmp_path, monkeypatch):
    note = staticmethod(lambda worker: None)  # as PyTorch does with the workers of a loader of page-locked batches
    monkeypatch.setattr(_MultiProcessingDataLoaderIter, "_clean_up_worker", note, raising=False)
    loader = TrainLoader(tmp_path, SMALL, num_workers=2)
    loader.spawn()
    kept = [weakref.ref(worker) for worker in loader.processes()]
    for worker in loader.processes():
        atexit.register(_MultiProcessingDataLoaderIter._clean_up_worker, worker)
    del worker
    loader.close()
    gc.collect()
    assert [worker() for worker in kept] == [None, None]


def test_workers_that_are_alive_and_slow_are_not_called_dead():
    alive = "no batch within 540 s, and all 1 loader workers are alive: slow storage?"
    assert no_batch_text([SimpleNamespace(pid=os.getpid())], 540).startswith(alive)
    assert "has ended" in no_batch_text([SimpleNamespace(pid=2**22 + 1)], 540)


def test_missing_descriptors_are_not_taken_for_missing_memory():
    assert "ulimit -n" in ended_text(RuntimeError("Too many open files. Communication with the workers ..."))
    assert "ulimit -n" in ended_text(RuntimeError("received 0 items of ancdata"))
    assert "/dev/shm" in ended_text(RuntimeError("DataLoader worker (pid 3) is killed by signal: Bus error."))


@pytest.mark.parametrize(
    ("last", "asked", "message"),
    [(5, 3, "iteration 3: the loader delivers iteration 2"), (1, 2, "iteration 2: the loader was started for fewer")],
)
def test_only_the_announced_iterations_are_delivered_and_in_their_order(tmp_path, last, asked, message):
    loader = TrainLoader(tmp_path, SMALL, num_workers=0)
    loader.start(sampler(), 1, last)
    loader.next(1)
    with pytest.raises(DataError, match=message):
        loader.next(asked)


def test_the_slowest_samples_are_remembered():
    slow = SlowSamples(count=2)
    for seconds, name in [(0.1, "a"), (0.5, "b"), (0.3, "c"), (0.2, "d")]:
        slow.add(SimpleNamespace(build_s=(seconds,), chain_ids=(name,)))
    assert slow.slowest() == [(0.5, "b"), (0.3, "c")]


def test_a_copied_batch_has_the_same_features(tmp_path):
    (batch,) = deliver(tmp_path, 1)
    moved = to_device(batch, "cpu")
    assert_equal_batches([moved], [batch])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_evaluation_features_depend_on_the_chain_alone_and_are_built_once(tmp_path, num_workers):
    names = ["chain04_A", "chain01_A", "chain09_A"]
    evaluation = EvalSet(tmp_path, SMALL, num_workers=num_workers)
    evaluation.spawn()
    evaluation.start(names)
    first, second = list(evaluation), list(evaluation)
    evaluation.close()
    assert [b.chain_ids[0] for b in first] == names
    for a, b in zip(first, second, strict=True):
        assert a.buffer.data_ptr() == b.buffer.data_ptr()
    for name, batch in zip(names, first, strict=True):
        row = int(name[5:7])
        expected = build_features(random_chain(10 + row, 12, seed=row), SMALL, seed_from_string(name), training=False)
        assert batch.passes == 4
        for key, value in batch.features.items():
            for axis, size in enumerate(expected[key].shape):  # lengths are padded to a multiple of 64
                value, padding = value.split([size, value.shape[axis] - size], axis)
                assert not padding.any(), key
            assert torch.equal(value, expected[key]), key


def test_a_failing_evaluation_chain_is_an_error_that_names_it(tmp_path):
    folder = tmp_path / "broken"
    folder.mkdir()
    for num_workers in (0, 1):
        evaluation = EvalSet(folder, SMALL, num_workers=num_workers)
        evaluation.start(["chain01_A", "chain07_A"])
        with pytest.raises(DataError, match="chain07_A"):
            list(evaluation)
        evaluation.close()
