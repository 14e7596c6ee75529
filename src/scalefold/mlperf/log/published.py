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
from dataclasses import dataclass
from importlib import resources


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
    text = resources.files("scalefold.mlperf.log").joinpath("published_runs.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


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
