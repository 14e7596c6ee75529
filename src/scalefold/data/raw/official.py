"""The benchmark's own preprocessed set as raw data: structure pickles, chain table, alignment shards.

``<mmcif_dir>/chains.csv`` and ``<mmcif_dir>/dicts/<two letters>[.pkl]`` take the place of mmCIF files: a pickle holds
{pdb id: entry} with sequences and zlib-packed atom arrays per author chain. ``<alignments>/super.index`` and
``<alignments>/{0..9}.db`` take the place of alignment folders: the index says, for each chain, in which shard its files
lie and where. Both give the same chains as the files that they were made from.

Pickles are read without running anything (``plain_pickle.py``); arrays are built here, from bytes whose number is
checked.
"""

import csv
import math
import re
import sys
import zlib
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from scalefold.data.raw import plain_pickle
from scalefold.data.raw.mmcif import Entry, ProteinChain, check_coordinates, parse_date
from scalefold.data.raw.rawfile import read_bytes
from scalefold.errors import DataError
from scalefold.textfile import decode, parse_json, read_text

CHAIN_TABLE = "chains.csv"
INDEX_FILE = "super.index"
_TEXTS = (".a3m", ".sto", ".hhr")
_PDB_ID = re.compile(r"[A-Za-z0-9]{4}")
_CHAIN_ID = re.compile(r"[!-~]+")
_SEQUENCE = re.compile(r"[A-Z]*")
_INDEXED_CHAIN = re.compile(r"[A-Za-z0-9]{4}_[!-.0-~]+")  # no slash: it becomes the end of a path
_MAX_INFLATION = 64  # bytes of arrays per byte of file; real coordinates reach about ten
_MIN_INFLATED_BYTES = 64 << 20


# --- structures -------------------------------------------------------------------------------------------------------


def holds_structures(mmcif_dir: Path) -> bool:
    """Whether a folder is the official preprocessed set rather than a tree of mmCIF files."""
    return (mmcif_dir / CHAIN_TABLE).is_file()


def structure_files(mmcif_dir: Path) -> list[Path]:
    """The pickles in data set order. Raises DataError if there are none."""
    folder = mmcif_dir / "dicts"
    found = sorted(path for path in folder.glob("*") if path.is_file() and len(path.name.split(".")[0]) == 2)
    if not found:
        raise DataError(f"{folder}: no pickles named after two letters, although {mmcif_dir / CHAIN_TABLE} is there")
    return found


def is_structure_file(path: Path) -> bool:
    """Whether a raw structure file is a pickle of the official set."""
    return path.parent.name == "dicts"


def read_entries(path: Path) -> list[Entry]:
    """All entries of one pickle, sorted by id as the reference's chain table is.

    Raises:
        DataError: the file is damaged, wants to load code, or an entry lacks something.
    """
    data = read_bytes(path)
    budget = _Budget(_MAX_INFLATION * len(data) + _MIN_INFLATED_BYTES)
    try:
        entries = plain_pickle.loads(data)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    if type(entries) is not dict or any(type(pdb_id) is not str for pdb_id in entries):
        raise DataError(f"{path}: a dictionary of entries by PDB id was expected; the file is refused")
    return [_entry(path, pdb_id, entries[pdb_id], budget) for pdb_id in sorted(entries)]


class _Budget:
    """Bytes that the packed arrays of one file may still take; a few bytes of zlib may stand for gigabytes."""

    def __init__(self, num_bytes: int) -> None:
        self.left = num_bytes

    def take(self, num_bytes: int) -> None:
        """Raises ValueError if nothing is left."""
        self.left -= num_bytes
        if self.left < 0:
            raise ValueError("its arrays are packed far more tightly than coordinates can be")


def _entry(path: Path, pdb_id: str, fields: dict[str, Any], budget: _Budget) -> Entry:
    try:
        author_of = {_text(k): _text(v) for k, v in fields["mmcif_chain_id_to_author_chain_id"].items()}
        entity_of = {_text(a): _text(e) for e, asyms in fields["entity_id_to_mmcif_chain_ids"].items() for a in asyms}
        asyms_of: dict[str, list[str]] = {}
        for asym, author in author_of.items():
            asyms_of.setdefault(author, []).append(asym)
        chains = [
            _chain(_text(author), sequence, fields["atoms"][author], asyms_of, entity_of, budget)
            for author, sequence in fields["sequences"].items()
        ]
        resolution = fields["resolution"]
        return Entry(
            pdb_id=_match(_PDB_ID, pdb_id, "PDB id"),
            method=_text(fields["exptl_method"]),
            release_date=parse_date(_text(fields["release_date"])),
            resolution=float("nan") if resolution is None else float(resolution),
            chains=chains,
            left_out=[],
        )
    except KeyError as error:
        raise DataError(f"{path}: entry {pdb_id} has no {error}") from None
    except (AttributeError, TypeError, ValueError, zlib.error, DataError) as error:
        raise DataError(f"{path}: entry {pdb_id} cannot be read: {error}") from None


def _text(value: Any) -> str:
    if type(value) not in (str, int):
        raise TypeError(f"a {type(value).__name__} stands where an id or a text belongs")
    return str(value)


def _match(pattern: re.Pattern, text: Any, what: str) -> str:
    if type(text) is not str or not pattern.fullmatch(text):
        raise ValueError(f"{what} {text[:20]!r} is none" if type(text) is str else f"{what} is no text")
    return text


def _chain(
    author: str,
    sequence: str,
    atoms: dict[str, Any],
    asyms_of: dict[str, list[str]],
    entity_of: dict[str, str],
    budget: _Budget,
) -> ProteinChain:
    length = len(_match(_SEQUENCE, sequence, f"chain {author}: sequence"))
    try:
        positions = _unpack(atoms["all_atom_positions"], (length, 37, 3), np.dtype(np.float32), "atoms", budget)
        mask = _unpack(atoms["all_atom_mask"], (length, 37), np.dtype(np.uint8), "mask", budget).astype(bool)
        check_coordinates(positions, "atoms")
    except (ValueError, DataError) as error:
        raise ValueError(f"chain {author}: {error}") from None
    asym_ids = tuple(asyms_of.get(author, ()))
    return ProteinChain(
        author_chain_id=_match(_CHAIN_ID, author, "author chain id"),
        asym_id=asym_ids[0] if asym_ids else "",
        entity_id=entity_of.get(asym_ids[0], "") if asym_ids else "",
        asym_ids=asym_ids,
        entity_ids=tuple(entity_of[asym] for asym in asym_ids if asym in entity_of),
        sequence=sequence,
        positions=positions,
        mask=mask,
        num_heterogeneous=0,
    )


def _unpack(
    packed: tuple[bytes, tuple[int, ...]], shape: tuple[int, ...], dtype: np.dtype, what: str, budget: _Budget
) -> np.ndarray:
    """The array of ``shape`` in (zlib bytes, shape); no more is unpacked than it needs. Raises ValueError."""
    data, stated = packed
    num_bytes = math.prod(shape) * dtype.itemsize
    budget.take(num_bytes)
    unpacker = zlib.decompressobj()
    raw = unpacker.decompress(data, num_bytes + 1)
    if tuple(stated) != shape:
        raise ValueError(f"{shape[0]} residues, but {what} {tuple(stated)}")
    if len(raw) != num_bytes or not unpacker.eof:
        raise ValueError(f"{what} of shape {shape} have another number of bytes than {num_bytes}")
    return np.frombuffer(raw, dtype=dtype).reshape(shape).copy()


@dataclass(frozen=True)
class ChainFacts:
    """What the chain table knows beyond the pickles."""

    asym_ids: str  # ";" joined, in order of first coordinate row
    cluster_id: int


def read_chain_table(mmcif_dir: Path) -> dict[str, ChainFacts]:
    """Asym ids and cluster of every chain. Raises DataError naming file, line and column."""
    path = mmcif_dir / CHAIN_TABLE
    csv.field_size_limit(sys.maxsize)
    found: dict[str, ChainFacts] = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            rows = csv.DictReader(stream)
            missing = {"pdb_chain_id", "mmcif_chain_ids", "pdb_cluster_id"} - set(rows.fieldnames or ())
            if missing:
                raise DataError(f"{path}: column {', '.join(sorted(missing))} is missing")
            for row in rows:
                found[row["pdb_chain_id"]] = _chain_facts(row, f"{path}:{rows.line_num}")
    except UnicodeDecodeError:
        decode(path.read_bytes(), path, DataError)  # raises, and says where
        raise
    except (OSError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    return found


def _chain_facts(row: dict[str, str | None], place: str) -> ChainFacts:
    asym_ids, cluster = row["mmcif_chain_ids"], row["pdb_cluster_id"]
    if row["pdb_chain_id"] is None or asym_ids is None or cluster is None:
        raise DataError(f"{place}: the line has too few columns")
    try:
        cluster_id = int(float(cluster))
    except (ValueError, OverflowError):
        raise DataError(f"{place}: pdb_cluster_id `{cluster[:40]}` is no number") from None
    if not -1 <= cluster_id < 1 << 31:
        raise DataError(f"{place}: pdb_cluster_id `{cluster[:40]}` must lie between -1 and 2^31")
    return ChainFacts(asym_ids, cluster_id)


# --- alignments -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShardFile:
    """A file inside a shard, with the part of ``pathlib.Path`` that the readers use."""

    shard: Path
    name: str
    start: int
    size: int

    @property
    def suffix(self) -> str:
        """Ending of the name, with its dot."""
        return Path(self.name).suffix

    def read_bytes(self) -> bytes:
        """The content. Raises DataError if the shard is shorter than the index says."""
        with self.shard.open("rb") as stream:
            stream.seek(self.start)
            data = stream.read(self.size)
        if len(data) != self.size:
            raise DataError(f"{self.shard}: ends inside {self.name} (at {self.start}, {self.size} bytes)")
        return data

    def __str__(self) -> str:
        return f"{self.shard}@{self.start}:{self.name}"


@dataclass(frozen=True)
class ShardFolder:
    """The alignment files of one chain inside a shard, with the part of ``pathlib.Path`` that the readers use."""

    name: str
    files: tuple[ShardFile, ...]

    def glob(self, pattern: str) -> list[ShardFile]:
        """Files of that name; patterns with a folder in front find nothing, names hold no folder."""
        return [file for file in self.files if fnmatchcase(file.name, pattern)]

    @property
    def num_bytes(self) -> int:
        """Size of the alignment texts."""
        return sum(file.size for file in self.files if file.name.endswith(_TEXTS))


def holds_alignments(root: Path) -> bool:
    """Whether a folder holds alignment shards rather than alignment folders."""
    return (root / INDEX_FILE).is_file()


def alignment_folders(root: Path) -> dict[str, tuple[ShardFolder, list[str]]]:
    """Pseudo path ``<root>/super.index/<chain>`` -> files and all chains that share them, in order of the index."""
    groups: dict[tuple, tuple[str, list[str]]] = {}
    index = _read_index(root)
    for chain, folder in index.items():
        key = tuple((str(file.shard), file.start, file.name) for file in folder.files) or (chain,)
        groups.setdefault(key, (chain, []))[1].append(chain)
    return {f"{root / INDEX_FILE}/{first}": (index[first], chains) for first, chains in groups.values()}


def open_folder(path: str) -> Path | ShardFolder:
    """The alignment folder of a raw file's path: a real one, or one inside a shard."""
    place = Path(path)
    if place.parent.name != INDEX_FILE:
        return place
    return _read_index(place.parent.parent)[place.name]


@lru_cache(maxsize=1)
def _read_index(root: Path) -> dict[str, ShardFolder]:
    path = root / INDEX_FILE
    try:
        index = parse_json(read_text(path, DataError))
        folders = {chain: _shard_folder(root, chain, record) for chain, record in index.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: no readable index of alignment shards ({type(error).__name__}: {error})") from None
    missing = sorted({str(file.shard) for folder in folders.values() for file in folder.files if not _there(file)})
    if missing:
        raise DataError(f"{path}: names shards that are missing or too short: {', '.join(missing)}")
    return folders


def _shard_folder(root: Path, chain: str, record: dict[str, Any]) -> ShardFolder:
    """One record of the index. Raises DataError for a shard that lies outside the set's own folder."""
    if not _INDEXED_CHAIN.fullmatch(chain):
        raise ValueError(f"{chain[:40]!r} is no chain id")
    shard = record["db"]
    if type(shard) is not str or Path(shard).is_absolute() or ".." in Path(shard).parts:
        raise DataError(
            f"{root / INDEX_FILE}: chain {chain}: db {str(shard)[:80]!r} must lie in this folder; the index is refused"
        )
    files = []
    for name, start, size in record["files"]:
        if type(name) is not str or type(start) is not int or type(size) is not int or start < 0 or size < 0:
            raise ValueError(f"chain {chain}: a file is not [name, start, size]")
        files.append(ShardFile(root / shard, Path(name).name, start, size))
    return ShardFolder(chain, tuple(files))


def _there(file: ShardFile) -> bool:
    return _size(file.shard) >= file.start + file.size


@lru_cache(maxsize=64)
def _size(path: Path) -> int:
    try:
        return path.stat().st_size if path.is_file() else -1
    except OSError:  # a name that no file can have
        return -1
