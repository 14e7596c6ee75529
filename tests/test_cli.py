"""The command line: what the README promises of it, and mistakes that are answered in one line."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from mlperf_editing import edit, rehearsal, set_value
from scalefold.cli import app, main
from scalefold.config import load_config


def invoke(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return done.exit_code, done.output


def mistake(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> str:
    """What the command prints on a user's mistake: one line, with status 2."""
    monkeypatch.setattr("sys.argv", ["scalefold", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """A valid log of the benchmark."""
    return edit(rehearsal(tmp_path / "result_0.txt"), set_value("submission_org", "A Laboratory"))


def test_the_readme_names_only_verbs_and_options_that_exist(repository: Path) -> None:
    group = typer.main.get_command(app)
    blocks = re.findall(r"```\n(.*?)```", (repository / "README.md").read_text(), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    commands = [shlex.split(line, comments=True) for line in lines if line.startswith("scalefold ")]
    assert len(commands) > 10
    for _, verb, *arguments in commands:
        known = group.commands[verb].params  # type: ignore[attr-defined]
        options = {name for parameter in known for name in parameter.opts}
        assert {argument for argument in arguments if argument.startswith("--")} <= options, verb
        positional = [p for p in known if p.param_type_name == "argument"]
        assert any(p.nargs == -1 for p in positional) or not any("*" in argument for argument in arguments), verb


def test_the_readmes_table_of_systems_says_what_the_files_say(repository: Path) -> None:
    rows = [line.split("|")[1:-1] for line in (repository / "README.md").read_text().splitlines() if "own rank" in line]
    assert len(rows) == 6
    for name, gpus, parallel, batch, _ in rows:
        config = load_config(repository / "configs" / f"{name.strip(' `')}.yaml").config
        p = config.parallel
        assert parallel.split()[0] == str(p.dp_size), name
        assert ("DAP" not in parallel) or f"DAP-{p.dap_size}" in parallel, name
        assert batch.strip() == str(config.training.global_batch_size), name
        if p.gpus_per_node:
            assert gpus.split()[0] == str(p.world_size), name
            assert f"({p.num_train_ranks} + {p.num_eval_ranks})" in gpus, name


def test_check_takes_several_logs_and_ends_with_the_status_of_the_worst(log: Path, tmp_path: Path) -> None:
    other = edit(rehearsal(tmp_path / "result_1.txt"), set_value("submission_org", "A Laboratory"))
    assert invoke("check", log, other)[0] == 0
    edit(other, set_value("max_templates", 2))
    status, text = invoke("check", log, other)
    assert status == 3
    assert f"{log}: valid" in text
    assert f"{other}: well-formed" in text
    edit(log, set_value("seed", "x"))
    assert invoke("check", log, other)[0] == 1


def test_the_report_repeats_the_verdict_of_the_check(log: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    assert invoke("report", log, "--out", out)[0] == 0
    assert "✓ valid closed-division log" in out.read_text()
    edit(log, set_value("max_templates", 2))
    assert invoke("report", log, "--out", out)[0] == 0
    assert "✓ well-formed log of a non-benchmark configuration; 1 key differs" in out.read_text()
    (tmp_path / "job" / "run_1").mkdir(parents=True)
    shutil.copy(log, tmp_path / "job" / "run_1" / "result_1.txt")
    edit(log, set_value("seed", "x"))
    assert invoke("report", log, "--out", out)[0] == 0
    assert "✗ invalid" in out.read_text()
    assert invoke("report", log, tmp_path / "job", "--out", out)[0] == 0
    assert f"✗ 2 logs, the worst is {log}: invalid" in out.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["describe-system", "{tmp}/file/x.json"], "{tmp}/file: "),
        (["report", "{log}", "--out", "{tmp}/file/x.html"], "{tmp}/file"),
        (["prepare", "--mmcif-dir", "{tmp}/raw", "--out", "{tmp}/file/store"], "{tmp}/file"),
        (
            ["pack", "{tmp}/out", "--org", "O", "--system", "{tmp}/none.json", "--config", "c.yaml"],
            "{tmp}/none.json: No",
        ),
        (["pack", "{tmp}/out", "--org", "O", "--system", "{tmp}/file", "--config", "c.yaml"], "{tmp}/file: no JSON"),
        (["compare-runs", "{tmp}", "{tmp}", "--plot", "{tmp}/x.foo"], "x.foo: must end in .svg or .png"),
        (["bench-data", "{tmp}", "--step-s", "0.2"], "--step-s 0.2: must be positive, and --config must name"),
        (["demo", "--folder", "{tmp}/demo", "--config", "{tmp}/none.yaml"], "none.yaml: cannot read the configuration"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_that_names_the_thing(
    arguments: list[str],
    message: str,
    log: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "file").write_text("no folder\n")
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "1abc.cif").write_text("data_1ABC\n")
    places = {"tmp": tmp_path, "log": log}
    error = mistake(capsys, monkeypatch, *(argument.format(**places) for argument in arguments))
    assert message.format(**places) in error
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "demo").exists()


def test_an_error_that_is_no_mistake_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["scalefold", "check", "x"])
    monkeypatch.setattr("scalefold.mlperf.check.check_log", lambda _: json.loads("{"))
    with pytest.raises(ValueError, match="Expecting property name"):
        main()


def test_published_runs_are_replayed_with_a_status(repository: Path, tmp_path: Path) -> None:
    table = repository / "src/scalefold/mlperf/published_runs.csv"
    status, text = invoke("simulate", "--replay", table)
    assert status == 0
    assert "worst run: TACC strong 5, -9.16 %" in text
    lines = table.read_text().splitlines()
    header, row = lines[0].split(","), next(line for line in lines if line.startswith("Clemson"))
    facts = row.rsplit(",", len(header) - 1 - header.index("eval_points"))
    place = header.index("step_s_median") - header.index("eval_points")
    facts[place] = str(2 * float(facts[place]))
    slower = tmp_path / "slower.csv"
    slower.write_text("\n".join([lines[0], ",".join(facts)]) + "\n")
    assert invoke("simulate", "--replay", slower)[0] == 1


@pytest.mark.parametrize("arguments", [[], ["configs/tiny.yaml", "--replay", "x.csv"]], ids=["neither", "both"])
def test_a_simulation_wants_a_system_or_published_runs(capsys, monkeypatch, arguments: list[str]) -> None:
    assert "either a system file or --replay" in mistake(capsys, monkeypatch, "simulate", *arguments)
