"""Attention for compute capability 9.0 in Gluon, beside the Triton programs of ``ops.attention``.

``forward``, ``key_gradients`` and ``query_gradients`` take the arguments of the functions of ``ops.attention`` that
they replace and give the same results, ``lse`` and ``rest`` included, so that either may follow the other. Each has an
obstacle: a Gluon program runs only where it is known to win, which the tuned tables say (HOPPER = 1). All programs sum
in a fixed order and use no atomics: equal inputs give equal bits.

Triton's interpreter cannot run Gluon. What can be tested without a GPU is that the programs compile and that obstacles
are found; what they compute is tested on a GPU.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false

import math
import os
from typing import Any

import torch
from torch import Tensor

from scalefold.kernels import tuning
from scalefold.kernels.rows import sum_partials

try:
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from scalefold.kernels.hopper.attention_forward import hopper_forward
    from scalefold.kernels.hopper.attention_keys import hopper_keys
    from scalefold.kernels.hopper.attention_queries import hopper_queries
    from scalefold.kernels.hopper.pieces import Mask, Statistics

    MISSING = None
except (ImportError, AttributeError) as error:  # Gluon is experimental: names move between versions
    MISSING = f"this Triton's Gluon is another one: {error}"

CAPABILITY = 90
LOG2_E = math.log2(math.e)
LEAST_INF = 1e9  # beside it scores vanish in fp32, which the key gradients rely on in rows without any key
LEAST, MOST = 65, 256  # keys of a row
WIDTHS = (8, 16, 32)  # channels of a head
NARROWEST = 16  # channels of a product: narrower heads are filled up with zeros by the copy engine
PART, CONSUMERS = 64, 2  # lines of scores per consumer; consumers of a program
MULTIPROCESSORS = 132
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def forward_obstacle(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, inf: float) -> str | None:
    """Why ``forward`` cannot or should not run, or None."""
    return _obstacle(q, (q, k, v), inf) or _preference("attention_hopper_forward", q, bias)


def keys_obstacle(q: Tensor, k: Tensor, v: Tensor, do: Tensor, bias: Tensor, inf: float) -> str | None:
    """Why ``key_gradients`` cannot or should not run, or None."""
    return _obstacle(q, (q, k, v, do), inf) or _preference("attention_hopper_keys", q, bias)


def queries_obstacle(q: Tensor, k: Tensor, bias: Tensor, ds: Tensor) -> str | None:
    """Why ``query_gradients`` cannot or should not run, or None."""
    return _obstacle(q, (k, ds), LEAST_INF) or _preference("attention_hopper_queries", q, bias)


def _obstacle(q: Tensor, inputs: tuple[Tensor, ...], inf: float) -> str | None:
    """What no table can overcome."""
    n, width = q.shape[2], q.shape[4]
    if MISSING or INTERPRETED:
        return MISSING or "the interpreter cannot run Gluon"
    if tuning.capability() != CAPABILITY:
        return f"compute capability {tuning.capability() / 10} is not 9.0"
    if q.dtype != torch.bfloat16:
        return f"{str(q.dtype).removeprefix('torch.')} is not bfloat16"
    if not LEAST <= n <= MOST or width not in WIDTHS:
        return f"rows of {n} keys with {width} channels per head, not {LEAST} to {MOST} with {WIDTHS}"
    if inf < LEAST_INF:
        return f"a mask of {inf:g} does not swallow scores"
    if not all(map(_is_aligned, inputs)):
        return "the copy engine needs rows that start at multiples of 16 bytes"
    return None


def _preference(kernel: str, q: Tensor, bias: Tensor | None) -> str | None:
    return None if tuning.lookup(kernel, **_fields(q, bias))["HOPPER"] else "the table prefers the Triton program"


def _is_aligned(x: Tensor) -> bool:
    """Whether the copy engine can address x: 16-bit values, dense in the last dimension."""
    strides = [stride for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
    even = all(stride > 0 and stride % 8 == 0 for stride in strides)
    return even and x.stride(-1) == 1 and x.data_ptr() % 16 == 0


def _fields(q: Tensor, bias: Tensor | None) -> dict[str, int | str]:
    """What launch parameters depend on, as in ``ops.attention``."""
    batch, rows, n, heads, width = q.shape
    return {
        "batch": batch,
        "rows": tuning.power_of_two(rows),
        "n": tuning.power_of_two(n),
        "heads": heads,
        "d": width,
        "bias": int(bias is not None),
        "dtype": str(q.dtype).removeprefix("torch."),
    }


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor | None, inf: float, save: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``ops.attention._forward``: o, lse and rest; the last two are None unless ``save``."""
    batch, rows, n, heads, width = q.shape
    config = tuning.lookup("attention_hopper_forward", **_fields(q, bias))
    keys = tuning.power_of_two(n)
    o = torch.empty_like(q)
    lse, rest = q.new_empty((2, batch, rows, heads, n) if save else (2, 1), dtype=torch.float32).unbind()
    groups, per_program = _groups(rows, config)
    hopper_forward[(tuning.ceil_div(n, PART * CONSUMERS), heads, batch * groups)](
        _tiles(q, PART), _tiles(k, keys), _tiles(v, keys), _tiles(o, PART),
        bias, None if bias is None else bias.stride()[:3], _mask(mask, inf), Statistics(lse, rest, rows, heads, n),
        rows, per_program, groups,
        SCALE=width**-0.5, SAVE=save, WIDE_BIAS=bool(config["WIDE_BIAS"]), AHEAD=config["AHEAD"],
        TURNS=config["TURNS"], STAGES=config["STAGES"], REGISTERS=config["REGISTERS"], num_warps=4,
    )  # fmt: skip
    return (o, lse, rest) if save else (o, None, None)


def key_gradients(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor, o: Tensor, do: Tensor, lse: Tensor, rest: Tensor,
    inf: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``ops.attention._key_gradients``: dk, dv and the gradients of the scores [B, S, H, N keys, N queries]."""
    batch, rows, n, heads, width = q.shape
    config = tuning.lookup("attention_hopper_keys", **_fields(q, bias))
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    ds = q.new_empty(batch, rows, heads, n, tuning.ceil_div(n, 8) * 8)[..., :n]  # lines of whole 16 bytes
    block_q = config["BLOCK_Q"]
    groups, per_program = _groups(rows, config)
    hopper_keys[(tuning.ceil_div(n, PART * CONSUMERS), heads, batch * groups)](
        _tiles(q, block_q), _tiles(do, block_q), _tiles(k, PART), _tiles(v, PART),
        _tiles(dk, PART), _tiles(dv, PART), _scores(ds, PART, block_q),
        bias, bias.stride()[:3], _mask(mask, inf), Statistics(lse, rest, rows, heads, n),
        (o, o.stride()[:4], do, do.stride()[:4]), rows, per_program, groups,
        SCALE=width**-0.5, D=width, KEYS=tuning.power_of_two(n), STAGES=config["STAGES"],
        REGISTERS=config["REGISTERS"], num_warps=4,
    )  # fmt: skip
    return dk, dv, ds


def query_gradients(q: Tensor, k: Tensor, bias: Tensor, ds: Tensor) -> tuple[Tensor, Tensor]:
    """``ops.attention._query_gradients``: dq and the gradient of the bias, a view with keys outermost."""
    batch, rows, n, heads, width = q.shape
    config = tuning.lookup("attention_hopper_queries", **_fields(q, bias))
    half = tuning.power_of_two(n) // 2
    dq = torch.empty_like(q)
    groups, per_program = _groups(rows, config)
    partial = q.new_empty((groups, batch, heads, n, n), dtype=torch.float32)
    hopper_queries[(tuning.ceil_div(n, PART), heads, batch * groups)](
        _tiles(k, half), _scores(ds, half, PART), _tiles(dq, PART), partial, partial.stride()[:4],
        rows, n, heads, per_program, groups,
        SCALE=width**-0.5, STAGES=config["STAGES"], REGISTERS=config["REGISTERS"], num_warps=4,
    )  # fmt: skip
    return dq, sum_partials(partial.flatten(1), bias.dtype).view(batch, heads, n, n).transpose(-1, -2)


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
    return Mask(mask, *mask.stride(), mask.shape[-1], inf * LOG2_E)


def _config(hopper: int, groups: int, stages: int, registers: int, **extra: int) -> tuning.Config:
    return {"HOPPER": hopper, "GROUPS": max(1, groups), "STAGES": stages, "REGISTERS": registers, **extra}


def _programs(fields: tuning.Fields, lines: int) -> int:
    """Groups of rows that fill all multiprocessors once: a program takes one for itself."""
    tiles = int(fields["batch"]) * int(fields["heads"]) * tuning.ceil_div(int(fields["n"]), lines)
    return MULTIPROCESSORS // tiles


def _forward_default(fields: tuning.Fields, capability: int) -> tuning.Config:
    return _forward_candidates(fields)[0] | {"HOPPER": 0}


def _forward_candidates(fields: tuning.Fields) -> list[tuning.Config]:
    groups = _programs(fields, PART * CONSUMERS)
    if not fields["bias"]:
        return [_config(1, groups, 4, 240, WIDE_BIAS=0, AHEAD=2, TURNS=turns) for turns in (1, 0)]
    orders = [(2, 2), (2, 1), (2, 0), (1, 1), (0, 0)]
    wide = [_config(1, groups, 2, 240, WIDE_BIAS=1, AHEAD=ahead, TURNS=turns) for ahead, turns in orders]
    return wide + [_config(1, groups, 3, 240, WIDE_BIAS=0, AHEAD=1, TURNS=1)]


def _keys_default(fields: tuning.Fields, capability: int) -> tuning.Config:
    return _keys_candidates(fields)[0] | {"HOPPER": 0}


def _keys_candidates(fields: tuning.Fields) -> list[tuning.Config]:
    groups = _programs(fields, PART * CONSUMERS)
    return [_config(1, groups, 2, registers, BLOCK_Q=64) for registers in (224, 232)]


def _queries_default(fields: tuning.Fields, capability: int) -> tuning.Config:
    return _queries_candidates(fields)[0] | {"HOPPER": 0}


def _queries_candidates(fields: tuning.Fields) -> list[tuning.Config]:
    return [_config(1, _programs(fields, PART), stages, 216) for stages in (4, 3, 2)]


tuning.register("attention_hopper_forward", _forward_default, _forward_candidates)
tuning.register("attention_hopper_keys", _keys_default, _keys_candidates)
tuning.register("attention_hopper_queries", _queries_default, _queries_candidates)
