"""No kernel changes memory in place that a warp may still have to read (in_place.py)."""

import json
import subprocess
import sys

import pytest

from processes import script_environment

pytest.importorskip("triton")

KERNELS = '''
import json
import torch, triton
import triton.language as tl
import compile_targets
from scalefold.kernels.compiled.in_place import unordered_accesses

@triton.jit
def added(x, y, N: tl.constexpr, BARRIER: tl.constexpr):
    """x += y."""
    i = tl.arange(0, N)
    before = tl.load(x + i)
    if BARRIER:
        tl.debug_barrier()
    tl.store(x + i, before + tl.load(y + i))

@triton.jit
def used(x, y, N: tl.constexpr, BARRIER: tl.constexpr):
    """x += 1, y += the same for every column."""
    row, column = tl.arange(0, 2), tl.arange(0, N)
    more = tl.load(x + row) + 1
    if BARRIER:
        tl.debug_barrier()
    tl.store(x + row, more)
    at = y + row[:, None] * N + column[None, :]
    tl.store(at, tl.load(at) + more[:, None])

@triton.jit
def turned(x, y, N: tl.constexpr, BARRIER: tl.constexpr):
    """y = x, x = y transposed."""
    row, column = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    tl.store(y + row * N + column, tl.load(x + row * N + column))
    if BARRIER:
        tl.debug_barrier()
    tl.store(x + row + column * N, tl.load(y + row + column * N))

@triton.jit
def counted(x, y, N: tl.constexpr, BARRIER: tl.constexpr):
    """x += 1, N times."""
    for _ in range(N):
        before = tl.load(x)
        tl.debug_barrier()
        tl.store(x, before + 1)
        if BARRIER:
            tl.debug_barrier()

@triton.jit
def either(x, y, N: tl.constexpr, BARRIER: tl.constexpr):
    """y = x, or x = 0."""
    row = tl.arange(0, 2)
    if tl.program_id(0) == N:
        tl.store(y + row, tl.load(x + row))
    else:
        tl.store(x + row, tl.zeros([2], tl.float32))

def faults(kernel, n, barrier, warps):
    empty = [torch.empty(4096, device="meta") for _ in range(2)]
    with compile_targets.recorded_launches() as launches:
        kernel[(8,)](*empty, N=n, BARRIER=barrier, num_warps=warps)
    return unordered_accesses(compile_targets.compile_launch(launches[0], 90).asm["ttgir"])

OTHERS = ((used, 128), (turned, 64), (counted, 8))
CALLS = [
    *((added, n, barrier, warps) for n, barrier, warps in ((2, 0, 4), (2, 1, 4), (2, 0, 1), (128, 0, 4))),
    *((kernel, n, 0, 4) for kernel, n in OTHERS),
    *((kernel, n, 1, 4) for kernel, n in OTHERS),
    (either, 1, 0, 4),
]
print(json.dumps({f"{c[0].__name__} {c[1:]}": faults(*c) for c in CALLS}))
'''
READ = "%x is read by several warps and then stored, no barrier between"
STORED = "is stored and then read by other threads, no barrier between"
EXPECTED = {
    "added (2, 0, 4)": [READ],
    "added (2, 1, 4)": [],
    "added (2, 0, 1)": [],
    "added (128, 0, 4)": [],
    "used (128, 0, 4)": [READ],
    "used (128, 1, 4)": [],
    "turned (64, 0, 4)": [f"%y {STORED}"],
    "turned (64, 1, 4)": [],
    "counted (8, 0, 4)": [f"%x {STORED}"],
    "counted (8, 1, 4)": [],
    "either (1, 0, 4)": [],
}


def output_of(command, repository, tmp_path) -> str:
    environment = script_environment(repository, tmp_path / "cache")
    command = [sys.executable, *command]
    finished = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def test_memory_that_several_warps_read_is_stored_behind_a_barrier(repository, tmp_path):
    (tmp_path / "kernels.py").write_text(KERNELS)
    assert json.loads(output_of([str(tmp_path / "kernels.py")], repository, tmp_path)) == EXPECTED


@pytest.mark.long
def test_iterations_of_the_structure_module_change_frames_in_place_soundly(repository, tmp_path):
    """Where the fault was found: a warp that was late added an iteration's gradient of the frames twice."""
    command = ["benchmarks/measure/compile_targets.py", "--faults", "--modules", "iterations"]
    assert ": 0 faulty" in output_of(command, repository, tmp_path)


def test_a_program_of_several_groups_of_warps_is_not_judged_and_nothing_has_no_faults():
    from scalefold.kernels.compiled.in_place import unordered_accesses

    assert unordered_accesses("") == []
    assert unordered_accesses("ttg.warp_specialize(%x)") == []
