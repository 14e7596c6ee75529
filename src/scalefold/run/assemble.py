"""Assembles a run from its configuration, downwards: each part is made once, of those before it, for the loop."""

import logging
from dataclasses import dataclass
from pathlib import Path

from scalefold.config import Config
from scalefold.data.configured import feature_settings
from scalefold.data.features.features import FeatureSettings
from scalefold.data.loading.sampler import initialisation_seed
from scalefold.errors import LogError
from scalefold.eval.elsewhere import EvaluationElsewhere
from scalefold.eval.evaluator import Evaluator
from scalefold.eval.here import EvaluationHere
from scalefold.eval.score import ChainScorer
from scalefold.kernels.table import REFERENCE
from scalefold.mlperf.log.events import Events, merge_left_parts
from scalefold.parallel.dap.points import check_shares
from scalefold.parallel.ending import Ending
from scalefold.parallel.ranks import Ranks
from scalefold.phases import Schedule, any_phase
from scalefold.report.console import Progress
from scalefold.report.record import Record
from scalefold.run.batches import Batches
from scalefold.run.begin import Beginning, begin, continue_counting, make_progress
from scalefold.run.header import log_header, run_header, write_resolved
from scalefold.run.resume import CONFIG_FILE, RunOptions, Start, load_state
from scalefold.run.stops import Stops
from scalefold.step.build import Training, adds_gradients, build_training, choose_operations, parameter_names
from scalefold.step.saves import Saves

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """What the training loop speaks to on one training rank."""

    schedule: Schedule
    ranks: Ranks
    start: Start
    training: Training
    batches: Batches
    evaluator: Evaluator
    saves: Saves
    stops: Stops
    events: Events
    record: Record
    progress: Progress

    @property
    def config(self) -> Config:
        """The configuration of the present phase."""
        return self.schedule.config


def assemble(schedule: Schedule, options: RunOptions, ranks: Ranks, ending: Ending) -> Run:
    """Build a training rank's run, up to the moment before warm-up; ``ending`` lets go of it.

    Raises:
        ConfigError, CheckpointError: the configuration, the launcher or a checkpoint do not fit.
    """
    check_shares(schedule.config.model, schedule.config.parallel.dap_size)
    beginning = begin(schedule, options, ranks, ending)
    config, start, events = schedule.config, beginning.start, beginning.events
    ops, in_parts = choose_operations(config, ranks), any_phase(schedule.base, adds_gradients)
    training = build_training(config, ranks, ops, initialisation_seed(start.seed), in_parts)
    ending.add("memory that GPUs share", training.disconnect, after_errors=False)
    names = parameter_names(training.model)
    digest = load_state(config, start, training.optimizer, names, ranks)
    log_header(events, config, ranks, start.seed, training.model, digest)
    continue_counting(events, schedule)
    record = open_record(schedule, ranks, beginning, training)
    ending.add("the record", record.close)
    progress = open_screen(config, ranks, beginning, training)
    ending.add("the screen", progress.close)
    saves = Saves(beginning.checkpoints, training.optimizer, names, ranks, start.seed, record.event)
    ending.add("the checkpoint under way", beginning.checkpoints.close)
    ending.add("captured steps", lambda: training.step.close(), after_errors=False)
    settings = feature_settings(config)
    evaluator = make_evaluator(schedule, ranks, settings, training, events, record, progress)
    ending.add("captured evaluations", evaluator.release_device, after_errors=False)
    ending.add("evaluation workers", evaluator.close)
    batches = Batches(
        schedule, ranks, start.seed, settings, start.left_over, lambda: record.start_part("first_copy_launched")
    )
    ending.add("page-locked batches", lambda: batches.loader.release_memory(), after_errors=False)
    ending.add("loader workers", lambda: batches.loader.close())
    stops = Stops(schedule, ranks, evaluator)
    stops.catch_signals()
    return Run(schedule, ranks, start, training, batches, evaluator, saves, stops, events, record, progress)


def open_record(schedule: Schedule, ranks: Ranks, beginning: Beginning, training: Training) -> Record:
    """The run's own record; rank 0 also clears away what the part of the run before has left behind."""
    config, start, checkpoints = schedule.config, beginning.start, beginning.checkpoints
    run_dir = config.run.run_dir
    record = Record(run_dir, ranks.is_root, start.state.iteration if start.state else None)
    if ranks.is_root:
        checkpoints.set_aside(start.first_step - 1)
        join_left_parts(run_dir, start)
        run_dir.mkdir(parents=True, exist_ok=True)
        write_resolved(run_dir / CONFIG_FILE, schedule.base)
        record.run(**run_header(config, ranks, start.seed, training))
        if config.run.checkpoint_every_iters:
            optimizer = training.optimizer
            checkpoints.prepare(optimizer.flat, optimizer, parameter_names(training.model))
    record.event("placement", **beginning.placement.facts())
    return record


def join_left_parts(run_dir: Path, start: Start) -> None:
    """On a resume: the logs of a run with evaluation ranks that ended before they were joined."""
    try:
        for joined in merge_left_parts(run_dir, besides=start.result_file) if start.folder else []:
            log.warning("%s: joined from the parts that the run before left", joined)
    except LogError as error:  # a damaged log of the past does not keep a run from going on
        log.warning("%s", error)


def open_screen(config: Config, ranks: Ranks, beginning: Beginning, training: Training) -> Progress:
    """The screen, with where ranks are and what computes."""
    progress, plain = make_progress(config, ranks), training.optimizer.ops is REFERENCE
    progress.note(beginning.placement.text)
    progress.note(f"operations: {'plain PyTorch' if plain else 'Triton kernels'} on {ranks.device.type}")
    return progress


def make_evaluator(
    schedule: Schedule,
    ranks: Ranks,
    settings: FeatureSettings,
    training: Training,
    events: Events,
    record: Record,
    progress: Progress,
) -> Evaluator:
    """The evaluator of a training rank."""
    config, optimizer = schedule.config, training.optimizer
    if ranks.layout.num_eval_ranks:
        return EvaluationElsewhere(config, ranks, optimizer, record, progress, schedule)
    group = ranks.train_group if ranks.layout.world_size > 1 else None
    scorer = ChainScorer(config, ranks, settings, optimizer.ops, group)
    return EvaluationHere(config, scorer, optimizer, events, record, progress, schedule)


def enter_next_phase(run: Run, step: int) -> bool:
    """Continue with the next phase after ``step``; False, and a checkpoint, if that needs other ranks."""
    stays, before = run.schedule.continues_here(), run.config
    run.schedule.advance(step)
    run.progress.note(f"phase {run.schedule.name} after step {step}, {run.schedule.samples(step)} samples")
    run.record.event("phase", step=step, phase=run.schedule.name, samples=run.schedule.samples(step))
    if not stays:
        save(run, step)
        return False
    ops = choose_operations(run.config, run.ranks)
    run.evaluator.use(ops)
    run.training.change(before, run.config, run.ranks, ops)
    continue_counting(run.events, run.schedule)
    run.batches.change(step)
    return True


def save(run: Run, step: int) -> None:
    """Begin to write a checkpoint after ``step`` iterations; every training rank calls this."""
    run.saves.save(step, run.schedule.position, run.batches.left_over_after(step))
