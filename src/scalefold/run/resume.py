"""Where a run starts: afresh or at a checkpoint, with which seed and log. Rank 0 decides, all others are told."""

import itertools
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from scalefold.config import Config, LoadedConfig, describe_config, load_config
from scalefold.errors import CheckpointError, ConfigError, LogError
from scalefold.parallel.ranks import Ranks
from scalefold.phases import Position, Schedule
from scalefold.rehearse.faults import Fault
from scalefold.step.checkpoint import Checkpoints, RunState, load_initial, load_run
from scalefold.step.optimizer import Optimizer
from scalefold.step.reducer import broadcast_optimizer

log = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"

#: settings that a resumed run may change without a word, whole sections or single keys
FREE = (
    *("run.", "execution.", "launch.", "parallel.", "submission."),
    *("system", "description", "expected_minutes", "expected_peak_gib"),
    *("data.store_dir", "data.num_workers", "data.prefetch_factor", "data.num_eval_workers", "data.pin_memory"),
    *("training.num_train_iters", "training.init_checkpoint"),
)
#: what a change of the others means, by the beginning of the key
CONSEQUENCES = (
    (
        "training.seed",
        "samples and dropout are the new seed's from here on: some samples come twice, some never",
    ),
    ("training.global_batch_size", "every step from here on uses another number of samples"),
    ("training.gradient_accumulation_steps", "every update from here on sums another number of iterations"),
    ("training.opt_", "the optimizer goes on with other settings; Adam's moments stay"),
    ("training.swa_decay_rate", "weights are averaged over another span"),
    ("training.val_every_iters", "evaluations take place at other steps"),
    ("training.target_avg_lddt_ca_value", "the run ends at another lDDT-Cα"),
    ("loss.", "the loss is another one; earlier and later values do not compare"),
    ("model.", "the model is another one: the weights fit only if no shape depends on this"),
    ("data.val_", "evaluations use other chains; earlier and later values do not compare"),
    ("data.eval_", "evaluation chains are padded differently"),
    ("data.dataloader", "samples arrive in another order"),
    ("data.", "samples and their features are built differently"),
    ("phases", "phases begin and end elsewhere, or with other settings"),
)


@dataclass(frozen=True)
class RunOptions:
    """What differs between starts of one configuration."""

    resume: bool = False
    result_index: int = 0
    instance: int = 0
    accept_changes: bool = False
    inject: tuple[Fault, ...] = ()


@dataclass(frozen=True)
class Start:
    """What every rank is told first; ``folder`` and ``state`` are None where a run starts afresh."""

    seed: int
    result_file: Path
    position: Position
    folder: Path | None = None
    state: RunState | None = None
    left_over: Sequence[int] = ()

    @property
    def first_step(self) -> int:
        """The first iteration to train."""
        return self.state.iteration + 1 if self.state else 1


def agree_on_start(schedule: Schedule, options: RunOptions, ranks: Ranks, checkpoints: Checkpoints) -> Start:
    """Rank 0's choice, on every rank; the schedule is moved to its place.

    Raises:
        CheckpointError: no checkpoint, none that is good, or one that needs other ranks than have been started.
        ConfigError: settings have changed since.
        LogError: the log's name is taken.
    """
    decided = [choose_start(schedule.base, options, checkpoints) if ranks.is_root else None]
    if ranks.layout.world_size > 1:
        dist.broadcast_object_list(decided, src=0, group=ranks.control_group)
    (start,) = decided
    assert start is not None
    started_with = schedule.config.parallel
    schedule.position = start.position
    if schedule.config.parallel != started_with:
        raise CheckpointError(
            f"{start.folder}: the run goes on in phase {schedule.name}, which needs other ranks than "
            f"{ranks.describe()} was started with; start that phase's layout with --resume"
        )
    return start


def choose_start(base: Config, options: RunOptions, checkpoints: Checkpoints) -> Start:
    """``agree_on_start`` on rank 0: nothing is written, and nobody else reads a file."""
    run_dir, seed = base.run.run_dir, base.training.seed
    if not options.resume:
        file = free_result_file(run_dir, options, checkpoints)
        return Start(random.SystemRandom().getrandbits(63) if seed is None else seed, file, Position())
    found = checkpoints.newest_good(log.warning)
    if found is None:
        raise CheckpointError(nothing_to_resume(run_dir, checkpoints))
    folder, state = found
    before = settings_before(run_dir, options)
    changes = changed_settings(before, base, state) if before else []
    if changes and not options.accept_changes:
        raise ConfigError(
            f"{run_dir / CONFIG_FILE}: --resume with other settings: {'; '.join(changes)}. Resume with the settings of "
            "the run, or accept these changes with --accept-changes"
        )
    check_phase(base, folder, state)
    schedule = Schedule(base)
    schedule.place(state.position, state.iteration)
    if changes and before is not None:
        log.warning("%s: accepted changes: %s", run_dir, "; ".join(changes))
        schedule.position = Position(schedule.position.phase, state.iteration, samples_until(before, state))
    seed = seed if changes and seed is not None else state.seed
    left_over = state.left_over if seed == state.seed else ()
    file = resumed_result_file(run_dir, options, folder)
    return Start(seed, file, schedule.position, folder, state, left_over)


def nothing_to_resume(run_dir: Path, checkpoints: Checkpoints) -> str:
    """What to do where ``--resume`` finds no checkpoint; starting again must not run into the old log."""
    index = next_result_index(run_dir)
    again = f"with --result-index {index}, which keeps the log of the start before" if index else "without --resume"
    return (
        f"{checkpoints.folder}: --resume, but there is no complete checkpoint; set run.run_dir to the run to continue, "
        f"or start afresh {again}"
    )


def next_result_index(run_dir: Path) -> int:
    """The first N for which no ``result_N.txt`` and no part of one exists."""
    return next(n for n in itertools.count() if not any(run_dir.glob(f"result_{n}.txt*")))


def free_result_file(run_dir: Path, options: RunOptions, checkpoints: Checkpoints) -> Path:
    """``result_N.txt`` of a fresh run.

    Raises:
        LogError: it exists; says how to go on.
    """
    file = run_dir / f"result_{options.result_index}.txt"
    if not any(run_dir.glob(f"{file.name}*")):
        return file
    resume = f"continue that run with --resume (from {newest.name}), " if (newest := checkpoints.newest()) else ""
    raise LogError(
        f"{file} exists: a run never adds to another run's log; {resume}start afresh with --result-index "
        f"{next_result_index(run_dir)}, or choose another run.run_dir"
    )


def resumed_result_file(run_dir: Path, options: RunOptions, folder: Path) -> Path:
    """A resumed run writes a log of its own, because it is no valid benchmark run."""
    stem = f"result_{options.result_index}.resumed_{folder.name}"
    names = (f"{stem}{suffix}.txt" for suffix in itertools.chain([""], (f"_{n}" for n in itertools.count(2))))
    return next(run_dir / name for name in names if not any(run_dir.glob(f"{name}*")))


def settings_before(run_dir: Path, options: RunOptions) -> Config | None:
    """The configuration that the run kept beside its log; None, with a warning, where it cannot be compared.

    Raises:
        ConfigError: it cannot be read, and nobody said that changes are accepted.
    """
    file = run_dir / CONFIG_FILE
    if not file.exists():
        log.warning("%s: absent, so nobody can see whether settings have changed since the checkpoint", file)
        return None
    try:
        return load_config(file).config
    except ConfigError as error:
        if not options.accept_changes:
            raise ConfigError(f"{error}; --accept-changes resumes without comparing the settings") from None
        log.warning("%s; settings are not compared", error)
        return None


def changed_settings(before: Config, now: Config, state: RunState) -> list[str]:
    """Each difference that matters, with its consequence, as text."""
    old, new = ({key: value for key, value, _ in describe_config(LoadedConfig(c, {}))} for c in (before, now))
    old["training.seed"] = str(state.seed)
    if now.training.seed is None:  # the run's own goes on
        new["training.seed"] = old["training.seed"]
    keys = [key for key in old | new if old.get(key) != new.get(key) and not key.startswith(FREE)]
    return [f"{key} {old.get(key, 'absent')} -> {new.get(key, 'absent')} ({consequence(key)})" for key in keys]


def consequence(key: str) -> str:
    """What a change of this setting means for a run under way."""
    return next((text for start, text in CONSEQUENCES if key.startswith(start)), "the run goes on differently")


def samples_until(before: Config, state: RunState) -> int:
    """Samples that the run had used when the checkpoint was taken, by the settings it had then."""
    return Schedule(before, state.position).samples(state.iteration)


def load_state(config: Config, start: Start, optimizer: Optimizer, names: list[str], ranks: Ranks) -> str | None:
    """Initial or resumed weights, moments and averages, read by rank 0 alone, equal on all training ranks.

    Returns:
        SHA-256 of the initial checkpoint on rank 0; None elsewhere, or if none is configured.

    Raises:
        CheckpointError: a file cannot be read or does not fit the model.
    """
    digest, t = None, config.training
    if ranks.is_root and t.init_checkpoint is not None:
        digest = load_initial(t.init_checkpoint, optimizer.flat, optimizer, names, t.init_checkpoint_sha256sum)
    if ranks.is_root and start.folder is not None:
        load_run(start.folder, optimizer.flat, optimizer, names)
    broadcast_optimizer(optimizer, ranks.train_group)
    return digest


def check_phase(config: Config, folder: Path, state: RunState) -> None:
    """Refuse a checkpoint of a phase that the configuration does not have."""
    if state.position.phase > max(0, len(config.phases) - 1):
        raise CheckpointError(
            f"{folder}: was written in phase {state.position.phase}, but the configuration has phases 0 to "
            f"{len(config.phases) - 1}; resume with the configuration beside it"
        )
