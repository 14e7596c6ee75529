"""Triton kernels compiled where their GPU is absent, and a count of those that a run takes from a cache.

Under ``compiling_for`` every launch on tensors of ``device="meta"`` goes through Triton's own ``run`` up to the point
where the GPU is needed: the same specialization, options and cache key as later, so that the files are those that the
program looks up (same versions of Triton, Python and this package provided). The C launcher of each kernel is compiled
as well, against a stand-in for the driver's library. Where launches are ``only_recorded`` first, several processes
compile what was asked for (``compile_wanted``).
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

import ctypes
import multiprocessing
import multiprocessing.connection
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
import triton.knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.cache import triton_key
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from scalefold.errors import KernelError
from scalefold.kernels import tuning
from scalefold.kernels.choice import explain
from scalefold.kernels.compiled import faults
from scalefold.kernels.compiled.machine_code import disassembled

PARTS = 10  # lines of progress


@dataclass
class Count:
    """Kernels by where they came from, their folders in the cache, and what compiling took."""

    hits: int = 0
    misses: int = 0
    seconds: float = 0.0
    folders: set[str] = field(default_factory=set)

    def add(self, other: "Count") -> None:
        """What another process has counted."""
        self.hits += other.hits
        self.misses += other.misses
        self.seconds += other.seconds
        self.folders |= other.folders

    def text(self) -> str:
        """``kernels: 212 from the cache, 3 compiled in 4 s``."""
        return f"kernels: {self.hits} from the cache, {self.misses} compiled in {self.seconds:.0f} s"


def refuse_faults(metadata: dict[str, Any], group: dict[str, str]) -> None:
    """Look through a kernel that Triton has just compiled; group: its files by name.

    Raises:
        KernelError: its results would be wrong. It is taken out of the cache, so that it never runs.
    """
    files = {Path(name).suffix: Path(path) for name, path in group.items()}
    if ".cubin" not in files:
        return
    try:
        listing = disassembled(files[".cubin"].read_bytes())
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:  # no disassembler: Triton brings one
        explain("compiled, but not looked through for faults of compilers", str(error))
        return
    ttgir, ptx = (files[kind].read_text(encoding="utf-8") if kind in files else "" for kind in (".ttgir", ".ptx"))
    if found := faults(ttgir, ptx, listing, metadata["num_warps"]):
        files[".json"].unlink()
        raise KernelError(
            f"kernel {metadata['name']}: {found[0]}: its results would be wrong. The program, Triton's compiler or "
            f"its assembler is at fault. A newer assembler may be right (TRITON_PTXAS_PATH={_newer_assembler()}), and "
            f"execution.kernels: reference does without"
        )


def _newer_assembler() -> str:
    """That of newer GPUs, which Triton brings as well and which knows the older ones; else where to look."""
    try:
        return triton.knobs.nvidia.ptxas_blackwell.path
    except (AttributeError, RuntimeError):
        return "/path/to/ptxas, from CUDA 12.9 on"


@contextmanager
def counting() -> Iterator[Count]:
    """Count the kernels that Triton looks up inside, and refuse those that it compiles wrong (``refuse_faults``)."""
    count, before = Count(), triton.knobs.compilation.listener

    def listen(
        *, metadata: dict[str, Any], metadata_group: dict[str, str], times: Any, cache_hit: bool, **named: Any
    ) -> None:
        if cache_hit:
            count.hits += 1
        else:
            refuse_faults(metadata, metadata_group)
            count.misses += 1
            count.seconds += times.total / 1e6
        count.folders |= {Path(path).parent.name for path in metadata_group.values()}
        if before is not None:
            before(metadata=metadata, metadata_group=metadata_group, times=times, cache_hit=cache_hit, **named)

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
    run, compile_it, before = JITFunction.run, JITFunction._do_compile, driver._active

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **options)

    with counting() as count, stand_in_for_driver() as make_launcher, tuning.assume_capability(capability):

        def compile_with_launcher(self: JITFunction, *arguments: Any) -> Any:
            kernel = compile_it(self, *arguments)
            make_launcher(kernel)
            return kernel

        JITFunction.run, JITFunction._do_compile = compile_only, compile_with_launcher
        driver.set_active(_AbsentGpu(capability))
        try:
            yield count
        finally:
            JITFunction.run, JITFunction._do_compile, driver._active = run, compile_it, before


@dataclass(frozen=True)
class Wanted:
    """A kernel that was asked for: its program, and with what Triton was about to compile it."""

    program: JITFunction
    arguments: tuple[Any, ...]

    @property
    def name(self) -> str:
        """Module and function."""
        return f"{self.program.fn.__module__}.{self.program.fn.__name__}"

    def effort(self) -> tuple[bool, int]:
        """What takes longest is the largest: Gluon programs, then by letters."""
        return self.program.is_gluon(), len(self.program.src)

    def compile(self) -> None:
        """Into the cache, in this process; what the compiler raises gets a note that names the kernel."""
        try:
            self.program._do_compile(*self.arguments)
        except Exception as error:
            error.add_note(f"this was the kernel {self.name}")
            raise


@contextmanager
def only_recorded() -> Iterator[dict[tuple[int, str], Wanted]]:
    """Note what is asked for instead of compiling it (inside ``compiling_for``), by the key that Triton looks up."""
    wanted: dict[tuple[int, str], Wanted] = {}
    before = JITFunction._do_compile

    def record(self: JITFunction, key: str, *arguments: Any) -> None:
        wanted.setdefault((id(self), key), Wanted(self, (key, *arguments)))

    JITFunction._do_compile = record
    try:
        yield wanted
    finally:
        JITFunction._do_compile = before


def compile_wanted(kernels: Iterable[Wanted], workers: int, note: Callable[[str], None]) -> Count:
    """Compile kernels by ``workers`` processes (1: by this one), inside ``compiling_for``.

    What a process did not bring to its end, because it was killed or the compiler failed, this one compiles last, and
    raises what the compiler raises, the kernel's name in a note.
    """
    left = sorted(kernels, key=Wanted.effort, reverse=True)
    total = len(left)

    def progress() -> None:
        done = count.hits + count.misses
        if done * PARTS // total > (done - 1) * PARTS // total:
            note(f"{done} of {total} kernels")

    with counting() as count:
        if min(workers, total) > 1:
            left = _by_processes(left, min(workers, total), count, note, progress)
        for one in left:
            one.compile()
            progress()
    return count


def _by_processes(
    kernels: list[Wanted], workers: int, count: Count, note: Callable[[str], None], progress: Callable[[], None]
) -> list[Wanted]:
    """Kernels that are left when the first of them does not compile, or all processes have ended.

    The processes are forked: what a kernel is compiled with cannot be sent. They compile and touch nothing else of what
    they inherit, so neither threads nor a GPU of this process matter. A pipe that closes ends them, also where this
    process is killed.
    """
    triton_key()  # a hash of the whole compiler, which each of them would make
    context, pipes, left = multiprocessing.get_context("fork"), dict[Any, Any](), dict(enumerate(kernels))
    waiting, under_way, failed = list(reversed(left)), dict[Any, int](), list[int]()

    def give(pipe: Any) -> None:
        if waiting and not failed:
            under_way[pipe] = waiting.pop()
            with suppress(OSError):  # it has died, as its pipe will say
                pipe.send(under_way[pipe])
        else:
            pipe.close()

    def take(pipe: Any, number: int) -> None:
        try:
            done = pipe.recv()
        except (EOFError, OSError):
            pipes[pipe].join()
            return note(f"the process that compiled {kernels[number].name} ended: status {pipes[pipe].exitcode}")
        if done is None:
            failed.append(number)
        else:
            count.add(done)
            del left[number]
            progress()
        return give(pipe)

    try:
        for _ in range(workers):
            pipe, far_end = context.Pipe()
            pipes[pipe] = context.Process(target=_work, args=(kernels, pipe, far_end), daemon=True)
            pipes[pipe].start()
            far_end.close()  # so that it closes with its process
            give(pipe)
        while under_way:
            for pipe in multiprocessing.connection.wait(list(under_way)):
                take(pipe, under_way.pop(pipe))
    finally:
        for pipe, process in pipes.items():
            pipe.close()
            process.join()
            _remove_partial(process.pid)
    return [left.pop(number) for number in failed] + list(left.values())


def _work(kernels: list[Wanted], near_end: Any, pipe: Any) -> None:
    """In a process of its own, silently: compile the kernels whose numbers come; answer with a count, None if not."""
    near_end.close()
    silence = os.open(os.devnull, os.O_WRONLY)  # of a failure, whole programs would be printed: the parent repeats it
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    with suppress(EOFError, OSError):
        while True:
            number = pipe.recv()
            with counting() as count:
                try:
                    kernels[number].compile()
                except Exception:
                    pipe.send(None)
                else:
                    pipe.send(count)


def _remove_partial(pid: int) -> None:
    """What a process that was killed or interrupted had begun to write; Triton names it after the process."""
    for folder in Path(triton.knobs.cache.dir).glob(f"*/tmp.pid_{pid}_*"):
        shutil.rmtree(folder, ignore_errors=True)


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
