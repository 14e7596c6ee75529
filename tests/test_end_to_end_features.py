"""Raw files to features: whole samples against the reference's, tensor by tensor."""

import hashlib
import json

import numpy as np
import pytest
import torch

from scalefold.data.features.features import FeatureSettings, build_features, reference_layout
from scalefold.data.loading.sampler import seed_from_string
from scalefold.data.store.store import Store

CASES = [
    *(f"train/{chain}/{seed}" for chain in ("1l2y_A", "1a00_A", "1nqp_A", "1bjp_A") for seed in (5, 2**62 + 11)),
    *(f"eval/{chain}/{seed_from_string(chain)}" for chain in ("1l2y_A", "1a00_A")),
]


@pytest.fixture(scope="module")
def store(real_store):
    """A store with the chains of the golden samples."""
    return Store(real_store)


@pytest.fixture(scope="module")
def golden(golden_dir):
    return json.loads((golden_dir / "real" / "end_to_end.json").read_text())


def test_every_golden_sample_is_compared(golden):
    assert sorted(golden) == sorted(CASES)


@pytest.mark.parametrize("case", CASES)
def test_a_real_sample_equals_the_reference(store, golden, case):
    mode, chain_id, seed = case.split("/")
    record = store.read(chain_id)
    features = reference_layout(build_features(record, FeatureSettings(), int(seed), training=mode == "train"))
    expected = golden[case]["features"]
    assert set(features) == set(expected)
    for key, facts in expected.items():
        array = np.ascontiguousarray(features[key][0].numpy())
        assert (list(array.shape), str(array.dtype)) == (facts["shape"], facts["dtype"]), key
        if hashlib.sha256(array.tobytes()).hexdigest() == facts["sha256"]:
            continue
        assert array.dtype == np.float32, f"{key}: integers differ"
        assert not set(np.unique(array)) <= {0.0, 1.0}, f"{key}: a mask differs"
        values = torch.from_numpy(array).double().flatten(0, -2)
        scale = np.sqrt(facts["sum_squares"])
        np.testing.assert_allclose(values.square().sum(0), facts["sum_squares"], rtol=1e-5, err_msg=key)
        assert np.all(np.abs(values.sum(0).numpy() - facts["sum"]) <= 1e-5 * scale), key
