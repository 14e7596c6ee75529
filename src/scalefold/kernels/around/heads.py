"""Heads that are one linear layer in fp32, of a bf16 representation: a kernel forward, a kernel and a sum backward.

Products are those of bf16 parts: an input is one part, an fp32 number three, which together hold all its bits. So the
tensor cores take them, and the input is read as it lies. Logits of residue pairs are symmetric: those of (i, j) and
(j, i) are added where they are computed.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from scalefold.kernels import tuning
from scalefold.kernels.around import aside
from scalefold.kernels.instructions import program, wait_for_predecessors
from scalefold.kernels.rows import sum_all, width_obstacle

MOST_CLASSES = 64
NUM_PROGRAMS = 264  # of the backward: two per multiprocessor of an H200


@triton.jit
def _parts(x):
    """Three bf16 tiles whose sum is x, fp32."""
    first = x.to(tl.bfloat16)
    rest = x - first.to(tl.float32)
    second = rest.to(tl.bfloat16)
    return first, second, (rest - second.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def _places(rows, n, SYMMETRIC: tl.constexpr):
    """Rows of residue pairs (j, i) for those of (i, j), of matrices [n, n]; the rows themselves if not SYMMETRIC."""
    if SYMMETRIC:
        sample, pair = rows // (n * n), rows % (n * n)
        return (sample * n + pair % n) * n + pair // n
    return rows


@triton.jit
def _load(pointer, rows, num_rows, c, C: tl.constexpr):
    """Rows [rows, C] at columns c, zeros elsewhere."""
    keep = (rows < num_rows)[:, None] & (c < C)[None, :]
    return tl.load(pointer + rows.to(tl.int64)[:, None] * C + c[None, :], mask=keep, other=0.0)


@triton.jit
def _weight(pointer, c, N: tl.constexpr, C: tl.constexpr, BLOCK_N: tl.constexpr):
    """fp32 [BLOCK_N, C], zeros from N on."""
    k = tl.arange(0, BLOCK_N)
    return tl.load(pointer + k[:, None] * C + c[None, :], mask=(k < N)[:, None], other=0.0)


@program
@triton.jit
def _forward_kernel(
    x, weight, bias, out, num_rows, n, SYMMETRIC: tl.constexpr, N: tl.constexpr, C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Tile of rows. x: [rows, C], bf16; weight [N, C], bias [N], out [rows, N]: fp32."""
    wait_for_predecessors()
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    k, c = tl.arange(0, BLOCK_N), tl.arange(0, C)
    tile = _load(x, rows, num_rows, c, C)
    first, second, third = _parts(_weight(weight, c, N, C, BLOCK_N))
    acc = tl.dot(tile, tl.trans(third), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
    acc = tl.dot(tile, tl.trans(second), acc)
    acc = tl.dot(tile, tl.trans(first), acc)
    shift = tl.load(bias + k, mask=k < N, other=0.0)
    if SYMMETRIC:
        other = _load(x, _places(rows, n, SYMMETRIC), num_rows, c, C)
        acc = tl.dot(other, tl.trans(third), acc)
        acc = tl.dot(other, tl.trans(second), acc)
        acc = tl.dot(other, tl.trans(first), acc)
        shift *= 2.0
    places = out + rows.to(tl.int64)[:, None] * N + k[None, :]
    tl.store(places, acc + shift[None, :], mask=(rows < num_rows)[:, None] & (k < N)[None, :])


@program
@triton.jit
def _backward_kernel(
    x, weight, d, dx, partials, num_rows, n, rows_per_program, SYMMETRIC: tl.constexpr, N: tl.constexpr,
    C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Range of rows: gradient of x, and partials[range]: those of the weight [N, C] and the bias [N]."""
    wait_for_predecessors()
    start = tl.program_id(0) * rows_per_program
    k, c = tl.arange(0, BLOCK_N), tl.arange(0, C)
    d_weight = tl.zeros([BLOCK_N, C], tl.float32)
    d_bias = tl.zeros([BLOCK_N], tl.float32)
    for row in range(start, tl.minimum(start + rows_per_program, num_rows), BLOCK_M):
        rows = row + tl.arange(0, BLOCK_M)
        own = _load(d, rows, num_rows, k, N)
        if SYMMETRIC:
            own += _load(d, _places(rows, n, SYMMETRIC), num_rows, k, N)
        d_bias += tl.sum(own, 0)
        tile = _load(x, rows, num_rows, c, C)
        first, second, third = _parts(own)
        d_weight = tl.dot(tl.trans(third), tile, d_weight)
        d_weight = tl.dot(tl.trans(second), tile, d_weight)
        d_weight = tl.dot(tl.trans(first), tile, d_weight)
        most, more, _ = _parts(_weight(weight, c, N, C, BLOCK_N))  # a bf16 result needs no more
        gradient = tl.dot(second, most, tl.zeros([BLOCK_M, C], tl.float32))
        gradient = tl.dot(first, more, gradient)
        gradient = tl.dot(first, most, gradient).to(tl.bfloat16)
        tl.store(dx + rows.to(tl.int64)[:, None] * C + c[None, :], gradient, mask=(rows < num_rows)[:, None])
    partials += tl.program_id(0).to(tl.int64) * (N * C + N)
    tl.store(partials + k[:, None] * C + c[None, :], d_weight, mask=(k < N)[:, None])
    tl.store(partials + N * C + k, d_bias, mask=k < N)


def _sizes(weight: Tensor, symmetric: bool, rows: int = 64) -> dict[str, Any]:
    n, c = weight.shape
    block, warps = max(16, tuning.power_of_two(n)), 4 if c <= 128 else 8
    return {"SYMMETRIC": symmetric, "N": n, "C": c, "BLOCK_M": rows, "BLOCK_N": block, "num_warps": warps}


class _LinearHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, symmetric: bool) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.symmetric = symmetric
        sizes, num_rows = _sizes(weight, symmetric), x.shape[:-1].numel()
        out = torch.empty(*x.shape[:-1], len(weight), dtype=torch.float32, device=x.device)
        grid = (tuning.ceil_div(num_rows, sizes["BLOCK_M"]),)
        _forward_kernel[grid](x, weight, bias, out, num_rows, x.shape[-2], **sizes)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        tile = 64 if tuning.capability() < 100 else 32  # products of 10.0 would overflow its tensor memory
        sizes, num_rows, dx = _sizes(weight, ctx.symmetric, tile), x.shape[:-1].numel(), torch.empty_like(x)
        per_program = tuning.ceil_div(tuning.ceil_div(num_rows, tile), NUM_PROGRAMS) * tile
        programs, length = tuning.ceil_div(num_rows, per_program), weight.numel() + len(weight)
        partials = torch.empty(programs, length, dtype=torch.float32, device=x.device)
        _backward_kernel[(programs,)](
            x, weight, d.contiguous(), dx, partials, num_rows, x.shape[-2], per_program, num_stages=1, **sizes
        )

        def gradients() -> list[Tensor]:
            d_weight, d_bias = sum_all([partials], weight.dtype)[0].split([weight.numel(), len(weight)])
            return [d_weight.view_as(weight), d_bias]

        return dx, *aside.gradients([weight, bias], [partials], gradients), None


def obstacle(x: Tensor, weight: Tensor, bias: Tensor, symmetric: bool) -> str | None:
    """Why ``linear_head`` does not take these arguments, or None."""
    if (x.dtype, weight.dtype) != (torch.bfloat16, torch.float32):
        return f"{weight.dtype} weights of {x.dtype} inputs"
    if not (x.is_contiguous() and weight.is_contiguous()):
        return "not everything is contiguous"
    if len(weight) > MOST_CLASSES:
        return f"{len(weight)} classes are more than {MOST_CLASSES}"
    return width_obstacle(x.shape[-1]) or (None if x.numel() else "an argument is empty")


def linear_head(x: Tensor, weight: Tensor, bias: Tensor, symmetric: bool) -> Tensor:
    """``reference.linear_head`` of a bf16 x."""
    return _LinearHead.apply(x, weight, bias, symmetric)  # type: ignore[return-value]


def compile_cases() -> list[tuple[str, Callable[[], None]]]:
    """A benchmark crop; see ``tuning``."""
    return [
        ("head_pairs", lambda: _meta_call((1, 256, 256, 128), 64, True)),
        ("head_letters", lambda: _meta_call((1, 124, 256, 256), 23, False)),
    ]


def _meta_call(shape: tuple[int, ...], classes: int, symmetric: bool) -> None:
    def leaf(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta", requires_grad=True)

    out = linear_head(leaf(*shape, dtype=torch.bfloat16), leaf(classes, shape[-1]), leaf(classes), symmetric)
    out.backward(torch.empty_like(out))
