"""Inputs of the embedders, made where they are stored: one launch each, forward only (nothing here has a gradient).

One-hot classes, bins of distances and masks of pairs are compared in registers; only the features themselves are
written, in the type of the weights that read them.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from scalefold.kernels import tuning

OPTIONS = {"BLOCK": 2048, "num_warps": 8}  # elements per program
EXTRA_CLASSES = tl.constexpr(23)
TEMPLATE_CLASSES, TEMPLATE_BINS = tl.constexpr(22), tl.constexpr(39)


@triton.jit
def _elements(count, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Elements of a program, their rows and columns, and which exist; rows have WIDTH columns."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return index, index // WIDTH, (index % WIDTH).to(tl.int32), index < count


@triton.jit
def _squared_distance(points, a, b, exists):
    """Between points a and b, from differences."""
    total = tl.zeros(a.shape, tl.float32)
    for k in tl.static_range(3):
        difference = tl.load(points + 3 * a + k, mask=exists, other=0.0)
        difference -= tl.load(points + 3 * b + k, mask=exists, other=0.0)
        total += difference * difference
    return total


@triton.jit
def _in_bin(distance, edges, c, exists, BINS: tl.constexpr):
    """1 where squared distances lie strictly between edge c and the next one, else 0. edges: [BINS + 1]."""
    inside = exists & (c < BINS)
    lower = tl.load(edges + c, mask=inside, other=float("inf"))
    upper = tl.load(edges + c + 1, mask=inside, other=0.0)
    return tl.where((distance > lower) & (distance < upper), 1.0, 0.0)


@triton.jit
def _offset_kernel(residue_index, out, count, n, largest, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """out [B, N, N, 2 largest + 1]: clipped offsets of residue numbers, one-hot."""
    index, pair, c, exists = _elements(count, BLOCK, WIDTH)
    i, j = pair // n, pair // (n * n) * n + pair % n
    offset = tl.load(residue_index + i, mask=exists, other=0) - tl.load(residue_index + j, mask=exists, other=0)
    offset = tl.minimum(tl.maximum(offset, -largest), largest) + largest
    tl.store(out + index, tl.where(offset == c, 1.0, 0.0).to(out.dtype.element_ty), mask=exists)


@triton.jit
def _distance_kernel(points, edges, out, count, n, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """out [B, N, N, WIDTH]: squared distances between strict edges, one-hot."""
    index, pair, c, exists = _elements(count, BLOCK, WIDTH)
    distance = _squared_distance(points, pair // n, pair // (n * n) * n + pair % n, exists)
    tl.store(out + index, _in_bin(distance, edges, c, exists, WIDTH).to(out.dtype.element_ty), mask=exists)


@triton.jit
def _extra_kernel(classes, has_deletion, deletion_value, out, count, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """out [rows, 25]: class, one-hot, and both numbers of deletions."""
    index, row, c, exists = _elements(count, BLOCK, WIDTH)
    kind = tl.load(classes + row, mask=exists & (c < EXTRA_CLASSES), other=-1)
    number = tl.load(has_deletion + row, mask=exists & (c == EXTRA_CLASSES), other=0.0)
    number += tl.load(deletion_value + row, mask=exists & (c > EXTRA_CLASSES), other=0.0)
    tl.store(out + index, tl.where(kind == c, 1.0, number).to(out.dtype.element_ty), mask=exists)


@triton.jit
def _template_kernel(
    aatype, pseudo_beta, beta_mask, atom_mask, edges, out, count, n, ATOMS: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """out [B T, N, N, 88]: see ``model.templates.template_pair_features``."""
    index, pair, c, exists = _elements(count, BLOCK, WIDTH)
    i, j = pair // n, pair // (n * n) * n + pair % n
    mask = tl.where(exists, 1.0, 0.0)
    for k in tl.static_range(3):
        mask *= tl.load(atom_mask + i * ATOMS + k, mask=exists, other=0.0)
        mask *= tl.load(atom_mask + j * ATOMS + k, mask=exists, other=0.0)
    distance = _squared_distance(pseudo_beta, i, j, exists)
    value = _in_bin(distance, edges, c, exists, TEMPLATE_BINS)
    both = tl.load(beta_mask + i, mask=exists, other=0.0) * tl.load(beta_mask + j, mask=exists, other=0.0)
    value = tl.where(c == TEMPLATE_BINS, both, value)
    first = TEMPLATE_BINS + 1
    of_j, of_i = c - first, c - first - TEMPLATE_CLASSES
    is_j = (of_j >= 0) & (of_j < TEMPLATE_CLASSES)
    is_i = (of_i >= 0) & (of_i < TEMPLATE_CLASSES)
    kind = tl.load(aatype + tl.where(is_j, j, i), mask=exists & (is_i | is_j), other=-1)
    value = tl.where((is_j & (kind == of_j)) | (is_i & (kind == of_i)) | (c == WIDTH - 1), 1.0, value)
    tl.store(out + index, (value * mask).to(out.dtype.element_ty), mask=exists)


def _grid(out: Tensor) -> tuple[int]:
    return (tuning.ceil_div(out.numel(), OPTIONS["BLOCK"]),)


def obstacle(x: Tensor, *_: Any) -> str | None:
    """Why the operations of this file do not take these arguments, or None."""
    return None if x.numel() else "an argument is empty"


Edges = tuple[float, float, int, float]  # first, last in angstrom, and their number; the open one, angstrom squared


@functools.cache
def squared_edges(edges: Edges, device: torch.device) -> Tensor:
    """Squares of equally spaced edges, then the open one: fp32 [number + 1]."""
    first, last, count, last_square = edges
    squares = torch.linspace(first, last, count, device=device).square()
    return torch.cat((squares, squares.new_full((1,), last_square)))


def offset_features(residue_index: Tensor, largest: int, dtype: torch.dtype) -> Tensor:
    """``model.embedders.InputEmbedder.relative_positions``: int64 [B, N] -> [B, N, N, 2 largest + 1]."""
    n, width = residue_index.shape[-1], 2 * largest + 1
    out = torch.empty(*residue_index.shape, n, width, dtype=dtype, device=residue_index.device)
    _offset_kernel[_grid(out)](residue_index.contiguous(), out, out.numel(), n, largest, WIDTH=width, **OPTIONS)
    return out


def distance_features(points: Tensor, edges: Edges, dtype: torch.dtype) -> Tensor:
    """``model.embedders.RecyclingEmbedder.distogram``: fp32 [B, N, 3] -> [B, N, N, bins]."""
    n, width = points.shape[-2], edges[2]
    out = torch.empty(*points.shape[:-1], n, width, dtype=dtype, device=points.device)
    bounds = squared_edges(edges, points.device)
    _distance_kernel[_grid(out)](points.contiguous(), bounds, out, out.numel(), n, WIDTH=width, **OPTIONS)
    return out


def extra_features(classes: Tensor, has_deletion: Tensor, deletion_value: Tensor, dtype: torch.dtype) -> Tensor:
    """``model.embedders.extra_msa_features``: int64 and twice fp32 [B, S, N] -> [B, S, N, 25]."""
    width, inputs = EXTRA_CLASSES.value + 2, (x.contiguous() for x in (classes, has_deletion, deletion_value))
    out = torch.empty(*classes.shape, width, dtype=dtype, device=classes.device)
    _extra_kernel[_grid(out)](*inputs, out, out.numel(), WIDTH=width, **OPTIONS)
    return out


def template_features(
    aatype: Tensor, pseudo_beta: Tensor, beta_mask: Tensor, atom_mask: Tensor, edges: Edges, dtype: torch.dtype
) -> Tensor:
    """``model.templates.template_pair_features``.

    aatype: int64 [B, T, N]; pseudo_beta: [B, T, N, 3]; beta_mask: [B, T, N]; atom_mask: [B, T, N, 37] ->
    [B, T, N, N, 88].
    """
    n, width = aatype.shape[-1], TEMPLATE_BINS.value + 2 * TEMPLATE_CLASSES.value + 5
    out = torch.empty(*aatype.shape, n, width, dtype=dtype, device=aatype.device)
    inputs = (x.contiguous() for x in (aatype, pseudo_beta, beta_mask, atom_mask))
    bounds = squared_edges(edges, aatype.device)
    sizes = {"ATOMS": atom_mask.shape[-1], "WIDTH": width}
    _template_kernel[_grid(out)](*inputs, bounds, out, out.numel(), n, **sizes, **OPTIONS)
    return out


def compile_cases() -> list[tuple[str, Callable[[], object]]]:
    """A benchmark crop; see ``tuning``."""

    def data(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    pair, rows, low, whole = (1, 4, 256), (1, 1024, 256), torch.bfloat16, torch.int64
    masks = (data(*pair), data(*pair, 37))
    return [
        ("offset_features", lambda: offset_features(data(1, 256, dtype=whole), 32, low)),
        ("distance_features", lambda: distance_features(data(1, 256, 3), (3.25, 20.75, 15, 1e8), low)),
        ("extra_features", lambda: extra_features(data(*rows, dtype=whole), data(*rows), data(*rows), low)),
        (
            "template_features",
            lambda: template_features(data(*pair, dtype=whole), data(*pair, 3), *masks, (3.25, 50.75, 39, 1e5), low),
        ),
    ]
