"""The Triton table: every operation reachable, the plain definition where kernels cannot run."""

import dataclasses
import inspect
import logging

import pytest
import torch

from scalefold.kernels import reference, triton_ops
from scalefold.kernels import table as kernels


def test_every_operation_keeps_the_signature_of_its_definition():
    for field in dataclasses.fields(kernels.Operations):
        if field.name != "name":
            own = inspect.signature(getattr(triton_ops.TRITON, field.name))
            expected = inspect.signature(getattr(reference, field.name))
            assert list(own.parameters) == list(expected.parameters), field.name


def test_the_table_is_found_by_name():
    assert kernels.operations("triton") is triton_ops.TRITON
    assert kernels.operations("reference") is kernels.REFERENCE


def test_fp32_products_go_to_the_plain_definition_with_one_line_of_explanation(caplog):
    triton_ops._explained.clear()
    x, weight = torch.randn(2, 3, 16), torch.randn(32, 16)
    norm = (torch.ones(16), torch.zeros(16))
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            _, out = triton_ops.TRITON.layer_norm_linear(x, *norm, [weight], [None])
    assert torch.equal(out, reference.layer_norm_linear(x, *norm, [weight], [None])[1])
    assert [record.message for record in caplog.records] == [
        "kernels: plain PyTorch layer_norm_linear: float32 products go to the library"
    ]


def test_bf16_takes_the_kernel(monkeypatch):
    if not (torch.cuda.is_available() or triton_ops.INTERPRETED):
        pytest.skip("needs a GPU or Triton's interpreter")
    calls = []
    fast = triton_ops.guarded(lambda x: calls.append(x.dtype), reference.layer_norm, triton_ops.matrix_obstacle)
    fast(torch.zeros(1, dtype=torch.bfloat16, device="cuda" if torch.cuda.is_available() else "cpu"))
    assert calls == [torch.bfloat16]


def test_other_devices_are_named_as_the_obstacle():
    assert triton_ops.device_obstacle(torch.device("meta")) == "tensors are on meta, not on a CUDA device"
