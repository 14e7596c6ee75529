"""Raw files to a store: structures first, then alignments with their templates, then index and manifest.

The raw data is cut into units that depend on the data alone. Each unit becomes one shard and a small JSON file in
``work/``, both renamed into place when complete; a run that is killed continues with the units that have no such file
(``work/`` is removed at the end). Units are spread over processes, and over nodes with mpi4py (rank r of W takes units
r, r + W, ...). A worker holds one entry or one alignment in memory.
"""

import json
import multiprocessing
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from scalefold.data.raw import mmcif, msa, official
from scalefold.data.raw.rawfile import RawFolder, read_bytes
from scalefold.data.raw.rawlayout import Plan, RawFile, RawLayout, scan
from scalefold.data.raw.rejection import Rejection
from scalefold.data.store import codec, labels, selection, store, templates
from scalefold.data.store.manifest import (
    MANIFEST_FILE,
    Manifest,
    file_entry,
    read_manifest,
    read_rejections,
    write_atomically,
)
from scalefold.errors import DataError
from scalefold.textfile import decode

# Core-seconds per million bytes of text: 18.2 s for 267 MB of structures and 6.4 s for 188 MB of alignments, the real
# mini set on one core. Reading from a slow file system comes on top.
_STRUCTURE_SECONDS_PER_MB = 0.070
_ALIGNMENT_SECONDS_PER_MB = 0.035


@dataclass(frozen=True)
class Team:
    """The processes that prepare one store together: this one's rank, how many there are, how they wait."""

    rank: int = 0
    size: int = 1
    barrier: Callable[[], object] = lambda: None


def mpi_team() -> Team:
    """The MPI world as a team. Raises DataError if mpi4py is not installed."""
    try:
        from mpi4py import MPI  # type: ignore[import-not-found]
    except ImportError:
        raise DataError("preparing over several nodes needs mpi4py: pip install 'scalefold[mpi]'") from None
    world = MPI.COMM_WORLD
    return Team(world.Get_rank(), world.Get_size(), world.Barrier)


@dataclass(frozen=True)
class Summary:
    """What a call of :func:`prepare` found or did."""

    store_dir: Path
    already_done: bool
    num_chains: int
    num_alignments: int
    num_rejected: int  # entries, chains and alignments left out
    num_notes: int
    raw_bytes: int
    store_bytes: int
    units_done: int  # by this call
    units_found: int  # left by an earlier call
    seconds: float


def prepare(
    layout: RawLayout,
    out_dir: Path,
    num_workers: int = 1,
    reference_equality: bool = True,
    team: Team | None = None,
    report: Callable[[str], None] = print,
) -> Summary:
    """Build the store ``out_dir`` from raw files, or continue or confirm an earlier run.

    All lists are read and checked before any work. A finished store of the same raw files is left as it is, but for
    clusters and evaluation list if these have changed. Unreadable entries, chains and alignments are listed in
    ``rejected.csv`` with their reason and the rest goes on. Raises DataError if a raw folder is missing, a list cannot
    be read, or ``out_dir`` belongs to other raw files.
    """
    team = team or Team()
    started = time.monotonic()
    if num_workers < 1:
        raise DataError(f"--workers {num_workers}: at least one process has to do the work")
    plan = scan(layout)
    inputs = _read_inputs(layout, plan, report if team.rank == 0 else lambda line: None)
    settings = {"reference_equality": reference_equality}
    if (out_dir / MANIFEST_FILE).is_file():
        return _confirm(out_dir, plan, inputs, settings, report, started, team)
    work = out_dir / "work"
    if team.rank == 0:
        _claim(work, plan, settings)
        _announce(plan, num_workers * team.size, report)
    team.barrier()
    job = _Job(out_dir, layout, plan, inputs, reference_equality)
    done = _run_units("structures", _prepare_structures, job, plan.structures, num_workers, team, report)
    team.barrier()
    if team.rank == 0:
        _merge_structures(job)
    team.barrier()
    done += _run_units("alignments", _prepare_alignments, job, plan.alignments, num_workers, team, report)
    team.barrier()
    if team.rank == 0:
        _finish(job, settings, report)
        shutil.rmtree(work)
    team.barrier()
    found = len(plan.structures) + len(plan.alignments) - done
    return _summarise(out_dir, False, done, found, started)


def _read_inputs(layout: RawLayout, plan: Plan, report: Callable[[str], None]) -> labels.Inputs:
    """Read every list that the later stages need. Raises DataError naming file and line."""
    if layout.obsolete_file:
        read_obsolete(layout.obsolete_file)
    known = official.read_chain_table(layout.mmcif_dir) if official.holds_structures(layout.mmcif_dir) else {}
    cluster_of = read_clusters(layout.clusters_file) if layout.clusters_file else None
    targets = selection.read_evaluation_file(layout.evaluation_file) if layout.evaluation_file else None
    inputs = labels.Inputs(cluster_of, known, targets, layout.evaluation_file)
    if not inputs.has_clusters:
        report(f"WARNING: {labels.NO_CLUSTERS}")
    if targets is not None and not known:
        _check_targets(targets, plan, layout, report)
    return inputs


def _check_targets(
    targets: list[selection.Target] | list[str], plan: Plan, layout: RawLayout, report: Callable[[str], None]
) -> None:
    """Compare the evaluation list with the names of the structure files, as far as these are PDB ids."""
    present = {Path(file.path).name.split(".")[0].lower() for unit in plan.structures for file in unit}
    wanted = [t.pdb_id if isinstance(t, selection.Target) else t[:4] for t in targets]
    absent = [pdb_id for pdb_id in dict.fromkeys(wanted) if pdb_id not in present]
    if not absent or any(len(name) != 4 for name in present):
        return
    text = f"{layout.evaluation_file}: no structure file for {len(absent)} of its entries: {', '.join(absent[:8])}"
    if len(absent) == len(set(wanted)):
        raise DataError(f"{text}; the store would have nothing to evaluate")
    report(f"WARNING: {text}")


def _confirm(
    out_dir: Path,
    plan: Plan,
    inputs: labels.Inputs,
    settings: dict,
    report: Callable[[str], None],
    started: float,
    team: Team,
) -> Summary:
    """A finished store: nothing to do, the last stage again, or another store's folder."""
    manifest = read_manifest(out_dir)
    same_work = manifest.fingerprint == plan.fingerprint or manifest.work_fingerprint == plan.work_fingerprint
    if not same_work or manifest.settings != settings:
        raise DataError(
            f"{out_dir}: holds a store of other raw files or settings; choose another folder or remove this one"
        )
    same = manifest.fingerprint == plan.fingerprint
    team.barrier()  # every rank has seen the same manifest
    if not same and team.rank == 0:
        report(f"{out_dir}: already prepared from these files, but for clusters or evaluation list: these are replaced")
        kept = [r for r in read_rejections(out_dir) if r.kind != "target"]
        labels.label(out_dir, manifest, kept, inputs, plan.fingerprint, report)
    elif team.rank == 0:
        report(f"{out_dir}: already prepared from these files, nothing to do")
    team.barrier()
    return _summarise(out_dir, same, 0, len(plan.structures) + len(plan.alignments), started)


def _claim(work: Path, plan: Plan, settings: dict) -> None:
    work.mkdir(parents=True, exist_ok=True)
    plan_file = work / "plan.json"
    mine = {"fingerprint": plan.work_fingerprint, "settings": settings}
    if plan_file.is_file() and _read_json(plan_file) != mine:
        raise DataError(
            f"{work.parent}: holds an unfinished store of other raw files or settings; remove it or choose another"
        )
    write_atomically(plan_file, json.dumps(mine))


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); remove it and run prepare again") from None


def _announce(plan: Plan, num_workers: int, report: Callable[[str], None]) -> None:
    structures = sum(file.text_bytes for unit in plan.structures for file in unit)
    alignments = sum(file.text_bytes for unit in plan.alignments for file in unit)
    seconds = (structures * _STRUCTURE_SECONDS_PER_MB + alignments * _ALIGNMENT_SECONDS_PER_MB) / 1e6
    report(
        f"prepare: {sum(map(len, plan.structures))} structure files ({structures / 1e9:.2f} GB of text), "
        f"{sum(map(len, plan.alignments))} alignment folders ({alignments / 1e9:.2f} GB of text), "
        f"about {seconds / 3600:.2f} core-hours, {seconds / 3600 / num_workers:.2f} h on {num_workers} workers"
    )


def _summarise(out_dir: Path, already_done: bool, done: int, found: int, started: float) -> Summary:
    manifest = read_manifest(out_dir)
    return Summary(
        store_dir=out_dir,
        already_done=already_done,
        num_chains=manifest.counts["chains"],
        num_alignments=manifest.counts["alignments"],
        num_rejected=sum(n for kind, n in manifest.rejections.items() if kind not in ("note", "target")),
        num_notes=manifest.rejections.get("note", 0),
        raw_bytes=manifest.raw_bytes,
        store_bytes=manifest.store_bytes,
        units_done=done,
        units_found=found,
        seconds=time.monotonic() - started,
    )


# --- units ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    out_dir: Path
    layout: RawLayout
    plan: Plan
    inputs: labels.Inputs
    reference_equality: bool

    def sidecar(self, phase: str, number: int) -> Path:
        return self.out_dir / "work" / f"{phase}-{number:05d}.json"

    def read_sidecars(self, phase: str, count: int) -> Iterable[tuple[int, dict]]:
        for number in range(count):
            yield number, _read_json(self.sidecar(phase, number))


@dataclass(frozen=True)
class _Unit:
    """Everything a worker process needs for one unit."""

    out_dir: Path
    layout: RawLayout
    number: int
    files: list[RawFile]
    members: dict[str, list[str]]
    reference_equality: bool
    sidecar: Path


def _run_units(
    phase: str,
    work: Callable[[_Unit], dict],
    job: _Job,
    units: list[list[RawFile]],
    num_workers: int,
    team: Team,
    report: Callable[[str], None],
) -> int:
    """Prepare this rank's missing units of a phase; returns their number."""
    missing = [n for n in range(team.rank, len(units), team.size) if not job.sidecar(phase, n).is_file()]
    tasks = [
        _Unit(
            job.out_dir,
            job.layout,
            number,
            units[number],
            {file.path: job.plan.members.get(file.path, []) for file in units[number]},
            job.reference_equality,
            job.sidecar(phase, number),
        )
        for number in missing
    ]
    progress = _Progress(phase, sum(f.text_bytes for t in tasks for f in t.files), len(tasks), report)
    if num_workers <= 1 or len(tasks) <= 1:
        for task in tasks:
            progress.add(_run_unit(work, task))
        return len(tasks)
    # spawn: a forked child would share HDF5 state with this process
    with ProcessPoolExecutor(num_workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for future in as_completed([pool.submit(_run_unit, work, task) for task in tasks]):
            progress.add(future.result())
    return len(tasks)


def _run_unit(work: Callable[[_Unit], dict], task: _Unit) -> tuple[int, int]:
    """Prepare one unit and leave its sidecar; returns (items, text bytes)."""
    result = work(task)
    write_atomically(task.sidecar, json.dumps(result, separators=(",", ":")))
    return len(task.files), sum(file.text_bytes for file in task.files)


class _Progress:
    def __init__(self, phase: str, total_bytes: int, num_units: int, report: Callable[[str], None]) -> None:
        self.phase, self.total, self.num_units, self.report = phase, max(total_bytes, 1), num_units, report
        self.started, self.last = time.monotonic(), 0.0
        self.items = self.bytes = self.units = 0

    def add(self, done: tuple[int, int]) -> None:
        self.items, self.bytes, self.units = self.items + done[0], self.bytes + done[1], self.units + 1
        elapsed = time.monotonic() - self.started
        if elapsed - self.last < 2.0 and self.units < self.num_units:
            return
        self.last = elapsed
        remaining_s = elapsed * (self.total - self.bytes) / max(self.bytes, 1)
        self.report(
            f"{self.phase}: {self.units}/{self.num_units} units, {self.items} items, "
            f"{self.items / max(elapsed, 1e-9):.1f} items/s, {self.bytes / 1e6 / max(elapsed, 1e-9):.1f} MB/s, "
            f"about {remaining_s / 60:.1f} min left"
        )


def _reason(error: Exception) -> str:
    """One line. A defect must not stop the preparation of the other half a million chains, but is named as one."""
    text = " ".join(str(error).split())
    return text if isinstance(error, DataError) else f"unexpected {type(error).__name__}: {text}"


# --- structures -------------------------------------------------------------------------------------------------------


def _prepare_structures(unit: _Unit) -> dict:
    writer = store.ShardWriter(unit.out_dir / "structures" / f"{unit.number:05d}.h5")
    chains, rejected = [], []
    for file in unit.files:
        name = Path(file.path).name
        try:
            entries = _read_entries(Path(file.path))
        except Exception as error:
            rejected.append(asdict(Rejection("entry", name.split(".")[0].lower(), name, _reason(error))))
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


def read_clusters(path: Path) -> dict[str, int]:
    """Zero-based line of each ``PDBID_entity`` in a cluster file, PDB id in upper case; a later line wins.

    Raises DataError if the file is no text or names nothing of that form.
    """
    cluster_of: dict[str, int] = {}
    for line_number, line in enumerate(decode(read_bytes(path), path, DataError).splitlines()):
        cluster_of.update((name[:4].upper() + name[4:], line_number) for name in line.split())
    if not any(name[4:5] == "_" for name in cluster_of):
        raise DataError(f"{path}: names no PDBID_entity; a cluster file has one cluster of such names per line")
    return cluster_of


def read_obsolete(path: Path) -> dict[str, str]:
    """Successors of obsolete entries. Raises DataError if the file is no text or has lines but none of that kind."""
    text = decode(read_bytes(path), path, DataError)
    if text.strip() and "OBSLTE" not in text:
        raise DataError(f"{path}: has no OBSLTE line; is it PDB's obsolete.dat?")
    return templates.parse_obsolete(text)


def _merge_structures(job: _Job) -> None:
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


# --- alignments -------------------------------------------------------------------------------------------------------


class _TemplateLookup:
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


_LOOKUPS: dict[tuple[int, str], _TemplateLookup] = {}


def _lookup(unit: _Unit) -> _TemplateLookup:
    """One lookup per process; the index is the same for all units of a store."""
    stamp = (unit.out_dir / "index" / "chain.order.npy").stat().st_mtime_ns
    key = (stamp, str(unit.out_dir.resolve()))
    if key not in _LOOKUPS:
        file = unit.layout.obsolete_file
        _LOOKUPS.clear()
        _LOOKUPS[key] = _TemplateLookup(unit.out_dir, read_obsolete(file) if file else {})
    return _LOOKUPS[key]


def _prepare_alignments(unit: _Unit) -> dict:
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
            rejected.append(asdict(Rejection("alignment", folder.name, folder.name, _reason(error))))
    writer.close()
    return {"alignments": alignments, "rejected": rejected, "unread": unread, "file": file_entry(writer.path)}


def _note(folder: RawFolder, reason: str) -> Rejection:
    return Rejection("note", folder.name, folder.name, reason)


def _prepare_alignment(
    folder: RawFolder, rows: list[int], lookup: _TemplateLookup, writer: store.ShardWriter, reference_equality: bool
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
    hits, hit_notes = _read_hits(folder)
    packed = [_pack_templates(row, sequences[row], hits, lookup, reference_equality) for row in members]
    facts = {} if alignment is None else {"rows_read": alignment.rows_read}
    offset, num_bytes = writer.append(codec.pack_msa(facts, letters, deletions, counts))
    places = [(row, *writer.append(record), count) for row, (record, count) in zip(members, packed, strict=True)]
    num_rows, length = letters.shape
    row = {"name": folder.name, "num_rows": num_rows, "length": length, "offset": offset, "num_bytes": num_bytes}
    return {**row, "chains": places}, notes + hit_notes


def _members_that_fit(
    folder: RawFolder, letters: np.ndarray, sequences: dict[int, str], lookup: _TemplateLookup
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


def _read_hits(folder: RawFolder) -> tuple[list[templates.HhrHit], list[Rejection]]:
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
    row: int, sequence: str, hits: list[templates.HhrHit], lookup: _TemplateLookup, reference_equality: bool
) -> tuple[bytes, int]:
    table = lookup.table
    query = templates.Query(table.name(row)[:4], sequence, table.release_date[row])
    chosen = templates.select(hits, query, lookup.sources, reference_equality)
    return store.pack_templates([hit for hit, _ in chosen], [at for _, at in chosen], len(sequence)), len(chosen)


# --- finish -----------------------------------------------------------------------------------------------------------


def _finish(job: _Job, settings: dict, report: Callable[[str], None]) -> None:
    """The complete index, then the last stage."""
    out_dir = job.out_dir
    files, rejected = {}, list(job.plan.found)
    for shard, unit in job.read_sidecars("structures", len(job.plan.structures)):
        files[f"structures/{shard:05d}.h5"] = unit["file"]
        rejected += [Rejection(**r) for r in unit["rejected"]]
    rejected += [Rejection(**r) for r in _read_json(out_dir / "work" / "dropped.json")]
    table = {
        c.name: np.array(getattr(store.Store(out_dir, finished=False).table, c.name)) for c in fields(store.ChainTable)
    }
    alignments: list[dict] = []
    unread: Counter[str] = Counter()
    for shard, unit in job.read_sidecars("alignments", len(job.plan.alignments)):
        files[f"alignments/{shard:05d}.h5"] = unit["file"]
        rejected += [Rejection(**r) for r in unit["rejected"]]
        unread.update(unit["unread"])
        for alignment in unit["alignments"]:
            _assign(table, alignment, shard, len(alignments))
            alignments.append({**alignment, "shard": shard})
    store.write_table(out_dir / "index", "chain", store.ChainTable(**table))
    store.write_table(out_dir / "index", "alignment", _alignment_table(alignments))
    for path in sorted((out_dir / "index").iterdir()):
        files[f"index/{path.name}"] = file_entry(path)
    if unread:
        names = ", ".join(f"{number} x {name}" for name, number in unread.most_common(10))
        report(f"WARNING: alignment files that are not read: {names}; read are {msa.NAMES_READ}")
    counts = {
        "chains": len(table["chain_id"]),
        "alignments": len(alignments),
        "chains_with_alignment": int(np.count_nonzero(table["alignment"] >= 0)),
        "chains_with_templates": int(np.count_nonzero(table["num_template_hits"] > 0)),
    }
    plan = job.plan
    manifest = Manifest("", settings, counts, plan.disk_bytes, files, work_fingerprint=plan.work_fingerprint)
    labels.label(out_dir, manifest, rejected, job.inputs, plan.fingerprint, report)


def _assign(table: dict[str, np.ndarray], alignment: dict, shard: int, number: int) -> None:
    for row, offset, num_bytes, num_hits in alignment["chains"]:
        table["alignment"][row] = number
        table["msa_rows"][row] = alignment["num_rows"]
        table["num_template_hits"][row] = num_hits
        table["template_shard"][row] = shard
        table["template_offset"][row] = offset
        table["template_bytes"][row] = num_bytes


def _alignment_table(alignments: list[dict]) -> store.AlignmentTable:
    return store.AlignmentTable(
        name=np.array([a["name"].encode() for a in alignments], dtype=np.bytes_),
        num_rows=np.array([a["num_rows"] for a in alignments], dtype=np.int32),
        length=np.array([a["length"] for a in alignments], dtype=np.int32),
        shard=np.array([a["shard"] for a in alignments], dtype=np.int32),
        offset=np.array([a["offset"] for a in alignments], dtype=np.int64),
        num_bytes=np.array([a["num_bytes"] for a in alignments], dtype=np.int64),
    )
