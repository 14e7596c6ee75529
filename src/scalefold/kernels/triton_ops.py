"""The table of Triton operations. Each takes the plain definition where its kernels cannot run, and says so once."""

import functools
import logging
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from scalefold.kernels import reference, tuning
from scalefold.kernels.ops import (
    adam_swa,
    attention,
    elementwise,
    gated_output,
    global_attention,
    layer_norm,
    linear,
    outer_product,
    point_attention,
    point_errors,
    transition,
    triangle,
)
from scalefold.kernels.table import Operations

log = logging.getLogger(__name__)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
MATRIX_DTYPES = (torch.bfloat16, torch.float16)  # fp32 products belong to the library, which offers tf32
_explained: set[tuple[str, str]] = set()


def device_obstacle(device: torch.device) -> str | None:
    """Why kernels cannot run on ``device``, or None. The interpreter runs them on the CPU."""
    if device.type == "cuda" or (INTERPRETED and device.type == "cpu") or device.type == tuning.stand_in():
        return None
    return f"tensors are on {device.type}, not on a CUDA device"


def matrix_obstacle(x: Tensor) -> str | None:
    """Why a kernel with matrix products cannot take ``x``, or None."""
    dtype = str(x.dtype).removeprefix("torch.")
    return device_obstacle(x.device) or (None if x.dtype in MATRIX_DTYPES else f"{dtype} products go to the library")


def buffer_obstacle(x: Tensor) -> str | None:
    """Why a kernel without matrix products cannot take ``x``, or None."""
    return device_obstacle(x.device)


def _explain(name: str, reason: str) -> None:
    if (name, reason) not in _explained:
        _explained.add((name, reason))
        log.info("kernels: plain PyTorch %s: %s", name, reason)


def guarded(fast: Callable[..., Any], plain: Callable[..., Any], obstacle: Callable[[Any], str | None]) -> Callable:
    """``fast`` where ``obstacle`` of the first argument is None, else ``plain`` with the reason logged once."""

    @functools.wraps(plain)
    def operation(first: Any, *arguments: Any, **named: Any) -> Any:
        reason = obstacle(first)
        if reason is None:
            return fast(first, *arguments, **named)
        _explain(plain.__name__, reason)
        return plain(first, *arguments, **named)

    return operation


def dropout_mask(shape: Any, rate: float, device: torch.device) -> Tensor:
    """``reference.dropout_mask``, from the kernel where ``device`` can run it."""
    reason = device_obstacle(torch.device(device))
    if reason is None:
        return elementwise.dropout_mask(shape, rate, device)
    _explain("dropout_mask", reason)
    return reference.dropout_mask(shape, rate, device)


TRITON = Operations(
    name="triton",
    layer_norm=guarded(layer_norm.layer_norm, reference.layer_norm, buffer_obstacle),
    layer_norm_linear=guarded(linear.layer_norm_linear, reference.layer_norm_linear, matrix_obstacle),
    attention=guarded(attention.attention, reference.attention, matrix_obstacle),
    gated_output=guarded(gated_output.gated_output, reference.gated_output, matrix_obstacle),
    transition=guarded(transition.transition, reference.transition, matrix_obstacle),
    outer_product_project=guarded(
        outer_product.outer_product_project, reference.outer_product_project, matrix_obstacle
    ),
    outer_product_update=guarded(outer_product.outer_product_update, reference.outer_product_update, matrix_obstacle),
    triangle_project=guarded(triangle.triangle_project, reference.triangle_project, matrix_obstacle),
    triangle_product=guarded(triangle.triangle_product, reference.triangle_product, matrix_obstacle),
    triangle_output=guarded(triangle.triangle_output, reference.triangle_output, matrix_obstacle),
    global_attention=guarded(global_attention.global_attention, reference.global_attention, matrix_obstacle),
    invariant_point_attention=guarded(
        point_attention.invariant_point_attention, reference.invariant_point_attention, buffer_obstacle
    ),
    point_errors=guarded(point_errors.point_errors, reference.point_errors, buffer_obstacle),
    dropout_mask=dropout_mask,
    adam_swa=guarded(adam_swa.adam_swa, reference.adam_swa, buffer_obstacle),
    sum_of_squares=guarded(adam_swa.sum_of_squares, reference.sum_of_squares, buffer_obstacle),
)
