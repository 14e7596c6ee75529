"""All real chains and alignments against what the MLCommons reference makes of the same files, bit for bit.

Needs the reference material folder; about a minute. The store is prepared once and read back, so every comparison
covers parsing, packing and reading.

Longer than 400 lines, because it follows the real chains through every stage of the data.
"""

import csv
import gzip
import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest

from scalefold.data import residues
from scalefold.data.raw import align, mmcif, msa
from scalefold.data.raw.rawfile import read_bytes
from scalefold.data.raw.rawlayout import RawLayout
from scalefold.data.store import prepare, selection, templates
from scalefold.data.store.alignments import TemplateLookup
from scalefold.data.store.store import Store
from scalefold.errors import DataError


def sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module")
def real(golden_dir):
    return golden_dir / "real"


@pytest.fixture(scope="module")
def raw(shared_dir):
    return shared_dir / "data"


@pytest.fixture(scope="module")
def summary(raw, tmp_path_factory):
    structures = raw / "pdb_mmcif"
    layout = RawLayout(
        structures / "raw",
        (raw / "open_protein_set", raw / "open_protein_set_computed"),
        structures / "clusters-by-entity-40.txt",
        structures / "obsolete.dat",
    )
    return prepare.prepare(layout, tmp_path_factory.mktemp("real") / "store", num_workers=2)


@pytest.fixture(scope="module")
def store(summary):
    return Store(summary.store_dir)


def test_every_chain_is_prepared_or_rejected_with_a_reason(summary, store, real):
    """1,051 chains; 64 nucleic-acid polymers and the 29 alignment-only folders are the rejections."""
    assert summary.num_chains == 1051
    assert summary.num_rejected == 64 + 29
    assert summary.store_bytes < summary.raw_bytes
    assert len(table(real / "polymers_not_taken.csv")) == 64


def test_chain_table_equals_the_reference_row_by_row(store, real):
    """Order, sequences, asym ids, dates, resolutions and clusters: this fixes all data set indices."""
    expected = table(real / "chains.csv")
    assert store.chain_ids == [row["pdb_chain_id"] for row in expected]
    columns = store.table
    for i, row in enumerate(expected):
        assert ";".join(columns.asym_ids(i)) == row["mmcif_chain_ids"]
        assert str(columns.release_date[i]) == row["release_date"]
        assert columns.cluster_id[i] == int(row["pdb_cluster_id"])
        assert columns.length[i] == int(row["sequence_length"])
        same = math.isnan(columns.resolution[i]) if not row["resolution"] else None
        assert same if same is not None else columns.resolution[i] == float(row["resolution"])


def test_positions_masks_and_sequences_of_all_chains_are_equal(store, real):
    """Through the store's packing: 1,051 hashes of float32 coordinates, masks and residue types."""
    for i, row in enumerate(table(real / "chain_arrays.csv")):
        structure = store.read_structure(i)
        assert sha256(structure.positions) == row["positions_sha256"], row["pdb_chain_id"]
        assert sha256(structure.mask) == row["mask_bool_sha256"]
        assert sha256(structure.aatype.astype(np.int32)) == row["aatype_sha256"]
        assert hashlib.sha256(structure.sequence.encode()).hexdigest() == row["sequence_sha256"]
        assert store.table.num_ca[i] == int(row["num_ca"])


def test_structures_equal_the_reference_arrays(store, real):
    """The 22 chains whose arrays are stored whole: NMR, selenium, insertions, chromophore, all X, ..."""
    with np.load(real / "structures.npz", allow_pickle=False) as arrays:
        chains = {key.split("/")[0] for key in arrays.files}
        assert len(chains) == 22
        for chain in chains:
            record = store.read(chain, msa=False)
            np.testing.assert_array_equal(record.all_atom_positions, arrays[f"{chain}/all_atom_positions"])
            np.testing.assert_array_equal(record.all_atom_mask, arrays[f"{chain}/all_atom_mask"])
            np.testing.assert_array_equal(np.eye(21, dtype=np.int8)[record.aatype], arrays[f"{chain}/aatype"])
            np.testing.assert_array_equal(np.float32(record.resolution), arrays[f"{chain}/resolution"][0])


def test_left_out_polymers_equal_the_reference(raw, real):
    """All nucleic acids, with their monomer types."""
    expected = table(real / "polymers_not_taken.csv")
    found = []
    for pdb_id in sorted({row["pdb_id"] for row in expected}):
        entry = mmcif.read_entry(raw / "pdb_mmcif" / "raw" / pdb_id[1:3] / f"{pdb_id}.cif.gz")
        found += [(pdb_id, *left_out) for left_out in entry.left_out]
    keys = ("pdb_id", "mmcif_chain_id", "author_chain_id", "monomer_types")
    assert sorted(found) == sorted(tuple(row[key] for key in keys) for row in expected)


# --- edited entries ---------------------------------------------------------------------------------------------------


def atom_rows(text: str) -> list[str]:
    return [line for line in text.splitlines(keepends=True) if line.startswith(("ATOM", "HETATM"))]


def edit_rows(text: str, change) -> str:
    """The text with ``change`` applied to the fields of every coordinate row; None removes the row."""
    lines = []
    for line in text.splitlines(keepends=True):
        if line.startswith(("ATOM", "HETATM")):
            fields = change(line.split())
            line = " ".join(fields) + "\n" if fields else ""
        lines.append(line)
    return "".join(lines)


def set_first(text: str, field: int, value: str) -> str:
    first = atom_rows(text)[0]
    fields = first.split()
    fields[field] = value
    return text.replace(first, " ".join(fields) + "\n", 1)


def set_all(field: int, value: str, where=lambda fields: True):
    def change(fields):
        if where(fields):
            fields[field] = value
        return fields

    return change


def merge_chain_b_into_a(fields):
    if fields[18] == "B":
        fields[18], fields[16] = "A", str(int(fields[16]) + 1000)
    return fields


def cut_after(text: str, rows: int, fields: int | None = None) -> str:
    last = atom_rows(text)[rows - 1]
    head = text[: text.index(last)]
    return head + (last if fields is None else " ".join(last.split()[:fields]))


RENAMED = [
    "_entry.id",
    "_exptl.method",
    "_pdbx_audit_revision_history.revision_date",
    "_struct_asym.entity_id",
    "_entity_poly_seq.mon_id",
    "_chem_comp.type",
    "_atom_site.pdbx_PDB_model_num",
    "_atom_site.pdbx_PDB_ins_code",
    "_atom_site.auth_seq_id",
    "_atom_site.label_seq_id",
    "_refine.ls_d_res_high",
    "_reflns.d_resolution_high",
]
RESOLUTION = "_refine.ls_d_res_high                            1.70"
EDITS = {f"no {item}": lambda text, item=item: text.replace(item, item + "X") for item in RENAMED} | {
    "unchanged": lambda text: text,
    "no refine and no reflns resolution": lambda text: EDITS["no _reflns.d_resolution_high"](
        EDITS["no _refine.ls_d_res_high"](text)
    ),
    'refine resolution "."': lambda text: text.replace(RESOLUTION, RESOLUTION.replace("1.70", ".")),
    "model number 2": lambda text: edit_rows(text, set_all(20, "2")),
    "polymer without coordinates": lambda text: edit_rows(text, lambda f: None if f[6] == "A" else f),
    "all rows without coordinates": lambda text: edit_rows(text, lambda f: None),
    "one asym id with two author chain ids": lambda text: set_first(text, 18, "Z"),
    "no peptide monomers": lambda text: text.replace("peptide", "PEPTIDE"),
    "long entry id": lambda text: text.replace("_entry.id   1A8O", "_entry.id   pdb_00001A8O"),
    "bad revision date": lambda text: text.replace("1 0 1998-10-14", "1 0 1998/01/01"),
    "revision date ?": lambda text: text.replace("1 0 1998-10-14", "1 0 ?"),
    "truncated half": lambda text: text[: len(text) // 2],
    "truncated in coordinates": lambda text: cut_after(text, 300),
    "cut inside a coordinate row": lambda text: cut_after(text, 300, 6),
    "coordinate ?": lambda text: set_first(text, 10, "?"),
    "occupancy ?": lambda text: set_first(text, 13, "?"),
    "b factor ?": lambda text: set_first(text, 14, "?"),
    "duplicate atom": lambda text: text.replace(
        atom_rows(text)[0], atom_rows(text)[0] + atom_rows(text)[0].replace("19.594", "0.000"), 1
    ),
    "unknown monomer type": lambda text: text.replace("MSE 'L-peptide linking'", "ZZZ 'L-peptide linking'"),
    "empty file": lambda text: "",
    "CRLF": lambda text: text.replace("\n", "\r\n"),
    "auth seq id non numeric": lambda text: set_first(text, 16, "1A"),
    "other author chain id for all non-polymer rows": lambda text: edit_rows(
        text, set_all(18, "Q", lambda f: f[6] != "A")
    ),
    "two polymers under one author chain id (1hdf)": lambda text: edit_rows(text, merge_chain_b_into_a),
}


def test_edited_entries_are_accepted_or_rejected_like_the_reference(raw, real):
    """36 edits of real entries: same decision, and the same arrays where accepted."""
    golden = json.loads((real / "entry_variants.json").read_text())
    assert {variant["name"] for variant in golden["variants"]} == set(EDITS)
    for variant in golden["variants"]:
        file = "hd/1hdf.cif.gz" if "1hdf" in variant["name"] else "a8/1a8o.cif.gz"
        original = gzip.decompress((raw / "pdb_mmcif" / "raw" / file).read_bytes()).decode()
        text = EDITS[variant["name"]](original)
        assert (text != original) == (variant["name"] != "unchanged"), f"edit had no effect: {variant['name']}"
        try:
            entry = mmcif.parse_entry(text)
        except DataError:
            entry = None
        assert (entry is not None) == variant["accepted"], variant["name"]
        if entry:
            assert {chain.author_chain_id for chain in entry.chains} == set(variant["chains"])
            for chain in entry.chains:
                expected = variant["chains"][chain.author_chain_id]
                assert sha256(chain.positions) == expected["positions_sha256"], variant["name"]
                assert chain.mask.sum() == expected["num_atoms"]
            assert str(entry.resolution) == variant["resolution"]
            assert (entry.release_date, entry.method) == (variant["release_date"], variant["exptl_method"])


# --- alignments -------------------------------------------------------------------------------------------------------


def alignment_folder(raw: Path, row: dict[str, str]) -> Path:
    root = "open_protein_set" if row["kind"] == "native" else "open_protein_set_computed"
    return raw / root / "pdb" / row["directory"]


def test_all_alignments_have_the_reference_digest(raw, real):
    """233 folders: letters, deletion counts and rows per file."""
    rows = table(real / "msa.csv")
    assert len(rows) == 233
    for row in rows:
        alignment = msa.read_alignment(alignment_folder(raw, row))
        assert alignment is not None
        assert sha256(alignment.msa.astype(np.int32)) == row["msa_sha256"], row["directory"]
        assert sha256(alignment.deletions.astype(np.int32)) == row["deletion_sha256"], row["directory"]
        counts = [alignment.rows_read.get(f"{name}.a3m.gz", 0) for name in msa.ALIGNMENT_NAMES]
        assert counts == [int(row[key]) for key in ("rows_uniref90", "rows_bfd", "rows_mgnify")]


def test_stored_alignments_have_the_reference_digest(store, real):
    """Every folder that has a chain here, read back from the store for each of its chains."""
    for row in table(real / "msa.csv"):
        for chain in row["members"].split():
            found = store.table.find(chain)
            if found is not None and store.table.msa_rows[found] == int(row["unique_rows"]):
                record = store.read(chain)
                assert sha256(record.msa.astype(np.int32)) == row["msa_sha256"], chain
                assert sha256(record.deletion_matrix.astype(np.int32)) == row["deletion_sha256"], chain
    assert store.table.has_alignment.sum() == 384


def test_alignment_texts_are_accepted_or_refused_like_the_reference(real):
    """23 small texts with every oddity."""
    for variant in json.loads((real / "msa_variants.json").read_text()):
        names = ("uniref90", "bfd_uniclust", "mgnify")
        try:
            merged = msa.merge({n: msa.parse_a3m(variant[n].encode()) for n in names if variant[n]})
            accepted = True
        except DataError:
            merged, accepted = None, False
        assert accepted == variant["accepted"], variant["name"]
        if merged:
            assert sha256(merged.msa.astype(np.int32)) == variant["msa_sha256"], variant["name"]
            assert sha256(merged.deletions.astype(np.int32)) == variant["deletion_sha256"], variant["name"]


# --- templates --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lookup(store):
    return TemplateLookup(store.path, {})


def query_of(name: str, golden: dict) -> templates.Query:
    return templates.Query(name[:4], golden["sequence"], np.datetime64(golden["release_date"]))


def hits_of(raw: Path, golden: dict) -> list[templates.HhrHit]:
    path = raw / "open_protein_set" / "pdb" / golden["directory"] / "hhr" / "pdb70_hits.hhr.gz"
    return templates.parse_hhr(read_bytes(path).decode())


def test_all_template_decisions_equal_the_reference(raw, real, lookup):
    """12,960 hits of 44 queries, with the chain table as it is and as if every chain were in it."""
    obsolete = templates.parse_obsolete((raw / "pdb_mmcif" / "obsolete.dat").read_text())
    sources = templates.TemplateSources(lookup.release_date, obsolete, lookup.entry)

    def date_or_unknown(name):
        return lookup.release_date(name) or np.datetime64("NaT")

    all_present = templates.TemplateSources(date_or_unknown, obsolete, lookup.entry)
    golden = json.loads((real / "templates.json").read_text())
    expected: dict[str, list] = {}
    for row in table(real / "template_hits.csv"):
        expected.setdefault(row["query"], []).append(row)
    compared = 0
    for name, facts in golden.items():
        query = query_of(name, facts)
        for hit, row in zip(hits_of(raw, facts), expected[name], strict=True):
            current = templates.current_name(hit, sources)
            assert (str(hit.number), hit.name, str(hit.aligned_cols)) == (row["hit"], row["name"], row["aligned_cols"])
            assert hit.sum_probs == float(row["sum_probs"])
            assert (templates.rejection(hit, current, query, sources) or "kept") == row["decision"]
            assert (templates.rejection(hit, current, query, all_present) or "kept") == row["decision_if_chain_present"]
            compared += 1
    assert compared == 12_960


def test_kept_templates_have_the_reference_arrays(raw, real, lookup, store):
    """Maps, positions, masks and letters of all 50 kept hits, and the evaluation features of every query."""
    kept = 0
    for name, facts in json.loads((real / "templates.json").read_text()).items():
        query = query_of(name, facts)
        by_number = {hit["hit"]: hit for hit in facts["hits_kept"]}
        featurised = []
        for hit, current in templates.candidates(hits_of(raw, facts), query, lookup.sources):
            expected = by_number.pop(hit.number)
            mapping = templates.query_to_hit(hit, query.sequence)
            assert list(mapping) == expected["mapping_query"]
            assert list(mapping.values()) == expected["mapping_hit"]
            template, row = templates.featurise(hit, current, query, lookup.sources)
            template._read = store._template_reader(row)
            assert sha256(template.all_atom_positions) == expected["positions_sha256"]
            assert sha256(template.all_atom_mask.astype(np.float32)) == expected["mask_sha256"]
            letters = "".join(residues.HHBLITS_LETTERS[i] for i in template.aatype)
            assert letters == expected["template_sequence"]
            featurised.append(template)
            kept += 1
        assert not by_number
        check_evaluation_features(featurised[:4], facts["eval"])
    assert kept == 50


def check_evaluation_features(chosen, expected):
    assert [template.name for template in chosen] == expected["names"]
    if chosen:
        one_hot = np.eye(22, dtype=np.int32)[np.stack([t.aatype for t in chosen])]
        assert sha256(one_hot) == expected["aatype_sha256"]
        assert sha256(np.stack([t.all_atom_positions for t in chosen])) == expected["positions_sha256"]
        masks = np.stack([t.all_atom_mask for t in chosen]).astype(np.float32)
        assert sha256(masks) == expected["mask_sha256"]


def test_stored_templates_equal_the_reference(store, real):
    """The table of hits in the store, for every query that is one of the chains."""
    compared = 0
    for name, facts in json.loads((real / "templates.json").read_text()).items():
        if facts["release_date_source"] == "chain":
            check_evaluation_features([t for t in store.read_templates(name) if t.ok][:4], facts["eval"])
            compared += 1
    assert compared == 15


def test_realignment_decisions_and_maps_equal_the_reference(real):
    """60 pairs of real chains: the decision of each, and the whole map of the 31 accepted ones."""
    pairs = json.loads((real / "kalign_pairs.json").read_text())
    accepted = 0
    for pair in pairs:
        try:
            mapping = align.map_residues(pair["old"], pair["new"]).tolist()
        except DataError:
            mapping = None
        assert (mapping is not None) == pair["accepted"], (pair["old_chain"], pair["new_chain"])
        if mapping is not None:
            assert mapping == pair["mapping"]
            accepted += 1
    assert (len(pairs), accepted) == (60, 31)


# --- selection --------------------------------------------------------------------------------------------------------


def test_training_set_filters_weights_and_indices_equal_the_reference(store, real):
    """Each filter on each chain; index, cluster size and weight of the merged set, bit for bit."""
    rows = table(real / "training_set.csv")
    filters = selection.training_filters(store.table)
    for key, values in (
        ("date_ok", filters.date),
        ("resolution_ok", filters.resolution),
        ("aa_share_ok", filters.residue_share),
        ("cluster_ok", filters.cluster),
        ("accepted", filters.accepted),
    ):
        assert [str(int(v)) for v in values] == [row[key] for row in rows], key
    assert store.table.max_residue_share.tolist() == [float(row["max_aa_share"]) for row in rows]
    chosen = selection.training_set(store.table, filter_by_alignments=True)
    expected = [(i, row) for i, row in enumerate(rows) if row["index_merged"] != "-1"]
    assert chosen.rows.tolist() == [i for i, _ in expected]
    assert chosen.cluster_size.tolist() == [int(row["cluster_size_merged"]) for _, row in expected]
    assert chosen.weights.tolist() == [float(row["weight_merged"]) for _, row in expected]


def test_evaluation_selection_equals_the_reference(store, real):
    """The declared target table; the benchmark's own table has none of these chains, which is an error."""
    facts = json.loads((real / "sampler.json").read_text())["validation_selection"]
    targets = [
        selection.Target(date, text[:4].lower(), text[6:-1])
        for date, texts in facts["declared_table"].items()
        for text in texts
    ]
    rows = selection.evaluation_set(store.table, targets)
    assert [store.chain_ids[row] for row in rows] == [name for name, _ in facts["declared_result"]]
    with pytest.raises(DataError, match="none of the"):
        selection.evaluation_set(store.table, selection.read_targets())
