"""Structure module (Supplement Algorithms 20 to 24); always fp32. Internal length unit: 10 angstrom."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scalefold.config import ModelConfig, StructureConfig
from scalefold.data import residues
from scalefold.kernels.table import REFERENCE, Operations
from scalefold.model.layers import LayerNorm, Linear, dropped, relu_linear
from scalefold.model.rigid import Rigid, quaternion_to_rotation, rotate, update_frame

ANGSTROM_PER_UNIT = 10.0
MASK_INF = 1e5
NORM_EPS = 1e-8
NUM_ANGLES = 7
HEAD_WEIGHT_INIT = 0.541324854612918  # softplus of it is 1


class IPAShared(NamedTuple):
    """What invariant point attention needs in every iteration and is the same in all of them."""

    pair_bias: Tensor  # [B, N, N, H]
    weight: Tensor  # [q + kv + q points + kv points, c_s], one projection of s instead of four
    bias: Tensor  # [q + kv + q points + kv points]
    point_weights: Tensor  # [H]


class InvariantPointAttention(nn.Module):
    """Attention that sees distances between points in residue frames (Supplement Algorithm 22).

    Differs from the Supplement as the benchmark's reference does: all projections have a bias.
    """

    ops: Operations = REFERENCE

    def __init__(self, c_s: int, c_z: int, config: StructureConfig) -> None:
        super().__init__()
        heads, width = config.num_heads_ipa, config.c_hidden_ipa
        self.num_heads, self.num_qk_points, self.num_v_points = heads, config.num_qk_points, config.num_v_points
        self.head_weights = nn.Parameter(torch.full((heads,), HEAD_WEIGHT_INIT))
        self.linear_q = Linear(c_s, heads * width)
        self.linear_kv = Linear(c_s, 2 * heads * width)
        self.linear_q_points = Linear(c_s, heads * self.num_qk_points * 3)
        self.linear_kv_points = Linear(c_s, heads * (self.num_qk_points + self.num_v_points) * 3)
        self.linear_b = Linear(c_z, heads)
        self.linear_out = Linear(heads * (width + 4 * self.num_v_points + c_z), c_s, init="final")

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Heads, and of each: channels, query points, value points."""
        return self.num_heads, self.linear_q.out_features // self.num_heads, self.num_qk_points, self.num_v_points

    def forward(self, s: Tensor, z: Tensor, frames: Rigid, mask: Tensor) -> Tensor:
        """s: [B, N, c_s]; z: [B, N, N, c_z]; frames: [B, N] in internal units; mask: [B, N] -> update of s."""
        return self.attend(s, z, self.share(z), frames, mask)

    def share(self, z: Tensor) -> IPAShared:
        """z: [B, N, N, c_z]. Weights are shared by the iterations, so all this is worked out once."""
        of_s = (self.linear_q, self.linear_kv, self.linear_q_points, self.linear_kv_points)
        weight, bias = (torch.cat([getattr(linear, name) for linear in of_s]) for name in ("weight", "bias"))
        point_weights = F.softplus(self.head_weights) * math.sqrt(2.0 / (27.0 * self.num_qk_points))
        return IPAShared(self.linear_b(z), weight, bias, point_weights)

    def attend(self, s: Tensor, z: Tensor, shared: IPAShared, frames: Rigid, mask: Tensor) -> Tensor:
        """The update of s, see ``forward``."""
        of_s = (self.linear_q, self.linear_kv, self.linear_q_points, self.linear_kv_points)
        projected = F.linear(s, shared.weight, shared.bias).split([linear.out_features for linear in of_s], dim=-1)
        q = projected[0].unflatten(-1, (self.num_heads, -1))
        k, v = projected[1].unflatten(-1, (self.num_heads, -1)).chunk(2, dim=-1)
        per_point = frames.broadcast(2)
        q_points, kv_points = (per_point.apply(self._points(x)) for x in projected[2:])
        k_points, v_points = kv_points.split((self.num_qk_points, self.num_v_points), dim=-2)
        o, o_points, o_pair = self.ops.invariant_point_attention(
            q, k, v, q_points, k_points, v_points, shared.pair_bias, z, shared.point_weights, mask, MASK_INF
        )
        local = per_point.apply_inverse(o_points)
        norms = torch.sqrt(local.square().sum(-1) + NORM_EPS)
        parts = (o, *local.unbind(-1), norms, o_pair)
        return self.linear_out(torch.cat([part.flatten(-2) for part in parts], dim=-1))

    def _points(self, x: Tensor) -> Tensor:
        """All x, then all y, then all z coordinates; within each, head-major. [B, N, 3 H P] -> [B, N, H, P, 3]."""
        return x.unflatten(-1, (3, self.num_heads, -1)).movedim(-3, -1)

    @torch.no_grad()
    def fill(self, generator: torch.Generator) -> None:
        """Every head starts with the same weight, 1 after softplus."""
        self.head_weights.fill_(HEAD_WEIGHT_INIT)


class StructureTransition(nn.Module):
    """Three-layer perceptron with residual, dropout and layer norm (Supplement Algorithm 20, lines 8 and 9)."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.linear_1 = Linear(c, c, init="relu")
        self.linear_2 = Linear(c, c, init="relu")
        self.linear_3 = Linear(c, c, init="final")
        self.layer_norm = LayerNorm(c)

    def forward(self, s: Tensor, dropout: Tensor | None = None) -> Tensor:
        """s: [B, N, c]; dropout: a mask like s, or None -> [B, N, c]."""
        s = s + self.linear_3(relu_linear(self.linear_2, relu_linear(self.linear_1, s)))
        return self.layer_norm(dropped(s, dropout))


class BackboneUpdate(nn.Module):
    """Six numbers per residue that move its frame (Supplement Algorithm 23)."""

    def __init__(self, c_s: int) -> None:
        super().__init__()
        self.linear = Linear(c_s, 6, init="final")

    def forward(self, s: Tensor) -> Tensor:
        """[B, N, c_s] -> [B, N, 6]."""
        return self.linear(s)


class AngleResnetBlock(nn.Module):
    """a + linear(relu(linear(relu(a))))."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.linear_1 = Linear(c, c, init="relu")
        self.linear_2 = Linear(c, c, init="final")

    def forward(self, a: Tensor) -> Tensor:
        """[*, c] -> [*, c]."""
        return a + self.linear_2(relu_linear(self.linear_1, F.relu(a)))


class AngleResnet(nn.Module):
    """Torsion angles as points near the unit circle (Supplement Algorithm 20, lines 11 to 14).

    Like the benchmark's reference it rectifies both inputs first.
    """

    def __init__(self, c_s: int, config: StructureConfig) -> None:
        super().__init__()
        c = config.c_hidden_angle_resnet
        self.linear_in = Linear(c_s, c)
        self.linear_initial = Linear(c_s, c)
        self.layers = nn.ModuleList(AngleResnetBlock(c) for _ in range(config.num_angle_resnet_blocks))
        self.linear_out = Linear(c, NUM_ANGLES * 2)

    def forward(self, s: Tensor, s_initial: Tensor) -> Tensor:
        """[*, c_s] each -> (sin, cos) of omega, phi, psi, chi 1..4, before normalisation, [*, 7, 2]."""
        a = self.linear_in(F.relu(s)) + self.linear_initial(F.relu(s_initial))
        for layer in self.layers:
            a = layer(a)
        return self.linear_out(F.relu(a)).unflatten(-1, (NUM_ANGLES, 2))


def normalised(angles: Tensor) -> Tensor:
    """Vectors of unit length, unless they are too short for a direction. [*, 2] -> [*, 2]."""
    return angles / torch.sqrt(angles.square().sum(-1, keepdim=True).clamp(min=NORM_EPS))


class AtomPlacement(nn.Module):
    """Torsion angles to rigid groups to atoms (Supplement Algorithm 24), with constant tables per residue type."""

    default_frames: Tensor  # [21, 8, 4, 4]
    atom_groups: Tensor  # [21, 14, 8], one-hot
    atom_positions: Tensor  # [21, 14, 3], angstrom, in the frame of the atom's group
    atom_mask: Tensor  # [21, 14]
    backbone_group: Tensor  # [8, 1], 1 for the group that no angle turns

    ops: Operations = REFERENCE

    def __init__(self) -> None:
        super().__init__()
        tables = {
            "default_frames": torch.from_numpy(residues.RIGID_GROUP_DEFAULT_FRAME),
            "atom_groups": F.one_hot(torch.from_numpy(residues.ATOM14_TO_RIGID_GROUP), 8).float(),
            "atom_positions": torch.from_numpy(residues.ATOM14_RIGID_GROUP_POSITIONS),
            "atom_mask": torch.from_numpy(residues.ATOM14_MASK),
            "backbone_group": F.one_hot(torch.tensor(0), 8).float()[:, None],
        }
        for name, table in tables.items():
            self.register_buffer(name, table.clone(), persistent=False)

    def forward(
        self, quaternions: Tensor, translations: Tensor, unnormalised: Tensor, aatype: Tensor
    ) -> tuple[Tensor, ...]:
        """Frames [B, I, N, 7], groups [B, I, N, 8, 4, 4], angles before and after normalisation, atoms.

        quaternions: [B, I, N, 4]; translations: [B, I, N, 3], internal units; angles: [B, I, N, 7, 2]; aatype: [B, N].
        """
        tables = (self.default_frames, self.atom_groups, self.atom_positions, self.atom_mask)
        found = self.ops.place_residues(quaternions, translations, unnormalised, aatype, tables, ANGSTROM_PER_UNIT)
        if found is not None:  # in one operation
            return found
        angles, translations, aatype = normalised(unnormalised), translations * ANGSTROM_PER_UNIT, aatype[:, None]
        groups = self.group_frames(Rigid(quaternion_to_rotation(quaternions), translations), angles, aatype)
        frames = torch.cat((quaternions, translations), dim=-1)
        return frames, groups.to_matrix(), unnormalised, angles, self.atom14(groups, aatype)

    def group_frames(self, backbone: Rigid, angles: Tensor, aatype: Tensor) -> Rigid:
        """Frames of the eight groups. backbone: [*, N], angstrom; angles: [*, N, 7, 2]; aatype: [*, N] -> [*, N, 8].

        chi 2 to 4 hang on the group before them; a group that the residue lacks has a zero rotation and its parent's
        translation.
        """
        local = self._turned_defaults(angles, aatype)
        groups = [Rigid(*group) for group in zip(local.rotation.unbind(-3), local.translation.unbind(-2), strict=True)]
        for k in (5, 6, 7):
            groups[k] = groups[k - 1].compose(groups[k])
        rotation = torch.stack([group.rotation for group in groups], dim=-3)
        translation = torch.stack([group.translation for group in groups], dim=-2)
        return backbone.broadcast(1).compose(Rigid(rotation, translation))

    def _turned_defaults(self, angles: Tensor, aatype: Tensor) -> Rigid:
        """Default frame of each group, turned about its x axis by its angle (backbone: not turned)."""
        default = Rigid.from_matrix(self.default_frames[aatype].expand(*angles.shape[:-2], 8, 4, 4))
        sin, cos = F.pad(angles, (0, 0, 1, 0))[..., None].unbind(-2)
        cos = cos + self.backbone_group
        x, y, z = default.rotation.unbind(-1)
        return Rigid(torch.stack((x, cos * y + sin * z, cos * z - sin * y), dim=-1), default.translation)

    def atom14(self, frames: Rigid, aatype: Tensor) -> Tensor:
        """Positions [*, N, 14, 3], angstrom; zero where the residue type has no such atom."""
        select = self.atom_groups[aatype]
        rotation = (select[..., None, None] * frames.rotation[..., None, :, :, :]).sum(-3)
        translation = (select[..., None] * frames.translation[..., None, :, :]).sum(-2)
        placed = rotate(rotation, self.atom_positions[aatype]) + translation
        return placed * self.atom_mask[aatype][..., None]


class StructureOutputs(NamedTuple):
    """Trajectory over the iterations (dimension 1) in angstrom, and the last state."""

    sm_frames: Tensor  # [B, iterations, N, 7], quaternion and translation
    sm_sidechain_frames: Tensor  # [B, iterations, N, 8, 4, 4]
    sm_unnormalized_angles: Tensor  # [B, iterations, N, 7, 2]
    sm_angles: Tensor  # [B, iterations, N, 7, 2]
    sm_positions: Tensor  # [B, iterations, N, 14, 3]
    sm_states: Tensor  # [B, iterations, N, c_s]
    sm_single: Tensor  # [B, N, c_s]


class StructureModule(nn.Module):
    """Frames, angles and atoms from the single and pair representation (Supplement Algorithm 20)."""

    ops: Operations = REFERENCE

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c = config.structure
        self.num_iterations, self.dropout = c.num_blocks, c.dropout
        self.layer_norm_s = LayerNorm(config.c_s)
        self.layer_norm_z = LayerNorm(config.c_z)
        self.linear_in = Linear(config.c_s, config.c_s)
        self.ipa = InvariantPointAttention(config.c_s, config.c_z, c)
        self.layer_norm_ipa = LayerNorm(config.c_s)
        self.transition = StructureTransition(config.c_s)
        self.bb_update = BackboneUpdate(config.c_s)
        self.angle_resnet = AngleResnet(config.c_s, c)
        self.place_atoms = AtomPlacement()

    def forward(self, s: Tensor, z: Tensor, mask: Tensor, aatype: Tensor) -> StructureOutputs:
        """s: [B, N, c_s]; z: [B, N, N, c_z]; mask: [B, N], fp32; aatype: int64 [B, N]. Weights are shared."""
        s_initial, z, s, shared = self.enter(s, z)
        states, quaternions, translations = self.iterate(s, z, shared, mask, self._dropout_masks(s))
        return self.read_out(states, s_initial, quaternions, translations, aatype)

    def iterate(
        self, s: Tensor, z: Tensor, shared: IPAShared, mask: Tensor, dropout: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """States [B, iterations, N, c_s], quaternions [.., 4] and translations [.., 3] after each iteration."""
        sizes = (self.num_iterations, *self.ipa.sizes)
        weights = (*shared[1:], *self.weights_of_iterations())
        found = self.ops.structure_iterations(s, z, shared.pair_bias, mask, dropout, weights, sizes, MASK_INF)
        if found is not None:  # in one operation
            states, quaternions, translations = (x.transpose(0, 1) for x in found)
            return states, quaternions, translations
        quaternion, translation = self._identity_frames(s)
        after: list[tuple[Tensor, Tensor, Tensor]] = []
        for index in range(self.num_iterations):
            s, quaternion, translation = self.iteration(
                s, z, shared, quaternion, translation, mask, None if dropout is None else dropout[index]
            )
            after.append((s, quaternion, translation))
            # Gradients flow between iterations through translations and s only (Supplement 1.8.3).
            quaternion = quaternion.detach()
        states, quaternions, translations = (torch.stack(values, dim=1) for values in zip(*after, strict=True))
        return states, quaternions, translations

    def weights_of_iterations(self) -> list[Tensor]:
        """Weight and bias of every layer of an iteration after the attention itself, in the order of its lines."""
        transition = self.transition
        layers = (
            *(self.ipa.linear_out, self.layer_norm_ipa, transition.linear_1, transition.linear_2, transition.linear_3),
            *(transition.layer_norm, self.bb_update.linear),
        )
        return [parameter for layer in layers for parameter in (layer.weight, layer.bias)]

    def enter(self, s: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor, IPAShared]:
        """Normalised s and z, the first state, and what all iterations share; fp32."""
        s_initial, z = self.layer_norm_s(s.float()), self.layer_norm_z(z.float())
        return s_initial, z, self.linear_in(s_initial), self.ipa.share(z)

    def iteration(
        self,
        s: Tensor,
        z: Tensor,
        shared: IPAShared,
        quaternion: Tensor,
        translation: Tensor,
        mask: Tensor,
        dropout: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """s [B, N, c_s], quaternion [B, N, 4] and translation [B, N, 3] after one iteration (lines 5 to 10)."""
        after_attention, after_transition = (None, None) if dropout is None else dropout.unbind(0)
        frames = Rigid(quaternion_to_rotation(quaternion), translation)
        s = s + self.ipa.attend(s, z, shared, frames, mask)
        s = self.transition(self.layer_norm_ipa(dropped(s, after_attention)), after_transition)
        return s, *update_frame(quaternion, frames, self.bb_update(s))

    def read_out(
        self,
        s: Tensor,
        s_initial: Tensor,
        quaternion: Tensor,
        translation: Tensor,
        aatype: Tensor,
    ) -> StructureOutputs:
        """Angles, groups and atoms of all iterations at once: none of them feeds the next iteration.

        s: [B, iterations, N, c_s]; quaternion: [B, iterations, N, 4]; translation: [B, iterations, N, 3].
        """
        unnormalised = self.angle_resnet(s, s_initial[:, None])
        frames, groups, unnormalised, angles, atoms = self.place_atoms(quaternion, translation, unnormalised, aatype)
        return StructureOutputs(
            sm_frames=frames,
            sm_sidechain_frames=groups,
            sm_unnormalized_angles=unnormalised,
            sm_angles=angles,
            sm_positions=atoms,
            sm_states=s,
            sm_single=s[:, -1],
        )

    def _identity_frames(self, s: Tensor) -> tuple[Tensor, Tensor]:
        quaternion = s.new_zeros((*s.shape[:2], 4))
        quaternion[..., 0] = 1.0
        return quaternion, s.new_zeros((*s.shape[:2], 3))

    def _dropout_masks(self, s: Tensor) -> Tensor | None:
        """[iterations, 2, B, N, c_s]: after attention and after the transition, from one draw."""
        if not self.training or self.dropout == 0.0:
            return None
        return self.ops.dropout_mask((self.num_iterations, 2, *s.shape), self.dropout, s.device)
