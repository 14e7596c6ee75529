"""Weight gradients by the library and by the kernel, and sums of partial sums."""

import pytest
import torch

from kernel_accuracy import DEVICE, count_launched
from scalefold.kernels import tuning
from scalefold.kernels.gradients import weight_gradient
from scalefold.kernels.gradients.weight_gradient import Product, weight_partials
from scalefold.kernels.rows import sum_all

TILES = {"LIBRARY": 0, "BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1}


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE)


def gradients(products):
    flat = sum_all(weight_partials(products), torch.float32)
    return [part.view(product.shape) for part, product in zip(flat, products, strict=True)]


def exact(product):
    d, a = product.d.flatten(0, -2).double(), product.a.flatten(0, -2).double()
    return ((a.t() @ d) if product.transposed else (d.t() @ a)).float()


@pytest.mark.parametrize("config", [{"LIBRARY": 1}, {"LIBRARY": 4}, {"LIBRARY": 8}, TILES], ids=str)
@pytest.mark.parametrize("shape", [(1, 16, 32), (2, 5, 7), (1, 1, 1)], ids=str)
def test_products_agree_however_they_are_computed(config, shape):
    a, wide = draw(*shape, 32), draw(*shape, 96)
    products = [
        Product(wide[..., :64], a),
        Product(wide[..., 64:], a, transposed=True),
        Product(draw(*shape, 4), a),
        Product(draw(shape[0], shape[2], shape[1], 16).transpose(1, 2), a),  # no matrix in the order of a
    ]
    with tuning.override("weight_gradient", config):
        found = gradients(products)
    for product, value in zip(products, found, strict=True):
        torch.testing.assert_close(value, exact(product), rtol=1e-5, atol=1e-4)


def copied(num_stages=2):
    tiles = {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 4, "num_stages": num_stages}
    return tuning.override("weight_gradient", {"LIBRARY": 0, "COPY_ENGINE": 1, **tiles})


@pytest.mark.parametrize("shape", [(1, 16, 32), (2, 5, 7), (1, 1, 40)], ids=str)
@pytest.mark.parametrize("num_narrow", [0, 1])
def test_products_by_the_copy_engine_are_exact(shape, num_narrow, monkeypatch):
    monkeypatch.setattr(weight_gradient, "_tiled_products", None)  # it is the copying kernel that must take them
    a, other, wide = draw(*shape, 32), draw(*shape, 32) + 1.0, draw(*shape, 192)
    narrow = draw(4, -(-a[..., 0].numel() // 8) * 8)[:, : a[..., 0].numel()].view(4, *shape).movedim(0, -1)
    products = [Product(wide[..., :64], a), Product(wide[..., 64:128], other), Product(wide[..., 128:], a, True)]
    products += [Product(narrow, a)] * num_narrow
    with copied():
        found = gradients(products)
    for product, value in zip(products, found, strict=True):
        torch.testing.assert_close(value, exact(product), rtol=1e-5, atol=1e-4)


def test_what_the_copy_engine_cannot_fetch_goes_to_the_other_kernel():
    a, d = draw(1, 6, 16, 32), draw(1, 6, 16, 64)
    impossible = [
        [Product(draw(1, 16, 6, 64).transpose(1, 2), a)],  # no matrix
        [Product(draw(1, 6, 16, 65)[..., 1:], a)],  # rows at odd addresses
        [Product(d, a), Product(draw(1, 6, 16, 32), a)],  # two widths
        [Product(d[..., :48], a)],  # no whole number of blocks
        [Product(draw(1, 6, 16, 4), a), Product(d, a)],  # a narrow one before a wide one
    ]
    for products in impossible:
        with copied():
            assert weight_gradient._copied_products(products, len(products)) is None
            found = gradients(products)
        for product, value in zip(products, found, strict=True):
            torch.testing.assert_close(value, exact(product), rtol=1e-5, atol=1e-4)
    with copied(num_stages=200):
        assert weight_gradient._copied_products([Product(d, a)], 1) is None  # a ring that no multiprocessor holds


def test_rows_are_split_where_the_number_of_ranges_divides_them():
    a, d = draw(1, 16, 32, 16), draw(1, 16, 32, 16)
    with tuning.override("weight_gradient", {"LIBRARY": 128}):
        (partial,) = weight_partials([Product(d, a)])
    assert partial.shape == (8, 256)  # 512 rows in ranges of at least 64


def test_sums_of_several_shapes_take_one_launch_and_keep_single_ones():
    given = [draw(1500, 40), draw(3, 1000)[:, 100:900], draw(1, 24)]
    sums = sum_all(given, torch.float32)
    for partial, total in zip(given, sums, strict=True):
        torch.testing.assert_close(total, partial.double().sum(0).float(), rtol=1e-5, atol=1e-4)
    assert sums[2].data_ptr() == given[2].data_ptr()
    halves = sum_all([draw(1, 24)], torch.bfloat16)
    torch.testing.assert_close(halves[0], draw(1, 24)[0].bfloat16())


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "n", "c"), [((256, 256), 128, 128), ((128, 256), 1024, 256), ((1024, 256), 64, 64)])
def test_full_products_repeat_bit_for_bit(rows, n, c):
    from scalefold.tune.candidates import CANDIDATES

    d, a = (torch.randn(1, *rows, width, device="cuda", dtype=torch.bfloat16) for width in (n, c))
    expected = exact(Product(d, a))

    def check(config):
        with tuning.override("weight_gradient", config):
            first, second = (gradients([Product(d, a)])[0] for _ in range(2))
        assert torch.equal(first, second)
        assert (first - expected).norm() <= 4e-3 * expected.norm()  # the library rounds each range's product to bf16

    assert count_launched(CANDIDATES["weight_gradient"]({"n": n}), check) > 5
