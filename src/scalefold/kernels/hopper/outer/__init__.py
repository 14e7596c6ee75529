"""Gradients of the outer product mean on compute capability 9.0: when the programs of ``gradients`` run, and how."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false

import torch
from torch import Tensor

from scalefold.kernels import tuning
from scalefold.kernels.hopper import CONSUMERS, MULTIPROCESSORS, PART, choice
from scalefold.kernels.hopper.rows import MISSING as ROWS_MISSING
from scalefold.kernels.hopper.rows import MOST_SEQUENCES, OUTER_CHANNELS, matrix, outer_shape_obstacle

try:
    from scalefold.kernels.hopper.outer.gradients import hopper_outer_operand, hopper_outer_weight

    MISSING = ROWS_MISSING
except (ImportError, AttributeError) as error:  # as in ``rows``
    MISSING = f"this Triton's Gluon is another one: {error}"

PAIRED = 2  # channels, or values of j, of a consumer
GROUP = PAIRED * CONSUMERS  # channels of a of a program for the gradient of a
NAMES = ("outer_product_hopper_operands", "outer_product_hopper_weight")
for _name in NAMES:
    tuning.register(_name, lambda fields, capability: {"HOPPER": 0})


def obstacle(name: str, scaled: Tensor, a: Tensor, b: Tensor, weight: Tensor) -> str | None:
    """Why the program of ``name`` cannot or should not take these arguments of a backward, or None.

    scaled: [I, J, c_z]; a: [S, I, 32]; b: [S, J, 32].
    """
    if reason := outer_shape_obstacle(scaled, a, b, weight, MISSING):
        return reason
    if scaled.shape[1] % PART:
        return f"pairs do not come in tiles of {PART} x {PART}"
    if not all(x.is_contiguous() and x.data_ptr() % 16 == 0 for x in (a, weight)):
        return "sequences or the weight do not lie densely"
    fields = tuning.row_fields(scaled.shape[:-1].numel(), scaled.dtype, c=scaled.shape[2], sequences=a.shape[0])
    return choice.preference(tuning.lookup(name, **fields))


def operand_gradients(scaled: Tensor, a: Tensor, b: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Partial gradients [ranges, 32 * I * 128] of a and [ranges, 32 * J * 128] of b, as [channel, row, sequence]."""
    i, j, c = scaled.shape
    turned = weight.view(c, OUTER_CHANNELS, OUTER_CHANNELS).transpose(1, 2).contiguous().view_as(weight)
    d_a = _operand(matrix(scaled.flatten(1), PART, c), b, weight, i, (0, c))
    return d_a, _operand(matrix(scaled.flatten(0, 1), PART, c), a, turned, j, (j, 0))


def _operand(scaled: object, other: Tensor, weight: Tensor, rows: int, steps: tuple[int, int]) -> Tensor:
    """Partial gradients of one operand with so many rows; ``other``: the other one, [S, count, 32]."""
    programs, count = rows // PART * (OUTER_CHANNELS // GROUP), other.shape[1]
    per_range = tuning.ceil_div(count, max(1, MULTIPROCESSORS // programs))
    ranges = tuning.ceil_div(count, per_range)
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
    (i, j, c), by_channel = scaled.shape, a.permute(2, 0, 1).contiguous().flatten(0, 1)
    groups, tiles, pairs = OUTER_CHANNELS // CONSUMERS, i // PART, j // PAIRED
    per_range = tuning.ceil_div(pairs, max(1, MULTIPROCESSORS // (groups * tiles)))
    ranges = tuning.ceil_div(pairs, per_range)
    size = c * OUTER_CHANNELS * OUTER_CHANNELS
    partials = torch.empty(PAIRED * tiles * ranges, size, dtype=torch.float32, device=a.device)
    hopper_outer_weight[(groups, tiles, ranges)](
        matrix(scaled.flatten(1), PART, c), matrix(by_channel, MOST_SEQUENCES, PART),
        matrix(b.flatten(1), MOST_SEQUENCES, PAIRED * OUTER_CHANNELS), partials, a.shape[0], pairs, per_range,
        num_warps=4,
    )  # fmt: skip
    return partials
