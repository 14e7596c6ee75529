"""Operations on the MSA representation (Supplement 1.6.1 to 1.6.4).

Shapes are those of one process: with axial parallelism S or N is this rank's share, see ``model.evoformer``.
"""

from torch import Tensor, nn

from scalefold.kernels.destination import Destination
from scalefold.kernels.table import REFERENCE, Operations
from scalefold.model.layers import AttentionProjections, LayerNorm, Linear, destination, shared_row_dropout

MASK_INF = 1e9
GLOBAL_ATTENTION_EPS = 1e-8


class MSARowAttentionWithPairBias(nn.Module):
    """Gated self attention along every sequence, biased by the pair representation (Supplement Algorithm 7)."""

    ops: Operations = REFERENCE

    def __init__(self, c_m: int, c_z: int, c_hidden: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.layer_norm_m = LayerNorm(c_m)
        self.layer_norm_z = LayerNorm(c_z)
        self.linear_z = Linear(c_z, num_heads, bias=False, init="normal")
        self.mha = AttentionProjections(c_m, c_m, c_hidden, num_heads)
        self.begin_gather_bias = nn.Identity()
        self.end_gather_bias = nn.Identity()
        self.begin_pair_to_rows = nn.Identity()

    def forward(
        self, m: Tensor, z: Tensor, mask: Tensor, dropout: Tensor | None = None, ahead: Destination | None = None
    ) -> tuple[Tensor, Tensor]:
        """m + dropout(update), and z as it is. m: [B, S, N, c_m]; z: [B, I, J, c_z]; mask: [B, S, N] -> m, z.

        Whoever needs z afterwards takes the returned one, behind ``end_pair_to_rows``: its gradients then meet in one
        operation.
        ``dropout``: a mask drawn ahead, or None to draw it here. ``ahead``: where m may be written instead.
        """
        ops, mha, norm = self.ops, self.mha, self.layer_norm_m
        bias_ahead = destination(self.begin_gather_bias, z, mha.num_heads)
        z, bias = ops.layer_norm_linear(
            z, self.layer_norm_z.weight, self.layer_norm_z.bias, (self.linear_z.weight,), (None,), bias_ahead
        )
        bias, z = self.begin_gather_bias(bias), self.begin_pair_to_rows(z)
        m, q, k, v, gate = ops.layer_norm_linear(
            m,
            norm.weight,
            norm.bias,
            (mha.linear_q.weight, mha.linear_k.weight, mha.linear_v.weight, mha.linear_g.weight),
            (None, None, None, mha.linear_g.bias),
        )
        bias = self.end_gather_bias(bias).permute(0, 3, 1, 2)
        o = ops.attention(*map(mha.split_heads, (q, k, v)), mask, bias, MASK_INF)
        if dropout is None:
            dropout = shared_row_dropout(ops, m, self.dropout, self.training)
        return ops.gated_output(m, o, gate, mha.linear_o.weight, mha.linear_o.bias, dropout, ahead), z


class MSAColumnAttention(nn.Module):
    """Gated self attention along every residue column (Supplement Algorithm 8)."""

    ops: Operations = REFERENCE

    def __init__(self, c_m: int, c_hidden: int, num_heads: int) -> None:
        super().__init__()
        self.layer_norm_m = LayerNorm(c_m)
        self.mha = AttentionProjections(c_m, c_m, c_hidden, num_heads)

    def forward(self, m: Tensor, mask: Tensor) -> Tensor:
        """m + update. m: [B, S, N, c_m]; mask: [B, S, N] -> [B, S, N, c_m], a transposed view."""
        ops, mha, norm = self.ops, self.mha, self.layer_norm_m
        m, mask = m.transpose(1, 2), mask.transpose(1, 2)
        m, q, k, v, gate = ops.layer_norm_linear(
            m,
            norm.weight,
            norm.bias,
            (mha.linear_q.weight, mha.linear_k.weight, mha.linear_v.weight, mha.linear_g.weight),
            (None, None, None, mha.linear_g.bias),
        )
        o = ops.attention(*map(mha.split_heads, (q, k, v)), mask, None, MASK_INF)
        return ops.gated_output(m, o, gate, mha.linear_o.weight, mha.linear_o.bias, None).transpose(1, 2)


class GlobalAttentionProjections(nn.Module):
    """Weights of global attention: many query heads, one key and value head."""

    def __init__(self, c: int, c_hidden: int, num_heads: int) -> None:
        super().__init__()
        self.linear_q = Linear(c, c_hidden * num_heads, bias=False, init="glorot")
        self.linear_k = Linear(c, c_hidden, bias=False, init="glorot")
        self.linear_v = Linear(c, c_hidden, bias=False, init="glorot")
        self.linear_g = Linear(c, c_hidden * num_heads, init="gating")
        self.linear_o = Linear(c_hidden * num_heads, c, init="final")


class MSAColumnGlobalAttention(nn.Module):
    """Column attention with one mean query per column, for the many extra sequences (Supplement Algorithm 19)."""

    ops: Operations = REFERENCE

    def __init__(self, c_m: int, c_hidden: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.layer_norm_m = LayerNorm(c_m)
        self.global_attention = GlobalAttentionProjections(c_m, c_hidden, num_heads)

    def forward(self, m: Tensor, mask: Tensor) -> Tensor:
        """m + update. m: [B, S, N, c_m]; mask: [B, S, N] -> [B, S, N, c_m]."""
        norm, g = self.layer_norm_m, self.global_attention
        return self.ops.global_attention(
            m,
            mask,
            norm.weight,
            norm.bias,
            g.linear_q.weight,
            g.linear_k.weight,
            g.linear_v.weight,
            g.linear_g.weight,
            g.linear_g.bias,
            g.linear_o.weight,
            g.linear_o.bias,
            self.num_heads,
            MASK_INF,
            GLOBAL_ATTENTION_EPS,
        )


class OuterProductMean(nn.Module):
    """Update of the pair representation from the MSA (Supplement Algorithm 10)."""

    ops: Operations = REFERENCE

    def __init__(self, c_m: int, c_z: int, c_hidden: int) -> None:
        super().__init__()
        self.layer_norm = LayerNorm(c_m)
        self.linear_1 = Linear(c_m, c_hidden)
        self.linear_2 = Linear(c_m, c_hidden)
        self.linear_out = Linear(c_hidden**2, c_z, init="final")
        self.gather_columns = nn.Identity()

    def forward(self, z: Tensor, m: Tensor, mask: Tensor, num_rows: Tensor) -> tuple[Tensor, Tensor]:
        """z + update, and m as it is. z: [B, I, J, c_z]; m: [B, S, I, c_m]; mask: [B, S, I] -> z, m.

        Whoever needs m afterwards takes the returned one: its gradients then meet in one operation. num_rows [B, I, J],
        fp32:
        the sequences that cover both residues, plus a small constant; the output's bias is divided by it too.
        """
        norm, one, two, out = self.layer_norm, self.linear_1, self.linear_2, self.linear_out
        ahead = destination(self.gather_columns, m, two.out_features)
        m, a, b = self.ops.outer_product_project(
            m, mask, norm.weight, norm.bias, one.weight, one.bias, two.weight, two.bias, ahead
        )
        return self.ops.outer_product_update(z, a, self.gather_columns(b), num_rows, out.weight, out.bias), m
