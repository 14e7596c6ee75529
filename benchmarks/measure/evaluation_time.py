"""Time to evaluate chains of different lengths: uncropped, four passes, as an evaluation rank does it.

    python benchmarks/measure/evaluation_time.py                              # bf16 on the kernels, as shipped
    python benchmarks/measure/evaluation_time.py --variant plain_tf32 --lengths 128 256 512
    python benchmarks/measure/evaluation_time.py --multiple 32 --lengths 64 96 160 256 416 704   # other padding
    python benchmarks/measure/evaluation_time.py --together 2              # two chains at once, each on a stream

Chains are synthetic and padded as in a run; every length is warmed up as a run does before its clock starts, longest
first. Timed is a chain from its features in host memory to its score on the device; printed as well are the seconds of
the warm-up and the device memory in use after it, graphs included. With ``--together N`` a row is the N-th part of the
time of N chains of one length, each with weights, graphs and memory of its own; their scores must be the one of a chain
alone, bit for bit (exit status 1). After each length comes the sum for 180 chains, spread evenly over the logarithm of
the length from 60 to 700 residues (mean 260), interpolated between the measured lengths; the last one has all of them.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common import FOLDER, ROOT, Timing, append_rows, facts, print_table
from scalefold.config import Config, RankLayout, load_config
from scalefold.data.configured import feature_settings
from scalefold.data.made.synthetic import synthetic_batch
from scalefold.eval.model import EvaluationModel
from scalefold.parallel.ranks import Ranks, prepare_process
from scalefold.step.build import choose_operations
from step_time import enliven

VARIANTS = {
    "ours": [],
    "ours_uncaptured": ["execution.cuda_graphs=false"],
    "plain_tf32": ["execution.kernels=reference", "execution.eval_precision=tf32"],
    "plain_bf16": ["execution.kernels=reference"],
}
LENGTHS = [64, 144, 256, 400, 704]
CHAINS = np.geomspace(60, 700, 180).round().astype(int).tolist()
REPEATS = 3


def build(config: Config, together: int) -> list[EvaluationModel]:
    """Equal models, alive: untrained ones score every chain zero."""
    ranks = Ranks(RankLayout(1), 0, 0, torch.device("cuda", 0))
    models = [EvaluationModel(config, ranks.device, choose_operations(config, ranks)) for _ in range(together)]
    for model in models:
        enliven(model.model)
    return models


def measure(
    config: Config, variant: str, lengths: list[int], csv: Path, models: list[EvaluationModel]
) -> list[dict[str, object]]:
    """One row per length, written as soon as it is known; SystemExit where chains at once score otherwise."""
    settings, rows = feature_settings(config), []
    captures = config.execution.cuda_graphs and variant.startswith("ours")
    for length in sorted(set(map(settings.padded_length, lengths)), reverse=True):
        host = synthetic_batch(settings, 1, training=False, num_res=length).features
        features = on_device(host)
        torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        for model in models:
            (model.capture if captures else model.predict)(features)
        torch.cuda.synchronize()
        warm_up_s, (free, total) = time.perf_counter() - start, torch.cuda.mem_get_info()
        alone = models[0].predict(features)
        scores, times = [alone], []
        for _ in range(REPEATS + 1):
            torch.cuda.synchronize()
            start = time.perf_counter()
            scores += at_once(models, host)
            torch.cuda.synchronize()
            times.append(1e3 * (time.perf_counter() - start) / len(models))
        if not all(torch.equal(score, alone) for score in scores):
            sys.exit(f"{variant}: a chain of {length} residues scores otherwise beside another: {scores}")
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
        print(f"  {variant}: {length} residues {timing.median_ms:.1f} ms, score {float(alone):.6f}", end="", flush=True)
        print(f"; warm-up {warm_up_s:.1f} s, then {(total - free) / 2**30:.1f} GiB in use", flush=True)
        append_rows(csv, [row])
        rows.append(row)
        if len(rows) > 1:
            print(f"{variant}: {all_chains(config, rows)}", flush=True)
    return rows


def all_chains(config: Config, rows: list[dict[str, object]]) -> str:
    """The sum for 180 chains, by the lengths so far; a chain shorter than all of them counts as the shortest."""
    lengths, medians = zip(*((int(str(r["length"])), float(str(r["median_ms"]))) for r in rows[::-1]), strict=True)
    padded = list(map(feature_settings(config).padded_length, CHAINS))
    total_s = float(np.interp(padded, lengths, medians).sum()) / 1e3
    chains = f"180 chains of 60 to 700 residues, mean {np.mean(CHAINS):.0f}, padded {np.mean(padded):.0f}"
    return f"{chains}: {total_s:.1f} GPU-seconds, by lengths from {lengths[0]} on"


def at_once(models: list[EvaluationModel], host: dict[str, Tensor]) -> list[Tensor]:
    """Scores of the same chain by every model; several work on streams of their own at the same time."""
    if len(models) == 1:
        return [models[0].predict(on_device(host))]
    scores, current = [], torch.cuda.current_stream()
    streams = [model._stream for model in models if model._stream is not None]
    for model, stream in zip(models, streams, strict=True):
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            scores.append(model.predict(on_device(host)))
    for stream in streams:
        current.wait_stream(stream)
    return scores


def on_device(host: dict[str, Tensor]) -> dict[str, Tensor]:
    """Features of a chain, from the host's memory."""
    return {key: value.to("cuda") for key, value in host.items()}


def main() -> int:
    """Measure, print and append."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", choices=sorted(VARIANTS), default="ours")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--multiple", type=int, help="pad to multiples of it; default: the configuration's")
    parser.add_argument("--together", type=int, default=1, metavar="N", help="chains at once")
    parser.add_argument("--csv", type=Path, default=FOLDER / "evaluation_time.csv")
    arguments = parser.parse_args()
    padding = [f"data.eval_length_multiple={arguments.multiple}"] if arguments.multiple else []
    config = load_config(ROOT / "configs" / "base.yaml", [*VARIANTS[arguments.variant], *padding]).config
    prepare_process(config)
    variant = arguments.variant + (f"_{arguments.together}_at_once" if arguments.together > 1 else "")
    rows = measure(config, variant, arguments.lengths, arguments.csv, build(config, arguments.together))
    print_table(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
