"""Beginning and end of a gated attention for compute capability 9.0 in Gluon, as ``hopper.rows``.

Rows of pairs have 128 channels, those of the MSA 256. Tiles lie across (see ``row_pieces``) where an attention bias
lies so, and where rows of a line share their dropout.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false

from collections.abc import Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from scalefold.kernels import tuning
from scalefold.kernels.hopper import PART, choice
from scalefold.kernels.hopper.rows import (
    CHANNELS,
    MSA_CHANNELS,
    SQUARE,
    by_rows,
    dropout_obstacle,
    is_aligned,
    is_dense,
    matrix,
    preference,
    program_obstacle,
    programs,
    rows_obstacle,
    weight_tiles,
)
from scalefold.kernels.rows import SECTOR, Affine, Norm, lies_across, memory_order, row_views

try:
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from scalefold.kernels.hopper.gated_attention.gradient import hopper_gated_gradient
    from scalefold.kernels.hopper.gated_attention.output import hopper_gated_output, hopper_wide_gated_output
    from scalefold.kernels.hopper.gated_attention.projections import hopper_projections, hopper_wide_projections

    MISSING = None
except (ImportError, AttributeError) as error:  # Gluon is experimental: names move between versions
    MISSING = f"this Triton's Gluon is another one: {error}"

LINES = PART // SECTOR.value  # of a tile across
BIAS_ROWS = 8  # most heads of an attention bias: rows of the narrowest product
GRADIENT_SLOTS = {CHANNELS: 5, MSA_CHANNELS: 4}  # of the gated output's gradient, by channels
for _name in ("gated_output_hopper", "gated_output_hopper_gradient", "norm_linear_hopper", "norm_linear_hopper_wide"):
    tuning.register(_name, lambda fields, capability: {"HOPPER": 0})


def projections_obstacle(
    x: Tensor, row_mask: Tensor | None, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> str | None:
    """Why ``project`` cannot or should not take these arguments of ``ops.linear``, or None."""
    transposed = int(memory_order(x) != tuple(range(x.dim() - 1)))
    biased = [bias is not None for bias in biases]
    if x.shape[-1] == MSA_CHANNELS:
        reason = _wide_obstacle(x, row_mask, weights, biased)
        return reason or preference("norm_linear_hopper_wide", x, transposed=transposed)
    *wide, narrow = weights
    if row_mask is not None or biased != [False, False, False, True, False] or narrow.shape[0] > BIAS_ROWS:
        return "not queries, keys, values, gates with a bias, and an attention bias"
    reason = choice.obstacle(MISSING, (x, *weights)) or program_obstacle(x, wide, [narrow])
    return reason or preference("norm_linear_hopper", x, transposed=transposed)


def _wide_obstacle(x: Tensor, row_mask: Tensor | None, weights: Sequence[Tensor], biased: Sequence[bool]) -> str | None:
    if reason := choice.obstacle(MISSING, (x, *weights)):
        return reason
    if row_mask is not None or list(biased) != [False] * (len(biased) - 1) + [True]:
        return "not projections of which the last has a bias"
    if any(tuple(weight.shape) != (MSA_CHANNELS, MSA_CHANNELS) for weight in weights):
        return f"weights are not {MSA_CHANNELS} x {MSA_CHANNELS}"
    return rows_obstacle(x)


def project(
    x: Tensor, norm: Norm, linear: Affine, narrow: Tensor | None, out: Tensor, narrow_outs: tuple[Tensor, ...] | None
) -> None:
    """Layer norm of x: [*, c] and its projections.

    linear: weight [4 c, c], bias [c] of the last c; narrow: [h, c]. out: [4, rows, c], rows in the memory order of x;
    narrow_outs: where the narrow one goes, [*, h] each, of any strides. Wide projections, of any number, have none.
    """
    if narrow is None:
        tiles, per_weight = x.shape[:-1].numel() // PART, MSA_CHANNELS // PART
        hopper_wide_projections[programs(x)](
            matrix(by_rows(x, memory_order(x)), PART, MSA_CHANNELS), weight_tiles(linear.weight, PART, MSA_CHANNELS),
            matrix(out.flatten(0, 1), PART, PART), norm, linear.bias, (out.shape[0] - 1) * per_weight,
            out.shape[0] * per_weight, tiles, num_warps=4,
        )  # fmt: skip
        return
    assert narrow_outs is not None
    views, dims, count = row_views({"x": x, "narrow_outs": narrow_outs})
    inner = dims[1] if lies_across(x, narrow_outs[0], PART) else None
    hopper_projections[programs(x, 1)](
        _row_tiles(x, memory_order(x), inner), weight_tiles(linear.weight), weight_tiles(narrow, BIAS_ROWS),
        tiles_of_rows(out.flatten(0, 1), CHANNELS, inner), norm, linear.bias, views["narrow_outs"], dims, count // PART,
        COUNT=out.shape[0], NARROW=narrow.shape[0], ACROSS=inner is not None, num_warps=4,
    )  # fmt: skip


def gated_output_obstacle(
    x: Tensor, o: Tensor, gate: Tensor, weight: Tensor, dropout: Tensor | None, name: str = "gated_output_hopper"
) -> str | None:
    """Why ``gated_output`` cannot or should not take these arguments, or None.

    ``gated_output_gradient`` has the name ``gated_output_hopper_gradient`` and takes the gradient of the result for x.
    """
    if reason := choice.obstacle(MISSING, (x, o, gate, weight)):
        return reason
    if tuple(weight.shape) not in (SQUARE, (MSA_CHANNELS, MSA_CHANNELS)):
        return f"the weight is not {CHANNELS} x {CHANNELS} or {MSA_CHANNELS} x {MSA_CHANNELS}"
    if not all(is_aligned(by_rows(tensor, memory_order(x))) for tensor in (o, gate)):
        return "o and gate do not lie densely"
    if reason := dropout_obstacle(dropout) or rows_obstacle(x):
        return reason
    if _scales(x, dropout) is Scales.OF_ROWS and name == "gated_output_hopper":
        return "dropout scales are not the same along whole tiles"
    return preference(name, x, dropped=int(dropout is not None))


def fits_halves(x: Tensor, dropout: Tensor | None, outs: Sequence[Tensor]) -> bool:
    """Whether ``gated_output`` can write its result to ``outs``, by halves of columns: two [1, I, J / 2, c]."""
    if len(outs) != 2 or x.dim() != 4 or len(x) != 1 or not x.is_contiguous():
        return False
    lines = LINES if _scales(x, dropout) is Scales.OF_LINES else PART
    return x.shape[2] % (2 * lines) == 0 and all(is_dense(out) and out.numel() * 2 == x.numel() for out in outs)


def gated_output(
    x: Tensor, o: Tensor, gate: Tensor, dropout: Tensor | None, linear: Affine, outs: Sequence[Tensor]
) -> None:
    """``reference.gated_output`` of o: [*, c], before its heads are split.

    outs: one [*, c] that lies as x does, or the two of ``fits_halves``.
    """
    order, half = memory_order(x), 0
    views, dims, count = row_views({"x": x, "dropout": dropout})
    inner = dims[1] if _scales(x, dropout) is Scales.OF_LINES else None
    if len(outs) > 1:
        half = x.shape[2] // 2
        first, second = (_row_tiles(out, order, None if inner is None else half) for out in outs)
    else:
        first, second = _row_tiles(outs[0], order, inner), None
    program, block = hopper_gated_output, SQUARE
    if x.shape[-1] == MSA_CHANNELS:
        program, block = hopper_wide_gated_output, (MSA_CHANNELS, PART)
    program[programs(x, 1)](
        *(_row_tiles(tensor, order, inner) for tensor in (x, o, gate)), weight_tiles(linear.weight, *block),
        first, second, linear.bias, views["dropout"], dims, count // PART, half,
        ACROSS=inner is not None, num_warps=4,
    )  # fmt: skip


def gated_output_gradient(
    d: Tensor, o: Tensor, gate: Tensor, dropout: Tensor | None, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of o and gate for d: [*, c], that of the result; the update's gradient (d without dropout) and the
    gated o, between which the weight's gradient lies; and partial sums [tiles, c], the bias's gradient.
    """
    order, c = memory_order(d), d.shape[-1]
    views, dims, count = row_views({"d": d, "dropout": dropout})
    scales = _scales(d, dropout)
    inner = dims[1] if scales is Scales.OF_LINES else None
    update = d if dropout is None else torch.empty_like(d)
    gated, d_o, d_gate = torch.empty_like(o), torch.empty_like(o), torch.empty_like(gate)
    partials = torch.empty(count // PART, c, dtype=torch.float32, device=d.device)
    tiles = {tensor: _row_tiles(tensor, order, inner) for tensor in (d, o, gate, update, gated, d_o, d_gate)}
    hopper_gated_gradient[programs(d, 1, c // CHANNELS)](
        tiles[d], tiles[o], tiles[gate], weight_tiles(weight, c, CHANNELS),
        None if dropout is None else tiles[update], tiles[gated], tiles[d_o], tiles[d_gate], views["dropout"], partials,
        dims, count // PART, SLOTS=GRADIENT_SLOTS[c], ACROSS=inner is not None, BY_ROW=scales is Scales.OF_ROWS,
        num_warps=4,
    )  # fmt: skip
    return d_o, d_gate, update, gated, partials


class Scales(Enum):
    """What a row of dropout scales belongs to."""

    OF_TILES = "a tile in order, or to none"
    OF_LINES = "a line of a tile across"
    OF_ROWS = "each row its own, where a tile in order has several lines"


def _scales(x: Tensor, dropout: Tensor | None) -> Scales:
    """The first of these whose tiles fit the rows of x."""
    if dropout is None:
        return Scales.OF_TILES
    views, (middle, inner), _ = row_views({"x": x, "dropout": dropout})
    _, along_middle, along_inner, _ = views["dropout"].strides
    if not along_middle and middle % SECTOR.value == 0 and inner % LINES == 0:
        return Scales.OF_LINES
    return Scales.OF_ROWS if along_inner or inner % PART else Scales.OF_TILES


def _row_tiles(x: Tensor, order: Sequence[int], inner: int | None) -> Any:
    """Tiles of rows, CHANNELS at a time, for the copy engine; ``inner``: see ``tiles_of_rows``."""
    rows = by_rows(x, order)
    assert rows is not None
    return tiles_of_rows(rows, CHANNELS, inner)


def tiles_of_rows(rows: Tensor, columns: int, inner: int | None) -> Any:
    """Tiles of rows: [rows, c] for the copy engine, in order or, if the size of level 2 is given, across.

    The latter are blocks of [level 2, level 1, c], where level 1 goes on through level 0.
    """
    if inner is None:
        return matrix(rows, PART, columns)
    (count, c), step, block = rows.shape, rows.stride(0), [LINES, SECTOR.value, columns]
    layout = gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)
    return TensorDescriptor(rows, [inner, count // inner, c], [step, inner * step, 1], block, layout)
