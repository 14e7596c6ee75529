"""Weight gradients of row-wise linears: tall products over all rows, split over programs, without atomics.

dW[n, c] = sum over rows of d[row, n] * a[row, c] with up to 10^6 rows and small n, c. The rows are split into ranges;
each program keeps one fp32 tile of one range and writes it once; a second kernel adds the ranges in fixed order.
The right operand may be the layer norm of what is stored, computed in registers. All products of an operation share
the two launches.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from scalefold.kernels import tuning
from scalefold.kernels.rows import (
    common_rows,
    dot,
    load_normed,
    load_tile,
    register_tiles,
    row_fields,
    row_offsets,
    sum_partials,
)

NUM_PROGRAMS = 264  # two per multiprocessor of an H200
register_tiles(
    "weight_gradient",
    {64: (64, 64, 4, 3), 128: (64, 128, 8, 3), 256: (64, 128, 8, 2)},
    *((m, n, w, s) for m in (32, 64, 128) for n in (64, 128) for w in (4, 8) for s in (2, 3, 4)),
)


@dataclass(frozen=True)
class Product:
    """One weight gradient: d [*, n] with a [*, c], or with its layer norm (weight, bias), both of any strides.

    ``transposed`` gives [c, n] instead of [n, c].
    """

    d: Tensor
    a: Tensor
    norm: tuple[Tensor, Tensor] | None = None
    transposed: bool = False

    @property
    def width(self) -> int:
        return self.d.shape[-1]


@triton.jit
def _accumulate(
    d, d_strides, a, a_strides, norm_weight, norm_bias, row_mask, mask_strides, dims, block, start, end,
    WIDTH: tl.constexpr, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Products and column sums of one block of columns of d over rows start..end: [BLOCK_N, C], [BLOCK_N]."""
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_N, C], tl.float32)
    sums = tl.zeros([BLOCK_N], tl.float32)
    for first in range(start, end, BLOCK_M):
        rows = first + tl.arange(0, BLOCK_M)
        offsets = row_offsets(rows, dims, d_strides)[:, None] + n[None, :] * d_strides[3]
        tile = tl.load(d + offsets, mask=(rows < end)[:, None] & (n < WIDTH)[None, :], other=0.0)
        if row_mask is not None:
            keep = tl.load(row_mask + row_offsets(rows, dims, mask_strides), mask=rows < end, other=0.0)
            tile = (tile.to(tl.float32) * keep.to(tl.float32)[:, None]).to(tile.dtype)
        if norm_weight is not None:
            right = load_normed(a, norm_weight, norm_bias, rows, dims, a_strides, end, C)
        else:
            right = load_tile(a, rows, tl.arange(0, C), dims, a_strides, end)
        acc = dot(tl.trans(tile), right, acc)
        sums += tl.sum(tile.to(tl.float32), 0)
    return acc, sums


@triton.jit
def _kernel(
    ds, d_strides, operands, a_strides, norm_weights, norm_biases, row_mask, mask_strides, dims, count, partials,
    rows_per_split, COUNT: tl.constexpr, WIDTHS: tl.constexpr, TRANSPOSED: tl.constexpr, FIRST_BLOCKS: tl.constexpr,
    FIRST_COLUMNS: tl.constexpr, TOTAL: tl.constexpr, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program (block of columns over all products, range of rows) -> partials[range, TOTAL * C + TOTAL]."""
    block = tl.program_id(0)
    start = tl.program_id(1) * rows_per_split
    end = tl.minimum(start + rows_per_split, count)
    partials += tl.program_id(1).to(tl.int64) * (TOTAL * C + TOTAL)
    c = tl.arange(0, C)
    for i in tl.static_range(COUNT):
        if (block >= FIRST_BLOCKS[i]) & (block < FIRST_BLOCKS[i + 1]):
            own = block - FIRST_BLOCKS[i]
            acc, sums = _accumulate(
                ds[i], d_strides[i], operands[i], a_strides[i], norm_weights[i], norm_biases[i], row_mask, mask_strides,
                dims, own, start, end, WIDTHS[i], C, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            n = own * BLOCK_N + tl.arange(0, BLOCK_N)
            if TRANSPOSED[i]:
                offsets = n[:, None] + c[None, :] * WIDTHS[i]
            else:
                offsets = n[:, None] * C + c[None, :]
            tl.store(partials + FIRST_COLUMNS[i] * C + offsets, acc, mask=(n < WIDTHS[i])[:, None])
            tl.store(partials + TOTAL * C + FIRST_COLUMNS[i] + n, sums, mask=n < WIDTHS[i])


def _cumulative(sizes: Sequence[int]) -> tuple[int, ...]:
    return tuple(sum(sizes[:n]) for n in range(len(sizes) + 1))


def weight_gradients(
    products: Sequence[Product], dtype: torch.dtype, row_mask: Tensor | None = None
) -> list[tuple[Tensor, Tensor]]:
    """Gradients of weights and biases for several linears over the same rows, all with equal c.

    row_mask: [*] factor of every row of every d, or None -> per product dW ([n, c], or [c, n] if transposed) and
    db [n] in ``dtype``. The sums over rows are in fp32 and repeat bit for bit.
    """
    ds, operands = [p.d for p in products], [p.a for p in products]
    mask = [] if row_mask is None else [row_mask[..., None]]
    dims, count, strides = common_rows(operands[0], *ds, *operands, *mask)
    c, widths = operands[0].shape[-1], tuple(p.width for p in products)
    config = dict(tuning.lookup("weight_gradient", **row_fields(count, ds[0].dtype, c=c, n=sum(widths))))
    config["BLOCK_N"] = min(config["BLOCK_N"], max(16, triton.next_power_of_2(max(widths))))
    first_blocks = _cumulative([triton.cdiv(width, config["BLOCK_N"]) for width in widths])
    tiles = triton.cdiv(count, config["BLOCK_M"])
    rows_per_split = triton.cdiv(tiles, max(1, NUM_PROGRAMS // first_blocks[-1])) * config["BLOCK_M"]
    num_splits, total = triton.cdiv(count, rows_per_split), sum(widths)
    partials = torch.empty(num_splits, total * (c + 1), dtype=torch.float32, device=ds[0].device)
    num = len(products)
    norms = [p.norm or (None, None) for p in products]
    _kernel[(first_blocks[-1], num_splits)](
        tuple(ds), tuple(strides[1 : 1 + num]), tuple(operands), tuple(strides[1 + num : 1 + 2 * num]),
        tuple(n[0] for n in norms), tuple(n[1] for n in norms), row_mask, strides[-1], dims, count, partials,
        rows_per_split, COUNT=num, WIDTHS=widths, TRANSPOSED=tuple(p.transposed for p in products),
        FIRST_BLOCKS=first_blocks, FIRST_COLUMNS=_cumulative(widths), TOTAL=total, C=c, **config,
    )  # fmt: skip
    flat = sum_partials(partials, dtype)
    return _views(flat, products, c, total)


def _views(flat: Tensor, products: Sequence[Product], c: int, total: int) -> list[tuple[Tensor, Tensor]]:
    views, column = [], 0
    for product in products:
        shape = (c, product.width) if product.transposed else (product.width, c)
        weight = flat[column * c : (column + product.width) * c].view(shape)
        views.append((weight, flat[total * c + column : total * c + column + product.width]))
        column += product.width
    return views
