"""What earlier trials say about candidates: a forest of regression trees over configuration, program, problem and GPU.

It predicts how far a candidate is from the best of its problem, as the logarithm of the ratio of times, and how sure
that is: the spread of its trees. Fitting needs scikit-learn (the extra ``tune``); a fitted model is a file of arrays
that NumPy alone evaluates, for machines that have no more.

Every trial is learned from more than once (``augmented``): as it stands, as if its program were not compiled yet, and
some times as one of a kernel that nobody knows at another size, with the noise of a clock. The model can so order what
to compile first, and has something to say on a new kernel.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from scalefold.errors import ConfigError
from scalefold.processors import processors
from scalefold.tune.trials import GPUS, Trial, parse_config

ANY_GPU = (132, 3350, 228)
WORST = math.log(4)  # farther from the best is all the same
NOISE = 0.01  # of a time, relative
WINNERS_WEIGHT = 0.5  # of rows that only say what won: nobody knows by how much
TREES, LEAST_LEAF, SHARE_OF_FEATURES = 200, 2, 0.5
RESIZED = 3  # times that a trial is also one of an unnamed kernel
PARAMETERS = (  # what means the same in several kernels is one feature
    ("BLOCK_M", "BLOCK_Q", "BLOCK_F", "BLOCK_S", "BLOCK"),
    ("BLOCK_N", "BLOCK_K", "BLOCK_P"),
    ("num_warps",),
    ("num_stages", "STAGES"),
    ("GROUPS", "ROWS", "SEQUENCES", "PROGRAMS", "PARTS"),
    ("maxnreg",),
    ("REGISTERS",),
    ("LIBRARY",),
    ("COPY_ENGINE",),
    ("HOPPER",),
    ("UNROLLED",),
)
WIDTHS = ("c", "n", "d", "heads", "batch", "bias", "products", "transposed")
SIZES = ("rows", "sequences", "frames", "points")
PROGRAM = slice(len(PARAMETERS) + 2, len(PARAMETERS) + 9)  # columns that only a compiled program has


def features(trial: Trial) -> list[float]:
    """Numbers of one trial, without the kernel's name; figures that are not known are -1."""
    config = parse_config(trial.config)
    fields = dict(part.split("=", 1) for part in trial.problem.split())
    tiles = [_log2(next((config[name] for name in names if name in config), 0)) for names in PARAMETERS]
    area = tiles[0] + tiles[1]
    shape = [_log2(_number(fields.get(name))) for name in WIDTHS]
    size = sum(_log2(_number(fields.get(name))) for name in SIZES)
    gpu = GPUS.get(trial.device, ANY_GPU)
    work = [size, _log2(trial.operations or 0), float(fields.get("dtype") == "float32"), math.log2(gpu[1])]
    return [*tiles, area, area - tiles[2], *_program(trial, tiles[2], gpu), *shape, *work]


def _program(trial: Trial, log_warps: float, gpu: tuple[int, int, int]) -> list[float]:
    """Registers, spills, shared memory, programs a multiprocessor, waves, idle share of the last wave, bytes."""
    if not trial.programs:
        return [-1.0] * 7
    registers, shared = trial.registers or 0, trial.shared_bytes or 0
    resident = resident_programs(registers, shared, round(2**log_warps), gpu[2] * 1024)
    waves = trial.programs / (gpu[0] * resident)
    sizes = [registers / 32, _log2(trial.spill_bytes or 0), shared / 2**14, float(resident)]
    return [*sizes, _log2(round(16 * waves)), math.ceil(waves) / waves, _log2(trial.moved_bytes or 0)]


def resident_programs(registers: int, shared: int, warps: int, shared_per_sm: int) -> int:
    """Programs that a streaming multiprocessor holds at a time, by registers, warps and shared memory; at least 1."""
    allocated = max(1, -(-registers // 8) * 8 * 32 * max(1, warps))
    return max(1, min(65536 // allocated, 64 // max(1, warps), shared_per_sm // (shared + 1024), 32))


def _log2(value: float) -> float:
    return math.log2(1 + value)


def _number(text: str | None) -> int:
    return int(text) if text is not None and text.isdigit() else 0


class Lesson(NamedTuple):
    """One trial, how far from the best of its sweep it was (log of the ratio), and how much it counts."""

    trial: Trial
    distance: float
    weight: float


def lessons(history: Iterable[Trial]) -> list[Lesson]:
    """Sound trials against the best of the same problem, device and code; a winner without others is at distance 0."""
    sweeps: dict[tuple[str, ...], list[Trial]] = {}
    for trial in history:
        if trial.is_sound:
            sweeps.setdefault((*trial.key, trial.device, trial.code, trial.torch), []).append(trial)
    found = []
    for members in sweeps.values():
        best = min(member.us or math.inf for member in members)
        for member in members:
            distance = 0.0 if member.best_of else min(WORST, math.log((member.us or best) / best))
            if member.best_of or len(members) > 1:
                found.append(Lesson(member, distance, WINNERS_WEIGHT if member.best_of else 1.0))
    return found


def augmented(known: Sequence[Lesson], seed: int = 0) -> list[Lesson]:
    """Each lesson as it is, without its program, and RESIZED times as one of an unnamed kernel at another size."""
    random = np.random.default_rng(seed)
    found = [*known, *(lesson._replace(trial=replace(lesson.trial, programs=None)) for lesson in known)]
    for lesson in [*known] * RESIZED:
        factor = 2.0 ** random.integers(-1, 2)
        noisy = max(0.0, lesson.distance + NOISE * random.standard_normal())
        found.append(Lesson(_resized(lesson.trial, factor), noisy, lesson.weight / 2))
    return found


def _resized(trial: Trial, factor: float) -> Trial:
    """The trial as of an unnamed kernel with ``factor`` times the work."""
    parts = [part.split("=", 1) for part in trial.problem.split()]
    sized = [f"{name}={int(int(value) * factor)}" if name in SIZES else f"{name}={value}" for name, value in parts]
    scaled = {
        name: None if value is None else round(value * factor)
        for name, value in vars(trial).items()
        if name in ("programs", "moved_bytes", "operations")
    }
    return replace(trial, kernel="", problem=" ".join(sized), **scaled)


@dataclass(frozen=True)
class Forest:
    """Regression trees as arrays [tree, node]: the right child, the column that decides, and its threshold.

    Nodes lie depth first, so the left child is the next one. Of a leaf the right child is 0, and the number its value.
    """

    kernels: tuple[str, ...]
    right: np.ndarray
    column: np.ndarray
    number: np.ndarray

    def matrix(self, trials: Sequence[Trial]) -> np.ndarray:
        """[trials, columns]: features and the kernel's name, one column per known kernel."""
        names = np.array([[t.kernel == kernel for kernel in self.kernels] for t in trials], np.float32)
        numbers = np.array([features(t) for t in trials], np.float32)
        return np.hstack([numbers, names.reshape(len(trials), len(self.kernels))])

    def predict(self, trials: Sequence[Trial]) -> tuple[np.ndarray, np.ndarray]:
        """Distance from the best and its uncertainty, each [trials]: mean and standard deviation over trees."""
        rows = self.matrix(trials)
        tree, row = np.arange(len(self.right))[:, None], np.arange(len(rows))[None]
        at = np.zeros((len(self.right), len(rows)), np.int64)
        while (inner := self.right[tree, at] > 0).any():
            goes_left = rows[row, self.column[tree, at]] <= self.number[tree, at]
            at = np.where(inner, np.where(goes_left, at + 1, self.right[tree, at]), at)
        votes = self.number[tree, at]
        return votes.mean(0), votes.std(0)

    def save(self, file: Path) -> None:
        """Write the arrays."""
        partial = file.with_name(f"{file.name}.partial")
        with partial.open("wb") as stream:
            np.savez_compressed(stream, **{**vars(self), "kernels": np.array(self.kernels, dtype=str)})
        partial.replace(file)

    @staticmethod
    def load(file: Path) -> "Forest":
        """Read what ``save`` wrote; ConfigError for anything else."""
        try:
            with np.load(file) as arrays:
                named: dict[str, Any] = {name: arrays[name] for name in Forest.__dataclass_fields__}
        except (ValueError, KeyError, OSError, EOFError) as error:
            if isinstance(error, FileNotFoundError):
                raise
            raise ConfigError(
                f"{file}: no model of trials ({error}); make it anew with `scalefold tune --fit`"
            ) from None
        return Forest(**{**named, "kernels": tuple(str(name) for name in named["kernels"])})


def fit(known: Sequence[Lesson], seed: int = 0) -> Forest | None:
    """A forest over lessons, None if there are none. Raises ConfigError naming the extra without scikit-learn."""
    if not known:
        return None
    try:
        from sklearn.ensemble import ExtraTreesRegressor
    except ImportError as error:
        raise ConfigError(f"tune: {error}; install it with pip install 'scalefold[tune]'") from None
    kernels = tuple(sorted({lesson.trial.kernel for lesson in known} - {""}))
    empty = np.zeros((0, 0))
    rows = Forest(kernels, empty, empty, empty).matrix([lesson.trial for lesson in known])
    trees = ExtraTreesRegressor(
        TREES,
        min_samples_leaf=LEAST_LEAF,
        max_features=SHARE_OF_FEATURES,
        random_state=seed,
        bootstrap=True,
        n_jobs=processors(),
    )
    trees.fit(rows, [lesson.distance for lesson in known], sample_weight=[lesson.weight for lesson in known])
    grown = [_arrays_of(estimator.tree_) for estimator in trees.estimators_]
    nodes = max(len(right) for right, *_ in grown)
    padded = (
        np.stack([np.pad(own, (0, nodes - len(own))) for own in of_trees]) for of_trees in zip(*grown, strict=True)
    )
    types = (np.uint32, np.uint16, np.float32)
    return Forest(kernels, *(array.astype(kind) for array, kind in zip(padded, types, strict=True)))


def _arrays_of(tree: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of one tree of scikit-learn what ``Forest`` has of it, [nodes] each."""
    inner = tree.children_left >= 0
    assert (tree.children_left[inner] == np.flatnonzero(inner) + 1).all(), "nodes do not lie depth first"
    numbers = np.where(inner, tree.threshold, tree.value[:, 0, 0])
    return tree.children_right * inner, tree.feature * inner, numbers
