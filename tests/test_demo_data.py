"""The generated demonstration set: geometry, split, file formats, determinism."""

import gzip
import hashlib
from dataclasses import replace
from datetime import date
from pathlib import Path

import gemmi
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scalefold.data import residues
from scalefold.data.made import demo, demo_files, demo_folds, demo_geometry
from scalefold.data.made.demo_alignments import A3M_FILES, aligned_rows
from scalefold.data.raw.mmcif import read_entry
from scalefold.data.raw.msa import read_alignment
from scalefold.data.store.templates import parse_hhr, parse_obsolete
from scalefold.errors import DataError

NUM_TRAIN, NUM_EVAL = 40, 6


@pytest.fixture(scope="module")
def demo_set(tmp_path_factory) -> demo.Summary:
    """A small generated set with the bad entries."""
    folder = tmp_path_factory.mktemp("demo") / "set"
    return demo.generate(folder, seed=3, num_train=NUM_TRAIN, num_eval=NUM_EVAL, with_bad_inputs=True)


@pytest.fixture(scope="module")
def entries() -> list[demo_files.DemoEntry]:
    """The same proteins in memory."""
    split = demo.draw_split(NUM_TRAIN // 2, NUM_EVAL, (24, 32), np.random.default_rng(3))
    return demo.build_entries(*split, NUM_TRAIN, 2, 3)


def _complete_atoms(entry: demo_files.DemoEntry) -> np.ndarray:
    """Atoms [L', 14, 3] of the residues whose backbone is resolved."""
    return entry.positions[~np.isnan(entry.positions[:, 1, 0])]


# --- geometry ---------------------------------------------------------------------------------------------------------


def _torsion(a, b, c, d) -> float:
    normal_1, normal_2 = np.cross(b - a, c - b), np.cross(c - b, d - c)
    sine = np.dot(np.cross(normal_1, normal_2), (c - b) / np.linalg.norm(c - b))
    return float(np.degrees(np.arctan2(sine, np.dot(normal_1, normal_2))))


@given(st.lists(st.tuples(st.floats(-179, 179), st.floats(-179, 179)), min_size=2, max_size=12))
@settings(max_examples=25, deadline=None)
def test_backbone_has_the_torsions_it_was_built_from(torsions):
    atoms = demo_geometry.backbone(np.array(torsions))
    for i in range(1, len(torsions)):
        (n0, ca0, c0), (n1, ca1, c1) = atoms[i - 1], atoms[i]
        wanted = (torsions[i - 1][1], 180.0, torsions[i][0])
        found = (_torsion(n0, ca0, c0, n1), _torsion(ca0, c0, n1, ca1), _torsion(c0, n1, ca1, c1))
        for angle, expected in zip(found, wanted, strict=True):
            assert abs((angle - expected + 180) % 360 - 180) < 1e-6


@given(st.integers(2, 30), st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_bond_lengths_and_angles_are_ideal_for_every_torsion(length, seed):
    torsions = np.random.default_rng(seed).uniform(-180, 180, (length, 2))
    flat = demo_geometry.backbone(torsions).reshape(-1, 3)
    bonds = np.linalg.norm(np.diff(flat, axis=0), axis=-1)
    expected = np.tile([1.458, 1.525, 1.329], length)[: len(bonds)]
    np.testing.assert_allclose(bonds, expected, atol=1e-9)
    ca = flat[1::3]
    np.testing.assert_allclose(np.linalg.norm(np.diff(ca, axis=0), axis=-1), 3.80, atol=0.03)


def test_side_chains_have_literature_bonds_and_l_chirality():
    sequence = "".join(residues.RESTYPES)
    atoms = demo_geometry.all_atoms(sequence, np.tile([-120.0, 130.0], (20, 1)))
    for i, letter in enumerate(sequence):
        names = residues.ATOM14_NAMES[residues.RESTYPE_1TO3[letter]]
        n, ca, c = atoms[i, :3]
        present = [not np.isnan(atoms[i, slot, 0]) for slot in range(14)]
        assert present == [bool(name) for name in names]
        assert np.linalg.norm(atoms[i, 3] - c) == pytest.approx(1.23, abs=0.02)
        if letter != "G":
            cb = atoms[i, 4]
            assert np.linalg.norm(cb - ca) == pytest.approx(1.53, abs=0.03)
            assert np.dot(np.cross(n - ca, c - ca), cb - ca) > 0  # L amino acid
        for chi in residues.CHI_ANGLE_ATOMS[residues.RESTYPE_1TO3[letter]]:
            last_bond = atoms[i, names.index(chi[3])] - atoms[i, names.index(chi[2])]
            assert 1.2 < np.linalg.norm(last_bond) < 1.9


def test_carbonyl_oxygen_lies_opposite_the_next_nitrogen():
    atoms = demo_geometry.all_atoms("AVL", np.array([[-63.0, -42.0], [-120.0, 115.0], [60.0, 40.0]]))
    for i in (0, 1):
        n_ca_c = atoms[i, :3]
        to_oxygen, to_nitrogen = _torsion(*n_ca_c, atoms[i, 3]), _torsion(*n_ca_c, atoms[i + 1, 0])
        assert abs(abs(to_oxygen - to_nitrogen) - 180) < 3


def test_lddt_is_one_for_equal_and_low_for_stretched_traces():
    trace = demo_geometry.backbone(np.tile([-63.0, -42.0], (20, 1)))[:, 1]
    assert demo_geometry.lddt_ca(trace, trace) == 1.0
    assert demo_geometry.lddt_ca(trace * 2, trace) < 0.3


def test_every_amino_acid_has_a_rotamer_with_all_its_chi_angles():
    assert set(demo_geometry.ROTAMERS_DEG) == set(residues.RESTYPES)
    for letter, rotamers in demo_geometry.ROTAMERS_DEG.items():
        assert {len(chi) for chi in rotamers} == {len(residues.CHI_ANGLE_ATOMS[residues.RESTYPE_1TO3[letter]])}


def test_chains_have_ideal_bonds_and_no_collisions(entries):
    for entry in entries:
        atoms = _complete_atoms(entry)
        ca = atoms[:, 1]
        np.testing.assert_allclose(np.linalg.norm(np.diff(ca, axis=0), axis=-1), 3.80, atol=0.03)
        assert demo_geometry.closest_contact_angstrom(atoms) >= demo.CLOSEST_CONTACT_ANGSTROM


def test_helices_and_strands_have_their_textbook_rise():
    helix = demo_geometry.backbone(np.tile(demo_folds.HELIX_DEG, (19, 1)))[:, 1]
    assert np.linalg.norm(helix[18] - helix[0]) / 18 == pytest.approx(1.5, abs=0.1)
    strand = demo_geometry.backbone(np.tile(demo_folds.STRAND_DEG, (7, 1)))[:, 1]
    assert np.linalg.norm(strand[6] - strand[0]) / 6 == pytest.approx(3.3, abs=0.2)


# --- folds and sequences ----------------------------------------------------------------------------------------------


def test_every_topology_has_a_share_and_shares_add_up_to_one():
    assert set(demo.TOPOLOGY_SHARE) == set(demo_folds.TOPOLOGIES)
    assert sum(demo.TOPOLOGY_SHARE.values()) == pytest.approx(1.0)


def test_two_helices_lie_antiparallel_at_packing_distance():
    for loop in demo_folds.LOOPS["HH"]:
        fold = demo_folds.Fold("HH", (12, 12), (loop,))
        ca = demo_geometry.backbone(fold.torsions_deg())[:, 1]
        (a, b), (c, d) = fold.segments()
        first, second = ca[a:b], ca[c:d]
        axis_1, axis_2 = first[-4:].mean(0) - first[:4].mean(0), second[-4:].mean(0) - second[:4].mean(0)
        assert axis_1 @ axis_2 / np.linalg.norm(axis_1) / np.linalg.norm(axis_2) < -0.9
        assert 8.0 < np.linalg.norm(first.mean(0) - second.mean(0)) < 11.0


def test_hairpin_strands_are_hydrogen_bonded_neighbours():
    fold = demo_folds.Fold("EE", (7, 7), (demo_folds.STRAND_STRAND,))
    ca = demo_geometry.backbone(fold.torsions_deg())[:, 1]
    pairs = [np.linalg.norm(ca[6 - k] - ca[9 + k]) for k in range(7)]
    assert min(pairs) > 3.7
    assert max(pairs) < 6.0


def test_folds_of_evaluation_are_not_in_training(entries):
    train = {entry.fold.label for entry in entries if not entry.is_eval}
    evaluation = {entry.fold.label for entry in entries if entry.is_eval}
    assert len(train) == NUM_TRAIN // 2
    assert len(evaluation) == NUM_EVAL
    assert not train & evaluation
    assert len({entry.sequence for entry in entries}) == len(entries)
    assert {entry.fold.topology for entry in entries} == set(demo_folds.TOPOLOGIES)


def test_family_members_share_the_fold_and_differ_in_sequence(entries):
    for first, second in zip(entries[:NUM_TRAIN:2], entries[1:NUM_TRAIN:2], strict=True):
        assert first.fold == second.fold
        assert first.sequence != second.sequence
        both = ~np.isnan(first.positions[:, 1, 0]) & ~np.isnan(second.positions[:, 1, 0])
        assert demo_geometry.lddt_ca(first.positions[both, 1], second.positions[both, 1]) > 0.9


def test_sequence_determines_the_fold(entries):
    """Reading each residue's class back from the letters gives the fold's torsions except where letters say more."""
    for entry in entries:
        assert all(letter in letters for letter, letters in zip(entry.sequence, entry.fold.letter_classes, strict=True))
    by_pattern = {tuple("".join(sorted(set(c))) for c in entry.fold.letter_classes): entry.fold for entry in entries}
    assert len(by_pattern) == len({entry.fold for entry in entries})


def test_core_letters_face_the_other_helix():
    fold = demo_folds.Fold("HH", (12, 12), (demo_folds.HELIX_HELIX_SHORT,))
    trace = demo_geometry.backbone(fold.torsions_deg())
    cb = demo_geometry.c_beta(trace)
    (a, b), (c, d) = fold.segments()
    core = np.array([letters == demo_folds.HELIX_CORE for letters in fold.letter_classes])
    distance = np.linalg.norm(cb[a:b, None] - cb[None, c:d], axis=-1).min(1)
    assert 3 < core[a:b].sum() < 9
    assert distance[core[a:b]].mean() < distance[~core[a:b]].mean() - 1.5


def test_too_few_folds_is_one_clear_error():
    with pytest.raises(DataError, match="different folds"):
        demo.draw_split(30, 5, (20, 22), np.random.default_rng(0))


# --- files ------------------------------------------------------------------------------------------------------------


def _digest(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def test_equal_seeds_give_equal_bytes_and_other_seeds_do_not(tmp_path):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        demo.generate(tmp_path / name, seed=seed, num_train=8, num_eval=2)
    assert _digest(tmp_path / "a") == _digest(tmp_path / "b")
    assert _digest(tmp_path / "a") != _digest(tmp_path / "c")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]  # nothing temporary is left


def test_existing_folder_is_not_overwritten(tmp_path):
    (tmp_path / "set").mkdir()
    with pytest.raises(DataError, match="exists already"):
        demo.generate(tmp_path / "set", num_train=2, num_eval=1)


def test_gemmi_reads_the_structures_as_they_were_made(demo_set, entries):
    for entry in entries:
        path = demo_set.mmcif_dir / entry.pdb_id[1:3] / f"{entry.pdb_id}.cif.gz"
        structure = gemmi.read_structure(str(path))
        structure.setup_entities()
        assert len(structure) == entry.num_models
        assert structure.resolution == pytest.approx(entry.resolution or 0.0)
        chain = structure[0][entry.author_chain_ids[0]]
        polymer = chain.get_polymer()
        resolved = ~np.isnan(entry.positions[:, 1, 0])
        letters = "".join(gemmi.find_tabulated_residue(residue.name).one_letter_code.upper() for residue in polymer)
        assert letters == "".join(np.array(list(entry.sequence))[resolved])
        ca = np.array([residue["CA"][0].pos.tolist() for residue in polymer])
        np.testing.assert_allclose(ca, entry.positions[resolved, 1], atol=6e-4)


def test_our_parser_reads_sequences_and_atoms_back(demo_set, entries):
    names14 = residues.ATOM14_NAMES
    for made in entries:
        entry = read_entry(demo_set.mmcif_dir / made.pdb_id[1:3] / f"{made.pdb_id}.cif.gz")
        assert entry.release_date == made.release_date.isoformat()
        assert [chain.author_chain_id for chain in entry.chains] == list(made.author_chain_ids)
        chain = entry.chains[0]
        assert chain.sequence == made.sequence
        slots = [[residues.ATOM37_INDEX[n] for n in names14[residues.RESTYPE_1TO3[x]] if n] for x in made.sequence]
        for i, slot in enumerate(slots):
            atoms = made.positions[i, : len(slot)]
            there = ~np.isnan(atoms[:, 0])
            np.testing.assert_array_equal(chain.mask[i, slot], there)
            np.testing.assert_allclose(chain.positions[i, slot][there], atoms[there], atol=6e-4)


def test_set_has_the_variety_of_deposited_entries(entries):
    assert any(entry.resolution is None and entry.num_models > 1 for entry in entries)
    assert any(len(entry.author_chain_ids) == 2 for entry in entries)
    assert any(entry.selenomethionine and "M" in entry.sequence for entry in entries)
    assert any(entry.alternative_residue is not None for entry in entries)
    assert any(np.isnan(entry.positions[0, 1, 0]) for entry in entries)
    assert {entry.author_chain_ids[0] for entry in entries} == {"A", "B", "H"}


def test_copies_of_a_chain_do_not_touch_each_other(demo_set, entries):
    dimer = next(entry for entry in entries if len(entry.author_chain_ids) == 2)
    chains = read_entry(demo_set.mmcif_dir / dimer.pdb_id[1:3] / f"{dimer.pdb_id}.cif.gz").chains
    first, second = (chain.positions[chain.mask] for chain in chains)
    assert np.linalg.norm(first[:, None] - second[None], axis=-1).min() > 4.0


def test_alignments_begin_with_the_query_and_keep_to_the_fold(demo_set, entries):
    depths = []
    for k, entry in enumerate(entries):
        folder = demo_set.alignments_dir / entry.chain_ids[0]
        alignment = read_alignment(folder)
        if k == 1:
            assert alignment is None
            assert all((folder / name).stat().st_size == 0 for name in A3M_FILES)
            continue
        assert alignment is not None
        query = "".join(residues.HHBLITS_LETTERS[i] for i in alignment.msa[0])
        assert query == entry.sequence
        assert len({row.tobytes() for row in alignment.msa}) == len(alignment.msa)
        depths.append(len(alignment.msa))
        rows = [[residues.HHBLITS_LETTERS[i] for i in row] for row in alignment.msa]
        classes = entry.fold.letter_classes
        agree = np.mean([[x in c or x == "-" for x, c in zip(row, classes, strict=True)] for row in rows])
        assert agree > 0.95
    assert min(depths) >= 7
    assert max(depths) > 40


def test_alignments_have_gaps_insertions_and_single_files(demo_set):
    texts = [path.read_text() for path in demo_set.alignments_dir.glob("*/a3m/*.a3m")]
    rows = [line for text in texts for line in text.splitlines() if not line.startswith(">")]
    assert any("-" in row for row in rows)
    assert any(row != row.upper() for row in rows)
    files_per_chain = {len(list(folder.glob("a3m/*"))) for folder in demo_set.alignments_dir.iterdir()}
    assert files_per_chain == {1, 3}


def test_template_hits_are_readable_and_name_generated_chains(demo_set, entries):
    sequences = {entry.pdb_id: entry.sequence for entry in entries}
    successor = parse_obsolete(demo_set.obsolete_file.read_text())
    assert successor == {demo.OBSOLETE_ID: entries[0].pdb_id}
    seen = set()
    for path in demo_set.alignments_dir.glob("*/hhr/*.hhr"):
        query = sequences[path.parts[-3][:4]]
        for hit in parse_hhr(path.read_text()):
            seen.add(hit.pdb_id)
            assert hit.query_segment.replace("-", "") == query
            if hit.pdb_id != "0non":
                assert hit.hit_sequence == sequences[successor.get(hit.pdb_id, hit.pdb_id)]
            assert hit.aligned_cols == np.sum((hit.query_indices >= 0) & (hit.hit_indices >= 0))
    assert {"0non", demo.OBSOLETE_ID} <= seen
    assert len(seen) > 5


def test_long_hits_are_wrapped_and_read_back():
    query, hit = "ACDEFGHIKL" * 12, "ACDEF" + "-" * 10 + "ACDEF" * 21
    made = demo_files.DemoHit("0AAB_C", "x", query, 0, hit, 4, 200)
    (read,) = parse_hhr(demo_files.hhr_text("0aaa_A", query, 5, [made]))
    assert (read.name, read.query_segment, read.hit_segment) == ("0aab_C", query, hit)
    assert read.hit_indices[0] == 4
    assert read.hit_indices[-1] == 4 + 110 - 1


def test_aligned_rows_keep_segments_in_register():
    short = demo_folds.Fold("HH", (10, 11), (demo_folds.HELIX_HELIX_SHORT,))
    long = demo_folds.Fold("HH", (12, 10), (demo_folds.HELIX_HELIX_LONG,))
    rng = np.random.default_rng(0)
    sequences = [demo_folds.draw_sequence(fold.letter_classes, rng) for fold in (short, long)]
    rows = aligned_rows(short, sequences[0], long, sequences[1])
    assert [row.replace("-", "") for row in rows] == sequences
    assert len(rows[0]) == len(rows[1]) == 12 + 4 + 11
    assert rows[0][10:12] == "--"
    assert rows[1][12:16] == sequences[1][12:16]
    assert rows[1][-1] == "-"


def test_lists_agree_with_the_entries(demo_set, entries):
    clusters = [line.split() for line in demo_set.clusters_file.read_text().splitlines()]
    assert sorted(name for line in clusters for name in line) == sorted(f"{e.pdb_id.upper()}_1" for e in entries)
    assert {len(line) for line in clusters} == {1, 2}
    duplicates = [line.split() for line in demo_set.duplicates_file.read_text().splitlines()]
    assert [tuple(line) for line in duplicates] == [entry.chain_ids for entry in entries]
    assert {line[0] for line in duplicates} == {folder.name for folder in demo_set.alignments_dir.iterdir()}


def test_dates_separate_training_from_evaluation(demo_set, entries):
    for entry in entries:
        assert (entry.release_date > date(2021, 9, 16)) == entry.is_eval
    lines = demo_set.targets_file.read_text().splitlines()
    assert lines[0] == "submission_date,pdb_id,chain_id"
    targets = [line.split(",") for line in lines[1:]]
    assert sorted(pdb_id for _, pdb_id, _ in targets) == [e.pdb_id for e in entries if e.is_eval]
    assert all(date(2021, 9, 17) <= date.fromisoformat(day) <= date(2021, 12, 11) for day, _, _ in targets)


def test_bad_entries_are_refused_or_have_no_ca(demo_set):
    folder = demo_set.mmcif_dir / "zz"
    with pytest.raises(DataError, match="0zz1"):
        read_entry(folder / "0zz1.cif.gz")
    with pytest.raises(DataError, match="no polymer has a peptide"):
        read_entry(folder / "0zz2.cif.gz")
    (chain,) = read_entry(folder / "0zz3.cif.gz").chains
    assert chain.mask.any()
    assert not chain.mask[:, residues.CA_ATOM37].any()
    assert demo_set.num_bad_entries == 3


def test_cut_off_text_ends_within_a_row(entries):
    for waters in (0, 3):
        text = demo_files.bad_mmcif_texts(replace(entries[0], num_waters=waters))["0zz1"]
        complete, last = text.splitlines()[-2:]
        assert len(last.split()) < len(complete.split())


def test_summary_counts_what_is_on_disk(demo_set):
    root = demo_set.targets_file.parent
    assert demo_set.num_entries == NUM_TRAIN + NUM_EVAL
    assert len(demo_set.eval_chain_ids) == NUM_EVAL
    assert len(list(demo_set.mmcif_dir.rglob("*.cif.gz"))) == NUM_TRAIN + NUM_EVAL + 3
    rows = sum(path.read_text().count(">") for path in demo_set.alignments_dir.rglob("*.a3m"))
    assert demo_set.num_alignment_rows == rows
    sizes = {path.name: path.stat().st_size for path in root.rglob("*") if path.is_file()}
    on_disk = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
    assert demo_set.num_bytes == on_disk - sizes["summary.json"]
    low, middle, high = demo_set.length_min_median_max
    assert 24 <= low <= middle <= high <= 32
    first = next(demo_set.mmcif_dir.rglob("*.cif.gz"))
    assert gzip.decompress(first.read_bytes()).startswith(b"data_0")
