"""What all launches of the row-wise Gluon programs for compute capability 9.0 share: obstacles, views, sizes.

Rows must lie densely in the memory order of the main tensor and come in whole tiles; everything else stays with the
Triton twins.
"""

import os
from collections.abc import Callable, Sequence

import torch
import triton
from torch import Tensor

from scalefold.kernels import tuning

ROWS, SIDES, WARPS = 64, 2, 4  # of a tile; consumers of a program, each with tiles of its own; warps of a consumer
SHARED_LIMIT = 227 * 1024  # bytes that a program may use on 9.0
SHARED_REST = 1024  # bytes for barriers, what the compiler reduces through and what it hands to groups of warps
SUPPORTED = "3.6."  # Tritons whose Gluon these programs are written for
MULTIPROCESSORS = 132  # where no device says otherwise


def device_obstacle(x: Tensor) -> str | None:
    """Why no Gluon program can run on the device of x, or None."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "the interpreter cannot run Gluon"
    if tuning.capability() != 90:
        return "written for compute capability 9.0 alone"
    if not triton.__version__.startswith(SUPPORTED):
        return f"written for the Gluon of Triton {SUPPORTED}x"
    return None if x.dtype == torch.bfloat16 else "written for bf16 alone"


def dense_rows(tensor: Tensor, order: Sequence[int]) -> Tensor | None:
    """[*, w] as a view [rows, w] for the copy engine, rows numbered in ``order``; None if it cannot take it."""
    ordered = tensor.permute(*order, -1)
    step = ordered.stride(-2) if ordered.dim() > 1 else ordered.shape[-1]
    for size, stride in zip(reversed(ordered.shape[:-1]), reversed(ordered.stride()[:-1]), strict=True):
        if size != 1 and stride != step:
            return None
        step *= size
    return _engine_view(ordered, (ordered.shape[:-1].numel(), ordered.shape[-1]), ordered.stride(-2))


def channel_rows(tensor: Tensor, order: Sequence[int]) -> Tensor | None:
    """[*, w], stored channels first, as a view [w, rows] for the copy engine; None if it cannot take it."""
    ordered = tensor.permute(-1, *order)
    count, step = ordered.shape[1:].numel(), 1
    for size, stride in zip(reversed(ordered.shape[1:]), reversed(ordered.stride()[1:]), strict=True):
        if size != 1 and stride != step:
            return None
        step *= size
    return _engine_view(ordered, (ordered.shape[0], count), ordered.stride(0))


def _engine_view(tensor: Tensor, shape: tuple[int, int], stride: int) -> Tensor | None:
    """A view [shape] with rows ``stride`` apart; None unless rows begin at multiples of 16 bytes and are dense."""
    dense = tensor.stride(-1) == 1 and stride % 8 == 0 and tensor.data_ptr() % 16 == 0
    return tensor.as_strided(shape, (stride, 1)) if dense else None


def described(tensor: Tensor, rows: int, columns: int):
    """A matrix for the copy engine, in blocks [rows, columns]."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    layout = gl.NVMMASharedLayout.get_default_for([rows, columns], gl.bfloat16)
    return TensorDescriptor.from_tensor(tensor, [rows, columns], layout)


def aligned(weight: Tensor) -> Tensor:
    """A dense weight that begins at a multiple of 16 bytes: itself or a copy."""
    return weight if weight.data_ptr() % 16 == 0 else weight.clone()


def multiprocessors(device: torch.device) -> int:
    """How many programs run at once on ``device``."""
    if device.type != "cuda":
        return MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def programs_for(x: Tensor, tiles: int, groups: int = 1) -> int:
    """One program per multiprocessor, a multiple of ``groups``, and none without tiles."""
    return groups * max(1, min(multiprocessors(x.device) // groups, triton.cdiv(tiles, SIDES)))


def stages_within(used: int, slot: int, most: int, least: int) -> int:
    """Slots of ``slot`` bytes per consumer that fit beside ``used`` bytes, at most ``most``.

    Raises ValueError if fewer than ``least`` fit: with fewer, loader and consumer would wait for each other.
    """
    stages = min(most, (SHARED_LIMIT - SHARED_REST - used) // (SIDES * slot))
    if stages < least:
        raise ValueError(f"{stages} slots per consumer, at least {least} are needed: less must be staged beside them")
    return stages


def register(name: str, default: tuple[int, ...], names: Sequence[str], *candidates: tuple[int, ...]) -> None:
    """Register a program with the launch parameters ``names``; the first, USED, says whether it beats its twin."""
    choices = [dict(zip(names, values, strict=True)) for values in (default, (0, *default[1:]), *candidates)]
    fallback: Callable[..., tuning.Config] = lambda fields, capability: choices[0]  # noqa: E731
    tuning.register(name, default=fallback, candidates=lambda fields: choices[1:])


def slower(config: tuning.Config) -> str | None:
    """The obstacle that the table of launch parameters names."""
    return None if config["USED"] else "the Triton kernel is faster here"


def whole_tiles(x: Tensor) -> str | None:
    count = x.shape[:-1].numel()
    return None if count % ROWS == 0 and count > 0 else f"rows do not come in tiles of {ROWS}"


def in_order(order: Sequence[int], flat: Tensor, shape: Sequence[int]) -> Tensor:
    """View of flat [rows, w], rows numbered in ``order``, as [*shape, w]."""
    inverse = [list(order).index(d) for d in range(len(order))]
    return flat.view(*[shape[d] for d in order], flat.shape[-1]).permute(*inverse, len(order))
