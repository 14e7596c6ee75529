"""Programs that start while the kernel before them ends wait for it before they touch memory."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("triton")

import triton.language as tl

from scalefold.kernels import instructions, tuning

KERNELS = Path(instructions.__file__).parent
WAIT = "wait_for_predecessors()"


def jitted() -> Iterator[tuple[Path, ast.FunctionDef]]:
    """Every function of ours that Triton or Gluon compiles, with its file."""
    for file in sorted(KERNELS.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in node.decorator_list):
                yield file, node


def names_in(function: ast.FunctionDef) -> set[str]:
    return {node.id for part in function.body for node in ast.walk(part) if isinstance(node, ast.Name)}


def programs() -> dict[str, ast.FunctionDef]:
    """Those that no other one uses: they are launched. A name with an underscore means a function of its own file."""
    found = list(jitted())
    own = {file: set().union(*(names_in(f) for other, f in found if other == file)) for file, _ in found}
    everywhere = set().union(*own.values())
    return {
        f"{file.stem}.{f.name}": f
        for file, f in found
        if f.name not in (own[file] if f.name.startswith("_") else everywhere)
    }


def first_statement(function: ast.FunctionDef) -> str:
    documented = ast.get_docstring(function) is not None
    return ast.unparse(function.body[int(documented)])


def test_every_program_waits_first():
    found = programs()
    assert {"rows._sum_kernel", "attention_programs.forward_tiled", "attention_keys.hopper_keys"} <= found.keys()
    assert [name for name, program in found.items() if first_statement(program) != WAIT] == []


def test_what_programs_call_does_not_wait_again():
    waiting = {f"{file.stem}.{f.name}" for file, f in jitted() if "wait_for_predecessors" in names_in(f)}
    assert waiting == programs().keys()


def test_every_launch_goes_through_run_program():
    called = [
        f"{file.stem}: {ast.unparse(node.func)}"
        for file in sorted(KERNELS.rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)
    ]
    assert called == ["instructions: program[grid]", "tuning: _defaults[name]"], "the latter is a table of functions"


class Program:
    """Notes what it is launched with."""

    launched = None

    def __getitem__(self, grid):
        return lambda *arguments, **named: setattr(self, "launched", (grid, arguments, named))


@pytest.mark.parametrize(
    ("interpreted", "capability", "early"), [(False, 80, {}), (False, 90, {"launch_pdl": True}), (True, 90, {})]
)
def test_launches_are_early_where_the_gpu_has_that(monkeypatch, interpreted, capability, early):
    monkeypatch.setattr(instructions, "INTERPRETED", tl.constexpr(interpreted))
    program = Program()
    with tuning.assume_capability(capability):
        instructions.run_program(program, (3, 2), 5, num_warps=4)
    assert program.launched == ((3, 2), (5,), {"num_warps": 4, **early})


#: Prints per compiled kernel: how often it waits, and whether that stands before every access to global memory.
COMPILED = r"""
import re
import compile_targets as targets
from scalefold.kernels.compile_cases import optimizer
from scalefold.kernels.ops.attention import compile_cases
ACCESS = re.compile(r"(ld|st)\.global|cp\.async|(red|atom)\.")
cases = [("optimizer", lambda: optimizer(1 << 16)), *(case for case in compile_cases() if "triangle" in case[0])]
for target in (80, 90):
    for _, launches in targets.different_launches(cases, target, targets._text_key):
        for launch in launches:
            lines = targets.compile_launch(launch, target).asm["ptx"].splitlines()
            waits = [n for n, line in enumerate(lines) if "griddepcontrol.wait" in line]
            first = min(n for n, line in enumerate(lines) if ACCESS.search(line))
            print(target, launch.kernel.fn.__name__, len(waits), all(n < first for n in waits))
"""


def test_compiled_kernels_wait_once_before_memory_and_only_where_the_gpu_can(repository, tmp_path):
    """In a process of its own: the interpreter, in which kernel tests run, cannot be switched off later."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    folders = [str(repository / "benchmarks" / "measure"), *sys.path]
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(folders)}
    done = subprocess.run([sys.executable, "-c", COMPILED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [line.split() for line in done.stdout.splitlines()]
    names = {(target, name) for target, name, *_ in found}
    assert names >= {("80", "_adam_swa_kernel"), ("90", "_adam_swa_kernel"), ("90", "hopper_keys")}
    assert [line for line in found if line[2:] != [str(int(line[0] == "90")), "True"]] == []
