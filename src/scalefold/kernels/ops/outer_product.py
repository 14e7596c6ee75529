"""Outer product mean, forward and backward (Supplement Algorithm 10): library products around four Triton kernels.

The outer product is one library product, stored as [I, c, J, d]: rows (i, c) of a times rows (j, d) of b, summed over
sequences. The kernels read that layout in contiguous pieces while they contract (c, d) with the output weight, so
nothing is permuted. It is kept for the backward only where computing it again costs more than its bytes. On compute
capability 9.0 programs of ``kernels.hopper`` take forward and backward with few sequences where they are faster, and
store neither it nor its gradient.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from scalefold.kernels import tuning
from scalefold.kernels.around import aside
from scalefold.kernels.destination import Destination
from scalefold.kernels.gradients.weight_gradient import NUM_PROGRAMS, row_ranges
from scalefold.kernels.hopper import gradients as gluon
from scalefold.kernels.hopper import rows as hopper
from scalefold.kernels.hopper.choice import chosen
from scalefold.kernels.instructions import program, wait_for_predecessors
from scalefold.kernels.ops.linear import masked_projections
from scalefold.kernels.rows import Affine, dot, layout_obstacle, sum_all, width_obstacle

KEEP_FROM_SEQUENCES = 512  # 2 S N^2 c^2 FLOP against 4 N^2 c^2 bytes: storing wins well above S ~ 200
SCALE_ROWS = 64  # pairs per program of the scaling; 16 KiB at 128 channels
for _name in ("outer_product_forward", "outer_product_backward", "outer_product_weight"):
    tuning.register_tiles(_name, {64: (128, 64, 4, 3), 128: (128, 64, 8, 3), 256: (64, 64, 8, 2)})


@triton.jit
def _outer_offsets(k, j, num_j, CO: tl.constexpr):
    """Offsets within outer[i] of channels k = c * CO + d of pairs (i, j): [J, K]; outer is [I, c, J, d]."""
    channel = (k // CO).to(tl.int64) * num_j * CO + k % CO
    return j.to(tl.int64)[:, None] * CO + channel[None, :]


@program
@triton.jit
def _forward_kernel(
    z, outer, norm, weight, bias, out, num_j,
    K: tl.constexpr, CO: tl.constexpr, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program (tile of j, i): z + (outer W^T + bias) / norm. z, out: [I, J, C]; weight: [C, K]; norm: [I, J]."""
    wait_for_predecessors()
    i = tl.program_id(1).to(tl.int64)
    j = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.arange(0, C)
    outer += i * num_j * K
    inside = (j < num_j)[:, None]
    acc = tl.zeros([BLOCK_M, C], tl.float32)
    for first in range(0, K, BLOCK_N):
        k = first + tl.arange(0, BLOCK_N)
        tile = tl.load(outer + _outer_offsets(k, j, num_j, CO), mask=inside, other=0.0)
        block = tl.load(weight + c[:, None] * K + k[None, :])
        acc = dot(tile, tl.trans(block), acc)
    acc += tl.load(bias + c).to(tl.float32)[None, :]
    acc = acc / tl.load(norm + i * num_j + j, mask=j < num_j, other=1.0)[:, None]
    offsets = (i * num_j + j)[:, None] * C + c[None, :]
    acc += tl.load(z + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + offsets, acc.to(out.dtype.element_ty), mask=inside)


@program
@triton.jit
def _scale_kernel(d, norm, scaled, partials, count, C: tl.constexpr, BLOCK_M: tl.constexpr):
    """Tile of pairs: scaled = d / norm in the type of d, read by both gradient kernels; partials[tile]: its sum."""
    wait_for_predecessors()
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.arange(0, C)
    offsets, inside = rows[:, None] * C + c[None, :], (rows < count)[:, None]
    tile = tl.load(d + offsets, mask=inside, other=0.0)
    value = (tile.to(tl.float32) / tl.load(norm + rows, mask=rows < count, other=1.0)[:, None]).to(tile.dtype)
    tl.store(scaled + offsets, value, mask=inside)
    tl.store(partials + tl.program_id(0) * C + c, tl.sum(value.to(tl.float32), 0))


@triton.jit
def _load_pairs(scaled, i, j, c, num_j, C: tl.constexpr):
    """Rows (i, j) of scaled: [J, C]."""
    return tl.load(scaled + (i * num_j + j)[:, None] * C + c[None, :], mask=(j < num_j)[:, None], other=0.0)


@program
@triton.jit
def _outer_gradient_kernel(
    scaled, weight, d_outer, num_j,
    K: tl.constexpr, CO: tl.constexpr, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program (tile of j, i): d_outer = scaled W, in the layout of outer."""
    wait_for_predecessors()
    i = tl.program_id(1).to(tl.int64)
    j = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.arange(0, C)
    tile = _load_pairs(scaled, i, j, c, num_j, C)
    d_outer += i * num_j * K
    for first in range(0, K, BLOCK_N):
        k = first + tl.arange(0, BLOCK_N)
        acc = dot(tile, tl.load(weight + c[:, None] * K + k[None, :]), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
        offsets = _outer_offsets(k, j, num_j, CO)
        tl.store(d_outer + offsets, acc.to(d_outer.dtype.element_ty), mask=(j < num_j)[:, None])


@program
@triton.jit
def _weight_gradient_kernel(
    scaled, outer, partials, num_i, num_j, rows_per_split,
    K: tl.constexpr, CO: tl.constexpr, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program (block of (c, d), range of i) -> partials[range, C * K]."""
    wait_for_predecessors()
    k = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.arange(0, C)
    start = tl.program_id(1) * rows_per_split
    end = tl.minimum(start + rows_per_split, num_i)
    tiles_j = tl.cdiv(num_j, BLOCK_M)
    acc = tl.zeros([C, BLOCK_N], tl.float32)
    for tile in range(start * tiles_j, end * tiles_j):
        i = tl.cast(tile // tiles_j, tl.int64)
        j = (tile % tiles_j) * BLOCK_M + tl.arange(0, BLOCK_M)
        offsets = i * num_j * K + _outer_offsets(k, j, num_j, CO)
        right = tl.load(outer + offsets, mask=(j < num_j)[:, None], other=0.0)
        acc = dot(tl.trans(_load_pairs(scaled, i, j, c, num_j, C)), right, acc)
    partials += tl.program_id(1).to(tl.int64) * (C * K)
    tl.store(partials + c[:, None] * K + k[None, :], acc)


def _outer(a: Tensor, b: Tensor) -> Tensor:
    """sum_s a_sic b_sjd as [I * c, J * d]. a: [S, I, c]; b: [S, J, d]."""
    return a.flatten(1).t() @ b.flatten(1)


class _Update(torch.autograd.Function):
    """One sample. Arguments: z [I, J, c_z], a [S, I, c], b [S, J, c], norm [I, J], weight, bias."""

    @staticmethod
    def forward(ctx, z, a, b, norm, weight, bias):
        out, kept = torch.empty_like(z), None
        if chosen("outer product", hopper.outer_product_obstacle(z, a, b, weight)):
            hopper.outer_product(z, a, b, norm, Affine(weight, bias), out)
        else:
            outer = _outer(a, b)
            _contract(z, outer, norm, weight, bias, out)
            kept = outer if a.shape[0] >= KEEP_FROM_SEQUENCES else None
        ctx.save_for_backward(a, b, norm, weight, bias, kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d):
        a, b, norm, weight, bias, outer = ctx.saved_tensors
        scaled, sums = _scaled(d.contiguous(), norm)

        def gradients() -> tuple[Tensor, Tensor]:
            if chosen("gradient of an outer product's weight", gluon.obstacle(gluon.NAMES[1], scaled, a, b, weight)):
                partials = gluon.weight_partials(scaled, a, b)
            else:
                partials = _weight_partials(scaled, _outer(a, b) if outer is None else outer)
            d_weight, d_bias = sum_all([partials, sums], weight.dtype)
            return d_weight.view_as(weight), d_bias.to(bias.dtype)

        own = aside.gradients([weight, bias], [scaled, sums, a, b, outer], gradients)
        return d, *_operand_gradients(scaled, a, b, weight), None, *own


def _operand_gradients(scaled: Tensor, a: Tensor, b: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of a and b, by library products around that of the outer product, or by Gluon without it."""
    if chosen("gradients of an outer product", gluon.obstacle(gluon.NAMES[0], scaled, a, b, weight)):
        totals = sum_all(gluon.operand_gradients(scaled, a, b, weight), a.dtype)
        return gluon.operand_of(totals[0], a), gluon.operand_of(totals[1], b)
    (i, j, c), k, co = scaled.shape, weight.shape[1], a.shape[-1]
    d_outer = a.new_empty(i * co, j * co)
    config = tuning.chosen_tiles("outer_product_backward", scaled, k, k)
    grid = (triton.cdiv(j, config["BLOCK_M"]), i)
    _outer_gradient_kernel[grid](scaled, weight, d_outer, j, K=k, CO=co, C=c, **config)
    return (b.flatten(1) @ d_outer.t()).view_as(a), (a.flatten(1) @ d_outer).view_as(b)


def _contract(z: Tensor, outer: Tensor, norm: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> None:
    """The forward from the outer product on."""
    (i, j, c), k = z.shape, weight.shape[1]
    config = tuning.chosen_tiles("outer_product_forward", z, k, k)
    grid = (triton.cdiv(j, config["BLOCK_M"]), i)
    _forward_kernel[grid](z, outer, norm, weight, bias, out, j, K=k, CO=outer.shape[0] // i, C=c, **config)


def _scaled(d: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    """d / norm [I, J, c_z] in the type of d, and partial sums [tiles, c_z] of it, the gradient of the bias."""
    count, c = norm.numel(), d.shape[-1]
    scaled, tiles = torch.empty_like(d), triton.cdiv(count, SCALE_ROWS)
    partials = torch.empty(tiles, c, dtype=torch.float32, device=d.device)
    _scale_kernel[(tiles,)](d, norm, scaled, partials, count, C=c, BLOCK_M=SCALE_ROWS)
    return scaled, partials


def _weight_partials(scaled: Tensor, outer: Tensor) -> Tensor:
    """Partial gradients [ranges of i, c_z * c * c] of the output weight [c_z, c * c]."""
    (i, j, c), k = scaled.shape, outer.numel() // (scaled.shape[0] * scaled.shape[1])
    config = tuning.chosen_tiles("outer_product_weight", scaled, k, k)
    num_blocks = k // config["BLOCK_N"]
    rows_per_split, num_splits = row_ranges(i, 1, num_blocks, NUM_PROGRAMS)
    partials = torch.empty(num_splits, c * k, dtype=torch.float32, device=scaled.device)
    _weight_gradient_kernel[(num_blocks, num_splits)](
        scaled, outer, partials, i, j, rows_per_split, K=k, CO=int(k**0.5), C=c, **config
    )
    return partials


def project_obstacle(
    m: Tensor,
    mask: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight_1: Tensor,
    bias_1: Tensor,
    weight_2: Tensor,
    *_: object,
) -> str | None:
    """Why ``outer_product_project`` does not take these arguments, or None."""
    if weight_1.shape != weight_2.shape:
        return f"widths {weight_1.shape[0]} and {weight_2.shape[0]} in one call"
    return width_obstacle(m.shape[-1], weight_1.shape[0]) or layout_obstacle(m)


def outer_product_project(
    m: Tensor,
    mask: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight_1: Tensor,
    bias_1: Tensor,
    weight_2: Tensor,
    bias_2: Tensor,
    destination: Destination | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``reference.outer_product_project``: one kernel forward, two and library products backward."""
    weights, biases = (weight_1, weight_2), (bias_1, bias_2)
    return masked_projections(m, mask, norm_weight, norm_bias, weights, biases, destination)  # type: ignore[return-value]


def update_obstacle(z: Tensor, a: Tensor, b: Tensor, norm: Tensor, weight: Tensor, *_: object) -> str | None:
    """Why ``outer_product_update`` does not take these arguments, or None."""
    if a.shape[-1] != b.shape[-1]:
        return f"widths {a.shape[-1]} and {b.shape[-1]} in one call"
    return width_obstacle(z.shape[-1], a.shape[-1]) or (None if weight.is_contiguous() else "weight is not contiguous")


def outer_product_update(z: Tensor, a: Tensor, b: Tensor, norm: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``reference.outer_product_update``: a library product and one kernel forward; backward three products, three
    kernels and a sum. Saved: a, b, norm, and the outer product from 512 sequences on."""
    dense, z = norm.float().contiguous(), z.contiguous()
    if len(z) == 1:  # views: autograd would put together the gradients of what it takes apart
        return _Update.apply(z.squeeze(0), a.squeeze(0), b.squeeze(0), dense.squeeze(0), weight, bias)[None]
    return torch.stack([_Update.apply(*sample, weight, bias) for sample in zip(z, a, b, dense, strict=True)])
