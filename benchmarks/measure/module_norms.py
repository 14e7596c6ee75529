"""Gradient norms by module beside what rounding alone does to them on one GPU; used by ``multi_gpu.py``.

The noise of a module's norm is the root mean square of the relative difference between two roundings of the weights to
bf16: before each is rounded, every weight moves by a random part of its last place. More than MARGIN times the noise is
more than another rounding explains.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping

import torch

from common import move_within_rounding
from scalefold.step.parameters import FlatParameters
from step_time import module_of

SEEDS = range(1, 7)
MARGIN = 2.0
Norms = Mapping[str, float]


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
def round_otherwise(flat: FlatParameters, seed: int) -> None:
    """Another rounding of the weights that compute in bf16; those that compute in fp32 stay."""
    random = torch.Generator(flat.master.device).manual_seed(seed)
    for segment in flat.segments:
        if segment.dtype is torch.bfloat16:
            move_within_rounding(flat.master[segment.start : segment.stop], random)
    flat.refresh()


def rounding_noise(norms_of: Callable[[int], Norms], seeds: Iterable[int] = SEEDS) -> dict[str, float]:
    """Per module the root mean square of relative differences between any two of the seeds."""
    found = [norms_of(seed) for seed in seeds]
    pairs = list(itertools.combinations(found, 2))
    return {m: math.sqrt(sum(relative(a[m], b[m]) ** 2 for a, b in pairs) / len(pairs)) for m in found[0]}


def relative(a: float, b: float) -> float:
    """Difference over the second; 0 where both are 0."""
    return abs(a - b) / abs(b) if b else float(a != b)


def norm_rows(own: Norms, one_gpu: Norms, noise: Norms) -> list[dict[str, object]]:
    """A row per module: both norms, their relative difference, the noise, and how many times it that is."""
    rows: list[dict[str, object]] = []
    for module, norm in own.items():
        difference = relative(norm, one_gpu[module])
        times = difference / noise[module] if noise[module] else math.inf if difference else 0.0
        facts = {"module": module, "norm": f"{norm:.6g}", "one_gpu": f"{one_gpu[module]:.6g}"}
        rows.append(
            {**facts, "difference": f"{difference:.2e}", "noise": f"{noise[module]:.2e}", "times": f"{times:.2f}"}
        )
    return rows


def beyond(rows: Iterable[Mapping[str, object]]) -> list[str]:
    """Modules whose norm differs by more than MARGIN times the noise."""
    return [str(row["module"]) for row in rows if float(str(row["times"])) > MARGIN]
