"""A transition forward, layer by layer: for few rows, where one program per tile of rows reads too much weight.

The first launch makes the hidden layer, the second its product and the residual; the grid of each has a second
dimension over parts of its output columns. The hidden layer is written and read, which costs less than reading both
weights as a whole in every program as long as it stays in the L2 cache.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl
from torch import Tensor

from scalefold.kernels import tuning
from scalefold.kernels.ops.elementwise import in_order
from scalefold.kernels.rows import (
    Affine,
    Norm,
    dot,
    launch,
    load_normed,
    load_tile,
    memory_order,
    store_tile,
    weight_blocks,
)

tuning.register_parts("transition_columns")
tuning.register("transition_update", lambda fields, capability: {"PARTS": 2, **tuning.tile_config((64, 64, 4, 3))})


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
def _update_kernel(
    x, hidden, weight, bias, out, extent,
    HIDDEN: tl.constexpr, C: tl.constexpr, PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Tile of rows, part of the channels: x + W2 hidden + b2, by blocks of BLOCK_N hidden channels.

    The weight comes as blocks [C / PARTS, BLOCK_N].
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(1) * (C // PARTS)
    c = first + tl.arange(0, C // PARTS)
    acc = tl.zeros([BLOCK_M, C // PARTS], tl.float32)
    for k in range(0, HIDDEN, BLOCK_N):
        tile = load_tile(hidden, rows, k + tl.arange(0, BLOCK_N), extent)
        acc = dot(tile, tl.trans(weight.load([first, k])), acc)
    acc += tl.load(bias + c).to(tl.float32)[None, :]
    acc += load_tile(x, rows, c, extent).to(tl.float32)
    store_tile(out, acc, rows, c, extent)


def in_layers(x: Tensor, norm: Norm, linear_1: Affine, linear_2: Affine, out: Tensor, config: tuning.Config) -> None:
    """x: [*, c] + W2 relu(W1 LN(x) + b1) + b2 to ``out``, in the memory order of x; config: of the first launch."""
    hidden, c = linear_1.weight.shape
    count = x.shape[:-1].numel()
    between = in_order(memory_order(x), x.new_empty(count, hidden), x.shape)
    launch(
        _hidden_kernel, config, {"x": x, "hidden": between}, norm=norm, bias=linear_1.bias,
        weight=weight_blocks(linear_1.weight, (config["BLOCK_N"], c)), HIDDEN=hidden, C=c,
    )  # fmt: skip
    own = tuning.lookup("transition_update", **tuning.row_fields(count, x.dtype, c=c, n=hidden))
    own |= {"PARTS": max(1, min(own["PARTS"], c // tuning.NARROWEST_PART)), "BLOCK_N": min(own["BLOCK_N"], hidden)}
    launch(
        _update_kernel, own, {"x": x, "hidden": between, "out": out}, bias=linear_2.bias,
        weight=weight_blocks(linear_2.weight, (c // own["PARTS"], own["BLOCK_N"])), HIDDEN=hidden, C=c,
    )  # fmt: skip
