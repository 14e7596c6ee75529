"""Raw files in the public layouts with the statistics of the real sets, for testing preparation at any scale.

Lengths, chains per entry, alignment depth, similarity of neighbouring rows, insertions and template hits are drawn so
that sizes and costs resemble the real files; the structures are random walks and mean nothing.
"""

import gzip
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from scalefold.data import residues
from scalefold.data.raw.rawlayout import RawLayout

_LETTERS = np.frombuffer(b"ACDEFGHIKLMNPQRSTVWY", dtype=np.uint8)
_GZIP_LEVEL = 2  # several times faster than 6 and a fifth larger
_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
_ATOM_ITEMS = ["group_PDB", "id", "label_atom_id", "label_alt_id", "label_comp_id", "label_asym_id", "label_seq_id"]
_ATOM_ITEMS += ["pdbx_PDB_ins_code", "Cartn_x", "Cartn_y", "Cartn_z", "occupancy", "B_iso_or_equiv"]
_ATOM_ITEMS += ["auth_seq_id", "auth_asym_id", "pdbx_PDB_model_num"]


@dataclass(frozen=True)
class SyntheticRaw:
    """Size and shape of the raw data. The defaults resemble the real mini set; ``median_rows`` scales the cost."""

    num_chains: int
    seed: int = 0
    chains_per_family: int = 8
    median_length: int = 170
    max_length: int = 1500
    median_rows: int = 800
    max_rows: int = 20_000
    num_hits: int = 40  # template hits per alignment
    identical_share: float = 0.4  # chains that share another chain's alignment folder


@dataclass(frozen=True)
class _Chain:
    pdb_id: str
    author: str
    family: int
    sequence: str

    @property
    def name(self) -> str:
        return f"{self.pdb_id}_{self.author}"


def write_raw(folder: Path, settings: SyntheticRaw) -> RawLayout:
    """Write entries, alignments, clusters and duplicates below ``folder``; equal settings give equal files."""
    rng = np.random.default_rng(settings.seed)
    chains = _chains(settings, rng)
    families: dict[int, list[_Chain]] = {}
    for chain in chains:
        families.setdefault(chain.family, []).append(chain)
    for pdb_id, members in _by_entry(chains):
        path = folder / "mmcif" / pdb_id[1:3] / f"{pdb_id}.cif.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(_entry_text(pdb_id, members, rng).encode(), _GZIP_LEVEL, mtime=0))
    duplicates = _write_alignments(folder / "alignments", families, settings, rng)
    (folder / "alignments" / "duplicate_pdb_chains.txt").write_text(duplicates, encoding="utf-8")
    clusters = [" ".join(f"{c.pdb_id.upper()}_{ord(c.author) - 64}" for c in f) for f in families.values()]
    (folder / "clusters.txt").write_text("\n".join(clusters) + "\n", encoding="utf-8")
    return RawLayout(folder / "mmcif", (folder / "alignments",), folder / "clusters.txt")


def _chains(settings: SyntheticRaw, rng: np.random.Generator) -> list[_Chain]:
    num_families = max(1, settings.num_chains // settings.chains_per_family)
    lengths = np.clip(settings.median_length * rng.lognormal(0, 0.6, num_families), 20, settings.max_length)
    ancestors = [rng.choice(_LETTERS, int(length)) for length in lengths]
    chains: list[_Chain] = []
    entry = 0
    while len(chains) < settings.num_chains:
        for position in range(min(int(rng.geometric(0.45)), 12, settings.num_chains - len(chains))):
            family = int(rng.integers(num_families))
            sequence = ancestors[family].copy()
            if rng.random() > settings.identical_share:
                changed = rng.random(sequence.size) < 0.1
                sequence[changed] = rng.choice(_LETTERS, int(changed.sum()))
            chains.append(_Chain(_pdb_id(entry), chr(65 + position), family, sequence.tobytes().decode()))
        entry += 1
    return chains


def _pdb_id(number: int) -> str:
    tail = "".join(_DIGITS[number // 36**power % 36] for power in (2, 1, 0))
    return f"{1 + number // 36**3}{tail}"


def _by_entry(chains: list[_Chain]) -> Iterator[tuple[str, list[_Chain]]]:
    entries: dict[str, list[_Chain]] = {}
    for chain in chains:
        entries.setdefault(chain.pdb_id, []).append(chain)
    return iter(entries.items())


# --- structures -------------------------------------------------------------------------------------------------------


def _entry_text(pdb_id: str, chains: list[_Chain], rng: np.random.Generator) -> str:
    year, resolution = rng.integers(1990, 2021), rng.uniform(1.2, 3.5)
    numbered = list(enumerate(chains, 1))
    lines = [f"data_{pdb_id.upper()}", f"_entry.id {pdb_id.upper()}", "_exptl.method 'X-RAY DIFFRACTION'"]
    lines += [f"_refine.ls_d_res_high {resolution:.2f}"]
    lines += [f"_pdbx_audit_revision_history.revision_date {year}-{rng.integers(1, 13):02d}-11"]
    lines += ["loop_", "_chem_comp.id", "_chem_comp.type"]
    lines += [f"{name} 'L-peptide linking'" for name in residues.RESNAMES[:20]]
    lines += ["loop_", "_struct_asym.id", "_struct_asym.entity_id", *(f"{c.author} {n}" for n, c in numbered)]
    lines += ["loop_", "_entity_poly_seq.entity_id", "_entity_poly_seq.num", "_entity_poly_seq.mon_id"]
    for number, chain in numbered:
        names = (residues.RESTYPE_1TO3[letter] for letter in chain.sequence)
        lines += [f"{number} {i} {name}" for i, name in enumerate(names, 1)]
    lines += ["loop_", *(f"_atom_site.{item}" for item in _ATOM_ITEMS)]
    serial = 0
    for chain in chains:
        rows = _atom_rows(chain, serial, rng)
        serial += len(rows)
        lines += rows
    return "\n".join([*lines, "#", ""])


def _atom_rows(chain: _Chain, serial: int, rng: np.random.Generator) -> list[str]:
    """All heavy atoms of each residue around a random walk of C-alpha atoms; a tenth of the residues is missing."""
    steps = rng.normal(size=(len(chain.sequence), 3))
    ca = np.cumsum(3.8 * steps / np.linalg.norm(steps, axis=1, keepdims=True), axis=0)
    resolved = rng.random(len(ca)) < 0.9
    resolved[0] = True
    rows = []
    for number in (np.flatnonzero(resolved) + 1).tolist():
        name = residues.RESTYPE_1TO3[chain.sequence[number - 1]]
        residue = f". {name} {chain.author} {number} ?"
        after = f"1.00 {20 + number % 50:.2f} {number} {chain.author} 1"
        for atom, (x, y, z) in _atoms_of(name, ca[number - 1], rng):
            serial += 1
            rows.append(f"ATOM {serial} {atom} {residue} {x:.3f} {y:.3f} {z:.3f} {after}")
    return rows


def _atoms_of(name: str, ca: np.ndarray, rng: np.random.Generator) -> Iterator[tuple[str, list[float]]]:
    atoms = [atom for atom in residues.ATOM14_NAMES[name] if atom]
    return zip(atoms, (ca + rng.normal(0, 1.5, (len(atoms), 3))).tolist(), strict=True)


# --- alignments -------------------------------------------------------------------------------------------------------


def _write_alignments(
    folder: Path, families: dict[int, list[_Chain]], settings: SyntheticRaw, rng: np.random.Generator
) -> str:
    """One folder per distinct sequence; returns the clusters of identical chains."""
    clusters = []
    for members in families.values():
        distinct: dict[str, list[_Chain]] = {}
        for chain in members:
            distinct.setdefault(chain.sequence, []).append(chain)
        for sequence, identical in distinct.items():
            clusters.append(" ".join(chain.name for chain in identical))
            rows = int(np.clip(settings.median_rows * rng.lognormal(0, 1.0), 2, settings.max_rows))
            hits = [members[i] for i in rng.integers(len(members), size=settings.num_hits)]
            target = folder / "pdb" / identical[0].name
            _write(target / "a3m" / "uniref90_hits.a3m.gz", _a3m_text(sequence, rows, rng))
            _write(target / "hhr" / "pdb70_hits.hhr.gz", _hhr_text(sequence, hits).encode())
    return "\n".join(clusters) + "\n"


def _write(path: Path, text: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text, _GZIP_LEVEL, mtime=0))


def _a3m_text(query: str, num_rows: int, rng: np.random.Generator) -> bytes:
    """A family tree of rows: every generation repeats each row with a few changes, so neighbours are similar."""
    rows = np.frombuffer(query.encode(), dtype=np.uint8)[None]
    while len(rows) < num_rows:
        rows = np.repeat(rows, 2, axis=0)
        changed = rng.random((len(rows) // 2, rows.shape[1])) < 0.08
        rows[1::2][changed] = rng.choice(_LETTERS, int(changed.sum()))
        _delete_stretches(rows[1::2], rng)
    lines = []
    inserted = rng.random(num_rows) < 0.15
    inserted[0] = False
    for number, (row, insert) in enumerate(zip(rows[:num_rows], inserted, strict=True)):
        text = row.tobytes()
        if insert:
            at = int(rng.integers(row.size))
            text = text[:at] + rng.choice(_LETTERS, int(rng.geometric(0.3))).tobytes().lower() + text[at:]
        accession = (number * 7919 + 104_729) % 10**9
        header = f">UniRef90_A0A{accession:09d}/1-{row.size} [subseq from] synthetic protein n=1 Tax={number}"
        lines += [header.encode(), text]
    return b"\n".join([*lines, b""])


def _delete_stretches(rows: np.ndarray, rng: np.random.Generator) -> None:
    """A gap of up to 30 columns in one row of twelve."""
    for row in rows[rng.random(len(rows)) < 1 / 12]:
        start = int(rng.integers(row.size))
        row[start : start + int(rng.integers(1, 31))] = ord("-")


def _hhr_text(query: str, hits: list[_Chain]) -> str:
    """One hit per chain, aligned over the whole length without gaps, in blocks of 80 columns."""
    parts = [f"Query         query\nMatch_columns {len(query)}\n\n No Hit\n\n"]
    for number, hit in enumerate(hits, 1):
        parts.append(
            f"No {number}\n>{hit.pdb_id.upper()}_{hit.author} synthetic\nProbab=99.00  E-value=1e-20  Score=100.00  "
            f"Aligned_cols={len(query)}  Identities=90%  Similarity=1.000  Sum_probs={200 - number}.0  "
            "Template_Neff=8.000\n\n"
        )
        for start in range(0, len(query), 80):
            for side, name, letters in (("Q", "query", query), ("T", hit.name, hit.sequence)):
                part = letters[start : start + 80]
                parts.append(f"{side} {name:<14} {start + 1:4d} {part} {start + len(part):4d} ({len(letters)})\n")
            parts.append("\n")
    return "".join(parts)
