"""Atoms of a chain to the structural features: atom14, rigid groups, torsions, pseudo-beta (numpy, float32).

Every function takes arrays whose residue axis may be preceded by any leading axes (templates) and treats residues
independently, except the torsions, which look at the previous residue.
"""

import numpy as np

from scalefold.data import residues

_NORM_EPS = np.float32(1e-8)  # added to every squared norm (Supplement 1.8.1 has none; the reference needs it)
_CA, _CB = residues.CA_ATOM37, residues.CB_ATOM37
_N, _C, _O = (residues.ATOM37_INDEX[name] for name in ("N", "C", "O"))
_BACKBONE_FLIP = np.diag(np.array([-1, 1, -1], dtype=np.float32))
_RENAMED_FLIP = np.diag(np.array([1, -1, -1], dtype=np.float32))


def pseudo_beta(aatype: np.ndarray, positions: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """C-beta, or C-alpha of glycine: float32 [..., N, 3] angstrom and its mask [..., N].

    ``aatype`` int [..., N]; ``positions`` float32 [..., N, 37, 3]; ``mask`` float32 [..., N, 37].
    """
    atom = np.where(aatype == residues.GLY_RESTYPE, _CA, _CB)[..., None]
    point = np.take_along_axis(positions, atom[..., None], axis=-2)[..., 0, :]
    return point, np.take_along_axis(mask, atom, axis=-1)[..., 0]


def three_point_rotation(negative_x: np.ndarray, origin: np.ndarray, xy_plane: np.ndarray) -> np.ndarray:
    """Rotations float32 [..., 3, 3] with columns x, y, z from three points [..., 3] (Supplement Algorithm 21).

    The x axis points from ``negative_x`` to ``origin``; ``xy_plane`` lies in the xy plane on the positive y side.
    """
    x = _normalised(origin - negative_x)
    y = xy_plane - origin
    y = _normalised(y - np.sum(x * y, axis=-1, keepdims=True) * x)
    return np.stack([x, y, np.cross(x, y)], axis=-1)


def _normalised(vector: np.ndarray) -> np.ndarray:
    return vector / np.sqrt(np.sum(vector**2, axis=-1, keepdims=True) + _NORM_EPS)


def _rotate(rotation: np.ndarray, point: np.ndarray) -> np.ndarray:
    x, y, z = (rotation[..., i] * point[..., i, None] for i in range(3))
    return x + y + z


def atom14_features(aatype: np.ndarray, positions: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    """Index maps, existence and both namings of the compact 14-atom representation, for one chain [N]."""
    to_atom37 = residues.ATOM14_TO_ATOM37[aatype]
    exists = residues.ATOM14_MASK[aatype]
    gt_exists = exists * np.take_along_axis(mask, to_atom37, axis=1)
    gt_positions = np.take_along_axis(positions, to_atom37[..., None], axis=1) * gt_exists[..., None]
    renamed = residues.ATOM14_RENAMING[aatype]
    return {
        "residx_atom14_to_atom37": to_atom37,
        "residx_atom37_to_atom14": residues.ATOM37_TO_ATOM14[aatype],
        "atom14_atom_exists": exists,
        "atom37_atom_exists": residues.ATOM37_MASK[aatype],
        "atom14_gt_exists": gt_exists,
        "atom14_gt_positions": gt_positions,
        "atom14_alt_gt_exists": np.take_along_axis(gt_exists, renamed, axis=1),
        "atom14_alt_gt_positions": np.take_along_axis(gt_positions, renamed[..., None], axis=1),
        "atom14_atom_is_ambiguous": residues.ATOM14_IS_AMBIGUOUS[aatype],
    }


def rigid_group_features(aatype: np.ndarray, positions: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    """Ground-truth frames of the eight rigid groups of each residue, with the alternative naming, for one chain [N].

    Frames are float32 [N, 8, 4, 4]. Groups that a residue type lacks are computed from atom 0 three times (zero
    rotation); only ``rigidgroups_gt_exists`` says that they are absent.
    """
    atoms = residues.RIGID_GROUP_ATOM37[aatype]  # [N, 8, 3]
    group_exists = residues.RIGID_GROUP_MASK[aatype]
    ambiguous = residues.RIGID_GROUP_IS_AMBIGUOUS[aatype]
    rows = np.arange(len(aatype))[:, None, None]
    points = positions[rows, atoms]  # [N, 8, 3, 3]
    rotation = three_point_rotation(points[:, :, 0], points[:, :, 1], points[:, :, 2])
    rotation[:, 0] = rotation[:, 0] @ _BACKBONE_FLIP
    renamed = np.where(ambiguous[..., None, None] > 0, rotation @ _RENAMED_FLIP, rotation)
    frames = _affine(rotation, points[:, :, 1])
    exists = mask[rows, atoms].min(axis=-1) * group_exists
    return {
        "rigidgroups_gt_frames": frames,
        "rigidgroups_alt_gt_frames": _affine(renamed, points[:, :, 1]),
        "rigidgroups_gt_exists": exists,
        "rigidgroups_group_exists": group_exists,
        "rigidgroups_group_is_ambiguous": ambiguous,
        "backbone_rigid_tensor": frames[:, 0],
        "backbone_rigid_mask": exists[:, 0],
    }


def _affine(rotation: np.ndarray, translation: np.ndarray) -> np.ndarray:
    frames = np.zeros((*rotation.shape[:-2], 4, 4), dtype=np.float32)
    frames[..., :3, :3] = rotation
    frames[..., :3, 3] = translation
    frames[..., 3, 3] = 1.0
    return frames


def torsion_angles(aatype: np.ndarray, positions: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    """(sin, cos) of the seven torsions pre-omega, phi, psi, chi 1 to 4, in both namings, with their masks.

    ``aatype`` int [..., N] (gap counts as X), ``positions`` float32 [..., N, 37, 3], ``mask`` float32 [..., N, 37].
    Returns ``sin_cos`` and ``alt_sin_cos`` float32 [..., N, 7, 2] and ``mask`` float32 [..., N, 7]. The residue before
    the first one counts as absent, at the origin.
    """
    aatype = np.minimum(aatype, residues.UNKNOWN_RESTYPE)
    points, exists = _torsion_atoms(aatype, positions, mask)
    rotation = three_point_rotation(points[..., 1, :], points[..., 2, :], points[..., 0, :])
    inverse = np.swapaxes(rotation, -1, -2)
    fourth = _rotate(inverse, points[..., 3, :]) - _rotate(inverse, points[..., 2, :])
    sin_cos = fourth[..., [2, 1]]
    sin_cos = sin_cos / np.sqrt(np.sum(sin_cos**2, axis=-1, keepdims=True) + _NORM_EPS)
    sin_cos[..., 2, :] *= -1  # psi is measured at O, opposite the next N
    mirror = np.ones((*aatype.shape, 7), dtype=np.float32)
    mirror[..., 3:] = 1.0 - 2.0 * residues.CHI_PI_PERIODIC[aatype]
    return {"sin_cos": sin_cos, "alt_sin_cos": sin_cos * mirror[..., None], "mask": exists}


def _torsion_atoms(aatype: np.ndarray, positions: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The four atoms of each torsion, float32 [..., N, 7, 4, 3], and whether all of them are present [..., N, 7]."""
    previous = np.zeros_like(positions[..., :2, :])
    previous_mask = np.zeros_like(mask[..., :2])
    previous[..., 1:, :, :] = positions[..., :-1, [_CA, _C], :]
    previous_mask[..., 1:, :] = mask[..., :-1, [_CA, _C]]
    sources = [  # (from the previous residue, from this one)
        ([0, 1], [_N, _CA]),
        ([1], [_N, _CA, _C]),
        ([], [_N, _CA, _C, _O]),
    ]
    points = [np.concatenate([previous[..., a, :], positions[..., b, :]], axis=-2) for a, b in sources]
    exists = [previous_mask[..., a].prod(axis=-1) * mask[..., b].prod(axis=-1) for a, b in sources]
    chi_atoms = residues.CHI_ATOM37_INDICES[aatype]  # [..., N, 4, 4]
    flat = chi_atoms.reshape(*aatype.shape, 16)
    chi_points = np.take_along_axis(positions, flat[..., None], axis=-2).reshape(*chi_atoms.shape, 3)
    chi_mask = np.take_along_axis(mask, flat, axis=-1).reshape(chi_atoms.shape).prod(axis=-1)
    chi_mask = chi_mask * residues.CHI_MASK[aatype]
    all_points = np.concatenate([np.stack(points, axis=-3), chi_points], axis=-3)
    return all_points, np.concatenate([np.stack(exists, axis=-1), chi_mask], axis=-1)
