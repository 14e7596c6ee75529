"""Which naming of ambiguous atoms fits a prediction better (Supplement Algorithm 26): one kernel, no gradient.

A program holds one residue and walks over the atoms of all others; no distance is ever written.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from scalefold.kernels.instructions import program, wait_for_predecessors
from scalefold.kernels.reference import ATOMS, FIRST_AMBIGUOUS, LAST_AMBIGUOUS, NAMING_EPS

OPTIONS = {"BLOCK": 512, "num_warps": 4}
EPS = tl.constexpr(NAMING_EPS)
SLOTS, FIRST, LAST = tl.constexpr(ATOMS), tl.constexpr(FIRST_AMBIGUOUS), tl.constexpr(LAST_AMBIGUOUS)


@triton.jit
def _distance(positions, own, others, inside):
    """From one atom to others: [atoms]."""
    total = tl.zeros(others.shape, tl.float32)
    for k in tl.static_range(3):
        difference = tl.load(positions + own * 3 + k) - tl.load(positions + others * 3 + k, mask=inside, other=0.0)
        total += difference * difference
    return tl.sqrt(total + EPS)


@program
@triton.jit
def _misfit_kernel(predicted, truth, alternative, exists, ambiguous, use, n, BLOCK: tl.constexpr):
    """Program (residue, sample): 1 if the alternative names fit better, else 0."""
    wait_for_predecessors()
    atoms = n * SLOTS
    sample = tl.program_id(1).to(tl.int64) * atoms
    predicted, truth, alternative = predicted + sample * 3, truth + sample * 3, alternative + sample * 3
    exists, ambiguous = exists + sample, ambiguous + sample
    misfit = tl.zeros([BLOCK], tl.float32)
    misfit_alternative = tl.zeros([BLOCK], tl.float32)
    for start in range(0, atoms, BLOCK):
        others = start + tl.arange(0, BLOCK)
        inside = others < atoms
        counted = tl.load(exists + others, mask=inside, other=0.0)
        counted *= 1.0 - tl.load(ambiguous + others, mask=inside, other=0.0)
        for slot in tl.static_range(FIRST, LAST):
            own = tl.program_id(0) * SLOTS + slot
            weight = counted * (tl.load(exists + own) * tl.load(ambiguous + own))
            found = _distance(predicted, own, others, inside)
            error = found - _distance(truth, own, others, inside)
            misfit += tl.sqrt(error * error + EPS) * weight
            error = found - _distance(alternative, own, others, inside)
            misfit_alternative += tl.sqrt(error * error + EPS) * weight
    better = tl.sum(misfit_alternative, 0) < tl.sum(misfit, 0)
    tl.store(use + tl.program_id(1).to(tl.int64) * n + tl.program_id(0), tl.where(better, 1.0, 0.0))


def obstacle(*tensors: Tensor) -> str | None:
    """Why ``better_naming`` does not take these arguments, or None."""
    if any(x.dtype != torch.float32 for x in tensors):
        return "not everything is float32"
    return None if tensors[0].numel() else "no residues"


def better_naming(predicted: Tensor, truth: Tensor, alternative: Tensor, exists: Tensor, ambiguous: Tensor) -> Tensor:
    """``reference.better_naming``; sums run in another order, so a tie may fall the other way only by rounding."""
    tensors = [x.contiguous() for x in (predicted, truth, alternative, exists, ambiguous)]
    batch, n = exists.shape[:2]
    use = exists.new_empty(batch, n)
    _misfit_kernel[(n, batch)](*tensors, use, n, **OPTIONS)
    return use


def compile_cases() -> list[tuple[str, Callable[[], object]]]:
    """A benchmark crop; see ``tuning``."""
    shapes = [(1, 256, ATOMS, 3)] * 3 + [(1, 256, ATOMS)] * 2
    return [("better_naming", lambda: better_naming(*(torch.empty(shape, device="meta") for shape in shapes)))]
