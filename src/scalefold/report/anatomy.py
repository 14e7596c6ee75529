"""Where the minutes of a run went: start, first cycle, steady cycles, waits between cycles, tail."""

from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from scalefold.report.logs import Cycle, ResultLog


@dataclass(frozen=True)
class Anatomy:
    """Seconds of one successful run; the parts add up to the time between ``run_start`` and ``run_stop``.

    ``first_wait_s`` and ``later_waits_s`` are the gaps between training cycles: evaluations if training ranks evaluate
    (``synchronous``), hand-overs of weights otherwise. ``tail_s`` is from the last counted step to ``run_stop``.
    """

    start_s: float
    first_cycle_s: float
    steady_cycles_s: float
    first_wait_s: float
    later_waits_s: float
    tail_s: float
    num_cycles: int
    steady_cycle_s: float
    synchronous: bool

    @property
    def parts(self) -> dict[str, float]:
        """Name to seconds, in the order of the run."""
        wait = "evaluation" if self.synchronous else "hand-over"
        return {
            "start": self.start_s,
            "first cycle": self.first_cycle_s,
            f"first {wait}": self.first_wait_s,
            "steady cycles": self.steady_cycles_s,
            f"later {wait}s": self.later_waits_s,
            "tail": self.tail_s,
        }

    @property
    def total_s(self) -> float:
        """Sum of all parts."""
        return sum(self.parts.values())


def anatomy(log: ResultLog) -> Anatomy | None:
    """Split a finished run; None if it has not stopped or holds no complete cycle.

    Cycles that ended after the weights of the passing evaluation were taken do not count: their steps ran beside the
    evaluation and are inside the tail.
    """
    cycles = _counted(log)
    if log.run_s is None or not cycles:
        return None
    gaps = [after.start_s - before.stop_s for before, after in pairwise(cycles)]
    steady = [cycle.seconds for cycle in cycles[1:]]
    return Anatomy(
        start_s=cycles[0].start_s,
        first_cycle_s=cycles[0].seconds,
        steady_cycles_s=sum(steady),
        first_wait_s=gaps[0] if gaps else 0.0,
        later_waits_s=sum(gaps[1:]),
        tail_s=log.run_s - cycles[-1].stop_s,
        num_cycles=len(cycles),
        steady_cycle_s=median(steady) if steady else cycles[0].seconds,
        synchronous=evaluates_synchronously(log),
    )


def evaluates_synchronously(log: ResultLog) -> bool:
    """Whether training waits while an evaluation runs: no cycle starts inside the evaluation before it."""
    stops = {e.samples: e.stop_s for e in log.evaluations if e.stop_s is not None}
    return all(
        after.start_s >= stops[before.samples] for before, after in pairwise(log.cycles) if before.samples in stops
    )


def hand_over_delays(log: ResultLog) -> list[tuple[int, float, float]]:
    """Per evaluation after training began: samples, seconds from end of cycle to result, seconds of evaluation."""
    ends = {cycle.samples: cycle.stop_s for cycle in log.cycles}
    return [
        (e.samples, e.result_s - ends[e.samples], e.result_s - e.start_s)
        for e in log.evaluations
        if e.samples in ends and e.result_s is not None and e.start_s is not None
    ]


def _counted(log: ResultLog) -> list[Cycle]:
    passing = log.passing
    return [c for c in log.cycles if passing is None or c.samples <= passing.samples]
