"""Triton kernels compiled where their GPU is absent, and a count of those that a run takes from a cache.

Under ``compiling_for`` every launch on tensors of ``device="meta"`` goes through Triton's own ``run`` up to the point
where the GPU is needed: the same specialization, options and cache key as later, so that the files are those that the
program looks up (same versions of Triton, Python and this package provided). The C launcher of each kernel is compiled
as well, against a stand-in for the driver's library.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

import ctypes
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
import triton.knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from scalefold.kernels import tuning


@dataclass
class Count:
    """Kernels by where they came from, their folders in the cache, and what compiling took."""

    hits: int = 0
    misses: int = 0
    seconds: float = 0.0
    folders: set[str] = field(default_factory=set)

    def text(self) -> str:
        """``kernels: 212 from the cache, 3 compiled in 4 s``."""
        return f"kernels: {self.hits} from the cache, {self.misses} compiled in {self.seconds:.0f} s"


@contextmanager
def counting() -> Iterator[Count]:
    """Count the kernels that Triton looks up inside."""
    count, before = Count(), triton.knobs.compilation.listener

    def listen(*, metadata_group: dict[str, str], times: Any, cache_hit: bool, **named: Any) -> None:
        if cache_hit:
            count.hits += 1
        else:
            count.misses += 1
            count.seconds += times.total / 1e6
        count.folders |= {Path(path).parent.name for path in metadata_group.values()}
        if before is not None:
            before(metadata_group=metadata_group, times=times, cache_hit=cache_hit, **named)

    triton.knobs.compilation.listener = listen
    try:
        yield count
    finally:
        triton.knobs.compilation.listener = before


class _AbsentGpu:
    """What Triton asks of a driver before a launch. The device's name keeps apart what is compiled for several GPUs."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> str:
        return f"absent_{self._target.arch}"

    def get_current_stream(self, _device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._target


@contextmanager
def compiling_for(capability: int) -> Iterator[Count]:
    """Compile launches instead of running them, into ``TRITON_CACHE_DIR``; the count says what was there already."""
    original, before, linked = JITFunction.run, driver._active, set()

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = original(self, *args, grid=grid, warmup=True, **options)
        if id(kernel) not in linked:
            linked.add(id(kernel))
            make_launcher(kernel)
        return kernel

    with counting() as count, stand_in_for_driver() as make_launcher, tuning.assume_capability(capability):
        JITFunction.run = compile_only
        driver.set_active(_AbsentGpu(capability))
        try:
            yield count
        finally:
            JITFunction.run, driver._active = original, before


@contextmanager
def stand_in_for_driver() -> Iterator[Callable[[Any], None]]:
    """A function that compiles the C launcher of a kernel where there is no libcuda; newer Tritons have one for all.

    What it links with is a library of that name whose functions do nothing; the real one takes its place where the
    launcher is loaded.
    """
    from triton.backends.nvidia import driver as nvidia

    if not hasattr(nvidia, "make_launcher"):
        yield lambda kernel: None
        return
    names = sorted(set(re.findall(r"\bcu[A-Z]\w*(?=\s*\()", Path(nvidia.__file__).read_text(encoding="utf-8"))))
    before = triton.knobs.nvidia.libcuda_path
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "stand_in.c", Path(folder) / "libcuda.so.1"
        source.write_text("".join(f"int {name}(void) {{ return 999; }}\n" for name in names), encoding="utf-8")
        compiler = os.environ.get("CC", "gcc")
        subprocess.run(
            [compiler, "-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1", str(source), "-o", str(library)],
            check=True,
        )
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)  # a launcher is loaded once when it has been compiled
        triton.knobs.nvidia.libcuda_path = folder
        nvidia.libcuda_dirs.cache_clear()
        nvidia.library_dirs.cache_clear()
        try:
            yield lambda kernel: (nvidia.CudaLauncher(kernel.src, kernel.metadata), None)[1]
        finally:
            triton.knobs.nvidia.libcuda_path = before
            nvidia.libcuda_dirs.cache_clear()
            nvidia.library_dirs.cache_clear()
