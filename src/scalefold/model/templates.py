"""Template embedding (Supplement 1.7.1, Algorithms 16 and 17, tables 1 and 10)."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from scalefold.config import TemplateConfig
from scalefold.kernels.table import REFERENCE, Operations
from scalefold.model.layers import (
    AttentionProjections,
    LayerNorm,
    Linear,
    Transition,
    affine,
    one_hot,
    relu_linear,
    run_block,
)
from scalefold.model.rigid import squared_distances
from scalefold.model.triangle import TriangleAttention, TriangleMultiplication, around_ending_node

POINTWISE_INF = 1e5
PAIR_FEATURES = 88
PAIR_KEYS = ("aatype", "pseudo_beta", "pseudo_beta_mask", "all_atom_mask")
ANGLE_FEATURES = 57
DISTOGRAM_BINS = 39
DISTOGRAM_FIRST_EDGE_ANGSTROM, DISTOGRAM_LAST_EDGE_ANGSTROM = 3.25, 50.75
DISTOGRAM_OPEN_EDGE_SQ = 1e5
DISTOGRAM_EDGES = (
    *(DISTOGRAM_FIRST_EDGE_ANGSTROM, DISTOGRAM_LAST_EDGE_ANGSTROM),
    *(DISTOGRAM_BINS, DISTOGRAM_OPEN_EDGE_SQ),
)
NUM_CLASSES = 22
BACKBONE_SLOTS = slice(0, 3)  # N, CA, C in atom37 order
PSI = 2


def template_pair_features(features: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
    """Pair features of all templates, [B, T, N, N, 88] of zeros and ones in ``dtype``.

    39 distogram bins of pseudo-beta distances, pseudo-beta pair mask, residue type of j, of i, three channels for
    unit vectors (always zero: the benchmark leaves them out), backbone pair mask; all times the backbone pair mask.
    """
    aatype, points, beta_mask, atoms = (features[f"template_{key}"] for key in PAIR_KEYS)
    backbone = atoms[..., BACKBONE_SLOTS].prod(-1)
    backbone, beta_mask = backbone.to(dtype), beta_mask.to(dtype)
    pair_mask = (backbone[..., :, None] * backbone[..., None, :])[..., None]
    num_residues = aatype.shape[-1]
    kinds = one_hot(aatype, NUM_CLASSES, dtype)
    shape = (*aatype.shape[:2], num_residues, num_residues)
    parts = (
        template_distogram(points, dtype),
        (beta_mask[..., :, None] * beta_mask[..., None, :])[..., None],
        kinds[:, :, None, :, :].expand(*shape, NUM_CLASSES),
        kinds[:, :, :, None, :].expand(*shape, NUM_CLASSES),
        pair_mask.new_zeros((*shape, 3)),
        pair_mask,
    )
    return torch.cat(parts, dim=-1) * pair_mask


def template_distogram(pseudo_beta: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """One-hot of squared distances between strict edges, in ``dtype``. pseudo_beta: [*, N, 3] -> [*, N, N, 39]."""
    edges = torch.linspace(
        DISTOGRAM_FIRST_EDGE_ANGSTROM, DISTOGRAM_LAST_EDGE_ANGSTROM, DISTOGRAM_BINS, device=pseudo_beta.device
    ).square()
    upper = torch.cat((edges[1:], edges.new_full((1,), DISTOGRAM_OPEN_EDGE_SQ)))
    distance_sq = squared_distances(pseudo_beta)[..., None]
    return ((distance_sq > edges) & (distance_sq < upper)).to(dtype)


def template_angle_features(features: Mapping[str, Tensor]) -> Tensor:
    """Residue type, torsion angles, their alternatives and masks, fp32 [B, T, N, 57]."""
    parts = (
        one_hot(features["template_aatype"], NUM_CLASSES),
        features["template_torsion_angles_sin_cos"].flatten(-2),
        features["template_alt_torsion_angles_sin_cos"].flatten(-2),
        features["template_torsion_angles_mask"],
    )
    return torch.cat(parts, dim=-1)


class TemplateAngleEmbedder(nn.Module):
    """Torsion features to rows of the MSA representation (Supplement Algorithm 2, line 7)."""

    def __init__(self, c_m: int) -> None:
        super().__init__()
        self.linear_1 = Linear(ANGLE_FEATURES, c_m, init="relu")
        self.linear_2 = Linear(c_m, c_m, init="relu")

    def forward(self, angle_features: Tensor) -> Tensor:
        """[B, T, N, 57], fp32 -> [B, T, N, c_m]."""
        return self.linear_2(relu_linear(self.linear_1, angle_features.to(self.linear_1.weight.dtype)))


class TemplatePairEmbedder(nn.Module):
    """Pair features to the template representation (Supplement Algorithm 2, line 9)."""

    ops: Operations = REFERENCE

    def __init__(self, c_t: int) -> None:
        super().__init__()
        self.linear = Linear(PAIR_FEATURES, c_t, init="relu")

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """Templates among ``features`` -> [B, T, N, N, c_t], in the type of the weights."""
        given = [features[f"template_{key}"] for key in PAIR_KEYS]
        found = self.ops.embed_template_pairs(*given, DISTOGRAM_EDGES, linears=affine(self.linear))
        return self.linear(template_pair_features(features, self.linear.weight.dtype)) if found is None else found


class TemplatePairBlock(nn.Module):
    """One block of Supplement Algorithm 16; attention comes before multiplication, unlike in the Evoformer."""

    def __init__(self, c_t: int, config: TemplateConfig) -> None:
        super().__init__()
        rate, heads = config.dropout, config.num_heads_tri
        self.tri_att_start = TriangleAttention(c_t, config.c_hidden_tri_att, heads, dropout=rate)
        self.tri_att_end = TriangleAttention(c_t, config.c_hidden_tri_att, heads, dropout=rate)
        self.tri_mul_out = TriangleMultiplication(c_t, config.c_hidden_tri_mul, outgoing=True, dropout=rate)
        self.tri_mul_in = TriangleMultiplication(c_t, config.c_hidden_tri_mul, outgoing=False, dropout=rate)
        self.pair_transition = Transition(c_t, config.transition_n)
        self.rows_to_columns = nn.Identity()
        self.columns_to_rows = nn.Identity()

    def forward(self, t: Tensor, mask_rows: Tensor, mask_columns: Tensor) -> Tensor:
        """t: [B, N, N, c_t], rows; masks [B, N, N] in both layouts -> t, rows."""
        t = self.tri_att_start(t, mask_rows)
        t = self.rows_to_columns(t)
        t = around_ending_node(self.tri_att_end, t, mask_columns)
        t = self.columns_to_rows(t)
        t = self.tri_mul_out(t, mask_rows)
        t = self.tri_mul_in(t, mask_rows)
        return self.pair_transition(t)


class TemplatePairStack(nn.Module):
    """Template pair stack (Supplement Algorithm 16). Templates lie along the batch dimension: each is independent."""

    def __init__(self, c_t: int, config: TemplateConfig) -> None:
        super().__init__()
        self.checkpoint_blocks = False
        self.blocks = nn.ModuleList(TemplatePairBlock(c_t, config) for _ in range(config.num_blocks))
        self.layer_norm = LayerNorm(c_t)
        self.shard_rows = nn.Identity()
        self.shard_columns = nn.Identity()
        self.gather_rows = nn.Identity()

    def forward(self, t: Tensor, pair_mask: Tensor) -> Tensor:
        """t: [B, T, N, N, c_t]; pair_mask: [B, N, N], fp32, the same for all templates -> [B, T, N, N, c_t]."""
        shape = t.shape[:2]
        mask = pair_mask[:, None].expand(-1, shape[1], -1, -1).flatten(0, 1)
        mask_rows, mask_columns = self.shard_rows(mask), self.shard_columns(mask)
        t = self.shard_rows(t.flatten(0, 1))
        for block in self.blocks:
            t = run_block(block, self.checkpoint_blocks, t, mask_rows, mask_columns)
        return self.layer_norm(self.gather_rows(t)).unflatten(0, shape)


class TemplatePointwiseAttention(nn.Module):
    """Attention of every residue pair over the templates (Supplement Algorithm 17)."""

    ops: Operations = REFERENCE

    def __init__(self, c_z: int, c_t: int, config: TemplateConfig) -> None:
        super().__init__()
        self.mha = AttentionProjections(c_z, c_t, config.c_hidden_pointwise, config.num_heads_pointwise, gated=False)

    def forward(self, t: Tensor, z: Tensor, template_mask: Tensor) -> Tensor:
        """The update of z. t: [B, T, N, N, c_t]; z: [B, N, N, c_z]; template_mask: [B, T], fp32 -> like z.

        Without any template all slots weigh alike: the caller has to drop the update of such samples.
        """
        mha = self.mha
        q, k, v = (mha.split_heads(x) for x in (mha.linear_q(z), mha.linear_k(t), mha.linear_v(t)))
        return mha.linear_o(template_attention(q, k, v, template_mask, POINTWISE_INF).flatten(-2))

    def added(self, t: Tensor, z: Tensor, template_mask: Tensor) -> Tensor:
        """z plus its update; z itself for samples without any template."""
        mha = self.mha
        weights = [linear.weight for linear in (mha.linear_q, mha.linear_k, mha.linear_v, mha.linear_o)]
        found = self.ops.add_templates(z, t, template_mask, weights, mha.linear_o.bias, mha.num_heads, POINTWISE_INF)
        if found is not None:
            return found
        update = self(t, z, template_mask)
        any_template = (template_mask.sum(1) > 0).to(update.dtype)
        return z + update * any_template[:, None, None, None]


def template_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, inf: float) -> Tensor:
    """Attention of every residue pair over its templates; logits and softmax in fp32.

    q: [B, I, J, H, D]; k, v: [B, T, I, J, H, D]; mask: [B, T], fp32 -> [B, I, J, H, D].
    """
    logits = (q[:, None].float() * q.shape[-1] ** -0.5 * k.float()).sum(-1)
    logits = logits + ((mask - 1.0) * inf)[:, :, None, None, None]
    weights = torch.softmax(logits, dim=1).to(v.dtype)
    return (weights[..., None] * v).sum(1)
