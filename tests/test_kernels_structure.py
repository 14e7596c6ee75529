"""All iterations of the structure module in one operation, against the module's own iterations."""

import pytest
import torch
from torch import Tensor

from kernel_accuracy import DEVICE, Draw
from launches import Launches
from loose_products import LooseProducts
from scalefold.config import ModelConfig
from scalefold.eval.model import precision
from scalefold.kernels import triton_ops
from scalefold.kernels.structure import iterations, norms, points
from scalefold.kernels.table import REFERENCE, Operations, use_operations
from scalefold.model.structure import StructureModule

RELATIVE = 1e-5
ZERO_GRADIENT = "ipa.linear_b.bias"  # a softmax does not see it
PROGRAMS = ("norm_kernel", "norm_backward_kernel", "place_kernel", "place_backward_kernel", "features_kernel")


def small_module(dropout: float = 0.1, iterations: int = 3) -> StructureModule:
    """Odd widths, nothing zero."""
    sizes = {"num_blocks": iterations, "num_heads_ipa": 3, "num_qk_points": 2, "num_v_points": 5, "c_hidden_ipa": 6}
    config = ModelConfig(c_s=24, c_z=10, structure={**sizes, "dropout": dropout, "c_hidden_angle_resnet": 8})
    module, draw = StructureModule(config).to(DEVICE).train(), Draw(2)
    for parameter in module.parameters():
        parameter.data = draw(*parameter.shape) * (0.3 if parameter.dim() > 1 else 0.5)
    return module


def run(module: StructureModule, ops: Operations, mask: Tensor) -> dict[str, Tensor]:
    """Outputs and the gradients of everything, for equal inputs, dropout and gradients of the outputs."""
    use_operations(module, ops)
    module.zero_grad(set_to_none=True)
    draw, (batch, n) = Draw(9), mask.shape  # no angle is so short that rounding turns it
    c_s, c_z = module.linear_in.in_features, module.ipa.linear_b.in_features
    s, z = draw(batch, n, c_s).requires_grad_(), draw(batch, n, n, c_z).requires_grad_()
    torch.manual_seed(5)
    outputs = module(s, z, mask, torch.arange(n, device=DEVICE).expand(batch, n) % 20)
    torch.autograd.backward(list(outputs), [draw(*o.shape) for o in outputs])
    gradients = {f"d {name}": p.grad for name, p in module.named_parameters()}
    return {**{k: v.detach() for k, v in outputs._asdict().items()}, "d s": s.grad, "d z": z.grad, **gradients}


@pytest.mark.parametrize(("batch", "n", "dropout"), [(1, 18, 0.0), (2, 5, 0.2), (1, 1, 0.2)])
def test_outputs_and_gradients_are_those_of_one_iteration_after_the_other(batch, n, dropout):
    module, mask = small_module(dropout), Draw(1).mask(batch, n)
    plain, ours = (run(module, ops, mask) for ops in (REFERENCE, triton_ops.TRITON))
    assert ours.keys() == plain.keys()
    for name, expected in plain.items():
        vanishes = n == 1 or name == f"d {ZERO_GRADIENT}"
        scale = expected.norm().clamp_min(plain["d s"].norm() if vanishes else 1e-6)
        assert (ours[name] - expected).norm() <= RELATIVE * scale, name


def test_without_gradients_nothing_but_the_results_is_kept_and_they_are_the_same():
    module, mask = small_module(0.0), torch.ones(1, 5, device=DEVICE)
    use_operations(module, triton_ops.TRITON)
    draw = Draw(3)
    arguments = (draw(1, 5, 24), draw(1, 5, 5, 10), mask, torch.arange(5, device=DEVICE)[None])
    expected = module(*arguments)
    with torch.no_grad():
        found = module(*arguments)
    for own, other in zip(found, expected, strict=True):
        assert torch.equal(own, other)
        assert other.requires_grad
    kept = iterations.Kept.empty(*arguments[:2], iterations.Sizes(8, 3, 6, 2, 5), every=False)
    assert [len(tensor) for tensor in kept[:3]] == [9, 9, 9]
    assert sum(tensor.numel() for tensor in kept[3:]) * 8 == sum(
        tensor.numel() for tensor in iterations.Kept.empty(*arguments[:2], iterations.Sizes(8, 3, 6, 2, 5), True)[3:]
    )


def test_gradients_of_a_second_backward_are_the_same_bits():
    module, mask = small_module(), torch.ones(1, 6, device=DEVICE)
    first, again = (run(module, triton_ops.TRITON, mask) for _ in range(2))
    assert [name for name in first if not torch.equal(first[name], again[name])] == []


def test_quaternions_carry_no_gradient_from_one_iteration_to_the_next():
    module, mask = small_module(0.0), torch.ones(1, 4, device=DEVICE)
    use_operations(module, triton_ops.TRITON)
    draw = Draw(3)
    s, z = draw(1, 4, 24).requires_grad_(), draw(1, 4, 4, 10)
    quaternions = module.iterate(s, z, module.ipa.share(z), mask, None)[1]
    (through_last,) = torch.autograd.grad(quaternions[:, -1].sum(), module.bb_update.linear.bias, retain_graph=True)
    use_operations(module, REFERENCE)
    expected = module.iterate(s, z, module.ipa.share(z), mask, None)[1]
    (plain,) = torch.autograd.grad(expected[:, -1].sum(), module.bb_update.linear.bias)
    torch.testing.assert_close(through_last, plain, rtol=1e-4, atol=1e-6)


def test_products_with_coordinates_never_use_tf32():
    module = small_module(0.0)
    use_operations(module, triton_ops.TRITON)
    draw = Draw(3)
    s, z = draw(1, 5, 24).requires_grad_(), draw(1, 5, 5, 10)
    with precision("tf32"), LooseProducts() as mode:
        _, _, translations = module.iterate(s, z, module.ipa.share(z), torch.ones(1, 5, device=DEVICE), None)
        translations.sum().backward()
    assert mode.seen >= 3
    assert mode.with_coordinates == []


FREE = ("empty", "view", "slice", "select", "transpose", "permute", "unbind", "split", "detach", "expand", "t")


def is_view(name: str) -> bool:
    return name.lstrip("_").removeprefix("unsafe_") in FREE or "empty" in name or "view" in name


def recorded(monkeypatch: pytest.MonkeyPatch) -> Launches:
    own = [*((norms, n) for n in PROGRAMS[:2]), *((points, n) for n in (*PROGRAMS[2:], "features_backward_kernel"))]
    attention = iterations.attention
    kernels = [*own, *((attention, n) for n in ("_forward_kernel", "_rows_kernel", "_columns_kernel"))]
    monkeypatch.setattr(iterations, "sum_all", lambda partials, dtype: [p[0] for p in partials])
    return Launches(monkeypatch, kernels, is_view)


def test_an_iteration_is_a_dozen_launches_forward_and_seventeen_backward(monkeypatch):
    def launches(count: int) -> int:
        with recorded(monkeypatch) as mode:
            iterations.meta_call(24, 16, 8, iterations.Sizes(count, 2, 8, 4, 8))
        return len(mode.names)

    assert launches(7) - launches(2) == 5 * (12 + 17)
