"""Which ranks held the others up, and what the GPUs used, from the files of ``nodes``."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from scalefold.telemetry import NODES_FOLDER
from scalefold.textfile import is_finite_number, parse_json

_NUM_CHAINS = 3
_JOULES_PER_KWH = 3.6e6
HEAD = ("rank", "node", "does", "ms per step", "data wait, ms", "SM clock, MHz", "lowest, MHz", "W", "°C",
        "may cost, ms", "slowest chains")  # fmt: skip
_MEASURED = ("step_ms", "data_ms", "clock_mhz", "clock_min_mhz", "power_w", "temperature_c", "energy_j")


@dataclass(frozen=True)
class RankLoad:
    """One rank over all its cycles; None where nobody measured.

    ``step_ms`` and ``data_ms`` are means per step, ``clock_mhz`` and ``power_w`` means over cycles, ``temperature_c``
    the highest, ``energy_j`` the sum. ``lag_ms`` estimates what the rank costs the others per step: its wait for data
    beyond the median rank's, and its step, longer by as much as its clock is below the median rank's.
    """

    rank: int
    node: str
    role: str
    steps: int = 0
    step_ms: float | None = None
    data_ms: float | None = None
    clock_mhz: float | None = None
    clock_min_mhz: float | None = None
    power_w: float | None = None
    temperature_c: float | None = None
    energy_j: float | None = None
    slowest: tuple[tuple[str, float], ...] = ()
    lag_ms: float = 0.0


@dataclass(frozen=True)
class Loads:
    """All ranks, those that cost most first."""

    ranks: tuple[RankLoad, ...] = ()

    @property
    def energy_kwh(self) -> float | None:
        """Of all GPUs since the clock's start; without hosts, network and cooling."""
        known = [r.energy_j for r in self.ranks if r.energy_j is not None]
        return sum(known) / _JOULES_PER_KWH if known else None

    @property
    def slowest(self) -> RankLoad | None:
        """The training rank that costs the others most, if it costs them more than a hundredth of a step."""
        first = next((r for r in self.ranks if r.role == "train"), None)
        return first if first is not None and first.lag_ms > (first.step_ms or 0.0) / 100 > 0 else None

    def rows(self, count: int) -> list[list[str]]:
        """The first ``count`` ranks under ``HEAD``."""
        return [_row(load) for load in self.ranks[:count]]


def read_loads(run_dir: Path, result: str | None = None) -> Loads:
    """The ranks of a run folder; of the log ``result`` (stem), else of the newest that any line names.

    Lines that a crash cut short are left out.
    """
    lines = [(file.stem, line) for file in sorted((run_dir / NODES_FOLDER).glob("*.jsonl")) for line in _lines(file)]
    if not lines:
        return Loads()
    wanted = result or max(reversed(lines), key=lambda pair: pair[1]["time"])[1]["result"]  # of equals the last line
    ranks: dict[int, list[tuple[str, dict[str, Any]]]] = {}
    for node, line in lines:
        if line["result"] == wanted:
            ranks.setdefault(line["rank"], []).append((node, line))
    return Loads(tuple(_with_lags([_load(rank, found) for rank, found in sorted(ranks.items())])))


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    for text in file.read_bytes().split(b"\n"):
        try:
            line = parse_json(text)
        except ValueError:
            continue
        if _is_line(line):
            yield line


def _is_line(line: Any) -> bool:
    if not isinstance(line, dict) or not isinstance(line.get("slowest", []), list):
        return False
    pairs = all(isinstance(p, list) and len(p) == 2 and is_finite_number(p[1]) for p in line.get("slowest", []))
    numbers = all(is_finite_number(line.get(key, 0)) for key in ("time", "rank", "steps", *_MEASURED))
    return pairs and numbers and {"time", "result", "role", "rank"} <= line.keys()


def _load(rank: int, found: Sequence[tuple[str, dict[str, Any]]]) -> RankLoad:
    lines = [line for _, line in found]
    node, last = found[-1][0], lines[-1]
    weights = [line.get("steps", 0) for line in lines]
    chains = {str(chain): seconds for line in lines for chain, seconds in line.get("slowest", [])}
    return RankLoad(
        rank,
        node,
        str(last["role"]),
        steps=sum(weights),
        step_ms=_mean(lines, "step_ms", weights),
        data_ms=_mean(lines, "data_ms", weights),
        clock_mhz=_mean(lines, "clock_mhz"),
        clock_min_mhz=min(_known(lines, "clock_min_mhz"), default=None),
        power_w=_mean(lines, "power_w"),
        temperature_c=max(_known(lines, "temperature_c"), default=None),
        energy_j=sum(known) if (known := _known(lines, "energy_j")) else None,
        slowest=tuple(sorted(chains.items(), key=lambda pair: -pair[1])[:_NUM_CHAINS]),
    )


def _known(lines: Iterable[dict[str, Any]], key: str) -> list[float]:
    return [line[key] for line in lines if key in line]


def _mean(lines: Sequence[dict[str, Any]], key: str, weights: Sequence[float] | None = None) -> float | None:
    pairs = [
        (line[key], weight) for line, weight in zip(lines, weights or [1] * len(lines), strict=True) if key in line
    ]
    total = sum(weight for _, weight in pairs)
    return sum(value * weight for value, weight in pairs) / total if total else None


def _with_lags(loads: Sequence[RankLoad]) -> list[RankLoad]:
    """With estimated costs, largest first."""
    train = [load for load in loads if load.role == "train"]
    waits = [load.data_ms for load in train if load.data_ms is not None]
    clocks = [load.clock_mhz for load in train if load.clock_mhz]
    found = [replace(load, lag_ms=_lag_ms(load, waits, clocks)) if load.role == "train" else load for load in loads]
    return sorted(found, key=lambda load: (load.role != "train", -load.lag_ms, load.rank))


def _lag_ms(load: RankLoad, waits: Sequence[float], clocks: Sequence[float]) -> float:
    waited, worked = load.data_ms or 0.0, (load.step_ms or 0.0) - (load.data_ms or 0.0)
    lag = max(0.0, waited - median(waits)) if waits else 0.0
    return lag + (worked * max(0.0, 1.0 - load.clock_mhz / median(clocks)) if load.clock_mhz and clocks else 0.0)


def _row(load: RankLoad) -> list[str]:
    chains = ", ".join(f"{chain} {seconds:.2f} s" for chain, seconds in load.slowest)
    numbers = [(load.step_ms, 1), (load.data_ms, 1), (load.clock_mhz, 0), (load.clock_min_mhz, 0), (load.power_w, 0)]
    shown = ["" if value is None else f"{value:.{digits}f}" for value, digits in [*numbers, (load.temperature_c, 0)]]
    lag = f"{load.lag_ms:.1f}" if load.role == "train" else ""
    return [str(load.rank), load.node, {"train": "trains"}.get(load.role, "evaluates"), *shown, lag, chains]
