"""Layer norm followed by several projections, forward and backward, in Triton.

One kernel forward (the norm stays in registers; on compute capability 9.0 one of ``kernels.hopper`` takes its place for
a triangle's attention, where it is faster). Backward: one kernel for the input gradient, the norm's backward and
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

from scalefold.kernels import tuning
from scalefold.kernels.around import aside
from scalefold.kernels.hopper import gated_attention as hopper
from scalefold.kernels.hopper.choice import chosen
from scalefold.kernels.instructions import complete, to_fp32
from scalefold.kernels.ops.elementwise import dense, in_order, in_rows_of
from scalefold.kernels.rows import (
    SECTOR,
    Affine,
    Norm,
    View,
    dot,
    fused_view,
    launch,
    launch_with_sums,
    layout_obstacle,
    lies_across,
    load_normed,
    load_per_row,
    load_tile,
    memory_order,
    norm_input_gradient,
    row_offsets,
    store_column_sums,
    store_tile,
    sum_all,
    tile_offsets,
    tile_rows,
    weight_blocks,
    width_obstacle,
)
from scalefold.kernels.weight_gradient import Product, weight_partials

WIDEST_BY_POINTER = 128  # wider weights come by the copy engine; narrower ones lose by it
NARROW_WIDTH = 16  # narrower outputs (attention biases) go channels first, as their reader wants them
tuning.register_tiles("norm_linear_forward", {64: (64, 64, 4, 3), 128: (64, 128, 4, 2), 256: (128, 64, 8, 3)})
tuning.register_parts("norm_linear_columns")
tuning.register_tiles("norm_linear_backward", {64: (128, 64, 4, 3), 128: (64, 64, 4, 3), 256: (64, 64, 8, 3)})


@triton.jit
def _forward_kernel(
    x, norm, blocks, linear, out, segment_stride, narrow, narrow_out, row_mask, extent, bias_start,
    N: tl.constexpr, WIDTH: tl.constexpr, NARROW: tl.constexpr, C: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    """Tile of rows: layer norm once, then a part of the output columns. Weight: [N, C]; out: [N / WIDTH][rows, WIDTH].

    Each of PARTS programs makes the norm again, all of them from the cache; the last one has the narrow output.
    ``blocks``: the weight for the copy engine, instead of ``linear.weight``. ACROSS: tiles lie so, and the narrow
    output is stored in whole sectors.
    """
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
            start = out.pointer + segment * tl.cast(segment_stride, tl.int64)
            store_tile(View(start, out.strides), acc, rows, n - segment * WIDTH, extent)
    if NARROW > 0 and (PARTS == 1 or tl.program_id(1) == PARTS - 1):
        n = tl.arange(0, 16)
        block = tl.load(narrow.weight + n[:, None] * C + c[None, :], mask=(n < NARROW)[:, None], other=0.0)
        acc = dot(normed, tl.trans(block), tl.zeros([BLOCK_M, 16], tl.float32))
        if narrow.bias is not None:
            acc += tl.load(narrow.bias + n, mask=n < NARROW, other=0.0).to(tl.float32)[None, :]
        value = acc.to(narrow_out.pointer.dtype.element_ty)
        if ACROSS:
            offsets = n[:, None] * narrow_out.strides[3] + row_offsets(narrow_out, rows, extent)[None, :]
            offsets = tl.max_contiguous(tl.multiple_of(offsets, (1, SECTOR)), (1, SECTOR))
            tl.store(narrow_out.pointer + offsets, tl.trans(value), mask=(n < NARROW)[:, None])
        else:
            pointers = narrow_out.pointer + tile_offsets(narrow_out, rows, n, extent)
            tl.store(pointers, value, mask=_inside(rows, extent, n, NARROW))


@triton.jit
def _inside(rows, extent, n, NARROW: tl.constexpr):
    """Which elements of a narrow tile [rows, n] exist: [rows or 1, n]."""
    inside = (n < NARROW)[None, :]
    if extent.limit is not None:
        inside = inside & (rows < extent.limit)[:, None]
    return inside


@triton.jit
def _chosen(views, i, COUNT: tl.constexpr, ALIGN: tl.constexpr):
    """views[i] for an i that only the running program knows. ALIGN: a power of two that divides all strides."""
    pointer = views[0].pointer
    outer, middle, inner = views[0].strides[0], views[0].strides[1], views[0].strides[2]
    for other in tl.static_range(1, COUNT):
        outer = tl.where(i == other, views[other].strides[0], outer)
        middle = tl.where(i == other, views[other].strides[1], middle)
        inner = tl.where(i == other, views[other].strides[2], inner)
        pointer = tl.where(i == other, views[other].pointer, pointer)
    strides = (tl.multiple_of(outer, ALIGN), tl.multiple_of(middle, ALIGN), tl.multiple_of(inner, ALIGN), 1)
    return View(tl.multiple_of(pointer, 2 * ALIGN), strides)


@triton.jit
def _add_products(
    acc, ds, weights, sums, keep, rows, extent,
    FIRST: tl.constexpr, LAST: tl.constexpr, SUMMED: tl.constexpr, COUNT: tl.constexpr, ALIGN: tl.constexpr,
    WIDTH: tl.constexpr, C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """acc + d W of projections FIRST..LAST, in one loop, so that loads run ahead from one to the next.

    SUMMED: column sums of d are stored in ``sums``, from projection FIRST on, once the product is complete: the
    compiler gives a tile that feeds a product and something else a ring with one slot too few, and refills the slot
    that an unfinished product still reads (triton-lang/triton#6691; fewer stages or more warps only hide it).
    ``complete`` may go once ``benchmarks/measure/compile_targets.py --rings`` is clean without it in every supported
    release.
    """
    for start in range(FIRST * WIDTH, LAST * WIDTH, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        i = start // WIDTH
        d = load_tile(_chosen(ds, i, COUNT, ALIGN), rows, n - i * WIDTH, extent)
        acc = dot(d, tl.load(weights + n[:, None] * C + tl.arange(0, C)[None, :]), acc)
        if SUMMED:
            acc = complete(acc)
            store_column_sums(sums, d, n - FIRST * WIDTH, keep)
    return acc


@triton.jit
def _input_gradient_kernel(
    x, norm, weights, ds, narrow_weight, narrow_d, row_mask, through, dx, normed, partials, extent,
    COUNT: tl.constexpr, BIASED: tl.constexpr, WIDTH: tl.constexpr, NARROW: tl.constexpr, NARROW_BIAS: tl.constexpr,
    C: tl.constexpr, ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Tile of rows: sum over the projections of d W, then the backward of the layer norm, plus the gradient of x that
    came ``through`` a residual connection (None: there was none).

    partials[tile] gets the sums for the norm (2 C), then those for the biases of the last BIASED wide projections and
    of the narrow one, and where nothing is as wide as to need the norm in memory (normed: None), the product that is
    the gradient of the narrow weight.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.arange(0, C)
    acc = tl.zeros([BLOCK_M, C], tl.float32)
    biases: tl.constexpr = BIASED * WIDTH + NARROW_BIAS * NARROW
    sums: tl.constexpr = 2 * C + biases + (NARROW * C if normed is None else 0)
    own = partials + tl.program_id(0).to(tl.int64) * sums
    keep = None
    if row_mask is not None:
        keep = load_per_row(row_mask, rows, extent)
    if COUNT > BIASED:
        acc = _add_products(
            acc, ds, weights, own, keep, rows, extent, 0, COUNT - BIASED, False, COUNT, ALIGN, WIDTH, C, BLOCK_N
        )
    if BIASED > 0:
        acc = _add_products(
            acc, ds, weights, own + 2 * C, keep, rows, extent, COUNT - BIASED, COUNT, True, COUNT, ALIGN, WIDTH, C,
            BLOCK_N,
        )  # fmt: skip
    if NARROW > 0:
        n = tl.arange(0, 16)
        pointers = narrow_d.pointer + tile_offsets(narrow_d, rows, n, extent)
        d = tl.load(pointers, mask=_inside(rows, extent, n, NARROW), other=0.0)
        block = tl.load(narrow_weight + n[:, None] * C + c[None, :], mask=(n < NARROW)[:, None], other=0.0)
        acc = dot(d, block, acc)
        if NARROW_BIAS:
            value = to_fp32(d)
            if keep is not None:
                value *= keep[:, None]
            tl.store(own + 2 * C + BIASED * WIDTH + n, tl.sum(value, 0), mask=n < NARROW)
    if keep is not None:
        acc *= keep[:, None]
    gradient, normed_tile = norm_input_gradient(acc, x, norm, keep, normed, own, rows, extent, C)
    if normed is None:
        product = dot(tl.trans(d), normed_tile, tl.zeros([16, C], tl.float32))
        tl.store(own + 2 * C + biases + n[:, None] * C + c[None, :], product, mask=(n < NARROW)[:, None])
    if through is not None:
        gradient += load_tile(through, rows, c, extent).to(tl.float32)
    store_tile(dx, gradient, rows, c, extent)


def _fused_bias(biases: Sequence[Tensor | None], width: int) -> tuple[Tensor | None, int]:
    """One bias vector for the last projections and the column where it starts; (None, 0) without any."""
    present = [bias for bias in biases if bias is not None]
    if not present:
        return None, 0
    return fused_view([bias[:, None] for bias in present])[:, 0], (len(biases) - len(present)) * width


class _NormLinear(torch.autograd.Function):
    """Arguments: x, norm weight and bias, row mask, number of wide weights, weights, biases.

    Wide weights come first, and of these the ones without a bias.
    """

    @staticmethod
    def forward(ctx, x, norm_weight, norm_bias, row_mask, num_wide, *parameters):
        num = len(parameters) // 2
        weights, biases = parameters[:num], parameters[num:]
        ctx.save_for_backward(x, norm_weight, norm_bias, row_mask, *parameters)
        ctx.num_wide, ctx.has_bias = num_wide, [bias is not None for bias in biases]
        ctx.set_materialize_grads(False)  # without a residual connection x gets no gradient but the projections' own
        return x.view_as(x), *_forward(x, norm_weight, norm_bias, row_mask, num_wide, weights, biases)

    @staticmethod
    @once_differentiable
    def backward(ctx, through, *ds):
        x, norm_weight, norm_bias, row_mask, *parameters = ctx.saved_tensors
        weights = parameters[: len(parameters) // 2]
        ds = [x.new_zeros(*x.shape[:-1], w.shape[0]) if d is None else d for d, w in zip(ds, weights, strict=True)]
        wide = [d if d.stride(-1) == 1 else dense(d) for d in ds[: ctx.num_wide]]
        ds = [*wide, *(in_rows_of(x, d) for d in ds[ctx.num_wide :])]
        c, dtype = x.shape[-1], norm_weight.dtype
        dx, normed, partials = input_gradient(x, norm_weight, norm_bias, row_mask, weights, ds, ctx.has_bias, through)
        widths = [weight.shape[0] if has else 0 for weight, has in zip(weights, ctx.has_bias, strict=True)]

        def gradients() -> list[Tensor | None]:
            products = [] if normed is None else weight_partials([Product(d, normed) for d in ds])
            sums, *flat = sum_all([partials, *products], dtype)
            *d_norm, d_biases, d_narrow = sums.tensor_split([c, 2 * c, 2 * c + sum(widths)])
            flat = flat or [d_narrow]
            biases = [total if has else None for total, has in zip(d_biases.split(widths), ctx.has_bias, strict=True)]
            return [*d_norm, *(part.view_as(weight) for part, weight in zip(flat, weights, strict=True)), *biases]

        given = [norm_weight, norm_bias, *parameters]
        d_norm_weight, d_norm_bias, *own = aside.gradients(given, [partials, normed, *ds], gradients)
        return dx, d_norm_weight, d_norm_bias, None, None, *own


def _forward(x, norm_weight, norm_bias, row_mask, num_wide, weights, biases) -> tuple[Tensor, ...]:
    c, count = x.shape[-1], x.shape[:-1].numel()
    wide, narrow = weights[:num_wide], weights[num_wide:]
    width = wide[0].shape[0] if wide else NARROW_WIDTH
    order, norm = memory_order(x), Norm(norm_weight, norm_bias)
    out = x.new_empty(num_wide, count, width)
    outs = [in_order(order, part, x.shape) for part in out.unbind(0)]
    narrow_out = None
    if narrow:
        narrow_out = x.new_empty(x.shape[0], narrow[0].shape[0], *x.shape[1:-1]).movedim(1, -1)
    results = tuple(outs if narrow_out is None else [*outs, narrow_out])
    bias, bias_start = _fused_bias(biases[:num_wide], width)
    weight, blocks = fused_view(wide) if wide else None, None
    if chosen("projections", hopper.projections_obstacle(x, row_mask, weights, biases)):
        hopper.project(x, norm, Affine(weight, bias), narrow[0] if narrow else None, out, narrow_out)
        return results
    config = tuning.chosen_parts("norm_linear_columns", "norm_linear_forward", x, num_wide * width, width)
    tensors = {
        "x": x,
        "out": outs[0] if wide else None,
        "narrow_out": narrow_out,
        "row_mask": None if row_mask is None else row_mask[..., None],
    }
    if weight is not None and c > WIDEST_BY_POINTER:
        weight, blocks = None, weight_blocks(weight, (config["BLOCK_N"], c))
    launch(
        _forward_kernel, config, tensors, norm=norm, linear=Affine(weight, bias),
        blocks=blocks, narrow=Affine(narrow[0], biases[num_wide]) if narrow else None, segment_stride=count * width,
        bias_start=bias_start, N=num_wide * width, WIDTH=width, NARROW=narrow[0].shape[0] if narrow else 0, C=c,
        ACROSS=narrow_out is not None and lies_across(x, narrow_out, config["BLOCK_M"]),
    )  # fmt: skip
    return results


def input_gradient(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    row_mask: Tensor | None,
    weights: Sequence[Tensor],
    ds: Sequence[Tensor],
    has_bias: Sequence[bool],
    through: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Backward of x: [*, c] -> layer norm (times row_mask: [*]) -> projections, for the gradients ds of these.

    Weights: equally wide ones [w, c], those without a bias first, then at most one narrower than 16, each dense; ds:
    [*, w], dense along w. Returns the gradient of x plus ``through``, in the memory order of x; the (masked) layer
    norm, rows in that order; and partial sums [tiles, 2 c + widths] for ``rows.sum_all``: gradients of the norm's
    weight and bias, then of each bias that there is. Without a wide weight there is no norm, and the gradient of the
    narrow weight, w * c, is the last of the sums.
    """
    c, num_wide = x.shape[-1], sum(weight.shape[0] >= NARROW_WIDTH for weight in weights)
    wide, narrow = tuple(weights[:num_wide]), weights[num_wide:]
    dx, normed = torch.empty_like(x), None
    if wide:
        normed = in_order(memory_order(x), x.new_empty(x.shape[:-1].numel(), c), x.shape)
    narrow_d = ds[num_wide] if narrow else None
    width = wide[0].shape[0] if wide else NARROW_WIDTH
    config = tuning.chosen_tiles("norm_linear_backward", x, num_wide * width, width)
    tensors = {
        "x": x,
        "dx": dx,
        "narrow_d": narrow_d,
        "row_mask": None if row_mask is None else row_mask[..., None],
        "normed": normed,
        "through": through,
        "ds": tuple(ds[:num_wide]),
    }
    num_sums = sum(weight.shape[0] for weight, has in zip(weights, has_bias, strict=True) if has)
    num_sums += 0 if wide else narrow[0].numel()
    partials = launch_with_sums(
        _input_gradient_kernel, config, tensors, 2 * c + num_sums, norm=Norm(norm_weight, norm_bias),
        weights=fused_view(wide) if wide else None, narrow_weight=narrow[0] if narrow else None, COUNT=num_wide,
        BIASED=sum(has_bias[:num_wide]), WIDTH=width, NARROW=narrow[0].shape[0] if narrow else 0,
        NARROW_BIAS=bool(narrow) and has_bias[-1], C=c, ALIGN=_alignment(ds[:num_wide]),
    )  # fmt: skip
    return dx, normed, partials


def _alignment(tensors: Sequence[Tensor]) -> int:
    """8 if all rows start at multiples of 8 elements and 16 bytes, else 1."""
    steps = [s for t in tensors for s, size in zip(t.stride()[:-1], t.shape[:-1], strict=True) if size != 1]
    even = all(step % 8 == 0 for step in steps)
    return 8 if even and all(tensor.data_ptr() % 16 == 0 for tensor in tensors) else 1


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
    """``layer_norm_linear`` whose projections' rows are multiplied by row_mask: [*]."""
    return _ordered_projections(x, norm_weight, norm_bias, row_mask, weights, biases)


def _ordered_projections(x, norm_weight, norm_bias, row_mask, weights, biases) -> tuple[Tensor, ...]:
    order = sorted(range(len(weights)), key=lambda n: (weights[n].shape[0] < NARROW_WIDTH, biases[n] is not None))
    num_wide = sum(weight.shape[0] >= NARROW_WIDTH for weight in weights)
    ordered = [weights[n] for n in order] + [biases[n] for n in order]
    through, *outs = _NormLinear.apply(x, norm_weight, norm_bias, row_mask, num_wide, *ordered)
    return through, *(outs[order.index(n)] for n in range(len(weights)))
