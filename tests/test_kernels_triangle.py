"""Triton triangle multiplication against its plain definition."""

from contextlib import ExitStack

import pytest
import torch

from kernel_accuracy import DTYPES, Draw, assert_as_accurate_as_pytorch
from scalefold.kernels import reference, tuning
from scalefold.kernels.ops import triangle, triangle_product

SMALL = [(1, 9, 32, 16), (2, 7, 16, 32)]  # batch, residues, pair channels, product channels
SMALL_TILES = {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1}
FULL = [(1, 256, 128, 128), (4, 256, 64, 64), (1, 301, 128, 128)]


def transposed_rows(x):
    """The same values, with the two dimensions of pairs exchanged in memory. x: [B, I, J, c]."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def check_project(shape, dtype, transposed=False):
    batch, n, c, width = shape
    draw = Draw(n)
    z = draw(batch, n, n, c)
    mask = draw.mask(batch, n, n)
    parameters = [p for _ in range(4) for p in (draw.weight(width, c), draw(width))]
    assert_as_accurate_as_pytorch(
        lambda z, *rest: triangle.triangle_project(z, mask, *rest),
        lambda z, *rest: reference.triangle_project(z, mask.to(z.dtype), *rest),
        [transposed_rows(z) if transposed else z, *draw.norm(c), *parameters],
        dtype,
    )


def check_output(shape, dtype, dropped: str | None, transposed=False):
    batch, n, c, width = shape
    draw = Draw(n)
    z = draw(batch, n, n, c)
    masks = {"rows": (batch, 1, n, c), "columns": (batch, n, 1, c)}
    dropout = draw.dropout(*masks[dropped]) if dropped else None
    linears = [draw.weight(c, width), draw(c), draw.weight(c, c), draw(c)]
    z = transposed_rows(z) if transposed else z
    leaves = [z, draw(batch, width, n, n), *draw.norm(c), *draw.norm(width), *linears]
    assert_as_accurate_as_pytorch(
        lambda *inputs: triangle.triangle_output(*inputs, dropout),
        lambda *inputs: reference.triangle_output(*inputs, dropout),
        leaves,
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_projections_are_as_accurate_as_pytorch(shape, dtype):
    check_project(shape, dtype)


def recomputing(tiles, weight_tiles=None):
    """Launch parameters of a projections' backward that stores no gradients of theirs."""
    stack = ExitStack()
    stack.enter_context(tuning.override("triangle_project_backward", {"RECOMPUTED": 1, **tiles}))
    if weight_tiles:
        stack.enter_context(tuning.override("triangle_project_weights", weight_tiles))
    return stack


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 12, 32, 16), (1, 8, 16, 32)], ids=str)
def test_gradients_of_projections_that_are_not_stored_are_as_accurate_as_pytorch(shape, dtype, monkeypatch):
    monkeypatch.setattr(triangle, "weight_partials", None)  # it must take the other form
    with recomputing(SMALL_TILES, SMALL_TILES):
        check_project(shape, dtype)


@pytest.mark.parametrize(
    ("shape", "transposed"), [((2, 8, 16, 32), False), ((1, 9, 16, 32), False), ((1, 8, 16, 32), True)]
)
def test_pairs_that_the_copy_engine_cannot_fetch_take_the_form_that_stores(shape, transposed, monkeypatch):
    monkeypatch.setattr(triangle, "projected_partials", None)
    with recomputing(SMALL_TILES):
        check_project(shape, torch.bfloat16, transposed)


@pytest.mark.parametrize(("rows", "outgoing"), [(7, True), (7, False), (3, True)])  # few: this rank's of two
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_product_is_as_accurate_as_pytorch_and_hands_dense_gradients_over(dtype, rows, outgoing):
    draw = Draw(3)
    a, b = draw(2, 4, rows, 7), draw(2, 4, 7, 7)
    assert_as_accurate_as_pytorch(
        lambda a, b: triangle_product.triangle_product(a, b, outgoing),
        lambda a, b: reference.triangle_product(a, b, outgoing),
        [a, b],
        dtype,
    )
    x = triangle_product.triangle_product(a.requires_grad_(), b.requires_grad_(), outgoing)
    assert all(gradient.is_contiguous() for gradient in torch.autograd.grad(x.square().sum(), (a, b)))


@pytest.mark.parametrize("dropped", [None, "rows", "columns"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_output_is_as_accurate_as_pytorch(shape, dtype, dropped):
    check_output(shape, dtype, dropped)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_transposed_pairs_are_as_accurate_as_pytorch(dtype):
    check_project(SMALL[1], dtype, transposed=True)
    check_output(SMALL[1], dtype, "columns", transposed=True)


def test_gradients_keep_the_memory_order():
    draw = Draw(7)
    z = draw(2, 5, 5, 16).transpose(1, 2).requires_grad_()
    x, mask = draw(2, 16, 5, 5).requires_grad_(), draw.mask(2, 5, 5)
    norms = [draw.norm(16) for _ in range(3)]
    linears = [parameter for _ in range(6) for parameter in (draw.weight(16, 16), draw(16))]

    def gradients(module):
        through, a, b = module.triangle_project(z, mask, *norms[0], *linears[:8])
        y = module.triangle_output(through, x, *norms[1], *norms[2], *linears[8:], None)
        return torch.autograd.grad(y.square().sum() + (a * b).sum(), (z, x))

    for value, expected, leaf in zip(gradients(triangle), gradients(reference), (z, x), strict=True):
        assert value.stride() == leaf.stride()
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)


def test_masked_pairs_get_no_operand_and_give_no_gradient():
    draw = Draw(5)
    z, mask = draw(1, 6, 6, 16).requires_grad_(), draw.mask(1, 6, 6)
    parameters = [p for _ in range(4) for p in (draw.weight(16, 16), draw(16))]
    _, a, b = triangle.triangle_project(z, mask, *draw.norm(16), *parameters)
    (gradient,) = torch.autograd.grad((a.square() + b).sum(), z)
    outside = mask == 0
    assert outside.any()
    assert (a.permute(0, 2, 3, 1)[outside] == 0).all()
    assert (gradient[outside] == 0).all()
    assert (gradient[~outside] != 0).any()


@pytest.mark.gpu
@pytest.mark.parametrize("shape", FULL, ids=str)
def test_full_shapes_are_as_accurate_as_pytorch(shape):
    check_project(shape, torch.bfloat16)
    check_output(shape, torch.bfloat16, "rows")
