"""Input gradient of projections of a layer norm in Gluon for compute capability 9.0; twin:
``ops.linear._input_gradient_kernel``.

All weights stay in shared memory. A consumer uses its slots per tile of rows in this order: the gradient of each
projection, x, and what came through a residual connection. The last two slots are written in place with the layer norm
and the gradient of x, and go back to the loader when the copy engine has read these, during the next tile.

Sums over rows stay in registers from tile to tile and are added up once, at the end: programs have fixed tiles, so the
order is always the same.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from scalefold.kernels.hopper.parts import (
    EPS,
    ROWS,
    SIDES,
    WARPS,
    fold_rows,
    make_barrier,
    make_ring,
    per_column,
    product_layout,
    publish_barriers,
    row_offsets,
    store_folded,
    stores_left,
    tile_layout,
)

ONES = gl.constexpr(8)  # columns of ones in products that sum rows: the fewest that the tensor cores take


@gluon.jit
def _load_tile(x, ds, through, ring, tile, side, n, COUNT: gl.constexpr, C: gl.constexpr, COLUMNS: gl.constexpr):
    """Loader: everything that consumer ``side`` needs for a tile, from its use n on."""
    for i in gl.static_range(COUNT):
        ring.load(ds[i], tile * ROWS, 0, side, n + i)
    if COLUMNS:
        ring.load_columns(x, tile * ROWS, 0, side, n + COUNT, C)
    else:
        ring.load(x, tile * ROWS, 0, side, n + COUNT)
    if through is None:
        ring.lend(side, n + COUNT + 1)
    else:
        ring.load(through, tile * ROWS, 0, side, n + COUNT + 1)


@gluon.jit
def _load(
    x, ds, through, weight, ring, weights, weights_there, tiles,
    COUNT: gl.constexpr, C: gl.constexpr, COLUMNS: gl.constexpr,
):  # fmt: skip
    mbarrier.expect(weights_there, COUNT * C * C * 2)
    for i in gl.static_range(COUNT):
        tma.async_copy_global_to_shared(weight, [i * C, 0], weights_there, weights.index(i))
    n = 0
    for tile in range(gl.program_id(0) * SIDES, tiles, gl.num_programs(0) * SIDES):
        _load_tile(x, ds, through, ring, tile, 0, n, COUNT, C, COLUMNS)
        if tile + 1 < tiles:
            _load_tile(x, ds, through, ring, tile + 1, 1, n, COUNT, C, COLUMNS)
        n += COUNT + 2


@gluon.jit
def _sum_products(
    ring, weights, ones, bias_sums, n, SIDE: gl.constexpr, COUNT: gl.constexpr, BIASED: gl.constexpr, C: gl.constexpr
):  # fmt: skip
    """Sum over the projections of d W, its two halves of columns, and d^T 1 of the last projection added to
    ``bias_sums`` (if BIASED).

    A slot goes back when the products after its own have been issued and are the only unfinished ones.
    """
    HALF: gl.constexpr = C // 2
    low = gl.zeros([ROWS, HALF], gl.float32, product_layout(HALF))
    high = gl.zeros([ROWS, HALF], gl.float32, product_layout(HALF))
    for i in gl.static_range(COUNT):
        d = ring.wait(SIDE, n + i)
        low = warpgroup_mma(d, weights.index(i).slice(0, HALF, 1), low, use_acc=i > 0, is_async=True)
        high = warpgroup_mma(d, weights.index(i).slice(HALF, HALF, 1), high, use_acc=i > 0, is_async=True)
        if i == 0 and n > 0:  # the copy engine has long read the outputs of the last tile
            stores_left(0)
            mbarrier.arrive(ring.empty.index(ring.place(SIDE, n - 2)), count=1)
            mbarrier.arrive(ring.empty.index(ring.place(SIDE, n - 1)), count=1)
        if i > 0:
            low, high = warpgroup_mma_wait(2, deps=(low, high))
            ring.release(SIDE, n + i - 1)
    if BIASED:
        d = ring.tile(SIDE, n + COUNT - 1)
        bias_sums = warpgroup_mma(d.permute((1, 0)), ones.permute((1, 0)), bias_sums, is_async=True)
        low, high, bias_sums = warpgroup_mma_wait(0, deps=(low, high, bias_sums))
    else:
        low, high = warpgroup_mma_wait(0, deps=(low, high))
    ring.release(SIDE, n + COUNT - 1)
    return low, high, bias_sums


@gluon.jit
def _narrow_gradients(narrow_d, tile, dims, strides, NARROW: gl.constexpr, HALF: gl.constexpr):
    """The channels of the narrow gradient for a tile of rows, by ordinary loads: NARROW x [64]."""
    rows = tile * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, product_layout(HALF)))
    offsets = row_offsets(rows, dims, strides)
    channels = ()
    for h in gl.static_range(NARROW):
        channels = channels + (gl.load(narrow_d + offsets + h * strides[3]),)
    return channels


@gluon.jit
def _half(slot, first, C: gl.constexpr, COLUMNS: gl.constexpr):
    """Columns first .. first + C / 2 of a slot's tile as [64, C / 2]; COLUMNS: it lies there as [C, 64]."""
    if COLUMNS:
        lying = slot._reinterpret(gl.bfloat16, [C, ROWS], tile_layout(C, ROWS))
        return lying.slice(first, C // 2, 0).permute((1, 0))
    else:  # noqa: RET505  (the compiler looks at what follows an untaken return)
        return slot.slice(first, C // 2, 1)


@gluon.jit
def _read(view, HALF: gl.constexpr):
    return view.load(product_layout(HALF)).to(gl.float32)


@gluon.jit
def _statistics(low, high, C: gl.constexpr):
    """Mean and 1 / std of rows whose columns come in two halves: [64] each."""
    mean = (gl.sum(low, 1) + gl.sum(high, 1)) * (1.0 / C)
    low -= mean[:, None]
    high -= mean[:, None]
    return mean, gl.rsqrt((gl.sum(low * low, 1) + gl.sum(high * high, 1)) * (1.0 / C) + EPS)


@gluon.jit
def _weigh(d, hat, norm_weight, weight_sums, d_sums, first, HALF: gl.constexpr):
    """One half of d, the gradient of the layer norm: its sums over rows, d * weight, and sums of that per row."""
    weight_sums += fold_rows(d * hat, HALF)
    d_sums += fold_rows(d, HALF)
    d *= per_column(norm_weight, first, HALF)
    return d, weight_sums, d_sums, gl.sum(d, 1), gl.sum(d * hat, 1)


@gluon.jit
def _finish(
    d, x_view, through_view, normed_view, dx_view, norm_weight, norm_bias, mean, rstd, d_mean, along, first,
    THROUGH: gl.constexpr, HALF: gl.constexpr,
):  # fmt: skip
    """One half of the norm's backward: the layer norm and the gradient of x to their places in shared memory."""
    hat = (_read(x_view, HALF) - mean[:, None]) * rstd[:, None]
    gradient = (d - d_mean[:, None] - hat * along[:, None]) * rstd[:, None]
    if THROUGH:
        gradient += _read(through_view, HALF)
    value = hat * per_column(norm_weight, first, HALF) + per_column(norm_bias, first, HALF)
    gl.thread_barrier()  # all have read what is written over now
    normed_view.store(value.to(gl.bfloat16))
    dx_view.store(gradient.to(gl.bfloat16))


@gluon.jit
def _consume(
    norm_weight, norm_bias, narrow_weight, narrow_d, narrow_strides, dims, dx, normed, through, partials, ring, weights,
    ones, weights_there, tiles,
    SIDE: gl.constexpr, COUNT: gl.constexpr, BIASED: gl.constexpr, NARROW: gl.constexpr, C: gl.constexpr,
    COLUMNS: gl.constexpr,
):  # fmt: skip
    """A consumer. The columns come in two halves, for the sake of registers; the norm is computed twice."""
    HALF: gl.constexpr = C // 2
    mbarrier.wait(weights_there, 0)
    bias_sums = gl.zeros([C, ONES], gl.float32, product_layout(ONES))
    weight_low = fold_rows(gl.zeros([ROWS, HALF], gl.float32, product_layout(HALF)), HALF)
    weight_high = weight_low
    sums_low = weight_low
    sums_high = weight_low
    n = 0
    for tile in range(gl.program_id(0) * SIDES + SIDE, tiles, gl.num_programs(0) * SIDES):
        channels = _narrow_gradients(narrow_d, tile, dims, narrow_strides, NARROW, HALF)  # arrive during the products
        low, high, bias_sums = _sum_products(ring, weights, ones, bias_sums, n, SIDE, COUNT, BIASED, C)
        for h in gl.static_range(NARROW):
            channel = channels[h].to(gl.float32)[:, None]
            low += channel * per_column(narrow_weight, h * C, HALF)
            high += channel * per_column(narrow_weight, h * C + HALF, HALF)
        slot = ring.wait(SIDE, n + COUNT)
        x_low = _read(_half(slot, 0, C, COLUMNS), HALF)
        x_high = _read(_half(slot, HALF, C, COLUMNS), HALF)
        mean, rstd = _statistics(x_low, x_high, C)
        hat = (x_low - mean[:, None]) * rstd[:, None]
        low, weight_low, sums_low, sum_low, along_low = _weigh(low, hat, norm_weight, weight_low, sums_low, 0, HALF)
        hat = (x_high - mean[:, None]) * rstd[:, None]
        high, weight_high, sums_high, sum_high, along_high = _weigh(
            high, hat, norm_weight, weight_high, sums_high, HALF, HALF
        )
        d_mean = (sum_low + sum_high) * (1.0 / C)
        along = (along_low + along_high) * (1.0 / C)
        last = ring.wait(SIDE, n + COUNT + 1)
        normed_slot = last if COLUMNS else slot  # dx lies as x does, channels first too
        dx_slot = slot if COLUMNS else last
        for first in gl.static_range(0, C, HALF):
            _finish(
                low if first == 0 else high, _half(slot, first, C, COLUMNS), _half(last, first, C, False),
                _half(normed_slot, first, C, False), _half(dx_slot, first, C, COLUMNS), norm_weight, norm_bias, mean,
                rstd, d_mean, along, first, through is not None, HALF,
            )  # fmt: skip
        fence_async_shared()
        gl.thread_barrier()
        tma.async_copy_shared_to_global(normed, [tile * ROWS, 0], normed_slot)
        if COLUMNS:
            lying = dx_slot._reinterpret(gl.bfloat16, [C, ROWS], tile_layout(C, ROWS))
            tma.async_copy_shared_to_global(dx, [0, tile * ROWS], lying)
        else:
            tma.async_copy_shared_to_global(dx, [tile * ROWS, 0], dx_slot)
        n += COUNT + 2
    stride = 2 * C + BIASED * C
    own = partials + (gl.program_id(0) * SIDES + SIDE) * WARPS * stride
    store_folded(own, weight_low, stride, HALF)
    store_folded(own + HALF, weight_high, stride, HALF)
    store_folded(own + C, sums_low, stride, HALF)
    store_folded(own + C + HALF, sums_high, stride, HALF)
    if BIASED:
        _store_bias_sums(own + 2 * C, bias_sums, C)
        for warp in gl.static_range(1, WARPS):  # the first row has them all
            _store_bias_sums(own + warp * stride + 2 * C, gl.zeros_like(bias_sums), C)
    tma.store_wait(0)


@gluon.jit
def _store_bias_sums(pointer, sums, C: gl.constexpr):
    """The first of the equal columns of sums [C, ONES], to pointer[0:C]."""
    c = gl.arange(0, C, layout=gl.SliceLayout(1, product_layout(ONES)))
    column = gl.arange(0, ONES, layout=gl.SliceLayout(0, product_layout(ONES)))
    gl.store(pointer + c[:, None] + 0 * column[None, :], sums, mask=(column == 0)[None, :])


@gluon.jit(do_not_specialize=["tiles"])
def gradient_program(
    x, norm_weight, norm_bias, weight, d_0, d_1, d_2, d_3, narrow_weight, narrow_d, narrow_strides, dims, through, dx,
    normed, partials, tiles,
    COUNT: gl.constexpr, BIASED: gl.constexpr, NARROW: gl.constexpr, C: gl.constexpr, COLUMNS: gl.constexpr,
    STAGES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """d_0 and so on, COUNT of them: [64 tiles, C], weight: [COUNT C, C] -> dx: [64 tiles, C], with ``through`` added
    (None: there was none), the layer norm, and partials [SIDES WARPS programs, 2 C + BIASED C].

    COLUMNS: x and dx lie channels first, [C, 64 tiles].
    """
    ring = make_ring(STAGES, C)
    weights = gl.allocate_shared_memory(gl.bfloat16, [COUNT, C, C], tile_layout(C, C))
    ones = weights
    if BIASED:
        ones = gl.allocate_shared_memory(gl.bfloat16, [ONES, ROWS], tile_layout(ONES, ROWS))
        ones.store(gl.full([ONES, ROWS], 1.0, gl.bfloat16, gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0])))
    weights_there = make_barrier()
    publish_barriers()
    ds = (d_0, d_1, d_2, d_3)  # a launch takes no tuple of these
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    norm_weight, norm_bias, narrow_weight, narrow_d, narrow_strides, dims, dx, normed, through,
                    partials, ring, weights, ones, weights_there, tiles, 0, COUNT, BIASED, NARROW, C, COLUMNS,
                ),
            ),
            (
                _consume,
                (
                    norm_weight, norm_bias, narrow_weight, narrow_d, narrow_strides, dims, dx, normed, through,
                    partials, ring, weights, ones, weights_there, tiles, 1, COUNT, BIASED, NARROW, C, COLUMNS,
                ),
            ),
            (
                _load,
                (x, ds, through, weight, ring, weights, weights_there, tiles, COUNT, C, COLUMNS),
            ),
        ],
        [4, 4],
        [REGISTERS, 24],
    )  # fmt: skip
