"""Every line that a training step must meet on one GPU, in one run: figures to the CSV files, one verdict per line.

    python benchmarks/measure/gates.py                # step, correctness, profile, operations, evaluation, GPU tests
    python benchmarks/measure/gates.py STORE          # also real chains, and 500 steps against the plain path's curve
    python benchmarks/measure/gates.py --judge        # measure nothing: judge the rows of this commit and device

Measurements are those of ``host.py``, on as many GPUs as there are. Exit status 1 if a line is not met or was not
measured.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import host
from common import FOLDER, facts, print_table, read_rows

Row = dict[str, str]
MEASUREMENTS = ("step", "checkpointing", "operations", "evaluation", "GPU tests", "real chains", "curve")
PASSES = ("1", "2", "3", "4")


@dataclass(frozen=True)
class Gate:
    """One line: what is measured, its limit, and how it is read from the rows (None: not measured)."""

    name: str
    limit: float
    read: Callable[[], float | None]


def rows_of(file: str, **wanted: str) -> list[Row]:
    """Rows of this commit and device, limited to ``wanted`` values; oldest first."""
    own, path = facts(), FOLDER / file
    wanted = {"commit": own["commit"], "device": own["device"], **wanted}
    rows = read_rows(path) if path.is_file() else []
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def mean_step_ms() -> float | None:
    """Mean over R = 1..4 of the newest medians."""
    newest = {row["passes"]: float(row["median_ms"]) for row in rows_of("step_time.csv", variant="ours")}
    return sum(newest[r] for r in PASSES) / len(PASSES) if set(PASSES) <= set(newest) else None


def newest(file: str, column: str, **wanted: str) -> float | None:
    """A column of the newest row."""
    rows = rows_of(file, **wanted)
    return float(rows[-1][column]) if rows else None


def loss_difference() -> float | None:
    """Relative difference of our loss to fp32, in units of what is allowed: 1e-3 or twice plain bf16's own."""
    rows = rows_of("precision.csv", kind="term", name="loss")
    if not rows:
        return None
    exact, ours, plain = (float(rows[-1][key]) for key in ("fp32", "ours_bf16", "plain_bf16"))
    return abs(ours / exact - 1) / max(1e-3, 2 * abs(plain / exact - 1))


def low_modules() -> float | None:
    """Modules whose gradient is below cosine 0.99 and more than twice as far off as plain bf16's."""
    newest = {row["name"]: row for row in rows_of("precision.csv", kind="module")}
    pairs = [(1 - float(row["ours_bf16"]), 1 - float(row["plain_bf16"])) for row in newest.values()]
    return float(sum(ours > 0.01 and ours > 2 * plain for ours, plain in pairs)) if pairs else None


def lost_operations() -> float | None:
    """Operations where another implementation is faster, forward and backward together."""
    rows = rows_of("kernels.csv")
    times: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        own = times.setdefault((row["operation"], row["shape"]), {})
        own[row["variant"]] = float(row["forward_us"]) + float(row["backward_us"])
    lost = [key for key, by in times.items() if "ours" in by and by["ours"] > min(by.values())]
    for operation, shape in lost:
        print(f"lost: {operation} {shape}: {times[operation, shape]}")
    return float(len(lost)) if rows else None


def status(name: str) -> float | None:
    """Exit status of a measurement."""
    return newest(host.STATUS_TABLE, "status", measurement=name)


GATES = (
    Gate("mean step over R = 1..4, ms", 400.0, mean_step_ms),
    Gate("loss against fp32, share of what is allowed", 1.0, loss_difference),
    Gate("modules with a low gradient cosine", 0.0, low_modules),
    Gate("kernels per step at R = 1", 12_000.0, lambda: newest("step_profile.csv", "kernels", variant="ours")),
    Gate("host ms per step", 5.0, lambda: newest("step_profile.csv", "host_ms", variant="ours")),
    Gate("GPU idle inside the step, %", 2.0, lambda: newest("step_profile.csv", "idle_percent", variant="ours")),
    Gate("peak GiB, R = 1..4", 80.0, lambda: newest("step_time.csv", "peak_gib", variant="ours")),
    Gate("peak GiB with checkpointing", 80.0, lambda: newest("step_time.csv", "peak_gib", variant="ours_ckpt")),
    Gate("operations slower than another implementation", 0.0, lost_operations),
    Gate("wait for data on real chains, %", 1.0, lambda: newest("real_chains.csv", "wait_percent", passes="all")),
    Gate("500-step curve leaves the band (exit status)", 0.0, lambda: status("curve")),
    Gate("GPU tests (exit status)", 0.0, lambda: status("GPU tests")),
)


def verdict(gate: Gate) -> dict[str, object]:
    """One line of the table."""
    value = gate.read()
    met = "not measured" if value is None else "met" if value <= gate.limit else "MISSED"
    shown = "-" if value is None else f"{value:g}"
    return {"line": gate.name, "limit": f"{gate.limit:g}", "measured": shown, "verdict": met}


def main() -> int:
    """Measure, judge and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", nargs="?", type=Path, help="prepared data set")
    parser.add_argument("--judge", action="store_true", help="only judge what this commit has measured on this device")
    parser.add_argument("--only", nargs="+", default=[], help="only these measurements of host.py, by name")
    parser.add_argument("--minutes", type=float, default=60.0, help="begin no measurement that would end later")
    arguments = parser.parse_args()
    if not arguments.judge:
        try:
            jobs, _ = host.chosen(arguments.only or MEASUREMENTS, arguments.store, torch.cuda.device_count())
        except ValueError as error:
            parser.error(str(error))
        out = Path(tempfile.mkdtemp(prefix="scalefold-gates-"))
        host.run_jobs(jobs, arguments.store, torch.cuda.device_count(), arguments.minutes, out)
        print(f"what they printed: {out}")
    table = [verdict(gate) for gate in GATES]
    print_table(table)
    return int(any(line["verdict"] != "met" for line in table))


if __name__ == "__main__":
    sys.exit(main())
