"""The MLPerf log of a run: one method per fact, called by the part of the program that owns the fact.

Who writes. Every rank may call every method. A :class:`Events` object writes only what its ``role`` owns:

==============  ====================================================================================
``single``      everything: rank 0 of a run whose training ranks also evaluate
``training``    everything except evaluations and the successful ``run_stop`` (asynchronous evaluation)
``evaluation``  evaluations, and ``run_stop`` with status ``success``: the evaluation root sees the target first
``silent``      nothing, and checks nothing: all other ranks
==============  ====================================================================================

Two writers never share a file: appending from two nodes is not atomic on NFS and may lose lines there. The
``training`` and ``evaluation`` roles write ``result_N.txt.training.part`` and ``result_N.txt.evaluation.part``, and
:func:`merge_parts` joins them in time order into ``result_N.txt`` when the run is over (also after a crash, and again
at any time: the parts stay).

Steps and samples. Callers count iterations (``step``); the log's ``epoch_num`` is the number of training samples seen,
``step * global_batch_size``, and only this package says so.

Longer than 400 lines, because it has one short method per fact of the log, in the order of a run.
"""

import contextlib
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from mlperf_logging.mllog import mllog

from scalefold.errors import LogError
from scalefold.mlperf.log.keys import BENCHMARK, REHEARSAL, SEARCHED_SUBSTRINGS, TOKEN
from scalefold.textfile import sync, write_line

Role = Literal["single", "training", "evaluation", "silent"]
Status = Literal["success", "aborted"]

_EVALUATION_KEYS = frozenset({"eval_start", "eval_accuracy", "eval_stop"})
_SOURCE_ROOT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True, kw_only=True)
class SubmissionInfo:
    """Who submits, on what, in which division and availability category (MLPerf submission rules)."""

    org: str
    platform: str
    division: str = "closed"
    status: str = "onprem"


@dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    """All logged settings of a run, by log key, with the values that are really used."""

    global_batch_size: int
    gradient_accumulation_steps: int
    target_avg_lddt_ca_value: float
    train_max_pdb_release_date: str
    val_min_cameo_submission_date: str
    val_max_cameo_submission_date: str
    val_max_sequence_length: int
    val_every_iters: int
    precision: str
    model_parameters_count: int
    train_sequence_crop_size: int
    num_recycling_iters: int
    max_msa_clusters: int
    max_extra_msa: int
    templates_enabled: bool
    max_templates: int
    fape_loss_weight: float
    fape_loss_backbone_weight: float
    fape_loss_sidechain_weight: float
    supervised_chi_loss_weight: float
    distogram_loss_weight: float
    masked_msa_loss_weight: float
    plddt_loss_weight: float
    opt_name: str
    opt_adam_beta_1: float
    opt_adam_beta_2: float
    opt_adam_epsilon: float
    opt_weight_decay: float
    opt_amsgrad: bool
    opt_gradient_clipping: bool
    opt_gradient_clip_norm: float
    opt_base_learning_rate: float
    opt_learning_rate_warmup_init: float
    opt_learning_rate_warmup_steps: int
    swa_enabled: bool
    swa_decay_rate: float


def steady_clock_ms() -> Callable[[], int]:
    """A clock of milliseconds since the epoch, as MLPerf log lines carry them.

    It is set once and then runs evenly: a system clock that is corrected under a run changes no duration.
    """
    offset_ns = time.time_ns() - time.monotonic_ns()
    return lambda: (offset_ns + time.monotonic_ns()) // 1_000_000


class _LineHandler(logging.Handler):
    """Writes each log line with one system call, so that a crash never leaves half a buffer behind."""

    def __init__(self, file: Path, file_descriptor: int, echo: bool) -> None:
        super().__init__()
        self._file = file
        self.descriptor = file_descriptor
        self._echo = echo
        self._cause: Exception | None = None

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage()
        if record.levelno > logging.INFO:
            raise LogError(f"{self._file}: cannot log an MLPerf event: {self._cause or line.strip()}") from self._cause
        try:
            write_line(self.descriptor, line)
        except OSError as error:
            self._cause = error
            raise
        if self._echo:
            print(line, file=sys.stdout, flush=True)


class Events:
    """Writer of one run's MLPerf log.

    Args:
        result_file: the run's ``result_N.txt``; roles ``training`` and ``evaluation`` write a part beside it.
        role: what this process owns, see the module's text.
        instance: index of the instance in a throughput (weak scaling) job, 0 for a time-to-solution run.
        echo: also print each line to standard output.
        now_ms: clock, the system's by default; every line carries its reading, or the ``time_ms`` given to the call.

    Every method raises :class:`LogError` when called out of the order that accepted logs have.
    """

    def __init__(
        self,
        result_file: str | Path,
        *,
        role: Role = "single",
        instance: int = 0,
        echo: bool = False,
        now_ms: Callable[[], int] | None = None,
    ) -> None:
        self.role: Role = role
        self.file = _part_file(Path(result_file), role)
        self._instance = instance
        self._now_ms = now_ms or steady_clock_ms()
        self._logged: set[str] = set()
        self._samples_per_step: int | None = None
        self._before = (0, 0)
        self._steps_per_cycle = 1
        self._target = float("inf")
        self._open_epoch: int | None = None
        self._open_eval: int | None = None
        self._last_accuracy: float | None = None
        self.descriptor: int | None = None
        if role != "silent":
            self.descriptor = _open_new(self.file)
            self._mllog = mllog.MLLogger(
                _logger(self.file, self.descriptor, echo), root_dir=re.escape(str(_SOURCE_ROOT))
            )

    @classmethod
    def silent(cls) -> "Events":
        """The object for ranks that write nothing: every method returns at once."""
        return cls(os.devnull, role="silent")

    def close(self) -> None:
        """Flush the file to storage and close it; may be called twice."""
        if self.descriptor is not None:
            sync(self.descriptor)
            os.close(self.descriptor)
            self.descriptor = None

    def __enter__(self) -> "Events":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Initialization, off the clock ------------------------------------------------------------------------------

    def init_start(self) -> None:
        """First line of the log: logged after process start, before the model is built."""
        self._log("INTERVAL_START", "init_start", None)

    def rehearsal(self, faults: str) -> None:
        """Faults are injected: whatever this run shows, it is no result, and no package takes its log."""
        metadata = {"step": 0, "instance": self._instance}
        self._log("POINT_IN_TIME", "tracked_stats", {REHEARSAL: faults}, metadata)

    def cache_clear(self, cleared: bool) -> None:
        """Whether the operating system's caches were dropped before this run (rules: Data State)."""
        self._log("POINT_IN_TIME", "cache_clear", cleared)

    def submission(self, info: SubmissionInfo) -> None:
        """Benchmark, organization, platform, division and status."""
        self._log("POINT_IN_TIME", "submission_benchmark", BENCHMARK)
        self._log("POINT_IN_TIME", "submission_org", info.org)
        self._log("POINT_IN_TIME", "submission_platform", info.platform)
        self._log("POINT_IN_TIME", "submission_division", info.division)
        self._log("POINT_IN_TIME", "submission_status", info.status)

    def seed(self, value: int) -> None:
        """The run's seed, taken from a clock or the system's entropy."""
        self._log("POINT_IN_TIME", "seed", value)

    def scale(self, *, number_of_ranks: int, number_of_nodes: int, accelerators_per_node: int) -> None:
        """Size of this run or instance, evaluation ranks and nodes included."""
        self._log("POINT_IN_TIME", "number_of_ranks", number_of_ranks)
        self._log("POINT_IN_TIME", "number_of_nodes", number_of_nodes)
        self._log("POINT_IN_TIME", "accelerators_per_node", accelerators_per_node)

    def hyperparameters(self, values: Hyperparameters) -> None:
        """Every setting that the closed division fixes or lets vary."""
        for key, value in asdict(values).items():
            self._log("POINT_IN_TIME", key, value)
        self._samples_per_step = values.global_batch_size
        self._steps_per_cycle = values.val_every_iters
        self._target = values.target_avg_lddt_ca_value

    def checkpoint(self, sha256: str | None) -> None:
        """SHA-256 of the loaded initial checkpoint's bytes; None, logged as "none", when weights are random."""
        self._log("POINT_IN_TIME", "init_checkpoint_sha256sum", sha256 or "none")

    def staging(self) -> None:
        """An empty staging interval: data is read where it lies (staging is off the clock since HPC v3.0)."""
        start_ms = self._now_ms()
        self._log("POINT_IN_TIME", "staging_start", None, time_ms=start_ms)
        stop_ms = self._now_ms()
        seconds = (stop_ms - start_ms) / 1000
        metadata = {"staging_duration": seconds, "instance": self._instance}
        self._log("POINT_IN_TIME", "staging_stop", None, metadata, time_ms=stop_ms)
        metadata = {"step": 0, "instance": self._instance}
        self._log("POINT_IN_TIME", "tracked_stats", {"staging_duration": seconds}, metadata)

    def init_stop(self) -> None:
        """End of initialization: models built, kernels compiled, graphs captured; after a barrier."""
        self._log("INTERVAL_END", "init_stop", None)

    # The timed run -----------------------------------------------------------------------------------------------

    def run_start(self) -> None:
        """The clock starts: called between two barriers of all ranks; no data file was opened before."""
        self._log("INTERVAL_START", "run_start", None)

    def train_samples(self, number: int) -> None:
        """Chains in the training set after its filters."""
        self._log("POINT_IN_TIME", "train_samples", number)

    def eval_samples(self, number: int) -> None:
        """Chains in the evaluation set."""
        self._log("POINT_IN_TIME", "eval_samples", number)

    def dataloader_type(self, name: str) -> None:
        """``InitialTrainingDataloaderPT`` (in order) or ``InitialTrainingDataloaderPQ`` (first ready first)."""
        self._log("POINT_IN_TIME", "initial_training_dataloader_type", name)

    def epoch_start(self, step: int) -> None:
        """A training cycle begins that will end after iteration ``step`` (40, 80, ...)."""
        if self._open_epoch is not None:
            self._refuse(f"epoch_start for step {step}: the cycle of step {self._open_epoch} has not stopped")
        self._log("INTERVAL_START", "epoch_start", None, self._at(step))
        self._open_epoch = step

    def epoch_stop(self, step: int) -> None:
        """The training cycle that ends after iteration ``step`` is complete."""
        if self._open_epoch != step:
            self._refuse(f"epoch_stop for step {step}: the cycle in progress is that of step {self._open_epoch}")
        self._log("INTERVAL_END", "epoch_stop", None, self._at(step))
        self._open_epoch = None

    def change_batch(self, step: int, samples: int, global_batch_size: int) -> None:
        """From here on iterations use ``global_batch_size``; the first ``step`` used ``samples`` (runs in phases)."""
        self._before, self._samples_per_step = (step, samples), global_batch_size

    def throughput(self, step: int, samples_per_second: float, next_batch_seconds: float) -> None:
        """Training speed of the cycle that ended after ``step``, and the mean wait for the next batch."""
        value = {"throughput": samples_per_second, "avg_perf_next_batch": next_batch_seconds}
        metadata = {"step": step // self._steps_per_cycle, "instance": self._instance}
        self._log("POINT_IN_TIME", "tracked_stats", value, metadata)

    def eval_start(self, step: int, *, time_ms: int | None = None) -> None:
        """Evaluation of the averaged weights of iteration ``step`` begins (0: the initial weights)."""
        if self._open_eval is not None:
            self._refuse(f"eval_start for step {step}: the evaluation of step {self._open_eval} has not stopped")
        self._log("INTERVAL_START", "eval_start", None, self._at(step), time_ms=time_ms)
        self._open_eval = step

    def eval_accuracy(self, step: int, value: float, *, time_ms: int | None = None) -> None:
        """Mean lDDT-Cα over the evaluation chains, between 0 and 1, of the weights of iteration ``step``."""
        self._need_open_eval("eval_accuracy", step)
        self._log("POINT_IN_TIME", "eval_accuracy", value, self._at(step), time_ms=time_ms)
        self._last_accuracy = value

    def eval_stop(self, step: int, *, time_ms: int | None = None) -> None:
        """Evaluation of iteration ``step`` is complete."""
        self._need_open_eval("eval_stop", step)
        self._log("INTERVAL_END", "eval_stop", None, self._at(step), time_ms=time_ms)
        self._open_eval = None

    def run_stop(self, status: Status, *, time_ms: int | None = None) -> None:
        """The clock stops: ``success`` when the target is met, ``aborted`` when the step budget ends or on error.

        With asynchronous evaluation call it on both roots with the same status; the evaluation root writes
        ``success``, the training root ``aborted``.
        """
        if status == "success" and self.role != "training":
            self._need_target_met()
        self._log("INTERVAL_END", "run_stop", None, {"status": status}, time_ms=time_ms)
        if self.descriptor is not None:
            sync(self.descriptor)

    def abort(self) -> None:
        """On the way out of an error: stop a running clock with status ``aborted``; never raises LogError itself.

        A log whose clock never ran holds no run: it is removed, so that the next start finds its name free.
        """
        if "run_start" in self._logged and "run_stop" not in self._logged:
            with contextlib.suppress(LogError):
                self._log("INTERVAL_END", "run_stop", None, {"status": "aborted"})
        elif "run_start" not in self._logged and self.role != "silent":
            self.file.unlink(missing_ok=True)

    # -------------------------------------------------------------------------------------------------------------

    def _at(self, step: int) -> dict[str, Any]:
        steps, samples = self._before
        return {"epoch_num": samples + (step - steps) * (self._samples_per_step or 0), "instance": self._instance}

    def _need_open_eval(self, key: str, step: int) -> None:
        if self._open_eval != step:
            self._refuse(f"{key} for step {step}: the evaluation in progress is that of step {self._open_eval}")

    def _need_target_met(self) -> None:
        if self._last_accuracy is None or not self._last_accuracy >= self._target:
            self._refuse(f"run_stop success: last lDDT-Cα is {self._last_accuracy}, the target {self._target}")

    def _refuse(self, reason: str) -> None:
        if self.role != "silent":
            raise LogError(f"{self.file}: {reason}")

    def _owns(self, key: str, metadata: dict[str, Any]) -> bool:
        if self.role in ("single", "silent"):
            return self.role == "single"
        is_evaluation = key in _EVALUATION_KEYS or metadata.get("status") == "success"
        return is_evaluation == (self.role == "evaluation")

    def _log(
        self,
        event_type: str,
        key: str,
        value: Any,
        metadata: dict[str, Any] | None = None,
        time_ms: int | None = None,
    ) -> None:
        """Check the order, then write the line with the file and line number of our public method's caller."""
        if self.role == "silent":
            return
        self._check_order(key)
        self._logged.add(key)
        if not self._owns(key, metadata or {}):
            return
        if self.descriptor is None:
            self._refuse(f"{key}: the log is closed")
        write = {
            "INTERVAL_START": self._mllog.start,
            "INTERVAL_END": self._mllog.end,
            "POINT_IN_TIME": self._mllog.event,
        }[event_type]
        _check_substrings(self.file, key, value, metadata)
        stamp = self._now_ms() if time_ms is None else time_ms
        write(key, value, metadata=metadata, time_ms=stamp, stack_offset=3)

    def _check_order(self, key: str) -> None:
        needed, closed_by = _order_of(key)
        if needed is not None and needed not in self._logged:
            self._refuse(f"{key} before {needed}")
        if closed_by in self._logged:
            self._refuse(f"{key} after {closed_by}")
        if key in self._logged and key not in _REPEATABLE:
            self._refuse(f"{key} a second time")
        if key in _CYCLE_KEYS and self._samples_per_step is None:
            self._refuse(f"{key} before hyperparameters")


_CYCLE_KEYS = _EVALUATION_KEYS | {"epoch_start", "epoch_stop"}
_REPEATABLE = _CYCLE_KEYS | {"tracked_stats"}
_RUN_KEYS = _CYCLE_KEYS | {"run_stop", "train_samples", "eval_samples", "initial_training_dataloader_type"}


def _order_of(key: str) -> tuple[str | None, str]:
    """The key that must precede ``key`` and the one that must not."""
    if key == "init_start":
        return None, "init_stop"
    if key == "run_start":
        return "init_stop", "run_stop"
    if key in _RUN_KEYS:
        return "run_start", "run_stop"
    return "init_start", "run_stop" if key == "tracked_stats" else "init_stop"


def _check_substrings(file: Path, key: str, value: Any, metadata: dict[str, Any] | None) -> None:
    text = json.dumps([value, metadata], default=str)
    for word in SEARCHED_SUBSTRINGS:
        if word in text:
            raise LogError(f'{file}: {key} must not hold the text "{word}": the RCP checker would take it for that key')


def _logger(file: Path, file_descriptor: int, echo: bool) -> logging.Logger:
    """A logger of its own, outside the logging hierarchy, so that two logs in one process stay apart."""
    logger = logging.Logger("scalefold.mlperf", logging.INFO)
    logger.addHandler(_LineHandler(file, file_descriptor, echo))
    return logger


def _part_file(result_file: Path, role: Role) -> Path:
    if role in ("training", "evaluation"):
        return result_file.with_name(f"{result_file.name}.{role}.part")
    return result_file


def _open_new(file: Path) -> int:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        return os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
    except FileExistsError:
        raise LogError(
            f"{file} exists: a run never adds to another run's log; move it or choose another name"
        ) from None
    except OSError as error:
        raise LogError(f"{file}: cannot create the log: {error.strerror}") from error


def merge_parts(result_file: str | Path) -> Path:
    """Join the parts of an asynchronous run into ``result_file``, in time order, unaltered line by line.

    Lines with equal stamps keep the order training, evaluation, so a cycle's ``epoch_stop`` precedes its evaluation.
    The run ends at the evaluation root's ``success``: an ``aborted`` that the training root stamps later, because its
    unfinished cycle failed while everything shut down, is left out.

    Raises:
        LogError: no part exists, a part has a broken line, or the parts disagree about how the run ended.
    """
    result_file = Path(result_file)
    parts = [part for role in ("training", "evaluation") if (part := _part_file(result_file, role)).exists()]
    if not parts:
        raise LogError(f"{result_file}: no {result_file.name}.training.part or .evaluation.part beside it")
    lines = [_PartLine.read(part, line) for part in parts for line in complete_lines(part)]
    if not lines:
        raise LogError(f"{result_file}: its parts hold no line yet: {', '.join(part.name for part in parts)}")
    lines.sort(key=lambda line: line.time_ms)
    stops = [line for line in lines if line.key == "run_stop"]
    if len(stops) > 1 and stops[0].status == "success":
        lines = [line for line in lines if line.key != "run_stop" or line is stops[0]]
    elif len(stops) > 1:
        raise LogError(f"{result_file}: the parts hold {len(stops)} run_stop lines, the first is {stops[0].status}")
    temporary = result_file.with_name(f".{result_file.name}.partial")
    temporary.write_text("".join(f"{line.text}\n" for line in lines), encoding="utf-8")
    temporary.replace(result_file)
    return result_file


def complete_lines(part: Path) -> list[str]:
    """The lines of a part without what a killed process or a crashed file system left behind the last of them."""
    text = part.read_text(encoding="utf-8", errors="replace")
    return [line for line in text[: text.rfind("\n") + 1].split("\n") if line.strip("\0")]


def merge_left_parts(run_dir: Path, besides: Path) -> list[Path]:
    """Join the parts of every log in a folder, ``besides`` the one being written, whose run ended before it could.

    A joined log stays as it is.

    Raises:
        LogError: see ``merge_parts``.
    """
    logs = {part.with_name(part.name.rsplit(".", 2)[0]) for part in run_dir.glob("result_*.*.part")}
    return [merge_parts(log) for log in sorted(logs) if log != besides and not log.exists()]


@dataclass(frozen=True, eq=False)
class _PartLine:
    time_ms: int
    key: str
    status: str | None
    text: str

    @classmethod
    def read(cls, part: Path, text: str) -> "_PartLine":
        try:
            event = json.loads(text.removeprefix(TOKEN))
            return cls(int(event["time_ms"]), str(event["key"]), event["metadata"].get("status"), text)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise LogError(f"{part}: not an MLPerf log line: {text[:80]!r}") from None
