"""What each rank says of each cycle, in one file per node: ``RUN/telemetry/NODE.jsonl``.

A thread of its own asks the GPU and writes; the training loop puts a few numbers into a queue once per cycle. Every
line is one write to a file opened for appending, so that the ranks of a node share it; a line that a crash has cut
short is followed by whole ones, and left out by the reader (``stragglers``).

Keys of a line: ``time`` (Unix seconds), ``result`` (of which log), ``rank``, ``role`` (train, evaluate), ``step`` (the
cycle's last); of a cycle ``steps``, ``step_ms``, ``data_ms`` (means), ``step_max_ms``, ``data_max_ms``, ``slowest``
(chain, seconds to build); of an evaluation ``evaluation_s``; of a GPU those of ``gpu.Meter``.
"""

import json
import logging
import os
import queue
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from scalefold.telemetry import NODES_FOLDER
from scalefold.telemetry.gpu import Gpu, Meter, find_gpu

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
_CLOSE_S = 5.0
_BEGIN, _END = object(), object()


class NodeLog:
    """One rank's hand in its node's file; a context, at whose end everything is written.

    Args:
        run_dir: of the run.
        node: whose file it is.
        rank: of this process.
        role: what the rank does.
        result: stem of the run's log; a folder may hold several.
        gpu: UUID of this rank's GPU, empty on a CPU.
        find: UUID -> (GPU, reason why there is none).
    """

    def __init__(
        self,
        run_dir: Path,
        node: str,
        rank: int,
        role: Literal["train", "evaluate"],
        result: str,
        gpu: str = "",
        find: Callable[[str], tuple[Gpu | None, str | None]] = find_gpu,
    ) -> None:
        self.file = run_dir / NODES_FOLDER / f"{re.sub(r'[^A-Za-z0-9._-]', '_', node)}.jsonl"
        self.rank, self._uuid, self._find = rank, gpu, find
        self._who = {"result": result, "rank": rank, "role": role}
        self._step = 0
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="telemetry", daemon=True)
        self._thread.start()

    def begin(self) -> None:
        """The clock starts: energy counts from here on."""
        self._queue.put(_BEGIN)

    def cycle(self, step: int, **facts: Any) -> None:
        """Note a cycle that ended with ``step``; returns at once."""
        self._step = step
        self._queue.put({"step": step, **facts})

    def __enter__(self) -> "NodeLog":
        return self

    def __exit__(self, *_: object) -> None:
        self._queue.put(_END)
        self._thread.join(_CLOSE_S)  # a file system that hangs does not hold up the run's end

    def _work(self) -> None:
        try:
            self._serve()
        except OSError as error:
            log.warning("rank %d: %s: %s; no more telemetry", self.rank, self.file, error.strerror or error)

    def _serve(self) -> None:
        gpu, reason = self._find(self._uuid)
        if reason is not None and self.rank == 0:
            log.warning("no GPU clock, power and temperature: %s", reason)
        meter = Meter(gpu)
        while (message := self._next(meter)) is not _END:
            measured = meter.take()
            if message is not _BEGIN:
                self._write({**message, **measured})
        if measured := meter.take():  # what was used since the last cycle
            self._write({"step": self._step, **measured})

    def _next(self, meter: Meter) -> Any:
        """The next message; the GPU is looked at meanwhile."""
        while True:
            try:
                return self._queue.get(timeout=None if meter.gpu is None else LOOK_EVERY_S)
            except queue.Empty:
                meter.look()

    def _write(self, facts: dict[str, Any]) -> None:
        line = json.dumps({"time": round(time.time(), 3), **self._who, **facts}, allow_nan=False) + "\n"
        self.file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.file, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            cut = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
            whole = (b"\n" if cut else b"") + line.encode()
            if os.write(descriptor, whole) < len(whole):
                raise OSError("the disk is full")
        finally:
            os.close(descriptor)
