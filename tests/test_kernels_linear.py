"""Triton projections of a layer norm, and gated output, against their plain definitions."""

import pytest
import torch

from kernel_accuracy import Draw, assert_as_accurate_as_pytorch
from scalefold.kernels import reference
from scalefold.kernels.ops import gated_output, linear


def check_projections(shape, widths, biased, dtype, transposed=False):
    draw = Draw(sum(shape))
    x, c = draw(*shape), shape[-1]
    if transposed:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    weights = [draw.weight(width, c) for width in widths]
    biases = [draw(width) for width, has in zip(widths, biased, strict=True) if has]

    def call(function, x, norm_weight, norm_bias, *parameters):
        given = iter(parameters[len(widths) :])
        own = [next(given) if has else None for has in biased]
        return function(x, norm_weight, norm_bias, parameters[: len(widths)], own)

    leaves = [x, *draw.norm(c), *weights, *biases]
    assert_as_accurate_as_pytorch(
        lambda *inputs: call(linear.layer_norm_linear, *inputs),
        lambda *inputs: call(reference.layer_norm_linear, *inputs),
        leaves,
        dtype,
    )


@pytest.mark.parametrize(("dtype", "transposed"), [(torch.float32, False), (torch.bfloat16, True)], ids=str)
@pytest.mark.parametrize(
    ("shape", "widths", "biased"),
    [
        ((1, 5, 7, 16), (32, 32, 32, 32, 4), (False, False, False, True, False)),
        ((2, 3, 9, 32), (16, 4, 16), (True, True, False)),
        ((2, 3, 5, 16), (8,), (False,)),
        ((1, 4, 6, 16), (4,), (True,)),
        ((1, 4, 6, 16), (16, 16, 16), (True, False, True)),
        ((1, 1, 1, 64), (64,), (True,)),
        ((2, 12, 16, 16), (16, 16, 4), (False, True, True)),
    ],
    ids=str,
)
def test_projections_are_as_accurate_as_pytorch(shape, widths, biased, dtype, transposed):
    check_projections(shape, widths, biased, dtype, transposed)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_narrow_projection_is_stored_channels_first(transposed):
    draw = Draw(1)
    x = draw(1, 6, 5, 16).transpose(1, 2) if transposed else draw(1, 5, 6, 16)
    _, out = linear.layer_norm_linear(x, *draw.norm(16), [draw.weight(4, 16)], [None])
    assert out.shape == (1, 5, 6, 4)
    assert out.permute(0, 3, 1, 2).is_contiguous()


@pytest.mark.parametrize(
    ("shape", "transposed", "across"),
    [
        ((2, 4, 32, 16), True, True),
        ((2, 12, 48, 16), True, True),
        ((1, 4, 24, 16), True, False),  # half a sector
        ((1, 6, 32, 16), True, False),  # tiles would pass the edge
        ((1, 4, 32, 16), False, False),
    ],
    ids=str,
)
def test_a_narrow_projection_stored_in_whole_sectors_has_the_same_bits(shape, transposed, across, monkeypatch):
    draw = Draw(3)
    x = draw(*shape).bfloat16()
    if transposed:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    parameters = [draw(16), draw(16)], [draw.weight(16, 16), draw.weight(4, 16)], [None, draw(4)]
    norm, weights, biases = ([None if p is None else p.bfloat16() for p in group] for group in parameters)
    asked, found = [], []
    for ask in (lambda *_: False, linear.lies_across):
        monkeypatch.setattr(linear, "lies_across", lambda *given, ask=ask: asked.append(ask(*given)) or asked[-1])
        found.append(linear.layer_norm_linear(x, *norm, weights, biases))
    assert asked == [False, across]
    assert all(map(torch.equal, *found))


def test_projections_of_a_transposed_view_keep_its_memory_order():
    draw = Draw(1)
    x = draw(1, 5, 6, 16).transpose(1, 2)
    _, *outs = linear.layer_norm_linear(x, *draw.norm(16), [draw.weight(32, 16), draw.weight(32, 16)], [None, None])
    assert all(out.transpose(1, 2).is_contiguous() for out in outs)


def test_gradients_side_by_side_give_the_same_as_apart():
    draw = Draw(1)
    x, weights = draw(1, 5, 6, 16), [draw.weight(32, 16) for _ in range(3)]
    leaves = [leaf.requires_grad_() for leaf in (x, *draw.norm(16), *weights)]
    beside = draw(1, 5, 6, 96).split(32, -1)
    found = []
    for gradients in (beside, [gradient.contiguous() for gradient in beside]):
        _, *outs = linear.layer_norm_linear(*leaves[:3], weights, [None] * 3)
        found.append(torch.autograd.grad(outs, leaves, gradients))
    for value, expected in zip(*found, strict=True):
        torch.testing.assert_close(value, expected)


def check_gated(shape, heads, width, dtype, transposed, dropped):
    draw = Draw(sum(shape))
    batch, rows, n, c = shape
    x, gate = draw(*shape), draw(batch, rows, n, heads * width)
    if transposed:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
        gate = draw(batch, n, rows, 2 * heads * width).transpose(1, 2)[..., heads * width :]
    dropout = draw.dropout(*{"rows": (batch, 1, n, c), "columns": (batch, rows, 1, c)}[dropped]) if dropped else None
    weight = draw.weight(c, heads * width)
    assert_as_accurate_as_pytorch(
        lambda *inputs: gated_output.gated_output(*inputs, dropout),
        lambda *inputs: reference.gated_output(*inputs, dropout),
        [x, draw(batch, rows, n, heads, width), gate, weight, draw(c)],
        dtype,
    )


@pytest.mark.parametrize("dropped", [None, "rows", "columns"])
@pytest.mark.parametrize(("dtype", "transposed"), [(torch.float32, False), (torch.bfloat16, True)], ids=str)
@pytest.mark.parametrize(("shape", "heads", "width"), [((1, 3, 19, 32), 2, 16), ((2, 5, 7, 16), 2, 8)], ids=str)
def test_gated_output_is_as_accurate_as_pytorch(shape, heads, width, dtype, transposed, dropped):
    check_gated(shape, heads, width, dtype, transposed, dropped)


def test_gated_output_lies_in_the_memory_order_of_its_residual():
    draw = Draw(2)
    x = draw(1, 3, 5, 16).transpose(1, 2)
    gate = draw(1, 5, 3, 16)
    y = gated_output.gated_output(x, draw(1, 5, 3, 2, 8), gate, draw.weight(16, 16), draw(16), None)
    assert y.stride() == x.stride()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("shape", "widths"),
    [
        ((1, 128, 256, 256), (256,) * 4),
        ((1, 256, 256, 128), (128, 128, 128, 128, 4)),
        ((1, 256, 256, 128), (8,)),
        ((1, 1024, 256, 64), (64,) * 4),
        ((1, 301, 301, 128), (128, 128, 128, 128, 4)),
    ],
    ids=str,
)
def test_full_projections_are_as_accurate_as_pytorch(shape, widths):
    biased = tuple(n == 3 for n in range(len(widths)))
    check_projections(shape, widths, biased, torch.bfloat16)
    check_projections(shape, widths, biased, torch.bfloat16, transposed=True)


@pytest.mark.gpu
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("shape", "heads", "width"),
    [((1, 128, 256, 256), 8, 32), ((1, 256, 256, 128), 4, 32), ((1, 1024, 256, 64), 8, 8)],
    ids=str,
)
def test_full_gated_output_is_as_accurate_as_pytorch(shape, heads, width, transposed):
    check_gated(shape, heads, width, torch.bfloat16, transposed, "rows")
