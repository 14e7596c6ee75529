"""Time to train, simulated step by step: stragglers, loader, evaluation beside training, failures and restarts.

The simulated run is the benchmark's: cycles of ``cycle_iters`` steps, each followed by an evaluation of its weights,
until the evaluation of cycle ``num_cycles`` meets the target. All seconds of the result are accounted for: the parts
add up to the total.
"""

from dataclasses import dataclass, field, replace

import numpy as np

from scalefold.errors import ConfigError

MAX_FAILURES = 10000


@dataclass(frozen=True)
class RunTimes:
    """What a run needs per part, without noise; all in seconds.

    Evaluation is on the training ranks (``asynchronous`` False: training waits for each) or on ranks of its own. Those
    may be busy at first: from ``eval_ready_s`` they spend ``initial_eval_s`` on the untouched weights. ``queue_depth``
    is the number of weight snapshots that may wait while an evaluation runs; beyond it training waits, because every
    cycle has to be evaluated.
    """

    step_s: float
    num_cycles: int
    eval_s: float
    cycle_iters: int = 40
    start_s: float = 0.0
    first_cycle_extra_s: float = 0.0
    first_eval_s: float | None = None
    asynchronous: bool = False
    eval_ready_s: float = 0.0
    initial_eval_s: float = 0.0
    hand_over_s: float = 0.0
    queue_depth: int = 1
    num_replicas: int = 1
    ranks_per_replica: int = 1
    local_batch_size: int = 1

    def __post_init__(self) -> None:
        for name in ("num_cycles", "cycle_iters", "num_replicas", "ranks_per_replica", "local_batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"simulation: {name} {getattr(self, name)} must be at least 1")
        if self.step_s <= 0 or self.eval_s < 0 or self.queue_depth < 0:
            raise ConfigError("simulation: step_s must be positive, eval_s and queue_depth not negative")


@dataclass(frozen=True)
class Loader:
    """Workers that make samples for one replica: seconds per sample are log-normal around ``sample_s``.

    A fraction ``slow_fraction`` takes ``slow_factor`` times longer. ``in_order`` hands samples out in the order drawn
    (PT); otherwise the first ready one (PQ).
    """

    num_workers: int
    sample_s: float
    prefetch_factor: int = 4
    sample_sigma: float = 0.3
    slow_fraction: float = 0.0
    slow_factor: float = 10.0
    in_order: bool = False


@dataclass(frozen=True)
class Noise:
    """What disturbs a run. The defaults disturb nothing.

    ``straggler_sigma``: relative spread of one rank's step time; a step lasts as long as its slowest rank.
    ``hiccup_rate``: probability per rank and step of losing ``hiccup_s``. ``mtbf_rank_h``: mean hours between failures
    of one rank; each failure falls back to the last checkpoint and costs ``restart_s``.
    """

    straggler_sigma: float = 0.0
    hiccup_rate: float = 0.0
    hiccup_s: float = 0.0
    loader: Loader | None = None
    mtbf_rank_h: float = float("inf")
    checkpoint_every_steps: int = 0
    checkpoint_s: float = 0.0
    restart_s: float = 0.0


@dataclass(frozen=True)
class Simulation:
    """Outcome: total seconds, their parts, and when each cycle's result was known."""

    total_s: float
    parts: dict[str, float]
    steps: int
    num_failures: int
    evaluation_finish_s: list[float]

    @property
    def minutes(self) -> float:
        """Time to train in minutes."""
        return self.total_s / 60

    def text(self) -> str:
        """One line per part."""
        lines = [
            f"{name:<28}{seconds:>12.1f} s{100 * seconds / self.total_s:>7.1f} %"
            for name, seconds in self.parts.items()
        ]
        return "\n".join([*lines, f"{'total':<28}{self.total_s:>12.1f} s   {self.minutes:.2f} min"])


_PARTS = (
    "start",
    "steps",
    "first cycle, extra",
    "stragglers",
    "waiting for the loader",
    "hand-overs",
    "waiting for the evaluators",
    "evaluation (training waits)",
    "checkpoints",
    "failures and repeated steps",
    "tail: last evaluation",
)


@dataclass
class _State:
    """What a checkpoint keeps, and a failure falls back to."""

    now_s: float = 0.0
    step: int = 0
    parts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(_PARTS, 0.0))
    evaluations: list[float] = field(default_factory=list)

    def spend(self, part: str, seconds: float) -> None:
        self.parts[part] += seconds
        self.now_s += seconds

    def copy(self) -> "_State":
        return replace(self, parts=dict(self.parts), evaluations=list(self.evaluations))


def simulate(times: RunTimes, noise: Noise = Noise(), seed: int = 0) -> Simulation:
    """Simulate one run; the same arguments give the same result.

    Raises ConfigError for impossible arguments and for a run that failures never let finish.
    """
    return _Simulator(times, noise, np.random.default_rng(seed)).run()


def simulate_many(times: RunTimes, noise: Noise, cycles: np.ndarray | list[int], seed: int = 0) -> list[Simulation]:
    """One simulation per entry of ``cycles`` (cycles to converge of each run), with seeds ``seed, seed + 1, ...``."""
    return [simulate(replace(times, num_cycles=int(n)), noise, seed + index) for index, n in enumerate(cycles)]


def draw_cycles(mean_samples: float, sd_samples: float, samples_per_cycle: int, runs: int, seed: int = 0) -> np.ndarray:
    """Cycles to converge of ``runs`` runs, int64 [runs]: normal samples, rounded to whole evaluations, at least one."""
    samples = np.random.default_rng(seed).normal(mean_samples, sd_samples, runs)
    return np.maximum(1, np.rint(samples / samples_per_cycle)).astype(np.int64)


class _Simulator:
    """One run in progress."""

    def __init__(self, times: RunTimes, noise: Noise, rng: np.random.Generator) -> None:
        self.times, self.noise, self.rng = times, noise, rng
        self.num_ranks = times.num_replicas * times.ranks_per_replica
        self.num_failures = 0
        self.state = _State()
        self.saved = self.state.copy()
        self.loader: _LoaderState | None = None
        self.next_failure_s = self._draw_failure(0.0)

    def run(self) -> Simulation:
        self.state.spend("start", self.times.start_s)
        self._begin_loader()
        self.saved = self.state.copy()
        last_step = self.times.num_cycles * self.times.cycle_iters
        while True:
            while self.state.step < last_step:
                self._step()
            finish_s = self.state.evaluations[-1]
            if self.next_failure_s >= finish_s:
                break
            self._fail()
        self.state.spend("tail: last evaluation", finish_s - self.state.now_s)
        state = self.state
        return Simulation(state.now_s, state.parts, state.step, self.num_failures, state.evaluations)

    def _step(self) -> None:
        state, times = self.state, self.times
        if self.loader is not None:
            state.spend("waiting for the loader", self.loader.take(state.now_s))
        state.spend("steps", times.step_s)
        state.spend("stragglers", self._slowest_rank_s())
        if state.step < times.cycle_iters:
            state.spend("first cycle, extra", times.first_cycle_extra_s / times.cycle_iters)
        state.step += 1
        if state.step % times.cycle_iters == 0:
            self._evaluate()
        if self.next_failure_s < state.now_s:
            self._fail()
        elif self.noise.checkpoint_every_steps and state.step % self.noise.checkpoint_every_steps == 0:
            state.spend("checkpoints", self.noise.checkpoint_s)
            self.saved = state.copy()

    def _slowest_rank_s(self) -> float:
        """Seconds beyond the mean step that the slowest rank takes."""
        noise, extra = self.noise, 0.0
        if noise.straggler_sigma > 0:
            sigma = noise.straggler_sigma
            slowest = np.exp(sigma * self.rng.standard_normal(self.num_ranks).max() - sigma**2 / 2)
            extra = self.times.step_s * float(slowest - 1)
        if noise.hiccup_rate > 0 and self.rng.random() < 1 - (1 - noise.hiccup_rate) ** self.num_ranks:
            extra += noise.hiccup_s
        return extra

    def _evaluate(self) -> None:
        state, times = self.state, self.times
        cycle = state.step // times.cycle_iters
        first = cycle == 1 and times.first_eval_s is not None
        seconds = times.first_eval_s if first and times.first_eval_s is not None else times.eval_s
        if not times.asynchronous:
            if cycle < times.num_cycles:
                state.spend("evaluation (training waits)", seconds)
                state.evaluations.append(state.now_s)
            else:
                state.evaluations.append(state.now_s + seconds)
            return
        busy = [times.eval_ready_s + times.initial_eval_s, *state.evaluations]
        if len(busy) > times.queue_depth:
            free_s = busy[len(busy) - 1 - times.queue_depth]
            state.spend("waiting for the evaluators", max(0.0, free_s - state.now_s))
        state.spend("hand-overs", times.hand_over_s)
        state.evaluations.append(max(state.now_s, busy[-1]) + seconds)

    def _draw_failure(self, now_s: float) -> float:
        if self.noise.mtbf_rank_h == float("inf"):
            return float("inf")
        return now_s + self.rng.exponential(self.noise.mtbf_rank_h * 3600 / self.num_ranks)

    def _fail(self) -> None:
        """Fall back to the checkpoint; what was done since then becomes lost time."""
        self.num_failures += 1
        if self.num_failures > MAX_FAILURES:
            raise ConfigError(
                f"simulation: {MAX_FAILURES} failures before step {self.state.step}; the run never ends with "
                f"mtbf_rank_h {self.noise.mtbf_rank_h} and checkpoint_every_steps {self.noise.checkpoint_every_steps}"
            )
        failed_s = max(self.next_failure_s, self.saved.now_s)
        known = [t for t in self.state.evaluations if t <= failed_s]
        self.state = self.saved.copy()
        self.state.spend("failures and repeated steps", failed_s - self.state.now_s + self.noise.restart_s)
        self._restart_evaluations(known)
        self.saved = self.state.copy()
        self.next_failure_s = self._draw_failure(self.state.now_s)
        self._begin_loader()

    def _restart_evaluations(self, known: list[float]) -> None:
        """Results known before the failure stay known; the snapshots that the checkpoint holds start again."""
        free_s = self.state.now_s
        for index in range(len(self.state.evaluations)):
            if index < len(known):
                self.state.evaluations[index] = known[index]
            else:
                free_s += self.times.eval_s
                self.state.evaluations[index] = free_s

    def _begin_loader(self) -> None:
        if self.noise.loader is not None:
            self.loader = _LoaderState(self.noise.loader, self.times, self.rng, self.state.now_s)


class _LoaderState:
    """Workers and outstanding samples of all replicas; arrays are [replicas, workers] and [replicas, outstanding]."""

    def __init__(self, loader: Loader, times: RunTimes, rng: np.random.Generator, now_s: float) -> None:
        self.loader, self.rng, self.batch = loader, rng, times.local_batch_size
        self.rows = np.arange(times.num_replicas)
        self.free_s = np.full((times.num_replicas, loader.num_workers), now_s)
        outstanding = max(loader.num_workers * loader.prefetch_factor, self.batch)
        self.finish_s = np.empty((times.num_replicas, outstanding))
        self.head = 0
        for slot in range(outstanding):
            self._dispatch(np.full(len(self.rows), slot), np.full(len(self.rows), now_s))

    def take(self, now_s: float) -> float:
        """Take one local batch per replica; seconds until the slowest replica has it."""
        ready_s = now_s
        for _ in range(self.batch):
            slots = self._next_slots()
            taken_s = np.maximum(self.finish_s[self.rows, slots], now_s)
            ready_s = max(ready_s, float(taken_s.max()))
            self._dispatch(slots, taken_s)
        return ready_s - now_s

    def _next_slots(self) -> np.ndarray:
        if not self.loader.in_order:
            return self.finish_s.argmin(axis=1)
        slot, self.head = self.head, (self.head + 1) % self.finish_s.shape[1]
        return np.full(len(self.rows), slot)

    def _dispatch(self, slots: np.ndarray, asked_s: np.ndarray) -> None:
        """Give each replica's next sample, asked for at ``asked_s`` [replicas], to its worker that is free first."""
        worker = self.free_s.argmin(axis=1)
        begin_s = np.maximum(self.free_s[self.rows, worker], asked_s)
        self.free_s[self.rows, worker] = begin_s + self._durations()
        self.finish_s[self.rows, slots] = self.free_s[self.rows, worker]

    def _durations(self) -> np.ndarray:
        loader, count = self.loader, len(self.rows)
        sigma = loader.sample_sigma
        seconds = loader.sample_s * np.exp(sigma * self.rng.standard_normal(count) - sigma**2 / 2)
        slow = self.rng.random(count) < loader.slow_fraction
        return np.where(slow, loader.slow_factor * seconds, seconds)
