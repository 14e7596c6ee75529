"""How many trials does a search need to come within two hundredths of the best? Replayed over recorded sweeps.

    python benchmarks/measure/tuning_replay.py      # 200 seeds; tables and figure; needs scikit-learn and optuna
    python benchmarks/measure/tuning_replay.py --seeds 20 --out /tmp/replay

``tuning_sweeps.py`` has timed every candidate of some problems: of a ``development`` and a ``held-out`` set and a
``first draw``, on which the search was chosen, and of a ``new`` one, drawn and recorded when it was fixed. Each is
searched anew with its record as the device, by a search that has seen the shipped history but for this problem's width,
whatever its size ("new shape"), or but for its kernel ("new kernel"); new sweeps are never part of what is known:

random: any order. today: the order of the sweeps before there was a history: the default in the kernel's code, its
list of candidates, the rest of the grid. TPE: Optuna's, from nothing. ours: the search of ``scalefold tune``; then it
without each of its three ideas, and with a history that does not fade.

Drawn sweeps of which more than FLAT of the candidates are within two hundredths of the best are a set of their own
(``new, flat``): any order finds one there at once. The others decide.

All draw from what compiles, fits and does not race; ours also leaves out what spills. A trial that a sampler repeats,
or that has no program, costs it nothing. Intervals: 95 %, of the bootstrap over sweeps and seeds.

Writes ``tuning_replay.csv`` (trials and ratios), ``tuning_spills.csv`` (what each sweep holds, what spilling is
worth) and the figure ``tuning_replay.svg``.
"""

import argparse
import hashlib
import importlib.util
import multiprocessing
import statistics
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common import FOLDER, ROOT, append_rows, print_table
from scalefold.kernels import triton_ops
from scalefold.processors import processors
from scalefold.tune import trials
from scalefold.tune.candidates import space
from scalefold.tune.sweep import MOST_SPILL_BYTES
from scalefold.tune.trials import Trial, config_text
from tuning_methods import (
    ABLATED,
    OURS,
    Order,
    Recorded,
    fields_of,
    left,
    merged,
    orders,
    random_order,
    recorded,
    today_order,
    tpe_order,
)

WITHIN = 1.02
RESAMPLES = 2000
SCENARIOS = ("new shape", "new kernel")
SETS = {
    "development": "tuning_sweeps.csv",
    "held-out": "tuning_held_out.csv",
    "first draw": "tuning_first_draw.csv",
    "new": "tuning_new.csv",
}
DRAWN = ("first draw", "new")
DECIDES = ("new", "new shape")
FLAT = 0.1
SHOWN = 40  # trials in the figure
Place = tuple[str, str]  # a set of sweeps and a scenario


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
    keep: Path | None = None

    @property
    def file(self) -> Path | None:
        """Where its curves are kept: the name holds a digest of all that goes into them but code."""
        text = repr((self.sweep, self.scenario, self.known if self.scenario else (), self.seeds))
        return None if self.keep is None else self.keep / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.npz"

    @property
    def methods(self) -> dict[str, Order]:
        """Every method of the scenario."""
        if not self.scenario:
            return {"random": random_order, "today": today_order, "TPE": tpe_order}
        return orders(self.sweep, left(self.known, self.sweep.rows[0], self.scenario == "new kernel"))


def replay(task: Task) -> dict[str, list[np.ndarray]]:
    """Curves of every method, one per seed; those that are kept are not made again."""
    if task.file is not None and task.file.is_file():
        return load_curves(task.file)
    found = {name: curves_of(task.sweep, name, order, task.seeds) for name, order in task.methods.items()}
    counts = ", ".join(f"{name} {np.median([len(c) for c in curves]):g}" for name, curves in found.items())
    print(f"{task.sweep.name}, {task.scenario or 'from nothing'}: {counts}", flush=True)
    if task.file is not None:
        save_curves(task.file, found)
    return found


def save_curves(file: Path, found: dict[str, list[np.ndarray]]) -> None:
    """Curves of every method, one after the other, and their lengths."""
    arrays: dict[str, Any] = {name: np.concatenate(curves) for name, curves in found.items()}
    lengths: dict[str, Any] = {f"{name} lengths": np.array([len(c) for c in curves]) for name, curves in found.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial.npz")
    np.savez_compressed(partial, **arrays, **lengths)
    partial.replace(file)


def load_curves(file: Path) -> dict[str, list[np.ndarray]]:
    """What ``save_curves`` wrote."""
    with np.load(file) as arrays:
        names = [name for name in arrays if not name.endswith(" lengths")]
        ends = {name: np.cumsum(arrays[f"{name} lengths"])[:-1] for name in names}
        return {name: np.split(arrays[name], ends[name]) for name in names}


def curves_of(sweep: Recorded, name: str, order: Order, seeds: int) -> list[np.ndarray]:
    """One curve per seed; sweeps do not share their luck."""
    start, count = zlib.crc32(sweep.name.encode()), 1 if name in ("today", ABLATED[3]) else seeds
    return [curve(sweep, order(sweep, start + seed)) for seed in range(count)]


def replay_all(
    sets: dict[str, list[Recorded]], known: Sequence[Trial], seeds: int, workers: int, keep: Path | None
) -> dict[Place, Curves]:
    """Curves of every set in both scenarios; the longest tasks, those of TPE, first."""
    scenarios = ("", *SCENARIOS)
    tasks = {
        (name, s, n): Task(sweep, s, tuple(known), seeds, keep)
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
    """Rows of each complete sweep of each set that is recorded."""
    found: dict[str, list[list[Trial]]] = {}
    for name, file in SETS.items():
        by_problem: dict[tuple[str, str], list[Trial]] = {}
        for row in trials.read(folder / file) if (folder / file).exists() else []:
            by_problem.setdefault(row.key, []).append(row)
        complete = [rows for rows in map(joined, by_problem.values()) if is_complete(rows)]
        print(f"{name}: {len(complete)} sweeps, {len(by_problem) - len(complete)} that are not complete", flush=True)
        if name in DRAWN:
            found[f"{name}, flat"] = [rows for rows in complete if is_flat(rows)]
            complete = [rows for rows in complete if not is_flat(rows)]
        found[name] = complete
    return {name: sweeps for name, sweeps in found.items() if sweeps}


def is_flat(rows: Sequence[Trial]) -> bool:
    """Whether more than FLAT of the candidates that are replayed are within WITHIN of the best."""
    us = recorded(rows).us
    return float(np.mean(us <= WITHIN * us.min())) > FLAT


def joined(rows: Sequence[Trial]) -> list[Trial]:
    """The longest session of a sweep, and those whose times of the same candidates agree with it to WITHIN.

    Sessions differ in the code of the kernels, here also in the machine: what they disagree on is no one sweep.
    """
    sessions: dict[str, list[Trial]] = {}
    for row in rows:
        sessions.setdefault(row.code, []).append(row)
    first, *others = sorted(sessions.values(), key=lambda own: -len(own))
    return [*first, *(row for other in others if agree(first, other) for row in other)]


def agree(some: Sequence[Trial], others: Sequence[Trial]) -> bool:
    """Whether the median ratio of times of common candidates is within WITHIN of one; False if there are none."""
    a, b = ({row.config: row.us or 0.0 for row in merged(rows)} for rows in (some, others))
    found = [a[config] / b[config] for config in a.keys() & b.keys()]
    return bool(found) and 1 / WITHIN <= statistics.median(found) <= WITHIN


def is_complete(rows: Sequence[Trial]) -> bool:
    """Whether every candidate of the problem was tried."""
    wanted = set(map(config_text, space(rows[0].kernel, fields_of(rows[0]))))
    return wanted <= {row.config for row in rows}


def write(file: Path, rows: list[dict[str, object]]) -> None:
    """A table, whole or not at all."""
    partial = file.with_name(f"{file.name}.partial")
    partial.unlink(missing_ok=True)
    append_rows(partial, rows)
    partial.replace(file)


def main() -> int:
    """Replay, write tables and figure; exit status 1 unless ours needs half of the trials where it DECIDES."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweeps", type=Path, default=FOLDER, help="folder of the recorded sweeps")
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--workers", type=int, default=processors(), help="processes that replay")
    parser.add_argument("--keep", type=Path, help="folder of finished curves, from which a later call goes on")
    parser.add_argument("--out", type=Path, help="folder for tables and figure; default: where the repository has them")
    arguments = parser.parse_args()
    if missing := [name for name in ("optuna", "sklearn") if importlib.util.find_spec(name) is None]:
        parser.error(f"{' and '.join(missing)} cannot be imported: pip install 'scalefold[tune]' optuna")
    begin = time.monotonic()
    assert triton_ops.TRITON  # every kernel has registered its default
    rows_of = read_sets(arguments.sweeps)
    new = arguments.sweeps / SETS["new"]
    unseen = set(trials.read(new)) if new.exists() else set()
    known = [trial for trial in trials.read(trials.SHIPPED) if trial not in unseen]
    sets = {name: [recorded(rows) for rows in sweeps] for name, sweeps in rows_of.items()}
    found = replay_all(sets, known, arguments.seeds, arguments.workers, arguments.keep)
    rows = [r for place, curves in found.items() for r in table(place, curves, [s.name for s in sets[place[0]]])]
    folder = arguments.out or FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "tuning_replay.csv", rows)
    write(folder / "tuning_spills.csv", [spill_row(name, own) for name, sweeps in rows_of.items() for own in sweeps])
    shown = {place: curves for place, curves in found.items() if not place[0].endswith("flat")}
    draw(shown, (arguments.out or ROOT / "docs" / "figures") / "tuning_replay.svg")
    totals = [row for row in rows if row["sweep"] == "all"]
    print_table(totals)
    bad = [row for row in totals if row["method"] in ("today", "TPE") and _exceeds(row)]
    for row in bad:
        print(
            f"{row['set']}, {row['scenario']}: more than half of the trials of {row['method']}, or the interval holds 1"
        )
    print(f"{arguments.seeds} seeds in {time.monotonic() - begin:.0f} s")
    return int(any((row["set"], row["scenario"]) == DECIDES for row in bad))


def _exceeds(row: dict[str, object]) -> bool:
    return float(str(row["median_ratio"])) > 0.5 or float(str(row["median_ratio_95"]).split(" to ")[1]) >= 1


if __name__ == "__main__":
    sys.exit(main())
