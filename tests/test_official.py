"""The official preprocessed set as input of prepare: chain for chain what the raw files give, and safe to read."""

import csv
import hashlib
import json
import os
import pickle
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest

from scalefold.data.made.demo import Summary, generate
from scalefold.data.raw import mmcif, official
from scalefold.data.raw.rawlayout import RawLayout
from scalefold.data.store.labels import read_clusters
from scalefold.data.store.prepare import prepare
from scalefold.data.store.store import Store
from scalefold.errors import DataError

REAL = Path(__file__).parent / "data" / "real" / "pdb_mmcif" / "raw"
ALIGNMENT_FILES = ("uniref90_hits.a3m", "bfd_uniclust_hits.a3m", "mgnify_hits.a3m", "pdb70_hits.hhr")


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Summary:
    """Generated entries with alignments, some with two identical chains, and two real entries beside them."""
    made = generate(tmp_path_factory.mktemp("official") / "raw", seed=5, num_train=12, num_eval=2)
    for file in REAL.glob("*.cif.gz"):
        folder = made.mmcif_dir / file.name[1:3]
        folder.mkdir(exist_ok=True)
        shutil.copy(file, folder)
    return made


@pytest.fixture(scope="module")
def official_set(raw: Summary) -> Path:
    """The same data in the layout of the official set, written by this test."""
    out = raw.mmcif_dir.parent / "official"
    entries = [mmcif.read_entry(file) for file in sorted(raw.mmcif_dir.rglob("*.cif*"))]
    write_structures(out / "structures", entries, read_clusters(raw.clusters_file))
    write_alignments(out / "alignments", raw)
    return out


def write_structures(out: Path, entries: list[mmcif.Entry], cluster_of: dict[str, int]) -> None:
    (out / "dicts").mkdir(parents=True)
    dicts: dict[str, dict] = {}
    for entry in entries:
        dicts.setdefault(entry.pdb_id[1:3], {})[entry.pdb_id] = packed(entry)
    for letters, content in dicts.items():
        (out / "dicts" / f"{letters}.pkl").write_bytes(pickle.dumps(content))
    with (out / "chains.csv").open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["pdb_chain_id", "mmcif_chain_ids", "pdb_cluster_id", "sequence"])
        for entry in entries:
            for chain in entry.chains:
                found = {cluster_of.get(f"{entry.pdb_id.upper()}_{e}", -1) for e in chain.entity_ids} - {-1}
                name = f"{entry.pdb_id}_{chain.author_chain_id}"
                table.writerow([name, ";".join(chain.asym_ids), min(found, default=-1), chain.sequence])


def packed(entry: mmcif.Entry) -> dict:
    def pack(array: np.ndarray) -> tuple[bytes, tuple[int, ...]]:
        return zlib.compress(array.tobytes()), array.shape

    entities: dict[str, list[str]] = {}
    for chain in entry.chains:
        entities.setdefault(chain.entity_id, []).append(chain.asym_id)
    return {
        "pdb_id": entry.pdb_id,
        "exptl_method": entry.method,
        "release_date": entry.release_date,
        "resolution": entry.resolution,
        "author_chain_ids": [chain.author_chain_id for chain in entry.chains],
        "entity_id_to_mmcif_chain_ids": entities,
        "mmcif_chain_id_to_author_chain_id": {chain.asym_id: chain.author_chain_id for chain in entry.chains},
        "sequences": {chain.author_chain_id: chain.sequence for chain in entry.chains},
        "atoms": {
            chain.author_chain_id: {"all_atom_positions": pack(chain.positions), "all_atom_mask": pack(chain.mask)}
            for chain in entry.chains
        },
    }


def write_alignments(out: Path, raw: Summary) -> None:
    out.mkdir()
    clusters = [line.split() for line in raw.duplicates_file.read_text().splitlines()]
    index, shards = {}, {k: bytearray() for k in range(10)}
    for folder in sorted(path for path in raw.alignments_dir.iterdir() if path.is_dir()):
        shard = int.from_bytes(hashlib.sha256(folder.name.encode()).digest()[:8], "little") % 10
        files = []
        for path in sorted(folder.glob("*/*")):
            content = path.read_bytes()
            files.append([path.name, len(shards[shard]), len(content)])
            shards[shard] += content
        record = {"db": f"{shard}.db", "files": files}
        members = next((cluster for cluster in clusters if folder.name in cluster), [folder.name])
        index |= dict.fromkeys(members, record)
    for shard, content in shards.items():
        (out / f"{shard}.db").write_bytes(content)
    (out / "super.index").write_text(json.dumps(index))


def prepared(out: Path, mmcif_dir: Path, alignments: Path, raw: Summary, clusters: Path | None) -> Store:
    layout = RawLayout(mmcif_dir, (alignments,), clusters, raw.obsolete_file, raw.targets_file)
    prepare(layout, out, report=lambda text: None)
    return Store(out)


def test_the_official_set_gives_chain_for_chain_what_the_raw_files_give(
    raw: Summary, official_set: Path, tmp_path: Path
) -> None:
    one = prepared(tmp_path / "raw", raw.mmcif_dir, raw.alignments_dir.parent, raw, raw.clusters_file)
    two = prepared(tmp_path / "official", official_set / "structures", official_set / "alignments", raw, None)
    assert two.chain_ids == one.chain_ids
    assert {"1cbn_A", "1a8o_A"} < set(two.chain_ids)
    for column in ("length", "release_date", "cluster_id", "num_ca", "asym_ids_text", "msa_rows", "num_template_hits"):
        np.testing.assert_array_equal(getattr(two.table, column), getattr(one.table, column), err_msg=column)
    np.testing.assert_array_equal(two.table.resolution, one.table.resolution)
    assert one.table.has_alignment.any()
    assert int(np.sum(one.table.num_template_hits)) > 0
    assert len(set(one.table.cluster_id.tolist())) > 2
    for chain_id in one.chain_ids:
        a, b = one.read(chain_id), two.read(chain_id)
        assert b.sequence == a.sequence
        for name in ("aatype", "all_atom_positions", "all_atom_mask", "msa", "deletion_matrix"):
            np.testing.assert_array_equal(getattr(b, name), getattr(a, name), err_msg=f"{chain_id} {name}")
        assert [hit.name for hit in b.templates] == [hit.name for hit in a.templates]


class RunsCode:
    """Pickled, this asks the reader to call a function."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.target),)


def test_a_pickle_that_wants_to_run_code_is_refused_and_nothing_runs(tmp_path: Path) -> None:
    file, target = tmp_path / "ab.pkl", tmp_path / "made"
    file.write_bytes(pickle.dumps({"1abc": RunsCode(target)}))
    with pytest.raises(DataError, match=r"ab\.pkl: the pickle wants to load posix\.mkdir"):
        official.read_entries(file)
    assert not target.exists()


def spoil(fields: dict, what: str) -> dict:
    if what == "missing":
        del fields["sequences"]
    if what == "short":
        fields["sequences"]["A"] += "A"
    if what == "packed":
        fields["atoms"]["A"]["all_atom_mask"] = (b"no zlib", (1, 37))
    return fields


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing", r"entry 1a8o has no 'sequences'"),
        ("short", r"entry 1a8o cannot be read: chain A: 71 residues, but atoms \(70, 37, 3\)"),
        ("packed", r"entry 1a8o cannot be read: .*incorrect header"),
    ],
)
def test_a_damaged_entry_names_file_entry_and_reason(tmp_path: Path, what: str, message: str) -> None:
    fields = spoil(packed(mmcif.read_entry(REAL / "1a8o.cif.gz")), what)
    file = tmp_path / "a8.pkl"
    file.write_bytes(pickle.dumps({"1a8o": fields}))
    with pytest.raises(DataError, match=rf"a8\.pkl: {message}"):
        official.read_entries(file)


def test_a_cut_pickle_is_an_error_with_its_name(tmp_path: Path) -> None:
    file = tmp_path / "ab.pkl"
    file.write_bytes(pickle.dumps({"1abc": {}})[:-3])
    with pytest.raises(DataError, match=r"ab\.pkl: no readable pickle"):
        official.read_entries(file)


def test_a_shard_that_is_shorter_than_its_index_is_named(tmp_path: Path) -> None:
    (tmp_path / "0.db").write_bytes(b"1234")
    index = {"1abc_A": {"db": "0.db", "files": [["uniref90_hits.a3m", 2, 3]]}}
    (tmp_path / "super.index").write_text(json.dumps(index))
    with pytest.raises(DataError, match=r"super\.index: names shards that are missing or too short: .*0\.db"):
        official.alignment_folders(tmp_path)


def test_a_chain_table_without_clusters_is_refused(tmp_path: Path) -> None:
    (tmp_path / "chains.csv").write_text("pdb_chain_id,mmcif_chain_ids\n1abc_A,A\n")
    with pytest.raises(DataError, match=r"chains\.csv: column pdb_cluster_id is missing"):
        official.read_chain_table(tmp_path)
    (tmp_path / "chains.csv").write_text("pdb_chain_id,mmcif_chain_ids,pdb_cluster_id\n1abc_A,A,x\n")
    with pytest.raises(DataError, match=r"chains\.csv:2: pdb_cluster_id `x` is no number"):
        official.read_chain_table(tmp_path)


@pytest.mark.parametrize("db", ["/etc/passwd", "../0.db", "a/../../0.db"])
def test_an_index_that_leaves_its_folder_is_refused(tmp_path: Path, db: str) -> None:
    """Whatever lies there would be taken for alignments."""
    (tmp_path / "super.index").write_text(json.dumps({"1abc_A": {"db": db, "files": [["uniref90_hits.a3m", 0, 1]]}}))
    with pytest.raises(DataError, match=rf"super\.index: chain 1abc_A: db '{db}' must lie in this folder"):
        official.alignment_folders(tmp_path)


@pytest.mark.parametrize(
    "index", ["[]", "{", '{"../x": {"db": "0.db", "files": []}}', '{"1abc_A": {"db": "0.db", "files": [[1, 2, 3]]}}']
)
def test_an_index_of_another_form_is_refused(tmp_path: Path, index: str) -> None:
    (tmp_path / "super.index").write_text(index)
    with pytest.raises(DataError, match=r"super\.index: no readable index"):
        official.alignment_folders(tmp_path)


def test_a_shard_name_that_no_file_can_have_is_named(tmp_path: Path) -> None:
    index = {"1abc_A": {"db": "9" * 5000, "files": [["uniref90_hits.a3m", 0, 1]]}}
    (tmp_path / "super.index").write_text(json.dumps(index))
    with pytest.raises(DataError, match=r"super\.index: names shards that are missing or too short"):
        official.alignment_folders(tmp_path)


def test_a_chain_table_in_another_encoding_or_with_short_lines_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "chains.csv"
    path.write_bytes(b"pdb_chain_id,mmcif_chain_ids,pdb_cluster_id\n1abc_\xfc,A,0\n")
    with pytest.raises(DataError, match=r"chains\.csv:2: byte 49 \(0xfc\) is not UTF-8 text; save"):
        official.read_chain_table(tmp_path)
    for line, message in {
        "1abc_A,A": "too few columns",
        "1abc_A,A,1e999": "no number",
        "1abc_A,A,1e12": "2^31",
    }.items():
        path.write_text(f"pdb_chain_id,mmcif_chain_ids,pdb_cluster_id\n{line}\n")
        with pytest.raises(DataError, match=r"chains\.csv:2: ") as caught:
            official.read_chain_table(tmp_path)
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"release_date": "tomorrow"}, "revision date 'tomorrow' is not of the form"),
        ({"sequences": {"A": "A" * 69 + "é"}}, "chain A: sequence .* is none"),
        ({"sequences": {"A": [1]}}, "sequence is no text"),
        ({"exptl_method": [[]]}, "a list stands where"),
        ({"resolution": {}}, "cannot be read"),
    ],
)
def test_an_entry_with_a_wrong_type_or_text_is_named(tmp_path: Path, change: dict, message: str) -> None:
    fields = packed(mmcif.read_entry(REAL / "1a8o.cif.gz")) | change
    file = tmp_path / "a8.pkl"
    file.write_bytes(pickle.dumps({"1a8o": fields}))
    with pytest.raises(DataError, match=rf"a8\.pkl: entry 1a8o .*{message}"):
        official.read_entries(file)


def test_coordinates_that_are_no_place_reject_the_pickle(tmp_path: Path) -> None:
    entry = mmcif.read_entry(REAL / "1a8o.cif.gz")
    entry.chains[0].positions[3, 1, 2] = np.nan
    file = tmp_path / "a8.pkl"
    file.write_bytes(pickle.dumps({"1a8o": packed(entry)}))
    with pytest.raises(DataError, match=r"entry 1a8o cannot be read: chain A: atoms: coordinate nan is not within"):
        official.read_entries(file)


def test_a_few_bytes_that_unpack_to_gigabytes_are_refused(tmp_path: Path) -> None:
    atoms = {
        "all_atom_positions": (zlib.compress(bytes(4000 * 444), 9), (4000, 37, 3)),
        "all_atom_mask": (zlib.compress(bytes(4000 * 37), 9), (4000, 37)),
    }
    fields = packed(mmcif.read_entry(REAL / "1a8o.cif.gz"))
    names = [f"c{n}" for n in range(3000)]
    fields |= {"sequences": dict.fromkeys(names, "A" * 4000), "atoms": dict.fromkeys(names, atoms)}
    file = tmp_path / "a8.pkl"
    file.write_bytes(pickle.dumps({"1a8o": fields}))
    with pytest.raises(DataError, match=r"repeats its parts so often|packed far more tightly"):
        official.read_entries(file)
