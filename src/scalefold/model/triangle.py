"""Triangular updates of the pair representation (Supplement 1.6.5 and 1.6.6).

z: [B, I, J, c_z]. With axial parallelism I is this rank's share, see ``model.evoformer``.
"""

from torch import Tensor, nn

from scalefold.kernels.destination import Destination
from scalefold.kernels.table import REFERENCE, Operations
from scalefold.model.layers import (
    AttentionProjections,
    LayerNorm,
    Linear,
    destination,
    destinations,
    shared_row_dropout,
)

MASK_INF = 1e9


class TriangleProduct(nn.Module):
    """The sum over the third residue of a triangular multiplicative update."""

    ops: Operations = REFERENCE

    def __init__(self, outgoing: bool) -> None:
        super().__init__()
        self.outgoing = outgoing

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """x_ij = sum_k a_ik b_jk (outgoing) or sum_k a_ki b_kj (incoming). a, b: [B, c, I, J] -> [B, c, I, J]."""
        return self.ops.triangle_product(a, b, self.outgoing)


class TriangleMultiplication(nn.Module):
    """Triangular multiplicative update along "outgoing" or "incoming" edges (Supplement Algorithms 11 and 12)."""

    ops: Operations = REFERENCE

    def __init__(self, c_z: int, c_hidden: int, outgoing: bool, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.linear_a_p = Linear(c_z, c_hidden)
        self.linear_a_g = Linear(c_z, c_hidden, init="gating")
        self.linear_b_p = Linear(c_z, c_hidden)
        self.linear_b_g = Linear(c_z, c_hidden, init="gating")
        self.linear_g = Linear(c_z, c_z, init="gating")
        self.linear_z = Linear(c_hidden, c_z, init="final")
        self.layer_norm_in = LayerNorm(c_z)
        self.layer_norm_out = LayerNorm(c_hidden)
        self.rows_to_channels = nn.Identity()
        self.product = TriangleProduct(outgoing)
        self.channels_to_rows = nn.Identity()

    def forward(self, z: Tensor, mask: Tensor, dropout: Tensor | None = None) -> Tensor:
        """z + dropout(update). z: [B, I, J, c_z]; mask: [B, I, J] -> [B, I, J, c_z].

        ``dropout``: a mask drawn ahead, or None to draw it here.
        """
        norm = self.layer_norm_in
        z, a, b = self.ops.triangle_project(
            z,
            mask,
            norm.weight,
            norm.bias,
            self.linear_a_p.weight,
            self.linear_a_p.bias,
            self.linear_a_g.weight,
            self.linear_a_g.bias,
            self.linear_b_p.weight,
            self.linear_b_p.bias,
            self.linear_b_g.weight,
            self.linear_b_g.bias,
            destinations((self.rows_to_channels, self.product), z, self.linear_a_p.out_features),
        )
        if dropout is None:
            dropout = shared_row_dropout(self.ops, z, self.dropout, self.training)
        a, b = self.rows_to_channels((a, b))
        x = self.channels_to_rows(self.product(a, b))
        return self.ops.triangle_output(
            z,
            x,
            norm.weight,
            norm.bias,
            self.layer_norm_out.weight,
            self.layer_norm_out.bias,
            self.linear_z.weight,
            self.linear_z.bias,
            self.linear_g.weight,
            self.linear_g.bias,
            dropout,
        )


class TriangleAttention(nn.Module):
    """Gated self attention along rows of z, biased by the third edge (Supplement Algorithms 13 and 14).

    Around the starting node as it is; around the ending node when the caller passes transposed views of z and mask.
    """

    ops: Operations = REFERENCE

    def __init__(self, c_z: int, c_hidden: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.layer_norm = LayerNorm(c_z)
        self.linear = Linear(c_z, num_heads, bias=False, init="normal")
        self.mha = AttentionProjections(c_z, c_z, c_hidden, num_heads)
        self.gather_bias = nn.Identity()

    def forward(
        self, z: Tensor, mask: Tensor, dropout: Tensor | None = None, ahead: Destination | None = None
    ) -> Tensor:
        """z + dropout(update). z: [B, I, J, c_z]; mask: [B, I, J] -> [B, I, J, c_z].

        ``dropout``: a mask drawn ahead, or None to draw it here. ``ahead``: where the result may be written instead.
        """
        ops, mha, norm = self.ops, self.mha, self.layer_norm
        bias_ahead = destination(self.gather_bias, z, mha.num_heads)
        z, q, k, v, gate, bias = ops.layer_norm_linear(
            z,
            norm.weight,
            norm.bias,
            (
                mha.linear_q.weight,
                mha.linear_k.weight,
                mha.linear_v.weight,
                mha.linear_g.weight,
                self.linear.weight,
            ),
            (None, None, None, mha.linear_g.bias, None),
            bias_ahead,
        )
        bias = self.gather_bias(bias).permute(0, 3, 1, 2)
        o = ops.attention(*map(mha.split_heads, (q, k, v)), mask, bias, MASK_INF)
        if dropout is None:
            dropout = shared_row_dropout(ops, z, self.dropout, self.training)
        return ops.gated_output(z, o, gate, mha.linear_o.weight, mha.linear_o.bias, dropout, ahead)


def around_ending_node(attention: TriangleAttention, z: Tensor, mask: Tensor, dropout: Tensor | None = None) -> Tensor:
    """Triangle attention around the ending node: the same operation on the transposed edges (Algorithm 14)."""
    return attention(z.transpose(1, 2), mask.transpose(1, 2), dropout).transpose(1, 2)
