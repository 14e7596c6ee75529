"""The embedders, features included, in one product each way, against their plain definitions."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kernel_accuracy import DEVICE, DTYPES, Draw, assert_as_accurate_as_pytorch
from scalefold.kernels.around import embedding
from scalefold.kernels.around.features import squared_edges
from scalefold.kernels.table import REFERENCE, Operations, use_operations
from scalefold.kernels.triton_ops import TRITON
from scalefold.model import AlphaFold
from scalefold.model.alphafold import Recycled
from scalefold.model.embedders import RECYCLING_EDGES, ExtraMSAEmbedder, InputEmbedder, RecyclingEmbedder
from scalefold.model.templates import DISTOGRAM_EDGES, TemplatePairEmbedder

C = 32
NAMES = ("embed_pairs", "embed_letters", "embed_extra", "embed_template_pairs")
KERNELS = dataclasses.replace(REFERENCE, **{name: getattr(embedding, name) for name in NAMES})  # for fp32 too


def whole(low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(high)).to(DEVICE)


class Embedders(nn.Module):
    """Those that ``AlphaFold.embed_sample`` takes."""

    def __init__(self, c_m: int, c_z: int) -> None:
        super().__init__()
        self.input_embedder = InputEmbedder(c_m, c_z, 32)
        self.recycling_embedder = RecyclingEmbedder(c_m, c_z)

    forward = AlphaFold.embed_sample
    _letters_at_once, _pairs_at_once = AlphaFold._letters_at_once, AlphaFold._pairs_at_once


def sample(batch: int, sequences: int, n: int) -> dict[str, Tensor]:
    draw, templates = Draw(n), (batch, 2, n)
    return {
        "target_feat": draw(batch, n, 22),
        "msa_feat": draw(batch, sequences, n, 49),
        "residue_index": whole(0, 400, batch, n),
        "aatype": whole(0, 21, batch, n),
        "extra_msa": whole(0, 24, batch, sequences, n),  # 23 is no class
        "extra_has_deletion": draw.mask(batch, sequences, n),
        "extra_deletion_value": draw(batch, sequences, n),
        "template_aatype": whole(0, 23, *templates),
        "template_pseudo_beta": 15.0 * draw(*templates, 3),
        "template_pseudo_beta_mask": draw.mask(*templates),
        "template_all_atom_mask": (draw.mask(*templates, 37) + draw.mask(*templates, 37)).clamp(max=1.0),
    }


def recycled(batch: int, n: int, dtype: torch.dtype) -> Recycled:
    """Atoms on top of each other, and on the first edge, among others."""
    draw = Draw(n + 1)
    x = 9.0 * draw(batch, n, 37, 3)
    x[:, 1] = x[:, 0]
    x[:, 2] = x[:, 0] + torch.tensor([3.25, 0.0, 0.0], device=DEVICE)
    return Recycled(draw(batch, n, C).to(dtype), draw(batch, n, n, C).to(dtype), x)


def calls(module: nn.Module, batch: int, sequences: int, n: int) -> Callable[..., Any]:
    """The module's representations as a function of the operations and of its parameters."""
    features, names = sample(batch, sequences, n), [name for name, _ in module.named_parameters()]

    def call(ops: Operations, *parameters: Tensor) -> Any:
        use_operations(module, ops)
        more = (recycled(batch, n, parameters[0].dtype),) if isinstance(module, Embedders) else ()
        given = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(module, given, (features, *more))

    return call


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "sequences", "n"), [(2, 3, 5), (1, 2, 37)])
@pytest.mark.parametrize(
    "build",
    [lambda: Embedders(C, C), lambda: ExtraMSAEmbedder(24), lambda: TemplatePairEmbedder(16)],
    ids=["sample", "extra", "templates"],
)
def test_representations_and_gradients_are_as_accurate_as_the_definition(build, batch, sequences, n, dtype) -> None:
    module, draw = build().to(DEVICE), Draw(2)
    call = calls(module, batch, sequences, n)
    leaves = [draw(*parameter.shape) for parameter in module.parameters()]

    def ours(*parameters: Tensor) -> Any:
        return call(KERNELS, *parameters)

    def plain(*parameters: Tensor) -> Any:
        return call(REFERENCE, *parameters)

    assert_as_accurate_as_pytorch(ours, plain, leaves, dtype)


def test_features_fall_into_the_bins_and_columns_of_the_definition() -> None:
    """One channel per column: weights that are the identity show the features themselves."""
    module, n = Embedders(C, 128).to(DEVICE), 37
    given = sample(1, 1, n) | {"target_feat": torch.zeros(1, n, 22, device=DEVICE)}
    x = recycled(1, n, torch.float32).x
    from_offset, from_distance = module.input_embedder.linear_relpos, module.recycling_embedder.linear
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        from_offset.weight[:65] = torch.eye(65, device=DEVICE)
        from_distance.weight[65:80] = torch.eye(15, device=DEVICE)
    before = Recycled(torch.zeros(1, n, C, device=DEVICE), torch.zeros(1, n, n, 128, device=DEVICE), x)
    found = []
    for ops in (REFERENCE, KERNELS):
        use_operations(module, ops)
        found.append(module(given, before)[1])
    assert torch.equal(*found)
    assert (found[0][..., :65].sum(-1) == 1.0).all()
    assert found[0][..., 65:].any()
    assert not found[0][:, 0, 1, 65:].any()


@pytest.mark.gpu
def test_gradients_repeat_their_bits() -> None:
    module, draw = Embedders(C, C).to(DEVICE).bfloat16(), Draw(3)
    call = calls(module, 1, 9, 150)
    leaves = [draw(*parameter.shape).bfloat16().requires_grad_() for parameter in module.parameters()]

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad([x.float().sin().sum() for x in call(TRITON, *leaves)], leaves)

    first = gradients()
    assert all(gradient.isfinite().all() for gradient in first)
    for _ in range(10):
        assert all(map(torch.equal, first, gradients()))


def linears(c: int, width: int) -> list[tuple[Tensor, Tensor]]:
    return [(torch.ones(c, width), torch.ones(c))]


@pytest.mark.parametrize(
    ("inputs", "own", "reason"),
    [
        ((torch.ones(1, 2), 3), linears(4, 5), None),
        ((torch.ones(1, 0), 3), linears(4, 5), "an argument is empty"),
        ((torch.ones(1, 2), (torch.ones(2), torch.ones(0))), linears(4, 5), "an argument is empty"),
        ((torch.ones(1, 2), (torch.ones(2, requires_grad=True),)), linears(4, 5), "an input wants a gradient"),
        ((torch.ones(1, 2),), linears(4, 255), "256 features of 4 channels are more than 255 of 256"),
        ((torch.ones(1, 2),), linears(300, 5), "6 features of 300 channels are more than 255 of 256"),
    ],
)
def test_what_the_kernels_do_not_take_is_named(inputs, own, reason) -> None:
    assert embedding.obstacle(*inputs, linears=own) == reason


def test_fp32_is_left_to_the_library_and_16_bits_are_taken() -> None:
    rows = (torch.ones(1, 1, 3, dtype=torch.int64, device=DEVICE), *torch.ones(2, 1, 1, 3, device=DEVICE))
    for dtype, taken in ((torch.float32, False), (torch.bfloat16, True)):
        own = [(weight.to(DEVICE, dtype), bias.to(DEVICE, dtype)) for weight, bias in linears(16, 25)]
        assert (TRITON.embed_extra(*rows, linears=own) is not None) is taken


def test_edges_are_squared_and_end_with_the_open_one() -> None:
    for edges in (RECYCLING_EDGES, DISTOGRAM_EDGES):
        found = squared_edges(edges, torch.device(DEVICE))
        assert len(found) == edges[2] + 1
        assert found[-1] == edges[3]
        assert found[0] == edges[0] ** 2
