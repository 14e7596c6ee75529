"""launch/run.sh keeps compiled code in a folder of the user's own, and nowhere else."""

import os
import subprocess
from pathlib import Path

import pytest


def run(repository: Path, cache_dir: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"SCALEFOLD_CACHE_DIR": str(cache_dir)}
    command = ["bash", str(repository / "launch" / "run.sh"), "sh", "-c", 'echo "${TRITON_CACHE_DIR}"']
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_a_new_folder_is_private(repository: Path, tmp_path: Path) -> None:
    done = run(repository, tmp_path / "cache")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}/cache/triton\n")
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700


def test_a_folder_that_others_may_write_to_is_closed(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    assert run(repository, tmp_path / "cache").returncode == 0
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o755


def test_a_link_is_refused(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "cache").symlink_to("theirs")
    done = run(repository, tmp_path / "cache")
    assert (done.returncode, done.stdout) == (2, "")
    assert f"error: {tmp_path}/cache: belongs to somebody else or is a link" in done.stderr
    assert list((tmp_path / "theirs").iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_somebody_else_is_refused(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    os.chown(tmp_path / "cache", 65534, 65534)
    done = run(repository, tmp_path / "cache")
    assert (done.returncode, done.stdout) == (2, "")
    assert "belongs to somebody else" in done.stderr
