"""The same command under plain ``mpirun``: ranks and the meeting point come from MPI."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from runs import SMALLEST, TINY
from scalefold.report.record import read_metrics

MPIRUN = shutil.which("mpirun")
pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(MPIRUN is None, reason="mpirun is not installed (Debian: openmpi-bin)"),
    pytest.mark.skipif(importlib.util.find_spec("mpi4py") is None, reason="pip install 'scalefold[mpi]'"),
]


def mpirun(store: Path, run_dir: Path, *overrides: str, processes: int = 2) -> subprocess.CompletedProcess[str]:
    """``mpirun -n 2 scalefold train configs/tiny.yaml ...`` with nothing set that another launcher would set."""
    command = [
        *(str(MPIRUN), "--allow-run-as-root", "--oversubscribe", "-n", str(processes)),
        *(sys.executable, "-c", "from scalefold.cli import main; main()", "train", str(TINY)),
        *(*SMALLEST, f"data.store_dir={store}", f"run.run_dir={run_dir}", "parallel.ranks_per_node=2", *overrides),
    ]
    outside = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {key: value for key, value in os.environ.items() if key not in outside}
    return subprocess.run(command, env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)


def test_two_mpi_ranks_train_together(tiny_store: Path, tmp_path: Path) -> None:
    done = mpirun(tiny_store, tmp_path / "run", "training.target_avg_lddt_ca_value=0.001")
    assert done.returncode == 0, done.stdout + done.stderr
    metrics = read_metrics(tmp_path / "run")
    assert (metrics.run["launcher"], metrics.run["world_size"]) == ("mpirun", 2)
    assert metrics.step.tolist() == [1, 2]


def test_a_wrong_number_of_mpi_ranks_is_an_error_of_one_line(tiny_store: Path, tmp_path: Path) -> None:
    done = mpirun(tiny_store, tmp_path / "run", processes=1)
    assert done.returncode != 0
    assert "error: mpirun started 1 processes, but parallel: nodes 1 x 2 per node = 2" in done.stderr
    assert "Traceback" not in done.stderr
