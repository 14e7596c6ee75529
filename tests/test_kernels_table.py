"""The Triton table: every operation reachable, the plain definition where kernels cannot run."""

import ast
import dataclasses
import inspect
import logging

import pytest
import torch

from kernel_accuracy import DEVICE, Draw
from scalefold.kernels import choice, reference, triton_ops
from scalefold.kernels.choice import operations
from scalefold.kernels.table import REFERENCE, Operations


def test_every_operation_keeps_the_signature_of_its_definition():
    for field in dataclasses.fields(Operations):
        if hasattr(reference, field.name):  # else the model holds it
            own = inspect.signature(getattr(triton_ops.TRITON, field.name))
            expected = inspect.signature(getattr(reference, field.name))
            assert list(own.parameters) == list(expected.parameters), field.name


def test_what_the_model_defines_sends_the_caller_there_and_one_line_says_why(caplog):
    choice._explained.clear()
    with caplog.at_level(logging.INFO):
        empty, weight, bias = (torch.ones(*shape, device=DEVICE) for shape in ((1, 0), (4, 25), (4,)))
        assert triton_ops.TRITON.embed_extra(empty, empty, empty, linears=[(weight.bfloat16(), bias)]) is None
    assert [record.message for record in caplog.records] == ["kernels: plain PyTorch embed_extra: an argument is empty"]


def test_the_table_is_found_by_name():
    assert operations("triton") is triton_ops.TRITON
    assert operations("reference") is REFERENCE


def test_fp32_products_go_to_the_plain_definition_with_one_line_of_explanation(caplog):
    choice._explained.clear()
    x, weight = torch.randn(2, 3, 16, device=DEVICE), torch.randn(32, 16, device=DEVICE)
    norm = (torch.ones(16, device=DEVICE), torch.zeros(16, device=DEVICE))
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            _, out = triton_ops.TRITON.layer_norm_linear(x, *norm, [weight], [None])
    assert torch.equal(out, reference.layer_norm_linear(x, *norm, [weight], [None])[1])
    assert [record.message for record in caplog.records] == [
        "kernels: plain PyTorch layer_norm_linear: float32 products go to the library"
    ]


def unfit_arguments() -> dict[str, tuple[list, str]]:
    """For every operation whose kernels do not take everything: arguments that they do not take, and the reason."""
    draw = Draw(3)

    def bf16(*shape):
        return draw(*shape).bfloat16()

    def linears(num, width, c):
        return [tensor for _ in range(num) for tensor in (bf16(width, c), bf16(width))]

    def norm(c):
        return [bf16(c), bf16(c)]

    x, z, mask = bf16(1, 3, 5, 16), bf16(1, 3, 3, 24), bf16(1, 3, 3)
    narrow, odd = "width 24 is no power of two from 16 to 256", "widths 16, 32 in one call"
    point_inputs = [bf16(1, 4, 2, 3) for _ in range(3)] + [bf16(1, 4, 2, 2, 3) for _ in range(3)]
    frames, target = (draw(2, 3, 4, 3, 3), draw(2, 3, 4, 3)), (draw(1, 3, 4, 3, 3), draw(1, 3, 4, 3))
    points = (draw(1, 3, 4), draw(2, 3, 5, 3), draw(1, 3, 5, 3), draw(1, 3, 5), draw(2, 3))
    return {
        "layer_norm": ([bf16(2, 1025), *norm(1025)], "width 1025 is above 1024"),
        "layer_norm_linear": ([x, *norm(16), [bf16(16, 16), bf16(32, 16)], [None, None]], odd),
        "gated_output": ([bf16(2, 3, 24), bf16(2, 3, 2, 8), bf16(2, 3, 16), bf16(24, 16), bf16(24), None], narrow),
        "transition": ([x, *norm(16), *linears(1, 48, 16), *linears(1, 16, 48)], "hidden width 48 is no power of two"),
        "outer_product_project": ([z, mask, *norm(24), *linears(2, 16, 24)], narrow),
        "outer_product_update": (
            [bf16(1, 2, 2, 16), bf16(1, 3, 2, 8), bf16(1, 3, 2, 8), draw(1, 2, 2).abs(), bf16(16, 64), bf16(16)],
            "width 8 is no power of two",
        ),
        "triangle_project": (
            [bf16(1, 16, 3, 3).permute(0, 2, 3, 1), mask, *norm(16), *linears(4, 16, 16)],
            "channels are not contiguous",
        ),
        "triangle_output": ([z, bf16(1, 24, 3, 3), *norm(24), *norm(24), *linears(2, 24, 24), None], narrow),
        "global_attention": (
            [x, bf16(1, 3, 5), *norm(16), bf16(8, 16), bf16(4, 16), bf16(4, 16), bf16(8, 16), bf16(8), bf16(16, 8)]
            + [bf16(16), 2, 1e4, 1e-3],
            "width 8 is no power of two from 16 to 128",
        ),
        "invariant_point_attention": (
            [*point_inputs, bf16(1, 4, 4, 2), bf16(1, 4, 4, 8), bf16(2), bf16(1, 4), 1e4],
            "not everything is float32",
        ),
        "point_errors": ([*frames, *target, *points, 2.0], "leading dimensions of the targets"),
    }


@pytest.mark.skipif(not (torch.cuda.is_available() or triton_ops.INTERPRETED), reason="no kernel can run")
@pytest.mark.parametrize("name", sorted(unfit_arguments()))
def test_what_kernels_do_not_take_goes_to_the_plain_definition_with_one_line_of_explanation(name, caplog):
    choice._explained.clear()
    arguments, reason = unfit_arguments()[name]
    with caplog.at_level(logging.INFO):
        found = [getattr(triton_ops.TRITON, name)(*arguments) for _ in range(2)]
    expected = getattr(reference, name)(*arguments)
    for result in found:
        torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)
    assert len(caplog.records) == 1
    assert caplog.records[0].message.startswith(f"kernels: plain PyTorch {name}: {reason}")


@pytest.mark.parametrize(
    ("n", "dtype", "reason"),
    [
        (2049, torch.float32, "2049 residues, at most 2048"),
        (4, torch.bfloat16, "not everything is float32"),
        (0, torch.float32, "an argument is empty"),
        (4, torch.float32, None),
    ],
    ids=str,
)
def test_point_attention_says_what_it_does_not_take(n, dtype, reason):
    from scalefold.kernels.ops import point_attention

    sizes = [(n, 2, 3)] * 3 + [(n, 2, 2, 3)] * 3 + [(n, n, 2), (n, n, 8)]
    tensors = [torch.empty(1, *size, dtype=dtype, device="meta") for size in sizes]
    weights, mask = torch.empty(2, dtype=dtype, device="meta"), torch.empty(1, n, dtype=dtype, device="meta")
    assert point_attention.obstacle(*tensors, weights, mask, 1e4) == reason


def test_rows_that_kernels_cannot_walk_are_named():
    from scalefold.kernels.rows import layout_obstacle, width_obstacle

    assert layout_obstacle(torch.zeros(2, 3, 4, 16), torch.zeros(16, 2).t()) == "channels are not contiguous"
    assert layout_obstacle(torch.zeros(1, 2, 3, 4, 16)) == "more than three dimensions of rows"
    assert layout_obstacle(torch.zeros(2, 3, 4, 16).transpose(0, 1)) is None
    assert [width_obstacle(n) is None for n in (8, 16, 48, 256, 512)] == [False, True, False, True, False]
    assert width_obstacle(16, 256, most=128) == "width 256 is no power of two from 16 to 128"


def test_no_kernel_module_knows_the_plain_definitions(repository):
    """A fallback that the chooser does not see would be one that nobody is told of."""
    for file in (repository / "src/scalefold/kernels/ops").glob("*.py"):
        found = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module in ("scalefold.kernels", "scalefold.kernels.reference"):
                found |= {alias.name for alias in node.names if alias.name == "reference" or alias.name.islower()}
        assert not found - {"tuning"}, file.name


def test_bf16_takes_the_kernel(monkeypatch):
    if not (torch.cuda.is_available() or triton_ops.INTERPRETED):
        pytest.skip("needs a GPU or Triton's interpreter")
    calls = []
    fast = triton_ops.guarded(lambda x: calls.append(x.dtype), reference.layer_norm, triton_ops.matrix_obstacle)
    fast(torch.zeros(1, dtype=torch.bfloat16, device="cuda" if torch.cuda.is_available() else "cpu"))
    assert calls == [torch.bfloat16]


def test_other_devices_are_named_as_the_obstacle():
    assert triton_ops.device_obstacle(torch.device("meta")) == "tensors are on meta, not on a CUDA device"
