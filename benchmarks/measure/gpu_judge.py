"""The lines that a start of ``gpu_runs.py`` must meet, and what became of each."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common import facts
from gpu_layouts import NEXT_PHASE, STEP_TIMEOUT_S, STEPS_DONE, TARGET_REACHED, Plan, Start, run_dir
from gpu_readings import (
    Row,
    checkpoint_stall_ms,
    different_steps,
    log_times,
    log_verdict,
    medians,
    of_this_start,
    over_ruler_percent,
    read_record,
    ruler_ms,
    start_parts,
    steady_steps,
    steps_of,
    weights_digest,
)
from gpu_starts import Ended, shared_memory
from scalefold.report.record import METRICS_FILE

STOP_TO_EXIT_S, START_S, STALL_MS, OVER_RULER_PERCENT = 10.0, 2.0, 50.0, 2.0  # the lines
ENDED_BY_LAUNCHER = 128 + 15  # as a shell tells it
EXPECTED_VERDICTS = {True: ("valid", "non_benchmark"), False: ("aborted",)}  # by: reaches its target


@dataclass(frozen=True)
class Line:
    """One judgement; ``met`` None: nothing to judge, and ``note`` says why."""

    name: str
    value: Any
    met: bool | None
    note: str = ""


def at_most(name: str, value: float | None, limit: float, missing: str, needed: bool = True) -> Line:
    """A figure against its limit; a ``needed`` one that is missing falls short."""
    if value is None:
        return Line(name, "", False if needed else None, missing)
    return Line(name, round(value, 3), value <= limit, f"at most {limit:g}")


def judge_statuses(start: Start, statuses: Sequence[int | None], hung: bool) -> Line:
    """Every rank's status; torchrun may have ended those that were still on their way when the first one left."""
    text = " ".join("none" if status is None else str(status) for status in statuses)
    wanted = " ".join(map(str, start.statuses))
    first_left = any(status in (STEPS_DONE, NEXT_PHASE) for status in statuses)
    pairs = zip(statuses, start.statuses, strict=True)
    good = all(own == want or (own == ENDED_BY_LAUNCHER and first_left) for own, want in pairs)
    return Line("exit_status", text, good and not hung, f"expected {wanted}" + (", hung and was ended" if hung else ""))


def judge_end(ended: Ended, times: Mapping[str, float]) -> Line:
    """From ``run_stop``, or from the loss of a rank, to the end of the last process."""
    killed = ended.start.act == "kill"
    since = ended.acted_at if killed else times.get("run_stop")
    limit = STEP_TIMEOUT_S + STOP_TO_EXIT_S if killed else STOP_TO_EXIT_S
    until = ended.watched.ended_at
    seconds = until - since if since is not None and until is not None else None
    return at_most("stop_to_exit_s", seconds, limit, "no rank was killed" if killed else "the log has no run_stop")


def judge_ruler(start: Start, steps: list[Row], plan: Plan, ended: Mapping[str, Ended]) -> Line:
    """Step time over that of the ruler of the same layout, if it ran in this call."""
    name, shape = "step_over_ruler_percent", (start.ranks - start.eval_ranks, start.phase_dap or start.dap)
    tables = [one.folder for one in sorted(ended.values(), key=lambda one: one.start.ranks) if one.start.is_ruler]
    known = next((found for found in (ruler_ms(folder, *shape) for folder in tables) if found), {})
    if start.act == "kill" or not known:
        reason = "ended too early" if start.act == "kill" else "no ruler of this layout ran in this call"
        return Line(name, "", None, reason)
    percent = over_ruler_percent(medians(steady_steps(steps, plan.save_every)), known)
    return at_most(name, percent, OVER_RULER_PERCENT, "too few steps", needed=False)


def judge_bits(start: Start, plan: Plan, ended: Mapping[str, Ended]) -> Line:
    """Losses of all steps, and the averaged weights after the last one, against the start with the same seed."""
    if not start.like or start.like not in ended:
        return Line("losses_equal", "", None, "no other start with this seed" + (" ran" if start.like else ""))
    other = ended[start.like]
    whole = start.act != "stop"
    own, truth = (steps_of(read_record(e.folder / METRICS_FILE)) for e in (ended[start.name], other))
    problem = different_steps(own, truth, whole)
    if not problem and whole:
        digests = [weights_digest(run_dir(plan, s), plan.steps) for s in (start, other.start)]
        problem = "" if digests[0] and digests[0] == digests[1] else "the averaged weights differ or were not saved"
    return Line("losses_equal", "no" if problem else "yes", not problem, problem or f"with {start.like}, bit for bit")


def judge_left(ended: Ended) -> Line:
    """Processes, names in shared memory that are still there, files under temporary names."""
    still = sorted(ended.shared_memory & shared_memory())
    left = [*ended.watched.left, *(f"/dev/shm/{name}" for name in still), *ended.partial]
    return Line("left_behind", len(left), not left, "; ".join(left) or "nothing")


def judge(plan: Plan, ended: Mapping[str, Ended], name: str) -> list[Line]:
    """All lines of one start of the program."""
    one = ended[name]
    start, times = one.start, log_times(one)
    record = of_this_start(read_record(one.folder / METRICS_FILE))
    steps, (log_kind, log_note) = steps_of(record), log_verdict(one)
    stall = checkpoint_stall_ms(steps, plan.save_every)
    outlives_a_checkpoint = not start.act and not {TARGET_REACHED, NEXT_PHASE} & set(start.statuses[:1])
    return [
        judge_statuses(start, one.watched.statuses(), one.watched.hung),
        judge_end(one, times),
        at_most("start_to_first_step_s", start_parts(record).get("first_step"), START_S, "no first step recorded"),
        at_most("checkpoint_stall_ms", stall, STALL_MS, "no step after a checkpoint", needed=outlives_a_checkpoint),
        judge_ruler(start, steps, plan, ended),
        judge_bits(start, plan, ended),
        Line("log_verdict", log_kind, log_kind in EXPECTED_VERDICTS[TARGET_REACHED in start.statuses[:1]], log_note),
        judge_left(one),
        Line("steps", len(steps), bool(steps)),
    ]


COLUMNS = (
    "steps",
    "exit_status",
    "stop_to_exit_s",
    "start_to_first_step_s",
    "checkpoint_stall_ms",
    "step_over_ruler_percent",
    "losses_equal",
    "log_verdict",
    "left_behind",
)


def csv_row(start: Start, lines: Sequence[Line]) -> dict[str, object]:
    """One row of gpu_runs.csv."""
    values = {line.name: line.value for line in lines}
    return {**facts(), "layout": start.name, **{column: values[column] for column in COLUMNS}}


def timeline(one: Ended) -> dict[str, float]:
    """Seconds of each part of a start, from its launch to the end of its last process."""
    marks = {"launch": one.watched.began_at, **log_times(one), "end": one.watched.ended_at or 0.0}
    names = list(marks)
    return {f"{a} to {b}": round(marks[b] - marks[a], 2) for a, b in itertools.pairwise(names)}


def breakdown(one: Ended) -> dict[str, float]:
    """Seconds from ``run_start`` to the end of each part of the start."""
    record = of_this_start(read_record(one.folder / METRICS_FILE))
    return {name: round(seconds, 3) for name, seconds in start_parts(record).items()}
