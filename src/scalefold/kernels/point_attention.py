"""Weights of invariant point attention in Triton, forward and backward (Supplement Algorithm 22).

Scalar products, point distances, bias, mask and softmax of a block of rows stay in registers, where the plain form
stores an array [N, N, H, P, 3] several times per iteration of the structure module. The products of the weights with
values, points and pair representation stay with the library. Saved: the inputs and the weights. All in fp32, the
coordinates element-wise; each gradient has a single writer.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from scalefold.kernels import reference, tuning

LONGEST = 2048  # residues whose row fits into registers


def _tile(elements: int, warps: int) -> tuning.Config:
    return {"ELEMENTS": elements, "num_warps": warps}


for _name in ("point_attention_forward", "point_attention_rows", "point_attention_columns"):
    tuning.register(
        _name,
        default=lambda fields, capability: _tile(2048, 4),
        candidates=lambda fields: [_tile(e, w) for e, w in ((1024, 4), (2048, 4), (2048, 8), (4096, 4), (4096, 8))],
    )


@triton.jit
def _load(pointer, strides, b, n, h, c, valid):
    """Channel c of head h at residues n of a tensor [B, N, H, C]."""
    offsets = b * strides[0] + n.to(tl.int64) * strides[1] + h * strides[2] + c * strides[3]
    return tl.load(pointer + offsets, mask=valid, other=0.0)


@triton.jit
def _distances_sq(qp, qp_strides, kp, kp_strides, b, i, j, h, is_i, is_j, POINTS: tl.constexpr):
    """Squared distances summed over the points of a head, tile [i, j]; points as [B, N, H, 3 P]."""
    total = tl.zeros([i.shape[0], j.shape[0]], tl.float32)
    for c in tl.static_range(POINTS):
        here = _load(qp, qp_strides, b, i, h, c, is_i)
        there = _load(kp, kp_strides, b, j, h, c, is_j)
        difference = here[:, None] - there[None, :]
        total += difference * difference
    return total


@triton.jit
def _forward_kernel(
    q, q_strides, k, k_strides, qp, qp_strides, kp, kp_strides, bias, bias_strides, point_weights, mask, weights,
    N, H, scale, bias_scale, inf, D: tl.constexpr, POINTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (block of rows i, head, sample): softmax over all j."""
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    i, j = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    is_i, is_j = i < N, j < N
    logits = tl.zeros([ROWS, BLOCK], tl.float32)
    for d in tl.static_range(D):
        here, there = _load(q, q_strides, b, i, h, d, is_i), _load(k, k_strides, b, j, h, d, is_j)
        logits += here[:, None] * there[None, :]
    inside = is_i[:, None] & is_j[None, :]
    offsets = b * bias_strides[0] + i[:, None].to(tl.int64) * bias_strides[1] + j[None, :] * bias_strides[2]
    logits = logits * scale + tl.load(bias + offsets + h * bias_strides[3], mask=inside, other=0.0) * bias_scale
    distance_sq = _distances_sq(qp, qp_strides, kp, kp_strides, b, i, j, h, is_i, is_j, POINTS)
    logits -= 0.5 * tl.load(point_weights + h) * distance_sq
    keep_i = tl.load(mask + b * N + i, mask=is_i, other=0.0)
    keep_j = tl.load(mask + b * N + j, mask=is_j, other=0.0)
    logits += (keep_i[:, None] * keep_j[None, :] - 1.0) * inf
    logits = tl.where(is_j[None, :], logits, -float("inf"))
    exponentials = tl.exp(logits - tl.max(logits, 1)[:, None])
    own = weights + ((b * H + h) * N + i[:, None]) * N + j[None, :]
    tl.store(own, exponentials / tl.sum(exponentials, 1)[:, None], mask=inside)


@triton.jit
def _rows_backward_kernel(
    d_weights, weights, k, k_strides, qp, qp_strides, kp, kp_strides, point_weights, d_logits, dq, dqp, partials,
    N, H, scale, D: tl.constexpr, POINTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (block of rows i, head, sample): gradients of logits, q and its points; sum for the head's weight."""
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    i, j = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    is_i, is_j = i < N, j < N
    inside = is_i[:, None] & is_j[None, :]
    own = ((b * H + h) * N + i[:, None]) * N + j[None, :]
    p = tl.load(weights + own, mask=inside, other=0.0)
    d = tl.load(d_weights + own, mask=inside, other=0.0)
    d = p * (d - tl.sum(p * d, 1)[:, None])
    tl.store(d_logits + own, d, mask=inside)
    for c in tl.static_range(D):
        there = _load(k, k_strides, b, j, h, c, is_j)
        tl.store(dq + ((b * N + i) * H + h) * D + c, tl.sum(d * there[None, :], 1) * scale, mask=is_i)
    weight = tl.load(point_weights + h)
    total = tl.zeros([ROWS], tl.float32)
    for c in tl.static_range(POINTS):
        here, there = _load(qp, qp_strides, b, i, h, c, is_i), _load(kp, kp_strides, b, j, h, c, is_j)
        difference = here[:, None] - there[None, :]
        pull = tl.sum(d * difference, 1)
        tl.store(dqp + ((b * N + i) * H + h) * POINTS + c, -weight * pull, mask=is_i)
        total += tl.sum(d * difference * difference, 1)
    tl.store(partials + (b * tl.num_programs(0) + tl.program_id(0)) * H + h, -0.5 * tl.sum(total, 0))


@triton.jit
def _columns_backward_kernel(
    d_logits, q, q_strides, qp, qp_strides, kp, kp_strides, point_weights, dk, dkp, N, H, scale,
    D: tl.constexpr, POINTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (block of columns j, head, sample): gradients of k and its points, summed over all i."""
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    i, j = tl.arange(0, BLOCK), tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_i, is_j = i < N, j < N
    own = ((b * H + h) * N + i[:, None]) * N + j[None, :]
    d = tl.load(d_logits + own, mask=is_i[:, None] & is_j[None, :], other=0.0)
    for c in tl.static_range(D):
        here = _load(q, q_strides, b, i, h, c, is_i)
        tl.store(dk + ((b * N + j) * H + h) * D + c, tl.sum(d * here[:, None], 0) * scale, mask=is_j)
    weight = tl.load(point_weights + h)
    for c in tl.static_range(POINTS):
        here, there = _load(qp, qp_strides, b, i, h, c, is_i), _load(kp, kp_strides, b, j, h, c, is_j)
        pull = tl.sum(d * (here[:, None] - there[None, :]), 0)
        tl.store(dkp + ((b * N + j) * H + h) * POINTS + c, weight * pull, mask=is_j)


class _Weights(torch.autograd.Function):
    """Arguments: q, k [B, N, H, D], points [B, N, H, 3 P], bias [B, N, N, H], point weights [H], mask [B, N], inf."""

    @staticmethod
    def forward(ctx, q, k, qp, kp, bias, point_weights, mask, inf):
        batch, n, heads, width = q.shape
        ctx.scales = scale, bias_scale = (3.0 * width) ** -0.5, (1.0 / 3.0) ** 0.5
        weights = q.new_empty(batch, heads, n, n)
        config, blocks = _config("point_attention_forward", n)
        _forward_kernel[(blocks, heads, batch)](
            q, q.stride(), k, k.stride(), qp, qp.stride(), kp, kp.stride(), bias, bias.stride(), point_weights,
            mask.contiguous(), weights, n, heads, scale, bias_scale, inf, D=width, POINTS=qp.shape[-1], **config,
        )  # fmt: skip
        ctx.save_for_backward(q, k, qp, kp, point_weights, weights)
        return weights

    @staticmethod
    @once_differentiable
    def backward(ctx, d_weights):
        q, k, qp, kp, point_weights, weights = ctx.saved_tensors
        batch, n, heads, width = q.shape
        scale, bias_scale = ctx.scales
        d_logits = torch.empty_like(weights)
        dq, dk, dqp, dkp = (x.new_empty(x.shape) for x in (q, k, qp, kp))
        sizes = {"D": width, "POINTS": qp.shape[-1]}
        config, blocks = _config("point_attention_rows", n)
        partials = q.new_empty(batch * blocks, heads)
        _rows_backward_kernel[(blocks, heads, batch)](
            d_weights.contiguous(), weights, k, k.stride(), qp, qp.stride(), kp, kp.stride(), point_weights, d_logits,
            dq, dqp, partials, n, heads, scale, **sizes, **config,
        )  # fmt: skip
        config, blocks = _config("point_attention_columns", n)
        _columns_backward_kernel[(blocks, heads, batch)](
            d_logits, q, q.stride(), qp, qp.stride(), kp, kp.stride(), point_weights, dk, dkp, n, heads, scale,
            **sizes, **config,
        )  # fmt: skip
        return dq, dk, dqp, dkp, (d_logits * bias_scale).permute(0, 2, 3, 1), partials.sum(0), None, None


def _config(name: str, n: int) -> tuple[tuning.Config, int]:
    """Launch parameters for rows of n residues, and the number of blocks of rows."""
    block = 1 << (n - 1).bit_length()
    chosen = tuning.lookup(name, residues=block)
    rows = max(1, min(chosen["ELEMENTS"] // block, block))
    return {"ROWS": rows, "BLOCK": block, "num_warps": chosen["num_warps"]}, -(-n // rows)


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
    """``reference.invariant_point_attention`` in fp32 for up to 2048 residues; all else takes the plain definition."""
    given = (q, k, q_points, k_points, bias, point_weights, mask)
    if not all(x.dtype == torch.float32 for x in given) or not 0 < q.shape[1] <= LONGEST:
        return reference.invariant_point_attention(
            q, k, v, q_points, k_points, v_points, bias, z, point_weights, mask, inf
        )
    weights = _Weights.apply(q, k, q_points.flatten(-2), k_points.flatten(-2), bias, point_weights, mask, inf)
    return reference.weigh_values_points_and_pairs(weights, v, v_points, z)  # type: ignore[arg-type]


def compile_cases() -> list[tuple[str, Callable[[], None]]]:
    """A benchmark crop; see ``tuning``."""
    return [("point_attention", _meta_call)]


def _meta_call() -> None:
    def empty(*shape: int) -> Tensor:
        return torch.empty(1, *shape, device="meta", requires_grad=True)

    scalars = [empty(256, 12, 16) for _ in range(3)]
    points = [empty(256, 12, count, 3) for count in (4, 4, 8)]
    weights, mask = empty(12).view(12), torch.empty(1, 256, device="meta")
    outputs = invariant_point_attention(
        *scalars, *points, empty(256, 256, 12), empty(256, 256, 128), weights, mask, 1e5
    )
    torch.autograd.backward(outputs, [torch.empty_like(output) for output in outputs])
