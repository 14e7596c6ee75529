"""A long run, watched from outside: memory, open files and time per step must stay flat.

    python benchmarks/measure/soak.py                    # 2,000 steps of the tiny configuration, on any machine
    python benchmarks/measure/soak.py --full --minutes 9 # 500 steps of the full model on one GPU, with evaluations

The run changes its phase, and with it all loader workers, every quarter of its steps, evaluates and writes checkpoints
all along. Twice a second this script adds up what the run and its children hold. A step's time is compared with the
usual one of its number of passes. Rows go to ``benchmarks/results/soak.csv``, the plot to ``docs/figures/soak.svg``.
Exit status 1 if anything grows beyond its bound (``BOUNDS``), with the kinds of files that there are more of, or if the
run does not end as it should. Proteins are generated, or ``--store`` names a prepared data set.
"""

import argparse
import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from common import FOLDER, ROOT, append_rows, facts, print_table, read_rows
from scalefold.data.made.demo import generate
from scalefold.data.store.prepare import prepare
from scalefold.report.plots import draw
from scalefold.report.record import Metrics, read_metrics

CONFIGS, FIGURES = ROOT / "configs", ROOT / "docs" / "figures"
BUDGET_SPENT = 4  # exit status of ``scalefold train``
EVERY_S = 0.5
POINTS = 200  # rows that are kept of a run
SETTLED = 0.3  # of the run: caches fill and evaluation features are built before
BOUNDS = {
    "memory_mib": 0.03,  # growth over the settled part, as a share of the mean
    "files": 0.05,
    "processes": 0.05,
    "step_cpu_ms": 0.10,
    "step_ms": 0.10,
    "device_gib": 0.01,
}
SMALL = (
    *("model.evoformer.num_blocks=1", "model.structure.num_blocks=2", "data.train_sequence_crop_size=16"),
    *("data.max_extra_msa=8", "data.num_workers=2", "training.global_batch_size=2", "training.val_every_iters=50"),
    *("run.checkpoint_every_iters=50", "training.target_avg_lddt_ca_value=1.0"),
)
FULL = (
    *("training.global_batch_size=1", "training.val_every_iters=25", "run.checkpoint_every_iters=100"),
    *(
        "training.target_avg_lddt_ca_value=1.0",
        "training.init_checkpoint=null",
        "training.init_checkpoint_sha256sum=null",
        "data.filter_by_alignments=false",
    ),
)


@dataclass(frozen=True)
class Sample:
    """What a run and its children hold, open files by kind; ``cpu_s`` is what the training process has computed."""

    seconds: float
    step: int
    memory_mib: float
    files: Counter[str]
    processes: int
    cpu_s: float


def children(pid: int) -> list[int]:
    """A process and all that descend from it."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, IndexError):
            parents.setdefault(int(stat.read_text().rpartition(")")[2].split()[1]), []).append(int(stat.parent.name))
    found = [pid]
    for process in found:
        found += parents.get(process, [])
    return found


def proportional_kib(pid: int) -> int:
    """Memory of a process, shared pages divided among those that share them."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1])
    return 0


def open_files(pid: int) -> Counter[str]:
    """Descriptors of a process by what they are open on, numbers left out."""
    found: Counter[str] = Counter()
    with contextlib.suppress(OSError):
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                found[re.sub(r"[0-9]+", "#", os.readlink(descriptor))] += 1
    return found


def cpu_seconds(pid: int) -> float:
    """What a process has computed."""
    with contextlib.suppress(OSError):
        times = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def last_step(record: Path) -> int:
    """The newest step in a record; the file is read from its end."""
    with contextlib.suppress(OSError), record.open("rb") as file:
        file.seek(max(0, record.stat().st_size - 20_000))
        steps = [line.split(b'"step": ')[1] for line in file.read().split(b"\n") if b'"kind": "step"' in line]
        return int(steps[-1].split(b",")[0]) if steps else 0
    return 0


def configuration(folder: Path, base: Path, steps: int, phases: int) -> Path:
    """The base with phases that differ in nothing: each begins with new workers."""
    bounds = [round(steps * (number + 1) / phases) for number in range(phases)]
    lines = [f"  - {{name: part{number}, until_step: {bound}}}" for number, bound in enumerate(bounds[:-1])]
    file = folder / "soak.yaml"
    text = "\n".join([f"base: {base}", "phases:", *lines, f"  - {{name: part{phases - 1}}}"])
    file.write_text(text + "\n", encoding="utf-8")
    return file


def watch(command: list[str], run_dir: Path, limit_s: float) -> tuple[int, list[Sample]]:
    """Exit status and samples; a run that takes longer than ``limit_s`` is asked to stop."""
    start, samples, asked = time.monotonic(), [], False
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            family = children(process.pid)
            now = time.monotonic() - start
            step = last_step(run_dir / "metrics.jsonl")
            memory = sum(map(proportional_kib, family)) / 1024
            files, cpu_s = sum(map(open_files, family), Counter[str]()), cpu_seconds(process.pid)
            if step:
                samples.append(Sample(now, step, memory, files, len(family), cpu_s))
            if now > limit_s and not asked:
                process.terminate()
                asked = True
            time.sleep(EVERY_S)
    return process.returncode, samples


def rows_of(kind: str, samples: list[Sample], metrics: Metrics) -> list[dict[str, object]]:
    """At most ``POINTS`` rows: medians of what was seen during as many equal parts of the run."""
    steps = np.array([sample.step for sample in samples])
    edges = np.unique(np.linspace(0, metrics.step[-1], POINTS + 1).astype(int))
    reached, when = np.unique(steps, return_index=True)
    columns = {name: np.array([getattr(s, name) for s in samples]) for name in ("seconds", "memory_mib", "processes")}
    columns |= {"files": np.array([s.files.total() for s in samples]), "cpu_s": np.array([s.cpu_s for s in samples])}
    about, found, step_ms = facts(), [], even_step_ms(metrics)
    for first, last in pairwise(edges):
        seen, own = (steps > first) & (steps <= last), (metrics.step > first) & (metrics.step <= last)
        if seen.sum() < 1 or own.sum() < 1:
            continue
        row: dict[str, object] = {**about, "kind": kind, "step": int(last)}
        row["seconds"] = round(float(columns["seconds"][seen].max()), 1)
        row["memory_mib"] = round(float(np.median(columns["memory_mib"][seen])), 1)
        row |= {name: round(float(np.median(columns[name][seen]))) for name in ("files", "processes")}
        cpu_ms = 1e3 * np.interp([first, last], reached, columns["cpu_s"][when])
        row["step_cpu_ms"] = round(float(cpu_ms[1] - cpu_ms[0]) / int(last - first), 2)
        row["step_ms"] = round(float(np.median(step_ms[own])), 2)
        peak = metrics.peak_gib[own]
        row["device_gib"] = round(float(np.nanmax(peak)), 3) if np.isfinite(peak).any() else ""
        found.append(row)
    return found


def even_step_ms(metrics: Metrics) -> np.ndarray:
    """Time of each step [N], scaled as if all had the same number of passes, which are drawn at random."""
    usual = {passes: np.median(metrics.step_ms[metrics.passes == passes]) for passes in np.unique(metrics.passes)}
    own = np.array([usual[passes] for passes in metrics.passes])
    return metrics.step_ms * own.mean() / own


def more_files(samples: list[Sample]) -> Counter[str]:
    """Of which kinds more files are open in the last look at all processes than when the run had settled."""
    whole = [sample for sample in samples if sample.processes == max(s.processes for s in samples)]
    settled = next((s for s in whole if s.step >= SETTLED * samples[-1].step), whole[-1])
    return whole[-1].files - settled.files


def growth(rows: list[dict[str, object]], name: str) -> float:
    """Growth of a column over the settled part by the line through its quarters' medians, as a share of its mean."""
    values = np.array([float(str(row[name])) for row in rows])[int(SETTLED * len(rows)) :]
    medians = np.array([np.median(part) for part in np.array_split(values, 4)])
    slope = np.polyfit(np.arange(4), medians, 1)[0]
    return float(3 * slope / values.mean())


def judge(rows: list[dict[str, object]], full: bool) -> tuple[list[dict[str, object]], bool]:
    """One line per quantity, and whether all stay within their bounds. A busy CPU says nothing about wall time."""
    names = [n for n in BOUNDS if rows[-1][n] != "" and n != ("step_cpu_ms" if full else "step_ms")]
    table = []
    for name in names:
        share = growth(rows, name)
        good = share <= BOUNDS[name]
        first, last = rows[int(SETTLED * len(rows))][name], rows[-1][name]
        shown = {"quantity": name, "settled": first, "end": last, "growth_percent": round(100 * share, 2)}
        table.append({**shown, "bound_percent": 100 * BOUNDS[name], "flat": good})
    return table, all(bool(line["flat"]) for line in table)


def keep(file: Path, kind: str, rows: list[dict[str, object]]) -> None:
    """Write the rows in the place of those of an earlier run of this kind."""
    others = [row for row in read_rows(file) if row["kind"] != kind] if file.exists() else []
    file.unlink(missing_ok=True)
    append_rows(file, [*others, *rows])


def plot(rows: list[dict[str, object]], out: Path) -> None:
    """Every quantity relative to its median, over the steps."""
    steps = np.array([int(str(row["step"])) for row in rows])

    def paint(axes: Axes) -> None:
        for name in [n for n in BOUNDS if rows[-1][n] != ""]:
            values = np.array([float(str(row[name])) for row in rows])
            axes.plot(steps, values / np.median(values), label=name.replace("_", " "), linewidth=1)
        axes.set_ylim(0, 2)
        axes.set_xlabel("step")
        axes.set_ylabel("relative to its median")
        axes.legend(fontsize=6, ncols=3)

    out.parent.mkdir(parents=True, exist_ok=True)
    drawn = draw(paint, out.stem, "A long run", "Memory, open files, processes and time per step.")
    for file in drawn.save(out.parent):
        if file.suffix != out.suffix:
            file.unlink()


def generated(folder: Path, workers: int) -> Path:
    """A prepared store of generated proteins."""
    made = generate(folder / "raw", seed=3, num_train=40, num_eval=4)
    prepare(made.layout(), folder / "store", workers, report=lambda line: None)
    return folder / "store"


def main() -> int:
    """Run, print, write; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="the full model on one GPU")
    parser.add_argument("--steps", type=int, help="default: 2000, with --full 500")
    parser.add_argument("--phases", type=int, default=4, help="parts that begin with new workers")
    parser.add_argument("--minutes", type=float, default=600.0, help="stop the run after this time and judge what ran")
    parser.add_argument("--workers", type=int, default=2, help="processes that prepare the generated store")
    parser.add_argument("--store", type=Path, help="prepared data set instead of generated proteins")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further configuration")
    parser.add_argument("--csv", type=Path, default=FOLDER / "soak.csv")
    arguments = parser.parse_args()
    kind, base, own = (
        ("full", CONFIGS / "h100_1x1.yaml", FULL) if arguments.full else ("tiny", CONFIGS / "tiny.yaml", SMALL)
    )
    steps = arguments.steps or (500 if arguments.full else 2000)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store, run_dir = arguments.store or generated(folder, arguments.workers), folder / "run"
        settings = [*own, f"training.num_train_iters={steps}", f"data.store_dir={store}", f"run.run_dir={run_dir}"]
        config = configuration(folder, base, steps, arguments.phases)
        command = [sys.executable, "-m", "scalefold", "train", str(config), *settings, *arguments.set]
        status, samples = watch(command, run_dir, 60 * arguments.minutes)
        if status != BUDGET_SPENT:
            print(f"soak: the run ended with status {status}, not {BUDGET_SPENT}", file=sys.stderr)
            return 1
        metrics = read_metrics(run_dir)
    rows = rows_of(kind, samples, metrics)
    table, flat = judge(rows, arguments.full)
    print_table(table)
    print(f"soak: {metrics.step[-1]} steps, {len(metrics.eval_step)} evaluations, {'flat' if flat else 'NOT flat'}")
    if not flat:
        print("soak: more open files:", dict(more_files(samples)))
    keep(arguments.csv, kind, rows)
    plot(rows, FIGURES / ("soak_full.svg" if arguments.full else "soak.svg"))
    return int(not flat)


if __name__ == "__main__":
    sys.exit(main())
