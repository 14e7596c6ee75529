"""What a fresh machine would install from the package index alone: `make test-install`.

    python3 tests/installation.py [--matrix-only] [--index-url URL]

User and global configuration of pip, extra indexes and local folders of wheels are switched off. First a resolver
answers for every supported Python and platform, wheels only; then `make setup`, `scalefold doctor` and a demo of a few
steps run in a copy of this checkout. Exit status 1 if anything fails. Needs Python and the index, no environment.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(PROJECT), str(PROJECT / "src")]

from install import TORCH, triton_for  # noqa: E402 (needs nothing but Python)

PYTHONS = ("3.11", "3.12", "3.13", "3.14")
PLATFORMS = {
    "Linux x86-64": "x86_64-manylinux_2_28",
    "Linux aarch64": "aarch64-manylinux_2_28",
    "macOS 14 arm64": "aarch64-apple-darwin",
}
FOREIGN = ("PIP_", "UV_", "PYTHON", "VIRTUAL_ENV", "CONDA_", "MAKE", "MFLAGS", "TORCH", "XDG_")
SHORT_DEMO = "base: tiny.yaml\ntraining: {num_train_iters: 8, val_every_iters: 4}\n"
STEPS_ENDED = 4  # exit status of a demo whose steps ended before the target


def isolated(environment: Mapping[str, str], home: Path, index_url: str = "") -> dict[str, str]:
    """``environment`` without settings of pip, Python and make but certificates; caches go to ``home``."""
    kept = {name: value for name, value in environment.items() if not name.startswith(FOREIGN)}
    certificates = environment.get("PIP_CERT")
    if certificates:
        kept |= {"PIP_CERT": certificates, "SSL_CERT_FILE": environment.get("SSL_CERT_FILE", certificates)}
    if index_url:
        kept |= {"PIP_INDEX_URL": index_url, "UV_DEFAULT_INDEX": index_url}
    return kept | {"HOME": str(home), "PIP_CONFIG_FILE": os.devnull, "MACOSX_DEPLOYMENT_TARGET": "14.0"}


def checkout(target: Path) -> Path:
    """A copy of the files of this working tree that git does not ignore."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=PROJECT, check=True, capture_output=True, text=True).stdout.split("\0"):
        if name and (PROJECT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(PROJECT / name, target / name)
    return target


def resolver(folder: Path, environment: Mapping[str, str]) -> Path:
    """uv, which can answer for other machines than this one, in an environment of its own."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, env=environment)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "-c", str(PROJECT / "constraints.txt"), "uv"], check=True, env=environment)
    return folder / "bin" / "uv"


def resolve(
    uv: Path, wanted: list[str], python: str, platform: str, environment: Mapping[str, str]
) -> tuple[bool, str]:
    """Whether ``wanted``, the project and its pins go together there: what is chosen, or why nothing can be."""
    command = [str(uv), "pip", "compile", "--quiet", "--no-config", "--no-header", "--only-binary", ":all:"]
    command += ["--python-version", python, "--python-platform", platform, "--constraints", "constraints.txt"]
    done = subprocess.run(
        [*command, "--extra", "dev", "pyproject.toml", "-"],
        cwd=PROJECT, env=environment, input="\n".join(wanted), capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        return False, " ".join(done.stderr.split())
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)", done.stdout, re.M))
    return True, f"torch {pins['torch']}, " + (f"Triton {pins['triton']}" if "triton" in pins else "no Triton")


def matrix(uv: Path, environment: Mapping[str, str]) -> list[str]:
    """Print one table per variant of `make setup`; return what cannot be installed."""
    wrong = []
    for variant, torch in TORCH.items():
        cells = [(python, name) for python in PYTHONS for name in PLATFORMS]

        def answer(cell: tuple[str, str], variant: str = variant, torch: str = torch) -> tuple[bool, str]:
            extra = triton_for(torch) if variant == "cpu" and cell[1].startswith("Linux") else []
            return resolve(uv, [torch, *extra], cell[0], PLATFORMS[cell[1]], environment)

        with ThreadPoolExecutor(4) as pool:  # they wait for the index
            answers = dict(zip(cells, pool.map(answer, cells), strict=True))
        print(f"\nTORCH_VARIANT={variant}: {torch}, wheels only\n\n| Python | {' | '.join(PLATFORMS)} |")
        print("|---|" + "---|" * len(PLATFORMS))
        for python in PYTHONS:
            texts = (text if fits else "FAILS" for fits, text in (answers[python, name] for name in PLATFORMS))
            print(f"| {python} | {' | '.join(texts)} |", flush=True)
        wrong += [f"{variant}, Python {p}, {name}: {text}" for (p, name), (fits, text) in answers.items() if not fits]
    return wrong


def real_installation(folder: Path, environment: Mapping[str, str]) -> list[str]:
    """`make setup`, `scalefold doctor` and a short demo in a copy; return what failed."""
    (checkout(folder) / "configs" / "short.yaml").write_text(SHORT_DEMO)
    scalefold = ".venv/bin/scalefold"
    steps = (
        (["make", "setup", f"PYTHON={sys.executable}"], 0),
        ([scalefold, "doctor"], 0),
        ([scalefold, "demo", "--config", "configs/short.yaml"], STEPS_ENDED),
    )
    for command, status in steps:
        began = time.monotonic()
        done = subprocess.run(command, cwd=folder, env=environment)
        print(f"{' '.join(command)}: status {done.returncode} after {time.monotonic() - began:.0f} s", flush=True)
        if done.returncode != status:
            return [f"`{' '.join(command)}` ends with status {done.returncode}, not {status}"]
    return [] if (folder / "runs" / "demo" / "report.html").exists() else ["the demo left no report"]


def main() -> int:
    """Print the tables and what failed; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--matrix-only", action="store_true", help="install nothing, only ask the resolver")
    parser.add_argument("--index-url", default="", help="package index, where the public one cannot be reached")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="scalefold-installation-") as name:
        folder = Path(name)
        environment = isolated(os.environ, folder / "home", options.index_url)
        for part in ("home", "copy"):
            (folder / part).mkdir()
        wrong = matrix(resolver(folder / "resolver", environment), environment)
        if not wrong and not options.matrix_only:
            wrong = real_installation(folder / "copy", environment)
    print("\n".join(wrong) or "\nthe installation works", flush=True)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
