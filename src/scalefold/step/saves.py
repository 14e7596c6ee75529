"""Checkpoints of a run under way: written beside training, after the ranks have been compared."""

from collections.abc import Callable, Sequence

from scalefold.errors import TrainingError
from scalefold.parallel.ranks import Ranks
from scalefold.phases import Position
from scalefold.step.agreement import Agreement
from scalefold.step.checkpoint import RunState
from scalefold.step.checkpoint_writer import CheckpointWriter, Written
from scalefold.step.optimizer import Optimizer


class Saves:
    """What a training rank keeps of its state; rank 0 writes, all compare.

    Args:
        writer: writes on rank 0.
        optimizer: the state.
        names: the model's parameters in registration order.
        ranks: this process among all.
        seed: the run's.
        note: (event, facts) is told of every checkpoint on the disk.
    """

    def __init__(
        self,
        writer: CheckpointWriter,
        optimizer: Optimizer,
        names: list[str],
        ranks: Ranks,
        seed: int,
        note: Callable[..., None],
    ) -> None:
        self.writer, self.optimizer, self.names = writer, optimizer, names
        self.ranks, self.seed, self.note = ranks, seed, note
        self._agreement = Agreement(optimizer, ranks.train_control_group if ranks.layout.num_train_ranks > 1 else None)

    def save(self, step: int, position: Position, left_over: Sequence[int]) -> None:
        """Begin to write a checkpoint of the ``step`` completed iterations on rank 0, beside training.

        Every training rank calls this: they compare what they hold. ``left_over`` are the places of the stream of
        samples that they have passed over.

        Raises:
            CheckpointError: the checkpoint before this one could not be written.
            TrainingError: the ranks held different weights at the one before.
        """
        self.compare(step)
        if self.ranks.is_root:
            state = RunState(step, self.seed, self.optimizer.num_averaged, position, left_over)
            self._tell(self.writer.save(self.optimizer.flat, self.optimizer, self.names, state))

    def finish(self) -> None:
        """Wait until the last checkpoint is on the disk, and the ranks are known to agree.

        Raises:
            CheckpointError: it could not be written.
            TrainingError: the ranks held different weights.
        """
        self.go_on_comparing(to_the_end=True)
        self._tell(self.writer.finish())

    def compare(self, step: int, wait: bool = False) -> None:
        """Begin to compare the weights of all training ranks after ``step`` iterations; the same call on all of them.

        Raises:
            TrainingError: they differed, now (with ``wait``) or at the comparison before.
        """
        self.go_on_comparing(to_the_end=True)
        self._agreement.begin(step)
        if wait:
            self.go_on_comparing(to_the_end=True)

    def go_on_comparing(self, to_the_end: bool = False) -> None:
        """Take the comparison under way a part further, at every step, or to its end; raises what ``compare`` does."""
        try:
            (self._agreement.settle if to_the_end else self._agreement.advance)()
        except TrainingError:
            if self.ranks.is_root:
                self.writer.set_aside(self._agreement.last_step)
            raise

    def wait(self) -> None:
        """For what the ranks exchange at this moment to be compared."""
        self._agreement.wait()

    def _tell(self, written: Written | None) -> None:
        if written is not None:
            times = {"stall_ms": round(written.stall_ms, 3), "write_s": round(written.write_s, 3)}
            self.note("checkpoint", step=written.step, folder=written.folder.name, **times)
