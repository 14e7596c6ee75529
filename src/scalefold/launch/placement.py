"""Where the ranks of a run sit, held against where its configuration puts them, before any clock starts.

Ranks fill one node after the other: rank r belongs to node r // (ranks per node). The ranks of a DAP group share a
node's memory and its fastest links, and evaluation ranks stay off the nodes that train; another order of the launcher
(Slurm's ``--distribution=cyclic``, a host file) breaks both without any error of its own.
"""

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from scalefold.config import RankLayout
from scalefold.errors import ConfigError
from scalefold.parallel.ranks import Ranks


@dataclass(frozen=True)
class Seat:
    """A rank's place: node, GPU (its UUID; empty on a CPU) and network card (empty: NCCL's choice)."""

    rank: int
    node: str
    gpu: str = ""
    nic: str = ""


@dataclass(frozen=True)
class Placement:
    """All ranks' places, and one sentence about them."""

    seats: tuple[Seat, ...]
    text: str

    def facts(self) -> dict[str, object]:
        """For the record: ranks per node in the order of nodes, GPUs and network cards by rank where there are any."""
        found: dict[str, object] = {"text": self.text, "nodes": ranks_by_node(self.seats)}
        for name in ("gpu", "nic"):
            values = [getattr(seat, name) for seat in self.seats]
            if any(values):
                found[name] = values
        return found


def check_placement(ranks: Ranks, ranks_per_node: int) -> Placement:
    """Collect every rank's place and compare; all ranks call it and get the same answer.

    Raises:
        ConfigError: ranks that belong to one node are on several, or two ranks have the same GPU.
    """
    seats = [find_seat(ranks)]
    if ranks.layout.world_size > 1:
        gathered: list[Seat | None] = [None] * ranks.layout.world_size
        dist.all_gather_object(gathered, seats[0], group=ranks.control_group)
        seats = [seat for seat in gathered if seat is not None]
    for problem in problems(seats, ranks.layout, ranks_per_node):
        raise ConfigError(f"placement: {problem}")
    return Placement(tuple(seats), describe(seats, ranks.layout))


def find_seat(ranks: Ranks) -> Seat:
    """Where this process is; a node has the name that Slurm knows it by, else the host's."""
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    cuda = ranks.device.type == "cuda"
    gpu = str(torch.cuda.get_device_properties(ranks.device).uuid) if cuda else ""
    return Seat(ranks.rank, node, gpu, os.environ.get("NCCL_IB_HCA", "").removeprefix("="))


def problems(seats: Sequence[Seat], layout: RankLayout, ranks_per_node: int) -> list[str]:
    """What does not hold, the gravest first."""
    found, advice = [], "start ranks in blocks (srun --distribution=block; `scalefold launch` does)"
    for first in range(0, layout.num_train_ranks, layout.dap_size):
        group = [seats[rank] for rank in layout.dap_group(first)]
        if len({seat.node for seat in group}) > 1:
            found.append(f"the DAP group of {_listed(group)} spans nodes, and shares a node's memory; {advice}")
    for first in range(0, layout.world_size, ranks_per_node):
        together = seats[first : first + ranks_per_node]
        if len({seat.node for seat in together}) > 1:
            evaluates = ", evaluation among them," if not layout.trains(together[-1].rank) else ""
            found.append(f"{_listed(together)}{evaluates} belong on one node by parallel: nodes; {advice}")
    owners: dict[str, Seat] = {}
    for seat in seats:
        if seat.gpu and owners.setdefault(seat.gpu, seat) is not seat:
            found.append(
                f"{_listed([owners[seat.gpu], seat])} have the same GPU {seat.gpu}; every rank must see all GPUs of "
                "its node (no --gpu-bind, no CUDA_VISIBLE_DEVICES)"
            )
    return found


def describe(seats: Sequence[Seat], layout: RankLayout) -> str:
    """``placement: 4 ranks on 2 nodes: node0: 0-1, node1: 2-3; DAP-2 groups inside nodes; 3 evaluates on node1``."""
    nodes = ranks_by_node(seats)
    named = [f"{node}: {ranks}" for node, ranks in nodes.items()]
    shown = named if len(named) <= 4 else [*named[:2], "...", named[-1]]
    parts = [f"placement: {len(seats)} ranks on {len(nodes)} nodes: {', '.join(shown)}"]
    if layout.dap_size > 1:
        parts.append(f"DAP-{layout.dap_size} groups inside nodes")
    if evaluators := [seats[rank] for rank in layout.eval_ranks]:
        places = list(dict.fromkeys(seat.node for seat in evaluators))
        ends = places[0] if len(places) == 1 else f"{places[0]} to {places[-1]}"
        parts.append(f"{_spans([seat.rank for seat in evaluators])} evaluate on {ends}")
    if cards := sorted({seat.nic for seat in seats} - {""}):
        parts.append(f"network cards {', '.join(cards)}")
    return "; ".join(parts)


def ranks_by_node(seats: Sequence[Seat]) -> dict[str, str]:
    """Node -> its ranks as text, in the order in which nodes appear."""
    nodes: dict[str, list[int]] = {}
    for seat in seats:
        nodes.setdefault(seat.node, []).append(seat.rank)
    return {node: _spans(ranks) for node, ranks in nodes.items()}


def _spans(ranks: Sequence[int]) -> str:
    """``0-3,8``: runs of neighbours."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def _listed(seats: Sequence[Seat]) -> str:
    return "ranks " + ", ".join(f"{seat.rank} ({seat.node})" for seat in seats)
