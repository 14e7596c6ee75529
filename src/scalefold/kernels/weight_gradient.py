"""Weight gradients of row-wise linears: tall products over all rows, by the library or by split tiles.

dW[n, c] = sum over rows of d[row, n] * a[row, c] with up to 10^6 rows and small n, c. A single product of such a shape
fills few multiprocessors, so the rows are split: the library takes the ranges as a batch of products, the kernel here
gives each range to a program. Either way the partial products are summed in fixed order afterwards, together with the
other partial sums of the operation (``rows.sum_all``), so results repeat bit for bit. The kernel also takes operands
that are no matrices in the common order of rows, and very narrow ones.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from scalefold.kernels import tuning
from scalefold.kernels.rows import Extent, common_rows, dot, load_tile, row_views, tile_offsets

NUM_PROGRAMS = 264  # two per multiprocessor of an H200
NARROWEST = 16  # the library is not asked for narrower products
SHORTEST_RANGE = 64  # rows that a product of the library should at least see
_tiles_default = tuning.tile_default({64: (64, 64, 4, 3), 128: (64, 128, 8, 3), 256: (64, 128, 8, 2)})


def _default(fields: tuning.Fields, capability: int) -> tuning.Config:
    """LIBRARY: into how many ranges the library's batch splits the rows; 0: the kernel, with its tiles."""
    if int(fields["n"]) < NARROWEST:
        return {"LIBRARY": 0, **_tiles_default(fields, capability)}
    tiles = tuning.ceil_div(int(fields["n"]), 128) * tuning.ceil_div(int(fields["c"]), 128)
    return {"LIBRARY": tuning.power_of_two(max(1, 128 // tiles))}


tuning.register("weight_gradient", _default)


@dataclass(frozen=True)
class Product:
    """One weight gradient: d [*, n] with a [*, c], both of any strides.

    ``transposed`` gives [c, n] instead of [n, c].
    """

    d: Tensor
    a: Tensor
    transposed: bool = False

    @property
    def width(self) -> int:
        return self.d.shape[-1]

    @property
    def shape(self) -> tuple[int, int]:
        """Of the gradient."""
        n, c = self.width, self.a.shape[-1]
        return (c, n) if self.transposed else (n, c)


@triton.jit
def _accumulate(
    d, a, dims, block, start, end, WIDTH: tl.constexpr, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """Product of one block of columns of d with a over rows start..end: [BLOCK_N, C]."""
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_N, C], tl.float32)
    extent = Extent(dims, end)
    if EVEN:
        extent = Extent(dims, None)
    for first in range(start, end, BLOCK_M):
        rows = first + tl.arange(0, BLOCK_M)
        if WIDTH % BLOCK_N == 0:
            tile = load_tile(d, rows, n, extent)
        else:
            inside = (rows < end)[:, None] & (n < WIDTH)[None, :]
            tile = tl.load(d.pointer + tile_offsets(d, rows, n, extent), mask=inside, other=0.0)
        acc = dot(tl.trans(tile), load_tile(a, rows, tl.arange(0, C), extent), acc)
    return acc


@triton.jit
def _kernel(
    ds, operands, dims, num_rows, partials, rows_per_split,
    COUNT: tl.constexpr, WIDTHS: tl.constexpr, TRANSPOSED: tl.constexpr, FIRST_BLOCKS: tl.constexpr,
    FIRST_COLUMNS: tl.constexpr, TOTAL: tl.constexpr, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """Program (block of columns over all products, range of rows) -> partials[range, TOTAL * C]."""
    block = tl.program_id(0)
    start = tl.program_id(1) * rows_per_split
    end = tl.minimum(start + rows_per_split, num_rows)
    partials += tl.program_id(1).to(tl.int64) * (TOTAL * C)
    c = tl.arange(0, C)
    for i in tl.static_range(COUNT):
        if (block >= FIRST_BLOCKS[i]) & (block < FIRST_BLOCKS[i + 1]):
            own = block - FIRST_BLOCKS[i]
            acc = _accumulate(ds[i], operands[i], dims, own, start, end, WIDTHS[i], C, BLOCK_M, BLOCK_N, EVEN)
            n = own * BLOCK_N + tl.arange(0, BLOCK_N)
            if TRANSPOSED[i]:
                offsets = n[:, None] + c[None, :] * WIDTHS[i]
            else:
                offsets = n[:, None] * C + c[None, :]
            tl.store(partials + FIRST_COLUMNS[i] * C + offsets, acc, mask=(n < WIDTHS[i])[:, None])


def _cumulative(sizes: Sequence[int]) -> tuple[int, ...]:
    return tuple(sum(sizes[:n]) for n in range(len(sizes) + 1))


def weight_partials(products: Sequence[Product]) -> list[Tensor]:
    """Partial gradients of several linears over the same rows, all with equal c.

    One tensor [P_i, n * c] per product, for ``rows.sum_all``; P_i depends on shapes and launch parameters only.
    """
    done: list[Tensor | None] = [_library_product(product, len(products)) for product in products]
    rest = [product for product, partial in zip(products, done, strict=True) if partial is None]
    tiled = iter(_tiled_products(rest) if rest else [])
    return [next(tiled) if partial is None else partial for partial in done]


def _fields(product: Product, num_products: int) -> dict[str, int | str]:
    count, c = product.a.shape[:-1].numel(), product.a.shape[-1]
    return tuning.row_fields(count, product.d.dtype, c=c, n=product.width, products=num_products)


def _library_product(product: Product, num_products: int) -> Tensor | None:
    """The product as a batch over ranges of rows: [ranges, n * c]; None where it is left to the kernel."""
    splits = tuning.lookup("weight_gradient", **_fields(product, num_products))["LIBRARY"]
    dims, count, strides = common_rows(product.a, product.d)
    if splits == 0 or dims != (1, 1):
        return None
    while count % splits or (splits > 1 and count < splits * SHORTEST_RANGE):
        splits //= 2
    a, d = (
        tensor.as_strided((splits, count // splits, tensor.shape[-1]), (count // splits * s[0], s[0], s[3]))
        for tensor, s in zip((product.a, product.d), strides, strict=True)
    )
    left, right = (a, d) if product.transposed else (d, a)
    if splits == 1:  # the library may split the rows by itself
        return (left[0].t() @ right[0]).view(1, -1)
    return torch.bmm(left.transpose(1, 2), right).flatten(1)


def _tiled_products(products: Sequence[Product]) -> list[Tensor]:
    """The products by the kernel, in one launch; views of one buffer of fp32 partial gradients."""
    widths, num, c = tuple(p.width for p in products), len(products), products[0].a.shape[-1]
    views, dims, num_rows = row_views({"operands": tuple(p.a for p in products), "ds": tuple(p.d for p in products)})
    config = _tiles(max(products, key=lambda product: product.width), num)
    config["BLOCK_N"] = min(config["BLOCK_N"], max(16, triton.next_power_of_2(max(widths))))
    first_blocks = _cumulative([triton.cdiv(width, config["BLOCK_N"]) for width in widths])
    tiles = triton.cdiv(num_rows, config["BLOCK_M"])
    rows_per_split = triton.cdiv(tiles, max(1, NUM_PROGRAMS // first_blocks[-1])) * config["BLOCK_M"]
    num_splits, total = triton.cdiv(num_rows, rows_per_split), sum(widths)
    partials = torch.empty(num_splits, total * c, dtype=torch.float32, device=products[0].d.device)
    _kernel[(first_blocks[-1], num_splits)](
        **views, dims=dims, num_rows=num_rows, partials=partials, rows_per_split=rows_per_split, COUNT=num,
        WIDTHS=widths, TRANSPOSED=tuple(p.transposed for p in products), FIRST_BLOCKS=first_blocks,
        FIRST_COLUMNS=_cumulative(widths), TOTAL=total, C=c, EVEN=num_rows % config["BLOCK_M"] == 0, **config,
    )  # fmt: skip
    return list(partials.split([width * c for width in widths], 1))


def _tiles(product: Product, num_products: int) -> tuning.Config:
    """Launch parameters of the kernel: the tuned ones where it was chosen, else its defaults."""
    fields = _fields(product, num_products)
    chosen = tuning.lookup("weight_gradient", **fields)
    if chosen["LIBRARY"]:
        return _tiles_default(fields, tuning.capability())
    return {name: value for name, value in chosen.items() if name != "LIBRARY"}
