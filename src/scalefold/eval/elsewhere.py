"""Evaluation on ranks of its own, while training goes on: both ends."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from scalefold.config import Config
from scalefold.eval.evaluator import write_evaluation
from scalefold.eval.score import ChainScorer, Evaluation
from scalefold.eval.snapshots import SnapshotReceiver, SnapshotSender, run_store
from scalefold.kernels.table import Operations
from scalefold.mlperf.log.events import Events
from scalefold.parallel.ranks import Ranks
from scalefold.phases import Schedule
from scalefold.report.console import Progress
from scalefold.report.record import Record
from scalefold.step.optimizer import Optimizer
from scalefold.step.parameters import FlatLayout


class EvaluationElsewhere:
    """Training side of asynchronous evaluation: rank 0 hands snapshots over, all others do nothing."""

    def __init__(
        self,
        config: Config,
        ranks: Ranks,
        optimizer: Optimizer,
        record: Record,
        progress: Progress,
        schedule: Schedule,
    ) -> None:
        self.config, self.ranks, self.optimizer, self.schedule = config, ranks, optimizer, schedule
        self.record, self.progress = record, progress
        self.last: float | None = None
        self._sender: SnapshotSender | None = None

    def warm_up(self) -> None:
        """Connect: the first message between two ranks is slow."""
        if self.ranks.is_root:
            assert self.ranks.hand_over_group is not None
            target = self.ranks.layout.eval_ranks[0]
            dist.send(torch.zeros(1, device=self.ranks.device), target, group=self.ranks.hand_over_group)
            p = self.config.parallel
            self._sender = SnapshotSender(
                run_store(),
                self.ranks.hand_over_group,
                target,
                p.eval_queue_depth,
                p.when_evaluation_is_behind,
                self.record.event,
            )

    def open_data(self, lengths: dict[str, int]) -> None:
        """The evaluation ranks open the data themselves."""

    def submit(self, step: int) -> bool:
        """Hand a snapshot over; the answer comes later."""
        if self._sender is not None:
            self._sender.submit(step, self.optimizer.averaged)
        return False

    def poll(self) -> bool:
        """Send what waits, write what has been reported."""
        if self._sender is None:
            return False
        self._sender.poll()
        self._write_results(self._sender)
        return self._sender.target_reached()

    def finish(self) -> bool:
        """Wait for the last evaluations; the same answer on all training ranks."""
        reached = [False]
        if self._sender is not None:
            self._sender.drain(self.config.parallel.startup_timeout_s)
            self._write_results(self._sender)
            reached = [self._sender.target_reached()]
        if self.ranks.layout.num_train_ranks > 1:
            dist.broadcast_object_list(reached, src=0, group=self.ranks.train_control_group)
        return reached[0]

    def use(self, ops: Operations) -> None:
        """The evaluation ranks keep theirs: with them, every phase is a process of its own."""

    def spawn(self) -> None:
        """Features are built elsewhere."""

    def close(self) -> None:
        """Nothing to let go of."""

    def release_device(self) -> None:
        """Nothing on the device."""

    def _write_results(self, sender: SnapshotSender) -> None:
        for report in sender.results():
            result = Evaluation(report["chains"], report["seconds"])
            write_evaluation(self.schedule, self.record, self.progress, report["step"], result)
            self.last = result.lddt_ca


def serve_evaluations(
    config: Config,
    ranks: Ranks,
    scorer: ChainScorer,
    flat: FlatLayout,
    weights: Tensor,
    events: Events,
    note_cycle: Callable[..., None] = lambda step, **facts: None,
    before: Callable[[ChainScorer, int], None] = lambda scorer, step: None,
) -> float | None:
    """An evaluation rank's life after ``run_start``: score snapshots until training ends or the target is reached.

    ``weights``: where snapshots arrive, with the layout ``flat``; ``note_cycle`` is told the step of each evaluation
    and what it took.
    """
    layout = ranks.layout
    assert ranks.eval_group is not None
    receiver = SnapshotReceiver(run_store(), ranks.hand_over_group, ranks.eval_group, 0, layout.eval_ranks[0])
    target, last = config.training.target_avg_lddt_ca_value, None
    while True:
        ranks.watch.at("waiting for weights")
        step = receiver.next(weights)
        if step is None:
            break
        ranks.watch.at("evaluation", step)
        events.eval_start(step)
        before(scorer, step)
        result = scorer.score(flat, weights)
        last = result.lddt_ca
        events.eval_accuracy(step, last)
        events.eval_stop(step)
        reached = last >= target
        if reached:
            events.run_stop("success")
        receiver.done({"step": step, "chains": result.chains, "seconds": result.seconds}, reached)
        note_cycle(step, evaluation_s=round(result.seconds, 3))
        if reached:
            break
    return last


def accept_connection(ranks: Ranks) -> None:
    """The evaluation root's end of ``EvaluationElsewhere.warm_up``."""
    if ranks.is_eval_root:
        dist.recv(torch.zeros(1, device=ranks.device), 0, group=ranks.hand_over_group)
