"""Finds coordinates in matrix products that may round to TF32: values so large that nothing else has them."""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "vdot", "linear", "matmul"}
FAR = 1e4  # how far a test moves its frames and points


class LooseProducts(TorchDispatchMode):
    """Notes matrix products under the tf32 switch, and those that have a coordinate of a far place as a factor."""

    def __init__(self) -> None:
        super().__init__()
        self.seen, self.with_coordinates = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[1].split(".")[0].rstrip("_")
        if name in PRODUCTS and torch.backends.cuda.matmul.allow_tf32:
            self.seen += 1
            factors = [x for x in args if isinstance(x, Tensor)][-2:]
            if any(factor.abs().max().item() > FAR / 10 for factor in factors):
                self.with_coordinates.append(str(func))
        return func(*args, **(kwargs or {}))
