"""Counting matches and classes in bits, against one comparison at a time."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scalefold.data.features.clusters import MatchTable, count_classes


def nearest_by_comparison(msa, centres):
    matches = np.stack([((msa == centre) & (centre < 21)).sum(axis=1) for centre in centres])
    return matches.argmax(axis=0)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 200),
    columns=st.integers(1, 40),
    num_centres=st.integers(1, 40),
    letters=st.integers(1, 23),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_nearest_centre_is_the_first_with_most_equal_residues(rows, columns, num_centres, letters, seed):
    rng = np.random.default_rng(seed)
    msa = rng.integers(0, min(letters, 22), (rows, columns)).astype(np.uint8)
    centres = rng.integers(0, letters, (num_centres, columns)).astype(np.uint8)
    np.testing.assert_array_equal(MatchTable(msa).nearest(centres), nearest_by_comparison(msa, centres))


@pytest.mark.parametrize("rows", [64 * 320 - 1, 64 * 320, 64 * 330])
def test_the_nearest_centre_is_right_for_alignments_too_deep_for_batches_of_centres(rows):
    rng = np.random.default_rng(1)
    msa = rng.integers(0, 22, (rows, 20)).astype(np.uint8)
    centres = rng.integers(0, 23, (5, 20)).astype(np.uint8)
    np.testing.assert_array_equal(MatchTable(msa).nearest(centres), nearest_by_comparison(msa, centres))


def test_gaps_and_mask_tokens_match_nothing():
    msa = np.array([[21, 21, 21, 4]], dtype=np.uint8)
    centres = np.array([[21, 21, 21, 5], [22, 22, 22, 4]], dtype=np.uint8)
    assert MatchTable(msa).nearest(centres).tolist() == [1]


def test_unknown_residues_match_each_other():
    msa = np.array([[20, 20]], dtype=np.uint8)
    centres = np.array([[3, 20], [20, 20]], dtype=np.uint8)
    assert MatchTable(msa).nearest(centres).tolist() == [1]


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(0, 100), columns=st.integers(1, 20), clusters=st.integers(1, 9), seed=st.integers(0, 999))
def test_class_counts_of_clusters_equal_a_loop(rows, columns, clusters, seed):
    rng = np.random.default_rng(seed)
    msa = rng.integers(0, 22, (rows, columns)).astype(np.uint8)
    cluster = rng.integers(0, clusters, rows)
    expected = np.zeros((clusters, columns, 22), dtype=np.int64)
    for row in range(rows):
        for column in range(columns):
            expected[cluster[row], column, msa[row, column]] += 1
    np.testing.assert_array_equal(count_classes(msa, cluster, clusters, 22), expected)
