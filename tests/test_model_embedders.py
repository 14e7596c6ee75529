"""Feature builders inside the model: against the reference, and at their edges."""

import pytest
import torch

from parity import golden
from scalefold.model import select_slice
from scalefold.model.embedders import InputEmbedder, RecyclingEmbedder, extra_msa_features
from scalefold.model.layers import one_hot
from scalefold.model.rigid import pseudo_beta
from scalefold.model.templates import template_angle_features, template_distogram, template_pair_features


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    return golden.load(golden.locate("feature_builders.npz"))


@pytest.fixture(scope="module")
def features() -> dict[str, torch.Tensor]:
    return select_slice(golden.small_batch(), 0)


def test_template_features_equal_the_reference(expected, features) -> None:
    pair = template_pair_features(features)
    for template in range(2):
        assert torch.equal(pair[:, template], expected[f"template_pair_feat_{template}"])
    assert torch.equal(template_angle_features(features), expected["template_angle_feat"])


def test_extra_msa_features_equal_the_reference(expected) -> None:
    assert torch.equal(extra_msa_features(select_slice(golden.small_batch(), 2)), expected["extra_msa_feat"])


def test_recycled_pseudo_beta_equals_the_reference(expected, features) -> None:
    positions = golden.load(golden.locate("model_r2.npz"))["out/final_atom_positions"]
    assert torch.equal(pseudo_beta(features["aatype"], positions), expected["pseudo_beta_of_prev"])


def test_unit_vector_channels_of_template_features_are_zero(features) -> None:
    assert not template_pair_features(features)[..., 84:87].any()


@pytest.mark.parametrize(
    ("distance", "bin_index"), [(3.0, None), (3.25, None), (3.3, 0), (20.0, 13), (20.75, None), (21.0, 14)]
)
def test_recycling_bins_are_open_intervals(distance: float, bin_index: int | None) -> None:
    points = torch.tensor([[[0.0, 0.0, 0.0], [distance, 0.0, 0.0]]])
    row = RecyclingEmbedder.distogram(points)[0, 0, 1]
    assert row.nonzero().flatten().tolist() == ([] if bin_index is None else [bin_index])


def test_template_bins_end_with_an_open_one() -> None:
    points = torch.tensor([[0.0, 0.0, 0.0], [60.0, 0.0, 0.0], [400.0, 0.0, 0.0]])
    bins = template_distogram(points)
    assert bins[0, 1].argmax().item() == 38
    assert not bins[0, 2].any()
    assert not bins[0, 0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_relative_positions_are_exact_at_any_index_and_precision(dtype: torch.dtype) -> None:
    """In bf16 integers beyond 256 would be rounded."""
    embedder = InputEmbedder(4, 4, 32).to(dtype)
    index = torch.tensor([[300, 301, 333, 334, 559, 900]])
    hot = embedder.relative_positions(index)
    offset = index[:, :, None] - index[:, None, :]
    assert torch.equal(hot.argmax(-1) - 32, offset.clamp(-32, 32))
    assert torch.equal(hot.sum(-1), torch.ones_like(hot[..., 0]))


def test_one_hot_of_an_index_outside_is_zero() -> None:
    assert one_hot(torch.tensor([-1, 0, 2, 3]), 3).tolist() == [[0, 0, 0], [1, 0, 0], [0, 0, 1], [0, 0, 0]]
