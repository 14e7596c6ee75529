"""The direct exchanges of axial parallelism beside NCCL's, on the GPUs of one host, inside CUDA graphs.

    torchrun --nproc-per-node 4 benchmarks/measure/symmetric_exchange.py

Results are compared, to the bit, with what all ranks have before timing; rows go to ``exchange_symmetric.csv``.
``staged``: read from the peers' stages, as results that somebody holds for long. ``early``: begun before another
exchange, whose barrier serves both; what that adds to the other one. ``barrier``: nothing but the barrier. All move the
same bytes; what NCCL needs besides, to bring parts into order before and after, is left out.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from common import FOLDER, facts
from multi_gpu import EXCHANGE_MIB, MIB, Host, time_exchange, together
from scalefold.parallel.dap.collectives import Lasts
from scalefold.parallel.dap.connect import mapped
from scalefold.parallel.dap.direct import DirectExchanges
from scalefold.parallel.dap.peer_memory import LANE


def measure(host: Host, mib: float, own: DirectExchanges) -> dict[str, object]:
    """One row: microseconds of each exchange, ours and NCCL's; exits with status 1 if ours is wrong."""
    size = host.world
    x = torch.randn(int(mib * MIB / 2) // (size * LANE) * size, LANE, device="cuda").bfloat16()
    expected = expected_of(x, own.rank, size)
    ours: dict[str, Callable[[], Tensor]] = {
        "all_to_all": lambda: all_to_all(own, x),
        "all_gather": lambda: own.all_gather(x, 0, Lasts.SHORT),
        "reduce_scatter": lambda: own.reduce_scatter(x, 0),
    }
    staged: dict[str, Callable[[], Tensor]] = {
        "all_to_all": lambda: own.all_to_all([x[None]], 1, 0, Lasts.LONG)[0].flatten(0, 1),
        "all_gather": lambda: own.all_gather(x, 0, Lasts.LONG),
    }
    early: dict[str, Callable[[], Tensor]] = {"all_to_all": lambda: early_all_to_all(own, x)}
    library: dict[str, Callable[[Tensor, Tensor], object]] = {
        "all_to_all": dist.all_to_all_single,
        "all_gather": dist.all_gather_into_tensor,
        "reduce_scatter": dist.reduce_scatter_tensor,
    }
    row: dict[str, object] = {**facts(), "gpus": size, "mib_per_rank": mib}
    for name, result in expected.items():
        for call in filter(None, (ours[name], staged.get(name), early.get(name))):
            if not torch.equal(call(), result):
                sys.exit(f"rank {own.rank}: {name} of {mib} MiB is not what all ranks have")
        out = torch.empty_like(result)
        row[f"{name}_us"] = round(time_exchange(host, ours[name]), 2)
        row[f"{name}_nccl_us"] = round(time_exchange(host, lambda name=name, out=out: library[name](out, x)), 2)
    row |= {f"{name}_staged_us": round(time_exchange(host, call), 2) for name, call in staged.items()}
    added = time_exchange(host, early["all_to_all"]) - time_exchange(host, lambda: all_to_all(own, x[:size]))
    return row | {"all_to_all_early_us": round(added, 2), "barrier_us": round(time_exchange(host, meet_of(own)), 2)}


def expected_of(x: Tensor, rank: int, size: int) -> dict[str, Tensor]:
    """What each exchange must give, to the bit, from everybody's x: [P n, LANE]; sums in fp32 and in rank order."""
    every = x.new_empty(size, *x.shape)
    dist.all_gather_into_tensor(every, x)
    mine = every.unflatten(1, (size, -1))[:, rank]
    total = torch.zeros_like(mine[0], dtype=torch.float32)
    for part in mine:
        total += part
    return {"all_to_all": mine.flatten(0, 1), "all_gather": every.flatten(0, 1), "reduce_scatter": total.bfloat16()}


def all_to_all(own: DirectExchanges, x: Tensor) -> Tensor:
    """x: [P n, LANE] -> the same shape, parts in rank order."""
    return own.all_to_all([x[None]], 1, 0, Lasts.SHORT)[0].flatten(0, 1)


def early_all_to_all(own: DirectExchanges, x: Tensor) -> Tensor:
    """The same, with the least exchange that there is between its beginning and its end."""
    (out,), wait = own.begin_all_to_all([x[None]], 1, 0, Lasts.SHORT)
    all_to_all(own, x[: own.size])
    wait()
    return out.flatten(0, 1)


def meet_of(own: DirectExchanges) -> Callable[[], object]:
    """The barrier behind results that arrive."""
    assert own.arrivals is not None
    return own.arrivals.barrier


def measure_sizes(host: Host) -> bool:
    """All rows."""
    assert dist.group.WORLD is not None
    own = mapped(dist.group.WORLD, host.device)
    host.keep("exchange_symmetric.csv", [measure(host, mib, own) for mib in EXCHANGE_MIB])
    return True


def main() -> int:
    """Measure on all ranks, print and write on rank 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the table")
    return together(measure_sizes, False, parser.parse_args().out)


if __name__ == "__main__":
    sys.exit(main())
