"""Global column attention of the extra-MSA stack (Supplement Algorithm 19), forward and backward, in Triton.

Same meaning as ``reference.global_attention``. The layer norm is recomputed wherever it is needed (a row has only 64
channels), so the large tensor m is read twice forward and twice backward and nothing of its size is saved.

Forward:  ``project_columns`` m -> keys, values and partial sums for the mean query of each column;
          ``attend_columns`` one program per column: mean, query, softmax over the sequences, output o [B, N, H * D];
          ``gate_rows`` m + W_o (sigmoid(gate) * o) + b_o.
Backward: ``gate_columns_backward`` gradients of o, of the gate and of the output projection;
          ``attend_columns_backward`` gradients of keys, values and mean per column; ``rows_backward`` gradients of m
          and of the rest. Weight gradients are one fp32 partial sum per program, added up afterwards.

Sums over the sequences of a column run as products with a 0/1 matrix that says which row of a tile belongs to which
of 16 columns. Keys and values lie as [B, N, S, 2 D], so that a column is one contiguous piece.
"""
# pyright: reportCallIssue=false
# The type checker does not see Triton's launch syntax.

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from scalefold.kernels import tuning
from scalefold.kernels.ops.attention import LOG2_E, matmul_precision
from scalefold.kernels.ops.global_attention_programs import (
    attend_columns,
    attend_columns_backward,
    gate_columns_backward,
    gate_rows,
    project_columns,
    rows_backward,
)
from scalefold.kernels.rows import Affine, Norm, width_obstacle

BLOCK_R = 16  # columns per program of the kernels that sum over sequences: the smallest side of a product


def obstacle(
    m: Tensor,
    mask: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    *_: object,
) -> str | None:
    """Why ``global_attention`` does not take these arguments, or None."""
    return width_obstacle(m.shape[-1], weight_q.shape[0], 2 * weight_k.shape[0], most=128)


def global_attention(
    m: Tensor,
    mask: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    weight_v: Tensor,
    weight_g: Tensor,
    bias_g: Tensor,
    weight_o: Tensor,
    bias_o: Tensor,
    num_heads: int,
    inf: float,
    eps: float,
) -> Tensor:
    """Triton version of ``reference.global_attention``, once differentiable.

    Widths must suit the matrix units: c, H * D and 2 D powers of two of at least 16 and at most 128.
    """
    arguments = (m, mask, norm_weight, norm_bias, weight_q, weight_k, weight_v, weight_g, bias_g, weight_o, bias_o)
    return _GlobalAttention.apply(*arguments, num_heads, inf, eps)


class _GlobalAttention(torch.autograd.Function):
    """Arguments: those of ``global_attention``."""

    @staticmethod
    def forward(ctx: Any, m: Tensor, mask: Tensor, *rest: Any) -> Tensor:
        *weights, num_heads, inf, eps = rest
        m, mask = m.contiguous(), mask.contiguous()
        norm_weight, norm_bias, weight_q, weight_k, weight_v, weight_g, bias_g, weight_o, bias_o = (
            weight.contiguous() for weight in weights
        )
        norm, gate, weight_kv = Norm(norm_weight, norm_bias), Affine(weight_g, bias_g), torch.cat((weight_k, weight_v))
        kv, partial = _projected(m, mask, norm, weight_kv)
        mean, q, o, statistics = _attended(m, mask, weight_q, kv, partial, num_heads, inf, eps)
        out = _gated(m, norm, gate, Affine(weight_o, bias_o), o)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(m, mask, *norm, weight_q, weight_kv, *gate, weight_o, kv, mean, q, o, statistics)
            ctx.num_heads, ctx.inf = num_heads, inf
            ctx.types = [weight.dtype for weight in weights]
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        m, mask, *norm, weight_q, weight_kv, weight_g, bias_g, weight_o, kv, mean, q, o, statistics = ctx.saved_tensors
        norm, gate, d_out = Norm(*norm), Affine(weight_g, bias_g), d_out.contiguous()
        partial, gate_sums = _output_gradient(m, norm, gate, weight_o, o, d_out)
        d_kv, d_q, d_mean = _attended_backward(
            mask, weight_q, kv, q, o, statistics, partial, m.shape[-1], ctx.num_heads, ctx.inf
        )
        d_m, row_sums = _rows_gradient(m, mask, norm, gate, weight_o, weight_kv, o, d_out, d_kv, d_mean)
        c, hd, pair = m.shape[-1], weight_q.shape[0], weight_kv.shape[0]
        d_weight_o, d_weight_g, d_bias_o, d_bias_g = gate_sums.split([c * hd, hd * c, c, hd])
        d_weight_kv, d_scale, d_offset = row_sums.split([pair * c, c, c])
        d_weight_q = d_q.flatten(0, 1).T @ mean.flatten(0, 1)
        d_weight_k, d_weight_v = d_weight_kv.view(2, pair // 2, c).unbind()
        gradients = (
            d_scale, d_offset, d_weight_q, d_weight_k, d_weight_v, d_weight_g.view(hd, c), d_bias_g,
            d_weight_o.view(c, hd), d_bias_o,
        )  # fmt: skip
        typed = (gradient.to(dtype) for gradient, dtype in zip(gradients, ctx.types, strict=True))
        return d_m, None, *typed, None, None, None


def _fields(m: Tensor) -> dict[str, int | str]:
    """What launch parameters depend on; sizes that vary in evaluation are rounded up."""
    return {
        "sequences": tuning.power_of_two(m.shape[0] * m.shape[1]),
        "n": tuning.power_of_two(m.shape[2]),
        "c": m.shape[3],
        "dtype": str(m.dtype).removeprefix("torch."),
    }


def _column_grid(m: Tensor, sequences_per_program: int) -> tuple[int, int, int]:
    batch, sequences, n, _ = m.shape
    return tuning.ceil_div(n, BLOCK_R), tuning.ceil_div(sequences, sequences_per_program), batch


def _projected(m: Tensor, mask: Tensor, norm: Norm, weight_kv: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [B, N, S, 2 D] and partial sums for the mean, fp32 [chunks, B, N, c]."""
    batch, sequences, n, c = m.shape
    config = tuning.lookup("global_attention_columns", **_fields(m))
    grid = _column_grid(m, config["SEQUENCES"])
    kv = m.new_empty(batch, n, sequences, weight_kv.shape[0])
    partial = m.new_empty(grid[1], batch, n, c, dtype=torch.float32)
    project_columns[grid](
        m, mask, norm, weight_kv, kv, partial, sequences, n, config["SEQUENCES"],
        C=c, KV=weight_kv.shape[0], BLOCK_S=config["BLOCK_S"], BLOCK_R=BLOCK_R, PRECISION=matmul_precision(m),
        num_warps=config["num_warps"], num_stages=config["num_stages"],
    )  # fmt: skip
    return kv, partial


def _attended(
    m: Tensor, mask: Tensor, weight_q: Tensor, kv: Tensor, partial: Tensor, num_heads: int, inf: float, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean [B, N, c], query and output [B, N, H * D], statistics fp32 [B, N, 3, H]."""
    batch, sequences, n, c = m.shape
    config = tuning.lookup("global_attention_attend", **_fields(m))
    width = kv.shape[-1] // 2
    mean = m.new_empty(batch, n, c)
    q = m.new_empty(batch, n, num_heads * width)
    # fp32, though small: rounded, it shifts every score's gradient of a head alike, and over 1,024 almost equal weights
    # that is a tenth of the gradients of W_q and W_k
    o = torch.empty_like(q, dtype=torch.float32)
    statistics = m.new_empty(batch, n, 3, num_heads, dtype=torch.float32)
    attend_columns[(batch * n,)](
        partial, mask, weight_q, kv, mean, q, o, statistics, sequences, n, partial.shape[0], inf * LOG2_E, eps,
        LOG2_E * width**-0.5, C=c, H=num_heads, D=width, KV=2 * width, BLOCK_S=config["BLOCK_S"],
        num_warps=config["num_warps"], num_stages=config["num_stages"],
    )  # fmt: skip
    return mean, q, o, statistics


def _gated(m: Tensor, norm: Norm, gate: Affine, output: Affine, o: Tensor) -> Tensor:
    """m + W_o (sigmoid(gate) * o) + b_o."""
    _, sequences, n, c = m.shape
    rows = m.numel() // c
    config = tuning.lookup("global_attention_gate", **_fields(m))
    out = torch.empty_like(m)
    gate_rows[(tuning.ceil_div(rows, config["BLOCK"]),)](
        m, norm, gate, output, o, out, rows, sequences, n,
        C=c, HD=o.shape[-1], BLOCK_M=config["BLOCK"], PRECISION=matmul_precision(m), num_warps=config["num_warps"],
        num_stages=config["num_stages"],
    )  # fmt: skip
    return out


def _output_gradient(
    m: Tensor, norm: Norm, gate: Affine, weight_o: Tensor, o: Tensor, d_out: Tensor
) -> tuple[Tensor, Tensor]:
    """Partial sums of the gradient of o, fp32 [chunks, B, N, H * D]; gradients of W_o, W_g, b_o, b_g in one vector."""
    batch, sequences, n, c = m.shape
    hd = o.shape[-1]
    config = tuning.lookup("global_attention_columns_backward", **_fields(m))
    grid = _column_grid(m, config["SEQUENCES"])
    partial = m.new_empty(grid[1], batch, n, hd, dtype=torch.float32)
    weight_sums = m.new_empty(grid[0] * grid[1] * grid[2], 2 * c * hd + c + hd, dtype=torch.float32)
    gate_columns_backward[grid](
        m, norm, gate, weight_o, o, d_out, partial, weight_sums, sequences, n, config["SEQUENCES"],
        C=c, HD=hd, BLOCK_S=config["BLOCK_S"], BLOCK_R=BLOCK_R, PRECISION=matmul_precision(m),
        num_warps=config["num_warps"], num_stages=config["num_stages"],
    )  # fmt: skip
    return partial, weight_sums.sum(0)


def _attended_backward(
    mask: Tensor, weight_q: Tensor, kv: Tensor, q: Tensor, o: Tensor, statistics: Tensor, partial: Tensor, c: int,
    num_heads: int, inf: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of keys and values [B, N, S, 2 D], of q [B, N, H * D], of the sum under the mean fp32 [B, N, c]."""
    batch, n, sequences, pair = kv.shape
    fields = {
        "sequences": tuning.power_of_two(batch * sequences),
        "n": tuning.power_of_two(n),
        "c": c,
        "dtype": str(kv.dtype).removeprefix("torch."),
    }
    config = tuning.lookup("global_attention_attend_backward", **fields)
    width = pair // 2
    d_kv, d_q = torch.empty_like(kv), torch.empty_like(q)
    d_mean = kv.new_empty(batch, n, c, dtype=torch.float32)
    attend_columns_backward[(batch * n,)](
        partial, mask, weight_q, kv, q, o, statistics, d_kv, d_q, d_mean, sequences, n, partial.shape[0],
        inf * LOG2_E, width**-0.5, LOG2_E * width**-0.5,
        C=c, H=num_heads, D=width, KV=pair, BLOCK_S=config["BLOCK_S"], num_warps=config["num_warps"],
        num_stages=config["num_stages"],
    )  # fmt: skip
    return d_kv, d_q, d_mean


def _rows_gradient(
    m: Tensor, mask: Tensor, norm: Norm, gate: Affine, weight_o: Tensor, weight_kv: Tensor, o: Tensor, d_out: Tensor,
    d_kv: Tensor, d_mean: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradient of m; gradients of W_kv, norm weight and norm bias in one vector."""
    _, sequences, n, c = m.shape
    rows, hd, pair = m.numel() // c, o.shape[-1], weight_kv.shape[0]
    config = tuning.lookup("global_attention_rows_backward", **_fields(m))
    programs = min(config["PROGRAMS"], tuning.ceil_div(rows, config["BLOCK"]))
    d_m = torch.empty_like(m)
    weight_sums = m.new_empty(programs, pair * c + 2 * c, dtype=torch.float32)
    rows_backward[(programs,)](
        m, mask, norm, gate, weight_o, weight_kv, o, d_out, d_kv, d_mean, d_m, weight_sums, rows, sequences, n,
        C=c, HD=hd, KV=pair, BLOCK_M=config["BLOCK"], PRECISION=matmul_precision(m), num_warps=config["num_warps"],
        num_stages=config["num_stages"],
    )  # fmt: skip
    return d_m, weight_sums.sum(0)


def _columns_default(fields: tuning.Fields, capability: int) -> tuning.Config:
    """About two programs per multiprocessor of an H200 (132), so that a DAP share still fills the GPU."""
    tiles = max(1, int(fields["n"]) // BLOCK_R)
    chunk = int(fields["sequences"]) * tiles // 256
    return {"BLOCK_S": 4, "SEQUENCES": min(64, max(8, chunk)), "num_warps": 4, "num_stages": 2}


def _attend_default(fields: tuning.Fields, capability: int) -> tuning.Config:
    return {"BLOCK_S": 64, "num_warps": 4, "num_stages": 1}


def _gate_default(fields: tuning.Fields, capability: int) -> tuning.Config:
    return {"BLOCK": 64, "num_warps": 4, "num_stages": 1}


def _rows_default(fields: tuning.Fields, capability: int) -> tuning.Config:
    return {"BLOCK": 32, "PROGRAMS": 264, "num_warps": 4, "num_stages": 2}


tuning.register("global_attention_columns", _columns_default)
tuning.register("global_attention_columns_backward", _columns_default)
tuning.register("global_attention_attend", _attend_default)
tuning.register("global_attention_attend_backward", _attend_default)
tuning.register("global_attention_gate", _gate_default)
tuning.register("global_attention_rows_backward", _rows_default)


def compile_cases() -> list[tuple[str, Callable[[], None]]]:
    """Forward and backward at the benchmark's shape on meta tensors; see ``tuning``."""
    return [("global_attention", _meta_run)]


def _meta_run() -> None:
    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=True)

    mask = torch.empty((1, 1024, 256), dtype=torch.bfloat16, device="meta")
    weights = [empty(64), empty(64), empty(64, 64), empty(8, 64), empty(8, 64), empty(64, 64), empty(64)]
    global_attention(empty(1, 1024, 256, 64), mask, *weights, empty(64, 64), empty(64), 8, 1e9, 1e-8).sum().backward()
