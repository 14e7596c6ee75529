"""What a start of ``gpu_runs.py`` left: its record, log and weights, and the figures in them."""

import hashlib
import json
import statistics
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from common import read_rows
from gpu_starts import Ended
from scalefold.errors import LogError

FILLING = 4  # first steps, in which loader workers fill their queue
AFTER_CHECKPOINT = 3  # steps in which a checkpoint's stall may show
OF_AN_ABORTED_RUN = ("official checker: Failed checks for eval_accuracy", "status:")
Row = dict[str, Any]


def read_record(file: Path) -> list[Row]:
    """Complete lines of a record; none if there is no record."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().split("\n")[:-1] if line]


def of_this_start(record: list[Row]) -> list[Row]:
    """What a resumed start added: everything from its ``resume`` event on."""
    resumed = [i for i, row in enumerate(record) if row["kind"] == "event" and row["name"] == "resume"]
    return record[resumed[-1] :] if resumed else record


def steps_of(record: list[Row]) -> list[Row]:
    """Its steps."""
    return [row for row in record if row["kind"] == "step"]


def start_parts(record: list[Row]) -> dict[str, float]:
    """Seconds from ``run_start`` to the end of each part of the start, the first step last; empty if unknown.

    The first step's time counts from the moment when the loader was started.
    """
    event = next((row for row in record if row["kind"] == "event" and row["name"] == "start"), None)
    first = next(iter(steps_of(record)), None)
    if event is None or first is None:
        return {}
    parts = {key.removesuffix("_s"): value for key, value in event.items() if key.endswith("_s") and key != "time_s"}
    return parts | {"first_step": parts["loader_started"] + first["step_ms"] / 1e3}


def steady_steps(steps: list[Row], save_every: int) -> list[Row]:
    """Steps whose time nothing disturbs: the queue is full and no checkpoint was just begun."""
    return [row for row in steps[FILLING:] if (row["step"] - 1) % save_every >= AFTER_CHECKPOINT]


def medians(steps: Iterable[Row]) -> dict[int, float]:
    """Median milliseconds of a step by number of passes."""
    by_passes: dict[int, list[float]] = {}
    for row in steps:
        by_passes.setdefault(int(row["passes"]), []).append(row["step_ms"])
    return {passes: statistics.median(values) for passes, values in by_passes.items()}


def checkpoint_stall_ms(steps: list[Row], save_every: int) -> float | None:
    """The longest stall: what the steps after one checkpoint took in all beyond their medians; None if none was made.

    A step's time is that between two ends of steps on the device, so it holds whatever the host did in between.
    """
    usual = medians(steady_steps(steps, save_every))
    stalls: dict[int, float] = {}
    for row in steps:
        saved = (row["step"] - 1) // save_every * save_every
        if usual and saved >= steps[0]["step"] and row["step"] - saved <= AFTER_CHECKPOINT:
            expected = usual.get(int(row["passes"]), min(usual.values()))
            stalls[saved] = stalls.get(saved, 0.0) + max(0.0, row["step_ms"] - expected)
    return max(stalls.values(), default=None)


def over_ruler_percent(own: Mapping[int, float], ruler_ms: Mapping[int, float]) -> float | None:
    """How much longer a step takes than the ruler says, mean over the numbers of passes that both know."""
    common = own.keys() & ruler_ms.keys()
    if not common:
        return None
    return 100.0 * (sum(own[p] for p in common) / sum(ruler_ms[p] for p in common) - 1)


def different_steps(steps: list[Row], truth: list[Row], whole: bool) -> str:
    """Where losses, terms or norms differ in any bit from those of another start; empty if nowhere.

    ``whole``: both must have the same steps; else ``steps`` may end earlier.
    """
    expected = {row["step"]: bits(row) for row in truth}
    if not steps or (whole and [row["step"] for row in steps] != list(expected)):
        return f"{len(steps)} steps where the other start has {len(expected)}"
    wrong = [row for row in steps if bits(row) != expected.get(row["step"])]
    if not wrong:
        return ""
    first, other = bits(wrong[0]), expected.get(wrong[0]["step"], {})
    key = next(key for key in first if first[key] != other.get(key))
    return f"{len(wrong)} of {len(steps)} steps, first {wrong[0]['step']}: {key} {first[key]!r}, not {other.get(key)!r}"


def bits(row: Row) -> dict[str, Any]:
    """What two starts with one seed must share, as the record has it: every digit."""
    values = {key: row.get(key) for key in ("passes", "loss", "grad_norm", "lr", "samples")}
    return values | {f"term {name}": value for name, value in row.get("terms", {}).items()}


def weights_digest(run: Path, step: int) -> str:
    """SHA-256 over names and bytes of the averaged weights after ``step``; empty without that checkpoint."""
    file = run / "checkpoints" / "last" / f"{step:06d}" / "swa_checkpoint.pt"
    return digest_of(file, file.stat().st_mtime_ns) if file.exists() else ""


@cache
def digest_of(file: Path, written_ns: int) -> str:
    """The same of a file, read once however often it is compared; ``written_ns``: its time of modification."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in torch.load(file, map_location="cpu", weights_only=True).items():
        digest.update(name.encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def result_file(ended: Ended) -> Path | None:
    """The log that a start wrote: joined, or the training ranks' part of it."""
    files = [f for f in ended.folder.glob("result_*") if (".resumed_" in f.name) == bool(ended.start.after)]
    whole = [f for f in files if f.suffix == ".txt"]
    return next(iter(whole or [f for f in files if f.name.endswith(".training.part")]), None)


def log_times(ended: Ended) -> dict[str, float]:
    """Seconds since the epoch of the log's milestones."""
    from scalefold.mlperf.log.logfile import read_log

    file = result_file(ended)
    try:
        log = read_log(file) if file is not None else None
    except LogError:
        return {}
    keys = ("init_start", "init_stop", "run_start", "run_stop")
    found = {key: log.first(key) for key in keys} if log is not None else {}
    return {key: event.time_ms / 1e3 for key, event in found.items() if event is not None}


def log_verdict(ended: Ended) -> tuple[str, str]:
    """The verdict of ``scalefold check`` and its first line; ``aborted`` if the run's end is all that is wrong.

    A log that ends early or begins late lacks more than its target: there every line must be legal, the last one an
    aborted ``run_stop``.
    """
    from scalefold.mlperf.judge.check import check_log
    from scalefold.mlperf.log.logfile import read_log

    file = result_file(ended)
    if file is None:
        return "no log", "no result file"
    try:
        log, verdict = read_log(file), check_log(file)
    except LogError as error:
        return "invalid", str(error)
    part = bool(ended.start.act or ended.start.after)
    others = [reason for reason in verdict.reasons if not part and not reason.startswith(OF_AN_ABORTED_RUN)]
    aborted = log.status == "aborted" and not log.broken_lines and not others
    return ("aborted" if aborted else verdict.kind), (others[0] if others else verdict.headline)


def ruler_ms(folder: Path, gpus: int, dap: int) -> dict[int, float]:
    """Medians of a ruler's table by passes; empty without rows."""
    file = folder / "step_time.csv"
    rows = read_rows(file) if file.exists() else []
    chosen = [row for row in rows if (int(row["gpus"]), int(row["dap"])) == (gpus, dap)]
    return {int(row["passes"]): float(row["median_ms"]) for row in chosen}
