"""What the row-wise kernels share: tensors of any strides seen as matrices of rows, and layer norm in registers.

A row is one vector of channels; its index runs over the leading dimensions in the memory order of the operation's
main tensor. Every tensor enters a kernel as a pointer and four strides (three levels of rows, one of channels), so
transposed, broadcast and channel-first views cost no copy and no kernel of their own.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from scalefold.kernels import tuning
from scalefold.kernels.instructions import settle, widen
from scalefold.kernels.reference import LAYER_NORM_EPS

EPS = tl.constexpr(LAYER_NORM_EPS)
LINES = tl.constexpr(16)  # of ones, in products that sum columns: the fewest that the tensor cores take

Strides = tuple[int, int, int, int]


@triton.jit
def row_offsets(rows, dims, strides):
    """Element offsets of rows: (level 0, level 1, level 2) indices of the row numbers, times the strides."""
    inner = rows % dims[1]
    rest = rows // dims[1]
    middle = rest % dims[0]
    outer = rest // dims[0]
    return outer.to(tl.int64) * strides[0] + middle.to(tl.int64) * strides[1] + inner.to(tl.int64) * strides[2]


@triton.jit
def load_tile(pointer, rows, columns, dims, strides, count):
    """Tile [rows, columns] in storage type; rows past ``count`` (see ``row_limit``) read as 0."""
    pointers = pointer + row_offsets(rows, dims, strides)[:, None] + columns[None, :] * strides[3]
    if count is None:
        return tl.load(pointers)
    else:  # noqa: RET505  (the compiler looks at what follows an untaken return)
        return tl.load(pointers, mask=(rows < count)[:, None], other=0.0)


@triton.jit
def load_per_row(pointer, rows, dims, strides, count):
    """One fp32 value per row: [rows]; 0 past ``count``."""
    pointers = pointer + row_offsets(rows, dims, strides)
    if count is None:
        return tl.load(pointers).to(tl.float32)
    else:  # noqa: RET505
        return tl.load(pointers, mask=rows < count, other=0.0).to(tl.float32)


@triton.jit
def store_tile(pointer, value, rows, columns, dims, strides, count):
    """Store a tile [rows, columns], rounded to the storage type; rows past ``count`` are left alone."""
    pointers = pointer + row_offsets(rows, dims, strides)[:, None] + columns[None, :] * strides[3]
    value = value.to(pointer.dtype.element_ty)
    if count is None:
        tl.store(pointers, value)
    else:
        tl.store(pointers, value, mask=(rows < count)[:, None])


@triton.jit
def dot(a, b, acc):
    """acc + a b with fp32 accumulation; fp32 operands are not rounded to tf32."""
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def store_column_sums(pointer, tile, columns, keep):
    """Sums over the rows of tile [rows, columns], times ``keep``: [rows] or None, to pointer[columns].

    For 16-bit tiles a product with equal lines of ones. A reduction across lanes and warps instead took a fifth to a
    quarter of the input gradients of projections (76 us with 128 channels, 114 with 256; H100).
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
def normalise(x, C: tl.constexpr):
    """x [rows, C] fp32 -> (x - mean) / std and 1 / std, [rows, C] and [rows]."""
    centred = x - tl.sum(x, 1)[:, None] / C
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / C + EPS)
    return centred * rstd[:, None], rstd


@triton.jit
def load_normed(
    x, norm_weight, norm_bias, rows, dims, strides, count, C: tl.constexpr, IN_REGISTERS: tl.constexpr = False
):  # fmt: skip
    """Layer norm of a tile of x, in its storage type: [rows, C].

    IN_REGISTERS: it stays there as the left operand of products, instead of in shared memory; that pays where little
    else needs registers (projections of the MSA forward: 68 to 58 us; of triangles 47 to 43; transitions 86 to 92).
    """
    columns = tl.arange(0, C)
    tile = load_tile(x, rows, columns, dims, strides, count)
    if IN_REGISTERS:
        hat, _ = normalise(settle(tile), C)
    else:
        hat, _ = normalise(tile.to(tl.float32), C)
    weight = tl.load(norm_weight + columns).to(tl.float32)
    bias = tl.load(norm_bias + columns).to(tl.float32)
    return (hat * weight[None, :] + bias[None, :]).to(tile.dtype)


@triton.jit
def norm_input_gradient(
    d, x, norm_weight, norm_bias, keep, normed, normed_strides, partials, rows, dims, strides, count, C: tl.constexpr
):  # fmt: skip
    """Gradient [rows, C] of a tile of x for the gradient d of its layer norm.

    Stores the tile's sums of the gradients of the norm's weight and bias at partials[0:C] and partials[C:2C], and the
    layer norm itself (times ``keep``: [rows] or None) in ``normed``, where the weight gradients read it.
    """
    columns = tl.arange(0, C)
    tile = load_tile(x, rows, columns, dims, strides, count)
    if C > 128:  # eight warps: the pinned layout would not be that of d
        hat, rstd = normalise(tile.to(tl.float32), C)
    else:
        hat, rstd = normalise(settle(tile), C)
    weight = tl.load(norm_weight + columns).to(tl.float32)
    value = (hat * weight[None, :] + tl.load(norm_bias + columns).to(tl.float32)[None, :]).to(tile.dtype)
    if keep is not None:
        value = (value.to(tl.float32) * keep[:, None]).to(tile.dtype)
    store_tile(normed, value, rows, columns, dims, normed_strides, count)
    store_column_sums(partials, (d * hat).to(tile.dtype), columns, None)
    store_column_sums(partials + C, d.to(tile.dtype), columns, None)
    scaled = d * weight[None, :]
    mean = tl.sum(scaled, 1)[:, None] / C
    along = tl.sum(scaled * hat, 1)[:, None] / C
    return (scaled - mean - hat * along) * rstd[:, None]


@triton.jit
def _sum_block(partials, out, block, num_partials, stride, N: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    columns = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, num_partials, ROWS):
        rows = start + tl.arange(0, ROWS)
        keep = (rows < num_partials)[:, None] & (columns < N)[None, :]
        tile = tl.load(partials + rows[:, None].to(tl.int64) * stride + columns[None, :], mask=keep, other=0.0)
        total += tl.sum(widen(tile), 0)
    tl.store(out + columns, total.to(out.dtype.element_ty), mask=columns < N)


@triton.jit
def _sum_kernel(
    partials, outs, nums, strides, COUNT: tl.constexpr, SIZES: tl.constexpr, FIRST_BLOCKS: tl.constexpr,
    BLOCKS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Program: one block of columns of one of several matrices of partial sums."""
    block = tl.program_id(0)
    for i in tl.static_range(COUNT):
        if (block >= FIRST_BLOCKS[i]) & (block < FIRST_BLOCKS[i + 1]):
            own = block - FIRST_BLOCKS[i]
            _sum_block(partials[i], outs[i], own, nums[i], strides[i], SIZES[i], BLOCKS[i], ROWS[i])


SUM_TILE = 8192  # elements in flight per program; 8 columns (a sector of 32 bytes) where there are many partial sums


def sum_all(partials: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Sums over P_i of partial sums [P_i, n_i] (rows dense), in fp32 and always in the same order, in one launch.

    Returns [n_i] in ``dtype``; a single partial sum of that type is handed on as it is.
    """
    outs = [
        p[0] if p.shape[0] == 1 and p.dtype == dtype else torch.empty(p.shape[1], dtype=dtype, device=p.device)
        for p in partials
    ]
    work = [(p, out) for p, out in zip(partials, outs, strict=True) if p.shape[0] > 1 or p.dtype != dtype]
    if not work:
        return outs
    given, results = zip(*work, strict=True)
    rows = tuple(min(1024, triton.next_power_of_2(p.shape[0])) for p in given)
    blocks = tuple(
        min(max(16, triton.next_power_of_2(p.shape[1])), SUM_TILE // r) for p, r in zip(given, rows, strict=True)
    )
    sizes = tuple(p.shape[1] for p in given)
    counts = [triton.cdiv(n, block) for n, block in zip(sizes, blocks, strict=True)]
    first = tuple(sum(counts[:n]) for n in range(len(counts) + 1))
    _sum_kernel[(first[-1],)](
        given, results, tuple(p.shape[0] for p in given), tuple(p.stride(0) for p in given), COUNT=len(given),
        SIZES=sizes, FIRST_BLOCKS=first, BLOCKS=blocks, ROWS=rows, num_warps=8,
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


def row_limit(count: int, config: tuning.Config) -> int | None:
    """Number of rows for a kernel of tiles; None where tiles of BLOCK_M cover them exactly.

    Then no access is masked: the predicates of one tile cost up to a fifth of a loop's instructions.
    """
    return count if count % config["BLOCK_M"] else None


def memory_order(x: Tensor) -> tuple[int, ...]:
    """Leading dimensions of x: [*, c] from slow to fast in memory."""
    return tuple(sorted(range(x.dim() - 1), key=lambda d: -x.stride(d)))


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


def row_fields(count: int, dtype: torch.dtype, **sizes: int) -> dict[str, int | str]:
    """Fields of a row-wise problem for ``tuning.lookup``; row counts between powers of two share an entry."""
    return {"rows": 1 << (count - 1).bit_length(), "dtype": str(dtype).removeprefix("torch."), **sizes}


def tile_config(values: Sequence[int]) -> tuning.Config:
    """Launch parameters of a kernel of tiles from (rows, columns, warps, stages)."""
    return dict(zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), values, strict=True))


def tile_default(default: dict[int, tuple[int, ...]]) -> Callable[[tuning.Fields, int], tuning.Config]:
    """Default launch parameters by the largest width ``c``, made smaller for fp32 and capabilities below 9.0."""

    def choose(fields: tuning.Fields, capability: int) -> tuning.Config:
        chosen = tile_config(next(values for width, values in sorted(default.items()) if int(fields["c"]) <= width))
        if fields["dtype"] == "float32":  # twice the bytes per element: smaller tiles
            chosen["BLOCK_M"] = min(chosen["BLOCK_M"], 32)
            chosen["BLOCK_N"] = min(chosen["BLOCK_N"], 32)
        if capability < 90:  # 163 KB of shared memory instead of 227, and no operands in registers
            chosen["BLOCK_M"] = min(chosen["BLOCK_M"], 64)
            chosen["BLOCK_N"] = min(chosen["BLOCK_N"], 64)
            chosen["num_stages"] = min(chosen["num_stages"], 2)
        return chosen

    return choose


def register_tiles(name: str, default: dict[int, tuple[int, ...]], *candidates: tuple[int, ...]) -> None:
    """Register a kernel of tiles: tuples are (rows, columns, warps, stages), defaults by the largest width ``c``."""
    choices = [tile_config(values) for values in candidates]
    tuning.register(name, default=tile_default(default), candidates=lambda fields: choices)


def chosen_tiles(name: str, x: Tensor, n: int, limit: int, c: int | None = None) -> tuning.Config:
    """Launch parameters of kernel ``name`` for the rows of x: [*, c] and products of width n.

    ``limit``: most columns that a tile may have; ``c``: where another width than that of x is the larger one.
    """
    config = tuning.lookup(name, **row_fields(x.shape[:-1].numel(), x.dtype, c=c or x.shape[-1], n=n))
    return {**config, "BLOCK_N": min(config["BLOCK_N"], limit)}
