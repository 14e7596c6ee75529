"""Methods that ``tuning_replay.py`` compares: in which order each would try the candidates of a recorded sweep."""

import functools
import math
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from scalefold.kernels import tuning
from scalefold.tune.candidates import CANDIDATES, space
from scalefold.tune.model import Forest, augmented, fit, lessons
from scalefold.tune.search import FADES_OVER, Prior, Search, places_of
from scalefold.tune.sweep import MOST_SPILL_BYTES, listed_of, prior_of
from scalefold.tune.trials import Trial, config_text, parse_config

CAPABILITY = 90
OURS = "ours"
ABLATED = ("ours, no transfer", "ours, no augmentation", "ours, no assistant", "history that does not fade")
STALE = 5  # proposals of TPE in a row that are known or have no program, before it gets the next in any order


@dataclass(frozen=True)
class Recorded:
    """One sweep: its sound trials, one per candidate, in the order of today."""

    rows: tuple[Trial, ...]

    @property
    def us(self) -> np.ndarray:
        return np.array([row.us for row in self.rows])

    @property
    def name(self) -> str:
        return f"{self.rows[0].kernel} {self.rows[0].problem}"


def merged(rows: Sequence[Trial]) -> list[Trial]:
    """One trial per candidate: the mean of its times; none if it was ever unsound."""
    by_config: dict[str, list[Trial]] = {}
    for row in rows:
        by_config.setdefault(row.config, []).append(row)
    sound = [members for members in by_config.values() if all(member.is_sound for member in members)]
    return [replace(members[0], us=statistics.fmean(member.us or 0.0 for member in members)) for members in sound]


def fields_of(trial: Trial) -> dict[str, int | str]:
    """The fields of a problem's key."""
    pairs = [part.split("=", 1) for part in trial.problem.split()]
    return {name: int(value) if value.isdigit() else value for name, value in pairs}


def width_of(fields: tuning.Fields) -> dict[str, int | str]:
    """The fields that are no sizes."""
    return {name: value for name, value in fields.items() if name not in tuning.SIZES}


def same_width(trial: Trial, other: Trial) -> bool:
    """Whether two trials are of one kernel at problems that differ in sizes only."""
    return trial.kernel == other.kernel and width_of(fields_of(trial)) == width_of(fields_of(other))


def recorded(rows: Sequence[Trial]) -> Recorded:
    """A sweep in the order of today, as far as its candidates have sound times."""
    kept = merged(rows)
    fields = fields_of(kept[0])
    default = tuning._defaults[kept[0].kernel](fields, CAPABILITY)
    wanted = [default, *CANDIDATES[kept[0].kernel](fields), *space(kept[0].kernel, fields)]
    places = {row.config: n for n, row in enumerate(kept)}
    known = [places[text] for text in dict.fromkeys(map(config_text, wanted)) if text in places]
    return Recorded(tuple(kept[n] for n in (*known, *(n for n in range(len(kept)) if n not in known))))


def left(history: Sequence[Trial], out: Trial, new_kernel: bool) -> list[Trial]:
    """History without all problems of this one's width, or without its kernel."""
    return [t for t in history if not (t.kernel == out.kernel if new_kernel else same_width(t, out))]


def random_order(sweep: Recorded, seed: int) -> Iterator[int]:
    """Any order."""
    yield from np.random.default_rng(seed).permutation(len(sweep.rows)).tolist()


def today_order(sweep: Recorded, seed: int) -> Iterator[int]:
    """The order of the sweeps before."""
    yield from range(len(sweep.rows))


def tpe_order(sweep: Recorded, seed: int) -> Iterator[int]:
    """Optuna's tree-structured Parzen estimator over all launch parameters together, from nothing."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    configs = [parse_config(row.config) for row in sweep.rows]
    names = sorted({name for config in configs for name in config})
    values = {name: sorted({config.get(name, 0) for config in configs}) for name in names}
    places = {tuple(config.get(name, 0) for name in names): n for n, config in enumerate(configs)}
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed, multivariate=True))
    choices: dict[str, Any] = {name: optuna.distributions.CategoricalDistribution(values[name]) for name in names}
    rest = np.random.default_rng(seed).permutation(len(configs)).tolist()
    stale = 0
    while rest:
        if stale == STALE:
            study.enqueue_trial({name: configs[rest[0]].get(name, 0) for name in names})
        asked = study.ask(choices)
        place = places.get(tuple(asked.params[name] for name in names))
        stale += 1
        if place is None:
            study.tell(asked, state=optuna.trial.TrialState.FAIL)
            continue
        if place in rest:
            stale = 0
            rest.remove(place)
            yield place
            study.tell(asked, float(np.log(sweep.us[place])))
        else:
            study.tell(asked, state=optuna.trial.TrialState.FAIL)  # known: it would only count twice


def search_order(
    sweep: Recorded, seed: int, prior: Prior, fades_over: float = FADES_OVER, present_first: bool = False
) -> Iterator[int]:
    """The package's search; what it never proposes because it spills comes last."""
    places = places_of([parse_config(row.config) for row in sweep.rows])
    search = Search(places, prior, np.random.default_rng(seed), fades_over)
    spilling = [n for n, row in enumerate(sweep.rows) if n and (row.spill_bytes or 0) > MOST_SPILL_BYTES]
    for n in spilling:
        search.drop(n)
    candidate = 0 if present_first else search.propose()
    while candidate is not None:
        yield candidate
        search.tell(candidate, float(sweep.us[candidate]))
        candidate = search.propose()
    yield from spilling


def _prior(forest: Forest | None, sweep: Recorded) -> Prior:
    first = sweep.rows[0]
    return prior_of(forest, sweep.rows, listed_of(first.kernel, fields_of(first), first.config))


Order = Callable[..., Iterator[int]]  # of a sweep and a seed


def orders(sweep: Recorded, history: Sequence[Trial]) -> dict[str, Order]:
    """Ours, and what it is without each of its ideas; the last trusts history to the end."""
    known = lessons(history)
    prior, plain = (_prior(fit(chosen), sweep) for chosen in (augmented(known), known))
    flat = Prior.flat(len(sweep.rows))
    return {
        OURS: functools.partial(search_order, prior=prior),
        ABLATED[0]: functools.partial(search_order, prior=flat),
        ABLATED[1]: functools.partial(search_order, prior=plain),
        ABLATED[2]: functools.partial(search_order, prior=prior, present_first=True),
        ABLATED[3]: functools.partial(search_order, prior=prior, fades_over=math.inf),
    }
