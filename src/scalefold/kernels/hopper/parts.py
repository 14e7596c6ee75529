"""What the row-wise Gluon programs for compute capability 9.0 share: rings of tiles, layer norm and layouts.

A program stays on its multiprocessor and holds its weights in shared memory. Three groups of warps work in it: two
consumers, each with rows of its own, and a loader that fills their slots by the copy engine, several tiles ahead.

Each consumer owns STAGES slots, used in turn. ``full`` of a slot completes when its bytes have arrived, ``empty`` when
its consumer has read (or stored) what is in it. Use number n of a consumer takes slot n % STAGES; both barriers of the
slot complete once per use, so the phase to wait for is the parity of n // STAGES, and a loader that waits for "empty"
before the first use passes at once, because the parity of the phase before the first counts as complete.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.language.core import _aggregate as aggregate

from scalefold.kernels.reference import LAYER_NORM_EPS

ROWS = gl.constexpr(64)  # of a tile: what one warpgroup multiplies at once
SIDES = gl.constexpr(2)  # consumers of a program
WARPS = gl.constexpr(4)  # of a consumer
NARROW_ROWS = gl.constexpr(8)  # of a narrow weight in shared memory, zeros after its own
EPS = gl.constexpr(LAYER_NORM_EPS)
_SIGMOID = gl.constexpr(  # -log2(e) x; 2^; + 1; 1 /
    "mul.f32 $0, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 $0, $0; add.f32 $0, $0, 0f3F800000; rcp.approx.ftz.f32 $0, $0;"
)


@gluon.constexpr_function
def product_layout(columns):
    """Registers of a warpgroup's product [64 m, columns]."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16])


@gluon.constexpr_function
def operand_layout(columns):
    """Registers of the left operand of a product with ``columns`` columns."""
    return gl.DotOperandLayout(operand_index=0, parent=product_layout(columns), k_width=2)


@gluon.constexpr_function
def tile_layout(rows, columns):
    """Shared memory of a 16-bit tile [rows, columns], as the copy engine and the tensor cores take it."""
    return gl.NVMMASharedLayout.get_default_for([rows, columns], gl.bfloat16)


@aggregate
class Ring:
    """The slots of both consumers; consumer ``side`` owns SIDES-th parts of all three."""

    slots: gl.shared_memory_descriptor  # [SIDES * STAGES, ROWS, C]
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    STAGES: gl.constexpr
    BYTES: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, slots, full, empty, STAGES, BYTES):
        self.slots, self.full, self.empty = slots, full, empty
        self.STAGES, self.BYTES = gl.constexpr(STAGES), gl.constexpr(BYTES)

    @gluon.jit
    def place(self, side, n):
        return side * self.STAGES + n % self.STAGES

    @gluon.jit
    def tile(self, side, n):
        return self.slots.index(self.place(side, n))

    @gluon.jit
    def load(self, desc, row, column, side, n):
        """Loader: once the slot is free, bring the tile at (row, column) of desc."""
        place = self.place(side, n)
        mbarrier.wait(self.empty.index(place), ((n // self.STAGES) & 1) ^ 1)
        mbarrier.expect(self.full.index(place), self.BYTES)
        tma.async_copy_global_to_shared(desc, [row, column], self.full.index(place), self.slots.index(place))

    @gluon.jit
    def load_columns(self, desc, row, column, side, n, C: gl.constexpr):
        """Loader: the same for a tensor whose channels lie first, a tile [C, ROWS]."""
        place = self.place(side, n)
        mbarrier.wait(self.empty.index(place), ((n // self.STAGES) & 1) ^ 1)
        mbarrier.expect(self.full.index(place), self.BYTES)
        slot = self.slots.index(place)._reinterpret(gl.bfloat16, [C, ROWS], tile_layout(C, ROWS))
        tma.async_copy_global_to_shared(desc, [column, row], self.full.index(place), slot)

    @gluon.jit
    def lend(self, side, n):
        """Loader: hand over the free slot as it is, for the consumer to stage an output in."""
        place = self.place(side, n)
        mbarrier.wait(self.empty.index(place), ((n // self.STAGES) & 1) ^ 1)
        mbarrier.arrive(self.full.index(place), count=1)

    @gluon.jit
    def wait(self, side, n):
        """Consumer: the slot of use n once its bytes are there."""
        place = self.place(side, n)
        mbarrier.wait(self.full.index(place), (n // self.STAGES) & 1)
        return self.slots.index(place)

    @gluon.jit
    def release(self, side, n):
        """Consumer: every thread is done with the slot (the barrier sees to it), the loader may fill it again.

        The fence puts what ordinary loads have read before what the copy engine writes.
        """
        fence_async_shared()
        gl.thread_barrier()
        mbarrier.arrive(self.empty.index(self.place(side, n)), count=1)


@gluon.jit
def make_ring(STAGES: gl.constexpr, C: gl.constexpr):
    """Slots for both consumers and their barriers, before the groups of warps part."""
    slots = gl.allocate_shared_memory(gl.bfloat16, [SIDES * STAGES, ROWS, C], tile_layout(ROWS, C))
    full = gl.allocate_shared_memory(gl.int64, [SIDES * STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SIDES * STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(SIDES * STAGES):
        mbarrier.init(full.index(s), count=1)
        mbarrier.init(empty.index(s), count=1)
    return Ring(slots, full, empty, STAGES, ROWS * C * 2)


@gluon.jit
def make_barrier():
    """A barrier that one arrival completes: here the weights'."""
    barrier = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(barrier, count=1)
    return barrier


@gluon.jit
def publish_barriers():
    """Make initialised barriers visible to the copy engine and to all warps."""
    fence_async_shared()
    gl.thread_barrier()


@gluon.jit
def store_staged(desc, row, column, staged):
    """Send a tile that all threads of this group have just written to shared memory on its way to memory."""
    fence_async_shared()
    gl.thread_barrier()
    tma.async_copy_shared_to_global(desc, [row, column], staged)


@gluon.jit
def stores_left(COUNT: gl.constexpr):
    """Wait until all but COUNT of this group's stores have read their tiles; all threads know then."""
    tma.store_wait(COUNT)
    gl.thread_barrier()


@gluon.jit
def read_tile(slot, C: gl.constexpr, COLUMNS: gl.constexpr):
    """A slot's tile in fp32 [64, C]; COLUMNS: it lies there channels first, [C, 64]."""
    if COLUMNS:
        lying = slot._reinterpret(gl.bfloat16, [C, ROWS], tile_layout(C, ROWS))
        return lying.permute((1, 0)).load(product_layout(C)).to(gl.float32)
    else:  # noqa: RET505  (the compiler looks at what follows an untaken return)
        return slot.load(product_layout(C)).to(gl.float32)


@gluon.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), x fp32, by the chip's own power of two and reciprocal."""
    return gl.inline_asm_elementwise(_SIGMOID, "=f,f", [x], gl.float32, True, 1)


@gluon.jit
def normalise(x, C: gl.constexpr):
    """x [rows, C] fp32 -> (x - mean) / std and 1 / std, [rows, C] and [rows]."""
    centred = x - (gl.sum(x, 1) * (1.0 / C))[:, None]
    rstd = gl.rsqrt(gl.sum(centred * centred, 1) * (1.0 / C) + EPS)
    return centred * rstd[:, None], rstd


@gluon.jit
def per_column(pointer, first, COLUMNS: gl.constexpr):
    """COLUMNS values from pointer[first] on in fp32, one per column of a product: [1, COLUMNS]."""
    columns = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, product_layout(COLUMNS)))
    return gl.load(pointer + first + columns).to(gl.float32)[None, :]


@gluon.jit
def normed_tile(tile, norm_weight, norm_bias, C: gl.constexpr):
    """Layer norm of fp32 rows [64, C], rounded as the products take it."""
    hat, _ = normalise(tile, C)
    return (hat * per_column(norm_weight, 0, C) + per_column(norm_bias, 0, C)).to(gl.bfloat16)


@gluon.jit
def load_dropout(dropout, tile, first, dims, strides, COLUMNS: gl.constexpr):
    """COLUMNS columns of the fp32 dropout scales of a tile of rows, from memory: [64, COLUMNS]."""
    rows = tile * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, product_layout(COLUMNS)))
    columns = first + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, product_layout(COLUMNS)))
    return gl.load(dropout + row_offsets(rows, dims, strides)[:, None] + columns[None, :])


@gluon.jit
def row_offsets(rows, dims, strides):
    """Element offsets of rows; see ``rows.row_offsets``."""
    inner = rows % dims[1]
    rest = rows // dims[1]
    middle = rest % dims[0]
    outer = rest // dims[0]
    return outer.to(gl.int64) * strides[0] + middle.to(gl.int64) * strides[1] + inner.to(gl.int64) * strides[2]


@gluon.jit
def fold_rows(value, COLUMNS: gl.constexpr):
    """[64, COLUMNS] -> sums of the two rows that one thread holds: no value leaves its thread."""
    return gl.sum(gl.reshape(value, [4, 2, 8, COLUMNS]), 1)


@gluon.jit
def store_folded(pointer, folded, stride, COLUMNS: gl.constexpr):
    """Sum what ``fold_rows`` left over the lanes of each warp w, to pointer[w * stride :][0:COLUMNS].

    Warps have a partial sum each, so that no shared memory is needed.
    """
    total = gl.sum(folded, 1)
    warp = gl.arange(0, 4, layout=gl.SliceLayout(1, total.type.layout))
    column = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, total.type.layout))
    gl.store(pointer + warp[:, None] * stride + column[None, :], total)
