"""Direct exchanges: several ranks in one process, whose stages are their memory; values equal to plain indexing."""

import csv
import itertools
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from kernel_accuracy import DEVICE
from processes import run_ranks
from rank_tensors import tensors
from scalefold.config import TrainingConfig
from scalefold.kernels import triton_ops
from scalefold.parallel.dap import collectives, connect
from scalefold.parallel.dap.collectives import Lasts
from scalefold.parallel.dap.direct import STAGES, DirectExchanges
from scalefold.parallel.dap.peer_memory import meet
from scalefold.step.graphs import TrainStep
from scalefold.step.optimizer import Optimizer
from scalefold.step.parameters import FlatParameters
from scalefold.step.reducer import GradientReducer

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() or triton_ops.INTERPRETED), reason="needs a GPU or Triton's interpreter"
)
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
BYTES = 1 << 16


class OneProcess:
    """Ranks that take turns: every rank stages its tensor before any of them reads."""

    def __init__(self, size: int) -> None:
        stages = [[torch.zeros(BYTES, dtype=torch.uint8, device=DEVICE) for _ in range(STAGES)] for _ in range(size)]
        views = {
            dtype: [[stages[peer][turn].view(dtype) for peer in range(size)] for turn in range(STAGES)]
            for dtype in (torch.bfloat16, torch.float32)
        }
        self.ranks = [DirectExchanges(rank, size, stages[rank], views, lambda: None) for rank in range(size)]

    def run(self, name: str, xs: list, *how: int | Lasts) -> list:
        """The exchange on every rank; first all of them stage (and read too early), then all read."""
        for rank, x in zip(self.ranks, xs, strict=True):
            getattr(rank, name)(x, *how)
            rank._turn = (rank._turn - 1) % STAGES
        return [getattr(rank, name)(x, *how) for rank, x in zip(self.ranks, xs, strict=True)]


@pytest.mark.parametrize("before", [0, 6, 2**31 - 1])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_a_rank_at_a_barrier_tells_all_and_goes_on_when_all_have_come_as_far(size, before):
    """The others have come already, and one is a barrier ahead; numbers begin again after the largest."""
    number, rank = (before + 1 + 2**31) % 2**32 - 2**31, size - 1
    memories = torch.full((size, size), before, dtype=torch.int32, device=DEVICE)
    memories[rank, :rank] = number
    memories[rank, 0] += rank > 0  # the first rank
    places = torch.tensor([memory[rank:].data_ptr() for memory in memories], device=DEVICE)
    count = torch.full((1,), before, dtype=torch.int32, device=DEVICE)
    meet(memories[rank], places, count)
    assert count.item() == number
    assert memories[:, rank].tolist() == [number] * size
    assert (memories[:rank, :rank] == before).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(
    "shape, split, concat",
    [((1, 4, 8, 16), 2, 1), ((1, 8, 4, 16), 1, 2), ((2, 8, 3, 5, 8), 1, 3), ((3, 4, 2, 12, 8), 3, 1), ((4, 8), 0, 0)],
)
def test_an_exchange_moves_every_part_to_its_place(dtype, size, shape, split, concat):
    xs, group = tensors(size, shape, dtype), OneProcess(size)
    if split == concat:
        xs = [x[None] for x in xs]
        split, concat = 1, 0
    outs = group.run("all_to_all", [[x, -x] for x in xs], split, concat, Lasts.LONG)
    for rank, (out, other) in enumerate(outs):
        assert group.ranks[rank].takes([xs[rank], xs[rank]], split, concat)
        expected = torch.cat([x.chunk(size, split)[rank] for x in xs], concat)
        torch.testing.assert_close(out, expected, rtol=0, atol=0)
        torch.testing.assert_close(other, -expected, rtol=0, atol=0)


def summed(xs: list[torch.Tensor]) -> torch.Tensor:
    """In fp32 and in rank order, rounded once."""
    total = xs[0].float()
    for x in xs[1:]:
        total = total + x.float()
    return total.to(xs[0].dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape, dim", [((1, 4, 8, 8), 1), ((1, 4, 8, 8), 2), ((4, 16), 0)])
def test_gathers_and_their_backward_sums(dtype, shape, dim):
    xs, group = tensors(4, shape, dtype), OneProcess(4)
    for out in group.run("all_gather", xs, dim, Lasts.LONG):
        torch.testing.assert_close(out, torch.cat(xs, dim), rtol=0, atol=0)
    for rank, out in enumerate(group.run("reduce_scatter", xs, dim)):
        assert torch.equal(out, summed(xs).chunk(4, dim)[rank])


@pytest.mark.parametrize(
    ("shape", "order", "kept"),
    [
        ((1, 4, 8, 16), (0, 2, 3, 1), True),
        ((1, 4, 8, 16), (3, 1, 2, 0), True),
        ((1, 4, 8, 16), (0, 3, 2, 1), True),
        ((1, 8, 8, 4), (0, 3, 2, 1), False),
    ],
)
def test_gathers_and_sums_stay_in_the_memory_order_of_what_is_exchanged(shape, order, kept):
    """First [B, I, J, c] in memory as [B, c, I, J], like an attention's bias and its gradient; at last such whose
    shares lie side by side, long enough and not.
    """
    xs = [x.permute(order) for x in tensors(2, shape, torch.float32)]
    in_memory = sorted(range(4), key=lambda n: -xs[0].stride(n))
    for out in OneProcess(2).run("all_gather", xs, 1, Lasts.LONG):
        assert torch.equal(out, torch.cat(xs, 1))
        assert out.permute(in_memory).is_contiguous() == kept
    for rank, out in enumerate(OneProcess(2).run("reduce_scatter", xs, 1)):
        assert torch.equal(out, summed(xs).chunk(2, 1)[rank])
        assert out.permute(in_memory).is_contiguous() == kept


def test_eight_ranks_exchange_more_than_a_program_moves():
    xs, group = tensors(8, (1, 8, 16, 40), torch.bfloat16), OneProcess(8)
    for rank, (out,) in enumerate(group.run("all_to_all", [[x] for x in xs], 2, 1, Lasts.LONG)):
        torch.testing.assert_close(out, torch.cat([x.chunk(8, 2)[rank] for x in xs], 1), rtol=0, atol=0)
    wide = tensors(2, (1, 2, 4200 * 2), torch.bfloat16)
    for rank, out in enumerate(OneProcess(2).run("reduce_scatter", wide, 1)):
        assert torch.equal(out, summed(wide).chunk(2, 1)[rank])


def test_exchanges_of_other_strides_and_of_both_stages():
    group = OneProcess(2)
    for shape in ((1, 6, 4, 8), (1, 2, 10, 16), (1, 4, 4, 8)):
        xs = [x.transpose(1, 2) for x in tensors(2, shape, torch.float32)]
        for rank, (out,) in enumerate(group.run("all_to_all", [[x] for x in xs], 1, 2, Lasts.LONG)):
            torch.testing.assert_close(out, torch.cat([x.chunk(2, 1)[rank] for x in xs], 2), rtol=0, atol=0)


@pytest.mark.parametrize(
    "x, dims",
    [
        (torch.zeros(1, 4, 4, 8, dtype=torch.float64), (1, 2)),
        (torch.zeros(1, 4, 4, 6), (1, 2)),  # runs of 24 elements, but not of 8 within the last dimension
        (torch.zeros(1, 4, 4, 2**11), (1, 2)),  # larger than a stage
    ],
)
def test_what_it_does_not_take_is_left_to_the_library(x, dims):
    assert not OneProcess(2).ranks[0].takes([x], *dims)


def test_a_group_uses_them_from_the_moment_it_is_told_to(monkeypatch):
    monkeypatch.setattr(collectives.dist, "get_world_size", lambda processes: 2)
    processes: Any = object()
    group = collectives.Group(processes, OneProcess(2).ranks[0])
    x = torch.randn(1, 4, 4, 8, device=DEVICE)
    assert collectives.all_gather(x, 1, group).shape == (1, 8, 4, 8)
    assert collectives.all_to_all([x], 1, -2, group)[0].shape == (1, 2, 8, 8)
    assert collectives.reduce_scatter(x, -2, group).shape == (1, 4, 2, 8)
    group.disconnect()
    sent = []
    monkeypatch.setattr(collectives.dist, "all_gather_into_tensor", lambda *xs, group: sent.append(group))
    collectives.all_gather(x, 1, group)
    assert sent == [processes]


class Exchanged(torch.autograd.Function):
    """An all-gather whose backward is an exchange too, as in the sharded stacks."""

    @staticmethod
    def forward(ctx, x: Tensor, exchanges: DirectExchanges) -> Tensor:
        ctx.exchanges = exchanges
        return exchanges.all_gather(x, 0, Lasts.LONG)

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.exchanges.reduce_scatter(gradients[0].contiguous(), 0), None


def recorded_steps(monkeypatch: pytest.MonkeyPatch, counts: dict[int, int]) -> dict[int, list[int | str]]:
    """What a real step of R passes does, by R, captured in the order given: stages of its exchanges, and its sums."""
    done: list[int | str] = []
    stages = [torch.zeros(BYTES, dtype=torch.uint8, device=DEVICE) for _ in range(STAGES)]
    views = {torch.float32: [[stage.view(torch.float32)] for stage in stages]}
    exchanges = DirectExchanges(0, 1, stages, views, lambda: done.append((exchanges._turn - 1) % STAGES))
    monkeypatch.setattr(dist, "all_reduce", lambda *args, **kwargs: done.append("sum"))
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 1)
    layer = torch.nn.Linear(8, 8, device=DEVICE)

    def objective(batch, passes: int) -> tuple[Tensor, dict[str, Tensor]]:
        x = layer(batch["x"])
        with torch.no_grad():  # passes without a gradient have no exchanges in their backward
            for _ in range(counts[passes] - 2):
                Exchanged.apply(x, exchanges)
        return Exchanged.apply(x, exchanges).sum(), {}

    flat = FlatParameters(layer, torch.device(DEVICE))
    group: Any = object()
    step = TrainStep(objective, Optimizer(flat, TrainingConfig()), GradientReducer(flat, None), 1, 1, group)
    steps: dict[int, list[int | str]] = {}
    for passes in counts:
        done.clear()
        step._forward_backward({"x": torch.ones(1, 8, device=DEVICE)}, passes, 1, accumulate=False, communicate=True)
        steps[passes] = done.copy()
    return steps


def unsafe_writes(done: Sequence[int | str]) -> list[int]:
    """Places of exchanges that write a stage which a peer may still read: no meeting lies between the two uses."""
    last: dict[int | str, int] = {}
    unsafe = []
    for place, what in enumerate(done):
        if what != "sum":
            if last.get(what) == place - 1:  # every other exchange in between is a barrier, and so is a sum
                unsafe.append(place)
            last[what] = place
    return unsafe


@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
def test_graphs_captured_and_replayed_in_any_order_never_write_a_stage_that_a_peer_may_read(order, monkeypatch):
    counts = {1: 3, 2: 5}
    steps = recorded_steps(monkeypatch, {passes: counts[passes] for passes in order})
    first, second = (steps[passes] for passes in order)
    exchanged = {passes: [what for what in done if what != "sum"] for passes, done in steps.items()}
    assert {passes: len(stages) for passes, stages in exchanged.items()} == counts
    assert first[0] != second[0]  # turns go on
    for replays in itertools.product((first, second), repeat=4):
        assert unsafe_writes([what for done in replays for what in done]) == []
    without_sums = exchanged[1] + exchanged[1]
    assert unsafe_writes(without_sums) == [3]  # odd numbers of exchanges need the sum between two steps


def connected_where_one_rank_cannot(rank: int) -> tuple[bool, bool]:
    """Rank 0 maps its peers, rank 1 does not."""

    def mapped(group: object, device: torch.device) -> DirectExchanges:
        if rank == 1:
            raise OSError("pidfd_getfd: Operation not permitted\nand a long trace")
        return OneProcess(2).ranks[0]

    connect.mapped = mapped
    processes = dist.group.WORLD
    assert processes is not None
    group = collectives.Group(processes)
    connected = connect.connect(group, processes, torch.device(DEVICE))
    return connected, group.direct is not None


@pytest.mark.distributed
def test_all_ranks_stay_with_the_library_where_one_cannot_map_its_peers():
    assert run_ranks(connected_where_one_rank_cannot, 2) == [(False, False), (False, False)]


@pytest.mark.multi_gpu
@pytest.mark.parametrize(
    ("script", "table", "rows"),
    [
        (["benchmarks/measure/symmetric_exchange.py"], "exchange_symmetric.csv", 6),  # all bits
        (["benchmarks/measure/written_exchange.py"], "exchange_written.csv", 6),  # likewise
        (["benchmarks/measure/multi_gpu.py", "--skip-exchanges", "--dap", "2", "--passes", "1"], "step_time.csv", 2),
    ],  # the second: loss and gradient norm of a step at full size equal to one GPU's
)
def test_two_gpus_compute_what_the_library_and_one_gpu_compute(script, table, rows, repository, tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    command = [*TORCHRUN, *script, "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list(csv.DictReader((tmp_path / table).open()))) == rows
