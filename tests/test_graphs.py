"""The captured training step, the one that every run on a GPU uses, against the eager one."""

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from runs import tiny_config
from scalefold.config import Config, RankLayout
from scalefold.data.configured import feature_settings
from scalefold.data.features.features import BatchShape, FeatureSettings, buffer_bytes, copy_samples, feature_views
from scalefold.data.loading.loader import Batch
from scalefold.data.made.synthetic import synthetic_batch
from scalefold.kernels.table import REFERENCE, use_operations
from scalefold.model.alphafold import AlphaFold
from scalefold.parallel.ranks import Ranks
from scalefold.step import build
from scalefold.step.build import build_model, build_optimizer, build_step, choose_operations
from scalefold.step.graphs import GraphedTrainStep, TrainStep
from scalefold.step.optimizer import Optimizer
from scalefold.step.reducer import GradientReducer

PASSES = 4
SIZES = FeatureSettings(train_sequence_crop_size=16, max_msa_clusters=6, max_extra_msa=8, num_recycling_iters=2)


def test_samples_of_a_flat_batch_are_copied_whole_or_one_by_one() -> None:
    batch = synthetic_batch(SIZES, 3, num_passes=2, seed=3)
    whole = BatchShape.of(SIZES, 3, 3, training=True)
    target = torch.full((buffer_bytes(whole),), 7, dtype=torch.uint8)
    copy_samples(batch.buffer, batch.shape, 0, target, whole)
    for key, value in batch.features.items():
        torch.testing.assert_close(feature_views(target, whole)[key][..., : value.shape[-1]], value, rtol=0, atol=0)
    one = BatchShape.of(SIZES, 1, 3, training=True)
    for first in range(3):
        target = torch.zeros(buffer_bytes(one), dtype=torch.uint8)
        copy_samples(batch.buffer, batch.shape, first, target, one)
        for key, value in batch.features.items():
            copied = feature_views(target, one)[key]
            expected = value[first : first + 1]
            torch.testing.assert_close(copied[..., : expected.shape[-1]], expected, rtol=0, atol=0)


def built(config: Config) -> tuple[AlphaFold, Optimizer, TrainStep]:
    """Model, optimizer and step as a run builds them on one GPU."""
    ranks = Ranks(RankLayout(1), 0, 0, torch.device("cuda", 0))
    ops = choose_operations(config, ranks)
    model = build_model(config, 5, ranks)
    use_operations(model, ops)
    optimizer = build_optimizer(config, model, ranks, ops)
    return model, optimizer, build_step(config, model, optimizer, ranks)


@pytest.mark.parametrize("dap_size", [1, 2, 4, 8])
def test_the_chain_comes_first_where_four_ranks_or_more_share_a_sample(tmp_path, monkeypatch, dap_size) -> None:
    sharing = (f"parallel.ranks_per_node={dap_size}", f"parallel.dap_size={dap_size}")
    config = gpu_config(tmp_path, *sharing)
    monkeypatch.setattr(build, "Side", lambda device: None)
    ranks = Ranks(RankLayout(dap_size, dap_size), 0, 0, torch.device("cuda", 0))
    optimizer = cast(Optimizer, SimpleNamespace(ops=REFERENCE))
    step = build_step(config, cast(AlphaFold, None), optimizer, ranks, cast(GradientReducer, object()))
    assert isinstance(step, GraphedTrainStep)
    assert step.chain_first == (dap_size >= 4)


def gpu_config(tmp_path: Path, *overrides: str) -> Config:
    common = [
        "execution.device=cuda",
        "execution.precision=bf16",
        "execution.cuda_graphs=true",
        f"data.num_recycling_iters={PASSES - 1}",
    ]
    return tiny_config(tmp_path, tmp_path, *common, "training.global_batch_size=1", *overrides)


def batches(config: Config, count: int) -> list[Batch]:
    settings = feature_settings(config)
    return [synthetic_batch(settings, config.local_batch_size, seed=n, device="cuda") for n in range(count)]


def trained(config: Config, order: list[int], graphs: bool) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Logged values of each step, final weights and averages, of steps with these numbers of passes."""
    config = config.model_copy(update={"execution": config.execution.model_copy(update={"cuda_graphs": graphs})})
    _, optimizer, step = built(config)
    assert isinstance(step, GraphedTrainStep) == graphs
    own = batches(config, len(order))
    step.warm_up(own[0], PASSES, lambda text: None)
    values = []
    for number, (batch, passes) in enumerate(zip(own, order, strict=True), 1):
        torch.manual_seed(100 + number)
        values.append(step(batch, passes, number).clone())
    torch.cuda.synchronize()
    return values, optimizer.flat.master, optimizer.averaged


LAYOUTS = {
    "one sample": [],
    "micro batches": ["training.global_batch_size=3", "execution.micro_batch_size=1"],
    "two samples at once": ["training.global_batch_size=2", "execution.micro_batch_size=2"],
    "accumulation": [
        "training.gradient_accumulation_steps=2",
        "training.global_batch_size=2",
        "execution.micro_batch_size=1",
    ],
}


@pytest.mark.gpu
@pytest.mark.parametrize("overrides", LAYOUTS.values(), ids=LAYOUTS)
def test_graphs_give_the_bits_of_the_eager_step_for_every_number_of_passes(
    tmp_path: Path, overrides: list[str]
) -> None:
    config, order = gpu_config(tmp_path, *overrides), [1, 3, 2, 4, 4, 1]
    captured, eager = trained(config, order, True), trained(config, order, False)
    for one, other in zip(captured[0], eager[0], strict=True):
        assert torch.equal(one, other)
    assert torch.equal(captured[1], eager[1])
    assert torch.equal(captured[2], eager[2])


@pytest.fixture
def finite_at_every_update(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether all weights were finite after each update that ran outside a capture."""
    seen: list[bool] = []
    apply = Optimizer.apply

    def watched(self: Optimizer) -> None:
        apply(self)
        if not torch.cuda.is_current_stream_capturing():
            seen.append(bool(torch.isfinite(self.flat.master).all() and torch.isfinite(self.averaged).all()))

    monkeypatch.setattr(Optimizer, "apply", watched)
    return seen


@pytest.mark.gpu
@pytest.mark.parametrize("overrides", LAYOUTS.values(), ids=LAYOUTS)
def test_warm_up_puts_every_bit_of_the_state_back_and_makes_no_nan(
    tmp_path: Path, overrides: list[str], finite_at_every_update: list[bool]
) -> None:
    config = gpu_config(tmp_path, *overrides)
    model, optimizer, step = built(config)
    assert isinstance(step, GraphedTrainStep)
    state = [optimizer.flat.master, optimizer.exp_avg, optimizer.exp_avg_sq, optimizer.averaged, optimizer.grad_norm]
    state += [*optimizer.flat.gradients.values(), *model.parameters()]
    before = [tensor.detach().clone() for tensor in state]
    step.warm_up(batches(config, 1)[0], PASSES, lambda text: None)
    assert finite_at_every_update
    assert all(finite_at_every_update)
    assert all(torch.equal(tensor.detach(), copy) for tensor, copy in zip(state, before, strict=True))
    assert (optimizer.adam_step, optimizer.num_averaged) == (0, 0)


@pytest.mark.gpu
def test_graphs_that_share_memory_may_be_replayed_in_any_order(tmp_path: Path) -> None:
    config = gpu_config(tmp_path)
    _, optimizer, step = built(config)
    own = batches(config, PASSES)
    step.warm_up(own[0], PASSES, lambda text: None)
    flat = optimizer.flat
    start = [t.clone() for t in (flat.master, optimizer.exp_avg, optimizer.exp_avg_sq, optimizer.averaged)]

    def gradients(passes: int) -> list[torch.Tensor]:
        """Of one step from the first state."""
        for tensor, copy in zip(
            (flat.master, optimizer.exp_avg, optimizer.exp_avg_sq, optimizer.averaged), start, strict=True
        ):
            tensor.copy_(copy)
        flat.refresh()
        torch.manual_seed(passes)
        step(own[passes - 1], passes, 1)
        return [gradient.clone() for gradient in flat.gradients.values()]

    alone = {passes: gradients(passes) for passes in range(1, PASSES + 1)}
    for passes in (4, 1, 3, 1, 2, 4, 2, 3):
        assert all(torch.equal(a, b) for a, b in zip(gradients(passes), alone[passes], strict=True)), passes


@pytest.mark.gpu
def test_a_closed_step_holds_no_graph(tmp_path: Path) -> None:
    config = gpu_config(tmp_path)
    _, _, step = built(config)
    step.warm_up(batches(config, 1)[0], PASSES, lambda text: None)
    held = torch.cuda.memory_reserved()
    step.close()
    assert torch.cuda.memory_reserved() < held
    assert isinstance(step, GraphedTrainStep)
    assert not step._graphs


@pytest.mark.gpu
def test_a_step_captured_after_another_one_takes_no_more_memory(tmp_path: Path) -> None:
    config = gpu_config(tmp_path)
    _, _, step = built(config)
    torch.cuda.empty_cache()
    held = []
    for _ in range(3):
        torch.cuda.reset_peak_memory_stats()
        step.warm_up(batches(config, 1)[0], PASSES, lambda text: None)
        held.append(torch.cuda.max_memory_reserved())
        step.close()
    assert max(held) < 1.1 * held[0]
