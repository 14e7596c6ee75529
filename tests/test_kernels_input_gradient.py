"""Input gradients in two launches, with a grid over parts of the channels, against those in one."""

import pytest
import torch

from kernel_accuracy import (
    DTYPES,
    TILE,
    Draw,
    assert_as_accurate_as_pytorch,
    count_launched,
    of_parts,
    same_bits,
    turned,
)
from scalefold.kernels import reference, tuning
from scalefold.kernels.gradients import input_gradient
from scalefold.kernels.ops import linear, outer_product, triangle
from scalefold.tune.candidates import CANDIDATES

TALL = TILE | {"BLOCK_M": 64}
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-7}  # of a gradient, relative


@pytest.fixture
def gradient_grids(monkeypatch):
    """PARTS of every launch of an input gradient's products, of problems of any size."""
    monkeypatch.setattr(tuning, "LEAST_SHARED_WEIGHT", 0)
    found, original = [], input_gradient.launch_with_sums

    def launch_with_sums(program, config, *rest, **arguments):
        found.append(config.get("PARTS", 1))
        return original(program, config, *rest, **arguments)

    monkeypatch.setattr(input_gradient, "launch_with_sums", launch_with_sums)
    return found


def assert_within_rounding(found, expected, what=None):
    for value, other in zip(found, expected, strict=True):
        assert value.stride() == other.stride()
        assert other.abs().max() > 0
        assert (value.float() - other.float()).norm() <= ROUNDING[value.dtype] * other.float().norm(), what


def assert_gradients_in_parts(call, leaves, gradients, counts, grids, tile=TILE):
    """Gradients with 1, 2 and 4 parts are the same but for rounding, and repeat bit for bit; None: of no output."""
    leaves = [leaf.requires_grad_() for leaf in leaves]
    outputs = [(out, d) for out, d in zip(call(leaves), gradients, strict=True) if d is not None]
    of_outputs, given = zip(*outputs, strict=True)
    one, two, four, again = of_parts(
        "norm_linear_backward_columns",
        tile,
        (1, 2, 4, 4),
        lambda: torch.autograd.grad(of_outputs, leaves, given, retain_graph=True),
    )
    assert grids == counts
    assert all(map(same_bits, four, again))
    assert_within_rounding(two, one)
    assert_within_rounding(four, one)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("through", [False, True])
@pytest.mark.parametrize(
    ("shape", "widths", "biased", "transposed", "tile"),
    [
        ((1, 5, 7, 64), (32, 32, 32, 32, 4), (False, False, False, True, False), False, TILE),  # a ragged tile
        ((1, 4, 24, 128), (64, 64, 64, 8), (True, False, True, True), True, TILE),
        ((2, 3, 9, 64), (64, 64), (False, False), True, TALL),  # no bias at all
        ((1, 2, 9, 64), (16, 16), (True, True), False, TILE),  # shares of the sums are narrower than a product
    ],
    ids=str,
)
def test_input_gradients_in_parts_are_those_of_one_program(
    shape, widths, biased, transposed, tile, through, masked, dtype, gradient_grids
):
    draw, c = Draw(sum(shape)), shape[-1]
    x, mask = turned(draw(*shape).to(dtype), transposed), draw.mask(*shape[:-1]).to(dtype)
    weights, biases = [draw.weight(width, c) for width in widths], [draw(width) for width in widths]
    norm = draw.norm(c)
    parameters = [p.to(dtype) for p in (*norm, *weights, *(b for b, has in zip(biases, biased, strict=True) if has))]

    def call(leaves):
        x, *norm = leaves[:3]
        given = iter(leaves[3 + len(widths) :])
        own = leaves[3 : 3 + len(widths)], [next(given) if has else None for has in biased]
        return linear.masked_projections(x, mask, *norm, *own) if masked else linear.layer_norm_linear(x, *norm, *own)

    gradients = [draw(*shape[:-1], width).to(dtype) for width in (c, *widths)]
    assert_gradients_in_parts(
        call,
        [x, *parameters],
        [gradients[0] if through else None, *gradients[1:]],
        [1, 2, 4, 4],
        gradient_grids,
        tile,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("parts", [2, 4])
def test_input_gradients_in_parts_are_as_accurate_as_pytorch(parts, dtype, gradient_grids):
    draw, widths = Draw(5), (64, 64, 64, 64, 4)
    leaves = [draw(1, 5, 7, 64), *draw.norm(64), *(draw.weight(width, 64) for width in widths), draw(64)]

    def call(function, x, norm_weight, norm_bias, *parameters):
        return function(x, norm_weight, norm_bias, parameters[:5], [None, None, None, parameters[5], None])

    with tuning.override("norm_linear_backward_columns", TILE | {"PARTS": parts}):
        assert_as_accurate_as_pytorch(
            lambda *inputs: call(linear.layer_norm_linear, *inputs),
            lambda *inputs: call(reference.layer_norm_linear, *inputs),
            leaves,
            dtype,
        )
    assert gradient_grids == [parts]


def test_the_gradient_of_a_narrow_projection_alone_is_of_one_program(gradient_grids):
    draw = Draw(1)
    leaves, gradients = [draw(1, 5, 7, 64), *draw.norm(64), draw.weight(8, 64)], [None, draw(1, 5, 7, 8)]
    assert_gradients_in_parts(
        lambda leaves: linear.layer_norm_linear(*leaves[:3], leaves[3:], [None]),
        leaves,
        gradients,
        [1] * 4,
        gradient_grids,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_a_triangles_output_and_of_an_outer_products_operands_in_parts(dtype, gradient_grids):
    draw = Draw(2)
    z, x, d = draw(1, 5, 7, 64), draw(1, 64, 5, 7), draw(1, 5, 7, 64).to(dtype)
    linears = draw.weight(64, 64), draw(64), draw.weight(64, 64), draw(64)
    leaves = [leaf.to(dtype) for leaf in (z, x, *draw.norm(64), *draw.norm(64), *linears)]
    two_norms = [1, 1, 2, 2, 4, 4, 4, 4]
    assert_gradients_in_parts(
        lambda leaves: [triangle.triangle_output(*leaves, None)], leaves, [d], two_norms, gradient_grids
    )
    gradient_grids.clear()
    mask, (a, b) = draw.mask(1, 5, 7).to(dtype), (draw(1, 5, 7, 32).to(dtype) for _ in range(2))
    linears = draw.weight(32, 64), draw(32), draw.weight(32, 64), draw(32)
    leaves = [leaf.to(dtype) for leaf in (draw(1, 5, 7, 64), *draw.norm(64), *linears)]
    assert_gradients_in_parts(
        lambda leaves: outer_product.outer_product_project(leaves[0], mask, *leaves[1:]),
        leaves,
        [d, a, b],
        [1, 2, 4, 4],
        gradient_grids,
    )


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("shape", "widths"),
    [((1, 16, 256, 256), (256,) * 4), ((1, 32, 128, 256), (256,) * 4), ((1, 32, 256, 128), (128, 128, 128, 128, 4))],
    ids=str,
)
@pytest.mark.parametrize("transposed", [False, True])
def test_all_candidates_of_input_gradients_in_parts_agree_and_repeat(shape, widths, transposed, gradient_grids):
    draw, c, name = Draw(1), shape[-1], "norm_linear_backward_columns"
    biases = [draw(width).bfloat16() if n == 3 else None for n, width in enumerate(widths)]
    parameters = [p.bfloat16() for p in (*draw.norm(c), *(draw.weight(width, c) for width in widths))]
    x = turned(draw(*shape).bfloat16(), transposed)
    leaves = [leaf.requires_grad_() for leaf in (x, *parameters, *(bias for bias in biases if bias is not None))]
    outputs = linear.layer_norm_linear(*leaves[:3], leaves[3 : 3 + len(widths)], biases)
    given = [draw(*out.shape).bfloat16() for out in outputs]

    def call():
        return torch.autograd.grad(outputs, leaves, given, retain_graph=True)

    (one,) = of_parts(name, {}, (1,), call)

    def check(config):
        parts, again = of_parts(name, config, (config["PARTS"],) * 2, call)
        assert gradient_grids[-2:] == [config["PARTS"]] * 2
        assert_within_rounding(parts, one, config)
        assert all(map(same_bits, parts, again)), config

    assert count_launched(CANDIDATES[name]({"c": c})[1:], check) > 5
