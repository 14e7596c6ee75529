"""Dropout masks in two launches: uniform numbers of the device's generator, then one kernel.

Also the move of many tensors into one buffer, in one launch.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from collections.abc import Sequence
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
COPIED = 4096  # elements per program
ALIGNED = 16  # bytes of an access


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


@triton.jit
def _move(source, target, first, size, BLOCK: tl.constexpr):
    """One block of a tensor of ``size`` elements, from element ``first`` on."""
    index = first + tl.arange(0, BLOCK)
    tl.store(target + index, tl.load(source + index, mask=index < size), mask=index < size)


@triton.jit
def _copy_kernel(table, flat, num_tensors, BLOCK: tl.constexpr):
    """Program: one block of one tensor. table: for each tensor its address, first place in ``flat``, size, and whether
    all of these allow wide accesses; then for each program its tensor and its first element there."""
    block = table + 4 * num_tensors + 2 * tl.program_id(0)
    own, first = table + 4 * tl.load(block), tl.multiple_of(tl.load(block + 1), BLOCK)
    source = tl.load(own).to(tl.pointer_type(flat.dtype.element_ty))
    start, size = tl.load(own + 1), tl.load(own + 2)
    if tl.load(own + 3) != 0:
        _move(tl.multiple_of(source, 16), flat + tl.multiple_of(start, 16), first, tl.multiple_of(size, 8), BLOCK)
    else:
        _move(source, flat + start, first, size, BLOCK)


def copy_table(starts: Sequence[int], sources: Sequence[Tensor]) -> tuple[Tensor, int]:
    """What ``_copy_kernel`` reads, int64 on the host, and its number of programs."""
    addresses, sizes = [source.data_ptr() for source in sources], [source.numel() for source in sources]
    tensors = torch.tensor([addresses, list(starts), sizes, [0] * len(sizes)], dtype=torch.int64)
    tensors[3] = (tensors[0] % ALIGNED == 0) & (tensors[1] % ALIGNED == 0) & (tensors[2] % 8 == 0)
    counts = (tensors[2] + COPIED - 1) // COPIED
    owners = torch.arange(len(sizes)).repeat_interleave(counts)
    firsts = (torch.arange(len(owners)) - (counts.cumsum(0) - counts)[owners]) * COPIED
    return torch.cat([tensors.t().flatten(), torch.stack([owners, firsts], dim=1).flatten()]), len(owners)


def copy_tensors(flat: Tensor, starts: Sequence[int], sources: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """``reference.copy_tensors`` in one launch, by a table of addresses.

    A capture cannot send the table: it is returned, device and host, to be sent when the capture has ended.
    """
    dense = [source if source.is_contiguous() else source.contiguous() for source in sources]
    host, programs = copy_table(starts, dense)
    if flat.is_cuda and torch.cuda.is_current_stream_capturing():
        table = torch.empty_like(host, device=flat.device)
        later = [(table, host)]
    else:
        table, later = host.to(flat.device), []
    _copy_kernel[(programs,)](table, flat, len(dense), BLOCK=COPIED, num_warps=8)
    return later


def copy_obstacle(flat: Tensor, starts: Sequence[int], sources: Sequence[Tensor]) -> str | None:
    """Why ``copy_tensors`` does not take these arguments, or None."""
    if not all(source.numel() for source in sources):
        return "a tensor is empty"
    return None if all(source.dtype == flat.dtype for source in sources) else "types differ"
