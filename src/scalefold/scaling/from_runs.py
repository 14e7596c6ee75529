"""What earlier runs say about the settings of the next one: loader workers, prefetch, evaluation ranks, padding.

A run's folder holds its configuration (``config.yaml``) and its record (``metrics.jsonl``). What a change is worth is
counted in that record: seconds that training waited for batches or for evaluations. Nothing is proposed that no run
shows; a setting that nobody varied is left open.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from scalefold.config import Config, load_config
from scalefold.errors import ConfigError
from scalefold.report.record import Metrics, read_metrics

WARM_UP = 10  # steps of a start, whose waits say nothing of the rest
LEAST_WAIT = 0.01  # of the time of all steps: less waiting is not worth a change
STEADY = 0.5  # of the mean wait: a median above it means that the workers are too slow on the whole
HEADROOM = 1.25
BUSY = 0.9  # of a cycle that evaluation ranks may need
IDLE = 0.4  # of a cycle: ranks that need less could be fewer


@dataclass(frozen=True)
class Seen:
    """One earlier run: its configuration, and means over its steps and evaluations (milliseconds, seconds)."""

    folder: Path
    config: Config
    step_ms: float
    wait_ms: float
    median_wait_ms: float
    steps: int
    eval_s: float | None
    evaluations: int


@dataclass(frozen=True)
class Change:
    """One setting: what it is, what it should be (None: as it is), what that is worth, and where the numbers are."""

    key: str
    now: int
    proposed: int | None
    worth: str
    source: str

    def text(self) -> str:
        """``data.num_workers: 4 -> 7   saves ...   (runs/mine)``."""
        arrow = f"{self.now} -> {self.proposed}" if self.proposed is not None else f"{self.now} stays"
        return f"{self.key + ':':<30}{arrow:<16}{self.worth}   ({self.source})"


def look(folder: Path) -> Seen:
    """Read an earlier run.

    Raises:
        ConfigError: no ``config.yaml``, or too few steps with times.
        LogError: the record cannot be read.
    """
    file = folder / "config.yaml"
    if not file.is_file():
        raise ConfigError(f"--tune {folder}: no config.yaml there; give the folder of a run")
    metrics = read_metrics(folder)
    kept = np.isfinite(metrics.step_ms) & np.isfinite(metrics.data_ms)
    step_ms, wait_ms = metrics.step_ms[kept][WARM_UP:], metrics.data_ms[kept][WARM_UP:]
    if not len(step_ms):
        raise ConfigError(f"--tune {folder}: fewer than {WARM_UP + 1} steps with times; give a longer run")
    means = float(step_ms.mean()), float(wait_ms.mean()), float(np.median(wait_ms))
    return Seen(folder, load_config(file).config, *means, len(metrics.step), *_evaluations(metrics))


def _evaluations(metrics: Metrics) -> tuple[float | None, int]:
    """Mean seconds of an evaluation, without the first, which warms up; None if there was none."""
    seconds = metrics.eval_seconds[np.isfinite(metrics.eval_seconds)]
    return (float(seconds[min(1, len(seconds) - 1) :].mean()) if len(seconds) else None), len(seconds)


def changes(config: Config, folders: Sequence[Path]) -> list[Change]:
    """What earlier runs of a system would change in a configuration; the newest one given counts for its waits.

    Raises ConfigError if a run is of another system, or cannot be read.
    """
    runs = [look(folder) for folder in folders]
    for run in runs:
        if (run.config.parallel.gpu, run.config.parallel.dap_size) != (config.parallel.gpu, config.parallel.dap_size):
            raise ConfigError(f"--tune {run.folder}: another GPU or DAP size than {config.system} has; leave it out")
    newest = runs[-1]
    return [*_loader(config, newest), _evaluation_ranks(config, newest), _padding(config, runs)]


def _loader(config: Config, run: Seen) -> list[Change]:
    """More workers where most steps wait, more batches ahead where a few wait long."""
    data, total_s = config.data, run.wait_ms * run.steps / 1000
    share = run.wait_ms / run.step_ms
    seen = f"{run.folder}: steps of {run.step_ms:.0f} ms, {run.wait_ms:.1f} of them waiting"
    worth = f"up to {total_s:.0f} s of the run, {share:.1%} of its steps"
    workers = prefetch = None
    if share > LEAST_WAIT and run.median_wait_ms > STEADY * run.wait_ms:
        busy_ms = max(run.step_ms - run.wait_ms, 1e-3 * run.step_ms)
        workers = math.ceil(max(1, run.config.data.num_workers) * run.step_ms / busy_ms * HEADROOM)
    elif share > LEAST_WAIT:
        prefetch = 2 * run.config.data.prefetch_factor
    nothing = f"waits are {share:.1%} of the steps"
    return [
        _change("data.num_workers", data.num_workers, workers, worth, nothing, seen),
        _change("data.prefetch_factor", data.prefetch_factor, prefetch, worth, nothing, seen),
    ]


def _change(key: str, now: int, proposed: int | None, worth: str, nothing: str, source: str) -> Change:
    wanted = proposed if proposed is not None and proposed > now else None
    return Change(key, now, wanted, worth if wanted is not None else nothing, source)


def _evaluation_ranks(config: Config, run: Seen) -> Change:
    """As many as keep up with a cycle of training: an evaluation's work is shared among them."""
    key, now, used = "parallel.num_eval_ranks", config.parallel.num_eval_ranks, run.config.parallel.num_eval_ranks
    if run.eval_s is None:
        return Change(key, now, None, "no evaluation was recorded", str(run.folder))
    cycle_s = run.step_ms / 1000 * run.config.training.val_every_iters
    seen = f"{run.folder}: an evaluation takes {run.eval_s:.1f} s, a cycle of training {cycle_s:.1f} s"
    if not used:
        worth = f"training waits {run.eval_s * run.evaluations:.0f} s; ranks of its own would end that"
        return Change(key, now, None, worth, seen)
    needed = max(1, math.ceil(used * run.eval_s / (BUSY * cycle_s)))
    if needed > now:
        late_s = max(0.0, run.eval_s - cycle_s) * run.evaluations
        return Change(key, now, needed, f"up to {late_s:.0f} s that training waits", seen)
    if needed < now and run.eval_s * used / now < IDLE * cycle_s:
        return Change(key, now, needed, f"{now - needed} GPUs can train or be left out", seen)
    return Change(key, now, None, "evaluation keeps up with training", seen)


def _padding(config: Config, runs: Sequence[Seen]) -> Change:
    """The multiple with the least work per evaluation, ranks times seconds, among runs that differ in it."""
    key, now = "data.eval_length_multiple", config.data.eval_length_multiple
    work: dict[int, float] = {}
    for run in runs:
        if run.eval_s is not None:
            ranks = run.config.parallel.num_eval_ranks or run.config.parallel.world_size
            work[run.config.data.eval_length_multiple] = run.eval_s * ranks
    source = ", ".join(str(run.folder) for run in runs)
    if now not in work or len(work) < 2:
        return Change(key, now, None, "open: give runs with this and with another value", source)
    best = min(work, key=lambda multiple: work[multiple])
    gain = 1 - work[best] / work[now]
    if best == now or gain < LEAST_WAIT:
        return Change(key, now, None, f"the best of {', '.join(map(str, sorted(work)))}", source)
    return Change(key, now, best, f"evaluations take {gain:.0%} less", source)
