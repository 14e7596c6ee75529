"""What the row-wise Gluon programs stand on: rings of tiles, layer norm and layouts.

Roles. A program stays on its multiprocessor, keeps its weights in shared memory and walks over tiles of ROWS rows.
CONSUMERS groups of four warps compute, each with tiles of its own; one group of four warps fetches (the loader).

A ring has as many slots for each consumer, used in turn. Each slot has two barriers, completed by one arrival: ``full``
when the bytes of a tile have arrived, ``empty`` when its consumer has left it. The n-th use of S slots has parity
(n // S) & 1; the loader waits for the use before its own, and the first uses pass (see ``pieces``).

A tile is ROWS neighbours in memory or lies across: SECTOR rows along level 1 of the rows for one along level 2 (see
``rows.row_offsets`` of ``kernels``), as a block [LINES, SECTOR, C]. So a warp's rows are those of one line.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false
# The type checker takes Gluon's programs for Python.

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma

from scalefold.kernels import hopper
from scalefold.kernels.hopper.pieces import CONSUMERS, group_barrier, initialised, tiles_for
from scalefold.kernels.instructions import SIGMOID, TO_FP32
from scalefold.kernels.reference import LAYER_NORM_EPS
from scalefold.kernels.rows import SECTOR

ROWS = gl.constexpr(hopper.PART)  # of a tile: what one warpgroup multiplies at once
LINES = gl.constexpr(hopper.PART // SECTOR.value)  # of a tile across
COLUMNS = gl.constexpr(hopper.PART)  # of a product
EPS = gl.constexpr(LAYER_NORM_EPS)


class Ring(NamedTuple):
    """Slots [CONSUMERS * S, *tile] and their barriers; consumer ``side`` owns the side-th S of them."""

    slots: Any
    full: Any
    empty: Any


@gluon.jit
def new_ring(descriptor, STAGES: gl.constexpr):
    """STAGES slots per consumer for tiles of a descriptor."""
    slots = tiles_for(descriptor, CONSUMERS * STAGES)
    return Ring(slots, one_arrival(CONSUMERS * STAGES), one_arrival(CONSUMERS * STAGES))


@gluon.jit
def one_arrival(COUNT: gl.constexpr):
    """Barriers that one arrival completes; ``publish`` follows."""
    return initialised(COUNT, 1)


@gluon.jit
def slot_of(ring, side, n):
    """Number of the slot of a consumer's n-th use."""
    STAGES: gl.constexpr = ring.slots.shape[0] // CONSUMERS
    return side * STAGES + n % STAGES


@gluon.jit
def parity_of(ring, n):
    STAGES: gl.constexpr = ring.slots.shape[0] // CONSUMERS
    return (n // STAGES) & 1


@gluon.jit
def free_slot(ring, nbytes: gl.constexpr, side, n):
    """Loader: number of the slot for the n-th use, once it is free; it is there when so many bytes have arrived."""
    slot = slot_of(ring, side, n)
    mbarrier.wait(ring.empty.index(slot), parity_of(ring, n) ^ 1)
    mbarrier.expect(ring.full.index(slot), nbytes)
    return slot


@gluon.jit
def fetch(ring, descriptor, row, column, side, n):
    """Loader: bring a tile for the n-th use, once the slot is free."""
    fetch_at(ring, descriptor, (row, column), side, n)


@gluon.jit
def fetch_at(ring, descriptor, at, side, n):
    """The same for a tile that begins ``at`` these coordinates."""
    slot = free_slot(ring, descriptor.block_type.nbytes, side, n)
    tma.async_copy_global_to_shared(descriptor, at, ring.full.index(slot), ring.slots.index(slot))


@gluon.jit
def fetch_rows(ring, descriptor, tiles):
    """Loader: tiles of whole rows for both consumers in turn."""
    n = 0
    for tile in range(gl.program_id(0) * CONSUMERS, tiles, gl.num_programs(0) * CONSUMERS):
        fetch(ring, descriptor, tile * ROWS, 0, 0, n)
        if tile + 1 < tiles:
            fetch(ring, descriptor, (tile + 1) * ROWS, 0, 1, n)
        n += 1  # noqa: SIM113


@gluon.jit
def fetch_weights(descriptors, weights, there):
    """Loader: whole weights, which stay."""
    COUNT: gl.constexpr = weights.shape[0]
    mbarrier.expect(there, COUNT * descriptors[0].block_type.nbytes)
    for i in gl.static_range(COUNT):
        tma.async_copy_global_to_shared(descriptors[i], [0, 0], there, weights.index(i))


@gluon.jit
def receive(ring, side, n):
    """Consumer: the tile of the n-th use, once it is there."""
    slot = slot_of(ring, side, n)
    mbarrier.wait(ring.full.index(slot), parity_of(ring, n))
    return ring.slots.index(slot)


@gluon.jit
def leave(ring, side, n):
    """Consumer: the loader may fill the slot of the n-th use again.

    All warps are done with it (the barrier), and what they read comes before what the copy engine writes (the fence).
    """
    fence_async_shared()
    group_barrier()
    release(ring, side, n)


@gluon.jit
def release(ring, side, n):
    """The same for a slot that all warps are done with: products and copies alone read it, or a fence came since."""
    mbarrier.arrive(ring.empty.index(slot_of(ring, side, n)), count=1)


@gluon.jit
def send(descriptor, row, column, tile):
    """Consumer: store a tile that all its threads have just written to shared memory."""
    send_at(descriptor, (row, column), tile)


@gluon.jit
def send_at(descriptor, at, tile):
    """The same for a tile that begins ``at`` these coordinates."""
    fence_async_shared()
    group_barrier()
    tma.async_copy_shared_to_global(descriptor, at, tile)


@gluon.jit
def wait_until_sent(LEFT: gl.constexpr):
    """Consumer: until all but the last LEFT tiles sent may be written over."""
    tma.store_wait(LEFT)
    group_barrier()


@gluon.constexpr_function
def product_layout(columns):
    """Registers of a warpgroup's product [ROWS, columns]."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16])


@gluon.constexpr_function
def operand_layout(columns):
    """Registers of the left operand of such a product."""
    return gl.DotOperandLayout(operand_index=0, parent=product_layout(columns), k_width=2)


@gluon.jit
def read(tile):
    """A tile in shared memory in fp32, in registers as layer norm takes it."""
    return tile.load(product_layout(tile.shape[1])).to(gl.float32)


@gluon.jit
def start_product(left, weight, first: gl.constexpr):
    """left times COLUMNS lines of a weight [*, C] from ``first`` on: [ROWS, COLUMNS], fp32, not waited for."""
    acc = gl.zeros([ROWS, COLUMNS], gl.float32, product_layout(COLUMNS))
    block = weight.slice(first, COLUMNS, 0).permute((1, 0))
    return warpgroup_mma(left, block, acc, use_acc=False, is_async=True)


@gluon.jit
def normed(x, norm):
    """Layer norm of a tile x: [ROWS, C], in bf16 as the left operand of products with COLUMNS columns."""
    return gl.convert_layout(normalised(x, norm), operand_layout(COLUMNS))


@gluon.jit
def normalised(x, norm):
    """The same where it is computed."""
    C: gl.constexpr = x.shape[1]
    hat, _ = standardised(x)
    return (hat * per_column(norm.weight, 0, C) + per_column(norm.bias, 0, C)).to(gl.bfloat16)


@gluon.jit
def standardised(x):
    """(x - mean) / std of the rows of a tile x: [ROWS, C], and 1 / std: [ROWS]."""
    C: gl.constexpr = x.shape[1]
    centred = x - (gl.sum(x, 1) * (1.0 / C))[:, None]
    rstd = gl.rsqrt(gl.sum(centred * centred, 1) * (1.0 / C) + EPS)
    return centred * rstd[:, None], rstd


@gluon.jit
def per_column(pointer, first, COUNT: gl.constexpr):
    """COUNT values from pointer[first] on in fp32, one per column of a product: [1, COUNT]."""
    columns = gl.arange(0, COUNT, layout=gl.SliceLayout(0, product_layout(COUNT)))
    return gl.load(pointer + first + columns).to(gl.float32)[None, :]


@gluon.jit
def row_offsets(view, tile, dims, LAYOUT: gl.constexpr):
    """Element offsets of a tile's rows in a ``View``, see ``rows.row_offsets``: [ROWS] of a product in LAYOUT."""
    return offsets_of(view, tile * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT)), dims)


@gluon.jit
def offsets_of(view, rows, dims):
    """The same for rows of these numbers."""
    inner = rows % dims[1]
    rest = rows // dims[1]
    middle = rest % dims[0]
    outer = rest // dims[0]
    strides = view.strides
    return outer.to(gl.int64) * strides[0] + middle.to(gl.int64) * strides[1] + inner.to(gl.int64) * strides[2]


@gluon.jit
def to_fp32(x):
    """``instructions.to_fp32``."""
    if x.dtype != gl.bfloat16:
        return x.to(gl.float32)
    else:  # noqa: RET505  (the compiler looks at what follows an untaken return)
        return gl.inline_asm_elementwise(TO_FP32, "=&r,=r,r", [x], gl.float32, True, 2)


@gluon.jit
def sigmoid(x):
    """``instructions.sigmoid``."""
    return gl.inline_asm_elementwise(SIGMOID, "=f,f", [x], gl.float32, True, 1)


# ---- tiles one by one, in order or across ---------------------------------------------------------------------------


class Walk(NamedTuple):
    """The tiles of a program: ``first`` and every ``step``-th after it, of so many ``tiles``.

    ``per_line``: tiles across along level 2; ``dims``: sizes of levels 1 and 2 of the rows.
    """

    first: Any
    step: Any
    tiles: Any
    per_line: Any
    dims: Any


@gluon.jit
def new_walk(dims, tiles):
    """That of this program; its consumers take tiles in turn."""
    return Walk(gl.program_id(0), gl.num_programs(0), tiles, dims[1] // LINES, dims)


@gluon.jit
def begin(walk, side):
    """First tile of a consumer."""
    return walk.first + side * walk.step


@gluon.jit
def pace(walk):
    """From one tile of a consumer to its next one."""
    return CONSUMERS * walk.step


@gluon.jit
def corner(walk, tile, segment, column, ACROSS: gl.constexpr):
    """Where a tile begins, for the copy engine. Tiles of a segment follow those of all segments before it."""
    if ACROSS:
        middle = segment * (walk.tiles // walk.per_line) + tile // walk.per_line
        return tile % walk.per_line * LINES, middle * SECTOR, column
    else:  # noqa: RET505
        return (segment * walk.tiles + tile) * ROWS, column


@gluon.jit
def row_numbers(walk, tile, n, ACROSS: gl.constexpr):
    """Numbers of the n-th rows of a tile."""
    if ACROSS:
        middle = tile // walk.per_line * SECTOR + n % SECTOR
        return middle * walk.dims[1] + tile % walk.per_line * LINES + n // SECTOR
    else:  # noqa: RET505
        return tile * ROWS + n


@gluon.jit
def by_row(slot):
    """A slot for a tile, in order or across, as a matrix [ROWS, C]."""
    if len(slot.shape) == 2:
        return slot
    else:  # noqa: RET505
        return slot.reshape([slot.shape[0] * slot.shape[1], slot.shape[2]])
