"""Rigid groups and atoms from frames and torsions in one operation, against their plain definition."""

import pytest
import torch
from torch import Tensor

from kernel_accuracy import DEVICE, Draw, assert_as_accurate_as_pytorch
from scalefold.kernels import triton_ops
from scalefold.kernels.structure import placement
from scalefold.kernels.table import REFERENCE
from scalefold.model.structure import AtomPlacement


def leaves(batch: int, iterations: int, n: int) -> list[Tensor]:
    """Quaternions near unit length, translations and angles before normalisation."""
    draw = Draw(n)
    quaternions = torch.nn.functional.normalize(draw(batch, iterations, n, 4), dim=-1) * 1.1
    return [quaternions, draw(batch, iterations, n, 3), draw(batch, iterations, n, 7, 2)]


def placed(table: triton_ops.Operations, aatype: Tensor):
    place = AtomPlacement().to(DEVICE)
    place.ops = table
    return lambda *inputs: place(*inputs, aatype)


def residue_types(batch: int, n: int) -> Tensor:
    """All residue types in turns."""
    return (torch.arange(batch * n) * 8 % 21).view(batch, n).to(DEVICE)


@pytest.mark.parametrize(("batch", "iterations", "n"), [(1, 1, 21), (2, 3, 7), (1, 2, 40)])
def test_outputs_and_gradients_are_as_accurate_as_the_definition(batch: int, iterations: int, n: int) -> None:
    aatype = residue_types(batch, n)
    ours, plain = (placed(table, aatype) for table in (triton_ops.TRITON, REFERENCE))
    assert_as_accurate_as_pytorch(ours, plain, leaves(batch, iterations, n), torch.float32)


@pytest.mark.parametrize("output", range(5))
def test_every_output_alone_gives_the_gradients_of_the_definition(output: int) -> None:
    found = []
    for table in (triton_ops.TRITON, REFERENCE):
        inputs = [x.requires_grad_() for x in leaves(1, 2, 5)]
        result = placed(table, residue_types(1, 5))(*inputs)[output]
        grads = torch.autograd.grad(result, inputs, Draw(3)(*result.shape), allow_unused=True)
        found.append([torch.zeros_like(x) if g is None else g for g, x in zip(grads, inputs, strict=True)])
    for own, exact in zip(*found, strict=True):
        torch.testing.assert_close(own, exact, rtol=1e-5, atol=1e-5)


def test_angles_too_short_for_a_direction_are_divided_by_the_least_length() -> None:
    found = []
    for table in (triton_ops.TRITON, REFERENCE):
        q, t, angles = leaves(1, 1, 5)
        angles = (1e-6 * angles).requires_grad_()
        _, groups, _, normalised, atoms = placed(table, residue_types(1, 5))(q, t, angles)
        (atoms.square().sum() + groups.sum()).backward()
        found.append((normalised.detach(), angles.grad))
        assert normalised.norm(dim=-1).max() < 0.1
    torch.testing.assert_close(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-4 * found[1][1].abs().max().item())


def test_what_the_kernels_do_not_take_is_named() -> None:
    q, t, angles = leaves(1, 1, 3)
    assert placement.obstacle(q, t, angles) is None
    assert placement.obstacle(q.double(), t, angles) == "not everything is float32"
    assert placement.obstacle(q[:, :, :0], t, angles) == "no residues"
