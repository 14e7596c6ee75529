"""What tests of the row-wise programs in Gluon share."""

from contextlib import ExitStack, contextmanager

import torch

from scalefold.kernels import tuning
from scalefold.kernels.hopper import gated_attention, gradients, triangle_product  # noqa: F401, they register their kernels

KERNELS = (
    *("norm_linear_hopper", "triangle_hopper_gates", "triangle_hopper_operands", "triangle_hopper_output"),
    *("outer_product_hopper", "transition_hopper", "transition_hopper_gradient", "gated_output_hopper"),
    *("transition_hopper_input", "transition_hopper_weights", "transition_hopper_hidden"),
    *("norm_linear_hopper_wide", "outer_product_hopper_operands", "outer_product_hopper_weight"),
    *("triangle_hopper_product", "triangle_hopper_product_gradients"),
    *("gated_output_hopper_gradient", "weight_gradient_hopper"),
)
C = 128


@contextmanager
def every_program(hopper: int):
    """The tables prefer Gluon (1) or Triton (0) for all rows."""
    with ExitStack() as stack:
        for name in KERNELS:
            stack.enter_context(tuning.override(name, {"HOPPER": hopper}))
        yield


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


@contextmanager
def recomputed_transitions():
    """The backward of transitions stores nothing of the hidden layer."""
    tiles = {"RECOMPUTED": 1, **tuning.tile_config((64, 64, 8, 2))}
    with (
        tuning.override("transition_backward", tiles),
        tuning.override("transition_hopper_gradient", {"HOPPER": 0}),
    ):
        yield
