"""Inputs of the embedders in one launch each, against their plain definitions."""

import pytest
import torch

from kernel_accuracy import DEVICE, DTYPES, Draw
from scalefold.kernels import triton_ops
from scalefold.kernels.around import features
from scalefold.model import embedders, templates

OPS = triton_ops.TRITON


def whole(low: int, high: int, *shape: int) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(high)).to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "n"), [(1, 5), (2, 37)])
def test_offsets_are_clipped_and_one_hot(batch: int, n: int, dtype: torch.dtype) -> None:
    module, index = embedders.InputEmbedder(16, 16, 32), whole(0, 400, batch, n)
    plain = module.relative_positions(index, dtype)
    module.ops = OPS
    assert torch.equal(module.relative_positions(index, dtype), plain)
    assert (plain.sum(-1) == 1.0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "n"), [(1, 5), (2, 37)])
def test_distances_fall_into_the_bins_of_the_definition(batch: int, n: int, dtype: torch.dtype) -> None:
    points = 9.0 * Draw(n)(batch, n, 3)
    points[:, 1] = points[:, 0]
    points[:, 2] = points[:, 0] + torch.tensor([3.25, 0.0, 0.0], device=DEVICE)  # on the first edge
    found = features.distance_features(points, embedders.RECYCLING_EDGES, dtype)
    assert torch.equal(found, embedders.RecyclingEmbedder.distogram(points, dtype))
    assert found.any()
    assert not found[:, 0, 1].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_features_of_extra_sequences_are_those_of_the_definition(dtype: torch.dtype) -> None:
    draw, shape = Draw(1), (2, 3, 7)
    given = {
        "extra_msa": whole(0, 24, *shape),  # 23 is no class
        "extra_has_deletion": draw.mask(*shape),
        "extra_deletion_value": draw(*shape),
    }
    assert torch.equal(embedders.extra_msa_features(given, dtype, OPS), embedders.extra_msa_features(given, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 2, 5), (2, 4, 23)])
def test_pair_features_of_templates_are_those_of_the_definition(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    draw = Draw(shape[-1])
    given = {
        "template_aatype": whole(0, 23, *shape),
        "template_pseudo_beta": 15.0 * draw(*shape, 3),
        "template_pseudo_beta_mask": draw.mask(*shape),
        "template_all_atom_mask": draw.mask(*shape, 37),
    }
    plain = templates.template_pair_features(given, dtype)
    assert torch.equal(templates.template_pair_features(given, dtype, OPS), plain)
    assert plain[..., 87].any()


def test_what_the_kernels_do_not_take_is_named() -> None:
    assert features.obstacle(torch.ones(1, 2)) is None
    assert features.obstacle(torch.ones(1, 0)) == "an argument is empty"
