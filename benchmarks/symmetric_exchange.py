"""Exchanges by own kernels over symmetric memory beside NCCL's, on the GPUs of one host, inside CUDA graphs.

    torchrun --nproc-per-node 4 benchmarks/symmetric_exchange.py

Every rank stages what it sends in memory that all others map, waits at a barrier on the device, and reads its part of
each peer's memory straight into place: one copy, one barrier and one kernel per exchange. Two stages take turns, so
that no second barrier is needed: whoever writes to a stage again has passed a barrier that all others reached after
reading it. No multicast. Results are compared with NCCL's before timing; rows go to ``exchange_symmetric.csv``.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
import triton
import triton.language as tl
from torch import Tensor

from common import FOLDER, facts
from multi_gpu import EXCHANGE_MIB, MIB, Host, join, time_exchange

BLOCK = 4096  # elements per program: 16 bytes for each of 512 threads
STAGES = 2


@triton.jit
def _copy_parts(sources, out, first, count, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Program (block, peer): out[peer, :] = sources[peer][first : first + count]."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    for peer in tl.static_range(SIZE):
        if tl.program_id(1) == peer:
            values = tl.load(sources[peer] + first + index, mask=index < count)
            tl.store(out + peer * count + index, values, mask=index < count)


@triton.jit
def _sum_parts(sources, out, first, count, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Program (block): out = sum over peers of sources[peer][first : first + count], in fp32 and in rank order."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for peer in tl.static_range(SIZE):
        total += tl.load(sources[peer] + first + index, mask=index < count, other=0.0).to(tl.float32)
    tl.store(out + index, total.to(out.dtype.element_ty), mask=index < count)


def gather_parts(sources: Sequence[Tensor], out: Tensor, first: int, count: int) -> None:
    """out: [peers, count], row p from element ``first`` of the memory of peer p."""
    _copy_parts[(triton.cdiv(count, BLOCK), len(sources))](
        tuple(sources), out, first, count, SIZE=len(sources), BLOCK=BLOCK, num_warps=16
    )


def sum_parts(sources: Sequence[Tensor], out: Tensor, first: int, count: int) -> None:
    """out: [count], summed over the same part of every peer's memory."""
    _sum_parts[(triton.cdiv(count, BLOCK),)](
        tuple(sources), out, first, count, SIZE=len(sources), BLOCK=BLOCK, num_warps=16
    )


class Exchanges:
    """All-to-all, all-gather and reduce-scatter of bf16 tensors of up to ``count`` elements per rank."""

    def __init__(self, count: int) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._own, self._peers, self._handles, self._turn = [], [], [], 0
        for _ in range(STAGES):
            stage = symmetric_memory.empty(count, dtype=torch.bfloat16, device=torch.device("cuda", self.rank))
            handle = symmetric_memory.rendezvous(stage, dist.group.WORLD)
            self._own.append(stage)
            self._handles.append(handle)
            self._peers.append([handle.get_buffer(peer, (count,), torch.bfloat16) for peer in range(self.size)])

    def _staged(self, x: Tensor) -> list[Tensor]:
        """Every rank's x of this exchange, readable from here."""
        turn, self._turn = self._turn, (self._turn + 1) % STAGES
        self._own[turn][: x.numel()].copy_(x.view(-1))
        self._handles[turn].barrier(channel=0)
        return self._peers[turn]

    def all_to_all(self, out: Tensor, x: Tensor) -> None:
        """``dist.all_to_all_single``."""
        count = x.numel() // self.size
        gather_parts(self._staged(x), out, self.rank * count, count)

    def all_gather(self, out: Tensor, x: Tensor) -> None:
        """``dist.all_gather_into_tensor``."""
        gather_parts(self._staged(x), out, 0, x.numel())

    def reduce_scatter(self, out: Tensor, x: Tensor) -> None:
        """``dist.reduce_scatter_tensor``."""
        sum_parts(self._staged(x), out, self.rank * out.numel(), out.numel())


def measure(host: Host, mib: float, own: Exchanges) -> dict[str, object]:
    """One row: microseconds of each exchange, ours and NCCL's; exits with status 1 if they disagree."""
    size = host.world
    count = int(mib * MIB / 2) // size * size
    x = torch.randn(count, device="cuda").bfloat16()
    outs = {"all_to_all": count, "all_gather": size * count, "reduce_scatter": count // size}
    ours: dict[str, Callable[[Tensor, Tensor], object]] = {name: getattr(own, name) for name in outs}
    library: dict[str, Callable[[Tensor, Tensor], object]] = {
        "all_to_all": dist.all_to_all_single,
        "all_gather": dist.all_gather_into_tensor,
        "reduce_scatter": dist.reduce_scatter_tensor,
    }
    row: dict[str, object] = {**facts(), "gpus": size, "mib_per_rank": mib}
    for name, length in outs.items():
        out, expected = (torch.empty(length, dtype=x.dtype, device="cuda") for _ in range(2))
        ours[name](out, x)
        library[name](expected, x)
        if not torch.allclose(out.float(), expected.float(), rtol=2e-2, atol=2e-2):  # sums: bf16 in another order
            sys.exit(f"rank {own.rank}: {name} of {mib} MiB differs from NCCL's")
        row[f"{name}_us"] = round(time_exchange(host, lambda name=name, out=out: ours[name](out, x)), 2)
        row[f"{name}_nccl_us"] = round(time_exchange(host, lambda name=name, out=out: library[name](out, x)), 2)
    return row


def main() -> int:
    """Measure on all ranks, print and write on rank 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the table")
    host = join(False, parser.parse_args().out)
    own = Exchanges(int(max(EXCHANGE_MIB) * MIB / 2))
    host.keep("exchange_symmetric.csv", [measure(host, mib, own) for mib in EXCHANGE_MIB])
    host.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
