"""Fake batches look like real ones."""

import time

import numpy as np
import pytest
import torch

from scalefold.data import residues
from scalefold.data.batch_keys import PER_SLICE_KEYS
from scalefold.data.features.features import FEATURE_SCHEMA, FeatureSettings
from scalefold.data.made.synthetic import synthetic_batch, synthetic_chain

SMALL = FeatureSettings(train_sequence_crop_size=40, max_msa_clusters=6, max_extra_msa=16, max_templates=2)


def test_a_full_batch_has_every_feature_without_padding():
    batch = synthetic_batch(SMALL, batch_size=3, num_passes=2)
    assert set(batch.features) == set(FEATURE_SCHEMA)
    assert batch.passes == 2
    for key, value in batch.features.items():
        assert value.shape[0] == 3, key
        assert (value.shape[-1] == 2) or key not in PER_SLICE_KEYS, key
        if value.dtype.is_floating_point:
            assert torch.isfinite(value).all(), key
    for key in ("seq_mask", "msa_mask", "extra_msa_mask", "backbone_rigid_mask"):
        assert batch.features[key].min() == 1.0, key


def test_the_benchmark_shape_takes_less_than_a_second():
    synthetic_batch(SMALL)
    start = time.process_time()
    batch = synthetic_batch(FeatureSettings())
    assert time.process_time() - start < 1.0
    assert batch.features["msa_feat"].shape == (1, 124, 256, 49, 4)


def test_the_same_seed_gives_the_same_batch_and_another_one_does_not():
    one, two, other = (synthetic_batch(SMALL, seed=s) for s in (4, 4, 5))
    assert torch.equal(one.buffer, two.buffer)
    assert not torch.equal(one.features["aatype"], other.features["aatype"])
    assert not torch.equal(one.features["all_atom_positions"], other.features["all_atom_positions"])


def test_an_evaluation_batch_has_the_length_asked_for():
    batch = synthetic_batch(SMALL, training=False, num_res=55)
    assert batch.features["aatype"].shape == (1, 55)
    assert "use_clamped_fape" not in batch.features


def test_the_backbone_has_real_bond_lengths_and_side_chains_are_attached():
    chain = synthetic_chain(60, 4, seed=1)
    positions = chain.all_atom_positions
    n, ca, c, cb, _ = (positions[:, i] for i in range(5))
    np.testing.assert_allclose(np.linalg.norm(ca - n, axis=-1), 1.46, atol=0.03)
    np.testing.assert_allclose(np.linalg.norm(c[:-1] - n[1:], axis=-1), 1.33, atol=0.02)
    np.testing.assert_allclose(np.linalg.norm(ca[1:] - ca[:-1], axis=-1), 3.8, atol=0.1)
    with_cb = chain.all_atom_mask[:, residues.CB_ATOM37]
    np.testing.assert_allclose(np.linalg.norm((cb - ca)[with_cb], axis=-1), 1.53, atol=0.03)


@pytest.mark.parametrize("seed", range(3))
def test_the_alignment_is_of_related_rows(seed):
    chain = synthetic_chain(50, 200, seed=seed)
    identity = (chain.msa == chain.msa[0]).mean(axis=1)
    assert identity[0] == 1.0
    assert 0.4 < identity[1:].mean() < 0.9
