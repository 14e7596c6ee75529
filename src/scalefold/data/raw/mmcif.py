"""mmCIF text to protein chains: sequences, atom37 positions and masks, release date, resolution.

gemmi's CIF tokeniser reads the file; which rows count is decided here, by the rules of the benchmark's reference data
set: polymers from SEQRES, the first model, the highest occupancy among alternative locations, and so on. They are
written down beside the code that applies them, because data set indices and every training target depend on them.

Longer than 400 lines, because every rule of what counts in an entry stands in the order in which it is applied.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gemmi import cif

from scalefold.data import residues
from scalefold.data.raw.rawfile import read_bytes
from scalefold.errors import DataError

_DATE = re.compile(r"\d{4}-\d{1,2}-\d{1,2}")
_RESOLUTION_ITEMS = ("_refine.ls_d_res_high", "_em_3d_reconstruction.resolution", "_reflns.d_resolution_high")
_SELENIUM = "SE"
MAX_COORDINATE_ANGSTROM = 1e5


@dataclass(frozen=True)
class ProteinChain:
    """One polymer chain with at least one peptide monomer."""

    author_chain_id: str
    asym_id: str
    entity_id: str
    asym_ids: tuple[str, ...]  # every asym id under this author chain id, ligands and waters too, in file order
    entity_ids: tuple[str, ...]  # entities under this author chain id, in order of the structure's asym list
    sequence: str
    positions: np.ndarray  # float32 [L, 37, 3] angstrom, 0 where absent
    mask: np.ndarray  # bool [L, 37]
    num_heterogeneous: int  # extra letters from positions that list several monomers


@dataclass(frozen=True)
class Entry:
    """One PDB entry."""

    pdb_id: str
    method: str
    release_date: str  # YYYY-MM-DD, the earliest revision
    resolution: float  # angstrom, nan if unknown
    chains: list[ProteinChain]
    left_out: list[tuple[str, str, str]]  # (asym id, author chain id, monomer types) of polymers without peptide


def read_entry(path: Path) -> Entry:
    """Parse one mmCIF file, plain or gzip. Raises DataError naming the file and the reason."""
    text = read_bytes(path).decode("utf-8", errors="replace")
    try:
        return parse_entry(text)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def parse_entry(text: str) -> Entry:
    """Parse mmCIF text. Raises DataError with the reason if the whole entry has to be left out."""
    block = _single_block(text)
    pdb_id = _values(block, "_entry.id")[0].lower()
    if len(pdb_id) != 4:
        raise DataError(f"entry id {pdb_id!r} does not have 4 characters")
    method = ";".join(_values(block, "_exptl.method"))
    release_date = _release_date(block)
    polymers, left_out = _polymers(block)
    rows = AtomRows.read(block)
    return Entry(
        pdb_id=pdb_id,
        method=method,
        release_date=release_date,
        resolution=_resolution(block),
        chains=_chains(polymers, rows, _entity_of_asym(block)),
        left_out=[(asym, rows.author_of(asym), types) for asym, types in left_out],
    )


# --- header -----------------------------------------------------------------------------------------------------------


def _single_block(text: str) -> cif.Block:
    if not text.strip():
        raise DataError("file is empty")
    try:
        document = cif.read_string(text)
        return document[0]
    except (ValueError, RuntimeError, IndexError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no data block"
        raise DataError(f"not valid mmCIF, perhaps cut off ({reason})") from error


def _unquote(values: Iterable[str]) -> list[str]:
    return [cif.as_string(v) if v[:1] in "'\";" else v for v in values]


def _values(block: cif.Block, tag: str) -> list[str]:
    values = _unquote(block.find_values(tag))
    if not values:
        raise DataError(f"item {tag} is missing")
    return values


def _columns(block: cif.Block, *tags: str) -> list[list[str]]:
    """The values of several items of one category, equally many of each."""
    columns = [_values(block, tag) for tag in tags]
    if len({len(column) for column in columns}) > 1:
        raise DataError(f"items {', '.join(tags)} have different numbers of values")
    return columns


def _release_date(block: cif.Block) -> str:
    """Earliest revision date. A date of any other form than YYYY-MM-DD rejects the entry."""
    return min(map(parse_date, _values(block, "_pdbx_audit_revision_history.revision_date")))


def parse_date(value: str) -> str:
    """A date with two-digit month and day. Raises DataError."""
    if not _DATE.fullmatch(value):
        raise DataError(f"revision date {value!r} is not of the form YYYY-MM-DD")
    try:
        year, month, day = (int(part) for part in value.split("-"))
        return str(np.datetime64(f"{year:04d}-{month:02d}-{day:02d}"))
    except ValueError:
        raise DataError(f"revision date {value!r} is not a date") from None


def _resolution(block: cif.Block) -> float:
    """Largest number under the first resolution item that the file names, nan if that holds none.

    Presence counts, not content: a file with ``_refine.ls_d_res_high .`` has no resolution even if another item does.
    """
    for tag in _RESOLUTION_ITEMS:
        values = list(block.find_values(tag))
        if values:
            return max((x for x in map(_number, _unquote(values)) if x is not None), default=float("nan"))
    return float("nan")


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _entity_of_asym(block: cif.Block) -> dict[str, str]:
    asym, entity = _columns(block, "_struct_asym.id", "_struct_asym.entity_id")
    return dict(zip(asym, entity, strict=True))


@dataclass(frozen=True)
class Polymer:
    """SEQRES of one asym id: monomers and their numbers, in file order."""

    asym_id: str
    entity_id: str
    monomers: list[str]
    numbers: list[int]


def _polymers(block: cif.Block) -> tuple[list[Polymer], list[tuple[str, str]]]:
    """Polymers with at least one peptide monomer, and (asym id, monomer types) of the others.

    Order: entities as they first appear in the sequence list, then their asym ids in the order of ``_struct_asym``.
    """
    names, kinds = _columns(block, "_chem_comp.id", "_chem_comp.type")
    types = dict(zip(names, kinds, strict=True))
    sequences: dict[str, list[tuple[int, str]]] = {}
    sequence_items = (f"_entity_poly_seq.{item}" for item in ("entity_id", "num", "mon_id"))
    for entity, number, monomer in zip(*_columns(block, *sequence_items), strict=True):
        if monomer not in types:
            raise DataError(f"monomer {monomer} of entity {entity} has no type in _chem_comp")
        sequences.setdefault(entity, []).append((_integer(number, "_entity_poly_seq.num"), monomer))
    asym_ids: dict[str, list[str]] = {}
    for asym, entity in _entity_of_asym(block).items():
        asym_ids.setdefault(entity, []).append(asym)
    kept, left_out = [], []
    for entity, sequence in sequences.items():
        monomers, numbers = [m for _, m in sequence], [n for n, _ in sequence]
        polymer_types = sorted({types[m] for m in monomers})
        for asym in asym_ids.get(entity, []):
            if any("peptide" in t for t in polymer_types):
                kept.append(Polymer(asym, entity, monomers, numbers))
            else:
                left_out.append((asym, ";".join(polymer_types)))
    if not kept:
        raise DataError("no polymer has a peptide monomer (nucleic acids only, or unknown monomer types)")
    return kept, left_out


def _integer(text: str, tag: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = None
    if number is None or not -(1 << 31) < number < 1 << 31:
        raise DataError(f"{tag} {text[:40]!r} is not a whole number of 32 bits")
    return number


# --- coordinates ------------------------------------------------------------------------------------------------------


def _codes(values: Iterable[str], count: int) -> tuple[np.ndarray, list[str]]:
    """Integer code of each value and the values by code, unquoted, in order of first appearance."""
    texts = list(values)
    table = {text: code for code, text in enumerate(dict.fromkeys(texts))}
    codes = np.fromiter(map(table.__getitem__, texts), dtype=np.int32, count=count)
    return codes, _unquote(table)


def _combine(*columns: np.ndarray) -> np.ndarray:
    """One integer per row such that two rows agree exactly if they agree in every column."""
    combined = columns[0].astype(np.int64)
    for column in columns[1:]:
        combined = combined * (int(column.max(initial=0)) + 1) + column
        if combined.max(initial=0) > 1 << 40:
            combined = np.unique(combined, return_inverse=True)[1].astype(np.int64)
    return combined


def _floats(block: cif.Block, tag: str, count: int) -> np.ndarray:
    column = block.find_values(tag)
    if len(column) != count:
        raise DataError(f"item {tag} is missing")
    try:
        numbers = np.fromiter(map(float, column), dtype=np.float64, count=count)
    except ValueError as error:
        raise DataError(f"{tag}: {error}") from None
    if not np.all(np.isfinite(numbers)):
        raise DataError(f"{tag}: {column[int(np.argmin(np.isfinite(numbers)))]} is no finite number")
    return numbers


def check_coordinates(positions: np.ndarray, what: str) -> None:
    """Raises DataError if a coordinate is not finite or beyond what float32 resolves to a hundredth of an angstrom."""
    bad = ~(np.abs(positions) <= MAX_COORDINATE_ANGSTROM)
    if bad.any():
        value = positions[np.unravel_index(int(np.argmax(bad)), positions.shape)]
        raise DataError(f"{what}: coordinate {value:g} is not within {MAX_COORDINATE_ANGSTROM:g} angstrom")


@dataclass
class AtomRows:
    """The coordinate rows as integer codes. ``*_names`` lists give the text of each code."""

    asym: np.ndarray
    asym_names: list[str]
    author: np.ndarray
    author_names: list[str]
    resname: np.ndarray
    resname_names: list[str]
    atom: np.ndarray
    atom_names: list[str]
    run: np.ndarray  # consecutive rows of one model
    residue: np.ndarray  # code of (author chain, hetero key, auth_seq_id, insertion code)
    is_hetero: np.ndarray  # bool
    label_seq: np.ndarray  # text code of label_seq_id
    label_seq_names: list[str]
    is_model_1: np.ndarray  # bool: model number is the text "1"
    blank_altloc: np.ndarray  # bool
    occupancy: np.ndarray
    positions: np.ndarray  # float64 [rows, 3]

    @classmethod
    def read(cls, block: cif.Block) -> "AtomRows":
        """Read the columns and check what rejects a whole entry. Raises DataError."""
        count = len(block.find_values("_atom_site.id")) or len(block.find_values("_atom_site.label_asym_id"))
        if count == 0:
            raise DataError("no coordinate rows (_atom_site)")

        def codes(name: str) -> tuple[np.ndarray, list[str]]:
            column = block.find_values(f"_atom_site.{name}")
            if len(column) != count:
                raise DataError(f"item _atom_site.{name} is missing")
            return _codes(column, count)

        model, model_names = codes("pdbx_PDB_model_num")
        serial = np.array([_integer(m, "_atom_site.pdbx_PDB_model_num") for m in model_names])[model]
        run = np.cumsum(np.diff(serial, prepend=serial[:1]) != 0)
        group, group_names = codes("group_PDB")
        resname, resname_names = codes("label_comp_id")
        author, author_names = codes("auth_asym_id")
        auth_seq, auth_seq_names = codes("auth_seq_id")
        number = np.array([_integer(n, "_atom_site.auth_seq_id") for n in auth_seq_names])[auth_seq]
        insertion, insertion_names = codes("pdbx_PDB_ins_code")
        blank = np.array([n in (".", "?") for n in insertion_names])
        insertion = np.where(blank[insertion], len(insertion_names), insertion)
        altloc, altloc_names = codes("label_alt_id")
        hetero = _hetero_key(np.array([n == "HETATM" for n in group_names])[group], resname, resname_names)
        asym, asym_names = codes("label_asym_id")
        atom, atom_names = codes("label_atom_id")
        label_seq, label_seq_names = codes("label_seq_id")
        _floats(block, "_atom_site.B_iso_or_equiv", count)
        rows = cls(
            asym=asym,
            asym_names=asym_names,
            author=author,
            author_names=author_names,
            resname=resname,
            resname_names=resname_names,
            atom=atom,
            atom_names=atom_names,
            run=run,
            residue=_combine(author, hetero, number - number.min(), insertion),
            is_hetero=hetero > 0,
            label_seq=label_seq,
            label_seq_names=label_seq_names,
            is_model_1=np.array([m == "1" for m in model_names])[model],
            blank_altloc=np.array([a in (".", "?") for a in altloc_names])[altloc],
            occupancy=_floats(block, "_atom_site.occupancy", count),
            positions=np.stack([_floats(block, f"_atom_site.Cartn_{axis}", count) for axis in "xyz"], axis=1),
        )
        check_coordinates(rows.positions, "_atom_site.Cartn")
        rows._check_duplicates()
        return rows

    def _check_duplicates(self) -> None:
        """What the reference's structure builder refuses, in any model and any chain.

        An atom may come twice in a residue only with a location letter the second time; a residue may have several
        monomers only if all its atoms have location letters and each monomer's rows lie together; a hetero residue's
        rows lie together.
        """
        atom_key = _combine(self.run, self.residue, self.resname, self.atom)
        self._refuse(np.flatnonzero(self._repeated(atom_key) & self.blank_altloc))
        key = _combine(self.run, self.residue)
        start = np.ones(len(key), dtype=bool)
        start[1:] = (key[1:] != key[:-1]) | (self.resname[1:] != self.resname[:-1])
        starts = np.flatnonzero(start)
        again = starts[self._repeated(key[starts])]
        self._refuse(again[self.is_hetero[again]])
        for residue in np.unique(key[again]):
            rows = np.flatnonzero(key == residue)
            names = self.resname[starts[key[starts] == residue]].tolist()
            switches = next((i for i, name in enumerate(names) if name != names[0]), len(names))
            several = switches < len(names)
            if several and (self.blank_altloc[rows].any() or len(set(names)) < len(names) - switches + 1):
                self._refuse(rows[:1])

    @staticmethod
    def _repeated(key: np.ndarray) -> np.ndarray:
        """bool: an equal key came before."""
        order = np.argsort(key, kind="stable")
        repeated = np.zeros(len(key), dtype=bool)
        repeated[order[1:]] = key[order[1:]] == key[order[:-1]]
        return repeated

    def _refuse(self, rows: np.ndarray) -> None:
        if rows.size:
            row = rows[0]
            raise DataError(
                f"atom {self.atom_names[self.atom[row]]} of residue {self.resname_names[self.resname[row]]} in chain "
                f"{self.author_names[self.author[row]]} is given twice without location letters, or its residue is"
            )

    def author_of(self, asym_id: str) -> str:
        """Author chain id of an asym id in model 1, empty if it has no coordinate row there."""
        if asym_id not in self.asym_names:
            return ""
        rows = np.flatnonzero(self.is_model_1 & (self.asym == self.asym_names.index(asym_id)))
        return self.author_names[self.author[rows[0]]] if rows.size else ""

    def author_by_asym(self) -> dict[str, str]:
        """Author chain id of every asym id in model 1, in order of first row. Two for one asym id is an error."""
        selected = np.flatnonzero(self.is_model_1)
        pairs = _combine(self.asym[selected], self.author[selected])
        _, first = np.unique(pairs, return_index=True)
        authors: dict[str, str] = {}
        for row in selected[np.sort(first)]:
            asym, author = self.asym_names[self.asym[row]], self.author_names[self.author[row]]
            if authors.setdefault(asym, author) != author:
                raise DataError(f"asym id {asym} has two author chain ids, {authors[asym]} and {author}")
        return authors


def _hetero_key(is_hetatm: np.ndarray, resname: np.ndarray, names: list[str]) -> np.ndarray:
    """0 for polymer rows, 1 for water, 2 + monomer code for other hetero rows: the first part of a residue's key."""
    water = np.array([n in ("HOH", "WAT") for n in names])[resname]
    return np.where(is_hetatm, np.where(water, 1, 2 + resname), 0)


# --- chains -----------------------------------------------------------------------------------------------------------


def _chains(polymers: list[Polymer], rows: AtomRows, entity_of_asym: dict[str, str]) -> list[ProteinChain]:
    author_of = rows.author_by_asym()
    chains: dict[str, ProteinChain] = {}
    for polymer in polymers:
        if polymer.asym_id not in author_of:
            raise DataError(f"polymer {polymer.asym_id} has no coordinate row in model 1")
        author = author_of[polymer.asym_id]
        if author in chains:
            raise DataError(f"polymers {chains[author].asym_id} and {polymer.asym_id} share author chain id {author}")
        letters = [residues.MONOMER_LETTERS.get(m, "X") for m in polymer.monomers]
        positions, mask = _atom37(polymer, author, rows)
        asym_ids = tuple(asym for asym, name in author_of.items() if name == author)
        chains[author] = ProteinChain(
            author_chain_id=author,
            asym_id=polymer.asym_id,
            entity_id=polymer.entity_id,
            asym_ids=asym_ids,
            entity_ids=tuple(entity_of_asym[a] for a in asym_ids if a in entity_of_asym),
            sequence="".join(letter if len(letter) == 1 else "X" for letter in letters),
            positions=positions,
            mask=mask,
            num_heterogeneous=len(polymer.numbers) - len(set(polymer.numbers)),
        )
    return list(chains.values())


def _atom37(polymer: Polymer, author: str, rows: AtomRows) -> tuple[np.ndarray, np.ndarray]:
    """float32 [L, 37, 3] and bool [L, 37] of one polymer."""
    length = len(polymer.monomers)
    positions, mask = np.zeros((length, 37, 3), dtype=np.float32), np.zeros((length, 37), dtype=bool)
    residue_at = _residue_by_position(polymer, rows)
    wanted, which = np.unique(np.array(list(residue_at.values())), return_inverse=True)
    selected = _rows_of_last_monomer(author, wanted, rows)
    slot = _atom37_slot(rows, selected)
    selected, slot = selected[slot >= 0], slot[slot >= 0]
    place = np.searchsorted(wanted, rows.residue[selected]) * 37 + slot
    best = _highest_occupancy(place, selected, rows)
    atoms, present = np.zeros((len(wanted) * 37, 3), dtype=np.float32), np.zeros(len(wanted) * 37, dtype=bool)
    atoms[place[best]] = rows.positions[selected[best]]
    present[place[best]] = True
    at = np.array(list(residue_at), dtype=np.int64)
    positions[at], mask[at] = atoms.reshape(-1, 37, 3)[which], present.reshape(-1, 37)[which]
    return positions, mask


def _residue_by_position(polymer: Polymer, rows: AtomRows) -> dict[int, int]:
    """Residue key of each sequence position that has coordinate rows in model 1; the last row wins.

    A position is label_seq_id minus the smallest number of the sequence list.
    """
    asym = rows.asym_names.index(polymer.asym_id)
    selected = np.flatnonzero(rows.is_model_1 & (rows.asym == asym))
    codes = rows.label_seq[selected]
    first = min(polymer.numbers)
    position_of = {c: _integer(rows.label_seq_names[c], "_atom_site.label_seq_id") - first for c in set(codes.tolist())}
    beyond = max(position_of.values())
    if beyond >= len(polymer.monomers) or min(position_of.values()) < 0:
        raise DataError(f"polymer {polymer.asym_id} has coordinates outside its sequence (label_seq_id)")
    return {position_of[c]: r for c, r in zip(codes.tolist(), rows.residue[selected].tolist(), strict=True)}


def _rows_of_last_monomer(author: str, wanted: np.ndarray, rows: AtomRows) -> np.ndarray:
    """Rows of the first model under the ``wanted`` residue keys, of the monomer that was read last under each key."""
    in_chain = np.flatnonzero((rows.run == 0) & (rows.author == rows.author_names.index(author)))
    selected = in_chain[np.isin(rows.residue[in_chain], wanted)]
    keys = rows.residue[selected]
    if len(np.unique(keys)) != len(wanted):
        raise DataError(f"residues of chain {author} in model 1 are not in the first model of the file")
    last_name = dict(zip(keys.tolist(), rows.resname[selected].tolist(), strict=True))
    return selected[np.array([last_name[k] for k in keys.tolist()]) == rows.resname[selected]]


def _atom37_slot(rows: AtomRows, selected: np.ndarray) -> np.ndarray:
    """atom37 slot of each row, -1 for hydrogens and other names. Selenium of MSE counts as its sulphur."""
    slot = np.array([residues.ATOM37_INDEX.get(name, -1) for name in rows.atom_names], dtype=np.int64)[
        rows.atom[selected]
    ]
    if "MSE" in rows.resname_names and _SELENIUM in rows.atom_names:
        is_selenium = rows.atom[selected] == rows.atom_names.index(_SELENIUM)
        slot[is_selenium & (rows.resname[selected] == rows.resname_names.index("MSE"))] = residues.ATOM37_INDEX["SD"]
    return slot


def _highest_occupancy(place: np.ndarray, selected: np.ndarray, rows: AtomRows) -> np.ndarray:
    """Index of one row per occupied place: highest occupancy, lettered before blank, then first in the file."""
    order = np.lexsort((np.arange(len(place)), rows.blank_altloc[selected], -rows.occupancy[selected], place))
    first = np.ones(len(order), dtype=bool)
    first[1:] = place[order[1:]] != place[order[:-1]]
    return order[first]
