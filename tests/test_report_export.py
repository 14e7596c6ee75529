"""Runs handed to other tools: every number arrives with its step, nothing else is needed than the run's files."""

import builtins
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from report_logs import published_rows, write_result
from scalefold.errors import ConfigError
from scalefold.report.export import export, points
from scalefold.report.logs import read_runs
from scalefold.report.record import EvalRow, Record, StepRow


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "mine"
    with Record(folder, rank0=True) as record:
        record.run(config_name="tiny", global_batch_size=4, environment={"torch": "2.11"})
        for step in (1, 2):
            terms = {"fape": 0.5 * step}
            record.step(StepRow(step=step, loss=float("nan") if step == 2 else 3.0, terms=terms, lr=1e-3, time_s=step))
        record.evaluation(EvalRow(step=2, samples=8, lddt_ca=0.25, time_s=2.5))
    return folder


def test_all_numbers_of_a_run_are_points_by_step_and_what_is_not_finite_is_left_out(run_dir):
    (run,) = read_runs(run_dir)
    first, second = points(run)
    assert (first.step, first.time_s) == (1, 1.0)
    assert first.values == {"train/loss": 3.0, "train/lr": 1e-3, "terms/fape": 0.5}
    assert second.values == {"train/lr": 1e-3, "terms/fape": 1.0, "eval/lddt_ca": 0.25}


def test_the_log_of_any_submitter_has_points_too(tmp_path):
    row = published_rows("NVIDIA")[0]
    (run,) = read_runs(write_result(tmp_path / "result_0.txt", row))
    found = {point.step: point.values for point in points(run)}
    evaluations = {samples // 256: value for samples, value in json.loads(row["eval_points"]) if samples}
    assert {step: values["eval/lddt_ca"] for step, values in found.items()} == evaluations
    assert found[40]["log/throughput"] == float(row["samples_per_s_median"])


def test_tensorboard_reads_what_was_exported(run_dir, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "events"
    assert export(run_dir, "tensorboard", out) == [f"{out / 'mine'}: 6 values"]
    read = EventAccumulator(str(out / "mine")).Reload()
    assert [(e.step, e.value, e.wall_time) for e in read.Scalars("eval/lddt_ca")] == [(2, 0.25, 2.0)]
    assert [e.value for e in read.Scalars("terms/fape")] == [0.5, 1.0]
    with pytest.raises(ConfigError, match="events exists"):
        export(run_dir, "tensorboard", out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["events", "mine"]


def test_mlflow_reads_what_was_exported(run_dir, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("alembic")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (line,) = export(run_dir, "mlflow", tmp_path / "out")
    address = f"sqlite:///{tmp_path}/out/mlflow.db"
    assert line == f"mine: 6 values, {address}"
    client = mlflow.MlflowClient(tracking_uri=address)
    experiment = client.get_experiment_by_name("scalefold")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.data.params["config_name"] == "tiny"
    assert [(m.step, m.value) for m in client.get_metric_history(found.info.run_id, "terms/fape")] == [
        (1, 0.5),
        (2, 1.0),
    ]


def test_wandb_keeps_what_was_exported_offline(run_dir, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    (line,) = export(run_dir, "wandb", tmp_path / "out")
    assert line.startswith("mine: 6 values, ")
    (file,) = (tmp_path / "out").rglob("*.wandb")
    assert b"eval/lddt_ca" in file.read_bytes()


class Wandb:
    """What of the package is used, recorded."""

    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.started: dict[str, Any] = {}
        self.url, self.dir, self.is_finished = None, "here", False

    def init(self, **arguments: Any) -> "Wandb":
        self.started = arguments
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.is_finished = True


def test_wandb_gets_every_step_once_and_in_order(run_dir, tmp_path, monkeypatch):
    fake = Wandb()
    module = types.ModuleType("wandb")
    module.init = fake.init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    assert export(run_dir, "wandb", tmp_path / "out") == ["mine: 6 values, here"]
    assert [step for step, _ in fake.logged] == [1, 2]
    assert fake.started["name"] == "mine"
    assert fake.started["config"]["config_name"] == "tiny"
    assert fake.is_finished


@pytest.mark.parametrize("tool", ["tensorboard", "wandb", "mlflow"])
def test_a_tool_that_is_not_installed_is_named_with_its_extra(run_dir, tmp_path, monkeypatch, tool):
    def without(name: str, *rest: Any) -> Any:
        if name.split(".")[0] == tool:
            raise ModuleNotFoundError(f"No module named '{tool}'")
        return imported(name, *rest)

    imported = builtins.__import__
    for name in [name for name in sys.modules if name.split(".")[0] == tool]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("importlib.import_module", without)
    with pytest.raises(ConfigError, match=rf"--to {tool}: No module named '{tool}'; install it with .*\[{tool}\]"):
        export(run_dir, tool, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unknown_tool_is_an_error_that_names_the_known_ones(run_dir, tmp_path):
    with pytest.raises(ConfigError, match="must be one of tensorboard, wandb, mlflow"):
        export(run_dir, "excel", tmp_path)


def test_training_imports_none_of_the_tools(repository):
    users = [file.name for file in (repository / "src").rglob("*.py") if '"wandb"' in file.read_text()]
    assert users == ["export.py"]
