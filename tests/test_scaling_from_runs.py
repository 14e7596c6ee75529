"""What earlier runs say about the next one's settings."""

import json

import pytest
from typer.testing import CliRunner

from runs import TINY, tiny_config
from scalefold.cli import app
from scalefold.config import dump_config, load_config
from scalefold.errors import ConfigError
from scalefold.report.record import EvalRow, Record, StepRow
from scalefold.run.begin import RunOptions
from scalefold.run.loop import run_rank
from scalefold.scaling.from_runs import changes


def run_folder(folder, repository, waits_ms, step_ms=1000.0, eval_s=None, overrides=()):
    """A run of the tiny system with a record of steps and evaluations."""
    folder.mkdir()
    config = load_config(repository / "configs/tiny.yaml", list(overrides)).config
    (folder / "config.yaml").write_text(dump_config(config))
    record = Record(folder, rank0=True)
    for step, wait in enumerate(waits_ms, 1):
        record.step(StepRow(step, loss=1.0, step_ms=step_ms, data_ms=wait, time_s=step * step_ms / 1000))
    for n in range(3 if eval_s is not None else 0):
        record.evaluation(EvalRow(40 * (n + 1), 4, 0.5, seconds=eval_s, time_s=1.0))
    record.close()
    return config


def by_key(found):
    return {change.key: change for change in found}


def test_steady_waits_ask_for_workers(tmp_path, repository):
    config = run_folder(tmp_path / "run", repository, [500.0] * 60, overrides=["data.num_workers=2"])
    found = by_key(changes(config, [tmp_path / "run"]))
    assert found["data.num_workers"].proposed == 5
    assert found["data.num_workers"].text().startswith("data.num_workers:             2 -> 5")
    assert "30 s of the run, 50.0% of its steps" in found["data.num_workers"].worth
    assert found["data.prefetch_factor"].proposed is None


def test_rare_long_waits_ask_for_more_batches_ahead(tmp_path, repository):
    waits = [0.0] * 50 + [2000.0] * 2
    config = run_folder(tmp_path / "run", repository, waits, overrides=["data.prefetch_factor=3"])
    found = by_key(changes(config, [tmp_path / "run"]))
    assert found["data.num_workers"].proposed is None
    assert found["data.prefetch_factor"].proposed == 6


def test_a_loader_that_keeps_up_is_left_alone(tmp_path, repository):
    config = run_folder(tmp_path / "run", repository, [1.0] * 60)
    assert [change.proposed for change in changes(config, [tmp_path / "run"])] == [None] * 4


@pytest.mark.parametrize(("eval_s", "ranks"), [(80.0, 5), (30.0, None), (5.0, 1)])
def test_evaluation_ranks_keep_up_with_a_cycle(tmp_path, repository, eval_s, ranks):
    """A cycle of 40 steps of a second; two ranks evaluate."""
    layout = ["parallel.ranks_per_node=6", "parallel.num_eval_ranks=2", "training.val_every_iters=40"]
    config = run_folder(tmp_path / "run", repository, [0.0] * 30, eval_s=eval_s, overrides=layout)
    assert by_key(changes(config, [tmp_path / "run"]))["parallel.num_eval_ranks"].proposed == ranks


def test_the_command_reads_the_folder_of_a_run_that_was_trained(tiny_store, tmp_path):
    """Batches are built by the trainer itself, which so waits for each."""
    steps = ["training.num_train_iters=14", "training.val_every_iters=7"]
    run_rank(tiny_config(tiny_store, tmp_path / "run", *steps), RunOptions())
    done = CliRunner().invoke(app, ["plan", str(TINY), "data.num_workers=0", "--tune", str(tmp_path / "run"), "--json"])
    assert done.exit_code == 0, done.output
    found = {change["key"]: change for change in json.loads(done.stdout)}
    assert len(found) == 4
    assert (
        found["data.num_workers"]["proposed"] or found["data.prefetch_factor"]["proposed"]
    )  # rare waits or steady ones
    assert "ranks of its own would end that" in found["parallel.num_eval_ranks"]["worth"]


def test_padding_is_compared_between_runs_only(tmp_path, repository):
    one = run_folder(tmp_path / "a", repository, [0.0] * 30, eval_s=20.0, overrides=["data.eval_length_multiple=64"])
    alone = by_key(changes(one, [tmp_path / "a"]))["data.eval_length_multiple"]
    assert alone.proposed is None
    assert "open" in alone.worth
    run_folder(tmp_path / "b", repository, [0.0] * 30, eval_s=15.0, overrides=["data.eval_length_multiple=32"])
    both = by_key(changes(one, [tmp_path / "a", tmp_path / "b"]))["data.eval_length_multiple"]
    assert (both.proposed, both.worth) == (32, "evaluations take 25% less")


def test_a_run_that_says_nothing_is_named(tmp_path, repository):
    config = run_folder(tmp_path / "short", repository, [0.0] * 5)
    with pytest.raises(ConfigError, match="short: fewer than 11 steps with times"):
        changes(config, [tmp_path / "short"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"empty: no config\.yaml"):
        changes(config, [tmp_path / "empty"])


def test_a_run_of_another_layout_is_refused(tmp_path, repository):
    run_folder(tmp_path / "run", repository, [0.0] * 30)
    other = load_config(repository / "configs/tiny.yaml", ["parallel.gpu=A100"]).config
    with pytest.raises(ConfigError, match="another GPU or DAP size"):
        changes(other, [tmp_path / "run"])
