"""Triton transition against its plain definition; backward in both forms, fused and with products of the library."""

import pytest
import torch

from kernel_accuracy import DTYPES, LIBRARY_TILES, Draw, assert_as_accurate_as_pytorch, transition_backward
from scalefold.kernels import reference, tuning
from scalefold.kernels.ops import transition

SMALL_TILES = {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1}
RECOMPUTED_TILES = {"RECOMPUTED": 1, **SMALL_TILES}
FULL_TILES = {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2}


def check(shape, factor, dtype, transposed=False):
    draw = Draw(sum(shape))
    x, c = draw(*shape), shape[-1]
    if transposed:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    linears = [draw.weight(factor * c, c), draw(factor * c), draw.weight(c, factor * c), draw(c)]
    assert_as_accurate_as_pytorch(transition.transition, reference.transition, [x, *draw.norm(c), *linears], dtype)


@pytest.mark.parametrize(("dtype", "transposed"), [(torch.float32, False), (torch.bfloat16, True)], ids=str)
@pytest.mark.parametrize(("shape", "factor"), [((1, 3, 19, 32), 4), ((2, 5, 7, 16), 2), ((1, 1, 1, 64), 4)], ids=str)
def test_transition_is_as_accurate_as_pytorch(shape, factor, dtype, transposed):
    check(shape, factor, dtype, transposed)


@pytest.mark.parametrize("parts", [(2, 2), (4, 1), (8, 4)], ids=str)
@pytest.mark.parametrize(("dtype", "transposed"), [(torch.float32, False), (torch.bfloat16, True)], ids=str)
@pytest.mark.parametrize(("shape", "factor"), [((1, 3, 19, 32), 4), ((2, 5, 7, 16), 2), ((1, 1, 1, 64), 4)], ids=str)
def test_a_transition_layer_by_layer_is_as_accurate_as_pytorch(shape, factor, dtype, transposed, parts, monkeypatch):
    monkeypatch.setattr(tuning, "LEAST_SHARED_WEIGHT", 0)
    monkeypatch.setattr(transition, "_forward_kernel", None)  # it must take the other form
    hidden, update = ({"PARTS": count, **SMALL_TILES} for count in parts)
    with tuning.override("transition_columns", hidden), tuning.override("transition_update", update):
        check(shape, factor, dtype, transposed)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "factor"), [((1, 3, 19, 32), 4), ((2, 5, 7, 16), 2), ((1, 1, 1, 64), 4)], ids=str)
def test_products_of_the_library_are_as_accurate_as_pytorch(shape, factor, dtype, transposed):
    with transition_backward(LIBRARY_TILES):
        check(shape, factor, dtype, transposed)


@pytest.mark.parametrize(("dtype", "transposed"), [(torch.float32, False), (torch.bfloat16, True)], ids=str)
@pytest.mark.parametrize(("shape", "factor"), [((1, 3, 19, 32), 4), ((2, 5, 7, 16), 2), ((1, 1, 1, 64), 4)], ids=str)
def test_gradients_of_a_hidden_layer_that_is_not_stored_are_as_accurate_as_pytorch(shape, factor, dtype, transposed):
    with transition_backward(RECOMPUTED_TILES), tuning.override("transition_weights", SMALL_TILES):
        check(shape, factor, dtype, transposed)


def test_gradients_that_the_copy_engine_cannot_fetch_take_the_form_that_stores(monkeypatch):
    monkeypatch.setattr(transition, "_recomputed", None)
    draw = Draw(6)
    x, parameters = draw(1, 3, 4, 16), [*draw.norm(16), draw.weight(64, 16), draw(64), draw.weight(16, 64), draw(16)]
    y = transition.transition(x.requires_grad_(), *parameters)
    with transition_backward(RECOMPUTED_TILES):
        (found,) = torch.autograd.grad(y, x, draw(1, 1, 1, 16).expand(1, 3, 4, 16))
    assert found.isfinite().all()


def test_launch_parameters_choose_the_form_and_both_keep_the_memory_order(monkeypatch):
    found, norm_gradient = [], transition.norm_gradient

    def record(*args, **named):
        found.append(norm_gradient(*args, **named))
        return found[-1]

    monkeypatch.setattr(transition, "norm_gradient", record)
    draw = Draw(4)
    x = draw(1, 5, 4, 16).transpose(1, 2).requires_grad_()
    parameters = [*draw.norm(16), draw.weight(64, 16), draw(64), draw.weight(16, 64), draw(16)]
    d_out = draw(1, 4, 5, 16)  # in another order than x
    y = transition.transition(x, *parameters)
    (fused,) = torch.autograd.grad(y, x, d_out, retain_graph=True)
    assert not found
    with transition_backward(LIBRARY_TILES):
        (by_library,) = torch.autograd.grad(y, x, d_out)
    assert by_library.data_ptr() == found[0][0].data_ptr()
    assert y.stride() == fused.stride() == by_library.stride() == x.stride()
    torch.testing.assert_close(by_library, fused, rtol=1e-5, atol=1e-5)


def test_weights_may_begin_anywhere_in_memory():
    draw = Draw(5)
    x, norm = draw(1, 3, 4, 16), draw.norm(16)
    weights = [draw.weight(64, 16), draw.weight(16, 64)]
    odd = [torch.cat([w.new_zeros(1), w.flatten()])[1:].view_as(w) for w in weights]
    assert all(w.data_ptr() % 16 for w in odd)
    biases = draw(64), draw(16)
    expected = transition.transition(x, *norm, weights[0], biases[0], weights[1], biases[1])
    torch.testing.assert_close(transition.transition(x, *norm, odd[0], biases[0], odd[1], biases[1]), expected)


def test_a_zero_last_layer_leaves_the_input_as_it_is():
    draw = Draw(3)
    x = draw(1, 4, 5, 16)
    y = transition.transition(x, *draw.norm(16), draw.weight(64, 16), draw(64), x.new_zeros(16, 64), x.new_zeros(16))
    assert torch.equal(y, x)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "config",
    [None, FULL_TILES, {"LIBRARY": 1, **FULL_TILES}, {"RECOMPUTED": 1, **FULL_TILES}],
    ids=["table", "fused", "library", "recomputed"],
)
@pytest.mark.parametrize(
    ("shape", "factor"),
    [((1, 128, 256, 256), 4), ((1, 256, 256, 128), 4), ((1, 1024, 256, 64), 4), ((4, 256, 256, 64), 2)],
    ids=str,
)
def test_full_shapes_are_as_accurate_as_pytorch(shape, factor, config):
    with transition_backward(config):
        check(shape, factor, torch.bfloat16)
