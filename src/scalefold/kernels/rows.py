"""What the row-wise kernels share: tensors of any strides seen as matrices of rows, and layer norm in registers.

A row is one vector of channels; its index runs over the leading dimensions in the memory order of the operation's
main tensor. Every tensor enters a program as a ``View``, a pointer and four strides (three levels of rows, one of
channels), so transposed, broadcast and channel-first views cost no copy and no kernel of their own. ``launch`` runs
such a program.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from scalefold.kernels import tuning
from scalefold.kernels.instructions import program, to_fp32, to_product_layout, wait_for_predecessors
from scalefold.kernels.reference import LAYER_NORM_EPS

EPS = tl.constexpr(LAYER_NORM_EPS)
LINES = tl.constexpr(16)  # of ones, in products that sum columns: the fewest that the tensor cores take
SECTOR = tl.constexpr(16)  # 16-bit values that memory takes at once

Strides = tuple[int, int, int, int]
Rows = Tensor | tuple[Tensor, ...] | None  # what a program may get as views


class View(NamedTuple):
    """A tensor as a Triton program sees it: where it begins, and how many elements apart neighbours lie."""

    pointer: Tensor
    strides: tuple[int, ...]


class Norm(NamedTuple):
    """Parameters of a layer norm: [c] each."""

    weight: Tensor
    bias: Tensor


class Affine(NamedTuple):
    """Parameters of a linear layer: [n, c] and [n]; None for what is absent."""

    weight: Tensor | None
    bias: Tensor | None


class Extent(NamedTuple):
    """Rows of a launch: sizes of levels 1 and 2, and how many there are, or None where tiles cover them exactly.

    Then no access is masked: predicates would be a good part of a loop's instructions.
    """

    dims: tuple[int, int]
    limit: int | None


@triton.jit
def tile_rows(extent, BLOCK_M: tl.constexpr, ACROSS: tl.constexpr):
    """Numbers of the rows of this program's tile: neighbours or, across, SECTOR along level 1 per one along level 2."""
    tile, n = tl.program_id(0), tl.arange(0, BLOCK_M)
    rows = tile * BLOCK_M + n
    if ACROSS:
        INNER: tl.constexpr = BLOCK_M // SECTOR
        tiles = extent.dims[1] // INNER
        rows = (tile // tiles * SECTOR + n % SECTOR) * extent.dims[1] + tile % tiles * INNER + n // SECTOR
    return rows


@triton.jit
def row_offsets(view, rows, extent):
    """Element offsets of rows: (level 0, level 1, level 2) indices of the row numbers, times the strides."""
    inner = rows % extent.dims[1]
    rest = rows // extent.dims[1]
    middle = rest % extent.dims[0]
    outer = rest // extent.dims[0]
    strides = view.strides
    return outer.to(tl.int64) * strides[0] + middle.to(tl.int64) * strides[1] + inner.to(tl.int64) * strides[2]


@triton.jit
def tile_offsets(view, rows, columns, extent):
    """Element offsets of a tile [rows, columns], for accesses with a mask of their own."""
    return row_offsets(view, rows, extent)[:, None] + columns[None, :] * view.strides[3]


@triton.jit
def load_tile(view, rows, columns, extent):
    """Tile [rows, columns] in storage type; rows past the limit read as 0."""
    pointers = view.pointer + row_offsets(view, rows, extent)[:, None] + columns[None, :] * view.strides[3]
    if extent.limit is None:
        return tl.load(pointers)
    else:  # noqa: RET505  (the compiler looks at what follows an untaken return)
        return tl.load(pointers, mask=(rows < extent.limit)[:, None], other=0.0)


@triton.jit
def load_per_row(view, rows, extent):
    """One fp32 value per row: [rows]; 0 past the limit."""
    pointers = view.pointer + row_offsets(view, rows, extent)
    if extent.limit is None:
        return tl.load(pointers).to(tl.float32)
    else:  # noqa: RET505
        return tl.load(pointers, mask=rows < extent.limit, other=0.0).to(tl.float32)


@triton.jit
def store_tile(view, value, rows, columns, extent):
    """Store a tile [rows, columns], rounded to the storage type; rows past the limit are left alone."""
    pointers = view.pointer + row_offsets(view, rows, extent)[:, None] + columns[None, :] * view.strides[3]
    value = value.to(view.pointer.dtype.element_ty)
    if extent.limit is None:
        tl.store(pointers, value)
    else:
        tl.store(pointers, value, mask=(rows < extent.limit)[:, None])


@triton.jit
def load_vector(pointer, C: tl.constexpr):
    """A whole vector in fp32: [C]."""
    return tl.load(pointer + tl.arange(0, C)).to(tl.float32)


@triton.jit
def dot(a, b, acc):
    """acc + a b with fp32 accumulation; fp32 operands are not rounded to tf32."""
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def store_column_sums(pointer, tile, columns, keep):
    """Sums over the rows of tile [rows, columns], times ``keep``: [rows] or None, to pointer[columns].

    For 16-bit tiles a product with equal lines of ones: a reduction across lanes and warps would cost more than the
    product that the tile is loaded for.
    """
    if tile.dtype == tl.float32:
        if keep is not None:
            tile *= keep[:, None]
        tl.store(pointer + columns, tl.sum(tile, 0))
    else:
        line = tl.arange(0, LINES)
        if keep is None:
            ones = tl.full([LINES, tile.shape[0]], 1.0, tl.float32).to(tile.dtype)
        else:
            ones = tl.broadcast_to(keep.to(tile.dtype)[None, :], [LINES, tile.shape[0]])
        sums = tl.dot(ones, tile)
        tl.store(pointer + columns[None, :] + 0 * line[:, None], sums, mask=(line == 0)[:, None])


@triton.jit
def normalise(x, C: tl.constexpr, keep=None):
    """x [rows, *] fp32 -> (x - mean) / std over its C channels, and 1 / std: [rows, *] and [rows].

    ``keep``: which elements are channels, where the tile is wider than C; the others must be 0.
    """
    centred = x - tl.sum(x, 1)[:, None] / C
    if keep is not None:
        centred = tl.where(keep, centred, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / C + EPS)
    return centred * rstd[:, None], rstd


@triton.jit
def scale_and_shift(hat, weight, bias, dtype: tl.constexpr):
    """Normalised rows [rows, C] times weight [C] plus bias [C], in ``dtype``."""
    return (hat * weight[None, :] + bias[None, :]).to(dtype)


@triton.jit
def normalise_gradient(d, hat, rstd, C: tl.constexpr):
    """Gradient of the x of ``normalise`` for the gradient d [rows, *] of its first result."""
    along = tl.sum(d * hat, 1)[:, None] / C
    mean = tl.sum(d, 1)[:, None] / C
    return (d - mean - hat * along) * rstd[:, None]


@triton.jit
def load_normed(x, norm, rows, extent, C: tl.constexpr, IN_REGISTERS: tl.constexpr = False):
    """Layer norm of a tile of x, in its storage type: [rows, C].

    IN_REGISTERS: it stays there as the left operand of products, instead of in shared memory; that pays where little
    else needs registers, as in projections, and loses where a second product follows, as in transitions.
    """
    tile = load_tile(x, rows, tl.arange(0, C), extent)
    if IN_REGISTERS:
        hat, _ = normalise(to_product_layout(tile), C)
    else:
        hat, _ = normalise(tile.to(tl.float32), C)
    return scale_and_shift(hat, load_vector(norm.weight, C), load_vector(norm.bias, C), tile.dtype)


@triton.jit
def norm_input_gradient(d, x, norm, keep, normed, partials, rows, extent, C: tl.constexpr):
    """Gradient [rows, C] of a tile of x for the gradient d of its layer norm; the layer norm, times ``keep`` ([rows] or
    None).

    Stores the tile's sums of the gradients of the norm's weight and bias at partials[0:C] and partials[C:2C], and the
    layer norm in ``normed``, where the weight gradients read it, unless that is None.
    """
    columns = tl.arange(0, C)
    tile = load_tile(x, rows, columns, extent)
    if C > 128:  # eight warps: the pinned layout would not be that of d
        hat, rstd = normalise(tile.to(tl.float32), C)
    else:
        hat, rstd = normalise(to_product_layout(tile), C)
    weight = load_vector(norm.weight, C)
    value = scale_and_shift(hat, weight, load_vector(norm.bias, C), tile.dtype)
    if keep is not None:
        value = (value.to(tl.float32) * keep[:, None]).to(tile.dtype)
    if normed is not None:
        store_tile(normed, value, rows, columns, extent)
    store_column_sums(partials, (d * hat).to(tile.dtype), columns, None)
    store_column_sums(partials + C, d.to(tile.dtype), columns, None)
    return normalise_gradient(d * weight[None, :], hat, rstd, C), value


@triton.jit
def _sum_block(
    partials, out, block, num_partials, stride, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    columns = block.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, num_partials, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        keep = (rows < num_partials)[:, None] & (columns < N)[None, :]
        tile = tl.load(partials + rows[:, None].to(tl.int64) * stride + columns[None, :], mask=keep, other=0.0)
        total += tl.sum(to_fp32(tile), 0)
    tl.store(out + columns, total.to(out.dtype.element_ty), mask=columns < N)


@program
@triton.jit
def _sum_kernel(
    partials, outs, nums, strides, COUNT: tl.constexpr, SIZES: tl.constexpr, FIRST_BLOCKS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program: one block of columns of one of several matrices of partial sums, each with tiles of its own."""
    wait_for_predecessors()
    block = tl.program_id(0)
    for i in tl.static_range(COUNT):
        if (block >= FIRST_BLOCKS[i]) & (block < FIRST_BLOCKS[i + 1]):
            own = block - FIRST_BLOCKS[i]
            _sum_block(partials[i], outs[i], own, nums[i], strides[i], SIZES[i], BLOCK_M[i], BLOCK_N[i])


SUM_TILE = 8192  # elements in flight per program; 8 columns (a sector of 32 bytes) where there are many partial sums


def sum_all(partials: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Sums over P_i of partial sums [P_i, n_i] (rows dense), in fp32 and always in the same order, in one launch.

    Returns [n_i] in ``dtype``; a single partial sum of that type is handed on as it is.
    """
    outs = [
        p[0] if p.shape[0] == 1 and p.dtype == dtype else torch.empty(p.shape[1], dtype=dtype, device=p.device)
        for p in partials
    ]
    work = [x for x in zip(partials, outs, strict=True) if x[0].shape[1] and (len(x[0]) > 1 or x[0].dtype != dtype)]
    if not work:
        return outs
    given, results = zip(*work, strict=True)
    rows = tuple(min(1024, triton.next_power_of_2(p.shape[0])) for p in given)
    widths = (max(16, triton.next_power_of_2(p.shape[1])) for p in given)
    blocks = tuple(min(width, SUM_TILE // r) for width, r in zip(widths, rows, strict=True))
    sizes = tuple(p.shape[1] for p in given)
    counts = [triton.cdiv(n, block) for n, block in zip(sizes, blocks, strict=True)]
    first = tuple(sum(counts[:n]) for n in range(len(counts) + 1))
    _sum_kernel[(first[-1],)](
        given, results, tuple(p.shape[0] for p in given), tuple(p.stride(0) for p in given), COUNT=len(given),
        SIZES=sizes, FIRST_BLOCKS=first, BLOCK_M=rows, BLOCK_N=blocks, num_warps=8,
    )  # fmt: skip
    return outs


def sum_partials(partials: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum fp32 partial sums [P, n] over P, always in the same order -> [n] in ``dtype``."""
    return sum_all([partials], dtype)[0]


def common_rows(*views: Tensor) -> tuple[tuple[int, int], int, list[Strides]]:
    """Rows of tensors with equal (or 1-sized) leading dimensions, in the memory order of the first.

    views: [*, c_i] -> sizes of levels 1 and 2, number of rows, four strides per tensor (in elements).
    Neighbouring dimensions merge where all tensors allow it. Raises ValueError if more than three levels remain.
    """
    shape = views[0].shape[:-1]
    strides = [v.expand(*shape, v.shape[-1]).stride() for v in views]
    order = sorted((d for d, size in enumerate(shape) if size != 1), key=lambda d: -strides[0][d])
    levels: list[tuple[int, list[int]]] = []
    for d in order:
        own = [s[d] for s in strides]
        if levels and all(outer == inner * shape[d] for outer, inner in zip(levels[-1][1], own, strict=True)):
            levels[-1] = (levels[-1][0] * shape[d], own)
        else:
            levels.append((shape[d], own))
    if len(levels) > 3:
        raise ValueError(f"rows of shape {tuple(shape)} and strides {strides} need {len(levels)} levels, at most 3")
    if len(levels) == 1:  # a single level sits outermost, so that no index arithmetic is left
        levels = [*levels, (1, [0] * len(views)), (1, [0] * len(views))]
    levels = [(1, [0] * len(views))] * (3 - len(levels)) + levels
    result = [tuple(level[1][n] for level in levels) + (strides[n][-1],) for n in range(len(views))]
    return (levels[1][0], levels[2][0]), shape.numel(), result  # type: ignore[return-value]


def row_views(tensors: Mapping[str, Rows]) -> tuple[dict[str, Any], tuple[int, int], int]:
    """Tensors [*, c_i] over their common rows, by name, sizes of levels 1 and 2, number of rows; see ``common_rows``.

    A tuple of tensors gives a tuple of views, None stays None.
    """
    groups = {name: value if isinstance(value, tuple) else (value,) for name, value in tensors.items()}
    present = [tensor for group in groups.values() for tensor in group if tensor is not None]
    dims, num_rows, strides = common_rows(*present)
    views = map(View, present, strides)
    found = {name: tuple(None if t is None else next(views) for t in group) for name, group in groups.items()}
    return {n: v if isinstance(tensors[n], tuple) else v[0] for n, v in found.items()}, dims, num_rows


def launch(
    program: Any, config: tuning.Config, tensors: Mapping[str, Rows], masked: bool = False, **arguments: Any
) -> None:
    """Run ``program`` for every tile of BLOCK_M rows of tensors [*, c_i] with equal (or 1-sized) leading dimensions.

    It gets each of them under its name as a ``View``, rows numbered in the memory order of the first one, ``extent``,
    launch parameters (of which PARTS, if there, is a second dimension of the grid) and all other ``arguments``.
    ``masked``: the extent has a limit even where tiles cover the rows, for programs that mask every access anyway.
    """
    views, dims, num_rows = row_views(tensors)
    extent = Extent(dims, num_rows if masked or num_rows % config["BLOCK_M"] else None)
    tiles = triton.cdiv(num_rows, config["BLOCK_M"])
    grid = (tiles, config["PARTS"]) if "PARTS" in config else (tiles,)
    program[grid](**views, **arguments, extent=extent, **config)


def launch_with_sums(
    program: Any, config: tuning.Config, tensors: Mapping[str, Rows], num_sums: int, **arguments: Any
) -> Tensor:
    """``launch`` of a program that stores sums over each tile of rows: fp32 [tiles, num_sums], for ``sum_all``."""
    first = next(iter(tensors.values()))
    assert isinstance(first, Tensor)
    tiles = triton.cdiv(first.shape[:-1].numel(), config["BLOCK_M"])
    partials = torch.empty(tiles, num_sums, dtype=torch.float32, device=first.device)
    launch(program, config, tensors, partials=partials, **arguments)
    return partials


def memory_order(x: Tensor) -> tuple[int, ...]:
    """Leading dimensions of x: [*, c] from slow to fast in memory."""
    return tuple(sorted(range(x.dim() - 1), key=lambda d: -x.stride(d)))


def lies_across(x: Tensor, out: Tensor, block_m: int) -> bool:
    """Whether tiles of block_m rows of x: [*, c] lie across (``tile_rows``) to fill whole sectors of out: [*, h], which
    lies along its last but one dimension, as x does not.
    """
    order, last = memory_order(x), x.dim() - 2
    if last < 1 or order[-2] != last or out.stride(last) != 1 or x.shape[last] % SECTOR.value:
        return False
    return block_m % SECTOR.value == 0 and x.shape[order[-1]] % (block_m // SECTOR.value) == 0


def width_obstacle(*widths: int, most: int = 256) -> str | None:
    """Why kernels of tiles do not take these channel counts, or None: the matrix units want powers of two from 16."""
    unfit = [width for width in widths if not 16 <= width <= most or width & (width - 1)]
    return f"width {unfit[0]} is no power of two from 16 to {most}" if unfit else None


def layout_obstacle(*tensors: Tensor) -> str | None:
    """Why kernels of rows do not take tensors [*, c], or None: ``common_rows`` knows three levels of rows."""
    if any(tensor.dim() > 4 for tensor in tensors):
        return "more than three dimensions of rows"
    return "channels are not contiguous" if any(tensor.stride(-1) != 1 for tensor in tensors) else None


def fused_view(weights: Sequence[Tensor]) -> Tensor:
    """Weights [c_i, c] as one [sum c_i, c]: a view if they are neighbours in one storage, else a concatenation."""
    first = weights[0]
    if len(weights) == 1:
        return first.contiguous()
    end, storage = first.data_ptr(), first.untyped_storage().data_ptr()
    for weight in weights:
        neighbour = weight.is_contiguous() and weight.data_ptr() == end
        if not neighbour or weight.untyped_storage().data_ptr() != storage or first.is_meta:
            return torch.cat(list(weights))
        end += weight.numel() * weight.element_size()
    num_rows = sum(weight.shape[0] for weight in weights)
    return first.as_strided((num_rows, first.shape[1]), (first.shape[1], 1))


def weight_blocks(weight: Tensor, block: Sequence[int]) -> TensorDescriptor:
    """A dense weight for the copy engine, which fetches blocks of it without addresses in registers.

    It is copied first if it does not begin at a multiple of 16 bytes (parameters in flat buffers do).
    """
    return TensorDescriptor.from_tensor(weight if weight.data_ptr() % 16 == 0 else weight.clone(), list(block))
