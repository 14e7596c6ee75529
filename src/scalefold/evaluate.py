"""One weight snapshot -> the average lDDT-Cα over the evaluation chains.

The benchmark evaluates the averaged (SWA) weights in evaluation mode, uncropped, one chain at a time, with all four
recycling passes and features that depend on the chain's name only (training specification, section 2).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from scalefold.errors import TrainingError


@dataclass(frozen=True)
class Evaluation:
    """Result of one evaluation: per-chain scores, their plain mean, and the seconds it took."""

    chains: dict[str, float]
    seconds: float

    @property
    def lddt_ca(self) -> float:
        """Mean over chains, each counted once."""
        return sum(self.chains.values()) / len(self.chains)


def place_chains(lengths: dict[str, int], num_ranks: int) -> list[list[str]]:
    """Chains per rank: longest first, each to the least loaded rank, cost length squared; ties to the lowest rank.

    Equal lengths keep the order of ``lengths``, so every rank computes the same placement.
    """
    loads = [0] * num_ranks
    placed: list[list[str]] = [[] for _ in range(num_ranks)]
    for chain in sorted(lengths, key=lambda name: -lengths[name]):
        target = min(range(num_ranks), key=lambda rank: loads[rank])
        placed[target].append(chain)
        loads[target] += lengths[chain] ** 2
    return placed


@torch.no_grad()
def score_chains(
    predict: Callable[[dict[str, Tensor]], Tensor], chains: Iterable[tuple[str, dict[str, Tensor]]]
) -> dict[str, float]:
    """lDDT-Cα of each (name, batch of one chain); ``predict`` maps a batch to its score, a device scalar.

    Scores stay on the device until all chains are done: no synchronisation between chains.
    """
    names, scores = [], []
    for name, batch in chains:
        names.append(name)
        scores.append(predict(batch).reshape(()).double())
    values = torch.stack(scores).cpu().tolist() if scores else []
    return dict(zip(names, values, strict=True))


def gather_scores(
    local: dict[str, float], expected: Iterable[str], group: dist.ProcessGroup | None
) -> dict[str, float]:
    """Scores of all ranks of ``group`` on every one of them, each chain exactly once.

    Raises:
        TrainingError: a chain is missing, scored twice, or its score is not finite.
    """
    parts: list[dict[str, float] | None] = [local]
    if group is not None:
        parts = [None] * dist.get_world_size(group)
        dist.all_gather_object(parts, local, group=group)
    pairs = [pair for part in parts if part for pair in part.items()]
    scores, expected = dict(pairs), list(expected)
    if len(pairs) != len(scores) or set(scores) != set(expected):
        problem = sorted(set(expected) ^ set(scores)) or sorted(name for name, _ in pairs)
        raise TrainingError(f"evaluation: {len(pairs)} scores for {len(expected)} chains (first problem: {problem[0]})")
    bad = [name for name, value in scores.items() if not 0.0 <= value <= 1.0 + 1e-6]
    if bad:
        raise TrainingError(f"evaluation: chain {bad[0]} has lDDT-Cα {scores[bad[0]]}; its prediction is not finite")
    return {name: scores[name] for name in expected}
