"""Protein coordinates from torsion angles, for the generated demonstration set.

Backbones have ideal bond lengths and angles (Engh and Huber); side chains come from the same rigid-group tables that
the model uses (AlphaFold 2 Supplement 1.8.3, Algorithm 24), with the first rotamer that does not collide.
"""

import numpy as np

from scalefold.data import residues

N_CA_ANGSTROM, CA_C_ANGSTROM, C_N_ANGSTROM = 1.458, 1.525, 1.329
N_CA_C_RAD, CA_C_N_RAD, C_N_CA_RAD = np.radians([111.0, 116.6, 121.7])

# Common rotamers (chi 1..4 in degrees), preferred one first.
ROTAMERS_DEG: dict[str, tuple[tuple[float, ...], ...]] = {
    "A": ((),),
    "G": ((),),
    "R": ((-67, 180, 180, 180), (-177, 180, 180, 180), (-67, -70, 180, 180), (62, 180, 180, 180), (-177, 65, 180, 180)),
    "K": ((-67, 180, 180, 180), (-177, 180, 180, 180), (-62, -68, 180, 180), (62, 180, 180, 180), (-177, 68, 180, 180)),
    "N": ((-65, -20), (-177, 0), (62, 30), (-70, 120)),
    "D": ((-70, -15), (-177, 0), (62, 10)),
    "C": ((-65,), (-177,), (62,)),
    "Q": ((-67, 180, -25), (-177, 180, 0), (-65, -65, -40), (62, 180, 20), (-177, 65, -60)),
    "E": ((-67, 180, -10), (-177, 180, 0), (-65, -65, -40), (62, 180, 20), (-177, 65, 10)),
    "H": ((-65, -70), (-177, 80), (62, -75), (-65, 165)),
    "I": ((-65, 170), (-57, -60), (62, 170), (-177, 165)),
    "L": ((-65, 175), (-177, 65), (-85, 65), (62, 80)),
    "M": ((-67, 180, 75), (-65, -65, -70), (-177, 180, 75), (-177, 65, 75), (62, 180, 75)),
    "F": ((-65, -85), (-177, 80), (62, 90), (-65, -30)),
    "P": ((-25, 36), (27, -36)),
    "S": ((-65,), (62,), (-177,)),
    "T": ((-65,), (62,), (-177,)),
    "W": ((-65, 95), (-177, -105), (62, -90), (-65, -5), (-177, 90)),
    "Y": ((-65, -85), (-177, 80), (62, 90), (-65, -30)),
    "V": ((175,), (-60,), (63,)),
}


def backbone(phi_psi_deg: np.ndarray) -> np.ndarray:
    """float64 [L, 3, 3] positions of N, CA, C in angstrom for torsions [L, 2]; every peptide bond is trans."""
    length = len(phi_psi_deg)
    phi, psi = np.radians(phi_psi_deg).T
    bonds = np.tile([C_N_ANGSTROM, N_CA_ANGSTROM, CA_C_ANGSTROM], length)
    angles = np.tile([CA_C_N_RAD, C_N_CA_RAD, N_CA_C_RAD], length)  # at the atom before the new one
    torsions = np.stack([np.roll(psi, 1), np.full(length, np.pi), phi], axis=1).ravel()
    turns = _bond_turns(angles, torsions)
    frame, position = np.eye(3), np.zeros(3)  # x along the last bond, z normal to the last two
    atoms = np.zeros((3 * length, 3))
    for k in range(3 * length):
        frame = frame @ turns[k]
        position = position + bonds[k] * frame[:, 0]
        atoms[k] = position
    return atoms.reshape(length, 3, 3)


def _bond_turns(angles: np.ndarray, torsions: np.ndarray) -> np.ndarray:
    """[K, 3, 3] rotation from the frame of one bond to that of the next (columns are the new axes)."""
    cos_a, sin_a, cos_t, sin_t = np.cos(angles), np.sin(angles), np.cos(torsions), np.sin(torsions)
    along = np.stack([-cos_a, sin_a * cos_t, sin_a * sin_t], axis=-1)
    normal = np.stack([np.zeros_like(cos_t), -sin_t, cos_t], axis=-1)
    return np.stack([along, np.cross(normal, along), normal], axis=-1)


def backbone_frames(atoms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rotation [L, 3, 3] (columns x: CA to C, y: towards N) and origin CA [L, 3] of each residue."""
    n, ca, c = atoms[:, 0], atoms[:, 1], atoms[:, 2]
    x = (c - ca) / np.linalg.norm(c - ca, axis=-1, keepdims=True)
    y = n - ca - np.sum((n - ca) * x, axis=-1, keepdims=True) * x
    y /= np.linalg.norm(y, axis=-1, keepdims=True)
    return np.stack([x, y, np.cross(x, y)], axis=-1), ca


def c_beta(atoms: np.ndarray) -> np.ndarray:
    """[L, 3] position of CB (for every residue type that of alanine) given N, CA, C [L, 3, 3]."""
    rotation, origin = backbone_frames(atoms)
    alanine = residues.RESTYPES.index("A")
    local = residues.ATOM14_RIGID_GROUP_POSITIONS[alanine, residues.ATOM14_NAMES["ALA"].index("CB")]
    return rotation @ local.astype(np.float64) + origin


def _rotamer_angles(sequence: str, psi_deg: np.ndarray) -> np.ndarray:
    """Torsion angle of each rigid group in radians [L, R, 8]; a residue with fewer rotamers repeats its first."""
    most = max(len(rotamers) for rotamers in ROTAMERS_DEG.values())
    angles = np.zeros((len(sequence), most, 8))
    angles[:, :, 3] = np.radians(psi_deg)[:, None]
    for i, letter in enumerate(sequence):
        rotamers = ROTAMERS_DEG[letter]
        for r in range(most):
            chi = rotamers[r] if r < len(rotamers) else rotamers[0]
            angles[i, r, 4 : 4 + len(chi)] = np.radians(chi)
    return angles


def _turns_about_x(angles: np.ndarray) -> np.ndarray:
    turns = np.tile(np.eye(4), (*angles.shape, 1, 1))
    cos, sin = np.cos(angles), np.sin(angles)
    turns[..., 1, 1], turns[..., 1, 2], turns[..., 2, 1], turns[..., 2, 2] = cos, -sin, sin, cos
    return turns


def rotamer_atoms(sequence: str, trace: np.ndarray, psi_deg: np.ndarray) -> np.ndarray:
    """float64 [L, R, 14, 3]: atoms of every rotamer in atom14 order on the backbone [L, 3, 3]; NaN where absent."""
    types = residues.sequence_to_aatype(sequence)
    rotation, origin = backbone_frames(trace)
    base = np.tile(np.eye(4), (len(sequence), 1, 1, 1))
    base[:, 0, :3, :3], base[:, 0, :3, 3] = rotation, origin
    default = residues.RIGID_GROUP_DEFAULT_FRAME[types].astype(np.float64)[:, None]
    local = default @ _turns_about_x(_rotamer_angles(sequence, psi_deg))
    groups = base[:, :, None] @ local
    groups[:, :, 0] = base
    for group in (5, 6, 7):  # chi 2..4 move with the group before them
        groups[:, :, group] = groups[:, :, group - 1] @ local[:, :, group]
    of_atom = np.take_along_axis(groups, residues.ATOM14_TO_RIGID_GROUP[types][:, None, :, None, None], axis=2)
    points = np.concatenate([residues.ATOM14_RIGID_GROUP_POSITIONS[types], np.ones((len(types), 14, 1))], axis=-1)
    atoms = np.einsum("lraij,laj->lrai", of_atom, points)[..., :3]
    return np.where(residues.ATOM14_MASK[types][:, None, :, None] > 0, atoms, np.nan)


def all_atoms(sequence: str, phi_psi_deg: np.ndarray) -> np.ndarray:
    """float64 [L, 14, 3] heavy atoms in atom14 order; absent slots are NaN.

    Each side chain takes the rotamer that overlaps least with the backbone and with the side chains placed so far;
    a second round from first to last residue revises the choices. On ties the preferred rotamer wins.
    """
    trace = backbone(phi_psi_deg)
    choices = rotamer_atoms(sequence, trace, phi_psi_deg[:, 1])
    positions = np.full((len(sequence), 14, 3), np.nan)
    positions[:, :5] = choices[:, 0, :5]  # N, CA, C, O, CB do not depend on chi
    positions[:, :3] = trace
    for _ in range(2):
        for i, letter in enumerate(sequence):
            if len(ROTAMERS_DEG[letter]) > 1:
                positions[i, 5:] = _best_rotamer(choices[i, :, 5:], positions, i)
    return positions


def _best_rotamer(choices: np.ndarray, positions: np.ndarray, i: int) -> np.ndarray:
    """[9, 3] side-chain atoms of the choice [R, 9, 3] that overlaps least with the other residues' atoms."""
    present = ~np.isnan(choices[0, :, 0])
    near = np.linalg.norm(positions[:, 1] - positions[i, 1], axis=-1) < 14.0
    near[i] = False
    others = positions[near].reshape(-1, 3)
    others = others[~np.isnan(others[:, 0])]
    separation = choices[:, present, None] - others
    squared = np.einsum("rabx,rabx->rab", separation, separation)
    overlap = np.clip(3.6 - np.sqrt(squared), 0, None)
    costs = np.einsum("rab,rab->r", overlap, overlap) + 0.05 * np.arange(len(choices))
    return choices[int(np.argmin(costs))]


def closest_contact_angstrom(positions: np.ndarray, min_separation: int = 2) -> float:
    """Shortest distance between atoms [L, A, 3] of residues at least ``min_separation`` apart (NaN atoms ignored)."""
    flat = positions.reshape(-1, 3)
    owner = np.repeat(np.arange(len(positions)), positions.shape[1])
    keep = ~np.isnan(flat[:, 0])
    flat, owner = flat[keep], owner[keep]
    distances = np.linalg.norm(flat[:, None] - flat[None], axis=-1)
    return float(distances[np.abs(owner[:, None] - owner[None]) >= min_separation].min())


def lddt_ca(predicted: np.ndarray, true: np.ndarray, cutoff_angstrom: float = 15.0) -> float:
    """lDDT of CA positions [L, 3], pooled over all pairs closer than the cutoff in ``true`` (0..1)."""
    d_true = np.linalg.norm(true[:, None] - true[None], axis=-1)
    d_pred = np.linalg.norm(predicted[:, None] - predicted[None], axis=-1)
    pairs = (d_true < cutoff_angstrom) & ~np.eye(len(true), dtype=bool)
    error = np.abs(d_true - d_pred)[pairs]
    return float(np.mean([np.mean(error < tolerance) for tolerance in (0.5, 1.0, 2.0, 4.0)]))
