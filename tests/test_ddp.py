"""Sums of gradients over ranks: every parameter once, in its type, and the mean made of them in fp32."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from processes import run_ranks
from scalefold.config import TrainingConfig
from scalefold.step.optimizer import Optimizer
from scalefold.step.parameters import FlatParameters
from scalefold.step.reducer import GradientReducer

RANKS = 3  # a third is no number of bf16


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40), nn.Linear(40, 8))


def gradients(rank: int, module: nn.Module) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [1e-3 * torch.randn(p.shape, generator=generator).to(p.dtype) for p in module.parameters()]


def reduced_and_applied(rank: int, in_parts: bool) -> dict[str, float]:
    """Largest relative errors: of the sum that the group transports, and of norm and first moment against its mean."""
    module, group = model(), dist.group.WORLD
    scale = {"0": 1.0 / RANKS, "1": 1.0 / (2 * RANKS)}
    flat = FlatParameters(
        module,
        torch.device("cpu"),
        compute_dtype=lambda name: torch.bfloat16,
        gradient_scale=lambda name: scale[name[0]],
    )
    optimizer, reducer = Optimizer(flat, TrainingConfig()), GradientReducer(flat, group, bucket_mib=1e-3)
    for parameter, gradient in zip(module.parameters(), gradients(rank, module), strict=True):
        parameter.grad = gradient
    reducer.begin(communicate=not in_parts)
    reducer.finish()
    if in_parts:
        reducer.reduce_now()
    optimizer.prepare(1)
    optimizer.apply()
    names = [name for name, _ in module.named_parameters()]
    parts = zip(*(gradients(r, module) for r in range(RANKS)), strict=True)
    exact = [torch.stack(part).double().sum(0) for part in parts]
    sums = {s.name: flat.view(flat.gradients[g], s, g.start) for s in flat.slots for g in (flat.segment_of(s),)}
    means = {name: value.double() * scale[name[0]] for name, value in sums.items()}
    norm = torch.stack([mean.square().sum() for mean in means.values()]).sum().sqrt().item()
    moments, factor = dict(flat.named_views(optimizer.exp_avg)), 0.1 * min(1.0, 0.1 / (norm + 1e-6))
    return {
        "sum": max(relative(sums[name], value) for name, value in zip(names, exact, strict=True)),
        "norm": abs(optimizer.grad_norm.item() / norm - 1),
        "moment": max(
            ((moments[n] - factor * mean).abs() / mean.abs()).nan_to_num().max().item() for n, mean in means.items()
        ),
    }


def relative(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


@pytest.mark.distributed
@pytest.mark.parametrize("in_parts", [False, True], ids=["while backward runs", "after accumulation"])
def test_the_mean_of_bf16_sums_is_made_in_fp32(in_parts: bool) -> None:
    for errors in run_ranks(reduced_and_applied, RANKS, in_parts):
        assert errors["sum"] <= 2.0**-8, errors
        assert max(errors["norm"], errors["moment"]) <= 1e-6, errors
