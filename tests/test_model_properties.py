"""Symmetries and independences that the mathematics demands, whatever the numbers."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from parity import golden, whole
from scalefold.config import LossConfig, ModelConfig
from scalefold.model import AlphaFold, loss, select_slice, violations
from scalefold.model.rigid import Rigid, quaternion_to_rotation
from scalefold.model.triangle import TriangleAttention, TriangleMultiplication, around_ending_node

Features = dict[str, Tensor]
ROTATABLE = ("backbone_rigid_tensor", "rigidgroups_gt_frames", "rigidgroups_alt_gt_frames")
MOVABLE = ("all_atom_positions", "atom14_gt_positions", "atom14_alt_gt_positions", "pseudo_beta")
seeds = st.integers(0, 2**31)


def random_motion(seed: int) -> Rigid:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(4, generator=generator, dtype=torch.float64)
    return Rigid(quaternion_to_rotation(q / q.norm()).float(), 10.0 * torch.randn(3, generator=generator))


@settings(max_examples=10, deadline=None)
@given(seed=seeds)
def test_turning_and_moving_the_truth_changes_no_loss(seed: int) -> None:
    outputs, batch, motion = whole.reference_outputs(), select_slice(golden.small_batch(), 2), random_motion(seed)
    moved = dict(batch)
    for key in MOVABLE:
        moved[key] = motion.apply(batch[key])
    for key in ROTATABLE:
        moved[key] = motion.compose(Rigid.from_matrix(batch[key])).to_matrix()
    expected, _ = loss.alphafold_loss(outputs, batch, LossConfig())
    found, _ = loss.alphafold_loss(outputs, moved, LossConfig())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


@settings(max_examples=10, deadline=None)
@given(seed=seeds)
def test_turning_and_moving_the_prediction_changes_no_violation(seed: int) -> None:
    outputs, batch = whole.reference_outputs(), select_slice(golden.small_batch(), 2)
    expected = violations.violation_loss(outputs, batch)
    moved = outputs | {"sm_positions": random_motion(seed).apply(outputs["sm_positions"])}
    torch.testing.assert_close(violations.violation_loss(moved, batch), expected, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def model() -> AlphaFold:
    return golden.small_model()


@torch.no_grad()
def predict(model: AlphaFold, features: Features) -> Features:
    outputs, _ = model.iteration(features, model.nothing_recycled(features))
    return outputs | model.auxiliary_heads(outputs)


def assert_same_where_real(found: Features, expected: Features, features: Features) -> None:
    mask = features["seq_mask"]
    pair = (mask[:, :, None] * mask[:, None])[..., None]
    msa = features["msa_mask"][..., None]
    for name, keep in (("single", mask[..., None]), ("pair", pair), ("msa", msa)):
        scale = (expected[name] * keep).abs().max()
        assert ((found[name] - expected[name]) * keep).abs().max() <= 5e-5 * scale, name
    positions = expected["final_atom_positions"] * mask[..., None, None]
    difference = (found["final_atom_positions"] - expected["final_atom_positions"]) * mask[..., None, None]
    assert difference.abs().max() <= 1e-4 * positions.abs().max()


PADDED_TAIL = slice(27, 32)  # sample 1 has 27 residues


def test_what_stands_at_padded_positions_has_no_influence(model: AlphaFold) -> None:
    features = select_slice(golden.small_batch(), 0)
    garbage, generator = {key: value.clone() for key, value in features.items()}, torch.Generator().manual_seed(1)
    for key, axis in (("target_feat", 0), ("msa_feat", 1), ("extra_has_deletion", 1), ("extra_deletion_value", 1)):
        part = garbage[key][1].narrow(axis, 27, 5)
        part.copy_(torch.rand(part.shape, generator=generator))
    garbage["extra_msa"][1, :, PADDED_TAIL] = 7
    garbage["residue_index"][1, PADDED_TAIL] = 999
    assert_same_where_real(predict(model, garbage), predict(model, features), features)


def test_masked_msa_rows_and_positions_have_no_influence(model: AlphaFold) -> None:
    features = select_slice(golden.small_batch(), 0)
    features = features | {
        "msa_mask": features["msa_mask"].clone(),
        "extra_msa_mask": features["extra_msa_mask"].clone(),
    }
    features["msa_mask"][:, 3] = 0.0
    features["extra_msa_mask"][:, 5:9] = 0.0
    garbage = features | {"msa_feat": features["msa_feat"].clone(), "extra_msa": features["extra_msa"].clone()}
    garbage["msa_feat"][:, 3] = 0.7
    garbage["extra_msa"][:, 5:9] = 11
    assert_same_where_real(predict(model, garbage), predict(model, features), features)


def test_masked_template_has_no_influence(model: AlphaFold) -> None:
    features = select_slice(golden.small_batch(), 0)
    masked = features | {key: features[key].clone() for key in ("template_mask", "template_torsion_angles_mask")}
    masked["template_mask"][:, 1] = 0.0
    masked["template_torsion_angles_mask"][:, 1] = 0.0
    garbage = masked | {key: masked[key].clone() for key in ("template_pseudo_beta", "template_aatype")}
    garbage["template_pseudo_beta"][:, 1] += 3.0 * torch.randn(3)
    garbage["template_pseudo_beta"][:, 1, ::2] *= 0.5
    garbage["template_aatype"][:, 1] = 4
    assert_same_where_real(predict(model, garbage), predict(model, masked), masked)


@settings(max_examples=5, deadline=None)
@given(seed=seeds)
def test_order_of_msa_rows_does_not_matter_beyond_the_first(seed: int) -> None:
    """Clusters behind the query and all extra sequences may be permuted; the MSA output is permuted with them."""
    model, features = golden.small_model(), select_slice(golden.small_batch(), 0)
    generator = torch.Generator().manual_seed(seed)
    clusters = torch.cat((torch.zeros(1, dtype=torch.long), 1 + torch.randperm(5, generator=generator)))
    extra = torch.randperm(16, generator=generator)
    permuted = dict(features)
    for key in ("msa_feat", "msa_mask"):
        permuted[key] = features[key][:, clusters]
    for key in ("extra_msa", "extra_has_deletion", "extra_deletion_value", "extra_msa_mask"):
        permuted[key] = features[key][:, extra]
    expected, found = predict(model, features), predict(model, permuted)
    expected["msa"] = expected["msa"][:, clusters]
    assert_same_where_real(found, expected, permuted)


def test_order_of_templates_does_not_matter(model: AlphaFold) -> None:
    features = select_slice(golden.small_batch(), 0)
    swapped = {key: value.flip(1) if key.startswith("template_") else value for key, value in features.items()}
    assert_same_where_real(predict(model, swapped), predict(model, features), features)


def test_batch_of_two_equals_two_batches_of_one(model: AlphaFold) -> None:
    features = select_slice(golden.small_batch(), 0)
    together = predict(model, features)
    for sample in range(2):
        alone = {key: value[sample : sample + 1] for key, value in features.items()}
        expected = {key: value[sample : sample + 1] for key, value in together.items()}
        assert_same_where_real(predict(model, alone), expected, alone)


def test_total_loss_of_two_samples_is_the_mean_of_their_own() -> None:
    outputs, batch = whole.reference_outputs(), select_slice(golden.small_batch(), 2)
    together, _ = loss.alphafold_loss(outputs, batch, LossConfig())
    alone = [
        loss.alphafold_loss(
            {key: value[i : i + 1] for key, value in outputs.items()},
            {key: value[i : i + 1] for key, value in batch.items()},
            LossConfig(),
        )[0]
        for i in range(2)
    ]
    torch.testing.assert_close(together, (alone[0] + alone[1]) / 2)


@settings(max_examples=10, deadline=None)
@given(seed=seeds, num_residues=st.integers(2, 9))
def test_incoming_triangles_are_outgoing_ones_of_the_transposed_edges(seed: int, num_residues: int) -> None:
    """Transposing all edges turns sum_k a_ki b_kj into sum_k a_ik b_jk (Supplement Algorithms 11 and 12)."""
    generator = torch.Generator().manual_seed(seed)
    outgoing, incoming = (TriangleMultiplication(8, 5, out, 0.0).eval() for out in (True, False))
    for p, twin in zip(outgoing.parameters(), incoming.parameters(), strict=True):
        value = 0.3 * torch.randn(p.shape, generator=generator)
        p.data, twin.data = value, value.clone()
    z = torch.randn(1, num_residues, num_residues, 8, generator=generator)
    mask = (torch.rand(1, num_residues, num_residues, generator=generator) > 0.3).float()
    a, b, product = operands_and_product(outgoing, z, mask)
    a_t, b_t, product_of_transposed = operands_and_product(incoming, z.transpose(1, 2), mask.transpose(1, 2))
    torch.testing.assert_close(a_t, a.transpose(-1, -2))
    torch.testing.assert_close(b_t, b.transpose(-1, -2))
    torch.testing.assert_close(product_of_transposed, product)


def operands_and_product(module: TriangleMultiplication, z: Tensor, mask: Tensor) -> list[Tensor]:
    seen: list[Tensor] = []
    module.rows_to_channels.register_forward_hook(lambda _, args, out: seen.extend(out))
    module.channels_to_rows.register_forward_hook(lambda _, args, out: seen.append(out))
    module(z, mask)
    return seen


@pytest.mark.parametrize("node", ["starting", "ending"])
def test_masked_edges_have_no_influence_on_triangle_attention(node: str) -> None:
    """With a mask that is not symmetric, unlike the model's own: the ending node must transpose it too."""
    generator = torch.Generator().manual_seed(0)
    module = TriangleAttention(8, 4, 2, 0.0).eval()
    for p in module.parameters():
        p.data = torch.randn(p.shape, generator=generator)
    module.linear.weight.data.zero_()  # the bias sees all edges, masked or not
    z, mask = torch.randn(1, 6, 6, 8, generator=generator), torch.ones(1, 6, 6)
    mask[0, 1, 4] = 0.0
    garbage = torch.where(mask[..., None] > 0, z, torch.randn(z.shape, generator=generator))
    run = module if node == "starting" else partial(around_ending_node, module)
    expected, found = run(z, mask), run(garbage, mask)
    torch.testing.assert_close(found * mask[..., None], expected * mask[..., None])
    everything = torch.ones_like(mask)
    unmasked, unmasked_garbage = run(z, everything), run(garbage, everything)
    assert not torch.allclose(unmasked * mask[..., None], unmasked_garbage * mask[..., None])


def test_distogram_is_symmetric(model: AlphaFold) -> None:
    logits = predict(model, select_slice(golden.small_batch(), 0))["distogram_logits"]
    assert torch.equal(logits, logits.transpose(1, 2))


@settings(max_examples=6, deadline=None)
@given(seed=seeds)
def test_dropout_of_templates_and_samples_is_drawn_independently(seed: int) -> None:
    """Two equal samples must not share a mask, and every mask is shared along exactly one axis."""
    config = ModelConfig()
    module = TriangleMultiplication(8, 5, True, config.evoformer.pair_dropout).train()
    for p in module.parameters():
        p.data = torch.full_like(p, 0.1)
    torch.manual_seed(seed)
    z = torch.ones(4, 6, 6, 8)
    update = module(z, torch.ones(4, 6, 6)) - z
    dropped = update == 0
    assert torch.equal(dropped, dropped[:, :1].expand_as(dropped))
    assert not torch.equal(dropped[0], dropped[1])
    assert 0.02 < dropped[:, 0].float().mean().item() < 0.6
