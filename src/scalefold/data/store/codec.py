"""Numpy arrays to compressed bytes and back: the record format inside the shards of a store.

A record is ``<uint32 header length><JSON header><section bytes>...``. The header holds small facts under ``"facts"``
and one ``[name, dtype, shape, num_bytes, coding]`` per section, so one section is decoded without touching the others.

Letters are deflated row by row, which is both the smallest and the fastest, because neighbouring rows are homologous
and share long runs (docs/data.md says what else was tried).
"""

import contextlib
import json
import math
import re
import struct
import zlib
from collections.abc import Iterator, Mapping

import numpy as np

from scalefold.errors import DataError
from scalefold.textfile import parse_json

_HEADER_LENGTH = struct.Struct("<I")
_DEFLATE_LEVEL = 6
_CODINGS = ("deflate", "shuffle", "delta")
_DTYPE = re.compile(r"[<>|=][biuf][1248]")  # NumPy would parse anything else as an expression


def _shuffle(array: np.ndarray) -> bytes:
    """Bytes of equal significance beside each other, which deflate compresses better."""
    flat = np.ascontiguousarray(array).reshape(-1)
    return flat.view(np.uint8).reshape(flat.size, flat.itemsize).T.tobytes()


def _unshuffle(data: bytes, dtype: np.dtype) -> np.ndarray:
    planes = np.frombuffer(data, dtype=np.uint8).reshape(dtype.itemsize, -1)
    return np.ascontiguousarray(planes.T).reshape(-1).view(dtype)


def _encode(array: np.ndarray, coding: str) -> bytes:
    if coding == "delta":  # along the first axis; integer arithmetic wraps, so the inverse is exact
        array = np.diff(array, axis=0, prepend=np.zeros((1, *array.shape[1:]), dtype=array.dtype))
    raw = np.ascontiguousarray(array).tobytes() if coding == "deflate" else _shuffle(array)
    return zlib.compress(raw, _DEFLATE_LEVEL)


def _decode(data: bytes | memoryview, dtype: np.dtype, shape: list[int], coding: str) -> np.ndarray:
    """One section. No more is unpacked than its shape needs; ValueError or zlib.error if the bytes do not fit it."""
    num_bytes = math.prod(shape) * dtype.itemsize
    unpacker = zlib.decompressobj()
    raw = unpacker.decompress(data, num_bytes + 1)
    if len(raw) != num_bytes or not unpacker.eof:
        raise ValueError(f"shape {shape} of {dtype} needs {num_bytes} bytes")
    if coding == "deflate":
        return np.frombuffer(raw, dtype=dtype).reshape(shape)
    array = _unshuffle(raw, dtype).reshape(shape)
    return np.cumsum(array, axis=0, dtype=dtype) if coding == "delta" else array


def pack(facts: Mapping[str, object], sections: Mapping[str, tuple[np.ndarray, str]]) -> bytes:
    """One record from small JSON-able ``facts`` and named ``(array, coding)`` sections.

    Codings: ``deflate`` (bytes as they are), ``shuffle`` (by byte significance), ``delta`` (integers; differences
    along the first axis, then shuffle).
    """
    entries, payloads = [], []
    for name, (array, coding) in sections.items():
        if coding not in _CODINGS:
            raise ValueError(f"coding {coding!r} is not one of {_CODINGS}")
        payload = _encode(array, coding)
        entries.append([name, array.dtype.str, list(array.shape), len(payload), coding])
        payloads.append(payload)
    header = json.dumps({"facts": dict(facts), "sections": entries}, separators=(",", ":")).encode()
    return b"".join([_HEADER_LENGTH.pack(len(header)), header, *payloads])


class Record:
    """A packed record whose sections are decoded on access.

    Raises :class:`DataError` naming ``label`` if the bytes are not a record.
    """

    def __init__(self, data: bytes | memoryview, label: str) -> None:
        self._data, self._label = memoryview(data), label
        with self.checking("header"):
            (length,) = _HEADER_LENGTH.unpack_from(self._data)
            header = parse_json(bytes(self._data[4 : 4 + length]))
            self.facts: dict = header["facts"]
            self._sections: dict[str, tuple[int, list]] = {}
            offset = 4 + length
            for entry in header["sections"]:
                _check_section(*entry)
                self._sections[entry[0]] = (offset, entry)
                offset += entry[3]
            if type(self.facts) is not dict:
                raise ValueError("facts are no object")

    def __str__(self) -> str:
        return self._label

    @contextlib.contextmanager
    def checking(self, part: str) -> Iterator[None]:
        """Raise DataError naming ``part`` for what damaged bytes lead to."""
        try:
            yield
        except (zlib.error, struct.error, ValueError, KeyError, IndexError, TypeError, OverflowError) as error:
            reason = " ".join(str(error).split())[:200]
            raise DataError(
                f"{self._label}: stored record is damaged ({part}: {reason}); run verify-data on the store"
            ) from error

    def __contains__(self, name: str) -> bool:
        return name in self._sections

    def __getitem__(self, name: str) -> np.ndarray:
        with self.checking(name):
            offset, (_, dtype, shape, num_bytes, coding) = self._sections[name]
            return _decode(self._data[offset : offset + num_bytes], np.dtype(dtype), shape, coding)

    def shape(self, name: str) -> list[int]:
        """Shape of a section, without decoding it."""
        with self.checking(name):
            return self._sections[name][1][2]


def _check_section(name: str, dtype: str, shape: list[int], num_bytes: int, coding: str) -> None:
    """Raises ValueError or TypeError if a section cannot be what its entry says: deflate packs 1032 to 1 at best."""
    if type(name) is not str or type(dtype) is not str or coding not in _CODINGS:
        raise ValueError("a section without name, type or coding")
    if any(type(n) is not int or n < 0 for n in (*shape, num_bytes)):
        raise ValueError("a negative size, or none")
    if not _DTYPE.fullmatch(dtype) or math.prod(shape) * np.dtype(dtype).itemsize > 1100 * num_bytes:
        raise ValueError(f"shape {shape} of {dtype} cannot come from {num_bytes} bytes")


def smallest_uint(maximum: int) -> np.dtype:
    """Smallest unsigned dtype that holds ``maximum`` (deletion counts: uint8, uint16 or int32)."""
    if maximum <= 0xFF:
        return np.dtype(np.uint8)
    return np.dtype(np.uint16) if maximum <= 0xFFFF else np.dtype(np.int32)


# --- structures -------------------------------------------------------------------------------------------------------


def pack_structure(facts: Mapping[str, object], positions: np.ndarray, mask: np.ndarray) -> bytes:
    """Record of one chain's coordinates: float32 [L, 37, 3] angstrom and bool [L, 37].

    PDB coordinates have three decimals, so present atoms are stored as integer milli-angstrom differences whenever
    that gives back every float32 exactly; otherwise as they are.
    """
    present = positions[mask]
    milli = np.rint(present.astype(np.float64) * 1000.0)
    # Compared as bits: "-0.000" is a coordinate of real entries, and no integer gives back a negative zero.
    again = (milli.astype(np.int32) / 1000.0).astype(np.float32) if np.all(np.abs(milli) < 2**31) else None
    exact = again is not None and np.array_equal(again.view(np.uint32), present.view(np.uint32))
    coordinates = (milli.astype(np.int32), "delta") if exact else (present, "shuffle")
    sections = {"mask": (np.packbits(mask), "deflate"), "coordinates": coordinates}
    return pack({**facts, "length": len(mask)}, sections)


def unpack_structure(record: Record) -> tuple[np.ndarray, np.ndarray]:
    """float32 [L, 37, 3] positions (0 where absent) and bool [L, 37] mask, bit for bit as packed."""
    with record.checking("structure"):
        length, bits, coordinates = record.facts["length"], record["mask"], record["coordinates"]
        if type(length) is not int or bits.size != -(-length * 37 // 8):
            raise ValueError(f"{length} residues, but a mask of {bits.size} bytes")
        mask = np.unpackbits(bits, count=length * 37).reshape(length, 37).astype(bool)
        if coordinates.dtype == np.int32:
            coordinates = (coordinates / 1000.0).astype(np.float32)
        positions = np.zeros((length, 37, 3), dtype=np.float32)
        positions[mask] = coordinates
    return positions, mask


# --- alignments -------------------------------------------------------------------------------------------------------

_BLOCK_LETTERS = 1 << 18  # letters per independently decoded block of rows


def pack_msa(facts: Mapping[str, object], msa: np.ndarray, deletions: np.ndarray, counts: np.ndarray) -> bytes:
    """Record of one alignment: uint8 [S, L] HHblits ids, integer [S, L] deletion counts, uint32 [L, 22] letter counts.

    Rows lie in blocks that are decoded independently. Deletions are kept as (flat index, count) of their non-zero
    entries per block.
    """
    num_rows, length = msa.shape
    rows_per_block = max(1, _BLOCK_LETTERS // max(length, 1))
    dtype = smallest_uint(int(deletions.max(initial=0)))
    sections: dict[str, tuple[np.ndarray, str]] = {"counts": (counts.astype(np.uint32), "shuffle")}
    for block, start in enumerate(range(0, num_rows, rows_per_block)):
        rows = deletions[start : start + rows_per_block].reshape(-1)
        where = np.flatnonzero(rows)
        sections[f"letters{block}"] = (msa[start : start + rows_per_block], "deflate")
        sections[f"deletion_index{block}"] = (where.astype(np.uint32), "delta")
        sections[f"deletion_count{block}"] = (rows[where].astype(dtype), "shuffle")
    shape = {"num_rows": num_rows, "length": length, "rows_per_block": rows_per_block, "deletion_dtype": dtype.str}
    return pack({**facts, **shape}, sections)


def unpack_msa(record: Record, rows: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [S, L] letters and deletion counts (smallest dtype) of all rows, or of the ascending ``rows`` only.

    Blocks without a wanted row are not decoded.
    """
    with record.checking("alignment"):
        num_rows, length, per_block, dtype = _msa_shape(record)
    wanted = np.arange(num_rows) if rows is None else np.asarray(rows, dtype=np.int64)
    if wanted.size and (wanted[0] < 0 or wanted[-1] >= num_rows or np.any(np.diff(wanted) <= 0)):
        raise ValueError(f"rows must ascend within 0..{num_rows - 1}")
    msa = np.empty((wanted.size, length), dtype=np.uint8)
    deletions = np.zeros((wanted.size, length), dtype=dtype)
    with record.checking("alignment"):
        for block in np.unique(wanted // per_block):
            first, last = np.searchsorted(wanted, [block * per_block, (block + 1) * per_block])
            inside = wanted[first:last] - block * per_block
            letters = record[f"letters{block}"]
            dense = np.zeros(letters.shape, dtype=dtype)
            dense.reshape(-1)[record[f"deletion_index{block}"]] = record[f"deletion_count{block}"]
            whole = inside.size == len(letters)
            msa[first:last] = letters if whole else letters[inside]
            deletions[first:last] = dense if whole else dense[inside]
    return msa, deletions


def _msa_shape(record: Record) -> tuple[int, int, int, np.dtype]:
    """Rows, columns, rows per block and type of the deletion counts. ValueError if the blocks contradict them."""
    num_rows, length, per_block = (record.facts[name] for name in ("num_rows", "length", "rows_per_block"))
    if any(type(n) is not int or n < 0 for n in (num_rows, length, per_block)) or per_block < 1:
        raise ValueError("a number of rows or columns is none")
    blocks = [record.shape(f"letters{block}") for block in range(-(-num_rows // per_block))]
    more = f"letters{len(blocks)}" in record
    if more or sum(rows for rows, _ in blocks) != num_rows or any(columns != length for _, columns in blocks):
        raise ValueError(f"{num_rows} rows of {length} columns do not lie in its blocks")
    dtype = record.facts["deletion_dtype"]
    if dtype not in ("|u1", "<u2", "<i4", ">u2", ">i4"):
        raise ValueError(f"deletion counts of type {dtype!s:.20}")
    return num_rows, length, per_block, np.dtype(dtype)
