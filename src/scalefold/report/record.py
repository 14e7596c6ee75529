"""The file of record of a run: ``metrics.jsonl``, one JSON object per line.

Kinds of line, told apart by the key ``kind``:

* ``run``: one per start of the program: configuration name, environment, world size, device, parameters
* ``step``: one per optimizer step, fields of :class:`StepRow`
* ``eval``: one per evaluation, fields of :class:`EvalRow`
* ``event``: whatever else happened (``start``, ``resume``, ``checkpoint``, ``hand_over``, ...), with a name

Times (``time_s``) count from the run's clock start (MLPerf ``run_start``). A value that is not finite is written as
``null`` and read back as NaN, so the file stays strict JSON.
"""

import itertools
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from scalefold.errors import LogError
from scalefold.textfile import is_number, parse_json, sync, write_line

log = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"


@dataclass(frozen=True)
class StepRow:
    """One optimizer step.

    ``samples`` is cumulative; ``step_ms`` is the wall time of the whole step, of which ``data_ms`` was spent waiting
    for the batch; ``passes`` is the number of recycling passes R; ``phases_ms`` may hold fwd, bwd, comm, opt.
    """

    step: int
    loss: float
    terms: Mapping[str, float] = field(default_factory=dict)
    lr: float | None = None
    grad_norm: float | None = None
    step_ms: float | None = None
    data_ms: float | None = None
    passes: int | None = None
    peak_gib: float | None = None
    samples: int | None = None
    time_s: float | None = None
    phases_ms: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class EvalRow:
    """One evaluation: weights of ``step``, lDDT-Cα in 0..1, ``seconds`` of evaluation, ``time_s`` of its result."""

    step: int
    samples: int
    lddt_ca: float
    seconds: float | None = None
    time_s: float | None = None
    chains: Mapping[str, float] | None = None


class Record:
    """Appends to ``run_dir/metrics.jsonl``; every line reaches the operating system before the call returns.

    A fresh run (``resume_step`` None) sets an existing file aside as ``metrics.1.jsonl`` and so on. A resumed run keeps
    what happened up to and including ``resume_step`` and drops the rest, because those steps are going to be repeated.
    On ranks other than 0 every call does nothing.
    """

    def __init__(self, run_dir: Path | str, rank0: bool, resume_step: int | None = None) -> None:
        self.path = Path(run_dir) / METRICS_FILE
        self.descriptor: int | None = None
        self._clock_offset_s = 0.0
        self._clock_start: float | None = None
        self._start_parts: dict[str, float] | None = {}
        if not rank0:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if resume_step is None:
            _set_aside(self.path)
        elif self.path.exists():
            self._clock_offset_s = _truncate_after(self.path, resume_step)
        self.descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        if resume_step is not None:
            self.event("resume", step=resume_step)

    def start_clock(self) -> None:
        """Start the clock behind ``time_s`` (after a resume: continue it), where MLPerf ``run_start`` is logged."""
        self._clock_start = time.monotonic()

    def now_s(self) -> float | None:
        """Seconds since the clock started, without the gap before a resume; None before :meth:`start_clock`."""
        if self._clock_start is None:
            return None
        return self._clock_offset_s + time.monotonic() - self._clock_start

    def start_part(self, name: str) -> None:
        """Note when a part of the way to the first step is over, in seconds since this start's own clock start.

        The first call of a name counts. The first step writes all parts as one ``start`` event.
        """
        if self._start_parts is not None and self._clock_start is not None:
            self._start_parts.setdefault(name, time.monotonic() - self._clock_start)

    def run(self, **header: Any) -> None:
        """Write the header: config name, environment, world_size, device, parameters, target, batch size, ..."""
        self._write({"kind": "run", **header})

    def step(self, row: StepRow) -> None:
        """Write one step; ``time_s`` is filled in from the clock when the row has none."""
        if self._start_parts:
            self.event("start", step=row.step, **{f"{name}_s": seconds for name, seconds in self._start_parts.items()})
        self._start_parts = None
        self._write_row("step", row)

    def evaluation(self, row: EvalRow) -> None:
        """Write one evaluation; ``time_s`` is filled in from the clock when the row has none."""
        self._write_row("eval", row)

    def event(self, name: str, **facts: Any) -> None:
        """Write anything else worth knowing later; give ``step=`` where there is one."""
        self._write({"kind": "event", "name": name, "time_s": self.now_s(), **facts})

    def close(self) -> None:
        """Flush to the disk and close; further calls do nothing."""
        descriptor, self.descriptor = self.descriptor, None
        if descriptor is not None:
            try:
                sync(descriptor)
            finally:
                os.close(descriptor)

    def __enter__(self) -> "Record":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write_row(self, kind: str, row: StepRow | EvalRow) -> None:
        if self.descriptor is None:
            return
        facts = dict(vars(row))
        if facts["time_s"] is None:
            facts["time_s"] = self.now_s()
        self._write({"kind": kind} | {k: v for k, v in facts.items() if v is not None and v != {}})

    def _write(self, entry: Mapping[str, Any]) -> None:
        if self.descriptor is None:
            return
        try:
            write_line(self.descriptor, json.dumps(_plain(entry), allow_nan=False))
        except OSError as error:
            raise LogError(f"{self.path}: cannot write the record: {error.strerror}") from None


@dataclass(frozen=True)
class Metrics:
    """A metrics file as columns. Missing numbers are NaN; step columns have length N, evaluation columns length M."""

    path: Path
    run: dict[str, Any]
    step: np.ndarray
    loss: np.ndarray
    terms: dict[str, np.ndarray]
    lr: np.ndarray
    grad_norm: np.ndarray
    step_ms: np.ndarray
    data_ms: np.ndarray
    passes: np.ndarray
    peak_gib: np.ndarray
    samples: np.ndarray
    time_s: np.ndarray
    phases_ms: dict[str, np.ndarray]
    eval_step: np.ndarray
    eval_samples: np.ndarray
    eval_lddt_ca: np.ndarray
    eval_seconds: np.ndarray
    eval_time_s: np.ndarray
    eval_chains: list[dict[str, float]]
    events: list[dict[str, Any]]


def read_metrics(path: Path | str) -> Metrics:
    """Read ``metrics.jsonl`` (or the run folder that holds it).

    An incomplete last line, as a killed process leaves it, is ignored. Raises LogError for a missing file and, with the
    line number, for any other line that is not a record.
    """
    path = metrics_path(path)
    entries = list(_entries(path))
    steps = [e for e in entries if e["kind"] == "step"]
    evals = [e for e in entries if e["kind"] == "eval"]
    headers = [e for e in entries if e["kind"] == "run"]
    return Metrics(
        path=path,
        run={k: v for header in headers for k, v in header.items() if k != "kind"},
        step=np.array([e["step"] for e in steps], np.int64),
        **{name: _column(steps, name) for name in _STEP_COLUMNS},
        terms=_columns(steps, "terms"),
        phases_ms=_columns(steps, "phases_ms"),
        eval_step=np.array([e["step"] for e in evals], np.int64),
        **{f"eval_{name}": _column(evals, name) for name in ("samples", "lddt_ca", "seconds", "time_s")},
        eval_chains=[e.get("chains") or {} for e in evals],
        events=[e for e in entries if e["kind"] == "event"],
    )


def metrics_path(path: Path | str) -> Path:
    """The metrics file of a run folder, or the file itself."""
    path = Path(path)
    return path / METRICS_FILE if path.is_dir() else path


_STEP_COLUMNS = ("loss", "lr", "grad_norm", "step_ms", "data_ms", "passes", "peak_gib", "samples", "time_s")
_KINDS = ("run", "step", "eval", "event")
_NUMBERS = {"step": _STEP_COLUMNS, "eval": ("samples", "lddt_ca", "seconds")}
_GROUPS = {"step": ("terms", "phases_ms"), "eval": ("chains",)}


def _entries(path: Path) -> Iterator[dict[str, Any]]:
    """All complete entries of a metrics file, in file order."""
    lines = _text(path).split("\n")
    if len(lines) == 1 and lines[0].strip("\0") and not lines[0].startswith("{"):
        raise LogError(f"{path}: holds no record; is it the metrics file of a run?")
    for number, line in enumerate(lines[:-1], 1):
        if line := line.strip("\0"):  # blocks that a crashed file system never filled
            yield _entry(path, number, line)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise LogError(
            f"{path}: cannot read metrics ({error.strerror}); give a run folder or a metrics.jsonl"
        ) from None


def _entry(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        entry = parse_json(line)
    except ValueError as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else error
        raise LogError(f"{path}:{number}: not a JSON object ({reason}); delete the line to go on") from None
    if not isinstance(entry, dict) or entry.get("kind") not in _KINDS:
        raise LogError(f"{path}:{number}: no record: 'kind' must be one of {', '.join(_KINDS)}")
    needed = {"step": ("step", "loss"), "eval": ("step", "samples", "lddt_ca"), "event": ("name",)}
    for key in needed.get(entry["kind"], ()):
        if key not in entry:
            raise LogError(f"{path}:{number}: {entry['kind']} record without '{key}'")
    _check_types(entry, f"{path}:{number}")
    return entry


def _check_types(entry: dict[str, Any], place: str) -> None:
    """Refuse other types where the report counts. Raises LogError naming line and key."""
    kind, step = entry["kind"], entry.get("step", 0)
    if not isinstance(step, int) or isinstance(step, bool) or abs(step) > 1 << 53:
        raise LogError(f"{place}: {kind}: step is {str(step)[:40]!r}, must be a whole number")
    if kind == "event" and not isinstance(entry["name"], str):
        raise LogError(f"{place}: event: name is {str(entry['name'])[:40]!r}, must be text")
    if kind == "event" and entry["name"] == "loader" and not _is_loader_event(entry):
        raise LogError(f"{place}: event loader: slowest must list chains with seconds, beside workers and prefetch")
    numbers = {name: entry.get(name) for name in ("time_s", *_NUMBERS.get(kind, ()))}
    for group in _GROUPS.get(kind, ()):
        inside = entry.get(group) or {}
        if not isinstance(inside, dict):
            raise LogError(f"{place}: {kind}: {group} is {str(inside)[:40]!r}, must be a JSON object of numbers")
        numbers |= {f"{group}.{name}": value for name, value in inside.items()}
    for name, value in numbers.items():
        if value is not None and not is_number(value):
            raise LogError(f"{place}: {kind}: {name} is {str(value)[:40]!r}, must be a number")


def _is_loader_event(entry: dict[str, Any]) -> bool:
    slowest = entry.get("slowest")
    return (
        {"workers", "prefetch"} <= entry.keys()
        and isinstance(slowest, list)
        and all(
            isinstance(sample, dict) and "chain" in sample and is_number(sample.get("seconds")) for sample in slowest
        )
    )


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _column(entries: list[dict[str, Any]], name: str) -> np.ndarray:
    return np.array([_number(e.get(name)) for e in entries], np.float64)


def _columns(entries: list[dict[str, Any]], group: str) -> dict[str, np.ndarray]:
    groups = [e.get(group) or {} for e in entries]
    names = list(dict.fromkeys(name for inside in groups for name in inside))
    return {n: np.array([_number(inside.get(n)) for inside in groups], np.float64) for n in names}


def _plain(value: Any) -> Any:
    """Plain Python for JSON: scalars of array libraries unpacked, non-finite numbers to None, paths to text."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    return str(value)


def _set_aside(path: Path) -> None:
    if path.exists() and path.stat().st_size:
        path.rename(_free_name(path))


def _free_name(path: Path) -> Path:
    """``metrics.N.jsonl`` beside the file, with the first N that is free."""
    return next(name for n in itertools.count(1) if not (name := path.with_name(f"metrics.{n}.jsonl")).exists())


def _truncate_after(path: Path, step: int) -> float:
    """Drop what happened after ``step``; return the last ``time_s`` that is kept (0.0 if there is none).

    Lines that are no records, as a crash or a full disk leaves them, do not keep a run from going on: they are dropped
    with a warning, and the file as it was stays beside the new one.
    """
    entries, broken = _readable(path)
    if broken:
        whole = _free_name(path)
        shutil.copyfile(path, whole)
        log.warning("%s; %d such lines are left out, %s keeps the file as it was", broken[0], len(broken), whole)
    kept = [e for e in entries if e["kind"] == "run" or _number(e.get("step", step)) <= step]
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(e) + "\n" for e in kept)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    return max((_number(e.get("time_s")) for e in kept if e.get("time_s") is not None), default=0.0)


def _readable(path: Path) -> tuple[list[dict[str, Any]], list[LogError]]:
    """The complete entries of a file, and what is wrong with each line that is none; a cut-off last one is neither."""
    entries: list[dict[str, Any]] = []
    broken: list[LogError] = []
    for number, line in enumerate(_text(path).split("\n")[:-1], 1):
        try:
            if line := line.strip("\0"):
                entries.append(_entry(path, number, line))
        except LogError as error:
            broken.append(error)
    return entries, broken
