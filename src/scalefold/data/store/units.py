"""Units of a preparation: pieces of raw data that become one shard each, spread over processes and nodes.

Each leaves a small JSON file (its sidecar) in ``work/``, renamed into place when complete; units that have one are not
prepared again.
"""

import json
import multiprocessing
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scalefold.data.raw.rawlayout import Plan, RawFile, RawLayout
from scalefold.data.store import labels
from scalefold.data.store.manifest import write_atomically
from scalefold.errors import DataError


@dataclass(frozen=True)
class Team:
    """The processes that prepare one store together: this one's rank, how many there are, how they wait."""

    rank: int = 0
    size: int = 1
    barrier: Callable[[], object] = lambda: None


def mpi_team() -> Team:
    """The MPI world as a team. Raises DataError if mpi4py is not installed."""
    try:
        from mpi4py import MPI  # type: ignore[import-not-found]
    except ImportError:
        raise DataError("preparing over several nodes needs mpi4py: pip install 'scalefold[mpi]'") from None
    world = MPI.COMM_WORLD
    return Team(world.Get_rank(), world.Get_size(), world.Barrier)


@dataclass(frozen=True)
class Job:
    """One preparation, as all its stages see it."""

    out_dir: Path
    layout: RawLayout
    plan: Plan
    inputs: labels.Inputs
    reference_equality: bool

    def sidecar(self, phase: str, number: int) -> Path:
        return self.out_dir / "work" / f"{phase}-{number:05d}.json"

    def read_sidecars(self, phase: str, count: int) -> Iterable[tuple[int, dict]]:
        for number in range(count):
            yield number, read_json(self.sidecar(phase, number))


@dataclass(frozen=True)
class Unit:
    """Everything a worker process needs for one unit."""

    out_dir: Path
    layout: RawLayout
    number: int
    files: list[RawFile]
    members: dict[str, list[str]]
    reference_equality: bool
    sidecar: Path


def run_units(
    phase: str,
    work: Callable[[Unit], dict],
    job: Job,
    units: list[list[RawFile]],
    num_workers: int,
    team: Team,
    report: Callable[[str], None],
) -> int:
    """Prepare this rank's missing units of a phase; returns their number."""
    missing = [n for n in range(team.rank, len(units), team.size) if not job.sidecar(phase, n).is_file()]
    tasks = [
        Unit(
            job.out_dir,
            job.layout,
            number,
            units[number],
            {file.path: job.plan.members.get(file.path, []) for file in units[number]},
            job.reference_equality,
            job.sidecar(phase, number),
        )
        for number in missing
    ]
    progress = Progress(phase, sum(f.text_bytes for t in tasks for f in t.files), len(tasks), report)
    if num_workers <= 1 or len(tasks) <= 1:
        for task in tasks:
            progress.add(run_unit(work, task))
        return len(tasks)
    # spawn: a forked child would share HDF5 state with this process
    with ProcessPoolExecutor(num_workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for future in as_completed([pool.submit(run_unit, work, task) for task in tasks]):
            progress.add(future.result())
    return len(tasks)


def run_unit(work: Callable[[Unit], dict], task: Unit) -> tuple[int, int]:
    """Prepare one unit and leave its sidecar; returns (items, text bytes)."""
    result = work(task)
    write_atomically(task.sidecar, json.dumps(result, separators=(",", ":")))
    return len(task.files), sum(file.text_bytes for file in task.files)


class Progress:
    def __init__(self, phase: str, total_bytes: int, num_units: int, report: Callable[[str], None]) -> None:
        self.phase, self.total, self.num_units, self.report = phase, max(total_bytes, 1), num_units, report
        self.started, self.last = time.monotonic(), 0.0
        self.items = self.bytes = self.units = 0

    def add(self, done: tuple[int, int]) -> None:
        self.items, self.bytes, self.units = self.items + done[0], self.bytes + done[1], self.units + 1
        elapsed = time.monotonic() - self.started
        if elapsed - self.last < 2.0 and self.units < self.num_units:
            return
        self.last = elapsed
        remaining_s = elapsed * (self.total - self.bytes) / max(self.bytes, 1)
        self.report(
            f"{self.phase}: {self.units}/{self.num_units} units, {self.items} items, "
            f"{self.items / max(elapsed, 1e-9):.1f} items/s, {self.bytes / 1e6 / max(elapsed, 1e-9):.1f} MB/s, "
            f"about {remaining_s / 60:.1f} min left"
        )


def reason_of(error: Exception) -> str:
    """One line. A defect must not stop the preparation of the other half a million chains, but is named as one."""
    text = " ".join(str(error).split())
    return text if isinstance(error, DataError) else f"unexpected {type(error).__name__}: {text}"


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); remove it and run prepare again") from None
