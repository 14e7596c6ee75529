"""Which chains train and which evaluate: filters, sampling weights and the evaluation set, over the chain table.

Rules of the benchmark's data sets; AlphaFold 2 Supplement 1.2.5 for the filters. The sampling weight uses the square
root of the cluster size, deliberately unlike the Supplement.
"""

import csv
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np

from scalefold.data.store import ChainTable
from scalefold.errors import DataError

MIN_RELEASE_DATE = "1900-01-01"
MAX_TRAIN_RELEASE_DATE = "2021-09-16"
MAX_RESOLUTION_ANGSTROM = 9.0
MAX_RESIDUE_SHARE = 0.8
MAX_EVALUATION_LENGTH = 700


@dataclass(frozen=True)
class TrainingFilters:
    """bool per chain and rule; a chain trains if all hold."""

    date: np.ndarray
    resolution: np.ndarray
    residue_share: np.ndarray
    cluster: np.ndarray

    @property
    def accepted(self) -> np.ndarray:
        """bool per chain."""
        return self.date & self.resolution & self.residue_share & self.cluster


def training_filters(
    table: ChainTable, max_release_date: str = MAX_TRAIN_RELEASE_DATE, min_release_date: str = MIN_RELEASE_DATE
) -> TrainingFilters:
    """The four training filters. There is no minimum length; an empty sequence has no residue share and fails."""
    dates, resolution = np.asarray(table.release_date), np.asarray(table.resolution)
    return TrainingFilters(
        date=(dates >= np.datetime64(min_release_date)) & (dates <= np.datetime64(max_release_date)),
        resolution=(resolution < MAX_RESOLUTION_ANGSTROM) | np.isnan(resolution),
        residue_share=np.asarray(table.max_residue_share) <= MAX_RESIDUE_SHARE,
        cluster=np.asarray(table.cluster_id) != -1,
    )


@dataclass(frozen=True)
class TrainingSet:
    """Training chains in table order with their sampling weights."""

    rows: np.ndarray  # int64, rows of the chain table
    cluster_size: np.ndarray  # int64, remaining chains of the same cluster
    weights: np.ndarray  # float64, not normalised


def training_set(
    table: ChainTable,
    max_release_date: str = MAX_TRAIN_RELEASE_DATE,
    filter_by_alignments: bool = False,
    min_release_date: str = MIN_RELEASE_DATE,
) -> TrainingSet:
    """Chains that pass the filters.

    All of them need an alignment: without ``filter_by_alignments`` a chain that has none raises DataError, with it
    such chains are left out before clusters are counted. Weight: clip(L, 256, 512) / 512 / sqrt(cluster size).
    """
    accepted = training_filters(table, max_release_date, min_release_date).accepted
    without = np.flatnonzero(accepted & ~table.has_alignment)
    if without.size and not filter_by_alignments:
        raise DataError(
            f"{without.size} of {np.count_nonzero(accepted)} training chains have no alignment, first "
            f"{table.name(int(without[0]))}; set filter_by_alignments to leave them out"
        )
    rows = np.flatnonzero(accepted & table.has_alignment)
    _, inverse, counts = np.unique(np.asarray(table.cluster_id)[rows], return_inverse=True, return_counts=True)
    cluster_size = counts[inverse]
    lengths = np.clip(np.asarray(table.length)[rows], 256, 512)
    return TrainingSet(rows, cluster_size, lengths / 512 * (1 / np.sqrt(cluster_size)))


# --- evaluation -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """One evaluation target: entry and chain, by asym id or by author chain id."""

    submission_date: str
    pdb_id: str
    chain_id: str


def read_targets(path: Path | None = None) -> list[Target]:
    """Targets from a csv with columns submission_date, pdb_id, chain_id; by default the benchmark's CAMEO list."""
    source = resources.files("scalefold.data") / "cameo_targets.csv" if path is None else path
    try:
        with source.open() as stream:
            return [
                Target(row["submission_date"], row["pdb_id"].lower(), row["chain_id"]) for row in csv.DictReader(stream)
            ]
    except FileNotFoundError:
        raise DataError(f"{source}: evaluation list is missing") from None
    except (KeyError, AttributeError) as error:
        raise DataError(f"{source}: needs columns submission_date, pdb_id, chain_id ({error})") from error


def read_evaluation_file(path: Path | None) -> list[Target] | list[str]:
    """A target table (csv with header), or chain ids, one per line. None gives the benchmark's CAMEO list."""
    if path is None:
        return read_targets()
    try:
        lines = [line.strip() for line in path.read_text().splitlines()]
    except FileNotFoundError:
        raise DataError(f"{path}: evaluation list is missing") from None
    if lines and "," in lines[0]:
        return read_targets(path)
    bad = next((line for line in lines if line and not re.fullmatch(r"\w{4}_\w+", line)), None)
    if bad:
        raise DataError(f"{path}: {bad!r} is not a chain id (<pdb id>_<author chain>)")
    return [line for line in lines if line]


def evaluation_set(
    table: ChainTable,
    targets: list[Target] | list[str],
    min_submission_date: str = "2021-09-17",
    max_submission_date: str = "2021-12-11",
    max_length: int = MAX_EVALUATION_LENGTH,
) -> np.ndarray:
    """Rows of the evaluation chains, in table order.

    A target's chain is looked up among the asym ids of all kinds (waters too) first, then among the author chain ids;
    targets outside the dates, absent or longer than ``max_length`` are dropped, repeated ones kept once. Raises
    DataError if nothing remains. Plain chain ids are taken as they are.
    """
    wanted = [
        t if isinstance(t, Target) else Target("", *t.split("_", 1))
        for t in targets
        if not isinstance(t, Target) or min_submission_date <= t.submission_date <= max_submission_date
    ]
    entries = {t.pdb_id for t in wanted}
    author, asym = {}, {}
    for row, chain_id in enumerate(np.asarray(table.chain_id).astype(str).tolist()):
        if chain_id[:4] in entries:
            author[chain_id] = row
            for asym_id in table.asym_ids(row):
                asym[f"{chain_id[:4]}_{asym_id}"] = row
    found = set()
    for target in wanted:
        name = f"{target.pdb_id}_{target.chain_id}"
        row = author.get(name) if not target.submission_date else asym.get(name, author.get(name))
        if row is not None and table.length[row] <= max_length:
            found.add(row)
    if not found:
        raise DataError(
            f"none of the {len(wanted)} evaluation targets is in the store; for data other than the benchmark's give "
            "`scalefold prepare` an --evaluation-list"
        )
    return np.array(sorted(found), dtype=np.int64)
