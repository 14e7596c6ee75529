"""Input gradient of a layer norm that several projections follow, with the gradients of the norm and of their biases.

One kernel takes tiles of whole rows: products of all projections, then the norm's backward, and it stores the norm for
the weight gradients. Where rows are few, such tiles leave multiprocessors without work: then a grid over parts of the
channels as well makes the gradient of the norm, and the backward of a layer norm follows in a launch of its own.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from scalefold.kernels import tuning
from scalefold.kernels.instructions import complete, program, to_fp32, wait_for_predecessors
from scalefold.kernels.ops.elementwise import in_order
from scalefold.kernels.ops.layer_norm import norm_gradient
from scalefold.kernels.rows import (
    LINES,
    Norm,
    Rows,
    View,
    dot,
    fused_view,
    launch_with_sums,
    load_per_row,
    load_tile,
    memory_order,
    norm_input_gradient,
    store_column_sums,
    store_tile,
    tile_offsets,
)

NARROW_WIDTH = 16  # narrower outputs (attention biases) go channels first, as their reader wants them
tuning.register_tiles("norm_linear_backward", {64: (128, 64, 4, 3), 128: (64, 64, 4, 3), 256: (64, 64, 8, 3)})
tuning.register_parts("norm_linear_backward_columns")


@triton.jit
def inside_narrow(rows, extent, n, NARROW: tl.constexpr):
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
    acc, ds, weights, c, sums, keep, rows, extent,
    FIRST: tl.constexpr, LAST: tl.constexpr, SUMMED: tl.constexpr, COUNT: tl.constexpr, ALIGN: tl.constexpr,
    WIDTH: tl.constexpr, C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """acc + d W[:, c] of projections FIRST..LAST, in one loop, so that loads run ahead from one to the next.

    SUMMED: column sums of d are stored in ``sums``, from projection FIRST on, once the product is complete: the
    compiler gives a tile that feeds a product and something else a ring with one slot too few, and refills the slot
    that an unfinished product still reads (triton-lang/triton#6691; fewer stages or more warps only hide it).
    ``complete`` may go once ``benchmarks/measure/compile_targets.py --faults`` is clean without it in every supported
    release.
    """
    for start in range(FIRST * WIDTH, LAST * WIDTH, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        i = start // WIDTH
        d = load_tile(_chosen(ds, i, COUNT, ALIGN), rows, n - i * WIDTH, extent)
        acc = dot(d, tl.load(weights + n[:, None] * C + c[None, :]), acc)
        if SUMMED:
            acc = complete(acc)
            store_column_sums(sums, d, n - FIRST * WIDTH, keep)
    return acc


@triton.jit
def _load_narrow(narrow_d, narrow_weight, c, rows, extent, NARROW: tl.constexpr, C: tl.constexpr):
    """Gradient of the narrow projection and columns c of its weight: [rows, 16] and [16, c], zeros past NARROW."""
    n = tl.arange(0, 16)
    pointers = narrow_d.pointer + tile_offsets(narrow_d, rows, n, extent)
    d = tl.load(pointers, mask=inside_narrow(rows, extent, n, NARROW), other=0.0)
    return d, tl.load(narrow_weight + n[:, None] * C + c[None, :], mask=(n < NARROW)[:, None], other=0.0)


@triton.jit
def _store_narrow_sums(sums, d, keep, NARROW: tl.constexpr):
    """Sums of the narrow projection's gradient over the rows, which are those of its bias."""
    n, value = tl.arange(0, 16), to_fp32(d)
    if keep is not None:
        value *= keep[:, None]
    tl.store(sums + n, tl.sum(value, 0), mask=n < NARROW)


@program
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
    wait_for_predecessors()
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
            acc, ds, weights, c, own, keep, rows, extent, 0, COUNT - BIASED, False, COUNT, ALIGN, WIDTH, C, BLOCK_N
        )
    if BIASED > 0:
        acc = _add_products(
            acc, ds, weights, c, own + 2 * C, keep, rows, extent, COUNT - BIASED, COUNT, True, COUNT, ALIGN, WIDTH, C,
            BLOCK_N,
        )  # fmt: skip
    if NARROW > 0:
        d, block = _load_narrow(narrow_d, narrow_weight, c, rows, extent, NARROW, C)
        acc = dot(d, block, acc)
        if NARROW_BIAS:
            _store_narrow_sums(own + 2 * C + BIASED * WIDTH, d, keep, NARROW)
    if keep is not None:
        acc *= keep[:, None]
    gradient, normed_tile = norm_input_gradient(acc, x, norm, keep, normed, own, rows, extent, C)
    if normed is None:
        n = tl.arange(0, 16)
        product = dot(tl.trans(d), normed_tile, tl.zeros([16, C], tl.float32))
        tl.store(own + 2 * C + biases + n[:, None] * C + c[None, :], product, mask=(n < NARROW)[:, None])
    if through is not None:
        gradient += load_tile(through, rows, c, extent).to(tl.float32)
    store_tile(dx, gradient, rows, c, extent)


@program
@triton.jit
def _normed_gradient_kernel(
    weights, ds, narrow_weight, narrow_d, row_mask, d_normed, partials, extent,
    COUNT: tl.constexpr, BIASED: tl.constexpr, WIDTH: tl.constexpr, NARROW: tl.constexpr, NARROW_BIAS: tl.constexpr,
    C: tl.constexpr, ALIGN: tl.constexpr, PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Tile of rows, part of the C channels: sum over the projections of d W, the gradient of the layer norm.

    partials[tile] gets the sums for the biases of the last BIASED wide projections and of the narrow one. Of a wide
    one each program adds up its share of the columns, of tiles that it reads again for this alone: the loop over all
    projections stays one, and the tiles in it feed nothing but products (see ``_add_products``).
    """
    wait_for_predecessors()
    OWN: tl.constexpr = C // PARTS
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(1) * OWN + tl.arange(0, OWN)
    own = partials + tl.program_id(0).to(tl.int64) * (BIASED * WIDTH + NARROW_BIAS * NARROW)
    keep = None
    if row_mask is not None:
        keep = load_per_row(row_mask, rows, extent)
    acc = tl.zeros([BLOCK_M, OWN], tl.float32)
    acc = _add_products(
        acc, ds, weights, c, own, keep, rows, extent, 0, COUNT, False, COUNT, ALIGN, WIDTH, C, BLOCK_N
    )  # fmt: skip
    if NARROW > 0:
        d, block = _load_narrow(narrow_d, narrow_weight, c, rows, extent, NARROW, C)
        acc = dot(d, block, acc)
        if NARROW_BIAS and tl.program_id(1) == PARTS - 1:
            _store_narrow_sums(own + BIASED * WIDTH, d, keep, NARROW)
    if keep is not None:
        acc *= keep[:, None]
    store_tile(d_normed, acc, rows, c, extent)
    SHARE: tl.constexpr = WIDTH // PARTS if WIDTH // PARTS > LINES else LINES
    n = tl.program_id(1) * SHARE + tl.arange(0, SHARE)
    if tl.program_id(1) * SHARE < WIDTH:
        for i in tl.static_range(COUNT - BIASED, COUNT):
            sums = own + (i - (COUNT - BIASED)) * WIDTH
            store_column_sums(sums, load_tile(ds[i], rows, n, extent), n, keep)


def input_gradient(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    row_mask: Tensor | None,
    weights: Sequence[Tensor],
    ds: Sequence[Tensor],
    has_bias: Sequence[bool],
    through: Tensor | None,
) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor]]:
    """Backward of x: [*, c] -> layer norm (times row_mask: [*]) -> projections, for the gradients ds of these.

    Weights: equally wide ones [w, c], those without a bias first, then at most one narrower than 16, each dense; ds:
    [*, w], dense along w. Returns the gradient of x plus ``through``, in the memory order of x; the (masked) layer
    norm, rows in that order; and two matrices of partial sums for ``rows.sum_all``: [tiles, 2 c] for the norm's weight
    and bias, [tiles, widths] for each bias that there is. Without a wide weight there is no norm, and the gradient of
    the narrow weight, w * c, is the last of the latter sums.
    """
    c, num_wide = x.shape[-1], sum(weight.shape[0] >= NARROW_WIDTH for weight in weights)
    wide, narrow = tuple(weights[:num_wide]), weights[num_wide:]
    width = wide[0].shape[0] if wide else NARROW_WIDTH
    num_sums = sum(weight.shape[0] for weight, has in zip(weights, has_bias, strict=True) if has)
    tensors: dict[str, Rows] = {
        "narrow_d": ds[num_wide] if narrow else None,
        "row_mask": None if row_mask is None else row_mask[..., None],
        "ds": tuple(ds[:num_wide]),
    }
    arguments: dict[str, Any] = {
        "weights": fused_view(wide) if wide else None,
        "narrow_weight": narrow[0] if narrow else None,
        "COUNT": num_wide,
        "BIASED": sum(has_bias[:num_wide]),
        "WIDTH": width,
        "NARROW": narrow[0].shape[0] if narrow else 0,
        "NARROW_BIAS": bool(narrow) and has_bias[-1],
        "C": c,
        "ALIGN": _alignment(ds[:num_wide]),
    }
    normed, norm = _rows_like(x) if wide else None, Norm(norm_weight, norm_bias)
    config = _choice(x, num_wide, width)
    if config["PARTS"] > 1:
        d_normed = _rows_like(x)
        tensors = {"d_normed": d_normed, **tensors}
        bias_sums = launch_with_sums(_normed_gradient_kernel, config, tensors, num_sums, **arguments)
        dx, norm_sums = norm_gradient(d_normed, x, norm_weight, through, normed, norm_bias, row_mask)
        return dx, normed, (norm_sums, bias_sums)
    del config["PARTS"]
    dx = torch.empty_like(x)
    tensors = {"x": x, "dx": dx, "normed": normed, "through": through, **tensors}
    num_sums += 0 if wide else narrow[0].numel()
    sums = launch_with_sums(_input_gradient_kernel, config, tensors, 2 * c + num_sums, norm=norm, **arguments)
    return dx, normed, (sums[:, : 2 * c], sums[:, 2 * c :])


def _rows_like(x: Tensor) -> Tensor:
    """Room for as many rows as x: [*, c] has, dense, in its memory order."""
    return in_order(memory_order(x), x.new_empty(x.shape[:-1].numel(), x.shape[-1]), x.shape)


def _choice(x: Tensor, num_wide: int, width: int) -> tuning.Config:
    """Launch parameters, and PARTS of the channels; one part where the narrow weight's gradient needs whole rows."""
    names = "norm_linear_backward_columns", "norm_linear_backward"
    if not num_wide:
        return {"PARTS": 1, **tuning.chosen_tiles(names[1], x, 0, width)}
    return tuning.chosen_parts(*names, x, num_wide * width, width, columns=x.shape[-1], blocked=False)


def _alignment(tensors: Sequence[Tensor]) -> int:
    """8 if all rows start at multiples of 8 elements and 16 bytes, else 1."""
    steps = [s for t in tensors for s, size in zip(t.stride()[:-1], t.shape[:-1], strict=True) if size != 1]
    even = all(step % 8 == 0 for step in steps)
    return 8 if even and all(tensor.data_ptr() % 16 == 0 for tensor in tensors) else 1
