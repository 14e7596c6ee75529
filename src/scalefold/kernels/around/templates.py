"""Attention of every residue pair over the templates (Supplement Algorithm 17), forward and backward: one kernel each.

All templates of a pair are read by one program, so nothing of the size of keys or values is written but the gradients.
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
from scalefold.kernels.rows import width_obstacle

OPTIONS = {"BLOCK_M": 32, "num_warps": 4}


@triton.jit
def _load(pointer, rows, num_rows, H: tl.constexpr, D: tl.constexpr):
    """Rows of H heads in fp32: [rows, H, D]."""
    c = tl.arange(0, H * D)
    tile = tl.load(pointer + rows[:, None] * (H * D) + c[None, :], mask=(rows < num_rows)[:, None], other=0.0)
    return tl.reshape(tile.to(tl.float32), [rows.shape[0], H, D])


@triton.jit
def _store(pointer, value, rows, num_rows, H: tl.constexpr, D: tl.constexpr):
    """What ``_load`` loads, rounded to the storage type."""
    c = tl.arange(0, H * D)
    tile = tl.reshape(value, [rows.shape[0], H * D]).to(pointer.dtype.element_ty)
    tl.store(pointer + rows[:, None] * (H * D) + c[None, :], tile, mask=(rows < num_rows)[:, None])


@triton.jit
def _logits(query, k, mask, t, inf, rows, num_rows, H: tl.constexpr, D: tl.constexpr):
    """Logits of template t [rows, H], and its keys [rows, H, D]. query: scaled."""
    keys = _load(k + t * num_rows * (H * D), rows, num_rows, H, D)
    return tl.sum(query * keys, 2) + (tl.load(mask + t) - 1.0) * inf, keys


@triton.jit
def _forward_kernel(
    q, k, v, mask, out, num_rows, scale, inf, T: tl.constexpr, H: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr
):  # fmt: skip
    """Program (block of pairs, sample). q, out: [B, rows, H D]; k, v: [B, T, rows, H D]; mask: [B, T]."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    b = tl.program_id(1)
    query = _load(q + b * num_rows * (H * D), rows, num_rows, H, D) * scale
    top = tl.full([BLOCK_M, H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M, H], tl.float32)
    result = tl.zeros([BLOCK_M, H, D], tl.float32)
    for t in tl.static_range(T):
        own, _ = _logits(query, k, mask, b * T + t, inf, rows, num_rows, H, D)
        new_top = tl.maximum(top, own)
        weight, decay = tl.exp(own - new_top), tl.exp(top - new_top)
        values = _load(v + (b * T + t) * num_rows * (H * D), rows, num_rows, H, D)
        total, top = total * decay + weight, new_top
        result = result * decay[:, :, None] + weight[:, :, None] * values
    _store(out + b * num_rows * (H * D), result / total[:, :, None], rows, num_rows, H, D)


@triton.jit
def _backward_kernel(
    q, k, v, mask, d_out, d_q, d_k, d_v, num_rows, scale, inf,
    T: tl.constexpr, H: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The same program: gradients of q, k and v, from inputs alone."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    b = tl.program_id(1)
    query = _load(q + b * num_rows * (H * D), rows, num_rows, H, D) * scale
    d = _load(d_out + b * num_rows * (H * D), rows, num_rows, H, D)
    top = tl.full([BLOCK_M, H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M, H], tl.float32)
    along = tl.zeros([BLOCK_M, H], tl.float32)
    for t in tl.static_range(T):
        own, _ = _logits(query, k, mask, b * T + t, inf, rows, num_rows, H, D)
        new_top = tl.maximum(top, own)
        weight, decay = tl.exp(own - new_top), tl.exp(top - new_top)
        values = _load(v + (b * T + t) * num_rows * (H * D), rows, num_rows, H, D)
        total, top = total * decay + weight, new_top
        along = along * decay + weight * tl.sum(d * values, 2)
    along = along / total
    gradient = tl.zeros([BLOCK_M, H, D], tl.float32)
    for t in tl.static_range(T):
        place = (b * T + t) * num_rows * (H * D)
        own, keys = _logits(query, k, mask, b * T + t, inf, rows, num_rows, H, D)
        weight = tl.exp(own - top) / total
        values = _load(v + place, rows, num_rows, H, D)
        d_own = weight * (tl.sum(d * values, 2) - along)
        _store(d_v + place, weight[:, :, None] * d, rows, num_rows, H, D)
        _store(d_k + place, d_own[:, :, None] * query, rows, num_rows, H, D)
        gradient += d_own[:, :, None] * keys
    _store(d_q + b * num_rows * (H * D), gradient * scale, rows, num_rows, H, D)


def _launch(program: Any, q: Tensor, k: Tensor, tensors: tuple[Tensor, ...], inf: float) -> None:
    """Run a program over all pairs of q [B, I, J, H, D] and templates of k [B, T, I, J, H, D]."""
    batch, num_rows, heads, width = q.shape[0], q.shape[1] * q.shape[2], q.shape[3], q.shape[4]
    grid = (tuning.ceil_div(num_rows, OPTIONS["BLOCK_M"]), batch)
    program[grid](*tensors, num_rows, width**-0.5, inf, T=k.shape[1], H=heads, D=width, **OPTIONS)


class _TemplateAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, inf: float) -> Tensor:
        out = torch.empty_like(q)
        _launch(_forward_kernel, q, k, (q, k, v, mask, out), inf)
        ctx.save_for_backward(q, k, v, mask)
        ctx.inf = inf
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask = ctx.saved_tensors
        gradients = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        _launch(_backward_kernel, q, k, (q, k, v, mask, d.contiguous(), *gradients), ctx.inf)
        return *gradients, None, None


def obstacle(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, inf: float) -> str | None:
    """Why ``template_attention`` does not take these arguments, or None."""
    if not all(x.is_contiguous() for x in (q, k, v, mask)):
        return "not everything is contiguous"
    if not k.numel():
        return "an argument is empty"
    heads, width = q.shape[-2:]
    return width_obstacle(heads * width) or (f"{heads} heads are no power of two" if heads & (heads - 1) else None)


def template_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, inf: float) -> Tensor:
    """``reference.template_attention``: one launch forward, one backward; weights stay fp32."""
    return _TemplateAttention.apply(q, k, v, mask, inf)  # type: ignore[return-value]


def compile_cases() -> list[tuple[str, Callable[[], None]]]:
    """Four templates of a benchmark crop; see ``tuning``."""
    return [("template_attention", lambda: _meta_call(256, 4, 4, 16))]


def _meta_call(n: int, count: int, heads: int, width: int) -> None:
    def leaf(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=True)

    pair = (n, n, heads, width)
    mask = torch.empty(1, count, device="meta")
    out = template_attention(leaf(1, *pair), leaf(1, count, *pair), leaf(1, count, *pair), mask, 1e5)
    out.backward(torch.empty_like(out))
