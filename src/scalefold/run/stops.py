"""When a run ends or goes over to its next phase."""

import logging
import signal
from typing import Any

from scalefold.eval.evaluator import Evaluator
from scalefold.parallel.ranks import Ranks
from scalefold.parallel.stop import PHASE_REACHED, STOP_REQUESTED, TARGET_REACHED, StopSignal
from scalefold.phases import Schedule
from scalefold.stop_signals import STOP_SIGNALS

log = logging.getLogger(__name__)


class Stops:
    """Answers whether a run goes on: the same on all training ranks at the same step."""

    def __init__(self, schedule: Schedule, ranks: Ranks, evaluator: Evaluator) -> None:
        self.schedule, self.ranks, self.evaluator = schedule, ranks, evaluator
        self.asked = False
        self._signal = StopSignal(ranks.train_control_group, self._decide)

    def catch_signals(self) -> None:
        """SIGTERM, SIGUSR1 and SIGINT ask for an orderly stop after the current step, with a checkpoint.

        Whoever presses Ctrl-C again is not kept waiting: a second SIGINT is a KeyboardInterrupt.
        """

        def ask(signum: int, _: Any) -> None:
            self.asked = True
            name, again = signal.Signals(signum).name, ""
            if signum == signal.SIGINT:
                signal.signal(signum, signal.default_int_handler)
                again = " (Ctrl-C again ends at once, without a checkpoint)"
            log.warning("%s: signal %s: stopping after this step%s", self.ranks.describe(), name, again)

        for wanted in STOP_SIGNALS:
            signal.signal(wanted, ask)

    def code(self) -> int:
        """0, TARGET_REACHED, STOP_REQUESTED (a signal to rank 0) or PHASE_REACHED."""
        return self._signal.poll()

    def wait(self) -> None:
        """For the exchange of codes under way."""
        self._signal.wait()

    def _decide(self) -> int:
        if self.evaluator.poll():
            return TARGET_REACHED
        if self.asked:
            return STOP_REQUESTED
        elsewhere = self.ranks.layout.num_eval_ranks > 0
        return PHASE_REACHED if elsewhere and self.schedule.goal_reached(self.evaluator.last) else 0

    def between_updates(self, step: int) -> bool:
        """Whether no gradient is held after iteration ``step``: only then can a run be left and continued."""
        return step % self.schedule.config.training.gradient_accumulation_steps == 0

    def phase_ends(self, step: int, code: int) -> bool:
        """Whether another phase follows iteration ``step``."""
        if not self.between_updates(step):
            return False
        here = self.ranks.layout.num_eval_ranks == 0 and step % self.schedule.config.training.val_every_iters == 0
        due = step == self.schedule.last_step or code == PHASE_REACHED
        return self.schedule.follows(step) and (due or (here and self.schedule.goal_reached(self.evaluator.last)))

    def close(self) -> None:
        """Wait for the last exchange of codes; an orderly end only."""
        self._signal.close()
