"""Scores of result folders, of any submitter: time to train (strong scaling) and throughput (weak scaling).

Strong: of ten runs the fastest and the slowest are dropped and the other eight averaged, in minutes; one run that did
not converge may stand as the slowest. Weak: (T, S, M', TTTa) = accelerators of the whole system, accelerators of an
instance, instances, and minutes from the first ``run_start`` to the last ``run_stop`` (HPC training rules v3.0).
"""

import json
import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any, Literal

from scalefold.errors import LogError
from scalefold.mlperf.judge.lint import run_begins, several_runs
from scalefold.mlperf.judge.rcp import Convergence, judge_convergence
from scalefold.mlperf.log.keys import BENCHMARK, MIN_WEAK_INSTANCES, NUM_STRONG_RUNS
from scalefold.mlperf.log.logfile import Log, read_log
from scalefold.textfile import is_finite_number

Scaling = Literal["strong", "weak"]
_RUN_FOLDER, _PUT_ASIDE = re.compile(r"run_\d+"), re.compile(r"run_\d+_interrupted_\d+")  # of ``scalefold launch``


@dataclass(frozen=True)
class RunScore:
    """One run: its minutes (infinite when it did not converge), samples to converge, and whether it is averaged."""

    file: str
    minutes: float
    samples_to_converge: float
    counted: bool


@dataclass(frozen=True)
class Score:
    """Score of one result folder.

    ``minutes`` is the olympic mean (strong) or TTTa (weak), None when the rules give no score; ``scaled_minutes`` is
    the strong score times the convergence factor. ``problems`` say what keeps the folder from being a legal result.
    """

    folder: str
    scaling: Scaling
    runs: tuple[RunScore, ...]
    minutes: float | None
    scaled_minutes: float | None
    convergence: Convergence | None
    total_scale: int | None
    instance_scale: int
    problems: tuple[str, ...]

    @property
    def is_legal(self) -> bool:
        """Whether the rules accept it: no problem, and convergence no faster than the reference allows."""
        return not self.problems and self.convergence is not None and self.convergence.status == "pass"

    @property
    def num_models(self) -> int:
        """M': converged instances of a throughput result."""
        return sum(math.isfinite(run.minutes) for run in self.runs)

    @property
    def models_per_minute(self) -> float | None:
        """Throughput of a weak result."""
        return self.num_models / self.minutes if self.scaling == "weak" and self.minutes else None

    def text(self) -> str:
        """The score in a few lines."""
        lines = [f"{self.folder} ({self.scaling})"]
        if self.minutes is None:
            lines.append("  no score")
        elif self.scaling == "strong":
            scaled = f", {self.scaled_minutes:.3f} min if scaled to the reference" if self.scaled_minutes else ""
            lines.append(f"  time to train {self.minutes:.3f} min{scaled}")
        else:
            total = self.total_scale or "?"
            lines.append(f"  T {total}, S {self.instance_scale}, M' {self.num_models}, TTTa {self.minutes:.3f} min")
        lines += [f"  {line}" for line in _convergence_lines(self.convergence)]
        lines += [f"  - {problem}" for problem in self.problems]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """The score as JSON-ready data; infinities become null."""
        fields = asdict(self) | {"num_models": self.num_models, "models_per_minute": self.models_per_minute}
        fields["is_legal"] = self.is_legal
        return _finite(fields)


def score(folder: str | Path) -> list[Score]:
    """Scores of all OpenFold result folders at or below ``folder``, in path order.

    A result folder holds ``result_*.txt``, or is the folder of a job with its runs in ``run_0``, ``run_1``, ... It is
    weak when a folder named ``weak`` is on its path or its runs are instances of one job, strong otherwise. Pruned
    instances, power logs and runs that a job put aside are left out.

    Raises:
        LogError: no OpenFold result lies below the folder, or a log cannot be read.
    """
    folder = Path(folder)
    scores = [score_folder(found) for found in result_folders(folder)]
    if not scores:
        others = sorted({str(name) for file in folder.rglob("result_*.txt") if (name := _benchmark_of(file))})
        found = f", only logs of {', '.join(others)}" if others else ""
        raise LogError(f"{folder}: no OpenFold result_*.txt at or below this folder{found}")
    return scores


def result_folders(folder: Path) -> list[Path]:
    """Folders at or below ``folder`` with OpenFold result files, see :func:`result_files`."""
    found = {
        _folder_of(file, folder) for file in folder.rglob("result_*.txt") if not _PUT_ASIDE.fullmatch(file.parent.name)
    }
    own = [f for f in sorted(found) if not {"pruned_results", "power"} & set(f.relative_to(folder).parts)]
    return [f for f in own if _is_openfold(result_files(f)[0])]


def _folder_of(file: Path, top: Path) -> Path:
    in_job = _RUN_FOLDER.fullmatch(file.parent.name) and file.parent != top
    return file.parent.parent if in_job else file.parent


def result_files(folder: Path) -> list[Path]:
    """``result_*.txt`` of the folder, or else of the run folders of a job in it, by number, then name."""
    found = list(folder.glob("result_*.txt")) or [
        file for file in folder.glob("run_*/result_*.txt") if _RUN_FOLDER.fullmatch(file.parent.name)
    ]
    return sorted(found, key=lambda f: (int((re.findall(r"\d+", f.stem) or [0])[-1]), f.name))


def scaling_of(folder: Path) -> Scaling:
    """``weak`` when a folder of that name is on the path."""
    return "weak" if "weak" in folder.resolve().parts[-3:] else "strong"


def _is_openfold(file: Path) -> bool:
    return _benchmark_of(file) == BENCHMARK


def _benchmark_of(file: Path) -> Any:
    """What the log states; of a file that is no log, the name of its folder if that is ours."""
    try:
        return read_log(file).value("submission_benchmark")
    except LogError:
        return BENCHMARK if file.parent.name == BENCHMARK else None


def score_folder(folder: Path, scaling: Scaling | None = None) -> Score:
    """Score of one result folder."""
    logs = [read_log(file) for file in result_files(folder)]
    if not logs:
        raise LogError(f"{folder}: no result_*.txt")
    scaling = scaling or ("weak" if _are_instances(folder, logs) else scaling_of(folder))
    return _strong(folder, logs) if scaling == "strong" else _weak(folder, logs)


def _are_instances(folder: Path, logs: list[Log]) -> bool:
    """Whether the runs of a job are weak-scaling instances, which their logs number."""
    return any(
        log.file.parent != folder and event.metadata.get("instance")
        for log in logs
        for event in log.all("staging_stop")
    )


def _strong(folder: Path, logs: list[Log]) -> Score:
    minutes = [_minutes(log) for log in logs]
    order = sorted(range(len(logs)), key=lambda i: minutes[i])
    counted = set(order[1:-1])
    failed = [log.file.name for log, m in zip(logs, minutes, strict=True) if not math.isfinite(m)]
    problems = _log_problems(logs)
    if len(logs) != NUM_STRONG_RUNS:
        problems.append(f"{len(logs)} runs, a time-to-train result has exactly {NUM_STRONG_RUNS}")
    if len(failed) > 1:
        problems.append(f"{len(failed)} runs did not converge ({', '.join(failed)}), one at most may stand as slowest")
    value = mean(minutes[i] for i in counted) if counted and len(failed) <= 1 else None
    convergence = _convergence(logs)
    return Score(
        folder=str(folder),
        scaling="strong",
        runs=tuple(_run(log, minutes[i], i in counted) for i, log in enumerate(logs)),
        minutes=value,
        scaled_minutes=value * convergence.factor if value and convergence else None,
        convergence=convergence,
        total_scale=_total_scale(folder),
        instance_scale=instance_scale(logs[0]),
        problems=tuple(problems),
    )


def _weak(folder: Path, logs: list[Log]) -> Score:
    minutes = [_minutes(log) for log in logs]
    kept = [log for log, m in zip(logs, minutes, strict=True) if math.isfinite(m)]
    problems = _log_problems(logs)
    if len(kept) < MIN_WEAK_INSTANCES:
        problems.append(f"{len(kept)} converged instances, a throughput result has at least {MIN_WEAK_INSTANCES}")
    if len(kept) < len(logs):
        problems.append(f"{len(logs) - len(kept)} instances did not converge: move them to pruned_results")
    if len({instance_scale(log) for log in logs}) > 1:
        problems.append("instances use different numbers of accelerators")
    start_ms = min((log.need("run_start").time_ms for log in kept), default=0)
    stop_ms = max((log.need("run_stop").time_ms for log in kept), default=0)
    return Score(
        folder=str(folder),
        scaling="weak",
        runs=tuple(_run(log, m, math.isfinite(m)) for log, m in zip(logs, minutes, strict=True)),
        minutes=(stop_ms - start_ms) / 60_000 if len(kept) >= MIN_WEAK_INSTANCES else None,
        scaled_minutes=None,
        convergence=_convergence(logs),
        total_scale=_total_scale(folder),
        instance_scale=instance_scale(logs[0]),
        problems=tuple(problems),
    )


def _minutes(log: Log) -> float:
    """Minutes of a converged run; infinite without a successful ``run_stop`` or below the target."""
    target = log.value("target_avg_lddt_ca_value")
    values = [event.value for event in log.all("eval_accuracy") if is_finite_number(event.value)]
    if log.status != "success" or not values or (is_finite_number(target) and max(values) < target):
        return math.inf
    return log.minutes


def _run(log: Log, minutes: float, counted: bool) -> RunScore:
    return RunScore(log.file.name, minutes, _samples(log), counted)


def _samples(log: Log) -> float:
    samples = log.samples_to_converge
    return float(samples) if is_finite_number(samples) else math.inf


def _convergence(logs: list[Log]) -> Convergence | None:
    batch = logs[0].value("global_batch_size")
    samples = [_samples(log) for log in logs]
    differ = any(log.value("global_batch_size") != batch for log in logs)
    if differ or not is_finite_number(batch) or len(samples) < 3 or sum(map(math.isinf, samples)) > 1:
        return None
    return judge_convergence(int(batch), samples)


def _log_problems(logs: list[Log]) -> list[str]:
    """Files with several runs, accuracies that are no numbers, and batch sizes that differ."""
    begins = {log.file.name: run_begins(log) for log in logs}
    problems = [f"{name}: {several_runs(starts)}" for name, starts in begins.items() if len(starts) > 1]
    problems += [
        f"{log.file.name}:{event.line}: {event.key} is {event.value!r}, must be a number"
        for log in logs
        for event in [event for event in log.all("eval_accuracy") if not is_finite_number(event.value)][:1]
    ]
    batches = sorted({str(log.value("global_batch_size")) for log in logs})
    return problems + ([f"global batch sizes differ: {', '.join(batches)}"] if len(batches) > 1 else [])


def instance_scale(log: Log) -> int:
    """Accelerators of this run: the ranks where the log has nodes of a larger job (as one published result does).

    Raises:
        LogError: a number of nodes, accelerators or ranks is none; names file, line and key.
    """
    nodes, accelerators = _whole(log, "number_of_nodes"), _whole(log, "accelerators_per_node")
    scale = nodes * max(accelerators, 1)
    ranks = log.value("number_of_ranks")
    return min(scale, ranks) if isinstance(ranks, int) and accelerators else scale


def _whole(log: Log, key: str) -> int:
    event = log.need(key)
    if not is_finite_number(event.value) or event.value != int(event.value):
        raise LogError(f"{log.file}:{event.line}: {key} is {event.value!r}, must be a whole number")
    return int(event.value)


def _total_scale(folder: Path) -> int | None:
    """Accelerators of the system, from the package's ``systems/<system>.json`` when the folder lies in a package."""
    parents = list(folder.resolve().parents)
    if len(parents) < 4 or parents[2].name != "results":
        return None
    file = parents[3] / "systems" / f"{parents[1].name}.json"
    try:
        system = json.loads(file.read_text(encoding="utf-8"))
        return int(system["number_of_nodes"]) * int(system["accelerators_per_node"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _convergence_lines(convergence: Convergence | None) -> list[str]:
    if convergence is None:
        return ["convergence: cannot be compared"]
    if convergence.reference is None:
        return [f"convergence: {convergence.mean_samples:,.0f} samples; no reference point at this batch size"]
    reference = convergence.reference
    return [
        f"convergence: {convergence.mean_samples:,.0f} samples, reference {reference.mean_samples:,.0f}, floor"
        f" {reference.floor_samples:,.0f}: {convergence.status}, factor {convergence.factor:.4f}"
    ]


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
