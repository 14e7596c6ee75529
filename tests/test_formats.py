"""What an earlier version (f20ea34) wrote is read: a store, a checkpoint and a log. Other formats are refused.

``tests/data/formats`` holds them as they were written then, with what that version read back from its store
(``expected.json``: digests of the arrays of each chain).
"""

import hashlib
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from scalefold.config import TrainingConfig
from scalefold.data.store.manifest import read_manifest, verify_data
from scalefold.data.store.store import Store
from scalefold.errors import DataError
from scalefold.mlperf.judge.check import check_log
from scalefold.phases import Position
from scalefold.report.logs import read_result
from scalefold.step.checkpoint import load_into, load_run, verified_state
from scalefold.step.optimizer import Optimizer
from scalefold.step.parameters import FlatLayout, FlatParameters


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("f20ea34")
    with tarfile.open(Path(__file__).parent / "data" / "formats" / "f20ea34.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


def digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


def test_an_old_store_is_as_prepared_and_gives_the_same_chains(old: Path) -> None:
    assert verify_data(old / "store").problems == []
    assert read_manifest(old / "store").counts["chains"] == 3
    store, expected = Store(old / "store"), json.loads((old / "expected.json").read_text())
    found = {}
    for row in range(len(store.table.length)):
        chain = store.read(row)
        found[store.name(row)] = {
            "sequence": chain.sequence,
            "positions": digest(chain.all_atom_positions),
            "mask": digest(chain.all_atom_mask),
            "msa": digest(chain.msa),
            "deletions": digest(chain.deletion_matrix),
            "templates": len(chain.templates),
        }
    store.close()
    assert found == expected


def test_an_old_checkpoint_continues_a_run(old: Path) -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    flat = FlatParameters(model, torch.device("cpu"))
    optimizer = Optimizer(flat, TrainingConfig())
    folder = old / "checkpoints" / "last" / "000006"
    state = verified_state(folder)
    assert (state.iteration, state.seed, state.num_averaged, state.position) == (6, 7, 3, Position(1, 2, 4))
    assert load_run(folder, flat, optimizer, [name for name, _ in model.named_parameters()]) == state
    assert optimizer.adam_step == 3
    sums = [b.double().sum().item() for b in (flat.master, optimizer.exp_avg, optimizer.exp_avg_sq, optimizer.averaged)]
    assert sums == pytest.approx([1.1128133404999971, -0.01226318562112283, 2.997000520466031e-05, 1.1083872949238867])
    assert model[0].weight[0, 0].item() == 0.2995353043079376
    layout = FlatLayout(model)
    weights = torch.zeros(layout.size)
    load_into(folder / "swa_checkpoint.pt", layout, weights)
    assert torch.equal(weights, optimizer.averaged)


def test_an_old_log_is_judged_and_reported(old: Path) -> None:
    verdict = check_log(old / "result_0.txt")
    assert verdict.exit_code == 3, verdict.text()
    run = read_result(old / "result_0.txt")
    assert run.facts["global_batch_size"] == 2
    assert [evaluation.samples for evaluation in run.evaluations] == [4]


@pytest.mark.parametrize(
    "change",
    [
        {"files": {"../x": {"bytes": 1, "sha256": ""}}},
        {"files": {"/etc/passwd": {"bytes": 1, "sha256": ""}}},
        {"files": {"a": 3}},
        {"files": []},
        {"counts": {"chains": "3", "alignments": 1}},
        {"counts": {"chains": 3}},
        {"fingerprint": 3},
        {"settings": None},
        {"raw_bytes": None},
        {"rejections": 4},
        {"surprise": 1},
    ],
)
def test_a_manifest_of_other_types_is_refused(tmp_path, change):
    fields = {"fingerprint": "", "settings": {}, "counts": {"chains": 1, "alignments": 0}, "raw_bytes": 1, "files": {}}
    (tmp_path / "manifest.json").write_text(json.dumps(fields))
    assert read_manifest(tmp_path).counts["chains"] == 1
    (tmp_path / "manifest.json").write_text(json.dumps(fields | change))
    with pytest.raises(DataError, match=r"manifest\.json: not a manifest"):
        read_manifest(tmp_path)
