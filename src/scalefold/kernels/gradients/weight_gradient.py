"""Weight gradients of row-wise linears: tall products over all rows, by the library or by split tiles.

dW[n, c] = sum over rows of d[row, n] * a[row, c] with up to 10^6 rows and small n, c. A single product of such a shape
fills few multiprocessors, so the rows are split: the library takes the ranges as a batch of products, the kernel here
gives each range to a program. Either way the partial products are summed in fixed order afterwards, together with the
other partial sums of the operation (``rows.sum_all``), so results repeat bit for bit. Of the two kernels one fetches
matrices by the copy engine, which leaves its threads little but products; the other also takes operands that are no
matrices in the common order of rows. A third computes the d of a triangle's projections by itself. Before all of them
comes the program in Gluon (``hopper.gradients``), where it is known to win.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from scalefold.kernels import tuning
from scalefold.kernels.hopper import choice
from scalefold.kernels.hopper import gradients as gluon
from scalefold.kernels.instructions import complete, program, sigmoid, to_fp32, wait_for_predecessors
from scalefold.kernels.rows import (
    Affine,
    Extent,
    Strides,
    common_rows,
    dot,
    load_per_row,
    load_tile,
    row_views,
    tile_offsets,
)

NUM_PROGRAMS = 264  # two per multiprocessor of an H200
NUM_COPYING_PROGRAMS = 132  # one, whose ring of tiles fills the shared memory
LARGEST_RING = 216 * 1024  # bytes of shared memory
MOST_COPIED = 4  # wide products in a launch of the copying kernel: a descriptor cannot be an element of a tuple
NARROWEST = 16  # the library is not asked for narrower products
SHORTEST_RANGE = 64  # rows that a product of the library should at least see
_tiles_default = tuning.tile_default({64: (64, 64, 4, 3), 128: (64, 128, 8, 3), 256: (64, 128, 8, 2)})


def _default(fields: tuning.Fields, capability: int) -> tuning.Config:
    """LIBRARY: into how many ranges the library's batch splits the rows; 0: a kernel, with its tiles.

    COPY_ENGINE: the one that copies, where operands allow it.
    """
    if int(fields["n"]) < NARROWEST:
        return {"LIBRARY": 0, **_tiles_default(fields, capability)}
    tiles = tuning.ceil_div(int(fields["n"]), 128) * tuning.ceil_div(int(fields["c"]), 128)
    return {"LIBRARY": tuning.power_of_two(max(1, 128 // tiles))}


tuning.register("weight_gradient", _default)
tuning.register_tiles("triangle_project_weights", {64: (64, 64, 4, 2), 128: (64, 64, 4, 2), 256: (64, 64, 8, 2)})


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


@program
@triton.jit
def _kernel(
    ds, operands, dims, num_rows, partials, rows_per_split,
    COUNT: tl.constexpr, WIDTHS: tl.constexpr, TRANSPOSED: tl.constexpr, FIRST_BLOCKS: tl.constexpr,
    FIRST_COLUMNS: tl.constexpr, TOTAL: tl.constexpr, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """Program (block of columns over all products, range of rows) -> partials[range, TOTAL * C]."""
    wait_for_predecessors()
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


@program
@triton.jit
def _copied_kernel(
    d0, d1, d2, d3, narrow, a0, a1, a2, a3, partials, num_rows, rows_per_split,
    COUNT: tl.constexpr, WIDTH: tl.constexpr, NARROW: tl.constexpr, TRANSPOSED: tl.constexpr, C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The same for COUNT products of one width, and a narrow one, [NARROW, rows], after them; all by descriptors.

    They read zeros past the rows, and past the columns of the narrow one, whose block is as large as the others.
    """
    wait_for_predecessors()
    ds, operands = (d0, d1, d2, d3), (a0, a1, a2, a3)
    block = tl.program_id(0)
    start = tl.program_id(1) * rows_per_split
    end = tl.minimum(start + rows_per_split, num_rows)
    partials += tl.program_id(1).to(tl.int64) * ((COUNT * WIDTH + NARROW) * C)
    c = tl.arange(0, C)
    blocks: tl.constexpr = WIDTH // BLOCK_N
    for i in tl.static_range(COUNT):
        if block // blocks == i:
            first = (block % blocks) * BLOCK_N
            acc = tl.zeros([BLOCK_N, C], tl.float32)
            for row in range(start, end, BLOCK_M):
                acc = dot(tl.trans(ds[i].load([row, first])), operands[i].load([row, 0]), acc)
            n = first + tl.arange(0, BLOCK_N)
            if TRANSPOSED[i]:
                offsets = n[:, None] + c[None, :] * WIDTH
            else:
                offsets = n[:, None] * C + c[None, :]
            tl.store(partials + i * WIDTH * C + offsets, acc)
    if NARROW > 0:  # noqa: SIM102  (known when it is compiled, unlike the block)
        if block == COUNT * blocks:
            acc = tl.zeros([BLOCK_N, C], tl.float32)
            for row in range(start, end, BLOCK_M):
                acc = dot(narrow.load([0, row]), a0.load([row, 0]), acc)
            n = tl.arange(0, BLOCK_N)
            offsets = n[:, None] * C + c[None, :]
            tl.store(partials + COUNT * WIDTH * C + offsets, acc, mask=(n < NARROW)[:, None])


def row_ranges(num_rows: int, tile: int, num_blocks: int, num_programs: int) -> tuple[int, int]:
    """Rows per range, in whole tiles, and their number: ``num_blocks`` blocks of each make ``num_programs`` at most."""
    per_range = tuning.ceil_div(tuning.ceil_div(num_rows, tile), max(1, num_programs // num_blocks)) * tile
    return per_range, tuning.ceil_div(num_rows, per_range)


def _cumulative(sizes: Sequence[int]) -> tuple[int, ...]:
    return tuple(sum(sizes[:n]) for n in range(len(sizes) + 1))


def weight_partials(products: Sequence[Product]) -> list[Tensor]:
    """Partial gradients of several linears over the same rows, all with equal c.

    One tensor [P_i, n * c] per product, for ``rows.sum_all``; P_i depends on shapes and launch parameters only.
    """
    ds, operands = [product.d for product in products], [product.a for product in products]
    if choice.chosen("weight gradients", gluon.products_obstacle(ds, operands)):
        return gluon.product_partials(ds, operands, [product.transposed for product in products])
    done: list[Tensor | None] = [_library_product(product, len(products)) for product in products]
    rest = [product for product, partial in zip(products, done, strict=True) if partial is None]
    own = iter(_copied_products(rest, len(products)) or _tiled_products(rest) if rest else [])
    return [next(own) if partial is None else partial for partial in done]


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


def _copied_products(products: Sequence[Product], num_products: int) -> list[Tensor] | None:
    """The products by the copying kernel; None where it was not chosen, or where their operands do not allow it."""
    wide = [product for product in products if product.width >= NARROWEST]
    config = _chosen(wide[0], num_products) if wide else {}
    if not config.pop("COPY_ENGINE", 0) or not _fit_one_launch(products, len(wide), config):
        return None
    matrices = _matrices(products, len(wide))
    if matrices is None:
        return None
    a, d = matrices[: len(products)], matrices[len(products) :]
    c, widths, tile = a[0].shape[1], [product.width for product in products], [config["BLOCK_M"], config["BLOCK_N"]]
    operands = [TensorDescriptor.from_tensor(m, [tile[0], c]) for m in a[: len(wide)]]
    ds = [TensorDescriptor.from_tensor(m, tile) for m in d[: len(wide)]]
    narrow = [TensorDescriptor.from_tensor(m, tile[::-1]) for m in d[len(wide) :]]
    absent, num_rows = MOST_COPIED - len(wide), a[0].shape[0]
    blocks = len(wide) * (widths[0] // tile[1]) + len(narrow)
    rows_per_split, num_splits = row_ranges(num_rows, tile[0], blocks, NUM_COPYING_PROGRAMS)
    partials = torch.empty(num_splits, sum(widths) * c, dtype=torch.float32, device=a[0].device)
    _copied_kernel[(blocks, num_splits)](
        *ds, *ds[:1] * absent, narrow[0] if narrow else None, *operands, *operands[:1] * absent, partials, num_rows,
        rows_per_split, COUNT=len(wide), WIDTH=widths[0], NARROW=sum(widths[len(wide) :]), C=c,
        TRANSPOSED=tuple(p.transposed for p in wide), **config,
    )  # fmt: skip
    return list(partials.split([width * c for width in widths], 1))


def _fit_one_launch(products: Sequence[Product], num_wide: int, config: tuning.Config) -> bool:
    """Whether these are wide products of one width, in whole blocks, and then at most one narrow one of the same a."""
    wide, narrow, first = products[:num_wide], products[num_wide:], products[0]
    ring = (config["BLOCK_N"] + first.a.shape[-1]) * config["BLOCK_M"] * config["num_stages"] * first.d.element_size()
    return (
        num_wide <= MOST_COPIED
        and len(narrow) <= 1
        and all(p.width == first.width >= NARROWEST for p in wide)
        and all(p.a is first.a and not p.transposed and p.width < NARROWEST for p in narrow)
        and first.width % config["BLOCK_N"] == 0
        and ring <= LARGEST_RING
    )


def _matrices(products: Sequence[Product], num_wide: int) -> list[Tensor] | None:
    """Operands a, then d, as matrices [rows, n], a narrow d as [n, rows]; None if the copy engine cannot read one."""
    tensors = [*(p.a for p in products), *(p.d for p in products)]
    dims, num_rows, strides = common_rows(*tensors)
    if dims != (1, 1):
        return None
    matrices = [_matrix(tensor, num_rows, own) for tensor, own in zip(tensors, strides, strict=True)]
    matrices[len(products) + num_wide :] = [narrow.t() for narrow in matrices[len(products) + num_wide :]]
    readable = all(m.stride(1) == 1 and m.stride(0) % 8 == 0 and m.data_ptr() % 16 == 0 for m in matrices)
    return matrices if readable else None


def _matrix(tensor: Tensor, num_rows: int, strides: Strides) -> Tensor:
    """View of tensor [*, n] as [num_rows, n], where its rows are equally far apart."""
    return tensor.as_strided((num_rows, tensor.shape[-1]), (strides[0], strides[3]))


def _tiled_products(products: Sequence[Product]) -> list[Tensor]:
    """The products by the kernel, in one launch; views of one buffer of fp32 partial gradients."""
    widths, num, c = tuple(p.width for p in products), len(products), products[0].a.shape[-1]
    views, dims, num_rows = row_views({"operands": tuple(p.a for p in products), "ds": tuple(p.d for p in products)})
    config = _tiles(max(products, key=lambda product: product.width), num)
    config["BLOCK_N"] = min(config["BLOCK_N"], max(16, triton.next_power_of_2(max(widths))))
    first_blocks = _cumulative([triton.cdiv(width, config["BLOCK_N"]) for width in widths])
    rows_per_split, num_splits = row_ranges(num_rows, config["BLOCK_M"], first_blocks[-1], NUM_PROGRAMS)
    total = sum(widths)
    partials = torch.empty(num_splits, total * c, dtype=torch.float32, device=products[0].d.device)
    _kernel[(first_blocks[-1], num_splits)](
        **views, dims=dims, num_rows=num_rows, partials=partials, rows_per_split=rows_per_split, COUNT=num,
        WIDTHS=widths, TRANSPOSED=tuple(p.transposed for p in products), FIRST_BLOCKS=first_blocks,
        FIRST_COLUMNS=_cumulative(widths), TOTAL=total, C=c, EVEN=num_rows % config["BLOCK_M"] == 0, **config,
    )  # fmt: skip
    return list(partials.split([width * c for width in widths], 1))


def _chosen(product: Product, num_products: int) -> tuning.Config:
    """Launch parameters of the kernel that was chosen; none where the library was."""
    chosen = tuning.lookup("weight_gradient", **_fields(product, num_products))
    return {} if chosen["LIBRARY"] else {name: value for name, value in chosen.items() if name != "LIBRARY"}


def _tiles(product: Product, num_products: int) -> tuning.Config:
    """Launch parameters of the kernel that takes any operands: the tuned ones where it was chosen, else defaults."""
    chosen = _chosen(product, num_products)
    if not chosen or "COPY_ENGINE" in chosen:
        return _tiles_default(_fields(product, num_products), tuning.capability())
    return chosen


@triton.jit
def _add_projected(
    normed, mask, value, gate, d, partials, extent, start, end, first,
    WIDTH: tl.constexpr, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Rows start..end of output channels from ``first`` on of one operand: gradients of both weights [2 WIDTH, C] to
    ``partials``; returns those of both biases [BLOCK_N].

    Value and gate come as [BLOCK_N, rows], the left operands of the products. None of these is unfinished when the next
    rows begin: the assembler else lets every product of the loop wait for the one before (its warning C7515).
    """
    n, c = first + tl.arange(0, BLOCK_N), tl.arange(0, C)
    offsets = n[:, None] * C + c[None, :]
    value_block, gate_block = tl.load(value.weight + offsets), tl.load(gate.weight + offsets)
    value_bias, gate_bias = tl.load(value.bias + n).to(tl.float32), tl.load(gate.bias + n).to(tl.float32)
    acc_value, acc_gate = tl.zeros([BLOCK_N, C], tl.float32), tl.zeros([BLOCK_N, C], tl.float32)
    sum_value, sum_gate = tl.zeros([BLOCK_N], tl.float32), tl.zeros([BLOCK_N], tl.float32)
    for row in range(start, end, BLOCK_M):
        keep = load_per_row(mask, row + tl.arange(0, BLOCK_M), extent)
        x = normed.load([row, 0])
        logits = dot(gate_block, tl.trans(x), tl.zeros([BLOCK_N, BLOCK_M], tl.float32))
        values = dot(value_block, tl.trans(x), tl.zeros([BLOCK_N, BLOCK_M], tl.float32)) + value_bias[:, None]
        opening = sigmoid(logits + gate_bias[:, None])
        d_value = to_fp32(d.load([first, row])) * keep[None, :] * opening
        d_gate = (d_value * values * (1.0 - opening)).to(x.dtype)
        d_value = d_value.to(x.dtype)
        sum_value += tl.sum(to_fp32(d_value), 1)
        sum_gate += tl.sum(to_fp32(d_gate), 1)
        acc_value = dot(d_value, x, acc_value)
        acc_gate = dot(d_gate, x, acc_gate)
        acc_value, acc_gate = complete(acc_value), complete(acc_gate)
    tl.store(partials + offsets, acc_value)
    tl.store(partials + WIDTH * C + offsets, acc_gate)
    return sum_value, sum_gate


@program
@triton.jit
def _projected_kernel(
    normed, mask, linears, d_a, d_b, partials, extent, num_rows, rows_per_split,
    WIDTH: tl.constexpr, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program (block of channels of both operands, range of rows) -> partials[range]: gradients of the four weights
    [4 WIDTH, C] and biases [4 WIDTH]. The norm [rows, C] and d [WIDTH, rows] are read by descriptors.
    """
    wait_for_predecessors()
    blocks: tl.constexpr = WIDTH // BLOCK_N
    block = tl.program_id(0)
    start = tl.program_id(1) * rows_per_split
    end = tl.minimum(start + rows_per_split, num_rows)
    partials += tl.program_id(1).to(tl.int64) * (4 * WIDTH * (C + 1))
    ds = (d_a, d_b)
    for side in tl.static_range(2):
        if block // blocks == side:
            first = (block % blocks) * BLOCK_N
            own = partials + 2 * side * WIDTH * C
            sum_value, sum_gate = _add_projected(
                normed, mask, linears[2 * side], linears[2 * side + 1], ds[side], own, extent, start, end, first,
                WIDTH, C, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            sums = partials + 4 * WIDTH * C + 2 * side * WIDTH + first + tl.arange(0, BLOCK_N)
            tl.store(sums, sum_value)
            tl.store(sums + WIDTH, sum_gate)


def projected_partials(
    normed: Tensor, mask: Tensor, linears: Sequence[Affine], ds: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Partial gradients of all weights and biases, [ranges, 4 width * c] and [ranges, 4 width], from ``_are_matrices``.

    normed: [1, I, J, c]; mask: [1, I, J]; ds: gradients of both operands, [1, width, I, J].
    """
    width, c = ds[0].shape[1], normed.shape[-1]
    config = tuning.chosen_tiles("triangle_project_weights", normed, width, width)
    views, dims, num_rows = row_views({"normed": normed, "mask": mask[..., None]})
    block_m, block_n = config["BLOCK_M"], config["BLOCK_N"]
    rows = TensorDescriptor.from_tensor(normed.view(num_rows, c), [block_m, c])
    gradients = [TensorDescriptor.from_tensor(d.view(width, num_rows), [block_n, block_m]) for d in ds]
    blocks = 2 * (width // block_n)
    per_range, num_ranges = row_ranges(num_rows, block_m, blocks, NUM_PROGRAMS)
    partials = torch.empty(num_ranges, 4 * width * (c + 1), dtype=torch.float32, device=normed.device)
    extent = Extent(dims, num_rows if num_rows % block_m else None)
    _projected_kernel[(blocks, num_ranges)](
        rows, views["mask"], tuple(linears), *gradients, partials, extent, num_rows, per_range, WIDTH=width, C=c,
        **config,
    )  # fmt: skip
    return partials.split([4 * width * c, 4 * width], 1)
