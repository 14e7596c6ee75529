"""Runs that belong together: those of one system, told apart by what they state about themselves.

Minutes and samples of a system are those of the same runs: of three or more the fastest and the slowest are left out,
and one run that missed the target counts as the slowest, as the rules of MLPerf score. The verdict of a check speaks
for all systems at once.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any

from scalefold.errors import LogError
from scalefold.mlperf.judge.lint import run_begins, several_runs
from scalefold.mlperf.judge.rcp import reference_convergence
from scalefold.mlperf.judge.score import scaling_of
from scalefold.mlperf.log.keys import BENCHMARK
from scalefold.mlperf.log.logfile import read_log
from scalefold.report.logs import Run

#: What all runs of one system have in common; ``ranks`` and ``platform`` under either of their names.
_NAMES = {
    "org": ("submission_org",),
    "platform": ("submission_platform", "config_name", "config"),
    "ranks": ("number_of_ranks", "world_size"),
    "batch": ("global_batch_size",),
    "precision": ("precision",),
    "parameters": ("model_parameters_count", "parameters"),
}
_FEW = 6


@dataclass(frozen=True)
class System:
    """Runs of one configuration on one machine; ``label`` stands in legends and headings."""

    label: str
    runs: tuple[Run, ...]

    @property
    def first(self) -> Run:
        """A run that speaks for all: they state the same."""
        return self.runs[0]

    @property
    def is_throughput(self) -> bool:
        """Whether the runs are instances of a weak-scaling result, by the folder that holds them."""
        log = self.first.log
        return log is not None and scaling_of(log.path.parent) == "weak"

    @property
    def scored(self) -> list[Run]:
        """The runs behind minutes and samples; empty while a run goes on or when two missed the target."""
        minutes = [run.minutes for run in self.runs if _converged(run)]
        missed = len(self.runs) - len(minutes)
        if missed and (missed > 1 or len(self.runs) < 3 or any(r.minutes is None for r in self.runs)):
            return []
        ordered = sorted(self.runs, key=lambda run: run.minutes or 0.0 if _converged(run) else float("inf"))
        return ordered if len(ordered) < 3 or self.is_throughput else ordered[1:-1]

    @property
    def minutes(self) -> float | None:
        """Mean minutes of the scored runs."""
        return mean(run.minutes or 0.0 for run in self.scored) if self.scored else None

    @property
    def samples(self) -> float | None:
        """Mean samples to converge of the same runs."""
        found = [run.log.passing.samples for run in self.scored if run.log and run.log.passing]
        return mean(found) if found else None

    @property
    def floor_samples(self) -> float | None:
        """Samples below which the reference does not let a result converge at this batch; None if not the benchmark."""
        batch = self.first.facts.get("global_batch_size")
        known = reference_convergence(batch) if self.first.is_benchmark and isinstance(batch, int) else None
        return None if known is None else known.floor_samples


def _converged(run: Run) -> bool:
    """Whether a run has stopped with success, its target met."""
    return run.log is not None and run.minutes is not None and run.log.status == "success" and bool(run.log.passing)


def by_system(runs: Sequence[Run]) -> list[System]:
    """Systems in the order of their first runs.

    Raises:
        LogError: a log of another benchmark, or a file with several runs.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        _check(run)
        groups.setdefault(repr(_identity(run)), []).append(run)
    short = [_label(found[0], ("org", "platform")) for found in groups.values()]
    full = ("org", "platform", "ranks", "batch", "precision")
    labels = [label if short.count(label) == 1 else _label(found[0], full)
              for label, found in zip(short, groups.values(), strict=True)]  # fmt: skip
    return [System(label, tuple(found)) for label, found in zip(labels, groups.values(), strict=True)]


def _check(run: Run) -> None:
    if run.log is None:
        return
    benchmark = run.facts.get("submission_benchmark", BENCHMARK)
    if benchmark != BENCHMARK:
        raise LogError(f"{run.log.path}: a log of {benchmark}; the report is on {BENCHMARK}")
    if len(starts := run_begins(read_log(run.log.path))) > 1:
        raise LogError(f"{run.log.path}:{starts[1]}: {several_runs(starts)}; split it, each run has its own log")


def _fact(run: Run, name: str) -> Any:
    return next((run.facts[key] for key in _NAMES[name] if key in run.facts), None)


def _identity(run: Run) -> tuple[Any, ...]:
    weak = run.log is not None and scaling_of(run.log.path.parent) == "weak"
    return (run.is_benchmark, weak, *(_fact(run, name) for name in _NAMES))


def _label(run: Run, names: Sequence[str]) -> str:
    units = {"ranks": "{} ranks", "batch": "batch {}"}
    found = [(name, value) for name in names if (value := _fact(run, name)) not in (None, "")]
    return " · ".join(units.get(name, "{}").format(value) for name, value in found) or run.name


@dataclass(frozen=True)
class Line:
    """How a run is drawn: index of its colour, its legend entry if it has one, and whether it is one of many."""

    run: Run
    colour: int
    label: str | None
    is_one_of_many: bool


def lines(systems: Sequence[System], keep: Callable[[Run], Any] = lambda run: True) -> Iterator[Line]:
    """One colour and legend entry per system; of a single system with few runs, per run."""
    for index, system in enumerate(systems):
        runs = [run for run in system.runs if keep(run)]
        by_run = len(systems) == 1 and len(runs) <= _FEW
        for number, run in enumerate(runs):
            named = system.label if len(systems) > 1 and number == 0 else run.name if by_run and len(runs) > 1 else None
            yield Line(run, number if by_run else index, named, len(runs) > 3 and not by_run)


@dataclass(frozen=True)
class Verdict:
    """Outcome of a log check: one headline and the text behind it.

    ``ok``: a valid closed-division log, the only one that gets a green tick; ``well_formed``: not the benchmark, but
    nothing wrong with it.
    """

    ok: bool
    headline: str
    details: str = ""
    well_formed: bool = False


def parse_check(check: Verdict | Mapping[str, Any] | str | None) -> Verdict | None:
    """A verdict from what the caller has: the official checker prints SUCCESS or FAILED as its last word."""
    if check is None or isinstance(check, Verdict):
        return check
    if isinstance(check, Mapping):
        details = check.get("details", "")
        lines = details if isinstance(details, str) else "\n".join(map(str, details))
        headline = str(check.get("headline", "passed" if check["ok"] else "failed"))
        return Verdict(bool(check["ok"]), headline, lines, bool(check.get("well_formed", False)))
    words = [word for line in check.splitlines() for word in ("SUCCESS", "FAILED") if word in line]
    ok = bool(words) and words[-1] == "SUCCESS"
    headline = "The compliance checker accepts the log" if ok else "The compliance checker does not accept the log"
    return Verdict(ok, headline, check)


def closed_only(verdict: Verdict | None, systems: Sequence[System]) -> Verdict | None:
    """A check that passes what is not the closed division's benchmark found it well-formed, no more."""
    closed = [s.first.is_benchmark and s.first.facts.get("submission_division", "closed") == "closed" for s in systems]
    if verdict is None or not verdict.ok or all(closed):
        return verdict
    return replace(verdict, ok=False, well_formed=True)
