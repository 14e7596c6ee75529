"""Dense copies of transposed tensors: equal to PyTorch's, whichever dimension was dense before."""

import pytest
import torch
from torch import Tensor

from kernel_accuracy import DEVICE
from scalefold.kernels.ops import elementwise


def numbered(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Values that differ from their neighbours, exact in 16 bits."""
    count = torch.Size(shape).numel()
    return (torch.arange(count, device=DEVICE) % 251 - 125).to(dtype).view(shape)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("shape", "order"),
    [
        ((6, 10, 32), (2, 0, 1)),  # sequences channels first
        ((32, 10, 6), (2, 1, 0)),  # and back
        ((1, 4, 70, 37), (0, 1, 3, 2)),  # the bias of an attention
        ((128, 8, 16), (0, 2, 1)),
        ((100, 3), (1, 0)),
        ((3, 1, 65), (2, 1, 0)),
    ],
)
def test_dense_copies_equal_pytorch(shape, order, dtype, monkeypatch):
    x = numbered(shape, dtype).permute(order)
    expected = x.contiguous()
    monkeypatch.setattr(Tensor, "contiguous", None)
    found = elementwise.dense(x)
    assert found.is_contiguous()
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(4, 5, 6),
        torch.zeros(4, 5, 6).transpose(0, 1),  # whole lines stay
        torch.zeros(2, 3, 4, 5, 6).permute(4, 3, 2, 1, 0),
        torch.zeros(4, 10)[:, ::2],
        torch.zeros(0, 3, 4).permute(2, 1, 0),
    ],
    ids=lambda x: str(tuple(x.stride())),
)
def test_what_needs_no_turn_is_left_to_pytorch(x, monkeypatch):
    monkeypatch.setattr(elementwise, "_transpose_kernel", None)
    assert torch.equal(elementwise.dense(x), x)
    assert elementwise.dense(x).is_contiguous()
