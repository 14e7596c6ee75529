"""Raw files to features: whole samples against the reference's, tensor by tensor."""

import hashlib
import json
import os

import numpy as np
import pytest
import torch

from scalefold.data.features import FeatureSettings, build_features, reference_layout
from scalefold.data.prepare import prepare
from scalefold.data.rawlayout import RawLayout
from scalefold.data.sampler import seed_from_string
from scalefold.data.store import Store

ENTRIES = ("1l2y", "1a00", "1nqp", "1bjp", "1out")  # the sampled chains and the only entry their templates come from
CASES = [
    *(f"train/{chain}/{seed}" for chain in ("1l2y_A", "1a00_A", "1nqp_A", "1bjp_A") for seed in (5, 2**62 + 11)),
    *(f"eval/{chain}/{seed_from_string(chain)}" for chain in ("1l2y_A", "1a00_A")),
]


@pytest.fixture(scope="module")
def store(shared_dir, tmp_path_factory):
    """A store of the entries that the golden samples need."""
    raw, root = tmp_path_factory.mktemp("raw"), shared_dir / "data"
    for entry in ENTRIES:
        folder = raw / entry[1:3]
        folder.mkdir(exist_ok=True)
        os.symlink(root / "pdb_mmcif" / "raw" / entry[1:3] / f"{entry}.cif.gz", folder / f"{entry}.cif.gz")
    layout = RawLayout(
        mmcif_dir=raw,
        alignment_dirs=(
            _alignments(raw, root, "open_protein_set"),
            _alignments(raw, root, "open_protein_set_computed"),
        ),
        obsolete_file=root / "pdb_mmcif" / "obsolete.dat",
    )
    out = tmp_path_factory.mktemp("store")
    prepare(layout, out / "store", report=lambda line: None)
    return Store(out / "store")


def _alignments(raw, root, name):
    """The alignment folders that serve the entries, with the list of chains they serve."""
    target = raw.parent / f"{raw.name}_{name}"
    (target / "pdb").mkdir(parents=True)
    used = []
    for line in (root / name / "duplicate_pdb_chains.txt").read_text().splitlines():
        if any(chain[:4] in ENTRIES for chain in line.split()):
            used.append(line)
            folder = root / name / "pdb" / line.split()[0]
            os.symlink(folder, target / "pdb" / folder.name)
    (target / "duplicate_pdb_chains.txt").write_text("\n".join(used) + "\n")
    return target


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
