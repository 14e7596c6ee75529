"""The faults that ``scalefold train --inject FAULT@STEP`` knows, by name."""

from collections.abc import Sequence
from dataclasses import dataclass

from scalefold.errors import ConfigError

#: name -> what happens when the batch of STEP is asked for (evaluations: in the first one of or after STEP)
KINDS = {
    "kill-root": "rank 0 is killed (SIGKILL)",
    "kill-rank": "the last training rank is killed",
    "kill-evaluation": "the first evaluation rank is killed in an evaluation",
    "kill-worker": "a loader worker of rank 0 is killed",
    "freeze-root": "rank 0 is stopped (SIGSTOP) and with it the run's store",
    "freeze-rank": "the last training rank is stopped",
    "freeze-evaluation": "the first evaluation rank is stopped in an evaluation",
    "freeze-worker": "the loader workers of rank 0 are stopped",
    "nan-gradient": "a gradient of the last training rank becomes NaN",
    "nan-loss": "the loss of the last training rank becomes NaN",
    "full-disk-checkpoint": "no file of rank 0 can grow to the size of a checkpoint",
    "full-disk-log": "log and record of rank 0 lie on a full disk",
    "slow-storage": "loader workers of rank 0 get nothing to read for 3 seconds",
    "clock-jump": "the system clock of rank 0 goes back by one hour",
    "evaluation-memory": "an evaluation runs out of memory",
    "open-files": "rank 0 can open no more files",
}


@dataclass(frozen=True)
class Fault:
    """One fault of ``KINDS`` at one iteration."""

    kind: str
    step: int

    def __str__(self) -> str:
        return f"{self.kind}@{self.step}"


def parse_faults(texts: Sequence[str]) -> tuple[Fault, ...]:
    """``kill-rank@12`` and so on.

    Raises:
        ConfigError: no such fault, or no step.
    """
    return tuple(_parse(text) for text in texts)


def _parse(text: str) -> Fault:
    kind, _, step = text.partition("@")
    if kind not in KINDS or not step.isdecimal() or int(step) < 1:
        raise ConfigError(f"--inject {text}: must be FAULT@STEP with a step from 1 on and one of {', '.join(KINDS)}")
    return Fault(kind, int(step))
