"""The training step's own state: what warm-up touches is put back."""

import pytest
import torch
from torch import nn

from scalefold.config import TrainingConfig
from scalefold.step.graphs import preserved
from scalefold.step.optimizer import Optimizer
from scalefold.step.parameters import FlatParameters


def trained() -> Optimizer:
    """An optimizer after two updates: no buffer is zero any more."""
    torch.manual_seed(1)
    module = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    flat = FlatParameters(module, torch.device("cpu"), compute_dtype=lambda name: torch.bfloat16)
    optimizer = Optimizer(flat, TrainingConfig())
    for step in (1, 2):
        update(optimizer, step)
    return optimizer


def update(optimizer: Optimizer, step: int) -> None:
    """One update with a gradient of its own."""
    for gradient in optimizer.flat.gradients.values():
        gradient.normal_()
    optimizer.prepare(step)
    optimizer.apply()
    optimizer.count()


def state(optimizer: Optimizer) -> dict[str, torch.Tensor]:
    """Everything that must not differ."""
    flat = optimizer.flat
    own = {"master": flat.master, "exp_avg": optimizer.exp_avg, "exp_avg_sq": optimizer.exp_avg_sq}
    counters = torch.tensor([optimizer.adam_step, optimizer.num_averaged])
    computing = {f"parameter {i}": parameter.detach() for i, parameter in enumerate(flat.parameters)}
    everything = {**own, "averaged": optimizer.averaged, "counters": counters, **computing}
    return {name: value.clone() for name, value in everything.items()}


@pytest.mark.parametrize("fails", [False, True])
def test_warm_up_puts_every_bit_back_and_leaves_no_gradient(fails: bool) -> None:
    optimizer = trained()
    before = state(optimizer)

    def disturb() -> None:
        with preserved(optimizer):
            update(optimizer, 3)
            assert all(not torch.equal(value, before[name]) for name, value in state(optimizer).items())
            if fails:
                raise RuntimeError("a kernel does not compile")

    if fails:
        with pytest.raises(RuntimeError, match="does not compile"):
            disturb()
    else:
        disturb()
    after = state(optimizer)
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert all(not gradient.any() for gradient in optimizer.flat.gradients.values())
    assert float(optimizer.grad_norm) == 0.0
