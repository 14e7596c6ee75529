"""Rigid-body algebra and atom placement: against the reference, and as a group."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parity import golden
from scalefold.data import residues
from scalefold.model.rigid import (
    Rigid,
    frame_from_three_points,
    multiply,
    pseudo_beta,
    quaternion_to_rotation,
    rotate,
    squared_distances,
    update_frame,
)
from scalefold.model.structure import AtomPlacement


def random_rigid(generator: torch.Generator, *shape: int) -> Rigid:
    q = torch.randn(*shape, 4, generator=generator)
    return Rigid(
        quaternion_to_rotation(q / q.norm(dim=-1, keepdim=True)), 5.0 * torch.randn(*shape, 3, generator=generator)
    )


def test_frame_update_and_matrices_equal_the_reference() -> None:
    a = golden.load(golden.locate("rigid.npz"))
    quats = a["quats"] / a["quats"].norm(dim=-1, keepdim=True)
    quaternion, translation = update_frame(quats, Rigid(quaternion_to_rotation(quats), a["trans"]), a["update6"])
    assert golden.relative_error(torch.cat((quaternion, translation), -1), a["after_tensor7"]) <= 1e-6
    matrix = Rigid(quaternion_to_rotation(quaternion), translation).to_matrix()
    assert golden.relative_error(matrix, a["after_4x4"]) <= 1e-6


def test_frames_from_three_points_equal_the_reference() -> None:
    a = golden.load(golden.locate("rigid.npz"))
    frame = frame_from_three_points(a["p_neg_x"], a["origin"], a["p_xy"])
    assert golden.relative_error(frame.to_matrix(), a["from_3_points_4x4"]) <= 1e-6


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_rigid_maps_form_a_group(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b, c = (random_rigid(generator, 3) for _ in range(3))
    points = torch.randn(3, 3, generator=generator)
    left, right = a.compose(b).compose(c), a.compose(b.compose(c))
    torch.testing.assert_close(left.apply(points), right.apply(points), atol=1e-4, rtol=0)
    torch.testing.assert_close(a.compose(b).apply(points), a.apply(b.apply(points)), atol=1e-4, rtol=0)
    torch.testing.assert_close(a.apply_inverse(a.apply(points)), points, atol=1e-4, rtol=0)
    torch.testing.assert_close(Rigid.from_matrix(a.to_matrix()).apply(points), a.apply(points), atol=0, rtol=0)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_unit_quaternions_give_proper_rotations(seed: int) -> None:
    rotation = random_rigid(torch.Generator().manual_seed(seed), 5).rotation
    eye = torch.eye(3).expand(5, 3, 3)
    torch.testing.assert_close(multiply(rotation, rotation.transpose(-1, -2)), eye, atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.linalg.det(rotation), torch.ones(5), atol=1e-5, rtol=0)


def test_element_wise_products_equal_matrix_products() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(4, 3, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    points = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(multiply(a, b), a @ b)
    torch.testing.assert_close(rotate(a, points), (a @ points[..., None])[..., 0])


def test_broadcast_frames_act_on_further_dimensions() -> None:
    generator = torch.Generator().manual_seed(0)
    rigid, points = random_rigid(generator, 2, 3), torch.randn(2, 3, 4, 5, 3, generator=generator)
    moved = rigid.broadcast(2).apply(points)
    torch.testing.assert_close(
        moved[1, 2, 3, 4], Rigid(rigid.rotation[1, 2], rigid.translation[1, 2]).apply(points[1, 2, 3, 4])
    )


def test_pseudo_beta_is_cb_and_ca_for_glycine() -> None:
    batch = golden.small_batch()
    aatype = torch.arange(21)[None]
    atoms = torch.arange(37.0)[None, None, :, None].expand(1, 21, 37, 3)
    expected = [residues.CA_ATOM37 if letter == "G" else residues.CB_ATOM37 for letter in residues.RESTYPES_WITH_X]
    assert pseudo_beta(aatype, atoms)[0, :, 0].tolist() == expected
    found = pseudo_beta(batch["aatype"], batch["all_atom_positions"])
    mask = batch["pseudo_beta_mask"][..., None]
    torch.testing.assert_close(found * mask, batch["pseudo_beta"] * mask)


def test_squared_distances_keep_their_digits_far_from_the_origin() -> None:
    points = torch.tensor([[1000.0, 0.0, 0.0], [1000.0, 0.001, 0.0]])
    assert squared_distances(points)[0, 1].item() == pytest.approx(1e-6, rel=1e-3)


def test_placed_side_chains_have_the_torsions_they_were_placed_with() -> None:
    place = AtomPlacement()
    aatype = torch.arange(20)[None]
    generator = torch.Generator().manual_seed(1)
    angle = 6.28 * torch.rand(1, 20, 7, generator=generator)
    backbone = random_rigid(generator, 1, 20)
    groups = place.group_frames(backbone, torch.stack((angle.sin(), angle.cos()), -1), aatype)
    atoms = place.atom14(groups, aatype)[0]
    for restype, resname in enumerate(residues.RESNAMES[:20]):
        names = residues.ATOM14_NAMES[resname]
        for chi, quartet in enumerate(residues.CHI_ANGLE_ATOMS[resname]):
            points = [atoms[restype, names.index(name)] for name in quartet]
            turn = torch.remainder(dihedral(*points) - angle[0, restype, 3 + chi] + 3.14159, 6.28318) - 3.14159
            assert abs(turn.item()) < 2e-2, (resname, chi)


def dihedral(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    axis = (c - b) / (c - b).norm()
    first, second = a - b, d - c
    first, second = first - (first @ axis) * axis, second - (second @ axis) * axis
    return torch.atan2(torch.linalg.cross(axis, first) @ second, first @ second)


def test_absent_groups_have_zero_rotation_and_their_parents_translation() -> None:
    place, glycine = AtomPlacement(), residues.RESTYPES.index("G")
    backbone = random_rigid(torch.Generator().manual_seed(2), 1, 1)
    frames = place.group_frames(backbone, torch.ones(1, 1, 7, 2), torch.tensor([[glycine]]))
    assert not frames.rotation[0, 0, 4:].any()
    torch.testing.assert_close(frames.translation[0, 0, 5], backbone.translation[0, 0])


def test_tables_of_atom_placement_are_those_of_the_reference() -> None:
    a, place = golden.load(golden.locate("residue_tables.npz")), AtomPlacement()
    assert torch.equal(place.default_frames, a["restype_rigid_group_default_frame"])
    assert torch.equal(place.atom_groups.argmax(-1), a["restype_atom14_to_rigid_group"])
    assert torch.equal(place.atom_positions, a["restype_atom14_rigid_group_positions"])
    assert torch.equal(place.atom_mask, a["restype_atom14_mask"])
    for name, table in (
        ("lower", residues.ATOM14_DISTANCE_LOWER_BOUND),
        ("upper", residues.ATOM14_DISTANCE_UPPER_BOUND),
    ):
        np.testing.assert_array_equal(a[f"atom14_dists_{name}_bound"].numpy(), table)
