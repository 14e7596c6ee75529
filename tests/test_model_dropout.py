"""Dropout of the stacks: drawn for all blocks at once, and still one mask for every sub-layer."""

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from torch import Tensor

from scalefold.config import ModelConfig
from scalefold.kernels.table import REFERENCE, use_operations
from scalefold.model.evoformer import BlockDropout, EvoformerStack

NUM_BLOCKS = 3


def stack(msa_dropout: float = 0.15, pair_dropout: float = 0.25) -> EvoformerStack:
    rates = {"msa_dropout": msa_dropout, "pair_dropout": pair_dropout}
    config = ModelConfig().evoformer.model_copy(update={"num_blocks": NUM_BLOCKS, **rates})
    return EvoformerStack(8, 16, 8, config).train()


def draw(model: EvoformerStack) -> list[BlockDropout]:
    torch.manual_seed(0)
    return model.draw_dropout(torch.zeros(2, 5, 40, 8), torch.zeros(2, 40, 40, 16))


def test_every_sublayer_of_every_block_has_a_mask_of_its_own_rate() -> None:
    masks = draw(stack())
    assert len(masks) == NUM_BLOCKS
    drawn = [[mask for mask in block if mask is not None] for block in masks]
    for row, *pairs in drawn:
        assert row.shape == (2, 1, 40, 8)
        assert len(pairs) == 4
        assert (row == 0).float().mean().item() == pytest.approx(0.15, abs=0.07)
        assert all(pair.shape == (2, 1, 40, 16) for pair in pairs)
        assert all((pair == 0).float().mean().item() == pytest.approx(0.25, abs=0.07) for pair in pairs)
    for one, other in combinations([mask for block in drawn for mask in block[1:]], 2):
        assert not torch.equal(one, other)


def test_a_stack_draws_twice_however_many_blocks_it_has() -> None:
    model, drawn = stack(), []

    def counted(shape: tuple[int, ...], rate: float, device: torch.device) -> Tensor:
        drawn.append(rate)
        return REFERENCE.dropout_mask(shape, rate, device)

    use_operations(model, replace(REFERENCE, dropout_mask=counted))
    model(torch.randn(1, 4, 6, 8), torch.randn(1, 6, 6, 16), torch.ones(1, 4, 6), torch.ones(1, 6, 6))
    assert drawn == [0.15, 0.25]


@pytest.mark.parametrize("training, rate", [(False, 0.25), (True, 0.0)])
def test_nothing_is_drawn_in_evaluation_or_at_rate_zero(training: bool, rate: float) -> None:
    assert draw(stack(rate, rate).train(training)) == [BlockDropout()] * NUM_BLOCKS
