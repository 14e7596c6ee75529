"""The search on a device: what is compiled next, what is tried next, when it ends, and what is chosen.

Compiling and timing go on side by side, and both follow the expected gain: microseconds of a training step that a trial
may save, per second that it takes. First comes what history likes best of every problem (without one the present
choice, which is timed at the latest when a choice is made); then the problem that promises most. Each trial is a row on
the disk before the next one begins, and a search that is started again goes on from these rows. What does not compile,
does not fit, spills or races never reaches the device.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from scalefold.errors import DeviceError
from scalefold.kernels import tuning
from scalefold.kernels.tuning import Config, Fields
from scalefold.tune import trials
from scalefold.tune.candidates import CANDIDATES
from scalefold.tune.device import Outcome
from scalefold.tune.model import Forest
from scalefold.tune.programs import Problem, Program
from scalefold.tune.search import Prior, Search, places_of
from scalefold.tune.trials import Trial, config_text, parse_config

MOST_SPILL_BYTES = 512  # per thread: where fewer spill, the recorded sweeps have winners
SEARCH_REPEATS = 3  # with equal bits, for every trial
REPEATS = 20  # the same, before a candidate may be chosen
LEAST_GAIN = 0.01  # of the operation's time: less is noise
LEAST_EXPECTED = 0.005  # of the operation's time: no trial is made for less
LEAST_GAIN_PER_S = 2e-5  # of the summed operations of a step: a search that promises less ends
FINALISTS = 3
UNLISTED = 0.06  # of a candidate's time: so much more is expected where nobody wrote it down by hand
BEFORE_FIRST = 2  # programs of a problem compiled before its first trial: the present choice, what history likes best
CLOCK_S = 0.25  # a trial, until some were timed


class Tries(Protocol):
    """A device, or a record of one; ``works``: whether it will try more."""

    @property
    def works(self) -> bool: ...

    def try_out(self, problem: Problem, config: Config, repeats: int) -> Outcome: ...


class Compiles(Protocol):
    """Processes that compile, or a record of what they said."""

    slots: int

    def submit(self, problem: Problem, config: Config) -> "Future[Program]": ...


@dataclass
class Sought:
    """One problem: its candidates, the present choice first, which of them are listed, and what is known of each."""

    problem: Problem
    blanks: list[Trial]
    listed: Set[str]
    search: Search
    forest: Forest | None
    calls: int
    pending: dict[int, "Future[Program]"] = field(default_factory=dict)
    ordered: np.ndarray = field(init=False)  # [candidates], given to be compiled
    built: np.ndarray = field(init=False)  # [candidates], compiled
    _gains: np.ndarray | None = None

    def __post_init__(self) -> None:
        self.ordered, self.built = np.zeros((2, len(self.blanks)), bool)

    @property
    def ready(self) -> np.ndarray:
        """Compiled, sound as far as the program tells, and not tried."""
        return self.search.open & self.built

    @property
    def unordered(self) -> np.ndarray:
        """Neither tried nor given to be compiled."""
        return self.search.open & ~self.ordered

    @property
    def comes_first(self) -> np.ndarray:
        """Of what is not ordered, what the first trial waits for, or none; [candidates]."""
        enough = self.ordered.sum() >= BEFORE_FIRST and (self.pending or self.ready.any())
        return self.unordered & (not self.search.tried and not enough)

    @property
    def begins(self) -> bool:
        """Whether its first trial can be made."""
        return not (self.search.tried or self.pending or self.comes_first.any()) and bool(self.ready.any())

    @property
    def step_us(self) -> float:
        """Microseconds in a training step; in one call, of what belongs to evaluations; 0 until something was timed."""
        return max(1, self.calls) * self.search.best_us if self.search.tried else 0.0

    def best_gain(self, among: np.ndarray) -> float:
        """The largest expected gain in microseconds of a step; 0 if there is none, or nothing was timed."""
        if self._gains is None:
            gains = self.search.gains()
            self._gains = np.where(gains < LEAST_EXPECTED, 0.0, gains) * self.step_us
        return float(self._gains[among].max(initial=0.0))

    def compiled(self, candidate: int, program: Program) -> Trial | None:
        """Take up what compiling said; the row of a candidate that must not be tried. The present choice may spill."""
        self.built[candidate], self._gains = True, None
        self.pending.pop(candidate, None)
        figures = {name: value for name, value in vars(program).items() if name != "error"}
        spilled = candidate != 0 and program.spill_bytes > MOST_SPILL_BYTES
        error = program.error or (f"spills {program.spill_bytes} bytes per thread" if spilled else "")
        self.blanks[candidate] = replace(self.blanks[candidate], **figures, error=error)
        if error:
            self.search.drop(candidate)
            return self.blanks[candidate]
        if self.forest is not None:
            mean, spread = prior_of(self.forest, [self.blanks[candidate]], self.listed)
            self.search.prior.mean[candidate], self.search.prior.spread[candidate] = mean[0], spread[0]
        return None

    def tried(self, candidate: int, us: float | None, bits: str, error: str) -> Trial:
        """Take up a trial; its row."""
        self.search.tell(candidate, us if bits != "differ" else None)
        self._gains = None
        rounded = None if us is None else round(us, 2)
        return replace(self.blanks[candidate], us=rounded, bits=bits, error=error)

    def resume(self, rows: Iterable[Trial]) -> int:
        """Take up earlier rows of the same search; how many there were."""
        numbers = {blank.config: n for n, blank in enumerate(self.blanks)}
        count = 0
        for row in rows:
            if row.key == self.problem.key and row.config in numbers:
                self.tried(numbers[row.config], row.us if not row.error else None, row.bits, row.error)
                count += 1
        return count


def listed_of(kernel: str, fields: Fields, present: str) -> Set[str]:
    """The present choice and the kernel's list, which was made by hand."""
    return {present, *map(config_text, CANDIDATES[kernel](fields))}


def prior_of(forest: Forest | None, blanks: Sequence[Trial], listed: Set[str]) -> Prior:
    """What history, if there is one, says of candidates; of those that it hardly tells apart the listed come first."""
    if forest is None:
        return Prior.flat(len(blanks))
    mean, spread = forest.predict(blanks)
    return Prior(mean + UNLISTED * np.array([blank.config not in listed for blank in blanks]), spread)


def seek_problem(
    problem: Problem, columns: dict[str, object], configs: Sequence[Config], forest: Forest | None, seed: int = 0
) -> Sought:
    """A search over ``configs``, the present choice first, advised by ``forest`` if there is one."""
    texts = list(dict.fromkeys(map(config_text, configs)))
    mode = "alone" if forest is None else "history"
    blanks = [Trial(**columns, config=text, search=mode) for text in texts]  # type: ignore[arg-type]
    listed = listed_of(problem.kernel, problem.fields, texts[0])
    prior = prior_of(forest, blanks, listed)
    places = places_of([parse_config(text) for text in texts])
    search = Search(places, prior, np.random.default_rng(seed))
    return Sought(problem, blanks, listed, search, forest, int(str(columns["calls"])))


@dataclass
class Sweep:
    """All searches of a command, one device and the processes that compile for it."""

    soughts: list[Sought]
    device: Tries
    compiler: Compiles
    file: Path
    note: Callable[[str], None]
    clock: Callable[[], float] = time.monotonic
    trial_seconds: list[float] = field(default_factory=list)

    def run(self, deadline: float) -> str:
        """Search until the deadline, or until nothing promises enough; says which."""
        while self.clock() < deadline:
            self._take_compiled()
            self._order_compiling()
            sought = next((s for s in self.soughts if s.begins), None) or self._most_promising()
            if sought is not None:
                self._try(sought)
            elif any(s.pending for s in self.soughts):
                time.sleep(0.01)
            else:
                return "nothing promises more"
        return "the time is over"

    def _take_compiled(self) -> None:
        for sought in self.soughts:
            for candidate, future in list(sought.pending.items()):
                if future.done():
                    self._take(sought, candidate, future)

    def _take(self, sought: Sought, candidate: int, future: "Future[Program]") -> None:
        """What a worker that died was compiling is left out of this search, and is no row: others died with it."""
        error = future.exception()
        row = sought.compiled(candidate, Program(error=f"{error!r}"[:120]) if error else future.result())
        if row is not None and error is None:
            trials.append(self.file, [row])

    def _order_compiling(self) -> None:
        """Fill the queue of the processes that compile: what first trials wait for, then whatever promises most."""
        free = self.compiler.slots - sum(len(sought.pending) for sought in self.soughts)
        for _ in range(free):
            waiting = next((s for s in self.soughts if s.unordered[0]), None)
            if waiting is not None:
                self._compile(waiting, 0)
                continue
            sought = next((s for s in self.soughts if s.comes_first.any()), None)
            sought = sought or self._largest(lambda s: s.unordered)
            if sought is None:
                return
            candidate = sought.search.propose(sought.unordered)
            assert candidate is not None
            self._compile(sought, candidate)

    def _compile(self, sought: Sought, candidate: int) -> None:
        config = parse_config(sought.blanks[candidate].config)
        sought.ordered[candidate] = True
        sought.pending[candidate] = self.compiler.submit(sought.problem, config)

    def _largest(self, among: Callable[[Sought], np.ndarray]) -> Sought | None:
        """The problem with the largest expected gain among its candidates of a kind; None if that is too small."""
        gains = [sought.best_gain(among(sought)) for sought in self.soughts]
        best = max(range(len(gains)), key=gains.__getitem__)
        return self.soughts[best] if gains[best] > 0 and gains[best] >= self._least() else None

    def _least(self) -> float:
        """Microseconds of a step that a trial must promise: what it takes in seconds, times the summed operations."""
        recent = self.trial_seconds[-20:]
        seconds = sum(recent) / len(recent) if recent else CLOCK_S
        return LEAST_GAIN_PER_S * seconds * sum(sought.step_us for sought in self.soughts)

    def _most_promising(self) -> Sought | None:
        return self._largest(lambda sought: sought.ready)

    def _try(self, sought: Sought) -> None:
        candidate = sought.search.propose(sought.ready)
        assert candidate is not None
        begin = self.clock()
        config = parse_config(sought.blanks[candidate].config)
        outcome = self.device.try_out(sought.problem, config, SEARCH_REPEATS)
        row = self._keep(sought, candidate, outcome)
        self.trial_seconds.append(self.clock() - begin)
        self.note(f"{row.kernel} {row.problem}: {row.us} us {row.config} {row.error}")

    def _keep(self, sought: Sought, candidate: int, outcome: Outcome) -> Trial:
        """The row of a trial, on the disk; DeviceError if it was the last one that this process can make."""
        row = sought.tried(candidate, *outcome)
        trials.append(self.file, [row])
        if row.error and not self.device.works:
            raise DeviceError(
                f"tune: {row.kernel} {row.problem}: the GPU fails with {row.config} ({row.error}), which is kept as a "
                f"trial that failed; the same command goes on after it"
            )
        return row

    def choose(self, deadline: float) -> Iterator[dict[str, object]]:
        """Settle every problem that was searched, the largest gains first, and save its choice; a row each."""
        for sought in sorted(self.soughts, key=lambda s: -_hoped(s)):
            if sought.search.tried.keys() - {0} and self.clock() < deadline:
                config, times = self._settle(sought)
                if config is not None:
                    tuning.save(tuning.device_kind(), {sought.problem.kernel: {sought.problem.key[1]: config}})
                    yield _table_row(sought, config, times)

    def _settle(self, sought: Sought) -> tuple[Config | None, tuple[float, float]]:
        """The choice, and the times of the present one and of it: finalists are run again, with all repeats."""
        tried = sought.search.tried
        finalists = [
            n
            for n in sorted(tried, key=tried.__getitem__)
            if n and tried[n] < (1 - LEAST_GAIN) * tried.get(0, math.inf)
        ]
        if not finalists and 0 in tried:
            return parse_config(sought.blanks[0].config), (tried[0], tried[0])
        baseline = self._again(sought, 0) if 0 in tried or sought.search.open[0] else None
        for candidate in finalists[:FINALISTS]:
            us = self._again(sought, candidate)
            if us is not None and us < (1 - LEAST_GAIN) * (baseline or math.inf):
                return parse_config(sought.blanks[candidate].config), (baseline or us, us)
        if baseline is None:
            self.note(
                f"{sought.problem.kernel} {sought.problem.key[1]}: NO candidate is sound, the present choice stays"
            )
            return None, (math.nan, math.nan)
        return parse_config(sought.blanks[0].config), (baseline, baseline)

    def _again(self, sought: Sought, candidate: int) -> float | None:
        """Time with all repeats; what differs is a row that says so."""
        config = parse_config(sought.blanks[candidate].config)
        outcome = self.device.try_out(sought.problem, config, REPEATS)
        if outcome.us is None or outcome.bits == "differ":
            self._keep(sought, candidate, outcome)
            self.note(f"{sought.problem.kernel}: {config} is dropped: {outcome.error or 'its bits differ'}")
            return None
        return outcome.us


def _hoped(sought: Sought) -> float:
    """Microseconds of a step that the trials so far promise, by what is believed of a present choice without a time."""
    best, tried = sought.search.best_us, sought.search.tried
    if not tried:
        return 0.0
    return max(1, sought.calls) * (tried.get(0, math.exp(sought.search.believed()[0][0])) - best)


def _table_row(sought: Sought, config: Config, times: tuple[float, float]) -> dict[str, object]:
    return {
        "kernel": sought.problem.kernel,
        "problem": sought.problem.key[1],
        "operation": sought.blanks[0].operation,
        "timed": "forward+backward" if sought.problem.backward else "forward",
        "default_us": round(times[0], 1),
        "best_us": round(times[1], 1),
        "candidates": len(sought.search.tried),
        "config": config,
    }
