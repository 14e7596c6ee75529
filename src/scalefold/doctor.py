"""What this machine offers and what is missing for a run, one row per fact."""

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Level = Literal["ok", "note", "problem"]
NEEDED = ("torch", "triton", "numpy", "h5py", "pydantic", "gemmi", "mlperf-logging", "matplotlib", "rich", "typer")
OPTIONAL = {"mpi4py": "prepare over several nodes, rendezvous under mpirun"}


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
        *_devices(),
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
    for name, use in OPTIONAL.items():
        found.append(Finding("note", name, _version(name) or f"absent; only needed to {use}"))
    return found


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
    found = []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        gib = facts.total_memory / 2**30
        level: Level = "ok" if (facts.major, facts.minor) >= (8, 0) else "problem"
        found.append(
            Finding(level, f"cuda:{index}", f"{facts.name}, compute {facts.major}.{facts.minor}, {gib:.0f} GiB")
        )
    found += _peers(torch.cuda.device_count(), torch.cuda.can_device_access_peer)
    from torch.cuda import nccl

    return [*found, Finding("ok", "nccl", ".".join(map(str, nccl.version())))]


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
    cores = len(os.sched_getaffinity(0))
    found = [Finding("ok", "cpu", f"{cores} cores usable by this process")]
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
