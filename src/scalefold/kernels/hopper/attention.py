"""Attention's forward and gradients for compute capability 9.0 in Gluon, beside ``ops.attention``'s in Triton.

``forward``, ``key_gradients`` and ``row_gradients`` take the arguments of the functions of ``ops.attention`` that they
replace and give the same results, ``lse`` and ``rest`` included, so that either may follow the other. Each has an
obstacle: a Gluon program runs only where it is known to win, which the tuned tables say (HOPPER = 1). All sum in a
fixed order and use no atomics: equal inputs give equal bits.

Triton's interpreter cannot run Gluon. What can be tested without a GPU is that the programs compile and that obstacles
are found; what they compute is tested on a GPU.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false

from typing import Any

import torch
from torch import Tensor

from scalefold.kernels import tuning
from scalefold.kernels.hopper import CONSUMERS, MULTIPROCESSORS, PART, choice

try:
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from scalefold.kernels.hopper.attention_forward import hopper_forward
    from scalefold.kernels.hopper.gradients.attention_keys import hopper_keys
    from scalefold.kernels.hopper.gradients.attention_rows import hopper_rows
    from scalefold.kernels.hopper.pieces import LOG2_E, Mask, Statistics

    MISSING = None
except (ImportError, AttributeError) as error:  # Gluon is experimental: names move between versions
    MISSING = f"this Triton's Gluon is another one: {error}"

LEAST_INF = 1e9  # beside it scores vanish in fp32, which the key gradients rely on in rows without any key
LENGTHS = {True: 256, False: 128}  # keys of a row that the forward takes, with a bias and without one
LEAST, MOST = 129, 256  # keys of a row in the keys' gradients: launch parameters are for 256
WIDTHS = (8, 16, 32)  # channels of a head
NARROWEST = 16  # channels of a product: narrower heads are filled up with zeros by the copy engine


def forward_obstacle(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> str | None:
    """Why ``forward`` cannot or should not run, or None; one text for all lengths of an evaluation's chains."""
    if reason := _obstacle((q, k, v), bias):
        return reason
    if q.shape[2] != LENGTHS[bias is not None]:
        return f"rows are not of {LENGTHS[True]} keys with a bias or {LENGTHS[False]} without"
    return choice.preference(_launch_parameters("attention_hopper_forward", q, bias))


def keys_obstacle(q: Tensor, k: Tensor, v: Tensor, do: Tensor, bias: Tensor, inf: float) -> str | None:
    """Why ``key_gradients`` cannot or should not run, or None."""
    if reason := _obstacle((q, k, v, do), bias):
        return reason
    if not LEAST <= q.shape[2] <= MOST:
        return f"rows of {q.shape[2]} keys, not {LEAST} to {MOST}"
    if inf < LEAST_INF:
        return f"a mask of {inf:g} does not swallow scores"
    return choice.preference(_launch_parameters("attention_hopper_keys", q, bias))


def rows_obstacle(q: Tensor, k: Tensor, v: Tensor, do: Tensor, inf: float) -> str | None:
    """Why ``row_gradients`` cannot or should not run, or None."""
    if reason := _obstacle((q, k, v, do), None):
        return reason
    if not PART < q.shape[2] <= PART * CONSUMERS:
        return f"rows of {q.shape[2]} keys, not {PART + 1} to {PART * CONSUMERS}"
    if inf < LEAST_INF:
        return f"a mask of {inf:g} does not swallow scores"
    return choice.preference(_launch_parameters("attention_hopper_rows", q, None))


def _obstacle(inputs: tuple[Tensor, ...], bias: Tensor | None) -> str | None:
    """What stands in the way of either program; inputs: all that the copy engine takes, [B, S, N, H, D]."""
    if reason := choice.obstacle(MISSING, (*inputs, bias)):
        return reason
    if inputs[0].shape[4] not in WIDTHS:
        return f"{inputs[0].shape[4]} channels per head, not one of {WIDTHS}"
    if not all(map(_is_aligned, inputs)):
        return "the copy engine needs rows that start at multiples of 16 bytes"
    return None


def _launch_parameters(kernel: str, q: Tensor, bias: Tensor | None) -> tuning.Config:
    return tuning.lookup(kernel, **tuning.attention_fields(q, bias is not None))


def _is_aligned(x: Tensor) -> bool:
    """Whether the copy engine can address x: 16-bit values, dense in the last dimension."""
    strides = [stride for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
    even = all(stride > 0 and stride % 8 == 0 for stride in strides)
    return even and x.stride(-1) == 1 and x.data_ptr() % 16 == 0


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor | None, inf: float, save: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``ops.attention._forward``: o, lse and rest; the last two are None unless ``save``."""
    batch, rows, n, heads, width = q.shape
    config = _launch_parameters("attention_hopper_forward", q, bias)
    o = torch.empty_like(q)
    lse, rest = q.new_empty((2, batch, rows, heads, n) if save else (2, 1), dtype=torch.float32).unbind()
    groups, per_program = _groups(rows, config)
    hopper_forward[(n // (PART * CONSUMERS), heads, batch * groups)](
        _tiles(q, PART), _tiles(k, n), _tiles(v, n), _tiles(o, PART),
        bias, None if bias is None else bias.stride()[:3], _mask(mask, inf), Statistics(lse, rest, rows, heads, n),
        rows, per_program, groups,
        SCALE=width**-0.5, SAVE=save, STAGES=config["STAGES"], num_warps=4,
    )  # fmt: skip
    return (o, lse, rest) if save else (o, None, None)


def key_gradients(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor, o: Tensor, do: Tensor, lse: Tensor, rest: Tensor,
    inf: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``ops.attention._key_gradients``: dk, dv and the gradients of the scores [B, S, H, N keys, N queries]."""
    batch, rows, n, heads, width = q.shape
    config = _launch_parameters("attention_hopper_keys", q, bias)
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    ds = q.new_empty(batch, rows, heads, n, tuning.ceil_div(n, 8) * 8)[..., :n]  # lines of whole 16 bytes
    block_q = config["BLOCK_Q"]
    groups = min(config["GROUPS"], rows)
    hopper_keys[(tuning.ceil_div(n, PART * CONSUMERS), heads, batch * groups)](
        *(_tiles(x, block_q) for x in (q, do, o)), *(_tiles(x, PART) for x in (k, v, dk, dv)),
        _scores(ds, PART, block_q), bias, bias.stride()[:3], _mask(mask, inf), Statistics(lse, rest, rows, heads, n),
        rows, groups, SCALE=width**-0.5, KEYS=tuning.power_of_two(n), STAGES=config["STAGES"],
        REGISTERS=config["REGISTERS"], num_warps=4,
    )  # fmt: skip
    return dk, dv, ds


def row_gradients(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, o: Tensor, do: Tensor, lse: Tensor, rest: Tensor, inf: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``ops.attention._gradients``: dq, dk and dv without a bias."""
    batch, rows, n, heads, width = q.shape
    config = _launch_parameters("attention_hopper_rows", q, None)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    groups = min(config["GROUPS"], rows)
    hopper_rows[(1, heads, batch * groups)](
        *(_tiles(x, PART) for x in (q, do, o, k, v, dq, dk, dv)), _mask(mask, inf),
        Statistics(lse, rest, rows, heads, n), rows, groups,
        SCALE=width**-0.5, STAGES=config["STAGES"], REGISTERS=config["REGISTERS"], num_warps=4,
    )  # fmt: skip
    return dq, dk, dv


def _groups(rows: int, config: tuning.Config) -> tuple[int, int]:
    """Into how many groups rows are split, none of them empty, and how many rows a program walks over."""
    per_program = tuning.ceil_div(rows, min(config["GROUPS"], rows))
    return tuning.ceil_div(rows, per_program), per_program


def _tiles(x: Tensor, lines: int) -> Any:
    """How the copy engine takes ``lines`` lines of one head from x: [B, S, N, H, D], or brings them there.

    What lies beyond N or D is read as zero and not written.
    """
    return _descriptor(x, [1, 1, lines, 1, max(NARROWEST, x.shape[-1])])


def _scores(ds: Tensor, keys: int, queries: int) -> Any:
    """The same for tiles of the gradients of scores: [B, S, H, N, N]."""
    return _descriptor(ds.flatten(0, 2), [1, keys, queries])


def _descriptor(x: Tensor, block: list[int]) -> Any:
    strides = [stride if size > 1 else 8 for size, stride in zip(x.shape, x.stride(), strict=True)]
    layout = gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)
    return TensorDescriptor(x, list(x.shape), [*strides[:-1], 1], block, layout)


def _mask(mask: Tensor, inf: float) -> Any:
    return Mask(mask, *mask.stride(), mask.shape[-1], inf * LOG2_E.value)


def forward_default(fields: tuning.Fields, capability: int) -> tuning.Config:
    """As many rows in flight as shared memory holds beside a bias of 256 keys, or without one."""
    return {"HOPPER": 0, "GROUPS": _filling(fields), "STAGES": 2 if fields["bias"] else 4}


def keys_default(fields: tuning.Fields, capability: int) -> tuning.Config:
    """As measured best of a few."""
    return {"HOPPER": 0, "GROUPS": _filling(fields), "STAGES": 2, "REGISTERS": 224, "BLOCK_Q": 64}


def rows_default(fields: tuning.Fields, capability: int) -> tuning.Config:
    """As many rows on their way as shared memory holds."""
    return {"HOPPER": 0, "GROUPS": _filling(fields), "STAGES": 3, "REGISTERS": 232}


def _filling(fields: tuning.Fields) -> int:
    """Groups of rows that fill all multiprocessors once: a program takes one for itself."""
    tiles = int(fields["batch"]) * int(fields["heads"]) * tuning.ceil_div(int(fields["n"]), PART * CONSUMERS)
    return max(1, MULTIPROCESSORS // tiles)


tuning.register("attention_hopper_forward", forward_default)
tuning.register("attention_hopper_keys", keys_default)
tuning.register("attention_hopper_rows", rows_default)
