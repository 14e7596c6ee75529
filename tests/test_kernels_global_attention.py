"""Triton global column attention against its plain definition."""

import pytest
import torch

from scalefold.kernels import reference, tuning
from scalefold.kernels.ops import global_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = (
    "out", "m", "norm_weight", "norm_bias", "weight_q", "weight_k", "weight_v", "weight_g", "bias_g", "weight_o",
    "bias_o",
)  # fmt: skip


def make_inputs(batch: int, sequences: int, n: int, c: int, heads: int, dtype: torch.dtype):
    """m, mask, nine weights, and the gradient of the output; column 0 has no sequence left."""
    generator = torch.Generator().manual_seed(sequences + n)

    def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (scale * torch.randn(*shape, generator=generator)).to(device=DEVICE, dtype=dtype)

    mask = (torch.rand(batch, sequences, n, generator=generator) > 0.3).to(device=DEVICE, dtype=dtype)
    mask[:, :, 0] = 0.0
    hidden, width = heads * 8, 8
    weights = [
        1.0 + draw(c, scale=0.1), draw(c, scale=0.1), draw(hidden, c, scale=0.6), draw(width, c, scale=0.3),
        draw(width, c, scale=0.2), draw(hidden, c, scale=0.2), draw(hidden), draw(c, hidden, scale=0.2), draw(c),
    ]  # fmt: skip
    return [draw(batch, sequences, n, c), mask, *weights], draw(batch, sequences, n, c)


def run(function, inputs, d_out, heads: int) -> dict[str, torch.Tensor]:
    """Output and all gradients."""
    m, mask, *weights = (x.detach().clone() for x in inputs)
    leaves = [x.requires_grad_() for x in (m, *weights)]
    out = function(m, mask, *weights, heads, 1e9, 1e-8)
    grads = torch.autograd.grad(out, leaves, d_out.to(out.dtype))
    return dict(zip(NAMES, (out.detach(), *grads), strict=True))


def assert_as_accurate_as_pytorch(inputs, d_out, heads: int) -> None:
    """Error against fp32 at most twice PyTorch's own at this precision, for the output and every gradient."""
    ours = run(global_attention.global_attention, inputs, d_out, heads)
    plain = run(reference.global_attention, inputs, d_out, heads)
    exact = run(reference.global_attention, [x.float() for x in inputs], d_out, heads)
    for name, expected in exact.items():
        size = max(expected.norm().item(), 1e-3 * expected.numel() ** 0.5)
        error = (ours[name].float() - expected).norm().item() / size
        allowed = 2 * (plain[name].float() - expected).norm().item() / size + 1e-5
        assert error <= allowed, f"{name}: relative error {error:.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("batch", "sequences", "n", "c", "heads"), [(1, 9, 3, 64, 8), (2, 5, 17, 32, 4), (1, 1, 1, 16, 2)]
)
def test_global_attention_is_as_accurate_as_pytorch(batch, sequences, n, c, heads, dtype):
    assert_as_accurate_as_pytorch(*make_inputs(batch, sequences, n, c, heads, dtype), heads)


def test_gradients_of_queries_and_keys_survive_almost_equal_weights_of_similar_values():
    inputs, d_out = make_inputs(1, 256, 3, 64, 8, torch.bfloat16)
    inputs[1].fill_(1.0)  # mask
    inputs[3] *= 10.0  # bias of the norm: what all sequences have in common
    inputs[4] *= 0.1  # W_q
    assert_as_accurate_as_pytorch(inputs, d_out, 8)


def test_sequences_in_several_chunks_and_tiles_give_the_same_result():
    inputs, d_out = make_inputs(1, 150, 2, 16, 2, torch.float32)
    with (
        tuning.override("global_attention_columns", {"BLOCK_S": 4, "SEQUENCES": 40, "num_warps": 4, "num_stages": 1}),
        tuning.override(
            "global_attention_columns_backward", {"BLOCK_S": 8, "SEQUENCES": 8, "num_warps": 4, "num_stages": 1}
        ),
        tuning.override("global_attention_attend", {"BLOCK_S": 64, "num_warps": 4, "num_stages": 1}),
        tuning.override("global_attention_attend_backward", {"BLOCK_S": 64, "num_warps": 4, "num_stages": 1}),
        tuning.override(
            "global_attention_rows_backward", {"BLOCK": 16, "PROGRAMS": 3, "num_warps": 4, "num_stages": 1}
        ),
    ):
        assert_as_accurate_as_pytorch(inputs, d_out, 2)


def test_a_non_contiguous_input_is_accepted():
    inputs, d_out = make_inputs(1, 6, 5, 16, 2, torch.float32)
    inputs[0] = inputs[0].transpose(1, 2).contiguous().transpose(1, 2)
    assert_as_accurate_as_pytorch(inputs, d_out, 2)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("n", [256, 128, 32, 301])
def test_global_attention_is_as_accurate_as_pytorch_at_full_shapes(n):
    assert_as_accurate_as_pytorch(*make_inputs(1, 1024, n, 64, 8, torch.bfloat16), 8)
