"""Kernels compile for both supported GPU generations on a machine without a GPU."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")


@pytest.mark.parametrize(
    ("target", "forward", "keys"),
    [("80", "forward_rows", "backward_keys"), ("90", "hopper_forward", "hopper_keys")],  # 90 is tuned, and has Gluon
)
def test_attention_kernels_compile_without_a_gpu(repository, target, forward, keys, tmp_path):
    """In a process of its own: the interpreter, in which kernel tests run, cannot be switched off later."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "benchmarks/measure/compile_targets.py", "--modules", "attention", "--only", "triangle"]
    finished = subprocess.run(
        [*command, "--targets", target], cwd=repository, env=environment, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    kernels = [line.split()[1] for line in finished.stdout.splitlines()[1:]]
    assert kernels == [forward, keys, "backward_queries", "_sum_kernel"]
