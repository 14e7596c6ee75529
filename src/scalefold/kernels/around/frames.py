"""Rotations and frame updates of residues, as expressions inside Triton programs (``model.rigid`` defines them).

A quaternion is (w, x, y, z); a rotation is its nine numbers, row by row; all are tiles of one shape.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl


@triton.jit
def load_vector(pointer, row, exists):
    """Three neighbouring numbers of each row."""
    x = tl.load(pointer + row * 3, mask=exists, other=0.0)
    y = tl.load(pointer + row * 3 + 1, mask=exists, other=0.0)
    return x, y, tl.load(pointer + row * 3 + 2, mask=exists, other=0.0)


@triton.jit
def store_vector(pointer, row, vector, exists):
    """What ``load_vector`` loads."""
    tl.store(pointer + row * 3, vector[0], mask=exists)
    tl.store(pointer + row * 3 + 1, vector[1], mask=exists)
    tl.store(pointer + row * 3 + 2, vector[2], mask=exists)


@triton.jit
def load_quaternion(pointer, row, exists):
    """Four neighbouring numbers of each row; the identity where there is none."""
    w = tl.load(pointer + row * 4, mask=exists, other=1.0)
    x = tl.load(pointer + row * 4 + 1, mask=exists, other=0.0)
    y = tl.load(pointer + row * 4 + 2, mask=exists, other=0.0)
    return w, x, y, tl.load(pointer + row * 4 + 3, mask=exists, other=0.0)


@triton.jit
def store_quaternion(pointer, row, quaternion, exists):
    """What ``load_quaternion`` loads."""
    tl.store(pointer + row * 4, quaternion[0], mask=exists)
    tl.store(pointer + row * 4 + 1, quaternion[1], mask=exists)
    tl.store(pointer + row * 4 + 2, quaternion[2], mask=exists)
    tl.store(pointer + row * 4 + 3, quaternion[3], mask=exists)


@triton.jit
def rotation_of(quaternion):
    """``model.rigid.quaternion_to_rotation``."""
    w, x, y, z = quaternion
    ww, xx, yy, zz = w * w, x * x, y * y, z * z
    xy, xz, yz = 2.0 * x * y, 2.0 * x * z, 2.0 * y * z
    wx, wy, wz = 2.0 * w * x, 2.0 * w * y, 2.0 * w * z
    return (
        ww + xx - yy - zz, xy - wz, xz + wy,
        xy + wz, ww - xx + yy - zz, yz - wx,
        xz - wy, yz + wx, ww - xx - yy + zz,
    )  # fmt: skip


@triton.jit
def turn(rotation, vector):
    """rotation times vector."""
    xx, xy, xz, yx, yy, yz, zx, zy, zz = rotation
    x, y, z = vector
    return xx * x + xy * y + xz * z, yx * x + yy * y + yz * z, zx * x + zy * y + zz * z


@triton.jit
def turn_back(rotation, vector):
    """transpose(rotation) times vector."""
    xx, xy, xz, yx, yy, yz, zx, zy, zz = rotation
    x, y, z = vector
    return xx * x + yx * y + zx * z, xy * x + yy * y + zy * z, xz * x + yz * y + zz * z


@triton.jit
def turned_by(quaternion, turning):
    """quaternion + quaternion (0, turning), before it is normalised."""
    w, x, y, z = quaternion
    b, c, d = turning
    return w - (x * b + y * c + z * d), x + w * b + y * d - z * c, y + w * c - x * d + z * b, z + w * d + x * c - y * b


@triton.jit
def length_of(quaternion):
    """Euclidean norm."""
    w, x, y, z = quaternion
    return tl.sqrt(w * w + x * x + y * y + z * z)


@triton.jit
def turning_gradient(quaternion, turning, d):
    """Gradient of ``turning`` for the gradient d of the normalised result of ``turned_by``."""
    moved = turned_by(quaternion, turning)
    length = length_of(moved)
    along = (moved[0] * d[0] + moved[1] * d[1] + moved[2] * d[2] + moved[3] * d[3]) / (length * length)
    dw, dx = (d[0] - moved[0] * along) / length, (d[1] - moved[1] * along) / length
    dy, dz = (d[2] - moved[2] * along) / length, (d[3] - moved[3] * along) / length
    w, x, y, z = quaternion
    return (
        -x * dw + w * dx + z * dy - y * dz,
        -y * dw - z * dx + w * dy + x * dz,
        -z * dw + y * dx - x * dy + w * dz,
    )
