"""lDDT-Cα against the reference, and its properties; superposition."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parity import golden
from scalefold.model import metrics, select_slice
from scalefold.model.rigid import Rigid, quaternion_to_rotation


def random_rotation(generator: torch.Generator) -> torch.Tensor:
    q = torch.randn(4, generator=generator, dtype=torch.float64)
    return quaternion_to_rotation(q / q.norm()).float()


def test_pooled_and_per_residue_scores_equal_the_reference() -> None:
    arrays = golden.load(golden.locate("losses.npz"))
    batch = select_slice(golden.small_batch(), 2)
    truth, mask = batch["all_atom_positions"][:, :, 1], batch["all_atom_mask"][:, :, 1]
    far = golden.load(golden.locate("model_r2.npz"))["out/final_atom_positions"][:, :, 1]
    near = arrays["lddt_near/pred"][:, :, 1]
    for predicted, pooled, each in (
        (far, "lddt_ca_global", "lddt_ca_per_residue"),
        (near, "lddt_near/global", "lddt_near/per_residue"),
    ):
        assert golden.relative_error(metrics.lddt_ca(predicted, truth, mask), arrays[pooled]) <= 1e-6
        found = metrics.lddt_ca_per_residue(predicted, truth, mask)
        assert golden.relative_error(found * mask, arrays[each] * mask) <= 1e-6


def test_score_is_pooled_over_pairs_not_averaged_over_residues() -> None:
    """Two close residues that are wrong and a crowded group that is right weigh by their number of pairs."""
    truth = torch.zeros(1, 6, 3)
    truth[0, :, 0] = torch.tensor([0.0, 1.0, 2.0, 3.0, 100.0, 103.0])
    predicted = truth.clone()
    predicted[0, 5, 0] = 120.0
    mask = torch.ones(1, 6)
    assert metrics.lddt_ca(predicted, truth, mask).item() == pytest.approx(12 / 14)
    assert metrics.lddt_ca_per_residue(predicted, truth, mask).mean().item() == pytest.approx(4 / 6)


def test_scores_are_products_with_the_reciprocal_as_the_reference_rounds_them() -> None:
    """A residue with 25 neighbours that meets 10 of 100 thresholds lies below a tenth, in bin 4 of 50 and not in 5."""
    around = torch.tensor([[x, y, z] for x in (-3.0, 0.0, 3.0) for y in (-3.0, 0.0, 3.0) for z in (-3.0, 0.0, 3.0)])
    truth = torch.cat((torch.zeros(1, 3), around[around.abs().sum(-1) > 0][:25]))[None]
    predicted = truth * 100.0
    met = torch.tensor([0.1] * 2 + [1.5])  # four thresholds each, then two
    predicted[0, 1:4] = truth[0, 1:4] * (1.0 + met / truth[0, 1:4].norm(dim=-1))[:, None]
    mask = torch.ones(1, 26)
    score, counted = metrics.lddt_pairs(predicted, truth, mask)
    assert (score[0, 0].sum().item(), counted[0, 0].sum().item()) == (2.5, 25.0)
    found = metrics.lddt_ca_per_residue(predicted, truth, mask)[0, 0]
    assert found.item() == 0.09999999403953552
    assert torch.floor(found * 50).item() == 4.0


@pytest.mark.parametrize("pooled", [False, True], ids=["per residue", "pooled"])
def test_every_score_has_the_bits_of_the_reciprocal_first(pooled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    count, score = (x.ravel() for x in np.mgrid[0:45, 0 : 4 * 44 + 1].astype(np.float32))
    score /= 4
    expected = np.float32(1) / (np.float32(1e-8) + count) * (np.float32(1e-8) + score)
    pairs = [torch.from_numpy(x)[(...,) + (None,) * (1 + pooled)] for x in (score, count)]
    monkeypatch.setattr(metrics, "lddt_pairs", lambda *_: pairs)
    found = (metrics.lddt_ca if pooled else metrics.lddt_ca_per_residue)(*(torch.empty(0),) * 3)
    assert found.dtype == torch.float32
    assert np.array_equal(found.numpy(), expected)


def test_thresholds_cutoff_and_self_pairs() -> None:
    truth = torch.tensor([[[0.0, 0.0, 0.0], [5.0, 0.0, 0.0], [0.0, 14.9, 0.0], [0.0, -15.1, 0.0]]])
    mask = torch.tensor([[1.0, 1.0, 0.0, 1.0]])
    for shift, score in ((0.4, 1.0), (0.6, 0.75), (1.5, 0.5), (3.0, 0.25), (4.5, 0.0)):
        predicted = truth.clone()
        predicted[0, 1, 0] += shift
        assert metrics.lddt_ca(predicted, truth, mask).item() == pytest.approx(score, abs=1e-6)


def test_a_chain_without_pairs_scores_one() -> None:
    truth = torch.zeros(1, 3, 3)
    assert metrics.lddt_ca(truth, truth, torch.tensor([[0.0, 1.0, 0.0]])).item() == 1.0


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), num_residues=st.integers(2, 20))
def test_rotating_and_moving_the_prediction_changes_nothing(seed: int, num_residues: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    truth = 8.0 * torch.randn(1, num_residues, 3, generator=generator)
    predicted = truth + torch.randn(1, num_residues, 3, generator=generator)
    mask = (torch.rand(1, num_residues, generator=generator) > 0.2).float()
    motion = Rigid(random_rotation(generator), 5.0 * torch.randn(3, generator=generator))
    score, moved = metrics.lddt_ca(predicted, truth, mask), metrics.lddt_ca(motion.apply(predicted), truth, mask)
    assert abs(score - moved).item() <= 0.02  # one pair may sit on a threshold
    restored, rmsd = metrics.superpose(motion.apply(predicted), predicted, torch.ones_like(mask))
    assert rmsd.item() <= 1e-4
    torch.testing.assert_close(restored, predicted, atol=2e-4, rtol=0)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_masked_residues_and_order_have_no_influence(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    truth, predicted = (8.0 * torch.randn(1, 12, 3, generator=generator) for _ in range(2))
    mask = (torch.rand(1, 12, generator=generator) > 0.3).float()
    score = metrics.lddt_ca(predicted, truth, mask)
    garbage = torch.where(mask[..., None] > 0, predicted, predicted + 50.0)
    assert torch.equal(metrics.lddt_ca(garbage, truth, mask), score)
    order = torch.randperm(12, generator=generator)
    torch.testing.assert_close(metrics.lddt_ca(predicted[:, order], truth[:, order], mask[:, order]), score)


def test_superposition_never_mirrors() -> None:
    points = torch.tensor([[[0.0, 0, 0], [1.0, 0, 0], [0, 2.0, 0], [0, 0, 3.0]]])
    mirrored = points * torch.tensor([1.0, 1.0, -1.0])
    _, rmsd = metrics.superpose(mirrored, points, torch.ones(1, 4))
    assert rmsd.item() > 0.5


def test_superposition_leaves_masked_points_out() -> None:
    points = torch.randn(1, 5, 3, generator=torch.Generator().manual_seed(0))
    turned = Rigid(quaternion_to_rotation(torch.tensor([math.cos(0.3), 0.0, math.sin(0.3), 0.0])), torch.ones(3))
    moved = turned.apply(points)
    moved[0, 4] += 100.0
    _, rmsd = metrics.superpose(moved, points, torch.tensor([[1.0, 1, 1, 1, 0]]))
    assert rmsd.item() <= 1e-5
