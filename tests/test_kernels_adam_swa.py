"""Triton optimizer kernels and dropout masks against their plain definitions."""

import pytest
import torch

from kernel_accuracy import DEVICE, Draw
from scalefold.config import TrainingConfig
from scalefold.kernels import reference
from scalefold.kernels.choice import operations
from scalefold.kernels.ops import adam_swa, elementwise
from scalefold.step.optimizer import Optimizer
from scalefold.step.parameters import FlatParameters

HYPER = {"beta_1": 0.9, "beta_2": 0.999, "eps": 1e-6, "swa_decay": 0.9}


def buffers(n: int, grad_dtype: torch.dtype) -> list[torch.Tensor]:
    """param, grad, exp_avg, exp_avg_sq, averaged."""
    draw = Draw(n)
    return [draw(n), draw(n).to(grad_dtype), draw(n), draw(n).square(), draw(n)]


@pytest.mark.parametrize("copy", [0.0, 1.0])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", [1, 1024, 3001])
def test_adam_swa_equals_its_definition(n, grad_dtype, copy):
    ours, plain = buffers(n, grad_dtype), buffers(n, grad_dtype)
    scalars = torch.tensor([0.7, 1e-3, 0.3, 0.2, copy], device=DEVICE)
    low = torch.full((n,), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    for _ in range(3):
        reference.adam_swa(*plain, None, scalars, **HYPER)
        adam_swa.adam_swa(*ours, low, scalars, **HYPER)
    for own, expected in zip(ours, plain, strict=True):
        torch.testing.assert_close(own, expected, rtol=2e-6, atol=2e-6)
    assert torch.equal(low, ours[0].bfloat16())
    if copy:
        assert torch.equal(ours[4], ours[0])


def test_adam_swa_without_a_copy_equals_the_one_with():
    first, second = buffers(77, torch.float32), buffers(77, torch.float32)
    scalars = torch.tensor([1.0, 1e-3, 0.1, 0.03, 0.0], device=DEVICE)
    adam_swa.adam_swa(*first, None, scalars, **HYPER)
    adam_swa.adam_swa(*second, torch.empty(77, dtype=torch.bfloat16, device=DEVICE), scalars, **HYPER)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("table", ["reference", "triton"])
def test_every_segment_takes_its_own_scale_into_norm_and_clip(table):
    model, scales = torch.nn.Linear(40, 30, device=DEVICE), {"weight": 1 / 218, "bias": 1 / 1744}
    flat = FlatParameters(model, torch.device(DEVICE), gradient_scale=scales.__getitem__)
    optimizer, means = Optimizer(flat, TrainingConfig(), operations(table)), {}
    for slot in flat.slots:
        segment = flat.segment_of(slot)
        gradient = flat.view(flat.gradients[segment], slot, segment.start)
        means[slot.name] = gradient.copy_(Draw(slot.start + 1)(*slot.shape)) * scales[slot.name]
    optimizer.prepare(1)
    optimizer.apply()
    norm = torch.nn.utils.get_total_norm(list(means.values()))
    torch.testing.assert_close(optimizer.grad_norm, norm, rtol=1e-6, atol=0)
    for name, moment in flat.named_views(optimizer.exp_avg):
        torch.testing.assert_close(moment, 0.1 * means[name] * (0.1 / norm).clamp(max=1.0), rtol=2e-5, atol=0)


def test_buffers_of_different_length_are_refused():
    param, grad, *moments = buffers(8, torch.float32)
    with pytest.raises(ValueError, match="one length"):
        adam_swa.adam_swa(param, grad[:4], *moments, None, torch.zeros(5, device=DEVICE), **HYPER)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", [1, 1023, 50_000])
def test_sum_of_squares_is_exact_to_fp32_rounding_and_repeats(n, dtype):
    values = Draw(n)(n).to(dtype)
    total = adam_swa.sum_of_squares(values)
    assert total.shape == ()
    torch.testing.assert_close(total.double(), values.double().square().sum(), rtol=1e-6, atol=0.0)
    assert torch.equal(total, adam_swa.sum_of_squares(values))


def test_more_values_than_one_round_of_programs_are_all_counted(monkeypatch):
    monkeypatch.setattr(adam_swa, "NORM_PROGRAMS", 3)
    assert adam_swa.sum_of_squares(torch.ones(10_000, device=DEVICE)).item() == 10_000.0


def test_dropout_mask_equals_its_definition_for_the_same_seed():
    torch.manual_seed(3)
    ours = elementwise.dropout_mask((2, 1, 57, 3), 0.25, torch.device(DEVICE))
    torch.manual_seed(3)
    torch.testing.assert_close(ours, reference.dropout_mask((2, 1, 57, 3), 0.25, torch.device(DEVICE)))


def test_masks_drawn_together_have_their_shapes_and_the_rate():
    first, second = elementwise.dropout_masks([(100, 100), (1, 7)], 0.25, torch.device(DEVICE))
    assert (first.shape, second.shape) == ((100, 100), (1, 7))
    assert set(first.unique().tolist()) == {0.0, torch.tensor(4.0 / 3.0).item()}
    assert 0.22 < (first == 0).float().mean().item() < 0.28


@pytest.mark.gpu
def test_full_size_adam_swa_equals_its_definition():
    ours, plain = buffers(93_229_082, torch.bfloat16), buffers(93_229_082, torch.bfloat16)
    scalars = torch.tensor([0.7, 1e-3, 0.3, 0.2, 0.0], device=DEVICE)
    reference.adam_swa(*plain, None, scalars, **HYPER)
    adam_swa.adam_swa(*ours, None, scalars, **HYPER)
    for own, expected in zip(ours, plain, strict=True):
        torch.testing.assert_close(own, expected, rtol=2e-6, atol=2e-6)
