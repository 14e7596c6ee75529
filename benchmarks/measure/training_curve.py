"""Training curves of the full model on real chains: the kernels against the plain definitions, same seed and batches.

    python benchmarks/measure/training_curve.py STORE                        # ours, against the plain curve in --folder
    python benchmarks/measure/training_curve.py STORE --variants plain ours  # both anew, at once on two GPUs
    python benchmarks/measure/training_curve.py --variants ours --kept       # nothing anew: the curves in --folder
    python benchmarks/measure/training_curve.py STORE --trained 3000 --variants plain rounded ours   # as the benchmark

``rounded`` is the plain path once more, from another rounding of the weights to bf16, ``ours_rounded`` the kernels from
there: what the former differs by is no fault of theirs.
STORE needs evaluation chains (``scalefold prepare --evaluation-list``), though none is evaluated. One pass per step.
Weights are random, so the rate rises as AlphaFold's pre-training lets it (the configurations ``from_scratch``). With
--trained all variants begin from a checkpoint instead, as the benchmark does: that of a run of the kernels of so many
steps, made first.
Crops are shorter than the benchmark's, so that the plain path takes less long; nothing else differs. Metrics are kept
as ``curve_VARIANT.jsonl`` in --folder, each comparison with plain as rows of ``training_curve.csv`` there, one for the
loss and each term: ``mean_difference`` is that of means of WINDOW steps one after the other, with the standard error
that they would have if they were independent. Exit status 1 if a curve leaves the band of ``scalefold compare-runs``.
"""

import argparse
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import BASE, FOLDER, KEPT, append_rows, facts, move_within_rounding
from real_chains import SEED, train
from scalefold.config import load_config
from scalefold.data.loading.sampler import initialisation_seed
from scalefold.model.alphafold import AlphaFold
from scalefold.report.compare import Comparison, compare_runs
from scalefold.report.compare import Row as Compared
from scalefold.report.record import METRICS_FILE, Metrics
from scalefold.step.build import compute_dtype
from scalefold.step.checkpoint import RESUMABLE_FILE, Checkpoints

PLAIN = ["execution.kernels=reference"]
VARIANTS = {"ours": [], "plain": PLAIN, "rounded": PLAIN, "ours_rounded": []}
ROUNDED = ("rounded", "ours_rounded")
RECOMPUTED = "execution.activation_checkpointing=true"
WINDOW = 20  # steps
WARMUP = 1000  # steps: AlphaFold 2, Supplement 1.11.3


def settings(variant: str, crop: int) -> list[str]:
    """What differs from the benchmark's configuration."""
    return [
        "data.filter_by_alignments=true",
        "data.num_recycling_iters=0",
        f"data.train_sequence_crop_size={crop}",
        f"training.opt_learning_rate_warmup_steps={WARMUP}",
        "execution.warm_up=false",  # no evaluation here
        *VARIANTS[variant],
    ]


def curve(folder: Path, variant: str) -> Path:
    """Where the metrics of a variant are kept."""
    return folder / f"curve_{variant}.jsonl"


def known_curve(folder: Path, variant: str) -> Path:
    """That of ``folder`` if it has one, else the repository's."""
    return curve(folder if curve(folder, variant).exists() else KEPT, variant)


# --- training ---------------------------------------------------------------------------------------------------------


def train_variant(arguments: argparse.Namespace, begun: Path | None, variant: str, gpu: int | None) -> None:
    """Train one variant, from a checkpoint if there is one, on a GPU (None: whatever is there); keep its metrics."""
    own = [*settings(variant, arguments.crop), *arguments.set]
    if VARIANTS[variant] == PLAIN and arguments.recompute:
        own.append(RECOMPUTED)
    with tempfile.TemporaryDirectory() as folder:
        run_dir, weights = Path(folder) / "run", Path(folder) / "weights.pt"
        if variant in ROUNDED:
            torch.save(rounded_weights(arguments.config, own, begun), weights)
            begun = weights
        if begun is not None:
            own.append(f"training.init_checkpoint={begun}")
        train(arguments.config, arguments.store, arguments.steps, arguments.workers, own, run_dir, gpu)
        shutil.copy(run_dir / METRICS_FILE, curve(arguments.folder, variant))


def train_all(arguments: argparse.Namespace, begun: Path | None) -> None:
    """Every variant: each on a GPU of its own if there are enough, else one after the other."""
    variants = arguments.variants
    gpus: list[int | None] = list(range(torch.cuda.device_count()))
    if len(gpus) < len(variants):
        for variant in variants:
            train_variant(arguments, begun, variant, None)
        return
    with ThreadPoolExecutor(len(variants)) as pool:
        list(pool.map(partial(train_variant, arguments, begun), variants, gpus[: len(variants)]))


def trained_checkpoint(arguments: argparse.Namespace, run_dir: Path) -> Path:
    """Train the kernels --trained steps from random weights; their checkpoint."""
    own = [*settings("ours", arguments.crop), *arguments.set, f"run.checkpoint_every_iters={arguments.trained}"]
    train(arguments.config, arguments.store, arguments.trained, arguments.workers, own, run_dir, None)
    newest = Checkpoints(run_dir / "checkpoints").newest()
    if newest is None:
        sys.exit(f"{run_dir}: training left no checkpoint")
    return newest / RESUMABLE_FILE


def rounded_weights(file: Path, overrides: list[str], begun: Path | None) -> dict[str, Any]:
    """What a run begins with, random weights or a checkpoint; what computes in bf16 is moved within its rounding."""
    config = load_config(file, overrides).config
    random = torch.Generator().manual_seed(SEED)
    if begun is None:
        content = weights = AlphaFold(config.model, seed=initialisation_seed(SEED) % 2**63).state_dict()
    else:
        content = torch.load(begun, map_location="cpu", weights_only=True)
        weights = content["alphafold_state_dict"]
    for name, weight in weights.items():
        if compute_dtype(config, name) is torch.bfloat16:
            move_within_rounding(weight, random)
    return content


# --- comparison -------------------------------------------------------------------------------------------------------


def compare(arguments: argparse.Namespace, variant: str) -> bool:
    """Print, note and return whether a kept curve lies in the band of the plain one."""
    found = compare_runs(known_curve(arguments.folder, "plain"), curve(arguments.folder, variant), window=WINDOW)
    print(f"{variant}\n{found.text()}")
    append_rows(arguments.folder / "training_curve.csv", rows_of(variant, found, arguments.crop, arguments.trained))
    return found.ok


def rows_of(variant: str, found: Comparison, crop: int, trained: int) -> list[dict[str, object]]:
    """A row for the loss and one for each term."""
    run = found.metrics[1].run
    known = {**facts(), "device": run.get("device", ""), "torch": run.get("torch", ""), "variant": variant}
    known |= {"crop": crop, "warmup": WARMUP, "trained": trained}
    return [{**known, **term_row(one, found)} for one in found.rows if one.num_steps >= WINDOW]


def term_row(one: Compared, found: Comparison) -> dict[str, object]:
    """Means at the end, the window that comes nearest to (or farthest over) its band, and the mean difference."""
    plain, own = (means(values(metrics, one.quantity)[: one.num_steps]) for metrics in found.metrics)
    relative = (own - plain) / np.maximum(np.abs(plain), 1e-12)
    error = relative.std(ddof=1) / len(relative) ** 0.5 if len(relative) > 1 else 0.0
    return {
        "term": one.quantity,
        "steps": one.num_steps,
        "first": f"{own[0]:.4g}",
        "last": f"{own[-1]:.4g}",
        "plain_last": f"{plain[-1]:.4g}",
        "difference": f"{one.max_window:.2e}",
        "band": f"{one.band:.2e}",
        "at_step": one.worst_step,
        "mean_difference": f"{relative.mean():+.2e}",
        "standard_error": f"{error:.1e}",
        "same": "yes" if one.ok else "no",
    }


def values(metrics: Metrics, quantity: str) -> np.ndarray:
    """Of every step [N]."""
    return metrics.loss if quantity == "loss" else metrics.terms[quantity]


def means(own: np.ndarray) -> np.ndarray:
    """Of WINDOW steps each, one after the other."""
    count = len(own) // WINDOW
    return own[: count * WINDOW].reshape(count, WINDOW).mean(1)


def main() -> int:
    """Train, keep, compare; return 1 if a curve differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path, nargs="?", help="prepared data set")
    parser.add_argument("--config", type=Path, default=BASE)
    parser.add_argument("--variants", nargs="+", choices=sorted(VARIANTS), default=["ours"])
    parser.add_argument("--kept", action="store_true", help="train nothing")
    parser.add_argument(
        "--recompute", action="store_true", help="plain: activation checkpointing, for cards below 64 GiB"
    )
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--trained", type=int, default=0, metavar="STEPS", help="begin from weights trained so long")
    parser.add_argument("--crop", type=int, default=128)
    parser.add_argument("--workers", type=int, default=12, help="loader processes of each run")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further configuration")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="curves and table")
    arguments = parser.parse_args()
    if not arguments.kept:
        if arguments.store is None:
            parser.error("training needs a STORE")
        if arguments.trained and "plain" not in arguments.variants:
            parser.error("--trained begins all variants anew: name plain among --variants")
        with tempfile.TemporaryDirectory() as folder:
            train_all(arguments, trained_checkpoint(arguments, Path(folder) / "run") if arguments.trained else None)
    same = [compare(arguments, variant) for variant in arguments.variants if variant != "plain"]
    return int(not all(same))


if __name__ == "__main__":
    sys.exit(main())
