"""Rigid-body algebra, element-wise in fp32: no matrix unit and no reduced precision ever touches a coordinate.

A rotation is [*, 3, 3], a translation [*, 3]; quaternions are (w, x, y, z).
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


class Rigid(NamedTuple):
    """The map p -> rotation p + translation; leading dimensions broadcast."""

    rotation: Tensor  # [*, 3, 3], fp32
    translation: Tensor  # [*, 3], fp32

    def apply(self, points: Tensor) -> Tensor:
        """[*, 3] -> [*, 3]."""
        return rotate(self.rotation, points) + self.translation

    def apply_inverse(self, points: Tensor) -> Tensor:
        """transpose(rotation) (p - translation): the inverse where the rotation is orthogonal."""
        return rotate(self.rotation.transpose(-1, -2), points - self.translation)

    def compose(self, other: "Rigid") -> "Rigid":
        """First ``other``, then this one."""
        return Rigid(multiply(self.rotation, other.rotation), self.apply(other.translation))

    def broadcast(self, num_dims: int) -> "Rigid":
        """Append ``num_dims`` leading dimensions of size 1, to act on points that have that many more."""
        rotation, translation = self
        for _ in range(num_dims):
            rotation, translation = rotation.unsqueeze(-3), translation.unsqueeze(-2)
        return Rigid(rotation, translation)

    def to_matrix(self) -> Tensor:
        """Homogeneous matrices [*, 4, 4]."""
        top = torch.cat((self.rotation, self.translation[..., None]), dim=-1)
        bottom = torch.zeros_like(top[..., :1, :])
        bottom[..., 3] = 1.0
        return torch.cat((top, bottom), dim=-2)

    @staticmethod
    def from_matrix(matrix: Tensor) -> "Rigid":
        """From homogeneous matrices [*, 4, 4]."""
        rotation, translation = matrix[..., :3, :].split((3, 1), dim=-1)  # gradients of a split meet in one operation
        return Rigid(rotation, translation.squeeze(-1))

    @staticmethod
    def from_quaternion_and_translation(values: Tensor) -> "Rigid":
        """From [*, 7], quaternion then translation; the quaternion is not normalised."""
        quaternion, translation = values.split((4, 3), dim=-1)
        return Rigid(quaternion_to_rotation(quaternion), translation)


def rotate(rotation: Tensor, points: Tensor) -> Tensor:
    """rotation p. [*, 3, 3], [*, 3] -> [*, 3]."""
    return (rotation * points[..., None, :]).sum(-1)


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """Product of rotations, [*, 3, 3] each."""
    return (a[..., :, :, None] * b[..., None, :, :]).sum(-2)


# Coefficients of the products of two quaternions' entries; columns are all pairs (ww, wx, ... zz), rows the result.
_ROTATION = (
    # ww wx wy wz  xw xx xy xz  yw yx  yy yz  zw zx zy zz
    (1, 0, 0, 0, 0, 1, 0, 0, 0, 0, -1, 0, 0, 0, 0, -1),
    (0, 0, 0, -2, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0),
    (0, 0, 2, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0),
    (0, 0, 0, 2, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0),
    (1, 0, 0, 0, 0, -1, 0, 0, 0, 0, 1, 0, 0, 0, 0, -1),
    (0, -2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0),
    (0, 0, -2, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0),
    (0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0),
    (1, 0, 0, 0, 0, -1, 0, 0, 0, 0, -1, 0, 0, 0, 0, 1),
)
# The same for a quaternion times a vector (0, b, c, d); columns are wb, wc, wd, xb, ... zd.
_TIMES_VECTOR = (
    (0, 0, 0, -1, 0, 0, 0, -1, 0, 0, 0, -1),
    (1, 0, 0, 0, 0, 0, 0, 0, 1, 0, -1, 0),
    (0, 1, 0, 0, 0, -1, 0, 0, 0, 1, 0, 0),
    (0, 0, 1, 0, 1, 0, -1, 0, 0, 0, 0, 0),
)


@lru_cache
def _table(rows: tuple[tuple[int, ...], ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.tensor(rows, device=device, dtype=dtype)


def _bilinear(rows: tuple[tuple[int, ...], ...], a: Tensor, b: Tensor) -> Tensor:
    """Sums of products of all entries of a with all of b: three kernels, where entry by entry takes forty."""
    products = (a[..., :, None] * b[..., None, :]).flatten(-2)
    return (products[..., None, :] * _table(rows, a.device, a.dtype)).sum(-1)


def quaternion_to_rotation(quaternion: Tensor) -> Tensor:
    """Homogeneous quadratic form (a scaled rotation unless the norm is 1). [*, 4] -> [*, 3, 3].

    Among the forms that agree on unit quaternions this is the reference's, which fixes the gradient.
    """
    return _bilinear(_ROTATION, quaternion, quaternion).unflatten(-1, (3, 3))


def multiply_by_vector(quaternion: Tensor, vector: Tensor) -> Tensor:
    """Quaternion product q (0, v). [*, 4], [*, 3] -> [*, 4]."""
    return _bilinear(_TIMES_VECTOR, quaternion, vector)


def update_frame(quaternion: Tensor, frames: Rigid, update: Tensor) -> tuple[Tensor, Tensor]:
    """Compose frames with a small move given in their own coordinates (Supplement Algorithm 23).

    quaternion: [*, 4], that of ``frames`` [*]; update: [*, 6] = (b, c, d) of a quaternion (1, b, c, d), then a shift.
    """
    turn, shift = update.split(3, dim=-1)
    turned = quaternion + multiply_by_vector(quaternion, turn)
    return turned / torch.linalg.vector_norm(turned, dim=-1, keepdim=True), frames.apply(shift)


def frame_from_three_points(negative_x: Tensor, origin: Tensor, xy_plane: Tensor, eps: float = 1e-8) -> Rigid:
    """Frames by Gram-Schmidt: x axis from ``negative_x`` to ``origin`` (Supplement Algorithm 21). [*, 3] each."""
    e0, e1 = origin - negative_x, xy_plane - origin
    e0 = e0 / torch.sqrt(e0.square().sum(-1, keepdim=True) + eps)
    e1 = e1 - e0 * (e0 * e1).sum(-1, keepdim=True)
    e1 = e1 / torch.sqrt(e1.square().sum(-1, keepdim=True) + eps)
    return Rigid(torch.stack((e0, e1, torch.linalg.cross(e0, e1)), dim=-1), origin)


def squared_distances(points: Tensor) -> Tensor:
    """Between all pairs, from differences (no cancellation). [*, N, 3] -> [*, N, N]."""
    return (points[..., :, None, :] - points[..., None, :, :]).square().sum(-1)


def pseudo_beta(aatype: Tensor, atom37: Tensor) -> Tensor:
    """CB, or CA of glycine. aatype: [*, N]; atom37: [*, N, 37, 3] -> [*, N, 3]."""
    glycine, ca, cb = 7, 1, 3
    return torch.where((aatype == glycine)[..., None], atom37[..., ca, :], atom37[..., cb, :])
