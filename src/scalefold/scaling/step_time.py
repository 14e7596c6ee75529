"""Tables of step and evaluation times: measured on this project's kernels, published by submitters, or modelled.

A lookup never scales or interpolates: it returns a row and names its source, or says what to measure. Beside them what
a vendor says of GPUs on which nothing was measured.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from scalefold.errors import ConfigError

Kind = Literal["measured", "published", "guarded", "target", "estimated"]
#: Order in which a table is searched when the caller names no kind.
KINDS: tuple[Kind, ...] = ("measured", "estimated", "guarded", "published", "target")
REFERENCE_STEP_TIMES = Path(__file__).with_name("reference_step_times.csv")
REFERENCE_EVAL_TIMES = Path(__file__).with_name("reference_eval_times.csv")
_ALL_PASSES = {1, 2, 3, 4}
#: Columns of ``benchmarks/results/step_time.csv`` and what they are called here; its variants and whether they
#: checkpoint.
_RULER_COLUMNS = {"device": "gpu", "median_ms": "step_ms", "dap": "dap_size"}
_RULER_FACTS = {"date", "commit", "gpus", "variant"}
_RULER_VARIANTS = {"ours": "false", "ours_ckpt": "true"}


@dataclass(frozen=True)
class StepTime:
    """Milliseconds of one step at local batch 1, mean over the benchmark's 1..4 recycling passes."""

    kind: str
    gpu: str
    precision: str
    dap_size: int
    step_ms: float
    source: str
    peak_gib: float | None = None
    activation_checkpointing: bool | None = None


@dataclass(frozen=True)
class EvalTime:
    """Cost of evaluating the 180 chains: GPU-seconds of all, and seconds of the longest chain on one GPU."""

    kind: str
    gpu: str
    total_gpu_s: float
    longest_chain_s: float
    source: str

    def seconds_on(self, num_ranks: int) -> float:
        """Wall seconds on ``num_ranks`` GPUs: balanced placement, bounded by the longest chain."""
        return max(self.total_gpu_s / num_ranks, self.longest_chain_s)


@dataclass(frozen=True)
class VendorFigures:
    """One GPU of a system by its vendor's account: peaks, of which no program reaches all; none was measured here.

    ``bf16_tflops``: dense. ``nvlink_gb_per_s``: both directions together. ``nvlink_gpus``: GPUs of one NVLink domain;
    ``gpus_per_node``: those of one operating system, inside which a DAP group stays.
    """

    system: str
    memory_gb: float
    memory_tb_per_s: float
    bf16_tflops: float
    nvlink_gb_per_s: float
    nvlink_gpus: int
    gpus_per_node: int
    source: str

    @property
    def memory_gib(self) -> float:
        """Memory in GiB, a GB taken as 10^9 bytes: drivers report rather more."""
        return self.memory_gb * 1e9 / 2**30

    def text(self) -> str:
        """All figures with their source, marked as the vendor's."""
        return (
            f"vendor's figures for {self.system}, nothing measured: {self.memory_gb:g} GB at {self.memory_tb_per_s:g} "
            f"TB/s, {self.bf16_tflops:g} TFLOP/s in bf16 (dense), NVLink {self.nvlink_gb_per_s:g} GB/s among "
            f"{self.nvlink_gpus} GPUs, {self.gpus_per_node} a node ({self.source})"
        )


#: By the family of their GPU.
VENDOR = {
    "B200": VendorFigures("DGX B200", 180, 8, 2250, 1800, 8, 8, "NVIDIA: DGX B200 user guide; peaks as quoted"),
    "GB200": VendorFigures("GB200 NVL72", 186, 8, 2500, 1800, 72, 4, "NVIDIA: DGX GB200 user guide; peaks as quoted"),
}


def gpu_family(name: str) -> str:
    """``NVIDIA H100 80GB HBM3`` or ``H100-SXM-80GB`` -> ``H100``; unknown names are returned in upper case."""
    upper = name.upper()
    return next((family for family in ("GB200", "B200", "H200", "H100", "A100", "CPU") if family in upper), upper)


def read_step_times(path: Path | str) -> list[StepTime]:
    """Read a table of step times.

    Columns: ``gpu`` and ``step_ms``; optional ``precision`` (bf16), ``dap_size`` (1), ``passes`` (1..4, or ``mean``),
    ``peak_gib``, ``activation_checkpointing``, ``kind`` (measured), ``source`` and ``variant``. Rows of one system that
    give the four numbers of passes are averaged. Rows whose ``variant`` is neither empty nor ``scalefold`` describe
    other programs and are skipped. ``benchmarks/results/step_time.csv`` is read as it is: of a system, the newest
    measurement (one day, commit and number of GPUs) that has all four numbers of passes counts.

    Raises:
        ConfigError: naming file and line.
    """
    path = Path(path)
    groups: dict[tuple[str, ...], dict[int, StepTime]] = {}
    rows = _rows(path, ())
    from_ruler = bool(rows) and set(_RULER_COLUMNS) | _RULER_FACTS <= set(rows[0][1])
    for line, row in _ruler_rows(path, rows) if from_ruler else _rows(path, ("gpu", "step_ms")):
        if row.get("variant", "") not in ("", "scalefold"):
            continue
        entry, passes = _step_time(path, line, row)
        measurement = entry.source if from_ruler else ""  # passes of different measurements do not mix
        groups.setdefault((*_system(entry), measurement), {})[passes] = entry
    complete = [entries for entries in groups.values() if not from_ruler or set(entries) >= _ALL_PASSES]
    found = [_mean_over_passes(path, entries) for entries in complete]
    return list({_system(entry): entry for entry in found}.values())


def _system(entry: StepTime) -> tuple[str, ...]:
    """What a step time belongs to, as text."""
    dap, checkpointing = str(entry.dap_size), str(entry.activation_checkpointing)
    return entry.kind, entry.gpu, entry.precision, dap, checkpointing


def _ruler_rows(path: Path, rows: list[tuple[int, dict[str, str]]]) -> list[tuple[int, dict[str, str]]]:
    """Rows of this project in ``benchmarks/results/step_time.csv``, with the names of this table."""
    return [
        (
            line,
            {_RULER_COLUMNS.get(name, name): value for name, value in row.items()}
            | {
                "variant": "",
                "activation_checkpointing": _RULER_VARIANTS[row["variant"]],
                "source": f"measured {row['date']} at {row['commit']} on {row['gpus']} GPUs, {path.name}",
            },
        )
        for line, row in rows
        if row.get("variant") in _RULER_VARIANTS
    ]


def read_eval_times(path: Path | str) -> list[EvalTime]:
    """Read a table of evaluation costs: columns gpu, total_gpu_s, longest_chain_s, optional kind and source."""
    path = Path(path)
    return [
        EvalTime(
            kind=_kind(path, line, row),
            gpu=gpu_family(row["gpu"]),
            total_gpu_s=_positive(path, line, row, "total_gpu_s"),
            longest_chain_s=_positive(path, line, row, "longest_chain_s"),
            source=row.get("source") or f"measured, {path.name}",
        )
        for line, row in _rows(path, ("gpu", "total_gpu_s", "longest_chain_s"))
    ]


def find_step_time(
    table: Sequence[StepTime], gpu: str, precision: str, dap_size: int, checkpointing: bool, kind: Kind | None = None
) -> StepTime | None:
    """The row for this GPU, precision and DAP size: in the order of :data:`KINDS`."""
    fitting = [
        row
        for row in table
        if (row.gpu, row.precision, row.dap_size) == (gpu_family(gpu), precision, dap_size)
        and row.activation_checkpointing in (None, checkpointing)
    ]
    return next((row for k in _kinds(kind) for row in fitting if row.kind == k), None)


def find_eval_time(table: Sequence[EvalTime], gpu: str, kind: Kind | None = None) -> EvalTime | None:
    """The evaluation cost for this GPU, in the same order of kinds."""
    return next((row for k in _kinds(kind) for row in table if row.kind == k and row.gpu == gpu_family(gpu)), None)


def _kinds(kind: Kind | None) -> tuple[Kind, ...]:
    """The named kind alone, or all in order."""
    return KINDS if kind is None else (kind,)


def _kind(path: Path, line: int, row: dict[str, str]) -> str:
    kind = row.get("kind") or "measured"
    if kind not in KINDS:
        raise ConfigError(f"{path}:{line}: kind '{kind}' must be one of {', '.join(KINDS)}")
    return kind


def _step_time(path: Path, line: int, row: dict[str, str]) -> tuple[StepTime, int]:
    passes = row.get("passes") or "mean"
    if passes != "mean" and (not passes.isdigit() or int(passes) not in _ALL_PASSES):
        raise ConfigError(f"{path}:{line}: passes '{passes}' must be 1, 2, 3, 4 or mean")
    checkpointing = (row.get("activation_checkpointing") or "").lower()
    dap_size = row.get("dap_size") or "1"
    if not dap_size.isdigit():
        raise ConfigError(f"{path}:{line}: dap_size '{dap_size}' must be a whole number")
    entry = StepTime(
        kind=_kind(path, line, row),
        gpu=gpu_family(row["gpu"]),
        precision=row.get("precision") or "bf16",
        dap_size=int(dap_size),
        step_ms=_positive(path, line, row, "step_ms"),
        source=row.get("source") or f"measured, {path.name}",
        peak_gib=_positive(path, line, row, "peak_gib") if row.get("peak_gib") else None,
        activation_checkpointing=None if not checkpointing else checkpointing in ("true", "1", "yes"),
    )
    return entry, 0 if passes == "mean" else int(passes)


def _mean_over_passes(path: Path, entries: dict[int, StepTime]) -> StepTime:
    first = next(iter(entries.values()))
    if 0 in entries:
        return entries[0]
    if set(entries) != _ALL_PASSES:
        missing = ", ".join(map(str, sorted(_ALL_PASSES - set(entries))))
        raise ConfigError(f"{path}: {first.gpu} DAP-{first.dap_size} lacks the rows for passes {missing}")
    peaks = [entry.peak_gib for entry in entries.values() if entry.peak_gib is not None]
    return StepTime(
        **vars(first)
        | {"step_ms": sum(e.step_ms for e in entries.values()) / 4, "peak_gib": max(peaks) if peaks else None}
    )


def _rows(path: Path, needed: tuple[str, ...]) -> list[tuple[int, dict[str, str]]]:
    try:
        lines = [(n, text) for n, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)]
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the table ({error.strerror})") from None
    kept = [(n, text) for n, text in lines if text.strip() and not text.startswith("#")]
    reader = csv.DictReader(text for _, text in kept)
    missing = [name for name in needed if name not in (reader.fieldnames or ())]
    if missing:
        raise ConfigError(f"{path}: column {', '.join(missing)} is missing")
    rows = [{k: (v or "").strip() for k, v in row.items() if isinstance(v, str | None) and k} for row in reader]
    return [(kept[i + 1][0], row) for i, row in enumerate(rows)]


def _positive(path: Path, line: int, row: dict[str, str], name: str) -> float:
    try:
        value = float(row[name])
    except ValueError:
        raise ConfigError(f"{path}:{line}: {name} '{row[name]}' is not a number") from None
    if not 0 < value < float("inf"):
        raise ConfigError(f"{path}:{line}: {name} {value} must be positive")
    return value
