"""Compile every Triton kernel for compute capability 8.0, 9.0 and 10.0 without a GPU; list what ptxas made of it.

    python benchmarks/measure/compile_targets.py [--targets 80 90 100] [--only NAME] [--modules M ...] [--csv out.csv]
    python benchmarks/measure/compile_targets.py --faults          # those only, for 9.0, at the shapes of DAP 1 too
    python benchmarks/measure/compile_targets.py --faults --dap 1 2 4 8 --evaluation 320 704

Each kernel module names representative calls (``compile_cases``, see ``scalefold.kernels.tuning``); ``--dap`` and
``--evaluation`` take every operation at the shapes of those shares and lengths instead. They run on meta tensors; each
launch is recorded instead of executed and compiled with the launch parameters of the target. Exit status 1 if a kernel
does not compile, if its shared or tensor memory exceeds what a program may use there, or if the compiler or assembler
made it wrong (``scalefold.kernels.compiled``, which does not know the products of 10.0).
"""

import argparse
import contextlib
import csv
import importlib
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if "triton" not in sys.modules:  # with it, it is settled
    os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource, make_backend
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import JITFunction, create_function_from_signature

from scalefold.kernels import triton_ops, tuning
from scalefold.kernels.compiled import faults
from scalefold.kernels.compiled.machine_code import disassembled
from scalefold.processors import processors
from scalefold.tune import operation_cases
from scalefold.tune.programs import SHARED_LIMIT, TENSOR_COLUMNS, tensor_columns

SHARED_PER_SM = {target: limit + 1024 for target, limit in SHARED_LIMIT.items()}
REGISTERS_PER_SM, WARPS_PER_SM = 65536, 64


@dataclass
class Launch:
    """One recorded kernel launch."""

    kernel: JITFunction
    args: tuple[Any, ...]
    grid: tuple[int, ...]
    options: dict[str, Any]


@dataclass
class Report:
    """What one compiled kernel uses; ``programs_per_sm`` by registers, warps, shared and tensor memory.

    ``tensor_columns`` and ``tcgen05`` (products there) are those of 10.0, zero elsewhere.
    """

    case: str
    kernel: str
    target: int
    grid: str
    warps: int
    registers: int
    spill_bytes: int
    shared_kib: float
    tensor_columns: int
    programs_per_sm: int
    wgmma: int
    tcgen05: int
    mma: int
    options: str
    faults: str


@contextlib.contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Collect launches of jitted kernels instead of running them; operations take meta tensors meanwhile."""
    launches: list[Launch] = []
    original, obstacle = JITFunction.run, triton_ops.device_obstacle

    def record(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launches.append(Launch(self, args, grid if isinstance(grid, tuple) else (), options))

    JITFunction.run = record  # type: ignore[method-assign]
    triton_ops.device_obstacle = lambda device: None
    try:
        yield launches
    finally:
        JITFunction.run, triton_ops.device_obstacle = original, obstacle  # type: ignore[method-assign]


def source_of(launch: Launch, gpu: GPUTarget) -> tuple[ASTSource, dict[str, Any]]:
    """What the run-time would compile for these arguments, divisibility hints included, and its options."""
    backend = make_backend(gpu)
    binder = create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
    options = {"debug": False, **launch.options}
    bound, specialization, options = binder(*launch.args, **options)
    options, signature, constexprs, attrs = launch.kernel._pack_args(
        backend, {**launch.options, "debug": False}, bound, specialization, options
    )
    language = GluonASTSource if launch.kernel.is_gluon() else ASTSource
    return language(launch.kernel, signature, constexprs, attrs), options.__dict__


def compile_launch(launch: Launch, target: int) -> Any:
    """The compiled kernel of a launch."""
    gpu = GPUTarget("cuda", target, 32)
    source, options = source_of(launch, gpu)
    return triton.compile(source, target=gpu, options=options)


def ptxas_usage(ptx: str, target: int) -> tuple[int, int]:
    """Registers per thread and bytes of spill stores plus loads, from ``ptxas -v``."""
    name = f"sm_{target}a" if target >= 90 else f"sm_{target}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [get_ptxas(target).path, "-v", f"--gpu-name={name}", str(path), "-o", f"{path}.o"]
        log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    registers = max(int(n) for n in re.findall(r"Used (\d+) registers", log))
    return registers, sum(int(n) for n in re.findall(r"(\d+) bytes spill", log))


def report(case: str, launch: Launch, target: int) -> Report:
    """Compile one launch and read its resource use."""
    compiled = compile_launch(launch, target)
    ptx = compiled.asm["ptx"]
    registers, spill = ptxas_usage(ptx, target)
    warps, shared, columns = compiled.metadata.num_warps, compiled.metadata.shared, tensor_columns(compiled)
    allocated = -(-registers // 8) * 8 * 32 * warps
    resident = min(REGISTERS_PER_SM // allocated, WARPS_PER_SM // warps, SHARED_PER_SM[target] // (shared + 1024))
    resident = min(resident, TENSOR_COLUMNS // columns) if columns else resident
    constants = {k: v for k, v in launch.options.items() if k not in ("num_warps", "debug")}
    return Report(
        case=case,
        kernel=launch.kernel.fn.__name__,
        target=target,
        grid="x".join(map(str, launch.grid)),
        warps=warps,
        registers=registers,
        spill_bytes=spill,
        shared_kib=round(shared / 1024, 1),
        tensor_columns=columns,
        programs_per_sm=resident,
        wgmma=len(re.findall(r"wgmma\.mma_async", ptx)),
        tcgen05=len(re.findall(r"tcgen05\.mma\.", ptx)),
        mma=len(re.findall(r"mma\.sync\.aligned\.m", ptx)),
        options=" ".join(f"{k}={v}" for k, v in constants.items() if isinstance(v, int | str)),
        faults="; ".join(faults_of(compiled)),
    )


def faults_of(compiled: Any) -> list[str]:
    """What makes results of a compiled kernel wrong, one line each."""
    outputs = compiled.asm["ttgir"], compiled.asm["ptx"], disassembled(compiled.asm["cubin"])
    return faults(*outputs, compiled.metadata.num_warps)


ROOMS = (
    *("scalefold.kernels", "scalefold.kernels.ops", "scalefold.kernels.around", "scalefold.kernels.structure"),
    "scalefold.parallel.dap",
)


def all_cases(modules: list[str] | None) -> list[tuple[str, Callable[[], None]]]:
    """Named calls of the chosen kernel modules (default: every module that has some)."""
    rooms = [importlib.import_module(name) for name in ROOMS]
    names = [f"{room.__name__}.{module.name}" for room in rooms for module in pkgutil.iter_modules(room.__path__)]
    chosen = sorted((name.rpartition(".")[2], name) for name in names)
    found = [importlib.import_module(name) for leaf, name in chosen if not modules or leaf in modules]
    return [case for module in found if hasattr(module, "compile_cases") for case in module.compile_cases()]


def shape_cases(daps: list[int], lengths: list[int]) -> list[tuple[str, Callable[[], None]]]:
    """Every operation at the shapes of training shares, forward and backward, and of chains, forward only."""
    training = [(f"dap{dap} {case.name}", case) for dap in daps for case in operation_cases.training_cases(dap)]
    forward = [(f"{n} {case.name}", case) for n in lengths for case in operation_cases.evaluation_cases(n)]
    return [(name, lambda case=case: _meta_run(case)) for name, case in training + forward]


def _meta_run(case: operation_cases.Case) -> None:
    with operation_cases.on_device("meta"):
        inputs = case.build()
        outputs = operation_cases.outputs_of(inputs, triton_ops.TRITON)
        if case.calls:
            torch.autograd.grad(outputs, inputs.leaves, [torch.empty_like(o) for o in outputs], allow_unused=True)


def different_launches(
    cases: list[tuple[str, Callable[[], None]]], target: int, key: Callable[[Launch], str]
) -> Iterator[tuple[str, list[Launch]]]:
    """Launches of each case, without those whose key a launch of this or an earlier case had."""
    seen: set[str] = set()
    for name, call in cases:
        with tuning.assume_capability(target), recorded_launches() as launches:
            call()
        fresh = {key(launch): launch for launch in reversed(launches)}
        yield name, [launch for own, launch in reversed(fresh.items()) if own not in seen]
        seen |= fresh.keys()


def identity(launch: Launch, target: int) -> str:
    """Equal for launches that take the same compiled kernel."""
    source, options = source_of(launch, GPUTarget("cuda", target, 32))
    return f"{source.hash()} {sorted(options.items(), key=str)}"


def reports(cases: list[tuple[str, Callable[[], None]]], targets: list[int]) -> Iterator[Report]:
    """Compile each different launch of each case once per target."""
    for target in targets:
        for case in cases:
            for name, launches in different_launches([case], target, _text_key):
                yield from (report(name, launch, target) for launch in launches)


def _text_key(launch: Launch) -> str:
    constants = {name: value for name, value in launch.options.items() if _is_constant(value)}
    return f"{launch.kernel.fn.__name__} {constants}"


def _is_constant(value: object) -> bool:
    """Whether an argument by name is a number, a word or several of them: tensors and views come by name too."""
    if isinstance(value, tuple):
        return all(map(_is_constant, value))
    return value is None or isinstance(value, int | float | str)


def faults_of_case(place: int, target: int) -> dict[str, list[str]]:
    """By identity of every different kernel of a case: a line for each fault."""
    name, call = _cases[place]
    found = {}
    for _, launches in different_launches([(name, call)], target, lambda launch: identity(launch, target)):
        for launch in launches:
            own = faults_of(compile_launch(launch, target))
            found[identity(launch, target)] = [f"{name}: {launch.kernel.fn.__name__}: {fault}" for fault in own]
    return found


_cases: list[tuple[str, Callable[[], None]]] = []  # of the processes that judge: functions cannot be sent to them


def print_faults(cases: list[tuple[str, Callable[[], None]]], target: int, workers: int) -> int:
    """Judge every different kernel of the cases and name faulty ones; exit status 1 if there are some, or none ran.

    BrokenProcessPool: the compiler has ended a process.
    """
    _cases[:] = cases
    judged: dict[str, list[str]] = {}
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
        for done, found in enumerate(pool.map(faults_of_case, range(len(cases)), [target] * len(cases)), 1):
            for line in (line for key, lines in found.items() if key not in judged for line in lines):
                print(line, flush=True)
            judged |= found
            if done * 10 // len(cases) > (done - 1) * 10 // len(cases):
                print(f"{done} of {len(cases)} cases", flush=True)
    faulty = sum(bool(lines) for lines in judged.values())
    print(f"{len(judged)} kernels of {len(cases)} cases for {target / 10}: {faulty} faulty")
    return int(faulty > 0 or not judged)


def main() -> int:
    """Print one line per kernel; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", type=int, nargs="+", choices=list(SHARED_LIMIT), help="default: all; of faults 90")
    parser.add_argument("--modules", nargs="+", help="modules with kernels (default: all)")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--csv", type=Path, help="also write the table here")
    parser.add_argument("--faults", action="store_true", help="only look for faults, of modules and of shares")
    parser.add_argument("--dap", type=int, nargs="+", help="every operation at these training shares")
    parser.add_argument("--evaluation", type=int, nargs="+", default=[], metavar="LENGTH", help="chains, forward only")
    arguments = parser.parse_args()
    daps = arguments.dap or ([1] if arguments.faults and not arguments.modules else [])
    shapes = shape_cases(daps, arguments.evaluation)
    cases = shapes + (all_cases(arguments.modules) if arguments.faults or not shapes else [])
    cases = [case for case in cases if arguments.only in case[0]]
    if arguments.faults:
        return max(print_faults(cases, target, processors()) for target in arguments.targets or [90])
    return print_reports(cases, arguments.targets or list(SHARED_LIMIT), arguments.csv)


def print_reports(cases: list[tuple[str, Callable[[], None]]], targets: list[int], table: Path | None) -> int:
    """One line per kernel, also as a CSV file; exit status 1 if one is too large or faulty, or there is none."""
    rows = []
    bad = False
    print(
        f"{'case':28}{'kernel':26}target warps regs spill  smem KiB  tmem  per SM  wgmma  tcgen05  mma  grid  options"
    )
    for row in reports(cases, targets):
        rows.append(row)
        too_large = row.shared_kib * 1024 > SHARED_LIMIT[row.target] or row.tensor_columns > TENSOR_COLUMNS
        bad |= too_large or bool(row.faults)
        print(
            f"{row.case:28}{row.kernel:26}{row.target:6} {row.warps:5} {row.registers:4} {row.spill_bytes:5}"
            f" {row.shared_kib:9.1f} {row.tensor_columns:5} {row.programs_per_sm:7} {row.wgmma:6} {row.tcgen05:8}"
            f" {row.mma:4}  {row.grid}  {row.options}{'  TOO LARGE' if too_large else ''}"
            f"{'  FAULTS: ' + row.faults if row.faults else ''}",
            flush=True,
        )
    if table and rows:
        with table.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(asdict(rows[0])))
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)
    return int(bad or not rows)


if __name__ == "__main__":
    sys.exit(main())
