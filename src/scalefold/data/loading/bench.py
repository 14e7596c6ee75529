"""What a sample costs: time, bytes and the worker processes that a system needs to never wait for data."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from scalefold.data.features.features import BatchShape, FeatureSettings, buffer_bytes, fill_sample, select_templates
from scalefold.data.loading.sampler import seed_from_string
from scalefold.data.store.store import Store
from scalefold.errors import DataError

_QUANTILES = (0.5, 0.9, 0.99)
_NUM_SLOWEST = 5
_HEADROOM = 1.5  # workers beyond the mean demand, so that the queue recovers from a run of slow samples


@dataclass(frozen=True)
class SampleCost:
    """One sample, read and built with all slices in training mode on one core."""

    chain_id: str
    length: int
    msa_rows: int
    num_templates: int  # featurised for this sample
    stored_bytes: int  # read from the store
    core_s: float  # processor time
    wall_s: float  # includes waiting for the disk and for a busy machine


@dataclass(frozen=True)
class BenchResult:
    """Costs of all measured samples."""

    costs: tuple[SampleCost, ...]

    @property
    def mean_core_s(self) -> float:
        """Mean processor seconds per sample."""
        return float(np.mean([cost.core_s for cost in self.costs]))

    @property
    def mean_wall_s(self) -> float:
        """Mean elapsed seconds per sample."""
        return float(np.mean([cost.wall_s for cost in self.costs]))

    def quantile_core_s(self, share: float) -> float:
        """Processor seconds that ``share`` of the samples stay below."""
        return float(np.quantile([cost.core_s for cost in self.costs], share))

    def lines(self) -> list[str]:
        """The report, ending with the line that states mean and 99th percentile."""
        bytes_read = np.array([cost.stored_bytes for cost in self.costs])
        slowest = sorted(self.costs, key=lambda cost: -cost.core_s)[:_NUM_SLOWEST]
        quantiles = ", ".join(f"p{round(100 * q)} {self.quantile_core_s(q):.3f}" for q in _QUANTILES)
        return [
            f"samples per second and core: {1 / self.mean_core_s:.2f} (elapsed {1 / self.mean_wall_s:.2f})",
            f"core seconds per sample: {quantiles}, max {slowest[0].core_s:.3f}",
            f"bytes read per sample: mean {bytes_read.mean() / 1e6:.2f} MB, max {bytes_read.max() / 1e6:.2f} MB",
            *(
                f"slow: {cost.chain_id} {cost.core_s:.3f} s ({cost.length} residues, {cost.msa_rows} rows, "
                f"{cost.num_templates} templates)"
                for cost in slowest
            ),
            f"mean {self.mean_core_s:.3f} s, p99 {self.quantile_core_s(0.99):.3f} s per sample on one core, "
            f"{len(self.costs)} chains",
        ]


def bench_data(
    store_path: Path | str,
    settings: FeatureSettings,
    chains: Sequence[str] | None = None,
    max_chains: int | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> BenchResult:
    """Read and build one training sample, all slices, for each of ``chains`` (default: every chain of the store).

    ``max_chains`` takes that many, evenly spaced. One thread; the file cache is left as it is.

    Raises:
        DataError: nothing to measure, or a chain cannot be read.
    """
    store = Store(store_path)
    names = list(store.chain_ids if chains is None else chains)
    if max_chains is not None and max_chains < len(names):
        names = [names[i * len(names) // max_chains] for i in range(max_chains)]
    if not names:
        raise DataError(f"{store_path}: no chain to measure")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        shape = BatchShape.of(settings, 1, settings.num_slices, training=True)
        measure_sample(store, names[0], shape, settings)  # imports, file handles
        costs = []
        for number, name in enumerate(names, 1):
            costs.append(measure_sample(store, name, shape, settings))
            if number % 100 == 0:
                report(f"{number} of {len(names)} chains")
    finally:
        torch.set_num_threads(threads)
    return BenchResult(tuple(costs))


def measure_sample(store: Store, chain_id: str, shape: BatchShape, settings: FeatureSettings) -> SampleCost:
    """Cost of one sample from the store's bytes to features in memory."""
    seed = seed_from_string(f"bench {chain_id}")
    wall, core = time.perf_counter(), time.process_time()
    chain = store.read(chain_id)
    buffer = torch.zeros(buffer_bytes(shape), dtype=torch.uint8)
    fill_sample(buffer, shape, 0, chain, settings, seed)
    core_s, wall_s = time.process_time() - core, time.perf_counter() - wall
    templates = select_templates(chain.templates, settings, seed, training=True)
    row = store.index_of(chain_id)
    stored = _stored_bytes(store, row) + sum(_structure_bytes(store, hit.name) for hit in templates)
    return SampleCost(chain_id, len(chain.aatype), len(chain.msa), len(templates), stored, core_s, wall_s)


def _stored_bytes(store: Store, row: int) -> int:
    table, alignment = store.table, int(store.table.alignment[row])
    rows = int(store.alignments.num_bytes[alignment]) if alignment >= 0 else 0
    return int(table.structure_bytes[row]) + int(table.template_bytes[row]) + rows


def _structure_bytes(store: Store, chain_id: str) -> int:
    return int(store.table.structure_bytes[store.index_of(chain_id)])


def workers_needed(mean_wall_s: float, step_s: float, local_batch_size: int = 1) -> int:
    """Worker processes per data-parallel replica for steps of ``step_s``, with headroom."""
    return max(1, math.ceil(_HEADROOM * mean_wall_s * local_batch_size / step_s))
