"""Training curves of the full model on real chains: the kernels against the plain definitions, same seed and batches.

    python benchmarks/measure/training_curve.py STORE                        # ours, against the plain curve in --folder
    python benchmarks/measure/training_curve.py STORE --variants plain ours  # both anew, at once on two GPUs

STORE needs evaluation chains (``scalefold prepare --evaluation-list``), though none is evaluated. One pass per step.
Crops are shorter than the benchmark's, so that the plain path takes less long; nothing else differs. Metrics are kept
as ``curve_VARIANT.jsonl`` in --folder, the comparison is a row of ``training_curve.csv`` there. Exit status 1 if the
curves leave the band of ``scalefold compare-runs``.
"""

import argparse
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch

from common import FOLDER, append_rows, facts
from real_chains import BASE, train
from scalefold.report.compare import Comparison, compare_runs
from scalefold.report.record import METRICS_FILE, Metrics

VARIANTS = {"ours": [], "plain": ["execution.kernels=reference"]}
RECOMPUTED = "execution.activation_checkpointing=true"
LAST = 20  # steps whose mean loss is shown


def settings(variant: str, crop: int) -> list[str]:
    """What differs from the benchmark's configuration."""
    return [
        "data.filter_by_alignments=true",
        "data.num_recycling_iters=0",
        f"data.train_sequence_crop_size={crop}",
        "execution.warm_up=false",  # no evaluation here
        *VARIANTS[variant],
    ]


def curve(folder: Path, variant: str) -> Path:
    """Where the metrics of a variant are kept."""
    return folder / f"curve_{variant}.jsonl"


def train_variant(arguments: argparse.Namespace, variant: str, gpu: int | None) -> Metrics:
    """Train one variant on a GPU (None: whatever is there) and keep its metrics."""
    own = [*settings(variant, arguments.crop), *arguments.set]
    if variant == "plain" and arguments.recompute:
        own.append(RECOMPUTED)
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        metrics = train(arguments.config, arguments.store, arguments.steps, arguments.workers, own, run_dir, gpu)
        shutil.copy(run_dir / METRICS_FILE, curve(arguments.folder, variant))
    return metrics


def train_all(arguments: argparse.Namespace) -> dict[str, Metrics]:
    """Every variant: each on a GPU of its own if there are enough, else one after the other."""
    variants = arguments.variants
    gpus: list[int | None] = list(range(torch.cuda.device_count()))
    if len(gpus) < len(variants):
        return {variant: train_variant(arguments, variant, None) for variant in variants}
    with ThreadPoolExecutor(len(variants)) as pool:
        found = pool.map(partial(train_variant, arguments), variants, gpus[: len(variants)])
        return dict(zip(variants, found, strict=True))


def row(metrics: Metrics, found: Comparison, crop: int) -> dict[str, object]:
    """Of ours: time, losses, and the loss or term whose window means come nearest to, or farthest over, their band."""
    plain = found.metrics[0]
    nearest = max(found.rows, key=lambda own: own.max_window / max(own.band, 1e-12))
    return {
        **facts(),
        "steps": nearest.num_steps,
        "crop": crop,
        "ours_ms": round(float(np.median(metrics.step_ms)), 2),
        "plain_ms": round(float(np.median(plain.step_ms)), 2),
        "first_loss": round(float(metrics.loss[:LAST].mean()), 3),
        "last_loss": round(float(metrics.loss[-LAST:].mean()), 3),
        "plain_last_loss": round(float(plain.loss[: len(metrics.loss)][-LAST:].mean()), 3),
        "compared": len(found.rows),
        "nearest": nearest.quantity,
        "difference": f"{nearest.max_window:.2e}",
        "band": f"{nearest.band:.2e}",
        "at_step": nearest.worst_step,
        "same": "yes" if found.ok else "no",
    }


def main() -> int:
    """Train, keep, compare; return 1 if the curves differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path, help="prepared data set")
    parser.add_argument("--config", type=Path, default=BASE)
    parser.add_argument("--variants", nargs="+", choices=sorted(VARIANTS), default=["ours"])
    parser.add_argument(
        "--recompute", action="store_true", help="plain: activation checkpointing, for cards below 64 GiB"
    )
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--crop", type=int, default=128)
    parser.add_argument("--workers", type=int, default=12, help="loader processes of each run")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further configuration")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="curves and table")
    arguments = parser.parse_args()
    trained = train_all(arguments)
    if "ours" not in trained:
        return 0
    found = compare_runs(curve(arguments.folder, "plain"), curve(arguments.folder, "ours"))
    print(found.text())
    append_rows(arguments.folder / "training_curve.csv", [row(trained["ours"], found, arguments.crop)])
    return int(not found.ok)


if __name__ == "__main__":
    sys.exit(main())
