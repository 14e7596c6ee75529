"""Whether the runs of a package are runs: each its own, written by training, at a real time, at a possible speed.

Thresholds lie far outside of what the published runs show: their steady cycles differ by at most 3 % within a series,
and the lDDT-Cα of two runs after equal samples differs by 0.001 and more in the median.
"""

import time
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import combinations
from statistics import median
from typing import Any

from scalefold.errors import LogError
from scalefold.mlperf.judge.lint import run_begins, several_runs
from scalefold.mlperf.judge.score import instance_scale
from scalefold.mlperf.log.keys import REHEARSAL, VAL_EVERY_ITERS
from scalefold.mlperf.log.logfile import Log, LogEvent
from scalefold.mlperf.pack.package_tree import Package, Problem, Rule
from scalefold.scaling.step_time import (
    REFERENCE_EVAL_TIMES,
    REFERENCE_STEP_TIMES,
    gpu_family,
    read_eval_times,
    read_step_times,
)
from scalefold.textfile import is_finite_number

#: OpenFold became part of MLPerf HPC with v3.0, whose results are of this year.
EARLIEST_MS = datetime(2023, 1, 1, tzinfo=UTC).timestamp() * 1000
_DAY_MS = 86_400_000
#: Two runs are one when half of what can be compared is equal, of at least this many values.
_MIN_SHARED = 3
_EQUAL_LDDT = 1e-4
_SERIES_RATIO = 0.85
_THROUGHPUT_RATIO = 1.25
#: GPUs that are no faster than the H100, for which the planner has a floor.
_FLOOR_OF = {"H200": ("H200", "H100"), "H100": ("H100",), "A100": ("H100",)}
_REHEARSAL = "rehearsal.py"


def runs_are_of_training(package: Package) -> Iterator[Problem]:
    """The rehearsal writes logs with the same program as training; they are no results."""
    for log in _all_logs(package):
        if any(str(event.metadata.get("file", "")).endswith(_REHEARSAL) for event in log.events):
            message = f"written by the rehearsal ({_REHEARSAL}): nothing was trained"
            yield Problem(package.name(log.file), message, "submit the logs of real runs")
        for event in log.all("tracked_stats"):
            if isinstance(event.value, dict) and REHEARSAL in event.value:
                message = f"a rehearsal: faults were injected ({str(event.value[REHEARSAL])[:80]})"
                yield Problem(package.name(log.file), message, "submit the logs of real runs")


def one_file_is_one_run(package: Package) -> Iterator[Problem]:
    """Two runs in one file."""
    for log in _all_logs(package):
        if len(starts := run_begins(log)) > 1:
            yield Problem(package.name(log.file), several_runs(starts), "give every run its own result_<i>.txt")


def clocks_show_the_time(package: Package) -> Iterator[Problem]:
    """Milliseconds since 1970, after the benchmark was published and not in the future."""
    latest = time.time() * 1000 + _DAY_MS
    for log in _all_logs(package):
        stamps = [event.time_ms for event in log.events if is_finite_number(event.time_ms)]
        wrong = next((ms for ms in stamps if not EARLIEST_MS <= ms <= latest), None)
        if wrong is None:
            continue
        if EARLIEST_MS <= wrong * 1000 <= latest:
            message = f"time_ms {wrong:g} counts seconds, not milliseconds"
        else:
            message = f"a line is stamped {_shown(wrong)}: before the benchmark existed, or in the future"
        yield Problem(package.name(log.file), message, "submit the log as the run wrote it")


def runs_differ_from_each_other(package: Package) -> Iterator[Problem]:
    """Seeds and starts of a folder; the seed checker compares seed and line, equal seeds from two lines pass it."""
    for folder in package.folders:
        for key, what in (("seed", "seed"), ("run_start", "run_start stamp")):
            seen: dict[str, str] = {}
            for log in folder.logs:
                event = log.first(key)
                value = "" if event is None else str(event.value if key == "seed" else event.time_ms)
                is_copy = value and value in seen and (key == "seed" or folder.scaling == "strong")
                if is_copy:
                    message = f"same {what} {value} as {seen[value]}"
                    yield Problem(package.name(log.file), message, "every run has its own entropy and its own log")
                seen.setdefault(value, log.file.name)


def no_run_is_a_copy(package: Package) -> Iterator[Problem]:
    """Whatever the seed and the date say: two runs never have the same accuracies or the same durations."""
    known = [(log, _accuracies(log), _durations(log)) for log in _all_logs(package)]
    for (a, lddt_a, time_a), (b, lddt_b, time_b) in combinations(known, 2):
        same = _same_accuracies(lddt_a, lddt_b) or _same_durations(time_a, time_b)
        if same:
            message = f"a copy of {package.name(a.file)}: {same}"
            yield Problem(package.name(b.file), message, "submit another run; each result is a run of its own")


def runs_are_as_fast_as_their_series(package: Package) -> Iterator[Problem]:
    """Runs of one configuration on one system have cycles of nearly the same length."""
    for folder in package.folders:
        cycles = {log.file: median(found) for log in folder.logs if (found := _steady_cycles_s(log))}
        usual = median(cycles.values()) if len(cycles) >= _MIN_SHARED else 0.0
        for file, seconds in cycles.items():
            if seconds < _SERIES_RATIO * usual:
                message = f"its training cycles take {seconds:.4g} s, those of the other runs {usual:.4g} s"
                yield Problem(package.name(file), message, "submit runs of one configuration, with their own clock")


def throughput_agrees_with_the_clock(package: Package) -> Iterator[Problem]:
    """The logged samples per second are those of the cycles that the stamps give."""
    for log in _all_logs(package):
        ratio = _throughput_ratio(log)
        if ratio is not None and not 1 / _THROUGHPUT_RATIO <= ratio <= _THROUGHPUT_RATIO:
            message = f"by its stamps it trains {ratio:.3g} times as many samples per second as it states itself"
            yield Problem(package.name(log.file), message, "submit the log as the run wrote it")


def no_run_is_faster_than_possible(package: Package) -> Iterator[Problem]:
    """Steps above the planner's floor for the stated accelerator, evaluations no shorter than their longest chain."""
    for folder in package.folders:
        family = gpu_family(str(package.systems.get(folder.system, {}).get("accelerator_model_name", "")))
        for log in folder.logs:
            for what, seconds, floor in _floors(log, family):
                if seconds < floor:
                    message = f"{what} takes {seconds:.3g} s; {family} needs {floor:.3g} s at the least"
                    yield Problem(
                        package.name(log.file), message, "correct the accelerator, or submit the run's own log"
                    )


def a_system_runs_what_it_has_nodes_for(package: Package) -> Iterator[Problem]:
    """Runs at the same time share the system: together they use no more accelerators than it has."""
    for folder in package.folders:
        total = _system_scale(package.systems.get(folder.system, {}))
        busiest, used = _busiest(folder.logs)
        if busiest is not None and total is not None and used > total:
            message = f"when it starts, runs use {used} accelerators at once, the system has {total}"
            fix = "correct number_of_nodes in the JSON, or submit runs that had the system for themselves"
            yield Problem(package.name(busiest.file), message, fix)


RULES: list[Rule] = [
    runs_are_of_training,
    one_file_is_one_run,
    clocks_show_the_time,
    runs_differ_from_each_other,
    no_run_is_a_copy,
    runs_are_as_fast_as_their_series,
    throughput_agrees_with_the_clock,
    no_run_is_faster_than_possible,
    a_system_runs_what_it_has_nodes_for,
]


def _all_logs(package: Package) -> list[Log]:
    """Logs of all result folders, pruned instances included."""
    return [log for folder in package.folders for log in (*folder.logs, *folder.pruned)]


def _shown(time_ms: float) -> str:
    try:
        return datetime.fromtimestamp(time_ms / 1000, UTC).strftime("%Y-%m-%d")
    except (ValueError, OverflowError, OSError):
        return f"{time_ms:g} ms"


# What identifies a run -------------------------------------------------------------------------------------------


def _accuracies(log: Log) -> dict[float, float]:
    """lDDT-Cα by samples, without that of the initial weights, which all runs share."""
    events = [e for e in log.all("eval_accuracy") if is_finite_number(e.value) and is_finite_number(e.epoch_num)]
    return {event.epoch_num: event.value for event in events if event.epoch_num > 0}


def _durations(log: Log) -> dict[tuple[str, float], float]:
    """Milliseconds of each training cycle and evaluation."""
    found: dict[tuple[str, float], float] = {}
    for kind in ("epoch", "eval"):
        starts = {e.epoch_num: e.time_ms for e in log.all(f"{kind}_start") if is_finite_number(e.epoch_num)}
        for stop in log.all(f"{kind}_stop"):
            if is_finite_number(stop.epoch_num) and stop.epoch_num in starts:
                found[kind, stop.epoch_num] = stop.time_ms - starts[stop.epoch_num]
    return found


def _same_accuracies(a: dict[float, float], b: dict[float, float]) -> str | None:
    shared = [abs(a[samples] - b[samples]) for samples in a if samples in b]
    if len(shared) < _MIN_SHARED or median(shared) >= _EQUAL_LDDT:
        return None
    return f"{sum(d < _EQUAL_LDDT for d in shared)} of {len(shared)} accuracies are equal"


def _same_durations(a: dict[Any, float], b: dict[Any, float]) -> str | None:
    """Equal to the millisecond; a length that comes again and again within a run counts once."""
    lengths = {a[key] for key in a if key in b}
    equal = {a[key] for key in a if b.get(key) == a[key]}
    if len(equal) < _MIN_SHARED or 2 * len(equal) < len(lengths):
        return None
    return f"{len(equal)} of {len(lengths)} durations are equal to the millisecond"


# Speed -----------------------------------------------------------------------------------------------------------


def _cycles_s(log: Log) -> dict[float, float]:
    """Seconds of each training cycle by the samples at its end."""
    return {key[1]: ms / 1000 for key, ms in _durations(log).items() if key[0] == "epoch"}


def _steady_cycles_s(log: Log) -> list[float]:
    """Without the first cycle, in which loaders and storage are cold."""
    return list(_cycles_s(log).values())[1:]


def _throughput_ratio(log: Log) -> float | None:
    """Samples per second by the clock over those logged, median over the cycles; None if either is not there."""
    stated = [
        e for e in log.all("tracked_stats") if isinstance(e.value, dict) and is_finite_number(e.value.get("throughput"))
    ]
    by_cycle = {e.metadata.get("step"): e.value["throughput"] for e in stated if _is_index(e)}
    batch = log.value("global_batch_size")
    if not is_finite_number(batch):
        return None
    ratios = [
        VAL_EVERY_ITERS * batch / seconds / by_cycle[index]
        for index, seconds in enumerate(_cycles_s(log).values(), start=1)
        if by_cycle.get(index, 0) > 0 and seconds > 0
    ]
    return median(ratios) if len(ratios) >= _MIN_SHARED else None


def _is_index(event: LogEvent) -> bool:
    return isinstance(event.metadata.get("step"), int)


def _floors(log: Log, family: str) -> Iterator[tuple[str, float, float]]:
    """What a log times, its shortest seconds, and the floor of it on accelerators of this family."""
    batch, lengths = log.value("global_batch_size"), _durations(log)
    try:
        scale = instance_scale(log)
    except LogError:
        return
    if family not in _FLOOR_OF or not is_finite_number(batch) or not lengths or scale < 1:
        return
    alone, shared = _step_floors_s(_FLOOR_OF[family])
    cycles = [ms / 1000 for (kind, _), ms in lengths.items() if kind == "epoch"]
    evaluations = [ms / 1000 for (kind, _), ms in lengths.items() if kind == "eval"]
    if cycles:
        yield "a training cycle", min(cycles), VAL_EVERY_ITERS * max(shared, alone * batch / scale)
    if evaluations:
        yield "an evaluation", min(evaluations), _evaluation_floor_s(_FLOOR_OF[family], scale)


def _step_floors_s(families: tuple[str, ...]) -> tuple[float, float]:
    """Seconds of a sample on one accelerator, and of a step however many share it: the planner's shortest."""
    rows = [row for row in read_step_times(REFERENCE_STEP_TIMES) if row.gpu in families]
    alone = min(row.step_ms for row in rows if row.dap_size == 1)
    return alone / 1000, min(row.step_ms for row in rows) / 1000


def _evaluation_floor_s(families: tuple[str, ...], scale: int) -> float:
    """The planner's shortest time for all chains, half of which a split of the longest chain may save."""
    return min(row.seconds_on(scale) for row in read_eval_times(REFERENCE_EVAL_TIMES) if row.gpu in families) / 2


# Occupation ------------------------------------------------------------------------------------------------------


def _system_scale(description: dict[str, Any]) -> int | None:
    try:
        return int(description["number_of_nodes"]) * max(int(description["accelerators_per_node"]), 1)
    except (KeyError, TypeError, ValueError):
        return None


def _busiest(logs: tuple[Log, ...]) -> tuple[Log | None, int]:
    """The run at whose start most accelerators are in use, and how many."""
    spans = [span for log in logs if (span := _span(log)) is not None]
    found: tuple[Log | None, int] = (None, 0)
    for log, start, _, _ in spans:
        used = sum(scale for _, begin, end, scale in spans if begin <= start < end)
        found = max(found, (log, used), key=lambda pair: pair[1])
    return found


def _span(log: Log) -> tuple[Log, float, float, int] | None:
    start, stop = log.first("run_start"), log.first("run_stop")
    try:
        return None if start is None or stop is None else (log, start.time_ms, stop.time_ms, instance_scale(log))
    except LogError:
        return None
