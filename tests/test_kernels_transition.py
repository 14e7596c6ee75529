"""Triton transition against its plain definition."""

import pytest
import torch

from kernel_accuracy import Draw, assert_as_accurate_as_pytorch
from scalefold.kernels import reference, transition


def check(shape, factor, dtype, transposed=False):
    draw = Draw(sum(shape))
    x, c = draw(*shape), shape[-1]
    if transposed:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    linears = [draw.weight(factor * c, c), draw(factor * c), draw.weight(c, factor * c), draw(c)]
    assert_as_accurate_as_pytorch(transition.transition, reference.transition, [x, *draw.norm(c), *linears], dtype)


@pytest.mark.parametrize(("dtype", "transposed"), [(torch.float32, False), (torch.bfloat16, True)], ids=str)
@pytest.mark.parametrize(
    ("shape", "factor"), [((1, 3, 19, 32), 4), ((2, 5, 7, 16), 2), ((1, 1, 1, 64), 4), ((1, 2, 3, 24), 4)], ids=str
)
def test_transition_is_as_accurate_as_pytorch(shape, factor, dtype, transposed):
    check(shape, factor, dtype, transposed)


def test_a_zero_last_layer_leaves_the_input_as_it_is():
    draw = Draw(3)
    x = draw(1, 4, 5, 16)
    y = transition.transition(x, *draw.norm(16), draw.weight(64, 16), draw(64), x.new_zeros(16, 64), x.new_zeros(16))
    assert torch.equal(y, x)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("shape", "factor"),
    [((1, 128, 256, 256), 4), ((1, 256, 256, 128), 4), ((1, 1024, 256, 64), 4), ((4, 256, 256, 64), 2)],
    ids=str,
)
def test_full_shapes_are_as_accurate_as_pytorch(shape, factor):
    check(shape, factor, torch.bfloat16)
