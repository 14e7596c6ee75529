"""Input gradient of projections of a layer norm for Hopper in Gluon; twin: ``ops.linear._input_gradient_kernel``.

Roles. A program stays on its multiprocessor and keeps all weights in shared memory. Two groups of four warps compute,
each every second of the program's tiles of ROWS rows, so that one multiplies while the other is busy with its norm;
a third group of four warps fetches (the loader).

Slots in shared memory come in DEPTH sets; tile number i of the program takes set i % DEPTH. A set has a slot for x, one
per projection for its gradient, and one for what came through a residual connection, if anything did. The layer norm
is written over x as soon as there is one, and leaves while products run; the gradient of x is written over the last
slot of the set. Barriers ``full`` and ``empty`` of a slot are used as ``pieces`` says, but that a slot has two of
``full``, for its even and its odd uses: both groups may wait for a slot, and a group that waits for the parity of a use
must have seen the use before.

Sums over rows stay in registers from tile to tile and are added up once, at the end: programs have fixed tiles, so the
order is always the same.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false
# The type checker takes Gluon's programs for Python.

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from scalefold.kernels import hopper
from scalefold.kernels.hopper.pieces import CONSUMERS, group_barrier
from scalefold.kernels.reference import LAYER_NORM_EPS

ROWS = gl.constexpr(hopper.PART)  # of a tile: what one warpgroup multiplies at once
WARPS = gl.constexpr(4)  # of a group
ONES = gl.constexpr(8)  # columns of ones in products that sum rows: the fewest that the tensor cores take
EPS = gl.constexpr(LAYER_NORM_EPS)
_TO_FP32 = gl.constexpr("xor.b32 $1, $2, $3; shl.b32 $0, $1, 16; and.b32 $1, $1, 0xffff0000;")


class Slots(NamedTuple):
    """Tiles [sets * uses, ROWS, C] and their barriers; ``full``: [2 * sets * uses]."""

    tiles: Any
    full: Any
    empty: Any


@gluon.constexpr_function
def product_layout(columns):
    """Registers of a warpgroup's product [ROWS m, columns]."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16])


@gluon.constexpr_function
def tile_layout(lines, columns):
    """Shared memory of a 16-bit tile [lines, columns], as the copy engine and the tensor cores take it."""
    return gl.NVMMASharedLayout.get_default_for([lines, columns], gl.bfloat16)


@gluon.jit
def _one_arrival(COUNT: gl.constexpr):
    """Barriers that one arrival completes."""
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for n in gl.static_range(COUNT):
        mbarrier.init(barriers.index(n), count=1)
    return barriers


@gluon.jit
def _by_channels(tile, C: gl.constexpr):
    """The same memory for a tile that lies channels first: [C, ROWS]."""
    return tile._reinterpret(gl.bfloat16, [C, ROWS], tile_layout(C, ROWS))


@gluon.jit
def _fetch(slots, descriptor, row, i, USE: gl.constexpr, USES: gl.constexpr, COLUMNS: gl.constexpr):
    """Loader: bring the tile at ``row`` for the program's i-th tile, once the slot is free."""
    DEPTH: gl.constexpr = slots.tiles.shape[0] // USES
    C: gl.constexpr = slots.tiles.shape[2]
    slot = i % DEPTH * USES + USE
    full = slots.full.index(i % (2 * DEPTH) * USES + USE)
    mbarrier.wait(slots.empty.index(slot), ((i // DEPTH) & 1) ^ 1)
    mbarrier.expect(full, ROWS * C * 2)
    if COLUMNS:
        own = _by_channels(slots.tiles.index(slot), C)
        tma.async_copy_global_to_shared(descriptor, [0, row], full, own)
    else:
        tma.async_copy_global_to_shared(descriptor, [row, 0], full, slots.tiles.index(slot))


@gluon.jit
def _load(
    x, ds, through, weight, slots, weights, weights_there, count,
    COUNT: gl.constexpr, USES: gl.constexpr, COLUMNS: gl.constexpr,
):  # fmt: skip
    """The loader: x comes one tile ahead, because a consumer begins with it."""
    C: gl.constexpr = weights.shape[1]
    first = gl.program_id(0)
    _fetch(slots, x, first * ROWS, 0, 0, USES, COLUMNS)
    mbarrier.expect(weights_there, COUNT * C * C * 2)
    for j in gl.static_range(COUNT):
        tma.async_copy_global_to_shared(weight, [j * C, 0], weights_there, weights.index(j))
    for i in range(count):
        row = (first + i * gl.num_programs(0)) * ROWS
        for j in gl.static_range(COUNT):
            _fetch(slots, ds[j], row, i, 1 + j, USES, False)
        if i + 1 < count:
            _fetch(slots, x, row + gl.num_programs(0) * ROWS, i + 1, 0, USES, COLUMNS)
        if through is not None:
            _fetch(slots, through, row, i, 1 + COUNT, USES, False)


@gluon.jit
def _receive(slots, first, i, USE: gl.constexpr, USES: gl.constexpr):
    """Consumer: a tile of the i-th set, whose slots begin with ``first``, once it is there."""
    TURNS: gl.constexpr = 2 * (slots.tiles.shape[0] // USES)
    mbarrier.wait(slots.full.index(i % TURNS * USES + USE), (i // TURNS) & 1)
    return slots.tiles.index(first + USE)


@gluon.jit
def _leave(slots, slot):
    """Consumer: the loader may fill the slot again; all warps are done with it (the barrier)."""
    group_barrier()
    mbarrier.arrive(slots.empty.index(slot), count=1)


@gluon.jit
def _send(descriptor, row, tile, C: gl.constexpr, COLUMNS: gl.constexpr):
    """Consumer: store a tile that all its threads have just written to shared memory."""
    fence_async_shared()
    group_barrier()
    if COLUMNS:
        tma.async_copy_shared_to_global(descriptor, [0, row], _by_channels(tile, C))
    else:
        tma.async_copy_shared_to_global(descriptor, [row, 0], tile)


@gluon.jit
def _here(offset):
    """offset, of which the compiler must think that it differs from tile to tile: what is loaded there would else stay
    in registers that products need.
    """
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [offset], gl.int32, False, 1)


@gluon.jit
def _again(x, key):
    """x, bf16, in fp32. ``key`` is 0, which the compiler cannot know: it would else keep what the last conversion gave,
    in twice as many registers, from one use of x to the next.
    """
    keys = gl.zeros_like(x, dtype=gl.int32) + key
    return gl.inline_asm_elementwise(_TO_FP32, "=&r,=&r,r,r,r", [x, keys], gl.float32, True, 2)


@gluon.jit
def _per_column(pointer, first, C: gl.constexpr):
    """C values from pointer[first] on in fp32, one per column of a product: [1, C]."""
    columns = gl.arange(0, C, layout=gl.SliceLayout(0, product_layout(C)))
    return gl.load(pointer + first + columns).to(gl.float32)[None, :]


@gluon.jit
def _narrow_gradients(view, tile, dims, NARROW: gl.constexpr, C: gl.constexpr):
    """The channels of the narrow gradient for a tile of rows, by ordinary loads: NARROW x [ROWS]."""
    channels = ()
    if NARROW > 0:
        rows = tile * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, product_layout(C)))
        outer = (rows // dims[1] // dims[0]).to(gl.int64) * view.strides[0]
        middle = (rows // dims[1] % dims[0]).to(gl.int64) * view.strides[1]
        offsets = outer + middle + (rows % dims[1]).to(gl.int64) * view.strides[2]
        for h in gl.static_range(NARROW):
            channels = channels + (gl.load(view.pointer + offsets + h * view.strides[3]),)
    return channels


@gluon.jit
def _halves(value, C: gl.constexpr):
    """Left and right half of the columns of a product [ROWS, C]: no value leaves its thread.

    Arithmetic half by half keeps the compiler from holding intermediate results of a whole tile in registers.
    """
    low, high = gl.split(gl.permute(gl.reshape(value, [ROWS, 2, C // 2]), [0, 2, 1]))
    LAYOUT: gl.constexpr = product_layout(C // 2)
    return gl.convert_layout(low, LAYOUT, assert_trivial=True), gl.convert_layout(high, LAYOUT, assert_trivial=True)


@gluon.jit
def _half(tile, h: gl.constexpr, C: gl.constexpr, COLUMNS: gl.constexpr):
    """Columns h C / 2 and following of a slot's tile as [ROWS, C / 2]; COLUMNS: it lies there channels first."""
    HALF: gl.constexpr = C // 2
    if COLUMNS:
        return _by_channels(tile, C).slice(h * HALF, HALF, 0).permute((1, 0))
    else:  # noqa: RET505  (the compiler looks at what follows an untaken return)
        return tile.slice(h * HALF, HALF, 1)


@gluon.jit
def _statistics(low, high, C: gl.constexpr):
    """Mean and 1 / std of rows whose columns come in two halves."""
    low, high = low.to(gl.float32), high.to(gl.float32)
    mean = (gl.sum(low, 1) + gl.sum(high, 1)) * (1.0 / C)
    low -= mean[:, None]
    high -= mean[:, None]
    return mean, gl.rsqrt((gl.sum(low * low, 1) + gl.sum(high * high, 1)) * (1.0 / C) + EPS)


@gluon.jit
def _weigh(d, hat, weight, sums):
    """One half of d, the gradient of the layer norm, times the weight, and sums of that per row; ``sums`` over rows."""
    HALF: gl.constexpr = d.shape[1]
    product = d * hat
    sums = sums[0] + _fold(product, HALF), sums[1] + _fold(d, HALF)
    d *= weight
    return d, sums, gl.sum(d, 1), gl.sum(product * weight, 1)


@gluon.jit
def _fold(value, C: gl.constexpr):
    """[ROWS, C] -> sums of the two rows that one thread holds: no value leaves its thread."""
    return gl.sum(gl.reshape(value, [WARPS, 2, 8, C]), 1)


@gluon.jit
def _sum_products(
    slots, weights, ones, acc, bias_sums, first, zero, i,
    COUNT: gl.constexpr, USES: gl.constexpr, BIASED: gl.constexpr, LAST: gl.constexpr, ADD: gl.constexpr,
):  # fmt: skip
    """Sum over the projections of d W, and of acc if ADD; d^T 1 of the last one added to ``bias_sums`` (if BIASED).

    Each slot is left once its product is complete, but for the last one if LAST; that of x once its tile, the layer
    norm by now, has been sent; and that of the last gradient of x, if that is late enough for the loader.
    """
    DEPTH: gl.constexpr = slots.tiles.shape[0] // USES
    for j in gl.static_range(COUNT):
        d = _receive(slots, first, i, 1 + j, USES)
        acc = warpgroup_mma(d, weights.index(zero + j), acc, use_acc=ADD or j > 0, is_async=True)
        if j > 0:
            acc = warpgroup_mma_wait(1, deps=[acc])
            _leave(slots, first + j)
    if BIASED:
        d = slots.tiles.index(first + COUNT)
        bias_sums = warpgroup_mma(d.permute((1, 0)), ones.permute((1, 0)), bias_sums, is_async=True)
    tma.store_wait(0)
    _leave(slots, first)
    if DEPTH > CONSUMERS:
        before = (i + DEPTH - CONSUMERS) % DEPTH * USES + USES - 1
        mbarrier.arrive(slots.empty.index(before), count=1, pred=i >= CONSUMERS)
    if BIASED:
        acc, bias_sums = warpgroup_mma_wait(0, deps=[acc, bias_sums])
    else:
        acc = warpgroup_mma_wait(0, deps=[acc])
    if LAST:
        group_barrier()  # products of other warps read it too
    else:
        _leave(slots, first + COUNT)
    return acc, bias_sums


@gluon.jit
def _differentiate(
    shared, SIDE: gl.constexpr, COUNT: gl.constexpr, USES: gl.constexpr, BIASED: gl.constexpr, NARROW: gl.constexpr,
    COLUMNS: gl.constexpr,
):  # fmt: skip
    """A consumer."""
    norm, narrow, narrow_d, dims, dx, normed, partials, slots, weights, ones, weights_there, count = shared
    C: gl.constexpr = weights.shape[1]
    HALF: gl.constexpr = C // 2
    LAYOUT: gl.constexpr = product_layout(HALF)
    DEPTH: gl.constexpr = slots.tiles.shape[0] // USES
    THROUGH: gl.constexpr = USES > 1 + COUNT
    bias_sums = gl.zeros([C, ONES], gl.float32, product_layout(ONES))
    nothing = _fold(gl.zeros([ROWS, HALF], gl.float32, LAYOUT), HALF)
    sums_low = (nothing, nothing)
    sums_high = (nothing, nothing)
    for i in range(SIDE, count, CONSUMERS):
        tile = gl.program_id(0) + i * gl.num_programs(0)
        zero = _here(gl.to_tensor(0)) * C
        first = i % DEPTH * USES + zero
        channels = _narrow_gradients(narrow_d, tile, dims, NARROW, C)  # arrive while the norm is computed
        own = _receive(slots, first, i, 0, USES)
        x = _half(own, 0, C, COLUMNS).load(LAYOUT), _half(own, 1, C, COLUMNS).load(LAYOUT)
        mean, rstd = _statistics(x[0], x[1], C)
        scale = rstd[:, None]
        shift = -mean[:, None] * scale
        if COLUMNS:
            group_barrier()  # rows of other warps lie elsewhere in a tile that is written over
        for h in gl.static_range(2):
            value = (x[h].to(gl.float32) * scale + shift) * _per_column(norm.weight, zero + h * HALF, HALF)
            value += _per_column(norm.bias, zero + h * HALF, HALF)
            _half(own, h, C, False).store(value.to(gl.bfloat16))
        _send(normed, tile * ROWS, own, C, False)
        acc = gl.zeros([ROWS, C], gl.float32, product_layout(C))
        for n in gl.static_range(NARROW):
            acc += channels[n].to(gl.float32)[:, None] * _per_column(narrow, zero + n * C, C)
        mbarrier.wait(weights_there, 0)
        acc, bias_sums = _sum_products(
            slots, weights, ones, acc, bias_sums, first, zero, i, COUNT, USES, BIASED, not THROUGH, NARROW > 0
        )
        low, high = _halves(acc, C)
        hat = _again(x[0], count >> 31) * scale + shift
        low, sums_low, d_low, along_low = _weigh(low, hat, _per_column(norm.weight, zero, HALF), sums_low)
        hat = _again(x[1], count >> 31) * scale + shift
        high, sums_high, d_high, along_high = _weigh(high, hat, _per_column(norm.weight, zero + HALF, HALF), sums_high)
        along = (along_low + along_high)[:, None] * (-1.0 / C) * scale
        rest = (d_low + d_high)[:, None] * (-1.0 / C) * scale + along * shift
        along *= scale
        last = slots.tiles.index(first + USES - 1)
        if THROUGH:
            last = _receive(slots, first, i, USES - 1, USES)
        for h in gl.static_range(2):
            gradient = (low if h == 0 else high) * scale + (_again(x[h], count >> 30) * along + rest)
            if THROUGH:
                gradient += _half(last, h, C, False).load(LAYOUT).to(gl.float32)
            _half(last, h, C, COLUMNS).store(gradient.to(gl.bfloat16))
        _send(dx, tile * ROWS, last, C, COLUMNS)
        if DEPTH <= CONSUMERS:
            tma.store_wait(0)
            _leave(slots, first + USES - 1)
    tma.store_wait(0)
    stride = 2 * C + BIASED * C
    line = partials + (gl.program_id(0) * CONSUMERS + SIDE) * WARPS * stride
    for n in gl.static_range(2):
        _store_folded(line + n * C, sums_low[n], stride, HALF)
        _store_folded(line + n * C + HALF, sums_high[n], stride, HALF)
    if BIASED:
        _store_bias_sums(line + 2 * C, bias_sums, C)
        for warp in gl.static_range(1, WARPS):  # the first row has them all
            _store_bias_sums(line + warp * stride + 2 * C, gl.zeros_like(bias_sums), C)


@gluon.jit
def _store_folded(pointer, folded, stride, C: gl.constexpr):
    """Sum what ``_fold`` left over the lanes of each warp w, to pointer[w * stride :][0:C].

    Warps have a partial sum each, so that no shared memory is needed.
    """
    total = gl.sum(folded, 1)
    warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, total.type.layout))
    column = gl.arange(0, C, layout=gl.SliceLayout(0, total.type.layout))
    gl.store(pointer + warp[:, None] * stride + column[None, :], total)


@gluon.jit
def _store_bias_sums(pointer, sums, C: gl.constexpr):
    """The first of the equal columns of sums [C, ONES], to pointer[0:C]."""
    c = gl.arange(0, C, layout=gl.SliceLayout(1, product_layout(ONES)))
    column = gl.arange(0, ONES, layout=gl.SliceLayout(0, product_layout(ONES)))
    gl.store(pointer + c[:, None] + 0 * column[None, :], sums, mask=(column == 0)[None, :])


@gluon.jit(do_not_specialize=["tiles"])
def hopper_gradient(
    x, d_0, d_1, d_2, d_3, through, weight, dx, normed, norm, narrow, narrow_d, dims, partials, tiles,
    COUNT: gl.constexpr, BIASED: gl.constexpr, NARROW: gl.constexpr, DEPTH: gl.constexpr, REGISTERS: gl.constexpr,
    COLUMNS: gl.constexpr,
):  # fmt: skip
    """Descriptors of x, d_0 and so on (COUNT of them) and dx: [64 tiles, C], of ``through`` (None: there was none), of
    weight: [COUNT C, C], and of the layer norm; narrow: [NARROW, C], narrow_d: a view [64 tiles, NARROW].

    partials: [CONSUMERS WARPS programs, 2 C + BIASED C]. COLUMNS: x and dx lie channels first, [C, 64 tiles].
    """
    C: gl.constexpr = weight.block_type.shape[1]
    USES: gl.constexpr = 1 + COUNT + (through is not None)
    tiles_s = gl.allocate_shared_memory(gl.bfloat16, [DEPTH * USES, ROWS, C], tile_layout(ROWS, C))
    weights = gl.allocate_shared_memory(gl.bfloat16, [COUNT, C, C], tile_layout(C, C))
    ones = weights
    if BIASED:
        ones = gl.allocate_shared_memory(gl.bfloat16, [ONES, ROWS], tile_layout(ONES, ROWS))
        ones.store(gl.full([ONES, ROWS], 1.0, gl.bfloat16, gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0])))
    slots = Slots(tiles_s, _one_arrival(2 * DEPTH * USES), _one_arrival(DEPTH * USES))
    there = _one_arrival(1).index(0)
    fence_async_shared()  # the copy engine must see barriers that are ready, the tensor cores the ones
    group_barrier()
    count = (tiles - gl.program_id(0) + gl.num_programs(0) - 1) // gl.num_programs(0)
    shared = (norm, narrow, narrow_d, dims, dx, normed, partials, slots, weights, ones, there, count)
    ds = (d_0, d_1, d_2, d_3)  # a launch takes no tuple of these
    gl.warp_specialize(
        [
            (_differentiate, (shared, 0, COUNT, USES, BIASED, NARROW, COLUMNS)),
            (_differentiate, (shared, 1, COUNT, USES, BIASED, NARROW, COLUMNS)),
            (_load, (x, ds, through, weight, slots, weights, there, count, COUNT, USES, COLUMNS)),
        ],
        [4, 4],
        [REGISTERS, 504 - 2 * REGISTERS],
    )  # fmt: skip
