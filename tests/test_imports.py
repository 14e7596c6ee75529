"""Who may lean on whom: the import statements of every room."""

import ast
from pathlib import Path

import pytest

# room -> third-party packages and our own rooms that it may import; a single file may stand for itself
TORCH_FREE = {"numpy", "pydantic", "yaml", "mlperf_logging", "pandas"}
DATA_FILES = {"numpy", "h5py", "gemmi", "kalign", "mpi4py"}
RULES: dict[str, tuple[set[str], set[str]]] = {
    "config": ({"pydantic", "yaml"}, {"errors", "textfile"}),
    "errors": (set(), set()),
    "mlperf": (TORCH_FREE, {"errors", "mlperf", "config", "scaling.step_time", "textfile"}),
    "scaling": (TORCH_FREE, {"errors", "scaling", "mlperf", "config", "report"}),
    "report": ({"numpy", "rich", "matplotlib"}, {"errors", "report", "mlperf", "textfile"}),
    "kernels": ({"torch", "triton"}, {"kernels", "errors", "textfile"}),
    "model": ({"torch"}, {"kernels", "config", "model", "data.residues", "errors"}),
    "loss": ({"torch"}, {"kernels", "config", "model.rigid", "data.residues", "violations", "metrics", "loss"}),
    "violations": ({"torch"}, {"data.residues"}),
    "metrics": ({"torch"}, set()),
    "parallel": ({"torch", "mpi4py"}, {"config", "kernels", "errors", "parallel", "optim"}),
    "optim": ({"torch", "numpy"}, {"config", "kernels", "errors"}),
    "compile": ({"torch"}, {"optim", "parallel", "config", "kernels", "errors", "data"}),
    "launch": ({"torch", "yaml"}, {"config", "errors", "launch", "parallel.ranks"}),
    "data": (DATA_FILES | {"torch"}, {"errors", "data", "stop_signals", "textfile"}),
    "textfile": (set(), {"errors"}),
}
TORCH_IN_DATA = {"loader", "shared_loader", "transforms", "synthetic", "features", "sampler", "bench"}
STANDARD_LIBRARY = __import__("sys").stdlib_module_names


def source_files(repository: Path) -> list[Path]:
    return sorted((repository / "src" / "scalefold").rglob("*.py"))


def imported(file: Path) -> set[str]:
    """Absolute names of all modules that a file imports, wherever the statement stands."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room_of(file: Path, repository: Path) -> str:
    first = file.relative_to(repository / "src" / "scalefold").parts[0]
    return first.removesuffix(".py")


def offences(file: Path, room: str) -> list[str]:
    packages, rooms = RULES[room]
    found = []
    for name in imported(file):
        top = name.split(".")[0]
        if top == "scalefold":
            inner = name.removeprefix("scalefold").lstrip(".")
            if inner and not any(inner == r or inner.startswith(f"{r}.") for r in rooms):
                found.append(name)
        elif top not in packages and top not in STANDARD_LIBRARY:
            found.append(name)
    return found


@pytest.mark.parametrize("room", sorted(RULES))
def test_a_room_leans_only_on_the_rooms_below_it(repository: Path, room: str) -> None:
    files = [file for file in source_files(repository) if room_of(file, repository) == room]
    assert files, f"no files in {room}: the table is out of date"
    assert {str(f): o for f in files if (o := offences(f, room))} == {}


def test_only_the_loading_part_of_data_needs_torch(repository: Path) -> None:
    folder = repository / "src" / "scalefold" / "data"
    users = {f.stem for f in folder.glob("*.py") if any(n.split(".")[0] == "torch" for n in imported(f))}
    assert users <= TORCH_IN_DATA


def test_the_model_names_no_rank_and_no_device_kind(repository: Path) -> None:
    words = ("cuda", "rank", "world_size", "dap_size", "torch.distributed")
    for file in (repository / "src" / "scalefold" / "model").glob("*.py"):
        tree = ast.parse(file.read_text())
        names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
        names |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
        assert not names & set(words), f"{file.name}: {names & set(words)}"
