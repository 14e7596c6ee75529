"""Every reader of files that come from elsewhere, with good samples of what it reads, and damage to do to them.

A reader is a function of a folder and of bytes: it puts them where its file belongs and reads it as the product does.
It may return or raise a ScaleFoldError; anything else is a finding.

Longer than 400 lines, because it has one short function per reader of the program.
"""

import contextlib
import json
import pickle
import random
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from scalefold.config import describe_config, dump_config, load_config
from scalefold.data.made.demo import generate
from scalefold.data.raw import download, mmcif, msa, official, rawlayout
from scalefold.data.raw.rawfile import read_bytes
from scalefold.data.store import alignments, codec, labels, prepare, selection, store, templates
from scalefold.data.store.manifest import read_manifest, read_rejections
from scalefold.kernels import tuning
from scalefold.mlperf.judge import score
from scalefold.mlperf.judge.lint import lint
from scalefold.mlperf.log.logfile import TOKEN, read_log
from scalefold.mlperf.log.published import published_runs
from scalefold.mlperf.log.rehearsal import published_script, write_rehearsal
from scalefold.report.compare import compare_runs
from scalefold.report.logs import read_result, read_runs
from scalefold.report.record import EvalRow, Record, StepRow, read_metrics
from scalefold.step import checkpoint

Read = Callable[[Path, bytes], object]


@dataclass(frozen=True)
class Reader:
    """A reader and its samples; ``read`` gets a folder that holds what the samples need beside them."""

    name: str
    read: Read
    samples: list[bytes]


def _write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


# --- readers ----------------------------------------------------------------------------------------------------------


def _read_mmcif(folder: Path, data: bytes) -> object:
    return mmcif.read_entry(_write(folder / "1abc.cif", data))


def _read_alignment(suffix: str) -> Read:
    def read(folder: Path, data: bytes) -> object:
        place = folder / f"alignment{suffix}"
        place.mkdir(exist_ok=True)
        _write(place / f"uniref90_hits{suffix}", data)
        return msa.read_alignment(place)

    return read


def _read_hhr(folder: Path, data: bytes) -> object:
    (folder / "hits").mkdir(exist_ok=True)
    _write(folder / "hits" / msa.HITS_NAME, data)
    hits, _ = alignments.read_hits(folder / "hits")
    sequence = "EMMEQLEQLAEQNGHTVTITGNTVTFT"
    positions = np.arange(len(sequence) * 37 * 3, dtype=np.float32).reshape(-1, 37, 3) / 40
    mask = np.ones((len(sequence), 37), dtype=bool)
    chain = templates.TemplateChain("A", sequence, 0, lambda: (positions, mask))
    sources = templates.TemplateSources(lambda name: np.datetime64("2000-01-01"), {}, lambda name: [chain])
    query = templates.Query("9zzz", sequence, np.datetime64("2020-01-01"))
    chosen = templates.select(hits, query, sources)
    return store.pack_templates([hit for hit, _ in chosen], [row for _, row in chosen], len(sequence))


def _read_duplicates(folder: Path, data: bytes) -> object:
    return rawlayout._members(["a/1abc_A"], _write(folder / "duplicate_pdb_chains.txt", data))


def _read_chains(folder: Path, data: bytes) -> object:
    _write(folder / official.CHAIN_TABLE, data)
    return official.read_chain_table(folder)


def _read_super_index(folder: Path, data: bytes) -> object:
    _write(folder / official.INDEX_FILE, data)
    official._read_index.cache_clear()
    folders = official.alignment_folders(folder)
    return [msa.read_alignment(official.open_folder(path)) for path in list(folders)[:2]]


def _read_yaml(folder: Path, data: bytes) -> object:
    loaded = load_config(_write(folder / "x.yaml", data))
    return dump_config(loaded.config), describe_config(loaded)


def _read_override(folder: Path, data: bytes) -> object:
    loaded = load_config(folder / "base.yaml", [data.decode(errors="surrogateescape")])
    return dump_config(loaded.config)


def _read_log(folder: Path, data: bytes) -> object:
    path = _write(folder / "openfold" / "result_0.txt", data)
    findings = lint(read_log(path))
    return findings, [score.score_folder(path.parent, scaling).text() for scaling in ("strong", "weak")]


def _read_result(folder: Path, data: bytes) -> object:
    result = read_result(_write(folder / "openfold" / "result_0.txt", data))
    runs = read_runs(result.path)
    return result.passing, runs[0].lddt_curve(), runs[0].target


def _read_metrics(folder: Path, data: bytes) -> object:
    run = folder / "run"
    path = _write(run / "metrics.jsonl", data)
    metrics = read_metrics(path)
    with contextlib.closing(Record(run, rank0=True, resume_step=3)) as record:
        record.event("again")
    return metrics, read_metrics(path), compare_runs(run, folder / "other", window=1)


def _read_rejected(folder: Path, data: bytes) -> object:
    _write(folder / "rejected.csv", data)
    return read_rejections(folder)


def _read_manifest(folder: Path, data: bytes) -> object:
    _write(folder / "manifest.json", data)
    return read_manifest(folder).store_bytes


def _read_index(folder: Path, data: bytes) -> object:
    """The first byte says which column the others take the place of."""
    name = _COLUMNS[int.from_bytes(data[:1], "big") % len(_COLUMNS)]
    path = folder / "store" / "index" / f"{name}.npy"
    kept = path.read_bytes()
    path.write_bytes(data[1:])
    opened = None
    try:
        opened = store.Store(folder / "store")
        return [opened.read(row) for row in (0, len(opened) - 1)], opened.index_of(opened.name(0))
    finally:
        path.write_bytes(kept)
        if opened is not None:
            opened.close()


def _read_structure_record(folder: Path, data: bytes) -> object:
    return codec.unpack_structure(codec.Record(data, "record"))


def _read_msa_record(folder: Path, data: bytes) -> object:
    record = codec.Record(data, "record")
    return codec.unpack_msa(record), record["counts"]


def _read_template_record(folder: Path, data: bytes) -> object:
    record = codec.Record(data, "record")
    with store._damage_names(record):
        return store.Store._template_hits(mock.MagicMock(), record)


def _read_bucket(folder: Path, data: bytes) -> object:
    with mock.patch.object(download, "fetch_text", return_value=data.decode(errors="replace")):
        return download.list_bucket("https://bucket.example/prefix", "f")


def _read_listing(folder: Path, data: bytes) -> object:
    part = download.PARTS["preprocessed"]
    return download.files_of(part, "https://example.com", _write(folder / "list.csv", data))


def _read_ids(folder: Path, data: bytes) -> object:
    return download.files_of(download.PARTS["mmcif"], None, _write(folder / "ids.txt", data))


def _read_weights(folder: Path, data: bytes) -> object:
    return checkpoint.load_weights(_write(folder / "weights.pt", data))


def _read_run_state(folder: Path, data: bytes) -> object:
    _write(folder / checkpoint.STATE_FILE, data)
    return checkpoint.read_state(folder)


# --- samples ----------------------------------------------------------------------------------------------------------


def build(folder: Path) -> dict[str, Reader]:
    """All readers by name, with samples from a generated set, its store and a rehearsed log in ``folder``."""
    made = generate(folder / "raw", seed=1, num_train=12, num_eval=2)
    prepare.prepare(made.layout(), folder / "store", report=lambda line: None)
    for name in ("openfold", "run", "other"):
        (folder / name).mkdir()
    (folder / "base.yaml").write_text("system: x\n")
    cifs = sorted(made.mmcif_dir.rglob("*.cif"))[:2] or sorted(made.mmcif_dir.rglob("*.cif.gz"))[:2]
    a3ms = [path.read_bytes() for path in sorted(made.alignments_dir.rglob("*.a3m")) if path.stat().st_size][:3]
    hhrs = [path.read_bytes() for path in sorted(made.alignments_dir.rglob("*.hhr"))][:3]
    log = _short_log(folder)
    clusters, obsolete = made.clusters_file.read_bytes(), made.obsolete_file.read_bytes()
    duplicates = made.duplicates_file.read_bytes()
    readers = [
        Reader("mmcif", _read_mmcif, [read_bytes(path) for path in cifs]),
        Reader("a3m", _read_alignment(".a3m"), a3ms),
        Reader("sto", _read_alignment(".sto"), [_stockholm(text) for text in a3ms]),
        Reader("hhr", _read_hhr, hhrs),
        Reader("clusters", lambda f, d: labels.read_clusters(_write(f / "clusters.txt", d)), [clusters]),
        Reader("obsolete", lambda f, d: labels.read_obsolete(_write(f / "obsolete.dat", d)), [obsolete]),
        Reader("duplicates", _read_duplicates, [duplicates]),
        Reader(
            "evaluation_list",
            lambda f, d: selection.read_evaluation_file(_write(f / "evaluation.txt", d)),
            [made.targets_file.read_bytes(), b"1abc_A\n2XYZ_B\n"],
        ),
        Reader("chains_table", _read_chains, [_chain_table()]),
        Reader("structure_pickle", lambda f, d: official.read_entries(_write(f / "ab.pkl", d)), _pickles(cifs)),
        Reader("super_index", _read_super_index, [_super_index(folder, a3ms[0])]),
        Reader("yaml", _read_yaml, [_YAML, b"system: y\nbase: base.yaml\nphases:\n- {name: a, until_step: 40}\n"]),
        Reader("override", _read_override, [b"training.seed=3", b"launch.environment={A: b}", b"launch.nics=[a, b]"]),
        Reader("checkpoint", _read_weights, _checkpoints(folder)),
        Reader("run_state", _read_run_state, [b'{"iteration": 4, "seed": 1, "num_averaged": 4, "phase": 0}']),
        Reader("mlperf_log", _read_log, [log]),
        Reader("report_log", _read_result, [log]),
        Reader("metrics", _read_metrics, [_metrics(folder / "other")]),
        Reader("rejected", _read_rejected, [(folder / "store" / "rejected.csv").read_bytes() + b"note,a,b,c\n"]),
        Reader("manifest", _read_manifest, [(folder / "store" / "manifest.json").read_bytes()]),
        Reader("store_index", _read_index, _columns(folder / "store" / "index")),
        *_record_readers(folder / "store"),
        Reader("tuned_table", lambda f, d: tuning.read_table(_write(f / "sm.json", d)), [_TUNED]),
        Reader("download_list", _read_listing, [f"path,bytes,sha256\na/b.db,12,{'a' * 64}\nc,,\n".encode()]),
        Reader("download_ids", _read_ids, [b"1abc\n2XYZ x\n", b"IDCODE, HEADER\n------\n1ABC\tX\n"]),
        Reader("download_bucket", _read_bucket, [_BUCKET]),
    ]
    return {reader.name: reader for reader in readers}


_YAML = b"""system: x
description: "a: b"
training: {global_batch_size: 4, opt_base_learning_rate: 1e-3, seed: null}
data:
  store_dir: a/b
launch:
  environment: {NCCL_DEBUG: INFO}
  nics: [a]
"""
_TUNED = b'{"norm": {"c=128 dtype=bfloat16 rows=256": {"BLOCK": 64, "num_warps": 4}}}'
_BUCKET = b"""<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Contents><Key>prefix/a/x.a3m</Key>
<Size>3</Size></Contents></ListBucketResult>"""


def _columns(index: Path) -> list[bytes]:
    return [bytes([number]) + (index / f"{name}.npy").read_bytes() for number, name in enumerate(_COLUMNS)]


def _stockholm(a3m: bytes) -> bytes:
    rows = [re.sub(rb"[a-z]", b"", row) for row in a3m.split(b"\n") if row and not row.startswith(b">")]
    return b"# STOCKHOLM 1.0\n" + b"".join(b"row%d %s\n" % (n, row) for n, row in enumerate(rows)) + b"//\n"


def _chain_table() -> bytes:
    return b"pdb_chain_id,mmcif_chain_ids,pdb_cluster_id,sequence\n1abc_A,A;B,3,MKT\n1abc_B,C,-1,MKV\n2xyz_A,A,12.0,\n"


def _pickles(cifs: list[Path]) -> list[bytes]:
    content = {}
    for path in cifs:
        entry = mmcif.read_entry(path)
        content[entry.pdb_id] = {
            "exptl_method": entry.method,
            "release_date": entry.release_date,
            "resolution": np.float64(entry.resolution),
            "entity_id_to_mmcif_chain_ids": {"1": [chain.asym_id for chain in entry.chains]},
            "mmcif_chain_id_to_author_chain_id": {c.asym_id: c.author_chain_id for c in entry.chains},
            "sequences": {chain.author_chain_id: chain.sequence for chain in entry.chains},
            "atoms": {
                chain.author_chain_id: {
                    "all_atom_positions": (zlib.compress(chain.positions.tobytes()), chain.positions.shape),
                    "all_atom_mask": (zlib.compress(chain.mask.tobytes()), chain.mask.shape),
                }
                for chain in entry.chains
            },
        }
    return [pickle.dumps(content, 4), pickle.dumps({"1abc": next(iter(content.values()))}, 5)]


def _super_index(folder: Path, a3m: bytes) -> bytes:
    (folder / "0.db").write_bytes(a3m)
    files = [["uniref90_hits.a3m", 0, len(a3m)], ["pdb70_hits.hhr", 0, 0]]
    return json.dumps({"1abc_A": {"db": "0.db", "files": files}, "1abc_B": {"db": "0.db", "files": []}}).encode()


def _checkpoints(folder: Path) -> list[bytes]:
    weights = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.zeros(3)}
    torch.save({"alphafold_state_dict": weights, "iteration": 3}, folder / "a.pt")
    torch.save({f"averaged_model.module.{name}": value for name, value in weights.items()}, folder / "b.pt")
    return [(folder / name).read_bytes() for name in ("a.pt", "b.pt")]


def _short_log(folder: Path) -> bytes:
    """A rehearsed log with the first and the last line of every key."""
    full = write_rehearsal(published_script(published_runs(submitter="NVIDIA")[1]), folder / "full.txt")
    lines = full.read_text().splitlines()
    keys = [json.loads(line.removeprefix(TOKEN))["key"] for line in lines]
    kept = {i for i, key in enumerate(keys) if key not in keys[:i] or key not in keys[i + 1 :]}
    return "".join(f"{lines[i]}\n" for i in sorted(kept)).encode()


def _metrics(run: Path) -> bytes:
    with contextlib.closing(Record(run, rank0=True)) as record:
        record.run(config="tiny", target=0.8)
        for step in range(1, 6):
            record.step(
                StepRow(step, 2.0 / step, {"fape": 1.0}, lr=1e-3, step_ms=3.0, samples=4 * step, time_s=1.0 * step)
            )
        record.evaluation(EvalRow(4, 16, 0.5, seconds=1.0, time_s=5.0, chains={"1abc_A": 0.5}))
        record.event("loader", slowest=[{"chain": "1abc_A", "seconds": 1.0}], workers=1, prefetch=2)
    return (run / "metrics.jsonl").read_bytes()


_COLUMNS = ("chain.chain_id", "chain.order", "chain.alignment", "chain.structure_offset", "alignment.num_bytes")


def _record_readers(folder: Path) -> list[Reader]:
    opened = store.Store(folder)
    table, columns = opened.table, opened.alignments
    structure, alignment, hits = [], [], []
    for row in range(3, 7):
        at, index = (table.structure_shard, table.structure_offset, table.structure_bytes), int(table.alignment[row])
        structure.append(_record(opened._structures, at, row))
        at = (table.template_shard, table.template_offset, table.template_bytes)
        hits.append(_record(opened._alignments, at, row))
        alignment.append(_record(opened._alignments, (columns.shard, columns.offset, columns.num_bytes), index))
    opened.close()
    return [
        Reader("structure_record", _read_structure_record, structure),
        Reader("alignment_record", _read_msa_record, alignment),
        Reader("template_record", _read_template_record, hits),
    ]


def _record(shards: store.ShardReader, place: tuple[np.ndarray, ...], row: int) -> bytes:
    shard, offset, num_bytes = (int(column[row]) for column in place)
    return shards.read(shard, offset, num_bytes, "sample")._data.tobytes()


# --- damage -----------------------------------------------------------------------------------------------------------

TOKENS = [
    *(b"nan", b"inf", b"-inf", b"1e30", b"1e999", b"-1", b"0", b"99999999999999999999", b"9" * 400, b"9" * 5000),
    *(b"null", b"true", b"[]", b"{}", b'""', b"?", b".", b"-", b"*", b"''", b'"', b"'", b";", b"#", b",", b":", b"\t"),
    *(b"\0", b"\xff", b"\xfc", b"\xed\xa0\x80", "é²".encode(), b"\xef\xbb\xbf", b"\r\n", b"\n", b" ", b"../../x"),
    *(b"[" * 3000, b"{" * 200, b'{"a":' * 2000, b"O8", b"|O", b"<U9", b"2021-13-41", b"__reduce__", b"*a", b"&a "),
]
_WORD = re.compile(rb"[A-Za-z0-9_.+-]+")


def mutate(rng: random.Random, samples: list[bytes]) -> bytes:
    """A sample with one to eight kinds of damage."""
    data = rng.choice(samples)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        data = rng.choice(MUTATORS)(rng, data, samples)
    return data


def _place(rng: random.Random, data: bytes) -> int:
    return rng.randrange(len(data) + 1)


def _flip_bit(rng: random.Random, data: bytes, _: list[bytes]) -> bytes:
    at = _place(rng, data)
    return data[:at] + bytes([byte ^ 1 << rng.randrange(8) for byte in data[at : at + 1]]) + data[at + 1 :]


def _overwrite(rng: random.Random, data: bytes, _: list[bytes]) -> bytes:
    at, count = _place(rng, data), rng.choice((1, 2, 4, 8))
    return data[:at] + rng.choice((rng.randbytes(count), b"\xff" * count, bytes(count))) + data[at + count :]


def _insert_token(rng: random.Random, data: bytes, _: list[bytes]) -> bytes:
    at = _place(rng, data)
    return data[:at] + rng.choice(TOKENS) + data[at:]


def _replace_word(rng: random.Random, data: bytes, samples: list[bytes]) -> bytes:
    start = _place(rng, data)
    found = _WORD.search(data, max(0, start - 12))
    if not found:
        return _insert_token(rng, data, samples)
    return data[: found.start()] + rng.choice(TOKENS) + data[found.end() :]


def _cut(rng: random.Random, data: bytes, _: list[bytes]) -> bytes:
    return data[: _place(rng, data)]


def _remove(rng: random.Random, data: bytes, _: list[bytes]) -> bytes:
    at = _place(rng, data)
    return data[:at] + data[at + rng.choice((1, 2, 10, 100)) :]


def _repeat(rng: random.Random, data: bytes, _: list[bytes]) -> bytes:
    at, count = _place(rng, data), rng.choice((1, 10, 100, 1000))
    return data[:at] + data[at : at + count] * rng.choice((2, 3)) + data[at + count :]


def _splice(rng: random.Random, data: bytes, samples: list[bytes]) -> bytes:
    other = rng.choice(samples)
    return data[: _place(rng, data)] + other[_place(rng, other) :]


def _shuffle_lines(rng: random.Random, data: bytes, _: list[bytes]) -> bytes:
    lines = data.split(b"\n")
    a, b = rng.randrange(len(lines)), rng.randrange(len(lines))
    lines[a], lines[b] = lines[b], lines[a]
    return b"\n".join(lines)


def _change_json(rng: random.Random, data: bytes, samples: list[bytes]) -> bytes:
    """Another type in the place of one value of a JSON text; of one of its lines, if it holds one per line."""
    lines = data.split(b"\n")
    at = rng.randrange(len(lines)) if len(lines) > 1 and not data.startswith(b"{\n") else None
    text = data if at is None else lines[at]
    head, brace, tail = text.partition(b"{")
    try:
        value = json.loads(brace + tail)
    except (ValueError, RecursionError):
        return _replace_word(rng, data, samples)
    changed = head + json.dumps(_changed(rng, value)).encode()
    return changed if at is None else b"\n".join([*lines[:at], changed, *lines[at + 1 :]])


def _changed(rng: random.Random, value: object) -> object:
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        if rng.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        return value | {key: _changed(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.9:
        at = rng.randrange(len(value))
        return [*value[:at], _changed(rng, value[at]), *value[at + 1 :]]
    return rng.choice(
        (None, True, -1, 0, 10**30, 10**18, float("nan"), float("inf"), "", "x", "..", [], {}, [1], {"a": 1})
    )


MUTATORS = (
    *(_flip_bit, _overwrite, _insert_token, _replace_word, _replace_word, _cut, _remove, _repeat, _splice),
    *(_shuffle_lines, _change_json, _change_json),
)
