"""The page that says where everything is names files, folders, functions and methods that are there."""

import ast
import re
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def quoted(repository: Path) -> list[str]:
    """Everything in back quotes on the page."""
    return re.findall(r"`([^`\n]+)`", (repository / "docs" / "where_is.md").read_text())


def definitions(file: Path) -> set[str]:
    """Names of functions and classes of a file, methods as ``Class.method``."""
    found = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return found


def test_every_place_of_the_walk_is_there(quoted: list[str], repository: Path) -> None:
    places = [text.split(":") for text in quoted if re.fullmatch(r"[\w/]+\.py:[\w.]+", text)]
    assert len(places) >= 15
    missing = [
        f"{file}:{name}" for file, name in places if name not in definitions(repository / "src/scalefold" / file)
    ]
    assert missing == []


def test_every_file_and_folder_named_is_there(quoted: list[str], repository: Path) -> None:
    package, rooms = repository / "src" / "scalefold", []
    names = [text for text in quoted if re.fullmatch(r"[\w/]*(\.py|\.md|\.csv|/)", text)]
    assert len(names) >= 40
    every = {path.name for path in package.rglob("*.py")}  # a bare name follows its folder: `data/store/`: `store.py`
    for name in names:
        if not (package / name).exists() and not (repository / name).exists() and name not in every:
            rooms.append(name)
    assert rooms == []
