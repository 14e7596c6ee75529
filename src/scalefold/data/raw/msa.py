"""Alignment files (a3m, Stockholm) to integer arrays: letters, deletion counts, duplicates removed.

An a3m row holds one upper-case letter or ``-`` per query column; lower-case letters are insertions relative to the
query and become the deletion count of the next column (AlphaFold 2 Supplement, table 1, "deletion_matrix").
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from scalefold.data import residues
from scalefold.data.raw.rawfile import COMPRESSIONS, RawFolder, RawText, read_bytes
from scalefold.errors import DataError

#: Alignment files of one chain in reading order; of equal rows the first one read stays.
ALIGNMENT_NAMES = ("uniref90_hits", "bfd_uniclust_hits", "mgnify_hits")
#: Template hits of one chain.
HITS_NAME = "pdb70_hits.hhr"
#: What is read of an alignment folder, in words.
NAMES_READ = (
    f"{', '.join(ALIGNMENT_NAMES)}, each .a3m or .sto, and {HITS_NAME}, all of them plain or {', '.join(COMPRESSIONS)}"
)
_TEXT_SUFFIXES = (".a3m", ".sto", ".hhr")

HHBLITS_OF_BYTE = np.full(256, 255, dtype=np.uint8)
for _letter, _id in residues.MSA_LETTER_TO_HHBLITS.items():
    HHBLITS_OF_BYTE[ord(_letter)] = _id
_IS_INSERTION = np.zeros(256, dtype=bool)
_IS_INSERTION[ord("a") : ord("z") + 1] = True


@dataclass(frozen=True)
class AlignedRows:
    """Rows of one file: ASCII letters uint8 [S, L] and deletion counts int32 [S, L]."""

    letters: np.ndarray
    deletions: np.ndarray


@dataclass(frozen=True)
class Alignment:
    """The merged alignment of a chain."""

    msa: np.ndarray  # uint8 [S, L] HHblits ids
    deletions: np.ndarray  # int32 [S, L]
    rows_read: dict[str, int]  # rows per file, before removal of duplicates


def parse_a3m(text: bytes) -> AlignedRows:
    """Parse a3m text. Raises DataError with row and reason.

    Lines are stripped; blank lines and lines beginning with ``#`` are skipped; sequences may be wrapped. Insertions
    after the last column have no column to be counted in and are dropped.
    """
    return _align(_split_rows(text))


def _split_rows(text: bytes) -> list[bytes]:
    rows: list[list[bytes]] = []
    for line in map(bytes.strip, text.splitlines()):
        if line.startswith(b">"):
            rows.append([])
        elif line and not line.startswith(b"#"):
            if not rows:
                raise DataError("sequence before the first header line")
            rows[-1].append(line)
    if not rows:
        raise DataError("file holds no sequence")
    return [b"".join(parts) for parts in rows]


def _align(rows: Sequence[bytes]) -> AlignedRows:
    flat = np.frombuffer(b"".join(rows), dtype=np.uint8)
    ends = np.cumsum(np.fromiter(map(len, rows), dtype=np.int64, count=len(rows)))
    is_insertion = _IS_INSERTION[flat]
    letters = flat[~is_insertion]
    _check_letters(letters, flat, is_insertion, ends)
    insertions = np.flatnonzero(is_insertion)
    aligned_ends = ends - np.searchsorted(insertions, ends)
    lengths = np.diff(aligned_ends, prepend=0)
    length = int(lengths[0])
    if np.any(lengths != length):
        row = int(np.flatnonzero(lengths != length)[0])
        raise DataError(f"row {row + 1} has {lengths[row]} aligned letters, the first row has {length}")
    if any(not row for row in rows):
        raise DataError(f"row {[bool(r) for r in rows].index(False) + 1} is a header without a sequence")
    row_of = np.searchsorted(ends, insertions, side="right")
    column = insertions - np.arange(insertions.size) - row_of * length
    inside = column < length
    place, count = np.unique(row_of[inside] * length + column[inside], return_counts=True)
    deletions = np.zeros(len(rows) * length, dtype=np.int32)
    deletions[place] = count
    return AlignedRows(letters.reshape(len(rows), length), deletions.reshape(len(rows), length))


def _check_letters(letters: np.ndarray, flat: np.ndarray, is_insertion: np.ndarray, ends: np.ndarray) -> None:
    if np.any(HHBLITS_OF_BYTE[letters] == 255):
        at = int(np.flatnonzero(~is_insertion & (HHBLITS_OF_BYTE[flat] == 255))[0])
        row = int(np.searchsorted(ends, at, side="right"))
        raise DataError(f"row {row + 1} contains {chr(flat[at])!r}, which is neither a letter nor '-'")


def parse_stockholm(text: bytes) -> AlignedRows:
    """Parse Stockholm text: columns where the first row has a gap are insertions. Raises DataError with the reason."""
    parts: dict[bytes, list[bytes]] = {}
    for line in map(bytes.strip, text.splitlines()):
        if line and not line.startswith((b"#", b"//")):
            fields = line.split()
            if len(fields) != 2:
                raise DataError(f"Stockholm line is not 'name sequence': {line[:40].decode(errors='replace')!r}")
            parts.setdefault(fields[0], []).append(fields[1])
    if not parts:
        raise DataError("file holds no sequence")
    rows = [b"".join(p).replace(b".", b"-") for p in parts.values()]
    if any(len(row) != len(rows[0]) for row in rows):
        raise DataError("Stockholm rows differ in length")
    table = np.frombuffer(b"".join(rows).upper(), dtype=np.uint8).reshape(len(rows), -1)
    is_column = table[0] != ord("-")
    as_a3m = np.where(is_column, table, table + 32)  # lower case; a gap in an insert column becomes "M", dropped here
    keep = is_column | (table != ord("-"))
    return _align([row[kept].tobytes() for row, kept in zip(as_a3m, keep, strict=True)])


def merge(files: dict[str, AlignedRows]) -> Alignment | None:
    """Concatenate files in order and drop every aligned row that was seen before, in any file; None if no file.

    Rows are compared as letters, without insertions; the row that stays keeps its own deletion counts. Raises
    DataError if two files differ in their number of columns.
    """
    if not files:
        return None
    lengths = {name: rows.letters.shape[1] for name, rows in files.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(f"files differ in aligned length: {lengths}")
    letters = np.concatenate([rows.letters for rows in files.values()])
    kept = _first_occurrences(letters)
    deletions = np.concatenate([rows.deletions for rows in files.values()])
    return Alignment(
        msa=HHBLITS_OF_BYTE[letters[kept]],
        deletions=deletions[kept],
        rows_read={name: len(rows.letters) for name, rows in files.items()},
    )


def _first_occurrences(letters: np.ndarray) -> np.ndarray:
    raw, length = letters.tobytes(), letters.shape[1]
    seen: dict[bytes, int] = {}
    for row in range(len(letters)):
        seen.setdefault(raw[row * length : (row + 1) * length], row)
    return np.fromiter(seen.values(), dtype=np.int64, count=len(seen))


def find_file(folder: RawFolder, name: str) -> RawText | None:
    """The file ``name``, plain or compressed, in an alignment folder or one level below; None if absent."""
    for place in ("", "*/"):
        for ending in ("", *COMPRESSIONS):
            found = sorted(folder.glob(f"{place}{name}{ending}"), key=str)
            if found:
                return found[0]
    return None


def unread_files(folder: RawFolder) -> list[str]:
    """Names of alignment and hit files in a folder, or one level below, that nothing reads: other names or packing."""
    names = {path.name for pattern in ("*", "*/*") for path in folder.glob(pattern)}
    return sorted(name for name in names if _is_alignment_text(name) and not _is_read(name))


def _is_alignment_text(name: str) -> bool:
    return any(name.endswith(suffix) or f"{suffix}." in name for suffix in _TEXT_SUFFIXES)


def _is_read(name: str) -> bool:
    plain = next((name.removesuffix(ending) for ending in COMPRESSIONS if name.endswith(ending)), name)
    return plain == HITS_NAME or plain in {stem + suffix for stem in ALIGNMENT_NAMES for suffix in (".a3m", ".sto")}


def read_alignment(folder: RawFolder) -> Alignment | None:
    """The alignment of one OpenProteinSet-style folder, or None if it holds no alignment text.

    Reads the a3m files in the order of :data:`ALIGNMENT_NAMES`; an empty file counts as absent. Stockholm files of the
    same names are read only where the folder has no a3m at all. Raises DataError naming file and reason; a folder
    whose alignments all have names that are not read is one of the reasons.
    """
    any_found = False
    for suffix, parse in ((".a3m", parse_a3m), (".sto", parse_stockholm)):
        files = {}
        for name in ALIGNMENT_NAMES:
            path = find_file(folder, name + suffix)
            any_found = any_found or path is not None
            text = read_bytes(path) if path else b""
            if path and text:
                files[path.name] = _parse_file(path, text, parse)
        if files:
            try:
                return merge(files)
            except DataError as error:
                raise DataError(f"{folder}: {error}") from error
    unread = [name for name in unread_files(folder) if ".hhr" not in name]
    if unread and not any_found:
        raise DataError(f"no alignment of a known name: found {', '.join(unread)}; names that are read: {NAMES_READ}")
    return None


def _parse_file(path: RawText, text: bytes, parse) -> AlignedRows:
    try:
        return parse(text)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
