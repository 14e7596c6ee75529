"""Ways to find the centre that each alignment row resembles most: bit-sliced, byte comparisons, one-hot product.

    python benchmarks/measure/cluster_matching.py --out benchmarks/results/cluster_matching.csv

Processor seconds of one thread for one recycling slice (124 centres); all three give the same centres.
"""

import argparse
import csv
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from scalefold.data.features.clusters import MatchTable

SHAPES = [(1200, 250), (5000, 300), (20_000, 500)]
NUM_CENTRES, ROW_BLOCK = 124, 2048


def by_bytes(msa: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """One comparison of the whole alignment per centre, summed in bytes."""
    counts = np.zeros((len(centres), len(msa)), dtype=np.uint16)
    wanted = np.where(centres < 21, centres, 255)
    for first in range(0, len(msa), ROW_BLOCK):
        block = np.ascontiguousarray(msa[first : first + ROW_BLOCK].T)
        equal = np.empty(block.shape, dtype=bool)
        for k, centre in enumerate(wanted):
            np.equal(block, centre[:, None], out=equal)
            for column in range(0, len(block), 255):
                part = equal.view(np.uint8)[column : column + 255]
                counts[k, first : first + ROW_BLOCK] += np.add.reduce(part, axis=0, dtype=np.uint8)
    return counts.argmax(axis=0)


def by_product(msa: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Float product of one-hot rows, as the definition says."""
    weight = torch.cat([torch.ones(21), torch.zeros(2)])
    rows = F.one_hot(torch.from_numpy(msa).long(), 23).float() * weight
    columns = F.one_hot(torch.from_numpy(centres).long(), 23).float()
    return (rows.flatten(1) @ columns.flatten(1).T).argmax(dim=1).numpy()


def seconds(function: Callable[[], np.ndarray], repeats: int = 3) -> tuple[float, np.ndarray]:
    """Best processor seconds and the result."""
    best, result = float("inf"), np.empty(0)
    for _ in range(repeats):
        start = time.process_time()
        result = function()
        best = min(best, time.process_time() - start)
    return best, result


def main() -> None:
    """Measure all shapes, check that the results agree, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).resolve().parents[1] / "results" / "cluster_matching.csv"
    )
    out = parser.parse_args().out
    torch.set_num_threads(1)
    rng, lines = np.random.default_rng(0), [["rows", "columns", "table_s", "bit_sliced_s", "bytes_s", "one_hot_s"]]
    for rows, columns in SHAPES:
        msa = rng.integers(0, 22, (rows, columns), dtype=np.uint8)
        centres = msa[rng.choice(rows, NUM_CENTRES, replace=False)].copy()
        centres[rng.random(centres.shape) < 0.1] = 22
        table_s, _ = seconds(lambda msa=msa: MatchTable(msa).nearest(msa[:1]))
        table = MatchTable(msa)
        bits_s, bits = seconds(lambda table=table, centres=centres: table.nearest(centres))
        bytes_s, expected = seconds(lambda msa=msa, centres=centres: by_bytes(msa, centres))
        product_s, product = seconds(lambda msa=msa, centres=centres: by_product(msa, centres), repeats=1)
        if not (np.array_equal(bits, expected) and np.array_equal(product, expected)):
            raise SystemExit(f"{rows} x {columns}: the methods disagree")
        lines.append([rows, columns, *(f"{s:.4f}" for s in (table_s, bits_s, bytes_s, product_s))])
        print(*lines[-1])
    with out.open("w", newline="") as stream:
        csv.writer(stream).writerows(lines)


if __name__ == "__main__":
    main()
