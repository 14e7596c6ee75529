"""Dropout masks in two launches: uniform numbers of the device's generator, then one kernel."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from collections.abc import Sequence
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _threshold_kernel(values, n, rate, kept, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(values + index, mask=index < n, other=0.0)
    tl.store(values + index, tl.where(value >= rate, kept, 0.0), mask=index < n)


def dropout_mask(shape: Sequence[int], rate: float, device: torch.device) -> Tensor:
    """``reference.dropout_mask``: the same mask for the same state of the generator."""
    return dropout_masks([shape], rate, device)[0]


def dropout_masks(shapes: Sequence[Sequence[int]], rate: float, device: torch.device) -> list[Tensor]:
    """Several masks of one rate from one draw: fp32 views of one buffer, in two launches altogether."""
    sizes = [prod(shape) for shape in shapes]
    values = torch.rand(sum(sizes), device=device)
    _threshold_kernel[(triton.cdiv(values.numel(), BLOCK),)](
        values, values.numel(), rate, 1.0 / (1.0 - rate), BLOCK=BLOCK, num_warps=4
    )
    return [part.view(tuple(shape)) for part, shape in zip(values.split(sizes), shapes, strict=True)]
