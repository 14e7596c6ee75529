"""What attention over templates adds, in one launch each way, against its plain definition."""

import dataclasses

import pytest
import torch
from torch import Tensor

from kernel_accuracy import DEVICE, DTYPES, Draw, assert_as_accurate_as_pytorch
from scalefold.config import TemplateConfig
from scalefold.kernels.around import templates
from scalefold.kernels.table import REFERENCE, use_operations
from scalefold.model.templates import TemplatePointwiseAttention

C_Z, C_T = 32, 16
KERNELS = dataclasses.replace(REFERENCE, add_templates=templates.add_templates)  # for fp32 too


def module(heads: int, width: int) -> TemplatePointwiseAttention:
    config = TemplateConfig(num_heads_pointwise=heads, c_hidden_pointwise=width)
    return TemplatePointwiseAttention(C_Z, C_T, config).to(DEVICE)


def leaves(own: TemplatePointwiseAttention, batch: int, count: int, rows: int, columns: int) -> list[Tensor]:
    """z, t and parameters."""
    draw = Draw(batch + count)
    inputs = [draw(batch, rows, columns, C_Z), draw(batch, count, rows, columns, C_T)]
    return [*inputs, *(draw(*parameter.shape) * 0.3 for parameter in own.parameters())]


def added(own: TemplatePointwiseAttention, ops, mask: Tensor):
    """``added`` as a function of the leaves."""

    class Call(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own = own

        def forward(self, z: Tensor, t: Tensor) -> Tensor:
            return self.own.added(t, z, mask)

    call, names = Call(), [f"own.{name}" for name, _ in own.named_parameters()]

    def function(z: Tensor, t: Tensor, *parameters: Tensor) -> Tensor:
        use_operations(own, ops)
        return torch.func.functional_call(call, dict(zip(names, parameters, strict=True)), (z, t))

    return function


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "heads", "width"), [((1, 4, 7, 11), 4, 16), ((2, 3, 5, 5), 2, 8), ((1, 5, 3, 3), 1, 16)]
)
def test_outputs_and_gradients_are_as_accurate_as_the_definition(shape, heads, width, dtype):
    own, mask = module(heads, width), torch.ones(shape[:2], device=DEVICE)
    mask[0, 0] = 0.0
    ours, plain = added(own, KERNELS, mask), added(own, REFERENCE, mask)
    assert_as_accurate_as_pytorch(ours, plain, leaves(own, *shape), dtype)


def test_an_absent_template_gets_no_gradient_and_samples_without_any_stay_as_they_are():
    own = module(2, 8)
    z, t, *parameters = (x.requires_grad_() for x in leaves(own, 2, 3, 4, 4))
    mask = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]], device=DEVICE)
    out = added(own, KERNELS, mask)(z, t, *parameters)
    out.sum().backward()
    assert not t.grad[0, 1].any()
    assert t.grad[0, 0].any()
    assert torch.equal(out[1], z[1])
    assert not t.grad[1].any()
    assert (z.grad[1] == 1.0).all()


@pytest.mark.gpu
def test_gradients_repeat_their_bits():
    own, mask = module(4, 16), torch.ones(1, 4, device=DEVICE)
    given = [x.bfloat16().requires_grad_() for x in leaves(own, 1, 4, 90, 90)]
    function = added(own, KERNELS, mask)

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(*given).float().sin().sum(), given)

    first = gradients()
    assert all(gradient.isfinite().all() for gradient in first)
    for _ in range(10):
        assert all(map(torch.equal, first, gradients()))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda z, t: (z.transpose(1, 2), t), "not everything is contiguous"),
        (lambda z, t: (z, t[:, :0]), "an argument is empty"),
        (lambda z, t: (z[..., :3].contiguous(), t), "width 3 is no power of two"),
        (lambda z, t: (z, t), None),
    ],
)
def test_what_the_kernels_do_not_take_is_named(change, reason):
    own = module(2, 8)
    z, t, q, k, v, o, bias = leaves(own, 1, 2, 3, 5)
    found = templates.obstacle(*change(z, t), torch.ones(1, 2), (q, k, v, o), bias, 2, 1e5)
    assert found == reason or (found is not None and reason is not None and found.startswith(reason))
