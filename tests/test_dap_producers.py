"""Operations that write their results to the peers themselves: the same bits as exchanges behind them."""

import csv
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from kernel_accuracy import DEVICE
from processes import run_ranks
from scalefold.config import EvoformerConfig
from scalefold.kernels import triton_ops
from scalefold.kernels.table import use_operations
from scalefold.model.evoformer import EvoformerStack
from scalefold.parallel.dap.collectives import FORMS, Group, Lasts, Parts
from scalefold.parallel.dap.direct import Arrivals, DirectExchanges
from scalefold.parallel.dap.points import apply_dap

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(DEVICE != "cpu" or not triton_ops.INTERPRETED, reason="memory of CPU processes"),
]
STACK = EvoformerConfig(
    num_blocks=1,
    c_hidden_msa_att=16,
    num_heads_msa=2,
    c_hidden_opm=16,
    c_hidden_tri_att=16,
    num_heads_tri=2,
    c_hidden_tri_mul=32,
)
STAGE, KEPT, PASSING = 1 << 18, 1 << 22, 1 << 22


class Counted(DirectExchanges):
    """Counts exchanges that a producer takes care of, and those that meet no barrier of their own."""

    written = early = 0

    def parts(self, xs: Sequence[Tensor], split_dim: int, concat_dim: int, lasts: Lasts) -> Parts | None:
        found = super().parts(xs, split_dim, concat_dim, lasts)
        self.written += found is not None
        return found

    def begin_all_to_all(self, x: Tensor, split_dim: int, concat_dim: int, lasts: Lasts) -> Any:
        found = super().begin_all_to_all(x, split_dim, concat_dim, lasts)
        self.early += found is not None
        return found


def connected(rank: int, size: int, stages: list[list[Tensor]], arrived: list[Tensor]) -> tuple[Group, Counted]:
    """A group of gloo ranks whose memory lies in ``stages`` and ``arrived``."""
    assert dist.group.WORLD is not None

    def barrier(turn: int = 0) -> None:
        dist.barrier()

    views = {
        dtype: [[own.view(dtype) for own in stage] for stage in stages] for dtype in (torch.bfloat16, torch.float32)
    }
    own = [stage[rank] for stage in stages]
    direct = Counted(rank, size, own, views, barrier, Arrivals(arrived[rank], arrived, KEPT, barrier))
    return Group(dist.group.WORLD, direct), direct


def shared_memory(size: int) -> tuple[list[list[Tensor]], list[Tensor]]:
    stages = [[torch.zeros(STAGE, dtype=torch.uint8).share_memory_() for _ in range(size)] for _ in range(2)]
    return stages, [torch.zeros(KEPT + PASSING, dtype=torch.uint8).share_memory_() for _ in range(size)]


def stack() -> EvoformerStack:
    """A block whose every weight is alive, in bf16, on Triton's operations."""
    torch.manual_seed(0)
    model = EvoformerStack(64, 32, 16, STACK)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3)
    model = model.bfloat16().train()
    use_operations(model, triton_ops.TRITON)
    return model


def step(model: EvoformerStack) -> list[np.ndarray]:
    """Results and gradients of a pass without and one with a gradient, dropout on."""
    torch.manual_seed(1)
    m, z = torch.randn(1, 4, 8, 64).bfloat16(), torch.randn(1, 8, 8, 32).bfloat16().requires_grad_()
    msa_mask, pair_mask = torch.ones(1, 4, 8), torch.ones(1, 8, 8)
    model.zero_grad()
    with torch.no_grad():
        before, pair, _ = model(m, z, msa_mask, pair_mask)
    outs = model(before, z + pair, msa_mask, pair_mask)
    sum(out.float().sin().sum() for out in outs).backward()  # type: ignore[union-attr]
    gradients = [parameter.grad for parameter in model.parameters()]
    return [x.detach().float().numpy().copy() for x in (*outs, z.grad, *gradients) if x is not None]


def steps(rank: int, size: int, memory: Any, forms: list[frozenset[str]]) -> list[tuple[list, int, int]]:
    """Results of a step for each choice of forms, and exchanges that had one."""
    group, direct = connected(rank, size, *memory)
    model, found = stack(), []
    apply_dap(model, group)
    use_operations(model, triton_ops.TRITON)  # as another phase does: what was handed over stays
    for chosen in forms:
        group.forms, direct.written, direct.early = chosen, 0, 0
        group.begin()
        values = step(model)
        found.append((values, direct.written, direct.early))
    return found


def test_a_block_gives_the_same_bits_whoever_writes_to_the_peers():
    forms = [frozenset(), frozenset(FORMS) - {"operands"}, frozenset(FORMS)]
    for (expected, *none), *others in run_ranks(steps, 2, 2, shared_memory(2), forms):
        assert none == [0, 0]
        assert len(expected) > 40
        for values, _, early in others:
            assert [n for n, (a, b) in enumerate(zip(expected, values, strict=True)) if not np.array_equal(a, b)] == []
            assert early == 3  # forward twice, backward once
        products, rows = 2 * 3, 3 * 2  # gradients of operations of rows take the exchange
        assert [written for _, written, _ in others] == [products + rows, products + rows + 2 * 2]


@pytest.mark.long
def test_the_script_tries_every_form_on_the_cpu(repository, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    options = ["--small", "--passes", "1", "--repeats", "1", "--csv", str(tmp_path / "forms.csv")]
    command = [*torchrun, "benchmarks/measure/dap_forms.py", *options]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = list(csv.DictReader((tmp_path / "forms.csv").open()))
    assert [row["forms"] for row in rows] == ["none", *("+".join(FORMS[: n + 1]) for n in range(len(FORMS))), "none"]
    assert {row["bits_of_none"] for row in rows} == {"True"}
