"""Evoformer blocks on the kernels: operations hand over layouts to each other that no test of one alone sees.

Judged against fp32 like single kernels: error at most twice that of the plain definitions in bf16. At full size a
gradient may also be off by what leaves its cosine with fp32 above 0.995, for the sake of the attention's bias: delta
comes from outputs rounded to bf16, and does not cancel as exactly as in a softmax that keeps its own probabilities.
"""

import pytest
import torch
from torch import Tensor

from kernel_accuracy import DEVICE, LIBRARY_TILES, transition_backward
from scalefold.config import EvoformerConfig
from scalefold.kernels import triton_ops
from scalefold.kernels.table import REFERENCE, Operations, use_operations
from scalefold.model.evoformer import EvoformerStack

SMALL = EvoformerConfig(
    num_blocks=1,
    c_hidden_msa_att=16,
    num_heads_msa=2,
    c_hidden_opm=16,
    c_hidden_tri_att=16,
    num_heads_tri=2,
    c_hidden_tri_mul=32,
    transition_n=2,
    msa_dropout=0.0,
    pair_dropout=0.0,
)
COSINE_ERROR = 0.1  # relative error at a cosine of 0.995
FULL = EvoformerConfig(num_blocks=1, msa_dropout=0.0, pair_dropout=0.0)


def results(
    ops: Operations, dtype: torch.dtype, config: EvoformerConfig, widths: tuple[int, int, int], sizes: tuple[int, int]
) -> list[Tensor]:
    """Outputs and all gradients of one stack with given weights and inputs, in fp32."""
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(1)
    stack = EvoformerStack(*widths, config).to(DEVICE)
    for parameter in stack.parameters():
        scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.3
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    stack = stack.to(dtype)
    use_operations(stack, ops)
    rows, n = sizes
    m, z = (torch.randn(1, *shape, generator=generator) for shape in ((rows, n, widths[0]), (n, n, widths[1])))
    mask = (torch.rand(1, rows, n, generator=generator) > 0.2).float()
    mask[:, 0] = 1.0
    inputs = [x.to(DEVICE, dtype).requires_grad_() for x in (m, z)]
    outputs = stack(*inputs, mask.to(DEVICE), torch.ones(1, n, n, device=DEVICE))
    seeds = [torch.randn(x.shape, generator=generator).to(DEVICE, x.dtype) for x in outputs]
    gradients = torch.autograd.grad(outputs, [*inputs, *stack.parameters()], seeds)
    return [x.detach().float() for x in (*outputs, *gradients)]


def check(
    config: EvoformerConfig, widths: tuple[int, int, int], sizes: tuple[int, int], always_allowed: float = 0.0
) -> None:
    """Relative error of every output and gradient, ours against plain bf16's.

    Some gradients are zero but for rounding (a softmax does not see what is added to all of its logits, such as the
    bias of the norm before a bias of attention): those are measured against the usual norm.
    """
    exact = results(REFERENCE, torch.float32, config, widths, sizes)
    norms = torch.stack([x.norm() for x in exact])
    scales = torch.where(norms < 1e-3 * norms.median(), norms.median(), norms)
    errors = []
    for ops in (triton_ops.TRITON, REFERENCE):
        found = results(ops, torch.bfloat16, config, widths, sizes)
        errors.append([((a - b).norm() / scale).item() for a, b, scale in zip(found, exact, scales, strict=True)])
    allowed = [max(2 * error + 1e-3, always_allowed) for error in errors[1]]
    worst = max(range(len(exact)), key=lambda i: errors[0][i] / allowed[i])
    text = f"result {worst} {tuple(exact[worst].shape)}: {errors[0][worst]:.2e}, allowed {allowed[worst]:.2e}"
    assert errors[0][worst] <= allowed[worst], text


@pytest.mark.parametrize("config", [None, LIBRARY_TILES], ids=["table", "library"])
def test_a_block_on_the_kernels_is_as_accurate_as_plain_bf16(config):
    if not (torch.cuda.is_available() or triton_ops.INTERPRETED):
        pytest.skip("needs a GPU or Triton's interpreter")
    with transition_backward(config):
        check(SMALL, (64, 32, 16), (5, 11))


@pytest.mark.gpu
def test_a_block_of_full_size_is_as_accurate_as_plain_bf16():
    check(FULL, (256, 128, 384), (128, 256), always_allowed=COSINE_ERROR)
