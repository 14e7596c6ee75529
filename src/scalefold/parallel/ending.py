"""The end of a process: what it holds is let go of in reverse order, whatever happened, and within a bound."""

import logging
import os
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType

log = logging.getLogger(__name__)

LIMIT_S = 30.0


class Ending(ExitStack):
    """Everything one rank has to let go of; the last taken goes first.

    A release that stands for ``limit_s`` is named in one line, and the process ends with the status that it had earned.

    Args:
        limit_s: how long all releases together may take.
        leave: ends the process at once with a status.
    """

    def __init__(self, limit_s: float = LIMIT_S, leave: Callable[[int], None] = os._exit) -> None:
        super().__init__()
        self.limit_s, self.leave = limit_s, leave
        self.status = 0  # of this process, unless an error ends it
        self.owner = "this process"
        self._standing = "nothing"

    def add(self, what: str, release: Callable[[], object], after_errors: bool = True) -> None:
        """Call ``release`` at the end. After an error what it raises is logged, because the error is the news.

        ``after_errors=False``: only at an orderly end, for what would wait for a device or for ranks that are gone.
        """

        def let_go(kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
            self._standing = what
            if error is None:
                release()
            elif after_errors:
                try:
                    release()
                except Exception as another:
                    log.warning("%s: %s: %s: %s", self.owner, what, type(another).__name__, another)

        self.push(let_go)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        if error is not None:
            self.status = getattr(error, "exit_status", 1)
        bound = threading.Timer(self.limit_s, self._give_up)
        bound.daemon = True
        bound.start()
        try:
            return super().__exit__(kind, error, trace)
        finally:
            bound.cancel()

    def _give_up(self) -> None:
        print(
            f"error: {self.owner}: {self._standing} did not end within {self.limit_s:.0f} s; leaving with status "
            f"{self.status}",
            file=sys.stderr,
            flush=True,
        )
        self.leave(self.status)
