"""Layers that every part of the model is built from."""

import math
from collections.abc import Iterable
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from scalefold.kernels.destination import Destination, OfOperands
from scalefold.kernels.table import REFERENCE, Operations

Init = Literal["default", "relu", "glorot", "gating", "normal", "final"]

# Standard deviation of a unit normal distribution truncated at two standard deviations.
TRUNCATED_STD = 0.87962566103423978


class Linear(nn.Linear):
    """Affine map of the last dimension that knows how it starts (Supplement 1.11.4).

    [*, c_in] -> [*, c_out]. ``init``: default (LeCun) and relu (He) are truncated normal, glorot is Xavier uniform,
    normal is plain LeCun normal, gating starts as sigmoid(1) whatever the input, final starts as zero.
    """

    def __init__(self, c_in: int, c_out: int, bias: bool = True, init: Init = "default") -> None:
        super().__init__(c_in, c_out, bias=bias)
        self.init: Init = init

    def reset_parameters(self) -> None:
        """Nothing: ``initialise`` fills all parameters of a finished model from one generator."""

    @torch.no_grad()
    def fill(self, generator: torch.Generator) -> None:
        """Draw the initial weights."""
        fan_in = self.in_features
        if self.init in ("default", "relu"):
            std = math.sqrt((2.0 if self.init == "relu" else 1.0) / fan_in) / TRUNCATED_STD
            nn.init.trunc_normal_(self.weight, std=std, a=-2.0 * std, b=2.0 * std, generator=generator)
        elif self.init == "glorot":
            nn.init.xavier_uniform_(self.weight, generator=generator)
        elif self.init == "normal":
            self.weight.normal_(std=fan_in**-0.5, generator=generator)
        else:
            self.weight.zero_()
        if self.bias is not None:
            self.bias.fill_(1.0 if self.init == "gating" else 0.0)


def affine(*layers: "Linear | LayerNorm") -> list[tuple[Tensor, Tensor]]:
    """Weight and bias of each layer, as operations take them."""
    return [(layer.weight, layer.bias) for layer in layers]


class LayerNorm(nn.Module):
    """Normalisation of the last dimension with weight and bias; statistics in fp32."""

    ops: Operations = REFERENCE

    def __init__(self, c: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(c))
        self.bias = nn.Parameter(torch.zeros(c))

    def forward(self, x: Tensor) -> Tensor:
        """x: [*, c] -> [*, c]."""
        return self.ops.layer_norm(x, self.weight, self.bias)

    @torch.no_grad()
    def fill(self, generator: torch.Generator) -> None:
        """Start as plain normalisation."""
        self.weight.fill_(1.0)
        self.bias.zero_()


class Transition(nn.Module):
    """Two-layer perceptron with residual (Supplement Algorithms 9 and 15). x: [*, c] -> [*, c].

    It has no mask: padded positions carry values that attention and sums leave out.
    """

    ops: Operations = REFERENCE

    def __init__(self, c: int, n: int) -> None:
        super().__init__()
        self.layer_norm = LayerNorm(c)
        self.linear_1 = Linear(c, n * c, init="relu")
        self.linear_2 = Linear(n * c, c, init="final")

    def forward(self, x: Tensor) -> Tensor:
        """x + transition(x)."""
        norm, one, two = self.layer_norm, self.linear_1, self.linear_2
        return self.ops.transition(x, norm.weight, norm.bias, one.weight, one.bias, two.weight, two.bias)


class AttentionProjections(nn.Module):
    """Weights of a multi-head attention: query, key, value, output and, for self attention, gate."""

    def __init__(self, c_q: int, c_kv: int, c_hidden: int, num_heads: int, gated: bool = True) -> None:
        super().__init__()
        self.num_heads = num_heads
        width = c_hidden * num_heads
        self.linear_q = Linear(c_q, width, bias=False, init="glorot")
        self.linear_k = Linear(c_kv, width, bias=False, init="glorot")
        self.linear_v = Linear(c_kv, width, bias=False, init="glorot")
        self.linear_o = Linear(width, c_q, init="final")
        if gated:
            self.linear_g = Linear(c_q, width, init="gating")

    def split_heads(self, x: Tensor) -> Tensor:
        """[*, H * D] -> [*, H, D]; the channel index is head * D + d."""
        return x.unflatten(-1, (self.num_heads, -1))


def shared_row_dropout(
    ops: Operations, x: Tensor, rate: float, training: bool, several: tuple[int, ...] = ()
) -> Tensor | None:
    """Dropout mask [B, 1, N, c] for x [B, rows, N, c], the same for all rows, or None outside training.

    ``several``: leading dimensions of independent masks, to draw those of many blocks in one go.
    """
    if not training or rate == 0.0:
        return None
    shape = (x.shape[0], 1, x.shape[2], x.shape[3])
    return ops.dropout_mask((*several, *shape), rate, x.device)


def dropped(x: Tensor, mask: Tensor | None) -> Tensor:
    """x times a ready dropout mask, or x itself without one."""
    return x if mask is None else x * mask


def one_hot(index: Tensor, num_classes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[*] integers -> [*, num_classes]; indices outside the range give zeros. Never synchronises with the host."""
    return (index[..., None] == _classes(num_classes, index.device)).to(dtype)


@cache
def _classes(count: int, device: torch.device) -> Tensor:
    return torch.arange(count, device=device)


def destination(point: nn.Module, x: Tensor, channels: int) -> Destination | None:
    """Where ``point``, which comes next, has its operand, of so many channels, written by whoever makes it from x.

    None: nowhere yet.
    """
    wanted = getattr(point, "destination", None)
    return None if wanted is None else wanted(x, channels)


def destinations(points: Iterable[nn.Module], z: Tensor, channels: int) -> OfOperands:
    """The same for both operands of a triangle multiplication, made from z; the first of ``points`` that has some."""
    wanted = (getattr(point, "destinations", None) for point in points)
    return next((own(z, channels) for own in wanted if own is not None), (None, None))


def run_block(block: nn.Module, recompute: bool, *args):
    """Call ``block``; with ``recompute`` its activations are computed again in the backward (same random draws)."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *args, use_reentrant=False)
    return block(*args)


def initialise(model: nn.Module, seed: int) -> None:
    """Draw all weights of ``model`` in registration order from one generator (Supplement 1.11.4)."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        fill = getattr(module, "fill", None)
        if fill is not None:
            fill(generator)


def relu_linear(linear: nn.Linear, x: Tensor) -> Tensor:
    """relu(linear(x))."""
    return F.relu(linear(x))
