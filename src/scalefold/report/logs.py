"""Reading runs: any submitter's ``result_N.txt`` (MLPerf log lines) and our own run folders.

Times are seconds since ``run_start``; ``samples`` is the log's ``epoch_num``: training samples so far.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from scalefold.errors import LogError
from scalefold.mlperf.log.keys import KEYS
from scalefold.mlperf.log.published import REFERENCE_CONVERGENCE
from scalefold.report.record import METRICS_FILE, Metrics, read_metrics
from scalefold.textfile import is_finite_number, parse_json

TOKEN = ":::MLLOG "
#: Logged values that make a run the MLPerf HPC v3.0 OpenFold benchmark and its results comparable.
BENCHMARK_FACTS = {
    key: KEYS[key].expected
    for key in (
        *("submission_benchmark", "train_samples", "eval_samples", "model_parameters_count"),
        *("val_every_iters", "target_avg_lddt_ca_value"),
    )
}
_NUMBERS = ("eval_accuracy", "target_avg_lddt_ca_value")
_TRACKED = ("throughput", "avg_perf_next_batch")


@dataclass(frozen=True)
class Cycle:
    """One training cycle (``epoch_start`` to ``epoch_stop``) that ends at ``samples``."""

    samples: int
    start_s: float
    stop_s: float

    @property
    def seconds(self) -> float:
        """Duration."""
        return self.stop_s - self.start_s


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of the weights of ``samples``; None where the log lacks the line."""

    samples: int
    start_s: float | None
    stop_s: float | None
    lddt_ca: float | None
    result_s: float | None


@dataclass(frozen=True)
class ResultLog:
    """What one MLPerf result file says. ``run_s`` is None while the run has not stopped."""

    path: Path
    facts: dict[str, Any]
    init_s: float | None
    run_s: float | None
    status: str | None
    cycles: list[Cycle]
    evaluations: list[Evaluation]
    throughput: list[tuple[int, float]]
    batch_wait_s: list[tuple[int, float]]
    run_start_ms: float = 0.0

    @property
    def passing(self) -> Evaluation | None:
        """The first evaluation that meets the logged target (0.8 if none is logged)."""
        target = self.facts.get("target_avg_lddt_ca_value", 0.8)
        return next((e for e in self.evaluations if e.lddt_ca is not None and e.lddt_ca >= target), None)


@dataclass(frozen=True)
class Run:
    """One run to report on: its MLPerf log, its metrics file, or both."""

    name: str
    log: ResultLog | None = None
    metrics: Metrics | None = None
    config_text: str = ""
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def is_benchmark(self) -> bool:
        """Whether the log states the benchmark's values; without a log a run is never taken for the benchmark."""
        return all(self.facts.get(key) == value for key, value in BENCHMARK_FACTS.items())

    @property
    def target(self) -> float | None:
        """Target lDDT-Cα, if stated anywhere."""
        value = self.facts.get("target_avg_lddt_ca_value", self.facts.get("target"))
        return float(value) if isinstance(value, int | float) else None

    @property
    def folder(self) -> Path | None:
        """Where the run left its files."""
        found = self.metrics or self.log
        return found.path.parent if found is not None else None

    @property
    def minutes(self) -> float | None:
        """Time to train: ``run_stop`` - ``run_start``."""
        return None if self.log is None or self.log.run_s is None else self.log.run_s / 60

    def lddt_curve(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Samples, seconds and lDDT-Cα of all evaluations, each of length M; seconds are NaN where unknown.

        From the log, unless the metrics file knows more evaluations, as it does after a resume.
        """
        logged = self.log.evaluations if self.log is not None else []
        if logged and (self.metrics is None or len(self.metrics.eval_step) <= len(logged)):
            rows = [(e.samples, e.result_s, e.lddt_ca) for e in logged if e.lddt_ca is not None]
            table = np.array(rows, np.float64).reshape(-1, 3)
            return table[:, 0], table[:, 1], table[:, 2]
        if self.metrics is not None:
            return self.metrics.eval_samples, self.metrics.eval_time_s, self.metrics.eval_lddt_ca
        return np.empty(0), np.empty(0), np.empty(0)


def reference_band(run: Run) -> tuple[float, float] | None:
    """Reference mean and standard deviation of samples to converge at this run's batch, None if there is none.

    Between batch 128 and 256 both are interpolated linearly, below 128 the record of 128 holds, above 256 nothing is
    known (rules of the RCP checker). Only the benchmark itself has a band.
    """
    batch = run.facts.get("global_batch_size")
    if not run.is_benchmark or not isinstance(batch, int) or batch > 256:
        return None
    low, high = REFERENCE_CONVERGENCE[128], REFERENCE_CONVERGENCE[256]
    weight = max(0.0, (batch - 128) / 128)
    return low[0] + weight * (high[0] - low[0]), low[1] + weight * (high[1] - low[1])


def read_result(path: Path | str) -> ResultLog:
    """Read one MLPerf result file. Lines without the token are ignored, text before it as well.

    A cut last line, as in the log of a running job, is ignored. Raises LogError naming file and line for any other
    line that cannot be parsed, and for a file without ``run_start``.
    """
    path = Path(path)
    entries = _log_entries(path)
    starts = [e["time_ms"] for e in entries if e["key"] == "run_start"]
    if not starts:
        raise LogError(f"{path}: no run_start line; this is no MLPerf result file or the run never began")
    clock = starts[0]
    stop = next((e for e in entries if e["key"] == "run_stop"), None)
    stats = [e for e in entries if e["key"] == "tracked_stats" and isinstance(e["value"], dict)]
    return ResultLog(
        path=path,
        facts=_facts(entries),
        init_s=_seconds_between(entries, "init_start", "init_stop"),
        run_s=None if stop is None else (stop["time_ms"] - clock) / 1000,
        status=None if stop is None else stop["metadata"].get("status"),
        cycles=_cycles(entries, clock),
        evaluations=_evaluations(entries, clock),
        throughput=_tracked(stats, _TRACKED[0]),
        batch_wait_s=_tracked(stats, _TRACKED[1]),
        run_start_ms=clock,
    )


def read_runs(inputs: Sequence[Path | str] | Path | str) -> list[Run]:
    """Runs behind paths: run folders, folders of ``result_N.txt`` files, single result or metrics files.

    Raises LogError for a path that holds no run.
    """
    paths = [Path(inputs)] if isinstance(inputs, str | Path) else [Path(p) for p in inputs]
    runs = [run for path in paths for run in _runs_of(path)]
    if not runs:
        raise LogError("no run given: name a run folder, a folder of result_N.txt files or a result file")
    return runs


def _runs_of(path: Path) -> list[Run]:
    if not path.exists():
        raise LogError(f"{path}: no such file or folder")
    if path.is_file():
        return [_metrics_run(path)] if path.suffix == ".jsonl" else [_run(read_result(path))]
    logs = _latest_logs(path)
    has_metrics = (path / METRICS_FILE).exists()
    metrics = None if not has_metrics else read_metrics(path) if logs else _recorded(path)
    config_text = _config_text(path)
    if len(logs) <= 1 and (logs or metrics):
        return [_run(read_result(logs[0]) if logs else None, metrics, config_text, name=path.resolve().name)]
    if logs:
        return [_run(read_result(log), config_text=config_text) for log in logs]
    nested = [run for child in sorted(path.iterdir(), key=_natural) if _holds_run(child) for run in _runs_of(child)]
    if not nested:
        raise LogError(f"{path}: holds neither {METRICS_FILE} nor result_N.txt, and no folder in it does")
    return nested


def _latest_logs(folder: Path) -> list[Path]:
    """One log per ``result_N``, in order of N: a resumed run (``result_N.resumed_*.txt``) replaces its beginning."""
    latest: dict[str, Path] = {}
    for file in sorted(folder.glob("result_*.txt"), key=lambda file: file.stat().st_mtime_ns):
        latest[file.name.split(".")[0]] = file
    return sorted(latest.values(), key=_natural)


def _holds_run(path: Path) -> bool:
    return path.is_dir() and (any(path.rglob("result_*.txt")) or any(path.rglob(METRICS_FILE)))


def _metrics_run(path: Path) -> Run:
    return _run(None, _recorded(path), _config_text(path.parent), name=path.parent.name)


def _recorded(path: Path) -> Metrics:
    """A metrics file that is all there is to report on, so it must say something."""
    metrics = read_metrics(path)
    if not (metrics.run or metrics.events or len(metrics.step) or len(metrics.eval_step)):
        raise LogError(f"{metrics.path}: holds no record; give the {METRICS_FILE} of a run that has begun")
    return metrics


def _run(log: ResultLog | None, metrics: Metrics | None = None, config_text: str = "", name: str = "") -> Run:
    facts = dict(metrics.run) if metrics is not None else {}
    if log is not None:
        facts |= log.facts
    if not name and log is not None:
        name = log.path.stem
    return Run(name=name, log=log, metrics=metrics, config_text=config_text, facts=facts)


def _config_text(folder: Path) -> str:
    files = [f for name in ("config.yaml", "resolved_config.yaml") if (f := folder / name).is_file()]
    return files[0].read_text(encoding="utf-8", errors="replace") if files else ""


def _natural(path: Path) -> list[int | str]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


def _log_entries(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="latin-1").split("\n")
    except OSError as error:
        raise LogError(f"{path}: cannot read the log ({error.strerror})") from None
    entries = []
    for number, line in enumerate(lines, 1):
        if TOKEN not in line:
            continue
        try:
            entry = parse_json(line[line.index(TOKEN) + len(TOKEN) :])
            entry = {name: entry[name] for name in ("time_ms", "key", "value", "metadata")}
        except (ValueError, KeyError, TypeError):
            if number == len(lines):
                break
            raise LogError(f"{path}:{number}: an MLPerf line without time_ms, key, value and metadata") from None
        _check_entry(entry, f"{path}:{number}")
        entries.append(entry)
    return entries


def _check_entry(entry: dict[str, Any], place: str) -> None:
    """Refuse other types than numbers where the report counts with them. Raises LogError naming line and key."""
    key, value, metadata = entry["key"], entry["value"], entry["metadata"]
    if not isinstance(key, str) or not isinstance(metadata, dict):
        raise LogError(f"{place}: key must be text and metadata a JSON object")
    numbers = {"time_ms": entry["time_ms"], "value": value if key in _NUMBERS else 0}
    numbers |= {name: metadata[name] for name in ("epoch_num", "step") if metadata.get(name) is not None}
    if key == "tracked_stats" and isinstance(value, dict):
        numbers |= {name: value[name] for name in _TRACKED if name in value}
    for name, number in numbers.items():
        if not is_finite_number(number):
            what = key if name == "value" else f"{key}: {name}"
            raise LogError(f"{place}: {what} is {repr(number)[:40]}, must be a number")


def _facts(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """First value of every key that states one."""
    facts: dict[str, Any] = {}
    for entry in entries:
        if entry["value"] is not None and entry["key"] not in ("eval_accuracy", "tracked_stats"):
            facts.setdefault(entry["key"], entry["value"])
    return facts


def _seconds_between(entries: list[dict[str, Any]], first: str, last: str) -> float | None:
    times = {key: e["time_ms"] for e in reversed(entries) if (key := e["key"]) in (first, last)}
    return (times[last] - times[first]) / 1000 if len(times) == 2 else None


def _times_by_samples(entries: list[dict[str, Any]], key: str, clock: int) -> dict[int, float]:
    found: dict[int, float] = {}
    for entry in entries:
        if entry["key"] == key and isinstance(entry["metadata"].get("epoch_num"), int | float):
            found.setdefault(int(entry["metadata"]["epoch_num"]), (entry["time_ms"] - clock) / 1000)
    return found


def _cycles(entries: list[dict[str, Any]], clock: int) -> list[Cycle]:
    starts = _times_by_samples(entries, "epoch_start", clock)
    stops = _times_by_samples(entries, "epoch_stop", clock)
    return [Cycle(samples, starts[samples], stops[samples]) for samples in sorted(starts) if samples in stops]


def _evaluations(entries: list[dict[str, Any]], clock: int) -> list[Evaluation]:
    starts = _times_by_samples(entries, "eval_start", clock)
    stops = _times_by_samples(entries, "eval_stop", clock)
    results = _times_by_samples(entries, "eval_accuracy", clock)
    values: dict[int, float] = {}
    for entry in entries:
        if entry["key"] == "eval_accuracy" and isinstance(entry["metadata"].get("epoch_num"), int | float):
            values.setdefault(int(entry["metadata"]["epoch_num"]), float(entry["value"]))
    return [
        Evaluation(samples, starts.get(samples), stops.get(samples), values.get(samples), results.get(samples))
        for samples in sorted(starts.keys() | results.keys())
    ]


def _tracked(stats: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    return [(int(e["metadata"].get("step") or 0), float(e["value"][name])) for e in stats if name in e["value"]]
