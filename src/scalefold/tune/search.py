"""Which candidate to try next: what history proposes, corrected by the trials of this search as they come.

The time of a candidate is a priori what the model of history says (``Prior``), up to a factor of the problem. A
Gaussian process over the launch parameters learns from this search's own trials how the truth departs from that, and
history fades: its weight falls as own trials grow. What is believed to be fastest is tried next, so that history alone
proposes the first trial; a share goes to what nobody proposed. All of this is plain arithmetic on a few hundred
candidates; nothing here knows a device.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

EXPLORED = 0.1  # share of trials after the first that are drawn among all candidates
FADES_OVER = 8.0  # own trials after which history counts half
NOISE = 0.02  # of a time, relative
UNDERSTATED = 2.0  # true errors over believed ones in the recorded sweeps, after any number of trials
LEAST_SPREAD = 0.02  # of times, relative: what is assumed until trials say more
ASSUMED = 0.5  # trials that an assumed spread counts for
UNKNOWN_SPREAD = 0.1  # the same without any history


class Prior(NamedTuple):
    """What history says of each candidate: log of time over the best one's, and its standard deviation; [n] each."""

    mean: np.ndarray
    spread: np.ndarray

    @staticmethod
    def flat(count: int) -> "Prior":
        """No history."""
        return Prior(np.zeros(count), np.full(count, UNKNOWN_SPREAD))


@dataclass
class Search:
    """The candidates of one problem and what was found of them.

    Attributes:
        places: [candidates, parameters], launch parameters as coordinates; of equals the first comes first.
        fades_over: own trials after which history counts half.
        open: [candidates], which may be proposed: neither tried nor known not to run.
        tried: candidate -> microseconds.
    """

    places: np.ndarray
    prior: Prior
    random: np.random.Generator
    fades_over: float = FADES_OVER
    open: np.ndarray = field(init=False)
    tried: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.open = np.ones(len(self.places), bool)
        spread = self.places.std(0)
        scaled = (self.places - self.places.mean(0))[:, spread > 0] / spread[spread > 0]
        squares = ((scaled[:, None] - scaled[None]) ** 2).sum(-1)
        self._likeness = np.exp(-squares / max(1.0, scaled.shape[1]))

    @property
    def weight(self) -> float:
        """How much history still counts."""
        return 1 / (1 + len(self.tried) / self.fades_over)

    @property
    def best_us(self) -> float:
        """The fastest so far."""
        return min(self.tried.values(), default=math.inf)

    def drop(self, candidate: int) -> None:
        """It does not compile, does not fit, spills or races."""
        self.open[candidate] = False

    def tell(self, candidate: int, us: float | None) -> None:
        """The result of a trial; None: it failed, or its bits differed."""
        self.open[candidate] = False
        self.tried.pop(candidate, None)
        if us is not None:
            self.tried[candidate] = us

    def believed(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of log microseconds of every candidate, [candidates] each.

        Trials say how far history is off altogether, the trees of its model where it is less sure than elsewhere.
        """
        prior = self.weight * self.prior.mean
        doubt = np.maximum(self.prior.spread, LEAST_SPREAD)
        if not self.tried:
            return prior, doubt
        seen = np.array(list(self.tried))
        residual = np.log([self.tried[n] for n in seen]) - prior[seen]
        level, assumed = residual.mean(), ASSUMED * doubt.mean() ** 2
        errors = (UNDERSTATED * (residual - level)) ** 2
        scale = np.sqrt((errors.sum() + assumed) / (len(seen) + ASSUMED)) * doubt / doubt.mean()
        likeness = np.outer(scale, scale) * self._likeness
        inner = likeness[np.ix_(seen, seen)] + NOISE**2 * np.eye(len(seen))
        solved = np.linalg.solve(inner, np.column_stack([residual - level, likeness[seen]]))
        mean = prior + level + likeness[:, seen] @ solved[:, 0]
        left = scale**2 - (likeness[seen] * solved[:, 1:]).sum(0)
        return mean, np.sqrt(np.maximum(left, 1e-8))

    def gains(self) -> np.ndarray:
        """Expected improvement on the fastest so far, as a share of its time; [candidates], 0 for what is not open."""
        mean, spread = self.believed()
        best = math.log(self.best_us) if self.tried else float(mean.min() + spread[mean.argmin()])
        better = (best - mean) / spread
        expected = spread * (better * _below(better) + np.exp(-(better**2) / 2) / math.sqrt(2 * math.pi))
        return np.where(self.open, expected, 0.0)

    def propose(self, ready: np.ndarray | None = None) -> int | None:
        """The next candidate, of those that are ready ([candidates], default: all); None if none is left."""
        allowed = np.flatnonzero(self.open if ready is None else self.open & ready)
        if not len(allowed):
            return None
        if self.tried and self.random.random() < EXPLORED:
            return int(self.random.choice(allowed))
        return int(allowed[self.believed()[0][allowed].argmin()])


def _below(x: np.ndarray) -> np.ndarray:
    """Of a standard normal number."""
    return np.array([0.5 * (1 + math.erf(value / math.sqrt(2))) for value in x])


def places_of(configs: Sequence[dict[str, int]]) -> np.ndarray:
    """Launch parameters as coordinates: logarithms, 0 where a candidate has none of that name."""
    names = sorted({name for config in configs for name in config})
    return np.array([[math.log2(1 + config.get(name, 0)) for name in names] for config in configs])
