"""Starts of ``gpu_runs.py`` under way: begun when GPUs are free, watched, asked to stop, ended."""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from common import BASE, compile_ahead, device_name, package_path
from gpu_layouts import Plan, Start, command, places, run_dir, settings
from scalefold.report.record import METRICS_FILE
from watched import Watched

END_LIMIT_S = 45  # from run_stop on: longer than the program itself allows for its end


@dataclass
class Ended:
    """How a start ended, and what it left at that moment. ``acted_at``: when it was asked to stop or lost a rank."""

    start: Start
    watched: Watched
    acted_at: float | None
    shared_memory: set[str]
    partial: list[str]

    @property
    def folder(self) -> Path:
        """Copies of its record and log."""
        return self.watched.folder


@dataclass
class Running:
    """A start under way on some GPUs."""

    start: Start
    watched: Watched
    gpus: list[int]
    run: Path
    shared_memory: set[str]
    budget_limit_s: float = float("inf")  # its limit, if the call's budget has set it: no sign of hanging
    acted_at: float | None = None
    looked_after_s: float = 0.0

    def act(self, after_steps: int) -> None:
        """Ask it to stop or kill a rank, once, when it has done ``after_steps`` steps."""
        if not self.start.act or self.acted_at or num_steps(self.run / METRICS_FILE) < after_steps:
            return
        self.acted_at = time.time()
        if self.start.act == "stop":
            self.watched.ask_to_stop()
        else:
            self.watched.kill_rank(self.start.ranks - 1)

    def watch_the_end(self) -> None:
        """Once the log has ``run_stop``, the processes have little time left."""
        if self.watched.seconds() > self.looked_after_s:
            self.looked_after_s = self.watched.seconds() + 0.5
            logs = [file for file in self.run.glob("result_*") if file.stat().st_mtime >= self.watched.began_at]
            if any('"run_stop"' in file.read_text(errors="replace") for file in logs):
                self.looked_after_s = float("inf")
                self.watched.limit_s = min(self.watched.limit_s, self.watched.seconds() + END_LIMIT_S)

    def end(self) -> Ended:
        """What the judgement needs, kept apart: a resumed start goes on in the same folder."""
        for file in [self.run / METRICS_FILE, *self.run.glob("result_*")]:
            if file.is_file() and file.stat().st_mtime >= self.watched.began_at:
                shutil.copy2(file, self.watched.folder / file.name)
        added = shared_memory() - self.shared_memory
        return Ended(self.start, self.watched, self.acted_at, added, partial_files(self.run))


@dataclass
class Results:
    """All starts of the call."""

    ended: dict[str, Ended] = field(default_factory=dict)
    not_run: dict[str, str] = field(default_factory=dict)


class Keeper:
    """Judges what has ended on a thread of its own, so that starts under way are acted on when that is due."""

    def __init__(self, keep: Callable[[Results], object]) -> None:
        self._keep = keep
        self._thread = ThreadPoolExecutor(1)
        self._under_way: Future[object] | None = None
        self._newer = False

    def look(self, results: Results, newer: bool) -> None:
        """Begin with what has ended by now, unless there is nothing newer or the last judgement is still under way."""
        self._newer |= newer
        if self._newer and (self._under_way is None or self._under_way.done()):
            self._finish()
            known = Results(dict(results.ended), dict(results.not_run))
            self._newer, self._under_way = False, self._thread.submit(self._keep, known)

    def close(self) -> None:
        """Wait for the judgement under way."""
        self._thread.shutdown()
        self._finish()

    def _finish(self) -> None:
        problem = self._under_way.exception() if self._under_way is not None else None
        if problem is not None:
            report(f"results so far could not be kept: {type(problem).__name__}: {problem}")


def run_all(
    plan: Plan, starts: Sequence[Start], gpus: int, budget_s: float, results: Results, keep: Callable[[Results], object]
) -> None:
    """Run the starts in order, as many side by side as there are GPUs; none begins that would not end in time.

    ``results`` are filled as they come, and ``keep`` gets those that there are, so that a call that is killed has the
    starts before; it may be under way while others end.
    """
    waiting, running, last_s = list(starts), [], dict[str, float]()
    free, began, keeper = list(range(gpus)), time.monotonic(), Keeper(keep)
    try:
        while waiting or running:
            left_s = budget_s - (time.monotonic() - began)
            while waiting and (reason := cannot_run(waiting[0], results, gpus, left_s, last_s)):
                results.not_run[waiting[0].name] = reason
                report(f"{waiting.pop(0).name}: NOT RUN: {reason}")
            if waiting and may_begin(waiting[0], running, free):
                taken = [free.pop(0) for _ in range(waiting[0].ranks)]
                running.append(begin(plan, waiting[0], taken, left_s))
                waiting.pop(0)
            known = len(results.ended)
            for one in list(running):
                one.act(plan.act_after)
                one.watch_the_end()
                if one.watched.poll():
                    running.remove(one)
                    free = sorted(free + one.gpus)
                    seconds = (one.watched.ended_at or 0.0) - one.watched.began_at
                    last_s[one.start.kind] = seconds
                    if one.watched.hung and one.watched.limit_s >= one.budget_limit_s:
                        reason = f"ended after {seconds:.0f} s as --budget-s was used up; whether it hangs is unknown"
                        results.not_run[one.start.name] = reason
                        report(f"{one.start.name}: NOT RUN: {reason}")
                        continue
                    results.ended[one.start.name] = one.end()
                    hung = ", HUNG and was ended" if one.watched.hung else ""
                    report(f"{one.start.name}: {seconds:.1f} s, statuses {one.watched.statuses()}{hung}")
            keeper.look(results, newer=len(results.ended) > known)
            time.sleep(0.03)
    finally:
        for one in running:
            one.watched.end()
        keeper.close()
        for start in (*(one.start for one in running), *waiting):
            results.not_run[start.name] = "the call was ended before"


def triton_cache(plan: Plan) -> Path:
    """What all starts of the call share."""
    return plan.work / "triton"


def compile_shares(plan: Plan, starts: Sequence[Start]) -> None:
    """Compile what starts on a new cache would, each within its limit: the kernels of every share among them."""
    shares = {dap for start in starts for dap in (start.dap, start.phase_dap) if dap}
    for dap in () if plan.tiny else sorted(shares):
        began = time.monotonic()
        compile_ahead(BASE, settings(plan, Start("", "", dap, dap)), triton_cache(plan))
        report(f"kernels of DAP {dap}: {time.monotonic() - began:.1f} s")


def cannot_run(start: Start, results: Results, gpus: int, left_s: float, last_s: Mapping[str, float]) -> str:
    """Why a start never will begin; empty if it may."""
    if start.ranks > gpus:
        return f"needs {start.ranks} GPUs"
    if start.after in results.not_run:
        return f"{start.after} did not run"
    expected_s = last_s.get(start.kind, 1.0)
    if left_s < expected_s:
        return f"{left_s:.0f} s are left of --budget-s, the last start of this kind took {expected_s:.0f} s"
    return ""


def may_begin(start: Start, running: list[Running], free: list[int]) -> bool:
    """Whether there are GPUs for it and the run it continues has ended."""
    return len(free) >= start.ranks and start.after not in {one.start.name for one in running}


def begin(plan: Plan, start: Start, gpus: list[int], left_s: float) -> Running:
    """Start it on these GPUs."""
    environment = {
        "PYTHONPATH": package_path(),
        "TRITON_CACHE_DIR": str(triton_cache(plan)),
        "TORCHINDUCTOR_CACHE_DIR": str(plan.work / "inductor"),
    }
    environment |= {"OMP_NUM_THREADS": "1"} if plan.tiny else {"CUDA_VISIBLE_DEVICES": ",".join(map(device_name, gpus))}
    limit_s = min(plan.limit_s, max(30.0, left_s + 20))
    before = shared_memory()
    watched = Watched(command(plan, start), places(plan, start), environment, limit_s, start.ranks)
    watched.start()
    budget_limit_s = limit_s if limit_s < plan.limit_s else float("inf")
    return Running(start, watched, gpus, run_dir(plan, start), before, budget_limit_s)


def num_steps(metrics: Path) -> int:
    """Steps in the record so far."""
    return metrics.read_text(errors="replace").count('"kind": "step"') if metrics.exists() else 0


def shared_memory() -> set[str]:
    """Names in the host's shared memory."""
    return {path.name for path in Path("/dev/shm").iterdir()}


def partial_files(folder: Path) -> list[str]:
    """Files under temporary names."""
    paths = [path.relative_to(folder) for path in folder.rglob("*")]
    return [str(p) for p in paths if p.name.startswith(".") or ".partial" in p.name or p.suffix == ".tmp"]


def report(line: str) -> None:
    """One line, at once."""
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)
