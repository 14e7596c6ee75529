"""A window of steps in which a rank writes a Chrome trace and names its work for Nsight Systems (NVTX).

Outside the window nothing of this exists: a run without one walks over a plain ``range``, and names are put around
methods when the window opens and taken off when it closes. Under ``nsys profile --capture-range=cudaProfilerApi`` only
the names and the range are given, because two readers of the GPU's counters exclude each other.
"""

import logging
import os
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from scalefold.config import ProfileConfig
from scalefold.telemetry import PROFILE_FOLDER

log = logging.getLogger(__name__)

UNDER_NSYS = "NSYS_PROFILING_SESSION_ID"  # set by nsys for the programs that it starts

#: An object, the name of its method and the name of the range that a call becomes.
Span = tuple[object, str, str]


class Window:
    """Opens before the first of its steps that takes place and closes after the last.

    Args:
        profile: which steps, on which ranks.
        run_dir: the trace goes into its folder ``profile``.
        rank: of this process.
        device: of this process.
        spans: what to name, asked for when the window opens.
        settle: called before what was recorded is collected: waits for what threads of the library still exchange. One
            that begins to record meanwhile would cost the events of other threads, the loop's among them.
        pause: called when the trace has been written, which takes seconds that no step should be charged with.
    """

    def __init__(
        self,
        profile: ProfileConfig,
        run_dir: Path,
        rank: int,
        device: torch.device,
        spans: Callable[[], Sequence[Span]],
        settle: Callable[[], None],
        pause: Callable[[], None],
    ) -> None:
        self.steps = profile.window if rank in profile.ranks else range(0)
        self.folder, self.rank = run_dir / PROFILE_FOLDER, rank
        self.spans, self.settle, self.pause = spans, settle, pause
        self.on_gpu = device.type == "cuda"
        self.under_nsys = self.on_gpu and UNDER_NSYS in os.environ
        self._seen: list[int] = []
        self._named: list[tuple[object, str]] = []
        self._profiler: torch.profiler.profile | None = None

    @contextmanager
    def around(self, steps: range) -> Iterator[Iterable[int]]:
        """``steps`` as they are, or, if some of them are to be profiled here, a walk over them that does it.

        After an error nothing is written: a device that others wait for may never answer.
        """
        if not set(self.steps) & set(steps):
            yield steps
            return
        walk = self.over(steps)
        yield walk
        walk.close()  # the step's own range ends first
        self.close()

    def over(self, steps: Iterable[int]) -> Generator[int, None, None]:
        """The same steps; those of the window are profiled while the caller works on them."""
        for step in steps:
            if step not in self.steps:
                yield step
                continue
            if not self._seen:
                self.open()
            self._seen.append(step)
            with self.range(f"step {step}"):
                yield step
            if step == self.steps[-1]:
                self.close()

    def open(self) -> None:
        """Begin to record, once the GPU has done what it was told before, and put names around the methods."""
        if self.on_gpu:
            torch.cuda.synchronize()
        if self.under_nsys:
            torch.cuda.profiler.start()
        else:
            activities = [torch.profiler.ProfilerActivity.CPU]
            activities += [torch.profiler.ProfilerActivity.CUDA] if self.on_gpu else []
            self._profiler = torch.profiler.profile(activities=activities)
            self._profiler.start()
        for owner, method, name in self.spans():
            setattr(owner, method, self._naming(getattr(owner, method), name))
            self._named.append((owner, method))

    def close(self) -> None:
        """Take the names off and write what was recorded; nothing if the window is not open."""
        if not self._named:
            return
        for owner, method in self._named:
            delattr(owner, method)  # the class's own is seen again
        self._named = []
        self.settle()
        if self.on_gpu:
            torch.cuda.synchronize()
        if self._profiler is not None:
            self._write(self._profiler)
        elif self.under_nsys:
            torch.cuda.profiler.stop()
        self._profiler = None
        self.pause()

    @contextmanager
    def range(self, name: str) -> Iterator[None]:
        """A named stretch of time: in the trace, and for nsys."""
        with torch.profiler.record_function(name):
            if not self.on_gpu:
                yield
                return
            torch.cuda.nvtx.range_push(name)
            try:
                yield
            finally:
                torch.cuda.nvtx.range_pop()

    def _naming(self, method: Callable[..., Any], name: str) -> Callable[..., Any]:
        def named(*args: Any, **kwargs: Any) -> Any:
            with self.range(name):
                return method(*args, **kwargs)

        return named

    def _write(self, profiler: "torch.profiler.profile") -> None:
        """The trace under its own name once it is whole; that a disk is full does not end the run."""
        profiler.stop()
        file = self.folder / f"steps_{self._seen[0]}-{self._seen[-1]}_rank_{self.rank}.json"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.folder, prefix=".") as temporary:  # it is there if it is whole
                written = Path(temporary) / file.name
                profiler.export_chrome_trace(str(written))
                written.replace(file)
        except (OSError, RuntimeError) as error:
            log.warning("rank %d: %s could not be written, is the disk full? %s", self.rank, file, error)
