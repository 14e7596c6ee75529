"""The table of Triton operations: the one place that says which implementation an operation takes, and why.

Every operation lists its obstacles, functions of its arguments. The first that gives a reason sends the call to the
plain definition, and the log says so once per operation and reason. Kernels themselves never fall back.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from triton.runtime import jit

from scalefold.kernels import reference, tuning
from scalefold.kernels.around import embedding, heads, losses, naming, point_errors, templates
from scalefold.kernels.choice import explain
from scalefold.kernels.instructions import INTERPRETED
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
    transition,
    triangle,
    triangle_product,
)
from scalefold.kernels.structure import iterations, placement
from scalefold.kernels.table import Operations

MATRIX_DTYPES = (torch.bfloat16, torch.float16)  # fp32 products belong to the library, which offers tf32
Obstacle = Callable[..., str | None]  # of an operation's arguments: why its kernels cannot take them, or None


def hash_callees_first() -> None:
    """Make a kernel's key in Triton's cache one and the same, whatever else this process has asked for before it.

    Triton up to 3.7 takes constants of the functions that a program calls into its key only if another program that
    calls them was looked up earlier (triton-lang/triton#10494): a rank that only evaluates would compile anew what the
    whole configuration has, and processes that compile by turns would file kernels where no run looks.
    """
    finder = jit.DependenciesFinder
    original = getattr(finder, "_update_hash", None)

    def update(self: jit.DependenciesFinder, function: Any) -> None:
        function.cache_key  # noqa: B018  (it is computed once, and its constants are known from then on)
        original(self, function)  # type: ignore[misc]

    if original is not None:
        finder._update_hash = update  # type: ignore[method-assign]


hash_callees_first()


def device_obstacle(device: torch.device) -> str | None:
    """Why kernels cannot run on ``device``, or None. The interpreter runs them on the CPU."""
    if device.type == "cuda" or (INTERPRETED.value and device.type == "cpu") or device.type == tuning.stand_in():
        return None
    return f"tensors are on {device.type}, not on a CUDA device"


def buffer_obstacle(x: Tensor, *_: object) -> str | None:
    """Why a kernel without matrix products cannot take ``x``, or None."""
    return device_obstacle(x.device)


def matrix_obstacle(x: Tensor, *_: object) -> str | None:
    """Why a kernel with matrix products cannot take ``x``, or None."""
    dtype = str(x.dtype).removeprefix("torch.")
    return device_obstacle(x.device) or (None if x.dtype in MATRIX_DTYPES else f"{dtype} products go to the library")


def linears_obstacle(*_: object, linears: Sequence[Sequence[Tensor]], **__: object) -> str | None:
    """Why a kernel with products of these layers' weights cannot take them, or None."""
    return matrix_obstacle(linears[0][0])


def draw_obstacle(shape: object, rate: float, device: torch.device) -> str | None:
    """Why a kernel cannot draw on ``device``, or None."""
    return device_obstacle(torch.device(device))


def groups_obstacle(groups: Sequence[Sequence[Tensor]], *_: object) -> str | None:
    """The same for groups of tensors that lie together."""
    return device_obstacle(groups[0][0].device)


def guarded(fast: Callable[..., Any], plain: Callable[..., Any], *obstacles: Obstacle) -> Callable[..., Any]:
    """``fast`` where no obstacle stands in the way of the arguments, else ``plain`` with the reason logged once."""

    @functools.wraps(fast)
    def operation(*arguments: Any, **named: Any) -> Any:
        for obstacle in obstacles:
            if reason := obstacle(*arguments, **named):
                explain(f"plain PyTorch {fast.__name__}", reason)
                return plain(*arguments, **named)
        return fast(*arguments, **named)

    return operation


TRITON = Operations(
    name="triton",
    layer_norm=guarded(layer_norm.layer_norm, reference.layer_norm, buffer_obstacle, layer_norm.obstacle),
    layer_norm_linear=guarded(linear.layer_norm_linear, reference.layer_norm_linear, matrix_obstacle, linear.obstacle),
    attention=guarded(attention.attention, reference.attention, matrix_obstacle),
    gated_output=guarded(gated_output.gated_output, reference.gated_output, matrix_obstacle, gated_output.obstacle),
    transition=guarded(transition.transition, reference.transition, matrix_obstacle, transition.obstacle),
    outer_product_project=guarded(
        outer_product.outer_product_project,
        reference.outer_product_project,
        matrix_obstacle,
        outer_product.project_obstacle,
    ),
    outer_product_update=guarded(
        outer_product.outer_product_update,
        reference.outer_product_update,
        matrix_obstacle,
        outer_product.update_obstacle,
    ),
    triangle_project=guarded(
        triangle.triangle_project, reference.triangle_project, matrix_obstacle, triangle.project_obstacle
    ),
    triangle_product=guarded(triangle_product.triangle_product, reference.triangle_product, matrix_obstacle),
    triangle_output=guarded(
        triangle.triangle_output, reference.triangle_output, matrix_obstacle, triangle.output_obstacle
    ),
    global_attention=guarded(
        global_attention.global_attention, reference.global_attention, matrix_obstacle, global_attention.obstacle
    ),
    invariant_point_attention=guarded(
        point_attention.invariant_point_attention,
        reference.invariant_point_attention,
        buffer_obstacle,
        point_attention.obstacle,
    ),
    structure_iterations=guarded(
        iterations.structure_iterations, reference.structure_iterations, buffer_obstacle, iterations.obstacle
    ),
    embed_pairs=guarded(embedding.embed_pairs, reference.elsewhere, linears_obstacle, embedding.obstacle),
    embed_letters=guarded(embedding.embed_letters, reference.elsewhere, linears_obstacle, embedding.obstacle),
    embed_extra=guarded(embedding.embed_extra, reference.elsewhere, linears_obstacle, embedding.obstacle),
    embed_template_pairs=guarded(
        embedding.embed_template_pairs, reference.elsewhere, linears_obstacle, embedding.obstacle
    ),
    place_residues=guarded(placement.place_residues, reference.elsewhere, buffer_obstacle, placement.obstacle),
    add_templates=guarded(templates.add_templates, reference.elsewhere, matrix_obstacle, templates.obstacle),
    linear_head=guarded(heads.linear_head, reference.linear_head, matrix_obstacle, heads.obstacle),
    better_naming=guarded(naming.better_naming, reference.better_naming, buffer_obstacle, naming.obstacle),
    side_losses=guarded(losses.side_losses, reference.elsewhere, groups_obstacle, losses.obstacle),
    point_errors=guarded(point_errors.point_errors, reference.point_errors, buffer_obstacle, point_errors.obstacle),
    dropout_mask=guarded(elementwise.dropout_mask, reference.dropout_mask, draw_obstacle),
    adam_swa=guarded(adam_swa.adam_swa, reference.adam_swa, buffer_obstacle),
    sum_of_squares=guarded(adam_swa.sum_of_squares, reference.sum_of_squares, buffer_obstacle),
)
