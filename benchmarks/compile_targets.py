"""Compile every Triton kernel for compute capability 8.0 and 9.0 without a GPU, and list what ptxas made of it.

    python benchmarks/compile_targets.py [--targets 80 90] [--only triangle] [--modules attention ...] [--csv out.csv]

Each kernel module names representative calls (``compile_cases``, see ``scalefold.kernels.tuning``). They run on meta
tensors; each launch is recorded instead of executed and compiled with the launch parameters of the target. Exit status
1 if a kernel does not compile, or if its shared memory exceeds what a program may use there.
"""

import argparse
import contextlib
import csv
import importlib
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # must be settled before triton is imported

import triton
import triton.knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

import scalefold.kernels
from scalefold.kernels import tuning

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}  # bytes one program may use (CUDA programming guide)
SHARED_PER_SM = {80: 164 * 1024, 90: 228 * 1024}
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
    """What one compiled kernel uses; ``programs_per_sm`` by registers, shared memory and warps."""

    case: str
    kernel: str
    target: int
    grid: str
    warps: int
    registers: int
    spill_bytes: int
    shared_kib: float
    programs_per_sm: int
    wgmma: int
    mma: int
    options: str


@contextlib.contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Collect launches of jitted kernels instead of running them."""
    launches: list[Launch] = []
    original = JITFunction.run

    def record(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launches.append(Launch(self, args, grid if isinstance(grid, tuple) else (), options))

    JITFunction.run = record  # type: ignore[method-assign]
    try:
        yield launches
    finally:
        JITFunction.run = original  # type: ignore[method-assign]


def compile_launch(launch: Launch, target: int) -> Any:
    """Compile as the run-time would for these arguments, divisibility hints included."""
    gpu = GPUTarget("cuda", target, 32)
    backend = make_backend(gpu)
    binder = create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
    options = {"debug": False, **launch.options}
    bound, specialization, options = binder(*launch.args, **options)
    options, signature, constexprs, attrs = launch.kernel._pack_args(
        backend, {**launch.options, "debug": False}, bound, specialization, options
    )
    source = ASTSource(launch.kernel, signature, constexprs, attrs)
    return triton.compile(source, target=gpu, options=options.__dict__)


def ptxas_usage(ptx: str, target: int) -> tuple[int, int]:
    """Registers per thread and bytes of spill stores plus loads, from ``ptxas -v``."""
    name = f"sm_{target}a" if target >= 90 else f"sm_{target}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [triton.knobs.nvidia.ptxas.path, "-v", f"--gpu-name={name}", str(path), "-o", f"{path}.o"]
        log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    registers = max(int(n) for n in re.findall(r"Used (\d+) registers", log))
    return registers, sum(int(n) for n in re.findall(r"(\d+) bytes spill", log))


def report(case: str, launch: Launch, target: int) -> Report:
    """Compile one launch and read its resource use."""
    compiled = compile_launch(launch, target)
    ptx = compiled.asm["ptx"]
    registers, spill = ptxas_usage(ptx, target)
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    allocated = -(-registers // 8) * 8 * 32 * warps
    resident = min(REGISTERS_PER_SM // allocated, WARPS_PER_SM // warps, SHARED_PER_SM[target] // (shared + 1024))
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
        programs_per_sm=resident,
        wgmma=len(re.findall(r"wgmma\.mma_async", ptx)),
        mma=len(re.findall(r"mma\.sync\.aligned\.m", ptx)),
        options=" ".join(f"{k}={v}" for k, v in constants.items() if isinstance(v, int | str)),
    )


def all_cases(modules: list[str] | None) -> list[tuple[str, Callable[[], None]]]:
    """Named calls of the chosen kernel modules (default: every module that has some)."""
    names = modules or [module.name for module in pkgutil.iter_modules(scalefold.kernels.__path__)]
    found = [importlib.import_module(f"scalefold.kernels.{name}") for name in names]
    return [case for module in found if hasattr(module, "compile_cases") for case in module.compile_cases()]


def reports(cases: list[tuple[str, Callable[[], None]]], targets: list[int]) -> Iterator[Report]:
    """Compile each different launch of the cases once per target."""
    for target in targets:
        for name, call in cases:
            with tuning.assume_capability(target), recorded_launches() as launches:
                call()
            seen: set[str] = set()
            for launch in launches:
                key = f"{launch.kernel.fn.__name__} {launch.options}"
                if key not in seen:
                    seen.add(key)
                    yield report(name, launch, target)


def main() -> int:
    """Print one line per kernel; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", type=int, nargs="+", default=[80, 90], choices=[80, 90])
    parser.add_argument("--modules", nargs="+", help="modules of scalefold.kernels (default: all)")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--csv", type=Path, help="also write the table here")
    arguments = parser.parse_args()
    cases = [case for case in all_cases(arguments.modules) if arguments.only in case[0]]
    rows = []
    too_large = False
    print(f"{'case':28}{'kernel':26}target warps regs spill  smem KiB  per SM  wgmma  mma  grid  options")
    for row in reports(cases, arguments.targets):
        rows.append(row)
        too_large |= row.shared_kib * 1024 > SHARED_LIMIT[row.target]
        print(
            f"{row.case:28}{row.kernel:26}{row.target:6} {row.warps:5} {row.registers:4} {row.spill_bytes:5}"
            f" {row.shared_kib:9.1f} {row.programs_per_sm:7} {row.wgmma:6} {row.mma:4}  {row.grid}  {row.options}",
            flush=True,
        )
    if arguments.csv and rows:
        with arguments.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(asdict(rows[0])))
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)
    return 1 if too_large or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
