"""Frame-aligned point error in Triton, forward and backward: nothing of size frames x points is ever stored.

The plain form writes some sixty such arrays (88 MB each for the side chains of a benchmark crop). Here every program
keeps a tile of differences in registers: one kernel forward; backward one over frames and one over points, so that
each gradient has a single writer and results repeat bit for bit. Saved: the inputs. All element-wise in fp32.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from collections.abc import Callable
from math import prod
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from scalefold.kernels import tuning
from scalefold.kernels.instructions import program, wait_for_predecessors
from scalefold.kernels.reference import POINT_ERROR_EPS

EPS = tl.constexpr(POINT_ERROR_EPS)


def _tile(frames: int, points: int) -> tuning.Config:
    return {"BLOCK_F": frames, "BLOCK_P": points, "num_warps": 4}


# Few frames or few points per program, so that 256 frames of eight iterations still fill a GPU.
tuning.register("point_errors_frames", lambda fields, capability: _tile(8, 64))
tuning.register("point_errors_points", lambda fields, capability: _tile(32, 16))


@triton.jit
def _load_vectors(pointer, index, valid):
    """Three neighbouring numbers at each index."""
    first = pointer + index * 3
    x = tl.load(first, mask=valid, other=0.0)
    y = tl.load(first + 1, mask=valid, other=0.0)
    return x, y, tl.load(first + 2, mask=valid, other=0.0)


@triton.jit
def _store_vectors(pointer, index, x, y, z, valid):
    """What ``_load_vectors`` loads."""
    first = pointer + index * 3
    tl.store(first, x, mask=valid)
    tl.store(first + 1, y, mask=valid)
    tl.store(first + 2, z, mask=valid)


@triton.jit
def _load_frames(rotation, translation, index, valid):
    """Rows of the rotations, and the translations: twelve vectors [F]."""
    xx, xy, xz = _load_vectors(rotation, index * 3, valid)
    yx, yy, yz = _load_vectors(rotation, index * 3 + 1, valid)
    zx, zy, zz = _load_vectors(rotation, index * 3 + 2, valid)
    tx, ty, tz = _load_vectors(translation, index, valid)
    return xx, xy, xz, yx, yy, yz, zx, zy, zz, tx, ty, tz


@triton.jit
def _seen(frames, points):
    """Points [P] seen from frames [F]: relative to their origins, then turned; six tiles [F, P]."""
    xx, xy, xz, yx, yy, yz, zx, zy, zz, tx, ty, tz = frames
    x, y, z = points
    x, y, z = x[None, :] - tx[:, None], y[None, :] - ty[:, None], z[None, :] - tz[:, None]
    u = xx[:, None] * x + yx[:, None] * y + zx[:, None] * z
    v = xy[:, None] * x + yy[:, None] * y + zy[:, None] * z
    w = xz[:, None] * x + yz[:, None] * y + zz[:, None] * z
    return x, y, z, u, v, w


@triton.jit
def _differences(frames, points, target_frames, target_points):
    """Points relative to the origins of their frames, and by how much they are seen elsewhere than in the truth."""
    x, y, z, u, v, w = _seen(frames, points)
    _, _, _, r, s, t = _seen(target_frames, target_points)
    return x, y, z, u - r, v - s, w - t


@triton.jit
def _slope(u, v, w, clamp, clamp_weight):
    """Derivative of a tile of costs by the differences, divided by the differences."""
    error = tl.sqrt(u * u + v * v + w * w + EPS)
    return (clamp_weight * tl.where(error <= clamp, 1.0, 0.0) + (1.0 - clamp_weight)) / error


@program
@triton.jit
def _forward_kernel(
    rotation, translation, target_rotation, target_translation, frames_mask, points, target_points, points_mask,
    clamp_weights, sums, num_frames, num_points, repeat, clamp, BLOCK_F: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Program (block of frames, item): their masked sums over all points."""
    wait_for_predecessors()
    item = tl.program_id(1).to(tl.int64)
    truth = item // repeat
    frame = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    is_frame = frame < num_frames
    clamp_weight = tl.load(clamp_weights + item)
    own = _load_frames(rotation, translation, item * num_frames + frame, is_frame)
    true = _load_frames(target_rotation, target_translation, truth * num_frames + frame, is_frame)
    total = tl.zeros([BLOCK_F, BLOCK_P], tl.float32)
    for start in range(0, num_points, BLOCK_P):
        point = start + tl.arange(0, BLOCK_P)
        is_point = point < num_points
        p = _load_vectors(points, item * num_points + point, is_point)
        q = _load_vectors(target_points, truth * num_points + point, is_point)
        _, _, _, u, v, w = _differences(own, p, true, q)
        error = tl.sqrt(u * u + v * v + w * w + EPS)
        keep = tl.load(points_mask + truth * num_points + point, mask=is_point, other=0.0)
        total += (clamp_weight * tl.minimum(error, clamp) + (1.0 - clamp_weight) * error) * keep[None, :]
    keep = tl.load(frames_mask + truth * num_frames + frame, mask=is_frame, other=0.0)
    tl.store(sums + item * num_frames + frame, tl.sum(total, 1) * keep, mask=is_frame)


@program
@triton.jit
def _frames_backward_kernel(
    d, rotation, translation, target_rotation, target_translation, frames_mask, points, target_points, points_mask,
    clamp_weights, d_rotation, d_translation, num_frames, num_points, repeat, clamp,
    BLOCK_F: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Program (block of frames, item): gradients of their rotations and translations."""
    wait_for_predecessors()
    item = tl.program_id(1).to(tl.int64)
    truth = item // repeat
    frame = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    is_frame = frame < num_frames
    clamp_weight = tl.load(clamp_weights + item)
    own = _load_frames(rotation, translation, item * num_frames + frame, is_frame)
    true = _load_frames(target_rotation, target_translation, truth * num_frames + frame, is_frame)
    zero = tl.zeros([BLOCK_F, BLOCK_P], tl.float32)
    gx, gy, gz = zero, zero, zero
    gxx, gxy, gxz, gyx, gyy, gyz, gzx, gzy, gzz = zero, zero, zero, zero, zero, zero, zero, zero, zero
    for start in range(0, num_points, BLOCK_P):
        point = start + tl.arange(0, BLOCK_P)
        is_point = point < num_points
        p = _load_vectors(points, item * num_points + point, is_point)
        q = _load_vectors(target_points, truth * num_points + point, is_point)
        x, y, z, u, v, w = _differences(own, p, true, q)
        keep = tl.load(points_mask + truth * num_points + point, mask=is_point, other=0.0)
        slope = _slope(u, v, w, clamp, clamp_weight) * keep[None, :]
        u, v, w = u * slope, v * slope, w * slope
        gx, gy, gz = gx + u, gy + v, gz + w
        gxx, gxy, gxz = gxx + x * u, gxy + x * v, gxz + x * w
        gyx, gyy, gyz = gyx + y * u, gyy + y * v, gyz + y * w
        gzx, gzy, gzz = gzx + z * u, gzy + z * v, gzz + z * w
    scale = tl.load(frames_mask + truth * num_frames + frame, mask=is_frame, other=0.0) * tl.load(d + item)
    u, v, w = tl.sum(gx, 1) * scale, tl.sum(gy, 1) * scale, tl.sum(gz, 1) * scale
    xx, xy, xz, yx, yy, yz, zx, zy, zz, _, _, _ = own
    x, y, z = -(xx * u + xy * v + xz * w), -(yx * u + yy * v + yz * w), -(zx * u + zy * v + zz * w)
    index = item * num_frames + frame
    _store_vectors(d_translation, index, x, y, z, is_frame)
    x, y, z = tl.sum(gxx, 1) * scale, tl.sum(gxy, 1) * scale, tl.sum(gxz, 1) * scale
    _store_vectors(d_rotation, index * 3, x, y, z, is_frame)
    x, y, z = tl.sum(gyx, 1) * scale, tl.sum(gyy, 1) * scale, tl.sum(gyz, 1) * scale
    _store_vectors(d_rotation, index * 3 + 1, x, y, z, is_frame)
    x, y, z = tl.sum(gzx, 1) * scale, tl.sum(gzy, 1) * scale, tl.sum(gzz, 1) * scale
    _store_vectors(d_rotation, index * 3 + 2, x, y, z, is_frame)


@program
@triton.jit
def _points_backward_kernel(
    d, rotation, translation, target_rotation, target_translation, frames_mask, points, target_points, points_mask,
    clamp_weights, d_points, num_frames, num_points, repeat, clamp, BLOCK_F: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Program (block of points, item): their gradients, summed over all frames."""
    wait_for_predecessors()
    item = tl.program_id(1).to(tl.int64)
    truth = item // repeat
    point = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    is_point = point < num_points
    clamp_weight = tl.load(clamp_weights + item)
    p = _load_vectors(points, item * num_points + point, is_point)
    q = _load_vectors(target_points, truth * num_points + point, is_point)
    zero = tl.zeros([BLOCK_F, BLOCK_P], tl.float32)
    gx, gy, gz = zero, zero, zero
    for start in range(0, num_frames, BLOCK_F):
        frame = start + tl.arange(0, BLOCK_F)
        is_frame = frame < num_frames
        own = _load_frames(rotation, translation, item * num_frames + frame, is_frame)
        true = _load_frames(target_rotation, target_translation, truth * num_frames + frame, is_frame)
        _, _, _, u, v, w = _differences(own, p, true, q)
        keep = tl.load(frames_mask + truth * num_frames + frame, mask=is_frame, other=0.0)
        slope = _slope(u, v, w, clamp, clamp_weight) * keep[:, None]
        u, v, w = u * slope, v * slope, w * slope
        xx, xy, xz, yx, yy, yz, zx, zy, zz, _, _, _ = own
        gx += xx[:, None] * u + xy[:, None] * v + xz[:, None] * w
        gy += yx[:, None] * u + yy[:, None] * v + yz[:, None] * w
        gz += zx[:, None] * u + zy[:, None] * v + zz[:, None] * w
    scale = tl.load(points_mask + truth * num_points + point, mask=is_point, other=0.0) * tl.load(d + item)
    x, y, z = tl.sum(gx, 0) * scale, tl.sum(gy, 0) * scale, tl.sum(gz, 0) * scale
    _store_vectors(d_points, item * num_points + point, x, y, z, is_point)


class _PointErrors(torch.autograd.Function):
    """Arguments: those of ``point_errors``, all dense, ``clamp_weight`` with the predictions' leading dimensions."""

    @staticmethod
    def forward(ctx, *arguments):
        *tensors, clamp = arguments
        ctx.save_for_backward(*tensors)
        ctx.clamp = clamp
        rotation, target, points = tensors[0], tensors[2], tensors[5]
        num_frames, num_points, items, repeat = _sizes(rotation, target, points)
        sums = rotation.new_empty(*rotation.shape[:-2])
        config = _config("point_errors_frames", num_frames, num_points)
        _forward_kernel[(triton.cdiv(num_frames, config["BLOCK_F"]), items)](
            *tensors, sums, num_frames, num_points, repeat, clamp, **config
        )
        return sums.sum(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx, d):
        tensors = ctx.saved_tensors
        rotation, translation, target, points = tensors[0], tensors[1], tensors[2], tensors[5]
        num_frames, num_points, items, repeat = _sizes(rotation, target, points)
        d, sizes = d.contiguous(), (num_frames, num_points, repeat, ctx.clamp)
        d_rotation, d_translation, d_points = (torch.empty_like(x) for x in (rotation, translation, points))
        config = _config("point_errors_frames", num_frames, num_points)
        _frames_backward_kernel[(triton.cdiv(num_frames, config["BLOCK_F"]), items)](
            d, *tensors, d_rotation, d_translation, *sizes, **config
        )
        config = _config("point_errors_points", num_frames, num_points)
        _points_backward_kernel[(triton.cdiv(num_points, config["BLOCK_P"]), items)](
            d, *tensors, d_points, *sizes, **config
        )
        return d_rotation, d_translation, None, None, None, d_points, None, None, None, None


def _sizes(rotation: Tensor, target: Tensor, points: Tensor) -> tuple[int, int, int, int]:
    """Frames, points, items, and how many neighbouring items share one truth."""
    items = prod(rotation.shape[:-3])
    return rotation.shape[-3], points.shape[-2], items, items // prod(target.shape[:-3])


def _config(name: str, num_frames: int, num_points: int) -> tuning.Config:
    return tuning.lookup(name, frames=num_frames, points=num_points)


def obstacle(*arguments: Any) -> str | None:
    """Why ``point_errors`` does not take these arguments, or None."""
    rotation, _, target_rotation, target_translation, frames_mask, points, target_points, points_mask, *_ = arguments
    lead, shared = rotation.shape[:-3], target_rotation.shape[:-3]
    leads = {target_translation.shape[:-2], frames_mask.shape[:-1], target_points.shape[:-2], points_mask.shape[:-1]}
    if shared not in (lead, (*lead[:-1], 1)) or leads != {shared}:
        return "leading dimensions of the targets are not those of the prediction, or 1 in place of the last"
    if any(x.dtype != torch.float32 for x in arguments[:-1]):
        return "not everything is float32"
    return None if rotation.numel() and points.numel() else "no frames or no points"


def point_errors(
    rotation: Tensor,
    translation: Tensor,
    target_rotation: Tensor,
    target_translation: Tensor,
    frames_mask: Tensor,
    points: Tensor,
    target_points: Tensor,
    points_mask: Tensor,
    clamp_weight: Tensor,
    clamp: float,
) -> Tensor:
    """``reference.point_errors`` in fp32, where targets and masks have the leading dimensions of the prediction, or 1
    in place of the last of them."""
    own, true = (rotation, translation), (target_rotation, target_translation)
    weights = clamp_weight.expand(rotation.shape[:-3])
    arguments = (*own, *true, frames_mask, points, target_points, points_mask, weights)
    different = {id(x): x for x in arguments}  # origins of frames may be the points: copied once
    dense = {key: x.contiguous() for key, x in different.items()}
    return _PointErrors.apply(*(dense[id(x)] for x in arguments), clamp)  # type: ignore[return-value]


def compile_cases() -> list[tuple[str, Callable[[], None]]]:
    """Backbone and side chains of a benchmark crop; see ``tuning``."""
    return [
        ("point_errors_backbone", lambda: _meta_call((1, 8), (1, 1), 256, 256)),
        ("point_errors_sidechain", lambda: _meta_call((1,), (1,), 2048, 3584)),
    ]


def _meta_call(lead: tuple[int, ...], shared: tuple[int, ...], num_frames: int, num_points: int) -> None:
    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta", requires_grad=True)

    frames = (empty(*lead, num_frames, 3, 3), empty(*lead, num_frames, 3))
    target = (empty(*shared, num_frames, 3, 3).detach(), empty(*shared, num_frames, 3).detach())
    masks = (empty(*shared, num_frames).detach(), empty(*shared, num_points).detach())
    true_points, weights = empty(*shared, num_points, 3).detach(), empty(*lead).detach()
    points = empty(*lead, num_points, 3)
    point_errors(*frames, *target, masks[0], points, true_points, masks[1], weights, 10.0).sum().backward()
