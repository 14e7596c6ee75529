"""Violations of stereochemistry (Supplement 1.9.11): bonds between residues, clashes, distances within residues.

The benchmark gives them weight zero; they are computed on demand. The reference's oddities are kept so that values
compare: the CA-C-N angle uses the bond length's deviation, and slot 5 (SG of cysteine) is exempt for all residues.
"""

from collections.abc import Mapping
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from scalefold.data import residues

TOLERANCE_FACTOR = 12.0
CLASH_TOLERANCE_ANGSTROM = 1.5
BOND_EPS = 1e-6
DISTANCE_EPS = 1e-10
MEAN_EPS = 1e-8
N, CA, C = 0, 1, 2  # atom14 slots
DISULFIDE_SLOT = 5
PROLINE = residues.RESTYPES.index("P")


class BondViolations(NamedTuple):
    """Mean penalties over the bonds between consecutive residues, [B] each."""

    c_n: Tensor
    ca_c_n: Tensor
    c_n_ca: Tensor


@cache
def _tables(device: torch.device) -> dict[str, Tensor]:
    """Constant tables on ``device``: radii of atom14 slots [21, 14], distance bounds [21, 14, 14]."""
    radius = residues.VAN_DER_WAALS_RADIUS_ANGSTROM
    rows = [[radius[name[0]] if name else 0.0 for name in residues.ATOM14_NAMES[r]] for r in residues.RESNAMES]
    return {
        "radius": torch.tensor(rows, device=device),
        "lower": torch.from_numpy(residues.ATOM14_DISTANCE_LOWER_BOUND).to(device),
        "upper": torch.from_numpy(residues.ATOM14_DISTANCE_UPPER_BOUND).to(device),
    }


def _length(vector: Tensor) -> Tensor:
    return torch.sqrt(BOND_EPS + vector.square().sum(-1))


def _unit(vector: Tensor) -> Tensor:
    return vector / _length(vector)[..., None]


def _bond_penalty(value: Tensor, ideal: Tensor | float, stddev: Tensor | float, mask: Tensor) -> Tensor:
    error = torch.sqrt(BOND_EPS + (value - ideal).square())
    penalty = torch.relu(error - TOLERANCE_FACTOR * stddev)
    return (mask * penalty).sum(-1) / (BOND_EPS + mask.sum(-1))


def between_residue_bonds(positions: Tensor, batch: Mapping[str, Tensor]) -> BondViolations:
    """Peptide bond length and its two angles. positions: [B, N, 14, 3], angstrom."""
    exists, index = batch["atom14_atom_exists"], batch["residue_index"]
    bonded = (index[:, 1:] - index[:, :-1] == 1).float()
    ca, c = positions[:, :-1, CA], positions[:, :-1, C]
    next_n, next_ca = positions[:, 1:, N], positions[:, 1:, CA]
    has_ca, has_c = exists[:, :-1, CA], exists[:, :-1, C]
    has_next_n, has_next_ca = exists[:, 1:, N], exists[:, 1:, CA]
    proline = (batch["aatype"][:, 1:] == PROLINE).float()
    length, length_proline = residues.BETWEEN_RESIDUE_BOND_LENGTH_C_N
    deviation, deviation_proline = residues.BETWEEN_RESIDUE_BOND_LENGTH_STDDEV_C_N
    c_n = _bond_penalty(
        _length(c - next_n),
        length + (length_proline - length) * proline,
        deviation + (deviation_proline - deviation) * proline,
        has_c * has_next_n * bonded,
    )
    cos_ca_c_n = (_unit(ca - c) * _unit(next_n - c)).sum(-1)
    cos_c_n_ca = (_unit(c - next_n) * _unit(next_ca - next_n)).sum(-1)
    return BondViolations(
        c_n,
        _bond_penalty(
            cos_ca_c_n, residues.BETWEEN_RESIDUE_COS_ANGLE_CA_C_N[0], deviation, has_ca * has_c * has_next_n * bonded
        ),
        _bond_penalty(
            cos_c_n_ca,
            residues.BETWEEN_RESIDUE_COS_ANGLE_C_N_CA[0],
            residues.BETWEEN_RESIDUE_COS_ANGLE_C_N_CA[1],
            has_c * has_next_n * has_next_ca * bonded,
        ),
    )


def between_residue_clashes(positions: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Overlap that each atom has with atoms of other residues, angstrom. -> [B, N, 14]."""
    exists, index = batch["atom14_atom_exists"], batch["residue_index"]
    radius = _tables(positions.device)["radius"][batch["aatype"]]
    num_residues = index.shape[1]
    slots = torch.arange(14, device=positions.device).repeat(num_residues)
    place = index.repeat_interleave(14, dim=1)
    before = place[:, :, None] < place[:, None, :]
    peptide = (slots[:, None] == C) & (slots[None, :] == N) & (place[:, :, None] + 1 == place[:, None, :])
    disulfide = (slots[:, None] == DISULFIDE_SLOT) & (slots[None, :] == DISULFIDE_SLOT)
    atoms, present, size = positions.flatten(1, 2), exists.flatten(1, 2), radius.flatten(1, 2)
    pairs = present[:, :, None] * present[:, None, :] * (before & ~peptide & ~disulfide)
    distance = torch.sqrt(DISTANCE_EPS + (atoms[:, :, None] - atoms[:, None]).square().sum(-1))
    overlap = torch.relu(size[:, :, None] + size[:, None] - CLASH_TOLERANCE_ANGSTROM - distance) * pairs
    return (overlap.sum(1) + overlap.sum(2)).unflatten(1, (num_residues, 14))


def within_residue_violations(positions: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Distances outside the bounds of the residue type, twice per atom (row and column). -> [B, N, 14]."""
    tables, exists = _tables(positions.device), batch["atom14_atom_exists"]
    lower, upper = tables["lower"][batch["aatype"]], tables["upper"][batch["aatype"]]
    pairs = exists[..., :, None] * exists[..., None, :] * (1.0 - torch.eye(14, device=positions.device))
    distance = torch.sqrt(DISTANCE_EPS + (positions[..., :, None, :] - positions[..., None, :, :]).square().sum(-1))
    excess = (torch.relu(lower - distance) + torch.relu(distance - upper)) * pairs
    return excess.sum(-1) + excess.sum(-2)


def violation_loss(outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
    """Sum of the three bond terms and the mean clash per atom, of the last iteration's atoms. -> [B]."""
    positions = outputs["sm_positions"][:, -1]
    bonds = between_residue_bonds(positions, batch)
    clashes = between_residue_clashes(positions, batch) + within_residue_violations(positions, batch)
    per_atom = clashes.sum((1, 2)) / (MEAN_EPS + batch["atom14_atom_exists"].sum((1, 2)))
    return bonds.c_n + bonds.ca_c_n + bonds.c_n_ca + per_atom
