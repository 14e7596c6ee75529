"""From frames and torsions to rigid groups and atoms (Supplement Algorithm 24), in two launches each way.

A residue of an iteration is a lane. Forward: one program turns and chains the eight groups of residues, one places
atoms. Backward: one sums what atoms say about their groups, one takes it back through the chain, whose rotations it
finds again. All element-wise in fp32. Saved: the inputs.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from scalefold.kernels import tuning
from scalefold.kernels.around.frames import (
    load_quaternion,
    load_vector,
    rotation_of,
    store_quaternion,
    store_vector,
    turn,
    turn_back,
)

GROUPS, ATOMS, ANGLES = tl.constexpr(8), tl.constexpr(14), tl.constexpr(7)
CHAINED = tl.constexpr(5)  # the first group that hangs on the one before it
EPS = tl.constexpr(1e-8)  # least squared length of an angle's vector
RESIDUES = {"BLOCK": 32, "num_warps": 1}
ELEMENTS = {"BLOCK": 128, "num_warps": 4}  # atoms or groups


class Tables(NamedTuple):
    """Constants of the residue types; see ``model.structure.AtomPlacement``."""

    frames: Tensor  # [21, 8, 4, 4]
    groups: Tensor  # [21, 14, 8], one-hot
    positions: Tensor  # [21, 14, 3]
    mask: Tensor  # [21, 14]


@triton.jit
def _product(a, b):
    """a times b, rotations."""
    xx, xy, xz, yx, yy, yz, zx, zy, zz = a
    x, y, z = turn((xx, xy, xz, yx, yy, yz, zx, zy, zz), (b[0], b[3], b[6]))
    u, v, w = turn((xx, xy, xz, yx, yy, yz, zx, zy, zz), (b[1], b[4], b[7]))
    r, s, t = turn((xx, xy, xz, yx, yy, yz, zx, zy, zz), (b[2], b[5], b[8]))
    return x, u, r, y, v, s, z, w, t


@triton.jit
def _transposed(a):
    """transpose(a)."""
    return a[0], a[3], a[6], a[1], a[4], a[7], a[2], a[5], a[8]


@triton.jit
def _sum(a, b):
    """a + b, rotations."""
    return (
        a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3], a[4] + b[4], a[5] + b[5], a[6] + b[6], a[7] + b[7],
        a[8] + b[8],
    )  # fmt: skip


@triton.jit
def _outer(a, b):
    """a transpose(b), vectors."""
    return (
        a[0] * b[0], a[0] * b[1], a[0] * b[2], a[1] * b[0], a[1] * b[1], a[1] * b[2], a[2] * b[0], a[2] * b[1],
        a[2] * b[2],
    )  # fmt: skip


@triton.jit
def _load_matrix(pointer, index, exists):
    """Rotation and translation of a homogeneous matrix."""
    at = pointer + index * 16
    xx, xy = tl.load(at, mask=exists, other=0.0), tl.load(at + 1, mask=exists, other=0.0)
    xz, tx = tl.load(at + 2, mask=exists, other=0.0), tl.load(at + 3, mask=exists, other=0.0)
    yx, yy = tl.load(at + 4, mask=exists, other=0.0), tl.load(at + 5, mask=exists, other=0.0)
    yz, ty = tl.load(at + 6, mask=exists, other=0.0), tl.load(at + 7, mask=exists, other=0.0)
    zx, zy = tl.load(at + 8, mask=exists, other=0.0), tl.load(at + 9, mask=exists, other=0.0)
    zz, tz = tl.load(at + 10, mask=exists, other=0.0), tl.load(at + 11, mask=exists, other=0.0)
    return (xx, xy, xz, yx, yy, yz, zx, zy, zz), (tx, ty, tz)


@triton.jit
def _store_matrix(pointer, index, rotation, translation, exists):
    """What ``_load_matrix`` loads, and the last line."""
    at, zero = pointer + index * 16, tl.zeros(index.shape, tl.float32)
    for k in tl.static_range(3):
        tl.store(at + 4 * k, rotation[3 * k], mask=exists)
        tl.store(at + 4 * k + 1, rotation[3 * k + 1], mask=exists)
        tl.store(at + 4 * k + 2, rotation[3 * k + 2], mask=exists)
        tl.store(at + 4 * k + 3, translation[k], mask=exists)
        tl.store(at + 12 + k, zero, mask=exists)
    tl.store(at + 15, zero + 1.0, mask=exists)


@triton.jit
def _angle(unnormalised, rows, k: tl.constexpr, exists):
    """sin and cos of angle k before normalisation, and the length that divides them."""
    at = unnormalised + (rows * ANGLES + k) * 2
    sin, cos = tl.load(at, mask=exists, other=0.0), tl.load(at + 1, mask=exists, other=0.0)
    return sin, cos, tl.sqrt(tl.maximum(sin * sin + cos * cos, EPS))


@triton.jit
def _turned(rotation, sin, cos):
    """A rotation after a turn about its x axis."""
    xx, xy, xz, yx, yy, yz, zx, zy, zz = rotation
    return (
        xx, cos * xy + sin * xz, cos * xz - sin * xy,
        yx, cos * yy + sin * yz, cos * yz - sin * yy,
        zx, cos * zy + sin * zz, cos * zz - sin * zy,
    )  # fmt: skip


@triton.jit
def _local(tables, unnormalised, rows, kind, g: tl.constexpr, exists):
    """Turned default frame of group g, before it is chained: rotation, translation."""
    rotation, translation = _load_matrix(tables.frames, kind * GROUPS + g, exists)
    if g > 0:
        sin, cos, length = _angle(unnormalised, rows, g - 1, exists)
        rotation = _turned(rotation, sin / length, cos / length)
    return rotation, translation


@triton.jit
def _moved(rotation, translation, vector):
    """A point in a frame."""
    x, y, z = turn(rotation, vector)
    return x + translation[0], y + translation[1], z + translation[2]


@triton.jit
def _kind(aatype, rows, exists, n, num_iterations):
    """Residue types of rows [sample, iteration, residue]."""
    return tl.load(aatype + rows // (n * num_iterations) * n + rows % n, mask=exists, other=0)


@triton.jit
def _groups_kernel(
    quaternions, translations, unnormalised, aatype, tables, frames, groups, angles, num_rows, n, num_iterations, scale,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Tile of residues: frames [rows, 7], groups [rows, 8, 4, 4], angles [rows, 7, 2]; translations times scale."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = rows < num_rows
    kind = _kind(aatype, rows, exists, n, num_iterations)
    quaternion = load_quaternion(quaternions, rows, exists)
    x, y, z = load_vector(translations, rows, exists)
    origin, backbone = (x * scale, y * scale, z * scale), rotation_of(quaternion)
    for k in tl.static_range(4):
        tl.store(frames + rows * 7 + k, quaternion[k], mask=exists)
    for k in tl.static_range(3):
        tl.store(frames + rows * 7 + 4 + k, origin[k], mask=exists)
    for k in tl.static_range(ANGLES):
        sin, cos, length = _angle(unnormalised, rows, k, exists)
        tl.store(angles + (rows * ANGLES + k) * 2, sin / length, mask=exists)
        tl.store(angles + (rows * ANGLES + k) * 2 + 1, cos / length, mask=exists)
    rotation, translation = _local(tables, unnormalised, rows, kind, 0, exists)
    for g in tl.static_range(GROUPS):
        own, place = _local(tables, unnormalised, rows, kind, g, exists)
        if g >= CHAINED:
            place = _moved(rotation, translation, place)
            own = _product(rotation, own)
        rotation, translation = own, place
        moved = _moved(backbone, origin, translation)
        _store_matrix(groups, rows * GROUPS + g, _product(backbone, rotation), moved, exists)


@triton.jit
def _atoms_kernel(groups, aatype, tables, positions, num_atoms, n, num_iterations, BLOCK: tl.constexpr):
    """Tile of atoms [rows, 14]: their places in their groups' frames, zero for those that the residue lacks."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = index < num_atoms
    rows, slot = index // ATOMS, index % ATOMS
    atom = _kind(aatype, rows, exists, n, num_iterations) * ATOMS + slot
    group = tl.zeros([BLOCK], tl.int64)
    for g in tl.static_range(1, GROUPS):
        group += tl.where(tl.load(tables.groups + atom * GROUPS + g, mask=exists, other=0.0) > 0.0, g, 0)
    rotation, translation = _load_matrix(groups, rows.to(tl.int64) * GROUPS + group, exists)
    x, y, z = _moved(rotation, translation, load_vector(tables.positions, atom, exists))
    mask = tl.load(tables.mask + atom, mask=exists, other=0.0)
    store_vector(positions, index, (x * mask, y * mask, z * mask), exists)


@triton.jit
def _atoms_backward_kernel(
    d_positions, d_groups, aatype, tables, d_frames, num_groups, n, num_iterations, BLOCK: tl.constexpr
):
    """Tile of groups [rows, 8]: d_frames [rows, 8, 4, 4] is d_groups plus what the group's atoms hand back."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = index < num_groups
    rows, g = index // GROUPS, index % GROUPS
    kind = _kind(aatype, rows, exists, n, num_iterations)
    rotation, translation = _load_matrix(d_groups, index, exists)
    xx, xy, xz, yx, yy, yz, zx, zy, zz = rotation
    tx, ty, tz = translation
    for slot in range(ATOMS):
        atom = kind * ATOMS + slot
        mask = tl.load(tables.groups + atom * GROUPS + g, mask=exists, other=0.0)
        mask *= tl.load(tables.mask + atom, mask=exists, other=0.0)
        x, y, z = load_vector(d_positions, rows * ATOMS + slot, exists & (mask > 0.0))
        u, v, w = load_vector(tables.positions, atom, exists)
        xx, xy, xz, tx = xx + x * u, xy + x * v, xz + x * w, tx + x
        yx, yy, yz, ty = yx + y * u, yy + y * v, yz + y * w, ty + y
        zx, zy, zz, tz = zx + z * u, zy + z * v, zz + z * w, tz + z
    _store_matrix(d_frames, index, (xx, xy, xz, yx, yy, yz, zx, zy, zz), (tx, ty, tz), exists)


@triton.jit
def _turning_gradient(default, d):
    """Gradients of sin and cos of ``_turned``."""
    d_cos = d[1] * default[1] + d[4] * default[4] + d[7] * default[7]
    d_cos += d[2] * default[2] + d[5] * default[5] + d[8] * default[8]
    d_sin = d[1] * default[2] + d[4] * default[5] + d[7] * default[8]
    d_sin -= d[2] * default[1] + d[5] * default[4] + d[8] * default[7]
    return d_sin, d_cos


@triton.jit
def _store_angle_gradient(unnormalised, d_angles, d_unnormalised, out, rows, k: tl.constexpr, d_sin, d_cos, exists):
    """Gradient of angle k before normalisation, for that of the turn and those of both outputs."""
    sin, cos, length = _angle(unnormalised, rows, k, exists)
    at = (rows * ANGLES + k) * 2
    d_sin += tl.load(d_angles + at, mask=exists, other=0.0)
    d_cos += tl.load(d_angles + at + 1, mask=exists, other=0.0)
    along = tl.where(sin * sin + cos * cos >= EPS, (d_sin * sin + d_cos * cos) / (length * length), 0.0)
    d_sin, d_cos = (d_sin - sin * along) / length, (d_cos - cos * along) / length
    tl.store(out + at, d_sin + tl.load(d_unnormalised + at, mask=exists, other=0.0), mask=exists)
    tl.store(out + at + 1, d_cos + tl.load(d_unnormalised + at + 1, mask=exists, other=0.0), mask=exists)


@triton.jit
def _rotation_gradient(quaternion, d):
    """Gradient of a quaternion for that of its rotation."""
    w, x, y, z = quaternion
    xx, xy, xz, yx, yy, yz, zx, zy, zz = d
    return (
        2.0 * (w * (xx + yy + zz) + z * (yx - xy) + y * (xz - zx) + x * (zy - yz)),
        2.0 * (x * (xx - yy - zz) + y * (xy + yx) + z * (xz + zx) + w * (zy - yz)),
        2.0 * (y * (yy - xx - zz) + x * (xy + yx) + z * (yz + zy) + w * (xz - zx)),
        2.0 * (z * (zz - xx - yy) + x * (xz + zx) + y * (yz + zy) + w * (yx - xy)),
    )


@triton.jit
def _chained(tables, unnormalised, rows, kind, last: tl.constexpr, exists):
    """Frame of group ``last`` in the backbone's, chained: rotation, translation."""
    if last < CHAINED:
        rotation, translation = _local(tables, unnormalised, rows, kind, last, exists)
    else:
        rotation, translation = _local(tables, unnormalised, rows, kind, CHAINED - 1, exists)
        for g in tl.static_range(CHAINED, last + 1):
            own, place = _local(tables, unnormalised, rows, kind, g, exists)
            translation = _moved(rotation, translation, place)
            rotation = _product(rotation, own)
    return rotation, translation


@triton.jit
def _groups_backward_kernel(
    quaternions, unnormalised, aatype, tables, d_matrices, d_frames, d_angles, d_unnormalised, d_quaternion,
    d_translation, d_out, num_rows, n, num_iterations, scale, BLOCK: tl.constexpr,
):  # fmt: skip
    """Tile of residues: gradients of quaternions, translations and of angles before normalisation (d_out).

    d_matrices: of all groups; d_frames, d_angles, d_unnormalised: of the other outputs.
    """
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = rows < num_rows
    kind = _kind(aatype, rows, exists, n, num_iterations)
    quaternion = load_quaternion(quaternions, rows, exists)
    backbone, zero = rotation_of(quaternion), tl.zeros([BLOCK], tl.float32)
    d_backbone = (zero, zero, zero, zero, zero, zero, zero, zero, zero)
    carried = d_backbone
    tx, ty, tz = zero, zero, zero
    cx, cy, cz = zero, zero, zero
    for g in tl.static_range(GROUPS - 1, -1, -1):
        d_rotation, d_place = _load_matrix(d_matrices, rows * GROUPS + g, exists)
        rotation, place = _chained(tables, unnormalised, rows, kind, g, exists)
        d_backbone = _sum(d_backbone, _sum(_product(d_rotation, _transposed(rotation)), _outer(d_place, place)))
        tx, ty, tz = tx + d_place[0], ty + d_place[1], tz + d_place[2]
        d = _product(_transposed(backbone), d_rotation)
        x, y, z = turn_back(backbone, d_place)
        if (g >= CHAINED - 1) and (g < GROUPS - 1):
            d, x, y, z = _sum(d, carried), x + cx, y + cy, z + cz
        default, default_place = _load_matrix(tables.frames, kind * GROUPS + g, exists)
        if g >= CHAINED:
            own, _ = _local(tables, unnormalised, rows, kind, g, exists)
            before, _ = _chained(tables, unnormalised, rows, kind, g - 1, exists)
            carried = _sum(_product(d, _transposed(own)), _outer((x, y, z), default_place))
            cx, cy, cz = x, y, z
            d = _product(_transposed(before), d)
        if g > 0:
            d_sin, d_cos = _turning_gradient(default, d)
            _store_angle_gradient(unnormalised, d_angles, d_unnormalised, d_out, rows, g - 1, d_sin, d_cos, exists)
    dw, dx, dy, dz = _rotation_gradient(quaternion, d_backbone)
    at = d_frames + rows * 7
    dw += tl.load(at, mask=exists, other=0.0)
    dx += tl.load(at + 1, mask=exists, other=0.0)
    dy += tl.load(at + 2, mask=exists, other=0.0)
    dz += tl.load(at + 3, mask=exists, other=0.0)
    store_quaternion(d_quaternion, rows, (dw, dx, dy, dz), exists)
    tx += tl.load(at + 4, mask=exists, other=0.0)
    ty += tl.load(at + 5, mask=exists, other=0.0)
    tz += tl.load(at + 6, mask=exists, other=0.0)
    store_vector(d_translation, rows, (tx * scale, ty * scale, tz * scale), exists)


def _grid(count: int, options: dict[str, int]) -> tuple[int]:
    return (tuning.ceil_div(count, options["BLOCK"]),)


class _Placement(torch.autograd.Function):
    """Arguments: scale, residue types, tables, then quaternions, translations and angles before normalisation; dense."""

    @staticmethod
    def forward(
        ctx: Any, scale: float, aatype: Tensor, tables: Tables, q: Tensor, t: Tensor, unnormalised: Tensor
    ) -> tuple[Tensor, ...]:
        lead, fresh = q.shape[:-1], q.new_empty
        frames, groups, positions = fresh(*lead, 7), fresh(*lead, 8, 4, 4), fresh(*lead, 14, 3)
        angles, sizes = torch.empty_like(unnormalised), (lead[2], lead[1])
        _groups_kernel[_grid(lead.numel(), RESIDUES)](
            q, t, unnormalised, aatype, tables, frames, groups, angles, lead.numel(), *sizes, scale, **RESIDUES
        )
        count = positions.numel() // 3
        _atoms_kernel[_grid(count, ELEMENTS)](groups, aatype, tables, positions, count, *sizes, **ELEMENTS)
        ctx.save_for_backward(aatype, *tables, q, unnormalised)
        ctx.scale = scale
        return frames, groups, unnormalised.view_as(unnormalised), angles, positions

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *ds: Tensor) -> tuple[Tensor | None, ...]:
        aatype, *tables, q, unnormalised = ctx.saved_tensors
        d_frames, d_groups, d_unnormalised, d_angles, d_positions = (d.contiguous() for d in ds)
        (_, num_iterations, n, _), tables, rows = q.shape, Tables(*tables), q.numel() // 4
        d_matrices, d_q, d_t, d_out = (
            torch.empty_like(d_groups), torch.empty_like(q), q.new_empty(*q.shape[:-1], 3), torch.empty_like(d_angles)
        )  # fmt: skip
        _atoms_backward_kernel[_grid(8 * rows, ELEMENTS)](
            d_positions, d_groups, aatype, tables, d_matrices, 8 * rows, n, num_iterations, **ELEMENTS
        )
        _groups_backward_kernel[_grid(rows, RESIDUES)](
            q, unnormalised, aatype, tables, d_matrices, d_frames, d_angles, d_unnormalised, d_q, d_t, d_out, rows, n,
            num_iterations, ctx.scale, **RESIDUES,
        )  # fmt: skip
        return None, None, None, d_q, d_t, d_out


def obstacle(quaternions: Tensor, translations: Tensor, unnormalised: Tensor, *_: object) -> str | None:
    """Why ``place_residues`` does not take these arguments, or None."""
    if any(x.dtype != torch.float32 for x in (quaternions, translations, unnormalised)):
        return "not everything is float32"
    return None if quaternions.numel() else "no residues"


def place_residues(
    quaternions: Tensor,
    translations: Tensor,
    unnormalised: Tensor,
    aatype: Tensor,
    tables: Sequence[Tensor],
    scale: float,
) -> tuple[Tensor, ...]:
    """``reference.place_residues``, once differentiable."""
    dense = (x.contiguous() for x in (quaternions, translations, unnormalised))
    return _Placement.apply(scale, aatype.contiguous(), Tables(*tables), *dense)  # type: ignore[return-value]


def compile_cases() -> list[tuple[str, Callable[[], None]]]:
    """All iterations of a benchmark crop; see ``tuning``."""
    return [("place_residues", lambda: _meta_call(8, 256))]


def _meta_call(iterations: int, n: int) -> None:
    def leaf(*shape: int) -> Tensor:
        return torch.empty(1, iterations, n, *shape, device="meta", requires_grad=True)

    tables = [torch.empty(21, *shape, device="meta") for shape in ((8, 4, 4), (14, 8), (14, 3), (14,))]
    aatype = torch.empty(1, n, dtype=torch.int64, device="meta")
    results = place_residues(leaf(4), leaf(3), leaf(7, 2), aatype, tables, 10.0)
    torch.autograd.backward(results, [torch.empty_like(result) for result in results])
