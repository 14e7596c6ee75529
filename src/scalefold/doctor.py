"""What this machine offers and what is missing for a run, one row per fact."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from scalefold.processors import processors
from scalefold.scaling.step_time import VENDOR, gpu_family

Level = Literal["ok", "note", "warning", "problem"]
NEEDED = ("torch", "numpy", "h5py", "pydantic", "gemmi", "mlperf-logging", "matplotlib", "rich", "typer")


@dataclass(frozen=True)
class Pair:
    """A PyTorch, the Triton that its wheels for Linux name, and how far both were tried together here."""

    torch: str
    triton: str
    tried: Literal["measured", "tested"]


PAIRS = (
    Pair("2.11.0", "3.6.0", "measured"),
    Pair("2.13.0", "3.7.1", "tested"),
)
TRIED = {
    "measured": "the measured pair: every figure on GPUs was taken with it",
    "tested": "tested, not measured: kernels in the interpreter, and compiled for compute capability 8.0, 9.0 and 10.0",
}
MEASURED, COMPILED = ("H100", "H200"), ((8, 0), (9, 0), (10, 0))  # kinds with times, capabilities kernels compile for


@dataclass(frozen=True)
class Finding:
    """One fact with its meaning for a run."""

    level: Level
    topic: str
    text: str


def examine() -> list[Finding]:
    """All findings; a ``problem`` means that a run on this machine fails."""
    return [
        *_python_packages(),
        *pair_finding(_version("torch"), _version("triton")),
        _mpi(_version("mpi4py"), _mpi_loads()),
        *_devices(),
        _compiler(),
        *_host(),
        *_tools(),
        *_node(),
    ]


def _python_packages() -> list[Finding]:
    found = [Finding("ok", "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")]
    for name in NEEDED:
        version = _version(name)
        text = version or f"missing: pip install {name} (or `make setup`)"
        found.append(Finding("ok" if version else "problem", name, text))
    return found


def pair_finding(torch: str | None, triton: str | None) -> list[Finding]:
    """What is known of this PyTorch with this Triton; nothing where PyTorch itself is missing."""
    if torch is None:
        return []
    if triton is None:
        text = "absent (it exists for Linux): everything takes the plain PyTorch operations, which are slow on a GPU"
        return [Finding("warning" if platform.system() == "Linux" else "note", "triton", text)]
    topic = "torch + triton"
    for pair in PAIRS:
        if (torch.partition("+")[0], triton) == (pair.torch, pair.triton):
            return [Finding("ok", "triton", triton), Finding("ok", topic, TRIED[pair.tried])]
    known = ", ".join(f"{pair.torch} + {pair.triton} ({pair.tried})" for pair in PAIRS)
    return [Finding("ok", "triton", triton), Finding("warning", topic, f"a pair that nobody tried; known: {known}")]


def _mpi(mpi4py: str | None, loads: bool) -> Finding:
    """mpi4py comes with the packages, the MPI library that it loads with the system."""
    if mpi4py and loads:
        return Finding("ok", "mpi4py", mpi4py)
    missing = f"{mpi4py} without an MPI library" if mpi4py else "absent"
    return Finding("note", "mpi4py", f"{missing}; only mpirun and `prepare --mpi` need both")


def _mpi_loads() -> bool:
    """Whether mpi4py finds its library; asked in another process, which may end as it likes."""
    code = "import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI"
    return subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def _compiler() -> Finding:
    """What Triton builds its launchers with, at run time and on a GPU only."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    headers = Path(sysconfig.get_path("include"), "Python.h")
    if compiler and headers.exists():
        return Finding("ok", "C compiler", compiler)
    lacks = "no C compiler" if not compiler else f"no {headers}"
    level: Level = "problem" if _has_gpu() else "note"
    return Finding(level, "C compiler", f"{lacks}: Triton needs both on a GPU (Debian: apt install gcc python3-dev)")


def _has_gpu() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[Finding]:
    try:
        import torch
    except ImportError:
        return []
    if not torch.cuda.is_available():
        return [Finding("note", "devices", "no CUDA device: runs use the CPU and the plain PyTorch operations")]
    found, kinds = [], set()
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        gib = facts.total_memory / 2**30
        level: Level = "ok" if (facts.major, facts.minor) >= (8, 0) else "problem"
        found.append(
            Finding(level, f"cuda:{index}", f"{facts.name}, compute {facts.major}.{facts.minor}, {gib:.0f} GiB")
        )
        kinds.add((facts.name, (facts.major, facts.minor)))
    for name, capability in sorted(kinds):
        found += kind_findings(name, capability, torch.cuda.get_arch_list())
    found += _peers(torch.cuda.device_count(), torch.cuda.can_device_access_peer)
    from torch.cuda import nccl

    return [*found, Finding("ok", "nccl", ".".join(map(str, nccl.version())))]


def kind_findings(name: str, capability: tuple[int, int], architectures: list[str]) -> list[Finding]:
    """What is known of a kind of GPU where nothing was measured; ``architectures``: what this PyTorch is built for."""
    found, shown, family = [], f"{capability[0]}.{capability[1]}", gpu_family(name)
    if not any(arch.removeprefix("sm_").rstrip("af")[:-1] == str(capability[0]) for arch in architectures):
        built = " ".join(architectures)
        text = f"this PyTorch has no programs for compute {shown}, only {built}; `make setup TORCH_VARIANT=cuda`"
        found.append(Finding("problem", family, text))
    if family in VENDOR:
        found.append(Finding("note", family, VENDOR[family].text()))
    if capability not in COMPILED:
        known = ", ".join(f"{major}.{minor}" for major, minor in COMPILED)
        text = f"nobody compiled the kernels for compute {shown}; known: {known}; first: `make bench-gpu`"
        found.append(Finding("warning", family, text))
    elif family not in MEASURED:
        text = f"kernels compile for compute {shown}, none was timed on this GPU: `make bench-gpu`, `scalefold tune`"
        found.append(Finding("note", family, text))
    return found


def _peers(count: int, can_access: Callable[[int, int], bool]) -> list[Finding]:
    """Whether the GPUs of this node can read each other's memory, which DAP groups exchange by."""
    if count < 2:
        return []
    apart = [(a, b) for a in range(count) for b in range(count) if a != b and not can_access(a, b)]
    if apart:
        text = f"cuda:{apart[0][0]} cannot read the memory of cuda:{apart[0][1]}: DAP groups of both exchange by NCCL"
        return [Finding("note", "peer access", text)]
    return [Finding("ok", "peer access", "every GPU can read every other's memory, as DAP groups do")]


def _host() -> list[Finding]:
    found = [Finding("ok", "cpu", f"{processors()} cores usable by this process")]
    shm = shutil.disk_usage("/dev/shm") if Path("/dev/shm").is_dir() else None
    if shm is not None:
        small = shm.total < 8 * 2**30
        advice = "; loader workers pass samples through it: give the container a larger --shm-size" if small else ""
        found.append(Finding("note" if small else "ok", "/dev/shm", f"{shm.total / 2**30:.1f} GiB{advice}"))
    cache = os.environ.get("TRITON_CACHE_DIR", "~/.triton")
    return [*found, Finding("ok", "triton cache", f"{cache} (keep it on a node-local disk)")]


def _tools() -> list[Finding]:
    uses = {"srun": "launch under Slurm", "enroot": "run containers under Slurm", "nvidia-smi": "describe-system"}
    return [
        Finding("ok" if shutil.which(t) else "note", t, shutil.which(t) or f"absent; used to {u}")
        for t, u in uses.items()
    ]


def _node() -> list[Finding]:
    from scalefold.node_findings import kernel_cache_rows, rdma_rows

    cache = Path(os.environ.get("TRITON_CACHE_DIR", "~/.triton/cache")).expanduser()
    rows = [*rdma_rows(), *kernel_cache_rows(cache)]
    return [Finding("ok" if level == "ok" else "note", topic, text) for level, topic, text in rows]
