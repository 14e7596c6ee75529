"""Raw files to a store: structures first, then alignments with their templates, then index and manifest.

The raw data is cut into units that depend on the data alone. Each unit becomes one shard and a small JSON file in
``work/``, both renamed into place when complete; a run that is killed continues with the units that have no such file
(``work/`` is removed at the end). Units are spread over processes, and over nodes with mpi4py (rank r of W takes units
r, r + W, ...). A worker holds one entry or one alignment in memory.
"""

import json
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from scalefold.data.raw import msa
from scalefold.data.raw.rawlayout import Plan, RawLayout, scan
from scalefold.data.raw.rejection import Rejection
from scalefold.data.store import labels, store
from scalefold.data.store.alignments import prepare_alignments
from scalefold.data.store.manifest import (
    MANIFEST_FILE,
    Manifest,
    file_entry,
    read_manifest,
    read_rejections,
    write_atomically,
)
from scalefold.data.store.structures import merge_structures, prepare_structures
from scalefold.data.store.units import Job, Team, read_json, run_units
from scalefold.errors import DataError

# Core-seconds per million bytes of text, of real files (benchmarks/results/prepare_store.csv). Reading from a slow file
# system comes on top.
_STRUCTURE_SECONDS_PER_MB = 0.070
_ALIGNMENT_SECONDS_PER_MB = 0.035


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
    inputs = labels.read_inputs(layout, plan, report if team.rank == 0 else lambda line: None)
    settings = {"reference_equality": reference_equality}
    if (out_dir / MANIFEST_FILE).is_file():
        return _confirm(out_dir, plan, inputs, settings, report, started, team)
    work = out_dir / "work"
    if team.rank == 0:
        _claim(work, plan, settings)
        _announce(plan, num_workers * team.size, report)
    team.barrier()
    job = Job(out_dir, layout, plan, inputs, reference_equality)
    done = run_units("structures", prepare_structures, job, plan.structures, num_workers, team, report)
    team.barrier()
    if team.rank == 0:
        merge_structures(job)
    team.barrier()
    done += run_units("alignments", prepare_alignments, job, plan.alignments, num_workers, team, report)
    team.barrier()
    if team.rank == 0:
        _finish(job, settings, report)
        shutil.rmtree(work)
    team.barrier()
    found = len(plan.structures) + len(plan.alignments) - done
    return _summarise(out_dir, False, done, found, started)


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
    if plan_file.is_file() and read_json(plan_file) != mine:
        raise DataError(
            f"{work.parent}: holds an unfinished store of other raw files or settings; remove it or choose another"
        )
    write_atomically(plan_file, json.dumps(mine))


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


def _finish(job: Job, settings: dict, report: Callable[[str], None]) -> None:
    """The complete index, then the last stage."""
    out_dir = job.out_dir
    files, rejected = {}, list(job.plan.found)
    for shard, unit in job.read_sidecars("structures", len(job.plan.structures)):
        files[f"structures/{shard:05d}.h5"] = unit["file"]
        rejected += [Rejection(**r) for r in unit["rejected"]]
    rejected += [Rejection(**r) for r in read_json(out_dir / "work" / "dropped.json")]
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
