"""Invariant point attention (Supplement Algorithm 22), forward and backward: library products around four kernels.

Same meaning as ``reference.invariant_point_attention``, without its [N, N, H, P, 3] intermediate: distances and softmax
happen in registers, and of the size N^2 H only the weights are written. Channels and points are packed side by side
first, whatever their strides: q and k as components of residues [C, N], which the kernels read in contiguous pieces; v
as rows [N, C], so that one product gives both of its outputs. All in fp32. Products of q and k and distances are
element-wise; products with the weights are the library's. Those that carry coordinates, or gradients of them, are full
fp32 products whatever the tf32 switch says; those with the pair representation follow it.

Forward:  pack; logits and softmax by rows; two products.
Backward: pack the gradients of o and o_points; gradient of the weights (two products); gradients of logits, bias and q
          by rows, of k by columns; the sum for the point weights; gradients of v and z (two products).
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from scalefold.kernels import tuning
from scalefold.kernels.instructions import program, wait_for_predecessors
from scalefold.kernels.rows import View, sum_partials

LONGEST = 2048  # residues: a row of scores stays in registers
TILE = 2048  # scores per program: 16 per thread of four warps
PACKED_RESIDUES = 16  # per program that packs
SQRT_THIRD = tl.constexpr((1.0 / 3.0) ** 0.5)  # weight of the bias, one of three terms of the logits
SQRT_3 = tl.constexpr(3.0**0.5)

Split = tuple[Tensor, Tensor]  # channels [B, N, H, D], points [B, N, H, P, 3]


@triton.jit
def _pack_one(channels, points, packed, b, i, h, n, D: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """packed[b, i, h] = D channels, then C - D coordinates; BLOCK_C is C rounded up."""
    c = tl.arange(0, BLOCK_C)[None, :]
    exists = (i < n)[:, None]
    own_channels = channels.pointer + (b * channels.strides[0] + h * channels.strides[2])
    own_points = points.pointer + (b * points.strides[0] + h * points.strides[2])
    own_packed = packed.pointer + (b * packed.strides[0] + h * packed.strides[2])
    i = i[:, None]
    where = i * channels.strides[1] + c * channels.strides[3]
    value = tl.load(own_channels + where, mask=exists & (c < D), other=0.0)
    where = i * points.strides[1] + (c - D) // 3 * points.strides[3] + (c - D) % 3 * points.strides[4]
    value += tl.load(own_points + where, mask=exists & (c >= D) & (c < C), other=0.0)
    tl.store(own_packed + i * packed.strides[1] + c * packed.strides[3], value, mask=exists & (c < C))


@program
@triton.jit
def _pack_kernel(
    channels, points, packed, n, COUNT: tl.constexpr, D: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Program (block of residues, head, sample) of each of COUNT tensors."""
    wait_for_predecessors()
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    for t in tl.static_range(COUNT):
        _pack_one(channels[t], points[t], packed[t], b, i, h, n, D[t], C[t], BLOCK_C[t])


@triton.jit
def _component(packed, c, at, n):
    """Component c of residues ``at`` of one head; packed: [C, n]."""
    return tl.load(packed + c * n + at, mask=at < n, other=0.0)


@program
@triton.jit
def _forward_kernel(
    q, k, bias, point_weights, mask, weights, n, scale, inf,
    D: tl.constexpr, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program (head, block of i, sample): weights [B, H, n, n]. q, k: [B, H, C, n]; BLOCK_N is n rounded up."""
    wait_for_predecessors()
    h, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    head = b * tl.num_programs(0) + h
    q += head * C * n
    k += head * C * n
    i = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.arange(0, BLOCK_N)
    logits = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for c in tl.static_range(D):
        logits += _component(q, c, i, n)[:, None] * _component(k, c, j, n)[None, :]
    inside = (i < n)[:, None] & (j < n)[None, :]
    own_bias = bias.pointer + (b * bias.strides[0] + h * bias.strides[3])
    where = i[:, None] * bias.strides[1] + j[None, :] * bias.strides[2]
    logits = logits * scale + tl.load(own_bias + where, mask=inside, other=0.0) * SQRT_THIRD
    distance_sq = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for c in tl.static_range(D, C):
        difference = _component(q, c, i, n)[:, None] - _component(k, c, j, n)[None, :]
        distance_sq += difference * difference
    logits -= 0.5 * (distance_sq * tl.load(point_weights + h))
    own_mask = mask.pointer + b * mask.strides[0]
    keep_i = tl.load(own_mask + i * mask.strides[1], mask=i < n, other=0.0)
    keep_j = tl.load(own_mask + j * mask.strides[1], mask=j < n, other=0.0)
    logits += (keep_i[:, None] * keep_j[None, :] - 1.0) * inf
    logits = tl.where((j < n)[None, :], logits, float("-inf"))
    exponentials = tl.exp(logits - tl.max(logits, 1)[:, None])
    normalised = exponentials / tl.sum(exponentials, 1)[:, None]
    tl.store(weights + head * n * n + i[:, None] * n + j[None, :], normalised, mask=inside)


@triton.jit
def _own_gradient(
    d, own, other, d_own, at, along, n, scale, point_weight, D: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    """Store the gradient of components ``own`` [C, n] of residues ``at``, which attend or are attended ``along``.

    d: gradient of the bias [at, along] = that of the logits times sqrt(1/3), so the other terms carry sqrt(3).
    Returns d times the squared distances, [at, along].
    """
    for c in tl.static_range(D):
        gradient = tl.sum(d * _component(other, c, along, n)[None, :], 1) * scale
        tl.store(d_own + c * n + at, gradient, mask=at < n)
    weighted = tl.zeros(d.shape, tl.float32)
    for c in tl.static_range(D, C):
        difference = _component(own, c, at, n)[:, None] - _component(other, c, along, n)[None, :]
        product = d * difference
        tl.store(d_own + c * n + at, tl.sum(product, 1) * (-SQRT_3 * point_weight), mask=at < n)
        weighted += product * difference
    return weighted


@program
@triton.jit
def _rows_kernel(
    q, k, point_weights, weights, d_weights, d_q, partials, n, scale,
    D: tl.constexpr, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program (head, block of i, sample): d_weights [B, H, n, n] becomes the gradient of the bias; gradient of q.

    partials: [B, blocks of i, H], the share of each program in the gradient of the point weights.
    """
    wait_for_predecessors()
    h = tl.program_id(0)
    head = tl.program_id(2).to(tl.int64) * tl.num_programs(0) + h
    i = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.arange(0, BLOCK_N)
    inside = (i < n)[:, None] & (j < n)[None, :]
    where = head * n * n + i[:, None] * n + j[None, :]
    p = tl.load(weights + where, mask=inside, other=0.0)
    d = tl.load(d_weights + where, mask=inside, other=0.0)
    tl.debug_barrier()  # warps that hold the same elements of a small tile have them before one changes them
    d = p * (d - tl.sum(p * d, 1)[:, None]) * SQRT_THIRD
    tl.store(d_weights + where, d, mask=inside)
    first = head * C * n
    weight = tl.load(point_weights + h)
    weighted = _own_gradient(d, q + first, k + first, d_q + first, i, j, n, scale, weight, D, C)
    program = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + h
    tl.store(partials + program, tl.sum(tl.sum(weighted, 1), 0) * (-0.5 * SQRT_3))


@program
@triton.jit
def _columns_kernel(
    q, k, point_weights, d_bias, d_k, n, scale,
    D: tl.constexpr, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program (head, block of j, sample): gradient of k. d_bias: [B, H, n, n], from the rows kernel."""
    wait_for_predecessors()
    h = tl.program_id(0)
    head = tl.program_id(2).to(tl.int64) * tl.num_programs(0) + h
    j = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    i = tl.arange(0, BLOCK_N)
    inside = (j < n)[:, None] & (i < n)[None, :]
    d = tl.load(d_bias + head * n * n + j[:, None] + i[None, :] * n, mask=inside, other=0.0)
    first = head * C * n
    weight = tl.load(point_weights + h)
    _own_gradient(d, k + first, q + first, d_k + first, j, i, n, scale, weight, D, C)


@contextmanager
def full_fp32() -> Iterator[None]:
    """Library products of fp32 tensors without tf32, for products with coordinates; a CUDA graph keeps the choice."""
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, False
    try:
        yield
    finally:
        matmul.allow_tf32 = before


def _pack(splits: Sequence[Split], packed: Sequence[Tensor]) -> None:
    """Write channels and flattened points side by side, several tensors in one launch. packed: [B, N, H, C] each."""
    channels, points = (tuple(map(_view, group)) for group in zip(*splits, strict=True))
    batch, n, heads, _ = packed[0].shape
    widths = tuple(tensor.shape[-1] for tensor in packed)
    _pack_kernel[(tuning.ceil_div(n, PACKED_RESIDUES), heads, batch)](
        channels, points, tuple(map(_view, packed)), n, COUNT=len(packed),
        D=tuple(tensor.shape[-1] for tensor, _ in splits), C=widths, BLOCK_C=tuple(map(tuning.power_of_two, widths)),
        BLOCK_M=PACKED_RESIDUES, num_warps=4,
    )  # fmt: skip


def _view(x: Tensor) -> View:
    return View(x, x.stride())


def _components(packed: Tensor) -> Tensor:
    """Memory [B, H, C, N] seen as [B, N, H, C]."""
    return packed.permute(0, 3, 1, 2)


def _split(packed: Tensor, width: int) -> Split:
    """Packed [B, N, H, C] as ``width`` channels and points, both views."""
    return packed[..., :width], packed[..., width:].unflatten(-1, (-1, 3))


def rows_grid(weights: Tensor) -> tuple[int, int, int]:
    """Programs of the backward by rows, for weights [B, H, N, N]: blocks of residues in the middle."""
    return _rows_launch("point_attention_rows", weights)[0]


def _rows_launch(name: str, weights: Tensor) -> tuple[tuple[int, int, int], dict[str, int]]:
    """Grid and options of a kernel whose programs hold whole rows of weights [B, H, N, N]."""
    batch, heads, n, _ = weights.shape
    length = tuning.power_of_two(n)
    config = dict(tuning.lookup(name, batch=batch, heads=heads, n=length))
    block = config.pop("BLOCK")
    return (heads, tuning.ceil_div(n, block), batch), {"BLOCK_M": block, "BLOCK_N": length, **config}


class _PointAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, q_points: Tensor, k_points: Tensor, v_points: Tensor,
        bias: Tensor, z: Tensor, point_weights: Tensor, mask: Tensor, inf: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        batch, n, heads, width = q.shape
        qk = q.new_empty(2, batch, heads, width + q_points[0, 0, 0].numel(), n)
        values = q.new_empty(batch, n, heads, v.shape[-1] + v_points[0, 0, 0].numel())
        _pack([(q, q_points), (k, k_points), (v, v_points)], [_components(qk[0]), _components(qk[1]), values])
        weights = q.new_empty(batch, heads, n, n)
        attention_weights(qk, bias, point_weights, mask, weights, width, inf)
        out, pair = torch.empty_like(values), q.new_empty(batch, n, heads, z.shape[-1])
        for weights_n, values_n, z_n, out_n, pair_n in zip(weights, values, z, out, pair, strict=True):
            with full_fp32():
                torch.bmm(weights_n, values_n.transpose(0, 1), out=out_n.transpose(0, 1))
            torch.bmm(weights_n.transpose(0, 1), z_n, out=pair_n)
        ctx.save_for_backward(qk, values, z, point_weights, weights)
        ctx.widths = width, v.shape[-1]
        return *_split(out, v.shape[-1]), pair

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Tensor | None, ...]:
        qk, values, z, point_weights, weights = ctx.saved_tensors
        width, v_width = ctx.widths
        d_o, d_points, d_pair = d_outputs
        d_out = torch.empty_like(values)
        _pack([(d_o, d_points)], [d_out])
        d_bias, d_qk = torch.empty_like(weights), torch.empty_like(qk)
        weights_gradient(values, z, d_out, d_pair, d_bias)
        grid = rows_grid(weights)
        partials = qk.new_empty(grid[2] * grid[1], grid[0])
        logits_gradient(qk, point_weights, weights, d_bias, d_qk, partials, width)
        d_point_weights = sum_partials(partials, point_weights.dtype)
        d_values, d_z = torch.empty_like(values), torch.empty(z.shape, dtype=z.dtype, device=z.device)
        for weights_n, d_out_n, d_pair_n, d_values_n, d_z_n in zip(weights, d_out, d_pair, d_values, d_z, strict=True):
            with full_fp32():
                torch.bmm(weights_n.transpose(1, 2), d_out_n.transpose(0, 1), out=d_values_n.transpose(0, 1))
            torch.bmm(weights_n.permute(1, 2, 0), d_pair_n, out=d_z_n)
        d_q, d_q_points = _split(_components(d_qk[0]), width)
        d_k, d_k_points = _split(_components(d_qk[1]), width)
        d_v, d_v_points = _split(d_values, v_width)
        d_bias = d_bias.permute(0, 2, 3, 1)
        return d_q, d_k, d_v, d_q_points, d_k_points, d_v_points, d_bias, d_z, d_point_weights, None, None


def attention_weights(
    qk: Tensor, bias: Tensor, point_weights: Tensor, mask: Tensor, weights: Tensor, width: int, inf: float
) -> None:
    """Fill ``weights`` [B, H, N, N] from packed q and k [2, B, H, C, N], of which ``width`` are channels."""
    grid, options = _rows_launch("point_attention_forward", weights)
    _forward_kernel[grid](
        qk[0], qk[1], _view(bias), point_weights, _view(mask), weights, weights.shape[-1], (3.0 * width) ** -0.5, inf,
        D=width, C=qk.shape[3], **options,
    )  # fmt: skip


def weights_gradient(values: Tensor, z: Tensor, d_out: Tensor, d_pair: Tensor, d_weights: Tensor) -> None:
    """Fill d_weights [B, H, N, N] from the gradients of packed outputs [B, N, H, C] and of o_pair [B, N, H, c_z]."""
    for values_n, z_n, d_out_n, d_pair_n, d_weights_n in zip(values, z, d_out, d_pair, d_weights, strict=True):
        with full_fp32():
            torch.bmm(d_out_n.transpose(0, 1), values_n.permute(1, 2, 0), out=d_weights_n)
        d_weights_n.transpose(0, 1).baddbmm_(d_pair_n, z_n.transpose(1, 2))


def logits_gradient(
    qk: Tensor, point_weights: Tensor, weights: Tensor, d_weights: Tensor, d_qk: Tensor, partials: Tensor, width: int
) -> None:
    """Fill the gradients of q and k [2, B, H, C, N] and partial sums [programs, H] for the point weights.

    d_weights becomes the gradient of the bias.
    """
    n, sizes, scale = weights.shape[-1], {"D": width, "C": qk.shape[3]}, width**-0.5
    grid, options = _rows_launch("point_attention_rows", weights)
    _rows_kernel[grid](qk[0], qk[1], point_weights, weights, d_weights, d_qk[0], partials, n, scale, **sizes, **options)
    grid, options = _rows_launch("point_attention_columns", weights)
    _columns_kernel[grid](qk[0], qk[1], point_weights, d_weights, d_qk[1], n, scale, **sizes, **options)


def obstacle(*arguments: Any) -> str | None:
    """Why ``invariant_point_attention`` does not take these arguments, or None."""
    *tensors, _ = arguments
    if any(x.dtype != torch.float32 for x in tensors):
        return "not everything is float32"
    if not all(x.numel() for x in tensors):
        return "an argument is empty"
    num_res = tensors[0].shape[1]
    return f"{num_res} residues, at most {LONGEST}" if num_res > LONGEST else None


def invariant_point_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_points: Tensor,
    k_points: Tensor,
    v_points: Tensor,
    bias: Tensor,
    z: Tensor,
    point_weights: Tensor,
    mask: Tensor,
    inf: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """``reference.invariant_point_attention``, once differentiable: four launches forward, eight backward at B = 1.

    Inputs of any strides, fp32, of at most LONGEST residues.
    Saved: z, the point weights, packed copies of q, k, v and points, and the attention weights [B, H, N, N].
    """
    tensors = (q, k, v, q_points, k_points, v_points, bias, z, point_weights, mask)
    return _PointAttention.apply(*tensors, inf)  # type: ignore[return-value]


def _default(fields: tuning.Fields, capability: int) -> tuning.Config:
    return {"BLOCK": max(1, min(16, TILE // int(fields["n"]))), "num_warps": 4}


for _name in ("point_attention_forward", "point_attention_rows", "point_attention_columns"):
    tuning.register(_name, _default)


def compile_cases() -> list[tuple[str, Callable[[], None]]]:
    """Forward and backward at the benchmark's shapes on meta tensors; see ``tuning``."""
    return [("point_attention", lambda: _meta_run(256)), ("point_attention_evaluation", lambda: _meta_run(704))]


def _meta_run(n: int) -> None:
    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta", requires_grad=True)

    projected = empty(1, n, 12, 48).split(16, dim=-1)
    points = empty(1, n, 12, 16, 3).split((4, 4, 8), dim=-2)
    mask = torch.empty((1, n), device="meta")
    outputs = invariant_point_attention(
        *projected, *points, empty(1, n, n, 12), empty(1, n, n, 128), empty(12), mask, 1e5
    )
    torch.autograd.backward(outputs, [torch.empty_like(output) for output in outputs])
