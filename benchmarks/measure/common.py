"""What all benchmark scripts share: timing inside CUDA graphs, device facts, CSV rows."""

import csv
import datetime
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import scalefold
from scalefold.tune.sound.clock import LONG_WAIT_CYCLES, answers, capture, graph_microseconds, queued_ms

__all__ = ["answers", "capture", "graph_microseconds"]  # scripts take them from here

SCRIPTS = Path(__file__).resolve().parent
ROOT = SCRIPTS.parents[1]
BASE = ROOT / "configs" / "base.yaml"
ONE_LENGTH = "data.val_max_sequence_length=64"  # of chains: where none is evaluated, little is compiled for it
RESULTS_VARIABLE = "SCALEFOLD_RESULTS"  # another folder for the tables that scripts append to
KEPT = SCRIPTS.parent / "results"
FOLDER = Path(os.environ.get(RESULTS_VARIABLE) or KEPT)


@dataclass(frozen=True)
class Timing:
    """Median and spread of repeated measurements, in milliseconds."""

    median_ms: float
    p10_ms: float
    p90_ms: float

    @staticmethod
    def of(values_ms: list[float]) -> "Timing":
        """Quantiles of at least one value."""
        ordered = sorted(values_ms)
        last = len(ordered) - 1
        return Timing(statistics.median(ordered), ordered[round(0.1 * last)], ordered[round(0.9 * last)])


def time_calls(call: Callable[[], object], repeats: int, warm_up: int = 3) -> Timing:
    """Device time of single calls, each between two events on an idle device: for long ones, such as steps."""
    for _ in range(warm_up):
        call()
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    return Timing.of(times)


def time_queued(call: Callable[[], object], repeats: int, warm_up: int = 3) -> Timing:
    """The same of short calls, each behind a wait of the device and a call that is not timed.

    Neither the host's way to the launch counts nor, where several ranks take part, how much later than the others one
    of them begins. All ranks make the same number of calls.
    """
    for _ in range(warm_up):
        call()
    return Timing.of([queued_ms(call, LONG_WAIT_CYCLES, first=call)[0] for _ in range(repeats)])


def commit() -> str:
    """Short hash of the checkout; where there is no git, what SCALEFOLD_COMMIT says."""
    stated = os.environ.get("SCALEFOLD_COMMIT")
    if stated or shutil.which("git") is None:
        return stated or "unknown"
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=SCRIPTS)
    return found.stdout.strip() or "unknown"


def facts() -> dict[str, str]:
    """Date, device, torch version and commit: the first columns of every row."""
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "torch": torch.__version__,
        "commit": commit(),
    }


def package_path() -> str:
    """PYTHONPATH of processes that shall import the package that this one does."""
    package = str(Path(scalefold.__file__).resolve().parents[1])
    return os.pathsep.join([package, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)


def one_sample(size: int, unit: str = "gpus") -> list[str]:
    """Overrides of a system file: one replica of ``size`` ranks with a batch of one sample."""
    return [f"parallel.{unit}_per_node={size}", f"parallel.dap_size={size}", "training.global_batch_size=1"]


def compile_ahead(config: Path, overrides: Sequence[str], cache: Path | None = None) -> None:
    """``scalefold compile`` for this GPU by all processors, into a Triton cache, by default that of this process.

    A process of its own, because what stands in for the GPU's driver there must not be met by one that uses the GPU. A
    start compiles what this does not.
    """
    import triton.knobs

    from scalefold.kernels import tuning
    from scalefold.run.compile_ahead import CAPABILITIES

    gpu = next(name for name, capability in CAPABILITIES.items() if capability == tuning.capability())
    command = [sys.executable, "-m", "scalefold", "compile", "--gpu", gpu, "--config", str(config), *overrides]
    environment = os.environ | {"PYTHONPATH": package_path()}
    status = subprocess.run([*command, "--out", str(cache or triton.knobs.cache.dir)], env=environment).returncode
    if status:
        print(f"scalefold compile: exit status {status}", flush=True)


def device_name(gpu: int) -> str:
    """What CUDA calls the GPU of this number among those that this script may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[gpu] if visible else str(gpu)


def device_events(call: Callable[[], object], trace: Path | None = None) -> list[Any]:
    """What one call does on the device, as the profiler's events; ``trace``: also keep the timeline there."""
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as traced:
        call()
        torch.cuda.synchronize()
    if trace is not None:
        traced.export_chrome_trace(str(trace))
    return [event for event in traced.events() or [] if event.device_type == torch.autograd.DeviceType.CUDA]


def move_within_rounding(weights: torch.Tensor, random: torch.Generator) -> None:
    """Another rounding of weights that compute in bf16: each moves by a random part of half of its last place.

    Half a place is that of a number just below a power of two; of any other it is up to twice as much.
    """
    parts = torch.rand(weights.shape, generator=random, device=weights.device).mul_(2).sub_(1)
    weights.mul_(1 + torch.finfo(torch.bfloat16).eps / 4 * parts)


def append_rows(file: Path, rows: list[dict[str, object]]) -> None:
    """Append rows to a CSV file; the header is written if the file is new."""
    if not rows:
        return
    new = not file.exists()
    with file.open("a", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def read_rows(file: Path) -> list[dict[str, str]]:
    """Rows of a CSV file, oldest first."""
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


def print_table(rows: list[dict[str, object]]) -> None:
    """Rows as an aligned table, with the columns of all of them."""
    if not rows:
        return
    columns = list(dict.fromkeys(name for row in rows for name in row))
    values = ([row.get(name, "") for name in columns] for row in rows)
    cells = [columns, *([f"{v:.3f}" if isinstance(v, float) else str(v) for v in line] for line in values)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
