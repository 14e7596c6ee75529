"""Fusion of the parts around the trunk: whole regions, equal values and gradients, and a way back."""

import logging

import pytest
import torch
import torch._dynamo
from torch import Tensor

from parity import golden, whole
from scalefold.config import LossConfig
from scalefold.model import loss, select_slice
from scalefold.step import fuse

# Captures regions, differentiates and partitions them as for Inductor, but runs the graphs without generating code.
TRACED = "aot_eager_decomp_partition"


@pytest.fixture(autouse=True)
def forget_compiled() -> None:
    torch._dynamo.reset()


def step(fused: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Logged values and gradients of a training step with two passes, with dropout."""
    model, terms, batch = golden.small_model().train(), loss.loss_terms(LossConfig()), golden.small_batch()
    if fused:
        fuse.fuse_model(model, TRACED)
        terms = fuse.fuse_terms(terms, TRACED)
    torch.manual_seed(3)
    total, logged = loss.total_of_terms(model(batch, 2), select_slice(batch, 1), terms)
    total.backward()
    regions = [getattr(model.get_submodule(path), name) for path, names in fuse.REGIONS.items() for name in names]
    regions += [function for _, function in terms.values()]
    assert all(isinstance(region, fuse.Region) is fused for region in regions)
    assert not fused or all(region.compiled is not None for region in regions), "a region went back to plain"
    return logged, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.long
def test_a_fused_step_draws_the_same_dropout_and_gives_the_same_losses_and_gradients() -> None:
    torch._dynamo.utils.counters.clear()
    (plain, plain_gradients), (fused, gradients) = step(False), step(True)
    assert not torch._dynamo.utils.counters["graph_break"]
    for name, value in plain.items():
        torch.testing.assert_close(fused[name], value, rtol=1e-5, atol=1e-6, msg=name)
    assert gradients.keys() == plain_gradients.keys()
    scale = max(value.norm() for value in plain_gradients.values())
    for name, value in plain_gradients.items():
        assert (gradients[name] - value).norm() <= 1e-4 * value.norm() + 1e-7 * scale, name


def test_generated_code_gives_the_same_torsion_loss() -> None:
    if not fuse.can_fuse(torch.device("cpu")):
        pytest.skip("no C++ compiler that Inductor can use")
    region = fuse.Region("supervised_chi", loss.supervised_chi_loss)
    batch, values = select_slice(golden.small_batch(), 2), []
    for function in (loss.supervised_chi_loss, region):
        outputs = {key: value.clone().requires_grad_() for key, value in whole.reference_outputs().items()}
        result = function(outputs, batch)
        result.sum().backward()
        values.append((result.detach(), outputs["sm_angles"].grad, outputs["sm_unnormalized_angles"].grad))
    assert region.compiled is not None
    torch.testing.assert_close(values[1], values[0])


def test_a_region_that_cannot_be_compiled_stays_plain_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    def breaking(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x + 1

    region = fuse.Region("breaking", breaking)
    with caplog.at_level(logging.WARNING):
        assert region(torch.ones(2)).tolist() == [2.0, 2.0]
    assert "fusion: breaking stays plain: " in caplog.text
    assert region(torch.zeros(2)).tolist() == [1.0, 1.0]
    assert len(caplog.records) == 1


def test_without_a_working_compiler_nothing_is_fused_and_the_reason_is_logged(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no compiler\nand a long explanation")

    monkeypatch.setattr(torch, "compile", broken)
    with caplog.at_level(logging.WARNING):
        assert not fuse.can_fuse(torch.device("cpu"))
    assert "because the compiler fails: RuntimeError: no compiler" in caplog.text
    assert "long explanation" not in caplog.text
