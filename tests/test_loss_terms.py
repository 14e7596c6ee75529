"""Loss terms against the reference, and what happens when one of them is not finite."""

import numpy as np
import pytest
import torch

from parity import golden, whole
from scalefold.config import LossConfig
from scalefold.data import residues
from scalefold.kernels import reference
from scalefold.model import loss, metrics, select_slice


@pytest.fixture(scope="module")
def term_errors() -> dict[str, tuple[float, float]]:
    return whole.measure_terms()


@pytest.mark.parametrize("name", list(whole.TERMS))
def test_term_and_its_gradients_equal_the_reference(name: str, term_errors: dict[str, tuple[float, float]]) -> None:
    value, gradient = term_errors[name]
    assert value <= 2e-5
    assert gradient <= 1e-4


def test_clamped_and_unclamped_backbone_errors_equal_the_reference() -> None:
    arrays, outputs = golden.load(golden.locate("losses.npz")), whole.reference_outputs()
    batch = select_slice(golden.small_batch(), 2)
    for name, clamped in (("backbone_fape_all_clamped", 1.0), ("backbone_fape_unclamped", 0.0)):
        fixed = batch | {"use_clamped_fape": torch.full((2,), clamped)}
        assert golden.relative_error(loss.backbone_fape(outputs, fixed), arrays[f"{name}/value"]) <= 2e-5


def test_bare_frame_aligned_point_error_equals_the_reference() -> None:
    assert {name: error for name, error in whole.measure_fape().items() if error > 2e-5} == {}


@pytest.mark.parametrize("run", ["r0", "r2"])
def test_renaming_of_ambiguous_atoms_equals_the_reference(run: str) -> None:
    arrays = golden.load(golden.locate(f"model_{run}.npz"))
    batch = select_slice(golden.small_batch(), whole.PASSES[run] - 1)
    renamed = loss.rename_symmetric_atoms(arrays["out/sm_positions"][:, -1], batch)
    assert arrays["aux/alt_naming_is_better"].any()
    assert torch.equal(renamed.use_alternative.float(), arrays["aux/alt_naming_is_better"])
    assert torch.equal(renamed.positions, arrays["aux/renamed_atom14_gt_positions"])
    assert torch.equal(renamed.exists, arrays["aux/renamed_atom14_gt_exists"])


def test_confidence_loss_near_the_native_structure_equals_the_reference() -> None:
    arrays, outputs = golden.load(golden.locate("losses.npz")), whole.reference_outputs()
    batch = select_slice(golden.small_batch(), 2) | {"resolution": torch.full((2,), 2.0)}
    outputs["final_atom_positions"] = arrays["lddt_near/pred"]
    assert golden.relative_error(loss.plddt_loss(outputs, batch), arrays["lddt_near/plddt_loss"]) <= 2e-5


def test_ambiguous_slots_are_those_of_the_residue_tables() -> None:
    slots = np.flatnonzero(residues.ATOM14_IS_AMBIGUOUS.any(0))
    assert list(slots) == list(range(reference.FIRST_AMBIGUOUS, reference.LAST_AMBIGUOUS))


def test_half_turn_torsions_are_those_of_the_residue_tables() -> None:
    periodic = loss.chi_pi_periodic(torch.arange(21)[None])[0]
    np.testing.assert_array_equal(periodic.numpy(), residues.CHI_PI_PERIODIC)


@pytest.mark.parametrize(
    ("resolution", "gate"), [(float("nan"), 0.0), (0.05, 0.0), (0.1, 1.0), (3.0, 1.0), (3.01, 0.0), (2.0, 1.0)]
)
def test_confidence_is_learnt_from_well_resolved_structures_only(resolution: float, gate: float) -> None:
    assert loss.resolution_gate(torch.tensor([resolution])).item() == gate


def test_violations_enter_the_total_only_with_a_weight() -> None:
    outputs, batch = whole.reference_outputs(), select_slice(golden.small_batch(), 2)
    total, terms = loss.alphafold_loss(outputs, batch, LossConfig())
    assert "violation" not in terms
    with_violation, terms = loss.alphafold_loss(outputs, batch, LossConfig(violation_loss_weight=1.0))
    value = loss.violation_loss(outputs, batch)
    scale = torch.sqrt(batch["seq_length"].clamp(max=32).float())
    torch.testing.assert_close(with_violation - total, (scale * value).mean())


BROKEN = {
    "fape": "backbone_rigid_tensor",
    "supervised_chi": "chi_angles_sin_cos",
    "distogram": "pseudo_beta_mask",
    "masked_msa": "bert_mask",
}


@pytest.mark.parametrize("term", list(BROKEN))
def test_a_term_that_is_not_finite_vanishes_with_its_gradients_and_is_counted(term: str) -> None:
    """The other terms give exactly what they give alone, for all samples, and every output keeps a gradient."""
    batch, outputs = select_slice(golden.small_batch(), 2), whole.reference_outputs()
    broken = batch | {BROKEN[term]: batch[BROKEN[term]].clone()}
    broken[BROKEN[term]][0].flatten()[0] = torch.nan
    weights = LossConfig(violation_loss_weight=0.0)
    silenced = weights.model_copy(update={f"{term}_loss_weight": 0.0})
    total, terms, gradients = gradients_of(outputs, broken, weights)
    expected, _, expected_gradients = gradients_of(outputs, batch, silenced)
    assert terms["non_finite_terms"].item() == 1.0
    assert torch.isnan(terms[term])
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=0)
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=1e-9)


def gradients_of(outputs, batch, weights):
    leaves = {key: value.clone().requires_grad_() for key, value in outputs.items()}
    total, terms = loss.alphafold_loss(leaves, batch, weights)
    total.backward()
    used = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    assert len(used) >= 8
    return total.detach(), terms, used


def test_an_infinite_prediction_leaves_no_trace_in_the_gradients() -> None:
    outputs, batch = whole.reference_outputs(), select_slice(golden.small_batch(), 2)
    outputs["distogram_logits"][1, 3, 4, 5] = torch.inf
    total, terms, gradients = gradients_of(outputs, batch, LossConfig())
    assert torch.isfinite(total)
    assert terms["non_finite_terms"].item() == 1.0
    assert not gradients["distogram_logits"].any()
    assert all(torch.isfinite(g).all() for g in gradients.values())


def test_a_finite_batch_reports_no_broken_term() -> None:
    _, terms = loss.alphafold_loss(whole.reference_outputs(), select_slice(golden.small_batch(), 2), LossConfig())
    assert terms["non_finite_terms"].item() == 0.0


def test_impossible_class_gives_nan_not_a_crash() -> None:
    values = loss.cross_entropy(torch.zeros(2, 3), torch.tensor([5, 1]))
    assert torch.isnan(values[0])
    assert values[1].item() == pytest.approx(np.log(3))


def test_confidence_target_of_a_perfect_prediction_is_the_last_bin() -> None:
    batch = select_slice(golden.small_batch(), 2)
    truth = batch["all_atom_positions"][:, :, metrics.CA]
    score = metrics.lddt_ca_per_residue(truth, truth, batch["all_atom_mask"][:, :, metrics.CA])
    torch.testing.assert_close(score, torch.ones_like(score))
