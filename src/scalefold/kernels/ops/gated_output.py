"""End of a gated attention in Triton: x + dropout * (W (sigmoid(gate) * o) + b), forward and backward.

One kernel forward; on compute capability 9.0 one of ``kernels.hopper`` takes its place where it is faster.
Backward: one kernel for the gradients of o and gate and the operands of the weight gradient, a product of the library,
a sum. The gradient of x is the incoming gradient itself. Saved: o, gate, dropout; nothing that is not an input.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from scalefold.kernels import tuning
from scalefold.kernels.around import aside
from scalefold.kernels.destination import Destination
from scalefold.kernels.gradients.weight_gradient import Product, weight_partials
from scalefold.kernels.hopper import gated_attention as hopper
from scalefold.kernels.hopper.choice import chosen
from scalefold.kernels.instructions import program, sigmoid, to_fp32, wait_for_predecessors
from scalefold.kernels.owners import by_columns_of, owned_columns, owned_part, store_tile_by_rows
from scalefold.kernels.rows import (
    Affine,
    Rows,
    dot,
    launch,
    launch_with_sums,
    layout_obstacle,
    load_tile,
    store_tile,
    sum_all,
    width_obstacle,
)

tuning.register_tiles("gated_output_forward", {64: (128, 64, 4, 3), 128: (64, 64, 4, 3), 256: (64, 64, 8, 3)})
tuning.register_parts("gated_output_columns")
tuning.register_tiles("gated_output_backward", {64: (64, 64, 4, 2), 128: (64, 64, 4, 2), 256: (64, 64, 8, 2)})


@triton.jit
def _load_gated(o, gate, rows, columns, extent):
    """sigmoid(gate) * o in the storage type of o: [rows, columns]."""
    value = load_tile(o, rows, columns, extent)
    logits = to_fp32(load_tile(gate, rows, columns, extent))
    return (to_fp32(value) * sigmoid(logits)).to(value.dtype)


@triton.jit
def _load_update_gradient(d, dropout, rows, columns, extent):
    """dropout * d in the storage type of d."""
    tile = load_tile(d, rows, columns, extent)
    if dropout is not None:
        scale = to_fp32(load_tile(dropout, rows, columns, extent))
        tile = (to_fp32(tile) * scale).to(tile.dtype)
    return tile


@program
@triton.jit
def _forward_kernel(
    x, o, gate, linear, dropout, outs, extent,
    C: tl.constexpr, HD: tl.constexpr, PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Tile of rows, part of the output columns: the gated output by blocks into the product, bias, dropout, residual.

    Each of PARTS programs gates the whole tile again, all of them from the cache. Each of several outs gets the rows
    that its rank owns.
    """
    wait_for_predecessors()
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.arange(0, C // PARTS)
    if PARTS > 1:
        c += tl.program_id(1) * (C // PARTS)
    acc = tl.zeros([BLOCK_M, C // PARTS], tl.float32)
    for first in range(0, HD, BLOCK_N):
        k = first + tl.arange(0, BLOCK_N)
        gated = _load_gated(o, gate, rows, k, extent)
        block = tl.load(linear.weight + c[:, None] * HD + k[None, :])
        acc = dot(gated, tl.trans(block), acc)
    acc += tl.load(linear.bias + c).to(tl.float32)[None, :]
    if dropout is not None:
        acc *= load_tile(dropout, rows, c, extent).to(tl.float32)
    acc += load_tile(x, rows, c, extent).to(tl.float32)
    if len(outs) > 1:
        store_tile_by_rows(outs, acc, rows, c, extent)
    else:
        store_tile(outs[0], acc, rows, c, extent)


@program
@triton.jit
def _input_gradient_kernel(
    d, o, gate, weight, dropout, d_o, d_gate, update_out, gated_out, partials, extent,
    C: tl.constexpr, HD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Tile of rows: gradients of o and gate; the operands of the weight gradient (update_out None: it is d itself);
    sums of the bias gradient at partials[tile]."""
    wait_for_predecessors()
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.arange(0, C)
    update = _load_update_gradient(d, dropout, rows, c, extent)
    if update_out is not None:
        store_tile(update_out, update, rows, c, extent)
    tl.store(partials + tl.program_id(0).to(tl.int64) * C + c, tl.sum(to_fp32(update), 0))
    for first in range(0, HD, BLOCK_N):
        k = first + tl.arange(0, BLOCK_N)
        block = tl.load(weight + c[:, None] * HD + k[None, :])
        d_gated = dot(update, block, tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
        value = load_tile(o, rows, k, extent).to(tl.float32)
        opening = sigmoid(to_fp32(load_tile(gate, rows, k, extent)))
        store_tile(gated_out, value * opening, rows, k, extent)
        d_gated *= opening
        store_tile(d_o, d_gated, rows, k, extent)
        store_tile(d_gate, d_gated * value * (1.0 - opening), rows, k, extent)


class _GatedOutput(torch.autograd.Function):
    """Arguments: x, o flattened to [*, H * D], gate, weight, bias, dropout, destination."""

    @staticmethod
    def forward(ctx, x, o, gate, weight, bias, dropout, destination):
        ctx.save_for_backward(o, gate, weight, bias, dropout)
        by_gluon = chosen("gated output", hopper.gated_output_obstacle(x, o, gate, weight, dropout))
        outs = () if destination is None else destination.parts
        if destination is None or not (hopper.fits_halves(x, dropout, outs) if by_gluon else by_columns_of(x, outs)):
            outs, destination = [torch.empty_like(x)], None
        (hopper.gated_output if by_gluon else _forward)(x, o, gate, dropout, Affine(weight, bias), outs)
        if destination is None:
            return outs[0]
        destination.written = True
        return x.new_empty(()).expand(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, d):
        o, gate, weight, bias, dropout = ctx.saved_tensors
        name = "gated_output_hopper_gradient"
        if chosen("gradient of a gated output", hopper.gated_output_obstacle(d, o, gate, weight, dropout, name)):
            d_o, d_gate, update, gated, partials = hopper.gated_output_gradient(d, o, gate, dropout, weight)
        else:
            d_o, d_gate, update, gated, partials = _gradients(d, o, gate, dropout, weight)
        product = Product(update, gated)

        def gradients() -> tuple[Tensor, Tensor]:
            d_bias, d_weight = sum_all([partials, *weight_partials([product])], weight.dtype)
            return d_weight.view_as(weight), d_bias.to(bias.dtype)

        return d, d_o, d_gate, *aside.gradients([weight, bias], [partials, product.d, gated], gradients), None, None


def _forward(
    x: Tensor, o: Tensor, gate: Tensor, dropout: Tensor | None, linear: Affine, outs: Sequence[Tensor]
) -> None:
    """``hopper.gated_output`` in Triton; outs: one like x, or those of ``by_columns_of``."""
    assert linear.weight is not None
    (c, hd), ranks = linear.weight.shape, len(outs)
    config = tuning.chosen_parts(
        "gated_output_columns", "gated_output_forward", x, min(c, hd), hd, max(c, hd), columns=c, blocked=False
    )
    tensors: dict[str, Rows] = {"x": x, "o": o, "gate": gate, "dropout": dropout, "outs": tuple(outs)}
    if ranks > 1:
        given = {name: t if t is None else owned_columns(t, ranks) for name, t in tensors.items() if name != "outs"}
        tensors = given | {"outs": tuple(owned_part(part, ranks) for part in outs)}
    launch(_forward_kernel, config, tensors, linear=Affine(linear.weight.contiguous(), linear.bias), C=c, HD=hd)


def _gradients(
    d: Tensor, o: Tensor, gate: Tensor, dropout: Tensor | None, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``hopper.gated_output_gradient`` in Triton."""
    d_o, d_gate, gated = torch.empty_like(o), torch.empty_like(gate), torch.empty_like(o)
    update = None if dropout is None else torch.empty_like(d)
    c, hd = weight.shape
    config = tuning.chosen_tiles("gated_output_backward", d, min(c, hd), hd, max(c, hd))
    inputs = {"d": d, "o": o, "gate": gate, "dropout": dropout}
    outputs = {"d_o": d_o, "d_gate": d_gate, "update_out": update, "gated_out": gated}
    partials = launch_with_sums(
        _input_gradient_kernel, config, inputs | outputs, c, weight=weight.contiguous(), C=c, HD=hd
    )
    return d_o, d_gate, d if update is None else update, gated, partials


def obstacle(x: Tensor, o: Tensor, gate: Tensor, weight: Tensor, *_: object) -> str | None:
    """Why ``gated_output`` does not take these arguments, or None."""
    return width_obstacle(*weight.shape) or layout_obstacle(x, o.flatten(-2), gate)


def gated_output(
    x: Tensor,
    o: Tensor,
    gate: Tensor,
    weight: Tensor,
    bias: Tensor,
    dropout: Tensor | None,
    destination: Destination | None = None,
) -> Tensor:
    """``reference.gated_output``; the result lies in the memory order of x."""
    return _GatedOutput.apply(x, o.flatten(-2), gate, weight, bias, dropout, destination)  # type: ignore[return-value]
