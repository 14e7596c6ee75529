"""Heads of one layer in fp32 whose products are those of bf16 parts, against their plain definition."""

import pytest
import torch
from torch import Tensor

from kernel_accuracy import Draw
from scalefold.kernels import reference
from scalefold.kernels.around import heads

SHAPES = [((2, 9, 9, 32), 50, True), ((1, 5, 17, 64), 23, False), ((2, 11, 16), 16, False)]


def results(function, x: Tensor, weight: Tensor, bias: Tensor, symmetric: bool) -> list[Tensor]:
    """Logits and gradients of x, weight and bias."""
    given = [leaf.detach().requires_grad_() for leaf in (x, weight, bias)]
    out = function(*given, symmetric)
    d = Draw(4)(*out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, given, d)]


@pytest.mark.parametrize(("shape", "classes", "symmetric"), SHAPES)
def test_logits_and_gradients_are_those_of_fp32(shape, classes, symmetric) -> None:
    draw = Draw(len(shape))
    x, weight, bias = draw(*shape).bfloat16(), draw.weight(classes, shape[-1]), draw(classes)
    exact = [t.double() for t in (x, weight, bias)]
    found = results(heads.linear_head, x, weight, bias, symmetric)
    expected = results(reference.linear_head, *exact, symmetric)
    assert [t.dtype for t in found] == [torch.float32, torch.bfloat16, torch.float32, torch.float32]
    for own, other in zip(found, expected, strict=True):
        limit = 2e-6 if own.dtype == torch.float32 else 2.0**-8
        assert (own.double() - other).norm() <= limit * other.norm()


def test_a_gradient_of_16_bits_is_rounded_once() -> None:
    draw = Draw(7)
    given = (draw(1, 8, 8, 16).bfloat16(), draw.weight(64, 16), draw(64), True)
    own, plain = (results(function, *given)[1] for function in (heads.linear_head, reference.linear_head))
    assert (own != plain).float().mean() < 0.02  # those that lie between two numbers


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("shape", "classes", "symmetric"), [((1, 150, 150, 128), 64, True), ((1, 40, 90, 256), 23, False)]
)
def test_bits_repeat(shape, classes, symmetric) -> None:
    draw = Draw(5)
    given = (draw(*shape).bfloat16(), draw.weight(classes, shape[-1]), draw(classes), symmetric)
    first = results(heads.linear_head, *given)
    for _ in range(10):
        assert all(map(torch.equal, first, results(heads.linear_head, *given)))


@pytest.mark.parametrize(
    ("x", "weight", "reason"),
    [
        (torch.ones(2, 16), torch.ones(3, 16), None),
        (torch.ones(2, 16), torch.ones(3, 16).bfloat16(), "torch.bfloat16 weights of torch.bfloat16 inputs"),
        (torch.ones(16, 2).t(), torch.ones(3, 16), "not everything is contiguous"),
        (torch.ones(2, 16), torch.ones(65, 16), "65 classes are more than 64"),
        (torch.ones(2, 24), torch.ones(3, 24), "width 24 is no power of two from 16 to 256"),
        (torch.ones(0, 16), torch.ones(3, 16), "an argument is empty"),
    ],
)
def test_what_the_kernels_do_not_take_is_named(x, weight, reason) -> None:
    assert heads.obstacle(x.bfloat16(), weight, torch.ones(len(weight)), False) == reason
