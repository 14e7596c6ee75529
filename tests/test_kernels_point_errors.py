"""Frame-aligned point error in Triton against its plain definition, and that against the formula of the Supplement."""

import pytest
import torch
from torch import Tensor

from kernel_accuracy import DEVICE, Draw
from scalefold.kernels import reference
from scalefold.kernels.around import point_errors
from scalefold.model.rigid import quaternion_to_rotation

CLAMP = 2.0


def arguments(lead: tuple[int, ...], shared: tuple[int, ...], frames: int, points: int) -> list[Tensor]:
    """In the order of ``point_errors`` without the clamp; some errors are clamped, some frames and points masked."""
    draw = Draw(frames)

    def rotations(*shape: int) -> Tensor:
        q = draw(*shape, 4)
        return quaternion_to_rotation(q / q.norm(dim=-1, keepdim=True))

    return [
        rotations(*lead, frames),
        draw(*lead, frames, 3),
        rotations(*shared, frames),
        draw(*shared, frames, 3),
        draw.mask(*shared, frames),
        draw(*lead, points, 3),
        draw(*shared, points, 3),
        draw.mask(*shared, points),
        torch.linspace(0.0, 1.0, lead[0], device=DEVICE).view(-1, *(1,) * (len(lead) - 1)),
    ]


def values_and_gradients(function, given: list[Tensor]) -> list[Tensor]:
    leaves = [x.clone().requires_grad_(n in (0, 1, 5)) for n, x in enumerate(given)]
    value = function(*leaves, CLAMP)
    weights = Draw(7)(*value.shape)
    return [value.detach(), *torch.autograd.grad((value * weights).sum(), [leaves[n] for n in (0, 1, 5)])]


def check(lead: tuple[int, ...], shared: tuple[int, ...], frames: int, points: int) -> None:
    given = arguments(lead, shared, frames, points)
    ours = values_and_gradients(point_errors.point_errors, given)
    exact = values_and_gradients(reference.point_errors, [x.double() for x in given])
    for own, other in zip(ours, exact, strict=True):
        assert own.dtype == torch.float32
        assert (own - other).abs().max() <= 1e-5 * other.abs().max()


SHAPES = [((1,), (1,), 5, 17), ((2, 3), (2, 1), 9, 9), ((3, 2), (3, 2), 16, 70), ((2,), (2,), 1, 1)]


@pytest.mark.parametrize(("lead", "shared", "frames", "points"), SHAPES, ids=str)
def test_kernels_equal_the_plain_definition(lead, shared, frames, points):
    check(lead, shared, frames, points)


def test_plain_definition_is_the_masked_clamped_sum_of_distances():
    given = arguments((3,), (3,), 4, 6)
    r, t, target_r, target_t, frames_mask, x, target_x, points_mask, share = (a.double() for a in given)
    found = reference.point_errors(r, t, target_r, target_t, frames_mask, x, target_x, points_mask, share, CLAMP)
    expected = torch.zeros(3, dtype=torch.float64, device=r.device)
    for b in range(3):
        for f in range(4):
            for p in range(6):
                here = r[b, f].T @ (x[b, p] - t[b, f])
                there = target_r[b, f].T @ (target_x[b, p] - target_t[b, f])
                error = ((here - there).square().sum() + 1e-4).sqrt()
                cost = share[b] * min(error, CLAMP) + (1 - share[b]) * error
                expected[b] += cost * frames_mask[b, f] * points_mask[b, p]
    torch.testing.assert_close(found, expected)


@pytest.mark.gpu
@pytest.mark.parametrize(("lead", "shared", "frames", "points"), [((1, 8), (1, 1), 256, 256), ((1,), (1,), 2048, 3584)])
def test_full_kernels_equal_the_plain_definition(lead, shared, frames, points):
    check(lead, shared, frames, points)
