"""The published MLPerf HPC v3.0 OpenFold results, for comparison (facts from the result logs of the submitters)."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import scalefold
from scalefold.errors import LogError

PUBLISHED_RUNS = Path(scalefold.__file__).parent / "mlperf" / "log" / "published_runs.csv"


@dataclass(frozen=True)
class Published:
    """One submitter's result on one system: scored minutes and what a scaling plot needs."""

    submitter: str
    system: str
    scaling: str
    accelerator: str
    num_accelerators: int
    global_batch_size: int
    dap_size: int
    num_runs: int
    minutes: float
    step_s: float

    @property
    def label(self) -> str:
        """``NVIDIA 2080 × H100``."""
        return f"{self.submitter} {self.num_accelerators} × {self.accelerator.split('-')[0]}"


def olympic_mean(values: Sequence[float]) -> float:
    """Mean without the smallest and the largest value (MLPerf scoring); plain mean below three values."""
    ordered = sorted(values)
    return mean(ordered[1:-1] if len(ordered) > 2 else ordered)


def read_published(path: Path | str = PUBLISHED_RUNS) -> list[Published]:
    """Published results, strong (time to solution) and weak (throughput instances), in the file's order.

    Raises LogError if the file is missing or lacks a column.
    """
    groups: dict[tuple[str, str, str], list[dict[str, str]]] = {}
    try:
        with Path(path).open(newline="", encoding="utf-8") as stream:
            for row in csv.DictReader(stream):
                groups.setdefault((row["submitter"], row["system"], row["scaling"]), []).append(row)
        return [_published(key, rows) for key, rows in groups.items()]
    except OSError as error:
        raise LogError(f"{path}: cannot read published results ({error.strerror})") from None
    except KeyError as error:
        raise LogError(f"{path}: column {error} is missing") from None


def _published(key: tuple[str, str, str], rows: list[dict[str, str]]) -> Published:
    first = rows[0]
    minutes = [float(row["ttt_seconds"]) / 60 for row in rows]
    return Published(
        submitter=key[0],
        system=key[1],
        scaling=key[2],
        accelerator=first["accelerator"],
        num_accelerators=int(first["accelerators_used"]),
        global_batch_size=int(first["global_batch"]),
        dap_size=int(first["dap_size_implied"]),
        num_runs=len(rows),
        minutes=olympic_mean(minutes) if key[2] == "strong" else mean(minutes),
        step_s=mean(float(row["step_s_median"]) for row in rows),
    )
