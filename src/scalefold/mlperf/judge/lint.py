"""Our own rules for one log: what the rules demand and the official compliance checker lets through.

Each rule is a function from a :class:`Log` to findings, registered in :data:`RULES`. Severities:

``error``       the log breaks a rule whatever was trained
``submission``  the log cannot be submitted as it is (placeholders, no reference convergence at this batch size, ...),
                but may be fine for a run that is not the benchmark

Values that are legal but are not the benchmark's are no findings: see :func:`scalefold.mlperf.judge.check.differences`.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from scalefold.mlperf.log.keys import (
    KEYS,
    MAX_GLOBAL_BATCH_SIZE,
    REHEARSAL,
    SEARCHED_SUBSTRINGS,
    TARGET_LDDT,
    VAL_EVERY_ITERS,
    Key,
)
from scalefold.mlperf.log.logfile import Log, LogEvent
from scalefold.textfile import is_finite_number

Severity = Literal["error", "submission"]

#: Stamps of two nodes may disagree by their clock synchronization.
CLOCK_TOLERANCE_MS = 1000
#: Mean lDDT-Cα of the untouched benchmark checkpoint, as 2 submitters logged it (0.6985 and 0.6988), and our tolerance.
CHECKPOINT_LDDT, CHECKPOINT_LDDT_TOLERANCE = 0.6985, 0.005

_COUNTS = {2: "two", 3: "three", 4: "four"}
_PLACEHOLDER = re.compile(
    r"placeholder|changeme|\b(todo|tbd|fixme|unknown|unset|none|your|example|xxx+|org|organization|platform)\b"
)
_INTERVALS = ("init", "run", "epoch", "eval", "block")
_DATA_KEYS = ("train_samples", "eval_samples", "initial_training_dataloader_type", "epoch_start", "epoch_stop")
_EVAL_KEYS = ("eval_start", "eval_accuracy", "eval_stop")


@dataclass(frozen=True)
class Finding:
    """One broken rule: its name, what is wrong and what to do, and the line where it shows (0: the whole file)."""

    rule: str
    message: str
    line: int = 0
    severity: Severity = "error"


Rule = Callable[[Log], Iterator[Finding]]
RULES: list[Rule] = []


def rule(function: Rule) -> Rule:
    """Register a rule; rules run in the order of this file."""
    RULES.append(function)
    return function


def lint(log: Log) -> list[Finding]:
    """All findings of all rules; of a file with several runs this alone, because every other rule speaks of one run."""
    starts = run_begins(log)
    if len(starts) > 1:
        message = f"they begin at lines {', '.join(map(str, starts))}; every run has its own log"
        return [Finding(several_runs(starts), message, starts[1])]
    return [finding for check in RULES for finding in check(log)]


def run_begins(log: Log) -> list[int]:
    """Lines at which a run begins; more than one when most facts that a run states once are there several times."""
    headers = [log.all(key.name) for key in KEYS.values() if key.count == "exactly_one" and key.phase == "init"]
    stated = sorted(len(found) for found in headers if found)
    runs = stated[len(stated) // 2] if stated else 1
    if runs < 2:
        return [log.events[0].line] if log.events else []
    first = next(found for found in headers if len(found) == runs)
    starts = log.all("init_start")
    return [event.line for event in (starts if len(starts) == runs else first)]


def several_runs(starts: list[int]) -> str:
    """``two runs in one file``, for the result of :func:`run_begins`."""
    return f"{_COUNTS.get(len(starts), str(len(starts)))} runs in one file"


def has_type(key: Key, value: Any) -> bool:
    """Whether ``value`` has the JSON type of ``key``: a boolean is no number, text is no number."""
    if not key.types:
        return True
    if isinstance(value, bool):
        return bool in key.types
    return isinstance(value, key.types)


def _samples_per_cycle(log: Log) -> int | None:
    """Samples between two evaluations as logged: ``val_every_iters * global_batch_size``."""
    every, batch = log.value("val_every_iters"), log.value("global_batch_size")
    return every * batch if is_finite_number(every) and is_finite_number(batch) and every > 0 and batch > 0 else None


def _target(log: Log) -> float:
    value = log.value("target_avg_lddt_ca_value")
    return value if is_finite_number(value) else TARGET_LDDT


@rule
def lines_parse(log: Log) -> Iterator[Finding]:
    """One line that does not parse fails the whole file."""
    for number, reason in log.broken_lines:
        yield Finding("line format", f"not a legal MLLOG line: {reason}", number)


@rule
def keys_are_counted(log: Log) -> Iterator[Finding]:
    """Every key as often as the rules ask, duplicates with equal values included."""
    for key in KEYS.values():
        found = log.all(key.name)
        if key.count == "exactly_one" and len(found) > 1:
            lines = ", ".join(str(event.line) for event in found)
            yield Finding("count", f"{key.name} must appear once, found {len(found)} (lines {lines})", found[1].line)
        elif key.count != "optional" and not found:
            yield Finding("count", f"{key.name} is missing")


@rule
def values_are_legal(log: Log) -> Iterator[Finding]:
    """JSON types, choices and ranges; the official checker takes 1 for true and crashes on other mistakes."""
    for event in log.events:
        key = KEYS.get(event.key)
        if key is None:
            continue
        if not has_type(key, event.value):
            wanted = " or ".join(t.__name__ for t in key.types)
            yield Finding("type", f"{key.name} is {event.value!r}, must be of type {wanted}", event.line)
        elif key.choices and event.value not in key.choices:
            yield Finding(
                "value", f"{key.name} is {event.value!r}, must be one of {', '.join(key.choices)}", event.line
            )
        elif key.minimum is not None and not event.value >= key.minimum:
            yield Finding("value", f"{key.name} is {event.value!r}, must be at least {key.minimum:g}", event.line)


@rule
def event_types_match(log: Log) -> Iterator[Finding]:
    """Intervals start and stop, everything else is a point in time."""
    for event in log.events:
        name, _, suffix = event.key.rpartition("_")
        wanted = "POINT_IN_TIME"
        if name in _INTERVALS and suffix in ("start", "stop"):
            wanted = "INTERVAL_START" if suffix == "start" else "INTERVAL_END"
        if event.event_type != wanted and event.key in KEYS:
            yield Finding("event type", f"{event.key} has event_type {event.event_type}, must be {wanted}", event.line)


@rule
def placeholders_are_replaced(log: Log) -> Iterator[Finding]:
    """Organization and platform name somebody (trap 13)."""
    for name in ("submission_org", "submission_platform"):
        value = log.value(name)
        text = value.strip().lower() if isinstance(value, str) else ""
        if not text or _PLACEHOLDER.search(text.replace("_", " ")):
            message = f"{name} is {value!r}: fill in the real name before submitting"
            event = log.first(name)
            yield Finding("placeholder", message, event.line if event else 0, "submission")


@rule
def seed_is_one_integer(log: Log) -> Iterator[Finding]:
    """An integer with its call site, which the package checker needs to compare runs (trap 4)."""
    for event in log.all("seed"):
        try:
            int(event.value)
        except (TypeError, ValueError, OverflowError):
            yield Finding("seed", f"seed is {event.value!r}, must be an integer", event.line)
        missing = [name for name in ("file", "lineno") if name not in event.metadata]
        if missing:
            yield Finding("seed", f"seed line lacks metadata {' and '.join(missing)}", event.line)


@rule
def batch_size_has_a_reference(log: Log) -> Iterator[Finding]:
    """Above 256 samples per step there is no reference convergence point (trap 10)."""
    event = log.first("global_batch_size")
    if event and is_finite_number(event.value) and event.value > MAX_GLOBAL_BATCH_SIZE:
        message = f"global_batch_size {event.value} is above {MAX_GLOBAL_BATCH_SIZE}: no reference convergence point"
        yield Finding("batch size", message, event.line, "submission")


@rule
def ranks_fit_the_nodes(log: Log) -> Iterator[Finding]:
    """Node count is that of this run or instance, not of the whole job (trap 11)."""
    ranks, nodes, gpus = (log.value(k) for k in ("number_of_ranks", "number_of_nodes", "accelerators_per_node"))
    if (
        is_finite_number(ranks)
        and is_finite_number(nodes)
        and is_finite_number(gpus)
        and gpus > 0
        and ranks != nodes * gpus
    ):
        message = f"number_of_ranks {ranks} is not {nodes} nodes x {gpus} accelerators: log this instance's own nodes"
        yield Finding("scale", message, log.need("number_of_nodes").line, "submission")


@rule
def instance_is_constant(log: Log) -> Iterator[Finding]:
    """One file holds one run or one instance (trap 11)."""
    seen = {repr(e.metadata["instance"]): e.line for e in log.events if "instance" in e.metadata}
    if len(seen) > 1:
        message = f"lines of instances {', '.join(seen)} in one file: each instance has its own log"
        yield Finding("instance", message, list(seen.values())[-1])


@rule
def searched_words_stay_alone(log: Log) -> Iterator[Finding]:
    """The RCP checker takes any line that holds one of these words for that key (trap 14)."""
    for event in log.events:
        for word in SEARCHED_SUBSTRINGS:
            if event.text.replace(f'"key": "{word}"', "", 1).count(word) or (
                word == "eval_error" and event.key == word
            ):
                yield Finding("searched word", f'{event.key} line holds the text "{word}"', event.line)


@rule
def phases_are_in_order(log: Log) -> Iterator[Finding]:
    """init_start first; no data event before run_start (trap 5); nothing of initialization after it."""
    if log.events and log.events[0].key != "init_start":
        yield Finding("order", f"first event is {log.events[0].key}, must be init_start", log.events[0].line)
    start = log.first("run_start")
    if start is None:
        return
    for event in log.events:
        is_stats = event.key == "tracked_stats" and event.metadata.get("step") != 0
        if event.line < start.line and (event.key in _DATA_KEYS or event.key in _EVAL_KEYS or is_stats):
            yield Finding("data before run_start", f"{event.key} before run_start: data was touched", event.line)
        key = KEYS.get(event.key)
        if event.line > start.line and key is not None and key.phase == "init":
            yield Finding("order", f"{event.key} belongs before run_start", event.line)


@rule
def time_moves_forward(log: Log) -> Iterator[Finding]:
    """File order is time order, within the synchronization of two nodes' clocks."""
    for before, after in pairwise(log.events):
        if after.time_ms < before.time_ms - CLOCK_TOLERANCE_MS:
            late = (before.time_ms - after.time_ms) / 1000
            message = f"{after.key} is stamped {late:.1f} s before the line above it"
            yield Finding("time order", message, after.line)


@rule
def epoch_num_is_numeric(log: Log) -> Iterator[Finding]:
    """epoch_num counts samples, as a number (trap 3)."""
    for event in log.events:
        if event.key in (*_EVAL_KEYS, "epoch_start", "epoch_stop") and not is_finite_number(event.epoch_num):
            message = f"{event.key} has epoch_num {event.epoch_num!r}, must be the number of samples seen"
            yield Finding("epoch_num", message, event.line)


@rule
def training_cycles_are_complete(log: Log) -> Iterator[Finding]:
    """Cycles end at val_every_iters x batch samples, in sequence, each stopped once; only the last may be open."""
    per_cycle = _samples_per_cycle(log)
    if per_cycle is None:
        return
    starts = log.all("epoch_start")
    for index, event in enumerate(starts, start=1):
        if is_finite_number(event.epoch_num) and event.epoch_num != index * per_cycle:
            message = (
                f"training cycle {index} has epoch_num {event.epoch_num}, must be {index * per_cycle}"
                f" = {index} x val_every_iters x global_batch_size"
            )
            yield Finding("epoch_num", message, event.line)
            break
    stopped = [event.epoch_num for event in log.all("epoch_stop")]
    started = [event.epoch_num for event in starts]
    if stopped not in (started, started[:-1]):
        message = f"{len(started)} training cycles start and {len(stopped)} stop, or in another order"
        yield Finding("epochs", message, starts[-1].line if starts else 0)


@rule
def every_cycle_is_evaluated_once(log: Log) -> Iterator[Finding]:
    """All of cycles 1, 2, 3, ... up to the last evaluation, each once; the initial weights (0) may come first."""
    per_cycle = _samples_per_cycle(log)
    found = [event.epoch_num for event in log.all("eval_start")]
    if per_cycle is None or not found:
        return
    expected = [index * per_cycle for index in range(0 if found[0] == 0 else 1, len(found) + 1)][: len(found)]
    if found != expected:
        wrong = next(i for i, pair in enumerate(zip(found, expected, strict=True)) if pair[0] != pair[1])
        message = (
            f"evaluation {wrong + 1} is at epoch_num {found[wrong]}, must be at {expected[wrong]}: every"
            f" {VAL_EVERY_ITERS} iterations is evaluated exactly once"
        )
        yield Finding("evaluation cadence", message, log.all("eval_start")[wrong].line)
    for name in ("eval_accuracy", "eval_stop"):
        if (others := [event.epoch_num for event in log.all(name)]) != found:
            message = f"{len(found)} eval_start lines but {len(others)} {name}, or with other epoch_num"
            yield Finding("evaluation", message, log.all(name)[-1].line if others else 0)


@rule
def evaluations_lie_in_their_interval(log: Log) -> Iterator[Finding]:
    """eval_start, eval_accuracy, eval_stop in this order; an evaluation starts after its cycle stopped."""
    opened: dict[Any, LogEvent] = {}
    cycles = {event.epoch_num: event for event in log.all("epoch_stop") if is_finite_number(event.epoch_num)}
    for event in log.events:
        at = repr(event.epoch_num)
        if event.key == "eval_start":
            opened[at] = event
            cycle = cycles.get(event.epoch_num) if is_finite_number(event.epoch_num) else None
            if cycle and event.time_ms < cycle.time_ms - CLOCK_TOLERANCE_MS:
                yield Finding("evaluation", f"evaluation at epoch_num {at} starts before its cycle stops", event.line)
        elif event.key in ("eval_accuracy", "eval_stop") and at not in opened:
            yield Finding("evaluation", f"{event.key} at epoch_num {at} outside its evaluation", event.line)
        if event.key == "eval_stop":
            opened.pop(at, None)


@rule
def accuracies_are_lddt(log: Log) -> Iterator[Finding]:
    """Mean lDDT-Cα on the 0 to 1 scale (trap 1); NaN is no value."""
    for event in log.all("eval_accuracy"):
        if isinstance(event.value, int | float) and not (is_finite_number(event.value) and 0 <= event.value <= 1):
            message = f"eval_accuracy is {event.value!r}, must be a mean lDDT-Cα between 0 and 1"
            yield Finding("accuracy", message, event.line)


@rule
def initial_weights_are_the_checkpoint(log: Log) -> Iterator[Finding]:
    """An evaluation before the first step sees the checkpoint, so warm-up must have put everything back (trap 6)."""
    is_benchmark = log.value("init_checkpoint_sha256sum") == KEYS["init_checkpoint_sha256sum"].expected
    for event in log.all("eval_accuracy"):
        if is_benchmark and event.epoch_num == 0 and is_finite_number(event.value):
            difference = abs(event.value - CHECKPOINT_LDDT)
            if difference > CHECKPOINT_LDDT_TOLERANCE:
                message = f"initial weights evaluate to {event.value}, the checkpoint to {CHECKPOINT_LDDT}"
                yield Finding("initial weights", message, event.line)


@rule
def run_stops_at_the_target(log: Log) -> Iterator[Finding]:
    """Status success, at the first evaluation that meets the target and not before it (trap 9)."""
    stop = log.first("run_stop")
    if stop is None:
        return
    target = _target(log)
    if log.status != "success":
        yield Finding("status", f"run_stop status is {log.status!r}: the run did not reach the target", stop.line)
    accuracies = [event for event in log.all("eval_accuracy") if is_finite_number(event.value)]
    late = [event for event in log.events if event.line > stop.line and event.key in _EVAL_KEYS]
    if late:
        yield Finding("run_stop", f"{late[0].key} after run_stop", late[0].line)
    before = [event for event in accuracies if event.line < stop.line]
    if log.status == "success" and (not before or before[-1].value < target):
        last = before[-1].value if before else "none"
        yield Finding("run_stop", f"last lDDT-Cα before run_stop is {last}, the target {target}", stop.line)
    passed = next((event for event in before[:-1] if event.value >= target), None)
    if passed:
        message = f"target met at epoch_num {passed.epoch_num} but evaluation went on: stop at the first one"
        yield Finding("run_stop", message, passed.line)
    if before and stop.time_ms < before[-1].time_ms:
        yield Finding("run_stop", "run_stop is stamped before the evaluation that meets the target", stop.line)


@rule
def throughput_belongs_to_a_cycle(log: Log) -> Iterator[Finding]:
    """One throughput entry per finished cycle, step = cycle index."""
    steps = [e.metadata.get("step") for e in log.all("tracked_stats") if _is_throughput(e)]
    finished = len(log.all("epoch_stop"))
    if steps != list(range(1, len(steps) + 1)) or len(steps) > finished:
        yield Finding("tracked_stats", f"throughput has steps {steps}, must be 1..{finished}, one per finished cycle")


@rule
def no_faults_were_injected(log: Log) -> Iterator[Finding]:
    """``scalefold train --inject`` marks its log."""
    for event in log.all("tracked_stats"):
        if isinstance(event.value, dict) and REHEARSAL in event.value:
            text = f"a rehearsal with injected faults ({str(event.value[REHEARSAL])[:80]}) is no result"
            yield Finding(REHEARSAL, text, event.line, "submission")


def _is_throughput(event: LogEvent) -> bool:
    return isinstance(event.value, dict) and "throughput" in event.value
