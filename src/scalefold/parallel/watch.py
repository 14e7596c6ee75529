"""No rank waits for ever: signs of life, two timeouts, and one message that names who is missing.

A thread of every rank writes a sign of life (host, step, activity, collective it waits in) into the run's key-value
store every few seconds and reads that of its right neighbour. Three things end a run, each within the timeout of its
part (``parallel.startup_timeout_s`` until the first step is through and for evaluations, checkpoints and warm-up,
``parallel.step_timeout_s`` otherwise), and a collective waits as long as the activity that it belongs to:

* this rank makes no progress for the timeout;
* the neighbour gives no sign for half the timeout: it was killed or its node is gone;
* some rank failed and left its reason in the store, or rank 0 is gone with the store.

The first rank that notices writes the verdict; all others repeat it and exit with the same status. No clocks are
compared between nodes: a sign is old if it does not change.
"""

import datetime
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

import torch.distributed as dist
from torch._C import _distributed_c10d as c10d
from torch._C._distributed_c10d import PrefixStore, Store

from scalefold.errors import RankLostError

SLOWEST_BEAT_S, FASTEST_BEAT_S = 5.0, 0.2
GRACE_S = 30.0  # process groups time out this much later than the watch, whose message says more
UNLIMITED = ("waiting for weights",)
PATIENT = ("evaluation", "checkpoint", "warm-up")
_PACKAGE = Path(__file__).resolve().parents[1]
_EXCHANGES = ("parallel/", "step/reducer.py", "eval/snapshots.py")  # where our own calls exchange


@dataclass(frozen=True)
class Sign:
    """A rank's sign of life; ``since_s`` is how long it has been at this activity, ``beat`` counts signs."""

    rank: int
    host: str
    pid: int
    beat: int
    step: int
    activity: str
    since_s: float
    call: str | None = None

    def text(self) -> str:
        """``rank 3 on node07 (pid 4711) at step 12, training step for 31 s, in all_reduce at ddp.py:63``."""
        call = f", in {self.call}" if self.call else ""
        where = f"at step {self.step}, {self.activity}" if self.step else f"at {self.activity}"
        return f"rank {self.rank} on {self.host} (pid {self.pid}) {where} for {self.since_s:.0f} s{call}"


class Watch:
    """The sign of life of one rank, and its judgement of the others.

    Args:
        rank, world_size: this rank among all.
        store: the run's key-value store; a connection of its own is made. None: a single process, nothing to watch.
        startup_timeout_s, step_timeout_s: the two timeouts.
        peers: the ranks that this one exchanges with in a step (training or evaluation ranks), itself included.
    """

    def __init__(
        self,
        rank: int = 0,
        world_size: int = 1,
        store: Store | None = None,
        startup_timeout_s: float = 1800,
        step_timeout_s: float = 600,
        peers: Sequence[int] = (),
    ) -> None:
        self.peers = list(peers)
        self.rank, self.world_size = rank, world_size
        self.startup_timeout_s, self.step_timeout_s = float(startup_timeout_s), float(step_timeout_s)
        self.beat_s = min(SLOWEST_BEAT_S, max(FASTEST_BEAT_S, min(startup_timeout_s, step_timeout_s) / 8))
        self.groups: list[dist.ProcessGroup] = []  # their own timeout follows the activity
        self._groups_wait_s = self.startup_timeout_s
        self.before_exit: Callable[[], None] = lambda: None
        self.last_words: Callable[[BaseException], None] = lambda error: None
        self._store = own_connection(store) if store is not None else None
        self._activity, self._step, self._since = "start-up", 0, time.monotonic()
        self._first_step: int | None = None
        self._stepping = False
        self._beats = 0
        self._main = threading.main_thread().ident or 0
        self._neighbour: tuple[int, float] = (-1, time.monotonic())
        self._explaining, self._broken_call = False, None
        self._speaker: list[int] = []  # the thread that ends this process and prints why; the other keeps silent
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._asked: dict[int, float] = {}  # since when a thread waits for the store
        self._root: Sign | None = None

    def start(self) -> None:
        """Give the first sign and go on giving signs."""
        if self._store is not None:
            self._beat(self._store)
            self._thread = threading.Thread(target=self._run, args=(self._store,), name="watch", daemon=True)
            self._thread.start()
            threading.Thread(target=self._guard, name="store-guard", daemon=True).start()

    def stop(self) -> None:
        """Give no more signs; the run is ending in an orderly way."""
        self._stopped.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def at(self, activity: str, step: int = 0) -> None:
        """Say what the main thread does from now on; costs nothing worth mentioning.

        The step after the first one that ran here starts the second, short timeout.
        """
        self._activity, self._step, self._since = activity, step or self._step, time.monotonic()
        self._first_step = self._first_step or step or None
        if not self._stepping and self._first_step is not None and self._step > self._first_step:
            self._stepping = True
        self._fit_groups()

    @property
    def limit_s(self) -> float | None:
        """How long the present activity may last; None for waits that depend on nobody's health."""
        if self._activity in UNLIMITED:
            return None
        patient = not self._stepping or self._activity in PATIENT
        return self.startup_timeout_s if patient else self.step_timeout_s

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None and (reason := self.explain(error)) is not error:
            raise reason from error

    def explain(self, error: BaseException) -> BaseException:
        """What to raise instead of ``error`` on this rank, after telling the other ranks.

        A failed collective becomes a ``RankLostError`` that names the rank behind it; anything else stays as it is.
        """
        store, self._broken_call, self._explaining = self._store, call_of(error), True
        if store is None or isinstance(error, RankLostError):
            return error
        if not self._speaks() and self._thread is not None:
            self._thread.join()  # never returns: that thread is ending this process
        try:
            if not is_collective_error(error):
                self._agree(store, f"{self.sign().text()} failed: {type(error).__name__}: {first_line(error)}")
                self._linger()
                return error
            verdict = self._await_verdict(store) or self._agree(store, self._diagnosis(store, first_line(error)))
            self._linger()
        except dist.DistError:
            verdict = self._store_is_gone()
        return RankLostError(verdict)

    def sign(self) -> Sign:
        """This rank's present sign of life."""
        since_s = time.monotonic() - self._since
        call = self._broken_call if self._explaining else waiting_in(sys._current_frames().get(self._main))
        return Sign(
            self.rank, socket.gethostname(), os.getpid(), self._beats, self._step, self._activity, since_s, call
        )

    def _fit_groups(self) -> None:
        """Let what is called from now on wait for a rank that takes as long as the present activity may."""
        limit_s = self.limit_s
        if limit_s is None or limit_s == self._groups_wait_s:
            return
        self._groups_wait_s = limit_s
        for group in self.groups:
            dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=limit_s + GRACE_S), group)

    def _run(self, store: Store) -> None:
        try:
            self._root = self._read(store, 0)
            while not self._stopped.wait(self.beat_s):
                self._beat(store)
                if self._explaining:
                    continue
                verdict = self._verdict(store) or self._judge(store)
                if verdict and not self._stopped.is_set():
                    self._exit(verdict)
        except dist.DistError:
            if not self._stopped.wait(self.beat_s) and not self._explaining:
                self._exit(self._store_is_gone())

    def _beat(self, store: Store) -> None:
        self._beats += 1
        with self._asking():
            store.set(f"sign_{self.rank}", json.dumps(asdict(self.sign())))

    def _judge(self, store: Store) -> str | None:
        """A verdict of our own: this rank stands still, or its neighbour gives no sign."""
        limit_s = self.limit_s
        if limit_s is not None and time.monotonic() - self._since > limit_s:
            return self._agree(store, self._diagnosis(store, f"no progress within {limit_s:.0f} s"))
        now, beat = time.monotonic(), self._read(store, (self.rank + 1) % self.world_size).beat
        if beat != self._neighbour[0]:
            self._neighbour = (beat, now)
        if now - self._neighbour[1] > self.patience_s:
            return self._agree(store, self._diagnosis(store, f"no sign of a rank for {self.patience_s:.0f} s"))
        return None

    @property
    def patience_s(self) -> float:
        """How long another rank, or the store, may give no sign."""
        return (self.step_timeout_s if self._stepping else self.startup_timeout_s) / 2

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """Inside, this thread waits for the store, which nothing but ``_guard`` ends if its host stands still."""
        self._asked[threading.get_ident()] = time.monotonic()
        try:
            yield
        finally:
            del self._asked[threading.get_ident()]

    def _guard(self) -> None:
        """End this process once the store has owed an answer for too long; no thread that waits for it can."""
        while not self._stopped.wait(self.beat_s):
            waited_s = time.monotonic() - min(list(self._asked.values()), default=time.monotonic())
            if waited_s > self.patience_s:
                self._end(self._store_is_silent(waited_s))

    def _diagnosis(self, store: Store, reason: str) -> str:
        """Look at all ranks twice, some beats apart, and say who is to blame."""
        before = [self._read(store, rank).beat for rank in range(self.world_size)]
        for _ in range(3):
            time.sleep(self.beat_s)
            if threading.get_ident() == (self._thread.ident if self._thread else None):
                self._beat(store)
        signs = [self._read(store, rank) for rank in range(self.world_size)]
        silent = [s for s in signs if s.beat == before[s.rank] and s.rank != self.rank]
        return f"{self.sign().text()}: {reason}. {blame([signs[rank] for rank in self.peers], silent)}"

    def _read(self, store: Store, rank: int) -> Sign:
        with self._asking():
            return Sign(**json.loads(store.get(f"sign_{rank}")))

    def _verdict(self, store: Store) -> str | None:
        with self._asking():
            return store.get("verdict").decode() if store.check(["verdict"]) else None

    def _agree(self, store: Store, verdict: str) -> str:
        """The first verdict of the run: ours, or the one that another rank was quicker to write."""
        with self._asking():
            return store.compare_set("verdict", "", verdict).decode()

    def _await_verdict(self, store: Store) -> str | None:
        """The verdict of a rank that failed by itself, which comes before its connections break."""
        for _ in range(3):
            if verdict := self._verdict(store):
                return verdict
            time.sleep(self.beat_s / 3)
        return None

    def _speaks(self) -> bool:
        """Whether it is this thread that tells why the process ends: the first of the two that asks."""
        self._speaker.append(threading.get_ident())  # an atomic operation: no lock
        return self._speaker[0] == threading.get_ident()

    def _linger(self) -> None:
        """Rank 0 may hold the store: leave the others time to read the verdict."""
        if self.rank == 0:
            time.sleep(2 * self.beat_s)

    def _store_is_gone(self) -> str:
        return (
            f"{self.sign().text()}: the run's key-value store no longer answers: rank 0 has ended or its node is gone. "
            "Look at the last lines of rank 0; continue from the last checkpoint with --resume"
        )

    def _store_is_silent(self, waited_s: float) -> str:
        root = f"rank 0 on {self._root.host} (pid {self._root.pid})" if self._root else "rank 0"
        return (
            f"{self.sign().text()}: the run's key-value store has not answered for {waited_s:.0f} s: {root}, which "
            "holds it, stands still or its node is gone. Look at that node; continue from the last checkpoint with "
            "--resume"
        )

    def _exit(self, verdict: str) -> None:
        """End this process whatever its main thread waits for; a collective on a GPU cannot be interrupted."""
        if self._speaks():
            self._end(verdict, self._linger)

    def _end(self, verdict: str, linger: Callable[[], None] = lambda: None) -> None:
        print(f"error: {verdict}", file=sys.stderr, flush=True)
        linger()
        self.before_exit()
        self.last_words(RankLostError(verdict))
        os._exit(RankLostError.exit_status)


def own_connection(store: Store) -> Store:
    """A second connection to the run's store: a main thread that waits in the first one would hold it."""
    return PrefixStore("watch", store.clone())  # pyright: ignore[reportAttributeAccessIssue]


@contextmanager
def bounded(limit_s: float, give_up: Callable[[], None]) -> Iterator[None]:
    """Inside, a thread calls ``give_up`` after ``limit_s``: that must end the process, for nothing else can."""
    timer = threading.Timer(limit_s, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def blame(signs: list[Sign], silent: list[Sign]) -> str:
    """Name the ranks that the others wait for, and what to do about it."""
    again = "continue from the last checkpoint with --resume"
    if silent:
        names = f"Gave no more sign of life, last seen: {listed(silent)}"
        return f"{names}. Look at the last lines of these ranks and for out-of-memory kills on their nodes; {again}"
    busy = [s for s in signs if s.activity not in UNLIMITED]
    outside = [s for s in busy if s.call is None]
    last = [s for s in busy if s.step == min(s.step for s in busy)]
    late = outside if 0 < len(outside) < len(busy) else last
    if len(late) < len(busy):
        return (
            f"All ranks are alive; the others wait for: {listed(late)}. If it is allowed to take that long, raise "
            f"parallel.step_timeout_s (startup_timeout_s before the first step); else {again}"
        )
    return (
        f"All ranks are alive and wait for each other at step {busy[0].step}: suspect the network; run again with "
        f"NCCL_DEBUG=INFO and launch.network_check_gb_per_s, {again}"
    )


def listed(signs: list[Sign], most: int = 8) -> str:
    """The first few signs as text."""
    more = f" and {len(signs) - most} more" if len(signs) > most else ""
    return "; ".join(sign.text() for sign in signs[:most]) + more


def waiting_in(frame: FrameType | None) -> str | None:
    """The collective or device wait that a thread is in, with our line behind it: ``all_reduce at ddp.py:63``."""
    name, depth = None, 0
    while frame is not None:
        file = frame.f_code.co_filename
        if file.endswith("distributed_c10d.py"):
            name = frame.f_code.co_name
        elif file.endswith(os.path.join("torch", "cuda", "streams.py")):
            name = "wait for the device"
        elif file.startswith(str(_PACKAGE)):
            ours = Path(file).relative_to(_PACKAGE)
            if depth == 0 and ours.as_posix().startswith(_EXCHANGES):  # C++ work objects leave no frame of their own
                name = pending_collective() or "an exchange"
            return f"{name} at {ours}:{frame.f_lineno}" if name else None
        frame, depth = frame.f_back, depth + 1
    return name


def pending_collective() -> str | None:
    """The last collective that PyTorch's flight recorder knows to be unfinished, for example ``gloo:all_reduce``."""
    dump = getattr(c10d, "_dump_nccl_trace_json", None) or getattr(c10d, "_dump_fr_trace_json", None)
    entries = json.loads(dump()).get("entries", []) if dump is not None else []
    names = [entry["profiling_name"] for entry in entries if not entry.get("retired", True)]
    return names[-1] if names else None


def is_collective_error(error: BaseException) -> bool:
    """Whether an exchange with other ranks failed, rather than this rank's own work."""
    text = str(error)
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and ("gloo" in text or "NCCL" in text or "Connection closed by peer" in text)
    )


def call_of(error: BaseException) -> str | None:
    """The collective that ``error`` came out of, if it did."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return waiting_in(trace.tb_frame) if trace is not None else None


def first_line(error: BaseException) -> str:
    """The first line of an error's text, without the source file that gloo puts in front."""
    return re.sub(r"^\[[^]]*\] ", "", (str(error).splitlines() or [type(error).__name__])[0])
