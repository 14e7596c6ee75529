"""The evaluation model: padded chains score like exact ones, captured lengths like uncaptured ones."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from runs import tiny_config
from scalefold.config import Config, RankLayout
from scalefold.data.configured import feature_settings
from scalefold.data.features.features import BatchShape, buffer_bytes, feature_views, fill_sample
from scalefold.data.made.synthetic import synthetic_batch, synthetic_chain
from scalefold.eval.here import EvaluationHere
from scalefold.eval.model import CapturedChain, EvaluationModel
from scalefold.eval.score import ChainScorer, place_chains
from scalefold.kernels.choice import operations
from scalefold.kernels.table import REFERENCE
from scalefold.parallel.ranks import Ranks

CPU = torch.device("cpu")


def config_of(tmp_path: Path, *overrides: str) -> Config:
    return tiny_config(tmp_path, tmp_path / "run", *overrides)


def chain(config: Config, length: int, device: torch.device = CPU, seed: int = 0) -> dict[str, Tensor]:
    settings = feature_settings(config)
    return synthetic_batch(settings, 1, seed=seed, training=False, num_res=length, device=device).features


def padded(config: Config, length: int, seed: int) -> dict[str, Tensor]:
    """Features of a chain as the loader delivers them: padded to a multiple of ``eval_length_multiple``."""
    settings = feature_settings(config)
    padded_length = settings.padded_length(length)
    shape = BatchShape.of(settings, 1, settings.num_slices, training=False, num_res=padded_length)
    buffer = torch.zeros(buffer_bytes(shape), dtype=torch.uint8)
    fill_sample(buffer, shape, 0, synthetic_chain(length, 12, 1, seed), settings, seed)
    return feature_views(buffer, shape)


def draw_weights(model: EvaluationModel, untrained: list[Tensor], seed: int) -> None:
    """Weights of a model that is alive: an untrained one places all atoms at one point."""
    generator = torch.Generator().manual_seed(seed)
    for parameter, start in zip(model.model.parameters(), untrained, strict=True):
        parameter.data.copy_(start + 0.3 * torch.randn(start.shape, generator=generator).to(start.device))


def test_a_padded_chain_scores_like_the_chain_itself(tmp_path: Path) -> None:
    exact, multiple = config_of(tmp_path), config_of(tmp_path, "data.eval_length_multiple=16")
    model = EvaluationModel(exact, CPU, REFERENCE)
    draw_weights(model, [parameter.clone() for parameter in model.model.parameters()], 0)
    scores = []
    for seed in range(3):
        own, with_padding = padded(exact, 21, seed), padded(multiple, 21, seed)
        assert (own["aatype"].shape[1], with_padding["aatype"].shape[1]) == (21, 32)
        scores.append(model.predict(own))
        torch.testing.assert_close(model.predict(with_padding), scores[-1], rtol=0.0, atol=1e-3)
    assert len({float(score) for score in scores}) == 3


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


def test_another_operations_table_is_warmed_up_like_the_first() -> None:
    model, warmed = SimpleNamespace(ops=REFERENCE, use=lambda ops: setattr(model, "ops", ops)), []
    scorer = SimpleNamespace(model=model, warm_up=lambda note: warmed.append(model.ops.name))
    unused = SimpleNamespace(note=print)
    evaluator = EvaluationHere(unused, scorer, *(unused,) * 5)  # type: ignore[arg-type]
    evaluator.use(REFERENCE)
    assert warmed == []
    evaluator.use(operations("triton"))
    assert warmed == ["triton"]


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
    model = scorer.model
    assert len(notes) == 3
    assert set(model._graphs) == {16, 32, 48}
    untrained, scores = [parameter.clone() for parameter in model.model.parameters()], []
    for seed_of_weights in range(2):
        draw_weights(model, untrained, seed_of_weights)
        found = []
        for length in (48, 16, 32):
            for seed in (0, 3):
                features = chain(config, length, ranks.device, seed)
                found.append(model.predict(features))
                with torch.no_grad():
                    torch.testing.assert_close(found[-1], model._score(features), rtol=0.0, atol=1e-3)
        scores.append(torch.cat(found).tolist())
    assert all(a != b for a, b in zip(*scores, strict=True)), scores  # a graph reads the weights of the moment


def test_chains_are_placed_by_cost_longest_first_and_the_same_on_every_rank():
    lengths = {"a": 100, "b": 700, "c": 400, "d": 400, "e": 100, "f": 300}
    placed = place_chains(lengths, 3)
    assert placed == [["b"], ["c", "f"], ["d", "a", "e"]]
    assert place_chains(lengths, 8)[6:] == [[], []]
    many = {f"c{n}": length for n, length in enumerate(np.geomspace(60, 700, 180).astype(int))}
    loads = [sum(many[name] ** 2 for name in chains) for chains in place_chains(many, 32)]
    assert max(loads) < 1.05 * sum(loads) / 32 or max(loads) == max(many.values()) ** 2
