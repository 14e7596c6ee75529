"""The command line: verbs to functions, no logic of its own.

Heavy imports happen inside the verbs, so that ``scalefold show`` works on a login node without touching torch.
"""

import errno
import io
import os
import sys
from typing import Annotated

import typer

from scalefold import __version__
from scalefold.cli import jobs as cli_launch
from scalefold.cli import tuning as cli_tuning
from scalefold.cli.data import download, prepare, verify_data
from scalefold.cli.results import add_verbs, check
from scalefold.cli.runs import doctor, launch, leave, plan, show, simulate, train
from scalefold.errors import ScaleFoldError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def print_version(asked: bool) -> None:
    """Of the option ``--version``, which needs no verb."""
    if asked:
        print(f"scalefold {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """MLPerf HPC OpenFold: prepare data, train, evaluate, check, submit."""


def main() -> None:
    """Entry of the ``scalefold`` command: user errors are one line and a status; other errors keep their traceback.

    A file that cannot be opened, read or written is a user error too.
    """
    print_anything()
    try:
        app()
    except ScaleFoldError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        leave(error.exit_status)
    except OSError as error:
        if error.filename is None and error.errno not in SHORTAGES:
            raise
        place = error.filename if error.filename is not None else PLACES.get(error.errno or 0, "")
        place = f"{place}: " if place else ""
        what_to_do = SHORTAGES.get(error.errno or 0, "")
        print(f"error: {place}{error.strerror}{what_to_do}", file=sys.stderr, flush=True)
        leave(ScaleFoldError.exit_status)


SHORTAGES = {
    errno.ENOSPC: "",
    errno.EDQUOT: "",
    errno.EMFILE: f"; raise the limit (ulimit -n), which this process ({os.getpid()}) has reached",
    errno.ENFILE: "; the whole node has reached its limit (sysctl fs.file-max)",
}  # of no file in particular
PLACES = dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "the output, or a file that was open")


def print_anything() -> None:
    """Let no character end a program: what the terminal's encoding lacks is printed as its escape."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


for verb in (doctor, show, prepare, download, verify_data, train, check, plan, simulate, launch):
    app.command()(verb)


cli_launch.add_verbs(app)
cli_tuning.add_verbs(app)


add_verbs(app)
