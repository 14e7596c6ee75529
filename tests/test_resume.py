"""Where a run starts again: which checkpoint, with which settings, on all ranks alike; nothing lost, nothing silent."""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from processes import run_ranks
from runs import tiny_config
from scalefold.config import Config
from scalefold.data.loading.loader import Batch, TrainLoader
from scalefold.data.loading.sampler import Delivered
from scalefold.errors import CheckpointError, ConfigError, LogError
from scalefold.report.record import read_metrics
from scalefold.run.assemble import join_left_parts
from scalefold.run.loop import run_rank
from scalefold.run.resume import CONFIG_FILE, RunOptions, Start, choose_start
from scalefold.run.step_log import StepLog
from scalefold.step.checkpoint import AVERAGED_FILE, RESUMABLE_FILE, STATE_FILE, Checkpoints, load_run, read_state

RESUME = RunOptions(resume=True)
EVERY_2 = "run.checkpoint_every_iters=2"


def state_of(run_dir: Path, iteration: int) -> dict[str, torch.Tensor]:
    """Weights, moments and averages of a checkpoint by name."""
    folder = run_dir / "checkpoints" / "last" / f"{iteration:06d}"
    content = torch.load(folder / RESUMABLE_FILE, weights_only=True)
    moments = {f"{i}.{k}": v for i, s in content["optimizer_state_dict"]["state"].items() for k, v in s.items()}
    return content["alphafold_state_dict"] | moments | torch.load(folder / AVERAGED_FILE, weights_only=True)


def assert_equal_states(one: Path, two: Path, iteration: int) -> None:
    left, right = state_of(one, iteration), state_of(two, iteration)
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


@pytest.fixture(scope="module")
def whole(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps with checkpoints after the second and the fourth."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    run_rank(tiny_config(tiny_store, run_dir, EVERY_2), RunOptions())
    return run_dir


@pytest.fixture
def run_dir(whole: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may damage."""
    return shutil.copytree(whole, tmp_path / "run")


def last(run_dir: Path) -> Path:
    return run_dir / "checkpoints" / "last"


def choose(store: Path, run_dir: Path, *overrides: str, **options: bool) -> Start:
    """Where a resume with these overrides would start."""
    config = tiny_config(store, run_dir, EVERY_2, *overrides)
    return choose_start(config, RunOptions(resume=True, **options), Checkpoints(run_dir / "checkpoints"))


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


def forget_hashes(folder: Path) -> None:
    """As checkpoints of earlier versions are."""
    edit_state(folder, lambda state: (state.pop("sha256"), state.pop("left_over")))


def edit_state(folder: Path, change: Callable[[dict], object]) -> None:
    state = json.loads((folder / STATE_FILE).read_text())
    change(state)
    (folder / STATE_FILE).write_text(json.dumps(state))


@pytest.mark.parametrize("damage", [flip_a_bit, cut_off, Path.unlink])
@pytest.mark.parametrize("name", [RESUMABLE_FILE, AVERAGED_FILE])
def test_a_damaged_checkpoint_gives_way_to_the_one_before_and_is_named(
    run_dir: Path, damage: Callable[[Path], None], name: str
) -> None:
    damage(last(run_dir) / "000004" / name)
    notes: list[str] = []
    found = Checkpoints(run_dir / "checkpoints").newest_good(notes.append)
    assert found is not None
    assert (found[0].name, found[1].iteration) == ("000002", 2)
    assert len(notes) == 1
    assert str(last(run_dir) / "000004" / name) in notes[0]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"iteration": 4}', '{"iteration": "4", "seed": 1, "num_averaged": 4}']
)
def test_a_damaged_state_file_gives_way_to_the_checkpoint_before(run_dir: Path, text: str) -> None:
    (last(run_dir) / "000004" / STATE_FILE).write_text(text)
    notes: list[str] = []
    found = Checkpoints(run_dir / "checkpoints").newest_good(notes.append)
    assert found is not None
    assert found[0].name == "000002"
    assert STATE_FILE in notes[0]


def test_a_state_file_that_contradicts_its_neighbours_is_refused(run_dir: Path) -> None:
    edit_state(last(run_dir) / "000004", lambda state: state.update(iteration=3))
    notes: list[str] = []
    assert Checkpoints(run_dir / "checkpoints").newest_good(notes.append)
    assert "says iteration 3, contradicting the folder" in notes[0]
    with pytest.raises(CheckpointError, match=r"pt: holds iteration 4, run_state\.json .* says 3"):
        load_run(last(run_dir) / "000004", None, None, [])  # type: ignore[arg-type]


def test_checkpoints_of_earlier_versions_are_taken_and_looked_through(run_dir: Path) -> None:
    for name in ("000002", "000004"):
        forget_hashes(last(run_dir) / name)
    checkpoints, notes = Checkpoints(run_dir / "checkpoints"), list[str]()
    found = checkpoints.newest_good(notes.append)
    assert found is not None
    assert (found[0].name, notes) == ("000004", [])
    cut_off(last(run_dir) / "000004" / AVERAGED_FILE)
    found = checkpoints.newest_good(notes.append)
    assert found is not None
    assert found[0].name == "000002"
    assert "swa_checkpoint.pt: not a readable checkpoint" in notes[0]


def test_if_no_checkpoint_is_good_the_newest_is_named(tiny_store: Path, run_dir: Path) -> None:
    for name in ("000002", "000004"):
        flip_a_bit(last(run_dir) / name / RESUMABLE_FILE)
    with pytest.raises(CheckpointError, match=r"000004/resumable_checkpoint\.pt: is not as it was written.*no older"):
        choose(tiny_store, run_dir)


def test_a_run_that_falls_back_equals_an_uninterrupted_one_and_keeps_the_damaged_files(
    tiny_store: Path, run_dir: Path, whole: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flip_a_bit(last(run_dir) / "000004" / RESUMABLE_FILE)
    run_rank(tiny_config(tiny_store, run_dir, EVERY_2), RESUME)
    assert "000004/resumable_checkpoint.pt: is not as it was written" in caplog.text
    assert_equal_states(run_dir, whole, 4)
    assert read_metrics(run_dir).loss.tolist() == read_metrics(whole).loss.tolist()
    assert (run_dir / "result_0.resumed_000002.txt").exists()
    assert os.listdir(run_dir / "checkpoints" / "set_aside") == ["000004"]


def test_a_resume_joins_the_parts_that_a_crash_left_and_no_damaged_ones(
    tiny_store: Path, run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    start, log = choose(tiny_store, run_dir), run_dir / "result_0.txt"
    text = log.read_text()
    log.rename(run_dir / "result_0.txt.training.part")
    join_left_parts(run_dir, start)
    assert log.read_text() == text
    (run_dir / "result_1.txt.training.part").write_text("no log\n")
    join_left_parts(run_dir, start)
    assert "result_1.txt.training.part: not an MLPerf log line" in caplog.text


def test_a_start_before_the_first_checkpoint_says_how_to_go_on_and_that_works(tiny_store: Path, tmp_path: Path) -> None:
    (tmp_path / "result_0.txt").write_text("of a run that was interrupted\n")
    with pytest.raises(CheckpointError, match=r"no complete checkpoint.*afresh with --result-index 1"):
        choose(tiny_store, tmp_path)
    config, checkpoints = tiny_config(tiny_store, tmp_path), Checkpoints(tmp_path / "checkpoints")
    with pytest.raises(LogError, match=r"result_0\.txt exists: .*; start afresh with --result-index 1, or"):
        choose_start(config, RunOptions(), checkpoints)
    start = choose_start(config, RunOptions(result_index=1), checkpoints)
    assert (start.result_file.name, start.first_step) == ("result_1.txt", 1)


def test_a_fresh_start_beside_checkpoints_names_both_ways(tiny_store: Path, run_dir: Path) -> None:
    config, checkpoints = tiny_config(tiny_store, run_dir), Checkpoints(run_dir / "checkpoints")
    with pytest.raises(LogError, match=r"with --resume \(from 000004\), start afresh with --result-index 1"):
        choose_start(config, RunOptions(), checkpoints)


@pytest.mark.parametrize(
    "override, text",
    [
        ("training.global_batch_size=4", "training.global_batch_size 2 -> 4 (every step from here on uses another"),
        ("training.seed=7", "training.seed 1 -> 7 (samples and dropout are the new seed's"),
        ("training.opt_base_learning_rate=0.1", "opt_base_learning_rate 0.005 -> 0.1 (the optimizer goes on with"),
        ("training.swa_decay_rate=0.5", "training.swa_decay_rate 0.9 -> 0.5 (weights are averaged"),
        ("loss.fape_loss_weight=2.0", "loss.fape_loss_weight 1.0 -> 2.0 (the loss is another one"),
        ("model.evoformer.msa_dropout=0.3", "model.evoformer.msa_dropout 0.2 -> 0.3 (the model is another one"),
        ("data.max_extra_msa=9", "data.max_extra_msa 8 -> 9 (samples and their features"),
        ("data.dataloader=pq", "data.dataloader pt -> pq (samples arrive in another order"),
        ("data.val_max_sequence_length=99", "data.val_max_sequence_length 700 -> 99 (evaluations use other"),
        ("training.val_every_iters=4", "training.val_every_iters 2 -> 4 (evaluations take place"),
        ("training.target_avg_lddt_ca_value=0.5", "1.0 -> 0.5 (the run ends at another"),
    ],
)
def test_a_changed_setting_is_refused_with_its_consequence(
    tiny_store: Path, run_dir: Path, override: str, text: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        choose(tiny_store, run_dir, override)
    assert text in str(refused.value)
    assert "\n" not in str(refused.value)
    assert choose(tiny_store, run_dir, override, accept_changes=True).first_step == 5


def test_every_difference_is_listed(tiny_store: Path, run_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"seed 1 -> 7 .*; .*|global_batch_size 2 -> 4 .*; ") as refused:
        choose(tiny_store, run_dir, "training.seed=7", "training.global_batch_size=4")
    assert "training.seed 1 -> 7" in str(refused.value)
    assert "training.global_batch_size 2 -> 4" in str(refused.value)


@pytest.mark.parametrize(
    "override",
    [
        "training.num_train_iters=9",
        "run.checkpoint_every_iters=4",
        "execution.cpu_threads=1",
        "launch.time_limit_min=5",
        "data.num_workers=2",
        "training.seed=null",
        "description=another",
        "submission.org=another",
    ],
)
def test_a_harmless_setting_passes_in_silence(
    tiny_store: Path, run_dir: Path, override: str, caplog: pytest.LogCaptureFixture
) -> None:
    start = choose(tiny_store, run_dir, override)
    assert (start.seed, start.first_step) == (1, 5)
    assert caplog.text == ""


def test_a_refused_start_changes_no_file(tiny_store: Path, run_dir: Path) -> None:
    before = {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()}
    with pytest.raises(ConfigError, match="--accept-changes"):
        run_rank(tiny_config(tiny_store, run_dir, EVERY_2, "training.seed=7"), RESUME)
    assert {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()} == before


def test_an_accepted_batch_is_counted_from_where_it_begins(
    tiny_store: Path, run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    overrides = [EVERY_2, "training.global_batch_size=4", "training.num_train_iters=6"]
    run_rank(tiny_config(tiny_store, run_dir, *overrides), RunOptions(resume=True, accept_changes=True))
    assert read_metrics(run_dir).samples.tolist() == [2, 4, 6, 8, 12, 16]
    assert "accepted changes: training.global_batch_size 2 -> 4" in caplog.text
    log = (run_dir / "result_0.resumed_000004.txt").read_text().splitlines()
    (stop,) = [json.loads(line.split("MLLOG ")[1]) for line in log if '"epoch_stop"' in line]
    assert stop["metadata"]["epoch_num"] == 16
    state = read_state(last(run_dir) / "000006")
    assert (state.position.steps_before, state.position.samples_before) == (4, 8)


def test_an_accepted_seed_is_used(tiny_store: Path, run_dir: Path) -> None:
    start = choose(tiny_store, run_dir, "training.seed=7", accept_changes=True)
    assert start.seed == 7


def test_a_lost_or_broken_configuration_of_the_run_is_said(
    tiny_store: Path, run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (run_dir / CONFIG_FILE).write_text("system: [")
    with pytest.raises(ConfigError, match=r"config\.yaml.*--accept-changes resumes without comparing"):
        choose(tiny_store, run_dir)
    assert choose(tiny_store, run_dir, accept_changes=True).first_step == 5
    (run_dir / CONFIG_FILE).unlink()
    assert choose(tiny_store, run_dir).first_step == 5
    assert "config.yaml: absent" in caplog.text


def test_a_stop_inside_gradient_accumulation_waits_for_the_update(
    tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    three = ["training.gradient_accumulation_steps=3", "training.val_every_iters=3", "training.num_train_iters=9"]
    run_rank(tiny_config(tiny_store, tmp_path / "whole", *three, "run.checkpoint_every_iters=9"), RunOptions())
    push = StepLog.push

    def stop_at_4(self: StepLog, step: int, *values) -> None:
        push(self, step, *values)
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(StepLog, "push", stop_at_4)
        outcome = run_rank(tiny_config(tiny_store, tmp_path / "parts", *three), RunOptions())
    assert outcome is not None
    assert (outcome.status, outcome.step) == ("aborted", 6)
    run_rank(tiny_config(tiny_store, tmp_path / "parts", *three, "run.checkpoint_every_iters=9"), RESUME)
    assert_equal_states(tmp_path / "whole", tmp_path / "parts", 9)
    assert read_metrics(tmp_path / "parts").loss.tolist() == read_metrics(tmp_path / "whole").loss.tolist()


def seeds_of(config: Config, options: RunOptions) -> dict[int, tuple[int, ...]]:
    """The sample seeds that each step of a run has used."""
    used: dict[int, tuple[int, ...]] = {}
    push = StepLog.push

    def noting(self: StepLog, step: int, batch: Batch, *values) -> None:
        used[step] = batch.seeds
        push(self, step, batch, *values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepLog, "push", noting)
        run_rank(config, options)
    return used


def test_a_resumed_run_begins_with_the_samples_that_were_not_ready(
    tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_order = seeds_of(tiny_config(tiny_store, tmp_path / "pt"), RunOptions())
    ready_first = [EVERY_2, "data.dataloader=pq"]
    with monkeypatch.context() as patch:  # as if draws 2 and 4 had been ready before 1 and 3
        patch.setattr(TrainLoader, "delivered", lambda self: Delivered(4, (1, 3)))
        run_rank(tiny_config(tiny_store, tmp_path / "pq", *ready_first, "training.num_train_iters=2"), RunOptions())
    assert read_state(last(tmp_path / "pq") / "000002").left_over == [0, 1, 4, 5]
    used = seeds_of(tiny_config(tiny_store, tmp_path / "pq", *ready_first), RESUME)
    assert used == {3: in_order[1], 4: in_order[3]}
    assert read_state(last(tmp_path / "pq") / "000004").left_over == []


# Several ranks ------------------------------------------------------------------------------------------------------


def two_ranks(store: Path, run_dir: Path, *overrides: str) -> Config:
    return tiny_config(store, run_dir, EVERY_2, "parallel.ranks_per_node=2", *overrides)


def resumed_apart(rank: int, store: Path, run_dir: Path, init: Path) -> list[str]:
    """Resume with a run folder that only rank 0 has; which checkpoint files this rank has opened."""
    opened: list[str] = []
    own = run_dir if rank == 0 else run_dir.with_name("of_another_node")
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
    run_rank(two_ranks(store, own, f"training.init_checkpoint={init}"), RESUME)
    return sorted({Path(name).name for name in opened if name.endswith((".pt", STATE_FILE))})


@pytest.mark.distributed
def test_all_ranks_continue_from_the_checkpoint_that_rank_0_chose_and_only_rank_0_reads_it(
    tiny_store: Path, whole: Path, tmp_path: Path
) -> None:
    init = shutil.copy(last(whole) / "000002" / RESUMABLE_FILE, tmp_path / "initial.pt")
    from_init = [f"training.init_checkpoint={init}"]
    run_ranks(trained, 2, two_ranks(tiny_store, tmp_path / "uninterrupted", *from_init), join=False)
    half = two_ranks(tiny_store, tmp_path / "run", *from_init, "training.num_train_iters=2")
    run_ranks(trained, 2, half, join=False)
    opened = run_ranks(resumed_apart, 2, tiny_store, tmp_path / "run", init, join=False)
    assert opened[1] == []
    assert "initial.pt" in opened[0]
    assert_equal_states(tmp_path / "uninterrupted", tmp_path / "run", 4)


def trained(rank: int, config: Config) -> str | None:
    outcome = run_rank(config, RunOptions())
    return outcome.status if outcome else None


def with_a_flipped_bit(rank: int, config: Config, at_step: int) -> str:
    """A run in which one bit of rank 1's weights changes after a step; what ends it."""
    push = StepLog.push

    def flip(self: StepLog, step: int, *values) -> None:
        push(self, step, *values)
        if rank == 1 and step == at_step:
            self.run.training.optimizer.flat.master.view(torch.int32)[5] ^= 1

    StepLog.push = flip  # type: ignore[method-assign]
    try:
        run_rank(config, RunOptions())
    except Exception as error:
        return str(error)
    return "nothing"


@pytest.mark.distributed
def test_a_rank_whose_weights_differ_is_named_and_its_checkpoint_is_not_continued_from(
    tiny_store: Path, tmp_path: Path
) -> None:
    config = two_ranks(tiny_store, tmp_path / "run", "training.num_train_iters=8")
    texts = run_ranks(with_a_flipped_bit, 2, config, 3, join=False)
    for text in texts:
        assert "step 4: rank 1 on " in text
        assert "all were equal after step 2" in text
    assert [p.name for p in last(tmp_path / "run").iterdir()] == ["000002"]
    assert os.listdir(tmp_path / "run" / "checkpoints" / "set_aside") == ["000004"]
