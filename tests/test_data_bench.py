"""The cost report of the input pipeline."""

import re
from types import SimpleNamespace

import numpy as np
import pytest

from chains import random_chain
from scalefold.data.features.features import FeatureSettings
from scalefold.data.loading import bench
from scalefold.data.loading.bench import BenchResult, SampleCost, bench_data, workers_needed
from scalefold.errors import DataError

SMALL = FeatureSettings(train_sequence_crop_size=16, max_msa_clusters=4, max_extra_msa=8, max_templates=2)


class FakeStore:
    """Six chains; templates are the chains "t0" to "t2"."""

    def __init__(self, path):
        self.chain_ids = [] if path == "empty" else [f"chain{i}" for i in range(6)]
        self.table = SimpleNamespace(
            structure_bytes=np.full(9, 1000), template_bytes=np.full(9, 100), alignment=np.array([0] + 8 * [-1])
        )
        self.alignments = SimpleNamespace(num_bytes=np.array([50_000]))

    def index_of(self, name):
        return int(name[-1]) + (6 if name.startswith("t") else 0)

    def read(self, name):
        return random_chain(20, 30, seed=int(name[-1]), num_templates=3 if name == "chain0" else 0)


@pytest.fixture(autouse=True)
def fake_store(monkeypatch):
    monkeypatch.setattr(bench, "Store", FakeStore)


def test_every_chain_is_measured_once_and_the_last_line_states_mean_and_p99():
    result = bench_data("store", SMALL)
    assert [cost.chain_id for cost in result.costs] == [f"chain{i}" for i in range(6)]
    pattern = r"mean (\d+\.\d{3}) s, p99 (\d+\.\d{3}) s per sample on one core, 6 chains"
    found = re.fullmatch(pattern, result.lines()[-1])
    assert found
    assert float(found[1]) == round(np.mean([cost.core_s for cost in result.costs]), 3)


def test_stored_bytes_count_structure_alignment_and_used_templates():
    costs = bench_data("store", SMALL).costs
    assert costs[0].stored_bytes == 1000 + 100 + 50_000 + 3 * 1000
    assert costs[1].stored_bytes == 1000 + 100


def test_a_limit_takes_evenly_spaced_chains():
    assert [cost.chain_id for cost in bench_data("store", SMALL, max_chains=3).costs] == ["chain0", "chain2", "chain4"]


def test_an_empty_store_is_an_error():
    with pytest.raises(DataError, match="empty: no chain to measure"):
        bench_data("empty", SMALL)


def test_the_report_names_the_slowest_chains_first():
    costs = tuple(SampleCost(f"c{i}", 10, 5, 0, 100, 0.1 * i, 0.2 * i) for i in range(1, 8))
    slow = [line for line in BenchResult(costs).lines() if line.startswith("slow: ")]
    assert [line.split()[1] for line in slow] == ["c7", "c6", "c5", "c4", "c3"]


def test_workers_cover_the_demand_with_headroom():
    assert workers_needed(mean_wall_s=0.3, step_s=0.25) == 2
    assert workers_needed(mean_wall_s=0.3, step_s=0.25, local_batch_size=4) == 8
    assert workers_needed(mean_wall_s=0.001, step_s=1.0) == 1
