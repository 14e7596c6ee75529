"""Helpers of the MLPerf tests: rehearsal logs and edits of their lines."""

import json
from collections.abc import Callable
from pathlib import Path

from scalefold.mlperf.log.keys import TOKEN
from scalefold.mlperf.log.published import published_runs
from scalefold.mlperf.log.rehearsal import published_script, write_rehearsal

Lines = list[dict]


def rehearsal(file: Path, *, submitter: str = "NVIDIA", scaling: str = "strong", index: int = 1) -> Path:
    """A full-benchmark log: asynchronous evaluation at 2080 GPUs unless another published run is named."""
    run = published_runs(submitter=submitter, scaling=scaling)[index]
    return write_rehearsal(published_script(run, org="Rehearsal Institute", platform="dgx-260"), file)


def as_trained(file: Path) -> Path:
    """The log with the call sites of another file: packages refuse logs that the rehearsal wrote."""
    file.write_text(file.read_text().replace("scalefold/mlperf/log/rehearsal.py", "scalefold/mlperf/log/events.py"))
    return file


def edit(file: Path, change: Callable[[Lines], object]) -> Path:
    """Apply ``change`` to the list of the file's events and write them back."""
    lines = [json.loads(line.removeprefix(TOKEN)) for line in file.read_text().splitlines()]
    change(lines)
    file.write_text("".join(f"{TOKEN}{json.dumps(line)}\n" for line in lines))
    return file


def index_of(lines: Lines, key: str, occurrence: int = 0) -> int:
    """Position of the n-th line with this key (negative: from the end)."""
    return [i for i, line in enumerate(lines) if line["key"] == key][occurrence]


def line_of(lines: Lines, key: str, occurrence: int = 0) -> dict:
    """The n-th line with this key."""
    return lines[index_of(lines, key, occurrence)]


def set_value(key: str, value: object) -> Callable[[Lines], None]:
    """An edit that gives the first line with ``key`` another value."""
    return lambda lines: line_of(lines, key).update(value=value)


def move(lines: Lines, key: str, before: str) -> None:
    """Move the first line with ``key`` (stamp included) to just above the first ``before``."""
    line = lines.pop(index_of(lines, key))
    target = index_of(lines, before)
    line["time_ms"] = lines[target]["time_ms"]
    lines.insert(target, line)


def drop(lines: Lines, *keys: str, epoch_num: float | None = None) -> None:
    """Remove all lines with these keys, or only those at ``epoch_num``."""
    lines[:] = [
        line
        for line in lines
        if line["key"] not in keys or (epoch_num is not None and line["metadata"].get("epoch_num") != epoch_num)
    ]


def scale_epoch_num(lines: Lines, factor: float | Callable[[float], object]) -> None:
    """Replace every epoch_num by ``factor(epoch_num)`` or its product with ``factor``."""
    for line in lines:
        if "epoch_num" in line["metadata"]:
            old = line["metadata"]["epoch_num"]
            line["metadata"]["epoch_num"] = factor(old) if callable(factor) else old * factor
