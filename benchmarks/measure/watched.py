"""Programs under watch: every process of a start is known by a mark in its environment, whoever started it.

Ends that hang are cut short: SIGABRT first, so that Python's fault handler writes the stack of every thread, then
SIGKILL for whatever is left.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

MARK = "SCALEFOLD_WATCHED"
LEFT_AFTER_S = 15.0  # processes that outlive their launcher by this much are left behind
DUMP_S = 10.0  # for the fault handler to write all stacks
# Around a rank: torchrun tells the status of the first rank that fails only. The trap keeps the shell alive on signals.
STATUS_OF_RANK = 'trap : TERM USR1 INT; "$@"; status=$?; echo "$status" >"$0/rank_$RANK.status"; exit "$status"'


@dataclass(frozen=True)
class Process:
    """A process of a start: ``rank`` as its launcher states it, empty outside a launcher."""

    pid: int
    command: str
    rank: str

    @property
    def is_rank(self) -> bool:
        """Whether it is a rank's own process: neither launcher, nor shell, nor a worker."""
        words = self.command.split()
        return "scalefold" in words and "train" in words and words[0] != "sh" and "torch.distributed.run" not in words


def processes(mark: str) -> list[Process]:
    """All live processes that carry ``mark``."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            variables = (folder / "environ").read_bytes().split(b"\0")
            if f"{MARK}={mark}".encode() in variables:
                rank = next((v[5:].decode() for v in variables if v.startswith(b"RANK=")), "")
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                found.append(Process(int(folder.name), command, rank))
        except OSError:  # it ended meanwhile, or belongs to somebody else
            continue
    return found


def send(targets: Sequence[Process], signum: signal.Signals) -> None:
    """One signal to each process that still exists."""
    for process in targets:
        try:
            os.kill(process.pid, signum)
        except ProcessLookupError:
            continue


def torchrun(ranks: int, folder: Path, port: int, command: Sequence[str]) -> list[str]:
    """``command`` on several ranks of this host; their exit statuses land in ``folder``."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    place = ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    return [*launcher, *place, "--no-python", "sh", "-c", STATUS_OF_RANK, str(folder), *command]


@dataclass
class Watched:
    """One start. ``folder`` gets ``output.txt``; after ``limit_s`` it is judged to hang.

    ``ended_at`` (seconds since the epoch, like the log's) is the end of its last process; ``left`` names processes
    that outlived the launcher.
    """

    command: list[str]
    folder: Path
    environment: Mapping[str, str]
    limit_s: float
    ranks: int = 1
    began_at: float = 0.0
    ended_at: float | None = None
    hung: bool = False
    left: list[str] = field(default_factory=list)
    _launcher: "subprocess.Popen[bytes] | None" = None
    _launcher_ended: float | None = None

    @property
    def mark(self) -> str:
        """What tells this start's processes from all others."""
        return f"{os.getpid()}:{self.folder}"

    def start(self) -> None:
        """Start the command in a session of its own."""
        self.folder.mkdir(parents=True)
        variables = {"PYTHONFAULTHANDLER": "1", "PYTHONUNBUFFERED": "1", MARK: self.mark}
        self.began_at = time.time()
        with (self.folder / "output.txt").open("wb") as output:
            self._launcher = subprocess.Popen(
                self.command,
                env={**os.environ, **self.environment, **variables},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def seconds(self) -> float:
        """Since it was started."""
        return time.time() - self.began_at

    def poll(self) -> bool:
        """Whether the last process has ended; call it often. Hanging and left processes are ended here."""
        if self.ended_at is not None:
            return True
        assert self._launcher is not None, "start comes first"
        if self._launcher.poll() is None:
            if self.seconds() > self.limit_s:
                self.cut_short()
            return self.ended_at is not None
        self._launcher_ended = self._launcher_ended or time.time()
        left = processes(self.mark)
        if left and time.time() - self._launcher_ended < LEFT_AFTER_S:
            return False
        self.left = [f"process {process.pid}: {process.command[:80]}" for process in left]
        send(left, signal.SIGKILL)
        self.ended_at = time.time()
        return True

    def cut_short(self) -> None:
        """End what hangs, its stacks written first."""
        self.hung = True
        send([process for process in processes(self.mark) if process.is_rank], signal.SIGABRT)
        until = time.monotonic() + DUMP_S
        while time.monotonic() < until and any(process.is_rank for process in processes(self.mark)):
            time.sleep(0.1)
        self.end()

    def end(self) -> None:
        """Kill every process of this start at once."""
        if self.ended_at is None and self._launcher is not None:
            send(processes(self.mark), signal.SIGKILL)
            self._launcher.kill()
            self._launcher.wait()
            self.ended_at = time.time()

    def ask_to_stop(self) -> None:
        """SIGTERM to the launcher, which passes it on to its ranks, or to the only process."""
        assert self._launcher is not None
        self._launcher.send_signal(signal.SIGTERM)

    def kill_rank(self, rank: int) -> None:
        """SIGKILL to one rank."""
        send([p for p in processes(self.mark) if p.is_rank and p.rank == str(rank)], signal.SIGKILL)

    def statuses(self) -> list[int | None]:
        """Exit status of every rank as a shell states it (128 + signal); None: killed with its shell."""
        assert self._launcher is not None
        if self.ranks == 1:
            status = self._launcher.returncode
            return [None if status is None or self.hung else status if status >= 0 else 128 - status]
        files = [self.folder / f"rank_{rank}.status" for rank in range(self.ranks)]
        return [int(file.read_text()) if file.exists() and file.read_text().strip() else None for file in files]

    def output(self) -> list[str]:
        """Lines printed so far."""
        return (self.folder / "output.txt").read_text(errors="replace").splitlines()
