"""Optimizer kernels on flat buffers: Adam with weight averaging and a bf16 copy in one pass; sum of squares."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from scalefold.kernels.instructions import program, wait_for_predecessors

BLOCK = 1024
NORM_PROGRAMS = 1056  # eight per multiprocessor of an H200


@triton.jit
def _update(
    param, grad, exp_avg, exp_avg_sq, averaged, copy, scalars, index, keep, weight_1, beta_2, weight_2, eps, swa_weight
):
    """One block of elements; ``keep`` is a mask or None. Every buffer is read and written once."""
    factor, lr = tl.load(scalars), tl.load(scalars + 1)
    correction_1, correction_2_sqrt = tl.load(scalars + 2), tl.load(scalars + 3)
    weight = tl.where(tl.load(scalars + 4) > 0, 1.0, swa_weight)
    g = tl.load(grad + index, mask=keep).to(tl.float32) * factor
    m = tl.load(exp_avg + index, mask=keep)
    m += weight_1 * (g - m)
    v = tl.load(exp_avg_sq + index, mask=keep) * beta_2 + weight_2 * g * g
    p = tl.load(param + index, mask=keep)
    p -= m / (tl.sqrt(v) / correction_2_sqrt + eps) * (lr / correction_1)
    average = tl.load(averaged + index, mask=keep)
    tl.store(exp_avg + index, m, mask=keep)
    tl.store(exp_avg_sq + index, v, mask=keep)
    tl.store(param + index, p, mask=keep)
    tl.store(averaged + index, tl.where(weight == 1.0, p, average + weight * (p - average)), mask=keep)
    if copy is not None:
        tl.store(copy + index, p.to(copy.dtype.element_ty), mask=keep)


@program
@triton.jit
def _adam_swa_kernel(
    param, grad, exp_avg, exp_avg_sq, averaged, copy, scalars, n, weight_1, beta_2, weight_2, eps, swa_weight,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Full blocks take no mask: with one, accesses of a length that 16 does not divide would be 4 bytes wide."""
    wait_for_predecessors()
    start = tl.program_id(0).to(tl.int64) * BLOCK
    index = start + tl.arange(0, BLOCK)
    if start + BLOCK <= n:
        _update(
            param, grad, exp_avg, exp_avg_sq, averaged, copy, scalars, index, None, weight_1, beta_2, weight_2, eps,
            swa_weight,
        )  # fmt: skip
    else:
        _update(
            param, grad, exp_avg, exp_avg_sq, averaged, copy, scalars, index, index < n, weight_1, beta_2, weight_2,
            eps, swa_weight,
        )  # fmt: skip


def adam_swa(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    averaged: Tensor,
    copy: Tensor | None,
    scalars: Tensor,
    beta_1: float,
    beta_2: float,
    eps: float,
    swa_decay: float,
) -> None:
    """``reference.adam_swa`` in one kernel, the compute weights included."""
    n = param.numel()
    buffers = [t for t in (param, grad, exp_avg, exp_avg_sq, averaged, copy) if t is not None]
    if any(t.numel() != n or not t.is_contiguous() for t in buffers):
        raise ValueError(f"adam_swa needs contiguous buffers of one length, got {[tuple(t.shape) for t in buffers]}")
    # complements are formed here: 1 - 0.999 taken in fp32 would be off by 1e-5
    _adam_swa_kernel[(triton.cdiv(n, BLOCK),)](
        param, grad, exp_avg, exp_avg_sq, averaged, copy, scalars, n, 1.0 - beta_1, beta_2, 1.0 - beta_2, eps,
        1.0 - swa_decay, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip


@program
@triton.jit
def _square_kernel(values, partials, n, BLOCK: tl.constexpr):
    wait_for_predecessors()
    total = tl.zeros([BLOCK], tl.float32)
    full = n // BLOCK * BLOCK
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, full, tl.num_programs(0) * BLOCK):
        value = tl.load(values + start + tl.arange(0, BLOCK)).to(tl.float32)
        total += value * value
    if tl.program_id(0) == 0:
        index = full + tl.arange(0, BLOCK)
        value = tl.load(values + index, mask=index < n, other=0.0).to(tl.float32)
        total += value * value
    tl.store(partials + tl.program_id(0), tl.sum(total, 0))


@program
@triton.jit
def _total_kernel(partials, out, n, BLOCK: tl.constexpr):
    wait_for_predecessors()
    index = tl.arange(0, BLOCK)
    tl.store(out, tl.sum(tl.load(partials + index, mask=index < n, other=0.0), 0))


def sum_of_squares(values: Tensor) -> Tensor:
    """Sum of squares of a flat buffer, fp32 or bf16 [n] -> fp32 scalar on the device; repeats bit for bit."""
    programs = min(NORM_PROGRAMS, triton.cdiv(values.numel(), BLOCK))
    partials = torch.empty(programs, dtype=torch.float32, device=values.device)
    out = torch.empty((), dtype=torch.float32, device=values.device)
    _square_kernel[(programs,)](values, partials, values.numel(), BLOCK=BLOCK, num_warps=4)
    _total_kernel[(1,)](partials, out, programs, BLOCK=triton.next_power_of_2(programs), num_warps=4)
    return out
