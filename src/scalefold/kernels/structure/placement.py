"""From frames and torsions to rigid groups and atoms (Supplement Algorithm 24), in two launches each way.

A residue of an iteration is a lane. Forward: one program turns and chains the eight groups of residues, one places
atoms. Backward: one sums what atoms say about their groups, one takes it back through the chain. All element-wise in
fp32. Saved: inputs, and the groups as their backbones see them.
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
from scalefold.kernels.instructions import program, wait_for_predecessors
from scalefold.kernels.structure.frames import (
    added,
    load_matrix,
    load_quaternion,
    load_vector,
    outer,
    product,
    rotation_of,
    store_matrix,
    store_quaternion,
    store_vector,
    transposed,
    turn,
    turn_back,
)

GROUPS, ATOMS, ANGLES = tl.constexpr(8), tl.constexpr(14), tl.constexpr(7)
CHAINED = tl.constexpr(5)  # the first group that hangs on the one before it
EPS = tl.constexpr(1e-8)  # least squared length of an angle's vector
RESIDUES = {"BLOCK": 32, "num_warps": 1}
ELEMENTS = {"BLOCK": 128, "num_warps": 4}  # atoms or groups
UNFUSED_FROM = 100  # compute capability for which Triton 3.7.1 ends at multiplications and additions in one (LLVM)


class Tables(NamedTuple):
    """Constants of the residue types; see ``model.structure.AtomPlacement``."""

    frames: Tensor  # [21, 8, 4, 4]
    groups: Tensor  # [21, 14, 8], one-hot
    positions: Tensor  # [21, 14, 3]
    mask: Tensor  # [21, 14]


@triton.jit
def _angle(unnormalised, rows, k, exists):
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
def _turned_group(tables, unnormalised, rows, kind, g, exists):
    """Default frame of a group that an angle turns: rotation before and after, translation."""
    default, place = load_matrix(tables.frames, kind * GROUPS + g, exists)
    sin, cos, length = _angle(unnormalised, rows, g - 1, exists)
    return default, _turned(default, sin / length, cos / length), place


@triton.jit
def _either(first, a, b):
    """a if ``first``, else b; rotations."""
    return (
        tl.where(first, a[0], b[0]), tl.where(first, a[1], b[1]), tl.where(first, a[2], b[2]),
        tl.where(first, a[3], b[3]), tl.where(first, a[4], b[4]), tl.where(first, a[5], b[5]),
        tl.where(first, a[6], b[6]), tl.where(first, a[7], b[7]), tl.where(first, a[8], b[8]),
    )  # fmt: skip


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
def _store_group(chained, groups, index, backbone, origin, rotation, translation, exists):
    """A group's frame, as the backbone and as everybody sees it."""
    store_matrix(chained, index, rotation, translation, exists)
    moved = _moved(backbone, origin, translation)
    store_matrix(groups, index, product(backbone, rotation), moved, exists)


@program
@triton.jit
def _groups_kernel(
    quaternions, translations, unnormalised, aatype, tables, frames, groups, chained, angles, num_rows, n,
    num_iterations, scale, BLOCK: tl.constexpr,
):  # fmt: skip
    """Tile of residues: frames [rows, 7], groups [rows, 8, 4, 4], angles [rows, 7, 2]; translations times scale.

    chained: the groups as the backbone sees them.
    """
    wait_for_predecessors()
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
    rotation, translation = load_matrix(tables.frames, kind * GROUPS, exists)
    _store_group(chained, groups, rows * GROUPS, backbone, origin, rotation, translation, exists)
    for g in range(1, GROUPS):
        _, own, hinge = _turned_group(tables, unnormalised, rows, kind, g, exists)
        hangs = g >= CHAINED
        x, y, z = _moved(rotation, translation, hinge)
        rotation = _either(hangs, product(rotation, own), own)
        translation = tl.where(hangs, x, hinge[0]), tl.where(hangs, y, hinge[1]), tl.where(hangs, z, hinge[2])
        _store_group(chained, groups, rows * GROUPS + g, backbone, origin, rotation, translation, exists)


@program
@triton.jit
def _atoms_kernel(groups, aatype, tables, positions, num_atoms, n, num_iterations, BLOCK: tl.constexpr):
    """Tile of atoms [rows, 14]: their places in their groups' frames, zero for those that the residue lacks."""
    wait_for_predecessors()
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = index < num_atoms
    rows, slot = index // ATOMS, index % ATOMS
    atom = _kind(aatype, rows, exists, n, num_iterations) * ATOMS + slot
    group = tl.zeros([BLOCK], tl.int64)
    for g in tl.static_range(1, GROUPS):
        group += tl.where(tl.load(tables.groups + atom * GROUPS + g, mask=exists, other=0.0) > 0.0, g, 0)
    rotation, translation = load_matrix(groups, rows.to(tl.int64) * GROUPS + group, exists)
    x, y, z = _moved(rotation, translation, load_vector(tables.positions, atom, exists))
    mask = tl.load(tables.mask + atom, mask=exists, other=0.0)
    store_vector(positions, index, (x * mask, y * mask, z * mask), exists)


@program
@triton.jit
def _atoms_backward_kernel(
    d_positions, d_groups, aatype, tables, d_frames, num_groups, n, num_iterations, BLOCK: tl.constexpr
):
    """Tile of groups [rows, 8]: d_frames [rows, 8, 4, 4] is d_groups plus what the group's atoms hand back."""
    wait_for_predecessors()
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = index < num_groups
    rows, g = index // GROUPS, index % GROUPS
    kind = _kind(aatype, rows, exists, n, num_iterations)
    rotation, translation = load_matrix(d_groups, index, exists)
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
    store_matrix(d_frames, index, (xx, xy, xz, yx, yy, yz, zx, zy, zz), (tx, ty, tz), exists)


@triton.jit
def _turning_gradient(default, d):
    """Gradients of sin and cos of ``_turned``."""
    d_cos = d[1] * default[1] + d[4] * default[4] + d[7] * default[7]
    d_cos += d[2] * default[2] + d[5] * default[5] + d[8] * default[8]
    d_sin = d[1] * default[2] + d[4] * default[5] + d[7] * default[8]
    d_sin -= d[2] * default[1] + d[5] * default[4] + d[8] * default[7]
    return d_sin, d_cos


@triton.jit
def _store_angle_gradient(unnormalised, d_angles, d_unnormalised, out, rows, k, d_sin, d_cos, exists):
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
def _back_to_backbone(d_matrices, rows, g, backbone, rotation, place, d_backbone, d_origin, exists):
    """Gradients of a group's frame in the backbone's; those of the backbone's rotation and origin grow."""
    d_rotation, d_place = load_matrix(d_matrices, rows * GROUPS + g, exists)
    d_backbone = added(d_backbone, added(product(d_rotation, transposed(rotation)), outer(d_place, place)))
    d_origin = d_origin[0] + d_place[0], d_origin[1] + d_place[1], d_origin[2] + d_place[2]
    return product(transposed(backbone), d_rotation), turn_back(backbone, d_place), d_backbone, d_origin


@program
@triton.jit
def _groups_backward_kernel(
    quaternions, unnormalised, aatype, tables, chained, d_matrices, d_frames, d_angles, d_unnormalised,
    d_quaternion, d_translation, d_out, num_rows, n, num_iterations, scale, BLOCK: tl.constexpr,
):  # fmt: skip
    """Tile of residues: gradients of quaternions, translations and of angles before normalisation (d_out).

    d_matrices: of all groups; d_frames, d_angles, d_unnormalised: of the other outputs.
    """
    wait_for_predecessors()
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = rows < num_rows
    kind = _kind(aatype, rows, exists, n, num_iterations)
    quaternion = load_quaternion(quaternions, rows, exists)
    backbone, zero = rotation_of(quaternion), tl.zeros([BLOCK], tl.float32)
    d_backbone, d_origin = (zero, zero, zero, zero, zero, zero, zero, zero, zero), (zero, zero, zero)
    carried, w = d_backbone, d_origin  # from the group that hangs on this one
    for back in range(GROUPS - 1):
        g = GROUPS - 1 - back
        hangs = g >= CHAINED
        rotation, place = load_matrix(chained, rows * GROUPS + g, exists)
        before, _ = load_matrix(chained, rows * GROUPS + g - 1, exists)
        default, turned, hinge = _turned_group(tables, unnormalised, rows, kind, g, exists)
        d, v, d_backbone, d_origin = _back_to_backbone(
            d_matrices, rows, g, backbone, rotation, place, d_backbone, d_origin, exists
        )
        d, v = added(d, carried), (v[0] + w[0], v[1] + w[1], v[2] + w[2])
        handed = added(product(d, transposed(turned)), outer(v, hinge))
        carried = _either(hangs, handed, (zero, zero, zero, zero, zero, zero, zero, zero, zero))
        w = tl.where(hangs, v[0], 0.0), tl.where(hangs, v[1], 0.0), tl.where(hangs, v[2], 0.0)
        d_sin, d_cos = _turning_gradient(default, _either(hangs, product(transposed(before), d), d))
        _store_angle_gradient(unnormalised, d_angles, d_unnormalised, d_out, rows, g - 1, d_sin, d_cos, exists)
    rotation, place = load_matrix(chained, rows * GROUPS, exists)
    _, _, d_backbone, d_origin = _back_to_backbone(
        d_matrices, rows, 0, backbone, rotation, place, d_backbone, d_origin, exists
    )
    dw, dx, dy, dz = _rotation_gradient(quaternion, d_backbone)
    at = d_frames + rows * 7
    dw += tl.load(at, mask=exists, other=0.0)
    dx += tl.load(at + 1, mask=exists, other=0.0)
    dy += tl.load(at + 2, mask=exists, other=0.0)
    dz += tl.load(at + 3, mask=exists, other=0.0)
    store_quaternion(d_quaternion, rows, (dw, dx, dy, dz), exists)
    tx = d_origin[0] + tl.load(at + 4, mask=exists, other=0.0)
    ty = d_origin[1] + tl.load(at + 5, mask=exists, other=0.0)
    tz = d_origin[2] + tl.load(at + 6, mask=exists, other=0.0)
    store_vector(d_translation, rows, (tx * scale, ty * scale, tz * scale), exists)


def _grid(count: int, options: dict[str, int]) -> tuple[int]:
    return (tuning.ceil_div(count, options["BLOCK"]),)


class _Placement(torch.autograd.Function):
    """Arguments: scale, residue types, tables, quaternions, translations, angles before normalisation; all dense."""

    @staticmethod
    def forward(
        ctx: Any, scale: float, aatype: Tensor, tables: Tables, q: Tensor, t: Tensor, unnormalised: Tensor
    ) -> tuple[Tensor, ...]:
        lead, fresh = q.shape[:-1], q.new_empty
        frames, groups, positions = fresh(*lead, 7), fresh(*lead, 8, 4, 4), fresh(*lead, 14, 3)
        chained = torch.empty_like(groups)
        angles, sizes = torch.empty_like(unnormalised), (lead[2], lead[1])
        _groups_kernel[_grid(lead.numel(), RESIDUES)](
            q, t, unnormalised, aatype, tables, frames, groups, chained, angles, lead.numel(), *sizes, scale, **RESIDUES
        )
        count = positions.numel() // 3
        _atoms_kernel[_grid(count, ELEMENTS)](groups, aatype, tables, positions, count, *sizes, **ELEMENTS)
        ctx.save_for_backward(aatype, *tables, q, unnormalised, chained)
        ctx.scale = scale
        return frames, groups, unnormalised.view_as(unnormalised), angles, positions

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *ds: Tensor) -> tuple[Tensor | None, ...]:
        aatype, *tables, q, unnormalised, chained = ctx.saved_tensors
        d_frames, d_groups, d_unnormalised, d_angles, d_positions = (d.contiguous() for d in ds)
        (_, num_iterations, n, _), tables, rows = q.shape, Tables(*tables), q.numel() // 4
        d_matrices, d_q, d_t, d_out = (
            torch.empty_like(d_groups), torch.empty_like(q), q.new_empty(*q.shape[:-1], 3), torch.empty_like(d_angles)
        )  # fmt: skip
        _atoms_backward_kernel[_grid(8 * rows, ELEMENTS)](
            d_positions, d_groups, aatype, tables, d_matrices, 8 * rows, n, num_iterations, **ELEMENTS
        )
        _groups_backward_kernel[_grid(rows, RESIDUES)](
            q, unnormalised, aatype, tables, chained, d_matrices, d_frames, d_angles, d_unnormalised, d_q, d_t, d_out,
            rows, n, num_iterations, ctx.scale, enable_fp_fusion=tuning.capability() < UNFUSED_FROM, **RESIDUES,
        )  # fmt: skip
        return None, None, None, d_q, d_t, d_out


def obstacle(quaternions: Tensor, translations: Tensor, unnormalised: Tensor, *_: object) -> str | None:
    """Why ``place_residues`` does not take these arguments, or None."""
    if any(x.dtype != torch.float32 for x in (quaternions, translations, unnormalised)):
        return "not everything is float32"
    return None if quaternions.numel() else "no residues"


def place_residues(
    quaternions: Tensor, translations: Tensor, unnormalised: Tensor, aatype: Tensor, tables: Sequence[Tensor],
    scale: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Groups and atoms of all iterations, as ``model.structure.AtomPlacement`` defines them; once differentiable.

    quaternions: [B, I, N, 4]; translations: [B, I, N, 3], times ``scale`` in angstrom; unnormalised: sin and cos of
    angles, [B, I, N, 7, 2]; aatype: int64 [B, N]; tables: ``Tables`` -> frames [B, I, N, 7], groups [B, I, N, 8, 4, 4],
    the angles as they were and normalised, positions [B, I, N, 14, 3], angstrom.
    """
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
