"""Gradients on compute capability 9.0 by programs in Gluon: when those of this folder run, and how."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from scalefold.kernels import tuning
from scalefold.kernels.hopper import CONSUMERS, HIDDEN_BLOCK, MULTIPROCESSORS, PART, choice
from scalefold.kernels.hopper import rows as hopper
from scalefold.kernels.hopper.rows import CHANNELS, MOST_SEQUENCES, OUTER_CHANNELS, matrix, outer_shape_obstacle
from scalefold.kernels.ops.elementwise import dense
from scalefold.kernels.rows import Affine, Norm, memory_order

try:
    from scalefold.kernels.hopper.gradients.hidden import hopper_transition_hidden
    from scalefold.kernels.hopper.gradients.outer_product import hopper_outer_operand, hopper_outer_weight
    from scalefold.kernels.hopper.gradients.transition import hopper_transition_input, hopper_transition_weights
    from scalefold.kernels.hopper.gradients.weights import hopper_weight_gradients

    MISSING = hopper.MISSING
except (ImportError, AttributeError) as error:  # as in ``rows``
    MISSING = f"this Triton's Gluon is another one: {error}"

PAIRED = 2  # channels, or values of j, of a consumer
GROUP = PAIRED * CONSUMERS  # channels of a of a program for the gradient of a
NAMES = ("outer_product_hopper_operands", "outer_product_hopper_weight")
TRANSITION_NAMES = ("transition_hopper_input", "transition_hopper_weights")
PRODUCTS_NAME = "weight_gradient_hopper"
FEWEST_HIDDEN = 4 * HIDDEN_BLOCK  # channels: what the loader has on its way
for _name in (*NAMES, *TRANSITION_NAMES, "transition_hopper_hidden", PRODUCTS_NAME):
    tuning.register(_name, lambda fields, capability: {"HOPPER": 0})


class ProductTiles(NamedTuple):
    """Of weight gradients: lines and columns of a tile, rows of a slot, slots; lines are channels of d or of a."""

    lines: int
    columns: int
    rows: int
    stages: int
    lines_of_a: bool


PRODUCT_TILES = {  # by widths of d and a
    (1024, 256): ProductTiles(128, 128, 64, 6, False),
    (32, 256): ProductTiles(128, 32, 64, 8, True),
}
MOST_PRODUCTS = 4  # of a launch


def obstacle(name: str, scaled: Tensor, a: Tensor, b: Tensor, weight: Tensor) -> str | None:
    """Why the program of ``name`` cannot or should not take these arguments of a backward, or None.

    scaled: [I, J, c_z]; a: [S, I, 32]; b: [S, J, 32].
    """
    if reason := outer_shape_obstacle(scaled, a, b, weight, MISSING):
        return reason
    if scaled.shape[1] % PART:
        return f"pairs do not come in tiles of {PART} x {PART}"
    if not all(map(hopper.is_dense, (a, weight))):
        return "sequences or the weight do not lie densely"
    fields = tuning.row_fields(scaled.shape[:-1].numel(), scaled.dtype, c=scaled.shape[2], sequences=a.shape[0])
    return choice.preference(tuning.lookup(name, **fields))


def _ranges(count: int, programs: int) -> tuple[int, int]:
    """Ranges of ``count`` steps, and steps of one: as many as fill the multiprocessors with ``programs`` each."""
    per_range = tuning.ceil_div(count, max(1, MULTIPROCESSORS // programs))
    return tuning.ceil_div(count, per_range), per_range


def operand_gradients(scaled: Tensor, a: Tensor, b: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Partial gradients [ranges, 32 * I * 128] of a and [ranges, 32 * J * 128] of b, as [channel, row, sequence]."""
    i, j, c = scaled.shape
    turned = dense(weight.view(c, OUTER_CHANNELS, OUTER_CHANNELS).transpose(1, 2)).view_as(weight)
    d_a = _operand(matrix(scaled.flatten(1), PART, c), b, weight, i, (0, c))
    return d_a, _operand(matrix(scaled.flatten(0, 1), PART, c), a, turned, j, (j, 0))


def _operand(scaled: object, other: Tensor, weight: Tensor, rows: int, steps: tuple[int, int]) -> Tensor:
    """Partial gradients of one operand with so many rows; ``other``: the other one, [S, count, 32]."""
    programs, count = rows // PART * (OUTER_CHANNELS // GROUP), other.shape[1]
    ranges, per_range = _ranges(count, programs)
    size = OUTER_CHANNELS * rows * MOST_SEQUENCES
    partials = torch.empty(ranges, size, dtype=torch.float32, device=other.device)
    hopper_outer_operand[(programs, ranges)](
        scaled, matrix(other.flatten(1), MOST_SEQUENCES, OUTER_CHANNELS),
        matrix(weight, weight.shape[0], PAIRED * OUTER_CHANNELS), partials, rows, *steps, count, per_range, num_warps=4,
    )  # fmt: skip
    return partials


def operand_of(total: Tensor, like: Tensor) -> Tensor:
    """A sum of partial gradients as the gradient of an operand: [S, rows, 32]."""
    return total.view(OUTER_CHANNELS, like.shape[1], MOST_SEQUENCES)[..., : like.shape[0]].permute(2, 1, 0)


def weight_partials(scaled: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Partial gradients [ranges, c_z * 32 * 32] of the weight."""
    (i, j, c), by_channel = scaled.shape, dense(a.permute(2, 0, 1)).flatten(0, 1)
    groups, tiles, pairs = OUTER_CHANNELS // CONSUMERS, i // PART, j // PAIRED
    ranges, per_range = _ranges(pairs, groups * tiles)
    size = c * OUTER_CHANNELS * OUTER_CHANNELS
    partials = torch.empty(PAIRED * tiles * ranges, size, dtype=torch.float32, device=a.device)
    hopper_outer_weight[(groups, tiles, ranges)](
        matrix(scaled.flatten(1), PART, c), matrix(by_channel, MOST_SEQUENCES, PART),
        matrix(b.flatten(1), MOST_SEQUENCES, PAIRED * OUTER_CHANNELS), partials, a.shape[0], pairs, per_range,
        num_warps=4,
    )  # fmt: skip
    return partials


def transition_obstacle(name: str, x: Tensor, d_out: Tensor, weights: Sequence[Tensor]) -> str | None:
    """Why a program of TRANSITION_NAMES cannot or should not take these arguments of ``ops.transition``, or None.

    x: the input or its norm, d_out: [*, c], rows as they lie.
    """
    if reason := choice.obstacle(MISSING, (x, d_out, *weights)):
        return reason
    (hidden, c), order = weights[0].shape, memory_order(x)
    if c != CHANNELS or hidden % FEWEST_HIDDEN:
        return f"{c} channels with {hidden} hidden ones"
    if not hopper.is_aligned(hopper.by_rows(d_out, order)):
        return "gradients of the output do not lie densely"
    return hopper.rows_obstacle(x) or hopper.preference(name, x, n=hidden)


def transition_input(
    x: Tensor, d_out: Tensor, norm: Norm, linear_1: Affine, weight_2: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of x: [*, c], the layer norm of x, and partial sums [tiles, 3 c]: for the norm's weight and bias and the
    bias of the second linear.
    """
    assert linear_1.weight is not None
    order, (hidden, c), count = memory_order(x), linear_1.weight.shape, x.shape[:-1].numel()
    dx, normed = torch.empty_like(x), torch.empty_like(x)
    partials = torch.empty(count // PART, 3 * c, dtype=torch.float32, device=x.device)
    hopper_transition_input[hopper.programs(x)](
        hopper.row_tiles(x, order), hopper.row_tiles(d_out, order),
        hopper.weight_tiles(linear_1.weight, HIDDEN_BLOCK, c), hopper.weight_tiles(weight_2, c, HIDDEN_BLOCK),
        hopper.row_tiles(dx, order), hopper.row_tiles(normed, order), norm, linear_1.bias, partials,
        hidden // HIDDEN_BLOCK, count // PART, num_warps=4,
    )  # fmt: skip
    return dx, normed, partials


def transition_weights(normed: Tensor, d_out: Tensor, linear_1: Affine, weight_2: Tensor) -> tuple[Tensor, ...]:
    """Partial gradients [ranges, *] of weight 1, weight 2 and bias 1."""
    assert linear_1.weight is not None
    order, (hidden, c), tiles = memory_order(normed), linear_1.weight.shape, normed.shape[:-1].numel() // PART
    groups = hidden // CHANNELS
    ranges, per_range = _ranges(tiles, groups)
    partials = torch.empty(ranges, hidden * (2 * c + 1), dtype=torch.float32, device=normed.device)
    hopper_transition_weights[(groups, ranges)](
        hopper.row_tiles(normed, order), hopper.row_tiles(d_out, order), hopper.weight_tiles(linear_1.weight),
        hopper.weight_tiles(weight_2), linear_1.bias, partials, hidden, tiles, per_range, num_warps=4,
    )  # fmt: skip
    return partials.split([hidden * c, hidden * c, hidden], 1)


def hidden_obstacle(x: Tensor, hidden: int) -> str | None:
    """Why ``transition_hidden`` should not do what ``rows.transition_gradient`` can for the MSA, or None."""
    return MISSING or hopper.preference("transition_hopper_hidden", x, n=hidden)


def transition_hidden(
    x: Tensor, d_out: Tensor, norm: Norm, linear_1: Affine, weight_2: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``rows.transition_gradient``."""
    assert linear_1.weight is not None
    order, (hidden, c), count, block = memory_order(x), linear_1.weight.shape, x.shape[:-1].numel(), HIDDEN_BLOCK // 2
    outs = [x.new_empty(count, width) for width in (hidden, hidden, c, c)]
    partials = torch.empty(count // PART, c + hidden, dtype=torch.float32, device=x.device)
    hopper_transition_hidden[hopper.programs(x)](
        *(matrix(hopper.by_rows(tensor, order), PART, c) for tensor in (x, d_out)),
        hopper.weight_tiles(linear_1.weight, block, c), hopper.weight_tiles(weight_2, c, block),
        *(matrix(out, PART, block) for out in outs[:2]), *(matrix(out, PART, c) for out in outs[2:]), norm,
        linear_1.bias, partials, hidden // block, count // PART, num_warps=4,
    )  # fmt: skip
    return outs[0], outs[1], outs[2], outs[3], partials


def products_obstacle(ds: Sequence[Tensor], operands: Sequence[Tensor]) -> str | None:
    """Why ``product_partials`` cannot or should not take weight gradients of d [*, n] with a [*, c], or None."""
    if reason := choice.obstacle(MISSING, (*ds, *operands)):
        return reason
    shape, n = operands[0].shape, ds[0].shape[-1]
    if len(ds) > MOST_PRODUCTS or any(d.shape != (*shape[:-1], n) for d in ds):
        return f"not up to {MOST_PRODUCTS} products of one shape"
    if (n, shape[-1]) not in PRODUCT_TILES:
        return f"no tiles for products of {n} with {shape[-1]} channels"
    order = memory_order(operands[0])
    if not shape.numel() or not all(hopper.is_aligned(hopper.by_rows(x, order)) for x in (*ds, *operands)):
        return "rows of all factors do not lie densely"
    return hopper.preference(PRODUCTS_NAME, operands[0], n=n, products=len(ds))


def product_partials(ds: Sequence[Tensor], operands: Sequence[Tensor], transposed: Sequence[bool]) -> list[Tensor]:
    """Partial gradients of weights, [ranges, n * c] each; ``transposed``: as [c, n] instead of [n, c].

    Any number of rows: the copy engine gives zeros past the last one.
    """
    tiles, order = PRODUCT_TILES[ds[0].shape[-1], operands[0].shape[-1]], memory_order(operands[0])
    left, right = (operands, ds) if tiles.lines_of_a else (ds, operands)
    count, width, c, number = ds[0].shape[:-1].numel(), left[0].shape[-1], right[0].shape[-1], len(ds)
    programs = number * (width // tiles.lines) * (c // tiles.columns)
    ranges, slots = _ranges(tuning.ceil_div(count, tiles.rows), programs)
    left, right = (
        [matrix(hopper.by_rows(x, order), tiles.rows, across) for x in factors]
        for factors, across in ((left, tiles.lines), (right, tiles.columns))
    )
    partials = torch.empty(ranges, number * width * c, dtype=torch.float32, device=ds[0].device)
    absent, turned = MOST_PRODUCTS - number, sum((t != tiles.lines_of_a) << n for n, t in enumerate(transposed))
    hopper_weight_gradients[(programs, ranges)](
        *left, *left[:1] * absent, *right, *right[:1] * absent, partials, width, c, count, slots * tiles.rows,
        COUNT=number, TRANSPOSED=turned, STAGES=tiles.stages, num_warps=4,
    )  # fmt: skip
    return list(partials.split([width * c] * number, 1))
