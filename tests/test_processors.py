"""How many processors a process may use: counted in one place, which knows what a container allows."""

import ast
from pathlib import Path

import pytest

from scalefold import doctor, processors

COUNTERS = {"cpu_count", "process_cpu_count", "sched_getaffinity"}  # none of which knows a container's quota


@pytest.fixture
def container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The quota's file of a container on a machine of 64 processors."""
    monkeypatch.setattr(processors, "CPU_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(processors.os, "sched_getaffinity", lambda process: set(range(64)), raising=False)
    return tmp_path / "cpu.max"


@pytest.mark.parametrize(
    ("quota", "count"), [(None, 64), ("1600000 100000\n", 16), ("max 100000\n", 64), ("50000 100000\n", 1)]
)
def test_processors_are_those_of_the_container(container: Path, quota: str | None, count: int) -> None:
    """A machine shows all of its processors to a container that may use some of them."""
    if quota is not None:
        container.write_text(quota)
    assert processors.processors() == count


def test_the_doctor_names_the_processors_of_the_container(container: Path) -> None:
    container.write_text("1600000 100000\n")
    (cpu,) = (finding for finding in doctor.examine() if finding.topic == "cpu")
    assert cpu.text.startswith("16 cores")


def counters(file: Path) -> set[str]:
    """Functions that count processors and occur in a file, as attributes or imported names."""
    nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    names = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    names |= {alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
    return names & COUNTERS


def test_no_other_file_counts_processors(repository: Path) -> None:
    counting = repository / "src" / "scalefold" / "processors.py"
    files = [file for folder in ("src", "benchmarks", "tests") for file in (repository / folder).rglob("*.py")]
    assert counters(counting)
    assert [str(file) for file in files if file != counting and counters(file)] == []
