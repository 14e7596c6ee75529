"""Inputs of the embedders, made where they are stored: one launch each, forward only (nothing here has a gradient).

What belongs to a row (distance, mask, classes) is found once, compared with its columns in registers, and only the
features themselves are written, in the type of the weights that read them.
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

ELEMENTS = 2048  # per program: a tile of rows, each as wide as the next power of two
EXTRA_CLASSES = tl.constexpr(23)
TEMPLATE_CLASSES, TEMPLATE_BINS = tl.constexpr(22), tl.constexpr(39)


@triton.jit
def _pairs(num_pairs, n, ROWS: tl.constexpr):
    """Pairs of a program, the places of i and j among the residues of all samples, and which exist."""
    pair = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    i = pair // n
    return pair, i, i // n * n + pair % n, pair < num_pairs


@triton.jit
def _store(out, value, rows, exists, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """A tile of rows [rows, BLOCK] of which WIDTH columns exist."""
    c = tl.arange(0, BLOCK)[None, :]
    place = out + rows.to(tl.int64)[:, None] * WIDTH + c
    tl.store(place, value.to(out.dtype.element_ty), mask=exists[:, None] & (c < WIDTH))


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
def _bin(distance, edges, BINS: tl.constexpr, BLOCK: tl.constexpr):
    """Number of the bin, between strict edges, of squared distances [rows]; -1 for none. edges: [BINS + 1] of BLOCK."""
    k = tl.arange(0, BLOCK)
    bounds = tl.load(edges + k, mask=k <= BINS, other=float("inf"))[None, :]
    above = tl.sum((distance[:, None] > bounds).to(tl.int32), 1)
    reached = tl.sum((distance[:, None] >= bounds).to(tl.int32), 1)
    return tl.where((above == reached) & (above <= BINS), above - 1, -1)


@triton.jit
def _offset_kernel(
    residue_index, out, num_pairs, n, largest, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr
):
    """out [B, N, N, 2 largest + 1]: clipped offsets of residue numbers, one-hot."""
    pair, i, j, exists = _pairs(num_pairs, n, ROWS)
    offset = tl.load(residue_index + i, mask=exists, other=0) - tl.load(residue_index + j, mask=exists, other=0)
    offset = tl.minimum(tl.maximum(offset, -largest), largest) + largest
    value = tl.where(offset.to(tl.int32)[:, None] == tl.arange(0, BLOCK)[None, :], 1.0, 0.0)
    _store(out, value, pair, exists, WIDTH, BLOCK)


@triton.jit
def _distance_kernel(points, edges, out, num_pairs, n, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """out [B, N, N, WIDTH]: squared distances between strict edges, one-hot."""
    pair, i, j, exists = _pairs(num_pairs, n, ROWS)
    own = _bin(_squared_distance(points, i, j, exists), edges, WIDTH, 2 * BLOCK)
    value = tl.where(own[:, None] == tl.arange(0, BLOCK)[None, :], 1.0, 0.0)
    _store(out, value, pair, exists, WIDTH, BLOCK)


@triton.jit
def _extra_kernel(
    classes, has_deletion, deletion_value, out, num_rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr
):
    """out [rows, 25]: class, one-hot, and both numbers of deletions."""
    rows, c = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)[None, :]
    exists = rows < num_rows
    kind = tl.load(classes + rows, mask=exists, other=-1).to(tl.int32)[:, None]
    value = tl.where((kind == c) & (c < EXTRA_CLASSES), 1.0, 0.0)
    value = tl.where(c == EXTRA_CLASSES, tl.load(has_deletion + rows, mask=exists, other=0.0)[:, None], value)
    value = tl.where(c > EXTRA_CLASSES, tl.load(deletion_value + rows, mask=exists, other=0.0)[:, None], value)
    _store(out, value, rows, exists, WIDTH, BLOCK)


@triton.jit
def _column(aatype, residue, exists, FIRST: tl.constexpr):
    """Columns of residue types that begin at FIRST; -1 for none."""
    kind = tl.load(aatype + residue, mask=exists, other=-1).to(tl.int32)
    return tl.where((kind >= 0) & (kind < TEMPLATE_CLASSES), kind + FIRST, -1)


@triton.jit
def _template_kernel(
    aatype, pseudo_beta, beta_mask, atom_mask, edges, out, num_pairs, n, ATOMS: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """out [B T, N, N, 88]: see ``model.templates.template_pair_features``."""
    pair, i, j, exists = _pairs(num_pairs, n, ROWS)
    mask = tl.where(exists, 1.0, 0.0)
    for k in tl.static_range(3):
        mask *= tl.load(atom_mask + i * ATOMS + k, mask=exists, other=0.0)
        mask *= tl.load(atom_mask + j * ATOMS + k, mask=exists, other=0.0)
    both = tl.load(beta_mask + i, mask=exists, other=0.0) * tl.load(beta_mask + j, mask=exists, other=0.0)
    own = _bin(_squared_distance(pseudo_beta, i, j, exists), edges, TEMPLATE_BINS, BLOCK // 2)
    of_j = _column(aatype, j, exists, TEMPLATE_BINS + 1)
    of_i = _column(aatype, i, exists, TEMPLATE_BINS + 1 + TEMPLATE_CLASSES)
    c = tl.arange(0, BLOCK)[None, :]
    is_one = (c == own[:, None]) | (c == of_j[:, None]) | (c == of_i[:, None]) | (c == WIDTH - 1)
    value = tl.where(is_one, 1.0, tl.where(c == TEMPLATE_BINS, both[:, None], 0.0))
    _store(out, value * mask[:, None], pair, exists, WIDTH, BLOCK)


def _tiling(out: Tensor) -> tuple[int, tuple[int], dict[str, int]]:
    """Rows of ``out``, the grid over them, and a launch's constants."""
    width, num_rows = out.shape[-1], out.numel() // out.shape[-1]
    block = tuning.power_of_two(width)
    rows = ELEMENTS // block
    return num_rows, (tuning.ceil_div(num_rows, rows),), {"WIDTH": width, "BLOCK": block, "ROWS": rows, "num_warps": 4}


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
    n = residue_index.shape[-1]
    out = torch.empty(*residue_index.shape, n, 2 * largest + 1, dtype=dtype, device=residue_index.device)
    num_pairs, grid, tile = _tiling(out)
    _offset_kernel[grid](residue_index.contiguous(), out, num_pairs, n, largest, **tile)
    return out


def distance_features(points: Tensor, edges: Edges, dtype: torch.dtype) -> Tensor:
    """``model.embedders.RecyclingEmbedder.distogram``: fp32 [B, N, 3] -> [B, N, N, bins]."""
    n = points.shape[-2]
    out = torch.empty(*points.shape[:-1], n, edges[2], dtype=dtype, device=points.device)
    num_pairs, grid, tile = _tiling(out)
    _distance_kernel[grid](points.contiguous(), squared_edges(edges, points.device), out, num_pairs, n, **tile)
    return out


def extra_features(classes: Tensor, has_deletion: Tensor, deletion_value: Tensor, dtype: torch.dtype) -> Tensor:
    """``model.embedders.extra_msa_features``: int64 and twice fp32 [B, S, N] -> [B, S, N, 25]."""
    inputs = (x.contiguous() for x in (classes, has_deletion, deletion_value))
    out = torch.empty(*classes.shape, EXTRA_CLASSES.value + 2, dtype=dtype, device=classes.device)
    num_rows, grid, tile = _tiling(out)
    _extra_kernel[grid](*inputs, out, num_rows, **tile)
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
    num_pairs, grid, tile = _tiling(out)
    bounds = squared_edges(edges, aatype.device)
    _template_kernel[grid](*inputs, bounds, out, num_pairs, n, ATOMS=atom_mask.shape[-1], **tile)
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
