"""A plugin for pytest: programs of one launch keep to memory of their own.

    TRITON_INTERPRET=1 pytest -p separate_programs tests/test_kernels_*.py     # make rings does this

On a GPU programs run in any order and at once; in the interpreter one after the other, so that a program that reads or
stores what another one of its launch stores gives the same values in every test. With this plugin such a launch fails.
(Sanitizers look for races in the memory that a program has to itself.)
"""

from collections.abc import Callable
from typing import Any

import numpy as np

Accesses = list[tuple[np.ndarray, int]]  # addresses, and the number of the program


def watch() -> None:
    """From now on, every launch in the interpreter."""
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    read, stored = Accesses(), Accesses()

    def recorded(original: Callable[..., Any], into: Accesses, mask_at: int) -> Callable[..., Any]:
        def access(self: Any, pointers: Any, *rest: Any, **named: Any) -> Any:
            mask = np.broadcast_to(rest[mask_at].data, pointers.data.shape).astype(bool)
            x, y, z = self.grid_idx
            into.append((pointers.data[mask].astype(np.uint64).ravel(), (x << 40) + (y << 20) + z))
            return original(self, pointers, *rest, **named)

        return access

    def launched(self: Any, *arguments: Any, **named: Any) -> None:
        read.clear()
        stored.clear()
        launch(self, *arguments, **named)
        if fault := overlap(read, stored):
            raise AssertionError(f"{self.fn.__name__}: {fault}")

    launch = GridExecutor.__call__
    GridExecutor.__call__ = launched
    InterpreterBuilder.create_masked_load = recorded(InterpreterBuilder.create_masked_load, read, 0)
    InterpreterBuilder.create_masked_store = recorded(InterpreterBuilder.create_masked_store, stored, 1)


def overlap(read: Accesses, stored: Accesses) -> str | None:
    """What programs of one launch do to each other, or None."""
    stored_at, storing = _joined(stored)
    order = np.argsort(stored_at, kind="stable")
    stored_at, storing = stored_at[order], storing[order]
    if ((stored_at[1:] == stored_at[:-1]) & (storing[1:] != storing[:-1])).any():
        return "two programs store the same element"
    read_at, reading = _joined(read)
    if not (len(stored_at) and len(read_at)):
        return None
    place = np.searchsorted(stored_at, read_at).clip(max=len(stored_at) - 1)
    meets = (stored_at[place] == read_at) & (storing[place] != reading)
    return "a program reads what another one stores" if meets.any() else None


def _joined(accesses: Accesses) -> tuple[np.ndarray, np.ndarray]:
    addresses = [found for found, _ in accesses]
    programs = [np.full(len(found), program) for found, program in accesses]
    return np.concatenate([np.zeros(0, np.uint64), *addresses]), np.concatenate([np.zeros(0, np.int64), *programs])


def pytest_configure() -> None:
    """Called by pytest."""
    watch()
