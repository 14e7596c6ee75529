"""Transitions of few rows, layer by layer: launches whose grid has a second dimension over parts of output columns.

A program per tile of rows reads all of both weights; where such programs are few, or their tiles low to have more of
them, that is most of their time. Here each reads a part, and makes the norm of its tile again, from the cache.

- Forward: the hidden layer, then its product with the second weight, bias and residual.
- Backward: the hidden layer again, with its gradient, the norm and sums for the biases; the product of the gradient
  with the first weight, by a program of the forward or by the library; the norm's backward, residual included.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from scalefold.kernels import tuning
from scalefold.kernels.ops.elementwise import in_order
from scalefold.kernels.ops.layer_norm import norm_gradient
from scalefold.kernels.rows import (
    Norm,
    dot,
    launch,
    launch_with_sums,
    load_normed,
    load_tile,
    memory_order,
    store_column_sums,
    store_tile,
    weight_blocks,
)

tuning.register_parts("transition_columns")
tuning.register_parts("transition_backward_columns")
for _name in ("transition_update", "transition_backward_update"):
    tuning.register(_name, lambda fields, capability: {"PARTS": 2, **tuning.tile_config((64, 64, 4, 3))})


@triton.jit
def _hidden_kernel(
    x, norm, weight, bias, hidden, extent,
    HIDDEN: tl.constexpr, C: tl.constexpr, PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Tile of rows, part of the hidden channels: relu(W1 LN(x) + b1). The weight comes as blocks [BLOCK_N, C]."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    normed = load_normed(x, norm, rows, extent, C)
    for block in range(0, HIDDEN // PARTS, BLOCK_N):
        first = tl.program_id(1) * (HIDDEN // PARTS) + block
        n = first + tl.arange(0, BLOCK_N)
        acc = dot(normed, tl.trans(weight.load([first, 0])), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
        acc += tl.load(bias + n).to(tl.float32)[None, :]
        store_tile(hidden, tl.maximum(acc, 0.0), rows, n, extent)


@triton.jit
def _hidden_gradient_kernel(
    x, norm, weight_1, bias_1, weight_2, d_out, hidden_rows, d_hidden_rows, normed_out, partials, extent,
    HIDDEN: tl.constexpr, C: tl.constexpr, PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Tile of rows, part of the hidden channels: the hidden layer, its gradient and its sums for bias 1.

    The first part also stores the norm and the sums for bias 2: partials[tile] has C of these, then HIDDEN. Weights
    come as blocks [BLOCK_N, C] and [C, BLOCK_N].
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.arange(0, C)
    own = partials + tl.program_id(0).to(tl.int64) * (C + HIDDEN)
    normed = load_normed(x, norm, rows, extent, C)
    d = load_tile(d_out, rows, c, extent)
    if tl.program_id(1) == 0:
        store_tile(normed_out, normed, rows, c, extent)
        store_column_sums(own, d, c, None)
    for block in range(0, HIDDEN // PARTS, BLOCK_N):
        first = tl.program_id(1) * (HIDDEN // PARTS) + block
        n = first + tl.arange(0, BLOCK_N)
        hidden = dot(normed, tl.trans(weight_1.load([first, 0])), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
        hidden = tl.maximum(hidden + tl.load(bias_1 + n).to(tl.float32)[None, :], 0.0)
        store_tile(hidden_rows, hidden, rows, n, extent)
        d_hidden = dot(d, weight_2.load([0, first]), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
        d_hidden = tl.where(hidden > 0.0, d_hidden, 0.0).to(d.dtype)
        store_tile(d_hidden_rows, d_hidden, rows, n, extent)
        store_column_sums(own + C, d_hidden, n, None)


@triton.jit
def _update_kernel(
    x, hidden, weight, bias, out, extent,
    HIDDEN: tl.constexpr, C: tl.constexpr, PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Tile of rows, part of the channels: x + W2 hidden + b2, by blocks of BLOCK_N hidden channels.

    The weight comes as blocks [C / PARTS, BLOCK_N]. Without x: the product alone, with W1 in blocks
    [BLOCK_N, C / PARTS].
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(1) * (C // PARTS)
    c = first + tl.arange(0, C // PARTS)
    acc = tl.zeros([BLOCK_M, C // PARTS], tl.float32)
    for k in range(0, HIDDEN, BLOCK_N):
        tile = load_tile(hidden, rows, k + tl.arange(0, BLOCK_N), extent)
        if x is not None:
            acc = dot(tile, tl.trans(weight.load([first, k])), acc)
        else:
            acc = dot(tile, weight.load([k, first]), acc)
    if x is not None:
        acc += tl.load(bias + c).to(tl.float32)[None, :]
        acc += load_tile(x, rows, c, extent).to(tl.float32)
    store_tile(out, acc, rows, c, extent)


def _update_config(name: str, hidden: Tensor, c: int) -> tuning.Config:
    """Launch parameters of ``_update_kernel`` for rows of the hidden layer: [*, hidden], within both widths."""
    count, width = hidden.shape[:-1].numel(), hidden.shape[-1]
    config = tuning.lookup(name, **tuning.row_fields(count, hidden.dtype, c=c, n=width))
    if config.get("LIBRARY"):
        return config
    parts = max(1, min(config["PARTS"], c // tuning.NARROWEST_PART))
    return {**config, "PARTS": parts, "BLOCK_N": min(config["BLOCK_N"], width)}


def forward(x: Tensor, norm: Norm, parameters: Sequence[Tensor], out: Tensor, config: tuning.Config) -> None:
    """Transition of x: [*, c] to ``out``, in its memory order, by both linears; config: of the first launch."""
    weight_1, bias_1, weight_2, bias_2 = parameters
    (width, c), count = weight_1.shape, x.shape[:-1].numel()
    hidden = in_order(memory_order(x), x.new_empty(count, width), x.shape)
    launch(
        _hidden_kernel, config, {"x": x, "hidden": hidden}, norm=norm, bias=bias_1,
        weight=weight_blocks(weight_1, (config["BLOCK_N"], c)), HIDDEN=width, C=c,
    )  # fmt: skip
    own = _update_config("transition_update", hidden, c)
    launch(
        _update_kernel, own, {"x": x, "hidden": hidden, "out": out}, bias=bias_2,
        weight=weight_blocks(weight_2, (c // own["PARTS"], own["BLOCK_N"])), HIDDEN=width, C=c,
    )  # fmt: skip


class Gradient(NamedTuple):
    """What the backward leaves: dx, normed: [*, c], hidden, d_hidden: [*, hidden width]; sums: [tiles, *] for the norm
    (2 c) and for the biases (c + hidden width).
    """

    dx: Tensor
    normed: Tensor
    hidden: Tensor
    d_hidden: Tensor
    norm_sums: Tensor
    bias_sums: Tensor


def backward(
    x: Tensor, d_out: Tensor, norm: Norm, linear: Sequence[Tensor], weight_2: Tensor, config: tuning.Config
) -> Gradient:
    """The backward for x, d_out: [*, c], x with rows in memory order; linear: weight 1, bias 1; config: of the first
    launch.
    """
    weight_1, bias_1 = linear
    (width, c), block = weight_1.shape, config["BLOCK_N"]
    normed, hidden = torch.empty_like(x), x.new_empty(*x.shape[:-1], width)
    d_hidden = torch.empty_like(hidden)
    tensors = {"x": x, "d_out": d_out, "hidden_rows": hidden, "d_hidden_rows": d_hidden, "normed_out": normed}
    bias_sums = launch_with_sums(
        _hidden_gradient_kernel, config, tensors, c + width, norm=norm, weight_1=weight_blocks(weight_1, (block, c)),
        bias_1=bias_1, weight_2=weight_blocks(weight_2, (c, block)), HIDDEN=width, C=c,
    )  # fmt: skip
    d_normed = _normed_gradient(d_hidden, weight_1)
    dx, norm_sums = norm_gradient(d_normed, x, norm.weight, through=d_out)
    return Gradient(dx, normed, hidden, d_hidden, norm_sums, bias_sums)


def _normed_gradient(d_hidden: Tensor, weight: Tensor) -> Tensor:
    """d W: [*, c] for d: [*, hidden width], dense, and W: [hidden width, c]."""
    width, c = weight.shape
    config = _update_config("transition_backward_update", d_hidden, c)
    if config.get("LIBRARY"):
        return (d_hidden.view(-1, width) @ weight).view(*d_hidden.shape[:-1], c)
    out = d_hidden.new_empty(*d_hidden.shape[:-1], c)
    launch(
        _update_kernel, config, {"x": None, "hidden": d_hidden, "out": out}, bias=None,
        weight=weight_blocks(weight, (config["BLOCK_N"], c // config["PARTS"])), HIDDEN=width, C=c,
    )  # fmt: skip
    return out
