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

Where whoever makes b has written it to both ranks, the first row is one product behind a barrier.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from scalefold.kernels.destination import Destination, OfOperands
from scalefold.parallel.dap.collectives import Flight, Group, Lasts, begin_all_gather, gather_destination

TWO = 2  # ranks


class ProductOfTwo(nn.Module):
    """In the place of a ``model.triangle.TriangleProduct``."""

    def __init__(self, group: Group, outgoing: bool) -> None:
        super().__init__()
        self.group, self.outgoing = group, outgoing
        self._destination: Destination | None = None

    def destinations(self, z: Tensor, channels: int) -> OfOperands:
        """Where whoever makes b of z [B, I / 2, J, c_z] may write it, so many channels; the product follows."""
        if self.outgoing:
            b = z.new_empty(len(z), channels, *z.shape[1:3], device="meta")
            self._destination = gather_destination(b, 2, self.group)
        return None, self._destination

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """a, b: [B, c, I / 2, J], this rank's rows -> those of the product, likewise."""
        destination, self._destination = self._destination, None
        if self.outgoing:
            return _Outgoing.apply(a, b, self.group, destination)
        return _Incoming.apply(a, b, self.group)


class _Halves:
    """Which half of a whole dimension of ``length`` belongs to whom, and products of which halves are exchanged."""

    def __init__(self, group: Group, length: int) -> None:
        half, own = length // TWO, group.rank
        self.group, self.other = group, 1 - own
        self.mine = slice(own * half, (own + 1) * half)
        self.others = slice(self.other * half, (self.other + 1) * half)

    def with_rows_of_both(
        self, x: Tensor, y: Tensor, lasts: Lasts, destination: Destination | None = None
    ) -> tuple[Tensor, Tensor]:
        """x y^T for this rank's x and both ranks' rows of y, all [C, I / 2, J]; and these rows [C, I, J]."""
        if destination is not None and destination.written:
            assert self.group.direct is not None
            both = self.group.direct.arrived(destination, alone=True).flatten(0, 1)
            return x @ _across(both), both
        flight, out = begin_all_gather(y, 1, self.group, lasts, destination), torch.empty_like(x)
        torch.bmm(x, _across(y), out=out[..., self.mine])
        flight.wait()
        both = flight.received
        torch.bmm(x, _across(both[:, self.others]), out=out[..., self.others])
        return out, both

    def begin_sum(self, x: Tensor, y: Tensor) -> tuple[Tensor, Flight]:
        """This rank's part of its own rows of the sum of both ranks' x^T y, and what ``end_sum`` waits for."""
        part = _across(x[..., self.others]) @ y
        flight = begin_all_gather(part, 0, self.group, Lasts.SHORT)
        return _across(x[..., self.mine]) @ y, flight

    def end_sum(self, own: Tensor, flight: Flight) -> Tensor:
        """With the other rank's part."""
        flight.wait()
        own += flight.received.chunk(TWO)[self.other]
        return own


def _across(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


class _Outgoing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, group: Group, destination: Destination | None) -> Tensor:
        shape, (a, b) = a.shape, (x.flatten(0, 1) for x in (a, b))
        ctx.halves = _Halves(group, a.shape[2])
        x, both = ctx.halves.with_rows_of_both(a, b, Lasts.by(ctx), destination)
        ctx.save_for_backward(a, both)
        return x.view(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (a, both), shape, d = ctx.saved_tensors, grads[0].shape, grads[0].flatten(0, 1)
        own, flight = ctx.halves.begin_sum(d, a)
        d_a = d @ both
        return d_a.view(shape), ctx.halves.end_sum(own, flight).view(shape), None, None


class _Incoming(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, group: Group) -> Tensor:
        shape, (a, b) = a.shape, (x.flatten(0, 1) for x in (a, b))
        ctx.halves = _Halves(group, a.shape[2])
        ctx.save_for_backward(a, b)
        return ctx.halves.end_sum(*ctx.halves.begin_sum(a, b)).view(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (a, b), shape, d = ctx.saved_tensors, grads[0].shape, grads[0].flatten(0, 1)
        d_a, both = ctx.halves.with_rows_of_both(b, d, Lasts.SHORT)
        return d_a.view(shape), (a @ both).view(shape), None
