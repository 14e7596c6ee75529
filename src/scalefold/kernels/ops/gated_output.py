"""End of a gated attention in Triton: x + dropout * (W (sigmoid(gate) * o) + b), forward and backward.

One kernel forward. Backward: one kernel for the gradients of o and gate and the operands of the weight gradient, a
product of the library, a sum. The gradient of x is the incoming gradient itself. Saved: o, gate, dropout; nothing that
is not an input.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from scalefold.kernels.instructions import sigmoid, widen
from scalefold.kernels.rows import (
    chosen_tiles,
    common_rows,
    dot,
    layout_obstacle,
    load_tile,
    register_tiles,
    row_limit,
    store_tile,
    sum_all,
    width_obstacle,
)
from scalefold.kernels.weight_gradient import Product, weight_partials

for _name, _default in {
    "gated_output_forward": {64: (128, 64, 4, 3), 128: (64, 64, 4, 3), 256: (64, 64, 8, 3)},
    "gated_output_backward": {64: (64, 64, 4, 2), 128: (64, 64, 4, 2), 256: (64, 64, 8, 2)},
}.items():
    register_tiles(
        _name,
        _default,
        *(
            (32, 32, 4, 3),
            (32, 64, 4, 2),
            (32, 64, 4, 3),
            (64, 32, 4, 3),
            (64, 64, 4, 2),
            (64, 64, 4, 3),
            (64, 64, 8, 2),
        ),
        *((64, 128, 8, 2), (128, 32, 8, 3), (128, 64, 8, 2), (128, 64, 8, 3)),
    )


@triton.jit
def _load_gated(o, gate, rows, columns, dims, o_strides, gate_strides, count):
    """sigmoid(gate) * o in the storage type of o: [rows, columns]."""
    value = load_tile(o, rows, columns, dims, o_strides, count)
    logits = widen(load_tile(gate, rows, columns, dims, gate_strides, count))
    return (widen(value) * sigmoid(logits)).to(value.dtype)


@triton.jit
def _load_update_gradient(d, dropout, rows, columns, dims, d_strides, dropout_strides, count):
    """dropout * d in the storage type of d."""
    tile = load_tile(d, rows, columns, dims, d_strides, count)
    if dropout is not None:
        scale = widen(load_tile(dropout, rows, columns, dims, dropout_strides, count))
        tile = (widen(tile) * scale).to(tile.dtype)
    return tile


@triton.jit
def _forward_kernel(
    x, x_strides, o, o_strides, gate, gate_strides, weight, bias, dropout, dropout_strides, out, out_strides, dims,
    count, C: tl.constexpr, HD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.arange(0, C)
    acc = tl.zeros([BLOCK_M, C], tl.float32)
    for first in range(0, HD, BLOCK_N):
        k = first + tl.arange(0, BLOCK_N)
        gated = _load_gated(o, gate, rows, k, dims, o_strides, gate_strides, count)
        block = tl.load(weight + c[:, None] * HD + k[None, :])
        acc = dot(gated, tl.trans(block), acc)
    acc += tl.load(bias + c).to(tl.float32)[None, :]
    if dropout is not None:
        acc *= load_tile(dropout, rows, c, dims, dropout_strides, count).to(tl.float32)
    acc += load_tile(x, rows, c, dims, x_strides, count).to(tl.float32)
    store_tile(out, acc, rows, c, dims, out_strides, count)


@triton.jit
def _input_gradient_kernel(
    d, d_strides, o, o_strides, gate, gate_strides, weight, dropout, dropout_strides, d_o, d_o_strides, d_gate,
    d_gate_strides, update_out, update_strides, gated_out, gated_strides, partials, dims, count,
    C: tl.constexpr, HD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Tile of rows: gradients of o and gate; the operands of the weight gradient (update_out None: it is d itself);
    sums of the bias gradient at partials[tile]."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.arange(0, C)
    update = _load_update_gradient(d, dropout, rows, c, dims, d_strides, dropout_strides, count)
    if update_out is not None:
        store_tile(update_out, update, rows, c, dims, update_strides, count)
    tl.store(partials + tl.program_id(0).to(tl.int64) * C + c, tl.sum(widen(update), 0))
    for first in range(0, HD, BLOCK_N):
        k = first + tl.arange(0, BLOCK_N)
        block = tl.load(weight + c[:, None] * HD + k[None, :])
        d_gated = dot(update, block, tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
        value = load_tile(o, rows, k, dims, o_strides, count).to(tl.float32)
        opening = sigmoid(widen(load_tile(gate, rows, k, dims, gate_strides, count)))
        store_tile(gated_out, value * opening, rows, k, dims, gated_strides, count)
        d_gated *= opening
        store_tile(d_o, d_gated, rows, k, dims, d_o_strides, count)
        store_tile(d_gate, d_gated * value * (1.0 - opening), rows, k, dims, d_gate_strides, count)


class _GatedOutput(torch.autograd.Function):
    """Arguments: x, o flattened to [*, H * D], gate, weight, bias, dropout."""

    @staticmethod
    def forward(ctx, x, o, gate, weight, bias, dropout):
        ctx.save_for_backward(o, gate, weight, dropout)
        ctx.bias_dtype = bias.dtype
        out = torch.empty_like(x)
        dims, count, strides = common_rows(x, o, gate, x if dropout is None else dropout, out)
        c, hd = weight.shape
        config = chosen_tiles("gated_output_forward", x, min(c, hd), hd, max(c, hd))
        _forward_kernel[(triton.cdiv(count, config["BLOCK_M"]),)](
            x, strides[0], o, strides[1], gate, strides[2], weight.contiguous(), bias, dropout, strides[3], out,
            strides[4], dims, row_limit(count, config), C=c, HD=hd, **config,
        )  # fmt: skip
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d):
        o, gate, weight, dropout = ctx.saved_tensors
        d_o, d_gate, gated = torch.empty_like(o), torch.empty_like(gate), torch.empty_like(o)
        update = None if dropout is None else torch.empty_like(d)
        dims, count, strides = common_rows(
            d, o, gate, d if dropout is None else dropout, d_o, d_gate, d if update is None else update, gated
        )
        c, hd = weight.shape
        config = chosen_tiles("gated_output_backward", d, min(c, hd), hd, max(c, hd))
        tiles = triton.cdiv(count, config["BLOCK_M"])
        partials = torch.empty(tiles, c, dtype=torch.float32, device=d.device)
        _input_gradient_kernel[(tiles,)](
            d, strides[0], o, strides[1], gate, strides[2], weight.contiguous(), dropout, strides[3], d_o, strides[4],
            d_gate, strides[5], update, strides[6], gated, strides[7], partials, dims, row_limit(count, config),
            C=c, HD=hd, **config,
        )  # fmt: skip
        product = Product(d if update is None else update, gated)
        d_bias, d_weight = sum_all([partials, *weight_partials([product])], weight.dtype)
        return d, d_o, d_gate, d_weight.view_as(weight), d_bias.to(ctx.bias_dtype), None


def obstacle(x: Tensor, o: Tensor, gate: Tensor, weight: Tensor, *_: object) -> str | None:
    """Why ``gated_output`` does not take these arguments, or None."""
    return width_obstacle(*weight.shape) or layout_obstacle(x, o.flatten(-2), gate)


def gated_output(x: Tensor, o: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, dropout: Tensor | None) -> Tensor:
    """``reference.gated_output``; the result lies in the memory order of x."""
    return _GatedOutput.apply(x, o.flatten(-2), gate, weight, bias, dropout)  # type: ignore[return-value]
