"""The 56 OpenFold runs published with MLPerf HPC v3.0: facts to compare with, and to rebuild logs from.

``published_runs.csv`` has one row per run. Columns used here: submitter, system, scaling (strong or weak), run index,
nodes_used and accelerators (of the run or instance), ranks_logged, precision, dataloader, global_batch, grad_accum,
eval_mode (sync or async), seed, init_seconds, ttt_seconds (``run_stop`` - ``run_start``), samples_to_converge,
eval_points (JSON list of [samples, mean lDDT-Cα]), the phases of the run in seconds and the two clock stamps. The
remaining columns (olympic_counted, step_s_median, samples_per_s_median, batch_wait_s_per_step_median, ...) are derived
from the same logs and available through :func:`published_rows`.
"""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from scalefold.errors import LogError

PUBLISHED_RUNS = Path(__file__).with_name("published_runs.csv")
#: Reference convergence, 20 runs per point: batch size -> samples to converge, mean and standard deviation.
REFERENCE_CONVERGENCE = {128: (88832.0, 8760.0), 256: (133120.0, 13738.0)}


@dataclass(frozen=True, kw_only=True)
class PublishedRun:
    """One published run or weak-scaling instance."""

    submitter: str
    system: str
    scaling: str
    run: int
    accelerator: str
    nodes: int
    accelerators_per_node: int
    accelerators: int
    ranks: int
    precision: str
    dataloader: str
    global_batch_size: int
    gradient_accumulation_steps: int
    asynchronous: bool
    seed: int
    init_s: float
    ttt_s: float
    samples_to_converge: int
    evaluations: tuple[tuple[int, float], ...]
    first_epoch_start_s: float
    first_cycle_s: float
    cycle_s: float
    first_gap_s: float
    gap_s: float
    first_eval_s: float
    eval_s: float
    batch_wait_s: float
    run_start_ms: int
    run_stop_ms: int


def published_rows() -> list[dict[str, str]]:
    """All rows and columns of the table, as text."""
    return list(csv.DictReader(PUBLISHED_RUNS.read_text(encoding="utf-8").splitlines()))


def published_runs(*, submitter: str | None = None, scaling: str | None = None) -> list[PublishedRun]:
    """The published runs, optionally of one submitter ("NVIDIA", "HPE+LBNL", "TACC", "Clemson") or scaling."""
    runs = [_run(row) for row in published_rows()]
    return [r for r in runs if submitter in (None, r.submitter) and scaling in (None, r.scaling)]


def _run(row: dict[str, str]) -> PublishedRun:
    return PublishedRun(
        submitter=row["submitter"],
        system=row["system"],
        scaling=row["scaling"],
        run=int(row["run"]),
        accelerator=row["accelerator"],
        nodes=int(row["nodes_used"]),
        accelerators_per_node=int(row["accelerators_per_node"]),
        accelerators=int(row["accelerators_used"]),
        ranks=int(row["ranks_logged"]),
        precision=row["precision"],
        dataloader=row["dataloader"],
        global_batch_size=int(row["global_batch"]),
        gradient_accumulation_steps=int(row["grad_accum"]),
        asynchronous=row["eval_mode"] == "async",
        seed=int(row["seed"]),
        init_s=float(row["init_seconds"]),
        ttt_s=float(row["ttt_seconds"]),
        samples_to_converge=int(row["samples_to_converge"]),
        evaluations=tuple((int(samples), float(value)) for samples, value in json.loads(row["eval_points"])),
        first_epoch_start_s=float(row["time_to_first_epoch_start_s"]),
        first_cycle_s=float(row["first_cycle_s"]),
        cycle_s=float(row["later_cycles_median_s"]),
        first_gap_s=float(row["first_handoff_or_eval_gap_s"]),
        gap_s=float(row["later_gap_median_s"]),
        first_eval_s=float(row["first_eval_s"]),
        eval_s=float(row["later_eval_median_s"]),
        batch_wait_s=float(row["batch_wait_s_per_step_median"] or 0.0),
        run_start_ms=int(row["run_start_ms"]),
        run_stop_ms=int(row["run_stop_ms"]),
    )


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
