"""Input gradients of ``ops.linear`` for compute capability 9.0 in Gluon, beside the program in Triton.

``input_gradient`` takes the arguments of the function of ``ops.linear`` that it replaces, but for the row mask, and
gives the same results. It has an obstacle: the Gluon program takes bf16 rows of 128 channels that lie densely and fill
whole tiles, and runs only where it is known to win, which the tuned tables say (HOPPER = 1). It sums in a fixed order
and uses no atomics: equal inputs give equal bits.

Triton's interpreter cannot run Gluon. What can be tested without a GPU is that the program compiles and that obstacles
are found; what it computes is tested on a GPU.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from scalefold.kernels import tuning
from scalefold.kernels.hopper import CONSUMERS, PART
from scalefold.kernels.hopper.attention import CAPABILITY, MULTIPROCESSORS
from scalefold.kernels.instructions import INTERPRETED
from scalefold.kernels.rows import Norm, fused_view, memory_order, row_views

try:
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from scalefold.kernels.hopper.gradient import hopper_gradient

    MISSING = None
except (ImportError, AttributeError) as error:  # Gluon is experimental: names move between versions
    MISSING = f"this Triton's Gluon is another one: {error}"

KERNEL = "norm_linear_hopper_backward"
CHANNELS = 128
SQUARE = (CHANNELS, CHANNELS)
NARROW_WIDTH, MOST_NARROW = 16, 8  # rows of a weight below which it is narrow; most that the program takes
MOST = 4  # projections whose input gradient one program sums up
WARPS = 4  # of a consumer: each has a line of partial sums
SLOTS = (227 - 3) * 1024  # bytes of shared memory for weights and tiles
TILE, WEIGHT = PART * CHANNELS * 2, CHANNELS * CHANNELS * 2  # bytes


def obstacle(
    x: Tensor,
    row_mask: Tensor | None,
    weights: Sequence[Tensor],
    ds: Sequence[Tensor],
    has_bias: Sequence[bool],
    through: Tensor | None,
) -> str | None:
    """Why ``input_gradient`` cannot or should not run, or None."""
    order, (wide, narrow) = memory_order(x), _split(weights)
    if MISSING or INTERPRETED.value:
        return MISSING or "the interpreter cannot run Gluon"
    if tuning.capability() != CAPABILITY:
        return f"compute capability {tuning.capability() / 10} is not 9.0"
    present = [x, *weights, *ds, *([] if through is None else [through])]
    if other := [y.dtype for y in present if y.dtype != torch.bfloat16]:
        return f"{str(other[0]).removeprefix('torch.')} is not bfloat16"
    if not 1 <= len(wide) <= MOST or any(tuple(weight.shape) != SQUARE for weight in wide):
        return f"not one to {MOST} weights {CHANNELS} x {CHANNELS}"
    if row_mask is not None or any(has_bias[: len(wide) - 1]) or any(has_bias[len(wide) :]):
        return "a row mask, or biases of other projections than the last wide one"
    if len(narrow) > 1 or any(weight.shape[0] > MOST_NARROW for weight in narrow):
        return f"more than one narrow weight, or more than {MOST_NARROW} rows of it"
    if x.shape[:-1].numel() % PART or x.numel() == 0:
        return f"rows do not come in tiles of {PART}"
    if x.stride(-1) != 1 and through is not None:
        return "channels that lie first, and a residual connection"
    rows = [_by_rows(y, order) for y in (*ds[: len(wide)], *([] if through is None else [through]))]
    tiles = _by_channels(x, order) if x.stride(-1) != 1 else _by_rows(x, order)
    if not all(map(_is_aligned, (tiles, *rows))):
        return "rows do not lie densely"
    return None if _config(x, len(wide))["HOPPER"] else "the table prefers the Triton program"


def input_gradient(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weights: Sequence[Tensor],
    ds: Sequence[Tensor],
    has_bias: Sequence[bool],
    through: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``ops.linear.input_gradient`` without a row mask: the gradient of x, the layer norm, and partial sums."""
    (wide, narrow), order, by_channels = _split(weights), memory_order(x), x.stride(-1) != 1
    count, c, biased = x.shape[:-1].numel(), x.shape[-1], has_bias[len(wide) - 1]
    dx, flat = torch.empty_like(x), x.new_empty(count, c)
    config = _config(x, len(wide))
    depth = min(config["DEPTH"], deepest(len(wide), through is not None))
    programs = min(_multiprocessors(x.device), count // PART)
    lines = programs * CONSUMERS * WARPS
    partials = torch.empty(lines, (2 + biased) * c, dtype=torch.float32, device=x.device)
    views, dims, _ = row_views({"x": x, "narrow_d": ds[len(wide)] if narrow else None})
    hopper_gradient[(programs,)](
        _tiles(x, order, by_channels), *(_tiles(d, order, False) for d in ds[: len(wide)]),
        *[None] * (MOST - len(wide)), None if through is None else _tiles(through, order, False),
        _matrix(fused_view(wide), *SQUARE), _tiles(dx, order, by_channels), _matrix(flat, PART, CHANNELS),
        Norm(norm_weight, norm_bias), narrow[0] if narrow else None, views["narrow_d"], dims, partials, count // PART,
        COUNT=len(wide), BIASED=biased, NARROW=narrow[0].shape[0] if narrow else 0, DEPTH=depth,
        REGISTERS=config["REGISTERS"], COLUMNS=by_channels, num_warps=4,
    )  # fmt: skip
    return dx, _in_order(order, flat, x.shape), partials


def deepest(count: int, through: bool) -> int:
    """How many sets of tiles fit beside ``count`` weights; through: a gradient comes through a residual connection."""
    return (SLOTS - count * WEIGHT) // ((1 + count + through) * TILE)


def _split(weights: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Wide and narrow weights."""
    wide = [weight for weight in weights if weight.shape[0] >= NARROW_WIDTH]
    return wide, [weight for weight in weights if weight.shape[0] < NARROW_WIDTH]


def _config(x: Tensor, num_wide: int) -> tuning.Config:
    c = x.shape[-1]
    fields = tuning.row_fields(x.shape[:-1].numel(), x.dtype, c=c, n=num_wide * c, by_channels=int(x.stride(-1) != 1))
    return tuning.lookup(KERNEL, **fields)


def _in_order(order: Sequence[int], flat: Tensor, shape: Sequence[int]) -> Tensor:
    """View of flat [rows, w], rows numbered in ``order``, as [*shape, w]."""
    inverse = [list(order).index(d) for d in range(len(order))]
    return flat.view(*[shape[d] for d in order], flat.shape[-1]).permute(*inverse, len(order))


def _by_rows(x: Tensor, order: Sequence[int]) -> Tensor | None:
    """View of x: [*, c] as [rows, c], rows numbered in ``order``; None if their distance varies."""
    return _viewed(x.permute(*order, -1), (-1, x.shape[-1]))


def _by_channels(x: Tensor, order: Sequence[int]) -> Tensor | None:
    """The same as [c, rows]."""
    return _viewed(x.permute(-1, *order), (x.shape[-1], -1))


def _viewed(x: Tensor, shape: tuple[int, int]) -> Tensor | None:
    try:
        return x.view(shape)
    except RuntimeError:  # torch's word for strides that no view has
        return None


def _is_aligned(matrix: Tensor | None) -> bool:
    """Whether the copy engine can address a matrix of 16-bit values."""
    return matrix is not None and matrix.stride(1) == 1 and matrix.stride(0) % 8 == 0 and matrix.data_ptr() % 16 == 0


def _tiles(x: Tensor, order: Sequence[int], by_channels: bool) -> Any:
    """Tiles of rows for the copy engine."""
    if by_channels:
        return _matrix(_by_channels(x, order), CHANNELS, PART)
    return _matrix(_by_rows(x, order), PART, CHANNELS)


def _matrix(x: Tensor | None, lines: int, columns: int) -> Any:
    """A matrix for the copy engine, in blocks [lines, columns]; copied if it begins at no multiple of 16 bytes."""
    assert x is not None
    layout = gl.NVMMASharedLayout.get_default_for([lines, columns], gl.bfloat16)
    return TensorDescriptor.from_tensor(x if x.data_ptr() % 16 == 0 else x.clone(), [lines, columns], layout)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def default(fields: tuning.Fields, capability: int) -> tuning.Config:
    """As many sets of slots as fit beside the weights, up to DEPTH."""
    return {"HOPPER": 0, "DEPTH": 4, "REGISTERS": 240}


tuning.register(KERNEL, default)
