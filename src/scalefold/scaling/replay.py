"""Validation of the simulator: the published runs, predicted from their own parts and compared with their times.

Inputs per run: seconds to the first cycle, seconds of the first cycle, median step, first and median later evaluation,
whether evaluation is asynchronous, and the number of cycles. The total time, the gaps between cycles and the tail are
not used; assumed instead: evaluation ranks are ready when training begins, their first evaluation is of the untouched
weights, handing weights over costs nothing, and no snapshot waits (queue depth 0, as those programs worked).
"""

import csv
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from scalefold.errors import ConfigError
from scalefold.mlperf.log.published import PUBLISHED_RUNS, olympic_mean
from scalefold.scaling.simulate import RunTimes, simulate

INPUT_COLUMNS = (
    "time_to_first_epoch_start_s",
    "first_cycle_s",
    "step_s_median",
    "first_eval_s",
    "later_eval_median_s",
    "eval_mode",
    "steps",
)


@dataclass(frozen=True)
class ReplayRow:
    """One published run: what it took and what the simulator predicts."""

    submitter: str
    system: str
    scaling: str
    run: str
    accelerators: int
    steps: int
    published_s: float
    predicted_s: float

    @property
    def error(self) -> float:
        """Relative error of the prediction, signed."""
        return self.predicted_s / self.published_s - 1


@dataclass(frozen=True)
class Replay:
    """All published runs."""

    rows: list[ReplayRow]

    @property
    def worst(self) -> ReplayRow:
        """The run with the largest error."""
        return max(self.rows, key=lambda row: abs(row.error))

    def ok(self, tolerance: float = 0.10) -> bool:
        """Whether every run is predicted within ``tolerance``."""
        return abs(self.worst.error) <= tolerance

    def groups(self) -> dict[tuple[str, str, str], list[ReplayRow]]:
        """Rows by submitter, system and scaling."""
        found: dict[tuple[str, str, str], list[ReplayRow]] = {}
        for row in self.rows:
            found.setdefault((row.submitter, row.system, row.scaling), []).append(row)
        return found

    def text(self) -> str:
        """The replay table, one line per run and one per result."""
        lines = [f"inputs per run: {', '.join(INPUT_COLUMNS)}", ""]
        lines.append(
            f"{'submitter':<10}{'scaling':<8}{'run':>4}{'GPUs':>6}{'steps':>7}{'published':>12}{'predicted':>12}{'error':>9}"
        )
        for (submitter, _, scaling), rows in self.groups().items():
            for row in rows:
                times = f"{row.published_s:>10.1f} s{row.predicted_s:>10.1f} s{100 * row.error:>+8.2f} %"
                lines.append(f"{submitter:<10}{scaling:<8}{row.run:>4}{row.accelerators:>6}{row.steps:>7}{times}")
            scores = [_score([getattr(r, name) / 60 for r in rows], scaling) for name in ("published_s", "predicted_s")]
            change = f"{100 * (scores[1] / scores[0] - 1):+.2f} %"
            lines.append(
                f"{submitter:<10}{scaling:<8}{'score':>17}{scores[0]:>8.2f} min{scores[1]:>8.2f} min{change:>10}"
            )
        worst = self.worst
        lines.append(f"worst run: {worst.submitter} {worst.scaling} {worst.run}, {100 * worst.error:+.2f} %")
        return "\n".join(lines)


def replay(path: Path | str = PUBLISHED_RUNS) -> Replay:
    """Predict every run of a results table. Raises ConfigError for an unreadable table or a missing column."""
    try:
        with Path(path).open(newline="", encoding="utf-8") as stream:
            rows = [_replay_row(row) for row in csv.DictReader(stream)]
    except OSError as error:
        raise ConfigError(f"{path}: cannot read published runs ({error.strerror})") from None
    except KeyError as error:
        raise ConfigError(f"{path}: column {error} is missing") from None
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    if not rows:
        raise ConfigError(f"{path}: no runs")
    return Replay(rows)


def run_times(row: dict[str, str]) -> RunTimes:
    """The simulator's inputs from the columns in :data:`INPUT_COLUMNS` and no others."""
    facts = {name: row[name] for name in INPUT_COLUMNS}
    step_s, start_s = float(facts["step_s_median"]), float(facts["time_to_first_epoch_start_s"])
    asynchronous = facts["eval_mode"] == "async"
    first_eval_s = float(facts["first_eval_s"])
    return RunTimes(
        step_s=step_s,
        num_cycles=int(facts["steps"]) // 40,
        eval_s=float(facts["later_eval_median_s"]),
        start_s=start_s,
        first_cycle_extra_s=float(facts["first_cycle_s"]) - 40 * step_s,
        first_eval_s=None if asynchronous else first_eval_s,
        asynchronous=asynchronous,
        eval_ready_s=start_s if asynchronous else 0.0,
        initial_eval_s=first_eval_s if asynchronous else 0.0,
        queue_depth=0,
    )


def _replay_row(row: dict[str, str]) -> ReplayRow:
    return ReplayRow(
        submitter=row["submitter"],
        system=row["system"],
        scaling=row["scaling"],
        run=row["run"],
        accelerators=int(row["accelerators_used"]),
        steps=int(row["steps"]),
        published_s=float(row["ttt_seconds"]),
        predicted_s=simulate(run_times(row)).total_s,
    )


def _score(minutes: list[float], scaling: str) -> float:
    """Strong: mean without fastest and slowest; weak instances: plain mean."""
    return olympic_mean(minutes) if scaling == "strong" else mean(minutes)
