"""Scores of predicted structures: lDDT-Cα as the benchmark defines it, and superposition. All in fp32."""

import torch
from torch import Tensor

CA = 1  # atom37 slot
LDDT_CUTOFF_ANGSTROM = 15.0
LDDT_THRESHOLDS_ANGSTROM = (0.5, 1.0, 2.0, 4.0)
LDDT_EPS = 1e-8


def ca_distances(points: Tensor) -> Tensor:
    """Distances between all Cα pairs. [B, N, 3] -> [B, N, N]."""
    difference = points[:, :, None] - points[:, None]
    return torch.sqrt(difference.square().sum(-1) + LDDT_EPS)


def lddt_pairs(predicted: Tensor, true: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Score of each pair and which pairs count: true distance under 15 Å, both present, not the same residue.

    predicted, true: Cα positions [B, N, 3], angstrom; mask: [B, N] -> scores [B, N, N], counted [B, N, N].
    """
    true_distance = ca_distances(true.float())
    error = (true_distance - ca_distances(predicted.float())).abs()
    counted = (true_distance < LDDT_CUTOFF_ANGSTROM) * mask[:, :, None] * mask[:, None, :]
    counted = counted * (1.0 - torch.eye(mask.shape[1], device=mask.device))
    score = torch.stack([(error < t).float() for t in LDDT_THRESHOLDS_ANGSTROM]).mean(0)
    return score * counted, counted


def lddt_ca_per_residue(predicted: Tensor, true: Tensor, mask: Tensor) -> Tensor:
    """lDDT-Cα of each residue, the target of the confidence head; 1 where no pair counts. -> [B, N]."""
    score, counted = lddt_pairs(predicted, true, mask)
    return _share(score.sum(-1), counted.sum(-1))


def lddt_ca(predicted: Tensor, true: Tensor, mask: Tensor) -> Tensor:
    """lDDT-Cα of each chain, pooled over its pairs (not averaged over residues): the benchmark's metric.

    predicted, true: Cα positions [B, N, 3], angstrom; mask: [B, N], 1 where the true Cα is present -> [B], 0..1.
    """
    score, counted = lddt_pairs(predicted, true, mask)
    return _share(score.sum((-1, -2)), counted.sum((-1, -2)))


def _share(score: Tensor, counted: Tensor) -> Tensor:
    """Sum of scores by number of pairs, as the reference rounds it: a quotient falls into other bins of confidence."""
    return (1.0 / (LDDT_EPS + counted)) * (LDDT_EPS + score)


def prediction_lddt_ca(final_atom_positions: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """lDDT-Cα of the model's output [B, N, 37, 3] against the batch's all-atom truth. -> [B]."""
    truth, mask = batch["all_atom_positions"], batch["all_atom_mask"]
    return lddt_ca(final_atom_positions[:, :, CA], truth[:, :, CA], mask[:, :, CA])


def superpose(predicted: Tensor, true: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Move ``predicted`` rigidly onto ``true`` with least squared error over masked points (Kabsch).

    predicted, true: [B, N, 3]; mask: [B, N] -> moved points [B, N, 3], RMSD [B] in the unit of the input.
    """
    weight = (mask / mask.sum(-1, keepdim=True).clamp(min=1.0))[..., None].double()
    predicted_, true_ = predicted.double(), true.double()
    centre, target = (weight * predicted_).sum(1, keepdim=True), (weight * true_).sum(1, keepdim=True)
    covariance = (weight * (predicted_ - centre)).transpose(1, 2) @ (true_ - target)
    u, _, vh = torch.linalg.svd(covariance)
    sign = torch.ones_like(u[:, 0])
    sign[:, 2] = torch.sign(torch.linalg.det(u) * torch.linalg.det(vh))
    rotation = (u * sign[:, None]) @ vh
    moved = (predicted_ - centre) @ rotation + target
    rmsd = torch.sqrt((weight[..., 0] * (moved - true_).square().sum(-1)).sum(1))
    return moved.to(predicted.dtype), rmsd.to(predicted.dtype)
