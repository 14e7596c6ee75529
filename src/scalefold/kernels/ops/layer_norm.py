"""Layer norm over the last dimension in Triton, forward and backward, for any width up to 1024."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from scalefold.kernels import tuning
from scalefold.kernels.instructions import program, wait_for_predecessors
from scalefold.kernels.rows import (
    Norm,
    launch,
    launch_with_sums,
    load_per_row,
    normalise,
    normalise_gradient,
    scale_and_shift,
    sum_partials,
    tile_offsets,
)

MAX_WIDTH = 1024


def _default(fields: tuning.Fields, capability: int) -> tuning.Config:
    width = tuning.power_of_two(int(fields["c"]))
    return {"BLOCK_M": max(1, 8192 // width), "num_warps": 4}


for _name in ("layer_norm_forward", "layer_norm_backward"):
    tuning.register(_name, _default)


@triton.jit
def _load_row_tile(view, rows, extent, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Rows of C channels in fp32: [rows, BLOCK_C] with zeros beyond them, and which elements exist."""
    columns = tl.arange(0, BLOCK_C)
    keep = (rows < extent.limit)[:, None] & (columns < C)[None, :]
    return tl.load(view.pointer + tile_offsets(view, rows, columns, extent), mask=keep, other=0.0).to(tl.float32), keep


@program
@triton.jit
def _forward_kernel(x, norm, out, extent, C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr):
    """Tile of rows; BLOCK_C is C rounded up."""
    wait_for_predecessors()
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_C)
    tile, keep = _load_row_tile(x, rows, extent, C, BLOCK_C)
    hat, _ = normalise(tile, C, keep)
    scale = tl.load(norm.weight + columns, mask=columns < C, other=0.0).to(tl.float32)
    shift = tl.load(norm.bias + columns, mask=columns < C, other=0.0).to(tl.float32)
    pointers = out.pointer + tile_offsets(out, rows, columns, extent)
    tl.store(pointers, scale_and_shift(hat, scale, shift, out.pointer.dtype.element_ty), mask=keep)


@program
@triton.jit
def _backward_kernel(
    x, d, weight, bias, row_mask, through, dx, normed, partials, extent,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Tile of rows: gradient of x, plus what came ``through`` a residual connection (None: there was none).

    ``normed``: gets the layer norm, times ``row_mask`` if there is one; None: nobody wants it.
    """
    wait_for_predecessors()
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_C)
    tile, keep = _load_row_tile(x, rows, extent, C, BLOCK_C)
    gradient, _ = _load_row_tile(d, rows, extent, C, BLOCK_C)
    hat, rstd = normalise(tile, C, keep)
    own = partials + tl.program_id(0).to(tl.int64) * (2 * C)
    tl.store(own + columns, tl.sum(gradient * hat, 0), mask=columns < C)
    tl.store(own + C + columns, tl.sum(gradient, 0), mask=columns < C)
    scale = tl.load(weight + columns, mask=columns < C, other=0.0).to(tl.float32)
    if normed is not None:
        shift = tl.load(bias + columns, mask=columns < C, other=0.0).to(tl.float32)
        value = scale_and_shift(hat, scale, shift, normed.pointer.dtype.element_ty)
        if row_mask is not None:
            kept = load_per_row(row_mask, rows, extent)[:, None]
            value = (value.to(tl.float32) * kept).to(normed.pointer.dtype.element_ty)
        tl.store(normed.pointer + tile_offsets(normed, rows, columns, extent), value, mask=keep)
    result = normalise_gradient(gradient * scale[None, :], hat, rstd, C)
    if through is not None:
        result += _load_row_tile(through, rows, extent, C, BLOCK_C)[0]
    pointers = dx.pointer + tile_offsets(dx, rows, columns, extent)
    tl.store(pointers, result.to(dx.pointer.dtype.element_ty), mask=keep)


def normed_rows(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Layer norm of x: [*, c] without a gradient, in the memory order of x."""
    out = torch.empty_like(x)
    tensors, norm = {"x": x, "out": out}, Norm(weight, bias)
    launch(_forward_kernel, _config("layer_norm_forward", x), tensors, masked=True, norm=norm, **_sizes(x))
    return out


def _config(name: str, x: Tensor) -> tuning.Config:
    return tuning.lookup(name, **tuning.row_fields(x.shape[:-1].numel(), x.dtype, c=x.shape[-1]))


def _sizes(x: Tensor) -> dict[str, int]:
    return {"C": x.shape[-1], "BLOCK_C": tuning.power_of_two(x.shape[-1])}


def norm_gradient(
    d: Tensor,
    x: Tensor,
    weight: Tensor,
    through: Tensor | None = None,
    normed: Tensor | None = None,
    bias: Tensor | None = None,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradient of x: [*, c] for the gradient d of its layer norm, plus ``through``; in the memory order of x.

    Also returns partial sums [tiles, 2 c] of the gradients of the norm's weight and bias, for ``rows.sum_all``.
    ``normed``: [*, c], gets the layer norm itself, which needs its ``bias``, times row_mask: [*].
    """
    dx = torch.empty_like(x)
    mask = None if normed is None or row_mask is None else row_mask[..., None]
    tensors = {"x": x, "d": d, "dx": dx, "through": through, "normed": normed, "row_mask": mask}
    config, num_sums = _config("layer_norm_backward", x), 2 * x.shape[-1]
    partials = launch_with_sums(
        _backward_kernel, config, tensors, num_sums, masked=True, weight=weight, bias=bias, **_sizes(x)
    )
    return dx, partials


class _LayerNorm(torch.autograd.Function):
    """Arguments: x, weight, bias. Saved: x; the statistics are taken again."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = bias.dtype
        return normed_rows(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, d):
        x, weight = ctx.saved_tensors
        dx, partials = norm_gradient(d, x, weight)
        d_weight, d_bias = sum_partials(partials, weight.dtype).chunk(2)
        return dx, d_weight, d_bias.to(ctx.bias_dtype)


def obstacle(x: Tensor, *_: object) -> str | None:
    """Why ``layer_norm`` does not take x, or None."""
    if x.shape[-1] > MAX_WIDTH:
        return f"width {x.shape[-1]} is above {MAX_WIDTH}"
    if x.dim() > 4:
        return "more than three dimensions of rows"
    return None if x.numel() else "nothing to normalise"


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``reference.layer_norm``: one kernel forward, two backward; the result lies in the memory order of x."""
    return _LayerNorm.apply(x, weight, bias)  # type: ignore[return-value]
