"""The choice of names of ambiguous atoms in one launch, against its plain definition."""

import pytest
import torch
from torch import Tensor

from kernel_accuracy import DEVICE, Draw
from scalefold.kernels import reference
from scalefold.kernels.around import naming


def residues(batch: int, n: int) -> list[Tensor]:
    """Predictions near one of two namings, some atoms absent; about half of the residues have ambiguous ones."""
    draw = Draw(n)
    truth = 5.0 * draw(batch, n, 14, 3)
    ambiguous = torch.zeros(batch, n, 14, device=DEVICE)
    ambiguous[:, ::2, 6:8] = 1.0
    ambiguous[:, ::3, 8:10] = 1.0
    swapped = truth[:, :, [0, 1, 2, 3, 4, 5, 7, 6, 9, 8, 10, 11, 12, 13]]
    alternative = torch.where(ambiguous[..., None] > 0, swapped, truth)
    flip = draw.mask(batch, n)[..., None, None]
    predicted = flip * alternative + (1.0 - flip) * truth + 0.3 * draw(batch, n, 14, 3)
    return [predicted, truth, alternative, draw.mask(batch, n, 14), ambiguous]


@pytest.mark.parametrize(("batch", "n"), [(1, 5), (2, 23), (1, 41), (1, 1)])
def test_the_choice_is_that_of_the_definition(batch, n):
    arguments = residues(batch, n)
    expected = reference.better_naming(*arguments)
    assert torch.equal(naming.better_naming(*arguments), expected)
    assert n < 20 or 0.0 < expected.mean().item() < 1.0


def test_residues_without_ambiguous_atoms_keep_their_names():
    *positions, exists, ambiguous = residues(1, 9)
    assert not naming.better_naming(*positions, exists, torch.zeros_like(ambiguous)).any()
    predicted, truth, _ = positions
    assert not naming.better_naming(predicted, truth, truth, exists, ambiguous).any(), "a tie"


def test_what_the_kernel_does_not_take_is_named():
    arguments = residues(1, 3)
    assert naming.obstacle(*arguments) is None
    assert naming.obstacle(arguments[0].double(), *arguments[1:]) == "not everything is float32"
    assert naming.obstacle(*(x[:, :0] for x in arguments)) == "no residues"
