"""One trial on the GPU of this process: does the candidate run, agree, repeat its bits, and how long does it take?"""

import gc
import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from scalefold.kernels import tuning
from scalefold.tune.operation_cases import Case, Inputs
from scalefold.tune.programs import Problem, run_once
from scalefold.tune.sound.bits import repeat

LARGEST_DIFFERENCE = 0.02  # relative, between candidates: bf16 rounding in another order
REPLAYS = 12


class Outcome(NamedTuple):
    """Microseconds of the operation, or None with an error; ``bits``: ``equal``, ``differ``, or empty."""

    us: float | None
    bits: str
    error: str


def capture(call: Callable[[], object], warm_up: int = 3) -> torch.cuda.CUDAGraph:
    """A CUDA graph of ``call`` after ``warm_up`` eager calls, on the current stream if that is none of the default one.

    Leaves whose gradients were taken on another stream before would make the capture wait for that stream.
    """
    current = torch.cuda.current_stream()
    stream = torch.cuda.Stream() if current == torch.cuda.default_stream() else current
    gc.collect()  # an autograd graph left from another stream would make the capture wait for that stream
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm_up):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        call()
    return graph


def graph_microseconds(call: Callable[[], object], replays: int, warm_up: int) -> float:
    """Median device time of replays of a captured call."""
    graph = capture(call, warm_up)
    graph.replay()
    times = []
    for _ in range(replays):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(1000 * start.elapsed_time(stop))
    return statistics.median(times)


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
            return Outcome(None, "", f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:120])
