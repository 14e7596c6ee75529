"""All-reduce over all ranks before a run: are the sums right, and how fast is the network?

``python -m scalefold.launch.network_check --min-gb-per-s 100`` under srun or torchrun. Exit status 0: fine; 1: a wrong
sum or too slow. On GPUs the buffer is as large as the gradients of the model in bf16.
"""

import argparse
import datetime
import os
import sys
import time

import torch
import torch.distributed as dist

from scalefold.mlperf.log.keys import PARAMETERS_COUNT
from scalefold.parallel.ranks import read_environment

NUM_ELEMENTS = {"cuda": PARAMETERS_COUNT, "cpu": 1_000_000}


def main(arguments: list[str] | None = None) -> int:
    """Join, measure, print one line on rank 0 and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--min-gb-per-s", type=float, default=0.0, help="bus bandwidth to reach; 0: check sums only")
    parser.add_argument("--elements", type=int, help="length of the buffer")
    options = parser.parse_args(arguments)
    here = read_environment()
    os.environ |= {"RANK": str(here.rank), "WORLD_SIZE": str(here.world_size), "LOCAL_RANK": str(here.local_rank)}
    device = torch.device("cuda", here.local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(minutes=5))
    num_elements = options.elements or NUM_ELEMENTS[device.type]
    try:
        wrong, seconds = measure(num_elements, device)
    finally:
        dist.destroy_process_group()
    rate = bus_gb_per_s(num_elements, here.world_size, seconds)
    if wrong:
        print(f"rank {here.rank} on {os.uname().nodename}: {wrong} wrong sums in an all-reduce", file=sys.stderr)
    if here.rank == 0:
        wanted = f", wanted {options.min_gb_per_s:g}" if options.min_gb_per_s else ""
        print(
            f"network check: {here.world_size} ranks, {1e3 * seconds:.2f} ms, bus {rate:.1f} GB/s{wanted}", flush=True
        )
    return int(wrong > 0 or rate < options.min_gb_per_s)


def measure(num_elements: int, device: torch.device, repeats: int = 5) -> tuple[int, float]:
    """Number of wrong sums over all repeats, and seconds of the fastest all-reduce as its slowest rank saw it.

    Rank r contributes ones where the index is r modulo the number of ranks, so every sum is one, exactly.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    share = (torch.arange(num_elements, device=device) % size == rank).to(torch.bfloat16)
    wrong, best = 0, float("inf")
    for _ in range(repeats + 1):  # the first one connects
        buffer = share.clone()
        dist.barrier()
        _wait(device)
        start = time.perf_counter()
        dist.all_reduce(buffer)
        _wait(device)
        seconds = torch.tensor([time.perf_counter() - start], device=device)
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        best = min(best, float(seconds))
        wrong += int((buffer != 1).sum())
    return wrong, best


def bus_gb_per_s(num_elements: int, world_size: int, seconds: float) -> float:
    """Bytes that the slowest link of a ring carries per second: 2 (n - 1) / n of the buffer, bf16."""
    return 2 * num_elements * 2 * (world_size - 1) / world_size / seconds / 1e9


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    sys.exit(main())
