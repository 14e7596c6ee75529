"""Whether a Gluon program runs or its Triton twin: what all of them ask, and the line that says why not."""

from collections.abc import Iterable

import torch
from torch import Tensor

from scalefold.kernels import tuning
from scalefold.kernels.choice import explain
from scalefold.kernels.instructions import INTERPRETED

CAPABILITY = 90


def obstacle(missing: str | None, tensors: Iterable[Tensor | None]) -> str | None:
    """Why no program can run here on these tensors, or None; ``missing``: why it could not be imported."""
    if missing or INTERPRETED.value:
        return missing or "the interpreter cannot run Gluon"
    if tuning.capability() != CAPABILITY:
        return f"compute capability {tuning.capability() / 10} is not 9.0"
    other = next((x.dtype for x in tensors if x is not None and x.dtype != torch.bfloat16), None)
    return None if other is None else f"{str(other).removeprefix('torch.')} is not bfloat16"


def preference(config: tuning.Config) -> str | None:
    """What the tuned tables have against a program, or None: it runs only where it is known to win (HOPPER = 1)."""
    return None if config["HOPPER"] else "the table prefers the Triton program"


def chosen(what: str, reason: str | None) -> bool:
    """Whether the Gluon program of ``what`` runs; if not, the log says why, on a GPU that it is made for."""
    if reason and tuning.capability() == CAPABILITY and not INTERPRETED.value:
        explain(f"Triton {what}", reason)
    return reason is None
