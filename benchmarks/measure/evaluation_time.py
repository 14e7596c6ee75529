"""Time to evaluate chains of different lengths: uncropped, four passes, as an evaluation rank does it.

    python benchmarks/measure/evaluation_time.py                              # bf16 on the kernels, as shipped
    python benchmarks/measure/evaluation_time.py --variant plain_tf32 --lengths 128 256 512

Chains are synthetic and padded as in a run; every length is warmed up as a run does before its clock starts, longest
first. Timed is a chain from its features in host memory to its score on the device; printed as well are the seconds of
the warm-up and the device memory in use after it, graphs included. The last line is the sum for 180 chains, spread
evenly over the logarithm of the length from 60 to 700 residues (mean 260), interpolated between the measured lengths.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch

from common import FOLDER, ROOT, Timing, append_rows, facts, print_table
from scalefold.config import Config, RankLayout, load_config
from scalefold.data.configured import feature_settings
from scalefold.data.made.synthetic import synthetic_batch
from scalefold.eval.model import EvaluationModel
from scalefold.parallel.ranks import Ranks, prepare_process
from scalefold.step.build import choose_operations

VARIANTS = {
    "ours": [],
    "ours_uncaptured": ["execution.cuda_graphs=false"],
    "plain_tf32": ["execution.kernels=reference", "execution.eval_precision=tf32"],
    "plain_bf16": ["execution.kernels=reference"],
}
LENGTHS = [64, 144, 256, 400, 704]
CHAINS = np.geomspace(60, 700, 180).round().astype(int).tolist()
REPEATS = 3


def measure(config: Config, variant: str, lengths: list[int], csv: Path) -> list[dict[str, object]]:
    """One row per length, written as soon as it is known."""
    ranks = Ranks(RankLayout(1), 0, 0, torch.device("cuda", 0))
    model = EvaluationModel(config, ranks.device, choose_operations(config, ranks))
    settings, rows = feature_settings(config), []
    for length in sorted(set(map(settings.padded_length, lengths)), reverse=True):
        host = synthetic_batch(settings, 1, training=False, num_res=length).features
        features = {key: value.to(ranks.device) for key, value in host.items()}
        torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        (model.capture if config.execution.cuda_graphs and variant == "ours" else model.predict)(features)
        torch.cuda.synchronize()
        warm_up_s, (free, total) = time.perf_counter() - start, torch.cuda.mem_get_info()
        times = []
        for _ in range(REPEATS + 1):
            torch.cuda.synchronize()
            start = time.perf_counter()
            model.predict({key: value.to(ranks.device) for key, value in host.items()})
            torch.cuda.synchronize()
            times.append(1e3 * (time.perf_counter() - start))
        timing = Timing.of(times[1:])
        row = {
            **facts(),
            "variant": variant,
            "precision": config.execution.eval_precision,
            "length": length,
            "median_ms": round(timing.median_ms, 1),
            "p10_ms": round(timing.p10_ms, 1),
            "p90_ms": round(timing.p90_ms, 1),
            "peak_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2),
        }
        print(f"  {variant}: {length} residues {timing.median_ms:.1f} ms", end="", flush=True)
        print(f"; warm-up {warm_up_s:.1f} s, then {(total - free) / 2**30:.1f} GiB in use", flush=True)
        append_rows(csv, [row])
        rows.append(row)
    return rows


def main() -> int:
    """Measure, print and append."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", choices=sorted(VARIANTS), default="ours")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--csv", type=Path, default=FOLDER / "evaluation_time.csv")
    arguments = parser.parse_args()
    config = load_config(ROOT / "configs" / "base.yaml", VARIANTS[arguments.variant]).config
    prepare_process(config)
    rows = measure(config, arguments.variant, arguments.lengths, arguments.csv)
    print_table(rows)
    if len(rows) > 1:
        lengths, medians = zip(*((int(str(r["length"])), float(str(r["median_ms"]))) for r in rows[::-1]), strict=True)
        padded = list(map(feature_settings(config).padded_length, CHAINS))
        total_s = float(np.interp(padded, lengths, medians).sum()) / 1e3
        print(f"{arguments.variant}: 180 chains of 60 to 700 residues, mean {np.mean(CHAINS):.0f}, ", end="")
        print(f"padded {np.mean(padded):.0f}: {total_s:.1f} GPU-seconds")
    return 0


if __name__ == "__main__":
    sys.exit(main())
