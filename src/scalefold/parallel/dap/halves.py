"""The product of a triangle multiplication between two ranks, exchanged while a half of it is computed.

Operands and product are rows: a and b [B, c, I / 2, J] -> x [B, c, I / 2, J] of this rank. Either the rows of a whole
operand cross the wire or partial sums of the other rank's rows. What needs none of them is computed meanwhile:

==================  ===============================  ====================  =========================================
edges               sum                              what crosses          meanwhile
==================  ===============================  ====================  =========================================
outgoing            x_ij = sum_k a_ik b_jk           b                     x for this rank's j
its gradients       d_b_jk = sum_i d_ij a_ik         the other's d_b       d_a, and this rank's part of its own d_b
incoming            x_ij = sum_k a_ki b_kj           the other's x         this rank's part of its own x
its gradients       d_a_ki = sum_j b_kj d_ij         d                     d_a for this rank's i
==================  ===============================  ====================  =========================================
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from scalefold.parallel.dap.collectives import Flight, Group, Lasts, begin_all_gather

TWO = 2  # ranks


class ProductOfTwo(nn.Module):
    """In the place of a ``model.triangle.TriangleProduct``."""

    def __init__(self, group: Group, outgoing: bool) -> None:
        super().__init__()
        self.group, self.outgoing = group, outgoing

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """a, b: [B, c, I / 2, J], this rank's rows -> those of the product, likewise."""
        return (_Outgoing if self.outgoing else _Incoming).apply(a, b, self.group)


class _Halves:
    """Which half of a whole dimension belongs to whom, and what arrives of the other rank's."""

    def __init__(self, group: Group, length: int) -> None:
        half, own = length // TWO, group.rank
        self.group, self.other = group, 1 - own
        self.mine = slice(own * half, (own + 1) * half)
        self.others = slice(self.other * half, (self.other + 1) * half)

    def send(self, part: Tensor) -> Flight:
        """Exchange parts [C, ...] with the other rank beside what follows."""
        return begin_all_gather(part, 0, self.group, Lasts.SHORT)

    def receive(self, flight: Flight) -> Tensor:
        """What the other rank sent."""
        flight.wait()
        return flight.received.chunk(TWO)[self.other]


def _whole(x: Tensor, group: Group, lasts: Lasts) -> Flight:
    """Rows [C, I / 2, J] of both ranks."""
    return begin_all_gather(x, 1, group, lasts)


def _across(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


class _Outgoing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, group: Group) -> Tensor:
        shape, (a, b) = a.shape, (x.flatten(0, 1) for x in (a, b))
        flight, halves, x = _whole(b, group, Lasts.by(ctx)), _Halves(group, a.shape[2]), torch.empty_like(a)
        torch.bmm(a, _across(b), out=x[..., halves.mine])
        flight.wait()
        both = flight.received
        torch.bmm(a, _across(both[:, halves.others]), out=x[..., halves.others])
        ctx.save_for_backward(a, both)
        ctx.halves = halves
        return x.view(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (a, both), halves, (given,) = ctx.saved_tensors, ctx.halves, grads
        d = given.flatten(0, 1)
        flight = halves.send(_across(d[..., halves.others]) @ a)
        d_b, d_a = _across(d[..., halves.mine]) @ a, d @ both
        d_b += halves.receive(flight)
        return d_a.view(given.shape), d_b.view(given.shape), None


class _Incoming(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, group: Group) -> Tensor:
        shape, (a, b) = a.shape, (x.flatten(0, 1) for x in (a, b))
        halves = _Halves(group, a.shape[2])
        flight = halves.send(_across(a[..., halves.others]) @ b)
        x = _across(a[..., halves.mine]) @ b
        x += halves.receive(flight)
        ctx.save_for_backward(a, b)
        ctx.halves = halves
        return x.view(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (a, b), halves, (given,) = ctx.saved_tensors, ctx.halves, grads
        d = given.flatten(0, 1)
        flight, d_a = _whole(d, halves.group, Lasts.SHORT), torch.empty_like(a)
        torch.bmm(b, _across(d), out=d_a[..., halves.mine])
        flight.wait()
        both = flight.received
        torch.bmm(b, _across(both[:, halves.others]), out=d_a[..., halves.others])
        return d_a.view(given.shape), (a @ both).view(given.shape), None
