"""Every module at production sizes against the reference's outputs and gradients."""

import pytest

from parity import golden, modules

FORWARD_BOUND, GRADIENT_BOUND = 2e-5, 1e-4


@pytest.mark.parametrize("name", list(modules.CASES))
def test_module_and_its_gradients_equal_the_reference(name: str) -> None:
    golden.locate_or_skip(f"module_{name}.npz")
    errors = modules.measure(name)
    assert errors.forward <= FORWARD_BOUND
    assert errors.gradient <= GRADIENT_BOUND, errors.worst_gradient
