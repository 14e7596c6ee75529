"""Weight gradients of a transition whose hidden layer and its gradient are computed once more (``ops.transition``)."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from scalefold.kernels import tuning
from scalefold.kernels.gradients.weight_gradient import NUM_PROGRAMS, row_ranges
from scalefold.kernels.instructions import program, to_fp32, wait_for_predecessors
from scalefold.kernels.rows import Affine, dot, weight_blocks

tuning.register_tiles("transition_weights", {64: (64, 64, 4, 2), 128: (64, 64, 4, 2), 256: (64, 64, 8, 2)})


@program
@triton.jit
def _weights_kernel(
    normed, d_out, weight_1, bias_1, weight_2, partials, num_rows, rows_per_split,
    HIDDEN: tl.constexpr, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program (block of the hidden layer, range of rows) -> partials[range]: gradients of weight 1, weight 2, bias 1.

    The hidden layer and its gradient come as [BLOCK_N, rows], the left operands of the products. Everything is read by
    descriptors, as zeros past the rows.
    """
    wait_for_predecessors()
    first = tl.program_id(0) * BLOCK_N
    n, c = first + tl.arange(0, BLOCK_N), tl.arange(0, C)
    start = tl.program_id(1) * rows_per_split
    partials += tl.program_id(1).to(tl.int64) * (2 * HIDDEN * C + HIDDEN)
    block_1, block_2 = weight_1.load([first, 0]), tl.trans(weight_2.load([0, first]))
    bias = tl.load(bias_1 + n).to(tl.float32)
    acc_1, acc_2 = tl.zeros([BLOCK_N, C], tl.float32), tl.zeros([BLOCK_N, C], tl.float32)
    sums = tl.zeros([BLOCK_N], tl.float32)
    for row in range(start, tl.minimum(start + rows_per_split, num_rows), BLOCK_M):
        x, d = normed.load([row, 0]), d_out.load([row, 0])
        hidden = dot(block_1, tl.trans(x), tl.zeros([BLOCK_N, BLOCK_M], tl.float32))
        hidden = tl.maximum(hidden + bias[:, None], 0.0)
        d_hidden = dot(block_2, tl.trans(d), tl.zeros([BLOCK_N, BLOCK_M], tl.float32))
        d_hidden = tl.where(hidden > 0.0, d_hidden, 0.0).to(d.dtype)
        sums += tl.sum(to_fp32(d_hidden), 1)
        acc_1 = dot(d_hidden, x, acc_1)
        acc_2 = dot(hidden.to(d.dtype), d, acc_2)
    tl.store(partials + n[:, None] * C + c[None, :], acc_1)
    tl.store(partials + HIDDEN * C + n[:, None] + c[None, :] * HIDDEN, acc_2)
    tl.store(partials + 2 * HIDDEN * C + n, sums)


def hidden_blocks(
    weight_1: Tensor, weight_2: Tensor, config: tuning.Config
) -> tuple[TensorDescriptor, TensorDescriptor]:
    """Both weights in blocks of BLOCK_N hidden channels."""
    c, block = weight_1.shape[1], config["BLOCK_N"]
    return weight_blocks(weight_1, (block, c)), weight_blocks(weight_2, (c, block))


def recomputed_partials(normed: Tensor, d_out: Tensor, linear: Affine, weight_2: Tensor) -> tuple[Tensor, ...]:
    """Partial gradients [ranges, *] of weight 1, weight 2 and bias 1 from rows [rows, c] of norm and gradient."""
    (num_rows, c), (weight_1, bias_1), width = normed.shape, linear, weight_2.shape[1]
    config = tuning.chosen_tiles("transition_weights", normed, width, width)
    rows = [TensorDescriptor.from_tensor(matrix, [config["BLOCK_M"], c]) for matrix in (normed, d_out)]
    blocks, num_blocks = hidden_blocks(weight_1, weight_2, config), width // config["BLOCK_N"]
    per_range, num_ranges = row_ranges(num_rows, config["BLOCK_M"], num_blocks, NUM_PROGRAMS)
    partials = torch.empty(num_ranges, 2 * width * c + width, dtype=torch.float32, device=normed.device)
    _weights_kernel[(num_blocks, num_ranges)](
        *rows, blocks[0], bias_1, blocks[1], partials, num_rows, per_range, HIDDEN=width, C=c, **config
    )
    return partials.split([width * c, width * c, width], 1)
