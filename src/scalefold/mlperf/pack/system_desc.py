"""The system description of a submission (``systems/<system>.json``), filled from the machine as far as it can tell."""

import importlib.metadata
import json
import platform
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scalefold.errors import LogError

#: Fields that the system checker requires, in the order in which submitters write them.
FIELDS = (
    "submitter",
    "division",
    "status",
    "system_name",
    "number_of_nodes",
    "host_processors_per_node",
    "host_processor_model_name",
    "host_processor_core_count",
    "host_processor_vcpu_count",
    "host_processor_frequency",
    "host_processor_caches",
    "host_processor_interconnect",
    "host_memory_capacity",
    "host_storage_type",
    "host_storage_capacity",
    "host_networking",
    "host_networking_topology",
    "host_memory_configuration",
    "accelerators_per_node",
    "accelerator_model_name",
    "accelerator_host_interconnect",
    "accelerator_frequency",
    "accelerator_on-chip_memories",
    "accelerator_memory_configuration",
    "accelerator_memory_capacity",
    "accelerator_interconnect",
    "accelerator_interconnect_topology",
    "cooling",
    "hw_notes",
    "framework",
    "other_software_stack",
    "operating_system",
    "sw_notes",
)
#: May stay empty: remarks, and properties that a machine without accelerators does not have.
OPTIONAL_FIELDS = frozenset({"hw_notes", "sw_notes", "accelerator_frequency", "accelerator_on-chip_memories"})
STATUSES = {"onprem": "Available on-premise", "cloud": "Available cloud", "preview": "Preview", "research": "Research"}

_SOFTWARE = ("torch", "triton", "numpy", "h5py", "gemmi", "mlperf-logging", "scalefold")
_GPU_QUERY = "name,memory.total,clocks.max.sm,driver_version,pcie.link.gen.max,pcie.link.width.max"

Runner = Callable[[list[str]], str | None]


@dataclass(frozen=True)
class SystemDescription:
    """All fields of the JSON file (text, or an object of texts for the software), and what a person must fill in."""

    fields: dict[str, Any]

    @property
    def to_fill(self) -> list[str]:
        """Required fields that are still empty."""
        return unfilled(self.fields)

    def write(self, file: str | Path) -> Path:
        """Write the JSON file; refuses to replace one, which a person may have completed."""
        file = Path(file)
        if file.exists():
            raise LogError(f"{file} exists: move it away, it may hold what a person filled in")
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{file.name}.partial")
        temporary.write_text(json.dumps(self.fields, indent=2) + "\n", encoding="utf-8")
        temporary.replace(file)
        return file


def unfilled(fields: dict[str, Any]) -> list[str]:
    """Required fields that are absent or empty; without accelerators their properties need no text."""
    no_accelerators = str(fields.get("accelerators_per_node", "")).strip() == "0"
    needed = [f for f in FIELDS if f not in OPTIONAL_FIELDS and not (no_accelerators and f.startswith("accelerator_"))]
    return [field for field in needed if not str(fields.get(field) or "").strip()]


def run_command(command: list[str]) -> str | None:
    """Standard output of a command, or None when it is absent or fails."""
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def describe_system(
    *,
    number_of_nodes: int,
    submitter: str = "",
    system_name: str = "",
    division: str = "closed",
    status: str = "onprem",
    known: dict[str, str] | None = None,
    run: Runner = run_command,
    root: Path = Path("/"),
) -> SystemDescription:
    """Describe a system of ``number_of_nodes`` nodes like this one.

    ``known`` are fields that a person states (they win); ``status`` is the log's word (onprem, cloud, preview,
    research); ``run`` and ``root`` exist for tests. Facts come from lscpu, /proc, /sys, nvidia-smi and the installed
    packages; nothing is guessed: what the machine does not tell stays empty and is listed in ``to_fill``.

    Raises:
        LogError: a known field or the status does not exist.
    """
    known = known or {}
    wrong = [field for field in known if field not in FIELDS]
    if wrong:
        raise LogError(f"system description has no field {', '.join(wrong)}; its fields are {', '.join(FIELDS)}")
    if status not in STATUSES:
        raise LogError(f"status {status!r} is none of {', '.join(STATUSES)}")
    facts = {
        "submitter": submitter,
        "division": division,
        "status": STATUSES[status],
        "system_name": system_name,
        "number_of_nodes": str(number_of_nodes),
        **_processor(run),
        **_memory(root),
        **_accelerators(run),
        "host_networking": _networking(root),
        "operating_system": _operating_system(root),
        **_software(run),
    }
    return SystemDescription({field: known.get(field, facts.get(field, "")) for field in FIELDS})


def _processor(run: Runner) -> dict[str, str]:
    entries = dict(line.split(":", 1) for line in (run(["lscpu"]) or "").splitlines() if ":" in line)
    cpu = {key.strip(): value.strip() for key, value in entries.items()}
    sockets = cpu.get("Socket(s)", "")
    cores = cpu.get("Core(s) per socket", "")
    threads = cpu.get("Thread(s) per core", "")
    caches = [f"{name} {cpu[f'{name} cache']}" for name in ("L1d", "L1i", "L2", "L3") if f"{name} cache" in cpu]
    mhz = cpu.get("CPU max MHz", "")
    return {
        "host_processors_per_node": sockets,
        "host_processor_model_name": cpu.get("Model name", ""),
        "host_processor_core_count": cores,
        "host_processor_vcpu_count": str(int(cores) * int(threads)) if cores.isdigit() and threads.isdigit() else "",
        "host_processor_frequency": f"{float(mhz) / 1000:.2f} GHz" if re.fullmatch(r"[\d.]+", mhz) else "",
        "host_processor_caches": ", ".join(caches),
    }


def _memory(root: Path) -> dict[str, str]:
    match = re.search(r"MemTotal:\s+(\d+) kB", _read(root / "proc/meminfo"))
    return {"host_memory_capacity": f"{int(match[1]) / 2**20:.0f} GiB" if match else ""}


def _accelerators(run: Runner) -> dict[str, str]:
    table = run(["nvidia-smi", f"--query-gpu={_GPU_QUERY}", "--format=csv,noheader"])
    rows = [[cell.strip() for cell in line.split(",")] for line in (table or "").splitlines() if line.strip()]
    if not rows:
        return {"accelerators_per_node": "0"}
    name, memory, clock, _, generation, width = rows[0]
    links = run(["nvidia-smi", "nvlink", "--status", "-i", "0"]) or ""
    speeds = re.findall(r"Link \d+: ([\d.]+) GB/s", links)
    nvlink = f"NVLink, {len(speeds)} links of {speeds[0]} GB/s per direction" if speeds else ""
    return {
        "accelerators_per_node": str(len(rows)),
        "accelerator_model_name": name,
        "accelerator_memory_capacity": memory,
        "accelerator_frequency": clock,
        "accelerator_host_interconnect": f"PCIe Gen{generation} x{width}",
        "accelerator_interconnect": nvlink,
    }


def _networking(root: Path) -> str:
    """InfiniBand ports by rate, else Ethernet devices that are up, as "count x rate"."""
    rates = [_read(file).strip() for file in sorted((root / "sys/class/infiniband").glob("*/ports/*/rate"))]
    if not rates:
        devices = sorted((root / "sys/class/net").glob("*/device"))
        speeds = [_read(device.parent / "speed").strip() for device in devices]
        rates = [f"{int(speed) // 1000} Gb/s Ethernet" for speed in speeds if speed.isdigit() and int(speed) >= 1000]
    return ", ".join(f"{rates.count(rate)}x {rate}" for rate in dict.fromkeys(rates))


def _operating_system(root: Path) -> str:
    match = re.search(r'^PRETTY_NAME="?([^"\n]+)"?$', _read(root / "etc/os-release"), re.MULTILINE)
    return match[1] if match else platform.system()


def _software(run: Runner) -> dict[str, Any]:
    stack: dict[str, str] = {"Python": platform.python_version()}
    for name in _SOFTWARE:
        try:
            stack[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    smi = run(["nvidia-smi"]) or ""
    for name, pattern in {"NVIDIA driver": r"Driver Version: ([\d.]+)", "CUDA": r"CUDA Version: ([\d.]+)"}.items():
        if match := re.search(pattern, smi):
            stack[name] = match[1]
    return {"framework": f"PyTorch {stack['torch']}" if "torch" in stack else "", "other_software_stack": stack}


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        return ""
