"""What changes no value but its place, or draws it: dense copies of transposed tensors, dropout masks."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from collections.abc import Sequence
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from scalefold.kernels.instructions import program, wait_for_predecessors
from scalefold.kernels.rows import memory_order

BLOCK = 1024
TILE = (32, 64)  # of a copy: along the dimension that is dense before, and the one that is dense afterwards


@program
@triton.jit
def _threshold_kernel(values, n, rate, kept, BLOCK: tl.constexpr):
    wait_for_predecessors()
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(values + index, mask=index < n, other=0.0)
    tl.store(values + index, tl.where(value >= rate, kept, 0.0), mask=index < n)


def dropout_mask(shape: Sequence[int], rate: float, device: torch.device) -> Tensor:
    """``reference.dropout_mask``: the same mask for the same state of the generator."""
    return dropout_masks([shape], rate, device)[0]


def dropout_masks(shapes: Sequence[Sequence[int]], rate: float, device: torch.device) -> list[Tensor]:
    """Several masks of one rate from one draw: fp32 views of one buffer, in two launches altogether: uniform numbers of
    the device's generator, then one kernel.
    """
    sizes = [prod(shape) for shape in shapes]
    values = torch.rand(sum(sizes), device=device)
    _threshold_kernel[(triton.cdiv(values.numel(), BLOCK),)](
        values, values.numel(), rate, 1.0 / (1.0 - rate), BLOCK=BLOCK, num_warps=4
    )
    return [part.view(tuple(shape)) for part, shape in zip(values.split(sizes), shapes, strict=True)]


@program
@triton.jit
def _transpose_kernel(
    x, out, num_before, num_after, batch_stride, after_stride, out_batch_stride, out_before_stride,
    BLOCK_BEFORE: tl.constexpr, BLOCK_AFTER: tl.constexpr,
):  # fmt: skip
    """Program (tile, batch) of x, whose dimension ``before`` is dense; in ``out`` it is ``after``: both are read and
    written in whole lines.
    """
    wait_for_predecessors()
    tiles = tl.cdiv(num_after, BLOCK_AFTER)
    x += tl.program_id(1).to(tl.int64) * batch_stride
    out += tl.program_id(1).to(tl.int64) * out_batch_stride
    before = (tl.program_id(0) // tiles) * BLOCK_BEFORE + tl.arange(0, BLOCK_BEFORE)
    after = (tl.program_id(0) % tiles) * BLOCK_AFTER + tl.arange(0, BLOCK_AFTER)
    inside = (after < num_after)[:, None] & (before < num_before)[None, :]
    tile = tl.load(x + after.to(tl.int64)[:, None] * after_stride + before[None, :], mask=inside, other=0.0)
    offsets = before.to(tl.int64)[:, None] * out_before_stride + after[None, :]
    tl.store(out + offsets, tl.trans(tile), mask=tl.trans(inside))


def dense(x: Tensor) -> Tensor:
    """``x.contiguous()``, by tiles where x has three dimensions (those of size 1 apart) of which another than the last
    is dense; of two, as well. Any type and size.
    """
    kept = [n for n, size in enumerate(x.shape) if size != 1]
    before = [n for n in kept if x.stride(n) == 1]
    if not x.numel() or x.is_contiguous() or len(kept) not in (2, 3) or not before or before[0] == kept[-1]:
        return x.contiguous()
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    after, batch = kept[-1], [n for n in kept[:-1] if n != before[0]]
    num_before, num_after = x.shape[before[0]], x.shape[after]
    blocks = [min(tile, triton.next_power_of_2(n)) for tile, n in zip(TILE, (num_before, num_after), strict=True)]
    grid = (triton.cdiv(num_before, blocks[0]) * triton.cdiv(num_after, blocks[1]), x.shape[batch[0]] if batch else 1)
    _transpose_kernel[grid](
        x, out, num_before, num_after, x.stride(batch[0]) if batch else 0, x.stride(after),
        out.stride(batch[0]) if batch else 0, out.stride(before[0]), BLOCK_BEFORE=blocks[0], BLOCK_AFTER=blocks[1],
    )  # fmt: skip
    return out


def in_order(order: Sequence[int], flat: Tensor, shape: Sequence[int]) -> Tensor:
    """View of flat [rows, w], rows numbered in ``order``, as [*shape, w]."""
    inverse = [list(order).index(d) for d in range(len(order))]
    return flat.view(*[shape[d] for d in order], flat.shape[-1]).permute(*inverse, len(order))


def in_rows_of(x: Tensor, d: Tensor) -> Tensor:
    """d: [*, h] with its rows in the memory order of x: [*, c]; a copy, channels first, if they lie otherwise."""
    order = memory_order(x)
    if memory_order(d) == order:
        return d
    inverse = [order.index(n) + 1 for n in range(len(order))]
    return dense(d.permute(-1, *order)).permute(*inverse, 0)
