"""The table of operations by its name, and the log's word on calls that take another implementation than the fastest.

Which implementation each operation takes: ``triton_ops``.
"""

import logging

from scalefold.kernels.table import REFERENCE, Operations

log = logging.getLogger(__name__)
_explained: set[tuple[str, str]] = set()


def operations(name: str, early: bool = False) -> Operations:
    """The table ``reference``, ``triton``, or ``auto``: Triton where it can be imported, else the plain definitions.

    early: the process launches Triton's programs while those before them end (``instructions``), where the GPU can.

    Raises:
        ImportError: ``triton`` is asked for by name and missing.
    """
    if name == "reference":
        return REFERENCE
    try:
        from scalefold.kernels.instructions import launch_early
        from scalefold.kernels.triton_ops import TRITON
    except ImportError as error:
        if name == "triton":
            raise
        log.warning("kernels: plain PyTorch operations, because Triton cannot be imported: %s", error)
        return REFERENCE
    launch_early(early)
    return TRITON


def explain(taken: str, reason: str) -> None:
    """Log, once, that calls take another implementation, such as ``plain PyTorch attention``, and why."""
    if (taken, reason) not in _explained:
        _explained.add((taken, reason))
        log.info("kernels: %s: %s", taken, reason)
