"""The house keeps its shape: who may import whom, no circles, small folders and files, few arguments.

Every list of exceptions may only shrink: an entry that is no longer needed fails its test, and so does one that a
file, folder or function has outgrown.
"""

import ast
from pathlib import Path

import pytest

# room -> third-party packages and our own rooms that it may import; the longest name that fits a file is its room.
# A room may name another one's part only where the whole would be too much.
NUMBERS, DEEP = {"numpy"}, {"torch"}
RULES: dict[str, tuple[set[str], set[str]]] = {
    "errors": (set(), set()),
    "textfile": (set(), {"errors"}),
    "stop_signals": (set(), set()),
    "processors": (set(), set()),
    "config": ({"pydantic", "yaml"}, {"errors", "textfile", "yamlfile"}),
    "yamlfile": ({"yaml"}, {"errors"}),
    "telemetry": (DEEP, {"config", "errors", "textfile"}),
    "phases": (set(), {"config"}),
    "doctor": (DEEP, {"node_findings", "processors", "scaling.step_time"}),
    "autopsy": (set(), {"doctor", "errors", "mlperf.log", "report", "parallel.ending", "step.checkpoint"}),
    "node_findings": (set(), {"run.compile_ahead"}),
    "kernels": ({"torch", "triton"}, {"errors", "textfile"}),
    "tune": (
        {"torch", "triton", "numpy", "sklearn", "matplotlib"},
        {"config", "errors", "kernels", "model", "processors"},
    ),
    "model": (DEEP, {"kernels.table", "kernels.destination", "config", "data.residues", "data.batch_keys", "errors"}),
    "parallel": ({"torch", "mpi4py"}, {"config", "errors"}),
    "parallel.dap": (
        {"torch", "triton"},
        {"config", "errors", "parallel", "kernels.around.aside", "kernels.destination", "kernels.instructions"},
    ),
    "data.residues": (NUMBERS, set()),
    "data.batch_keys": (set(), set()),
    "data.raw": ({"numpy", "gemmi"}, {"data.residues", "errors", "textfile"}),
    "data.features": ({"numpy", "torch"}, {"config", "data.residues", "data.batch_keys", "errors"}),
    "data.store": ({"numpy", "h5py", "mpi4py"}, {"data.raw", "data.residues", "errors", "textfile"}),
    "data.loading": ({"numpy", "torch"}, {"data.features", "data.store", "errors", "stop_signals"}),
    "data.made": (
        {"numpy", "torch"},
        {"data.raw", "data.features", "data.store", "data.loading", "data.residues", "errors"},
    ),
    "data.configured": (set(), {"config", "data.features", "data.store"}),
    "step": (
        {"torch", "numpy"},
        {"config", "phases", "errors", "kernels", "model", "parallel", "processors", "data.features", "data.loading"},
    ),
    "mlperf.log": ({"numpy", "mlperf_logging"}, {"errors", "textfile"}),
    "mlperf.judge": ({"numpy", "yaml", "mlperf_logging", "pandas"}, {"errors", "textfile", "mlperf.log"}),
    "mlperf.pack": (
        {"mlperf_logging"},
        {"errors", "textfile", "mlperf.log", "mlperf.judge", "config", "scaling.step_time"},
    ),
    "report": ({"numpy", "rich", "matplotlib"}, {"errors", "textfile", "mlperf.log", "mlperf.judge", "telemetry"}),
    "scaling": (NUMBERS, {"errors", "config", "mlperf.log", "report.record"}),
    "launch": ({"torch", "yaml"}, {"config", "errors", "parallel", "mlperf", "report", "scaling", "telemetry"}),
    "rehearse": (DEEP, {"errors"}),
    "eval": (
        DEEP,
        {"config", "phases", "errors", "kernels", "model", "parallel", "data", "step", "mlperf.log", "report"},
    ),
    "run": (
        DEEP,
        {
            *("config", "phases", "errors", "stop_signals", "kernels", "model", "parallel", "data", "step", "eval"),
            *("mlperf.log", "report", "launch.placement", "telemetry", "rehearse"),
        },
    ),
}
TORCH_IN_DATA = {"loading", "made", "features"}
#: file -> lines; why it is long stands in its first lines
LONG_FILES = {
    "benchmarks/measure/fuzz_readers.py": 480,
    "src/scalefold/data/features/features.py": 480,
    "src/scalefold/data/loading/loader.py": 520,
    "src/scalefold/data/raw/mmcif.py": 480,
    "src/scalefold/data/store/store.py": 560,
    "src/scalefold/mlperf/log/events.py": 520,
    "src/scalefold/report/plots.py": 560,
    "tests/equivalence/test_real_files.py": 440,
    "tests/test_launch.py": 560,
    "tests/test_mlperf_package.py": 720,
    "tests/test_prepare.py": 660,
    "tests/test_report_page.py": 440,
}
FULL_FOLDERS = {"kernels/ops": 14, "model": 13}
FILES_PER_FOLDER, LINES, ARGUMENTS, PROGRAM_ARGUMENTS = 10, 400, 10, 25
MANY_ARGUMENTS = {
    "data/loading/sampler.py::__init__": 11,
    "kernels/ops/adam_swa.py::adam_swa": 11,
    "kernels/ops/global_attention.py::global_attention": 14,
    "kernels/ops/point_attention.py::forward": 12,
    "kernels/ops/point_attention.py::invariant_point_attention": 11,
    "kernels/ops/triangle.py::triangle_output": 11,
    "kernels/ops/triangle.py::triangle_project": 13,
    "kernels/reference.py::adam_swa": 11,
    "kernels/reference.py::global_attention": 14,
    "kernels/reference.py::invariant_point_attention": 11,
    "kernels/reference.py::triangle_output": 11,
    "kernels/reference.py::triangle_project": 13,
}
LONG_PROGRAMS: dict[str, int] = {}
STANDARD_LIBRARY = __import__("sys").stdlib_module_names


@pytest.fixture(scope="module")
def package() -> Path:
    return Path(__file__).resolve().parents[1] / "src" / "scalefold"


@pytest.fixture(scope="module")
def modules(package: Path) -> dict[str, Path]:
    """Every module of ours, without ``scalefold.``."""
    found = {}
    for file in sorted(package.rglob("*.py")):
        name = ".".join(file.relative_to(package).with_suffix("").parts).removesuffix("__init__").rstrip(".")
        found[name] = file
    return found


def imported(file: Path) -> set[str]:
    """Absolute names of all modules and their parts that a file imports, wherever the statement stands."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def longest(name: str, known: object) -> str | None:
    """The longest of ``known`` dotted names that is ``name`` or holds it."""
    fits = [k for k in known if name == k or name.startswith(f"{k}.")]  # type: ignore[attr-defined]
    return max(fits, key=len, default=None)


def own_imports(file: Path) -> set[str]:
    return {n.removeprefix("scalefold.") for n in imported(file) if n.startswith("scalefold.")}


def offences(file: Path, room: str) -> list[str]:
    packages, rooms = RULES[room]
    allowed = rooms | {room}
    found = [name for name in own_imports(file) if not longest(name, allowed) and name != "__version__"]
    tops = {name.split(".")[0] for name in imported(file)} - {"scalefold"}
    return found + sorted(tops - packages - STANDARD_LIBRARY)


@pytest.mark.parametrize("room", sorted(RULES))
def test_a_room_leans_only_on_the_rooms_below_it(modules: dict[str, Path], room: str) -> None:
    files = [file for name, file in modules.items() if longest(name, RULES) == room]
    assert {str(f): o for f in files if (o := offences(f, room))} == {}


def test_every_file_but_the_command_line_has_a_room_with_rules(modules: dict[str, Path]) -> None:
    free = {"", "__main__", "data", "mlperf"} | {name for name in modules if name.split(".")[0] == "cli"}
    assert {name for name in modules if not longest(name, RULES)} - free == set()


def circles(arrows: dict[str, set[str]]) -> set[str]:
    """Names from which a walk along the arrows comes back."""

    def reached(start: str) -> set[str]:
        seen, todo = set(), [start]
        while todo:
            for name in arrows.get(todo.pop(), set()) - seen:
                seen.add(name)
                todo.append(name)
        return seen

    return {name for name in arrows if name in reached(name)}


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == {"b", "c"}


def test_no_rooms_import_each_other_in_a_circle(modules: dict[str, Path]) -> None:
    arrows: dict[str, set[str]] = {}
    for name, file in modules.items():
        room = longest(name, RULES) or name
        found = {longest(longest(other, modules) or other, RULES) or other for other in own_imports(file)}
        arrows.setdefault(room, set()).update(found - {room})
    assert circles(arrows) == set()


def test_only_some_rooms_of_data_need_torch(modules: dict[str, Path]) -> None:
    users = {
        n for n, f in modules.items() if n.startswith("data.") and any(i.split(".")[0] == "torch" for i in imported(f))
    }
    assert {name.split(".")[1] for name in users} <= TORCH_IN_DATA


def test_the_model_names_no_rank_and_no_device_kind(package: Path) -> None:
    words = {"cuda", "rank", "world_size", "dap_size", "torch.distributed"}
    for file in (package / "model").glob("*.py"):
        tree = ast.parse(file.read_text())
        names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
        names |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
        assert not names & words, f"{file.name}: {names & words}"


def judged(found: dict[str, int], limit: int, exceptions: dict[str, int]) -> dict[str, str]:
    """What is too large: over the limit without an exception, over its exception, or an exception without need."""
    wrong = {name: f"{size}, at most {exceptions.get(name, limit)}" for name, size in found.items()}
    too_large = {name: text for name, text in wrong.items() if found[name] > exceptions.get(name, limit)}
    needless = {name: "needs no exception" for name in exceptions if found.get(name, 0) <= limit}
    return too_large | needless


def test_exceptions_only_shrink() -> None:
    assert judged({"a": 5, "b": 11, "c": 13}, 10, {"c": 12, "a": 12}) == {
        "b": "11, at most 10",
        "c": "13, at most 12",
        "a": "needs no exception",
    }


def test_a_folder_holds_about_ten_files(package: Path) -> None:
    folders: dict[str, int] = {}
    for file in package.rglob("*.py"):
        if file.name != "__init__.py":
            folder = file.parent.relative_to(package).as_posix()
            folders[folder] = folders.get(folder, 0) + 1
    assert judged(folders, FILES_PER_FOLDER, FULL_FOLDERS) == {}


def python_files(repository: Path) -> dict[str, str]:
    """Text of every file of ours, by its path in the repository."""
    folders = ("src", "tests", "benchmarks")
    return {
        f.relative_to(repository).as_posix(): f.read_text()
        for name in folders
        for f in (repository / name).rglob("*.py")
    }


def test_a_file_has_at_most_400_lines(repository: Path) -> None:
    lines = {name: len(text.splitlines()) for name, text in python_files(repository).items()}
    assert judged(lines, LINES, LONG_FILES) == {}


def test_a_longer_file_says_why_in_its_first_lines(repository: Path) -> None:
    texts = python_files(repository)
    documentation = {name: ast.get_docstring(ast.parse(texts[name])) or "" for name in LONG_FILES}
    assert [name for name, text in documentation.items() if "Longer than 400 lines, because " not in text] == []


def argument_counts(package: Path, programs: bool) -> dict[str, int]:
    """Arguments without ``self`` of functions, or of Triton programs; the key is file and name."""
    found = {}
    for file in package.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.FunctionDef):
                continue
            is_program = any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            if is_program == programs:
                key = f"{file.relative_to(package).as_posix()}::{node.name}"
                found[key] = max(found.get(key, 0), sum(a.arg not in ("self", "cls") for a in arguments))
    return found


def test_a_function_has_at_most_ten_arguments(package: Path) -> None:
    counts = {name: n for name, n in argument_counts(package, programs=False).items() if not name.startswith("cli/")}
    assert judged(counts, ARGUMENTS, MANY_ARGUMENTS) == {}


def test_a_triton_program_has_at_most_25_arguments(package: Path) -> None:
    assert judged(argument_counts(package, programs=True), PROGRAM_ARGUMENTS, LONG_PROGRAMS) == {}
