"""Weights of invariant point attention in Triton against their plain definition."""

import pytest
import torch
from torch import Tensor

from kernel_accuracy import DEVICE, Draw
from scalefold.kernels import point_attention, reference

INF = 60.0  # of 1e5, the model's, nothing but two digits of a logit would be left in masked rows


def arguments(batch: int, n: int, heads: int, width: int, query: int, value: int, c: int) -> list[Tensor]:
    """In the order of the operation, as views of projections like those of the structure module."""
    draw = Draw(n)

    def points(count: int) -> Tensor:
        return draw(batch, n, 3 * heads * count).unflatten(-1, (3, heads, -1)).movedim(-3, -1)

    kv = draw(batch, n, heads, 2 * width)
    mask = draw.mask(batch, n)
    scalars = (draw(batch, n, heads, width), *kv.chunk(2, dim=-1))
    pairs = (draw(batch, n, n, heads), draw(batch, n, n, c))
    return [*scalars, points(query), points(query), points(value), *pairs, draw(heads).abs(), mask]


def results(function, given: list[Tensor]) -> list[Tensor]:
    leaves = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x) for x in given[:-1]]
    leaves = [x.requires_grad_() for x in leaves]
    outputs = function(*leaves, given[-1], INF)
    draw = Draw(1)
    total = sum((output * draw(*output.shape)).sum() for output in outputs)
    return [output.detach() for output in outputs] + list(torch.autograd.grad(total, leaves))


def check(*sizes: int) -> None:
    given = arguments(*sizes)
    ours = results(point_attention.invariant_point_attention, given)
    exact = results(reference.invariant_point_attention, [x.double() for x in given])
    for own, other in zip(ours, exact, strict=True):
        assert own.shape == other.shape
        assert (own - other).abs().max() <= 1e-5 * other.abs().max()


@pytest.mark.parametrize("sizes", [(1, 5, 3, 8, 4, 2, 6), (2, 17, 2, 4, 1, 3, 5), (1, 1, 1, 2, 2, 2, 3)], ids=str)
def test_kernels_equal_the_plain_definition(sizes):
    check(*sizes)


def test_a_masked_residue_weighs_all_others_alike_up_to_their_logits():
    given = arguments(1, 6, 2, 4, 2, 2, 3)
    given[-1] = torch.zeros(1, 6, device=DEVICE)
    ours, plain = (
        function(*given, 1e5)
        for function in (point_attention.invariant_point_attention, reference.invariant_point_attention)
    )
    for own, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(own, other, atol=0.02, rtol=0.02)  # logits beside 1e5 keep two digits


@pytest.mark.gpu
@pytest.mark.parametrize("n", [256, 301, 700])
def test_full_kernels_equal_the_plain_definition(n, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    check(1, n, 12, 16, 4, 8, 128)
