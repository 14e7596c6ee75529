"""Verbs of the command line around a job: what it does now, and its kernels compiled ahead."""

import sys
from pathlib import Path
from typing import Annotated

import typer


def add_verbs(app: typer.Typer) -> None:
    """Register every verb of this file."""
    app.command("compile")(compile_ahead)
    app.command()(status)


def compile_ahead(
    config: Annotated[Path, typer.Option(help="system file")],
    out: Annotated[Path, typer.Option(help="Triton cache to fill; launch.compiled_dir hands it to a job's nodes")],
    gpu: Annotated[str | None, typer.Option(help="A100, H100, H200, ...; default: parallel.gpu")] = None,
    workers: Annotated[int, typer.Option(help="processes that compile; 0: as many as processors", min=0)] = 0,
    overrides: Annotated[list[str] | None, typer.Argument(help="key.sub=value, after the file")] = None,
) -> None:
    """Compile the kernels of a configuration without a GPU, so that no node does it at its start (minutes).

    A second call compiles what is new only.

    Example: scalefold compile --gpu H100 --out compiled --config configs/eos_h100_64x8_dap2.yaml
    """
    from scalefold.config import load_config
    from scalefold.processors import processors
    from scalefold.run.compile_ahead import compile_kernels

    settings, note = load_config(config, overrides or []).config, lambda text: print(text, flush=True)
    done = compile_kernels(settings, gpu or settings.parallel.gpu, out, note, workers or processors())
    print(f"{out}: {done.text()}")


def status(
    what: Annotated[
        str | None, typer.Argument(help="job number, or folder of a run, job or several; default: runs")
    ] = None,
    watch: Annotated[bool, typer.Option(help="show it again and again until everything is over")] = False,
    every: Annotated[float, typer.Option(help="seconds between two looks of --watch", min=0.1)] = 5.0,
    json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    check: Annotated[bool, typer.Option(help="judge finished logs anew and keep the verdicts beside them")] = False,
) -> None:
    """Say what jobs and runs are doing: queue, repeats, last step and lDDT-Cα, minutes left by the plan, verdicts.

    Example: scalefold status 4711 --watch
    """
    from scalefold.launch.status import as_json
    from scalefold.launch.status import status as look
    from scalefold.launch.status import watch as look_again

    for jobs in look_again(what, every) if watch else [look(what, check)]:
        if check and len(jobs) == 1 and jobs[0].job_id is None:
            text = "\n".join(run.text() for run in jobs[0].runs)
        else:
            text = "\n".join(job.text() for job in jobs)
        clear = "\x1b[2J\x1b[H" if watch and sys.stdout.isatty() else ""
        print(f"{clear}{as_json(jobs) if json else text}", flush=True)
