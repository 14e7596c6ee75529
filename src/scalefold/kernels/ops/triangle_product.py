"""Product of a triangle multiplication (Supplement Algorithms 11, 12), both directions: the library's or Gluon's."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from scalefold.kernels.hopper import triangle_product as products
from scalefold.kernels.hopper.choice import chosen


class _Product(torch.autograd.Function):
    """Without a Gluon program products of views; autograd's own backward would hand over transposed gradients."""

    @staticmethod
    def forward(ctx, a, b, outgoing):
        ctx.save_for_backward(a, b)
        ctx.outgoing = outgoing
        if chosen("product of a triangle", products.product_obstacle(a, b)):
            return products.product(a, b, outgoing)
        return a @ b.transpose(-1, -2) if outgoing else a.transpose(-1, -2) @ b

    @staticmethod
    @once_differentiable
    def backward(ctx, d):
        a, b = ctx.saved_tensors
        if chosen("gradients of a triangle's product", products.product_obstacle(a, b, d)):
            return *products.gradients(a, b, d, ctx.outgoing), None
        if ctx.outgoing:
            return d @ b, d.transpose(-1, -2) @ a, None
        return b @ d.transpose(-1, -2), a @ d, None


def triangle_product(a: Tensor, b: Tensor, outgoing: bool) -> Tensor:
    """``reference.triangle_product``: batched products of the library or in Gluon, forward and backward, no copies."""
    return _Product.apply(a, b, outgoing)  # type: ignore[return-value]
