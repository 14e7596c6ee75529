"""Gradients by programs in Gluon: which calls take them; what they compute: ``test_kernels_hopper_accuracy.py``."""

import pytest
import torch
import triton.language as tl

from hopper_programs import C, empty, every_program
from scalefold.kernels import tuning
from scalefold.kernels.hopper import choice as hopper_choice
from scalefold.kernels.hopper import gradients


@pytest.fixture
def compiled(monkeypatch):
    """As outside the interpreter, for 9.0."""
    monkeypatch.setattr(hopper_choice, "INTERPRETED", tl.constexpr(False))
    with tuning.assume_capability(90):
        yield


def transition_gradient_obstacle(x, hidden=512, d_out=None, name=gradients.TRANSITION_NAMES[0]):
    c, d_out = x.shape[-1], torch.empty_like(x) if d_out is None else d_out
    return gradients.transition_obstacle(name, x, d_out, [empty(hidden, c), empty(c, hidden)])


@pytest.mark.parametrize("name", gradients.TRANSITION_NAMES)
@pytest.mark.parametrize("x", [empty(1, 16, 64, C), empty(1, 16, 8, C).transpose(1, 2)], ids=["dense", "transposed"])
def test_gradients_of_a_transition_of_pairs_have_no_obstacle(compiled, x, name):
    with every_program(1):
        assert transition_gradient_obstacle(x, name=name) is None
    assert transition_gradient_obstacle(x, name=name) == "the table prefers the Triton program"


def outer_gradient_obstacle(sequences, i, j, a=None, name=gradients.NAMES[0]):
    a = empty(sequences, i, 32) if a is None else a
    return gradients.obstacle(name, empty(i, j, C), a, empty(sequences, j, 32), empty(C, 1024))


@pytest.mark.parametrize("name", gradients.NAMES)
@pytest.mark.parametrize("sequences", [5, 128])
def test_gradients_of_an_outer_product_of_few_sequences_have_no_obstacle(compiled, sequences, name):
    with every_program(1):
        assert outer_gradient_obstacle(sequences, 64, 128, name=name) is None
    found_faster = (sequences, name) == (128, "outer_product_hopper_weight")
    obstacle = outer_gradient_obstacle(sequences, 64, 128, name=name)
    assert obstacle == (None if found_faster else "the table prefers the Triton program")


def test_partial_gradients_of_an_outer_product_become_gradients_in_the_operands_own_order():
    total = torch.arange(32 * 3 * 128).view(32, 3, 128)
    found = gradients.operand_of(total.flatten(), torch.empty(5, 3, 32))
    assert torch.equal(found, total[:, :, :5].permute(2, 1, 0))


@pytest.mark.parametrize(
    ("obstacle", "reason"),
    [
        (lambda: transition_gradient_obstacle(empty(1, 16, 64, 256), 1024), "256 channels with 1024 hidden ones"),
        (lambda: transition_gradient_obstacle(empty(1, 16, 64, C), 128), "128 channels with 128 hidden ones"),
        (lambda: transition_gradient_obstacle(empty(1, 3, 21, C)), "rows do not come in tiles of 64"),
        (
            lambda: transition_gradient_obstacle(empty(1, 16, 64, C), d_out=empty(1, 64, 16, C).transpose(1, 2)),
            "gradients of the output",
        ),
        (lambda: outer_gradient_obstacle(8, 64, 68), "pairs do not come in tiles of 64 x 64"),
        (lambda: outer_gradient_obstacle(129, 64, 64), "not up to 128 sequences"),
        (lambda: outer_gradient_obstacle(8, 64, 64, empty(64, 8, 32).transpose(0, 1)), "sequences or the weight do"),
    ],
)
def test_what_the_programs_cannot_take_is_named(compiled, obstacle, reason):
    with every_program(1):
        assert reason in str(obstacle())
