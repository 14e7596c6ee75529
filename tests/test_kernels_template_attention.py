"""Attention over templates in one launch, against its plain definition."""

import pytest
import torch

from kernel_accuracy import DEVICE, DTYPES, Draw, assert_as_accurate_as_pytorch
from scalefold.kernels import reference
from scalefold.kernels.around import templates
from scalefold.model.templates import POINTWISE_INF


def leaves(batch: int, count: int, rows: int, columns: int, heads: int, width: int) -> list[torch.Tensor]:
    draw, pair = Draw(batch + count), (rows, columns, heads, width)
    return [draw(batch, *pair), draw(batch, count, *pair), draw(batch, count, *pair)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 4, 7, 9, 4, 16), (2, 3, 5, 5, 2, 8), (1, 5, 3, 3, 1, 16)])
def test_outputs_and_gradients_are_as_accurate_as_the_definition(shape, dtype):
    mask = torch.ones(shape[:2], device=DEVICE)
    mask[0, 0] = 0.0
    ours, plain = (
        lambda *inputs, function=function: function(*inputs, mask, POINTWISE_INF)
        for function in (templates.template_attention, reference.template_attention)
    )
    assert_as_accurate_as_pytorch(ours, plain, leaves(*shape), dtype)


def test_an_absent_template_gets_no_gradient_and_all_absent_ones_weigh_alike():
    q, k, v = (x.requires_grad_() for x in leaves(1, 3, 4, 4, 2, 8))
    mask = torch.tensor([[1.0, 0.0, 1.0]], device=DEVICE)
    templates.template_attention(q, k, v, mask, POINTWISE_INF).sum().backward()
    assert not k.grad[:, 1].any()
    assert not v.grad[:, 1].any()
    none = templates.template_attention(torch.zeros_like(q), k, v, torch.zeros_like(mask), POINTWISE_INF)
    torch.testing.assert_close(none, v.mean(1))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda q, k, v: (q.transpose(1, 2), k, v), "not everything is contiguous"),
        (lambda q, k, v: (q, k[:, :0], v[:, :0]), "an argument is empty"),
        (lambda q, k, v: (q[..., :3].contiguous(), k, v), "width 6 is no power of two"),
        (lambda q, k, v: (q, k, v), None),
    ],
)
def test_what_the_kernels_do_not_take_is_named(change, reason):
    q, k, v = change(*leaves(1, 2, 3, 5, 2, 8))
    found = templates.obstacle(q, k, v, torch.ones(1, 2), POINTWISE_INF)
    assert found == reason or (found is not None and reason is not None and found.startswith(reason))
