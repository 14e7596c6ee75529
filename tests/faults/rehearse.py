"""Runs a scenario with the command line, in forked processes, and looks at what is left."""

import contextlib
import logging
import multiprocessing as mp
import multiprocessing.forkserver
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path

from scenarios import STEP_TIMEOUT_S, Scenario

from processes import free_port
from runs import SMALLEST, TINY

LIMIT_S = 240.0
LOOK_S = 0.02
MARK = "REHEARSAL_OF_TEST"
SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Ended:
    """How the ranks ended: exit statuses and outputs by rank, and the seconds from the fault to the last one's end."""

    statuses: tuple[int, ...]
    outputs: list[str]
    seconds: float
    left: list[str]

    def errors(self, rank: int) -> list[str]:
        """The error lines of a rank."""
        return [line for line in self.outputs[rank].splitlines() if line.startswith("error: ")]


def rehearse(scenario: Scenario, store: Path, folder: Path) -> Ended:
    """Start the run, do the damage, wait for all ranks; a rank that the fault stops is killed when the others ended."""
    if scenario.before is not None:
        scenario.before(store)
    count, port = 2 if any("ranks_per_node=2" in item for item in scenario.layout) else 1, free_port()
    before, mark = set(shared_memory()), str(folder)
    outputs = [folder / f"output_{rank}.txt" for rank in range(count)]
    command = arguments(scenario, store, folder / "run")
    context = mp.get_context("fork")
    processes = [
        context.Process(target=_rank, args=(rank, count, port, command, outputs[rank], mark)) for rank in range(count)
    ]
    for process in processes:
        process.start()
    try:
        hit = _await_fault(scenario, store, folder / "run", outputs, processes)
        if scenario.sigterm:
            time.sleep(0.5)
            os.kill(processes[0].pid or 0, signal.SIGTERM)
        deadline = time.monotonic() + LIMIT_S
        others = [process for rank, process in enumerate(processes) if rank != scenario.frozen]
        for process in others:
            process.join(max(0.1, deadline - time.monotonic()))
        seconds = time.monotonic() - hit
    finally:
        for process in processes:
            process.kill()
            process.join()
    statuses = tuple(process.exitcode or 0 for process in processes)
    return Ended(statuses, [read(output) for output in outputs], seconds, left_behind(mark, before, folder / "run"))


def arguments(scenario: Scenario, store: Path, run_dir: Path) -> list[str]:
    """What a user would type."""
    timeouts = (f"parallel.step_timeout_s={STEP_TIMEOUT_S}", "parallel.startup_timeout_s=60")
    places = (f"data.store_dir={store}", f"run.run_dir={run_dir}")
    faults = ("--inject", scenario.inject) if scenario.inject else ()
    return [
        *("scalefold", "train", str(TINY), *SMALLEST, "run.checkpoint_every_iters=1", *timeouts, *places),
        *(*scenario.layout, *faults),
    ]


def _rank(rank: int, count: int, port: int, command: list[str], output: Path, mark: str) -> None:
    """One process of the run, as if its program had just been started."""
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = (open(fd, "w", buffering=1, encoding="utf-8", closefd=False) for fd in (1, 2))  # noqa: SIM115
    os.environ[MARK] = mark
    if count > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
        os.environ.update({key: str(value) for key, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"})
    logging.getLogger().handlers.clear()
    _forget_helpers()
    sys.argv = command
    from scalefold.cli import main

    main()


def _forget_helpers() -> None:
    """The fork server and the tracker of the process that was forked are not this one's."""
    server, tracker = multiprocessing.forkserver._forkserver, resource_tracker._resource_tracker  # type: ignore[attr-defined]
    server._forkserver_address = server._forkserver_alive_fd = server._forkserver_pid = None
    tracker._fd = tracker._pid = None


def _await_fault(
    scenario: Scenario, store: Path, run_dir: Path, outputs: list[Path], processes: list[mp.process.BaseProcess]
) -> float:
    """When the fault hit, by the monotonic clock; damages the store when its time has come."""
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline and any(process.is_alive() for process in processes):
        if scenario.inject and any("injecting" in read(output) for output in outputs):
            break
        if not scenario.inject and '"kind": "step"' in read(run_dir / "metrics.jsonl"):
            break
        time.sleep(LOOK_S)
    if scenario.during is not None:
        scenario.during(store)
    return time.monotonic()


def read(file: Path) -> str:
    """A file's text so far."""
    return file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""


def shared_memory() -> Iterator[str]:
    """Names of shared memory that belong to runs."""
    for file in SHARED_MEMORY.glob("*"):
        if re.match(r"(scalefold|torch)_", file.name):
            yield file.name


def left_behind(mark: str, before: set[str], run_dir: Path) -> list[str]:
    """Processes, shared memory and unfinished files that outlive the run, once they have had time to end."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and marked(mark):
        time.sleep(LOOK_S)
    memory = [name for name in set(shared_memory()) - before if not _alive(name)]
    unfinished = [str(f) for f in run_dir.rglob("*") if f.name.endswith((".partial", ".tmp")) or ".tmp." in f.name]
    return [*(f"process {pid}" for pid in marked(mark)), *memory, *unfinished]


def marked(mark: str) -> list[str]:
    """Processes of this machine with ``mark`` in their environment, those of the run that were not forked from here."""
    found, wanted = [], f"{MARK}={mark}\0".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if wanted in (folder / "environ").read_bytes():
                found.append(folder.name)
    return found


def _alive(name: str) -> bool:
    """Whether the process in the name of shared memory lives: then it is another run's."""
    numbers = re.findall(r"\d+", name)
    return any(Path(f"/proc/{number}").exists() for number in numbers[:1])
