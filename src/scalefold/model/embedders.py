"""Input, recycling and extra MSA embedders (Supplement Algorithms 3, 4, 5, 32; 1.5)."""

import torch
from torch import Tensor, nn

from scalefold.kernels.table import REFERENCE, Operations
from scalefold.model.layers import LayerNorm, Linear, affine, one_hot
from scalefold.model.rigid import squared_distances

TARGET_FEATURES = 22
MSA_FEATURES = 49
EXTRA_MSA_CLASSES = 23
EXTRA_MSA_KEYS = ("extra_msa", "extra_has_deletion", "extra_deletion_value")
RECYCLING_BINS = 15
RECYCLING_FIRST_EDGE_ANGSTROM, RECYCLING_LAST_EDGE_ANGSTROM = 3.25, 20.75
RECYCLING_OPEN_EDGE_SQ = 1e8
RECYCLING_EDGES = (
    *(RECYCLING_FIRST_EDGE_ANGSTROM, RECYCLING_LAST_EDGE_ANGSTROM),
    *(RECYCLING_BINS, RECYCLING_OPEN_EDGE_SQ),
)


class InputEmbedder(nn.Module):
    """Initial MSA and pair representations (Supplement Algorithms 3, 4, 5)."""

    ops: Operations = REFERENCE

    def __init__(self, c_m: int, c_z: int, relpos_k: int) -> None:
        super().__init__()
        self.relpos_k = relpos_k
        self.linear_tf_z_i = Linear(TARGET_FEATURES, c_z)
        self.linear_tf_z_j = Linear(TARGET_FEATURES, c_z)
        self.linear_tf_m = Linear(TARGET_FEATURES, c_m)
        self.linear_msa_m = Linear(MSA_FEATURES, c_m)
        self.linear_relpos = Linear(2 * relpos_k + 1, c_z)

    def forward(self, target_feat: Tensor, residue_index: Tensor, msa_feat: Tensor) -> tuple[Tensor, Tensor]:
        """target_feat: [B, N, 22]; residue_index: int64 [B, N]; msa_feat: [B, S, N, 49] -> m, z.

        m: [B, S, N, c_m]; z: [B, N, N, c_z], both in the type of the weights.
        """
        dtype = self.linear_tf_m.weight.dtype
        target_feat, msa_feat = target_feat.to(dtype), msa_feat.to(dtype)
        z = self.linear_tf_z_i(target_feat)[:, :, None] + self.linear_tf_z_j(target_feat)[:, None]
        m = self.linear_msa_m(msa_feat) + self.linear_tf_m(target_feat)[:, None]
        return m, z + self.linear_relpos(self.relative_positions(residue_index, dtype))

    def relative_positions(self, residue_index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Clipped offset i - j as one-hot, in integers: bf16 cannot count beyond 256. [B, N] -> [B, N, N, 2k + 1]."""
        offset = residue_index[:, :, None] - residue_index[:, None, :]
        return one_hot(offset.clamp(-self.relpos_k, self.relpos_k) + self.relpos_k, 2 * self.relpos_k + 1, dtype)


class RecyclingEmbedder(nn.Module):
    """What the previous pass found (Supplement Algorithm 32); on the first pass its inputs are zeros, not absent."""

    def __init__(self, c_m: int, c_z: int) -> None:
        super().__init__()
        self.linear = Linear(RECYCLING_BINS, c_z)
        self.layer_norm_m = LayerNorm(c_m)
        self.layer_norm_z = LayerNorm(c_z)

    def forward(self, m0_prev: Tensor, z_prev: Tensor, x_prev: Tensor) -> tuple[Tensor, Tensor]:
        """Updates of m[:, 0] and z.

        m0_prev: [B, N, c_m]; z_prev: [B, N, N, c_z]; x_prev: pseudo-beta positions [B, N, 3], angstrom, fp32.
        """
        dtype = self.linear.weight.dtype
        return self.layer_norm_m(m0_prev), self.linear(self.distogram(x_prev, dtype)) + self.layer_norm_z(z_prev)

    @staticmethod
    def distogram(x_prev: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """One-hot of squared distances between strict edges; below the first edge all zero. -> [B, N, N, 15]."""
        edges = torch.linspace(
            RECYCLING_FIRST_EDGE_ANGSTROM, RECYCLING_LAST_EDGE_ANGSTROM, RECYCLING_BINS, device=x_prev.device
        ).square()
        upper = torch.cat((edges[1:], edges.new_full((1,), RECYCLING_OPEN_EDGE_SQ)))
        distance_sq = squared_distances(x_prev)[..., None]
        return ((distance_sq > edges) & (distance_sq < upper)).to(dtype)


def extra_msa_features(features: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
    """Residue class, has-deletion, deletion value of the extra sequences, [B, S_extra, N, 25] in ``dtype``."""
    classes, has, value = (features[key] for key in EXTRA_MSA_KEYS)
    parts = (one_hot(classes, EXTRA_MSA_CLASSES, dtype), has[..., None].to(dtype), value[..., None].to(dtype))
    return torch.cat(parts, dim=-1)


class ExtraMSAEmbedder(nn.Module):
    """Linear embedding of the extra sequences (Supplement Algorithm 2, line 14)."""

    ops: Operations = REFERENCE

    def __init__(self, c_e: int) -> None:
        super().__init__()
        self.linear = Linear(EXTRA_MSA_CLASSES + 2, c_e)

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        """Extra sequences among ``features`` -> [B, S_extra, N, c_e], in the type of the weights."""
        found = self.ops.embed_extra(*(features[key] for key in EXTRA_MSA_KEYS), linears=affine(self.linear))
        return self.linear(extra_msa_features(features, self.linear.weight.dtype)) if found is None else found
