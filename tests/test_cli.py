"""The command line: what the README promises of it, and mistakes that are answered in one line."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import scalefold
from mlperf_editing import edit, rehearsal, set_value
from scalefold.cli import app, main
from scalefold.config import load_config
from scalefold.mlperf.log.published import published_runs
from scalefold.mlperf.log.rehearsal import published_script, write_rehearsal
from scalefold.mlperf.pack.verify import PackageVerdict, Row


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


def test_help_shows_every_word_of_its_text_and_no_double_negative(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    for verb, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        shown = invoke(verb, "--help")[1]
        texts = [command.callback.__doc__, *(getattr(parameter, "help", None) or "" for parameter in command.params)]
        bracketed = [word for text in texts for word in text.split() if "[" in word]
        assert [word for word in bracketed if word not in shown] == [], verb
        assert "--no-no-" not in shown, verb


def test_a_full_output_is_called_one() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "scalefold", "show", str(Path(__file__).parents[1] / "configs" / "tiny.yaml")],
            stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert done.stderr == "error: the output, or a file that was open: No space left on device\n"
    assert done.returncode == 2


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("pack", "out", "--org", "X", "--system", "nope.json", "--config", "c", "--strong", "r"), "describe-system`"),
        (("bench-data", "nope", "--config", "c", "--step-s", "nan"), "--step-s nan: must be positive"),
    ],
)
def test_a_submitters_mistake_says_what_to_do(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], words: str
) -> None:
    assert words in mistake(capsys, monkeypatch, *arguments)


def test_a_system_without_nodes_and_a_measurement_of_nothing_are_refused(tmp_path: Path) -> None:
    assert invoke("describe-system", tmp_path / "x.json", "--nodes", 0)[0] == 2
    assert invoke("bench-data", tmp_path, "--samples", 0)[0] == 2
    assert not (tmp_path / "x.json").exists()


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


def test_check_judges_every_file_even_if_one_cannot_be_read(log: Path, tmp_path: Path) -> None:
    status, text = invoke("check", tmp_path / "absent.txt", log)
    assert status == 2
    assert f"error: {tmp_path}/absent.txt: unreadable: cannot read the log: No such file or directory" in text
    assert f"{log}: valid closed-division log" in text


def from_json(*arguments: object) -> tuple[int, Any]:
    """What a verb says to a program: strict JSON and nothing else on standard output."""
    done = CliRunner().invoke(app, [str(argument) for argument in (*arguments, "--json")])
    return done.exit_code, json.loads(done.stdout, parse_constant=pytest.fail)


def test_verdicts_scores_and_plans_are_json_for_programs(log: Path, tmp_path: Path, repository: Path) -> None:
    edit(log, set_value("max_templates", 2))
    status, verdicts = from_json("check", log, tmp_path / "absent.txt")
    assert status == 2
    assert [v["kind"] for v in verdicts] == ["non_benchmark", "unreadable"]
    assert verdicts[0]["differences"] == [{"key": "max_templates", "logged": 2, "expected": 4}]
    status, scores = from_json("score", tmp_path)
    assert (status, scores[0]["is_legal"], scores[0]["runs"][0]["file"]) == (1, False, log.name)
    status, plan = from_json("plan", repository / "configs/eos_h100_260x8_dap8.yaml")
    assert status == 0
    assert plan["minutes"] == plan["quantities"]["time to train"]["value"]
    assert plan["quantities"]["step time"]["source"].startswith("estimated")
    assert plan["world_size"] == 2080


def test_verify_package_is_json_for_programs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    row = Row("score", "results/a/strong/openfold", "fail", "9 runs", "run again", "openfold", "a")
    monkeypatch.setattr("scalefold.mlperf.pack.verify.verify_package", lambda f: PackageVerdict(str(f), (row,), ()))
    status, verdict = from_json("verify-package", tmp_path)
    assert status == 1
    assert verdict["rows"] == [vars(row)]


def test_score_ends_with_1_when_runs_converge_faster_than_the_reference_allows(tmp_path: Path) -> None:
    for run in published_runs(submitter="HPE+LBNL"):
        write_rehearsal(published_script(run), tmp_path / "strong/openfold" / f"result_{run.run}.txt")
    status, text = invoke("score", tmp_path)
    assert "time to train 14.646 min" in text
    assert "floor 111,199: fail" in text
    assert status == 1


def test_the_version_needs_no_verb() -> None:
    assert invoke("--version") == (0, f"scalefold {scalefold.__version__}\n")


def test_a_shell_completes_verbs() -> None:
    words = {"_SCALEFOLD_COMPLETE": "complete_bash", "COMP_WORDS": "scalefold verify", "COMP_CWORD": "1"}
    command = [sys.executable, "-c", "from scalefold.cli import app; app(prog_name='scalefold')"]
    done = subprocess.run(command, env=os.environ | words, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["verify-data", "verify-package"]


def two_systems(tmp_path: Path, repository: Path) -> list[str]:
    """Arguments of ``pack`` for a strong and a weak system, as two jobs left their runs."""
    for scaling in ("strong", "weak"):
        for run in published_runs(submitter="NVIDIA", scaling=scaling):
            file = tmp_path / scaling / f"run_{run.run}" / f"result_{run.run}.txt"
            write_rehearsal(published_script(run, org="A Laboratory"), file)
    for name in ("n260", "n256"):
        (tmp_path / f"{name}.json").write_text(json.dumps({"number_of_nodes": name[1:]}))
    configs = repository / "configs"
    given = {
        "n260": ["--config", f"n260={configs}/eos_h100_260x8_dap8.yaml", "--strong", f"n260={tmp_path}/strong"],
        "n256": ["--config", f"n256={configs}/eos_h100_16x8_weak.yaml", "--weak", f"n256={tmp_path}/weak"],
    }
    systems = [part for name, runs in given.items() for part in ("--system", str(tmp_path / f"{name}.json"), *runs)]
    return ["pack", str(tmp_path / "out"), "--org", "A Laboratory", *systems]


def test_several_systems_are_packed_by_one_command(tmp_path: Path, repository: Path) -> None:
    arguments = two_systems(tmp_path, repository)
    status, text = invoke(*arguments, "--dry-run")
    assert status == 0, text
    for path in (
        "results/n260/strong/openfold/result_9.txt",
        "results/n256/weak/openfold/result_15.txt",
        "systems/n260.json",
        "systems/n256.json",
        "benchmarks/openfold/n256/eos_h100_16x8_weak.yaml",
    ):
        assert path in text
    assert "n256/strong" not in text
    assert not (tmp_path / "out").exists()


def test_runs_without_a_system_are_refused_where_there_are_several(
    tmp_path: Path, repository: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = two_systems(tmp_path, repository)
    error = mistake(capsys, monkeypatch, *(argument.removeprefix("n256=") for argument in arguments))
    assert "eos_h100_16x8_weak.yaml: must begin with n260= or n256=" in error
    without = [argument for argument in arguments if "config" not in argument]
    error = mistake(capsys, monkeypatch, *without, "--config", "n260=x.yaml")
    assert "no --config for system n256" in error


def test_the_report_repeats_the_verdict_of_the_check(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "report.html"
    assert invoke("report", log, "--out", out)[0] == 0
    assert "✓ valid closed-division log" in out.read_text()
    monkeypatch.setattr("scalefold.report.page._figures", lambda *parts: [])  # drawn once
    edit(log, set_value("max_templates", 2))
    assert invoke("report", log, "--out", out)[0] == 0
    assert "○ well-formed log of a non-benchmark configuration; 1 key differs" in out.read_text()
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
            "{tmp}/none.json: cannot read the system description",
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
    monkeypatch.setattr("scalefold.mlperf.judge.check.check_log", lambda _: json.loads("{"))
    with pytest.raises(ValueError, match="Expecting property name"):
        main()


def test_published_runs_are_replayed_with_a_status(repository: Path, tmp_path: Path) -> None:
    table = repository / "src/scalefold/mlperf/log/published_runs.csv"
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
