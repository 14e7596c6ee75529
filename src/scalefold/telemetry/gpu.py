"""What a GPU says of itself: clock, power, temperature, energy (NVML, by the optional package nvidia-ml-py)."""

import importlib
import importlib.util
import logging
import re
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any, Protocol

log = logging.getLogger(__name__)

DRIVER_FILE = Path("/proc/driver/nvidia/version")


def is_readable() -> bool:
    """Whether nvidia-ml-py is installed."""
    return importlib.util.find_spec("pynvml") is not None


@dataclass(frozen=True)
class Sample:
    """One look at a GPU: SM clock in MHz, power in W, temperature in °C."""

    clock_mhz: float
    power_w: float
    temperature_c: float


class Gpu(Protocol):
    """A GPU that can be looked at; its errors are ``Exception``s of the library."""

    def sample(self) -> Sample:
        """Now."""
        ...

    def energy_j(self) -> float:
        """Joules since the driver was loaded; only differences mean anything."""
        ...


class NvmlGpu:
    """The GPU of a UUID, as PyTorch states it. Raises pynvml's errors where NVML does not know it."""

    def __init__(self, uuid: str) -> None:
        self._nvml: Any = importlib.import_module("pynvml")
        self._nvml.nvmlInit()
        self._handle = self._nvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")

    def sample(self) -> Sample:
        """Now."""
        nvml, handle = self._nvml, self._handle
        return Sample(
            nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
            nvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
            nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
        )

    def energy_j(self) -> float:
        """Joules since the driver was loaded."""
        return self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1e3


@dataclass
class Meter:
    """Collects samples of one GPU between two calls of ``take``; what the GPU cannot say is left out."""

    gpu: Gpu | None
    _samples: list[Sample] = field(default_factory=list)
    _energy_j: float | None = None

    def look(self) -> None:
        """Add a sample."""
        if self.gpu is None:
            return
        try:
            self._samples.append(self.gpu.sample())
        except Exception as error:  # a GPU that is lost; the run finds out by itself
            log.debug("telemetry: %s", error)

    def take(self) -> dict[str, float]:
        """Means, lowest clock, highest temperature and joules since the last call; empty without a GPU."""
        self.look()
        samples, self._samples = self._samples, []
        if not samples:
            return {}
        return {
            "clock_mhz": round(mean(s.clock_mhz for s in samples), 1),
            "clock_min_mhz": min(s.clock_mhz for s in samples),
            "power_w": round(mean(s.power_w for s in samples), 1),
            "temperature_c": max(s.temperature_c for s in samples),
            **self._energy(),
        }

    def _energy(self) -> dict[str, float]:
        assert self.gpu is not None
        try:
            energy, before = self.gpu.energy_j(), self._energy_j
        except Exception:  # GPUs before Volta do not count
            return {}
        self._energy_j = energy
        return {"energy_j": round(energy - before, 1) if before is not None else 0.0}


def driver_version(file: Path = DRIVER_FILE) -> str | None:
    """Version of the GPU's kernel driver; None where there is none, or it cannot be seen."""
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = re.search(r"Kernel Module.*?\s(\d+\.\d+(?:\.\d+)*)\s", text)
    return found[1] if found else None


def find_gpu(uuid: str) -> tuple[Gpu | None, str | None]:
    """The GPU, or None; and why not, if that is worth a line."""
    if not uuid or not is_readable():
        return None, None
    try:
        return NvmlGpu(uuid), None
    except Exception as error:  # MIG, a container without NVML, an old driver
        return None, f"{type(error).__name__}: {error}"
