"""Parts of tensors, written to where they belong in the memory of several GPUs, or read from there or summed; and the
barrier at which ranks meet on the device.

Parts are described by runs: a dense tensor is a row of runs of equal length, and every SIZE-th belongs to one rank.
That covers parts along any dimension: a run is the part's extent in that dimension and all behind it. What is read has
been staged by its owners before; what is written may be read once all ranks have met (``parallel.dap.direct``).
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from collections.abc import Callable, Sequence
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from scalefold.kernels.instructions import INTERPRETED, program, wait_for_predecessors

LANE = 8  # elements that a thread moves at once; lengths of runs must be multiples
_LANE = tl.constexpr(LANE)
LANES = 512  # per program
NUM_WARPS = 16
LANES_BESIDE, PROGRAMS_BESIDE = 2048, 32  # where other work goes on: as much on its way from fewer multiprocessors
POST = tl.constexpr("st.release.sys.global.u32 [$1], $2; mov.u32 $0, $2;")
AWAIT = tl.constexpr(
    "{ .reg .pred behind; poll: ld.acquire.sys.global.u32 $0, [$1]; sub.s32 $0, $0, $2; setp.lt.s32 behind, $0, 0;"
    " @behind bra poll; }"
)


@triton.jit
def _offsets(unit, first, BLOCK, SIZE: tl.constexpr):
    """Element offsets [units, LANE] of ``unit`` where every run of BLOCK units is one of SIZE, the ``first`` one."""
    unit = ((unit // BLOCK) * SIZE + first) * BLOCK + unit % BLOCK
    return unit.to(tl.int64)[:, None] * _LANE + tl.arange(0, _LANE)[None, :]


@program
@triton.jit(do_not_specialize=["rank"])
def _send_parts(
    sources, targets, rank, source_block, target_block, count, result, SIZE: tl.constexpr, TENSORS: tl.constexpr,
    WHOLE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Program (units, peer, tensor): the peer's part of a source, or all of it, to this rank's place at the peer.

    A peer holds the results of all tensors, each of ``result`` elements, behind each other. Parts that cross a wire are
    on their way first. A program takes every so many units again, as many programs as there are.
    """
    wait_for_predecessors()
    peer = (tl.program_id(1) + rank + 1) % SIZE
    for first in range(tl.program_id(0) * LANES, count, tl.num_programs(0) * LANES):
        unit = first + tl.arange(0, LANES)
        keep = (unit < count)[:, None]
        if WHOLE:
            source = _offsets(unit, 0, source_block, 1)
        else:
            source = _offsets(unit, peer, source_block, SIZE)
        target = _offsets(unit, rank, target_block, SIZE)
        for n in tl.static_range(TENSORS):
            if tl.program_id(2) == n:
                values = tl.load(sources[n] + source, mask=keep)
                for p in tl.static_range(SIZE):
                    if peer == p:
                        tl.store(targets[p] + n * result + target, values, mask=keep)


@program
@triton.jit(do_not_specialize=["rank"])
def _copy_parts(
    sources, out, rank, source_block, out_block, count, SIZE: tl.constexpr, WHOLE: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """Program (units, peer): this rank's part of the peer's tensor, or all of it, to the peer's place in ``out``."""
    wait_for_predecessors()
    unit = tl.program_id(0) * LANES + tl.arange(0, LANES)
    keep = (unit < count)[:, None]
    peer = tl.program_id(1)
    if WHOLE:
        source = _offsets(unit, 0, source_block, 1)
    else:
        source = _offsets(unit, rank, source_block, SIZE)
    target = _offsets(unit, peer, out_block, SIZE)
    for p in tl.static_range(SIZE):
        if peer == p:
            tl.store(out + target, tl.load(sources[p] + source, mask=keep), mask=keep)


@program
@triton.jit(do_not_specialize=["rank"])
def _sum_parts(sources, out, rank, source_block, count, SIZE: tl.constexpr, LANES: tl.constexpr):
    """Program (units): sum of this rank's part of every peer's tensor, in fp32 and in rank order."""
    wait_for_predecessors()
    unit = tl.program_id(0) * LANES + tl.arange(0, LANES)
    keep = (unit < count)[:, None]
    source = _offsets(unit, rank, source_block, SIZE)
    total = tl.zeros([LANES, _LANE], tl.float32)
    for p in tl.static_range(SIZE):
        total += tl.load(sources[p] + source, mask=keep, other=0.0).to(tl.float32)
    target = unit.to(tl.int64)[:, None] * _LANE + tl.arange(0, _LANE)[None, :]
    tl.store(out + target, total.to(out.dtype.element_ty), mask=keep)


@triton.jit
def _post(addresses, value):
    """Store value (int32) at addresses; whoever reads it there sees what this GPU has written before."""
    if INTERPRETED:
        tl.store(addresses.to(tl.pointer_type(tl.int32)), value)
    else:
        tl.inline_asm_elementwise(POST, "=r,l,r", [addresses, value], tl.int32, False, 1)


@triton.jit
def _await(addresses, value):
    """Until value (int32) or one behind it has been posted at addresses; numbers may begin again after the largest."""
    if INTERPRETED:
        while tl.min(tl.load(addresses.to(tl.pointer_type(tl.int32))) - value, 0) < 0:
            pass
    else:
        tl.inline_asm_elementwise(AWAIT, "=&r,l,r", [addresses, value], tl.int32, False, 1)


@program
@triton.jit
def _barrier_kernel(numbers, places, count, SIZE: tl.constexpr, LANES: tl.constexpr):
    """Tell every rank that this one has come to the next barrier, then wait for all others to have come that far.

    A lane per rank. Numbers only grow (around the end of their range), so a rank that is ahead is no harm.
    """
    wait_for_predecessors()
    rank = tl.minimum(tl.arange(0, LANES), SIZE - 1)
    number = tl.load(count) + 1
    own = tl.zeros([LANES], tl.int32) + number
    _post(tl.load(places + rank), own)
    _await((numbers + rank).to(tl.int64), own)
    tl.store(count, number)


def meet(numbers: Tensor, places: Tensor, count: Tensor) -> None:
    """A barrier: what follows in the stream comes after all that stands before it in those of all ranks.

    numbers: [P] int32, how often each rank has come, as it writes into this rank's memory; places: [P] int64, addresses
    at which this rank writes into everybody's, its own too; count: [1] int32, how often it has. All begin at 0.
    """
    size = numbers.numel()
    _barrier_kernel[(1,)](numbers, places, count, SIZE=size, LANES=triton.next_power_of_2(size), num_warps=1)


def meeting(numbers: Tensor, addresses: Sequence[int]) -> Callable[[], None]:
    """``meet`` from the first barrier on: numbers as there, zeros; addresses: ``places``, on the host."""
    places = torch.tensor(addresses, dtype=torch.int64, device=numbers.device)
    return partial(meet, numbers, places, numbers.new_zeros(1))


def send_parts(
    sources: Sequence[Tensor],
    targets: Sequence[Tensor],
    rank: int,
    whole: bool,
    source_block: int,
    target_block: int,
    beside: bool = False,
) -> None:
    """Every peer's part of each source (``whole``: all of it) to this rank's place in the results at that peer.

    sources: equal shapes, dense; targets: one per peer, long enough for the results of all sources behind each other;
    source_block, target_block: elements of a run; beside: other work goes on, to which large parts leave room.
    """
    size, count = len(targets), sources[0].numel() // LANE
    count = count if whole else count // size
    lanes, programs = LANES, triton.cdiv(count, LANES)
    if beside and count >= 2 * PROGRAMS_BESIDE * LANES_BESIDE:
        lanes, programs = LANES_BESIDE, PROGRAMS_BESIDE
    _send_parts[(programs, size, len(sources))](
        tuple(sources), tuple(targets), rank, source_block // LANE, target_block // LANE, count, size * count * LANE,
        SIZE=size, TENSORS=len(sources), WHOLE=whole, LANES=lanes, num_warps=NUM_WARPS,
    )  # fmt: skip


def copy_parts(sources: Sequence[Tensor], out: Tensor, rank: int | None, source_block: int, out_block: int) -> None:
    """Part ``rank`` of every source (None: all of it) to its owner's place in ``out``.

    sources: one tensor per rank, dense, at least as long as what is read; source_block, out_block: elements of a run.
    """
    size = len(sources)
    count = out.numel() // size // LANE
    _copy_parts[(triton.cdiv(count, LANES), size)](
        tuple(sources), out, rank or 0, source_block // LANE, out_block // LANE, count, SIZE=size, WHOLE=rank is None,
        LANES=LANES, num_warps=NUM_WARPS,
    )  # fmt: skip


def sum_parts(sources: Sequence[Tensor], out: Tensor, rank: int, source_block: int) -> None:
    """Sum of part ``rank`` of every source, in fp32 and in their order, to ``out``: dense, as long as a part."""
    count = out.numel() // LANE
    _sum_parts[(triton.cdiv(count, LANES),)](
        tuple(sources), out, rank, source_block // LANE, count, SIZE=len(sources), LANES=LANES, num_warps=NUM_WARPS
    )


def compile_cases() -> list[tuple[str, Callable[[], None]]]:
    """Exchanges of 8 MiB among two and eight ranks on meta tensors, with their barrier; see ``tuning``."""
    return [(f"peer_memory_{size}", lambda size=size: _meta_run(size)) for size in (2, 8)]


def _meta_run(size: int) -> None:
    sources = [torch.empty(size, 2048, 2048 // size, dtype=torch.bfloat16, device="meta") for _ in range(size)]
    copy_parts(sources, torch.empty_like(sources[0]), 0, 2048, 4096)
    copy_parts(sources, sources[0].new_empty(size * sources[0].numel()), None, sources[0].numel(), 2048)
    sum_parts(sources, torch.empty_like(sources[0][0]), 0, 2048)
    for sent in (sources[:1], sources[:2]):
        send_parts(sent, sources, 1, whole=False, source_block=2048, target_block=4096)
    for beside in (False, True):
        send_parts(sources[:1], sources, 1, True, source_block=sources[0].numel(), target_block=2048, beside=beside)
    numbers = torch.empty(size, dtype=torch.int32, device="meta")
    meet(numbers, numbers.long(), numbers[:1])
