"""Row-wise programs for compute capability 9.0 in Gluon, beside those of ``ops`` in Triton.

Each launch has an obstacle: the Gluon program takes bf16 rows of 128 channels (a transition also of 256) that lie
densely and fill whole tiles, and runs only where it is known to win, which the tuned tables say (HOPPER = 1).
Everything else stays with Triton. Results have the same layout, and nothing but the program differs.

Triton's interpreter cannot run Gluon. What can be tested without a GPU is that the programs compile and that obstacles
are found; what they compute is tested on a GPU.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from scalefold.kernels import tuning
from scalefold.kernels.hopper import CONSUMERS, HIDDEN_BLOCK, MULTIPROCESSORS, PART, choice
from scalefold.kernels.ops.elementwise import dense
from scalefold.kernels.rows import Affine, Norm, memory_order, row_views

try:
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from scalefold.kernels.hopper.transition import hopper_transition, hopper_transition_gradient
    from scalefold.kernels.hopper.triangle import hopper_operands, hopper_outer_product
    from scalefold.kernels.hopper.triangle_output import hopper_output

    MISSING = None
except (ImportError, AttributeError) as error:  # Gluon is experimental: names move between versions
    MISSING = f"this Triton's Gluon is another one: {error}"

CHANNELS = 128
MSA_CHANNELS = 256
SQUARE = (CHANNELS, CHANNELS)

OUTER_CHANNELS = 32  # of a and b
MOST_SEQUENCES = 128  # of an outer product: one product's depth
OUTER_COLUMNS = 2 * CONSUMERS  # values of j of a tile
HIDDEN_TILES = {128: (True, 2, 4), 256: (False, 1, 2)}  # KEPT, X_STAGES, STAGES of a transition's program by channels
HIDDEN_PAIRS = {128: 2, 256: 1}  # PAIRS of its gradient's program
for _name in (
    "outer_product_hopper",
    "transition_hopper",
    "transition_hopper_gradient",
    "triangle_hopper_gates",
    "triangle_hopper_operands",
    "triangle_hopper_output",
):
    tuning.register(_name, lambda fields, capability: {"HOPPER": 0})


def dropout_obstacle(dropout: Tensor | None) -> str | None:
    """Why programs do not read these scales, or None."""
    if dropout is not None and (dropout.dtype != torch.float32 or dropout.stride(-1) != 1):
        return "dropout scales are not fp32, dense along channels"
    return None


def operands_obstacle(z: Tensor, weights: Sequence[Tensor]) -> str | None:
    """Why ``operands`` cannot or should not take these arguments, or None."""
    return _pair_obstacle(z, weights) or preference("triangle_hopper_operands", z)


def operands(
    z: Tensor, mask: Tensor, norm: Norm, linears: Sequence[Affine], out_a: Tensor, outs_b: Sequence[Tensor]
) -> None:
    """Both operands of a triangle's product, out_a: [1, c, I, J]; see ``reference.triangle_project``.

    linears: a, a gate, b, b gate; outs_b: where b goes, one or two shaped as out_a, the c as far apart as they like.
    """
    outs = [matrix(out.view(CHANNELS, -1), PART, PART) for out in (out_a, *outs_b)]
    views, dims, count = row_views({"z": z, "mask": mask[..., None]})
    hopper_operands[programs(z)](
        row_tiles(z, memory_order(z)), *(weight_tiles(linear.weight) for linear in linears),
        *outs, *[None] * (2 - len(outs_b)), norm, tuple(linear.bias for linear in linears), views["mask"], dims,
        count // PART, num_warps=4,
    )  # fmt: skip


def output_obstacle(
    z: Tensor, x: Tensor, weights: Sequence[Tensor], dropout: Tensor | None, d_out: Tensor | None = None
) -> str | None:
    """Why ``output`` cannot or should not take these arguments, or None."""
    order = memory_order(z)
    if found := _pair_obstacle(z, weights, [x] if d_out is None else [x, d_out]):
        return found
    if not is_aligned(_by_channels(x, order)):
        return "the product does not lie channels first"
    if d_out is not None and not is_aligned(by_rows(d_out, order)):
        return "gradients of the output do not lie densely"
    if reason := dropout_obstacle(dropout):
        return reason
    return preference("triangle_hopper_output" if d_out is None else "triangle_hopper_gates", z)


def output(
    z: Tensor, x: Tensor, dropout: Tensor | None, d_out: Tensor | None, out: Tensor,
    norm_in: Norm, norm_out: Norm, linear_z: Affine, linear_g: Affine,
) -> None:  # fmt: skip
    """``reference.triangle_output``, or with d_out the gradients of value and gate logits, out: [*, 2 c].

    x, the product, is seen channels last: [1, I, J, c].
    """
    order, blocks = memory_order(z), dropout_blocks(z, dropout)
    views, dims, count = row_views({"z": z, "dropout": None if blocks else dropout})
    period = max(blocks, 1)
    hopper_output[(programs(z)[0] // period * period,)](
        row_tiles(z, order), matrix(_by_channels(x, order), CHANNELS, PART),
        None if d_out is None else row_tiles(d_out, order), weight_tiles(linear_z.weight),
        weight_tiles(linear_g.weight), _scale_tiles(dropout) if blocks else None, row_tiles(out, order),
        (norm_in, norm_out), (linear_g.bias, linear_z.bias), views["dropout"], dims, count // PART, period, num_warps=4,
    )  # fmt: skip


def dropout_blocks(z: Tensor, dropout: Tensor | None) -> int:
    """Blocks of PART lines j of dropout's scales, if all i share them and each has a program of its own, or 0."""
    if dropout is None or dropout.shape != (1, 1, *z.shape[2:]) or not dropout.is_contiguous():
        return 0
    blocks, rest = divmod(z.shape[2], PART)
    return 0 if rest or dropout.data_ptr() % 16 or blocks > programs(z)[0] else blocks


def _scale_tiles(dropout: Tensor | None) -> Any:
    """Blocks [PART, CHANNELS] of scales, in the swizzle by which products read fp32 without conflicts of banks."""
    assert dropout is not None
    layout = gl.NVMMASharedLayout(swizzle_byte_width=32, element_bitwidth=32, rank=2)
    return TensorDescriptor.from_tensor(dropout.reshape(-1, CHANNELS), [PART, CHANNELS], layout)


def transition_obstacle(x: Tensor, weights: Sequence[Tensor], d_out: Tensor | None = None) -> str | None:
    """Why ``transition``, or with d_out its gradient, cannot or should not take these arguments, or None."""
    c, hidden = x.shape[-1], weights[0].shape[0]
    if reason := choice.obstacle(MISSING, (x, *weights, d_out)):
        return reason
    if c not in HIDDEN_TILES or hidden % (HIDDEN_BLOCK * HIDDEN_TILES[c][2]):
        return f"{c} channels with {hidden} hidden ones"
    if d_out is not None and not is_aligned(by_rows(d_out, memory_order(x))):
        return "gradients of the output do not lie densely"
    name = "transition_hopper" if d_out is None else "transition_hopper_gradient"
    return rows_obstacle(x) or preference(name, x, n=hidden)


def transition(x: Tensor, norm: Norm, linear_1: Affine, linear_2: Affine, out: Tensor) -> None:
    """``reference.transition``; out: [*, c] lies as x does."""
    assert linear_1.weight is not None
    order, (hidden, c) = memory_order(x), linear_1.weight.shape
    kept, x_stages, stages = HIDDEN_TILES[c]
    hopper_transition[programs(x)](
        matrix(by_rows(x, order), PART, c), weight_tiles(linear_1.weight, HIDDEN_BLOCK, c),
        weight_tiles(linear_2.weight, c, HIDDEN_BLOCK), matrix(by_rows(out, order), PART, c), norm,
        (linear_1.bias, linear_2.bias), hidden // HIDDEN_BLOCK, x.shape[:-1].numel() // PART,
        KEPT=kept, X_STAGES=x_stages, STAGES=stages, num_warps=4,
    )  # fmt: skip


def transition_gradient(
    x: Tensor, d_out: Tensor, norm: Norm, linear_1: Affine, weight_2: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Hidden layer, its gradient, norm and its gradient, rows [rows, *] in the memory order of x, and partial sums
    [tiles, c + hidden] of d_out and of the hidden layer's gradient: those of both biases.
    """
    assert linear_1.weight is not None
    order, (hidden, c), count = memory_order(x), linear_1.weight.shape, x.shape[:-1].numel()
    outs = [x.new_empty(count, width) for width in (hidden, hidden, c, c)]
    partials = x.new_empty(count // PART, c + hidden, dtype=torch.float32)
    hopper_transition_gradient[programs(x)](
        matrix(by_rows(x, order), PART, c), matrix(by_rows(d_out, order), PART, c),
        weight_tiles(linear_1.weight, HIDDEN_BLOCK, c), weight_tiles(weight_2, c, HIDDEN_BLOCK),
        *(matrix(out, PART, HIDDEN_BLOCK) for out in outs[:2]), *(matrix(out, PART, c) for out in outs[2:]), norm,
        linear_1.bias, partials, hidden // HIDDEN_BLOCK, count // PART, PAIRS=HIDDEN_PAIRS[c], num_warps=4,
    )  # fmt: skip
    return outs[0], outs[1], outs[2], outs[3], partials


def outer_product_obstacle(z: Tensor, a: Tensor, b: Tensor, weight: Tensor) -> str | None:
    """Why ``outer_product`` cannot or should not take these arguments, or None."""
    if reason := outer_shape_obstacle(z, a, b, weight, MISSING):
        return reason
    fields = tuning.row_fields(z.shape[:-1].numel(), z.dtype, c=CHANNELS, sequences=a.shape[0])
    return choice.preference(tuning.lookup("outer_product_hopper", **fields))


def outer_shape_obstacle(z: Tensor, a: Tensor, b: Tensor, weight: Tensor, missing: str | None) -> str | None:
    """Why no program takes an outer product of these types and shapes, or None."""
    if reason := choice.obstacle(missing, (z, a, b, weight)):
        return reason
    if z.shape[2] != CHANNELS or a.shape[2] != OUTER_CHANNELS or a.shape[0] > MOST_SEQUENCES:
        return f"not up to {MOST_SEQUENCES} sequences of {OUTER_CHANNELS} channels for pairs of {CHANNELS}"
    if not z.numel() or z.shape[0] % PART or z.shape[1] % OUTER_COLUMNS:
        return f"pairs do not come in tiles of {PART} x {OUTER_COLUMNS}"
    if not all(map(is_dense, (z, b))):
        return "pairs or sequences do not lie densely"
    return None


def outer_product(z: Tensor, a: Tensor, b: Tensor, norm: Tensor, linear: Affine, out: Tensor) -> None:
    """``reference.outer_product_update`` of one sample; z, out: [I, J, c], a: [S, I, 32], b: [S, J, 32], norm: [I, J].

    a is copied, channels first: one channel at a time, its i lie side by side.
    """
    (i, j, c), by_channel = z.shape, dense(a.permute(2, 0, 1)).flatten(0, 1)
    tiles_i, tiles = i // PART, i // PART * (j // OUTER_COLUMNS)
    hopper_outer_product[(min(multiprocessors(z.device), tiles),)](
        matrix(z.flatten(1), PART, c), matrix(by_channel, MOST_SEQUENCES, PART),
        matrix(b.flatten(1), MOST_SEQUENCES, 2 * OUTER_CHANNELS), weight_tiles(linear.weight, c, OUTER_CHANNELS),
        matrix(out.flatten(1), PART, c), norm, linear.bias, a.shape[0], j, tiles_i, tiles, num_warps=4,
    )  # fmt: skip


def program_obstacle(x: Tensor, weights: Sequence[Tensor], others: Sequence[Tensor] = ()) -> str | None:
    """Why no program takes rows of x: [*, c] and square weights, or None; others: further tensors of that type."""
    if reason := choice.obstacle(MISSING, (x, *weights, *others)):
        return reason
    if any(tuple(weight.shape) != SQUARE for weight in weights):
        return f"weights are not {CHANNELS} x {CHANNELS}"
    return rows_obstacle(x)


def rows_obstacle(x: Tensor) -> str | None:
    """Why the copy engine takes no tiles of rows of x: [*, c], or None."""
    if not x.numel() or x.shape[:-1].numel() % PART:
        return f"rows do not come in tiles of {PART}"
    return None if is_aligned(by_rows(x, memory_order(x))) else "rows do not lie densely"


def _pair_obstacle(z: Tensor, weights: Sequence[Tensor], others: Sequence[Tensor] = ()) -> str | None:
    """The same for a pair representation z, whose counterparts [1, c, I, J] lie channels first."""
    found = program_obstacle(z, weights, others)
    return found or (None if z.shape[0] == 1 and z.is_contiguous() else "not one contiguous pair representation")


def preference(name: str, x: Tensor, **fields: int) -> str | None:
    """What the tuned tables have against a program that takes rows of x."""
    return choice.preference(
        tuning.lookup(name, **tuning.row_fields(x.shape[:-1].numel(), x.dtype, c=x.shape[-1], **fields))
    )


def by_rows(x: Tensor, order: Sequence[int]) -> Tensor | None:
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


def is_dense(x: Tensor) -> bool:
    """Whether a tensor is contiguous and begins where the copy engine can begin."""
    return x.is_contiguous() and x.data_ptr() % 16 == 0


def is_aligned(matrix: Tensor | None) -> bool:
    """Whether the copy engine can address a matrix of 16-bit values, whose rows do not overlap."""
    if matrix is None or matrix.stride(1) != 1 or matrix.stride(0) < matrix.shape[1]:
        return False
    return matrix.stride(0) % 8 == 0 and matrix.data_ptr() % 16 == 0


def row_tiles(x: Tensor, order: Sequence[int]) -> Any:
    """Tiles of rows, CHANNELS at a time, for the copy engine."""
    return matrix(by_rows(x, order), PART, CHANNELS)


def weight_tiles(weight: Tensor, lines: int = CHANNELS, columns: int = CHANNELS) -> Any:
    """Blocks of a dense weight, copied first if it begins at no multiple of 16 bytes; see ``rows.weight_blocks``."""
    return matrix(weight if weight.data_ptr() % 16 == 0 else weight.clone(), lines, columns)


def matrix(x: Tensor | None, lines: int, columns: int) -> Any:
    """A matrix for the copy engine, in blocks [lines, columns]."""
    assert x is not None
    layout = gl.NVMMASharedLayout.get_default_for([lines, columns], gl.bfloat16)
    return TensorDescriptor.from_tensor(x, [lines, columns], layout)


def programs(x: Tensor, at_once: int = CONSUMERS, parts: int = 1) -> tuple[int]:
    """One program per multiprocessor, and none without tiles; ``at_once``: tiles that a program takes together.

    ``parts``: programs that share a tile.
    """
    tiles = x.shape[:-1].numel() // PART
    return (min(multiprocessors(x.device) // parts, tuning.ceil_div(tiles, at_once)) * parts,)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count
