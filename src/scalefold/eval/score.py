"""One weight snapshot -> the average lDDT-Cα over the evaluation chains.

The benchmark evaluates the averaged (SWA) weights in evaluation mode, uncropped, one chain at a time, with all four
recycling passes and features that depend on the chain's name only (training specification, section 2).
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from scalefold.config import Config
from scalefold.data.configured import batch_limits_s
from scalefold.data.features.features import FeatureSettings
from scalefold.data.loading.loader import EvalSet, to_device
from scalefold.data.made.synthetic import synthetic_batch
from scalefold.errors import TrainingError
from scalefold.eval.model import EvaluationModel
from scalefold.kernels.table import Operations
from scalefold.parallel.ranks import Ranks
from scalefold.step.parameters import FlatLayout


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
        try:
            scores.append(predict(batch).reshape(()).double())
        except torch.OutOfMemoryError as error:
            raise torch.OutOfMemoryError(f"chain {name}: {error}") from error
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


class ChainScorer:
    """This rank's share of the evaluation chains: features built once, kept in memory, scored on demand."""

    def __init__(
        self, config: Config, ranks: Ranks, settings: FeatureSettings, ops: Operations, group: dist.ProcessGroup | None
    ) -> None:
        self.config, self.settings, self.group = config, settings, group
        self.model = EvaluationModel(config, ranks.device, ops)
        self.names: list[str] = []
        d = config.data
        self._chains = EvalSet(
            d.store_dir,
            settings,
            num_workers=d.num_eval_workers,
            pin_memory=d.pin_memory and self.model.device.type == "cuda",
            limit_s=batch_limits_s(config)[0],
        )

    def spawn(self) -> None:
        """Start the processes that build features; they touch no data yet."""
        self._chains.spawn()

    def warm_up(self, note: Callable[[str], None]) -> None:
        """Synthetic chains through the model, unless the configuration leaves warm-up out.

        On a GPU one of every padded length, so that nothing compiles on the clock, and captured in a CUDA graph where
        the configuration wants graphs; the longest first, whose memory then serves the others.
        """
        execution, device = self.config.execution, self.model.device
        if not execution.warm_up:
            return
        lengths = [self.settings.train_sequence_crop_size]
        if device.type == "cuda":
            step = self.settings.eval_length_multiple
            longest = self.settings.padded_length(self.config.data.val_max_sequence_length)
            lengths = list(range(longest, 0, -step))
        prepare = self.model.capture if device.type == "cuda" and execution.cuda_graphs else self.model.predict
        for number, length in enumerate(lengths, 1):
            note(f"evaluation {number}/{len(lengths)}: a chain of {length} residues")
            prepare(synthetic_batch(self.settings, 1, device=device, training=False, num_res=length).features)

    def open_data(self, lengths: dict[str, int]) -> None:
        """Place the chains over the ranks of the group and start to build features."""
        self.names = list(lengths)
        size, rank = (dist.get_world_size(self.group), dist.get_rank(self.group)) if self.group else (1, 0)
        padded = {name: self.settings.padded_length(length) for name, length in lengths.items()}
        self._chains.start(place_chains(padded, size)[rank])

    def score(self, flat: FlatLayout, weights: Tensor) -> Evaluation:
        """Evaluate ``weights`` on all chains; the same result on every rank of the group."""
        start = time.monotonic()
        self.model.load(flat, weights)
        local = score_chains(self.model.predict, self._on_device())
        chains = gather_scores(local, self.names, self.group)
        return Evaluation(chains, time.monotonic() - start)

    def _on_device(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        for batch in self._chains:
            yield batch.chain_ids[0], to_device(batch, self.model.device).features

    def close(self) -> None:
        """End the workers that build features."""
        self._chains.close()
