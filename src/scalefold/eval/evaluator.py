"""What the training loop asks of an evaluation, and what it writes of one."""

from typing import Protocol

from scalefold.eval.score import Evaluation
from scalefold.kernels.table import Operations
from scalefold.phases import Schedule
from scalefold.report.console import Progress
from scalefold.report.record import EvalRow, Record


class Evaluator(Protocol):
    """What the training loop asks of an evaluation."""

    last: float | None

    def warm_up(self) -> None:
        """Before the clock: whatever is slow and needs no data."""

    def spawn(self) -> None:
        """Before the clock: start the processes that will build features."""

    def open_data(self, lengths: dict[str, int]) -> None:
        """After ``run_start``: the evaluation chains with their lengths."""

    def submit(self, step: int) -> bool:
        """Evaluate the averaged weights as of ``step``; True if the target is known to be reached."""
        ...

    def poll(self) -> bool:
        """Between steps, without waiting: True if an evaluation elsewhere has reached the target (rank 0 only)."""
        ...

    def finish(self) -> bool:
        """After the last step: wait for evaluations under way; True if one of them reaches the target."""
        ...

    def use(self, ops: Operations) -> None:
        """Go on with another operations table."""

    def close(self) -> None:
        """Let go of workers and memory."""

    def release_device(self) -> None:
        """Let go of what the device holds."""


def write_evaluation(schedule: Schedule, record: Record, progress: Progress, step: int, result: Evaluation) -> None:
    """One evaluation to the record and the screen."""
    row = EvalRow(
        step=step,
        samples=schedule.samples(step),
        lddt_ca=result.lddt_ca,
        seconds=result.seconds,
        chains=result.chains,
    )
    record.evaluation(row)
    progress.evaluation(row)
