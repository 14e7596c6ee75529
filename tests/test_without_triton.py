"""Triton exists for Linux only: elsewhere everything but kernels works, with the plain operations, and says so."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from runs import SMALLEST

HIDE = """
import sys
from importlib.machinery import PathFinder

class WithoutTriton(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] == "triton" else super().find_spec(name, path, target)

    @classmethod
    def find_distributions(cls, context=None):
        found = super().find_distributions() if context is None else super().find_distributions(context)
        return (one for one in found if one.metadata["Name"] != "triton")

sys.meta_path[:] = [WithoutTriton if finder is PathFinder else finder for finder in sys.meta_path]
"""


@pytest.fixture
def python(tmp_path: Path, repository: Path):
    """Run Python in processes, and children of theirs, that find no Triton."""
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "sitecustomize.py").write_text(HIDE)
    path = os.pathsep.join([str(tmp_path / "hidden"), str(repository / "src")])

    def run(*arguments: str) -> subprocess.CompletedProcess:
        environment = os.environ | {"PYTHONPATH": path}
        return subprocess.run(
            [sys.executable, *arguments], cwd=repository, env=environment, capture_output=True, text=True
        )

    return run


def test_triton_is_hidden_here(python) -> None:
    assert "No module named 'triton'" in python("-c", "import triton").stderr


def test_only_the_kernels_and_their_tuning_need_triton(python) -> None:
    code = (
        "import importlib, pkgutil, scalefold\n"
        "for module in pkgutil.walk_packages(scalefold.__path__, 'scalefold.'):\n"
        "    needs = module.name.startswith(('scalefold.kernels.', 'scalefold.tune.'))\n"
        "    if not needs and not module.name.endswith('__main__'):\n"
        "        try:\n"
        "            importlib.import_module(module.name)\n"
        "        except ModuleNotFoundError as error:\n"
        "            print(module.name, error)\n"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert {line.split()[0] for line in done.stdout.splitlines()} <= {
        "scalefold.parallel.dap.connect",
        "scalefold.parallel.dap.direct",
        "scalefold.parallel.dap.peer_memory",
    }  # GPUs only


def test_the_doctor_finds_no_problem(python) -> None:
    done = python("-m", "scalefold", "doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "everything takes the plain PyTorch operations" in done.stdout


def test_training_runs_with_the_plain_operations_and_says_so_at_its_start(
    python, tiny_store: Path, tmp_path: Path
) -> None:
    changes = (f"data.store_dir={tiny_store}", f"run.run_dir={tmp_path / 'run'}", "execution.kernels=auto")
    done = python("-m", "scalefold", "train", "configs/tiny.yaml", *SMALLEST, *changes, "training.num_train_iters=2")
    assert done.returncode == 4, done.stdout + done.stderr  # its steps ended before the target
    said = done.stdout + done.stderr
    assert said.index("operations: plain PyTorch on cpu") < said.index("step    1")
