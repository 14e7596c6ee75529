"""mmCIF rules, each on a crafted entry, and two real entries."""

import gzip
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raw_files import Atom, Entity, backbone, peptide
from scalefold.data import residues
from scalefold.data.raw import mmcif
from scalefold.errors import DataError

CA = residues.CA_ATOM37


def only_chain(entry):
    (chain,) = mmcif.parse_entry(entry.text()).chains
    return chain


def test_a_resolved_peptide_has_sequence_and_backbone():
    """Four atoms per residue in their slots, at the coordinates of the text."""
    chain = only_chain(peptide(["ALA", "GLY", "SER"]))
    assert chain.sequence == "AGS"
    assert chain.mask.sum() == 12
    assert chain.positions[1, CA].tolist() == pytest.approx([2 * 3.8 + 1.458, 2.0, 3.0])
    assert chain.positions[~chain.mask].sum() == 0


def test_header_facts_follow_the_rules():
    """Earliest revision; first resolution item present, its largest number."""
    entry = peptide(
        ["ALA"],
        dates=("2005-06-07", "2001-12-31"),
        extra="_em_3d_reconstruction.resolution 3.3\nloop_\n_refine.ls_d_res_high\n1.9\n2.1\n.\n",
    )
    parsed = mmcif.parse_entry(entry.text())
    assert (parsed.pdb_id, parsed.release_date, parsed.resolution) == ("1tst", "2001-12-31", 2.1)
    assert parsed.method == "X-RAY DIFFRACTION"


def test_a_resolution_item_without_number_hides_the_next_one():
    """Presence of the item counts, not its content."""
    entry = peptide(["ALA"], extra="_refine.ls_d_res_high .\n_em_3d_reconstruction.resolution 3.3\n")
    assert np.isnan(mmcif.parse_entry(entry.text()).resolution)


def test_unknown_and_modified_residues_get_their_letters():
    """MSE counts as M with selenium in the sulphur slot; monomers without a letter are X."""
    entry = peptide(["MSE", "ZZZ"])
    selenium = Atom("SE", "MSE", "A", 1, x="9.125", group="HETATM", author="A")
    atoms = [replace(a, group="HETATM") for a in entry.atoms]
    chain = only_chain(replace(entry, atoms=[selenium, *atoms]))
    assert chain.sequence == "MX"
    assert chain.positions[0, residues.ATOM37_INDEX["SD"], 0] == np.float32(9.125)


def test_positions_without_coordinates_are_masked():
    """A gap in the chain keeps its letters and has no atoms."""
    entry = peptide(["ALA", "GLY", "SER"])
    chain = only_chain(replace(entry, atoms=[a for a in entry.atoms if a.seq != 2]))
    assert chain.sequence == "AGS"
    assert chain.mask.any(axis=1).tolist() == [True, False, True]


def test_the_highest_occupancy_wins_and_the_first_on_ties():
    """Whatever the location letter."""
    entry = peptide(["ALA"])
    others = [a for a in entry.atoms if a.name not in ("CA", "O")]
    locations = [
        Atom("CA", "ALA", "A", 1, x="1.000", altloc="A", occupancy="0.40"),
        Atom("CA", "ALA", "A", 1, x="2.000", altloc="B", occupancy="0.60"),
        Atom("O", "ALA", "A", 1, x="3.000", altloc="B", occupancy="0.50"),
        Atom("O", "ALA", "A", 1, x="4.000", altloc="A", occupancy="0.50"),
    ]
    chain = only_chain(replace(entry, atoms=[*others, *locations]))
    assert chain.positions[0, CA, 0] == 2.0
    assert chain.positions[0, residues.ATOM37_INDEX["O"], 0] == 3.0


def test_several_monomers_at_one_position_give_several_letters():
    """The sequence grows, the atoms of the monomer read last stay, the last position is always missing."""
    entity = Entity([(1, "ALA"), (2, "SER"), (2, "THR"), (3, "GLY")])
    atoms = [
        *backbone(1, "ALA"),
        *backbone(2, "SER", altloc="A", occupancy="0.60"),
        *backbone(2, "THR", altloc="B", occupancy="0.40", y="7.000"),
        *backbone(3, "GLY"),
    ]
    chain = only_chain(replace(peptide(["ALA"]), entities=[entity], atoms=atoms))
    assert chain.sequence == "ASTG"
    assert chain.num_heterogeneous == 1
    assert chain.positions[1, CA, 1] == 7.0
    assert chain.mask.any(axis=1).tolist() == [True, True, True, False]


def test_insertion_codes_separate_residues_of_one_number():
    """Author numbering 1, 1A, 2: three residues, none refused as duplicate."""
    entry = peptide(["ALA", "GLY", "SER"])
    numbering = {1: ("1", "?"), 2: ("1", "A"), 3: ("2", "?")}
    atoms = [replace(a, auth_seq=numbering[a.seq][0], insertion=numbering[a.seq][1]) for a in entry.atoms]
    assert only_chain(replace(entry, atoms=atoms)).mask.sum() == 12


def test_only_the_first_model_is_used():
    """NMR entries repeat all rows per model."""
    entry = peptide(["ALA", "GLY"])
    second = [replace(a, model="2", y="50.000") for a in entry.atoms]
    chain = only_chain(replace(entry, atoms=[*entry.atoms, *second]))
    assert chain.mask.sum() == 8
    assert chain.positions[..., 1].max() == 2.0


def test_asym_ids_of_waters_belong_to_the_author_chain():
    """Every asym id under the author chain id, in order of first coordinate row."""
    entry = peptide(["ALA"], asym="B")
    protein = [replace(a, author="Q") for a in entry.atoms]
    water = Atom("O", "HOH", "C", ".", author="Q", auth_seq="301", group="HETATM")
    chain = only_chain(replace(entry, atoms=[*protein, water]))
    assert (chain.author_chain_id, chain.asym_id, chain.asym_ids) == ("Q", "B", ("B", "C"))


def test_nucleic_acids_beside_a_protein_are_left_out_with_their_types():
    """The entry stays; the left-out polymer is named."""
    protein, rna = peptide(["ALA"]), Entity([(1, "U")], asyms=("B",), linking="RNA linking")
    entry = replace(protein, entities=[*protein.entities, rna], atoms=[*protein.atoms, *backbone(1, "U", "B")])
    parsed = mmcif.parse_entry(entry.text())
    assert [c.asym_id for c in parsed.chains] == ["A"]
    assert parsed.left_out == [("B", "B", "RNA linking")]


def test_hydrogens_and_odd_names_are_ignored_and_oxt_is_kept():
    """37 names, of which OXT is one."""
    entry = peptide(["ALA"])
    more = [Atom("H", "ALA", "A", 1), Atom("OXT", "ALA", "A", 1), Atom("XQ", "ALA", "A", 1)]
    chain = only_chain(replace(entry, atoms=[*entry.atoms, *more]))
    assert chain.mask.sum() == 5
    assert chain.mask[0, residues.ATOM37_INDEX["OXT"]]


PEPTIDE = peptide(["ALA", "GLY"])
REFUSED = {
    "no polymer has a peptide": replace(PEPTIDE, entities=[replace(PEPTIDE.entities[0], linking="RNA linking")]),
    "does not have 4 characters": replace(PEPTIDE, pdb_id="pdb_00001tst"),
    "is not of the form YYYY-MM-DD": replace(PEPTIDE, dates=("2001/02/03",)),
    "is not a date": replace(PEPTIDE, dates=("2001-02-31",)),
    "no coordinate row in model 1": replace(PEPTIDE, atoms=[replace(a, model="2") for a in PEPTIDE.atoms]),
    "two author chain ids": replace(PEPTIDE, atoms=[replace(PEPTIDE.atoms[0], author="Z"), *PEPTIDE.atoms[1:]]),
    "given twice without location": replace(PEPTIDE, atoms=[*PEPTIDE.atoms, replace(PEPTIDE.atoms[7], x="0.0")]),
    "could not convert": replace(PEPTIDE, atoms=[replace(PEPTIDE.atoms[0], x="?"), *PEPTIDE.atoms[1:]]),
    "occupancy": replace(PEPTIDE, atoms=[replace(PEPTIDE.atoms[0], occupancy="?"), *PEPTIDE.atoms[1:]]),
    "B_iso_or_equiv": replace(PEPTIDE, atoms=[replace(PEPTIDE.atoms[0], b_factor="?"), *PEPTIDE.atoms[1:]]),
    "auth_seq_id": replace(PEPTIDE, atoms=[replace(PEPTIDE.atoms[0], auth_seq="1A"), *PEPTIDE.atoms[1:]]),
    "outside its sequence": replace(PEPTIDE, atoms=[*PEPTIDE.atoms, *backbone(3, "SER")]),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_a_malformed_entry_is_refused_with_its_reason(reason):
    """The whole entry is left out, in one line that says why."""
    with pytest.raises(DataError, match=reason) as error:
        mmcif.parse_entry(REFUSED[reason].text())
    assert "\n" not in str(error.value)


def test_two_polymers_under_one_author_chain_are_refused():
    """The author chain id is the key of a chain."""
    entities = [Entity([(1, "ALA")], asyms=("A", "B"))]
    atoms = [*backbone(1, "ALA", "A"), *backbone(1, "ALA", "B", author="A", auth_seq="7")]
    with pytest.raises(DataError, match="share author chain id A"):
        mmcif.parse_entry(replace(PEPTIDE, entities=entities, atoms=atoms).text())


@pytest.mark.parametrize(
    "item",
    [
        "_entry.id",
        "_exptl.method",
        "_pdbx_audit_revision_history.revision_date",
        "_struct_asym.entity_id",
        "_entity_poly_seq.mon_id",
        "_chem_comp.type",
        "_atom_site.pdbx_PDB_model_num",
        "_atom_site.pdbx_PDB_ins_code",
        "_atom_site.label_seq_id",
        "_atom_site.Cartn_y",
    ],
)
def test_a_missing_item_is_named(item):
    """An entry without an item that is used is refused, and the line names the item."""
    with pytest.raises(DataError, match=f"item {item}"):
        mmcif.parse_entry(PEPTIDE.text().replace(item, item + "X"))


def test_a_monomer_without_type_is_named():
    """Every monomer of the sequence list needs a row in _chem_comp."""
    text = PEPTIDE.text().replace("GLY 'L-peptide linking'", "ZZZ 'L-peptide linking'")
    with pytest.raises(DataError, match="monomer GLY"):
        mmcif.parse_entry(text)


@settings(max_examples=60, deadline=None)
@given(st.floats(0, 1))
def test_a_file_cut_anywhere_is_refused_or_whole(fraction):
    """Cutting the text never raises anything but the one-line error, and never gives fewer residues silently."""
    text = PEPTIDE.text()
    try:
        entry = mmcif.parse_entry(text[: int(len(text) * fraction)])
    except DataError:
        return
    assert len(entry.chains[0].sequence) == 2


def test_files_plain_gzip_and_crlf_give_the_same_chain(tmp_path):
    """And a cut or missing gzip file is named."""
    text = PEPTIDE.text().encode()
    (tmp_path / "a.cif").write_bytes(text.replace(b"\n", b"\r\n"))
    (tmp_path / "b.cif.gz").write_bytes(gzip.compress(text))
    (tmp_path / "cut.cif.gz").write_bytes(gzip.compress(text)[:-20])
    first, second = (mmcif.read_entry(tmp_path / name).chains[0] for name in ("a.cif", "b.cif.gz"))
    np.testing.assert_array_equal(first.positions, second.positions)
    with pytest.raises(DataError, match=r"cut\.cif\.gz: cannot be read"):
        mmcif.read_entry(tmp_path / "cut.cif.gz")
    with pytest.raises(DataError, match=r"none\.cif: file is missing"):
        mmcif.read_entry(tmp_path / "none.cif")
    (tmp_path / "empty.cif").write_bytes(b"")
    with pytest.raises(DataError, match=r"empty\.cif: file is empty"):
        mmcif.read_entry(tmp_path / "empty.cif")


def test_real_entries_have_selenium_and_heterogeneous_positions(repository):
    """1a8o: 4 selenomethionines; 1cbn: 46 positions, 48 letters, alternative locations."""
    folder = repository / "tests" / "data" / "real" / "pdb_mmcif" / "raw"
    (chain,) = mmcif.read_entry(folder / "1a8o.cif.gz").chains
    assert (len(chain.sequence), chain.mask.sum()) == (70, 556)
    assert np.count_nonzero(chain.mask[:, residues.ATOM37_INDEX["SD"]]) == chain.sequence.count("M")
    (chain,) = mmcif.read_entry(folder / "1cbn.cif.gz").chains
    assert (len(chain.sequence), chain.num_heterogeneous) == (48, 2)
    assert not chain.mask[46:].any()
