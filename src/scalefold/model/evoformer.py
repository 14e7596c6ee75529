"""Evoformer and extra MSA stacks (Supplement Algorithms 6 and 18): one block class, two configurations.

Axial parallelism enters through named resharding points. Each is an ``nn.Identity`` attribute;
``parallel/dap/points.py`` replaces it, by attribute name, in every module that has one. Layouts of a representation [B,
rows, columns, c] over P ranks: "rows" holds [B, rows / P, columns, c], "columns" holds [B, rows, columns / P, c],
"full" holds everything on every rank, "channels" holds [B, c / P, rows, columns] of a channels-first tensor.

========================  ==============================================  =====================================
point (attribute name)    tensors                                         layout before -> after
========================  ==============================================  =====================================
``shard_rows``            stack entry: m, masks, row counts               full -> rows (dimension 1)
``shard_columns``         stack entry: z, masks                           full -> columns (dimension 2)
``gather_rows``           stack exit: m (Evoformer)                       rows -> full; all ranks go on alike
``gather_all_columns``    stack exit: z                                   columns -> full; all go on alike
``gather_bias``           bias [B, I, J, H] of triangle attention         rows -> full; ranks use it differently
``begin_gather_bias``     bias [B, I, J, H] of row attention of the MSA,  columns -> full, while the MSA is
``end_gather_bias``       before and behind its projections               projected; ranks use it differently
``gather_columns``        operand b [B, S, J, c] of the outer product     columns -> full; used differently
``rows_to_columns``       m before column attention; z before             rows -> columns
                          attention around the ending node
``columns_to_rows``       template: z after the attention around the      columns -> rows
                          ending node
``begin_pair_to_rows``    z once row attention of the MSA has its bias,   columns -> rows, while the MSA
``end_pair_to_rows``      to the outer product, which adds to it          is attended to
``begin_columns_to_rows`` m after the outer product, to the end of a      columns -> rows, while the
``end_columns_to_rows``   block, where the next one takes it              pair updates go on
``rows_to_channels``      operands (a, b), [B, c, I, J] each, of a        rows (dimension 2) -> channels
                          triangle multiplication                         (dimension 1)
``channels_to_rows``      its product x [B, c, I, J]                      channels -> rows (dimension 2)
========================  ==============================================  =====================================

Among two ranks a, b and x stay rows, and the product of a triangle multiplication itself is another one
(``parallel/dap/halves.py``). A point may have a ``destination`` (``layers``) for its operand, which is handed to
the operation that makes it.

The outer product needs no exchange of its own result: its operand a is this rank's columns of m, which are its rows
of z. Dropout masks are shared along the sharded dimension by construction ([B, 1, N, c] on row shards; the transpose
on column shards), so they need no slicing as long as all ranks draw the same numbers. Parameters inside
``*_stack.blocks`` receive partial gradients that must be summed over the P ranks; all others receive equal ones.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from scalefold.config import EvoformerConfig
from scalefold.model.layers import Linear, Transition, destination, run_block, shared_row_dropout
from scalefold.model.msa import (
    MSAColumnAttention,
    MSAColumnGlobalAttention,
    MSARowAttentionWithPairBias,
    OuterProductMean,
)
from scalefold.model.triangle import TriangleAttention, TriangleMultiplication, around_ending_node

OUTER_PRODUCT_EPS = 1e-3


class StackMasks(NamedTuple):
    """Masks of a stack in the layouts in which they are used, all fp32.

    Attention down the columns walks along a column of its mask, so there the elements of a column are neighbours.
    """

    msa_rows: Tensor  # [B, S, N], rows
    msa_columns: Tensor  # [B, S, N], columns
    msa_down: Tensor  # the same values, dense along S
    pair_rows: Tensor  # [B, N, N], rows
    pair_down: Tensor  # [B, N, N], columns, dense along the first N
    num_rows: Tensor  # [B, N, N], rows: sequences that cover both residues, plus OUTER_PRODUCT_EPS


class BlockDropout(NamedTuple):
    """Masks of one block, drawn with those of all other blocks of its stack; all None where nothing is dropped."""

    msa_row: Tensor | None = None  # [B, 1, N, c_m]
    tri_mul_out: Tensor | None = None  # [B, 1, N, c_z], like all that follow
    tri_mul_in: Tensor | None = None
    tri_att_start: Tensor | None = None
    tri_att_end: Tensor | None = None


class EvoformerBlockCore(nn.Module):
    """The part that both stacks share: MSA transition, outer product, pair updates."""

    def __init__(self, c_m: int, c_z: int, config: EvoformerConfig) -> None:
        super().__init__()
        rate, heads = config.pair_dropout, config.num_heads_tri
        self.msa_transition = Transition(c_m, config.transition_n)
        self.outer_product_mean = OuterProductMean(c_m, c_z, config.c_hidden_opm)
        self.tri_mul_out = TriangleMultiplication(c_z, config.c_hidden_tri_mul, outgoing=True, dropout=rate)
        self.tri_mul_in = TriangleMultiplication(c_z, config.c_hidden_tri_mul, outgoing=False, dropout=rate)
        self.tri_att_start = TriangleAttention(c_z, config.c_hidden_tri_att, heads, dropout=rate)
        self.tri_att_end = TriangleAttention(c_z, config.c_hidden_tri_att, heads, dropout=rate)
        self.pair_transition = Transition(c_z, config.transition_n)
        self.rows_to_columns = nn.Identity()
        self.begin_columns_to_rows = nn.Identity()
        self.end_columns_to_rows = nn.Identity()

    def forward(self, m: Tensor, z: Tensor, masks: StackMasks, dropout: BlockDropout) -> tuple[Tensor, Tensor]:
        """m: [B, S, N, c_m], columns; z: [B, N, N, c_z], rows -> m, rows, and z, columns."""
        m = self.msa_transition(m)
        z, m = self.outer_product_mean(z, m, masks.msa_columns, masks.num_rows)
        m = self.begin_columns_to_rows(m)
        z = self.tri_mul_out(z, masks.pair_rows, dropout.tri_mul_out)
        z = self.tri_mul_in(z, masks.pair_rows, dropout.tri_mul_in)
        ahead = destination(self.rows_to_columns, z, z.shape[-1])
        z = self.tri_att_start(z, masks.pair_rows, dropout.tri_att_start, ahead)
        z = self.rows_to_columns(z)
        z = around_ending_node(self.tri_att_end, z, masks.pair_down, dropout.tri_att_end)
        z = self.pair_transition(z)
        return self.end_columns_to_rows(m), z


class EvoformerBlock(nn.Module):
    """One block of Supplement Algorithm 6, or of Algorithm 18 with global column attention."""

    def __init__(self, c_m: int, c_z: int, config: EvoformerConfig, global_columns: bool) -> None:
        super().__init__()
        width, heads = config.c_hidden_msa_att, config.num_heads_msa
        column_attention = MSAColumnGlobalAttention if global_columns else MSAColumnAttention
        self.msa_att_row = MSARowAttentionWithPairBias(c_m, c_z, width, heads, config.msa_dropout)
        self.msa_att_col = column_attention(c_m, width, heads)
        self.core = EvoformerBlockCore(c_m, c_z, config)
        self.rows_to_columns = nn.Identity()
        self.end_pair_to_rows = nn.Identity()

    def forward(self, m: Tensor, z: Tensor, masks: StackMasks, dropout: BlockDropout) -> tuple[Tensor, Tensor]:
        """m: [B, S, N, c_m], rows; z: [B, N, N, c_z], columns -> the same."""
        ahead = destination(self.rows_to_columns, m, m.shape[-1])
        m, z = self.msa_att_row(m, z, masks.msa_rows, dropout.msa_row, ahead)
        m = self.rows_to_columns(m)
        m = self.msa_att_col(m, masks.msa_down)
        z = self.end_pair_to_rows(z)
        return self.core(m, z, masks, dropout)


class BlockStack(nn.Module):
    """A sequence of blocks between entry and exit of the sharded region."""

    def __init__(self, c_m: int, c_z: int, config: EvoformerConfig, global_columns: bool) -> None:
        super().__init__()
        self.checkpoint_blocks = False
        self.blocks = nn.ModuleList(EvoformerBlock(c_m, c_z, config, global_columns) for _ in range(config.num_blocks))
        self.shard_rows = nn.Identity()
        self.shard_columns = nn.Identity()
        self.gather_rows = nn.Identity()
        self.gather_all_columns = nn.Identity()

    def run_blocks(self, m: Tensor, z: Tensor, msa_mask: Tensor, pair_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Full tensors and masks in; out come shards, of m rows, of z columns."""
        masks = self.prepare_masks(msa_mask, pair_mask)
        m, z = self.shard_rows(m), self.shard_columns(z)
        for block, dropout in zip(self.blocks, self.draw_dropout(m, z.transpose(1, 2)), strict=True):
            m, z = run_block(block, self.checkpoint_blocks, m, z, masks, dropout)
        return m, z

    def draw_dropout(self, m: Tensor, z: Tensor) -> list[BlockDropout]:
        """Masks of all blocks, which share their rates, in two draws: hundreds of small launches fewer per pass.

        m, z: of what is dropped, whole rows.
        """
        count, first = len(self.blocks), self.blocks[0]
        assert isinstance(first, EvoformerBlock)
        msa, pair = first.msa_att_row, first.core.tri_mul_out
        of_m = shared_row_dropout(msa.ops, m, msa.dropout, self.training, (count,))
        of_z = shared_row_dropout(pair.ops, z, pair.dropout, self.training, (count, 4))
        rows = [None] * count if of_m is None else of_m.unbind(0)
        pairs = [(None,) * 4] * count if of_z is None else [block.unbind(0) for block in of_z.unbind(0)]
        return [BlockDropout(row, *four) for row, four in zip(rows, pairs, strict=True)]

    def prepare_masks(self, msa_mask: Tensor, pair_mask: Tensor) -> StackMasks:
        """Everything that blocks derive from masks, once per stack. msa_mask: [B, S, N]; pair_mask: [B, N, N]."""
        num_rows = torch.einsum("bsi,bsj->bij", msa_mask, msa_mask)
        msa_columns = self.shard_columns(msa_mask)
        return StackMasks(
            msa_rows=self.shard_rows(msa_mask),
            msa_columns=msa_columns,
            msa_down=dense_down(msa_columns),
            pair_rows=self.shard_rows(pair_mask),
            pair_down=dense_down(self.shard_columns(pair_mask)),
            num_rows=self.shard_rows(num_rows) + OUTER_PRODUCT_EPS,
        )


def dense_down(mask: Tensor) -> Tensor:
    """The same mask [B, rows, columns], with the elements of a column next to each other in memory."""
    return mask.transpose(1, 2).contiguous().transpose(1, 2)


class ExtraMSAStack(BlockStack):
    """Extra MSA stack: updates the pair representation only (Supplement Algorithm 18)."""

    def __init__(self, c_e: int, c_z: int, config: EvoformerConfig) -> None:
        super().__init__(c_e, c_z, config, global_columns=True)

    def forward(self, a: Tensor, z: Tensor, msa_mask: Tensor, pair_mask: Tensor) -> Tensor:
        """a: [B, S_extra, N, c_e]; z: [B, N, N, c_z]; masks [B, S_extra, N], [B, N, N], fp32 -> z."""
        return self.gather_all_columns(self.run_blocks(a, z, msa_mask, pair_mask)[1])


class EvoformerStack(BlockStack):
    """Evoformer (Supplement Algorithm 6) with the projection to the single representation."""

    def __init__(self, c_m: int, c_z: int, c_s: int, config: EvoformerConfig) -> None:
        super().__init__(c_m, c_z, config, global_columns=False)
        self.linear = Linear(c_m, c_s)

    def forward(self, m: Tensor, z: Tensor, msa_mask: Tensor, pair_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """m: [B, S, N, c_m]; z: [B, N, N, c_z]; masks [B, S, N], [B, N, N], fp32 -> m, z, s [B, N, c_s]."""
        m, z = self.run_blocks(m, z, msa_mask, pair_mask)
        m, z = self.gather_rows(m), self.gather_all_columns(z)
        return m, z, self.linear(m[:, 0])
