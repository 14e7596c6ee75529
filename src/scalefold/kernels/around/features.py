"""Inputs of the embedders as tiles in registers: what a linear layer reads of them is never stored.

Features of rows, fp32 [rows, K], are those of the definition, a one for every bias of the layers that read them, zeros
up to K. Rows come as one ``outer`` number and many ``inner`` ones (i and j of residue pairs; sequence and residue of an
alignment). Of residue pairs a launch before notes in 32 bits where their ones are: the compiler would have every thread
that holds a part of a row find them again.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from scalefold.kernels import tuning
from scalefold.kernels.instructions import program, wait_for_predecessors

TARGETS, LETTERS = tl.constexpr(22), tl.constexpr(49)  # features of a residue, and of a letter of the alignment
GLYCINE, CA, CB = tl.constexpr(7), tl.constexpr(1), tl.constexpr(3)
DISTANCE_BINS = tl.constexpr(15)
EXTRA_CLASSES = tl.constexpr(23)
TEMPLATE_CLASSES, TEMPLATE_BINS, TEMPLATE_WIDTH = tl.constexpr(22), tl.constexpr(39), tl.constexpr(88)
NOWHERE = tl.constexpr(255)  # the place, in 8 bits, of a one that there is not
NOTED = tl.constexpr(256)  # residue pairs of a program that notes them

Edges = tuple[float, float, int, float]  # first, last in angstrom, and their number; the open one, angstrom squared


class Pairs(NamedTuple):
    """What the features of residue pairs are made of."""

    target: Tensor  # fp32 [B, N, 22]
    ones: Tensor  # int32 [B, N, N]
    n: int
    first_bias: int  # column


class Letters(NamedTuple):
    """Those of the clustered alignment."""

    letters: Tensor  # fp32 [B, S, N, 49]
    target: Tensor  # fp32 [B, N, 22]
    n: int
    sequences: int


class Extra(NamedTuple):
    """Those of the extra sequences: [B, S, N]."""

    classes: Tensor  # int64
    has_deletion: Tensor
    deletion_value: Tensor
    n: int


class TemplatePairs(NamedTuple):
    """Those of residue pairs in templates."""

    ones: Tensor  # int32 [B, T, N, N]
    n: int


@triton.jit
def _squared_distance(points, a, b, exists):
    """Between the points that begin at elements a and b, from differences."""
    total = tl.zeros(a.shape, tl.float32)
    for k in tl.static_range(3):
        difference = tl.load(points + a + k, mask=exists, other=0.0)
        difference -= tl.load(points + b + k, mask=exists, other=0.0)
        total += difference * difference
    return total


@triton.jit
def _bin(distance, edges, BINS: tl.constexpr, STEPS: tl.constexpr):
    """Number of the bin, between strict edges, of squared distances [rows]; -1 for none.

    edges: [BINS + 1], ascending, fewer than 2 ** STEPS.
    """
    below = tl.zeros(distance.shape, tl.int32)  # edges below the distance
    for step in tl.static_range(STEPS):
        more = below + (1 << (STEPS - 1 - step))
        edge = tl.load(edges + more - 1, mask=more <= BINS + 1, other=float("inf"))
        below = tl.where(distance > edge, more, below)
    edge = tl.load(edges + below, mask=below <= BINS, other=0.0)
    return tl.where((below <= BINS) & (distance != edge), below - 1, -1)


@triton.jit
def _noted(number, FIRST, BITS: tl.constexpr):
    """Places of numbers [rows], whose one-hot begins at FIRST, from BITS on; -1 for none."""
    return tl.where(number >= 0, number + FIRST, NOWHERE) << BITS


@triton.jit
def _pair(num_pairs, n):
    """Pairs of a program, the places of i and j among the residues of all samples, and which exist."""
    pair = tl.program_id(0) * NOTED + tl.arange(0, NOTED)
    i = pair // n
    return pair, i, i // n * n + pair % n, pair < num_pairs


@triton.jit
def _beta(aatype, i, atoms, exists):
    """Element at which the position begins that stands for residue i."""
    is_glycine = tl.load(aatype + i, mask=exists, other=0) == GLYCINE
    return (i * atoms + tl.where(is_glycine, CA, CB)) * 3


@program
@triton.jit
def _pairs_kernel(residue_index, aatype, positions, edges, ones, num_pairs, n, atoms, largest):
    """ones [B, N, N]: of clipped offsets of residue numbers, and of binned distances of the previous pass."""
    wait_for_predecessors()
    pair, i, j, exists = _pair(num_pairs, n)
    offset = tl.load(residue_index + i, mask=exists, other=0) - tl.load(residue_index + j, mask=exists, other=0)
    offset = tl.minimum(tl.maximum(offset, -largest), largest).to(tl.int32) + largest
    here, there = _beta(aatype, i, atoms, exists), _beta(aatype, j, atoms, exists)
    own = _bin(_squared_distance(positions, here, there, exists), edges, DISTANCE_BINS, 5)
    own = _noted(own, 2 * TARGETS + 2 * largest + 1, 8)
    tl.store(ones + pair, _noted(offset, 2 * TARGETS, 0) | own, mask=exists)


@triton.jit
def _class(aatype, residue, exists):
    """Residue types; -1 for none."""
    kind = tl.load(aatype + residue, mask=exists, other=-1).to(tl.int32)
    return tl.where(kind < TEMPLATE_CLASSES, kind, -1)


@program
@triton.jit
def _templates_kernel(aatype, pseudo_beta, beta_mask, atom_mask, edges, ones, num_pairs, n, atoms):
    """ones [B, T, N, N]: those of ``model.templates.template_pair_features``; masks are zeros and ones."""
    wait_for_predecessors()
    pair, i, j, exists = _pair(num_pairs, n)
    mask = exists
    for atom in tl.static_range(3):
        mask = mask & (tl.load(atom_mask + i * atoms + atom, mask=exists, other=0.0) != 0.0)
        mask = mask & (tl.load(atom_mask + j * atoms + atom, mask=exists, other=0.0) != 0.0)
    both = tl.load(beta_mask + i, mask=exists, other=0.0) * tl.load(beta_mask + j, mask=exists, other=0.0)
    own = _bin(_squared_distance(pseudo_beta, 3 * i, 3 * j, exists), edges, TEMPLATE_BINS, 6)
    codes = _noted(tl.where(mask, own, -1), 0, 0)
    codes = codes | _noted(tl.where(mask, _class(aatype, j, exists), -1), TEMPLATE_BINS + 1, 8)
    codes = codes | _noted(tl.where(mask, _class(aatype, i, exists), -1), TEMPLATE_BINS + 1 + TEMPLATE_CLASSES, 16)
    codes = codes | (mask & (both != 0.0)).to(tl.int32) << 24 | mask.to(tl.int32) << 25
    tl.store(ones + pair, codes, mask=exists)


@triton.jit
def _is_one(codes, shift, bits, wanted):
    """Where the ones of codes [rows] are: each column [K] compares some bits of them with a number of its own."""
    return ((codes[:, None] >> shift[None, :]) & bits[None, :]) == wanted[None, :]


@triton.jit
def pair_features(given, outer, inner, exists, k):
    """Targets of i, of j, clipped offset of residue numbers, binned distance of the previous pass, four ones."""
    of_i = tl.load(given.target + outer * TARGETS + k, mask=k < TARGETS, other=0.0)
    residue = (outer // given.n * given.n + inner)[:, None]
    is_target = exists[:, None] & ((k >= TARGETS) & (k < 2 * TARGETS))[None, :]
    of_j = tl.load(given.target + (residue - 1) * TARGETS + k[None, :], mask=is_target, other=0.0)
    codes = tl.load(given.ones + outer * given.n + inner, mask=exists, other=0)
    is_bias = (k >= given.first_bias) & (k < given.first_bias + 4)
    is_offset, noted = k < given.first_bias - DISTANCE_BINS, (k >= 2 * TARGETS) & (k < given.first_bias)
    bits, wanted = tl.where(noted, 255, 0), tl.where(noted, k, tl.where(is_bias, 0, -1))
    is_one = _is_one(codes, tl.where(is_offset, 0, 8), bits, wanted)
    return tl.where(is_one, 1.0, of_i[None, :] + of_j)


@triton.jit
def letter_features(given, outer, inner, exists, k):
    """Features of the letter, of its residue, two ones."""
    here, c = exists[:, None], k[None, :]
    letter = given.letters + outer.to(tl.int64) * given.n * LETTERS
    value = tl.load(letter + inner[:, None] * LETTERS + c, mask=here & (c < LETTERS), other=0.0)
    target = given.target + outer // given.sequences * given.n * TARGETS - LETTERS
    is_target = (c >= LETTERS) & (c < LETTERS + TARGETS)
    value += tl.load(target + inner[:, None] * TARGETS + c, mask=here & is_target, other=0.0)
    return tl.where((c >= LETTERS + TARGETS) & (c < LETTERS + TARGETS + 2), 1.0, value)


@triton.jit
def extra_features(given, outer, inner, exists, k):
    """Class, both numbers of deletions, a one."""
    rows, c = outer * given.n + inner, k[None, :]
    kind = tl.load(given.classes + rows, mask=exists, other=-1).to(tl.int32)[:, None]
    has = tl.load(given.has_deletion + rows, mask=exists, other=0.0)[:, None]
    value = tl.load(given.deletion_value + rows, mask=exists, other=0.0)[:, None]
    value = tl.where(c == EXTRA_CLASSES, has, tl.where(c == EXTRA_CLASSES + 1, value, 0.0))
    return tl.where(((c == kind) & (c < EXTRA_CLASSES)) | (c == EXTRA_CLASSES + 2), 1.0, value)


@triton.jit
def template_features(given, outer, inner, exists, k):
    """Those of ``model.templates.template_pair_features``, a one."""
    codes = tl.load(given.ones + outer.to(tl.int64) * given.n + inner, mask=exists, other=0)
    is_both, is_pair, is_bias = k == TEMPLATE_BINS, k == TEMPLATE_WIDTH - 1, k == TEMPLATE_WIDTH
    noted = k < TEMPLATE_BINS + 1 + 2 * TEMPLATE_CLASSES
    shift = tl.where(k < TEMPLATE_BINS, 0, tl.where(k < TEMPLATE_BINS + 1 + TEMPLATE_CLASSES, 8, 16))
    shift = tl.where(is_both, 24, tl.where(is_pair, 25, shift))
    bits = tl.where(is_both | is_pair, 1, tl.where(noted, 255, 0))
    wanted = tl.where(is_both | is_pair, 1, tl.where(noted, k, tl.where(is_bias, 0, -1)))
    return tl.where(_is_one(codes, shift, bits, wanted), 1.0, 0.0)


@functools.cache
def squared_edges(edges: Edges, device: torch.device) -> Tensor:
    """Squares of equally spaced edges, then the open one: fp32 [number + 1]."""
    first, last, count, last_square = edges
    squares = torch.linspace(first, last, count, device=device).square()
    return torch.cat((squares, squares.new_full((1,), last_square)))


def _note(program: Any, of: Tensor, edges: Edges, others: tuple[Tensor, ...], atoms: int, *more: int) -> Tensor:
    """Run a program that notes the ones of all pairs of residues [*, N], the first tensor's: int32 [*, N, N]."""
    n = of.shape[-1]
    ones = torch.empty(*of.shape, n, dtype=torch.int32, device=of.device)
    tensors = (*(x.contiguous() for x in (of, *others)), squared_edges(edges, of.device), ones)
    program[(tuning.ceil_div(ones.numel(), NOTED.value),)](*tensors, ones.numel(), n, atoms, *more, num_warps=4)
    return ones


def note_pairs(residue_index: Tensor, aatype: Tensor, positions: Tensor, edges: Edges, largest: int) -> Tensor:
    """Ones of ``pair_features``. positions: [B, N, ATOMS, 3] of the previous pass -> int32 [B, N, N]."""
    return _note(_pairs_kernel, residue_index, edges, (aatype, positions), positions.shape[-2], largest)


def note_templates(aatype: Tensor, pseudo_beta: Tensor, beta_mask: Tensor, atom_mask: Tensor, edges: Edges) -> Tensor:
    """Ones of ``template_features``: int32 [B, T, N, N]."""
    return _note(_templates_kernel, aatype, edges, (pseudo_beta, beta_mask, atom_mask), atom_mask.shape[-1])
