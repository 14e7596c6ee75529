"""What is going on in jobs and runs, from their files: repeats, last step, lDDT-Cα, minutes left, verdicts, the queue.

Files say everything but the state in the queue, which ``squeue`` knows of a job that waits or runs and ``sacct``, where
a site keeps accounts, of one that is over.
"""

import functools
import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from scalefold.config import Config, load_config
from scalefold.errors import ConfigError, LogError
from scalefold.mlperf.judge.check import check_log
from scalefold.mlperf.judge.score import result_files
from scalefold.mlperf.log.logfile import read_log
from scalefold.report.console import format_duration
from scalefold.report.record import METRICS_FILE, Metrics, read_metrics
from scalefold.scaling.from_config import system_spec
from scalefold.scaling.plan import plan
from scalefold.telemetry.stragglers import Loads, read_loads

State = Literal["starting", "running", "silent", "reached", "missed", "stopped"]
DONE: tuple[State, ...] = ("reached", "missed")
VERDICT_FILE = "verdict.json"
SILENT_S = 900  # a run whose record did not change for so long is probably dead; no step or evaluation takes longer
RECENT_STEPS = 20


@dataclass(frozen=True)
class RunStatus:
    """One run; None where nobody knows. Minutes count from the run's clock start; ``planned`` is the whole run's time.

    ``minutes_left`` is the plan's rest, or (``at_most``) that of the step budget at the present speed.
    """

    folder: Path
    state: State
    step: int | None
    lddt_ca: float | None
    lddt_step: int | None
    target: float | None
    minutes: float | None
    planned: float | None
    minutes_left: float | None
    at_most: bool
    silent_s: float
    verdict: str | None
    slowest: str | None = None
    gpu_kwh: float | None = None

    def text(self) -> str:
        """One line."""
        parts = [f"{self.folder.name:8s} {self.state:8s}"]
        parts += [f"step {self.step:4d}"] if self.step is not None else []
        if self.lddt_ca is not None:
            target = f"→{self.target:.3f}" if self.target is not None else ""
            parts.append(f"lddt {self.lddt_ca:.3f}@{self.lddt_step}{target}")
        parts += [f"{self.minutes:.1f} min"] if self.minutes is not None else []
        if self.minutes_left is not None:
            planned = f" of {self.planned:.1f} planned" if self.planned is not None else " by its step budget"
            parts.append(f"{'at most' if self.at_most else 'about'} {self.minutes_left:.1f} min left{planned}")
        parts += [f"no sign for {format_duration(self.silent_s)}"] if self.state == "silent" else []
        parts += [f"GPUs {self.gpu_kwh:.3f} kWh"] if self.gpu_kwh is not None else []
        parts += [self.slowest] if self.slowest is not None else []
        parts += [self.verdict] if self.verdict is not None else []
        return "  ".join(parts)


@dataclass(frozen=True)
class JobStatus:
    """A job with its runs; ``expected`` is the number of runs that its job file starts, ``queue`` Slurm's word."""

    folder: Path
    job_id: str | None
    queue: dict[str, str]
    expected: int | None
    runs: tuple[RunStatus, ...]
    suspect_nodes: tuple[str, ...]

    @property
    def is_over(self) -> bool:
        """Whether nothing more is to be expected."""
        waits = self.queue.get("state", "") in ("PENDING", "RUNNING", "COMPLETING", "SUSPENDED", "CONFIGURING")
        return not waits and not any(run.state in ("starting", "running") for run in self.runs)

    def text(self) -> str:
        """A headline and one line per run."""
        done = sum(run.state in DONE for run in self.runs)
        running = sum(run.state in ("starting", "running") for run in self.runs)
        of = f" of {self.expected}" if self.expected is not None else ""
        queue = "  ".join(value for key, value in self.queue.items() if value)
        parts = [f"{done}{of} runs done", *([f"{running} running"] if running else [])]
        parts += [f"suspect nodes {', '.join(self.suspect_nodes)}"] if self.suspect_nodes else []
        name = f"job {self.job_id}" if self.job_id else str(self.folder)
        head = f"{name}: {queue + ': ' if queue else ''}{', '.join(parts)}"
        return "\n".join([head, *(f"  {run.text()}" for run in self.runs)])


def status(what: str | None = None, check: bool = False) -> list[JobStatus]:
    """The jobs that ``what`` names: a job's number, a folder of runs, jobs or one run; None: everything in ``runs``.

    Args:
        what: number or folder.
        check: judge finished logs anew and keep the verdicts beside them (``verdict.json``).

    Raises:
        ConfigError: there is no such job or folder. LogError: a run's record cannot be read.
    """
    jobs = [_job_status(folder, check) for folder in find_jobs(what)]
    if what is not None and what.isdigit() and not jobs:
        if not (queue := queue_state(what)):
            raise ConfigError(f"job {what}: neither Slurm nor a folder runs/*/job_{what} knows it; name its folder")
        jobs = [JobStatus(Path(), what, queue, None, (), ())]
    if not jobs:
        raise ConfigError(f"{what or 'runs'}: holds no run; name a job's number, a run folder or a folder of them")
    return jobs


def as_json(jobs: list[JobStatus]) -> str:
    """The same as JSON."""
    return json.dumps([asdict(job) for job in jobs], indent=1, default=str)


def find_jobs(what: str | None) -> list[Path]:
    """Folders of jobs, and of runs that no job started, oldest first."""
    if what is not None and what.isdigit() and not Path(what).is_dir():
        return sorted(Path("runs").glob(f"**/job_{what}")) or _folder_that_slurm_names(what)
    folder = Path(what or "runs")
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; name a job's number, a run folder or a folder of them")
    if is_run(folder) or any(run_folders(folder)):
        return [folder]
    inside = [*folder.glob("job_*"), *folder.glob("*/job_*"), *filter(is_run, folder.glob("*"))]
    return sorted((found for found in inside if found.is_dir()), key=lambda found: found.stat().st_mtime)


def is_run(folder: Path) -> bool:
    """Whether a run left something there."""
    return (folder / METRICS_FILE).is_file() or any(folder.glob("result_*.txt*"))


def run_folders(job: Path) -> list[Path]:
    """A job's runs, by number; those that were put aside after an interruption are left out."""
    found = [folder for folder in job.glob("run_*") if re.fullmatch(r"run_\d+", folder.name) and folder.is_dir()]
    return sorted(found, key=lambda folder: int(folder.name.removeprefix("run_")))


def queue_state(job_id: str) -> dict[str, str]:
    """State, nodes, time and reason from ``squeue``, else ``sacct``; empty where neither is there or knows the job."""
    commands = {
        "squeue": (["-h", "-j", job_id, "-o", "%T|%N|%M of %l|%r"], ("state", "nodes", "time", "reason")),
        "sacct": (["-nPX", "-j", job_id, "-o", "State,NodeList,Elapsed,ExitCode"], ("state", "nodes", "time", "exit")),
    }
    for program, (arguments, names) in commands.items():
        if shutil.which(program) and (line := _first_line([program, *arguments])):
            found = dict(zip(names, line.split("|"), strict=False))
            return {key: value for key, value in found.items() if value not in ("", "None", "(null)")}
    return {}


def _first_line(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return (done.stdout.splitlines() or [""])[0].strip() if done.returncode == 0 else ""


def _folder_that_slurm_names(job_id: str) -> list[Path]:
    if shutil.which("scontrol") is None:
        return []
    facts = _first_line(["scontrol", "show", "job", "--oneliner", job_id])
    output = re.search(r" StdOut=(.*?) (?=\w+=)", f"{facts} End=")
    folder = Path(output[1]).parent / f"job_{job_id}" if output else None
    return [folder] if folder is not None and folder.is_dir() else []


def _job_status(folder: Path, check: bool) -> JobStatus:
    number = re.fullmatch(r"job_(\d+)", folder.resolve().name)
    job_id = number[1] if number else None
    queue = queue_state(job_id) if job_id else {}
    alive = None if not queue else queue.get("state") in ("RUNNING", "COMPLETING")
    runs = tuple(run_status(run, check, alive) for run in ([folder] if is_run(folder) else run_folders(folder)))
    suspects = folder / "suspect_nodes"
    nodes = tuple(sorted(set(suspects.read_text(encoding="utf-8").split()))) if suspects.is_file() else ()
    return JobStatus(folder, job_id, queue, _expected_runs(folder), runs, nodes)


def _expected_runs(folder: Path) -> int | None:
    script = folder / "job.sbatch"
    text = script.read_text(encoding="utf-8") if script.is_file() else ""
    found = [re.search(rf"^{name}=(\d+)", text, re.M) for name in ("repeats", "instances")]
    return int(found[0][1]) * int(found[1][1]) if found[0] and found[1] else None


def run_status(folder: Path, check: bool = False, alive: bool | None = None) -> RunStatus:
    """The state of one run; ``alive``: whether its job runs, None if nobody knows."""
    metrics = read_metrics(folder) if (folder / METRICS_FILE).is_file() else None
    log = max(result_files(folder), key=lambda file: file.stat().st_mtime, default=None)
    files = [file for file in (folder / METRICS_FILE, log) if file is not None and file.exists()]
    silent_s = max(0.0, time.time() - max(file.stat().st_mtime for file in files or [folder]))
    state = _state(metrics, log, alive, silent_s)
    config = _config(folder)
    minutes, planned, left, at_most = _times(metrics, config, state)
    evaluated = metrics is not None and len(metrics.eval_step) > 0
    loads = read_loads(folder, log.name.split(".")[0] if log is not None else None)
    return RunStatus(
        folder,
        state,
        step=int(metrics.step[-1]) if metrics is not None and len(metrics.step) else None,
        lddt_ca=float(metrics.eval_lddt_ca[-1]) if metrics is not None and evaluated else None,
        lddt_step=int(metrics.eval_step[-1]) if metrics is not None and evaluated else None,
        target=metrics.run.get("target") if metrics is not None else None,
        minutes=minutes,
        planned=planned,
        minutes_left=left,
        at_most=at_most,
        silent_s=silent_s,
        verdict=_verdict(log, check) if log is not None and state in (*DONE, "stopped") else None,
        slowest=_slowest(loads),
        gpu_kwh=loads.energy_kwh,
    )


def _slowest(loads: Loads) -> str | None:
    """The rank that holds the others up, if one does, and how."""
    if (load := loads.slowest) is None:
        return None
    clock = f", SM clock {load.clock_mhz:.0f} MHz" if load.clock_mhz is not None else ""
    waits = f"waits {load.data_ms or 0.0:.0f} ms for data{clock}"
    return f"slowest rank {load.rank} on {load.node}: {waits}, may cost {load.lag_ms:.0f} ms per step"


def _state(metrics: Metrics | None, log: Path | None, alive: bool | None, silent_s: float) -> State:
    ended = _log_status(log) if log is not None else None
    if ended == "success":
        return "reached"
    if ended is not None:
        whole = log is not None and (log.parent / "finished").exists()
        return "missed" if whole else "stopped"
    if alive is False:
        return "stopped"
    if alive is None and silent_s > SILENT_S:
        return "silent"
    return "running" if metrics is not None and len(metrics.step) else "starting"


def _log_status(log: Path) -> str | None:
    try:
        return read_log(log).status
    except LogError:
        return None  # being written


def _config(folder: Path) -> Config | None:
    file = folder / "config.yaml"
    try:
        return load_config(file).config if file.is_file() else None
    except ConfigError:
        return None  # written by another version: no plan, but everything else


def _times(
    metrics: Metrics | None, config: Config | None, state: State
) -> tuple[float | None, float | None, float | None, bool]:
    """Minutes so far, planned, left, and whether the last is only an upper bound."""
    known = [t for t in metrics.time_s if t == t] if metrics is not None else []
    minutes = float(known[-1]) / 60 if known else None
    if config is None or metrics is None or state not in ("running", "starting"):
        return minutes, None, None, False
    planned = _planned_minutes(config)
    if planned is not None:
        return minutes, planned, max(0.0, planned - (minutes or 0.0)), False
    recent = [ms for ms in metrics.step_ms[-RECENT_STEPS:] if ms == ms]
    if not recent:
        return minutes, None, None, False
    steps_left = max(0, config.training.num_train_iters - int(metrics.step[-1]))
    return minutes, None, steps_left * sum(recent) / len(recent) / 60e3, True


def _planned_minutes(config: Config) -> float | None:
    try:
        return plan(system_spec(config)).minutes
    except ConfigError:
        return None


def _verdict(log: Path, check: bool) -> str:
    """The check's headline: kept beside the log, or found now."""
    kept = log.with_name(VERDICT_FILE)
    if not check and kept.is_file() and kept.stat().st_mtime >= log.stat().st_mtime:
        facts: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        if facts.get("log") == log.name:
            return str(facts["headline"])
    headline = _headline(log, log.stat().st_mtime_ns)
    if check:
        temporary = kept.with_suffix(".tmp")
        temporary.write_text(json.dumps({"log": log.name, "headline": headline}) + "\n", encoding="utf-8")
        temporary.replace(kept)
    return headline


@functools.lru_cache(maxsize=256)
def _headline(log: Path, _mtime_ns: int) -> str:
    """What the official checker and our rules say of a log; a file that changed is judged anew."""
    try:
        return check_log(log).headline
    except LogError as error:
        return f"invalid: {error}"


def watch(what: str | None, every_s: float) -> Iterator[list[JobStatus]]:
    """The status, again and again, until everything is over."""
    while True:
        jobs = status(what)
        yield jobs
        if all(job.is_over for job in jobs):
            return
        time.sleep(every_s)
