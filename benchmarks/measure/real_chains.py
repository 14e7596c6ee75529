"""Whole training steps on real chains: step time by recycling passes, wait for data, memory.

    scalefold prepare ... --evaluation-list IDS --out STORE
    python benchmarks/measure/real_chains.py STORE                     # configs/base.yaml: full model, bf16, one device
    python benchmarks/measure/real_chains.py STORE --workers 12 --steps 96 --set data.filter_by_alignments=true

Runs ``scalefold train`` without evaluation and checkpoints, reads its metrics, prints one row per number of passes and
one for all, and appends them to ``benchmarks/results/real_chains.csv``. The first steps, in which the workers fill the
queue, are left out. ``wait_percent`` is the time the trainer waited for batches, of the time of the steps.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from common import BASE, FOLDER, Timing, append_rows, device_name, facts, print_table
from scalefold.processors import processors
from scalefold.report.record import METRICS_FILE, Metrics, read_metrics

FILLING = 4  # steps left out
NO_EVALUATION = 1_000_000
SEED = 5
STEPS_DONE = 4  # exit status of ``scalefold train`` at the end of the step budget


def train(
    config: Path, store: Path, steps: int, workers: int, extra: list[str], run_dir: Path, gpu: int | None = None
) -> Metrics:
    """Train ``steps`` steps in a process of its own, on ``gpu`` or the first one; exits with its status if it fails."""
    settings = [
        f"data.store_dir={store}",
        f"data.num_workers={workers}",
        f"training.seed={SEED}",
        f"training.num_train_iters={steps}",
        f"training.val_every_iters={NO_EVALUATION}",
        f"run.run_dir={run_dir}",
        "run.checkpoint_every_iters=0",
        "run.log_every_iters=1",
    ]
    command = [sys.executable, "-m", "scalefold", "train", str(config), *settings, *extra]
    chosen = os.environ if gpu is None else {**os.environ, "CUDA_VISIBLE_DEVICES": device_name(gpu)}
    status = subprocess.run(command, env=chosen).returncode
    if status not in (0, STEPS_DONE):
        sys.exit(status)
    return read_metrics(run_dir / METRICS_FILE)


def row(label: str, metrics: Metrics, chosen: np.ndarray, workers: int) -> dict[str, object]:
    """One row of the table over the ``chosen`` steps, of which there is at least one."""
    step_ms, waited_ms = metrics.step_ms[chosen], metrics.data_ms[chosen]
    timing = Timing.of(step_ms.tolist())
    return {
        **facts(),
        "workers": workers,
        "passes": label,
        "steps": len(step_ms),
        "mean_ms": round(float(step_ms.mean()), 2),
        "median_ms": round(timing.median_ms, 2),
        "p10_ms": round(timing.p10_ms, 2),
        "p90_ms": round(timing.p90_ms, 2),
        "wait_percent": round(100.0 * float(waited_ms.sum() / step_ms.sum()), 3),
        "peak_gib": round(float(metrics.peak_gib[chosen].max()), 2),
    }


def main() -> int:
    """Run, print and append; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path, help="prepared data set")
    parser.add_argument("--config", type=Path, default=BASE)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--workers", type=int, default=max(1, processors() - 4), help="loader processes")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further configuration")
    parser.add_argument("--csv", type=Path, default=FOLDER / "real_chains.csv")
    arguments = parser.parse_args()
    if arguments.steps <= FILLING:
        parser.error(f"--steps must be more than the {FILLING} that are left out")
    steps, workers = arguments.steps, arguments.workers
    with tempfile.TemporaryDirectory() as folder:
        metrics = train(arguments.config, arguments.store, steps, workers, arguments.set, Path(folder) / "run")
    counted = metrics.step > FILLING
    kinds = np.unique(metrics.passes[counted])
    rows = [row(f"{passes:.0f}", metrics, counted & (metrics.passes == passes), workers) for passes in kinds]
    mean = np.mean([own["mean_ms"] for own in rows])
    rows.append(row("all", metrics, counted, workers))
    print_table(rows)
    print(f"mean over {len(kinds)} numbers of passes, each counted once: {mean:.1f} ms")
    append_rows(arguments.csv, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
