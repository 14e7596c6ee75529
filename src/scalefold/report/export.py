"""Runs in the form of other tools: TensorBoard, Weights & Biases, MLflow.

Only files are read, those that a run leaves; training knows nothing of these tools. Each is an optional extra of the
package: ``pip install 'scalefold[tensorboard]'``, ``[wandb]``, ``[mlflow]``.
"""

import importlib
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scalefold.errors import ConfigError
from scalefold.report.logs import Run, read_runs

_STEP_COLUMNS = ("loss", "lr", "grad_norm", "step_ms", "data_ms", "peak_gib", "samples")
_MLFLOW_BATCH = 1000
_MLFLOW_TEXT = 500


@dataclass(frozen=True)
class Point:
    """Values by name at one step; ``time_s`` since ``run_start``, NaN where unknown."""

    step: int
    time_s: float
    values: dict[str, float]


def export(path: Path, target: str, out: Path) -> list[str]:
    """Hand the runs at ``path`` to a tool; what it writes to files lies in ``out``. Returns a line per run.

    Raises:
        ConfigError: an unknown tool, one that is not installed, or an existing folder ``out`` for TensorBoard.
        LogError: no run at the path.
    """
    if target not in TARGETS:
        raise ConfigError(f"--to {target}: must be one of {', '.join(TARGETS)}")
    runs = read_runs(path)
    return TARGETS[target](runs, out)


def points(run: Run) -> Iterator[Point]:
    """Everything numeric that a run recorded, by step: its metrics file, and its log where that says more."""
    found: dict[int, Point] = {}
    for point in (*_step_points(run), *_evaluation_points(run), *_log_points(run)):
        known = found.get(point.step)
        values = {k: v for k, v in point.values.items() if math.isfinite(v)}
        if known is None:
            found[point.step] = Point(point.step, point.time_s, values)
        else:
            known.values.update(values)
    yield from (found[step] for step in sorted(found) if found[step].values)


def _step_points(run: Run) -> Iterator[Point]:
    metrics = run.metrics
    if metrics is None:
        return
    columns = {f"train/{name}": getattr(metrics, name) for name in _STEP_COLUMNS}
    columns |= {f"terms/{name}": values for name, values in metrics.terms.items()}
    columns |= {f"phases_ms/{name}": values for name, values in metrics.phases_ms.items()}
    for row, step in enumerate(metrics.step):
        yield Point(int(step), float(metrics.time_s[row]), {k: float(v[row]) for k, v in columns.items()})


def _evaluation_points(run: Run) -> Iterator[Point]:
    metrics = run.metrics
    if metrics is None:
        return
    for row, step in enumerate(metrics.eval_step):
        values = {"eval/lddt_ca": metrics.eval_lddt_ca[row], "eval/seconds": metrics.eval_seconds[row]}
        yield Point(int(step), float(metrics.eval_time_s[row]), {k: float(v) for k, v in values.items()})


def _log_points(run: Run) -> Iterator[Point]:
    """Evaluations and throughput of the MLPerf log; its samples over the batch are steps."""
    batch, every = run.facts.get("global_batch_size"), run.facts.get("val_every_iters", 40)
    if run.log is None or not isinstance(batch, int) or batch < 1:
        return
    for evaluation in run.log.evaluations:
        if evaluation.lddt_ca is not None:
            time_s = math.nan if evaluation.result_s is None else evaluation.result_s
            yield Point(evaluation.samples // batch, time_s, {"eval/lddt_ca": evaluation.lddt_ca})
    for name, rows in (("throughput", run.log.throughput), ("batch_wait_s", run.log.batch_wait_s)):
        for cycle, value in rows:
            yield Point(cycle * every, math.nan, {f"log/{name}": value})


def _wall_s(run: Run, point: Point) -> float:
    """Seconds since 1970 of a point, as far as the log tells when the clock started."""
    start_s = run.log.run_start_ms / 1000 if run.log is not None else 0.0
    return start_s + (0.0 if math.isnan(point.time_s) else point.time_s)


def _facts(run: Run) -> dict[str, str]:
    return {str(key): str(value) for key, value in run.facts.items()}


def _module(name: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"--to {extra}: {error}; install it with pip install 'scalefold[{extra}]'") from None


# Tools -----------------------------------------------------------------------------------------------------------


def _to_tensorboard(runs: list[Run], out: Path) -> list[str]:
    """Event files in ``out/<run>``; the folder appears complete or not at all."""
    writers = _module("tensorboard.summary.writer.event_file_writer", "tensorboard")
    events = _module("tensorboard.compat.proto.event_pb2", "tensorboard")
    summaries = _module("tensorboard.compat.proto.summary_pb2", "tensorboard")
    if out.exists():
        raise ConfigError(f"{out} exists: TensorBoard would show two exports as one; remove it or choose another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        lines = []
        for name, run in _named(runs).items():
            writer = writers.EventFileWriter(str(temporary / name))
            count = 0
            for point in points(run):
                values = [summaries.Summary.Value(tag=k, simple_value=v) for k, v in point.values.items()]
                summary = summaries.Summary(value=values)
                writer.add_event(events.Event(wall_time=_wall_s(run, point), step=point.step, summary=summary))
                count += len(values)
            writer.close()
            lines.append(f"{out / name}: {count} values")
        temporary.chmod(0o755)
        temporary.replace(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return lines


def _to_wandb(runs: list[Run], out: Path) -> list[str]:
    """One run each in the project ``scalefold``; WANDB_MODE=offline keeps it in files below ``out``."""
    wandb = _module("wandb", "wandb")
    out.mkdir(parents=True, exist_ok=True)
    lines = []
    for name, run in _named(runs).items():
        target = wandb.init(project="scalefold", name=name, config=_facts(run), dir=str(out), reinit=True)
        count = 0
        for point in points(run):
            target.log(dict(point.values), step=point.step)
            count += len(point.values)
        lines.append(f"{name}: {count} values, {target.url or target.dir}")
        target.finish()
    return lines


def _to_mlflow(runs: list[Run], out: Path) -> list[str]:
    """One run each in the experiment ``scalefold``, in ``out`` unless MLFLOW_TRACKING_URI names a server."""
    mlflow, entities = _module("mlflow", "mlflow"), _module("mlflow.entities", "mlflow")
    address = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{out.resolve()}/mlflow.db"
    out.mkdir(parents=True, exist_ok=True)
    client = mlflow.MlflowClient(tracking_uri=address)
    known = client.get_experiment_by_name("scalefold")
    experiment = known.experiment_id if known else client.create_experiment("scalefold")
    lines = []
    for name, run in _named(runs).items():
        target = client.create_run(experiment, run_name=name).info.run_id
        values = [
            entities.Metric(key, value, int(1000 * _wall_s(run, point)), point.step)
            for point in points(run)
            for key, value in point.values.items()
        ]
        for first in range(0, len(values), _MLFLOW_BATCH):
            client.log_batch(target, metrics=values[first : first + _MLFLOW_BATCH])
        params = [entities.Param(key, value[:_MLFLOW_TEXT]) for key, value in _facts(run).items()]
        for first in range(0, len(params), 100):
            client.log_batch(target, params=params[first : first + 100])
        client.set_terminated(target)
        lines.append(f"{name}: {len(values)} values, {address}")
    return lines


def _named(runs: list[Run]) -> dict[str, Run]:
    """Runs by name, numbered where names are equal."""
    names = [run.name for run in runs]
    numbered = [name if names.count(name) == 1 else f"{name}_{i}" for i, name in enumerate(names)]
    return dict(zip(numbered, runs, strict=True))


TARGETS: dict[str, Callable[[list[Run], Path], list[str]]] = {
    "tensorboard": _to_tensorboard,
    "wandb": _to_wandb,
    "mlflow": _to_mlflow,
}
