"""The training curve of the kernels beside that of the plain path: what is trained where, kept, compared and judged."""

import csv
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from runs import SMALLEST, TINY
from scalefold.report.record import read_metrics


@pytest.fixture
def script(repository, monkeypatch):
    monkeypatch.syspath_prepend(str(repository / "benchmarks" / "measure"))
    import training_curve

    yield training_curve
    for name in ("training_curve", "real_chains", "common"):
        sys.modules.pop(name, None)


def trainer(started, losses):
    """In the place of training: notes settings and GPU, writes metrics of ``losses`` by whether kernels are plain."""

    def train(config, store, steps, workers, extra, run_dir, gpu):
        variant = "plain" if "execution.kernels=reference" in extra else "ours"
        started[variant] = (extra, gpu)
        run_dir.mkdir()
        lines = [json.dumps({"kind": "run", "config_name": "x", "device": "a card"})]
        for step, loss in enumerate(losses[variant][:steps], 1):
            own = {"kind": "step", "step": step, "samples": step, "time_s": float(step), "loss": loss}
            own["terms"] = {"fape": loss / 2}
            own |= {"lr": 0.1, "grad_norm": 1.0, "step_ms": 2.0, "data_ms": 0.1, "passes": 1, "peak_gib": 1.0}
            lines.append(json.dumps(own))
        (run_dir / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        return read_metrics(run_dir)

    return train


def run(script, monkeypatch, folder: Path, *arguments: str) -> tuple[int, dict[tuple[str, str], dict[str, str]]]:
    """Exit status, and rows by variant and term."""
    monkeypatch.setattr(sys, "argv", ["training_curve.py", "store", "--folder", str(folder), *arguments])
    status = script.main()
    table = folder / "training_curve.csv"
    rows = list(csv.DictReader(table.open())) if table.exists() else []
    return status, {(row["variant"], row["term"]): row for row in rows}


def noisy(offset: float) -> list[float]:
    return [10.0 - 0.01 * step + 0.3 * (step * 7 % 5 - 2) + offset for step in range(60)]


def test_each_variant_has_a_gpu_of_its_own_and_a_row_for_every_term(script, monkeypatch, tmp_path) -> None:
    started: dict[str, tuple[list[str], int | None]] = {}
    losses = {"plain": noisy(0.0), "ours": noisy(0.1)}
    monkeypatch.setattr(script, "train", trainer(started, losses))
    monkeypatch.setattr(script.torch.cuda, "device_count", lambda: 2)
    status, rows = run(script, monkeypatch, tmp_path, "--variants", "plain", "ours", "--recompute", "--steps", "60")
    assert (started["plain"][1], started["ours"][1]) == (0, 1)
    assert [variant for variant, (extra, _) in started.items() if script.RECOMPUTED in extra] == ["plain"]
    assert sorted(path.name for path in tmp_path.glob("*.jsonl")) == ["curve_ours.jsonl", "curve_plain.jsonl"]
    assert (status, list(rows)) == (0, [("ours", "loss"), ("ours", "fape")])
    row = rows["ours", "loss"]
    assert (row["same"], row["steps"], row["device"]) == ("yes", "60", "a card")
    assert float(row["last"]) == pytest.approx(float(row["plain_last"]) + 0.1, abs=0.01)
    assert float(row["mean_difference"]) == pytest.approx(0.0103, abs=2e-4)
    assert 0 < float(row["difference"]) < float(row["band"])


def test_a_curve_that_leaves_the_band_of_the_kept_plain_one_is_told(script, monkeypatch, tmp_path, capsys) -> None:
    started: dict[str, tuple[list[str], int | None]] = {}
    losses = {"plain": noisy(0.0), "ours": noisy(4.0)}
    monkeypatch.setattr(script, "train", trainer(started, losses))
    monkeypatch.setattr(script.torch.cuda, "device_count", lambda: 1)
    assert run(script, monkeypatch, tmp_path, "--variants", "plain", "--steps", "40") == (0, {})
    status, rows = run(script, monkeypatch, tmp_path)
    assert started["ours"][1] == 0
    assert (status, rows["ours", "loss"]["same"], rows["ours", "loss"]["steps"]) == (1, "no", "40")
    assert "NOT the same" in capsys.readouterr().out
    started.clear()
    assert run(script, monkeypatch, tmp_path, "--kept")[0] == 1
    assert not started, "nothing is trained"


def test_a_run_gets_one_of_the_gpus_that_this_script_may_use(script, monkeypatch, tmp_path, tiny_store) -> None:
    import real_chains

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-b")
    seen = []

    def started(command, env):
        seen.append(env["CUDA_VISIBLE_DEVICES"])
        return SimpleNamespace(returncode=1)

    monkeypatch.setattr(real_chains.subprocess, "run", started)
    for gpu in (0, 1, None):
        with pytest.raises(SystemExit):
            real_chains.train(TINY, tiny_store, 1, 0, [], tmp_path, gpu)
    assert seen == ["2", "GPU-b", "2,GPU-b"]


def test_weights_rounded_otherwise_are_those_of_the_run_within_half_a_place(script, monkeypatch) -> None:
    import torch

    moved = script.rounded_weights(TINY, [*SMALLEST, "execution.precision=bf16"], None)
    monkeypatch.setattr(script, "move_within_rounding", lambda weights, random: None)
    exact = script.rounded_weights(TINY, [*SMALLEST, "execution.precision=bf16"], None)
    assert all(torch.allclose(moved[name], weight, rtol=2**-9, atol=0) for name, weight in exact.items())
    changed = {name for name, weight in exact.items() if not torch.equal(weight, moved[name])}
    assert any(name.startswith("evoformer") for name in changed)
    assert not any(name.startswith(("structure_module", "auxiliary_heads")) for name in changed), "fp32 in every run"


def test_variants_that_begin_from_a_checkpoint_are_all_made_anew(script, monkeypatch, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit):
        run(script, monkeypatch, tmp_path, "--trained", "5")
    assert "name plain among --variants" in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.parametrize("trained", [0, 5])
def test_real_runs_of_the_tiny_model_are_trained_and_compared(
    script, tiny_store, monkeypatch, tmp_path, trained
) -> None:
    """From random weights, and from a checkpoint, with what it holds of Adam."""
    monkeypatch.setattr(script.torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(
        script, "move_within_rounding", lambda weights, random: None
    )  # then a start from the weights' file is the start from the seed
    monkeypatch.setattr(sys, "argv", ["training_curve.py", str(tiny_store), "--config", str(TINY)])
    sys.argv += ["--variants", "plain", "rounded", "--steps", "20", "--crop", "16", "--workers", "0"]
    sys.argv += ["--folder", str(tmp_path), "--set", *SMALLEST, "training.num_train_iters=20"]
    sys.argv += ["training.val_every_iters=1000", "--trained", str(trained)]
    begun = []
    real_train = script.train
    monkeypatch.setattr(script, "train", lambda *given: (begun.append(given[4]), real_train(*given))[1])
    assert script.main() == 0
    rows = list(csv.DictReader((tmp_path / "training_curve.csv").open()))
    assert {(row["variant"], row["same"], row["steps"], row["difference"], row["trained"]) for row in rows} == {
        ("rounded", "yes", "20", "0.00e+00", str(trained))
    }
    from_file = ["init_checkpoint" in " ".join(extra) for extra in begun]
    assert from_file == ([False, True, True] if trained else [False, True])
