"""Cost of a training sample, against a plain pipeline that decodes the text files of every sample.

    python benchmarks/measure/data_pipeline.py [STORE --raw RAW_DIR [--raw RAW_DIR ...]] [--out
    benchmarks/results/data_pipeline.csv]

STORE is a prepared store of the raw folders (OpenProteinSet roots with ``pdb/<chain>/a3m``). Without STORE the real
chains of the reference material (``$SCALEFOLD_SHARED`` or ``../shared``) are prepared below ``runs/bench_data``, or
generated proteins where that is absent. Every chain is measured
with the fast pipeline; the plain one (text alignments parsed letter by letter, one-hot floats over the whole
alignment for each slice; structure and templates not counted) for the deepest chains and a spread of the others.
Two generated chains of 500 residues and 20,000 rows show the deep end. Times are processor seconds of one thread.
"""

import argparse
import csv
import gzip
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from conftest import find_shared
from plain_features import alignment_features
from scalefold.data import residues
from scalefold.data.features.features import BatchShape, FeatureSettings, buffer_bytes, fill_sample
from scalefold.data.loading.bench import BenchResult, SampleCost, bench_data
from scalefold.data.made.demo import generate
from scalefold.data.made.synthetic import synthetic_chain
from scalefold.data.raw.rawlayout import RawLayout
from scalefold.data.store import codec
from scalefold.data.store.prepare import prepare
from scalefold.data.store.store import ChainRecord, Store, count_letters

FILES = ("uniref90_hits.a3m", "bfd_uniclust_hits.a3m", "mgnify_hits.a3m")
COLUMNS = [
    "case",
    "chain_id",
    "length",
    "msa_rows",
    "num_templates",
    "stored_bytes",
    "core_s",
    "wall_s",
    "plain_core_s",
]


def plain_alignment(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Letters and deletion counts of a3m texts, letter by letter, duplicates removed."""
    rows, deletions, seen = [], [], set()
    for text in texts:
        for part in text.split(">")[1:]:
            sequence, counts, pending = [], [], 0
            for letter in "".join(part.split("\n")[1:]):
                if letter.islower():
                    pending += 1
                else:
                    sequence.append(letter)
                    counts.append(pending)
                    pending = 0
            aligned = "".join(sequence)
            if aligned not in seen:
                seen.add(aligned)
                rows.append([residues.MSA_LETTER_TO_HHBLITS[letter] for letter in aligned])
                deletions.append(counts)
    return np.array(rows, dtype=np.uint8), np.array(deletions, dtype=np.int32)


def plain_seconds(texts: list[str], settings: FeatureSettings) -> float:
    """Processor seconds of text to alignment features of all slices."""
    start = time.process_time()
    msa, deletions = plain_alignment(texts)
    chain = SimpleNamespace(msa=msa, deletion_matrix=deletions)
    for e in range(settings.num_slices):
        alignment_features(chain, settings, 17 + e)
    return time.process_time() - start


def a3m_text(chain: ChainRecord) -> str:
    """The alignment of a generated chain as text."""
    letters = np.array(list(residues.HHBLITS_LETTERS))
    lines = []
    for row, counts in zip(chain.msa, chain.deletion_matrix, strict=True):
        aligned = "".join("a" * int(n) + letter for letter, n in zip(letters[row], counts, strict=True))
        lines.append(f">row\n{aligned}\n")
    return "".join(lines)


def raw_texts(store: Store, chain_id: str, roots: list[Path]) -> list[str]:
    """The chain's a3m texts, of the folder that the store's alignment came from."""
    name = store.alignments.name[int(store.table.alignment[store.index_of(chain_id)])].decode()
    folder = next(root / "pdb" / name for root in roots if (root / "pdb" / name).is_dir())
    found = [next(iter([*folder.rglob(file), *folder.rglob(f"{file}.gz")]), None) for file in FILES]
    return [(gzip.open(path, "rt") if path.suffix == ".gz" else path.open()).read() for path in found if path]


def plain_choice(result: BenchResult, count: int) -> list[str]:
    """Chains for the plain pipeline: the deepest, those with templates, and a spread by cost."""
    with_rows = [cost for cost in result.costs if cost.msa_rows > 1]
    deepest = sorted(with_rows, key=lambda cost: -cost.msa_rows)[: count // 3]
    templated = sorted((c for c in with_rows if c.num_templates), key=lambda cost: -cost.msa_rows)[: count // 3]
    by_cost = sorted(with_rows, key=lambda cost: cost.core_s)
    spread = by_cost[:: max(1, len(by_cost) // max(1, count // 3))]
    return list(dict.fromkeys(cost.chain_id for cost in [*deepest, *templated, *spread]))


def deep_cost(seed: int, settings: FeatureSettings) -> tuple[SampleCost, float]:
    """A generated chain of 500 residues and 20,000 rows, decoded from its stored form; and its plain seconds."""
    chain = synthetic_chain(500, 20_000, num_templates=4, seed=seed)
    packed = codec.pack_msa({}, chain.msa, chain.deletion_matrix, count_letters(chain.msa))
    shape = BatchShape.of(settings, 1, settings.num_slices, training=True)
    wall, core = time.perf_counter(), time.process_time()
    msa, deletions = codec.unpack_msa(codec.Record(memoryview(packed), "generated"))
    record = ChainRecord(**{**chain.__dict__, "msa": msa, "deletion_matrix": deletions})
    fill_sample(torch.zeros(buffer_bytes(shape), dtype=torch.uint8), shape, 0, record, settings, seed)
    core_s, wall_s = time.process_time() - core, time.perf_counter() - wall
    cost = SampleCost(f"generated{seed}", 500, len(msa), 4, len(packed), core_s, wall_s)
    return cost, plain_seconds([a3m_text(chain)], settings)


def main() -> None:
    """Measure, print the report and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path, nargs="?")
    parser.add_argument("--raw", type=Path, action="append", default=[], help="OpenProteinSet root (repeatable)")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).resolve().parents[1] / "results" / "data_pipeline.csv"
    )
    parser.add_argument("--num-plain", type=int, default=18, help="chains measured with the plain pipeline")
    parser.add_argument("--max-chains", type=int, help="measure that many chains, evenly spaced")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.store is None:
        options.store, options.raw = default_store()
    settings, store = FeatureSettings(), Store(options.store)
    result = bench_data(str(options.store), settings, max_chains=options.max_chains, report=print)
    plain = {}
    for chain_id in plain_choice(result, options.num_plain) if options.raw else []:
        plain[chain_id] = plain_seconds(raw_texts(store, chain_id, options.raw), settings)
    rows = [{"case": "real", **asdict(c), "plain_core_s": plain.get(c.chain_id, "")} for c in result.costs]
    for seed in (1, 2):
        cost, plain_core_s = deep_cost(seed, settings)
        rows.append({"case": "deep", **asdict(cost), "plain_core_s": plain_core_s})
    write(options.out, rows)
    print_comparison(rows)
    print(*result.lines(), sep="\n")


def default_store() -> tuple[Path, list[Path]]:
    """A prepared store and its alignment roots: real chains if they are at hand, else generated ones."""
    shared, folder = find_shared(), Path("runs/bench_data")
    if shared is not None:
        raw = shared / "data"
        roots = (raw / "open_protein_set", raw / "open_protein_set_computed")
        structures = raw / "pdb_mmcif"
        layout = RawLayout(
            structures / "raw",
            roots,
            structures / "clusters-by-entity-40.txt",
            structures / "obsolete.dat",
            raw / "splits" / "eval_computed.txt",  # for whoever trains on the store
        )
        prepare(layout, folder / "real")
        return folder / "real", list(roots)
    if not (folder / "raw").exists():
        generate(folder / "raw")
    made = folder / "raw" / "open_protein_set"
    prepare(RawLayout(folder / "raw" / "pdb_mmcif" / "raw", (made,)), folder / "generated")
    return folder / "generated", [made]


def write(path: Path, rows: list[dict]) -> None:
    """The table as CSV, under its final name only when complete."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.4f}" if isinstance(v, float) else v for k, v in row.items()})
    temporary.rename(path)


def print_comparison(rows: list[dict]) -> None:
    """One line per chain that both pipelines built."""
    for row in rows:
        if row["plain_core_s"] != "":
            print(
                f"{row['case']} {row['chain_id']}: {row['length']} residues, {row['msa_rows']} rows, "
                f"{row['num_templates']} templates: {row['core_s']:.3f} s, plain {row['plain_core_s']:.2f} s, "
                f"ratio {row['plain_core_s'] / row['core_s']:.1f}"
            )


if __name__ == "__main__":
    main()
