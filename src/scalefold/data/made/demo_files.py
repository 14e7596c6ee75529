"""Writes generated proteins in the file formats of the public sets: mmCIF, a3m, hhr and the lists beside them."""

import gzip
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import numpy as np

from scalefold.data import residues
from scalefold.data.made.demo_folds import Fold

_CHAIN_ENTITY, _WATER_ENTITY = 1, 2
_ATOM_SITE_ITEMS = (
    *("group_PDB", "id", "type_symbol", "label_atom_id", "label_alt_id", "label_comp_id", "label_asym_id"),
    *("label_entity_id", "label_seq_id", "pdbx_PDB_ins_code", "Cartn_x", "Cartn_y", "Cartn_z", "occupancy"),
    *("B_iso_or_equiv", "auth_seq_id", "auth_comp_id", "auth_asym_id", "auth_atom_id", "pdbx_PDB_model_num"),
)


@dataclass(frozen=True)
class DemoEntry:
    """One generated PDB entry: copies of one protein chain, with waters."""

    pdb_id: str  # lower case, 4 characters
    fold: Fold
    is_eval: bool
    sequence: str
    positions: np.ndarray  # float64 [L, 14, 3] angstrom in atom14 order, NaN where absent
    author_chain_ids: tuple[str, ...]  # one per copy; asym ids are A, B, ...
    release_date: date
    resolution: float | None  # None: solution NMR
    first_residue_number: int = 1  # author numbering
    num_models: int = 1
    selenomethionine: bool = False
    alternative_residue: int | None = None  # index of a residue whose side chain has two locations
    num_waters: int = 0

    @property
    def title(self) -> str:
        """Free text that names the fold."""
        return f"generated protein {self.fold.label}"

    @property
    def chain_ids(self) -> tuple[str, ...]:
        """``<pdb id>_<author chain id>`` of each copy."""
        return tuple(f"{self.pdb_id}_{author}" for author in self.author_chain_ids)


# --- mmCIF ------------------------------------------------------------------------------------------------------------


def mmcif_text(entry: DemoEntry) -> str:
    """The entry as mmCIF with the categories that a structure parser needs."""
    parts = [f"data_{entry.pdb_id.upper()}\n#\n", _header(entry)]
    monomers = [_monomer(entry, i) for i in range(len(entry.sequence))]
    parts.append(_loop("_entity_poly_seq", ("entity_id", "num", "mon_id", "hetero"), _sequence_rows(monomers)))
    parts.append(_loop("_chem_comp", ("id", "type", "name"), _component_rows(entry, monomers)))
    parts.append(_loop("_struct_asym", ("id", "entity_id"), _asym_rows(entry)))
    parts.append(_loop("_atom_site", _ATOM_SITE_ITEMS, _atom_rows(entry, monomers)))
    return "".join(parts)


def _loop(category: str, items: Iterable[str], rows: Iterable[tuple]) -> str:
    names = "".join(f"{category}.{item}\n" for item in items)
    return f"loop_\n{names}" + "".join(" ".join(str(v) for v in row) + "\n" for row in rows) + "#\n"


def _header(entry: DemoEntry) -> str:
    later = entry.release_date.replace(year=entry.release_date.year + 1, day=1)
    method = "X-RAY DIFFRACTION" if entry.resolution is not None else "SOLUTION NMR"
    lines = [
        f"_entry.id {entry.pdb_id.upper()}\n#\n",
        f"_struct.title '{entry.title}'\n#\n",
        _loop(
            "_pdbx_audit_revision_history",
            ("ordinal", "data_content_type", "major_revision", "revision_date"),
            [(1, "'Structure model'", 1, entry.release_date), (2, "'Structure model'", 1, later)],
        ),
        f"_exptl.entry_id {entry.pdb_id.upper()}\n_exptl.method '{method}'\n#\n",
    ]
    if entry.resolution is not None:
        row = (entry.pdb_id.upper(), f"'{method}'", f"{entry.resolution:.2f}")
        lines.append(_loop("_refine", ("entry_id", "pdbx_refine_id", "ls_d_res_high"), [row]))
    entities = [(_CHAIN_ENTITY, "polymer", f"'{entry.title}'")]
    if entry.num_waters:
        entities.append((_WATER_ENTITY, "water", "water"))
    lines.append(_loop("_entity", ("id", "type", "pdbx_description"), entities))
    lines.append(f"_entity_poly.entity_id {_CHAIN_ENTITY}\n_entity_poly.type 'polypeptide(L)'\n#\n")
    return "".join(lines)


def _monomer(entry: DemoEntry, index: int) -> str:
    name = residues.RESTYPE_1TO3[entry.sequence[index]]
    return "MSE" if name == "MET" and entry.selenomethionine else name


def _sequence_rows(monomers: list[str]) -> Iterator[tuple]:
    for number, monomer in enumerate(monomers, 1):
        yield _CHAIN_ENTITY, number, monomer, "n"


def _component_rows(entry: DemoEntry, monomers: list[str]) -> Iterator[tuple]:
    for monomer in sorted(set(monomers)):
        yield monomer, "'peptide linking'" if monomer == "GLY" else "'L-peptide linking'", monomer
    if entry.num_waters:
        yield "HOH", "non-polymer", "WATER"


def _asym_rows(entry: DemoEntry) -> Iterator[tuple]:
    for copy in range(len(entry.author_chain_ids)):
        yield _asym_id(copy), _CHAIN_ENTITY
    if entry.num_waters:
        yield _asym_id(len(entry.author_chain_ids)), _WATER_ENTITY


def _asym_id(index: int) -> str:
    return "ABCDEFGH"[index]


def _place_copy(positions: np.ndarray, copy: int) -> np.ndarray:
    """The copy's coordinates: turned by 180 degrees and moved until the copies are well apart."""
    if copy == 0:
        return positions
    centre = np.nanmean(positions, axis=(0, 1))
    width = np.nanmax(np.abs(positions - centre)) * 2 + 5.0
    return (positions - centre) * np.array([-1.0, -1.0, 1.0]) + centre + np.array([width * copy, 0.0, 0.0])


def _atom_rows(entry: DemoEntry, monomers: list[str]) -> Iterator[tuple]:
    serial = 0
    for model in range(1, entry.num_models + 1):
        shake = 0.05 * (model - 1)  # later NMR models differ a little from the first
        for copy, author in enumerate(entry.author_chain_ids):
            placed = _place_copy(entry.positions, copy) + shake
            for i, monomer in enumerate(monomers):
                for atom in _residue_rows(entry, placed[i], i, monomer):
                    serial += 1
                    yield _atom_row(serial, atom, _asym_id(copy), author, entry.first_residue_number + i, model)
        for water in range(entry.num_waters):
            serial += 1
            position = np.nanmax(entry.positions, axis=(0, 1)) + 4.0 + 3.0 * water
            atom = _Atom("O", "O", "HOH", None, ".", 1.0, position)
            number = 201 + water
            asym = _asym_id(len(entry.author_chain_ids))
            yield _atom_row(serial, atom, asym, entry.author_chain_ids[0], number, model)


@dataclass(frozen=True)
class _Atom:
    name: str
    element: str
    monomer: str
    sequence_number: int | None
    altloc: str
    occupancy: float
    position: np.ndarray


def _residue_rows(entry: DemoEntry, atoms: np.ndarray, index: int, monomer: str) -> Iterator[_Atom]:
    names = residues.ATOM14_NAMES[residues.RESTYPE_1TO3[entry.sequence[index]]]
    for slot, name in enumerate(names):
        if not name or np.isnan(atoms[slot, 0]):
            continue
        name, element = ("SE", "SE") if monomer == "MSE" and name == "SD" else (name, name[0])
        if index == entry.alternative_residue and slot > 4:
            yield _Atom(name, element, monomer, index + 1, "A", 0.65, atoms[slot])
            yield _Atom(name, element, monomer, index + 1, "B", 0.35, atoms[slot] + 0.4)
        else:
            yield _Atom(name, element, monomer, index + 1, ".", 1.0, atoms[slot])


def _atom_row(serial: int, atom: _Atom, asym: str, author: str, number: int, model: int) -> tuple:
    group = "HETATM" if atom.monomer in ("MSE", "HOH") else "ATOM"
    entity = _WATER_ENTITY if atom.monomer == "HOH" else _CHAIN_ENTITY
    sequence_number = "." if atom.sequence_number is None else atom.sequence_number
    x, y, z = (f"{value:.3f}" for value in atom.position)
    label = (group, serial, atom.element, atom.name, atom.altloc, atom.monomer, asym, entity, sequence_number, "?")
    return (*label, x, y, z, f"{atom.occupancy:.2f}", "20.00", number, atom.monomer, author, atom.name, model)


def write_gzip(path: Path, text: str) -> None:
    """Write ``text`` compressed, the same bytes every time (no time stamp)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode(), compresslevel=6, mtime=0))


def bad_mmcif_texts(entry: DemoEntry) -> dict[str, str]:
    """Malformed or unusable entries by id: cut off within the coordinates, nucleic acid only, not one CA atom."""
    whole = mmcif_text(replace(entry, pdb_id="0zz1"))
    without_ca = replace(entry, pdb_id="0zz3", positions=entry.positions.copy(), num_waters=0)
    without_ca.positions[:, residues.ATOM14_NAMES["ALA"].index("CA")] = np.nan
    rna = mmcif_text(replace(entry, pdb_id="0zz2", sequence="A" * 4, positions=entry.positions[:4], num_waters=0))
    rna = rna.replace("'L-peptide linking'", "'RNA linking'").replace("polypeptide(L)", "polyribonucleotide")
    line_end = whole.index("\n", int(len(whole) * 0.7))
    return {"0zz1": whole[: line_end - 20], "0zz2": rna.replace("ALA", "A"), "0zz3": mmcif_text(without_ca)}


# --- alignments -------------------------------------------------------------------------------------------------------


def a3m_text(rows: Iterable[tuple[str, str]]) -> str:
    """a3m of (name, aligned row) pairs."""
    return "".join(f">{name}\n{row}\n" for name, row in rows)


@dataclass(frozen=True)
class DemoHit:
    """A template hit: equally long aligned rows (``-`` for gaps) from residue ``query_start`` and ``hit_start`` on."""

    name: str  # <PDB id>_<author chain>, id in upper case
    description: str
    query_row: str
    query_start: int  # 0-based
    hit_row: str
    hit_start: int
    hit_length: int  # residues of the whole template chain

    @property
    def aligned_columns(self) -> int:
        """Columns in which both rows hold a residue."""
        return sum(q != "-" and t != "-" for q, t in zip(self.query_row, self.hit_row, strict=True))

    @property
    def identity_percent(self) -> float:
        """Share of equal letters among the aligned columns."""
        same = sum(q == t != "-" for q, t in zip(self.query_row, self.hit_row, strict=True))
        return 100.0 * same / self.aligned_columns

    @property
    def sum_probs(self) -> float:
        """Summed match probability, taken as 0.9 per column and less the fewer letters agree."""
        return self.aligned_columns * (0.6 + 0.3 * self.identity_percent / 100)


def hhr_text(query_id: str, query: str, num_rows: int, hits: list[DemoHit]) -> str:
    """HHsearch result with a summary table and one alignment block of at most 80 columns after the other per hit."""
    header = f"Query         {query_id}\nMatch_columns {len(query)}\nNo_of_seqs    {num_rows} out of {num_rows}\n\n"
    table = [" No Hit                             Prob E-value P-value  Score    SS Cols Query HMM  Template HMM\n"]
    blocks = []
    for number, hit in enumerate(hits, 1):
        query_end, hit_end = _end(hit.query_start, hit.query_row), _end(hit.hit_start, hit.hit_row)
        title = f"{hit.name} {hit.description}"
        ranges = f"{hit.query_start + 1:4d}-{query_end:<4d} {hit.hit_start + 1:4d}-{hit_end:<4d}({hit.hit_length})"
        scores = f"99.0 1.0E-10 1.0E-14  {2 * hit.sum_probs:5.1f}   0.0 {hit.aligned_columns:4d}"
        table.append(f"{number:3d} {title:30.30s} {scores} {ranges}\n")
        blocks.append(_hit_block(number, query_id, len(query), hit))
    return header + "".join(table) + "\n" + "".join(blocks)


def _end(start: int, row: str) -> int:
    return start + len(row) - row.count("-")


def _hit_block(number: int, query_id: str, query_length: int, hit: DemoHit) -> str:
    lines = [
        f"No {number}\n>{hit.name} {hit.description}\n",
        f"Probab=99.00  E-value=1e-10  Score={2 * hit.sum_probs:.2f}  Aligned_cols={hit.aligned_columns}  "
        f"Identities={hit.identity_percent:.0f}%  Similarity=1.000  Sum_probs={hit.sum_probs:.1f}  "
        f"Template_Neff=5.000\n\n",
    ]
    query_at, hit_at = hit.query_start, hit.hit_start
    for first in range(0, len(hit.query_row), 80):
        query_row, hit_row = hit.query_row[first : first + 80], hit.hit_row[first : first + 80]
        for side, name, row, start, length in (
            ("Q", query_id, query_row, query_at, query_length),
            ("T", hit.name, hit_row, hit_at, hit.hit_length),
        ):
            lines.append(f"{side} {name:14.14s} {start + 1:4d} {row} {_end(start, row):4d} ({length})\n")
        lines.append("\n")
        query_at, hit_at = _end(query_at, query_row), _end(hit_at, hit_row)
    return "".join([*lines, "\n"])


# --- lists ------------------------------------------------------------------------------------------------------------


def clusters_text(clusters: Iterable[Iterable[DemoEntry]]) -> str:
    """One line per cluster: ``PDBID_entity`` of its members."""
    lines = (" ".join(f"{e.pdb_id.upper()}_{_CHAIN_ENTITY}" for e in cluster) for cluster in clusters)
    return "".join(line + "\n" for line in lines)


def duplicates_text(entries: Iterable[DemoEntry]) -> str:
    """One line per distinct chain: the chain that owns the alignment folder, then its identical copies."""
    return "".join(" ".join(entry.chain_ids) + "\n" for entry in entries)


def obsolete_text(replaced: Iterable[tuple[date, str, str]]) -> str:
    """Obsolete list of (date, old id, new id)."""
    lines = (f"OBSLTE    {day:%d-%b-%y} {old.upper()}     {new.upper()}\n".upper() for day, old, new in replaced)
    return " LIST OF OBSOLETE COORDINATE ENTRIES AND SUCCESSORS\n" + "".join(lines)


def targets_text(targets: Iterable[tuple[date, str, str]]) -> str:
    """Evaluation list of (submission date, PDB id, chain id)."""
    return "submission_date,pdb_id,chain_id\n" + "".join(f"{day},{pdb},{chain}\n" for day, pdb, chain in targets)
