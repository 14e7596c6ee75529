"""The verb of the command line that tunes kernels."""

import os
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from scalefold.errors import ConfigError, DeviceError

LEAST_MINUTES = 0.5  # for which a new process is worth its start


def add_verbs(app: typer.Typer) -> None:
    """Register every verb of this file."""
    app.command()(tune)


def tune(
    kernels: Annotated[str, typer.Option(help="parts of kernels' names, with commas; default: all")] = "",
    dap: Annotated[str, typer.Option(help="training shares, with commas")] = "1",
    evaluation: Annotated[str, typer.Option(help="lengths of chains, forward only, with commas")] = "",
    minutes: Annotated[float, typer.Option(help="time limit of the whole search", min=0.1)] = 6.0,
    missing: Annotated[bool, typer.Option(help="only problems without a tuned entry")] = False,
    no_history: Annotated[bool, typer.Option("--no-history", help="search from nothing, to compare with")] = False,
    history: Annotated[
        list[Path] | None, typer.Option(help="further trials to learn from, CSV (again for more)")
    ] = None,
    model: Annotated[Path | None, typer.Option(help="model of the history: read if it exists, else written")] = None,
    fit: Annotated[bool, typer.Option(help="only write --model, for machines without scikit-learn (no GPU)")] = False,
    workers: Annotated[int, typer.Option(help="processes that compile; 0: all processors but one", min=0)] = 0,
    out: Annotated[Path, typer.Option(help="folder for table, picture and a copy of the choices")] = Path("runs/tune"),
) -> None:
    """Search launch parameters of the kernels on this GPU, advised by all earlier trials, and save what wins.

    Needs scikit-learn (the extra `tune`), or a --model. Called again it goes on where it was stopped; docs/tuning.md.

    Example: scalefold tune --dap 1,2,4,8 --minutes 10
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ConfigError("TRITON_INTERPRET=1: the interpreter has no launch parameters to tune; unset it")
    try:
        from scalefold.tune.command import Request, fit_model, table_text
        from scalefold.tune.command import tune as search
    except ImportError as error:
        raise ConfigError(f"tune: Triton cannot be imported: {error}") from None
    request = Request(
        kernels=tuple(part for part in kernels.split(",") if part),
        daps=_numbers("--dap", dap),
        lengths=_numbers("--evaluation", evaluation),
        missing=missing,
        minutes=minutes,
        workers=workers,
        model=model,
        alone=no_history,
        histories=tuple(history or ()),
        out=out,
    )
    if fit:
        fit_model(request)
        return
    begin = time.monotonic()
    try:
        rows = search(request)
    except DeviceError as error:  # of one candidate, which is tried no more; only a new process can use the GPU again
        left = minutes - (time.monotonic() - begin) / 60
        if left < LEAST_MINUTES:
            raise
        print(f"{error}: a new process does, for {left:.1f} minutes", flush=True)
        os.execv(sys.executable, [sys.executable, "-m", "scalefold", *sys.argv[1:], "--minutes", f"{left:.2f}"])
    print(table_text(rows))
    print(f"{out}: table, picture and choices")


def _numbers(option: str, text: str) -> tuple[int, ...]:
    parts = [part for part in text.split(",") if part]
    if not all(part.isdigit() and int(part) for part in parts):
        raise ConfigError(f"{option} {text}: must be whole numbers with commas, for example 4,8")
    return tuple(map(int, parts))
