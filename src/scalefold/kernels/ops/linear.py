"""Layer norm followed by several projections, forward and backward, in Triton.

One kernel forward (the norm stays in registers). Backward: one kernel for the input gradient, the norm's backward and
the bias gradients, which also stores the norm for the weight gradients; products of the library; one sum of all partial
gradients. Nothing but the inputs is saved.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from scalefold.kernels.instructions import widen
from scalefold.kernels.rows import (
    Strides,
    chosen_tiles,
    common_rows,
    dot,
    fused_view,
    layout_obstacle,
    load_normed,
    load_per_row,
    load_tile,
    memory_order,
    norm_input_gradient,
    register_tiles,
    row_limit,
    row_offsets,
    store_column_sums,
    store_tile,
    sum_all,
    weight_blocks,
    width_obstacle,
)
from scalefold.kernels.weight_gradient import Product, weight_partials

WIDEST_BY_POINTER = tl.constexpr(128)  # wider weights come by the copy engine: 76 -> 68 us for 256; 49 -> 52 for 128
NARROW_WIDTH = 16  # narrower outputs (attention biases) go channels first, as their reader wants them
register_tiles(
    "norm_linear_forward",
    {64: (64, 64, 4, 3), 128: (64, 128, 4, 2), 256: (128, 64, 8, 3)},
    *((64, 32, 4, 3), (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 8, 3), (64, 128, 4, 2), (64, 128, 8, 2)),
    *((128, 32, 4, 3), (128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2)),
)
register_tiles(
    "norm_linear_backward",
    {64: (128, 64, 4, 3), 128: (64, 64, 4, 3), 256: (64, 64, 8, 3)},
    *((32, 64, 4, 3), (64, 32, 4, 2), (64, 32, 4, 3), (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 8, 2), (64, 64, 8, 3)),
    *((64, 128, 8, 2), (128, 32, 8, 3), (128, 64, 8, 2), (128, 64, 8, 3)),
)


@triton.jit
def _forward_kernel(
    x, x_strides, norm_weight, norm_bias, weight, bias, out, out_strides, segment_stride,
    narrow_weight, narrow_bias, narrow_out, narrow_strides, row_mask, mask_strides, dims, count, bias_start,
    N: tl.constexpr, WIDTH: tl.constexpr, NARROW: tl.constexpr, C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Tile of rows: layer norm once, then all output columns. weight: [N, C]; out: [N / WIDTH][rows, WIDTH]."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    normed = load_normed(x, norm_weight, norm_bias, rows, dims, x_strides, count, C, IN_REGISTERS=True)
    c = tl.arange(0, C)
    if row_mask is not None:
        keep = load_per_row(row_mask, rows, dims, mask_strides, count)
    if N > 0:
        for first in range(0, N, BLOCK_N):
            n = first + tl.arange(0, BLOCK_N)
            if C > WIDEST_BY_POINTER:
                block = weight.load([first, 0])
            else:
                block = tl.load(weight + n[:, None] * C + c[None, :])
            acc = dot(normed, tl.trans(block), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
            if bias is not None:
                acc += tl.load(bias + n - bias_start, mask=n >= bias_start, other=0.0).to(tl.float32)[None, :]
            if row_mask is not None:
                acc *= keep[:, None]
            segment = first // WIDTH
            columns = n - segment * WIDTH
            store_tile(out + segment * tl.cast(segment_stride, tl.int64), acc, rows, columns, dims, out_strides, count)
    if NARROW > 0:
        n = tl.arange(0, 16)
        block = tl.load(narrow_weight + n[:, None] * C + c[None, :], mask=(n < NARROW)[:, None], other=0.0)
        acc = dot(normed, tl.trans(block), tl.zeros([BLOCK_M, 16], tl.float32))
        if narrow_bias is not None:
            acc += tl.load(narrow_bias + n, mask=n < NARROW, other=0.0).to(tl.float32)[None, :]
        offsets = row_offsets(rows, dims, narrow_strides)[:, None] + n[None, :] * narrow_strides[3]
        tl.store(narrow_out + offsets, acc.to(narrow_out.dtype.element_ty), mask=_inside(rows, count, n, NARROW))


@triton.jit
def _inside(rows, count, n, NARROW: tl.constexpr):
    """Which elements of a narrow tile [rows, n] exist: [rows or 1, n]."""
    inside = (n < NARROW)[None, :]
    if count is not None:
        inside = inside & (rows < count)[:, None]
    return inside


@triton.jit
def _chosen(options, i, COUNT: tl.constexpr):
    """options[i] for an i that only the running program knows."""
    chosen = options[0]
    for other in tl.static_range(1, COUNT):
        chosen = tl.where(i == other, options[other], chosen)
    return chosen


@triton.jit
def _load_gradient(ds, d_strides, i, rows, n, dims, count, COUNT: tl.constexpr, ALIGN: tl.constexpr):
    """Tile of ds[i]: [rows, n]. ALIGN: a power of two that divides all its strides."""
    strides = (
        tl.multiple_of(_chosen(d_strides[0], i, COUNT), ALIGN),
        tl.multiple_of(_chosen(d_strides[1], i, COUNT), ALIGN),
        tl.multiple_of(_chosen(d_strides[2], i, COUNT), ALIGN),
        1,
    )
    return load_tile(tl.multiple_of(_chosen(ds, i, COUNT), 2 * ALIGN), rows, n, dims, strides, count)


@triton.jit
def _add_products(
    acc, ds, d_strides, weights, sums, keep, rows, dims, count,
    FIRST: tl.constexpr, LAST: tl.constexpr, SUMMED: tl.constexpr, COUNT: tl.constexpr, ALIGN: tl.constexpr,
    WIDTH: tl.constexpr, C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """acc + d W of projections FIRST..LAST, in one loop, so that loads run ahead from one to the next.

    SUMMED: column sums of d are stored in ``sums``, from projection FIRST on, and no load runs ahead: the compiler
    gives a tile that feeds a product and something else a ring with one slot too few, and refills the slot that the
    product of the iteration before still reads (triton-lang/triton#6691; fewer stages or more warps only hide it). The
    limit may go once ``benchmarks/measure/compile_targets.py --rings`` is clean without it in every supported release.
    """
    for start in tl.range(FIRST * WIDTH, LAST * WIDTH, BLOCK_N, num_stages=1 if SUMMED else None):
        n = start + tl.arange(0, BLOCK_N)
        i = start // WIDTH
        d = _load_gradient(ds, d_strides, i, rows, n - i * WIDTH, dims, count, COUNT, ALIGN)
        acc = dot(d, tl.load(weights + n[:, None] * C + tl.arange(0, C)[None, :]), acc)
        if SUMMED:
            store_column_sums(sums, d, n - FIRST * WIDTH, keep)
    return acc


@triton.jit
def _input_gradient_kernel(
    x, x_strides, norm_weight, norm_bias, weights, ds, d_strides, narrow_weight, narrow_d, narrow_strides,
    row_mask, mask_strides, through, through_strides, dx, dx_strides, normed, normed_strides, partials, dims, count,
    COUNT: tl.constexpr, BIASED: tl.constexpr, WIDTH: tl.constexpr, NARROW: tl.constexpr, NARROW_BIAS: tl.constexpr,
    C: tl.constexpr, ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Tile of rows: sum over the projections of d W, then the backward of the layer norm, plus the gradient of x that
    came ``through`` a residual connection (None: there was none).

    partials[tile] gets the sums for the norm (2 C), then those for the biases of the last BIASED wide projections and
    of the narrow one.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.arange(0, C)
    acc = tl.zeros([BLOCK_M, C], tl.float32)
    own = partials + tl.program_id(0).to(tl.int64) * (2 * C + BIASED * WIDTH + NARROW_BIAS * NARROW)
    keep = None
    if row_mask is not None:
        keep = load_per_row(row_mask, rows, dims, mask_strides, count)
    if COUNT > BIASED:
        acc = _add_products(
            acc, ds, d_strides, weights, own, keep, rows, dims, count, 0, COUNT - BIASED, False, COUNT, ALIGN, WIDTH, C,
            BLOCK_N,
        )  # fmt: skip
    if BIASED > 0:
        acc = _add_products(
            acc, ds, d_strides, weights, own + 2 * C, keep, rows, dims, count, COUNT - BIASED, COUNT, True, COUNT,
            ALIGN, WIDTH, C, BLOCK_N,
        )  # fmt: skip
    if NARROW > 0:
        n = tl.arange(0, 16)
        offsets = row_offsets(rows, dims, narrow_strides)[:, None] + n[None, :] * narrow_strides[3]
        d = tl.load(narrow_d + offsets, mask=_inside(rows, count, n, NARROW), other=0.0)
        block = tl.load(narrow_weight + n[:, None] * C + c[None, :], mask=(n < NARROW)[:, None], other=0.0)
        acc = dot(d, block, acc)
        if NARROW_BIAS:
            value = widen(d)
            if keep is not None:
                value *= keep[:, None]
            tl.store(own + 2 * C + BIASED * WIDTH + n, tl.sum(value, 0), mask=n < NARROW)
    if keep is not None:
        acc *= keep[:, None]
    gradient = norm_input_gradient(
        acc, x, norm_weight, norm_bias, keep, normed, normed_strides, own, rows, dims, x_strides, count, C
    )
    if through is not None:
        gradient += load_tile(through, rows, c, dims, through_strides, count).to(tl.float32)
    store_tile(dx, gradient, rows, c, dims, dx_strides, count)


def _fused_bias(biases: Sequence[Tensor | None], width: int) -> tuple[Tensor | None, int]:
    """One bias vector for the last projections and the column where it starts; (None, 0) without any."""
    present = [bias for bias in biases if bias is not None]
    if not present:
        return None, 0
    return (present[0] if len(present) == 1 else torch.cat(present)), (len(biases) - len(present)) * width


def _in_order(order: Sequence[int], flat: Tensor, shape: Sequence[int]) -> Tensor:
    """View of flat [rows, w], rows numbered in ``order``, as [*shape, w]."""
    inverse = [list(order).index(d) for d in range(len(order))]
    return flat.view(*[shape[d] for d in order], flat.shape[-1]).permute(*inverse, len(order))


class _NormLinear(torch.autograd.Function):
    """Arguments: x, norm weight and bias, row mask, number of wide weights, weights, biases.

    Wide weights come first, and of these the ones without a bias.
    """

    @staticmethod
    def forward(ctx, x, norm_weight, norm_bias, row_mask, num_wide, *parameters):
        num = len(parameters) // 2
        weights, biases = parameters[:num], parameters[num:]
        ctx.save_for_backward(x, norm_weight, norm_bias, row_mask, *weights)
        ctx.num_wide, ctx.has_bias = num_wide, [bias is not None for bias in biases]
        ctx.set_materialize_grads(False)  # without a residual connection x gets no gradient but the projections' own
        return x.view_as(x), *_forward(x, norm_weight, norm_bias, row_mask, num_wide, weights, biases)

    @staticmethod
    @once_differentiable
    def backward(ctx, through, *ds):
        x, norm_weight, norm_bias, row_mask, *weights = ctx.saved_tensors
        ds = [x.new_zeros(*x.shape[:-1], w.shape[0]) if d is None else d for d, w in zip(ds, weights, strict=True)]
        wide = [d if d.stride(-1) == 1 else d.contiguous() for d in ds[: ctx.num_wide]]
        ds = [*wide, *(_in_rows_of(x, d) for d in ds[ctx.num_wide :])]
        c, dtype = x.shape[-1], norm_weight.dtype
        dx, normed, partials = input_gradient(x, norm_weight, norm_bias, row_mask, weights, ds, ctx.has_bias, through)
        widths = [weight.shape[0] if has else 0 for weight, has in zip(weights, ctx.has_bias, strict=True)]
        sums, *flat = sum_all([partials, *weight_partials([Product(d, normed) for d in ds])], dtype)
        norm_weight_sum, norm_bias_sum, *bias_sums = sums.split([c, c, *widths])
        biases = [total if has else None for total, has in zip(bias_sums, ctx.has_bias, strict=True)]
        d_weights = [part.view_as(weight) for part, weight in zip(flat, weights, strict=True)]
        return dx, norm_weight_sum, norm_bias_sum, None, None, *d_weights, *biases


def _forward(x, norm_weight, norm_bias, row_mask, num_wide, weights, biases) -> tuple[Tensor, ...]:
    c, count = x.shape[-1], x.shape[:-1].numel()
    wide, narrow = weights[:num_wide], weights[num_wide:]
    width = wide[0].shape[0] if wide else NARROW_WIDTH
    config = chosen_tiles("norm_linear_forward", x, num_wide * width, width)
    order = memory_order(x)
    out = x.new_empty(num_wide, count, width)
    outs = [_in_order(order, part, x.shape) for part in out.unbind(0)]
    narrow_out = None
    if narrow:
        narrow_out = x.new_empty(x.shape[0], narrow[0].shape[0], *x.shape[1:-1]).movedim(1, -1)
    dims, count, strides = common_rows(
        x,
        outs[0] if wide else x,
        x if narrow_out is None else narrow_out,
        x if row_mask is None else row_mask[..., None],
    )
    bias, bias_start = _fused_bias(biases[:num_wide], width)
    weight = fused_view(wide) if wide else None
    if weight is not None and c > WIDEST_BY_POINTER.value:
        weight = weight_blocks(weight, (config["BLOCK_N"], c))
    _forward_kernel[(triton.cdiv(count, config["BLOCK_M"]),)](
        x, strides[0], norm_weight, norm_bias, weight, bias, out, strides[1],
        count * width, narrow[0] if narrow else None, biases[num_wide] if narrow else None, narrow_out, strides[2],
        row_mask, strides[3], dims, row_limit(count, config), bias_start, N=num_wide * width, WIDTH=width,
        NARROW=narrow[0].shape[0] if narrow else 0, C=c, **config,
    )  # fmt: skip
    return tuple(outs if narrow_out is None else [*outs, narrow_out])


def input_gradient(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    row_mask: Tensor | None,
    weights: Sequence[Tensor],
    ds: Sequence[Tensor],
    has_bias: Sequence[bool],
    through: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward of x: [*, c] -> layer norm (times row_mask: [*]) -> projections, for the gradients ds of these.

    Weights: equally wide ones [w, c], those without a bias first, then at most one narrower than 16, each dense; ds:
    [*, w], dense along w. Returns the gradient of x plus ``through``, in the memory order of x; the (masked) layer
    norm, rows in that order; and partial sums [tiles, 2 c + widths] for ``rows.sum_all``: gradients of the norm's
    weight and bias, then of each bias that there is.
    """
    c, num_wide = x.shape[-1], sum(weight.shape[0] >= NARROW_WIDTH for weight in weights)
    wide, narrow = tuple(weights[:num_wide]), weights[num_wide:]
    dx, normed = torch.empty_like(x), _in_order(memory_order(x), x.new_empty(x.shape[:-1].numel(), c), x.shape)
    narrow_d = ds[num_wide] if narrow else None
    width = wide[0].shape[0] if wide else NARROW_WIDTH
    config = chosen_tiles("norm_linear_backward", x, num_wide * width, width)
    mask_view = x if row_mask is None else row_mask[..., None]
    views = (x, dx, x if narrow_d is None else narrow_d, mask_view, normed, x if through is None else through)
    dims, count, strides = common_rows(*views, *ds[:num_wide])
    tiles = triton.cdiv(count, config["BLOCK_M"])
    num_sums = sum(weight.shape[0] for weight, has in zip(weights, has_bias, strict=True) if has)
    partials = torch.empty(tiles, 2 * c + num_sums, dtype=torch.float32, device=x.device)
    _input_gradient_kernel[(tiles,)](
        x, strides[0], norm_weight, norm_bias, fused_view(wide) if wide else None, tuple(ds[:num_wide]),
        tuple(zip(*strides[6:], strict=True))[:3], narrow[0] if narrow else None, narrow_d, strides[2], row_mask,
        strides[3], through, strides[5], dx, strides[1], normed, strides[4], partials, dims, row_limit(count, config),
        COUNT=num_wide, BIASED=sum(has_bias[:num_wide]), WIDTH=width, NARROW=narrow[0].shape[0] if narrow else 0,
        NARROW_BIAS=bool(narrow) and has_bias[-1], C=c, ALIGN=_alignment(ds[:num_wide], strides[6:]), **config,
    )  # fmt: skip
    return dx, normed, partials


def _alignment(tensors: Sequence[Tensor], strides: Sequence[Strides]) -> int:
    """8 if all rows start at multiples of 8 elements and 16 bytes, else 1."""
    even = all(stride % 8 == 0 for levels in strides for stride in levels[:3])
    return 8 if even and all(tensor.data_ptr() % 16 == 0 for tensor in tensors) else 1


def _in_rows_of(x: Tensor, d: Tensor) -> Tensor:
    """d: [*, h] with its rows in the memory order of x: [*, c]; a copy, channels first, if they lie otherwise."""
    order = memory_order(x)
    if memory_order(d) == order:
        return d
    inverse = [order.index(n) + 1 for n in range(len(order))]
    return d.permute(-1, *order).contiguous().permute(*inverse, 0)


def obstacle(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> str | None:
    """Why ``layer_norm_linear`` does not take these arguments, or None."""
    wide = [weight.shape[0] for weight in weights if weight.shape[0] >= NARROW_WIDTH]
    if len(set(wide)) > 1 or len(weights) - len(wide) > 1:
        return f"widths {', '.join(str(weight.shape[0]) for weight in weights)} in one call"
    if not x.numel():
        return "nothing to project"
    return width_obstacle(x.shape[-1], *wide) or layout_obstacle(x)


def layer_norm_linear(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """``reference.layer_norm_linear`` for equally wide weights and at most one narrower than 16.

    Each wide output is dense in the memory order of x; the narrow one is stored channels first in the order of its
    dimensions, as attention reads its bias: for a transposed x, along memory. x comes back as a view.
    """
    return _ordered_projections(x, norm_weight, norm_bias, None, weights, biases)


def masked_projections(
    x: Tensor,
    row_mask: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
) -> tuple[Tensor, ...]:
    """The outputs of ``layer_norm_linear``, without x, whose rows are multiplied by row_mask: [*]."""
    return _ordered_projections(x, norm_weight, norm_bias, row_mask, weights, biases)[1:]


def _ordered_projections(x, norm_weight, norm_bias, row_mask, weights, biases) -> tuple[Tensor, ...]:
    order = sorted(range(len(weights)), key=lambda n: (weights[n].shape[0] < NARROW_WIDTH, biases[n] is not None))
    num_wide = sum(weight.shape[0] >= NARROW_WIDTH for weight in weights)
    ordered = [weights[n] for n in order] + [biases[n] for n in order]
    through, *outs = _NormLinear.apply(x, norm_weight, norm_bias, row_mask, num_wide, *ordered)
    return through, *(outs[order.index(n)] for n in range(len(weights)))
