"""Index streams, seeds and schedules, against the reference's numbers and against brute force."""

import csv
import json
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scalefold.data.loading.sampler import (
    Delivered,
    RecyclingSchedule,
    SampleStream,
    TrainingSampler,
    evaluation_pairs,
    forward_seed,
    seed_from_string,
)
from scalefold.errors import DataError


@pytest.fixture(scope="module")
def schedule(golden_dir):
    return json.loads((golden_dir / "schedule_and_seeds.json").read_text())


@pytest.fixture(scope="module")
def training_set(golden_dir):
    with (golden_dir / "real" / "training_set.csv").open() as lines:
        return list(csv.DictReader(lines))


def weights_of(training_set, variant):
    used = [row for row in training_set if int(row[f"index_{variant}"]) >= 0]
    used.sort(key=lambda row: int(row[f"index_{variant}"]))
    return np.array([float(row[f"weight_{variant}"]) for row in used])


def test_string_seeds_equal_the_reference(schedule):
    for text, seed in schedule["seed_from_string"].items():
        assert seed_from_string(text) == seed


def test_the_forward_seed_uses_seed_replica_and_iteration(schedule):
    assert forward_seed(1234567890, 1, 1) == schedule["seed_from_string"]["forward_1234567890_1_1"]
    assert forward_seed("1234567890", 0, 2) == schedule["seed_from_string"]["forward_1234567890_0_2"]


def test_recycling_counts_equal_the_reference(schedule):
    counts = RecyclingSchedule(1234567890)
    assert [counts(i) for i in range(1, 81)] == schedule["num_recycling_iters_first_80"]


def test_recycling_counts_do_not_depend_on_the_order_of_asking():
    forward, jumped = RecyclingSchedule(5), RecyclingSchedule(5)
    jumped(40)
    assert [forward(i) for i in range(1, 41)] == [jumped(i) for i in range(1, 41)]


def test_one_recycling_draw_serves_all_micro_iterations():
    single, triple = RecyclingSchedule(7), RecyclingSchedule(7, accumulation=3)
    assert [triple(i) for i in range(1, 31)] == [single((i - 1) // 3 + 1) for i in range(1, 31)]


def test_every_group_holds_every_recycling_count_once():
    counts = RecyclingSchedule("x", maximum=2)
    assert all(sorted(counts(g * 3 + j) for j in (1, 2, 3)) == [0, 1, 2] for g in range(20))


def test_the_stream_equals_the_reference_demo(schedule):
    demo = schedule["multinomial_demo"]
    stream = SampleStream(np.array(demo["weights"]), 17698653868398069710)
    pairs = [stream.pair(i) for i in range(32)]
    assert [i for i, _ in pairs] == demo["first_32"]
    assert [s for _, s in pairs[:8]] == demo["seeds_first_8"]


@pytest.mark.parametrize("variant", ["all", "native", "merged"])
@pytest.mark.parametrize("seed", [1234567890, 42, 0])
def test_rank_streams_equal_the_reference(golden_dir, training_set, variant, seed):
    weights = weights_of(training_set, variant)
    golden = np.load(golden_dir / "real" / "sampler.npz")
    checked = 0
    for key in golden.files:
        if not key.startswith(f"{variant}/seed{seed}/world"):
            continue
        world, rank = (int(part.lstrip("worldank")) for part in key.split("/")[2:])
        sampler = TrainingSampler(np.arange(len(weights)), weights, seed, rank, world)
        expected = [tuple(pair) for pair in golden[key].tolist()]
        assert [sampler.pairs(i)[0] for i in range(1, len(expected) + 1)] == expected
        checked += 1
    assert checked >= 2


@pytest.mark.parametrize("variant", ["all", "native", "merged"])
def test_a_resumed_stream_equals_the_reference(golden_dir, training_set, variant):
    weights = weights_of(training_set, variant)
    golden = np.load(golden_dir / "real" / "sampler.npz")[f"{variant}/seed42/resume5_world4_rank1_local2"]
    sampler = TrainingSampler(np.arange(len(weights)), weights, 42, 1, 4, local_batch_size=2)
    pairs = [pair for task in range(6, 6 + len(golden) // 2) for pair in sampler.pairs(task)]
    assert pairs == [tuple(pair) for pair in golden.tolist()]


@given(chunk=st.integers(2, 50), numbers=st.lists(st.integers(0, 199), min_size=1, max_size=20))
def test_drawing_in_chunks_in_any_order_gives_the_stream_of_one_draw(chunk, numbers):
    weights = np.array([0.3, 1.0, 0.2, 2.0, 0.7])
    g1, g2 = (torch.Generator().manual_seed(99) for _ in range(2))
    indices = torch.multinomial(torch.from_numpy(weights), 200, replacement=True, generator=g1).tolist()
    seeds = torch.randint(0, 2**63 - 1, (200,), generator=g2).tolist()
    stream = SampleStream(weights, 99, chunk=chunk)
    assert [stream.pair(n) for n in numbers] == [(indices[n], seeds[n]) for n in numbers]


def test_chains_are_drawn_in_proportion_to_their_weights():
    weights = np.array([1.0, 2.0, 4.0, 1.0])
    stream = SampleStream(weights, 3)
    drawn = np.bincount([stream.pair(i)[0] for i in range(16_000)], minlength=4) / 16_000
    np.testing.assert_allclose(drawn, weights / weights.sum(), atol=0.02)


def test_replicas_share_the_global_stream_without_overlap():
    weights = np.ones(50)
    whole = TrainingSampler(np.arange(50), weights, 1, local_batch_size=8)
    parts = [TrainingSampler(np.arange(50), weights, 1, r, 4, local_batch_size=2) for r in range(4)]
    for iteration in (1, 2, 7):
        dealt = [part.pairs(iteration) for part in parts]
        assert sorted(pair for pairs in dealt for pair in pairs) == sorted(whole.pairs(iteration))


def test_a_task_names_store_rows_seeds_and_slices():
    sampler = TrainingSampler(np.array([30, 10, 20]), np.ones(3), 9, local_batch_size=2)
    task = next(iter(sampler.tasks(4, 4)))
    assert task.iteration == 4
    assert task.num_slices == sampler.recycling(4) + 1
    pairs = sampler.pairs(4)
    assert task.indices == tuple([30, 10, 20][i] for i, _ in pairs)
    assert task.seeds == tuple(seed for _, seed in pairs)


def test_an_empty_training_set_is_an_error_that_names_the_filters():
    with pytest.raises(DataError, match="passes the training filters"):
        SampleStream(np.empty(0), 1)


def test_evaluation_pairs_equal_the_reference(golden_dir):
    golden = json.loads((golden_dir / "real" / "sampler.json").read_text())["validation_sampler"]
    for key, pairs in golden["pairs"].items():
        world, rank = (int(part.lstrip("worldank")) for part in key.split("/"))
        expected = [(index, int(seed)) for index, seed in pairs]
        assert evaluation_pairs(golden["chain_ids"], rank, world) == expected


class Replicas:
    """Loaders of all replicas that deliver in any order, as far ahead as ``depth`` draws."""

    def __init__(self, num: int, batch: int, depth: int, step: int, samples: int, left_over: list[int]) -> None:
        def sampler(replica: int) -> TrainingSampler:
            return TrainingSampler(
                np.arange(9), np.ones(9), 3, replica, num, batch, 0, 1, step, samples, left_over=left_over
            )

        self.samplers = [sampler(replica) for replica in range(num)]
        self.step, self.depth = step, depth
        self.delivered: list[set[int]] = [set() for _ in range(num)]

    def deliver(self, choose: random.Random) -> list[int]:
        """Places in the stream that one iteration of all replicas uses."""
        used = []
        for sampler, done in zip(self.samplers, self.delivered, strict=True):
            waiting = [d for d in range(self.step + 1, self.step + 2 + len(done) + self.depth) if d not in done]
            done.add(draw := choose.choice(waiting[: self.depth]))
            used += sampler.numbers(draw)
        return used

    def left_over(self) -> list[int]:
        """What has to come first after the next start."""
        found = []
        for done in self.delivered:
            newest = max(done, default=self.step)
            missing = tuple(d for d in range(self.step + 1, newest) if d not in done)
            found.append(Delivered(newest, missing))
        return self.samplers[0].passed_over(found)


@given(
    parts=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 2), st.integers(0, 7)), min_size=1, max_size=5),
    depth=st.integers(1, 6),
    seed=st.integers(0, 999),
)
def test_whatever_is_passed_over_comes_first_after_the_next_start(
    parts: list[tuple[int, int, int]], depth: int, seed: int
) -> None:
    """Parts of a run: (replicas, local batch, iterations), each with loaders of its own."""
    choose, used, left_over, step = random.Random(seed), list[int](), list[int](), 0
    for num, batch, iterations in parts:
        replicas = Replicas(num, batch, depth, step, len(used), left_over)
        for _ in range(iterations):
            used += replicas.deliver(choose)
        left_over, step = replicas.left_over(), step + iterations
        assert sorted([*used, *left_over]) == list(range(len(used) + len(left_over)))
