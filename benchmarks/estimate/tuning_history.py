"""Make the history that ``scalefold tune`` is shipped with from every table of trials in ``benchmarks/results``.

    python benchmarks/estimate/tuning_history.py

Tables of trials (recorded sweeps, trials of searches) are taken as they are. Of older tables, each row of
``tuning.csv`` is the winner of a sweep whose other candidates nobody kept, and ``kernel_trials.csv`` has trials of
programs of which some became kernels: those with tiles of a kernel that is still there.
"""

import csv
import sys
from collections.abc import Iterator
from pathlib import Path

from scalefold.tune import trials
from scalefold.tune.operation_cases import training_cases
from scalefold.tune.trials import Trial, config_text

RESULTS = Path(__file__).resolve().parents[1] / "results"
TABLES = ("tuning_sweeps.csv", "tuning_held_out.csv", "tuning_trials.csv", "tuning_first_draw.csv", "tuning_new.csv")
DAPS = (8, 4, 2, 1)  # a shape that several shares have belongs to the smallest
ROWS = {  # shapes of kernel_trials.csv for kernels over rows
    "pair": "c=128 dtype=bfloat16 n=512 rows=65536",
    "msa": "c=256 dtype=bfloat16 n=1024 rows=32768",
    "extra": "c=64 dtype=bfloat16 n=256 rows=262144",
    "gate": "c=128 dtype=bfloat16 n=128 rows=65536",
}
ATTENTION = {
    "triangle": "batch=1 bias=1 d=32 dtype=bfloat16 heads=4 n=256 rows=256",
    "row": "batch=1 bias=1 d=32 dtype=bfloat16 heads=8 n=256 rows=128",
    "extra": "batch=1 bias=1 d=8 dtype=bfloat16 heads=8 n=256 rows=1024",
}
KERNELS = {  # how a trial's name begins -> the kernel, its shapes
    "projections forward: weights": ("norm_linear_forward", ROWS),
    "transition forward: weights": ("transition_forward", ROWS),
    "input gradient: ": ("norm_linear_backward", ROWS),
    "attention forward: ": ("attention_forward", ATTENTION),
}
NAMES = {"BM": "BLOCK_M", "BN": "BLOCK_N"}


def rows_of(name: str) -> list[dict[str, str]]:
    """Rows of a table of results; none if it is not there."""
    file = RESULTS / name
    if not file.exists():
        return []
    with file.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def winners() -> Iterator[Trial]:
    """Rows of ``tuning.csv``; the code that a commit had is not known as a digest, so the commit stands for it."""
    known = {case.name: (dap, case.calls) for dap in DAPS for case in training_cases(dap)}
    for row in rows_of("tuning.csv"):
        dap, calls = known.get(row["operation"], (0, 0))
        config = row["config"].strip("{}").replace('"', "").replace(": ", "=").replace(",", "")
        yield Trial(
            *(row["date"], row["device"], row["torch"], row["commit"], row["kernel"], row["problem"]),
            *(row["operation"], dap, calls, config_text(trials.parse_config(config))),
            us=float(row["best_us"]),
            best_of=int(row["candidates"]),
        )


def prototypes() -> Iterator[Trial]:
    """Rows of ``kernel_trials.csv`` that are tiles of a kernel; other programs of one kernel are other code."""
    for row in rows_of("kernel_trials.csv"):
        begins = [begin for begin in KERNELS if row["trial"].startswith(begin)]
        if not begins or "persistent" in row["trial"] or not row["launch"]:
            continue
        kernel, shapes = KERNELS[begins[0]]
        if row["shape"] not in shapes:
            continue
        config = {NAMES.get(name, name): int(n) for name, n in (p.split("=") for p in row["launch"].split())}
        yield Trial(
            *(row["date"], row["device"], row["torch"], f"{row['commit']} {row['trial']}", kernel),
            *(shapes[row["shape"]], row["trial"], 1, 0, config_text(config)),
            us=float(row["us"]),
        )


def all_trials() -> list[Trial]:
    """Everything, oldest tables first."""
    newer = [trial for name in TABLES if (RESULTS / name).exists() for trial in trials.read(RESULTS / name)]
    return [*winners(), *prototypes(), *newer]


def main() -> int:
    """Write the file and say what it holds."""
    found = all_trials()
    trials.write_compressed(trials.SHIPPED, found)
    print(f"{trials.SHIPPED.name}: {len(found)} trials, {trials.SHIPPED.stat().st_size / 1024:.0f} KiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
