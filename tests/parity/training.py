"""Whole training steps of the small model against the reference: forward, backward, clip, Adam, averaging."""

from dataclasses import dataclass

import torch
from torch import Tensor

from parity import golden
from parity.whole import compare
from scalefold.config import LossConfig, TrainingConfig
from scalefold.model import loss, select_slice, violations
from scalefold.step.optimizer import Optimizer, learning_rate
from scalefold.step.parameters import FlatParameters
from scalefold.step.reducer import GradientReducer

NUM_STEPS = 4
CONFIG = TrainingConfig(
    opt_base_learning_rate=1e-3, opt_learning_rate_warmup_init=1e-5, opt_learning_rate_warmup_steps=2
)


@dataclass(frozen=True)
class StepErrors:
    """Relative errors after one optimizer step."""

    learning_rate: float
    grad_norm: float
    losses: dict[str, float]
    parameters: dict[str, float]
    averages: dict[str, float]


def measure() -> list[StepErrors]:
    """Errors after each of the reference's four steps; the recycling passes differ between steps."""
    arrays, batch = golden.load(golden.locate("train_steps.npz")), golden.small_batch()
    model = golden.small_model()
    flat = FlatParameters(model, torch.device("cpu"))
    optimizer, reducer = Optimizer(flat, CONFIG), GradientReducer(flat, None)
    errors = []
    for step in range(1, NUM_STEPS + 1):
        expected = golden.part(arrays, f"step{step}")
        passes = int(expected["num_recycling"]) + 1
        supervised = select_slice(batch, passes - 1)
        reducer.begin()
        outputs = model(batch, passes)
        total, terms = loss.alphafold_loss(outputs, supervised, LossConfig())
        total.backward()
        reducer.finish()
        optimizer.prepare(step)
        optimizer.apply()
        optimizer.count()
        terms = terms | {"violation": violations.violation_loss(outputs, supervised).detach().mean(), "total": total}
        errors.append(_step_errors(step, expected, terms, optimizer))
    return errors


def _step_errors(step: int, expected: dict[str, Tensor], terms: dict[str, Tensor], optimizer: Optimizer) -> StepErrors:
    flat = optimizer.flat
    return StepErrors(
        learning_rate=abs(learning_rate(step, CONFIG) - float(expected["lr"])),
        grad_norm=golden.relative_error(optimizer.grad_norm, expected["grad_norm"]),
        losses=compare(terms, golden.part(expected, "loss") | {"total": expected["total"]}),
        parameters=compare(dict(flat.named_views(flat.master)), golden.part(expected, "param")),
        averages=compare(dict(flat.named_views(optimizer.averaged)), golden.part(expected, "swa")),
    )
