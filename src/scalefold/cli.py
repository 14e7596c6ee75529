"""The command line: verbs to functions, no logic of its own.

Heavy imports happen inside the verbs, so that ``scalefold show`` works on a login node without touching torch.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from scalefold.errors import ScaleFoldError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="MLPerf HPC OpenFold: prepare data, train, evaluate, check, submit.",
)

ConfigFile = Annotated[Path, typer.Argument(help="system file, for example configs/tiny.yaml")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key.sub=value, after the file")]


def main() -> None:
    """Entry of the ``scalefold`` command: user errors are one line and exit status 2."""
    try:
        app()
    except ScaleFoldError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


@app.command()
def doctor() -> None:
    """Examine this machine. Exit status 1 if a run would fail.

    Example: scalefold doctor
    """
    from scalefold.doctor import examine

    findings = examine()
    for finding in findings:
        print(f"{finding.level:8s} {finding.topic:16s} {finding.text}")
    raise typer.Exit(code=int(any(f.level == "problem" for f in findings)))


@app.command()
def show(config: ConfigFile, overrides: Overrides = None) -> None:
    """Print every value of a configuration and where it comes from.

    Example: scalefold show configs/tiny.yaml training.seed=1
    """
    from scalefold.config import describe_config, load_config

    rows = describe_config(load_config(config, overrides or []))
    width = max(len(key) for key, _, _ in rows)
    for key, value, origin in rows:
        print(f"{key:{width}s}  {value:32s}  {origin}")


@app.command()
def check(log: Annotated[Path, typer.Argument(help="result_N.txt")]) -> None:
    """Judge an MLPerf log with the official checker and our stricter rules.

    Exit status 0: valid closed-division log; 3: well-formed log of a non-benchmark configuration; 1: invalid.

    Example: scalefold check runs/tiny/result_0.txt
    """
    from scalefold.mlperf.check import check_log

    verdict = check_log(log)
    print(verdict.text())
    raise typer.Exit(code=verdict.exit_code)
