"""What the precision of an evaluation does to its score: lDDT-Cα of one set of weights in bf16, TF32 and fp32.

    python benchmarks/measure/evaluation_precision.py STORE           # GPU: 200 steps of the full model, then all three
    python benchmarks/measure/evaluation_precision.py STORE --config RUN/config.yaml \\
        --weights RUN/checkpoints/last/000400/swa_checkpoint.pt      # weights of an earlier run, such as the demo's

STORE is prepared with evaluation chains (``scalefold prepare --evaluation-list IDS``). Every chain is evaluated as a
run does it, in each precision; TF32 only where there is a GPU, since a CPU would compute fp32 twice. Rows go to
benchmarks/results/evaluation_precision.csv as soon as a precision is done. Exit status 1 if the average of a precision
lies more than 1e-3 from fp32's: it must then not be the default.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from statistics import mean

import torch

from common import BASE, FOLDER, append_rows, facts, print_table
from real_chains import train
from scalefold.config import Config, load_config
from scalefold.data.configured import evaluation_lengths
from scalefold.data.store.store import Store
from scalefold.eval.weights import evaluate_weights
from scalefold.step.checkpoint import AVERAGED_FILE, Checkpoints, read_state
from training_curve import settings

LARGEST_SHIFT = 1e-3  # of the average: beyond it a precision is not fit to decide whether the target is reached
EXACT = "fp32"
Scores = dict[str, dict[str, float]]  # precision -> chain -> lDDT-Cα


def trained(config: Path, store: Path, steps: int, crop: int, workers: int, extra: list[str], folder: Path) -> Path:
    """Averaged weights after ``steps`` steps of ``scalefold train``, one pass each."""
    own = [*settings("ours", crop), *extra, f"run.checkpoint_every_iters={steps}"]
    train(config, store, steps, workers, own, folder / "run")
    newest = Checkpoints(folder / "run" / "checkpoints").newest()
    assert newest is not None, "the run ends with a checkpoint"
    return newest / AVERAGED_FILE


def configuration(file: Path, store: Path, precision: str, extra: list[str]) -> Config:
    """The run's own, with another evaluation precision; lengths are evaluated as they come."""
    own = [f"data.store_dir={store}", f"execution.eval_precision={precision}", "execution.warm_up=false"]
    return load_config(file, [*own, *extra]).config


def measure(arguments: argparse.Namespace, weights: Path, steps: int, precisions: list[str]) -> Scores:
    """Scores of all chains in each precision; rows are written."""
    found: Scores = {}
    for precision in precisions:
        config = configuration(arguments.config, arguments.store, precision, arguments.set)
        result = evaluate_weights(config, weights, lambda text: None)
        store = Store(arguments.store)
        lengths = evaluation_lengths(config, store)
        store.close()
        found[precision] = result.chains
        print(f"{precision}: mean lDDT-Cα {result.lddt_ca:.5f}, {result.seconds:.1f} s", flush=True)
        known = {**facts(), "weights": arguments.label or arguments.config.stem, "steps": steps}
        rows = [
            {**known, "chain": chain, "length": lengths[chain], "precision": precision, "lddt_ca": round(score, 7)}
            for chain, score in result.chains.items()
        ]
        append_rows(arguments.csv, rows)
    return found


def summary(scores: Scores) -> list[dict[str, object]]:
    """Per precision: mean, its distance from fp32's, and the chain that moves most."""
    exact, rows = scores[EXACT], []
    for precision, chains in scores.items():
        moved = {chain: chains[chain] - exact[chain] for chain in exact}
        most = max(moved, key=lambda chain: abs(moved[chain]))
        rows.append(
            {
                "precision": precision,
                "chains": len(chains),
                "mean": f"{mean(chains.values()):.5f}",
                "mean_shift": f"{mean(moved.values()):+.1e}",
                "largest_shift": f"{moved[most]:+.1e}",
                "of_chain": most,
            }
        )
    return rows


def unfit(scores: Scores) -> list[str]:
    """Precisions whose average is too far from that of fp32."""
    exact = mean(scores[EXACT].values())
    return [name for name, chains in scores.items() if abs(mean(chains.values()) - exact) > LARGEST_SHIFT]


def verdict(scores: Scores) -> str:
    """What follows for ``execution.eval_precision``."""
    failing = unfit(scores)
    if not failing:
        return f"no average moves by more than {LARGEST_SHIFT:g}: bf16 may stay the default"
    instead = "tf32" if "tf32" in scores and "tf32" not in failing else EXACT
    return f"{' and '.join(failing)} moves the average by more than {LARGEST_SHIFT:g}: {instead} must be the default"


def main() -> int:
    """Train or take weights, evaluate, print and append; 1 if a precision is unfit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path, help="prepared data set with evaluation chains")
    parser.add_argument("--config", type=Path, default=BASE)
    parser.add_argument("--weights", type=Path, help="a swa_checkpoint.pt instead of training")
    parser.add_argument("--label", help="what the table calls the weights; default: the configuration's name")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--crop", type=int, default=256, help="residues of a training sample")
    parser.add_argument("--workers", type=int, default=12, help="loader processes")
    default = ["bf16", "tf32", EXACT] if torch.cuda.is_available() else ["bf16", EXACT]
    parser.add_argument("--precisions", nargs="+", choices=["bf16", "tf32"], default=default[:-1])
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further configuration")
    parser.add_argument("--csv", type=Path, default=FOLDER / "evaluation_precision.csv")
    arguments = parser.parse_args()
    a, precisions = arguments, [EXACT, *arguments.precisions]
    with tempfile.TemporaryDirectory() as folder:
        weights = a.weights or trained(a.config, a.store, a.steps, a.crop, a.workers, a.set, Path(folder))
        scores = measure(a, weights, read_state(weights.parent).iteration, precisions)
    print_table(summary(scores))
    print(verdict(scores))
    return int(bool(unfit(scores)))


if __name__ == "__main__":
    sys.exit(main())
