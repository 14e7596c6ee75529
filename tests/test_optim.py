"""The flat optimizer against torch's own Adam, clipping and averaged model; the learning-rate schedule."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from scalefold.config import TrainingConfig
from scalefold.kernels.rows import fused_view
from scalefold.step.optimizer import Optimizer, learning_rate
from scalefold.step.parameters import FlatParameters, lay_out, storage_order
from scalefold.step.reducer import GradientReducer


class Attention(nn.Module):
    """Registers its projections in the reference's order."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("q", "k", "v", "o", "g"):
            setattr(self, f"linear_{name}", nn.Linear(8, 8, bias=name in "og"))
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear_o(torch.tanh(self.linear_q(x) * self.linear_k(x) + self.linear_v(x)) * self.linear_g(x))


def take_step(flat: FlatParameters, optimizer: Optimizer, step: int) -> None:
    GradientReducer(flat, None).finish()
    optimizer.prepare(step)
    optimizer.apply()
    optimizer.count()


@pytest.mark.parametrize("scale", [1e-3, 10.0], ids=["norm below the limit", "norm above the limit"])
def test_five_steps_equal_torch_adam_with_clipping_and_averaging(scale: float) -> None:
    torch.manual_seed(0)
    model, config = Attention(), TrainingConfig(opt_base_learning_rate=1e-2, opt_learning_rate_warmup_steps=3)
    twin = copy.deepcopy(model)
    adam = torch.optim.Adam(twin.parameters(), betas=(0.9, 0.999), eps=1e-6)
    average = AveragedModel(twin, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    flat = FlatParameters(model, torch.device("cpu"))
    optimizer = Optimizer(flat, config)
    for step in range(1, 6):
        x = torch.randn(4, 8)
        (model(x).square().sum() * scale).backward()
        take_step(flat, optimizer, step)
        adam.zero_grad(set_to_none=False)
        (twin(x).square().sum() * scale).backward()
        twin.unused.grad = torch.zeros(3)
        norm = nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
        adam.param_groups[0]["lr"] = learning_rate(step, config)
        adam.step()
        average.update_parameters(twin)
        torch.testing.assert_close(optimizer.grad_norm, norm, rtol=1e-5, atol=0)
        for name, value in twin.named_parameters():
            torch.testing.assert_close(dict(model.named_parameters())[name], value, rtol=2e-5, atol=1e-7)
        averaged = dict(flat.named_views(optimizer.averaged))
        for name, value in average.module.named_parameters():
            torch.testing.assert_close(averaged[name], value.detach(), rtol=2e-5, atol=1e-7)


def scaled(scales: dict[str, float], dtype: torch.dtype | None = None) -> tuple[FlatParameters, Optimizer]:
    """Flat parameters of which those named after a letter of ``scales`` have that gradient scale, all others 1."""
    torch.manual_seed(0)
    flat = FlatParameters(
        Attention(),
        torch.device("cpu"),
        gradient_scale=lambda name: next((s for letter, s in scales.items() if f"_{letter}." in name), 1.0),
        gradient_dtype=dtype,
    )
    return flat, Optimizer(flat, TrainingConfig(opt_base_learning_rate=1e-2, opt_learning_rate_warmup_steps=0))


def by_name(flat: FlatParameters, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in flat.named_views(buffer)}


def filled(flat: FlatParameters, scales: dict[str, float], size: float) -> dict[str, torch.Tensor]:
    """Draw the flat gradient; returns its values times their scales, exact to fp64, by name."""
    generator, exact = torch.Generator().manual_seed(1), {}
    for slot in sorted(flat.slots, key=lambda slot: slot.name):
        segment = flat.segment_of(slot)
        place = flat.view(flat.gradients[segment], slot, segment.start)
        place.copy_(size * torch.randn(slot.shape, generator=generator))
        exact[slot.name] = place.double() * next((s for k, s in scales.items() if f"_{k}." in slot.name), 1.0)
    return exact


@pytest.mark.parametrize("size", [1e-3, 10.0], ids=["norm below the limit", "norm above the limit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_summed_gradient_updates_as_its_scaled_values_do_without_rounding_them(size, dtype) -> None:
    scales = {"q": 1 / 218, "o": 1 / 1744}  # 218 replicas of 8 ranks: what all ranks hold a part of, and the rest
    flat, optimizer = scaled(scales, dtype)
    exact = filled(flat, scales, size)
    norm = torch.stack([g.square().sum() for g in exact.values()]).sum().sqrt()
    factor = min(1.0, 0.1 / (norm.item() + 1e-6))
    before = by_name(flat, flat.master)
    optimizer.prepare(1)
    optimizer.apply()
    assert optimizer.grad_norm.item() == pytest.approx(norm.item(), rel=1e-6)
    mean, square, after = (by_name(flat, b) for b in (optimizer.exp_avg, optimizer.exp_avg_sq, flat.master))
    for name, gradient in exact.items():
        clipped = factor * gradient
        torch.testing.assert_close(mean[name].double(), 0.1 * clipped, rtol=1e-6, atol=0)
        torch.testing.assert_close(square[name].double(), 1e-3 * clipped.square(), rtol=2e-6, atol=1e-30)
        expected = before[name].double() - 1e-2 * clipped / (clipped.abs() + 1e-6)
        torch.testing.assert_close(after[name].double(), expected, rtol=0, atol=1e-7)


def test_query_key_value_and_gate_projections_are_neighbours_in_memory() -> None:
    model = Attention()
    flat = FlatParameters(model, torch.device("cpu"))
    order = [slot.name for slot in flat.slots]
    first = order.index("linear_q.weight")
    assert order[first : first + 4] == [f"linear_{n}.weight" for n in "qkvg"]
    assert model.linear_k.weight.data_ptr() - model.linear_q.weight.data_ptr() == 4 * 64
    assert sorted(order) == sorted(name for name, _ in model.named_parameters())


def test_storage_order_keeps_names_that_lack_a_query() -> None:
    assert storage_order(["a.linear_g.weight", "a.linear_z.weight"]) == ["a.linear_g.weight", "a.linear_z.weight"]


def test_operands_of_the_outer_product_are_neighbours_in_storage() -> None:
    own = [f"b.outer_product_mean.linear_{n}.{kind}" for n in (1, 2) for kind in ("weight", "bias")]
    others = ["b.transition.linear_1.weight", "b.transition.linear_1.bias", "b.transition.linear_2.weight"]
    assert storage_order(own + others) == [own[0], own[2], own[1], own[3], *others]


def test_bf16_parameters_compute_from_a_copy_that_follows_the_master() -> None:
    torch.manual_seed(0)
    model = Attention()
    flat = FlatParameters(
        model, torch.device("cpu"), lambda name: torch.float32 if name.startswith("linear_o") else torch.bfloat16
    )
    optimizer = Optimizer(flat, TrainingConfig(opt_base_learning_rate=0.1))
    assert (model.linear_q.weight.dtype, model.linear_o.weight.dtype) == (torch.bfloat16, torch.float32)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    take_step(flat, optimizer, 1)
    master = dict(flat.named_views(flat.master))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), master[name].to(parameter.dtype), rtol=0, atol=0)


def test_accumulated_gradients_are_the_sum_of_their_parts() -> None:
    torch.manual_seed(0)
    model, flat = (m := Attention()), FlatParameters(m, torch.device("cpu"))
    reducer, x = GradientReducer(flat, None), torch.randn(2, 3, 8)
    for part in range(2):
        reducer.begin(accumulate=part > 0, communicate=part == 1)
        model(x[part]).sum().backward()
        reducer.finish()
    summed = next(iter(flat.gradients.values())).clone()
    reducer.begin()
    model(x.flatten(0, 1)).sum().backward()
    reducer.finish()
    torch.testing.assert_close(summed, next(iter(flat.gradients.values())))


@pytest.mark.parametrize(
    "name, base, init, warmup",
    [
        ("base1e-3_warmup0", 1e-3, 1e-5, 0),
        ("base1e-3_init1e-5_warmup1", 1e-3, 1e-5, 1),
        ("base1e-3_init1e-5_warmup10", 1e-3, 1e-5, 10),
        ("base2e-3_init0_warmup7", 2e-3, 0.0, 7),
    ],
)
def test_learning_rates_equal_the_reference(golden_dir: Path, name: str, base: float, init: float, warmup: int) -> None:
    rates = json.loads((golden_dir / "schedule_and_seeds.json").read_text())["lr"][name]
    config = TrainingConfig(
        opt_base_learning_rate=base, opt_learning_rate_warmup_init=init, opt_learning_rate_warmup_steps=warmup
    )
    assert [learning_rate(i + 1, config) for i in range(len(rates))] == rates


def test_laid_out_parameters_keep_their_values_and_projections_become_neighbours():
    module = Attention()
    module.unused.data = module.unused.data.half()
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    lay_out(module)
    for name, parameter in module.named_parameters():
        assert parameter.dtype == before[name].dtype
        assert torch.equal(parameter, before[name]), name
    weights = [getattr(module, f"linear_{name}").weight.detach() for name in ("q", "k", "v", "g")]
    assert fused_view(weights).data_ptr() == weights[0].data_ptr()
    assert torch.equal(fused_view(weights), torch.cat(weights))


@pytest.mark.parametrize("accumulate", [False, True], ids=["copied", "added"])
def test_gradients_collected_in_pieces_are_the_same_bits(accumulate: bool) -> None:
    found = []
    for piece in (10**6, 5):
        torch.manual_seed(0)
        model = Attention()
        flat = FlatParameters(model, torch.device("cpu"), gradient_dtype=torch.bfloat16)
        flat.piece = piece
        for round_ in range(2):
            model(torch.randn(4, 8)).square().sum().backward()
            model.linear_q.weight.grad = torch.randn(8, 8).t()  # of other strides than the parameter
            flat.collect_gradients(accumulate and round_ > 0)
        found.append(torch.cat(list(flat.gradients.values())))
        assert all(parameter.grad is None for parameter in model.parameters())
    assert found[0].any()
    assert torch.equal(*found)
