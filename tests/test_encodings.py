"""No character ends a program, whatever the encoding of terminal and locale."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from runs import SMALLEST, TINY
from scalefold.report.record import read_metrics


def calls_without_encoding(file: Path) -> Iterator[str]:
    """Calls that read or write text in whatever encoding the locale has."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or any(k.arg == "encoding" for k in node.keywords):
            continue
        name = ast.unparse(node.func)
        modes = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        opens = name == "open" or name.endswith((".open", "os.fdopen"))
        others = ("os.open", "gzip.open", "gate.open", "run.batches.open", "self.open")
        binary = name in others or "b" in "".join(modes) or "b'" in ast.unparse(node)
        if name.endswith((".read_text", ".write_text")) or (opens and not binary):
            yield f"{file.name}:{node.lineno}: {ast.unparse(node)}"


def test_every_text_file_is_opened_with_its_encoding(repository: Path) -> None:
    found = [call for file in (repository / "src").rglob("*.py") for call in calls_without_encoding(file)]
    assert found == []


C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}  # what files and arguments are read in


def test_training_prints_its_arrows_on_a_terminal_of_latin_1_in_a_c_locale(tiny_store: Path, tmp_path: Path) -> None:
    run_dir, config = tmp_path / "run", tmp_path / "daily.yaml"
    config.write_text(f"base: {TINY}\ndescription: größer → schneller\n", encoding="utf-8")
    places = [f"data.store_dir={tiny_store}", f"run.run_dir={run_dir}", "run.checkpoint_every_iters=2"]
    command = [sys.executable, "-m", "scalefold", "train", str(config), *SMALLEST, *places]
    environment = os.environ | C_LOCALE | {"PYTHONIOENCODING": "latin-1"}
    done = subprocess.run(command, env=environment, capture_output=True)
    assert done.returncode == 4, done.stderr.decode(errors="replace")
    assert b"lddt" in done.stdout
    assert b"\\u2192" in done.stdout
    assert len(read_metrics(run_dir).eval_lddt_ca) == 2


def test_an_error_that_quotes_such_a_name_is_still_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "scalefold", "train", str(tmp_path / "→.yaml")]
    done = subprocess.run(command, env=os.environ | {"PYTHONIOENCODING": "ascii:strict"}, capture_output=True)
    assert done.returncode == 2
    assert done.stderr.startswith(b"error: ")
    assert len(done.stderr.splitlines()) == 1
