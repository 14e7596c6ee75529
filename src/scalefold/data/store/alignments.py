"""The alignments of a unit, with the template hits of their chains, to a shard."""

from collections import Counter
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

import numpy as np

from scalefold.data.raw import msa, official
from scalefold.data.raw.rawfile import RawFolder, read_bytes
from scalefold.data.raw.rejection import Rejection
from scalefold.data.store import codec, store, templates
from scalefold.data.store.labels import read_obsolete
from scalefold.data.store.manifest import file_entry
from scalefold.data.store.units import Unit, reason_of
from scalefold.errors import DataError


class TemplateLookup:
    """What template selection asks for, answered from the chain index and the structures of the unfinished store."""

    def __init__(self, out_dir: Path, obsolete: dict[str, str]) -> None:
        self.store = store.Store(out_dir, finished=False)
        self.table = self.store.table
        self.structure = lru_cache(maxsize=512)(self.store.read_structure)
        self.sources = templates.TemplateSources(self.release_date, obsolete, self.entry)

    def release_date(self, name: str) -> np.datetime64 | None:
        row = self.table.find(name)
        return None if row is None else self.table.release_date[row]

    def entry(self, pdb_id: str) -> list[templates.TemplateChain]:
        return [self._chain(row) for row in self.table.entry_rows(pdb_id)]

    def _chain(self, row: int) -> templates.TemplateChain:
        structure = self.structure(row)
        atoms = (structure.positions, structure.mask)
        return templates.TemplateChain(self.table.name(row)[5:], structure.sequence, row, lambda: atoms)


_LOOKUPS: dict[tuple[int, str], TemplateLookup] = {}


def _lookup(unit: Unit) -> TemplateLookup:
    """One lookup per process; the index is the same for all units of a store."""
    stamp = (unit.out_dir / "index" / "chain.order.npy").stat().st_mtime_ns
    key = (stamp, str(unit.out_dir.resolve()))
    if key not in _LOOKUPS:
        file = unit.layout.obsolete_file
        _LOOKUPS.clear()
        _LOOKUPS[key] = TemplateLookup(unit.out_dir, read_obsolete(file) if file else {})
    return _LOOKUPS[key]


def prepare_alignments(unit: Unit) -> dict:
    """Write a unit's shard; returns its sidecar."""
    lookup = _lookup(unit)
    writer = store.ShardWriter(unit.out_dir / "alignments" / f"{unit.number:05d}.h5")
    alignments, rejected, unread = [], [], Counter()
    for file in unit.files:
        folder, found = (
            official.open_folder(file.path),
            [lookup.table.find(member) for member in unit.members[file.path]],
        )
        rows = [row for row in found if row is not None]
        if not rows:
            rejected.append(
                asdict(Rejection("alignment", folder.name, folder.name, "none of its chains has a structure"))
            )
            continue
        names = msa.unread_files(folder)
        unread.update(names)
        try:
            alignment, notes = _prepare_alignment(folder, rows, lookup, writer, unit.reference_equality)
            alignments.append(alignment)
            notes += [_note(folder, f"not read: {', '.join(names)}; read are {msa.NAMES_READ}")] if names else []
            rejected += [asdict(note) for note in notes]
        except Exception as error:
            rejected.append(asdict(Rejection("alignment", folder.name, folder.name, reason_of(error))))
    writer.close()
    return {"alignments": alignments, "rejected": rejected, "unread": unread, "file": file_entry(writer.path)}


def _note(folder: RawFolder, reason: str) -> Rejection:
    return Rejection("note", folder.name, folder.name, reason)


def _prepare_alignment(
    folder: RawFolder, rows: list[int], lookup: TemplateLookup, writer: store.ShardWriter, reference_equality: bool
) -> tuple[dict, list[Rejection]]:
    """Write one folder's alignment and the template tables of its chains."""
    sequences = {row: lookup.structure(row).sequence for row in rows}
    alignment = msa.read_alignment(folder)
    if alignment is None:  # no text at all: the query alone
        letters, deletions, counts = store.query_only_msa(sequences[rows[0]])
    else:
        letters, deletions, counts = alignment.msa, alignment.deletions, store.count_letters(alignment.msa)
    members, notes = _members_that_fit(folder, letters, sequences, lookup)
    if not members:
        raise DataError("; ".join(note.reason for note in notes))
    hits, hit_notes = read_hits(folder)
    packed = [_pack_templates(row, sequences[row], hits, lookup, reference_equality) for row in members]
    facts = {} if alignment is None else {"rows_read": alignment.rows_read}
    offset, num_bytes = writer.append(codec.pack_msa(facts, letters, deletions, counts))
    places = [(row, *writer.append(record), count) for row, (record, count) in zip(members, packed, strict=True)]
    num_rows, length = letters.shape
    row = {"name": folder.name, "num_rows": num_rows, "length": length, "offset": offset, "num_bytes": num_bytes}
    return {**row, "chains": places}, notes + hit_notes


def _members_that_fit(
    folder: RawFolder, letters: np.ndarray, sequences: dict[int, str], lookup: TemplateLookup
) -> tuple[list[int], list[Rejection]]:
    """Chains whose length is the alignment's. One whose letters differ from the query row is kept, with a note."""
    members, notes = [], []
    query = "".join(store.residues.HHBLITS_LETTERS[i] for i in letters[0])
    for row, sequence in sequences.items():
        name = lookup.table.name(row)
        if len(sequence) != len(query):
            reason = f"chain has {len(sequence)} residues, its alignment {len(query)} columns"
            notes.append(Rejection("chain", name, folder.name, reason))
            continue
        members.append(row)
        own = "".join(store.residues.HHBLITS_LETTERS[i] for i in store.query_only_msa(sequence)[0][0])
        different = sum(a != b for a, b in zip(own, query, strict=True))
        if different:
            reason = f"the alignment's query row differs from SEQRES in {different} of {len(query)} residues"
            notes.append(Rejection("note", name, folder.name, reason))
    return members, notes


def read_hits(folder: RawFolder) -> tuple[list[templates.HhrHit], list[Rejection]]:
    """The folder's template hits, with a note on those that are malformed; a file that cannot be read counts as one."""
    path = msa.find_file(folder, msa.HITS_NAME)
    if path is None:
        return [], []
    try:
        text = read_bytes(path).decode("ascii", errors="replace")
    except DataError as error:
        return [], [_note(folder, f"without templates: {error}")]
    skipped: list[str] = []
    hits = templates.parse_hhr(text, skipped)
    more = "; ..." if len(skipped) > 3 else ""
    reason = f"{path.name}: {len(skipped)} malformed hits left out: {'; '.join(skipped[:3])}{more}"
    return hits, [_note(folder, reason)] if skipped else []


def _pack_templates(
    row: int, sequence: str, hits: list[templates.HhrHit], lookup: TemplateLookup, reference_equality: bool
) -> tuple[bytes, int]:
    table = lookup.table
    query = templates.Query(table.name(row)[:4], sequence, table.release_date[row])
    chosen = templates.select(hits, query, lookup.sources, reference_equality)
    return store.pack_templates([hit for hit, _ in chosen], [at for _, at in chosen], len(sequence)), len(chosen)
