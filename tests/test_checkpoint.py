"""Checkpoints: written beside training, complete or absent, verified before they are used."""

import os
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from scalefold import checkpoint_writer
from scalefold.checkpoint import AVERAGED_FILE, RESUMABLE_FILE, STATE_FILE, RunState, load_run, read_state
from scalefold.checkpoint_writer import CheckpointWriter
from scalefold.config import TrainingConfig
from scalefold.errors import CheckpointError
from scalefold.optim import FlatParameters, Optimizer


class Trained:
    """A small model with its optimizer, and checkpoints of it."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
        self.names = [name for name, _ in model.named_parameters()]
        self.flat = FlatParameters(model, torch.device("cpu"))
        self.optimizer = Optimizer(self.flat, TrainingConfig())
        self.writer = CheckpointWriter(folder, keep)

    def step(self) -> None:
        """One update with some gradient."""
        for parameter in self.flat.parameters:
            parameter.grad = torch.randn(parameter.shape)
        self.flat.collect_gradients()
        self.optimizer.prepare(self.optimizer.adam_step + 1)
        self.optimizer.apply()
        self.optimizer.count()

    def begin(self, iteration: int) -> None:
        """Begin to save."""
        state = RunState(iteration, 7, self.optimizer.num_averaged)
        self.writer.save(self.flat, self.optimizer, self.names, state)

    def save(self, iteration: int) -> Path:
        """Save, and wait for it."""
        self.begin(iteration)
        written = self.writer.finish()
        assert written is not None
        return written.folder

    def load(self, folder: Path) -> RunState:
        """Continue from a checkpoint."""
        return load_run(folder, self.flat, self.optimizer, self.names)

    def buffers(self) -> list[torch.Tensor]:
        """Copies of weights, moments and averages."""
        o = self.optimizer
        return [buffer.clone() for buffer in (self.flat.master, o.exp_avg, o.exp_avg_sq, o.averaged)]


@pytest.fixture
def trained(tmp_path: Path) -> Trained:
    made = Trained(tmp_path)
    made.step()
    return made


class Gate:
    """A disk that writes only when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.reached, original = threading.Event(), threading.Event(), torch.save

        def save(*args, **kwargs) -> None:
            self.reached.set()
            assert self.open.wait(60)
            original(*args, **kwargs)

        monkeypatch.setattr(checkpoint_writer.torch, "save", save)


def test_training_goes_on_while_a_checkpoint_of_the_past_is_written(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, before = Gate(monkeypatch), trained.buffers()
    trained.begin(1)
    assert gate.reached.wait(60)
    trained.step()
    after = trained.buffers()
    assert trained.writer.all() == []
    gate.open.set()
    written = trained.writer.finish()
    assert written is not None
    assert trained.load(written.folder).iteration == 1
    assert all(torch.equal(x, y) for x, y in zip(trained.buffers(), before, strict=True))
    assert not any(torch.equal(x, y) for x, y in zip(after, before, strict=True))


def test_a_second_checkpoint_waits_for_the_first(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    trained.begin(1)
    assert gate.reached.wait(60)
    threading.Timer(0.2, gate.open.set).start()
    trained.begin(2)
    assert trained.writer.all()[0].name == "000001"
    trained.writer.finish()
    assert [p.name for p in trained.writer.all()] == ["000001", "000002"]


def test_what_went_wrong_with_a_checkpoint_is_raised_by_the_next_and_leaves_nothing_behind(
    trained: Trained, full_disk: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(content: object, file: Path) -> None:
        file.write_bytes(bytes(200_000))

    monkeypatch.setattr(checkpoint_writer.torch, "save", refuse)
    trained.begin(1)
    with pytest.raises(CheckpointError, match=r"000001: cannot write .*disk full\? File too large"):
        trained.begin(2)
    assert list(trained.writer.folder.iterdir()) == []
    assert trained.writer.finish() is None  # told once


@pytest.mark.parametrize("buffer, what", [("master", "weights"), ("exp_avg", "exp_avg"), ("averaged", "averages")])
def test_numbers_that_are_not_finite_never_become_a_checkpoint(trained: Trained, buffer: str, what: str) -> None:
    trained.save(1)
    owner = trained.flat if buffer == "master" else trained.optimizer
    trained.flat.view(getattr(owner, buffer), trained.flat.slots[1])[0] = float("nan")
    trained.begin(2)
    name = trained.flat.slots[1].name.replace(".", r"\.")
    with pytest.raises(CheckpointError, match=rf"iteration 2: {what} are not finite \(first: {name}\)"):
        trained.writer.finish()
    assert [p.name for p in trained.writer.folder.iterdir()] == ["000001"]


def test_an_error_on_the_way_out_is_a_warning(trained: Trained, caplog: pytest.LogCaptureFixture) -> None:
    trained.flat.master[0] = float("inf")
    trained.begin(1)
    trained.writer.close()
    assert "iteration 1: weights are not finite" in caplog.text


def test_files_reach_the_disk_before_the_name_does(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    flush, rename = checkpoint_writer.flush, Path.rename
    monkeypatch.setattr(checkpoint_writer, "flush", lambda path: (calls.append(f"flush {path.name}"), flush(path)))
    monkeypatch.setattr(Path, "rename", lambda a, b: (calls.append(f"rename to {b.name}"), rename(a, b))[1])
    trained.save(1)
    inside = [f"flush {name}" for name in (RESUMABLE_FILE, AVERAGED_FILE, STATE_FILE)]
    assert calls == [*inside, "flush .000001.partial", "rename to 000001", "flush last"]


def test_a_checkpoint_of_the_same_iteration_gives_way_and_old_ones_go(trained: Trained) -> None:
    for iteration in (1, 2, 3, 3):
        trained.step()
        trained.save(iteration)
    assert sorted(os.listdir(trained.writer.folder)) == ["000002", "000003"]
    assert read_state(trained.writer.folder / "000003").num_averaged == 5


def test_what_a_killed_run_left_half_written_goes_with_the_next_start(tmp_path: Path) -> None:
    (tmp_path / "last" / ".000004.partial").mkdir(parents=True)
    trained = Trained(tmp_path)
    trained.writer.prepare(trained.flat, trained.optimizer, trained.names)
    assert list(trained.writer.folder.iterdir()) == []


def test_torch_adam_continues_from_our_file(trained: Trained) -> None:
    """Tensors are views of a few storages in the file: those of two parameters must not overlap."""
    content = torch.load(trained.save(1) / RESUMABLE_FILE, weights_only=True)
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    model.load_state_dict(content["alphafold_state_dict"])
    adam = torch.optim.Adam(model.parameters())
    adam.load_state_dict(content["optimizer_state_dict"])
    model(torch.ones(1, 3)).sum().backward()
    adam.step()
    assert [int(state["step"]) for state in adam.state.values()] == [2, 2, 2, 2]
    assert adam.param_groups[0]["lr"] == 1e-3


def test_the_size_of_a_file_is_that_of_its_tensors(trained: Trained) -> None:
    folder = trained.save(1)
    payload = 4 * trained.flat.size
    assert (folder / AVERAGED_FILE).stat().st_size < payload + 4096
    assert (folder / RESUMABLE_FILE).stat().st_size < 3 * payload + 8192
