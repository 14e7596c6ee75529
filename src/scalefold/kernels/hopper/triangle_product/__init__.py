"""Batched products of triangle multiplication for compute capability 9.0 in Gluon, as ``hopper.rows``."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false

from typing import Any

from torch import Tensor

from scalefold.kernels import hopper, tuning
from scalefold.kernels.hopper import choice
from scalefold.kernels.hopper.rows import MISSING as ROWS_MISSING
from scalefold.kernels.hopper.rows import is_dense, matrix, multiprocessors

try:
    from scalefold.kernels.hopper.triangle_product.program import CHUNK, LENGTH, hopper_product

    MISSING = ROWS_MISSING
except (ImportError, AttributeError) as error:  # Gluon is experimental: names move between versions
    MISSING = f"this Triton's Gluon is another one: {error}"

TILES = 4  # of a channel
for _name in ("triangle_hopper_product", "triangle_hopper_product_gradients"):
    tuning.register(_name, lambda fields, capability: {"HOPPER": 0})


def product_obstacle(a: Tensor, b: Tensor, d: Tensor | None = None) -> str | None:
    """Why ``product``, or with d, the product's gradient, ``gradients`` cannot or should not take these arguments."""
    given = [a, b] if d is None else [a, b, d]
    if reason := choice.obstacle(MISSING, given):
        return reason
    if any(x.shape[-2:] != (LENGTH.value, LENGTH.value) for x in given):
        return f"operands are not squares of {LENGTH.value}"
    if not a.numel() or not all(map(is_dense, given)):
        return "operands do not lie densely"
    name = "triangle_hopper_product" if d is None else "triangle_hopper_product_gradients"
    rows = a.shape[:-1].numel()
    return choice.preference(tuning.lookup(name, **tuning.row_fields(rows, a.dtype, n=LENGTH.value)))


def product(a: Tensor, b: Tensor, outgoing: bool) -> Tensor:
    """``reference.triangle_product``; a, b: [*, LENGTH, LENGTH]."""
    (x,) = _multiply(b, [a], not outgoing, not outgoing, False)
    return x


def gradients(a: Tensor, b: Tensor, d: Tensor, outgoing: bool) -> tuple[Tensor, Tensor]:
    """Those of a and b for d, that of the product, in one launch."""
    d_a, d_b = _multiply(d, [b, a], outgoing, False, outgoing)
    return d_a, d_b


def _multiply(y: Tensor, xs: list[Tensor], across: bool, kept_across: bool, turned: bool) -> list[Tensor]:
    """One product or two that share y; see ``program``."""
    length, channels = LENGTH.value, y.shape[:-2].numel()
    outs = [x.new_empty(x.shape) for x in xs]
    none = [None] * (2 - len(xs))
    parts = 2 if 2 * channels <= multiprocessors(y.device) else 1
    block = (CHUNK.value, length) if kept_across else (length, CHUNK.value)
    hopper_product[(parts, channels)](
        matrix(y.view(-1, length), *block), *map(_blocks, xs), *none, *map(_blocks, outs), *none,
        TILES=TILES // parts, ACROSS=across, KEPT_ACROSS=kept_across, TURNED=turned, num_warps=4,
    )  # fmt: skip
    return outs


def _blocks(x: Tensor) -> Any:
    return matrix(x.view(-1, LENGTH.value), hopper.PART, hopper.PART)
