"""The small model, its losses and the losses' parts against the reference: named relative errors."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from parity import golden
from scalefold.config import LossConfig
from scalefold.model import loss, metrics, select_slice, violations
from scalefold.model.rigid import Rigid

PASSES = {"r0": 1, "r2": 3}
Term = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Tensor]
TERMS: dict[str, Term] = {
    "backbone_fape": loss.backbone_fape,
    "sidechain_fape": loss.sidechain_fape,
    "supervised_chi": loss.supervised_chi_loss,
    "distogram": loss.distogram_loss,
    "masked_msa": loss.masked_msa_loss,
    "plddt": loss.plddt_loss,
    "experimentally_resolved": loss.experimentally_resolved_loss,
    "violation": violations.violation_loss,
}


@dataclass(frozen=True)
class WholeErrors:
    """Relative errors by name."""

    outputs: dict[str, float]
    losses: dict[str, float]
    gradients: dict[str, float]
    gradient_norms: dict[str, float]


def measure(run: str) -> WholeErrors:
    """Forward, losses and gradients of the small model with the passes of ``run`` ("r0" or "r2")."""
    arrays, passes = golden.load(golden.locate(f"model_{run}.npz")), PASSES[run]
    norms = json.loads(golden.locate(f"grad_norms_{run}.json").read_text())
    model, batch = golden.small_model(), golden.small_batch()
    outputs, supervised = model(batch, passes), select_slice(batch, passes - 1)
    total, terms = loss.alphafold_loss(outputs, supervised, LossConfig())
    total.backward()
    values = terms | {"violation": violations.violation_loss(outputs, supervised).detach().mean()}
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return WholeErrors(
        outputs=compare(outputs, golden.part(arrays, "out")),
        losses=compare(values, golden.part(arrays, "loss_mean"))
        | compare({"total": total}, {"total": arrays["total"]}),
        gradients=compare(gradients, golden.part(arrays, "grad")),
        gradient_norms=_norm_errors(gradients, norms),
    )


def compare(values: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """Relative error of every expected value, by name."""
    return {name: golden.relative_error(values[name], value) for name, value in expected.items()}


def _norm_errors(gradients: Mapping[str, Tensor], norms: Mapping[str, float]) -> dict[str, float]:
    """Relative to the norm itself, or to 1e-5 of the largest norm where the true gradient is zero but for rounding."""
    floor = 1e-5 * max(norms.values())
    assert set(gradients) == set(norms)
    return {name: abs(gradients[name].norm().item() - norm) / max(norm, floor) for name, norm in norms.items()}


def measure_terms() -> dict[str, tuple[float, float]]:
    """Per-sample value and gradient errors of every loss term, on the reference's own outputs."""
    arrays, outputs = golden.load(golden.locate("losses.npz")), reference_outputs()
    batch = select_slice(golden.small_batch(), 2)
    errors = {}
    for name, term in TERMS.items():
        leaves = {key: value.clone().requires_grad_() for key, value in outputs.items()}
        values = term(leaves, batch)
        values.sum().backward()
        gradients = golden.part(arrays, f"{name}/grad")
        errors[name] = (
            golden.relative_error(values, arrays[f"{name}/value"]),
            max(golden.relative_error(leaves[key].grad, expected) for key, expected in gradients.items()),
        )
    return errors


def reference_outputs() -> dict[str, Tensor]:
    """What the reference's small model put out with two recycles."""
    return golden.part(golden.load(golden.locate("model_r2.npz")), "out")


def measure_fape() -> dict[str, float]:
    """Errors of the bare frame aligned point error and of its gradient by the predicted points."""
    a, errors = golden.load(golden.locate("fape_raw.npz")), {}
    frames, target = Rigid.from_matrix(a["pred_frames"]), Rigid.from_matrix(a["target_frames"])
    for name, gradient, clamped in (("clamped10", "grad_clamped", 1.0), ("unclamped", "grad_unclamped", 0.0)):
        points = a["pred_pos"].clone().requires_grad_()
        value = loss.frame_aligned_point_error(
            frames, target, a["frames_mask"], points, a["target_pos"], a["pos_mask"], torch.tensor(clamped)
        )
        value.sum().backward()
        errors[name] = golden.relative_error(value, a[name])
        errors[gradient] = golden.relative_error(points.grad, a[gradient])
    return errors


@torch.no_grad()
def measure_evaluation() -> dict[str, float]:
    """Errors of the small model in evaluation: uncropped chain, four passes."""
    arrays = golden.load(golden.locate("model_eval.npz"))
    features = golden.part(golden.load(golden.locate("features.npz")), "sample0/eval")
    batch = golden.canonical({key: value[None] for key, value in features.items()})
    outputs = golden.small_model()(batch)
    errors = compare(outputs, golden.part(arrays, "out"))
    score = metrics.prediction_lddt_ca(outputs["final_atom_positions"], batch)
    return errors | {"lddt_ca": golden.relative_error(score, arrays["lddt_ca"])}


@torch.no_grad()
def measure_structure_and_heads() -> dict[str, dict[str, float]]:
    """Errors of the structure module and of the heads alone, fed with the reference's representations."""
    model, batch, expected = golden.small_model(), select_slice(golden.small_batch(), 2), reference_outputs()
    structure = model.structure_module(expected["single"], expected["pair"], batch["seq_mask"], batch["aatype"])
    heads = model.auxiliary_heads(expected)
    return {
        "structure_module": compare(structure._asdict(), {key: expected[key] for key in structure._fields}),
        "auxiliary_heads": compare(heads, {key: expected[key] for key in heads}),
    }
