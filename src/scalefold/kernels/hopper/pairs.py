"""Triangle multiplication and gated output on compute capability 9.0 by the Gluon programs.

Each function computes what the kernel of ``ops.triangle`` or ``ops.gated_output`` computes that it may replace; its
obstacle says why it must not.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from collections.abc import Sequence

import torch
from torch import Tensor

from scalefold.kernels import tuning
from scalefold.kernels.hopper.host import (
    ROWS,
    SIDES,
    aligned,
    channel_rows,
    dense_rows,
    described,
    device_obstacle,
    programs_for,
    register,
    slower,
    stages_within,
    whole_tiles,
)
from scalefold.kernels.rows import common_rows, memory_order, row_fields

CHANNELS = 128
NAMES = ("USED", "BLOCK_N", "STAGES", "REGISTERS")
register(
    "hopper_triangle_operands",
    (1, 64, 2, 2, 240),
    ("USED", "BLOCK_N", "STAGES", "STAGED", "REGISTERS"),
    *((1, 64, 1, 2, 240), (1, 64, 1, 3, 240), (1, 32, 2, 2, 240), (1, 32, 2, 4, 240)),
)
register("hopper_triangle_output", (1, 64, 5, 240), NAMES, (1, 32, 5, 240), (1, 64, 4, 240))
register("hopper_triangle_gates", (1, 64, 5, 240), NAMES, (1, 32, 5, 240), (1, 64, 4, 240))
register("hopper_gated_output", (1, 64, 6, 240), NAMES, (1, 32, 6, 240), (1, 64, 4, 240), (1, 128, 6, 240))


def _config(name: str, x: Tensor) -> tuning.Config:
    return tuning.lookup(name, **row_fields(x.shape[:-1].numel(), x.dtype, c=x.shape[-1]))


def _shape_obstacle(x: Tensor, weights: Sequence[Tensor]) -> str | None:
    found = device_obstacle(x) or whole_tiles(x)
    if found or any(tuple(weight.shape) != (CHANNELS, CHANNELS) for weight in weights):
        return found or f"written for weights {CHANNELS} x {CHANNELS}"
    dense = x.shape[-1] == CHANNELS and all(weight.is_contiguous() for weight in weights)
    return None if dense and dense_rows(x, memory_order(x)) is not None else "rows do not lie densely"


def _scales_obstacle(x: Tensor, dropout: Tensor | None) -> str | None:
    if dropout is None or (dropout.dtype == torch.float32 and dropout.stride(-1) == 1):
        return None
    return "dropout scales are not fp32 and dense"


def _square(weight: Tensor):
    return described(aligned(weight), CHANNELS, CHANNELS)


def _rows(tensor: Tensor, order: Sequence[int], columns: int = CHANNELS):
    return described(dense_rows(tensor, order), ROWS, columns)


def _columns(tensor: Tensor, order: Sequence[int], block: int = CHANNELS):
    return described(channel_rows(tensor, order), block, ROWS)


def _channels_last(x: Tensor) -> Tensor:
    """View of [B, c, I, J] as [B, I, J, c]."""
    return x.permute(0, 2, 3, 1)


def operands_obstacle(z: Tensor, weights: Sequence[Tensor]) -> str | None:
    """Why ``operands`` cannot or should not take these arguments, or None."""
    found = _shape_obstacle(z, weights)
    if found or memory_order(z) != (0, 1, 2) or z.shape[0] != 1:
        return found or "written for one contiguous pair tensor"
    return slower(_config("hopper_triangle_operands", z))


def operands(z, mask, norm_weight, norm_bias, weights, biases) -> tuple[Tensor, Tensor]:
    """Both operands of a triangle's product: [B, c, I, J] each; see ``reference.triangle_project``."""
    from scalefold.kernels.hopper.triangle import operands_program

    config, order, tiles = _config("hopper_triangle_operands", z), memory_order(z), z.shape[:-1].numel() // ROWS
    outs = tuple(z.new_empty(z.shape[0], CHANNELS, *z.shape[1:3]) for _ in range(2))
    dims, _, (_, mask_strides) = common_rows(z, mask[..., None])
    used = 4 * CHANNELS * CHANNELS * 2 + SIDES * config["STAGED"] * config["BLOCK_N"] * ROWS * 2
    operands_program[(programs_for(z, tiles),)](
        _rows(z, order), mask, mask_strides, dims, norm_weight, norm_bias, *map(_square, weights), tuple(biases),
        *(_columns(_channels_last(out), order, config["BLOCK_N"]) for out in outs), tiles, C=CHANNELS,
        BLOCK_N=config["BLOCK_N"], STAGES=stages_within(used, ROWS * CHANNELS * 2, config["STAGES"], 1),
        STAGED=config["STAGED"], REGISTERS=config["REGISTERS"], num_warps=4,
    )  # fmt: skip
    return outs


def output_obstacle(z: Tensor, x: Tensor, weights: Sequence[Tensor], dropout: Tensor | None) -> str | None:
    """Why ``triangle_output`` cannot or should not take these arguments (x: [B, c, I, J]), or None."""
    return _output_obstacle(z, x, weights, dropout) or slower(_config("hopper_triangle_output", z))


def gates_obstacle(
    z: Tensor, x: Tensor, weights: Sequence[Tensor], dropout: Tensor | None, d_out: Tensor
) -> str | None:
    """Why ``output_gates`` cannot or should not take these arguments, or None."""
    if dense_rows(d_out, memory_order(z)) is None:
        return "rows of the gradient do not lie densely"
    return _output_obstacle(z, x, weights, dropout) or slower(_config("hopper_triangle_gates", z))


def _output_obstacle(z: Tensor, x: Tensor, weights: Sequence[Tensor], dropout: Tensor | None) -> str | None:
    found = _shape_obstacle(z, weights) or _scales_obstacle(z, dropout)
    if found or z.shape[0] != 1 or channel_rows(_channels_last(x), memory_order(z)) is None:
        return found or "the product does not lie channels first"
    return None


def triangle_output(z, x, parameters, dropout) -> Tensor:
    """Forward of ``reference.triangle_output``; parameters: norm in, norm out, value, gate: weight and bias each."""
    out = torch.empty_like(z)
    _launch_output("hopper_triangle_output", z, x, parameters, dropout, None, out)
    return out


def output_gates(z, x, parameters, dropout, d_out) -> Tensor:
    """Gradients of value and gate logits of ``reference.triangle_output``: [*, 2 c]."""
    projected = z.new_empty(*z.shape[:-1], 2 * CHANNELS)
    _launch_output("hopper_triangle_gates", z, x, parameters, dropout, d_out, projected)
    return projected


def _launch_output(name, z, x, parameters, dropout, d_out, out) -> None:
    from scalefold.kernels.hopper.triangle import output_program

    config, order, tiles = _config(name, z), memory_order(z), z.shape[:-1].numel() // ROWS
    *norms, weight_z, bias_z, weight_g, bias_g = parameters
    dims, _, (_, strides) = common_rows(z, z if dropout is None else dropout)
    used, least = 2 * CHANNELS * CHANNELS * 2, 3 if d_out is None else 4  # one or two slots hold outputs for a while
    output_program[(programs_for(z, tiles),)](
        _rows(z, order), _columns(_channels_last(x), order), tuple(norms), _square(weight_z), _square(weight_g),
        (bias_z, bias_g), dropout, strides, dims, None if d_out is None else _rows(d_out, order), _rows(out, order),
        tiles, C=CHANNELS, BLOCK_N=config["BLOCK_N"],
        STAGES=stages_within(used, ROWS * CHANNELS * 2, config["STAGES"], least),
        REGISTERS=config["REGISTERS"], num_warps=4,
    )  # fmt: skip


def gated_obstacle(x: Tensor, o: Tensor, gate: Tensor, weight: Tensor, dropout: Tensor | None) -> str | None:
    """Why ``gated_output`` cannot or should not take these arguments (o: [*, H * D]), or None."""
    found = _shape_obstacle(x, [weight]) or _scales_obstacle(x, dropout)
    if found or any(dense_rows(tensor, memory_order(x)) is None for tensor in (o, gate)):
        return found or "rows do not lie densely"
    return slower(_config("hopper_gated_output", x))


def gated_output(x, o, gate, weight, bias, dropout) -> Tensor:
    """Forward of ``ops.gated_output``; the result lies in the memory order of x."""
    from scalefold.kernels.hopper.gated import gated_program

    config, order, tiles = _config("hopper_gated_output", x), memory_order(x), x.shape[:-1].numel() // ROWS
    out = torch.empty_like(x)
    dims, _, (_, strides) = common_rows(x, x if dropout is None else dropout)
    gated_program[(programs_for(x, tiles),)](
        _rows(x, order), _rows(o, order), _rows(gate, order), _square(weight), bias, dropout, strides, dims,
        _rows(out, order), tiles, C=CHANNELS, BLOCK_N=config["BLOCK_N"],
        STAGES=stages_within(CHANNELS * CHANNELS * 2, ROWS * CHANNELS * 2, config["STAGES"], 3),
        REGISTERS=config["REGISTERS"], num_warps=4,
    )  # fmt: skip
    return out
