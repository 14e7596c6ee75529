"""Gradient norms by module beside what rounding alone does to them on one GPU; used by ``multi_gpu.py``.

The noise of a module's norm is the root mean square of the relative difference between two roundings of the weights to
bf16: before each is rounded, every weight moves by a random part of its last place. Several GPUs compute with the same
weights, and the root mean square of their relative differences from one GPU is set against that: more than MARGIN
times the noise is more than another rounding explains. (One rounding alone would exceed it in one module of twenty by
chance; rows of ``module_norms.csv`` say how many they are of.) Where one GPU has also computed in fp32 with these
weights, a row tells the root mean square of the relative error of both.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import torch

from common import move_within_rounding
from scalefold.data.loading.loader import Batch
from scalefold.step.graphs import TrainStep, preserved
from scalefold.step.parameters import FlatParameters
from step_time import module_of

SEEDS = range(1, 13)
MARGIN = 2.0
Norms = Mapping[str, float]
Weights = Mapping[str, torch.Tensor]


@torch.no_grad()
def module_norms(flat: FlatParameters) -> dict[str, float]:
    """Norm of the mean gradient of each module, blocks pooled, from the sums that the flat gradients hold."""
    squares: dict[str, list[torch.Tensor]] = defaultdict(list)
    for slot in flat.slots:
        segment = flat.segment_of(slot)
        gradient = flat.view(flat.gradients[segment], slot, segment.start)
        squares[module_of(slot.name)].append(gradient.double().square().sum() * segment.gradient_scale**2)
    return {module: math.sqrt(float(sum(parts))) for module, parts in squares.items()}


@torch.no_grad()
def rounded_otherwise(flat: FlatParameters, seed: int) -> Weights:
    """Weights as they compute after another rounding of those in bf16, on the host; those in fp32 stay."""
    random, weights = torch.Generator(flat.master.device).manual_seed(seed), {}
    for slot in flat.slots:
        weight = flat.view(flat.master, slot).clone()
        if flat.segment_of(slot).dtype is torch.bfloat16:
            move_within_rounding(weight, random)
            weight = weight.bfloat16()
        weights[slot.name] = weight.cpu()
    return weights


@torch.no_grad()
def take_weights(flat: FlatParameters, weights: Weights) -> None:
    """Compute with these from now on."""
    for name, view in flat.named_views(flat.master):
        view.copy_(weights[name])
    flat.refresh()


def first_values(
    step: TrainStep, batch: Batch, roundings: Iterable[Weights] = ()
) -> tuple[dict[str, float], list[Norms]]:
    """Loss, terms and gradient norm of one eager step, and with other weights the norms by module; all is put back."""
    norms, flat = [], step.optimizer.flat
    with preserved(step.optimizer):
        values = TrainStep.__call__(_Eager(step), batch, 1, 1).tolist()  # type: ignore[arg-type]
        for weights in roundings:
            take_weights(flat, weights)
            TrainStep.__call__(_Eager(step), batch, 1, 1)  # type: ignore[arg-type]
            norms.append(module_norms(flat))
    return dict(zip(step.names, values, strict=True)), norms


class _Eager(TrainStep):
    """The same step without graphs."""

    def __init__(self, step: TrainStep) -> None:
        super().__init__(step.objective, step.optimizer, step.reducer, step.micro_batch_size, 1, step.train_group)
        self._names_of = step

    def _forward_backward(self, *args, **kwargs) -> torch.Tensor:
        values = super()._forward_backward(*args, **kwargs)
        self._names_of.names = self.names
        return values


def differences(pairs: Sequence[tuple[Norms, Norms]]) -> dict[str, float]:
    """Per module the root mean square of relative differences."""
    return {m: math.sqrt(sum(relative(a[m], b[m]) ** 2 for a, b in pairs) / len(pairs)) for m in pairs[0][0]}


def relative(a: float, b: float) -> float:
    """Difference over the second; 0 where both are 0."""
    return abs(a - b) / abs(b) if b else float(a != b)


def norm_rows(own: Sequence[Norms], one_gpu: Sequence[Norms], fp32: Sequence[Norms] = ()) -> list[dict[str, object]]:
    """A row per module: mean norms, their relative difference, the noise, how many times it that is, and both errors.

    own, one_gpu, fp32: norms by rounding, of the same weights; without those in fp32 errors are empty.
    """
    rows: list[dict[str, object]] = []
    errors = [differences(list(zip(found, fp32, strict=True))) if fp32 else {} for found in (own, one_gpu)]
    noise = differences(list(itertools.combinations(one_gpu, 2)))
    for module, difference in differences(list(zip(own, one_gpu, strict=True))).items():
        times = difference / noise[module] if noise[module] else math.inf if difference else 0.0
        norm, expected = (sum(norms[module] for norms in found) / len(found) for found in (own, one_gpu))
        facts = {"module": module, "norm": f"{norm:.6g}", "one_gpu": f"{expected:.6g}", "roundings": len(own)}
        judged = {"difference": f"{difference:.2e}", "noise": f"{noise[module]:.2e}", "times": f"{times:.2f}"}
        both = (f"{error[module]:.2e}" if fp32 else "" for error in errors)
        rows.append(facts | judged | dict(zip(("error", "one_gpu_error"), both, strict=True)))
    return rows


def beyond(rows: Iterable[Mapping[str, object]]) -> list[str]:
    """Modules whose norm differs by more than MARGIN times the noise."""
    return [str(row["module"]) for row in rows if float(str(row["times"])) > MARGIN]
