"""Results that peers write straight to where they belong: places, and how long they last."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kernel_accuracy import DEVICE
from processes import run_ranks
from rank_tensors import KEPT, barrier_of, group_of, memory, tensors
from scalefold.kernels import triton_ops
from scalefold.kernels.around import aside
from scalefold.parallel.dap import peer_memory
from scalefold.parallel.dap.arrivals import ALIGNMENT, PASSING_TURNS, Arrivals
from scalefold.parallel.dap.collectives import Lasts
from scalefold.parallel.dap.direct import DirectExchanges, _Beside

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() or triton_ops.INTERPRETED), reason="needs a GPU or Triton's interpreter"
)


class Recorded:
    """A kernel whose grids are noted."""

    def __init__(self, kernel: Any, grids: list[tuple[int, ...]]) -> None:
        self.kernel, self.grids = kernel, grids

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        self.grids.append(grid)
        return self.kernel[grid]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("lasts", [Lasts.STEP, Lasts.SHORT])
@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize(
    "shape, split, concat",
    [((1, 8, 8, 16), 2, 1), ((1, 8, 4, 16), 1, 2), ((2, 8, 3, 5, 8), 1, 3), ((1, 16, 1, 24), 1, 0)],
)
def test_parts_arrive_in_their_places_of_all_peers(dtype, lasts, size, shape, split, concat):
    xs, ranks = tensors(size, shape, dtype), group_of(size)
    outs = [rank.all_to_all([x, -x], split, concat, lasts) for rank, x in zip(ranks, xs, strict=True)]
    for rank, (out, other) in enumerate(outs):
        expected = torch.cat([x.chunk(size, split)[rank] for x in xs], concat)
        torch.testing.assert_close(out, expected, rtol=0, atol=0)
        torch.testing.assert_close(other, -expected, rtol=0, atol=0)
        assert out.is_contiguous()
        assert not out._is_view()
    gathered = [rank.all_gather(x, split, lasts) for rank, x in zip(ranks, xs, strict=True)]
    for out in gathered:
        torch.testing.assert_close(out, torch.cat(xs, split), rtol=0, atol=0)


def test_what_goes_on_beside_other_work_meets_a_barrier_only_where_no_other_exchange_has():
    met, ranks, xs = [], group_of(2), tensors(2, (1, 8, 4, 16), torch.float32)
    for rank in ranks:
        assert rank.arrivals is not None
        rank.arrivals.barrier = lambda: met.append("barrier")
    flights = [rank.begin_all_to_all([x], 1, 2, Lasts.SHORT) for rank, x in zip(ranks, xs, strict=True)]
    assert met == []
    ranks[0].all_gather(xs[0], 1, Lasts.SHORT)
    assert met == ["barrier"]
    for rank, ((received,), wait) in enumerate(flights):
        wait()
        torch.testing.assert_close(received, torch.cat([x.chunk(2, 1)[rank] for x in xs], 2), rtol=0, atol=0)
    assert met == ["barrier"] * 2  # the second rank has met nobody since


def test_several_go_on_beside_other_work_and_each_is_waited_for_by_itself():
    """The first is read while the second, which its sender's work holds up, is under way; the next exchange joins."""
    rank, (x, late) = group_of(1)[0], tensors(2, (1, 8, 64, 64), torch.float32)
    gathered, gather_is_there = rank.begin_all_gather(x, 1, Lasts.SHORT)
    late = late + x
    if DEVICE != "cpu":
        torch.cuda._sleep(10**6)
    late += x
    (moved,), moved_is_there = rank.begin_all_to_all([late], 1, 2, Lasts.SHORT)
    gather_is_there()
    torch.testing.assert_close(gathered, x, rtol=0, atol=0)
    assert len(rank._beside) == (2 if DEVICE != "cpu" else 0)
    met, last = rank._met, rank.all_gather(x, 1, Lasts.SHORT)
    assert rank._beside == []
    moved_is_there()
    assert rank._met == met + 1
    torch.testing.assert_close(moved, late, rtol=0, atol=0)
    torch.testing.assert_close(last, x, rtol=0, atol=0)


@pytest.mark.parametrize("lasts", [Lasts.STEP, Lasts.LONG])
def test_the_next_exchange_waits_for_one_beside_other_work(lasts):
    """What is gathered, and what is summed, comes late; so does work in between, which nothing waits for."""
    rank = group_of(1)[0]
    rank.stages = [memory(1 << 20) for _ in range(2)]
    rank.views = {torch.float32: [[stage.view(torch.float32)] for stage in rank.stages]}
    x, late = torch.randn(64, 64, device=DEVICE), torch.zeros(64, 64, device=DEVICE)
    for n in range(3):
        if DEVICE != "cpu":
            torch.cuda._sleep(10**6)
        late += x
        out, wait = rank.begin_all_gather(late, 0, lasts) if n % 2 == 0 else rank.begin_reduce_scatter(late, 0)
        other = late @ x
        if n == 2:
            wait()
        next_one = rank.all_gather(other, 0, lasts)
        assert rank._beside == []
        torch.testing.assert_close(out, late, rtol=0, atol=0)
        torch.testing.assert_close(next_one, other, rtol=0, atol=0)


def test_other_strides_and_more_than_a_program_moves():
    xs, ranks = tensors(2, (1, 40, 4, 64), torch.bfloat16), group_of(2)
    turned = [x.transpose(1, 2) for x in xs]
    outs = [rank.all_to_all([x], 2, 1, Lasts.STEP)[0] for rank, x in zip(ranks, turned, strict=True)]
    for rank, out in enumerate(outs):
        torch.testing.assert_close(out, torch.cat([x.chunk(2, 2)[rank] for x in turned], 1), rtol=0, atol=0)


@pytest.mark.parametrize("columns", [96, 104, 8])
def test_large_parts_leave_room_to_the_work_beside_them(columns, monkeypatch):
    """Two programs take all units of a part in turns, the last ones of which may be fewer; short parts are as ever."""
    launched = []
    monkeypatch.setattr(peer_memory, "LANES_BESIDE", 32)
    monkeypatch.setattr(peer_memory, "PROGRAMS_BESIDE", 2)
    send = peer_memory._send_parts
    monkeypatch.setattr(peer_memory, "_send_parts", Recorded(send, launched))
    xs, ranks = tensors(2, (1, 8, 8, columns), torch.bfloat16), group_of(2)
    moved = [rank.begin_all_to_all([x], 1, 2, Lasts.STEP) for rank, x in zip(ranks, xs, strict=True)]
    gathered = [rank.begin_all_gather(x, 1, Lasts.STEP) for rank, x in zip(ranks, xs, strict=True)]
    for _, wait in [*moved, *gathered]:
        wait()  # of all ranks: here no barrier says that the others have sent
    for rank, ((received,), _) in enumerate(moved):
        torch.testing.assert_close(received, torch.cat([x.chunk(2, 1)[rank] for x in xs], 2), rtol=0, atol=0)
    for out, _ in gathered:
        torch.testing.assert_close(out, torch.cat(xs, 1), rtol=0, atol=0)
    assert launched == [(2 if columns > 8 else 1, 2, 1)] * 4


def test_places_of_kept_results_are_given_away_when_a_step_begins_and_passing_ones_after_some_turns():
    met = []
    own = memory(1024 + 512 * PASSING_TURNS)
    arrivals = Arrivals(own, [own], 1024, lambda: met.append("barrier"))
    assert [arrivals.place(count, keep=True) for count in (512, 1, 1)] == [0, 512, None]
    assert arrivals.place(513, keep=False) is None  # fewer turns than promised
    passing = [arrivals.place(512, keep=False) for _ in range(PASSING_TURNS + 1)]
    assert len(set(passing[:-1])) == PASSING_TURNS
    assert passing[-1] == passing[0] == 1024
    arrivals.begin()
    assert met == ["barrier"]
    assert (arrivals.place(1, keep=True), arrivals.place(1, keep=False)) == (0, 1024)


def test_where_there_is_no_room_results_go_by_stages():
    rank = group_of(1)[0]
    rank.stages, rank.views = [memory(1 << 20)], {torch.float32: [[memory(1 << 20).view(torch.float32)]]}
    large = torch.ones(KEPT // 16, 8, device=DEVICE)
    assert rank.all_gather(large, 0, Lasts.STEP).untyped_storage().data_ptr() != storage_of(rank)
    assert rank.all_gather(large[:8], 0, Lasts.LONG).untyped_storage().data_ptr() != storage_of(rank)
    assert rank.all_gather(large[:8], 0, Lasts.STEP).untyped_storage().data_ptr() == storage_of(rank)


@pytest.mark.parametrize("lasts", [Lasts.STEP, Lasts.SHORT])
@pytest.mark.parametrize("size", [2, 4])
def test_an_operand_may_be_written_to_where_it_belongs_or_be_sent_there(lasts, size):
    """By all-to-all and by all-gather; no other result of the time has its place."""
    shape = (1, 8, 4, 16)
    xs, ranks = tensors(size, shape, torch.float32), group_of(size)
    wholes = [(1, 8 // size, 4 * size, 16), (1, 8, 4 * size, 16)]
    for split, whole in zip((1, None), wholes, strict=True):
        ahead = [rank.destinations(x, whole, 2, lasts)[0] for rank, x in zip(ranks, xs, strict=True)]
        sent = [rank.destinations(x, whole, 2, lasts)[0] for rank, x in zip(ranks, xs, strict=True)]
        for x, own in zip(xs, ahead, strict=True):
            parts = [x] * size if split is None else x.chunk(size, split)
            for to, part in zip(own.parts, parts, strict=True):
                to.copy_(part)
        given = [(rank, x, own.place) for rank, x, own in zip(ranks, xs, sent, strict=True)]
        if split is None:
            outs = [rank.begin_all_gather(x, 2, lasts, place)[0] for rank, x, place in given]
        else:
            outs = [rank.all_to_all([x], split, 2, lasts, place)[0] for rank, x, place in given]
        for n, (rank, own, out) in enumerate(zip(ranks, ahead, outs, strict=True)):
            expected = torch.cat([x if split is None else x.chunk(size, split)[n] for x in xs], 2)
            assert all(torch.equal(found, expected) for found in (rank.arrived(own), out, sent[n].received))


@pytest.mark.parametrize("meets", [True, False])
def test_what_goes_on_beside_need_not_end_before_what_its_maker_wrote_is_read(monkeypatch, meets):
    """Unless it has a barrier of its own, which all ranks must come to first; else a later barrier serves it."""
    rank, told = group_of(2)[0], []
    assert rank.arrivals is not None
    rank.arrivals.barrier = lambda: told.append("barrier")
    monkeypatch.setattr(rank, "_join", lambda: told.append("join"))
    x = torch.ones(1, 8, 4, 16, device=DEVICE)
    (destination,) = rank.destinations(x, (1, 16, 4, 16), 1, Lasts.SHORT)
    rank._beside.append(_Beside(None, [], meets))
    assert rank.arrived(destination, alone=True) is destination.received
    assert (told, rank._met) == ((["join", "barrier"], 1) if meets else (["barrier"], 0))
    rank.arrived(destination)
    assert told[-2:] == ["join", "barrier"]
    rank._beside.clear()


def test_where_there_is_no_room_nothing_can_be_written_ahead():
    rank = group_of(1)[0]
    large = torch.ones(KEPT // 4 + 8, 8, device=DEVICE)
    assert rank.destinations(large, large.shape, 0, Lasts.STEP) == []


def storage_of(rank: DirectExchanges) -> int:
    assert rank.arrivals is not None
    return rank.arrivals.own.untyped_storage().data_ptr()


def turns_seen(rank: int, numbers: Tensor, written: Tensor, turns: int) -> list[list[int]]:
    """What all ranks had written when each of several barriers was behind this one; they come at unequal times."""
    meet_all, seen = barrier_of(rank, numbers), []
    for turn in range(turns):
        time.sleep((7 * turn + 3 * rank) % 5 / 1000)
        written[rank] = turn
        meet_all()
        seen.append(written.tolist())
        meet_all()
    return seen


@pytest.mark.distributed
@pytest.mark.skipif(DEVICE != "cpu", reason="memory of CPU processes")
@pytest.mark.parametrize("size", [2, 4])
def test_behind_a_barrier_stands_what_all_ranks_have_done_before_it(size):
    numbers, written = (torch.zeros(shape, dtype=torch.int32).share_memory_() for shape in ((size, size), (size,)))
    for seen in run_ranks(turns_seen, size, numbers, written, 20):
        assert seen == [[turn] * size for turn in range(20)]


def test_work_aside_is_waited_for_twice_in_a_turn_of_passing_results(monkeypatch):
    """A peer writes to a place again one turn later; gradients on a second stream may read it until then."""
    joined = []
    monkeypatch.setattr(aside, "join", lambda: joined.append(len(places)))
    memory = torch.zeros(64 * ALIGNMENT, dtype=torch.uint8)
    arrivals, places = Arrivals(memory, [memory], 0, lambda: None), []
    for _ in range(130):
        places.append(arrivals.place(ALIGNMENT, keep=False))
    assert len(joined) == 4
    assert places[64] == places[0]
    assert all(any(first < turn <= first + 64 for turn in joined) for first in range(66))
