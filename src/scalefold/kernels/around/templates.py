"""Attention of every residue pair over the templates (Supplement Algorithm 17) and what it adds, in one kernel forward.

A program reads a tile of pairs of z and of all templates; queries, keys, values and weights stay in its registers, and
are found again in the backward: by a kernel for the gradients of z and templates, and by one for weights of keys and
values, whose operands would be larger than all else if they were stored. Sums over programs have a fixed order.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from scalefold.kernels import tuning
from scalefold.kernels.around import aside
from scalefold.kernels.gradients.weight_gradient import Product, weight_partials
from scalefold.kernels.instructions import program, to_fp32, wait_for_predecessors
from scalefold.kernels.rows import dot, sum_all, width_obstacle

NUM_PROGRAMS = 264  # for gradients of weights: two per multiprocessor of an H200


class Weights(NamedTuple):
    """Of queries [H D, c_z], keys and values [H D, c_t] and of the output [c_z, H D], all dense, with its bias."""

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    bias: Tensor


@triton.jit
def _load(pointer, first, rows, num_rows, C: tl.constexpr):
    """Rows of C channels, of a matrix whose first row has number ``first``."""
    c = tl.arange(0, C)
    places = (first.to(tl.int64) * num_rows + rows)[:, None] * C + c[None, :]
    return tl.load(pointer + places, mask=(rows < num_rows)[:, None], other=0.0)


@triton.jit
def _store(pointer, value, first, rows, num_rows, C: tl.constexpr):
    """What ``_load`` loads, rounded to the storage type."""
    c = tl.arange(0, C)
    places = (first.to(tl.int64) * num_rows + rows)[:, None] * C + c[None, :]
    tl.store(pointer + places, value.to(pointer.dtype.element_ty), mask=(rows < num_rows)[:, None])


@triton.jit
def _matrix(pointer, N: tl.constexpr, C: tl.constexpr):
    """A whole weight [N, C]."""
    return tl.load(pointer + tl.arange(0, N)[:, None] * C + tl.arange(0, C)[None, :])


@triton.jit
def _projected(tile, weight, N: tl.constexpr):
    """tile [rows, C] times weight [N, C]: fp32 [rows, N]."""
    return dot(tile, tl.trans(weight), tl.zeros([tile.shape[0], N], tl.float32))


@triton.jit
def _over_heads(a, b, H: tl.constexpr, D: tl.constexpr):
    """Products of a and b [rows, H D], summed within heads: [rows, H]."""
    return tl.sum(tl.reshape(a * b, [a.shape[0], H, D]), 2)


@triton.jit
def _to_heads(x, H: tl.constexpr, D: tl.constexpr):
    """[rows, H] -> [rows, H D], equal within heads."""
    return tl.reshape(tl.broadcast_to(x[:, :, None], [x.shape[0], H, D]), [x.shape[0], H * D])


@triton.jit
def _any(mask, b, T: tl.constexpr):
    """1 where the sample has a template, else 0."""
    most = 0.0
    for t in range(T):
        most = tl.maximum(most, tl.load(mask + b * T + t))
    return tl.where(most > 0.0, 1.0, 0.0)


@program
@triton.jit
def _forward_kernel(
    z, t_, weights, mask, out, num_rows, scale, inf,
    T: tl.constexpr, H: tl.constexpr, D: tl.constexpr, C_Z: tl.constexpr, C_T: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Program (block of pairs, sample). z, out: [B, rows, C_Z]; t_: [B, T, rows, C_T]; mask: [B, T]."""
    wait_for_predecessors()
    rows, b = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.program_id(1)
    tile = _load(z, b, rows, num_rows, C_Z)
    query = _projected(tile, _matrix(weights.q, H * D, C_Z), H * D) * scale
    w_k, w_v = _matrix(weights.k, H * D, C_T), _matrix(weights.v, H * D, C_T)
    top = tl.full([BLOCK_M, H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M, H], tl.float32)
    result = tl.zeros([BLOCK_M, H * D], tl.float32)
    for t in range(T):
        template = _load(t_, b * T + t, rows, num_rows, C_T)
        own = _over_heads(query, _projected(template, w_k, H * D), H, D) + (tl.load(mask + b * T + t) - 1.0) * inf
        new_top = tl.maximum(top, own)
        weight, decay = tl.exp(own - new_top), tl.exp(top - new_top)
        total, top = total * decay + weight, new_top
        values = _projected(template, w_v, H * D)
        result = result * _to_heads(decay, H, D) + _to_heads(weight, H, D) * values
    result = (result * _to_heads(1.0 / total, H, D)).to(tile.dtype)
    bias = tl.load(weights.bias + tl.arange(0, C_Z)).to(tl.float32)
    update = _projected(result, _matrix(weights.o, C_Z, H * D), C_Z) + bias[None, :]
    _store(out, to_fp32(tile) + update * _any(mask, b, T), b, rows, num_rows, C_Z)


@triton.jit
def _query_and_gradient(
    z, d, weights, mask, b, rows, num_rows, scale, T: tl.constexpr, HD: tl.constexpr, C_Z: tl.constexpr
):
    """Scaled queries of a tile, and the gradient of what they attend to: fp32 [rows, HD] each."""
    tile, through = _load(z, b, rows, num_rows, C_Z), _load(d, b, rows, num_rows, C_Z)
    query = _projected(tile, _matrix(weights.q, HD, C_Z), HD) * scale
    d_result = dot(through, _matrix(weights.o, C_Z, HD), tl.zeros([rows.shape[0], HD], tl.float32))
    return query, d_result * _any(mask, b, T)


@program
@triton.jit
def _input_gradient_kernel(
    z, t_, weights, mask, d, d_z, d_t, d_q, results, statistics, sums, num_rows, scale, inf,
    T: tl.constexpr, H: tl.constexpr, D: tl.constexpr, C_Z: tl.constexpr, C_T: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Program (block of pairs, sample): gradients of z and t_, and what those of the weights need.

    That is the gradient of the queries d_q and what was attended to, zero in samples without templates: [B, rows, H D];
    of every head the largest logit, one over the sum of weights and the mean gradient of the logits: statistics fp32
    [3, B, rows, H]; sums of d over the tile: [B, tiles, C_Z].
    """
    wait_for_predecessors()
    rows, b = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.program_id(1)
    query, d_result = _query_and_gradient(z, d, weights, mask, b, rows, num_rows, scale, T, H * D, C_Z)
    w_k, w_v = _matrix(weights.k, H * D, C_T), _matrix(weights.v, H * D, C_T)
    top = tl.full([BLOCK_M, H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M, H], tl.float32)
    result = tl.zeros([BLOCK_M, H * D], tl.float32)
    for t in range(T):
        template = _load(t_, b * T + t, rows, num_rows, C_T)
        own = _over_heads(query, _projected(template, w_k, H * D), H, D) + (tl.load(mask + b * T + t) - 1.0) * inf
        new_top = tl.maximum(top, own)
        weight, decay = tl.exp(own - new_top), tl.exp(top - new_top)
        total, top = total * decay + weight, new_top
        values = _projected(template, w_v, H * D)
        result = result * _to_heads(decay, H, D) + _to_heads(weight, H, D) * values
    share = 1.0 / total
    result *= _to_heads(share, H, D)
    along = _over_heads(d_result, result, H, D)
    _store(results, result * _any(mask, b, T), b, rows, num_rows, H * D)
    batch = tl.num_programs(1)
    _store(statistics, top, b, rows, num_rows, H)
    _store(statistics, share, batch + b, rows, num_rows, H)
    _store(statistics, along, 2 * batch + b, rows, num_rows, H)
    d_query = tl.zeros([BLOCK_M, H * D], tl.float32)
    for t in range(T):
        template = _load(t_, b * T + t, rows, num_rows, C_T)
        keys = _projected(template, w_k, H * D)
        own = _over_heads(query, keys, H, D) + (tl.load(mask + b * T + t) - 1.0) * inf
        weight = tl.exp(own - top) * share
        d_own = weight * (_over_heads(d_result, _projected(template, w_v, H * D), H, D) - along)
        d_query += _to_heads(d_own, H, D) * keys
        d_template = dot((_to_heads(d_own, H, D) * query).to(w_k.dtype), w_k, tl.zeros([BLOCK_M, C_T], tl.float32))
        d_template = dot((_to_heads(weight, H, D) * d_result).to(w_v.dtype), w_v, d_template)
        _store(d_t, d_template, b * T + t, rows, num_rows, C_T)
    d_query = (d_query * scale).to(w_k.dtype)
    _store(d_q, d_query, b, rows, num_rows, H * D)
    d_tile = dot(d_query, _matrix(weights.q, H * D, C_Z), tl.zeros([BLOCK_M, C_Z], tl.float32))
    through = to_fp32(_load(d, b, rows, num_rows, C_Z))  # again: registers are short before
    _store(d_z, d_tile + through, b, rows, num_rows, C_Z)
    own_sums = sums + (b * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * C_Z
    tl.store(own_sums + tl.arange(0, C_Z), tl.sum(through, 0) * _any(mask, b, T))


@program
@triton.jit
def _weight_gradient_kernel(
    z, t_, weights, mask, d, statistics, partials, num_rows, tiles, batch, per_program, scale, inf,
    T: tl.constexpr, H: tl.constexpr, D: tl.constexpr, C_Z: tl.constexpr, C_T: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Range of tiles (``tiles`` of each sample) -> partials[range]: gradients of the weights of keys and of values."""
    wait_for_predecessors()
    first = tl.program_id(0) * per_program
    d_k = tl.zeros([H * D, C_T], tl.float32)
    d_v = tl.zeros([H * D, C_T], tl.float32)
    for number in range(first, tl.minimum(first + per_program, tiles * batch)):
        b = number // tiles
        rows = number % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
        query, d_result = _query_and_gradient(z, d, weights, mask, b, rows, num_rows, scale, T, H * D, C_Z)
        top, share = _load(statistics, b, rows, num_rows, H), _load(statistics, batch + b, rows, num_rows, H)
        along = _load(statistics, 2 * batch + b, rows, num_rows, H)
        for t in range(T):
            template = _load(t_, b * T + t, rows, num_rows, C_T)
            own = _over_heads(query, _projected(template, _matrix(weights.k, H * D, C_T), H * D), H, D)
            weight = tl.exp(own + (tl.load(mask + b * T + t) - 1.0) * inf - top) * share
            values = _projected(template, _matrix(weights.v, H * D, C_T), H * D)
            d_own = weight * (_over_heads(d_result, values, H, D) - along)
            d_k = dot(tl.trans((_to_heads(d_own, H, D) * query).to(template.dtype)), template, d_k)
            d_v = dot(tl.trans((_to_heads(weight, H, D) * d_result).to(template.dtype)), template, d_v)
    places = tl.arange(0, H * D)[:, None] * C_T + tl.arange(0, C_T)[None, :]
    partials += tl.program_id(0).to(tl.int64) * (2 * H * D * C_T)
    tl.store(partials + places, d_k)
    tl.store(partials + H * D * C_T + places, d_v)


def _sizes(z: Tensor, t: Tensor, weights: Sequence[Tensor], heads: int) -> dict[str, int]:
    inner = weights[0].shape[0]
    # tiles of 16 rows use no products of warp groups, which CUDA 12.8 assembles wrong at other widths (machine_code.py)
    block = 64 if z.element_size() == 2 and inner == t.shape[-1] == 64 else 16
    return {
        "T": t.shape[1],
        "H": heads,
        "D": inner // heads,
        "C_Z": z.shape[-1],
        "C_T": t.shape[-1],
        "BLOCK_M": block,
        "num_warps": 4,
    }


class _AddTemplates(torch.autograd.Function):
    """Arguments: z, t, mask, number of heads, inf, then ``Weights``."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, t: Tensor, mask: Tensor, heads: int, inf: float, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(z, t, mask, *weights)
        ctx.heads, ctx.inf = heads, inf
        sizes, out, num_rows = _sizes(z, t, weights, heads), torch.empty_like(z), z.shape[1] * z.shape[2]
        grid = (tuning.ceil_div(num_rows, sizes["BLOCK_M"]), z.shape[0])
        _forward_kernel[grid](z, t, Weights(*weights), mask, out, num_rows, sizes["D"] ** -0.5, inf, **sizes)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        z, t, mask, *weights = ctx.saved_tensors
        sizes, num_rows = _sizes(z, t, weights, ctx.heads), z.shape[1] * z.shape[2]
        batch, tiles, scale = z.shape[0], tuning.ceil_div(num_rows, sizes["BLOCK_M"]), sizes["D"] ** -0.5
        d_z, d_t, d = torch.empty_like(z), torch.empty_like(t), d.contiguous()
        d_q, result = z.new_empty(2, *z.shape[:-1], weights[0].shape[0])
        statistics = z.new_empty(3, batch, num_rows, ctx.heads, dtype=torch.float32)
        sums = z.new_empty(batch * tiles, z.shape[-1], dtype=torch.float32)
        inputs = (z, t, Weights(*weights), mask, d)
        _input_gradient_kernel[(tiles, batch)](
            *inputs, d_z, d_t, d_q, result, statistics, sums, num_rows, scale, ctx.inf, **sizes
        )

        def gradients() -> list[Tensor]:
            per_program = tuning.ceil_div(tiles * batch, NUM_PROGRAMS)
            programs = tuning.ceil_div(tiles * batch, per_program)
            partials = z.new_empty(programs, 2 * weights[1].numel(), dtype=torch.float32)
            _weight_gradient_kernel[(programs,)](
                *inputs, statistics, partials, num_rows, tiles, batch, per_program, scale, ctx.inf, num_stages=1,
                **sizes,
            )  # fmt: skip
            products = weight_partials([Product(d_q, z), Product(result, d, transposed=True)])
            d_wq, d_wo, both, d_bias = sum_all([*products, partials, sums], weights[0].dtype)
            found = (d_wq, *both.chunk(2), d_wo, d_bias)
            return [gradient.view_as(weight) for gradient, weight in zip(found, weights, strict=True)]

        return (
            d_z,
            d_t,
            None,
            None,
            None,
            *aside.gradients(weights, [z, t, d, d_q, result, statistics, sums], gradients),
        )


def obstacle(
    z: Tensor, t: Tensor, mask: Tensor, weights: Sequence[Tensor], bias: Tensor, heads: int, inf: float
) -> str | None:
    """Why ``add_templates`` does not take these arguments, or None."""
    if not all(x.is_contiguous() for x in (z, t, mask, *weights)):
        return "not everything is contiguous"
    if not (z.numel() and t.numel()):
        return "an argument is empty"
    if heads & (heads - 1):
        return f"{heads} heads are no power of two"
    return width_obstacle(z.shape[-1], most=128) or width_obstacle(t.shape[-1], weights[0].shape[0], most=64)


def add_templates(
    z: Tensor, t: Tensor, mask: Tensor, weights: Sequence[Tensor], bias: Tensor, heads: int, inf: float
) -> Tensor:
    """``model.templates.TemplatePointwiseAttention.added``: one launch forward, five backward.

    z: [B, I, J, c_z]; t: [B, T, I, J, c_t]; mask: fp32 [B, T]; weights: those of ``Weights`` without the bias, which is
    that of the output -> like z. Queries, keys, values and weights stay fp32.
    """
    return _AddTemplates.apply(z, t, mask, heads, inf, *weights, bias)  # type: ignore[return-value]


def compile_cases() -> list[tuple[str, Callable[[], None]]]:
    """Four templates of a benchmark crop; see ``tuning``."""
    return [("add_templates", lambda: _meta_call(256, 4, 4, 16))]


def _meta_call(n: int, count: int, heads: int, width: int) -> None:
    def leaf(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=True)

    z, t, hd = leaf(1, n, n, 128), leaf(1, count, n, n, 64), heads * width
    weights = [leaf(hd, 128), leaf(hd, 64), leaf(hd, 64), leaf(128, hd)]
    out = add_templates(z, t, torch.empty(1, count, device="meta"), weights, leaf(128), heads, 1e5)
    out.backward(torch.empty_like(out))
