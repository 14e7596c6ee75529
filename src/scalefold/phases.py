"""Long runs in phases: other batch, learning rate, kernels or ranks from some step or lDDT-Cα on; nothing is lost.

A phase is a few overrides of the configuration (``phases:`` in the YAML). Weights, moments, averages, iteration and
place in the stream of samples go on. A change of batch, learning rate or kernels happens inside the process; a change
of ranks ends it with a checkpoint and ``EXIT_NEXT_PHASE``, so that the launcher starts the next phase's layout with
``--resume``. With evaluation ranks every change does so: they are told the batch once, when they start.
"""

from collections.abc import Callable
from dataclasses import dataclass

from scalefold.config import Config

EXIT_NEXT_PHASE = 6


@dataclass(frozen=True)
class Position:
    """Which phase, and what had been done when it began: completed iterations and the samples they used."""

    phase: int = 0
    steps_before: int = 0
    samples_before: int = 0


@dataclass
class Schedule:
    """A run's phases and where it stands among them. Without ``phases`` there is one, the whole run.

    Args:
        base: the configuration as written.
        position: where the run starts or resumes.
    """

    base: Config
    position: Position = Position()

    @property
    def config(self) -> Config:
        """The configuration of the present phase."""
        return self.base.in_phase(self.position.phase) if self.base.phases else self.base

    @property
    def name(self) -> str:
        """Name of the present phase."""
        return self.base.phases[self.position.phase].name if self.base.phases else "whole run"

    @property
    def is_last(self) -> bool:
        """Whether no phase follows."""
        return self.position.phase + 1 >= len(self.base.phases)

    @property
    def last_step(self) -> int:
        """The iteration after which this phase ends at the latest."""
        budget = self.base.training.num_train_iters
        until = self.base.phases[self.position.phase].until_step if self.base.phases else None
        return min(budget, until or budget)

    def samples(self, step: int) -> int:
        """Samples used by iterations 1 to ``step`` of the run; ``step`` lies in the present phase."""
        done = step - self.position.steps_before
        return self.position.samples_before + done * self.config.training.global_batch_size

    def goal_reached(self, lddt_ca: float | None) -> bool:
        """Whether an evaluation ends this phase; the last phase ends with the run's target."""
        goal = None if self.is_last else self.base.phases[self.position.phase].until_lddt_ca
        return goal is not None and lddt_ca is not None and lddt_ca >= goal

    def place(self, position: Position, step: int) -> None:
        """Continue after ``step`` iterations: in the phase of ``position``, or in the next one if that ended there."""
        self.position = position
        while step >= self.last_step and self.follows(step):
            self.advance(step)

    def follows(self, step: int) -> bool:
        """Whether another phase begins after ``step``, given that this one ends there."""
        return not self.is_last and step < self.base.training.num_train_iters

    def advance(self, step: int) -> None:
        """Begin the next phase, ``step`` iterations being complete."""
        self.position = Position(self.position.phase + 1, step, self.samples(step))

    def continues_here(self) -> bool:
        """Whether the next phase has the same ranks, none of them for evaluation only."""
        now, then = self.config.parallel, self.base.in_phase(self.position.phase + 1).parallel
        return now == then and not now.num_eval_ranks


def any_phase(config: Config, holds: Callable[[Config], bool]) -> bool:
    """Whether something holds in any phase: for choices that are made once, such as the type of the gradient buffer."""
    return any(holds(config.in_phase(index)) for index in range(len(config.phases))) or holds(config)
