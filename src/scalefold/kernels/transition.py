"""Transition in Triton, forward and backward: x + W2 relu(W1 LN(x) + b1) + b2 (Supplement Algorithms 9, 15).

One kernel forward, in which the hidden layer never leaves the chip. Saved: x. The backward computes the hidden layer
again, block by block, together with its gradient, those of the biases and that of x, residual included; it stores the
hidden layer, its gradient and the norm for the weight gradients, which are products of the library.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from scalefold.kernels import reference, tuning
from scalefold.kernels.rows import (
    common_rows,
    dot,
    has_plain_strides,
    is_tile_width,
    load_normed,
    load_tile,
    norm_input_gradient,
    register_tiles,
    row_fields,
    store_tile,
    sum_all,
)
from scalefold.kernels.weight_gradient import Product, weight_partials

register_tiles(
    "transition_forward",
    {64: (64, 64, 4, 3), 128: (128, 64, 8, 3), 256: (128, 64, 8, 2)},
    *((64, 32, 4, 2), (64, 32, 4, 3), (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 8, 2), (64, 128, 8, 2)),
    *((128, 32, 8, 2), (128, 32, 8, 3), (128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2)),
)
register_tiles(
    "transition_backward",
    {64: (64, 64, 4, 2), 128: (64, 64, 8, 2), 256: (64, 32, 8, 2)},
    *((32, 32, 4, 2), (32, 64, 4, 2), (32, 64, 8, 2), (64, 32, 4, 1), (64, 32, 4, 2), (64, 32, 8, 2), (64, 32, 8, 3)),
    *((64, 64, 8, 1), (64, 64, 8, 2), (128, 32, 8, 1), (128, 32, 8, 2), (128, 64, 8, 2)),
)


@triton.jit
def _forward_kernel(
    x, x_strides, norm_weight, norm_bias, weight_1, bias_1, weight_2, bias_2, out, out_strides, dims, count,
    HIDDEN: tl.constexpr, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.arange(0, C)
    normed = load_normed(x, norm_weight, norm_bias, rows, dims, x_strides, count, C)
    acc = tl.zeros([BLOCK_M, C], tl.float32)
    for first in range(0, HIDDEN, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        block_1 = tl.load(weight_1 + n[:, None] * C + c[None, :])
        hidden = dot(normed, tl.trans(block_1), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
        hidden += tl.load(bias_1 + n).to(tl.float32)[None, :]
        block_2 = tl.load(weight_2 + c[:, None] * HIDDEN + n[None, :])
        acc = dot(tl.maximum(hidden, 0.0).to(normed.dtype), tl.trans(block_2), acc)
    acc += tl.load(bias_2 + c).to(tl.float32)[None, :]
    acc += load_tile(x, rows, c, dims, x_strides, count).to(tl.float32)
    store_tile(out, acc, rows, c, dims, out_strides, count)


@triton.jit
def _backward_kernel(
    x, x_strides, norm_weight, norm_bias, weight_1, bias_1, weight_2, d_out, d_strides, hidden_out, d_hidden_out,
    hidden_strides, normed_out, normed_strides, dx, dx_strides, partials, dims, count,
    HIDDEN: tl.constexpr, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.arange(0, C)
    normed = load_normed(x, norm_weight, norm_bias, rows, dims, x_strides, count, C)
    d = load_tile(d_out, rows, c, dims, d_strides, count)
    acc = tl.zeros([BLOCK_M, C], tl.float32)
    own = partials + tl.program_id(0).to(tl.int64) * (3 * C + HIDDEN)
    for first in range(0, HIDDEN, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        block_1 = tl.load(weight_1 + n[:, None] * C + c[None, :])
        hidden = dot(normed, tl.trans(block_1), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
        hidden = tl.maximum(hidden + tl.load(bias_1 + n).to(tl.float32)[None, :], 0.0)
        store_tile(hidden_out, hidden, rows, n, dims, hidden_strides, count)
        block_2 = tl.load(weight_2 + c[:, None] * HIDDEN + n[None, :])
        d_hidden = dot(d, block_2, tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
        d_hidden = tl.where(hidden > 0.0, d_hidden, 0.0).to(normed.dtype)
        store_tile(d_hidden_out, d_hidden, rows, n, dims, hidden_strides, count)
        tl.store(own + 3 * C + n, tl.sum(d_hidden.to(tl.float32), 0))
        acc = dot(d_hidden, block_1, acc)
    d = load_tile(d_out, rows, c, dims, d_strides, count).to(tl.float32)
    tl.store(own + 2 * C + c, tl.sum(d, 0))
    gradient = d + norm_input_gradient(
        acc, x, norm_weight, norm_bias, None, normed_out, normed_strides, own, rows, dims, x_strides, count, C
    )
    store_tile(dx, gradient, rows, c, dims, dx_strides, count)


class _Transition(torch.autograd.Function):
    """Arguments: those of ``transition``."""

    @staticmethod
    def forward(ctx, x, norm_weight, norm_bias, weight_1, bias_1, weight_2, bias_2):
        ctx.save_for_backward(x, norm_weight, norm_bias, weight_1, bias_1, weight_2)
        out = torch.empty_like(x)
        hidden, c = weight_1.shape
        dims, count, strides = common_rows(x, out)
        config = tuning.lookup("transition_forward", **row_fields(count, x.dtype, c=c, n=hidden))
        config = {**config, "BLOCK_N": min(config["BLOCK_N"], hidden)}
        _forward_kernel[(triton.cdiv(count, config["BLOCK_M"]),)](
            x, strides[0], norm_weight, norm_bias, weight_1, bias_1, weight_2, bias_2, out, strides[1], dims, count,
            HIDDEN=hidden, C=c, **config,
        )  # fmt: skip
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        x, norm_weight, norm_bias, weight_1, bias_1, weight_2 = ctx.saved_tensors
        width, c = weight_1.shape
        hidden, d_hidden = x.new_empty(2, *x.shape[:-1], width).unbind(0)
        dx, normed = torch.empty_like(x), torch.empty_like(x)
        dims, count, strides = common_rows(x, d_out, hidden, dx, normed)
        config = tuning.lookup("transition_backward", **row_fields(count, x.dtype, c=c, n=width))
        config = {**config, "BLOCK_N": min(config["BLOCK_N"], width)}
        tiles = triton.cdiv(count, config["BLOCK_M"])
        partials = torch.empty(tiles, 3 * c + width, dtype=torch.float32, device=x.device)
        _backward_kernel[(tiles,)](
            x, strides[0], norm_weight, norm_bias, weight_1, bias_1, weight_2, d_out, strides[1], hidden, d_hidden,
            strides[2], normed, strides[4], dx, strides[3], partials, dims, count, HIDDEN=width, C=c, **config,
        )  # fmt: skip
        products = [Product(d_hidden, normed), Product(hidden, d_out, transposed=True)]
        sums, d_weight_1, d_weight_2 = sum_all([partials, *weight_partials(products)], norm_weight.dtype)
        d_norm_weight, d_norm_bias, d_bias_2, d_bias_1 = sums.split([c, c, c, width])
        weights = d_weight_1.view_as(weight_1), d_weight_2.view_as(weight_2)
        return dx, d_norm_weight, d_norm_bias, weights[0], d_bias_1, weights[1], d_bias_2


def transition(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight_1: Tensor,
    bias_1: Tensor,
    weight_2: Tensor,
    bias_2: Tensor,
) -> Tensor:
    """``reference.transition``; the result lies in the memory order of x. Other widths take the plain definition."""
    hidden, c = weight_1.shape
    dense = weight_1.is_contiguous() and weight_2.is_contiguous() and x.stride(-1) == 1
    if not (is_tile_width(c) and hidden >= 16 and hidden & (hidden - 1) == 0 and dense and has_plain_strides(x)):
        return reference.transition(x, norm_weight, norm_bias, weight_1, bias_1, weight_2, bias_2)
    return _Transition.apply(x, norm_weight, norm_bias, weight_1, bias_1, weight_2, bias_2)  # type: ignore[return-value]
