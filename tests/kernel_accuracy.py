"""How kernel tests judge: error against fp32 at most twice PyTorch's own error at the same precision."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from scalefold.kernels import tuning

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16]
FP32_ERROR = 2e-6  # rounding of sums in another order
TILE = {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 2}  # the smallest
ANY = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
LIBRARY_TILES = {"LIBRARY": 1, "BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1}


def transition_backward(config: tuning.Config | None) -> AbstractContextManager[None]:
    """Launch parameters of the backward of transitions, which name its form; None: what the tables say."""
    return tuning.override("transition_backward", config) if config else nullcontext()


class Draw:
    """Random inputs of one test: values with a fixed seed, on the test's device."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(DEVICE)

    def weight(self, width: int, c: int) -> Tensor:
        return self(width, c) * c**-0.5

    def norm(self, c: int) -> list[Tensor]:
        """Weight and bias of a layer norm."""
        return [self(c) * 0.3 + 1.0, self(c)]

    def mask(self, *shape: int) -> Tensor:
        return (torch.rand(*shape, generator=self.generator) > 0.3).float().to(DEVICE)

    def dropout(self, *shape: int) -> Tensor:
        return self.mask(*shape) / 0.7


def results(function: Callable, leaves: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Outputs and gradients of all leaves, converted to ``dtype`` with their strides kept."""
    inputs = [torch.empty_strided(x.shape, x.stride(), dtype=dtype, device=x.device).copy_(x) for x in leaves]
    inputs = [x.requires_grad_() for x in inputs]
    outputs = function(*inputs)
    outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    draw = Draw(1)
    gradients = torch.autograd.grad(outputs, inputs, [draw(*o.shape).to(o.dtype) for o in outputs])
    return [o.detach() for o in outputs] + list(gradients)


def assert_as_accurate_as_pytorch(
    function: Callable, plain: Callable, leaves: Sequence[Tensor], dtype: torch.dtype
) -> None:
    """Compare outputs and the gradients of every leaf; both functions take the leaves in order."""
    rounded = [leaf.to(dtype).float() if leaf.is_contiguous() else leaf for leaf in leaves]
    ours, theirs = results(function, rounded, dtype), results(plain, rounded, dtype)
    for n, (own, other, exact) in enumerate(zip(ours, theirs, results(plain, rounded, torch.float32), strict=True)):
        assert own.dtype == dtype
        assert own.shape == exact.shape
        error, allowed = _error(own, exact), 2 * _error(other, exact) + FP32_ERROR
        assert error <= allowed, f"result {n} {tuple(own.shape)}: relative error {error:.2e}, allowed {allowed:.2e}"


def _error(value: Tensor, exact: Tensor) -> float:
    return ((value.float() - exact).norm() / exact.norm()).item()


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors lie alike and hold the same bits."""
    assert a.stride() == b.stride()
    return torch.equal(a.view(ANY[a.dtype]), b.view(ANY[b.dtype]))


def of_parts(
    name: str, tile: tuning.Config, parts: Sequence[int], call: Callable[[], Tensor | Sequence[Tensor]]
) -> list[list[Tensor]]:
    """Outputs with each number of parts and equal tiles."""
    found = []
    for count in parts:
        with tuning.override(name, tile | {"PARTS": count}):
            outputs = call()
        found.append([outputs] if isinstance(outputs, torch.Tensor) else list(outputs))
    return found


def count_launched(candidates: Sequence[tuning.Config], check: Callable[[tuning.Config], None]) -> int:
    """How many candidates were checked: those that the GPU has shared memory for, as a search leaves the others out."""
    count = 0
    for config in candidates:
        with suppress(OutOfResources):
            check(config)
            count += 1
    return count


def turned(x: Tensor, transposed: bool) -> Tensor:
    """x, stored with dimensions 1 and 2 exchanged if ``transposed``."""
    return x.transpose(1, 2).contiguous().transpose(1, 2) if transposed else x
