"""The operations table: every operation has one plain definition and may have a faster version.

Modules of the model hold an attribute ``ops`` (the plain table unless told otherwise) and call ``self.ops.attention``
and so on. ``use_operations`` swaps the table of a finished model from outside, so two configurations can live in one
process and the model never names a GPU. This module knows no implementation but the plain one: ``choice`` finds the
others.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from scalefold.kernels import reference


@dataclass(frozen=True)
class Operations:
    """One implementation of every operation; signatures and meaning are those of ``kernels.reference``."""

    name: str
    layer_norm: Callable[..., Any] = reference.layer_norm
    layer_norm_linear: Callable[..., Any] = reference.layer_norm_linear
    attention: Callable[..., Any] = reference.attention
    gated_output: Callable[..., Any] = reference.gated_output
    transition: Callable[..., Any] = reference.transition
    outer_product_project: Callable[..., Any] = reference.outer_product_project
    outer_product_update: Callable[..., Any] = reference.outer_product_update
    triangle_project: Callable[..., Any] = reference.triangle_project
    triangle_product: Callable[..., Any] = reference.triangle_product
    triangle_output: Callable[..., Any] = reference.triangle_output
    global_attention: Callable[..., Any] = reference.global_attention
    invariant_point_attention: Callable[..., Any] = reference.invariant_point_attention
    structure_iterations: Callable[..., Any] = reference.structure_iterations
    embed_pairs: Callable[..., Any] = reference.elsewhere
    embed_letters: Callable[..., Any] = reference.elsewhere
    embed_extra: Callable[..., Any] = reference.elsewhere
    embed_template_pairs: Callable[..., Any] = reference.elsewhere
    place_residues: Callable[..., Any] = reference.elsewhere
    add_templates: Callable[..., Any] = reference.elsewhere
    linear_head: Callable[..., Any] = reference.linear_head
    better_naming: Callable[..., Any] = reference.better_naming
    side_losses: Callable[..., Any] = reference.elsewhere
    point_errors: Callable[..., Any] = reference.point_errors
    dropout_mask: Callable[..., Any] = reference.dropout_mask
    adam_swa: Callable[..., Any] = reference.adam_swa
    sum_of_squares: Callable[..., Any] = reference.sum_of_squares


REFERENCE = Operations("reference")


def use_operations(model: nn.Module, ops: Operations) -> None:
    """Let every module of ``model`` that calls operations take them from ``ops``."""
    for module in model.modules():
        if hasattr(module, "ops"):
            module.ops = ops  # type: ignore[assignment]
