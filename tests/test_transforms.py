"""Random steps: their distributions, ranges and independence of what they must not depend on."""

from collections import Counter

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from scalefold.data.features.transforms import (
    MASK_TOKEN,
    MaskingRates,
    choose_rows,
    deletion_value,
    draw_clamped_fape,
    draw_crop,
    generator,
    mask_rows,
    permute_rows,
)


@given(
    length=st.integers(1, 600),
    templates=st.integers(0, 6),
    crop_size=st.integers(1, 300),
    keep=st.integers(0, 5),
    seed=st.integers(0, 2**64 - 1),
)
def test_a_crop_lies_in_the_chain_and_keeps_different_templates(length, templates, crop_size, keep, seed):
    crop = draw_crop(length, templates, crop_size, keep, seed)
    assert 0 <= crop.start < crop.stop <= length
    assert crop.stop - crop.start == min(length, crop_size)
    assert len(crop.templates) == len(set(crop.templates)) <= min(templates, keep)
    assert set(crop.templates) <= set(range(templates))


def test_crop_starts_cover_both_ends_evenly():
    starts = Counter(draw_crop(12, 0, 10, 4, seed).start for seed in range(3000))
    assert set(starts) == {0, 1, 2}
    assert min(starts.values()) > 900


def test_without_templates_the_crop_start_is_the_first_number_of_the_stream():
    for seed in range(20):
        first = int(torch.randint(0, 91, (1,), generator=generator(seed)))
        assert draw_crop(100, 0, 10, 4, seed).start == first


def test_the_number_of_kept_templates_is_uniform_from_none_to_all():
    kept = Counter(len(draw_crop(20, 4, 10, 4, seed).templates) for seed in range(5000))
    assert set(kept) == {0, 1, 2, 3, 4}
    assert min(kept.values()) > 850


@given(st.integers(1, 200), st.integers(0, 2**64 + 10))
def test_a_permutation_keeps_the_first_row_first(rows, seed):
    order = permute_rows(rows, seed)
    assert order[0] == 0
    assert sorted(order) == list(range(rows))


def test_chosen_rows_are_distinct_and_limited():
    rows = choose_rows(50, 20, 3)
    assert len(rows) == len(set(rows.tolist())) == 20
    assert len(choose_rows(5, 20, 3)) == 5


def masked_example(rates, shape=(400, 50), seed=11):
    rows = np.full(shape, 7, dtype=np.uint8)
    profile = np.zeros((shape[1], 22), dtype=np.float32)
    profile[:, 3] = 1.0
    return rows, *mask_rows(rows, profile, rates, seed)


def test_masking_replaces_positions_in_the_stated_proportions():
    rows, masked, chosen = masked_example(MaskingRates())
    assert abs(chosen.mean() - 0.15) < 0.01
    assert np.array_equal(masked[~chosen], rows[~chosen])
    share = np.bincount(masked[chosen], minlength=23) / chosen.sum()
    assert abs(share[MASK_TOKEN] - 0.7) < 0.03
    assert abs(share[3] - 0.105) < 0.02  # profile, and its part of the uniform distribution
    assert abs(share[7] - 0.105) < 0.02  # kept
    others = np.delete(share[:20], [3, 7])
    assert np.all(np.abs(others - 0.005) < 0.005)
    assert share[20] == share[21] == 0.0


def test_masking_draws_equal_a_multinomial_draw_from_the_same_generator():
    _, masked, chosen = masked_example(MaskingRates(replace_fraction=1.0), shape=(30, 20))
    probabilities = torch.full((600, 23), 0.005)
    probabilities[:, 20:22] = 0.0
    probabilities[:, 3] += 0.1
    probabilities[:, 7] += 0.1
    probabilities[:, MASK_TOKEN] = 0.7
    stream = generator(11)
    torch.rand(30, 20, generator=stream)
    expected = torch.multinomial(probabilities + 1e-10, 1, generator=stream).reshape(30, 20)
    assert chosen.all()
    np.testing.assert_array_equal(masked, expected.numpy())


def test_a_rate_of_zero_masks_nothing():
    rows, masked, chosen = masked_example(MaskingRates(replace_fraction=0.0))
    assert np.array_equal(rows, masked)
    assert not chosen.any()


def test_deletion_values_rise_from_zero_to_one():
    counts = np.array([0, 1, 3, 255], dtype=np.uint8)
    np.testing.assert_allclose(deletion_value(counts), 2 / np.pi * np.arctan(counts / 3), rtol=1e-6)
    assert deletion_value(counts)[0] == 0.0


def test_clamping_follows_its_probability():
    flags = [draw_clamped_fape(0.9, seed) for seed in range(4000)]
    assert set(flags) == {0.0, 1.0}
    assert abs(np.mean(flags) - 0.9) < 0.02
