"""The evaluation model: padded chains score like exact ones, captured lengths like uncaptured ones."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from runs import tiny_config
from scalefold.config import Config
from scalefold.data.synthetic import synthetic_batch
from scalefold.evaluators import CapturedChain, ChainScorer, EvaluationModel
from scalefold.kernels import REFERENCE, operations
from scalefold.parallel.ranks import RankLayout, Ranks
from scalefold.run import feature_settings

CPU = torch.device("cpu")


def config_of(tmp_path: Path, *overrides: str) -> Config:
    return tiny_config(tmp_path, tmp_path / "run", *overrides)


def chain(config: Config, length: int, device: torch.device = CPU, seed: int = 0) -> dict[str, Tensor]:
    settings = feature_settings(config)
    return synthetic_batch(settings, 1, seed=seed, training=False, num_res=length, device=device).features


@dataclass
class FakeGraph:
    """Runs what a graph would have recorded."""

    model: EvaluationModel
    inputs: dict[str, Tensor]
    score: Tensor
    replays: int = 0

    def replay(self) -> None:
        self.replays += 1
        self.score.copy_(self.model._score(self.inputs))


def test_a_captured_length_reads_each_chain_and_hands_out_scores_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tmp_path)
    model = EvaluationModel(config, CPU, REFERENCE)
    monkeypatch.setattr(model, "_score", lambda features: features["aatype"].double().mean(1))  # untrained: lDDT is 0
    chains = [chain(config, 16, seed=0), chain(config, 16, seed=3)]
    with torch.no_grad():
        expected = [model.predict(features) for features in chains]
        inputs = {key: torch.zeros_like(value) for key, value in chains[0].items()}
        graph = FakeGraph(model, inputs, torch.zeros_like(expected[0]))
        model._graphs[16] = CapturedChain(graph, inputs, graph.score)  # type: ignore[arg-type]
        found = [model.predict(features) for features in chains]
        model.predict(chain(config, 24))
    assert graph.replays == 2
    assert not torch.equal(expected[0], expected[1])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_another_operations_table_discards_the_graphs_of_the_first(tmp_path: Path) -> None:
    model = EvaluationModel(config_of(tmp_path), CPU, REFERENCE)
    model._graphs[16] = CapturedChain(None, {}, torch.zeros(1))  # type: ignore[arg-type]
    model.use(REFERENCE)
    assert 16 in model._graphs
    model.use(operations("triton"))
    assert not model._graphs
    assert model.model.evoformer_stack.blocks[0].msa_att_row.ops.name == "triton"


@pytest.mark.gpu
def test_captured_chains_of_all_padded_lengths_score_as_uncaptured_ones(tmp_path: Path) -> None:
    config = config_of(
        tmp_path,
        *("execution.device=cuda", "execution.eval_precision=bf16", "execution.cuda_graphs=true"),
        *("execution.warm_up=true", "data.eval_length_multiple=16", "data.val_max_sequence_length=40"),
    )
    ranks = Ranks(RankLayout(1), 0, 0, torch.device("cuda", 0))
    scorer, notes = ChainScorer(config, ranks, feature_settings(config), operations("triton"), None), []
    scorer.warm_up(notes.append)
    assert len(notes) == 3
    for length in (16, 32, 48):
        features = chain(config, length, ranks.device)
        with torch.no_grad():
            torch.testing.assert_close(scorer.model.predict(features), scorer.model._score(features))
