"""Batched products of triangle multiplication for compute capability 9.0 in Gluon, beside those of the library."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false

from typing import Any, NamedTuple

import torch
from torch import Tensor

from scalefold.kernels import hopper
from scalefold.kernels.hopper.rows import MISSING as ROWS_MISSING
from scalefold.kernels.hopper.rows import matrix

try:
    from scalefold.kernels.hopper.triangle_product.program import CHUNK, hopper_product

    MISSING = ROWS_MISSING
except (ImportError, AttributeError) as error:  # Gluon is experimental: names move between versions
    MISSING = f"this Triton's Gluon is another one: {error}"

BLOCK = hopper.PART


class Form(NamedTuple):
    """How a program is cut: values of n, tiles of m, slots and buffers per consumer, registers, at most per thread."""

    columns: int
    tiles: int
    stages: int
    buffers: int
    registers: int = 240
    most_registers: int | None = None


def multiply(
    y: Tensor, x: Tensor, second: Tensor | None, form: Form, across: bool, kept_across: bool, turned: bool
) -> list[Tensor]:
    """out[m, n] = sum over k of x[m, k] y[n, k] of matrices [*, length, length]; see ``program``."""
    length = y.shape[-1]
    xs = [x] if second is None else [x, second]
    outs = [torch.empty_like(x) for x in xs]
    block = (CHUNK.value, form.columns) if kept_across else (form.columns, CHUNK.value)
    squares: list[Any] = [matrix(x.view(-1, length), BLOCK, BLOCK) for x in (*xs, *outs)]
    if second is None:
        squares = [squares[0], None, squares[1], None]
    parts = length // (BLOCK * form.tiles) * (length // form.columns)
    options = {} if form.most_registers is None else {"maxnreg": form.most_registers}
    hopper_product[(parts, y.shape[:-2].numel())](
        matrix(y.view(-1, length), *block), *squares,
        LENGTH=length, TILES=form.tiles, STAGES=form.stages, BUFFERS=form.buffers, ACROSS=across,
        KEPT_ACROSS=kept_across, TURNED=turned, REGISTERS=form.registers, num_warps=4, **options,
    )  # fmt: skip
    return outs


def product(a: Tensor, b: Tensor, outgoing: bool, form: Form) -> Tensor:
    """x = a b^T, or if not outgoing a^T b."""
    return multiply(b, a, None, form, not outgoing, not outgoing, False)[0]


def gradients(a: Tensor, b: Tensor, d: Tensor, outgoing: bool, form: Form) -> tuple[Tensor, Tensor]:
    """Gradients of a and b, in one launch."""
    da, db = multiply(d, b, a, form, outgoing, False, outgoing)
    return da, db


def gradients_apart(a: Tensor, b: Tensor, d: Tensor, outgoing: bool, form: Form) -> tuple[Tensor, Tensor]:
    """The same in two launches."""
    if outgoing:
        return multiply(b, d, None, form, False, True, False)[0], multiply(a, d, None, form, True, True, False)[0]
    return multiply(d, b, None, form, False, False, False)[0], multiply(d, a, None, form, False, True, False)[0]
