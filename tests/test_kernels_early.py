"""Programs that are launched while those before them end: all of them wait, before they touch memory, and only then."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import triton.language as tl

from processes import compiling_environment
from scalefold.config import load_config
from scalefold.kernels import instructions, tuning
from scalefold.kernels.choice import operations
from scalefold.step.build import launches_early, shares_finely

ACCESS = re.compile(r"\b(?:ld|st|red|atom|cp)(?:\.\w+)*[.:]+(?:global|bulk|async)\b")


def jitted(source: Path) -> list[ast.FunctionDef]:
    """Functions of a file that Triton or Gluon compiles."""
    functions = [node for node in ast.walk(ast.parse(source.read_text())) if isinstance(node, ast.FunctionDef)]
    return [f for f in functions if any(".jit" in ast.unparse(decorator) for decorator in f.decorator_list)]


def names_in(function: ast.FunctionDef) -> set[str]:
    nodes = [node for statement in function.body for node in ast.walk(statement)]
    return {node.id for node in nodes if isinstance(node, ast.Name)} | {
        node.attr for node in nodes if isinstance(node, ast.Attribute)
    }


def is_early(function: ast.FunctionDef) -> tuple[bool, bool]:
    """Whether it is a program, and whether waiting is its first statement."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    decorators = [ast.unparse(decorator) for decorator in function.decorator_list]
    return decorators[0] == "program", ast.unparse(body[0]) == "wait_for_predecessors()"


def test_what_is_launched_is_a_program_and_waits_first_and_what_is_called_by_it_does_neither(repository):
    package = repository / "src" / "scalefold"
    found = {source: jitted(source) for source in sorted(package.rglob("*.py"))}
    own = {source: set().union(*map(names_in, functions)) for source, functions in found.items() if functions}
    everywhere = set().union(*own.values())
    handed_on = {"pair_features", "letter_features", "extra_features", "template_features"}  # to ``embedding``
    wrong, count = [], 0
    for source, functions in found.items():
        for function in functions:
            called = function.name in (own[source] if function.name.startswith("_") else everywhere | handed_on)
            count += not called
            if is_early(function) != (not called, not called):
                wrong.append(f"{source.relative_to(package)}: {function.name}")
    assert wrong == []
    assert count > 90


class Jitted:
    """Notes what it is launched with."""

    def __init__(self) -> None:
        self.launches: list[dict[str, object]] = []

    def run(self, *arguments: object, **named: object) -> None:
        self.launches.append(named)


@pytest.fixture
def compiled(monkeypatch):
    """As where programs are compiled; nothing stays as a test leaves it."""
    monkeypatch.setattr(instructions, "INTERPRETED", tl.constexpr(False))
    monkeypatch.setattr(instructions, "_early", [False])


@pytest.mark.parametrize(("early", "capability", "expected"), [(True, 90, True), (True, 80, False), (False, 90, False)])
def test_programs_are_launched_early_where_that_is_wanted_and_the_gpu_can(compiled, early, capability, expected):
    kernel = Jitted()
    program = instructions.program(kernel)
    operations("triton", early)
    with tuning.assume_capability(capability):
        program.run(1, grid=(2,), num_warps=4)
    assert kernel.launches == [{"grid": (2,), "num_warps": 4, "launch_pdl": expected}]


def test_interpreted_programs_are_what_they_were(monkeypatch):
    monkeypatch.setattr(instructions, "INTERPRETED", tl.constexpr(True))
    kernel = Jitted()
    assert vars(instructions.program(kernel)) == {"launches": []}


@pytest.mark.parametrize("dap_size", [1, 2, 4, 8])
def test_it_is_wanted_where_ranks_share_a_sample(repository, dap_size):
    overrides = ["training.global_batch_size=1", f"parallel.gpus_per_node={dap_size}", f"parallel.dap_size={dap_size}"]
    config = load_config(repository / "configs" / "base.yaml", overrides).config
    assert launches_early(config) == (dap_size > 1)
    assert shares_finely(config) == (dap_size >= 4)


def faults_of(ptx: str, early: bool) -> str | None:
    """What is wrong with a compiled program, or None."""
    lines = [line.partition("//")[0] for line in ptx.splitlines()]
    waits = [n for n, line in enumerate(lines) if "griddepcontrol.wait" in line]
    first = next((n for n, line in enumerate(lines) if ACCESS.search(line)), len(lines))
    if len(waits) != early:
        return f"waits {len(waits)} times"
    return "touches memory before it waits" if early and first < waits[0] else None


def test_a_program_that_would_not_wait_is_found():
    wait, load = "griddepcontrol.wait;", "@%p1 ld.global.v4.b32 {%r1}, [%rd1];"
    assert faults_of(f"{wait}\n{load}", True) is None
    assert faults_of(load, False) is None
    assert faults_of(f"{load}\n{wait}", True) == "touches memory before it waits"
    assert faults_of(f"cp.async.bulk.tensor.2d.shared [a], [b];\n{wait}", True) == "touches memory before it waits"
    assert faults_of(load, True) == "waits 0 times"
    assert faults_of(wait, False) == "waits 1 times"


@pytest.mark.long
def test_compiled_programs_of_a_step_wait_before_they_touch_memory(repository, tmp_path):
    settings = ["training.global_batch_size=1", "data.val_max_sequence_length=64"]
    settings += ["parallel.gpus_per_node=8", "parallel.dap_size=8"]
    settings += ["model.evoformer.num_blocks=1", "model.extra_msa.num_blocks=1", "model.template.num_blocks=1"]
    command = [sys.executable, "-m", "scalefold", "compile", "--config", str(repository / "configs" / "base.yaml")]
    command += ["--gpu", "H100", "--workers", "2", "--out", str(tmp_path), *settings]
    done = subprocess.run(command, env=compiling_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    programs = sorted(tmp_path.rglob("*.ptx"))
    found = {file.name: faults_of(file.read_text(), early=True) for file in programs}
    assert {name: fault for name, fault in found.items() if fault} == {}
    assert len(programs) > 100
