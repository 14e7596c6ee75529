"""Reference convergence points: how many samples the reference needed, and the floor a submission must not pass below.

All numbers come from the official RCP checker and its recorded reference runs (20 each at batch 128 and 256, fp32).
"""

from dataclasses import dataclass
from functools import cache
from statistics import mean
from typing import Any, Literal

from scalefold.mlperf.log.keys import BENCHMARK, RULESET, USAGE

RcpStatus = Literal["pass", "fail", "missing"]


@dataclass(frozen=True)
class Reference:
    """Mean samples to converge, and the floor of the one-sided t-test at p = 0.05, for one global batch size."""

    global_batch_size: int
    mean_samples: float
    floor_samples: float
    interpolated: bool = False


@dataclass(frozen=True)
class Convergence:
    """A submission's convergence against the reference.

    ``factor`` is what the score is multiplied by when the review committee decides to scale: the reference mean over
    the submission's mean, at least 1. ``missing``: no reference exists at this batch size.
    """

    status: RcpStatus
    mean_samples: float
    reference: Reference | None
    factor: float


@cache
def _official() -> Any:
    from mlperf_logging.rcp_checker.rcp_checker import RCP_Checker

    return RCP_Checker(USAGE, RULESET, BENCHMARK, False)


@cache
def reference_convergence(global_batch_size: int) -> Reference | None:
    """The reference at this batch size: recorded, interpolated, or that of the smallest batch below it; None above."""
    records = sorted(_official().pruned_rcp_data.values(), key=lambda record: record["BS"])
    at_or_below = [record for record in records if record["BS"] <= global_batch_size]
    at_or_above = [record for record in records if record["BS"] >= global_batch_size]
    if not at_or_above:
        return None
    if not at_or_below or at_or_below[-1] is at_or_above[0]:
        record, interpolated = at_or_above[0], False
    else:
        _, record = _official()._create_interp_rcp(global_batch_size, at_or_below[-1], at_or_above[0])
        interpolated = True
    return Reference(global_batch_size, float(record["RCP Mean"]), float(record["Min Epochs"]), interpolated)


def recorded_references() -> dict[int, list[int]]:
    """Samples to converge of each recorded reference run, by global batch size."""
    return {record["BS"]: sorted(record["Epochs to converge"]) for record in _official().rcp_data.values()}


def judge_convergence(global_batch_size: int, samples: list[float]) -> Convergence:
    """Compare the olympic mean of the runs' samples to converge (infinite for a failed run) with the reference."""
    counted = sorted(samples)[1:-1]
    submission = mean(counted) if counted else float("nan")
    reference = reference_convergence(global_batch_size)
    if reference is None:
        return Convergence("missing", submission, None, 1.0)
    factor = max(1.0, reference.mean_samples / submission) if submission > 0 else 1.0
    return Convergence("pass" if submission >= reference.floor_samples else "fail", submission, reference, factor)
