"""Which chain with which seed, and how many recycling passes, at every iteration of every replica.

All of it is a function of one seed and the iteration number, so ranks agree without communication and a resumed run
continues the same streams. Seeds come from strings, one per purpose.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from scalefold.errors import DataError

_SEED_LIMIT = (1 << 63) - 1
_CHUNK = 16_384  # pairs drawn at a time


def seed_from_string(text: str) -> int:
    """64-bit seed of a purpose such as ``initial_training_sampler_42``."""
    return random.Random(text).getrandbits(64)


def forward_seed(seed: int | str, replica: int, iteration: int) -> int:
    """torch seed before iteration ``iteration`` (1-based) of data-parallel replica ``replica`` (dropout masks)."""
    return seed_from_string(f"forward_{seed}_{replica}_{iteration}")


def initialisation_seed(seed: int | str) -> int:
    """torch seed of the weights' initial values; numpy takes it modulo 2^32."""
    return seed_from_string(f"alphafold_init_{seed}")


class SampleStream:
    """The endless global stream of (data set index, sample seed) pairs, drawn in chunks when first needed.

    Two torch generators with the same seed draw indices (multinomial with replacement over float64 weights) and seeds
    (integers in [0, 2^63 - 1)). A chunked stream equals one large draw. Only moving forward is cheap.
    """

    def __init__(self, weights: np.ndarray, seed: int, chunk: int = _CHUNK) -> None:
        if not len(weights):
            raise DataError(
                "no chain of the store passes the training filters (dates, resolution, composition, cluster)"
            )
        if chunk < 2:
            raise ValueError("torch draws a single multinomial sample by another method: a chunk needs 2 or more")
        self._weights = torch.from_numpy(np.ascontiguousarray(weights, dtype=np.float64))
        self._seed, self._chunk = seed, chunk
        self._restart()

    def _restart(self) -> None:
        self._index_generator = torch.Generator().manual_seed(self._seed)
        self._seed_generator = torch.Generator().manual_seed(self._seed)
        self._first, self._indices, self._seeds = 0, np.empty(0, np.int64), np.empty(0, np.int64)

    def _next_chunk(self) -> None:
        self._first += len(self._indices)
        draw = torch.multinomial(self._weights, self._chunk, replacement=True, generator=self._index_generator)
        self._indices = draw.numpy()
        self._seeds = torch.randint(0, _SEED_LIMIT, (self._chunk,), generator=self._seed_generator).numpy()

    def pair(self, number: int) -> tuple[int, int]:
        """(data set index, seed) number ``number`` (0-based) of the global stream."""
        if number < self._first:
            self._restart()
        while number >= self._first + len(self._indices):
            self._next_chunk()
        at = number - self._first
        return int(self._indices[at]), int(self._seeds[at])


class RecyclingSchedule:
    """How many recycling iterations each training iteration uses: the same on every rank.

    Groups of ``maximum + 1`` draws hold every count once, in shuffled order; with gradient accumulation one draw
    serves all micro-iterations of an optimizer step.
    """

    def __init__(self, seed: int | str, maximum: int = 3, accumulation: int = 1) -> None:
        self._maximum, self._accumulation = maximum, accumulation
        self._stream = random.Random(seed_from_string(f"initial_training_dataloader_{seed}"))
        self._counts: list[int] = []

    def __call__(self, iteration: int) -> int:
        """Recycling iterations (0..maximum) before the supervised pass of ``iteration`` (1-based)."""
        draw = (iteration - 1) // self._accumulation
        while draw >= len(self._counts):
            group = list(range(self._maximum + 1))
            self._stream.shuffle(group)
            self._counts += group
        return self._counts[draw]


@dataclass(frozen=True)
class Task:
    """One local batch to build: store rows, sample seeds, and how many recycling slices it needs."""

    iteration: int
    indices: tuple[int, ...]
    seeds: tuple[int, ...]
    num_slices: int


@dataclass(frozen=True)
class Delivered:
    """What a loader has delivered: all draws up to ``newest`` except those ``passed_over``."""

    newest: int
    passed_over: tuple[int, ...] = ()


class TrainingSampler:
    """The tasks of one data-parallel replica, from any iteration on.

    Args:
        rows: store rows of the training set; the stream indexes into them.
        weights: one sampling weight per training chain.
        seed: the run's seed, as logged.
        replica, num_replicas: this data-parallel replica (DAP group) among all.
        local_batch_size: samples per replica and iteration.
        max_recycling_iters, accumulation: see ``RecyclingSchedule``.
        iterations_before, samples_before: what earlier parts of the run, with another batch size, have used.
        left_over: numbers of the stream that those parts passed over; they come first.
    """

    def __init__(
        self,
        rows: np.ndarray,
        weights: np.ndarray,
        seed: int | str,
        replica: int = 0,
        num_replicas: int = 1,
        local_batch_size: int = 1,
        max_recycling_iters: int = 3,
        accumulation: int = 1,
        iterations_before: int = 0,
        samples_before: int = 0,
        left_over: Sequence[int] = (),
    ) -> None:
        if not 0 <= replica < num_replicas:
            raise ValueError(f"replica {replica} of {num_replicas}")
        self._rows = np.asarray(rows)
        self._stream = SampleStream(weights, seed_from_string(f"initial_training_sampler_{seed}"))
        self._replica, self._num_replicas, self._local_batch_size = replica, num_replicas, local_batch_size
        self._iterations_before, self._samples_before = iterations_before, samples_before
        self._left_over = tuple(left_over)
        self.recycling = RecyclingSchedule(seed, max_recycling_iters, accumulation)

    def numbers(self, iteration: int, replica: int | None = None) -> list[int]:
        """Places in the global stream of a replica's samples at ``iteration`` (1-based); by default this replica's."""
        replica = self._replica if replica is None else replica
        first = (iteration - 1 - self._iterations_before) * self._local_batch_size
        places = (replica + self._num_replicas * (first + j) for j in range(self._local_batch_size))
        left = self._left_over
        return [left[place] if place < len(left) else self._samples_before + place for place in places]

    def pairs(self, iteration: int) -> list[tuple[int, int]]:
        """(training-set index, seed) of this replica's samples at ``iteration`` (1-based)."""
        return [self._stream.pair(number) for number in self.numbers(iteration)]

    def passed_over(self, delivered: Sequence["Delivered"]) -> list[int]:
        """Places in the stream that lie before one that was used, and are not used themselves.

        ``delivered`` holds what each replica's loader has delivered since its start, in the order of the replicas.
        """
        newest = max(d.newest for d in delivered)
        missing = [
            number
            for replica, d in enumerate(delivered)
            for draw in (*d.passed_over, *range(d.newest + 1, newest + 1))
            for number in self.numbers(draw, replica)
        ]
        drawn = (newest - self._iterations_before) * self._num_replicas * self._local_batch_size
        return sorted([*missing, *self._left_over[drawn:]])

    def task(self, iteration: int) -> Task:
        """What the loader has to build for ``iteration``."""
        indices, seeds = zip(*self.pairs(iteration), strict=True)
        rows = tuple(int(self._rows[i]) for i in indices)
        return Task(iteration, rows, seeds, self.recycling(iteration) + 1)

    def tasks(self, first_iteration: int, last_iteration: int) -> Iterator[Task]:
        """Tasks of the iterations ``first_iteration`` to ``last_iteration``, both included."""
        return (self.task(iteration) for iteration in range(first_iteration, last_iteration + 1))


def evaluation_pairs(chain_ids: Sequence[str], rank: int, world_size: int) -> list[tuple[int, int]]:
    """The reference's synchronous evaluation order: (index, seed from the chain id) for one rank.

    The list is padded by wrapping around to a multiple of ``world_size`` and dealt out in turn.
    """
    padded = -(-len(chain_ids) // world_size) * world_size
    mine = (i % len(chain_ids) for i in range(rank, padded, world_size))
    return [(i, seed_from_string(chain_ids[i])) for i in mine]
