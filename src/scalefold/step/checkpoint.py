"""Everything needed to continue a run bit for bit, in the layout of the reference.

A checkpoint is a folder ``NNNNNN`` (the iteration) with two files that the reference reads and writes:

``resumable_checkpoint.pt``  ``iteration``; ``alphafold_state_dict``: fp32 weights by name, in registration order;
                             ``optimizer_state_dict``: torch Adam's layout, indexed by registration order
``swa_checkpoint.pt``        ``averaged_model.n_averaged`` and ``averaged_model.module.<name>``

and ``run_state.json`` of our own: seed, place in the run, and the SHA-256 of the two files. Data order, recycling and
dropout seeds are functions of seed and iteration, so no generator state is needed. ``checkpoint_writer.py`` writes
these folders; here they are chosen, verified and loaded.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scalefold.errors import CheckpointError
from scalefold.phases import Position
from scalefold.step.optimizer import Optimizer
from scalefold.step.parameters import FlatLayout, FlatParameters

RESUMABLE_FILE = "resumable_checkpoint.pt"
AVERAGED_FILE = "swa_checkpoint.pt"
STATE_FILE = "run_state.json"
AVERAGED_COUNT = "averaged_model.n_averaged"
AVERAGED_PREFIX = "averaged_model.module."


@dataclass(frozen=True)
class RunState:
    """Where a run stands: completed iterations, applied optimizer updates in the average, its seed, and its phase.

    ``left_over`` are places of the stream of samples that a loader passed over because they were not ready. ``sha256``
    holds the hash of each file beside it; checkpoints of earlier versions have none. In ``run_state.json`` the numbers
    of ``position`` stand beside the others.
    """

    iteration: int
    seed: int
    num_averaged: int
    position: Position = field(default_factory=Position)
    left_over: Sequence[int] = ()
    sha256: Mapping[str, str] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """What ``run_state.json`` holds."""
        flat: dict[str, Any] = {}
        for name, value in vars(self).items():
            flat |= vars(value) if name == "position" else {name: value}
        return flat

    @classmethod
    def of(cls, facts: dict[str, Any]) -> "RunState":
        """The reverse of ``facts``; TypeError where a name is unknown or missing."""
        placed = {f.name for f in fields(Position)}
        position = Position(**{name: value for name, value in facts.items() if name in placed})
        return cls(position=position, **{name: value for name, value in facts.items() if name not in placed})


def sha256_of(file: Path) -> str:
    """SHA-256 of a file's bytes, as lower-case hex."""
    digest = hashlib.sha256()
    try:
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
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
        CheckpointError: unreadable file, another hash than expected, other names or shapes than the model's, or values
            that are no finite floating-point numbers.
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


class Checkpoints:
    """The checkpoints of a run below ``run_dir/checkpoints``, oldest first: which there are, and which is good."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "last"

    def all(self) -> list[Path]:
        """Folders of all complete checkpoints, the newest last."""
        complete = (p for p in self.folder.glob("[0-9]*") if p.name.isdecimal() and (p / STATE_FILE).exists())
        return sorted(complete, key=lambda p: int(p.name))

    def newest(self) -> Path | None:
        """Folder of the newest complete checkpoint, or None."""
        return (self.all() or [None])[-1]

    def newest_good(self, note: Callable[[str], None]) -> tuple[Path, RunState] | None:
        """The newest checkpoint whose files are as they were written, or None if there is no checkpoint at all.

        ``note`` is told why newer ones were passed over.

        Raises:
            CheckpointError: there are checkpoints, and all of them are broken.
        """
        reasons = []
        for folder in reversed(self.all()):
            try:
                return folder, verified_state(folder)
            except CheckpointError as error:
                reasons.append(error)
                note(f"{error}; looking for an older checkpoint")
        if reasons:
            raise CheckpointError(f"{reasons[0]}; no older checkpoint is good: start again without --resume")
        return None


def read_state(folder: Path) -> RunState:
    """What ``run_state.json`` of a checkpoint folder says.

    Raises:
        CheckpointError: unreadable, incomplete, or of the wrong types.
    """
    file = folder / STATE_FILE
    try:
        state = RunState.of(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file}: cannot read: {error}") from None
    hashes = state.sha256
    if not isinstance(hashes, dict) or not all(isinstance(text, str) for text in hashes.values()):
        raise CheckpointError(f"{file}: sha256 must be a dictionary of file names and hashes")
    counts = {name: value for name, value in state.facts().items() if name not in ("left_over", "sha256")}
    if not isinstance(state.left_over, list | tuple):
        raise CheckpointError(f"{file}: left_over must be a list of whole numbers")
    for name, value in (*counts.items(), *(("left_over", value) for value in state.left_over)):
        if type(value) is not int or value < 0:
            raise CheckpointError(f"{file}: {name} must be a whole number from 0 on, found {str(value)[:40]!r}")
    return state


def verified_state(folder: Path) -> RunState:
    """The state of a checkpoint of which every file is as it was written.

    Raises:
        CheckpointError: naming the file that is missing, cut off, changed, or contradicts another one.
    """
    state = read_state(folder)
    if int(folder.name) != state.iteration:
        raise CheckpointError(f"{folder / STATE_FILE}: says iteration {state.iteration}, contradicting the folder")
    for name in (RESUMABLE_FILE, AVERAGED_FILE):
        if name not in state.sha256:  # of an earlier version: all that can be seen is whether it loads
            _load(folder / name)
        elif sha256_of(folder / name) != state.sha256[name]:
            raise CheckpointError(f"{folder / name}: is not as it was written (SHA-256 differs from {STATE_FILE})")
    return state


def load_run(folder: Path, flat: FlatParameters, optimizer: Optimizer, names: list[str]) -> RunState:
    """Put a run back to where the checkpoint ``folder`` was taken.

    Raises:
        CheckpointError: a file is missing, does not fit the model, or contradicts ``run_state.json``.
    """
    state = read_state(folder)
    file = folder / RESUMABLE_FILE
    content = _load(file)
    _agree(file, "iteration", content.get("iteration"), state.iteration)
    _load_weights(file, flat, _entry(file, content, "alphafold_state_dict"))
    _load_adam(file, flat, optimizer, names, _entry(file, content, "optimizer_state_dict"))
    averaged = _load(folder / AVERAGED_FILE)
    _agree(folder / AVERAGED_FILE, "num_averaged", averaged.get(AVERAGED_COUNT), state.num_averaged)
    _copy_into(folder / AVERAGED_FILE, flat, optimizer.averaged, _without_prefix(averaged))
    optimizer.num_averaged = state.num_averaged
    return state


def load_weights(file: Path) -> dict[str, Any]:
    """Weights for evaluation from any of our files: averaged, resumable, or a plain state dict."""
    content = _load(file)
    if "alphafold_state_dict" in content:
        return _entry(file, content, "alphafold_state_dict")
    return _without_prefix(content) or content


def load_into(file: Path, flat: FlatLayout, buffer: Tensor) -> None:
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


def _entry(file: Path, content: dict[str, Any], key: str) -> dict[str, Any]:
    """A dictionary inside a file."""
    value = content.get(key)
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: {key} is a {type(value).__name__}, not a dictionary")
    return value


def _without_prefix(content: dict[str, Any]) -> dict[str, Any]:
    """The averaged weights of a file by the names of the model."""
    return {
        name.removeprefix(AVERAGED_PREFIX): value
        for name, value in content.items()
        if isinstance(name, str) and name.startswith(AVERAGED_PREFIX)
    }


def _agree(file: Path, what: str, found: Any, stated: int) -> None:
    try:
        same = int(found) == stated
    except (TypeError, ValueError, RuntimeError, OverflowError):
        same = False
    if not same:
        shown = found.tolist() if isinstance(found, Tensor) and found.numel() == 1 else found
        raise CheckpointError(f"{file}: holds {what} {str(shown)[:40]}, {STATE_FILE} beside it says {stated}")


@torch.no_grad()
def _copy_into(file: Path, flat: FlatLayout, buffer: Tensor, tensors: dict[str, Any], what: str = "") -> None:
    """Tensors by name into a flat buffer; ``what`` says which of a parameter's tensors they are."""
    known = {slot.name for slot in flat.slots}
    missing, extra = sorted(known - tensors.keys()), sorted(tensors.keys() - known, key=str)
    if missing or extra:
        raise CheckpointError(
            f"{file}: {len(missing)} parameters missing (first: {next(iter(missing), '-')}), "
            f"{len(extra)} unknown (first: {next(iter(extra), '-')}); it belongs to another model"
        )
    for slot in flat.slots:
        value = tensors[slot.name]
        if (fault := _fault(value, slot.shape)) is not None:
            raise CheckpointError(f"{file}: {what}{slot.name} {fault}")
        flat.view(buffer, slot).copy_(value)
    if (name := first_not_finite(flat, buffer)) is not None:
        raise CheckpointError(f"{file}: {what}{name} holds values that are not finite")


def _fault(value: Any, shape: torch.Size) -> str | None:
    """Why a value cannot be a parameter's tensor of this shape, or None if it can."""
    if not isinstance(value, Tensor):
        return f"is a {type(value).__name__}, not a tensor"
    if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
        return f"is no ordinary tensor (layout {str(value.layout).removeprefix('torch.')}, device {value.device.type})"
    if not value.is_floating_point():
        return f"has type {str(value.dtype).removeprefix('torch.')}, not a real floating-point type"
    if value.shape != shape:
        return f"has shape {tuple(value.shape)}, the model has {tuple(shape)}"
    return None


def first_not_finite(flat: FlatLayout, buffer: Tensor) -> str | None:
    """Name of the first parameter with a NaN or an infinity in a flat buffer, or None.

    The sum of all elements tells: in fp64 finite fp32 numbers cannot overflow, and no temporary is needed.
    """
    if bool(torch.isfinite(buffer.sum(dtype=torch.float64))):
        return None
    views = flat.named_views(buffer)
    return next((name for name, view in views if not torch.isfinite(view.sum(dtype=torch.float64))), "padding")


def _load_weights(file: Path, flat: FlatParameters, tensors: dict[str, Any]) -> None:
    if not isinstance(tensors, dict):
        raise CheckpointError(f"{file}: alphafold_state_dict is a {type(tensors).__name__}, not a dictionary")
    _copy_into(file, flat, flat.master, tensors)
    flat.refresh()


def _load_adam(file: Path, flat: FlatParameters, optimizer: Optimizer, names: list[str], state: dict[str, Any]) -> None:
    try:
        entries = state["state"]
        first = {name: entries[i]["exp_avg"] for i, name in enumerate(names)}
        second = {name: entries[i]["exp_avg_sq"] for i, name in enumerate(names)}
        steps = {int(entries[i]["step"]) for i in range(len(names))}
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise CheckpointError(
            f"{file}: optimizer_state_dict is not Adam's over {len(names)} tensors: {type(error).__name__}: {reason}"
        ) from None
    if len(steps) != 1 or min(steps) < 0:
        raise CheckpointError(f"{file}: parameters have different or negative Adam steps {sorted(steps)[:4]}")
    _copy_into(file, flat, optimizer.exp_avg, first, "exp_avg of ")
    _copy_into(file, flat, optimizer.exp_avg_sq, second, "exp_avg_sq of ")
    if bool((optimizer.exp_avg_sq < 0).any()):
        raise CheckpointError(f"{file}: exp_avg_sq holds negative values: these are not Adam's second moments")
    optimizer.adam_step = steps.pop()
