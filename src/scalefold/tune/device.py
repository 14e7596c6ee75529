"""One trial on the GPU of this process: does the candidate run, agree, repeat its bits, and how long does it take?"""

import gc
from typing import NamedTuple

import torch
from torch import Tensor

from scalefold.kernels import tuning
from scalefold.tune.operation_cases import Case, Inputs
from scalefold.tune.programs import Problem, run_once
from scalefold.tune.sound.bits import repeat
from scalefold.tune.sound.clock import answers, graph_microseconds

LARGEST_DIFFERENCE = 0.02  # relative, between candidates: bf16 rounding in another order
REPLAYS = 12


class Outcome(NamedTuple):
    """Microseconds of the operation, or None with an error; ``bits``: ``equal``, ``differ``, or empty."""

    us: float | None
    bits: str
    error: str


def agrees(found: list[Tensor], expected: list[Tensor]) -> bool:
    """Whether every result is within LARGEST_DIFFERENCE of what is expected."""
    return all(
        bool((a.float() - b.float()).norm() <= LARGEST_DIFFERENCE * b.float().norm() + 1e-6)
        for a, b in zip(found, expected, strict=True)
    )


class Device:
    """The inputs of the case that was tried last, and the results of present choices for it."""

    def __init__(self, cases: list[Case]) -> None:
        self._cases = cases
        self._built = -1
        self._inputs: Inputs | None = None
        self._expected: dict[bool, list[Tensor]] = {}
        gc.freeze()  # each capture collects garbage: what exists by now is none

    def inputs(self, case: int) -> Inputs:
        """Inputs of a case; those of the case before are let go."""
        if case != self._built or self._inputs is None:
            self._inputs, self._built, self._expected = None, case, {}
            torch.cuda.empty_cache()
            self._inputs = self._cases[case].build()
        return self._inputs

    def expected(self, case: int, backward: bool) -> list[Tensor]:
        """What the operation yields with present choices."""
        inputs = self.inputs(case)
        if backward not in self._expected:
            self._expected[backward] = run_once(inputs, backward)
        return self._expected[backward]

    def try_out(self, problem: Problem, config: tuning.Config, repeats: int) -> Outcome:
        """Run, compare, repeat in poisoned memory (not for ``repeats`` 0), and time."""
        try:
            inputs, expected = self.inputs(problem.case), self.expected(problem.case, problem.backward)
            with tuning.override(problem.kernel, config, **problem.fields):
                if not agrees(run_once(inputs, problem.backward), expected):
                    return Outcome(None, "", "disagrees with the present choice")
                differing = repeat(lambda: run_once(inputs, problem.backward), repeats) if repeats else []
                us = graph_microseconds(lambda: run_once(inputs, problem.backward), REPLAYS, 1)
            return Outcome(us, ("differ" if differing else "equal") if repeats else "", "")
        except Exception as error:  # what does not launch here is not for this GPU
            return Outcome(None, "", f"{type(error).__name__}: {error}".splitlines()[0][:120])

    @property
    def works(self) -> bool:
        """Whether the GPU still answers this process."""
        return answers()
