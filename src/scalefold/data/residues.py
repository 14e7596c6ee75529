"""Constant tables of residues, atoms, rigid groups and alphabets, as numpy arrays.

Index conventions: ``restype`` 0..19 are the amino acids in the order of :data:`RESTYPES`, 20 is the unknown
residue X, 21 the alignment gap. ``atom37`` is the fixed slot order of all heavy-atom names, ``atom14`` the compact
per-residue order. Source: AlphaFold 2 Supplement, tables 2 and 3 and section 1.9; Engh and Huber geometry for bounds.
"""

import csv
import json
from importlib import resources

import numpy as np

_PACKAGE = resources.files("scalefold.data")
_FACTS = json.loads(_PACKAGE.joinpath("residues.json").read_text(encoding="utf-8"))


def _load_tables() -> dict[str, np.ndarray]:
    with resources.as_file(_PACKAGE / "residue_tables.npz") as path, np.load(path, allow_pickle=False) as tables:
        return {name: tables[name] for name in tables.files}


_TABLES = _load_tables()

RESTYPES: tuple[str, ...] = tuple(_FACTS["restypes"])
RESTYPES_WITH_X: tuple[str, ...] = (*RESTYPES, "X")
RESTYPES_WITH_X_AND_GAP: tuple[str, ...] = (*RESTYPES_WITH_X, "-")
RESTYPE_1TO3: dict[str, str] = _FACTS["restype_1to3"]
RESNAMES: tuple[str, ...] = (*(RESTYPE_1TO3[letter] for letter in RESTYPES), "UNK")
UNKNOWN_RESTYPE = 20
GAP_RESTYPE = 21
NUM_RESTYPES = 21

ATOM37_NAMES: tuple[str, ...] = tuple(_FACTS["atom37_order"])
ATOM37_INDEX: dict[str, int] = {name: i for i, name in enumerate(ATOM37_NAMES)}
ATOM14_NAMES: dict[str, tuple[str, ...]] = {name: tuple(v) for name, v in _FACTS["atom14_names"].items()}
CA_ATOM37 = ATOM37_INDEX["CA"]
CB_ATOM37 = ATOM37_INDEX["CB"]
GLY_RESTYPE = RESTYPES.index("G")

CHI_ANGLE_ATOMS: dict[str, list[list[str]]] = _FACTS["chi_angle_atoms"]
ATOM_RENAMING_SWAPS: dict[str, dict[str, str]] = _FACTS["atom_renaming_swaps"]
VAN_DER_WAALS_RADIUS_ANGSTROM: dict[str, float] = _FACTS["van_der_waals_radius_angstrom"]
CA_CA_DISTANCE_ANGSTROM: float = _FACTS["ca_ca_angstrom"]
BETWEEN_RESIDUE_BOND_LENGTH_C_N: list[float] = _FACTS["between_residue_bond_length_c_n"]["general_proline"]
BETWEEN_RESIDUE_BOND_LENGTH_STDDEV_C_N: list[float] = _FACTS["between_residue_bond_length_c_n"]["stddev"]
BETWEEN_RESIDUE_COS_ANGLE_C_N_CA: list[float] = _FACTS["between_residue_cos_angle_c_n_ca"]
BETWEEN_RESIDUE_COS_ANGLE_CA_C_N: list[float] = _FACTS["between_residue_cos_angle_ca_c_n"]

# Alignment letters. HHblits orders the amino acids alphabetically by letter, then X = 20, gap = 21.
MSA_LETTER_TO_HHBLITS: dict[str, int] = _FACTS["msa_letter_to_id_hhblits"]
HHBLITS_TO_RESTYPE: np.ndarray = np.array(_FACTS["hhblits_id_to_internal"], dtype=np.int64)
RESTYPE_TO_HHBLITS: np.ndarray = np.argsort(HHBLITS_TO_RESTYPE).astype(np.uint8)
HHBLITS_LETTERS = "ACDEFGHIKLMNPQRSTVWYX-"

# float32 [21, 8, 4, 4]: group frame in its parent's frame, all torsions zero
RIGID_GROUP_DEFAULT_FRAME: np.ndarray = _TABLES["restype_rigid_group_default_frame"]
ATOM14_TO_RIGID_GROUP: np.ndarray = _TABLES["restype_atom14_to_rigid_group"]  # int64 [21, 14]
ATOM14_MASK: np.ndarray = _TABLES["restype_atom14_mask"]  # float32 [21, 14]
# float32 [21, 14, 3], angstrom, in the frame of the atom's group
ATOM14_RIGID_GROUP_POSITIONS: np.ndarray = _TABLES["restype_atom14_rigid_group_positions"]
ATOM14_DISTANCE_LOWER_BOUND: np.ndarray = _TABLES["atom14_dists_lower_bound"]  # float32 [21, 14, 14], angstrom
ATOM14_DISTANCE_UPPER_BOUND: np.ndarray = _TABLES["atom14_dists_upper_bound"]
ATOM14_DISTANCE_STDDEV: np.ndarray = _TABLES["atom14_dists_stddev"]
CHI_ATOM37_INDICES: np.ndarray = _TABLES["chi_atom_indices"]  # int64 [21, 4, 4]; zeros where absent
CHI_PI_PERIODIC: np.ndarray = _TABLES["chi_pi_periodic"].astype(np.float32)  # [21, 4]
CHI_MASK: np.ndarray = np.concatenate([_TABLES["chi_angles_mask"], np.zeros((1, 4))]).astype(np.float32)  # [21, 4]


def _atom14_to_atom37() -> np.ndarray:
    """int64 [21, 14]: atom37 slot of each atom14 slot; 0 where the residue has no such atom."""
    index = np.zeros((NUM_RESTYPES, 14), dtype=np.int64)
    for restype, resname in enumerate(RESNAMES):
        for slot, name in enumerate(ATOM14_NAMES[resname]):
            index[restype, slot] = ATOM37_INDEX[name] if name else 0
    return index


def _atom37_to_atom14() -> tuple[np.ndarray, np.ndarray]:
    """int64 [21, 37] atom14 slot of each atom37 slot (0 where absent) and float32 [21, 37] existence."""
    index = np.zeros((NUM_RESTYPES, 37), dtype=np.int64)
    exists = np.zeros((NUM_RESTYPES, 37), dtype=np.float32)
    for restype, resname in enumerate(RESNAMES):
        for slot, name in enumerate(ATOM14_NAMES[resname]):
            if name:
                index[restype, ATOM37_INDEX[name]] = slot
                exists[restype, ATOM37_INDEX[name]] = 1.0
    return index, exists


def _rigid_group_atoms() -> tuple[np.ndarray, np.ndarray]:
    """int64 [21, 8, 3] atom37 slots (negative x, origin, xy-plane) and float32 [21, 8] existence of each group.

    Groups: 0 backbone, 1 and 2 (pre-omega, phi) never exist, 3 psi, 4..7 chi 1..4. Absent groups name slot 0 thrice.
    """
    atoms = np.zeros((NUM_RESTYPES, 8, 3), dtype=np.int64)
    exists = np.zeros((NUM_RESTYPES, 8), dtype=np.float32)
    atoms[:, 0] = [ATOM37_INDEX[name] for name in ("C", "CA", "N")]
    atoms[:, 3] = [ATOM37_INDEX[name] for name in ("CA", "C", "O")]
    exists[:, [0, 3]] = 1.0
    for restype, resname in enumerate(RESNAMES[:20]):
        for chi, names in enumerate(CHI_ANGLE_ATOMS[resname]):
            atoms[restype, 4 + chi] = [ATOM37_INDEX[name] for name in names[1:]]
            exists[restype, 4 + chi] = 1.0
    return atoms, exists


def _renaming() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Atoms that 180 degree symmetry makes interchangeable (ASP, GLU, PHE, TYR).

    int64 [21, 14] atom14 slot that holds the atom after renaming, float32 [21, 14] whether it moves, and
    float32 [21, 8] whether the rigid group's frame changes by renaming (the last chi group).
    """
    partner = np.tile(np.arange(14), (NUM_RESTYPES, 1))
    group_is_ambiguous = np.zeros((NUM_RESTYPES, 8), dtype=np.float32)
    for resname, swaps in ATOM_RENAMING_SWAPS.items():
        restype = RESNAMES.index(resname)
        for first, second in swaps.items():
            a, b = (ATOM14_NAMES[resname].index(name) for name in (first, second))
            partner[restype, a], partner[restype, b] = b, a
        group_is_ambiguous[restype, 3 + len(CHI_ANGLE_ATOMS[resname])] = 1.0
    is_ambiguous = (partner != np.arange(14)).astype(np.float32)
    return partner, is_ambiguous, group_is_ambiguous


ATOM14_TO_ATOM37: np.ndarray = _atom14_to_atom37()
ATOM37_TO_ATOM14, ATOM37_MASK = _atom37_to_atom14()
RIGID_GROUP_ATOM37, RIGID_GROUP_MASK = _rigid_group_atoms()
ATOM14_RENAMING, ATOM14_IS_AMBIGUOUS, RIGID_GROUP_IS_AMBIGUOUS = _renaming()


def _monomer_letters() -> dict[str, str]:
    with _PACKAGE.joinpath("monomer_letters.csv").open(encoding="utf-8") as lines:
        return {row["monomer"]: row["letter"] for row in csv.DictReader(lines)}


#: One-letter code of each chemical component (SCOP table of Biopython 1.79, Biopython License; absent means X).
MONOMER_LETTERS: dict[str, str] = _monomer_letters()

_RESTYPE_OF_BYTE = np.full(256, UNKNOWN_RESTYPE, dtype=np.uint8)
for _i, _letter in enumerate(RESTYPES):
    _RESTYPE_OF_BYTE[ord(_letter)] = _i


def sequence_to_aatype(sequence: str) -> np.ndarray:
    """uint8 [L] restype of each letter; every letter that is not one of the 20 amino acids gives X (20)."""
    return _RESTYPE_OF_BYTE[np.frombuffer(sequence.encode("ascii"), dtype=np.uint8)]


def aatype_to_sequence(aatype: np.ndarray) -> str:
    """Letters of ``aatype`` [L] (0..21)."""
    return "".join(RESTYPES_WITH_X_AND_GAP[i] for i in aatype)
