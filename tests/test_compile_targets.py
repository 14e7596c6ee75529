"""Kernels compile for both supported GPU generations on a machine without a GPU."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")


CASES = {
    "gated_pair": ["_forward_kernel", "_input_gradient_kernel", "_sum_kernel"] * 2,
    "attention_triangle": [
        *("forward_rows", "backward_keys", "backward_queries", "_sum_kernel"),
        *("hopper_forward", "hopper_keys", "backward_queries", "_sum_kernel"),  # 9.0 is tuned, and has Gluon
    ],
}


@pytest.mark.parametrize("case", ["gated_pair", pytest.param("attention_triangle", marks=pytest.mark.long)])
def test_kernels_compile_for_both_generations_without_a_gpu(repository, case, tmp_path):
    """In a process of its own: the interpreter, in which kernel tests run, cannot be switched off later."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "benchmarks/measure/compile_targets.py", "--only", case]
    finished = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    rows = [line.split()[1:3] for line in finished.stdout.splitlines()[1:]]
    targets = ["80"] * (len(rows) // 2) + ["90"] * (len(rows) // 2)
    assert rows == [list(row) for row in zip(CASES[case], targets, strict=True)]
