"""What `make setup` runs: an environment with pinned versions, for a machine that has nothing but Python.

    python3 install.py [--venv .venv] [--variant cuda|cpu] [--torch torch==VERSION]

Sizes are said before anything is downloaded. A choice is remembered in the environment until another one is made.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

PROJECT = Path(__file__).resolve().parent
OLDEST = (3, 11)
CPU_INDEX = "https://download.pytorch.org/whl/cpu"  # PyTorch's own index of builds without CUDA
TORCH = {"cuda": "torch==2.11.0", "cpu": "torch==2.13.0"}  # both in scalefold.doctor.PAIRS
SIZES = {  # whatever an environment already has is not downloaded again
    "cuda": "about 3 GB to download, 5 GB of disk; 3 minutes at 20 MB/s",
    "cpu": "about 0.6 GB to download, 2 GB of disk; 1 minute at 20 MB/s",
    "mac": "about 0.3 GB to download; 1 minute at 20 MB/s",
}


class Choice(NamedTuple):
    """What somebody asked for; an empty text leaves it to the machine."""

    variant: str
    torch: str


class SetupError(Exception):
    """Something the person at this machine has to change; one line."""


def main(arguments: list[str] | None = None) -> int:
    """Make or update the environment and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, default=PROJECT / ".venv")
    parser.add_argument("--variant", default="", help="cuda or cpu (default: cuda where there is an NVIDIA driver)")
    parser.add_argument("--torch", default="", help="requirement, for example torch==2.11.0")
    options = parser.parse_args(arguments)
    try:
        set_up(options.venv.absolute(), Choice(options.variant, options.torch))
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    return 0


def set_up(venv: Path, asked: Choice) -> None:
    """Create ``venv`` if need be, install into it, and leave ``.ready`` in it.

    Raises:
        SetupError: a part of Python is missing, or pip could not install.
    """
    asked = remembered(venv, asked)
    variant = asked.variant or detect_variant()
    check_choice(variant)
    python = environment(venv)
    (venv / ".ready").unlink(missing_ok=True)  # until all of it is there
    torch = asked.torch or TORCH[variant]
    explain(variant, torch, asked, installed_torch(python))
    install(python, variant, torch)
    (venv / ".ready").write_text(f"{asked.variant} {asked.torch}\n")
    subprocess.run([str(python), "-m", "scalefold", "doctor"], check=False)


def remembered(venv: Path, asked: Choice) -> Choice:
    """``asked``, its gaps filled from what was asked for last time; another variant forgets the torch of the last."""
    ready = venv / ".ready"
    variant, _, torch = ready.read_text().strip("\n").partition(" ") if ready.exists() else ("", "", "")
    if asked.variant not in ("", variant):
        torch = ""
    return Choice(asked.variant or variant, asked.torch or torch)


def detect_variant() -> str:
    """``cuda`` where a driver of NVIDIA is loaded or its tools are installed."""
    driver = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi")
    return "cuda" if driver else "cpu"


def check_choice(variant: str) -> None:
    """Refuse what cannot be had."""
    if variant not in TORCH:
        raise SetupError(f"TORCH_VARIANT={variant}: must be {' or '.join(TORCH)}")
    if variant == "cuda" and platform.system() != "Linux":
        raise SetupError(f"TORCH_VARIANT=cuda: there is no such build for {platform.system()}")


def environment(venv: Path) -> Path:
    """The environment's Python; one that was left without pip is made anew."""
    python = venv / "bin" / "python"
    if python.exists() and succeeds([str(python), "-m", "pip", "--version"]):
        return python
    if sys.version_info < OLDEST:
        wanted = ".".join(map(str, OLDEST))
        raise SetupError(
            f"needs Python {wanted} or newer, {sys.executable} is {platform.python_version()}: PYTHON=python{wanted}"
        )
    if importlib.util.find_spec("ensurepip") is None:
        raise SetupError("Python cannot make environments with pip here; Debian, Ubuntu: apt install python3-venv")
    if not succeeds([sys.executable, "-m", "venv", "--clear", str(venv)]):
        raise SetupError(f"`{sys.executable} -m venv {venv}` fails")
    return python


def explain(variant: str, torch: str, asked: Choice, present: str) -> None:
    """Say what will be installed, why, what it costs, and how to choose otherwise."""
    if platform.system() != "Linux":
        say(f"{torch}: {SIZES['mac']}. Triton exists for Linux only: here everything takes plain PyTorch operations.")
        return
    why = "as asked" if asked.variant else "an NVIDIA driver is here" if variant == "cuda" else "no NVIDIA driver here"
    say(f"{variant} build of {torch} ({why}; TORCH_VARIANT=cuda or cpu, and TORCH=torch==VERSION, choose)")
    if not present:
        say(SIZES[variant])


def install(python: Path, variant: str, torch: str) -> None:
    """PyTorch, then everything else beside it."""
    wanted, present = [torch], installed_torch(python)
    if variant == "cuda" and present.endswith("+cpu"):
        pip(python, "uninstall", "--yes", "torch")  # it would satisfy the requirement
    if variant == "cpu" and platform.system() == "Linux":
        wanted += triton_for(torch)  # a build for CPUs brings none
        if torch != f"torch=={present.removesuffix('+cpu')}" and not cpu_build(python, torch):
            say(f"no CPU build from {CPU_INDEX}: taking the default build, which brings CUDA: {SIZES['cuda']}")
    command = ["install", "-c", str(PROJECT / "constraints.txt"), *wanted]
    project = ["--no-build-isolation", "-e", f"{PROJECT}[dev]"]  # built with the setuptools that this torch accepts
    if pip(python, *command, "setuptools").returncode or pip(python, *command, *project).returncode:
        raise SetupError("pip could not install, see above; `make setup` again continues")


def cpu_build(python: Path, torch: str) -> bool:
    """Whether PyTorch's own index gave its build without CUDA."""
    index = ["--index-url", CPU_INDEX, "--timeout", "15", "--retries", "1"]
    done = pip(python, "install", "--upgrade", "--no-deps", *index, torch, stderr=subprocess.DEVNULL)
    return done.returncode == 0


def triton_for(torch: str) -> list[str]:
    """The Triton that belongs to ``torch==VERSION``, as a requirement; nothing for a version without a tested one."""
    sys.path.insert(0, str(PROJECT / "src"))
    from scalefold.doctor import PAIRS

    return [f"triton=={pair.triton}" for pair in PAIRS if torch == f"torch=={pair.torch}"]


def installed_torch(python: Path) -> str:
    """Version of the environment's PyTorch, empty without one."""
    command = "from importlib.metadata import version; print(version('torch'))"
    return subprocess.run([str(python), "-c", command], capture_output=True, text=True).stdout.strip()


def pip(python: Path, *arguments: str, stderr: int | None = None) -> subprocess.CompletedProcess:
    """Run the environment's pip; its progress is seen."""
    command = [str(python), "-m", "pip", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, stderr=stderr)


def succeeds(command: list[str]) -> bool:
    """Whether ``command`` ends with status 0; what it prints is dropped."""
    return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0


def say(text: str) -> None:
    """One line of progress, before what follows is printed."""
    print(f"setup: {text}", flush=True)


if __name__ == "__main__":
    os.chdir(PROJECT)
    sys.exit(main())
