"""Trial forms in Triton: a gated output's gradient whose scales are read once per tile or line; two input gradients of a
triangle's output in one launch."""

import torch
import triton
import triton.language as tl

from scalefold.kernels import tuning
from scalefold.kernels.instructions import complete, sigmoid, to_fp32
from scalefold.kernels.ops.linear import _add_products
from scalefold.kernels.rows import (
    LINES,
    SECTOR,
    Extent,
    Norm,
    View,
    dot,
    load_tile,
    memory_order,
    norm_input_gradient,
    row_offsets,
    row_views,
    store_column_sums,
    store_tile,
)


@triton.jit
def _tile_rows(extent, BLOCK_M: tl.constexpr, SHARED: tl.constexpr):
    tile, n = tl.program_id(0), tl.arange(0, BLOCK_M)
    rows = tile * BLOCK_M + n
    if SHARED == 2:
        INNER: tl.constexpr = BLOCK_M // SECTOR
        tiles = extent.dims[1] // INNER
        rows = (tile // tiles * SECTOR + n // INNER) * extent.dims[1] + tile % tiles * INNER + n % INNER
    return rows


@triton.jit
def _scaled(d, dropout, rows, c, extent, BLOCK_M: tl.constexpr, C: tl.constexpr, SHARED: tl.constexpr):
    tile = load_tile(d, rows, c, extent)
    if dropout is not None:
        if SHARED == 2:
            INNER: tl.constexpr = BLOCK_M // SECTOR
            tiles = extent.dims[1] // INNER
            t = tl.program_id(0)
            own = t // tiles * SECTOR * extent.dims[1] + t % tiles * INNER + tl.arange(0, INNER)
            scale = tl.load(dropout.pointer + row_offsets(dropout, own, extent)[:, None] + c[None, :])
            lines = tl.reshape(to_fp32(tile), [SECTOR, INNER, C]) * scale[None, :, :]
            tile = tl.reshape(lines, [BLOCK_M, C]).to(tile.dtype)
        elif SHARED == 1:
            own = tl.program_id(0) * BLOCK_M
            scale = tl.load(dropout.pointer + row_offsets(dropout, own, extent) + c)
            tile = (to_fp32(tile) * scale[None, :]).to(tile.dtype)
        else:
            tile = (to_fp32(tile) * load_tile(dropout, rows, c, extent)).to(tile.dtype)
    return tile


@triton.jit
def gated_gradient_kernel(
    d, o, gate, weight, dropout, d_o, d_gate, update_out, gated_out, partials, extent,
    C: tl.constexpr, HD: tl.constexpr, SHARED: tl.constexpr, PRODUCT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = _tile_rows(extent, BLOCK_M, SHARED)
    c = tl.arange(0, C)
    update = _scaled(d, dropout, rows, c, extent, BLOCK_M, C, SHARED)
    if update_out is not None:
        store_tile(update_out, update, rows, c, extent)
    own = partials + tl.program_id(0).to(tl.int64) * C
    if PRODUCT:
        store_column_sums(own, update, c, None)
    else:
        tl.store(own + c, tl.sum(to_fp32(update), 0))
    for first in range(0, HD, BLOCK_N):
        k = first + tl.arange(0, BLOCK_N)
        block = tl.load(weight + c[:, None] * HD + k[None, :])
        d_gated = dot(update, block, tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
        value = load_tile(o, rows, k, extent).to(tl.float32)
        opening = sigmoid(to_fp32(load_tile(gate, rows, k, extent)))
        store_tile(gated_out, value * opening, rows, k, extent)
        d_gated *= opening
        store_tile(d_o, d_gated, rows, k, extent)
        store_tile(d_gate, d_gated * value * (1.0 - opening), rows, k, extent)


def gated_gradient(d, o, gate, dropout, weight, config=None, shared=None, product=False):
    """As ``hopper.gated_output_gradient``."""
    d_o, d_gate, gated = torch.empty_like(o), torch.empty_like(gate), torch.empty_like(o)
    update = None if dropout is None else torch.empty_like(d)
    c, hd = weight.shape
    if config is None:
        config = tuning.chosen_tiles("gated_output_backward", d, min(c, hd), hd, max(c, hd))
    tensors = {"d": d, "o": o, "gate": gate, "dropout": dropout, "d_o": d_o, "d_gate": d_gate}
    views, dims, count = row_views(tensors | {"update_out": update, "gated_out": gated})
    block = config["BLOCK_M"]
    if shared is None:
        shared = 0
        if dropout is not None:
            _, middle, inner, _ = views["dropout"].strides
            if middle == 0 and dims[0] % SECTOR.value == 0 and dims[1] % (block // SECTOR.value) == 0:
                shared = 2
            elif inner == 0 and dims[1] % block == 0:
                shared = 1
    partials = torch.empty(triton.cdiv(count, block), c, dtype=torch.float32, device=d.device)
    gated_gradient_kernel[(triton.cdiv(count, block),)](
        **views, weight=weight.contiguous(), partials=partials, C=c, HD=hd, SHARED=shared, PRODUCT=product,
        extent=Extent(dims, count if count % block else None), **config,
    )  # fmt: skip
    return d_o, d_gate, d if update is None else update, gated, partials


@triton.jit
def _one(
    tile, x, norm, weights, ds, through, dx, normed, partials, extent,
    WIDTH: tl.constexpr, C: tl.constexpr, ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.arange(0, C)
    acc = tl.zeros([BLOCK_M, C], tl.float32)
    own = partials + tile.to(tl.int64) * (2 * C + WIDTH)
    acc = _add_products(
        acc, (ds,), weights, own + 2 * C, None, rows, extent, 0, 1, True, 1, ALIGN, WIDTH, C, BLOCK_N
    )
    gradient, _ = norm_input_gradient(acc, x, norm, None, normed, own, rows, extent, C)
    if through is not None:
        gradient += load_tile(through, rows, c, extent).to(tl.float32)
    store_tile(dx, gradient, rows, c, extent)


@triton.jit
def both_gradients_kernel(
    xs, norms, weights, ds, through, dxs, normeds, partials, extents,
    WIDTH: tl.constexpr, C: tl.constexpr, ALIGN: tl.constexpr, MIXED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    program, half = tl.program_id(0), tl.num_programs(0) // 2
    if MIXED:
        second, tile = program % 2, program // 2
    else:
        second, tile = program // half, program % half
    if second == 0:
        _one(
            tile, xs[0], norms[0], weights[0], ds[0], None, dxs[0], normeds[0], partials[0], extents[0],
            WIDTH, C, ALIGN, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    else:
        _one(
            tile, xs[1], norms[1], weights[1], ds[1], through, dxs[1], normeds[1], partials[1], extents[1],
            WIDTH, C, ALIGN, BLOCK_M, BLOCK_N,
        )  # fmt: skip


def both_gradients(x, z, norm_x, norm_z, weight_x, weight_z, d_x, d_z, d_out, mixed, config):
    """x: [B, I, J, c] seen channels last. Returns what two ``input_gradient`` do."""
    c = z.shape[-1]
    found, extents = [], []
    for main, d, through in ((x, d_x, None), (z, d_z, d_out)):
        dx = torch.empty_like(main)
        normed = main.new_empty(main.shape)
        views, dims, count = row_views({"x": main, "dx": dx, "normed": normed, "through": through, "d": d})
        assert memory_order(main) == (0, 1, 2) and count % config["BLOCK_M"] == 0
        partials = torch.empty(count // config["BLOCK_M"], 3 * c, dtype=torch.float32, device=z.device)
        found.append((views, dx, normed, partials))
        extents.append(Extent(dims, None))
    (a, *ra), (b, *rb) = found
    both_gradients_kernel[(2 * (count // config["BLOCK_M"]),)](
        (a["x"], b["x"]), (Norm(*norm_x), Norm(*norm_z)), (weight_x, weight_z), (a["d"], b["d"]), b["through"],
        (a["dx"], b["dx"]), (a["normed"], b["normed"]), (ra[2], rb[2]), tuple(extents),
        WIDTH=c, C=c, ALIGN=8, MIXED=mixed, **config,
    )  # fmt: skip
    return ra, rb
