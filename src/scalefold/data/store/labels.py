"""The last stage of a preparation: clusters and the evaluation list, over an index that is otherwise complete.

It costs seconds where structures and alignments cost hours, so it is done again, in an unfinished store or a finished
one, when only these two files have changed.
"""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from scalefold.data.raw import official
from scalefold.data.raw.official import ChainFacts
from scalefold.data.raw.rawfile import read_bytes
from scalefold.data.raw.rawlayout import Plan, RawLayout
from scalefold.data.raw.rejection import Rejection
from scalefold.data.store import selection, store, templates
from scalefold.data.store.manifest import (
    REJECTED_FILE,
    Manifest,
    file_entry,
    write_atomically,
    write_manifest,
    write_rejections,
)
from scalefold.errors import DataError
from scalefold.textfile import decode

#: Entities of every chain in table order; what clusters are looked up by.
ENTITIES_FILE = "index/entities.json"
NO_CLUSTERS = (
    "no --clusters file: no chain gets a cluster, and training, which takes only chains that have one, will find none; "
    "give clusters-by-entity-40.txt (RCSB) to this command, now or later"
)


@dataclass(frozen=True)
class Inputs:
    """What the last stage needs, read and checked before any work is done."""

    cluster_of: dict[str, int] | None  # None: no file was given
    known: dict[str, ChainFacts] = field(default_factory=dict)  # the official set's chain table
    targets: list[selection.Target] | list[str] | None = None
    evaluation_file: Path | None = None

    @property
    def has_clusters(self) -> bool:
        """Whether chains get clusters from anywhere."""
        return self.cluster_of is not None or bool(self.known)


def read_inputs(layout: RawLayout, plan: Plan, report: Callable[[str], None]) -> Inputs:
    """Read every list that the later stages need. Raises DataError naming file and line."""
    if layout.obsolete_file:
        read_obsolete(layout.obsolete_file)
    known = official.read_chain_table(layout.mmcif_dir) if official.holds_structures(layout.mmcif_dir) else {}
    cluster_of = read_clusters(layout.clusters_file) if layout.clusters_file else None
    targets = selection.read_evaluation_file(layout.evaluation_file) if layout.evaluation_file else None
    inputs = Inputs(cluster_of, known, targets, layout.evaluation_file)
    if not inputs.has_clusters:
        report(f"WARNING: {NO_CLUSTERS}")
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


def label(
    out_dir: Path,
    manifest: Manifest,
    rejected: list[Rejection],
    inputs: Inputs,
    fingerprint: str,
    report: Callable[[str], None],
) -> None:
    """Write clusters, evaluation list, rejections and, last, the manifest; say how many chains pass which filter.

    ``manifest`` states everything else that the store holds. Raises DataError if it was made by a version that kept
    no entities.
    """
    table = store.Store(out_dir, finished=False).table
    cluster_id = _cluster_ids(table, _read_entities(out_dir), inputs)
    store.write_column(out_dir / "index", "chain", "cluster_id", cluster_id)
    table = replace(table, cluster_id=cluster_id)
    dropped = _describe_selection(table, inputs, report)
    write_rejections(out_dir, [*rejected, *dropped])
    names = {"index/chain.cluster_id.npy", REJECTED_FILE, *_replace_evaluation_file(out_dir, inputs.evaluation_file)}
    files = {name: entry for name, entry in manifest.files.items() if not name.startswith("evaluation_targets")}
    files |= {name: file_entry(out_dir / name) for name in sorted(names)}
    kinds = dict(Counter(r.kind for r in (*rejected, *dropped)))
    write_manifest(out_dir, replace(manifest, fingerprint=fingerprint, files=files, rejections=kinds))


def write_entities(out_dir: Path, entity_ids: list[list[str]]) -> None:
    """Keep what clusters are looked up by, for this preparation and for later ones."""
    write_atomically(out_dir / ENTITIES_FILE, json.dumps(entity_ids, separators=(",", ":")))


def _read_entities(out_dir: Path) -> list[list[str]]:
    try:
        return json.loads((out_dir / ENTITIES_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{out_dir / ENTITIES_FILE}: cannot be read ({error}); prepare into a new folder") from None


def _cluster_ids(table: store.ChainTable, entities: list[list[str]], inputs: Inputs) -> np.ndarray:
    """int32 per chain: from the cluster file if there is one, else from the official table, else -1."""
    cluster_of = inputs.cluster_of or {}
    found = np.full(len(entities), -1, dtype=np.int32)
    for row, entity_ids in enumerate(entities):
        facts = inputs.known.get(table.name(row))
        use_facts = facts is not None and inputs.cluster_of is None
        found[row] = facts.cluster_id if use_facts and facts else _cluster_id(table.name(row), entity_ids, cluster_of)
    return found


def _cluster_id(name: str, entity_ids: list[str], cluster_of: dict[str, int]) -> int:
    """The cluster of most of the chain's entities that have one, -1 if none has."""
    pdb_id = name[:4].upper()
    found = [cluster_of[f"{pdb_id}_{e}"] for e in entity_ids if f"{pdb_id}_{e}" in cluster_of]
    return Counter(found).most_common(1)[0][0] if found else -1


def _replace_evaluation_file(out_dir: Path, path: Path | None) -> list[str]:
    for old in out_dir.glob("evaluation_targets*"):
        old.unlink()
    if path is None:
        return []
    name = "evaluation_targets" + path.suffix
    write_atomically(out_dir / name, path.read_text(encoding="utf-8-sig"))
    return [name]


def _describe_selection(table: store.ChainTable, inputs: Inputs, report: Callable[[str], None]) -> list[Rejection]:
    """Say which chains will train and evaluate; returns a line for every evaluation target that is dropped."""
    report(selection.describe_training(table))
    if not inputs.has_clusters:
        report(f"WARNING: {NO_CLUSTERS}")
    if inputs.targets is None or inputs.evaluation_file is None:
        return []
    rows, dropped = selection.find_targets(table, inputs.targets)
    reasons = Counter(reason for _, reason in dropped)
    counts = "".join(f"; {number} {reason}" for reason, number in reasons.items())
    names = f" ({', '.join(name for name, _ in dropped[:5])}{', ...' if len(dropped) > 5 else ''})" if dropped else ""
    report(f"evaluation: {len(rows)} chains of {len(inputs.targets)} in {inputs.evaluation_file}{counts}{names}")
    file = inputs.evaluation_file.name
    return [Rejection("target", name, file, f"evaluation target left out: {reason}") for name, reason in dropped]
