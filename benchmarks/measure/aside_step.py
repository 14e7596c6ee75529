"""A whole step with the gradients of its parameters on the backward's chain and aside (``kernels/around/aside.py``).

    python benchmarks/measure/aside_step.py                       # R = 1: the backward is the same for every R
    python benchmarks/measure/aside_step.py --csv trial.csv --held 256 1024

Full shapes, bf16, dropout on, captured in CUDA graphs; one after the other, so that both fit the memory. Aside, every
repeat's logged values, gradients and updated weights must have the bits that the chain gives. Exit status 1 if one has
not, or if a form was not reached within ``--minutes``.
"""

import argparse
import gc
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from common import append_rows, facts, print_table, time_calls
from reproducibility import SEED, Beginning, differing_modules, run_step
from scalefold.data.configured import feature_settings
from scalefold.data.loading.loader import Batch
from scalefold.data.made.synthetic import synthetic_batch
from scalefold.kernels.around import aside
from scalefold.parallel.ranks import prepare_process
from scalefold.step.graphs import TrainStep
from scalefold.tune.sound.bits import differences
from step_time import build, configuration

REPEATS, REPLAYS = 20, 30


def differing(step: TrainStep, batch: Batch, passes: int, expected: list[Tensor] | None) -> tuple[int, list[Tensor]]:
    """How many of REPEATS steps from one beginning give other bits than expected (None: than the first of them), whose
    modules are printed; and the bits that were expected.
    """
    beginning, count = Beginning.of(step.optimizer), 0
    for turn in range(REPEATS):
        found = run_step(step, batch, passes, SEED)
        if expected is None:
            expected = [tensor.clone() for tensor in found]
        elif differences(expected, found):
            count += 1
            print(f"repeat {turn} DIFFERS: {', '.join(differing_modules(step, expected, found)) or 'no gradient'}")
        beginning.restore()
    assert expected is not None
    return count, expected


def measured(held_mib: int, passes: int, expected: list[Tensor] | None) -> tuple[dict[str, object], list[Tensor]]:
    """A row of one form, ``held_mib`` 0: on the chain; and the bits of its first step."""
    aside.MOST_HELD = held_mib * 2**20
    config = configuration("ours", [])
    batch = synthetic_batch(feature_settings(config), 1, seed=1, device="cuda")
    _, step = build(config)
    if not held_mib:
        step.side = None
    torch.cuda.reset_peak_memory_stats()
    step.warm_up(batch, passes, lambda text: print(f"  {text}", flush=True))
    count, bits = differing(step, batch, passes, expected)
    timing = time_calls(lambda: step(batch, passes, 1), REPLAYS)
    row: dict[str, object] = {
        "form": f"aside, {held_mib} MiB held" if held_mib else "on the chain",
        "passes": passes,
        "repeats": REPEATS,
        "differing": count,
        "median_ms": round(timing.median_ms, 2),
        "p10_ms": round(timing.p10_ms, 2),
        "p90_ms": round(timing.p90_ms, 2),
        "peak_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2),
    }
    step.close()
    return row, bits


def main() -> int:
    """Print a row per form; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passes", type=int, default=1)
    parser.add_argument("--held", type=int, nargs="+", default=[1024], help="MiB kept for unfinished work")
    parser.add_argument("--minutes", type=float, default=4.0, help="later forms are not started")
    parser.add_argument("--csv", type=Path, help="also append rows here")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a GPU")
    prepare_process(configuration("ours", []))
    deadline, rows, expected, late = time.monotonic() + 60 * arguments.minutes, [], None, 0
    for held in [0, *arguments.held]:
        if time.monotonic() > deadline:
            print(f"aside, {held} MiB held: not reached")
            late += 1
            continue
        row, bits = measured(held, arguments.passes, expected)
        expected = expected or bits
        rows.append(row)
        print("  ".join(str(value) for value in row.values()), flush=True)
        if arguments.csv:
            append_rows(arguments.csv, [facts() | row])
        gc.collect()
        torch.cuda.empty_cache()
    print_table(rows)
    return int(late > 0 or any(row["differing"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
