"""Launches whose programs do not keep to memory of their own are found (separate_programs.py)."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

KERNELS = """
import pytest, torch, triton
import triton.language as tl

@triton.jit
def next_of_all(x, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(x + i, tl.load(x + i + 1))

@triton.jit
def first_only(x, N: tl.constexpr):
    tl.store(x + tl.arange(0, N), 1.0)

@triton.jit
def own(x, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(x + i, tl.load(x + i) + tl.load(x + 4 * N))

@pytest.mark.parametrize("kernel, programs", [(next_of_all, 4), (first_only, 4), (own, 4), (next_of_all, 1)])
def test_launch(kernel, programs):
    kernel[(programs,)](torch.zeros(64), N=8)
"""


def test_a_launch_fails_whose_programs_read_or_store_what_another_stores(repository, tmp_path):
    (tmp_path / "test_kernels.py").write_text(KERNELS)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "separate_programs", "-p", "no:cacheprovider", "--tb=line"]
    environment = os.environ | {"PYTHONPATH": str(repository / "tests"), "TRITON_INTERPRET": "1"}
    finished = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    said = finished.stdout + finished.stderr
    assert "2 failed, 2 passed" in said, said
    assert "next_of_all: a program reads what another one stores" in said
    assert "first_only: two programs store the same element" in said
