"""Gradient norms by module that several GPUs are held against."""

import pytest
from torch.backends.cuda import matmul

from scalefold.config import load_config


@pytest.fixture
def rounded_products():
    """How products of fp32 tensors are rounded, a setting of the process, is put back."""
    before = matmul.allow_tf32
    yield
    matmul.allow_tf32 = before


def test_what_is_timed_after_a_step_in_fp32_computes_as_if_there_had_been_none(
    monkeypatch, repository, rounded_products
):
    monkeypatch.syspath_prepend(str(repository / "benchmarks" / "measure"))
    import multi_gpu as module

    seen = []
    config = load_config(repository / "configs" / "base.yaml").config
    tiny = repository / "configs" / "tiny.yaml"
    monkeypatch.setattr(module, "load_config", lambda _, overrides: load_config(tiny, overrides))
    monkeypatch.setattr(module, "first_values", lambda *_: (seen.append(matmul.allow_tf32), ({}, ["norms"]))[1])
    host = module.Host(0, 1, module.torch.device("cpu"), None, None)
    assert module.norms_in_fp32(host, [], config) == ["norms"]
    assert (seen, matmul.allow_tf32) == ([False], True)
