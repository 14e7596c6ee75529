"""Faults on purpose: what ``scalefold train --inject`` does to a run, so that its users see what they would see.

The run's log says that it is a rehearsal, and no package takes it.
"""

import logging
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from scalefold.errors import ConfigError
from scalefold.rehearse.faults import Fault

log = logging.getLogger(__name__)

STALL_S = 3.0
CLOCK_JUMP_NS = -3600 * 10**9
SPARE_BYTES = 16384  # that logs may still grow by where a checkpoint may not
FULL_DEVICE = "/dev/full"

Action = Callable[[Any], None]


class Rehearsal:
    """The faults that hit this rank; none in a run that is meant.

    Args:
        faults: what was asked for.
        ranks: this process among all.
        config: refuses what it makes impossible.

    Raises:
        ConfigError: no rank that the fault could hit.
    """

    def __init__(self, faults: Sequence[Fault], ranks: Any, config: Any) -> None:
        self.ranks = ranks
        for fault in faults:
            _check_possible(fault, ranks.layout, config)
        self._mine = [fault for fault in faults if _victim(fault.kind, ranks.layout) == ranks.rank]
        if faults and ranks.is_root:
            log.warning("rehearsal with %s: this run is no result", ", ".join(map(str, faults)))

    def before_step(self, run: Any, step: int) -> None:
        """Whatever is due on this training rank before the batch of ``step``."""
        for fault in [f for f in self._mine if f.step == step and not f.kind.endswith("-evaluation")]:
            run.record.event("injected", step=step, fault=str(fault))
            self._hit(ACTIONS[fault.kind], run, fault)

    def before_evaluation(self, scorer: Any, step: int) -> None:
        """The same on an evaluation rank, before the evaluation of ``step``."""
        for fault in [f for f in self._mine if f.step <= step]:
            self._hit(EVALUATION_ACTIONS[fault.kind], scorer, fault)

    def _hit(self, action: Action, owner: Any, fault: Fault) -> None:
        """Once, and after this rank's next sign of life, so that the others know where it was."""
        self._mine.remove(fault)
        if self.ranks.layout.world_size > 1:
            time.sleep(2 * self.ranks.watch.beat_s)
        log.warning("%s: injecting %s", self.ranks.describe(), fault)
        action(owner)


def _victim(kind: str, layout: Any) -> int:
    """The rank that a fault hits."""
    if "evaluation" in kind and layout.num_eval_ranks:
        return layout.eval_ranks[0]
    return layout.num_train_ranks - 1 if kind in ("kill-rank", "freeze-rank", "nan-gradient", "nan-loss") else 0


def _check_possible(fault: Fault, layout: Any, config: Any) -> None:
    if fault.kind in ("kill-evaluation", "freeze-evaluation") and not layout.num_eval_ranks:
        raise ConfigError(f"--inject {fault}: the run has no evaluation ranks (parallel.num_eval_ranks)")
    if fault.kind in ("kill-worker", "freeze-worker", "slow-storage") and not config.data.num_workers:
        raise ConfigError(f"--inject {fault}: the run has no loader workers (data.num_workers)")
    if fault.kind.startswith("nan-") and config.execution.cuda_graphs:
        raise ConfigError(f"--inject {fault}: a captured step takes no NaN; set execution.cuda_graphs=false")


def _kill(_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _freeze(_: Any) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _workers(run: Any) -> list[int]:
    return [worker.pid for worker in run.batches.loader.processes()]


def _kill_worker(run: Any) -> None:
    os.kill(_workers(run)[0], signal.SIGKILL)


def _freeze_workers(run: Any) -> None:
    for pid in _workers(run):
        os.kill(pid, signal.SIGSTOP)


def _stall_workers(run: Any) -> None:
    pids = _workers(run)
    _freeze_workers(run)
    threading.Timer(STALL_S, lambda: [os.kill(pid, signal.SIGCONT) for pid in pids]).start()


def _nan_loss(run: Any) -> None:
    _change_objective(run.training.step, lambda loss: loss * float("nan"))


def _nan_gradient(run: Any) -> None:
    def spoil(loss: Tensor) -> Tensor:
        loss.register_hook(lambda gradient: gradient * float("nan"))
        return loss

    _change_objective(run.training.step, spoil)


def _change_objective(step: Any, change: Callable[[Tensor], Tensor]) -> None:
    objective = step.objective

    def changed(features: Mapping[str, Tensor], passes: int) -> tuple[Tensor, dict[str, Tensor]]:
        loss, terms = objective(features, passes)
        return change(loss), terms

    step.objective = changed


def _refuse_checkpoints(run: Any) -> None:
    run.saves.writer.newest()  # the one under way is complete
    largest = max(file.stat().st_size for file in (run.record.path, run.events.file))
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest + SPARE_BYTES, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def _refuse_logs(run: Any) -> None:
    full = os.open(FULL_DEVICE, os.O_WRONLY)
    for descriptor in (run.record.descriptor, run.events.descriptor):
        os.dup2(full, descriptor)
    os.close(full)


def _turn_clock_back(_: Any) -> None:
    seconds, nanoseconds = time.time, time.time_ns
    time.time = lambda: seconds() + CLOCK_JUMP_NS / 1e9
    time.time_ns = lambda: nanoseconds() + CLOCK_JUMP_NS


def _exhaust_memory_here(run: Any) -> None:
    _exhaust_memory(run.evaluator.scorer)


def _exhaust_memory(scorer: Any) -> None:
    def predict(features: Mapping[str, Tensor]) -> Tensor:
        raise torch.OutOfMemoryError("out of memory (rehearsed)")

    scorer.model.predict = predict


def _refuse_files(run: Any) -> None:
    run.saves.writer.newest()  # the one under way is complete
    lowest = os.dup(0)  # every new one would be this or a higher one
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


ACTIONS: dict[str, Action] = {
    "kill-root": _kill,
    "kill-rank": _kill,
    "kill-worker": _kill_worker,
    "freeze-root": _freeze,
    "freeze-rank": _freeze,
    "freeze-worker": _freeze_workers,
    "nan-gradient": _nan_gradient,
    "nan-loss": _nan_loss,
    "full-disk-checkpoint": _refuse_checkpoints,
    "full-disk-log": _refuse_logs,
    "slow-storage": _stall_workers,
    "clock-jump": _turn_clock_back,
    "evaluation-memory": _exhaust_memory_here,
    "open-files": _refuse_files,
}
EVALUATION_ACTIONS: dict[str, Action] = {
    "kill-evaluation": _kill,
    "freeze-evaluation": _freeze,
    "evaluation-memory": _exhaust_memory,
}
