"""Random tensors, one per rank."""

import torch
from torch import Tensor

from kernel_accuracy import DEVICE


def tensors(size: int, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """``size`` tensors of a shape and type, the same in every call."""
    generator = torch.Generator().manual_seed(sum(shape))
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype) for _ in range(size)]
