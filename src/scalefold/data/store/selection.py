"""Which chains train and which evaluate: filters, sampling weights and the evaluation set, over the chain table.

Rules of the benchmark's data sets; AlphaFold 2 Supplement 1.2.5 for the filters. The sampling weight uses the square
root of the cluster size, deliberately unlike the Supplement.
"""

import csv
import io
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np

from scalefold.data.store.store import ChainTable
from scalefold.errors import DataError
from scalefold.textfile import decode, read_text

MIN_RELEASE_DATE = "1900-01-01"
MAX_TRAIN_RELEASE_DATE = "2021-09-16"
MAX_RESOLUTION_ANGSTROM = 9.0
MAX_RESIDUE_SHARE = 0.8
MAX_EVALUATION_LENGTH = 700
_CHAIN_NAME = re.compile(r"[A-Za-z0-9]{4}_\w+", re.ASCII)


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
    if not rows.size:
        raise DataError(f"{describe_training(table, max_release_date, min_release_date)}; without clusters none does")
    _, inverse, counts = np.unique(np.asarray(table.cluster_id)[rows], return_inverse=True, return_counts=True)
    cluster_size = counts[inverse]
    lengths = np.clip(np.asarray(table.length)[rows], 256, 512)
    return TrainingSet(rows, cluster_size, lengths / 512 * (1 / np.sqrt(cluster_size)))


def describe_training(
    table: ChainTable, max_release_date: str = MAX_TRAIN_RELEASE_DATE, min_release_date: str = MIN_RELEASE_DATE
) -> str:
    """How many chains pass the training filters, and how many each filter refuses."""
    filters = training_filters(table, max_release_date, min_release_date)
    refused = ", ".join(f"{np.count_nonzero(~passed)} by {name}" for name, passed in vars(filters).items())
    without = np.count_nonzero(filters.accepted & ~table.has_alignment)
    return (
        f"training: {np.count_nonzero(filters.accepted)} of {len(filters.accepted)} chains pass the filters (refused: "
        f"{refused}); {without} of those that pass have no alignment"
    )


# --- evaluation -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """One evaluation target: entry and chain, by asym id or by author chain id."""

    submission_date: str
    pdb_id: str
    chain_id: str


def read_targets(path: Path | None = None) -> list[Target]:
    """Targets from a csv with columns submission_date, pdb_id, chain_id; by default the benchmark's CAMEO list."""
    source = resources.files("scalefold.data.store") / "cameo_targets.csv" if path is None else path
    return _parse_targets(decode(source.read_bytes(), source, DataError), source)


def _parse_targets(text: str, source: object) -> list[Target]:
    rows = csv.DictReader(io.StringIO(text))
    try:
        missing = {"submission_date", "pdb_id", "chain_id"} - set(rows.fieldnames or ())
        if missing:
            raise DataError(f"{source}: needs columns submission_date, pdb_id, chain_id; {', '.join(missing)} missing")
        return [_target(row, f"{source}:{rows.line_num}") for row in rows]
    except csv.Error as error:
        raise DataError(f"{source}:{rows.line_num}: cannot be read: {error}") from None


def _target(row: dict[str, str | None], place: str) -> Target:
    date, pdb_id, chain_id = ((row[name] or "").strip() for name in ("submission_date", "pdb_id", "chain_id"))
    if not re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", date):
        raise DataError(f"{place}: submission_date {date[:20]!r} is not of the form YYYY-MM-DD")
    if not _CHAIN_NAME.fullmatch(f"{pdb_id}_{chain_id}"):
        raise DataError(f"{place}: {pdb_id[:20]!r} and {chain_id[:20]!r} are no PDB id (four characters) and chain id")
    return Target(date, pdb_id.lower(), chain_id)


def read_evaluation_file(path: Path | None) -> list[Target] | list[str]:
    """A target table (csv with header), or chain ids, one per line. None gives the benchmark's CAMEO list.

    PDB ids may be written in upper or lower case, chain ids are taken as they are.
    """
    if path is None:
        return read_targets()
    text = read_text(path, DataError)
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise DataError(f"{path}: evaluation list is empty; give chain ids (<pdb id>_<author chain>), one per line")
    if "," in lines[0][1]:
        return _parse_targets(text, path)
    for number, line in lines:
        if not _CHAIN_NAME.fullmatch(line):
            raise DataError(f"{path}:{number}: {line[:40]!r} is not a chain id (<pdb id>_<author chain>)")
    return [line[:4].lower() + line[4:] for _, line in lines]


def find_targets(
    table: ChainTable,
    targets: list[Target] | list[str],
    min_submission_date: str = "2021-09-17",
    max_submission_date: str = "2021-12-11",
    max_length: int = MAX_EVALUATION_LENGTH,
) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """Rows of the evaluation chains in table order, and the name of every target that is dropped with its reason.

    A target's chain is looked up among the asym ids of all kinds (waters too) first, then among the author chain ids.
    Plain chain ids have no date and are author chain ids.
    """
    wanted = [t if isinstance(t, Target) else Target("", t[:4].lower(), t[5:]) for t in targets]
    entries = {t.pdb_id for t in wanted}
    author, asym = {}, {}
    for row, chain_id in enumerate(np.asarray(table.chain_id).astype(str).tolist()):
        if chain_id[:4] in entries:
            author[chain_id] = row
            for asym_id in table.asym_ids(row):
                asym[f"{chain_id[:4]}_{asym_id}"] = row
    found: set[int] = set()
    dropped = []
    for target in wanted:
        name = f"{target.pdb_id}_{target.chain_id}"
        row = author.get(name) if not target.submission_date else asym.get(name, author.get(name))
        if target.submission_date and not min_submission_date <= target.submission_date <= max_submission_date:
            dropped.append((name, f"submitted outside {min_submission_date} to {max_submission_date}"))
        elif row is None:
            dropped.append((name, "not in the store"))
        elif table.length[row] > max_length:
            dropped.append((name, f"longer than {max_length} residues"))
        elif row in found:
            dropped.append((name, "given twice"))
        else:
            found.add(row)
    return np.array(sorted(found), dtype=np.int64), dropped


def evaluation_set(
    table: ChainTable,
    targets: list[Target] | list[str],
    min_submission_date: str = "2021-09-17",
    max_submission_date: str = "2021-12-11",
    max_length: int = MAX_EVALUATION_LENGTH,
) -> np.ndarray:
    """Rows of the evaluation chains, in table order; see :func:`find_targets`. Raises DataError if nothing remains."""
    rows, dropped = find_targets(table, targets, min_submission_date, max_submission_date, max_length)
    if not rows.size:
        first = f" (first: {dropped[0][0]}, {dropped[0][1]})" if dropped else ""
        raise DataError(
            f"none of the {len(targets)} evaluation targets is in the store{first}; for data other than the "
            "benchmark's give `scalefold prepare` an --evaluation-list"
        )
    return rows
