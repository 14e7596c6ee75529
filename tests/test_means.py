"""What a process needs beside its files: one clear line before the run, instead of another culprit's later."""

import collections
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from runs import SMALLEST, TINY, tiny_config
from scalefold.errors import ConfigError
from scalefold.run import begin


def train(store: Path, run_dir: Path, *overrides: str, prefix: str = "") -> subprocess.CompletedProcess[str]:
    places = [f"data.store_dir={store}", f"run.run_dir={run_dir}"]
    arguments = [sys.executable, "-m", "scalefold", "train", str(TINY), *SMALLEST, *places, *overrides]
    return subprocess.run(["bash", "-c", f'{prefix} exec "$@"', "bash", *arguments], capture_output=True, text=True)


def test_a_low_limit_of_open_files_is_named_before_the_run(tiny_store: Path, tmp_path: Path) -> None:
    done = train(tiny_store, tmp_path / "run", "data.num_workers=2", prefix="ulimit -n 40;")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "open files: this process may have 40 (ulimit -n) and needs about" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_soft_limit_of_open_files_is_raised_as_far_as_it_may_be(tiny_store: Path, tmp_path: Path) -> None:
    config, before = tiny_config(tiny_store, tmp_path, "data.num_workers=2"), resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (40 + len(os.listdir("/proc/self/fd")), before[1]))
    try:
        begin.check_open_files(config)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_shared_memory_of_64_kib_is_named_before_the_run(
    tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(65536, 0, 65536))
    config = tiny_config(tiny_store, tmp_path, "data.num_workers=2")
    with pytest.raises(ConfigError, match=r"/dev/shm: 0\.06 MiB free, but 2 loader workers pass batches of .* --shm-"):
        begin.check_means(config)
    begin.check_means(tiny_config(tiny_store, tmp_path))  # without workers nothing passes through it


def test_a_kernel_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"TRITON_CACHE_DIR: .*/file/cache: cannot be written \(Not a directory\)"):
        begin.check_kernel_cache(tmp_path / "file" / "cache")
    begin.check_kernel_cache(tmp_path / "new" / "cache")
    assert list((tmp_path / "new" / "cache").iterdir()) == []
