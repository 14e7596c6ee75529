"""What every rank does first: its place in the schedule, process settings, seed and log."""

import os
import resource
import shutil
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from scalefold.config import Config
from scalefold.data.configured import feature_settings
from scalefold.data.features.features import BatchShape, buffer_bytes
from scalefold.errors import CheckpointError, ConfigError
from scalefold.launch.placement import Placement, check_placement, find_seat
from scalefold.mlperf.log.events import Events
from scalefold.parallel.ending import Ending, LastWords, forget_last_words
from scalefold.parallel.ranks import Ranks
from scalefold.phases import Position, Schedule
from scalefold.report.console import Progress
from scalefold.run.resume import RunOptions, Start, agree_on_start, check_phase
from scalefold.step.checkpoint import Checkpoints, read_state
from scalefold.step.checkpoint_writer import CheckpointWriter
from scalefold.telemetry.gpu import is_readable
from scalefold.telemetry.nodes import NodeLog


def check_places(config: Config) -> None:
    """See that store and initial checkpoint are there, before ranks meet, devices are touched and a log begins.

    Nothing is opened: the data set stays closed until ``run_start``.

    Raises:
        ConfigError: naming the key.
    """
    store, checkpoint = config.data.store_dir, config.training.init_checkpoint
    if not store.is_dir():
        raise ConfigError(f"data.store_dir: {store}: no such folder; `scalefold prepare` writes it")
    if checkpoint is not None and not checkpoint.is_file():
        raise ConfigError(f"training.init_checkpoint: {checkpoint}: no such file; `scalefold download` fetches it")


SHARED_MEMORY = Path("/dev/shm")


def check_means(config: Config) -> None:
    """See that this process has the open files, shared memory and kernel cache that it will need.

    Short of them a run fails later, somewhere else, with words that name another culprit.

    Raises:
        ConfigError: naming what is short and what to raise.
    """
    check_open_files(config)
    check_shared_memory(config)
    if config.execution.kernels != "reference" and config.execution.device != "cpu" and torch.cuda.is_available():
        check_kernel_cache(Path(os.environ.get("TRITON_CACHE_DIR", "~/.triton/cache")).expanduser())


def check_open_files(config: Config) -> None:
    """Raise this process's limit as far as it may, and see that it is enough for workers, batches and connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard and hard != resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    d, world_size = config.data, config.parallel.world_size
    workers = d.num_workers * (12 + d.prefetch_factor) + d.num_eval_workers * 14
    needed = 64 + workers + (4 * world_size if world_size > 1 else 0)
    if soft != resource.RLIM_INFINITY and soft < needed:
        raise ConfigError(
            f"open files: this process may have {soft} (ulimit -n) and needs about {needed} for {d.num_workers} loader "
            f"workers and {world_size} ranks; raise the limit, or lower data.num_workers"
        )


def check_shared_memory(config: Config) -> None:
    """One batch of every loader worker must fit, which is the least that a run passes through it."""
    d = config.data
    if not d.num_workers or not SHARED_MEMORY.is_dir():
        return
    settings = feature_settings(config)
    shape = BatchShape.of(settings, config.local_batch_size, settings.num_slices, training=True)
    needed, free = d.num_workers * buffer_bytes(shape), shutil.disk_usage(SHARED_MEMORY).free
    if free < needed:
        raise ConfigError(
            f"{SHARED_MEMORY}: {free / 2**20:.2f} MiB free, but {d.num_workers} loader workers pass batches of "
            f"{needed / d.num_workers / 2**20:.2f} MiB each through it; enlarge it (containers: --shm-size) or lower "
            "data.num_workers"
        )


def check_kernel_cache(folder: Path) -> None:
    """Triton writes what it compiles there, and cannot run without."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ConfigError(
            f"TRITON_CACHE_DIR: {folder}: cannot be written ({error.strerror}); set it to a node-local folder of yours"
        ) from None


@dataclass(frozen=True)
class Beginning:
    """What every rank of a run does first: where it starts, and the log of this rank."""

    start: Start
    events: Events
    checkpoints: CheckpointWriter
    placement: Placement


def begin(schedule: Schedule, options: RunOptions, ranks: Ranks, ending: Ending) -> Beginning:
    """Look where ranks are, agree on the start and move the schedule there; logs ``init_start`` after a barrier.

    Raises:
        CheckpointError, ConfigError, LogError: see ``check_placement`` and ``agree_on_start``.
    """
    r, p = schedule.base.run, schedule.config.parallel
    placement = check_placement(ranks, p.world_size // p.nodes)
    checkpoints = CheckpointWriter(r.run_dir / "checkpoints", r.keep_checkpoints, r.archive_every_iters)
    start = agree_on_start(schedule, options, ranks, checkpoints)
    ranks.barrier()
    events = open_events(start.result_file, ranks, options)
    ending.add("the log", events.close)
    ranks.watch.before_exit = events.abort
    ending.last_words = ranks.watch.last_words = LastWords(r.run_dir, ranks)
    if ranks.is_root:
        forget_last_words(r.run_dir)
    events.init_start()
    if options.inject:
        events.rehearsal(", ".join(map(str, options.inject)))
    return Beginning(start, events, checkpoints, placement)


def continue_counting(events: Events, schedule: Schedule) -> None:
    """Let the log count samples across phases and changes of the batch."""
    position = schedule.position
    if position != Position():
        events.change_batch(position.steps_before, position.samples_before, schedule.config.training.global_batch_size)


def make_progress(config: Config, ranks: Ranks) -> Progress:
    """The screen of rank 0; every other rank prints to nowhere."""
    stream = None if ranks.is_root else open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    return Progress(config.training.target_avg_lddt_ca_value, config.training.num_train_iters, stream)


def open_node_log(
    config: Config, ranks: Ranks, result_file: Path, note: Callable[[str], None]
) -> AbstractContextManager[NodeLog | None]:
    """What this rank says of each cycle beside the run, for ``report`` and ``status``; None if it is switched off."""
    if not config.run.telemetry:
        return nullcontext()
    seat, role = find_seat(ranks), "train" if ranks.trains else "evaluate"
    if seat.gpu and not is_readable():
        note("telemetry without clock, power and temperature of GPUs: pip install 'scalefold[telemetry]' adds them")
    return NodeLog(config.run.run_dir, seat.node, ranks.rank, role, result_file.name.split(".")[0], seat.gpu)


def begin_counting(node_log: NodeLog | None) -> Callable[..., None]:
    """At the start of the clock: energy counts from here. Returns what notes a cycle."""
    if node_log is None:
        return lambda step, **facts: None
    node_log.begin()
    return node_log.cycle


def open_events(result_file: Path, ranks: Ranks, options: RunOptions) -> Events:
    """The log of this rank: rank 0 and, with separate evaluation ranks, the first of those write."""
    separate = ranks.layout.num_eval_ranks > 0
    if ranks.is_root:
        return Events(result_file, role="training" if separate else "single", instance=options.instance)
    if ranks.is_eval_root:
        return Events(result_file, role="evaluation", instance=options.instance)
    return Events.silent()


def open_schedule(config: Config, resume: bool) -> Schedule:
    """The phases of the run, at the place where it starts or resumes as far as this rank can see.

    That decides which ranks are expected. From which checkpoint the run continues is decided when they have met; a
    rank that sees none expects the first phase's.

    Raises:
        CheckpointError: the checkpoint was written in a phase that the configuration does not have.
    """
    schedule = Schedule(config)
    for folder in reversed(Checkpoints(config.run.run_dir / "checkpoints").all() if resume else []):
        try:
            state = read_state(folder)
        except CheckpointError:  # whether an older one will do is decided later, and said then
            continue
        check_phase(config, folder, state)
        schedule.place(state.position, state.iteration)
        break
    return schedule
