"""Weight gradients of several operations in one launch, and all of their sums of partial gradients in another.

Where a rank has few rows, a product over them fills the multiprocessors only if each has a few of them; then most of
what it does is to write partial gradients and to sum them. Products of operations that follow each other fill them
together: each is split into a few ranges. Both programs get what they work on as arguments, with places for the most
there may be, so that one binary serves all groups.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from scalefold.kernels import tuning
from scalefold.kernels.around import aside
from scalefold.kernels.gradients.weight_gradient import NARROWEST, Product, product_matrices, weight_partials
from scalefold.kernels.instructions import program, wait_for_predecessors
from scalefold.kernels.rows import dot, sum_all, sum_block

T = TypeVar("T")
MOST_PRODUCTS = 32  # of a launch
MOST_SUMS = 64
MOST_BYTES = 2**28  # that products read before they are computed
NUM_PROGRAMS = 528  # four per multiprocessor of an H200, where that leaves every one a range of some length
SHORTEST_RANGE = 16  # tiles of rows
BLOCK_M, BLOCK_N = 64, 128  # rows of a step; rows and columns of a tile of a gradient
UNIT = tl.constexpr(8)  # elements: what strides and sizes are multiples of
FEW = tl.constexpr(16)  # partial sums that a program takes at once, of many columns


@triton.jit
def _value(sealed):
    """Of an argument from ``_sealed``."""
    return sealed >> 4


def _sealed(values: Sequence[int]) -> tuple[int, ...]:
    """Integers that Triton takes for nothing special: it would compile anew for a 1 and for multiples of 16."""
    return tuple(16 * value + 2 for value in values)


@program
@triton.jit
def _grouped_product_kernel(
    ds, operands, outs, firsts, num_rows, steps, d_strides, a_strides, widths, columns,
    COUNT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program (tile of one of COUNT products, range of rows) -> partials[range] of that product: fp32 [width, columns].

    firsts: program of the first tile; steps: of BLOCK_M rows in a range. Strides, widths and columns are in UNITs.
    """
    wait_for_predecessors()
    own = tl.program_id(0)
    d, a, out, first = ds[0], operands[0], outs[0], firsts[0]
    rows, step, d_stride, a_stride, width, c = (
        num_rows[0], steps[0], d_strides[0], a_strides[0], widths[0], columns[0]
    )  # fmt: skip
    for i in tl.static_range(1, COUNT):
        here = own >= _value(firsts[i])
        d, a, out = tl.where(here, ds[i], d), tl.where(here, operands[i], a), tl.where(here, outs[i], out)
        first, rows = tl.where(here, firsts[i], first), tl.where(here, num_rows[i], rows)
        step, width = tl.where(here, steps[i], step), tl.where(here, widths[i], width)
        c, d_stride = tl.where(here, columns[i], c), tl.where(here, d_strides[i], d_stride)
        a_stride = tl.where(here, a_strides[i], a_stride)
    own -= _value(first)
    d_stride, a_stride = _value(d_stride) * UNIT, _value(a_stride) * UNIT
    width, c = _value(width) * UNIT, _value(c) * UNIT
    across = tl.cdiv(c, BLOCK_N)
    tiles = tl.cdiv(width, BLOCK_N) * across
    tile, part = own % tiles, own // tiles
    n = tile // across * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tile % across * BLOCK_N + tl.arange(0, BLOCK_N)
    start = part * _value(step) * BLOCK_M
    end = tl.minimum(start + _value(step) * BLOCK_M, _value(rows))
    acc = tl.zeros([BLOCK_N, BLOCK_N], tl.float32)
    for row in range(start, end, BLOCK_M):
        m = row + tl.arange(0, BLOCK_M)
        inside = (m < end)[:, None]
        d_tile = tl.load(d + m[:, None] * d_stride + n[None, :], mask=inside & (n < width)[None, :], other=0.0)
        a_tile = tl.load(a + m[:, None] * a_stride + k[None, :], mask=inside & (k < c)[None, :], other=0.0)
        acc = dot(tl.trans(d_tile), a_tile, acc)
    out += part.to(tl.int64) * (width * c)
    tl.store(out + n[:, None] * c + k[None, :], acc, mask=(n < width)[:, None] & (k < c)[None, :])


@program
@triton.jit
def _grouped_sum_kernel(partials, outs, firsts, counts, strides, sizes, COUNT: tl.constexpr):
    """Program: a block of columns of one of COUNT matrices of partial sums; strides and sizes are in UNITs."""
    wait_for_predecessors()
    own = tl.program_id(0)
    partial, out, first, count, stride, size = partials[0], outs[0], firsts[0], counts[0], strides[0], sizes[0]
    for i in tl.static_range(1, COUNT):
        here = own >= _value(firsts[i])
        partial, out = tl.where(here, partials[i], partial), tl.where(here, outs[i], out)
        first, count = tl.where(here, firsts[i], first), tl.where(here, counts[i], count)
        stride, size = tl.where(here, strides[i], stride), tl.where(here, sizes[i], size)
    own, count = own - _value(first), _value(count)
    stride, size = _value(stride) * UNIT, _value(size) * UNIT
    if count <= FEW:
        sum_block(partial, out, own, count, stride, size, FEW, 512)
    else:
        sum_block(partial, out, own, count, stride, size, 128, 64)


@dataclass(frozen=True)
class _Operands:
    """A product of the kernel: left [rows, width] by its transpose with right [rows, columns], both matrices."""

    left: Tensor
    right: Tensor
    out: Tensor  # of its sum

    @property
    def tiles(self) -> int:
        return tuning.ceil_div(self.left.shape[1], BLOCK_N) * tuning.ceil_div(self.right.shape[1], BLOCK_N)

    @property
    def steps(self) -> int:
        """Tiles of rows."""
        return tuning.ceil_div(len(self.left), BLOCK_M)


class Group:
    """Sums and weight gradients to come, computed once a launch is full of them."""

    def __init__(self) -> None:
        self._products: list[tuple[list[Product], list[Tensor]]] = []  # of each operation, and where they belong
        self._sums: list[tuple[Tensor, Tensor]] = []

    @property
    def is_full(self) -> bool:
        """Whether it is time to compute them: more might not fit a launch, or would keep much memory."""
        products = [product for own, _ in self._products for product in own]
        held = sum(x.numel() * x.element_size() for product in products for x in (product.d, product.a))
        many = len(products) > MOST_PRODUCTS // 2 or len(products) + len(self._sums) > MOST_SUMS // 2
        return many or held > MOST_BYTES

    def add(self, partials: Sequence[Tensor], products: Sequence[Product], dtype: torch.dtype) -> list[Tensor]:
        """``total_gradients``, of which ``run`` writes the values."""
        sizes = [*(p.shape[1] for p in partials), *(math.prod(p.shape) for p in products)]
        outs = [torch.empty(size, dtype=dtype, device=(partials or [products[0].d])[0].device) for size in sizes]
        kept = [out.detach() for out in outs]  # autograd would copy what is held twice
        self._sums += zip(partials, kept, strict=False)
        self._products.append((list(products), kept[len(partials) :]))
        return outs

    def run(self) -> None:
        """Compute what has been added."""
        products, sums = self._products, self._sums
        self.clear()
        fitting: dict[torch.dtype, list[_Operands]] = {}
        for own, outs in products:
            operands = [_operands(product, out) for product, out in zip(own, outs, strict=True)]
            for one in operands:
                if one is not None:
                    fitting.setdefault(one.out.dtype, []).append(one)
            rest = [n for n, one in enumerate(operands) if one is None]
            sums += zip(_partials_of_one([own[n] for n in rest]), [outs[n] for n in rest], strict=True)
        for same in fitting.values():
            for n in range(0, len(same), MOST_PRODUCTS):
                sums += _product_partials(same[n : n + MOST_PRODUCTS])
        _sum(sums)

    def clear(self) -> None:
        """Forget what has been added."""
        self._products, self._sums = [], []


def total_gradients(partials: Sequence[Tensor], products: Sequence[Product], dtype: torch.dtype) -> list[Tensor]:
    """Sums of partial gradients [P_i, n_i], then gradients of weights, flat, all in ``dtype``: [n].

    products: over the same rows. Where ``aside`` has a group, values are there later, with those of other operations:
    nothing but views may be made of them.
    """
    group = aside.group()
    if group is not None:
        return group.add(partials, products, dtype)
    return sum_all([*partials, *_partials_of_one(products)], dtype)


def _partials_of_one(products: Sequence[Product]) -> list[Tensor]:
    """Partial gradients of an operation's products, those with operands of one width together."""
    alike = groupby(products, lambda product: product.a.shape[-1])
    return [partial for _, some in alike for partial in weight_partials(list(some))]


def _operands(product: Product, out: Tensor) -> _Operands | None:
    """The product for the kernel; None where it cannot read it, or is not made for it."""
    matrices = product_matrices([product], 1)
    if matrices is None or product.d.dtype != out.dtype or product.d.dtype == torch.float32:
        return None
    if any(matrix.shape[1] < NARROWEST or matrix.shape[1] % UNIT.value for matrix in matrices):
        return None
    a, d = matrices
    return _Operands(a, d, out) if product.transposed else _Operands(d, a, out)


def _product_partials(products: Sequence[_Operands]) -> Iterator[tuple[Tensor, Tensor]]:
    """Partial gradients, fp32 [ranges, n], and where their sum belongs, of at most MOST_PRODUCTS."""
    total = sum(product.tiles * product.steps for product in products)
    most = max(SHORTEST_RANGE, tuning.ceil_div(total, NUM_PROGRAMS))
    ranges = [tuning.ceil_div(product.steps, most) for product in products]
    steps = [tuning.ceil_div(product.steps, count) for product, count in zip(products, ranges, strict=True)]
    ranges = [tuning.ceil_div(product.steps, count) for product, count in zip(products, steps, strict=True)]
    counts = [product.tiles * count for product, count in zip(products, ranges, strict=True)]
    partials = [
        torch.empty(count, product.out.numel(), dtype=torch.float32, device=product.out.device)
        for product, count in zip(products, ranges, strict=True)
    ]
    places = MOST_PRODUCTS

    def units(values: Iterable[int]) -> tuple[int, ...]:
        return _sealed(_filled([value // UNIT.value for value in values], places))

    _grouped_product_kernel[(sum(counts),)](
        _filled([product.left for product in products], places), _filled([p.right for p in products], places),
        _filled(partials, places), _first_programs(counts, places),
        _sealed(_filled([len(product.left) for product in products], places)), _sealed(_filled(steps, places)),
        units(p.left.stride(0) for p in products), units(p.right.stride(0) for p in products),
        units(p.left.shape[1] for p in products), units(p.right.shape[1] for p in products),
        COUNT=places, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=8, num_stages=3,
    )  # fmt: skip
    return zip(partials, (product.out for product in products), strict=True)


def _sum(sums: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Sum partial gradients into their places, in fixed order; those that the kernel does not take one by one."""
    fitting: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = {}
    for partials, out in sums:
        if _is_summed_by_the_kernel(partials):
            fitting.setdefault(out.dtype, []).append((partials, out))
        elif partials.shape[1]:
            out.copy_(sum_all([partials], out.dtype)[0])
    for same in fitting.values():
        for n in range(0, len(same), MOST_SUMS):
            _launch_sums(same[n : n + MOST_SUMS])


def _is_summed_by_the_kernel(partials: Tensor) -> bool:
    sizes = partials.stride(0), partials.shape[1]
    aligned = partials.data_ptr() % 16 == 0 and not any(size % UNIT.value for size in sizes)
    return partials.dtype == torch.float32 and partials.shape[1] > 0 and aligned


def _launch_sums(sums: Sequence[tuple[Tensor, Tensor]]) -> None:
    partials, outs = zip(*sums, strict=True)
    blocks = [512 if len(p) <= FEW.value else 64 for p in partials]
    counts = [tuning.ceil_div(p.shape[1], block) for p, block in zip(partials, blocks, strict=True)]
    places = MOST_SUMS
    _grouped_sum_kernel[(sum(counts),)](
        _filled(partials, places), _filled(outs, places), _first_programs(counts, places),
        _sealed(_filled([len(p) for p in partials], places)),
        _sealed(_filled([p.stride(0) // UNIT.value for p in partials], places)),
        _sealed(_filled([p.shape[1] // UNIT.value for p in partials], places)), COUNT=places, num_warps=8,
    )  # fmt: skip


def _filled(values: Sequence[T], places: int) -> tuple[T, ...]:
    """So many of them: the first one stands where there is none, and no program comes to it."""
    return (*values, *values[:1] * (places - len(values)))


def _first_programs(counts: Sequence[int], places: int) -> tuple[int, ...]:
    """The first program of each, past the last one where there is none."""
    return _sealed(tuple(sum(counts[:n]) for n in range(places)))
