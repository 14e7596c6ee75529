"""Triton programs between the projections of s, the kernels of ``ops.point_attention`` and the output's projection.

Columns of the projections, all of one row of s: q [H, D]; k and v [H, 2 D]; then points of q [3, H, P_q] and of k and
v [3, H, P_q + P_v], coordinate by coordinate (``InvariantPointAttention._points``). Attention reads q and k as
components [H, D + 3 P_q, N] and v as rows [H, D + 3 P_v], points in the global frame behind the channels. Features of
the output's projection, F columns: o [H, D]; x, y, z and length of the points in the residue's own frame [4, H, P_v];
o_pair [H, c_z], which the product writes itself. A program holds BLOCK_M residues of one sample. All in fp32.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

from scalefold.kernels.instructions import program, wait_for_predecessors
from scalefold.kernels.structure.frames import (
    load_quaternion,
    load_vector,
    load_vector_to_change,
    rotation_of,
    store_vector,
    turn,
    turn_back,
)

LENGTH_EPS = tl.constexpr(1e-8)


@triton.jit
def _residues(n, BLOCK_M: tl.constexpr):
    """Numbers of this program's residues in their sample [BLOCK_M, 1], which exist, and their rows over all samples."""
    i = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    return i, i < n, tl.program_id(1).to(tl.int64) * n + i


@triton.jit
def _component(h, c, i, n, COMPONENTS: tl.constexpr, H: tl.constexpr):
    """Place of component c of head h of residues i in memory [B, H, COMPONENTS, n]."""
    return ((tl.program_id(1).to(tl.int64) * H + h) * COMPONENTS + c) * n + i


@triton.jit
def _load_places(pointer, x_at, step, keep):
    """Three numbers that lie ``step`` apart."""
    x = tl.load(pointer + x_at, mask=keep, other=0.0)
    y = tl.load(pointer + x_at + step, mask=keep, other=0.0)
    return x, y, tl.load(pointer + x_at + 2 * step, mask=keep, other=0.0)


@triton.jit
def _store_places(pointer, x_at, step, vector, keep):
    """What ``_load_places`` loads."""
    tl.store(pointer + x_at, vector[0], mask=keep)
    tl.store(pointer + x_at + step, vector[1], mask=keep)
    tl.store(pointer + x_at + 2 * step, vector[2], mask=keep)


@program
@triton.jit
def place_kernel(
    projected, quaternion, translation, q, k, values, n,
    H: tl.constexpr, D: tl.constexpr, PQ: tl.constexpr, PV: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Projections of s -> q, k, values; points go to the global frame. BLOCK_*: columns of a group rounded up."""
    wait_for_predecessors()
    C: tl.constexpr = D + 3 * PQ
    i, exists, row = _residues(n, BLOCK_M)
    own = projected + row * (3 * H * (D + 2 * PQ + PV))
    j = tl.arange(0, BLOCK_D)[None, :]
    h, c, keep = j // D, j % D, exists & (j < H * D)
    tl.store(q + _component(h, c, i, n, C, H), tl.load(own + j, mask=keep, other=0.0), mask=keep)
    kv = own + H * D + h * (2 * D) + c
    tl.store(k + _component(h, c, i, n, C, H), tl.load(kv, mask=keep, other=0.0), mask=keep)
    tl.store(values + (row * H + h) * (D + 3 * PV) + c, tl.load(kv + D, mask=keep, other=0.0), mask=keep)
    rotation = rotation_of(load_quaternion(quaternion, row, exists))
    tx, ty, tz = load_vector(translation, row, exists)
    j = tl.arange(0, BLOCK_Q)[None, :]
    keep = exists & (j < H * PQ)
    x, y, z = turn(rotation, _load_places(own + 3 * H * D, j, H * PQ, keep))
    at = _component(j // PQ, D + 3 * (j % PQ), i, n, C, H)
    _store_places(q, at, n, (x + tx, y + ty, z + tz), keep)
    j = tl.arange(0, BLOCK_V)[None, :]
    h, p, keep = j // (PQ + PV), j % (PQ + PV), exists & (j < H * (PQ + PV))
    x, y, z = turn(rotation, _load_places(own + 3 * H * (D + PQ), j, H * (PQ + PV), keep))
    placed = (x + tx, y + ty, z + tz)
    _store_places(k, _component(h, D + 3 * p, i, n, C, H), n, placed, keep & (p < PQ))
    _store_places(values, (row * H + h) * (D + 3 * PV) + D + 3 * (p - PQ), 1, placed, keep & (p >= PQ))


@program
@triton.jit
def place_backward_kernel(
    d_q, d_k, d_values, quaternion, d_translation, d_projected, n,
    H: tl.constexpr, D: tl.constexpr, PQ: tl.constexpr, PV: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Gradients of the projections; d_translation is added to."""
    wait_for_predecessors()
    C: tl.constexpr = D + 3 * PQ
    i, exists, row = _residues(n, BLOCK_M)
    own = d_projected + row * (3 * H * (D + 2 * PQ + PV))
    j = tl.arange(0, BLOCK_D)[None, :]
    h, c, keep = j // D, j % D, exists & (j < H * D)
    tl.store(own + j, tl.load(d_q + _component(h, c, i, n, C, H), mask=keep, other=0.0), mask=keep)
    kv = own + H * D + h * (2 * D) + c
    tl.store(kv, tl.load(d_k + _component(h, c, i, n, C, H), mask=keep, other=0.0), mask=keep)
    tl.store(kv + D, tl.load(d_values + (row * H + h) * (D + 3 * PV) + c, mask=keep, other=0.0), mask=keep)
    rotation = rotation_of(load_quaternion(quaternion, row, exists))
    tx, ty, tz = load_vector_to_change(d_translation, row, exists)
    j = tl.arange(0, BLOCK_Q)[None, :]
    keep = exists & (j < H * PQ)
    x, y, z = _load_places(d_q, _component(j // PQ, D + 3 * (j % PQ), i, n, C, H), n, keep)
    _store_places(own + 3 * H * D, j, H * PQ, turn_back(rotation, (x, y, z)), keep)
    tx += tl.sum(x, 1, keep_dims=True)
    ty += tl.sum(y, 1, keep_dims=True)
    tz += tl.sum(z, 1, keep_dims=True)
    j = tl.arange(0, BLOCK_V)[None, :]
    h, p, keep = j // (PQ + PV), j % (PQ + PV), exists & (j < H * (PQ + PV))
    x, y, z = _load_places(d_k, _component(h, D + 3 * p, i, n, C, H), n, keep & (p < PQ))
    places = (row * H + h) * (D + 3 * PV) + D + 3 * (p - PQ)
    u, v, w = _load_places(d_values, places, 1, keep & (p >= PQ))
    x, y, z = x + u, y + v, z + w
    _store_places(own + 3 * H * (D + PQ), j, H * (PQ + PV), turn_back(rotation, (x, y, z)), keep)
    tx += tl.sum(x, 1, keep_dims=True)
    ty += tl.sum(y, 1, keep_dims=True)
    tz += tl.sum(z, 1, keep_dims=True)
    store_vector(d_translation, row, (tx, ty, tz), exists)


@program
@triton.jit
def features_kernel(
    attended, quaternion, translation, features, n, F,
    H: tl.constexpr, D: tl.constexpr, PV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """attended [rows, H, D + 3 P_v] -> the first H (D + 4 P_v) of F features."""
    wait_for_predecessors()
    _, exists, row = _residues(n, BLOCK_M)
    own = features + row * F
    j = tl.arange(0, BLOCK_D)[None, :]
    keep = exists & (j < H * D)
    channels = attended + (row * H + j // D) * (D + 3 * PV) + j % D
    tl.store(own + j, tl.load(channels, mask=keep, other=0.0), mask=keep)
    rotation = rotation_of(load_quaternion(quaternion, row, exists))
    tx, ty, tz = load_vector(translation, row, exists)
    j = tl.arange(0, BLOCK_P)[None, :]
    keep = exists & (j < H * PV)
    x, y, z = _load_places(attended, (row * H + j // PV) * (D + 3 * PV) + D + 3 * (j % PV), 1, keep)
    x, y, z = turn_back(rotation, (x - tx, y - ty, z - tz))
    _store_places(own + H * D, j, H * PV, (x, y, z), keep)
    tl.store(own + H * (D + 3 * PV) + j, tl.sqrt(x * x + y * y + z * z + LENGTH_EPS), mask=keep)


@program
@triton.jit
def features_backward_kernel(
    d_features, features, quaternion, d_translation, d_attended, n, F,
    H: tl.constexpr, D: tl.constexpr, PV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Gradient of ``attended``; d_translation is added to."""
    wait_for_predecessors()
    _, exists, row = _residues(n, BLOCK_M)
    own, d_own = features + row * F, d_features + row * F
    j = tl.arange(0, BLOCK_D)[None, :]
    keep = exists & (j < H * D)
    channels = d_attended + (row * H + j // D) * (D + 3 * PV) + j % D
    tl.store(channels, tl.load(d_own + j, mask=keep, other=0.0), mask=keep)
    rotation = rotation_of(load_quaternion(quaternion, row, exists))
    j = tl.arange(0, BLOCK_P)[None, :]
    keep = exists & (j < H * PV)
    lengths = H * (D + 3 * PV) + j
    slope = tl.load(d_own + lengths, mask=keep, other=0.0) / tl.load(own + lengths, mask=keep, other=1.0)
    x, y, z = _load_places(own + H * D, j, H * PV, keep)
    u, v, w = _load_places(d_own + H * D, j, H * PV, keep)
    x, y, z = turn(rotation, (u + slope * x, v + slope * y, w + slope * z))
    places = (row * H + j // PV) * (D + 3 * PV) + D + 3 * (j % PV)
    _store_places(d_attended, places, 1, (x, y, z), keep)
    tx, ty, tz = load_vector_to_change(d_translation, row, exists)
    tx -= tl.sum(x, 1, keep_dims=True)
    ty -= tl.sum(y, 1, keep_dims=True)
    tz -= tl.sum(z, 1, keep_dims=True)
    store_vector(d_translation, row, (tx, ty, tz), exists)
