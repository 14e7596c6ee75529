"""How many trials does a search need to come within two hundredths of the best? Replayed over recorded sweeps.

    python benchmarks/measure/tuning_replay.py      # 200 seeds; tables and figure; needs scikit-learn and optuna
    python benchmarks/measure/tuning_replay.py --seeds 20 --out /tmp/replay

``tuning_sweeps.py`` has timed every candidate of some problems: of a ``development`` set, on which the constants of the
search were chosen, and of a ``held-out`` set, recorded when these were fixed. Each is searched anew with its record as
the device, by a search that has seen the older tables and the development set but for this problem's width, whatever
its size ("new shape"), or but for its kernel ("new kernel"); held-out sweeps are never part of what is known:

random: any order. today: the order of the sweeps before there was a history: the default in the kernel's code, its
list of candidates, the rest of the grid. TPE: Optuna's, from nothing. ours: the search of ``scalefold tune``, which
times the present choice, that default, first; then it without each of its three ideas, and with an assistant that does
not fade.

All draw from what compiles, fits and does not race; ours also leaves out what spills. A trial that a sampler repeats,
or that has no program, costs it nothing. Intervals: 95 %, of the bootstrap over sweeps and seeds.

Writes ``tuning_replay.csv`` (trials and ratios), ``tuning_spills.csv`` (what each sweep holds, what spilling is
worth) and the figure ``tuning_replay.svg``.
"""

import argparse
import functools
import importlib.util
import multiprocessing
import statistics
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from common import FOLDER, ROOT, append_rows, print_table
from scalefold.kernels import triton_ops, tuning
from scalefold.tune import trials
from scalefold.tune.candidates import CANDIDATES, space
from scalefold.tune.model import Forest, augmented, fit, lessons
from scalefold.tune.programs import processors
from scalefold.tune.search import Prior, Search, places_of
from scalefold.tune.sweep import MOST_SPILL_BYTES
from scalefold.tune.trials import Trial, config_text, parse_config

WITHIN = 1.02
CAPABILITY = 90
OURS = "ours"
ABLATED = ("ours, no transfer", "ours, no augmentation", "ours, no assistant", "assistant that does not fade")
RESAMPLES = 2000
SCENARIOS = ("new shape", "new kernel")
SETS = {"development": "tuning_sweeps.csv", "held-out": "tuning_held_out.csv"}
SHOWN = 40  # trials in the figure
STALE = 5  # proposals of TPE in a row that are known or have no program, before it gets the next in any order
Place = tuple[str, str]  # a set of sweeps and a scenario


@dataclass(frozen=True)
class Recorded:
    """One sweep: its sound trials, one per candidate, and the order of today."""

    rows: tuple[Trial, ...]
    order: tuple[int, ...]

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


def same_width(trial: Trial, other: Trial) -> bool:
    """Whether two trials are of one kernel at problems that differ in sizes only."""
    kinds = [{name: v for name, v in fields_of(t).items() if name not in tuning.SIZES} for t in (trial, other)]
    return trial.kernel == other.kernel and kinds[0] == kinds[1]


def recorded(rows: Sequence[Trial]) -> Recorded:
    """A sweep in the order of today, as far as its candidates have sound times."""
    kept = merged(rows)
    fields = fields_of(kept[0])
    default = tuning._defaults[kept[0].kernel](fields, CAPABILITY)
    wanted = [default, *CANDIDATES[kept[0].kernel](fields), *space(kept[0].kernel, fields)]
    places = {row.config: n for n, row in enumerate(kept)}
    known = [places[text] for text in dict.fromkeys(map(config_text, wanted)) if text in places]
    return Recorded(tuple(kept), (*known, *(n for n in range(len(kept)) if n not in known)))


def left(history: Sequence[Trial], out: Trial, new_kernel: bool) -> list[Trial]:
    """History without all problems of this one's width, or without its kernel."""
    return [t for t in history if not (t.kernel == out.kernel if new_kernel else same_width(t, out))]


def random_order(sweep: Recorded, seed: int) -> Iterator[int]:
    """Any order."""
    yield from np.random.default_rng(seed).permutation(len(sweep.rows)).tolist()


def today_order(sweep: Recorded, seed: int) -> Iterator[int]:
    """The order of the sweeps before."""
    yield from sweep.order


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
    choices = {name: optuna.distributions.CategoricalDistribution(values[name]) for name in names}
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
    sweep: Recorded, seed: int, prior: Prior, advised: bool = True, assisted: bool = True
) -> Iterator[int]:
    """The package's search; what it never proposes because it spills comes last."""
    places = places_of([parse_config(row.config) for row in sweep.rows])
    search = Search(places, prior, np.random.default_rng(seed), advised, assisted)
    spills = [(row.spill_bytes or 0) > MOST_SPILL_BYTES for row in sweep.rows]
    spilling = [n for n, spilled in enumerate(spills) if spilled and n != sweep.order[0]]
    for n in spilling:
        search.drop(n)
    candidate: int | None = sweep.order[0]
    while candidate is not None:
        yield candidate
        search.tell(candidate, float(sweep.us[candidate]))
        candidate = search.propose()
    yield from spilling


def priors(sweep: Recorded, history: Sequence[Trial]) -> dict[str, Prior]:
    """What each variant of ours believes at the beginning."""
    known = lessons(history)
    flat = Prior.flat(len(sweep.rows))
    advised, plain = (_prior(fit(chosen), sweep) for chosen in (augmented(known), known))
    return {OURS: advised, ABLATED[0]: flat, ABLATED[1]: plain, ABLATED[2]: advised}


def _prior(forest: Forest | None, sweep: Recorded) -> Prior:
    return Prior.flat(len(sweep.rows)) if forest is None else Prior(*forest.predict(sweep.rows))


Order = Callable[..., Iterator[int]]  # of a sweep and a seed


def orders(sweep: Recorded, history: Sequence[Trial]) -> dict[str, Order]:
    """Every method that asks history, by name."""
    believed = priors(sweep, history)
    found: dict[str, Order] = {}
    for name in (OURS, *ABLATED[:3]):
        advised, assisted = name != ABLATED[0], name != ABLATED[2]
        found[name] = functools.partial(search_order, prior=believed[name], advised=advised, assisted=assisted)
    found[ABLATED[3]] = functools.partial(prior_order, prior=believed[OURS])
    return found


def prior_order(sweep: Recorded, seed: int, prior: Prior) -> Iterator[int]:
    """The present choice, then what history likes, whatever trials say."""
    first = sweep.order[0]
    yield first
    yield from (n for n in prior.mean.argsort(kind="stable").tolist() if n != first)


def curve(sweep: Recorded, order: Iterator[int]) -> np.ndarray:
    """Best time after each trial over the best of all, until it is within WITHIN; [trials]."""
    least, best, found = float(sweep.us.min()), np.inf, []
    for candidate in order:
        best = min(best, float(sweep.us[candidate]))
        found.append(best / least)
        if best <= WITHIN * least:
            break
    return np.array(found)


def ratios(ours: list[list[int]], other: list[list[int]], seed: int = 0) -> dict[str, str]:
    """Trials of ours over another method's, of the medians over seeds: the median over sweeps, and of the sums."""
    random = np.random.default_rng(seed)

    def ratio(chosen: Sequence[int], draw: bool) -> tuple[float, float]:
        def middle(values: list[int]) -> float:
            return float(np.median(random.choice(values, len(values)) if draw else values))

        pairs = np.array([(middle(ours[n]), middle(other[n])) for n in chosen])
        return float(np.median(pairs[:, 0] / pairs[:, 1])), float(pairs[:, 0].sum() / pairs[:, 1].sum())

    drawn = [ratio(random.integers(0, len(ours), len(ours)).tolist(), True) for _ in range(RESAMPLES)]
    found = {}
    for n, name in enumerate(("median_ratio", "ratio_of_sums")):
        low, high = np.quantile([values[n] for values in drawn], (0.025, 0.975))
        found |= {name: f"{ratio(range(len(ours)), False)[n]:.2f}", f"{name}_95": f"{low:.2f} to {high:.2f}"}
    return found


Curves = dict[str, list[list[np.ndarray]]]  # by method: of each sweep, of each seed


@dataclass(frozen=True)
class Task:
    """What one process replays: a sweep by methods without a history ("" as scenario), or by those with one."""

    sweep: Recorded
    scenario: str
    known: tuple[Trial, ...]
    seeds: int

    @property
    def methods(self) -> dict[str, Order]:
        """Every method of the scenario."""
        if not self.scenario:
            return {"random": random_order, "today": today_order, "TPE": tpe_order}
        return orders(self.sweep, left(self.known, self.sweep.rows[0], self.scenario == "new kernel"))


def replay(task: Task) -> dict[str, list[np.ndarray]]:
    """Curves of every method, one per seed."""
    found = {name: curves_of(task.sweep, name, order, task.seeds) for name, order in task.methods.items()}
    counts = ", ".join(f"{name} {np.median([len(c) for c in curves]):g}" for name, curves in found.items())
    print(f"{task.sweep.name}, {task.scenario or 'from nothing'}: {counts}", flush=True)
    return found


def curves_of(sweep: Recorded, name: str, order: Order, seeds: int) -> list[np.ndarray]:
    """One curve per seed; sweeps do not share their luck."""
    start, count = zlib.crc32(sweep.name.encode()), 1 if name in ("today", ABLATED[3]) else seeds
    return [curve(sweep, order(sweep, start + seed)) for seed in range(count)]


def replay_all(
    sets: dict[str, list[Recorded]], known: Sequence[Trial], seeds: int, workers: int
) -> dict[Place, Curves]:
    """Curves of every set in both scenarios."""
    scenarios = ("", *SCENARIOS)
    tasks = {
        (name, s, n): Task(sweep, s, tuple(known), seeds)
        for s in scenarios
        for name, sweeps in sets.items()
        for n, sweep in enumerate(sweeps)
    }
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context) as pool:
        done = dict(zip(tasks, pool.map(replay, tasks.values()), strict=True))
    found: dict[Place, Curves] = {}
    for name, sweeps in sets.items():
        for scenario in SCENARIOS:
            per_sweep = [done[name, "", n] | done[name, scenario, n] for n in range(len(sweeps))]
            found[name, scenario] = {method: [curves[method] for curves in per_sweep] for method in per_sweep[0]}
    return found


def table(place: Place, found: Curves, names: Sequence[str]) -> list[dict[str, object]]:
    """A row per sweep and method, then one of all sweeps with ours over the method and its interval."""
    counts = {name: [[len(c) for c in curves] for curves in per_sweep] for name, per_sweep in found.items()}
    rows: list[dict[str, object]] = []
    for name, per_sweep in counts.items():
        medians = [float(np.median(values)) for values in per_sweep]
        for sweep, values, middle in zip(names, per_sweep, medians, strict=True):
            low, high = np.quantile(values, (0.1, 0.9))
            rows.append(_row(place, sweep, name, f"{middle:g}", f"{low:g} to {high:g}", {}))
        over = {} if name == OURS else ratios(counts[OURS], per_sweep)
        rows.append(_row(place, "all", name, f"{np.median(medians):g}", f"sum {sum(medians):g}", over))
    return rows


RATIOS = ("median_ratio", "median_ratio_95", "ratio_of_sums", "ratio_of_sums_95")


def _row(place: Place, sweep: str, name: str, middle: str, spread: str, over: dict[str, str]) -> dict[str, object]:
    first = {"set": place[0], "scenario": place[1], "sweep": sweep}
    first |= {"method": name, "median_trials": middle, "p10_to_p90": spread}
    return {**first, **{column: over.get(column, "") for column in RATIOS}}


def spill_row(name: str, rows: Sequence[Trial]) -> dict[str, object]:
    """What a sweep holds, and how much slower its fastest candidate is that does not spill."""
    sound = sorted(merged(rows), key=lambda row: row.us or 0.0)
    dry = [row for row in sound if not row.spill_bytes]
    allowed = [row for row in sound if (row.spill_bytes or 0) <= MOST_SPILL_BYTES]
    best = sound[0].us or 1.0
    return {
        "set": name,
        "sweep": f"{rows[0].kernel} {rows[0].problem}",
        "operation": rows[0].operation,
        "dap": rows[0].dap,
        "candidates": len({row.config for row in rows}),
        "sound": len(sound),
        "differing": sum(row.bits == "differ" for row in rows),
        "best_us": best,
        "median_us": statistics.median(row.us or 0.0 for row in sound),
        "best_spills_bytes": sound[0].spill_bytes or 0,
        "without_spills_over_best": f"{(dry[0].us or 0.0) / best:.3f}" if dry else "",
        "allowed_spills_over_best": f"{(allowed[0].us or 0.0) / best:.3f}" if allowed else "",
        "best": sound[0].config,
    }


def draw(found: dict[Place, Curves], file: Path) -> None:
    """Mean over sweeps and seeds of the best time over the best of all, by trials; one panel per set and scenario."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = len(found) // len(SCENARIOS)
    figure, panels = pyplot.subplots(
        lines, len(SCENARIOS), figsize=(9.6, 3.6 * lines), layout="constrained", sharey=True, squeeze=False
    )
    for axes, ((name, scenario), methods) in zip(panels.flat, found.items(), strict=True):
        for method in ("random", "today", "TPE", ABLATED[0], OURS):
            curves = [np.concatenate([c, np.full(SHOWN, c[-1])])[:SHOWN] for sweep in methods[method] for c in sweep]
            mean = 100 * (np.mean(curves, 0) - 1)
            axes.step(range(1, SHOWN + 1), mean, where="post", label=method, linewidth=2.2 if method == OURS else 1.2)
        axes.set_title(f"{name} sweeps, {scenario}")
        axes.set_xlabel("trials")
        axes.set_ylabel("best so far above the best of all, % (mean)")
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
        axes.label_outer()
    panels.flat[-1].legend()
    with matplotlib.rc_context({"svg.hashsalt": "tuning"}):
        figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


def read_sets(folder: Path) -> dict[str, list[list[Trial]]]:
    """Rows of each sweep of each set that is recorded."""
    found: dict[str, list[list[Trial]]] = {}
    for name, file in SETS.items():
        by_problem: dict[tuple[str, str], list[Trial]] = {}
        for row in trials.read(folder / file) if (folder / file).exists() else []:
            by_problem.setdefault(row.key, []).append(row)
        if by_problem:
            found[name] = list(by_problem.values())
    return found


def write(file: Path, rows: list[dict[str, object]]) -> None:
    """A table, whole or not at all."""
    partial = file.with_name(f"{file.name}.partial")
    partial.unlink(missing_ok=True)
    append_rows(partial, rows)
    partial.replace(file)


def main() -> int:
    """Replay, write tables and figure; exit status 1 if ours needs more than half of the trials of today's or TPE's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweeps", type=Path, default=FOLDER, help="folder of the recorded sweeps")
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--workers", type=int, default=processors(), help="processes that replay")
    parser.add_argument("--out", type=Path, help="folder for tables and figure; default: where the repository has them")
    arguments = parser.parse_args()
    if missing := [name for name in ("optuna", "sklearn") if importlib.util.find_spec(name) is None]:
        parser.error(f"{' and '.join(missing)} cannot be imported: pip install 'scalefold[tune]' optuna")
    begin = time.monotonic()
    assert triton_ops.TRITON  # every kernel has registered its default
    rows_of = read_sets(arguments.sweeps)
    older = [trial for trial in trials.read(trials.SHIPPED) if not trial.search]  # of no recorded search
    known = [*older, *(row for rows in rows_of["development"] for row in rows)]
    sets = {name: [recorded(rows) for rows in sweeps] for name, sweeps in rows_of.items()}
    found = replay_all(sets, known, arguments.seeds, arguments.workers)
    rows = [r for place, curves in found.items() for r in table(place, curves, [s.name for s in sets[place[0]]])]
    folder = arguments.out or FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "tuning_replay.csv", rows)
    write(folder / "tuning_spills.csv", [spill_row(name, own) for name, sweeps in rows_of.items() for own in sweeps])
    draw(found, (arguments.out or ROOT / "docs" / "figures") / "tuning_replay.svg")
    totals = [row for row in rows if row["sweep"] == "all"]
    print_table(totals)
    bad = [row for row in totals if row["method"] in ("today", "TPE") and _exceeds(row)]
    for row in bad:
        print(
            f"{row['set']}, {row['scenario']}: more than half of the trials of {row['method']}, or the interval holds 1"
        )
    print(f"{arguments.seeds} seeds in {time.monotonic() - begin:.0f} s")
    return int(bool(bad))


def _exceeds(row: dict[str, object]) -> bool:
    return float(str(row["median_ratio"])) > 0.5 or float(str(row["median_ratio_95"]).split(" to ")[1]) >= 1


if __name__ == "__main__":
    sys.exit(main())
