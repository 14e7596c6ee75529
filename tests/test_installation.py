"""Setting up on a machine that has nothing: what `make setup` does, and what `make test-install` would notice."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import installation
from scalefold.doctor import PAIRS

import install  # isort: skip (found beside the tests by the line above)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Arguments of every call of pip; all succeed but those to PyTorch's own index."""
    made: list[list[str]] = []

    def pip(python: Path, *arguments: str, stderr: int | None = None) -> subprocess.CompletedProcess:
        made.append(list(arguments))
        return subprocess.CompletedProcess(arguments, int("--index-url" in arguments))

    monkeypatch.setattr(install, "pip", pip)
    monkeypatch.setattr(install, "environment", lambda venv: venv / "bin" / "python")
    monkeypatch.setattr(install, "installed_torch", lambda python: "")
    monkeypatch.setattr(install.subprocess, "run", lambda *arguments, **options: None)
    monkeypatch.setattr("platform.system", lambda: "Linux")
    return made


def test_every_version_that_setup_and_image_install_is_a_tried_pair_and_named_in_the_readme(repository: Path) -> None:
    assert set(install.TORCH.values()) <= {f"torch=={pair.torch}" for pair in PAIRS}
    image = re.search(r"^ARG TORCH=(\S+)$", (repository / "docker" / "Dockerfile").read_text(), re.M)
    measured = [f"torch=={pair.torch}" for pair in PAIRS if pair.tried == "measured"]
    assert [install.TORCH["cuda"]] == measured == [image and image[1]]
    readme = (repository / "README.md").read_text()
    assert all(f"{pair.torch} + {pair.triton}" in readme for pair in PAIRS)


def test_torch_and_triton_are_left_to_whoever_chooses_the_variant(repository: Path) -> None:
    assert not re.search(r"^(torch|triton)\b", (repository / "constraints.txt").read_text(), re.M)
    assert install.triton_for("torch==2.13.0") == ["triton==3.7.1"]
    assert install.triton_for("torch>=2.11") == []


def test_without_a_driver_the_cpu_build_is_tried_and_the_default_one_replaces_it(
    tmp_path: Path, calls: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(install, "detect_variant", lambda: "cpu")
    install.set_up(tmp_path, install.Choice("", ""))
    first, second, third = calls
    assert first[-1] == "torch==2.13.0"
    assert install.CPU_INDEX in first
    assert {"torch==2.13.0", "triton==3.7.1", "setuptools"} < set(second)
    assert {"torch==2.13.0", "triton==3.7.1", "--no-build-isolation"} < set(third)
    said = capsys.readouterr().out
    assert "no NVIDIA driver here; TORCH_VARIANT=cuda or cpu" in said
    assert f"taking the default build, which brings CUDA: {install.SIZES['cuda']}" in said


def test_with_a_driver_the_measured_build_brings_its_own_triton(
    tmp_path: Path, calls: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(install, "detect_variant", lambda: "cuda")
    install.set_up(tmp_path, install.Choice("", ""))
    assert len(calls) == 2
    for arguments in calls:
        assert "torch==2.11.0" in arguments
        assert not [argument for argument in arguments if argument.startswith("triton")]
    assert install.SIZES["cuda"] in capsys.readouterr().out


def test_a_cpu_build_does_not_stay_when_cuda_is_asked_for(
    tmp_path: Path, calls: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(install, "installed_torch", lambda python: "2.13.0+cpu")
    install.set_up(tmp_path, install.Choice("cuda", "torch==2.13.0"))
    assert calls[0] == ["uninstall", "--yes", "torch"]


def test_what_is_installed_already_is_not_asked_of_pytorchs_index_again(
    tmp_path: Path, calls: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(install, "installed_torch", lambda python: "2.13.0+cpu")
    install.set_up(tmp_path, install.Choice("cpu", ""))
    assert not [arguments for arguments in calls if "--index-url" in arguments]


@pytest.mark.parametrize(
    ("written", "asked", "answer"),
    [
        (None, ("", ""), ("", "")),
        ("", ("", ""), ("", "")),
        ("cpu torch==2.15.0\n", ("", ""), ("cpu", "torch==2.15.0")),
        ("cpu torch==2.15.0\n", ("", "torch==2.11.0"), ("cpu", "torch==2.11.0")),
        ("cpu torch==2.15.0\n", ("cuda", ""), ("cuda", "")),
        (" torch==2.15.0\n", ("", ""), ("", "torch==2.15.0")),
    ],
)
def test_a_choice_lasts_until_another_one(
    written: str | None, asked: tuple[str, str], answer: tuple[str, str], tmp_path: Path
) -> None:
    if written is not None:
        (tmp_path / ".ready").write_text(written)
    assert install.remembered(tmp_path, install.Choice(*asked)) == answer


def test_an_environment_counts_as_ready_only_when_all_of_it_is_there(
    tmp_path: Path, calls: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    install.set_up(tmp_path, install.Choice("cuda", "torch==2.13.0"))
    assert (tmp_path / ".ready").read_text() == "cuda torch==2.13.0\n"
    failed = subprocess.CompletedProcess([], 1)
    monkeypatch.setattr(install, "pip", lambda *arguments, **options: failed)
    with pytest.raises(install.SetupError, match="pip could not install"):
        install.set_up(tmp_path, install.Choice("", ""))
    assert not (tmp_path / ".ready").exists()


def test_an_environment_that_was_left_without_pip_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    assert not install.succeeds([str(python), "-m", "pip", "--version"])
    made: list[list[str]] = []
    monkeypatch.setattr(install, "succeeds", lambda command: bool(made.append(command)) or "venv" in command)
    install.environment(tmp_path)
    assert made[-1] == [sys.executable, "-m", "venv", "--clear", str(tmp_path)]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("importlib.util.find_spec", lambda name: None, "apt install python3-venv"),
        ("sys.version_info", (3, 9, 2), r"needs Python 3\.11 or newer.*PYTHON=python3\.11"),
    ],
)
def test_a_missing_part_of_python_is_one_line_and_leaves_nothing_behind(
    name: str, value: object, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(name, value)
    with pytest.raises(install.SetupError, match=message):
        install.environment(tmp_path / "venv")
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize(("system", "variant"), [("Linux", "rocm"), ("Darwin", "cuda")])
def test_a_variant_that_does_not_exist_is_refused_before_anything_is_made(
    system: str, variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("platform.system", lambda: system)
    assert install.main(["--venv", str(tmp_path / "venv"), "--variant", variant]) == 1
    assert capsys.readouterr().err.startswith(f"setup: TORCH_VARIANT={variant}: ")
    assert not (tmp_path / "venv").exists()


def test_make_asks_again_for_a_finished_environment_only_if_a_choice_is_given(repository: Path, tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "install.py"):
        shutil.copy(repository / name, tmp_path)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / ".ready").touch()

    def commands(*choices: str) -> str:
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS", "TORCH"))}
        dry = ["make", "--dry-run", "setup", *choices]
        return subprocess.run(dry, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout

    assert "install.py" not in commands()
    assert '--torch "torch==2.11.0"' in commands("TORCH=torch==2.11.0")
    assert '--variant "cpu"' in commands("TORCH_VARIANT=cpu")


def test_no_setting_of_pip_but_certificates_reaches_an_isolated_installation(tmp_path: Path) -> None:
    spoiled = os.environ | {
        "PIP_FIND_LINKS": "/wheels",
        "PIP_EXTRA_INDEX_URL": "file:///index",
        "PIP_CERT": "/certificates.pem",
        "PYTHONPATH": "/modules",
        "MAKEFLAGS": "-- TORCH=torch",
    }
    environment = installation.isolated(spoiled, tmp_path)
    assert not {"PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PYTHONPATH", "MAKEFLAGS"} & set(environment)
    command = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split("\n")
    assert {line.partition("=")[0] for line in listed if line} <= {":env:.cert", ":env:.config-file"}


def resolver(folder: Path, script: str) -> Path:
    """A program that answers in the place of uv."""
    uv = folder / "uv"
    uv.write_text(f"#!/bin/sh\ncat > {folder}/input\n{script}\n")
    uv.chmod(0o755)
    return uv


def test_the_matrix_shows_what_is_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uv = resolver(tmp_path, "echo torch==2.13.0; echo triton==3.7.1")
    assert installation.matrix(uv, os.environ) == []
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| 3.")]
    assert len(table) == len(install.TORCH) * len(installation.PYTHONS)
    assert all(line.count("torch 2.13.0, Triton 3.7.1") == len(installation.PLATFORMS) for line in table)


def test_a_pin_that_cannot_be_satisfied_is_a_failure_with_its_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uv = resolver(
        tmp_path, "case \"$*\" in *3.14*darwin*) echo 'torch needs another' >&2; exit 1;; esac\necho torch==1"
    )
    wrong = installation.matrix(uv, os.environ)
    assert wrong == [f"{variant}, Python 3.14, macOS 14 arm64: torch needs another" for variant in install.TORCH]
    assert capsys.readouterr().out.count("FAILS") == len(install.TORCH)
