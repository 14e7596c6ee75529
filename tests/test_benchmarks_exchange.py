"""The kernels of the own exchanges, with peers' memory as tensors of one process."""

import sys

import pytest
import torch

pytest.importorskip("triton")


@pytest.fixture
def exchange(repository, monkeypatch):
    """The benchmark's module."""
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    import symmetric_exchange

    yield symmetric_exchange
    for name in ("symmetric_exchange", "multi_gpu", "step_time", "common"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(("size", "count"), [(2, 8), (4, 5000), (8, 1)])
def test_every_rank_reads_its_part_of_each_peer(exchange, size, count):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    memory = [torch.randn(size * count, device=device).bfloat16() for _ in range(size)]
    for rank in range(size):
        found = torch.empty(size, count, dtype=torch.bfloat16, device=device)
        exchange.gather_parts(memory, found, rank * count, count)
        assert torch.equal(found, torch.stack([m[rank * count : (rank + 1) * count] for m in memory]))
        total = torch.empty(count, dtype=torch.bfloat16, device=device)
        exchange.sum_parts(memory, total, rank * count, count)
        torch.testing.assert_close(total, found.float().sum(0).bfloat16())
