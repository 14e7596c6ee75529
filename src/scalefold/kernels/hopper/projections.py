"""Projections of a layer norm on compute capability 9.0, forward and backward, by the Gluon programs.

Each function means the same as the one of ``ops.linear`` that it may replace; its obstacle says why it must not.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from collections.abc import Sequence

import torch
from torch import Tensor

from scalefold.kernels import tuning
from scalefold.kernels.hopper.host import (
    ROWS,
    SIDES,
    WARPS,
    aligned,
    channel_rows,
    dense_rows,
    described,
    device_obstacle,
    in_order,
    programs_for,
    register,
    slower,
    stages_within,
    whole_tiles,
)
from scalefold.kernels.rows import common_rows, fused_view, memory_order, row_fields

NARROW_WIDTH = 16  # narrower weights are attention biases
HELD = 2  # slots that an input gradient still holds with outputs of one tile when it waits for the next
MOST = 4  # projections whose input gradient one program sums up


def _split(weights: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Wide and narrow weights."""
    wide = [weight for weight in weights if weight.shape[0] >= NARROW_WIDTH]
    return wide, [weight for weight in weights if weight.shape[0] < NARROW_WIDTH]


def _weights_obstacle(weights: Sequence[Tensor], c: int) -> str | None:
    wide, narrow = _split(weights)
    if not wide or any(weight.shape[0] != c for weight in wide):
        return "wide weights must be square"
    if len(narrow) > 1 or any(weight.shape[0] > 8 for weight in narrow):
        return "at most one narrow weight of at most 8 rows"
    return None


register(
    "hopper_projections",
    (1, 64, 2, 2, 240),
    ("USED", "BLOCK_N", "STAGES", "STAGED", "REGISTERS"),
    *((1, 64, 1, 2, 240), (1, 64, 1, 3, 240), (1, 64, 1, 4, 240), (1, 128, 1, 1, 240)),
)


def projections_obstacle(x: Tensor, row_mask: Tensor | None, weights: Sequence[Tensor]) -> str | None:
    """Why ``projections`` cannot or should not take these arguments, or None."""
    c = x.shape[-1]
    found = device_obstacle(x) or whole_tiles(x) or _weights_obstacle(weights, c)
    if found or row_mask is not None or c not in (128, 256):
        return found or "written for 128 and 256 channels without a row mask"
    if dense_rows(x, memory_order(x)) is None:
        return "rows of x do not lie densely"
    return slower(_projections_config(x, weights))


def _projections_config(x: Tensor, weights: Sequence[Tensor]) -> tuning.Config:
    wide, _ = _split(weights)
    fields = row_fields(x.shape[:-1].numel(), x.dtype, c=x.shape[-1], n=len(wide) * x.shape[-1])
    return tuning.lookup("hopper_projections", **fields)


def projections(x, norm_weight, norm_bias, num_wide, weights, biases) -> tuple[Tensor, ...]:
    """``ops.linear._forward`` without a row mask; see ``projections_obstacle``."""
    from scalefold.kernels.hopper.project import project_program

    c, count, order = x.shape[-1], x.shape[:-1].numel(), memory_order(x)
    wide, narrow = weights[:num_wide], weights[num_wide:]
    config = _projections_config(x, weights)
    groups = 1 if c == 128 else num_wide
    out = x.new_empty(num_wide * count, c)
    narrow_out, strides, dims = None, (0, 0, 0, 0), (1, 1)
    if narrow:
        narrow_out = x.new_empty(x.shape[0], narrow[0].shape[0], *x.shape[1:-1]).movedim(1, -1)
        dims, _, (_, strides) = common_rows(x, narrow_out)
    present = [bias for bias in biases[:num_wide] if bias is not None]
    bias = (present[0] if len(present) == 1 else torch.cat(present)) if present else None
    block = config["BLOCK_N"]
    used = num_wide // groups * c * c * 2 + (8 * c * 2 if narrow else 0) + SIDES * config["STAGED"] * ROWS * block * 2
    project_program[(programs_for(x, count // ROWS, groups),)](
        described(dense_rows(x, order), ROWS, c), norm_weight, norm_bias,
        described(aligned(fused_view(wide)), block, c), bias, described(out, ROWS, block),
        described(aligned(narrow[0]), 8, c) if narrow else None, narrow_out, strides, dims, count // ROWS,
        (num_wide - len(present)) * c, WIDTH=c, CHUNKS=num_wide * c // (groups * block), GROUPS=groups,
        NARROW=narrow[0].shape[0] if narrow else 0, C=c, BLOCK_N=block,
        STAGES=stages_within(used, ROWS * c * 2, config["STAGES"], 1), STAGED=config["STAGED"],
        REGISTERS=config["REGISTERS"], num_warps=4,
    )  # fmt: skip
    outs = [in_order(order, part, x.shape) for part in out.view(num_wide, count, c).unbind(0)]
    return tuple(outs if narrow_out is None else [*outs, narrow_out])


register("hopper_input_gradient", (1, 6, 240), ("USED", "STAGES", "REGISTERS"), (1, 3, 240), (1, 4, 240), (1, 5, 240))


def input_gradient_obstacle(
    x: Tensor,
    row_mask: Tensor | None,
    weights: Sequence[Tensor],
    ds: Sequence[Tensor],
    has_bias: Sequence[bool],
    through: Tensor | None,
) -> str | None:
    """Why ``input_gradient`` cannot or should not take these arguments, or None."""
    c, (wide, narrow), order = x.shape[-1], _split(weights), memory_order(x)
    found = device_obstacle(x) or whole_tiles(x) or _weights_obstacle(weights, c)
    if found or row_mask is not None or c != 128 or len(wide) > MOST:
        return found or "written for up to four projections of 128 channels without a row mask"
    if any(has_bias[: len(wide) - 1]) or (narrow and has_bias[-1]):
        return "only the last wide projection may have a bias"
    columns = x.stride(-1) != 1
    if columns and (through is not None or channel_rows(x, order) is None):
        return "channels first only without a residual gradient"
    rows = [*ds[: len(wide)], *([] if columns else [x]), *([] if through is None else [through])]
    if any(dense_rows(tensor, order) is None for tensor in rows):
        return "rows do not lie densely"
    return slower(_gradient_config(x, weights))


def _gradient_config(x: Tensor, weights: Sequence[Tensor]) -> tuning.Config:
    wide, _ = _split(weights)
    fields = row_fields(x.shape[:-1].numel(), x.dtype, c=x.shape[-1], n=len(wide) * x.shape[-1])
    return tuning.lookup("hopper_input_gradient", **fields)


def input_gradient(x, norm_weight, norm_bias, weights, ds, has_bias, through) -> tuple[Tensor, Tensor, Tensor]:
    """``ops.linear.input_gradient`` without a row mask; see ``input_gradient_obstacle``."""
    from scalefold.kernels.hopper.gradient import gradient_program

    c, count, order, (wide, narrow) = x.shape[-1], x.shape[:-1].numel(), memory_order(x), _split(weights)
    tiles, columns, biased = count // ROWS, x.stride(-1) != 1, has_bias[len(wide) - 1]
    dx, normed = torch.empty_like(x), x.new_empty(count, c)
    narrow_d, strides, dims = None, (0, 0, 0, 0), (1, 1)
    if narrow:
        narrow_d = ds[-1]
        dims, _, (_, strides) = common_rows(x, narrow_d)
    programs = programs_for(x, tiles)
    partials = torch.empty(SIDES * WARPS * programs, 2 * c + (c if biased else 0), dtype=torch.float32, device=x.device)
    view, block = (channel_rows, (c, ROWS)) if columns else (dense_rows, (ROWS, c))
    used = len(wide) * c * c * 2 + (1024 if biased else 0)
    config = _gradient_config(x, weights)
    gradient_program[(programs,)](
        described(view(x, order), *block), norm_weight, norm_bias, described(aligned(fused_view(wide)), c, c),
        *(described(dense_rows(d, order), ROWS, c) for d in ds[: len(wide)]), *[None] * (MOST - len(wide)),
        narrow[0] if narrow else None, narrow_d, strides, dims,
        None if through is None else described(dense_rows(through, order), ROWS, c), described(view(dx, order), *block),
        described(normed, ROWS, c), partials, tiles, COUNT=len(wide), BIASED=biased,
        NARROW=narrow[0].shape[0] if narrow else 0, C=c, COLUMNS=columns,
        STAGES=stages_within(used, ROWS * c * 2, config["STAGES"], HELD + 1), REGISTERS=config["REGISTERS"],
        num_warps=4,
    )  # fmt: skip
    return dx, in_order(order, normed, x.shape), partials
