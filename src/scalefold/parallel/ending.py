"""The end of a process: what it holds is let go of in reverse order, whatever happened, and within a bound."""

import contextlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from scalefold.errors import RankLostError, ScaleFoldError
from scalefold.parallel.ranks import Ranks
from scalefold.parallel.watch import bounded

log = logging.getLogger(__name__)

LIMIT_S = 30.0
LAST_WORDS = "last_words"
NUM_WITNESSES = 8  # ranks that keep what all say


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
        self.last_words: Callable[[BaseException], None] = lambda error: None  # for whoever looks at the run later
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
            self.last_words(error)
        with bounded(self.limit_s, self._give_up):
            return super().__exit__(kind, error, trace)

    def _give_up(self) -> None:
        print(
            f"error: {self.owner}: {self._standing} did not end within {self.limit_s:.0f} s; leaving with status "
            f"{self.status}",
            file=sys.stderr,
            flush=True,
        )
        self.leave(self.status)


class LastWords:
    """Keeps in ``run_dir/last_words`` why this rank ended, for ``scalefold doctor --run``; never an error itself.

    A lost rank is what all others say: the first few keep it. A descriptor is held for a process that has no other.
    """

    def __init__(self, run_dir: Path, ranks: Ranks) -> None:
        self.folder, self.ranks = run_dir / LAST_WORDS, ranks
        self._spare: list[int] = [os.open(os.devnull, os.O_RDONLY)]

    def __call__(self, error: BaseException) -> None:
        """Write, unless others say the same."""
        ranks, lost = self.ranks, isinstance(error, RankLostError)
        if lost and ranks.rank >= NUM_WITNESSES:
            return
        text = str(error) if isinstance(error, ScaleFoldError) else f"{type(error).__name__}: {error}".splitlines()[0]
        facts = {"rank": ranks.rank, "host": ranks.host, "step": ranks.watch.sign().step, "error": text, "lost": lost}
        with contextlib.suppress(OSError):
            if self._spare:
                os.close(self._spare.pop())
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary = self.folder / f".rank_{ranks.rank}.partial"
            temporary.write_text(json.dumps(facts) + "\n", encoding="utf-8")
            temporary.replace(self.folder / f"rank_{ranks.rank}.json")


def forget_last_words(run_dir: Path) -> None:
    """Those of an earlier start."""
    shutil.rmtree(run_dir / LAST_WORDS, ignore_errors=True)
