"""Attention in Gluon on a GPU of compute capability 9.0: what the programs compute, and that its bits repeat."""

import pytest
import torch

from scalefold.kernels.hopper import attention as hopper

ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
on_hopper = pytest.mark.skipif(not ON_HOPPER, reason="needs a GPU of compute capability 9.0")


@pytest.fixture
def scripts(repository, monkeypatch):
    """The folder of the scripts can be imported from."""
    monkeypatch.syspath_prepend(str(repository / "benchmarks" / "measure"))


def case_of(name):
    import hopper_cases

    return next(case for case in hopper_cases.CASES if case.name == name)


BIASED = ["triangle_start", "triangle_end", "triangle_masked", "msa_row_124", "template"]
KEYS_CASES = [*BIASED, "awkward"]
FORWARD_CASES = [*BIASED, "msa_column", "msa_column_dap2", "awkward_rows", "awkward_columns"]
ROWS_CASES = ["msa_column", "msa_column_dap2", "awkward_columns", "short_columns"]
GPU_CASES = [
    *(("keys", name) for name in KEYS_CASES),
    *(("forward", name) for name in FORWARD_CASES),
    *(("rows", name) for name in ROWS_CASES),
]


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize(("pass_", "name"), GPU_CASES)
def test_gluon_is_as_exact_as_its_twin_and_repeats_its_bits(scripts, pass_, name):
    import hopper_cases as cases
    from scalefold.tune.sound import bits

    inputs = cases.inputs_of(case_of(name), "cuda")
    exact, saved = cases.exact_results(inputs), cases.run_forward(cases.TWIN, inputs)
    found = (cases.run(pass_, how, inputs, saved) for how in (cases.HOPPER, cases.TWIN))
    own, other = (cases.errors(results, exact, inputs.mask) for results in found)
    assert cases.too_large(own, other) == [], (own, other)
    assert bits.repeat(lambda: list(cases.run(pass_, cases.HOPPER, inputs, saved).values()), 20) == []


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("name", ["triangle_masked", "msa_row_124", "awkward_rows"])
def test_gradients_from_what_a_gluon_forward_saves_are_as_exact_as_from_its_twin(scripts, name):
    import hopper_cases as cases

    inputs = cases.inputs_of(case_of(name), "cuda")
    exact = cases.exact_results(inputs)
    saved = [cases.run_forward(how, inputs) for how in (cases.HOPPER, cases.TWIN)]
    for how in (cases.HOPPER, cases.TWIN):
        found = (cases.run("keys", how, inputs, results) for results in saved)
        own, other = (cases.errors(results, exact, inputs.mask) for results in found)
        assert cases.too_large(own, other) == [], (own, other)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("name", ["triangle_masked", "awkward_columns"])
def test_a_forward_that_saves_nothing_has_the_same_bits(scripts, name):
    import hopper_cases as cases

    q, k, v, mask, bias, _ = cases.inputs_of(case_of(name), "cuda")
    saving, _, _ = hopper.forward(q, k, v, mask, bias, cases.INF, True)
    o, *statistics = hopper.forward(q, k, v, mask, bias, cases.INF, False)
    assert torch.equal(o, saving)
    assert statistics == [None, None]
