"""How many processors there are to use: the one place that counts them."""

import os
from pathlib import Path

CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # microseconds of processors in a period of time, or "max"


def own() -> list[int]:
    """Numbers of the processors that this process, and what it starts, may run on; empty where no system says so."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def processors() -> int:
    """Processors that this process may use: those it may run on, or its container's quota if less; at least 1."""
    allowed = len(own()) or os.cpu_count() or 1
    quota, _, period = (CPU_QUOTA.read_text(encoding="ascii") if CPU_QUOTA.is_file() else "max").partition(" ")
    return allowed if quota.strip() == "max" else max(1, min(allowed, int(quota) // int(period)))
