"""Trials of launch parameters: one schema for everything that was ever timed, and the history that is shipped.

A trial is one configuration of one kernel at one problem on one kind of GPU: how long the operation took in which it
was timed, what its program uses, whether its bits were the same in every repeat, and why it failed if it did. A file of
trials only grows: a row is written when it is known, so that a sweep that was killed has lost at most one.
"""

import csv
import datetime
import functools
import gzip
import hashlib
import io
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import get_type_hints

import torch

from scalefold.errors import ConfigError
from scalefold.kernels import tuning
from scalefold.kernels.tuning import Config

SHIPPED = Path(__file__).parent / "history.csv.gz"
#: device -> streaming multiprocessors, memory bandwidth in GB/s, shared memory of each in KiB (data sheets)
GPUS = {
    "NVIDIA H100 80GB HBM3": (132, 3350, 228),
    "NVIDIA H200": (132, 4800, 228),
    "NVIDIA A100-SXM4-80GB": (108, 2039, 164),
    "NVIDIA A100-SXM4-40GB": (108, 1555, 164),
}


#: errors after which a process cannot use its GPU any more (CUDA runtime API, cudaError_t)
ENDS_A_PROCESS = ("illegal memory access", "misaligned address", "illegal instruction", "unspecified launch failure")


@dataclass(frozen=True)
class Trial:
    """One row; figures that nobody recorded are None, texts empty.

    Attributes:
        code: of the kernels' sources, so that only what still holds is taken for one's own; empty for converted rows.
        us: microseconds of the whole operation, forward and backward if the kernel belongs to the backward pass.
        calls: of the operation in a training step without DAP, 0 for evaluation.
        operations: floating-point operations of the operation's plain definition.
        bits: ``equal`` or ``differ`` over repeats in poisoned memory; empty if nobody asked.
        error: why there is no time.
        search: who proposed it: ``history``, ``alone`` (no history asked), ``sweep`` (all were timed), or empty.
        best_of: how many others this one was the fastest of, where only the winner was kept; 0 if it stands for itself.
    """

    date: str
    device: str
    torch: str
    code: str
    kernel: str
    problem: str
    operation: str
    dap: int
    calls: int
    config: str
    us: float | None = None
    registers: int | None = None
    spill_bytes: int | None = None
    shared_bytes: int | None = None
    programs: int | None = None
    moved_bytes: int | None = None
    operations: int | None = None
    bits: str = ""
    error: str = ""
    search: str = ""
    best_of: int = 0

    @property
    def key(self) -> tuple[str, str]:
        """Which problem it belongs to."""
        return self.kernel, self.problem

    @property
    def is_sound(self) -> bool:
        """Whether it has a time that may count."""
        return self.us is not None and self.bits != "differ" and not self.error

    @property
    def made_gpu_fail(self) -> bool:
        """Whether its program did what ends a process's use of the GPU."""
        return any(text in self.error for text in ENDS_A_PROCESS)


COLUMNS = tuple(field.name for field in fields(Trial))
_TYPES = get_type_hints(Trial)


def config_text(config: Config) -> str:
    """``BLOCK_M=64 num_warps=4``, names in order."""
    return " ".join(f"{name}={config[name]}" for name in sorted(config))


def parse_config(text: str) -> Config:
    """The launch parameters of ``config_text``; ValueError for another text."""
    pairs = [part.split("=", 1) for part in text.split()]
    return {name: int(value) for name, value in pairs}


@functools.cache
def code_digest() -> str:
    """Of all sources of kernels: equal code gives equal programs."""
    folder = Path(tuning.__file__).parent
    total = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        total.update(file.read_bytes())
    return total.hexdigest()[:8]


def facts() -> dict[str, str]:
    """The first columns of every trial of this process."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    today = datetime.date.today().isoformat()
    return {"date": today, "device": device, "torch": torch.__version__, "code": code_digest()}


def append(file: Path, trials: Iterable[Trial]) -> None:
    """Add rows at the end of a file, on the disk before this returns; the header comes with the first."""
    file.parent.mkdir(parents=True, exist_ok=True)
    _end_last_line(file)
    with file.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        if stream.tell() == 0:
            writer.writeheader()
        writer.writerows(_row(trial) for trial in trials)
        stream.flush()
        os.fsync(stream.fileno())


def _end_last_line(file: Path) -> None:
    """Cut off what a killed writer left of a line."""
    if not file.is_file() or file.stat().st_size == 0:
        return
    with file.open("rb") as stream:
        stream.seek(-1, os.SEEK_END)
        if stream.read() != b"\n":
            os.truncate(file, file.read_bytes().rfind(b"\n") + 1)


def _row(trial: Trial) -> dict[str, object]:
    return {name: "" if value is None else value for name, value in asdict(trial).items()}


def read(file: Path) -> list[Trial]:
    """All trials of a file, plain or compressed (``.gz``), oldest first; a last line without an end is not there yet.

    Raises ConfigError naming file and line for anything that is no trial.
    """
    data = file.read_bytes()
    try:
        text = (gzip.decompress(data) if file.suffix == ".gz" else data).decode()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: no table of trials ({error}); remove it") from None
    whole = text[: text.rfind("\n") + 1]
    rows = csv.DictReader(io.StringIO(whole, newline=""))
    if whole and tuple(rows.fieldnames or ()) != COLUMNS:
        raise ConfigError(f"{file}: line 1 must name the columns of trials ({', '.join(COLUMNS[:5])}, ...)")
    return [_trial(row, f"{file}: line {n}") for n, row in enumerate(rows, 2)]


def _trial(row: dict[str, str], place: str) -> Trial:
    try:
        found = Trial(**{name: _value(row[name], _TYPES[name]) for name in COLUMNS})  # type: ignore[arg-type]
        parse_config(found.config)
        return found
    except (TypeError, ValueError, AttributeError):
        raise ConfigError(f"{place} is no trial; remove that line") from None


def _value(text: str, kind: object) -> object:
    if kind is str:
        return text
    if kind is int:
        return int(text)
    number = float if kind == float | None else int
    return None if text == "" else number(text)


def write_compressed(file: Path, trials: Iterable[Trial]) -> None:
    """A whole history as one compressed file; the same trials give the same bytes."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(_row(trial) for trial in trials)
    partial = file.with_name(f"{file.name}.partial")
    partial.write_bytes(gzip.compress(text.getvalue().encode(), mtime=0))
    partial.replace(file)


def own_file() -> Path:
    """Where sweeps on this kind of GPU append, beside its table of choices."""
    return tuning.TABLES / f"{tuning.device_kind()}_trials.csv"


def history(extra: Iterable[Path] = ()) -> list[Trial]:
    """Everything that is known: the shipped history, sweeps of this installation, and further files."""
    files = [SHIPPED, *sorted(tuning.TABLES.glob("*_trials.csv")), *extra]
    return [trial for file in files if file.is_file() for trial in read(file)]


def that_made_gpu_fail(known: Iterable[Trial]) -> set[tuple[str, str]]:
    """Kernels and configurations that made a GPU fail at some problem: no candidates at any."""
    return {(trial.kernel, trial.config) for trial in known if trial.made_gpu_fail}
