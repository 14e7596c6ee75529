"""The table of operations by its name. Which implementation each of its operations takes: ``triton_ops``."""

import logging

from scalefold.kernels.table import REFERENCE, Operations

log = logging.getLogger(__name__)


def operations(name: str) -> Operations:
    """The table ``reference``, ``triton``, or ``auto``: Triton where it can be imported, else the plain definitions.

    Raises:
        ImportError: ``triton`` is asked for by name and missing.
    """
    if name == "reference":
        return REFERENCE
    try:
        from scalefold.kernels.triton_ops import TRITON
    except ImportError as error:
        if name == "triton":
            raise
        log.warning("kernels: plain PyTorch operations, because Triton cannot be imported: %s", error)
        return REFERENCE
    return TRITON
