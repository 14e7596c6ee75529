"""A whole model whose results arrive directly, sent or written ahead: the values and gradients of the library."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from kernel_accuracy import DEVICE
from processes import run_ranks
from rank_tensors import barrier_of, memory
from scalefold.config import load_config
from scalefold.data.configured import feature_settings
from scalefold.data.made.synthetic import synthetic_batch
from scalefold.kernels import reference, triton_ops
from scalefold.kernels.destination import Destination
from scalefold.kernels.table import REFERENCE, Operations, use_operations
from scalefold.model.alphafold import AlphaFold
from scalefold.parallel.dap.arrivals import PASSING_TURNS, Arrivals
from scalefold.parallel.dap.collectives import Group
from scalefold.parallel.dap.direct import DirectExchanges
from scalefold.parallel.dap.points import apply_dap

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() or triton_ops.INTERPRETED), reason="needs a GPU or Triton's interpreter"
)
OVERRIDES = (
    *("model.evoformer.num_blocks=2", "model.structure.num_blocks=1", "data.train_sequence_crop_size=16"),
    *("data.max_msa_clusters=8", "data.max_extra_msa=8"),
)


class Counted(DirectExchanges):
    """Counts what arrives directly, and of it what its maker has written."""

    count, ahead = 0, 0

    def _sent(self, xs: Sequence[Tensor], *how: Any) -> list[Tensor]:
        self.count += 1
        return super()._sent(xs, *how)

    def arrived(self, destination: Destination, alone: bool = False) -> Tensor:
        self.ahead += 1
        return super().arrived(destination, alone)

    def begin_arrived(self, destination: Destination) -> tuple[Tensor, Callable[[], None]]:
        self.ahead += 1
        return super().begin_arrived(destination)


def gated_output_ahead(x: Tensor, *given: Any) -> Tensor:
    """As a program that writes to where its result belongs, by columns."""
    out, destination = reference.gated_output(x, *given[:5]), given[5] if len(given) > 5 else None
    return _Written.apply(out, destination)


def layer_norm_linear_ahead(*given: Any) -> tuple[Tensor, ...]:
    *outs, last = reference.layer_norm_linear(*given[:5])
    return *outs, _Written.apply(last, given[5] if len(given) > 5 else None)


def outer_product_project_ahead(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
    *arguments, destination = given
    m, a, b = reference.outer_product_project(*arguments)
    return m, a, _Written.apply(b, destination)


def triangle_project_ahead(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
    *arguments, (for_a, for_b) = given
    z, a, b = reference.triangle_project(*arguments)
    return z, _Written.apply(a, for_a), _Written.apply(b, for_b)


class _Written(torch.autograd.Function):
    """All of an operand to every rank, or the parts of it that have their shape; if it has a destination."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, destination: Destination | None) -> Tensor:
        if destination is None:
            return x.view_as(x)
        for rank, to in enumerate(destination.parts):
            dim = next((n for n in range(x.dim()) if to.shape[n] != x.shape[n]), None)
            to.copy_(x if dim is None else x.chunk(len(destination.parts), dim)[rank])
        destination.written = True
        return torch.full_like(x, torch.nan)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


AHEAD = Operations(
    "ahead",
    gated_output=gated_output_ahead,
    layer_norm_linear=layer_norm_linear_ahead,
    outer_product_project=outer_product_project_ahead,
    triangle_project=triangle_project_ahead,
)


def steps(model: AlphaFold, batch: dict[str, Tensor]) -> list[np.ndarray]:
    """Outputs and gradients of three steps with 1, 2 and 1 passes: places are given away again in and between them.

    In the last one blocks run again in the backward, which begins exchanges that nothing ends.
    """
    found = []
    for passes, model.checkpoint_blocks in ((1, False), (2, False), (1, True)):
        model.zero_grad()
        torch.manual_seed(passes)
        outputs = model(batch, passes)
        sum(out.float().sin().mean() for out in outputs.values() if out.is_floating_point()).backward()  # type: ignore
        found += [out.detach().numpy().copy() for out in outputs.values()]
        found += [p.grad.numpy().copy() for p in model.parameters() if p.grad is not None]
    return found


def compared(
    rank: int, memories: list[list[Tensor]], arrived: list[Tensor], kept: int, numbers: Tensor, ops: Operations
) -> tuple[float, int, int, int]:
    """Largest relative difference between direct exchanges and the library, of how many values; those that arrived,
    and of them those written ahead.
    """
    config = load_config(Path(__file__).parents[1] / "configs" / "tiny.yaml", OVERRIDES).config
    batch = dict(synthetic_batch(feature_settings(config), 1, num_passes=2, seed=3).features)
    assert dist.group.WORLD is not None
    group = Group(dist.group.WORLD)
    model = AlphaFold(config.model, seed=1).train()
    torch.manual_seed(4)
    for parameter in model.parameters():  # some begin as zeros, and gradients behind them would be none
        parameter.data += 0.1 * torch.randn_like(parameter)
    apply_dap(model, group)
    expected = steps(model, batch)
    barrier = barrier_of(rank, numbers)
    views = {torch.float32: [[own.view(torch.float32) for own in stage] for stage in memories]}
    arrivals = Arrivals(arrived[rank], arrived, kept, barrier)
    own = [stage[rank] for stage in memories]
    group.direct = direct = Counted(rank, group.size, own, views, barrier, arrivals)
    use_operations(model, ops)
    with mock.patch.object(dist, "all_to_all_single", side_effect=AssertionError("by the library")):
        found = steps(model, batch)
    pairs = [(a, b) for a, b in zip(expected, found, strict=True) if not np.array_equal(a, b)]
    largest = max((float(np.linalg.norm(b - a) / np.linalg.norm(a)) for a, b in pairs), default=0.0)
    return largest, len(expected), direct.count, direct.ahead


@pytest.mark.distributed
@pytest.mark.skipif(DEVICE != "cpu", reason="memory of CPU processes")
@pytest.mark.parametrize(
    ("size", "rounding", "ops"),
    [
        (2, 0.0, REFERENCE),
        (2, 1e-5, AHEAD),
        *(pytest.param(4, 1e-5, ops, marks=pytest.mark.long) for ops in (REFERENCE, AHEAD)),
    ],
)
def test_a_model_computes_the_same_where_results_arrive_directly(size, rounding, ops):
    """Of two ranks to the bit; more are summed in another order by the library, and a triangle's product is another one
    where its operand is written ahead.
    """
    largest = 2 * 8 * 16 * 16 * 4  # operands of a triangle multiplication: two, fp32
    kept, passing = 1 << 25, largest * PASSING_TURNS
    memories = [[memory(1 << 20).share_memory_() for _ in range(size)] for _ in range(2)]
    arrived = [memory(kept + passing).share_memory_() for _ in range(size)]
    numbers = torch.zeros(size, size, dtype=torch.int32).share_memory_()
    for difference, count, direct, ahead in run_ranks(compared, size, memories, arrived, kept, numbers, ops):
        assert difference <= rounding
        assert (ahead > 100) == (ops is AHEAD)
        assert min(count, direct) > 100
