"""The constant tables agree with one another."""

import numpy as np

from scalefold.data import residues


def test_every_atom14_slot_points_to_an_atom37_slot_and_back():
    """Both maps name the same atoms, and exactly the residues' 167 heavy atoms exist."""
    assert residues.ATOM14_MASK.sum() == residues.ATOM37_MASK.sum() == 167
    for restype in range(20):
        slots = np.flatnonzero(residues.ATOM14_MASK[restype])
        there = residues.ATOM14_TO_ATOM37[restype, slots]
        np.testing.assert_array_equal(residues.ATOM37_TO_ATOM14[restype, there], slots)
        assert np.all(residues.ATOM37_MASK[restype, there] == 1)


def test_alignment_alphabet_maps_to_the_same_letters():
    """HHblits id -> restype keeps the letter, and the inverse map inverts."""
    letters = [residues.RESTYPES_WITH_X_AND_GAP[i] for i in residues.HHBLITS_TO_RESTYPE]
    assert "".join(letters) == residues.HHBLITS_LETTERS
    np.testing.assert_array_equal(residues.RESTYPE_TO_HHBLITS[residues.HHBLITS_TO_RESTYPE], np.arange(22))
    for letter, hhblits_id in residues.MSA_LETTER_TO_HHBLITS.items():
        expected = {"B": "D", "Z": "E", "U": "C", "J": "X", "O": "X"}.get(letter, letter)
        assert residues.HHBLITS_LETTERS[hhblits_id] == expected


def test_rigid_groups_exist_where_the_residue_has_the_torsion():
    """Backbone and psi always, pre-omega and phi never, chi groups as many as chi angles; axes use real atoms."""
    np.testing.assert_array_equal(residues.RIGID_GROUP_MASK[:, [0, 1, 2, 3]], np.tile([1, 0, 0, 1], (21, 1)))
    np.testing.assert_array_equal(residues.RIGID_GROUP_MASK[:, 4:], residues.CHI_MASK)
    for restype in range(20):
        for group in np.flatnonzero(residues.RIGID_GROUP_MASK[restype]):
            assert residues.ATOM37_MASK[restype, residues.RIGID_GROUP_ATOM37[restype, group]].all()
            if group >= 4:
                np.testing.assert_array_equal(
                    residues.RIGID_GROUP_ATOM37[restype, group], residues.CHI_ATOM37_INDICES[restype, group - 4, 1:]
                )


def test_renaming_is_an_involution_on_four_residue_types():
    """Swapping twice changes nothing; ASP, GLU, PHE and TYR alone are affected, in their last chi group."""
    twice = np.take_along_axis(residues.ATOM14_RENAMING, residues.ATOM14_RENAMING, axis=1)
    np.testing.assert_array_equal(twice, np.tile(np.arange(14), (21, 1)))
    affected = {residues.RESTYPES[i] for i in np.flatnonzero(residues.ATOM14_IS_AMBIGUOUS[:20].any(axis=1))}
    assert affected == set("DEFY")
    for restype in np.flatnonzero(residues.RIGID_GROUP_IS_AMBIGUOUS.any(axis=1)):
        last = np.flatnonzero(residues.RIGID_GROUP_MASK[restype]).max()
        np.testing.assert_array_equal(np.flatnonzero(residues.RIGID_GROUP_IS_AMBIGUOUS[restype]), [last])


def test_unknown_letters_become_x():
    """Letters outside the twenty, U included, are X in aatype; known ones keep their order."""
    assert residues.sequence_to_aatype("ARNDX-UBz").tolist() == [0, 1, 2, 3, 20, 20, 20, 20, 20]
    assert residues.aatype_to_sequence(residues.sequence_to_aatype("ACDEFGHIKLMNPQRSTVWYX")) == "ACDEFGHIKLMNPQRSTVWYX"


def test_modified_monomers_have_the_letters_of_the_benchmark_table():
    """A selection that newer tables map differently or not at all."""
    letters = residues.MONOMER_LETTERS
    assert (letters["MSE"], letters["SEP"], letters["ALA"]) == ("M", "S", "A")
    assert len(letters) == 1260
    assert "CRO" not in letters or letters["CRO"] == "X"
