"""Checkpoints beside training: a copy on the device in stream order, the way to the disk in a thread.

``save`` copies weights, both moments and averages on the device and returns. A second stream brings these copies to
page-locked memory, a thread waits for that copy, looks whether all is finite, writes both files, reads their hashes
back, flushes files and folders to the disk, and renames the folder into place. So a checkpoint is complete or absent.
One is written at a time: the next ``save`` waits for it, and raises what went wrong with it.

The memory is allocated, and the files' contents are laid out as views of it, once. So the thread has little to do in
Python, where it would hold the training thread up.
"""

import contextlib
import errno
import gc
import itertools
import json
import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scalefold.config import TrainingConfig
from scalefold.errors import CheckpointError
from scalefold.step.checkpoint import (
    AVERAGED_COUNT,
    AVERAGED_FILE,
    AVERAGED_PREFIX,
    RESUMABLE_FILE,
    STATE_FILE,
    Checkpoints,
    RunState,
    first_not_finite,
    sha256_of,
)
from scalefold.step.optimizer import Optimizer
from scalefold.step.parameters import FlatParameters

log = logging.getLogger(__name__)

SHORT_TURN_S = 5e-4


class HostCopy:
    """Weights, moments and averages of one model in host memory, and the two files' contents as views of them.

    Args:
        flat, optimizer: what is copied.
        names: the model's registration order.
    """

    def __init__(self, flat: FlatParameters, optimizer: Optimizer, names: list[str]) -> None:
        self.flat, self.optimizer = flat, optimizer
        on_gpu = flat.master.is_cuda
        self.buffers = {
            name: torch.empty(flat.size, dtype=torch.float32, pin_memory=on_gpu).zero_()  # the first touch is slow
            for name in ("weights", "exp_avg", "exp_avg_sq", "averages")
        }
        self._steps, self._num_averaged = torch.empty(len(names)), torch.tensor(0)
        views = {name: dict(flat.named_views(buffer)) for name, buffer in self.buffers.items()}
        first, second = views["exp_avg"], views["exp_avg_sq"]
        states = {
            i: {"step": self._steps[i], "exp_avg": first[n], "exp_avg_sq": second[n]} for i, n in enumerate(names)
        }
        self.resumable: dict[str, Any] = {
            "iteration": 0,
            "alphafold_state_dict": {name: views["weights"][name] for name in names},
            "optimizer_state_dict": {"state": states, "param_groups": []},
        }
        self.averaged: dict[str, Tensor] = {
            AVERAGED_COUNT: self._num_averaged,
            **{AVERAGED_PREFIX + name: views["averages"][name] for name in names},
        }
        self._stream = torch.cuda.Stream() if on_gpu else None
        self._arrival = torch.cuda.Event(blocking=True) if on_gpu else None
        # allocated before the clock: where peers map a GPU's memory, an allocation holds up its steps
        self._device_copies = [torch.empty_like(source) for source in self._sources()] if on_gpu else []

    @torch.no_grad()
    def begin(self, iteration: int) -> None:
        """Take everything as of now in stream order; on a GPU the host does not wait."""
        optimizer, count = self.optimizer, len(self._steps)
        if self._stream is None or self._arrival is None:
            copy_all(self.buffers.values(), self._sources())
        else:
            copy_all(self._device_copies, self._sources())
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                copy_all(self.buffers.values(), self._device_copies)
                self._arrival.record()
        self._steps.fill_(float(optimizer.adam_step))
        self._num_averaged.fill_(optimizer.num_averaged)
        self.resumable["iteration"] = iteration
        self.resumable["optimizer_state_dict"]["param_groups"] = [adam_group(optimizer.config, count)]

    def _sources(self) -> list[Tensor]:
        optimizer = self.optimizer
        return [self.flat.master, optimizer.exp_avg, optimizer.exp_avg_sq, optimizer.averaged]

    def wait(self) -> None:
        """Until the copy has arrived; called by the writing thread."""
        if self._arrival is not None:
            self._arrival.synchronize()

    def check_finite(self) -> None:
        """Refuse to keep numbers that no run can continue with."""
        for what, buffer in self.buffers.items():
            if (name := first_not_finite(self.flat, buffer)) is not None:
                raise CheckpointError(
                    f"iteration {self.resumable['iteration']}: {what} are not finite (first: {name}); "
                    "no checkpoint written"
                )


def copy_all(targets: Iterable[Tensor], sources: Iterable[Tensor]) -> None:
    """Copy tensors in stream order; the host does not wait."""
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source, non_blocking=True)


def adam_group(config: TrainingConfig, count: int) -> dict[str, Any]:
    """The one parameter group of ``torch.optim.Adam`` over ``count`` tensors."""
    return {
        "lr": config.opt_base_learning_rate,
        "betas": (config.opt_adam_beta_1, config.opt_adam_beta_2),
        "eps": config.opt_adam_epsilon,
        "weight_decay": 0.0,
        "amsgrad": False,
        "maximize": False,
        "foreach": None,
        "capturable": False,
        "differentiable": False,
        "fused": None,
        "params": list(range(count)),
    }


@dataclass(frozen=True)
class Written:
    """A checkpoint on the disk: training stood still for ``stall_ms``, writing beside it took ``write_s``."""

    step: int
    folder: Path
    stall_ms: float
    write_s: float


class CheckpointWriter(Checkpoints):
    """Writes a run's checkpoints: the newest ``keep`` stay, and for good every ``archive_every``-th step."""

    def __init__(self, folder: Path, keep: int, archive_every: int = 0) -> None:
        super().__init__(folder)
        self.keep, self.archive_every = keep, archive_every
        self._copy: HostCopy | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._written: Written | None = None

    def prepare(self, flat: FlatParameters, optimizer: Optimizer, names: list[str]) -> None:
        """Allocate the host's copy, which takes a while, and remove what a killed run left half-written."""
        if self._copy is None:
            self._copy = HostCopy(flat, optimizer, names)
            for leftover in self.folder.glob(".*.partial"):
                shutil.rmtree(leftover, ignore_errors=True)

    def settle(self) -> None:
        """Once the run is set up: what lives by now stays, so keep garbage collection from looking at it again.

        Writing makes many short-lived objects. A full collection among them would stop the training thread too.
        """
        if self._copy is not None:
            gc.collect()
            gc.freeze()

    def save(self, flat: FlatParameters, optimizer: Optimizer, names: list[str], state: RunState) -> Written | None:
        """Begin to write the checkpoint of ``state.iteration``; returns the one before, if it was under way.

        Raises:
            CheckpointError: the checkpoint before was not finite, or the disk refused it.
        """
        start = time.perf_counter()
        before = self.finish()
        self.prepare(flat, optimizer, names)
        assert self._copy is not None
        self._copy.begin(state.iteration)
        stall_ms = 1e3 * (time.perf_counter() - start)
        self._thread = threading.Thread(
            target=self._run, args=(self._copy, state, stall_ms), name="checkpoint", daemon=True
        )
        self._thread.start()
        return before

    def set_aside(self, after: int) -> None:
        """Rename checkpoints beyond iteration ``after``, which the run is not going to continue from, out of the way.

        They are broken, or another run's that was here before; ``run_dir/checkpoints/set_aside`` keeps them.
        """
        self._join()
        for folder in self.all():
            if int(folder.name) > after:
                store = self.folder.with_name("set_aside")
                store.mkdir(exist_ok=True)
                suffixes = itertools.chain([""], (f"_{n}" for n in itertools.count(2)))
                names = (folder.name + suffix for suffix in suffixes)
                folder.rename(next(store / name for name in names if not (store / name).exists()))

    def newest(self) -> Path | None:
        """Folder of the newest complete checkpoint, once the one under way is over; None if there is none."""
        self._join()
        return super().newest()

    def finish(self) -> Written | None:
        """Wait for the checkpoint under way; None if there is none.

        Raises:
            CheckpointError: it was not finite, or the disk refused it; the last good one stays.
        """
        self._join()
        (written, self._written), (error, self._error) = (self._written, None), (self._error, None)
        if error is not None:
            raise error
        return written

    def close(self) -> None:
        """Wait for the checkpoint under way, on the way out of another error: its own is a warning only."""
        self._join()
        if self._error is not None:
            log.warning("%s", self._error)
        self._copy = self._error = None
        gc.unfreeze()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self, copy: HostCopy, state: RunState, stall_ms: float) -> None:
        start = time.perf_counter()
        try:
            with short_turns():
                copy.wait()
                copy.check_finite()
                target = self._write(copy, state)
            self._written = Written(state.iteration, target, stall_ms, time.perf_counter() - start)
        except BaseException as error:  # raised by the next save or finish, in the training thread
            self._error = error

    def _write(self, copy: HostCopy, state: RunState) -> Path:
        target = self.folder / f"{state.iteration:06d}"
        temporary = self.folder / f".{target.name}.partial"
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            hashes = {
                name: write_tensors(temporary / name, content)
                for name, content in ((RESUMABLE_FILE, copy.resumable), (AVERAGED_FILE, copy.averaged))
            }
            write_text(temporary / STATE_FILE, json.dumps(replace(state, sha256=hashes).facts()) + "\n")
            put_in_place(temporary, target)
        except (OSError, RuntimeError) as error:  # a full disk is a RuntimeError of torch.save
            remove_partial(temporary)
            reason = getattr(error, "strerror", None) or (str(error).splitlines() or [""])[0]
            raise CheckpointError(f"{target}: cannot write the checkpoint, is the disk full? {reason}") from None
        self._drop_oldest(target)
        return target

    def _drop_oldest(self, target: Path) -> None:
        passing = [p for p in self.all() if not self.archive_every or int(p.name) % self.archive_every]
        for old in [p for p in passing[: -self.keep] if p != target]:
            shutil.rmtree(old, ignore_errors=True)


def write_tensors(file: Path, content: dict[str, Any]) -> str:
    """Save to the disk; return the SHA-256 of what is there."""
    torch.save(content, file)
    flush(file)
    return sha256_of(file)


def write_text(file: Path, text: str) -> None:
    """The same for a short text."""
    file.write_text(text, encoding="utf-8")
    flush(file)


def remove_partial(folder: Path) -> None:
    """Remove what was begun; unlike ``rmtree``, also in a process that can open no folder any more."""
    with contextlib.suppress(OSError):
        for name in (RESUMABLE_FILE, AVERAGED_FILE, STATE_FILE):
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()


def put_in_place(temporary: Path, target: Path) -> None:
    """Rename a complete folder to its name for good; an older one of that name gives way."""
    flush(temporary)
    if target.exists():
        older = target.with_name(f".{target.name}.older.partial")
        shutil.rmtree(older, ignore_errors=True)
        target.rename(older)
    temporary.rename(target)
    flush(target.parent)
    shutil.rmtree(target.with_name(f".{target.name}.older.partial"), ignore_errors=True)


def flush(path: Path) -> None:
    """Have the operating system put a file or a folder's entries onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that does not flush folders
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def short_turns() -> Iterator[None]:
    """Threads take turns in the interpreter more often, so that the training thread never waits long for this one."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(SHORT_TURN_S)
    try:
        yield
    finally:
        sys.setswitchinterval(before)
