"""Worker processes behind a PyTorch data loader, which end with the process that trains."""

import atexit
import contextlib
import os
import select
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from scalefold.data.loading.sampler import Task
from scalefold.data.loading.waiting import LOOK_S, NoBatch, NotWanted, always, end_stopped, ended_text, no_batch_text
from scalefold.errors import DataError
from scalefold.stop_signals import children_unaware

_PRELOADED = ["torch", "numpy", "h5py", "scalefold.data.loading.loader"]


@dataclass(frozen=True)
class SampleFailure:
    """A sample that could not be built; training stops with its message."""

    message: str


class _TaskSource:
    """The tasks that the data loader hands to its workers; none until there is a data set."""

    def __init__(self) -> None:
        self.tasks: Iterable[Task] = ()

    def __iter__(self) -> Iterator[Task]:
        return iter(self.tasks)


def _itself(batch: Any) -> Any:
    return batch


def end_with(process: int, _: int = 0) -> None:
    """In a worker: end as soon as ``process``, which trains, is gone, however it ended.

    A worker's own parent is the fork server, and that lives as long as one worker does.
    """
    threading.Thread(target=_await_end, args=(process,), name="end-with-trainer", daemon=True).start()


def _await_end(process: int) -> None:
    try:
        select.select([os.pidfd_open(process)], [], [])
    except ProcessLookupError:
        pass
    except (AttributeError, OSError):  # no such call here
        with contextlib.suppress(ProcessLookupError):
            while True:
                os.kill(process, 0)
                time.sleep(1.0)
    os._exit(1)


class Workers:
    """Worker processes behind a PyTorch data loader. They exist after ``spawn`` and read data after ``start``.

    A batch, or a worker's readiness, that is not there within ``limit_s`` is an error.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        num_workers: int,
        prefetch_factor: int,
        in_order: bool,
        pin_memory: bool,
        limit_s: float,
    ) -> None:
        self.limit_s = limit_s
        self._verdict: Exception | None = None  # why the workers were ended
        self._source = _TaskSource()
        options = {}
        if num_workers:
            context = torch.multiprocessing.get_context("forkserver")  # forking a process that holds a GPU is unsafe
            context.set_forkserver_preload(_PRELOADED)
            options = {
                "multiprocessing_context": context,
                "prefetch_factor": prefetch_factor,
                "persistent_workers": True,
                "worker_init_fn": partial(end_with, os.getpid()),
            }
        self._loader = DataLoader(
            dataset,
            sampler=self._source,
            batch_size=None,
            num_workers=num_workers,
            collate_fn=_itself,
            in_order=in_order,
            pin_memory=pin_memory and torch.cuda.is_available(),
            **options,
        )
        self._batches: Iterator[Any] | None = None

    def spawn(self) -> None:
        """Start the processes; with no tasks they only import and wait."""
        if self._loader.num_workers and self._batches is None:
            with children_unaware():
                self._batches = iter(self._loader)

    def start(self, tasks: Iterable[Task]) -> None:
        """Hand out ``tasks``."""
        self._source.tasks = tasks
        with self._overseen(always), children_unaware():
            self._batches = iter(self._loader)

    def next(self, wanted: Callable[[], bool] = always) -> Any:
        """The next finished batch.

        Raises:
            DataError: a sample failed, a worker process died, or none delivers.
            NotWanted: there is none yet, and ``wanted`` says that nobody needs it any more.
            StopIteration: all tasks are done.
        """
        if self._batches is None:
            raise RuntimeError("the loader has not been started")
        with self._overseen(wanted):
            batch = next(self._batches)
        if isinstance(batch, SampleFailure):
            raise DataError(batch.message)
        return batch

    def processes(self) -> list[Any]:
        """The worker processes."""
        return list(getattr(self._loader._iterator, "_workers", ()))

    @contextlib.contextmanager
    def _overseen(self, wanted: Callable[[], bool]) -> Iterator[None]:
        """Inside, this thread waits for workers; a wait that lasts too long, or that nobody wants, ends with an error.

        Nothing else ends it: a worker that stands still may do so half-way through handing over its batch.
        """
        over = threading.Event()
        if self._loader.num_workers:
            threading.Thread(target=self._oversee, args=(over, wanted), name="overseer", daemon=True).start()
        try:
            yield
        except (RuntimeError, EOFError, OSError) as error:
            raise self._verdict or NoBatch(ended_text(error)) from None
        finally:
            over.set()

    def _oversee(self, over: threading.Event, wanted: Callable[[], bool]) -> None:
        begin = time.monotonic()
        while not over.wait(LOOK_S):
            late = time.monotonic() - begin > self.limit_s
            if late or not wanted():
                self._verdict = NoBatch(no_batch_text(self.processes(), self.limit_s)) if late else NotWanted()
                for worker in self.processes():
                    worker.kill()
                return

    def close(self) -> None:
        """End the processes now, rather than when the garbage collector finds their iterator."""
        workers = self.processes()
        iterator, self._batches, self._loader._iterator = self._loader._iterator, None, None
        if iterator is not None:
            end_stopped(workers)
            iterator._shutdown_workers()  # type: ignore[attr-defined]
            # before 2.13, PyTorch would keep those that feed page-locked memory, and their pipes, to its very end
            atexit.unregister(getattr(iterator, "_clean_up_worker", None))  # type: ignore[arg-type]
            for worker in workers:
                worker.kill()
