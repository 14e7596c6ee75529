"""Softmax attention with and without a pair bias, forward and backward, in Triton.

Same meaning as ``reference.attention``. The benchmark's rows are short (128 or 256 keys), so one program holds whole
rows of scores on chip and no score is ever written to memory, only, where there is a bias, its gradient:

* forward: a program owns one tile of queries of one head and walks over several rows s; the bias tile, the same for
  all rows, is read once per program. Longer rows (evaluation) are walked in key tiles with a running maximum. Where it
  is faster, a Gluon program of ``kernels.hopper`` takes its place.
* backward without a bias: a program owns one (row, head) and walks over key tiles; probabilities are recomputed tile by
  tile from saved statistics. Five products per tile, of which two take probabilities or their gradients transposed
  through shared memory. For up to 128 keys, where it is faster, a Gluon program takes its place.
* backward with a bias, in two launches. ``backward_keys`` owns one tile of keys of a (row, head) and walks over
  queries: dk, dv, and the gradients of the scores, kept in the type of q; here too Gluon takes its place
  where it is faster. ``backward_queries`` owns a tile of queries of a head and walks over a group of rows, from the
  end, where the keys' programs have just been: each tile of these gradients gives dq and is added to the bias
  gradient, in fp32 registers; the few partial sums
  (one per group) are added afterwards. No atomics. Computing the scores again for the bias gradient, in a form that
  keeps nothing, is slower.

Softmax runs in base 2. Per row of scores the forward saves ``lse`` = max + log2(sum) and
``rest`` = 2^(lse - max) / sum. ``rest`` is 1 except in rows without any key left: there max is about -inf * log2(e),
whose fp32 spacing swallows the log2(sum), and ``rest`` restores the factor, so that these rows keep their uniform
weights in the backward too.
"""
# pyright: reportCallIssue=false
# The type checker does not see Triton's launch syntax.

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from scalefold.kernels import tuning
from scalefold.kernels.hopper import attention as hopper
from scalefold.kernels.hopper.choice import chosen
from scalefold.kernels.ops.attention_programs import (
    backward_keys,
    backward_queries,
    backward_rows,
    forward_rows,
    forward_tiled,
)
from scalefold.kernels.ops.elementwise import dense
from scalefold.kernels.rows import View, sum_partials

LOG2_E = math.log2(math.e)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor | None, inf: float) -> Tensor:
    """Triton version of ``reference.attention``; gradients of q, k, v and bias, once differentiable.

    q, k, v: [B, S, N, H, D] with any strides over B, S, N, H (copied if D is not contiguous), D <= 128; mask:
    [B, S, N]; bias: [B, H, N, N] (copied if keys are not
    contiguous) or None -> [B, S, N, H, D] in the type and memory order of q.
    """
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    if bias is not None and bias.stride(-1) != 1:  # read once per row of q: a copy beats as many gathers
        bias = bias.contiguous()
    return _Attention.apply(q, k, v, mask, bias, inf)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor | None, inf: float) -> Tensor:
        save = any(ctx.needs_input_grad)
        gluon = chosen("attention forward", hopper.forward_obstacle(q, k, v, bias))
        take = hopper.forward if gluon else _forward
        o, lse, rest = take(q, k, v, mask, bias, inf, save)
        if save:
            ctx.save_for_backward(q, k, v, mask, bias, o, lse, rest)
            ctx.inf = inf
        return o

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask, bias, o, lse, rest = ctx.saved_tensors
        do = do if do.stride(-1) == 1 else do.contiguous()
        if bias is None:
            gluon = chosen("attention gradients", hopper.rows_obstacle(q, k, v, do, ctx.inf))
            take = hopper.row_gradients if gluon else _gradients
            return *take(q, k, v, mask, o, do, lse, rest, ctx.inf), None, None, None
        gluon = chosen("attention keys' gradients", hopper.keys_obstacle(q, k, v, do, bias, ctx.inf))
        take = hopper.key_gradients if gluon else _key_gradients
        dk, dv, ds = take(q, k, v, mask, bias, o, do, lse, rest, ctx.inf)
        dq, d_bias = _query_gradients(q, k, bias, ds)
        return dq, dk, dv, None, d_bias, None


def _blocks(config: tuning.Config, n: int, width: int) -> tuple[int, int, int, bool]:
    """Tile sizes cut down to the row length, and whether tiles cover rows and channels exactly."""
    longest = max(16, tuning.power_of_two(n))
    block_q, block_k = min(config["BLOCK_Q"], longest), min(config["BLOCK_K"], longest)
    return block_q, block_k, max(16, tuning.power_of_two(width)), n % block_q == 0 and n % block_k == 0


def matmul_precision(x: Tensor) -> str:
    """fp32 products follow PyTorch's switch for its own; it does not concern 16-bit types."""
    return "tf32" if x.dtype != torch.float32 or torch.backends.cuda.matmul.allow_tf32 else "ieee"


def _views(*tensors: Tensor) -> tuple[View, ...]:
    """Tensors [B, S, N, H, D], or with slices in front, for programs that know that channels lie side by side."""
    return tuple(View(x, x.stride()[:-1]) for x in tensors)


def _whole(x: Tensor) -> View:
    """A tensor with all its strides."""
    return View(x, x.stride())


def _constants(
    q: Tensor, config: tuning.Config, blocks: tuple[int, int, int, bool], with_heads: Sequence[Tensor]
) -> dict[str, Any]:
    """Arguments that every program has; ``with_heads``: tensors [*, H, D] whose heads may start at aligned places."""
    block_q, block_k, block_d, even = blocks
    return {
        "SCALE": q.shape[-1] ** -0.5,
        "D": q.shape[-1],
        "BLOCK_D": block_d,
        "BLOCK_Q": block_q,
        "BLOCK_K": block_k,
        "EVEN": even,
        "ALIGN": 8 if all(x.stride(-2) % 8 == 0 for x in with_heads) else 1,
        "PRECISION": matmul_precision(q),
        "STAGES": config["STAGES"],
        "num_warps": config["num_warps"],
        "maxnreg": config.get("maxnreg"),
    }


def _forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor | None, inf: float, save: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    batch, rows, n, heads, width = q.shape
    config = tuning.lookup("attention_forward", **tuning.attention_fields(q, bias is not None))
    blocks = _blocks(config, n, width)
    block_q, block_k = blocks[:2]
    o = torch.empty_like(q)
    lse, rest = q.new_empty((2, batch, rows, heads, n) if save else (2, 1), dtype=torch.float32).unbind()
    tensors = (*_views(q, k, v), _whole(mask), None if bias is None else _whole(bias), *_views(o), lse, rest)
    options = _constants(q, config, blocks, (q, k, v, o)) | {"SAVE": save}
    if n <= config["UNROLLED"]:
        group = min(config["ROWS"], rows)
        grid = (tuning.ceil_div(n, block_q), tuning.ceil_div(rows, group), batch * heads)
        options["STEPS"] = tuning.ceil_div(n, block_k)
        forward_rows[grid](*tensors, rows, n, heads, group, inf * LOG2_E, **options)
    else:
        grid = (tuning.ceil_div(n, block_q), rows, batch * heads)
        forward_tiled[grid](*tensors, rows, n, heads, inf * LOG2_E, **options)
    return (o, lse, rest) if save else (o, None, None)


def _gradients(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, o: Tensor, do: Tensor, lse: Tensor, rest: Tensor, inf: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv without a bias."""
    batch, rows, n, heads, width = q.shape
    config = tuning.lookup("attention_backward", **tuning.attention_fields(q, False))
    blocks = _blocks(config, n, width)
    chunks = tuning.ceil_div(n, blocks[0])
    dq = torch.empty_like(q)
    if chunks == 1:
        dk, dv = torch.empty_like(k)[None], torch.empty_like(v)[None]
    else:
        dk, dv = (torch.empty((chunks, *x.shape), dtype=torch.float32, device=x.device) for x in (k, v))
    backward_rows[(rows * heads, chunks, batch)](
        *_views(q, k, v), _whole(mask), *_views(o, do), lse, rest, *_views(dq, dk, dv), rows, n, heads, inf * LOG2_E,
        **_constants(q, config, blocks, (q, k, v, o, do, dq, dk, dv)),
    )  # fmt: skip
    if chunks == 1:
        return dq, dk[0], dv[0]
    return dq, dk.sum(0).to(k.dtype), dv.sum(0).to(v.dtype)


def _key_gradients(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor, o: Tensor, do: Tensor, lse: Tensor, rest: Tensor,
    inf: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dk, dv and the gradients of the scores [B, S, H, N keys, N queries] in the type of q."""
    batch, rows, n, heads, width = q.shape
    config = tuning.lookup("attention_backward_keys", **tuning.attention_fields(q, bias is not None))
    blocks = _blocks(config, n, width)
    dk, dv, ds = torch.empty_like(k), torch.empty_like(v), q.new_empty(batch, rows, heads, n, n)
    bias = dense(bias.transpose(-1, -2))  # a copy beats a gather per row of q
    backward_keys[(tuning.ceil_div(n, blocks[1]) * heads, rows, batch)](
        *_views(q, k, v), _whole(mask), _whole(bias), *_views(o, do), lse, rest, *_views(ds, dk, dv),
        rows, n, heads, inf * LOG2_E, **_constants(q, config, blocks, (q, k, v, o, do, dk, dv)),
    )  # fmt: skip
    return dk, dv, ds


def _query_gradients(q: Tensor, k: Tensor, bias: Tensor, ds: Tensor) -> tuple[Tensor, Tensor]:
    """dq and the gradient of the bias, along keys or queries as ``_is_along_keys`` wants it."""
    batch, rows, n, heads, width = q.shape
    config = tuning.lookup("attention_backward_queries", **tuning.attention_fields(q, bias is not None))
    blocks = _blocks(config, n, width)
    parts, groups = tuning.ceil_div(n, blocks[1]), min(config["GROUPS"], rows)
    along_keys = _is_along_keys(q)
    dq = torch.empty_like(q)
    dqs = dq[None] if parts == 1 else q.new_empty((parts, *q.shape), dtype=torch.float32)
    partial = q.new_empty((groups, batch, heads, n, n), dtype=torch.float32)
    backward_queries[(tuning.ceil_div(n, blocks[0]) * parts, groups, batch * heads)](
        *_views(k, ds, dqs, partial), rows, n, heads, ALONG_KEYS=along_keys,
        **_constants(q, config, blocks, (k, dq)),
    )  # fmt: skip
    if parts > 1:
        dq = dqs.sum(0).to(q.dtype)
    d_bias = sum_partials(partial.flatten(1), bias.dtype).view(batch, heads, n, n)
    return dq, d_bias if along_keys else d_bias.transpose(-1, -2)


def _is_along_keys(q: Tensor) -> bool:
    """How the gradient of the bias shall lie: as the representation that it was projected from, which wants its rows
    in memory order (``linear``). Around an ending node that is transposed, and so is q.
    """
    return q.stride(1) >= q.stride(2)


def _config(block_q: int, block_k: int, num_warps: int, stages: int, **extra: int) -> tuning.Config:
    return {"BLOCK_Q": block_q, "BLOCK_K": block_k, "num_warps": num_warps, "STAGES": stages, **extra}


def _forward_default(fields: tuning.Fields, capability: int) -> tuning.Config:
    if fields["dtype"] == "float32":
        return _config(64, 64, 4, 1, ROWS=1, UNROLLED=0)
    if int(fields["n"]) > 256:
        return _config(64, 64, 4, 2, ROWS=1, UNROLLED=0)
    return _config(64, 64, 4, 2, ROWS=8 if int(fields["rows"]) >= 128 else 2, UNROLLED=256)


def _backward_default(fields: tuning.Fields, capability: int) -> tuning.Config:
    return _config(64, 32, 4, 1) if fields["dtype"] == "float32" else _config(128, 64, 4, 1)


def _keys_default(fields: tuning.Fields, capability: int) -> tuning.Config:
    if fields["dtype"] == "float32":
        return _config(32, 64, 4, 1)
    return _config(64, 64, 4, 1)


def _queries_default(fields: tuning.Fields, capability: int) -> tuning.Config:
    """As many row groups as fill 132 multiprocessors with two programs in one wave."""
    if fields["dtype"] == "float32":
        return _config(16, 128, 4, 1, GROUPS=8)
    tiles = int(fields["batch"]) * int(fields["heads"]) * tuning.ceil_div(int(fields["n"]), 64)
    return _config(64, 256, 8, 2, GROUPS=max(1, 264 // tiles))


tuning.register("attention_forward", _forward_default)
tuning.register("attention_backward", _backward_default)
tuning.register("attention_backward_keys", _keys_default)
tuning.register("attention_backward_queries", _queries_default)

COMPILE_SHAPES: dict[str, tuple[tuple[int, ...], bool]] = {
    "triangle": ((1, 256, 256, 4, 32), True),
    "msa_row": ((1, 128, 256, 8, 32), True),
    "msa_column": ((1, 256, 128, 8, 32), False),
    "template": ((4, 256, 256, 4, 16), True),
    "extra_msa_row": ((1, 1024, 256, 8, 8), True),
    "evaluation": ((1, 704, 704, 4, 32), True),
}


def compile_cases() -> list[tuple[str, Callable[[], None]]]:
    """Forward and backward at the benchmark's shapes on meta tensors; see ``tuning``."""
    return [
        (f"attention_{name}", lambda shape=shape, with_bias=with_bias: _meta_run(shape, with_bias))
        for name, (shape, with_bias) in COMPILE_SHAPES.items()
    ]


def _meta_run(shape: tuple[int, ...], with_bias: bool) -> None:
    batch, rows, n, heads, _ = shape
    q, k, v = (torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=True) for _ in range(3))
    mask = torch.empty((batch, rows, n), dtype=torch.bfloat16, device="meta")
    bias = torch.empty((batch, heads, n, n), dtype=torch.bfloat16, device="meta", requires_grad=True)
    attention(q, k, v, mask, bias if with_bias else None, 1e9).sum().backward()
