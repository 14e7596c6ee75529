"""Triton outer product mean against its plain definition."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernel_accuracy import DEVICE, DTYPES, Draw, assert_as_accurate_as_pytorch
from scalefold.kernels import reference
from scalefold.kernels.ops import outer_product


def check_project(shape, width, dtype):
    draw = Draw(sum(shape))
    mask, c = draw.mask(*shape[:-1]), shape[-1]
    linears = [draw.weight(width, c), draw(width), draw.weight(width, c), draw(width)]
    assert_as_accurate_as_pytorch(
        lambda m, *rest: outer_product.outer_product_project(m, mask, *rest),
        lambda m, *rest: reference.outer_product_project(m, mask, *rest),
        [draw(*shape), *draw.norm(c), *linears],
        dtype,
    )


def check_update(batch, num_sequences, i, j, c, width, dtype):
    draw = Draw(num_sequences)
    norm = draw(batch, i, j).abs() + 1.0
    leaves = [draw(batch, i, j, c), draw(batch, num_sequences, i, width), draw(batch, num_sequences, j, width)]
    assert_as_accurate_as_pytorch(
        lambda z, a, b, *linear: outer_product.outer_product_update(z, a, b, norm, *linear),
        lambda z, a, b, *linear: reference.outer_product_update(z, a, b, norm, *linear),
        [*leaves, draw.weight(c, width * width), draw(c)],
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "width"), [((1, 5, 7, 32), 16), ((2, 3, 19, 16), 32)], ids=str)
def test_projections_are_as_accurate_as_pytorch(shape, width, dtype):
    check_project(shape, width, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("sizes", "keep_from"),
    [((1, 5, 5, 5, 32, 16), 1), ((2, 3, 2, 5, 16, 16), 512)],
    ids=["kept", "computed-again"],
)
def test_update_is_as_accurate_as_pytorch(sizes, dtype, keep_from, monkeypatch):
    monkeypatch.setattr(outer_product, "KEEP_FROM_SEQUENCES", keep_from)
    check_update(*sizes, dtype)


def test_the_channel_of_a_is_the_slow_index_of_the_weight():
    z, a, b, weight, bias = (
        torch.zeros(shape, device=DEVICE) for shape in ((1, 2, 2, 16), (1, 1, 2, 16), (1, 1, 2, 16), (16, 256), (16,))
    )
    a[..., 3], b[..., 5] = 2.0, 7.0
    weight[1, 3 * 16 + 5] = 1.0
    num_rows = torch.full((1, 2, 2), 2.0, device=DEVICE)
    z = outer_product.outer_product_update(z, a, b, num_rows, weight, bias)
    assert (z[..., 1] == 7.0).all()
    assert z.sum() == 4 * 7.0


@pytest.mark.gpu
@pytest.mark.parametrize("num_sequences", [128, 1024])
@pytest.mark.parametrize("n", [256, 301])
def test_full_shapes_are_as_accurate_as_pytorch(num_sequences, n):
    check_project((1, num_sequences, n, 256 if num_sequences == 128 else 64), 32, torch.bfloat16)
    check_update(1, num_sequences, n, n, 128, 32, torch.bfloat16)


def test_the_gradients_of_a_single_sample_are_handed_on_without_a_copy():
    names: list[str] = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    draw = Draw(1)
    z, a, b = draw(1, 2, 2, 16), draw(1, 3, 2, 16), draw(1, 3, 2, 16)
    weight, bias = draw(16, 256), draw(16)
    inputs = [x.requires_grad_() for x in (z, a, b, weight, bias)]
    out = outer_product.outer_product_update(z, a, b, draw(1, 2, 2).abs() + 1.0, weight, bias)
    with Names():
        torch.autograd.grad(out, inputs, torch.ones_like(out))
    assert "mm" in names
    assert not {"stack", "cat", "select_backward"} & set(names)
