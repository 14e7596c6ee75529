"""Why a run ended, from the files it left: ``scalefold doctor --run``."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scalefold.doctor import Finding
from scalefold.errors import CheckpointError, LogError
from scalefold.mlperf.log.keys import REHEARSAL
from scalefold.mlperf.log.logfile import Log, read_log
from scalefold.parallel.ending import LAST_WORDS
from scalefold.report.record import METRICS_FILE, Metrics, read_metrics
from scalefold.step.checkpoint import Checkpoints, verified_state

RECENT_S = 60.0
_MOST = 8


def examine_run(run_dir: Path) -> list[Finding]:
    """What is known of a run, why it ended, and what to do; a ``problem`` if it has ended and cannot be resumed.

    Raises:
        LogError: there is no record, or it is damaged.
    """
    metrics = read_metrics(run_dir)
    run_dir = run_dir if run_dir.is_dir() else run_dir.parent
    log, words = newest_log(run_dir), read_last_words(run_dir)
    checkpoints, good = _checkpoints(run_dir)
    ended = log is not None and log.first("run_stop") is not None
    age_s = time.time() - (run_dir / METRICS_FILE).stat().st_mtime
    going = not words and not ended and age_s < RECENT_S
    advice = _advice(log, words, good)
    if going:
        advice = Finding("note", "next", f"wait, `scalefold status {run_dir}` shows it; if it has ended: {advice.text}")
    return [*_record(metrics), *_log(log), *_cause(words, ended, age_s), *checkpoints, advice]


def newest_log(run_dir: Path) -> Log | None:
    """The MLPerf log, or the training ranks' part of it, that was written last; None if no clock ever ran."""
    files = [*run_dir.glob("result_*.txt"), *run_dir.glob("result_*.txt.training.part")]
    for file in sorted(files, key=lambda file: file.stat().st_mtime, reverse=True):
        try:
            return read_log(file)
        except LogError:
            continue
    return None


def read_last_words(run_dir: Path) -> list[dict[str, Any]]:
    """What each rank wrote when it ended with an error; own errors before those of ranks that lost another."""
    found = []
    for file in (run_dir / LAST_WORDS).glob("rank_*.json"):
        try:
            found.append(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            continue
    found = [entry for entry in found if isinstance(entry, dict) and {"rank", "error"} <= entry.keys()]
    return sorted(found, key=lambda entry: (bool(entry.get("lost")), str(entry["rank"]).zfill(8)))


def _record(metrics: Metrics) -> Iterator[Finding]:
    size, steps = metrics.run.get("world_size", "?"), len(metrics.step)
    last = f"last step {metrics.step[-1]}, loss {metrics.loss[-1]:.4g}" if steps else "no step"
    evaluations = len(metrics.eval_step)
    best = f", {evaluations} evaluations, the last {metrics.eval_lddt_ca[-1]:.4f}" if evaluations else ", no evaluation"
    yield Finding("ok", "record", f"{size} ranks, {last}{best}")
    for event in metrics.events:
        if event["name"] == "injected":
            yield Finding("note", "rehearsal", f"step {event.get('step')}: injected {event.get('fault')}")


def _log(log: Log | None) -> Iterator[Finding]:
    if log is None:
        yield Finding("note", "log", "none: the run ended before its clock started")
        return
    for event in log.all("tracked_stats"):
        if isinstance(event.value, dict) and REHEARSAL in event.value:
            yield Finding("note", "log", f"{log.file.name}: a rehearsal with {event.value[REHEARSAL]}, no result")
    stop = log.first("run_stop")
    text = f"ends with {stop.metadata.get('status')}" if stop else "has no run_stop"
    broken = f", {len(log.broken_lines)} broken lines" if log.broken_lines else ""
    yield Finding("ok" if stop and not broken else "warning", "log", f"{log.file.name} {text}{broken}")


def _cause(words: list[dict[str, Any]], ended: bool, age_s: float) -> Iterator[Finding]:
    for entry in words[:_MOST]:
        topic = f"rank {entry['rank']}"
        yield Finding("warning", topic, f"on {entry.get('host', '?')}: {entry['error']}")
    if words:
        return
    if ended:
        yield Finding("ok", "cause", "an orderly end: target, step budget, next phase or a stop that was asked for")
        return
    if age_s < RECENT_S:
        yield Finding(
            "note", "cause", f"none yet: the record was written {age_s:.0f} s ago, the run may still be going"
        )
        return
    yield Finding(
        "warning",
        "cause",
        "no rank left a word: all were killed at once (out of memory, scancel, the time limit, a lost node); "
        "look at the end of slurm-*.out and for the out-of-memory killer on the nodes",
    )


def _checkpoints(run_dir: Path) -> tuple[list[Finding], Path | None]:
    found, good = [], None
    for folder in reversed(Checkpoints(run_dir / "checkpoints").all()):
        try:
            state = verified_state(folder)
        except CheckpointError as error:
            found.append(Finding("warning", "checkpoint", str(error)))
            continue
        found.append(Finding("ok", "checkpoint", f"{folder}: whole, iteration {state.iteration}"))
        good = folder
        break
    return found or [Finding("note", "checkpoint", "none was written")], good


def _advice(log: Log | None, words: list[dict[str, Any]], good: Path | None) -> Finding:
    stop = log.first("run_stop") if log is not None else None
    if stop is not None and stop.metadata.get("status") == "success":
        return Finding("ok", "next", "nothing: the target was reached")
    hosts = sorted({str(entry.get("host")) for entry in words if not entry.get("lost")})
    look = f"see to the cause above{f' (on {hosts[0]})' if len(hosts) == 1 else ''}, then " if words else ""
    if good is not None:
        return Finding("ok", "next", f"{look}start the same command with --resume: it goes on from {good.name}")
    return Finding("problem", "next", f"{look}start again with another --result-index: there is nothing to resume from")
