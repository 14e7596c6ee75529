"""The effect of an evaluation's precision: the verdict, and a whole measurement with the tiny model."""

import csv
import sys
from pathlib import Path

import pytest

from runs import SMALLEST, TINY


@pytest.fixture
def script(repository, monkeypatch):
    monkeypatch.syspath_prepend(str(repository / "benchmarks" / "measure"))
    import evaluation_precision

    yield evaluation_precision
    for name in ("evaluation_precision", "training_curve", "real_chains", "common"):
        sys.modules.pop(name, None)


def test_an_average_that_moves_too_far_demands_the_next_precision(script):
    exact = {"a": 0.5, "b": 0.7}
    near, far = {"a": 0.5015, "b": 0.6999}, {"a": 0.504, "b": 0.699}
    assert script.unfit({"fp32": exact, "bf16": near, "tf32": exact}) == []
    assert "bf16 may stay" in script.verdict({"fp32": exact, "bf16": near})
    assert "bf16 moves the average by more than 0.001: tf32 must" in script.verdict(
        {"fp32": exact, "bf16": far, "tf32": near}
    )
    assert "bf16 and tf32 moves the average by more than 0.001: fp32 must" in script.verdict(
        {"fp32": exact, "bf16": far, "tf32": far}
    )
    assert "bf16 moves the average by more than 0.001: fp32 must" in script.verdict({"fp32": exact, "bf16": far})
    row = script.summary({"fp32": exact, "bf16": far})[1]
    assert (row["of_chain"], row["largest_shift"], row["mean_shift"]) == ("a", "+4.0e-03", "+1.5e-03")


@pytest.mark.long
def test_weights_are_trained_and_scored_chain_by_chain_in_each_precision(
    script, tiny_store: Path, tmp_path: Path, monkeypatch, capsys
):
    table = tmp_path / "rows.csv"
    command = ["evaluation_precision.py", str(tiny_store), "--config", str(TINY), "--steps", "2", "--crop", "16"]
    command += ["--workers", "0", "--csv", str(table), "--label", "tiny", "--precisions", "bf16", "--set", *SMALLEST]
    monkeypatch.setattr(sys, "argv", [*command, "training.num_train_iters=2", "training.val_every_iters=100"])
    status = script.main()
    rows = list(csv.DictReader(table.open()))
    chains = {row["chain"] for row in rows}
    assert sorted((row["chain"], row["precision"]) for row in rows) == sorted(
        (chain, precision) for chain in chains for precision in ("bf16", "fp32")
    )
    assert {(row["weights"], row["steps"]) for row in rows} == {("tiny", "2")}
    assert all(0.0 <= float(row["lddt_ca"]) <= 1.0 and int(row["length"]) > 0 for row in rows)
    scores = {p: {r["chain"]: float(r["lddt_ca"]) for r in rows if r["precision"] == p} for p in ("fp32", "bf16")}
    assert status == int(bool(script.unfit(scores)))
    assert script.verdict(scores) in capsys.readouterr().out
