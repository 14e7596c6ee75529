"""Forms that other libraries have of the operations that ``kernels.py`` measures; each is imported if it is there.

A rival takes the parameters as its library keeps them: ``arrange`` brings tensors of a case, or their gradients, into
its order and layout, so that no variant pays for a layout that its users would not have.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scalefold.tune.operation_cases import Case, Inputs

MODULES = {"cuequivariance": "cuequivariance_torch", "fast_trimul": "fast_trimul"}  # variant -> what is imported
Call = Callable[[], Tensor | Sequence[Tensor]]


@dataclass(frozen=True)
class Rival:
    """A call, the leaves that it differentiates, and how tensors of the case are brought into their order."""

    call: Call
    leaves: list[Tensor]
    arrange: Callable[[Sequence[Any]], list[Any]] = list


def libraries() -> dict[str, Any]:
    """Those that can be imported, by variant; why the others cannot is printed."""
    found = {}
    for variant, module in MODULES.items():
        try:
            found[variant] = importlib.import_module(module)
        except ImportError as problem:
            print(f"without {variant}: {problem}", flush=True)
    return found


def rival(case: Case, inputs: Inputs, variant: str, library: Any) -> Rival | None:
    """The form that ``library`` has of a case, None where it has none."""
    if case.operation == "triangle_multiplication":
        direction = case.shape.rsplit("_", 1)[1]
        build = cuequivariance_triangle if variant == "cuequivariance" else fast_trimul_triangle
        return build(inputs.leaves, direction, library)
    if (variant, case.operation) == ("cuequivariance", "attention") and case.shape.endswith("_bias"):
        return cuequivariance_attention(inputs.leaves, library)
    return None


def cuequivariance_attention(leaves: list[Tensor], library: Any) -> Rival:
    """Attention with a bias; the case's projections are [batch, rows, keys, heads * width]."""
    *projected, bias = leaves
    heads = bias.shape[1]
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(2, 3) for t in projected)
    mask = torch.ones(q.shape[0], q.shape[1], 1, 1, q.shape[3], dtype=torch.bool, device=q.device)
    scale = q.shape[-1] ** -0.5
    return Rival(lambda: library.triangle_attention(q, k, v, bias[:, None], mask, scale).transpose(2, 3), leaves)


# --- triangle multiplication: z, two norms, weight and bias of a, its gate, b, its gate, output, its gate -------------


def fresh(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies of values as leaves."""
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def packed(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Weights and biases of both operands in one tensor each, so of both gates: z, norms, 4 packed, output, gate."""
    z_and_norms, linears = tensors[:5], tensors[5:]
    both = [torch.cat([linears[i], linears[i + 4]]) for i in range(4)]
    return [*z_and_norms, *both, *linears[8:]]


def cuequivariance_triangle(leaves: list[Tensor], direction: str, library: Any) -> Rival:
    """The update from packed parameters, with the residual that the library leaves to its caller."""
    own = fresh(packed(leaves))
    z = own[0]
    names = ("norm_in", "norm_out", "p_in", "g_in", "p_out", "g_out")
    parameters = dict(zip((f"{name}_{part}" for name in names for part in ("weight", "bias")), own[1:], strict=True))
    mask = torch.ones(z.shape[:-1], dtype=z.dtype, device=z.device)

    def call() -> Tensor:
        return z + library.triangle_multiplicative_update(z, direction=direction, mask=mask, **parameters)

    return Rival(call, own, packed)


def gate_first(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The output's gate before the output."""
    return [*tensors[:13], *tensors[15:], *tensors[13:15]]


def fast_trimul_triangle(leaves: list[Tensor], direction: str, library: Any) -> Rival:
    """The library's kernels, which are fp16, on z in bf16; its backward computes the forward again in PyTorch.

    Its dispatcher is passed by, because that takes another library or PyTorch without a word where a kernel fails.
    """
    z, *values = fresh(gate_first(leaves))
    module = library.FastTriangleMultiplication(z.shape[-1], mode=direction)._impl.to(z.device)
    parameters = module._params()
    for parameter, value in zip(parameters, values, strict=True):
        parameter.data.copy_(value)
    return Rival(lambda: library.functional.triangle_multiplication(z, module), [z, *parameters], gate_first)
