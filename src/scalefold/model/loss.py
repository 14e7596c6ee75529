"""All loss terms of the benchmark (Supplement 1.9), in fp32.

Every term gives one value per sample, [B]. The batch is the uncast one, of the supervised (last) recycling slice.
"""

from collections.abc import Callable, Mapping
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from scalefold.config import LossConfig
from scalefold.kernels.table import REFERENCE, Operations
from scalefold.model.metrics import (
    CA,
    LDDT_CUTOFF_ANGSTROM,
    LDDT_EPS,
    LDDT_THRESHOLDS_ANGSTROM,
    lddt_ca_per_residue,
)
from scalefold.model.rigid import Rigid, squared_distances
from scalefold.model.violations import violation_loss

FAPE_EPS = 1e-4
FAPE_UNIT_ANGSTROM = 10.0
FAPE_CLAMP_ANGSTROM = 10.0
TORSION_EPS = 1e-4
CHI_WEIGHT, ANGLE_NORM_WEIGHT = 0.5, 0.01
CHI = slice(3, 7)
MEAN_EPS = 1e-8
NORM_EPS = 1e-8
DISTOGRAM_FIRST_ANGSTROM, DISTOGRAM_LAST_ANGSTROM = 2.3125, 21.6875
RESOLUTION_RANGE_ANGSTROM = (0.1, 3.0)

Tensors = Mapping[str, Tensor]
Terms = Mapping[str, tuple[float, Callable[[Tensors, Tensors], Tensor]]]


def masked_mean(values: Tensor, mask: Tensor, eps: float, dims: tuple[int, ...]) -> Tensor:
    """sum(mask * values) / (eps + sum(mask)) over ``dims``; mask has the shape of values."""
    return (mask * values).sum(dims) / (eps + mask.sum(dims))


def resolution_gate(resolution: Tensor) -> Tensor:
    """1 for samples of 0.1 to 3.0 angstrom, else 0; unknown resolution (NaN) gives 0. [B] -> [B]."""
    low, high = RESOLUTION_RANGE_ANGSTROM
    return ((resolution >= low) & (resolution <= high)).float()


def frame_aligned_point_error(
    frames: Rigid,
    target_frames: Rigid,
    frames_mask: Tensor,
    points: Tensor,
    target_points: Tensor,
    points_mask: Tensor,
    clamp_weight: Tensor,
    ops: Operations = REFERENCE,
) -> Tensor:
    """FAPE (Supplement Algorithm 28) in units of 10 angstrom: a mean over frames and points.

    frames: [*, F]; points: [*, P, 3]; masks: [*, F], [*, P]; clamp_weight: [*], 1 if errors are clamped -> [*].
    """
    total = ops.point_errors(
        *frames, *target_frames, frames_mask, points, target_points, points_mask, clamp_weight, FAPE_CLAMP_ANGSTROM
    )
    return total / FAPE_UNIT_ANGSTROM / (FAPE_EPS + frames_mask.sum(-1)) / (FAPE_EPS + points_mask.sum(-1))


def backbone_fape(outputs: Tensors, batch: Tensors, ops: Operations = REFERENCE) -> Tensor:
    """Backbone FAPE of all iterations, clamped or not as the sample says (Supplement 1.9.2). -> [B]."""
    frames = Rigid.from_quaternion_and_translation(outputs["sm_frames"])
    target = Rigid.from_matrix(batch["backbone_rigid_tensor"][:, None])
    mask, use_clamped = batch["backbone_rigid_mask"][:, None], batch["use_clamped_fape"][:, None]
    points, true_points = frames.translation, target.translation
    return frame_aligned_point_error(frames, target, mask, points, true_points, mask, use_clamped, ops).mean(1)


class RenamedTruth(NamedTuple):
    """Ground truth under the naming of ambiguous atoms that fits the prediction better."""

    use_alternative: Tensor  # bool [B, N]
    positions: Tensor  # [B, N, 14, 3]
    exists: Tensor  # [B, N, 14]


@torch.no_grad()
def rename_symmetric_atoms(positions: Tensor, batch: Tensors, ops: Operations = REFERENCE) -> RenamedTruth:
    """Choose names per residue by distances to the unambiguous atoms of all residues (Supplement Algorithm 26).

    positions: predicted [B, N, 14, 3]. The choice is a comparison, so it carries no gradient.
    """
    truth, alternative, exists = (batch[f"atom14_{key}"] for key in ("gt_positions", "alt_gt_positions", "gt_exists"))
    use = ops.better_naming(positions, truth, alternative, exists, batch["atom14_atom_is_ambiguous"]) > 0
    positions_ = torch.where(use[..., None, None], alternative, truth)
    exists_ = torch.where(use[..., None], batch["atom14_alt_gt_exists"], exists)
    return RenamedTruth(use, positions_, exists_)


def sidechain_fape(outputs: Tensors, batch: Tensors, ops: Operations = REFERENCE) -> Tensor:
    """FAPE of all rigid groups and atoms of the last iteration, clamped (Supplement 1.9.3). -> [B]."""
    positions = outputs["sm_positions"][:, -1]
    renamed = rename_symmetric_atoms(positions, batch, ops)
    use = renamed.use_alternative[..., None, None, None]
    target = torch.where(use, batch["rigidgroups_alt_gt_frames"], batch["rigidgroups_gt_frames"])
    return frame_aligned_point_error(
        Rigid.from_matrix(outputs["sm_sidechain_frames"][:, -1].flatten(1, 2)),
        Rigid.from_matrix(target.flatten(1, 2)),
        batch["rigidgroups_gt_exists"].flatten(1, 2),
        positions.flatten(1, 2),
        renamed.positions.flatten(1, 2),
        renamed.exists.flatten(1, 2),
        torch.ones_like(positions[:, 0, 0, 0]),
        ops,
    )


def supervised_chi_loss(outputs: Tensors, batch: Tensors) -> Tensor:
    """Side-chain torsions of all iterations and length of the angle vectors (Supplement Algorithm 27). -> [B]."""
    predicted = outputs["sm_angles"][..., CHI, :]
    target = batch["chi_angles_sin_cos"][:, None]
    shift = 1.0 - 2.0 * chi_pi_periodic(batch["aatype"])[:, None, ..., None]
    error = torch.minimum((predicted - target).square().sum(-1), (predicted - target * shift).square().sum(-1))
    chi = masked_mean(error, batch["chi_mask"][:, None].expand_as(error), TORSION_EPS, (1, 2, 3))
    norm = torch.sqrt(outputs["sm_unnormalized_angles"].square().sum(-1) + NORM_EPS)
    mask = batch["seq_mask"][:, None, :, None].expand_as(norm)
    return CHI_WEIGHT * chi + ANGLE_NORM_WEIGHT * masked_mean((norm - 1.0).abs(), mask, TORSION_EPS, (1, 2, 3))


def chi_pi_periodic(aatype: Tensor) -> Tensor:
    """1 where a torsion looks the same after half a turn: chi 2 of ASP, PHE, TYR, chi 3 of GLU. [B, N] -> [B, N, 4]."""
    asp, glu, phe, tyr = 3, 6, 13, 18
    chi2 = (aatype == asp) | (aatype == phe) | (aatype == tyr)
    never = torch.zeros_like(chi2)
    return torch.stack((never, chi2, aatype == glu, never), dim=-1).float()


def distogram_loss(outputs: Tensors, batch: Tensors) -> Tensor:
    """Cross-entropy of binned pseudo-beta distances (Supplement 1.9.8). -> [B]."""
    logits, mask = outputs["distogram_logits"], batch["pseudo_beta_mask"]
    edges = torch.linspace(
        DISTOGRAM_FIRST_ANGSTROM, DISTOGRAM_LAST_ANGSTROM, logits.shape[-1] - 1, device=logits.device
    ).square()
    bins = (squared_distances(batch["pseudo_beta"])[..., None] > edges).sum(-1)
    pair_mask = mask[:, :, None] * mask[:, None, :]
    return masked_mean(cross_entropy(logits, bins), pair_mask, MEAN_EPS, (1, 2))


def masked_msa_loss(outputs: Tensors, batch: Tensors) -> Tensor:
    """Cross-entropy at the masked positions of the clustered MSA (Supplement 1.9.9). -> [B]."""
    mask = batch["bert_mask"]
    errors = cross_entropy(outputs["masked_msa_logits"], batch["true_msa"])
    return 0.5 * (errors * mask).sum((1, 2)) / (MEAN_EPS + 0.5 * mask.sum((1, 2)))


def plddt_loss(outputs: Tensors, batch: Tensors) -> Tensor:
    """Cross-entropy of the confidence bins against the achieved lDDT-Cα (Supplement Algorithm 29). -> [B]."""
    logits, mask = outputs["lddt_logits"], batch["all_atom_mask"][:, :, CA]
    num_bins = logits.shape[-1]
    predicted, truth = outputs["final_atom_positions"].detach()[:, :, CA], batch["all_atom_positions"][:, :, CA]
    lddt = lddt_ca_per_residue(predicted, truth, mask)
    bins = torch.floor(lddt * num_bins).long().clamp(max=num_bins - 1)
    return masked_mean(cross_entropy(logits, bins), mask, MEAN_EPS, (1,)) * resolution_gate(batch["resolution"])


def experimentally_resolved_loss(outputs: Tensors, batch: Tensors) -> Tensor:
    """Binary cross-entropy of which atoms the experiment saw (Supplement 1.9.10). -> [B]."""
    exists = batch["atom37_atom_exists"]
    errors = F.binary_cross_entropy_with_logits(
        outputs["experimentally_resolved_logits"], batch["all_atom_mask"], reduction="none"
    )
    return masked_mean(errors, exists, MEAN_EPS, (1, 2)) * resolution_gate(batch["resolution"])


def cross_entropy(logits: Tensor, classes: Tensor) -> Tensor:
    """[*, C], int64 [*] -> [*]; an impossible class (a NaN that became an integer) gives NaN, never a crash."""
    num_classes = logits.shape[-1]
    possible = (classes >= 0) & (classes < num_classes)
    picked = F.log_softmax(logits, dim=-1).gather(-1, classes.clamp(0, num_classes - 1)[..., None])[..., 0]
    return torch.where(possible, -picked, torch.full_like(picked, torch.nan))


SIDE_TERMS = ("supervised_chi", "distogram", "masked_msa", "plddt_loss", "experimentally_resolved")
SIDE_CONSTANTS = (
    *(TORSION_EPS, MEAN_EPS, NORM_EPS, CHI_WEIGHT, ANGLE_NORM_WEIGHT, *RESOLUTION_RANGE_ANGSTROM),
    *(LDDT_CUTOFF_ANGSTROM, LDDT_THRESHOLDS_ANGSTROM, LDDT_EPS, DISTOGRAM_FIRST_ANGSTROM, DISTOGRAM_LAST_ANGSTROM),
)


def side_losses(outputs: Tensors, batch: Tensors, ops: Operations) -> dict[str, Tensor]:
    """``SIDE_TERMS`` of ``loss_terms``, [B] each, where ``ops`` has them in one operation; else nothing.

    Gradients of these need no ``FiniteGate``.
    """
    angles, atoms = outputs["sm_angles"], batch["all_atom_mask"]
    torsions = (batch["chi_angles_sin_cos"], batch["chi_mask"], batch["seq_mask"], batch["aatype"])
    predicted, truth = outputs["final_atom_positions"].detach(), batch["all_atom_positions"]
    groups = (
        (angles, outputs["sm_unnormalized_angles"], *torsions),
        (outputs["distogram_logits"], batch["pseudo_beta"], batch["pseudo_beta_mask"]),
        (outputs["masked_msa_logits"], batch["true_msa"], batch["bert_mask"]),
        (outputs["lddt_logits"], predicted[:, :, CA], truth[:, :, CA], atoms[:, :, CA]),
        (outputs["experimentally_resolved_logits"], atoms, batch["atom37_atom_exists"]),
    )
    values = ops.side_losses(groups, batch["resolution"], SIDE_CONSTANTS)
    return {} if values is None else dict(zip(SIDE_TERMS, values.unbind(), strict=True))


class FiniteGate:
    """Keeps a term that is not finite out of all gradients, without asking the host.

    A term that is NaN in the forward usually is NaN in the backward too, even with a zero gradient coming in, so the
    gate stands where the term's inputs come in; who adds up the terms leaves out the value. The graph stays connected:
    every parameter receives a gradient, zero if need be.
    """

    def __init__(self) -> None:
        self.finite = torch.tensor(True)  # a scalar on the device, known when the term is

    def open(self, outputs: Tensors) -> dict[str, Tensor]:
        """The same tensors, through which gradients return only if the term turns out finite."""
        return {key: self._gated(value) if value.requires_grad else value for key, value in outputs.items()}

    def _gated(self, value: Tensor) -> Tensor:
        gated = value.view_as(value)
        gated.register_hook(lambda gradient: torch.where(self.finite, gradient, 0.0))
        return gated


def loss_terms(
    weights: LossConfig, ops: Operations = REFERENCE
) -> dict[str, tuple[float, Callable[[Tensors, Tensors], Tensor]]]:
    """Name -> (weight, function) of all terms; violations only if they have a weight (they cost the most)."""
    backbone_weight, sidechain_weight = weights.fape_loss_backbone_weight, weights.fape_loss_sidechain_weight

    def fape(outputs: Tensors, batch: Tensors) -> Tensor:
        backbone, sidechain = backbone_fape(outputs, batch, ops), sidechain_fape(outputs, batch, ops)
        return backbone_weight * backbone + sidechain_weight * sidechain

    terms = {
        "fape": (weights.fape_loss_weight, fape),
        "supervised_chi": (weights.supervised_chi_loss_weight, supervised_chi_loss),
        "distogram": (weights.distogram_loss_weight, distogram_loss),
        "masked_msa": (weights.masked_msa_loss_weight, masked_msa_loss),
        "plddt_loss": (weights.plddt_loss_weight, plddt_loss),
        "experimentally_resolved": (weights.experimentally_resolved_loss_weight, experimentally_resolved_loss),
    }
    if weights.violation_loss_weight:
        terms["violation"] = (weights.violation_loss_weight, violation_loss)
    return terms


def alphafold_loss(outputs: Tensors, batch: Tensors, weights: LossConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """``total_of_terms`` with the terms and weights that the configuration asks for."""
    return total_of_terms(outputs, batch, loss_terms(weights))


def total_of_terms(
    outputs: Tensors, batch: Tensors, terms: Terms, ops: Operations = REFERENCE
) -> tuple[Tensor, dict[str, Tensor]]:
    """The scalar to minimise, and what to log.

    outputs: of ``AlphaFold.forward``; batch: fp32 features of the supervised slice; ops: may have several terms in one
    operation, which then takes the place of their functions. The total is the mean over samples
    of sqrt(number of residues in the crop) times the weighted sum of terms. A term that is NaN or infinite for any
    sample of this batch counts as zero; it is counted in ``non_finite_terms`` and logged as it is.

    Returns:
        total (scalar with graph) and detached scalars on the device: the unweighted mean of every term,
        ``weighted_total_loss`` (without the square root), ``scaled_weighted_total_loss``, ``non_finite_terms``.
    """
    together = side_losses(outputs, batch, ops)
    gates = {name: FiniteGate() for name in terms if name not in together}
    alone = {name: terms[name][1](gate.open(outputs), batch) for name, gate in gates.items()}
    values = torch.stack([(together | alone)[name] for name in terms])
    finite = torch.isfinite(values.detach()).all(1)
    for name, own in zip(terms, finite.unbind(), strict=True):
        if name in gates:
            gates[name].finite = own
    weights = _weights(tuple(weight for weight, _ in terms.values()), values.device)
    per_sample = (torch.where(finite[:, None], values, 0.0) * weights[:, None]).sum(0)
    scale = torch.sqrt(batch["seq_length"].clamp(max=batch["aatype"].shape[1]).float())
    total = (scale * per_sample).mean()
    logged = dict(zip(terms, values.detach().mean(1).unbind(), strict=True))
    logged["weighted_total_loss"] = per_sample.detach().mean()
    logged["scaled_weighted_total_loss"] = total.detach()
    logged["non_finite_terms"] = (~finite).sum().float()
    return total, logged


@cache
def _weights(weights: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(weights, device=device)
