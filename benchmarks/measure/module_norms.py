"""Gradient norms by module beside what rounding alone does to them on one GPU; used by ``multi_gpu.py``.

The noise of a module's norm is the root mean square of the relative difference between two roundings of the weights to
bf16: before each is rounded, every weight moves by a random part of its last place. Several GPUs compute with the same
roundings, and the root mean square of their relative differences from one GPU is set against that: more than MARGIN
times the noise is more than another rounding explains. (One rounding alone would exceed it in one module of twenty by
chance; rows of ``module_norms.csv`` say how many they are of.)
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

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


def differences(pairs: Sequence[tuple[Norms, Norms]]) -> dict[str, float]:
    """Per module the root mean square of relative differences."""
    return {m: math.sqrt(sum(relative(a[m], b[m]) ** 2 for a, b in pairs) / len(pairs)) for m in pairs[0][0]}


def relative(a: float, b: float) -> float:
    """Difference over the second; 0 where both are 0."""
    return abs(a - b) / abs(b) if b else float(a != b)


def norm_rows(own: Sequence[Norms], one_gpu: Sequence[Norms]) -> list[dict[str, object]]:
    """A row per module: mean norms, their relative difference, the noise, and how many times it that is.

    own, one_gpu: norms by rounding, of the same roundings.
    """
    rows: list[dict[str, object]] = []
    noise = differences(list(itertools.combinations(one_gpu, 2)))
    for module, difference in differences(list(zip(own, one_gpu, strict=True))).items():
        times = difference / noise[module] if noise[module] else math.inf if difference else 0.0
        norm, expected = (sum(norms[module] for norms in found) / len(found) for found in (own, one_gpu))
        facts = {"module": module, "norm": f"{norm:.6g}", "one_gpu": f"{expected:.6g}", "roundings": len(own)}
        rows.append(
            {**facts, "difference": f"{difference:.2e}", "noise": f"{noise[module]:.2e}", "times": f"{times:.2f}"}
        )
    return rows


def beyond(rows: Iterable[Mapping[str, object]]) -> list[str]:
    """Modules whose norm differs by more than MARGIN times the noise."""
    return [str(row["module"]) for row in rows if float(str(row["times"])) > MARGIN]
