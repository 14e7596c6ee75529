"""Representative calls of the row-wise kernels at the benchmark's shapes, on meta tensors (see ``tuning``)."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from scalefold.kernels import tuning
from scalefold.kernels.destination import Destination
from scalefold.kernels.ops import (
    adam_swa,
    elementwise,
    gated_output,
    layer_norm,
    linear,
    outer_product,
    transition,
    triangle,
    triangle_product,
)

META = torch.device("meta")


def leaf(*shape: int, dtype: torch.dtype = torch.bfloat16, transposed: bool = False) -> Tensor:
    """An input that wants a gradient; ``transposed``: stored with dimensions 1 and 2 exchanged."""
    value = torch.empty(shape, dtype=dtype, device=META)
    value = value.transpose(1, 2).contiguous().transpose(1, 2) if transposed else value
    return value.requires_grad_()


def norm(c: int) -> tuple[Tensor, Tensor]:
    return leaf(c), leaf(c)


def run_backward(outputs: Tensor | Sequence[Tensor]) -> None:
    """Backward with dense gradients of the outputs' own layout."""
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    torch.autograd.backward(outputs, [torch.empty_like(output) for output in outputs])


def written(x: Tensor, part: Sequence[int], ranks: int) -> Destination | None:
    """Where each of so many ranks gets its part of an operand of x, or all of it; None for one rank."""
    parts = [torch.empty(part, dtype=x.dtype, device=META) for _ in range(ranks)]
    return Destination(0, parts[0], parts) if ranks > 1 else None


def projections(
    shape: tuple[int, int, int], c: int, widths: Sequence[int], transposed: bool = False, ranks: int = 1
) -> None:
    """``ranks``: so many get the last one, an attention bias."""
    biases = [leaf(width) if n == 3 else None for n, width in enumerate(widths)]
    x, weights = leaf(*shape, c, transposed=transposed), [leaf(width, c) for width in widths]
    ahead = written(x, (shape[0], widths[-1], *shape[1:]), ranks)
    if ahead is not None:
        ahead.parts = [part.movedim(1, -1) for part in ahead.parts]
    run_backward(linear.layer_norm_linear(x, *norm(c), weights, biases, ahead))


def gated(
    shape: tuple[int, int, int], c: int, heads: int, width: int, transposed: bool = False, ranks: int = 1
) -> None:
    """``ranks``: each gets its columns of the result."""
    dropout = torch.empty(shape[0], 1, shape[2], c, device=META)
    x, o, gate = (leaf(*shape, *size, transposed=transposed) for size in ((c,), (heads, width), (heads * width,)))
    ahead = written(x, (*shape[:2], shape[2] // ranks, c), ranks)
    run_backward(gated_output.gated_output(x, o, gate, leaf(c, heads * width), leaf(c), dropout, ahead))


def in_parts(parts: int, tile: Sequence[int], call: Callable[[], None]) -> None:
    """A call with parts of the columns in the grid, whatever the tables say."""
    config = {"PARTS": parts, **tuning.tile_config(tile)}
    with ExitStack() as stack:
        for name in ("norm_linear", "norm_linear_backward", "gated_output", "triangle_project", "transition"):
            stack.enter_context(tuning.override(f"{name}_columns", config))
        call()


def transitions(shape: tuple[int, int, int], c: int, factor: int) -> None:
    weights = (leaf(factor * c, c), leaf(factor * c), leaf(c, factor * c), leaf(c))
    run_backward(transition.transition(leaf(*shape, c), *norm(c), *weights))


def triangle_project(shape: tuple[int, int, int], c: int, ranks: int = 1) -> None:
    """``ranks``: each of two gets all of b, of more its channels of both operands."""
    parameters = [parameter for _ in range(4) for parameter in (leaf(c, c), leaf(c))]
    mask = torch.empty(shape, dtype=torch.bfloat16, device=META)
    z, channels = leaf(*shape, c), c if ranks == 2 else c // ranks
    for_a, for_b = (written(z, (shape[0], channels, *shape[1:]), ranks) for _ in range(2))
    ahead = (None, for_b) if ranks == 2 else (for_a, for_b)
    run_backward(triangle.triangle_project(z, mask, *norm(c), *parameters, destinations=ahead))


def triangle_output(shape: tuple[int, int, int], c: int) -> None:
    dropout = torch.empty(shape[0], 1, shape[2], c, device=META)
    linears = (leaf(c, c), leaf(c), leaf(c, c), leaf(c))
    x = leaf(shape[0], c, *shape[1:])
    run_backward(triangle.triangle_output(leaf(*shape, c), x, *norm(c), *norm(c), *linears, dropout))


def triangle_products(channels: int, outgoing: bool) -> None:
    run_backward(triangle_product.triangle_product(leaf(1, channels, 256, 256), leaf(1, channels, 256, 256), outgoing))


def outer_product_project(shape: tuple[int, int, int], c: int, ranks: int = 1) -> None:
    """``ranks``: so many get b."""
    mask, m = torch.empty(shape, dtype=torch.bfloat16, device=META), leaf(*shape, c)
    linears = (leaf(32, c), leaf(32), leaf(32, c), leaf(32))
    ahead = written(m, (*shape, 32), ranks)
    run_backward(outer_product.outer_product_project(m, mask, *norm(c), *linears, ahead))


def outer_product_update(num_sequences: int, n: int) -> None:
    a, b = leaf(1, num_sequences, n, 32), leaf(1, num_sequences, n, 32)
    counts = torch.empty(1, n, n, device=META)
    run_backward(outer_product.outer_product_update(leaf(1, n, n, 128), a, b, counts, leaf(128, 1024), leaf(128)))


def optimizer(n: int) -> None:
    param, exp_avg, exp_avg_sq, averaged = (torch.empty(n, device=META) for _ in range(4))
    grad, copy = (torch.empty(n, dtype=torch.bfloat16, device=META) for _ in range(2))
    scalars = torch.empty(5, device=META)
    adam_swa.sum_of_squares(grad)
    adam_swa.adam_swa(param, grad, exp_avg, exp_avg_sq, averaged, copy, scalars, 0.9, 0.999, 1e-6, 0.9)


def _draw_masks() -> None:
    elementwise.dropout_masks([(1, 1, 256, 128), (1, 256, 1, 128)], 0.25, META)


def compile_cases() -> list[tuple[str, Callable[[], None]]]:
    """Forward and backward of every operation; see ``tuning``."""
    msa, extra, pair, template = (1, 128, 256), (1, 1024, 256), (1, 256, 256), (4, 256, 256)
    few, pairs = (1, 16, 256), (1, 32, 256)  # an eighth of the MSA and of the pairs
    return [
        ("project_triangle_attention", lambda: projections(pair, 128, [128] * 4 + [4])),
        ("project_msa_attention", lambda: projections(msa, 256, [256] * 4)),
        ("project_extra_attention", lambda: projections(extra, 64, [64] * 4)),
        ("project_template", lambda: projections(template, 64, [64] * 4 + [4])),
        ("project_ending_attention", lambda: projections(pair, 128, [128] * 4 + [4], transposed=True)),
        ("project_pair_bias", lambda: projections(pair, 128, [8])),
        ("project_to_ranks", lambda: projections(pairs, 128, [128] * 4 + [4], ranks=8)),
        ("project_ending_to_ranks", lambda: projections(pairs, 128, [128] * 4 + [4], transposed=True, ranks=8)),
        ("project_pair_bias_to_ranks", lambda: projections(pairs, 128, [8], ranks=8)),
        ("gated_msa", lambda: gated(msa, 256, 8, 32)),
        ("gated_pair", lambda: gated(pair, 128, 4, 32)),
        ("gated_ending", lambda: gated(pair, 128, 4, 32, transposed=True)),
        ("msa_gated_by_halves", lambda: gated((1, 64, 256), 256, 8, 32, ranks=2)),
        ("pair_gated_by_halves", lambda: gated((1, 128, 256), 128, 4, 32, ranks=2)),
        ("gated_to_ranks", lambda: gated(pairs, 128, 4, 32, ranks=8)),
        ("gated_extra", lambda: gated(extra, 64, 8, 8)),
        ("project_parts", lambda: in_parts(4, (128, 128, 8, 2), lambda: projections(few, 256, [256] * 4))),
        ("project_bias_parts", lambda: in_parts(2, (64, 64, 4, 3), lambda: projections(few, 256, [128] * 4 + [8]))),
        ("gated_parts", lambda: in_parts(2, (64, 64, 4, 3), lambda: gated(few, 256, 8, 32))),
        ("triangle_project_parts", lambda: in_parts(4, (64, 64, 4, 2), lambda: triangle_project(pairs, 128))),
        ("transition_parts", lambda: in_parts(4, (64, 128, 4, 2), lambda: transitions(few, 256, 4))),
        ("transition_msa", lambda: transitions(msa, 256, 4)),
        ("transition_pair", lambda: transitions(pair, 128, 4)),
        ("transition_extra", lambda: transitions(extra, 64, 4)),
        ("transition_template", lambda: transitions(template, 64, 2)),
        ("triangle_project_pair", lambda: triangle_project(pair, 128)),
        ("triangle_project_gathered", lambda: triangle_project((1, 128, 256), 128, ranks=2)),
        ("triangle_project_to_ranks", lambda: triangle_project(pairs, 128, ranks=8)),
        ("triangle_project_template", lambda: triangle_project(template, 64)),
        ("triangle_product_outgoing", lambda: triangle_products(128, True)),
        ("triangle_product_incoming", lambda: triangle_products(128, False)),
        ("triangle_product_half", lambda: triangle_products(64, True)),
        ("triangle_output_pair", lambda: triangle_output(pair, 128)),
        ("triangle_output_template", lambda: triangle_output(template, 64)),
        ("outer_product_project_msa", lambda: outer_product_project(msa, 256)),
        ("outer_product_project_to_ranks", lambda: outer_product_project((1, 128, 32), 256, ranks=8)),
        ("outer_product_project_extra", lambda: outer_product_project(extra, 64)),
        ("outer_product_update_msa", lambda: outer_product_update(128, 256)),
        ("layer_norm_msa", lambda: run_backward(layer_norm.layer_norm(leaf(*msa, 256), *norm(256)))),
        ("layer_norm_single", lambda: run_backward(layer_norm.layer_norm(leaf(1, 256, 384), *norm(384)))),
        ("optimizer", lambda: optimizer(93_229_082)),
        ("dropout_mask", _draw_masks),
    ]
