"""Exchanges whose operand is written to where it belongs by the program that makes it, beside direct ones behind it.

    torchrun --nproc-per-node 2 benchmarks/measure/written_exchange.py

For each pattern of a block at the benchmark's shapes, shared by all GPUs of the call, inside CUDA graphs and launched
as in a step: ``maker_us`` the program whose result stays here; ``direct_us`` what the direct exchange behind it adds;
``written_us`` what it takes longer where it writes to all ranks and they meet. Rows go to ``exchange_written.csv``.
Both ways are compared first, to the bit. Exit status 1 if they differ, or where an operand was not written ahead.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from common import FOLDER, facts
from multi_gpu import Host, time_exchange, together
from scalefold.kernels.choice import operations
from scalefold.kernels.destination import Destination, OfOperands
from scalefold.kernels.table import Operations
from scalefold.parallel.dap.collectives import Group, Lasts, all_gather, gather_destination
from scalefold.parallel.dap.connect import mapped
from scalefold.parallel.dap.halves import TWO
from scalefold.parallel.dap.points import ExchangeAhead, ExchangeOperands, GatherShared
from scalefold.tune.operation_cases import MSA, Draw, N

C_M, C_Z, HEADS_M, HEADS_Z, C_OUTER = 256, 128, 8, 4, 32


@dataclass(frozen=True)
class Pattern:
    """An operation and the exchange behind it.

    Attributes:
        make: the operands of the exchange; the argument: destinations of as many, each may be None.
        destinations: those of the exchange.
        exchange: what arrives.
    """

    name: str
    make: Callable[[OfOperands], Sequence[Tensor]]
    destinations: Callable[[], OfOperands]
    exchange: Callable[[Sequence[Tensor]], Sequence[Tensor]]

    def alone(self) -> Sequence[Tensor]:
        """The program, whose result stays here."""
        return self.make((None, None))

    def direct(self) -> Sequence[Tensor]:
        """It, and a direct exchange."""
        return self.exchange(self.make((None, None)))

    def written(self) -> Sequence[Tensor]:
        """It, writing to all ranks, and their barrier."""
        return self.exchange(self.make(self.destinations()))


def patterns(ops: Operations, group: Group) -> Iterator[Pattern]:
    """Those of an Evoformer block."""
    draw, size = Draw(False, torch.bfloat16), group.size
    draw.generator.manual_seed(1 + group.rank)  # every rank has operands of its own
    z, m = draw(1, N // size, N, C_Z), draw(1, MSA // size, N, C_M)
    yield gated(ops, group, "gated output of pairs", z, draw)
    yield gated(ops, group, "gated output of the MSA", m, draw)
    yield operands(ops, group, z, draw)
    weights = [draw.weight(C_Z, C_Z) for _ in range(4)] + [draw.weight(HEADS_Z, C_Z)]
    yield projections(ops, "bias of a triangle's attention", z, weights, draw, GatherShared(group, 1, True))
    columns, weights = draw(1, N, N // size, C_Z), [draw.weight(HEADS_M, C_Z)]
    yield projections(ops, "bias of row attention", columns, weights, draw, GatherShared(group, 2, True))
    yield outer_operand(ops, group, draw(1, MSA, N // size, C_M), draw)


def gated(ops: Operations, group: Group, name: str, x: Tensor, draw: Draw) -> Pattern:
    """Each rank gets its columns."""
    c, point = x.shape[-1], ExchangeAhead(group, split_dim=2, concat_dim=1)
    o, gate, weight, bias = draw(*x.shape[:-1], c // 32, 32), draw(*x.shape), draw.weight(c, c), draw(c)
    dropout = draw.dropout(1, 1, *x.shape[2:])
    return Pattern(
        name,
        lambda to: [ops.gated_output(x, o, gate, weight, bias, dropout, to[0])],
        lambda: (point.destination(x, c), None),
        lambda made: [point(made[0])],
    )


def operands(ops: Operations, group: Group, z: Tensor, draw: Draw) -> Pattern:
    """Each of two ranks gets all of b of outgoing edges, each of more its channels of a and b."""
    mask = draw.ones(*z.shape[:3])
    given = [mask, *draw.norm(C_Z), *(x for _ in range(4) for x in (draw.weight(C_Z, C_Z), draw(C_Z)))]
    if group.size > TWO:
        point = ExchangeOperands(group, split_dim=1, concat_dim=2)
        return Pattern(
            "operands of a triangle",
            lambda to: ops.triangle_project(z, *given, to)[1:],
            lambda: point.destinations(z, C_Z),
            lambda made: point(tuple(made)),
        )
    b, ahead = z.new_empty(1, C_Z, *z.shape[1:3], device="meta"), list[Destination | None]()

    def destinations() -> OfOperands:
        ahead.append(gather_destination(b, 2, group))
        return None, ahead[-1]

    return Pattern(
        "operand of outgoing edges",
        lambda to: ops.triangle_project(z, *given, to)[2:],
        destinations,
        lambda made: [all_gather(made[0], 2, group, Lasts.SHORT, ahead.pop() if ahead else None)],
    )


def projections(
    ops: Operations, name: str, x: Tensor, weights: Sequence[Tensor], draw: Draw, point: GatherShared
) -> Pattern:
    """All ranks get the last one."""
    norm, width = draw.norm(x.shape[-1]), len(weights[-1])
    biases = [draw(len(weight)) if n == 3 else None for n, weight in enumerate(weights)]
    return Pattern(
        name,
        lambda to: ops.layer_norm_linear(x, *norm, weights, biases, to[0])[-1:],
        lambda: (point.destination(x, width), None),
        lambda made: [point(made[0])],
    )


def outer_operand(ops: Operations, group: Group, m: Tensor, draw: Draw) -> Pattern:
    """All ranks get b."""
    point = GatherShared(group, 2)
    linears = [x for _ in range(2) for x in (draw.weight(C_OUTER, C_M), draw(C_OUTER))]
    given = [draw.ones(*m.shape[:3]), *draw.norm(C_M), *linears]
    return Pattern(
        "operand of the outer product",
        lambda to: ops.outer_product_project(m, *given, to[0])[2:],
        lambda: (point.destination(m, C_OUTER), None),
        lambda made: [point(made[0])],
    )


def measure(host: Host, pattern: Pattern) -> dict[str, object]:
    """One row; exits with status 1 if both ways do not give the same."""
    expected, ahead = pattern.direct(), pattern.destinations()
    found = pattern.exchange(pattern.make(ahead))
    if not any(to is not None and to.written for to in ahead):
        sys.exit(f"{pattern.name}: nothing was written ahead")
    if not all(map(torch.equal, expected, found)):
        sys.exit(f"rank {host.rank}: {pattern.name}: what was written is not what is sent")
    maker, direct, written = (time_exchange(host, call) for call in (pattern.alone, pattern.direct, pattern.written))
    mib = sum(x.numel() * x.element_size() for x in pattern.alone()) / 2**20
    row: dict[str, object] = {**facts(), "gpus": host.world, "pattern": pattern.name, "mib": round(mib, 2)}
    row |= {"maker_us": round(maker, 2), "direct_us": round(direct - maker, 2), "written_us": round(written - maker, 2)}
    return row


@torch.no_grad()
def measure_patterns(host: Host) -> bool:
    """All rows."""
    assert dist.group.WORLD is not None
    group = Group(dist.group.WORLD, mapped(dist.group.WORLD, host.device))
    for pattern in patterns(operations("triton", early=True), group):
        host.keep("exchange_written.csv", [measure(host, pattern)])
    return True


def main() -> int:
    """Measure on all ranks, print and write on rank 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the table")
    return together(measure_patterns, False, parser.parse_args().out)


if __name__ == "__main__":
    sys.exit(main())
