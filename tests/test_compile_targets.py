"""Kernels compile for all three GPU generations on a machine without a GPU."""

import os
import subprocess
import sys

import pytest

from processes import compiling_environment, script_environment

pytest.importorskip("triton")


TRITON_PAIR = ["_forward_kernel", "_input_gradient_kernel", "_sum_kernel"]
TRITON_TRIANGLE = ["forward_rows", "_transpose_kernel", "backward_keys", "backward_queries", "_sum_kernel"]
CASES = {  # 9.0 is tuned, and has Gluon
    "gated_pair": {
        "80": TRITON_PAIR,
        "90": ["hopper_gated_output", "hopper_gated_gradient", "_sum_kernel"],
        "100": TRITON_PAIR,
    },
    "attention_triangle": {
        "80": TRITON_TRIANGLE,
        "90": ["hopper_forward", "hopper_keys", "backward_queries", "_sum_kernel"],
        "100": TRITON_TRIANGLE,
    },
}


@pytest.mark.parametrize("case", ["gated_pair", pytest.param("attention_triangle", marks=pytest.mark.long)])
def test_kernels_compile_for_all_generations_without_a_gpu(repository, case, tmp_path):
    """In a process of its own: the interpreter, in which kernel tests run, cannot be switched off later."""
    environment = compiling_environment(tmp_path)
    command = [sys.executable, "benchmarks/measure/compile_targets.py", "--only", case]
    finished = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    rows = [line.split()[1:3] for line in finished.stdout.splitlines()[1:]]
    assert rows == [[kernel, target] for target, kernels in CASES[case].items() for kernel in kernels]


CONTRACTED = """
import re
from compile_targets import compile_launch, different_launches, shape_cases

cases = [case for case in shape_cases([8], []) if "global_attention" in case[0]]
launches = [launch for _, own in different_launches(cases, 90, lambda launch: launch.kernel.__name__) for launch in own]
for launch in launches:
    if not launch.kernel.__name__.startswith("attend_columns"):
        continue
    products, moved, found = {}, {}, 0
    for line in compile_launch(launch, 90).asm["ptx"].splitlines():
        if (instruction := re.match(r"\\s*([\\w.]+)\\s+(%\\w+)(?:\\|%p\\d+)?,\\s*(.*);", line)) is None:
            continue
        name, result, operands = instruction[1], instruction[2], tuple(instruction[3].split(", "))
        if name == "mul.f32":
            products[result] = operands
        elif name == "shfl.sync.bfly.b32" and operands[0] in products:
            moved[result] = products[operands[0]]
        elif name == "fma.rn.f32":
            found += moved.get(operands[2]) == operands[:2]
    print(launch.kernel.__name__, found)
"""


def test_lanes_that_add_up_scores_of_the_global_attention_hold_equal_copies(repository, tmp_path):
    """None contracts its own product into the sum of two lanes' (``instructions.rounded_product``)."""
    environment = compiling_environment(tmp_path) | {"PYTHONPATH": str(repository / "benchmarks" / "measure")}
    command = [sys.executable, "-c", CONTRACTED]
    finished = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert sorted(finished.stdout.splitlines()) == ["attend_columns 0", "attend_columns_backward 0"]


STORED = """
import re
from compile_targets import all_cases, compile_launch, different_launches, identity
from hopper_programs import every_program

cases = [case for case in all_cases(None) if case[0].endswith("to_ranks")]
with every_program(0):
    launches = list(different_launches(cases, 90, lambda launch: identity(launch, 90)))
for case, own in launches:
    for launch in own:
        if launch.kernel.__name__.endswith("forward_kernel"):
            stores = re.findall(r"st[.]global[.](\\S+)", compile_launch(launch, 90).asm["ptx"])
            print(case, launch.kernel.__name__, *sorted(set(stores)))
"""


def test_what_is_written_to_several_ranks_goes_by_sixteen_bytes(repository, tmp_path):
    """A wire takes single values an order of magnitude more slowly."""
    environment = script_environment(repository, tmp_path)
    environment["PYTHONPATH"] = os.pathsep.join([str(repository / "tests"), environment["PYTHONPATH"]])
    command = [sys.executable, "-c", STORED]
    finished = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    found = [line.split() for line in finished.stdout.splitlines()]
    assert {case for case, *_ in found} == {
        *("gated_to_ranks", "project_to_ranks", "project_ending_to_ranks", "project_pair_bias_to_ranks"),
        *("triangle_project_to_ranks", "outer_product_project_to_ranks"),
    }
    assert all(stores == ["v4.b32"] for _, _, *stores in found)
