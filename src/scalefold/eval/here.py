"""Training ranks evaluate together, between two cycles."""

from scalefold.config import Config
from scalefold.eval.evaluator import write_evaluation
from scalefold.eval.score import ChainScorer
from scalefold.kernels.table import Operations
from scalefold.mlperf.log.events import Events
from scalefold.phases import Schedule
from scalefold.report.console import Progress
from scalefold.report.record import Record
from scalefold.step.optimizer import Optimizer


class EvaluationHere:
    """Training ranks evaluate together, between two cycles."""

    def __init__(
        self,
        config: Config,
        scorer: ChainScorer,
        optimizer: Optimizer,
        events: Events,
        record: Record,
        progress: Progress,
        schedule: Schedule,
    ) -> None:
        self.config, self.scorer, self.optimizer, self.schedule = config, scorer, optimizer, schedule
        self.events, self.record, self.progress = events, record, progress
        self.last: float | None = None

    def warm_up(self) -> None:
        """Synthetic chains of all padded lengths."""
        self.scorer.warm_up(self.progress.note)

    def spawn(self) -> None:
        """Start the feature workers."""
        self.scorer.spawn()

    def open_data(self, lengths: dict[str, int]) -> None:
        """Start to build features."""
        self.scorer.open_data(lengths)

    def submit(self, step: int) -> bool:
        """Evaluate now."""
        self.events.eval_start(step)
        result = self.scorer.score(self.optimizer.flat, self.optimizer.averaged)
        self.events.eval_accuracy(step, result.lddt_ca)
        self.events.eval_stop(step)
        write_evaluation(self.schedule, self.record, self.progress, step, result)
        self.last = result.lddt_ca
        return result.lddt_ca >= self.config.training.target_avg_lddt_ca_value

    def poll(self) -> bool:
        """Nothing goes on elsewhere."""
        return False

    def finish(self) -> bool:
        """Nothing is under way."""
        return False

    def use(self, ops: Operations) -> None:
        """Evaluate with another operations table, prepared as the first one was."""
        if ops is not self.scorer.model.ops:
            self.scorer.model.use(ops)
            self.warm_up()

    def close(self) -> None:
        """End the feature workers."""
        self.scorer.close()

    def release_device(self) -> None:
        """Destroy the graphs."""
        self.scorer.model.close()
