"""Triton layer norm against PyTorch's."""

import pytest
import torch

from kernel_accuracy import DEVICE, DTYPES, Draw, assert_as_accurate_as_pytorch
from scalefold.kernels import reference, rows
from scalefold.kernels.ops import layer_norm


def check(shape, dtype, transposed: bool = False):
    draw = Draw(sum(shape))
    x = draw(*shape) * 2.0 + 1.0
    if transposed:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    leaves = [x, *draw.norm(shape[-1])]
    assert_as_accurate_as_pytorch(layer_norm.layer_norm, reference.layer_norm, leaves, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 16), (3, 5, 24), (2, 37, 3, 64), (7, 384)], ids=str)
def test_layer_norm_is_as_accurate_as_pytorch(shape, dtype):
    check(shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_transposed_view_keeps_its_memory_order(dtype):
    check((2, 5, 7, 32), dtype, transposed=True)
    x = torch.randn(2, 5, 7, 32, device=DEVICE).transpose(1, 2)
    weight, bias = torch.ones(32, device=DEVICE), torch.zeros(32, device=DEVICE)
    assert layer_norm.layer_norm(x, weight, bias).stride() == x.stride()


@pytest.mark.parametrize("num_partials", [1, 5, 130])
@pytest.mark.parametrize("n", [1, 33, 8200])
def test_partial_sums_add_up(num_partials, n):
    partials = Draw(n)(num_partials, n)
    torch.testing.assert_close(rows.sum_partials(partials, torch.float32), partials.sum(0), rtol=1e-5, atol=1e-5)


def test_rows_of_dense_tensors_merge_and_transposed_ones_need_levels():
    x = torch.empty(2, 5, 7, 16)
    assert rows.common_rows(x)[2] == [(16, 0, 0, 1)]
    dims, count, (own, other) = rows.common_rows(x, torch.empty(2, 7, 5, 16).transpose(1, 2))
    assert (dims, count) == ((5, 7), 70)
    assert own == (5 * 7 * 16, 7 * 16, 16, 1)
    assert other == (5 * 7 * 16, 16, 5 * 16, 1)


def test_rows_that_need_more_than_three_levels_are_refused():
    with pytest.raises(ValueError, match="need 4 levels"):
        rows.common_rows(torch.empty(2, 3, 4, 5, 16).permute(1, 3, 0, 2, 4)[::1], torch.empty(3, 5, 2, 4, 16))


def test_neighbouring_weights_are_one_view_and_others_are_concatenated():
    flat = torch.arange(96.0)
    neighbours = [flat[:32].view(8, 4), flat[32:96].view(16, 4)]
    fused = rows.fused_view(neighbours)
    assert fused.data_ptr() == flat.data_ptr()
    assert torch.equal(fused, torch.cat(neighbours))
    apart = [neighbours[1], neighbours[0]]
    assert torch.equal(rows.fused_view(apart), torch.cat(apart))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 128, 256, 256), (1, 256, 256, 128), (1, 1024, 256, 64), (256, 384)], ids=str)
def test_full_shapes_are_as_accurate_as_pytorch(shape):
    check(shape, torch.bfloat16)
