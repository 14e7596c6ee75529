"""The prepared data set: a memory-mapped index and a few large HDF5 shards, written and read side by side.

Layout of a store folder::

    manifest.json            counts, bytes and SHA-256 of every file below, inputs, summary of rejections
    rejected.csv             one line per rejected entry, chain or alignment with its reason
    index/chain.<column>.npy, index/alignment.<column>.npy
    structures/00000.h5 ...  one record per chain: sequence, coordinates, mask
    alignments/00000.h5 ...  one record per alignment folder (shared by identical chains), a template table per chain

A shard holds one one-dimensional uint8 dataset ``records``; the index says where each record begins and ends, so a
sample costs one contiguous read for the structure, one for the alignment and one per template it uses. Everything in
a store is a deterministic function of the raw files: no crop, mask, sample or shuffle is stored.

Longer than 400 lines, because whoever changes the format changes writer and reader, which stand side by side.
"""

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from tokenize import TokenError
from typing import Any, BinaryIO

import h5py
import numpy as np

from scalefold.data import residues
from scalefold.data.store import codec
from scalefold.errors import DataError

FORMAT_VERSION = 1
_CHUNK_BYTES = 1 << 20
_MAX_OPEN_SHARDS = 400  # stays below the usual limit of 1024 open files per process
_NO_RECORD = -1
# Of damaged headers; SystemError comes from the tokenizer of Python 3.12.
_DAMAGED = (ValueError, TypeError, EOFError, OSError, RecursionError, MemoryError, SyntaxError, SystemError, TokenError)
_COLUMN_KINDS = {"chain_id": "S", "name": "S", "release_date": "M", "resolution": "f", "max_residue_share": "f"}


# --- records ----------------------------------------------------------------------------------------------------------


@dataclass
class TemplateHit:
    """One pre-filtered template hit of a chain. The arrays are read from the template chain when first asked for.

    ``ok`` is False if featurisation failed, with ``reason``; such a hit has no arrays. ``template_position`` int32 [L]
    is the residue of the template chain under each query residue, -1 at gaps.
    """

    name: str
    sum_probs: float
    ok: bool
    reason: str
    template_position: np.ndarray
    letters: np.ndarray | None = field(repr=False, default=None)
    _read: Callable[[], tuple[np.ndarray, np.ndarray, np.ndarray]] | None = field(repr=False, default=None)

    @cached_property
    def _arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if not self.ok or self._read is None:
            raise DataError(f"template {self.name} cannot be used: {self.reason}")
        aatype, positions, mask = self._read()
        return gather_template(aatype, positions, mask, self.template_position, self.letters)

    @property
    def aatype(self) -> np.ndarray:
        """uint8 [L] HHblits ids, gap = 21."""
        return self._arrays[0]

    @property
    def all_atom_positions(self) -> np.ndarray:
        """float32 [L, 37, 3] angstrom, zero-centred over the template chain's present atoms, 0 where absent."""
        return self._arrays[1]

    @property
    def all_atom_mask(self) -> np.ndarray:
        """bool [L, 37]."""
        return self._arrays[2]


def gather_template(
    aatype: np.ndarray,
    positions: np.ndarray,
    mask: np.ndarray,
    template_position: np.ndarray,
    letters: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A template chain laid under the query: uint8 [L] HHblits ids, float32 [L, 37, 3], bool [L, 37].

    ``template_position`` [L] indexes the template chain, -1 is a gap. The whole chain is centred on the float32 mean of
    its present atoms first. ``letters`` replaces the chain's own letters where a hit was matched with wildcards.
    """
    aligned = template_position >= 0
    source = template_position[aligned]
    centred = np.zeros_like(positions)
    if mask.any():
        centred[mask] = positions[mask] - positions[mask].mean(axis=0)
    length = len(template_position)
    out_positions = np.zeros((length, 37, 3), dtype=np.float32)
    out_mask = np.zeros((length, 37), dtype=bool)
    out_aatype = np.full(length, residues.GAP_RESTYPE, dtype=np.uint8)
    out_positions[aligned], out_mask[aligned] = centred[source], mask[source]
    out_aatype[aligned] = residues.RESTYPE_TO_HHBLITS[aatype[source]]
    return (out_aatype if letters is None else letters), out_positions, out_mask


@dataclass(frozen=True)
class ChainRecord:
    """Everything stored about one chain; see the module and ``docs/data.md``.

    A chain without alignment has one row, the query, and ``has_alignment`` False in the table.
    """

    chain_id: str  # pdb id _ author chain id
    sequence: str
    aatype: np.ndarray  # uint8 [L], 0..20
    all_atom_positions: np.ndarray  # float32 [L, 37, 3] angstrom
    all_atom_mask: np.ndarray  # bool [L, 37]
    resolution: float  # angstrom, nan if unknown
    release_date: str  # YYYY-MM-DD
    msa: np.ndarray  # uint8 [S, L] HHblits ids, deduplicated over files
    deletion_matrix: np.ndarray  # uint8, uint16 or int32 [S, L] counts
    templates: list[TemplateHit]  # pre-filtered hits, sum_probs descending, stable
    msa_counts: np.ndarray  # uint32 [L, 22] letters per column over all rows, restype order (X = 20, gap = 21)


@dataclass(frozen=True)
class ChainTable:
    """Columns of the chain index, one entry per chain, in data set order. Memory-mapped."""

    chain_id: np.ndarray  # bytes
    length: np.ndarray  # int32
    release_date: np.ndarray  # datetime64[D]
    resolution: np.ndarray  # float64 angstrom, nan if unknown
    cluster_id: np.ndarray  # int32, -1 if none
    max_residue_share: np.ndarray  # float64, share of the most common letter, nan if empty
    num_ca: np.ndarray  # int32, residues with a C-alpha atom
    asym_ids_text: np.ndarray  # uint8, ";" joined asym ids of all chains, one after the other
    asym_ids_end: np.ndarray  # int64, where each chain's asym ids end
    alignment: np.ndarray  # int32 row of the alignment index, -1 if none
    msa_rows: np.ndarray  # int32, rows after removal of duplicates, 0 if no alignment
    num_template_hits: np.ndarray  # int32, kept hits
    structure_shard: np.ndarray
    structure_offset: np.ndarray
    structure_bytes: np.ndarray
    template_shard: np.ndarray
    template_offset: np.ndarray
    template_bytes: np.ndarray
    order: np.ndarray  # int64 (as searchsorted needs it, so nothing is copied), argsort of chain_id

    @cached_property
    def has_alignment(self) -> np.ndarray:
        """bool per chain."""
        return np.asarray(self.alignment) >= 0

    def name(self, row: int) -> str:
        """Chain id of a row."""
        return bytes(self.chain_id[row]).decode()

    def find(self, chain_id: str) -> int | None:
        """Row of a chain, None if there is no such chain. Binary search in the mapped columns: nothing is loaded."""
        key = np.bytes_(chain_id.encode())
        if key.itemsize > self.chain_id.itemsize:  # longer than every name; comparing would widen the whole column
            return None
        at = int(np.searchsorted(self.chain_id, key, sorter=self.order))
        return int(self.order[at]) if at < len(self.order) and self.chain_id[self.order[at]] == key else None

    def entry_rows(self, pdb_id: str) -> list[int]:
        """Rows of all chains of an entry, in table order."""
        bounds = [np.bytes_(f"{pdb_id}_".encode()), np.bytes_(f"{pdb_id}`".encode())]  # "`" is the byte after "_"
        first, last = np.searchsorted(self.chain_id, bounds, sorter=self.order)
        return np.sort(self.order[first:last]).tolist()

    def asym_ids(self, row: int) -> list[str]:
        """All asym ids under the chain's author chain id, ligands and waters too, in order of first appearance."""
        start = int(self.asym_ids_end[row - 1]) if row else 0
        return bytes(self.asym_ids_text[start : int(self.asym_ids_end[row])]).decode().split(";")


@dataclass(frozen=True)
class AlignmentTable:
    """Columns of the alignment index: one entry per alignment folder."""

    name: np.ndarray  # bytes
    num_rows: np.ndarray
    length: np.ndarray
    shard: np.ndarray
    offset: np.ndarray
    num_bytes: np.ndarray


def write_table(index_dir: Path, kind: str, table: ChainTable | AlignmentTable) -> None:
    """Write every column as ``<kind>.<column>.npy`` (no pickles)."""
    index_dir.mkdir(parents=True, exist_ok=True)
    for column in fields(table):
        write_column(index_dir, kind, column.name, getattr(table, column.name))


def write_column(index_dir: Path, kind: str, name: str, values: np.ndarray) -> None:
    """Write one column under a temporary name and rename it."""
    temporary = index_dir / f".{kind}.{name}.tmp.npy"
    np.save(temporary, values, allow_pickle=False)
    temporary.rename(index_dir / f"{kind}.{name}.npy")


def _open_table(index_dir: Path, kind: str, table_type: type) -> Any:
    columns = {c.name: _open_column(index_dir / f"{kind}.{c.name}.npy", c.name) for c in fields(table_type)}
    lengths = {name: len(values) for name, values in columns.items() if name != "asym_ids_text"}
    if len(set(lengths.values())) > 1:
        raise DataError(f"{index_dir}: columns of the {kind} index differ in length; run verify-data on the store")
    return table_type(**columns)


def _open_column(path: Path, name: str) -> np.ndarray:
    """A one-dimensional column, mapped. What its header states is held against the size of the file first."""
    try:
        with path.open("rb") as stream:
            shape, dtype = _read_header(stream)
            size = os.fstat(stream.fileno()).st_size - stream.tell()
        kinds = _COLUMN_KINDS.get(name, "iu")
        if len(shape) != 1 or shape[0] * dtype.itemsize != size or (shape[0] and dtype.kind not in kinds):
            raise ValueError(f"states {shape} of {dtype}, holds {size} bytes")
        return np.load(path, mmap_mode="r", allow_pickle=False) if size else np.zeros(shape, dtype)
    except FileNotFoundError:
        raise DataError(f"{path}: index column is missing; the store is incomplete, run prepare again") from None
    except _DAMAGED as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path}: index column cannot be read ({reason}); run verify-data on the store") from error


def _read_header(stream: BinaryIO) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(stream)
    return shape, dtype


@contextlib.contextmanager
def _damage_names(place: object) -> Iterator[None]:
    """Turn what a damaged index makes of a look-up into one line that names ``place``."""
    try:
        yield
    except (IndexError, KeyError, ValueError, TypeError, OverflowError, AttributeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise DataError(f"{place}: index or record is damaged ({reason}); run verify-data on the store") from error


# --- shards -----------------------------------------------------------------------------------------------------------


class ShardWriter:
    """Appends records to one HDF5 shard under a temporary name; the final name appears only when it is complete."""

    def __init__(self, path: Path) -> None:
        self.path, self._temporary = path, path.with_name(f".{path.name}.tmp")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._temporary.unlink(missing_ok=True)
        self._file = h5py.File(self._temporary, "w", libver="latest")
        self._data = self._file.create_dataset("records", (0,), np.uint8, maxshape=(None,), chunks=(_CHUNK_BYTES,))
        self._data.attrs["format_version"] = FORMAT_VERSION
        self._pending, self._pending_bytes, self._flushed = [], 0, 0

    def append(self, record: bytes) -> tuple[int, int]:
        """Add one record; returns its offset and number of bytes."""
        offset = self._flushed + self._pending_bytes
        self._pending.append(record)
        self._pending_bytes += len(record)
        if self._pending_bytes >= 8 * _CHUNK_BYTES:
            with self._writing():
                self._flush()
        return offset, len(record)

    def _flush(self) -> None:
        joined = np.frombuffer(b"".join(self._pending), dtype=np.uint8)
        self._data.resize((self._flushed + joined.size,))
        self._data[self._flushed :] = joined
        self._flushed += joined.size
        self._pending, self._pending_bytes = [], 0

    def close(self) -> None:
        """Write what is pending, close the file and give it its final name."""
        with self._writing():
            self._flush()
            self._file.flush()  # whatever fails, fails here: a file that HDF5 cannot close brings the process down
            self._file.close()
        self._temporary.rename(self.path)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Raise DataError if the disk refuses; nothing of the shard is left then."""
        try:
            yield
        except (OSError, RuntimeError) as error:  # h5py raises either
            self._discard()
            reason = re.search(r"error message = '([^']*)'", str(error))
            raise DataError(
                f"{self.path}: cannot write the shard: {reason[1] if reason else error}; run prepare again to continue"
            ) from None

    def _discard(self) -> None:
        with contextlib.suppress(OSError, RuntimeError):
            self._data.resize((0,))  # nothing is left to be written
            os.truncate(self._temporary, 0)
            self._file.close()
        self._temporary.unlink(missing_ok=True)


class ShardReader:
    """Byte ranges of the shards of one folder. HDF5 files are opened when first read, once per process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[int, tuple[h5py.File, h5py.Dataset]] = {}
        self._process = os.getpid()

    def __getstate__(self) -> dict:
        return {"folder": self.folder, "_open": {}, "_process": -1}

    def read(self, shard: int, offset: int, num_bytes: int, label: str) -> codec.Record:
        """The record at ``offset``. Raises DataError naming file and ``label`` if it cannot be read."""
        if self._process != os.getpid():  # forked: file handles must not be shared with the parent
            self._open, self._process = {}, os.getpid()
        path = self.folder / f"{shard:05d}.h5"
        if shard not in self._open:
            if len(self._open) >= _MAX_OPEN_SHARDS:
                self._open.pop(next(iter(self._open)))[0].close()
            self._open[shard] = _open_shard(path)
        data = self._open[shard][1]
        if min(offset, num_bytes) < 0 or offset + num_bytes > data.shape[0]:
            raise DataError(f"{path}: {label} lies beyond the end of the shard; run verify-data on the store")
        try:
            content = data[offset : offset + num_bytes]
        except (OSError, RuntimeError) as error:
            raise DataError(f"{path}: {label} cannot be read ({error}); run verify-data on the store") from error
        return codec.Record(content.data, f"{path}: {label}")

    def close(self) -> None:
        """Close all files of this process."""
        for file, _ in self._open.values():
            file.close()
        self._open = {}


def _open_shard(path: Path) -> tuple[h5py.File, h5py.Dataset]:
    try:
        # No chunk cache: records are smaller than chunks, and without cache only the bytes asked for are read.
        file = h5py.File(path, "r", rdcc_nbytes=0, locking=False)
        records = file["records"]
        if not isinstance(records, h5py.Dataset) or records.ndim != 1 or records.dtype != np.uint8:
            raise OSError("its records are no row of bytes")
        return file, records
    except FileNotFoundError:
        raise DataError(f"{path}: shard is missing; copy it again or run prepare again") from None
    except (OSError, KeyError, RuntimeError, ValueError) as error:
        raise DataError(f"{path}: shard cannot be read ({error}); run verify-data on the store") from error


# --- structure and template records -----------------------------------------------------------------------------------


def pack_templates(hits: list[TemplateHit], template_rows: list[int], length: int) -> bytes:
    """Record of a chain's kept hits; ``template_rows`` are their rows in the chain table (-1 where not ``ok``)."""
    position = np.stack([hit.template_position for hit in hits]) if hits else np.zeros((0, length), dtype=np.int32)
    own_letters = [i for i, hit in enumerate(hits) if hit.letters is not None]
    facts = {
        "names": [hit.name for hit in hits],
        "reasons": {i: hit.reason for i, hit in enumerate(hits) if hit.reason},
        "own_letters": own_letters,
    }
    letters = np.array([hits[i].letters for i in own_letters], dtype=np.uint8).reshape(len(own_letters), length)
    return codec.pack(
        facts,
        {
            "sum_probs": (np.array([hit.sum_probs for hit in hits], dtype=np.float64), "shuffle"),
            "row": (np.array(template_rows, dtype=np.int32), "deflate"),
            "position": (np.ascontiguousarray(position.T.astype(np.int32)), "delta"),
            "letters": (letters, "deflate"),
        },
    )


@dataclass(frozen=True)
class Structure:
    """Sequence and atoms of one chain as stored."""

    sequence: str
    aatype: np.ndarray  # uint8 [L]
    positions: np.ndarray  # float32 [L, 37, 3]
    mask: np.ndarray  # bool [L, 37]


class Store:
    """A prepared data set opened for reading.

    Opening maps the index and reads nothing else; HDF5 shards are opened per process at the first read, so a store may
    be handed to forked or spawned loader workers. ``finished=False`` is for preparation, which reads template
    structures before the store has a manifest.
    """

    def __init__(self, path: str | Path, finished: bool = True) -> None:
        self.path = Path(path)
        if finished and not (self.path / "manifest.json").is_file():
            raise DataError(f"{self.path}: no manifest.json; not a prepared store, or prepare did not finish")
        self.table: ChainTable = _open_table(self.path / "index", "chain", ChainTable)
        self.alignments: AlignmentTable = _open_table(self.path / "index", "alignment", AlignmentTable)
        self._structures = ShardReader(self.path / "structures")
        self._alignments = ShardReader(self.path / "alignments")

    def __len__(self) -> int:
        return len(self.table.chain_id)

    @cached_property
    def chain_ids(self) -> list[str]:
        """Chain ids in data set order."""
        return np.asarray(self.table.chain_id).astype(str).tolist()

    def name(self, row: int) -> str:
        """Chain id of a row."""
        with _damage_names(self.path):
            return self.table.name(row)

    def index_of(self, chain_id: str) -> int:
        """Row of a chain. Raises DataError if the store has no such chain."""
        with _damage_names(self.path):
            row = self.table.find(chain_id)
        if row is None:
            raise DataError(f"{self.path}: no chain {chain_id!r} in this store of {len(self)} chains")
        return row

    def _row(self, chain: int | str) -> int:
        row = self.index_of(chain) if isinstance(chain, str) else int(chain)
        if not 0 <= row < len(self):
            raise DataError(f"{self.path}: chain index {row} outside 0..{len(self) - 1}")
        return row

    def read_structure(self, chain: int | str) -> Structure:
        """Sequence, positions and mask of a chain."""
        row, table = self._row(chain), self.table
        place = (int(c[row]) for c in (table.structure_shard, table.structure_offset, table.structure_bytes))
        record = self._structures.read(*place, label=f"chain {self.name(row)}")
        positions, mask = codec.unpack_structure(record)
        with _damage_names(record):
            sequence = record.facts["sequence"]
            aatype = residues.sequence_to_aatype(sequence)
            if len(aatype) != len(mask):
                raise ValueError(f"{len(aatype)} letters for {len(mask)} residues")
        return Structure(sequence, aatype, positions, mask)

    def _alignment_record(self, row: int) -> codec.Record | None:
        which = int(self.table.alignment[row])
        if which == _NO_RECORD:
            return None
        with _damage_names(self.path):
            place = [int(c[which]) for c in (self.alignments.shard, self.alignments.offset, self.alignments.num_bytes)]
            label = f"alignment {self.alignments.name[which].decode()}"
        return self._alignments.read(*place, label=label)

    def read_msa_rows(self, chain: int | str, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Letters uint8 [n, L] and deletion counts [n, L] of the ascending ``rows``; other blocks stay compressed."""
        row = self._row(chain)
        record = self._alignment_record(row)
        if record is not None:
            return codec.unpack_msa(record, rows)
        msa, deletions, _ = query_only_msa(self.read_structure(row).sequence)
        return msa[rows], deletions[rows]

    def read_msa_counts(self, chain: int | str) -> np.ndarray:
        """uint32 [L, 22] letters per column over all rows, restype order."""
        row = self._row(chain)
        record = self._alignment_record(row)
        return query_only_msa(self.read_structure(row).sequence)[2] if record is None else record["counts"]

    def read_templates(self, chain: int | str) -> list[TemplateHit]:
        """Kept hits, sum_probs descending; arrays are read when first asked for."""
        row, table = self._row(chain), self.table
        if int(table.template_shard[row]) == _NO_RECORD:
            return []
        place = (int(c[row]) for c in (table.template_shard, table.template_offset, table.template_bytes))
        record = self._alignments.read(*place, label=f"templates of {self.name(row)}")
        with _damage_names(record):
            return self._template_hits(record)

    def _template_hits(self, record: codec.Record) -> list[TemplateHit]:
        facts, sum_probs, rows = record.facts, record["sum_probs"], record["row"]
        position, letters = record["position"].T, record["letters"]
        own = {hit: i for i, hit in enumerate(facts["own_letters"])}
        return [
            TemplateHit(
                name,
                float(sum_probs[i]),
                int(rows[i]) != _NO_RECORD,
                facts["reasons"].get(str(i), ""),
                np.ascontiguousarray(position[i]),
                letters[own[i]] if i in own else None,
                self._template_reader(int(rows[i])),
            )
            for i, name in enumerate(facts["names"])
        ]

    def _template_reader(self, row: int) -> Callable[[], tuple[np.ndarray, np.ndarray, np.ndarray]]:
        def read() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            structure = self.read_structure(row)
            return structure.aatype, structure.positions, structure.mask

        return read

    def read(self, chain: int | str, msa: bool = True) -> ChainRecord:
        """The whole record of a chain, by row or chain id.

        ``msa=False`` leaves the alignment rows out (shape [0, L]); ``msa_counts`` and templates are there all the same.
        """
        row = self._row(chain)
        structure = self.read_structure(row)
        record = self._alignment_record(row)
        if record is None:
            letters, deletions, counts = query_only_msa(structure.sequence)
        else:
            letters, deletions = codec.unpack_msa(record, None if msa else np.zeros(0, dtype=np.int64))
            counts = record["counts"]
        return ChainRecord(
            chain_id=self.name(row),
            sequence=structure.sequence,
            aatype=structure.aatype,
            all_atom_positions=structure.positions,
            all_atom_mask=structure.mask,
            resolution=float(self.table.resolution[row]),
            release_date=str(self.table.release_date[row]),
            msa=letters if msa else letters[:0],
            deletion_matrix=deletions if msa else deletions[:0],
            templates=self.read_templates(row),
            msa_counts=counts,
        )

    def close(self) -> None:
        """Close the shards opened by this process."""
        self._structures.close()
        self._alignments.close()


def query_only_msa(sequence: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The alignment of a chain without one: the query row, no deletions, its letter counts."""
    aatype = residues.sequence_to_aatype(sequence)
    # The query goes through the alignment alphabet like any other row, where B, U and Z have ids of their own.
    ids = [residues.MSA_LETTER_TO_HHBLITS[letter] for letter in sequence]
    msa = np.array([ids], dtype=np.uint8).reshape(1, len(aatype))
    return msa, np.zeros_like(msa), count_letters(msa)


def count_letters(msa: np.ndarray) -> np.ndarray:
    """uint32 [L, 22] rows per column and letter in restype order, from uint8 [S, L] HHblits ids."""
    counts = np.empty((msa.shape[1], 22), dtype=np.uint32)
    for hhblits_id, restype in enumerate(residues.HHBLITS_TO_RESTYPE):
        counts[:, restype] = np.count_nonzero(msa == hhblits_id, axis=0)
    return counts
