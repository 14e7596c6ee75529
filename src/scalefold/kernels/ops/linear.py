"""Layer norm followed by several projections, forward and backward, in Triton.

One kernel forward (the norm stays in registers; on compute capability 9.0 one of ``kernels.hopper`` takes its place for
a triangle's attention, where it is faster). Backward: ``gradients.input_gradient``, which makes the norm again for the
weight gradients; products of the library; one sum of all partial gradients. Nothing but the inputs is saved.
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
from scalefold.kernels.gradients.input_gradient import NARROW_WIDTH, input_gradient, inside_narrow
from scalefold.kernels.gradients.weight_gradient import Product, weight_partials
from scalefold.kernels.hopper import gated_attention as hopper
from scalefold.kernels.hopper.choice import chosen
from scalefold.kernels.instructions import program, wait_for_predecessors
from scalefold.kernels.ops.elementwise import dense, in_order, in_rows_of
from scalefold.kernels.owners import store_tile_everywhere
from scalefold.kernels.rows import (
    SECTOR,
    Affine,
    Norm,
    View,
    dot,
    fused_view,
    launch,
    layout_obstacle,
    lies_across,
    load_normed,
    load_per_row,
    memory_order,
    row_offsets,
    store_tile,
    sum_all,
    tile_offsets,
    tile_rows,
    weight_blocks,
    width_obstacle,
)

WIDEST_BY_POINTER = 128  # wider weights come by the copy engine; narrower ones lose by it
tuning.register_tiles("norm_linear_forward", {64: (64, 64, 4, 3), 128: (64, 128, 4, 2), 256: (128, 64, 8, 3)})
tuning.register_parts("norm_linear_columns")


@program
@triton.jit
def _forward_kernel(
    x, norm, blocks, linear, out, segment_stride, last_outs, narrow, narrow_outs, row_mask, extent, bias_start,
    N: tl.constexpr, WIDTH: tl.constexpr, NARROW: tl.constexpr, C: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    """Tile of rows: layer norm once, then a part of the output columns. Weight: [N, C]; out: [N / WIDTH][rows, WIDTH].

    Each of PARTS programs makes the norm again, all of them from the cache; the last one has the narrow output.
    ``blocks``: the weight for the copy engine, instead of ``linear.weight``. ACROSS: tiles lie so, and the narrow
    output is stored in whole sectors. Of the narrow output, and of the last wide one unless None, all views get it.
    """
    wait_for_predecessors()
    rows = tile_rows(extent, BLOCK_M, ACROSS)
    normed = load_normed(x, norm, rows, extent, C, IN_REGISTERS=True)
    c = tl.arange(0, C)
    if row_mask is not None:
        keep = load_per_row(row_mask, rows, extent)
    if N > 0:
        for first in range(0, N // PARTS, BLOCK_N):
            if PARTS > 1:
                first += tl.program_id(1) * (N // PARTS)
            n = first + tl.arange(0, BLOCK_N)
            if blocks is not None:
                block = blocks.load([first, 0])
            else:
                block = tl.load(linear.weight + n[:, None] * C + c[None, :])
            acc = dot(normed, tl.trans(block), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
            if linear.bias is not None:
                bias = tl.load(linear.bias + n - bias_start, mask=n >= bias_start, other=0.0)
                acc += bias.to(tl.float32)[None, :]
            if row_mask is not None:
                acc *= keep[:, None]
            segment = first // WIDTH
            if last_outs is None or first < N - WIDTH:
                start = out.pointer + segment * tl.cast(segment_stride, tl.int64)
                store_tile(View(start, out.strides), acc, rows, n - segment * WIDTH, extent)
            else:  # columns anew: the compiler forgets in this branch that those from before are neighbours
                columns = first - (N - WIDTH) + tl.arange(0, BLOCK_N)
                store_tile_everywhere(last_outs, acc, rows, columns, extent)
    if NARROW > 0 and (PARTS == 1 or tl.program_id(1) == PARTS - 1):
        n = tl.arange(0, 16)
        block = tl.load(narrow.weight + n[:, None] * C + c[None, :], mask=(n < NARROW)[:, None], other=0.0)
        acc = dot(normed, tl.trans(block), tl.zeros([BLOCK_M, 16], tl.float32))
        if narrow.bias is not None:
            acc += tl.load(narrow.bias + n, mask=n < NARROW, other=0.0).to(tl.float32)[None, :]
        for place in tl.static_range(len(narrow_outs)):
            _store_narrow(narrow_outs[place], acc, rows, n, extent, NARROW, ACROSS)


@triton.jit
def _store_narrow(out, acc, rows, n, extent, NARROW: tl.constexpr, ACROSS: tl.constexpr):
    value = acc.to(out.pointer.dtype.element_ty)
    if ACROSS:
        offsets = n[:, None] * out.strides[3] + row_offsets(out, rows, extent)[None, :]
        offsets = tl.max_contiguous(tl.multiple_of(offsets, (1, SECTOR)), (1, SECTOR))
        tl.store(out.pointer + offsets, tl.trans(value), mask=(n < NARROW)[:, None])
    else:
        pointers = out.pointer + tile_offsets(out, rows, n, extent)
        tl.store(pointers, value, mask=inside_narrow(rows, extent, n, NARROW))


def _fused_bias(biases: Sequence[Tensor | None], width: int) -> tuple[Tensor | None, int]:
    """One bias vector for the last projections and the column where it starts; (None, 0) without any."""
    present = [bias for bias in biases if bias is not None]
    if not present:
        return None, 0
    return fused_view([bias[:, None] for bias in present])[:, 0], (len(biases) - len(present)) * width


class _NormLinear(torch.autograd.Function):
    """Arguments: x, norm weight and bias, row mask, number of wide weights, destination of the last projection,
    weights, biases.

    Wide weights come first, and of these the ones without a bias.
    """

    @staticmethod
    def forward(ctx, x, norm_weight, norm_bias, row_mask, num_wide, destination, *parameters):
        num = len(parameters) // 2
        weights, biases = parameters[:num], parameters[num:]
        ctx.save_for_backward(x, norm_weight, norm_bias, row_mask, *parameters)
        ctx.num_wide, ctx.has_bias = num_wide, [bias is not None for bias in biases]
        ctx.set_materialize_grads(False)  # without a residual connection x gets no gradient but the projections' own
        norm = Norm(norm_weight, norm_bias)
        return x.view_as(x), *_forward(x, norm, row_mask, num_wide, weights, biases, destination)

    @staticmethod
    @once_differentiable
    def backward(ctx, through, *ds):
        x, norm_weight, norm_bias, row_mask, *parameters = ctx.saved_tensors
        weights = parameters[: len(parameters) // 2]
        ds = [x.new_zeros(*x.shape[:-1], w.shape[0]) if d is None else d for d, w in zip(ds, weights, strict=True)]
        wide = [d if d.stride(-1) == 1 else dense(d) for d in ds[: ctx.num_wide]]
        ds = [*wide, *(in_rows_of(x, d) for d in ds[ctx.num_wide :])]
        dtype = norm_weight.dtype
        dx, normed, sums = input_gradient(x, norm_weight, norm_bias, row_mask, weights, ds, ctx.has_bias, through)
        widths = [weight.shape[0] if has else 0 for weight, has in zip(weights, ctx.has_bias, strict=True)]

        def gradients() -> list[Tensor | None]:
            products = [] if normed is None else weight_partials([Product(d, normed) for d in ds])
            d_norm, d_own, *flat = sum_all([*sums, *products], dtype)
            d_biases, d_narrow = d_own.tensor_split([sum(widths)])
            d_weights = [part.view_as(weight) for part, weight in zip(flat or [d_narrow], weights, strict=True)]
            biases = [total if has else None for total, has in zip(d_biases.split(widths), ctx.has_bias, strict=True)]
            return [*d_norm.chunk(2), *d_weights, *biases]

        given = [norm_weight, norm_bias, *parameters]
        d_norm_weight, d_norm_bias, *own = aside.gradients(given, [*sums, normed, *ds], gradients)
        return dx, d_norm_weight, d_norm_bias, None, None, None, *own


def _forward(x, norm, row_mask, num_wide, weights, biases, destination) -> tuple[Tensor, ...]:
    c, count = x.shape[-1], x.shape[:-1].numel()
    wide, narrow = weights[:num_wide], weights[num_wide:]
    width = wide[0].shape[0] if wide else NARROW_WIDTH
    order, ahead = memory_order(x), None if destination is None else tuple(destination.parts)
    of_wide = ahead is not None and not narrow  # its destination
    out = x.new_empty(num_wide - int(of_wide), count, width)
    results = [in_order(order, part, x.shape) for part in out.unbind(0)]
    narrow_outs = ahead if narrow else None
    if narrow and narrow_outs is None:
        narrow_outs = (x.new_empty(x.shape[0], narrow[0].shape[0], *x.shape[1:-1]).movedim(1, -1),)
        results += narrow_outs
    if destination is not None:
        destination.written = True
        results.append(x.new_empty(()).expand(*x.shape[:-1], weights[-1].shape[0]))
    bias, bias_start = _fused_bias(biases[:num_wide], width)
    weight, blocks = fused_view(wide) if wide else None, None
    if not of_wide and chosen("projections", hopper.projections_obstacle(x, row_mask, weights, biases)):
        hopper.project(x, norm, Affine(weight, bias), narrow[0] if narrow else None, out, narrow_outs)
        return tuple(results)
    config = tuning.chosen_parts("norm_linear_columns", "norm_linear_forward", x, num_wide * width, width)
    tensors = {
        "x": x,
        "out": results[0] if wide else None,
        "last_outs": None if narrow else ahead,
        "narrow_outs": narrow_outs,
        "row_mask": None if row_mask is None else row_mask[..., None],
    }
    if weight is not None and c > WIDEST_BY_POINTER:
        weight, blocks = None, weight_blocks(weight, (config["BLOCK_N"], c))
    launch(
        _forward_kernel, config, tensors, norm=norm, linear=Affine(weight, bias),
        blocks=blocks, narrow=Affine(narrow[0], biases[num_wide]) if narrow else None, segment_stride=count * width,
        bias_start=bias_start, N=num_wide * width, WIDTH=width, NARROW=narrow[0].shape[0] if narrow else 0, C=c,
        ACROSS=narrow_outs is not None and lies_across(x, narrow_outs[0], config["BLOCK_M"]),
    )  # fmt: skip
    return tuple(results)


def obstacle(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    *_: object,
) -> str | None:
    """Why ``layer_norm_linear`` does not take these arguments, or None."""
    wide = [weight.shape[0] for weight in weights if weight.shape[0] >= NARROW_WIDTH]
    if len(set(wide)) > 1 or len(weights) - len(wide) > 1:
        return f"widths {', '.join(str(weight.shape[0]) for weight in weights)} in one call"
    if not x.numel():
        return "nothing to project"
    return width_obstacle(x.shape[-1], *wide) or layout_obstacle(x)


def layer_norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    destination: Destination | None = None,
) -> tuple[Tensor, ...]:
    """``reference.layer_norm_linear`` for equally wide weights and at most one narrower than 16.

    Each wide output is dense in the memory order of x; the narrow one is stored channels first in the order of its
    dimensions, as attention reads its bias: for a transposed x, along memory. x comes back as a view.
    """
    return _ordered_projections(x, norm_weight, norm_bias, None, weights, biases, destination)


def masked_projections(
    x: Tensor,
    row_mask: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    destination: Destination | None = None,
) -> tuple[Tensor, ...]:
    """``layer_norm_linear`` whose projections' rows are multiplied by row_mask: [*]."""
    return _ordered_projections(x, norm_weight, norm_bias, row_mask, weights, biases, destination)


def _ordered_projections(x, norm_weight, norm_bias, row_mask, weights, biases, destination) -> tuple[Tensor, ...]:
    order = sorted(range(len(weights)), key=lambda n: (weights[n].shape[0] < NARROW_WIDTH, biases[n] is not None))
    num_wide = sum(weight.shape[0] >= NARROW_WIDTH for weight in weights)
    ordered = [weights[n] for n in order] + [biases[n] for n in order]
    ahead = destination if order[-1] == len(weights) - 1 else None  # only the last one is written elsewhere
    through, *outs = _NormLinear.apply(x, norm_weight, norm_bias, row_mask, num_wide, ahead, *ordered)
    return through, *(outs[order.index(n)] for n in range(len(weights)))
