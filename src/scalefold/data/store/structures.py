"""The structures of a unit to a shard, and the index over the chains of all shards."""

import json
from collections import Counter
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np

from scalefold.data.raw import mmcif, official
from scalefold.data.raw.rejection import Rejection
from scalefold.data.store import codec, labels, store
from scalefold.data.store.manifest import file_entry, write_atomically
from scalefold.data.store.units import Job, Unit, reason_of
from scalefold.errors import DataError


def prepare_structures(unit: Unit) -> dict:
    """Write a unit's shard; returns its sidecar."""
    writer = store.ShardWriter(unit.out_dir / "structures" / f"{unit.number:05d}.h5")
    chains, rejected = [], []
    for file in unit.files:
        name = Path(file.path).name
        try:
            entries = _read_entries(Path(file.path))
        except Exception as error:
            rejected.append(asdict(Rejection("entry", name.split(".")[0].lower(), name, reason_of(error))))
            continue
        for entry in entries:
            for asym, author, types in entry.left_out:
                reason = f"polymer {asym} has no peptide monomer ({types})"
                rejected.append(asdict(Rejection("chain", f"{entry.pdb_id}_{author}", name, reason)))
            for chain in entry.chains:
                record = codec.pack_structure({"sequence": chain.sequence}, chain.positions, chain.mask)
                chains.append(_chain_row(entry, chain, *writer.append(record)))
                rejected += [asdict(note) for note in _chain_notes(entry, chain, name)]
    writer.close()
    return {"chains": chains, "rejected": rejected, "file": file_entry(writer.path)}


def _read_entries(path: Path) -> list[mmcif.Entry]:
    """The entry of an mmCIF file, or all entries of a pickle of the official set."""
    return official.read_entries(path) if official.is_structure_file(path) else [mmcif.read_entry(path)]


def _chain_row(entry: mmcif.Entry, chain: mmcif.ProteinChain, offset: int, num_bytes: int) -> dict:
    counts = Counter(chain.sequence)
    return {
        "chain_id": f"{entry.pdb_id}_{chain.author_chain_id}",
        "length": len(chain.sequence),
        "release_date": entry.release_date,
        "resolution": entry.resolution,
        "max_residue_share": max(counts.values()) / len(chain.sequence) if counts else float("nan"),
        "num_ca": int(chain.mask[:, 1].sum()),
        "asym_ids": ";".join(chain.asym_ids),
        "entity_ids": chain.entity_ids,
        "offset": offset,
        "num_bytes": num_bytes,
    }


def _chain_notes(entry: mmcif.Entry, chain: mmcif.ProteinChain, file: str) -> list[Rejection]:
    name, notes = f"{entry.pdb_id}_{chain.author_chain_id}", []
    if not chain.mask[:, 1].any():
        notes.append("no C-alpha atom: the chain is kept but has nothing to learn from")
    if chain.num_heterogeneous:
        notes.append(
            f"{chain.num_heterogeneous} extra letters from positions with several monomers: letters after "
            "them are shifted against the coordinates, as in the reference"
        )
    return [Rejection("note", name, file, note) for note in notes]


def merge_structures(job: Job) -> None:
    """The chain index, still without alignments and clusters; an entry that was seen before is left out."""
    rows, shards, dropped = [], [], []
    entry_shards: dict[str, int] = {}
    seen: set[str] = set()
    for shard, unit in job.read_sidecars("structures", len(job.plan.structures)):
        for row in unit["chains"]:
            if row["chain_id"] in seen:
                dropped.append(asdict(Rejection("chain", row["chain_id"], "", "the entry is given in several files")))
                continue
            seen.add(row["chain_id"])
            entry_shards.setdefault(row["chain_id"][:4], shard)
            facts = job.inputs.known.get(row["chain_id"])
            row["asym_ids"] = facts.asym_ids if facts else row["asym_ids"]
            rows.append(row)
            shards.append(shard)
    if not rows:
        raise DataError(f"{job.layout.mmcif_dir}: no protein chain in any file; see {job.out_dir / 'work'}")
    write_atomically(job.out_dir / "work" / "dropped.json", json.dumps(dropped))
    store.write_table(job.out_dir / "index", "chain", _chain_table(rows, shards))
    labels.write_entities(job.out_dir, [row["entity_ids"] for row in rows])
    empty = {column.name: np.zeros(0, dtype=np.int64) for column in fields(store.AlignmentTable)}
    store.write_table(job.out_dir / "index", "alignment", store.AlignmentTable(**empty))


def _chain_table(rows: list[dict], shards: list[int]) -> store.ChainTable:
    def column(key: str, dtype: type | str) -> np.ndarray:
        return np.array([row[key] for row in rows], dtype=dtype)

    texts = [row["asym_ids"].encode() for row in rows]
    chain_id = np.array([row["chain_id"].encode() for row in rows])
    none = np.full(len(rows), -1, dtype=np.int64)
    return store.ChainTable(
        chain_id=chain_id,
        length=column("length", np.int32),
        release_date=column("release_date", "datetime64[D]"),
        resolution=column("resolution", np.float64),
        cluster_id=none.astype(np.int32),
        max_residue_share=column("max_residue_share", np.float64),
        num_ca=column("num_ca", np.int32),
        asym_ids_text=np.frombuffer(b"".join(texts), dtype=np.uint8),
        asym_ids_end=np.cumsum([len(text) for text in texts], dtype=np.int64),
        alignment=none.astype(np.int32),
        msa_rows=np.zeros(len(rows), dtype=np.int32),
        num_template_hits=np.zeros(len(rows), dtype=np.int32),
        structure_shard=np.array(shards, dtype=np.int32),
        structure_offset=column("offset", np.int64),
        structure_bytes=column("num_bytes", np.int32),
        template_shard=none.astype(np.int32),
        template_offset=none.copy(),
        template_bytes=np.zeros(len(rows), dtype=np.int32),
        order=np.argsort(chain_id, kind="stable"),
    )
