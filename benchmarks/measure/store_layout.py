"""One row of bytes per shard against HDF5's own names, chunks and filters: size, opening, random reads of chains.

    python benchmarks/measure/store_layout.py                  # real chains of ../shared/data, else generated ones
    python benchmarks/measure/store_layout.py --store STORE    # the chains of a prepared store

The same sections are written again as HDF5 data sets: a group per chain or alignment, letters chunked as the store's
blocks are, deflate of the same level, byte shuffle where the store shuffles. Both are read through h5py, chain by chain
in random order, to the same arrays; templates are left out. Rows go to ``benchmarks/results/store_layout.csv``: bytes
of all shards, milliseconds from no file open to the first chain's coordinates, and per chain the mean and 99th
percentile. Files come from the cache of the operating system.
"""

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import h5py
import numpy as np

from common import FOLDER, ROOT, append_rows, facts, print_table
from scalefold.data.made.demo import generate
from scalefold.data.raw.rawlayout import RawLayout
from scalefold.data.store import codec
from scalefold.data.store.prepare import prepare
from scalefold.data.store.store import ChainRecord, ShardReader, Store

SHARED = ROOT.parent / "shared" / "data"
LETTERS_PER_CHUNK = 1 << 18
PACKED = {"compression": "gzip", "compression_opts": 6}
Arrays = tuple[np.ndarray, ...]


def prepared(folder: Path) -> tuple[Path, str]:
    """A store of the real mini set where there is one, else of generated chains; its place and what it holds."""
    if not SHARED.is_dir():
        made = generate(folder / "raw", num_train=200, num_eval=16)
        prepare(made.layout(), folder / "store", report=lambda line: None)
        return folder / "store", "generated"
    entries = SHARED / "pdb_mmcif"
    alignments = (SHARED / "open_protein_set", SHARED / "open_protein_set_computed")
    layout = RawLayout(entries / "raw", alignments, entries / "clusters-by-entity-40.txt", entries / "obsolete.dat")
    prepare(layout, folder / "store", report=print)
    return folder / "store", "real"


def write_native(store: Store, folder: Path) -> None:
    """The chains of ``store`` as named HDF5 data sets, shard by shard."""
    folder.mkdir()
    for row in range(len(store)):
        chain, table = store.read(row), store.table
        with h5py.File(folder / f"structures_{table.structure_shard[row]:05d}.h5", "a", libver="latest") as file:
            group = file.create_group(chain.chain_id)
            group.attrs["sequence"] = chain.sequence
            present = chain.all_atom_positions[chain.all_atom_mask]
            group.create_dataset("coordinates", data=present, shuffle=True, **packed(present))
            mask = np.packbits(chain.all_atom_mask)
            group.create_dataset("mask", data=mask, **packed(mask))
        if (which := int(table.alignment[row])) >= 0:
            write_alignment(folder, f"alignments_{store.alignments.shard[which]:05d}.h5", str(which), chain)


def write_alignment(folder: Path, name: str, group_name: str, chain: ChainRecord) -> None:
    """One alignment, once for all of its chains."""
    with h5py.File(folder / name, "a", libver="latest") as file:
        if group_name in file:
            return
        group = file.create_group(group_name)
        rows, length = chain.msa.shape
        chunks = (min(rows, max(1, LETTERS_PER_CHUNK // length)), length)
        group.create_dataset("letters", data=chain.msa, chunks=chunks, **PACKED)
        group.create_dataset("deletions", data=chain.deletion_matrix, chunks=chunks, shuffle=True, **PACKED)
        group.create_dataset("counts", data=chain.msa_counts, shuffle=True, **packed(chain.msa_counts))


def packed(array: np.ndarray) -> dict[str, object]:
    """One chunk, deflated; nothing for an empty array."""
    return {"chunks": array.shape, **PACKED} if array.size else {}


class Native:
    """Reads what ``write_native`` wrote."""

    def __init__(self, store: Store, folder: Path) -> None:
        self.store, self.folder = store, folder
        self._open: dict[str, h5py.File] = {}

    def file(self, name: str) -> h5py.File:
        """A shard, opened at its first use."""
        if name not in self._open:
            self._open[name] = h5py.File(self.folder / name, "r", locking=False)
        return self._open[name]

    def structure(self, row: int) -> Arrays:
        """Positions and mask of a chain."""
        table = self.store.table
        group = self.file(f"structures_{table.structure_shard[row]:05d}.h5")[self.store.name(row)]
        length = len(str(group.attrs["sequence"]))
        mask = np.unpackbits(group["mask"][()], count=length * 37).reshape(length, 37).astype(bool)
        positions = np.zeros((length, 37, 3), np.float32)
        positions[mask] = group["coordinates"][()]
        return positions, mask

    def read(self, row: int) -> Arrays:
        """Positions, mask, letters, deletions and counts of a chain."""
        positions, mask = self.structure(row)
        if (which := int(self.store.table.alignment[row])) < 0:
            return positions, mask
        own = self.file(f"alignments_{self.store.alignments.shard[which]:05d}.h5")[str(which)]
        return positions, mask, own["letters"][()], own["deletions"][()], own["counts"][()]

    def close(self) -> None:
        """Close all shards."""
        for file in self._open.values():
            file.close()
        self._open = {}


def as_bytes(store: Store, row: int) -> Arrays:
    """The same arrays from the store."""
    structure, record = store.read_structure(row), store._alignment_record(row)
    if record is None:
        return structure.positions, structure.mask
    letters, deletions = store.read_msa_rows(row, np.arange(record.facts["num_rows"]))
    return structure.positions, structure.mask, letters, deletions, record["counts"]


def timed(read: Callable[[int], Arrays], rows: Sequence[int]) -> list[float]:
    """Milliseconds of each read."""
    times = []
    for row in rows:
        start = time.perf_counter()
        read(row)
        times.append(1e3 * (time.perf_counter() - start))
    return times


def opening_ms(make: Callable[[], tuple[Callable[[int], object], Callable[[], None]]], repeats: int = 20) -> float:
    """Median milliseconds from no file open to the first chain's coordinates."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        read, close = make()
        read(0)
        times.append(1e3 * (time.perf_counter() - start))
        close()
    return float(np.median(times))


def measure(store_dir: Path, what: str, folder: Path, repeats: int = 3) -> list[dict[str, object]]:
    """One row per layout; ValueError if they do not hold the same arrays."""
    store = Store(store_dir)
    write_native(store, folder / "native")
    native = Native(store, folder / "native")
    for row in range(len(store)):
        for mine, other in zip(as_bytes(store, row), native.read(row), strict=True):
            if not np.array_equal(mine, other):
                raise ValueError(f"{store.name(row)}: the layouts hold different arrays")
    order = random.Random(1).sample(range(len(store)), len(store))
    times: dict[str, list[list[float]]] = {"bytes": [], "native": []}
    for _ in range(repeats):  # in turn, so that a busy host slows both
        times["bytes"].append(timed(lambda row: as_bytes(store, row), order))
        times["native"].append(timed(native.read, order))
    files = {
        "bytes": [*(store_dir / "structures").iterdir(), *(store_dir / "alignments").iterdir()],
        "native": list((folder / "native").iterdir()),
    }

    def open_bytes() -> tuple[Callable[[int], object], Callable[[], None]]:
        fresh, table = ShardReader(store_dir / "structures"), store.table
        place = [int(c[0]) for c in (table.structure_shard, table.structure_offset, table.structure_bytes)]
        return lambda row: codec.unpack_structure(fresh.read(*place, label="first")), fresh.close

    def open_native() -> tuple[Callable[[int], object], Callable[[], None]]:
        fresh = Native(store, folder / "native")
        return fresh.structure, fresh.close

    opened = {"bytes": opening_ms(open_bytes), "native": opening_ms(open_native)}
    known = {name: value for name, value in facts().items() if name != "torch"}
    rows = []
    for layout, found in times.items():
        best = np.min(np.array(found), axis=0)
        rows.append(
            {
                **known,
                "h5py": h5py.__version__,
                "chains_are": what,
                "layout": layout,
                "chains": len(store),
                "mb": round(sum(file.stat().st_size for file in files[layout]) / 1e6, 3),
                "open_ms": round(opened[layout], 3),
                "read_mean_ms": round(float(best.mean()), 3),
                "read_p99_ms": round(float(np.percentile(best, 99)), 3),
            }
        )
    native.close()
    store.close()
    return rows


def main() -> int:
    """Prepare where needed, measure, print and append."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, help="a prepared store")
    parser.add_argument("--csv", type=Path, default=FOLDER / "store_layout.csv")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        place, what = (arguments.store, "given") if arguments.store else prepared(folder)
        rows = measure(place, what, folder)
    print_table(rows)
    append_rows(arguments.csv, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
