"""Check docker/Dockerfile without a Docker engine. Prints what is wrong; exit status 1 if anything is.

usage: python docker/check.py
"""

import fnmatch
import importlib.metadata
import re
import shlex
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

PROJECT = Path(__file__).resolve().parents[1]
INSTRUCTIONS = {"FROM", "ARG", "ENV", "WORKDIR", "COPY", "RUN", "ENTRYPOINT", "CMD", "USER", "LABEL"}
RDMA = (  # the one exception: user space of the network cards, which no wheel brings
    "apt-get update && apt-get install -y --no-install-recommends ibverbs-providers libibverbs1 librdmacm1 rdma-core "
    "&& rm -rf /var/lib/apt/lists/*"
)
REFUSED = re.compile(r"\b(apt-get|apt|apk|dnf|yum|conda|git\+\S+|curl|wget|make|gcc|nvcc)\b")


def instructions(text: str) -> list[tuple[int, str, str]]:
    """(line, instruction, arguments), with comments dropped and continued lines joined."""
    found, buffer, start = [], "", 0
    for number, line in enumerate(text.splitlines(), 1):
        if not buffer and (not line.strip() or line.lstrip().startswith("#")):
            continue
        if line.lstrip().startswith("#"):
            continue
        start = start if buffer else number
        buffer += line.rstrip().removesuffix("\\") + " "
        if not line.rstrip().endswith("\\"):
            word, _, arguments = buffer.strip().partition(" ")
            found.append((start, word, " ".join(arguments.split())))
            buffer = ""
    if buffer:
        found.append((start, "UNFINISHED", buffer.strip()))
    return found


def problems(text: str, project: Path = PROJECT) -> list[str]:
    """Everything that is wrong with a Dockerfile, one sentence each."""
    steps, wrong = instructions(text), []
    for line, word, arguments in steps:
        if word not in INSTRUCTIONS:
            wrong.append(f"line {line}: `{word}` is no instruction that this image uses")
        elif word == "FROM":
            wrong += _base_problems(line, arguments)
        elif word == "COPY":
            wrong += _copy_problems(line, arguments, project)
        elif word == "RUN" and arguments != RDMA and (tool := REFUSED.search(arguments)):
            wrong.append(f"line {line}: `{tool[0]}`: the image is made with pip alone")
    if not steps or steps[0][1] not in ("FROM", "ARG"):
        wrong.append("the first instruction must be FROM")
    if not steps or steps[-1][1:] != ("RUN", "scalefold doctor"):
        wrong.append("the last instruction must be `RUN scalefold doctor`")
    return wrong


def _base_problems(line: int, arguments: str) -> list[str]:
    pinned = re.fullmatch(r"\S+(:\d+\.\d+\.\d+\S*|@sha256:[0-9a-f]{64})", arguments)
    return [] if pinned else [f"line {line}: `{arguments}` must name an exact version or a digest"]


def _copy_problems(line: int, arguments: str, project: Path) -> list[str]:
    wrong = []
    for source in shlex.split(arguments)[:-1]:
        if not (project / source).exists():
            wrong.append(f"line {line}: COPY {source}: there is no such file")
        elif ignored(source, project / ".dockerignore"):
            wrong.append(f"line {line}: COPY {source}: .dockerignore leaves it out")
    return wrong


def ignored(path: str, ignore_file: Path) -> bool:
    """Whether a top-level path is left out of the build; later patterns win, ``!`` takes back."""
    verdict = False
    for pattern in ignore_file.read_text().split("\n"):
        pattern = pattern.strip()
        if pattern and not pattern.startswith("#") and fnmatch.fnmatch(path, pattern.lstrip("!").strip("/")):
            verdict = not pattern.startswith("!")
    return verdict


def pin_problems(text: str, project: Path = PROJECT) -> list[str]:
    """Requirements that the pinned versions miss: the project's own, and theirs as far as they are installed here."""
    pins = read_pins(project / "constraints.txt")
    torch = re.search(r"^ARG TORCH=torch==(\S+)$", text, re.M)
    if torch is None:
        return ["ARG TORCH must be torch==VERSION"]
    pins["torch"] = torch[1]
    wrong, seen = [], set()
    waiting = [
        ("pyproject.toml", Requirement(line))
        for line in tomllib.loads((project / "pyproject.toml").read_text())["project"]["dependencies"]
    ]
    while waiting:
        origin, wanted = waiting.pop()
        name = _canonical(wanted.name)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        if name not in pins:
            if not name.startswith(("nvidia-", "cuda-")) and name not in ("setuptools", "triton"):  # torch pins them
                wrong.append(f"{origin} needs {wanted}, which constraints.txt does not pin")
        elif not wanted.specifier.contains(pins[name]):
            wrong.append(f"{origin} needs {wanted}, constraints.txt pins {pins[name]}")
        if name not in seen and name != "torch":
            seen.add(name)
            waiting += [(name, Requirement(line)) for line in _requirements(name)]
    return sorted(set(wrong))


def read_pins(file: Path) -> dict[str, str]:
    """Name -> version of ``name==version`` lines."""
    lines = [line.split("#")[0].strip() for line in file.read_text().splitlines()]
    return {_canonical(name): version for name, _, version in (line.partition("==") for line in lines if line)}


def _requirements(name: str) -> list[str]:
    try:
        return importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        return []


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def main() -> int:
    """Print every problem and return the exit status."""
    text = (PROJECT / "docker" / "Dockerfile").read_text()
    wrong = problems(text) + pin_problems(text)
    print("\n".join(wrong) or "docker/Dockerfile: fine")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
