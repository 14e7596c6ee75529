"""Triton attention against its plain definition: awkward shapes in the interpreter, full shapes on a GPU."""

from contextlib import ExitStack

import pytest
import torch
from torch import Tensor

from scalefold.kernels import reference, tuning
from scalefold.kernels.ops import attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("o", "dq", "dk", "dv", "dbias")
SMALL_TILES = {"BLOCK_Q": 16, "BLOCK_K": 16, "num_warps": 4, "STAGES": 1, "GROUPS": 2}


def small_backward() -> ExitStack:
    """Backward in tiles of 16 queries and 16 keys, rows in two groups."""
    stack = ExitStack()
    for name in ("attention_backward", "attention_backward_keys", "attention_backward_queries"):
        stack.enter_context(tuning.override(name, SMALL_TILES))
    return stack


def make_inputs(shape, with_bias: bool, dtype: torch.dtype, transposed: bool = False, device: str = DEVICE):
    """Random q, k, v (transposed: views of tensors stored with S and N exchanged), mask, bias, output gradient."""
    generator = torch.Generator().manual_seed(sum(shape))
    batch, rows, n, heads, _ = shape

    def draw(*sizes):
        return torch.randn(*sizes, generator=generator).to(device=device, dtype=dtype)

    def draw_rows():
        return draw(shape[0], shape[2], shape[1], *shape[3:]).transpose(1, 2) if transposed else draw(*shape)

    mask = (torch.rand(batch, rows, n, generator=generator) > 0.3).to(device=device, dtype=dtype)
    mask[:, -1] = 0.0  # a row without any key
    mask[:, 0] = 1.0
    bias = draw(batch, heads, n, n) if with_bias else None
    return [draw_rows(), draw_rows(), draw_rows(), mask, bias], draw_rows()


def run(function, inputs, d_output, inf: float = 1e9) -> dict[str, Tensor]:
    """Output and all gradients of one attention."""
    q, k, v, mask, bias = (x if x is None else x.detach() for x in inputs)
    leaves = [x.requires_grad_() for x in (q, k, v, bias) if x is not None]
    o = function(q, k, v, mask, bias, inf)
    grads = torch.autograd.grad(o, leaves, d_output.to(o.dtype))
    return dict(zip(NAMES, (o.detach(), *grads), strict=False))


def assert_as_accurate_as_pytorch(inputs, d_output, inf: float = 1e9) -> None:
    """Error against fp32 at most twice PyTorch's own at this precision, for the output and every gradient."""
    ours = run(attention.attention, inputs, d_output, inf)
    plain = run(reference.attention, inputs, d_output, inf)
    exact = run(reference.attention, [x if x is None else x.float() for x in inputs], d_output, inf)
    for name, expected in exact.items():
        size = max(expected.norm().item(), 0.3 * expected.numel() ** 0.5)  # some gradients are exactly zero at N = 1
        error = (ours[name].float() - expected).norm().item() / size
        allowed = 2 * (plain[name].float() - expected).norm().item() / size + 5e-6
        assert error <= allowed, f"{name}: relative error {error:.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shape", "with_bias"),
    [
        ((1, 3, 1, 2, 8), True),
        ((2, 1, 7, 1, 16), True),
        ((1, 2, 16, 2, 32), True),
        ((2, 3, 33, 1, 8), True),
        ((1, 2, 33, 2, 24), False),
    ],
    ids=str,
)
def test_attention_is_as_accurate_as_pytorch(shape, with_bias, dtype):
    assert_as_accurate_as_pytorch(*make_inputs(shape, with_bias, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shape", "with_bias", "transposed"),
    [
        ((1, 3, 1, 2, 8), True, False),  # less than a tile
        ((1, 3, 37, 1, 8), True, False),  # tiles that reach beyond the last query and key
        ((2, 3, 40, 2, 16), False, True),
        ((1, 3, 64, 2, 32), True, True),  # whole tiles
        ((1, 2, 32, 1, 24), False, False),  # channels that fill no tile
    ],
    ids=str,
)
def test_the_backward_in_small_tiles_is_as_accurate_as_pytorch(shape, with_bias, transposed, dtype):
    inputs, d_output = make_inputs(shape, with_bias, dtype, transposed)
    inputs[3][:, 1, 32:] = 1.0  # of this row only the first tile of keys is masked in part
    with small_backward():
        assert_as_accurate_as_pytorch(inputs, d_output)


@pytest.mark.parametrize("with_bias", [True, False])
def test_attention_takes_transposed_views_and_returns_the_same_memory_order(with_bias):
    inputs, d_output = make_inputs((1, 4, 17, 2, 16), with_bias, torch.bfloat16, transposed=True)
    assert_as_accurate_as_pytorch(inputs, d_output)
    results = run(attention.attention, inputs, d_output)
    for name in ("o", "dq", "dk", "dv"):
        assert results[name].transpose(1, 2).is_contiguous(), name


@pytest.mark.parametrize("transposed", [False, True])
def test_the_gradient_of_a_bias_lies_as_the_rows_that_it_is_projected_from(transposed, monkeypatch):
    found = []
    for _ in range(2):
        with small_backward():
            results = run(attention.attention, *make_inputs((1, 3, 20, 2, 16), True, torch.bfloat16, transposed))
        found.append(results["dbias"])
        monkeypatch.setattr(attention, "_is_along_keys", lambda q: transposed)  # then the other way round
    as_rows, turned = found
    assert (as_rows.transpose(-1, -2) if transposed else as_rows).is_contiguous()
    assert as_rows.stride() == turned.transpose(-1, -2).stride()
    assert torch.equal(*found)


def test_attention_takes_slices_of_one_fused_projection():
    generator = torch.Generator().manual_seed(1)
    fused = torch.randn(1, 3, 20, 4, 2, 16, generator=generator).to(DEVICE)
    q, k, v, d_output = fused.unbind(3)
    inputs = [q, k, v, torch.ones(1, 3, 20, device=DEVICE), None]
    assert_as_accurate_as_pytorch(inputs, d_output)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(
    ("shape", "unrolled"), [((1, 2, 37, 1, 16), 0), ((1, 3, 37, 1, 16), 64), ((2, 2, 32, 1, 8), 64)]
)
def test_rows_longer_than_a_tile_are_walked_in_tiles(shape, unrolled, with_bias):
    small = {**SMALL_TILES, "ROWS": 2, "UNROLLED": unrolled}
    with tuning.override("attention_forward", small), small_backward():
        assert_as_accurate_as_pytorch(*make_inputs(shape, with_bias, torch.float32))


@pytest.mark.parametrize("inf", [1e5, 1e9])
def test_rows_without_any_key_weigh_all_keys_alike_and_pass_gradients(inf):
    (q, k, v, mask, bias), d_output = make_inputs((1, 2, 24, 2, 16), True, torch.float32)
    mask.zero_()
    with small_backward():
        results = run(attention.attention, (q, k, v, mask, bias), d_output, inf)
    expected = run(reference.attention, (q, k, v, mask, bias), d_output, inf)
    for name, value in expected.items():
        torch.testing.assert_close(results[name], value, rtol=2e-2, atol=2e-2 if inf == 1e5 else 2e-5, msg=name)
    if inf == 1e9:
        torch.testing.assert_close(results["o"], v.mean(2, keepdim=True).expand_as(v), rtol=1e-4, atol=1e-5)


def test_a_masked_key_has_no_influence_and_no_gradient():
    (q, k, v, mask, bias), d_output = make_inputs((1, 2, 20, 2, 16), True, torch.float32)
    mask.fill_(1.0)
    mask[:, :, 5] = 0.0
    with small_backward():
        first = run(attention.attention, (q, k, v, mask, bias), d_output)
        k[:, :, 5] += 10.0
        v[:, :, 5] -= 10.0
        second = run(attention.attention, (q, k, v, mask, bias), d_output)
    torch.testing.assert_close(first["o"], second["o"])
    assert first["dk"][:, :, 5].abs().max() == 0
    assert first["dv"][:, :, 5].abs().max() == 0
    assert first["dbias"][..., 5].abs().max() == 0


def test_inference_gives_the_same_output_and_saves_nothing():
    (q, k, v, mask, bias), _ = make_inputs((1, 3, 18, 2, 16), True, torch.float32)
    with torch.no_grad():
        o = attention.attention(q, k, v, mask, bias, 1e9)
    trained = attention.attention(q.requires_grad_(), k, v, mask, bias, 1e9)
    assert o.grad_fn is None
    torch.testing.assert_close(o, trained.detach(), rtol=0, atol=0)


def test_a_frozen_bias_costs_no_bias_gradient():
    (q, k, v, mask, bias), d_output = make_inputs((1, 2, 18, 2, 16), True, torch.float32)
    o = attention.attention(q.requires_grad_(), k, v, mask, bias, 1e9)
    (dq,) = torch.autograd.grad(o, [q], d_output)
    expected = run(reference.attention, (q, k, v, mask, bias), d_output)["dq"]
    torch.testing.assert_close(dq, expected, rtol=1e-4, atol=1e-5)


FULL_SHAPES = [(shape, with_bias) for shape, with_bias in attention.COMPILE_SHAPES.values()]
SHARES = [((1, 32, 256, 4, 32), True), ((1, 16, 256, 8, 32), True), ((1, 32, 128, 8, 32), False)]
EVALUATION = [((1, 301, 301, 4, 32), True), ((1, 513, 130, 8, 32), False), ((1, 64, 701, 8, 8), True)]


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("shape", "with_bias"), FULL_SHAPES[:4] + SHARES + EVALUATION, ids=str)
def test_attention_is_as_accurate_as_pytorch_at_full_shapes(shape, with_bias, transposed):
    assert_as_accurate_as_pytorch(*make_inputs(shape, with_bias, torch.bfloat16, transposed))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize(("shape", "with_bias"), FULL_SHAPES[:3], ids=str)
def test_attention_replays_in_a_cuda_graph(shape, with_bias):
    inputs, d_output = make_inputs(shape, with_bias, torch.bfloat16)
    eager = run(attention.attention, inputs, d_output)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(attention.attention, inputs, d_output)
    graph.replay()
    torch.cuda.synchronize()
    for name, value in eager.items():
        torch.testing.assert_close(captured[name], value, rtol=0, atol=0, msg=name)
