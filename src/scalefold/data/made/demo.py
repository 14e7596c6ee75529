"""Generates a tiny set of proteins on disk, in the layout of the public sets, for a complete run without a download.

Chains are helix bundles, hairpins and mixtures of both whose sequence determines the fold (``demo_folds``), as real
mmCIF files with real a3m alignments. Evaluation chains have folds (topology, segment lengths and loops) that no
training chain has. The same seed gives the same bytes.
"""

import json
import math
import os
import shutil
import time
from dataclasses import asdict, dataclass
from datetime import date, timedelta
from pathlib import Path

import numpy as np

from scalefold.data.made import demo_files as files
from scalefold.data.made import demo_folds as folds
from scalefold.data.made import demo_geometry as geometry
from scalefold.data.made.demo_alignments import alignment_files, template_hits
from scalefold.data.made.demo_files import DemoEntry
from scalefold.data.made.demo_folds import Fold
from scalefold.data.raw.rawlayout import RawLayout
from scalefold.errors import DataError

TOPOLOGY_SHARE = {"HH": 0.30, "HHH": 0.34, "EEH": 0.12, "HEE": 0.08, "EEE": 0.16}
TORSION_JITTER_DEG = 0.5  # differences between members of a family and between copies of one segment
CLOSEST_CONTACT_ANGSTROM = 2.3  # between atoms of residues that are not neighbours; hydrogen bonds are about 2.6
TRAIN_DATES = (date(1998, 1, 1), date(2021, 8, 31))  # training ends with 2021-09-16
FIRST_SUBMISSION = date(2021, 9, 18)  # thirteen weekly evaluation lists, on Saturdays until 2021-12-11
NUM_SUBMISSION_WEEKS = 13
OBSOLETE_ID = "0old"


@dataclass(frozen=True)
class Summary:
    """What was generated and where it lies."""

    mmcif_dir: Path
    alignments_dir: Path
    clusters_file: Path
    obsolete_file: Path
    duplicates_file: Path
    targets_file: Path
    num_entries: int
    num_bad_entries: int
    train_chain_ids: tuple[str, ...]
    eval_chain_ids: tuple[str, ...]
    num_families: int
    length_min_median_max: tuple[int, int, int]
    num_alignment_rows: int
    num_template_hits: int
    num_files: int
    num_bytes: int
    seconds: float

    def layout(self) -> RawLayout:
        """The generated set as ``prepare`` takes it."""
        alignments = (self.alignments_dir.parent,)
        return RawLayout(self.mmcif_dir, alignments, self.clusters_file, self.obsolete_file, self.targets_file)


def generate(
    out_dir: Path,
    seed: int = 0,
    num_train: int = 200,
    num_eval: int = 16,
    *,
    members_per_family: int = 2,
    min_length: int = 24,
    max_length: int = 32,
    with_bad_inputs: bool = False,
) -> Summary:
    """Write ``num_train`` and ``num_eval`` generated entries (some with two identical chains) into a new folder.

    Training families have ``members_per_family`` entries each, evaluation families one. ``with_bad_inputs`` adds three
    entries that a preparation has to reject. The folder appears under its name only when it is complete. Raises
    DataError if it exists already or if there are not enough different folds.
    """
    started = time.perf_counter()
    out_dir = Path(out_dir)
    if out_dir.exists():
        raise DataError(f"{out_dir}: exists already; remove it or choose another folder for the generated set")
    num_families = math.ceil(num_train / members_per_family)
    train_folds, eval_folds = draw_split(num_families, num_eval, (min_length, max_length), np.random.default_rng(seed))
    entries = build_entries(train_folds, eval_folds, num_train, members_per_family, seed)
    partial = out_dir.with_name(f"{out_dir.name}.partial{os.getpid()}")
    try:
        counts = _write(partial, entries, seed, with_bad_inputs)
        partial.rename(out_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    summary = _summarise(out_dir, entries, counts, time.perf_counter() - started)
    _write_summary(out_dir / "summary.json", summary)
    return summary


# --- proteins ---------------------------------------------------------------------------------------------------------


def draw_split(
    num_train: int, num_eval: int, length_range: tuple[int, int], rng: np.random.Generator
) -> tuple[list[Fold], list[Fold]]:
    """Different folds for training and evaluation, each with every topology's share as far as its folds suffice."""
    train: list[Fold] = []
    evaluation: list[Fold] = []
    spare: list[Fold] = []
    for topology, share in TOPOLOGY_SHARE.items():
        for_train, for_eval = math.ceil(share * num_train), math.ceil(share * num_eval)
        drawn = folds.draw_folds(topology, 2 * (for_train + for_eval), *length_range, rng)
        for_eval = min(for_eval, len(drawn) // 4)
        evaluation += drawn[:for_eval]
        train += drawn[for_eval : for_eval + for_train]
        spare += drawn[for_eval + for_train :]
    train = [*rng.permutation(np.array(train, dtype=object)), *spare][: max(num_train, 0)]
    evaluation = list(rng.permutation(np.array(evaluation, dtype=object)))
    evaluation += [fold for fold in spare if fold not in train]
    if len(train) < num_train or len(evaluation) < num_eval:
        raise DataError(f"only {len(train)} + {len(evaluation)} different folds; ask for fewer chains or longer ones")
    return train, evaluation[:num_eval]


def build_entries(
    train_folds: list[Fold], eval_folds: list[Fold], num_train: int, members_per_family: int, seed: int
) -> list[DemoEntry]:
    """All entries in order of their ids: training families one after the other, then the evaluation chains."""
    entries: list[DemoEntry] = []
    used: set[str] = set()
    for k in range(num_train + len(eval_folds)):
        is_eval = k >= num_train
        family = (k - num_train) + len(train_folds) if is_eval else k // members_per_family
        fold = eval_folds[k - num_train] if is_eval else train_folds[family]
        ancestor = folds.draw_sequence(fold.letter_classes, np.random.default_rng([seed, 1, family]))
        rng = np.random.default_rng([seed, 2, k])
        sequence, positions = _build_chain(fold, ancestor, used, rng)
        used.add(sequence)
        entries.append(_dress(k, fold, sequence, positions, is_eval, rng))
    return entries


def _build_chain(fold: Fold, ancestor: str, used: set[str], rng: np.random.Generator) -> tuple[str, np.ndarray]:
    """A new sequence of the family with coordinates free of collisions."""
    classes = fold.letter_classes
    for _ in range(100):
        sequence = folds.mutate(ancestor, classes, 0.5, rng)
        torsions = fold.torsions_deg() + rng.normal(scale=TORSION_JITTER_DEG, size=(fold.length, 2))
        positions = geometry.all_atoms(sequence, torsions)
        if sequence not in used and geometry.closest_contact_angstrom(positions) >= CLOSEST_CONTACT_ANGSTROM:
            return sequence, positions
    raise DataError(f"fold {fold.label}: no sequence without collisions found; choose another seed")


def _pdb_id(k: int) -> str:
    """0aa0, 0aa1, ... 0aaf, 0ab0, ...: released entries never begin with 0, so nobody takes these for real ones."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    return f"0{letters[k // 16 // 26 % 26]}{letters[k // 16 % 26]}{k % 16:x}"


def _dress(
    k: int, fold: Fold, sequence: str, positions: np.ndarray, is_eval: bool, rng: np.random.Generator
) -> DemoEntry:
    """The particulars that make generated entries as varied as deposited ones."""
    is_nmr = k % 11 == 5
    if is_eval:
        release = FIRST_SUBMISSION + timedelta(days=7 * (k % NUM_SUBMISSION_WEEKS) + 4)
    else:
        release = TRAIN_DATES[0] + timedelta(days=int(rng.integers((TRAIN_DATES[1] - TRAIN_DATES[0]).days)))
    author = ("A", "A", "A", "B", "H", "A")[k % 6]
    return DemoEntry(
        pdb_id=_pdb_id(k),
        fold=fold,
        is_eval=is_eval,
        sequence=sequence,
        positions=_leave_out_atoms(k, sequence, positions),
        author_chain_ids=(author, "X") if k % 9 == 4 and not is_eval else (author,),
        release_date=release,
        resolution=None if is_nmr else round(float(rng.uniform(1.1, 3.4)), 2),
        first_residue_number=int(rng.integers(-3, 40)) if k % 4 == 1 else 1,
        num_models=3 if is_nmr else 1,
        selenomethionine=k % 13 == 7,
        alternative_residue=int(rng.integers(fold.length)) if k % 7 == 3 else None,
        num_waters=0 if is_nmr else int(rng.integers(4)),
    )


def _leave_out_atoms(k: int, sequence: str, positions: np.ndarray) -> np.ndarray:
    """Unresolved parts: the ends of every fifth chain, the long side chains' tips of every sixth."""
    positions = positions.copy()
    if k % 5 == 2:
        positions[: 1 + k % 2] = np.nan
        positions[-1] = np.nan
    if k % 6 == 3:
        flexible = [i for i, letter in enumerate(sequence) if letter in "KREQ"][::3]
        positions[flexible, 6:] = np.nan
    return positions


# --- files ------------------------------------------------------------------------------------------------------------


@dataclass
class _Counts:
    alignment_rows: int = 0
    template_hits: int = 0
    bad_entries: int = 0


def _write(root: Path, entries: list[DemoEntry], seed: int, with_bad_inputs: bool) -> _Counts:
    """Write everything below ``root``."""
    paths = _paths(root)
    structures = {entry.pdb_id: files.mmcif_text(entry) for entry in entries}
    bad = files.bad_mmcif_texts(entries[0]) if with_bad_inputs else {}
    for pdb_id, text in (structures | bad).items():
        files.write_gzip(paths["mmcif_dir"] / pdb_id[1:3] / f"{pdb_id}.cif.gz", text)
    counts = _Counts(bad_entries=len(bad))
    for k, entry in enumerate(entries):
        _write_alignments(paths["alignments_dir"] / entry.chain_ids[0], k, entries, seed, counts)
    _write_lists(paths, entries)
    return counts


def _write_alignments(folder: Path, k: int, entries: list[DemoEntry], seed: int, counts: _Counts) -> None:
    entry, rng = entries[k], np.random.default_rng([seed, 3, k])
    texts = alignment_files(k, entry.sequence, entry.fold.letter_classes, rng)
    num_rows = sum(text.count(">") for text in texts.values())
    hits = template_hits(k, entries, OBSOLETE_ID, rng)
    if hits:
        texts["hhr/pdb70_hits.hhr"] = files.hhr_text(entry.chain_ids[0], entry.sequence, num_rows, hits)
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    counts.alignment_rows += num_rows
    counts.template_hits += len(hits)


def _write_lists(paths: dict[str, Path], entries: list[DemoEntry]) -> None:
    clusters: dict[str, list[DemoEntry]] = {}
    for entry in entries:
        clusters.setdefault(entry.fold.label, []).append(entry)
    targets = [(entry.release_date - timedelta(days=4), entry.pdb_id, "A") for entry in entries if entry.is_eval]
    paths["clusters_file"].write_text(files.clusters_text(clusters.values()), encoding="utf-8")
    paths["obsolete_file"].write_text(
        files.obsolete_text([(date(2012, 3, 7), OBSOLETE_ID, entries[0].pdb_id)]), encoding="utf-8"
    )
    paths["duplicates_file"].write_text(files.duplicates_text(entries), encoding="utf-8")
    paths["targets_file"].write_text(files.targets_text(sorted(targets)), encoding="utf-8")


def _paths(root: Path) -> dict[str, Path]:
    return {
        "mmcif_dir": root / "pdb_mmcif" / "raw",
        "clusters_file": root / "pdb_mmcif" / "clusters-by-entity-40.txt",
        "obsolete_file": root / "pdb_mmcif" / "obsolete.dat",
        "alignments_dir": root / "open_protein_set" / "pdb",
        "duplicates_file": root / "open_protein_set" / "duplicate_pdb_chains.txt",
        "targets_file": root / "eval_targets.csv",
    }


def _summarise(root: Path, entries: list[DemoEntry], counts: _Counts, seconds: float) -> Summary:
    lengths = [entry.fold.length for entry in entries]
    written = [path for path in root.rglob("*") if path.is_file()]
    return Summary(
        **_paths(root),
        num_entries=len(entries),
        num_bad_entries=counts.bad_entries,
        train_chain_ids=tuple(c for entry in entries if not entry.is_eval for c in entry.chain_ids),
        eval_chain_ids=tuple(c for entry in entries if entry.is_eval for c in entry.chain_ids),
        num_families=len({entry.fold.label for entry in entries}),
        length_min_median_max=(min(lengths), int(np.median(lengths)), max(lengths)),
        num_alignment_rows=counts.alignment_rows,
        num_template_hits=counts.template_hits,
        num_files=len(written),
        num_bytes=sum(path.stat().st_size for path in written),
        seconds=seconds,
    )


def _write_summary(path: Path, summary: Summary) -> None:
    """The summary as JSON, without the time taken: equal seeds give equal files."""
    facts = {k: v for k, v in asdict(summary).items() if k != "seconds"}
    facts = {k: str(v.relative_to(path.parent)) if isinstance(v, Path) else v for k, v in facts.items()}
    path.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
