"""Read an MLPerf log as a list of events, as tolerantly as the official parser does."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from scalefold.errors import LogError
from scalefold.mlperf.log.keys import TOKEN
from scalefold.textfile import is_finite_number, is_number, parse_json

_FIELDS = ("time_ms", "key", "value", "metadata")


@dataclass(frozen=True)
class LogEvent:
    """One MLLOG line: ``line`` counts all lines of the file from 1, ``text`` starts at the token."""

    line: int
    time_ms: float
    key: str
    value: Any
    metadata: dict[str, Any]
    event_type: str | None
    text: str

    @property
    def epoch_num(self) -> Any:
        """``metadata.epoch_num``: training samples seen, or None."""
        return self.metadata.get("epoch_num")


@dataclass(frozen=True)
class Log:
    """All events of one file in file order, and the lines that are not legal MLLOG lines."""

    file: Path
    events: list[LogEvent]
    broken_lines: list[tuple[int, str]]

    @cached_property
    def _by_key(self) -> dict[str, list[LogEvent]]:
        groups: dict[str, list[LogEvent]] = {}
        for event in self.events:
            groups.setdefault(event.key, []).append(event)
        return groups

    def all(self, key: str) -> list[LogEvent]:
        """Every event with this key, in file order."""
        return self._by_key.get(key, [])

    def first(self, key: str) -> LogEvent | None:
        """The first event with this key, or None."""
        return next(iter(self.all(key)), None)

    def value(self, key: str) -> Any:
        """Value of the first event with this key, or None."""
        event = self.first(key)
        return None if event is None else event.value

    def need(self, key: str) -> LogEvent:
        """The first event with this key; LogError names the file when there is none."""
        event = self.first(key)
        if event is None:
            raise LogError(f"{self.file}: no {key} line")
        return event

    def number(self, key: str) -> int | float:
        """Value of the first event with this key; LogError names file, line and key if it is no finite number."""
        event = self.need(key)
        if not is_finite_number(event.value):
            raise LogError(f"{self.file}:{event.line}: {key} is {str(event.value)[:40]!r}, must be a number")
        return event.value

    @property
    def minutes(self) -> float:
        """Time to train: ``run_stop`` minus ``run_start``, in minutes."""
        return (self.need("run_stop").time_ms - self.need("run_start").time_ms) / 60_000

    @property
    def status(self) -> str | None:
        """``metadata.status`` of ``run_stop``, or None without one."""
        stop = self.first("run_stop")
        return None if stop is None else stop.metadata.get("status")

    @property
    def samples_to_converge(self) -> Any:
        """``epoch_num`` of the last evaluation before a successful ``run_stop``; None for a run that failed."""
        stop = self.first("run_stop")
        if stop is None or self.status != "success":
            return None
        before = [event.epoch_num for event in self.all("eval_accuracy") if event.line < stop.line]
        return before[-1] if before else None


def read_log(path: str | Path) -> Log:
    """Parse one log file; text before the token and lines without it are ignored, as the rules allow.

    Raises:
        LogError: the file cannot be read or holds no MLLOG line at all.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="latin-1").split("\n")
    except OSError as error:
        has_parts = any(path.parent.glob(f"{path.name}.*.part"))
        hint = "; its parts are there: join them with scalefold.mlperf.log.events.merge_parts" if has_parts else ""
        raise LogError(f"{path}: cannot read the log: {error.strerror}{hint}") from error
    events, broken = [], []
    for number, text in _mllog_lines(lines):
        try:
            events.append(_parse(number, text))
        except ValueError as error:
            broken.append((number, str(error)))
    if not events and not broken:
        raise LogError(f"{path}: holds no {TOKEN.strip()} line; is it the result file of a run?")
    return Log(path, events, broken)


def _mllog_lines(lines: list[str]) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(lines, start=1):
        if TOKEN in line:
            yield number, line[line.rindex(TOKEN) :].strip()


def _parse(number: int, text: str) -> LogEvent:
    record = parse_json(text[len(TOKEN) :])
    if not isinstance(record, dict):
        raise ValueError("the text after the token is not a JSON object")
    missing = [field for field in _FIELDS if field not in record]
    if missing:
        raise ValueError(f"field {', '.join(missing)} missing")
    if not isinstance(record["metadata"], dict):
        raise ValueError("metadata is not a JSON object")
    if not is_number(record["time_ms"]) or not math.isfinite(record["time_ms"]):
        raise ValueError(f"time_ms is {record['time_ms']!r}, not a number")
    if not isinstance(record["key"], str):
        raise ValueError(f"key is {record['key']!r}, not text")
    return LogEvent(
        line=number,
        time_ms=record["time_ms"],
        key=record["key"],
        value=record["value"],
        metadata=record["metadata"],
        event_type=record.get("event_type"),
        text=text,
    )
