"""Candidates compiled where no GPU is needed: what their programs use, and whether one may be sent to the device.

``compile_candidate`` runs the case of a problem on tensors without data with the candidate in force. Every kernel that
is launched goes to Triton's cache under the key that the device's process looks up later; of those that the problem
itself launches it reads registers, spills and shared memory from the machine code.
"""

import functools
import io
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from scalefold.kernels import triton_ops, tuning
from scalefold.kernels.compiled import faults
from scalefold.kernels.compiled.ahead import compile_wanted, compiling_for, only_recorded
from scalefold.kernels.compiled.machine_code import disassembled, resource_usage
from scalefold.kernels.table import REFERENCE
from scalefold.tune.operation_cases import Case, Inputs, evaluation_cases, on_device, outputs_of, training_cases

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes of one program (CUDA programming guide)
TENSOR_COLUMNS = 512  # of tensor memory in a multiprocessor of 10.0 (PTX manual); Triton refuses to load more


@dataclass
class Problem:
    """One kernel at one set of fields, met in one case; ``backward``: looked up in the backward pass."""

    kernel: str
    fields: dict[str, int | str]
    case: int
    backward: bool

    @property
    def key(self) -> tuple[str, str]:
        return self.kernel, tuning.problem_key(self.fields)


@dataclass(frozen=True)
class Program:
    """What a candidate's kernels use; zeros where the library does the work. ``error``: why it may not run, or empty.

    ``programs``: of the first launch's grid; ``moved_bytes``: of the tensors that it is given.
    """

    registers: int = 0
    spill_bytes: int = 0
    shared_bytes: int = 0
    programs: int = 0
    moved_bytes: int = 0
    error: str = ""


@dataclass(frozen=True)
class _Launch:
    kernel: Any
    programs: int
    moved_bytes: int
    own: bool


def all_cases(daps: list[int], lengths: list[int]) -> list[Case]:
    """The cases of a command line; workers build the same list."""
    training = [case for dap in daps for case in training_cases(dap)]
    return training + [case for length in lengths for case in evaluation_cases(length)]


def daps_of(daps: Sequence[int], lengths: Sequence[int]) -> list[int]:
    """The share that each of ``all_cases`` belongs to; 0 for evaluations."""
    training = [dap for dap in daps for _ in training_cases(dap)]
    return training + [0 for length in lengths for _ in evaluation_cases(length)]


def gradients(outputs: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """Gradients of all leaves that get one; the outputs themselves serve as gradients of the outputs."""
    found = torch.autograd.grad(outputs, leaves, [output.detach() for output in outputs], allow_unused=True)
    return [gradient for gradient in found if gradient is not None]


def run_once(inputs: Inputs, backward: bool) -> list[Tensor]:
    """Outputs, then gradients of all leaves that get one; no autograd graph, whose stream a capture would wait for."""
    outputs = outputs_of(inputs, triton_ops.TRITON)
    found = [output.detach() for output in outputs]
    return found + gradients(outputs, inputs.leaves) if backward else found


@contextmanager
def recorded_lookups() -> Iterator[list[tuple[str, dict[str, int | str]]]]:
    """Collect what kernels look up."""
    found: list[tuple[str, dict[str, int | str]]] = []
    original = tuning.lookup

    def record(name: str, **fields: int | str) -> tuning.Config:
        found.append((name, fields))
        return original(name, **fields)

    tuning.lookup = record
    try:
        yield found
    finally:
        tuning.lookup = original


@contextmanager
def without_launches() -> Iterator[None]:
    """Kernels are neither compiled nor launched, and operations take tensors without data."""
    original, obstacle = JITFunction.run, triton_ops.device_obstacle
    JITFunction.run = lambda self, *arguments, **options: None  # type: ignore[method-assign]
    triton_ops.device_obstacle = lambda device: None
    try:
        yield
    finally:
        JITFunction.run, triton_ops.device_obstacle = original, obstacle  # type: ignore[method-assign]


def find_problems(cases: list[Case], n: int) -> list[Problem]:
    """What case n looks up with present choices; nothing is launched."""
    with on_device("meta"), without_launches(), tuning.assume_capability(tuning.capability()):
        inputs = cases[n].build()
        with recorded_lookups() as forward:
            outputs = outputs_of(inputs, triton_ops.TRITON)
        with recorded_lookups() as backward:
            if cases[n].calls:
                gradients(outputs, inputs.leaves)
    return [
        Problem(name, fields, n, is_backward)
        for found, is_backward in ((forward, False), (backward, True))
        for name, fields in found
    ]


def operations_of(case: Case, backward: bool) -> int:
    """Floating-point operations of the products in the plain definition of a case."""
    with on_device("meta"), FlopCounterMode(display=False) as counter:
        inputs = case.build()
        outputs = outputs_of(inputs, REFERENCE)
        if backward:
            gradients(outputs, inputs.leaves)
    return counter.get_total_flops()


_worker_cases: list[Case] = []
_worker = ExitStack()


def start_worker(daps: list[int], lengths: list[int], capability: int, device_kind: str) -> None:
    """State of a process that compiles: the list of cases, the tables of the GPU that it compiles for, and no GPU."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.nice(5)  # the process that times comes first
    torch.set_num_threads(1)
    tuning._device_capability, tuning.device_kind = (lambda: capability), (lambda: device_kind)
    _worker_cases.extend(all_cases(daps, lengths))
    _worker.enter_context(compiling_for(capability))
    triton_ops.device_obstacle = lambda device: None


def compile_task(problem: Problem, config: tuning.Config) -> Program:
    """``compile_candidate`` in a worker; what the compiler prints of a failure, whole programs, is nobody's to read."""
    with redirect_stdout(io.StringIO()):
        return compile_candidate(problem, config, _worker_cases[problem.case])


def compile_all_cases(workers: int) -> None:
    """Fill Triton's cache with the kernels of all cases as they are chosen at present (in a worker, which forks more).

    A kernel that does not compile is named, and the others are left to whoever asks for them.
    """
    say = functools.partial(print, flush=True)
    with on_device("meta"), only_recorded() as wanted:
        for case in _worker_cases:
            try:
                run_once(case.build(), case.calls > 0)
            except Exception as error:
                say(f"{case.name} does not run on tensors without data: {type(error).__name__}: {str(error)[:200]}")
    try:
        compile_wanted(wanted.values(), workers, say)
    except Exception as error:
        notes = "; ".join(getattr(error, "__notes__", []))
        say(f"a kernel does not compile: {type(error).__name__}: {str(error)[:200]} ({notes})")


def compile_candidate(problem: Problem, config: tuning.Config, case: Case) -> Program:
    """Fill Triton's cache with a candidate's kernels and read what they use (inside ``compiling_for``)."""
    try:
        with tuning.override(problem.kernel, config, **problem.fields), on_device("meta"):
            inputs = case.build()
            with _recorded_launches(problem, config) as launches:
                run_once(inputs, problem.backward)
        return _figures(launches)
    except Exception as error:  # whatever the compiler says, this candidate is not for this GPU
        return Program(error=f"{type(error).__name__}: {error}".splitlines()[0][:120])


@contextmanager
def _recorded_launches(problem: Problem, config: tuning.Config) -> Iterator[list[_Launch]]:
    """Collect compiled kernels. Own ones follow the problem's lookup, or take its launch parameters later."""
    launches: list[_Launch] = []
    original = JITFunction.run

    def record(self: JITFunction, *arguments: Any, grid: Any, **options: Any) -> Any:
        kernel = original(self, *arguments, grid=grid, **options)
        sizes: Any = grid(options) if callable(grid) else grid
        moved = sum(_bytes_of(value) for value in (*arguments, *options.values()))
        looked = [(name, tuning.problem_key(fields)) for name, fields in lookups[-1:]]
        own = looked == [problem.key] or _takes(options, config)
        launches.append(_Launch(kernel, math.prod(sizes), moved, own))
        return kernel

    with recorded_lookups() as lookups:
        JITFunction.run = record  # type: ignore[method-assign]
        try:
            yield launches
        finally:
            JITFunction.run = original  # type: ignore[method-assign]


def _takes(options: dict[str, Any], config: tuning.Config) -> bool:
    shared = options.keys() & config.keys()
    return len(shared) >= 3 and all(options[name] == config[name] for name in shared)


def _bytes_of(value: object) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, TensorDescriptor):
        return _bytes_of(value.base)
    return sum(map(_bytes_of, value)) if isinstance(value, tuple) else 0


def _figures(launches: list[_Launch]) -> Program:
    own = [launch for launch in launches if launch.own]
    wrong = {launch.kernel.name: found[0] for launch in launches if (found := _examined(launch.kernel)[0])}
    shared = max((launch.kernel.metadata.shared for launch in own), default=0)
    usage = [_examined(launch.kernel)[1:] for launch in own]
    error = "; ".join(f"{name}: {fault}" for name, fault in wrong.items())
    if own and shared > SHARED_LIMIT[own[0].kernel.metadata.target.arch]:
        error = f"shared memory: {shared} bytes"
    if (columns := max((tensor_columns(launch.kernel) for launch in own), default=0)) > TENSOR_COLUMNS:
        error = f"tensor memory: {columns} columns"
    return Program(
        registers=max((registers for registers, _ in usage), default=0),
        spill_bytes=sum(spilled for _, spilled in usage),
        shared_bytes=shared,
        programs=own[0].programs if own else 0,
        moved_bytes=own[0].moved_bytes if own else 0,
        error=error,
    )


def tensor_columns(kernel: Any) -> int:
    """Columns of tensor memory that a compiled kernel takes: none before 10.0."""
    return getattr(kernel.metadata, "tmem_size", None) or 0


def _examined(kernel: Any) -> tuple[list[str], int, int]:
    """Faults of a compiled kernel, its registers, and its bytes in local memory."""
    return _read(kernel.asm["ttgir"], kernel.asm["ptx"], kernel.asm["cubin"], kernel.metadata.num_warps)


@functools.cache
def _read(ttgir: str, ptx: str, cubin: bytes, num_warps: int) -> tuple[list[str], int, int]:
    listing = disassembled(cubin)
    return faults(ttgir, ptx, listing, num_warps), *resource_usage(listing)
