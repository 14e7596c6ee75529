"""The manifest of a store, and the check of a store against it."""

import csv
import hashlib
import io
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from scalefold.data.raw.rejection import Rejection
from scalefold.data.store.store import FORMAT_VERSION, Store
from scalefold.errors import DataError
from scalefold.textfile import parse_json, read_text

MANIFEST_FILE = "manifest.json"


REJECTED_FILE = "rejected.csv"


@dataclass
class Manifest:
    """Counts, sizes and checksums of a finished store. Holds no time and no path, so equal input gives equal bytes."""

    fingerprint: str
    settings: dict
    counts: dict[str, int]
    raw_bytes: int
    files: dict[str, dict]  # relative path -> {"bytes", "sha256"}
    rejections: dict[str, int] = field(default_factory=dict)  # kind -> number
    format_version: int = FORMAT_VERSION
    work_fingerprint: str = ""  # of all inputs but those of the last stage; stores of older versions have none

    @property
    def store_bytes(self) -> int:
        """Size of all files."""
        return sum(entry["bytes"] for entry in self.files.values())


def file_entry(path: Path) -> dict:
    """Size and SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def write_atomically(path: Path, text: str) -> None:
    """Write under a temporary name, then rename."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.rename(path)


def write_manifest(store_dir: Path, manifest: Manifest) -> None:
    """Write the manifest; its presence says that the store is complete."""
    write_atomically(store_dir / MANIFEST_FILE, json.dumps(asdict(manifest), indent=1, sort_keys=True) + "\n")


def read_manifest(store_dir: Path) -> Manifest:
    """The manifest of a store. Raises DataError if it is missing, unreadable or of another format version."""
    path = store_dir / MANIFEST_FILE
    if not path.is_file():
        raise DataError(f"{store_dir}: no {MANIFEST_FILE}; not a prepared store, or prepare did not finish")
    try:
        manifest = Manifest(**parse_json(read_text(path, DataError)))
        _check_manifest(manifest)
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not a manifest ({error}); prepare the store again") from error
    if manifest.format_version != FORMAT_VERSION:
        raise DataError(
            f"{path}: store format {manifest.format_version}, this version reads {FORMAT_VERSION}; prepare it again"
        )
    return manifest


def _check_manifest(manifest: Manifest) -> None:
    """Raises ValueError, TypeError or AttributeError if a field is not what its type says."""
    if {type(manifest.fingerprint), type(manifest.work_fingerprint)} != {str} or type(manifest.settings) is not dict:
        raise ValueError("a fingerprint is no text, or settings are no object")
    numbers = [manifest.raw_bytes, *manifest.counts.values(), *manifest.rejections.values()]
    if any(type(number) is not int for number in numbers) or not {"chains", "alignments"} <= manifest.counts.keys():
        raise ValueError("counts must be whole numbers, those of chains and alignments among them")
    for name, entry in manifest.files.items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"file {name[:80]!r} does not lie in the store")
        if len(name) > 200:
            raise ValueError(f"file {name[:80]!r}... has too long a name")
        if type(entry) is not dict or type(entry.get("bytes")) is not int or type(entry.get("sha256")) is not str:
            raise ValueError(f"file {name[:80]!r} has no bytes and sha256")


def write_rejections(store_dir: Path, rejections: list[Rejection]) -> None:
    """Write ``rejected.csv``, one line per rejection or note."""
    temporary = store_dir / f".{REJECTED_FILE}.tmp"
    with temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["kind", "name", "file", "reason"])
        writer.writerows([r.kind, r.name, r.file, r.reason] for r in rejections)
    temporary.rename(store_dir / REJECTED_FILE)


def read_rejections(store_dir: Path) -> list[Rejection]:
    """Everything that was left out or is unusual in a store."""
    path = store_dir / REJECTED_FILE
    rows = csv.DictReader(io.StringIO(read_text(path, DataError), newline=""))
    try:
        return [Rejection(**row) for row in rows]
    except (TypeError, csv.Error) as error:
        raise DataError(f"{path}:{rows.line_num}: no line of rejections ({error}); prepare the store again") from None


@dataclass(frozen=True)
class Verification:
    """Outcome of :func:`verify_data`: one line per problem, none if the store is as it was prepared."""

    num_files: int
    num_bytes: int
    num_chains: int
    problems: list[str]


def verify_data(store_dir: Path, quick: bool = False) -> Verification:
    """Check a store against its manifest: presence and size of every file, checksums unless ``quick``, counts, and
    that every record lies inside its shard.

    Raises DataError only if there is no readable manifest; everything else is a line in ``problems``.
    """
    manifest = read_manifest(store_dir)
    problems = []
    for name, expected in manifest.files.items():
        problem = _file_problem(store_dir / name, expected, quick)
        if problem:
            problems.append(problem)
    if not problems:
        problems += _content_problems(Store(store_dir), manifest)
    return Verification(len(manifest.files), manifest.store_bytes, manifest.counts["chains"], problems)


def _file_problem(path: Path, expected: dict, quick: bool) -> str | None:
    if not path.is_file():
        return f"{path}: file is missing"
    size = path.stat().st_size
    if size != expected["bytes"]:
        return f"{path}: {size} bytes, the manifest says {expected['bytes']}"
    if not quick and file_entry(path)["sha256"] != expected["sha256"]:
        return f"{path}: SHA-256 differs from the manifest"
    return None


def _content_problems(store: Store, manifest: Manifest) -> list[str]:
    table, alignments = store.table, store.alignments
    problems = []
    counts = {"chains": len(store), "alignments": len(alignments.name)}
    for what, number in counts.items():
        if number != manifest.counts[what]:
            problems.append(f"{store.path}: index holds {number} {what}, the manifest says {manifest.counts[what]}")
    ranges = (
        ("structures", table.structure_shard, table.structure_offset, table.structure_bytes),
        ("alignments", table.template_shard, table.template_offset, table.template_bytes),
        ("alignments", alignments.shard, alignments.offset, alignments.num_bytes),
    )
    for folder, shard, offset, num_bytes in ranges:
        for number in np.unique(shard[shard >= 0]):
            path = store.path / folder / f"{number:05d}.h5"
            end = int((offset + num_bytes)[shard == number].max())
            size = path.stat().st_size if path.is_file() else 0
            if end > size:
                problems.append(f"{path}: index points to byte {end} of a file of {size} bytes")
    return problems
