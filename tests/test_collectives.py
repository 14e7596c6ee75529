"""Exchanges of an axial-parallel group: values, and gradients equal to those of the unsharded computation."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from processes import run_ranks
from scalefold.parallel.collectives import exchange, gather_same, gather_shared, scatter

pytestmark = pytest.mark.distributed


def chain(rank: int, size: int, shape: tuple[int, ...], split: int, concat: int) -> tuple[np.ndarray, np.ndarray]:
    """scatter -> per-rank work -> exchange -> work -> shared gather -> per-rank work -> same gather, on every rank."""
    group = dist.group.WORLD
    x = torch.arange(float(np.prod(shape))).reshape(shape).sin().double().requires_grad_()
    local = scatter(x, concat, group).square()
    swapped = exchange(local, split, concat, group).exp()
    whole = gather_shared(swapped, split, group)
    mine = swapped * whole.mean()
    out = gather_same(mine, split, group)
    out.cos().sum().backward()
    return out.detach().numpy(), x.grad.numpy()


@pytest.mark.parametrize(
    "size, shape, split, concat", [(2, (4, 6, 3), 1, 0), (4, (1, 8, 4, 2), 1, 2), (2, (2, 2, 4), -1, 1)]
)
def test_a_chain_of_exchanges_equals_the_whole_computation(
    size: int, shape: tuple[int, ...], split: int, concat: int
) -> None:
    x = torch.arange(float(np.prod(shape))).reshape(shape).sin().double().requires_grad_()
    inner = x.square().exp()
    expected = inner * inner.mean()
    expected.cos().sum().backward()
    assert x.grad is not None
    for out, grad in run_ranks(chain, size, size, shape, split, concat):
        np.testing.assert_allclose(out, expected.detach().numpy(), rtol=1e-12)
        np.testing.assert_allclose(grad, x.grad.numpy(), rtol=1e-10)


def test_a_length_that_cannot_be_shared_is_named() -> None:
    def uneven(rank: int) -> None:
        with pytest.raises(ValueError, match="a dimension of 3 cannot be shared by 2 ranks"):
            scatter(torch.ones(3), 0, dist.group.WORLD)

    run_ranks(uneven, 2)
