"""Everything needed to continue a run bit for bit, in the layout of the reference.

A checkpoint is a folder ``NNNNNN`` (the iteration) with two files that the reference reads and writes:

``resumable_checkpoint.pt``  ``iteration``; ``alphafold_state_dict``: fp32 weights by name, in registration order;
                             ``optimizer_state_dict``: torch Adam's layout, indexed by registration order
``swa_checkpoint.pt``        ``averaged_model.n_averaged`` and ``averaged_model.module.<name>``

and ``run_state.json`` of our own: seed and samples seen. Data order, recycling and dropout seeds are functions of seed
and iteration, so no generator state is needed. A folder is written under a temporary name and renamed.
"""

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scalefold.errors import CheckpointError
from scalefold.optim import FlatParameters, Optimizer

RESUMABLE_FILE = "resumable_checkpoint.pt"
AVERAGED_FILE = "swa_checkpoint.pt"
STATE_FILE = "run_state.json"


@dataclass(frozen=True)
class RunState:
    """Where a run stands: completed iterations, applied optimizer updates in the average, its seed, and its phase.

    ``steps_before`` and ``samples_before`` had been done when phase number ``phase`` began.
    """

    iteration: int
    seed: int
    num_averaged: int
    phase: int = 0
    steps_before: int = 0
    samples_before: int = 0


def sha256_of(file: Path) -> str:
    """SHA-256 of a file's bytes, as lower-case hex."""
    digest = hashlib.sha256()
    try:
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 24):
                digest.update(chunk)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot read the checkpoint: {error.strerror}") from None
    return digest.hexdigest()


def load_initial(
    file: Path, flat: FlatParameters, optimizer: Optimizer, names: list[str], expected_sha256: str | None
) -> str:
    """Load initial weights, and Adam's state if the file has it; return the SHA-256 of the file.

    A file without both dictionaries of the resumable layout is taken as a plain state dict: Adam then starts fresh.

    Raises:
        CheckpointError: unreadable file, another hash than expected, or other names or shapes than the model's.
    """
    digest = sha256_of(file)
    if expected_sha256 is not None and digest != expected_sha256:
        raise CheckpointError(
            f"{file}: SHA-256 is {digest}, expected {expected_sha256}: this is not the stated checkpoint"
        )
    content = _load(file)
    resumable = "alphafold_state_dict" in content and "optimizer_state_dict" in content
    _load_weights(file, flat, content["alphafold_state_dict"] if resumable else content)
    if resumable:
        _load_adam(file, flat, optimizer, names, content["optimizer_state_dict"])
    optimizer.averaged.copy_(flat.master)
    optimizer.num_averaged = 0
    return digest


def resumable_state(flat: FlatParameters, optimizer: Optimizer, names: list[str], iteration: int) -> dict[str, Any]:
    """The content of ``resumable_checkpoint.pt``; ``names`` is the model's registration order."""
    weights = _by_name(flat, flat.master)
    first, second = _by_name(flat, optimizer.exp_avg), _by_name(flat, optimizer.exp_avg_sq)
    c = optimizer.config
    step = torch.tensor(float(optimizer.adam_step))
    states = {i: {"step": step.clone(), "exp_avg": first[n], "exp_avg_sq": second[n]} for i, n in enumerate(names)}
    group = {
        "lr": c.opt_base_learning_rate,
        "betas": (c.opt_adam_beta_1, c.opt_adam_beta_2),
        "eps": c.opt_adam_epsilon,
        "weight_decay": 0.0,
        "amsgrad": False,
        "maximize": False,
        "foreach": None,
        "capturable": False,
        "differentiable": False,
        "fused": None,
        "params": list(range(len(names))),
    }
    return {
        "iteration": iteration,
        "alphafold_state_dict": {name: weights[name] for name in names},
        "optimizer_state_dict": {"state": states, "param_groups": [group]},
    }


def averaged_state(flat: FlatParameters, optimizer: Optimizer, names: list[str]) -> dict[str, Tensor]:
    """The content of ``swa_checkpoint.pt``."""
    averaged = _by_name(flat, optimizer.averaged)
    return {
        "averaged_model.n_averaged": torch.tensor(optimizer.num_averaged),
        **{f"averaged_model.module.{name}": averaged[name] for name in names},
    }


class Checkpoints:
    """The newest ``keep`` checkpoints of a run, below ``folder/last``, and for good every ``archive_every``-th step."""

    def __init__(self, folder: Path, keep: int, archive_every: int = 0) -> None:
        self.folder, self.keep, self.archive_every = folder / "last", keep, archive_every

    def save(self, flat: FlatParameters, optimizer: Optimizer, names: list[str], state: RunState) -> Path:
        """Write the checkpoint of ``state.iteration`` and drop the oldest beyond ``keep``.

        Raises:
            CheckpointError: weights are not finite (the last good checkpoint stays) or the disk refuses.
        """
        if not bool(torch.isfinite(flat.master).all()):
            raise CheckpointError(f"iteration {state.iteration}: weights are not finite; no checkpoint written")
        target = self.folder / f"{state.iteration:06d}"
        temporary = self.folder / f".{target.name}.partial"
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            torch.save(resumable_state(flat, optimizer, names, state.iteration), temporary / RESUMABLE_FILE)
            torch.save(averaged_state(flat, optimizer, names), temporary / AVERAGED_FILE)
            (temporary / STATE_FILE).write_text(json.dumps(asdict(state)) + "\n")
            shutil.rmtree(target, ignore_errors=True)
            temporary.rename(target)
        except (OSError, RuntimeError) as error:  # a full disk is a RuntimeError of torch.save
            shutil.rmtree(temporary, ignore_errors=True)
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise CheckpointError(f"{target}: cannot write the checkpoint, is the disk full? {reason}") from None
        passing = [p for p in self._all() if not self.archive_every or int(p.name) % self.archive_every]
        for old in [p for p in passing[: -self.keep] if p != target]:
            shutil.rmtree(old, ignore_errors=True)
        return target

    def newest(self) -> Path | None:
        """Folder of the newest complete checkpoint, or None."""
        return (self._all() or [None])[-1]

    def _all(self) -> list[Path]:
        return sorted(p for p in self.folder.glob("[0-9]*") if (p / STATE_FILE).exists())


def read_state(folder: Path) -> RunState:
    """Iteration and seed of a checkpoint folder."""
    try:
        return RunState(**json.loads((folder / STATE_FILE).read_text()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{folder / STATE_FILE}: cannot read: {error}") from None


def load_run(folder: Path, flat: FlatParameters, optimizer: Optimizer, names: list[str]) -> RunState:
    """Put a run back to where the checkpoint ``folder`` was taken.

    Raises:
        CheckpointError: a file is missing or does not fit the model.
    """
    state = read_state(folder)
    content = _load(folder / RESUMABLE_FILE)
    _load_weights(folder / RESUMABLE_FILE, flat, content["alphafold_state_dict"])
    _load_adam(folder / RESUMABLE_FILE, flat, optimizer, names, content["optimizer_state_dict"])
    averaged = _load(folder / AVERAGED_FILE)
    prefix = "averaged_model.module."
    tensors = {name.removeprefix(prefix): value for name, value in averaged.items() if name.startswith(prefix)}
    _copy_into(folder / AVERAGED_FILE, flat, optimizer.averaged, tensors)
    optimizer.num_averaged = state.num_averaged
    return state


def load_weights(file: Path) -> dict[str, Tensor]:
    """Weights for evaluation from any of our files: averaged, resumable, or a plain state dict."""
    content = _load(file)
    if "alphafold_state_dict" in content:
        return content["alphafold_state_dict"]
    prefix = "averaged_model.module."
    if any(name.startswith(prefix) for name in content):
        return {n.removeprefix(prefix): t for n, t in content.items() if n.startswith(prefix)}
    return content


def load_into(file: Path, flat: FlatParameters, buffer: Tensor) -> None:
    """Weights of any of our files into a flat buffer with the layout of ``flat``.

    Raises:
        CheckpointError: unreadable, or made by another model.
    """
    _copy_into(file, flat, buffer, load_weights(file))


def _load(file: Path) -> dict[str, Any]:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such checkpoint") from None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot read the checkpoint: {error.strerror or error}") from None
    except Exception:  # what torch says would advise to run code from the file
        raise CheckpointError(
            f"{file}: not a readable checkpoint; it must be whole, written by torch.save, and hold tensors, numbers "
            "and dictionaries only"
        ) from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: holds a {type(content).__name__}, not a dictionary of tensors")
    return content


def _by_name(flat: FlatParameters, buffer: Tensor) -> dict[str, Tensor]:
    return {name: view.detach().cpu().clone() for name, view in flat.named_views(buffer)}


@torch.no_grad()
def _copy_into(file: Path, flat: FlatParameters, buffer: Tensor, tensors: dict[str, Tensor]) -> None:
    known = {slot.name for slot in flat.slots}
    missing, extra = sorted(known - tensors.keys()), sorted(tensors.keys() - known)
    if missing or extra:
        raise CheckpointError(
            f"{file}: {len(missing)} parameters missing (first: {next(iter(missing), '-')}), "
            f"{len(extra)} unknown (first: {next(iter(extra), '-')}); it belongs to another model"
        )
    for slot in flat.slots:
        value = tensors[slot.name]
        if value.shape != slot.shape:
            raise CheckpointError(
                f"{file}: {slot.name} has shape {tuple(value.shape)}, the model has {tuple(slot.shape)}"
            )
        flat.view(buffer, slot).copy_(value)


def _load_weights(file: Path, flat: FlatParameters, tensors: dict[str, Tensor]) -> None:
    _copy_into(file, flat, flat.master, tensors)
    flat.refresh()


def _load_adam(file: Path, flat: FlatParameters, optimizer: Optimizer, names: list[str], state: dict[str, Any]) -> None:
    try:
        entries = state["state"]
        first = {name: entries[i]["exp_avg"] for i, name in enumerate(names)}
        second = {name: entries[i]["exp_avg_sq"] for i, name in enumerate(names)}
        steps = {int(entries[i]["step"]) for i in range(len(names))}
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{file}: optimizer_state_dict is not Adam's over {len(names)} tensors: {error!r}"
        ) from None
    if len(steps) != 1:
        raise CheckpointError(f"{file}: parameters have different Adam steps {sorted(steps)[:4]}")
    _copy_into(file, flat, optimizer.exp_avg, first)
    _copy_into(file, flat, optimizer.exp_avg_sq, second)
    optimizer.adam_step = steps.pop()
