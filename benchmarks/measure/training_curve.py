"""Training curves of the full model on real chains: the kernels against the plain definitions, same seed and batches.

    # 200 steps, slow
    python benchmarks/measure/training_curve.py STORE --out benchmarks/results/curve_plain.jsonl --variant plain
    python benchmarks/measure/training_curve.py STORE --baseline benchmarks/results/curve_plain.jsonl   # ours, compared

STORE needs evaluation chains (``scalefold prepare --evaluation-list``), though none is evaluated. One pass per step.
Crops are shorter than the benchmark's, so that the plain path takes less long; nothing else differs. Exit status 1 if
the curves leave the band of ``scalefold compare-runs``.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from real_chains import BASE, train
from scalefold.report.record import METRICS_FILE

VARIANTS = {"ours": [], "plain": ["execution.kernels=reference", "execution.activation_checkpointing=true"]}


def settings(variant: str, crop: int) -> list[str]:
    """What differs from the benchmark's configuration."""
    return [
        "data.filter_by_alignments=true",
        "data.num_recycling_iters=0",
        f"data.train_sequence_crop_size={crop}",
        "execution.warm_up=false",  # no evaluation here
        *VARIANTS[variant],
    ]


def main() -> int:
    """Train, keep, compare; return the comparison's exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path, help="prepared data set")
    parser.add_argument("--variant", choices=sorted(VARIANTS), default="ours")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--crop", type=int, default=128)
    parser.add_argument("--workers", type=int, default=12, help="loader processes")
    parser.add_argument("--out", type=Path, help="keep the metrics here")
    parser.add_argument("--baseline", type=Path, help="metrics of an earlier run to compare with")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        own = settings(arguments.variant, arguments.crop)
        train(BASE, arguments.store, arguments.steps, arguments.workers, own, run_dir)
        metrics = run_dir / METRICS_FILE
        if arguments.out is not None:
            shutil.copy(metrics, arguments.out)
        if arguments.baseline is None:
            return 0
        command = [sys.executable, "-m", "scalefold", "compare-runs", str(arguments.baseline), str(metrics)]
        return subprocess.run(command).returncode


if __name__ == "__main__":
    sys.exit(main())
