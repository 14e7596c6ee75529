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
def load_vector_to_change(pointer, row, exists):
    """``load_vector`` of numbers that the program adds to in place: afterwards all warps that hold them have them."""
    vector = load_vector(pointer, row, exists)
    tl.debug_barrier()
    return vector


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


@triton.jit
def product(a, b):
    """a times b, rotations."""
    xx, xy, xz, yx, yy, yz, zx, zy, zz = a
    x, y, z = turn((xx, xy, xz, yx, yy, yz, zx, zy, zz), (b[0], b[3], b[6]))
    u, v, w = turn((xx, xy, xz, yx, yy, yz, zx, zy, zz), (b[1], b[4], b[7]))
    r, s, t = turn((xx, xy, xz, yx, yy, yz, zx, zy, zz), (b[2], b[5], b[8]))
    return x, u, r, y, v, s, z, w, t


@triton.jit
def transposed(a):
    """transpose(a)."""
    return a[0], a[3], a[6], a[1], a[4], a[7], a[2], a[5], a[8]


@triton.jit
def added(a, b):
    """a + b, rotations."""
    return (
        a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3], a[4] + b[4], a[5] + b[5], a[6] + b[6], a[7] + b[7],
        a[8] + b[8],
    )  # fmt: skip


@triton.jit
def outer(a, b):
    """a transpose(b), vectors."""
    return (
        a[0] * b[0], a[0] * b[1], a[0] * b[2], a[1] * b[0], a[1] * b[1], a[1] * b[2], a[2] * b[0], a[2] * b[1],
        a[2] * b[2],
    )  # fmt: skip


@triton.jit
def load_matrix(pointer, index, exists):
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
def store_matrix(pointer, index, rotation, translation, exists):
    """What ``load_matrix`` loads, and the last line."""
    at, zero = pointer + index * 16, tl.zeros(index.shape, tl.float32)
    for k in tl.static_range(3):
        tl.store(at + 4 * k, rotation[3 * k], mask=exists)
        tl.store(at + 4 * k + 1, rotation[3 * k + 1], mask=exists)
        tl.store(at + 4 * k + 2, rotation[3 * k + 2], mask=exists)
        tl.store(at + 4 * k + 3, translation[k], mask=exists)
        tl.store(at + 12 + k, zero, mask=exists)
    tl.store(at + 15, zero + 1.0, mask=exists)
