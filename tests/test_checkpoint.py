"""Checkpoints: written beside training, complete or absent, verified before they are used."""

import os
import resource
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from processes import run_ranks
from scalefold.config import TrainingConfig
from scalefold.errors import CheckpointError, TrainingError
from scalefold.step import checkpoint_writer
from scalefold.step.agreement import Agreement, checksums
from scalefold.step.checkpoint import (
    AVERAGED_FILE,
    RESUMABLE_FILE,
    STATE_FILE,
    RunState,
    load_initial,
    load_into,
    load_run,
    read_state,
)
from scalefold.step.checkpoint_writer import CheckpointWriter
from scalefold.step.optimizer import Optimizer
from scalefold.step.parameters import FlatParameters


class Trained:
    """A small model with its optimizer, and checkpoints of it."""

    def __init__(self, folder: Path, keep: int = 2, device: str = "cpu") -> None:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
        self.names = [name for name, _ in model.named_parameters()]
        self.flat = FlatParameters(model, torch.device(device))
        self.optimizer = Optimizer(self.flat, TrainingConfig())
        self.writer = CheckpointWriter(folder, keep)

    def step(self) -> None:
        """One update with some gradient."""
        for parameter in self.flat.parameters:
            parameter.grad = torch.randn(parameter.shape, device=parameter.device)
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


def test_a_process_without_descriptors_leaves_no_half_checkpoint_either(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits, original = resource.getrlimit(resource.RLIMIT_NOFILE), checkpoint_writer.write_text

    def refuse_files(file: Path, text: str) -> None:
        lowest = os.dup(0)
        os.close(lowest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, limits[1]))
        original(file, text)

    monkeypatch.setattr(checkpoint_writer, "write_text", refuse_files)
    try:
        trained.begin(1)
        with pytest.raises(CheckpointError, match=r"000001: cannot write .*Too many open files"):
            trained.writer.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert list(trained.writer.folder.iterdir()) == []


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


def initial(trained: Trained) -> dict:
    """The content of an initial checkpoint of the resumable layout."""
    return torch.load(trained.save(1) / RESUMABLE_FILE, weights_only=True)


def spoil(value: object) -> Callable[[dict], None]:
    return lambda content: content["alphafold_state_dict"].update({"1.bias": value})


def spoil_moment(key: str, value: object) -> Callable[[dict], None]:
    return lambda content: content["optimizer_state_dict"]["state"][3].update({key: value})


NAN, GOOD = torch.tensor([1.0, float("nan")]), torch.tensor([1.0, 2.0])


@pytest.mark.parametrize(
    "change, message",
    [
        (spoil(NAN), "1.bias holds values that are not finite"),
        (spoil(torch.tensor([1.0, -float("inf")])), "1.bias holds values that are not finite"),
        (spoil(torch.tensor([1e300, 1.0], dtype=torch.float64)), "1.bias holds values that are not finite"),
        (spoil(torch.tensor([1, 2])), "1.bias has type int64, not a real floating-point type"),
        (spoil(torch.tensor([True, False])), "1.bias has type bool, not a real"),
        (spoil(torch.tensor([1.0 + 2.0j, 1.0])), "1.bias has type complex64, not a real"),
        (spoil(GOOD.to_sparse()), "1.bias is no ordinary tensor (layout sparse_coo"),
        (spoil(GOOD.to("meta")), "1.bias is no ordinary tensor (layout strided, device meta"),
        (spoil([1.0, 2.0]), "1.bias is a list, not a tensor"),
        (spoil(None), "1.bias is a NoneType, not a tensor"),
        (spoil(torch.ones(3)), "1.bias has shape (3,), the model has (2,)"),
        (spoil_moment("exp_avg", NAN), "exp_avg of 1.bias holds values that are not finite"),
        (spoil_moment("exp_avg_sq", GOOD.long()), "exp_avg_sq of 1.bias has type int64"),
        (spoil_moment("exp_avg_sq", -GOOD), "exp_avg_sq holds negative values"),
        (spoil_moment("exp_avg", [0.0]), "exp_avg of 1.bias is a list"),
        (spoil_moment("step", GOOD), "optimizer_state_dict is not Adam's over 4 tensors: ValueError: only one"),
        (spoil_moment("step", float("nan")), "optimizer_state_dict is not Adam's over 4 tensors: ValueError"),
        (spoil_moment("step", 5), "parameters have different or negative Adam steps [1, 5]"),
        (lambda c: c.update(alphafold_state_dict=[1]), "alphafold_state_dict is a list, not a dictionary"),
        (lambda c: c.update(optimizer_state_dict=[1]), "optimizer_state_dict is not Adam's over 4 tensors: TypeError"),
        (lambda c: c["alphafold_state_dict"].update({7: GOOD}), "1 unknown (first: 7); it belongs to another model"),
    ],
)
def test_an_initial_checkpoint_of_anything_but_finite_real_tensors_is_refused_by_name(
    trained: Trained, tmp_path: Path, change: Callable[[dict], None], message: str
) -> None:
    content = initial(trained)
    change(content)
    torch.save(content, file := tmp_path / "initial.pt")
    with pytest.raises(CheckpointError) as refused:
        load_initial(file, trained.flat, trained.optimizer, trained.names, None)
    assert str(refused.value).startswith(f"{file}: ")
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_weights_of_every_real_type_are_taken(trained: Trained, tmp_path: Path, dtype: torch.dtype) -> None:
    content = initial(trained)["alphafold_state_dict"]
    torch.save({name: value.to(dtype) for name, value in content.items()}, file := tmp_path / "initial.pt")
    load_initial(file, trained.flat, trained.optimizer, trained.names, None)
    for name, view in trained.flat.named_views(trained.flat.master):
        assert torch.equal(view, content[name].to(dtype).float())


def test_an_evaluation_of_a_damaged_file_is_refused_by_name(trained: Trained, tmp_path: Path) -> None:
    for content, message in (
        ({"alphafold_state_dict": [1]}, "alphafold_state_dict is a list"),
        ({"averaged_model.module.0.weight": 3}, "3 parameters missing"),
    ):
        torch.save(content, file := tmp_path / "weights.pt")
        with pytest.raises(CheckpointError, match=f"weights.pt: {message}"):
            load_into(file, trained.flat, trained.flat.master)


@pytest.mark.parametrize("odd_rank", [0, 1, 2])
def test_of_three_ranks_the_one_that_differs_is_named(odd_rank: int) -> None:
    def compared(rank: int) -> list[str]:
        trained, texts = Trained(Path("unused")), []
        trained.step()
        agreement = Agreement(trained.optimizer, dist.group.WORLD)
        for step in (4, 5):
            agreement.begin(step)
            try:
                agreement.settle()
            except TrainingError as error:
                texts.append(str(error))
            if rank == odd_rank:
                trained.optimizer.exp_avg_sq.view(torch.int32)[0] ^= 1
        return texts

    found = run_ranks(compared, 3)
    assert all(texts == found[0] and len(texts) == 1 for texts in found)
    assert f"step 5: rank {odd_rank} on " in found[0][0]
    assert "than the other 2; all were equal after step 4" in found[0][0]


def test_counters_are_compared_too_and_one_rank_compares_nothing(trained: Trained) -> None:
    before = checksums(trained.optimizer)
    trained.optimizer.adam_step += 1
    assert not torch.equal(checksums(trained.optimizer), before)
    agreement = Agreement(trained.optimizer, None)
    agreement.begin(3)
    agreement.settle()


@pytest.mark.gpu
def test_a_checkpoint_on_a_gpu_allocates_nothing_once_it_is_prepared(tmp_path):
    trained = Trained(tmp_path, device="cuda")
    trained.step()
    trained.writer.prepare(trained.flat, trained.optimizer, trained.names)
    expected, before = trained.buffers(), torch.cuda.memory_stats()["allocation.all.allocated"]
    trained.begin(1)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    trained.step()  # beside the writing: the checkpoint is of the step before
    written = trained.writer.finish()
    assert written is not None
    trained.load(written.folder)
    assert all(torch.equal(a, b) for a, b in zip(expected, trained.buffers(), strict=True))
