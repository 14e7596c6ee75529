"""Exchanges of an axial-parallel group: values, and gradients equal to those of the unsharded computation."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from processes import run_ranks
from scalefold.parallel.dap.collectives import Group
from scalefold.parallel.dap.exchanges import (
    begin_exchange,
    begin_gather,
    end_exchange,
    end_gather,
    exchange,
    exchange_all,
    gather_same,
    gather_shared,
    scatter,
)

pytestmark = pytest.mark.distributed


def world() -> Group:
    """All ranks of a test."""
    assert dist.group.WORLD is not None
    return Group(dist.group.WORLD)


def chain(rank: int, size: int, shape: tuple[int, ...], split: int, concat: int) -> tuple[np.ndarray, np.ndarray]:
    """scatter -> per-rank work -> exchange -> work -> shared gather -> per-rank work -> same gather, on every rank."""
    group = world()
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


def beside(rank: int) -> tuple[np.ndarray, np.ndarray, list[list[str]]]:
    """An exchange in two halves around another; what was under way then, in the other's backward, and at the end."""
    group, flights, seen = world(), {}, []
    x = (torch.arange(24.0).reshape(4, 3, 2).sin() + rank).double().requires_grad_()
    other = torch.full((4, 2), 1.0 + rank, dtype=torch.double, requires_grad=True)
    under_way = begin_exchange(x.square(), 0, 1, group, flights)
    seen.append(list(flights))
    other_out = exchange(other.exp(), 0, 1, group)
    other_out.register_hook(lambda _: seen.append(list(flights)))
    out = end_exchange(under_way, 0, 1, group, flights)
    (out.cos().sum() + other_out.sum() * out.mean()).backward()
    return out.detach().numpy(), x.grad.numpy(), [*seen, list(flights)]


def at_once(rank: int) -> tuple[np.ndarray, np.ndarray]:
    group = world()
    x = (torch.arange(24.0).reshape(4, 3, 2).sin() + rank).double().requires_grad_()
    other = torch.full((4, 2), 1.0 + rank, dtype=torch.double)
    out, other_out = exchange(x.square(), 0, 1, group), exchange(other.exp(), 0, 1, group)
    (out.cos().sum() + other_out.sum() * out.mean()).backward()
    return out.detach().numpy(), x.grad.numpy()


def test_an_exchange_in_two_halves_equals_one_at_once_with_others_in_between() -> None:
    for (out, grad, seen), (expected, expected_grad) in zip(run_ranks(beside, 2), run_ranks(at_once, 2), strict=True):
        np.testing.assert_array_equal(out, expected)
        np.testing.assert_array_equal(grad, expected_grad)
        assert seen == [["forward"], ["backward"], []]


def gathered(rank: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """A gather at once, and in two halves around a product whose backward stands between theirs."""
    found, group = [], world()
    for flights in (None, {}):
        x = (torch.arange(24.0).reshape(4, 3, 2).sin() + rank).double().requires_grad_()
        if flights is None:
            y, out = x.exp(), gather_shared(x.square(), 1, group)
        else:
            under_way = begin_gather(x.square(), 1, group, flights)
            y = x.exp()
            out = end_gather(under_way, 1, group, flights)
        (out.cos().sum() * (rank + 1) + y.sum() * out.mean()).backward()
        found.append((out.detach().numpy(), x.grad.numpy()))
        assert not flights
    return found


def test_a_gather_in_two_halves_equals_one_at_once() -> None:
    for (expected, expected_grad), (out, grad) in run_ranks(gathered, 2):
        np.testing.assert_array_equal(out, expected)
        np.testing.assert_array_equal(grad, expected_grad)


def together(rank: int) -> list[np.ndarray]:
    """Two tensors in one exchange and in two, with their gradients."""
    found, group = [], world()
    for at_once in (True, False):
        x = (torch.arange(24.0).reshape(4, 3, 2).sin() + rank).double().requires_grad_()
        y = x.detach().exp().requires_grad_()
        a, b = exchange_all((x, y), 0, 1, group) if at_once else (exchange(x, 0, 1, group), exchange(y, 0, 1, group))
        (a.cos().sum() + (a * b).sum()).backward()
        found += [a.detach().numpy(), b.detach().numpy(), x.grad.numpy(), y.grad.numpy()]
    return found


def test_several_tensors_in_one_exchange_equal_several_exchanges() -> None:
    for found in run_ranks(together, 2):
        for one, other in zip(found[:4], found[4:], strict=True):
            np.testing.assert_array_equal(one, other)


def test_a_length_that_cannot_be_shared_is_named() -> None:
    def uneven(rank: int) -> None:
        with pytest.raises(ValueError, match="a dimension of 3 cannot be shared by 2 ranks"):
            scatter(torch.ones(3), 0, world())

    run_ranks(uneven, 2)
