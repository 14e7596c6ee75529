"""Transition in Triton, forward and backward: x + W2 relu(W1 LN(x) + b1) + b2 (Supplement Algorithms 9, 15).

One kernel forward, in which the hidden layer never leaves the chip (on compute capability 9.0 one of
``kernels.hopper`` may take its place). Where rows are few, two: the hidden layer, then its product, each with a second
dimension of the grid over parts of its output columns, because a program per tile of rows reads all of both weights.
Saved: x. The backward has two forms; the launch parameter ``LIBRARY`` says which one to take:

- fused (0 or absent): one kernel computes the hidden layer again, block by block, together with its gradient, those of
  the biases and that of x, residual included; it stores the hidden layer, its gradient and the norm for the weight
  gradients, which are products of the library. RECOMPUTED (1): it stores neither the hidden layer nor its gradient; the
  kernel of the weight gradients computes both once more, transposed, as left operands of its products. Twice the
  hidden layer's bytes are neither written nor read.
- by the library (1): norm and hidden layer are launches of their own; the kernel is left with the gradients of the
  hidden layer and of the biases, and the product for the norm's gradient and the norm's backward, residual included,
  follow it. More memory moves, but where a kernel that holds norm, products and the norm's backward at once has too few
  registers (256 channels), each part at its own best is faster.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton.tools.tensor_descriptor import TensorDescriptor

from scalefold.kernels import tuning
from scalefold.kernels.around import aside
from scalefold.kernels.around.aside import Gradients
from scalefold.kernels.gradients.weight_gradient import NUM_PROGRAMS, Product, row_ranges, weight_partials
from scalefold.kernels.hopper import gradients as gluon
from scalefold.kernels.hopper import rows as hopper
from scalefold.kernels.hopper.choice import chosen
from scalefold.kernels.instructions import program, to_fp32, wait_for_predecessors
from scalefold.kernels.ops.elementwise import in_order
from scalefold.kernels.ops.layer_norm import norm_gradient, normed_rows
from scalefold.kernels.rows import (
    Affine,
    Norm,
    View,
    dot,
    launch,
    launch_with_sums,
    layout_obstacle,
    load_normed,
    load_tile,
    load_vector,
    memory_order,
    norm_input_gradient,
    store_column_sums,
    store_tile,
    sum_all,
    weight_blocks,
    width_obstacle,
)

Two = tuple[Tensor, Tensor]

tuning.register_tiles("transition_forward", {64: (64, 64, 4, 3), 128: (128, 64, 8, 3), 256: (128, 64, 8, 2)})
tuning.register_parts("transition_columns")
tuning.register("transition_update", lambda fields, capability: {"PARTS": 2, **tuning.tile_config((64, 64, 4, 3))})
tuning.register_tiles("transition_weights", {64: (64, 64, 4, 2), 128: (64, 64, 4, 2), 256: (64, 64, 8, 2)})
tuning.register_tiles("transition_backward", {64: (64, 64, 4, 2), 128: (64, 64, 8, 2), 256: (64, 32, 8, 2)})


@program
@triton.jit
def _forward_kernel(
    x, norm, weight_1, bias_1, weight_2, bias_2, out, extent,
    HIDDEN: tl.constexpr, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Tile of rows: norm, both linears block by block of the hidden layer, residual. The weights come as blocks."""
    wait_for_predecessors()
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.arange(0, C)
    normed = load_normed(x, norm, rows, extent, C)
    acc = tl.zeros([BLOCK_M, C], tl.float32)
    for first in range(0, HIDDEN, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        hidden = dot(normed, tl.trans(weight_1.load([first, 0])), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
        hidden += tl.load(bias_1 + n).to(tl.float32)[None, :]
        acc = dot(tl.maximum(hidden, 0.0).to(normed.dtype), tl.trans(weight_2.load([0, first])), acc)
    acc += load_vector(bias_2, C)[None, :]
    acc += load_tile(x, rows, c, extent).to(tl.float32)
    store_tile(out, acc, rows, c, extent)


@program
@triton.jit
def _hidden_kernel(
    x, norm, weight, bias, hidden, extent,
    HIDDEN: tl.constexpr, C: tl.constexpr, PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Tile of rows, part of the hidden channels: relu(W1 LN(x) + b1). The weight comes as blocks [BLOCK_N, C]."""
    wait_for_predecessors()
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    normed = load_normed(x, norm, rows, extent, C)
    for block in range(0, HIDDEN // PARTS, BLOCK_N):
        first = tl.program_id(1) * (HIDDEN // PARTS) + block
        n = first + tl.arange(0, BLOCK_N)
        acc = dot(normed, tl.trans(weight.load([first, 0])), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
        acc += tl.load(bias + n).to(tl.float32)[None, :]
        store_tile(hidden, tl.maximum(acc, 0.0), rows, n, extent)


@program
@triton.jit
def _update_kernel(
    x, hidden, weight, bias, out, extent,
    HIDDEN: tl.constexpr, C: tl.constexpr, PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Tile of rows, part of the channels: x + W2 hidden + b2, by blocks of BLOCK_N hidden channels.

    The weight comes as blocks [C / PARTS, BLOCK_N].
    """
    wait_for_predecessors()
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


@program
@triton.jit
def _backward_kernel(
    x, norm, weight_1, bias_1, weight_2, d_out, hidden_rows, d_hidden_out, normed_out, dx, partials, extent,
    FUSED: tl.constexpr, STORED: tl.constexpr, HIDDEN: tl.constexpr, C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Tile of rows: gradients of the hidden layer and sums for the biases, block by block.

    FUSED: the hidden layer and the norm are computed and stored too, and dx with the sums for the norm follows. Else
    the hidden layer is read, and neither x nor anything of its norm is looked at. ``d_hidden_out`` lies as the hidden
    layer does, so that one set of strides takes registers. Without STORED neither is stored, nor sums for bias 1.
    """
    wait_for_predecessors()
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.arange(0, C)
    d = load_tile(d_out, rows, c, extent)
    own = partials + tl.program_id(0).to(tl.int64) * (3 * C + HIDDEN * STORED)
    if FUSED:
        normed = load_normed(x, norm, rows, extent, C)
        acc = tl.zeros([BLOCK_M, C], tl.float32)
    for first in range(0, HIDDEN, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        if FUSED:
            block_1 = weight_1.load([first, 0])
            hidden = dot(normed, tl.trans(block_1), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
            hidden = tl.maximum(hidden + tl.load(bias_1 + n).to(tl.float32)[None, :], 0.0)
            if STORED:
                store_tile(hidden_rows, hidden, rows, n, extent)
        else:
            hidden = load_tile(hidden_rows, rows, n, extent)
        block_2 = weight_2.load([0, first])
        d_hidden = dot(d, block_2, tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
        d_hidden = tl.where(hidden > 0.0, d_hidden, 0.0).to(d.dtype)
        if STORED:
            store_tile(View(d_hidden_out, hidden_rows.strides), d_hidden, rows, n, extent)
            store_column_sums(own + 3 * C, d_hidden, n, None)
        if FUSED:
            acc = dot(d_hidden, block_1, acc)
    d = load_tile(d_out, rows, c, extent)
    store_column_sums(own + 2 * C, d, c, None)
    if FUSED:
        gradient, _ = norm_input_gradient(acc, x, norm, None, normed_out, own, rows, extent, C)
        gradient = d.to(tl.float32) + gradient
        store_tile(dx, gradient, rows, c, extent)


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


def _blocks(weight_1: Tensor, weight_2: Tensor, config: tuning.Config) -> tuple[TensorDescriptor, TensorDescriptor]:
    """Both weights in blocks of BLOCK_N hidden channels."""
    c, block = weight_1.shape[1], config["BLOCK_N"]
    return weight_blocks(weight_1, (block, c)), weight_blocks(weight_2, (c, block))


def _in_layers(x: Tensor, norm: Norm, parameters: Sequence[Tensor], out: Tensor, config: tuning.Config) -> None:
    """Transition of x: [*, c] to ``out``, in its memory order, by both linears; config: of the first launch."""
    weight_1, bias_1, weight_2, bias_2 = parameters
    (hidden, c), count = weight_1.shape, x.shape[:-1].numel()
    between = in_order(memory_order(x), x.new_empty(count, hidden), x.shape)
    launch(
        _hidden_kernel, config, {"x": x, "hidden": between}, norm=norm, bias=bias_1,
        weight=weight_blocks(weight_1, (config["BLOCK_N"], c)), HIDDEN=hidden, C=c,
    )  # fmt: skip
    own = tuning.lookup("transition_update", **tuning.row_fields(count, x.dtype, c=c, n=hidden))
    parts, block = max(1, min(own["PARTS"], c // tuning.NARROWEST_PART)), min(own["BLOCK_N"], hidden)
    launch(
        _update_kernel, {**own, "PARTS": parts, "BLOCK_N": block}, {"x": x, "hidden": between, "out": out}, bias=bias_2,
        weight=weight_blocks(weight_2, (c // parts, block)), HIDDEN=hidden, C=c,
    )  # fmt: skip


class _Transition(torch.autograd.Function):
    """Arguments: those of ``transition``."""

    @staticmethod
    def forward(ctx, x, norm_weight, norm_bias, weight_1, bias_1, weight_2, bias_2):
        ctx.save_for_backward(x, norm_weight, norm_bias, weight_1, bias_1, weight_2, bias_2)
        out, (hidden, c), norm = torch.empty_like(x), weight_1.shape, Norm(norm_weight, norm_bias)
        if chosen("transition", hopper.transition_obstacle(x, (weight_1, weight_2))):
            hopper.transition(x, norm, Affine(weight_1, bias_1), Affine(weight_2, bias_2), out)
            return out
        config = tuning.chosen_parts("transition_columns", "transition_forward", x, hidden, hidden)
        if config["PARTS"] > 1:
            _in_layers(x, norm, (weight_1, bias_1, weight_2, bias_2), out, config)
            return out
        del config["PARTS"]
        blocks = _blocks(weight_1, weight_2, config)
        launch(
            _forward_kernel, config, {"x": x, "out": out}, norm=norm, weight_1=blocks[0], bias_1=bias_1,
            weight_2=blocks[1], bias_2=bias_2, HIDDEN=hidden, C=c,
        )  # fmt: skip
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        x, *parameters = ctx.saved_tensors
        norm_weight, norm_bias, weight_1, bias_1, weight_2, _ = parameters
        width, c = weight_1.shape
        config = tuning.chosen_tiles("transition_backward", x, width, width)
        by_library, recomputed = bool(config.pop("LIBRARY", 0)), bool(config.pop("RECOMPUTED", 0))
        order, places = memory_order(x), tuple(range(x.dim() - 1))
        x, d_out = (tensor.movedim(order, places) for tensor in (x, d_out))  # what is made from here on: rows like x
        if chosen("transition's gradient", hopper.transition_obstacle(x, (weight_1, weight_2), d_out)):
            dx, gradients = _by_gluon(x, d_out, parameters)
            return dx.movedim(places, order), *gradients
        if recomputed and hopper.is_dense(d_out):
            dx, gradients = _recomputed(x, d_out, parameters, config)
            return dx.movedim(places, order), *gradients
        if by_library:
            normed = normed_rows(x, norm_weight, norm_bias)
            hidden = torch._addmm_activation(bias_1, normed.reshape(-1, c), weight_1.t())  # bias and relu inside
            hidden = hidden.view(*x.shape[:-1], width)
            dx = x  # the kernel leaves it alone
        else:
            dx, normed, hidden = torch.empty_like(x), torch.empty_like(x), x.new_empty(*x.shape[:-1], width)
        d_hidden = torch.empty_like(hidden)
        blocks = _blocks(weight_1, weight_2, config)
        tensors = {"x": x, "d_out": d_out, "hidden_rows": hidden, "normed_out": normed, "dx": dx}
        partials = launch_with_sums(
            _backward_kernel, config, tensors, 3 * c + width, norm=Norm(norm_weight, norm_bias), weight_1=blocks[0],
            bias_1=bias_1, weight_2=blocks[1], d_hidden_out=d_hidden, FUSED=not by_library, STORED=True,
            HIDDEN=width, C=c,
        )  # fmt: skip
        norm_sums, bias_sums = partials.split([2 * c, c + width], 1)
        if by_library:
            d_normed = (d_hidden.view(-1, width) @ weight_1).view(x.shape)
            dx, norm_sums = norm_gradient(d_normed, x, norm_weight, through=d_out)
        gradients = _stored_gradients((norm_sums, bias_sums), (normed, d_out), (hidden, d_hidden), parameters)
        return dx.movedim(places, order), *gradients


def _stored_gradients(sums: Two, rows: Two, hidden_rows: Two, parameters: Sequence[Tensor]) -> Gradients:
    """Gradients of all parameters from sums for norm, biases; from rows of norm, d_out, hidden layer, its gradient."""
    (normed, d_out), (hidden, d_hidden), (_, _, weight_1, _, weight_2, _) = rows, hidden_rows, parameters

    def gradients() -> tuple[Tensor, ...]:
        weight_sums = weight_partials([Product(d_hidden, normed), Product(hidden, d_out, transposed=True)])
        d_norm, d_bias, d_weight_1, d_weight_2 = sum_all([*sums, *weight_sums], weight_1.dtype)
        d_bias_2, d_bias_1 = d_bias.split(weight_1.shape[::-1])
        return *d_norm.chunk(2), d_weight_1.view_as(weight_1), d_bias_1, d_weight_2.view_as(weight_2), d_bias_2

    return aside.gradients(parameters, [*sums, *rows, *hidden_rows], gradients)


def _by_gluon(x: Tensor, d_out: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, Gradients]:
    """The backward around the program of ``kernels.hopper``: gradient of x: [*, c], and those of all parameters."""
    norm_weight, norm_bias, weight_1, bias_1, weight_2, _ = parameters
    norm, linear = Norm(norm_weight, norm_bias), Affine(weight_1, bias_1)
    form, obstacle = hopper.transition_gradient, gluon.hidden_obstacle(x, weight_1.shape[0])
    if x.shape[-1] == hopper.MSA_CHANNELS and chosen("transition's gradient in narrow blocks", obstacle):
        form = gluon.transition_hidden
    *rows, bias_sums = form(x, d_out, norm, linear, weight_2)
    hidden, d_hidden, normed, d_normed = (matrix.view(*x.shape[:-1], matrix.shape[1]) for matrix in rows)
    dx, norm_sums = norm_gradient(d_normed, x, norm_weight, through=d_out)
    return dx, _stored_gradients((norm_sums, bias_sums), (normed, d_out), (hidden, d_hidden), parameters)


def _recomputed(
    x: Tensor, d_out: Tensor, parameters: Sequence[Tensor], config: tuning.Config
) -> tuple[Tensor, Gradients]:
    """The backward that stores nothing of the hidden layer: gradient of x: [*, c], and those of all parameters.

    d_out: [*, c], contiguous.
    """
    norm_weight, norm_bias, weight_1, bias_1, weight_2, _ = parameters
    norm, linear, c, dtype = Norm(norm_weight, norm_bias), Affine(weight_1, bias_1), x.shape[-1], norm_weight.dtype
    obstacle = gluon.transition_obstacle(gluon.TRANSITION_NAMES[0], x, d_out, (weight_1, weight_2))
    if chosen("input gradient of a transition", obstacle):
        dx, normed, sums = gluon.transition_input(x, d_out, norm, linear, weight_2)
    else:
        dx, normed, sums = _recomputed_input(x, d_out, norm, linear, weight_2, config)

    def gradients() -> tuple[Tensor, ...]:
        obstacle = gluon.transition_obstacle(gluon.TRANSITION_NAMES[1], normed, d_out, (weight_1, weight_2))
        if chosen("weight gradients of a transition", obstacle):
            partials = gluon.transition_weights(normed, d_out, linear, weight_2)
        else:
            partials = _weight_partials(normed.view(-1, c), d_out.view(-1, c), linear, weight_2)
        d_norm, d_bias_2, d_weight_1, d_weight_2, d_bias_1 = sum_all([*sums.split([2 * c, c], 1), *partials], dtype)
        return *d_norm.chunk(2), d_weight_1.view_as(weight_1), d_bias_1, d_weight_2.view_as(weight_2), d_bias_2

    return dx, aside.gradients(parameters, [sums, normed, d_out], gradients)


def _recomputed_input(
    x: Tensor, d_out: Tensor, norm: Norm, linear: Affine, weight_2: Tensor, config: tuning.Config
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of x: [*, c], its layer norm, and partial sums [tiles, 3 c]; see ``_recomputed``."""
    (weight_1, bias_1), (c, width) = linear, weight_2.shape
    dx, normed, blocks = torch.empty_like(x), x.new_empty(x.shape), _blocks(weight_1, weight_2, config)
    tensors = {"x": x, "d_out": d_out, "hidden_rows": normed, "normed_out": normed, "dx": dx}
    sums = launch_with_sums(
        _backward_kernel, config, tensors, 3 * c, norm=norm, weight_1=blocks[0], bias_1=bias_1, weight_2=blocks[1],
        d_hidden_out=normed, FUSED=True, STORED=False, HIDDEN=width, C=c,
    )  # fmt: skip
    return dx, normed, sums


def _weight_partials(normed: Tensor, d_out: Tensor, linear: Affine, weight_2: Tensor) -> tuple[Tensor, ...]:
    """Partial gradients [ranges, *] of weight 1, weight 2 and bias 1 from rows [rows, c] of norm and gradient."""
    (num_rows, c), (weight_1, bias_1), width = normed.shape, linear, weight_2.shape[1]
    config = tuning.chosen_tiles("transition_weights", normed, width, width)
    rows = [TensorDescriptor.from_tensor(matrix, [config["BLOCK_M"], c]) for matrix in (normed, d_out)]
    blocks, num_blocks = _blocks(weight_1, weight_2, config), width // config["BLOCK_N"]
    per_range, num_ranges = row_ranges(num_rows, config["BLOCK_M"], num_blocks, NUM_PROGRAMS)
    partials = torch.empty(num_ranges, 2 * width * c + width, dtype=torch.float32, device=normed.device)
    _weights_kernel[(num_blocks, num_ranges)](
        *rows, blocks[0], bias_1, blocks[1], partials, num_rows, per_range, HIDDEN=width, C=c, **config
    )
    return partials.split([width * c, width * c, width], 1)


def obstacle(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight_1: Tensor, bias_1: Tensor, weight_2: Tensor, *_: object
) -> str | None:
    """Why ``transition`` does not take these arguments, or None."""
    hidden, c = weight_1.shape
    if hidden < 16 or hidden & (hidden - 1):
        return f"hidden width {hidden} is no power of two from 16"
    if not (weight_1.is_contiguous() and weight_2.is_contiguous()):
        return "weights are not contiguous"
    return width_obstacle(c) or layout_obstacle(x)


def transition(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight_1: Tensor,
    bias_1: Tensor,
    weight_2: Tensor,
    bias_2: Tensor,
) -> Tensor:
    """``reference.transition``; the result lies in the memory order of x."""
    return _Transition.apply(x, norm_weight, norm_bias, weight_1, bias_1, weight_2, bias_2)  # type: ignore[return-value]
