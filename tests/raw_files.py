"""Small raw files written on purpose: mmCIF entries, alignments and hhr files with exactly the property under test."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

_BACKBONE = (("N", 0.0), ("CA", 1.458), ("C", 2.409), ("O", 3.0))


@dataclass(frozen=True)
class Atom:
    """One coordinate row."""

    name: str
    monomer: str
    asym: str
    seq: int | str
    x: str = "1.000"
    y: str = "2.000"
    z: str = "3.000"
    author: str = "A"
    auth_seq: str = ""
    altloc: str = "."
    occupancy: str = "1.00"
    insertion: str = "?"
    model: str = "1"
    group: str = "ATOM"
    b_factor: str = "20.00"


@dataclass(frozen=True)
class Entity:
    """One polymer: monomers with numbers, and the asym ids that are made of it."""

    monomers: Sequence[tuple[int, str]]
    asyms: Sequence[str] = ("A",)
    linking: str = "L-peptide linking"


@dataclass(frozen=True)
class CifEntry:
    """An entry whose text is :meth:`text`; ``drop`` names items that are left out."""

    entities: Sequence[Entity]
    atoms: Sequence[Atom]
    pdb_id: str = "1TST"
    dates: Sequence[str] = ("2001-02-03",)
    extra: str = "_refine.ls_d_res_high 2.50\n"
    types: dict[str, str] = field(default_factory=dict)

    def text(self) -> str:
        lines = [f"data_{self.pdb_id}", f"_entry.id {self.pdb_id}", "_exptl.method 'X-RAY DIFFRACTION'", self.extra]
        lines += ["loop_", "_pdbx_audit_revision_history.ordinal", "_pdbx_audit_revision_history.revision_date"]
        lines += [f"{i} {date}" for i, date in enumerate(self.dates, 1)]
        kinds = {m: e.linking for e in self.entities for _, m in e.monomers} | {"HOH": "non-polymer"} | self.types
        lines += ["loop_", "_chem_comp.id", "_chem_comp.type", *(f"{m} '{kind}'" for m, kind in kinds.items())]
        lines += ["loop_", "_struct_asym.id", "_struct_asym.entity_id"]
        lines += [f"{asym} {i}" for i, e in enumerate(self.entities, 1) for asym in e.asyms]
        lines += ["loop_", *(f"_entity_poly_seq.{item}" for item in ("entity_id", "num", "mon_id"))]
        lines += [f"{i} {number} {m}" for i, e in enumerate(self.entities, 1) for number, m in e.monomers]
        items = "group_PDB id label_atom_id label_alt_id label_comp_id label_asym_id label_seq_id pdbx_PDB_ins_code"
        items += " Cartn_x Cartn_y Cartn_z occupancy B_iso_or_equiv auth_seq_id auth_asym_id pdbx_PDB_model_num"
        lines += ["loop_", *(f"_atom_site.{item}" for item in items.split())]
        lines += [
            f"{a.group} {i} {a.name} {a.altloc} {a.monomer} {a.asym} {a.seq} {a.insertion} {a.x} {a.y} {a.z} "
            f"{a.occupancy} {a.b_factor} {a.auth_seq or a.seq} {a.author} {a.model}"
            for i, a in enumerate(self.atoms, 1)
        ]
        return "\n".join([*lines, ""])


def backbone(number: int, monomer: str, asym: str = "A", **changes) -> list[Atom]:
    """N, CA, C and O of one residue, 3.8 angstrom along x per residue number."""
    return [
        replace(Atom(name, monomer, asym, number, x=f"{number * 3.8 + shift:.3f}", author=asym), **changes)
        for name, shift in _BACKBONE
    ]


def peptide(monomers: Sequence[str], asym: str = "A", pdb_id: str = "1TST", **changes) -> CifEntry:
    """An entry with one fully resolved chain."""
    numbered = list(enumerate(monomers, 1))
    atoms = [atom for number, monomer in numbered for atom in backbone(number, monomer, asym)]
    return replace(CifEntry([Entity(numbered, (asym,))], atoms, pdb_id), **changes)


def a3m(*rows: str) -> str:
    """An a3m text with the given rows."""
    return "".join(f">row{i}\n{row}\n" for i, row in enumerate(rows))


def hhr(hits: Sequence[tuple[str, str, str, float]], query_start: int = 1, hit_start: int = 1) -> str:
    """An hhr text; each hit is (name, aligned query, aligned template, sum_probs), in one block."""
    parts = ["Query         query\n\n No Hit\n\n"]
    for number, (name, query, template, sum_probs) in enumerate(hits, 1):
        columns = sum(a != "-" != b for a, b in zip(query, template, strict=True))
        parts.append(
            f"No {number}\n>{name} made for a test\n"
            f"Probab=99.00  E-value=1e-10  Score=100.00  Aligned_cols={columns}  Identities=90%  Similarity=1.000  "
            f"Sum_probs={sum_probs}  Template_Neff=5.000\n\n"
            + _block("Q", "query", query, query_start)
            + f"Q {'Consensus':<14} {query_start:4d} {query} {len(query):4d} ({len(query)})\n"
            + _block("T", name[:14], template, hit_start)
            + "T ss_pred             HHHHH\n\n"
        )
    return "".join(parts)


def _block(side: str, name: str, letters: str, start: int) -> str:
    end = start + len(letters) - letters.count("-") - 1
    return f"{side} {name:<14} {start:4d} {letters} {end:4d} ({end + 5})\n"


def write(path: Path, text: str | bytes) -> Path:
    """Write a file and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path
