"""Layer norm over the last dimension in Triton, forward and backward, for any width up to 1024."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from scalefold.kernels import tuning
from scalefold.kernels.rows import EPS, common_rows, row_fields, row_offsets, sum_partials

MAX_WIDTH = 1024


def _default(fields: tuning.Fields, capability: int) -> tuning.Config:
    width = 1 << (int(fields["c"]) - 1).bit_length()
    return {"BLOCK_M": max(1, 8192 // width), "num_warps": 4}


for _name in ("layer_norm_forward", "layer_norm_backward"):
    tuning.register(
        _name, _default, lambda fields: [{"BLOCK_M": m, "num_warps": w} for m in (8, 16, 32, 64) for w in (4, 8)]
    )


@triton.jit
def _load_row_tile(pointer, rows, dims, strides, count, C: tl.constexpr, WIDTH: tl.constexpr):
    columns = tl.arange(0, WIDTH)
    keep = (rows < count)[:, None] & (columns < C)[None, :]
    offsets = row_offsets(rows, dims, strides)[:, None] + columns[None, :] * strides[3]
    return tl.load(pointer + offsets, mask=keep, other=0.0).to(tl.float32), offsets, keep


@triton.jit
def _normalise_tile(x, keep, C: tl.constexpr):
    centred = tl.where(keep, x - tl.sum(x, 1)[:, None] / C, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / C + EPS)
    return centred * rstd[:, None], rstd


@triton.jit
def _forward_kernel(
    x, x_strides, weight, bias, out, out_strides, dims, count,
    C: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, WIDTH)
    tile, _, keep = _load_row_tile(x, rows, dims, x_strides, count, C, WIDTH)
    hat, _ = _normalise_tile(tile, keep, C)
    scale = tl.load(weight + columns, mask=columns < C, other=0.0).to(tl.float32)
    shift = tl.load(bias + columns, mask=columns < C, other=0.0).to(tl.float32)
    offsets = row_offsets(rows, dims, out_strides)[:, None] + columns[None, :] * out_strides[3]
    tl.store(out + offsets, (hat * scale[None, :] + shift[None, :]).to(out.dtype.element_ty), mask=keep)


@triton.jit
def _backward_kernel(
    x, x_strides, d, d_strides, weight, through, through_strides, dx, dx_strides, partials, dims, count,
    C: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Tile of rows: gradient of x, plus what came ``through`` a residual connection (None: there was none)."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, WIDTH)
    tile, _, keep = _load_row_tile(x, rows, dims, x_strides, count, C, WIDTH)
    gradient, _, _ = _load_row_tile(d, rows, dims, d_strides, count, C, WIDTH)
    hat, rstd = _normalise_tile(tile, keep, C)
    own = partials + tl.program_id(0).to(tl.int64) * (2 * C)
    tl.store(own + columns, tl.sum(gradient * hat, 0), mask=columns < C)
    tl.store(own + C + columns, tl.sum(gradient, 0), mask=columns < C)
    scaled = gradient * tl.load(weight + columns, mask=columns < C, other=0.0).to(tl.float32)[None, :]
    along = tl.sum(scaled * hat, 1)[:, None] / C
    result = (scaled - tl.sum(scaled, 1)[:, None] / C - hat * along) * rstd[:, None]
    if through is not None:
        result += _load_row_tile(through, rows, dims, through_strides, count, C, WIDTH)[0]
    offsets = row_offsets(rows, dims, dx_strides)[:, None] + columns[None, :] * dx_strides[3]
    tl.store(dx + offsets, result.to(dx.dtype.element_ty), mask=keep)


def normed_rows(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Layer norm of x: [*, c] without a gradient, in the memory order of x."""
    out, c = torch.empty_like(x), x.shape[-1]
    dims, count, strides = common_rows(x, out)
    config = tuning.lookup("layer_norm_forward", **row_fields(count, x.dtype, c=c))
    _forward_kernel[(triton.cdiv(count, config["BLOCK_M"]),)](
        x, strides[0], weight, bias, out, strides[1], dims, count, C=c, WIDTH=triton.next_power_of_2(c), **config
    )
    return out


def norm_gradient(d: Tensor, x: Tensor, weight: Tensor, through: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Gradient of x: [*, c] for the gradient d of its layer norm, plus ``through``; in the memory order of x.

    Also returns partial sums [tiles, 2 c] of the gradients of the norm's weight and bias, for ``rows.sum_all``.
    """
    dx, c = torch.empty_like(x), x.shape[-1]
    dims, count, strides = common_rows(x, d, dx, x if through is None else through)
    config = tuning.lookup("layer_norm_backward", **row_fields(count, x.dtype, c=c))
    tiles = triton.cdiv(count, config["BLOCK_M"])
    partials = torch.empty(tiles, 2 * c, dtype=torch.float32, device=x.device)
    _backward_kernel[(tiles,)](
        x, strides[0], d, strides[1], weight, through, strides[3], dx, strides[2], partials, dims, count,
        C=c, WIDTH=triton.next_power_of_2(c), **config,
    )  # fmt: skip
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
