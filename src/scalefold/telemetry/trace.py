"""Where the milliseconds of a step went, from the Chrome traces that a profiled run wrote."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scalefold.errors import LogError
from scalefold.telemetry import PROFILE_FOLDER
from scalefold.textfile import is_finite_number, parse_json

#: Group and what the names of its kernels (on a CPU: operators) have in common; the first that fits counts.
GROUPS = (
    ("exchange", r"nccl|gloo|c10d|_send_parts|_copy_parts|_sum_parts|multimem"),
    (
        "attention",
        r"forward_(rows|tiled)|backward_(rows|keys|queries)|hopper_(forward|keys|rows)|rows_backward"
        r"|attend|gate_|project_columns",
    ),
    ("optimizer", r"adam|_square_kernel|_total_kernel"),
    ("matrix products", r"gemm|cutlass|xmma|nvjet|cublas|aten::(mm|addmm|bmm|baddbmm)\b"),
    ("fused by Inductor", r"^triton_"),
    (
        "own kernels beside attention",
        r"^_\w+_kernel|^_kernel|^hopper_|^(place|features|norm|sums|values|gradients)_(backward_)?kernel",
    ),
    ("copies and fills", r"^Mem(cpy|set)|aten::(copy_|fill_|zero_|_to_copy)\b"),
    ("single operations", r"at::native|^aten::"),
)
_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_NUM_LONGEST = 10
_STEP = re.compile(r"step \d+")


@dataclass(frozen=True)
class Event:
    """A stretch of time, in microseconds."""

    category: str
    name: str
    thread: str
    start: float
    stop: float


@dataclass(frozen=True)
class StepAnatomy:
    """Means over the steps of a trace, in milliseconds per step.

    ``host`` is what the training process did, by named range; ``work`` what the GPU did, by group of kernels, or,
    ``on_gpu`` being false, what the CPU did inside operators. The groups of a GPU may overlap; ``exchange_alone`` is
    what nothing overlapped, ``idle`` when no kernel ran. ``longest``: name, calls per step, milliseconds per step.
    """

    file: Path
    steps: int
    step_ms: float
    on_gpu: bool
    host: dict[str, float]
    work: dict[str, float]
    exchange_alone_ms: float
    idle_ms: float
    launches: float
    longest: tuple[tuple[str, float, float], ...]

    def rows(self) -> list[list[str]]:
        """Part, milliseconds per step, share of the step."""
        where = "GPU" if self.on_gpu else "operators"
        parts = {f"host: {name}": ms for name, ms in self.host.items()}
        parts |= {f"{where}: {name}": ms for name, ms in self.work.items()}
        if self.on_gpu:
            parts |= {"GPU: exchange, alone": self.exchange_alone_ms, "GPU: idle": self.idle_ms}
        return [[name, f"{ms:.2f}", f"{100 * ms / self.step_ms:.1f} %"] for name, ms in parts.items()]


def read_anatomies(run_dir: Path) -> list[StepAnatomy]:
    """One per trace of a run folder, in the order of names; LogError naming a file that is no trace of ours."""
    return [read_anatomy(file) for file in sorted((run_dir / PROFILE_FOLDER).glob("steps_*.json"))]


def read_anatomy(file: Path) -> StepAnatomy:
    """See ``StepAnatomy``. Raises LogError naming the file."""
    events = _events(file)
    ranges = [event for event in events if event.category == "user_annotation"]
    steps = sorted((event for event in ranges if _STEP.fullmatch(event.name)), key=lambda event: event.start)
    if not steps:
        raise LogError(f"{file}: no range named `step N`: no trace of a run; delete it to go on")
    count, begin = len(steps), steps[0].start
    device = [event for event in events if event.category in _DEVICE and event.stop > begin]
    end = max(event.stop for event in (*steps, *device))
    span = end - begin if device else sum(event.stop - event.start for event in steps)
    busy = _covered(device)
    working = [(event.name, event.stop - event.start) for event in device] or _inside_operators(events, steps)
    return StepAnatomy(
        file=file,
        steps=count,
        step_ms=span / count / 1e3,
        on_gpu=bool(device),
        host=_scaled(_host(ranges, steps), count),
        work=_scaled(_by_group(working), count),
        exchange_alone_ms=(busy - _covered(e for e in device if group_of(e.name) != "exchange")) / count / 1e3,
        idle_ms=(end - begin - busy) / count / 1e3 if device else 0.0,
        launches=len(device) / count,
        longest=_longest(working, count),
    )


def group_of(name: str) -> str:
    """The group of a kernel or operator."""
    return next((group for group, pattern in GROUPS if re.search(pattern, name)), "other")


def _events(file: Path) -> list[Event]:
    try:
        entries = parse_json(file.read_bytes())["traceEvents"]
        return [event for entry in entries if (event := _event(entry)) is not None]
    except OSError as error:
        raise LogError(f"{file}: cannot read the trace ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise LogError(f"{file}: no Chrome trace; delete it to go on") from None


def _event(entry: dict[str, Any]) -> Event | None:
    start, duration = entry.get("ts"), entry.get("dur")
    if entry.get("ph") != "X" or not (is_finite_number(start) and is_finite_number(duration)):
        return None
    return Event(str(entry.get("cat")), str(entry.get("name")), str(entry.get("tid")), start, start + duration)  # type: ignore[operator]


def _nested(events: Iterable[Event]) -> Iterator[tuple[Event, int, float]]:
    """Events of one category with their depth and their own time, that of the events inside them taken off."""
    open_: list[list[Any]] = []
    for event in sorted(events, key=lambda e: (e.thread, e.start, -e.stop)):
        while open_ and (open_[-1][0].thread != event.thread or open_[-1][0].stop <= event.start):
            inner, own = open_.pop()
            yield inner, len(open_), own
        if open_:
            open_[-1][1] -= event.stop - event.start
        open_.append([event, event.stop - event.start])
    while open_:
        inner, own = open_.pop()
        yield inner, len(open_), own


def _host(ranges: Sequence[Event], steps: Sequence[Event]) -> dict[str, float]:
    """Microseconds of the ranges directly inside steps, in the order in which they begin, and of the rest."""
    found: dict[str, float] = {}
    for event, depth, _ in sorted(_nested(e for e in ranges if e.thread == steps[0].thread), key=lambda n: n[0].start):
        if depth == 1:
            found[event.name] = found.get(event.name, 0.0) + event.stop - event.start
    whole = sum(step.stop - step.start for step in steps)
    return found | {"other": whole - sum(found.values())}


def _inside_operators(events: Sequence[Event], steps: Sequence[Event]) -> list[tuple[str, float]]:
    """Name and own microseconds of the operators that a CPU ran during the steps."""
    begin, end = steps[0].start, steps[-1].stop
    operators = (e for e in events if e.category == "cpu_op" and begin <= e.start < end)
    return [(event.name, own) for event, _, own in _nested(operators)]


def _by_group(working: Iterable[tuple[str, float]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, us in working:
        group = group_of(name)
        found[group] = found.get(group, 0.0) + us
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _scaled(us: dict[str, float], count: int) -> dict[str, float]:
    return {name: value / count / 1e3 for name, value in us.items()}


def _covered(events: Iterable[Event]) -> float:
    """Microseconds in which at least one of the events takes place."""
    total, until = 0.0, float("-inf")
    for event in sorted(events, key=lambda e: e.start):
        total += max(0.0, event.stop - max(event.start, until))
        until = max(until, event.stop)
    return total


def _longest(working: Iterable[tuple[str, float]], count: int) -> tuple[tuple[str, float, float], ...]:
    calls: dict[str, list[float]] = {}
    for name, us in working:
        calls.setdefault(name, []).append(us)
    rows = [(name, len(us) / count, sum(us) / count / 1e3) for name, us in calls.items()]
    return tuple(sorted(rows, key=lambda row: -row[2])[:_NUM_LONGEST])
