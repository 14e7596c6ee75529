"""Rehearsal logs: what a full benchmark run logs, made by the real event writer with a fake clock.

They prove the log before a machine is available, rebuild any published run (:mod:`scalefold.mlperf.log.published`), and
are the material of the package rehearsal. They are never a result: nothing here trains.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from scalefold.mlperf.log.events import Events, Hyperparameters, Role, SubmissionInfo, merge_parts
from scalefold.mlperf.log.keys import CHECKPOINT_SHA256, EXPECTED
from scalefold.mlperf.log.published import PublishedRun


def benchmark_hyperparameters(
    *, global_batch_size: int, precision: str = "bf16", gradient_accumulation_steps: int = 1
) -> Hyperparameters:
    """The closed division's values, with the reference's learning rate (1e-3, no warm-up)."""
    fixed = {name: value for name, value in EXPECTED.items() if name in Hyperparameters.__dataclass_fields__}
    return Hyperparameters(
        **fixed,
        global_batch_size=global_batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        precision=precision,
        opt_base_learning_rate=1e-3,
        opt_learning_rate_warmup_init=1e-5,
        opt_learning_rate_warmup_steps=0,
    )


@dataclass(frozen=True, kw_only=True)
class Script:
    """What a rehearsed run logs and how long its phases last (seconds; stamps in ms since the epoch).

    ``evaluations`` are (cumulative samples, mean lDDT-Cα) in order; the last one meets the target. A leading 0 is the
    on-clock evaluation of the initial weights. Phases after the first ``epoch_start`` are stretched by one common
    factor so that the passing evaluation ends exactly at ``run_stop_ms``.
    """

    info: SubmissionInfo
    seed: int
    ranks: int
    nodes: int
    accelerators_per_node: int
    hyperparameters: Hyperparameters
    dataloader_type: str
    evaluations: tuple[tuple[int, float], ...]
    asynchronous: bool
    run_start_ms: int
    run_stop_ms: int
    init_s: float
    first_epoch_start_s: float
    first_cycle_s: float
    cycle_s: float
    first_gap_s: float
    gap_s: float
    first_eval_s: float
    eval_s: float
    batch_wait_s: float
    instance: int = 0


def published_script(run: PublishedRun, *, org: str | None = None, platform: str | None = None) -> Script:
    """The script of a published run; weak instances log their own node count (section 10.1 of the rules notes)."""
    return Script(
        info=SubmissionInfo(org=org or run.submitter, platform=platform or run.system),
        seed=run.seed,
        ranks=run.ranks,
        nodes=run.nodes,
        accelerators_per_node=run.accelerators_per_node,
        hyperparameters=benchmark_hyperparameters(
            global_batch_size=run.global_batch_size,
            precision=run.precision,
            gradient_accumulation_steps=run.gradient_accumulation_steps,
        ),
        dataloader_type=run.dataloader,
        evaluations=run.evaluations,
        asynchronous=run.asynchronous,
        run_start_ms=run.run_start_ms,
        run_stop_ms=run.run_stop_ms,
        init_s=run.init_s,
        first_epoch_start_s=run.first_epoch_start_s,
        first_cycle_s=run.first_cycle_s,
        cycle_s=run.cycle_s,
        first_gap_s=run.first_gap_s,
        gap_s=run.gap_s,
        first_eval_s=run.first_eval_s,
        eval_s=run.eval_s,
        batch_wait_s=run.batch_wait_s,
        instance=run.run if run.scaling == "weak" else 0,
    )


@dataclass
class FakeClock:
    """A clock that shows what it was set to."""

    ms: int = 0

    def __call__(self) -> int:
        return self.ms


@dataclass
class _Timeline:
    """Calls on the two roots' event writers, in seconds after ``run_start``."""

    calls: list[tuple[float, Role, Callable[[Events], None]]] = field(default_factory=list)

    def at(self, seconds: float, root: Role, call: Callable[[Events], None]) -> None:
        self.calls.append((seconds, root, call))


def write_rehearsal(script: Script, result_file: str | Path) -> Path:
    """Log ``script`` into ``result_file`` (which must not exist) and return its path.

    Asynchronous runs are written by two writers and merged, as in a real run; the parts are removed.
    """
    result_file = Path(result_file)
    clock = FakeClock()
    timeline, end_s = _play(script)
    stretch = _stretch(script, end_s)
    roles: list[Role] = ["training", "evaluation"] if script.asynchronous else ["single"]
    writers = {role: Events(result_file, role=role, instance=script.instance, now_ms=clock) for role in roles}
    for events in writers.values():
        _initialize(events, script, clock)
    for seconds, root, call in sorted(timeline.calls, key=lambda entry: entry[0]):
        clock.ms = script.run_start_ms + round(1000 * stretch(seconds))
        if clock.ms <= script.run_stop_ms:
            call(writers[root if script.asynchronous else "single"])
    for events in writers.values():
        events.close()
    if script.asynchronous:
        merge_parts(result_file)
        for events in writers.values():
            events.file.unlink()
    return result_file


def _stretch(script: Script, end_s: float) -> Callable[[float], float]:
    """Map scripted seconds to seconds that end at ``run_stop_ms``; the time before the first cycle is kept."""
    total_s = (script.run_stop_ms - script.run_start_ms) / 1000
    start_s = script.first_epoch_start_s
    factor = (total_s - start_s) / (end_s - start_s)
    return lambda seconds: seconds if seconds <= start_s else start_s + (seconds - start_s) * factor


def _initialize(events: Events, script: Script, clock: FakeClock) -> None:
    clock.ms = script.run_start_ms - round(1000 * script.init_s) - 10
    events.init_start()
    events.cache_clear(True)
    events.submission(script.info)
    events.seed(script.seed)
    events.scale(
        number_of_ranks=script.ranks,
        number_of_nodes=script.nodes,
        accelerators_per_node=script.accelerators_per_node,
    )
    events.hyperparameters(script.hyperparameters)
    events.checkpoint(CHECKPOINT_SHA256)
    clock.ms = script.run_start_ms - 10
    events.staging()
    events.init_stop()
    clock.ms = script.run_start_ms
    events.run_start()


def _play(script: Script) -> tuple[_Timeline, float]:
    """All calls of the timed run, and the second at which the passing evaluation ends."""
    timeline = _Timeline()
    script_start_s = script.first_epoch_start_s
    timeline.at(script_start_s * 0.5, "training", lambda e: e.train_samples(EXPECTED["train_samples"]))
    timeline.at(script_start_s * 0.6, "training", lambda e: e.eval_samples(EXPECTED["eval_samples"]))
    timeline.at(script_start_s * 0.9, "training", lambda e: e.dataloader_type(script.dataloader_type))
    stops_s = _play_training(script, timeline)
    return timeline, _play_evaluation(script, timeline, stops_s)


def _steps(script: Script) -> list[tuple[int, float]]:
    batch = script.hyperparameters.global_batch_size
    return [(samples // batch, value) for samples, value in script.evaluations]


def _play_training(script: Script, timeline: _Timeline) -> dict[int, float]:
    """Training cycles; returns the second at which each step's cycle stops."""
    every = script.hyperparameters.val_every_iters
    last = _steps(script)[-1][0] + (every if script.asynchronous else 0)
    stops_s: dict[int, float] = {}
    now_s = script.first_epoch_start_s
    for step in range(every, last + 1, every):
        cycle_s = script.first_cycle_s if step == every else script.cycle_s
        samples_per_second = script.hyperparameters.global_batch_size * every / cycle_s
        timeline.at(now_s, "training", lambda e, step=step: e.epoch_start(step))
        now_s += cycle_s
        stops_s[step] = now_s
        timeline.at(now_s, "training", lambda e, step=step: e.epoch_stop(step))
        timeline.at(now_s, "training", lambda e, s=step, v=samples_per_second: e.throughput(s, v, script.batch_wait_s))
        now_s += script.first_gap_s if step == every else script.gap_s
    return stops_s


def _play_evaluation(script: Script, timeline: _Timeline, stops_s: dict[int, float]) -> float:
    """Evaluations, each after its cycle and after the previous evaluation; returns the end of the last one."""
    free_s = 0.0
    for index, (step, value) in enumerate(_steps(script)):
        start_s = max(free_s, stops_s.get(step, script.first_epoch_start_s * 0.4))
        end_s = start_s + (script.first_eval_s if index == 0 else script.eval_s)
        timeline.at(start_s, "evaluation", lambda e, step=step: e.eval_start(step))
        timeline.at(end_s, "evaluation", lambda e, step=step, value=value: e.eval_accuracy(step, value))
        timeline.at(end_s, "evaluation", lambda e, step=step: e.eval_stop(step))
        free_s = end_s
    timeline.at(free_s, "evaluation", lambda e: e.run_stop("success"))
    return free_s
