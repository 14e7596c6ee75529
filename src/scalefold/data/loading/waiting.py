"""Waiting for worker processes: how long, for whom, and what to say of those that do not deliver."""

from collections.abc import Iterable
from multiprocessing.process import BaseProcess
from pathlib import Path

from scalefold.errors import DataError

LOOK_S = 1.0  # between two looks at whether a wait still makes sense
_STATES = {
    "T": "is stopped (SIGSTOP?)",
    "t": "is held by a debugger",
    "D": "waits for a disk or a network file system",
    "Z": "has ended",
    "X": "has ended",
}


class NotWanted(Exception):
    """Whoever waited for a batch no longer wants it."""


class NoBatch(DataError):
    """Workers have ended, or have not delivered within the limit."""


def always() -> bool:
    """Of a wait that only its limit ends."""
    return True


def process_state(pid: int | None) -> str:
    """The letter that the system gives a process, ``R`` where nobody can say."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "X" if Path("/proc/self/stat").exists() else "R"
    except (OSError, IndexError):
        return "R"


def no_batch_text(workers: Iterable[BaseProcess], limit_s: float) -> str:
    """Why no batch came: the workers that stand, or that all are alive."""
    pids = [worker.pid for worker in workers]
    standing = [f"{pid} {_STATES[state]}" for pid in pids if (state := process_state(pid)) in _STATES]
    if standing:
        return f"no batch within {limit_s:.0f} s: loader worker {', '.join(standing[:8])}; continue with --resume"
    return (
        f"no batch within {limit_s:.0f} s, and all {len(pids)} loader workers are alive: slow storage? If samples may "
        "take that long, raise parallel.step_timeout_s (startup_timeout_s for the first and for evaluations)"
    )


def ended_text(error: Exception) -> str:
    """What an error of PyTorch's data loader means for its user."""
    text = str(error)
    if "open files" in text or "ancdata" in text:
        return "the limit of open files is reached (ulimit -n), so that workers can hand over no batch: raise it"
    return f"a data loader worker ended unexpectedly (out of memory or /dev/shm full?): {text}"


def end_stopped(workers: Iterable[BaseProcess]) -> None:
    """Kill workers that stand still: they can take no message, so nobody could wait for their end."""
    for worker in workers:
        if process_state(worker.pid) in ("T", "t"):
            worker.kill()
