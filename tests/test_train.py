"""Whole tiny runs in one process: outcome, log, record, resume, and what happens when something goes wrong."""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch

from runs import tiny_config
from scalefold.config import Config
from scalefold.errors import CheckpointError, ConfigError, DataError, TrainingError
from scalefold.eval.here import EvaluationHere
from scalefold.mlperf.judge.check import check_log
from scalefold.report.console import Progress
from scalefold.report.record import Record, read_metrics
from scalefold.run.begin import RunOptions
from scalefold.run.header import source_commit
from scalefold.run.loop import run_rank
from scalefold.run.step_log import StepLog
from scalefold.step.checkpoint import AVERAGED_FILE, RESUMABLE_FILE, STATE_FILE, load_run


def weights(run_dir: Path, iteration: int) -> dict[str, torch.Tensor]:
    """Those that are trained, and their averages."""
    folder = run_dir / "checkpoints" / "last" / f"{iteration:06d}"
    trained = torch.load(folder / RESUMABLE_FILE, weights_only=True)["alphafold_state_dict"]
    averaged = torch.load(folder / AVERAGED_FILE, weights_only=True)
    return trained | {f"averaged {name}": tensor for name, tensor in averaged.items()}


def test_a_run_ends_with_a_log_a_record_and_its_configuration(tiny_store: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_store, tmp_path / "run", "training.target_avg_lddt_ca_value=0.001")
    outcome = run_rank(config, RunOptions())
    assert outcome is not None
    assert (outcome.status, outcome.step) == ("success", 2)
    metrics = read_metrics(tmp_path / "run")
    assert metrics.step.tolist() == [1, 2]
    assert metrics.eval_step.tolist() == [2]
    verdict = check_log(tmp_path / "run" / "result_0.txt")
    assert verdict.exit_code == 3, verdict.text()
    assert (tmp_path / "run" / "config.yaml").exists()
    assert {"torch", "python", "scalefold", "date"} <= metrics.run["environment"].keys()
    records = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    (loader,) = [record for record in records if record.get("name") == "loader"]
    seconds = [sample["seconds"] for sample in loader["slowest"]]
    assert loader["workers"] == 0
    assert 1 <= len(seconds) <= 4  # two iterations of two samples
    assert seconds == sorted(seconds, reverse=True)


def test_what_was_assembled_before_an_error_is_let_go_of(
    tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[str] = []

    def broken(*arguments: object) -> None:
        raise RuntimeError("no loader")

    monkeypatch.setattr("scalefold.run.assemble.Batches", broken)
    for name, kind in (("record", Record), ("evaluator", EvaluationHere), ("screen", Progress)):
        monkeypatch.setattr(kind, "close", lambda self, name=name: closed.append(name))
    with pytest.raises(RuntimeError, match="no loader"):
        run_rank(tiny_config(tiny_store, tmp_path / "run"), RunOptions())
    assert closed == ["evaluator", "screen", "record"]


def test_a_run_that_misses_the_target_is_aborted_not_successful(tiny_store: Path, tmp_path: Path) -> None:
    outcome = run_rank(tiny_config(tiny_store, tmp_path / "run"), RunOptions())
    assert outcome is not None
    assert (outcome.status, outcome.step) == ("aborted", 4)
    stops = [line for line in (tmp_path / "run" / "result_0.txt").read_text().splitlines() if '"run_stop"' in line]
    assert len(stops) == 1
    assert json.loads(stops[0].split("MLLOG ")[1])["metadata"]["status"] == "aborted"


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tiny_store: Path, tmp_path: Path) -> None:
    every = "run.checkpoint_every_iters=2"
    run_rank(tiny_config(tiny_store, tmp_path / "whole", every), RunOptions())
    run_rank(tiny_config(tiny_store, tmp_path / "parts", every, "training.num_train_iters=2"), RunOptions())
    run_rank(tiny_config(tiny_store, tmp_path / "parts", every), RunOptions(resume=True))
    whole, parts = weights(tmp_path / "whole", 4), weights(tmp_path / "parts", 4)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    losses = [read_metrics(tmp_path / name).loss.tolist() for name in ("whole", "parts")]
    assert losses[0] == losses[1]
    assert (tmp_path / "parts" / "result_0.resumed_000002.txt").exists()


def test_micro_batches_equal_the_whole_local_batch(tiny_store: Path, tmp_path: Path) -> None:
    no_dropout = [f"model.{key}=0.0" for key in DROPOUT_KEYS]
    for name, micro in (("whole", "null"), ("parts", "1")):
        config = tiny_config(tiny_store, tmp_path / name, f"execution.micro_batch_size={micro}", *no_dropout)
        run_rank(config, RunOptions())
    whole, parts = read_metrics(tmp_path / "whole"), read_metrics(tmp_path / "parts")
    assert whole.loss == pytest.approx(parts.loss, rel=1e-5)
    assert whole.grad_norm == pytest.approx(parts.grad_norm, rel=1e-4)


DROPOUT_KEYS = (
    "template.dropout",
    "structure.dropout",
    *(f"{stack}.{kind}_dropout" for stack in ("extra_msa", "evoformer") for kind in ("msa", "pair")),
)


def test_a_step_that_is_not_finite_stops_training_and_leaves_the_last_checkpoint(
    tiny_store: Path, tmp_path: Path
) -> None:
    rate = "training.opt_base_learning_rate=1e30"  # weights of 1e30 after one step: finite, but no loss comes of them
    config = tiny_config(tiny_store, tmp_path / "run", "run.checkpoint_every_iters=1", rate)
    with pytest.raises(TrainingError, match=r"step 2, chains .*not finite: .*grad_norm.*000001"):
        run_rank(config, RunOptions())
    assert [p.name for p in (tmp_path / "run" / "checkpoints" / "last").iterdir()] == ["000001"]


def test_places_that_are_missing_are_named_before_anything_is_written(tiny_store: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.store_dir: .*no_such_store: no such folder"):
        run_rank(tiny_config(tmp_path / "no_such_store", tmp_path / "run"), RunOptions())
    missing = f"training.init_checkpoint={tmp_path / 'no_such.pt'}"
    with pytest.raises(ConfigError, match=r"training\.init_checkpoint: .*no_such\.pt: no such file"):
        run_rank(tiny_config(tiny_store, tmp_path / "run", missing), RunOptions())
    with pytest.raises(CheckpointError, match=r"--resume, but there is no complete checkpoint"):
        run_rank(tiny_config(tiny_store, tmp_path / "run"), RunOptions(resume=True))
    assert not (tmp_path / "run").exists()


def test_a_store_that_cannot_be_opened_is_named_and_the_clock_is_stopped(tmp_path: Path) -> None:
    (tmp_path / "empty_store").mkdir()
    with pytest.raises(DataError, match="empty_store"):
        run_rank(tiny_config(tmp_path / "empty_store", tmp_path / "run"), RunOptions())
    assert '"aborted"' in (tmp_path / "run" / "result_0.txt").read_text()


def test_a_start_that_fails_before_its_clock_leaves_no_log_in_the_way_of_the_next(
    tiny_store: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.pt"
    broken.write_text("this is no checkpoint\n")
    with pytest.raises(CheckpointError, match=r"broken\.pt: not a readable checkpoint; .*") as refused:
        run_rank(tiny_config(tiny_store, tmp_path / "run", f"training.init_checkpoint={broken}"), RunOptions())
    assert "weights_only" not in str(refused.value)  # the library's advice would let the file run code
    assert not list((tmp_path / "run").glob("result_*"))
    run_rank(tiny_config(tiny_store, tmp_path / "run", "training.num_train_iters=2"), RunOptions())
    assert (tmp_path / "run" / "result_0.txt").exists()


def test_an_initial_checkpoint_is_checked_against_its_hash_and_shapes(tiny_store: Path, tmp_path: Path) -> None:
    run_rank(tiny_config(tiny_store, tmp_path / "a", "run.checkpoint_every_iters=4"), RunOptions())
    file = tmp_path / "a" / "checkpoints" / "last" / "000004" / RESUMABLE_FILE
    from_file = f"training.init_checkpoint={file}"
    run_rank(tiny_config(tiny_store, tmp_path / "b", from_file, "training.num_train_iters=2"), RunOptions())
    with pytest.raises(CheckpointError, match=r"SHA-256 is .* expected abc"):
        run_rank(
            tiny_config(tiny_store, tmp_path / "c", from_file, "training.init_checkpoint_sha256sum=abc"), RunOptions()
        )
    with pytest.raises(CheckpointError, match=r"has shape .* the model has"):
        run_rank(tiny_config(tiny_store, tmp_path / "d", from_file, "model.c_s=40"), RunOptions())
    with pytest.raises(CheckpointError, match="belongs to another model"):
        run_rank(tiny_config(tiny_store, tmp_path / "e", from_file, "model.evoformer.num_blocks=2"), RunOptions())
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        run_rank(tiny_config(tiny_store, tmp_path / "f", from_file), RunOptions())


def test_a_disk_that_is_full_is_named_and_no_half_checkpoint_is_left(
    tiny_store: Path, tmp_path: Path, full_disk: None
) -> None:
    config = tiny_config(tiny_store, tmp_path / "run", "run.checkpoint_every_iters=1")
    with pytest.raises(CheckpointError, match=r"000001: cannot write the checkpoint, is the disk full\?"):
        run_rank(config, RunOptions())
    assert list((tmp_path / "run" / "checkpoints" / "last").iterdir()) == []
    assert '"aborted"' in (tmp_path / "run" / "result_0.txt").read_text()


def test_a_run_never_writes_over_the_log_of_another(tiny_store: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_store, tmp_path / "run", "training.num_train_iters=2")
    run_rank(config, RunOptions())
    with pytest.raises(Exception, match=r"result_0\.txt exists"):
        run_rank(config, RunOptions())


def test_triton_kernels_on_a_cpu_are_refused_before_anything_is_built(tiny_store: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="triton needs a CUDA device"):
        run_rank(tiny_config(tiny_store, tmp_path / "run", "execution.kernels=triton"), RunOptions())


def test_checkpoint_files_have_the_layout_that_the_reference_reads(tiny_store: Path, tmp_path: Path) -> None:
    config: Config = tiny_config(tiny_store, tmp_path / "run", "run.checkpoint_every_iters=2", "run.keep_checkpoints=1")
    run_rank(config, RunOptions())
    (folder,) = (tmp_path / "run" / "checkpoints" / "last").iterdir()
    content = torch.load(folder / RESUMABLE_FILE, weights_only=True)
    count = len(content["alphafold_state_dict"])
    assert content["iteration"] == 4
    assert content["optimizer_state_dict"]["param_groups"][0]["params"] == list(range(count))
    assert set(content["optimizer_state_dict"]["state"][0]) == {"step", "exp_avg", "exp_avg_sq"}
    averaged = torch.load(folder / "swa_checkpoint.pt", weights_only=True)
    assert int(averaged["averaged_model.n_averaged"]) == 4
    assert sum(name.startswith("averaged_model.module.") for name in averaged) == count


def test_a_checkpoint_without_its_state_file_is_refused(tiny_store: Path, tmp_path: Path) -> None:
    run_rank(tiny_config(tiny_store, tmp_path / "run", "run.checkpoint_every_iters=2"), RunOptions())
    folder = tmp_path / "run" / "checkpoints" / "last" / "000002"
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / STATE_FILE).unlink()
    with pytest.raises(CheckpointError, match=r"run_state\.json"):
        load_run(copy, None, None, [])  # type: ignore[arg-type]


def test_the_commit_is_that_of_the_checkout_which_holds_the_package_not_of_one_around_it(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(
            ["git", *who, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout

    file = tmp_path / "header.py"
    file.write_text("one")
    assert source_commit(file) is None, "no checkout"
    git("init", "-q")
    assert source_commit(file) is None, "an installed package inside somebody's checkout"
    git("add", "header.py")
    git("commit", "-qm", "one")
    assert source_commit(file) == git("rev-parse", "--short", "HEAD").strip()
    file.write_text("two")
    assert source_commit(file) == git("rev-parse", "--short", "HEAD").strip() + "+"


def test_ctrl_c_stops_in_order_with_a_checkpoint_and_a_second_one_at_once(
    tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    push = StepLog.push

    def stop_at_1(self: StepLog, step: int, *values) -> None:
        push(self, step, *values)
        if step == 1:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(StepLog, "push", stop_at_1)
    before = signal.getsignal(signal.SIGINT)
    try:
        outcome = run_rank(tiny_config(tiny_store, tmp_path), RunOptions())
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert outcome is not None
    assert outcome.status == "aborted"
    assert 0 < outcome.step < 4
    assert weights(tmp_path, outcome.step)
    assert "signal SIGINT: stopping after this step (Ctrl-C again ends at once" in caplog.text
