"""The fast feature pipeline against the reference's tensors and against the plain definition."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chains import random_chain
from plain_features import plain_features
from scalefold.data import residues
from scalefold.data.batch_keys import PER_SLICE_KEYS
from scalefold.data.features.features import (
    FEATURE_SCHEMA,
    BatchShape,
    FeatureSettings,
    buffer_bytes,
    build_features,
    feature_views,
    fill_sample,
    reference_layout,
    select_templates,
)
from scalefold.data.store.store import ChainRecord, count_letters
from scalefold.errors import DataError

SMALL = FeatureSettings(train_sequence_crop_size=32, max_msa_clusters=6, max_extra_msa=16, max_templates=2)
# Torsions divide by the distance from an axis; a fourth atom close to it magnifies rounding (float32, other order).
# Where an atom is missing (mask 0) the points may coincide and the pair is rounding noise of unit length.
TORSIONS = {
    "template_torsion_angles_sin_cos": "template_torsion_angles_mask",
    "template_alt_torsion_angles_sin_cos": "template_torsion_angles_mask",
    "chi_angles_sin_cos": "chi_mask",
}


def assert_all_same(found, expected, torsion_tolerance=5e-5):
    """Every tensor; integers exactly, floats to 1e-6 of the tensor's maximum.

    Torsions are compared where they exist; random atoms (the default tolerance) are worse conditioned than real ones.
    """
    assert set(found) == set(expected)
    for key, value in expected.items():
        value, mask = torch.as_tensor(value), TORSIONS.get(key)
        if mask:
            present = torch.as_tensor(expected[mask]).unsqueeze(-2)
            assert_same(found[key][0] * present, value * present, key, torsion_tolerance)
        else:
            assert_same(found[key][0], value, key)


def assert_same(found, expected, key, tolerance=None):
    assert found.shape == expected.shape, key
    assert found.dtype == expected.dtype, key
    if not found.dtype.is_floating_point:
        assert torch.equal(found, expected), key
    else:
        tolerance = tolerance or 1e-6 * max(1.0, float(expected.nan_to_num().abs().max()))
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance, equal_nan=True, msg=lambda m: f"{key}: {m}")


# --- the reference ----------------------------------------------------------------------------------------------------


def golden_chain(golden, sample):
    raw = {key.split("/")[-1]: golden[key] for key in golden.files if key.startswith(f"{sample}/raw/")}
    templates = [
        SimpleNamespace(
            ok=True,
            sum_probs=float(raw["template_sum_probs"][i, 0]),
            aatype=raw["template_aatype"][i].argmax(-1).astype(np.uint8),
            all_atom_positions=raw["template_all_atom_positions"][i],
            all_atom_mask=raw["template_all_atom_mask"][i] > 0,
        )
        for i in range(len(raw["template_aatype"]))
    ]
    aatype, msa = raw["aatype"].argmax(-1).astype(np.uint8), raw["msa"].astype(np.uint8)
    return ChainRecord(
        sample,
        residues.aatype_to_sequence(aatype),
        aatype,
        raw["all_atom_positions"],
        raw["all_atom_mask"] > 0,
        float(raw["resolution"][0]),
        "2000-01-01",
        msa,
        raw["deletion_matrix_int"].astype(np.uint8),
        templates,
        count_letters(msa),
    )


@pytest.mark.parametrize(("sample", "mode"), [("sample0", "train"), ("sample1", "train"), ("sample0", "eval")])
def test_every_tensor_of_every_slice_equals_the_reference(golden_dir, monkeypatch, sample, mode):
    golden = np.load(golden_dir / "features.npz")
    # The golden templates are already in the order of the sample.
    monkeypatch.setattr("scalefold.data.features.features.shuffle_first", lambda hits, count, seed: list(hits))
    built = build_features(golden_chain(golden, sample), SMALL, int(golden[f"{sample}/seed"]), training=mode == "train")
    found = reference_layout(built)
    expected = {key.split("/")[-1]: golden[key] for key in golden.files if key.startswith(f"{sample}/{mode}/")}
    assert_all_same(found, expected, torsion_tolerance=2e-6)


# --- the plain definition ---------------------------------------------------------------------------------------------


@settings(max_examples=12, deadline=None)
@given(
    length=st.integers(1, 50),
    num_rows=st.integers(1, 70),
    num_templates=st.integers(0, 5),
    seed=st.integers(0, 2**63 - 1),
    training=st.booleans(),
)
def test_every_tensor_equals_the_plain_definition(length, num_rows, num_templates, seed, training):
    chain = random_chain(length, num_rows, seed=seed % 1000, num_templates=num_templates, failing=(1,))
    found = reference_layout(build_features(chain, SMALL, seed, training=training))
    assert_all_same(found, plain_features(chain, SMALL, seed, training))


def test_benchmark_sizes_equal_the_plain_definition():
    chain = random_chain(280, 1300, seed=3)
    found = reference_layout(build_features(chain, FeatureSettings(), 77, training=True))
    assert_all_same(found, plain_features(chain, FeatureSettings(), 77, True))


# --- shapes and layout ------------------------------------------------------------------------------------------------


def test_a_training_batch_has_the_benchmark_shapes_and_types():
    features = build_features(random_chain(300, 200), FeatureSettings(), 5, training=True)
    assert len(features) == 50
    assert features["msa_feat"].shape == (1, 124, 256, 49, 4)
    assert features["extra_msa"].shape == (1, 1024, 256, 4)
    assert features["true_msa"].dtype == torch.int64
    assert features["rigidgroups_gt_frames"].shape == (1, 256, 8, 4, 4)
    for key, value in features.items():
        assert str(value.dtype) == f"torch.{FEATURE_SCHEMA[key][1]}", key


def test_evaluation_uses_the_whole_chain_and_has_no_clamping_flag():
    features = build_features(random_chain(300, 20), FeatureSettings(), 5, training=False)
    assert features["aatype"].shape == (1, 300)
    assert "use_clamped_fape" not in features
    assert features["residue_index"][0].tolist() == list(range(300))


def test_without_templates_in_the_model_there_are_no_template_features():
    off = FeatureSettings(templates_enabled=False)
    features = build_features(random_chain(30, 20), off, 5, training=True)
    assert not [key for key in features if key.startswith("template_")]


def test_fewer_slices_are_the_first_slices():
    chain = random_chain(60, 50)
    whole = build_features(chain, SMALL, 9, training=True)
    part = build_features(chain, SMALL, 9, training=True, num_slices=2)
    for key, value in part.items():
        expected = whole[key][..., :2] if key in PER_SLICE_KEYS else whole[key]
        assert torch.equal(value, expected), key


def test_slices_differ_exactly_in_the_per_slice_keys():
    features = build_features(random_chain(60, 50), SMALL, 9, training=True)
    for key in PER_SLICE_KEYS:
        assert not torch.equal(features[key][..., 0], features[key][..., 1]), key
        assert features[key][..., 1].is_contiguous(), key


def test_a_shorter_batch_is_a_prefix_of_the_buffer():
    shape = BatchShape.of(SMALL, 2, 4, training=True)
    buffer = torch.zeros(buffer_bytes(shape), dtype=torch.uint8)
    for row in range(2):
        fill_sample(buffer, shape, row, random_chain(40, 30, seed=row), SMALL, row)
    shorter = BatchShape.of(SMALL, 2, 1, training=True)
    prefix = feature_views(buffer[: buffer_bytes(shorter)], shorter)
    whole = feature_views(buffer, shape)
    for key, value in prefix.items():
        assert torch.equal(value, whole[key][..., :1] if key in PER_SLICE_KEYS else whole[key]), key


def test_a_batch_of_two_holds_the_two_samples():
    shape = BatchShape.of(SMALL, 2, 3, training=True)
    buffer = torch.zeros(buffer_bytes(shape), dtype=torch.uint8)
    chains = [random_chain(40, 30, seed=1), random_chain(20, 9, seed=2)]
    for row, chain in enumerate(chains):
        fill_sample(buffer, shape, row, chain, SMALL, 50 + row)
    views = feature_views(buffer, shape)
    for row, chain in enumerate(chains):
        alone = build_features(chain, SMALL, 50 + row, training=True, num_slices=3)
        for key, value in alone.items():
            assert torch.equal(views[key][row], value[0]), key


# --- what the sample keeps --------------------------------------------------------------------------------------------


def test_failing_templates_are_skipped_in_the_order_of_the_search():
    chain = random_chain(20, 5, num_templates=7, failing=(0, 2))
    chosen = select_templates(chain.templates, FeatureSettings(), 1, training=False)
    assert [hit.name for hit in chosen] == ["t1", "t3", "t4", "t5"]


def test_only_the_first_hits_are_shuffled():
    chain = random_chain(20, 5, num_templates=8)
    two = FeatureSettings(shuffle_top_k_prefiltered=2, max_template_hits=8)
    names = {tuple(hit.name for hit in select_templates(chain.templates, two, s, training=True)) for s in range(20)}
    tail = tuple(f"t{i}" for i in range(2, 8))
    assert names == {("t0", "t1", *tail), ("t1", "t0", *tail)}


def test_the_training_order_of_real_templates_equals_the_reference(golden_dir):
    queries = json.loads((golden_dir / "real" / "templates.json").read_text())
    checked = 0
    for query in queries.values():
        hits = sorted(query["hits_kept"], key=lambda hit: -hit["sum_probs"])
        templates = [SimpleNamespace(name=hit["name"], ok=hit["error"] is None) for hit in hits]
        for seed, names in query["train_order"].items():
            chosen = select_templates(templates, FeatureSettings(), int(seed), training=True)
            assert [hit.name for hit in chosen] == names
            checked += 1
    assert checked >= 50


def test_clamping_flags_equal_the_reference(golden_dir):
    flags = json.loads((golden_dir / "schedule_and_seeds.json").read_text())["use_clamped_fape"]
    chain = random_chain(5, 3, num_templates=0)
    for seed, flag in flags.items():
        assert build_features(chain, SMALL, int(seed), training=True)["use_clamped_fape"].tolist() == [flag]


@pytest.mark.parametrize("field", ["all_atom_mask", "msa", "deletion_matrix", "msa_counts"])
def test_a_contradictory_record_is_an_error_that_names_chain_and_array(field):
    chain = random_chain(12, 5)
    broken = ChainRecord(**{**chain.__dict__, field: getattr(chain, field)[:, :-1]})
    with pytest.raises(DataError, match=rf"chain 0000_A: {field} has shape"):
        build_features(broken, SMALL, 1, training=True)


def test_a_chain_without_alignment_rows_is_an_error():
    chain = random_chain(12, 5)
    broken = ChainRecord(**{**chain.__dict__, "msa": chain.msa[:0], "deletion_matrix": chain.deletion_matrix[:0]})
    with pytest.raises(DataError, match="no residues or no alignment rows"):
        build_features(broken, SMALL, 1, training=True)
