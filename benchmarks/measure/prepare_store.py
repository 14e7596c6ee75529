"""Preparation and reading of stores, measured: ``python benchmarks/measure/prepare_store.py
real|synthetic|index|decode``.

``real RAW`` prepares real files in the layout of the public sets; ``synthetic`` writes statistically similar raw
files, prepares them, kills a second preparation with SIGKILL half-way, continues it and compares the checksums;
``index`` opens an index of 594,595 entries; ``decode`` decodes one deep alignment. Rows go to CSV files beside this
script. CPU seconds are given beside wall-clock seconds, because they hold on a busy machine too.
"""

import argparse
import contextlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from common import FOLDER, append_rows, facts, print_table
from scalefold.data.made.synthetic_raw import SyntheticRaw, write_raw
from scalefold.data.raw.rawlayout import RawLayout, scan
from scalefold.data.store import codec, prepare, store
from scalefold.data.store.manifest import Manifest, read_manifest, verify_data, write_manifest
from scalefold.processors import processors

TRAINING_CHAINS = 594_595


class Clock:
    """Wall-clock and CPU seconds, children included, and the peak memory of any one process."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.monotonic(), self._cpu()

    @staticmethod
    def _cpu() -> float:
        return sum(
            usage.ru_utime + usage.ru_stime
            for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        )

    def read(self) -> dict[str, object]:
        peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        wall, cpu = time.monotonic() - self.wall, self._cpu() - self.cpu
        return {"wall_s": round(wall, 2), "cpu_s": round(cpu, 2), "peak_process_gib": round(peak / 2**20, 3)}


def row(what: str, summary: prepare.Summary, clock: Clock, workers: int) -> dict[str, object]:
    used = clock.read()
    return {
        **facts(),
        "what": what,
        "workers": workers,
        "chains": summary.num_chains,
        "alignments": summary.num_alignments,
        "rejected": summary.num_rejected,
        "notes": summary.num_notes,
        "raw_mb": round(summary.raw_bytes / 1e6, 2),
        "store_mb": round(summary.store_bytes / 1e6, 2),
        "units_done": summary.units_done,
        "units_found": summary.units_found,
        **used,
        "chains_per_cpu_s": round(summary.num_chains / float(str(used["cpu_s"])), 2) if not summary.units_found else "",
    }


def real_layout(raw: Path) -> RawLayout:
    """The mini set's folders; its alignment files may be gzip-compressed."""
    structures = raw / "pdb_mmcif"
    roots = tuple(p for p in (raw / "open_protein_set", raw / "open_protein_set_computed") if p.is_dir())
    return RawLayout(structures / "raw", roots, structures / "clusters-by-entity-40.txt", structures / "obsolete.dat")


def measure_real(raw: Path, work: Path, workers: int) -> list[dict[str, object]]:
    layout, rows = real_layout(raw), []
    for what in ("real, first run", "real, second run"):
        clock = Clock()
        rows.append(row(what, prepare.prepare(layout, work / "store", workers), clock, workers))
    return rows


def measure_synthetic(settings: SyntheticRaw, work: Path, workers: int) -> list[dict[str, object]]:
    clock = Clock()
    layout = write_raw(work / "raw", settings)
    print("raw files written:", clock.read())
    clock = Clock()
    whole = prepare.prepare(layout, work / "whole", workers)
    rows = [row("synthetic, undisturbed", whole, clock, workers)]
    kill_half_way(layout, work / "killed", workers)
    clock = Clock()
    rows.append(
        row("synthetic, continued after SIGKILL", prepare.prepare(layout, work / "killed", workers), clock, workers)
    )
    identical = read_manifest(work / "whole").files == read_manifest(work / "killed").files
    problems = verify_data(work / "killed").problems
    print(f"continued store identical: {identical}, problems: {problems}")
    if not identical or problems:
        raise SystemExit("the continued store differs")
    return rows


def kill_half_way(layout: RawLayout, out_dir: Path, workers: int) -> None:
    """Start a preparation in its own process group and kill that group when half of its units are done."""
    code = "from pathlib import Path, PosixPath; from scalefold.data.store.prepare import prepare; "
    code += "from scalefold.data.raw.rawlayout import RawLayout\nif __name__ == '__main__': "
    script = out_dir.with_name("prepare_once.py")
    script.write_text(f"{code}prepare({layout!r}, Path({str(out_dir)!r}), {workers})\n")
    process = subprocess.Popen([sys.executable, str(script)], start_new_session=True, stdout=subprocess.DEVNULL)
    plan = scan(layout)
    half = (len(plan.structures) + len(plan.alignments)) // 2
    while len(list((out_dir / "work").glob("*-*.json"))) < half and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


# --- reading ----------------------------------------------------------------------------------------------------------


def synthetic_index(folder: Path, num_chains: int) -> None:
    """An index with as many entries as the benchmark's training set, without shards."""
    rng = np.random.default_rng(0)
    entry = np.arange(num_chains) // 3
    chain_id = np.array(
        [f"{1 + e // 46656}{np.base_repr(e % 46656, 36).lower():0>3}_{'ABC'[i % 3]}" for i, e in enumerate(entry)]
    ).astype("S9")
    numbers = np.zeros(num_chains, dtype=np.int64)
    asym = np.frombuffer(b"A;B;C;D" * num_chains, dtype=np.uint8)
    table = store.ChainTable(
        chain_id=chain_id, length=rng.integers(20, 1000, num_chains, dtype=np.int32),
        release_date=np.full(num_chains, np.datetime64("2010-01-01")), resolution=np.full(num_chains, 2.0),
        cluster_id=numbers.astype(np.int32), max_residue_share=np.full(num_chains, 0.1),
        num_ca=numbers.astype(np.int32), asym_ids_text=asym, asym_ids_end=7 * np.arange(1, num_chains + 1),
        alignment=np.arange(num_chains, dtype=np.int32), msa_rows=numbers.astype(np.int32),
        num_template_hits=numbers.astype(np.int32), structure_shard=numbers.astype(np.int32),
        structure_offset=numbers, structure_bytes=numbers.astype(np.int32),
        template_shard=numbers.astype(np.int32), template_offset=numbers, template_bytes=numbers.astype(np.int32),
        order=np.argsort(chain_id, kind="stable"),
    )  # fmt: skip
    alignments = store.AlignmentTable(chain_id, *(numbers for _ in range(5)))
    store.write_table(folder / "index", "chain", table)
    store.write_table(folder / "index", "alignment", alignments)
    write_manifest(folder, Manifest("synthetic", {}, {"chains": num_chains, "alignments": num_chains}, 0, {}))


def measure_index(work: Path) -> list[dict[str, object]]:
    synthetic_index(work / "index", TRAINING_CHAINS)
    code = (
        "import sys, time; from scalefold.data.store import selection; from scalefold.data.store.store import Store\n"
        "started = time.perf_counter(); store = Store(sys.argv[1]); row = store.index_of('3abc_B')\n"
        "opened = time.perf_counter(); rows = selection.training_set(store.table).rows\n"
        "print(len(store), opened - started, time.perf_counter() - opened)"
    )
    output = subprocess.run(
        [sys.executable, "-c", code, str(work / "index")], capture_output=True, text=True, check=True
    )
    count, opened, selected = output.stdout.split()
    size = sum(path.stat().st_size for path in (work / "index").rglob("*.npy"))
    measured = {"entries": int(count), "index_mb": size / 1e6, "open_and_find_s": float(opened)}
    return [{**facts(), **measured, "training_set_s": float(selected)}]


def measure_decode(num_rows: int = 16_000, length: int = 500) -> list[dict[str, object]]:
    from scalefold.data.made.synthetic_raw import _a3m_text
    from scalefold.data.raw import msa

    rng = np.random.default_rng(0)
    query = "".join(rng.choice(list("ACDEFGHIKLMNPQRSTVWY"), length))
    text = _a3m_text(query, num_rows, rng)
    started = time.process_time()
    aligned = msa.merge({"a3m": msa.parse_a3m(text)})
    assert aligned is not None
    parsed = time.process_time()
    packed = codec.pack_msa({}, aligned.msa, aligned.deletions, store.count_letters(aligned.msa))
    stored = time.process_time()
    decode = []
    for _ in range(5):
        begin = time.process_time()
        codec.unpack_msa(codec.Record(packed, "deep"))
        decode.append(time.process_time() - begin)
    return [
        {
            **facts(),
            "rows": len(aligned.msa),
            "length": length,
            "text_mb": len(text) / 1e6,
            "packed_mb": len(packed) / 1e6,
            "parse_cpu_s": parsed - started,
            "pack_cpu_s": stored - parsed,
            "decode_cpu_s": float(np.median(decode)),
        }
    ]


@contextlib.contextmanager
def folder(path: Path | None) -> Iterator[Path]:
    """The given folder, kept, or a temporary one, removed."""
    if path:
        path.mkdir(parents=True, exist_ok=True)
        yield path
        return
    temporary = Path(tempfile.mkdtemp(prefix="scalefold-"))
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["real", "synthetic", "index", "decode"])
    parser.add_argument("raw", type=Path, nargs="?", help="folder of real raw files (for real)")
    parser.add_argument("--chains", type=int, default=10_000)
    parser.add_argument("--median-rows", type=int, default=SyntheticRaw(1).median_rows)
    parser.add_argument("--workers", type=int, default=processors())
    parser.add_argument("--folder", type=Path, help="where to work; kept afterwards")
    arguments = parser.parse_args()
    with folder(arguments.folder) as work:
        if arguments.what == "real":
            if arguments.raw is None:
                parser.error("real needs the folder of the raw files")
            rows, name = measure_real(arguments.raw, work, arguments.workers), "prepare_store.csv"
        elif arguments.what == "synthetic":
            settings = replace(SyntheticRaw(arguments.chains), median_rows=arguments.median_rows)
            rows, name = measure_synthetic(settings, work, arguments.workers), "prepare_store.csv"
        elif arguments.what == "index":
            rows, name = measure_index(work), "store_index.csv"
        else:
            rows, name = measure_decode(), "msa_decode.csv"
    print_table(rows)
    append_rows(FOLDER / name, rows)


if __name__ == "__main__":
    main()
