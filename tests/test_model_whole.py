"""The small model as a whole against the reference: outputs, losses, gradients, evaluation."""

import pytest
import torch

from parity import golden, training, whole
from scalefold.config import LossConfig
from scalefold.model import AlphaFold, loss, select_slice


@pytest.fixture(scope="module", params=["r0", "r2"])
def errors(request: pytest.FixtureRequest) -> whole.WholeErrors:
    return whole.measure(request.param)


def test_all_outputs_equal_the_reference(errors: whole.WholeErrors) -> None:
    assert len(errors.outputs) == 18
    assert {name: error for name, error in errors.outputs.items() if error > 2e-4} == {}


def test_all_losses_and_the_total_equal_the_reference(errors: whole.WholeErrors) -> None:
    assert len(errors.losses) == 10
    assert {name: error for name, error in errors.losses.items() if error > 2e-5} == {}


def test_stored_gradients_equal_the_reference(errors: whole.WholeErrors) -> None:
    assert len(errors.gradients) == 33
    assert {name: error for name, error in errors.gradients.items() if error > 5e-3} == {}


def test_gradient_norms_of_all_parameters_equal_the_reference(errors: whole.WholeErrors) -> None:
    assert len(errors.gradient_norms) == 580
    assert {name: error for name, error in errors.gradient_norms.items() if error > 5e-3} == {}


def test_evaluation_of_an_uncropped_chain_equals_the_reference() -> None:
    found = whole.measure_evaluation()
    assert set(found) == {"final_atom_positions", "plddt", "single", "lddt_ca"}
    assert {name: error for name, error in found.items() if error > 2e-4} == {}


def test_four_training_steps_equal_the_reference() -> None:
    """Losses, norm, rate, weights and averaged weights after each step: recycling, clip, Adam, average."""
    for step, errors in enumerate(training.measure(), start=1):
        assert errors.learning_rate == 0.0, step
        assert {name: error for name, error in errors.losses.items() if error > 2e-5} == {}, step
        assert errors.grad_norm <= 1e-4, step
        assert {name: error for name, error in errors.parameters.items() if error > 2e-5} == {}, step
        assert {name: error for name, error in errors.averages.items() if error > 2e-5} == {}, step


def test_checkpointed_blocks_give_the_same_gradients_with_dropout() -> None:
    gradients = []
    for recompute in (False, True):
        model = golden.small_model().train()
        model.checkpoint_blocks = recompute
        assert model.evoformer_stack.checkpoint_blocks is recompute
        assert model.template_pair_stack.checkpoint_blocks is recompute
        torch.manual_seed(5)
        step(model)
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, rtol=0, atol=0)


def step(model: AlphaFold) -> None:
    batch = golden.small_batch()
    total, _ = loss.alphafold_loss(model(batch, 2), select_slice(batch, 1), LossConfig())
    total.backward()


def test_dropout_is_active_in_the_passes_without_gradient() -> None:
    """Two seeds that differ only before the last pass must give different results."""
    model, batch = golden.small_model().train(), golden.small_batch()
    recycled = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        with torch.no_grad():
            recycled.append(model.iteration(select_slice(batch, 0), model.nothing_recycled(batch))[1])
    assert not torch.equal(recycled[0].z, recycled[1].z)
    torch.manual_seed(1)
    outputs = model(batch, 2)
    torch.manual_seed(1)
    with torch.no_grad():
        first = model.iteration(select_slice(batch, 0), model.nothing_recycled(batch))[1]
    again, _ = model.iteration(select_slice(batch, 1), first)
    assert torch.equal(outputs["pair"], again["pair"])


def test_without_dropout_templates_are_read_once_and_every_bit_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = golden.small_model().eval(), golden.small_batch()
    read, count = model.read_templates, []
    monkeypatch.setattr(model, "read_templates", lambda *given: (count.append(1), read(*given))[1])
    found = model.predict(batch, 3)
    assert len(count) == 1
    recycled = model.nothing_recycled(batch)
    for index in range(3):
        expected, recycled = model.iteration(select_slice(batch, index), recycled)
    assert len(count) == 4, "a pass by itself reads them"
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    model.train()(batch, 2)
    assert len(count) == 6, "with dropout each pass reads them"


def test_a_prediction_is_the_whole_output_without_that_of_the_heads() -> None:
    model, batch = golden.small_model().eval(), golden.small_batch()
    whole_output = model(batch, 2)
    found = model.predict(batch, 2)
    assert set(whole_output) - set(found) == set(model.auxiliary_heads(found))
    assert all(torch.equal(whole_output[name], value) for name, value in found.items())


def test_only_the_last_pass_carries_gradients() -> None:
    model, batch = golden.small_model(), golden.small_batch()
    batch["msa_feat"].requires_grad_()
    model(batch, 3)["sm_positions"].sum().backward()
    gradient = batch["msa_feat"].grad
    assert gradient is not None
    assert not gradient[..., :2].any()
    assert gradient[..., 2].any()


def test_every_parameter_receives_a_gradient() -> None:
    model = golden.small_model().train()
    step(model)
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_a_batch_without_template_slots_equals_one_with_empty_slots() -> None:
    model, batch = golden.small_model(), golden.small_batch()
    bare = {key: value[:, :0] if key.startswith("template_") else value for key, value in batch.items()}
    outputs = model(bare, 1)
    absent = batch | {"template_mask": torch.zeros_like(batch["template_mask"])}
    absent["template_torsion_angles_mask"] = torch.zeros_like(batch["template_torsion_angles_mask"])
    expected = model(absent, 1)
    # Columns of padded residues have no key left and weigh all rows alike: there, and only there, their number shows.
    mask = batch["seq_mask"][:, None, :, None, None]
    torch.testing.assert_close(outputs["sm_positions"] * mask, expected["sm_positions"] * mask, rtol=1e-4, atol=1e-4)
