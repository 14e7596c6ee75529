"""Triton transition against its plain definition, in both forms: fused, and with products of the library."""

import pytest
import torch

from kernel_accuracy import (
    DTYPES,
    FULL_LIBRARY_TILES,
    LIBRARY_TILES,
    Draw,
    assert_as_accurate_as_pytorch,
    launch_parameters,
    recorded,
)
from scalefold.kernels import reference, transition

KERNELS = ("transition_forward", "transition_backward")


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


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "factor"), [((1, 3, 19, 32), 4), ((2, 5, 7, 16), 2), ((1, 1, 1, 64), 4)], ids=str)
def test_products_of_the_library_are_as_accurate_as_pytorch(shape, factor, dtype, transposed):
    with launch_parameters(LIBRARY_TILES, *KERNELS):
        check(shape, factor, dtype, transposed)


def test_launch_parameters_choose_the_form_and_both_keep_the_memory_order(monkeypatch):
    found = recorded(monkeypatch, transition, "norm_gradient")
    draw = Draw(4)
    x = draw(1, 5, 4, 16).transpose(1, 2).requires_grad_()
    parameters = [*draw.norm(16), draw.weight(64, 16), draw(64), draw.weight(16, 64), draw(16)]
    d_out = draw(1, 4, 5, 16)  # in another order than x

    def output_and_gradient():
        y = transition.transition(x, *parameters)
        return y.detach(), *torch.autograd.grad(y, x, d_out)

    fused = output_and_gradient()
    assert not found
    with launch_parameters(LIBRARY_TILES, *KERNELS):
        by_library = output_and_gradient()
    assert by_library[1].data_ptr() == found[0][0].data_ptr()
    for value, expected in zip(by_library, fused, strict=True):
        assert value.stride() == expected.stride() == x.stride()
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", [None, LIBRARY_TILES], ids=["fused", "library"])
def test_a_zero_last_layer_leaves_the_input_as_it_is(config):
    draw = Draw(3)
    x = draw(1, 4, 5, 16)
    parameters = [*draw.norm(16), draw.weight(64, 16), draw(64), x.new_zeros(16, 64), x.new_zeros(16)]
    with launch_parameters(config, *KERNELS):
        y = transition.transition(x, *parameters)
    assert torch.equal(y, x)


@pytest.mark.gpu
@pytest.mark.parametrize("config", [None, FULL_LIBRARY_TILES], ids=["table", "library"])
@pytest.mark.parametrize(
    ("shape", "factor"),
    [((1, 128, 256, 256), 4), ((1, 256, 256, 128), 4), ((1, 1024, 256, 64), 4), ((4, 256, 256, 64), 2)],
    ids=str,
)
def test_full_shapes_are_as_accurate_as_pytorch(shape, factor, config):
    with launch_parameters(config, *KERNELS):
        check(shape, factor, torch.bfloat16)
