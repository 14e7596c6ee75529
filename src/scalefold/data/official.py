"""The benchmark's own preprocessed set as raw data: structure pickles, chain table, alignment shards.

``<mmcif_dir>/chains.csv`` and ``<mmcif_dir>/dicts/<two letters>[.pkl]`` take the place of mmCIF files: a pickle holds
{pdb id: entry} with sequences and zlib-packed atom arrays per author chain. ``<alignments>/super.index`` and
``<alignments>/{0..9}.db`` take the place of alignment folders: the index says, for each chain, in which shard its files
lie and where. Both give the same chains as the files that they were made from.

Pickles are read without running anything: no class or function but NumPy's scalar types is ever looked up.
"""

import csv
import io
import json
import pickle
import sys
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from scalefold.data.mmcif import Entry, ProteinChain
from scalefold.errors import DataError

CHAIN_TABLE = "chains.csv"
INDEX_FILE = "super.index"
_ALLOWED = {("numpy", "dtype"), ("numpy.core.multiarray", "scalar"), ("numpy._core.multiarray", "scalar")}
_TEXTS = (".a3m", ".sto", ".hhr")


class _PlainUnpickler(pickle.Unpickler):
    """Refuses every name that a pickle wants to import, except NumPy's scalars."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return super().find_class(module, name)
        raise DataError(f"the pickle wants to load {module}.{name}; only plain data is read, so the file is refused")


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
    try:
        entries = _PlainUnpickler(io.BytesIO(path.read_bytes())).load()
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except Exception as error:  # a damaged pickle can raise anything
        raise DataError(f"{path}: no readable pickle ({type(error).__name__}: {error}); fetch it again") from None
    if not isinstance(entries, dict):
        raise DataError(f"{path}: holds {type(entries).__name__}, a dictionary of entries was expected")
    return [_entry(path, str(pdb_id), entries[pdb_id]) for pdb_id in sorted(entries)]


def _entry(path: Path, pdb_id: str, fields: dict[str, Any]) -> Entry:
    try:
        author_of = {str(k): str(v) for k, v in fields["mmcif_chain_id_to_author_chain_id"].items()}
        entity_of = {str(a): str(e) for e, asyms in fields["entity_id_to_mmcif_chain_ids"].items() for a in asyms}
        chains = [
            _chain(str(author), sequence, fields["atoms"][author], author_of, entity_of)
            for author, sequence in fields["sequences"].items()
        ]
        resolution = fields["resolution"]
        return Entry(
            pdb_id=pdb_id,
            method=str(fields["exptl_method"]),
            release_date=str(fields["release_date"]),
            resolution=float("nan") if resolution is None else float(resolution),
            chains=chains,
            left_out=[],
        )
    except KeyError as error:
        raise DataError(f"{path}: entry {pdb_id} has no {error}") from None
    except (AttributeError, TypeError, ValueError, zlib.error) as error:
        raise DataError(f"{path}: entry {pdb_id} cannot be read: {error}") from None


def _chain(
    author: str, sequence: str, atoms: dict[str, Any], author_of: dict[str, str], entity_of: dict[str, str]
) -> ProteinChain:
    positions = _unpack(atoms["all_atom_positions"], np.dtype(np.float32))
    mask = _unpack(atoms["all_atom_mask"], np.dtype(np.bool_))
    if positions.shape != (len(sequence), 37, 3) or mask.shape != (len(sequence), 37):
        raise ValueError(f"chain {author}: {len(sequence)} residues, but atoms {positions.shape} and mask {mask.shape}")
    asym_ids = tuple(asym for asym, name in author_of.items() if name == author)
    return ProteinChain(
        author_chain_id=author,
        asym_id=asym_ids[0] if asym_ids else "",
        entity_id=entity_of.get(asym_ids[0], "") if asym_ids else "",
        asym_ids=asym_ids,
        entity_ids=tuple(entity_of[asym] for asym in asym_ids if asym in entity_of),
        sequence=sequence,
        positions=positions,
        mask=mask,
        num_heterogeneous=0,
    )


def _unpack(packed: tuple[bytes, tuple[int, ...]], dtype: np.dtype) -> np.ndarray:
    data, shape = packed
    return np.frombuffer(zlib.decompress(data), dtype=dtype).reshape(tuple(int(n) for n in shape)).copy()


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
    with path.open(newline="", encoding="utf-8") as stream:
        rows = csv.DictReader(stream)
        missing = {"pdb_chain_id", "mmcif_chain_ids", "pdb_cluster_id"} - set(rows.fieldnames or ())
        if missing:
            raise DataError(f"{path}: column {', '.join(sorted(missing))} is missing")
        for row in rows:
            try:
                found[row["pdb_chain_id"]] = ChainFacts(row["mmcif_chain_ids"], int(float(row["pdb_cluster_id"])))
            except ValueError:
                raise DataError(
                    f"{path}:{rows.line_num}: pdb_cluster_id `{row['pdb_cluster_id']}` is no number"
                ) from None
    return found


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
        """Files of exactly that name; patterns with a folder in front find nothing, names hold no folder."""
        return [file for file in self.files if file.name == pattern]

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
        index = json.loads(path.read_text())
        folders = {
            chain: ShardFolder(
                chain,
                tuple(
                    ShardFile(root / record["db"], Path(name).name, start, size)
                    for name, start, size in record["files"]
                ),
            )
            for chain, record in index.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: no readable index of alignment shards ({type(error).__name__}: {error})") from None
    missing = sorted({str(file.shard) for folder in folders.values() for file in folder.files if not _there(file)})
    if missing:
        raise DataError(f"{path}: names shards that are missing or too short: {', '.join(missing)}")
    return folders


def _there(file: ShardFile) -> bool:
    return _size(file.shard) >= file.start + file.size


@lru_cache(maxsize=64)
def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1
