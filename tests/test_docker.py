"""The container's recipe, as far as it can be checked without a Docker engine."""

import importlib.util
import re
import shutil
from pathlib import Path

import pytest

from scalefold.launch.render import IMAGE_PROJECT_DIR

REPOSITORY = Path(__file__).resolve().parents[1]
TEXT = (REPOSITORY / "docker" / "Dockerfile").read_text()

_spec = importlib.util.spec_from_file_location("docker_check", REPOSITORY / "docker" / "check.py")
assert _spec is not None
assert _spec.loader is not None
check = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(check)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the files that the recipe names."""
    for name in (".dockerignore", "constraints.txt", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, tmp_path)
    for name in ("src", "launch", "configs"):
        (tmp_path / name).mkdir()
    return tmp_path


def test_the_recipe_has_no_problem_and_its_pins_satisfy_every_requirement() -> None:
    assert check.problems(TEXT) == []
    assert check.pin_problems(TEXT) == []


def test_the_image_keeps_the_project_where_job_files_look_for_it() -> None:
    assert f"WORKDIR {IMAGE_PROJECT_DIR}" in TEXT
    assert "COPY launch ./launch" in TEXT


def test_the_image_does_not_fix_the_cache_that_a_job_chooses_and_shows_the_network_cards() -> None:
    variables = next(arguments for _, word, arguments in check.instructions(TEXT) if word == "ENV")
    assert "SCALEFOLD_CACHE_DIR" not in variables
    assert "MELLANOX_VISIBLE_DEVICES=all" in variables


def test_only_the_packages_of_rdma_come_from_the_distribution() -> None:
    assert check.problems(TEXT) == []
    spoiled = TEXT.replace("rdma-core \\", "rdma-core gcc \\")
    assert any("`apt-get`: the image is made with pip alone" in problem for problem in check.problems(spoiled))


def test_continued_lines_are_one_instruction_and_comments_are_none() -> None:
    found = check.instructions("# a\nFROM x:1.2.3\nRUN a \\\n  # why\n  && b\n")
    assert found == [(2, "FROM", "x:1.2.3"), (3, "RUN", "a && b")]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (r"python:3\.12\.8-bookworm", "python:latest", "must name an exact version or a digest"),
        ("RUN scalefold doctor", "RUN true", "last instruction must be `RUN scalefold doctor`"),
        (r"COPY src \./src", "COPY sources ./src", "COPY sources: there is no such file"),
        ("RUN python", "RUN apt-get install gcc && python", "`apt-get`: the image is made with pip alone"),
        ("WORKDIR", "WORKIDR", "`WORKIDR` is no instruction"),
    ],
)
def test_a_spoiled_recipe_is_refused_with_the_line(old: str, new: str, message: str, project: Path) -> None:
    spoiled = re.sub(old, new, TEXT, count=1)
    assert spoiled != TEXT
    assert any(message in problem for problem in check.problems(spoiled, project))


def test_a_source_that_dockerignore_leaves_out_is_found(project: Path) -> None:
    ignore = project / ".dockerignore"
    ignore.write_text(ignore.read_text().replace("!configs\n", ""))
    assert any("COPY configs: .dockerignore leaves it out" in problem for problem in check.problems(TEXT, project))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("typer==", "typer==0.1.0 #", r"pyproject\.toml needs typer>=.*, constraints\.txt pins 0\.1\.0"),
        ("shellingham==", "other==", "typer needs shellingham.*which constraints.txt does not pin"),
    ],
)
def test_a_pin_that_misses_a_requirement_is_found(old: str, new: str, message: str, project: Path) -> None:
    constraints = project / "constraints.txt"
    constraints.write_text(constraints.read_text().replace(old, new))
    assert any(re.search(message, problem) for problem in check.pin_problems(TEXT, project))
