"""Signals that ask a run to stop: a scheduler or Ctrl-C sends them to all processes, training ranks alone act."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def leave_stopping_to_others() -> None:
    """Ignore stop signals from now on: this process ends when the training ranks say so."""
    for wanted in STOP_SIGNALS:
        signal.signal(wanted, signal.SIG_IGN)


@contextmanager
def children_unaware() -> Iterator[None]:
    """Processes started inside never receive stop signals; they end with the rank that started them.

    A process inherits the mask of the thread that starts it, and so do its own children (the fork server's workers).
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        resource_tracker.ensure_running()  # it ignores SIGTERM by itself, which it unblocks here
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
